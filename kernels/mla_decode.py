"""
Decoding attention on the latent cache: one or two new tokens of every slot against [c | rope key],
split over the keys.

    s = scale q·[c, k_rope]       q = [W_UKᵀ q_nope, q_rope], the absorbed query of a head, [c + r]
    o = sum_j softmax(s)_j c_j    the latent is the value too: a tile of the cache is loaded once

The keys of a slot are two regions: its prompt, stored once for all samples of a group, and what the
slot itself generated. The rows (token, head) of all slots of a prompt attend to the prompt as one
matrix, so a group reads its prompt once; then every slot reads its own entries. Each region is cut
into splits, one program each (flash decoding: a few slots still fill the GPU), that leave a partial
o and its lse; a second kernel weighs the parts by softmax over their lse.

    o = sum_i exp(lse_i - lse) o_i,    lse = log sum_i exp(lse_i)

The products are transposed, s = K qᵀ [keys, rows] and o = Kᵀ p [c, rows], so that the long
sides are the rows of Hopper's 64-row matrix instruction and as few as 16 heads waste nothing.
Lengths stay on the GPU: nothing here waits for it. No backward pass.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kernels import cdiv, chip, fused, jit, next_power_of_2, room, tl


def mla_decode(q, cache, length, scale, c, prefix=None, prefix_length=None, prompt=None, group=None,
               rows_of=None):
    """q [S, T, H, W] the T newest tokens of S slots, W = c + r; cache [S, L, W] what the slots
    generated; length [S] int, the entries of each that its first new token sees, itself included
    (the next token sees one more) -> [S, T, H, c] in q's dtype. A slot of prefix and length 0 gives
    zeros.

    prefix [P, Lp, W], prefix_length [P] >= 1 and prompt [S]: prompts that all tokens see, and each
        slot's number among them; the numbers must not decrease from slot to slot
    group: at most so many slots have the same one (default S; smaller saves empty programs)
    rows_of [S]: the row of the cache that each slot reads, where they lie in another order
    """
    check(q, cache, c, prefix, prompt, rows_of)
    if not fused(q):
        cache = cache if rows_of is None else cache[rows_of]
        return decode_torch(q, cache, length, scale, c, prefix, prefix_length, prompt)

    S, T, H, W = q.shape
    rows = S * T * H
    q = q.contiguous()
    slots = torch.arange(S, dtype=torch.int32, device=q.device)
    own = slots if rows_of is None else rows_of.int()
    regions = [Keys(cache, own, slots, slots + 1, length.int(), at_once=1, step=1)]
    if prefix is not None:
        regions.insert(0, keys_of_prompts(prefix, prefix_length, prompt, min(group or S, S)))
    plans = [splits_of(region.entries, region.at_once * T * H, q.device) for region in regions]

    parts = sum(splits for _, splits, _ in plans)
    part = torch.empty(parts, rows, c, dtype=torch.float32, device=q.device)
    lse = torch.full((parts, rows), float('-inf'), dtype=torch.float32, device=q.device)
    at = 0
    for region, (R, splits, share) in zip(regions, plans):
        if region.entries.numel():
            launch_partial(q, region, part[at:], lse[at:], scale, c, R, splits, share)
        at += splits

    o = torch.empty(S, T, H, c, dtype=q.dtype, device=q.device)
    if rows:
        _merge[(rows,)](part, lse, o, parts, rows, c=c, C=next_power_of_2(c),
                        PARTS=next_power_of_2(parts), num_warps=4)
    return o


def check(q, cache, c, prefix, prompt, rows_of):
    S, _, _, W = q.shape
    wrong = cache.shape[2] != W or not 0 < c < W
    wrong |= rows_of is None and len(cache) != S
    wrong |= (prefix is None) != (prompt is None)
    wrong |= prefix is not None and prefix.shape[2] != W
    if wrong:
        raise ValueError(
            f'mla_decode: q {list(q.shape)}, cache {list(cache.shape)}, '
            f'prefix {None if prefix is None else list(prefix.shape)}, c={c}: '
            'want [S, T, H, W], [S, L, W], [P, Lp, W] with c < W, and prefix and prompt both or '
            'neither')


def decode_torch(q, cache, length, scale, c, prefix=None, prefix_length=None, prompt=None):
    """One softmax over both regions; float32 scores, the product with the values in q's dtype."""
    S, T, H, W = q.shape
    steps = torch.arange(T, device=q.device)
    keys = cache
    seen = length[:, None] + steps                                                   # [S, T]
    visible = torch.arange(cache.shape[1], device=q.device) < seen[:, :, None]       # [S, T, L]
    if prefix is not None:
        keys = torch.cat([prefix[prompt], cache], dim=1)
        in_prefix = torch.arange(prefix.shape[1], device=q.device) < prefix_length[prompt][:, None]
        visible = torch.cat([in_prefix[:, None].expand(-1, T, -1), visible], dim=-1)
    scores = torch.matmul(q.flatten(1, 2), keys.transpose(1, 2)).view(S, T, H, -1)
    scores = (scores.double() if q.dtype == torch.float64 else scores.float()) * scale
    p = scores.masked_fill(~visible[:, :, None], float('-inf')).softmax(dim=-1).nan_to_num(0.0)
    return torch.matmul(p.to(q.dtype).flatten(1, 2), keys[..., :c]).view(S, T, H, c)


