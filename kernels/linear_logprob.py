"""
Hidden states × head -> log-probability of each label and entropy, and their gradients, without ever holding [N, V].

    z = h Wᵀ / τ                 logits at temperature τ, float32           [chunk, V]
    logp = z_y - lse(z)          y the label, lse = log sum exp
    H = -sum_j p_j log p_j       entropy, p = softmax(z)
    dz = τ⁻¹ [g_l (1_y - p) - g_H p ⊙ (log p + H)]        for the incoming gradients g_l of logp and g_H of H
    dh = dz W,  dW = dzᵀ h       one chunk of tokens after the other, dW summed in float32

`linear_logprob` returns both as differentiable tensors; its backward pass computes the logits a second time (8 N V C operations;
what the last chunk needs is kept, so a batch of one chunk pays nothing). `linear_loss` takes the loss as a function of them and does all
in the forward pass (6 N V C): the policy's loss, or -logp for cross-entropy.

Precision: float32 products and sums. On a GPU, operands that are both bf16 (or both fp16) are multiplied as they are with float32
accumulation and float32 logits, which is the same arithmetic: a product of two bf16 numbers is exact in float32. dz is then
rounded to that type for its two GEMMs. The GEMMs are cuBLAS's; Triton's part is the two passes over a chunk's logits: one that
reads them once for logp, lse and H, one that reads them again and writes dz. In PyTorch one softmax gives all: lse by the largest
probability, and p - 1_y, which is dz but for a factor of each row, and that goes to the rows of h and dh.
"""
from __future__ import annotations

import torch

from kernels import cdiv, cpu, fused, jit, tl


def linear_logprob(h_NC, weight_VC, labels_N, temperature=1.0, entropy=False, chunk=None,
                   absent=None):
    """h [N, C] and weight [V, C] float, labels [N] int64 in 0..V-1 -> logp [N], entropy [N] or None, float32 (float64 for float64).
    absent: ids [n] int64 that are out of the distribution, of probability 0, or None.
    chunk: tokens at a time; by default as many as make 2^24 logits on a CPU, 2^29 on a GPU (a chunk that is not the last costs its logits twice)."""
    check(h_NC, weight_VC, labels_N)
    temperature = float(temperature)
    return LinearLogprob.apply(h_NC, weight_VC, labels_N, temperature, entropy, chunk, absent)


def linear_loss(h_NC, weight_VC, labels_N, loss_of, temperature=1.0, chunk=None, absent=None):
    """As linear_logprob, for a loss that is a sum over tokens: loss_of(logp [n], entropy [n], rows) -> scalar is called on each chunk,
    rows being its slice of 0..N. -> loss (differentiable), logp [N], entropy [N] (not differentiable)."""
    check(h_NC, weight_VC, labels_N)
    if not chunk and h_NC.device.type == 'cpu':      # few enough for the cache, where that leaves dW, written once a chunk, its 1,024 rows
        chunk = max(2**22 // len(weight_VC), min(1024, 2**24 // len(weight_VC)), 1)
    return LinearLoss.apply(h_NC, weight_VC, labels_N, loss_of, float(temperature), chunk, absent)


def check(h, weight, labels):
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1] or labels.shape != h.shape[:1]:
        raise ValueError(f'linear_logprob: h {list(h.shape)}, weight {list(weight.shape)} and labels {list(labels.shape)} '
                         'do not fit [N, C], [V, C] and [N]')


# ---------------------------------------------------------------------------------------------------------------------
# the reference: plain PyTorch on a chunk of logits


def rows_forward(z, labels, temperature, entropy):
    """z [n, V] unscaled, which is overwritten -> logp [n], lse [n], H [n] or None, and what rows_backward takes: here p - 1_y"""
    if fused(z) and z.dtype == torch.float32:
        return *rows_forward_triton(z, labels, temperature), z
    z = z.div_(temperature) if temperature != 1 else z
    top, z_y = z.amax(-1), z.gather(1, labels[:, None])
    p = torch.softmax(z, -1, out=None if entropy else z)
    lse = top - p.amax(-1).log()                              # the largest p is 1 / sum exp(z - top)
    H = lse - z.mul_(p).sum(-1) if entropy else None
    return z_y[:, 0] - lse, lse, H, p.scatter_add_(1, labels[:, None], torch.full_like(z_y, -1.0))


