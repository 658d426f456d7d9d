"""
The transformer: DeepSeek's MLA + MoE + MTP, and the dense GQA decoder of its distilled students.

One class, `Transformer`, covers DeepSeek-V2, DeepSeek-V3/R1, Moonlight, Kimi-K2, Qwen2/2.5, Qwen3 and Llama 3. Module names
are the hub's weight names, so a checkpoint is read and written without a conversion table; the one exception is the routed
experts, one tensor each on disk and stacked [E, ...] in memory, so that one grouped GEMM serves them all.

    model = Transformer.from_pretrained(source)      # a folder or a hub id; hub.py reads and writes the files
    logits_BTV = model(input_ids_BT)                 # float32
    model.save_pretrained(folder)                    # what transformers and vLLM load

Shapes: B batch, T tokens, C hidden width, H heads, V vocabulary, N = B*T tokens, E experts, K experts a token;
in MLA n, r, v are the head widths without rope, with rope, and of values; c is the width of the latent.

Left out: dropout, sliding windows, attention biases other than Qwen2's, quantised compute, vision towers.
Papers: DeepSeek-V2 arXiv:2405.04434 (MLA, DeepSeekMoE), DeepSeek-V3 arXiv:2412.19437 (bias balancing, MTP),
YaRN arXiv:2309.00071.
"""

import difflib
import math
import warnings
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import hub
from kernels import cpu, fused, working_dtype
from kernels.linear_logprob import linear_logprob
from kernels.mla_attention import attention as packed_attention, document_mask
from kernels.moe import experts
from kernels.rmsnorm import rms_norm
from kernels.rope import apply_rope
from kernels.router import route
from kernels.swiglu import swiglu

# ---------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass
class ModelConfig:
    """A model's shape, in the hub's spelling. `rope_scaling` holds `rope_type` "yarn" or "llama3" and its numbers, or is None."""

    model_type: str = 'deepseek_v3'        # deepseek_v2, deepseek_v3 | qwen2, qwen3, llama
    vocab_size: int = 512
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 256           # width of a dense SwiGLU
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    # GQA (qwen2, qwen3, llama)
    num_key_value_heads: int = 2
    head_dim: int = 32
    # MLA (deepseek)
    q_lora_rank: int | None = None
    kv_lora_rank: int = 32
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    # MoE (deepseek)
    n_routed_experts: int | None = 8
    n_shared_experts: int | None = 1
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = 'noaux_tc'          # greedy, group_limited_greedy (V2) | noaux_tc (V3)
    scoring_func: str = 'sigmoid'          # softmax (V2) | sigmoid (V3)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    aux_loss_alpha: float = 0.0001
    num_nextn_predict_layers: int = 0      # MTP depth: 0 or 1

    @property
    def mla(self):
        return self.model_type.startswith('deepseek')

    @property
    def cache_width(self):
        """Numbers cached a token and layer: the latent and the rope key (MLA), or keys and values (GQA)."""
        if self.mla:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim

    def is_moe(self, layer):
        return bool(self.mla and self.n_routed_experts and layer >= self.first_k_dense_replace
                    and layer % self.moe_layer_freq == 0)

    @classmethod
    def from_hub(cls, config, where='config.json'):
        """config: dict of a config.json, in the hub's style or transformers 5's; keys that are
        absent take the family's defaults. ValueError names the key that is wrong or not supported.
        """
        return cls.checked(hub.config_in(config, where), where)

    @classmethod
    def checked(cls, config, where):
        cfg = cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})
        cfg.check(where)
        return cfg

    @classmethod
    def new(cls, values, where='model'):
        """From values that a user wrote, others as they stand above: ValueError names one that
        there is not, which a file of the hub may hold."""
        for key in values.keys() - {f.name for f in fields(cls)}:
            near = difflib.get_close_matches(key, [f.name for f in fields(cls)], n=1, cutoff=0)[0]
            raise ValueError(f'{where}: unknown key {key!r}; the nearest known one is {near!r}')
        return cls.checked(hub.config_in(values, where, family=False), where)

    @classmethod
    def read(cls, path, **changes):
        """path of a config.json; changes: values of ModelConfig other than the file's"""
        cfg = cls.from_hub(hub.read_json(path), str(path))
        return cls.new({**asdict(cfg), **changes}, f'{path} with {changes}') if changes else cfg

    def check(self, where='config'):
        """ValueError naming the first value that cannot be right."""
        for f in fields(self):
            value = getattr(self, f.name)
            low = 0 if f.name in ('first_k_dense_replace', 'num_nextn_predict_layers') else 1
            if f.type is int and (type(value) is not int or value < low):
                raise ValueError(f'{where}: {f.name} must be an integer >= {low}, got {value!r}')
            if f.type is float and not (type(value) in (int, float) and 0 <= value < math.inf):
                raise ValueError(f'{where}: {f.name} must be a number >= 0, got {value!r}')
            if f.type not in (int, float) and not isinstance(value, f.type):
                raise ValueError(f'{where}: {f.name} must be {getattr(f.type, "__name__", f.type)}, got {value!r}')
        for name, choices in (('topk_method', ('greedy', 'group_limited_greedy', 'noaux_tc')), ('scoring_func', ('softmax', 'sigmoid'))):
            if getattr(self, name) not in choices:
                raise ValueError(f'{where}: {name} must be one of {", ".join(choices)}, got {getattr(self, name)!r}')
        if (self.qk_rope_head_dim if self.mla else self.head_dim) % 2:
            raise ValueError(f'{where}: the rotated width of a head must be even')
        if s := self.rope_scaling:
            needed = ['factor', 'original_max_position_embeddings'] + ['low_freq_factor', 'high_freq_factor'] * (s.get('rope_type') == 'llama3')
            wrong = [name for name in needed if not (type(s.get(name)) in (int, float) and s[name] > 0)]
            if wrong:
                raise ValueError(f'{where}: rope_scaling needs a number > 0 for {", ".join(wrong)}, got {s}')
            for name, value in s.items():
                if name == 'truncate' and type(value) is not bool or \
                        name not in ('truncate', 'rope_type') and type(value) not in (int, float):
                    raise ValueError(f'{where}: rope_scaling: {name} cannot be {value!r}')
            if 'attn_factor' in s and 'attention_factor' in s:
                product = yarn_factor(s)
                if not math.isclose(product, s['attention_factor'], rel_tol=1e-6):
                    raise ValueError(f'{where}: rope_scaling: attention_factor must be '
                                     f'{product:.7g}, as attn_factor={s["attn_factor"]} makes it, '
                                     'or be left out')
        if self.mla and self.n_routed_experts:
            if self.n_routed_experts % self.n_group or self.topk_group > self.n_group:
                raise ValueError(f'{where}: {self.n_routed_experts} experts do not split into n_group={self.n_group} '
                                 f'of which topk_group={self.topk_group}')
            if self.num_experts_per_tok > self.n_routed_experts // self.n_group * self.topk_group:
                raise ValueError(f'{where}: num_experts_per_tok={self.num_experts_per_tok} exceeds the experts to choose from')
        if not self.mla and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f'{where}: num_attention_heads={self.num_attention_heads} is not a multiple of '
                             f'num_key_value_heads={self.num_key_value_heads}')
        if self.num_nextn_predict_layers > 1:
            raise ValueError(f'{where}: num_nextn_predict_layers={self.num_nextn_predict_layers}; at most 1 is supported')


