"""
Linear layers on a CPU with their weights packed into oneDNN's blocks, for the many steps of one `generate`.

    y = x Wᵀ + b;   h = silu(x Gᵀ) ⊙ (x Uᵀ),   both factors in the epilogues of their products

A product of 256 rows takes a sixth less time than with the weights as they lie, of 48 rows a quarter; packing takes as long as about one
decoding step. The packed weights are a copy: they live as long as the `with` below, so that an update is never missed. Routed experts
stay as they are: with their few rows each packing gained 2%.
"""
from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F

FEWEST = 1_500_000    # multiplications: with fewer oneDNN's preparation of a call costs more than the packing gains


def worth_it(model, rows, free):
    """free: bytes of memory, of which the copies may take a quarter"""
    weight = model.head_weight
    return (weight.device.type == 'cpu' and weight.dtype == torch.float32 and not torch.is_autocast_enabled('cpu') and rows >= 16
            and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
            and type(weight.data) is torch.Tensor and 16 * model.num_params() < (free or 0))


class Packed:
    def __init__(self, weight, bias=None):
        self.plain, self.bias = weight, bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 256)

    def __call__(self, x, times=None, silu=False):
        """-> x Wᵀ + b, its silu, or it times a factor of its shape"""
        if x.numel() * len(self.plain) < FEWEST:
            y = F.linear(x, self.plain, self.bias)
            return F.silu(y) if silu else y if times is None else y.mul_(times)
        if times is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, times, self.weight, self.bias, 'mul')
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, 'swish' if silu else 'none', [], '')


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
                for module in model.modules():
                    if isinstance(module, torch.nn.Linear):
                        change(module, 'forward', Packed(module.weight, module.bias))
                    elif hasattr(module, 'gate_proj'):
                        change(module, 'forward', lambda x, m=module: m.down_proj(m.up_proj.forward(x, times=m.gate_proj.forward(x, silu=True))))
                change(model, 'logits', Packed(model.head_weight))
        yield
    finally:
        for module, name in changed:
            delattr(module, name)
