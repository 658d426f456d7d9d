"""
kernels/linear_logprob.py: the PyTorch path here; the Triton path (check_*) under Triton's
interpreter in a process of its own.
"""
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import kernels.linear_logprob as module
from kernels.linear_logprob import linear_logprob, rows_backward, rows_forward

# N, C, V, chunk
SIZES = [(1, 3, 1, 1), (1, 5, 11, None), (7, 5, 11, 3), (6, 8, 64, 2), (64, 16, 130, None)]


def draw(N, C, V, dtype, seed=0):
    """-> h [N, C] and weight [V, C] that require grad, labels, gradients of logp and of H [N]"""
    torch.manual_seed(seed)
    h = (2 * torch.randn(N, C)).to(dtype).requires_grad_()
    w = torch.randn(V, C).to(dtype).requires_grad_()
    return h, w, torch.randint(V, (N,)), torch.randn(N), torch.randn(N)


def distribution(z, temperature):
    """logits z [N, V] -> log-probabilities [N, V] and entropies [N]"""
    full = (z / temperature).log_softmax(-1)
    return full, -(full.exp() * full).sum(-1)


def truth(h, w, labels, g_logp, g_H, temperature):
    """float64: log_softmax over all of [N, V] and autograd -> logp, H, dh, dw"""
    h, w = (t.detach().double().requires_grad_() for t in (h, w))
    full, H = distribution(h @ w.T, temperature)
    logp = full[range(len(labels)), labels]
    dh, dw = torch.autograd.grad((logp * g_logp + H * g_H).sum(), (h, w))
    return [logp.detach(), H.detach(), dh, dw]


def compare(dtype, temperature, with_entropy, sizes, tolerance):
    """tolerance: of outputs, of gradients; relative to 1 + the largest number of each tensor"""
    for N, C, V, chunk in sizes:
        h, w, labels, g_logp, g_H = draw(N, C, V, dtype)
        if not with_entropy:
            g_H = torch.zeros(N)
        logp, H = linear_logprob(h, w, labels, temperature, entropy=with_entropy, chunk=chunk)
        assert (H is None) == (not with_entropy)
        loss = (logp * g_logp).sum() + (0 if H is None else (H * g_H).sum())
        dh, dw = torch.autograd.grad(loss, (h, w))
        assert dh.dtype == dw.dtype == dtype

        expected = truth(h, w, labels, g_logp, g_H, temperature)
        for name, a, b in zip(('logp', 'H', 'dh', 'dw'), (logp, H, dh, dw), expected):
            if a is not None:
                bound = tolerance[name in ('dh', 'dw')] * (1 + b.abs().max())
                assert (a.double() - b).abs().max() <= bound, (name, N, C, V, chunk, dtype)


@pytest.mark.parametrize('with_entropy', [False, True])
@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_the_torch_path_against_float64(temperature, with_entropy):
    compare(torch.float64, temperature, with_entropy, SIZES, (1e-12, 1e-12))
    compare(torch.float32, temperature, with_entropy, SIZES, (5e-6, 1e-5))
    # gradients are rounded to bf16, log-probs are not
    compare(torch.bfloat16, temperature, with_entropy, SIZES, (5e-6, 8e-3))


def compare_absent(tolerance, V=130, temperatures=(1.0, 0.7), chunks=(5, None)):
    """
    Ids out of the distribution, with far the largest logits: as if the vocabulary had no such
    rows, which get no gradient.
    """
    h, w, labels, g_logp, g_H = draw(12, 6, V, torch.float32, seed=2)
    absent = torch.tensor([0, 7, *range(V - 9, V)])
    present = torch.tensor([i for i in range(V) if i not in absent.tolist()])
    with torch.no_grad():
        w[absent] = 60 * h.detach()[:len(absent)]
    labels = present[labels % len(present)]
    labels_among_present = torch.searchsorted(present, labels)

    for temperature in temperatures:
        expected = truth(h, w.detach()[present], labels_among_present, g_logp, g_H, temperature)
        for chunk in chunks:
            logp, H = linear_logprob(h, w, labels, temperature, True, chunk, absent)
            dh, dw = torch.autograd.grad((logp * g_logp + H * g_H).sum(), (h, w))
            assert not dw[absent].any()
            for a, b in zip((logp, H, dh, dw[present]), expected):
                assert (a.double() - b).abs().max() <= tolerance * (1 + b.abs().max())


