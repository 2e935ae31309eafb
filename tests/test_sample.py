"""sample.py: what it writes and prints, and that bad input ends in one line and status 2."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
import warnings

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

import sample
import sana_jax
from sana_jax import images
from sana_jax.checkpoints import write
from sana_jax.checkpoints.read import open_checkpoint
from sana_jax.errors import InputError, NonFiniteError

ROOT = pathlib.Path(sample.__file__).parent
PROMPT = "ein rotes Häuschen\nim 雪"
CACHE_OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(scope="module", autouse=True)
def compile_cache():
    """What sample.py sets for its whole process is set back here."""
    before = {name: getattr(jax.config, name) for name in CACHE_OPTIONS}
    compilation_cache.reset_cache()  # it may have been found disabled by now
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run(*arguments):
    """(status, stdout, stderr) of sample.py in this process."""
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.resetwarnings()  # as in a plain process
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            status = sample.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def model(toy_folder, tmp_path_factory):
    """The toy pipeline as a model of 64 x 64 pixels, for which no table of sizes is published."""
    folder = shutil.copytree(toy_folder, tmp_path_factory.mktemp("sample") / "toy")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"sample_size": 2}))
    return folder


def scaled(model, folder, component, name, factor):
    """A copy of the model with one tensor times `factor`."""
    shutil.copytree(model, folder)
    stems = ("diffusion_pytorch_model", "model")
    (file,) = (folder / component).glob("*.safetensors")
    tensors = dict(open_checkpoint(folder / component, stems).tensors())
    tensors[name] = tensors[name] * np.float32(factor)
    write.write_safetensors(folder / component, file.stem, tensors.items())
    return folder


@pytest.fixture(scope="module")
def happy(model, tmp_path_factory):
    base = tmp_path_factory.mktemp("happy")
    arguments = ["--model", model, "--prompt", PROMPT, "--negative-prompt", "blur", "--steps", 2, "--seed", 7]
    arguments += ["--output", base / "new" / "out", "--compile-cache", base / "cache"]
    status, out, err = run(*arguments, "--num-images", 2)
    assert (status, err) == (0, "")
    return types.SimpleNamespace(base=base, out=out, arguments=arguments, folder=base / "new" / "out")


@pytest.mark.parity
def test_pictures_and_what_is_printed(happy, model):
    lines = happy.out.splitlines()
    assert lines[0] == "device: cpu (cpu), float32, stack diffusers"
    assert re.fullmatch(rf"model: {re.escape(str(model))}, loaded in \d+\.\d s", lines[1])
    assert re.fullmatch(r"instruction: installed diffusers \S+", lines[2])
    compiled, total = map(float, re.fullmatch(r"compile: (\d+\.\d) s, total: (\d+\.\d) s", lines[3]).groups())
    assert 0 < compiled < total
    paths = [happy.folder / "00000_7.png", happy.folder / "00001_7.png"]
    assert lines[4:] == [str(p) for p in paths]
    assert sorted(happy.folder.iterdir()) == paths
    pictures = [np.asarray(Image.open(p)) for p in paths]
    for picture in pictures:
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and picture.std() > 10
    assert (pictures[0] != pictures[1]).mean() > 0.5, "each image has its own noise"


@pytest.mark.parity
def test_every_picture_holds_its_recipe(happy, model):
    with Image.open(happy.folder / "00001_7.png") as picture:
        text, record = picture.text["parameters"], json.loads(picture.text["sana_jax"])
    assert record == images.read_record(happy.folder / "00001_7.png")
    version = sana_jax.__version__
    assert text == (
        f"{PROMPT}\nNegative prompt: blur\nSteps: 2, Sampler: flow-dpm-solver, CFG scale: 4.5, Seed: 7, "
        f"Size: 64x64, Model: toy, Version: sana_jax {version}"
    )
    instruction = sana_jax.load_pipeline(model).instruction()
    assert record.pop("versions") == {"sana_jax": version, "jax": jax.__version__, "python": sys.version.split()[0]}
    assert record == {
        "prompt": PROMPT, "negative_prompt": "blur", "steps": 2, "guidance_scale": 4.5, "seed": 7, "image": 1,
        "height": 64, "width": 64, "sampler": "flow-dpm-solver", "max_sequence_length": 300, "model": str(model),
        "stack": "diffusers", "dtype": "float32", "flow_shift": 3.0, "chi_source": instruction.source,
        "chi_sha256": hashlib.sha256(instruction.text.encode()).hexdigest(), "device": "cpu",
    }  # fmt: skip


@pytest.mark.parity
def test_a_process_of_its_own_compiles_nothing_anew(happy):
    """The same command again: the same picture, the next number, from the programs kept before."""
    cache = happy.base / "cache"
    assert cache.stat().st_mode & 0o777 == 0o700
    kept = {p.name for p in cache.iterdir() if not p.name.endswith("-atime")}
    assert len(kept) >= 2, "text and picture"
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", *map(str, happy.arguments)],
        env=os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},  # as conftest has it
        cwd=happy.base, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert {p.name for p in cache.iterdir() if not p.name.endswith("-atime")} == kept
    path = happy.folder / "00002_7.png"
    assert done.stdout.splitlines()[-1] == str(path)
    np.testing.assert_array_equal(Image.open(path), Image.open(happy.folder / "00000_7.png"))


def refused(monkeypatch, tmp_path, *arguments, lines=1):
    """The message of a run that fails and leaves nothing in its folder."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*arguments)
    assert status == 2
    assert err.startswith("sample.py: error: ") and err.endswith("\n")
    assert lines is None or err.count("\n") == lines, err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
    return err.removeprefix("sample.py: error: ").rstrip("\n")


