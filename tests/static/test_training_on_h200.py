"""The training step of train.py for eight H200s: what it exchanges, and that it fits.

The table for other sizes and meshes is docs/memory.md, written by benchmarks/memory_table.py.
"""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from sana_jax import aot, experiment
from sana_jax.aot import programs
from sana_jax.aot.compiling import NO_TRITON_GEMM, overheard
from sana_jax.models.sana import SANA_600M
from sana_jax.parameters import abstract_parameters
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
    overrides = [
        "model.sample_size=16",
        "data.size=512",
        "data.batch=512",
        "model.remat=products",
        "optim.ema=0.9999",
    ]
    found, said = compiled("sana_1600m_1024_finetune", overrides, {"fsdp": 8})
    assert said == [] and found["peak_bytes"] < 42 * GIB
    assert found["donated_bytes"] > 2.2 * GIB  # 12 bytes of 1.6e9 parameters over 8 cards: no second state
    kinds = found["collectives"]
    assert kinds.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert not any("conv" in call.lower() for call in found["custom_calls"])


def test_without_the_rule_for_rows_activations_are_exchanged():
    """The control of the test above: what `layout.on_mesh` is for."""
    model = SANA_600M.clone(depth=1, width=288, heads=9, cross_heads=4, dtype=jnp.bfloat16)
    mesh = aot.mesh_of("h200", fsdp=8)
    shapes = abstract_parameters(model)
    params = layout.with_shardings(shapes, layout.param_shardings(shapes, model, mesh))
    batch = {"x": (64, 16, 16, 32), "t": (64,), "states": (64, 32, model.caption_width), "mask": (64, 32)}
    rows = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout.batch_sharding(mesh))
        for name, shape in batch.items()
    }

    def gradient(params, batch):
        return jax.grad(lambda p: jnp.mean(model.apply({"params": p}, **batch).astype(jnp.float32) ** 2))(params)

    def exchanged(fn):
        return aot.summary(aot.compile_for("h200", fn, params, rows, mesh=mesh, options=NO_TRITON_GEMM))[
            "collectives"
        ]

    assert exchanged(gradient)["all-to-all"] > 0
    assert "all-to-all" not in exchanged(layout.on_mesh(gradient, mesh))
