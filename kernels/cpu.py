"""
Linear layers, SwiGLU, RMSNorm, rotary embedding and attention for training on a CPU: the same numbers in fewer passes and faster products.

    n = x / rms(x),  y = n ⊙ w:   dx = (g − n mean(g ⊙ n)) / rms,  g = dy ⊙ w,  dw = Σ_rows dy ⊙ n

LayerNorm's backward with mean 0 is this less mean(g) / rms, and one fused kernel; what it lacks is a matrix-vector product. Autograd's
own backward of F.rms_norm takes three to four times as long, on the short rows of q and k norms six times.
A rotation is a product with the cosines and a multiply-add with the sines of the halves exchanged, all on whole heads: on halves, 32
numbers at a time, they are three times as slow. Its gradient is the rotation by −θ.
Float32 products go to oneDNN, which on AVX-512 multiplies by 10 to 20% faster than MKL does here; it takes a transposed weight as it
lies, so x Wᵀ and dy W both gain; dyᵀ x would need copies of both and stays with MKL.
SwiGLU goes through a few rows at a time: what one pass writes the next finds in the cache.
Attention of short rows is a batched product for a block of queries and the keys that at least one of them sees: a causal mask leaves
three quarters of it at T = 256, one of packed documents half and less. Probabilities are kept, T·L numbers a head, where PyTorch's
flash kernel computes them again, in float32 alone.
"""
from __future__ import annotations

import ctypes
import os

import torch
import torch.nn.functional as F

from kernels import next_power_of_2


def keep_memory():
    """Memory that is freed stays with this process, for the next tensor. glibc else gives large blocks back at once and has them cleared page by page
    when they are taken again, tens of thousands of times in a training step. Blocks above 32 MiB, glibc's own limit, still come and go."""
    libc = ctypes.CDLL(None) if os.name == 'posix' else None
    if hasattr(libc, 'mallopt'):      # not macOS
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
        for option, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            libc.mallopt(option, value)


def trains(x):
    """Whether a backward pass will come: without one there is nothing to gain."""
    return x.device.type == 'cpu' and x.dtype in (torch.float32, torch.bfloat16) and torch.is_grad_enabled() and x.requires_grad


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
ONEDNN = HAS_ONEDNN and torch.backends.cpu.get_cpu_capability().startswith('AVX512')     # where it beats MKL with the weights as they lie
FEWEST = 1_500_000    # multiplications: with fewer oneDNN's preparation of a call costs more than it gains


def by_onednn(x, w):
    return ONEDNN and x.device.type == 'cpu' and x.dtype == w.dtype == torch.float32 and x.numel() * len(w) >= FEWEST


def product(x, w):
    """x [N, K] wᵀ, w [M, K] in any layout -> [N, M]"""
    if by_onednn(x, w):
        return torch.ops.mkldnn._linear_pointwise(x, w, None, 'none', [], '')
    return torch.mm(x, w.t())


def linear(x, weight, bias=None):
    """x [..., K], weight [M, K], bias [M] or None -> [..., M]; F.linear but for float32 in training on a CPU with AVX-512"""
    if not by_onednn(x, weight) or not trains(x) or torch.is_autocast_enabled('cpu'):
        return F.linear(x, weight, bias)
    y = Linear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return product(dy, weight.t()) if ctx.needs_input_grad[0] else None, dy.t() @ x if ctx.needs_input_grad[1] else None


