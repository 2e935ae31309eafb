"""The operations that `benchmarks.kernels` times: arguments, formulas, what they have to move, what is right.

A set is (arguments, gradient of the result); a pass, "forward" or "both", is a function of a set.
"""

import functools
import importlib
import itertools
import math
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from tests.pallas_kernels import accuracy

OURS = ("xla", "pallas", "pallas_interpret", "jax_triton")  # what has to keep the bounds
EPS = 1e-15


HEAD = 32  # channels of a head, in all models


class Sizes(NamedTuple):
    """Of a block, and how many images it has at a time: 2 are a guided pair."""

    width: int
    heads: int = 0  # of attention; with the scales of the DC-AE, each of which adds as many
    ffn: int = 0
    images: int = 2


class Part(NamedTuple):
    """What of a model has the same sizes.

    ops: the operations in it.
    tokens: of all its images, in order of importance.
    tuned: the tokens that tiles are sought at.
    """

    sizes: Sizes
    ops: tuple
    tokens: tuple
    tuned: int


TOY = Sizes(64, 2, 72)
# A row of `auto` for attention speaks for both of its forms, so where there is one the other is measured too.
ATTENTION = ("linear_attention", "linear_attention, norm")


def transformer(width, heads, ffn):
    ops = (*ATTENTION, "mix_ffn", "modulate", "add_gated")
    return (Part(Sizes(width, heads, ffn), ops, (2048, 8192, 32768, 512), 8192),)