# ---------------------------------------------------------------------------------------------------------------------
# layers


class Linear(nn.Linear):
    def forward(self, x):
        return cpu.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, in float32, cast back before the weight as the released models do."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x, residual=None):
        """-> y; with a residual (y, x + residual), y being the norm of that sum"""
        return rms_norm(x, cast_once(self.weight), self.eps, residual)


def rope_frequencies(cfg):
    """-> inverse frequencies [d/2] float32, and the factor on cos and sin. d is the width that is rotated."""
    d = cfg.qk_rope_head_dim if cfg.mla else cfg.head_dim
    f = cfg.rope_theta ** -(torch.arange(0, d, 2, dtype=torch.float32, device='cpu') / d)
    s = cfg.rope_scaling
    if not s:
        return f, 1.0
    factor, length = s['factor'], s['original_max_position_embeddings']
    if s['rope_type'] == 'llama3':
        wavelength, low, high = 2 * math.pi / f, s['low_freq_factor'], s['high_freq_factor']
        smooth = ((length / wavelength - low) / (high - low)).clamp(0, 1)
        return f * ((1 - smooth) / factor + smooth), 1.0
    # YaRN: long wavelengths are interpolated, short ones kept, with a ramp between
    def dim(rotations):
        return d * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))
    lo, hi = dim(s.get('beta_fast') or 32), dim(s.get('beta_slow') or 1)
    if s.get('truncate', True):
        lo, hi = math.floor(lo), math.ceil(hi)
    lo, hi = max(lo, 0), min(hi, d - 1)
    ramp = ((torch.arange(d // 2, dtype=torch.float32) - lo) / (hi - lo or 0.001)).clamp(0, 1)
    scale = s.get('attention_factor')
    return f / factor * ramp + f * (1 - ramp), yarn_factor(s) if scale is None else scale


def yarn_factor(s):
    """-> YaRN's factor on cos and sin where rope_scaling has no attention_factor. attn_factor
    multiplies it, as in vLLM and SGLang (transformers does not know that key)."""
    scale = yarn_mscale(s['factor'], 1.0)
    if s.get('mscale') and s.get('mscale_all_dim'):
        scale = yarn_mscale(s['factor'], s['mscale']) / yarn_mscale(
            s['factor'], s['mscale_all_dim']
        )
    return scale * s.get('attn_factor', 1.0)


def called(layer, cache_out):
    """-> what to call. A layer that samples runs without the hooks of FSDP: its weights are
    gathered already (sft.Unsharded), and FSDP notes every hooked forward for the next backward
    pass, which gathers the layers in that order. Ranks sample unequally many forwards, so that
    they would gather different layers and wait for ever."""
    return layer if cache_out is None else layer.forward


def yarn_mscale(factor, mscale):
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def cast_once(x):
    """x as autocast will have it: every linear layer that takes it would make a copy of its own.
    Weights that autocast leaves alone go through it as well: under FSDP on GPUs all of them are
    bf16, and one process rounds as that does."""
    return x.to(working_dtype(x))


def attention(q, k, v, mask, scale=None):
    """q [B, H, T, d], k and v [B, H or fewer, L, ·] -> [B, H, T, ·]. mask: None (causal), True where visible [B, 1, T, L], the list that
    cpu.visible made of either, or a function of (q, k, v, scale) that attends in its own way."""
    if callable(mask):
        return mask(q, k, v, scale)
    if isinstance(mask, list) or cpu.trains(q) and short(q.shape[2], k.shape[2]):
        blocks = mask if isinstance(mask, list) else cpu.visible(mask, q.shape[2], k.shape[2])
        dtype = working_dtype(q)
        with torch.autocast('cpu', enabled=False):
            return cpu.Attention.apply(q.to(dtype), k.to(dtype), v.to(dtype), blocks, scale or q.shape[-1] ** -0.5)
    if q.is_cuda and mask is not None:     # the kernel that takes a mask has no groups; without it all scores are kept
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def short(T, L):
    return max(T, L) <= cpu.Attention.LONGEST


def shared_prefix(lengths_P, rows_N, Lp, Lc):
    """-> attention over one row [P Lp + N Lc] of P prefixes, right-padded to Lp, and then N continuations of Lc tokens, number n of prefix
    rows_N[n]: each token sees its prefix and what precedes it."""
    P, N = len(lengths_P), len(rows_N)
    seen = torch.arange(Lp, device=rows_N.device) < lengths_P[rows_N].unsqueeze(1)
    own = torch.ones(Lc, Lc, dtype=torch.bool, device=rows_N.device).tril()
    mask = torch.cat([seen.unsqueeze(1).expand(N, Lc, Lp), own.expand(N, Lc, Lc)], dim=2).unsqueeze(1)
    if mask.device.type == 'cpu':    # once, not in every layer
        mask = cpu.visible(mask, Lc, Lp + Lc) if short(Lc, Lp + Lc) else torch.zeros(mask.shape).masked_fill_(~mask, float('-inf'))

    def attend(q, k, v, scale):
        parts = (t.squeeze(0).split((P * Lp, N * Lc), dim=1) for t in (q, k, v))
        (q1, q2), (k1, k2), (v1, v2) = ((a.unflatten(1, (P, Lp)).transpose(0, 1), b.unflatten(1, (N, Lc)).transpose(0, 1)) for a, b in parts)
        o1 = attention(q1, k1, v1, None, scale)
        k2, v2 = (torch.cat([a.index_select(0, rows_N), b], dim=2) for a, b in ((k1, k2), (v1, v2)))
        o2 = attention(q2, k2, v2, mask, scale)
        return torch.cat([o.transpose(0, 1).flatten(1, 2) for o in (o1, o2)], dim=1).unsqueeze(0)
    return attend


class MLA(nn.Module):
    """Multi-head latent attention. Training expands the latent to keys and values per head; decoding absorbs the
    up-projections into the query and the output, so that only [c | rope key] is ever cached:
    s = [W_UK^T q_nope, q_rope]·[c, k_rope] * scale,  o_h = W_UV (softmax(s) c)."""

    def __init__(self, cfg):
        super().__init__()
        C, H = cfg.hidden_size, cfg.num_attention_heads
        self.H, self.n, self.r, self.v, self.c = H, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.kv_lora_rank
        if cfg.q_lora_rank:
            self.q_a_proj = Linear(C, cfg.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(cfg.q_lora_rank, 1e-6)  # 1e-6 whatever rms_norm_eps says, as in transformers
            self.q_b_proj = Linear(cfg.q_lora_rank, H * (self.n + self.r), bias=False)
        else:
            self.q_proj = Linear(C, H * (self.n + self.r), bias=False)
        self.kv_a_proj_with_mqa = Linear(C, self.c + self.r, bias=False)
        self.kv_a_layernorm = RMSNorm(self.c, 1e-6)
        self.kv_b_proj = Linear(self.c, H * (self.n + self.v), bias=False)
        self.o_proj = Linear(H * self.v, C, bias=False)
        self.scale = (self.n + self.r) ** -0.5
        s = cfg.rope_scaling
        if s and s['rope_type'] == 'yarn' and s.get('mscale_all_dim'):
            self.scale *= yarn_mscale(s['factor'], s['mscale_all_dim']) ** 2

    def project(self, x_BTC, rope):
        """-> q_nope [B, T, H, n], q_rope [B, T, H, r], latent [B, T, c + r] (what the cache holds)"""
        (B, T, _), x_BTC = x_BTC.shape, cast_once(x_BTC)
        q = self.q_proj(x_BTC) if hasattr(self, 'q_proj') else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTC)))
        q_nope, q_rope = q.view(B, T, self.H, self.n + self.r).split([self.n, self.r], dim=-1)
        c, k_rope = self.kv_a_proj_with_mqa(x_BTC).split([self.c, self.r], dim=-1)
        k_rope = apply_rope(k_rope.unsqueeze(2), rope, interleaved=True).squeeze(2)  # one rope key for all heads, not normed
        return q_nope, apply_rope(q_rope, rope, interleaved=True), torch.cat([self.kv_a_layernorm(c), k_rope], dim=-1)

    def forward(self, x_BTC, rope, mask, cache_out=None):
        B, T, _ = x_BTC.shape
        q_nope, q_rope, latent = self.project(x_BTC, rope)
        if cache_out is not None:
            cache_out.append((latent,))
        c, k_rope = latent.split([self.c, self.r], dim=-1)
        k_nope, v = self.kv_b_proj(c).view(B, T, self.H, self.n + self.v).split([self.n, self.v], dim=-1)
        if fused(q_nope) and not callable(mask):
            o = packed_attention(q_nope, k_nope, v, self.scale, mask, q_rope, k_rope)
        else:
            k = torch.cat([k_nope, k_rope.unsqueeze(2).expand(-1, -1, self.H, -1)], dim=-1)
            q = torch.cat([q_nope, q_rope], dim=-1)                                            # [B, T, H, n + r]
            o = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, self.scale).transpose(1, 2)
        return self.o_proj(o.reshape(B, T, self.H * self.v))

    def decode(self, x_BTC, rope, cache, layer):
        """x: the T newest tokens of each row; `cache` (of sample.py) takes them and attends."""
        B, T, _ = x_BTC.shape
        q_nope, q_rope, latent = self.project(x_BTC, rope)
        w_uk, w_uv = self.kv_b_proj.weight.view(self.H, self.n + self.v, self.c).split([self.n, self.v], dim=1)
        q_c = torch.matmul(q_nope.reshape(B * T, self.H, self.n).transpose(0, 1), w_uk)        # [H, BT, c]
        q = torch.cat([q_c.transpose(0, 1).view(B, T, self.H, self.c), q_rope], dim=-1)        # [B, T, H, c + r]
        o_c = cache.attend(layer, q, (latent,), self.scale)                                    # [B, T, H, c]
        o = torch.matmul(o_c.reshape(B * T, self.H, self.c).transpose(0, 1), w_uv.transpose(1, 2))   # [H, BT, v]
        return self.o_proj(o.transpose(0, 1).reshape(B, T, self.H * self.v))


