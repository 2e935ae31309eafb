"""Nested frozen dataclasses and Linen modules: their values checked, set by dotted name, written down.

    config, problems = override(config, {"optim.lr": "2e-5", "model.depth": 2})

A field's annotation says what it may hold; text is read by it, anything else compared with it.
"""

import ast
import dataclasses
import math
import numbers
import re
import types
import typing

import flax.linen as nn
import jax.numpy as jnp

from sana_jax import precision
from sana_jax.errors import InputError, nearest

TRUTH = {"true": True, "false": False}
WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a text",
    tuple: "a tuple, (1, 2)",
    dict: "a dict",
    type(None): "none",
    jnp.dtype: "one of " + ", ".join(precision.NAMES),
}


def split(arguments):
    """({name: text}, problems) of "a.b=1" and "--a.b=1"."""
    found, problems = {}, []
    for argument in arguments:
        match = re.fullmatch(r"(?:--)?([A-Za-z_][\w.-]*)=(.*)", argument, re.DOTALL)
        if not match:
            problems.append(f"{argument!r}: must look like optim.lr=1e-4 or --optim.lr=1e-4")
        elif match[1] in found:
            problems.append(f"{match[1]}: given twice")
        else:
            found[match[1]] = match[2]
    return found, problems


def is_node(value):
    """Whether a value has fields of its own."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def hints(node):
    """{field: annotation} of a dataclass or module, without what modules keep for themselves."""
    cls = type(node)
    own = ("parent", "name") if isinstance(node, nn.Module) else ()
    found = {f.name: f.type for f in dataclasses.fields(cls) if f.init and f.name not in own}
    if any(isinstance(hint, str) for hint in found.values()):
        return {name: hint for name, hint in typing.get_type_hints(cls).items() if name in found}
    return found


def replace(node, **values):
    """`dataclasses.replace`, which modules call clone."""
    return node.clone(**values) if isinstance(node, nn.Module) else dataclasses.replace(node, **values)


def override(node, values):
    """(`node` with {dotted name: text or value} in place, the problems of all that do not fit)."""
    problems = []
    for name, value in values.items():
        try:
            node = _set(node, name.split("."), value, name)
        except InputError as error:
            problems.append(str(error))
    return node, problems


def _set(node, path, value, full):
    name, *rest = path
    known, before = hints(node), ".".join(full.split(".")[: -len(path)])
    if name not in known:
        near = nearest(name, known) or f"; {before or type(node).__name__} has {', '.join(known)}"
        raise InputError(f"{full}: {type(node).__name__} has no field {name!r}{near}")
    old = getattr(node, name)
    if not rest:
        new = parse(full, value, known[name]) if isinstance(value, str) else convert(full, value, known[name])
    elif is_node(old):
        new = _set(old, rest, value, full)
    else:
        raise InputError(f"{full}: {full.removesuffix('.' + '.'.join(rest))}={old!r} has no fields")
    return replace(node, **{name: new})


def settle(node, prefix=""):
    """(`node` with every value as its annotation wants it, problems), all fields of all levels."""
    values, problems = {}, []
    for name, hint in hints(node).items():
        full = f"{prefix}{name}"
        try:
            value = convert(full, getattr(node, name), hint)
        except InputError as error:
            problems.append(str(error))
            continue
        if is_node(value):
            value, inner = settle(value, f"{full}.")
            problems += inner
        values[name] = value
    try:
        return replace(node, **values), problems
    except InputError as error:  # of a class that looks at its own values
        return node, [*problems, str(error)]


def parse(name, text, hint):
    """What `text` says, as `hint` wants it.  Raises InputError."""
    for option in sorted(_options(hint), key=lambda option: option is str):  # a text is the last resort
        try:
            return convert(name, _literal(text, option), option)
        except (InputError, ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    raise InputError(f"{name}={text!r}: must be {describe_hint(hint)}{_near(text, hint)}")


def _literal(text, option):
    if option is type(None):
        return None if text.lower() in ("none", "null") else text
    if option is bool:
        return TRUTH.get(text.lower(), text)
    if option in (int, float):
        return option(text)
    if option in (str, jnp.dtype) or text in typing.get_args(option):
        return text
    return ast.literal_eval(text)


def convert(name, value, hint):
    """`value` as `hint` wants it: an int may stand for a float, a list for a tuple.  Raises InputError."""
    for option in _options(hint):
        kind, inner = typing.get_origin(option) or option, typing.get_args(option)
        if kind in (object, typing.Any):
            return value
        if kind is typing.Literal:
            if any(value == allowed and type(value) is type(allowed) for allowed in inner):
                return value
        elif kind is jnp.dtype:
            try:
                return precision.parse(value)
            except InputError:
                pass
        elif kind is float:
            if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        elif kind is int:
            if isinstance(value, numbers.Integral) and not isinstance(value, bool):
                return int(value)
        elif kind is tuple:
            if isinstance(value, (list, tuple)):
                return _tuple(name, value, inner)
        elif isinstance(value, kind):
            return value
    raise InputError(f"{name}={value!r}: must be {describe_hint(hint)}{_near(value, hint)}")


def _tuple(name, values, inner):
    if not inner:
        return tuple(_tuple(name, v, ()) if isinstance(v, (list, tuple)) else v for v in values)
    if inner[-1] is Ellipsis:
        inner = inner[:1] * len(values)
    if len(inner) != len(values):
        raise InputError(f"{name}={values!r}: must have {len(inner)} entries")
    return tuple(convert(f"{name}[{i}]", v, hint) for i, (v, hint) in enumerate(zip(values, inner)))


def _options(hint):
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (type(None) if hint is None else hint,)


def describe_hint(hint):
    """An annotation in words."""
    out = []
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            out.append("one of " + ", ".join(repr(v) for v in typing.get_args(option)))
        elif option in WORDS:
            out.append(WORDS[option])
        elif (kind := typing.get_origin(option)) is not None:
            inner = [describe_hint(a) for a in typing.get_args(option) if a is not Ellipsis]
            out.append(f"a {kind.__name__} of {', '.join(inner)}")
        else:
            out.append(f"{option.__name__}(...)")
    return " or ".join(out)


def _near(value, hint):
    names = [v for option in _options(hint) for v in typing.get_args(option) if isinstance(v, str)]
    if jnp.dtype in _options(hint):
        names += precision.NAMES
    return nearest(value, names) if isinstance(value, str) else ""


def describe(value):
    """JSON values of anything that a node may hold; a node is a dict with its "class"."""
    if is_node(value):
        named = {name: describe(getattr(value, name)) for name in hints(value)}
        return {"class": type(value).__name__, **named}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, type) or hasattr(value, "dtype"):
        return jnp.dtype(value).name
    return str(value)
