"""The import contract and a few bans, checked on the syntax tree; each rule rejects a sample too.

pallas_kernels  <-  ops  <-  models  <-  loading, pipeline, training  <-  configs  <-  train.py, sample.py
Sampling receives a function and checkpoints know names: neither knows a model.  Data knows no training.
"""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
STDLIB = tuple(sys.stdlib_module_names)
MAX_LINES = 400

# Where a path begins so, every import is the standard library's or begins with one of these.
ONLY = {
    "pallas_kernels/": ("pallas_kernels", "jax"),
    "sana_jax/sampling/": (
        "sana_jax.sampling",
        "sana_jax.errors",
        "sana_jax.flow",
        "jax",
        "numpy",
        "flax.struct",
    ),
    "sana_jax/checkpoints/": (
        "sana_jax.checkpoints",
        "sana_jax.errors",
        "numpy",
        "safetensors",
        "ml_dtypes",
    ),
}

TRITON = re.compile(r"pallas_kernels/\w+/jax_triton\.py")  # imported by who asks for it alone

# Where a path begins so, nothing imports these; what sits at the top of the house is never a base.
TOP = ("configs", "train", "sample", "tests")
NEVER = {
    "sana_jax/": TOP,
    "pallas_kernels/": TOP,
    "configs/": ("train", "sample", "tests"),
    "train.py": ("configs", "sample", "tests"),
    "sample.py": ("configs", "train", "tests"),
    "sana_jax/models/": tuple(
        f"sana_jax.{name}"
        for name in ("checkpoints", "data", "loading", "pipeline", "sampling", "text", "training")
    ),
    "sana_jax/data/": ("sana_jax.training",),
    "sana_jax/flow.py": ("sana_jax.models", "sana_jax.training", "sana_jax.data"),
    "sana_jax/ops.py": ("sana_jax.models", "sana_jax.loading", "sana_jax.pipeline"),
}

COMMANDS = ("sana_jax/data/cache.py",)  # stands on top of what it uses, and nothing imports it

# Slow, optional, or absent on a plain machine: imported inside the function that needs them.  But
# sana_jax/data/ is made of grain, and nothing that samples imports it.
LAZY = (
    "diffusers",
    "gradio",
    "grain",
    "huggingface_hub",
    "jax_triton",
    "torch",
    "transformers",
    "triton",
)

# Each of these runs code that a file from the internet can carry.
UNSAFE_IMPORTS = ("cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve")
UNSAFE_CALLS = ("eval", "exec", "yaml.load", "yaml.full_load", "yaml.unsafe_load")
UNSAFE_ARGUMENTS = ("allow_pickle", "trust_remote_code")


def begins_with(name, prefixes):
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def imports(tree, path):
    """(full dotted name, whether it is imported along with the module) of every import in it."""
    package = pathlib.PurePosixPath(path).parts[:-1]
    in_function = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        eager = id(node) not in in_function
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((f"{module}.{alias.name}", eager) for alias in node.names)


def import_problems(tree, path):
    for name, eager in imports(tree, path):
        if TRITON.fullmatch(path) and begins_with(name, ("jax_triton", "triton")):
            continue
        for prefix, allowed in ONLY.items():
            if path.startswith(prefix) and not begins_with(name, allowed + STDLIB):
                yield f"{prefix} may not import {name}"
        for prefix, forbidden in NEVER.items():
            if path.startswith(prefix) and path not in COMMANDS and begins_with(name, forbidden):
                yield f"{prefix} may not import {name}"
        if path.startswith("sana_jax/"):
            if begins_with(name, ("pallas_kernels",)) and path != "sana_jax/ops.py":
                yield f"only sana_jax/ops.py may import {name}"
            if eager and begins_with(name, LAZY) and not (name.split(".")[0] == "grain" and path.startswith("sana_jax/data/")):
                yield f"{name} must be imported inside a function"
            if begins_with(name, UNSAFE_IMPORTS):
                yield f"unsafe import {name}"