class GQA(nn.Module):
    """Grouped-query attention of Qwen2 (biases on q, k, v), Qwen3 (norms on q and k) and Llama."""

    def __init__(self, cfg):
        super().__init__()
        C, d = cfg.hidden_size, cfg.head_dim
        self.H, self.G, self.d = cfg.num_attention_heads, cfg.num_key_value_heads, d
        bias = cfg.model_type == 'qwen2'
        self.q_proj = Linear(C, self.H * d, bias=bias)
        self.k_proj = Linear(C, self.G * d, bias=bias)
        self.v_proj = Linear(C, self.G * d, bias=bias)
        self.o_proj = Linear(self.H * d, C, bias=False)
        if cfg.model_type == 'qwen3':
            self.q_norm, self.k_norm = RMSNorm(d, cfg.rms_norm_eps), RMSNorm(d, cfg.rms_norm_eps)

    def project(self, x_BTC, rope):
        """-> q [B, T, H, d], k and v [B, T, G, d]"""
        (B, T, _), x_BTC = x_BTC.shape, cast_once(x_BTC)
        q = self.q_proj(x_BTC).view(B, T, self.H, self.d)
        k = self.k_proj(x_BTC).view(B, T, self.G, self.d)
        v = self.v_proj(x_BTC).view(B, T, self.G, self.d)
        if hasattr(self, 'q_norm'):
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, rope, interleaved=False), apply_rope(k, rope, interleaved=False), v

    def forward(self, x_BTC, rope, mask, cache_out=None):
        q, k, v = self.project(x_BTC, rope)
        if cache_out is not None:
            cache_out.append((k.flatten(2), v.flatten(2)))
        if fused(q) and not callable(mask):
            o = packed_attention(q, k, v, self.d ** -0.5, mask)
        else:
            o = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
        return self.o_proj(o.flatten(2))

    def decode(self, x_BTC, rope, cache, layer):
        """As MLA.decode."""
        q, k, v = self.project(x_BTC, rope)
        return self.o_proj(cache.attend(layer, q, (k.flatten(2), v.flatten(2)), self.d ** -0.5).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))"""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x):
        x = cast_once(x)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Gate(nn.Module):
    """The router. V2: s = softmax(x W), top-k of s. V3: s = sigmoid(x W), top-k of s + bias, weights from s without the bias;
    the bias is moved by `update_router_bias`, not by gradients. Both can choose inside the best groups of experts only."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))
        if cfg.topk_method == 'noaux_tc':
            self.register_buffer('e_score_correction_bias', torch.zeros(cfg.n_routed_experts, dtype=torch.float32))

    def forward(self, x_NC, chosen_NK=None):
        """-> weights [N, K], experts [N, K] int64, scores [N, E], float32. `chosen_NK` replays an earlier choice."""
        cfg, weight = self.cfg, cast_once(self.weight)
        with torch.autocast(x_NC.device.type, enabled=False):  # in bf16 ties would flip experts
            logits = F.linear(x_NC.float(), weight.float())
        groups = (1, 1) if cfg.topk_method == 'greedy' else (cfg.n_group, cfg.topk_group)
        return route(logits, self.e_score_correction_bias if cfg.topk_method == 'noaux_tc' else None, cfg.num_experts_per_tok, *groups,
                     cfg.scoring_func == 'sigmoid', cfg.norm_topk_prob, cfg.routed_scaling_factor, chosen_NK)


