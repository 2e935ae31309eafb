"""Folders of runs as train.py leaves them, without training."""

import functools
import pathlib

import jax
import numpy as np

from sana_jax.checkpoints.write import write_json
from sana_jax.data.synthetic import Synthetic
from sana_jax.experiment import Data, Experiment, Frozen, Optim, Preview, describe
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.parameters import abstract_parameters
from sana_jax.stacks import NVLABS
from sana_jax.training import optimizer
from sana_jax.training.objectives import Autoencoder, Flow, LanguageModel
from sana_jax.training.state import TrainState
from sana_jax.training.store import Store

SANA = Sana(
    width=64, depth=3, heads=2, cross_heads=2, caption_width=32, sample_size=2, qk_norm=True, **NVLABS.sana_fields()
)
# F32, so that it goes with SANA; stages 4 and 5 have attention, which cuts channels into heads.
DC_AE = DCAE(
    widths=(4, 4, 4, 8, 16, 32), encoder_depths=(0, 1, 1, 1, 1, 1), decoder_depths=(0, 1, 1, 1, 1, 1), head_dim=8,
    encoder_attention=(None, None, None, None, None, ()), decoder_attention=(None, None, None, None, None, ()),
    rearrange_down=True, rearrange_up=True, scaling_factor=0.5,
)  # fmt: skip
GEMMA2 = Gemma2(vocab_size=320, width=32, depth=2, heads=2, kv_heads=1, head_dim=16, hidden=64, query_scale=16)
OBJECTIVES = {Sana: Flow(shift=2.0, scaling_factor=0.5), DCAE: Autoencoder(), Gemma2: LanguageModel()}


@functools.cache
def random_params(model, seed=0):
    """Every leaf N(0, 0.3), host arrays: zeros and ones would hide mistakes."""
    rng = np.random.default_rng(seed)
    shapes = abstract_parameters(model)
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


def make_config(folder, model, steps=(3,), ema=None, frozen=Frozen()):
    return Experiment(
        model=model, objective=OBJECTIVES[type(model)], optim=Optim(optimizer.AdamW(), ema=ema), steps=max(steps),
        data=Data(Synthetic(8, 64), batch=8, size=64, buckets=False), frozen=frozen, preview=Preview(every=0),
        workdir=str(folder), name="toy",
    )  # fmt: skip


def make_run(folder, model, steps=(3,), ema=None, frozen=Frozen()):
    """The folder of a run; parameters of step n are `random_params(model, n)`, their average twice that."""
    config = make_config(folder, model, steps, ema, frozen)
    store = Store(pathlib.Path(folder) / "checkpoints", keep=len(steps))
    for step in steps:
        params = jax.tree.map(jax.numpy.asarray, random_params(model, step))
        average = None if ema is None else jax.tree.map(lambda leaf: 2 * leaf, params)
        zero = jax.numpy.zeros((), jax.numpy.int32)
        state = TrainState(zero + step, params, average, (), zero, zero)  # of an optimizer that keeps nothing
        store.save(step, state, {"samples": 8 * step}, force=True)
    store.close()
    write_json(pathlib.Path(folder) / "config.json", describe(config))
    return folder
