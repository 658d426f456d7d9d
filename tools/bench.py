"""
Comparisons with other code: the same weights, the same machine, each side in a process of its own,
as its users run it, and in turn, so that the ratio holds where seconds do not.

    python tools/bench.py                       # every comparison
    python tools/bench.py train --rounds=7      # one of them; its parameters as --key=value
    python tools/bench.py train --only=nanoR1   # one side alone, to profile it
    python tools/bench.py smol --model=FOLDER   # a released model: tools/bench_smol.py
    python tools/bench.py gpu                   # what there is to measure on a GPU, in nine
                                                # minutes: the kernels, training, decoding
    make bench

Each comparison is a function below that yields rows (dicts) as they are measured; `main` prints
them as JSON lines. The other side comes from the [test] extra (transformers) and runs at the
fastest of its settings.
"""
import gc
import importlib.util
import inspect
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere
from configurator import from_text  # before torch: says so where it is missing

import torch
import torch.nn.functional as F

import kernels
from kernels import cpu, fp8
from model import ModelConfig, Transformer

DENSE = dict(
    model_type='qwen3', vocab_size=2048, hidden_size=256, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=1024,
    max_position_embeddings=512)
MOE = dict(
    model_type='deepseek_v3', vocab_size=2048, hidden_size=256, num_hidden_layers=6,
    num_attention_heads=4, q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32,
    qk_rope_head_dim=32, v_head_dim=64, intermediate_size=1024, first_k_dense_replace=1,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=256,
    max_position_embeddings=512)
RANDOM = {  # shapes of released models, for speed without their weights
    'tiny': MOE,
    '1.5B': dict(
        model_type='qwen2', vocab_size=151936, hidden_size=1536, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, head_dim=128, intermediate_size=8960,
        max_position_embeddings=4096, tie_word_embeddings=True),
    '16B-A3B': dict(
        model_type='deepseek_v3', vocab_size=163840, hidden_size=2048, num_hidden_layers=27,
        num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, intermediate_size=11264, first_k_dense_replace=1,
        n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=1408,
        max_position_embeddings=4096),
}


# ---- sides, in turn ----

