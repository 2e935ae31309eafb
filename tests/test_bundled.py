"""The model in the box: a made folder that is like it, and, where there is one, the bundled folder itself."""

import hashlib
import json
import pathlib
import re
import shutil
import tomllib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sana_jax
from sana_jax import Pipeline, TextEncoder, bundled, convert, extras
from sana_jax.bundled import card
from sana_jax.data.cached import write_meta
from sana_jax.cli import records
from sana_jax.data.vocabulary import learn
from sana_jax.errors import InputError
from sana_jax.experiment import Frozen, describe
from sana_jax.text import Vocabulary, words
from tests import sample_runs
from tests.runs import DC_AE, GEMMA2, SANA, make_config, random_params
from tests.sample_runs import run
from tests.toy_pipeline import load_peer, torch_latents

compile_cache, painter = sample_runs.compile_cache, sample_runs.painter
ROOT = pathlib.Path(__file__).parent.parent
CAPTIONS = ["a red circle above a blue square", "two green stars"]
UNKNOWN = "not in the bundled model's vocabulary: cat; for anything but shapes use --model "
DEFAULTS = {"steps": 3, "guidance_scale": 2.5, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As it is made for the box: stored in bfloat16, and computed in float32."""

    def stored(module):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(module))
        return module.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), params

    vocabulary = Vocabulary(frozenset(word for caption in CAPTIONS for word in words(caption)))
    text = TextEncoder(*stored(GEMMA2), learn(CAPTIONS, 320), "", vocabulary)
    folder = tmp_path_factory.mktemp("box") / "shapes"
    Pipeline(stored(SANA), stored(DC_AE), text, "nvlabs", defaults=DEFAULTS).save(folder)
    extras.write(folder, extras.read(folder) | {"dtype": "fp32"})
    return folder


@pytest.fixture
def box(folder, monkeypatch):
    monkeypatch.setattr(bundled, "NAME", str(folder))
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundled, "NAME", str(folder))
        return sana_jax.load_pipeline()


def test_what_the_layout_cannot_say_comes_along(folder, pipeline, tmp_path):
    assert pipeline.defaults == DEFAULTS and pipeline.instruction().text == ""
    assert {module.dtype for module in (pipeline.sana[0], pipeline.dc_ae[0], pipeline.text.gemma2)} == {jnp.float32}
    assert pipeline.text.vocabulary.words == frozenset("a above blue circle green red square stars two".split())
    other = sana_jax.load_pipeline(folder, dtype="bf16")
    assert other.sana[0].dtype == jnp.bfloat16 and other.text.vocabulary.advice == "", "named, it is any folder"
    pipeline.save(tmp_path / "saved")
    assert sana_jax.load_pipeline(tmp_path / "saved").defaults == DEFAULTS
    convert.convert(folder, tmp_path / "converted")
    assert extras.read(tmp_path / "converted") == extras.read(folder)


def test_a_picture_without_a_model(box, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("a red cat", "-o", "one.png")
    assert status == 0 and "model: the bundled model (" in out and "3 steps, guidance 2.5, seed 0" in out
    assert err.count("\n") == 1 and UNKNOWN in err
    recipe, _ = records.read("one.png")
    assert recipe.loading["model"] is None and {name: recipe.settings[name] for name in DEFAULTS} == DEFAULTS
    status, out, _ = run("--from-image", "one.png", "-o", "two.png")
    assert status == 0 and "the same, bit for bit" in out


def test_arguments_override_the_folder(box, painter):
    status, out, err = run("two stars", "--steps", 4, "--guidance-scale", 5, "--max-sequence-length", 9, "--size", "160x160")
    assert (status, "4 steps, guidance 5" in out) == (0, True)
    (_, arguments), = painter.calls
    assert {name: arguments[name] for name in DEFAULTS} == {"steps": 4, "guidance_scale": 5, "max_sequence_length": 9}
    assert "160 x 160: this model was trained at 64 x 64" in err
    assert run("two stars", "--size", "160x128")[2] == ""  # five times as many: a wide one of twice the side


def test_prompts_that_it_does_not_know(pipeline, monkeypatch):
    def states(prompt):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = np.asarray(pipeline.encode_prompt(prompt)[0])
        return found, [str(warning.message) for warning in said]

    plain, nothing = states("a red circle")
    assert nothing == [] and plain.shape == (1, 16, 32)
    np.testing.assert_array_equal(states("A RED circle")[0], plain)
    assert np.abs(states("a red star")[0] - plain).max() > 1e-3
    assert states("")[1] == states("...")[1] == []
    assert states("nine Circles, nine")[1][0].startswith(
        "prompts[0]: not in the bundled model's vocabulary: nine, circles; the picture is of anything, since no word"
    )
    many = " ".join(f"w{i}" for i in range(13))
    assert "w8, w9 and 3 more" in states(f"a {many}")[1][0] and "anything, since" not in states(f"a {many}")[1][0]


def test_a_negative_prompt_is_named_as_one(pipeline):
    with pytest.warns(UserWarning) as said:
        pipeline._conditions(["two stars"], ["cat"], "", 16, 1)
    assert [str(w.message).split("; ")[0] for w in said] == ["negative_prompts[0]: not in the bundled model's vocabulary: cat"]
    assert "anything, since" not in str(said[0].message)


def test_an_empty_prompt_is_guided_nowhere(pipeline):
    """Text and no text are the same then, so the scale has nothing to act on."""
    empty, strong = (pipeline.generate("", guidance_scale=scale).astype(int) for scale in (1.5, 100))
    assert np.abs(empty - strong).max() <= 1 and empty.std() > 10
    told, strongly = (pipeline.generate("two stars", guidance_scale=scale).astype(int) for scale in (1.5, 100))
    assert np.abs(told - strongly).max() > 1


def test_without_a_box(monkeypatch, tmp_path):
    monkeypatch.setattr(bundled, "NAME", "absent")
    with pytest.raises(InputError, match="model: none given and this installation has none bundled"):
        sana_jax.load_pipeline()
    assert not bundled.is_bundled(tmp_path)


def test_the_card_says_what_features_were_made_from(folder, tmp_path):
    """As long as they are there and say it."""
    features, run = tmp_path / "features", tmp_path / "flow"
    for path in (features, run):
        path.mkdir()
    config = describe(make_config(run, SANA)) | {"data": {"source": {"class": "Cached", "path": str(features)}, "batch": 2}}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    meta = {"rows": 1, "shard_records": 1, "fingerprint": "", "text": False}
    source = {"class": "Folder", "path": str(tmp_path / "pictures")}
    for made_from, said in (({}, ""), ({"made_from": source}, ", made_from=Folder(path=pictures)")):
        write_meta(features, meta | made_from)
        text = card.write(folder, {"flow": run}).read_text()
        assert f"| data.source | Cached(path=features{said}) |" in text and str(tmp_path) not in text
    shutil.rmtree(features)
    assert "| data.source | Cached(path=features) |" in card.write(folder, {"flow": run}).read_text()


def test_a_card_of_weights_that_go_on(folder, tmp_path):
    """The runs of the earlier card come first, word for word; a stage of the same name is refused."""
    for name, loss in (("first", 0.5), ("second", 0.25), ("third", 0.125)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(describe(make_config(tmp_path / name, SANA))))
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {loss}}}\n')
    at_once = card.write(folder, {name: tmp_path / name for name in ("first", "second", "third")}).read_text()
    earlier = card.write(folder, {name: tmp_path / name for name in ("first", "second")})
    one_by_one = card.write(folder, {"third": tmp_path / "third"}, earlier=earlier).read_text()
    assert card.main([str(folder), "--earlier", str(folder / card.CARD)]) == 0  # for new scores
    assert one_by_one == at_once == (folder / card.CARD).read_text() and at_once.count("| 0.125 |") == at_once.count("| 0.5 |") == 1
    with pytest.raises(InputError, match="run='second': .*MODEL_CARD.md tells of one"):
        card.write(folder, {"second": tmp_path / "second"}, earlier=earlier)
    with pytest.raises(InputError, match="run: none given, and no earlier card"):
        card.write(folder, {})
    for other in (tmp_path / "absent.md", tmp_path / "first" / "config.json"):
        with pytest.raises(InputError, match=f"earlier='{other}'"):
            card.write(folder, {"third": tmp_path / "third"}, earlier=other)


def test_the_card_and_the_size(folder, tmp_path, capsys):
    for stage, model in (("flow", SANA), ("text", GEMMA2)):
        (tmp_path / stage).mkdir()
        description = describe(make_config(tmp_path / stage, model, ema=0.9, frozen=Frozen(text=str(tmp_path / "text"))))
        (tmp_path / stage / "config.json").write_text(json.dumps(description))
    lines = [{"step": step, "loss": 1 / step, "lr": 1e-3, "loss_hex": "0x1p+0"} for step in range(1, 30)]
    (tmp_path / "flow" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"overall": {"score": 0.91, "low": 0.9, "high": 0.925}, "controls": {"no text": 0.125}, "steps": 20}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    command = [str(folder), "--run", f"flow={tmp_path / 'flow'}", "--scores", f"GenEval-Shapes={tmp_path / 'scores.json'}"]
    assert card.main(command) == 0
    text = (folder / card.CARD).read_text()
    for expected in (
        "| overall | 0.910 [0.900, 0.925] |", "| controls, no text | 0.125 |", "| optim.ema | 0.9 |", "| 29 | 0.03448 | 0.001 |",
        "| guidance_scale | 2.5 |", "| vocabulary | 9 words |", f"| sana_jax.json | {(folder / 'sana_jax.json').stat().st_size} |",
    ):  # fmt: skip
        assert expected in text, expected
    assert "| frozen.text | text |" in text and str(tmp_path) not in text, "paths of the machine stay there"
    assert card.main([*command, "--run", f"text={tmp_path / 'text'}"]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err

    for box in filter(None, (folder, bundled.folder())):
        listed = re.findall(r"^\| (\S+) \| (\d+) \| ([0-9a-f]{64}) \|$", (box / card.CARD).read_text(), re.MULTILINE)
        files = {path.relative_to(box).as_posix(): path.read_bytes() for path in box.rglob("*") if path.is_file()}
        del files[card.CARD]
        assert {(n, int(size), sha) for n, size, sha in listed} == {
            (name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()
        }
        card.require_small(box)

    with open(folder / "large.bin", "wb") as file:
        file.truncate(card.LARGEST_FILE - 1)
    try:
        card.require_small(folder)
        with open(folder / "large.bin", "ab") as file:
            file.write(b"x")
        with pytest.raises(InputError, match="large.bin has 16777216 bytes, must have less"):
            card.require_small(folder)
    finally:
        (folder / "large.bin").unlink()
    with pytest.raises(InputError, match="has .* bytes, may have 1000"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "LARGEST", 1000)
        card.require_small(folder)


def test_a_wheel_takes_every_file_along(folder, tmp_path):
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["sana_jax"]
    shutil.copytree(folder, tmp_path / "bundled" / bundled.NAME)
    taken = {path for pattern in patterns for path in tmp_path.glob(pattern) if path.is_file()}
    assert taken == {path for path in tmp_path.rglob("*") if path.is_file()} and len(taken) >= 10


def difference_from_diffusers(folder, prompt, side=None, steps=20, **changes):
    """Largest difference of pictures in [0, 1], ours from diffusers', from the same latents and prompt states.

    Float32 and the stack "diffusers", with the folder's guidance, at `side` pixels.  `changes` are of our
    `denoise` alone.
    """
    import torch

    ours, theirs = sana_jax.load_pipeline(folder, dtype="fp32", stack="diffusers"), load_peer(folder)
    grid = (side or ours.sana[0].sample_size * 32) // 32
    latents = np.random.default_rng(0).normal(size=(1, grid, grid, ours.sana[0].latent_channels)).astype("f")
    texts = *ours.encode_prompt(prompt), *ours.encode_prompt("", chi="none")
    picture = np.asarray(ours.decode(ours.denoise(*texts, latents, steps=steps, **changes)))[0] / 2 + 0.5
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    given = {name: torch.tensor(np.asarray(array)) for name, array in zip(names, texts)}
    peer = theirs.to(torch.float32)(
        **given, negative_prompt=None, latents=torch_latents(latents), num_inference_steps=steps, output_type="np",
        guidance_scale=ours.defaults["guidance_scale"], height=32 * grid, width=32 * grid, use_resolution_binning=False,
    ).images[0]  # fmt: skip
    assert picture.std() > 0.05, "a picture of nothing would agree with any"
    return float(np.abs(picture - peer).max())


@pytest.mark.parity
def test_diffusers_paints_the_same_picture(folder):
    """The bundled folder, where it is there; the control is another schedule."""
    box = bundled.folder() or folder
    assert difference_from_diffusers(box, "two green stars", steps=3) <= 1e-3
    assert difference_from_diffusers(box, "two green stars", steps=3, flow_shift=9.0) > 1e-2
