"""The operations of `kernels_cases` as PyTorch users write them, eager or compiled: what there is to beat.

Mix-FFN is cuDNN's (or PyTorch's own) grouped convolution in channels-last layout with pointwise passes
around it; attention multiplies in float32, as the published model does.
"""


def _attention(qkv, scale=None):
    import torch

    q, k, v = qkv.chunk(3, dim=-1)
    if scale is not None:
        def normed(x, weight):
            x = x.float()
            return (x * torch.rsqrt(x.square().mean(dim=(2, 3), keepdim=True) + 1e-5) * weight).to(qkv.dtype)

        q, k = normed(q, scale[0]), normed(k, scale[1])
    q, k, v = q.relu().float(), k.relu().float(), v.float()
    state = torch.einsum("bnkc,bnke->bkce", k, v)
    weight = torch.einsum("bnkc,bkc->bnk", q, k.sum(dim=1)) + 1e-15
    return (torch.einsum("bnkc,bkce->bnke", q, state) / weight[..., None]).to(qkv.dtype)


def _mix_ffn(y, kernel, bias):
    import torch.nn.functional as F

    x = F.silu(y.permute(0, 3, 1, 2))  # channels-last in memory, as it came
    value, gate = F.conv2d(x, kernel, bias, padding=1, groups=y.shape[-1]).chunk(2, dim=1)
    return (value * F.silu(gate)).permute(0, 2, 3, 1)


def _modulate(x, shift, scale):
    import torch.nn.functional as F

    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _add_gated(x, gate, y):
    return x + gate[:, None] * y


def _add_rms_norm(x, y, scale, bias):
    import torch.nn.functional as F

    return x + (F.rms_norm(y, y.shape[-1:], scale, eps=1e-5) + bias)


FUNCTIONS = {
    "linear_attention": _attention,
    "linear_attention, norm": _attention,
    "mix_ffn": _mix_ffn,
    "modulate": _modulate,
    "add_gated": _add_gated,
    "add_rms_norm": _add_rms_norm,
}


def passes(case, compiled=False):
    """{"forward": set -> result, "both": set -> (result, gradients)} of torch tensors."""
    import torch

    fn = FUNCTIONS[case.op]
    if compiled:
        torch._dynamo.reset()  # or it would stop compiling after so many shapes
        fn = torch.compile(fn, fullgraph=True, dynamic=False)

    def forward(args, gradient):
        with torch.no_grad():
            return fn(*args)

    def both(args, gradient):
        args = [a.detach().requires_grad_(i in case.table.wanted) for i, a in enumerate(args)]
        out = fn(*args)
        return out, torch.autograd.grad(out, [args[i] for i in case.table.wanted], gradient)

    return {"forward": forward, "both": both}


def tensors(given):
    """A set of jax arrays as torch tensors; parameters in the one dtype and the layout that PyTorch keeps them in."""
    import torch

    args, gradient = given
    gradient = torch.from_dlpack(gradient)
    args = [torch.from_dlpack(a).to(gradient.dtype) for a in args]
    return [a.permute(2, 0, 1)[:, None].contiguous() if a.shape[:2] == (3, 3) else a for a in args], gradient


def arrays(results):
    """(result, gradients) as jax arrays, in the shapes of the arguments."""
    import jax

    out, gradients = results
    gradients = [g[:, 0].permute(1, 2, 0) if g.shape[2:] == (3, 3) else g for g in gradients]
    return jax.tree.map(lambda t: jax.dlpack.from_dlpack(t.detach().contiguous()), (out, gradients))
