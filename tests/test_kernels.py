"""
The kernels against float64 references. Without a GPU they run in Triton's interpreter (conftest.py
sets TRITON_INTERPRET=1), which is slow: sizes are small and odd. With one they run there, and the
tests marked gpu add real sizes.
"""
import ast
import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from tools.kernel_bench import experts_one_by_one

ROOT = Path(__file__).resolve().parents[1]
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
needs_triton = pytest.mark.skipif(not kernels.installed(), reason='Triton is not installed')


@pytest.fixture
def triton_path():
    if not kernels.installed():
        pytest.skip('Triton is not installed')
    kernels.use('triton')
    yield
    kernels.use('auto')


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    """requires grad; the values are exact in dtype"""
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=g) * scale).to(DEVICE, dtype).requires_grad_()


def in_float64(t):
    if not isinstance(t, torch.Tensor) or not t.dtype.is_floating_point:
        return t
    return t.detach().double().requires_grad_(t.requires_grad)


def outputs_and_gradients(function, inputs, seed):
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    out = [t for t in out if t.dtype.is_floating_point]
    grads = [random(*t.shape, seed=seed).detach().to(t.dtype) for t in out]
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    return out + list(torch.autograd.grad(out, wanted, grads))


def compare(ours, reference, inputs, tolerance, seed=9):
    """
    Outputs and gradients of ours(*inputs) against reference in float64: relative to the largest
    number of each tensor.
    """
    got = outputs_and_gradients(ours, inputs, seed)
    exact = outputs_and_gradients(reference, [in_float64(t) for t in inputs], seed)
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert a.shape == b.shape
        if not a.numel():
            continue
        error = (a.detach().double() - b.detach()).abs().max()
        largest = b.detach().abs().max().clamp(min=1e-3)
        assert error <= tolerance * largest, f'tensor {i}: off by {error:.2e}'


TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}


# ---- the switch ----

def test_use_refuses_what_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match="'cuda'"):
        kernels.use('cuda')
    monkeypatch.setattr(kernels, 'installed', lambda: False)
    with pytest.raises(ValueError, match='pip install triton'):
        kernels.use('triton')
    monkeypatch.setattr(kernels, 'installed', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(ValueError, match='no GPU'):
        kernels.use('triton')
    assert kernels.choice == 'auto'


def test_cpu_tensors_take_the_torch():
    x = torch.zeros(2)
    for name in ('auto', 'torch'):
        kernels.use(name)
        assert not kernels.fused(x)
    kernels.use('auto')


TRAIN = """
import importlib, pathlib, sys
if {hide}:
    sys.modules['triton'] = None     # neither import nor find_spec finds it, as where it is missing
import torch, kernels
from model import ModelConfig, Transformer
import sample, evaluate, sft, grpo
kernels.use('{choice}')
for shape in (dict(num_nextn_predict_layers=1), dict(model_type='qwen3')):
    model = Transformer(ModelConfig(num_hidden_layers=2, hidden_size=32, **shape))
    ids = torch.randint(0, 512, (2, 9))
    logp = model.logprobs(ids, ids)[0]
    logp.sum().backward()
    sample.Sampler(model).generate([[1, 2, 3], [4]], n=2, max_new_tokens=3)
for file in pathlib.Path(kernels.__file__).parent.glob('*.py'):
    module = importlib.import_module('kernels.' + file.stem) if file.stem != '__init__' else kernels
    assert not any('triton' in str(type(v)) for v in vars(module).values()), file
assert sys.modules.get('triton') is None, 'Triton was imported'
print('trained')
"""


@pytest.mark.parametrize('hide, choice', [(False, 'auto'), (False, 'torch'), (True, 'auto')])
def test_cpu_training_never_imports_triton(hide, choice):
    """
    In a process of its own; with hide, on a machine that has no Triton. The interpreter's variable
    alone changes nothing.
    """
    code = TRAIN.format(hide=hide, choice=choice)
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': '',
           'PYTHONPATH': str(ROOT)}
    run = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.stdout.endswith('trained\n'), run.stderr


