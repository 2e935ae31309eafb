"""sample.py: what it writes and prints, and that weights which do not fit end in one line."""

import hashlib
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
import jaxlib
import numpy as np
import pytest
from PIL import Image

import sample
import sana_jax
from sana_jax import compile_cache as programs_cache
from sana_jax import images
from sana_jax.checkpoints import write
from sana_jax.checkpoints.read import open_checkpoint
from sana_jax.cli import painting, records
from sana_jax.errors import InputError, NonFiniteError
from sana_jax.hub import fingerprints
from tests import sample_runs
from tests.sample_runs import refused, run

compile_cache, model, painter = sample_runs.compile_cache, sample_runs.model, sample_runs.painter

ROOT = pathlib.Path(sample.__file__).parent
PROMPT = "ein rotes Häuschen\nim 雪"


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
    sha256 = fingerprints.model_sha256(model)
    assert re.fullmatch(rf"model: {re.escape(str(model))} \(sha256 {sha256[:10]}\), loaded in \d+\.\d s", lines[1])
    assert re.fullmatch(r"instruction: installed diffusers \S+", lines[2])
    assert lines[3] == "painting: 2 of 64 x 64, flow-dpm-solver, 2 steps, guidance 4.5, seed 7"
    paths = [happy.folder / "00000_7.png", happy.folder / "00001_7.png"]
    assert lines[4:6] == [str(p) for p in paths]
    found = re.fullmatch(r"compile: (\d+\.\d) s, (\d+\.\d\d) s per image, total: (\d+\.\d) s", lines[6])
    compiled, each, total = map(float, found.groups())
    assert 0 < compiled < total and each < total and lines[7:] == []
    assert sorted(happy.folder.iterdir()) == paths
    pictures = [np.asarray(Image.open(p)) for p in paths]
    for picture in pictures:
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and picture.std() > 10
    assert (pictures[0] != pictures[1]).mean() > 0.5, "each image has its own noise"


