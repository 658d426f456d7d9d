"""
RMSNorm and rotary embedding on a CPU, where eager PyTorch is bound by memory: the same numbers in fewer passes.

    n = x / rms(x),  y = n ⊙ w:   dx = (g − n mean(g ⊙ n)) / rms,  g = dy ⊙ w,  dw = Σ_rows dy ⊙ n

LayerNorm's backward with mean 0 is this less mean(g) / rms, and one fused kernel; what it lacks is a matrix-vector product. Autograd's
own backward of F.rms_norm takes three to four times as long, on the short rows of q and k norms six times.
A rotation writes each half of y with one product and one multiply-add; its gradient is the rotation by −θ.
"""
from __future__ import annotations

import torch


def trains(x):
    """Whether a backward pass will come: without one there is nothing to gain."""
    return x.device.type == 'cpu' and x.dtype in (torch.float32, torch.bfloat16) and torch.is_grad_enabled() and x.requires_grad


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        h = x.float()
        rstd = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        n = h * rstd
        return n.mul_(weight) if x.dtype == weight.dtype == torch.float32 else n.to(x.dtype) * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        h, w, dy, D = x.float().contiguous(), weight.float(), dy.float().contiguous(), x.shape[-1]
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(dy, h, [D], torch.zeros_like(rstd), rstd, w, None, [True, True, False])
        dx.addcmul_((dy @ w).div_(D).unsqueeze(-1), rstd)
        return dx.to(x.dtype), dw.to(weight.dtype), None


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotate(x, cos, sin, interleaved, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return rotate(dy, *ctx.saved_tensors, ctx.interleaved, True), None, None, None


def rotate(x, cos, sin, interleaved, backward):
    """Pairs are (2i, 2i+1) where the layout is interleaved: that of x forward, that of the gradient of x backward; else (i, i + d/2)."""
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    half = lambda t: t.chunk(2, dim=-1)  # noqa: E731
    pairs = lambda t: (t[..., 0::2], t[..., 1::2]) if interleaved else half(t)  # noqa: E731
    (a, b), (u, v) = (half(x.float()), pairs(y)) if backward else (pairs(x.float()), half(y))
    sign = -1 if backward else 1
    torch.mul(a, cos, out=u).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=v).addcmul_(a, sin, value=sign)
    return y.to(x.dtype)
