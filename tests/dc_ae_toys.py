"""Every published DC-AE at toy widths, and the peer of each with random weights.

torch and diffusers are imported inside the functions, so that collecting tests does not need them.
"""

import dataclasses
import functools

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from sana_jax import components
from sana_jax.checkpoints import dc_ae as names
from sana_jax.checkpoints import rules
from sana_jax.models import dc_ae
from sana_jax.parameters import parameter_shapes
from tests import peers

WIDTHS = (16, 32, 32, 64, 64, 128, 128, 128)

# The published models less their size: (preset, depths of the encoder, of the decoder, latent).
_SIZES = {
    "f32c32-sana": (dc_ae.DC_AE_F32C32_SANA, (1, 1, 1, 2, 1, 1), (1, 2, 1, 1, 1, 1), 32),
    "lite-f32c32": (dc_ae.DC_AE_LITE_F32C32_SANA, (1, 1, 1, 1, 1, 1), (0, 1, 1, 2, 1, 1), 32),
    "f32c32-in": (dc_ae.DC_AE_F32C32_IN, (0, 1, 2, 1, 1, 1), (0, 2, 1, 1, 1, 1), 32),
    "f64c128-mix": (dc_ae.DC_AE_F64C128_MIX, (0, 1, 1, 1, 1, 1, 1), (0, 1, 1, 1, 1, 1, 1), 64),
    "f128c512-in": (dc_ae.DC_AE_F128C512_IN, (0, 1, 1, 1, 1, 1, 1, 1), (0, 1, 1, 1, 1, 1, 1, 1), 128),
}
TOYS = {
    name: preset.clone(
        widths=WIDTHS[: len(encoder)], encoder_depths=encoder, decoder_depths=decoder, latent_channels=latent
    )
    for name, (preset, encoder, decoder, latent) in _SIZES.items()
}


def fields_of(model):
    """The fields that a checkpoint tells: all but how it runs."""
    skip = ("kernels", "dtype", "param_dtype", "parent", "name")
    return {name: value for name, value in components.fields_of(model).items() if name not in skip}


@functools.cache
def shapes_of(model):
    return parameter_shapes(model)


def random_leaves(model, dtype=np.float32, seed=0):
    """{path: array}; variances are positive."""
    rng = np.random.default_rng(seed)
    leaves = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes_of(model).items()}
    return {path: (np.abs(leaf) if path.endswith("/var") else leaf).astype(dtype) for path, leaf in leaves.items()}


def make_peer(model, seed=0):
    """diffusers' module with random weights: latents of an rms of 1 to 8, images of 1 to 3."""
    import diffusers

    module = diffusers.AutoencoderDC.from_config(names.to_config(fields_of(model)))
    return randomise(module, seed)


def randomise(module, seed):
    peers.randomise(module, seed)
    conv_out = module.decoder.conv_out
    getattr(conv_out, "conv", conv_out).weight *= 3
    return module


def to_params(model, module, dtype=np.float32):
    """The peer's weights as our parameters."""
    table, state = names.diffusers_rules(fields_of(model)), peers.to_numpy_state(module)
    state = {name: array for name, array in state.items() if name not in names.counters(table)}
    leaves = rules.to_flax(table, shapes_of(model), peers.header(state), state.items(), dtype)
    return unflatten_dict(leaves, sep="/")


def nchw(x):
    import torch

    return torch.from_numpy(np.asarray(x, np.float32).transpose(0, 3, 1, 2).copy())


def nhwc(tensor):
    return tensor.detach().double().numpy().transpose(0, 2, 3, 1)


def image(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def error(ours, theirs):
    """max |ours - theirs| / rms(theirs)."""
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / peers.rms(theirs)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def run(model, params, x, *, method):
    """`encode` or `decode`, compiled."""
    return model.apply({"params": params}, x, method=method)


def with_dtype(model, dtype):
    return dataclasses.replace(model, dtype=dtype, param_dtype=dtype)
