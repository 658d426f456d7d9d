"""
Hidden states × head -> log-probability of each label and entropy, and their gradients, without ever
holding [N, V].

    z = h Wᵀ / τ               logits at temperature τ, float32            [chunk, V]
    logp = z_y − lse(z)        y the label, lse = log Σ exp
    H = −Σ_j p_j log p_j       entropy, p = softmax(z)
    dz = τ⁻¹ [g_l (1_y − p) − g_H p ⊙ (log p + H)]      g_l, g_H the gradients of logp and H
    dh = dz W
    dW = dzᵀ h                 one chunk of tokens after the other, summed in float32

Bound by the products: 2 N V C operations forward, 6 N V C backward, 2 of them for logits that are
computed a second time. What the last chunk needs is kept (on a CPU the last four), so a batch of
one chunk has 4 N V C.

Precision: float32 products and sums. On a GPU, operands that are both bf16 (or both fp16) are
multiplied as they are with float32 accumulation and float32 logits, which is the same arithmetic: a
product of two bf16 numbers is exact in float32. dz is then rounded to that type for its two GEMMs.
So it is for bf16 on a CPU with AMX.

The GEMMs are cuBLAS's. Triton's part is the two passes over a chunk's logits: one that reads them
once for logp, lse and H, one that reads them again and writes dz. In PyTorch one softmax gives all:
lse by the largest probability, and p − 1_y, which is dz but for a factor of each row, and that goes
to the rows of h and dh.
"""
from __future__ import annotations

import torch

from kernels import cdiv, cpu, fused, jit, tl


def linear_logprob(
    h_NC, weight_VC, labels_N, temperature=1.0, entropy=False, chunk=None, absent=None,
):
    """
    h [N, C] and weight [V, C] float, labels [N] int64 in 0..V-1
    -> logp [N], entropy [N] or None, float32 (float64 for float64)

    absent: ids [n] int64 that are out of the distribution, of probability 0, or None.
    chunk: tokens at a time; by default as many as make 2^24 logits on a CPU, 2^29 on a GPU. A chunk
    that is not kept costs its logits twice.
    Raises ValueError for shapes that do not fit.
    """
    check(h_NC, weight_VC, labels_N)
    return LinearLogprob.apply(
        h_NC, weight_VC, labels_N, float(temperature), entropy, chunk, absent)


def check(h, weight, labels):
    matrices = h.dim() == 2 and weight.dim() == 2
    if not matrices or h.shape[1] != weight.shape[1] or labels.shape != h.shape[:1]:
        raise ValueError(
            f'linear_logprob: h {list(h.shape)}, weight {list(weight.shape)} and labels '
            f'{list(labels.shape)} do not fit [N, C], [V, C] and [N]')


# ---- plain PyTorch on a chunk of logits ----

def rows_forward_torch(z, labels, temperature, entropy):
    """As rows_forward; what it keeps is p − 1_y, in the memory of z unless there is an entropy."""
    if temperature != 1:
        z.div_(temperature)
    top = z.amax(-1)
    z_y = z.gather(1, labels[:, None])
    p = torch.softmax(z, -1, out=None if entropy else z)

    lse = top - p.amax(-1).log()        # the largest p is 1 / Σ exp(z − top)
    H = lse - z.mul_(p).sum(-1) if entropy else None
    p.scatter_add_(1, labels[:, None], torch.full_like(z_y, -1.0))
    return z_y[:, 0] - lse, lse, H, p


def rows_backward_torch(kept, labels, temperature, H, g_logp, g_H, dtype):
    if g_H is None:
        return kept.to(dtype), -g_logp / temperature
    p = kept.scatter_add(1, labels[:, None], torch.ones_like(g_logp)[:, None])
    dz = torch.special.xlogy(p, p).addcmul_(p, H[:, None])
    dz.mul_(g_H[:, None]).addcmul_(kept, g_logp[:, None]).div_(-temperature)
    return dz.to(dtype), None


# ---- Triton ----

