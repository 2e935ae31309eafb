"""What sample.py refuses by itself: one line that names field, value and rule, before any model is read."""

import pytest

import sana_jax
from sana_jax import bundled
from sana_jax.cli import flags
from tests import sample_runs
from tests.sample_runs import refused, run

compile_cache = sample_runs.compile_cache


def never(*_, **__):
    raise AssertionError("a model was loaded for a request that is wrong by itself")


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr(sana_jax, "load_pipeline", never)
    monkeypatch.setattr(bundled, "folder", lambda: None)


WRONG = [
    ("", "prompt: give it once, as the only word without a flag or with --prompt, --prompts-file or --from-image"),
    ("cat --prompt dog --model .", "prompt: give it once"),
    ("cat -p dog", "prompt: give it once"),
    ("cat --txt_file a.txt", "prompt: give it once"),
    ("--json_file a.json --from-image a.png", "--prompts-file and --from-image: give one of them"),
    ("cat", "model: none given and this installation has none bundled; pass --model with a folder in diffusers layout"),
    ("cat --model", "argument --model: expected one argument"),
    ("cat dog --model .", "unrecognized arguments: dog"),
    ("cat --model . --stepz 3", "unrecognized arguments: --stepz 3; did you mean --steps?"),
    ("cat --model . --sed=3", "unrecognized arguments: --sed=3; did you mean --seed?"),
    ("cat --model . --steps few", "argument --steps: invalid int value: 'few'"),
    ("cat --model . --steps 0", "steps=0: must be an int in [1, 1000]; nearest valid 1"),
    ("cat --model . --guidance-scale -1", "guidance_scale=-1.0: must be a number in [0, 100]; nearest valid 0"),
    ("cat --model . --guidance-scale nan", "guidance_scale=nan: must be a number in [0, 100]"),
    ("cat --model . --seed -2", "seed=-2: must be an int in [0, 4294967295]; nearest valid 0"),
    ("cat --model . --num-images 0", "num_images=0: must be an int in [1, 4096]; nearest valid 1"),
    ("cat --model . --batch-size 0", "batch_size=0: must be an int in [1, 1024]; nearest valid 1"),
    ("cat --model . --height 0", "height=0: must be in [1, 8192]; nearest valid 32"),
    ("cat --model . --height -64", "height=-64: must be in [1, 8192]; nearest valid 32"),
    ("cat --model . --width 100000", "width=100000: must be in [1, 8192]; nearest valid 8192"),
    ("cat --model . --width 64.5", "argument --width: invalid int value: '64.5'"),
    ("cat --model . --image-size 0", "height=0: must be in [1, 8192]; nearest valid 32"),
    ("cat --model . --size 64", "argument --size: '64' must be two positive numbers, as in 1024x768"),
    ("cat --model . --ar 16x9", "argument --ar: '16x9' must be two positive numbers, as in 16:9"),
    ("cat --model . --ar 5:1", "argument --ar: '5:1' must be between 1:4 and 4:1, width before height"),
    ("cat --model . --size 64x64 --height 64", "--size and --height: the size is given twice"),
    ("cat --model . --ar 1:1 --image_size 64", "--image-size and --ar: the size is given twice"),
    ("cat --model . --max-sequence-length 1", "max_sequence_length=1: must be an int in [2, 4096]; nearest"),
    ("cat --model . --sampler flow-eular", "sampler='flow-eular': must be one of 'flow-dpm-solver', 'flow-eu"),
    ("cat --model . --vis_sampler sa_solver", "sampler='sa-solver': must be one of 'flow-dpm-solver', 'flow-eu"),
    ("cat --model . --dtype bf61", "dtype='bf61': must be one of auto, float32, fp32, bfloat16, bf16, fl"),
    ("cat --model . --weights-dtype int8", "dtype='int8': not available yet; must be one of auto, fp32, bf16, fp16"),
    ("cat --model . --kernels palas", "kernels='palas': must be one of 'auto', 'reference', 'xla', 'pallas', 'pallas_inter"),
    ("cat --model . --stack nvlab", "stack='nvlab': must be one of 'auto', 'diffusers', 'nvlabs'; did you me"),
    ("cat --model . --progress step", "progress='step': must be one of 'auto', 'images', 'steps', 'none'; did you"),
    ("cat --model . --guidance-interval 0.5 0.2", "guidance_interval[1]=0.2: must be a number in [0.5, 1]"),
    ("cat --model . --guidance-interval 0.5", "argument --guidance-interval: expected 2 arguments"),
    ("cat --model . --pag-layers one", "argument --pag-layers: 'one' must be numbers of layers, as in 8 or 8,14"),
    ("cat --model . --pag-scale -3", "pag_scale=-3.0: must be a number in [0, 100]; nearest valid 0"),
    ("cat --model . --strength 0.5", "strength=0.5: is that of --image, and there is none"),
    ("cat --model . --image absent.png", "image='absent.png': cannot be read (No such file or directory)"),
    ("cat --model . --image latin.txt", "image='latin.txt': cannot be read (not one of PNG, JPEG, WEBP)"),
    ("cat --model . --grid cgf=1,2", "--grid 'cgf=1,2': must be KEY=VALUE,VALUE with one of steps, guidance-scale"),
    ("cat --model . --grid steps", "--grid 'steps': must be KEY=VALUE,VALUE with one of steps"),
    ("cat --model . --grid steps=1,two", "--grid 'steps=1,two': every value of steps must be an int"),
    ("cat --model . --grid steps=", "--grid 'steps=': must have values, each of them once"),
    ("cat --model . --grid cfg=2,2.0", "--grid 'cfg=2,2.0': must have values, each of them once"),
    ("cat --model . --grid cfg=2 --grid cfg_scale=3", "--grid 'cfg_scale=3': guidance-scale is given twice"),
    ("cat --model . --grid seed=-1,3", "--grid 'seed=-1,3': -1 draws a seed, and a grid compares seeds that are known"),
    ("cat\x1b[0m --model .", "prompt: has the control character U+001B at character 3"),
    ("cat --neg \udcff --model .", "negative_prompt: has the control character U+DCFF at character 0"),
    ("--prompts-file /dev/zero --model .", "/dev/zero: cannot be read (must be a plain file, is a device or a pipe)"),
    ("cat --model . --chi /dev/zero", "/dev/zero: cannot be read (must be a plain file, is a device or a pipe)"),
    ("cat --model . --image /dev/zero", "image='/dev/zero': cannot be read (must be a plain file, is a device or a pipe)"),
    ("cat --model . --steps 3 --grid step=2", "--grid 'step=2': steps is given twice"),
    ("cat --model . --grid steps=5,2000", "steps=2000: must be an int in [1, 1000]; nearest valid 1000"),
    ("cat --model . --chi absent.txt", "absent.txt: cannot be read (No such file or directory)"),
    ("cat --model . --output cat.jpg", "output='cat.jpg': must end in .png, or be a folder"),
    ("cat --model . --output latin.txt/cat.png", "output='latin.txt/cat.png': cannot be written (Not a dir"),
    ("cat --model . --output latin.txt/folder", "output='latin.txt/folder': cannot be written (Not a dir"),
    ("--prompts-file absent.txt --model .", "absent.txt: cannot be read (No such file or directory)"),
    ("--prompts-file list.txt --model . -o a.png", "output='a.png': must be a folder, for the pictures of a file"),
    ("--json_file list.txt --model .", "list.txt: not readable as JSON ("),
    ("--prompts-file two.json --grid seed=1,2 --model .", "id 'a': sets seed, which --grid sets too"),
    ("--from-image absent.png", "absent.png: cannot be read (No such file or directory)"),
    ("cat --model . --allow-mismatch jaxx", "allow_mismatch='jaxx': must be one of 'stack', 'dtype', 'model_sha256'"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", WRONG)
def test_wrong_by_itself(monkeypatch, tmp_path, arguments, message):
    (tmp_path / "latin.txt").write_bytes("Häuschen".encode("latin-1"))
    (tmp_path / "list.txt").write_text("one\n")
    (tmp_path / "two.json").write_text('{"a": {"prompt": "one", "seed": 3}}')
    assert refused(monkeypatch, tmp_path, *arguments.split()).startswith(message)


def test_an_instruction_that_is_no_text(monkeypatch, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("Häuschen".encode("latin-1"))
    message = refused(monkeypatch, tmp_path, "cat", "--model", ".", "--chi", path)
    assert message == f"{path}: must be UTF-8 (invalid continuation byte, byte 1)"


@pytest.mark.parametrize("flag", ["--steps", "--num-inference-steps", "--num_inference_steps", "--step"])
@pytest.mark.parametrize("again", ["--steps", "--step", "--num_inference_steps=4"])
def test_a_setting_is_given_once(monkeypatch, tmp_path, flag, again):
    words = again.split("=") if "=" in again else [again, "4"]
    first, second = flag.replace("_", "-"), words[0].replace("_", "-")
    expected = f"{first}: given twice" if first == second else f"{first} and {second}: the same setting, given twice"
    assert refused(monkeypatch, tmp_path, "cat", "--model", ".", flag, "4", *words) == expected


def test_odd_arguments_end_in_one_line_too(monkeypatch, tmp_path):
    assert refused(monkeypatch, tmp_path, "cat", "").startswith("unrecognized arguments:")
    assert "did you mean" not in refused(monkeypatch, tmp_path, "cat", "two\nlines")


def test_models_that_are_none(monkeypatch, tmp_path):
    monkeypatch.undo()

    def message(model):
        return refused(monkeypatch, tmp_path, "cat", "--model", model, "--output", "new/cat.png", "--compile-cache", "none")

    assert "has no model_index.json, is not a pipeline in diffusers layout" in message(tmp_path)
    assert "must be a folder in diffusers layout, or a Hugging Face id (owner/name)" in message("no/such/folder")
    for path in ("./nosuch", "../nosuch", "/no/such", "~/nosuch"):
        assert message(path) == f"model={path!r}: no such folder or file"
    assert "model='nobody/nothing': not a local folder, and the download failed: " in message("nobody/nothing")


ALIASES = {  # every word of other tools: the attribute it sets and its value
    "-p": ("prompt", "x"), "--neg": ("negative_prompt", "x"), "--negative_prompt": ("negative_prompt", "x"),
    "--num-inference-steps": ("steps", 3), "--num_inference_steps": ("steps", 3), "--step": ("steps", 3),
    "--cfg": ("guidance_scale", 2.5), "--cfg-scale": ("guidance_scale", 2.5), "--guidance_scale": ("guidance_scale", 2.5),
    "-n": ("num_images", 3), "--bs": ("num_images", 3), "--num_images_per_prompt": ("num_images", 3),
    "-o": ("output", "x"), "--output-path": ("output", "x"), "--model-path": ("model", "x"),
    "--pretrained_model_name_or_path": ("model", "x"), "--weights-dtype": ("dtype", "x"),
    "--vis_sampler": ("sampler", "x"), "--sampling_algo": ("sampler", "x"), "--interval_guidance": ("guidance_interval", [0.5, 1]),
    "--pag_scale": ("pag_scale", 2.5), "--image_size": ("height", 3),
}  # fmt: skip


@pytest.mark.parametrize("word", ALIASES)
def test_words_of_other_tools(word):
    name, value = ALIASES[word]
    given = ["0.5", "1"] if isinstance(value, list) else [str(value)]
    args = flags.parse([word, *given, *([] if name == "prompt" else ["cat"])], "")
    assert getattr(args, name) == value


def test_sampler_words_of_nvlabs():
    for word, name in {"flow_dpm-solver": "flow-dpm-solver", "flow_euler": "flow-euler", "scm": "scm"}.items():
        assert flags.parse(["cat", "--vis_sampler", word], "").sampler == name
    assert flags.parse(["cat", "--grid", "vis_sampler=flow_euler,flow_dpm-solver"], "").axes == {
        "sampler": ["flow-euler", "flow-dpm-solver"]
    }


def test_values_keep_their_underscores():
    args = flags.parse(["a_cat", "--neg=a_b", "--output", "c_d", "--model=x_y/z_w"], "")
    assert (args.prompt, args.negative_prompt, args.output, args.model) == ("a_cat", "a_b", "c_d", "x_y/z_w")
    assert flags.parse(["--steps", "3", "--", "--a_b"], "").prompt == "--a_b"


def test_seed_minus_one_draws_a_seed():
    seeds = {flags.settings(flags.parse(["cat", "--seed", "-1"], ""))[0]["seed"] for _ in range(4)}
    assert len(seeds) > 1 and all(0 <= seed < 2**32 for seed in seeds)


def test_help_shows_our_names_and_lists_the_others():
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    shown, others = out.split("Other names that are understood")
    assert "-n, --num-images N" in shown and "--guidance-scale X" in shown and "-h, --help" in shown
    assert "--cfg" not in shown and "--guidance-scale: --cfg, --cfg-scale" in others
    assert all(len(line) <= 100 for line in out.splitlines())


def test_a_dry_run_loads_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("cat", "-n", 2, "--grid", "cfg=2,3.5", "-o", "a.png", "--dry-run")
    assert (status, err) == (0, "")
    assert [line.split("\t")[0] for line in out.splitlines()] == [
        "a_guidance-scale=2-0.png", "a_guidance-scale=2-1.png", "a_guidance-scale=3.5-0.png", "a_guidance-scale=3.5-1.png"
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []
