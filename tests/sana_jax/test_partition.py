"""Kernels on eight devices: what is cut over them gives what one device gives, and is not gathered."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from sana_jax import aot, ops, partition, sharding
from sana_jax.models.sana import Sana
from sana_jax.training import layout

NIGHT = os.environ.get("SANA_JAX_NIGHT") == "1"
B, SIDE, HEADS, C = 8, 3, 2, 16
WIDTH = HEADS * C
SHAPES = {
    "qkv": (B, SIDE * SIDE, HEADS, 3 * C), "norm": (2, HEADS, C), "grid": (B, SIDE, SIDE, WIDTH),
    "row": (B, 1, 1, WIDTH), "one row": (1, 1, 1, WIDTH), "kernel": (3, 3, WIDTH), "bias": (WIDTH,),
}  # fmt: skip
OPS = {  # (function of arrays, names of their shapes)
    "relu_linear_attention": (lambda qkv, norm, **k: ops.relu_linear_attention(qkv, 1e-15, norm, **k), ("qkv", "norm")),
    "mix_ffn": (ops.mix_ffn, ("grid", "kernel", "bias")),
    "modulate": (ops.modulate, ("grid", "row", "row")),
    "modulate, one row": (ops.modulate, ("grid", "one row", "one row")),
    "add_gated": (ops.add_gated, ("grid", "row", "grid")),
    "add_rms_norm": (ops.add_rms_norm, ("grid", "grid", "bias", "bias")),
}
# Sizes of the mesh, and how arrays lie on it.
MESHES = {
    "rows": (dict(data=8), {"qkv": P("data"), "grid": P("data"), "row": P("data")}),
    "rows and heads": (
        dict(data=2, fsdp=2, tensor=2),
        {"qkv": P(("data", "fsdp"), None, "tensor"), "norm": P(None, "tensor"), "grid": P(("data", "fsdp"))},
    ),
}
COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def with_gradients(name):
    fn, inputs = OPS[name]

    def run(args, gradient):
        out, pull = jax.vjp(lambda *args: fn(*args, kernels="pallas_interpret"), *args)
        return out, *pull(gradient)

    keys = jax.random.split(jax.random.key(1), len(inputs) + 1)
    args = tuple(jax.random.normal(key, SHAPES[shape]) for key, shape in zip(keys, inputs))
    out = jax.eval_shape(lambda: fn(*args))
    return run, args, jax.random.normal(keys[-1], out.shape)


def on(sizes, specs, name, args, gradient):
    mesh = sharding.make_mesh(**sizes)
    rows = {4: "qkv" if name == "relu_linear_attention" else "grid"}[gradient.ndim]
    placed = [jax.device_put(a, NamedSharding(mesh, specs.get(s, P()))) for a, s in zip(args, OPS[name][1])]
    return tuple(placed), jax.device_put(gradient, NamedSharding(mesh, specs[rows]))


def differences(got, want):
    return [float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(jax.device_get(got), jax.device_get(want))]


# Those of the other kind are slow to compile, and the model below has them on a mesh.
CASES = [
    (name, mesh)
    for name in OPS
    for mesh in MESHES
    if NIGHT or (name != "mix_ffn" and (mesh == "rows") == (name != "relu_linear_attention"))
]


@pytest.mark.parametrize("name, mesh", CASES)
def test_cut_is_uncut(name, mesh):
    run, args, gradient = with_gradients(name)
    placed = on(*MESHES[mesh], name, args, gradient)
    compiled = jax.jit(run).lower(*placed).compile()
    assert max(differences(compiled(*placed), jax.jit(run)(args, gradient))) < 2e-6
    assert set(COLLECTIVE.findall(compiled.as_text())) <= {"all-reduce"}


def test_channels_of_mix_ffn_are_exchanged_and_not_gathered():
    """Cut along channels by the projections beside it: a value's gate comes over from another device."""
    mesh, (y, kernel, bias) = sharding.make_mesh(data=4, tensor=2), with_gradients("mix_ffn")[1]
    weights = jnp.eye(WIDTH), jnp.ones((WIDTH // 2, 1))

    def projected(kernels, y, expand, kernel, bias, project):
        return jnp.mean((ops.mix_ffn(y @ expand, kernel, bias, kernels) @ project) ** 2)

    last, first = P(None, "tensor"), P("tensor")
    specs = P("data"), last, P(None, None, "tensor"), first, first
    args = y, weights[0], kernel, bias, weights[1]
    placed = tuple(jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(args, specs))
    ours, plain = (functools.partial(projected, name) for name in ("pallas_interpret", "xla"))
    compiled = jax.jit(jax.value_and_grad(ours, argnums=range(5))).lower(*placed).compile()
    want = jax.jit(jax.value_and_grad(plain, argnums=range(5)))(*args)
    pairs = zip(*map(jax.tree.leaves, (compiled(*placed), want)))
    assert max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in jax.device_get(list(pairs))) < 2e-6
    lines = [line for line in compiled.as_text().splitlines() if COLLECTIVE.search(line)]
    images = [COLLECTIVE.search(line)[1] for line in lines if f"{B // 4},{SIDE},{SIDE}," in line]
    assert "all-to-all" in images and "all-gather" not in images, images


def test_without_the_sum_over_devices_gradients_are_parts(monkeypatch):
    """The control: those of scale and bias, and nothing else."""
    run, args, gradient = with_gradients("add_rms_norm")
    placed = on(*MESHES["rows"], "add_rms_norm", args, gradient)
    want = jax.jit(run)(args, gradient)
    monkeypatch.setattr(partition.jax.lax, "psum", lambda a, axes: a)
    out, dx, dy, *parts = differences(jax.jit(lambda *a: run(*a))(*placed), want)
    assert max(out, dx, dy) < 2e-6 and min(parts) > 0.1


def test_left_alone_a_kernel_gathers():
    """The other control: what `over_devices` is for."""
    _, args, gradient = with_gradients("add_gated")
    placed, _ = on(*MESHES["rows"], "add_gated", args, gradient)

    def bare(x, gate, y):
        x, y = map(ops.tokens, (x, y))
        return ops.adaln.add_gated(x, gate[:, 0, 0], y, implementation="pallas_interpret")

    assert "all-gather" in COLLECTIVE.findall(jax.jit(bare).lower(*placed).compile().as_text())


def taken_by_auto(monkeypatch):
    """On the cards that are compiled for below."""
    table = dispatch.table
    row = dict(device="NVIDIA H200", dtype="float32", implementation="pallas", where={}, error=0, bound=1, speedup=2)
    monkeypatch.setattr(dispatch, "table", lambda folder: {**table(folder), "auto": [row]})


def differentiated(*args):
    out, pull = jax.vjp(ops.modulate, *args)
    return out, *pull(out)


@pytest.mark.static
@pytest.mark.skipif(not aot.available(), reason="needs the extra `static`")
@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")  # of Pallas, since jax 0.11
def test_a_kernel_that_auto_took_gathers_nothing(monkeypatch):
    """It stands in a form for CUDA beside that of XLA, and is cut all the same."""
    taken_by_auto(monkeypatch)
    avals = [jax.ShapeDtypeStruct(SHAPES[shape], jnp.float32) for shape in ("grid", "row", "row")]
    compiled = aot.compile_for("h200", differentiated, *avals, mesh={"data": 8}, in_specs=(P("data"),) * 3)
    found = aot.summary(compiled)
    assert sum(found["custom_calls"].values()) == 2 and found["collectives"] == {}


def test_and_on_cpus_it_is_that_of_xla(monkeypatch):
    taken_by_auto(monkeypatch)
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    _, args, gradient = with_gradients("modulate")
    placed, _ = on(*MESHES["rows"], "modulate", args, gradient)
    compiled = jax.jit(differentiated).lower(*placed).compile()
    out, pull = jax.vjp(functools.partial(ops.modulate, kernels="xla"), *args)
    assert max(differences(compiled(*placed), (out, *pull(out)))) < 2e-6
    assert not COLLECTIVE.findall(compiled.as_text())


def test_vmap_goes_through_the_door():
    _, args, _ = with_gradients("add_gated")

    def total(kernels, *args):
        return jax.vmap(lambda *args: ops.add_gated(*args, kernels=kernels))(*(jnp.stack([a, 2 * a]) for a in args)).sum()

    ours, want = (jax.jit(jax.grad(functools.partial(total, kernels), argnums=(0, 1, 2))) for kernels in ("pallas_interpret", "xla"))
    assert max(differences(ours(*args), want(*args))) < 2e-6


def test_sizes_are_limited_by_the_image():
    """A kernel takes a batch of more elements than an image may have, and DC-AE's largest picture."""
    wide = jax.ShapeDtypeStruct((400, 32, 32, 11200), jnp.bfloat16)
    taps = jnp.zeros((3, 3, 11200)), jnp.zeros(11200)
    out = jax.eval_shape(functools.partial(ops.mix_ffn, kernels="pallas_interpret"), wide, *taps)
    assert out.shape == (400, 32, 32, 5600)
    picture = jax.ShapeDtypeStruct((1, 4096, 4096, 128), jnp.bfloat16)
    norm = functools.partial(ops.add_rms_norm, kernels="pallas_interpret")
    assert jax.eval_shape(norm, picture, picture, jnp.zeros(128), jnp.zeros(128)).shape == picture.shape


def test_axes_of_the_mesh_are_used_once_and_evenly():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)

    def axes(*pairs):
        arrays = ((n.split(), jax.ShapeDtypeStruct(s, "f4", sharding=NamedSharding(mesh, p))) for n, s, p in pairs)
        return partition.mesh_axes(mesh, ("b", "k"), arrays)

    given = ("b n k", (8, 3, 2), P(("data", "fsdp"), "tensor", None))
    assert axes(given) == {"b": ("data", "fsdp")}  # n is no factor
    assert axes(given, ("k b", (2, 8), P("tensor", None))) == {"b": ("data", "fsdp"), "k": ("tensor",)}
    assert axes(given, ("k b", (2, 8), P("data", None))) == {"b": ("data", "fsdp")}  # "data" cuts b