@jit
def _forward(z_ptr, labels_ptr, logp_ptr, lse_ptr, H_ptr, V, inv_tau, BLOCK: tl.constexpr):
    """
    A program takes one row. Each of BLOCK lanes keeps, of its columns, m = max z, s = Σ exp(z − m),
    t = Σ exp(z − m) (z − m); they are merged at the end: lse = m + log s, H = log s − t / s.

    reads     z [n, V] float32, not yet divided by τ; labels [n] int64
    writes    logp, lse, H [n] float32
    bound     memory: 4 n V bytes
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    m = tl.full([BLOCK], -1e30, tl.float32)     # finite, or the first m − new would be inf − inf
    s = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)

    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + cols, cols < V, other=0.0) * inv_tau
        z = tl.where(cols < V, z, -1e30)
        new = tl.maximum(m, z)
        shrink = tl.exp(m - new)
        e = tl.exp(z - new)
        t = shrink * (t + s * (m - new)) + e * (z - new)
        s = shrink * s + e
        m = new

    top = tl.max(m, 0)
    shrink = tl.exp(m - top)
    total = tl.sum(shrink * s, 0)
    log_s = tl.log(total)
    tl.store(H_ptr + row, log_s - tl.sum(shrink * (t + s * (m - top)), 0) / total)
    tl.store(lse_ptr + row, top + log_s)
    z_y = tl.load(z_ptr + tl.load(labels_ptr + row)) * inv_tau
    tl.store(logp_ptr + row, z_y - (top + log_s))


@jit
def _backward(
    z_ptr, labels_ptr, lse_ptr, H_ptr, g_logp_ptr, g_H_ptr, dz_ptr,
    V, inv_tau,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr,
):
    """
    A program takes BLOCK columns of one row: dz = (g_l (1_y − p) − g_H p (log p + H)) / τ.

    reads     z [n, V] float32; labels [n] int64; lse, g_logp [n], with ENTROPY H, g_H [n] float32
    writes    dz [n, V] of the GEMMs' dtype
    bound     memory: 6 n V bytes for bf16, 8 n V for float32
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * V + cols, cols < V, other=0.0) * inv_tau
    log_p = z - tl.load(lse_ptr + row)
    g_logp = tl.load(g_logp_ptr + row)
    slope = -g_logp
    if ENTROPY:
        slope = slope - tl.load(g_H_ptr + row) * (log_p + tl.load(H_ptr + row))
    dz = tl.exp(log_p) * slope + tl.where(cols == tl.load(labels_ptr + row), g_logp, 0.0)
    tl.store(dz_ptr + row * V + cols, (dz * inv_tau).to(dz_ptr.dtype.element_ty), cols < V)


BLOCK, WARPS = 4096, 8


def rows_forward_triton(z, labels, temperature):
    """As rows_forward; what it keeps is z."""
    n, V = z.shape
    logp, lse, H = (torch.empty(n, dtype=torch.float32, device=z.device) for _ in range(3))
    _forward[(n,)](
        z, labels, logp, lse, H, V, 1 / temperature, BLOCK=BLOCK, num_warps=WARPS)
    return logp, lse, H, z


def rows_backward_triton(z, labels, temperature, lse, H, g_logp, g_H, dtype):
    n, V = z.shape
    dz = torch.empty_like(z, dtype=dtype)
    g_logp = g_logp.contiguous()        # the gradient of a sum has stride 0
    _backward[(n, cdiv(V, BLOCK))](
        z, labels, lse, H, g_logp, g_logp if g_H is None else g_H.contiguous(), dz,
        V, 1 / temperature,
        BLOCK=BLOCK, ENTROPY=g_H is not None, num_warps=WARPS)
    return dz, None


# ---- autograd ----

def rows_forward(z, labels, temperature, entropy):
    """
    z [n, V] not yet divided by the temperature, which is overwritten, labels [n]
    -> logp [n], lse [n], H [n] or None, and what rows_backward needs of the logits [n, V]
    """
    if fused(z) and z.dtype == torch.float32:
        return rows_forward_triton(z, labels, temperature)
    return rows_forward_torch(z, labels, temperature, entropy)


def rows_backward(kept, labels, temperature, lse, H, g_logp, g_H, dtype):
    """
    kept by rows_forward, lse and H of it, g_logp [n], g_H [n] or None
    -> dz [n, V] in dtype, and the factor of each row [n] that it lacks, or None
    """
    if fused(kept) and kept.dtype == torch.float32:
        return rows_backward_triton(kept, labels, temperature, lse, H, g_logp, g_H, dtype)
    return rows_backward_torch(kept, labels, temperature, H, g_logp, g_H, dtype)


def operands(h, weight):
    """-> both as the GEMMs take them: half precision only on a GPU and where both are of it"""
    if h.is_cuda and h.dtype == weight.dtype and h.dtype in (torch.bfloat16, torch.float16):
        return h, weight
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    return h.to(dtype), weight.to(dtype)


