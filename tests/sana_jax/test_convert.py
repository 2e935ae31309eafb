"""`python -m sana_jax.convert`: every format to every other and back, bit for bit; what it refuses."""

import json
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

from sana_jax import convert
from sana_jax.checkpoints.read import open_checkpoint, read_json
from sana_jax.loading import load_pipeline
from tests.nvlabs_names import nvlabs_state
from tests.toy_pipeline import VARIANTS, make_transformer

pytestmark = pytest.mark.parity
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run(*args):
    """The exit status, as of the command."""
    return convert.main([str(arg) for arg in args])


def tensors(path):
    """{name: (dtype, shape, bytes)} of any checkpoint."""
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in open_checkpoint(path).tensors()}


def torch_tensors(state):
    from tests.peers import to_numpy

    arrays = {name: to_numpy(tensor) for name, tensor in state.items()}
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in arrays.items()}


@pytest.mark.parametrize("variant, dtype", [(v, "fp32") for v in VARIANTS] + [("sprint", "bf16"), ("1.5", "fp16")])
def test_a_transformer_there_and_back(tmp_path, capsys, variant, dtype):
    """diffusers -> .pth -> diffusers; the .pth against names written by hand, and both bit for bit."""
    import torch

    module = make_transformer(**VARIANTS[variant]).to(getattr(torch, DTYPES[dtype]))
    module.save_pretrained(tmp_path / "a")
    assert run(tmp_path / "a", tmp_path / "b", "--to", "nvlabs") == 0
    (path,) = (tmp_path / "b").iterdir()
    exported = torch.load(path, weights_only=True)["state_dict"]
    assert torch_tensors(exported) == torch_tensors(nvlabs_state(module.state_dict()))

    odd = variant == "4K"  # the toy's has a grid of 8, which no published model has and no name tells
    assert path.name == ("sana.pth" if odd else "sana_512px.pth")
    told = [] if odd else ["--size", 512]
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # as in a command, where a warning is a line
        assert run(path, tmp_path / "c", "--cross-heads", 4, *told) == 0
    assert ("convert: warning: " in capsys.readouterr().err) == odd
    assert tensors(tmp_path / "c") == tensors(tmp_path / "a") == torch_tensors(module.state_dict())
    configs = [read_json(tmp_path / x / "config.json") for x in "ac"]
    different = {key for key in configs[0].keys() & configs[1].keys() if configs[0][key] != configs[1][key]}
    assert different == ({"sample_size", "interpolation_scale"} if odd else set())


def test_diffusers_own_converter_reads_our_export(tmp_path):
    """An independent reader of NVlabs' names, which wants two of the keys that no network uses."""
    import torch
    from diffusers.loaders.single_file_utils import convert_sana_transformer_to_diffusers

    module = make_transformer()
    module.save_pretrained(tmp_path / "a")
    assert run(tmp_path / "a", tmp_path / "b", "--to", "nvlabs") == 0
    state = torch.load(tmp_path / "b" / "sana_512px.pth", weights_only=True)["state_dict"]
    unused = {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)}
    back = convert_sana_transformer_to_diffusers(state | unused)
    assert torch_tensors(back) == torch_tensors(module.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_autoencoder_there_and_back(toy_folder, tmp_path, dtype):
    assert run(toy_folder / "vae", tmp_path / "a", "--dtype", dtype) == 0
    assert run(tmp_path / "a", tmp_path / "b", "--to", "efficientvit") == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]
    assert run(tmp_path / "b", tmp_path / "c") == 0
    assert tensors(tmp_path / "c") == tensors(tmp_path / "a")
    assert {kind for kind, _, _ in tensors(tmp_path / "b").values()} == {DTYPES[dtype]}
    if dtype == "fp32":
        assert tensors(tmp_path / "c") == tensors(toy_folder / "vae")
    assert read_json(tmp_path / "c" / "config.json")["scaling_factor"] == 0.41407