class Experts(nn.Module):
    """All routed experts of a layer: tokens are sorted by expert, then two grouped GEMMs; no loop over tokens, nor over experts but for training on a CPU."""

    def __init__(self, cfg):
        super().__init__()
        E, C, I = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, I))

    def forward(self, x_NC, weights_NK, chosen_NK):
        x_NC = cast_once(x_NC)
        return experts(x_NC, self.gate_up_proj.to(x_NC.dtype), self.down_proj.to(x_NC.dtype), weights_NK, chosen_NK)


class MoE(nn.Module):
    """sum_k w_k expert_k(x) + shared(x); the shared experts are one ungated MLP."""

    def __init__(self, cfg):
        super().__init__()
        self.gate = Gate(cfg)
        self.experts = Experts(cfg)
        if cfg.n_shared_experts:
            self.shared_experts = MLP(cfg.hidden_size, cfg.n_shared_experts * cfg.moe_intermediate_size)

    def forward(self, x_BTC, chosen_NK=None):
        x_NC = x_BTC.flatten(0, 1)
        weights, chosen, scores = self.gate(x_NC, chosen_NK)
        x_NC = cast_once(x_NC)
        y = self.experts(x_NC, weights, chosen)
        if hasattr(self, 'shared_experts'):
            y = y + self.shared_experts(x_NC)
        return y.view_as(x_BTC), (scores, chosen)


