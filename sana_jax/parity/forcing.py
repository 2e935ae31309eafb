"""Running a part of one of our modules on an input that the PyTorch side recorded.

A wrong weight shifts everything behind it.  Fed with the peer's own input, a layer is wrong only if
it is wrong itself, so the line that fails is the layer's.
"""

import functools

import flax.linen as nn
import jax


def intercepted(module, params, inputs, actions, method="__call__"):
    """module.method(*inputs), in which `actions[path](run, args)` stands for the submodule at `path`.

    `run(*args)` is what the submodule would do; paths are tuples of names.  Inside a scan an action
    may use arrays from outside but not hand any out.
    Raises KeyError: a path that no submodule has.
    """
    met = set()

    def interceptor(run, args, kwargs, context):
        layer = context.module
        if context.method_name == "__call__" and layer.scope is not None and layer.path in actions:
            met.add(layer.path)
            return actions[layer.path](functools.partial(run, **kwargs), args)
        return run(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        out = module.apply({"params": params}, *inputs, method=method)
    if absent := actions.keys() - met:
        raise KeyError(f"{type(module).__name__} has no {sorted('/'.join(p) for p in absent)}")
    return out


def feed(x):
    """Action: the submodule runs on `x` in place of its first argument."""
    return lambda run, args: run(x, *args[1:])


def give(y):
    """Action: `y` is the submodule's output, which does not run."""
    return lambda run, args: y


def first(run, args):
    """Action: the submodule hands its first argument on."""
    return args[0]


def layer(stacked, index):
    """One layer of parameters whose leading axis is depth, the axis kept with size 1."""
    return jax.tree.map(lambda leaf: leaf[index : index + 1], stacked)
