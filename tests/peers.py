"""Reference modules of the PyTorch peers with random weights, for parity tests.

A freshly built peer hides mistakes: its norms are the identity, its biases, gates and zero-init
projections are 0.  Here nothing is trivial, and everything is reproducible from a seed.
torch is imported inside the functions, so that collecting tests does not need it.
"""

import ml_dtypes
import numpy as np

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


def randomise(module, seed, gain=1.0, spread=0.2):
    """Sets every parameter and every saved buffer of a torch module from one seed; returns it.

    Args:
      gain: matrices and convolutions get a standard deviation of gain / sqrt(fan in), which hands
        on activations of about gain times their input.
      spread: standard deviation of everything else.  Norm weights lie around the constant that they
        start from (1, or 0 where the module itself adds 1), variances within 1 +- spread, and
        biases, means and free tables around 0.
    Buffers that a state dict leaves out (position tables, rotary frequencies) stay: constants.
    The module is put into eval mode and its gradients are switched off.
    """
    import torch

    saved = module.state_dict(keep_vars=True)
    tensors = dict(module.named_parameters())  # each tied weight once
    tensors |= {name: b for name, b in module.named_buffers() if name in saved}
    rng = np.random.default_rng(seed)

    def normal(shape, scale):
        return scale * rng.standard_normal(shape, np.float32)

    with torch.no_grad():
        for name in sorted(tensors):
            tensor = tensors[name]
            if not tensor.is_floating_point():
                continue  # a counter
            shape, leaf = tuple(tensor.shape), name.rpartition(".")[2]
            if leaf == "running_var":
                value = 1 + spread * rng.uniform(-1, 1, shape)
            elif leaf == "weight" and len(shape) >= 2:
                value = normal(shape, gain / np.sqrt(np.prod(shape[1:])))
            elif leaf == "weight":
                value = float(tensor.float().mean().round()) + normal(shape, spread)
            else:
                value = normal(shape, spread)
            tensor.copy_(torch.from_numpy(np.asarray(value, np.float32)))
    return module.eval().requires_grad_(False)


def to_numpy(tensor):
    """A numpy copy of a torch tensor; bfloat16 stays bfloat16."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()


def to_numpy_state(module):
    """{name: array} of a module's state dict, as a safetensors file would hold it."""
    return {name: to_numpy(tensor) for name, tensor in module.state_dict().items()}


def header(state):
    """{name: (shape, safetensors dtype)} of such a state, as `read.open_checkpoint` gives it."""
    return {name: (array.shape, DTYPES[array.dtype.name]) for name, array in state.items()}


def rms(x):
    """Root mean square in float64."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))
