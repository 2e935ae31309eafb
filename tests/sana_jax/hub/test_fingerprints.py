"""sha256 of files and of models: what is covered, what is remembered."""

import hashlib
import json
import os
import pathlib

import pytest

from sana_jax.errors import InputError
from sana_jax.hub import fingerprints, folders
from tests.hub_client import READ


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "sana_jax"


@pytest.fixture
def model(tmp_path):
    for name, data in READ.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "model"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def never(*_):
    raise AssertionError("the file was read again")


def test_the_cache_follows_the_environment(cache, monkeypatch):
    assert fingerprints.cache_folder() == cache
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert fingerprints.cache_folder() == pathlib.Path.home() / ".cache" / "sana_jax"


def test_a_file_is_read_once(tmp_path, monkeypatch):
    file = tmp_path / "ä \udcff.bin"  # a name that is not UTF-8
    file.write_bytes(b"one")
    assert fingerprints.file_sha256(file) == sha256(b"one")
    monkeypatch.setattr(fingerprints.hashlib, "file_digest", never)
    assert fingerprints.file_sha256(str(file)) == sha256(b"one")
    (tmp_path / "link").symlink_to(file)
    assert fingerprints.file_sha256(tmp_path / "link") == sha256(b"one")


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    before = file.stat()
    assert fingerprints.file_sha256(file) == sha256(b"one")
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # whatever the clock's grain
    assert fingerprints.file_sha256(file) == sha256(b"two")
    file.write_bytes(b"longer")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert fingerprints.file_sha256(file) == sha256(b"longer")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'"a"', b"\xff", b"[" * 10**5, "sha256: null", "sha256: zz", "other size"])
def test_damaged_notes_are_made_anew(tmp_path, cache, damage):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    fingerprints.file_sha256(file)
    (note,) = (cache / "sha256").iterdir()
    held = json.loads(note.read_text())
    changes = {"sha256: null": {"sha256": None}, "sha256: zz": {"sha256": "zz"}, "other size": {"size": 9, "sha256": "0" * 64}}
    note.write_bytes(damage if isinstance(damage, bytes) else json.dumps(held | changes[damage]).encode())
    assert fingerprints.file_sha256(file) == sha256(b"one")
    assert json.loads(note.read_text()) == held


def test_without_a_cache_it_is_only_slower(tmp_path, cache):
    (tmp_path / "xdg").write_bytes(b"")  # a file where the folder should be
    (tmp_path / "file").write_bytes(b"one")
    assert fingerprints.file_sha256(tmp_path / "file") == sha256(b"one")


def test_a_note_is_whole_or_absent(cache, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fingerprints.os, "replace", broken)
    with pytest.raises(OSError):
        fingerprints.write_atomically(cache / "note", "text")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("path", ["absent", "."])
def test_what_cannot_be_read(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        fingerprints.file_sha256(path)


def test_a_model_is_the_files_that_it_reads(model):
    lines = [f"{sha256(data)}  {name}\n" for name, data in sorted(READ.items())]
    whole = sha256("".join(lines).encode())
    assert fingerprints.model_sha256(model) == whole
    assert fingerprints.model_sha256_in_background(str(model)).result() == whole
    for unused in ("README.md", "transformer/diffusion_pytorch_model.bin", "tokenizer/tokenizer.model"):
        (model / unused).write_bytes(b"not read")
    assert fingerprints.model_sha256(model) == whole


@pytest.mark.parametrize("name", READ)
def test_every_file_counts(model, name):
    before = fingerprints.model_sha256(model)
    (model / name).write_bytes(READ[name] + b" ")
    assert fingerprints.model_sha256(model) != before


def test_of_several_variants_the_one_that_is_read_counts(model):
    plain = fingerprints.model_sha256(model)
    for name in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        (model / f"{name}.bf16.safetensors").write_bytes(name.encode())
    assert fingerprints.model_sha256(model) == plain == fingerprints.model_sha256(model, wanted="fp32")
    bfloat = fingerprints.model_sha256(model, "bf16")
    assert bfloat != plain and bfloat == fingerprints.model_sha256(model, wanted="bf16")
    (model / "vae/diffusion_pytorch_model.bf16.safetensors").unlink()
    with pytest.raises(InputError, match="vae: variant='bf16' is not there; variants here: plain"):
        fingerprints.model_sha256(model, "bf16")


def test_a_part_of_a_pipeline_needs_no_other(model):
    for name in READ:
        if name.split("/")[0] not in ("text_encoder", "tokenizer", "model_index.json"):
            (model / name).unlink()
    kept = sorted(name for name in READ if (model / name).is_file())
    lines = "".join(f"{sha256(READ[name])}  {name}\n" for name in kept)
    assert fingerprints.model_sha256(model, part="text_encoder") == sha256(lines.encode())
    with pytest.raises(InputError, match="part='text': must be one of 'transformer', 'vae', 'text_encoder'"):
        fingerprints.model_sha256(model, part="text")


def test_a_component_and_a_file(model):
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    lines = "".join(f"{sha256(READ[f'vae/{name}'])}  {name}\n" for name in names)
    assert fingerprints.model_sha256(model / "vae") == sha256(lines.encode())
    file = model / "vae" / names[1]
    assert fingerprints.model_sha256(file) == sha256(READ[f"vae/{names[1]}"])


def test_what_is_no_model(tmp_path):
    for path, message in [(tmp_path / "absent", "cannot be read"), (tmp_path, "is no model in diffusers layout")]:
        with pytest.raises(InputError, match=message):
            fingerprints.model_sha256(path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x.safetensors"}}',
                                   '{"weight_map": {"a": "x.bin"}}', "[]"])  # fmt: skip
def test_an_index_that_is_none(model, index):
    (model / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError):
        fingerprints.model_sha256(model)


@pytest.mark.parity
def test_what_the_loader_opens_is_what_is_fingerprinted(toy_folder):
    """Weights, configurations and tokenizer: no file that `load_pipeline` opens is left out."""
    import sys

    import sana_jax

    opened, listening = set(), True

    def audit(event, arguments):  # stays for as long as the process, deaf after this test
        if listening and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            opened.add(os.fspath(arguments[0]))

    sys.addaudithook(audit)
    sana_jax.load_pipeline(toy_folder)
    listening = False
    inside = {os.path.relpath(path, toy_folder).replace(os.sep, "/") for path in opened if str(toy_folder) in path}
    inside |= {name for name in folders.names_in(toy_folder) if name.endswith(".safetensors")}  # opened by Rust
    assert "tokenizer/tokenizer_config.json" in inside
    assert inside <= set(folders.files_read(toy_folder)) | {"tokenizer/config.json"}
