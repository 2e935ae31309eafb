"""SANA-1.5 4.8B at 1024 px, grown from the 1.6B: its first 18 of 20 blocks, and 42 that begin as the identity.

Paper: SANA-1.5, https://arxiv.org/abs/2501.18427, section 2.1: 60 % fewer steps than from random weights.
Rate and warm-up are those of the published 4.8B experiment, the number of steps (> 100,000) the paper's.
Hardware: 64 H200, 16 rows each, parameters cut over 8 (mesh.fsdp).
Cost, an estimate: 100,000 steps x 1024 pictures x 27 TFLOP (3 x 8.89 forward) at 316 TFLOP/s are 2400 H200
hours with cached features; see sana_1600m_512.py.

    python train.py configs/sana_1_5_4800m_1024.py workdir=runs/sana_1_5_4800m data.source=data/cached_1024
"""

from sana_jax.experiment import derived

config = derived(__file__, "sana_1_5_1600m_1024", {
    "init.weights": "sana-1.5-1.6b",
    "init.grow": 18,
    "model.depth": 60,
    "optim.lr": 2e-5,
    "mesh.fsdp": 8,
    "steps": 100_000,
})  # fmt: skip
