"""Five AdamW steps with clipping and five CAME steps against torch's AdamW and came-pytorch.

Our layers share a leaf and torch has a parameter for each; the torch side is given them one by one.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from sana_jax.training import came, optimizer
from sana_jax.training.optimizer import AdamW, CAME

pytestmark = pytest.mark.parity

STEPS, LR = 5, 3e-3
SHAPES = {  # path -> shape; of those under blocks/ axis 0 counts layers
    "head/out/kernel": (6, 4),
    "head/modulation": (2, 6),
    "patch_embed/bias": (5,),
    "blocks/self_attn/qkv/kernel": (3, 6, 9),
    "blocks/modulation": (3, 6, 7),
    "blocks/cross_attn/out/bias": (3, 5),
    "blocks/mix_ffn/depthwise/kernel": (2, 3, 3, 8),
    "key_value/kv/kernel": (2, 4, 6),
}
STACKED = ("blocks/", "key_value/")
CONVOLUTION = "blocks/mix_ffn/depthwise/kernel"


def settings(rule, **changes):
    plain = dict(lr=LR, lr_rule="none", base_batch=256, warmup=0, decay="constant", clip=None, freeze=(), no_decay=())
    return types.SimpleNamespace(rule=rule, **(plain | changes))


def arrays(seed, scale):
    rng = np.random.default_rng(seed)
    return {path: scale * rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


START = arrays(0, 0.1)


def gradient(step):
    """Small and large ones in turn: the clipping acts on some and not on others.  Odd layers have a
    hundred times those of even layers, so that they must not be mixed."""
    out = arrays(10 + step, scale=[1e-3, 1e-1, 1e-5, 1.0, 1e-2][step])
    for path in out:
        if path.startswith(STACKED):
            out[path][1::2] *= 100
    return out


def layers(path, array):
    """The parameters that torch has instead: (name, array), 1x1 convolutions apart as they are stored."""
    if not path.startswith(STACKED):
        return {path: array}
    return {f"{path}.{i}": layer for i, layer in enumerate(array)}


def ours(rule, paths=SHAPES, **changes):
    params = {path: a for path, a in START.items() if path in paths}
    tree = unflatten_dict(params, sep="/")
    tx = optimizer.make(settings(rule, **changes), STEPS, 256, tree)

    @jax.jit
    def step(tree, state, grads):
        updates, state = tx.update(grads, state, tree)
        return jax.tree.map(jnp.add, tree, updates), state

    state = tx.init(tree)
    for i in range(STEPS):
        grads = {path: a for path, a in gradient(i).items() if path in paths}
        tree, state = step(tree, state, unflatten_dict(grads, sep="/"))
    return {path: np.asarray(a) for path, a in flatten_dict(tree, sep="/").items()}


def theirs(make, paths=SHAPES, clip=None, no_decay=(), lr=lambda step: LR):
    import torch

    def split(leaves):
        return {n: a for path in paths for n, a in layers(path, leaves[path]).items()}

    params = {name: torch.nn.Parameter(torch.tensor(a)) for name, a in split(START).items()}
    groups = [
        {"params": [p for n, p in params.items() if n.startswith(no_decay or "none")], "weight_decay": 0.0},
        {"params": [p for n, p in params.items() if not n.startswith(no_decay or "none")]},
    ]
    torch_optimizer = make([g for g in groups if g["params"]])
    for i in range(STEPS):
        for name, g in split(gradient(i)).items():
            params[name].grad = torch.tensor(g)
        if clip:
            torch.nn.utils.clip_grad_norm_(params.values(), clip)
        for group in torch_optimizer.param_groups:
            group["lr"] = lr(i)
        torch_optimizer.step()
    joined = {}
    for path in paths:
        found = [params[name].detach().numpy() for name in layers(path, START[path])]
        joined[path] = found[0] if path in params else np.stack(found)
    return joined


def worst(ours, theirs):
    """|ours - theirs| / |theirs - START|, of all five steps together, for each leaf: the largest."""
    moved = {p: np.linalg.norm(np.float64(theirs[p]) - START[p]) for p in theirs}
    assert min(moved.values()) > 0
    return max(np.linalg.norm(np.float64(ours[p]) - theirs[p]) / moved[p] for p in theirs)


BOUND = 3e-5  # float32 rounds parameters of 0.1 by 6e-9 and steps are 3e-3: 2e-6 each; found 1e-5


def test_adamw_with_clipping():
    import torch

    def make(groups):
        return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-10, weight_decay=0.03)

    reference = theirs(make, clip=0.1, no_decay="blocks/self_attn")
    kept = dict(clip=0.1, no_decay=("blocks/self_attn/.*",))
    assert worst(ours(AdamW(), **kept), reference) <= BOUND
    for mistake in ({"clip": None}, {"no_decay": ()}):
        assert worst(ours(AdamW(), **kept | mistake), reference) > 100 * BOUND


def test_a_schedule_with_warm_up():
    """The first update has rate 0, as diffusers' constant_with_warmup has it."""
    import torch

    def make(groups):
        return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-10, weight_decay=0.03)

    reference = theirs(make, lr=lambda step: LR * min(1, step / 3))
    assert worst(ours(AdamW(), warmup=3), reference) <= BOUND


def test_came(monkeypatch):
    from came_pytorch import CAME as Reference

    def make(groups):
        return Reference(groups, lr=LR, weight_decay=0.1)

    paths = [path for path in SHAPES if path != CONVOLUTION]  # which came-pytorch factors and SANA does not
    reference, rule = theirs(make, paths), CAME(weight_decay=0.1)
    assert worst(ours(rule, paths), reference) <= BOUND
    for mistake in (dict(b3=0.999), dict(clip=10.0), dict(weight_decay=0.0)):
        assert worst(ours(dataclasses.replace(rule, **mistake), paths), reference) > 100 * BOUND
    monkeypatch.setattr(came, "is_factored", lambda path, shape: len(shape) - path.startswith(STACKED) == 2)
    monkeypatch.setattr(came, "layer_axes", lambda path: 0)  # the rms of all layers together
    assert worst(ours(rule, paths), reference) > 100 * BOUND
