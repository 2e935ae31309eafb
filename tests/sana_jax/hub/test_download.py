"""Downloads from a hub on this machine: exactly the files that are read, once, checked, and recorded."""

import json
import os
import pathlib
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants

from sana_jax import precision
from sana_jax.hub import download
from tests.hub_client import (  # noqa: F401
    NAME,
    READ,
    SHARD,
    client_here,
    client_online,
    fetched,
    offline,
    point_to,
    refused,
)
from tests.hub_server import Repository, serve, sha256

BFLOAT = {
    "transformer/diffusion_pytorch_model.bf16.safetensors": b"3" * 500,
    "vae/diffusion_pytorch_model.bf16.safetensors": b"w" * 500,
    "text_encoder/model.bf16.safetensors": b"u" * 500,
}
OTHERS = {
    ".gitattributes": b"", "README.md": b"card", "LICENSE.txt": b"", "asset/picture.png": b"",
    "tokenizer/tokenizer.model": b"pieces", "text_encoder/generation_config.json": b"{}",
    "transformer/diffusion_pytorch_model.bin": b"pickle", "transformer/diffusion_pytorch_model.fp16.safetensors": b"4",
    "safety_checker/config.json": b"{}", "safety_checker/model.safetensors": b"5",
    "transformer/diffusion_pytorch_model-00003-of-00002.safetensors": b"not in the index",
}  # fmt: skip
PLAIN = {name for name in READ if not name.endswith("safetensors") and ".index.json" not in name}


def test_exactly_what_is_read_is_fetched_once(online):
    server = online(toy=Repository(READ | BFLOAT | OTHERS))
    lines = []
    folder = download.find_model(NAME, report=lines.append)
    assert sorted(fetched(server)) == sorted(READ)
    for name, data in READ.items():
        assert (folder / name).read_bytes() == data
    del server.log[:]
    assert download.find_model(f"{NAME}@main", report=lines.append) == folder
    assert server.log == [f"GET /api/models/{NAME}/revision/main"]
    del server.log[:]
    assert download.find_model(NAME, revision="a" * 40, report=lines.append) == folder  # a commit does not move
    assert server.log == [] and len(lines) == 3


def test_licence_size_and_destination_stand_before_the_first_byte(online):
    server = online(toy=Repository(READ | OTHERS))
    seen = []
    folder = download.find_model(NAME, report=lambda line: seen.append((line, list(fetched(server)))))
    (licence, before), (first, _), (second, index_only) = seen
    assert before == [] and "NVIDIA's" in licence and "Gemma" in licence and f"huggingface.co/{NAME}" in licence
    assert first == f"download: 1 of 1 files, 0.0 MB, to {folder}"
    assert second == f"download: 13 of 14 files, 0.0 MB, to {folder}"
    assert index_only == ["transformer/diffusion_pytorch_model.safetensors.index.json"]


@pytest.mark.parametrize(
    "options, weights",
    [({"wanted": "bf16"}, BFLOAT), ({"variant": "bf16"}, BFLOAT), ({"wanted": "fp32"}, set(READ) - PLAIN)],
)  # fmt: skip
def test_one_variant_of_each_component(online, options, weights):
    server = online(toy=Repository(READ | BFLOAT | OTHERS))
    download.find_model(NAME, report=None, **options)
    assert sorted(fetched(server)) == sorted(PLAIN | set(weights))


def test_a_known_repository_comes_in_its_published_dtype(online):
    server = online(toy=Repository(READ | BFLOAT | OTHERS))
    published = "Efficient-Large-Model/Sana_1600M_2Kpx_BF16_diffusers"
    server.repositories[published] = server.repositories[NAME]
    download.find_model("sana-1.6b-2k", report=None)
    assert sorted(fetched(server)) == sorted(PLAIN | set(BFLOAT))
    assert all(precision.published(repo.split("/")[1]) is not None for repo in download.SHORT_NAMES.values())


def test_the_float16_repository_has_a_better_one(online):
    server = online(toy=Repository(READ))
    server.repositories["Efficient-Large-Model/Sana_1600M_1024px_diffusers"] = server.repositories[NAME]
    lines = []
    download.find_model("sana-1.6b-fp16", report=lines.append)
    assert "sana-1.6b is the same model in bfloat16" in lines[0]


def test_a_download_larger_than_the_memory(online, monkeypatch):
    online(toy=Repository(READ))
    monkeypatch.setattr(download.memory, "host_memory", lambda: (1000, 1000))
    lines = []
    download.find_model(NAME, report=lines.append)
    assert any("more than this machine's memory" in line for line in lines)


