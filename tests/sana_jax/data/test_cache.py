"""Cached features against the networks that they came from, and what a kill leaves."""

import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import flax.traverse_util
import jax
import numpy as np
import pytest

from sana_jax import saving, sharding
from sana_jax.data import buckets, cache, folder, shapes_render
from sana_jax.data.array_record import Writer
from sana_jax.data.cached import META, Cached
from sana_jax.data.captions import Captions
from sana_jax.data.folder import Folder, FolderReader
from sana_jax.data.loader import Loader
from sana_jax.data.records import REASONS
from sana_jax.data.shapes import Shapes
from sana_jax.data.sources import guess
from sana_jax.data.synthetic import Synthetic
from sana_jax.data.vocabulary import learn
from sana_jax.errors import InputError
from sana_jax.experiment import Data, Experiment, Frozen, Mesh, Optim
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.parameters import parameter_shapes
from sana_jax.training import frozen, layout
from sana_jax.training.objectives import Flow
from sana_jax.training.objectives.flow import text_states
from sana_jax.training.optimizer import AdamW
from tests.quick import xla_flags
from tests.sana_jax.data.test_folder import reason, write

ROWS, TOKENS, BATCH = 11, 16, 4
DC_AE = DCAE(
    widths=(8, 8, 8, 8, 8, 32), encoder_depths=(0, 1, 1, 1, 1, 1), decoder_depths=(0, 1, 1, 1, 1, 1),
    encoder_attention=(None,) * 6, decoder_attention=(None,) * 6, scaling_factor=0.5,
)  # fmt: skip
GEMMA = Gemma2(vocab_size=320, width=32, depth=1, heads=2, kv_heads=1, head_dim=16, hidden=64, query_scale=16)
SOURCE = Synthetic(ROWS, 64)
OPTIONS = cache.Options(batch=BATCH, shard_records=4)


def random(module, seed):
    rng = np.random.default_rng(seed)
    flat = {
        path: rng.standard_normal(shape, np.float32) / max(np.prod(shape[:-1]), 1) ** 0.5
        for path, shape in parameter_shapes(module).items()
    }
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    path = tmp_path_factory.mktemp("networks")
    saving.save_component(path / "vae", "diffusion_pytorch_model", DC_AE, random(DC_AE, 1))
    saving.save_component(path / "text", "model", GEMMA, random(GEMMA, 2))
    learn((SOURCE.open()[i].captions["prompt"] for i in range(ROWS)), GEMMA.vocab_size).save_pretrained(path / "text")
    return Frozen(dc_ae=str(path / "vae"), text=str(path / "text"), chi="Paint this: ")


@pytest.fixture(scope="module")
def config(networks):
    data = Data(SOURCE, batch=BATCH, size=64, buckets=False, captions=Captions("first"), tokens=TOKENS, threads=2)
    return Experiment(
        model=Sana(width=32, depth=1, heads=1, cross_heads=1, caption_width=32, sample_size=2), objective=Flow(scaling_factor=0.5),
        data=data, optim=Optim(AdamW()), steps=1, frozen=networks, mesh=Mesh(data=2, fsdp=2, tensor=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "features"
    assert cache.make(config, out, OPTIONS) == {}
    return out


def with_source(config, source, **data):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source, **data))


def features(config, steps):
    """Latents and text states as the flow's loss sees them, and what the empty caption gives."""
    config = dataclasses.replace(config, preview=dataclasses.replace(config.preview, every=0))
    mesh = sharding.make_mesh(**layout.mesh_sizes(config.mesh))
    reader = config.data.source.open()
    tokenize = frozen.tokenizer(config, reader)
    found = []
    with (
        jax.set_mesh(mesh),
        Loader(reader, config.data, seed=config.seed, tokenize=tokenize, inputs=config.objective.reads) as loader,
    ):
        constants, _ = frozen.load(config, loader.names, reader, mesh)
        for _ in range(steps):
            batch = layout.put_batch(next(loader), mesh)
            arrays = config.objective.latents(constants, batch), *text_states(constants, batch), batch["weight"]
            found.append([np.asarray(array, np.float32) for array in arrays])
    return found, np.asarray(constants.params["null"], np.float32), constants.modules


