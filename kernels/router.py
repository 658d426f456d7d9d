"""
The router of a mixture of experts, and the order in which its experts take the tokens.

    z = x W                       the router's logits
    s = softmax(z) (V2) or σ(z) (V3)
    choice = s + b                inside the best groups, −∞ outside
    e_1..e_K = top K of choice
    w_k = scale · s_{e_k} / S     S = Σ_j s_{e_j} if `normalise`, else 1

A group is as good as its best expert (V2) or its two best (V3). Gradients flow through w and s, not
through the choice nor b:

    ds_{e_k} = scale (dw_k − Σ_j dw_j s_{e_j} / S) / S
    dz = ds ⊙ s (1 − s)  or  s ⊙ (ds − Σ s ds)

`by_expert` sorts the N K slots (token, k) by expert, stably, in three passes: each block of slots
counts its experts, a cumulative sum over [blocks, E] says where each block's share of each expert
begins, and each block places its slots. The counts never leave the GPU.
"""
from __future__ import annotations

import torch

from kernels import cdiv, fused, jit, next_power_of_2, tl


def route(
    logits, bias, K, groups=1, top_groups=1, sigmoid=True, normalise=True, scale=1.0, chosen=None,
):
    """
    logits [N, E] float32, bias [E] or None
    -> weights [N, K] float32, experts [N, K] int64, scores [N, E]

    The groups are ranked by their two best where there is a bias (V3), else by their best.
    chosen [N, K] replays an earlier choice.
    """
    how = K, groups, top_groups, sigmoid, normalise, scale, chosen
    if fused(logits):
        return Route.apply(logits, bias, *how)
    return route_torch(logits, bias, *how)


# ---- plain PyTorch ----

def route_torch(
    logits, bias, K, groups=1, top_groups=1, sigmoid=True, normalise=True, scale=1.0, chosen=None,
):
    scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
    if chosen is None:
        choice = scores.detach() + (0 if bias is None else bias)
        if top_groups < groups:
            choice = mask_groups(choice, groups, top_groups, best=1 if bias is None else 2)
        chosen = choice.topk(K, dim=-1).indices
    weights = scores.gather(1, chosen)
    if normalise and K > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, chosen, scores


def mask_groups(choice, groups, top_groups, best):
    """choice [N, E] -> the same, −∞ outside the groups whose `best` best experts sum to most"""
    grouped = choice.view(len(choice), groups, -1)
    group_score = grouped.topk(best, dim=-1).values.sum(-1)
    top = group_score.topk(top_groups).indices
    kept = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, top, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float('-inf')).flatten(1)


# ---- Triton: the choice ----

@jit
def _largest(x):
    return tl.max(tl.max(x, 1), 0)


@jit
def _total(x):
    return tl.sum(tl.sum(x, 1), 0)


@jit
def _mask_groups(
    choice, e, g,
    E: tl.constexpr, TOP_G: tl.constexpr, TWO: tl.constexpr, BLOCK_G: tl.constexpr,
):
    """choice [G, S] -> the same, −∞ outside the TOP_G groups whose best, or TWO best, are most"""
    score = tl.max(choice, 1)
    if TWO:
        first = tl.min(tl.where(choice == score[:, None], e, E), 1)
        score += tl.max(tl.where(e == first[:, None], float('-inf'), choice), 1)
    kept = g < 0
    for _ in tl.static_range(TOP_G):
        best = tl.min(tl.where(score == tl.max(score, 0), g, BLOCK_G), 0)
        kept = kept | (g == best)
        score = tl.where(g == best, float('-inf'), score)
    return tl.where(kept[:, None], choice, float('-inf'))


