"""Safetensors files and folders in and out: what is found, what is refused, how much is held."""

import json
import os
import pathlib
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sana_jax.checkpoints import read, rules, write
from sana_jax.checkpoints.read import choose_variant, find_files, open_checkpoint, variants
from sana_jax.errors import CheckpointError, InputError

STEM = "diffusion_pytorch_model"
SINGLE, INDEX = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"


def save(path, **tensors):
    safetensors.numpy.save_file({k.replace("__", "."): np.asarray(v) for k, v in tensors.items()}, path)


def save_index(path, **weight_map):
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path):
    """a in shard 1, b and c in shard 2."""
    save(tmp_path / "1.safetensors", a=np.float32([1, 2]))
    save(tmp_path / "2.safetensors", b=np.float16([[3]]), c=np.zeros(0, "f"))
    save_index(tmp_path / INDEX, a="1.safetensors", b="2.safetensors", c="2.safetensors")
    return tmp_path


def contents(folder):
    return sorted(p.name for p in folder.iterdir())


def test_single_file(tmp_path):
    save(tmp_path / SINGLE, x__weight=np.float32([[1, 2]]), y=np.float64(3))
    for source in (tmp_path, tmp_path / SINGLE):
        checkpoint = open_checkpoint(source)
        assert checkpoint.header == {"x.weight": ((1, 2), "F32"), "y": ((), "F64")}
        assert checkpoint.source == str(source) and checkpoint.dtypes == {"F32", "F64"}
        tensors = dict(checkpoint.tensors())
        assert tensors["x.weight"].tolist() == [[1, 2]] and tensors["y"].tolist() == 3


def test_shards(sharded):
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.header == {"a": ((2,), "F32"), "b": ((1, 1), "F16"), "c": ((0,), "F32")}
    assert {name: array.tolist() for name, array in checkpoint.tensors()} == {"a": [1, 2], "b": [[3]], "c": []}


def test_names_are_renamed_once(tmp_path):
    save(tmp_path / "model.safetensors", model__a=[1.0], b=[2.0])
    checkpoint = open_checkpoint(tmp_path, ("model",), rename=lambda name: name.removeprefix("model."))
    assert {name: array.item() for name, array in checkpoint.tensors()} == {"a": 1, "b": 2}


def test_bfloat16_stays_bfloat16(tmp_path):
    bits = np.arange(2**16, dtype=np.uint16)  # every bfloat16 that there is
    save(tmp_path / SINGLE, a=bits.view(ml_dtypes.bfloat16))
    checkpoint = open_checkpoint(tmp_path)
    ((_, array),) = checkpoint.tensors()
    assert checkpoint.dtypes == {"BF16"} and array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(array.view(np.uint16), bits)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x", "a/b", "..", ".", "", 3, None])
def test_an_index_never_leads_out_of_its_folder(tmp_path, shard):
    inner = tmp_path / "inner"
    inner.mkdir()
    save(tmp_path / "x.safetensors", a=[1.0])  # is there, and must not be read
    save_index(inner / INDEX, a=shard)
    with pytest.raises(CheckpointError, match="shard .* must be a plain file name|absent") as caught:
        open_checkpoint(inner)
    assert str(inner / INDEX) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, [], {}, "a"])
def test_an_index_without_a_map_is_refused(tmp_path, value):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": value}))
    with pytest.raises(CheckpointError, match="weight_map must be an object"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [(b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[]", "must hold a JSON object, holds a list")],
)
def test_json_that_is_none(tmp_path, text, message):
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / INDEX) in str(caught.value)


def test_absent_shards_are_named(sharded):
    for name in ("1.safetensors", "2.safetensors"):
        (sharded / name).unlink()
    with pytest.raises(CheckpointError, match="absent: 1.safetensors, 2.safetensors"):
        open_checkpoint(sharded)


def test_a_tensor_stored_twice(sharded):
    save(sharded / "1.safetensors", a=[1.0], b=[2.0])
    with pytest.raises(CheckpointError, match="b: stored twice"):
        open_checkpoint(sharded)


def test_two_stored_names_for_one(tmp_path):
    save(tmp_path / SINGLE, a=[1.0], model__a=[2.0])
    with pytest.raises(CheckpointError, match="a: stored twice"):
        open_checkpoint(tmp_path, rename=lambda name: name.removeprefix("model."))


def test_shards_that_contradict_their_index(sharded):
    names = {"a": "2.safetensors", "b": "2.safetensors", "d": "1.safetensors"}
    save_index(sharded / INDEX, **names)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sharded)
    assert str(caught.value).splitlines()[1:] == [
        "  a: the index says 2.safetensors, it is in 1.safetensors",
        "  c: the index says nowhere, it is in 2.safetensors",
        "  d: the index says 1.safetensors, it is in no file",
    ]
    save_index(sharded / INDEX, **{f"n{i:02}": "1.safetensors" for i in range(40)})
    with pytest.raises(CheckpointError, match="n18.*\n  ... and 21 more$"):  # a and n00 to n18 are listed
        open_checkpoint(sharded)


