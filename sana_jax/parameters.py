"""What parameters a model has: names, shapes and types, without making any and without asking a device."""

import jax
from flax.traverse_util import flatten_dict

from sana_jax import ops

_traced = {}  # a trace of SANA-1.6B or of DC-AE takes a second, and train.py asks four times before its first step


def abstract_parameters(module):
    """The parameters of a Sana, DCAE or Gemma2 as a tree of ShapeDtypeStructs.

    The random key is traced as well, for in a job of several processes no device may be asked for before
    they have met.
    """
    module = ops.plain(module)
    # Not the module itself: one with width=32 equals one with width=32.0, which is none, and lists have no hash.
    key = repr(module), jax.config.jax_enable_x64, jax.sharding.get_abstract_mesh()
    if key not in _traced:
        _traced[key] = jax.eval_shape(lambda: module.init(jax.random.key(0), *module.example_inputs()))["params"]
    return jax.tree.map(lambda leaf: leaf, _traced[key])  # dicts of the caller's own


def parameter_shapes(module):
    """{path: shape} of them, with paths such as "blocks/self_attn/qkv/kernel"."""
    return {path: leaf.shape for path, leaf in flatten_dict(abstract_parameters(module), sep="/").items()}
