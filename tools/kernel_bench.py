"""
Checks and times every kernel on a GPU, in at most nine minutes:

    python tools/kernel_bench.py                   prints Markdown tables for RESULTS.md; exit
                                                   status 1 if a check or a launch fails
    python tools/kernel_bench.py --only=experts    the cases whose name holds the text
    python tools/kernel_bench.py --phases=check    the checks alone; then come 'time' (beside eager
                                                   PyTorch) and 'compile' (torch.compile)
    TRITON_INTERPRET=1 python tools/kernel_bench.py --smoke=True    tiny sizes in Triton's
                                interpreter: tries the script, its times mean nothing

Every row is printed as soon as it is known, and the cases run in a process of their own that is
replaced where one of them crashes or hangs: a kernel that does not work costs its own row.

Check: on fresh random bf16 inputs, outputs and gradients against the same mathematics in float64;
the error, relative in the 2-norm, may be three times eager PyTorch's own in bf16.

Time: medians of replayed CUDA graphs (so launches cost nothing, for anyone) with the L2 cache
flushed before each; backward = both − forward. A form that cannot be captured is timed without and
marked *.

Bound: what must be moved over the bandwidth of a large copy, or what must be multiplied over the
rate of a large bf16 product, whichever is longer, both measured at the start.
"""
from __future__ import annotations

import datetime
import math
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere

import torch
import torch.nn.functional as F

import kernels
from configurator import configure


@dataclass
class Config:
    only: str = ''           # part of the names of the cases to run
    phases: str = 'check,time,compile'
    smoke: bool = False      # tiny sizes, float32, also without a GPU in Triton's interpreter
    seconds: float = 530.0   # what is not done by then is left out
    patience: float = 120.0  # seconds after which a case counts as hung
    seed: int = 0            # of the inputs; 0: another each time


@dataclass
class Case:
    name: str
    ours: Callable            # inputs -> tensor or tuple; the eager form, too, without Triton
    inputs: Callable          # size -> list of tensors; those that require grad get gradients
    cost: Callable            # size -> ((bytes, flops) forward, (bytes, flops) backward or None)
    size: tuple               # timed
    check: tuple              # checked in float64, no smaller than shows a mistake
    smoke: tuple              # both, with --smoke
    target: tuple = ()        # shares of the bound, forward and backward
    eager: Callable | None = None   # where it is another
    truth: Callable | None = None   # where plain PyTorch does not run in float64
    tolerance: float = 3.0    # times eager's error
    allowed: float = 1e-5     # and this besides
    together: bool = False    # forward and backward are timed as one


DEVICE, DTYPE = 'cuda', torch.bfloat16   # setup() sets them


def rand(*shape, scale=1.0, grad=True):
    """In DTYPE on DEVICE"""
    return (torch.randn(*shape, device=DEVICE) * scale).to(DTYPE).requires_grad_(grad)


# ---- the cases; their costs count 2 bytes a number ----

def cases():
    yield from norm_cases()
    yield from rope_cases()
    yield from swiglu_cases()
    yield from router_cases()
    yield from expert_cases()
    yield from head_cases()
    yield from attention_cases()
    yield from decoding_cases()
    yield from fp8_cases()


def norm_cases():
    from kernels.rmsnorm import rms_norm

    def norm(x, w):
        return rms_norm(x, w, 1e-6)

    def inputs(N, D):
        return [rand(N, D), rand(D)]

    def cost(N, D):
        return (4 * N * D, 0), (6 * N * D, 0)

    yield Case('rms_norm', norm, inputs, cost,
               size=(65536, 2048), check=(999, 2048), smoke=(5, 37), target=(0.8, 0.8))
    yield Case('rms_norm 7168', norm, inputs, cost,
               size=(16384, 7168), check=(999, 7168), smoke=(3, 70), target=(0.8, 0.8))

    def add_norm(x, residual, w):
        return rms_norm(x, w, 1e-6, residual)

    def add_inputs(N, D):
        return [rand(N, D), rand(N, D), rand(D)]

    def add_cost(N, D):
        return (8 * N * D, 0), (8 * N * D, 0)

    yield Case('rms_norm + residual', add_norm, add_inputs, add_cost,
               size=(65536, 2048), check=(999, 2048), smoke=(5, 37), target=(0.8, 0.8))