def rows_backward(kept, labels, temperature, lse, H, g_logp, g_H, dtype):
    """-> dz [n, V] in dtype, to be multiplied by a factor for each row [n] or None; g_H [n] or None"""
    if fused(kept) and kept.dtype == torch.float32:
        return rows_backward_triton(kept, labels, temperature, lse, H, g_logp, g_H, dtype), None
    if g_H is None:
        return kept.to(dtype), -g_logp / temperature
    p = kept.scatter_add(1, labels[:, None], torch.ones_like(g_logp)[:, None])
    dz = torch.special.xlogy(p, p).addcmul_(p, H[:, None]).mul_(g_H[:, None]).addcmul_(kept, g_logp[:, None])
    return dz.div_(-temperature).to(dtype), None


# ---------------------------------------------------------------------------------------------------------------------
# Triton


@jit
def _forward(z, labels, logp, lse, H, V, inv_tau, BLOCK: tl.constexpr):
    """One row a program. Each of BLOCK lanes keeps m = max, s = sum exp(z - m), t = sum exp(z - m) (z - m) of its columns; they are
    merged at the end: lse = m + log s, H = log s - t / s."""
    row = tl.program_id(0).to(tl.int64)
    z += row * V
    m = tl.full([BLOCK], -1e30, tl.float32)            # finite, or the first m - new would be inf - inf
    s = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.where(cols < V, tl.load(z + cols, cols < V, other=0.0) * inv_tau, -1e30)
        new = tl.maximum(m, x)
        old, one = tl.exp(m - new), tl.exp(x - new)
        t = old * (t + s * (m - new)) + one * (x - new)
        s = old * s + one
        m = new
    top = tl.max(m, 0)
    old = tl.exp(m - top)
    total = tl.sum(old * s, 0)
    log_s = tl.log(total)
    tl.store(H + row, log_s - tl.sum(old * (t + s * (m - top)), 0) / total)
    tl.store(lse + row, top + log_s)
    tl.store(logp + row, tl.load(z + tl.load(labels + row)) * inv_tau - (top + log_s))


@jit
def _backward(z, labels, lse, H, g_logp, g_H, dz, V, inv_tau, BLOCK: tl.constexpr, ENTROPY: tl.constexpr):
    """One block of one row a program: dz = (g_l (1_y - p) - g_H p (log p + H)) / tau"""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logp = tl.load(z + row * V + cols, cols < V, other=0.0) * inv_tau - tl.load(lse + row)
    g = tl.load(g_logp + row)
    slope = -g
    if ENTROPY:
        slope = slope - tl.load(g_H + row) * (logp + tl.load(H + row))
    d = tl.exp(logp) * slope + tl.where(cols == tl.load(labels + row), g, 0.0)
    tl.store(dz + row * V + cols, (d * inv_tau).to(dz.dtype.element_ty), cols < V)


BLOCK, WARPS = 4096, 8


def rows_forward_triton(z, labels, temperature):
    logp, lse, H = (torch.empty(len(z), dtype=torch.float32, device=z.device) for _ in range(3))
    _forward[(len(z),)](z, labels, logp, lse, H, z.shape[1], 1 / temperature, BLOCK=BLOCK, num_warps=WARPS)
    return logp, lse, H


def rows_backward_triton(z, labels, temperature, lse, H, g_logp, g_H, dtype):
    dz = torch.empty_like(z, dtype=dtype)
    g_logp, g_H = g_logp.contiguous(), None if g_H is None else g_H.contiguous()   # the gradient of a sum has stride 0
    _backward[(len(z), cdiv(z.shape[1], BLOCK))](z, labels, lse, H, g_logp, g_logp if g_H is None else g_H, dz, z.shape[1],
                                                 1 / temperature, BLOCK=BLOCK, ENTROPY=g_H is not None, num_warps=WARPS)
    return dz


def compile_cases(sm, x):
    """Any vocabulary: its size is a number at run time"""
    rows = dict(labels='*i64', lse='*fp32', H='*fp32', V='i32', inv_tau='fp32')
    yield 'rows forward', _forward, dict(z='*fp32', logp='*fp32', **rows), dict(BLOCK=BLOCK), WARPS, 3, 0
    yield 'rows backward', _backward, dict(z='*fp32', g_logp='*fp32', g_H='*fp32', dz=x, **rows), dict(BLOCK=BLOCK, ENTROPY=True), WARPS, 3, 0


# ---------------------------------------------------------------------------------------------------------------------
# autograd


def operands(h, weight):
    """-> h and weight as the GEMMs take them: half precision only on a GPU and where both are of it."""
    if h.is_cuda and h.dtype == weight.dtype and h.dtype in (torch.bfloat16, torch.float16):
        return h, weight
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    return h.to(dtype), weight.to(dtype)


def mm(a, b):
    """a @ b, accumulated and returned in float32 for half-precision operands"""
    with torch.autocast(a.device.type, enabled=False):
        return cpu.product(a, b.t()) if a.dtype.itemsize > 2 else torch.mm(a, b, out_dtype=torch.float32)


