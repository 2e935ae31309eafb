"""Parameters laid over eight devices straight from files: the same bits, the expected pieces."""

import contextlib
import os
import re
import socket
import subprocess
import sys

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from sana_jax import saving, sharding
from sana_jax.components import load_dc_ae, load_gemma2, load_sana, sharding_table
from sana_jax.errors import CheckpointError, InputError
from sana_jax.models import sana as models
from sana_jax.models.dc_ae import DC_AE_F32C32_SANA, DCAE
from sana_jax.models.gemma2 import GEMMA2_2B, Gemma2
from sana_jax.parameters import parameter_shapes
from sana_jax.sharding import make_mesh
from tests.quick import xla_flags

SANA = models.Sana(width=64, depth=3, heads=2, cross_heads=4, caption_width=32, qk_norm=True, sample_size=16)
TOY = {
    "sana": (SANA, load_sana, "diffusion_pytorch_model"),
    "gemma2": (Gemma2(64, 32, 2, 4, 2, 8, 48), load_gemma2, "model"),
    "dc_ae": (
        DCAE(widths=(16, 16, 32, 32, 64, 64), encoder_depths=(1,) * 6, decoder_depths=(1,) * 6),
        load_dc_ae, "diffusion_pytorch_model",
    ),
}  # fmt: skip


