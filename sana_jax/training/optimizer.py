"""From an experiment's `optim` to an optax transform: rule, clipping, learning rate, what is trained.

Paths are those of flax, "blocks/self_attn/qkv/kernel"; patterns are regular expressions of whole paths.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from sana_jax.errors import InputError, nearest, require_choice
from sana_jax.training.came import scale_by_came

# Stored statistics of DC-AE's BatchNorm: they stand among the parameters and no gradient moves them.
STATISTICS = re.compile(r".*norm/(mean|var)")


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101); defaults as SANA's."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-10
    weight_decay: float = 0.03

    def scale(self):
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclasses.dataclass(frozen=True)
class CAME:
    """See `training.came`; defaults as SANA's.  A third to half of Adam's memory."""

    b1: float = 0.9
    b2: float = 0.999
    b3: float = 0.9999
    eps1: float = 1e-30
    eps2: float = 1e-16
    clip: float = 1.0
    weight_decay: float = 0.0

    def scale(self):
        return scale_by_came(self.b1, self.b2, self.b3, self.eps1, self.eps2, self.clip)


@dataclasses.dataclass(frozen=True)
class Muon:
    """Momentum, orthogonalised, for the matrices of layers; Adam for all else (https://arxiv.org/abs/2502.16982).

    Updates of a matrix have a root mean square of about `rms`, where those of Adam have 0.2 to 0.4, so that
    both have one rate.  Half of Adam's memory for the matrices, and five Newton-Schulz iterations a step.
    matrices: patterns of whole paths; the last two axes are input and output, those before are layers.
    beta: of the momentum; b1, b2, eps are Adam's.
    """

    matrices: tuple[str, ...] = (r"blocks/(?!.*depthwise).*/kernel", r"key_value/.*/kernel")
    beta: float = 0.95
    rms: float = 0.2
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.03

    def scale(self):
        def kinds(tree):
            paths = flatten_dict(tree, sep="/")
            chosen = matching(paths, self.matrices, "optim.rule.matrices")
            return unflatten_dict({path: "matrix" if path in chosen else "other" for path in paths}, sep="/")

        def as_adam(updates, params):
            return jax.tree.map(lambda u: u * (self.rms * math.sqrt(max(u.shape[-2:]))), updates)

        matrix = optax.chain(_orthogonalised(self.beta), optax.stateless(as_adam))
        return optax.partition({"matrix": matrix, "other": optax.scale_by_adam(self.b1, self.b2, self.eps)}, kinds)


def _orthogonalised(beta):
    """`optax.contrib.scale_by_muon` of the last two axes, whose iteration's constants are no state of a run."""

    def axes(tree):
        return jax.tree.map(lambda leaf: optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), tree)

    muon = optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=axes)

    def update(updates, state, params=None):
        state = state._replace(ns_coeffs=muon.init({}).ns_coeffs)
        updates, state = muon.update(jax.tree.map(_divided, updates), state, params)
        return updates, state._replace(ns_coeffs=None)

    return optax.GradientTransformation(lambda params: muon.init(params)._replace(ns_coeffs=None), update)


def _divided(leaf):
    """[layers ...] with the layers over as many leading axes of the mesh as divide them.

    A matrix is iterated as a whole; so each device has some of the matrices, where otherwise all have all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(mesh.axis_names) if leaf.ndim > 2 else ()
    while axes and leaf.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec(axes)) if axes else leaf


class Optimizer(NamedTuple):
    """An optax transform that is initialised with all parameters and updates the `trained` ones.

    `learning_rate` is that of the n-th update (skipped steps are none), counted from 0.
    """

    init: Callable
    update: Callable
    learning_rate: Callable
    trained: frozenset  # of paths


def make(optim, steps, batch, params):
    """The Optimizer of a run.

    Args:
      optim: with rule (AdamW, CAME or Muon), lr, lr_rule, base_batch, warmup, decay, clip, freeze, no_decay.
      steps: updates of the whole run, where a cosine ends.
      batch: rows of the global batch.
      params: nested dict of arrays or shapes.
    Raises InputError: a pattern without a parameter, or nothing left to train.
    """
    paths = sorted(flatten_dict(params, sep="/"))
    frozen = matching(paths, optim.freeze, "optim.freeze") | {p for p in paths if STATISTICS.fullmatch(p)}
    trained = frozenset(paths) - frozen
    if not trained:
        raise InputError(f"optim.freeze={optim.freeze!r}: nothing is left to train")
    no_decay = matching(paths, optim.no_decay, "optim.no_decay")
    rate = learning_rate(optim, batch, steps)

    def decays(tree):
        return unflatten_dict({path: path not in no_decay for path in flatten_dict(tree, sep="/")}, sep="/")

    chain = optax.chain(
        optax.identity() if optim.clip is None else clip_by_norm(optim.clip),
        optim.rule.scale(),
        optax.add_decayed_weights(optim.rule.weight_decay, decays),
        optax.scale_by_learning_rate(rate),
    )

    def update(grads, state, params):
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            return chain.update(grads, state, params)

    return Optimizer(lambda params: chain.init(split(params, trained)[0]), update, rate, trained)


def matching(paths, patterns, field):
    """The set of paths that one of the patterns matches whole.

    Raises InputError: patterns that match nothing, all of them.
    """
    found, problems = set(), []
    for pattern in patterns:
        try:
            hits = {path for path in paths if re.fullmatch(pattern, path)}
        except re.error as error:
            raise InputError(f"{field}: {pattern!r} is not a regular expression ({error})") from error
        if not hits:
            problems.append(f"{pattern!r} matches no parameter{nearest(pattern, paths)}")
        found |= hits
    if problems:
        raise InputError(f"{field}: {'; '.join(problems)}")
    return found


def split(params, trained):
    """(the trained, the frozen) part of a nested dict, by the set of trained paths."""
    flat = flatten_dict(params, sep="/")
    return tuple(
        unflatten_dict({path: leaf for path, leaf in flat.items() if (path in trained) == wanted}, sep="/")
        for wanted in (True, False)
    )


def merge(trained, frozen):
    """`split` undone."""
    return unflatten_dict(flatten_dict(trained, sep="/") | flatten_dict(frozen, sep="/"), sep="/")


def norm(tree):
    """The Euclidean norm over all leaves, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def clip_by_norm(largest):
    """torch's clip_grad_norm_: g min(1, largest / (|g| + 1e-6)), |g| over all leaves."""

    def update(grads, state, params=None):
        factor = jnp.minimum(1.0, largest / (norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def learning_rate(optim, batch, steps):
    """The schedule count -> float32.

    `lr` is multiplied by the batch's share of `base_batch`, or its root (docs/numerics.md 5.7).  It rises
    from 0 over `warmup` updates, as published, and then stays or follows half a cosine to 0.
    """
    share = batch / optim.base_batch
    scales = {"none": 1.0, "sqrt": share**0.5, "linear": share}
    peak = optim.lr * scales[require_choice("optim.lr_rule", optim.lr_rule, tuple(scales))]
    cosine = require_choice("optim.decay", optim.decay, ("constant", "cosine")) == "cosine"

    def rate(count):
        count = jnp.asarray(count, jnp.float32)
        value = peak * jnp.minimum(1.0, count / optim.warmup) if optim.warmup else jnp.float32(peak)
        if cosine:
            done = (count - optim.warmup) / max(1, steps - optim.warmup)
            value = value * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
        return value

    return rate