def test_a_variant_that_is_not_there(online):
    server = online(toy=Repository(READ | OTHERS))
    assert refused(NAME, variant="fp16").endswith("vae: variant='fp16' is not there; variants here: plain")
    assert fetched(server) == []


@pytest.mark.parametrize(
    "part, folders", [("vae", {"vae"}), ("transformer", {"transformer"}), ("text_encoder", {"text_encoder", "tokenizer"})]
)
def test_a_part_of_a_pipeline(online, part, folders):
    server = online(toy=Repository(READ | OTHERS))
    download.find_model(NAME, part=part, report=None)
    assert {name.split("/")[0] for name in fetched(server)} == folders | {"model_index.json"}


def test_a_folder_of_a_repository(online):
    server = online(toy=Repository(READ | OTHERS))
    folder = download.find_model(f"hf://{NAME}/vae", report=None)
    assert (folder.name, sorted(fetched(server))) == ("vae", sorted(n for n in READ if n.startswith("vae/")))
    assert (folder / "diffusion_pytorch_model.safetensors").is_file()
    assert "the repository has no 'vea'" in refused(f"hf://{NAME}/vea")


def test_components_lie_at_the_top_of_their_repository(online):
    gemma = {"config.json": b"{}", "model.safetensors": b"w", "tokenizer.model": b"p", "README.md": b""}
    server = online(gemma=Repository(gemma), vae=Repository({"config.json": b"{}", "model.safetensors": b"w"}))
    download.find_model("owner/gemma", part="text_encoder", report=None)
    download.find_model("owner/vae", report=None)
    assert sorted(fetched(server)) == ["config.json"] * 2 + ["model.safetensors"] * 2 + ["tokenizer.model"]


def test_pickles_only_by_name(online):
    server = online(nvlabs=Repository({"checkpoints/Sana.pth": b"pickle", "README.md": b""}))
    message = refused("owner/nvlabs")
    assert "only pickles" in message and "hf://owner/nvlabs/checkpoints/Sana.pth" in message
    assert fetched(server) == []
    file = download.find_model("hf://owner/nvlabs/checkpoints/Sana.pth", report=None)
    assert file.read_bytes() == b"pickle" and fetched(server) == ["checkpoints/Sana.pth"]


@pytest.mark.parametrize("files, message", [
    ({"README.md": b""}, "neither model_index.json nor config.json"),
    ({"model_index.json": b"{}", "transformer/a.bin": b""}, "transformer: only pickles (a.bin)"),
    ({"model_index.json": b"{}", "transformer/config.json": b""}, "transformer: no weights in safetensors format"),
    ({"config.json": b"{}", "pytorch_model.bin": b""}, "owner/it: only pickles (pytorch_model.bin)"),
])  # fmt: skip
def test_repositories_without_weights(online, files, message):
    server = online(it=Repository(files))
    assert message in refused("owner/it")
    assert fetched(server) == []


def test_a_shard_that_leads_elsewhere(online):
    files = READ | {"transformer/diffusion_pytorch_model.safetensors.index.json": b'{"weight_map": {"a": "../../x"}}'}
    online(toy=Repository(files))
    assert "shard '../../x' must be the plain name" in refused(NAME)


def test_revisions(online):
    server = online(toy=Repository(READ, commit="b" * 40, branch="v1.1"))
    folder = download.find_model(f"{NAME}@v1.1", report=None)
    assert folder == download.find_model(NAME, "v1.1", report=None) and folder.name == "b" * 40
    assert "the repository has no revision 'v2'" in refused(NAME, "v2")
    assert "revision='v2': model=" in refused(f"{NAME}@v1.1", "v2")
    server.repositories[NAME] = Repository(READ | {"sana_jax.json": b'{"stack": "nvlabs"}'}, commit="c" * 40, branch="v1.1")
    moved = download.find_model(f"{NAME}@v1.1", report=None)
    assert moved.name == "c" * 40 and (moved / "sana_jax.json").read_bytes() != (folder / "sana_jax.json").read_bytes()


def test_without_a_network_the_cache_serves(online, here):
    server = online(toy=Repository(READ | OTHERS))
    folder = download.find_model(NAME, report=None)
    del server.log[:]
    offline(here)
    assert download.find_model(NAME, report=None) == folder and server.log == []
    message = refused(NAME, variant="bf16")
    assert "variant='bf16' is not there" in message
    (folder / "vae" / "config.json").unlink()
    message = refused(NAME)
    assert "HF_HUB_OFFLINE=1 forbids it" in message and message.endswith("lacks vae/config.json")
    message = refused("owner/other")
    assert "HF_HUB_OFFLINE=1 forbids it" in message and "`hf download owner/other`" in message


