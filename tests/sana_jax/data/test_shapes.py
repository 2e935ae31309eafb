"""Scenes as a source: records, batches that are painted on the device, features, and a run on them."""

import pickle
import textwrap
import types

import jax
import numpy as np
import pytest

import train
from sana_jax import overrides, sharding
from sana_jax.data import check, shapes_render
from sana_jax.data.loader import Loader
from sana_jax.data.shapes import TABLED, Shapes
from sana_jax.data.shapes_scene import COLOURS, SIZES, is_held_out
from sana_jax.errors import InputError
from sana_jax.training import layout, previews
from tests import sample_runs
from tests.toy_reader import Data, Words
from tests.test_train import TINY, lines

compile_cache = sample_runs.compile_cache
CPU = dict(batch=8, size=64)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def batches(count, seek=0, reader=None, **data):
    with Loader(reader or Shapes().open(), Data(**CPU | data), tokenize=Words(), inputs=("image",)) as loader:
        loader.seek(seek)
        return [next(loader) for _ in range(count)]


def test_records_are_the_same_everywhere():
    reader, other = Shapes().open(), pickle.loads(pickle.dumps(Shapes())).open()
    for i in (0, 1, 2**31 - 2):
        a, b = reader[i], other[i]
        assert a._replace(arrays={}) == b._replace(arrays={}) and same(a.arrays, b.arrays)
        assert np.array_equal(a.arrays["scene"], shapes_render.pack(reader.scene(i))) and a.key == reader.key(i)
        assert set(a.captions) == set(a.scores) == {"terse", "plain", "synonyms", "rich"}
        assert not same(a.arrays, Shapes(seed=1).open()[i].arrays)
    assert reader.fingerprint() == other.fingerprint() != Shapes(held_out=True).open().fingerprint()
    assert reader.fingerprint() == "0fc3619bbafc93ac71ae773741698ed3"  # of runs begun before there was less freedom
    assert Shapes(turn=0.1, apart=0.06).open().fingerprint() == "06bce3af6d62096aa9ba24705b1c1974"  # of features that there are
    others = [dict(turn=0.1), dict(apart=0.0), dict(apart=0.06), dict(turn=0.1, apart=0.06), dict(jitter=0.0), dict(grid=0.125)]
    others += [dict(textures=("plain",)), dict(kinds=(("one", 1.0),))]
    assert len({reader.fingerprint(), *(Shapes(**other).open().fingerprint() for other in others)}) == 1 + len(others)
    assert [Shapes(apart=0.06).open().scene(i) for i in range(50)] != [reader.scene(i) for i in range(50)]
    turned = [max(abs(one.angle) for i in range(99) for one in Shapes(turn=t).open().scene(i).things) for t in (0.4, 0.1, 0.0)]
    assert turned == [pytest.approx(0.4, rel=0.05), pytest.approx(0.1, rel=0.05), 0]
    assert is_held_out(Shapes(held_out=True).open().scene(5)) and not is_held_out(reader.scene(5))


def test_sizes_follow_the_aspects():
    reader = Shapes(records=5, size=100, aspects=(1.0, 2.0, 0.5)).open()
    assert reader.sizes.tolist() == [[100, 100], [71, 141], [141, 71], [100, 100], [71, 141]]
    assert [(s.width, s.height) for s in map(reader.scene, range(3))] == [(1, 1), (1, pytest.approx(2)), (pytest.approx(2), 1)]


def test_batches_hold_scenes_and_one_integer_resumes_them():
    whole = batches(6)
    assert same(batches(2, seek=32)[1], whole[5]) and not same(batches(1)[0], whole[1])
    assert all(map(same, batches(6, workers=1), whole))
    assert whole[0]["scene"].shape == (8, shapes_render.LENGTH) and "image" not in whole[0]
    assert len(np.unique(np.concatenate([batch["scene"] for batch in whole]), axis=0)) == 48


def test_every_device_paints_its_own_rows():
    reader = Shapes().open()
    with Loader(reader, Data(**CPU), inputs=("image",)) as loader:
        assert loader.names == {"image", "weight", "position", "bad"} and loader.shape is None
        rows = next(loader)
        mesh = sharding.make_mesh(data=2, devices=jax.devices()[:2])
        batch = layout.painter(reader, mesh)(layout.put_batch(rows, mesh), loader.shape)
    assert batch.keys() == {"image", "weight", "position"} and batch["image"].dtype == np.uint8
    assert batch["image"].sharding.is_equivalent_to(layout.batch_sharding(mesh), 4)
    wanted = 255 * shapes_render.paint(rows["scene"], 64, 64, np)
    assert np.abs(np.asarray(batch["image"]) - wanted).max() < 1.01
    assert np.abs(np.asarray(batch["image"])[::-1] - wanted).max() > 100, "negative control"
    assert layout.painter(object(), mesh)(batch, None) is batch


