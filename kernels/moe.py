"""
The routed experts of a mixture: grouped matrix products with the gather, SwiGLU and the weights fused in.

    y_n = Σ_k w_nk D_e (silu(G_e x_n) ⊙ U_e x_n),   e = chosen_nk;   W = [G; U] is stacked [E, 2I, C], D is [E, C, I]

Slots (n, k) are sorted by expert (kernels/router.py). A tile of BM sorted slots belongs to one expert; the grid holds as many tiles as
there could be, and each program looks up its own on the GPU, so that the host never waits for counts.

    forward     [g | u] = x_n Wᵀ, x gathered while it is loaded, h = silu(g) ⊙ u in the epilogue   _up
                v = h Dᵀ                                                                           _rows
                y_n = Σ_k w_nk v_nk                                                                _combine
    backward    p = dy_n D, dy gathered; in the epilogue  dw = p·h,  dh = w p,
                dg = dh ⊙ u ⊙ σ(g)(1 + g(1 − σ(g))),  du = dh ⊙ silu(g),  and w h again            _rows
                dx_n = Σ_k [dg | du] W                                                             _rows, _combine
                dW_e = Σ [dg | du]ᵀ x_n,  dD_e = Σ dy_nᵀ (w h)                                     _weights

dw needs no y: dy·(D h) = (Dᵀ dy)·h. Kept for the backward: x and [g | u] (SonicMoE, arXiv:2512.14080), 2I numbers a slot.
No atomics: the same bits every time. An expert without tokens has no tiles, and zero gradients.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import cdiv, cpu, fused, jit, next_power_of_2, precision, tl
from kernels.router import by_expert
from kernels.swiglu import swiglu_reference


def experts(x, gate_up, down, weights, chosen):
    """x [N, C], gate_up [E, 2I, C], down [E, C, I] of one dtype, weights [N, K] float32, chosen [N, K] -> [N, C]"""
    if fused(x):
        return Experts.apply(x, gate_up, down, weights, chosen)
    if cpu.trains(x):
        return cpu.experts(x, gate_up, down, weights, chosen)
    return experts_reference(x, gate_up, down, weights, chosen)


def experts_reference(x, gate_up, down, weights, chosen):
    N, K = chosen.shape
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(len(down), dtype=torch.int32, device=flat.device)
    ends = counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
    gu = F.grouped_mm(x.index_select(0, order // K), gate_up.transpose(1, 2), offs=ends)
    y = F.grouped_mm(swiglu_reference(*gu.chunk(2, dim=-1)), down.transpose(1, 2), offs=ends)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, device=order.device))
    return cpu.combine(y, back.view(N, K), weights)


@jit
def _locate(ends, tile_ends, tiles_n, E: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr):
    """-> expert (E: no such tile), the tile's first row, the end of the expert's rows, the column tile. Eight row tiles share a column of weights in L2."""
    pid, tiles_m = tl.program_id(0), tl.num_programs(0) // tiles_n
    group = pid // (8 * tiles_n)
    height = tl.minimum(tiles_m - group * 8, 8)
    pm, pn = group * 8 + (pid % (8 * tiles_n)) % height, (pid % (8 * tiles_n)) // height
    e = tl.arange(0, BLOCK_E)
    expert = tl.sum(((tl.load(tile_ends + 1 + e, e < E, other=2**31 - 1) <= pm)).to(tl.int32), 0)
    mine = tl.minimum(expert, E - 1)
    first = tl.load(ends + mine) + (pm - tl.load(tile_ends + mine)) * BM
    return expert, first, tl.load(ends + mine + 1), pn


@jit
def _up(x, w, order, ends, tile_ends, gu, h, tiles_n, C: tl.constexpr, I: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
        BLOCK_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TF: tl.constexpr):
    expert, first, end, pn = _locate(ends, tile_ends, tiles_n, E, BLOCK_E, BM)
    if expert >= E:
        return
    i, start = tl.arange(0, BM)[:, None], first.to(tl.int64)
    rows = first + tl.arange(0, BM)
    cols, ks = pn * BN + tl.arange(0, BN), tl.arange(0, BK)
    token = (tl.load(order + rows, rows < end, other=0) // K).to(tl.int64)
    a = x + token[:, None] * C + ks[None, :]
    b = w + expert.to(tl.int64) * 2 * I * C + cols[None, :] * C + ks[:, None]
    gate, up = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for k in range(0, C, BK):
        at = tl.load(a + k, (rows < end)[:, None] & (ks < C - k)[None, :], other=0.0)
        mask = (cols < I)[None, :] & (ks < C - k)[:, None]
        gate = tl.dot(at, tl.load(b + k, mask, other=0.0), gate, input_precision=TF)
        up = tl.dot(at, tl.load(b + I * C + k, mask, other=0.0), up, input_precision=TF)
    mask = (rows < end)[:, None] & (cols < I)[None, :]
    out = gu + start * 2 * I + (i * 2 * I + cols[None, :])
    tl.store(out, gate.to(gu.dtype.element_ty), mask)
    tl.store(out + I, up.to(gu.dtype.element_ty), mask)
    tl.store(h + start * I + (i * I + cols[None, :]), (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask)


@jit
def _rows(a, w, order, ends, tile_ends, out, gu, weights, dgu, dw, tiles_n, N: tl.constexpr, D: tl.constexpr, b_n: tl.constexpr,
          b_d: tl.constexpr, GATHER: tl.constexpr, SWIGLU: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
          BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TF: tl.constexpr):
    """out[row, n] = Σ_d a[row or its token, d] w[e, n b_n + d b_d]; with SWIGLU the backward's epilogue: out is w h, n < N = I."""
    expert, first, end, pn = _locate(ends, tile_ends, tiles_n, E, BLOCK_E, BM)
    if expert >= E:
        return
    i, start = tl.arange(0, BM)[:, None], first.to(tl.int64)
    rows = first + tl.arange(0, BM)
    cols, ds = pn * BN + tl.arange(0, BN), tl.arange(0, BK)
    slot = tl.load(order + rows, rows < end, other=0)
    source = (slot // K if GATHER else tl.where(rows < end, rows, 0)).to(tl.int64)
    a += source[:, None] * D + ds[None, :]
    b = w + expert.to(tl.int64) * N * D + cols[None, :] * b_n + ds[:, None] * b_d
    acc = tl.zeros([BM, BN], tl.float32)
    for d in range(0, D, BK):
        at = tl.load(a + d, (rows < end)[:, None] & (ds < D - d)[None, :], other=0.0)
        acc = tl.dot(at, tl.load(b + d * b_d, (cols < N)[None, :] & (ds < D - d)[:, None], other=0.0), acc, input_precision=TF)
    mask, at = (rows < end)[:, None] & (cols < N)[None, :], i * N + cols[None, :]
    if SWIGLU:
        wide = i * 2 * N + cols[None, :]
        g = tl.load(gu + start * 2 * N + wide, mask, other=0.0).to(tl.float32)
        u = tl.load(gu + start * 2 * N + N + wide, mask, other=0.0).to(tl.float32)
        s, weight = tl.sigmoid(g), tl.load(weights + slot, rows < end, other=0.0)[:, None]
        tl.store(dw + rows.to(tl.int64) * tiles_n + pn, tl.sum(acc * g * s * u, 1), rows < end)
        acc *= weight
        tl.store(dgu + start * 2 * N + wide, (acc * u * s * (1 + g * (1 - s))).to(dgu.dtype.element_ty), mask)
        tl.store(dgu + start * 2 * N + N + wide, (acc * g * s).to(dgu.dtype.element_ty), mask)
        acc = weight * g * s * u
    tl.store(out + start * N + at, acc.to(out.dtype.element_ty), mask)


@jit
def _weights(a, b, order, ends, out, M: tl.constexpr, N: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, K: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TF: tl.constexpr):
    """out[e, m, n] = Σ_{rows of e} a[row, m] b[row, n]"""
    expert, pid = tl.program_id(1), tl.program_id(0)
    pm, pn = pid % tl.cdiv(M, BM), pid // tl.cdiv(M, BM)
    ms, ns = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    end = tl.load(ends + expert + 1)
    acc = tl.zeros([BM, BN], tl.float32)
    for first in range(tl.load(ends + expert), end, BK):
        rows = first + tl.arange(0, BK)
        token = tl.load(order + rows, rows < end, other=0) // K
        ra, rb = (token if GATHER_A else rows).to(tl.int64), (token if GATHER_B else rows).to(tl.int64)
        at = tl.load(a + ra[None, :] * M + ms[:, None], (rows < end)[None, :] & (ms < M)[:, None], other=0.0)
        bt = tl.load(b + rb[:, None] * N + ns[None, :], (rows < end)[:, None] & (ns < N)[None, :], other=0.0)
        acc = tl.dot(at, bt, acc, input_precision=TF)
    at = out + (expert.to(tl.int64) * M + ms[:, None]) * N + ns[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), (ms < M)[:, None] & (ns < N)[None, :])


