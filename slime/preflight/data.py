"""The data: are the files there, with the columns that flags name, and do their first rows say something?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from slime.data.columns import column_problems, columns_of, read_text
from slime.data.errors import BadRow, DataError
from slime.data.reader import RowRef, parse_source, read_rows
from slime.preflight.finding import Finding
from slime.preflight.launch import Launch

CHECK = "data"
FIRST_ROWS = 64
"""Rows that are read; a run looks at all of them once its models are loaded."""


def check_data(launch: Launch) -> Iterator[Finding]:
    """Look at the training data and at every evaluation set, by the run's own reader."""
    args = launch.args
    sources = {} if args.replays else {args.prompt_data: "--prompt-data"}
    for name, source in args.eval_sets:
        sources.setdefault(source, f"--eval-prompt-data {name}")
    for source, flag in sources.items():
        path = parse_source(source)[0]
        if launch.is_coming(path):
            continue
        if not Path(path).exists():
            if not Path(path).is_absolute() and Path(path).suffix == "" and path.count("/") == 1:
                continue  # a name on the hub
            yield Finding(
                check=CHECK, what=f"{flag} {source} is not there", remedy="name a file or folder that is"
            )
            continue
        yield from _source(launch, flag, source)


def _source(launch: Launch, flag: str, source: str) -> Iterator[Finding]:
    args = launch.args
    picture = args.multimodal_keys.get("image")
    try:
        # Pictures can be large, and it is the models' business to look at them.
        rows = read_rows(source, [column for column in columns_of(args) if column != picture])
    except DataError as error:
        yield Finding(
            check=CHECK, what=f"{flag}: {error}", remedy="see above; the file may be damaged or another's"
        )
        return
    problems = [
        problem
        for shard in {id(row.shard): row.shard for row in rows}.values()
        for problem in column_problems(shard, args)
    ]
    for problem, remedy in problems:
        yield Finding(check=CHECK, what=f"{flag}: {problem}", remedy=remedy)
    if not problems:
        yield from _rows(launch, flag, rows[:FIRST_ROWS])


def _rows(launch: Launch, flag: str, rows: list[RowRef]) -> Iterator[Finding]:
    args = launch.args
    bad: list[BadRow] = []
    good: list[RowRef] = []
    blank: list[RowRef] = []
    for row in rows:
        try:
            _, label, _ = read_text(row, args)
        except BadRow as error:
            bad.append(error)
            continue
        good.append(row)
        if label is not None and not label.strip():
            blank.append(row)
    if bad:
        skips = args.bad_rows == "skip" and len(bad) < len(rows)
        yield Finding(
            check=CHECK,
            what=f"{flag}: {len(bad)} of the first {len(rows)} rows cannot be used. {bad[0]}",
            remedy="mend the row, name the right columns (--input-key, --label-key, --metadata-key), or "
            "leave such rows out by --bad-rows skip",
            fatal=not skips,
        )
    if blank:
        yield Finding(
            check=CHECK,
            what=f"{flag}: {len(blank)} of the first {len(rows)} rows have a blank answer in column "
            f"{args.label_key!r}, the first one {blank[0].file}, row {blank[0].number}",
            remedy="every response to them is graded as wrong; mend the rows, or name another --label-key",
            fatal=False,
        )
    picture = args.multimodal_keys.get("image")
    if picture is None or _sees(args.hf_checkpoint):
        return
    if any(_pictures(row, picture) for row in good):
        yield Finding(
            check=CHECK,
            what=f"{flag} has pictures, and --hf-checkpoint {args.hf_checkpoint} has no vision part",
            remedy="use a model that sees, or data without pictures (--multimodal-keys '{}')",
        )


def _pictures(row: RowRef, column: str) -> bool:
    """Tell whether a row of a jsonl file has pictures; of a table they have not been read."""
    return row.shard.columns is None and bool(row.shard.count(row.index, column))


def _sees(checkpoint: str) -> bool:
    """Tell whether a model has a vision part, as far as its config is here."""
    try:
        return "vision_config" in json.loads((Path(checkpoint) / "config.json").read_bytes())
    except (OSError, ValueError):
        return True
