"""Names of DC-AE: published key lists, round trips through both formats, diffusers' own converter."""

import ast
import pathlib

import ml_dtypes
import numpy as np
import pytest

from sana_jax.checkpoints import dc_ae as names
from sana_jax.checkpoints import dc_ae_names, rules
from sana_jax.models import dc_ae
from sana_jax.models.dc_ae import DCAE
from tests import dc_ae_toys, peers
from tests.dc_ae_toys import TOYS, fields_of, shapes_of

KEY_LISTS = pathlib.Path(__file__).parents[2] / "golden/key_lists"

# Of a list: the model, its tensors, their elements (docs/numerics.md 1.1) with BatchNorm's buffers.
PUBLISHED = {
    "f32c32_sana": (dc_ae.DC_AE_F32C32_SANA, 375, 312_250_275),
    "f32c32_in_mix": (dc_ae.DC_AE_F32C32_MIX, 362, 323_356_460 + 12_815),
    "f64c128": (dc_ae.DC_AE_F64C128_IN, 418, 676_896_140 + 12_815),
    "f128c512": (dc_ae.DC_AE_F128C512_IN, 474, 1_120_682_252 + 12_815),
    "lite_f32c32": (dc_ae.DC_AE_LITE_F32C32_SANA, 293, 421_181_228),
}
# efficientvit's own names, from its code at these sizes.
_TINY = dict(widths=(32, 64, 64, 64, 128, 128), latent_channels=16)
EFFICIENTVIT = {
    "sana": DCAE(encoder_depths=(1, 1, 1, 2, 2, 2), decoder_depths=(2, 1, 1, 1, 1, 1), **_TINY),
    "lite": dc_ae.DC_AE_LITE_F32C32_SANA.clone(encoder_depths=(1,) * 6, decoder_depths=(0, 1, 1, 1, 1, 1), **_TINY),
    "in": dc_ae.DC_AE_F32C32_IN.clone(encoder_depths=(0, 2, 1, 1, 1, 1), decoder_depths=(0, 1, 2, 1, 1, 1), **_TINY),
}
FORMATS = {"diffusers": names.diffusers_rules, "efficientvit": names.efficientvit_rules}


def key_list(name):
    rows = (line.split(" ", 1) for line in (KEY_LISTS / f"dc_ae_{name}.txt").read_text().splitlines())
    return {name: ast.literal_eval(shape) for name, shape in rows}


def all_names(table, model):
    """{name: shape} of everything that is written."""
    return rules.names(table, shapes_of(model)) | {name: () for name in names.counters(table)}


def write(fmt, model, leaves):
    """The state dict of a model in a format, as a file holds it."""
    table = FORMATS[fmt](fields_of(model))
    return dict(names.with_counters(table, rules.to_torch(table, leaves)))


def read(fmt, model, state, dtype):
    """What `loading` does with such a file."""
    table = FORMATS[fmt](fields_of(model))
    assert names.is_efficientvit(state) == (fmt == "efficientvit")
    state = {name: array for name, array in state.items() if name not in names.counters(table)}
    return rules.to_flax(table, shapes_of(model), peers.header(state), state.items(), dtype)


def same(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == array.dtype and a[name].shape == array.shape and a[name].tobytes() == array.tobytes()
        for name, array in b.items()
    )


# --- Lists.