@jit
def _route(
    logits_ptr, bias_ptr, weights_ptr, chosen_ptr, scores_ptr,
    scale,
    E: tl.constexpr, G: tl.constexpr, TOP_G: tl.constexpr, K: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, NORMALISE: tl.constexpr, REPLAY: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """
    A program routes one token, its experts a tile [G, S] of G groups; the K best by K maxima.

    reads     logits [N, E] float32; with BIAS bias [E] float32; with REPLAY chosen [N, K] int64
    writes    scores [N, E] and weights [N, K] float32; without REPLAY chosen
    bound     memory: 8 N E bytes
    """
    row = tl.program_id(0).to(tl.int64)
    S = E // G
    g = tl.arange(0, BLOCK_G)
    s = tl.arange(0, BLOCK_S)[None, :]
    e = g[:, None] * S + s
    valid = (g[:, None] < G) & (s < S)

    z = tl.load(logits_ptr + row * E + e, valid, other=float('-inf'))
    if SIGMOID:
        p = tl.sigmoid(z)
    else:
        p = tl.exp(z - _largest(z))
        p = p / _total(p)
    tl.store(scores_ptr + row * E + e, p, valid)

    choice = tl.where(valid, p, float('-inf'))
    if not REPLAY:
        if BIAS:
            choice += tl.load(bias_ptr + e, valid, other=0.0)
        if TOP_G < G:
            choice = _mask_groups(choice, e, g, E, TOP_G, BIAS, BLOCK_G)

    ks = tl.arange(0, BLOCK_K)
    w = tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(K):
        if REPLAY:
            best = tl.load(chosen_ptr + row * K + k).to(tl.int32)
        else:
            best = tl.min(tl.min(tl.where(choice == _largest(choice), e, E - 1), 1), 0)
            tl.store(chosen_ptr + row * K + k, best.to(tl.int64))
            choice = tl.where(e == best, float('-inf'), choice)
        w = tl.where(ks == k, _total(tl.where(e == best, p, 0.0)), w)
    if NORMALISE:
        w = w / (tl.sum(w, 0) + 1e-20)
    tl.store(weights_ptr + row * K + ks, w * scale, ks < K)


@jit
def _route_backward(
    dweights_ptr, dscores_ptr, scores_ptr, chosen_ptr, dlogits_ptr,
    scale,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """
    A program takes one token.

    reads     dweights [N, K], dscores and scores [N, E] float32; chosen [N, K] int64
    writes    dlogits [N, E] float32
    bound     memory: 12 N E bytes
    """
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    ks = tl.arange(0, BLOCK_K)
    s = tl.load(scores_ptr + row * E + e, e < E, other=0.0)
    ds = tl.load(dscores_ptr + row * E + e, e < E, other=0.0)
    chosen = tl.load(chosen_ptr + row * K + ks, ks < K, other=0)

    dw = tl.load(dweights_ptr + row * K + ks, ks < K, other=0.0) * scale
    if NORMALISE:
        picked = tl.load(scores_ptr + row * E + chosen, ks < K, other=0.0)
        total = tl.sum(picked, 0) + 1e-20
        dw = (dw - tl.sum(dw * picked, 0) / total) / total
    for k in tl.static_range(K):
        expert = tl.sum(tl.where(ks == k, chosen, 0), 0)
        ds += tl.where(e == expert, tl.sum(tl.where(ks == k, dw, 0.0), 0), 0.0)

    if SIGMOID:
        dz = ds * s * (1 - s)
    else:
        dz = s * (ds - tl.sum(s * ds, 0))
    tl.store(dlogits_ptr + row * E + e, dz, e < E)


# ---- autograd ----

class Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits, bias, K, groups, top_groups, sigmoid, normalise, scale, chosen,
    ):
        logits = logits.contiguous()
        N, E = logits.shape
        replay = chosen is not None
        if replay:
            chosen = chosen.contiguous()
        else:
            chosen = torch.empty(N, K, dtype=torch.int64, device=logits.device)
        scores = torch.empty_like(logits)
        weights = torch.empty(N, K, dtype=torch.float32, device=logits.device)

        ctx.scale = scale
        ctx.sizes = dict(E=E, K=K, SIGMOID=sigmoid, NORMALISE=normalise and K > 1,
                         BLOCK_K=next_power_of_2(K))
        if N:
            _route[(N,)](
                logits, logits if bias is None else bias, weights, chosen, scores, scale,
                **ctx.sizes, G=groups, TOP_G=top_groups, BIAS=bias is not None, REPLAY=replay,
                BLOCK_G=next_power_of_2(groups), BLOCK_S=next_power_of_2(E // groups),
                num_warps=1)
        ctx.save_for_backward(scores, chosen)
        ctx.mark_non_differentiable(chosen)
        return weights, chosen, scores

    @staticmethod
    def backward(ctx, dweights, _, dscores):
        scores, chosen = ctx.saved_tensors
        N, E = scores.shape
        dlogits = torch.empty_like(scores)
        if N:
            _route_backward[(N,)](
                dweights.contiguous(), dscores.contiguous(), scores, chosen, dlogits, ctx.scale,
                **ctx.sizes, BLOCK_E=next_power_of_2(E), num_warps=1)
        return dlogits, *[None] * 8


# ---- slots by expert ----

def by_expert(chosen, E):
    """
    chosen [N, K] -> int32 tensors:

    order [N K]     the slot (n K + k) at each place, by expert
    place [N K]     the place of each slot
    ends [E + 1]    expert e has the places ends[e] to ends[e + 1]
    """
    flat = chosen.flatten()
    if not fused(flat):
        return by_expert_torch(flat, E)
    slots = len(flat)
    blocks = max(1, cdiv(slots, 128))

    counts = torch.zeros(blocks, E, dtype=torch.int32, device=flat.device)
    BLOCK_E = min(64, next_power_of_2(E))
    _count[(blocks,)](flat, counts, slots, E=E, BLOCK=128, BLOCK_E=BLOCK_E, num_warps=4)

    totals = counts.sum(0, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends = torch.cat([counts.new_zeros(1), totals])
    first = counts.cumsum(0, dtype=torch.int32) - counts + ends[:-1]

    order, place = (torch.empty(slots, dtype=torch.int32, device=flat.device) for _ in range(2))
    _place[(blocks,)](flat, first, order, place, slots, E=E, BLOCK=128, num_warps=4)
    return order, place, ends


def by_expert_torch(flat, E):
    order = flat.argsort(stable=True)
    places = torch.arange(len(flat), device=flat.device)
    place = torch.empty_like(order).scatter_(0, order, places)
    counts = torch.zeros(E + 1, dtype=torch.int32, device=flat.device)
    counts.scatter_add_(0, flat + 1, torch.ones_like(flat, dtype=torch.int32))
    return order.int(), place.int(), counts.cumsum(0, dtype=torch.int32)


@jit
def _count(
    chosen_ptr, counts_ptr, slots,
    E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):
    """
    A program counts the experts of BLOCK slots.

    reads     chosen [slots] int64
    writes    counts [blocks, E] int32
    bound     memory: 8 bytes a slot, 4 E a block; as short as its launch
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(chosen_ptr + i, i < slots, other=E)
    for e0 in range(0, E, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        count = tl.sum((mine[:, None] == e[None, :]).to(tl.int32), 0)
        tl.store(counts_ptr + tl.program_id(0) * E + e, count, e < E)


@jit
def _place(
    chosen_ptr, first_ptr, order_ptr, place_ptr, slots,
    E: tl.constexpr, BLOCK: tl.constexpr,
):
    """
    A program places BLOCK slots: behind those of its expert in earlier blocks and in its own.

    reads     chosen [slots] int64; first [blocks, E] int32, where a block's share of e begins
    writes    order, place [slots] int32
    bound     memory: 24 bytes a slot; as short as its launch
    """
    j = tl.arange(0, BLOCK)
    i = tl.program_id(0) * BLOCK + j
    mine = tl.load(chosen_ptr + i, i < slots, other=E)
    other = tl.load(chosen_ptr + tl.program_id(0) * BLOCK + j, i < slots, other=E)
    before = (mine[:, None] == other[None, :]) & (j[None, :] < j[:, None])
    rank = tl.sum(before.to(tl.int32), 1)
    at = tl.load(first_ptr + tl.program_id(0) * E + mine, i < slots, other=0) + rank
    tl.store(place_ptr + i, at, i < slots)
    tl.store(order_ptr + at, i, i < slots)


# ---- what is compiled ahead of time ----

def compile_cases(sm, x):
    """V3: 8 of 256 experts in 4 of 8 groups; V2-Lite: 6 of 64, softmax. A dense model has none."""
    forward = dict(logits_ptr='*fp32', bias_ptr='*fp32', weights_ptr='*fp32', chosen_ptr='*i64',
                   scores_ptr='*fp32', scale='fp32')
    backward = dict(dweights_ptr='*fp32', dscores_ptr='*fp32', scores_ptr='*fp32',
                    chosen_ptr='*i64', dlogits_ptr='*fp32', scale='fp32')
    count = dict(chosen_ptr='*i64', counts_ptr='*i32', slots='i32')
    place = dict(chosen_ptr='*i64', first_ptr='*i32', order_ptr='*i32', place_ptr='*i32',
                 slots='i32')
    for name, E, K, G, TOP_G, v3 in (('V3', 256, 8, 8, 4, True), ('V2-Lite', 64, 6, 1, 1, False)):
        sizes = dict(E=E, K=K, SIGMOID=v3, NORMALISE=v3, BLOCK_K=8)
        grouped = dict(sizes, G=G, TOP_G=TOP_G, BIAS=v3, BLOCK_G=G, BLOCK_S=E // G)
        yield f'route {name}', _route, forward, dict(grouped, REPLAY=False), 1, 3, 0
        yield f'route {name} replay', _route, forward, dict(grouped, REPLAY=True), 1, 3, 0
        yield f'route backward {name}', _route_backward, backward, dict(sizes, BLOCK_E=E), 1, 3, 0
        yield f'count {name}', _count, count, dict(E=E, BLOCK=128, BLOCK_E=64), 4, 3, 0
        yield f'place {name}', _place, place, dict(E=E, BLOCK=128), 4, 3, 0
