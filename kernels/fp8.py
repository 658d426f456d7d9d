"""
FP8 (E4M3) as DeepSeek-V3 trains with it (arXiv:2412.19437, section 3.3): fine-grained scales, products promoted to float32.

    x [M, K]   in groups of 1×128:    s = max|x| / 448 over the group,  q = E4M3(x / s)     activations and gradients
    w [N, K]   in blocks of 128×128:  the same over a block                                 weights, and the released checkpoints
    y_mn = Σ_b s_mb t_nb Σ_{k in b} q_mk r_nk       b the blocks of 128 along K, t the scale of n's block or group

The inner sum of 128 products runs in the tensor cores, whose accumulator is narrower than float32 for FP8; the outer sum is float32.
A linear layer has three such products, each with its own groups along what is summed over:

    y = x Wᵀ    x by 1×128 along K, W by blocks          dx = dy W     dy by 1×128 along N, the same blocks transposed
    dW = dyᵀ x  both by 1×128 along the tokens

The reference quantises, dequantises and multiplies in float32: the same numbers but for the order of the sums, so that
`--fp8=True` on a CPU is a simulation of FP8 training. Not FP8: embedding, head, norms, router, routed experts, attention itself.
Chips before sm_89 have no FP8 and use the reference.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kernels import cdiv, chip, fused, jit, tl, working_dtype

LARGEST = 448.0    # of E4M3


def usable(x):
    return fused(x) and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9))


def quantise(x, blocks=False):
    """x [M, K] -> E4M3 [M, K], scales float32 [M, ⌈K/128⌉]; with `blocks` [⌈M/128⌉, ⌈K/128⌉]. x may be a transposed view."""
    M, K = x.shape
    if not usable(x):
        return quantise_reference(x, blocks)
    q = torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(cdiv(M, 128) if blocks else M, cdiv(K, 128), dtype=torch.float32, device=x.device)
    BM = 128 if blocks else 32
    if q.numel():
        _quantise[(cdiv(M, BM), cdiv(K, 128))](x, q, scale, M, K, x.stride(0), x.stride(1), scale.shape[1], BLOCKS=blocks, BM=BM, num_warps=8)
    return q, scale


def quantise_reference(x, blocks=False):
    M, K = x.shape
    rows = 128 if blocks else 1
    padded = F.pad(x.float(), (0, -K % 128, 0, -M % rows))
    tiled = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // 128, 128)
    scale = tiled.abs().amax((1, 3)).clamp(min=1e-30) / LARGEST
    q = (tiled / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(padded.shape)
    return q[:M, :K].contiguous(), scale


def dequantise(q, scale, dtype=torch.float32):
    """q [M, K] E4M3, scale [M or ⌈M/128⌉, ⌈K/128⌉] -> [M, K]. The hub's `weight_scale_inv` is this scale, its name notwithstanding."""
    rows = 1 if len(scale) == len(q) else 128
    if scale.shape != (cdiv(len(q), rows), cdiv(q.shape[1], 128)):
        raise ValueError(f'FP8 tensor {list(q.shape)} and scales {list(scale.shape)} do not fit blocks of {rows}×128')
    if not usable(q):
        out, wide = q.float(), scale.float().repeat_interleave(128, 1)[:, :q.shape[1]]
        if rows == 1:
            return (out * wide).to(dtype)
        for i, row in enumerate(wide):             # one row of blocks after the other: no second copy of a large matrix
            out[i * 128:(i + 1) * 128] *= row
        return out.to(dtype)
    out, scale = torch.empty(q.shape, dtype=dtype, device=q.device), scale.float().contiguous()
    if out.numel():
        _dequantise[(cdiv(len(q), 32), cdiv(q.shape[1], 128))](q.contiguous(), scale, out, *q.shape, scale.shape[1], ROWS=rows, BM=32, num_warps=8)
    return out


def matmul(a, a_scale, b, b_scale, dtype):
    """a [M, K], b [N, K] E4M3 -> a bᵀ [M, N]; a_scale [M, ⌈K/128⌉], b_scale [⌈N/128⌉ or N, ⌈K/128⌉]"""
    if not usable(a):
        return matmul_reference(a, a_scale, b, b_scale, dtype)
    (M, K), N = a.shape, len(b)
    out, group = torch.empty(M, N, dtype=dtype, device=a.device), 1 if len(b_scale) == N else 128
    if out.numel():
        sizes, warps = tiles(M, chip(a.device))
        _matmul[(cdiv(M, sizes['BM']) * cdiv(N, sizes['BN']),)](a.contiguous(), b.contiguous(), a_scale.contiguous(), b_scale.contiguous(), out,
                                                        M, N, K, a_scale.shape[1], GROUP=group, **sizes, num_warps=warps, num_stages=4)
    return out


def matmul_reference(a, a_scale, b, b_scale, dtype):
    with torch.autocast(a.device.type, enabled=False):
        return (dequantise(a, a_scale) @ dequantise(b, b_scale).T).to(dtype)


