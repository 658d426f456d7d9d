"""
Countdown, the toy of `make r1`: three numbers and a target, reach it with + - *, each number used once, in any order.

    python data/countdown/prepare.py --out_dir=out/r1/data

writes corpus.jsonl (the base model's), rl.jsonl (problems for RL), distill.jsonl (the corpus's problems, for the teacher),
test.jsonl (held out), the same for the second task, and tokenizer/.

A trace tries the pairs of numbers in the order given: each pair is multiplied, added and subtracted (larger minus smaller), and
the result meets the third number in the same three ways. " 3 plus 7 is 10 with 4 : 40 14 6 yes" reads: 3+7 = 10, and with 4 that
makes 40, 14, 6; the last one is the target. Numbers are single tokens and stop at 50; what is larger is written "big". The target is a
token of another kind (" =6"), so that seeing whether a value is the target takes one look and cannot be confused with earlier values.

The corpus of the base model is a mixture, by rows (the shares are settings below):
    guess   "guess": one random expression, right about one time in ten
    quick   "quick": searches one or two lines, gives up and guesses
    search  "search": the full search, always right; but for one in ten the target cannot be reached, and it ends in a guess
in two notations, English words and Chinese characters; some rows change between them line by line (so that language mixing
exists to be cured), some rows break the format (so that a format reward has something to teach), and a few are about a
second plain task, sorting three numbers. Nobody labels the rows: a model learns all of it and samples all of it.

Problems are told apart by (sorted numbers, target): corpus, RL prompts and test set share none, and every file is a function of
`seed` alone.

For real models, three to six numbers, + - * / and a prompt in plain English; only rl.jsonl and test.jsonl, a manifest beside each:

    python data/countdown/prepare.py --max_numbers=6 --max_number=99 --out_dir=data/countdown
    python data/countdown/prepare.py --source=problems.jsonl    # rows with "nums" (or "numbers") and "target", into rl.jsonl

{"prompt": [user], "task": "countdown", "numbers": [36, 7, 19, 55], "target": 65, "solution": "...", ...}. The numbers are put
together two at a time, in random order and always to whole numbers above 0, so every target has a solution, which the row keeps.
Problems of a source are solved by trying all such ways; the rest is left out and counted.
"""

import itertools
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script from anywhere
from configurator import run  # noqa: E402
from data import source  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402


@dataclass
class Config:
    out_dir: str = 'data/countdown'  # where the files go
    seed: int = 1                    # everything below is drawn from it
    corpus_rows: int = 80000         # rows of corpus.jsonl
    rl_rows: int = 512               # problems of rl.jsonl
    orders: int = 3                  # orders of its numbers in which a problem of rl.jsonl and distill.jsonl appears
    test_rows: int = 512             # problems of test.jsonl
    pair_rows: int = 3000            # problems of sort_pairs.jsonl, whose samples become the reward model's pairs
    max_number: int = 10             # numbers are drawn from 1 to this
    guess: float = 0.68              # share of countdown rows that guess at once
    quick: float = 0.06              # share that search a little, give up and guess
    search: float = 0.26             # share that search fully
    hopeless: float = 0.1            # share of the full searches whose target cannot be reached: they end in a guess
    chinese: float = 0.25            # share of rows wholly in the second notation
    mixed: float = 0.25              # share of rows that change notation between lines
    broken: float = 0.04             # share of rows that break the format
    sort: float = 0.04               # share of rows about the second task
    min_numbers: int = 3             # numbers of a problem, from min_numbers
    max_numbers: int = 3             # to max_numbers; anything but 3 to 3 is for real models, see above, and the shares do not count
    max_target: int = 100            # largest target then
    source: str | None = None        # file or folder with published problems, to be solved instead of making new ones

    def __post_init__(self):
        if not 3 <= self.min_numbers <= self.max_numbers <= 6:
            raise ValueError(f'min_numbers={self.min_numbers} and max_numbers={self.max_numbers} must rise and lie in 3 to 6')


LARGEST = 50
PAIRS = ((0, 1, 2), (0, 2, 1), (1, 2, 0))  # which two numbers meet first, and the one left
OPS = ('*', '+', '-')  # products first: their values are the rarest, and a search that ends early never sees what comes last
WORDS = {
    'en': {'+': 'plus', '-': 'minus', '*': 'times', 'is': 'is', 'with': 'with', 'yes': 'yes', 'big': 'big',
           'guess': 'guess', 'quick': 'quick', 'search': 'search', 'stop': 'enough', 'sort': 'order'},
    'zh': {'+': '加', '-': '减', '*': '乘', 'is': '得', 'with': '和', 'yes': '对', 'big': '大',
           'guess': '猜', 'quick': '略', 'search': '找', 'stop': '罢', 'sort': '排'},
}


