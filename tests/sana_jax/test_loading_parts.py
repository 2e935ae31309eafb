"""NVlabs' files by themselves, and whole pipelines from parts, painted as NVlabs' own code would."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import sana_jax
from sana_jax import convert
from sana_jax.checkpoints.read import open_checkpoint
from sana_jax.components import load_dc_ae, load_sana
from sana_jax.errors import CheckpointError, InputError
from sana_jax.loading import load_pipeline
from tests.nvlabs_names import nvlabs_state
from tests.toy_pipeline import (
    CAPTION, TRANSFORMER, VARIANTS, Rectangle, load_peer, make_dc_ae, make_gemma2, make_transformer, nvlabs_oracle,
    run_transformer, transformer_case,
)  # fmt: skip
from tests.toy_tokenizer import make_tokenizer

pytestmark = pytest.mark.parity
PROMPTS = ["A photo of a Red cat --ar 1:2", "the dog runs along the beach"]
TOLD = {"cross_heads": 4}  # toy widths were never published


def same_bits(a, b):
    a, b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    return len(a) == len(b) and all(
        p == q and x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for (p, x), (q, y) in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def pth(toy_folder, tmp_path_factory):
    """The toy transformer as NVlabs would have saved it in training, from diffusers' file."""
    import torch
    from safetensors.torch import load_file

    state = nvlabs_state(load_file(toy_folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    extra = {"pos_embed": torch.zeros(1, 16 * 16, 64), "y_embedder.y_embedding": torch.zeros(300, CAPTION)}
    path = tmp_path_factory.mktemp("pth") / "epoch_1_step_2.pth"
    torch.save({"state_dict": state | extra, "epoch": 1, "optimizer": {"lr": 1e-4}}, path)
    return path


@pytest.fixture(scope="module")
def parts(toy_folder, tmp_path_factory):
    """An efficientvit autoencoder, and a Gemma-2 with its tokenizer beside the weights."""
    folder = tmp_path_factory.mktemp("parts")
    convert.convert(toy_folder / "vae", folder / "dc_ae", to="efficientvit", report=lambda _: None)
    shutil.copytree(toy_folder / "text_encoder", folder / "gemma")
    shutil.copytree(toy_folder / "tokenizer", folder / "gemma", dirs_exist_ok=True)
    return {"dc_ae": folder / "dc_ae", "text": folder / "gemma"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_transformer_of_a_pth_is_that_of_diffusers(tmp_path, variant):
    """The same parameters as from diffusers' folder, bit for bit; and what they compute."""
    import torch

    module = make_transformer(**VARIANTS[variant])
    module.save_pretrained(tmp_path / "folder")
    torch.save({"state_dict": nvlabs_state(module.state_dict())}, tmp_path / "a.pth")
    told = TOLD | {"sample_size": module.config.sample_size, "position_scale": module.config.interpolation_scale}
    sana, params = load_sana(tmp_path / "a.pth", **told)
    expected, reference = load_sana(tmp_path / "folder")
    assert sana == expected and same_bits(params, reference)
    case = transformer_case(guidance=sana.guidance_embed)
    inputs = [case[k] for k in ("x", "t", "states", "mask")] + [case.get("guidance")]
    out = jax.jit(sana.apply)({"params": params}, *inputs)
    assert np.abs(np.asarray(out) - run_transformer(module, **case)).max() <= 2e-5


def test_a_pth_and_its_surplus(pth, tmp_path):
    sana, _ = load_sana(pth, **TOLD)
    assert (sana.sample_size, sana.position_scale) == (16, None), "told by pos_embed"
    import torch

    state = torch.load(pth, weights_only=True)["state_dict"]
    state["blocks.0.attn.qkv.bias"] = torch.zeros(192)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        load_sana(tmp_path / "a.pth", **TOLD)
    lines = str(caught.value).splitlines()
    assert lines == [f"{tmp_path / 'a.pth'} does not fit the model", "  not part of this model (1):", "    blocks.0.attn.qkv.bias"]


def test_what_no_file_tells_is_said(toy_folder, tmp_path):
    file = shutil.copy(toy_folder / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="a.safetensors: neither its tensors nor its name tell the resolution"):
        assert load_sana(file, **TOLD)[0].sample_size == 32
    file = shutil.copy(file, tmp_path / "a_4Kpx.safetensors")
    sana = load_sana(file, **TOLD)[0]
    assert (sana.sample_size, sana.position_scale) == (128, 2.0)
    assert load_sana(file, **TOLD, sample_size=16, position_scale=None)[0].sample_size == 16


def test_a_pipeline_from_parts_paints_as_nvlabs(toy_folder, pth, parts):
    """.pth + efficientvit's DC-AE + a Gemma-2 folder, against diffusers' modules with NVlabs' habits."""
    pipeline = load_pipeline(pth, **parts, transformer=TOLD)
    whole = load_pipeline(toy_folder, stack="nvlabs")
    assert pipeline.stack == whole.stack == sana_jax.NVLABS and pipeline.flow_shift == 3.0
    assert pipeline.sana[0] == whole.sana[0] and pipeline.dc_ae[0] == whole.dc_ae[0]
    assert same_bits(pipeline.sana[1], whole.sana[1]) and same_bits(pipeline.dc_ae[1], whole.dc_ae[1])
    assert same_bits(pipeline.text.params, whole.text.params)
    # What no random network shows by itself: the denominator's eps and, with integer times, truncation.
    assert (pipeline.sana[0].attention_eps, pipeline.sana[0].integer_time, pipeline.sana[0].clamp) == (1e-8, True, True)

    latents, size = Rectangle(64, 96).noise(2), dict(height=64, width=96, bin_resolution=False)
    instruction = pipeline.instruction().text
    assert '"Enhanced prompt"' in instruction

    def paint(pipeline, sampler):
        return pipeline.generate(
            PROMPTS, negative_prompts="Blue sky", latents=latents, steps=8, sampler=sampler, output="latent", **size
        )

    sampler = "flow-euler"  # whose times are no integers: truncation is seen
    reference = nvlabs_oracle(load_peer(toy_folder), instruction, PROMPTS, "Blue sky", latents, 8, sampler)
    assert np.abs(paint(pipeline, sampler) - reference).max() <= 2e-4
    for change in ({"negative_uses_prompt_mask": False}, {"integer_time": False}, {"chi_double_quotes": False}, {"lower_case": True}):
        wrong = dataclasses.replace(sana_jax.NVLABS, **change)
        other = sana_jax.Pipeline(pipeline.sana, pipeline.dc_ae, pipeline.text, wrong)
        assert np.abs(paint(other, sampler) - reference).max() > 1e-3, change


def test_parts_replace_those_of_a_folder(toy_folder, tmp_path, parts):
    make_dc_ae(seed=9).save_pretrained(tmp_path / "vae")
    make_gemma2(seed=8).save_pretrained(tmp_path / "pipe" / "text_encoder")
    make_tokenizer().save_pretrained(tmp_path / "pipe" / "tokenizer")
    base = load_pipeline(toy_folder)
    other = load_pipeline(toy_folder, dc_ae=tmp_path / "vae", text=tmp_path / "pipe")
    assert same_bits(other.sana[1], base.sana[1])
    assert same_bits(other.dc_ae[1], load_dc_ae(tmp_path / "vae")[1]) and not same_bits(other.dc_ae[1], base.dc_ae[1])
    assert not same_bits(other.text.params, base.text.params)
    assert other.stack.name == "diffusers"
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    single = load_pipeline(toy_folder, dc_ae=file, text=toy_folder)
    assert same_bits(single.dc_ae[1], other.dc_ae[1]) and same_bits(single.text.params, base.text.params)
    folder = load_pipeline(toy_folder / "transformer", dc_ae=toy_folder, text=toy_folder / "text_encoder")
    assert same_bits(folder.sana[1], base.sana[1]) and same_bits(folder.text.params, base.text.params)
    assert folder.stack.name == "diffusers"
    assert load_pipeline(toy_folder / "transformer", **parts, stack="nvlabs").stack.name == "nvlabs"


def test_missing_and_mismatched_parts(toy_folder, pth, parts, tmp_path, monkeypatch):
    for given, missing in [({}, "dc_ae= and text="), ({"dc_ae": parts["dc_ae"]}, "text="), ({"text": parts["text"]}, "dc_ae=")]:
        with pytest.raises(InputError, match=f"{pth.name}: is a file; a transformer alone needs {missing} too") as caught:
            load_pipeline(pth, **given)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="has no model_index.json.*this is a component folder; .* needs dc_ae= and text="):
        load_pipeline(toy_folder / "transformer")
    make_dc_ae(latent_channels=16).save_pretrained(tmp_path / "vae")
    make_gemma2(hidden_size=32).save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "text")

    def never(self, mesh=None):
        raise AssertionError("weights are read")

    monkeypatch.setattr(sana_jax.components.Prepared, "read", never)
    for given, message in [
        ({"dc_ae": tmp_path / "vae"}, "latent_channels=32 of the transformer and 16 of the autoencoder differ"),
        ({"text": tmp_path / "text"}, "caption_width=64 of the transformer and width 32 of the text encoder differ"),
        ({"text": toy_folder / "text_encoder" / "model.safetensors"}, "tokenizer|config.json is absent|no such folder"),
        ({"text": tmp_path / "vae"}, "no tokenizer here"),
        ({"dc_ae": parts["text"]}, "holds gemma2, must hold AutoencoderDC"),
        ({"dc_ae": pth}, "DC-AE"),
        ({"text": tmp_path / "none"}, "none"),
        ({"dc_ae": 3}, "must be a path or a Hugging Face id, not a int"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            load_pipeline(toy_folder, **given)
        assert "\n" not in str(caught.value)


def test_variants_of_a_folder(toy_folder, tmp_path):
    """The dtype chooses among the files that are there; a named variant wins."""
    import torch

    folder = tmp_path / "transformer"
    for seed, variant, dtype in ((1, None, torch.float32), (2, "bf16", torch.bfloat16), (3, "fp16", torch.float16)):
        make_transformer(seed=seed).to(dtype).save_pretrained(folder, variant=variant)
    stored = {bits: load_sana(folder, variant=variant)[1] for bits, variant in (("bf16", "bf16"), ("fp16", "fp16"))}
    assert not same_bits(*(jax.tree.map(lambda x: x.astype("f"), stored[bits]) for bits in stored))
    plain = load_sana(folder)[1]
    assert jax.tree.leaves(plain)[0].dtype == "float32", "auto prefers the plain file"
    for dtype in ("bf16", "fp16"):
        assert same_bits(load_sana(folder, dtype=dtype)[1], stored[dtype])
    assert same_bits(load_sana(folder, dtype="fp32")[1], plain)
    assert same_bits(load_sana(folder, dtype="fp32", variant="bf16")[1], jax.tree.map(lambda x: x.astype("f"), stored["bf16"]))
    with pytest.raises(InputError, match="expected .*int8.*; variants here: bf16, fp16, plain"):
        load_sana(folder, variant="int8")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="no plain weights, and variants bf16, fp16: choose one with variant="):
        load_sana(folder)
    with pytest.raises(InputError, match="no plain weights, and variants bf16, fp16"):
        load_sana(folder, dtype="fp32")

    named = shutil.copytree(toy_folder, tmp_path / "Sana_1600M_1024px_BF16_diffusers")
    shutil.rmtree(named / "transformer")
    shutil.copytree(folder, named / "transformer")
    assert same_bits(load_pipeline(named).sana[1], stored["bf16"]), "a known name decides"
    with pytest.raises(InputError, match="vae: no weights, expected .*fp16.*; variants here: plain"):
        load_pipeline(named, variant="fp16")
    shutil.copy(folder / "config.json", named / "config.json")
    assert open_checkpoint(folder, variant="fp16").dtypes == {"F16"} and TRANSFORMER["num_layers"] == 3