def flat(params):
    return flax.traverse_util.flatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder} of random weights, in shards of 100 kB."""
    found, rng = {}, np.random.default_rng(0)
    for name, (module, _, stem) in TOY.items():
        leaves = {
            path: rng.normal(size=shape, scale=shape[-2] ** -0.5 if path.endswith("kernel") else 0.2).astype("f")
            for path, shape in parameter_shapes(module).items()
        }
        found[name] = tmp_path_factory.mktemp(name) / "part"
        saving.save_component(found[name], stem, module, flax.traverse_util.unflatten_dict(leaves, sep="/"))
    return found


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(tensor=4, data=2), dict(data=8)])
@pytest.mark.parametrize("name", TOY)
def test_sharded_is_the_same_bit_for_bit(folders, name, sizes):
    module, load, _ = TOY[name]
    mesh = make_mesh(**sizes)
    loaded, params = load(folders[name], mesh=mesh)
    whole, expected = load(folders[name])
    assert loaded == whole == module
    shapes = parameter_shapes(module)
    specs = sharding.shardings(shapes, sharding_table(module), mesh)
    for (path, leaf), reference in zip(flat(params).items(), flat(expected).values(), strict=True):
        assert leaf.sharding == specs[path] and leaf.dtype == reference.dtype
        reference = np.asarray(reference)
        assert np.asarray(leaf).tobytes() == reference.tobytes(), path
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == reference[shard.index].tobytes(), path


def test_pieces_are_as_the_table_says(folders):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params = flat(load_sana(folders["sana"], mesh=mesh)[1])
    found = {path: (leaf.sharding.spec, leaf.sharding.shard_shape(leaf.shape)) for path, leaf in params.items()}
    assert found["blocks/self_attn/qkv/kernel"] == (PartitionSpec(None, "fsdp", "tensor"), (3, 32, 96))
    assert found["blocks/mix_ffn/project/kernel"] == (PartitionSpec(None, "tensor", "fsdp"), (3, 80, 32))
    assert found["key_value/kv/bias"] == (PartitionSpec(None, "tensor"), (3, 64))
    assert found["blocks/modulation"][1] == (3, 6, 64) and found["head/out/bias"][1] == (32,)
    gemma = flat(load_gemma2(folders["gemma2"], mesh=mesh)[1])
    assert gemma["embedding"].sharding.shard_shape(gemma["embedding"].shape) == (32, 16)
    # One head of qkv is 3 * 32 columns in a row: each device has whole heads.
    whole = np.asarray(flat(load_sana(folders["sana"])[1])["blocks/self_attn/qkv/kernel"])
    shard = params["blocks/self_attn/qkv/kernel"].addressable_shards[1]  # the second along "tensor"
    assert np.array_equal(np.asarray(shard.data), whole[:, :32, 96:])


def test_velocity_through_sharded_parameters(folders):
    rng = np.random.default_rng(1)
    x, states = rng.normal(size=(4, 6, 4, 32)).astype("f"), rng.normal(size=(4, 9, 32)).astype("f")
    t, mask = jnp.array([999.0, 500, 3, 136]), np.arange(9) < np.array([[9], [3], [1], [5]])
    run = jax.jit(SANA.apply)
    expected = run({"params": load_sana(folders["sana"])[1]}, x, t, states, mask)
    assert (largest := np.abs(np.asarray(expected)).max()) > 1
    for sizes in (dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)):
        params = load_sana(folders["sana"], mesh=make_mesh(**sizes))[1]
        assert np.abs(np.asarray(run({"params": params}, x, t, states, mask)) - np.asarray(expected)).max() <= 1e-6 * largest
        wrong = jax.tree.map(lambda leaf: leaf * 1.001, params)
        assert np.abs(np.asarray(run({"params": wrong}, x, t, states, mask)) - np.asarray(expected)).max() > 1e-4 * largest


PUBLISHED = {
    "0.6B": models.SANA_600M, "1.6B": models.SANA_1600M, "1.5 4.8B": models.SANA_1_5_4800M,
    "Sprint 0.6B": models.SANA_SPRINT_600M, "Sprint 1.6B": models.SANA_SPRINT_1600M,
    "Gemma-2-2b": GEMMA2_2B, "DC-AE": DC_AE_F32C32_SANA,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_are_total_and_published_sizes_divide(name):
    """Shapes alone.  The warning of uneven leaves would be an error here."""
    module = PUBLISHED[name]
    shapes, table = parameter_shapes(module), sharding_table(module)
    axes = sharding.logical_axes(shapes, table)
    assert axes.keys() == shapes.keys()
    total = sum(np.prod(shape, dtype=int) for shape in shapes.values())
    whole = sharding.bytes_per_device(shapes, sharding.shardings(shapes, table, make_mesh(data=8)), 1)
    assert whole == total
    for sizes in (dict(fsdp=8), dict(tensor=8), dict(data=2, fsdp=2, tensor=2)):
        specs = sharding.shardings(shapes, table, make_mesh(**sizes))
        share = sharding.bytes_per_device(shapes, specs, 1) / total
        parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
        if name == "DC-AE":
            assert share == 1
        elif "fsdp" in sizes:  # all but vectors and modulation
            assert 1 / parts <= share < 1 / parts + 0.01


def test_every_row_of_a_table_is_used():
    used = {"sana": ("0.6B", "Sprint 0.6B"), "gemma2": ("Gemma-2-2b",)}
    for table, names in ((sharding.SANA, used["sana"]), (sharding.GEMMA2, used["gemma2"])):
        paths = {path for name in names for path in parameter_shapes(PUBLISHED[name])}
        for pattern, _ in table:
            assert any(re.fullmatch(pattern, path) for path in paths), pattern


def test_a_table_that_is_not_total_is_refused():
    table = [("a/.*", ("embed",)), (".*/b", ("embed",)), ("c", ("embed", "heads")), ("d", ("colour",))]
    with pytest.raises(ValueError) as caught:
        sharding.logical_axes({"a/x": (2,), "a/b": (2,), "c": (2,), "d": (2,), "e": (2,)}, table)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "a/b: 2 rows match, must be one",
        "c: 1 axes, its row names 2",
        "d: no rule for ['colour']",
        "e: 0 rows match, must be one",
    ]


def test_axes_that_do_not_divide_stay_whole(folders):
    mesh = make_mesh(fsdp=3, tensor=2, devices=jax.devices()[:6])
    with pytest.warns(UserWarning, match=r"mesh data=1, fsdp=3, tensor=2: does not divide 14 of \d+ leaves .*kept whole there"):
        params = load_sana(folders["sana"], mesh=mesh)[1]
    kernel = flat(params)["blocks/self_attn/qkv/kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, None, "tensor") and len(kernel.sharding.device_set) == 6


def test_meshes_that_are_refused(folders):
    with pytest.raises(InputError, match=r"data=2 \* fsdp=2 \* tensor=1: must be the number of devices, 8"):
        make_mesh(data=2, fsdp=2)
    with pytest.raises(InputError, match=r"mesh: axes \['model'\] are not known, must be among data, fsdp, tensor"):
        load_sana(folders["sana"], mesh=Mesh(np.array(jax.devices()), ("model",)))
    one = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    assert flat(load_sana(folders["sana"], mesh=one)[1])["patch_embed/kernel"].sharding.spec == PartitionSpec(None, "fsdp")
    explicit = jax.make_mesh((8,), ("fsdp",), axis_types=(sharding.AxisType.Explicit,))
    params = load_sana(folders["sana"], mesh=explicit)[1]
    out = jax.jit(lambda p: p["patch_embed"]["kernel"] @ p["caption_embed"]["mlp_2"]["kernel"])(params)
    assert out.shape == (32, 64)


def test_nan_is_found_in_sharded_weights(folders, tmp_path):
    module, params = load_sana(folders["sana"])
    leaves = flat(params)
    broken = leaves["blocks/mix_ffn/expand/kernel"].at[1, 3, 5].set(jnp.nan)
    leaves = leaves | {"blocks/mix_ffn/expand/kernel": broken}
    saving.save_component(tmp_path, "model", module, flax.traverse_util.unflatten_dict(leaves, sep="/"))
    with pytest.raises(CheckpointError, match="transformer_blocks.1.ff.conv_inverted.weight$"):
        load_sana(tmp_path, mesh=make_mesh(fsdp=8))


PROCESS = """
import sys
import jax, numpy as np
from sana_jax.components import load_sana
from sana_jax.sharding import make_mesh
folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, index)
assert (jax.device_count(), jax.local_device_count()) == (4, 2)
_, params = load_sana(folder, mesh=make_mesh(fsdp=4))
module, whole = load_sana(folder)
for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
    assert len(leaf.sharding.device_set) == 4 and len(leaf.addressable_shards) == 2
    for shard in leaf.addressable_shards:
        assert np.array_equal(np.asarray(shard.data), np.asarray(expected)[shard.index])
