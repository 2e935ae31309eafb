"""All of SANA in minutes on a laptop: text encoder, autoencoder and flow, learned from eight pictures.

Three stages, each a run of its own in a folder of workdir; later ones use what earlier ones learned.
Paper: https://arxiv.org/abs/2410.10629, at toy size.  Hardware: 2 CPU cores, no downloads.
Cost: about 2 minutes, of which XLA's compiler takes one.  Expected: the autoencoder reaches 24 dB
PSNR, and sampled latents come as near to the data as 0.4 in mean square, of 2 that noise has.

    python train.py configs/debug.py workdir=runs/debug
    python -m sana_jax.export runs/debug/flow models/debug
    python sample.py --model models/debug --prompt "a large white ring on red"
"""

from sana_jax.data.captions import Captions
from sana_jax.data.synthetic import Synthetic
from sana_jax.experiment import Checkpoint, Data, Experiment, Frozen, Log, Optim, Preview
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.stacks import NVLABS
from sana_jax.training.objectives import Autoencoder, Flow, LanguageModel
from sana_jax.training.optimizer import AdamW

SCALE = 0.06  # of the latent, so that its standard deviation is about 1 (measured behind the second stage)

data = Data(
    source=Synthetic(records=8, size=64), batch=8, size=64, buckets=False, captions=Captions("first"), tokens=16
)
rule = AdamW(b2=0.99, eps=1e-8, weight_decay=0.0)
often = dict(checkpoint=Checkpoint(every=100), log=Log(every=10))

text = Experiment(
    name="text",
    model=Gemma2(vocab_size=320, width=32, depth=2, heads=2, kv_heads=1, head_dim=16, hidden=64, query_scale=16),
    objective=LanguageModel(),
    data=data,
    optim=Optim(rule, lr=3e-3, warmup=10, decay="cosine", clip=1.0),
    steps=100,
    preview=Preview(every=0),
    **often,
)
autoencoder = Experiment(
    name="autoencoder",
    model=DCAE(
        widths=(16, 16, 32, 32, 64, 64),
        encoder_depths=(0, 1, 1, 1, 1, 1),
        decoder_depths=(0, 1, 1, 1, 1, 1),
        encoder_attention=(None, None, None, None, None, (5,)),
        decoder_attention=(None, None, None, None, None, (5,)),
        head_dim=16,
        scaling_factor=SCALE,
    ),
    objective=Autoencoder(lpips=0.0),
    data=data,
    optim=Optim(rule, lr=1.5e-3, warmup=10, decay="cosine", clip=1.0),
    steps=300,
    preview=Preview(every=100),
    **often,
)
flow = Experiment(
    name="flow",
    model=Sana(
        width=64, depth=2, heads=2, cross_heads=2, caption_width=32, sample_size=2, **NVLABS.sana_fields()
    ),
    objective=Flow(scaling_factor=SCALE),
    data=data,
    optim=Optim(rule, lr=4e-3, warmup=10, decay="cosine", clip=1.0, ema=0.98),
    steps=400,
    frozen=Frozen(dc_ae="stage:autoencoder", text="stage:text", chi="none"),
    preview=Preview(every=100),  # of the captions of the data, so that the distance to it is measured
    **often,
)

config = Experiment(stages=(text, autoencoder, flow))
