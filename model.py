"""
The transformer: DeepSeek's MLA + MoE + MTP, and the dense GQA decoder of its distilled students.

One class, `Transformer`, covers DeepSeek-V2, DeepSeek-V3/R1, Moonlight, Kimi-K2, Qwen2/2.5, Qwen3
and Llama 3. Module names are the hub's weight names, so a checkpoint is read and written without a
conversion table; the one exception is the routed experts, one tensor each on disk and stacked
[E, ...] in memory, so that one grouped GEMM serves them all.

    model = Transformer.from_pretrained(source)      # a folder or a hub id; hub.py reads the files
    logits_BTV = model(input_ids_BT)                 # float32
    model.save_pretrained(folder)                    # what transformers and vLLM load

How an operation is computed (Triton, PyTorch, a CPU's own way) is the matter of kernels/, one
function each; what a token may see is said by a Mask (kernels/attention.py).

Shapes: B batch, T tokens, C hidden width, H heads, V vocabulary, N = B*T tokens, E experts, K
experts a token; in MLA n, r, v are the head widths without rope, with rope, and of values; c is the
width of the latent; in GQA G key heads of width d.

Left out: dropout, sliding windows, attention biases other than Qwen2's, quantised compute, vision
towers. Papers: DeepSeek-V2 arXiv:2405.04434 (MLA, DeepSeekMoE), DeepSeek-V3 arXiv:2412.19437 (bias
balancing, MTP), YaRN arXiv:2309.00071.
"""

import difflib
import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import hub
from kernels import working_dtype
from kernels.attention import Mask, attention
from kernels.cpu import linear
from kernels.linear_logprob import linear_logprob
from kernels.moe import experts
from kernels.rmsnorm import rms_norm
from kernels.rope import apply_rope
from kernels.router import route
from kernels.swiglu import swiglu

# ------------------------------------------------------------------------------------------
# configuration


@dataclass
class ModelConfig:
    """A model's shape, in the hub's spelling. `rope_scaling` holds `rope_type` "yarn" or "llama3"
    and its numbers, or is None."""

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
        """Numbers cached a token and layer: the latent and the rope key (MLA), or keys and values
        (GQA)."""
        if self.mla:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim

    def is_moe(self, layer):
        if not self.mla or not self.n_routed_experts:
            return False
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

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
        hub.check_values(self, where)
        s = self.rope_scaling or {}
        if 'attn_factor' in s and 'attention_factor' in s:
            product = yarn_factor(s)
            if not math.isclose(product, s['attention_factor'], rel_tol=1e-6):
                raise ValueError(
                    f'{where}: rope_scaling: attention_factor must be '
                    f'{product:.7g}, as attn_factor={s["attn_factor"]} makes it, or be left out')


# ------------------------------------------------------------------------------------------
# layers


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, in float32, cast back before the weight as the
    released models do."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x, residual=None):
        """-> y; with a residual (y, x + residual), y being the norm of that sum"""
        return rms_norm(x, cast_once(self.weight), self.eps, residual)


def cast_once(x):
    """x as autocast will have it: every linear layer that takes it would make a copy of its own.
    Weights that autocast leaves alone go through it as well: under FSDP on GPUs all of them are
    bf16, and one process rounds as that does."""
    return x.to(working_dtype(x))


def rope_frequencies(cfg):
    """-> inverse frequencies [d/2] float32, and the factor on cos and sin. d is the width that is
    rotated."""
    d = cfg.qk_rope_head_dim if cfg.mla else cfg.head_dim
    f = cfg.rope_theta ** -(torch.arange(0, d, 2, dtype=torch.float32, device='cpu') / d)
    s = cfg.rope_scaling
    if not s:
        return f, 1.0
    if s['rope_type'] == 'llama3':
        return llama3_frequencies(f, s), 1.0
    factor = s.get('attention_factor')
    if factor is None:
        factor = yarn_factor(s)
    return yarn_frequencies(f, s, d, cfg.rope_theta), factor


