"""
Linear layers on a CPU with their weights packed into oneDNN's blocks, for the many steps of one `generate`.

    y = x Wᵀ + b;   h = silu(x Gᵀ) ⊙ (x Uᵀ),   both factors in the epilogues of their products

A product of 256 rows takes a sixth less time than with the weights as they lie, of 64 rows a third (two threads), and so in bfloat16;
packing takes as long as about one decoding step. Queries, keys and values of grouped-query attention are one product, one norm and one
rotation. The packed weights are a copy: they live as long as the `with` below, so that an update is never missed. Routed experts stay as
they are: their rows change in number with every step, and oneDNN takes half a millisecond for a size that it has not met.
"""
from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from kernels import cpu, fp8, working_dtype

FEWEST = 800_000    # multiplications: with fewer oneDNN's preparation of a call costs more than the packing gains


def worth_it(model, rows, free):
    """free: bytes of memory, of which the copies may take a quarter"""
    weight = model.head_weight
    return (not any(isinstance(module, fp8.Linear) for module in model.modules()) and weight.device.type == 'cpu' and working_dtype(weight) in (torch.float32, torch.bfloat16) and rows >= 16
            and cpu.HAS_ONEDNN and type(weight.data) is torch.Tensor and 16 * model.num_params() < (free or 0))


class Packed:
    def __init__(self, weight, bias=None, dtype=torch.float32):
        self.plain, self.bias, self.dtype = weight.detach().to(dtype).contiguous(), None if bias is None else bias.detach().to(dtype), dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.plain, 256)

    def __call__(self, x, times=None, silu=False):
        """-> x Wᵀ + b, its silu, or it times a factor of its shape"""
        x = x.to(self.dtype)
        if x.numel() * len(self.plain) < FEWEST:
            with torch.autocast('cpu', enabled=False):     # the head stays float32
                y = F.linear(x, self.plain, self.bias)
            return F.silu(y) if silu else y if times is None else y.mul_(times)
        if times is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, times, self.weight, self.bias, 'mul')
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, 'swish' if silu else 'none', [], '')


def project_together(attn, dtype):
    """-> what model.GQA.project does, with one product for q, k and v"""
    parts, H, G = (attn.q_proj, attn.k_proj, attn.v_proj), attn.H, attn.G
    qkv = Packed(torch.cat([p.weight for p in parts]), None if attn.q_proj.bias is None else torch.cat([p.bias for p in parts]), dtype)
    norms = None
    if hasattr(attn, 'q_norm'):
        norms, eps = torch.cat([attn.q_norm.weight.expand(H, -1), attn.k_norm.weight.expand(G, -1)]), attn.q_norm.eps
        norms = norms.to(dtype)

    def project(x, rope):
        qk, v = qkv(x).unflatten(-1, (H + 2 * G, attn.d)).split([H + G, G], dim=2)
        if norms is not None:
            h = qk.float()
            qk = (h * cpu.inverse_rms(h, eps)).to(dtype) * norms
        return *cpu.rotate(qk, *rope, interleaved=False, backward=False).split([H, G], dim=2), v
    return project


@contextmanager
def packed(model, rows, free):
    """Within, the linear layers of a model.Transformer work on packed copies of their weights, where that pays for so many rows at once."""
    changed = []

    def change(module, name, function):
        setattr(module, name, function)
        changed.append((module, name))
    try:
        with torch.no_grad():
            if worth_it(model, rows, free):
                dtype = working_dtype(model.head_weight)
                for module in model.modules():
                    if isinstance(module, torch.nn.Linear):
                        change(module, 'forward', Packed(module.weight, module.bias, dtype))
                    elif hasattr(module, 'gate_proj'):
                        change(module, 'forward', lambda x, m=module: m.down_proj(m.up_proj.forward(x, times=m.gate_proj.forward(x, silu=True))))
                    elif hasattr(module, 'k_proj'):
                        change(module, 'project', project_together(module, dtype))
                change(model, 'logits', Packed(model.head_weight.to(dtype)))  # products in float32
        yield
    finally:
        for module, name in changed:
            delattr(module, name)
