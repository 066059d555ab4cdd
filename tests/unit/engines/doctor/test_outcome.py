"""The printed line, the JSON record and the exit code."""

import json

from slime.engines.doctor.outcome import Outcome, exit_code, record

GOOD = Outcome("reachable", "pass", "ready", teacher="host:1", values={"seconds": 0.01})
WARNED = Outcome("prefix-cache", "warn", "0 of 5", "no-prefix-cache", "turn it on", "host:1")
BAD = Outcome("sees", "FAULT", "nothing moved", "blind", "serve the vision tower", "host:1")


def test_a_line_has_status_check_name_measure_and_remedy() -> None:
    assert BAD.line() == "FAULT  sees             [blind] nothing moved -> serve the vision tower"
    assert GOOD.line() == "pass   reachable        ready"
    assert GOOD.line(with_teacher=True) == "pass   host:1  reachable        ready"


def test_warnings_are_healthy_and_faults_are_not() -> None:
    assert exit_code([GOOD, WARNED]) == 0
    assert exit_code([GOOD, BAD, WARNED]) == 1


def test_the_record_is_json_with_every_check() -> None:
    written = json.loads(json.dumps(record([GOOD, BAD], 1.23456)))
    assert written["healthy"] is False
    assert written["seconds"] == 1.235
    assert [check["fault"] for check in written["checks"]] == ["", "blind"]
