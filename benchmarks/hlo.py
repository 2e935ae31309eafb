"""What an optimized HLO module launches, counted from its text.  Not a script."""

import collections
import re

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = .*?[\])}] ([a-z][a-z0-9-]*)\((.*)$")
# What launches nothing.
QUIET = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "iota",
         "async-done", "fusion-done", "copy-done", "partition-id", "replica-id", "after-all", "opt-barrier", "conditional"}  # fmt: skip


def computations(text):
    """{name: [(opcode, rest of the line)]} of an HLO module as text."""
    found, current = {}, None
    for line in text.splitlines():
        if head := re.match(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line):
            current = found.setdefault(head[1], [])
        elif current is not None and (match := INSTRUCTION.match(line)):
            current.append((match[2], match[3]))
    return found


def kernels(found, name):
    """Counter of what a computation launches, through calls and loops (times their trip counts)."""
    count = collections.Counter()
    for opcode, rest in found.get(name, ()):
        if opcode in ("while", "call"):
            inner = re.search(r"(?:body|to_apply)=%?([\w.-]+)", rest)
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            factor = int(trips[1]) if trips else 1
            for kind, n in (kernels(found, inner[1]) if inner else {}).items():
                count[kind] += factor * n
        elif opcode in ("fusion", "fusion-start"):  # -start: beside the main stream
            kind = re.search(r'"kind":"(__[\w$]+)"', rest) or re.search(r"kind=(k\w+)", rest)
            count[f"{opcode} {kind[1] if kind else ''}"] += 1
        elif opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]+)"', rest)
            count[f"custom-call {target[1] if target else ''}"] += 1
        elif opcode not in QUIET:
            count[opcode] += 1
    return count


def summary(text):
    """Kernels of one step: the outermost loop of the program is the solver's."""
    found = computations(text)
    bodies = {m[1] for lines in found.values() for _, r in lines if (m := re.search(r"body=%?([\w.-]+)", r))}
    steps = [b for b in bodies if any(op == "while" or "while" in r for op, r in found.get(b, ()))]
    counts = {body: kernels(found, body) for body in bodies}
    step = max(steps or bodies, key=lambda b: sum(counts[b].values()), default=None)
    if step is None:
        return {"kernels_per_step": None}
    # Of nested loops the one with most launches in one pass is the solver's body.
    return {
        "kernels_per_step": sum(counts[step].values()), "by_kind": dict(counts[step].most_common()),
        "loops": {b: dict(c.most_common()) for b, c in counts.items()},
        "command_buffers": len([c for c in found if c.startswith("command_buffer")]),
    }  # fmt: skip
