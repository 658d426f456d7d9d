"""
Attention: a Mask says what each token sees; how that is computed is chosen here, and nowhere else.

    mask = Mask.causal()                                  itself and what precedes it in its row
    mask = Mask.documents(doc_ids_BT)                     of that, what belongs to its document
    mask = Mask.shared_prefix(lengths_P, rows_N, Lp, Lc)  a prefix, and of its row as above
    o = attention(q, k, v, scale, mask, q_rope, k_rope)

    s_ij = scale (q_i·k_j + qr_i·kr_j) for the tokens j that i sees
    o_i = sum_j softmax(s_i)_j v_j

    a GPU with Triton                    kernels/mla_attention.py
    training on a CPU, short rows        kernels/cpu.py, blocks of queries
    else                                 PyTorch's, with a table of who sees whom
    prefixes, then what continues them   each in one of the last two ways

B rows of T tokens; H query heads and G key heads, G dividing H; n, r, w the head dims without rope,
of rope, of values; P prefixes of up to Lp tokens, N rows of Lc tokens that continue one of them.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from kernels import cpu, fused
from kernels.mla_attention import attention_torch, flash_attention, with_rope


@dataclass
class Mask:
    """What each token of a row [B, T] sees: the tokens from `start` up to itself.

    start_BT: int32, not decreasing along a row; None: the whole row up to itself
    prefix: a SharedPrefix, for the one row of prefixes and their continuations; else None
    """

    start_BT: torch.Tensor | None = None
    prefix: SharedPrefix | None = None

    @classmethod
    def causal(cls):
        return cls()

    @classmethod
    def documents(cls, doc_ids_BT):
        """doc_ids: equal inside a document and different from its neighbours'"""
        is_first = F.pad(doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1], (1, 0))
        return cls(torch.where(is_first, positions(doc_ids_BT), 0).cummax(1).values)

    @classmethod
    def shared_prefix(cls, lengths_P, rows_N, Lp, Lc):
        """Of a row [1, P Lp + N Lc]: P prefixes, right-padded to Lp, of these lengths; then N
        continuations of Lc tokens, n of prefix rows_N[n], which see it and what precedes them."""
        return cls(prefix=SharedPrefix(lengths_P, rows_N, Lp, Lc))

    # The same in the form that each way of computing takes, made once for all layers

    @cached_property
    def bounds(self):
        """int32 [2, B, T]: the first token that each token sees, and one past the last token that
        sees it; None: all before it, and all after it"""
        if self.start_BT is None:
            return None
        start_BT = self.start_BT
        tokens_BT = positions(start_BT).expand_as(start_BT).contiguous()
        end_BT = torch.searchsorted(start_BT, tokens_BT, right=True, out_int32=True)
        return torch.stack([start_BT, end_BT])

    def table(self):
        """bool [B, 1, T, T]: whether a token sees another"""
        tokens = positions(self.start_BT)
        up_to_itself = tokens <= tokens.unsqueeze(1)
        from_start = tokens >= self.start_BT.unsqueeze(2)
        return (up_to_itself & from_start).unsqueeze(1)

    @cached_property
    def visible(self):
        """The table, or None: causal"""
        return None if self.start_BT is None else self.table()

    @cached_property
    def document_blocks(self):
        return cpu.blocks_of(self.table())

    def blocks(self, T):
        """As kernels/cpu.py takes them"""
        return cpu.causal_blocks(T) if self.start_BT is None else self.document_blocks


def positions(x_BT):
    """-> int32 [T]: 0, 1, 2, ..."""
    return torch.arange(x_BT.shape[1], dtype=torch.int32, device=x_BT.device)


