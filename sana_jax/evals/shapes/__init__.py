"""GenEval-Shapes: how well text controls the pictures of a model that paints shapes.

    python -m sana_jax.evals.shapes --images-per-category 400 --output OUT

The six categories, the metadata and the rules are GenEval's (https://arxiv.org/abs/2310.11513); the
detector needs no network, since the world is `data.shapes_scene`'s.
"""