@jit
def _quantise(x, q, scale, M, K, x_m, x_k, scale_row, BLOCKS: tl.constexpr, BM: tl.constexpr):
    m, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (m < M)[:, None] & (k < K)[None, :]
    rows, cols = m[:, None].to(tl.int64), k[None, :].to(tl.int64)
    v = tl.load(x + rows * x_m + cols * x_k, mask, other=0.0).to(tl.float32)
    s = tl.maximum(tl.max(tl.abs(v), 1), 1e-30) / 448.0
    if BLOCKS:
        s = tl.max(s, 0)
        tl.store(scale + tl.program_id(0) * scale_row + tl.program_id(1), s)
        v = v / s
    else:
        tl.store(scale + m * scale_row + tl.program_id(1), s, m < M)
        v = v / s[:, None]
    tl.store(q + rows * K + cols, v.to(q.dtype.element_ty), mask)


@jit
def _dequantise(q, scale, out, M, K, scale_row, ROWS: tl.constexpr, BM: tl.constexpr):
    m, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * 128 + tl.arange(0, 128)
    mask, at = (m < M)[:, None] & (k < K)[None, :], m[:, None].to(tl.int64) * K + k[None, :]
    s = tl.load(scale + (m // ROWS) * scale_row + tl.program_id(1), m < M, other=0.0)
    tl.store(out + at, (tl.load(q + at, mask, other=0.0).to(tl.float32) * s[:, None]).to(out.dtype.element_ty), mask)


@jit
def _matmul(a, b, a_scale, b_scale, c, M, N, K, scale_row, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = pid // (8 * tiles_n)                                       # eight row tiles share a column of b in L2
    height = tl.minimum(tiles_m - group * 8, 8)
    m = (group * 8 + (pid % (8 * tiles_n)) % height) * BM + tl.arange(0, BM)
    n = (pid % (8 * tiles_n)) // height * BN + tl.arange(0, BN)
    k = tl.arange(0, 128)
    a += (m % M)[:, None].to(tl.int64) * K + k[None, :]                # rows past the end are computed from others and not stored
    b += (n % N)[None, :].to(tl.int64) * K + k[:, None]
    a_scale += m % M * scale_row
    b_scale += n % N // GROUP * scale_row
    acc = tl.zeros([BM, BN], tl.float32)
    for block in range(0, tl.cdiv(K, 128)):
        rest = K - block * 128
        product = tl.dot(tl.load(a + block * 128, (k < rest)[None, :], other=0.0), tl.load(b + block * 128, (k < rest)[:, None], other=0.0))
        acc += product * tl.load(a_scale + block)[:, None] * tl.load(b_scale + block)[None, :]
    tl.store(c + m[:, None].to(tl.int64) * N + n[None, :], acc.to(c.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


def tiles(M, sm):
    """-> constexprs and warps. Hopper holds the product and the sum of 128 columns in registers, Blackwell those of 64."""
    return dict(BM=128 if M > 64 else 64, BN=128 if sm == 90 or M <= 64 else 64), 8 if M > 64 else 4


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, dtype):
        flat = x.reshape(-1, x.shape[-1])
        w, w_scale = quantise(weight, blocks=True)
        ctx.save_for_backward(flat, w, w_scale)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
        return matmul(*quantise(flat), w, w_scale, dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, dy):
        x, w, w_scale = ctx.saved_tensors
        dy, dx, dw = dy.reshape(-1, dy.shape[-1]), None, None
        if ctx.needs_input_grad[0]:
            dx = matmul(*quantise(dy), w.T.contiguous(), w_scale.T.contiguous(), ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dw = matmul(*quantise(dy.T), *quantise(x.T), ctx.dtypes[1])
        return None if dx is None else dx.view(ctx.shape), dw, None


def linear(x, weight, bias=None):
    """x [..., K], weight [N, K], bias [N] or None -> [..., N] in x's dtype, autocast's where that is on"""
    y = LinearFunction.apply(x, weight.to(working_dtype(weight)), working_dtype(x))
    return y if bias is None else y + bias.to(y.dtype)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def convert(model):
    """Makes every nn.Linear of a Transformer's layers one of FP8, in place; names and weights stay as they are."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = Linear
    return model


def compile_cases(sm, x):
    """V3: o_proj (16384 to 7168) and the shared expert; a 1.5B dense model's MLP (1536 to 8960)."""
    sizes = dict(M='i32', N='i32:16', K='i32:16', scale_row='i32')
    product = dict(a='*fp8e4nv', b='*fp8e4nv', a_scale='*fp32', b_scale='*fp32', c=x, **sizes)
    for blocks in (True, False):
        yield (f'quantise {"128x128" if blocks else "1x128"}', _quantise,
               dict(x=x, q='*fp8e4nv', scale='*fp32', M='i32', K='i32:16', x_m='i32:16', scale_row='i32'),
               dict(BLOCKS=blocks, BM=128 if blocks else 32, x_k=1), 8, 3, 0)
    yield ('dequantise', _dequantise, dict(q='*fp8e4nv', scale='*fp32', out=x, M='i32', K='i32:16', scale_row='i32'),
           dict(ROWS=128, BM=32), 8, 3, 0)
    for M in (8192, 64):
        for group in (128, 1):
            yield f'matmul M {M}, scales 1x128 by {"128x128" if group == 128 else "1x128"}', _matmul, product, \
                dict(tiles(M, sm)[0], GROUP=group), tiles(M, sm)[1], 4, 0