@dataclass
class SharedPrefix:
    lengths_P: torch.Tensor
    rows_N: torch.Tensor
    Lp: int
    Lc: int

    def table(self):
        """bool [N, 1, Lc, Lp + Lc]: whether a continuation's token sees a token of its prefix, and
        one of its own row"""
        N, Lp, Lc, device = len(self.rows_N), self.Lp, self.Lc, self.rows_N.device
        in_prefix = torch.arange(Lp, device=device) < self.lengths_P[self.rows_N].unsqueeze(1)
        up_to_itself = torch.ones(Lc, Lc, dtype=torch.bool, device=device).tril()
        parts = in_prefix.unsqueeze(1).expand(N, Lc, Lp), up_to_itself.expand(N, Lc, Lc)
        return torch.cat(parts, dim=2).unsqueeze(1)

    @cached_property
    def visible(self):
        """The table; on a CPU what is added to the scores, or PyTorch makes that in every layer"""
        table = self.table()
        if table.device.type != 'cpu':
            return table
        return torch.zeros(table.shape).masked_fill_(~table, float('-inf'))

    @cached_property
    def blocks(self):
        return cpu.blocks_of(self.table())


def attention(q, k, v, scale, mask, q_rope=None, k_rope=None):
    """q [B, T, H, n], k [B, T, G, n], v [B, T, G, w]; q_rope [B, T, H, r] and k_rope [B, T, r], one
    for all heads, or None -> [B, T, H, w]. All are taken in q's dtype, or autocast's."""
    check(q, k, v, q_rope, k_rope)
    if fused(q) and mask.prefix is None:
        return flash_attention(q, k, v, scale, mask.bounds, q_rope, k_rope)

    if q_rope is not None:
        q, k = with_rope(q, k, q_rope, k_rope)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if mask.prefix is not None:
        o = prefixes_and_continuations(q, k, v, scale, mask.prefix)
    else:
        o = whole_rows(q, k, v, scale, mask)
    return o.transpose(1, 2)


def check(q, k, v, q_rope, k_rope):
    heads_fit = q.shape[2] % k.shape[2] == 0
    tokens_fit = v.shape[:3] == k.shape[:3] and q.shape[:2] == k.shape[:2]
    if not heads_fit or not tokens_fit or (q_rope is None) != (k_rope is None):
        raise ValueError(
            f'attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: '
            'want [B, T, H, n], [B, T, G, n], [B, T, G, w] '
            'with G dividing H, and a rope part of both q and k or of neither')


def whole_rows(q, k, v, scale, mask):
    """q [B, H, T, n], k [B, G, T, n], v [B, G, T, w] -> [B, H, T, w]"""
    T = q.shape[2]
    if cpu.trains(q) and cpu.is_short(T, T):
        return cpu.attention(q, k, v, scale, mask.blocks(T))
    return attention_torch(q, k, v, scale, mask.visible)


def prefixes_and_continuations(q, k, v, scale, prefix):
    """q [1, H, P Lp + N Lc, n], k [1, G, .., n], v [1, G, .., w] -> [1, H, P Lp + N Lc, w]"""
    Lp, Lc, rows_N = prefix.Lp, prefix.Lc, prefix.rows_N
    P, N = len(prefix.lengths_P), len(rows_N)

    def split(t):
        """-> [P, heads, Lp, d], [N, heads, Lc, d]"""
        before, after = t.squeeze(0).split((P * Lp, N * Lc), dim=1)
        before = before.unflatten(1, (P, Lp)).transpose(0, 1)
        after = after.unflatten(1, (N, Lc)).transpose(0, 1)
        return before, after

    q1, q2 = split(q)
    k1, k2 = split(k)
    v1, v2 = split(v)

    # the prefixes, each once
    o1 = whole_rows(q1, k1, v1, scale, Mask.causal())

    # each continuation behind its prefix
    k2 = torch.cat([k1.index_select(0, rows_N), k2], dim=2)
    v2 = torch.cat([v1.index_select(0, rows_N), v2], dim=2)
    if cpu.usable(q2) and cpu.is_short(Lc, Lp + Lc):
        o2 = cpu.attention(q2, k2, v2, scale, prefix.blocks)
    else:
        o2 = attention_torch(q2, k2, v2, scale, prefix.visible)
    return torch.cat([o.transpose(0, 1).flatten(1, 2) for o in (o1, o2)], dim=1).unsqueeze(0)
