"""
Comparisons with other code: the same weights, the same machine, turn about in one process, so that the ratio holds where seconds do not.

    python bench.py                       # every comparison
    python bench.py train --rounds=7      # one of them; its parameters as --key=value
    make bench

Each comparison is a function below that yields rows (dicts) as they are measured; `main` prints them as JSON lines. The other
side comes from the [test] extra (transformers) and runs at the fastest of its settings.
"""

import inspect
import json
import os
import platform
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

from configurator import from_text
from model import ModelConfig, Transformer

DENSE = dict(model_type='qwen3', vocab_size=2048, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
             head_dim=64, intermediate_size=1024, max_position_embeddings=512)
MOE = dict(model_type='deepseek_v3', vocab_size=2048, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, q_lora_rank=None,
           kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=1024, first_k_dense_replace=1,
           n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=256, max_position_embeddings=512)


def turn_about(sides, rounds):
    """sides: {name: function}. Each runs once to warm up, then `rounds` times in turn -> {name: list of seconds}"""
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(seconds):
    """-> median, and (max - min) / median as the spread"""
    middle = statistics.median(seconds)
    return {'seconds': round(middle, 4), 'spread': round((max(seconds) - min(seconds)) / middle, 3)}


def hub_copy(model, **settings):
    """The same weights as transformers loads them. settings: attn_implementation=, experts_implementation="""
    import transformers
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# comparisons


def train(rows=16, tokens=256, rounds=5, threads=2, dtypes='float32,bfloat16', models='dense,moe', only=''):
    """Forward, backward and fused AdamW on rows x tokens against transformers, fp32 and bf16 autocast. only: one side, to profile it."""
    torch.set_num_threads(threads)
    for kind in models.split(','):
        torch.manual_seed(0)
        ours = Transformer(ModelConfig(**(DENSE if kind == 'dense' else MOE)))
        ids = torch.randint(0, 2048, (rows, tokens))
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)
        settings = [dict(attn_implementation=a) for a in ('sdpa', 'eager')]
        if kind == 'moe':
            settings = [{**s, 'experts_implementation': e} for s in settings for e in ('grouped_mm', 'eager')]
            # batched_mm gathers a copy of the weights for every token: 13 GB here, and never the fastest
        for dtype in dtypes.split(','):
            def step(model, loss):
                optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
                def run():
                    with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
                        value = loss(model)
                    value.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                return run
            sides = {'nanoR1': step(ours, lambda m: -m.logprobs(ids, labels)[0].mean())}
            for setting in settings:
                sides[' '.join(setting.values())] = step(hub_copy(ours, **setting).train(), lambda m: m(ids, labels=ids, use_cache=False).loss)
            sides = {name: run for name, run in sides.items() if only in name}
            if len(sides) > 2:  # one round to find transformers' fastest, which alone is compared
                first = {name: run for name, run in turn_about(sides, 1).items() if name != 'nanoR1'}
                best = min(first, key=first.get)
                sides = {'nanoR1': sides['nanoR1'], best: sides[best]}
            seconds = turn_about(sides, rounds)
            middle = {name: statistics.median(s) for name, s in seconds.items()}
            for name, s in seconds.items():
                yield {'train': kind, 'dtype': dtype, 'side': name, **summary(s), 'tokens_per_second': round(rows * tokens / middle[name])}
            if 'nanoR1' in middle and len(middle) == 2:
                a, b = (middle[name] for name in sides)
                yield {'train': kind, 'dtype': dtype, 'ratio': round(b / a, 3)}


# ---------------------------------------------------------------------------------------------------------------------

COMPARISONS = [train]


def main(argv):
    names = {f.__name__: f for f in COMPARISONS}
    chosen = [a for a in argv if not a.startswith('-')] or list(names)
    given = dict(a.removeprefix('--').split('=', 1) for a in argv if a.startswith('-'))
    print(json.dumps({'torch': torch.__version__, 'machine': platform.processor() or platform.machine(), 'cores': os.cpu_count()}))
    for name in chosen:
        if name not in names:
            raise SystemExit(f'bench.py: no comparison {name!r}; there are {", ".join(names)}')
        known = {k: type(p.default) for k, p in inspect.signature(names[name]).parameters.items()}
        for row in names[name](**{k: from_text(v, known[k]) for k, v in given.items() if k in known}):
            print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])
