"""The names of NVlabs' transformers: every published size, what is dropped, what tells the structure."""

import functools
import re

import numpy as np
import pytest

from sana_jax.checkpoints import rules, sana
from sana_jax.checkpoints.read import Checkpoint
from sana_jax.components import fields_of, published_rules
from sana_jax.errors import CheckpointError, InputError
from sana_jax.models import sana as models
from sana_jax.parameters import parameter_shapes

SIZES = {  # module, parameters, tensors in diffusers' names (docs/numerics.md 1.1), in NVlabs'
    "0.6B": (models.SANA_600M, 591_747_872, 548, 28 * 15 + 16),
    "1.6B": (models.SANA_1600M, 1_604_462_752, 396, 20 * 15 + 16),
    "1.6B 2K": (models.SANA_1600M_2K, 1_604_462_752, 396, 20 * 15 + 16),
    "1.6B 4K": (models.SANA_1600M_4K, 1_604_462_752, 396, 20 * 15 + 16),
    "1.5 1.6B": (models.SANA_1_5_1600M, 1_604_641_952, 476, 20 * 19 + 16),
    "1.5 4.8B": (models.SANA_1_5_4800M, 4_721_825_952, 1396, 60 * 19 + 16),
    "Sprint 0.6B": (models.SANA_SPRINT_600M, 593_501_216, 664, 28 * 19 + 20),
    "Sprint 1.6B": (models.SANA_SPRINT_1600M, 1_610_237_472, 480, 20 * 19 + 20),
}


def published_names(c, depth, h, qk_norm, guidance):
    """{name: shape} of an NVlabs file as docs/numerics.md 2.1 lists them, written out by hand."""

    def both(name, *shape):
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    names = both("x_embedder.proj", c, 32, 1, 1) | both("t_embedder.mlp.0", c, 256) | both("t_embedder.mlp.2", c, c)
    names |= both("t_block.1", 6 * c, c) | both("y_embedder.y_proj.fc1", c, 2304) | both("y_embedder.y_proj.fc2", c, c)
    names |= {"attention_y_norm.weight": (c,), "final_layer.scale_shift_table": (2, c)} | both("final_layer.linear", 32, c)
    if guidance:
        names |= both("cfg_embedder.mlp.0", c, 256) | both("cfg_embedder.mlp.2", c, c)
    for i in range(depth):
        names |= {f"blocks.{i}.scale_shift_table": (6, c), f"blocks.{i}.attn.qkv.weight": (3 * c, c)}
        names |= both(f"blocks.{i}.attn.proj", c, c) | both(f"blocks.{i}.cross_attn.q_linear", c, c)
        names |= both(f"blocks.{i}.cross_attn.kv_linear", 2 * c, c) | both(f"blocks.{i}.cross_attn.proj", c, c)
        names |= both(f"blocks.{i}.mlp.inverted_conv.conv", 2 * h, c, 1, 1)
        names |= both(f"blocks.{i}.mlp.depth_conv.conv", 2 * h, 1, 3, 3)
        names |= {f"blocks.{i}.mlp.point_conv.conv.weight": (c, h, 1, 1)}
        if qk_norm:
            names |= {f"blocks.{i}.{a}.{x}_norm.weight": (c,) for a in ("attn", "cross_attn") for x in "qk"}
    return names


@functools.cache
def shapes_of(size):
    return parameter_shapes(SIZES[size][0])


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_of_every_published_size(size):
    module, parameters, diffusers, nvlabs = SIZES[size]
    hidden = int(2.5 * module.width)
    expected = published_names(module.width, module.depth, hidden, module.qk_norm, module.guidance_embed)
    found = rules.names(published_rules(module, original=True), shapes_of(size))
    assert found == expected
    assert len(found) == nvlabs and len(rules.names(published_rules(module), shapes_of(size))) == diffusers
    assert sum(np.prod(shape, dtype=int) for shape in found.values()) == parameters


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_structure_is_told_by_names_and_shapes(size, original):
    module = SIZES[size][0]
    found = rules.names(published_rules(module, original), shapes_of(size))
    header = {name: (shape, "F32") for name, shape in found.items()}
    assert sana.is_nvlabs(header) == original != sana.is_diffusers(header)
    fields = sana.infer_fields(header)
    assert fields == {name: fields_of(module)[name] for name in fields}
    size = sana.size_fields(header, fields, "Sana_1600M_4Kpx_BF16.pth")
    assert size == (sana.SIZES[1024] if module.qk_norm else sana.SIZES[4096])


