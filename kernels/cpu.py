"""
RMSNorm, rotary embedding and attention for training on a CPU: the same numbers in fewer passes and products.

    n = x / rms(x),  y = n ⊙ w:   dx = (g − n mean(g ⊙ n)) / rms,  g = dy ⊙ w,  dw = Σ_rows dy ⊙ n

LayerNorm's backward with mean 0 is this less mean(g) / rms, and one fused kernel; what it lacks is a matrix-vector product. Autograd's
own backward of F.rms_norm takes three to four times as long, on the short rows of q and k norms six times.
A rotation writes each half of y with one product and one multiply-add; its gradient is the rotation by −θ.
Attention of short rows is a batched product for a block of queries and the keys that at least one of them sees: a causal mask leaves
three quarters of it at T = 256, one of packed documents half and less. Probabilities are kept, T·L numbers a head, where PyTorch's
flash kernel computes them again, in float32 alone.
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


class Attention(torch.autograd.Function):
    """softmax(scale q kᵀ + mask) v. q [B, H, T, n], k [B, G, L, n], v [B, G, L, w], mask [B or 1, 1, T, L], 0 or -inf -> [B, H, T, w]
        dv = pᵀ do,  ds = p ⊙ (do vᵀ − Σ_j p_j (do vᵀ)_j),  dq = scale ds k,  dk = scale dsᵀ q"""
    LONGEST, BLOCK = 1024, 64

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        (B, H, T, _), (_, G, L, w) = q.shape, v.shape
        k, v = k.reshape(B * G, L, -1), v.reshape(B * G, L, w)
        o, kept, ctx.blocks = q.new_empty(B, T, H, w).transpose(1, 2), [], []
        rows = lambda t, a, b: t[:, :, a:b].unflatten(1, (G, H // G)).reshape(B * G, -1, t.shape[-1])  # noqa: E731
        for a in range(0, T, Attention.BLOCK):
            b = min(T, a + Attention.BLOCK)
            seen = [0, L - 1]
            if type(mask) is torch.Tensor:      # plan.py's tensors hold no numbers
                seen = (mask[:, 0, a:b] == 0).any(1).any(0).nonzero()[:, 0].tolist()
            s, e = seen[0], seen[-1] + 1
            scores = torch.bmm(qs := rows(q, a, b), k[:, s:e].mT).float().mul_(scale)
            scores.view(B, H, b - a, e - s).add_(mask[:, :, a:b, s:e])
            p = torch.softmax(scores, -1).to(q.dtype)
            o[:, :, a:b] = torch.bmm(p, v[:, s:e]).view(B, H, b - a, w)
            kept += [qs, p]
            ctx.blocks.append((a, b, s, e))
        ctx.save_for_backward(k, v, *kept)
        ctx.scale, ctx.rows, ctx.shapes = scale, rows, (q.shape, (B, G, L))
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        k, v, *kept = ctx.saved_tensors
        (q_shape, (B, G, L)), H = ctx.shapes, do.shape[1]
        dq, dk, dv = do.new_empty(q_shape), torch.zeros_like(k), torch.zeros_like(v)
        for (a, b, s, e), q, p in zip(ctx.blocks, kept[::2], kept[1::2]):
            g = ctx.rows(do, a, b)
            dv[:, s:e].baddbmm_(p.mT, g)
            ds = torch._softmax_backward_data(torch.bmm(g, v[:, s:e].mT).float(), p.float(), -1, torch.float32).mul_(ctx.scale).to(q.dtype)
            dq[:, :, a:b] = torch.bmm(ds, k[:, s:e]).view(B, H, b - a, -1)
            dk[:, s:e].baddbmm_(ds.mT, q)
        return dq, dk.view(B, G, L, -1), dv.view(B, G, L, -1), None, None