def never(*_, **__):
    raise AssertionError("a model was loaded for a request that is wrong by itself")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "prompt: give it once, as the only word without a flag or with --prompt"),
        ("cat --prompt dog --model .", "prompt: give it once"),
        ("cat", "model: none given and none is bundled yet; pass --model with a folder in diffusers layout"),
        ("cat --model", "argument --model: expected one argument"),
        ("cat dog --model .", "unrecognized arguments: dog"),
        ("cat --model . --step 3", "unrecognized arguments: --step 3; did you mean --steps?"),
        ("cat --model . --sed=3", "unrecognized arguments: --sed=3; did you mean --seed?"),
        ("cat --model . --steps few", "argument --steps: invalid int value: 'few'"),
        ("cat --model . --steps 0", "steps=0: must be an int in [1, 1000]; nearest valid 1"),
        ("cat --model . --guidance-scale -1", "guidance_scale=-1.0: must be a number in [0, 100]; nearest valid 0"),
        ("cat --model . --guidance-scale nan", "guidance_scale=nan: must be a number in [0, 100]"),
        ("cat --model . --seed -1", "seed=-1: must be an int in [0, 4294967295]; nearest valid 0"),
        ("cat --model . --num-images 0", "num_images=0: must be an int in [1, 4096]; nearest valid 1"),
        ("cat --model . --height 0", "height=0: must be in [1, 8192]; nearest valid 32"),
        ("cat --model . --height -64", "height=-64: must be in [1, 8192]; nearest valid 32"),
        ("cat --model . --width 100000", "width=100000: must be in [1, 8192]; nearest valid 8192"),
        ("cat --model . --width 64.5", "argument --width: invalid int value: '64.5'"),
        ("cat --model . --max-sequence-length 1", "max_sequence_length=1: must be an int in [2, 4096]; nearest"),
        ("cat --model . --sampler flow-eular", "sampler='flow-eular': must be one of 'flow-dpm-solver', 'flow-eu"),
        ("cat --model . --dtype bf61", "dtype='bf61': must be one of auto, float32, fp32, bfloat16, bf16, fl"),
        ("cat --model . --stack nvlab", "stack='nvlab': must be one of 'auto', 'diffusers', 'nvlabs'; did you me"),
        ("cat --model . --chi absent.txt", "absent.txt: cannot be read (No such file or directory)"),
        ("cat --model . --chi latin.txt", "latin.txt: must be UTF-8"),
        ("cat --model . --output cat.jpg", "output='cat.jpg': must end in .png, or be a folder"),
        ("cat --model . --output latin.txt/cat.png", "output='latin.txt/cat.png': cannot be written (Not a dir"),
        ("cat --model . --output latin.txt/folder", "output='latin.txt/folder': cannot be written (Not a dir"),
    ],
)  # fmt: skip
def test_wrong_by_itself(monkeypatch, tmp_path, arguments, message):
    (tmp_path / "latin.txt").write_bytes("Häuschen".encode("latin-1"))
    monkeypatch.setattr(sana_jax, "load_pipeline", never)
    assert refused(monkeypatch, tmp_path, *arguments.split()).startswith(message)