def imported_names(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or '']
    return []


@pytest.mark.parametrize('path', sorted(ROOT.glob('kernels/*.py')), ids=lambda p: p.name)
def test_no_kernel_file_imports_triton_at_its_top(path):
    for node in ast.parse(path.read_text()).body:
        assert not any(name.split('.')[0] == 'triton' for name in imported_names(node))


# ---- rmsnorm, rope, swiglu ----

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('shape', [(3, 5, 37), (1, 128), (2, 1536), (70, 1)])
def test_rms_norm(triton_path, shape, dtype):
    from kernels.rmsnorm import rms_norm, rms_norm_torch
    x = random(*shape, dtype=dtype)
    residual = random(*shape, dtype=dtype, seed=1)
    w = random(shape[-1], dtype=dtype)
    compare(lambda x, w: rms_norm(x, w, 1e-6),
            lambda x, w: rms_norm_torch(x, w, 1e-6),
            [x, w], TOLERANCE[dtype])
    compare(lambda x, r, w: rms_norm(x, w, 1e-6, r),
            lambda x, r, w: rms_norm_torch(x, w, 1e-6, r),
            [x, residual, w], TOLERANCE[dtype])


def test_rms_norm_of_a_slice_and_of_mixed_types(triton_path):
    from kernels.rmsnorm import rms_norm, rms_norm_torch
    wide = random(2, 3, 50)
    w = random(37)
    compare(lambda x, w: rms_norm(x[..., 5:42], w, 1e-6),
            lambda x, w: rms_norm_torch(x[..., 5:42], w, 1e-6),
            [wide, w], 2e-6)

    x = random(3, 37, dtype=torch.float16)
    residual = random(3, 37)
    y, h = rms_norm(x, w, 1e-6, residual)
    assert y.dtype == h.dtype == torch.float32
    assert rms_norm(x, w.half(), 1e-6).dtype == torch.float16
    dx, dr = torch.autograd.grad(y.sum(), [x, residual])
    assert dx.dtype == torch.float16 and dr.dtype == torch.float32


