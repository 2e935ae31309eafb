"""All that changes while a model is trained, and all that a checkpoint holds of it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TrainState:
    """Arrays only; `params` and `ema` are whole models, also where parts are frozen.

    step: batches consumed, whether they changed anything or were skipped.
    skipped: batches that changed nothing: loss, gradient or update were not finite, or no row counted.
    skipped_in_row: those that were not finite since the last update.
    """

    step: jax.Array  # int32
    params: Any
    ema: Any  # like params, or None
    opt_state: Any
    skipped: jax.Array  # int32
    skipped_in_row: jax.Array  # int32


def create(params, tx, ema=None):
    """The state before the first batch.

    Args:
      params: nested dict of arrays.
      tx: what `optimizer.make` returned.
      ema: the decay of the moving average, or None for no average.
    """
    zero = jnp.zeros((), jnp.int32)
    average = None if ema is None else jax.tree.map(jnp.copy, params)
    return TrainState(zero, params, average, tx.init(params), zero, zero)