def in_turn(comparison, names, rounds, script=__file__, **given):
    """
    Starts each side as `bench.py comparison --only=side`; after one run of each, to warm up, they
    run `rounds` times in turn. -> {side: what `alone` says of each run}
    """
    flags = [f'--{key}={value}' for key, value in given.items()]
    sides = {}
    for name in names:
        command = [sys.executable, script, comparison, f'--only={name}', '--asked=True', *flags]
        sides[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    answers = {name: [] for name in names}
    try:
        for i in range(rounds + 1):
            for name, side in sides.items():
                answer = ask(side, f'{comparison} of {name}')
                if i > 0:
                    answers[name].append(answer)
    finally:
        for side in sides.values():
            side.stdin.close()       # ends it
            side.wait(60)
    return answers


def ask(side, what):
    """One run of a side -> its row"""
    side.stdin.write('run\n')
    side.stdin.flush()
    for line in side.stdout:
        if line.startswith('{"result"'):      # trainers print, too
            return json.loads(line)
    raise SystemExit(f'bench.py: {what} ended with exit status {side.wait()}')


def alone(run, rounds, asked):
    """
    One side in this process, once for each line on stdin or `rounds` times after one that warms up
    -> rows with the seconds of each run, the processor's seconds, the peak of memory so far in GiB
    and what run() returns
    """
    for i, _ in enumerate(sys.stdin if asked else range(rounds + 1)):
        gc.collect()      # trainers that are done hold their models in cycles
        began = time.perf_counter()
        busy = time.process_time()
        result = run()
        row = {
            'result': result,
            'seconds': time.perf_counter() - began,
            'cpu_seconds': time.process_time() - busy,
            'peak_gib': peak_gib(),
        }
        if i > 0 or asked:
            yield row


def peak_gib():
    from train import peak_memory
    return round(peak_memory(torch.device('cpu')), 3)


def values(answers, name):
    return {side: [row[name] for row in rows] for side, rows in answers.items()}


def fastest(comparison, names, **given):
    """-> which of these takes the least time in one run after one that warms up"""
    def seconds(name):
        return in_turn(comparison, [name], 1, **given)[name][0]['seconds']

    return min(names, key=seconds)


def summary(seconds):
    """-> median, and (max - min) / median as the spread"""
    middle = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / middle
    return {'seconds': float(f'{middle:.4g}'), 'spread': round(spread, 3)}


def ratio(seconds):
    """-> the last side's seconds over the first's, the median over the rounds"""
    first, *_, last = seconds.values()
    return round(statistics.median(b / a for a, b in zip(first, last)), 3)


# ---- a training step beside transformers' ----

def train(
    rows=16, tokens=256, rounds=5, threads=2, dtypes='float32,bfloat16', models='dense,moe',
    only='', asked=False,
):
    """
    Forward, backward and fused AdamW on rows x tokens against transformers, fp32 and bf16
    autocast.
    """
    torch.set_num_threads(threads)
    for kind in models.split(','):
        for dtype in dtypes.split(','):
            if only:
                run = training_step(kind, dtype, only, rows, tokens)
                yield from alone(run, rounds, asked)
                continue
            given = dict(models=kind, dtypes=dtype, rows=rows, tokens=tokens, threads=threads)
            best = fastest('train', names_of_settings(kind), **given)
            answers = in_turn('train', ['nanoR1', best], rounds, **given)
            for name, seconds in values(answers, 'seconds').items():
                yield {
                    'train': kind, 'dtype': dtype, 'side': name, **summary(seconds),
                    'tokens_per_second': round(rows * tokens / statistics.median(seconds)),
                    'loss': round(answers[name][0]['result'], 4),
                    'peak_gib': answers[name][-1]['peak_gib'],
                }
            yield {'train': kind, 'dtype': dtype, 'ratio': ratio(values(answers, 'seconds'))}


def settings(kind):
    """
    transformers' ways to attend and to compute experts; batched_mm gathers a copy of the weights
    for every token: 13 GB here, and never the fastest
    """
    attention = [dict(attn_implementation=name) for name in ('sdpa', 'eager')]
    if kind == 'dense':
        return attention
    both = []
    for setting in attention:
        both.append({**setting, 'experts_implementation': 'grouped_mm'})
        both.append({**setting, 'experts_implementation': 'eager'})
    return both


def name_of(setting):
    return ' '.join(setting.values())


def names_of_settings(kind):
    return [name_of(setting) for setting in settings(kind)]


def new_model(kind, side):
    """-> the same weights for every side; transformers' model if the side is one of its settings"""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**(DENSE if kind == 'dense' else MOE)))
    if side == 'nanoR1':
        cpu.keep_memory()      # as the scripts do
        return model
    by_name = {name_of(setting): setting for setting in settings(kind)}
    return hub_copy(model, **by_name[side])


def hub_copy(model, **settings):
    """
    The same weights as transformers loads them
    settings: attn_implementation=, experts_implementation=
    """
    import transformers
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **settings)


