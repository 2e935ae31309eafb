"""`python -m sana_jax.parity` on toy folders: they agree, and a wrong tensor is named by its line."""

import contextlib
import io
import json
import re
import shutil
import weakref

import numpy as np
import pytest
from PIL import Image

from sana_jax.parity import case as cases
from sana_jax.parity import peers
from sana_jax.parity.__main__ import main

pytestmark = pytest.mark.parity
SMALL = ("--size", "96x64", "--steps", "2")


def make_light_dc_ae():
    """Attention in one stage of six: the others cost most of the time to compile."""
    from tests.toy_pipeline import make_dc_ae

    kinds, scales = ["ResBlock"] * 5 + ["EfficientViTBlock"], [[]] * 5 + [[5]]
    sides = ({f"{side}_block_types": kinds, f"{side}_qkv_multiscales": scales} for side in ("encoder", "decoder"))
    return make_dc_ae(**{key: value for side in sides for key, value in side.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from diffusers import SanaPipeline

    from tests.toy_pipeline import make_pipeline

    folder = tmp_path_factory.mktemp("parity") / "pipeline"
    SanaPipeline(**make_pipeline().components | {"vae": make_light_dc_ae()}).save_pretrained(folder)
    return folder


def run(*arguments):
    """(exit status, {line: whether it is ok}, page) of the command."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page):
        status = main([str(a) for a in arguments])
    lines = re.findall(r"^\| (.*?) \|.*\| (ok|ok, widened|FAILS) \|$", page.getvalue(), re.MULTILINE)
    return status, {name: verdict != "FAILS" for name, verdict in lines}, page.getvalue()


def failing(lines):
    return [name for name, ok in lines.items() if not ok]


def failing_outputs(lines):
    return [name for name in failing(lines) if "weights" not in name]


def copy_with(source, target, part, change):
    """A copy of a pipeline folder in which `change` was let loose on the tensors of one part."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    (file,) = (target / part).glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return target


def altered(source, target, part, name, scaled=False):
    """A copy of a pipeline folder with one tensor off by a per cent, `scaled` or at random."""

    def change(tensors):
        noise = 1 if scaled else np.random.default_rng(0).normal(size=tensors[name].shape)
        return tensors | {name: (tensors[name] * (1 + 0.01 * noise)).astype(tensors[name].dtype)}

    return copy_with(source, target, part, change)


def test_a_folder_agrees_with_itself_part_by_part(folder, tmp_path, monkeypatch):
    modules, at_once = [], []
    load_theirs, load_ours = peers.load, cases.Case.load

    def watched_theirs(*args):
        at_once.append(sum(module() is not None for module in modules))
        module = load_theirs(*args)
        modules.append(weakref.ref(module))
        return module

    def watched_ours(*args):
        at_once.append(sum(module() is not None for module in modules))
        return load_ours(*args)

    monkeypatch.setattr(peers, "load", watched_theirs)
    monkeypatch.setattr(cases.Case, "load", watched_ours)
    status, lines, page = run(folder, *SMALL, "--output", tmp_path / "out", "--prompt", "a Red cat")
    assert status == 0 and failing(lines) == []
    assert at_once == [0] * 6  # three parts, each on one side at a time
    for line in (
        "Gemma-2 weights, 24 tensors", "DiT weights, 73 tensors", "DC-AE weights, 110 tensors",
        "token ids that differ, null prompt", "Gemma-2 layer 1", "text states, prompt with instruction",
        "DiT caption embedding", "DiT block 2", "DiT head", "DiT, t = 999", "DiT, t = 499", "DiT, t = 136",
        "DC-AE encoder stage 0", "DC-AE decoder stage 5", "DC-AE encode", "DC-AE decode",
        "Flow-DPM-Solver, 2 steps, against float64",
        "Flow-DPM-Solver, 2 steps, against DPMSolverMultistepScheduler",
        "pipeline, 2 steps, latent", "pipeline, 2 steps, image",
    ):  # fmt: skip
        assert line in lines
    assert page.rstrip().endswith(f"PARITY: ok, {len(lines)} lines")
    assert re.search(r"^\| DiT block 0 \| \d\S* \| \d\S* \| \S+ \| \d\S* \|  \|$", page, re.MULTILINE)

    assert (tmp_path / "out" / "parity.md").read_text() == page[:-1]
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["ok"] and report["prompt"] == "a Red cat" and len(report["float32"]) == len(lines)
    assert len({row["error"] for row in report["float32"]}) > 20  # two programs, not one twice
    assert {r["name"] for r in report["activations"]} >= {"Gemma-2 layer 0", "DiT block 1", "DC-AE encoder stage 3"}
    for activations in report["activations"]:
        assert activations["theirs"] == pytest.approx(activations["ours"], rel=1e-4)
    picture = np.asarray(Image.open(tmp_path / "out" / "side_by_side.png"))
    assert picture.shape == (64 + 18, 3 * 96, 3)
    assert picture[18:, :96].std() > 10 and np.abs(picture[18:, :96] - picture[18:, 96:192].astype(int)).max() <= 1


@pytest.mark.parametrize(
    "rung, part, name, line",
    [
        ("gemma", "text_encoder", "layers.1.mlp.up_proj.weight", "Gemma-2 layer 1"),
        ("block", "transformer", "transformer_blocks.1.attn1.to_q.weight", "DiT block 1"),
        ("block", "transformer", "transformer_blocks.2.attn2.to_k.weight", "DiT block 2"),
        ("block", "transformer", "transformer_blocks.0.ff.conv_depth.weight", "DiT block 0"),
        ("block", "transformer", "caption_projection.linear_2.weight", "DiT caption embedding"),
        ("dc-ae", "vae", "encoder.down_blocks.5.0.attn.to_k.weight", "DC-AE encoder stage 5"),
        ("dc-ae", "vae", "decoder.up_blocks.2.0.conv.weight", "DC-AE decoder stage 2"),
        ("dc-ae", "vae", "decoder.norm_out.weight", "DC-AE decoder output"),
    ],
)
def test_a_tensor_that_is_off_by_a_per_cent_is_named(folder, tmp_path, rung, part, name, line):
    model = altered(folder, tmp_path / "altered", part, name)
    status, lines, page = run(model, "--reference", folder, "--only", rung, *SMALL)
    assert status == 1
    whole = [n for n in lines if n.startswith("text states") or n in ("DC-AE encode", "DC-AE decode")]
    assert [n for n in failing_outputs(lines) if n not in whole] == [line]
    assert f"first: {line} weights" in page.splitlines()[-2]
    assert bool(whole) == bool([n for n in failing(lines) if n in whole])  # and the part as a whole


@pytest.mark.parametrize(
    "rung, part, name, line",
    [
        ("gemma", "text_encoder", "layers.0.mlp.up_proj.weight", "Gemma-2 layer 0"),
        ("dit", "transformer", "transformer_blocks.1.attn2.to_k.bias", "DiT block 1"),
        ("dc-ae", "vae", "decoder.up_blocks.0.1.conv1.bias", "DC-AE decoder stage 0"),
    ],
)
def test_a_tensor_that_no_output_need_show_is_named(folder, tmp_path, rung, part, name, line):
    model = altered(folder, tmp_path / "altered", part, name, scaled=True)
    status, lines, page = run(model, "--reference", folder, "--only", rung, *SMALL)
    assert status == 1 and f"first: {line} weights, then: " in page.splitlines()[-2]
    words = {"text_encoder": "Gemma-2", "transformer": "DiT", "vae": "DC-AE"}[part]
    assert [n.rpartition(", ")[0] or n for n in failing(lines) if "weights" in n] == [f"{line} weights", f"{words} weights"]


def test_large_activations_hide_nothing(folder, tmp_path):
    """One channel of 6e4, in a float16 file: the page says so, and a block that is off is still seen."""

    def one_channel_is_large(tensors):
        bias, weight = tensors["patch_embed.proj.bias"], tensors["patch_embed.proj.weight"]
        bias[5], weight[5] = 65000, 1000 * weight[5]
        return {name: tensor.astype(np.float16) for name, tensor in tensors.items()}

    large = copy_with(folder, tmp_path / "large", "transformer", one_channel_is_large)
    status, lines, page = run(large, "--only", "block,dit", *SMALL)
    assert status == 0, page
    assert page.count("| beyond float16 |") == 3 and "diffusers clips what self-attention hands on" in page
    model = altered(large, tmp_path / "altered", "transformer", "transformer_blocks.2.ff.conv_point.weight")
    status, lines, page = run(model, "--reference", large, "--only", "block", *SMALL)
    assert status == 1 and failing_outputs(lines) == ["DiT block 2"]


def test_a_scheduler_with_another_shift_is_named(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "altered")
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"flow_shift": 3.0', '"flow_shift": 3.03'))
    status, lines, _ = run(model, "--reference", folder, "--only", "solver")
    assert status == 1
    assert failing(lines) == ["Flow-DPM-Solver, 20 steps, against DPMSolverMultistepScheduler"]


def test_an_euler_folder(folder, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    model = shutil.copytree(folder, tmp_path / "euler")
    shutil.rmtree(model / "scheduler")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(model / "scheduler")
    status, lines, page = run(model, "--only", "solver,pipeline", *SMALL)
    assert status == 0, page
    assert "Flow-Euler, 2 steps, against FlowMatchEulerDiscreteScheduler" in lines


def test_a_sprint_folder(tmp_path):
    from diffusers import SanaSprintPipeline

    from tests.toy_pipeline import make_sprint_pipeline

    parts = make_sprint_pipeline().components | {"vae": make_light_dc_ae()}
    SanaSprintPipeline(**parts).save_pretrained(tmp_path / "sprint")
    status, lines, page = run(tmp_path / "sprint", "--only", "dit,solver,pipeline", "--size", "96x64")
    assert status == 0, page
    for line in ("DiT, t = 1", "DiT, t = 0.5", "SCM, 2 steps, against SCMScheduler", "pipeline, 2 steps, image"):
        assert lines[line]
    name = "time_embed.guidance_embedder.linear_2.weight"
    model = altered(tmp_path / "sprint", tmp_path / "altered", "transformer", name)
    status, lines, page = run(model, "--reference", tmp_path / "sprint", "--only", "block,pipeline", "--size", "96x64")
    assert status == 1 and "first: DiT time embedding" in page
    assert failing(lines)[-2:] == ["pipeline, 2 steps, latent", "pipeline, 2 steps, image"]


def test_bfloat16_lines(folder):
    status, lines, page = run(folder, "--only", "gemma,dit,dc-ae", "--dtype", "bf16", *SMALL)
    found = re.findall(r"^\| (.*) \| \S+ \| \S+ \| ([\d.]+) \| ok \|$", page.partition("## bfloat16")[2], re.MULTILINE)
    assert [name for name, _ in found] == ["text states, prompt with instruction", "DiT", "DC-AE encode", "DC-AE decode"]
    assert all(0.3 < float(ratio) <= 1.2 for _, ratio in found)
    assert status == 0
