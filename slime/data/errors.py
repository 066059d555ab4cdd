"""What can be wrong with data, said with file and row."""

from __future__ import annotations


class DataError(ValueError):
    """A data set as a whole cannot be used: not there, unreadable, a column missing, or no good row."""


class BadRow(DataError):  # noqa: N818  a noun of the data, as users read it in messages
    """One row cannot be used. `file`, `row` (1-based; the line, for jsonl) and `why` say it all."""

    def __init__(self, file: str, row: int, why: str) -> None:
        super().__init__(f"{file}, row {row}: {why}")
        self.file = file
        self.row = row
        self.why = why

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, int, str]]:
        """Pickle by the three parts, so that it crosses a process border."""
        return BadRow, (self.file, self.row, self.why)
