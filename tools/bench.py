"""
Comparisons with other code: the same weights, the same machine, each side in a process of its own, as its users run it, and in turn, so that
the ratio holds where seconds do not.

    python tools/bench.py                       # every comparison
    python tools/bench.py train --rounds=7      # one of them; its parameters as --key=value
    python tools/bench.py train --only=nanoR1   # one side alone, to profile it
    python tools/bench.py gpu                   # what there is to measure on a GPU, in nine
                                                # minutes: the kernels, training, decoding
    make bench

Each comparison is a function below that yields rows (dicts) as they are measured; `main` prints them as JSON lines. The other
side comes from the [test] extra (transformers) and runs at the fastest of its settings.
"""

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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere
from configurator import from_text  # before torch: says so where it is missing

import torch
import torch.nn.functional as F

from kernels import cpu
from model import ModelConfig, Transformer

DENSE = dict(model_type='qwen3', vocab_size=2048, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
             head_dim=64, intermediate_size=1024, max_position_embeddings=512)
MOE = dict(model_type='deepseek_v3', vocab_size=2048, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, q_lora_rank=None,
           kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=1024, first_k_dense_replace=1,
           n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=256, max_position_embeddings=512)


def in_turn(comparison, names, rounds, **given):
    """Starts each side as `bench.py comparison --only=side`; after one run of each, to warm up, they run `rounds` times in turn.
    -> {side: what `alone` says of each run}"""
    flags, said = [f'--{key}={value}' for key, value in given.items()], {name: [] for name in names}
    sides = {name: subprocess.Popen([sys.executable, __file__, comparison, f'--only={name}', '--asked=True', *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    text=True) for name in names}
    try:
        for i in range(rounds + 1):
            for name, side in sides.items():
                side.stdin.write('run\n')
                side.stdin.flush()
                answer = next((line for line in side.stdout if line.startswith('{"result"')), None)      # trainers print, too
                if answer is None:
                    raise SystemExit(f'bench.py: {comparison} of {name} ended with exit status {side.wait()}')
                said[name] += [json.loads(answer)] if i else []
    finally:
        for side in sides.values():
            side.stdin.close()       # ends it
            side.wait(60)
    return said


def alone(run, rounds, asked):
    """One side in this process, once for each line on stdin or `rounds` times after one that warms up -> rows with the seconds of each run,
    the processor's seconds, the peak of memory so far in GiB and what run() returns"""
    for i, _ in enumerate(sys.stdin if asked else range(rounds + 1)):
        began, busy = time.perf_counter(), time.process_time()
        result = run()
        row = {'result': result, 'seconds': time.perf_counter() - began, 'cpu_seconds': time.process_time() - busy, 'peak_gib': peak_gib()}
        if i or asked:
            yield row


def values(said, name):
    return {side: [row[name] for row in rows] for side, rows in said.items()}


def fastest(comparison, names, **given):
    """-> which of these takes the least time in one run after one that warms up"""
    return min(names, key=lambda name: in_turn(comparison, [name], 1, **given)[name][0]['seconds'])


def summary(seconds):
    """-> median, and (max - min) / median as the spread"""
    middle = statistics.median(seconds)
    return {'seconds': round(middle, 4), 'spread': round((max(seconds) - min(seconds)) / middle, 3)}


def ratio(seconds):
    """-> the last side's seconds over the first's, the median over the rounds"""
    first, *_, last = seconds.values()
    return round(statistics.median(b / a for a, b in zip(first, last)), 3)


def hub_copy(model, **settings):
    """The same weights as transformers loads them. settings: attn_implementation=, experts_implementation="""
    import transformers
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# comparisons


def train(rows=16, tokens=256, rounds=5, threads=2, dtypes='float32,bfloat16', models='dense,moe', only='', asked=False):
    """Forward, backward and fused AdamW on rows x tokens against transformers, fp32 and bf16 autocast."""
    torch.set_num_threads(threads)
    for kind in models.split(','):
        for dtype in dtypes.split(','):
            given = dict(models=kind, dtypes=dtype, rows=rows, tokens=tokens, threads=threads)
            if only:
                yield from alone(training_step(kind, dtype, only, rows, tokens), rounds, asked)
                continue
            best = fastest('train', [' '.join(s.values()) for s in settings(kind)], **given)
            said = in_turn('train', ['nanoR1', best], rounds, **given)
            for name, s in values(said, 'seconds').items():
                yield {'train': kind, 'dtype': dtype, 'side': name, **summary(s), 'tokens_per_second': round(rows * tokens / statistics.median(s)),
                       'loss': round(said[name][0]['result'], 4), 'peak_gib': said[name][-1]['peak_gib']}
            yield {'train': kind, 'dtype': dtype, 'ratio': ratio(values(said, 'seconds'))}


def settings(kind):
    """transformers' ways to attend and to compute experts; batched_mm gathers a copy of the weights for every token: 13 GB here, and never the fastest"""
    attention = [dict(attn_implementation=a) for a in ('sdpa', 'eager')]
    return attention if kind == 'dense' else [{**a, 'experts_implementation': e} for a in attention for e in ('grouped_mm', 'eager')]


def new_model(kind, side):
    """-> the same weights for every side; transformers' model if the side is one of its settings"""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**(DENSE if kind == 'dense' else MOE)))
    if side == 'nanoR1':
        cpu.keep_memory()      # as the scripts do
        return model
    return hub_copy(model, **next(s for s in settings(kind) if ' '.join(s.values()) == side))


