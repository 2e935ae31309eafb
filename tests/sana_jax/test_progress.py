"""Steps as they happen: in order, while the program runs, and without a trace in the picture."""

import numpy as np
import pytest

import sana_jax
from sana_jax import programs, progress
from tests.toy_pipeline import Rectangle

pytestmark = pytest.mark.parity  # the toy folder is made by the peers
RECTANGLE = Rectangle(64, 96)
ARGUMENTS = dict(
    latents=RECTANGLE.noise(1), steps=5, output="latent", height=64, width=96, bin_resolution=False,
    pag_scale=2.0, guidance_interval=(0.3, 0.9), sampler="flow-euler",
)  # fmt: skip


@pytest.fixture(scope="module")
def ours(toy_folder):
    return sana_jax.load_pipeline(toy_folder)


def test_steps_and_the_same_bits(ours):
    seen = []
    image = ours.generate("a cat", on_step=lambda *call: seen.append(call), **ARGUMENTS)
    assert seen == [(step, 5) for step in range(6)]
    np.testing.assert_array_equal(image, ours.generate("a cat", **ARGUMENTS))
    assert not progress._listeners


def test_denoise_reports_too_and_no_function_is_compiled(ours):
    states, mask = ours.encode_prompt("a cat", chi="none")
    call = dict(latents=RECTANGLE.noise(1), steps=3)
    plain, counts, seen = ours.denoise(states, mask, **call), set(), []
    for k in range(3):
        image = ours.denoise(states, mask, on_step=lambda step, steps, k=k: seen.append((k, step)), **call)
        counts.add(programs.denoise_program._cache_size())
        np.testing.assert_array_equal(image, plain)
    assert len(counts) == 1 and seen == [(k, step) for k in range(3) for step in range(4)]


def test_what_it_raises_is_raised_once_behind_the_program(ours):
    calls = []

    def fails(step, steps):
        calls.append(step)
        if step == 2:
            raise KeyError("closed bar")

    with pytest.raises(KeyError, match="closed bar"):
        ours.generate("a cat", on_step=fails, **ARGUMENTS)
    assert calls == [0, 1, 2] and not progress._listeners


def test_a_failed_call_leaves_no_listener():
    seen = []
    with pytest.raises(ZeroDivisionError):
        with progress.listening(lambda *call: seen.append(call), 3) as number:
            progress._announce(number, 1)
            1 / 0
    progress._announce(number, 2)  # a late report of a program that was given up
    assert seen == [(1, 3)] and not progress._listeners