def mm(a, b):
    """a @ b, accumulated and on a GPU also returned in float32 for half-precision operands"""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype.itemsize > 2:
            return cpu.product(a, b.t())
        if not a.is_cuda:
            return torch.mm(a, b)
        return torch.mm(a, b, out_dtype=torch.float32)


def logits(h, w, absent, narrow=False):
    """
    -> h wᵀ [n, V], in it the columns of absent ids so low that their share is 0, and yet finite: 0
    times infinity is no number. narrow: h and w are float32 but hold bf16 numbers
    """
    with cpu.bf16_products(narrow):
        z = mm(h, w.T)
    return z if absent is None else z.index_fill_(1, absent, -1e20)


def chunks_kept(h):
    """-> how many chunks at the end keep what the backward pass needs of their logits: by default
    a quarter of a GiB on a CPU, where a product costs more than that"""
    return 1 if h.is_cuda else 4


def slices(h, weight, chunk):
    """-> the rows of each chunk"""
    N = len(h)
    if not chunk:
        chunk = max(1, (2**29 if h.is_cuda else 2**24) // len(weight))
    return [slice(start, min(start + chunk, N)) for start in range(0, N, chunk)]


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, labels, temperature, entropy, chunk, absent):
        a, w = operands(h, weight)
        dtype = torch.promote_types(a.dtype, torch.float32)
        logp, lse, H = (torch.empty(len(h), dtype=dtype, device=h.device) for _ in range(3))
        narrow = cpu.hold_bf16(h, weight)
        most = chunks_kept(h) if any(ctx.needs_input_grad) else 0
        kept = []
        for rows in slices(h, weight, chunk):
            if len(kept) == most:
                kept = kept[1:]      # before the next chunk's logits
            z = logits(a[rows], w, absent, narrow)
            logp[rows], lse[rows], H_rows, last = rows_forward(
                z, labels[rows], temperature, entropy)
            kept += [last] if most else []
            del z, last
            if entropy:
                H[rows] = H_rows

        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.absent = absent
        ctx.save_for_backward(h, weight, labels, lse, H, *kept)
        ctx.set_materialize_grads(False)   # an entropy that is only logged costs no backward pass
        return logp, (H if entropy else None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_H):
        h, weight, labels, lse, H, *kept = ctx.saved_tensors
        need_h, need_w, *_ = ctx.needs_input_grad
        a, w = operands(h, weight)
        g_logp = torch.zeros_like(lse) if g_logp is None else g_logp
        dh = torch.empty_like(h) if need_h else None
        dw = torch.zeros(weight.shape, dtype=lse.dtype, device=h.device) if need_w else None
        narrow = cpu.hold_bf16(h, weight)

        chunks = slices(h, weight, ctx.chunk)
        for i, rows in enumerate(chunks, len(kept) - len(chunks)):
            if i >= 0:
                part = kept[i]
            else:
                z = logits(a[rows], w, ctx.absent, narrow)
                *_, part = rows_forward(z, labels[rows], ctx.temperature, entropy=False)
            dz, scale = rows_backward(
                part, labels[rows], ctx.temperature, lse[rows], H[rows],
                g_logp[rows], None if g_H is None else g_H[rows], a.dtype)
            if need_h:
                dh_rows = mm(dz.bfloat16(), weight) if narrow else mm(dz, w)
                dh[rows] = dh_rows if scale is None else dh_rows * scale[:, None]
            if need_w:
                a_rows = a[rows] if scale is None else (a[rows] * scale[:, None]).to(a.dtype)
                with cpu.bf16_products(narrow):
                    add_product(dw, dz.T, a_rows)
        return dh, dw.to(weight.dtype) if need_w else None, None, None, None, None, None


def add_product(out, a, b):
    """out += a b, in place and in out's dtype"""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype.itemsize > 2:
            out.addmm_(a, b)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


# ---- what is compiled ahead of time ----

def compile_cases(sm, x):
    """Any vocabulary: its size is a number at run time."""
    rows = dict(z_ptr='*fp32', labels_ptr='*i64', lse_ptr='*fp32', H_ptr='*fp32',
                V='i32', inv_tau='fp32')
    forward = dict(rows, logp_ptr='*fp32')
    backward = dict(rows, g_logp_ptr='*fp32', g_H_ptr='*fp32', dz_ptr=x)
    yield 'rows forward', _forward, forward, dict(BLOCK=BLOCK), WARPS, 3, 0
    constexprs = dict(BLOCK=BLOCK, ENTROPY=True)
    yield 'rows backward', _backward, backward, constexprs, WARPS, 3, 0
