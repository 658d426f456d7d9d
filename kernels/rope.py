"""
Rotary position embedding of heads, in both published layouts.

    (y_i, y_{i+d/2}) = (x_a cos θ_i − x_b sin θ_i,  x_b cos θ_i + x_a sin θ_i),   θ_i = position · f_i,   i < d/2

(a, b) is (2i, 2i+1) in DeepSeek's interleaved layout and (i, i + d/2) in Llama's and Qwen's half layout. Both come out in the half
layout, a permutation that q and k share and q·k does not see. cos and sin are tables in float32, made once a forward. The gradient
is the rotation by −θ with input and output layouts exchanged: the same kernel.

A program takes one token and up to 32 of its heads, so that cos and sin are read once for all of them; heads may be a slice of
a wider projection (any strides, the last 1).
"""
from __future__ import annotations

import torch

from kernels import cdiv, cpu, fused, jit, next_power_of_2, tl


def apply_rope(x, rope, interleaved):
    """x [B, T, H, d]; rope = (cos, sin) [B or 1, T, 1, d/2] float32 -> [B, T, H, d] of x's dtype"""
    if fused(x):
        return Rope.apply(x, *rope, interleaved)
    if cpu.trains(x):
        return cpu.apply_rope(x, rope, interleaved)
    return rope_reference(x, *rope, interleaved)


def rope_reference(x, cos, sin, interleaved):
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@jit
def _rotate(x, cos, sin, y, T, table_batch, x_batch, x_token, x_head, y_batch, y_token, y_head, SIGN: tl.constexpr, H: tl.constexpr,
            HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, IN_STEP: tl.constexpr, IN_GAP: tl.constexpr,
            OUT_STEP: tl.constexpr, OUT_GAP: tl.constexpr):
    """Pair i is (i * STEP, i * STEP + GAP): (2, 1) interleaved, (1, HALF) half."""
    b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    mask = (heads < H) & (i < HALF)
    c = tl.load(cos + b * table_batch + t * HALF + i, i < HALF, other=0.0)
    s = tl.load(sin + b * table_batch + t * HALF + i, i < HALF, other=0.0) * SIGN
    x += b * x_batch + t * x_token + heads * x_head + i * IN_STEP
    p = tl.load(x, mask, other=0.0).to(tl.float32)
    q = tl.load(x + IN_GAP, mask, other=0.0).to(tl.float32)
    y += b * y_batch + t * y_token + heads * y_head + i * OUT_STEP
    tl.store(y, (p * c - q * s).to(y.dtype.element_ty), mask)
    tl.store(y + OUT_GAP, (q * c + p * s).to(y.dtype.element_ty), mask)


def tiles(H, d, interleaved, backward):
    inner, outer = ((2, 1) if interleaved else (1, d // 2)), (1, d // 2)
    inner, outer = (outer, inner) if backward else (inner, outer)
    return dict(SIGN=-1.0 if backward else 1.0, H=H, HALF=d // 2, BLOCK_H=min(32, next_power_of_2(H)), BLOCK=next_power_of_2(d // 2),
                IN_STEP=inner[0], IN_GAP=inner[1], OUT_STEP=outer[0], OUT_GAP=outer[1])


def rotate(x, cos, sin, interleaved, backward):
    B, T, H, d = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y, sizes = torch.empty(B, T, H, d, dtype=x.dtype, device=x.device), tiles(H, d, interleaved, backward)
    if y.numel():
        _rotate[(B * T, cdiv(H, sizes['BLOCK_H']))](x, cos, sin, y, T, 0 if cos.shape[0] == 1 else T * (d // 2), *x.stride()[:3], *y.stride()[:3],
                                                    **sizes, num_warps=4)
    return y


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotate(x, cos, sin, interleaved, backward=False)

    @staticmethod
    def backward(ctx, dy):
        return rotate(dy, *ctx.saved_tensors, ctx.interleaved, backward=True), None, None, None


def compile_cases(sm, x):
    """V3's 128 query heads of 64 rotated dimensions and its one rope key; a 1.5B dense model's 12 heads of 128."""
    signature = dict(x=x, cos='*fp32', sin='*fp32', y=x, T='i32', table_batch='i32:16',
                     **{f'{t}_{stride}': 'i32:16' for t in 'xy' for stride in ('batch', 'token', 'head')})
    for H, d, interleaved in ((128, 64, True), (1, 64, True), (12, 128, False)):
        for backward in (False, True):
            name = f'rope {"backward" if backward else "forward"} {H}x{d} {"interleaved" if interleaved else "half"}'
            yield name, _rotate, signature, tiles(H, d, interleaved, backward), 4, 3, 0