class SwiGLU(torch.autograd.Function):
    """h = silu(g) ⊙ u:  dg = dh ⊙ u ⊙ silu'(g),  du = dh ⊙ silu(g)"""
    PIECE = 2**17   # numbers

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        h = torch.empty_like(gate, memory_format=torch.contiguous_format)
        for g, u, out in zip(*(SwiGLU.pieces(t) for t in (gate, up, h))):
            torch.mul(torch.ops.aten.silu.out(g, out=out), u, out=out)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        dg, du = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
        for d, g, u, out_g, out_u in zip(*(SwiGLU.pieces(t) for t in (dh, gate, up, dg, du))):
            torch.ops.aten.silu_backward.grad_input(torch.mul(d, u, out=out_g), g, grad_input=out_g)
            torch.mul(torch.ops.aten.silu.out(g, out=out_u), d, out=out_u)
        return dg, du

    @staticmethod
    def pieces(t):
        return t.reshape(-1, t.shape[-1]).split(max(1, SwiGLU.PIECE // t.shape[-1]))


class Experts(torch.autograd.Function):
    """y_n = Σ_k w_nk D_e (silu(G_e x_n) ⊙ U_e x_n), e = chosen_nk, as kernels/moe.py has it, expert after expert: what one product writes the next
    operation finds in the cache. x [N, C], gate_up [E, 2I, C], down [E, C, I], weights [N, K] float32, chosen [N, K] -> [N, C]"""

    @staticmethod
    def layout(chosen, E):
        """-> the token of each row [R], the row of each slot [N, K], each expert's rows [(a, b), ...]. An expert's rows are filled up, with token 0, to a
        multiple of about a sixteenth of the mean: oneDNN takes half a millisecond and some memory for every number of rows it has not met."""
        flat, K = chosen.flatten(), chosen.shape[1]
        piece = min(128, max(8, next_power_of_2(len(flat) // (16 * E))))
        order, counts = flat.argsort(stable=True), torch.bincount(flat, minlength=E)
        filled = (counts + (piece - 1)) // piece * piece
        ends = filled.cumsum(0)
        rows = torch.arange(len(flat)) + (ends - filled - counts.cumsum(0) + counts).repeat_interleave(counts)    # of the sorted slots
        tokens = torch.zeros(int(ends[-1]), dtype=torch.int64).index_copy_(0, rows, order // K)
        return tokens, torch.empty_like(order).scatter_(0, order, rows).view_as(chosen), list(zip((ends - filled).tolist(), ends.tolist()))

    @staticmethod
    def combine(v, rows, weights=None):
        """Σ_k w_nk v_nk, v [R, C] and rows [N, K] -> [N, C]"""
        if v.dtype == torch.float32 and v.device.type == 'cpu':      # one pass instead of three
            return F.embedding_bag(rows, v, per_sample_weights=weights, mode='sum')
        v = v.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        return (v if weights is None else v * weights.unsqueeze(-1).to(v.dtype)).sum(1)

    @staticmethod
    def forward(ctx, x, gate_up, down, weights, chosen):
        tokens, rows, spans = Experts.layout(chosen, len(down))
        x, kept = x.index_select(0, tokens), []
        v = torch.empty_like(x)
        for (a, b), w_up, w_down in zip(spans, gate_up, down):
            kept.append(product(x[a:b], w_up))
            g, u = kept[-1].chunk(2, -1)
            v[a:b] = product(F.silu(g).mul_(u), w_down)
        ctx.save_for_backward(x, gate_up, down, weights, tokens, rows, *kept)
        ctx.spans = spans
        return Experts.combine(v, rows, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, gate_up, down, weights, tokens, rows, *kept = ctx.saved_tensors
        dy, w = dy.index_select(0, tokens), weights.new_zeros(len(tokens)).index_copy_(0, rows.flatten(), weights.flatten())   # 0: filled up
        dx, dw, d_up, d_down = (torch.empty_like(t) for t in (x, w, gate_up, down))
        for e, (a, b) in enumerate(ctx.spans):
            (g, u), w_e, d = kept[e].chunk(2, -1), w[a:b, None].to(dy.dtype), torch.empty_like(kept[e])
            dg, du = d.chunk(2, -1)
            p, h = product(dy[a:b], down[e].t()), F.silu(g)
            dh = p * w_e
            torch.mul(dh, h, out=du)
            torch.ops.aten.silu_backward.grad_input(dh.mul_(u), g, grad_input=dg)
            dw[a:b] = torch.linalg.vecdot(p, h.mul_(u))
            torch.mm(dy[a:b].t(), h.mul_(w_e), out=d_down[e])
            torch.mm(d.t(), x[a:b], out=d_up[e])
            dx[a:b] = product(d, gate_up[e].t())
        return Experts.combine(dx, rows), d_up, d_down, dw[rows], None


def inverse_rms(h, eps):
    """h [..., D] float32 -> 1 / sqrt(mean(h²) + eps) [..., 1]"""
    return torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(h.shape[-1]).add_(eps).rsqrt_()


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        h = x.float()
        rstd = inverse_rms(h, eps)
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
    half, y = x.shape[-1] // 2, x.float()
    if interleaved and not backward:
        y = y.unflatten(-1, (half, 2)).mT.flatten(-2)
    swapped = y.roll(half, -1)
    y = (y * torch.cat([cos, cos], -1)).addcmul_(swapped, torch.cat([-sin, sin], -1), value=-1 if backward else 1)
    if interleaved and backward:
        y = y.unflatten(-1, (2, half)).mT.flatten(-2)
    return y.to(x.dtype)


def visible(mask, T, L):
    """mask: None (causal), or True where visible [B or 1, 1, T, L] -> for each block of queries a to b the keys s to e that any of them sees,
    and what is added to the last columns of their scores: [(a, b, s, e, bias), ...]"""
    blocks = []
    for a in range(0, T, Attention.BLOCK):
        b = min(T, a + Attention.BLOCK)
        if mask is None:
            blocks.append((a, b, 0, b, torch.full((b - a, b - a), float('-inf')).triu_(1)))
            continue
        seen = [0, L - 1]
        if type(mask) is torch.Tensor:      # plan.py's tensors hold no numbers
            seen = mask[:, 0, a:b].flatten(0, 1).any(0).nonzero()[:, 0].tolist()
        part = mask[:, :, a:b, seen[0]:seen[-1] + 1]
        blocks.append((a, b, seen[0], seen[-1] + 1, torch.zeros(part.shape).masked_fill_(~part, float('-inf'))))
    return blocks


class Attention(torch.autograd.Function):
    """softmax(scale q kᵀ + bias) v. q [B, H, T, n], k [B, G, L, n], v [B, G, L, w], blocks as `visible` makes them -> [B, H, T, w]
        dv = pᵀ do,  ds = p ⊙ (do vᵀ − Σ_j p_j (do vᵀ)_j),  dq = scale ds k,  dk = scale dsᵀ q"""
    LONGEST, BLOCK = 1024, 64

    @staticmethod
    def forward(ctx, q, k, v, blocks, scale):
        (B, H, T, _), (_, G, L, w) = q.shape, v.shape
        k, v = k.reshape(B * G, L, -1), v.reshape(B * G, L, w)
        o, kept, wide = q.new_empty(B, T, H, w).transpose(1, 2), [], torch.promote_types(q.dtype, torch.float32)
        rows = lambda t, a, b: t[:, :, a:b].unflatten(1, (G, H // G)).reshape(B * G, -1, t.shape[-1])  # noqa: E731
        for a, b, s, e, bias in blocks:
            scores = torch.bmm(qs := rows(q, a, b), k[:, s:e].mT).to(wide).mul_(scale)
            scores.view(B, H, b - a, e - s)[..., -bias.shape[-1]:].add_(bias)
            p = torch.softmax(scores, -1).to(q.dtype)
            o[:, :, a:b] = torch.bmm(p, v[:, s:e]).view(B, H, b - a, w)
            kept += [qs, p]
        ctx.save_for_backward(k, v, *kept)
        ctx.blocks, ctx.scale, ctx.rows, ctx.shapes = blocks, scale, rows, (q.shape, (B, G, L))
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        k, v, *kept = ctx.saved_tensors
        (q_shape, (B, G, L)), H, wide = ctx.shapes, do.shape[1], torch.promote_types(do.dtype, torch.float32)
        dq, dk, dv = do.new_empty(q_shape), torch.zeros_like(k), torch.zeros_like(v)
        for (a, b, s, e, _), q, p in zip(ctx.blocks, kept[::2], kept[1::2]):
            g = ctx.rows(do, a, b)
            dv[:, s:e] += torch.bmm(p.mT, g)           # baddbmm_ of a slice goes row by row
            ds = torch._softmax_backward_data(torch.bmm(g, v[:, s:e].mT).to(wide), p.to(wide), -1, wide).mul_(ctx.scale).to(q.dtype)
            dq[:, :, a:b] = torch.bmm(ds, k[:, s:e]).view(B, H, b - a, -1)
            dk[:, s:e] += torch.bmm(ds.mT, q)
        return dq, dk.view(B, G, L, -1), dv.view(B, G, L, -1), None, None