def test_a_cache_that_others_filled_serves_too(online, here):
    """Without our record the snapshot itself says what is there."""
    online(toy=Repository(READ | OTHERS))
    for name in READ:
        if not name.endswith("of-00002.safetensors"):
            huggingface_hub.hf_hub_download(NAME, name, cache_dir=constants.HF_HUB_CACHE)
    offline(here)
    message = refused(NAME)
    assert "the cache (" in message and message.endswith("lacks transformer/" + SHARD.format(1) + ", transformer/" + SHARD.format(2))
    here.setattr(constants, "HF_HUB_OFFLINE", False)
    for number in (1, 2):
        huggingface_hub.hf_hub_download(NAME, "transformer/" + SHARD.format(number), cache_dir=constants.HF_HUB_CACHE)
    offline(here)
    assert (download.find_model(NAME, report=None) / "transformer" / SHARD.format(1)).is_file()


def test_a_hub_that_went_away(online, here):
    server = online(toy=Repository(READ | OTHERS))
    folder = download.find_model(NAME, report=None)
    point_to(here, "http://127.0.0.1:9")  # nobody listens there
    lines = []
    assert download.find_model(NAME, report=lines.append) == folder
    assert len(lines) == 1 and "cannot reach http://127.0.0.1:9" in lines[0] and "cached commit aaaaaaaaaa" in lines[0]
    point_to(here, server.url)
    server.repositories[NAME].refusal = (503, None)
    assert download.find_model(NAME, report=lines.append) == folder and "(status 503)" in lines[1]
    point_to(here, "http://127.0.0.1:9")
    (folder / "sana_jax.json").unlink()
    assert "cannot reach" in refused(NAME) and "lacks sana_jax.json" in refused(NAME)
    assert "cannot reach http://127.0.0.1:9" in refused("owner/other")


def test_records_hold_the_sha256_of_every_fetched_file(online, tmp_path):
    online(toy=Repository(READ | OTHERS))
    download.find_model(NAME, report=None)
    (record,) = (tmp_path / "xdg" / "sana_jax" / "fetched").rglob("*.json")
    held = json.loads(record.read_text())[NAME]
    assert held["revision"] == "a" * 40 and set(held["files"]) == set(READ | OTHERS)
    for name, data in READ.items():
        assert held["files"][name] == {"size": len(data), "sha256": sha256(data)}
    assert held["files"]["README.md"]["sha256"] is None  # not fetched, and the hub does not say


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"x": 1}', json.dumps({NAME: {"files": {"a": 1}}}), "[" * 100_000])
def test_a_damaged_record_is_as_good_as_none(online, tmp_path, damage):
    server = online(toy=Repository(READ | OTHERS))
    folder = download.find_model(NAME, "a" * 40, report=None)
    (record,) = (tmp_path / "xdg" / "sana_jax" / "fetched").rglob("*.json")
    record.write_text(damage)
    del server.log[:]
    assert download.find_model(NAME, "a" * 40, report=None) == folder
    assert server.log == [f"GET /api/models/{NAME}/revision/{'a' * 40}"]


def test_local_paths_are_returned_as_they_are(tmp_path):
    (tmp_path / "file.pth").touch()
    for path in (tmp_path, str(tmp_path), tmp_path / "file.pth"):
        assert download.find_model(path) == pathlib.Path(path)
    assert "has no revisions" in refused(tmp_path, "main")


def test_by_environment_alone(tmp_path):
    """Another process with HF_ENDPOINT and HF_HOME, as a user sets them."""
    code = "import sys; from sana_jax.hub.download import find_model; print(find_model(sys.argv[1]))"
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(download.__file__).parents[2]

    def run(**more):
        done = subprocess.run(
            [sys.executable, "-c", code, NAME], env=environment | more, cwd=root, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    with serve({NAME: Repository(READ | OTHERS)}) as server:
        folder, said = run(HF_ENDPOINT=server.url)
        assert sorted(fetched(server)) == sorted(READ) and "licence: " in said and "download: 13 of 14 files" in said
    assert run(HF_HUB_OFFLINE="1")[0] == folder and folder.startswith(str(tmp_path))
