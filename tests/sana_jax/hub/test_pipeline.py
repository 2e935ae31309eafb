"""A pipeline that diffusers wrote, through a hub on this machine, to the same parameters."""

import jax
import numpy as np
import pytest

import sana_jax
from sana_jax.hub import download
from tests.hub_client import client_here, client_online, fetched, offline  # noqa: F401
from tests.hub_server import Repository

pytestmark = pytest.mark.parity

PUBLISHED = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"


@pytest.fixture(scope="module")
def published(toy_folder, tmp_path_factory):
    """What a repository holds: float32 files in shards, and a bfloat16 variant beside them."""
    import torch

    from tests.toy_pipeline import make_pipeline

    folder = tmp_path_factory.mktemp("published")
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder, max_shard_size="100KB")
    pipeline.to(torch.bfloat16).save_pretrained(folder, variant="bf16")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def leaves(pipeline):
    return jax.tree.leaves([pipeline.sana[1], pipeline.dc_ae[1], pipeline.text.params])


def test_a_short_name(online, here, published, toy_folder):
    server = online(published=Repository(published))
    server.repositories[PUBLISHED] = server.repositories.pop("owner/published")
    pipeline = sana_jax.load_pipeline("sana-1.6b")  # bfloat16, as the table of published dtypes says
    weights = sorted(name for name in fetched(server) if "safetensors" in name)
    assert weights == sorted(name for name in published if "bf16" in name and "index" not in name)
    assert {str(leaf.dtype) for leaf in leaves(pipeline)} == {"bfloat16"}
    offline(here)
    again = sana_jax.load_pipeline(PUBLISHED, revision="a" * 40)
    local = sana_jax.load_pipeline(toy_folder, dtype="bf16")
    for one, two, three in zip(*map(leaves, (pipeline, again, local)), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    words = "A café, 3 red circles"
    assert again.text.tokenizer.encode(words) == local.text.tokenizer.encode(words)


def test_shards_of_float32(online, published, toy_folder):
    server = online(toy=Repository(published))
    pipeline = sana_jax.load_pipeline("Efficient-Large-Model/Sana_Toy_diffusers", dtype="fp32")
    names = fetched(server)
    assert sum("-of-0" in name for name in names) > 6 and not any("bf16" in name for name in names)
    for ours, local in zip(leaves(pipeline), leaves(sana_jax.load_pipeline(toy_folder)), strict=True):
        np.testing.assert_array_equal(ours, local)


def test_parts_from_the_hub(online, published, toy_folder):
    server = online(toy=Repository(published))
    name = "Efficient-Large-Model/Sana_Toy_diffusers"
    pipeline = sana_jax.load_pipeline(toy_folder / "transformer", dtype="fp32", dc_ae=name, text=name)
    assert not any(file.startswith("transformer/") for file in fetched(server))
    for ours, local in zip(leaves(pipeline), leaves(sana_jax.load_pipeline(toy_folder)), strict=True):
        np.testing.assert_array_equal(ours, local)


def test_licences_are_named_before_anything_is_loaded(online, published, capsys):
    online(toy=Repository(published))
    sana_jax.load_pipeline("Efficient-Large-Model/Sana_Toy_diffusers")
    out, err = capsys.readouterr()
    assert err.startswith("licence: ") and "download: " in err and out == ""
    assert str(download._cache("Efficient-Large-Model/Sana_Toy_diffusers")) in err
