"""Next-token prediction, to train a small text encoder of Gemma-2's kind on captions.

A transformer that paints sees the last states, and those of a small language model hold what comes next: at the second
noun of "a red circle above a blue square" what is above what was 0.3 % of their variance, the first colour 2 %
(docs/log.md).  So a state may be asked for the tokens before it as well.
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
SIGNAL = 64.0  # the logit of a code that is all of a state; one that is a share s of its variance has SIGNAL * sqrt(s)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """-log p(next token), and of an earlier one: means over all tokens of the batch.

    The head of the next token is the embedding.
    recall: of so many tokens, its own and those before it, each state but the first is asked for one, drawn anew in each
      step; 0 (nothing is asked) to width - 1.  Each token has a random code, the same always, and the one j places
      back is that whose code fits the state's channels rolled by (j + 1) * (width // (recall + 1)): order by
      permutation (Sahlgren, Holst and Kanerva, CogSci 2008), without parameters.
    Metrics: `accuracy`, how often the next token is the likeliest; with recall also `next`, its part of the loss, and
    `recall`, how often the earlier one is the likeliest.
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
            extra["next"] = loss
            back = jax.vmap(lambda key: places_back(key, ids.shape[1], self.recall))(keys)
            nll, hit = token_scores(recalling(states, back, self.recall), codes(*params["embedding"].shape), earlier(ids, back))
            recalled, extra["recall"] = ((x[:, 1:] * valid).sum(axis=1) / count for x in (nll, hit))
            loss += recalled
        return Terms(loss, batch["weight"] * tokens, extra)


def places_back(key, length, recall):
    """int32 [m]: how far back each of `length` states is asked, not beyond the first token."""
    return jax.random.randint(key, (length,), 0, jnp.minimum(jnp.arange(length) + 1, recall))


def codes(vocab_size, width):
    """float32 [v d] of tokens.  Not the embedding: there "above" and "below" are neighbours, and so they would be here."""
    return jax.random.normal(jax.random.key(0), (vocab_size, width)) * (SIGNAL / width)


def recalling(states, back, recall):
    """States [b m d], their channels rolled so that a code fits that of the token `back` [b m] places before."""
    width = states.shape[-1]
    channels = (jnp.arange(width) + (back[..., None] + 1) * (width // (recall + 1))) % width
    return jnp.take_along_axis(states, channels, axis=-1)


def earlier(ids, back):
    """ids [b m] of the tokens `back` [b m] places before, which is not beyond the first."""
    return jnp.take_along_axis(ids, jnp.arange(ids.shape[1]) - back, axis=1)


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