class Layer(nn.Module):
    """Pre-norm decoder layer. `routes` collects (scores, experts) of the MoE; `replay` gives experts to reuse."""

    def __init__(self, cfg, index):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = MLA(cfg) if cfg.mla else GQA(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MoE(cfg) if cfg.is_moe(index) else MLP(cfg.hidden_size, cfg.intermediate_size)

    def forward(self, x, attend, chosen=None):
        """attend: how self_attn is called, `lambda attn, x: attn(x, rope, mask)` or its decode form. -> x, route or None"""
        (h, x), route = self.post_attention_layernorm(attend(self.self_attn, self.input_layernorm(x)), residual=x), None
        if isinstance(self.mlp, MoE):
            h, route = self.mlp(h, chosen)
        else:
            h = self.mlp(h)
        return x + h, route


class MTPLayer(Layer):
    """Multi-token prediction, one step deep: h' = layer(eh_proj[enorm(emb(t_{i+1})), hnorm(h_i)]) predicts t_{i+2}."""

    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.enorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.hnorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.eh_proj = Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({'norm': RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)})

    def forward(self, h, next_embedding, attend):
        x = self.eh_proj(torch.cat([self.enorm(next_embedding), self.hnorm(h)], dim=-1))
        x, route = super().forward(x, attend)
        return self.shared_head.norm(x), route


# ---------------------------------------------------------------------------------------------------------------------
# the model


