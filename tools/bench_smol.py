"""
A released language model beside transformers and TRL, at the lengths of `make smol`: sampling, SFT
and GRPO in ratios, and the learning curves of both GRPO trainers.

    python tools/bench.py smol --model=FOLDER           # sample, sft, grpo, one after the other
    python tools/bench.py smol sample --dtypes=bfloat16 --threads=1
    python tools/bench.py smol curves --start=out/smol/cold --data=out/smol/data/rl.jsonl \\
        --test=out/smol/data/test.jsonl --out=out/beside
    make bench WHAT="smol --model=FOLDER"

The model is a folder or a hub id whose tokenizer both sides read. As in bench.py each side is a
process of its own, and they run in turn. Needs the [bench] and [tokenizers] extras.
"""
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script from anywhere
from tools.bench import (alone, beside, coin, coins, fastest, in_turn, logged, need_trl, peak_gib,
                         ratio, run_chosen, step_seconds, summary, trl_config, values, write_rows)

import torch
import torch.nn.functional as F

import hub
import rewards
from data.source import read_rows
from data.tokenizer import Tokenizer
from evaluate import score
from kernels import cpu
from model import ModelConfig, Transformer
from rollout import problem_order
from sample import Completion, Sampler
from tools import metrics

SMOL = 'HuggingFaceTB/SmolLM2-135M-Instruct'
REWARDS = {'accuracy': 1.0, 'format': 0.2}


# ---- word problems ----

def chat(rng, steps):
    """-> messages: a word problem of so many steps, and its equations"""
    name = rng.choice(['Ann', 'Ben', 'Clara', 'David'])
    thing = rng.choice(['apples', 'marbles', 'stamps', 'balloons'])
    total = rng.randint(20, 99)
    problem = [f'{name} has {total} {thing}.']
    equations = []
    for _ in range(steps):
        number = rng.randint(2, 19)
        before = total
        if rng.random() < 0.5:
            total += number
            problem.append(f'A friend brings {number} more {thing} in a bag.')
            equations.append(f'{before} + {number} = {total}')
        else:
            total *= number
            problem.append(f'Then everybody in a club of {number} gives {name} as many {thing}.')
            equations.append(f'{before} * {number} = {total}')
    problem.append(f'How many {thing} does {name} have in the end?')
    answer = f'<think>{"; ".join(equations)}</think><answer>{total}</answer>'
    return [{'role': 'user', 'content': ' '.join(problem)},
            {'role': 'assistant', 'content': answer}]


def chats(count):
    rng = random.Random(0)
    return [chat(rng, rng.randint(1, 4)) for _ in range(count)]


def prompts_of(folder, count):
    """-> token ids of so many problems"""
    tokenizer = Tokenizer.from_pretrained(folder)
    return [tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)[0]
            for messages in chats(count)]


def load(folder, side, dtype):
    """-> the model for a side, with weights in dtype: ours, or transformers' with the attention
    that the side is called after"""
    dtype = getattr(torch, dtype)
    if side == 'nanoR1':
        cpu.keep_memory()      # as the scripts do
        return Transformer.from_pretrained(folder, dtype=dtype).eval()
    from transformers import AutoModelForCausalLM
    attention = side.split()[0]
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention).eval()


# ---- sampling beside transformers' generate ----

SETTINGS = [f'{attention} {cache}' for attention in ('sdpa', 'eager')
            for cache in ('dynamic', 'static')]