def logits(a, w, absent):
    """-> a wᵀ [n, V], in it the columns of absent ids so low that their share is 0, and yet
    finite: 0 times infinity is no number"""
    z = mm(a, w.T)
    return z if absent is None else z.index_fill_(1, absent, -1e20)


def slices(h, weight, chunk):
    chunk = chunk or max(1, (2**29 if h.is_cuda else 2**24) // len(weight))
    return [slice(i, min(i + chunk, len(h))) for i in range(0, len(h), chunk)]


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, labels, temperature, entropy, chunk, absent):
        a, w = operands(h, weight)
        dtype = torch.promote_types(a.dtype, torch.float32)
        logp, lse, H = (torch.empty(len(h), dtype=dtype, device=h.device) for _ in range(3))
        kept = None
        for s in slices(h, weight, chunk):
            del kept                                            # before the next chunk's logits
            z = logits(a[s], w, absent)
            logp[s], lse[s], H_s, kept = rows_forward(z, labels[s], temperature, entropy)
            del z
            if entropy:
                H[s] = H_s
        ctx.temperature, ctx.chunk, ctx.absent = temperature, chunk, absent
        ctx.save_for_backward(h, weight, labels, lse, H, kept)
        ctx.set_materialize_grads(False)   # an entropy that is only logged costs the backward pass nothing
        return logp, (H if entropy else None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_H):
        h, weight, labels, lse, H, last = ctx.saved_tensors
        g_logp = torch.zeros_like(lse) if g_logp is None else g_logp
        need_h, need_w = ctx.needs_input_grad[:2]
        a, w = operands(h, weight)
        dh = torch.empty_like(h) if need_h else None
        dw = torch.zeros(weight.shape, dtype=lse.dtype, device=h.device) if need_w else None
        for s in slices(h, weight, ctx.chunk):
            kept = last if s.stop == len(h) else \
                rows_forward(logits(a[s], w, ctx.absent), labels[s], ctx.temperature, False)[-1]
            dz = rows_backward(kept, labels[s], ctx.temperature, lse[s], H[s], g_logp[s], None if g_H is None else g_H[s], a.dtype)
            accumulate(*dz, a[s], w, dh[s] if need_h else None, dw)
        return dh, dw.to(weight.dtype) if need_w else None, None, None, None, None, None


class LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, labels, loss_of, temperature, chunk, absent):
        a, w = operands(h, weight)
        dtype = torch.promote_types(a.dtype, torch.float32)
        loss = torch.zeros((), dtype=dtype, device=h.device)
        logp, H = (torch.empty(len(h), dtype=dtype, device=h.device) for _ in range(2))
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.zeros(weight.shape, dtype=dtype, device=h.device) if ctx.needs_input_grad[1] else None
        for s in slices(h, weight, chunk):
            z = logits(a[s], w, absent)
            logp[s], lse, H[s], kept = rows_forward(z, labels[s], temperature, True)
            del z
            with torch.enable_grad():
                leaves = logp[s].clone().requires_grad_(), H[s].clone().requires_grad_()
                part = loss_of(*leaves, s)
                g_logp, g_H = torch.autograd.grad(part, leaves, allow_unused=True) if part.requires_grad else (None, None)
            loss += part.detach()
            if g_logp is not None or g_H is not None:
                g_logp = torch.zeros_like(lse) if g_logp is None else g_logp
                dz = rows_backward(kept, labels[s], temperature, lse, H[s], g_logp, g_H, a.dtype)
                accumulate(*dz, a[s], w, None if dh is None else dh[s], dw)
            elif dh is not None:
                dh[s] = 0
        ctx.mark_non_differentiable(logp, H)
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return loss, logp, H

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, *_):
        dh, dw = ctx.saved_tensors
        dh, dw = (None if d is None else d * g.to(d.dtype) for d in (dh, dw))
        return dh, None if dw is None else dw.to(ctx.dtype), None, None, None, None, None


def accumulate(dz, scale, a, w, dh, dw):
    """dh = s ⊙ dz w and dw += dzᵀ (s ⊙ a), in place; scale s [n] or None"""
    if dh is not None:
        product = mm(dz, w)
        dh.copy_(product if scale is None else product.mul_(scale[:, None]))
    if dw is not None:
        a = a if scale is None else (a * scale[:, None]).to(a.dtype)
        with torch.autocast(dz.device.type, enabled=False):
            if dz.dtype.itemsize > 2:
                dw.addmm_(dz.T, a)
            else:
                torch.addmm(dw, dz.T, a, out_dtype=dw.dtype, out=dw)