def test_buckets_need_a_table_of_sizes():
    with pytest.raises(InputError, match=f"data.source.records={TABLED + 1}: at most {TABLED}"):
        Loader(Shapes(records=TABLED + 1).open(), Data(size=512, buckets=True), inputs=("image",))
    reader = Shapes(records=64, size=512, aspects=(1.0, 4.0)).open()
    with Loader(reader, Data(batch=4, size=512, buckets=True), inputs=("image",)) as loader:
        shapes = {loader.shape for _ in range(8) if next(loader)}
    assert shapes == set(loader.layouts) == {(512, 512), (1024, 256)}


def test_batches_of_several_sizes():
    """Scales take their turn where aspects have had theirs; the scenes do not hear of it."""
    source = Shapes(records=64, size=64, aspects=(1.0, 4.0), scales=(1.0, 1.0, 2.0))
    reader, own = source.open(), ((64, 64), (128, 32), (128, 128), (256, 64))
    assert reader.sizes[:7].tolist() == [[64, 64], [32, 128], [64, 64], [32, 128], [128, 128], [64, 256], [64, 64]]
    plain = Shapes(records=64, size=64, aspects=(1.0, 4.0)).open()
    assert [reader.scene(i) for i in range(64)] == [plain.scene(i) for i in range(64)]
    assert reader.fingerprint() != plain.fingerprint()
    with Loader(reader, Data(batch=4, size=64, buckets=own), inputs=("image",)) as loader:
        found = [loader.shape for _ in range(14) if next(loader)]  # an epoch
    assert set(loader.layouts) == set(own) and all(found.count(shape) == n for shape, n in zip(own, (5, 5, 2, 2)))


def test_things_that_keep_their_pixels():
    """The same sizes, grid and distances in pixels whatever the picture; with `grow` shares of its shorter side."""
    fields = dict(records=96, size=64, aspects=(1.0, 5 / 4), scales=(1.0, 2.0), turn=0.0, jitter=0.0, grid=1 / 4, apart=0.06)
    radii, farthest = {True: set(), False: set()}, 0
    for grow in (True, False):
        reader = Shapes(**fields, grow=grow).open()
        for i, (width, height) in enumerate(reader.sizes.tolist()):
            scene = reader.scene(i)
            pixels = height / scene.height  # in a unit
            places = np.array([(thing.x, thing.y) for thing in scene.things]) * pixels
            radii[grow] |= {round(thing.radius * pixels) for thing in scene.things}
            if not grow:
                assert pixels == width / scene.width == 64 and np.all(places % 16 == 0)
                farthest = max(farthest, places.max())
            image = shapes_render.paint(shapes_render.pack(scene)[None], height, width, np)[0]
            for thing, (x, y) in zip(scene.things, places):
                if thing.shape in ("circle", "square", "star", "cross"):  # which have their middle
                    assert np.abs(image[int(y), int(x)] * 255 - COLOURS[thing.colour]).max() < 1
        if not grow:
            assert reader.sizes[:4].tolist() == [[64, 64], [64, 80], [128, 128], [128, 160]]
    assert len(radii[False]) == len(SIZES) < len(radii[True])
    assert farthest > 112, "the room of larger pictures is used"
    assert Shapes(**fields, grow=False).open().fingerprint() != Shapes(**fields).open().fingerprint()
    with pytest.raises(InputError, match="data.source.grow=2: "):
        Shapes(grow=2).open()
    with pytest.raises(InputError, match=r"data.source.scales=\(1.0, 0.5\): must be at least 1 with data.source.grow=False"):
        Shapes(scales=(1.0, 0.5), grow=False).open()


def test_what_can_be_wrong_is_told(monkeypatch):
    monkeypatch.setattr(check, "SCENES", 300)
    found = check.check(Shapes().open(), size=64, aspect=False)
    assert check.report(found)[0] == "the first 300 of 2147483647 records, 300 can be trained on" and not found.wrong

    class Broken(type(Shapes().open())):
        def __getitem__(self, i):
            record = super().__getitem__(i)
            return record._replace(arrays={"scene": record.arrays["scene"] * (np.nan if i == 3 else 1)})

    reader = Broken(Shapes(records=5))
    assert list(check.check(reader, size=64, aspect=False).bad) == ["features"]
    (batch,) = [b for b in batches(2, reader=reader, batch=5) if (b["weight"] == 0).sum() == 1][:1]
    assert not batch["scene"][batch["weight"] == 0].any()


