"""
The router of a mixture of experts, and the order in which its experts take the tokens.

    s = softmax(z) (V2) or σ(z) (V3),   z = x W the router's logits
    choice = s + b inside the best groups, −∞ outside; a group is as good as its best expert (V2) or its two best (V3)
    e_1..e_K = top K of choice,   w_k = scale · s_{e_k} / Σ_j s_{e_j}     (the division only if `normalise`)

Gradients flow through w and s, not through the choice nor b:
    ds_{e_k} = scale (dw_k − Σ_j dw_j s_{e_j} / S) / S,  S = Σ_j s_{e_j};   dz = ds ⊙ s (1 − s)  or  s ⊙ (ds − Σ s ds)

A program routes one token, its experts as a tile [groups, experts a group]; the K best are found by K maxima.

`by_expert` sorts the N K slots (token, k) by expert, stably, in three passes: each block of slots counts its experts, a cumulative sum
over [blocks, E] says where each block's share of each expert begins, and each block places its slots. The counts never leave the GPU.
"""
from __future__ import annotations

import torch

from kernels import cdiv, fused, jit, next_power_of_2, tl


def route(logits, bias, K, groups=1, top_groups=1, sigmoid=True, normalise=True, scale=1.0, chosen=None):
    """logits [N, E] float32, bias [E] or None -> weights [N, K] float32, experts [N, K] int64, scores [N, E]. The groups are ranked by
    their two best where there is a bias (V3), else by their best. chosen [N, K] replays an earlier choice."""
    if fused(logits):
        return Route.apply(logits, bias, K, groups, top_groups, sigmoid, normalise, scale, chosen)
    return route_reference(logits, bias, K, groups, top_groups, sigmoid, normalise, scale, chosen)


def route_reference(logits, bias, K, groups=1, top_groups=1, sigmoid=True, normalise=True, scale=1.0, chosen=None):
    scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
    if chosen is None:
        choice = scores.detach() + (0 if bias is None else bias)
        if top_groups < groups:
            grouped = choice.view(len(choice), groups, -1)
            group_score = grouped.amax(-1) if bias is None else grouped.topk(2, dim=-1).values.sum(-1)
            best = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, group_score.topk(top_groups).indices, True)
            choice = grouped.masked_fill(~best.unsqueeze(-1), float('-inf')).flatten(1)
        chosen = choice.topk(K, dim=-1).indices
    weights = scores.gather(1, chosen)
    if normalise and K > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, chosen, scores


@jit
def _route(logits, bias, weights, chosen, scores, scale, E: tl.constexpr, G: tl.constexpr, TOP_G: tl.constexpr, K: tl.constexpr,
           SIGMOID: tl.constexpr, BIAS: tl.constexpr, NORMALISE: tl.constexpr, REPLAY: tl.constexpr, BLOCK_G: tl.constexpr,
           BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr):
    row, S = tl.program_id(0).to(tl.int64), E // G
    g, s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)[None, :]
    e, valid = g[:, None] * S + s, (g[:, None] < G) & (s < S)
    none = float('-inf')
    z = tl.load(logits + row * E + e, valid, other=none)
    if SIGMOID:
        p = tl.sigmoid(z)
    else:
        p = tl.exp(z - tl.max(tl.max(z, 1), 0))
        p = p / tl.sum(tl.sum(p, 1), 0)
    tl.store(scores + row * E + e, p, valid)
    choice = tl.where(valid, p, none)
    if not REPLAY:
        if BIAS:
            choice += tl.load(bias + e, valid, other=0.0)
        if TOP_G < G:
            best = tl.max(choice, 1)
            if BIAS:
                first = tl.min(tl.where(choice == best[:, None], e, E), 1)
                best += tl.max(tl.where(e == first[:, None], none, choice), 1)
            kept = g < 0
            for _ in tl.static_range(TOP_G):
                i = tl.min(tl.where(best == tl.max(best, 0), g, BLOCK_G), 0)
                kept, best = kept | (g == i), tl.where(g == i, none, best)
            choice = tl.where(kept[:, None], choice, none)
    ks = tl.arange(0, BLOCK_K)
    w = tl.zeros([BLOCK_K], tl.float32)
    for k in tl.static_range(K):
        if REPLAY:
            i = tl.load(chosen + row * K + k).to(tl.int32)
        else:
            i = tl.min(tl.min(tl.where(choice == tl.max(tl.max(choice, 1), 0), e, E - 1), 1), 0)
            tl.store(chosen + row * K + k, i.to(tl.int64))
            choice = tl.where(e == i, none, choice)
        w = tl.where(ks == k, tl.sum(tl.sum(tl.where(e == i, p, 0.0), 1), 0), w)
    if NORMALISE:
        w = w / (tl.sum(w, 0) + 1e-20)
    tl.store(weights + row * K + ks, w * scale, ks < K)


