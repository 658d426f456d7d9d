"""
FP8 (E4M3) as DeepSeek-V3 trains with it (arXiv:2412.19437, section 3.3): fine-grained scales,
products promoted to float32.

    x [M, K]   groups of 1×128      s = max|x| / 448 over the group,   q = E4M3(x / s)
    w [N, K]   blocks of 128×128    the same over a block

    y_mn = Σ_b s_mb t_nb Σ_{k in b} q_mk r_nk

Activations and gradients are in groups; weights, those of the released checkpoints too, in blocks.
b runs over the blocks of 128 along K; s, q are x's and t, r are w's. The inner sum of 128 products
runs in the tensor cores, whose accumulator is narrower than float32 for FP8; the outer sum is
float32. A linear layer has three such products, each with its own groups along what is summed over:

    y  = x Wᵀ      x by 1×128 along K, W by blocks
    dx = dy W      dy by 1×128 along N, the same blocks transposed
    dW = dyᵀ x     both by 1×128 along the tokens

Plain PyTorch quantises, dequantises and multiplies in float32: the same numbers but for the order
of the sums, so that `--fp8=True` on a CPU is a simulation of FP8 training. Not FP8: embedding,
head, norms, router, routed experts, attention itself. Chips before sm_89 have no FP8 and use the
plain PyTorch.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kernels import cdiv, chip, fused, jit, tl, working_dtype

LARGEST = 448.0    # of E4M3


def usable(x):
    """Whether the Triton path is to be taken for tensor x."""
    return fused(x) and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 9))


def quantise(x, blocks=False):
    """
    x [M, K], which may be a transposed view -> E4M3 [M, K], scales float32 [M, ⌈K/128⌉]
    blocks: a scale for 128×128 numbers instead of 1×128, [⌈M/128⌉, ⌈K/128⌉]
    """
    if not usable(x):
        return quantise_torch(x, blocks)
    M, K = x.shape
    q = torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device)
    scale_rows = cdiv(M, 128) if blocks else M
    scale = torch.empty(scale_rows, cdiv(K, 128), dtype=torch.float32, device=x.device)
    if q.numel():
        BM = 128 if blocks else 32
        _quantise[(cdiv(M, BM), cdiv(K, 128))](
            x, q, scale, M, K, x.stride(0), x.stride(1), scale.shape[1],
            BLOCKS=blocks, BM=BM, num_warps=8)
    return q, scale


def dequantise(q, scale, dtype=torch.float32):
    """
    q [M, K] E4M3, scale [M or ⌈M/128⌉, ⌈K/128⌉] -> [M, K]
    The hub's `weight_scale_inv` is this scale, its name notwithstanding.
    Raises ValueError for scales of another shape.
    """
    M, K = q.shape
    group = 1 if len(scale) == M else 128
    if scale.shape != (cdiv(M, group), cdiv(K, 128)):
        raise ValueError(f'FP8 tensor {list(q.shape)} and scales {list(scale.shape)} '
                         f'do not fit blocks of {group}×128')
    if not usable(q):
        return dequantise_torch(q, scale, dtype, group)
    scale = scale.float().contiguous()
    x = torch.empty(q.shape, dtype=dtype, device=q.device)
    if x.numel():
        _dequantise[(cdiv(M, 32), cdiv(K, 128))](
            q.contiguous(), scale, x, M, K, scale.shape[1], GROUP=group, BM=32, num_warps=8)
    return x


def matmul(a, a_scale, b, b_scale, dtype):
    """
    a [M, K] E4M3, a_scale [M, ⌈K/128⌉], b [N, K] E4M3, b_scale [⌈N/128⌉ or N, ⌈K/128⌉]
    -> a bᵀ [M, N] in dtype
    """
    if not usable(a):
        return matmul_torch(a, a_scale, b, b_scale, dtype)
    M, K = a.shape
    N = len(b)
    out = torch.empty(M, N, dtype=dtype, device=a.device)
    if out.numel():
        sizes, warps = tiles(M, chip(a.device))
        group = 1 if len(b_scale) == N else 128
        _matmul[(cdiv(M, sizes['BM']) * cdiv(N, sizes['BN']),)](
            a.contiguous(), b.contiguous(), a_scale.contiguous(), b_scale.contiguous(), out,
            M, N, K, a_scale.shape[1],
            GROUP=group, **sizes, num_warps=warps, num_stages=4)
    return out


# ---- plain PyTorch ----

def quantise_torch(x, blocks=False):
    M, K = x.shape
    group = 128 if blocks else 1
    padded = F.pad(x.float(), (0, -K % 128, 0, -M % group))
    tiled = padded.view(padded.shape[0] // group, group, padded.shape[1] // 128, 128)
    scale = tiled.abs().amax((1, 3)).clamp(min=1e-30) / LARGEST
    q = (tiled / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(padded.shape)
    return q[:M, :K].contiguous(), scale


def dequantise_torch(q, scale, dtype, group):
    x = q.float()
    wide = scale.float().repeat_interleave(128, 1)[:, :q.shape[1]]
    if group == 1:
        return (x * wide).to(dtype)
    for i, row in enumerate(wide):      # one row of blocks at a time: no second large matrix
        x[i * 128:(i + 1) * 128] *= row
    return x.to(dtype)


def matmul_torch(a, a_scale, b, b_scale, dtype):
    with torch.autocast(a.device.type, enabled=False):
        return (dequantise(a, a_scale) @ dequantise(b, b_scale).T).to(dtype)


# ---- Triton ----

@jit
def _quantise(
    x_ptr, q_ptr, scale_ptr,
    M, K, stride_xm, stride_xk, stride_scale,
    BLOCKS: tl.constexpr, BM: tl.constexpr,
):
    """
    A program takes BM rows and 128 columns: BM groups, or with BLOCKS one block of BM = 128 rows.

    reads     x [M, K], any strides
    writes    q [M, K] E4M3; scale [M, ⌈K/128⌉], with BLOCKS [⌈M/128⌉, ⌈K/128⌉], float32
    bound     memory: 3 M K bytes for bf16
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (m < M)[:, None] & (k < K)[None, :]
    rows = m[:, None].to(tl.int64)
    cols = k[None, :].to(tl.int64)
    x = tl.load(x_ptr + rows * stride_xm + cols * stride_xk, mask, other=0.0).to(tl.float32)

    s = tl.maximum(tl.max(tl.abs(x), 1), 1e-30) / 448.0
    if BLOCKS:
        s = tl.max(s, 0)
        tl.store(scale_ptr + tl.program_id(0) * stride_scale + tl.program_id(1), s)
        x = x / s
    else:
        tl.store(scale_ptr + m * stride_scale + tl.program_id(1), s, m < M)
        x = x / s[:, None]
    tl.store(q_ptr + rows * K + cols, x.to(q_ptr.dtype.element_ty), mask)


