"""
Linear layers on a CPU with their weights packed into oneDNN's blocks, for the many steps of one `generate`.

    y = x Wᵀ + b;   h = silu(x Gᵀ) ⊙ (x Uᵀ),   both factors in the epilogues of their products

A product of 256 rows takes a sixth less time than with the weights as they lie, of 48 rows a quarter; packing takes as long as about one
decoding step. The packed weights are a copy: they live as long as the `with` below, so that an update is never missed.
"""
from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F

FEWEST = 32    # rows: with fewer oneDNN's preparation of a call costs more than the packing gains


def worth_it(weight, free):
    """free: bytes of memory. A copy of a large model's weights would be memory that is missed, and its products gain less."""
    return (weight.device.type == 'cpu' and weight.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')
            and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
            and type(weight.data) is torch.Tensor and (free or 0) > 2**32)


class Packed:
    def __init__(self, weight, bias=None):
        self.plain, self.bias = weight, bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 256)

    def __call__(self, x, times=None, silu=False):
        """-> x Wᵀ + b, its silu, or it times a factor of its shape"""
        if x.numel() < FEWEST * x.shape[-1]:
            y = F.linear(x, self.plain, self.bias)
            return F.silu(y) if silu else y if times is None else y.mul_(times)
        if times is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, times, self.weight, self.bias, 'mul')
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'swish' if silu else 'none', [], '')


class PackedMLP:
    def __init__(self, gate, up, down):
        self.gate, self.up, self.down = Packed(gate), Packed(up), Packed(down)

    def __call__(self, x):
        return self.down(self.up(x, times=self.gate(x, silu=True)))


class PackedExperts:
    """As kernels/moe.py's experts_reference."""

    def __init__(self, module):
        self.plain = type(module).forward.__get__(module)
        self.experts = [PackedMLP(*w.chunk(2), down) for w, down in zip(module.gate_up_proj, module.down_proj)]

    def __call__(self, x, weights, chosen):
        flat, K = chosen.flatten(), chosen.shape[1]
        if len(flat) < FEWEST * len(self.experts):
            return self.plain(x, weights, chosen)
        order = flat.argsort(stable=True)
        parts = x.index_select(0, order // K).split(flat.bincount(minlength=len(self.experts)).tolist())
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts) if len(part)])
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return F.embedding_bag(back.view(-1, K), y, per_sample_weights=weights, mode='sum')


@contextmanager
def packed(model, free):
    """Within, the linear layers of a model.Transformer work on packed copies of their weights, where that pays."""
    changed = []

    def change(module, name, function):
        setattr(module, name, function)
        changed.append((module, name))
    try:
        with torch.no_grad():
            if worth_it(model.head_weight, free):
                for module in model.modules():
                    if isinstance(module, torch.nn.Linear):
                        change(module, 'forward', Packed(module.weight, module.bias))
                    elif hasattr(module, 'gate_up_proj'):
                        change(module, 'forward', PackedExperts(module))
                    elif hasattr(module, 'gate_proj'):
                        change(module, 'forward', PackedMLP(module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight))
                change(model, 'logits', Packed(model.head_weight))
        yield
    finally:
        for module, name in changed:
            delattr(module, name)
