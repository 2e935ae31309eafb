"""`load_dc_ae` and `save_component` with every variant, in both formats, from folders and files."""

import json

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from sana_jax import diagnose
from sana_jax.checkpoints import dc_ae as names
from sana_jax.checkpoints import rules
from sana_jax.components import load_dc_ae
from sana_jax.errors import CheckpointError, InputError, NonFiniteError
from sana_jax.saving import save_component
from tests import dc_ae_toys, peers
from tests.dc_ae_toys import TOYS, error, fields_of, image, nchw, nhwc

STEM = "diffusion_pytorch_model"
BATCH_NORM = [name for name in TOYS if TOYS[name].decoder_batch_norm]


def params_of(model, dtype=np.float32):
    return flax.traverse_util.unflatten_dict(dc_ae_toys.random_leaves(model, dtype), sep="/")


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def write_efficientvit(path, model, params):
    table = names.efficientvit_rules(fields_of(model))
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    safetensors.numpy.save_file(dict(names.with_counters(table, rules.to_torch(table, leaves))), path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_folder_as_saved(tmp_path, dtype):
    model = dc_ae_toys.with_dtype(TOYS["f32c32-in"], np.dtype(dtype).type)
    params = params_of(model, dtype)
    save_component(tmp_path, STEM, model, params)
    loaded, back = load_dc_ae(tmp_path)
    assert fields_of(loaded) == fields_of(model) and same(back, params)
    assert np.dtype(loaded.dtype) == np.dtype(loaded.param_dtype) == np.dtype(dtype)


@pytest.mark.parametrize("variant", TOYS)
def test_single_files_in_both_formats(tmp_path, variant):
    model, params = TOYS[variant], params_of(TOYS[variant])
    save_component(tmp_path, STEM, model, params)
    write_efficientvit(tmp_path / "efficientvit.safetensors", model, params)
    for file in (f"{STEM}.safetensors", "efficientvit.safetensors"):
        loaded, back = load_dc_ae(tmp_path / file, scaling_factor=model.scaling_factor)
        assert loaded == model and same(back, params)


def test_folder_of_efficientvit(tmp_path):
    model, params = TOYS["f64c128-mix"], params_of(TOYS["f64c128-mix"])
    write_efficientvit(tmp_path / "model.safetensors", model, params)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(names.efficientvit_config(fields_of(model))))
    loaded, back = load_dc_ae(tmp_path)
    assert loaded == model and same(back, params)
    config.write_text('{"model_name": "dc-ae-f64c128-mix-1.0"}')
    with pytest.raises(CheckpointError, match="the tensors are not those of that variant"):
        load_dc_ae(tmp_path)
    config.unlink()
    with pytest.warns(UserWarning, match="scale of the latent is not known"):
        assert load_dc_ae(tmp_path)[0].scaling_factor == TOYS["f32c32-sana"].scaling_factor


@pytest.mark.parametrize("variant", BATCH_NORM[:1])
def test_counters_are_written_as_torch_starts_them(tmp_path, variant):
    save_component(tmp_path, STEM, TOYS[variant], params_of(TOYS[variant]))
    state = safetensors.numpy.load_file(tmp_path / f"{STEM}.safetensors")
    counters = {name: a for name, a in state.items() if name.endswith("num_batches_tracked")}
    assert counters.keys() == set(names.counters(names.diffusers_rules(fields_of(TOYS[variant]))))
    assert all(a.shape == () and a.dtype == np.int64 and a == 0 for a in counters.values())


