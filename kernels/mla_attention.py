"""
Causal attention inside documents for training: MLA's 192/128 head dims with the rope key shared by all heads, and GQA.

    s_ij = scale (q_i·k_j + qr_i·kr_j)          for start_i <= j <= i, start_i being where i's document begins in the row
    p = softmax(s),  o_i = sum_j p_ij v_j,      lse_i = log sum_j exp(s_ij) is kept instead of p
    dv_j = sum_i p_ij do_i                      D_i = do_i·o_i
    ds_ij = scale p_ij (do_i·v_j - D_i),  dq_i = sum_j ds_ij k_j,  dk_j = sum_i ds_ij q_i,  dkr_j = sum over heads too

Flash attention (arXiv:2205.14135, 2307.08691): a program holds a block of queries and walks over the keys that at least one of them
sees; blocks that every query sees in full skip the mask. Packed rows cost what their documents cost: keys before the first
document of a block of queries and queries after the last document of a block of keys are never touched. 192 = 128 + 64 is no power of
two, so the part without rope and the rope part are two products into one sum, and the rope key is read as one head.
The backward pass is two kernels without atomics, so that gradients are the same bits every time: dq (and D), then dk and dv, whose
program walks over all query heads of its key head; dkr is written per key head in float32 and summed.
Float32 is computed without tensor cores. There a thread takes all columns of its rows, and rows held over a loop fill its registers
many times over: products over head dims read both sides anew, CHUNK columns at a time.
"""
from __future__ import annotations

import inspect
import math

import torch
import torch.nn.functional as F

from kernels import cdiv, chip, fused, jit, next_power_of_2, room, tl, working_dtype


def attention(q, k, v, scale, mask=None, q_rope=None, k_rope=None):
    """q [B, T, H, n], k [B, T, G, n], v [B, T, G, w], G dividing H; q_rope [B, T, H, r] and k_rope [B, T, r] or None -> [B, T, H, w].
    mask: None (causal) or what document_mask gave. All are taken in q's dtype, or autocast's."""
    if q.shape[2] % k.shape[2] or v.shape[:3] != k.shape[:3] or q.shape[:2] != k.shape[:2] or (q_rope is None) != (k_rope is None):
        raise ValueError(f'attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: want [B, T, H, n], [B, T, G, n], [B, T, G, w] '
                         'with G dividing H, and a rope part of both q and k or of neither')
    if not fused(q):
        return reference(q, k, v, scale, mask, q_rope, k_rope)
    dtype = working_dtype(q)
    if mask is None:
        mask = torch.zeros(2, *q.shape[:2], dtype=torch.int32, device=q.device)
        mask[1] = q.shape[1]
    ropes = (q_rope, k_rope) if q_rope is not None else (q[..., :0], k[:, :, 0, :0])
    return Attention.apply(*(t.to(dtype) for t in (q, ropes[0], k, ropes[1], v)), mask, scale)


def document_mask(doc_ids_BT):
    """doc_ids [B, T], equal inside a document and different from its neighbours' -> what attention() takes, once for all layers:
    bool [B, 1, T, T], True where visible; on the Triton path int32 [2, B, T], where each token's document starts and ends."""
    T, device = doc_ids_BT.shape[1], doc_ids_BT.device
    if not fused(doc_ids_BT):
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        return (causal & (doc_ids_BT.unsqueeze(2) == doc_ids_BT.unsqueeze(1))).unsqueeze(1)
    at, edge = torch.arange(T, dtype=torch.int32, device=device), doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    start = torch.where(F.pad(edge, (1, 0)), at, 0).cummax(1).values
    end = torch.where(F.pad(edge, (0, 1), value=True), at + 1, T).flip(1).cummin(1).values.flip(1)
    return torch.stack([start, end]).contiguous()