def test_what_was_read_left_out_and_written_is_said(tmp_path, capsys):
    import torch

    state = nvlabs_state(make_transformer(qk_norm="rms_norm_across_heads").to(torch.bfloat16).state_dict())
    extra = {"pos_embed": torch.zeros(1, 4, 64), "logvar_linear.weight": torch.zeros(1, 64)}
    torch.save({"state_dict": state | extra, "state_dict_ema": state, "epoch": 3}, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "b", "--cross-heads", "4") == 0
    out = capsys.readouterr().out.splitlines()
    written = tmp_path / "b" / "diffusion_pytorch_model.safetensors"
    assert out == [
        f"read: {tmp_path / 'a.pth'}: Sana, {len(state)} tensors of BF16, to bf16",
        "left out: pos_embed: a constant, computed for every size",
        "left out: logvar_linear.weight: a loss weight of Sprint's training",
        "left out: everything beside the weights: state_dict_ema, epoch",
        f"written: {tmp_path / 'b' / 'config.json'}, 0.0 MB",
        f"written: {written}, {written.stat().st_size / 1e6:.1f} MB",
    ]
    assert run(tmp_path / "a.pth", tmp_path / "c", "--cross-heads", "4", "--entry", "state_dict_ema", "--dtype", "fp32") == 0
    assert "to fp32" in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "c").dtypes == {"F32"}


def test_a_pipeline_and_its_parts(toy_folder, tmp_path):
    """A folder to a folder, and parts in three formats to a folder that diffusers reads."""
    import diffusers

    assert run(toy_folder, tmp_path / "a") == 0
    names = {"transformer": (), "vae": (), "text_encoder": ("model",)}
    for name in names:
        assert tensors(tmp_path / "a" / name) == tensors(toy_folder / name)
    assert load_pipeline(tmp_path / "a").flow_shift == 3.0

    assert run(toy_folder / "transformer", tmp_path / "t", "--to", "nvlabs") == 0
    assert run(toy_folder / "vae", tmp_path / "v", "--to", "efficientvit") == 0
    assert run(toy_folder / "text_encoder", tmp_path / "g", "--dtype", "bf16") == 0
    told = ["--dc-ae", tmp_path / "v", "--text", toy_folder, "--cross-heads", 4]
    assert run(tmp_path / "t" / "sana_512px.pth", tmp_path / "b", *told) == 0
    for name in names:
        assert tensors(tmp_path / "b" / name) == tensors(toy_folder / name)
    assert read_json(tmp_path / "b" / "sana_jax.json") == {"stack": "nvlabs"}, "where they came from is kept"
    diffusers.SanaPipeline.from_pretrained(tmp_path / "b")

    assert run(tmp_path / "b", tmp_path / "c", "--dtype", "fp16") == 0
    stored = [open_checkpoint(tmp_path / "c" / name).dtypes for name in names]
    assert stored == [{"F16"}, {"BF16"}, {"BF16"}], "float16 is not for the other two"
    assert run(tmp_path / "c", tmp_path / "d") == 0
    assert all(tensors(tmp_path / "d" / name) == tensors(tmp_path / "c" / name) for name in names)


def test_float16_parts_are_kept_as_stored(toy_folder, tmp_path):
    """Loaded, they would run in bfloat16; converted, they stay what they are."""
    from diffusers import AutoencoderDC

    AutoencoderDC.from_pretrained(toy_folder / "vae").half().save_pretrained(tmp_path / "vae")
    assert run(toy_folder, tmp_path / "a", "--dc-ae", tmp_path / "vae") == 0
    assert tensors(tmp_path / "a" / "vae") == tensors(tmp_path / "vae")
    assert load_pipeline(tmp_path / "a").dc_ae[0].param_dtype.__name__ == "bfloat16"