def llama3_frequencies(f, s):
    """f [d/2], s the config's rope_scaling: long wavelengths are interpolated, short ones kept"""
    low, high = s['low_freq_factor'], s['high_freq_factor']
    wavelength = 2 * math.pi / f
    turns = s['original_max_position_embeddings'] / wavelength
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return f * ((1 - smooth) / s['factor'] + smooth)


def yarn_frequencies(f, s, d, theta):
    """The same with a ramp over dimensions between the two"""
    length = s['original_max_position_embeddings']

    def dim(rotations):
        return d * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    lo = dim(s.get('beta_fast') or 32)
    hi = dim(s.get('beta_slow') or 1)
    if s.get('truncate', True):
        lo = math.floor(lo)
        hi = math.ceil(hi)
    lo = max(lo, 0)
    hi = min(hi, d - 1)
    ramp = (torch.arange(d // 2, dtype=torch.float32) - lo) / (hi - lo or 0.001)
    ramp = ramp.clamp(0, 1)
    return f / s['factor'] * ramp + f * (1 - ramp)


def yarn_factor(s):
    """-> YaRN's factor on cos and sin where rope_scaling has no attention_factor. attn_factor
    multiplies it, as in vLLM and SGLang (transformers does not know that key)."""
    scale = yarn_mscale(s['factor'], 1.0)
    if s.get('mscale') and s.get('mscale_all_dim'):
        below = yarn_mscale(s['factor'], s['mscale_all_dim'])
        scale = yarn_mscale(s['factor'], s['mscale']) / below
    return scale * s.get('attn_factor', 1.0)


def yarn_mscale(factor, mscale):
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


class MLA(nn.Module):
    """Multi-head latent attention. Training expands the latent to keys and values per head;
    decoding absorbs the up-projections into the query and the output, so that only [c | rope key]
    is ever cached: s = [W_UK^T q_nope, q_rope]·[c, k_rope] * scale,  o_h = W_UV (softmax(s) c)."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.hidden_size
        self.H = cfg.num_attention_heads
        self.n = cfg.qk_nope_head_dim
        self.r = cfg.qk_rope_head_dim
        self.v = cfg.v_head_dim
        self.c = cfg.kv_lora_rank
        eps = 1e-6       # whatever rms_norm_eps says, as in transformers
        if cfg.q_lora_rank:
            self.q_a_proj = Linear(C, cfg.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(cfg.q_lora_rank, eps)
            self.q_b_proj = Linear(cfg.q_lora_rank, self.H * (self.n + self.r), bias=False)
        else:
            self.q_proj = Linear(C, self.H * (self.n + self.r), bias=False)
        self.kv_a_proj_with_mqa = Linear(C, self.c + self.r, bias=False)
        self.kv_a_layernorm = RMSNorm(self.c, eps)
        self.kv_b_proj = Linear(self.c, self.H * (self.n + self.v), bias=False)
        self.o_proj = Linear(self.H * self.v, C, bias=False)
        self.scale = (self.n + self.r) ** -0.5
        s = cfg.rope_scaling
        if s and s['rope_type'] == 'yarn' and s.get('mscale_all_dim'):
            self.scale *= yarn_mscale(s['factor'], s['mscale_all_dim']) ** 2

    def project(self, x_BTC, rope):
        """-> q_nope [B, T, H, n], q_rope [B, T, H, r], latent [B, T, c + r], which is cached"""
        B, T, _ = x_BTC.shape
        x_BTC = cast_once(x_BTC)
        if hasattr(self, 'q_proj'):
            q = self.q_proj(x_BTC)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTC)))
        q_nope, q_rope = q.view(B, T, self.H, self.n + self.r).split([self.n, self.r], dim=-1)

        # one rope key for all heads, not normed
        c, k_rope = self.kv_a_proj_with_mqa(x_BTC).split([self.c, self.r], dim=-1)
        k_rope = apply_rope(k_rope.unsqueeze(2), rope, interleaved=True).squeeze(2)
        q_rope = apply_rope(q_rope, rope, interleaved=True)
        return q_nope, q_rope, torch.cat([self.kv_a_layernorm(c), k_rope], dim=-1)

    def forward(self, x_BTC, rope, mask, entries=None):
        """entries: a list, to which the cache entries of the tokens are appended"""
        B, T, _ = x_BTC.shape
        q_nope, q_rope, latent = self.project(x_BTC, rope)
        if entries is not None:
            entries.append((latent,))
        c, k_rope = latent.split([self.c, self.r], dim=-1)
        kv = self.kv_b_proj(c).view(B, T, self.H, self.n + self.v)
        k_nope, v = kv.split([self.n, self.v], dim=-1)
        o = attention(q_nope, k_nope, v, self.scale, mask, q_rope, k_rope)
        return self.o_proj(o.reshape(B, T, self.H * self.v))

    def decode(self, x_BTC, rope, cache, layer):
        """x: the T newest tokens of each row; cache (kv_cache.Cache) takes them and attends."""
        B, T, _ = x_BTC.shape
        q_nope, q_rope, latent = self.project(x_BTC, rope)
        w = self.kv_b_proj.weight.view(self.H, self.n + self.v, self.c)
        w_uk, w_uv = w.split([self.n, self.v], dim=1)

        # queries in the space of the latent, [H, BT, c]
        q_c = torch.matmul(q_nope.reshape(B * T, self.H, self.n).transpose(0, 1), w_uk)
        q = torch.cat([q_c.transpose(0, 1).view(B, T, self.H, self.c), q_rope], dim=-1)
        o_c = cache.attend(layer, q, (latent,), self.scale)                       # [B, T, H, c]

        # and back to values, [H, BT, v]
        o_c = o_c.reshape(B * T, self.H, self.c).transpose(0, 1)
        o = torch.matmul(o_c, w_uv.transpose(1, 2))
        return self.o_proj(o.transpose(0, 1).reshape(B, T, self.H * self.v))


class GQA(nn.Module):
    """Grouped-query attention of Qwen2 (biases on q, k, v), Qwen3 (norms on q and k) and Llama."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.hidden_size
        self.H = cfg.num_attention_heads
        self.G = cfg.num_key_value_heads
        self.d = cfg.head_dim
        self.scale = self.d ** -0.5
        bias = cfg.model_type == 'qwen2'
        self.q_proj = Linear(C, self.H * self.d, bias=bias)
        self.k_proj = Linear(C, self.G * self.d, bias=bias)
        self.v_proj = Linear(C, self.G * self.d, bias=bias)
        self.o_proj = Linear(self.H * self.d, C, bias=False)
        if cfg.model_type == 'qwen3':
            self.q_norm = RMSNorm(self.d, cfg.rms_norm_eps)
            self.k_norm = RMSNorm(self.d, cfg.rms_norm_eps)

    def project(self, x_BTC, rope):
        """-> q [B, T, H, d], k and v [B, T, G, d]"""
        B, T, _ = x_BTC.shape
        x_BTC = cast_once(x_BTC)
        q = self.q_proj(x_BTC).view(B, T, self.H, self.d)
        k = self.k_proj(x_BTC).view(B, T, self.G, self.d)
        v = self.v_proj(x_BTC).view(B, T, self.G, self.d)
        if hasattr(self, 'q_norm'):
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = apply_rope(q, rope, interleaved=False)
        k = apply_rope(k, rope, interleaved=False)
        return q, k, v

    def forward(self, x_BTC, rope, mask, entries=None):
        """As MLA.forward."""
        q, k, v = self.project(x_BTC, rope)
        if entries is not None:
            entries.append((k.flatten(2), v.flatten(2)))
        return self.o_proj(attention(q, k, v, self.scale, mask).flatten(2))

    def decode(self, x_BTC, rope, cache, layer):
        """As MLA.decode."""
        q, k, v = self.project(x_BTC, rope)
        o = cache.attend(layer, q, (k.flatten(2), v.flatten(2)), self.scale)
        return self.o_proj(o.flatten(2))


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
    """The router. V2: s = softmax(x W), top-k of s. V3: s = sigmoid(x W), top-k of s + bias,
    weights from s without the bias; the bias is moved by `update_router_bias`, not by gradients.
    Both can choose inside the best groups of experts only."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        E = cfg.n_routed_experts
        self.weight = nn.Parameter(torch.empty(E, cfg.hidden_size))
        if cfg.topk_method == 'noaux_tc':
            self.register_buffer('e_score_correction_bias', torch.zeros(E, dtype=torch.float32))

    def forward(self, x_NC, chosen_NK=None):
        """-> weights [N, K], experts [N, K] int64, scores [N, E], float32. `chosen_NK` replays an
        earlier choice."""
        cfg = self.cfg
        weight = cast_once(self.weight)
        with torch.autocast(x_NC.device.type, enabled=False):  # in bf16 ties would flip experts
            logits = F.linear(x_NC.float(), weight.float())
        bias = self.e_score_correction_bias if cfg.topk_method == 'noaux_tc' else None
        groups = (1, 1) if cfg.topk_method == 'greedy' else (cfg.n_group, cfg.topk_group)
        return route(
            logits, bias, cfg.num_experts_per_tok, *groups, cfg.scoring_func == 'sigmoid',
            cfg.norm_topk_prob, cfg.routed_scaling_factor, chosen_NK)


class Experts(nn.Module):
    """All routed experts of a layer: tokens are sorted by expert, then two grouped GEMMs; no loop
    over tokens, nor over experts but for training on a CPU."""

    def __init__(self, cfg):
        super().__init__()
        E, C, I = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, I))

    def forward(self, x_NC, weights_NK, chosen_NK):
        x_NC = cast_once(x_NC)
        gate_up = self.gate_up_proj.to(x_NC.dtype)
        down = self.down_proj.to(x_NC.dtype)
        return experts(x_NC, gate_up, down, weights_NK, chosen_NK)


class MoE(nn.Module):
    """sum_k w_k expert_k(x) + shared(x); the shared experts are one ungated MLP."""

    def __init__(self, cfg):
        super().__init__()
        self.gate = Gate(cfg)
        self.experts = Experts(cfg)
        if cfg.n_shared_experts:
            hidden = cfg.n_shared_experts * cfg.moe_intermediate_size
            self.shared_experts = MLP(cfg.hidden_size, hidden)

    def forward(self, x_BTC, chosen_NK=None):
        """-> y [B, T, C], (scores [N, E], experts [N, K])"""
        x_NC = x_BTC.flatten(0, 1)
        weights, chosen, scores = self.gate(x_NC, chosen_NK)
        x_NC = cast_once(x_NC)
        y = self.experts(x_NC, weights, chosen)
        if hasattr(self, 'shared_experts'):
            y = y + self.shared_experts(x_NC)
        return y.view_as(x_BTC), (scores, chosen)


class Layer(nn.Module):
    """Pre-norm decoder layer: x + attention(norm(x)), of that y + mlp(norm(y))."""

    def __init__(self, cfg, index):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = MLA(cfg) if cfg.mla else GQA(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MoE(cfg) if cfg.is_moe(index) else MLP(cfg.hidden_size, cfg.intermediate_size)

    def forward(self, x, rope, mask, chosen=None, entries=None):
        """chosen [N, K]: of a MoE the experts to reuse; entries: as in MLA.forward
        -> x [B, T, C], (scores, experts) of a MoE or None"""
        h = self.self_attn(self.input_layernorm(x), rope, mask, entries)
        return self.add_mlp(x, h, chosen)

    def decode(self, x, rope, cache, layer):
        """As forward, of the newest tokens; layer: the number of this one in the cache"""
        h = self.self_attn.decode(self.input_layernorm(x), rope, cache, layer)
        return self.add_mlp(x, h)

    def add_mlp(self, x, h, chosen=None):
        h, x = self.post_attention_layernorm(h, residual=x)      # the norm of x + h, and x + h
        route = None
        if isinstance(self.mlp, MoE):
            h, route = self.mlp(h, chosen)
        else:
            h = self.mlp(h)
        return x + h, route


class MTPLayer(Layer):
    """Multi-token prediction, one step deep:
    h' = layer(eh_proj[enorm(emb(t_{i+1})), hnorm(h_i)]) predicts t_{i+2}."""

    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.enorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.hnorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.eh_proj = Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({'norm': RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)})

    def forward(self, h, next_embedding, rope, mask, entries=None):
        x, route = super().forward(self.merge(h, next_embedding), rope, mask, None, entries)
        return self.shared_head.norm(x), route

    def decode(self, h, next_embedding, rope, cache):
        """On a cache of this layer alone"""
        x, route = super().decode(self.merge(h, next_embedding), rope, cache, 0)
        return self.shared_head.norm(x), route

    def merge(self, h, next_embedding):
        return self.eh_proj(torch.cat([self.enorm(next_embedding), self.hnorm(h)], dim=-1))


# ------------------------------------------------------------------------------------------
# the model


class Transformer(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        cfg.check()
        self.cfg = cfg
        self.activation_checkpointing = False
        self.absent = None  # ids without a token, see use_tokens
        self.stored_dtype = torch.float32   # of the files that it was read from
        n = cfg.num_hidden_layers
        layers = [Layer(cfg, i) for i in range(n)]
        layers += [MTPLayer(cfg, n + i) for i in range(cfg.num_nextn_predict_layers)]
        self.model = nn.ModuleDict({
            'embed_tokens': nn.Embedding(cfg.vocab_size, cfg.hidden_size),
            'layers': nn.ModuleList(layers),
            'norm': RMSNorm(cfg.hidden_size, cfg.rms_norm_eps),
        })
        if not cfg.tie_word_embeddings:
            self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self._rope = None  # frequencies and factor: made at first use, not on the meta device
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
    def layers(self):
        """Without the MTP layer"""
        return self.model.layers[:self.cfg.num_hidden_layers]

    @property
    def mtp_layer(self):
        return self.model.layers[self.cfg.num_hidden_layers]

    @property
    def head_weight(self):
        if self.cfg.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    # ---- from ids to logits

    def forward(self, input_ids, positions=None, doc_ids=None):
        """input_ids [B, T] int64 -> logits [B, T, V] float32. positions, doc_ids [B, T] as in
        data/loader.py for packed rows."""
        rope, mask = self.context(input_ids, positions, doc_ids)
        return self.logits(self.hidden(input_ids, rope, mask))

    def context(self, input_ids, positions=None, doc_ids=None):
        """-> rope, mask. A token sees what precedes it in its row; with doc_ids in its document."""
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        mask = Mask.causal() if doc_ids is None else Mask.documents(doc_ids)
        return self.rope(positions), mask

    def rope(self, positions_BT):
        """-> cos, sin [B, T, 1, d/2] float32"""
        if self._rope is None or self._rope[0].device != positions_BT.device:
            frequencies, factor = rope_frequencies(self.cfg)
            self._rope = frequencies.to(positions_BT.device), factor
        frequencies, factor = self._rope
        angle = positions_BT.unsqueeze(-1).float() * frequencies
        return (angle.cos() * factor).unsqueeze(2), (angle.sin() * factor).unsqueeze(2)

    def embed(self, ids):
        return cast_once(self.model.embed_tokens(ids))

    def hidden(self, input_ids, rope, mask, routes=None, replay=None, entries=None):
        """-> final-normed hidden states [B, T, C].

        routes: a list, to which each MoE layer's (scores [N, E], experts [N, K]) are appended
        replay: of each MoE layer the experts [N, K] to take instead of its own choice
        entries: a list, to which each layer's cache entries are appended, (latent [B, T, c + r],)
            or (keys, values), both [B, T, G d]; it also says that this is sampling, see
            `read_prompts`
        """
        x = self.embed(input_ids)
        replay = iter(replay or ())
        for layer in self.layers:
            chosen = next(replay, None) if isinstance(layer.mlp, MoE) else None
            if entries is not None:
                x, route = layer.forward(x, rope, mask, chosen, entries)
            elif self.activation_checkpointing and torch.is_grad_enabled():
                x, route = checkpoint(layer, x, rope, mask, chosen, use_reentrant=False)
            else:
                x, route = layer(x, rope, mask, chosen)
            if routes is not None and route is not None:
                routes.append(route)
        return self.model.norm(x)

    def mtp_hidden(self, h_BTC, next_ids_BT, rope, mask, routes=None, entries=None):
        """h_i and token i+1 -> hidden states [B, T, C] that predict token i+2."""
        next_embedding = self.embed(next_ids_BT)
        if entries is not None:
            x, route = self.mtp_layer.forward(h_BTC, next_embedding, rope, mask, entries)
        else:
            x, route = self.mtp_layer(h_BTC, next_embedding, rope, mask)
        if routes is not None and route is not None:
            routes.append(route)
        return x

    def logits(self, h):
        """h [..., C] -> float32 logits [..., V]; the product is float32 too: bf16 heads make
        sampler and trainer disagree."""
        weight = cast_once(self.head_weight)
        with torch.autocast(h.device.type, enabled=False):
            if h.is_cuda and h.dtype == weight.dtype == torch.bfloat16:
                # the same sums without a float32 copy of the head
                z = torch.mm(h.flatten(0, -2), weight.t(), out_dtype=torch.float32)
                return z.unflatten(0, h.shape[:-1])
            return F.linear(h.float(), weight.float())

    # ---- training

    def logprobs(self, input_ids, labels, positions=None, doc_ids=None, temperature=1.0, mtp=False,
                 entropy=False, routes=None, replay=None, prefix=None):
        """Log-probabilities of labels, where labels [B, T] holds each position's next token, or
        -100 for "no loss here". Ids that use_tokens found to be no token have none.

        -> logp [n], entropy [n] or None, mtp_logp [m] or None, float32, over the n labelled
        positions in row-major order; logp = log softmax(logits / temperature)[label].

        mtp: also of the MTP layer, over positions whose token after next is labelled in the same
            document, at temperature 1
        prefix: what the rows continue, computed once for all that share it: ids [P, Lp]
            right-padded, lengths [P], and the rows' numbers [B] among them; routes and replay are
            then of P Lp tokens and B T after them
        """
        if mtp and prefix is not None:
            raise ValueError('logprobs: mtp goes with whole rows, not with a prefix')
        if prefix is None:
            rope, mask = self.context(input_ids, positions, doc_ids)
            h = self.hidden(input_ids, rope, mask, routes, replay)
        else:
            h = self.hidden_after(prefix, input_ids, routes, replay)

        weight = cast_once(self.head_weight)
        labelled = labels != -100
        logp, H = linear_logprob(
            h[labelled], weight, labels[labelled], temperature, entropy, absent=self.absent)
        if not mtp:
            return logp, H, None

        h2 = self.mtp_hidden(h, F.pad(input_ids[:, 1:], (0, 1)), rope, mask, routes)
        labels2 = one_further(labels, doc_ids)
        labelled = labels2 != -100
        mtp_logp, _ = linear_logprob(h2[labelled], weight, labels2[labelled], absent=self.absent)
        return logp, H, mtp_logp

    def hidden_after(self, prefix, input_ids, routes=None, replay=None):
        """-> hidden states [B, T, C] of rows that continue a prefix, as in `logprobs`. All prefixes
        and rows are one row for the layers."""
        B, T = input_ids.shape
        prefix_ids, lengths, rows = prefix
        P, Lp = prefix_ids.shape
        device = input_ids.device

        in_prefix = torch.arange(Lp, device=device).expand(P, Lp)
        in_rows = lengths[rows].unsqueeze(1) + torch.arange(T, device=device)
        positions = torch.cat([in_prefix.flatten(), in_rows.flatten()]).unsqueeze(0)
        ids = torch.cat([prefix_ids.flatten(), input_ids.flatten()]).unsqueeze(0)

        mask = Mask.shared_prefix(lengths, rows, Lp, T)
        h = self.hidden(ids, self.rope(positions), mask, routes, replay)
        _, h = h.squeeze(0).split((P * Lp, B * T))
        return h.unflatten(0, (B, T))

    # ---- sampling
    #
    # It calls layer.forward and layer.decode, which pass by the hooks of FSDP: the weights are
    # gathered already (`with Unsharded(model)`), and FSDP notes every hooked forward for the next
    # backward pass, which gathers the layers in that order. Ranks sample unequally many forwards,
    # so that they would gather different layers and wait for ever.

    def read_prompts(self, input_ids, last, routes=None):
        """Prompts [B, T] right-padded, last [B] the index of each one's last token -> logits there
        [B, V], and the list over layers of cache entries, as `hidden` makes them."""
        rope, mask = self.context(input_ids)
        entries = []
        h = self.hidden(input_ids, rope, mask, routes, entries=entries)
        return self.logits(at_last(h, last)), entries

    def mtp_read_prompts(self, ids, last):
        """Rows [B, T + 1] right-padded, last [B] the index of each one's last token but one -> the
        MTP layer's logits there [B, V], of the token that follows the row, and its cache entry of
        T tokens."""
        rope, mask = self.context(ids[:, :-1])
        entries = []
        h = self.hidden(ids[:, :-1], rope, mask, entries=[])
        h = self.mtp_hidden(h, ids[:, 1:], rope, mask, entries=entries)
        return self.logits(at_last(h, last)), entries[0]

    def decode(self, input_ids, positions, cache, routes=None):
        """The next tokens [B, T] at positions [B, T] -> final-normed hidden states [B, T, C].
        cache: a kv_cache.Cache, told where."""
        rope = self.rope(positions)
        x = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            x, route = layer.decode(x, rope, cache, i)
            if routes is not None and route is not None:
                routes.append(route)
        return self.model.norm(x)

    def mtp_decode(self, h_BTC, next_ids_BT, positions, cache):
        """`mtp_hidden` of the newest tokens, on a cache of the MTP layer alone."""
        rope = self.rope(positions)
        x, _ = self.mtp_layer.decode(h_BTC, self.embed(next_ids_BT), rope, cache)
        return x

    # ---- size

    def num_params(self, active=False):
        """Parameters, or those a token uses: K of E routed experts, no MTP layer, no embedding
        look-up."""
        n = count(self)
        if not active:
            return n
        if not self.cfg.tie_word_embeddings:
            n -= count(self.model.embed_tokens)
        n -= count(self.model.layers) - count(self.layers)
        for layer in self.layers:
            if isinstance(layer.mlp, MoE):
                idle = 1 - self.cfg.num_experts_per_tok / self.cfg.n_routed_experts
                n -= int(idle * count(layer.mlp.experts))
        return n

    # ---- the hub's files

    def hub_tensors(self, state_dict=None):
        """{hub name: (tensor, index)}: where each tensor of a checkpoint lives here; index cuts an
        expert out of its stack."""
        places = {}
        I = self.cfg.moe_intermediate_size
        for name, tensor in (state_dict or self.state_dict(keep_vars=True)).items():
            if '.experts.' not in name:
                places[name] = (tensor, ...)
                continue
            stem, kind = name.rsplit('.', 1)
            for e in range(self.cfg.n_routed_experts):
                if kind == 'down_proj':
                    places[f'{stem}.{e}.down_proj.weight'] = (tensor, e)
                else:
                    places[f'{stem}.{e}.gate_proj.weight'] = (tensor, (e, slice(0, I)))
                    places[f'{stem}.{e}.up_proj.weight'] = (tensor, (e, slice(I, 2 * I)))
        return places

    @classmethod
    def from_pretrained(cls, source, dtype=torch.float32, device='cpu', shard=None, **changes):
        """A folder in the hub's layout, or a hub id -> model with weights in `dtype` (routing
        biases stay float32). One error names every tensor that is missing, unexpected or misshapen.

        changes: values of ModelConfig other than the file's
        shard(model): FSDP2's fully_shard, applied before there is memory; each rank then allocates
            and reads the rows that it keeps
        """
        folder = hub.local_folder(source)
        cfg = ModelConfig.read(folder / 'config.json', **changes)
        files = hub.checkpoint_files(folder)
        hub.adapt_to_files(cfg, files, folder, changes)
        with torch.device('meta'):
            model = cls(cfg)
        hub.check_tensors(cfg, model.hub_tensors(), files, folder)

        # not model.to(dtype): it would cast the routing biases, which are buffers, too
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(p.to(dtype)))
        if shard is not None:
            shard(model)
        model.to_empty(device=device)
        hub.load_tensors(model.hub_tensors(), files)
        model.stored_dtype = hub.stored_dtype(files)
        return model

    def save_pretrained(self, folder, dtype=None, max_shard_bytes=5 * 2**30, state_dict=None):
        """Writes config.json and model*.safetensors, the hub's layout, in `dtype` (default: as in
        memory). The files are written beside `folder` and moved in when complete: a full disk
        leaves what was there. OSError says where.

        state_dict: whole tensors to write where the model's own are sharded
        """
        places = self.hub_tensors(state_dict)
        tensors = {name: tensor.detach()[index] for name, (tensor, index) in places.items()}
        kept = dtype or self.model.embed_tokens.weight.dtype
        config = hub.config_out(self.cfg, kept, rope_frequencies(self.cfg)[1])
        hub.save_tensors(folder, tensors, config, dtype, max_shard_bytes)


def at_last(h_BTC, last_B):
    """-> [B, C], of each row the state at one place"""
    return h_BTC[torch.arange(len(h_BTC), device=h_BTC.device), last_B]


def one_further(labels_BT, doc_ids_BT=None):
    """Labels one token further, inside the same document; -100 where there are none"""
    labels2 = F.pad(labels_BT[:, 1:], (0, 1), value=-100)
    if doc_ids_BT is None:
        return labels2
    next_doc = F.pad(doc_ids_BT[:, 1:], (0, 1), value=-9)
    return labels2.masked_fill(next_doc != doc_ids_BT, -100)


def count(module):
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------
# balance of experts


@torch.no_grad()
def update_router_bias(model, counts, rate):
    """Auxiliary-loss-free balancing: b_i += rate * sign(mean(count) - count_i), counts [MoE layers,
    E] of the step over all ranks; the MTP layer's comes last, and may be left out."""
    gates = [layer.mlp.gate for layer in model.model.layers if isinstance(layer.mlp, MoE)]
    for gate, load in zip(gates, counts):
        if gate.cfg.topk_method == 'noaux_tc':
            load = load.float()
            gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)


def sequence_balance_loss(scores_NE, chosen_NK, real_BT):
    """sum_i f_i P_i of each sequence, averaged over the B sequences, over the T tokens that are
    real [B, T] (1, or 0 for padding):
    f_i = E / (K T) * #{t: i chosen},  P_i = mean_t s_it / sum_j s_jt"""
    B = len(real_BT)
    E, K = scores_NE.shape[1], chosen_NK.shape[1]

    def mean_over_tokens(t_NE):
        total_BE = (t_NE.view(B, -1, E) * real_BT.unsqueeze(2)).sum(1)
        return total_BE / real_BT.sum(1, keepdim=True).clamp(min=1)

    share = scores_NE / scores_NE.sum(-1, keepdim=True)
    is_chosen = torch.zeros_like(scores_NE).scatter_(1, chosen_NK, 1.0)
    f = mean_over_tokens(is_chosen) * (E / K)
    P = mean_over_tokens(share)
    return (f * P).sum(-1).mean()