def training_step(kind, dtype, side, rows, tokens):
    model = new_model(kind, side).train()
    ids = torch.randint(0, 2048, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels, optimizer = F.pad(ids[:, 1:], (0, 1), value=-100), torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def run():
        with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
            loss = -model.logprobs(ids, labels)[0].mean() if side == 'nanoR1' else model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return run


# ---- sampling beside transformers' generate


def machine_bound(model, tokens):
    """Seconds that the multiplications of decoding `tokens` would take at the rate of this machine's own products [256, C] x [C, 4C]"""
    C = model.cfg.hidden_size
    x, w = torch.randn(256, C), torch.randn(4 * C, C)
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(40):
            F.linear(x, w)
        rates.append(40 * 2 * x.numel() * 4 * C / (time.perf_counter() - began))
    return 2 * model.num_params(active=True) * tokens / max(rates)


def sample(prompts=32, samples=8, prompt=64, new=128, rounds=2, threads=2, models='moe,dense', lengths='uniform,ragged', only='', asked=False):
    """Useful tokens a second against transformers' generate, greedy and fp32, at the fastest of its settings for caches, attention and experts.
    ragged: each sample ends after 8 to `new` tokens, 42 on average; transformers goes on until the last has ended."""
    torch.set_num_threads(threads)
    for kind in models.split(','):
        best = ''
        for shape in lengths.split(','):
            draw = random.Random(0)
            limits = [[new if shape == 'uniform' else min(new, 8 + int(draw.expovariate(1 / 36))) for _ in range(samples)] for _ in range(prompts)]
            useful, given = sum(map(sum, limits)), dict(models=kind, prompts=prompts, samples=samples, prompt=prompt, threads=threads)
            if only:
                yield from alone(generation(kind, only, prompts, prompt, limits), rounds, asked)
                continue
            names = [f'{" ".join(s.values())}, {cache} cache' for s in settings(kind) for cache in ('dynamic', 'static')]
            best = best or fastest('sample', names, lengths='uniform', new=new // 8, **given)
            said = in_turn('sample', ['nanoR1', best], rounds, lengths=shape, new=new, **given)
            ours, theirs = (rows[0]['result'] for rows in said.values())      # the same tokens, or the comparison is of nothing
            yield {'sample': kind, 'lengths': shape, 'first_tokens_agree': sum(a == b for a, b in zip(ours, theirs)) / len(ours)}
            bound = machine_bound(new_model(kind, 'nanoR1'), useful)
            for name, s in values(said, 'seconds').items():
                yield {'sample': kind, 'lengths': shape, 'side': name, **summary(s), 'cpu_seconds': round(statistics.median(values(said, 'cpu_seconds')[name]), 2),
                       'useful_tokens_per_second': round(useful / statistics.median(s)), 'share_of_bound': round(bound / statistics.median(s), 3)}
            yield {'sample': kind, 'lengths': shape, 'ratio': ratio(values(said, 'seconds')), 'ratio_cpu': ratio(values(said, 'cpu_seconds'))}


def generation(kind, side, prompts, prompt, limits):
    """-> a function that generates limits[p][s] tokens for sample s of prompt p and returns the first four of each"""
    from sample import Sampler
    setting, _, cache = side.partition(', ')
    model, samples = new_model(kind, setting).eval(), len(limits[0])
    ids = torch.randint(0, 2048, (prompts, prompt), generator=torch.Generator().manual_seed(1))
    if side == 'nanoR1':
        def run():
            done = Sampler(model, slots=prompts * samples).generate(ids.tolist(), samples, limits, 0.0)
            return [c.tokens[:4] for group in done for c in group]
        return run
    import transformers
    class Ended(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return input_ids.shape[1] - prompt >= torch.tensor(limits).flatten()
    config = transformers.GenerationConfig(max_new_tokens=max(map(max, limits)), do_sample=False, use_cache=True, pad_token_id=0, disable_compile=True,
                                           cache_implementation='static' if cache == 'static cache' else None)
    rows = ids.repeat_interleave(samples, 0)

    @torch.no_grad()
    def run():
        done = model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=config, stopping_criteria=transformers.StoppingCriteriaList([Ended()]))
        return done[:, prompt:prompt + 4].tolist()
    return run


RANDOM = {  # shapes of released models, for speed without their weights
    'tiny': MOE,
    '1.5B': dict(model_type='qwen2', vocab_size=151936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                 head_dim=128, intermediate_size=8960, max_position_embeddings=4096, tie_word_embeddings=True),
    '16B-A3B': dict(model_type='deepseek_v3', vocab_size=163840, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None,
                    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=11264, first_k_dense_replace=1,
                    n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=1408, max_position_embeddings=4096),
}


def clock(run, device, times=1):
    """Seconds of run(), the mean of `times` after one that warms up"""
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
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
    a, b = torch.randn(size, size, dtype=kind, device=device), torch.randn(size, size, dtype=kind, device=device)
    big = torch.empty(size * size * 4, dtype=kind, device=device)
    return 2 * size**3 / clock(lambda: a @ b, device, 10), 2 * big.nbytes / clock(lambda: big.clone(), device, 10)


def random_model(name, device, kind):
    torch.manual_seed(0)
    torch.set_default_dtype(kind)
    try:
        with torch.device(device):
            return Transformer(ModelConfig(**RANDOM[name]))
    finally:
        torch.set_default_dtype(torch.float32)


def gpu_train(models='1.5B,16B-A3B', sides='triton,torch,fp8', rows=2, tokens=4096, steps=4):
    """Training steps of rows x tokens on a GPU (any device with models=tiny), random weights, the whole row one document. 1.5B as sft.py does it:
    float32 weights, bf16 autocast, AdamW. 16B-A3B: bf16 weights, forward and backward with recomputation; what AdamW needs besides fits no single GPU.
    mfu: 6 x active parameters a token over the data sheet's rate; of_measured: over that of a large product here. triton and torch must lose alike."""
    import gc
    from types import SimpleNamespace
    from train import peak_tflops
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and models != 'tiny':
        return
    rate, sheet = machine(device, torch.bfloat16)[0], 1e12 * peak_tflops(SimpleNamespace(peak_tflops=0), torch.device(device))
    for name in models.split(','):
        for side in sides.split(','):
            try:
                row = training_speed(name, side, device, rows, tokens, steps)
                flops = row['tokens_per_second'] * 6 * row['active']
                row.update(mfu=round(flops / sheet, 3) if sheet else None, of_measured=round(flops / rate, 3), measured_TFLOPs=round(rate / 1e12, 1))
            except Exception as error:
                row = {'failed': f'{type(error).__name__}: {error}'[:200]}
            yield {'gpu_train': name, 'side': side, **row}
            gc.collect()
            if device == 'cuda':
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def training_speed(name, side, device, rows, tokens, steps):
    import kernels
    from kernels import fp8
    kernels.use('torch' if side == 'torch' else 'auto')
    whole = name != '16B-A3B'
    model = random_model(name, device, torch.float32 if whole else torch.bfloat16)
    model.activation_checkpointing = not whole
    model = fp8.convert(model) if side == 'fp8' else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True) if whole else None
    ids, losses = torch.randint(0, model.cfg.vocab_size, (rows, tokens), device=device), []

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=whole):
            loss = -model.logprobs(ids, ids.roll(-1, 1))[0].mean()
        loss.backward()
        if optimizer:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    seconds = clock(step, device, steps)
    return {'active': model.num_params(active=True), 'milliseconds_a_step': round(seconds * 1e3, 1), 'tokens_per_second': round(rows * tokens / seconds),
            'losses': [round(losses[i].item(), 4) for i in (0, -1)], 'peak_gib': round(torch.cuda.max_memory_allocated() / 2**30, 1) if device == 'cuda' else None}


