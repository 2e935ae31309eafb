"""Next-token prediction, to train a small text encoder of Gemma-2's kind on captions."""

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


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """-log p(next token), the mean over all tokens of the batch; the head is the embedding."""

    reads = ("texts",)

    def frozen_needed(self, names):
        return set()

    def load(self):
        return {}, []

    def __call__(self, model, frozen, params, batch, keys):
        """Terms of a batch with ids, ids_mask [b m]; a row weighs as many tokens as it predicts."""
        ids, mask = batch["ids"], batch["ids_mask"]
        states = by_rows(apply(model, params, ids, mask)[:, :-1])
        nll, hit = token_scores(states, params["embedding"], ids[:, 1:])
        valid = mask[:, 1:].astype(jnp.float32)
        tokens = valid.sum(axis=1)
        count = jnp.maximum(tokens, 1)
        loss, accuracy = ((x * valid).sum(axis=1) / count for x in (nll, hit))
        return Terms(loss, batch["weight"] * tokens, {"accuracy": accuracy})


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
