"""Folders to modules and back, on a toy pipeline that diffusers wrote."""

import json
import shutil
import time

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import saving, schedulers
from sana_jax.checkpoints import write
from sana_jax.checkpoints.read import open_checkpoint
from sana_jax.errors import CheckpointError, InputError
from sana_jax.loading import load_dc_ae, load_gemma2, load_pipeline, load_sana
from sana_jax.parameters import parameter_shapes

pytestmark = pytest.mark.parity  # the toy folder is made by the peers
LOADERS = {"transformer": load_sana, "vae": load_dc_ae, "text_encoder": load_gemma2}


def flat(params):
    return {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()}


def same_bits(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


def parts(pipeline):
    return {"transformer": pipeline.sana, "vae": pipeline.dc_ae, "text_encoder": (pipeline.text.gemma2, pipeline.text.params)}


def dtypes(pipeline):
    """[transformer, autoencoder, text encoder], each of its module and of all its leaves."""
    for module, params in parts(pipeline).values():
        found = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
        assert found == {jnp.dtype(module.dtype).name} == {jnp.dtype(module.param_dtype).name}
    return [jnp.dtype(module.dtype).name for module, _ in parts(pipeline).values()]


def edit(path, **changes):
    """Changes keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({k: v for k, v in (value | changes).items() if v is not None}))


@pytest.fixture(scope="module")
def pipeline(toy_folder):
    return load_pipeline(toy_folder)


@pytest.fixture
def copy(toy_folder, tmp_path):
    return shutil.copytree(toy_folder, tmp_path / "copy")


@pytest.mark.parametrize("name", LOADERS)
def test_components(toy_folder, name):
    module, params = LOADERS[name](toy_folder / name)
    assert {k: v.shape for k, v in flat(params).items()} == parameter_shapes(module)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    stored = open_checkpoint(toy_folder / name).header
    assert sum(np.prod(shape, dtype=int) for shape, _ in stored.values()) == sum(a.size for a in jax.tree.leaves(params))


def test_overrides(toy_folder):
    folder = toy_folder / "transformer"
    module, params = load_sana(folder, dtype="bf16", position_scale=2.0, remat="full")
    assert (module.dtype, module.param_dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (module.position_scale, module.remat, module.cross_heads) == (2.0, "full", 4)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    module, params = load_sana(folder, dtype="bf16", param_dtype=jnp.float32)
    assert (module.dtype, module.param_dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert load_sana(folder, dtype="auto")[0].dtype == jnp.float32
    for arguments, message in [
        ({"cros_heads": 3}, "cros_heads=3: Sana has no such field; did you mean 'cross_heads'?"),
        ({"name": "x"}, "name='x': Sana has no such field"),
        ({"dtype": "bf61"}, "dtype='bf61': must be one of auto, float32, .*; did you mean 'bf16'?"),
        ({"param_dtype": jnp.int8}, "must be float32, bfloat16 or float16"),
    ]:
        with pytest.raises(InputError, match=message):
            load_sana(folder, **arguments)
    with pytest.raises(CheckpointError, match=r"(?s)missing \(.*wrong shape \("):
        load_sana(folder, depth=4, caption_width=32)
    for arguments in ({"cross_heads": 3}, {"heads": 5}, {"depth": "a"}, {"ffn_ratio": 0}):
        with pytest.raises(InputError, match="transformer: its structure, .*=.* builds no Sana: ") as caught:
            load_sana(folder, **arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, stem", [("transformer", "sana"), ("vae", "diffusion_pytorch_model")])
def test_without_a_config_the_structure_is_inferred(toy_folder, tmp_path, name, stem):
    """A single file of any name, and a folder that holds nothing but the weights."""
    extra = {"cross_heads": 4, "sample_size": 16} if name == "transformer" else {}
    module, params = LOADERS[name](toy_folder / name)
    file = tmp_path / f"{stem}.safetensors"
    shutil.copy(toy_folder / name / "diffusion_pytorch_model.safetensors", file)
    for source in (file, tmp_path) if name == "vae" else (file,):
        inferred = LOADERS[name](source, **extra)
        assert inferred[0] == module and same_bits(inferred[1], params)


def test_what_cannot_be_inferred_is_asked_for(toy_folder):
    with pytest.raises(InputError, match="width 64 is not a published one .*pass cross_heads="):
        load_sana(toy_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="config.json is absent; Gemma-2's heads cannot be told"):
        load_gemma2(toy_folder / "text_encoder" / "model.safetensors")


KINDS = {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC", "text_encoder": "gemma2"}


@pytest.mark.parametrize("name", LOADERS)
def test_wrong_folders(toy_folder, tmp_path, name):
    load = LOADERS[name]
    for other in KINDS.keys() - {name}:
        with pytest.raises(InputError, match=f"holds {KINDS[other]}, must hold {KINDS[name]}") as caught:
            load(toy_folder / other)
        assert str(caught.value).startswith(str(toy_folder / other)) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=f"is a whole pipeline; pass {toy_folder / name}, or use load_pipeline"):
        load(toy_folder)
    with pytest.raises(InputError, match="no such file or folder"):
        load(toy_folder / "nothing")
    with pytest.raises(InputError, match="no weights|config.json is absent"):
        load(tmp_path)
    wrong = {"transformer": "vae", "vae": "transformer", "text_encoder": "vae"}[name]
    with pytest.raises(InputError, match="SANA transformer|DC-AE|config.json is absent"):
        load(toy_folder / wrong / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("bits", ["F32", "BF16"])
def test_variants_and_shards_as_the_peers_write_them(toy_folder, tmp_path, bits):
    """File names of `save_pretrained(variant=...)`, with and without an index."""
    import torch
    from diffusers import SanaTransformer2DModel
    from transformers import Gemma2Model

    dtype = torch.float32 if bits == "F32" else torch.bfloat16
    for name, peer in (("transformer", SanaTransformer2DModel), ("text_encoder", Gemma2Model)):
        module = peer.from_pretrained(toy_folder / name).to(dtype)
        _, expected = LOADERS[name](toy_folder / name, dtype="fp32" if bits == "F32" else "bf16")
        for i, arguments in enumerate(
            [{"variant": "bf16"}, {"max_shard_size": "200KB"}, {"max_shard_size": "200KB", "variant": "fp16"}]
        ):
            folder = tmp_path / f"{name}{i}"
            module.save_pretrained(folder, **arguments)
            assert (len(list(folder.glob("*.safetensors"))) > 1) == (i > 0)
            _, params = LOADERS[name](folder)
            assert open_checkpoint(folder, ("diffusion_pytorch_model", "model")).dtypes == {bits}
            assert same_bits(params, expected)


@pytest.mark.parametrize(
    "change, arguments, message",
    [
        (lambda f: None, {"dtype": "bf61"}, "dtype='bf61': must be one of auto, .*did you mean 'bf16'"),
        (lambda f: None, {"dtype": int}, "dtype=<class 'int'>: must be float32, bfloat16 or float16"),
        (lambda f: None, {"stack": "nvlab"}, "stack='nvlab': must be one of 'auto', .*did you mean 'nvlabs'"),
        (lambda f: None, {"stack": 3}, "stack=3: must be one of"),
        (lambda f: None, {"kernels": "xal"}, "kernels='xal': must be one of 'auto', .*did you mean 'xla'"),
        (lambda f: (f / "model_index.json").unlink(), {}, "has no model_index.json, is not a pipeline"),
        (lambda f: (f / "model_index.json").write_text("x"), {}, "model_index.json: not valid JSON"),
        (
            lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), {},
            "model_index.json: _class_name='FluxPipeline': must be one of 'SanaPipeline', 'SanaPAGPipeline', 'SanaSprint",
        ),
        (
            lambda f: edit(f / "model_index.json", _class_name="SanaSprintPipeline"), {},
            "_class_name='SanaSprintPipeline' has a SANA-Sprint transformer, but guidance_embeds=False",
        ),
        (lambda f: edit(f / "sana_jax.json", stack="nvidia"), {}, "sana_jax.json: stack='nvidia': must be one of"),
        (lambda f: edit(f / "sana_jax.json", complex_human_instruction=[1]), {}, r"_instruction=\[1\]: must be a str"),
        (lambda f: shutil.rmtree(f / "vae"), {}, "vae: no such file or folder|vae: no weights"),
        (lambda f: shutil.rmtree(f / "tokenizer"), {}, "tokenizer: no such folder"),
        (lambda f: edit(f / "transformer" / "config.json", guidance_embeds=True), {}, "does not fit the model"),
        (lambda f: edit(f / "transformer" / "config.json", num_layers="3"), {}, "num_layers='3': must be a positive integer"),
        (lambda f: edit(f / "scheduler" / "scheduler_config.json", flow_shift=0), {}, "flow_shift=0: must be a pos"),
        (lambda f: edit(f / "scheduler" / "scheduler_config.json", flow_shift="3"), {}, "flow_shift='3': must be"),
        (
            lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="epsilon"), {},
            "prediction_type='epsilon': must be one of 'flow_prediction'",
        ),
    ],
)  # fmt: skip
def test_bad_pipelines(copy, change, arguments, message):
    change(copy)
    with pytest.raises(InputError, match=message) as caught:
        load_pipeline(copy, **arguments)
    assert "\n" not in str(caught.value) or isinstance(caught.value, CheckpointError)


def test_a_component_folder_is_no_pipeline(toy_folder):
    with pytest.raises(InputError, match="has no model_index.json.*; this is a component folder"):
        load_pipeline(toy_folder / "vae")


@pytest.mark.parametrize("model", ["no/such/folder", "nobody", "nobody/nothing", "/nobody/nothing", ""])
def test_models_that_are_nowhere(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="must be a folder in diffusers layout|not a local folder|no such folder|model_index") as caught:
        load_pipeline(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, expected",
    [("Sana_1600M_1024px_BF16_diffusers", "bfloat16"), ("SANA1.5_1.6B_1024px_diffusers", "bfloat16"),
     ("Sana_600M_512px_diffusers", "float16")],
)  # fmt: skip
def test_auto_takes_the_published_dtype_of_a_name(toy_folder, tmp_path, name, expected):
    folder = tmp_path / name
    folder.symlink_to(toy_folder)
    assert dtypes(load_pipeline(f"{folder}/")) == [expected, "float32", "float32"]


@pytest.mark.parametrize("dtype, expected", [("fp16", ["float16", "bfloat16", "bfloat16"]), ("fp32", ["float32"] * 3)])
def test_a_given_dtype_is_everybodys_but_float16(toy_folder, tmp_path, dtype, expected):
    folder = tmp_path / "Sana_1600M_1024px_BF16_diffusers"  # its name does not matter then
    folder.symlink_to(toy_folder)
    assert dtypes(load_pipeline(folder, dtype=dtype)) == expected


def test_auto_takes_the_stored_dtype(copy):
    for name, stem in {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        saving.save_component(copy / name, stem, *LOADERS[name](copy / name, dtype="fp16"))
        assert open_checkpoint(copy / name, (stem,)).dtypes == {"F16"}
    assert dtypes(load_pipeline(copy)) == ["float16", "bfloat16", "bfloat16"]


def test_a_nan_is_named_as_the_file_names_it(copy):
    folder, name = copy / "transformer", "transformer_blocks.1.ff.conv_depth.weight"
    tensors = dict(open_checkpoint(folder).tensors())
    tensors[name][3, 0, 1, 1] = np.nan
    write.write_safetensors(folder, "diffusion_pytorch_model", tensors.items())
    with pytest.raises(CheckpointError) as caught:
        load_pipeline(copy)
    assert str(caught.value).splitlines() == [f"{folder} holds NaN or infinity", "  tensors (1):", f"    {name}"]


def test_scheduler(copy, pipeline):
    file = copy / "scheduler" / "scheduler_config.json"
    assert "-Infinity" in file.read_text(), "no longer a test of it"
    assert pipeline.flow_shift == 3.0
    edit(file, flow_shift=5.5)
    assert load_pipeline(copy).flow_shift == 5.5
    edit(file, flow_shift=None, shift=2)
    assert schedulers.read_flow_shift(copy / "scheduler") == 2
    file.unlink()
    assert schedulers.read_flow_shift(copy / "scheduler") is None


@pytest.mark.parametrize("part, change", [
    ("transformer", {"num_layers": 10**9}),
    ("transformer", {"num_attention_heads": 10**6, "cross_attention_head_dim": 32, "num_cross_attention_heads": 10**6}),
    ("vae", {"encoder_layers_per_block": [10**9] * 6}),
    ("text_encoder", {"num_hidden_layers": 10**9}),
])  # fmt: skip
def test_a_config_that_claims_more_than_the_file_holds(copy, part, change):
    """Refused by counting, before anything is made for each of the layers, which would never end."""
    edit(copy / part / "config.json", **change)
    start = time.process_time()
    with pytest.raises(InputError):
        LOADERS[part](copy / part)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("value", ["a", float("nan"), 0, -1.0])
def test_a_scaling_factor_is_a_positive_number(toy_folder, value):
    with pytest.raises(InputError, match="scaling_factor"):
        load_dc_ae(toy_folder / "vae", scaling_factor=value)
