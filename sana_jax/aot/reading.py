"""What a compiled program says of itself."""

import collections
import re

from sana_jax.training.plan import step_bytes

COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast)(?:-start)?\("
)
CUSTOM_CALL = re.compile(r'custom_call_target="([^"]+)"')
FUSION = re.compile(r"\bfusion\(")


def summary(compiled):
    """What a test wants to know of a compiled program; sizes are bytes on one device."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "collectives": dict(collections.Counter(COLLECTIVE.findall(text))),
        "custom_calls": dict(collections.Counter(CUSTOM_CALL.findall(text))),
        "fusions": len(FUSION.findall(text)),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
        "peak_bytes": step_bytes(memory),
    }
