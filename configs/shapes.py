"""The model in the box: text encoder, autoencoder and flow for pictures of coloured shapes, from nothing.

Stages, each a run of its own in a folder of workdir; later ones use what earlier ones learned.  The
autoencoder begins on small pictures, which are cheaper and hold the same edges; the flow is SANA's
cascade, 256 pixels and then 512 as well.
Paper: https://arxiv.org/abs/2410.10629, at 1/300 of its size.  Hardware: one GPU, or 2 CPU cores and
patience.  Data: painted while it trains, no downloads.
Cost: on a GPU not measured yet; README.md has the times of two CPU cores.

    python train.py configs/shapes.py workdir=runs/shapes
    python -m sana_jax.export runs/shapes/flow_sizes models/shapes
    python -m sana_jax.evals.shapes --model models/shapes --images-per-category 400 --output evals/shapes
"""

import dataclasses

from sana_jax.data.captions import Captions
from sana_jax.data.shapes import Shapes
from sana_jax.experiment import Checkpoint, Data, Experiment, Frozen, Init, Log, Optim, Preview
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.stacks import NVLABS
from sana_jax.training.objectives import Autoencoder, Flow, LanguageModel
from sana_jax.training.optimizer import AdamW, Muon

# Of the latent, so that its standard deviation is about 1: measured behind the autoencoder.
SCALE = 1.15
# Of the captions with a score of 25 or more, the better ones more often.  Of those of two things 89 % say a colour and
# 64 % who is where.
CAPTIONS = Captions("power", threshold=25.0, temperature=0.1)
# Of what prompts leave out the flow has to hear much too: "a star and a ring" is one caption in ten here, with
# `CAPTIONS` one in fifty.
PROMPTS = Captions("proportion", proportion=(("terse", 2), ("plain", 4), ("synonyms", 1.5), ("rich", 1.5)))
# Captions that say twice who has which colour: where to look back is what a language model learns from them.
TEXTS = Captions("proportion", proportion=(("terse", 1), ("plain", 1), ("synonyms", 1), ("rich", 3)))

rule = AdamW(b2=0.99, eps=1e-8, weight_decay=0.01)
muon = Muon(weight_decay=0.01)  # after 25,000 rows a tenth less loss than AdamW, for a fifth more time a row (docs/log.md)
often = dict(checkpoint=Checkpoint(every=1000), log=Log(every=50))

# What the flow learns from: a smaller world than the autoencoder's.  The tokens of an outline have to agree on its turn
# and place; with all of both the flow had learned circles, which have no turn, and one star in eight.  On a grid of
# tokens a shape of a size is the same few vectors everywhere.  Of things that touch it makes one, and the detector
# too (docs/log.md).
SCENES = dict(
    turn=0.0, jitter=0.0, grid=1 / 4, apart=0.06, textures=("plain",),
    kinds=(("one", 0.08), ("two", 0.57), ("alike", 0.32), ("mixed", 0.03)),
)  # fmt: skip


def data(size, batch, captions=CAPTIONS, sizes=False, **source):
    return Data(Shapes(size=size, **source), batch, size, buckets=sizes, captions=captions, tokens=48)


text = Experiment(
    name="text",
    model=Gemma2(
        vocab_size=1024,  # holds every word of the captions; 512 split 113 of them
        width=128, depth=4, heads=4, kv_heads=2, head_dim=32, hidden=384, query_scale=32
    ),
    # The flow needs to know who has what and where.  Without this, a relation was 0.3 % of the variance of states, and
    # the flow painted what was said in any order (docs/log.md, which also says what the box was trained with).
    objective=LanguageModel(recall=8),
    data=data(256, 64, TEXTS),
    optim=Optim(rule, lr=2e-3, warmup=100, decay="cosine", clip=1.0, no_decay=(r".*norm/scale",)),
    steps=5500,
    preview=Preview(every=0),
    **often,
)
autoencoder = Experiment(
    name="autoencoder",
    model=DCAE(
        widths=(16, 16, 32, 64, 128, 128),
        encoder_depths=(0, 1, 1, 1, 2, 2),
        decoder_depths=(0, 1, 1, 1, 2, 2),
        encoder_attention=(None, None, None, (5,), (5,), (5,)),
        decoder_attention=(None, None, None, (5,), (5,), (5,)),
        head_dim=16,
        scaling_factor=SCALE,
    ),
    objective=Autoencoder(l1=0.0, l2=1.0, ssim=0.0, lpips=0.0),
    data=data(128, 8),  # small batches: many steps matter more
    optim=Optim(rule, lr=1e-3, warmup=50, clip=1.0, ema=0.995),
    steps=1700,
    preview=Preview(every=200),
    **often,
)
autoencoder_256 = dataclasses.replace(
    autoencoder,
    name="autoencoder_256",
    objective=Autoencoder(l1=0.0, l2=1.0, ssim=0.1, lpips=0.0),
    data=data(256, 8),
    init=Init("stage:autoencoder"),
    optim=Optim(rule, lr=1e-3, warmup=50, decay="cosine", clip=1.0, ema=0.995),
    steps=1500,
)
flow = Experiment(
    name="flow",
    model=Sana(
        width=192, depth=6, heads=6, cross_heads=6, caption_width=128, sample_size=8, unroll=6,
        position_scale=1.0,  # which the 2K model has
        caption_scale=1.0,  # the published 0.01 had not moved after 1250 steps
        **NVLABS.sana_fields(),
    ),
    # 56 % of the rows at noise levels from 0.65 to 0.9, where pictures go wrong (benchmarks/shapes_levels.py), and 28 %
    # beyond, where it is decided who has what, and where.
    objective=Flow(shift=5.0, logit_std=1.0, dropped_mask="empty", scaling_factor=SCALE),
    data=data(256, 64, PROMPTS, **SCENES),
    optim=Optim(muon, lr=2e-3, warmup=100, decay="cosine", clip=1.0, ema=0.999),
    steps=20_000,
    frozen=Frozen(dc_ae="stage:autoencoder_256", text="stage:text", chi="none"),
    preview=Preview(
        every=2000, guidance_scale=3.0,
        prompts=("a red circle above a blue square", "three green stars", "a white heart", "a yellow ring and a black cross"),
    ),
    **often,
)  # fmt: skip
# A quarter of the pictures has 512 pixels, and a third of all is not square.  Things keep their pixels, so their tokens are
# those that the flow knows; where they grew, 115,000 rows were far from enough (docs/log.md).
SIZES = tuple((scale * high, scale * wide) for scale in (1, 2) for high, wide in ((256, 256), (320, 256), (256, 320)))
flow_sizes = dataclasses.replace(
    flow,
    name="flow_sizes",
    data=data(
        256, 64, PROMPTS, SIZES, records=1_000_000,  # the buckets need a table of them
        aspects=(1.0, 1.0, 5 / 4, 1.0, 1.0, 4 / 5), scales=(1.0, 1.0, 1.0, 2.0), grow=False, **SCENES,
    ),  # fmt: skip
    init=Init("stage:flow"),
    optim=Optim(muon, lr=1e-3, warmup=200, decay="cosine", clip=1.0, ema=0.999),
    steps=4000,
)

config = Experiment(stages=(text, autoencoder, autoencoder_256, flow, flow_sizes))