UNPICKLER = "sana_jax/unpickle.py"  # the one file that opens pickles, in a process of its own


def unsafe_problems(tree, path):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            if path != UNPICKLER or "weights_only=True" not in map(ast.unparse, node.keywords):
                yield f"torch.load: only {UNPICKLER} may, with weights_only=True"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
            yield f"unsafe call {ast.unparse(node.func)}"
        if isinstance(node, ast.keyword) and node.arg in UNSAFE_ARGUMENTS:
            yield f"unsafe argument {node.arg}"
        if isinstance(node, ast.Constant) and node.value in UNSAFE_ARGUMENTS:
            yield f"unsafe argument {node.value}"


def problems(path, source):
    """What is wrong with the file `path` (relative, with slashes) whose text is `source`."""
    tree = ast.parse(source)
    found = list(import_problems(tree, path))
    if path.startswith("sana_jax/"):
        found += unsafe_problems(tree, path)
    if pathlib.PurePosixPath(path).name == "utils.py":
        found.append("a file named utils.py says nothing of what is in it")
    if (lines := len(source.splitlines())) > MAX_LINES:
        found.append(f"{lines} lines, more than {MAX_LINES}: two ideas in one file?")
    return found


def python_files():
    """Every Python file of the project, and none of an environment or a build beside it."""
    tops = [
        top
        for top in ROOT.iterdir()
        if top.is_dir()
        and not top.name.startswith(".")
        and top.name not in ("build", "dist", "outputs")
        and not (top / "pyvenv.cfg").exists()
    ]
    return sorted([*ROOT.glob("*.py"), *(file for top in tops for file in top.rglob("*.py"))])


