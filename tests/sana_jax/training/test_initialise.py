"""What a new run starts from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sana_jax.errors import CheckpointError, InputError
from sana_jax.experiment import Init
from sana_jax.models.sana import Sana
from sana_jax.parameters import parameter_shapes
from sana_jax.saving import save_component
from sana_jax.sharding import make_mesh
from sana_jax.training import initialise, layout
from tests.runs import DC_AE, GEMMA2, SANA, make_run, random_params


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def assert_equal(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def assert_laid_out(params, model, mesh):
    expected = layout.param_shardings(params, model, mesh)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, params, expected))


# docs/numerics.md 5: how each leaf is drawn, as (standard deviation, largest value); None is unbounded.
def xavier(fan_in, fan_out):
    limit = (6 / (fan_in + fan_out)) ** 0.5
    return limit / 3**0.5, limit


def torch_conv(fan_in):
    return fan_in**-0.5 / 3**0.5, fan_in**-0.5


D, HIDDEN = 256, 640
PUBLISHED = {
    "patch_embed/kernel": xavier(32, D),
    "time_embed/mlp_1/kernel": (0.02, None),
    "time_embed/mlp_2/kernel": (0.02, None),
    "time_embed/modulation/kernel": (0.02, None),
    "caption_embed/mlp_1/kernel": (0.02, None),
    "caption_embed/mlp_2/kernel": (0.02, None),
    "blocks/self_attn/qkv/kernel": xavier(D, 3 * D),
    "blocks/self_attn/out/kernel": xavier(D, D),
    "blocks/cross_attn/query/kernel": xavier(D, D),
    "blocks/cross_attn/out/kernel": xavier(D, D),
    "key_value/kv/kernel": xavier(D, 2 * D),
    "blocks/mix_ffn/expand/kernel": torch_conv(D),
    "blocks/mix_ffn/expand/bias": torch_conv(D),
    "blocks/mix_ffn/depthwise/kernel": torch_conv(9),
    "blocks/mix_ffn/depthwise/bias": torch_conv(9),
    "blocks/mix_ffn/project/kernel": torch_conv(HIDDEN),
    "blocks/modulation": (D**-0.5, None),
    "head/modulation": (D**-0.5, None),
    "head/out/kernel": xavier(D, 32),
}


def test_random_parameters_are_distributed_as_published():
    model = Sana(width=D, depth=2, heads=8, cross_heads=4, caption_width=96, qk_norm=True)
    leaves = flat(initialise.parameters(model, Init(), one_device(), seed=3))
    for path, (spread, limit) in PUBLISHED.items():
        leaf = leaves.pop(path)
        assert abs(leaf.std() / spread - 1) < 4 / leaf.size**0.5, path
        assert abs(leaf.mean()) < 5 * spread / leaf.size**0.5, path
        if limit is not None:
            assert 0.98 * limit < np.abs(leaf).max() <= limit, path
        if path.startswith(("blocks/", "key_value/")):
            assert not np.array_equal(leaf[0], leaf[1]), path
    for path, leaf in leaves.items():
        value = 0.01 if path == "caption_embed/norm/scale" else float(path.endswith("scale"))
        np.testing.assert_array_equal(leaf, np.float32(value), err_msg=path)
    assert len(leaves) == 16 and not any(path.endswith("kernel") for path in leaves)


def test_captions_begin_at_another_scale():
    """Nothing else is another."""
    plain, louder = (flat(initialise.parameters(m, Init(), one_device(), seed=3)) for m in (SANA, SANA.clone(caption_scale=1.0)))
    found = louder.pop("caption_embed/norm/scale")
    np.testing.assert_array_equal(found, 1)
    assert np.all(plain.pop("caption_embed/norm/scale") == np.float32(0.01))
    assert plain.keys() == louder.keys() and all(np.array_equal(plain[path], louder[path]) for path in plain)


def test_random_parameters_are_those_of_the_seed_on_any_mesh():
    whole, other = (initialise.parameters(GEMMA2, Init(), one_device(), seed) for seed in (1, 2))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    cut = initialise.parameters(GEMMA2, Init(), mesh, seed=1)
    assert_equal(whole, cut)
    assert_laid_out(cut, GEMMA2, mesh)
    one, two = flat(whole), flat(other)
    same = {path for path in one if np.array_equal(one[path], two[path])}
    assert same == {path for path in one if path.endswith("norm/scale")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), SANA, ema=0.9)


def test_from_a_run(run):
    """The average, or the parameters; onto a mesh; a model of another resolution takes them as they are."""
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    larger = SANA.clone(sample_size=4, position_scale=1.0)
    average = initialise.parameters(larger, Init(str(run)), mesh, 0)
    assert_equal(average, jax.tree.map(lambda leaf: 2 * leaf, random_params(SANA, 3)))
    assert_equal(initialise.parameters(SANA, Init(str(run), ema=False), mesh, 0), random_params(SANA, 3))
    assert_laid_out(average, SANA, mesh)


def test_from_a_run_without_an_average(tmp_path):
    make_run(tmp_path, SANA)
    assert_equal(initialise.parameters(SANA, Init(str(tmp_path)), one_device(), 0), random_params(SANA, 3))


def test_from_published_weights(tmp_path):
    """A component, or a pipeline that has it; float32 is kept whatever activations are."""
    save_component(tmp_path / "transformer", "diffusion_pytorch_model", SANA, random_params(SANA))
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    for source in (tmp_path, tmp_path / "transformer"):
        params = initialise.parameters(SANA.clone(dtype=jnp.bfloat16), Init(str(source)), mesh, 0)
        assert_equal(params, random_params(SANA))


@pytest.mark.parametrize("model, stem", [(DC_AE, "diffusion_pytorch_model"), (GEMMA2, "model")])
def test_other_models(tmp_path, model, stem):
    save_component(tmp_path / "published", stem, model, random_params(model))
    make_run(tmp_path / "run", model)
    for source, seed in (("published", 0), ("run", 3)):
        params = initialise.parameters(model, Init(str(tmp_path / source)), one_device(), 0)
        assert_equal(params, random_params(model, seed))


def test_what_does_not_fit_is_listed_at_once(run, tmp_path):
    with pytest.raises(CheckpointError) as raised:
        initialise.parameters(SANA.clone(qk_norm=False, latent_channels=16), Init(str(run)), one_device(), 0)
    text = str(raised.value)
    assert "7 parameters do not fit" in text and "head/out/kernel: (64, 32), the model has (64, 16)" in text
    assert "key_value/key_norm/scale: (3, 64), the model has no such parameter" in text
    with pytest.raises(CheckpointError, match="the model has"):
        initialise.parameters(SANA.clone(depth=4), Init(str(run)), one_device(), 0)
    with pytest.raises(InputError, match="is a run of a Sana, needed is a DCAE"):
        initialise.parameters(DC_AE, Init(str(run)), one_device(), 0)
    with pytest.raises(InputError, match="no such folder or file"):
        initialise.parameters(SANA, Init(str(tmp_path / "none")), one_device(), 0)


def velocity(model, params):
    keys = jax.random.split(jax.random.key(5), 2)
    x, states = jax.random.normal(keys[0], (2, 3, 5, 32)), jax.random.normal(keys[1], (2, 4, 32))
    mask = jnp.arange(4) < jnp.array([[4], [2]])
    return np.asarray(jax.jit(model.apply)({"params": params}, x, jnp.array([3.0, 700.0]), states, mask))


def test_a_grown_model_begins_as_the_shallow_one(run):
    """Its velocity is that of the first two blocks; the new ones are the identity."""
    deep = SANA.clone(depth=4)
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    params = initialise.parameters(deep, Init(str(run), ema=False, grow=2), mesh, seed=7)
    source = random_params(SANA, 3)
    layers = ("blocks", "key_value")
    first = {
        name: jax.tree.map(lambda leaf: leaf[:2], tree) if name in layers else tree for name, tree in source.items()
    }
    expected = velocity(SANA.clone(depth=2), first)
    size = np.abs(expected).max()
    assert np.abs(velocity(deep, jax.tree.map(np.asarray, params)) - expected).max() < 3e-6 * size
    assert np.abs(velocity(SANA, source) - expected).max() > 1e-2 * size  # the third block does something

    grown = flat(params)
    zeros = {path for path, leaf in grown.items() if path.startswith("blocks/") and not leaf[2:].any()}
    assert zeros == {
        "blocks/self_attn/out/kernel", "blocks/self_attn/out/bias", "blocks/cross_attn/out/kernel",
        "blocks/cross_attn/out/bias", "blocks/mix_ffn/project/kernel", "blocks/cross_attn/query/bias",
    }  # fmt: skip
    assert 0 < np.abs(grown["blocks/self_attn/qkv/kernel"][2:]).max() < 0.2  # xavier's, not the source's
    np.testing.assert_array_equal(grown["key_value/kv/kernel"][:2], flat(source)["key_value/kv/kernel"][:2])
    assert_laid_out(params, deep, mesh)


def test_growing_from_too_little(run):
    with pytest.raises(InputError, match="has only 3 blocks"):
        initialise.parameters(SANA.clone(depth=8), Init(str(run), grow=4), one_device(), 0)


def test_the_model_of_a_run(run):
    assert initialise.run_model(run) == SANA
    assert initialise.is_run(run) and not initialise.is_run(run / "checkpoints")


def test_a_description_of_something_else(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="it is not that of a run"):
        initialise.run_model(tmp_path)


def test_shapes_do_not_ask_for_the_device_of_a_kernel():
    """On a machine without a GPU too, where `init` with a kernel's name is refused."""
    kernels = SANA.clone(kernels="pallas")
    assert parameter_shapes(kernels) == parameter_shapes(SANA)
    with pytest.raises(InputError, match="needs an NVIDIA GPU"):
        jax.eval_shape(lambda: kernels.init(jax.random.key(0), *kernels.example_inputs()))