class Transformer(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        cfg.check()
        self.cfg = cfg
        self.activation_checkpointing = False
        self.absent = None  # ids without a token, see use_tokens
        self.stored_dtype = torch.float32   # of the files that it was read from
        layers = [Layer(cfg, i) for i in range(cfg.num_hidden_layers)]
        layers += [MTPLayer(cfg, cfg.num_hidden_layers + i) for i in range(cfg.num_nextn_predict_layers)]
        self.model = nn.ModuleDict({
            'embed_tokens': nn.Embedding(cfg.vocab_size, cfg.hidden_size),
            'layers': nn.ModuleList(layers),
            'norm': RMSNorm(cfg.hidden_size, cfg.rms_norm_eps),
        })
        if not cfg.tie_word_embeddings:
            self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self._rope = None  # (frequencies, factor), made at first use so that building on the meta device works
        if self.model.embed_tokens.weight.device.type != 'meta':
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal(0, initializer_range) for every matrix, ones for norms, zeros for biases."""
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                p.normal_(0.0, self.cfg.initializer_range)
            elif name.endswith('.bias'):
                p.zero_()

    def use_tokens(self, tokenizer):
        """Ids that are no token of the tokenizer (rows that round an embedding up, gaps) are left
        out of `logprobs` and its entropies, and are not sampled. What `forward` and files have of
        them stays. -> the model"""
        ids = tokenizer.ids_without_token(self.cfg.vocab_size)
        self.absent = torch.tensor(ids, device=self.head_weight.device) if ids else None
        return self

    @property
    def head_weight(self):
        return self.model.embed_tokens.weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def rope(self, positions_BT):
        """-> cos, sin [B, T, 1, d/2] float32"""
        if self._rope is None or self._rope[0].device != positions_BT.device:
            frequencies, factor = rope_frequencies(self.cfg)
            self._rope = frequencies.to(positions_BT.device), factor
        angle = positions_BT.unsqueeze(-1).float() * self._rope[0]
        return (angle.cos() * self._rope[1]).unsqueeze(2), (angle.sin() * self._rope[1]).unsqueeze(2)

    def context(self, input_ids, positions=None, doc_ids=None):
        """-> (cos, sin), mask. Without doc_ids attention is plainly causal (mask None); with them a token sees its own document."""
        B, T = input_ids.shape
        if positions is None:
            positions = torch.arange(T, device=input_ids.device).unsqueeze(0)
        mask = None
        if doc_ids is not None:
            mask = document_mask(doc_ids)
            if mask.dtype == torch.bool and mask.device.type == 'cpu' and torch.is_grad_enabled() and short(T, T):
                mask = cpu.visible(mask, T, T)                                                 # once, not in every layer
        return self.rope(positions), mask

    def hidden(self, input_ids, rope, mask, routes=None, replay=None, cache_out=None):
        """-> final-normed hidden states [B, T, C]. routes, cache_out: lists to append each MoE layer's (scores, experts) and each
        layer's cache entries to: (latent [B, T, c + r],) or (keys, values), both [B, T, G d]; with
        cache_out the caller samples, see `called`. replay: of each MoE layer the experts [N, K]."""
        attend = lambda attn, h: attn(h, rope, mask, cache_out)  # noqa: E731
        x, replay = self.embed(input_ids), iter(replay or ())
        for layer in self.model.layers[:self.cfg.num_hidden_layers]:
            chosen = next(replay, None) if isinstance(layer.mlp, MoE) else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, route = checkpoint(layer, x, attend, chosen, use_reentrant=False)
            else:
                x, route = called(layer, cache_out)(x, attend, chosen)
            if routes is not None and route is not None:
                routes.append(route)
        return self.model.norm(x)

    def mtp_hidden(self, h_BTC, next_ids_BT, rope, mask, routes=None, cache_out=None):
        """h_i and token i+1 -> hidden states [B, T, C] that predict token i+2."""
        layer = called(self.model.layers[self.cfg.num_hidden_layers], cache_out)
        attend = lambda attn, h: attn(h, rope, mask, cache_out)  # noqa: E731
        x, route = layer(h_BTC, self.embed(next_ids_BT), attend)
        if routes is not None and route is not None:
            routes.append(route)
        return x

    def embed(self, ids):
        return cast_once(self.model.embed_tokens(ids))

    def logits(self, h):
        """h [..., C] -> float32 logits [..., V]; the product is float32 too: bf16 heads make sampler and trainer disagree."""
        weight = cast_once(self.head_weight)
        with torch.autocast(h.device.type, enabled=False):
            if h.is_cuda and h.dtype == weight.dtype == torch.bfloat16:
                # the same sums without a float32 copy of the head
                z = torch.mm(h.flatten(0, -2), weight.t(), out_dtype=torch.float32)
                return z.unflatten(0, h.shape[:-1])
            return F.linear(h.float(), weight.float())

    def forward(self, input_ids, positions=None, doc_ids=None):
        """input_ids [B, T] int64 -> logits [B, T, V] float32. positions, doc_ids [B, T] as in data/loader.py for packed rows."""
        rope, mask = self.context(input_ids, positions, doc_ids)
        return self.logits(self.hidden(input_ids, rope, mask))

    def logprobs(self, input_ids, labels, positions=None, doc_ids=None, temperature=1.0, mtp=False, entropy=False,
                 routes=None, replay=None, prefix=None):
        """Log-probabilities of labels, where labels [B, T] holds each position's next token or -100 for "no loss here".
        Ids that use_tokens found to be no token have none.
        -> logp [n], entropy [n] or None, mtp_logp [m] or None, float32, over the n labelled positions in row-major order;
        logp = log softmax(logits / temperature)[label]. mtp_logp is over positions whose token after next is labelled in the
        same document, at temperature 1. prefix: what the rows continue, computed once for all that share it: ids [P, Lp] right-padded,
        lengths [P], and the rows' numbers [B] among them; routes and replay are then of P Lp tokens and B T after them."""
        if prefix is None:
            rope, mask = self.context(input_ids, positions, doc_ids)
            h = self.hidden(input_ids, rope, mask, routes, replay)
        else:
            (B, T), (ids, lengths, rows) = input_ids.shape, prefix
            at = [torch.arange(ids.shape[1], device=ids.device).expand_as(ids), lengths[rows].unsqueeze(1) + torch.arange(T, device=ids.device)]
            rope, mask = self.rope(torch.cat([t.flatten() for t in at]).unsqueeze(0)), shared_prefix(lengths, rows, ids.shape[1], T)
            h = self.hidden(torch.cat([ids.flatten(), input_ids.flatten()]).unsqueeze(0), rope, mask, routes, replay)
            h = h.squeeze(0).split((ids.numel(), B * T))[1].unflatten(0, (B, T))
        chosen, weight = labels != -100, cast_once(self.head_weight)
        logp, H = linear_logprob(h[chosen], weight, labels[chosen], temperature, entropy,
                                 absent=self.absent)
        mtp_logp = None
        if mtp:
            labels2 = F.pad(labels[:, 1:], (0, 1), value=-100)
            if doc_ids is not None:
                labels2 = labels2.masked_fill(F.pad(doc_ids[:, 1:], (0, 1), value=-9) != doc_ids, -100)
            chosen2 = labels2 != -100
            h2 = self.mtp_hidden(h, F.pad(input_ids[:, 1:], (0, 1)), rope, mask, routes)
            mtp_logp, _ = linear_logprob(h2[chosen2], weight, labels2[chosen2], absent=self.absent)
        return logp, H, mtp_logp

    def prefill(self, input_ids, last, routes=None):
        """Prompts [B, T] right-padded, last [B] the index of each one's last token -> logits there [B, V], and the list over
        layers of cache entries, as `hidden` makes them."""
        rope, mask = self.context(input_ids)
        entries = []
        h = self.hidden(input_ids, rope, mask, routes, cache_out=entries)
        return self.logits(h[torch.arange(len(h), device=h.device), last]), entries

    def mtp_prefill(self, ids, last):
        """Rows [B, T + 1] right-padded, last [B] the index of each one's last token but one -> the
        MTP layer's logits there [B, V], of the token that follows the row, and its cache entry of
        T tokens."""
        (rope, mask), entries = self.context(ids[:, :-1]), []
        h = self.hidden(ids[:, :-1], rope, mask, cache_out=[])
        h = self.mtp_hidden(h, ids[:, 1:], rope, mask, cache_out=entries)
        return self.logits(h[torch.arange(len(h), device=h.device), last]), entries[0]

    def decode(self, input_ids, positions, cache, routes=None):
        """The next tokens [B, T] at positions [B, T] -> final-normed hidden states [B, T, C].
        cache: a sample.Cache, told where."""
        rope, x = self.rope(positions), self.embed(input_ids)
        for i, layer in enumerate(self.model.layers[:self.cfg.num_hidden_layers]):
            # see `called`
            x, route = layer.forward(x, lambda attn, h: attn.decode(h, rope, cache, i))
            if routes is not None and route is not None:
                routes.append(route)
        return self.model.norm(x)

    def mtp_decode(self, h_BTC, next_ids_BT, positions, cache):
        """`mtp_hidden` of the newest tokens, on a cache of the MTP layer alone."""
        rope, layer = self.rope(positions), self.model.layers[self.cfg.num_hidden_layers]
        attend = lambda attn, h: attn.decode(h, rope, cache, 0)  # noqa: E731
        return layer.forward(h_BTC, self.embed(next_ids_BT), attend)[0]

    # ---- size

    def num_params(self, active=False):
        """Parameters, or those a token uses: K of E routed experts, no MTP layer, no embedding look-up."""
        n = sum(p.numel() for p in self.parameters())
        if not active:
            return n
        n -= self.model.embed_tokens.weight.numel() * (not self.cfg.tie_word_embeddings)
        n -= sum(p.numel() for layer in self.model.layers[self.cfg.num_hidden_layers:] for p in layer.parameters())
        for layer in self.model.layers[:self.cfg.num_hidden_layers]:
            if isinstance(layer.mlp, MoE):
                idle = 1 - self.cfg.num_experts_per_tok / self.cfg.n_routed_experts
                n -= int(idle * sum(p.numel() for p in layer.mlp.experts.parameters()))
        return n

    # ---- the hub's files

    def hub_tensors(self, state_dict=None):
        """{hub name: (tensor, index)}: where each tensor of a checkpoint lives here; index cuts an expert out of its stack."""
        names, I = {}, self.cfg.moe_intermediate_size
        for name, tensor in (state_dict or self.state_dict(keep_vars=True)).items():
            if '.experts.' not in name:
                names[name] = (tensor, ...)
                continue
            stem, kind = name.rsplit('.', 1)
            for e in range(self.cfg.n_routed_experts):
                if kind == 'down_proj':
                    names[f'{stem}.{e}.down_proj.weight'] = (tensor, e)
                else:
                    names[f'{stem}.{e}.gate_proj.weight'] = (tensor, (e, slice(0, I)))
                    names[f'{stem}.{e}.up_proj.weight'] = (tensor, (e, slice(I, 2 * I)))
        return names

    @classmethod
    def from_pretrained(cls, source, dtype=torch.float32, device='cpu', shard=None, **changes):
        """A folder in the hub's layout, or a hub id -> model with weights in `dtype` (routing biases stay float32). One error names every
        tensor that is missing, unexpected or misshapen. changes: values of ModelConfig other than the file's. shard(model): FSDP2's
        fully_shard, applied before there is memory; each rank then allocates and reads the rows that it keeps."""
        folder = hub.local_folder(source)
        cfg = ModelConfig.read(folder / 'config.json', **changes)
        files = hub.checkpoint_files(folder)
        if cfg.num_nextn_predict_layers and not any(name.startswith(f'model.layers.{cfg.num_hidden_layers}.') for name in files):
            warnings.warn(f'{folder}: config.json promises an MTP layer, the files hold none (transformers drops it); the model has none')
            cfg.num_nextn_predict_layers = 0
        if cfg.mla and f'model.layers.{cfg.num_hidden_layers}.eh_proj.weight' in files \
                and not {'num_nextn_predict_layers', 'num_mtp_layers', *changes} \
                & hub.read_json(folder / 'config.json').keys():
            cfg.num_nextn_predict_layers = 1    # not said there: it is what the files hold
        pair = 'lm_head.weight', 'model.embed_tokens.weight'
        if cfg.tie_word_embeddings and hub.differ(files, *pair):
            warnings.warn(
                f'{folder}: config.json ties the head to the embedding, but lm_head.weight '
                'in the files is another: the model has the head of the files, untied (as '
                'transformers 5 does)'
            )
            cfg.tie_word_embeddings = False
        with torch.device('meta'):
            model = cls(cfg)
        hub.check_tensors(cfg, model.hub_tensors(), files, folder)
        for module in model.modules():  # not model.to(dtype): it would cast the routing biases, which are buffers, too
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(p.to(dtype)))
        if shard is not None:
            shard(model)
        model.to_empty(device=device)
        hub.load_tensors(model.hub_tensors(), files)
        halves = {'F16': torch.float16, 'BF16': torch.bfloat16}
        stored = files['model.embed_tokens.weight'][2]      # BF16 in an FP8 checkpoint
        model.stored_dtype = halves.get(stored, torch.float32)
        return model

    def save_pretrained(self, folder, dtype=None, max_shard_bytes=5 * 2**30, state_dict=None):
        """Writes config.json and model*.safetensors, the hub's layout, in `dtype` (default: as in memory). The files are written
        beside `folder` and moved in when complete: a full disk leaves what was there. OSError says where.
        state_dict: whole tensors to write where the model's own are sharded."""
        tensors = {name: tensor.detach()[index] for name, (tensor, index) in self.hub_tensors(state_dict).items()}
        kept = dtype or self.model.embed_tokens.weight.dtype
        config = hub.config_out(self.cfg, kept, rope_frequencies(self.cfg)[1])
        hub.save_tensors(folder, tensors, config, dtype, max_shard_bytes)


