"""Where the state and the batches of a run lie on eight devices."""

import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax import experiment
from sana_jax.errors import InputError
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.layers import by_rows
from sana_jax.models.sana import Sana
from sana_jax.parameters import abstract_parameters
from sana_jax.sharding import make_mesh
from sana_jax.training import layout, optimizer
from sana_jax.training.optimizer import CAME, AdamW, Muon
from sana_jax.training.state import create

SANA = Sana(width=64, depth=2, heads=4, cross_heads=4, caption_width=32)
GEMMA2 = Gemma2(64, 32, 2, 4, 2, 8, 48)
DC_AE = DCAE(
    latent_channels=4, widths=(8, 16), encoder_depths=(1, 1), decoder_depths=(1, 1), encoder_attention=(None, ()),
    decoder_attention=(None, ()), head_dim=8,
)  # fmt: skip


def abstract_state(module, rule, **changes):
    optim = experiment.Optim(rule, ema=0.99, **changes)
    params = abstract_parameters(module)
    tx = optimizer.make(optim, 10, 8, params)
    return jax.eval_shape(lambda params: create(params, tx, optim.ema), params)


@pytest.mark.parametrize("rule", [AdamW(), CAME()], ids=["adamw", "came"])
@pytest.mark.parametrize("module", [SANA, GEMMA2, DC_AE], ids=lambda module: type(module).__name__)
def test_every_leaf_has_a_place_that_divides_it(module, rule):
    state = abstract_state(module, rule)
    placed = layout.state_shardings(state, module, make_mesh(data=2, fsdp=2, tensor=2))
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    jax.tree.map(lambda a, s: s.shard_shape(a.shape), state, placed)  # raises unless it divides
    assert placed.step.spec == P() and placed.params == placed.ema


def test_momentum_of_muon_is_cut_as_its_matrix():
    state = abstract_state(SANA, Muon())
    placed = layout.state_shardings(state, SANA, make_mesh(data=2, fsdp=2, tensor=2))
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    found = [s.spec for path, s in jax.tree_util.tree_leaves_with_path(placed.opt_state) if "qkv" in jax.tree_util.keystr(path)]
    assert found == [P(None, "fsdp", "tensor")]


@pytest.mark.parametrize("sizes, layers", [({"data": 2}, 2), ({"data": 3}, 4), ({}, 4)], ids=["divided", "indivisible", "alone"])
def test_devices_share_the_matrices_that_muon_iterates(sizes, layers):
    """Four layers; the [64 64] products of an iteration say how many of them a device has."""
    grads = {"blocks": {"out": {"kernel": jax.random.normal(jax.random.key(0), (4, 64, 96))}}}
    tx = optimizer.make(experiment.Optim(Muon(matrices=("blocks/.*/kernel",)), warmup=0), 10, 8, grads)
    state = tx.init(grads)
    alone, _ = tx.update(grads, state, grads)
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        placed = jax.device_put((grads, state, grads), NamedSharding(mesh, P()))
        update = jax.jit(tx.update, out_shardings=NamedSharding(mesh, P())).lower(*placed).compile()
        found = re.findall(r"f32\[(\d),64,64\]\S* (?:dot|custom-call)\(", update.as_text())
        assert found and set(found) == {str(layers)}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), update(*placed)[0], alone)


def test_what_the_optimizer_keeps_is_cut_as_its_parameter():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state = abstract_state(SANA, AdamW())
    placed = layout.state_shardings(state, SANA, mesh)
    adam = next(part for part in placed.opt_state if hasattr(part, "mu"))
    assert adam.mu == adam.nu == placed.params and adam.count.spec == P()
    assert placed.params["blocks"]["self_attn"]["qkv"]["kernel"].spec == P(None, "fsdp", "tensor")

    placed = layout.state_shardings(abstract_state(SANA, CAME()), SANA, mesh)
    came = next(part for part in placed.opt_state if hasattr(part, "square"))
    assert came.momentum == placed.params
    expand, depthwise = (came.square["blocks"]["mix_ffn"][name]["kernel"] for name in ("expand", "depthwise"))
    assert expand["row"].spec == P(None, "fsdp") and expand["col"].spec == P(None, "tensor")
    assert depthwise["full"].spec == P(None, None, None, "tensor")
    assert came.instability["blocks"]["mix_ffn"]["expand"]["kernel"]["row"].spec == P(None, "fsdp")


