import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sana_jax.sharding import make_mesh
from sana_jax.training.fingerprint import fingerprint, state_hash
from tests.sana_jax.training.toy_state import make_state

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_is_seen(dtype):
    array = np.asarray(jnp.arange(6).reshape(2, 3) % 2).astype(jnp.dtype(dtype))
    before, _ = fingerprint({"a": array})
    bits = range(array.nbytes * 8) if dtype != "bool" else range(0, array.nbytes * 8, 8)
    for bit in bits:
        data = bytearray(array.tobytes())
        data[bit // 8] ^= 1 << bit % 8
        flipped = np.frombuffer(bytes(data), array.dtype).reshape(array.shape)
        assert fingerprint({"a": flipped})[0] != before, bit


def test_order_name_type_and_shape_count():
    a = jnp.arange(6.0)
    hashes = {
        state_hash(tree)
        for tree in ({"a": a}, {"a": a[::-1]}, {"b": a}, {"a": a.astype(jnp.float16)}, {"a": a.reshape(2, 3)},
                     {"a": a.view(jnp.int32)}, {"a": {"a": a}}, {"a": a, "b": a})
    }  # fmt: skip
    assert len(hashes) == 8
    assert state_hash({"a": np.arange(6, dtype=np.float32)}) == state_hash({"a": a})


@pytest.mark.parametrize("spec", [("fsdp", None), (None, "fsdp"), ("data", "fsdp"), (("data", "fsdp"), None)])
def test_sharding_does_not_matter(spec):
    mesh = make_mesh(data=2, fsdp=4)
    array = jax.random.normal(jax.random.key(0), (16, 24))
    cut = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert fingerprint({"a": cut}) == fingerprint({"a": array})


def test_a_step_changes_the_hash_and_a_copy_does_not():
    assert state_hash(make_state(1)) == state_hash(jax.tree.map(jnp.copy, make_state(1))) != state_hash(make_state(2))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_names_the_arrays_that_are_not_finite(value):
    state = make_state()
    params = state.params | {"scale": state.params["scale"].at[3].set(value)}
    assert fingerprint(state)[1] == []
    assert fingerprint(state.replace(params=params))[1] == ["params/scale"]
