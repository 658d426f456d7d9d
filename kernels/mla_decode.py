"""
Decoding attention on the latent cache: one or two new tokens of every slot against [c | rope key], split over the keys.

    s = scale q·[c, k_rope]       q = [W_UKᵀ q_nope, q_rope], the absorbed query of a head, [c + r]
    o = sum_j softmax(s)_j c_j    the latent is the value too: every tile of the cache is loaded once and used twice

The keys of a slot are two regions: its prompt, stored once for all samples of a group, and what the slot itself generated. The rows
(token, head) of all slots of a prompt attend to the prompt as one matrix, so a group reads its prompt once; then every slot reads its
own entries. Each region is cut into splits, one program each (flash decoding: a few slots still fill the GPU), that leave a partial
o and its lse; a second kernel weighs the parts by softmax over their lse.

    o = sum_i exp(lse_i - lse) o_i,    lse = log sum_i exp(lse_i)

The products are transposed, s = K qᵀ [keys, rows] and o = Kᵀ p [c, rows], so that the long sides are the rows of Hopper's 64-row
matrix instruction and as few as 16 heads waste nothing. Lengths stay on the GPU: nothing here waits for it. No backward pass.
"""
from __future__ import annotations

import math

import torch

from kernels import cdiv, chip, fused, jit, next_power_of_2, room, tl


def mla_decode(q, cache, length, scale, c, prefix=None, prefix_length=None, prompt=None, group=None, rows_of=None):
    """q [S, T, H, W] the T newest tokens of S slots, W = c + r; cache [S, L, W] what the slots generated; length [S] int, the entries of
    each that its first new token sees, itself included (the next token sees one more) -> [S, T, H, c] in q's dtype.
    prefix [P, Lp, W], prefix_length [P] >= 1 and prompt [S]: prompts that all tokens see, and each slot's number among them. The numbers must
    not decrease from slot to slot. group: at most so many slots have the same one (default S; smaller saves empty programs).
    A slot of prefix and length 0 gives zeros. rows_of [S]: the row of the cache that each slot reads, where they lie in another order."""
    S, T, H, W = q.shape
    if cache.shape[2] != W or (rows_of is None and len(cache) != S) or not 0 < c < W or (prefix is None) != (prompt is None) \
            or (prefix is not None and prefix.shape[2] != W):
        raise ValueError(f'mla_decode: q {list(q.shape)}, cache {list(cache.shape)}, prefix {None if prefix is None else list(prefix.shape)}, '
                         f'c={c}: want [S, T, H, W], [S, L, W], [P, Lp, W] with c < W, and prefix and prompt both or neither')
    if not fused(q):
        return reference(q, cache if rows_of is None else cache[rows_of], length, scale, c, prefix, prefix_length, prompt)
    q, rows = q.contiguous(), S * T * H
    own = torch.arange(S, dtype=torch.int32, device=q.device)
    # entries, which of them, first slot and past the last, length, slots at most, step
    regions = [(cache, own if rows_of is None else rows_of.int(), own, own + 1, length.int(), 1, 1)]
    if prefix is not None:
        numbers = torch.arange(len(prefix), dtype=prompt.dtype, device=q.device)
        first, past = (torch.searchsorted(prompt.contiguous(), numbers, right=right, out_int32=True) for right in (False, True))
        regions.insert(0, (prefix, numbers.int(), first, past, prefix_length.int(), min(group or S, S), 0))
    plans = [plan(entries, slots * T * H, q.device) for entries, _, _, _, _, slots, _ in regions]
    parts = sum(splits for _, splits, _ in plans)
    part = torch.empty(parts, rows, c, dtype=torch.float32, device=q.device)
    lse = torch.full((parts, rows), float('-inf'), dtype=torch.float32, device=q.device)
    at = 0
    for (entries, which, first, past, lengths, slots, step), (R, splits, share) in zip(regions, plans):
        sizes, options = blocks(chip(q.device), q.itemsize, R, W, c)
        if entries.numel():
            entries = entries if entries.stride(2) == 1 else entries.contiguous()
            _partial[(cdiv(slots * T * H, R), splits, len(which))](
                q, entries, which, part[at:], lse[at:], first, past, lengths, rows, entries.shape[1], T, H, share, scale / math.log(2),
                entries.stride(0), entries.stride(1), **sizes, STEP=step, **options)
        at += splits
    o = torch.empty(S, T, H, c, dtype=q.dtype, device=q.device)
    if rows:
        _merge[(rows,)](part, lse, o, parts, rows, c=c, C=next_power_of_2(c), PARTS=next_power_of_2(parts), num_warps=4)
    return o