def test_frozen_parameters_have_no_optimizer_state():
    state = abstract_state(SANA, AdamW(), freeze=("blocks/.*",))
    placed = layout.state_shardings(state, SANA, make_mesh(fsdp=8))
    adam = next(part for part in placed.opt_state if hasattr(part, "mu"))
    assert "blocks" not in adam.mu and adam.mu["patch_embed"] == placed.params["patch_embed"]


def test_a_leaf_of_no_parameter_is_refused():
    state = abstract_state(SANA, AdamW())
    lost = {
        "patch_embed": {"kernel": jax.ShapeDtypeStruct((3, 3), jnp.float32)},
        "more": jax.ShapeDtypeStruct((5,), jnp.float32),
    }
    with pytest.raises(ValueError, match=r"(?s)\['more'\] \(5,\).*\['kernel'\] \(3, 3\)"):
        layout.state_shardings(state.replace(opt_state=lost), SANA, make_mesh(fsdp=8))


def test_rows_are_cut_over_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rows = {"image": np.arange(8 * 3).reshape(8, 3), "bad": np.zeros(8, np.int32)}
    placed = layout.put_batch(rows, mesh)
    assert placed.keys() == {"image"}
    for shard in placed["image"].addressable_shards:
        data, fsdp, _ = np.argwhere(mesh.devices == shard.device)[0]
        first = 2 * (2 * data + fsdp)
        assert np.array_equal(shard.data, rows["image"][first : first + 2])


def test_activations_follow_the_rows_and_only_there():
    mesh = make_mesh(fsdp=8)
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, P(None, "fsdp")))
    with jax.set_mesh(mesh):
        plain = jax.jit(lambda x: by_rows(x + 1)).lower(x).compile()
        cut = jax.jit(layout.on_mesh(lambda x: by_rows(x + 1), mesh)).lower(x).compile()
    assert plain.output_shardings.spec == P(None, "fsdp")
    assert cut.output_shardings.is_equivalent_to(layout.batch_sharding(mesh), 2)


@pytest.mark.parametrize(
    "batch, accumulate, sizes, near",
    [(12, 1, dict(data=8), "8 or 16"), (16, 4, dict(data=4, fsdp=2), "32"), (6, 1, dict(fsdp=4, tensor=2), "4 or 8")],
)
def test_a_batch_that_does_not_divide(batch, accumulate, sizes, near):
    with pytest.raises(InputError, match=rf"^data\.batch={batch}: must be a multiple of .*; {near}$"):
        layout.check_batch(batch, accumulate, make_mesh(**sizes))


def test_rows_that_two_processes_would_share():
    def mesh(processes, shape):
        grid = np.array([types.SimpleNamespace(process_index=p) for p in processes], object).reshape(shape)
        return types.SimpleNamespace(devices=grid, shape=dict(zip(("data", "fsdp", "tensor"), shape)))

    layout.check_batch(8, 1, mesh([0, 0, 1, 1], (2, 1, 2)))
    for processes, shape in (([0, 0, 1, 1], (1, 1, 4)), ([0, 0, 0, 1], (4, 1, 1))):
        with pytest.raises(InputError, match="^mesh.tensor="):
            layout.check_batch(8, 1, mesh(processes, shape))


def test_the_mesh_of_an_experiment():
    assert layout.mesh_sizes(experiment.Mesh()) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert layout.mesh_sizes(experiment.Mesh(fsdp=4)) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert layout.mesh_sizes(experiment.Mesh(data=1, fsdp=-1), 64) == {"data": 1, "fsdp": 64, "tensor": 1}
    for wrong in (
        experiment.Mesh(fsdp=3),
        experiment.Mesh(data=2),
        experiment.Mesh(fsdp=-1),
        experiment.Mesh(fsdp=16),
    ):
        with pytest.raises(InputError, match=r"^mesh\.data=.*number of devices, 8; one may be -1"):
            layout.mesh_sizes(wrong)


def test_a_state_is_made_where_it_belongs():
    mesh = make_mesh(data=2, fsdp=4)
    state = abstract_state(SANA, AdamW())
    placed = layout.state_shardings(state, SANA, mesh)
    made = jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state), out_shardings=placed)()
    assert jax.tree.map(lambda a: a.sharding, made) == placed
    wanted = layout.with_shardings(state, placed)
    assert all(a.sharding == s for a, s in zip(jax.tree.leaves(wanted), jax.tree.leaves(placed), strict=True))
    assert set(flatten_dict(placed.params, sep="/")) == set(flatten_dict(state.params, sep="/"))