def reference(q, k, v, scale, mask=None, q_rope=None, k_rope=None):
    if q_rope is not None:
        q = torch.cat([q, q_rope], dim=-1)
        k = torch.cat([k, k_rope.unsqueeze(2).expand(-1, -1, k.shape[2], -1)], dim=-1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                          # [B, H, T, ·]
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Triton. Blocks of M queries and N keys; n, r, w: head dims without rope, of rope, of values, padded; D_n, D_r, D_w: the true ones.
# scale arrives times log2(e), for exp2; lse is kept to base 2 too.


@jit
def _tile(x, first, T, stride, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows first.. of a matrix [T, D], zeros outside"""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    x += tl.cast(first, tl.int64) * stride
    return tl.load(x + rows[:, None] * stride + cols[None, :], (first + rows < T)[:, None] & (cols < D)[None, :], other=0.0)


@jit
def _put(x, value, first, T, stride, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    x += tl.cast(first, tl.int64) * stride
    tl.store(x + rows[:, None] * stride + cols[None, :], value.to(x.dtype.element_ty), (first + rows < T)[:, None] & (cols < D)[None, :])


@jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision='ieee')          # float32 stays float32; other types do not care


@jit
def _scores(a, b, x, i, x_t, y, j, y_t, T, D: tl.constexpr, CHUNK: tl.constexpr, acc):
    """acc + a bᵀ: rows i.. of x by rows j.. of y. With CHUNK both are read again, so many columns at a time, and a and b left alone."""
    if CHUNK:
        for d in range(0, D, CHUNK):
            part = _tile(x + d, i, T, x_t, D - d, acc.shape[0], CHUNK)
            acc = _dot(part, tl.trans(_tile(y + d, j, T, y_t, D - d, acc.shape[1], CHUNK)), acc)
    else:
        acc = _dot(a, tl.trans(b), acc)
    return acc


@jit
def _forward(q, qr, k, kr, v, o, lse, start, T, H, scale, q_t, q_h, qr_t, qr_h, k_t, k_h, kr_t, v_t, v_h, GROUP: tl.constexpr,
             D_n: tl.constexpr, D_r: tl.constexpr, D_w: tl.constexpr, n: tl.constexpr, r: tl.constexpr, w: tl.constexpr,
             M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M                # the longest walks first
    row, h = tl.program_id(1) // H * tl.cast(T, tl.int64), tl.program_id(1) % H
    k, kr, v = k + row * k_t + h // GROUP * k_h, kr + row * kr_t, v + row * v_t + h // GROUP * v_h
    q, qr = q + row * q_t + h * q_h, qr + row * qr_t + h * qr_h
    queries = _tile(q, first, T, q_t, D_n, M, n)
    if D_r:
        ropes = _tile(qr, first, T, qr_t, D_r, M, r)
    i = first + tl.arange(0, M)
    starts = tl.load(start + row + i, i < T, other=0)
    last = tl.minimum(first + M, T) - 1
    lo, b = tl.load(start + row + first) // N * N, first // N * N          # keys [lo, a) and [b, last] need the mask, [a, b) does not
    a = tl.minimum((tl.load(start + row + last) + N - 1) // N * N, b)
    acc, total, top = tl.zeros([M, w], tl.float32), tl.zeros([M], tl.float32), tl.full([M], -1e30, tl.float32)
    for part in tl.static_range(3):
        for j in range(lo if part == 0 else (a if part == 1 else b), a if part == 0 else (b if part == 1 else last + 1), N):
            s = _scores(queries, _tile(k, j, T, k_t, D_n, N, n), q, first, q_t, k, j, k_t, T, D_n, CHUNK, tl.zeros([M, N], tl.float32))
            if D_r:
                s = _scores(ropes, _tile(kr, j, T, kr_t, D_r, N, r), qr, first, qr_t, kr, j, kr_t, T, D_r, CHUNK, s)
            s *= scale
            if part != 1:
                at = j + tl.arange(0, N)[None, :]
                s = tl.where((at <= i[:, None]) & (at >= starts[:, None]), s, -1e30)   # finite: a row that sees nothing yet is wiped out later
            new = tl.maximum(top, tl.max(s, 1))
            p, old = tl.exp2(s - new[:, None]), tl.exp2(top - new)
            total, top = total * old + tl.sum(p, 1), new
            value = _tile(v, j, T, v_t, D_w, N, w)
            acc = _dot(p.to(value.dtype), value, acc * old[:, None])
    _put(o + (row * H + h) * D_w, acc / total[:, None], first, T, H * D_w, D_w, M, w)
    tl.store(lse + tl.program_id(1) * tl.cast(T, tl.int64) + i, top + tl.log2(total), i < T)


@jit
def _backward_q(q, qr, k, kr, v, o, do, lse, D, dq, dqr, start, T, H, scale, q_t, q_h, qr_t, qr_h, k_t, k_h, kr_t, v_t, v_h, do_t, do_h,
                GROUP: tl.constexpr, D_n: tl.constexpr, D_r: tl.constexpr, D_w: tl.constexpr, n: tl.constexpr, r: tl.constexpr,
                w: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    row, h = tl.program_id(1) // H * tl.cast(T, tl.int64), tl.program_id(1) % H
    k, kr, v = k + row * k_t + h // GROUP * k_h, kr + row * kr_t, v + row * v_t + h // GROUP * v_h
    q, qr, do = q + row * q_t + h * q_h, qr + row * qr_t + h * qr_h, do + row * do_t + h * do_h
    queries = _tile(q, first, T, q_t, D_n, M, n)
    dq_acc = tl.zeros([M, n], tl.float32)
    if D_r:
        ropes = _tile(qr, first, T, qr_t, D_r, M, r)
        dqr_acc = tl.zeros([M, r], tl.float32)
    grad = _tile(do, first, T, do_t, D_w, M, w)
    i = first + tl.arange(0, M)
    at_lse = tl.program_id(1) * tl.cast(T, tl.int64) + i
    starts, lses = tl.load(start + row + i, i < T, other=0), tl.load(lse + at_lse, i < T, other=0.0)
    out = _tile(o + (row * H + h) * D_w, first, T, H * D_w, D_w, M, w)
    Ds = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(D + at_lse, Ds, i < T)
    last = tl.minimum(first + M, T) - 1
    lo, b = tl.load(start + row + first) // N * N, first // N * N
    a = tl.minimum((tl.load(start + row + last) + N - 1) // N * N, b)
    for part in tl.static_range(3):
        for j in range(lo if part == 0 else (a if part == 1 else b), a if part == 0 else (b if part == 1 else last + 1), N):
            key = _tile(k, j, T, k_t, D_n, N, n)
            s = _scores(queries, key, q, first, q_t, k, j, k_t, T, D_n, CHUNK, tl.zeros([M, N], tl.float32))
            if D_r:
                rope = _tile(kr, j, T, kr_t, D_r, N, r)
                s = _scores(ropes, rope, qr, first, qr_t, kr, j, kr_t, T, D_r, CHUNK, s)
            p = tl.exp2(s * scale - lses[:, None])
            if part != 1:
                at = j + tl.arange(0, N)[None, :]
                p = tl.where((at <= i[:, None]) & (at >= starts[:, None]), p, 0.0)
            dp = _scores(grad, _tile(v, j, T, v_t, D_w, N, w), do, first, do_t, v, j, v_t, T, D_w, CHUNK, tl.zeros([M, N], tl.float32))
            ds = (p * (dp - Ds[:, None])).to(key.dtype)
            dq_acc = _dot(ds, key, dq_acc)
            if D_r:
                dqr_acc = _dot(ds, rope, dqr_acc)
    _put(dq + (row * H + h) * D_n, dq_acc * (scale * 0.6931471805599453), first, T, H * D_n, D_n, M, n)     # scale holds log2(e)
    if D_r:
        _put(dqr + (row * H + h) * D_r, dqr_acc * (scale * 0.6931471805599453), first, T, H * D_r, D_r, M, r)


@jit
def _backward_kv(q, qr, k, kr, v, do, lse, D, dk, dkr, dv, start, end, T, H, scale, q_t, q_h, qr_t, qr_h, k_t, k_h, kr_t, v_t, v_h, do_t,
                 do_h, GROUP: tl.constexpr, D_n: tl.constexpr, D_r: tl.constexpr, D_w: tl.constexpr, n: tl.constexpr, r: tl.constexpr,
                 w: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr):
    first = tl.program_id(0) * N
    G = H // GROUP
    row, g = tl.program_id(1) // G * tl.cast(T, tl.int64), tl.program_id(1) % G
    k, kr, v = k + row * k_t + g * k_h, kr + row * kr_t, v + row * v_t + g * v_h
    key, value = _tile(k, first, T, k_t, D_n, N, n), _tile(v, first, T, v_t, D_w, N, w)
    dk_acc, dv_acc = tl.zeros([N, n], tl.float32), tl.zeros([N, w], tl.float32)
    if D_r:
        rope, dkr_acc = _tile(kr, first, T, kr_t, D_r, N, r), tl.zeros([N, r], tl.float32)
    at = first + tl.arange(0, N)[:, None]
    hi = tl.load(end + row + tl.minimum(first + N, T) - 1)                 # no later query sees any of these keys
    for h in range(g * GROUP, g * GROUP + GROUP):
        of_q, of_qr, of_do = q + row * q_t + h * q_h, qr + row * qr_t + h * qr_h, do + row * do_t + h * do_h
        for j in range(first // M * M, hi, M):
            i = j + tl.arange(0, M)
            at_lse = (row * H + h * tl.cast(T, tl.int64)) + i
            queries = _tile(of_q, j, T, q_t, D_n, M, n)
            s = _scores(key, queries, k, first, k_t, of_q, j, q_t, T, D_n, CHUNK, tl.zeros([N, M], tl.float32))
            if D_r:
                ropes = _tile(of_qr, j, T, qr_t, D_r, M, r)
                s = _scores(rope, ropes, kr, first, kr_t, of_qr, j, qr_t, T, D_r, CHUNK, s)
            p = tl.exp2(s * scale - tl.load(lse + at_lse, i < T, other=0.0)[None, :])
            p = tl.where((at <= i[None, :]) & (at >= tl.load(start + row + i, i < T, other=T)[None, :]), p, 0.0)
            grad = _tile(of_do, j, T, do_t, D_w, M, w)
            dv_acc = _dot(p.to(grad.dtype), grad, dv_acc)
            dp = _scores(value, grad, v, first, v_t, of_do, j, do_t, T, D_w, CHUNK, tl.zeros([N, M], tl.float32))
            ds = (p * (dp - tl.load(D + at_lse, i < T, other=0.0)[None, :])).to(queries.dtype)
            dk_acc = _dot(ds, queries, dk_acc)
            if D_r:
                dkr_acc = _dot(ds, ropes, dkr_acc)
    _put(dk + (row * G + g) * D_n, dk_acc * (scale * 0.6931471805599453), first, T, G * D_n, D_n, N, n)
    _put(dv + (row * G + g) * D_w, dv_acc, first, T, G * D_w, D_w, N, w)
    if D_r:
        _put(dkr + (row * G + g) * D_r, dkr_acc * (scale * 0.6931471805599453), first, T, G * D_r, D_r, N, r)


# ---------------------------------------------------------------------------------------------------------------------
# autograd

# M queries, N keys, warps, stages: half precision on chips of 99 KiB, on sm_80 and on later ones; float32
BLOCKS = {'forward': ((128, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 8, 1)),
          'q': ((128, 16, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
          'kv': ((16, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 2), (16, 32, 8, 1))}


def sizes(kernel, sm, itemsize, n, r, w):
    M, N, warps, stages = BLOCKS[kernel][3 if itemsize > 2 else 0 if room(sm) < 100 else 1 + (sm >= 90)]
    pad = [max(16, next_power_of_2(d)) if d else 0 for d in (n, r, w)]
    return dict(D_n=n, D_r=r, D_w=w, n=pad[0], r=pad[1], w=pad[2], M=M, N=N, CHUNK=16 if itemsize > 2 else 0), \
        dict(num_warps=warps, num_stages=stages)


def even(x):
    """x [B, T, ...] as the kernels take it: numbers of a head side by side, rows of the batch T tokens apart"""
    return x if x.stride(-1) == 1 and (len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1)) else x.contiguous()


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, qr, k, kr, v, bounds, scale):
        q, qr, k, kr, v = map(even, (q, qr, k, kr, v))
        (B, T, H, n), r, w = q.shape, qr.shape[-1], v.shape[-1]
        o, lse = q.new_empty(B, T, H, w), torch.empty(B * H, T, dtype=torch.float32, device=q.device)
        dims, options = sizes('forward', chip(q.device), q.itemsize, n, r, w)
        ctx.scale, ctx.group = scale / math.log(2), H // k.shape[2]
        ctx.save_for_backward(q, qr, k, kr, v, bounds, o, lse)
        if o.numel():
            _forward[(cdiv(T, dims['M']), B * H)](q, qr, k, kr, v, o, lse, bounds[0], T, H, ctx.scale, *strides(q, qr, k, kr, v),
                                                  GROUP=ctx.group, **dims, **options)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, qr, k, kr, v, bounds, o, lse = ctx.saved_tensors
        do = even(do)
        (B, T, H, n), r, w, G = q.shape, qr.shape[-1], v.shape[-1], k.shape[2]
        dq, dqr, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, qr, k, v))
        dkr, D = torch.empty(B, T, G, r, dtype=torch.float32, device=q.device), torch.empty_like(lse)
        at = *strides(q, qr, k, kr, v), do.stride(1), do.stride(2)
        if do.numel():
            dims, options = sizes('q', chip(q.device), q.itemsize, n, r, w)
            _backward_q[(cdiv(T, dims['M']), B * H)](q, qr, k, kr, v, o, do, lse, D, dq, dqr, bounds[0], T, H, ctx.scale, *at, GROUP=ctx.group,
                                                     **dims, **options)
            dims, options = sizes('kv', chip(q.device), q.itemsize, n, r, w)
            _backward_kv[(cdiv(T, dims['N']), B * G)](q, qr, k, kr, v, do, lse, D, dk, dkr, dv, bounds[0], bounds[1], T, H, ctx.scale, *at,
                                                      GROUP=ctx.group, **dims, **options)
        return dq, dqr, dk, dkr.sum(2).to(kr.dtype), dv, None, None


def strides(q, qr, k, kr, v):
    return *q.stride()[1:3], *qr.stride()[1:3], *k.stride()[1:3], kr.stride(1), *v.stride()[1:3]


def compile_cases(sm, x):
    """V3's MLA and a 1.5B model's 12 query, 2 key heads"""
    pointers = dict.fromkeys('q qr k kr v o do dq dqr dk dv'.split(), x) | dict.fromkeys(('lse', 'D', 'dkr'), '*fp32') \
        | dict.fromkeys(('start', 'end'), '*i32')
    types = pointers | dict(T='i32', H='i32', scale='fp32') | dict.fromkeys('q_t q_h qr_t qr_h k_t k_h kr_t v_t v_h do_t do_h'.split(), 'i32:16')
    for name, group, dims in (('192/128', 1, (128, 64, 128)), ('GQA 128', 6, (128, 0, 128))):
        for kind, kernel in (('forward', _forward), ('q', _backward_q), ('kv', _backward_kv)):
            constants, options = sizes(kind, sm, 2 if x == '*bf16' else 4, *dims)
            signature = {a: types[a] for a in inspect.signature(kernel.fn).parameters if a in types}
            yield (f'{kind if kind == "forward" else "backward " + kind} {name}', kernel, signature, {**constants, 'GROUP': group},
                   *options.values(), {90: 3 if x == '*fp32' else 0, 100: 96 if kind == 'kv' else 11 if x == '*fp32' else 0}.get(sm, 32))
