"""From one published component to a module with parameters, whichever names its weights have.

    sana, params = load_sana("folder/transformer")
    sana, params = load_sana("Sana_1600M_1024px.pth")

`loading.load_pipeline` puts three of them together.
"""

import dataclasses
import math
import pathlib
import warnings
from typing import NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from sana_jax import memory, ops, precision, sharding
from sana_jax.checkpoints import dc_ae as dc_ae_format
from sana_jax.checkpoints import dc_ae_names
from sana_jax.checkpoints import gemma2 as gemma2_format
from sana_jax.checkpoints import sana as sana_format
from sana_jax.checkpoints.read import STEMS, Checkpoint, choose_variant, open_checkpoint, read_json, variants
from sana_jax.checkpoints.rules import check, leaf_by_leaf, slots
from sana_jax.errors import CheckpointError, InputError, nearest, require_positive
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.parameters import parameter_shapes

KINDS = {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC", "text_encoder": "gemma2"}


def fields_of(module):
    """{name: value} of a module's fields."""
    return {f.name: getattr(module, f.name) for f in dataclasses.fields(module)}


def published_rules(module, original=False):
    """The table of a module's structure in the names of diffusers and transformers.

    `original`: in those of NVlabs for a transformer, of efficientvit for an autoencoder.
    """
    if isinstance(module, Sana):
        make = sana_format.nvlabs_rules if original else sana_format.diffusers_rules
        return make(module.heads, module.cross_heads, module.qk_norm, module.guidance_embed)
    if isinstance(module, DCAE):
        make = dc_ae_names.efficientvit_rules if original else dc_ae_names.diffusers_rules
        return make(fields_of(module))
    return gemma2_format.transformers_rules()


class Prepared(NamedTuple):
    """A module and a checkpoint whose header was found to fit it; no weights are read yet."""

    module: nn.Module
    rules: list
    shapes: dict
    checkpoint: Checkpoint

    def bytes_held(self, mesh=None):
        """Bytes of the parameters on all devices of a mesh together, copies counted; without one, once."""
        if mesh is None:
            return memory.parameter_bytes(self.shapes, self.module.param_dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is not divided is said when it is read
            specs = sharding.shardings(self.shapes, sharding_table(self.module), mesh)
        size = np.dtype(self.module.param_dtype).itemsize
        return sharding.bytes_per_device(self.shapes, specs, size) * mesh.devices.size

    def read(self, mesh=None):
        """(module, params).  Raises CheckpointError: weights that are truncated or not finite.

        One leaf after the other goes to its devices, so the host never holds the whole model, unless
        the host is the device: then jax takes over the very arrays that are read into.
        """
        shapes = self.shapes
        if mesh is None:
            held = None

            def put(path, arrays):
                return jax.block_until_ready(jax.device_put(arrays[0]))
        else:
            specs = sharding.shardings(shapes, sharding_table(self.module), mesh)
            held = {path: sharding.pieces(specs[path], shape) for path, shape in shapes.items()}

            def put(path, arrays):
                return sharding.place(arrays, held[path], specs[path], shapes[path])

        params = leaf_by_leaf(
            self.rules, shapes, self.checkpoint.header, self.checkpoint.read, np.dtype(self.module.param_dtype), put,
            held and (lambda path: [tuple(slice(*pair) for pair in key) for key in held[path]]),
            self.checkpoint.source,
        )  # fmt: skip
        self.checkpoint.close()
        return self.module, flax.traverse_util.unflatten_dict(params, sep="/")


    def read_on_host(self):
        """(module, params) with numpy arrays, for conversion: no device sees them."""
        leaves = leaf_by_leaf(
            self.rules, self.shapes, self.checkpoint.header, self.checkpoint.read, np.dtype(self.module.param_dtype),
            lambda _, arrays: arrays[0], source=self.checkpoint.source,
        )  # fmt: skip
        self.checkpoint.close()
        return self.module, flax.traverse_util.unflatten_dict(leaves, sep="/")


def sharding_table(module):
    """The table of `sharding` for a module."""
    return {Sana: sharding.SANA, DCAE: sharding.DC_AE, Gemma2: sharding.GEMMA2}[type(module)]


def _prepare(module_class, fields, overrides, checkpoint, original=False):
    """The module of these fields, dtypes settled, and the checkpoint checked against it.

    `original`: the checkpoint's names, see `published_rules`.
    """
    names = [f.name for f in dataclasses.fields(module_class) if f.name not in ("parent", "name")]
    for name, value in overrides.items():
        if name not in names:
            raise InputError(f"{name}={value!r}: {module_class.__name__} has no such field{nearest(name, names)}")
    auto = [k for k in ("dtype", "param_dtype") if isinstance(overrides.get(k), str) and overrides[k] == "auto"]
    fields = fields | {k: v for k, v in overrides.items() if k not in auto}
    default = precision.stored(checkpoint.dtypes, checkpoint.source)
    fields["param_dtype"] = precision.parse(fields.get("param_dtype", fields.get("dtype", default)))
    fields["dtype"] = precision.parse(fields.get("dtype", fields["param_dtype"]))
    module = module_class(**fields)
    _require_plausible_depth(fields, checkpoint)
    try:
        shapes = parameter_shapes(module)
    except (ArithmeticError, TypeError, ValueError) as error:  # heads that do not divide a width, say
        given = "".join(f", {name}={value!r}" for name, value in overrides.items())
        reason = str(error).splitlines()[0]
        raise InputError(f"{checkpoint.source}: its structure{given} builds no {module_class.__name__}: {reason}") from error
    needed, held = (sum(map(math.prod, found)) for found in (shapes.values(), (s for s, _ in checkpoint.header.values())))
    if needed > 16 * held + 2**20:  # beyond a slip that `check` would list tensor by tensor
        raise CheckpointError(f"{checkpoint.source}: holds {held} numbers, but its structure needs {needed}; is this the right file?")
    table = published_rules(module, original)
    checkpoint = checkpoint.without(dc_ae_names.counters(table))
    check(slots(table, shapes), shapes, checkpoint.header, checkpoint.source)
    return Prepared(module, table, shapes, checkpoint)


def _require_plausible_depth(fields, checkpoint):
    """Raises CheckpointError where there are more layers than tensors: before anything is made of their number."""
    layers = {"depth": fields.get("depth", 1)}
    for side in ("encoder", "decoder"):
        layers[f"{side}_depths"] = sum(fields.get(f"{side}_depths", ()))
        layers[f"{side}_attention"] = sum(len(scales or ()) for scales in fields.get(f"{side}_attention", ()))
    for name, count in layers.items():
        if isinstance(count, int) and count > len(checkpoint.header):
            raise CheckpointError(f"{checkpoint.source}: {name} of {count} layers, but it holds {len(checkpoint.header)} tensors")


def _component(path, subfolder):
    """(folder or file to read, its config or None).  Raises InputError with a hint."""
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        return path, None
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        kind = config.get("_class_name") or config.get("model_type") or KINDS[subfolder]
        if kind != KINDS[subfolder]:
            raise InputError(f"{path}: holds {kind}, must hold {KINDS[subfolder]}: is this the right folder?")
        return path, config
    if (path / subfolder).is_dir():
        raise InputError(f"{path}: is a whole pipeline; pass {path / subfolder}, or use load_pipeline")
    return path, None


def open_weights(path, overrides=(), variant=None, stems=STEMS, published=None, **how):
    """The checkpoint of a folder or file; without a named variant, see `choose_variant`."""
    path, overrides = pathlib.Path(path), dict(overrides)
    if variant is None and path.is_dir() and (found := variants([p.name for p in path.iterdir()], stems)):
        wanted, published = precision.short(overrides.get("dtype", "auto")), published and precision.short(published)
        variant = choose_variant(found, wanted, published, source=path)
    return open_checkpoint(path, stems, variant, **how)


def _load(prepared, path, mesh):
    ops.require_runnable(getattr(prepared.module, "kernels", "auto"))
    memory.require_memory(prepared.bytes_held(mesh), path, mesh and mesh.devices.flat)
    return prepared.read(mesh)


def load_sana(path, *, variant=None, entry="state_dict", mesh=None, **overrides):
    """A Linear-DiT from a diffusers `transformer/` folder, or one file in diffusers' or NVlabs' names.

    Args:
      path: a folder with config.json and weights (sharded or not), a .safetensors file, or NVlabs' .pth
        (a pickle: see `checkpoints.pickles`).  Without a config the structure is told by names and
        shapes, and the resolution by the file's name; what neither tells can be given as a field.
      variant: "fp16", "bf16", ...: the files to read of a folder; None chooses for the dtype.
      entry: of a .pth that holds several models, e.g. "state_dict_ema".
      mesh: a `jax.sharding.Mesh` to lay the parameters over, see `sharding`.
      **overrides: fields of `Sana`, e.g. `dtype="bf16"`, `cross_heads=8`, `position_scale=2.0`.
    Returns:
      (Sana, params): `sana.apply({"params": params}, x, t, states, mask)`.
    Raises:
      InputError: wrong folder, config or override.  CheckpointError: weights that do not fit.
    """
    return _load(prepare_sana(path, variant=variant, entry=entry, **overrides), path, mesh)


def prepare_sana(path, *, variant=None, entry="state_dict", checkpoint=None, published=None, **overrides):
    """`load_sana` up to the point where weights are read: a `Prepared`.

    `checkpoint`: that of `path`, if it is open already.  `published`: the dtype that a known model runs
    in, which decides among variants where there are no plain files.
    """
    folder, config = _component(path, "transformer")
    fields = sana_format.config_fields(config, str(folder / "config.json")) if config is not None else None
    checkpoint = checkpoint or open_weights(folder, overrides, variant, published=published, entry=entry)
    original = sana_format.is_nvlabs(checkpoint.header)
    if fields is None:
        fields = sana_format.infer_fields(checkpoint.header, overrides)
        size = sana_format.size_fields(checkpoint.header, fields, folder.name)
        if size is None and "sample_size" not in overrides:
            warnings.warn(
                f"{folder}: neither its tensors nor its name tell the resolution; taken for 1024 px. Of a 2K model pass "
                "sample_size=64, position_scale=1.0, of a 4K model sample_size=128, position_scale=2.0", stacklevel=2,
            )  # fmt: skip
        fields |= size or {}
    if original:
        checkpoint = checkpoint.without(sana_format.NVLABS_DROPPED)
    return _prepare(Sana, fields, overrides, checkpoint, original)


def load_dc_ae(path, *, variant=None, entry="state_dict", mesh=None, **overrides):
    """A DC-AE in diffusers' or efficientvit's names, from a folder or one file; see `load_sana`.

    The scale of the latent comes from the config, else from the variant's name in the path, else a
    warning asks for `scaling_factor=`.

    Returns:
      (DCAE, params): `dc_ae.apply({"params": params}, images, method="encode")`, and "decode".
    """
    return _load(prepare_dc_ae(path, variant=variant, entry=entry, **overrides), path, mesh)


def prepare_dc_ae(path, *, variant=None, entry="state_dict", checkpoint=None, **overrides):
    """`load_dc_ae` up to the point where weights are read: a `Prepared`; see `prepare_sana`."""
    folder, config = _component(path, "vae")
    if "scaling_factor" in overrides:
        require_positive("scaling_factor", overrides["scaling_factor"], float)
    checkpoint = checkpoint or open_weights(folder, overrides, variant, entry=entry)
    fields = dc_ae_format.read_fields(checkpoint.header, config, folder, overrides)
    return _prepare(DCAE, fields, overrides, checkpoint, dc_ae_format.is_efficientvit(checkpoint.header))


def load_gemma2(path, *, variant=None, mesh=None, **overrides):
    """A Gemma-2 decoder from a transformers folder (with or without its language-model head).

    Returns:
      (Gemma2, params): `gemma2.apply({"params": params}, ids, mask) -> states`.
    """
    return _load(prepare_gemma2(path, variant=variant, **overrides), path, mesh)


def prepare_gemma2(path, *, variant=None, **overrides):
    """`load_gemma2` up to the point where weights are read: a `Prepared`."""
    folder, config = _component(path, "text_encoder")
    if config is None:
        raise InputError(f"{folder}: config.json is absent; Gemma-2's heads cannot be told from its weights")
    fields = gemma2_format.config_fields(config, str(folder / "config.json"))
    checkpoint = open_weights(folder, overrides, variant, ("model",), rename=gemma2_format.rename)
    return _prepare(Gemma2, fields, overrides, checkpoint.without(gemma2_format.UNUSED))