@torch.no_grad()
def update_router_bias(model, counts, rate):
    """Auxiliary-loss-free balancing: b_i += rate * sign(mean(count) - count_i), counts [MoE layers, E] of the step over all ranks;
    the MTP layer's comes last, and may be left out."""
    gates = [layer.mlp.gate for layer in model.model.layers if isinstance(layer.mlp, MoE)]
    for gate, count in zip(gates, counts):
        if gate.cfg.topk_method == 'noaux_tc':
            gate.e_score_correction_bias += rate * torch.sign(count.float().mean() - count.float())


def sequence_balance_loss(scores_NE, chosen_NK, real_BT):
    """sum_i f_i P_i of each sequence, averaged over the B sequences: f_i = E / (K T) * #{t: i chosen}, P_i = mean_t s_it / sum_j s_jt,
    over the T tokens that are real [B, T] (1, or 0 for padding)."""
    (B, _), E, K = real_BT.shape, scores_NE.shape[1], chosen_NK.shape[1]
    mean = lambda t: (t.view(B, -1, E) * real_BT.unsqueeze(2)).sum(1) / real_BT.sum(1, keepdim=True).clamp(min=1)  # noqa: E731
    share, chosen = scores_NE / scores_NE.sum(-1, keepdim=True), torch.zeros_like(scores_NE).scatter_(1, chosen_NK, 1.0)
    return (mean(chosen) * (E / K) * mean(share)).sum(-1).mean()
