"""Gemma 2: names and config of transformers' Gemma2Model <-> ours (docs/numerics.md 2.4, 3.4)."""

from sana_jax.checkpoints.rules import LINEAR, Rule
from sana_jax.errors import InputError, nearest, require_choice, require_positive

LAYER = "layers.{i}"
UNUSED = ("lm_head.weight",)  # the output head, tied to the embedding; hidden states do not need it


def transformers_rules():
    """The total table of a Gemma2Model; norm weights are stored as they are applied, less 1."""
    linear = {
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.o_proj": "out",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    }
    norms = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "post_mlp_norm",
    }
    return [
        Rule("embed_tokens.weight", "embedding"),
        *(Rule(f"{LAYER}.{t}.weight", f"layers/{f}/kernel", LINEAR) for t, f in linear.items()),
        *(Rule(f"{LAYER}.{t}.weight", f"layers/{f}/scale") for t, f in norms.items()),
        Rule("norm.weight", "norm/scale"),
    ]


def rename(name):
    """Stored name -> the table's name: Gemma2ForCausalLM puts its decoder under "model."."""
    return name.removeprefix("model.")


# config.json key -> field of `Gemma2`, its type, and the default of both.
KEYS = {
    "vocab_size": ("vocab_size", int, 256000),
    "hidden_size": ("width", int, 2304),
    "num_hidden_layers": ("depth", int, 26),
    "num_attention_heads": ("heads", int, 8),
    "num_key_value_heads": ("kv_heads", int, 4),
    "head_dim": ("head_dim", int, 256),
    "intermediate_size": ("hidden", int, 9216),
    "rms_norm_eps": ("rms_eps", float, 1e-6),
    "query_pre_attn_scalar": ("query_scale", int, 256),
    "attn_logit_softcapping": ("attention_softcap", float, 50.0),
    "sliding_window": ("sliding_window", int, 4096),
}
OPTIONAL = ("attn_logit_softcapping",)  # may be null
# Keys that change the mathematics and that every Gemma 2 has alike: the values that mean so.
FIXED = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
    "rope_scaling": (None,),
}


def layer_types(depth):
    """transformers' names of the attention of each layer."""
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(depth)]


def config_fields(config, source="text_encoder/config.json"):
    """text_encoder/config.json of transformers -> fields of `Gemma2`.

    Absent keys take transformers' defaults, which are Gemma-2-2b's; keys that do not act on hidden
    states are ignored.
    Raises InputError: another model, or a value that no Gemma 2 has.
    """
    require_choice(f"{source}: model_type", config.get("model_type"), ("gemma2",))
    for key, allowed in FIXED.items():
        require_choice(f"{source}: {key}", config.get(key, allowed[0]), allowed)

    fields = {}
    for key, (field, kind, default) in KEYS.items():
        value = config.get(key, default)
        fields[field] = require_positive(f"{source}: {key}", value, kind, none=key in OPTIONAL)
    heads, kv_heads, depth = fields["heads"], fields["kv_heads"], fields["depth"]
    if heads % kv_heads:
        raise InputError(
            f"{source}: num_attention_heads={heads}: must be a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    if fields["head_dim"] % 2:
        raise InputError(f"{source}: head_dim={fields['head_dim']}: must be even")
    given = config.get("layer_types")  # the depth is not believed before it is compared with the weights
    if given is not None and not (isinstance(given, list) and len(given) == depth and given == layer_types(depth)):
        raise InputError(
            f"{source}: layer_types={given!r}: must be 'sliding_attention' and "
            f"'full_attention' in turn, {depth} in all"
        )

    rope = config.get("rope_parameters") or {}  # since transformers 5; before, rope_theta by itself
    if not isinstance(rope, dict):
        raise InputError(f"{source}: rope_parameters={rope!r}: must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    require_choice(f"{source}: rope_parameters.rope_type", kind, ("default",))
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    fields["rope_theta"] = require_positive(f"{source}: rope_theta", theta, float)
    return fields


def to_config(fields):
    """Fields of `Gemma2` -> text_encoder/config.json, which transformers loads as a Gemma2Model."""
    known = {field: key for key, (field, _, _) in KEYS.items()}
    for field in fields:
        if field not in known and field != "rope_theta":
            raise InputError(f"{field}: not a field of Gemma2's config{nearest(field, known)}")
    if missing := [field for field in (*known, "rope_theta") if field not in fields]:
        raise InputError(f"a config needs these fields of Gemma2: {', '.join(missing)}")
    theta = float(fields["rope_theta"])
    return {key: fields[field] for field, key in known.items()} | {
        "architectures": ["Gemma2Model"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "layer_types": layer_types(fields["depth"]),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,  # for transformers 4
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
