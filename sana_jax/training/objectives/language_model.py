"""Next-token prediction, to train a small text encoder of Gemma-2's kind on captions.

A transformer that paints sees the last states, and of a small language model these hold what comes next: who has
which colour, and what is above what, is a hundredth of their variance (docs/log.md).  So a state may be asked for
the tokens before it as well.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sana_jax import ops
from sana_jax.models.gemma2 import soft_cap
from sana_jax.models.layers import by_rows
from sana_jax.programs import apply
from sana_jax.training.objectives.terms import Terms

CHUNK = 64  # tokens whose logits exist at a time
LOGIT_CAP = 30.0  # docs/numerics.md 6: Gemma-2's final soft cap
# Standard deviation of a code's channels: a ninth of what a state of 128 channels holds brings its logit near the cap.
CODE = 0.5


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """-log p(next token), the mean over all tokens of the batch; the head is the embedding.

    recall: so many tokens back, its own the first, a state is asked for too.  Each token has a random code, the same
      always, and the one j places back is the token whose code fits the state's channels rolled by
      (j + 1) * (width // (recall + 1)): a binding by permutation (Plate, holographic reduced representations, 1995),
      without parameters.  Each step asks each state for one of them, drawn at random, and adds -log p of it.
    """

    recall: int = 0
    reads = ("texts",)

    def frozen_needed(self, names):
        return set()

    def load(self):
        return {}, []

    def __call__(self, model, frozen, params, batch, keys):
        """Terms of a batch with ids, ids_mask [b m]; a row weighs as many tokens as it predicts."""
        ids, mask = batch["ids"], batch["ids_mask"]
        states = by_rows(apply(model, params, ids, mask))
        valid = mask[:, 1:].astype(jnp.float32)
        tokens = valid.sum(axis=1)
        count = jnp.maximum(tokens, 1)
        nll, hit = token_scores(states[:, :-1], params["embedding"], ids[:, 1:])
        loss, accuracy = ((x * valid).sum(axis=1) / count for x in (nll, hit))
        extra = {"accuracy": accuracy}
        if self.recall:
            back = jax.vmap(lambda key: jax.random.randint(key, ids.shape[1:], 0, self.recall))(keys)
            nll, hit = token_scores(recalling(states, back, self.recall), codes(*params["embedding"].shape), earlier(ids, back))
            recalled, extra["recall"] = ((x[:, 1:] * valid).sum(axis=1) / count for x in (nll, hit))
            loss += recalled
        return Terms(loss, batch["weight"] * tokens, extra)


def codes(vocab_size, width):
    """float32 [v d] of tokens.  Not the embedding: there "above" and "below" are neighbours, and so they would be here."""
    return CODE * jax.random.normal(jax.random.key(0), (vocab_size, width))


def recalling(states, back, recall):
    """States [b m d], their channels rolled so that a code fits that of the token `back` [b m] places before."""
    width = states.shape[-1]
    channels = (jnp.arange(width) + (back[..., None] + 1) * (width // (recall + 1))) % width
    return jnp.take_along_axis(states, channels, axis=-1)


def earlier(ids, back):
    """ids [b m] of the tokens `back` [b m] places before; the first one's where there are not as many."""
    return jnp.take_along_axis(ids, jnp.maximum(jnp.arange(ids.shape[1]) - back, 0), axis=1)


def token_scores(states, embedding, ids):
    """(-log p(id), whether it is the likeliest) of states [b m d] and ids [b m]: [b m] each.

    A chunk of tokens at a time, and nothing kept for the gradient: with 256000 tokens to choose from,
    the logits of one caption have 300 MB.
    """

    @jax.checkpoint
    def chunk(states, ids):
        logits = ops.einsum32("bmd,vd->bmv", states, embedding.astype(states.dtype))
        logits = soft_cap(logits, LOGIT_CAP)
        chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        hit = jnp.argmax(logits, axis=-1) == ids
        return jax.nn.logsumexp(logits, axis=-1) - chosen, hit.astype(jnp.float32)

    scores = [chunk(states[:, i : i + CHUNK], ids[:, i : i + CHUNK]) for i in range(0, ids.shape[1], CHUNK)]
    return tuple(jnp.concatenate(column, axis=1) for column in zip(*scores))
