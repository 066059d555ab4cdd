"""A worker process of the grader: reads `[answer, label]` as a JSON line, writes `true` or `false`, until its
input ends, or `null` as its last word: it came near its memory limit, and what it would say is not to be
trusted.

Run as a file, with no import of slime, so that it starts fast and stays small. `math-verify` guards itself by
signals, which need a main thread and cannot interrupt C code: the clock that counts is the parent's.
"""

import json
import os
import re
import resource
import sys
from typing import Any, TextIO

ADDRESS_SPACE_BYTES = 2**30
"""Some five times what hard comparisons take."""
SUSPECT_SHARE = 0.5
"""Of the limit. The library takes a failed allocation for an answer that is wrong, and a number that doubles
until it does not fit has taken at least half of the limit before."""
OWN_LIMIT_SECONDS = 60
"""The library insists on a limit of its own; the parent's comes long before it."""
REFUSED_EVENTS = re.compile(
    r"(os\.(system|exec|fork|forkpty|posix_spawn|remove|rename|rmdir|mkdir|link|symlink|chmod|chown|kill|putenv)"
    r"|subprocess\.|socket\.|shutil\.|ctypes\.|urllib\.|http\.|ftplib\.|smtplib\.|pty\.|signal\.pthread_kill)"
)
"""Audit events of what comparing answers never does."""


def main() -> None:
    """Limit the memory, load the library, say so, then answer line by line."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # what the library prints must not look like a verdict
    verdicts = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr
    # imported here: the limit must hold for what the library allocates too
    from math_verify import LatexExtractionConfig, parse, verify

    def expression(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=OWN_LIMIT_SECONDS)

    # the first comparison builds parsers and caches: not in an answer's time
    verify(expression("2\\sqrt{3}"), expression("\\sqrt{12}"), timeout_seconds=OWN_LIMIT_SECONDS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.addaudithook(_refuse)
    _say(verdicts, True)
    for line in sys.stdin:
        answer, label = json.loads(line)
        verdict = verify(expression(label), expression(answer), timeout_seconds=OWN_LIMIT_SECONDS)
        if _peak_bytes() > SUSPECT_SHARE * ADDRESS_SPACE_BYTES:
            _say(verdicts, None)
            return
        _say(verdicts, bool(verdict))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise before the process starts another, reaches for the network or changes a file."""
    if REFUSED_EVENTS.match(event):
        raise PermissionError(f"a grader process does not do {event}")


def _peak_bytes() -> int:
    """Return the most address space that this process ever had."""
    with open("/proc/self/status", encoding="ascii") as status:
        peak = next(line for line in status if line.startswith("VmPeak:"))
    return int(peak.split()[1]) * 1024


def _say(verdicts: TextIO, verdict: bool | None) -> None:
    verdicts.write(json.dumps(verdict) + "\n")
    verdicts.flush()


if __name__ == "__main__":
    main()