print("cut:", sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params)))
"""


def test_two_processes_hold_two_pieces_each(folders, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (tmp_path / "process.py").write_text(PROCESS)
    env = os.environ | {"XLA_FLAGS": xla_flags(devices=2), "PYTHONPATH": os.getcwd()}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(tmp_path / "process.py"), str(folders["sana"]), str(port), str(index)],
                    env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )
            for index in range(2)
        ]  # fmt: skip
        for process in processes:
            stack.callback(process.kill)
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0 and out.strip() == "cut: 14", err[-2000:]


@pytest.mark.parity
def test_a_whole_pipeline_over_eight_devices(toy_folder):
    import sana_jax

    size = dict(height=64, width=96, bin_resolution=False, steps=2, output="latent", num_images=2)
    images = [
        sana_jax.load_pipeline(toy_folder, mesh=mesh).generate("a red cat", **size)
        for mesh in (None, make_mesh(data=2, fsdp=2, tensor=2))
    ]
    assert np.abs(images[0]).max() > 0.1 and np.abs(images[0] - images[1]).max() <= 1e-5


def test_copies_count_where_memory_is_asked_for(folders, monkeypatch):
    """What is cut over eight devices is there once, what is not eight times."""
    from sana_jax import memory
    from sana_jax.components import prepare_dc_ae, prepare_sana

    cut, copied = make_mesh(fsdp=8), make_mesh(data=8)
    sana, dc_ae = prepare_sana(folders["sana"]), prepare_dc_ae(folders["dc_ae"])
    assert sana.bytes_held(copied) == 8 * sana.bytes_held() and dc_ae.bytes_held(cut) == 8 * dc_ae.bytes_held()
    assert sana.bytes_held() < sana.bytes_held(cut) < 4 * sana.bytes_held()  # its norms and biases are copied
    monkeypatch.setattr(memory, "host_memory", lambda: (4 * sana.bytes_held(), None))
    load_sana(folders["sana"], mesh=cut)
    with pytest.raises(InputError, match="its weights alone need"):
        load_sana(folders["sana"], mesh=copied)