def rope_cases():
    from kernels.rope import apply_rope

    def interleaved(x, cos, sin):
        return apply_rope(x, (cos, sin), True)

    def half(x, cos, sin):
        return apply_rope(x, (cos, sin), False)

    def inputs(B, T, H, d):
        angle = torch.rand(B, T, 1, d // 2, device=DEVICE) * 6
        return [rand(B, T, H, d), angle.cos(), angle.sin()]

    def cost(B, T, H, d):
        moved = 4 * B * T * (H + 2) * d
        return (moved, 0), (moved, 0)

    yield Case('rope interleaved', interleaved, inputs, cost,
               size=(2, 4096, 128, 64), check=(2, 333, 128, 64), smoke=(2, 3, 5, 6))
    yield Case('rope half', half, inputs, cost,
               size=(2, 4096, 12, 128), check=(2, 333, 12, 128), smoke=(2, 3, 5, 6))


def swiglu_cases():
    from kernels.swiglu import swiglu

    def inputs(N, I):
        return [rand(N, I), rand(N, I)]

    def cost(N, I):
        return (6 * N * I, 0), (10 * N * I, 0)

    yield Case('swiglu', swiglu, inputs, cost,
               size=(16384, 8960), check=(333, 8960), smoke=(3, 40))


def router_cases():
    from kernels.router import route

    def weights_and_scores(*inputs):
        weights, _, scores = route(*inputs)
        return weights, scores

    def inputs(N, E, K, groups, top):
        # distinct by design: where two experts tie but for rounding, float32 and float64 may choose
        # differently
        spread = torch.rand(N, E, device=DEVICE).argsort(-1) * (8 / E) - 4
        return [spread.requires_grad_(), torch.zeros(E, device=DEVICE), K, groups, top]

    def cost(N, E, K, groups, top):
        return (8 * N * E, 0), (12 * N * E, 0)

    yield Case('route 8 of 256', weights_and_scores, inputs, cost,
               size=(16384, 256, 8, 8, 4), check=(999, 256, 8, 8, 4), smoke=(5, 24, 3, 4, 2))


def experts_one_by_one(x, gate_up, down, weights, chosen):
    """A plain loop over the experts, the truth of kernels/moe.py here and in its tests."""
    y = torch.zeros_like(x)
    for e in range(len(down)):
        n, k = (chosen == e).nonzero(as_tuple=True)
        gate, up = (x[n] @ gate_up[e].T).chunk(2, -1)
        y = y.index_add(0, n, (F.silu(gate) * up) @ down[e].T * weights[n, k, None])
    return y


def expert_cases():
    from kernels.moe import experts

    def inputs(N, C, I, E, K):
        chosen = torch.rand(N, E, device=DEVICE).topk(K).indices
        weights = torch.rand(N, K, device=DEVICE).requires_grad_()
        x = rand(N, C)
        gate_up = rand(E, 2 * I, C, scale=C ** -0.5)
        down = rand(E, C, I, scale=I ** -0.5)
        return [x, gate_up, down, weights, chosen]

    def cost(N, C, I, E, K):
        matrices = 2 * 3 * E * C * I
        flops = 6 * N * K * C * I
        return (matrices + 4 * N * C, flops), (2 * matrices + 8 * N * C, 2 * flops)

    yield Case('experts 8 of 64', experts, inputs, cost, truth=experts_one_by_one,
               target=(0.4, 0.4),
               size=(8192, 2048, 1408, 64, 8), check=(1000, 512, 384, 64, 8),
               smoke=(37, 52, 36, 5, 2))
    yield Case('experts 8 of 256', experts, inputs, cost, truth=experts_one_by_one,
               size=(8192, 2048, 768, 256, 8), check=(999, 256, 200, 256, 8),
               smoke=(9, 16, 16, 6, 2))


def head_cases():
    from kernels.linear_logprob import linear_logprob

    def loss(h, w, labels):
        return -linear_logprob(h, w, labels)[0]

    def eager(h, w, labels):
        logits = (h @ w.T).to(torch.promote_types(h.dtype, torch.float32))
        return F.cross_entropy(logits, labels, reduction='none')

    def inputs(N, C, V):
        return [rand(N, C), rand(V, C, scale=C ** -0.5), torch.randint(V, (N,), device=DEVICE)]

    def cost(N, C, V):
        return (0, 6 * N * C * V), None

    yield Case('linear_logprob', loss, inputs, cost, eager=eager, together=True, target=(0.7,),
               size=(16384, 2048, 131072), check=(777, 256, 5000), smoke=(7, 16, 40))


def attention_cases():
    from kernels.attention import Mask, attention

    def inputs(B, T, H, G, n, r, w, documents):
        """-> q, k, v, each token's document or None, and if r the rope parts of q and k"""
        ids = torch.arange(T, device=DEVICE).mul(documents).div(T, rounding_mode='floor')
        ropes = [rand(B, T, H, r), rand(B, T, r)] if r else []
        q = rand(B, T, H, n)
        k = rand(B, T, G, n)
        v = rand(B, T, G, w)
        return [q, k, v, ids.expand(B, T) if documents > 1 else None, *ropes]

    def attend(q, k, v, ids, *ropes):
        width = q.shape[3] + (ropes[0].shape[3] if ropes else 0)
        mask = Mask.causal() if ids is None else Mask.documents(ids)
        return attention(q, k, v, width ** -0.5, mask, *ropes)

    def cost(B, T, H, G, n, r, w, documents):
        # two products over the lower triangle of every document
        flops = B * H * (n + r + w) * T * T / documents
        return (0, flops), (0, 2.5 * flops)

    yield Case('mla_attention 192/128', attend, inputs, cost, target=(0.45, 0.35),
               size=(4, 4096, 16, 16, 128, 64, 128, 1), check=(2, 333, 16, 16, 128, 64, 128, 1),
               smoke=(1, 19, 4, 4, 8, 4, 8, 1))
    yield Case('mla_attention GQA 128, 16 documents', attend, inputs, cost,
               size=(4, 4096, 12, 2, 128, 0, 128, 16), check=(2, 333, 12, 2, 128, 0, 128, 7),
               smoke=(1, 19, 3, 1, 8, 0, 8, 3))


def decoding_cases():
    from kernels.mla_decode import mla_decode

    def inputs(S, L, H, P, Lp):
        """S samples of P prompts, the latent cache of V3 as one GPU of eight holds its heads"""
        q = rand(S, 1, H, 576, grad=False)
        cache = rand(S, L, 576, grad=False)
        length = torch.full((S,), L, device=DEVICE)
        prefix = rand(P, Lp, 576, grad=False)
        prefix_length = torch.full((P,), Lp, device=DEVICE)
        prompt = torch.arange(S, device=DEVICE) * P // S
        return [q, cache, length, prefix, prefix_length, prompt]

    def decode(q, cache, length, prefix, prefix_length, prompt):
        group = kernels.cdiv(len(q), len(prefix))
        return mla_decode(
            q, cache, length, 192 ** -0.5, 512, prefix, prefix_length, prompt, group)

    def cost(S, L, H, P, Lp):
        return (2 * 576 * (S * L + P * Lp), 0), None

    yield Case('mla_decode', decode, inputs, cost, target=(0.6,),
               size=(128, 4096, 16, 16, 1024), check=(9, 300, 16, 3, 70), smoke=(3, 5, 2, 2, 3))


def fp8_cases():
    from kernels import fp8

    def quantised(M, N, K):
        x = fp8.quantise(rand(M, K, grad=False))
        return [*x, *fp8.quantise(rand(N, K, grad=False), blocks=True)]

    def product(x, x_scale, w, w_scale):
        return fp8.matmul(x, x_scale, w, w_scale, DTYPE)

    def product_in(dtype):
        def product(x, x_scale, w, w_scale):
            return fp8.dequantise(x, x_scale, dtype) @ fp8.dequantise(w, w_scale, dtype).T
        return product

    def product_cost(M, N, K):
        return (M * K + N * K + 2 * M * N, 2 * M * N * K), None

    yield Case('fp8 matmul', product, quantised, product_cost,
               eager=product_in(DTYPE), truth=product_in(torch.float64),
               target=(1.3,),     # the bound is that of a bf16 product
               size=(8192, 7168, 7168), check=(1000, 777, 1024), smoke=(5, 140, 300))

    def there_and_back(x):
        return fp8.dequantise(*fp8.quantise(x), DTYPE)

    def eager_there_and_back(x):
        return fp8.dequantise(*fp8.quantise_torch(x), DTYPE)

    def same(x):
        return x

    def one(M, K):
        return [rand(M, K, grad=False)]

    def moved(M, K):
        return (6 * M * K, 0), None

    yield Case('fp8 quantise 1x128', there_and_back, one, moved,
               eager=eager_there_and_back, truth=same,
               size=(8192, 7168), check=(333, 1000), smoke=(5, 140))

    def linear(x, w):
        return fp8.linear(x, w)

    def eager_linear(x, w):
        return x @ w.T

    def operands(M, N, K):
        return [rand(M, K), rand(N, K, scale=K ** -0.5)]

    def linear_cost(M, N, K):
        return (0, 2 * M * N * K), (0, 4 * M * N * K)

    yield Case('fp8 linear', linear, operands, linear_cost, eager=eager_linear,
               allowed=0.05,      # the error of FP8 itself, about 0.037
               size=(8192, 4096, 4096), check=(1000, 777, 1024), smoke=(5, 140, 30))


# ---- checking ----

def outputs_of(function, inputs):
    """-> the floating-point tensors that function(*inputs) gives"""
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    return [t for t in out if t is not None and t.dtype.is_floating_point]


def leaves_of(inputs):
    return [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]


def run(function, inputs, dy=None):
    """-> outputs and gradients; dy is drawn once and used by every form"""
    out = outputs_of(function, inputs)
    leaves = leaves_of(inputs)
    if not leaves:
        return out, None
    if dy is None:
        dy = [torch.randn_like(t, dtype=torch.float32) for t in out]
    grads = torch.autograd.grad(out, leaves, [d.to(t.dtype) for d, t in zip(dy, out)])
    return out + list(grads), dy


def widen(t):
    """A tensor of narrower floats in float64, anything else as it is"""
    if not isinstance(t, torch.Tensor):
        return t
    if t.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return t
    return t.detach().double().requires_grad_(t.requires_grad)


def errors(got, truth):
    """-> of each tensor |got − truth| / |truth|"""
    relative = []
    for a, b in zip(got, truth, strict=True):
        a = a.detach().double()
        b = b.detach()
        relative.append(((a - b).norm() / b.norm().clamp(min=1e-30)).item())
    return relative


def times(size):
    return '×'.join(map(str, size))


def check(case, size):
    """-> faults; prints the worst error, and its share of what is tolerated"""
    inputs = case.inputs(*size)
    kernels.use('triton')
    got, dy = run(case.ours, inputs)
    kernels.use('torch')
    truth, _ = run(case.truth or case.eager or case.ours, [widen(t) for t in inputs], dy)
    eager, _ = run(case.eager or case.ours, inputs, dy)

    ours = errors(got, truth)
    shares = []
    for our_error, eager_error in zip(ours, errors(eager, truth)):
        share = our_error / (case.tolerance * eager_error + case.allowed)
        shares.append(share if math.isfinite(our_error) else math.inf)
    share = max(shares)
    failed = not share <= 1
    print(f'| {case.name} | {times(size)} | {max(ours):.1e} '
          f'| {share:.0%}{" FAILED" if failed else ""} |', flush=True)
    return int(failed)


# ---- timing ----

def median(function, capture=True, repeats=30):
    """Seconds of function(), on a GPU from a replayed graph behind a flush of the L2 cache"""
    if DEVICE == 'cpu':
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()                # nothing can be given back while a graph is captured
    timed = function
    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):       # fails on a host sync: none of the kernels may have one
            function()
        timed = graph.replay

    flush = torch.empty(2**28, dtype=torch.int8, device=DEVICE)
    events = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        timed()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def forward_backward(function, inputs, together, capture=True):
    """-> seconds forward, or of both where `together`; seconds backward or None"""
    def forward():
        with torch.no_grad():
            function(*inputs)

    leaves = leaves_of(inputs)
    if not leaves:
        return median(forward, capture), None

    def outputs():
        return [t for t in outputs_of(function, inputs) if t.requires_grad]

    # made outside: to fill them is no part of the backward pass
    ones = [torch.ones_like(t) for t in outputs()]

    def both():
        return torch.autograd.grad(outputs(), leaves, ones)

    if together:
        return median(both, capture), None
    seconds = median(forward, capture)
    return seconds, median(both, capture) - seconds