def reference(q, cache, length, scale, c, prefix=None, prefix_length=None, prompt=None):
    """One softmax over both regions; float32 scores, the product with the values in q's dtype."""
    S, T, H, W = q.shape
    steps = torch.arange(T, device=q.device)
    keys, visible = cache, torch.arange(cache.shape[1], device=q.device) < (length[:, None] + steps)[:, :, None]           # [S, T, L]
    if prefix is not None:
        keys = torch.cat([prefix[prompt], cache], dim=1)
        seen = torch.arange(prefix.shape[1], device=q.device) < prefix_length[prompt][:, None]
        visible = torch.cat([seen[:, None].expand(-1, T, -1), visible], dim=-1)
    scores = torch.matmul(q.flatten(1, 2), keys.transpose(1, 2)).view(S, T, H, -1)
    scores = (scores.double() if q.dtype == torch.float64 else scores.float()) * scale
    p = scores.masked_fill(~visible[:, :, None], float('-inf')).softmax(dim=-1).nan_to_num(0.0)
    return torch.matmul(p.to(q.dtype).flatten(1, 2), keys[..., :c]).view(S, T, H, c)


# ---------------------------------------------------------------------------------------------------------------------
# Triton


@jit
def _partial(q, entries, which, part, lse, first, past, length, rows, keys, T, H, share, scale, unit_stride, key_stride, W: tl.constexpr,
             c: tl.constexpr, C: tl.constexpr, R: tl.constexpr, ROPE: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """R rows of the slots first..past of a unit (a prompt, or one slot) against `share` of its entries. part, lse: from this region's
    first split on. A program without rows or keys leaves lse at -inf and part as it was. With CHUNK (float32: no tensor cores, and whole
    queries held over the loop would fill the registers) both sides of q k are read anew, so many columns at a time."""
    split, unit = tl.program_id(1), tl.program_id(2)
    begin = tl.load(first + unit) * T * H
    row = begin + tl.program_id(0) * R + tl.arange(0, R)
    mine = row < tl.load(past + unit) * T * H
    limit = tl.minimum(tl.load(length + unit) + row // H % T * STEP, keys)         # keys that each row sees
    lo, hi = split * share, tl.minimum(split * share + share, tl.max(tl.where(mine, limit, 0), 0))
    if lo < hi:
        latent, rope = tl.arange(0, C), tl.arange(0, ROPE)
        queries = q + row.to(tl.int64)[None, :] * W
        q_c = tl.load(queries + latent[:, None], mine[None, :] & (latent < c)[:, None], other=0.0)                       # [C, R]
        q_r = tl.load(queries + c + rope[:, None], mine[None, :] & (rope < W - c)[:, None], other=0.0)                   # [ROPE, R]
        first_entry = entries + tl.load(which + unit) * tl.cast(unit_stride, tl.int64)
        acc, total, top = tl.zeros([C, R], tl.float32), tl.zeros([R], tl.float32), tl.full([R], -1e30, tl.float32)
        for j in range(lo, hi, N):
            key = j + tl.arange(0, N)
            at = first_entry + key[:, None] * key_stride
            k_c = tl.load(at + latent[None, :], (key < hi)[:, None] & (latent < c)[None, :], other=0.0)            # [N, C]
            k_r = tl.load(at + c + rope[None, :], (key < hi)[:, None] & (rope < W - c)[None, :], other=0.0)
            if CHUNK:
                s = tl.zeros([N, R], tl.float32)
                for d in range(0, W, CHUNK):
                    col = d + tl.arange(0, CHUNK)
                    s = tl.dot(tl.load(at + col[None, :], (key < hi)[:, None] & (col < W)[None, :], other=0.0),
                               tl.load(queries + col[:, None], mine[None, :] & (col < W)[:, None], other=0.0), s, input_precision='ieee')
            else:
                s = tl.dot(k_r, q_r, tl.dot(k_c, q_c, input_precision='ieee'), input_precision='ieee')             # [N, R]
            s *= scale
            s = tl.where((key[:, None] < hi) & (key[:, None] < limit[None, :]), s, -1e30)
            new = tl.maximum(top, tl.max(s, 0))
            p, old = tl.where(s > -1e30, tl.exp2(s - new[None, :]), 0.0), tl.exp2(top - new)
            total, top = total * old + tl.sum(p, 0), new
            acc = tl.dot(tl.trans(k_c), p.to(k_c.dtype), acc * old[None, :], input_precision='ieee')
        out = (split * tl.cast(rows, tl.int64) + row)[None, :] * c + latent[:, None]
        tl.store(part + out, acc / tl.maximum(total, 1e-30)[None, :], mine[None, :] & (latent < c)[:, None])
        tl.store(lse + split * tl.cast(rows, tl.int64) + row, tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), float('-inf')), mine)