@pytest.mark.parametrize(
    "args, message",
    [
        (["{toy}", "{new}", "--to", "nvlabs"], r"to='nvlabs': {toy} \(pipeline\) can be written as diffusers; or convert its parts"),
        (["{toy}/transformer", "{new}", "--to", "efficientvit"], r"\(transformer\) can be written as diffusers or nvlabs$"),
        (["{toy}/vae", "{new}", "--to", "nvlabs"], r"\(autoencoder\) can be written as diffusers or efficientvit$"),
        (["{toy}/vae", "{new}", "--to", "nvlab"], "to='nvlab': must be one of .*did you mean 'nvlabs'"),
        (["{toy}/vae", "{new}", "--dtype", "bf61"], "dtype='bf61': must be one of auto, .*did you mean 'bf16'"),
        (["{toy}/vae", "{new}", "--text", "{toy}"], "is a DC-AE or a Gemma-2; dc_ae= and text= complete a transformer"),
        (["{toy}/vae", "{new}", "--size", "1024"], "sample_size=32, position_scale=None: .*vae is no transformer alone"),
        (["{toy}/transformer", "{new}", "--size", "1000"], "size=1000: must be one of 512, 1024, 2048, 4096"),
        (["{toy}/transformer", "{new}", "--cross-heads", "0"], "cross_heads=0: must be a positive integer or null"),
        (["{toy}/transformer", "{new}", "--dc-ae", "{toy}"], "a transformer alone needs text= too"),
        (["{toy}/tokenizer", "{new}"], "tokenizer: no weights"),
        (["{toy}/nothing", "{new}"], "nothing"),
        (["{toy}/vae", "{toy}"], "exists and is not an empty folder; nothing was written"),
        (["{toy}/vae", "{toy}/model_index.json"], "exists and is not an empty folder; nothing was written"),
        (["{toy}/vae", "{toy}/model_index.json/x"], "x: cannot be written"),
        (["{toy}/vae", "{new}", "--variant", "fp16"], "variants here: plain"),
    ],
)  # fmt: skip
def test_refusals(toy_folder, tmp_path, capsys, args, message):
    before = sorted(toy_folder.rglob("*"))
    assert run(*(arg.format(toy=toy_folder, new=tmp_path / "new") for arg in args)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("sana_jax.convert: error: ") and err.count("\n") == 1
    assert re.search(message.format(toy=toy_folder), err), err
    assert list(tmp_path.iterdir()) == [] and sorted(toy_folder.rglob("*")) == before


def test_other_tensors_are_not_recognised(tmp_path, capsys):
    from safetensors.numpy import save_file

    save_file({"down_blocks.0.weight": np.ones(3, "f")}, tmp_path / "unet.safetensors")
    assert run(tmp_path / "unet.safetensors", tmp_path / "new") == 2
    assert "neither a SANA transformer, a DC-AE, a Gemma-2 nor a pipeline; its tensors are down_blocks" in capsys.readouterr().err


def test_nothing_is_left_of_a_conversion_that_fails(toy_folder, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.saving, "write_safetensors", full)
    assert run(toy_folder / "vae", tmp_path / "deep" / "new") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not any(tmp_path.rglob("*.*")) and not (tmp_path / "deep" / "new").exists()


def test_a_nan_stops_it(toy_folder, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    state = load_file(toy_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    state["proj_out.bias"][3] = np.nan
    save_file(state, tmp_path / "a_1024px.safetensors")
    assert run(tmp_path / "a_1024px.safetensors", tmp_path / "new", "--cross-heads", "4") == 2
    assert "holds NaN or infinity\n  tensors (1):\n    proj_out.bias" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "sana_jax.convert"]
    for args, status, message in [
        (["--help"], 0, "usage: python -m sana_jax.convert"),
        ([], 2, "sana_jax.convert: error: the following arguments are required: SRC, DIR"),
        (["nothing.pth", str(tmp_path / "new")], 2, "sana_jax.convert: error: model='nothing.pth'"),
    ]:
        done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=120)
        assert done.returncode == status and message in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_a_disk_that_is_full_for_torch(toy_folder, tmp_path, capsys, monkeypatch):
    """torch.save calls it a RuntimeError."""
    import torch

    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmore")

    monkeypatch.setattr(torch, "save", full)
    assert run(toy_folder / "transformer", tmp_path / "new", "--to", "nvlabs", "--cross-heads", "4") == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and "unexpected pos" in error and not (tmp_path / "new").exists()


def test_a_pipeline_keeps_its_class_and_scheduler(toy_folder, tmp_path, recwarn):
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(toy_folder, source)
    index = json.loads((source / "model_index.json").read_text())
    index |= {"_class_name": "SanaPAGPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (source / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0, "num_train_timesteps": 1000}
    (source / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert run(source, target) == 0
    written = json.loads((target / "model_index.json").read_text())
    assert {key: written[key] for key in ("_class_name", "scheduler")} == {key: index[key] for key in ("_class_name", "scheduler")}
    assert json.loads((target / "scheduler" / "scheduler_config.json").read_text()) == config
