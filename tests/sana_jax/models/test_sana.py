"""Sana against diffusers' SanaTransformer2DModel, in float32 at highest matmul precision.

Bound: 2e-5 for outputs of rms 1 to 2.  That is about 100 float32 ulps of the largest values, what
three blocks of sums over 160 channels in another order leave; the rest of the budget is the phase of
the time embedding, 999 rad * 6e-8.  Each trap of docs/numerics.md section 8 has a control that breaks it.
"""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import ops
from sana_jax.checkpoints import rules
from sana_jax.checkpoints import sana as names
from sana_jax.errors import InputError
from sana_jax.models import embeddings
from sana_jax.models import sana as models
from sana_jax.models.sana import Sana
from sana_jax.parameters import parameter_shapes
from sana_jax.stacks import NVLABS
from tests import peers
from tests.toy_pipeline import VARIANTS, make_transformer, run_transformer, transformer_case

BOUND = 2e-5
def table(module):
    return names.diffusers_rules(module.heads, module.cross_heads, module.qk_norm, module.guidance_embed)


def convert(torch_module, **overrides):
    """(Sana, params) of a torch module, through the config and the table that loading uses."""
    module = Sana(**(names.config_fields(dict(torch_module.config)) | overrides))
    state = peers.to_numpy_state(torch_module)
    leaves = rules.to_flax(
        table(module), parameter_shapes(module), peers.header(state), state.items(), np.dtype(module.param_dtype)
    )
    return module, flax.traverse_util.unflatten_dict(leaves, sep="/")


@functools.cache
def peer(variant):
    return make_transformer(**VARIANTS[variant])


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, *inputs):
    return module.apply({"params": params}, *inputs).astype(jnp.float32)


def run(module, params, x, t, states, mask, guidance=None):
    return np.asarray(apply(module, params, x, t, states, mask, guidance))


def distance(a, b):
    return float(np.abs(a - b).max())


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant):
    torch_module, case = peer(variant), transformer_case(guidance=variant == "sprint")
    reference = run_transformer(torch_module, **case)
    assert 1 <= peers.rms(reference) <= 4
    assert distance(run(*convert(torch_module), **case), reference) <= BOUND


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (3, 11)])
def test_parity_on_other_grids(shape):
    case = transformer_case(*shape, batch=3)
    assert distance(run(*convert(peer("4K")), **case), run_transformer(peer("4K"), **case)) <= BOUND


@pytest.mark.parity
def test_reference_depends_on_everything():
    """A reference that ignored its text, time or mask would prove nothing."""
    case = transformer_case()
    reference = run_transformer(peer("1.0"), **case)
    for change in (
        {"states": np.zeros_like(case["states"])},
        {"t": np.float32([10, 10])},
        {"mask": np.ones_like(case["mask"])},
    ):
        changed = run_transformer(peer("1.0"), **(case | change))
        assert peers.rms(changed[-1] - reference[-1]) >= 0.05 * peers.rms(reference[-1]), change.keys()


@pytest.mark.parity
def test_block_parity():
    """One block alone, so that a later miss is found where it happens."""
    import torch

    torch_module = peer("1.5")
    module, params = convert(torch_module)
    rng = np.random.default_rng(3)
    x, text = rng.normal(size=(2, 6, 5, 64)).astype("f"), rng.normal(size=(2, 4, 64)).astype("f")
    rows = rng.normal(size=(2, 6, 64)).astype("f") * 0.3
    bias = np.float32([[0, 0, 0, 0], [0, 0, -10000, -10000]])
    reference = torch_module.transformer_blocks[1](
        torch.tensor(x).reshape(2, 30, 64), None, torch.tensor(text), torch.tensor(bias)[:, None],
        torch.tensor(rows).reshape(2, -1), 6, 5,
    ).reshape(2, 6, 5, 64)  # fmt: skip
    layer = functools.partial(jax.tree.map, lambda a: a[1])
    key_value = models.KeyValue(module.cross_heads, True, 1e-5, jnp.float32, jnp.float32)
    kv = key_value.apply({"params": layer(params["key_value"])}, text)
    block = models.SanaBlock(
        module.heads, module.cross_heads, 160, True, 1e-15, 1e-5, False, "auto", jnp.float32, jnp.float32
    )
    out, _ = block.apply({"params": layer(params["blocks"])}, x, kv, rows, bias)
    assert distance(np.asarray(out), reference.numpy()) <= 1e-5


