"""Which dtype a checkpoint runs in: names that people type, and the table behind "auto"."""

import jax.numpy as jnp

from sana_jax.errors import InputError, nearest

NAMES = {
    "float32": jnp.float32,
    "fp32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "bf16": jnp.bfloat16,
    "float16": jnp.float16,
    "fp16": jnp.float16,
}
STORED = {"F64": jnp.float32, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}

# Repository name (without "_diffusers") -> dtype of the transformer (docs/numerics.md 3.1).  SANA-1.5,
# Sprint and the 2K and 4K models leave the range of float16.
PUBLISHED = {
    "Sana_600M_512px": jnp.float16,
    "Sana_600M_1024px": jnp.float16,
    "Sana_1600M_512px": jnp.float16,
    "Sana_1600M_512px_MultiLing": jnp.float16,
    "Sana_1600M_1024px": jnp.float16,
    "Sana_1600M_1024px_MultiLing": jnp.float16,
    "Sana_1600M_1024px_BF16": jnp.bfloat16,
    "Sana_1600M_2Kpx_BF16": jnp.bfloat16,
    "Sana_1600M_4Kpx_BF16": jnp.bfloat16,
    "SANA1.5_1.6B_1024px": jnp.bfloat16,
    "SANA1.5_4.8B_1024px": jnp.bfloat16,
    "Sana_Sprint_0.6B_1024px": jnp.bfloat16,
    "Sana_Sprint_1.6B_1024px": jnp.bfloat16,
}


def parse(dtype):
    """A name (fp32, bf16, float16, ...) or a jnp dtype -> jnp scalar type.  Raises InputError."""
    if isinstance(dtype, str):
        if dtype not in NAMES:
            allowed = ", ".join(["auto", *NAMES])
            raise InputError(f"dtype={dtype!r}: must be one of {allowed}{nearest(dtype, ['auto', *NAMES])}")
        return NAMES[dtype]
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in NAMES:
        raise InputError(f"dtype={dtype!r}: must be float32, bfloat16 or float16")
    return NAMES[name]


def short(dtype):
    """"fp32", "bf16" or "fp16", as variants of weight files are called; None of "auto"."""
    if isinstance(dtype, str) and dtype == "auto":
        return None
    return {jnp.float32: "fp32", jnp.bfloat16: "bf16", jnp.float16: "fp16"}[parse(dtype)]


def stored(dtypes, source):
    """The dtype of a file from the set of its tensors' dtypes: the widest of them."""
    known = {STORED[d] for d in dtypes if d in STORED}
    if not known:
        raise InputError(f"{source}: tensors are {sorted(dtypes)}, must be F64, F32, F16 or BF16")
    if len(known) > 1:
        return jnp.float32
    return known.pop()


def published(name):
    """The table's dtype for a repository or folder name, or None."""
    return PUBLISHED.get(name.removesuffix("_diffusers"))


def without_float16(dtype):
    """Gemma-2 and DC-AE overflow float16 (docs/numerics.md 6, trap 18): they run in bfloat16 instead."""
    return jnp.bfloat16 if dtype == jnp.float16 else dtype
