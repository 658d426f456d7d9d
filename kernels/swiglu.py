"""
SwiGLU's activation, for a dense MLP; kernels/moe.py has it fused into its matrix products.

    h = silu(g) ⊙ u,   silu(g) = g σ(g)
    dg = dh ⊙ u ⊙ σ(g) (1 + g (1 − σ(g))),   du = dh ⊙ silu(g)

Bound by memory: 3 N I numbers forward, 5 backward (g and u are read again, nothing else is kept). g and u may be the two halves
of one projection [N, 2I].
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import cdiv, cpu, fused, jit, tl


def swiglu(gate, up):
    """gate, up [..., I] -> [..., I] of their dtype"""
    if fused(gate):
        return SwiGLU.apply(gate, up)
    if cpu.trains(gate) and gate.dtype == up.dtype:
        return cpu.swiglu(gate, up)
    return swiglu_reference(gate, up)


def swiglu_reference(gate, up):
    return F.silu(gate) * up


@jit
def _forward(g, u, h, I, g_row, u_row, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(g + row * g_row + cols, cols < I, other=0.0).to(tl.float32)
    b = tl.load(u + row * u_row + cols, cols < I, other=0.0).to(tl.float32)
    tl.store(h + row * I + cols, (a * tl.sigmoid(a) * b).to(h.dtype.element_ty), cols < I)


@jit
def _backward(dh, g, u, dg, du, I, g_row, u_row, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(dh + row * I + cols, cols < I, other=0.0).to(tl.float32)
    a = tl.load(g + row * g_row + cols, cols < I, other=0.0).to(tl.float32)
    b = tl.load(u + row * u_row + cols, cols < I, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(dg + row * I + cols, (d * b * s * (1 + a * (1 - s))).to(dg.dtype.element_ty), cols < I)
    tl.store(du + row * I + cols, (d * a * s).to(du.dtype.element_ty), cols < I)


def rows_of(x):
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


class SwiGLU(torch.autograd.Function):
    BLOCK = 1024

    @staticmethod
    def forward(ctx, gate, up):
        g, u = rows_of(gate), rows_of(up)
        N, I = g.shape
        h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if h.numel():
            _forward[(N, cdiv(I, SwiGLU.BLOCK))](g, u, h, I, g.stride(0), u.stride(0), BLOCK=SwiGLU.BLOCK, num_warps=4)
        ctx.save_for_backward(gate, up)
        return h

    @staticmethod
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        g, u = rows_of(gate), rows_of(up)
        N, I = g.shape
        dg, du = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), torch.empty(up.shape, dtype=up.dtype, device=up.device)
        if dg.numel():
            _backward[(N, cdiv(I, SwiGLU.BLOCK))](dh.contiguous(), g, u, dg, du, I, g.stride(0), u.stride(0), BLOCK=SwiGLU.BLOCK, num_warps=4)
        return dg, du


def compile_cases(sm, x):
    """One shape serves every width."""
    rows = dict(I='i32:16', g_row='i32:16', u_row='i32:16')
    yield 'swiglu forward', _forward, {**dict.fromkeys(['g', 'u', 'h'], x), **rows}, {'BLOCK': 1024}, 4, 3, 0
    yield 'swiglu backward', _backward, {**dict.fromkeys(['dh', 'g', 'u', 'dg', 'du'], x), **rows}, {'BLOCK': 1024}, 4, 3, 0