# --- A model of one block, in the loop over layers and with recomputation.

MODEL = Sana(
    width=64, depth=1, heads=4, cross_heads=2, latent_channels=4, caption_width=8, qk_norm=True, remat="products"
)


def gradients(module, place=lambda x, spec: x):
    keys = jax.random.split(jax.random.key(0), 4)
    params = jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(keys[3], a.shape),
        jax.jit(MODEL.init)(keys[0], *MODEL.example_inputs())["params"],
    )
    x = place(jax.random.normal(keys[1], (8, 3, 5, 4)), "rows")
    states = place(jax.random.normal(keys[2], (8, 3, 8)), "rows")
    t, mask = place(jnp.linspace(100.0, 900.0, 8), "rows"), place(jnp.ones((8, 3), bool), "rows")

    def loss(params, x, t, states, mask):
        return jnp.mean(module.apply({"params": params}, x, t, states, mask) ** 2)

    return jax.value_and_grad(loss), (place(params, "params"), x, t, states, mask)


def relative(got, want):
    """The largest difference of each leaf, relative to its largest value."""
    pairs = zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(jax.device_get(want)), strict=True)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs if np.abs(b).max())


@pytest.fixture(scope="module")
def program():
    fn, args = gradients(MODEL.clone(kernels="reference"))
    return jax.jit(fn), args


