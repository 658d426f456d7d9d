"""
RMSNorm, alone or fused with the residual addition before it.

    h = x + residual
    n = h / sqrt(mean(h²) + eps)
    y = n ⊙ w

Statistics are float32; n is rounded to h's dtype before the weight, as the released models do.

    g  = dy ⊙ w
    dx = (g − n · mean(g ⊙ n)) / rms + dh      of x and of the residual alike
    dw = Σ_rows dy ⊙ n

Backward: as many programs as fit on the chip take rows in turn and keep their own dw, one row of
[programs, D], summed at the end: no atomics, and the same bits every time. Nothing but h and 1/rms
is kept from the forward.

Bound by memory, in numbers of x's dtype; eager PyTorch moves three to four times as many:

    forward     2 N D alone (x, y),         4 N D fused (x, residual, y, h)
    backward    3 N D alone (dy, h, dx),    4 N D fused (and dh)
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import cdiv, cpu, fused, jit, next_power_of_2, tl


def rms_norm(x, weight, eps, residual=None):
    """
    x, residual [..., D], weight [D] -> y [..., D]; with a residual (y, h).
    y has the wider dtype of h and weight.
    """
    if fused(x):
        return TritonRMSNorm.apply(x, weight, eps, residual)
    if cpu.trains(x):
        return cpu.rms_norm(x, weight, eps, residual)
    return rms_norm_torch(x, weight, eps, residual)


# ---- plain PyTorch ----

def rms_norm_torch(x, weight, eps, residual=None):
    h = x if residual is None else x + residual
    if h.dtype in (torch.float32, torch.float64):
        y = F.rms_norm(h, weight.shape, weight, eps)
    else:
        y = F.rms_norm(h.float(), weight.shape, None, eps).to(h.dtype) * weight
    return y if residual is None else (y, h)


# ---- Triton ----

@jit
def _forward(
    x_ptr, residual_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr,
    N, stride_x, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):
    """
    A program takes ROWS rows.

    reads     x [N, D], its rows stride_x apart; w [D]; with ADD residual [N, D]
    writes    y [N, D]; rstd = 1 / rms [N] float32; with ADD h [N, D]
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]

    h = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask, other=0.0).to(tl.float32)
    if ADD:
        h += tl.load(residual_ptr + at, mask, other=0.0).to(tl.float32)
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask)
        h = h.to(h_ptr.dtype.element_ty).to(tl.float32)

    rstd = 1 / tl.sqrt(tl.sum(h * h, 1) / D + eps)
    n = (h * rstd[:, None]).to(h_ptr.dtype.element_ty).to(tl.float32)
    w = tl.load(w_ptr + cols, cols < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (n * w[None, :]).to(y_ptr.dtype.element_ty), mask)
    tl.store(rstd_ptr + rows, rstd, rows < N)


@jit
def _backward(
    dy_ptr, dh_ptr, h_ptr, w_ptr, rstd_ptr, dx_ptr, dw_ptr,
    N, stride_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):
    """
    A program takes every num_programs-th block of ROWS rows.

    reads     dy [N, D]; h [N, D], its rows stride_h apart; w [D]; rstd [N] float32;
              with ADD dh [N, D]
    writes    dx [N, D] in h's dtype; dw [programs, D] float32, a row a program
    """
    cols = tl.arange(0, BLOCK_D)
    w = tl.load(w_ptr + cols, cols < D, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], tl.float32)

    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < N)[:, None] & (cols < D)[None, :]
        at = rows[:, None] * D + cols[None, :]

        rstd = tl.load(rstd_ptr + rows, rows < N, other=0.0)
        h = tl.load(h_ptr + rows[:, None] * stride_h + cols[None, :], mask, other=0.0)
        n = h.to(tl.float32) * rstd[:, None]
        dy = tl.load(dy_ptr + at, mask, other=0.0).to(tl.float32)
        dw += tl.sum(dy * n, 0)

        g = dy * w[None, :]
        dx = (g - n * (tl.sum(g * n, 1) / D)[:, None]) * rstd[:, None]
        if ADD:
            dx += tl.load(dh_ptr + at, mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)

    tl.store(dw_ptr + tl.program_id(0) * D + cols, dw, cols < D)


