"""LPIPS, the perceptual distance of images (https://arxiv.org/abs/1801.03924), on features of VGG-16.

    d(a, b) = sum_k mean_hw  w_k . (f_k(a) / |f_k(a)| - f_k(b) / |f_k(b)|)^2

Its weights are other people's and no part of this package.  `load` reads one file with both halves,
    python -c 'import lpips, torch; torch.save(lpips.LPIPS(net="vgg").state_dict(), "lpips.pth")'
or torchvision's names of the features (features.0.weight, ...) with lpips' of the heads
(lin0.model.1.weight, ...) in a .safetensors file.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sana_jax import ops
from sana_jax.checkpoints import rules
from sana_jax.checkpoints.read import open_checkpoint

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # convolutions of VGG-16
PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # their numbers in torchvision's `features`
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of an image in [-1, 1]


class LPIPS(nn.Module):
    """The distance of a and b, [b H W 3] in [-1, 1], both at least 16 pixels wide and high: [b] float32."""

    widths: tuple = BLOCKS

    @nn.compact
    def __call__(self, a, b):
        x = (jnp.concatenate([a, b]) - np.float32(SHIFT)) / np.float32(SCALE)
        distance, number = 0.0, 0
        for block, widths in enumerate(self.widths):
            if block:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for width in widths:
                x = ops.relu(nn.Conv(width, (3, 3), padding=1, name=f"conv_{number}")(x))
                number += 1
            head = self.param(f"head_{block}", nn.initializers.ones, (x.shape[-1],))
            # The root of 0 has no derivative: a region without features would make NaN.
            unit = x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-20)
            first, second = jnp.split(unit, 2)
            distance += jnp.mean(jnp.square(first - second) @ head, axis=(1, 2))
        return distance

    def example_inputs(self):
        return jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 16, 16, 3))


def table():
    """The conversion table of the file that `load` reads."""
    convolutions = [rule for i, n in enumerate(PLACES) for rule in rules.dense(f"features.{n}", f"conv_{i}", layout=rules.CONV)]
    heads = rules.Layout(lambda a: a[None, :, None, None])
    return convolutions + [rules.Rule(f"lin{k}.model.1.weight", f"head_{k}", heads) for k in range(len(BLOCKS))]


def rename(name):
    """lpips' names of the features -> torchvision's."""
    return re.sub(r"net\.slice\d\.(\d+)\.", r"features.\1.", name)


UNUSED = re.compile(r"lins\..*|scaling_layer\..*|classifier\..*")  # a second name, constants, and VGG's own head


def load(path, module=LPIPS()):
    """The parameters of `module` from a file.

    Raises InputError: no such file, or not LPIPS of VGG-16; the message lists what does not fit.
    """
    checkpoint = open_checkpoint(path, rename=rename)
    try:
        checkpoint = checkpoint.without([name for name in checkpoint.header if UNUSED.fullmatch(name)])
        tree = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())["params"]
        shapes = {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
        leaves = rules.to_flax(table(), shapes, checkpoint.header, checkpoint.tensors(), np.dtype("float32"), str(path))
    finally:
        checkpoint.close()
    return unflatten_dict(leaves, sep="/")
