"""The PyTorch side: installed diffusers and transformers on the same folder, in numpy terms.

Classes are named here and never chosen by a file; weights come from safetensors alone.  torch,
diffusers and transformers are imported inside functions.
"""

import contextlib
import gc
import importlib.metadata
import pathlib
import re

import numpy as np

from sana_jax.checkpoints import gemma2 as gemma2_names
from sana_jax.checkpoints.read import choose_variant, read_json, variants
from sana_jax.errors import CheckpointError, InputError

REQUIRED = {"torch": (2, 10), "diffusers": (0, 42), "transformers": (5, 3), "accelerate": (1, 0)}
INSTALL = 'pip install -e ".[parity]"'


def require():
    """Raises InputError unless the packages of the extra `parity` are there and new enough."""
    problems = []
    for name, least in REQUIRED.items():
        wanted = ".".join(map(str, least))
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed (need {wanted} or newer)")
            continue
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < least:
            problems.append(f"{name} is {version} (need {wanted} or newer)")
    if problems:
        raise InputError(f"parity compares with PyTorch: {'; '.join(problems)}; {INSTALL}")


def prepare():
    """float32 that is float32, no gradients, and libraries that are quiet; returns the torch device."""
    import diffusers
    import torch
    import transformers

    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device):
    """For people: the card's name, or CPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _dtype(dtype):
    import torch

    return getattr(torch, dtype)


def _from_pretrained(cls, folder, dtype, device, **options):
    """A module of `cls` with all of its weights and no other; whatever else a file holds is an error."""
    names = [path.name for path in folder.iterdir()]
    module, info = cls.from_pretrained(
        folder, variant=choose_variant(variants(names), source=folder), use_safetensors=True,
        local_files_only=True, output_loading_info=True, **options | {"dtype": _dtype(dtype)},
    )  # fmt: skip
    unused = {f"model.{name}" for name in gemma2_names.UNUSED} | {*gemma2_names.UNUSED}
    odd = [*info["missing_keys"], *info["mismatched_keys"], *({*info["unexpected_keys"]} - unused)]
    if odd:
        raise CheckpointError(f"{folder}: {cls.__name__} misses, or does not know, {', '.join(map(str, odd[:20]))}")
    return module.to(device).eval()


def load(case, part, device, dtype="float32"):
    """PyTorch's module of one part of the reference."""
    folder = case.reference / part
    if part == "text_encoder":
        from transformers import Gemma2Config, Gemma2Model

        fields = gemma2_names.config_fields(read_json(folder / "config.json"), str(folder / "config.json"))
        config = gemma2_names.to_config(fields)
        config = Gemma2Config(**{k: v for k, v in config.items() if k not in ("model_type", "rope_theta")})
        # Attention that keeps the soft cap; SDPA drops it: 3e-3 in these states.
        return _from_pretrained(Gemma2Model, folder, dtype, device, config=config, attn_implementation="eager")
    import diffusers

    cls = {"transformer": diffusers.SanaTransformer2DModel, "vae": diffusers.AutoencoderDC}[part]
    return _from_pretrained(cls, folder, dtype, device)


def release():
    """Gives memory back that nothing refers to any more.  Call it where no name holds a module."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def scheduler(case):
    """The reference's scheduler."""
    import diffusers

    return getattr(diffusers, case.scheduler).from_pretrained(case.reference / "scheduler", local_files_only=True)


def pipeline(case, **parts):
    """diffusers' pipeline with these parts only."""
    import diffusers

    names = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
    cls = diffusers.SanaSprintPipeline if case.sprint else diffusers.SanaPipeline
    made = cls(**dict.fromkeys(names) | parts)
    made.set_progress_bar_config(disable=True)
    return made


# --- Arrays.


def to_torch(x, like):
    """A numpy array on the device of a module, floats in its dtype."""
    import torch

    parameter = next(like.parameters())
    x = torch.tensor(np.asarray(x))
    return x.to(parameter.device, parameter.dtype) if x.is_floating_point() else x.to(parameter.device)


def to_numpy(x):
    return x.detach().float().cpu().numpy()


def first(x):
    """[b h w c] -> [b c h w]."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1))


def last(x):
    """[b c h w] tensor -> [b h w c] array."""
    return np.moveaxis(to_numpy(x), 1, -1)


class Shelf:
    """Arrays by name, kept on disk: what a part leaves behind when its memory is given back."""

    def __init__(self, folder):
        self.folder, self.files = pathlib.Path(folder), {}

    def __setitem__(self, name, array):
        if name in self.files:
            raise KeyError(f"{name} is on the shelf already")
        self.files[name] = self.folder / f"{len(self.files)}.npy"
        np.save(self.files[name], np.asarray(array))

    def __getitem__(self, name):
        return np.load(self.files[name], mmap_mode="r")

    def __contains__(self, name):
        return name in self.files


@contextlib.contextmanager
def watching(modules, see):
    """Calls see(name, module, args, kwargs, output) whenever one of {name: module} has run."""

    def hook(name):
        def call(module, args, kwargs, output):
            see(name, module, args, kwargs, output)

        return call

    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def nudged(x, seed=7):
    """A tensor whose every element is rounded once more, up or down at random: to a neighbour.

    No float32 program knows its input better than this, so how far a module's output moves is what any
    two programs may differ by, times the number of roundings on the way.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    up = torch.randint(0, 2, x.shape, generator=generator).to(x.device, torch.float64)
    return (x.double() * (1 + (2 * up - 1) * 2**-23)).to(x.dtype)
