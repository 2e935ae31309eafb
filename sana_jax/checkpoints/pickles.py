"""PyTorch's pickled checkpoints (.pth and the like), read without trusting them.

A pickle is a program.  So none is opened unless the user names the file, and then in two steps.

First the file is screened here, in milliseconds, with nothing executed: it must be the zip archive
that torch.save writes since torch 1.6, with stored members of plausible sizes, and its pickle may
use only the instructions and the globals of a state dict.

Then a child process (`sana_jax/unpickle.py`), isolated from the user's Python settings and limited in
time and (on Linux) in memory, opens it with torch.load(weights_only=True), torch 2.10 or newer because older ones had holes
in that very mode, and writes a plain safetensors file into a temporary folder.  That is read as any
other and then removed.  There is no fallback to the unrestricted reader.

A whole training checkpoint is admitted: its optimizer and counters are plain, and the numpy arrays
and generators of its random state become stand-ins in the child, never objects of numpy.  What else
it holds is refused by name.
"""

import json
import os
import pathlib
import pickletools
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
import zipfile

from sana_jax.errors import CheckpointError, InputError

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
CHILD = pathlib.Path(__file__).parent.parent / "unpickle.py"
MEMBERS = 100_000
PICKLE_BYTES = 8 * 2**20  # the pickle without its tensors; a training checkpoint of 4.8 B has about 1 MB
SECONDS, BYTES_PER_SECOND = 120, 20 * 2**20  # what the child may take at most

MEMBER = re.compile(
    r"data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)
INSTRUCTIONS = frozenset(  # all that torch's restricted reader knows; what torch.save writes
    "PROTO GLOBAL REDUCE NEWOBJ BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE "
    "NEWTRUE NEWFALSE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 BINFLOAT BINUNICODE "
    "SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1 STOP".split()
)
STAND_INS = (  # of random states: the child reads these without building them
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "torch._C.Generator",
)
GLOBAL = re.compile(  # nothing that makes much of little; the child narrows _codecs.encode, of random states, to latin1
    r"collections\.OrderedDict"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\.nn\.parameter\.Parameter|torch\.(Size|device)"
    r"|torch\.(Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
    r"|torch\.(float|double|half|bfloat16|uint8|bool|int|long|short|(float|int)(8|16|32|64))"
    r"|_codecs\.encode|" + "|".join(map(re.escape, STAND_INS))
)
ADVICE = "nothing was executed; if you trust it, save its weights alone: torch.save({'state_dict': ...}, file)"


def _read_zip(path):
    """The bytes of the pickle in a checkpoint whose archive is as torch.save writes it."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise CheckpointError(f"{path}: refused, it is no zip archive as torch.save writes; {ADVICE}")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MEMBERS:
                raise CheckpointError(f"{path}: refused, {len(members)} members; {ADVICE}")
            pickled, names, total = [], set(), 0
            for member in members:
                inner = member.filename.partition("/")[2]
                stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
                total += member.file_size
                if member.filename in names or not MEMBER.fullmatch(inner) or not stored or member.flag_bits & 1:
                    raise CheckpointError(
                        f"{path}: refused, member {member.filename[:80]!r} is not one that torch.save writes "
                        f"(uncompressed data under one folder, each name once); {ADVICE}"
                    )
                names.add(member.filename)
                pickled += [member] if inner == "data.pkl" else []
            if total > size:
                raise CheckpointError(f"{path}: refused, {size} bytes whose members claim {total}; {ADVICE}")
            if len(pickled) != 1 or len({name.partition("/")[0] for name in names}) != 1:
                raise CheckpointError(f"{path}: refused, it must hold one data.pkl under one folder; {ADVICE}")
            if pickled[0].file_size > PICKLE_BYTES:
                raise CheckpointError(f"{path}: refused, a pickle of {pickled[0].file_size} bytes; {ADVICE}")
            return archive.read(pickled[0])
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise CheckpointError(f"{path}: refused, its archive is not readable ({error}); {ADVICE}") from error


def screen(path):
    """Raises CheckpointError unless the file can only be a state dict.  Executes nothing of it."""
    data, last = _read_zip(path), -1
    try:
        for instruction, argument, position in pickletools.genops(data):
            last = position
            if instruction.name not in INSTRUCTIONS:
                raise CheckpointError(
                    f"{path}: refused, its pickle holds the instruction {instruction.name}, which no state dict needs; {ADVICE}"
                )
            if instruction.name == "GLOBAL" and not GLOBAL.fullmatch(name := argument.replace(" ", ".")):
                raise CheckpointError(
                    f"{path}: refused, its pickle asks for {name[:80]}, which no state dict needs; {ADVICE}"
                )
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        raise CheckpointError(f"{path}: refused, its pickle is damaged ({error}); {ADVICE}") from error
    if last + 1 != len(data):
        raise CheckpointError(f"{path}: refused, {len(data) - last - 1} bytes after its pickle; {ADVICE}")


class Scratch:
    """A temporary folder that is removed when this is called, forgotten, or the program ends."""

    def __init__(self):
        try:
            self.folder = pathlib.Path(tempfile.mkdtemp(prefix="sana_jax."))
        except OSError as error:
            raise InputError(f"no folder to unpack a pickle in ({error.strerror or error}); TMPDIR names another place") from error
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def __call__(self):
        self._remove()


def unpack(path, entry="state_dict"):
    """A pickled checkpoint as a safetensors file.

    Args:
      path: the file, named by the user.
      entry: the top-level entry with the weights, "state_dict" or "state_dict_ema", say; a file that
        is itself a flat dict of tensors has none, and is taken as it is.
    Returns:
      (path of the safetensors file, names of the entries that were not read, Scratch).
    Raises:
      CheckpointError: refused, or not readable.  InputError: torch is absent or too old, no such
      entry, or no room for the temporary file.
    """
    screen(path)
    scratch = Scratch()
    target = scratch.folder / "unpacked.safetensors"
    seconds = SECONDS + os.path.getsize(path) // BYTES_PER_SECOND
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH", "PYTHON"))}
    request = {"source": os.path.abspath(path), "target": str(target), "entry": entry, "stand_ins": STAND_INS}
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(CHILD)],
            input=json.dumps(request), capture_output=True, text=True, timeout=seconds,
            cwd=scratch.folder, env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        scratch()
        raise CheckpointError(f"{path}: not read within {seconds} s") from error
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        answer = {"weights": f"the reader ended with status {done.returncode}: {done.stderr.strip()[-300:]}"}
    if "read" not in answer:
        scratch()
        kind = InputError if "input" in answer else CheckpointError
        raise kind(f"{path}: " + " ".join(str(next(iter(answer.values()))).split()))
    return target, tuple(answer["ignored"]), scratch