def combine(a, b, op):
    """-> (value, larger first, smaller second); subtraction is of the smaller from the larger"""
    a, b = (b, a) if op == '-' and b > a else (a, b)
    return {'+': a + b, '-': a - b, '*': a * b}[op], a, b


def lines(numbers):
    """The full search, lazily: (a, op, b, value, third number, [(value2, expression) x 3]) in the order it is tried."""
    for (i, j, k), op in itertools.product(PAIRS, OPS):
        value, a, b = combine(numbers[i], numbers[j], op)
        c, ends = numbers[k], []
        for op2 in OPS if value <= LARGEST else ():
            value2, first, _ = combine(value, c, op2)
            inner = f'( {a} {op} {b} )'
            ends.append((value2, f'{inner} {op2} {c}' if first == value else f'{c} {op2} {inner}'))
        yield a, op, b, value, c, ends


def reachable(numbers):
    return {value2 for line in lines(numbers) for value2, _ in line[-1] if 1 <= value2 <= LARGEST}


def problems(max_number):
    """Every (sorted numbers, target) that the search can solve."""
    return [(numbers, target) for numbers in itertools.combinations_with_replacement(range(1, max_number + 1), 3)
            for target in sorted(reachable(numbers))]


def trace(rng, numbers, target, mode, notation):
    """-> (reasoning, expression) of one trace; notation 'en', 'zh' or 'mixed'"""
    pick = lambda: WORDS[rng.choice(('en', 'zh')) if notation == 'mixed' else notation]  # noqa: E731
    show = lambda value, w: w['big'] if value > LARGEST else str(value)  # noqa: E731
    everything = list(lines(numbers))
    text, stop = ' ' + pick()[mode], {'guess': 0, 'quick': rng.randint(1, 2), 'search': len(everything)}[mode]
    for a, op, b, value, c, ends in everything[:stop]:
        w = pick()
        text += f' {a} {w[op]} {b} {w["is"]} {show(value, w)}'
        if ends:
            text += f' {w["with"]} {c} :'
        for value2, expression in ends:
            text += ' ' + show(value2, w)
            if value2 == target:
                return f'{text} {w["yes"]}', expression
        text += ' ,'
    _, expression = rng.choice([end for line in everything for end in line[-1]])
    return text + (' ' + pick()['stop'] if mode != 'guess' else ''), expression


def prompt_text(numbers, target):
    return f' {numbers[0]} {numbers[1]} {numbers[2]} make ={target}'


def respond(rng, reasoning, answer, broken):
    """-> the assistant's text; a broken one leaves out a tag or adds something after the answer"""
    parts = ['<think>', reasoning, '</think>', '<answer>', f' {answer}', '</answer>']
    if broken:
        flaw = rng.randrange(3)
        parts = parts[:2] + parts[3:] if flaw == 0 else parts[:3] + [parts[4]] if flaw == 1 else parts + [f' {answer}']
    return ''.join(parts)


def corpus_row(rng, cfg, by_target):
    notation = rng.choices(('zh', 'mixed', 'en'), (cfg.chinese, cfg.mixed, 1 - cfg.chinese - cfg.mixed))[0]
    broken = rng.random() < cfg.broken
    if rng.random() < cfg.sort:
        row = sort_problem(rng)
        reasoning, answer, mode = ' ' + WORDS['zh' if notation == 'zh' else 'en']['sort'], row['answer'], 'sort'
        user = row['prompt'][0]['content']
    else:
        numbers, target = rng.choice(by_target[rng.choice(list(by_target))])
        numbers = rng.sample(numbers, 3)
        mode = rng.choices(('guess', 'quick', 'search'), (cfg.guess, cfg.quick, cfg.search))[0]
        hopeless = mode == 'search' and rng.random() < cfg.hopeless
        if hopeless:
            target = rng.choice(sorted(set(range(1, LARGEST + 1)) - reachable(numbers)))
        reasoning, answer = trace(rng, numbers, target, mode, notation)
        mode = 'hopeless' if hopeless else mode
        user = prompt_text(numbers, target)
    return {'messages': [{'role': 'user', 'content': user}, {'role': 'assistant', 'content': respond(rng, reasoning, answer, broken)}],
            'mode': mode, 'notation': notation, 'broken': broken}


def rl_problem(rng, numbers, target):
    numbers = rng.sample(numbers, 3)
    return {'prompt': [{'role': 'user', 'content': prompt_text(numbers, target)}], 'task': 'countdown', 'language': 'en',
            'numbers': numbers, 'target': target}