def dc_ae():
    """F32C32's stages by their width, one image of 1024 or of 512 pixels; stage i has (pixels / 2^i)^2 tokens.

    Stages 3 to 5 attend to tokens and to one scale of neighbourhoods; before them there are norms alone.
    """
    def part(width, *tokens, ops=("add_rms_norm",)):
        return Part(Sizes(width, 2 * width // HEAD, 4 * width, images=1), ops, tokens, tokens[0])

    inner = (*ATTENTION, "mix_ffn", "add_rms_norm")
    return (
        part(1024, 4096, 1024, 256, ops=inner),  # stages 4 and 5
        part(512, 16384, 4096, ops=inner),  # stage 3
        part(512, 65536),  # stage 2, at 512 px of the size of stage 3
        part(256, 262144, 65536),
        part(128, 1048576, 262144),
    )


MODELS = {"1.6B": transformer(2240, 70, 5600), "0.6B": transformer(1152, 36, 2880), "DC-AE": dc_ae()}


class Op(NamedTuple):
    """An operation and what has to be known of it.

    folder, name: where in pallas_kernels it is.
    shapes: (sizes, side, dtype) -> shapes of its arguments.
    call: (the operation, *arguments, **implementation) -> result.
    exact: the formula, for float64 arguments; its second argument is the dtype where one is rounded to.
    wanted: the arguments whose gradients are computed; a gradient that is the given one costs nothing.
    kept: the arguments that the backward pass has to read.
    part: a slice of an argument or result that depends on no other part, so that float64 takes less room.
    auto: the first argument's shape -> sizes of a row of `auto`.
    width: the first argument's shape -> what names the tiles of that width.
    slack: times the rounding of the exact gradient that a bfloat16 one may be off.
    """

    folder: str
    name: str
    shapes: Callable
    call: Callable
    exact: Callable
    wanted: tuple
    kept: tuple
    auto: Callable
    width: Callable
    part: Callable = lambda a, c: a
    slack: float = accuracy.NARROW
    plain: Callable | None = None  # where the library's form is not `reference`


# --- Formulas, written once more, without the tricks of any implementation.


def rounded(x, dtype):
    """x rounded to `dtype`, which XLA leaves out where two conversions say so."""
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


def attention(dtype, qkv, scale=None):
    q, k, v = jnp.split(qkv, 3, axis=-1)
    if scale is not None:
        norm = [x / jnp.sqrt(jnp.mean(x * x, axis=(2, 3), keepdims=True) + 1e-5) for x in (q, k)]
        q, k = (x * scale[i] for i, x in enumerate(norm))
    q, k = (jnp.maximum(x, 0) for x in (q, k))
    weight = jnp.einsum("bnkc,bkc->bnk", q, k.sum(axis=1)) + EPS
    return jnp.einsum("bnkc,bkce->bnke", q, jnp.einsum("bnkc,bnke->bkce", k, v)) / weight[..., None]


def silu(x):
    return x / (1 + jnp.exp(-x))


def mix_ffn(dtype, y, kernel, bias):
    _, h, w, _ = y.shape
    x = jnp.pad(silu(y), ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = (x[:, i : i + h, j : j + w] * kernel[i, j] for i in range(3) for j in range(3))
    value, gate = jnp.split(sum(taps) + bias, 2, axis=-1)
    return value * silu(gate)


def modulate(dtype, x, shift, scale):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


def add_gated(dtype, x, gate, y):
    return x + gate[:, None] * y


def add_rms_norm(dtype, x, y, scale, bias):
    norm = y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5) * scale + bias
    return x + rounded(norm, dtype)  # the one formula that rounds on its way


def library_mix_ffn(y, kernel, bias):
    """Activation, the library's grouped convolution, gate: each in y's dtype, as a plain port has them."""
    x = jax.lax.conv_general_dilated(
        jax.nn.silu(y), kernel.astype(y.dtype)[:, :, None], (1, 1), ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=y.shape[-1],
    )  # fmt: skip
    value, gate = jnp.split(x + bias.astype(y.dtype), 2, axis=-1)
    return value * jax.nn.silu(gate)


# --- Arguments.


def _shape(*axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(axes, dtype)


def _qkv(s, side, dtype):
    return _shape(s.images, side[0] * side[1], s.heads, 3 * HEAD, dtype=dtype)


def _grid(s, channels, side, dtype):
    return _shape(s.images, *side, channels, dtype=dtype)


def _tokens(s, side, dtype):
    return _shape(s.images, side[0] * side[1], s.width, dtype=dtype)


def _rows(s):
    return _shape(s.images, s.width)


def ends(a, c):
    """Of each run of c channels on the last axis the first and the last 32."""
    starts = (start for i in range(0, a.shape[-1], c) for start in (i, i + c - 32))
    return a if c <= 64 else jnp.concatenate([a[..., i : i + 32] for i in starts], axis=-1)


OPS = {
    "linear_attention": Op(
        "linear_attention", "linear_attention",
        lambda s, side, dtype: (_qkv(s, side, dtype),),
        lambda op, qkv, **how: op(qkv, EPS, **how),
        attention, (0,), (0,),
        lambda b, n, k, c: dict(tokens=b * n, k=k, c=c // 3), lambda *shape: shape[-1] // 3,
    ),
    "linear_attention, norm": Op(
        "linear_attention", "linear_attention",
        lambda s, side, dtype: (_qkv(s, side, dtype), _shape(2, s.heads, HEAD)),
        lambda op, qkv, scale, **how: op(qkv, EPS, scale, **how),
        attention, (0, 1), (0, 1),
        lambda b, n, k, c: dict(tokens=b * n, k=k, c=c // 3), lambda *shape: shape[-1] // 3, slack=1.3,
    ),
    "mix_ffn": Op(
        "mix_ffn", "mix_ffn",
        lambda s, side, dtype: (_grid(s, 2 * s.ffn, side, dtype), _shape(3, 3, 2 * s.ffn), _shape(2 * s.ffn)),
        lambda op, *args, **how: op(*args, **how),
        mix_ffn, (0, 1, 2), (0, 1, 2),
        lambda b, h, w, c: dict(tokens=b * h * w, c=c // 2, first_silu=1), lambda *_: "any",
        part=ends, slack=1.5, plain=library_mix_ffn,
    ),
    "modulate": Op(
        "adaln", "modulate",
        lambda s, side, dtype: (_tokens(s, side, dtype), _rows(s), _rows(s)),
        lambda op, *args, **how: op(*args, **how),
        modulate, (0, 1, 2), (0, 2),
        lambda b, n, d: dict(tokens=b * n, d=d, gated=0), lambda *_: "modulate",
    ),
    "add_gated": Op(
        "adaln", "add_gated",
        lambda s, side, dtype: (_tokens(s, side, dtype), _rows(s), _tokens(s, side, dtype)),
        lambda op, *args, **how: op(*args, **how),
        add_gated, (1, 2), (1, 2),
        lambda b, n, d: dict(tokens=b * n, d=d, gated=1), lambda *_: "add_gated",
    ),
    "add_rms_norm": Op(
        "rms_residual", "add_rms_norm",
        lambda s, side, dtype: (*[_tokens(s, side, dtype)] * 2, *[_shape(s.width)] * 2),
        lambda op, *args, **how: op(*args, **how),
        add_rms_norm, (1, 2, 3), (1, 2),
        lambda b, n, d: dict(tokens=b * n, d=d), lambda *_: "any",
    ),
}  # fmt: skip


class Case(NamedTuple):
    """An operation at one size."""

    op: str
    tokens: int
    sizes: Sizes
    dtype: str

    @property
    def table(self):
        return OPS[self.op]

    def shapes(self):
        """The shapes of a set: (arguments, gradient)."""
        n = self.tokens // self.sizes.images
        height = 2 ** (int(math.log2(n)) // 2)
        while n % height:
            height //= 2
        args = self.table.shapes(self.sizes, (height, n // height), self.dtype)
        wide = [_shape(*a.shape) for a in args]
        out = jax.eval_shape(self.function("exact"), *wide)
        return args, _shape(*out.shape, dtype=self.dtype)

    def draw(self, seed):
        """A set of random numbers, on the device."""
        leaves, tree = jax.tree.flatten(self.shapes())
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return jax.tree.unflatten(tree, [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves)])

    def function(self, implementation):
        """The operation as a function of its arguments: an implementation, "plain" or "exact"."""
        if implementation == "exact":
            return functools.partial(self.table.exact, self.dtype)
        if implementation == "plain" and self.table.plain:
            return self.table.plain
        op = getattr(importlib.import_module(f"pallas_kernels.{self.table.folder}"), self.table.name)
        name = "reference" if implementation == "plain" else implementation
        return functools.partial(self.table.call, op, implementation=name)

    def passes(self, fn):
        """{"forward": set -> result, "both": set -> (result, gradients)} of a function of the arguments."""

        def forward(args, gradient):
            return fn(*args)

        def both(args, gradient):
            def of(*wanted):
                return fn(*(wanted[self.table.wanted.index(i)] if i in self.table.wanted else a
                            for i, a in enumerate(args)))  # fmt: skip

            out, pull = jax.vjp(of, *(args[i] for i in self.table.wanted))
            return out, pull(gradient)

        return {"forward": forward, "both": both}

    def truth(self, given):
        """(result, gradients) of a set in float64, of the parts that `Op.part` takes."""
        with jax.enable_x64(True):
            return jax.jit(self.passes(self.function("exact"))["both"])(*accuracy.double(self.parts(given)))

    def parts(self, tree):
        c = self.shapes()[1].shape[-1]
        return jax.tree.map(lambda a: self.table.part(a, c), tree)

    def judge(self, got, want):
        """How far a result, or (result, gradients), is from the truth: {"forward_error", "forward_bound",
        "gradient_error", "gradient_bound", "right"}; of the gradients the one that is worst for its bound."""
        pairs = list(zip(jax.tree.leaves(self.parts(got)), jax.tree.leaves(want)))
        with jax.enable_x64(True):
            errors, roundings = zip(*jax.device_get([_distances(*pair, self.dtype) for pair in pairs]))
        if self.dtype == "float32":
            bounds = [accuracy.FORWARD] + [accuracy.GRADIENT] * (len(pairs) - 1)
        else:
            slack = [accuracy.NARROW] + [self.table.slack] * (len(pairs) - 1)
            bounds = [float(s * rounding) for s, rounding in zip(slack, roundings)]
        found = {"forward_error": errors[0], "forward_bound": bounds[0]}
        if len(pairs) > 1:
            worst = max(range(1, len(pairs)), key=lambda i: errors[i] / bounds[i])
            found |= {"gradient_error": errors[worst], "gradient_bound": bounds[worst]}
        right = all(error <= bound for error, bound in zip(errors, bounds))  # which NaN is not
        return {name: float(f"{value:.3g}") for name, value in found.items()} | {"right": right}

    def auto(self):
        """The sizes by which the operation chooses."""
        return self.table.auto(*self.shapes()[0][0].shape)

    def width(self):
        """What names its tiles in the table of its folder."""
        return self.table.width(*self.shapes()[0][0].shape)

    def tiles(self):
        """{pass: tile} in force."""
        module = importlib.import_module(f"pallas_kernels.{self.table.folder}")
        return dispatch.tiles(module.FOLDER, self.dtype, self.width())

    def traffic(self):
        """{pass: bytes}: each argument read once and each result written once, in either pass."""
        args, out = self.shapes()
        forward = sum(map(nbytes, (*args, out)))
        back = [args[i] for i in (*self.table.kept, *self.table.wanted)]
        return {"forward": forward, "both": forward + sum(map(nbytes, (*back, out)))}

    def named(self):
        """What its rows are told apart by."""
        return {"op": self.op, "width": self.sizes.width, "tokens": self.tokens, "dtype": self.dtype}


def nbytes(a):
    return math.prod(a.shape) * jnp.dtype(a.dtype).itemsize


def cases(model, dtype, ops=OPS, tokens=None, images=None):
    """What of a model is measured in `dtype`, the most important sizes of each part first.

    Args:
      ops: those to take, of those that the model has.
      tokens, images: in place of the model's own.
    """
    parts = [part._replace(sizes=part.sizes._replace(images=images or part.sizes.images)) for part in MODELS[model]]
    ranks = itertools.zip_longest(*(tokens or part.tokens for part in parts))
    sizes = ((part, n) for rank in ranks for part, n in zip(parts, rank) if n)
    return list(dict.fromkeys(Case(op, n, part.sizes, dtype) for part, n in sizes for op in part.ops if op in ops))


def tuned(model, dtype, ops=OPS, images=None):
    """{(folder, what names the tiles): the cases whose time together a tile is judged by}.

    Forms of an operation share their tiles, and so do all sizes of a width.
    """
    found = {}
    for part in MODELS[model]:
        sizes = part.sizes._replace(images=images or part.sizes.images)
        for case in (Case(op, part.tuned, sizes, dtype) for op in part.ops if op in ops):
            found.setdefault((case.table.folder, case.width()), []).append(case)
    return found


@functools.partial(jax.jit, static_argnums=2)
def _distances(got, want, dtype):
    """Relative to the norm of `want`: how far `got` is from it, and how far it is from itself rounded to `dtype`."""
    others = got.astype(want.dtype), rounded(want, dtype)
    return [jnp.sqrt(jnp.sum((other - want) ** 2) / jnp.sum(want**2)) for other in others]
