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
from sana_jax import compile_cache as programs_cache
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
        warnings.resetwarnings()  # as in a plain process, but each time
        warnings.simplefilter("always")
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
    jax.clear_caches()  # programs that other tests left in memory would not reach the folder
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


def programs(cache):
    return {path.name for path in cache.glob("jit_*_program-*-cache")}


@pytest.mark.parity
def test_a_process_of_its_own_compiles_nothing_anew(happy):
    """The same command again: the same picture, the next number, from the programs kept before."""
    cache = happy.base / "cache"
    assert cache.stat().st_mode & 0o777 == 0o700
    kept = programs(cache)
    assert {name.rsplit("-", 2)[0] for name in kept} == {"jit_prefix_program", "jit_text_program", "jit_paint_program"}
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", *map(str, happy.arguments)],
        env=os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},  # as conftest has it
        cwd=happy.base, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert programs(cache) == kept
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


@pytest.fixture
def painter(monkeypatch, tmp_path):
    """Calls of `generate`, which gives a grey picture; what is in `raises` comes after the first."""
    painter = types.SimpleNamespace(calls=[], raises=None)

    def generate(self, prompts, **arguments):
        painter.calls.append((prompts, arguments))
        warnings.warn("prompts[0] is too long", stacklevel=1)
        if painter.raises and len(painter.calls) > 1:
            raise painter.raises
        return np.full((1, 64, 96, 3), 128, np.uint8)

    monkeypatch.setattr(sana_jax.Pipeline, "generate", generate)
    monkeypatch.chdir(tmp_path)
    return painter


@pytest.mark.parity
def test_flags_reach_the_pipeline(painter, model):
    pathlib.Path("chi.txt").write_bytes("Say é: \n".encode())
    flags = (
        "--negative-prompt dog --steps 3 --guidance-scale 1.5 --seed 9 --height 64 --width 96 --num-images 2 "
        "--sampler flow-euler --dtype bf16 --stack nvlabs --chi chi.txt --max-sequence-length 77 --output new/a.png"
    )
    status, out, err = run("cat", "--model", model, "--compile-cache", "none", *flags.split())
    assert (status, err) == (0, "sample.py: warning: prompts[0] is too long\n")
    assert out.splitlines()[0] == "device: cpu (cpu), bfloat16, stack nvlabs"
    assert out.splitlines()[2] == "instruction: file chi.txt"
    given = dict(steps=3, guidance_scale=1.5, seed=9, height=64, width=96, sampler="flow-euler", max_sequence_length=77)
    given |= dict(negative_prompts="dog", chi="Say é: \n")
    assert painter.calls == [("cat", given | {"first_image": i}) for i in (0, 1)]
    record = images.read_record("new/a-1.png")
    assert (record["chi_source"], record["dtype"]) == ("file chi.txt", "bfloat16")
    assert record["chi_sha256"] == hashlib.sha256(pathlib.Path("chi.txt").read_bytes()).hexdigest()
    assert run("cat", "--model", model, "--chi", "none", "--output", "b.png", "--compile-cache", "none")[0] == 0
    assert images.read_record("b.png")["chi_sha256"] == hashlib.sha256(b"").hexdigest()


@pytest.mark.parity
@pytest.mark.parametrize("error", [NonFiniteError("blocks/3"), InputError("output: disk full")])
def test_pictures_before_an_error_are_whole(painter, model, error):
    painter.raises = error
    status, _, err = run("cat", "--model", model, "--num-images", 3, "--output", "out", "--compile-cache", "none")
    assert status == 2 and err.splitlines()[-1] == f"sample.py: error: {error}"
    assert [p.name for p in pathlib.Path("out").iterdir()] == ["00000_0.png"]


def test_a_cache_that_others_can_write_is_not_used(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").touch()
    for name, reason in {"open": "others may write to it", "file": "File exists"}.items():
        problem = programs_cache.keep_programs(tmp_path / name)
        assert problem == f"no compile cache in {tmp_path / name}: {reason}"
    assert programs_cache.keep_programs("none") is None
    assert jax.config.jax_compilation_cache_dir == before