def sort_problem(rng):
    """The second kind of task: put three different numbers in order."""
    numbers = rng.sample(range(1, LARGEST + 1), 3)
    return {'prompt': [{'role': 'user', 'content': ' sort' + ''.join(f' {n}' for n in numbers)}], 'task': 'match', 'language': 'en',
            'answer': ' '.join(map(str, sorted(numbers)))}


def sort_answered(rng):
    row = sort_problem(rng)
    text = respond(rng, ' ' + WORDS['en']['sort'], row['answer'], broken=False)
    return {'messages': [*row['prompt'], {'role': 'assistant', 'content': text}], 'task': row['task']}


def toy_tokenizer():
    words = [f' {n}' for n in range(LARGEST + 1)] + [f' ={n}' for n in range(1, LARGEST + 1)]
    words += [f' {w}' for w in dict.fromkeys(w for notation in WORDS.values() for w in notation.values())]
    words += [' make', ' sort', ' :', ' ,', ' (', ' )', ' +', ' -', ' *', '<think>', '</think>', '<answer>', '</answer>']
    return Tokenizer.from_words(words, special_tokens=['<|user|>', '<|assistant|>', '<|end|>'])


def write_rows(path, rows):
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# three to six numbers, for real models


def joined(a, b):
    """[(value, operator, swapped)] of what two whole numbers above 0 can make: whole numbers above 0, b before a if swapped."""
    low, high = min(a, b), max(a, b)
    return [(a + b, '+', False), (a * b, '*', False), *([(high - low, '-', a < b)] if low < high else []),
            *([(high // low, '/', a < b)] if high % low == 0 else [])]


def written(x, op, y, swapped):
    return f'({y} {op} {x})' if swapped else f'({x} {op} {y})'


def random_problem(rng, cfg):
    """-> (numbers, target, an expression that reaches it)"""
    how_many = rng.randint(cfg.min_numbers, cfg.max_numbers)   # once: the more numbers, the more often their value is too large
    while True:
        numbers = [rng.randint(1, cfg.max_number) for _ in range(how_many)]
        parts = [(n, str(n)) for n in numbers]
        while len(parts) > 1:
            rng.shuffle(parts)
            (a, x), (b, y) = parts.pop(), parts.pop()
            value, op, swapped = rng.choice(joined(a, b))
            parts.append((value, written(x, op, y, swapped)))
        if parts[0][0] <= cfg.max_target:
            return numbers, parts[0][0], parts[0][1][1:-1]


def solve(numbers, target):
    """An expression over whole numbers above 0 that uses each number once and equals target; None when there is none."""
    every = (1 << len(numbers)) - 1
    values = {1 << i: {n: str(n)} for i, n in enumerate(numbers)}   # which of the numbers -> {value: expression}
    for mask in range(1, every):
        if mask in values:
            continue
        values[mask] = found = {}
        part = mask
        while part := (part - 1) & mask:
            if part > mask ^ part:   # each division in two once
                for (a, x), (b, y) in itertools.product(values[part].items(), values[mask ^ part].items()):
                    for value, op, swapped in joined(a, b):
                        if value not in found:
                            found[value] = written(x, op, y, swapped)
    for part in range(1, every):   # the last step backwards: which b would a need?
        others = values[every ^ part]
        for a, x in values[part].items():
            wanted = [(target - a, '+'), (a - target, '-'), *([(target // a, '*')] if target % a == 0 else []),
                      *([(a // target, '/')] if a % target == 0 else [])]
            for b, op in wanted:
                if b in others:
                    return f'{x} {op} {others[b]}'
    return None


def plain_problem(numbers, target, solution):
    listed = ', '.join(map(str, numbers[:-1])) + f' and {numbers[-1]}'
    text = (f'Make {target} from the numbers {listed}. Use each of them exactly once, in any order, with +, -, *, / and parentheses. Think '
            'first, then give the expression alone between <answer> and </answer>, for example <answer>(1 + 2) / 3</answer>.')
    return {'prompt': [{'role': 'user', 'content': text}], 'task': 'countdown', 'language': 'en', 'numbers': numbers, 'target': target,
            'solution': solution}


def published(row):
    numbers = row.get('nums', row.get('numbers'))
    whole = lambda x: type(x) is int and 0 < x < 10 ** 6  # noqa: E731
    if not isinstance(numbers, list) or not 3 <= len(numbers) <= 6 or not all(map(whole, numbers)):
        raise ValueError(f'"nums" (or "numbers") must be a list of 3 to 6 whole numbers above 0, not {str(numbers)[:40]}')
    if not whole(row.get('target')):
        raise ValueError(f'"target" must be a whole number above 0, not {str(row.get("target"))[:40]}')
    solution = solve(numbers, row['target'])
    if solution is None:
        raise source.Skip('no solution in whole numbers')
    return plain_problem(numbers, row['target'], solution)


def for_real_models(cfg):
    if cfg.source:
        files, dropped = source.find(cfg.source, ('Jiayi-Pan/Countdown-Tasks-3to4', 'data/train-*.parquet')), Counter()
        rows = source.convert(files, lambda row: {**published(row), 'id': f'countdown/{dropped["rows in"] - 1}'}, dropped)
        return source.write(cfg.out_dir, 'rl.jsonl', rows, files=files, dropped=dropped, licence='see the source', source=cfg.source)
    rng, problems, tries = random.Random(cfg.seed), {}, 0
    while len(problems) < cfg.test_rows + cfg.rl_rows:
        numbers, target, solution = random_problem(rng, cfg)
        problems.setdefault((tuple(sorted(numbers)), target), solution)
        tries += 1
        if tries > 50 * (cfg.test_rows + cfg.rl_rows):
            raise ValueError(f'only {len(problems)} different problems found for test_rows={cfg.test_rows} and rl_rows={cfg.rl_rows}: '
                             'raise max_number or max_numbers')
    everything = [(list(numbers), target, solution) for (numbers, target), solution in problems.items()]
    for name, part, orders in (('test', everything[:cfg.test_rows], 1), ('rl', everything[cfg.test_rows:], cfg.orders)):
        rows = [plain_problem(rng.sample(numbers, len(numbers)), target, solution)
                for _ in range(orders) for numbers, target, solution in part]
        source.write(cfg.out_dir, f'{name}.jsonl', [{**row, 'id': f'countdown/{name}/{i}'} for i, row in enumerate(rows)], files=[],
                     dropped=Counter(), licence='MIT', source=f'data/countdown/prepare.py, seed {cfg.seed}', example=name == 'rl')
    count = Counter(len(numbers) for numbers, *_ in everything)
    print('numbers of a problem: ' + ', '.join(f'{n}: {count[n]}' for n in sorted(count)))


# ---------------------------------------------------------------------------------------------------------------------
# the toy


def main(cfg):
    if cfg.source or (cfg.min_numbers, cfg.max_numbers) != (3, 3):
        return for_real_models(cfg)
    rng = random.Random(cfg.seed)
    everything = problems(cfg.max_number)
    rng.shuffle(everything)
    if len(everything) < 1.5 * (cfg.test_rows + cfg.rl_rows):
        raise ValueError(f'max_number={cfg.max_number} gives {len(everything)} problems, too few for test_rows={cfg.test_rows} and '
                         f'rl_rows={cfg.rl_rows} and half as many for the corpus; raise max_number')
    test, rl = everything[:cfg.test_rows], everything[cfg.test_rows:cfg.test_rows + cfg.rl_rows]
    pool = everything[cfg.test_rows + cfg.rl_rows:]
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    by_target = {}  # every target as often as any other: few problems lead to a large one, and each has to be learnt by itself
    for problem in pool:
        by_target.setdefault(problem[1], []).append(problem)
    corpus = [corpus_row(rng, cfg, by_target) for _ in range(cfg.corpus_rows)]
    write_rows(out / 'corpus.jsonl', corpus)
    write_rows(out / 'rl.jsonl', [rl_problem(rng, *p) for _ in range(cfg.orders) for p in rl])
    write_rows(out / 'test.jsonl', [rl_problem(rng, *p) for p in test])
    write_rows(out / 'distill.jsonl', [rl_problem(rng, *p) for p in pool * cfg.orders])
    write_rows(out / 'sort_sft.jsonl', [sort_answered(rng) for _ in range(4 * cfg.rl_rows)])
    write_rows(out / 'sort_judged.jsonl', [{**sort_problem(rng), 'task': 'preference'} for _ in range(cfg.rl_rows)])
    write_rows(out / 'sort_test.jsonl', [sort_problem(rng) for _ in range(cfg.test_rows)])
    write_rows(out / 'sort_pairs.jsonl', [sort_problem(rng) for _ in range(cfg.pair_rows)])
    toy_tokenizer().save_pretrained(out / 'tokenizer')
    print(f'{len(everything)} problems: {len(pool)} for the corpus, {len(rl)} for RL, {len(test)} held out; corpus modes '
          f'{dict(Counter(row["mode"] for row in corpus))}')
    for row in corpus[:4]:
        print('  ' + row['messages'][0]['content'], '→', row['messages'][1]['content'])


if __name__ == '__main__':
    run(main, Config)