def decode(models='1.5B,16B-A3B', batches='8,64,256', group=8, prompt=512, new=256, dtype='bfloat16'):
    """Decoding on a GPU (any device with models=tiny): tokens a second and the share of the bound, a step's longest of reading weights and
    cache at the measured bandwidth and of its multiplications at the measured rate."""
    device, kind = 'cuda' if torch.cuda.is_available() else 'cpu', getattr(torch, dtype)
    if device == 'cpu' and models != 'tiny':
        return
    peak, bandwidth = machine(device, kind)
    for name in models.split(','):
        model = random_model(name, device, kind).eval()
        cfg = model.cfg
        moe = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, 'experts')]
        routed = sum(p.numel() for experts in moe for p in experts.parameters())
        rest = sum(p.numel() for p in model.parameters()) - routed - (0 if cfg.tie_word_embeddings else model.model.embed_tokens.weight.numel())
        for batch in map(int, batches.split(',')):
            try:
                step = decoding_step(model, batch, group, prompt, new, device)
            except Exception as error:
                yield {'decode': name, 'batch': batch, 'failed': f'{type(error).__name__}: {error}'[:200]}
                continue
            touched = rest + routed * (1 - (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** batch if moe else 0)
            cache = (max(1, batch // group) * prompt + batch * new * 3 / 4) * cfg.cache_width * cfg.num_hidden_layers
            bound = max((touched + cache) * kind.itemsize / bandwidth, 2 * model.num_params(active=True) * batch / peak)
            yield {'decode': name, 'batch': batch, 'tokens_per_second': round(batch / step), 'milliseconds_a_step': round(step * 1e3, 3),
                   'share_of_bound': round(bound / step, 3), 'bandwidth_GBps': round(bandwidth / 1e9), 'peak_TFLOPs': round(peak / 1e12, 1)}
        del model


def decoding_step(model, batch, group, prompt, new, device):
    """Seconds of a step: what the second half of `new` tokens takes"""
    from sample import Sampler
    prompts = torch.randint(0, model.cfg.vocab_size, (max(1, batch // group), prompt)).tolist()
    sampler = Sampler(model, slots=batch)
    run = lambda length: sampler.generate(prompts, min(group, batch), length, 1.0)  # noqa: E731
    return (clock(lambda: run(new), device) - clock(lambda: run(new // 2), device)) / (new - new // 2)


def gpu(seconds=530):
    """Everything that is measured on a GPU, each in a process of its own, so that none takes another's results with it."""
    if not torch.cuda.is_available():
        raise SystemExit('bench.py gpu: no GPU is visible')
    ends = time.time() + seconds
    for command, most in (
            (['tools/kernel_bench.py', f'--seconds={0.55 * seconds:.0f}'], seconds),
            (['tools/bench.py', 'gpu_train'], 0.23 * seconds),
            (['tools/bench.py', 'decode'], seconds)):
        began, left = time.time(), ends - time.time()
        try:
            code = subprocess.run([sys.executable, *command], cwd=ROOT,
                                  timeout=max(1, min(most, left))).returncode
        except subprocess.TimeoutExpired:
            code = 'cut off'
        yield {'gpu': ' '.join(command), 'exit': code, 'seconds': round(time.time() - began)}


# ---- RL and SFT steps beside TRL's trainers (the [bench] extra)


def dense_checkpoint(folder, size=2048):
    """A new dense model in `folder` with a tokenizer of `size` words "t0 t1 ..."; -> the tokenizer, and transformers' like it. The last word ends a text."""
    from tokenizers import Tokenizer as HubTokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast
    from data.tokenizer import Tokenizer
    ours = Tokenizer.from_words([f' t{i}' for i in range(size - 256 - 3)], special_tokens=['<|user|>', '<|assistant|>', '<|end|>'])
    torch.manual_seed(0)
    Transformer(ModelConfig(**DENSE, eos_token_id=ours.eos_id)).save_pretrained(folder)
    ours.save_pretrained(folder)
    theirs = HubTokenizer(WordLevel({f't{i}': i for i in range(size)}, unk_token='t0'))
    theirs.pre_tokenizer = WhitespaceSplit()
    return ours, PreTrainedTokenizerFast(tokenizer_object=theirs, eos_token=f't{ours.eos_id}', pad_token='t0')


def peak_gib():
    from train import peak_memory
    return round(peak_memory(torch.device('cpu')), 3)


def need_trl(only):
    import importlib.util
    if only != 'nanoR1' and importlib.util.find_spec('trl') is None:
        raise SystemExit("bench.py: trl is missing; pip install -e '.[bench]', or --only=nanoR1")


def trl_config(kind, folder, dtype, steps, rows, **given):
    return kind(output_dir=folder, max_steps=steps, per_device_train_batch_size=rows, gradient_accumulation_steps=1, learning_rate=1e-4, max_grad_norm=1.0,
                lr_scheduler_type='constant', optim='adamw_torch_fused', bf16=dtype == 'bfloat16', gradient_checkpointing=False, logging_strategy='no',
                save_strategy='no', report_to='none', use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, **given)


def step_seconds():
    """A callback for transformers' trainers that notes the seconds of each step, what prepares it included; the first is a warm-up."""
    from transformers import TrainerCallback
    class Clock(TrainerCallback):
        seconds, last = [], None
        def on_step_end(self, *args, **kwargs):
            now = time.perf_counter()
            self.seconds += [now - self.last] if self.last else []
            self.last = now
    clock = Clock()
    clock.seconds = []
    return clock


def grpo(prompts=8, group=8, prompt=32, new=64, steps=3, rounds=3, threads=2, dtypes='float32,bfloat16', only='', asked=False):
    """A GRPO step of 8 prompts x 8 completions, prompt 32, 64 new tokens, against TRL's GRPOTrainer at equal settings: no KL, one update, group
    advantages, token-level loss, a constant rate, AdamW. Both run as they are, `steps` steps a round in turn after one that warms up."""
    import grpo as script
    import rewards
    need_trl(only)
    torch.set_num_threads(threads)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, their_tokenizer = dense_checkpoint(folder)
        text = lambda: ''.join(f' t{rng.randrange(1000)}' for _ in range(prompt))  # noqa: E731
        overhead = len(tokenizer.apply_chat_template([{'role': 'user', 'content': text()}], add_generation_prompt=True)[0]) - prompt
        problems = [text() for _ in range(prompts * 8)]
        with open(f'{folder}/rl.jsonl', 'w') as f:  # the template's own tokens are part of the 32
            f.writelines(json.dumps({'prompt': ''.join(f' {word}' for word in p.split()[overhead:]), 'task': 'coin'}) + '\n' for p in problems)
        rewards.REWARDS['coin'] = rewards.ACCURACY['coin'] = lambda response, row: float(len(response) % 7)

        def ours(dtype):
            shutil.rmtree(f'{folder}/ours', ignore_errors=True)
            script.main(script.Config(out_dir=f'{folder}/ours', init_from=folder, data=[f'{folder}/rl.jsonl'], rewards={'coin': 1.0}, steps=steps + 1,
                                      prompts=prompts, group=group, max_new_tokens=new, learning_rate=1e-4, micro_tokens=10**6, slots=prompts * group,
                                      eval_every=0, save_every=0, dtype=dtype, threads=threads, device='cpu'))
            lines = [json.loads(line) for line in open(f'{folder}/ours/metrics.jsonl')]
            return [b['seconds'] - a['seconds'] for a, b in zip(lines, lines[1:])]

        def theirs(dtype):
            from datasets import Dataset
            from transformers import AutoModelForCausalLM
            from trl import GRPOConfig, GRPOTrainer
            model, clock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='sdpa'), step_seconds()
            config = trl_config(GRPOConfig, f'{folder}/trl', dtype, steps + 1, prompts * group, num_generations=group, max_completion_length=new,
                                beta=0.0, loss_type='dapo', temperature=1.0)
            data = Dataset.from_dict({'prompt': problems})
            GRPOTrainer(model, lambda completions, **_: [float(len(c) % 7) for c in completions], args=config, train_dataset=data,
                        processing_class=their_tokenizer, callbacks=[clock]).train()
            return clock.seconds
        yield from beside('grpo', {'nanoR1': ours, 'TRL': theirs}, dtypes, rounds, threads, only, asked, lambda side, seconds: {})


def sft(rows=16, row_len=256, steps=4, rounds=3, threads=2, dtypes='float32,bfloat16', only='', asked=False):
    """SFT of packed documents of 20 to 140 tokens, 16 x 256 tokens a step, loss on all tokens, against TRL's SFTTrainer with its default packing
    ('bfd', documents isolated) and with the one that cuts the stream of documents into rows ('wrapped', documents see each other). Tokens: real ones."""
    import sft as script
    need_trl(only)
    torch.set_num_threads(threads)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, their_tokenizer = dense_checkpoint(folder)
        texts = [[''.join(f' t{rng.randrange(1000)}' for _ in range(rng.randint(5, 40))), ''.join(f' t{rng.randrange(1000)}' for _ in range(rng.randint(15, 100)))]
                 for _ in range(2000)]
        messages = [[{'role': 'user', 'content': a}, {'role': 'assistant', 'content': b}] for a, b in texts]
        with open(f'{folder}/sft.jsonl', 'w') as f:
            f.writelines(json.dumps({'messages': m}) + '\n' for m in messages)
        documents = [tokenizer.apply_chat_template(m)[0] for m in messages]

        def ours(dtype):
            shutil.rmtree(f'{folder}/ours', ignore_errors=True)
            script.main(script.Config(out_dir=f'{folder}/ours', init_from=folder, data=[f'{folder}/sft.jsonl'], loss_on='all', row_len=row_len, batch_rows=rows,
                                      micro_rows=rows, steps=steps + 1, learning_rate=1e-4, schedule='constant', warmup_steps=1, log_every=1,
                                      save_every=0, dtype=dtype, threads=threads, device='cpu'))
            lines = [json.loads(line) for line in open(f'{folder}/ours/metrics.jsonl')]
            return [(b['seconds'] - a['seconds']) / (b['tokens'] - a['tokens']) for a, b in zip(lines, lines[1:])]

        def theirs(strategy):
            def run(dtype):
                from datasets import Dataset
                from transformers import AutoModelForCausalLM
                from trl import SFTConfig, SFTTrainer
                model, clock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='sdpa'), step_seconds()
                config = trl_config(SFTConfig, f'{folder}/trl', dtype, steps + 1, rows, packing=True, packing_strategy=strategy, max_length=row_len)
                trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_dict({'input_ids': documents}), processing_class=their_tokenizer,
                                     callbacks=[clock])
                fill = sum(map(len, trainer.train_dataset['input_ids'])) / len(trainer.train_dataset) / row_len
                trainer.train()
                return [s / (rows * row_len * fill) for s in clock.seconds]
            return run
        yield from beside('sft', {'nanoR1': ours, 'TRL bfd': theirs('bfd'), 'TRL wrapped': theirs('wrapped')}, dtypes, rounds, threads, only, asked,
                          lambda side, seconds: {'tokens_per_second': round(1 / seconds)})


def beside(name, sides, dtypes, rounds, threads, only, asked, more):
    """sides: {name: function of the dtype -> seconds of its steps} -> rows of each and the ratios"""
    for dtype in dtypes.split(','):
        if only:
            yield from alone(lambda: sides[only](dtype), rounds, asked)
            continue
        said = in_turn(name, sides, rounds, dtypes=dtype, threads=threads)
        seconds = {side: [s for row in rows for s in row['result']] for side, rows in said.items()}
        for side, s in seconds.items():
            yield {name: dtype, 'side': side, **summary(s), **more(side, statistics.median(s)), 'peak_gib': max(row['peak_gib'] for row in said[side])}
        for side in list(sides)[1:]:
            yield {name: dtype, 'against': side, 'ratio': ratio({'nanoR1': seconds['nanoR1'], side: seconds[side]})}


def log_prob_memory(N, V, C, chunk):
    """-> GiB that log-probs, entropy and their gradient take for N tokens, in a process of its own, less what it needs without them; chunk 0: the
    naive form, which holds all logits"""
    code = '''
import os, sys, torch
from kernels.linear_logprob import linear_logprob
from train import peak_memory
cpu = torch.device('cpu')
N, V, C, chunk = map(int, sys.argv[1:])
torch.set_num_threads(1)
h, w = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
y = torch.randint(0, V, (N,))
if os.path.exists('/proc/self/clear_refs'):     # the peak from here on
    open('/proc/self/clear_refs', 'w').write('5')
before = peak_memory(cpu)
if chunk:
    logp, H = linear_logprob(h, w, y, 1.0, True, chunk)
else:
    table = (h @ w.T).log_softmax(-1)
    logp, H = table.gather(1, y[:, None])[:, 0], -(table.detach().exp() * table.detach()).sum(-1)
(-logp).sum().backward()
print(peak_memory(cpu) - before)
'''
    command = [sys.executable, '-c', code, *map(str, (N, V, C, chunk))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True,
                                cwd=ROOT).stdout)


def logits_memory(tokens=2048, vocabulary=131072, width=64):
    """Peak memory of a GRPO update's log-probs, entropy and gradient, 8 x 256 tokens and a vocabulary of 128k, by the size of the chunk."""
    for N in (tokens // 2, tokens):
        for chunk in (32, 128, 512, 0):
            yield {'logits_memory': f'chunk {chunk}' if chunk else 'naive', 'tokens': N, 'vocabulary': vocabulary,
                   'gib': round(log_prob_memory(N, vocabulary, width, chunk), 3)}


# ---------------------------------------------------------------------------------------------------------------------

COMPARISONS = [train, sample, decode, gpu_train, grpo, sft, logits_memory]


def help_text(names):
    """The head of this file, and each comparison with its parameters and their defaults."""
    lines = []
    for name, function in names.items():
        defaults = {key: p.default for key, p in inspect.signature(function).parameters.items()}
        lines += [f'{name}: {" ".join((function.__doc__ or "").split())}',
                  '    ' + ' '.join(f'--{key}={value}' for key, value in defaults.items())]
    return '\n'.join([__doc__.strip(), '', *lines])


def main(argv):
    names = {f.__name__: f for f in [*COMPARISONS, gpu]}
    if '--help' in argv or '-h' in argv:
        return print(help_text(names))
    chosen = [a for a in argv if not a.startswith('-')] or [f.__name__ for f in COMPARISONS]
    for name in chosen:
        if name not in names:
            raise SystemExit(f'bench.py: no comparison {name!r}; there are {", ".join(names)}')
    parameters = {key for name in chosen for key in inspect.signature(names[name]).parameters}
    given = {}
    for flag in (a for a in argv if a.startswith('-')):
        key, equals, value = flag.removeprefix('--').partition('=')
        if not equals or key not in parameters:
            raise SystemExit(f'bench.py: {flag}: write --key=VALUE with one of the keys '
                             f'{", ".join(sorted(parameters))} (see --help)')
        given[key] = value
    gpu_name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = platform.processor() or platform.machine()
    print(json.dumps({'torch': torch.__version__, 'machine': machine, 'cores': os.cpu_count(),
                      'gpu': gpu_name}), flush=True)
    for name in chosen:
        known = {k: type(p.default) for k, p in inspect.signature(names[name]).parameters.items()}
        fitted = {}
        for key, value in given.items():
            try:
                fitted |= {key: from_text(value, known[key])} if key in known else {}
            except TypeError:
                raise SystemExit(f'bench.py: --{key} must be {known[key].__name__}, '
                                 f'not {value!r}') from None
        for row in names[name](**fitted):
            print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])
