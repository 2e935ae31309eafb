"""What a run says of its memory before the first step."""

import jax
import jax.numpy as jnp
import pytest

from sana_jax.sharding import make_mesh
from sana_jax.training import layout, plan
from sana_jax.training.state import TrainState


def make(ema=True):
    """(state as shapes, shardings, mesh, a compiled step) of one matrix cut over four of eight devices."""
    mesh = make_mesh(data=2, fsdp=4)
    leaf = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(
        count, {"w": leaf}, {"w": leaf} if ema else None, {"mu": {"w": leaf}, "nu": {"w": leaf}}, count, count
    )
    placed = jax.tree.map(lambda a: cut if a.ndim else everywhere, state)

    def step(state, batch):
        return jax.tree.map(lambda a: a + 1, state), jnp.sum((batch @ state.params["w"]) ** 2)

    batch = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=layout.batch_sharding(mesh))
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
    return state, placed, mesh, step.lower(layout.with_shardings(state, placed), batch).compile()


def test_the_parts_add_up():
    state, placed, mesh, compiled = make()
    text = "\n".join(plan.memory_plan(state, placed, mesh, compiled, 8e12))
    assert text.startswith("1.0 M parameters on 8 x cpu (data=2, fsdp=4, tensor=1)\nmemory of a device: ")
    assert "0.000977 GiB parameters, 0.000977 GiB their average, 0.00195 GiB the optimizer, " in text
    assert "the batch and what is not trained" in text and text.endswith("a step: 8 TFLOP")
    analysis = compiled.memory_analysis()
    assert plan.step_bytes(analysis) >= 4 * 2**20 + 64 * 1024 * 4 // 8
    assert analysis.alias_size_in_bytes >= 4 * 2**20  # donated: counted once


def test_no_average_is_not_mentioned():
    assert "average" not in "\n".join(plan.memory_plan(*make(ema=False)))


@pytest.mark.parametrize(
    "limit, words", [(None, ""), (2**30, " of 1 GiB"), (2**20, " of 0.000977 GiB, more than there is")]
)
def test_what_a_device_has(limit, words, monkeypatch):
    monkeypatch.setattr(plan, "memory_of", lambda device, mesh: limit)
    assert plan.memory_plan(*make())[1].endswith("GiB" + words)


def test_the_time_at_the_peak(monkeypatch):
    monkeypatch.setattr(plan.flops, "peak", lambda kind: 1e12)
    assert plan.memory_plan(*make(), 8e12)[-1] == "a step: 8 TFLOP, 1,000 ms at the bfloat16 peak"
