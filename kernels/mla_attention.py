"""
Causal attention inside documents for training: MLA's 192/128 head dims with the rope key shared by
all heads, and GQA. kernels/attention.py chooses between this and other ways.

    s_ij = scale (q_i·k_j + qr_i·kr_j)      for start_i <= j <= i, start_i the first token i sees
    p = softmax(s),  o_i = sum_j p_ij v_j,  lse_i = log sum_j exp(s_ij) is kept instead of p
    dv_j = sum_i p_ij do_i                  D_i = do_i·o_i
    ds_ij = scale p_ij (do_i·v_j - D_i)
    dq_i = sum_j ds_ij k_j,  dk_j = sum_i ds_ij q_i,  dkr_j = sum over heads too

Flash attention (arXiv:2205.14135, 2307.08691): a program holds a block of queries and walks over
the keys that at least one of them sees; blocks that every query sees in full skip the mask. Packed
rows cost what their documents cost: keys before the first document of a block of queries and
queries after the last document of a block of keys are never touched. 192 = 128 + 64 is no power of
two, so the part without rope and the rope part are two products into one sum, and the rope key is
read as one head.

The backward pass is two kernels without atomics, so that gradients are the same bits every time: dq
(and D), then dk and dv, whose program walks over all query heads of its key head; dkr is written
per key head in float32 and summed.

Float32 is computed without tensor cores. There a thread takes all columns of its rows, and rows
held over a loop fill its registers many times over: products over head dims read both sides anew,
CHUNK columns at a time.
"""
from __future__ import annotations

import inspect
import math

import torch
import torch.nn.functional as F

from kernels import cdiv, chip, jit, next_power_of_2, room, tl, working_dtype


def flash_attention(q, k, v, scale, bounds=None, q_rope=None, k_rope=None):
    """q [B, T, H, n], k [B, T, G, n], v [B, T, G, w], G dividing H; q_rope [B, T, H, r] and
    k_rope [B, T, r], or None -> [B, T, H, w]. All are taken in q's dtype, or autocast's.

    bounds: int32 [2, B, T], the first token that each token sees, and one past the last token that
    sees it, neither decreasing along a row; None: each sees all before it, and itself."""
    B, T, H, _ = q.shape
    if bounds is None:
        bounds = torch.zeros(2, B, T, dtype=torch.int32, device=q.device)
        bounds[1] = T
    if q_rope is None:      # of no width
        q_rope = q[..., :0]
        k_rope = k[:, :, 0, :0]
    dtype = working_dtype(q)
    tensors = [t.to(dtype) for t in (q, q_rope, k, k_rope, v)]
    return FlashAttention.apply(*tensors, bounds, scale)


def with_rope(q, k, q_rope, k_rope):
    """q and k of [B, T, H, n + r], the rope key repeated for every head"""
    k_rope = k_rope.unsqueeze(2).expand(-1, -1, k.shape[2], -1)
    return torch.cat([q, q_rope], dim=-1), torch.cat([k, k_rope], dim=-1)


