"""kernels/attention.py and kernels/mla_decode.py: the PyTorch and CPU paths here; the Triton paths
(check_*) under Triton's interpreter in a process of its own. The truth is attention written out in
float64."""
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import cpu, mla_attention, mla_decode as mla_decode_file
from kernels.attention import Mask, attention
from kernels.mla_decode import mla_decode

# B, T, H, G, n, r, w: the head dims without rope, of rope, of values
SHAPES = {
    'mla': (2, 37, 2, 2, 24, 16, 20),
    'gqa': (1, 50, 6, 2, 16, 0, 16),
    'mqa': (2, 33, 3, 1, 20, 8, 40),
    'one token': (2, 1, 2, 2, 16, 16, 16),
}


def documents(B, T, count):
    """count documents a row at random cuts, the last ones padding (-1); the rows differ"""
    ids = torch.zeros(B, T, dtype=torch.int64)
    for b in range(B):
        cuts = torch.randperm(T - 1)[:count - 1] + 1
        ids[b, cuts] = 1
    ids = ids.cumsum(1)
    return ids.masked_fill(ids == ids[:, -1:], -1) if count > 2 else ids


def mask_of(ids):
    return Mask.causal() if ids is None else Mask.documents(ids)


def draw(B, T, H, G, n, r, w, dtype, seed=0):
    """q, k, v, and the rope parts, as views of wider tensors as in the model, with what comes back
    as gradient"""
    torch.manual_seed(seed)
    q, kv = torch.randn(B, T, H, n + r), torch.randn(B, T, G, n + w)
    latent = torch.randn(B, T, 5 + r)
    leaves = [t.to(dtype).requires_grad_() for t in (q, kv, latent)]
    return leaves, torch.randn(B, T, H, w).to(dtype)


def views(leaves, n, r, w):
    q, q_rope = leaves[0].split([n, r], -1)
    k, v = leaves[1].split([n, w], -1)
    _, k_rope = leaves[2].split([5, r], -1)
    return dict(q=q, k=k, v=v, q_rope=q_rope if r else None, k_rope=k_rope if r else None)


