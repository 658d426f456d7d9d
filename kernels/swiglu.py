"""
SwiGLU's activation, for a dense MLP; kernels/moe.py has it fused into its matrix products.

    h  = silu(g) ⊙ u,      silu(g) = g σ(g)
    dg = dh ⊙ u ⊙ σ(g) (1 + g (1 − σ(g)))
    du = dh ⊙ silu(g)

Bound by memory, in numbers of g's dtype: 3 N I forward (g, u, h), 5 N I backward (dh, g, u, dg, du;
nothing but g and u is kept). g and u may be the two halves of one projection [N, 2I].
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import cdiv, cpu, fused, jit, tl


def swiglu(gate, up):
    """gate, up [..., I] -> [..., I] of their dtype"""
    if fused(gate):
        return TritonSwiGLU.apply(gate, up)
    if cpu.trains(gate) and gate.dtype == up.dtype:
        return cpu.swiglu(gate, up)
    return swiglu_torch(gate, up)


# ---- plain PyTorch ----

def swiglu_torch(gate, up):
    return F.silu(gate) * up


# ---- Triton ----

BLOCK = 1024    # numbers of one row that a program takes


@jit
def _forward(g_ptr, u_ptr, h_ptr, I, stride_g, stride_u, BLOCK: tl.constexpr):
    """
    reads     g, u [N, I], their rows stride_g and stride_u apart
    writes    h [N, I]
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_ptr + row * stride_g + cols, cols < I, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * stride_u + cols, cols < I, other=0.0).to(tl.float32)
    tl.store(h_ptr + row * I + cols, (g * tl.sigmoid(g) * u).to(h_ptr.dtype.element_ty), cols < I)


@jit
def _backward(
    dh_ptr, g_ptr, u_ptr, dg_ptr, du_ptr,
    I, stride_g, stride_u,
    BLOCK: tl.constexpr,
):
    """
    reads     dh [N, I]; g, u [N, I], their rows stride_g and stride_u apart
    writes    dg, du [N, I]
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dh = tl.load(dh_ptr + row * I + cols, cols < I, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * stride_g + cols, cols < I, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * stride_u + cols, cols < I, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    dg = dh * u * s * (1 + g * (1 - s))
    tl.store(dg_ptr + row * I + cols, dg.to(dg_ptr.dtype.element_ty), cols < I)
    du = dh * g * s
    tl.store(du_ptr + row * I + cols, du.to(du_ptr.dtype.element_ty), cols < I)


# ---- autograd ----

def rows_of(x):
    """x [..., I] -> [N, I] whose last stride is 1"""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


class TritonSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        g = rows_of(gate)
        u = rows_of(up)
        N, I = g.shape
        h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if h.numel():
            _forward[(N, cdiv(I, BLOCK))](
                g, u, h, I, g.stride(0), u.stride(0), BLOCK=BLOCK, num_warps=4)
        ctx.save_for_backward(gate, up)
        return h

    @staticmethod
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        g = rows_of(gate)
        u = rows_of(up)
        N, I = g.shape
        dg = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        du = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        if dg.numel():
            _backward[(N, cdiv(I, BLOCK))](
                dh.contiguous(), g, u, dg, du, I, g.stride(0), u.stride(0),
                BLOCK=BLOCK, num_warps=4)
        return dg, du


# ---- what is compiled ahead of time ----

def compile_cases(sm, x):
    """One shape serves every width."""
    strides = dict(I='i32:16', stride_g='i32:16', stride_u='i32:16')
    forward = dict(g_ptr=x, u_ptr=x, h_ptr=x, **strides)
    backward = dict(dh_ptr=x, g_ptr=x, u_ptr=x, dg_ptr=x, du_ptr=x, **strides)
    constexprs = {'BLOCK': BLOCK}
    yield 'swiglu forward', _forward, forward, constexprs, 4, 3, 0
    yield 'swiglu backward', _backward, backward, constexprs, 4, 3, 0
