"""Pictures of what toy networks have learned, which is nothing, but the right pictures of it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sana_jax import programs, sharding
from sana_jax.data.records import Record
from sana_jax.data.synthetic import Synthetic
from sana_jax.errors import InputError
from sana_jax.experiment import Data, Experiment, Optim, Preview
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.sampling import flow_dpm_solver
from sana_jax.training import layout, previews
from sana_jax.training.objectives import Autoencoder, Flow, Frozen, LanguageModel
from sana_jax.training.previews import Previewer

TOKENS = 6
DC_AE = DCAE(
    latent_channels=4, widths=(8, 16, 16), encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1),
    encoder_attention=(None,) * 3, decoder_attention=(None,) * 3,
)  # fmt: skip
SANA = Sana(width=16, depth=2, heads=2, cross_heads=2, latent_channels=4, caption_width=8, sample_size=8)
GEMMA = Gemma2(vocab_size=64, width=8, depth=1, heads=2, kv_heads=1, head_dim=4, hidden=16)
SOURCE = Synthetic(records=8, size=32)


def tokenize(texts):
    """Six tokens each: BOS, and letters."""
    ids = np.ones((len(texts), TOKENS), np.int32)
    valid = np.zeros((len(texts), TOKENS), bool)
    for row, text in enumerate(texts):
        letters = [2 + ord(c) % 60 for c in text[-TOKENS + 1 :]]
        ids[row, 1 : 1 + len(letters)], valid[row, : 1 + len(letters)] = letters, True
    return {"ids": ids, "ids_mask": valid}


@functools.cache
def random(module, seed):
    """Parameters of which none is zero, so that every layer shows."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *module.example_inputs()))["params"]
    return jax.tree.map(lambda a: rng.standard_normal(a.shape, np.float32) / (a.shape + (4,))[-2] ** 0.5, shapes)


@pytest.fixture(scope="module")
def frozen():
    params = {"dc_ae": random(DC_AE, 1), "text": random(GEMMA, 2)}
    null = programs.text_program(params["text"], *tokenize([""]).values(), np.arange(TOKENS), gemma2=GEMMA)[0][0]
    return Frozen({"dc_ae": DC_AE, "text": GEMMA}, params | {"null": null})


def experiment(folder, objective=Flow(), model=SANA, source=SOURCE, **preview):
    size = 32 if source else 256  # cached latents are taken for those of 32 pixels each
    data = Data(source=source, batch=4, size=size, buckets=False, tokens=TOKENS)
    preview = Preview(**{"every": 10, "steps": 3, **preview})
    return Experiment(
        model=model, objective=objective, data=data, optim=Optim(rule=None), preview=preview, workdir=str(folder)
    )


def state(params, ema=None):
    return types.SimpleNamespace(params=params, ema=ema)


def mesh(count=1, **sizes):
    return sharding.make_mesh(**sizes, devices=jax.devices()[:count])


class Seen:
    """What a Previewer tells the metrics."""

    def __init__(self):
        self.pictures, self.events, self.said = [], [], []

    def picture(self, name, step, image):
        self.pictures.append((name, step, image))

    def event(self, kind, **fields):
        self.events.append((kind, fields))

    def say(self, text):
        self.said.append(text)


def shown(previewer, state, step=10):
    """(grid, numbers) of one preview."""
    seen = Seen()
    previewer(step, state, seen)
    ((_, _, grid),), ((kind, fields),) = seen.pictures, seen.events
    assert (kind, fields.pop("step"), seen.said) == ("preview", step, [])
    return grid, fields


@pytest.fixture(scope="module")
def painter(tmp_path_factory, frozen):
    """(Previewer of the data's own captions, its folder)."""
    folder = tmp_path_factory.mktemp("run")
    return Previewer(experiment(folder), frozen, mesh(), SOURCE.open(), tokenize), folder


def test_the_captions_of_the_data_are_painted_below_their_pictures(tmp_path, frozen, painter):
    previewer, folder = painter
    grid, numbers = shown(previewer, state(random(SANA, 3)))
    with Image.open(folder / "previews" / "00000010.png") as file:
        assert np.array_equal(np.asarray(file), grid)
        assert float(file.text["distance"]) == pytest.approx(numbers["distance"], abs=1e-4)

    batch = previews.first_rows(SOURCE.open(), experiment(tmp_path), tokenize)
    assert len(np.unique(batch["position"])) == len(batch["image"]) == previews.ROWS
    states, finite = programs.text_program(
        frozen.params["text"], batch["ids"], batch["ids_mask"], np.arange(TOKENS), gemma2=GEMMA
    )
    null = jnp.broadcast_to(frozen.params["null"], states.shape)
    bos = np.arange(TOKENS)[None] < np.ones((len(states), 1))
    noise = programs.initial_latents(np.uint32(0), np.arange(8, dtype=np.uint32), (8, 8, 4))
    painted = programs.denoise_program(
        random(SANA, 3), (states, batch["ids_mask"], null, bos), noise, flow_dpm_solver.schedule(3, 3.0),
        np.float32(4.5), (0.0, 1.0), sana=SANA, sampler="flow-dpm-solver", guided=True, limited=False,
    )  # fmt: skip
    wanted = programs.encode_program(frozen.params["dc_ae"], batch["image"] / np.float32(127.5) - 1, dc_ae=DC_AE)
    distance = float(jnp.mean((painted - wanted) ** 2))
    assert finite and numbers["distance"] == pytest.approx(distance, rel=1e-4)


def test_always_the_same_noise_and_the_averaged_parameters(painter):
    previewer, _ = painter
    a, b = random(SANA, 3), random(SANA, 4)
    (first, numbers), (other, worse) = shown(previewer, state(a)), shown(previewer, state(b))
    assert numbers != worse and not np.array_equal(first, other)
    again, same = shown(previewer, state(b, ema=a))
    assert same == numbers and np.array_equal(again, first)


