"""A run of three seconds with everything that a long one has, for tests that kill it.

    python train.py tests/chaos/tiny.py workdir=RUN

Toy SANA on made-up latents; AdamW, EMA, a batch with bad records in it, a checkpoint every third step.
"""

from sana_jax.experiment import Checkpoint, Data, Experiment, Log, Optim, Preview, Reliability
from sana_jax.models.sana import Sana
from sana_jax.training.objectives import Flow
from sana_jax.training.optimizer import AdamW
from tests.chaos.latents import Latents

config = Experiment(
    model=Sana(width=16, depth=2, heads=2, cross_heads=2, latent_channels=4, caption_width=8, sample_size=2),
    objective=Flow(),
    data=Data(source=Latents(), batch=8, size=64, buckets=False, tokens=4, bad_share=0.5, bad_window=40),
    optim=Optim(rule=AdamW(), lr=1e-3, warmup=5, ema=0.9),
    steps=60,
    checkpoint=Checkpoint(every=3, keep=2, keep_every=30),
    log=Log(every=1, tensorboard=False),
    preview=Preview(every=0),
    reliability=Reliability(hang_seconds=120.0),
)