def test_odd_arguments_end_in_one_line_too(monkeypatch, tmp_path):
    monkeypatch.setattr(sana_jax, "load_pipeline", never)
    assert refused(monkeypatch, tmp_path, "cat", "").startswith("unrecognized arguments:")
    assert "did you mean" not in refused(monkeypatch, tmp_path, "cat", "two\nlines")


def test_models_that_are_none(monkeypatch, tmp_path):
    def message(model):
        return refused(monkeypatch, tmp_path, "cat", "--model", model, "--output", "new/cat.png", "--compile-cache", "none")

    assert "has no model_index.json, is not a pipeline in diffusers layout" in message(tmp_path)
    assert "must be a folder in diffusers layout, or a Hugging Face id (owner/name)" in message("no/such/folder")
    assert "model='nobody/nothing': not a local folder, and the download failed: " in message("nobody/nothing")


@pytest.mark.parity
def test_weights_that_do_not_fit(monkeypatch, tmp_path, model):
    def message(folder, lines=1):
        return refused(monkeypatch, tmp_path, "cat", "--model", folder, "--compile-cache", "none", lines=lines)

    name = "decoder.up_blocks.2.1.conv1.bias"
    folder = scaled(model, tmp_path / "nan", "vae", name, np.nan)
    assert message(folder, 3).splitlines() == [f"{folder / 'vae'} holds NaN or infinity", "  tensors (1):", f"    {name}"]
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert message(folder).startswith(f"{file}: not readable as safetensors")
    shutil.copy(folder / "vae" / file.name, file)
    text = message(folder, None)
    assert "  missing (" in text and "  not part of this model (" in text
    assert message(model / "vae").endswith("this is a component folder")


OVERFLOWS = {
    "transformer": (
        "transformer_blocks.1.attn1.to_out.0.weight", 3e38,
        r"transformer: step 0, blocks/1 is not finite in float32; largest finite activation before it \d\S*; "
        "the dtype may be too small for this checkpoint: try bfloat16 or float32",
    ),
    "vae": (
        "decoder.up_blocks.2.1.conv1.weight", 3e38,
        "autoencoder: decoder/stage_2/block_0/conv_1 is not finite in float32; the dtype .*",
    ),
    "text_encoder": (
        "layers.1.self_attn.v_proj.weight", 3e38,
        "text encoder: layers/1 is not finite in float32; the dtype .*",
    ),
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("component", OVERFLOWS)
def test_overflow_names_its_place_and_paints_nothing(monkeypatch, tmp_path, model, component):
    """Weights that are finite, in a network whose activations are not: never a black picture."""
    name, factor, message = OVERFLOWS[component]
    folder = scaled(model, tmp_path / "model", component, name, factor)
    arguments = ["--model", folder, "--steps", 2, "--compile-cache", "none", "--output", "new/cat.png"]
    monkeypatch.chdir(tmp_path)
    status, _, err = run("cat", *arguments)
    assert status == 2 and re.fullmatch(f"sample.py: error: {message}\n", err), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