# ------------------------------------------------------------------------------------------
# Triton


@dataclass
class Keys:
    """A region of keys, in units: a prompt, or what one slot generated. Unit u's keys are
    entries[which[u]], and the slots first[u] to past[u] read them."""
    entries: torch.Tensor       # [rows, keys, W]
    which: torch.Tensor         # [units]
    first: torch.Tensor
    past: torch.Tensor
    length: torch.Tensor        # [units], keys that are there
    at_once: int                # slots that read one unit, at most
    step: int                   # keys that each next new token of a slot sees more


def keys_of_prompts(prefix, prefix_length, prompt, at_once):
    numbers = torch.arange(len(prefix), dtype=prompt.dtype, device=prefix.device)
    prompt = prompt.contiguous()
    first = torch.searchsorted(prompt, numbers, out_int32=True)
    past = torch.searchsorted(prompt, numbers, right=True, out_int32=True)
    return Keys(prefix, numbers.int(), first, past, prefix_length.int(), at_once, step=0)


def launch_partial(q, region, part, lse, scale, c, R, splits, share):
    """Leaves what one region's splits give in part [splits.., rows, c] and lse [splits.., rows]"""
    S, T, H, W = q.shape
    entries = region.entries
    entries = entries if entries.stride(2) == 1 else entries.contiguous()
    sizes, options = blocks(chip(q.device), q.itemsize, R, W, c)
    grid = cdiv(region.at_once * T * H, R), splits, len(region.which)
    _partial[grid](
        q, entries, region.which, part, lse, region.first, region.past, region.length,
        S * T * H, entries.shape[1], T, H, share, scale / math.log(2),
        entries.stride(0), entries.stride(1), **sizes, STEP=region.step, **options)


@jit
def _chunked(q, q_mask, k, k_mask, W: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
             CHUNK: tl.constexpr):
    """k qᵀ [N, R] of R queries and N keys, CHUNK columns at a time"""
    s = tl.zeros([N, R], tl.float32)
    for d in range(0, W, CHUNK):
        col = d + tl.arange(0, CHUNK)
        k_d = tl.load(k + col[None, :], k_mask & (col < W)[None, :], other=0.0)
        q_d = tl.load(q + col[:, None], q_mask & (col < W)[:, None], other=0.0)
        s = tl.dot(k_d, q_d, s, input_precision='ieee')
    return s


