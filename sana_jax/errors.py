"""Errors that a user can mend: each names the field, its value, the rule and the nearest fix."""

import difflib
import math
import numbers


class InputError(ValueError):
    """Bad input.  One line for people; `sample.py` prints it and exits with status 2."""


class CheckpointError(InputError):
    """A checkpoint that does not fit: all problems of all tensors in one message."""


class NonFiniteError(ArithmeticError):
    """NaN or infinity in a result; the message names the first stage that produced it."""


def nearest(value, allowed):
    """A "did you mean" suffix, empty when nothing is close."""
    close = difflib.get_close_matches(str(value), [str(a) for a in allowed], 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def require_choice(field, value, allowed):
    """Raises InputError unless `value` is one of `allowed`; returns `value`."""
    if value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise InputError(f"{field}={value!r}: must be one of {listed}{nearest(value, allowed)}")
    return value


def _is_number(value, kind):
    kinds = numbers.Integral if kind is int else numbers.Real
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def require_positive(field, value, kind=int, none=False):
    """Raises InputError unless `value` is a positive `kind` (or None); returns it as a `kind`."""
    if none and value is None:
        return None
    if not _is_number(value, kind) or value <= 0:
        words = "a positive integer" if kind is int else "a positive number"
        raise InputError(f"{field}={value!r}: must be {words}{' or null' if none else ''}")
    return kind(value)


def require_range(field, value, low, high, kind=int):
    """Raises InputError unless `value` is a `kind` in [low, high]."""
    if not _is_number(value, kind) or not low <= value <= high:
        near = f"; nearest valid {min(max(value, low), high)}" if _is_number(value, float) else ""
        words = "an int" if kind is int else "a number"
        raise InputError(f"{field}={value!r}: must be {words} in [{low}, {high}]{near}")
