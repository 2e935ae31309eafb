"""Errors that a user can mend: each names the field, its value, the rule and the nearest fix."""

import difflib


class InputError(ValueError):
    """Bad input.  One line for people; `sample.py` prints it and exits with status 2."""


class CheckpointError(InputError):
    """A checkpoint that does not fit: all problems of all tensors in one message."""


class NonFiniteError(ArithmeticError):
    """NaN or infinity in a result; the message names the first stage that produced it."""


def nearest(value, allowed, count=1):
    """A "did you mean" suffix, empty when nothing is close."""
    close = difflib.get_close_matches(str(value), [str(a) for a in allowed], count)
    return f"; did you mean {close[0]!r}?" if close else ""


def require_choice(field, value, allowed):
    """Raises InputError unless `value` is one of `allowed`; returns `value`."""
    if value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise InputError(f"{field}={value!r}: must be one of {listed}{nearest(value, allowed)}")
    return value