@jit
def _dequantise(
    q_ptr, scale_ptr, x_ptr,
    M, K, stride_scale,
    GROUP: tl.constexpr, BM: tl.constexpr,
):
    """
    A program takes BM rows and 128 columns.

    reads     q [M, K] E4M3; scale [⌈M/GROUP⌉, ⌈K/128⌉] float32
    writes    x [M, K]
    bound     memory: 3 M K bytes for bf16
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (m < M)[:, None] & (k < K)[None, :]
    at = m[:, None].to(tl.int64) * K + k[None, :]
    s = tl.load(scale_ptr + (m // GROUP) * stride_scale + tl.program_id(1), m < M, other=0.0)
    q = tl.load(q_ptr + at, mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, (q * s[:, None]).to(x_ptr.dtype.element_ty), mask)


@jit
def _matmul(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, out_ptr,
    M, N, K, stride_scale,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """
    A program takes a tile [BM, BN]; eight row tiles share a column of b in L2.

    reads     a [M, K], b [N, K] E4M3; a_scale [M, ⌈K/128⌉], b_scale [⌈N/GROUP⌉, ⌈K/128⌉] float32
    writes    out [M, N]
    bound     the product: 2 M N K operations in FP8, which has twice bf16's rate
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    group = pid // (8 * tiles_n)
    height = tl.minimum(tiles_m - group * 8, 8)
    m = (group * 8 + (pid % (8 * tiles_n)) % height) * BM + tl.arange(0, BM)
    n = (pid % (8 * tiles_n)) // height * BN + tl.arange(0, BN)
    k = tl.arange(0, 128)

    # rows past the end are computed from others and not stored
    a_ptr += (m % M)[:, None].to(tl.int64) * K + k[None, :]
    b_ptr += (n % N)[None, :].to(tl.int64) * K + k[:, None]
    a_scale_ptr += m % M * stride_scale
    b_scale_ptr += n % N // GROUP * stride_scale
    acc = tl.zeros([BM, BN], tl.float32)
    for block in range(0, tl.cdiv(K, 128)):
        rest = K - block * 128
        a = tl.load(a_ptr + block * 128, (k < rest)[None, :], other=0.0)
        b = tl.load(b_ptr + block * 128, (k < rest)[:, None], other=0.0)
        product = tl.dot(a, b)
        a_scale = tl.load(a_scale_ptr + block)
        b_scale = tl.load(b_scale_ptr + block)
        acc += product * a_scale[:, None] * b_scale[None, :]

    out_at = out_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


