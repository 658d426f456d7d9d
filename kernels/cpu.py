"""
The CPU's own path: the same operations as plain PyTorch's, in fewer passes and faster products.

    NANOR1_CPU_PATHS=0 python sft.py ...     switches all of it off; PyTorch's own operators serve

Every operation of kernels/ takes this path in training on a CPU (`trains`), where no Triton kernel
serves; sampling has kernels/cpu_sampling.py. Nothing here is needed to understand the model: each
function computes what the `_torch` function of the same name does, but for rounding.

    n = x / rms(x),  y = n ⊙ w:   dx = (g − n mean(g ⊙ n)) / rms,  g = dy ⊙ w,  dw = Σ_rows dy ⊙ n

rms_norm    LayerNorm's backward with mean 0 is this less mean(g) / rms, and one fused kernel; what
            it lacks is a matrix-vector product. Autograd's own backward of F.rms_norm takes three
            to four times as long, on the short rows of q and k norms six times.
apply_rope  A rotation is a product with the cosines and a multiply-add with the sines of the halves
            exchanged, all on whole heads: on halves, 32 numbers at a time, they are three times as
            slow. Its gradient is the rotation by −θ.
linear      Float32 products go to oneDNN, which on AVX-512 multiplies by 10 to 20% faster than MKL
            does here; it takes a transposed weight as it lies, so x Wᵀ and dy W both gain;
            dyᵀ x would need copies of both and stays with MKL.
            The head's products are float32 in bf16 runs as well; AMX makes them of bf16 factors
            with float32 sums (`bf16_products`), twice as fast and no less exact.
swiglu      goes through a few rows at a time: what one pass writes the next finds in the cache.
experts     one after the other, for the same reason.
attention   of short rows is a batched product for a block of queries and the keys that at least
            one of them sees: a causal mask leaves three quarters of it at T = 256, one of packed
            documents half and less. Probabilities are kept, T·L numbers a head, where PyTorch's
            flash kernel computes them again, in float32 alone.
"""
from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from kernels import next_power_of_2, working_dtype

ENABLED = os.environ.get('NANOR1_CPU_PATHS', '1') != '0'


def usable(x):
    return ENABLED and x.device.type == 'cpu'


def trains(x):
    """Whether a backward pass will come: without one there is nothing to gain."""
    if not usable(x) or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    return torch.is_grad_enabled() and x.requires_grad


LIBC = ctypes.CDLL(None) if os.name == 'posix' else None


def keep_memory():
    """Memory that is freed stays with this process, for the next tensor. glibc else gives large
    blocks back at once and has them cleared page by page when they are taken again, tens of
    thousands of times in a training step. Blocks above 32 MiB, glibc's own limit, still come and
    go."""
    if not ENABLED or not hasattr(LIBC, 'mallopt'):      # macOS has none
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
    LIBC.mallopt(M_MMAP_THRESHOLD, 2**25)
    LIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    LIBC.mallopt(M_TOP_PAD, 2**26)


def return_memory():
    """What is free goes back after all. Called between parts of a run whose tensors have other
    sizes: pieces that one leaves do not fit the other, and the process would grow with every
    step."""
    if ENABLED and hasattr(LIBC, 'malloc_trim'):
        LIBC.malloc_trim(0)


@contextmanager
def on_fake_tensors(keep_probabilities=True):
    """Within, the operations run on tensors that hold no numbers, for plan.py, and autograd keeps
    as much as with numbers: one expert gets all rows, every block of queries sees every key, and
    nothing goes to oneDNN, whose operators have no fake version and would compute. This path is
    taken even where it is switched off: grouped products in float32 have no fake version either.
    keep_probabilities: False where attention computes them again, as on a GPU."""
    here = globals()
    changes = {'ENABLED': True, 'ONEDNN': False, 'SWIGLU_PIECE': 2**62,
               'rows_by_expert': all_to_one_expert, 'keys_seen': every_key}
    if not keep_probabilities:
        changes['LONGEST'] = 0
    as_before = {name: here[name] for name in changes}
    here.update(changes)
    try:
        yield
    finally:
        here.update(as_before)


# ------------------------------------------------------------------------------------------
# products and linear layers

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
AVX512 = torch.backends.cpu.get_cpu_capability().startswith('AVX512')
ONEDNN = HAS_ONEDNN and AVX512     # where it beats MKL with the weights as they lie
FEWEST = 1_500_000    # multiplications: with fewer oneDNN's preparation costs more than it gains


AMX = HAS_ONEDNN and torch.cpu._is_amx_tile_supported()     # multiplies bf16 eight times as fast


