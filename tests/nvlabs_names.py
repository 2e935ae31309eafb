"""A diffusers transformer's state under NVlabs' names, by hand: an exporter that is not the one under test."""

TOP = {
    "patch_embed.proj": "x_embedder.proj",
    "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.guidance_embedder.linear_1": "cfg_embedder.mlp.0",
    "time_embed.guidance_embedder.linear_2": "cfg_embedder.mlp.2",
    "time_embed.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "attn1.to_out.0": "attn.proj",
    "attn1.norm_q": "attn.q_norm",
    "attn1.norm_k": "attn.k_norm",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "attn2.norm_q": "cross_attn.q_norm",
    "attn2.norm_k": "cross_attn.k_norm",
    "ff.conv_inverted": "mlp.inverted_conv.conv",
    "ff.conv_depth": "mlp.depth_conv.conv",
    "ff.conv_point": "mlp.point_conv.conv",
}


def nvlabs_state(state):
    """{name: torch tensor} of diffusers' SanaTransformer2DModel -> of NVlabs'."""
    import torch

    out, state = {"final_layer.scale_shift_table": state["scale_shift_table"]}, dict(state)
    del state["scale_shift_table"]
    for i in range(sum(name.endswith("attn1.to_q.weight") for name in state)):
        block = f"transformer_blocks.{i}."
        out[f"blocks.{i}.scale_shift_table"] = state.pop(block + "scale_shift_table")
        out[f"blocks.{i}.attn.qkv.weight"] = torch.cat([state.pop(f"{block}attn1.to_{x}.weight") for x in "qkv"])
        for kind in ("weight", "bias"):
            kv = [state.pop(f"{block}attn2.to_{x}.{kind}") for x in "kv"]
            out[f"blocks.{i}.cross_attn.kv_linear.{kind}"] = torch.cat(kv)
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("transformer_blocks."):
            _, i, inner = stem.split(".", 2)
            out[f"blocks.{i}.{BLOCK[inner]}.{kind}"] = tensor
        else:
            out[f"{TOP[stem]}.{kind}"] = tensor
    return out