def tiles(M, sm):
    """
    -> constexprs of _matmul and warps. Hopper holds the product and the sum of 128 columns in
    registers, Blackwell those of 64.
    """
    if M <= 64:
        return dict(BM=64, BN=128), 4
    return dict(BM=128, BN=128 if sm == 90 else 64), 8


# ---- autograd ----

class LinearFunction(torch.autograd.Function):
    """y = x Wᵀ, dx = dy W and dW = dyᵀ x, each of freshly quantised operands"""

    @staticmethod
    def forward(ctx, x, weight, dtype):
        x_MK = x.reshape(-1, x.shape[-1])
        w, w_scale = quantise(weight, blocks=True)
        ctx.save_for_backward(x_MK, w, w_scale)
        ctx.shape = x.shape
        ctx.dtypes = x.dtype, weight.dtype
        return matmul(*quantise(x_MK), w, w_scale, dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, dy):
        x, w, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = matmul(*quantise(dy), w.T.contiguous(), w_scale.T.contiguous(), x_dtype)
            dx = dx.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw = matmul(*quantise(dy.T), *quantise(x.T), w_dtype)
        return dx, dw, None


def linear(x, weight, bias=None):
    """x [..., K], weight [N, K], bias [N] or None -> [..., N] in x's dtype, or autocast's"""
    y = LinearFunction.apply(x, weight.to(working_dtype(weight)), working_dtype(x))
    return y if bias is None else y + bias.to(y.dtype)


class FP8Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def convert(model):
    """Makes every nn.Linear of a Transformer's layers one of FP8, in place; names stay."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = FP8Linear
    return model


# ---- what is compiled ahead of time ----

def compile_cases(sm, x):
    """V3: o_proj (16384 to 7168) and the shared expert; a 1.5B dense model's MLP (1536 to 8960)"""
    narrow = '*fp8e4nv'
    signature = dict(x_ptr=x, q_ptr=narrow, scale_ptr='*fp32',
                     M='i32', K='i32:16', stride_xm='i32:16', stride_scale='i32')
    for blocks in (True, False):
        name = f'quantise {"128x128" if blocks else "1x128"}'
        constexprs = dict(BLOCKS=blocks, BM=128 if blocks else 32, stride_xk=1)
        yield name, _quantise, signature, constexprs, 8, 3, 0

    signature = dict(q_ptr=narrow, scale_ptr='*fp32', x_ptr=x,
                     M='i32', K='i32:16', stride_scale='i32')
    yield 'dequantise', _dequantise, signature, dict(GROUP=128, BM=32), 8, 3, 0

    signature = dict(a_ptr=narrow, b_ptr=narrow, a_scale_ptr='*fp32', b_scale_ptr='*fp32',
                     out_ptr=x, M='i32', N='i32:16', K='i32:16', stride_scale='i32')
    for M in (8192, 64):
        sizes, warps = tiles(M, sm)
        for group in (128, 1):
            name = f'matmul M {M}, scales 1x128 by {group}x128'
            yield name, _matmul, signature, dict(sizes, GROUP=group), warps, 4, 0
