"""
The CPU's own path in sampling: linear layers with their weights in oneDNN's own order, for the many
steps of one `generate`.

    with onednn_weights(model, rows, free_memory):
        ...                              # computes the same but for rounding

    y = x Wᵀ + b
    h = silu(x Gᵀ) ⊙ (x Uᵀ),   both factors in the epilogues of their products

A product of 256 rows takes a sixth less time than with the weights as they lie, of 64 rows a third
(two threads), and so in bfloat16; reordering takes as long as about one decoding step. Queries,
keys and values of grouped-query attention are one product, one norm and one rotation. The reordered
weights are a copy: they live as long as the `with`, so that an update is never missed. Routed
experts stay as they are: their rows change in number with every step, and oneDNN takes half a
millisecond for a size that it has not met.
"""
from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from kernels import cpu, fp8, working_dtype

FEWEST = 800_000    # multiplications: with fewer oneDNN's preparation costs more than it gains


def worth_it(model, rows, free):
    """free: bytes of memory, of which the copies may take a quarter"""
    weight = model.head_weight
    if not cpu.usable(weight) or not cpu.HAS_ONEDNN or rows < 16:
        return False
    if working_dtype(weight) not in (torch.float32, torch.bfloat16):
        return False
    if type(weight.data) is not torch.Tensor or 16 * model.num_params() >= (free or 0):
        return False
    return not any(isinstance(module, fp8.FP8Linear) for module in model.modules())


class OneDNNLinear:
    def __init__(self, weight, bias=None, dtype=torch.float32):
        self.dtype = dtype
        self.plain = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.plain, 256)

    def __call__(self, x, times=None, silu=False):
        """-> x Wᵀ + b, its silu, or it times a factor of its shape"""
        x = x.to(self.dtype)
        if x.numel() * len(self.plain) < FEWEST:
            return self.as_it_lies(x, times, silu)
        pointwise = torch.ops.mkldnn._linear_pointwise
        if times is not None:
            return pointwise.binary(x, times, self.weight, self.bias, 'mul')
        return pointwise.default(x, self.weight, self.bias, 'swish' if silu else 'none', [], '')

    def as_it_lies(self, x, times, silu):
        with torch.autocast('cpu', enabled=False):     # the head stays float32
            y = F.linear(x, self.plain, self.bias)
        if silu:
            return F.silu(y)
        return y if times is None else y.mul_(times)


def project_together(attn, dtype):
    """-> what model.GQA.project does, with one product for q, k and v"""
    H, G = attn.H, attn.G
    parts = [attn.q_proj, attn.k_proj, attn.v_proj]
    weight = torch.cat([part.weight for part in parts])
    bias = None
    if attn.q_proj.bias is not None:
        bias = torch.cat([part.bias for part in parts])
    qkv = OneDNNLinear(weight, bias, dtype)
    norms = None
    if hasattr(attn, 'q_norm'):
        eps = attn.q_norm.eps
        norms = torch.cat([attn.q_norm.weight.expand(H, -1), attn.k_norm.weight.expand(G, -1)])
        norms = norms.to(dtype)

    def project(x, rope):
        qk, v = qkv(x).unflatten(-1, (H + 2 * G, attn.d)).split([H + G, G], dim=2)
        if norms is not None:
            h = qk.float()
            qk = (h * cpu.inverse_rms(h, eps)).to(dtype) * norms
        q, k = cpu.rotate(qk, *rope, interleaved=False, backward=False).split([H, G], dim=2)
        return q, k, v
    return project


def gated(mlp):
    """-> what model.MLP.forward does, with the activation inside the products"""
    def forward(x):
        gate = mlp.gate_proj.forward(x, silu=True)
        return mlp.down_proj(mlp.up_proj.forward(x, times=gate))
    return forward


@contextmanager
def onednn_weights(model, rows, free):
    """Within, the linear layers of a model.Transformer work on copies of their weights in oneDNN's
    order, where that pays for so many rows at once. free: bytes of memory"""
    changed = []

    def change(module, name, function):
        setattr(module, name, function)
        changed.append((module, name))

    try:
        if worth_it(model, rows, free):
            with torch.no_grad():
                replace_products(model, change)
        yield
    finally:
        for module, name in changed:
            delattr(module, name)


def wide_head(weight):
    """-> what Transformer.logits does with a head [V, C] that is bf16: its numbers in float32,
    which need no reordering"""
    plain = weight.detach().float()

    def logits(h):
        with torch.autocast('cpu', enabled=False), cpu.bf16_products():
            return torch.mm(h.flatten(0, -2).float(), plain.t()).unflatten(0, h.shape[:-1])
    return logits


def replace_products(model, change):
    """change(module, name, function): what sets a module's method"""
    dtype = working_dtype(model.head_weight)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            change(module, 'forward', OneDNNLinear(module.weight, module.bias, dtype))
        elif hasattr(module, 'gate_proj'):
            change(module, 'forward', gated(module))
        elif hasattr(module, 'k_proj'):
            change(module, 'project', project_together(module, dtype))
    head = model.head_weight.to(dtype)
    change(model, 'logits', wide_head(head) if cpu.hold_bf16(head) else OneDNNLinear(head))