@pytest.mark.parity
def test_batch_rows_are_independent():
    module, params = convert(peer("1.0"))
    case = transformer_case(batch=3)
    alone = [run(module, params, **{k: v[i : i + 1] for k, v in case.items()}) for i in range(3)]
    assert distance(np.concatenate(alone), run(module, params, **case)) <= 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_hoisted_form_is_the_plain_form(variant):
    module, params = convert(peer(variant))
    case = transformer_case(guidance=variant == "sprint")
    guidance = case.pop("guidance", None)
    call = functools.partial(module.apply, {"params": params})
    text = call(case["states"], case["mask"], method="embed_text")
    time = call(case["t"], guidance, method="embed_time")
    hoisted = call(case["x"], time, text, method="velocity")
    np.testing.assert_allclose(hoisted, call(*case.values(), guidance), rtol=0, atol=2e-6)


@pytest.mark.parity
def test_nvlabs_stack_against_the_substituted_oracle():
    """diffusers' modules with NVlabs' constants put in: eps, cross-norm eps, truncated time.

    The attention's weights are made small, so that its denominator is of the size of eps and the
    choice between 1e-8 and 1e-15 shows.
    """
    import copy

    import torch

    oracle = copy.deepcopy(peer("1.5"))
    for block in oracle.transformer_blocks:
        block.attn1.norm_q.weight.mul_(3e-5)
        block.attn1.norm_k.weight.mul_(3e-5)
        block.attn2.norm_q.eps = block.attn2.norm_k.eps = NVLABS.cross_norm_eps
        block.attn2.to_q.weight.mul_(1e-3)  # small queries: the norm's eps shows
        block.attn2.to_q.bias.zero_()
    diffusers_module, params = convert(oracle)
    case = transformer_case()
    unsubstituted = run(diffusers_module, params, **case)

    class Attention:
        """docs/numerics.md 1.5 with eps as an argument; q, k, v arrive as diffusers makes them."""

        def __call__(self, attn, hidden_states, **_):
            b, n, d = hidden_states.shape
            q = attn.norm_q(attn.to_q(hidden_states)).reshape(b, n, -1, 32).relu()
            k = attn.norm_k(attn.to_k(hidden_states)).reshape(b, n, -1, 32).relu()
            v = attn.to_v(hidden_states).reshape(b, n, -1, 32)
            out = torch.einsum("bnhc,bmhc,bmhe->bnhe", q, k, v)
            weight = torch.einsum("bnhc,bmhc->bnh", q, k)
            out = out / (weight[..., None] + NVLABS.attention_eps)
            return attn.to_out[0](out.reshape(b, n, d)).clip(-65504, 65504)

    for block in oracle.transformer_blocks:
        block.attn1.set_processor(Attention())
    reference = run_transformer(oracle, **(case | {"t": np.trunc(case["t"])}))
    module = diffusers_module.clone(**NVLABS.sana_fields())
    assert distance(run(module, params, **case), reference) <= BOUND
    # Controls: each constant by itself is seen.
    assert distance(unsubstituted, reference) > 10 * BOUND
    for change in ({"attention_eps": 1e-15}, {"cross_norm_eps": 1e-5}, {"integer_time": False}):
        wrong = run(module.clone(**change), params, **case)
        assert distance(wrong, reference) > 2 * BOUND, change


def swap_columns(kernel, parts, heads):
    """Head-major packed columns read as if they were part-major."""
    return kernel.reshape(*kernel.shape[:-1], heads, parts, -1).swapaxes(-3, -2).reshape(kernel.shape)


