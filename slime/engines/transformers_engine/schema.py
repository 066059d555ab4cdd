"""Type checks of JSON values, in the words of the real server's contract gate."""

from collections.abc import Callable
from typing import Any, TypeVar

from slime.engines.transformers_engine.errors import ContractViolation

T = TypeVar("T")


def is_int(value: Any) -> bool:
    """Tell whether `value` is a JSON integer; a boolean is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def unexpected(value: Any) -> str:
    """Name a JSON value the way the gate's messages do."""
    match value:
        case None:
            return "null"
        case bool():
            return f"boolean `{str(value).lower()}`"
        case int():
            return f"integer `{value}`"
        case float():
            return f"floating point `{value}`"
        case str():
            return f'string "{value}"'
        case list():
            return "sequence"
        case _:
            return "map"


def invalid_type(value: Any, expected: str) -> ContractViolation:
    """Build the error for a value of the wrong type."""
    return ContractViolation(f"invalid type: {unexpected(value)}, expected {expected}")


def unknown_field(name: str, known: tuple[str, ...]) -> ContractViolation:
    """Build the error for a key that the contract does not have."""
    listed = ", ".join(f"`{field}`" for field in known)
    return ContractViolation(f"unknown field `{name}`, expected one of {listed}")


def expect_int(value: Any) -> int:
    """Return an integer or raise."""
    if not is_int(value):
        raise invalid_type(value, "i64")
    return value


def expect_float(value: Any) -> float:
    """Return a number as float or raise."""
    if not (is_int(value) or isinstance(value, float)):
        raise invalid_type(value, "f64")
    return float(value)


def expect_bool(value: Any) -> bool:
    """Return a boolean or raise."""
    if not isinstance(value, bool):
        raise invalid_type(value, "a boolean")
    return value


def expect_str(value: Any) -> str:
    """Return a string or raise."""
    if not isinstance(value, str):
        raise invalid_type(value, "a string")
    return value


def expect_map(value: Any) -> dict[str, Any]:
    """Return an object or raise."""
    if not isinstance(value, dict):
        raise invalid_type(value, "a map")
    return value


def expect_list(value: Any) -> list[Any]:
    """Return a list or raise."""
    if not isinstance(value, list):
        raise invalid_type(value, "a sequence")
    return value


def one_or_list(check: Callable[[Any], T], value: Any) -> T | list[T]:
    """Check a value, or every element of a list of them."""
    return [check(item) for item in value] if isinstance(value, list) else check(value)
