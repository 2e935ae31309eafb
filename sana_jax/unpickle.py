"""The child process of `checkpoints/pickles.py`: a screened .pth in, a safetensors file out.

Run as a file of its own (python -I), it imports nothing of this package.  The request comes as JSON
on the standard input; the last line of the output is {"read": ...}, {"input": reason} or
{"weights": reason}.  Tensors are mapped from the file and written one after the other.
"""

import _codecs
import json
import os
import sys

try:
    import resource
except ImportError:  # not on Windows
    resource = None

NEWEST_UNSAFE = (2, 9)
SPARE_BYTES = 2**29  # beside the tensors: the objects of a large pickle
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


def encode(text, encoding="latin1"):
    """What torch finds in place of _codecs.encode, whose other codecs can be nested into gigabytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError(f"_codecs.encode to {encoding!r:.80}")
    return text.encode(encoding)


def import_torch():
    real, _codecs.encode = _codecs.encode, encode
    try:
        import torch
    except ImportError as error:
        raise Refused("input", f"reading a pickled checkpoint needs torch >= 2.10, which is not there ({error})") from error
    finally:
        _codecs.encode = real
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version <= NEWEST_UNSAFE:
        raise Refused("input", f"torch {torch.__version__} is here, but reading pickles needs >= 2.10: older ones are unsafe")
    return torch


def limit_memory(size):
    """What torch has now and room for a file of `size` bytes, mapped and one tensor of it copied."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        wanted = used + 2 * size + SPARE_BYTES
        if most == resource.RLIM_INFINITY or wanted < most:
            resource.setrlimit(resource.RLIMIT_DATA, (wanted, most))
    except (AttributeError, OSError, ValueError, IndexError):  # no Linux: the screen and the time limit stay
        pass


def choose(loaded, entry, tensor):
    """(the dict of tensors, names of the entries beside it)."""
    if not isinstance(loaded, dict):
        raise Refused("weights", f"holds a {type(loaded).__name__}, must hold a dict")
    if loaded and all(isinstance(value, tensor) and isinstance(name, str) for name, value in loaded.items()):
        for name in loaded:
            check_name(name)
        return loaded, []
    if entry not in loaded:
        found = ", ".join(repr(str(key)[:60]) for key in list(loaded)[:20])
        raise Refused("input", f"has no entry {entry!r}; its entries are {found or 'none'}")
    chosen = loaded[entry]
    if not isinstance(chosen, dict) or not chosen:
        raise Refused("weights", f"its entry {entry!r} is no dict of tensors")
    for name, value in chosen.items():
        check_name(name)
        if not isinstance(name, str) or not isinstance(value, tensor):
            raise Refused("weights", f"its entry {entry!r} holds a {type(value).__name__} under {str(name)[:80]!r}")
    return chosen, [repr(str(key)[:60])[1:-1] for key in loaded if key != entry]


def check_name(name):
    """Refuses what safetensors cannot hold: its own key, and text that is no UTF-8."""
    if isinstance(name, str) and (name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in name)):
        raise Refused("weights", f"holds a tensor under {name[:80]!r}, which is no name for one")


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
                flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
                file.write(memoryview(flat.view(import_torch().uint8).numpy()))


def main():
    request = json.load(sys.stdin)
    try:
        torch = import_torch()
        stand_ins = [(type("StandIn", (StandIn,), {}), name) for name in request["stand_ins"]]
        torch.set_num_threads(1)  # each would bring a stack
        limit_memory(os.path.getsize(request["source"]))
        try:
            with torch.serialization.safe_globals(stand_ins):
                loaded = torch.load(request["source"], map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # of the many kinds that damaged files raise, each becomes a reason
            raise Refused("weights", f"torch does not read it: {str(error)[:300] or type(error).__name__}") from error
        chosen, ignored = choose(loaded, request["entry"], torch.Tensor)
        del loaded
        try:
            write(chosen, request["target"], 2 * os.path.getsize(request["source"]) + 2**20)
        except OSError as error:
            folder = os.path.dirname(request["target"])
            raise Refused("input", f"no room to unpack it in {folder} ({error.strerror}); TMPDIR names another place") from error
        except (RuntimeError, MemoryError) as error:
            raise Refused("weights", f"its tensors are not readable: {str(error)[:300] or type(error).__name__}") from error
        answer = {"read": len(chosen), "ignored": ignored}
    except Refused as error:
        kind, reason = error.args
        answer = {kind: reason}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