@jit
def _partial(
    q, entries, which, part, lse, first, past, length, rows, keys, T, H, share, scale,
    unit_stride, key_stride, W: tl.constexpr, c: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    ROPE: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):
    """R rows of the slots first..past of a unit (a prompt, or one slot) against `share` of its
    entries. part, lse: from this region's first split on. A program without rows or keys leaves lse
    at -inf and part as it was. With CHUNK (float32: no tensor cores, and whole queries held over
    the loop would fill the registers) both sides of q k are read anew, so many columns at a
    time."""
    split = tl.program_id(1)
    unit = tl.program_id(2)
    begin = tl.load(first + unit) * T * H
    row = begin + tl.program_id(0) * R + tl.arange(0, R)
    mine = row < tl.load(past + unit) * T * H

    # the keys that each row sees, and those of this split
    limit = tl.minimum(tl.load(length + unit) + row // H % T * STEP, keys)
    lo = split * share
    hi = tl.minimum(split * share + share, tl.max(tl.where(mine, limit, 0), 0))
    if lo < hi:
        latent = tl.arange(0, C)
        rope = tl.arange(0, ROPE)
        is_latent = latent < c
        is_rope = rope < W - c
        queries = q + row.to(tl.int64)[None, :] * W
        q_c = tl.load(queries + latent[:, None], mine[None, :] & is_latent[:, None], other=0.0)
        q_r = tl.load(queries + c + rope[:, None], mine[None, :] & is_rope[:, None], other=0.0)
        first_entry = entries + tl.load(which + unit) * tl.cast(unit_stride, tl.int64)
        acc = tl.zeros([C, R], tl.float32)
        total = tl.zeros([R], tl.float32)
        top = tl.full([R], -1e30, tl.float32)
        for j in range(lo, hi, N):
            key = j + tl.arange(0, N)
            there = (key < hi)[:, None]
            at = first_entry + key[:, None] * key_stride
            k_c = tl.load(at + latent[None, :], there & is_latent[None, :], other=0.0)      # [N, C]
            k_r = tl.load(at + c + rope[None, :], there & is_rope[None, :], other=0.0)
            if CHUNK:
                s = _chunked(queries, mine[None, :], at, there, W, R, N, CHUNK)
            else:
                s = tl.dot(k_c, q_c, input_precision='ieee')                                # [N, R]
                s = tl.dot(k_r, q_r, s, input_precision='ieee')
            s *= scale
            s = tl.where(there & (key[:, None] < limit[None, :]), s, -1e30)
            new = tl.maximum(top, tl.max(s, 0))
            p = tl.where(s > -1e30, tl.exp2(s - new[None, :]), 0.0)
            old = tl.exp2(top - new)
            total = total * old + tl.sum(p, 0)
            top = new
            acc = tl.dot(tl.trans(k_c), p.to(k_c.dtype), acc * old[None, :], input_precision='ieee')
        out = split * tl.cast(rows, tl.int64) + row
        o = acc / tl.maximum(total, 1e-30)[None, :]
        tl.store(part + out[None, :] * c + latent[:, None], o, mine[None, :] & is_latent[:, None])
        empty = float('-inf')
        log_total = top + tl.log2(tl.maximum(total, 1e-30))
        tl.store(lse + out, tl.where(total > 0, log_total, empty), mine)


@jit
def _merge(part, lse, o, parts, rows, c: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """One row a program: its parts weighed by 2^(lse_i - lse). Parts of weight 0 are not read; they
    may never have been written."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PARTS)
    cols = tl.arange(0, C)
    step = tl.cast(rows, tl.int64)
    every = tl.load(lse + i * step + row, i < parts, other=float('-inf'))
    top = tl.maximum(tl.max(every, 0), -1e30)
    total = 0.0
    acc = tl.zeros([C], tl.float32)
    for p in range(parts):
        weight = tl.exp2(tl.load(lse + p * step + row) - top)
        total += weight
        read = tl.where(weight > 0, cols, c) < c
        acc += weight * tl.load(part + (p * step + row) * c + cols, read, other=0.0)
    value = acc / tl.maximum(total, 1e-30)
    tl.store(o + row * c + cols, value.to(o.dtype.element_ty), cols < c)


def blocks(sm, itemsize, R, W, c):
    """-> constexprs and launch options for R rows a program"""
    half = itemsize == 2
    hopper = 90 <= sm < 100
    if not half:
        N = 16
    else:
        N = 32 if room(sm) < 100 else 64
    sizes = dict(W=W, c=c, C=max(16, next_power_of_2(c)), R=R, ROPE=max(16, next_power_of_2(W - c)),
                 N=N, CHUNK=0 if half else 32)
    warps = 4 if R == 16 and hopper and half else 8
    return sizes, dict(num_warps=warps, num_stages=2 if half and hopper else 1)


def splits_of(entries, rows, device):
    """-> rows a program, splits, keys a split (a multiple of 64): two programs for every
    multiprocessor, but not under 128 keys a split"""
    most = 32 if entries.itemsize == 2 else 16     # more would spill registers
    R = min(most, max(16, next_power_of_2(rows)))
    processors = 4
    if device.type == 'cuda':
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    keys = entries.shape[1]
    units = max(1, len(entries) * cdiv(rows, R))
    splits = max(1, min(cdiv(2 * processors, units), keys // 128))
    share = cdiv(cdiv(keys, splits), 64) * 64
    return R, max(1, cdiv(keys, share or 1)), share or 64


# ------------------------------------------------------------------------------------------
# compiled without a GPU, see kernels/aot.py


def compile_cases(sm, x):
    """V3's latent with 16 heads (its share of a GPU among eight), and with all 128 or a group's
    heads in blocks of 32, for float32 always of 16. A dense model decodes without a latent."""
    half = x == '*bf16'
    types = dict(q=x, entries=x, part='*fp32', lse='*fp32', scale='fp32')
    types |= dict.fromkeys(('which', 'first', 'past', 'length'), '*i32')
    types |= dict.fromkeys(('rows', 'keys', 'T', 'H', 'share'), 'i32')
    types |= dict.fromkeys(('unit_stride', 'key_stride'), 'i32:16')
    for R in (16, 32) if half else (16,):
        sizes, options = blocks(sm, 2 if half else 4, R, 576, 512)
        sizes['STEP'] = 1
        tolerated = {80: 32, 100: 32 if R == 16 else 160}.get(sm, 0) if half else 0
        yield f'partial 512+64, {R} rows', _partial, types, sizes, *options.values(), tolerated
    merged = dict(part='*fp32', lse='*fp32', o=x, parts='i32', rows='i32')
    yield 'merge', _merge, merged, dict(c=512, C=512, PARTS=8), 4, 3, 0