@jit
def _combine(v, place, weights, y, C: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    n, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(v + tl.load(place + n * K + k).to(tl.int64) * C + cols, cols < C, other=0.0).to(tl.float32)
        acc += row * tl.load(weights + n * K + k) if WEIGHTED else row
    tl.store(y + n * C + cols, acc.to(y.dtype.element_ty), cols < C)


WIDE, NARROW = 128, 64     # columns a tile; narrow where gate and up, or the epilogue of the backward, take the registers twice


def tiles(slots, E, itemsize):
    """-> constexprs of the grouped products and warps: 64 rows a tile where experts have few, 128 bytes of each along the sum."""
    BM = 128 if slots >= 128 * E else 64
    return dict(E=E, BLOCK_E=next_power_of_2(E), BM=BM, BK=128 // itemsize), 8 if BM == 128 else 4


def combine(v, place, weights, N, weighted):
    K, C = len(place) // N, v.shape[1]
    y = torch.empty(N, C, dtype=v.dtype, device=v.device)
    _combine[(N, cdiv(C, 1024))](v, place, weights, y, C=C, K=K, WEIGHTED=weighted, BLOCK=1024, num_warps=4)
    return y


class Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up, down, weights, chosen):
        (N, K), (E, C, I) = chosen.shape, down.shape
        x, gate_up, down, weights = x.contiguous(), gate_up.contiguous(), down.contiguous(), weights.float().contiguous()
        sizes, warps = tiles(N * K, E, x.itemsize)
        order, place, ends = by_expert(chosen, E)
        tile_ends = F.pad(((ends.diff() + sizes['BM'] - 1) // sizes['BM']).cumsum(0, dtype=torch.int32), (1, 0))
        gu, h = x.new_empty(N * K, 2 * I), x.new_empty(N * K, I)
        ctx.save_for_backward(x, gate_up, down, weights, order, place, ends, tile_ends, gu)
        ctx.sizes, ctx.warps = dict(sizes, K=K, TF=precision()), warps
        if not N:
            return torch.empty_like(x)
        tiles_m = cdiv(N * K, sizes['BM']) + min(E, N * K)
        tiles_n = cdiv(I, NARROW)
        _up[(tiles_m * tiles_n,)](x, gate_up, order, ends, tile_ends, gu, h, tiles_n, C=C, I=I, BN=NARROW, **ctx.sizes, num_warps=warps,
                                  num_stages=3)
        v, tiles_n = x.new_empty(N * K, C), cdiv(C, WIDE)
        _rows[(tiles_m * tiles_n,)](h, down, order, ends, tile_ends, v, h, h, h, h, tiles_n, N=C, D=I, b_n=I, b_d=1, GATHER=False,
                                    SWIGLU=False, BN=WIDE, **ctx.sizes, num_warps=warps, num_stages=3)
        return combine(v, place, weights, N, weighted=True)

    @staticmethod
    def backward(ctx, dy):
        x, gate_up, down, weights, order, place, ends, tile_ends, gu = ctx.saved_tensors
        (N, K), (E, C, I) = weights.shape, down.shape
        if not N:
            return torch.zeros_like(x), torch.zeros_like(gate_up), torch.zeros_like(down), torch.zeros_like(weights), None
        dgate_up, ddown = torch.empty_like(gate_up), torch.empty_like(down)
        dy, sizes, warps = dy.contiguous(), ctx.sizes, ctx.warps
        tiles_m, tiles_n = cdiv(N * K, sizes['BM']) + min(E, N * K), cdiv(I, NARROW)
        wh, dgu, dw = x.new_empty(N * K, I), torch.empty_like(gu), torch.empty(N * K, tiles_n, dtype=torch.float32, device=x.device)
        _rows[(tiles_m * tiles_n,)](dy, down, order, ends, tile_ends, wh, gu, weights, dgu, dw, tiles_n, N=I, D=C, b_n=1, b_d=I, GATHER=True,
                                    SWIGLU=True, BN=NARROW, **sizes, num_warps=warps, num_stages=3)
        tiles_n, dv = cdiv(C, WIDE), x.new_empty(N * K, C)
        _rows[(tiles_m * tiles_n,)](dgu, gate_up, order, ends, tile_ends, dv, gu, gu, gu, gu, tiles_n, N=C, D=2 * I, b_n=1, b_d=C, GATHER=False,
                                    SWIGLU=False, BN=WIDE, **sizes, num_warps=warps, num_stages=3)
        for a, b, out, gathered in ((dgu, x, dgate_up, False), (dy, wh, ddown, True)):
            _weights[(cdiv(out.shape[1], 128) * cdiv(out.shape[2], 128), E)](a, b, order, ends, out, M=out.shape[1], N=out.shape[2],
                                                                              GATHER_A=gathered, GATHER_B=not gathered, K=K, BM=128, BN=128,
                                                                              BK=sizes['BK'], TF=sizes['TF'], num_warps=8, num_stages=3)
        return combine(dv, place, weights, N, weighted=False), dgate_up, ddown, dw.sum(1)[place.long()].view(N, K), None


def compile_cases(sm, x):
    """V3's 256 experts of width 2048, 8 a token, at 8k tokens and at 512 (64 rows a tile). A dense model has none; V2-Lite's stand beside,
    alone for float32, in both of its precisions."""
    tables = dict(order='*i32', ends='*i32', tile_ends='*i32')
    # addresses of the five tiles of the backward's epilogue, once a tile: not in the loop
    epilogue_spills = {90: 24, 100: 0, 120: 32}.get(sm, 0 if x == '*bf16' else 48)
    models = ('V3', 65536, 256, 7168, 2048, 8), ('V3 few', 4096, 256, 7168, 2048, 8), ('V2-Lite', 49152, 64, 2048, 1408, 6)
    for TF, models in (('tf32', models if x == '*bf16' else models[2:]), ('ieee', () if x == '*bf16' else models[1:])):
        for name, slots, E, C, I, K in models:
            sizes, warps = tiles(slots, E, 2 if x == '*bf16' else 4)
            sizes, name = dict(sizes, K=K, TF=TF), name if x == '*bf16' else f'{name} {TF}'
            yield (f'up + swiglu {name}', _up, dict(x=x, w=x, **tables, gu=x, h=x, tiles_n='i32'), dict(sizes, C=C, I=I, BN=NARROW), warps, 3,
                   {90: 4, 120: 17}.get(sm, 0) if TF == 'ieee' else 0)
            rows = dict(a=x, w=x, **tables, out=x, gu=x, weights='*fp32', dgu=x, dw='*fp32', tiles_n='i32')
            for part, N, D, b_n, b_d, back in (('down', C, I, I, 1, False), ('d swiglu', I, C, 1, I, True), ('dx', C, 2 * I, 1, C, False)):
                yield f'{part} {name}', _rows, rows, dict(sizes, N=N, D=D, b_n=b_n, b_d=b_d, GATHER=back, SWIGLU=back,
                                                  BN=NARROW if back else WIDE), warps, 3, epilogue_spills if back else 0
            if 'few' not in name:
                for part, M, N, gathered in (('dW gate up', 2 * I, C, False), ('dW down', C, I, True)):
                    yield (f'{part} {name}', _weights, dict(a=x, b=x, order='*i32', ends='*i32', out=x),
                           dict(M=M, N=N, GATHER_A=gathered, GATHER_B=not gathered, K=K, BM=128, BN=128, BK=sizes['BK'], TF=TF), 8, 3, 0)
                if TF == 'tf32':
                    yield (f'combine {name}', _combine, dict(v=x, place='*i32', weights='*fp32', y=x), dict(C=C, K=K, WEIGHTED=True, BLOCK=1024),
                           4, 3, 0)