def test_fields_from_a_command_line():
    said = {"grid": "0.125", "apart": "none", "textures": "('plain', 'dots')", "kinds": '(("one", 0.5), ("two", 0.5))'}
    wanted = Shapes(grid=0.125, textures=("plain", "dots"), kinds=(("one", 0.5), ("two", 0.5)))
    assert overrides.override(Shapes(apart=0.1), said) == (wanted, []) and wanted.open()
    _, problems = overrides.override(Shapes(), {"kinds": "('one', 1)", "grid": "1/8"})
    assert [line.split(": must be ")[1] for line in problems] == [
        "a tuple of a tuple of a text, a finite number", "a finite number or none"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(records=0), "records=0"),
        (dict(records=2**31), "records=2147483648"),
        (dict(size=-1), "size=-1"),
        (dict(aspects=(0.0,)), "aspects=0.0"),
        (dict(aspects=()), "aspects"),
        (dict(aspects=1.0), "aspects=1.0: must be a tuple"),
        (dict(held_out="yes"), "held_out='yes'"),
        (dict(seed=-1), "seed=-1"),
        (dict(turn=-0.1), "turn=-0.1"),
        (dict(turn=float("nan")), "turn=nan"),
        (dict(apart=0.11), "apart=0.11"),
        (dict(apart="far"), "apart='far'"),
        (dict(jitter=0.16), "jitter=0.16"),
        (dict(grid=0.0), "grid=0.0"),
        (dict(grid=0.3), "grid=0.3"),
        (dict(textures=()), r"textures=\(\): must be a tuple"),
        (dict(textures="plain"), "textures='plain': must be a tuple"),
        (dict(textures=("plain", "lines")), "textures='lines'"),
        (dict(kinds=()), r"kinds=\(\): must be a tuple"),
        (dict(kinds=(("one", 0.5, 0.5),)), r"kinds=.*must be pairs"),
        (dict(kinds=(("three", 1.0),)), "kinds='three'"),
        (dict(kinds=(("one", -1.0), ("two", 2.0))), "kinds=-1.0"),
        (dict(kinds=(("one", 0.5), ("two", 0.4))), "kinds=.*shares must be 1 together, they are 0.9$"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(InputError, match=f"data.source.{message}"):
        Shapes(**fields).open()


RUN = """
    SOURCE = Shapes(records=64, size=32)


    @dataclasses.dataclass(frozen=True)
    class Seeing(LanguageModel):
        reads = ("image", "texts")

        def __call__(self, model, frozen, params, batch, keys):
            terms = super().__call__(model, frozen, params, batch, keys)
            seen = jnp.mean(jnp.float32(batch["image"]), axis=(1, 2, 3))
            return terms._replace(weight=batch["weight"], extra={"seen": seen})


    config = language_model(objective=Seeing(), steps=3, checkpoint=Checkpoint(every=3))
"""


def test_a_run_sees_its_captions_and_its_scenes_painted(tmp_path):
    begin = textwrap.dedent(TINY) + "\nfrom sana_jax.data.shapes import Shapes\n"
    (tmp_path / "config.py").write_text(begin + textwrap.dedent(RUN))
    assert train.main([str(tmp_path / "config.py"), f"workdir={tmp_path / 'run'}"]) == 0
    same_batches = batches(3, reader=Shapes(records=64, size=32).open(), size=32)
    wanted = [255 * shapes_render.paint(batch["scene"], 32, 32, np).mean() for batch in same_batches]
    found = lines(tmp_path / "run")
    np.testing.assert_allclose([line["seen"] for line in found], wanted, atol=0.01)
    assert np.ptp(wanted) > 1 and found[0]["loss"] > found[2]["loss"]


def test_previews_are_of_painted_scenes():
    data = Data(**CPU | dict(size=32))
    config = types.SimpleNamespace(data=data, seed=0, objective=types.SimpleNamespace(reads=("image",)))
    shown, rows = previews.first_rows(Shapes().open(), config), batches(1, size=32)[0]
    assert np.array_equal(shown["position"], rows["position"]) and "scene" not in shown
    assert np.abs(shown["image"] - 255 * shapes_render.paint(rows["scene"], 32, 32, np)).max() < 1.01