def truth(leaves, ids, n, r, w, scale):
    """Written out in float64: one head, one batch row at a time -> [B, T, H, w]"""
    x = views([t.double() for t in leaves], n, r, w)
    B, T, H, _ = x['q'].shape
    group, rows = H // x['k'].shape[2], []
    see = torch.ones(T, T, dtype=torch.bool).tril()
    for b in range(B):
        visible = see if ids is None else see & (ids[b][:, None] == ids[b][None, :])
        for h in range(H):
            s = x['q'][b, :, h] @ x['k'][b, :, h // group].T
            if r:
                s = s + x['q_rope'][b, :, h] @ x['k_rope'][b].T
            p = (s * scale).masked_fill(~visible, float('-inf')).softmax(-1)
            rows.append(p @ x['v'][b, :, h // group])
    return torch.stack(rows).view(B, H, T, w).transpose(1, 2)


@pytest.mark.parametrize('shape', [
    (2, 150, 4, 4, 24, 0, 16), (1, 130, 6, 2, 16, 0, 24), (2, 1, 2, 1, 8, 0, 8)])
@pytest.mark.parametrize('count', [None, 1, 2, 9])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_blocks_on_a_cpu(shape, count, dtype, tolerance, monkeypatch):
    """kernels/cpu.py: forward and backward, with and without documents, over several blocks of
    queries"""
    if count and count > shape[1]:
        pytest.skip('fewer tokens than documents')
    calls, apply = [], cpu.CpuAttention.apply
    monkeypatch.setattr(cpu.CpuAttention, 'apply', lambda *args: calls.append(1) or apply(*args))
    B, T, H, G, n, r, w = shape
    leaves, do = draw(*shape, dtype)
    ids = count and documents(B, T, count)
    o = attention(**views(leaves, n, r, w), scale=0.3, mask=mask_of(ids))
    want = truth(leaves, ids, n, r, w, 0.3)
    assert calls and (o - want).abs().max() <= tolerance * want.abs().max()
    grads = torch.autograd.grad(o, leaves[:2], do)
    wanted = torch.autograd.grad(want, leaves[:2], do.double())
    for ours, theirs in zip(grads, wanted):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def compare(shape, dtype, ids, tolerance):
    B, T, H, G, n, r, w = shape
    leaves, g = draw(*shape, dtype)
    o = attention(**views(leaves, n, r, w), scale=0.3, mask=mask_of(ids))
    grads = torch.autograd.grad((o * g).sum(), leaves, allow_unused=True)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = truth(exact, ids, n, r, w, 0.3)
    expected_grads = torch.autograd.grad((expected * g.double()).sum(), exact, allow_unused=True)
    assert o.dtype == dtype and o.shape == (B, T, H, w)
    assert (o.double() - expected).abs().max() < tolerance * (1 + expected.abs().max())
    for name, a, b in zip(('q', 'kv', 'latent'), grads, expected_grads):
        assert (a is None) == (b is None)
        if a is not None:
            error = (a.double() - b).abs().max()
            assert error < tolerance * (1 + b.abs().max()), (name, shape, dtype)


@pytest.mark.parametrize('enabled', [True, False])
@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('count', [None, 1, 4])
def test_the_paths_without_triton_against_float64(name, count, enabled, monkeypatch):
    monkeypatch.setattr(cpu, 'ENABLED', enabled)
    B, T = SHAPES[name][:2]
    ids = None if count is None or T == 1 else documents(B, T, count)
    compare(SHAPES[name], torch.float32, ids, 1e-5)


# ------------------------------------------------------------------------------------------
# decoding

# S, T, H, c, r, L, slots a prompt
DECODES = {
    'one slot': (1, 1, 1, 16, 16, 1, ()),
    'slots': (5, 1, 6, 24, 8, 300, ()),
    'two tokens': (3, 2, 5, 16, 16, 50, ()),
    'groups': (6, 1, 4, 32, 16, 40, (1, 4, 1)),
    'two tokens of a group': (7, 2, 3, 16, 8, 20, (5, 0, 2)),
    'many rows': (9, 2, 5, 16, 16, 9, (9,)),
}


def decode_case(S, T, H, c, r, L, prompts, dtype, seed=0):
    """prompts: how many slots each prompt has; () for no prompt region"""
    torch.manual_seed(seed)
    q, cache = torch.randn(S, T, H, c + r).to(dtype), torch.randn(S, L, c + r).to(dtype)
    length = torch.randint(0 if prompts else 1, L - T + 2, (S,))
    x = dict(q=q, cache=cache, length=length, scale=0.2, c=c)
    if prompts:
        P = len(prompts)
        x['prefix'] = torch.randn(P, 70, c + r).to(dtype)
        x['prefix_length'] = torch.randint(1, 71, (P,))
        x['prompt'] = torch.repeat_interleave(torch.arange(P), torch.tensor(prompts))
    return x


def decode_truth(q, cache, length, scale, c, prefix=None, prefix_length=None, prompt=None):
    """One slot, token and head at a time in float64"""
    S, T, H, _ = q.shape
    o = torch.zeros(S, T, H, c, dtype=torch.float64)
    for s in range(S):
        for t in range(T):
            keys = cache[s, :length[s] + t].double()
            if prefix is not None:
                before = prefix[prompt[s], :prefix_length[prompt[s]]].double()
                keys = torch.cat([before, keys])
            for h in range(H):
                o[s, t, h] = ((keys @ q[s, t, h].double()) * scale).softmax(0) @ keys[:, :c]
    return o


def compare_decode(name, dtype, tolerance, **more):
    x = decode_case(*DECODES[name], dtype)
    o, expected = mla_decode(**x, **more), decode_truth(**x)
    assert o.dtype == dtype and o.shape == expected.shape
    assert (o.double() - expected).abs().max() < tolerance * (1 + expected.abs().max())


@pytest.mark.parametrize('name', DECODES)
def test_decoding_on_the_torch_path(name):
    compare_decode(name, torch.float64, 1e-12)
    compare_decode(name, torch.float32, 1e-5)


def test_decoding_continues_training():
    """The last token of a row by the training attention on expanded keys = by the absorbed query on
    the latents"""
    torch.manual_seed(1)
    B, T, H, c, n, r = 2, 9, 3, 16, 16, 16
    latent, k_rope = torch.randn(B, T, c), torch.randn(B, T, r)
    q, q_rope = torch.randn(B, T, H, n), torch.randn(B, T, H, r)
    up_k, up_v = torch.randn(H, n, c), torch.randn(H, n, c)
    k, v = (torch.einsum('btc,hnc->bthn', latent, up) for up in (up_k, up_v))
    whole = attention(q, k, v, 0.1, Mask.causal(), q_rope, k_rope)
    absorbed = torch.cat([torch.einsum('bthn,hnc->bthc', q, up_k), q_rope], -1)
    cache = torch.cat([latent, k_rope], -1)
    o = mla_decode(absorbed[:, -2:], cache, torch.full((B,), T - 1), 0.1, c)
    o = torch.einsum('bthc,hnc->bthn', o, up_v)
    assert torch.allclose(o, whole[:, -2:], atol=1e-4, rtol=1e-4)


def test_misshapen_inputs_are_named():
    q, k = torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 3, 8)
    with pytest.raises(ValueError, match=r'q \[1, 3, 4, 8\], k \[1, 3, 3, 8\]'):
        attention(q, k, k, 1.0, Mask.causal())


# ------------------------------------------------------------------------------------------
# Triton's interpreter


@pytest.mark.skipif(not importlib.util.find_spec('triton'), reason='Triton is not installed')
def test_the_triton_paths_in_the_interpreter():
    """Runs every check_* of this file with TRITON_INTERPRET=1, which must be set before Triton is
    imported."""
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider']
    command += ['-o', 'python_functions=check_*', __file__]
    env = {**os.environ, 'TRITON_INTERPRET': '1'}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and 'passed' in run.stdout, run.stdout[-3000:] + run.stderr[-1000:]


@pytest.fixture
def triton_path(monkeypatch):
    """Small blocks, so that short rows have several, of queries wider and narrower than of keys"""
    small = {
        'forward': ((32, 16, 4, 1),) * 4,
        'q': ((16, 32, 4, 1),) * 4,
        'kv': ((16, 32, 4, 1),) * 4,
    }
    monkeypatch.setattr(mla_attention, 'BLOCKS', small)
    kernels.use('triton')
    yield
    kernels.use('auto')


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float16, 4e-3)])
@pytest.mark.parametrize('name', SHAPES)
def check_attention_against_float64(triton_path, name, dtype, tolerance):
    B, T = SHAPES[name][:2]
    for count in (None, 1, 4):
        ids = None if count is None or T == 1 else documents(B, T, count)
        compare(SHAPES[name], dtype, ids, tolerance)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float16, 4e-3)])