def training_step(kind, dtype, side, rows, tokens):
    model = new_model(kind, side).train()
    ids = torch.randint(0, 2048, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def run():
        with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
            if side == 'nanoR1':
                loss = -model.logprobs(ids, labels)[0].mean()
            else:
                loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


# ---- sampling beside transformers' generate ----

def sample(
    prompts=32, samples=8, prompt=64, new=128, rounds=2, threads=2, models='moe,dense',
    lengths='uniform,ragged', only='', asked=False,
):
    """
    Useful tokens a second against transformers' generate, greedy and fp32, at the fastest of its
    settings for caches, attention and experts. ragged: each sample ends after 8 to `new` tokens, 42
    on average; transformers goes on until the last has ended.
    """
    torch.set_num_threads(threads)
    for kind in models.split(','):
        given = dict(
            models=kind, prompts=prompts, samples=samples, prompt=prompt, threads=threads)
        best = ''
        for shape in lengths.split(','):
            limits = drawn_lengths(shape, prompts, samples, new)
            if only:
                yield from alone(generation(kind, only, prompts, prompt, limits), rounds, asked)
                continue
            if not best:
                names = [f'{name}, {cache} cache'
                         for name in names_of_settings(kind) for cache in ('dynamic', 'static')]
                best = fastest('sample', names, lengths='uniform', new=new // 8, **given)
            answers = in_turn('sample', ['nanoR1', best], rounds,
                              lengths=shape, new=new, **given)
            yield from sampling_rows(kind, shape, answers, sum(map(sum, limits)))


def drawn_lengths(shape, prompts, samples, new):
    """-> how many tokens each sample of each prompt has"""
    draw = random.Random(0)

    def length():
        return new if shape == 'uniform' else min(new, 8 + int(draw.expovariate(1 / 36)))

    return [[length() for _ in range(samples)] for _ in range(prompts)]


def sampling_rows(kind, shape, answers, useful):
    """useful: tokens of one run"""
    head = {'sample': kind, 'lengths': shape}
    # the same tokens, or the comparison is of nothing
    ours, theirs = (rows[0]['result'] for rows in answers.values())
    agree = sum(a == b for a, b in zip(ours, theirs)) / len(ours)
    yield {**head, 'first_tokens_agree': agree}

    bound = machine_bound(new_model(kind, 'nanoR1'), useful)
    cpu_seconds = values(answers, 'cpu_seconds')
    for name, seconds in values(answers, 'seconds').items():
        middle = statistics.median(seconds)
        yield {
            **head, 'side': name, **summary(seconds),
            'cpu_seconds': round(statistics.median(cpu_seconds[name]), 2),
            'useful_tokens_per_second': round(useful / middle),
            'share_of_bound': round(bound / middle, 3),
        }
    yield {**head, 'ratio': ratio(values(answers, 'seconds')), 'ratio_cpu': ratio(cpu_seconds)}


def machine_bound(model, tokens):
    """
    Seconds that the multiplications of decoding `tokens` would take at the rate of this machine's
    own products [256, C] x [C, 4C]
    """
    C = model.cfg.hidden_size
    x = torch.randn(256, C)
    w = torch.randn(4 * C, C)
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(40):
            F.linear(x, w)
        rates.append(40 * 2 * x.numel() * 4 * C / (time.perf_counter() - began))
    return 2 * model.num_params(active=True) * tokens / max(rates)


def generation(kind, side, prompts, prompt, limits):
    """
    -> a function that generates limits[p][s] tokens for sample s of prompt p and returns the first
    four of each
    """
    samples = len(limits[0])
    setting, _, cache = side.partition(', ')
    model = new_model(kind, setting).eval()
    ids = torch.randint(0, 2048, (prompts, prompt), generator=torch.Generator().manual_seed(1))
    if side != 'nanoR1':
        return hub_generation(model, ids, samples, limits, cache)

    from sample import Sampler

    def run():
        sampler = Sampler(model, slots=prompts * samples)
        done = sampler.generate(ids.tolist(), samples, limits, 0.0)
        return [completion.tokens[:4] for group in done for completion in group]

    return run


def hub_generation(model, ids, samples, limits, cache):
    """As generation, by transformers; cache: 'static cache' or 'dynamic cache'"""
    import transformers
    prompt = ids.shape[1]
    rows = ids.repeat_interleave(samples, 0)

    class Ended(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return input_ids.shape[1] - prompt >= torch.tensor(limits).flatten()

    config = transformers.GenerationConfig(
        max_new_tokens=max(map(max, limits)), do_sample=False, use_cache=True, pad_token_id=0,
        disable_compile=True,
        cache_implementation='static' if cache == 'static cache' else None)

    @torch.no_grad()
    def run():
        done = model.generate(
            rows, attention_mask=torch.ones_like(rows), generation_config=config,
            stopping_criteria=transformers.StoppingCriteriaList([Ended()]))
        return done[:, prompt:prompt + 4].tolist()

    return run


# ---- on a GPU ----

def gpu(seconds=530):
    """
    Everything that is measured on a GPU, each in a process of its own, so that none takes another's
    results with it.
    """
    if not torch.cuda.is_available():
        raise SystemExit('bench.py gpu: no GPU is visible')
    ends = time.time() + seconds
    for command, most in (
        (['tools/kernel_bench.py', f'--seconds={0.55 * seconds:.0f}'], seconds),
        (['tools/bench.py', 'gpu_train'], 0.23 * seconds),
        (['tools/bench.py', 'decode'], seconds),
    ):
        began = time.time()
        left = max(1, min(most, ends - began))
        try:
            run = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=left)
            code = run.returncode
        except subprocess.TimeoutExpired:
            code = 'cut off'
        yield {'gpu': ' '.join(command), 'exit': code, 'seconds': round(time.time() - began)}


def clock(run, device, times=1):
    """Seconds of run(), the mean of `times` after one that warms up"""
    def wait():
        if device == 'cuda':
            torch.cuda.synchronize()

    run()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - began) / times


def machine(device, kind):
    """-> operations a second of a large product, bytes a second of a large copy"""
    size = 8192 if device == 'cuda' else 512
    a, b = (torch.randn(size, size, dtype=kind, device=device) for _ in range(2))
    big = torch.empty(size * size * 4, dtype=kind, device=device)
    product = clock(lambda: a @ b, device, 10)
    copy = clock(lambda: big.clone(), device, 10)
    return 2 * size**3 / product, 2 * big.nbytes / copy


def random_model(name, device, kind):
    torch.manual_seed(0)
    torch.set_default_dtype(kind)
    try:
        with torch.device(device):
            return Transformer(ModelConfig(**RANDOM[name]))
    finally:
        torch.set_default_dtype(torch.float32)


def failure(error):
    return {'failed': f'{type(error).__name__}: {error}'[:200]}


def gpu_train(models='1.5B,16B-A3B', sides='triton,torch,fp8', rows=2, tokens=4096, steps=4):
    """
    Training steps of rows x tokens on a GPU (any device with models=tiny), random weights, the
    whole row one document. 1.5B as sft.py does it: float32 weights, bf16 autocast, AdamW. 16B-A3B:
    bf16 weights, forward and backward with recomputation; what AdamW needs besides fits no single
    GPU. mfu: 6 x active parameters a token over the data sheet's rate; of_measured: over that of a
    large product here. triton and torch must lose alike.
    """
    from train import peak_tflops
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and models != 'tiny':
        return
    rate, _ = machine(device, torch.bfloat16)
    sheet = 1e12 * peak_tflops(SimpleNamespace(peak_tflops=0), torch.device(device))
    for name in models.split(','):
        for side in sides.split(','):
            try:
                row = training_speed(name, side, device, rows, tokens, steps)
                flops = row['tokens_per_second'] * 6 * row['active']
                row['mfu'] = round(flops / sheet, 3) if sheet else None
                row['of_measured'] = round(flops / rate, 3)
                row['measured_TFLOPs'] = round(rate / 1e12, 1)
            except Exception as error:
                row = failure(error)
            yield {'gpu_train': name, 'side': side, **row}
            gc.collect()
            if device == 'cuda':
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def training_speed(name, side, device, rows, tokens, steps):
    kernels.use('torch' if side == 'torch' else 'auto')
    recompute = name == '16B-A3B'
    model = random_model(name, device, torch.bfloat16 if recompute else torch.float32)
    model.activation_checkpointing = recompute
    if side == 'fp8':
        model = fp8.convert(model)
    optimizer = None
    if not recompute:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    ids = torch.randint(0, model.cfg.vocab_size, (rows, tokens), device=device)
    losses = []

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=not recompute):
            loss = -model.logprobs(ids, ids.roll(-1, 1))[0].mean()
        loss.backward()
        if optimizer:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    seconds = clock(step, device, steps)
    peak = None
    if device == 'cuda':
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return {
        'active': model.num_params(active=True),
        'milliseconds_a_step': round(seconds * 1e3, 1),
        'tokens_per_second': round(rows * tokens / seconds),
        'losses': [round(loss.item(), 4) for loss in (losses[0], losses[-1])],
        'peak_gib': peak,
    }