def test_files_that_are_no_safetensors(tmp_path):
    save(tmp_path / SINGLE, a=np.ones(1000))
    whole = (tmp_path / SINGLE).read_bytes()
    length = (8).to_bytes(8, "little")
    for broken in (
        whole[:-1], whole[:4000], whole[:20], whole[:7], b"", whole + b"x", b"\x80\x02}q\x00." * 99,
        length + b"{garbage", (2**62).to_bytes(8, "little") + whole[8:],
        length[:8] + b'{"a":{}}' + whole,
    ):  # fmt: skip
        (tmp_path / SINGLE).write_bytes(broken)
        with pytest.raises(CheckpointError, match="not readable as safetensors .*; fetch the file again") as caught:
            open_checkpoint(tmp_path)
        assert str(tmp_path / SINGLE) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    save(tmp_path / SINGLE, a=np.ones(1000))
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:500])
    with pytest.raises(CheckpointError, match="not readable"):
        list(checkpoint.tensors())


def test_folders_without_weights(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=f"no weights, expected {STEM}.safetensors or model.safetensors"):
            open_checkpoint(folder)
    save(tmp_path / f"{STEM}-00001-of-00002.safetensors", a=[1.0])  # half of a download
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="no weights"):
        open_checkpoint(tmp_path)


def test_variants(tmp_path):
    save(tmp_path / f"{STEM}.fp16.safetensors", a=[1.0])
    assert find_files(tmp_path, (STEM,)) == ([tmp_path / f"{STEM}.fp16.safetensors"], None), "the only one"
    save(tmp_path / "shard.safetensors", a=[1.0])
    save_index(tmp_path / f"{STEM}.safetensors.index.bf16.json", a="shard.safetensors")
    with pytest.raises(InputError, match="no plain weights, and variants bf16, fp16: choose one with variant=$"):
        find_files(tmp_path, (STEM,))
    assert find_files(tmp_path, (STEM,), "bf16")[0] == [tmp_path / "shard.safetensors"]
    assert find_files(tmp_path, (STEM,), "fp16")[0] == [tmp_path / f"{STEM}.fp16.safetensors"]
    with pytest.raises(InputError, match=f"expected {STEM}.fp32.safetensors"):
        find_files(tmp_path, (STEM,), "fp32")
    save(tmp_path / SINGLE, a=[1.0])
    assert find_files(tmp_path, (STEM,))[0] == [tmp_path / SINGLE], "the plain file comes first"


@pytest.mark.parametrize(
    "available, wanted, published, chosen",
    [
        ({None}, None, None, None), ({None, "bf16", "fp16"}, None, None, None), ({None, "fp16"}, None, "fp16", None),
        ({None, "bf16", "fp16"}, "bf16", None, "bf16"), ({None, "bf16", "fp16"}, "fp16", "bf16", "fp16"),
        ({None, "bf16"}, "fp32", None, None), ({None, "fp16"}, "bf16", None, None),
        ({"bf16", "fp16"}, None, "fp16", "fp16"), ({"bf16", "fp16"}, "fp32", "bf16", "bf16"),
        ({"fp16"}, "fp32", None, "fp16"), ({"int8"}, "bf16", "fp16", "int8"),
        ({"bf16", "fp16"}, None, None, InputError), ({"int8", "fp16"}, "bf16", None, InputError), (set(), "fp32", None, InputError),
    ],
)  # fmt: skip
def test_the_policy_of_variants(available, wanted, published, chosen):
    if chosen is not InputError:
        assert choose_variant(available, wanted, published) == chosen
        return
    with pytest.raises(InputError, match="vae: no plain weights, and variants .*variant=|vae: no weights in") as caught:
        choose_variant(available, wanted, published, source="vae")
    assert all(name in str(caught.value) for name in available)


def test_variants_among_file_names():
    names = ["config.json", f"{STEM}.fp16.safetensors", INDEX, f"{STEM}-00001-of-00002.safetensors", "model.bin"]
    names += [f"{STEM}.safetensors.index.bf16.json", f"{STEM}.bf16-00001-of-00002.safetensors", "other.int8.safetensors"]
    assert variants(names) == {None, "fp16", "bf16"}
    assert variants(["model.safetensors"], ("model",)) == {None} and variants(["model.safetensors"], (STEM,)) == set()


