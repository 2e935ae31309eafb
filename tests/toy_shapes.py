"""What evaluations of shapes ask of a Pipeline beside its pictures."""

import types

import numpy as np

from sana_jax.stacks import STACKS
from sana_jax.text import Instruction, Vocabulary


class Known:
    """The parts of a Pipeline that say which model it is, and nothing that paints."""

    def __init__(self, side):
        """side: pixels."""
        self.sana = types.SimpleNamespace(sample_size=side // 32, dtype=np.float32), {"w": np.ones(3, np.float32)}
        self.dc_ae = types.SimpleNamespace(dtype=np.float32), {}
        gemma2, words = types.SimpleNamespace(dtype=np.float32), Vocabulary(frozenset({"a", "picture", "of", "circle"}))
        self.text = types.SimpleNamespace(gemma2=gemma2, params={}, vocabulary=words)
        self.stack, self.flow_shift = STACKS["nvlabs"], 3.0
        self.defaults = {"steps": 20, "guidance_scale": 4.5, "max_sequence_length": 300}

    def instruction(self):
        return Instruction("", "none")