@pytest.mark.parity
def test_every_picture_holds_its_recipe(happy, model):
    with Image.open(happy.folder / "00001_7.png") as picture:
        text, record = picture.text["parameters"], json.loads(picture.text["sana_jax"])
    version, sha256 = sana_jax.__version__, fingerprints.model_sha256(model)
    assert text == (
        f"{PROMPT}\nNegative prompt: blur\nSteps: 2, Sampler: flow-dpm-solver, CFG scale: 4.5, Seed: 7, "
        f"Size: 64x64, Model hash: {sha256[:10]}, Model: toy, Version: sana_jax {version}"
    )
    instruction = sana_jax.load_pipeline(model).instruction()
    assert record.pop("versions") == {
        "sana_jax": version, "jax": jax.__version__, "jaxlib": jaxlib.__version__, "python": sys.version.split()[0]
    }  # fmt: skip
    assert 0 < record.pop("seconds") < 60
    loading = {"model": str(model), "revision": None, "variant": None, "dc_ae": None, "text": None}
    assert record == {
        "format": 1, "prompt": PROMPT, "negative_prompt": "blur", "steps": 2, "guidance_scale": 4.5, "seed": 7,
        "index": 1, "height": 64, "width": 64, "sampler": "flow-dpm-solver", "max_sequence_length": 300,
        "guidance_interval": [0, 1], "flow_shift": 3.0, "pag_scale": 0, "pag_layers": None, "pag_adaptive_scale": 0,
        "init_image": None, "init_image_sha256": None, "strength": None, "model_sha256": sha256,
        "chi_sha256": hashlib.sha256(instruction.text.encode()).hexdigest(), "stack": "diffusers", "dtype": "float32",
        "device": "cpu", "loading": loading | {"dtype": "auto", "stack": "auto", "kernels": "auto", "chi": "auto"},
        "batch": {"position": 0, "prompts": [PROMPT], "negative_prompts": ["blur"], "indices": [1]},
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
    assert done.stdout.splitlines()[-2] == str(path)
    np.testing.assert_array_equal(Image.open(path), Image.open(happy.folder / "00000_7.png"))


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
    assert "component folder" in message(model / "vae")


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
    assert status == 1 and re.fullmatch(f"sample.py: error: {message}\n", err), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


CALL = {  # arguments of `generate` where no flag says otherwise
    "seed": 0, "height": 64, "width": 64, "steps": 20, "sampler": "flow-dpm-solver", "guidance_scale": 4.5,
    "flow_shift": 3.0, "pag_scale": 0, "pag_layers": None, "pag_adaptive_scale": 0, "max_sequence_length": 300,
    "guidance_interval": (0, 1), "num_images": 1, "first_image": [0], "negative_prompts": [""], "chi": "auto",
}  # fmt: skip


@pytest.mark.parity
def test_flags_reach_the_pipeline(painter, model):
    painter.before = lambda number: warnings.warn("prompts[0] is too long", stacklevel=1)
    pathlib.Path("chi.txt").write_bytes("Say é: \n".encode())
    flags = (
        "--negative-prompt dog --steps 3 --guidance-scale 1.5 --seed 9 --height 64 --width 96 --num-images 3 "
        "--sampler flow-euler --dtype bf16 --stack nvlabs --chi chi.txt --max-sequence-length 77 --flow-shift 2.5 "
        "--pag-scale 1.5 --pag-layers 0,2 --pag-adaptive-scale 0.25 --guidance-interval 0.25 0.75 --batch-size 2 "
        "--output new/a.png"
    )
    status, out, err = run("cat", "--model", model, "--compile-cache", "none", *flags.split())
    assert (status, err) == (0, "sample.py: warning: prompts[0] is too long\n")
    assert out.splitlines()[0] == "device: cpu (cpu), bfloat16, stack nvlabs"
    assert out.splitlines()[2:4] == [
        f"instruction: file {pathlib.Path('chi.txt').absolute()}",
        "painting: 3 of 96 x 64, flow-euler, 3 steps, guidance 1.5, perturbed attention 1.5, seed 9",
    ]
    given = CALL | dict(steps=3, guidance_scale=1.5, seed=9, width=96, sampler="flow-euler", max_sequence_length=77)
    given |= dict(negative_prompts=["dog"], chi="Say é: \n", flow_shift=2.5, guidance_interval=(0.25, 0.75))
    given |= dict(pag_scale=1.5, pag_layers=[0, 2], pag_adaptive_scale=0.25)
    assert painter.calls == [
        (["cat"], given | {"num_images": 2, "first_image": [0, 1]}), (["cat"], given | {"first_image": [2]}),
    ]  # fmt: skip
    recipe, _ = records.read("new/a-1.png")
    assert recipe.identity["chi_sha256"] == hashlib.sha256(pathlib.Path("chi.txt").read_bytes()).hexdigest()
    chi = str(pathlib.Path("chi.txt").absolute())
    assert (recipe.loading["chi"], recipe.identity["dtype"], recipe.batch["position"]) == (chi, "bfloat16", 1)
    assert run("cat", "--model", model, "--chi", "none", "--output", "b.png", "--compile-cache", "none")[0] == 0
    assert records.read("b.png")[0].identity["chi_sha256"] == hashlib.sha256(b"").hexdigest()
    assert painter.calls[-1] == (["cat"], CALL | {"chi": "none"})


@pytest.mark.parity
def test_sizes_in_other_words(painter, model, toy_folder):
    def sizes(*flags, model=model):
        assert run("cat", "--model", model, "--compile-cache", "none", "-o", "a.png", *flags)[0] == 0
        return painter.calls[-1][1]["width"], painter.calls[-1][1]["height"]

    assert sizes("--size", "96x64") == (96, 64)
    assert sizes("--image-size", "32") == (32, 32)
    assert sizes("--width", "32") == (32, 64)
    assert sizes("--ar", "2:1") == (96, 64), "no table of sizes: as many pixels or a little more"
    # The published sizes of a 512 px model: 288 x 512 is no entry, 0.57 is the nearest ratio.
    assert sizes("--ar", "16:9", model=toy_folder) == (672, 384)
    assert sizes("--ar", "9:16", model=toy_folder) == (384, 672)


@pytest.mark.parity
def test_pictures_before_an_error_are_whole(painter, model):
    def full_disk(number):
        if number > 1:
            raise InputError("output: disk full")

    painter.before = full_disk
    status, _, err = run("cat", "--model", model, "--num-images", 3, "--output", "out", "--compile-cache", "none")
    assert (status, err) == (2, "sample.py: error: output: disk full\n")
    assert [p.name for p in pathlib.Path("out").iterdir()] == ["00000_0.png"]


@pytest.mark.parity
def test_one_bad_picture_fails_alone(painter, model):
    """Of a batch that is not finite each is painted by itself; the bad one is named."""

    def overflow(number):
        if number in (1, 3):  # the batch of three, and then its second picture
            raise NonFiniteError("blocks/3")

    painter.before = overflow
    arguments = ["--num-images", 3, "--batch-size", 3, "--output", "out", "--compile-cache", "none"]
    status, _, err = run("cat", "--model", model, *arguments)
    assert (status, err) == (1, f"sample.py: error: {pathlib.Path('out/00001_0.png')}: blocks/3\n")
    assert sorted(p.name for p in pathlib.Path("out").iterdir()) == ["00000_0.png", "00002_0.png"]
    assert [arguments["first_image"] for _, arguments in painter.calls] == [[0, 1, 2], [0], [1], [2]]
    assert records.read("out/00002_0.png")[0].batch["indices"] == [2]


def exhausted(number):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.\nMore lines.")


@pytest.mark.parity
def test_a_batch_that_memory_does_not_hold_is_painted_one_by_one(painter, model):
    painter.before = lambda number: exhausted(number) if number in (1, 3) else None
    arguments = ["--num-images", 3, "--batch-size", 3, "--output", "out", "--compile-cache", "none"]
    status, _, err = run("cat", "--model", model, *arguments)
    batch, alone = (f"out of memory for a batch of {n} of 64 x 64 in float32; try a smaller " for n in (3, 1))
    assert (status, err.splitlines()) == (1, [
        f"sample.py: warning: {batch}--batch-size or a smaller --size or --dtype bf16; its pictures are painted one by one",
        f"sample.py: error: out/00001_0.png: {alone}--size or --dtype bf16",
    ])  # fmt: skip
    assert sorted(p.name for p in pathlib.Path("out").iterdir()) == ["00000_0.png", "00002_0.png"]
    assert [arguments["first_image"] for _, arguments in painter.calls] == [[0, 1, 2], [0], [1], [2]]


@pytest.mark.parity
def test_one_picture_that_memory_does_not_hold(painter, model):
    painter.before = exhausted
    status, _, err = run("cat", "--model", model, "--dtype", "bf16", "-o", "a.png", "--compile-cache", "none")
    assert (status, err) == (1, "sample.py: error: out of memory for a batch of 1 of 64 x 64 in bfloat16; try a smaller --size\n")

    def broken(number):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    painter.before = broken
    with pytest.raises(jax.errors.JaxRuntimeError, match="the device is gone"):
        run("cat", "--model", model, "-o", "a.png", "--compile-cache", "none")


@pytest.mark.parity
def test_two_runs_at_once_lose_no_picture(painter, model):
    """The second one begins, and ends, between the first one's choice of numbers and its pictures."""
    arguments = ["--model", model, "--output", "out", "--compile-cache", "none", "-n", 2, "--grid", "seed=0"]
    others = []

    def meanwhile(number):
        painter.before = lambda number: None
        others.append(run("two", *arguments))

    painter.before = meanwhile
    status, out, err = run("one", *arguments)
    (other,) = others
    assert (status, err, other[0], other[2]) == (0, "", 0, "")
    names = [[pathlib.Path(line).name for line in lines.splitlines() if line.startswith("out/")] for lines in (other[1], out)]
    assert names[0] == ["00000_0_seed=0.png", "00001_0_seed=0.png", "00002_0_grid.png"]
    assert len(names[1]) == 3 and sorted(sum(names, [])) == sorted(p.name for p in pathlib.Path("out").iterdir())
    assert not set(names[0]) & set(names[1]), "nothing was overwritten"
    for number, prompt in enumerate(["two", "one"]):
        assert [records.read(f"out/{name}")[0].settings["prompt"] for name in names[number][:2]] == [prompt] * 2
        assert json.loads(images.read_texts(f"out/{names[number][2]}", ("sana_jax_sheet",))["sana_jax_sheet"])["pictures"] == names[number][:2]


@pytest.mark.parity
def test_local_paths_are_recorded_from_the_root(painter, model, monkeypatch):
    """A relative one, read in another folder, would be looked for on the hub."""
    shutil.copytree(model, "models/toy")
    assert run("cat", "--model", "models/toy", "--text", "models/toy", "-o", "a.png", "--compile-cache", "none")[0] == 0
    base = pathlib.Path.cwd()
    loading = records.read("a.png")[0].loading
    assert (loading["model"], loading["text"]) == (str(base / "models/toy"),) * 2
    pathlib.Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert run("--from-image", base / "a.png", "-o", "b.png", "--compile-cache", "none")[0] == 0
    shutil.rmtree(base / "models")
    status, _, err = run("--from-image", base / "a.png", "-o", "b.png", "--compile-cache", "none")
    assert (status, err) == (2, f"sample.py: error: model='{base}/models/toy': no such folder or file\n")


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


@pytest.mark.parity
def test_a_model_from_its_parts(painter, model):
    """A transformer alone with an autoencoder and a text encoder; one sha256 for the three."""
    parts = ["--model", model / "transformer", "--dc-ae", model / "vae", "--text", model, "--compile-cache", "none"]
    assert run("cat", *parts, "-o", "a.png")[0] == 0
    recipe, _ = records.read("a.png")
    digests = {name: fingerprints.model_sha256(model / part) for name, part in (("model", "transformer"), ("dc_ae", "vae"))}
    digests["text"] = fingerprints.model_sha256(model, part="text_encoder")
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    assert recipe.identity["model_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert (recipe.loading["dc_ae"], recipe.loading["text"]) == (str(model / "vae"), str(model))
    assert run("--from-image", "a.png", "-o", "b.png", "--compile-cache", "none")[0] == 0
    # Weights without a configuration, and a pipeline that lacks what they replace.
    shutil.copytree(model, "without", ignore=shutil.ignore_patterns("vae"))
    pathlib.Path("weights").mkdir()
    shutil.copy(next((model / "vae").glob("*.safetensors")), "weights/model.safetensors")
    assert run("cat", "--model", "without", "--dc-ae", "weights", "-o", "c.png", "--compile-cache", "none")[0] == 0
    hashes = {records.read(path)[0].identity["model_sha256"] for path in ("a.png", "c.png")}
    assert len(hashes) == 2
    status, _, err = run("cat", *parts[:2], "-o", "c.png")
    assert status == 2 and "dc_ae=" in err and "text=" in err


def test_a_large_model_on_a_cpu(monkeypatch):
    pipeline = types.SimpleNamespace(sana=(None, {"a": {"b": np.zeros(600)}, "c": np.zeros((20, 20))}))
    assert painting.slowness(pipeline) is None
    monkeypatch.setattr(painting, "LARGE", 1000)
    assert painting.slowness(pipeline).startswith("this is a CPU, and the transformer has 0.0 billion parameters")
