"""Names, shapes and config of Gemma 2 in both directions."""

import json

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sana_jax.checkpoints import gemma2, read, rules
from sana_jax.errors import CheckpointError, InputError
from sana_jax.models.gemma2 import GEMMA2_2B, Gemma2

TOY = Gemma2(64, 24, 2, 4, 2, 6, 40, query_scale=9)
FIELDS = dict(
    vocab_size=64, width=24, depth=2, heads=4, kv_heads=2, head_dim=6, hidden=40, rms_eps=1e-5,
    rope_theta=20000.0, query_scale=9, attention_softcap=30.0, sliding_window=16,
)  # fmt: skip
# What transformers 4 wrote for the published text encoder, in its own keys.
PUBLISHED = {
    "architectures": ["Gemma2Model"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}


def shapes_of(module):
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    tree = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def toy_state(dtype=ml_dtypes.bfloat16):
    rng = np.random.default_rng(0)
    shapes = rules.names(gemma2.transformers_rules(), shapes_of(TOY))
    return {n: rng.standard_normal(shape, np.float32).astype(dtype) for n, shape in shapes.items()}


def test_names_of_the_published_model():
    names = rules.names(gemma2.transformers_rules(), shapes_of(GEMMA2_2B))
    assert len(names) == 26 * 11 + 2
    assert sum(np.prod(shape) for shape in names.values()) == 2_614_341_888
    assert names["embed_tokens.weight"] == (256000, 2304)
    assert names["norm.weight"] == (2304,)
    last = "layers.25."
    assert {n.removeprefix(last): s for n, s in names.items() if n.startswith(last)} == {
        "self_attn.q_proj.weight": (2048, 2304),
        "self_attn.k_proj.weight": (1024, 2304),
        "self_attn.v_proj.weight": (1024, 2304),
        "self_attn.o_proj.weight": (2304, 2048),
        "mlp.gate_proj.weight": (9216, 2304),
        "mlp.up_proj.weight": (9216, 2304),
        "mlp.down_proj.weight": (2304, 9216),
        "input_layernorm.weight": (2304,),
        "post_attention_layernorm.weight": (2304,),
        "pre_feedforward_layernorm.weight": (2304,),
        "post_feedforward_layernorm.weight": (2304,),
    }


@pytest.mark.parity
def test_names_are_those_of_transformers():
    import torch
    import transformers

    with torch.device("meta"):
        peer = transformers.Gemma2Model(transformers.Gemma2Config())
    expected = {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()}
    assert rules.names(gemma2.transformers_rules(), shapes_of(GEMMA2_2B)) == expected


def convert(checkpoint, module=TOY, dtype=ml_dtypes.bfloat16):
    table, shapes = gemma2.transformers_rules(), shapes_of(module)
    return rules.to_flax(
        table, shapes, checkpoint.header, checkpoint.tensors(), dtype, checkpoint.source
    )


@pytest.mark.parametrize("prefix, head", [("", False), ("model.", True), ("model.", False)])
def test_round_trip_is_exact(tmp_path, prefix, head):
    state = toy_state()
    stored = {prefix + name: tensor for name, tensor in state.items()}
    if head:
        stored["lm_head.weight"] = state["embed_tokens.weight"]
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    checkpoint = read.open_checkpoint(tmp_path, rename=gemma2.rename).without(gemma2.UNUSED)
    leaves = convert(checkpoint)
    assert leaves["layers/gate/kernel"].shape == (2, 24, 40)
    back = dict(rules.to_torch(gemma2.transformers_rules(), leaves))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert (back[name].view(np.uint16) == tensor.view(np.uint16)).all(), name


def test_only_the_head_is_dropped(tmp_path):
    state = toy_state()
    for name in ("lm_head.bias", "score.weight", "layers.2.input_layernorm.weight"):
        state[name] = np.zeros(24, np.float32)
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    checkpoint = read.open_checkpoint(tmp_path, rename=gemma2.rename).without(gemma2.UNUSED)
    with pytest.raises(CheckpointError) as error:
        convert(checkpoint)
    for name in ("lm_head.bias", "score.weight", "layers.2.input_layernorm.weight"):
        assert name in str(error.value)


# Config


def test_published_config_is_the_default():
    assert Gemma2(**gemma2.config_fields(PUBLISHED)) == GEMMA2_2B
    assert Gemma2(**gemma2.config_fields({"model_type": "gemma2"})) == GEMMA2_2B
    causal = PUBLISHED | {"architectures": ["Gemma2ForCausalLM"]}
    assert Gemma2(**gemma2.config_fields(causal)) == GEMMA2_2B


def test_config_round_trip():
    for fields in (FIELDS, FIELDS | {"attention_softcap": None}):
        assert gemma2.config_fields(json.loads(json.dumps(gemma2.to_config(fields)))) == fields


def test_rope_theta_in_either_place():
    new = {k: v for k, v in PUBLISHED.items() if k != "rope_theta"}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5000}}
    assert gemma2.config_fields(new)["rope_theta"] == 5000.0
    assert gemma2.config_fields(PUBLISHED | {"rope_theta": 7000})["rope_theta"] == 7000.0


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "gemma"}, ["model_type='gemma'", "'gemma2'"]),
        ({"model_type": None}, ["model_type=None"]),
        ({"hidden_activation": "relu"}, ["hidden_activation='relu'", "gelu_pytorch_tanh"]),
        ({"attention_bias": True}, ["attention_bias=True", "False"]),
        ({"use_bidirectional_attention": True}, ["use_bidirectional_attention=True"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling="]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_type='yarn'", "'default'"]),
        ({"rope_parameters": "x"}, ["rope_parameters='x'"]),
        ({"rope_theta": -1}, ["rope_theta=-1"]),
        ({"num_hidden_layers": "26"}, ["num_hidden_layers='26'", "positive integer"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers=True"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan"]),
        ({"sliding_window": None}, ["sliding_window=None"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=8", "num_key_value_heads=3"]),
        ({"head_dim": 7}, ["head_dim=7"]),
        ({"layer_types": ["full_attention"] * 26}, ["layer_types=", "sliding_attention"]),
    ],
)
def test_config_errors_name_the_field(change, words):
    with pytest.raises(InputError) as error:
        gemma2.config_fields(PUBLISHED | change, "folder/config.json")
    message = str(error.value)
    assert "\n" not in message and message.startswith("folder/config.json: ")
    assert all(word in message for word in words), message


def test_to_config_wants_exactly_the_fields():
    with pytest.raises(InputError, match="hidden_dim"):
        gemma2.to_config(FIELDS | {"hidden_dim": 3})
    with pytest.raises(InputError, match="width, rope_theta"):
        gemma2.to_config({k: v for k, v in FIELDS.items() if k not in ("width", "rope_theta")})


@pytest.mark.parity
@pytest.mark.parametrize("softcap", [30.0, None])
def test_transformers_loads_what_we_write(tmp_path, softcap):
    import transformers

    fields = FIELDS | {"attention_softcap": softcap}
    (tmp_path / "config.json").write_text(json.dumps(gemma2.to_config(fields)))
    state = toy_state(np.float32)
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    peer, info = transformers.Gemma2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in peer.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), state[name])
    config = peer.config
    assert config.rope_parameters["rope_theta"] == 20000.0
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert (config.sliding_window, config.attn_logit_softcapping) == (16, softcap)
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path), transformers.Gemma2Config)
    # And what transformers writes, we read.
    peer.save_pretrained(tmp_path / "again")
    assert gemma2.config_fields(read.read_json(tmp_path / "again" / "config.json")) == fields
