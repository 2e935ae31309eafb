"""Pickled checkpoints: hostile ones are refused unexecuted, honest ones become safetensors.

A hostile file here would create a sentinel file.  `test_the_payloads_are_live` runs every payload with the
unrestricted reader in a process of its own: what is refused below would have done something.
"""

import io
import os
import random
import re
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from sana_jax import unpickle
from sana_jax.checkpoints import pickles
from sana_jax.checkpoints.read import find_files, open_checkpoint
from sana_jax.errors import CheckpointError, InputError


def text(value):  # BINUNICODE
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def archive(pickle, *more, method=zipfile.ZIP_STORED):
    """A zip as torch.save writes it around the bytes of a pickle; `more` are (name, bytes)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in [("x/data.pkl", pickle), ("x/byteorder", b"little"), ("x/version", b"3\n"), *more]:
            file.writestr(name, data)
    return out.getvalue()


def payloads(sentinel):
    """{name: (the bytes of a pickle that creates the sentinel, a part of the refusal)}."""
    touch, write = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w').close()"
    call = text(touch) + b"\x85R"  # one argument, REDUCE
    return {
        "os.system": (b"\x80\x02cposix\nsystem\n" + call + b".", "asks for posix.system"),
        "builtins.exec": (b"\x80\x02c__builtin__\nexec\n" + text(write) + b"\x85R.", "asks for __builtin__.exec"),
        "within a state dict": (
            b"\x80\x02}" + text("state_dict") + b"}" + text("w") + b"cposix\nsystem\n" + call + b"ss.",
            "asks for posix.system",
        ),
        "its name put together": (
            b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + call + b".", "the instruction SHORT_BINUNICODE"
        ),
        "no name in sight": (b"(" + text(touch) + b"iposix\nsystem\n.", "the instruction INST"),
    }  # fmt: skip


KINDS = list(payloads("x"))


def refused(path, message):
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - start < 1
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_are_refused_and_not_executed(tmp_path, kind, zipped):
    pickle, message = payloads(tmp_path / "sentinel")[kind]
    path = tmp_path / "evil.pth"
    path.write_bytes(archive(pickle) if zipped else pickle)
    said = refused(path, message if zipped else "it is no zip archive as torch.save writes")
    assert "nothing was executed" in said
    assert os.listdir(tmp_path) == ["evil.pth"]


@pytest.mark.parametrize("maker, argument", [
    ("__builtin__.bytearray", b"J\xff\xff\xff\x7f"),  # two gigabytes for a number
    ("collections.Counter", b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R"),  # and counted byte by byte
])  # fmt: skip
def test_a_few_bytes_do_not_become_gigabytes(tmp_path, maker, argument):
    module, name = maker.split(".")
    pickle = b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."
    path = tmp_path / "bomb.pth"
    path.write_bytes(archive(b"\x80\x02}" + text("state_dict") + pickle[2:-1] + b"s."))
    refused(path, f"asks for {maker}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_payloads_are_live(tmp_path, kind):
    """Negative control, in a process of its own."""
    (tmp_path / "pickle").write_bytes(payloads(tmp_path / "sentinel")[kind][0])
    code = f"import pickle; pickle.load(open({str(tmp_path / 'pickle')!r}, 'rb'))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parity
def test_torch_itself_would_have_run_one(tmp_path):
    """The same with torch.load(weights_only=False) on the very file that is refused above."""
    path = tmp_path / "evil.pth"
    path.write_bytes(archive(payloads(tmp_path / "sentinel")["within a state dict"][0]))
    code = f"import torch; torch.load({str(path)!r}, weights_only=False)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert (tmp_path / "sentinel").exists()


GOOD = b"\x80\x02}" + text("a") + b"K\x01s."


def forged(data, at, value):
    """The archive with four bytes of each entry of its directory replaced."""
    data, start = bytearray(data), 0
    while (start := data.find(b"PK\x01\x02", start)) >= 0:
        data[start + at : start + at + 4] = struct.pack("<I", value)
        start += 4
    return bytes(data)


def test_hostile_archives_are_refused(tmp_path):
    bomb = archive(GOOD, ("x/data/0", bytes(50 * 2**20)), method=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**20, "50 MB in little"
    cases = {
        bomb: "is not one that torch.save writes",
        archive(GOOD, ("x/../../../etc/x", b"")): "member 'x/../../../etc/x' is not one",
        archive(GOOD, ("/etc/x", b"")): "member '/etc/x' is not one",
        archive(GOOD, ("x/code/a.py", b"")): "member 'x/code/a.py' is not one",
        archive(GOOD, ("y/data.pkl", GOOD)): "must hold one data.pkl",
        archive(GOOD, ("y/data/0", GOOD)): "under one folder",
        forged(forged(archive(GOOD), 24, 2**31), 20, 2**31): "whose members claim",
        forged(archive(GOOD), 24, 2**31): "is not one that torch.save writes",
        archive(GOOD + b"x"): "1 bytes after its pickle",
        archive(GOOD[:-1]): "its pickle is damaged",
        archive(b""): "its pickle is damaged",
        archive(b"\x80\x02X\xff\xff\xff\x7fabc"): "its pickle is damaged",
        archive(bytes(pickles.PICKLE_BYTES + 1)): "a pickle of 8388609 bytes",
        archive(GOOD)[:100]: "its archive is not readable",
        archive(GOOD).replace(b"K\x01s.", b"K\x02s."): "its archive is not readable .*CRC",
        b"PK\x03\x04": "its archive is not readable",
        b"": "it is no zip archive",
        b"\x80\x02" + GOOD: "it is no zip archive",
    }
    for i, (data, message) in enumerate(cases.items()):
        path = tmp_path / f"{i}.pth"
        path.write_bytes(data)
        refused(path, message)


def test_a_pickle_is_never_found_by_itself(tmp_path):
    for name in ("pytorch_model.bin", "model.pth", "diffusion_pytorch_model.bin", "checkpoint.pt"):
        (tmp_path / name).write_bytes(archive(GOOD))
    with pytest.raises(InputError, match="no weights"):
        find_files(tmp_path, ("diffusion_pytorch_model", "model", "pytorch_model"))
    with pytest.raises(InputError, match="no weights"):
        open_checkpoint(tmp_path)


def test_without_torch_there_is_one_sentence(tmp_path, monkeypatch):
    """And likewise with a torch of the years when weights_only had holes."""
    (tmp_path / "a.pth").write_bytes(archive(GOOD))
    for source, message in [
        ("raise ImportError('none here')", r"needs torch >= 2.10, which is not there \(none here\)"),
        ("__version__ = '2.9.1+cpu'", r"torch 2.9.1\+cpu is here, but reading pickles needs >= 2.10"),
    ]:
        fake = tmp_path / "child.py"
        child = pickles.CHILD if pickles.CHILD != fake else child  # noqa: F821
        (tmp_path / "torch.py").write_text(source)
        fake.write_text(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + child.read_text())
        monkeypatch.setattr(pickles, "CHILD", fake)
        with pytest.raises(InputError, match=message) as caught:
            open_checkpoint(tmp_path / "a.pth")
        assert not isinstance(caught.value, CheckpointError) and "\n" not in str(caught.value)


def test_a_child_that_hangs_or_dies_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(archive(GOOD))
    monkeypatch.setattr(pickles, "SECONDS", 0.5)
    left = set(os.listdir(pickles.tempfile.gettempdir()))
    for source, message in [
        ("import time; time.sleep(60)", "not read within 0.5 s"),
        ("import os; os.abort()", "the reader ended with status -6"),
    ]:
        fake = tmp_path / "child.py"
        fake.write_text(source)
        monkeypatch.setattr(pickles, "CHILD", fake)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "a.pth")
    new = set(os.listdir(pickles.tempfile.gettempdir())) - left
    assert not [name for name in new if name.startswith("sana_jax.")], "temporary folders are removed"


# --- Honest files, which torch writes.


def save(path, value):
    import torch

    torch.save(value, path)
    return path


@pytest.fixture
def weights():
    import torch

    return {
        "a": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "b": torch.tensor(1.5, dtype=torch.bfloat16),
        "c": torch.zeros(0, 4),
        "d": torch.arange(3, dtype=torch.float16),
    }


@pytest.mark.parity
def test_a_training_checkpoint_gives_its_weights(tmp_path, weights, monkeypatch):
    import torch

    model = torch.nn.Linear(2, 2)
    state = {
        "state_dict": weights, "state_dict_ema": {"a": torch.ones(1)}, "epoch": 3, "lr": 0.5, "flag": True, "none": None,
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "rng_state": {
            "torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate(),
            "generator": torch.Generator(),
        },
    }  # fmt: skip
    path = save(tmp_path / "epoch_3.pth", state)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not matter
    checkpoint = open_checkpoint(path)
    assert checkpoint.source == str(path)
    assert checkpoint.ignored == ("state_dict_ema", "epoch", "lr", "flag", "none", "optimizer", "rng_state")
    assert checkpoint.header == {"a": ((3, 2), "F32"), "b": ((), "BF16"), "c": ((0, 4), "F32"), "d": ((3,), "F16")}
    tensors = dict(checkpoint.tensors())
    assert tensors["a"].tolist() == [[0, 3], [1, 4], [2, 5]] and float(tensors["b"]) == 1.5
    assert tensors["d"].tolist() == [0, 1, 2]
    folder = checkpoint.scratch.folder
    assert folder.is_dir()
    checkpoint.close()
    assert not folder.exists() and path.exists()
    ema = open_checkpoint(path, entry="state_dict_ema")
    assert ema.header == {"a": ((1,), "F32")} and "state_dict" in ema.ignored
    folder = ema.scratch.folder
    del ema
    assert not folder.exists(), "forgotten is removed"


@pytest.mark.parity
def test_other_shapes_of_pickles(tmp_path, weights):
    import torch

    flat = {"p": torch.nn.Parameter(torch.ones(2))}
    assert open_checkpoint(save(tmp_path / "flat.bin", flat)).header == {"p": ((2,), "F32")}
    for value, kind, message in [
        ({"model": weights, "epoch": 1}, InputError, "has no entry 'state_dict'; its entries are 'model', 'epoch'$"),
        ({"a": torch.ones(1).expand(10**10)}, CheckpointError, "its tensors claim 40000000000 bytes"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, CheckpointError, "asks for torch.ComplexFloatStorage"),
        ({"a": torch.ones(2).to_sparse()}, CheckpointError, "asks for torch._utils._rebuild_sparse_tensor"),
        ({"state_dict": weights, "config": np.float64(1)}, CheckpointError, "asks for numpy._?core.multiarray.scalar"),
        (torch.nn.Linear(2, 2), CheckpointError, "asks for torch.nn.modules.linear.Linear"),
    ]:
        with pytest.raises(kind, match=message) as caught:
            open_checkpoint(save(tmp_path / "odd.pth", value))
        assert type(caught.value) is kind and "\n" not in str(caught.value)
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pth", "it is no zip archive as torch.save writes")


@pytest.mark.parametrize(
    "loaded, message",
    [
        ([1], "holds a list, must hold a dict"),
        ({}, "has no entry 'state_dict'; its entries are none"),
        ({"state_dict": []}, "its entry 'state_dict' is no dict of tensors"),
        ({"state_dict": {}}, "its entry 'state_dict' is no dict of tensors"),
        ({"state_dict": {"a": 3}}, "its entry 'state_dict' holds a int under 'a'"),
        ({"state_dict": {3: 1.0}}, "its entry 'state_dict' holds a float under '3'"),
    ],
)
def test_what_the_child_does_not_choose(loaded, message):
    with pytest.raises(unpickle.Refused, match=re.escape(message)):
        unpickle.choose(loaded, "state_dict", float)


def test_what_the_child_chooses():
    flat, held = {"a": 1.0}, {"state_dict": {"a": 1.0}, "epoch": 3}
    assert unpickle.choose(flat, "state_dict", float) == (flat, [])
    assert unpickle.choose(held, "state_dict", float) == (flat, ["epoch"])


@pytest.mark.parity
def test_a_storage_that_claims_more_than_there_is(tmp_path):
    """Passes the screen, which does not follow the pickle; torch finds it in the child."""
    import torch

    path = save(tmp_path / "a.pth", {"a": torch.ones(200)})
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    lying = members[name].replace(b"K\xc8", b"J" + struct.pack("<i", 2**30))  # 200 elements -> 2**30
    assert lying != members[name]
    with zipfile.ZipFile(path, "w") as file:
        for other, data in members.items():
            file.writestr(other, lying if other == name else data)
    with pytest.raises(CheckpointError, match="torch does not read it|its tensors claim") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parity
def test_a_disk_without_room(tmp_path, weights, monkeypatch):
    """Stands for a full disk: the child may not write there."""
    monkeypatch.setattr(pickles.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "gone"))
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "unpacked.safetensors").mkdir()
    with pytest.raises(InputError, match="no room to unpack it in .*gone .*TMPDIR names another place"):
        open_checkpoint(save(tmp_path / "a.pth", weights))
