"""SANA-1.5 1.6B at 1024 px from random weights: queries and keys are normalised.

Paper: SANA-1.5, https://arxiv.org/abs/2501.18427: more than 200,000 steps at 1e-4, global batch 1024 to 4096
on 64 A100; then 10,000 steps at 2e-5 on its best pictures (init.weights=RUN optim.lr=2e-5 steps=10000).
Both rates are scaled by sqrt(batch / 256), as the published code does: 2e-4 and 4e-5 at a batch of 1024;
optim.lr_rule=none takes them as they stand.
Hardware: 32 H200, 32 rows each.
Cost, an estimate: 200,000 steps x 1024 pictures x 8.9 TFLOP (3 x 2.97 forward) at 316 TFLOP/s are 1600 H200
hours with cached features; see sana_1600m_512.py.

    python train.py configs/sana_1_5_1600m_1024.py workdir=runs/sana_1_5_1600m data.source=data/cached_1024
"""

from sana_jax.experiment import derived

config = derived(__file__, "sana_1600m_1024", {
    "init.weights": "",
    "model.qk_norm": True,
    "steps": 200_000,
    "frozen.dc_ae": "sana-1.5-1.6b",
    "frozen.text": "sana-1.5-1.6b",
})  # fmt: skip