def attention_torch(q, k, v, scale, visible=None):
    """q [B, H, T, n], k [B, G, L, n], v [B, G, L, w] -> [B, H, T, w]. visible [B or 1, 1, T, L]:
    True where a query sees a key, or what is added to its score; None: causal, T = L"""
    H, G = q.shape[1], k.shape[1]
    if q.is_cuda and visible is not None:    # the kernel that takes a mask has no groups, and
        k = k.repeat_interleave(H // G, 1)   # without that kernel all scores are kept
        v = v.repeat_interleave(H // G, 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale,
        enable_gqa=H != k.shape[1])


# ------------------------------------------------------------------------------------------
# Triton. Blocks of M queries and N keys; n, r, w: head dims without rope, of rope, of values,
# padded; D_n, D_r, D_w: the true ones. scale arrives times log2(e), for exp2; lse is to base 2 too.


@jit
def _tile(x, first, T, stride, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows first.. of a matrix [T, D], zeros outside"""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    x += tl.cast(first, tl.int64) * stride
    inside = (first + rows < T)[:, None] & (cols < D)[None, :]
    return tl.load(x + rows[:, None] * stride + cols[None, :], inside, other=0.0)


@jit
def _put(x, value, first, T, stride, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    x += tl.cast(first, tl.int64) * stride
    inside = (first + rows < T)[:, None] & (cols < D)[None, :]
    tl.store(x + rows[:, None] * stride + cols[None, :], value.to(x.dtype.element_ty), inside)


@jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision='ieee')    # float32 stays so; other types do not care


@jit
def _scores(a, b, x, i, x_t, y, j, y_t, T, D: tl.constexpr, CHUNK: tl.constexpr, acc):
    """acc + a bᵀ: rows i.. of x by rows j.. of y. With CHUNK both are read again, so many columns
    at a time, and a and b left alone."""
    if CHUNK:
        for d in range(0, D, CHUNK):
            rows = _tile(x + d, i, T, x_t, D - d, acc.shape[0], CHUNK)
            cols = _tile(y + d, j, T, y_t, D - d, acc.shape[1], CHUNK)
            acc = _dot(rows, tl.trans(cols), acc)
    else:
        acc = _dot(a, tl.trans(b), acc)
    return acc


@jit
def _forward(
    q, qr, k, kr, v, o, lse, start, T, H, scale,
    q_t, q_h, qr_t, qr_h, k_t, k_h, kr_t, v_t, v_h,
    GROUP: tl.constexpr, D_n: tl.constexpr, D_r: tl.constexpr, D_w: tl.constexpr,
    n: tl.constexpr, r: tl.constexpr, w: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M        # the longest walks first
    row = tl.program_id(1) // H * tl.cast(T, tl.int64)
    h = tl.program_id(1) % H
    q = q + row * q_t + h * q_h
    qr = qr + row * qr_t + h * qr_h
    k = k + row * k_t + h // GROUP * k_h
    kr = kr + row * kr_t
    v = v + row * v_t + h // GROUP * v_h

    queries = _tile(q, first, T, q_t, D_n, M, n)
    if D_r:
        ropes = _tile(qr, first, T, qr_t, D_r, M, r)
    i = first + tl.arange(0, M)
    starts = tl.load(start + row + i, i < T, other=0)
    last = tl.minimum(first + M, T) - 1

    # keys [lo, a) and [b, last] need the mask, [a, b) does not
    lo = tl.load(start + row + first) // N * N
    b = first // N * N
    a = tl.minimum((tl.load(start + row + last) + N - 1) // N * N, b)
    acc = tl.zeros([M, w], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], -1e30, tl.float32)
    for part in tl.static_range(3):
        begin = lo if part == 0 else (a if part == 1 else b)
        end = a if part == 0 else (b if part == 1 else last + 1)
        for j in range(begin, end, N):
            keys = _tile(k, j, T, k_t, D_n, N, n)
            s = tl.zeros([M, N], tl.float32)
            s = _scores(queries, keys, q, first, q_t, k, j, k_t, T, D_n, CHUNK, s)
            if D_r:
                key_ropes = _tile(kr, j, T, kr_t, D_r, N, r)
                s = _scores(ropes, key_ropes, qr, first, qr_t, kr, j, kr_t, T, D_r, CHUNK, s)
            s *= scale
            if part != 1:
                at = j + tl.arange(0, N)[None, :]
                seen = (at <= i[:, None]) & (at >= starts[:, None])
                s = tl.where(seen, s, -1e30)   # finite: a row that sees nothing yet is wiped later
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            old = tl.exp2(top - new)
            total = total * old + tl.sum(p, 1)
            top = new
            values = _tile(v, j, T, v_t, D_w, N, w)
            acc = _dot(p.to(values.dtype), values, acc * old[:, None])
    _put(o + (row * H + h) * D_w, acc / total[:, None], first, T, H * D_w, D_w, M, w)
    at_lse = tl.program_id(1) * tl.cast(T, tl.int64) + i
    tl.store(lse + at_lse, top + tl.log2(total), i < T)


@jit
def _backward_q(
    q, qr, k, kr, v, o, do, lse, D, dq, dqr, start, T, H, scale,
    q_t, q_h, qr_t, qr_h, k_t, k_h, kr_t, v_t, v_h, do_t, do_h,
    GROUP: tl.constexpr, D_n: tl.constexpr, D_r: tl.constexpr, D_w: tl.constexpr,
    n: tl.constexpr, r: tl.constexpr, w: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    row = tl.program_id(1) // H * tl.cast(T, tl.int64)
    h = tl.program_id(1) % H
    q += row * q_t + h * q_h
    qr += row * qr_t + h * qr_h
    k += row * k_t + h // GROUP * k_h
    kr += row * kr_t
    v += row * v_t + h // GROUP * v_h
    do += row * do_t + h * do_h

    queries = _tile(q, first, T, q_t, D_n, M, n)
    dq_acc = tl.zeros([M, n], tl.float32)
    if D_r:
        ropes = _tile(qr, first, T, qr_t, D_r, M, r)
        dqr_acc = tl.zeros([M, r], tl.float32)
    grad = _tile(do, first, T, do_t, D_w, M, w)
    i = first + tl.arange(0, M)
    at_lse = tl.program_id(1) * tl.cast(T, tl.int64) + i
    starts = tl.load(start + row + i, i < T, other=0)
    lses = tl.load(lse + at_lse, i < T, other=0.0)
    out = _tile(o + (row * H + h) * D_w, first, T, H * D_w, D_w, M, w)
    Ds = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(D + at_lse, Ds, i < T)
    last = tl.minimum(first + M, T) - 1
    lo = tl.load(start + row + first) // N * N      # three walks, as in the forward pass
    b = first // N * N
    a = tl.minimum((tl.load(start + row + last) + N - 1) // N * N, b)
    for part in tl.static_range(3):
        begin = lo if part == 0 else (a if part == 1 else b)
        end = a if part == 0 else (b if part == 1 else last + 1)
        for j in range(begin, end, N):
            keys = _tile(k, j, T, k_t, D_n, N, n)
            s = tl.zeros([M, N], tl.float32)
            s = _scores(queries, keys, q, first, q_t, k, j, k_t, T, D_n, CHUNK, s)
            if D_r:
                key_ropes = _tile(kr, j, T, kr_t, D_r, N, r)
                s = _scores(ropes, key_ropes, qr, first, qr_t, kr, j, kr_t, T, D_r, CHUNK, s)
            p = tl.exp2(s * scale - lses[:, None])
            if part != 1:
                at = j + tl.arange(0, N)[None, :]
                p = tl.where((at <= i[:, None]) & (at >= starts[:, None]), p, 0.0)
            values = _tile(v, j, T, v_t, D_w, N, w)
            dp = tl.zeros([M, N], tl.float32)
            dp = _scores(grad, values, do, first, do_t, v, j, v_t, T, D_w, CHUNK, dp)
            ds = (p * (dp - Ds[:, None])).to(keys.dtype)
            dq_acc = _dot(ds, keys, dq_acc)
            if D_r:
                dqr_acc = _dot(ds, key_ropes, dqr_acc)
    ln2 = 0.6931471805599453        # scale holds log2(e)
    _put(dq + (row * H + h) * D_n, dq_acc * (scale * ln2), first, T, H * D_n, D_n, M, n)
    if D_r:
        _put(dqr + (row * H + h) * D_r, dqr_acc * (scale * ln2), first, T, H * D_r, D_r, M, r)


@jit
def _backward_kv(
    q, qr, k, kr, v, do, lse, D, dk, dkr, dv, start, end, T, H, scale,
    q_t, q_h, qr_t, qr_h, k_t, k_h, kr_t, v_t, v_h, do_t, do_h,
    GROUP: tl.constexpr, D_n: tl.constexpr, D_r: tl.constexpr, D_w: tl.constexpr,
    n: tl.constexpr, r: tl.constexpr, w: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):
    first = tl.program_id(0) * N
    G = H // GROUP
    row = tl.program_id(1) // G * tl.cast(T, tl.int64)
    g = tl.program_id(1) % G
    k += row * k_t + g * k_h
    kr += row * kr_t
    v += row * v_t + g * v_h

    keys = _tile(k, first, T, k_t, D_n, N, n)
    values = _tile(v, first, T, v_t, D_w, N, w)
    dk_acc = tl.zeros([N, n], tl.float32)
    dv_acc = tl.zeros([N, w], tl.float32)
    if D_r:
        key_ropes = _tile(kr, first, T, kr_t, D_r, N, r)
        dkr_acc = tl.zeros([N, r], tl.float32)
    at = first + tl.arange(0, N)[:, None]
    hi = tl.load(end + row + tl.minimum(first + N, T) - 1)      # no later query sees these keys
    for h in range(g * GROUP, g * GROUP + GROUP):
        of_q = q + row * q_t + h * q_h
        of_qr = qr + row * qr_t + h * qr_h
        of_do = do + row * do_t + h * do_h
        for j in range(first // M * M, hi, M):
            i = j + tl.arange(0, M)
            at_lse = (row * H + h * tl.cast(T, tl.int64)) + i
            queries = _tile(of_q, j, T, q_t, D_n, M, n)
            s = tl.zeros([N, M], tl.float32)
            s = _scores(keys, queries, k, first, k_t, of_q, j, q_t, T, D_n, CHUNK, s)
            if D_r:
                ropes = _tile(of_qr, j, T, qr_t, D_r, M, r)
                s = _scores(key_ropes, ropes, kr, first, kr_t, of_qr, j, qr_t, T, D_r, CHUNK, s)
            p = tl.exp2(s * scale - tl.load(lse + at_lse, i < T, other=0.0)[None, :])
            starts = tl.load(start + row + i, i < T, other=T)
            p = tl.where((at <= i[None, :]) & (at >= starts[None, :]), p, 0.0)
            grad = _tile(of_do, j, T, do_t, D_w, M, w)
            dv_acc = _dot(p.to(grad.dtype), grad, dv_acc)
            dp = tl.zeros([N, M], tl.float32)
            dp = _scores(values, grad, v, first, v_t, of_do, j, do_t, T, D_w, CHUNK, dp)
            ds = p * (dp - tl.load(D + at_lse, i < T, other=0.0)[None, :])
            ds = ds.to(queries.dtype)
            dk_acc = _dot(ds, queries, dk_acc)
            if D_r:
                dkr_acc = _dot(ds, ropes, dkr_acc)
    ln2 = 0.6931471805599453        # scale holds log2(e)
    _put(dk + (row * G + g) * D_n, dk_acc * (scale * ln2), first, T, G * D_n, D_n, N, n)
    _put(dv + (row * G + g) * D_w, dv_acc, first, T, G * D_w, D_w, N, w)
    if D_r:
        _put(dkr + (row * G + g) * D_r, dkr_acc * (scale * ln2), first, T, G * D_r, D_r, N, r)


# ------------------------------------------------------------------------------------------
# autograd

# M queries, N keys, warps, stages: in half precision on chips of 99 KiB, on sm_80, on later ones;
# in float32
BLOCKS = {
    'forward': ((128, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 8, 1)),
    'q': ((128, 16, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
    'kv': ((16, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2), (16, 32, 8, 1)),
}


def sizes(kernel, sm, itemsize, n, r, w):
    """-> constexprs and launch options"""
    if itemsize > 2:
        which = 3
    elif room(sm) < 100:
        which = 0
    else:
        which = 2 if sm >= 90 else 1
    M, N, warps, stages = BLOCKS[kernel][which]
    pads = [max(16, next_power_of_2(d)) if d else 0 for d in (n, r, w)]
    dims = dict(D_n=n, D_r=r, D_w=w, n=pads[0], r=pads[1], w=pads[2])
    dims.update(M=M, N=N, CHUNK=16 if itemsize > 2 else 0)
    return dims, dict(num_warps=warps, num_stages=stages)


def even(x):
    """x [B, T, ...] as the kernels take it: numbers of a head side by side, rows of the batch T
    tokens apart"""
    if x.stride(-1) == 1 and (len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1)):
        return x
    return x.contiguous()


def strides(q, qr, k, kr, v):
    """Of tokens and heads, in the order of the kernels' arguments"""
    return *q.stride()[1:3], *qr.stride()[1:3], *k.stride()[1:3], kr.stride(1), *v.stride()[1:3]


class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, qr, k, kr, v, bounds, scale):
        q, qr, k, kr, v = map(even, (q, qr, k, kr, v))
        B, T, H, n = q.shape
        r, w = qr.shape[-1], v.shape[-1]
        o = q.new_empty(B, T, H, w)
        lse = torch.empty(B * H, T, dtype=torch.float32, device=q.device)
        ctx.scale = scale / math.log(2)
        ctx.group = H // k.shape[2]
        ctx.save_for_backward(q, qr, k, kr, v, bounds, o, lse)
        if o.numel():
            dims, options = sizes('forward', chip(q.device), q.itemsize, n, r, w)
            grid = cdiv(T, dims['M']), B * H
            _forward[grid](
                q, qr, k, kr, v, o, lse, bounds[0], T, H, ctx.scale, *strides(q, qr, k, kr, v),
                GROUP=ctx.group, **dims, **options)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, qr, k, kr, v, bounds, o, lse = ctx.saved_tensors
        start, end = bounds
        do = even(do)
        B, T, H, n = q.shape
        G, r, w = k.shape[2], qr.shape[-1], v.shape[-1]
        dq, dqr, dk, dv = (
            torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, qr, k, v))
        dkr = torch.empty(B, T, G, r, dtype=torch.float32, device=q.device)
        D = torch.empty_like(lse)
        at = *strides(q, qr, k, kr, v), *do.stride()[1:3]
        if do.numel():
            dims, options = sizes('q', chip(q.device), q.itemsize, n, r, w)
            grid = cdiv(T, dims['M']), B * H
            _backward_q[grid](
                q, qr, k, kr, v, o, do, lse, D, dq, dqr, start, T, H, ctx.scale, *at,
                GROUP=ctx.group, **dims, **options)
            dims, options = sizes('kv', chip(q.device), q.itemsize, n, r, w)
            grid = cdiv(T, dims['N']), B * G
            _backward_kv[grid](
                q, qr, k, kr, v, do, lse, D, dk, dkr, dv, start, end, T, H, ctx.scale, *at,
                GROUP=ctx.group, **dims, **options)
        return dq, dqr, dk, dkr.sum(2).to(kr.dtype), dv, None, None


