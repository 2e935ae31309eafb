"""Gradients of torch modules under our names, and how far two trees of them are apart."""

import functools

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sana_jax.checkpoints import rules
from sana_jax.parameters import parameter_shapes
from tests import peers

BOUND = 5e-5  # of |ours - theirs| / |theirs|, leaf by leaf


@functools.cache
def shapes_of(module):
    return parameter_shapes(module)


def to_tree(module, table, state):
    """{torch name: array} as the nested parameters of our `module`."""
    leaves = rules.to_flax(table, shapes_of(module), peers.header(state), state.items(), np.dtype("float32"))
    return unflatten_dict(leaves, sep="/")


def torch_gradients(torch_module, loss, module, table, constants=()):
    """The tree of d loss / d parameter.  Names in `constants` (statistics) have gradient 0."""
    torch_module.zero_grad()
    loss.backward()
    state = {name: peers.to_numpy(p.grad) for name, p in torch_module.named_parameters()}
    held = peers.to_numpy_state(torch_module)
    return to_tree(module, table, state | {name: 0 * held[name] for name in constants})


def errors(ours, theirs):
    """{path: |ours - theirs| / |theirs|} with Euclidean norms in float64."""
    ours, theirs = (flatten_dict(jax.tree.map(np.float64, tree), sep="/") for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    out = {}
    for path, a in ours.items():
        size = np.linalg.norm(theirs[path])
        assert size > 0, f"{path}: a gradient of 0 proves nothing"
        out[path] = float(np.linalg.norm(a - theirs[path]) / size)
    return out


def worst(ours, theirs):
    return max(errors(ours, theirs).values())
