"""Measurements on an accelerator; see README.md.  Nothing in `sana_jax` imports this."""