@pytest.mark.parametrize(
    "name, pixels",
    [
        ("Sana_600M_512px.pth", 512), ("Sana_1600M_512px_MultiLing.pth", 512), ("Sana_1600M_1024px_BF16.pth", 1024),
        ("Sana_1600M_2Kpx_BF16.pth", 2048), ("Sana_1600M_4Kpx_BF16.safetensors", 4096), ("mine_2048px.pth", 2048),
        ("epoch_3_step_1024.pth", None), ("model.safetensors", None), ("x12Kpx.pth", None),
    ],
)  # fmt: skip
def test_a_file_name_tells_the_resolution(name, pixels):
    found = sana.size_fields({}, {"qk_norm": False}, name)
    assert found == (None if pixels is None else sana.SIZES[pixels])
    if pixels is not None:
        written = sana.nvlabs_file_name(sana.SIZES[pixels])
        assert sana.size_fields({}, {"qk_norm": False}, written) == found


@pytest.mark.parametrize("side, pixels", [(16, 512), (32, 1024), (64, 2048), (128, 4096), (48, None)])
def test_a_stored_position_embedding_counts_more_than_a_name(side, pixels):
    found = sana.size_fields({"pos_embed": ((1, side**2, 8), "F32")}, {"qk_norm": False}, "x_512px.pth")
    assert found == sana.SIZES[pixels or 512]


def test_sizes_are_those_of_the_published_models():
    for module in (models.SANA_1600M, models.SANA_1600M_2K, models.SANA_1600M_4K):
        assert {"sample_size": module.sample_size, "position_scale": module.position_scale} in sana.SIZES.values()
    assert sana.nvlabs_file_name({"sample_size": 7, "position_scale": None}) == "sana.pth"
    assert sana.nvlabs_file_name({"sample_size": 64, "position_scale": 2.0}) == "sana.pth", "no published pair"


def toy_header(**extra):
    names = published_names(64, 2, 160, False, False) | extra
    return {name: (shape, "F32") for name, shape in names.items()}


def test_four_names_are_dropped_and_no_other():
    table = models.Sana(width=64, depth=2, heads=2, cross_heads=4)
    shapes = parameter_shapes(table)
    slots = rules.slots(published_rules(table, original=True), shapes)
    extra = {"pos_embed": (1, 4, 64), "y_embedder.y_embedding": (300, 2304), "logvar_linear.weight": (1, 64), "logvar_linear.bias": (1,)}
    checkpoint = Checkpoint("x.pth", toy_header(**extra, **{"blocks.0.attn.qkv.bias": (192,)}), {}, {})
    checkpoint = checkpoint.without(sana.NVLABS_DROPPED)
    assert sorted(checkpoint.dropped) == sorted(extra)
    with pytest.raises(CheckpointError) as caught:
        rules.check(slots, shapes, checkpoint.header, checkpoint.source)
    lines = str(caught.value).splitlines()
    assert lines == ["x.pth does not fit the model", "  not part of this model (1):", "    blocks.0.attn.qkv.bias"]


def test_files_that_are_no_transformer():
    with pytest.raises(CheckpointError, match="not a SANA transformer in diffusers' or NVlabs' names"):
        sana.infer_fields({"encoder.conv_in.weight": ((3, 3), "F32")})
    header = toy_header()
    del header["blocks.0.mlp.point_conv.conv.weight"]
    with pytest.raises(CheckpointError, match="blocks.0.mlp.point_conv.conv.weight"):
        sana.infer_fields(header)
    with pytest.raises(InputError, match="cross_heads: width 64 is not a published one"):
        sana.infer_fields(toy_header())
    assert sana.infer_fields(toy_header(), {"cross_heads": 4})["cross_heads"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_two_tables_say_the_same(dtype):
    """qkv is q, k and v one after the other, kv is k and v: nothing else differs but names."""
    module = models.Sana(width=64, depth=2, heads=2, cross_heads=4, qk_norm=True, guidance_embed=True, caption_width=16)
    rng = np.random.default_rng(0)
    leaves = {path: rng.normal(size=shape).astype(dtype) for path, shape in parameter_shapes(module).items()}
    ours, theirs = (dict(rules.to_torch(published_rules(module, original), leaves)) for original in (False, True))
    one = re.compile(r"transformer_blocks\.(\d+)\.(attn[12])\.to_([qkv])\.(weight|bias)")
    for i in range(2):
        qkv = np.concatenate([ours[f"transformer_blocks.{i}.attn1.to_{x}.weight"] for x in "qkv"])
        assert qkv.tobytes() == theirs[f"blocks.{i}.attn.qkv.weight"].tobytes()
        for kind in ("weight", "bias"):
            kv = np.concatenate([ours[f"transformer_blocks.{i}.attn2.to_{x}.{kind}"] for x in "kv"])
            assert kv.tobytes() == theirs[f"blocks.{i}.cross_attn.kv_linear.{kind}"].tobytes()
            assert (
                ours[f"transformer_blocks.{i}.attn2.to_q.{kind}"].tobytes()
                == theirs[f"blocks.{i}.cross_attn.q_linear.{kind}"].tobytes()
            )
    rest = [array.tobytes() for name, array in ours.items() if not one.fullmatch(name)]
    fused = [array.tobytes() for name, array in theirs.items() if not re.search(r"\.qkv\.|\.kv_linear\.|\.q_linear\.", name)]
    assert sorted(rest) == sorted(fused)
