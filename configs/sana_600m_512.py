"""Sana-0.6B at 512 px from random weights.

Paper: SANA, https://arxiv.org/abs/2410.10629, sections 2 and 3; see sana_1600m_512.py for what is not published.
Hardware: 8 H200, 128 rows each as published.
Cost, an estimate: 200,000 steps x 1024 pictures x 0.95 TFLOP (3 x 0.316 forward) at 316 TFLOP/s are 170 H200
hours with cached features; see sana_1600m_512.py.

    python train.py configs/sana_600m_512.py workdir=runs/sana_600m_512 data.source=data/cached_512
"""

from sana_jax.experiment import derived
from sana_jax.models.sana import SANA_600M
from sana_jax.stacks import NVLABS

config = derived(__file__, "sana_1600m_512", {
    "model": SANA_600M.clone(sample_size=16, dtype="bf16", remat="products", **NVLABS.sana_fields()),
    "frozen.dc_ae": "sana-0.6b-512",
    "frozen.text": "sana-0.6b-512",
})  # fmt: skip
