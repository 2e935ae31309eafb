"""A small text encoder made offline in a second: a tokenizer like Gemma's, and a Gemma 2.

The tokenizer: same class, same special ids (pad 0, eos 1, bos 2, unk 3), spaces as "▁", bytes for
what the vocabulary lacks, left padding as stored.  Words are learned with the space before them, so
that a trailing space merges with whatever word is appended: the trap of docs/numerics.md section 6.
"""

import copy
import functools

from sana_jax.data.vocabulary import learn

VOCAB_SIZE = 640  # of a model that takes these ids; a few are never used
SENTENCES = [
    "a photo of a red cat on a green chair in the morning light",
    "a small dog runs along the beach under a blue sky with white clouds",
    "an old house in the forest, oil painting, soft colours and warm light",
    "the cat and the dog sleep near the window of the house",
    "User Prompt: write an Enhanced prompt with detail for the image of a simple prompt",
    "Given a user prompt, describe colour, light, texture and place. Keep its meaning.",
    "Examples: a cat sleeping -> a small fluffy white cat sleeping on the window in the sun.",
    "Please write only the enhanced prompt for the prompt below and nothing else:",
    "a busy city street at night, neon lights, people walking in the rain",
]


def make_tokenizer(vocab_size=VOCAB_SIZE):
    """A `transformers.GemmaTokenizer`; `save_pretrained` makes a folder that its peers can load."""
    return copy.deepcopy(_learned(vocab_size))  # some tests change theirs


@functools.cache
def _learned(vocab_size):
    tokenizer = learn(SENTENCES, vocab_size)
    assert tokenizer.encode("") == [2], "the tokenizer must prepend BOS and nothing else"
    return tokenizer


CONFIG = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=72,  # its square root is no bfloat16 number
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=9,  # not head_dim, so that the two cannot be confused
)


def make_gemma2(seed, gain=2.0, **config):
    """(transformers' Gemma2Model in float32, our Gemma2, its parameters): the same random weights.

    Args:
      gain: of the weights, see `peers.randomise`; 2 makes logits of about 5, which the cap bends.
      config: keys of transformers' Gemma2Config in place of those in CONFIG.
    """
    import flax
    import jax
    import jax.numpy as jnp
    import transformers

    from sana_jax.checkpoints import gemma2, rules
    from sana_jax.models.gemma2 import Gemma2
    from tests import peers

    config = transformers.Gemma2Config(**CONFIG | config, attn_implementation="eager")
    peer = peers.randomise(transformers.Gemma2Model(config), seed, gain)
    module = Gemma2(**gemma2.config_fields(config.to_dict()))
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    tree = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    state = peers.to_numpy_state(peer)
    leaves = rules.to_flax(
        gemma2.transformers_rules(), shapes, peers.header(state), state.items(), "float32"
    )
    leaves = jax.tree.map(jnp.asarray, leaves)
    return peer, module, flax.traverse_util.unflatten_dict(leaves, sep="/")