def sample(
    model=SMOL, shapes='16x8,128x1', new=96, rounds=3, threads=2, dtypes='float32,bfloat16',
    only='', asked=False,
):
    """
    `new` tokens at T = 1 for prompts x samples rows, against transformers' generate at the fastest
    of its settings for attention and cache; the weights are of the dtype on both sides.
    share_of_bound: of the seconds that the products alone take at the rate of each measured here.
    """
    torch.set_num_threads(threads)
    folder = hub.local_folder(model)
    for dtype in dtypes.split(','):
        best = ''
        for shape in shapes.split(','):
            prompts, n = map(int, shape.split('x'))
            if only:
                yield from alone(generation(folder, only, dtype, prompts, n, new), rounds, asked)
                continue
            given = dict(script=__file__, model=folder, shapes=shape, dtypes=dtype, threads=threads)
            if not best:
                best = fastest('sample', SETTINGS, new=max(2, new // 8), **given)
            answers = in_turn('sample', ['nanoR1', best], rounds, new=new, **given)
            yield from sampling_rows(folder, dtype, shape, prompts * n, new, answers)


def sampling_rows(folder, dtype, shape, rows, new, answers):
    head = {'sample': shape, 'dtype': dtype}
    ours, theirs = (rows[0]['result'] for rows in answers.values())
    agree = sum(a == b for a, b in zip(ours, theirs)) / len(ours)
    yield {**head, 'greedy_tokens_agree': agree}

    bound = new * product_seconds(ModelConfig.read(folder / 'config.json'), rows, dtype)
    cpu_seconds = values(answers, 'cpu_seconds')
    for name, seconds in values(answers, 'seconds').items():
        middle = statistics.median(seconds)
        yield {
            **head, 'side': name, **summary(seconds),
            'cpu_seconds': round(statistics.median(cpu_seconds[name]), 2),
            'tokens_per_second': round(rows * new / middle),
            'share_of_bound': round(bound / middle, 3),
            'peak_gib': answers[name][-1]['peak_gib'],
        }
    yield {**head, 'ratio': ratio(values(answers, 'seconds')), 'ratio_cpu': ratio(cpu_seconds)}


def product_seconds(cfg, rows, dtype):
    """Seconds that all matrix products of a decoding step of so many rows take, each by the fastest
    way that this machine has for it: from weights as they lie, or in oneDNN's order"""
    C, I, V = cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size
    heads = cfg.num_attention_heads * cfg.head_dim
    both = 2 * cfg.num_key_value_heads * cfg.head_dim
    layer = [(heads + both, C), (C, heads), (I, C), (I, C), (C, I)]
    cost = {shape: fastest_product(rows, *shape, dtype) for shape in {*layer, (V, C)}}
    return cfg.num_hidden_layers * sum(cost[shape] for shape in layer) + cost[V, C]


def fastest_product(rows, width, inner, dtype, tries=20):
    x = torch.randn(rows, inner).to(getattr(torch, dtype))
    w = torch.randn(width, inner).to(x.dtype)
    ways = [lambda: F.linear(x, w)]
    if cpu.HAS_ONEDNN:
        ordered = torch.ops.mkldnn._reorder_linear_weight(w, rows)
        pointwise = torch.ops.mkldnn._linear_pointwise
        ways.append(lambda: pointwise(x, ordered, None, 'none', [], ''))
    least = float('inf')
    for way in ways:
        way()
        for _ in range(tries):
            began = time.perf_counter()
            way()
            least = min(least, time.perf_counter() - began)
    return least


def generation(folder, side, dtype, prompts, n, new):
    """-> a function that samples, and returns what the first tokens are when they are not drawn:
    the most probable ones, four for each prompt"""
    model = load(folder, side, dtype)
    ids = prompts_of(folder, prompts)
    if side != 'nanoR1':
        return hub_generation(model, ids, n, new, side.split()[1])

    sampler = Sampler(model, slots=prompts * n)     # without stop tokens: every row has `new`
    likely = [samples[0].tokens for samples in sampler.generate(ids, 1, 4, 0.0)]

    def run():
        sampler.generate(ids, n, new, 1.0, seed=1)
        return likely

    return run


def hub_generation(model, prompts, n, new, cache):
    """As generation, by transformers, which wants the prompts left-padded"""
    import transformers
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    model.config.eos_token_id = None
    model.generation_config = transformers.GenerationConfig()

    @torch.no_grad()
    def tokens(n, **how):
        config = transformers.GenerationConfig(
            use_cache=True, pad_token_id=0, disable_compile=True,
            cache_implementation='static' if cache == 'static' else None, **how)
        rows = ids.repeat_interleave(n, 0)
        done = model.generate(
            rows, attention_mask=seen.repeat_interleave(n, 0), generation_config=config)
        return done[:, longest:]

    likely = tokens(1, max_new_tokens=4, do_sample=False).tolist()

    def run():
        done = tokens(n, max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        assert done.shape[1] == new
        return likely

    return run


# ---- SFT and GRPO beside TRL ----

def their_model_and_tokenizer(folder):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return load(folder, 'sdpa', 'float32').train(), tokenizer


def sft(
    model=SMOL, row_len=256, rows=16, micro_rows=8, steps=2, rounds=2, threads=2,
    dtypes='float32,bfloat16', only='', asked=False,
):
    """
    SFT on word problems with their equations, loss on the answers, rows x row_len tokens a step, in
    micro-batches of micro_rows. TRL packs ('bfd', documents isolated) or pads each document; that
    has no documents to isolate. Tokens: real ones. peak_gib: of the process, over all rounds.
    """
    import sft as script
    given = dict(model=model, row_len=row_len, rows=rows, micro_rows=micro_rows, steps=steps)
    need_trl(only)
    torch.set_num_threads(threads)
    source = hub.local_folder(model)
    tokenizer = Tokenizer.from_pretrained(source)
    conversations = chats(3000)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(f'{folder}/sft.jsonl', [{'messages': each} for each in conversations])
        documents = [tokenizer.apply_chat_template(messages) for messages in conversations]
        mean = statistics.mean(len(ids) for ids, _ in documents)

        def ours(dtype):
            out = f'{folder}/ours'
            shutil.rmtree(out, ignore_errors=True)
            script.main(script.Config(
                out_dir=out, init_from=str(source), data=[f'{folder}/sft.jsonl'], row_len=row_len,
                batch_rows=rows, micro_rows=micro_rows, steps=steps + 1, learning_rate=1e-5,
                schedule='constant', warmup_steps=1, log_every=1, save_every=0, dtype=dtype,
                threads=threads, device='cpu'))
            return [(after['seconds'] - before['seconds']) / (after['tokens'] - before['tokens'])
                    for before, after in logged(out)]

        def theirs(dtype, packing):
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer
            timer = step_seconds()
            per_device = micro_rows if packing else round(micro_rows * row_len / mean)
            config = trl_config(
                SFTConfig, f'{folder}/trl', dtype, steps + 1, per_device, rows // micro_rows,
                packing=packing, packing_strategy='bfd', max_length=row_len)
            network, their_tokenizer = their_model_and_tokenizer(source)
            table = {
                'input_ids': [ids for ids, _ in documents],
                'labels': [[i if learnt else -100 for i, learnt in zip(ids, mask)]
                           for ids, mask in documents],
            }
            trainer = SFTTrainer(
                network, args=config, train_dataset=Dataset.from_dict(table),
                processing_class=their_tokenizer, callbacks=[timer])
            lengths = [len(ids) for ids in trainer.train_dataset['input_ids']]
            trainer.train()
            tokens = per_device * (rows // micro_rows) * statistics.mean(lengths)
            return [seconds / tokens for seconds in timer.seconds]

        sides = {
            'nanoR1': ours,
            'TRL packed': lambda dtype: theirs(dtype, True),
            'TRL padded': lambda dtype: theirs(dtype, False),
        }
        yield from beside('sft', sides, dtypes, rounds, threads, only, asked, per_token=True,
                          script=__file__, **given)


def grpo(
    model=SMOL, prompts=16, group=8, new=64, micro_tokens=4096, micro_rows=16, steps=2, rounds=2,
    threads=2, dtypes='float32,bfloat16', only='', asked=False,
):
    """
    A GRPO step per sampled token, `new` tokens a completion at most, against TRL's GRPOTrainer at
    equal settings: no KL, one update, group advantages, token-level loss. micro_tokens are ours,
    micro_rows TRL's; the reward costs nothing and gives every group an advantage.
    """
    import grpo as script
    given = dict(model=model, prompts=prompts, group=group, new=new, micro_tokens=micro_tokens,
                 micro_rows=micro_rows, steps=steps)
    need_trl(only)
    torch.set_num_threads(threads)
    rewards.REWARDS['coin'] = coin
    rewards.ACCURACY['coin'] = coin
    source = hub.local_folder(model)
    problems = [messages[:1] for messages in chats(prompts * (steps + 2))]
    rows = prompts * group
    with tempfile.TemporaryDirectory() as folder:
        write_rows(f'{folder}/rl.jsonl', [{'prompt': each, 'task': 'coin'} for each in problems])

        def ours(dtype):
            out = f'{folder}/ours'
            shutil.rmtree(out, ignore_errors=True)
            script.main(script.Config(
                out_dir=out, init_from=str(source), data=[f'{folder}/rl.jsonl'],
                rewards={'coin': 1.0}, steps=steps + 1, prompts=prompts, group=group,
                max_new_tokens=new, learning_rate=1e-6, micro_tokens=micro_tokens, slots=rows,
                eval_every=0, save_every=0, dtype=dtype, threads=threads, device='cpu'))
            return [(after['seconds'] - before['seconds']) / (rows * after['length'])
                    for before, after in logged(out)]

        def theirs(dtype):
            from datasets import Dataset
            from trl import GRPOConfig, GRPOTrainer
            sampled = []

            def reward(completions, completion_ids, **_):
                sampled.append(sum(map(len, completion_ids)))
                return coins([completion[0]['content'] for completion in completions])

            timer = step_seconds()
            config = trl_config(
                GRPOConfig, f'{folder}/trl', dtype, steps + 1, micro_rows, rows // micro_rows,
                num_generations=group, max_completion_length=new, beta=0.0, loss_type='dapo',
                temperature=1.0, top_k=0)
            network, their_tokenizer = their_model_and_tokenizer(source)
            GRPOTrainer(
                network, reward, args=config, train_dataset=Dataset.from_dict({'prompt': problems}),
                processing_class=their_tokenizer, callbacks=[timer]).train()
            return [seconds / tokens for seconds, tokens in zip(timer.seconds, sampled[1:])]

        sides = {'nanoR1': ours, 'TRL': theirs}
        yield from beside('grpo', sides, dtypes, rounds, threads, only, asked, per_token=True,
                          script=__file__, **given)


# ---- learning curves ----

def curves(
    start='out/smol/cold', data='out/smol/data/rl.jsonl', test='out/smol/data/test.jsonl',
    out='out/beside', steps=48, prompts=16, group=8, new=96, learning_rate=1e-5, micro_tokens=4096,
    micro_rows=16, save_every=4, seed=1, limit=300, samples=4, dtype='float32', threads=2, only='',
):
    """
    GRPO from `start` by grpo.py and by TRL's GRPOTrainer: the same prompts in the same order,
    rewards, lengths, group, rate, AdamW and clipping, no KL; then evaluate.py on the start and both
    ends, the paired difference, and both curves in OUT/curves.png. Logs to OUT/SIDE/metrics.jsonl
    at every step. Run again it goes on where it was; --only=nanoR1, TRL or evaluate runs a part.
    """
    need_trl(only)
    torch.set_num_threads(threads)
    settings = dict(locals())
    parts = {'nanoR1': our_curve, 'TRL': their_curve, 'evaluate': evaluations}
    for name in [only] if only else parts:
        if only or name == 'evaluate':
            parts[name](settings)
            continue
        flags = [f'--{key}={value}' for key, value in settings.items() if key != 'only']
        command = [sys.executable, __file__, 'curves', *flags, f'--only={name}']
        subprocess.run(command, check=True)     # in a process of its own
    if not only or only == 'evaluate':
        yield from compared(settings)


def run_script(name, **settings):
    flags = [f'--{key}={value}' for key, value in settings.items()]
    subprocess.run([sys.executable, str(ROOT / name), *flags], cwd=ROOT, check=True)


def absolute(path):
    return str(Path(path).resolve())


def our_curve(s):
    out = Path(absolute(s['out'])) / 'nanoR1'
    if (out / 'config.json').exists():
        return
    run_script(
        'grpo.py', out_dir=out, init_from=absolute(s['start']), data=[absolute(s['data'])],
        rewards=REWARDS, schedule='constant', warmup_steps=0, eval_every=0, samples_every=10,
        save_dtype='float32', max_new_tokens=s['new'], slots=s['prompts'] * s['group'],
        **{key: s[key] for key in ('steps', 'prompts', 'group', 'learning_rate', 'micro_tokens',
                                   'save_every', 'seed', 'dtype', 'threads')})


def problems_in_order(data, seed, count):
    """-> the rows that grpo.py takes, in its order"""
    rows = read_rows(data, require=('prompt', 'task'))
    order = problem_order([len(rows)], seed)
    return [rows[number] for _, number in islice(order, count)]


def their_curve(s):
    from datasets import Dataset
    from transformers.trainer_utils import get_last_checkpoint
    from trl import GRPOConfig, GRPOTrainer
    out = Path(absolute(s['out'])) / 'TRL'
    if (out / 'config.json').exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    problems = problems_in_order(s['data'], s['seed'], s['steps'] * s['prompts'])
    tokenizer = Tokenizer.from_pretrained(s['start'])
    network, their_tokenizer = their_model_and_tokenizer(s['start'])
    same_prompt(tokenizer, their_tokenizer, problems[0]['prompt'])

    log = StepLog(out / 'metrics.jsonl')
    rows = s['prompts'] * s['group']
    config = trl_config(
        GRPOConfig, str(out / 'steps'), s['dtype'], s['steps'], s['micro_rows'],
        rows // s['micro_rows'], learning_rate=s['learning_rate'], adam_beta1=0.9, adam_beta2=0.95,
        weight_decay=0.0, num_generations=s['group'], max_completion_length=s['new'], beta=0.0,
        epsilon=0.2, num_iterations=1, scale_rewards='group', loss_type='dapo', temperature=1.0,
        top_k=0, shuffle_dataset=False, seed=s['seed'], save_strategy='steps',
        save_steps=s['save_every'], save_total_limit=1)
    table = {'prompt': [row['prompt'] for row in problems],
             'row': [json.dumps(row) for row in problems]}
    trainer = GRPOTrainer(
        network, graded(tokenizer, s['group'], s['new'], log), args=config,
        train_dataset=Dataset.from_dict(table), processing_class=their_tokenizer,
        callbacks=[log.callback()])
    last = get_last_checkpoint(config.output_dir) if Path(config.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=last)

    for name in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json'):
        if (Path(s['start']) / name).exists():
            shutil.copy(Path(s['start']) / name, out)
    network.save_pretrained(out)


def same_prompt(tokenizer, theirs, prompt):
    ours, *_ = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    text = theirs.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    if ours != theirs(text, add_special_tokens=False)['input_ids']:
        raise SystemExit('bench.py: both sides make other tokens of a prompt')


def graded(tokenizer, group, new, log):
    """-> a reward function of TRL that scores as grpo.py does, and tells the log"""
    def total(prompts, completions, completion_ids, row, **_):
        rows = [{'max_length': new, **json.loads(text)} for text in row[::group]]
        done = [Completion(ids, [], ids[-1] in tokenizer.stop_ids) for ids in completion_ids]
        groups = [done[i:i + group] for i in range(0, len(done), group)]
        scored = sum(score(tokenizer, rows, groups, REWARDS), [])
        log.rollout(scored)
        return [each['total'] for each in scored]

    return total


class StepLog:
    """metrics.jsonl of TRL's side, with the names of grpo.py's"""

    def __init__(self, path):
        self.path = path
        self.numbers = {}

    def rollout(self, scored):
        self.numbers = {
            'reward': statistics.mean(each['total'] for each in scored),
            'right': statistics.mean(bool(rewards.right(each)) for each in scored),
            'length': statistics.mean(each['length'] for each in scored),
            'truncated': statistics.mean(not each['finished'] for each in scored),
        }

    def begin(self, step):
        """Forgets what was logged after the checkpoint that it goes on from."""
        lines = metrics.read_metrics(self.path.parent) if self.path.exists() else []
        lines = [line for line in lines if line['step'] <= step]
        write_rows(self.path, lines)
        self.seconds = lines[-1]['seconds'] if lines else 0.0

    def end_step(self, step, seconds):
        self.seconds += seconds
        line = {'step': step, **self.numbers, 'seconds': self.seconds, 'memory_gib': peak_gib()}
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')
        print(json.dumps(line), flush=True)

    def callback(self):
        from transformers import TrainerCallback
        log = self

        class OfSteps(TrainerCallback):
            def on_train_begin(self, args, state, control, **_):
                log.begin(state.global_step)

            def on_step_begin(self, args, state, control, **_):
                self.began = time.perf_counter()

            def on_step_end(self, args, state, control, **_):
                log.end_step(state.global_step, time.perf_counter() - self.began)

        return OfSteps()


def evaluations(s):
    """Of the start and both ends, each once"""
    out = Path(absolute(s['out']))
    for name, folder in (('start', s['start']), ('nanoR1', out / 'nanoR1'), ('TRL', out / 'TRL')):
        if (out / f'{name}.json').exists():
            continue
        run_script(
            'evaluate.py', checkpoint=absolute(folder), data=[absolute(s['test'])],
            limit=s['limit'], n=s['samples'], greedy=False, temperature=1.0,
            max_new_tokens=s['new'], seed=1234, slots=128, rewards=REWARDS, dtype=s['dtype'],
            threads=s['threads'], out=out / f'{name}.jsonl', summary=out / f'{name}.json')


def compared(s):
    """-> rows: the accuracy of each, gains on the start and the difference of both ends, paired by
    problem, and the seconds; both curves go to a picture"""
    out = Path(absolute(s['out']))
    right = {name: right_by_problem(out / f'{name}.jsonl') for name in ('start', 'nanoR1', 'TRL')}
    for name, shares in right.items():
        yield {'curves': name, 'accuracy': round(statistics.mean(shares), 4)}
    for a, b in (('nanoR1', 'start'), ('TRL', 'start'), ('nanoR1', 'TRL')):
        yield {'curves': f'{a} - {b}', **paired(right[a], right[b])}

    runs = {name: metrics.read_metrics(out / name) for name in ('nanoR1', 'TRL')}
    for name, lines in runs.items():
        tokens = sum(line['length'] for line in lines) * s['prompts'] * s['group']
        yield {
            'curves': name, 'steps': len(lines),
            'seconds_a_step': round(lines[-1]['seconds'] / len(lines), 1),
            'sampled_tokens_per_second': round(tokens / lines[-1]['seconds']),
            'peak_gib': round(max(line['memory_gib'] for line in lines), 2),
        }
    metrics.draw(runs, ['right', 'reward', 'length'], 5, out / 'curves.png')


def right_by_problem(path):
    """-> of each problem the share of right samples"""
    return [statistics.mean(bool(rewards.right(each)) for each in row['samples'])
            for row in read_rows(path, require=('samples',))]


def paired(a, b):
    """-> mean of a - b over problems, and its 95% interval"""
    differences = [x - y for x, y in zip(a, b)]
    mean = statistics.mean(differences)
    half = 1.96 * statistics.stdev(differences) / len(differences) ** 0.5
    return {'difference': round(mean, 4), 'ci': [round(mean - half, 4), round(mean + half, 4)]}


if __name__ == '__main__':
    run_chosen(sys.argv[1:], [sample, sft, grpo], [curves], __doc__)