def test_files_without_counters_are_read_and_foreign_ones_are_not(tmp_path):
    model = TOYS["f32c32-in"]
    save_component(tmp_path, STEM, model, params_of(model))
    file = tmp_path / f"{STEM}.safetensors"
    state = safetensors.numpy.load_file(file)
    without = {name: a for name, a in state.items() if not name.endswith("num_batches_tracked")}
    safetensors.numpy.save_file(without, file)
    assert load_dc_ae(tmp_path)[0] == model
    foreign = "encoder.down_blocks.1.0.norm.num_batches_tracked"  # of an RMSNorm
    safetensors.numpy.save_file(state | {foreign: np.zeros((), np.int64)}, file)
    with pytest.raises(CheckpointError, match=rf"(?s)not part of this model \(1\):\s+{foreign}"):
        load_dc_ae(tmp_path)


def test_a_file_that_mixes_the_formats_is_refused(tmp_path):
    model, params = TOYS["f32c32-in"], params_of(TOYS["f32c32-in"])
    save_component(tmp_path, STEM, model, params)
    write_efficientvit(tmp_path / "efficientvit.safetensors", model, params)
    both = {}
    for file in (f"{STEM}.safetensors", "efficientvit.safetensors"):
        both |= safetensors.numpy.load_file(tmp_path / file)
    safetensors.numpy.save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)not part of this model.*decoder\.conv_in"):
        load_dc_ae(tmp_path / "both.safetensors", scaling_factor=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upsample_block_type": "interpolate"}, r"(?s)wrong shape.*up_blocks.*conv.weight"),
        ({"downsample_block_type": "Conv"}, r"(?s)wrong shape.*down_blocks.*conv.weight"),
        ({"decoder_norm_types": "rms_norm"}, r"(?s)not part of this model.*running_mean"),
        ({"decoder_norm_types": "batch_norm"}, r"decoder_norm_types|decoder_batch_norm=.*stages \[3, 4, 5\]"),
        ({"decoder_layers_per_block": [1, 2, 1, 1, 1, 1]}, r"(?s)missing.*up_blocks\.0\.1"),
    ],
)
def test_configs_that_contradict_the_weights(tmp_path, change, message):
    save_component(tmp_path, STEM, TOYS["f32c32-in"], params_of(TOYS["f32c32-in"]))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        load_dc_ae(tmp_path)


def test_diagnose_names_a_layer_of_the_variants():
    depths = (0, 1, 1)
    model = TOYS["f32c32-in"].clone(
        widths=(16, 32, 32), encoder_depths=depths, decoder_depths=depths,
        encoder_attention=(None, None, ()), decoder_attention=(None, None, ()), decoder_batch_norm=(0, 1),
    )  # fmt: skip
    params = params_of(model)
    params["decoder"]["stage_1"]["block_0"]["norm"]["var"] = -np.ones(32, np.float32)

    def decode(params, z):
        return model.apply({"params": params}, z, method="decode")

    with pytest.raises(NonFiniteError, match="decoder/stage_1/block_0/norm is not finite"):
        diagnose.explain_decode(model, params, decode, np.ones((1, 1, 1, 32), np.float32))


# --- diffusers on the other side.


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["lite-f32c32", "f32c32-in"])
def test_diffusers_folder_in_and_out(tmp_path, variant):
    import diffusers

    model, peer = TOYS[variant], dc_ae_toys.make_peer(TOYS[variant])
    peer.save_pretrained(tmp_path / "theirs")
    loaded, params = load_dc_ae(tmp_path / "theirs")
    assert loaded == model
    save_component(tmp_path / "ours", STEM, loaded, params)
    back = diffusers.AutoencoderDC.from_pretrained(tmp_path / "ours")
    theirs, ours = peers.to_numpy_state(peer), peers.to_numpy_state(back)
    assert theirs.keys() == ours.keys() and all((theirs[name] == ours[name]).all() for name in theirs)
    x = image(1, 32, 64)
    z = back.encode(nchw(x)).latent
    assert error(dc_ae_toys.run(loaded, params, x, method="encode"), nhwc(z)) <= 1.5e-5
    picture = dc_ae_toys.run(loaded, params, nhwc(z).astype(np.float32), method="decode")
    assert error(picture, nhwc(back.decode(z).sample)) <= 1.5e-5
