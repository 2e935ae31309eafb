"""What is compiled, how often, in which precision, and what stands outside the sampling loop."""

import jax
import numpy as np
import pytest

import sana_jax
from sana_jax import programs
from tests.toy_pipeline import Rectangle

SIZE = dict(height=64, width=96, bin_resolution=False)
RECTANGLE = Rectangle(64, 96)


@pytest.fixture(scope="module")
def ours(toy_folder):
    return sana_jax.load_pipeline(toy_folder)


def distance(a, b):
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


@pytest.mark.parity
def test_float32_means_float32_on_any_device(ours):
    """Every product of a float32 program asks for full precision, also where the default is TF32."""
    module, params = ours.sana
    states, mask = np.zeros((1, 64, 64), "f"), np.ones((1, 64), bool)
    schedule = programs.SAMPLERS["flow-dpm-solver"][0](2, 3.0)
    static = dict(sampler="flow-dpm-solver", guided=False, limited=False)

    def precisions(module):
        with jax.default_matmul_precision("default"):
            text = str(
                jax.make_jaxpr(
                    lambda p, x: programs.denoise(module, p, (states, mask, None, None), x, schedule, 4.5, (0, 1), **static)
                )(params, RECTANGLE.noise(1))
            )
        return text.count("dot_general["), text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") + text.count("precision=Precision.HIGHEST")

    products, highest = precisions(module)
    assert products == highest > 10
    assert precisions(module.clone(dtype=jax.numpy.bfloat16))[1] == 0


@pytest.mark.parity
def test_the_instruction_is_encoded_once(ours):
    pipeline = sana_jax.Pipeline(ours.sana, ours.dc_ae, ours.text)
    arguments = dict(steps=1, output="latent", latents=RECTANGLE.noise(1), **SIZE)
    pipeline.generate("a cat", **arguments)
    (prefix,) = pipeline._prefixes.values()
    assert prefix.keys.shape[2] > 400  # nearly all tokens of the published instruction
    pipeline.generate("a busy street", **arguments)
    assert pipeline._prefixes.popitem()[1] is prefix
    for i in range(20):
        pipeline.encode_prompt(f"cat {i}", max_sequence_length=32)
    assert len(pipeline._texts) == 8


@pytest.mark.parity
def test_the_batch_does_not_change_the_picture(ours):
    arguments = dict(steps=2, seed=7, output="latent", **SIZE)
    four = ours.generate("a cat", num_images=4, **arguments)
    for i in (0, 3):
        one = ours.generate("a cat", first_image=i, **arguments)
        assert distance(one, four[i : i + 1]) <= 1e-5
    assert distance(four[:1], four[1:2]) > 0.1
    assert distance(four, ours.generate("a cat", num_images=4, **(arguments | {"seed": 8}))) > 0.1


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.*too long:UserWarning")
def test_prompts_add_no_programs(ours):
    """Three buckets of text length, with and without guidance: six programs, whatever is asked."""
    words = "cat dog street house forest".split()

    def ask(i, guidance):
        prompt = " ".join(words[(i + j) % 5] for j in range(1 + (i * 37) % 250))
        ours.generate(prompt, steps=2, guidance_scale=guidance, seed=i, height=32, width=32, bin_resolution=False)

    for guidance in (1.0, 4.5):
        for i in (0, 2, 6):  # 1, 75 and 223 words: one for each bucket
            ask(i, guidance)
    counts = programs.paint_program._cache_size(), programs.text_program._cache_size()
    for i in range(50):
        ask(i, 1.0 if i % 2 else 3.0 + i / 10)
    assert (programs.paint_program._cache_size(), programs.text_program._cache_size()) == counts


def loops(jaxpr):
    """All scans of a jaxpr, outermost first: (length, body)."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["length"], equation.params["jaxpr"].jaxpr
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from loops(inner)


def products(jaxpr):
    """Shapes of the right-hand factors of all matrix products, loops included."""
    shapes = [e.invars[1].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    shapes += products(inner)
    return shapes


def test_text_and_time_are_outside_the_loop():
    module = sana_jax.Sana(width=64, depth=3, heads=2, cross_heads=4, caption_width=48)
    params = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]
    states, mask = np.zeros((1, 12, 48), "f"), np.ones((1, 12), bool)
    schedule = programs.SAMPLERS["flow-dpm-solver"][0](20, 3.0)
    jaxpr = jax.make_jaxpr(
        lambda p, x: programs.denoise(
            module, p, (states, mask, states, mask), x, schedule, 4.5, (0, 1),
            sampler="flow-dpm-solver", guided=True, limited=False,
        )
    )(params, RECTANGLE.noise(1)).jaxpr  # fmt: skip
    (steps,) = [body for length, body in loops(jaxpr) if length == 20]
    width, caption = module.width, module.caption_width
    kv, modulation = (module.depth, width, 2 * width), (width, 6 * width)
    inside, everywhere = products(steps), products(jaxpr)
    for shape in (kv, modulation, (caption, width), (256, width)):
        assert shape in everywhere and shape not in inside, shape
    assert (width, 3 * width) in inside  # the control: what must be there is seen there