def tiles(D):
    """-> constexprs, warps: a row a program, several if they are short; 16 numbers a thread"""
    BLOCK_D = next_power_of_2(D)
    ROWS = max(1, 1024 // BLOCK_D)
    warps = min(16, max(1, BLOCK_D * ROWS // 512))
    return dict(D=D, BLOCK_D=BLOCK_D, ROWS=ROWS), warps


# ---- autograd ----

class TritonRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        D = x.shape[-1]
        rows = x.reshape(-1, D)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        N = len(rows)

        if residual is None:
            h = rows
            ctx.dtypes = x.dtype, None
        else:
            residual = residual.contiguous()
            h_dtype = torch.promote_types(x.dtype, residual.dtype)
            h = torch.empty(x.shape, dtype=h_dtype, device=x.device)
            ctx.dtypes = x.dtype, residual.dtype
        y_dtype = torch.promote_types(h.dtype, weight.dtype)
        y = torch.empty(x.shape, dtype=y_dtype, device=x.device)
        rstd = torch.empty(N, dtype=torch.float32, device=x.device)

        if N:
            sizes, warps = tiles(D)
            _forward[(cdiv(N, sizes['ROWS']),)](
                rows, rows if residual is None else residual, weight, y, h, rstd,
                N, rows.stride(0), eps,
                **sizes, ADD=residual is not None, num_warps=warps)
        ctx.save_for_backward(h.view(-1, D), weight, rstd)
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx, dy, dh=None):
        h, weight, rstd = ctx.saved_tensors
        x_dtype, residual_dtype = ctx.dtypes
        N, D = h.shape
        sizes, warps = tiles(D)
        programs = min(cdiv(N, sizes['ROWS']), 4 * multiprocessors(h.device))
        dx = torch.empty(dy.shape, dtype=h.dtype, device=h.device)
        dw = torch.empty(programs, D, dtype=torch.float32, device=h.device)

        if N:
            dy = dy.contiguous()
            _backward[(programs,)](
                dy, dy if dh is None else dh.contiguous(), h, weight, rstd, dx, dw,
                N, h.stride(0),
                **sizes, ADD=dh is not None, num_warps=warps)
        dresidual = None if residual_dtype is None else dx.to(residual_dtype)
        return dx.to(x_dtype), dw.sum(0).to(weight.dtype), None, dresidual


def multiprocessors(device):
    """-> how many the GPU has; 2 for Triton's interpreter"""
    if device.type != 'cuda':
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


# ---- what is compiled ahead of time ----

def compile_cases(sm, x):
    """V3's hidden width, its query latent (and a 1.5B dense model's width), Qwen3's heads of 128"""
    forward = dict(x_ptr=x, residual_ptr=x, w_ptr=x, y_ptr=x, h_ptr=x, rstd_ptr='*fp32',
                   N='i32', stride_x='i32:16', eps='fp32')
    backward = dict(dy_ptr=x, dh_ptr=x, h_ptr=x, w_ptr=x, rstd_ptr='*fp32', dx_ptr=x,
                    dw_ptr='*fp32', N='i32', stride_h='i32:16')
    backward_spills = 5 if sm == 100 and x == '*fp32' else 0
    for D in (7168, 1536, 128):
        sizes, warps = tiles(D)
        for add in (False, True):
            name = 'add_rms_norm' if add else 'rms_norm'
            constexprs = {**sizes, 'ADD': add}
            yield f'{name} forward {D}', _forward, forward, constexprs, warps, 3, 0
            yield f'{name} backward {D}', _backward, backward, constexprs, warps, 3, backward_spills