def test_training_sees_the_same_from_cache_and_live(config, made):
    """To the rounding of float16, over more than an epoch."""
    live, live_null, modules = features(config, 6)
    cached, null, none = features(with_source(config, Cached(str(made))), 6)
    assert set(modules) == {"dc_ae", "text"} and none == {}
    for (latent, states, mask, weight), (latent_c, states_c, mask_c, weight_c) in zip(live, cached):
        np.testing.assert_array_equal(mask, mask_c)
        np.testing.assert_array_equal(weight, weight_c)
        np.testing.assert_allclose(latent_c, latent, rtol=2**-11, atol=1e-5)
        valid = mask.astype(bool)
        np.testing.assert_allclose(states_c[valid], states[valid], rtol=2**-11, atol=1e-5)
        assert 0 < valid.sum() < valid.size and (states_c[~valid] == 0).all()
        assert np.abs(latent).max() > 0.1 and np.abs(states).max() > 0.1, "random weights that do something"
    np.testing.assert_allclose(null, live_null, rtol=2**-11, atol=1e-5)
    assert null.shape == (TOKENS, 32)
    wrong, *_ = features(with_source(dataclasses.replace(config, seed=1), Cached(str(made))), 1)
    assert np.abs(wrong[0][0] - live[0][0]).max() > 0.05, "negative control: other pictures"


def test_what_a_cache_holds(config, made):
    reader = Cached(str(made)).open()
    assert sorted(p.name for p in made.iterdir() if p.suffix == ".array_record") == [
        f"0000{i}.array_record" for i in range(3)
    ]
    assert len(reader) == ROWS and reader.sizes.tolist() == [[64, 64]] * ROWS
    source = SOURCE.open()
    for i in range(ROWS):
        record = reader[i]
        assert record.key == source.key(i) and record.captions == source[i].captions and record.image is None
        assert record.arrays["latent"].shape == (2, 2, 32) and record.arrays["latent"].dtype == np.float16
        assert record.arrays["states"].shape[1] == 32 and 1 < len(record.arrays["states"]) <= TOKENS
    assert reader.meta["rows"] == ROWS and reader.meta["source"] == source.fingerprint()
    assert guess(str(made)) == Cached(str(made))
    again = Cached(str(made)).open()
    assert again.fingerprint() == reader.fingerprint() != ""


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}


def test_machines_share_the_work_and_get_the_same(config, made, tmp_path):
    for host in (1, 0):
        assert not (tmp_path / "out" / "00000.array_record").exists()
        cache.make(config, tmp_path / "out", dataclasses.replace(OPTIONS, host=host, hosts=2))
        if host:
            with pytest.raises(InputError, match="2 of 3 shards are not there yet"):
                Cached(str(tmp_path / "out")).open()
    assert contents(tmp_path / "out") == contents(made)


def test_what_is_whole_is_kept(config, tmp_path):
    out = tmp_path / "out"
    cache.make(config, out, OPTIONS)
    first = contents(out)
    kept = (out / "00002.array_record").stat()
    (out / "00001.array_record").unlink()
    (out / "00001.array_record.partial").write_bytes(b"left by a kill")
    cache.make(config, out, OPTIONS)
    assert contents(out) == first and (out / "00002.array_record").stat().st_mtime_ns == kept.st_mtime_ns


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda config: with_source(config, Synthetic(ROWS, 64, seed=5)), "source"),
        (lambda config: with_source(config, SOURCE, tokens=12), "tokens"),
        (lambda config: dataclasses.replace(config, seed=3), "seed"),
        (
            lambda config: dataclasses.replace(config, frozen=dataclasses.replace(config.frozen, chi="none")),
            "instruction",
        ),
        (lambda config: with_source(config, SOURCE, captions=Captions("uniform")), "captions"),
    ],
)
def test_nothing_else_goes_into_the_same_folder(config, made, change, word):
    before = contents(made)
    with pytest.raises(InputError, match=f"begun with other .*{word}"):
        cache.make(change(config), made, OPTIONS)
    assert contents(made) == before


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="precious.txt"):
        cache.make(config, tmp_path, OPTIONS)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["precious.txt"]


def test_bad_records_stay_in_their_places(config, tmp_path):
    records = SOURCE.open()
    write(
        tmp_path / "in",
        {f"{i}.png": records[i].image for i in range(6)}
        | {f"{i}.txt": records[i].captions["prompt"] for i in range(6)},
    )
    write(tmp_path / "in", {"1.txt": " ", "4.png": records[4].image[:300]})
    bad = with_source(config, Folder(str(tmp_path / "in")))
    assert cache.make(bad, tmp_path / "out", OPTIONS) == {"caption": 1, "damaged": 1}
    reader = Cached(str(tmp_path / "out")).open()
    assert reason(reader, 1) == "caption" and reason(reader, 4) == "damaged"
    assert [reader[i].key for i in (0, 2, 3, 5)] == ["0.png", "2.png", "3.png", "5.png"]
    with Loader(reader, dataclasses.replace(bad.data, batch=6, bad_share=1.0), inputs=("latent", "states")) as loader:
        batch = next(loader)
    assert sorted(REASONS[n - 1] for n in batch["bad"] if n) == ["caption", "damaged"] and batch["weight"].sum() == 4


