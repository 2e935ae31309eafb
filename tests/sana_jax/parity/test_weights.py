"""Every tensor of every part: one that is off is seen, whatever outputs show, and its line named."""

import functools

import flax.traverse_util
import numpy as np
import pytest

from sana_jax.parity import case as cases
from sana_jax.parity import peers, weights

TENSORS = {"text_encoder": 24, "transformer": 73, "vae": 150}


def test_a_digest_is_of_shape_and_every_bit():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert weights.digest(x) == weights.digest(x.astype(np.float16)) == weights.digest(np.asfortranarray(x))
    assert weights.digest(x) != weights.digest(x.reshape(3, 2))
    assert weights.digest(x) != weights.digest(np.nextafter(x, np.float32(9)))
    assert weights.digest(np.zeros(0)) == weights.digest(np.zeros(0, np.float32)) != weights.digest(np.zeros((0, 1)))
    assert weights.digest(np.float32(1)) != weights.digest(np.float32(2))


@pytest.mark.parametrize(
    "part, name, line",
    [
        ("transformer", "transformer_blocks.17.ff.conv_inverted.bias", "DiT block 17"),
        ("transformer", "transformer_blocks.0.scale_shift_table", "DiT block 0"),
        ("transformer", "scale_shift_table", "DiT head"),
        ("transformer", "time_embed.linear.weight", "DiT modulation"),
        ("transformer", "time_embed.emb.timestep_embedder.linear_1.bias", "DiT time embedding"),
        ("transformer", "caption_norm.weight", "DiT caption embedding"),
        ("transformer", "something.new", "DiT other"),
        ("text_encoder", "layers.25.input_layernorm.weight", "Gemma-2 layer 25"),
        ("text_encoder", "norm.weight", "Gemma-2 final norm"),
        ("text_encoder", "normal.weight", "Gemma-2 other"),
        ("vae", "encoder.down_blocks.2.0.conv1.weight", "DC-AE encoder stage 2"),
        ("vae", "decoder.up_blocks.0.1.conv1.bias", "DC-AE decoder stage 0"),
        ("vae", "decoder.conv_in.bias", "DC-AE decoder input"),
        ("vae", "encoder.conv_out.bias", "DC-AE encoder output"),
    ],
)
def test_a_tensor_has_a_line(part, name, line):
    assert weights.layer_of(part, name) == line


def test_lines_of_two_sides():
    same = {"layers.0.a": "1", "layers.1.a": "2", "layers.1.b": "3"}

    def found(ours, theirs):
        return {row.name: row.error for row in weights.rows("text_encoder", ours, theirs)}

    assert found(same, same) == {"Gemma-2 weights, 3 tensors": 0}
    assert found(same, same | {"layers.1.b": "4"}) == {"Gemma-2 layer 1 weights": 1, "Gemma-2 weights, 3 tensors": 1}
    absent = {"layers.0.a": "1", "odd": "2"}
    for pair in ((same, absent), (absent, same)):
        lines = found(*pair)
        assert lines == {"Gemma-2 layer 1 weights": 2, "Gemma-2 other weights": 1, "Gemma-2 weights, 4 tensors": 3}


@pytest.fixture(scope="module")
def sides(toy_folder):
    """part -> (module, params, our digests, peer, its digests), each loaded once."""
    case = cases.make(toy_folder, toy_folder, prompt="a", size=(64, 64), steps=1, rungs=cases.RUNGS, bfloat16=False)

    @functools.cache
    def load(part):
        peer, (module, params) = peers.load(case, part, peers.prepare()), case.load(part)
        return module, params, weights.ours(module, params), peer, weights.theirs(peer)

    return load


@pytest.mark.parity
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("part", TENSORS)
def test_any_tensor_that_is_off_by_a_per_cent_is_seen(sides, part, scaled):
    _, _, ours, peer, theirs = sides(part)
    assert ours == theirs and len(theirs) == TENSORS[part]
    state, rng = peer.state_dict(), np.random.default_rng(0)
    for name in theirs:
        x = state[name].numpy()
        factor = 1.01 if scaled else 1 + 0.01 * rng.normal(size=x.shape)
        digests = theirs | {name: weights.digest((x * factor).astype(np.float32))}
        *lines, total = weights.rows(part, ours, digests)
        assert [(row.name, row.error, row.ok) for row in lines] == [(f"{weights.layer_of(part, name)} weights", 1, False)]
        assert total.error == 1 and not total.ok and "other" not in lines[0].name


@pytest.mark.parity
@pytest.mark.parametrize("part", TENSORS)
def test_any_value_of_ours_that_is_off_is_seen(sides, part):
    """One value of each leaf, by its last bit: the tensor that holds it differs and no other."""
    module, params, _, _, theirs = sides(part)
    leaves, rng, seen = flax.traverse_util.flatten_dict(params), np.random.default_rng(0), set()
    for path in list(leaves)[:: 1 if len(leaves) < 60 else 3]:
        leaf = np.array(leaves[path])
        place = tuple(rng.integers(leaf.shape))
        leaf[place] = np.nextafter(leaf[place], np.float32(np.inf))
        off = weights.ours(module, flax.traverse_util.unflatten_dict(leaves | {path: leaf}))
        differing = [name for name in theirs if off[name] != theirs[name]]
        assert len(differing) == 1, path
        seen |= {*differing}
    assert len(seen) > len(leaves) / 4
