"""GPU kernels of SANA's elementwise-and-reduce operations, forward and backward.

    from pallas_kernels.adaln import add_gated, modulate
    from pallas_kernels.linear_attention import linear_attention
    from pallas_kernels.mix_ffn import mix_ffn
    from pallas_kernels.rms_residual import add_rms_norm

Each folder is one operation: its signature, formula and choice of implementation in `__init__.py`,
its specification in `reference.py`, plain JAX in `xla.py`, and the same algorithm as kernel twice, in
`pallas_triton.py` and `jax_triton.py`.  Needs jax alone; Triton only where "jax_triton" is asked for.
One device: who cuts arrays over several calls these from inside `jax.shard_map`.
"""
