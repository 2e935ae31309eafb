"""Sana-1.6B at 512 px from random weights, the first step of the cascade 512 -> 1024 -> 2K -> 4K.

Paper: SANA, https://arxiv.org/abs/2410.10629, sections 2 and 3; batch size and number of steps were not
published with it, 200,000 is SANA-1.5's (https://arxiv.org/abs/2501.18427).
Hardware: 16 H200, 64 rows each; on 8 of them optim.accumulate=2.
Cost, an estimate: 200,000 steps x 1024 pictures x 2.5 TFLOP (3 x 0.837 forward) at 316 TFLOP/s, 40 % of
what large bfloat16 products reach on an H200, are 450 H200 hours: with cached features, live ones double it.

    python -m sana_jax.data.cache configs/sana_1600m_512.py data/cached_512 data.source=data/train
    python train.py configs/sana_1600m_512.py workdir=runs/sana_1600m_512 data.source=data/cached_512
"""

from sana_jax.data.captions import Captions
from sana_jax.data.tar import Tar
from sana_jax.experiment import Data, Experiment, Frozen, Optim, Preview
from sana_jax.models.sana import SANA_1600M
from sana_jax.stacks import NVLABS
from sana_jax.training.objectives import Flow
from sana_jax.training.optimizer import CAME

config = Experiment(
    model=SANA_1600M.clone(sample_size=16, dtype="bf16", remat="products", **NVLABS.sana_fields()),
    objective=Flow(shift=3.0, caption_dropout=0.1),
    data=Data(Tar("data/train"), batch=1024, size=512, captions=Captions("power", threshold=25.0, temperature=0.1)),
    optim=Optim(CAME(), lr=1e-4, lr_rule="sqrt", warmup=2000, clip=0.1),  # published without a moving average
    steps=200_000,
    frozen=Frozen(dc_ae="sana-1.6b-512", text="sana-1.6b-512"),
    preview=Preview(
        every=500,
        prompts=(
            "a cyberpunk cat with a neon sign that says SANA",
            "a small red house on a cliff above the sea, oil painting",
            "portrait of an old fisherman, soft window light",
            "three green apples and a blue cup on a wooden table",
        ),
    ),
    seed=1,
)