@pytest.mark.parametrize('interleaved', [True, False])
@pytest.mark.parametrize('B, T, H, d, dtype', [
    (2, 3, 5, 14, torch.float32),
    (1, 1, 1, 64, torch.float32),
    (2, 2, 33, 2, torch.float32),
    (2, 3, 5, 14, torch.float16),
])
def test_rope(triton_path, B, T, H, d, dtype, interleaved):
    """
    Against complex multiplication, on a slice of a wider projection, with positions per row.
    """
    from kernels.rope import apply_rope
    wide = random(B, T, H, d + 6, dtype=dtype)
    angle = random(B, T, 1, d // 2, scale=3.0).detach()
    rope = angle.cos(), angle.sin()

    def rotated(wide):
        x = wide[..., 4:4 + d]
        turn = torch.polar(torch.ones_like(angle.double()), angle.double())
        if interleaved:
            pairs = x.unflatten(-1, (-1, 2))
        else:
            pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2)
        z = torch.view_as_complex(pairs.contiguous()) * turn
        return torch.cat([z.real, z.imag], -1)

    compare(lambda wide: apply_rope(wide[..., 4:4 + d], rope, interleaved), rotated,
            [wide], 2e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('shape', [(3, 2 * 1027), (1, 2), (0, 8)])
def test_swiglu_of_two_halves(triton_path, shape, dtype):
    from kernels.swiglu import swiglu

    def reference(both):
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up

    compare(lambda both: swiglu(*both.chunk(2, -1)), reference,
            [random(*shape, dtype=dtype)], TOLERANCE[dtype])


# ---- router and experts ----

ROUTERS = [
    (13, 24, 3, 4, 2, True, True),
    (1, 6, 1, 1, 1, False, False),
    (5, 12, 4, 3, 2, False, False),
    (3, 384, 8, 1, 1, True, True),
]


@pytest.mark.parametrize('N, E, K, groups, top, v3, normalise', ROUTERS)
def test_route(triton_path, N, E, K, groups, top, v3, normalise):
    from kernels.router import route, route_torch
    logits = random(N, E)
    bias = random(E, scale=0.1).detach() if v3 else None
    exact_bias = bias.double() if v3 else None
    how = (K, groups, top, v3, normalise, 2.5)
    compare(lambda z: route(z, bias, *how)[::2],
            lambda z: route_torch(z, exact_bias, *how)[::2],
            [logits], 2e-6)

    chosen = route(logits, bias, *how)[1]
    assert torch.equal(chosen, route_torch(logits, bias, *how)[1])
    replayed = chosen.roll(1, 0).flip(1)
    compare(lambda z: route(z, bias, *how, replayed)[::2],
            lambda z: route_torch(z, None, *how, replayed)[::2],
            [logits], 2e-6)


@pytest.mark.parametrize('N, K, E', [(1, 1, 3), (43, 3, 5), (130, 2, 70)])
def test_by_expert_is_a_stable_sort(triton_path, N, K, E):
    from kernels.router import by_expert
    g = torch.Generator().manual_seed(N)
    chosen = torch.randint(0, E - 1, (N, K), generator=g).to(DEVICE)   # the last one stays empty
    order, place, ends = by_expert(chosen, E)
    assert order.tolist() == sorted(range(N * K), key=lambda i: chosen.flatten()[i].item())
    assert order[place.long()].tolist() == list(range(N * K))
    assert ends.tolist() == [int((chosen < e).sum()) for e in range(E + 1)]


def some_experts(N, C, I, E, K, dtype):
    """The last expert is never chosen, the first by every token."""
    x = random(N, C, dtype=dtype)
    gate_up = random(E, 2 * I, C, dtype=dtype, scale=C ** -0.5)
    down = random(E, C, I, dtype=dtype, scale=I ** -0.5)
    weights = random(N, K)
    g = torch.Generator().manual_seed(N)
    chosen = torch.zeros(N, K, dtype=torch.int64)
    for n in range(N):
        chosen[n, 1:] = 1 + torch.randperm(E - 2, generator=g)[:K - 1]
    return [x, gate_up, down, weights, chosen.to(DEVICE)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('N, C, I, E, K', [
    (37, 50, 36, 5, 2),
    (1, 16, 130, 4, 1),
    (140, 72, 20, 3, 2),
])
def test_experts(triton_path, N, C, I, E, K, dtype):
    """
    Sizes that are no multiples of the tiles, an empty expert, more rows of one expert than a tile
    holds.
    """
    from kernels.moe import experts
    inputs = some_experts(N, C, I, E, K, dtype)
    compare(experts, experts_one_by_one, inputs, 5e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.skipif(DEVICE == 'cuda', reason='float64 on a CPU alone')
def test_experts_torch():
    from kernels.moe import experts_torch
    inputs = some_experts(21, 24, 16, 5, 2, torch.float32)
    compare(experts_torch, experts_one_by_one, inputs, 5e-6)


# ---- FP8 ----

def e4m3_grid():
    """-> the numbers of E4M3, listed, not computed: float64, rising"""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return grid[~grid.isnan()].sort().values.double()


@pytest.mark.parametrize('blocks', [False, True])
@pytest.mark.parametrize('M, K, dtype', [
    (1, 1, torch.float32),
    (130, 150, torch.float32),
    (3, 256, torch.float32),
    (130, 150, torch.float16),
])
def test_quantise(triton_path, M, K, dtype, blocks):
    """
    Every number goes to a nearest one of its group's grid, the largest of a group to ±448.
    """
    from kernels.fp8 import dequantise, quantise, quantise_torch
    x = (random(M, K).detach() * torch.logspace(-6, 3, K, device=DEVICE)).to(dtype)
    x[:M // 2, K // 2:] = 0
    q, scale = quantise(x, blocks)
    rows = 128 if blocks else 1
    assert q.shape == x.shape and scale.shape == (-(-M // rows), -(-K // 128))

    grid = e4m3_grid()
    for m in range(0, M, rows):
        for k in range(0, K, 128):
            group = x[m:m + rows, k:k + 128].double().cpu()
            s = scale[m // rows, k // 128].double().cpu()
            if not group.any():
                continue
            assert abs(s * 448 / group.abs().max() - 1) < 1e-6
            scaled = group / s
            nearest = (scaled.flatten()[:, None] - grid).abs().amin(1).view_as(scaled)
            error = (q[m:m + rows, k:k + 128].double().cpu() - scaled).abs()
            assert (error <= nearest + 1e-4 * scaled.abs()).all()

    assert torch.equal(dequantise(q, scale), dequantise(q.cpu(), scale.cpu()).to(DEVICE))
    q_torch, scale_torch = quantise_torch(x, blocks)
    assert (q_torch.float() != q.float()).float().mean() < 1e-3
    assert torch.allclose(scale_torch, scale)


def test_quantise_of_a_transpose(triton_path):
    from kernels.fp8 import quantise
    x = random(40, 131).detach()
    for a, b in zip(quantise(x.T), quantise(x.T.contiguous())):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize('blocks', [False, True])
@pytest.mark.parametrize('M, N, K', [(1, 1, 1), (5, 140, 300), (70, 30, 129)])
def test_fp8_matmul(triton_path, M, N, K, blocks):
    """Against float64 products of the dequantised operands"""
    from kernels.fp8 import dequantise, matmul, quantise
    a = quantise(random(M, K).detach())
    b = quantise(random(N, K, seed=1).detach(), blocks)
    truth = dequantise(*a).double() @ dequantise(*b).double().T
    error = (matmul(*a, *b, torch.float32).double() - truth).abs().max()
    assert error <= (2e-6 if DEVICE == 'cpu' else 1e-3) * truth.abs().max()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('T', [9, 1])
def test_fp8_linear(triton_path, T, dtype):
    """
    Forward and both gradients on the Triton path agree with the simulation, and that with exact
    products to FP8's precision.
    """
    from kernels.fp8 import linear
    x = random(2, T, 140, dtype=dtype)
    w = random(50, 140, scale=0.1, dtype=dtype)
    b = random(50, dtype=dtype)
    dy = random(2, T, 50, seed=3, dtype=dtype).detach()

    def run(function):
        y = function(x, w, b)
        tensors = [y, *torch.autograd.grad(y, [x, w, b], dy)]
        return [t.detach().float() for t in tensors]

    ours = run(linear)
    kernels.use('torch')
    simulated = run(linear)
    exact = run(F.linear)
    for a, s, e in zip(ours, simulated, exact):
        assert (a - s).norm() <= 1e-3 * s.norm()
        assert (s - e).norm() <= 0.05 * e.norm()
    # it is FP8 indeed
    assert any((s - e).norm() > 1e-3 * e.norm() for s, e in zip(simulated, exact))


def test_fp8_convert_leaves_names_head_and_router_alone():
    from kernels import fp8
    from model import ModelConfig, Transformer
    model = Transformer(ModelConfig(num_hidden_layers=2, hidden_size=32))
    before = {name: p.clone() for name, p in model.named_parameters()}
    fp8.convert(model)
    assert type(model.lm_head) is not fp8.FP8Linear
    assert type(model.model.layers[0].self_attn.o_proj) is fp8.FP8Linear
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_dequantise_refuses_scales_that_do_not_fit():
    from kernels.fp8 import dequantise
    with pytest.raises(ValueError, match='do not fit'):
        dequantise(torch.zeros(200, 200).to(torch.float8_e4m3fn), torch.ones(2, 1))


# ---- the model ----

SHAPES = {
    'mla': dict(num_nextn_predict_layers=1, n_routed_experts=8, n_group=4, topk_group=2,
                q_lora_rank=24),
    'gqa': dict(model_type='qwen3'),
}


def tiny(shape):
    from model import ModelConfig, Transformer
    torch.manual_seed(1)
    cfg = ModelConfig(num_hidden_layers=2, hidden_size=48, vocab_size=70, moe_intermediate_size=24,
                      initializer_range=0.2, **SHAPES[shape])
    model = Transformer(cfg).to(DEVICE)
    for name, p in model.named_parameters():
        if 'norm' in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


@pytest.mark.parametrize('shape', SHAPES)
def test_model_trains_alike_on_both_paths(triton_path, shape):
    """Log-probs, entropy, MTP and every gradient of packed rows, in float32"""
    model = tiny(shape)
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 70, (2, 21), generator=g).to(DEVICE)
    docs = torch.tensor([[0] * 9 + [1] * 12, [0] * 1 + [1] * 17 + [2] * 3], device=DEVICE)
    positions = torch.tensor([[*range(9), *range(12)], [0, *range(17), *range(3)]], device=DEVICE)
    counted = torch.rand(2, 21, generator=g).to(DEVICE) < 0.7
    labels = torch.where(counted, ids.roll(-1, 1), -100)

    def run():
        routes = []
        logp, H, mtp = model.logprobs(
            ids, labels, positions, docs,
            temperature=0.8, mtp=shape == 'mla', entropy=True, routes=routes)
        loss = (logp * torch.linspace(-1, 1, len(logp), device=DEVICE)).sum()
        if H.requires_grad:
            loss = loss + 0.1 * H.sum()
        if mtp is not None:
            loss = loss + mtp.sum()
        loss = loss + sum(scores.square().sum() for scores, _ in routes)
        params = [p for p in model.parameters() if p.requires_grad]
        numbers = [logp, H, *torch.autograd.grad(loss, params)]
        return numbers, [chosen for _, chosen in routes]

    ours, our_routes = run()
    kernels.use('torch')
    theirs, their_routes = run()
    assert all(torch.equal(a, b) for a, b in zip(our_routes, their_routes, strict=True))
    tolerance = 2e-5 if DEVICE == 'cpu' else 5e-3
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-2)


@pytest.mark.parametrize('shape', SHAPES)
def test_model_samples_alike_on_both_paths(triton_path, shape):
    """
    Prompts of several lengths, more requests than slots, so that groups and slots lie in any order
    """
    from sample import Sampler
    model = tiny(shape)
    prompts = [[3, 4, 5, 6], [7], [8, 9], [1, 2, 3]]

    def run():
        sampler = Sampler(model, stop_ids=[0], slots=3, speculate=0)
        groups = sampler.generate(prompts, n=2, max_new_tokens=6, seed=5)
        return sum(groups, [])

    ours = run()
    kernels.use('torch')
    tolerance = 1e-4 if DEVICE == 'cpu' else 1e-2
    for a, b in zip(ours, run(), strict=True):
        assert a.tokens == b.tokens
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=tolerance)


# ---- compiled without a GPU: tools/aot.py ----

def compiling(*command):
    """Runs Python without Triton's interpreter."""
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)


def aot(*args):
    return compiling(str(ROOT / 'tools/aot.py'), *args)


@needs_triton
def test_compiles_without_a_gpu():
    run = aot('--sm=80,90', '--only=down V2-Lite')
    assert run.returncode == 0, run.stdout + run.stderr
    assert 'HGMMA' in run.stdout and ' HMMA' in run.stdout and 'all fit' in run.stdout


@needs_triton
@pytest.mark.parametrize('case', ['dx V2-Lite', 'partial 512+64', 'backward kv 192/128'])
def test_the_largest_fit_a_small_card(case):
    """99 KiB of shared memory, in bfloat16 and float32: what chips with more have would not fit"""
    run = aot('--sm=86', f'--only={case}')
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(case) >= 2 and 'float32' in run.stdout, run.stdout


def test_shared_memory_of_the_chips():
    """The CUDA programming guide's table of compute capabilities: bytes a block may have"""
    known = {
        80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448,
        100: 232448, 103: 232448, 110: 232448, 120: 101376, 121: 101376,
    }
    assert {sm: 1024 * kernels.room(sm) for sm in known} == known


FAULTS = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from kernels import moe
from tools import aot
cases = [c for c in moe.compile_cases(90, '*bf16') if c[0].startswith('down V2')]
name, fn, signature, constexprs, warps, stages, allowed = cases[0]
def fault(warps=warps, stages=stages, allowed=allowed, sm=90, **changed):
    case = (name, fn, signature, dict(constexprs, **changed), warps, stages, allowed)
    print(aot.compile_case(case, sm)['fault'])
fault(stages=9)
fault(stages=7, sm=86)
fault(allowed=-1)
fault(BM=16)
fault(BK=60)
"""


@needs_triton
def test_the_table_finds_faults():
    """
    Too much shared memory; spills beyond the allowance; a matrix kernel that misses the warpgroup
    instructions; an error of the compiler.
    """
    run = compiling('-c', FAULTS)
    shared, small, spills, hgmma, broken = run.stdout.splitlines()
    assert 'bytes of shared memory' in shared
    assert '101376 at most' in small
    assert 'spill instructions' in spills
    assert 'without HGMMA' in hgmma
    assert 'does not compile' in broken


def test_the_table_says_when_triton_is_missing():
    code = f"""
import sys; sys.modules['triton'] = None; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['aot']
from tools import aot
sys.exit(aot.main())
"""
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == 2 and 'pip install triton' in run.stderr


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles():
    run = aot()
    assert run.returncode == 0, run.stdout + run.stderr


# ---- kernels/cpu.py: what the kernels' functions take where there is a gradient and no Triton ----

def counted(monkeypatch, function):
    """-> a list that grows with every call of the autograd function's apply"""
    calls = []
    apply = function.apply

    def counting(*args):
        calls.append(1)
        return apply(*args)

    monkeypatch.setattr(function, 'apply', counting)
    return calls


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs oneDNN')
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape', [(5, 7), (2, 3, 7), (1, 7), (0, 7)])
def test_a_linear_layer_by_onednn(shape, bias, monkeypatch):
    from kernels import cpu
    monkeypatch.setattr(cpu, 'ONEDNN', True)
    monkeypatch.setattr(cpu, 'FEWEST', 0)
    calls = counted(monkeypatch, cpu.CpuLinear)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True), torch.randn(4, 7, requires_grad=True)]
    if bias:
        inputs.append(torch.randn(4, requires_grad=True))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y = cpu.linear(*inputs)
    expected = F.linear(*exact)
    g = torch.randn(shape[:-1] + (4,))
    assert calls and y.shape == g.shape and (y - expected).abs().sum() < 1e-4

    grads = torch.autograd.grad(y, inputs, g)
    exact_grads = torch.autograd.grad(expected, exact, g.double())
    for a, b in zip(grads, exact_grads):
        assert a.shape == b.shape and (a - b).abs().sum() < 1e-4
    with torch.no_grad():                       # nothing to gain: F.linear's own bits
        assert torch.equal(cpu.linear(*inputs), F.linear(*inputs)) and len(calls) == 1


@pytest.mark.parametrize('piece', [1, 20, 2**17])
def test_swiglu_by_pieces(piece, monkeypatch):
    from kernels import cpu
    monkeypatch.setattr(cpu, 'SWIGLU_PIECE', piece)
    torch.manual_seed(0)
    both = torch.randn(3, 5, 8, requires_grad=True)
    exact = both.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    expected = F.silu(gate) * up
    g = torch.randn(3, 4, 5).mT
    h = cpu.swiglu(*both.chunk(2, -1))
    assert (h - expected).abs().max() < 1e-6

    grad, = torch.autograd.grad(h, both, g)
    exact_grad, = torch.autograd.grad(expected, exact, g.double())
    assert (grad - exact_grad).abs().max() < 1e-6


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('N, E, K', [(37, 5, 2), (1, 4, 1), (300, 6, 3), (3, 40, 4), (1100, 4, 2)])
def test_experts_on_a_cpu(N, E, K, dtype, monkeypatch):
    """
    An expert of no token, experts whose rows are filled up by more than they have or not at all;
    products by oneDNN in float32.
    """
    from kernels import cpu
    from kernels.moe import experts
    if cpu.HAS_ONEDNN:
        monkeypatch.setattr(cpu, 'ONEDNN', True)
        monkeypatch.setattr(cpu, 'FEWEST', 0)
    inputs = some_experts(N, 24, 16, E, K, dtype)
    inputs = [t.detach().cpu().requires_grad_(t.requires_grad) for t in inputs]
    calls = counted(monkeypatch, cpu.CpuExperts)
    compare(experts, experts_one_by_one, inputs, 5e-6 if dtype == torch.float32 else 2e-2)
    assert calls and len(cpu.rows_by_expert(inputs[4], E)[2]) == E


def test_rows_of_experts_are_filled_up():
    from kernels.cpu import rows_by_expert
    # counts 256, 0, 259, 3; a sixteenth of the mean is 8
    chosen = torch.tensor([[0, 2]] * 200 + [[2, 0]] * 56 + [[2, 3]] * 3)
    tokens, rows, spans = rows_by_expert(chosen, 4)
    assert spans == [(0, 256), (256, 256), (256, 520), (520, 528)]
    assert torch.equal(tokens[rows], torch.arange(259)[:, None].expand(-1, 2))
    assert rows.unique().numel() == rows.numel() == 518
    for e, (a, b) in enumerate(spans):
        assert all(a <= row < b for row in rows[chosen == e].tolist())


PAGE_FAULTS = '''
import ctypes, mmap, resource, sys
from kernels import cpu

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

size = 2**24 - 2**12
blocks = [0] * 8
before = faults()
fresh = mmap.mmap(-1, 2**22)      # untouched memory: a fault a page, where faults are counted
for page in range(0, 2**22, mmap.PAGESIZE):
    fresh[page] = 1
counted = faults() - before
if len(sys.argv) > 1:
    cpu.keep_memory()
for i in range(20):
    if i == 4:
        before = faults()
    for n in range(8):
        blocks[n] = libc.malloc(size)
        libc.memset(blocks[n], 1, size)
    for block in blocks:
        libc.free(block)
print(counted, faults() - before)
'''


def page_faults(*flags):
    """-> page faults of 4 MiB of fresh memory, and of 16 rounds of allocating and freeing"""
    run = subprocess.run([sys.executable, '-c', PAGE_FAULTS, *flags], cwd=ROOT,
                         capture_output=True, text=True, check=True)
    return map(int, run.stdout.split())


@pytest.mark.skipif(sys.platform != 'linux', reason="counts Linux's page faults; glibc only")
def test_freed_memory_is_kept():
    """
    Straight from malloc: whether a tensor's block lies at the end of the heap, where glibc trims,
    is a matter of luck.
    """
    if not hasattr(ctypes.CDLL(None), 'mallopt'):
        pytest.skip('no glibc')
    fresh, plain = page_faults()
    _, kept = page_faults('keep')
    pages = 2**22 // mmap.PAGESIZE
    if fresh < pages // 2:
        pytest.skip(f'this system counts {fresh} faults for {pages} fresh pages: huge pages, or a '
                    'sandbox that counts none')
    assert kept < 200, kept
    assert plain > 10_000, 'glibc keeps freed memory by itself: keep_memory() can go'
