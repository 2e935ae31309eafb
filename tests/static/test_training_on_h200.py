"""The training step of train.py for eight H200s: what it exchanges, and that it fits.

The table for other sizes and meshes is docs/memory.md, written by benchmarks/memory_table.py.
"""

import pathlib

import pytest

from sana_jax import aot, experiment
from sana_jax.aot import programs
from sana_jax.aot.compiling import NO_TRITON_GEMM, overheard
from sana_jax.training import layout

pytestmark = [
    pytest.mark.static,
    pytest.mark.skipif(not aot.available(), reason="needs the extra `static`"),
]

GIB = 2**30
CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def compiled(name, overrides, mesh, cached=True):
    """(summary of the step, what XLA said of rematerialisation)."""
    config = experiment.load(CONFIGS / f"{name}.py", overrides)
    cards = aot.mesh_of("h200", **mesh)
    with overheard() as said:
        program = programs.train_step(config, cards, programs.shapes_of(config)[0], cached)
        # Without a card jax 0.10.2 has no tiles for one of the products, see aot.compiling.
        step = aot.compile_for("h200", program.fn, *program.avals, mesh=cards, options=NO_TRITON_GEMM)
    return aot.summary(step), [line for line in said if "rematerialization" in line]


def test_the_whole_model_at_512_px():
    """64 rows a card, CAME and a moving average; docs/memory.md has 33 GiB."""
    overrides = ["model.sample_size=16", "data.size=512", "data.batch=512", "model.remat=products", "optim.ema=0.9999"]
    found, said = compiled("sana_1600m_1024_finetune", overrides, {"fsdp": 8})
    assert said == [] and found["peak_bytes"] < 42 * GIB
    assert found["donated_bytes"] > 2.2 * GIB  # 12 bytes of 1.6e9 parameters over 8 cards: no second state
    kinds = found["collectives"]
    assert kinds.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert not any("conv" in call.lower() for call in found["custom_calls"])


SMALL = ["model.depth=1", "model.width=288", "model.heads=9", "model.cross_heads=4", "model.remat=products"]


def test_without_the_rule_for_rows_activations_are_exchanged(monkeypatch):
    """The control of the test above, and of `layout.on_mesh`."""
    arguments = "sana_600m_512", [*SMALL, "data.batch=64"], {"fsdp": 8}
    with_rule, _ = compiled(*arguments)
    monkeypatch.setattr(layout, "on_mesh", lambda step, mesh: step)
    without, _ = compiled(*arguments)
    assert "all-to-all" not in with_rule["collectives"] and without["collectives"]["all-to-all"] > 0
