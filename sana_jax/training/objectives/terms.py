"""What goes into an objective and what comes out."""

from typing import Any, NamedTuple

import jax


class Terms(NamedTuple):
    """Of each row: its loss, what that counts in the mean, and further numbers to log.

    `weight` must not depend on the parameters: the loss of a batch is sum(weight loss) / sum(weight).
    """

    loss: jax.Array  # [b] float32
    weight: jax.Array  # [b] float32, 0 for a row that is not there
    extra: dict[str, jax.Array]  # {name: [b]}


class Frozen(NamedTuple):
    """The networks that a run uses and does not train.

    `modules` is {"dc_ae": DCAE, "text": Gemma2}, what is needed of them, and static.  `params` has
    their parameters by the same names and, for live text,
      "null" [m d]: the text states of the empty caption, without instruction;
      "prefix": a gemma2.Prefix of the instruction that all texts begin with; absent if there is none;
    and what `objective.load()` returned.
    """

    modules: dict[str, Any]
    params: dict[str, Any]