def test_writing_one_file(tmp_path):
    tensors = {"a": np.float32([[1, 2]]), "b": np.asarray([3, 4], ml_dtypes.bfloat16)[::-1]}
    write.write_safetensors(tmp_path / "deep" / "folder", STEM, tensors.items())
    folder = tmp_path / "deep" / "folder"
    assert contents(folder) == [SINGLE]
    assert folder.joinpath(SINGLE).stat().st_mode & 0o777 == 0o666 & ~write.umask()
    back = dict(open_checkpoint(folder).tensors())
    assert {k: (v.dtype, v.tolist()) for k, v in back.items()} == {
        k: (v.dtype, v.tolist()) for k, v in tensors.items()
    }


def test_shards_are_filled_and_read_back(tmp_path):
    tensors = {f"t{i}": np.full(size, i, "f") for i, size in enumerate([10, 10, 5, 60, 5, 5, 5, 25])}
    write.write_safetensors(tmp_path, STEM, tensors.items(), shard_bytes=100)
    held = [[0, 1, 2], [3], [4, 5, 6], [7]]  # t3 alone is larger than a shard may be
    names = [f"{STEM}-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert contents(tmp_path) == sorted([*names, INDEX])
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 500
    assert index["weight_map"] == {f"t{i}": name for name, ids in zip(names, held) for i in ids}
    back = dict(open_checkpoint(tmp_path).tensors())
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("first, second", [(100, 10**9), (10**9, 100)])
def test_a_second_save_replaces_the_first(tmp_path, first, second):
    """An index of yesterday beside the file of today would be read instead of it."""
    for value, shard_bytes in ((1, first), (2, second)):
        write.write_safetensors(tmp_path, STEM, [(n, np.full(20, value, "f")) for n in "abc"], shard_bytes)
    assert {array[0] for _, array in open_checkpoint(tmp_path).tensors()} == {2}
    assert (SINGLE in contents(tmp_path)) != (INDEX in contents(tmp_path))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("shard_bytes", [100, 10**9])
def test_a_stream_that_fails_leaves_nothing(tmp_path, error, shard_bytes):
    def stream(value, fail):
        for name in "abcd":
            if fail and name == "d":
                raise error
            yield name, np.full(20, value, "f")

    with pytest.raises(error):
        write.write_safetensors(tmp_path, STEM, stream(1, True), shard_bytes)
    assert contents(tmp_path) == []
    write.write_safetensors(tmp_path, STEM, stream(1, False), shard_bytes)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(error):
        write.write_safetensors(tmp_path, STEM, stream(2, True), shard_bytes)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_disk_that_fills_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        pathlib.Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write.write_safetensors(tmp_path, STEM, [("a", np.ones(3))])
    assert contents(tmp_path) == []


def test_json_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write.write_json(path, {"b": 1, "a": -float("inf")})
    assert read.read_json(path) == {"a": -float("inf"), "b": 1}

    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write.write_json(path, {"c": 2})
    assert contents(tmp_path) == ["config.json"] and "b" in read.read_json(path)


def peak(run):
    """Bytes that `run` held at most beyond what there was before."""
    tracemalloc.start()
    try:
        kept = run()  # noqa: F841  (its result counts)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_more_than_the_leaves_and_two_tensors_are_held(tmp_path):
    """12 tensors of 1 MiB in 3 shards: reading is a stream, and so is writing, shard by shard."""
    mib, count = 2**20, 12
    stream = ((f"l.{i}.weight", np.full((512, 512), i, "f")) for i in range(count))
    wrote = peak(lambda: write.write_safetensors(tmp_path, STEM, stream, shard_bytes=4 * mib))
    assert 4 * mib <= wrote <= 5.5 * mib, "a shard and the tensor that did not fit"
    checkpoint = open_checkpoint(tmp_path)
    assert peak(lambda: list(checkpoint.tensors())) >= count * mib, "a list is seen"
    assert peak(lambda: [None for _ in checkpoint.tensors()]) <= 2.5 * mib

    def load():
        table, shapes = [rules.Rule("l.{i}.weight", "l", rules.LINEAR)], {"l": (count, 512, 512)}
        return rules.to_flax(table, shapes, checkpoint.header, checkpoint.tensors(), np.dtype("f"))

    assert count * mib <= peak(load) <= (count + 2.5) * mib


def test_json_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="config.json: not valid JSON"):
        read.read_json(tmp_path / "config.json")
