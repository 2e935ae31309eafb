"""What can go wrong with a download: one line each, and no bad file is kept."""

import collections
import errno

import huggingface_hub
import pytest
from huggingface_hub import constants
from sana_jax.hub.errors import explain, is_unreachable

from sana_jax.hub import download
from tests.hub_client import NAME, READ, client_here, client_online, fetched, offline, refused  # noqa: F401
from tests.hub_server import Repository, sha256

VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("refusal, message", [
    ((401, None), "if it is private or gated, accept the terms at https://huggingface.co/{}, then `hf auth login`"),
    ((401, "GatedRepo"), "agree to terms first: accept the terms at https://huggingface.co/{}, then `hf auth login`"),
    ((403, "GatedRepo"), "agree to terms first: accept the terms at https://huggingface.co/{}, then `hf auth login`"),
    ((401, "Invalid credentials in Authorization header"), "does not accept your token: `hf auth login`"),
    ((403, None), "forbids it for you: accept the terms at https://huggingface.co/{}, then `hf auth login`"),
    ((403, "Access to this resource is disabled."), "the hub has disabled this repository"),
    ((404, "RepoNotFound"), "no such repository"),
    ((404, "RevisionNotFound"), "has no revision None"),
    ((429, None), "slow down"),
    ((500, None), "trouble of its own (status 500)"),
    ((503, None), "trouble of its own (status 503)"),
    ((418, None), "418"),
])  # fmt: skip
def test_refusals(online, refusal, message):
    server = online(toy=Repository(READ, refusal=refusal))
    said = refused(NAME)
    assert message.format(NAME) in said and said.startswith(f"model={NAME!r}: not a local folder, and the download failed: ")
    assert fetched(server) == []


@pytest.mark.parametrize("refusal, message", [
    ((401, "GatedRepo"), "agree to terms first"), ((403, "GatedRepo"), "agree to terms first"), ((403, None), "forbids it"),
    ((401, None), "if it is private or gated"), ((500, None), "status 500"), ((404, "EntryNotFound"), "no such file"),
])  # fmt: skip
def test_a_gate_before_the_files(online, refusal, message):
    """Of a gated repository anybody may see the list."""
    online(toy=Repository(READ, refusal=refusal, listed=True))
    assert message in refused(NAME)


def test_a_name_that_is_nowhere(online):
    online()
    assert "; did you mean 'Efficient-Large-Model/Sana_600M_512px_diffusers'?" in refused("Efficient-Large-Model/Sana_600M_51px_diffusers")


@pytest.mark.parametrize("model, message", [
    ("sana-1.6", "did you mean 'sana-1.6b'?"), ("sana_sprint_1.6b", "did you mean 'sana-sprint-1.6b'?"),
    ("no/such/folder", "must be a folder in diffusers layout, or a Hugging Face id (owner/name), "),
    ("", "must be a folder"), ("owner/", "must be a folder"), ("owner/a b", "must be"), ("owner/name@", "must be"),
    ("hf://owner", "must be"), ("hf://owner/name//x", "must be"), ("owner/na\nme", r"model='owner/na\nme': must be"),
    ("a\0b", r"model='a\x00b': must be"), ("x" * 5000, "must be"), (None, "must be a path or a Hugging Face id, not a NoneType"),
    (3, "not a int"), ("../name", "no such folder or file"), ("own--er/name", "HFValidationError"),
])  # fmt: skip
def test_what_is_no_name(here, model, message):
    assert message in refused(model)


def test_names():
    assert download.parse("sana-1.6b").repo == "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
    assert download.parse("sana-1.6b@v2")[1:] == ("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", "v2", "")
    assert download.parse("o/n@refs/pr/3")[1:] == ("o/n", "refs/pr/3", "")
    assert download.parse("hf://o/n")[1:] == ("o/n", None, "")
    assert download.parse("hf://o/n/")[1:] == ("o/n", None, "")
    assert download.parse("hf://o/n@v2/a/b.pth")[1:] == ("o/n", "v2", "a/b.pth")
    assert download.parse("hf://o/n@refs/pr/3/a/b.pth")[1:] == ("o/n", "refs/pr/3", "a/b.pth")
    assert download.parse("hf://o/n/a@b.pth")[1:] == ("o/n", None, "a@b.pth")


def test_a_body_that_ends_early_is_resumed(online, here):
    here.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50)  # a resumed download repeats at most one chunk
    server = online(toy=Repository(READ, cut={VAE: 2}))
    folder = download.find_model(NAME, report=None)
    assert (folder / VAE).read_bytes() == READ[VAE]
    assert [line for line in fetched(server) if VAE in line] == [VAE, f"{VAE} from 500", f"{VAE} from 750"]