def test_a_shard_that_could_not_be_read_is_not_whole(config, tmp_path, monkeypatch):
    """A disk that fails for a moment leaves no bad rows for ever; what is bad in content stays bad."""
    records = SOURCE.open()
    files = {f"{i}.png": records[i].image for i in range(6)} | {"1.png": b"no picture"}
    write(tmp_path / "in", files)
    config = with_source(config, Folder(str(tmp_path / "in")))
    options = dataclasses.replace(OPTIONS, text=False)
    config.data.source.open()
    real = folder._open

    def fails(path):
        if os.path.basename(path) == "5.png":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(folder, "_open", fails)
    with pytest.raises(cache.NotWhole, match=r"00001.array_record: not written, 1 of 2 .*\n  5.png: unreadable: .*output"):
        cache.make(config, tmp_path / "out", options)
    assert [p.name for p in sorted((tmp_path / "out").glob("0*"))] == ["00000.array_record"]
    monkeypatch.setattr(folder, "_open", real)
    monkeypatch.setattr(FolderReader, "__getitem__", lambda self, i: [][i])
    with pytest.raises(cache.NotWhole, match="2 of 2 .*\n  4.png: error: IndexError"):
        cache.make(config, tmp_path / "out", options)
    monkeypatch.undo()
    assert cache.make(config, tmp_path / "out", options) == {}
    reader = Cached(str(tmp_path / "out")).open()
    assert reason(reader, 1) == "format" and reader[5].key == "5.png"


def test_the_scale_of_latents_is_kept_and_asked_for(config, made, tmp_path):
    assert Cached(str(made)).open().scaling_factor == 0.5
    for name, data in contents(made).items():
        (tmp_path / name).write_bytes(data)
    meta = json.loads((tmp_path / META).read_text())
    del meta["scaling_factor"]
    (tmp_path / META).write_text(json.dumps(meta))
    assert Cached(str(tmp_path)).open().scaling_factor is None
    other = dataclasses.replace(config, objective=Flow(scaling_factor=0.25))
    with pytest.raises(InputError, match="objective.scaling_factor=0.25: the autoencoder's is 0.5"):
        cache.make(other, tmp_path / "out", OPTIONS)


def test_a_batch_that_devices_cannot_share(config, tmp_path):
    with pytest.raises(InputError, match="--batch=6: must be a multiple of the 4 devices along data and fsdp; 4 or 8"):
        cache.make(config, tmp_path / "out", dataclasses.replace(OPTIONS, batch=6))


def test_latents_alone(config, tmp_path):
    cache.make(config, tmp_path / "out", dataclasses.replace(OPTIONS, text=False))
    reader = Cached(str(tmp_path / "out")).open()
    assert set(reader[0].arrays) == {"latent"} and reader.null is None and reader[0].captions
    live, *_ = features(config, 1)
    half, _, modules = features(with_source(config, Cached(str(tmp_path / "out"))), 1)
    assert set(modules) == {"text"}
    np.testing.assert_array_equal(half[0][1], live[0][1])


def test_features_that_float16_cannot_hold_are_bad(config, tmp_path, monkeypatch):
    latents = cache._latents
    monkeypatch.setattr(cache, "_latents", lambda *args, **kw: latents(*args, **kw) * jax.numpy.float32(1e6))
    assert cache.make(config, tmp_path / "out", dataclasses.replace(OPTIONS, text=False)) == {"features": ROWS}


def test_every_published_shape_stays_in_its_bucket():
    """A cache says the size of its bucket for the picture's own."""
    for size in (512, 1024, 2048, 4096):
        shapes = buckets.shapes(size, True)
        assert buckets.assign([(w, h) for h, w in shapes], size).tolist() == list(range(len(shapes)))


@pytest.mark.parametrize("choice", [True, ((512, 512), (256, 1024))])
def test_aspect_ratios(config, tmp_path, choice):
    wide = with_source(config, Synthetic(3, 64, aspects=(1.0, 0.25)), size=512, buckets=choice)
    for _ in range(2):  # given again, it goes on
        cache.make(wide, tmp_path / "out", dataclasses.replace(OPTIONS, text=False, batch=4))
    reader = Cached(str(tmp_path / "out")).open()
    assert reader.sizes.tolist() == [[512, 512], [1024, 256], [512, 512]]
    assert [reader[i].arrays["latent"].shape for i in range(3)] == [(16, 16, 32), (8, 32, 32), (16, 16, 32)]


@pytest.mark.parametrize("text, words", [("{", "JSON"), ("{}", "rows"), (None, "cannot be read")])
def test_a_cache_that_says_nothing(made, tmp_path, text, words):
    if text is not None:
        (tmp_path / META).write_text(text)
    with pytest.raises(InputError, match=words):
        Cached(str(tmp_path)).open()