def decode(
    models='1.5B,16B-A3B', batches='8,64,256', group=8, prompt=512, new=256, dtype='bfloat16',
):
    """
    Decoding on a GPU (any device with models=tiny): tokens a second and the share of the bound, a
    step's longest of reading weights and cache at the measured bandwidth and of its multiplications
    at the measured rate.
    """
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    kind = getattr(torch, dtype)
    if device == 'cpu' and models != 'tiny':
        return
    peak, bandwidth = machine(device, kind)
    for name in models.split(','):
        model = random_model(name, device, kind).eval()
        for batch in map(int, batches.split(',')):
            head = {'decode': name, 'batch': batch}
            try:
                step = decoding_step(model, batch, group, prompt, new, device)
            except Exception as error:
                yield {**head, **failure(error)}
                continue
            read = numbers_read(model, batch, group, prompt, new) * kind.itemsize
            multiplied = 2 * model.num_params(active=True) * batch
            bound = max(read / bandwidth, multiplied / peak)
            yield {
                **head,
                'tokens_per_second': round(batch / step),
                'milliseconds_a_step': round(step * 1e3, 3),
                'share_of_bound': round(bound / step, 3),
                'bandwidth_GBps': round(bandwidth / 1e9),
                'peak_TFLOPs': round(peak / 1e12, 1),
            }
        del model


