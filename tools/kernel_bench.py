"""
Checks and times every kernel on a GPU, in at most nine minutes:

    python tools/kernel_bench.py                   prints Markdown tables for RESULTS.md; exit
                                                   status 1 if a check or a launch fails
    python tools/kernel_bench.py --only=experts    the cases whose name holds the text
    python tools/kernel_bench.py --phases=check    the checks alone; then come 'time' (beside eager
                                                   PyTorch) and 'compile' (torch.compile)
    TRITON_INTERPRET=1 python tools/kernel_bench.py --smoke=True    tiny sizes in Triton's
                                interpreter: tries the script, its times mean nothing

Every row is printed as soon as it is known, and the cases run in a process of their own that is replaced where one of them crashes or hangs:
a kernel that does not work costs its own row.

Check: on fresh random bf16 inputs, outputs and gradients against the same mathematics in float64; the error, relative in the 2-norm, may
be three times eager PyTorch's own in bf16. Time: medians of replayed CUDA graphs (so launches cost nothing, for anyone) with the L2
cache flushed before each; backward = both − forward. A form that cannot be captured is timed without and marked *. Bound: what must be moved over the bandwidth of a large copy, or what must be
multiplied over the rate of a large bf16 product, whichever is longer, both measured at the start.
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

import torch                                             # noqa: E402

import kernels                                           # noqa: E402
from configurator import configure                       # noqa: E402


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
    ours: Callable            # of the inputs -> tensor or tuple; with `kernels.use('torch')` the eager form where `eager` is None
    inputs: Callable          # size -> list of tensors; those that require grad get gradients
    size: tuple               # timed
    check: tuple              # checked in float64, no smaller than shows a mistake
    smoke: tuple              # both, with --smoke
    cost: Callable            # size -> ((bytes, flops) forward, (bytes, flops) backward or None); bytes at 2 a number
    target: tuple = ()        # shares of the bound, forward and backward
    eager: Callable | None = None
    truth: Callable | None = None   # where the reference does not run in float64
    tolerance: float = 3.0    # times eager's error
    allowed: float = 1e-5     # and this besides
    together: bool = False    # forward and backward are timed as one


def rand(*shape, scale=1.0, grad=True):
    """In DTYPE on DEVICE"""
    return (torch.randn(*shape, device=DEVICE) * scale).to(DTYPE).requires_grad_(grad)


DEVICE, DTYPE = 'cuda', torch.bfloat16   # main() sets them


# ---------------------------------------------------------------------------------------------------------------------
# the cases


def cases():
    from kernels import fp8
    from kernels.linear_logprob import linear_logprob, linear_loss
    from kernels.attention import Mask, attention
    from kernels.mla_decode import mla_decode
    from kernels.moe import experts
    from kernels.rmsnorm import rms_norm
    from kernels.rope import apply_rope
    from kernels.router import route
    from kernels.swiglu import swiglu

    rows = lambda N, D: [rand(N, D), rand(D)]  # noqa: E731
    yield Case('rms_norm', lambda x, w: rms_norm(x, w, 1e-6), rows, (65536, 2048), (999, 2048), (5, 37),
               lambda N, D: ((4 * N * D, 0), (6 * N * D, 0)), (0.8, 0.8))
    yield Case('rms_norm 7168', lambda x, w: rms_norm(x, w, 1e-6), rows, (16384, 7168), (999, 7168), (3, 70),
               lambda N, D: ((4 * N * D, 0), (6 * N * D, 0)), (0.8, 0.8))
    yield Case('rms_norm + residual', lambda x, r, w: rms_norm(x, w, 1e-6, r), lambda N, D: [rand(N, D), rand(N, D), rand(D)], (65536, 2048),
               (999, 2048), (5, 37), lambda N, D: ((8 * N * D, 0), (8 * N * D, 0)), (0.8, 0.8))

    def turned(B, T, H, d):
        angle = torch.rand(B, T, 1, d // 2, device=DEVICE) * 6
        return [rand(B, T, H, d), angle.cos(), angle.sin()]
    for name, interleaved, H, d in (('rope interleaved', True, 128, 64), ('rope half', False, 12, 128)):
        yield Case(name, lambda x, c, s, interleaved=interleaved: apply_rope(x, (c, s), interleaved), turned, (2, 4096, H, d),
                   (2, 333, H, d), (2, 3, 5, 6), lambda B, T, H, d: ((4 * B * T * (H + 2) * d, 0),) * 2)
    yield Case('swiglu', swiglu, lambda N, I: [rand(N, I), rand(N, I)], (16384, 8960), (333, 8960), (3, 40),
               lambda N, I: ((6 * N * I, 0), (10 * N * I, 0)))

    def logits(N, E, K, groups, top):
        # distinct by design: where two experts tie but for rounding, float32 and float64 may choose differently
        spread = torch.rand(N, E, device=DEVICE).argsort(-1) * (8 / E) - 4
        return [spread.requires_grad_(), torch.zeros(E, device=DEVICE), K, groups, top]
    yield Case('route 8 of 256', lambda *a: route(*a)[::2], logits, (16384, 256, 8, 8, 4), (999, 256, 8, 8, 4), (5, 24, 3, 4, 2),
               lambda N, E, K, *_: ((8 * N * E, 0), (12 * N * E, 0)))

    def mixture(N, C, I, E, K):
        chosen = torch.rand(N, E, device=DEVICE).topk(K).indices
        weights = torch.rand(N, K, device=DEVICE).requires_grad_()
        return [rand(N, C), rand(E, 2 * I, C, scale=C ** -0.5), rand(E, C, I, scale=I ** -0.5), weights, chosen]

    def one_by_one(x, gate_up, down, weights, chosen):
        y = torch.zeros_like(x)
        for e in range(len(down)):
            n, k = (chosen == e).nonzero(as_tuple=True)
            gate, up = (x[n] @ gate_up[e].T).chunk(2, -1)
            y = y.index_add(0, n, (torch.nn.functional.silu(gate) * up) @ down[e].T * weights[n, k, None])
        return y

    def mixture_cost(N, C, I, E, K):
        weights = 2 * 3 * E * C * I
        return (weights + 4 * N * C, 6 * N * K * C * I), (2 * weights + 8 * N * C, 12 * N * K * C * I)
    yield Case('experts 8 of 64', experts, mixture, (8192, 2048, 1408, 64, 8), (1000, 512, 384, 64, 8), (37, 52, 36, 5, 2), mixture_cost,
               (0.4, 0.4), truth=one_by_one)
    yield Case('experts 8 of 256', experts, mixture, (8192, 2048, 768, 256, 8), (999, 256, 200, 256, 8), (9, 16, 16, 6, 2), mixture_cost,
               truth=one_by_one)

    def head(N, C, V):
        return [rand(N, C), rand(V, C, scale=C ** -0.5), torch.randint(V, (N,), device=DEVICE)]
    for name, ours, reduction in (('linear_logprob', lambda h, w, y: -linear_logprob(h, w, y)[0], 'none'),       # what model.py trains with
                                  ('linear_logprob loss', lambda h, w, y: linear_loss(h, w, y, lambda logp, entropy, rows: -logp.sum())[0], 'sum')):
        yield Case(name, ours, head, (16384, 2048, 131072), (777, 256, 5000), (7, 16, 40), lambda N, C, V: ((0, 6 * N * C * V), None), (0.7,), together=True,
                   eager=lambda h, w, y, reduction=reduction: torch.nn.functional.cross_entropy(
                       (h @ w.T).to(torch.promote_types(h.dtype, torch.float32)), y, reduction=reduction))

    def attended(B, T, H, G, n, r, w, documents):
        """q, k, v, where each document ends, then the rope parts if r"""
        ids = torch.arange(T, device=DEVICE).mul(documents).div(T, rounding_mode='floor').expand(B, T)
        ropes = [rand(B, T, H, r), rand(B, T, r)] if r else []
        return [rand(B, T, H, n), rand(B, T, G, n), rand(B, T, G, w), ids if documents > 1 else None, *ropes]

    def attend(q, k, v, ids, *ropes):
        width = q.shape[3] + (ropes[0].shape[3] if ropes else 0)
        mask = Mask.causal() if ids is None else Mask.documents(ids)
        return attention(q, k, v, width ** -0.5, mask, *ropes)

    def attention_cost(B, T, H, G, n, r, w, documents):
        flops = B * H * (n + r + w) * T * T / documents           # two products over the lower triangle of every document
        return (0, flops), (0, 2.5 * flops)
    for name, heads, documents in (('mla_attention 192/128', (16, 16, 128, 64, 128), 1),
                                   ('mla_attention GQA 128, 16 documents', (12, 2, 128, 0, 128), 16)):
        H, G, *_ = heads
        yield Case(name, attend, attended, (4, 4096, *heads, documents), (2, 333, *heads, min(documents, 7)),
                   (1, 19, H // 4, max(1, G // 4), 8, 4 * (documents == 1), 8, min(documents, 3)), attention_cost,
                   (0.45, 0.35) if documents == 1 else ())

    def decoding(S, L, H, P, Lp):
        """S samples of P prompts, the latent cache of V3 as one GPU of eight holds its heads"""
        numbers = torch.arange(S, device=DEVICE) * P // S
        return [rand(S, 1, H, 576, grad=False), rand(S, L, 576, grad=False), torch.full((S,), L, device=DEVICE), rand(P, Lp, 576, grad=False),
                torch.full((P,), Lp, device=DEVICE), numbers]
    yield Case('mla_decode', lambda q, cache, length, prefix, prefix_length, prompt: mla_decode(q, cache, length, 192 ** -0.5, 512, prefix,
                                                                                               prefix_length, prompt, -(-len(q) // len(prefix))),
               decoding, (128, 4096, 16, 16, 1024), (9, 300, 16, 3, 70), (3, 5, 2, 2, 3),
               lambda S, L, H, P, Lp: ((2 * 576 * (S * L + P * Lp), 0), None), (0.6,))

    quantised = lambda M, N, K: [*fp8.quantise(rand(M, K, grad=False)), *fp8.quantise(rand(N, K, grad=False), blocks=True)]  # noqa: E731
    decode = lambda x, s, dtype: fp8.dequantise(x, s, dtype)  # noqa: E731
    yield Case('fp8 matmul', lambda *a: fp8.matmul(*a, DTYPE), quantised, (8192, 7168, 7168), (1000, 777, 1024), (5, 140, 300),
               lambda M, N, K: ((M * K + N * K + 2 * M * N, 2 * M * N * K), None), (1.3,),    # the bound is that of a bf16 product
               eager=lambda x, s, w, t: decode(x, s, DTYPE) @ decode(w, t, DTYPE).T,
               truth=lambda x, s, w, t: decode(x, s, torch.float64) @ decode(w, t, torch.float64).T)
    yield Case('fp8 quantise 1x128', lambda x: fp8.dequantise(*fp8.quantise(x), DTYPE), lambda M, K: [rand(M, K, grad=False)], (8192, 7168),
               (333, 1000), (5, 140), lambda M, K: ((6 * M * K, 0), None), truth=lambda x: x,
               eager=lambda x: fp8.dequantise(*fp8.quantise_reference(x), DTYPE))
    yield Case('fp8 linear', lambda x, w: fp8.linear(x, w), lambda M, N, K: [rand(M, K), rand(N, K, scale=K ** -0.5)], (8192, 4096, 4096),
               (1000, 777, 1024), (5, 140, 30), lambda M, N, K: ((0, 2 * M * N * K), (0, 4 * M * N * K)), eager=lambda x, w: x @ w.T,
               allowed=0.05)       # the error of FP8 itself, about 0.037


# ---------------------------------------------------------------------------------------------------------------------
# checking


def run(fn, inputs, dy=None):
    """-> outputs and gradients; dy is drawn once and used by every form"""
    out = fn(*inputs)
    out = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None and t.dtype.is_floating_point]
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    if not leaves:
        return out, None
    dy = [torch.randn_like(t, dtype=torch.float32) for t in out] if dy is None else dy
    return out + list(torch.autograd.grad(out, leaves, [d.to(t.dtype) for d, t in zip(dy, out)])), dy


def widen(t):
    narrow = isinstance(t, torch.Tensor) and t.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return t.detach().double().requires_grad_(t.requires_grad) if narrow else t


def errors(got, truth):
    return [((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp(min=1e-30)).item() for a, b in zip(got, truth, strict=True)]


def check(case, size):
    """-> faults; prints the worst error, and its share of what is tolerated"""
    inputs = case.inputs(*size)
    kernels.use('triton')
    got, dy = run(case.ours, inputs)
    kernels.use('torch')
    truth, _ = run(case.truth or case.eager or case.ours, [widen(t) for t in inputs], dy)
    eager, _ = run(case.eager or case.ours, inputs, dy)
    mine, theirs = errors(got, truth), errors(eager, truth)
    share = max(m / (case.tolerance * t + case.allowed) if math.isfinite(m) else math.inf for m, t in zip(mine, theirs))
    print(f'| {case.name} | {"×".join(map(str, size))} | {max(mine):.1e} | {share:.0%}{"" if share <= 1 else " FAILED"} |', flush=True)
    return int(not share <= 1)


# ---------------------------------------------------------------------------------------------------------------------
# timing


def median(fn, capture=True, repeats=30):
    """Seconds of fn(), on a GPU from a replayed graph behind a flush of the L2 cache"""
    if DEVICE == 'cpu':
        began = time.perf_counter()
        fn()
        return time.perf_counter() - began
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()                # nothing can be given back while a graph is captured
    graph = torch.cuda.CUDAGraph()
    if capture:
        with torch.cuda.graph(graph):       # fails on a host sync: none of the kernels may have one
            fn()
    flush, events = torch.empty(2**28, dtype=torch.int8, device=DEVICE), []
    for _ in range(repeats):
        flush.zero_()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        graph.replay() if capture else fn()
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events) / 1e3


def forward_backward(fn, inputs, together, capture=True):
    """-> seconds forward, or of both where `together`; seconds backward or None"""
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]

    def outputs():
        out = fn(*inputs)
        return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None and t.requires_grad]

    def forward():
        with torch.no_grad():
            fn(*inputs)
    if not leaves:
        return median(forward, capture), None
    ones = [torch.ones_like(t) for t in outputs()]        # made outside: to fill them is no part of the backward pass
    both = lambda: torch.autograd.grad(outputs(), leaves, ones)  # noqa: E731
    if together:
        return median(both, capture), None
    f = median(forward, capture)
    return f, median(both, capture) - f


def attempt(fn, inputs, together):
    """Of another form, as forward_backward, and '*' if not captured; None where it does not run, for a reason told on stderr"""
    for capture in (True, False):
        try:
            return *forward_backward(fn, inputs, together, capture), '' if capture else '*'
        except Exception as error:
            print(f'  {"not captured" if capture else "not timed"}: {reason(error)}', file=sys.stderr, flush=True)
            torch.cuda.synchronize() if DEVICE == 'cuda' else None
    return None, None, ''


def machine():
    """-> bytes a second of a large copy, operations a second of a large product"""
    n, side = (2**29, 8192) if DEVICE == 'cuda' else (2**22, 256)
    a, b = torch.empty(n, dtype=torch.bfloat16, device=DEVICE), torch.empty(n, dtype=torch.bfloat16, device=DEVICE)
    x, y = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 4 * n / median(lambda: b.copy_(a)), 2 * side**3 / median(lambda: x @ y)


def show(value):
    return '—' if value is None else f'{value * 1e6:.0f}' if value < 0.01 else f'{value * 1e6:.3g}'


def time_beside(case, size, bandwidth, rate, form):
    """Prints a row for each direction. form: of the other side, from its function"""
    inputs = case.inputs(*size)
    kernels.use('triton')
    ours = forward_backward(case.ours, inputs, case.together)
    kernels.use('torch')
    *theirs, mark = attempt(form(case.eager or case.ours), inputs, case.together)
    for i, (direction, cost) in enumerate(zip(('both' if case.together else 'forward', 'backward'), case.cost(*size))):
        if cost is None or ours[i] is None:
            continue
        bound = max(cost[0] / bandwidth, cost[1] / rate)
        goal = case.target[i] if case.target else None
        share = bound / ours[i]
        verdict = '' if goal is None else f'{goal:.0%} met' if share >= goal else f'{goal:.0%} missed'
        print(f'| {case.name} | {"×".join(map(str, size))} | {direction} | {show(ours[i])} | {show(theirs[i])}{mark} '
              f'| {show(bound)} | {share:.0%} | {verdict} |', flush=True)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# the run


def setup(cfg):
    global DEVICE, DTYPE
    DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
    DTYPE = torch.float32 if DEVICE == 'cpu' else torch.bfloat16
    torch.manual_seed(cfg.seed or time.time_ns() % 2**31)


def reason(error):
    return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:160]}'


def work(cfg, phase, names, known, pipe):
    """The cases of these names, in a process of its own; after each sends how many faults it had. known: bandwidth and rate"""
    setup(cfg)
    for case in cases():
        if case.name not in names:
            continue
        size = case.smoke if cfg.smoke else case.check if phase == 'check' else case.size
        try:
            faults = check(case, size) if phase == 'check' else time_beside(case, size, *known, torch.compile if phase == 'compile' else lambda f: f)
        except Exception as error:
            print(f'| {case.name} | {"×".join(map(str, size))} | FAILED: {reason(error)} |', flush=True)
            faults = 1
        if DEVICE == 'cuda':
            torch.cuda.synchronize()        # raises where a kernel has broken the context: then a new process goes on
            torch.cuda.empty_cache()
        pipe.send(faults)


def measure(cfg, pipe):
    setup(cfg)
    pipe.send(machine())


def started(function, *args):
    args[-1].send(0)                        # what it takes to import torch is on nobody's clock
    function(*args)


def begin(function, *args):
    """-> a process that runs function(*args, pipe), and our end of the pipe, from which 0 comes first, when it has started"""
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
                if lost:
                    print(f'| {names[0]} | | FAILED: {got} |', flush=True)
                faults, names = faults + (1 if lost else got), names[1:]
                if lost:
                    break
        finally:
            process.kill()
            process.join()
    for name in names:
        print(f'| {name} | not run: {cfg.seconds:.0f} s are over |', flush=True)
    return faults


def main(cfg):
    setup(cfg)
    if DEVICE == 'cpu' and not (cfg.smoke and kernels.interpreted()):
        print('no GPU is visible; TRITON_INTERPRET=1 python tools/kernel_bench.py --smoke=True '
              'tries the script without one', file=sys.stderr)
        return 2
    began = time.time()
    import triton
    name = torch.cuda.get_device_name() if DEVICE == 'cuda' else f"{platform.processor() or 'CPU'}, Triton's interpreter"
    print(f'{datetime.date.today()} · {name} · torch {torch.__version__}, triton {triton.__version__}, {DTYPE} · seed {cfg.seed or "of the clock"}')
    names, known, faults = [case.name for case in cases() if cfg.only in case.name], None, 0
    for phase in cfg.phases.split(','):
        if phase == 'compile' and DEVICE == 'cpu':
            continue
        if phase == 'check':
            print('\n| kernel | checked at | error against float64 | of what is tolerated |\n|---|---|---|---|', flush=True)
        else:
            if known is None:
                process, here = begin(measure, cfg)
                _, known = receive(here, cfg.seconds), receive(here, cfg.patience)
                process.kill()
                if isinstance(known, str):
                    print(f'no timing: the machine itself could not be measured: {known}', file=sys.stderr)
                    return 1
            print(f'\nmeasured: {known[0] / 1e12:.2f} TB/s, {known[1] / 1e12:.0f} TFLOP/s; times in µs\n\n| kernel | size | | ours '
                  f'| {"eager" if phase == "time" else "torch.compile"} | bound | share of bound | target |\n|---|---|---|---|---|---|---|---|', flush=True)
        faults += each(cfg, phase, names, known, began + cfg.seconds)
    print(f'\n{faults} failed' if faults else '\nall checks passed', f'in {time.time() - began:.0f} s')
    return 1 if faults else 0


if __name__ == '__main__':
    sys.exit(main(configure(Config, sys.argv[1:])))
