"""The child process of `checkpoints/pickles.py`: a screened .pth in, a safetensors file out.

Run as a file of its own (python -I), it imports nothing of this package.  The request comes as JSON
on the standard input; the last line of the output is {"read": ...}, {"input": reason} or
{"weights": reason}.  Tensors are mapped from the file and written one after the other.
"""

import json
import os
import sys

NEWEST_UNSAFE = (2, 9)
NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class Refused(Exception):
    """A reason, and whether it is one of the "input" (the user's request) or of the "weights"."""


class StandIn:
    """Takes the place of an object of a random state: swallows whatever it would be made of."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


def import_torch():
    try:
        import torch
    except ImportError as error:
        raise Refused("input", f"reading a pickled checkpoint needs torch >= 2.10, which is not there ({error})") from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version <= NEWEST_UNSAFE:
        raise Refused("input", f"torch {torch.__version__} is here, but reading pickles needs >= 2.10: older ones are unsafe")
    return torch


def choose(loaded, entry, tensor):
    """(the dict of tensors, names of the entries beside it)."""
    if not isinstance(loaded, dict):
        raise Refused("weights", f"holds a {type(loaded).__name__}, must hold a dict")
    if loaded and all(isinstance(value, tensor) for value in loaded.values()):
        return loaded, []
    if entry not in loaded:
        found = ", ".join(repr(str(key)[:60]) for key in list(loaded)[:20])
        raise Refused("input", f"has no entry {entry!r}; its entries are {found or 'none'}")
    chosen = loaded[entry]
    if not isinstance(chosen, dict) or not chosen:
        raise Refused("weights", f"its entry {entry!r} is no dict of tensors")
    for name, value in chosen.items():
        if not isinstance(name, str) or not isinstance(value, tensor):
            raise Refused("weights", f"its entry {entry!r} holds a {type(value).__name__} under {str(name)[:80]!r}")
    return chosen, [str(key) for key in loaded if key != entry]


def write(tensors, path, limit):
    """Writes {name: tensor} as safetensors; `limit` bounds what views of a small storage can claim."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        dtype = NAMES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None or tensor.is_sparse or tensor.is_quantized or tensor.is_meta:
            raise Refused("weights", f"{name[:80]!r} is a tensor of {tensor.dtype}, {tensor.layout}, {tensor.device}")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    if offset > limit:
        raise Refused("weights", f"its tensors claim {offset} bytes, more than the file can hold")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            if tensor.numel():
                flat = tensor.detach().contiguous().reshape(-1)
                file.write(memoryview(flat.view(import_torch().uint8).numpy()))


def main():
    request = json.load(sys.stdin)
    try:
        torch = import_torch()
        stand_ins = [(type("StandIn", (StandIn,), {}), name) for name in request["stand_ins"]]
        try:
            with torch.serialization.safe_globals(stand_ins):
                loaded = torch.load(request["source"], map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # of the many kinds that damaged files raise, each becomes a reason
            raise Refused("weights", f"torch does not read it: {str(error)[:300]}") from error
        chosen, ignored = choose(loaded, request["entry"], torch.Tensor)
        del loaded
        try:
            write(chosen, request["target"], 2 * os.path.getsize(request["source"]) + 2**20)
        except OSError as error:
            folder = os.path.dirname(request["target"])
            raise Refused("input", f"no room to unpack it in {folder} ({error.strerror}); TMPDIR names another place") from error
        answer = {"read": len(chosen), "ignored": ignored}
    except Refused as error:
        kind, reason = error.args
        answer = {kind: reason}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
