"""Lines "... weights": both sides hold the same numbers, tensor by tensor and bit by bit.

Outputs do not show every wrong weight: softmax is blind to the bias of its keys, an RMSNorm to the scale
of what comes before it, and a small bias drowns under large activations.  So each side's float32 weights
are hashed, under the names that they are published by: ours as they lie in memory, through the conversion
table (checkpoints/rules.py) from right to left.  Only digests are kept.
"""

import hashlib
import re

import flax.traverse_util
import numpy as np

from sana_jax.checkpoints.rules import slots
from sana_jax.components import published_rules
from sana_jax.parity.rows import count

PARTS = {"text_encoder": "Gemma-2", "transformer": "DiT", "vae": "DC-AE"}
COUNTER = "num_batches_tracked"  # of a BatchNorm in training: no result depends on it
LAYERS = {  # start of a published name -> the layer that it belongs to, in the words of its other lines
    "text_encoder": {
        r"layers\.(\d+)": "layer {}",
        r"embed_tokens": "embedding",
        r"norm": "final norm",
    },
    "transformer": {
        r"transformer_blocks\.(\d+)": "block {}",
        r"patch_embed": "patch embedding",
        r"caption_(?:projection|norm)": "caption embedding",
        r"time_embed\.linear": "modulation",
        r"time_embed": "time embedding",
        r"proj_out|scale_shift_table": "head",
    },
    "vae": {
        r"(encoder)\.down_blocks\.(\d+)|(decoder)\.up_blocks\.(\d+)": "{} stage {}",
        r"(encoder|decoder)\.conv_in": "{} input",
        r"(encoder|decoder)\.(?:conv_out|norm_out)": "{} output",
    },
}


def digest(array):
    """A tensor's shape and the SHA-256 of its float32 bytes, as one string."""
    array = np.ascontiguousarray(array, np.float32)
    return f"{array.shape} {hashlib.sha256(memoryview(array).cast('B') if array.size else b'').hexdigest()}"


def theirs(peer):
    """{published name: digest} of a PyTorch module."""
    return {name: digest(x.float().cpu().numpy()) for name, x in peer.state_dict().items() if not name.endswith(COUNTER)}


def ours(module, params):
    """{published name: digest} of one of our modules, leaf by leaf."""
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    out = {}
    for path, group in _by_leaf(slots(published_rules(module), {p: leaf.shape for p, leaf in leaves.items()})).items():
        leaf = leaves[path]
        # A jax array keeps the host's copy of itself once it was asked for; the one asked here is let go.
        array = np.asarray(leaf if isinstance(leaf, np.ndarray) else leaf.addressable_data(0))
        for name, slot in group:
            out[name] = digest(np.ascontiguousarray(slot.view(array)).reshape(slot.shape(array.shape)))
    return out


def _by_leaf(table):
    """{path: [(name, Slot)]}."""
    out = {}
    for name, slot in table.items():
        out.setdefault(slot.path, []).append((name, slot))
    return out


def layer_of(part, name):
    """The line of a tensor: layer_of("transformer", "transformer_blocks.7.ff.conv_inverted.bias") -> "DiT block 7"."""
    for start, words in LAYERS[part].items():
        if match := re.match(rf"(?:{start})(?:\.|$)", name):
            return f"{PARTS[part]} {words.format(*(g for g in match.groups() if g is not None))}"
    return f"{PARTS[part]} other"


def rows(part, ours, theirs):
    """The Rows of two sides' digests: each layer with how many tensors differ, if any; the part as a whole.

    A tensor that one side lacks differs.
    """
    names = [*theirs, *(name for name in ours if name not in theirs)]
    differing = [layer_of(part, name) for name in names if ours.get(name) != theirs.get(name)]
    lines = [count(f"{layer} weights", differing.count(layer)) for layer in dict.fromkeys(differing)]
    return [*lines, count(f"{PARTS[part]} weights, {len(names)} tensors", len(differing))]