def attempt(function, inputs, together):
    """
    As forward_backward, of another form, and '*' if it was not captured; None where it does not
    run, for a reason told on stderr
    """
    for capture in (True, False):
        try:
            seconds = forward_backward(function, inputs, together, capture)
            return *seconds, '' if capture else '*'
        except Exception as error:
            what = 'not captured' if capture else 'not timed'
            print(f'  {what}: {reason(error)}', file=sys.stderr, flush=True)
            if DEVICE == 'cuda':
                torch.cuda.synchronize()
    return None, None, ''


def machine():
    """-> bytes a second of a large copy, operations a second of a large product"""
    numbers, side = (2**29, 8192) if DEVICE == 'cuda' else (2**22, 256)
    a, b = (torch.empty(numbers, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    x, y = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    copy = median(lambda: b.copy_(a))
    product = median(lambda: x @ y)
    return 4 * numbers / copy, 2 * side**3 / product


def microseconds(seconds):
    if seconds is None:
        return '—'
    return f'{seconds * 1e6:.0f}' if seconds < 0.01 else f'{seconds * 1e6:.3g}'


def time_beside(case, size, bandwidth, rate, form):
    """Prints a row for each direction. form: of the other side, from its function"""
    inputs = case.inputs(*size)
    kernels.use('triton')
    ours = forward_backward(case.ours, inputs, case.together)
    kernels.use('torch')
    *theirs, mark = attempt(form(case.eager or case.ours), inputs, case.together)

    directions = 'both' if case.together else 'forward', 'backward'
    for i, (direction, cost) in enumerate(zip(directions, case.cost(*size))):
        if cost is None or ours[i] is None:
            continue
        moved, flops = cost
        bound = max(moved / bandwidth, flops / rate)
        share = bound / ours[i]
        verdict = ''
        if case.target:
            goal = case.target[i]
            verdict = f'{goal:.0%} {"met" if share >= goal else "missed"}'
        print(f'| {case.name} | {times(size)} | {direction} | {microseconds(ours[i])} '
              f'| {microseconds(theirs[i])}{mark} | {microseconds(bound)} | {share:.0%} '
              f'| {verdict} |', flush=True)
    return 0


# ---- the run ----

def setup(cfg):
    global DEVICE, DTYPE
    DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
    DTYPE = torch.float32 if DEVICE == 'cpu' else torch.bfloat16
    torch.manual_seed(cfg.seed or time.time_ns() % 2**31)


def reason(error):
    first, *_ = str(error).splitlines() or ['']
    return f'{type(error).__name__}: {first[:160]}'


def faults_of(case, cfg, phase, known):
    """One case of one phase -> faults"""
    size = case.check if phase == 'check' else case.size
    if cfg.smoke:
        size = case.smoke
    try:
        if phase == 'check':
            return check(case, size)
        form = torch.compile if phase == 'compile' else lambda function: function
        return time_beside(case, size, *known, form)
    except Exception as error:
        print(f'| {case.name} | {times(size)} | FAILED: {reason(error)} |', flush=True)
        return 1


def work(cfg, phase, names, known, pipe):
    """
    The cases of these names, in a process of its own; after each sends how many faults it had.
    known: bandwidth and rate
    """
    setup(cfg)
    for case in cases():
        if case.name not in names:
            continue
        faults = faults_of(case, cfg, phase, known)
        if DEVICE == 'cuda':
            torch.cuda.synchronize()        # raises where a kernel has broken the context
            torch.cuda.empty_cache()
        pipe.send(faults)


def measure(cfg, pipe):
    setup(cfg)
    pipe.send(machine())


def started(function, *args):
    args[-1].send(0)                        # what it takes to import torch is on nobody's clock
    function(*args)


def begin(function, *args):
    """
    -> a process that runs function(*args, pipe), and our end of the pipe, from which 0 comes first,
    when it has started
    """
    spawn = multiprocessing.get_context('spawn')
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=started, args=(function, *args, there))
    process.start()
    there.close()
    return process, here


def receive(here, seconds):
    """-> what came, or a text that says why nothing did"""
    try:
        return here.recv() if here.poll(max(0, seconds)) else f'no answer for {seconds:.0f} s'
    except EOFError:
        return 'its process died'


def each(cfg, phase, names, known, ends):
    """-> faults of all cases, each in a worker that is replaced if it dies or hangs"""
    faults = 0
    while names and time.time() < ends:
        process, here = begin(work, cfg, phase, names, known)
        try:
            receive(here, ends - time.time())
            while names:
                got = receive(here, min(cfg.patience, ends - time.time()))
                lost = isinstance(got, str)
                if lost and time.time() > ends:
                    break
                name, *names = names
                if lost:
                    print(f'| {name} | | FAILED: {got} |', flush=True)
                    faults += 1
                    break
                faults += got
        finally:
            process.kill()
            process.join()
    for name in names:
        print(f'| {name} | not run: {cfg.seconds:.0f} s are over |', flush=True)
    return faults


def measured(cfg):
    """-> machine()'s two rates by a process of its own, or a text that says why not"""
    process, here = begin(measure, cfg)
    receive(here, cfg.seconds)
    known = receive(here, cfg.patience)
    process.kill()
    return known


def print_machine(cfg):
    import triton
    if DEVICE == 'cuda':
        name = torch.cuda.get_device_name()
    else:
        name = f"{platform.processor() or 'CPU'}, Triton's interpreter"
    print(f'{datetime.date.today()} · {name} · torch {torch.__version__}, '
          f'triton {triton.__version__}, {DTYPE} · seed {cfg.seed or "of the clock"}')


def print_head(phase, known):
    if phase == 'check':
        print('\n| kernel | checked at | error against float64 | of what is tolerated |\n'
              '|---|---|---|---|', flush=True)
        return
    bandwidth, rate = known
    print(f'\nmeasured: {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s; times in µs\n\n'
          f'| kernel | size | | ours | {"eager" if phase == "time" else "torch.compile"} '
          '| bound | share of bound | target |\n|---|---|---|---|---|---|---|---|', flush=True)


def main(cfg):
    setup(cfg)
    if DEVICE == 'cpu' and not (cfg.smoke and kernels.interpreted()):
        print('no GPU is visible; TRITON_INTERPRET=1 python tools/kernel_bench.py --smoke=True '
              'tries the script without one', file=sys.stderr)
        return 2
    began = time.time()
    print_machine(cfg)
    names = [case.name for case in cases() if cfg.only in case.name]
    known = None
    faults = 0
    for phase in cfg.phases.split(','):
        if phase == 'compile' and DEVICE == 'cpu':
            continue
        if phase != 'check' and known is None:
            known = measured(cfg)
            if isinstance(known, str):
                print(f'no timing: the machine itself could not be measured: {known}',
                      file=sys.stderr)
                return 1
        print_head(phase, known)
        faults += each(cfg, phase, names, known, began + cfg.seconds)
    said = f'{faults} failed' if faults else 'all checks passed'
    print(f'\n{said} in {time.time() - began:.0f} s')
    return 1 if faults else 0


if __name__ == '__main__':
    sys.exit(main(configure(Config, sys.argv[1:])))