def test_prompts_are_painted_in_a_grid(tmp_path, frozen):
    prompts = ("a cat", "a dog that has a very long name, too long for a label", "a cat", "d", "e")
    previewer = Previewer(experiment(tmp_path, prompts=prompts), frozen, mesh(), SOURCE.open(), tokenize)
    grid, numbers = shown(previewer, state(random(SANA, 3)))
    assert numbers == {} and 2 * 32 < grid.shape[0] < 3 * 64 and grid.shape[1] < 1200  # two rows


def test_parameters_cut_over_devices_paint_the_same(tmp_path, frozen, painter):
    params, wide = random(SANA, 3), mesh(8, data=2, fsdp=4)
    whole = shown(painter[0], state(params))
    cut = jax.device_put(params, layout.param_shardings(params, SANA, wide))
    everywhere = frozen._replace(params=jax.device_put(frozen.params, jax.NamedSharding(wide, jax.P())))
    with jax.set_mesh(wide):
        previewer = Previewer(experiment(tmp_path), everywhere, wide, SOURCE.open(), tokenize)
        grid, numbers = shown(previewer, state(cut))
    assert numbers["distance"] == pytest.approx(whole[1]["distance"], rel=1e-5)
    differ = np.abs(grid.astype(int) - whole[0]) > 1  # a picture has 1.5 % of the grid; the last digit of a label may differ
    assert np.mean(differ) < 2e-3


class CachedReader:
    """Latents and text states, and no pictures."""

    sizes, null = np.full((9, 2), 256, np.int32), np.ones((TOKENS, 8), np.float16)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        states = rng.standard_normal((2 + i % 4, 8)).astype(np.float16)
        return Record(f"r{i}", arrays={"latent": rng.standard_normal((8, 8, 4)).astype(np.float16), "states": states})


def test_cached_features_need_no_text_encoder(tmp_path, frozen):
    cached = Frozen({"dc_ae": DC_AE}, {"dc_ae": frozen.params["dc_ae"], "null": CachedReader.null})
    config = experiment(tmp_path, source=None)
    _, numbers = shown(Previewer(config, cached, mesh(), CachedReader()), state(random(SANA, 3)))
    rows = previews.first_rows(CachedReader(), config)
    assert set(rows) >= {"latent", "states", "mask"}
    # Painted latents are not of this scale: the distance is at least that of unit noise to nothing.
    assert numbers["distance"] > 0.5 * (rows["latent"].astype(float) * DC_AE.scaling_factor).var()


def test_reconstructions_and_their_psnr(tmp_path):
    params = random(DC_AE, 1)
    config = experiment(tmp_path, Autoencoder(lpips=0.0), DC_AE)
    grid, numbers = shown(Previewer(config, Frozen({}, {}), mesh(), SOURCE.open()), state(params))
    images = previews.first_rows(SOURCE.open(), config)["image"]
    x = images.astype(np.float32) / 127.5 - 1
    out = np.clip(np.asarray(DC_AE.apply({"params": params}, x)), -1, 1)
    psnr = 10 * np.log10(4 / np.square(out - x).mean(axis=(1, 2, 3)))
    assert numbers["psnr"] == pytest.approx(psnr.mean(), rel=1e-4)
    rows, columns = np.nonzero((grid != 255).any(axis=-1))
    assert grid.shape[1] > 8 * 32 and len(rows) and any(
        np.array_equal(grid[top : top + 32, left : left + 32], images[0]) for top in range(60) for left in range(40)
    )


@pytest.mark.parametrize(
    "objective, model, every", [(LanguageModel(), GEMMA, 10), (Flow(), SANA, 0), (Autoencoder(), DC_AE, 0)]
)
def test_experiments_without_previews(tmp_path, objective, model, every):
    previewer = Previewer(experiment(tmp_path, objective, model, every=every), Frozen({}, {}), mesh(), None)
    assert previewer.every == 0
    previewer(10, None, None)
    assert list(tmp_path.iterdir()) == []


class OneGood(CachedReader):
    def __getitem__(self, i):
        good = super().__getitem__(i)
        return good if i == 0 else Record("bad", arrays={"latent": np.zeros(1), "states": good.arrays["states"]})


@pytest.mark.parametrize(
    "without, preview, words",
    [
        (("dc_ae",), {}, "frozen.dc_ae=''.*preview.every=0"),
        (("text",), {"prompts": ("a",)}, "frozen.text=''.*preview.prompts"),
        (("null",), {}, "preview.guidance_scale=4.5: needs the states of the empty caption"),
    ],
)
def test_what_is_missing_is_named(tmp_path, frozen, without, preview, words):
    less = Frozen(*({k: v for k, v in part.items() if k not in without} for part in frozen))
    with pytest.raises(InputError, match=words):
        Previewer(experiment(tmp_path, source=None, **preview), less, mesh(), CachedReader(), tokenize)


def test_bad_records_are_not_shown(tmp_path):
    rows = previews.first_rows(OneGood(), experiment(tmp_path, source=None))
    assert len(rows["weight"]) == 1 and rows["weight"].all()


def test_a_full_disk_stops_nothing(tmp_path):
    config = experiment(tmp_path, Autoencoder(lpips=0.0), DC_AE)
    (tmp_path / "previews").write_text("a file where a folder should be")
    previewer, seen = Previewer(config, Frozen({}, {}), mesh(), SOURCE.open()), Seen()
    previewer(10, state(random(DC_AE, 1)), seen)
    assert "cannot be written" in seen.said[0] and len(seen.events) == 1