def numbers_read(model, batch, group, prompt, new):
    """-> the weights and cache entries that a step of the second half of `new` tokens reads"""
    cfg = model.cfg
    routed = 0
    for layer in model.model.layers:
        if hasattr(layer.mlp, 'experts'):
            routed += sum(p.numel() for p in layer.mlp.experts.parameters())
    weights = sum(p.numel() for p in model.parameters()) - routed
    if not cfg.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.numel()
    if routed:      # the experts that some token of the batch chooses
        untouched = (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** batch
        weights += routed * (1 - untouched)
    entries = max(1, batch // group) * prompt + batch * new * 3 / 4
    return weights + entries * cfg.cache_width * cfg.num_hidden_layers


def decoding_step(model, batch, group, prompt, new, device):
    """Seconds of a step: what the second half of `new` tokens takes"""
    from sample import Sampler
    prompts = torch.randint(0, model.cfg.vocab_size, (max(1, batch // group), prompt)).tolist()
    sampler = Sampler(model, slots=batch)

    def seconds(length):
        return clock(
            lambda: sampler.generate(prompts, min(group, batch), length, 1.0), device)

    return (seconds(new) - seconds(new // 2)) / (new - new // 2)


# ---- RL and SFT steps beside TRL's trainers (the [bench] extra) ----

def dense_checkpoint(folder, size=2048):
    """
    A new dense model in `folder` with a tokenizer of `size` words "t0 t1 ..."
    -> the tokenizer, and transformers' like it. The last word ends a text.
    """
    from tokenizers import Tokenizer as HubTokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    from data.tokenizer import Tokenizer
    special = ['<|user|>', '<|assistant|>', '<|end|>']
    words = [f' t{i}' for i in range(size - 256 - len(special))]
    ours = Tokenizer.from_words(words, special_tokens=special)
    torch.manual_seed(0)
    Transformer(ModelConfig(**DENSE, eos_token_id=ours.eos_id)).save_pretrained(folder)
    ours.save_pretrained(folder)

    theirs = HubTokenizer(WordLevel({f't{i}': i for i in range(size)}, unk_token='t0'))
    theirs.pre_tokenizer = WhitespaceSplit()
    return ours, PreTrainedTokenizerFast(
        tokenizer_object=theirs, eos_token=f't{ours.eos_id}', pad_token='t0')


def need_trl(only):
    if only != 'nanoR1' and importlib.util.find_spec('trl') is None:
        raise SystemExit(
            "bench.py: trl is missing; pip install -e '.[bench]', or --only=nanoR1")


def trl_config(kind, folder, dtype, steps, rows, micro_batches=1, **given):
    """rows: of a micro-batch; given: more settings, or others than these"""
    settings = dict(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=rows,
        gradient_accumulation_steps=micro_batches, learning_rate=1e-4, max_grad_norm=1.0,
        lr_scheduler_type='constant', optim='adamw_torch_fused', bf16=dtype == 'bfloat16',
        gradient_checkpointing=False, logging_strategy='no', save_strategy='no', report_to='none',
        use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True)
    return kind(**{**settings, **given})


def step_seconds():
    """
    A callback for transformers' trainers that notes the seconds of each step, what prepares it
    included; the first is a warm-up.
    """
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []
            self.last = None

        def on_step_end(self, *args, **kwargs):
            now = time.perf_counter()
            if self.last:
                self.seconds.append(now - self.last)
            self.last = now

    return Clock()


def new_text(rng, words):
    return ''.join(f' t{rng.randrange(1000)}' for _ in range(words))


def write_rows(path, rows):
    with open(path, 'w', encoding='utf-8') as file:
        for row in rows:
            file.write(json.dumps(row) + '\n')


def logged(folder):
    """-> pairs of each line of a run's log and the next"""
    with open(f'{folder}/metrics.jsonl', encoding='utf-8') as file:
        lines = [json.loads(line) for line in file]
    return list(zip(lines, lines[1:]))


def their_model(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation='sdpa')


def coin(response, row=None):
    """A reward that costs nothing"""
    return float(len(response) % 7)


def coins(completions, **_):
    """The same as TRL calls it"""
    return [coin(completion) for completion in completions]


def grpo(
    prompts=8, group=8, prompt=32, new=64, steps=3, rounds=3, threads=2,
    dtypes='float32,bfloat16', only='', asked=False,
):
    """
    A GRPO step of 8 prompts x 8 completions, prompt 32, 64 new tokens, against TRL's GRPOTrainer at
    equal settings: no KL, one update, group advantages, token-level loss, a constant rate, AdamW.
    Both run as they are, `steps` steps a round in turn after one that warms up.
    """
    import grpo as script
    import rewards
    need_trl(only)
    torch.set_num_threads(threads)
    rng = random.Random(0)
    rewards.REWARDS['coin'] = coin
    rewards.ACCURACY['coin'] = coin
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, their_tokenizer = dense_checkpoint(folder)
        # the template's own tokens are part of the 32
        turn = [{'role': 'user', 'content': new_text(rng, prompt)}]
        ids, *_ = tokenizer.apply_chat_template(turn, add_generation_prompt=True)
        overhead = len(ids) - prompt
        problems = [new_text(rng, prompt) for _ in range(prompts * 8)]
        shortened = [' ' + ' '.join(problem.split()[overhead:]) for problem in problems]
        write_rows(f'{folder}/rl.jsonl',
                   [{'prompt': text, 'task': 'coin'} for text in shortened])

        def ours(dtype):
            out = f'{folder}/ours'
            shutil.rmtree(out, ignore_errors=True)
            script.main(script.Config(
                out_dir=out, init_from=folder, data=[f'{folder}/rl.jsonl'], rewards={'coin': 1.0},
                steps=steps + 1, prompts=prompts, group=group, max_new_tokens=new,
                learning_rate=1e-4, micro_tokens=10**6, slots=prompts * group, eval_every=0,
                save_every=0, dtype=dtype, threads=threads, device='cpu'))
            return [after['seconds'] - before['seconds'] for before, after in logged(out)]

        def theirs(dtype):
            from datasets import Dataset
            from trl import GRPOConfig, GRPOTrainer
            timer = step_seconds()
            config = trl_config(
                GRPOConfig, f'{folder}/trl', dtype, steps + 1, prompts * group,
                num_generations=group, max_completion_length=new, beta=0.0, loss_type='dapo',
                temperature=1.0)
            GRPOTrainer(
                their_model(folder), coins, args=config,
                train_dataset=Dataset.from_dict({'prompt': problems}),
                processing_class=their_tokenizer, callbacks=[timer]).train()
            return timer.seconds

        sides = {'nanoR1': ours, 'TRL': theirs}
        yield from beside('grpo', sides, dtypes, rounds, threads, only, asked)


def sft(
    rows=16, row_len=256, steps=4, rounds=3, threads=2, dtypes='float32,bfloat16', only='',
    asked=False,
):
    """
    SFT of packed documents of 20 to 140 tokens, 16 x 256 tokens a step, loss on all tokens, against
    TRL's SFTTrainer with its default packing ('bfd', documents isolated) and with the one that cuts
    the stream of documents into rows ('wrapped', documents see each other). Tokens: real ones.
    """
    import sft as script
    need_trl(only)
    torch.set_num_threads(threads)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, their_tokenizer = dense_checkpoint(folder)
        conversations = []
        for _ in range(2000):
            question = new_text(rng, rng.randint(5, 40))
            answer = new_text(rng, rng.randint(15, 100))
            conversations.append([{'role': 'user', 'content': question},
                                  {'role': 'assistant', 'content': answer}])
        write_rows(f'{folder}/sft.jsonl', [{'messages': each} for each in conversations])
        documents = [tokenizer.apply_chat_template(messages)[0] for messages in conversations]

        def ours(dtype):
            out = f'{folder}/ours'
            shutil.rmtree(out, ignore_errors=True)
            script.main(script.Config(
                out_dir=out, init_from=folder, data=[f'{folder}/sft.jsonl'], loss_on='all',
                row_len=row_len, batch_rows=rows, micro_rows=rows, steps=steps + 1,
                learning_rate=1e-4, schedule='constant', warmup_steps=1, log_every=1, save_every=0,
                dtype=dtype, threads=threads, device='cpu'))
            return [(after['seconds'] - before['seconds']) / (after['tokens'] - before['tokens'])
                    for before, after in logged(out)]

        def theirs(dtype, strategy):
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer
            timer = step_seconds()
            config = trl_config(
                SFTConfig, f'{folder}/trl', dtype, steps + 1, rows,
                packing=True, packing_strategy=strategy, max_length=row_len)
            trainer = SFTTrainer(
                their_model(folder), args=config,
                train_dataset=Dataset.from_dict({'input_ids': documents}),
                processing_class=their_tokenizer, callbacks=[timer])
            packed = trainer.train_dataset['input_ids']
            fill = sum(map(len, packed)) / len(packed) / row_len
            trainer.train()
            return [seconds / (rows * row_len * fill) for seconds in timer.seconds]

        sides = {
            'nanoR1': ours,
            'TRL bfd': lambda dtype: theirs(dtype, 'bfd'),
            'TRL wrapped': lambda dtype: theirs(dtype, 'wrapped'),
        }
        yield from beside('sft', sides, dtypes, rounds, threads, only, asked, per_token=True)


def beside(name, sides, dtypes, rounds, threads, only, asked, per_token=False, **given):
    """
    sides: {name: function of the dtype -> seconds of its steps} -> rows of each and the ratios
    per_token: the seconds are those of a token
    given: more of `in_turn`
    """
    for dtype in dtypes.split(','):
        if only:
            yield from alone(lambda dtype=dtype: sides[only](dtype), rounds, asked)
            continue
        answers = in_turn(name, sides, rounds, dtypes=dtype, threads=threads, **given)
        seconds = {side: sum(results, []) for side, results in values(answers, 'result').items()}
        peaks = {side: max(row['peak_gib'] for row in rows) for side, rows in answers.items()}
        for side in answers:
            row = {name: dtype, 'side': side, **summary(seconds[side])}
            if per_token:
                row['tokens_per_second'] = round(1 / statistics.median(seconds[side]))
            yield {**row, 'peak_gib': peaks[side]}
        for side in list(sides)[1:]:
            pair = {'nanoR1': seconds['nanoR1'], side: seconds[side]}
            yield {name: dtype, 'against': side, 'ratio': ratio(pair),
                   'memory': round(peaks['nanoR1'] / peaks[side], 3)}


# ---- memory of the head ----

LOG_PROB_MEMORY = '''
import os, sys, torch
from kernels.linear_logprob import linear_logprob
from train import peak_memory

cpu = torch.device('cpu')
N, V, C, chunk = map(int, sys.argv[1:])
torch.set_num_threads(1)
h = torch.randn(N, C, requires_grad=True)
w = torch.randn(V, C, requires_grad=True)
y = torch.randint(0, V, (N,))
if os.path.exists('/proc/self/clear_refs'):     # the peak from here on
    open('/proc/self/clear_refs', 'w').write('5')
before = peak_memory(cpu)
if chunk:
    logp, H = linear_logprob(h, w, y, 1.0, True, chunk)
else:
    table = (h @ w.T).log_softmax(-1)
    logp = table.gather(1, y[:, None])[:, 0]
    H = -(table.detach().exp() * table.detach()).sum(-1)
(-logp).sum().backward()
print(peak_memory(cpu) - before)
'''


def log_prob_memory(N, V, C, chunk):
    """
    -> GiB that log-probs, entropy and their gradient take for N tokens, in a process of its own,
    less what it needs without them; chunk 0: the naive form, which holds all logits
    """
    command = [sys.executable, '-c', LOG_PROB_MEMORY, *map(str, (N, V, C, chunk))]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(run.stdout)


def logits_memory(tokens=2048, vocabulary=131072, width=64):
    """
    Peak memory of a GRPO update's log-probs, entropy and gradient, 8 x 256 tokens and a vocabulary
    of 128k, by the size of the chunk.
    """
    for N in (tokens // 2, tokens):
        for chunk in (32, 128, 512, 0):
            gib = log_prob_memory(N, vocabulary, width, chunk)
            yield {'logits_memory': f'chunk {chunk}' if chunk else 'naive', 'tokens': N,
                   'vocabulary': vocabulary, 'gib': round(gib, 3)}


# ---- the command line ----

COMPARISONS = [train, sample, decode, gpu_train, grpo, sft, logits_memory]


def defaults_of(function):
    """-> its parameters and their defaults"""
    return {key: p.default for key, p in inspect.signature(function).parameters.items()}


def help_text(doc, names):
    """The head of a file, and each comparison with its parameters and their defaults."""
    lines = [doc.strip(), '']
    for name, function in names.items():
        flags = [f'--{key}={value}' for key, value in defaults_of(function).items()]
        lines.append(f'{name}: {" ".join((function.__doc__ or "").split())}')
        lines.append('    ' + ' '.join(flags))
    return '\n'.join(lines)


def read_flags(flags, keys):
    """['--key=value', ...] -> {key: text}; SystemExit for a key that is none of keys"""
    given = {}
    for flag in flags:
        key, equals, value = flag.removeprefix('--').partition('=')
        if not equals or key not in keys:
            raise SystemExit(f'bench.py: {flag}: write --key=VALUE with one of the keys '
                             f'{", ".join(sorted(keys))} (see --help)')
        given[key] = value
    return given


def fitted(given, function):
    """{key: text} -> the values of those that function takes, in the types of its defaults"""
    kinds = {key: type(default) for key, default in defaults_of(function).items()}
    values = {}
    for key, text in given.items():
        if key not in kinds:
            continue
        try:
            values[key] = from_text(text, kinds[key])
        except TypeError:
            raise SystemExit(
                f'bench.py: --{key} must be {kinds[key].__name__}, not {text!r}') from None
    return values


def print_machine():
    row = {
        'torch': torch.__version__,
        'machine': platform.processor() or platform.machine(),
        'cores': os.cpu_count(),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    print(json.dumps(row), flush=True)


def run_chosen(argv, usual, others, doc):
    """argv: comparisons by name, without one all of the usual, and --key=value for them; others:
    functions that run only by their name"""
    names = {function.__name__: function for function in [*usual, *others]}
    if '--help' in argv or '-h' in argv:
        return print(help_text(doc, names))
    chosen = [arg for arg in argv if not arg.startswith('-')]
    chosen = chosen or [function.__name__ for function in usual]
    for name in chosen:
        if name not in names:
            raise SystemExit(f'bench.py: no comparison {name!r}; there are {", ".join(names)}')
    keys = set()
    for name in chosen:
        keys |= set(defaults_of(names[name]))
    given = read_flags([arg for arg in argv if arg.startswith('-')], keys)

    print_machine()
    for name in chosen:
        for row in names[name](**fitted(given, names[name])):
            print(json.dumps(row), flush=True)


def main(argv):
    if argv[:1] == ['smol']:      # which imports from here
        tool = ROOT / 'tools/bench_smol.py'
        raise SystemExit(subprocess.run([sys.executable, str(tool), *argv[1:]]).returncode)
    run_chosen(argv, COMPARISONS, [gpu], __doc__)


if __name__ == '__main__':
    main(sys.argv[1:])
