"""
Rotary position embedding of heads, in both published layouts.

    y_i       = x_a cos θ_i − x_b sin θ_i      θ_i = position · f_i,   i < d/2
    y_{i+d/2} = x_b cos θ_i + x_a sin θ_i

(a, b) is (2i, 2i+1) in DeepSeek's interleaved layout and (i, i + d/2) in Llama's and Qwen's half
layout. Both come out in the half layout, a permutation that q and k share and q·k does not see. cos
and sin are tables in float32, made once a forward. The gradient is the rotation by −θ with input
and output layouts exchanged: the same kernel.

Bound by memory: 2 B T H d numbers of x's dtype, one read and one write, and the tables, 2 T d/2
numbers of float32 (B times that where rows have positions of their own).
"""
from __future__ import annotations

import torch

from kernels import cdiv, cpu, fused, jit, next_power_of_2, tl


def apply_rope(x, rope, interleaved):
    """x [B, T, H, d]; rope = (cos, sin) [B or 1, T, 1, d/2] float32 -> [B, T, H, d] of x's dtype"""
    if fused(x):
        return TritonRope.apply(x, *rope, interleaved)
    if cpu.trains(x):
        return cpu.apply_rope(x, rope, interleaved)
    return rope_torch(x, *rope, interleaved)


# ---- plain PyTorch ----

def rope_torch(x, cos, sin, interleaved):
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# ---- Triton ----

@jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr,
    T, stride_table, stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh,
    SIGN: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
    IN_STEP: tl.constexpr, IN_GAP: tl.constexpr, OUT_STEP: tl.constexpr, OUT_GAP: tl.constexpr,
):
    """
    A program takes one token and BLOCK_H of its heads, which share one read of cos and sin.
    Pair i is (i * STEP, i * STEP + GAP): (2, 1) is interleaved, (1, HALF) is half.

    reads     x [B, T, H, d]: any strides but the last, which is 1, so a slice of a wider
              projection will do; cos, sin [B or 1, T, d/2] float32 (stride_table 0 for 1)
    writes    y [B, T, H, d]
    """
    b = (tl.program_id(0) // T).to(tl.int64)
    t = (tl.program_id(0) % T).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    mask = (heads < H) & (i < HALF)

    cos = tl.load(cos_ptr + b * stride_table + t * HALF + i, i < HALF, other=0.0)
    sin = tl.load(sin_ptr + b * stride_table + t * HALF + i, i < HALF, other=0.0) * SIGN
    x_ptr += b * stride_xb + t * stride_xt + heads * stride_xh + i * IN_STEP
    x_a = tl.load(x_ptr, mask, other=0.0).to(tl.float32)
    x_b = tl.load(x_ptr + IN_GAP, mask, other=0.0).to(tl.float32)

    y_ptr += b * stride_yb + t * stride_yt + heads * stride_yh + i * OUT_STEP
    tl.store(y_ptr, (x_a * cos - x_b * sin).to(y_ptr.dtype.element_ty), mask)
    tl.store(y_ptr + OUT_GAP, (x_b * cos + x_a * sin).to(y_ptr.dtype.element_ty), mask)


def tiles(H, d, interleaved, backward):
    """-> constexprs of _rotate: up to 32 heads a program, and where the pairs lie"""
    half = 1, d // 2      # step, gap
    published = (2, 1) if interleaved else half
    (in_step, in_gap), (out_step, out_gap) = (half, published) if backward else (published, half)
    return dict(
        SIGN=-1.0 if backward else 1.0, H=H, HALF=d // 2,
        BLOCK_H=min(32, next_power_of_2(H)), BLOCK=next_power_of_2(d // 2),
        IN_STEP=in_step, IN_GAP=in_gap, OUT_STEP=out_step, OUT_GAP=out_gap)


def rotate(x, cos, sin, interleaved, backward):
    """x [B, T, H, d], cos, sin [B or 1, T, 1, d/2] float32 -> [B, T, H, d]; backward: by −θ"""
    B, T, H, d = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos = cos.contiguous()
    sin = sin.contiguous()
    stride_table = 0 if len(cos) == 1 else T * (d // 2)
    y = torch.empty(B, T, H, d, dtype=x.dtype, device=x.device)

    if y.numel():
        sizes = tiles(H, d, interleaved, backward)
        _rotate[(B * T, cdiv(H, sizes['BLOCK_H']))](
            x, cos, sin, y,
            T, stride_table, *x.stride()[:3], *y.stride()[:3],
            **sizes, num_warps=4)
    return y


# ---- autograd ----

class TritonRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotate(x, cos, sin, interleaved, backward=False)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, sin, ctx.interleaved, backward=True), None, None, None


# ---- what is compiled ahead of time ----

def compile_cases(sm, x):
    """V3's 128 query heads of 64 rotated numbers and its one rope key; a dense model's 12 of 128"""
    signature = dict(
        x_ptr=x, cos_ptr='*fp32', sin_ptr='*fp32', y_ptr=x, T='i32', stride_table='i32:16',
        stride_xb='i32:16', stride_xt='i32:16', stride_xh='i32:16',
        stride_yb='i32:16', stride_yt='i32:16', stride_yh='i32:16')
    for H, d, interleaved in ((128, 64, True), (1, 64, True), (12, 128, False)):
        layout = 'interleaved' if interleaved else 'half'
        for backward in (False, True):
            name = f'rope {"backward" if backward else "forward"} {H}x{d} {layout}'
            yield name, _rotate, signature, tiles(H, d, interleaved, backward), 4, 3, 0
