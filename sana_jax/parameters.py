"""What parameters a model has: names, shapes and types, without making any and without asking a device."""

import functools

import jax
from flax.traverse_util import flatten_dict

from sana_jax import ops


@functools.lru_cache(64)
def _traced(module):
    """Once for each structure: a trace of SANA-1.6B or of DC-AE takes a second."""
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *module.example_inputs()))["params"]


def abstract_parameters(module):
    """The parameters of a Sana, DCAE or Gemma2 as a tree of ShapeDtypeStructs.

    The random key is traced as well, for in a job of several processes no device may be asked for before
    they have met.
    """
    return jax.tree.map(lambda leaf: leaf, _traced(ops.plain(module)))  # dicts of the caller's own


def parameter_shapes(module):
    """{path: shape} of them, with paths such as "blocks/self_attn/qkv/kernel"."""
    return {path: leaf.shape for path, leaf in flatten_dict(abstract_parameters(module), sep="/").items()}
