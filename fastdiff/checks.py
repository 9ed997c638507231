"""Checks of a flag's value, each with its message: the flag, the value, and what it must be."""

import math
from typing import Literal, get_args, get_origin, get_type_hints

from fastdiff.errors import UserError


def require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise UserError(f"--{name.replace('_', '-')} is {value!r}, but must be {expected}.")


def at_least(least: int, section: object, *names: str) -> None:
    """Each field, or each number of a tuple."""
    for name in names:
        value = getattr(section, name)
        for each in value if isinstance(value, tuple) else (value,):
            require(each >= least, name, each, f"at least {least}")
            require(each < 2**63, name, each, "below 2^63")


def positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(math.isfinite(value) and value > 0, name, value, "a finite number above 0")


def check_words(section: object) -> None:
    """Every choice is one of those that its type lists, and no name or path is blank."""
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if get_origin(hint) is Literal:
            require(value in get_args(hint), name, value, f"one of {', '.join(get_args(hint))}")
        elif isinstance(value, str):
            require(value.strip() != "", name, value, "a name or a path")