def test_a_shard_too_short(made, tmp_path):
    for name, data in contents(made).items():
        (tmp_path / name).write_bytes(data)
    with Writer(tmp_path / "00001.array_record"):
        pass
    with pytest.raises(InputError, match="7 rows, cache.json says 11"):
        Cached(str(tmp_path)).open()


def test_scenes_are_painted_on_their_way(config, tmp_path):
    source = Shapes(records=5, size=64)
    options = dataclasses.replace(OPTIONS, text=False)
    assert cache.make(with_source(config, source), tmp_path / "out", options) == {}
    records, cached = [source.open()[i] for i in range(5)], Cached(str(tmp_path / "out")).open()
    pictures = shapes_render.paint(np.stack([record.arrays["scene"] for record in records[1:]]), 64, 64, np)
    latents = cache._latents(random(DC_AE, 1), np.uint8(np.round(255 * pictures)), dc_ae=DC_AE)
    for i, latent in enumerate(np.asarray(latents), 1):
        assert cached[i].captions == records[i].captions and set(cached[i].arrays) == {"latent"}
        np.testing.assert_allclose(cached[i].arrays["latent"], latent, rtol=1e-3, atol=0.01)
        assert np.abs(cached[i - 1].arrays["latent"] - latent).max() > 0.1, "negative control: another scene"
    with pytest.raises(InputError, match="data.source.records"):
        cache.make(with_source(config, Shapes()), tmp_path / "other", options)


@pytest.mark.parametrize("fields", [dict(batch=0), dict(shard_records=-1), dict(hosts=2, host=2), dict(hosts=0)])
def test_bad_options(fields):
    with pytest.raises(InputError, match="--"):
        cache.Options(**fields)


CONFIG = """
from sana_jax.experiment import *
from sana_jax.data.captions import Captions
from sana_jax.data.synthetic import Synthetic
from sana_jax.models.sana import Sana
from sana_jax.training.objectives import Flow
from sana_jax.training.optimizer import AdamW

config = Experiment(
    model=Sana(width=32, depth=1, heads=1, cross_heads=1, caption_width=32, sample_size=2), objective=Flow(scaling_factor=0.5),
    data=Data({source}, batch=4, size=64, buckets=False, captions=Captions("first"), tokens=16, threads=2),
    optim=Optim(AdamW()), steps=1, preview=Preview(every=0),
    frozen={frozen},
)
"""


def test_the_command_after_a_kill(config, made, tmp_path):
    """Killed while it works, started again: the same bytes as without."""
    (tmp_path / "toy.py").write_text(CONFIG.format(source=SOURCE, frozen=config.frozen))
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "sana_jax.data.cache",
        str(tmp_path / "toy.py"),
        str(out),
        "--batch=4",
        "--shard-records=4",
    ]
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices=1)}
    process = subprocess.Popen([*command, "data.threads=1"], env=environment)
    deadline = time.monotonic() + 120
    while not (out / "00000.array_record").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "00000.array_record").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: done\n"
    np.testing.assert_equal(*(json.loads((path / META).read_text()) for path in (out, made)))
    ours, theirs = Cached(str(out)).open(), Cached(str(made)).open()
    for i in range(ROWS):
        for name in ("latent", "states"):
            np.testing.assert_allclose(ours[i].arrays[name], theirs[i].arrays[name], rtol=2**-10, atol=1e-5)


def test_the_command_with_bad_input(tmp_path, capsys):
    (tmp_path / "toy.py").write_text(CONFIG.format(source=SOURCE, frozen="Frozen()"))
    assert cache.main([str(tmp_path / "absent.py"), str(tmp_path / "out")]) == 2
    assert cache.main([str(tmp_path / "toy.py"), str(tmp_path / "out"), "--batch=0"]) == 2
    assert "frozen.dc_ae" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_command_takes_one_stage(tmp_path, capsys):
    arguments = [str(pathlib.Path(__file__).parents[3] / "configs" / "debug.py"), str(tmp_path / "out"), f"workdir={tmp_path / 'runs'}"]
    assert cache.main(arguments) == 2
    assert "several stages; choose one with stage=NAME: text, autoencoder, flow" in capsys.readouterr().err
    assert cache.main([*arguments, "stage=flow"]) == 2  # whose frozen networks no run has made yet
    assert f"{tmp_path / 'runs' / 'text'}: no such folder" in capsys.readouterr().err.replace("'", "")


def test_only_pictures_of_a_flow_can_be_cached(config, made, tmp_path):
    with pytest.raises(InputError, match="Flow"):
        cache.make(with_source(config, Cached(str(made))), tmp_path / "out", OPTIONS)
