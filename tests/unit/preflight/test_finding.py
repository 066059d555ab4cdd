"""How findings are shown."""

from __future__ import annotations

from slime.preflight.finding import GIB, Finding, amount, report


def test_errors_come_before_warnings_each_with_its_remedy() -> None:
    findings = [
        Finding(check="disk", what="little room", remedy="make some", fatal=False),
        Finding(check="ports", what="port 1 is taken", remedy="free it"),
    ]
    assert report(findings, 9).splitlines() == [
        "Preflight: 1 error, 1 warning.",
        "  error, ports: port 1 is taken",
        "    remedy: free it",
        "  warning, disk: little room",
        "    remedy: make some",
    ]
    assert report(findings[:1], 9).splitlines()[0] == "Preflight: 9 checks passed, with 1 warning."
    assert report(findings[1:], 9).splitlines()[0] == "Preflight: 1 error, 0 warnings."
    assert report([], 9) == "Preflight: 9 checks passed."


def test_bytes_are_written_for_people() -> None:
    assert [amount(size) for size in (1.5 * GIB, 2**20, GIB / 5)] == ["1.5 GiB", "1.0 MiB", "0.2 GiB"]