@pytest.fixture(scope="module")
def reference(program):
    fn, args = program
    return fn(*args)


def test_the_comparison_sees_another_bias(program, reference):
    """The control of the test below."""
    fn, (params, *inputs) = program
    moved = jax.tree_util.tree_map_with_path(lambda path, a: a * 1.01 if "depthwise" in str(path) else a, params)
    assert relative(fn(moved, *inputs), reference) > 1e-4


# The first has all of the others in it; the last is one device.
SIZES = [dict(data=2, fsdp=2, tensor=2)] + [dict(data=8), dict(fsdp=8), None] * NIGHT


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradient_of_a_block_is_that_of_the_reference(reference, sizes):
    module = MODEL.clone(kernels="pallas_interpret")
    if sizes is None:
        fn, args = gradients(module)
        assert relative(jax.jit(fn)(*args), reference) < 1e-5
        return
    mesh = sharding.make_mesh(**sizes)

    def place(tree, what):
        if what == "rows":
            return jax.device_put(tree, layout.batch_sharding(mesh))
        return jax.tree.map(jax.device_put, tree, layout.param_shardings(tree, MODEL, mesh))

    fn, args = gradients(module, place)
    with jax.set_mesh(mesh):
        got = jax.jit(layout.on_mesh(fn, mesh))(*args)
    assert relative(got, reference) < 1e-5