def hold_bf16(*tensors):
    """Whether all are bf16 on a processor that multiplies that many times as fast"""
    return AMX and all(usable(t) and t.dtype == torch.bfloat16 for t in tensors)


@contextmanager
def bf16_products(on=True):
    """Within, if on, torch.mm takes its float32 factors as bf16 and sums in float32: nothing is
    lost of factors that were bf16 before, and the result is float32, which no product of bf16
    tensors has here."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if on:
        matmul.fp32_precision = 'bf16'
    try:
        yield
    finally:
        matmul.fp32_precision = before


def by_onednn(x, w):
    if not (usable(x) and ONEDNN) or x.numel() * len(w) < FEWEST:
        return False
    return x.dtype == w.dtype == torch.float32


def product(x, w):
    """x [N, K] wᵀ, w [M, K] in any layout -> [N, M]"""
    if by_onednn(x, w):
        return torch.ops.mkldnn._linear_pointwise(x, w, None, 'none', [], '')
    return torch.mm(x, w.t())


def linear(x, weight, bias=None):
    """x [..., K], weight [M, K], bias [M] or None -> [..., M]: F.linear, on every device; only
    float32 in training on a CPU with AVX-512 goes another way."""
    if not by_onednn(x, weight) or not trains(x) or torch.is_autocast_enabled('cpu'):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = CpuLinear.apply(rows, weight).view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


class CpuLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad
        dx = product(dy, weight.t()) if need_dx else None
        dw = dy.t() @ x if need_dw else None
        return dx, dw


# ------------------------------------------------------------------------------------------
# SwiGLU and experts

SWIGLU_PIECE = 2**17   # numbers


def swiglu(gate, up):
    return CpuSwiGLU.apply(gate, up)


class CpuSwiGLU(torch.autograd.Function):
    """h = silu(g) ⊙ u:  dg = dh ⊙ u ⊙ silu'(g),  du = dh ⊙ silu(g)"""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        h = torch.empty_like(gate, memory_format=torch.contiguous_format)
        for g, u, out in zip(pieces(gate), pieces(up), pieces(h)):
            torch.mul(torch.ops.aten.silu.out(g, out=out), u, out=out)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        dg = torch.empty_like(gate, memory_format=torch.contiguous_format)
        du = torch.empty_like(up, memory_format=torch.contiguous_format)
        for d, g, u, out_g, out_u in zip(*map(pieces, (dh, gate, up, dg, du))):
            torch.mul(d, u, out=out_g)
            torch.ops.aten.silu_backward.grad_input(out_g, g, grad_input=out_g)
            torch.mul(torch.ops.aten.silu.out(g, out=out_u), d, out=out_u)
        return dg, du


