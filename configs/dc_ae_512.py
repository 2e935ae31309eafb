"""DC-AE f32c32 at 512 px from random weights: the first stage, all of it trained.

Paper: DC-AE, https://arxiv.org/abs/2410.10733, section 3.3, without its adversarial stage; L1, SSIM and LPIPS.
Its rates, batches and numbers of steps are not in the paper; these are ours.
Hardware: 8 H200, 16 pictures each.
Cost, an estimate: 200,000 steps x 128 pictures x 10 TFLOP (3 x 3.4 forward) at 316 TFLOP/s, 40 % of what large
bfloat16 products reach on an H200, are 230 H200 hours.

    python train.py configs/dc_ae_512.py workdir=runs/dc_ae_512 data.source=data/train \\
        objective.lpips_weights=models/lpips_vgg.safetensors
"""

from sana_jax.data.folder import Folder
from sana_jax.experiment import Data, Experiment, Optim, Preview
from sana_jax.models.dc_ae import DC_AE_F32C32_SANA
from sana_jax.training.objectives import Autoencoder
from sana_jax.training.optimizer import AdamW

config = Experiment(
    model=DC_AE_F32C32_SANA.clone(dtype="bf16"),
    objective=Autoencoder(l1=1.0, ssim=0.1, lpips=0.1),
    data=Data(Folder("data/train", recursive=True), batch=128, size=512, buckets=False),
    optim=Optim(
        AdamW(b2=0.95, eps=1e-8, weight_decay=0.05),
        lr=1e-4,
        warmup=2000,
        decay="cosine",
        clip=1.0,
        ema=0.9999,
        no_decay=(r".*norm.*/(scale|bias)", r".*/bias"),
    ),
    steps=200_000,
    preview=Preview(every=1000),
    seed=1,
)
