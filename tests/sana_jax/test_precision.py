"""Names of dtypes, and the table behind "auto"."""

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import precision
from sana_jax.errors import InputError


@pytest.mark.parametrize(
    "given, expected",
    [("fp32", jnp.float32), ("float32", jnp.float32), ("bf16", jnp.bfloat16), ("bfloat16", jnp.bfloat16),
     ("fp16", jnp.float16), ("float16", jnp.float16), (jnp.bfloat16, jnp.bfloat16),
     (np.float16, jnp.float16), (np.dtype("float32"), jnp.float32), (jnp.dtype("bfloat16"), jnp.bfloat16)],
)  # fmt: skip
def test_parse(given, expected):
    assert precision.parse(given) is expected


@pytest.mark.parametrize(
    "given, message",
    [
        ("bf61", "dtype='bf61': must be one of auto, float32, fp32, .*; did you mean 'bf16'?"),
        ("", "dtype='': must be one of"),
        ("double", "dtype='double': must be one of"),
        (None, "dtype=None: must be float32, bfloat16 or float16"),
        (float, "must be float32, bfloat16 or float16"),
        (np.int32, "must be float32, bfloat16 or float16"),
        (object(), "must be float32, bfloat16 or float16"),
        (32, "dtype=32: must be float32, bfloat16 or float16"),
    ],
)
def test_what_is_no_dtype(given, message):
    with pytest.raises(InputError, match=message) as caught:
        precision.parse(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "dtypes, expected",
    [({"F32"}, jnp.float32), ({"F64"}, jnp.float32), ({"F16"}, jnp.float16), ({"BF16"}, jnp.bfloat16),
     ({"F16", "F32"}, jnp.float32), ({"F16", "BF16"}, jnp.float32), ({"BF16", "I64"}, jnp.bfloat16)],
)  # fmt: skip
def test_stored(dtypes, expected):
    """float32 is the smallest that holds both float16 and bfloat16."""
    assert precision.stored(dtypes, "file") is expected


@pytest.mark.parametrize("dtypes", [set(), {"I64"}, {"F8_E4M3", "I8"}])
def test_stored_as_something_else(dtypes):
    with pytest.raises(InputError, match="^file: tensors are .*, must be F64, F32, F16 or BF16$"):
        precision.stored(dtypes, "file")


def test_published():
    assert precision.published("Sana_1600M_1024px_diffusers") is jnp.float16
    assert precision.published("Sana_1600M_1024px_BF16") is jnp.bfloat16
    assert precision.published("sana") is None and precision.published("") is None
    for name, dtype in precision.PUBLISHED.items():
        if any(mark in name for mark in ("BF16", "1.5", "Sprint", "2K", "4K")):
            assert dtype is jnp.bfloat16, f"{name} leaves the range of float16"


def test_without_float16():
    assert precision.without_float16(jnp.float16) is jnp.bfloat16
    assert precision.without_float16(jnp.float32) is jnp.float32
    assert precision.without_float16(jnp.bfloat16) is jnp.bfloat16