def pieces(t):
    """t [..., I] -> its rows, a few at a time"""
    return t.reshape(-1, t.shape[-1]).split(max(1, SWIGLU_PIECE // t.shape[-1]))


def experts(x, gate_up, down, weights, chosen):
    """As kernels/moe.py has it: x [N, C], gate_up [E, 2I, C], down [E, C, I], weights [N, K]
    float32, chosen [N, K] -> [N, C]"""
    return CpuExperts.apply(x, gate_up, down, weights, chosen)


class CpuExperts(torch.autograd.Function):
    """y_n = Σ_k w_nk D_e (silu(G_e x_n) ⊙ U_e x_n), e = chosen_nk, expert after expert"""

    @staticmethod
    def forward(ctx, x, gate_up, down, weights, chosen):
        tokens, rows, spans = rows_by_expert(chosen, len(down))
        x = x.index_select(0, tokens)
        kept = []
        v = torch.empty_like(x)
        for (a, b), w_up, w_down in zip(spans, gate_up, down):
            gate_and_up = product(x[a:b], w_up)
            g, u = gate_and_up.chunk(2, -1)
            v[a:b] = product(F.silu(g).mul_(u), w_down)
            kept.append(gate_and_up)
        ctx.save_for_backward(x, gate_up, down, weights, tokens, rows, *kept)
        ctx.spans = spans
        return combine(v, rows, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, gate_up, down, weights, tokens, rows, *kept = ctx.saved_tensors
        dy = dy.index_select(0, tokens)
        w = weights.new_zeros(len(tokens))      # 0 where rows are filled up
        w.index_copy_(0, rows.flatten(), weights.flatten())
        dx, dw, d_up, d_down = (torch.empty_like(t) for t in (x, w, gate_up, down))
        for e, (a, b) in enumerate(ctx.spans):
            g, u = kept[e].chunk(2, -1)
            w_e = w[a:b, None].to(dy.dtype)
            d = torch.empty_like(kept[e])
            dg, du = d.chunk(2, -1)

            p = product(dy[a:b], down[e].t())
            h = F.silu(g)
            dh = p * w_e
            torch.mul(dh, h, out=du)
            torch.ops.aten.silu_backward.grad_input(dh.mul_(u), g, grad_input=dg)

            dw[a:b] = torch.linalg.vecdot(p, h.mul_(u))
            torch.mm(dy[a:b].t(), h.mul_(w_e), out=d_down[e])
            torch.mm(d.t(), x[a:b], out=d_up[e])
            dx[a:b] = product(d, gate_up[e].t())
        return combine(dx, rows), d_up, d_down, dw[rows], None


def rows_by_expert(chosen, E):
    """-> the token of each row [R], the row of each slot [N, K], each expert's rows [(a, b), ...].
    An expert's rows are filled up, with token 0, to a multiple of about a sixteenth of the mean:
    oneDNN takes half a millisecond and some memory for every number of rows it has not met."""
    flat, K = chosen.flatten(), chosen.shape[1]
    piece = min(128, max(8, next_power_of_2(len(flat) // (16 * E))))
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=E)
    filled = (counts + (piece - 1)) // piece * piece
    ends = filled.cumsum(0)
    starts = ends - filled

    shift = starts - counts.cumsum(0) + counts       # from a place among the sorted slots to a row
    rows = torch.arange(len(flat)) + shift.repeat_interleave(counts)
    tokens = torch.zeros(int(ends[-1]), dtype=torch.int64).index_copy_(0, rows, order // K)
    row_of_slot = torch.empty_like(order).scatter_(0, order, rows).view_as(chosen)
    return tokens, row_of_slot, list(zip(starts.tolist(), ends.tolist()))


def all_to_one_expert(chosen, E):
    """rows_by_expert where there are no numbers to sort by"""
    return chosen.flatten(), chosen, [(0, chosen.numel())]


def combine(v, rows, weights=None):
    """Σ_k w_nk v_nk, v [R, C] and rows [N, K] -> [N, C]"""
    if usable(v) and v.dtype == torch.float32:      # one pass instead of three
        return F.embedding_bag(rows, v, per_sample_weights=weights, mode='sum')
    v = v.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    if weights is not None:
        v = v * weights.unsqueeze(-1).to(v.dtype)
    return v.sum(1)


# ------------------------------------------------------------------------------------------
# norm and rotation


def rms_norm(x, weight, eps, residual=None):
    h = x if residual is None else x + residual
    y = CpuRMSNorm.apply(h, weight, eps)
    return y if residual is None else (y, h)


def inverse_rms(h, eps):
    """h [..., D] float32 -> 1 / sqrt(mean(h²) + eps) [..., 1]"""
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return norm.square_().div_(h.shape[-1]).add_(eps).rsqrt_()


class CpuRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        h = x.float()
        rstd = inverse_rms(h, eps)
        ctx.save_for_backward(x, weight, rstd)
        n = h * rstd
        if x.dtype == weight.dtype == torch.float32:
            return n.mul_(weight)
        return n.to(x.dtype) * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        D = x.shape[-1]
        h = x.float().contiguous()
        w = weight.float()
        dy = dy.float().contiguous()
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            dy, h, [D], torch.zeros_like(rstd), rstd, w, None, [True, True, False])
        dx.addcmul_((dy @ w).div_(D).unsqueeze(-1), rstd)
        return dx.to(x.dtype), dw.to(weight.dtype), None


def apply_rope(x, rope, interleaved):
    return CpuRope.apply(x, *rope, interleaved)


class CpuRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotate(x, cos, sin, interleaved, backward=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return rotate(dy, *ctx.saved_tensors, ctx.interleaved, backward=True), None, None, None


def rotate(x, cos, sin, interleaved, backward):
    """Pairs are (2i, 2i+1) where the layout is interleaved: that of x forward, that of the gradient
    of x backward; else (i, i + d/2)."""
    half = x.shape[-1] // 2
    y = x.float()
    if interleaved and not backward:
        y = y.unflatten(-1, (half, 2)).mT.flatten(-2)
    swapped = y.roll(half, -1)
    y = y * torch.cat([cos, cos], -1)
    y = y.addcmul_(swapped, torch.cat([-sin, sin], -1), value=-1 if backward else 1)
    if interleaved and backward:
        y = y.unflatten(-1, (2, half)).mT.flatten(-2)
    return y.to(x.dtype)


# ------------------------------------------------------------------------------------------
# attention of short rows

LONGEST = 1024   # tokens of a row: the probabilities of longer ones would fill the memory
BLOCK = 64       # queries


def is_short(T, L):
    return max(T, L) <= LONGEST


def causal_blocks(T):
    """-> for each block of queries a to b the keys s to e that any of them sees, and what is added
    to the last columns of their scores: [(a, b, s, e, bias), ...]"""
    blocks = []
    for a in range(0, T, BLOCK):
        b = min(T, a + BLOCK)
        hidden = torch.full((b - a, b - a), float('-inf')).triu_(1)
        blocks.append((a, b, 0, b, hidden))
    return blocks


def blocks_of(visible):
    """visible [B or 1, 1, T, L] bool -> the same, of any mask"""
    blocks = []
    T = visible.shape[2]
    for a in range(0, T, BLOCK):
        b = min(T, a + BLOCK)
        s, e = keys_seen(visible[:, 0, a:b])
        part = visible[:, :, a:b, s:e]
        bias = torch.zeros(part.shape).masked_fill_(~part, float('-inf'))
        blocks.append((a, b, s, e, bias))
    return blocks


def keys_seen(visible):
    """visible [B, queries, L] -> the first key that any query sees, and one past the last"""
    seen = visible.flatten(0, 1).any(0).nonzero()[:, 0].tolist()
    return seen[0], seen[-1] + 1


def every_key(visible):
    """keys_seen where there are no numbers to look at"""
    return 0, visible.shape[2]


def attention(q, k, v, scale, blocks):
    """q [B, H, T, n], k [B, G, L, n], v [B, G, L, w], blocks as above -> [B, H, T, w]"""
    dtype = working_dtype(q)
    with torch.autocast('cpu', enabled=False):
        return CpuAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype), blocks, scale)


class CpuAttention(torch.autograd.Function):
    """o = p v,  p = softmax(scale q kᵀ + bias)
    dv = pᵀ do,  ds = p ⊙ (do vᵀ − Σ_j p_j (do vᵀ)_j)
    dq = scale ds k,  dk = scale dsᵀ q"""

    @staticmethod
    def forward(ctx, q, k, v, blocks, scale):
        B, H, T, _ = q.shape
        _, G, L, w = v.shape
        k = k.reshape(B * G, L, -1)
        v = v.reshape(B * G, L, w)
        o = q.new_empty(B, T, H, w).transpose(1, 2)
        wide = torch.promote_types(q.dtype, torch.float32)
        kept = []
        for a, b, s, e, bias in blocks:
            queries = by_key_head(q, a, b, G)
            scores = torch.bmm(queries, k[:, s:e].mT).to(wide).mul_(scale)
            scores.view(B, H, b - a, e - s)[..., -bias.shape[-1]:].add_(bias)
            p = torch.softmax(scores, -1).to(q.dtype)
            o[:, :, a:b] = torch.bmm(p, v[:, s:e]).view(B, H, b - a, w)
            kept += [queries, p]
        ctx.save_for_backward(k, v, *kept)
        ctx.blocks = blocks
        ctx.scale = scale
        ctx.shapes = q.shape, G
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        k, v, *kept = ctx.saved_tensors
        q_shape, G = ctx.shapes
        B, H, _, _ = q_shape
        wide = torch.promote_types(do.dtype, torch.float32)
        dq = do.new_empty(q_shape)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for (a, b, s, e, _), queries, p in zip(ctx.blocks, kept[::2], kept[1::2]):
            g = by_key_head(do, a, b, G)
            dv[:, s:e] += torch.bmm(p.mT, g)           # baddbmm_ of a slice goes row by row
            dp = torch.bmm(g, v[:, s:e].mT).to(wide)
            ds = torch._softmax_backward_data(dp, p.to(wide), -1, wide)
            ds = ds.mul_(ctx.scale).to(queries.dtype)
            dq[:, :, a:b] = torch.bmm(ds, k[:, s:e]).view(B, H, b - a, -1)
            dk[:, s:e] += torch.bmm(ds.mT, queries)
        L = k.shape[1]
        return dq, dk.view(B, G, L, -1), dv.view(B, G, L, -1), None, None


def by_key_head(t, a, b, G):
    """Queries a to b of t [B, H, T, d] -> [B G, H / G (b - a), d]"""
    B, H, _, d = t.shape
    return t[:, :, a:b].unflatten(1, (G, H // G)).reshape(B * G, -1, d)