# ------------------------------------------------------------------------------------------
# compiled without a GPU, see tools/aot.py


def compile_cases(sm, x):
    """V3's MLA and a 1.5B model's 12 query, 2 key heads"""
    types = dict.fromkeys('q qr k kr v o do dq dqr dk dv'.split(), x)
    types |= dict.fromkeys(('lse', 'D', 'dkr'), '*fp32')
    types |= dict.fromkeys(('start', 'end'), '*i32')
    types |= dict(T='i32', H='i32', scale='fp32')
    types |= dict.fromkeys('q_t q_h qr_t qr_h k_t k_h kr_t v_t v_h do_t do_h'.split(), 'i32:16')
    itemsize = 2 if x == '*bf16' else 4
    kernels = {'forward': _forward, 'q': _backward_q, 'kv': _backward_kv}
    for shape, group, widths in (('192/128', 1, (128, 64, 128)), ('GQA 128', 6, (128, 0, 128))):
        for kind, kernel in kernels.items():
            name = f'{kind} {shape}' if kind == 'forward' else f'backward {kind} {shape}'
            constants, options = sizes(kind, sm, itemsize, *widths)
            arguments = inspect.signature(kernel.fn).parameters
            signature = {a: types[a] for a in arguments if a in types}
            constants['GROUP'] = group
            yield name, kernel, signature, constants, *options.values(), spills(kind, sm, x)


def spills(kind, sm, x):
    """The number of spill instructions tolerated"""
    if sm == 90:
        return 3 if x == '*fp32' else 0
    if sm == 100:
        return 96 if kind == 'kv' else 11 if x == '*fp32' else 0
    return 32