def test_every_file_keeps_the_contract():
    found = [
        f"{path}: {problem}"
        for file in python_files()
        for path in [file.relative_to(ROOT).as_posix()]
        for problem in problems(path, file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n" + "\n".join(found)


def test_the_contract_meets_files():
    """A renamed folder would leave its rule without a subject."""
    paths = [file.relative_to(ROOT).as_posix() for file in python_files()]
    prefixes = [p for p in (*ONLY, *NEVER) if p.startswith("sana_jax/")]
    assert [p for p in prefixes if not any(path.startswith(p) for path in paths)] == []


@pytest.mark.parametrize(
    "path, source, problem",
    [
        ("pallas_kernels/op/reference.py", "import numpy", "may not import numpy"),
        ("pallas_kernels/op/pallas_triton.py", "import triton", "may not import triton"),
        ("pallas_kernels/op/api.py", "from sana_jax import ops", "may not import sana_jax.ops"),
        ("sana_jax/sampling/a.py", "import flax.linen as nn", "may not import flax.linen"),
        ("sana_jax/sampling/a.py", "from ..models import sana", "import sana_jax.models.sana"),
        ("sana_jax/sampling/a.py", "from sana_jax import pipeline", "import sana_jax.pipeline"),
        ("sana_jax/sampling/a.py", "def f():\n import sana_jax.checkpoints", "may not import"),
        ("sana_jax/models/a.py", "from sana_jax import text", "may not import sana_jax.text"),
        ("sana_jax/models/a.py", "from ..checkpoints.rules import Rule", "may not import"),
        ("sana_jax/models/a.py", "import sana_jax.pipeline", "may not import sana_jax.pipeline"),
        ("sana_jax/checkpoints/a.py", "import flax", "may not import flax"),
        ("sana_jax/checkpoints/a.py", "import jax.numpy", "may not import jax.numpy"),
        ("sana_jax/checkpoints/a.py", "from sana_jax.models import sana", "may not import"),
        ("sana_jax/checkpoints/a.py", "from .. import models", "may not import sana_jax.models"),
        ("sana_jax/ops.py", "from sana_jax.models import layers", "may not import"),
        ("sana_jax/models/a.py", "import pallas_kernels", "only sana_jax/ops.py may import"),
        ("sana_jax/pipeline.py", "from configs import debug", "may not import configs.debug"),
        ("sana_jax/pipeline.py", "def f():\n import train", "may not import train"),
        ("sana_jax/pipeline.py", "from sample import main", "may not import sample.main"),
        ("sana_jax/pipeline.py", "import tests.peers", "may not import tests.peers"),
        ("configs/debug.py", "import train", "may not import train"),
        ("train.py", "from configs import debug", "may not import configs.debug"),
        *(("sana_jax/text.py", f"import {name}.x", f"{name}.x must be imported") for name in LAZY),
        ("sana_jax/text.py", "if True:\n from torch import nn", "torch.nn must be imported"),
        ("sana_jax/text.py", "class A:\n import torch", "torch must be imported"),
        ("sana_jax/data/a.py", "from sana_jax.training import store", "may not import"),
        ("sana_jax/training/a.py", "import grain", "grain must be imported"),
        ("sana_jax/flow.py", "from sana_jax.models import sana", "may not import"),
        ("sana_jax/a.py", "import pickle", "unsafe import pickle"),
        ("sana_jax/a.py", "def f(): from pickle import loads", "unsafe import pickle.loads"),
        ("sana_jax/a.py", "eval('1')", "unsafe call eval"),
        ("sana_jax/a.py", "yaml.load(f, Loader=yaml.Loader)", "unsafe call yaml.load"),
        ("sana_jax/a.py", "np.load(f, allow_pickle=True)", "unsafe argument allow_pickle"),
        ("sana_jax/a.py", "f(trust_remote_code=False)", "unsafe argument trust_remote_code"),
        ("sana_jax/a.py", "f(**{'trust_remote_code': 1})", "unsafe argument trust_remote_code"),
        ("sana_jax/a.py", "torch.load(f, weights_only=True)", "torch.load: only sana_jax/unpickle.py"),
        ("sana_jax/unpickle.py", "torch.load(f)", "torch.load: only sana_jax/unpickle.py"),
        ("sana_jax/unpickle.py", "torch.load(f, weights_only=False)", "with weights_only=True"),
        ("sana_jax/models/utils.py", "", "utils.py"),
        ("tests/test_long.py", "x = 1\n" * (MAX_LINES + 1), "401 lines"),
    ],
)
def test_each_rule_rejects(path, source, problem):
    assert problem in "\n".join(problems(path, source))


@pytest.mark.parametrize(
    "path, source",
    [
        ("pallas_kernels/op/pallas_triton.py", "from jax.experimental import pallas as pl"),
        ("pallas_kernels/op/jax_triton.py", "import jax_triton as jt\nimport triton.language as tl"),
        ("sana_jax/sampling/a.py", "import numpy\nfrom flax import struct\nfrom . import guidance"),
        ("sana_jax/models/a.py", "import flax.linen as nn\nfrom sana_jax import ops\nmodel.eval()"),
        ("sana_jax/checkpoints/a.py", "import json, numpy\nfrom ..errors import CheckpointError"),
        ("sana_jax/ops.py", "import pallas_kernels"),
        ("sana_jax/unpickle.py", "torch.load(f, mmap=True, weights_only=True)"),
        ("sana_jax/text.py", "def f():\n from transformers import GemmaTokenizer"),
        ("sana_jax/data/loader.py", "import grain"),
        ("sana_jax/a.py", "yaml.safe_load(f)\nast.literal_eval(s)\n'no pickle here'"),
        ("tests/test_a.py", "import torch, pickle\nfrom tests import peers"),
        ("tests/test_a.py", "x = 1\n" * MAX_LINES),
    ],
)
def test_no_rule_rejects_what_is_fine(path, source):
    assert problems(path, source) == []


def test_importing_the_package_stays_light():
    heavy = ["torch", "transformers", "triton", "jax_triton", "grain", "gradio"]
    code = f"import sys, sana_jax; print(*sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
