"""CAME, the optimizer of SANA's published runs, as an optax transform (https://arxiv.org/abs/2307.02047).

    u = g / sqrt(V),  V ~ the mean of g^2;   u <- u / max(1, rms(u) / clip);   m ~ the mean of u
    update = m / sqrt(S),  S ~ the mean of (u - m)^2

V and S of a matrix are kept as the means of its rows and of its columns.  As in SANA's training,
matrices are factored (1x1 convolutions are matrices here), and whatever else has a V of full size and
no S: vectors, depthwise, grouped and 3x3 convolutions.  There is no bias correction.
Several layers share a leaf here: each is a matrix of its own, and rms(u) is taken layer by layer.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

LAYERED = re.compile(r"(blocks|key_value|layers)/.*")  # leaves whose axis 0 counts layers, in every model


class CAMEState(NamedTuple):
    """Trees nested as the parameters.  `square` (V) has {"row", "col"} or {"full"} in place of an
    array, `instability` (S) {"row", "col"}, and nothing where a parameter is not factored."""

    momentum: Any
    square: Any
    instability: Any


def layer_axes(path):
    """The number of leading axes that count layers."""
    return int(LAYERED.fullmatch(path) is not None)


def is_factored(path, shape):
    """Whether a layer of this leaf is a matrix."""
    return len(shape) - layer_axes(path) == 2


def inverse_root(row, col):
    """1 / sqrt of the matrix row col / mean(row): [... r] and [... c] -> [... r c]."""
    row = row / jnp.mean(row, axis=-1, keepdims=True)
    return jax.lax.rsqrt(row)[..., None] * jax.lax.rsqrt(col)[..., None, :]


def scale_by_came(b1=0.9, b2=0.999, b3=0.9999, eps1=1e-30, eps2=1e-16, clip=1.0):
    """The transform; the update still lacks its learning rate and sign.

    Args:
      b1, b2, b3: decays of m, V and S.
      eps1, eps2: added to g^2 and to (u - m)^2.
      clip: the largest rms of u.
    """

    def init(params):
        momentum, square, instability = {}, {}, {}
        for path, p in flatten_dict(params, sep="/").items():
            momentum[path] = jnp.zeros(p.shape, jnp.float32)
            if is_factored(path, p.shape):
                for kept in (square, instability):
                    kept[f"{path}/row"] = jnp.zeros(p.shape[:-1], jnp.float32)
                    kept[f"{path}/col"] = jnp.zeros(p.shape[:-2] + p.shape[-1:], jnp.float32)
            else:
                square[f"{path}/full"] = jnp.zeros(p.shape, jnp.float32)
        return CAMEState(*(unflatten_dict(tree, sep="/") for tree in (momentum, square, instability)))

    def update(grads, state, params=None):
        del params
        momentum, square, instability = ({**flatten_dict(tree, sep="/")} for tree in state)

        def mean(kept, path, x, decay):
            """Moves the row and column means of x into `kept`; returns 1 / sqrt of what they stand for."""
            for name, axis in (("row", -1), ("col", -2)):
                name = f"{path}/{name}"
                kept[name] = decay * kept[name] + (1 - decay) * jnp.mean(x, axis=axis)
            return inverse_root(kept[f"{path}/row"], kept[f"{path}/col"])

        out = {}
        for path, g in flatten_dict(grads, sep="/").items():
            g = g.astype(jnp.float32)
            factored = is_factored(path, g.shape)
            if factored:
                u = g * mean(square, path, g * g + eps1, b2)
            else:
                full = f"{path}/full"
                square[full] = b2 * square[full] + (1 - b2) * (g * g + eps1)
                u = g * jax.lax.rsqrt(square[full])
            axes = tuple(range(layer_axes(path), g.ndim))
            rms = jnp.sqrt(jnp.mean(u * u, axis=axes, keepdims=True))
            u = u / jnp.maximum(rms / clip, 1.0)
            momentum[path] = m = b1 * momentum[path] + (1 - b1) * u
            out[path] = m * mean(instability, path, jnp.square(u - m) + eps2, b3) if factored else m
        out, *trees = (unflatten_dict(tree, sep="/") for tree in (out, momentum, square, instability))
        return out, CAMEState(*trees)

    return optax.GradientTransformation(init, update)
