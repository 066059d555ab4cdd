"""A worker process of the grader: reads `[answer, label]` as a JSON line, writes `true` or `false`, until its
input ends.

Run as a file, with no import of slime, so that it starts fast and stays small. `math-verify` guards itself by
signals, which need a main thread and cannot interrupt C code: the clock that counts is the parent's.
"""

import json
import resource
import sys

ADDRESS_SPACE_BYTES = 2 * 1024**3
OWN_LIMIT_SECONDS = 60
"""The library insists on a limit of its own; the parent's comes long before it."""


def main() -> None:
    """Limit the memory, load the library, say so, then answer line by line."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    # imported here: the limit must hold for what the library allocates too
    from math_verify import LatexExtractionConfig, parse, verify

    def expression(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=OWN_LIMIT_SECONDS)

    # the first comparison builds parsers and caches: not in an answer's time
    verify(expression("2\\sqrt{3}"), expression("\\sqrt{12}"), timeout_seconds=OWN_LIMIT_SECONDS)
    _say(True)
    for line in sys.stdin:
        answer, label = json.loads(line)
        verdict = verify(expression(label), expression(answer), timeout_seconds=OWN_LIMIT_SECONDS)
        _say(bool(verdict))


def _say(verdict: bool) -> None:
    sys.stdout.write(json.dumps(verdict) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
