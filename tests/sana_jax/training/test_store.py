"""What a store keeps, what it gives back, and what it refuses, on a disk that works."""

import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sana_jax.errors import InputError, NonFiniteError
from sana_jax.sharding import make_mesh
from sana_jax.training.fingerprint import state_hash
from sana_jax.training.store import Store, StructureError, read_meta, read_params
from tests.sana_jax.training.toy_state import abstract, make_state


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "checkpoints", keep=2)
    yield store
    store.close()


def save(store, *steps):
    for step in steps:
        assert store.save(step, make_state(step), {"samples": 4 * step})
    store.wait()


def test_gives_back_what_was_saved(store):
    assert store.restore(abstract(make_state())) is None
    save(store, 3)
    step, state, meta = store.restore(abstract(make_state()))
    assert (step, meta) == (3, {"samples": 12})
    assert jax.tree.structure(state) == jax.tree.structure(make_state())
    assert state_hash(state) == state_hash(make_state(3))


def test_a_state_may_be_donated_behind_save(store):
    state = make_state(1)
    expected = state_hash(state)
    store.save(1, state)
    jax.tree.map(lambda x: x.delete(), state)
    store.wait()
    assert state_hash(store.restore(abstract(make_state()))[1]) == expected


def test_keeps_the_newest_and_every_kth(tmp_path):
    store = Store(tmp_path, keep=2, keep_every=4)
    save(store, *range(1, 8))
    assert store.steps() == [4, 6, 7] and store.latest() == 7
    assert not (tmp_path / "trash").exists()
    store.close()


def test_saves_at_its_interval_or_when_forced_and_never_twice(tmp_path):
    store = Store(tmp_path, keep=9, every=5)
    saved = [step for step in range(12) if store.save(step, make_state(step))]
    assert saved == [0, 5, 10]
    assert store.save(12, make_state(12), force=True) and not store.save(12, make_state(12), force=True)
    store.close()
    again = Store(tmp_path, every=5)
    assert again.restore(abstract(make_state()))[0] == 12
    assert not again.save(12, make_state(12), force=True)  # nothing happened since
    again.close()


def test_folders_are_private(store):
    save(store, 1)
    for folder in (store.directory, store.directory / "1"):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_sweeps_what_a_killed_run_left(tmp_path):
    for name in ("7.orbax-checkpoint-tmp/state", "trash/3-17/state", "bad-5-99/state"):
        (tmp_path / name).mkdir(parents=True)
    store = Store(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["bad-5-99"]
    store.close()


MESHES = [dict(data=8), dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=4, devices=4), dict(devices=1)]


def placed(leaf, mesh):
    """First axis over data, last over fsdp, where they divide."""
    names = [None] * leaf.ndim
    for axis, name in ((0, "data"), (leaf.ndim - 1, "fsdp")):
        if leaf.ndim and names[axis] is None and leaf.shape[axis] % mesh.shape[name] == 0:
            names[axis] = name
    return NamedSharding(mesh, PartitionSpec(*names))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_restores_onto_any_mesh(store, sizes):
    first = make_mesh(data=4, fsdp=2)
    state = jax.tree.map(lambda x: jax.device_put(x, placed(x, first)), make_state(1))
    store.save(1, state)
    devices = jax.devices()[: sizes.get("devices", 8)]
    mesh = make_mesh(**sizes | {"devices": devices})
    wanted = abstract(make_state(), lambda leaf: placed(leaf, mesh))
    _, found, _ = store.restore(wanted)
    assert all(a.sharding == w.sharding for a, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    assert state_hash(found) == state_hash(make_state(1))


def without(state):
    return state.replace(params={k: v for k, v in state.params.items() if k != "scale"})


WRONG = {
    "shape": (lambda: make_state(width=32), ["params/blocks/kernel (saved float32 [2, 8, 64], asked for float32 [2, 8, 32])", "4 arrays"]),
    "type": (
        lambda: make_state().replace(step=jax.ShapeDtypeStruct((), jnp.int8, sharding=make_state().step.sharding)),
        ["step (saved int32 [], asked for int8 [])"],
    ),
    "extra": (lambda: make_state().replace(params=make_state().params | {"new": jnp.ones(3)}), ["missing in the checkpoint: params/new"]),
    "fewer": (lambda: without(make_state()), ["not in the state asked for: params/scale"]),
    "no ema": (lambda: make_state(ema=False), ["4 arrays are not in the state asked for: ema/blocks/bias, "]),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_structure_is_an_error_that_names_arrays_and_no_reason_to_fall_back(store, case):
    save(store, 1, 2)
    wanted, words = WRONG[case]
    with pytest.raises(StructureError) as caught:
        store.restore(abstract(wanted()))
    assert all(word in str(caught.value) for word in ["checkpoints/2", *words]), str(caught.value)
    assert store.steps() == [1, 2]


@pytest.mark.parametrize("field", ["params", "ema"])
def test_what_is_not_finite_is_refused_and_costs_no_older_step(tmp_path, field):
    store = Store(tmp_path, keep=1)
    save(store, 1)
    state = make_state(2)
    bad = state.replace(**{field: jax.tree.map(lambda x: x.at[..., :1].set(jnp.nan) if x.dtype == jnp.float32 and x.ndim == 1 else x, getattr(state, field))})
    for step in (2, 3, 4):
        with pytest.raises(NonFiniteError, match=rf"step {step} is not saved: NaN or infinity in {field}/scale"):
            store.save(step, bad)
    store.close()
    assert store.steps() == [1]


def test_reads_only_the_parameters(tmp_path):
    store = Store(tmp_path / "checkpoints")
    save(store, 1, 2)
    for ema, step, expected in ((True, None, make_state(2).ema), (False, 1, make_state(1).params)):
        found = read_params(tmp_path, ema=ema, step=step)
        jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(expected))
        assert {type(leaf) for leaf in jax.tree.leaves(found)} == {np.ndarray}
        assert found["embed"]["kernel"].dtype == jnp.bfloat16
    assert read_meta(tmp_path) == (2, {"samples": 8})
    store.close()


def test_says_what_there_is_to_read(tmp_path):
    with pytest.raises(InputError, match="is no folder of a run"):
        read_params(tmp_path)
    store = Store(tmp_path / "checkpoints")
    with pytest.raises(InputError, match="has no steps"):
        read_params(tmp_path)
    store.save(1, make_state(1, ema=False))
    store.close()
    with pytest.raises(InputError, match=r"step=5: .* has 1$"):
        read_params(tmp_path, step=5)
    with pytest.raises(InputError, match="holds no ema; .* ask for the raw"):
        read_params(tmp_path)
    assert read_params(tmp_path, ema=False)["scale"].shape == (8,)


@pytest.mark.parametrize("field", ["keep", "every", "keep_every"])
def test_numbers_must_be_positive(tmp_path, field):
    with pytest.raises(InputError, match=f"checkpoint.{field}=0: must be a positive integer"):
        Store(tmp_path, **{field: 0})
