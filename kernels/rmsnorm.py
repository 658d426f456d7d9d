"""
RMSNorm, alone or fused with the residual addition before it.

    h = x + residual,   n = h / sqrt(mean(h²) + eps),   y = n ⊙ w

One read of x (and residual), one write of y (and h): the kernel is bound by memory, 2 N D numbers alone and 4 N D fused, where
eager PyTorch moves three to four times as many. Statistics are float32; n is rounded to h's dtype before the weight, as the
released models do.

    g = dy ⊙ w,   dh' = (g − n · mean(g ⊙ n)) / rms + dh,   dw = Σ_rows dy ⊙ n

Backward: as many programs as fit on the chip take rows in turn and keep their own dw, one row of [programs, D], summed at the
end: no atomics, and the same bits every time. Nothing but h and 1/rms is kept from the forward.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import cdiv, cpu, fused, jit, next_power_of_2, tl


def rms_norm(x, weight, eps, residual=None):
    """x, residual [..., D], weight [D] -> y [..., D]; with a residual (y, h). y has the wider dtype of h and weight."""
    if fused(x):
        return RMSNorm.apply(x, weight, eps, residual)
    if cpu.trains(x):
        return cpu.rms_norm(x, weight, eps, residual)
    return rms_norm_reference(x, weight, eps, residual)


def rms_norm_reference(x, weight, eps, residual=None):
    h = x if residual is None else x + residual
    if h.dtype in (torch.float32, torch.float64):
        y = F.rms_norm(h, weight.shape, weight, eps)
    else:
        y = F.rms_norm(h.float(), weight.shape, None, eps).to(h.dtype) * weight
    return y if residual is None else (y, h)


@jit
def _forward(x, r, w, y, h, rstd, N, x_row, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]
    v = tl.load(x + rows[:, None] * x_row + cols[None, :], mask, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(r + at, mask, other=0.0).to(tl.float32)
        tl.store(h + at, v.to(h.dtype.element_ty), mask)
        v = v.to(h.dtype.element_ty).to(tl.float32)
    inv = 1 / tl.sqrt(tl.sum(v * v, 1) / D + eps)
    n = (v * inv[:, None]).to(h.dtype.element_ty).to(tl.float32)
    tl.store(y + at, (n * tl.load(w + cols, cols < D, other=0.0).to(tl.float32)[None, :]).to(y.dtype.element_ty), mask)
    tl.store(rstd + rows, inv, rows < N)


@jit
def _backward(dy, dh, h, w, rstd, dx, dw, N, h_row, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    weight = tl.load(w + cols, cols < D, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < N)[:, None] & (cols < D)[None, :]
        at = rows[:, None] * D + cols[None, :]
        inv = tl.load(rstd + rows, rows < N, other=0.0)
        n = tl.load(h + rows[:, None] * h_row + cols[None, :], mask, other=0.0).to(tl.float32) * inv[:, None]
        d = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        acc += tl.sum(d * n, 0)
        g = d * weight[None, :]
        g = (g - n * (tl.sum(g * n, 1) / D)[:, None]) * inv[:, None]
        if ADD:
            g += tl.load(dh + at, mask, other=0.0).to(tl.float32)
        tl.store(dx + at, g.to(dx.dtype.element_ty), mask)
    tl.store(dw + tl.program_id(0) * D + cols, acc, cols < D)


def tiles(D):
    """-> constexprs and warps: a row a program, several where rows are short; 16 numbers a thread."""
    BLOCK_D = next_power_of_2(D)
    ROWS = max(1, 1024 // BLOCK_D)
    return dict(D=D, BLOCK_D=BLOCK_D, ROWS=ROWS), min(16, max(1, BLOCK_D * ROWS // 512))


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        D = x.shape[-1]
        flat = x.reshape(-1, D)
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        y = torch.empty(x.shape, dtype=torch.promote_types(dtype, weight.dtype), device=x.device)
        h = flat if residual is None else torch.empty(x.shape, dtype=dtype, device=x.device)
        rstd = torch.empty(len(flat), dtype=torch.float32, device=x.device)
        sizes, warps = tiles(D)
        residual = residual if residual is None else residual.contiguous()
        if len(flat):
            _forward[(cdiv(len(flat), sizes['ROWS']),)](flat, flat if residual is None else residual, weight, y, h, rstd, len(flat), flat.stride(0),
                                                        eps, **sizes, ADD=residual is not None, num_warps=warps)
        ctx.save_for_backward(h.view(-1, D), weight, rstd)
        ctx.dtypes = x.dtype, residual if residual is None else residual.dtype
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx, dy, dh=None):
        h, weight, rstd = ctx.saved_tensors
        x_dtype, r_dtype = ctx.dtypes
        N, D = h.shape
        sizes, warps = tiles(D)
        programs = min(cdiv(N, sizes['ROWS']), 4 * multiprocessors(h.device))
        dx, dw = torch.empty(dy.shape, dtype=h.dtype, device=h.device), torch.empty(programs, D, dtype=torch.float32, device=h.device)
        dy = dy.contiguous()
        if N:
            _backward[(programs,)](dy, dy if dh is None else dh.contiguous(), h, weight, rstd, dx, dw, N, h.stride(0), **sizes,
                                   ADD=dh is not None, num_warps=warps)
        return dx.to(x_dtype), dw.sum(0).to(weight.dtype), None, dx.to(r_dtype) if r_dtype else None


def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 2


def compile_cases(sm, x):
    """V3's hidden width, its query latent (and the width of a 1.5B dense model), and Qwen3's norm on heads of 128."""
    for D in (7168, 1536, 128):
        sizes, warps = tiles(D)
        for add in (False, True):
            name = f'{"add_" if add else ""}rms_norm {{}} {D}'
            yield (name.format('forward'), _forward, dict(x=x, r=x, w=x, y=x, h=x, rstd='*fp32', N='i32', x_row='i32:16', eps='fp32'),
                   {**sizes, 'ADD': add}, warps, 3, 0)
            yield (name.format('backward'), _backward, dict(dy=x, dh=x, h=x, w=x, rstd='*fp32', dx=x, dw='*fp32', N='i32', h_row='i32:16'),
                   {**sizes, 'ADD': add}, warps, 3, 5 if sm == 100 and x == '*fp32' else 0)