@jit
def _merge(part, lse, o, parts, rows, c: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """One row a program: its parts weighed by 2^(lse_i - lse). Parts of weight 0 are not read; they may never have been written."""
    row = tl.program_id(0).to(tl.int64)
    i, cols = tl.arange(0, PARTS), tl.arange(0, C)
    top = tl.maximum(tl.max(tl.load(lse + i * tl.cast(rows, tl.int64) + row, i < parts, other=float('-inf')), 0), -1e30)
    total, acc = 0.0, tl.zeros([C], tl.float32)
    for p in range(parts):
        weight = tl.exp2(tl.load(lse + p * tl.cast(rows, tl.int64) + row) - top)
        total += weight
        acc += weight * tl.load(part + (p * tl.cast(rows, tl.int64) + row) * c + cols, tl.where(weight > 0, cols, c) < c, other=0.0)
    tl.store(o + row * c + cols, (acc / tl.maximum(total, 1e-30)).to(o.dtype.element_ty), cols < c)


def blocks(sm, itemsize, R, W, c):
    """-> constexprs and launch options for R rows a program"""
    N, hopper = 16 if itemsize > 2 else 32 if room(sm) < 100 else 64, 90 <= sm < 100
    return dict(W=W, c=c, C=max(16, next_power_of_2(c)), R=R, ROPE=max(16, next_power_of_2(W - c)), N=N, CHUNK=32 if itemsize > 2 else 0), \
        dict(num_warps=4 if R == 16 and hopper and itemsize == 2 else 8, num_stages=2 if itemsize == 2 and hopper else 1)


def plan(entries, rows, device):
    """-> rows a program, splits, keys a split (a multiple of 64): two programs for every multiprocessor, but not under 128 keys a split"""
    R = min(32 if entries.itemsize == 2 else 16, max(16, next_power_of_2(rows)))   # more would spill registers
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 4
    units, keys = max(1, len(entries) * cdiv(rows, R)), entries.shape[1]
    splits = max(1, min(cdiv(2 * processors, units), keys // 128))
    share = cdiv(cdiv(keys, splits), 64) * 64
    return R, max(1, cdiv(keys, share or 1)), share or 64


def compile_cases(sm, x):
    """V3's latent with 16 heads (its share of a GPU among eight), and with all 128 or a group's heads in blocks of 32, for float32 always of
    16. A dense model decodes without a latent."""
    numbers = {name: 'i32' for name in ('rows', 'keys', 'T', 'H', 'share')} | {'unit_stride': 'i32:16', 'key_stride': 'i32:16', 'scale': 'fp32'}
    pointers = dict(q=x, entries=x, which='*i32', part='*fp32', lse='*fp32', first='*i32', past='*i32', length='*i32')
    for R in (16, 32) if x == '*bf16' else (16,):
        sizes, options = blocks(sm, 2 if x == '*bf16' else 4, R, 576, 512)
        spills = {80: 32, 100: 32 if R == 16 else 160}.get(sm, 0) if x == '*bf16' else 0
        yield f'partial 512+64, {R} rows', _partial, pointers | numbers, {**sizes, 'STEP': 1}, *options.values(), spills
    yield 'merge', _merge, dict(part='*fp32', lse='*fp32', o=x, parts='i32', rows='i32'), dict(c=512, C=512, PARTS=8), 4, 3, 0