@pytest.mark.parity
def test_controls_break_parity(monkeypatch):
    """Everything that is easy to get wrong, done wrong on purpose, exceeds the bound."""
    module, params = convert(peer("4K"))
    case = transformer_case()
    reference = run_transformer(peer("4K"), **case)
    flat = flax.traverse_util.flatten_dict(params, sep="/")

    def with_leaf(path, change):
        return flax.traverse_util.unflatten_dict(flat | {path: change(flat[path])}, sep="/")

    def half_swap(a):
        return np.roll(a, a.shape[-1] // 2, axis=-1)

    wrong_parameters = {
        "gate before value": with_leaf("blocks/mix_ffn/depthwise/kernel", half_swap),
        "qkv part-major": with_leaf("blocks/self_attn/qkv/kernel", lambda a: swap_columns(a, 3, 2)),
        "kv part-major": with_leaf("key_value/kv/kernel", lambda a: swap_columns(a, 2, 4)),
        "shift and scale swapped": with_leaf("blocks/modulation", lambda a: a[:, [1, 0, 2, 3, 4, 5]]),
        "head rows swapped": with_leaf("head/modulation", lambda a: a[::-1]),
    }
    for what, wrong in wrong_parameters.items():
        assert distance(run(module, wrong, **case), reference) > 10 * BOUND, what

    def silu_once(self, x):
        return jnp.split(x, 2, axis=-1)

    def sines_first(t, size=256):
        return jnp.roll(sinusoid(t, size), size // 2, axis=-1)

    def row_first(height, width, size, scale, channels):
        return jnp.roll(position(height, width, size, scale, channels), channels // 2, axis=-1)

    def not_normalised(height, width, size, scale, channels):
        return position(size, size, size, scale, channels)[:height, :width]

    def exact_frequencies(t, size=256):
        return jnp.float32(1.001) * sinusoid(t, size)

    sinusoid, position = embeddings.sinusoid, embeddings.position_embedding
    wrong_functions = {
        "sines first": (embeddings, "sinusoid", sines_first),
        "scaled embedding": (embeddings, "sinusoid", exact_frequencies),
        "row before column": (embeddings, "position_embedding", row_first),
        "positions not normalised": (embeddings, "position_embedding", not_normalised),
        "layer norm eps": (ops.adaln, "modulate", functools.partial(ops.adaln.modulate, eps=1e-2)),
        "caption norm eps": (embeddings, "CAPTION_NORM_EPS", 1e-2),
        "mask ignored": (models, "HIDDEN_TOKEN", 0.0),
    }
    for what, (where, name, wrong) in wrong_functions.items():
        with monkeypatch.context() as patch:
            patch.setattr(where, name, wrong)
            jax.clear_caches()
            assert distance(run(module, params, **case), reference) > 10 * BOUND, what
    jax.clear_caches()
    assert distance(run(module, params, **case), reference) <= BOUND
    truncated = run(module.clone(integer_time=True), params, **case)
    assert distance(truncated, reference) > 10 * BOUND, "truncated time"


@pytest.mark.parity
def test_bfloat16_error_is_not_worse_than_torchs():
    import copy

    import torch

    torch_module = peer("1.0")
    low = copy.deepcopy(torch_module).to(torch.bfloat16)
    module, params = convert(torch_module, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    ours, theirs = [], []
    for seed in range(6):
        case = transformer_case(8, 8, seed=seed)
        reference = run_transformer(torch_module, **case)
        ours.append(peers.rms(run(module, params, **case) - reference))
        theirs.append(peers.rms(run_transformer(low, **case) - reference))
    assert np.mean(ours) <= 1.2 * np.mean(theirs)


def test_float16_output_is_clamped_and_float32_is_not():
    attention = models.LinearAttention(2, False, 1e-15, False, "auto", jnp.float32, jnp.float32)
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 64)).astype("f")
    params = attention.init(jax.random.key(0), x)["params"]
    params["out"]["bias"] = np.full(64, 1e6, "f")
    assert np.abs(attention.apply({"params": params}, x)).max() > 9e5
    clamped = attention.clone(clamp=True).apply({"params": params}, x)
    assert np.abs(clamped).max() == 65504
    params["out"] = {"bias": np.full(64, 6e4, "f"), "kernel": params["out"]["kernel"] * 1e5}
    half = attention.clone(dtype=jnp.float16).apply({"params": params}, x.astype(np.float16))
    assert half.dtype == jnp.float16 and np.isfinite(half).all() and half.max() == 65504


SIZES = {  # docs/numerics.md 1.1: parameters, tensors in diffusers' format
    "SANA_600M": (591_747_872, 548),
    "SANA_1600M": (1_604_462_752, 396),
    "SANA_1600M_2K": (1_604_462_752, 396),
    "SANA_1600M_4K": (1_604_462_752, 396),
    "SANA_1_5_1600M": (1_604_641_952, 476),
    "SANA_1_5_4800M": (4_721_825_952, 1396),
    "SANA_SPRINT_600M": (593_501_216, 664),
    "SANA_SPRINT_1600M": (1_610_237_472, 480),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    module = getattr(models, name)
    shapes = parameter_shapes(module)
    keys = rules.names(table(module), shapes)
    assert (sum(int(np.prod(s)) for s in shapes.values()), len(keys)) == SIZES[name]


@pytest.mark.parity
@pytest.mark.parametrize("name", SIZES)
def test_published_key_lists(name):
    """Names and shapes of the full-size model are those of diffusers' own class on the meta device."""
    import torch
    from diffusers import SanaTransformer2DModel

    module = getattr(models, name)
    fields = {f: getattr(module, f) for f in module.__dataclass_fields__}
    config = names.to_config(fields)
    with torch.device("meta"):
        config.pop("_class_name")
        reference = SanaTransformer2DModel(**config)
    expected = {key: tuple(tensor.shape) for key, tensor in reference.state_dict().items()}
    assert rules.names(table(module), parameter_shapes(module)) == expected


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_exact(variant):
    state = peers.to_numpy_state(peer(variant))
    module, params = convert(peer(variant))
    back = dict(rules.to_torch(table(module), flax.traverse_util.flatten_dict(params, sep="/")))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[key], state[key]) for key in state)


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_structure_is_inferred_from_names_and_shapes(variant):
    config = names.config_fields(dict(peer(variant).config))
    header = peers.header(peers.to_numpy_state(peer(variant)))
    found = names.infer_fields(header, overrides=("cross_heads",)) | {"cross_heads": 4}
    assert found == {key: config[key] for key in found}


def test_remat_keeps_what_it_says():
    """Bytes that the forward pass leaves for the backward pass, beyond its arguments, at 8 x 16 x 16 tokens."""
    module = Sana(width=64, depth=3, heads=2, cross_heads=2, caption_width=16, dtype=jnp.bfloat16)
    x, t, states, mask = (jax.ShapeDtypeStruct((8, *a.shape[1:]), a.dtype) for a in module.example_inputs())
    x = jax.ShapeDtypeStruct((8, 16, 16, 32), x.dtype)
    params = jax.eval_shape(module.init, jax.random.key(0), x, t, states, mask)

    def kept(remat):
        apply = module.clone(remat=remat).apply

        def pull(params, x):
            rest = map(jnp.ones_like, (t, states, mask))
            return jax.vjp(lambda params: apply(params, x, *rest), params)[1]

        pull = jax.eval_shape(pull, params, x)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    stream = 3 * 8 * 256 * 64 * 2  # one activation of all layers
    nothing, full, products = map(kept, (None, "full", "products"))
    # qkv 3, query 1, two outputs, expansion 5, projection 1: 12 widths of products
    assert 11 * stream < products - full < 13 * stream
    assert nothing > 1.4 * products


def test_remat_must_be_known():
    module = Sana(width=64, depth=1, heads=2, cross_heads=2, remat=True)
    with pytest.raises(InputError, match="remat=True: must be one of None, 'full', 'products'"):
        module.init(jax.random.key(0), *module.example_inputs())


def test_unroll_must_be_positive():
    module = Sana(width=64, depth=2, heads=2, cross_heads=2, unroll=0)
    with pytest.raises(InputError, match="unroll=0: must be"):
        module.init(jax.random.key(0), *module.example_inputs())


def test_gradients_reach_every_parameter():
    """Also that remat and unroll change nothing; training stands on this."""
    module = Sana(width=64, depth=3, heads=2, cross_heads=2, caption_width=16, qk_norm=True)
    arguments = module.example_inputs()
    rng = np.random.default_rng(0)
    arguments = [jnp.asarray(rng.normal(size=a.shape), a.dtype) if a.dtype != bool else a for a in arguments]
    params = jax.jit(module.init)(jax.random.key(0), *arguments)["params"]

    def loss(params, module):
        return jnp.sum(module.apply({"params": params}, *arguments) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    grads = gradient(params, module)
    for path, leaf in flax.traverse_util.flatten_dict(grads, sep="/").items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    for change in ({"remat": "full"}, {"remat": "products"}, {"unroll": 2}, {"unroll": 4}):
        again = gradient(params, module.clone(**change))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, again)
