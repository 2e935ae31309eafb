"""Shapes of parameters are traced once, and each module has its own."""

import jax
import jax.numpy as jnp
import pytest

from sana_jax import parameters
from sana_jax.components import load_dc_ae, load_sana
from sana_jax.errors import InputError
from sana_jax.models.sana import Sana
from sana_jax.parameters import abstract_parameters, parameter_shapes

TOY = Sana(width=32, depth=1, heads=1, cross_heads=1, caption_width=16)


def test_what_the_module_makes(monkeypatch):
    made = TOY.init(jax.random.key(0), *TOY.example_inputs())["params"]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(lambda a: (a.shape, a.dtype), abstract_parameters(TOY))
    assert parameter_shapes(TOY)["blocks/self_attn/qkv/kernel"] == (1, 32, 96)
    monkeypatch.setattr(Sana, "init", None)  # it is not asked again
    abstract_parameters(TOY)["blocks"].clear()  # nor does a caller's copy matter
    assert parameter_shapes(TOY.clone())["blocks/self_attn/qkv/kernel"] == (1, 32, 96)


def test_what_is_equal_may_still_be_another():
    assert parameter_shapes(TOY.clone(depth=2))["blocks/self_attn/qkv/kernel"] == (2, 32, 96)
    assert parameter_shapes(TOY) and TOY.clone(width=32.0) == TOY
    with pytest.raises(TypeError):
        parameter_shapes(TOY.clone(width=32.0))
    half = abstract_parameters(TOY.clone(param_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


@pytest.mark.parity
def test_loading(toy_folder):
    """A float for a whole number is an error also where the right one was loaded before; lists are fine."""
    module, _ = load_sana(toy_folder / "transformer")
    with pytest.raises(InputError, match=f"width={float(module.width)}"):
        load_sana(toy_folder / "transformer", width=float(module.width))
    dc_ae, _ = load_dc_ae(toy_folder / "vae")
    again, _ = load_dc_ae(toy_folder / "vae", encoder_depths=list(dc_ae.encoder_depths))
    assert list(again.encoder_depths) == list(dc_ae.encoder_depths)
    with pytest.raises(InputError, match="kernels='pallas': needs an NVIDIA GPU"):
        load_sana(toy_folder / "transformer", kernels="pallas")


def test_tables_outlive_the_process(tmp_path, monkeypatch):
    def start():
        monkeypatch.setattr(parameters, "_traced", {})

    monkeypatch.setattr(parameters, "_folder", [])
    parameters.keep_tables(tmp_path)
    half = TOY.clone(param_dtype=jnp.bfloat16)
    start()
    traced = {module: abstract_parameters(module) for module in (TOY, half)}
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 and all(file.name.startswith("parameters-") for file in files)
    with monkeypatch.context() as patch:
        start()
        patch.setattr(Sana, "init", None)  # it is not asked again
        assert {module: abstract_parameters(module) for module in (TOY, half)} == traced
        start()
        patch.setattr(parameters, "_source", lambda: "models of another release")
        with pytest.raises(TypeError):
            abstract_parameters(TOY)
    for damage in (lambda text: "", lambda text: text[:-9], lambda text: text.replace("32", "33"), lambda text: "[]"):
        for file in files:
            file.write_text(damage(file.read_text()))
        start()
        assert abstract_parameters(TOY) == traced[TOY]
    parameters.keep_tables(tmp_path / "no such folder")
    start()
    assert abstract_parameters(TOY) == traced[TOY] and sorted(tmp_path.iterdir()) == files