@pytest.mark.parametrize("variant", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(variant):
    model, tensors, elements = PUBLISHED[variant]
    expected = key_list(variant)
    assert len(expected) == tensors
    assert sum(int(np.prod(shape)) for shape in expected.values()) == elements
    assert all_names(names.diffusers_rules(fields_of(model)), model) == expected


@pytest.mark.parametrize("variant", EFFICIENTVIT)
def test_names_and_shapes_are_efficientvits(variant):
    model = EFFICIENTVIT[variant]
    assert all_names(names.efficientvit_rules(fields_of(model)), model) == key_list(f"efficientvit_tiny_{variant}")


def test_both_formats_have_a_word_for_everything():
    assert dc_ae_names.DIFFUSERS.keys() == dc_ae_names.EFFICIENTVIT.keys()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("up", [False, True])
def test_tables_are_total_for_every_mixture(fmt, down, up):
    for first in ((0, 0), (0, 1), (1, 0), (1, 1)):
        model = TOYS["f32c32-in"].clone(
            encoder_depths=(first[0], 1, 1, 1, 1, 1), decoder_depths=(first[1], 1, 1, 1, 1, 1),
            rearrange_down=down, rearrange_up=up, encoder_attention=(None, (), (3, 5), None, (5,), ()),
        )  # fmt: skip
        assert rules.slots(FORMATS[fmt](fields_of(model)), shapes_of(model))


# --- Round trips.


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("variant", TOYS)
def test_round_trips_are_bit_exact(variant, dtype):
    model = TOYS[variant]
    leaves = dc_ae_toys.random_leaves(model, dtype)
    diffusers = write("diffusers", model, leaves)
    ours = read("diffusers", model, diffusers, dtype)
    efficientvit = write("efficientvit", model, ours)
    ours = read("efficientvit", model, efficientvit, dtype)
    assert same(ours, leaves)
    assert same(write("diffusers", model, ours), diffusers)
    assert same(write("efficientvit", model, ours), efficientvit)
    assert {array.dtype.name for array in diffusers.values()} <= {np.dtype(dtype).name, "int64"}


def test_a_swap_would_show():
    """The comparison above sees two exchanged tensors of one shape."""
    state = write("diffusers", TOYS["f32c32-in"], dc_ae_toys.random_leaves(TOYS["f32c32-in"]))
    q, k = (f"encoder.down_blocks.3.0.attn.to_{x}.weight" for x in "qk")
    assert not same(state | {q: state[k], k: state[q]}, state)


@pytest.mark.parity
@pytest.mark.parametrize("variant", TOYS)
def test_round_trip_of_the_peer_is_bit_exact(variant):
    model = TOYS[variant]
    state = peers.to_numpy_state(dc_ae_toys.make_peer(model))
    ours = read("diffusers", model, state, np.float32)
    ours = read("efficientvit", model, write("efficientvit", model, ours), np.float32)
    assert same(write("diffusers", model, ours), state)
    assert fields_of(model) == names.config_fields(names.to_config(fields_of(model)))


# --- diffusers' converter of efficientvit's files, which knows nothing of our table.


def converted(variant):
    import torch
    from diffusers.loaders import single_file_utils

    model = TOYS[variant]
    leaves = dc_ae_toys.random_leaves(model)
    state = {name: torch.from_numpy(array.copy()) for name, array in write("efficientvit", model, leaves).items()}
    theirs = single_file_utils.convert_autoencoder_dc_checkpoint_to_diffusers(state)
    return {name: tensor.numpy() for name, tensor in theirs.items()}, write("diffusers", model, leaves)


@pytest.mark.parity
@pytest.mark.parametrize("variant", [name for name in TOYS if not name.startswith("lite")])
def test_diffusers_converts_our_export_as_we_do(variant):
    theirs, ours = converted(variant)
    assert same(theirs, ours)


@pytest.mark.parity
def test_diffusers_misnames_the_end_of_the_lite_decoder():
    """It takes the form of the decoder's last layer from the encoder's first (docs/numerics.md 2.3)."""
    theirs, ours = converted("lite-f32c32")
    assert ours.keys() - theirs.keys() == {f"decoder.conv_out.conv.{leaf}" for leaf in ("weight", "bias")}
    wrong = theirs.keys() - ours.keys()
    right = {name: name.replace("decoder.conv_out.", "decoder.conv_out.conv.") for name in wrong}
    assert same({right.get(name, name): array for name, array in theirs.items()}, ours)


# --- Counters.


def test_counters_are_those_of_batch_norms():
    table = names.diffusers_rules(fields_of(TOYS["f32c32-in"]))
    stages = {1: 2, 2: 1}  # blocks, behind the entry that goes up
    expected = [f"decoder.up_blocks.{i}.{j + 1}.norm.num_batches_tracked" for i, n in stages.items() for j in range(n)]
    assert names.counters(table) == expected
    assert names.counters(names.diffusers_rules(fields_of(TOYS["lite-f32c32"]))) == []
    (*_, last) = names.with_counters(table, [])
    assert last[0] == expected[-1] and last[1].shape == () and last[1].dtype == np.int64 and last[1] == 0