def check_many_documents(triton_path, dtype, tolerance):
    """64 documents of 1 to a few tokens: whole blocks of keys that nothing of a later document may
    see"""
    compare((1, 100, 2, 1, 16, 16, 16), dtype, documents(1, 100, 64), tolerance)


def check_long_documents(triton_path):
    """Blocks that need no mask, in all three kernels, beside ones that do"""
    ids = torch.zeros(2, 130, dtype=torch.int64)
    ids[0, 10:], ids[1, 100:] = 1, 1
    compare((2, 130, 1, 1, 16, 16, 16), torch.float32, ids, 1e-5)


def check_the_blocks_of_a_gpu(triton_path, monkeypatch):
    monkeypatch.undo()
    kernels.use('triton')
    for dtype, tolerance in (torch.float16, 4e-3), (torch.float32, 1e-5):
        for sm in (80, 86, 90):
            monkeypatch.setattr(mla_attention, 'chip', lambda device, sm=sm: sm)
            compare((1, 70, 1, 1, 16, 16, 16), dtype, documents(1, 70, 3), tolerance)


def test_bounds_and_table_of_documents():
    ids = torch.tensor([[0, 0, 1, 2, 2, 2], [5, 5, 5, 5, -1, -1]])
    start, end = Mask.documents(ids).bounds
    assert start.tolist() == [[0, 0, 2, 3, 3, 3], [0, 0, 0, 0, 4, 4]]
    assert end.tolist() == [[2, 2, 3, 6, 6, 6], [4, 4, 4, 4, 6, 6]]
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    assert torch.equal(Mask.documents(ids).visible[:, 0], same.tril())


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize('name', DECODES)
def check_decoding_against_float64(triton_path, name, dtype, tolerance):
    compare_decode(name, dtype, tolerance)
    if name == 'groups':
        compare_decode(name, dtype, tolerance, group=4)
        # the cache has more rows than there are slots
        x, order = decode_case(*DECODES[name], dtype), torch.tensor([5, 3, 7, 0, 1, 2])
        moved = torch.full((8, *x['cache'].shape[1:]), float('nan'), dtype=dtype)
        moved[order] = x['cache']
        assert torch.equal(mla_decode(**{**x, 'cache': moved}, rows_of=order), mla_decode(**x))


def check_decoding_on_a_small_chip(triton_path, monkeypatch):
    monkeypatch.setattr(mla_decode_file, 'chip', lambda device: 86)
    compare_decode('groups', torch.float16, 2e-3)


def check_decoding_continues_training(triton_path):
    test_decoding_continues_training()


def check_a_slot_that_sees_nothing(triton_path):
    x = decode_case(*DECODES['slots'], torch.float32)
    x['length'][2] = 0
    o = mla_decode(**x)
    others = mla_decode(**{**x, 'length': x['length'].clamp(min=1)})
    assert not o[2].any() and torch.equal(o[3], others[3])
    kernels.use('torch')
    assert not mla_decode(**x)[2].any()