@jit
def _route_backward(dweights, dscores, scores, chosen, dlogits, scale, E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr,
                    NORMALISE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    e, ks = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    p = tl.load(scores + row * E + e, e < E, other=0.0)
    d = tl.load(dscores + row * E + e, e < E, other=0.0)
    i = tl.load(chosen + row * K + ks, ks < K, other=0)
    dw = tl.load(dweights + row * K + ks, ks < K, other=0.0) * scale
    if NORMALISE:
        picked = tl.load(scores + row * E + i, ks < K, other=0.0)
        total = tl.sum(picked, 0) + 1e-20
        dw = (dw - tl.sum(dw * picked, 0) / total) / total
    for k in tl.static_range(K):
        d += tl.where(e == tl.sum(tl.where(ks == k, i, 0), 0), tl.sum(tl.where(ks == k, dw, 0.0), 0), 0.0)
    d = d * p * (1 - p) if SIGMOID else p * (d - tl.sum(p * d, 0))
    tl.store(dlogits + row * E + e, d, e < E)


class Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, K, groups, top_groups, sigmoid, normalise, scale, chosen):
        logits = logits.contiguous()
        N, E = logits.shape
        replay, scores = chosen is not None, torch.empty_like(logits)
        weights = torch.empty(N, K, dtype=torch.float32, device=logits.device)
        chosen = chosen.contiguous() if replay else torch.empty(N, K, dtype=torch.int64, device=logits.device)
        ctx.sizes = dict(E=E, K=K, SIGMOID=sigmoid, NORMALISE=normalise and K > 1, BLOCK_K=next_power_of_2(K))
        if N:
            _route[(N,)](logits, logits if bias is None else bias, weights, chosen, scores, scale, G=groups, TOP_G=top_groups,
                         BIAS=bias is not None, REPLAY=replay, BLOCK_G=next_power_of_2(groups), BLOCK_S=next_power_of_2(E // groups),
                         **ctx.sizes, num_warps=1)
        ctx.scale = scale
        ctx.save_for_backward(scores, chosen)
        ctx.mark_non_differentiable(chosen)
        return weights, chosen, scores

    @staticmethod
    def backward(ctx, dweights, _, dscores):
        scores, chosen = ctx.saved_tensors
        dlogits = torch.empty_like(scores)
        if len(scores):
            _route_backward[(len(scores),)](dweights.contiguous(), dscores.contiguous(), scores, chosen, dlogits, ctx.scale,
                                            BLOCK_E=next_power_of_2(ctx.sizes['E']), **ctx.sizes, num_warps=1)
        return dlogits, *[None] * 8


# ---------------------------------------------------------------------------------------------------------------------
# slots by expert


def by_expert(chosen, E):
    """chosen [N, K] -> order [N K]: the slot (n K + k) at each place, by expert; place [N K]: the place of each slot; ends [E + 1]: expert
    e's places are ends[e] to ends[e + 1]. All int32."""
    flat = chosen.flatten()
    if not fused(flat):
        return by_expert_reference(flat, E)
    order, place = (torch.empty(len(flat), dtype=torch.int32, device=flat.device) for _ in range(2))
    blocks = max(1, cdiv(len(flat), 128))
    counts = torch.zeros(blocks, E, dtype=torch.int32, device=flat.device)
    sizes = dict(E=E, BLOCK=128, BLOCK_E=min(64, next_power_of_2(E)))
    _count[(blocks,)](flat, counts, len(flat), **sizes, num_warps=4)
    ends = torch.cat([counts.new_zeros(1), counts.sum(0, dtype=torch.int32).cumsum(0, dtype=torch.int32)])
    base = counts.cumsum(0, dtype=torch.int32) - counts + ends[:-1]
    _place[(blocks,)](flat, base, order, place, len(flat), E=E, BLOCK=128, num_warps=4)
    return order, place, ends


def by_expert_reference(flat, E):
    order = flat.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(flat), device=flat.device))
    counts = torch.zeros(E + 1, dtype=torch.int32, device=flat.device)
    ends = counts.scatter_add_(0, flat + 1, torch.ones_like(flat, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
    return order.int(), place.int(), ends


@jit
def _count(flat, counts, n, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(flat + i, i < n, other=E)
    for e0 in range(0, E, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        tl.store(counts + tl.program_id(0) * E + e, tl.sum((mine[:, None] == e[None, :]).to(tl.int32), 0), e < E)


@jit
def _place(flat, base, order, place, n, E: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    i = tl.program_id(0) * BLOCK + j
    mine = tl.load(flat + i, i < n, other=E)
    other = tl.load(flat + tl.program_id(0) * BLOCK + j, i < n, other=E)
    rank = tl.sum(((mine[:, None] == other[None, :]) & (j[None, :] < j[:, None])).to(tl.int32), 1)
    at = tl.load(base + tl.program_id(0) * E + mine, i < n, other=0) + rank
    tl.store(place + i, at, i < n)
    tl.store(order + at, i, i < n)


def compile_cases(sm, x):
    """V3: 8 of 256 experts in 4 of 8 groups; V2-Lite: 6 of 64, softmax. A dense model has no router."""
    forward = dict(logits='*fp32', bias='*fp32', weights='*fp32', chosen='*i64', scores='*fp32', scale='fp32')
    backward = dict(dweights='*fp32', dscores='*fp32', scores='*fp32', chosen='*i64', dlogits='*fp32', scale='fp32')
    for name, E, K, G, TOP_G, v3 in (('V3', 256, 8, 8, 4, True), ('V2-Lite', 64, 6, 1, 1, False)):
        sizes = dict(E=E, K=K, SIGMOID=v3, NORMALISE=v3, BLOCK_K=8)
        for replay in (False, True):
            yield (f'route {name}{" replay" if replay else ""}', _route, forward,
                   dict(sizes, G=G, TOP_G=TOP_G, BIAS=v3, REPLAY=replay, BLOCK_G=G, BLOCK_S=next_power_of_2(E // G)), 1, 3, 0)
        yield f'route backward {name}', _route_backward, backward, dict(sizes, BLOCK_E=E), 1, 3, 0
        yield f'count {name}', _count, dict(flat='*i64', counts='*i32', n='i32'), dict(E=E, BLOCK=128, BLOCK_E=64), 4, 3, 0
        yield (f'place {name}', _place, dict(flat='*i64', base='*i32', order='*i32', place='*i32', n='i32'), dict(E=E, BLOCK=128), 4, 3, 0)
