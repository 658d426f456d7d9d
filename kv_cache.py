"""
The cache of keys and values, and attention to it: what `Transformer.decode` reads and writes.

    cache = Cache(own, prompts)                  # two KVBuffers
    cache.readers = PromptReaders(...)           # which row reads which prompt
    cache.begin(at_BT, length, dtype)            # once a forward: where its tokens go
    o = cache.attend(layer, q, entry, scale)     # once a layer, from MLA.decode and GQA.decode

A prompt is stored once, and all its samples read it together; each row has a buffer of its own for
the tokens that it generated. One softmax goes over both:

    o = softmax(scale q [K_prompt, K_own]ᵀ + bias) [V_prompt, V_own]

The prompt's part is one product for all rows of that prompt. MLA caches the latent and the rope
key, c + r numbers a token and layer, and decodes absorbed (model.py): the latent is key and value.
On a GPU with Triton MLA attends by kernels/mla_decode.py, else by the products below.

B rows of T new tokens (2 to verify a draft, else 1), G key heads (1 for MLA), R query heads for
each, H = G R; P prompts, each read by at most N rows; K the width of a token's keys, G d or c + r.
"""

from collections import Counter

import torch

from kernels import fused
from kernels.mla_decode import mla_decode


class KVBuffer:
    """Memory for `rows` sequences of up to `length` tokens in each of `layers` layers.

    layers: for each layer [keys, values], both [rows, length, G d] (GQA), or [latent], which is
    [rows, length, c + r] (MLA)
    """

    def __init__(self, cfg, layers, rows, length, dtype, device):
        self.rows = rows
        self.length = length
        self.value_width = cfg.kv_lora_rank if cfg.mla else None
        widths = [cfg.cache_width] if cfg.mla else [cfg.cache_width // 2] * 2

        def zeros(width):
            return torch.zeros(rows, length, width, dtype=dtype, device=device)

        self.layers = [list(map(zeros, widths)) for _ in range(layers)]

    def write(self, layer, rows, entry):
        """Sets the first T tokens of some rows [n]. entry: parts [n, T, ·] of a layer, as
        `Transformer.read_prompts` makes them"""
        for buffer, part in zip(self.layers[layer], entry):
            buffer[rows, :part.shape[1]] = part.to(buffer.dtype)

    def read(self, layer, rows, length):
        """-> keys [rows, length, ·], values [rows, length, ·]"""
        parts = self.layers[layer]
        keys = parts[0][:rows, :length]
        values = parts[-1][:rows, :length, :self.value_width]
        return keys, values

    def copy_rows(self, to, source, length):
        """Copies the first `length` tokens of rows `source` to rows `to`."""
        for parts in self.layers:
            for buffer in parts:
                buffer[to, :length] = buffer[source, :length]


def bucket(n):
    """-> n, rounded up to three binary digits: 1 .. 8, 10, 12, 14, 16, 20, ..."""
    unit = 1 << max(0, n.bit_length() - 3)
    return -(-n // unit) * unit


def graph_size(n, device):
    """-> a size of at least n that a CUDA graph is captured for, at most a quarter more; on a CPU,
    which has no graphs, n itself"""
    return n if device.type == 'cpu' else bucket(n)


class PromptReaders:
    """Which rows read which prompt, in the two orders that attention works in.

    The products want [P, N ·, ·], the rows of prompt 0, then those of prompt 1, ...; prompts that
    fewer than N rows read are filled up with row 0:
        row_of_place [P N], place_of_row [B]    both None where the rows lie so already
        bias [B, 1, 1, Lp]                      0, or -inf past the end of the row's prompt
    The kernel wants the rows sorted by prompt:
        order [B], inverse [B]                  rows by prompt, and the way back
        prompt [B]                              the prompt of each row, in that order
        most                                    no prompt has more rows
    and both the tokens of each prompt, lengths [P].
    """

    def __init__(self, rows_of, length_of, B, prompts, device):
        """rows_of: {prompt: list of its rows}; length_of: {prompt: its tokens}, where a prompt is a
        row of the buffer `prompts`; B: rows in all, of which some may read no prompt"""
        self.B = B
        self.P = min(prompts.rows, graph_size(max(rows_of) + 1, device))
        self.N = graph_size(max(len(rows) for rows in rows_of.values()), device)
        longest = max(length_of[p] for p in rows_of)
        self.Lp = min(prompts.length, graph_size(longest, device))
        lengths = [length_of[p] if p in rows_of else 1 for p in range(self.P)]
        self.lengths = torch.tensor(lengths, device=device)
        self.place_rows(rows_of, device)
        self.sort_rows(rows_of, device)

    def place_rows(self, rows_of, device):
        row_of_place = [0] * (self.P * self.N)
        place_of_row = [0] * self.B
        for p, rows in rows_of.items():
            for place, row in enumerate(rows, p * self.N):
                row_of_place[place] = row
                place_of_row[row] = place
        self.row_of_place = None
        self.place_of_row = None
        if row_of_place != list(range(self.B)):
            self.row_of_place = torch.tensor(row_of_place, device=device)
            self.place_of_row = torch.tensor(place_of_row, device=device)

    def sort_rows(self, rows_of, device):
        prompt_of_row = [row % self.P for row in range(self.B)]    # of rows that read none: any
        for p, rows in rows_of.items():
            for row in rows:
                prompt_of_row[row] = p
        self.most = graph_size(max(Counter(prompt_of_row).values()), device)

        prompt_B = torch.tensor(prompt_of_row, device=device)
        lengths_B = self.lengths[prompt_B, None, None, None]
        self.bias = minus_infinity_where(torch.arange(self.Lp, device=device) >= lengths_B)
        self.prompt, self.order = prompt_B.sort(stable=True)
        self.inverse = self.order.argsort()

    def key(self):
        """All that a captured graph depends on, but for the numbers in the tensors"""
        in_place = self.row_of_place is None
        return self.P, self.N, self.Lp, self.B, self.most, in_place

    def copy_(self, other):
        """Takes the numbers of `other`, whose key is the same: a graph reads these tensors."""
        for name, mine in vars(self).items():
            if torch.is_tensor(mine):
                mine.copy_(getattr(other, name))

    def gather(self, x):
        """[B, n, D] -> [P, N n, D]"""
        if self.row_of_place is not None:
            x = x.index_select(0, self.row_of_place)
        return x.reshape(self.P, -1, x.shape[-1])

    def scatter(self, x):
        """[P, N n, D] -> [B, n, D]"""
        x = x.view(self.P * self.N, -1, x.shape[-1])
        return x if self.place_of_row is None else x.index_select(0, self.place_of_row)


def minus_infinity_where(hidden):
    """bool -> float32: -inf where True, else 0"""
    zeros = torch.zeros(hidden.shape, device=hidden.device)
    return zeros.masked_fill_(hidden, float('-inf'))


class Cache:
    """What `Transformer.decode` attends to.

    own: KVBuffer of what each row wrote itself
    prompts: KVBuffer of the prompts before it, or None; then `own` holds all, and `readers`, a
        PromptReaders, is not needed
    """

    def __init__(self, cfg, own, prompts=None):
        self.cfg = cfg
        self.own = own
        self.prompts = prompts
        self.readers = None
        self.G = 1 if cfg.mla else cfg.num_key_value_heads
        self.R = cfg.num_attention_heads // self.G

    def begin(self, at_BT, length, dtype):
        """Says where the tokens of the next forward go: to places `at` of the rows' own buffers.
        Each sees its row's own tokens up to itself, of which there are `length` at most."""
        B, T = at_BT.shape
        device = at_BT.device
        self.B = B
        self.length = length
        self.at_BT = at_BT
        row_starts = torch.arange(0, B * self.own.length, self.own.length, device=device)
        self.places = (at_BT + row_starts.unsqueeze(1)).flatten()
        self.by_kernel = self.cfg.mla and fused(at_BT)
        if self.by_kernel:
            return

        # for the products: what is added to the scores, and memory
        later = torch.arange(length, device=device) > at_BT.unsqueeze(-1)
        self.bias = minus_infinity_where(later.unsqueeze(2))
        if self.prompts is not None:
            before = self.readers.bias.expand(-1, T, -1, -1)
            self.bias = torch.cat([before, self.bias], dim=-1)
        self.zero = torch.zeros((), dtype=dtype, device=device)
        if self.G > 1:
            shape = B, T, self.G, self.R, self.G, self.cfg.head_dim
            self.wide = torch.zeros(shape, dtype=dtype, device=device)

    def attend(self, layer, q, entry, scale):
        """The attention of one layer.

        q [B, T, H, D]: queries of the new tokens
        entry: what the cache keeps of them, keys and values [B, T, G D], or (latent,) [B, T, c + r]
        -> o [B, T, H, D of the values]
        """
        own = self.own.layers[layer]
        for buffer, part in zip(own, entry):
            tokens = part.flatten(0, 1).to(buffer.dtype)
            buffer.view(-1, buffer.shape[2]).index_copy_(0, self.places, tokens)
        q = q.to(own[0].dtype)
        if self.by_kernel:
            return self.attend_by_kernel(layer, q, scale)
        return self.attend_by_products(layer, q, scale)

    def attend_by_kernel(self, layer, q, scale):
        (latent,) = self.own.layers[layer]
        own = latent[:self.B]
        seen = self.at_BT[:, 0] + 1
        c = self.cfg.kv_lora_rank
        if self.prompts is None:
            return mla_decode(q, own, seen, scale, c)

        readers = self.readers
        (latent,) = self.prompts.layers[layer]
        o = mla_decode(
            q.index_select(0, readers.order), own, seen.index_select(0, readers.order), scale, c,
            latent[:readers.P], readers.lengths, readers.prompt, readers.most, readers.order)
        return o.index_select(0, readers.inverse)

    def attend_by_products(self, layer, q, scale):
        T = q.shape[1]
        q = self.widen(q)
        k, v = self.own.read(layer, self.B, self.length)
        scores = self.scores(k, q.mT, scale).mT      # with few queries a key faster this way round
        if self.prompts is None:
            p = self.probabilities(scores, T).to(q.dtype)
            return self.narrow(torch.bmm(p, v), T)

        # scores of the prompt, then of the row's own tokens
        readers = self.readers
        k_prompt, v_prompt = self.prompts.read(layer, readers.P, readers.Lp)
        scores_prompt = self.scores(readers.gather(q), k_prompt.mT, scale)
        scores = torch.cat([readers.scatter(scores_prompt), scores], dim=-1)
        p = self.probabilities(scores, T).to(q.dtype)

        # the values of both
        o_prompt = torch.bmm(readers.gather(p[..., :readers.Lp]), v_prompt)
        o = torch.baddbmm(readers.scatter(o_prompt), p[..., readers.Lp:], v)
        return self.narrow(o, T)

    def scores(self, a, b, scale):
        """-> scale a b; of bf16 in float32 on a GPU, as the trainer's kernels have them"""
        if a.is_cuda and a.dtype == torch.bfloat16:
            return torch.bmm(a, b, out_dtype=torch.float32).mul_(scale)
        return torch.baddbmm(self.zero, a, b, beta=0, alpha=scale)

    def probabilities(self, scores, T):
        """scores [B, T H, keys], which are overwritten -> softmax of scores and bias, float32"""
        scores = scores.unflatten(1, (T, -1)).add_(self.bias)
        return scores.softmax(-1, dtype=torch.float32).flatten(1, 2)

    def widen(self, q):
        """q [B, T, H, D] -> [B, T H, G D]: each query at its own key head, with zeros at the
        others, so that one product serves all heads"""
        if self.G == 1:
            return q.flatten(1, 2)
        q = q.unflatten(2, (self.G, self.R)).permute(0, 1, 3, 4, 2)
        self.wide.diagonal(dim1=2, dim2=4).copy_(q)
        return self.wide.flatten(4).flatten(1, 3)

    def narrow(self, o, T):
        """o [B, T H, G D] -> [B, T, H, D]: what each query's own value head gave"""
        if self.G == 1:
            return o.unflatten(1, (T, -1))
        o = o.view(self.B, T, self.G, self.R, self.G, -1)
        return o.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3).flatten(2, 3)
