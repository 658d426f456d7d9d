"""
The routed experts: grouped matrix products with the gather, SwiGLU and the weights fused in.

    y_n = Σ_k w_nk D_e (silu(G_e x_n) ⊙ U_e x_n),   e = chosen_nk

N tokens of C numbers, K experts a token, E experts of width I; the matrices are stacked,
W = [G; U] is [E, 2I, C] and D is [E, C, I].

Slots (n, k) are sorted by expert (kernels/router.py). A tile of BM sorted slots belongs to one
expert; the grid holds as many tiles as there could be, and each program looks up its own on the
GPU, so that the host never waits for counts.

    forward     [g | u] = x_n Wᵀ, h = silu(g) ⊙ u       _gate_up, x gathered while it is loaded
                v = h Dᵀ                                _grouped_product
                y_n = Σ_k w_nk v_nk                     _combine
    backward    p = dy_n D                              _grouped_product, dy gathered
                dw = p·h,  dh = w p,  dg = dh ⊙ u ⊙ σ(g)(1 + g(1 − σ(g))),
                du = dh ⊙ silu(g),  and w h again       in its epilogue, _swiglu_backward
                dx_n = Σ_k [dg | du] W                  _grouped_product, _combine
                dW_e = Σ [dg | du]ᵀ x_n                 _matrix_gradient
                dD_e = Σ dy_nᵀ (w h)                    _matrix_gradient

dw needs no y: dy·(D h) = (Dᵀ dy)·h. Kept for the backward: x and [g | u] (SonicMoE,
arXiv:2512.14080), 2I numbers a slot. No atomics: the same bits every time. An expert without tokens
has no tiles, and zero gradients.

Bound by the products, 6 N K C I operations forward and 12 N K C I backward, where experts have
hundreds of tokens; with fewer by the matrices, 3 E C I numbers, read once forward, and backward
read once and their gradients written once.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import cdiv, cpu, fused, jit, next_power_of_2, precision, tl
from kernels.router import by_expert
from kernels.swiglu import swiglu_torch


def experts(x, gate_up, down, weights, chosen):
    """
    x [N, C], gate_up [E, 2I, C] and down [E, C, I] of one dtype, weights [N, K] float32,
    chosen [N, K] int64 -> [N, C]
    """
    if fused(x):
        return TritonExperts.apply(x, gate_up, down, weights, chosen)
    if cpu.trains(x):
        return cpu.experts(x, gate_up, down, weights, chosen)
    return experts_torch(x, gate_up, down, weights, chosen)


# ---- plain PyTorch ----

def experts_torch(x, gate_up, down, weights, chosen):
    N, K = chosen.shape
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(len(down), dtype=torch.int32, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)

    x_sorted = x.index_select(0, order // K)
    gate, up = F.grouped_mm(x_sorted, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    v = F.grouped_mm(swiglu_torch(gate, up), down.transpose(1, 2), offs=ends)

    places = torch.arange(N * K, device=order.device)
    place = torch.empty_like(order).scatter_(0, order, places)
    return cpu.combine(v, place.view(N, K), weights)


# ---- Triton ----

@jit
def _locate(
    ends_ptr, tile_ends_ptr, tiles_n,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr,
):
    """
    -> the program's expert (E: there is no such tile), the first row of its tile, the end of the
    expert's rows, its tile of columns. Eight row tiles share a column of weights in L2.
    """
    pid = tl.program_id(0)
    tiles_m = tl.num_programs(0) // tiles_n
    group = pid // (8 * tiles_n)
    height = tl.minimum(tiles_m - group * 8, 8)
    tile_m = group * 8 + (pid % (8 * tiles_n)) % height
    tile_n = (pid % (8 * tiles_n)) // height

    e = tl.arange(0, BLOCK_E)
    before = tl.load(tile_ends_ptr + 1 + e, e < E, other=2**31 - 1) <= tile_m
    expert = tl.sum(before.to(tl.int32), 0)
    mine = tl.minimum(expert, E - 1)
    first = tl.load(ends_ptr + mine) + (tile_m - tl.load(tile_ends_ptr + mine)) * BM
    end = tl.load(ends_ptr + mine + 1)
    return expert, first, end, tile_n


@jit
def _gate_up(
    x_ptr, w_ptr, order_ptr, ends_ptr, tile_ends_ptr, gu_ptr, h_ptr,
    tiles_n,
    C: tl.constexpr, I: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TF: tl.constexpr,
):
    """
    [g | u] = x_n Wᵀ and h = silu(g) ⊙ u; a program takes a tile of slots and BN columns of each.

    reads     x [N, C], W = [G; U] [E, 2I, C]; order, ends, tile_ends int32
    writes    gu [N K, 2I], h [N K, I], by expert
    bound     the products: 4 N K C I operations
    """
    expert, first, end, tile_n = _locate(ends_ptr, tile_ends_ptr, tiles_n, E, BLOCK_E, BM)
    if expert >= E:
        return
    i = tl.arange(0, BM)[:, None]
    start = first.to(tl.int64)
    rows = first + tl.arange(0, BM)
    cols = tile_n * BN + tl.arange(0, BN)
    cs = tl.arange(0, BK)
    token = (tl.load(order_ptr + rows, rows < end, other=0) // K).to(tl.int64)

    x_at = x_ptr + token[:, None] * C + cs[None, :]
    w_at = w_ptr + expert.to(tl.int64) * 2 * I * C + cols[None, :] * C + cs[:, None]
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for c in range(0, C, BK):
        x = tl.load(x_at + c, (rows < end)[:, None] & (cs < C - c)[None, :], other=0.0)
        w_mask = (cols < I)[None, :] & (cs < C - c)[:, None]
        gate = tl.dot(x, tl.load(w_at + c, w_mask, other=0.0), gate, input_precision=TF)
        up = tl.dot(x, tl.load(w_at + I * C + c, w_mask, other=0.0), up, input_precision=TF)

    mask = (rows < end)[:, None] & (cols < I)[None, :]
    gu_at = gu_ptr + start * 2 * I + (i * 2 * I + cols[None, :])
    tl.store(gu_at, gate.to(gu_ptr.dtype.element_ty), mask)
    tl.store(gu_at + I, up.to(gu_ptr.dtype.element_ty), mask)
    h = gate * tl.sigmoid(gate) * up
    tl.store(h_ptr + start * I + (i * I + cols[None, :]), h.to(h_ptr.dtype.element_ty), mask)


@jit
def _grouped_product(
    a_ptr, w_ptr, order_ptr, ends_ptr, tile_ends_ptr, out_ptr,
    gu_ptr, weights_ptr, dgu_ptr, dw_ptr,
    tiles_n,
    N: tl.constexpr, D: tl.constexpr, stride_wn: tl.constexpr, stride_wd: tl.constexpr,
    GATHER: tl.constexpr, SWIGLU: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TF: tl.constexpr,
):
    """
    out[row, n] = Σ_d a[row, d] w[e, n, d]; with GATHER a has a row a token, not a slot. With SWIGLU
    what is stored is not the sum but what _swiglu_backward makes of it.

    reads     a [N K or N, D]; w [E, N, D], of strides N D, stride_wn, stride_wd; the int32 tables;
              with SWIGLU gu [N K, 2N], weights [N K] float32
    writes    out [N K, N]; with SWIGLU dgu [N K, 2N], dw [N K, tiles_n] float32
    bound     the product: 2 N K × N × D operations
    """
    expert, first, end, tile_n = _locate(ends_ptr, tile_ends_ptr, tiles_n, E, BLOCK_E, BM)
    if expert >= E:
        return
    i = tl.arange(0, BM)[:, None]
    start = first.to(tl.int64)
    rows = first + tl.arange(0, BM)
    cols = tile_n * BN + tl.arange(0, BN)
    ds = tl.arange(0, BK)
    slot = tl.load(order_ptr + rows, rows < end, other=0)
    if GATHER:
        source = (slot // K).to(tl.int64)
    else:
        source = tl.where(rows < end, rows, 0).to(tl.int64)

    a_ptr += source[:, None] * D + ds[None, :]
    w_at = w_ptr + expert.to(tl.int64) * N * D + cols[None, :] * stride_wn + ds[:, None] * stride_wd
    acc = tl.zeros([BM, BN], tl.float32)
    for d in range(0, D, BK):
        a = tl.load(a_ptr + d, (rows < end)[:, None] & (ds < D - d)[None, :], other=0.0)
        w_mask = (cols < N)[None, :] & (ds < D - d)[:, None]
        w = tl.load(w_at + d * stride_wd, w_mask, other=0.0)
        acc = tl.dot(a, w, acc, input_precision=TF)

    mask = (rows < end)[:, None] & (cols < N)[None, :]
    if SWIGLU:
        acc = _swiglu_backward(
            acc, slot, rows, end, mask, gu_ptr + start * 2 * N, weights_ptr,
            dgu_ptr + start * 2 * N, dw_ptr, i * 2 * N + cols[None, :], tile_n, tiles_n, N)
    out_at = out_ptr + start * N + (i * N + cols[None, :])
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask)


@jit
def _swiglu_backward(
    p, slot, rows, end, mask, gu_ptr, weights_ptr, dgu_ptr, dw_ptr, at, tile_n, tiles_n,
    I: tl.constexpr,
):
    """p = dy D of a tile -> w h of it; stores [dg | du], and p·h of these columns for dw"""
    g = tl.load(gu_ptr + at, mask, other=0.0).to(tl.float32)
    u = tl.load(gu_ptr + I + at, mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    weight = tl.load(weights_ptr + slot, rows < end, other=0.0)[:, None]
    dw_at = dw_ptr + rows.to(tl.int64) * tiles_n + tile_n
    tl.store(dw_at, tl.sum(p * g * s * u, 1), rows < end)
    dh = p * weight
    dg = dh * u * s * (1 + g * (1 - s))
    tl.store(dgu_ptr + at, dg.to(dgu_ptr.dtype.element_ty), mask)
    du = dh * g * s
    tl.store(dgu_ptr + I + at, du.to(dgu_ptr.dtype.element_ty), mask)
    return weight * g * s * u


@jit
def _matrix_gradient(
    a_ptr, b_ptr, order_ptr, ends_ptr, out_ptr,
    M: tl.constexpr, N: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TF: tl.constexpr,
):
    """
    out[e, m, n] = Σ_{rows of e} a[row, m] b[row, n]; a program takes a tile [BM, BN] of one expert.

    reads     a [N K, M], b [N K, N], or a row a token where gathered; order, ends int32
    writes    out [E, M, N]
    bound     the product: 2 N K × M × N operations
    """
    expert = tl.program_id(1)
    pid = tl.program_id(0)
    tile_m = pid % tl.cdiv(M, BM)
    tile_n = pid // tl.cdiv(M, BM)
    ms = tile_m * BM + tl.arange(0, BM)
    ns = tile_n * BN + tl.arange(0, BN)
    end = tl.load(ends_ptr + expert + 1)
    acc = tl.zeros([BM, BN], tl.float32)
    for first in range(tl.load(ends_ptr + expert), end, BK):
        rows = first + tl.arange(0, BK)
        token = tl.load(order_ptr + rows, rows < end, other=0) // K
        row_a = (token if GATHER_A else rows).to(tl.int64)
        row_b = (token if GATHER_B else rows).to(tl.int64)
        a_mask = (rows < end)[None, :] & (ms < M)[:, None]
        a = tl.load(a_ptr + row_a[None, :] * M + ms[:, None], a_mask, other=0.0)
        b_mask = (rows < end)[:, None] & (ns < N)[None, :]
        b = tl.load(b_ptr + row_b[:, None] * N + ns[None, :], b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=TF)
    out_at = out_ptr + (expert.to(tl.int64) * M + ms[:, None]) * N + ns[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), (ms < M)[:, None] & (ns < N)[None, :])


@jit
def _combine(
    v_ptr, place_ptr, weights_ptr, y_ptr,
    C: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):
    """
    y_n = Σ_k w_nk v_nk, without WEIGHTED Σ_k v_nk; a program takes BLOCK numbers of one token.

    reads     v [N K, C] by expert; place [N K] int32; with WEIGHTED weights [N K] float32
    writes    y [N, C]
    bound     memory: N (K + 1) C numbers
    """
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place_ptr + n * K + k).to(tl.int64)
        v = tl.load(v_ptr + row * C + cols, cols < C, other=0.0).to(tl.float32)
        if WEIGHTED:
            v *= tl.load(weights_ptr + n * K + k)
        y += v
    tl.store(y_ptr + n * C + cols, y.to(y_ptr.dtype.element_ty), cols < C)


# ---- launches ----

# columns a tile; narrow where gate and up, or the epilogue of the backward, take registers twice
WIDE, NARROW = 128, 64


def tiles(slots, E, itemsize):
    """
    -> constexprs of the grouped products and warps: 64 rows a tile where experts have few, 128
    bytes of each along the sum
    """
    BM = 128 if slots >= 128 * E else 64
    constexprs = dict(E=E, BLOCK_E=next_power_of_2(E), BM=BM, BK=128 // itemsize)
    return constexprs, 8 if BM == 128 else 4


def most_tiles(slots, sizes):
    """-> how many tiles of rows there could be: those that are full, and one more an expert"""
    return cdiv(slots, sizes['BM']) + min(sizes['E'], slots)


def gate_up_product(x, gate_up, tables, sizes, warps):
    """x [N, C], gate_up [E, 2I, C] -> gu [N K, 2I], h [N K, I]"""
    E, I2, C = gate_up.shape
    I = I2 // 2
    slots = len(tables[0])
    gu = x.new_empty(slots, 2 * I)
    h = x.new_empty(slots, I)
    tiles_n = cdiv(I, NARROW)
    _gate_up[(most_tiles(slots, sizes) * tiles_n,)](
        x, gate_up, *tables, gu, h, tiles_n,
        C=C, I=I, BN=NARROW, **sizes, num_warps=warps, num_stages=3)
    return gu, h


def grouped_product(a, w, tables, sizes, warps, swiglu=None):
    """
    a [N K, D], w [E, N, D], contiguous or transposed -> [N K, N]
    swiglu: gu, weights, dgu and dw of the backward's epilogue; then a is [N, D], a row a token
    """
    E, N, D = w.shape
    slots = len(tables[0])
    out = a.new_empty(slots, N)
    BN = WIDE if swiglu is None else NARROW
    tiles_n = cdiv(N, BN)
    _grouped_product[(most_tiles(slots, sizes) * tiles_n,)](
        a, w, *tables, out, *(swiglu or [out] * 4), tiles_n,
        N=N, D=D, stride_wn=w.stride(1), stride_wd=w.stride(2),
        GATHER=swiglu is not None, SWIGLU=swiglu is not None, BN=BN,
        **sizes, num_warps=warps, num_stages=3)
    return out


def matrix_gradient(a, b, tables, sizes, like, gathered):
    """
    a, b of the shapes [N K, M] and [N K, N] -> [E, M, N] as `like`
    gathered: 'a' or 'b', the one that has a row a token
    """
    order, ends, _ = tables
    E, M, N = like.shape
    out = torch.empty_like(like)
    _matrix_gradient[(cdiv(M, 128) * cdiv(N, 128), E)](
        a, b, order, ends, out,
        M=M, N=N, GATHER_A=gathered == 'a', GATHER_B=gathered == 'b',
        K=sizes['K'], BM=128, BN=128, BK=sizes['BK'], TF=sizes['TF'], num_warps=8, num_stages=3)
    return out


def combine(v, place, weights, N, weighted):
    """v [N K, C] by expert, weights [N, K] -> y [N, C]"""
    K = len(place) // N
    C = v.shape[1]
    y = torch.empty(N, C, dtype=v.dtype, device=v.device)
    _combine[(N, cdiv(C, 1024))](
        v, place, weights, y, C=C, K=K, WEIGHTED=weighted, BLOCK=1024, num_warps=4)
    return y


# ---- autograd ----

class TritonExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up, down, weights, chosen):
        N, K = chosen.shape
        E = len(down)
        x = x.contiguous()
        gate_up = gate_up.contiguous()
        down = down.contiguous()
        weights = weights.float().contiguous()

        sizes, warps = tiles(N * K, E, x.itemsize)
        sizes.update(K=K, TF=precision())
        order, place, ends = by_expert(chosen, E)
        tiles_of = (ends.diff() + sizes['BM'] - 1) // sizes['BM']
        tile_ends = F.pad(tiles_of.cumsum(0, dtype=torch.int32), (1, 0))
        tables = order, ends, tile_ends

        if N:
            gu, h = gate_up_product(x, gate_up, tables, sizes, warps)
            v = grouped_product(h, down, tables, sizes, warps)
            y = combine(v, place, weights, N, weighted=True)
        else:
            gu = x.new_empty(0, gate_up.shape[1])
            y = torch.empty_like(x)
        ctx.sizes = sizes
        ctx.warps = warps
        ctx.save_for_backward(x, gate_up, down, weights, gu, place, *tables)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate_up, down, weights, gu, place, *tables = ctx.saved_tensors
        sizes, warps = ctx.sizes, ctx.warps
        N, K = weights.shape
        if not N:
            return *map(torch.zeros_like, (x, gate_up, down, weights)), None

        dy = dy.contiguous()
        dgu = torch.empty_like(gu)
        tiles_n = cdiv(down.shape[2], NARROW)
        dw = torch.empty(N * K, tiles_n, dtype=torch.float32, device=x.device)
        swiglu = gu, weights, dgu, dw
        weighted_h = grouped_product(dy, down.transpose(1, 2), tables, sizes, warps, swiglu)
        dv = grouped_product(dgu, gate_up.transpose(1, 2), tables, sizes, warps)

        dgate_up = matrix_gradient(dgu, x, tables, sizes, gate_up, gathered='b')
        ddown = matrix_gradient(dy, weighted_h, tables, sizes, down, gathered='a')
        dx = combine(dv, place, weights, N, weighted=False)
        dweights = dw.sum(1)[place.long()].view(N, K)
        return dx, dgate_up, ddown, dweights, None


# ---- what is compiled ahead of time ----

MODELS = {    # slots, E, C, I, K; a dense model has no experts
    'V3': (65536, 256, 7168, 2048, 8),
    'V3 few': (4096, 256, 7168, 2048, 8),     # 64 rows a tile
    'V2-Lite': (49152, 64, 2048, 1408, 6),
}


def compile_cases(sm, x):
    """V3 at 8k tokens and at 512, V2-Lite; float32 in both of its precisions, V2-Lite and few."""
    if x == '*bf16':
        for model in MODELS:
            yield from cases_of(sm, x, model, 'tf32', title=model)
    else:
        for model, TF in (('V2-Lite', 'tf32'), ('V3 few', 'ieee'), ('V2-Lite', 'ieee')):
            yield from cases_of(sm, x, model, TF, title=f'{model} {TF}')


def cases_of(sm, x, model, TF, title):
    slots, E, C, I, K = MODELS[model]
    sizes, warps = tiles(slots, E, 2 if x == '*bf16' else 4)
    sizes.update(K=K, TF=TF)
    tables = dict(order_ptr='*i32', ends_ptr='*i32', tile_ends_ptr='*i32')

    spills = {90: 4, 120: 17}.get(sm, 0) if TF == 'ieee' else 0
    signature = dict(x_ptr=x, w_ptr=x, **tables, gu_ptr=x, h_ptr=x, tiles_n='i32')
    constexprs = dict(sizes, C=C, I=I, BN=NARROW)
    yield f'up + swiglu {title}', _gate_up, signature, constexprs, warps, 3, spills

    # addresses of the five tiles of the backward's epilogue, once a tile: not in the loop
    epilogue_spills = {90: 24, 100: 0, 120: 32}.get(sm, 0 if x == '*bf16' else 48)
    signature = dict(a_ptr=x, w_ptr=x, **tables, out_ptr=x, gu_ptr=x, weights_ptr='*fp32',
                     dgu_ptr=x, dw_ptr='*fp32', tiles_n='i32')
    plain = dict(sizes, GATHER=False, SWIGLU=False, BN=WIDE)
    epilogue = dict(sizes, GATHER=True, SWIGLU=True, BN=NARROW)
    for name, constexprs, spills in (
        ('down', dict(plain, N=C, D=I, stride_wn=I, stride_wd=1), 0),
        ('d swiglu', dict(epilogue, N=I, D=C, stride_wn=1, stride_wd=I), epilogue_spills),
        ('dx', dict(plain, N=C, D=2 * I, stride_wn=1, stride_wd=C), 0),
    ):
        yield f'{name} {title}', _grouped_product, signature, constexprs, warps, 3, spills

    if model == 'V3 few':
        return
    signature = dict(a_ptr=x, b_ptr=x, order_ptr='*i32', ends_ptr='*i32', out_ptr=x)
    common = dict(K=K, BM=128, BN=128, BK=sizes['BK'], TF=TF)
    for name, constexprs in (
        ('dW gate up', dict(common, M=2 * I, N=C, GATHER_A=False, GATHER_B=True)),
        ('dW down', dict(common, M=C, N=I, GATHER_A=True, GATHER_B=False)),
    ):
        yield f'{name} {title}', _matrix_gradient, signature, constexprs, 8, 3, 0

    if TF == 'tf32':
        signature = dict(v_ptr=x, place_ptr='*i32', weights_ptr='*fp32', y_ptr=x)
        constexprs = dict(C=C, K=K, WEIGHTED=True, BLOCK=1024)
        yield f'combine {title}', _combine, signature, constexprs, 4, 3, 0