def test_absent_ids_count_nowhere():
    compare_absent(1e-5)


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    N, C, V, chunk = 96, 4, 300, 8
    h, w, labels, g_logp, _ = draw(N, C, V, torch.float32)
    with Largest() as seen:
        logp, H = linear_logprob(h, w, labels, 0.9, entropy=True, chunk=chunk)
        (logp * g_logp + H).sum().backward()
    assert seen.numel == chunk * V


def test_empty_and_misshapen():
    h, w, labels, _, _ = draw(0, 4, 9, torch.float32)
    logp, H = linear_logprob(h, w, labels, entropy=True)
    (logp.sum() + H.sum()).backward()
    assert logp.shape == (0,) and not w.grad.any()
    with pytest.raises(ValueError, match=r'h \[3, 4\], weight \[9, 5\] and labels \[3\]'):
        linear_logprob(torch.zeros(3, 4), torch.zeros(9, 5), torch.zeros(3, dtype=torch.int64))


def test_either_output_may_go_unused():
    h, w, labels, _, _ = draw(6, 4, 9, torch.float64)
    logp, H = linear_logprob(h, w, labels, 0.8, entropy=True, chunk=4)
    for out, g_logp, g_H in ((logp, 1, 0), (H, 0, 1)):
        ours = torch.autograd.grad(out.sum(), (h, w), retain_graph=True)
        for a, b in zip(ours, truth(h, w, labels, g_logp, g_H, 0.8)[2:]):
            assert torch.allclose(a, b, atol=1e-12)


# ---- the Triton path ----

@pytest.mark.skipif(not importlib.util.find_spec('triton'), reason='Triton is not installed')
def test_the_triton_path_in_the_interpreter():
    """
    Runs every check_* of this file with TRITON_INTERPRET=1, which must be set before Triton is
    imported.
    """
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider',
               '-o', 'python_functions=check_*', __file__]
    env = {**os.environ, 'TRITON_INTERPRET': '1'}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    said = run.stdout[-3000:] + run.stderr[-1000:]
    assert run.returncode == 0 and 'passed' in run.stdout, said


@pytest.fixture
def triton_path():
    kernels.use('triton')
    yield
    kernels.use('auto')


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('temperature, with_entropy', [(1.0, True), (0.7, True), (1.3, False)])
def check_the_kernels_against_float64(triton_path, dtype, temperature, with_entropy):
    sizes = SIZES + [(3, 8, 4096, None), (5, 8, 4097, 2), (2, 8, 9000, None)]  # a block is 4096
    tolerance = 5e-6, 1e-5 if dtype == torch.float32 else 2e-3
    compare(dtype, temperature, with_entropy, sizes, tolerance)


def check_far_logits(triton_path):
    """Logits of thousands, a distribution of one token: no overflow, entropy 0."""
    h = torch.full((1, 1), 1e4)
    w = torch.linspace(-1, 1, 5000)[:, None]
    logp, H = linear_logprob(h, w, torch.tensor([4999]), entropy=True)
    full, exact_H = distribution(h.double() @ w.double().T, 1.0)
    assert abs(logp.item() - full[0, 4999].item()) < 1e-3
    assert abs(H.item() - exact_H.item()) < 1e-3


def check_absent_ids(triton_path):
    compare_absent(1e-5, temperatures=(0.7,), chunks=(5,))
    compare_absent(1e-5, 4200, temperatures=(0.7,), chunks=(None,))


@pytest.mark.parametrize('V', [1, 130, 4097])
def check_a_narrow_gradient_of_the_logits(triton_path, V):
    """float16 dz, as on a GPU where the GEMMs are half precision"""
    torch.manual_seed(V)
    z = 3 * torch.randn(5, V)
    labels = torch.randint(V, (5,))
    g_logp = torch.randn(5)
    g_H = torch.randn(5)

    exact = z.double().requires_grad_()
    full, entropy = distribution(exact, 0.7)
    (full.gather(1, labels[:, None])[:, 0] @ g_logp.double() + entropy @ g_H.double()).backward()

    _, lse, H, kept = rows_forward(z, labels, 0.7, True)
    dz, scale = rows_backward(kept, labels, 0.7, lse, H, g_logp, g_H, torch.float16)
    assert scale is None and dz.dtype == torch.float16
    assert (dz.double() - exact.grad).abs().max() <= 1e-3 * (1 + exact.grad.abs().max())


def check_that_these_are_the_kernels(triton_path):
    """A wrong number in the kernels' file must be seen here: the launch is counted."""
    linear_logprob(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([1, 2]))
    assert type(module._forward).__name__ == 'InterpretedFunction'