def test_a_body_that_always_ends_early(online):
    server = online(toy=Repository(READ, cut={VAE: 10**6}))
    assert f"{VAE}: cannot reach" in refused(NAME)
    assert not list(download._cache(NAME).rglob("*.incomplete"))
    server.repositories[NAME].cut.clear()
    before = set(fetched(server))
    del server.log[:]
    assert (download.find_model(NAME, report=None) / VAE).is_file()
    assert VAE in fetched(server) and len(before & set(fetched(server)) - {VAE}) == 0  # finished files were kept


def test_a_changed_body_is_refused_and_not_kept(online):
    server = online(toy=Repository(READ, corrupt={VAE}))
    wrong, right = sha256(b"w" + READ[VAE][1:]), sha256(READ[VAE])
    message = refused(NAME)
    assert f"its sha256 is {wrong}, must be {right}; removed, run again" in message and VAE in message
    assert not (download._snapshot(NAME, "a" * 40) / VAE).exists()
    assert not list((download._cache(NAME) / "blobs").glob(right))
    server.repositories[NAME].corrupt.clear()
    assert (download.find_model(NAME, report=None) / VAE).read_bytes() == READ[VAE]


def test_a_file_that_changed_in_the_cache(online):
    online(toy=Repository(READ))
    path = download.find_model(NAME, report=None) / VAE
    path.write_bytes(b"x" + READ[VAE][1:])
    message = refused(NAME)
    assert "its sha256 is" in message and "delete it and run again" in message and path.exists()
    path.unlink()
    path.write_bytes(READ[VAE][:-1])
    assert "is not the published file" in refused(NAME)


def test_a_table_is_above_the_hub(online, monkeypatch):
    """A pinned repository comes at its revision, and its files must be those of the table."""
    server = online(toy=Repository(READ, commit="b" * 40, branch="other"))
    files = {name: {"size": len(data), "sha256": sha256(data)} for name, data in READ.items()}
    monkeypatch.setitem(download.KNOWN, NAME, {"revision": "b" * 40, "files": files})
    assert download.find_model(NAME, report=None).name == "b" * 40
    files["model_index.json"] = {"size": 8, "sha256": "0" * 64}  # the hub gives no sha256 of a small file
    message = refused(NAME)
    assert "model_index.json is not the published file: its sha256 is " in message and f"must be {'0' * 64}" in message
    files["model_index.json"] = {"size": 3, "sha256": sha256(READ["model_index.json"])}
    assert "has 8 bytes, must have 3" in refused(NAME)
    server.repositories[NAME] = Repository(READ, commit="c" * 40)
    assert download.find_model(NAME, "main", report=None).name == "c" * 40  # asked for by name: not the table's


def test_a_full_disk_is_noticed_before_the_download(online, monkeypatch):
    server = online(toy=Repository(READ))
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 2000, 2000))
    message = refused(NAME)
    assert "it needs 0.0 MB in " in message and "which has 0.0 MB left" in message and "HF_HOME" in message
    assert [name for name in fetched(server) if "safetensors" in name and "index" not in name] == []


def test_a_disk_that_fills_up_on_the_way(online, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blob")

    online(toy=Repository(READ))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    assert "the disk is full; free some space" in refused(NAME)


def test_a_cache_that_cannot_be_written(online, here, tmp_path):
    (tmp_path / "file").touch()
    here.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    online(toy=Repository(READ))
    assert "cannot be written (Not a directory)" in refused(NAME)


def test_a_hub_that_does_not_answer(online, here):
    here.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    online(toy=Repository(READ, slow=0.5))
    assert "did not answer in time; run again" in refused(NAME)


def test_a_page_that_is_no_hub(online):
    online(toy=Repository(READ, commit="../../../x"))
    assert "does not answer as the hub does" in refused(NAME)


class Odd(Exception):
    pass


def test_unknown_errors_become_one_line():
    assert explain(Odd("first\nsecond"), "o/n") == "Odd: first"
    assert explain(Odd(), "o/n") == "Odd: Odd"
    assert not is_unreachable(Odd("first"))


def test_a_branch_that_moved_to_what_cannot_be_fetched(online, monkeypatch):
    """The commit that is whole stays the one that is found without a network."""
    server = online(toy=Repository(READ))
    folder = download.find_model(NAME, report=None)
    changed = READ | {VAE: b"new" + READ[VAE]}
    server.repositories[NAME] = Repository(changed, commit="c" * 40, refusal=(403, "GatedRepo"), listed=True)
    assert "accept" in refused(NAME)
    offline(monkeypatch)
    assert download.find_model(NAME, report=None) == folder


def test_a_small_file_that_changed_in_the_cache(online):
    """The hub gives no sha256 of it, the record does."""
    online(toy=Repository(READ))
    path = download.find_model(NAME, report=None) / "vae/config.json"
    path.write_bytes(b"x" * len(READ["vae/config.json"]))
    assert "vae/config.json is not the published file" in refused(NAME)
