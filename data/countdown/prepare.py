"""
Countdown, the toy of `make r1`: three numbers and a target; reach it with + - *, each number used
once, in any order.

    python data/countdown/prepare.py --out_dir=out/r1/data

writes, for the first task,

    corpus.jsonl        the base model's corpus
    searches.jsonl      its clean searches alone: what a student learns from without a teacher
    rl.jsonl            problems for RL
    distill.jsonl       problems of the corpus, for the teacher
    test.jsonl          held out: no file above has these three numbers, in any order
    test_seen.jsonl     numbers of the corpus with targets that it lacks
    test_beyond.jsonl   numbers of which one at least is larger than any in the files above

and for the second task, sorting three numbers, sort_*.jsonl; and tokenizer/.

**Held out.** A search depends on the numbers alone; the target says where it stops. So the sets
of three numbers are dealt to test, RL and corpus, each set with all of its targets: what the test
asks for has been searched nowhere. Sorting leaves the test's sets out as well. Every file is a
function of `seed` alone.

**A trace** tries the pairs of numbers in the order given: each pair is multiplied, added and
subtracted (larger minus smaller), and the result meets the third number in the same three ways.
" 3 plus 7 is 10 with 4 : 40 14 6 yes" reads: 3 + 7 = 10, and with 4 that makes 40, 14, 6; the last
is the target. Numbers are single tokens and stop at 50; what is larger is written "big". The target
is a token of another kind (" =6"), so that seeing whether a value is the target takes one look and
cannot be confused with earlier values.

**The corpus** of the base model is a mixture, by rows (the shares are settings below):

    guess   "guess": one random expression, right about one time in ten
    quick   "quick": searches one or two lines, gives up and guesses
    search  "search": the full search, always right; but for one in ten the target cannot be
            reached, and it ends in a guess

in two notations, English words and Chinese characters; some rows change between them line by line,
so that language mixing exists to be cured; some break the format, so that a format reward has
something to teach; and a few are about sorting. Nobody labels the rows: a model learns all of it
and samples all of it.

For real models, three to six numbers, + - * / and a prompt in plain English; only rl.jsonl and
test.jsonl, which share no set of numbers either, and a manifest beside each:

    python data/countdown/prepare.py --max_numbers=6 --max_number=99 --out_dir=data/countdown
    python data/countdown/prepare.py --source=problems.jsonl    # rows with "nums" (or "numbers")
                                                                # and "target", into rl.jsonl

    {"prompt": [user], "task": "countdown", "numbers": [36, 7, 19, 55], "target": 65,
     "solution": "...", ...}

The numbers are put together two at a time, in random order and always to whole numbers above 0, so
every target has a solution, which the row keeps. Problems of a source are solved by trying all such
ways; the rest is left out and counted.
"""

import itertools
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script from anywhere
from configurator import run
from data import source
from data.tokenizer import Tokenizer


@dataclass
class Config:
    # files
    out_dir: str = 'data/countdown'  # where the files go
    seed: int = 1                    # everything below is drawn from it
    corpus_rows: int = 80000         # rows of corpus.jsonl
    rl_rows: int = 1536              # problems of rl.jsonl, at most
    distill_rows: int = 8000         # problems of distill.jsonl, at most
    test_rows: int = 512             # problems of test.jsonl; the other two tests have half
    sort_rows: int = 2048            # rows of sort_sft.jsonl; a quarter of sort_judged, sort_test
    pair_rows: int = 3000            # of sort_pairs.jsonl: their samples become a judge's pairs
    # which numbers
    max_number: int = 20             # numbers are drawn from 1 to this
    beyond: int = 2                  # and so many more for test_beyond.jsonl
    test_share: float = 0.15         # of all sets of three numbers, those dealt to the test
    rl_share: float = 0.2            # and to RL; the corpus has the rest
    # the corpus: shares of its rows about countdown, and of all its rows
    guess: float = 0.64              # guess at once
    quick: float = 0.06              # search a little, give up and guess
    search: float = 0.30             # search fully
    hopeless: float = 0.1            # of the full searches: no way to the target, so a guess
    chinese: float = 0.25            # share of rows wholly in the second notation
    mixed: float = 0.25              # share of rows that change notation between lines
    broken: float = 0.04             # share of rows that break the format
    sort: float = 0.04               # share of rows about the second task
    # for real models
    min_numbers: int = 3             # numbers of a problem, from min_numbers
    max_numbers: int = 3             # to max_numbers; 3 to 3 is the toy, without this section
    max_target: int = 100            # largest target
    orders: int = 3                  # orders of its numbers in which a problem of rl.jsonl appears
    source: str | None = None        # file or folder of published problems, to be solved instead

    def __post_init__(self):
        if not 3 <= self.min_numbers <= self.max_numbers <= 6:
            raise ValueError(f'min_numbers={self.min_numbers} and max_numbers={self.max_numbers} '
                             'must rise and lie in 3 to 6')
        if not (0 < self.test_share and 0 < self.rl_share and self.test_share + self.rl_share < 1):
            raise ValueError(f'test_share={self.test_share} and rl_share={self.rl_share} must be '
                             'above 0 and leave number sets to the corpus')


LARGEST = 50
PAIRS = ((0, 1, 2), (0, 2, 1), (1, 2, 0))  # which two numbers meet first, and the one left
# products first: their values are the rarest, and a search that ends early sees none of the last
OPS = ('*', '+', '-')
WORDS = {
    'en': {'+': 'plus', '-': 'minus', '*': 'times', 'is': 'is', 'with': 'with', 'yes': 'yes',
           'big': 'big', 'guess': 'guess', 'quick': 'quick', 'search': 'search', 'stop': 'enough',
           'sort': 'order'},
    'zh': {'+': '加', '-': '减', '*': '乘', 'is': '得', 'with': '和', 'yes': '对',
           'big': '大', 'guess': '猜', 'quick': '略', 'search': '找', 'stop': '罢',
           'sort': '排'},
}


# --------------------------------------------------------------------------------------------------
# problems, and how their numbers are dealt


def combine(a, b, op):
    """-> (value, larger first, smaller second); subtraction is of the smaller from the larger"""
    if op == '-' and b > a:
        a, b = b, a
    value = {'+': a + b, '-': a - b, '*': a * b}[op]
    return value, a, b


def lines(numbers):
    """The full search, lazily: (a, op, b, value, third number, [(value2, expression) x 3]) in the
    order it is tried. A value past LARGEST has no second step."""
    for (i, j, k), op in itertools.product(PAIRS, OPS):
        value, a, b = combine(numbers[i], numbers[j], op)
        c = numbers[k]
        inner = f'( {a} {op} {b} )'
        ends = []
        for op2 in OPS if value <= LARGEST else ():
            value2, first, _ = combine(value, c, op2)
            expression = f'{inner} {op2} {c}' if first == value else f'{c} {op2} {inner}'
            ends.append((value2, expression))
        yield a, op, b, value, c, ends


def reachable(numbers):
    """The targets that the search finds."""
    values = {value for *_, ends in lines(numbers) for value, _ in ends}
    return {value for value in values if 1 <= value <= LARGEST}


def number_sets(largest):
    """Every three numbers from 1 to `largest`, sorted; a number may occur more than once."""
    return list(itertools.combinations_with_replacement(range(1, largest + 1), 3))


def problems(sets):
    """Every (sorted numbers, target) of these sets that the search can solve."""
    return [(numbers, target) for numbers in sets for target in sorted(reachable(numbers))]


def deal(rng, cfg):
    """-> {file: shuffled problems}. A set of numbers goes with all its targets to test, rl or
    corpus; test_seen takes problems away from the corpus; test_beyond has sets of its own."""
    sets = number_sets(cfg.max_number)
    rng.shuffle(sets)
    n_test = round(cfg.test_share * len(sets))
    n_rl = round(cfg.rl_share * len(sets))
    larger = [s for s in number_sets(cfg.max_number + cfg.beyond) if max(s) > cfg.max_number]
    dealt = {
        'test': problems(sets[:n_test]),
        'rl': problems(sets[n_test:n_test + n_rl]),
        'corpus': problems(sets[n_test + n_rl:]),
        'test_beyond': problems(larger),
    }
    for part in dealt.values():
        rng.shuffle(part)

    half = cfg.test_rows // 2
    least = {'test': cfg.test_rows, 'rl': cfg.rl_rows // 2, 'corpus': cfg.test_rows}
    for name, rows in least.items():
        if len(dealt[name]) < rows:
            raise ValueError(f'max_number={cfg.max_number} gives {len(dealt[name])} problems to '
                             f'{name}, too few for test_rows={cfg.test_rows} and '
                             f'rl_rows={cfg.rl_rows}; raise max_number')
    dealt['test_seen'] = dealt['corpus'][:half]
    dealt['corpus'] = dealt['corpus'][half:]
    dealt['test_beyond'] = dealt['test_beyond'][:half]
    dealt['test'] = dealt['test'][:cfg.test_rows]
    dealt['rl'] = dealt['rl'][:cfg.rl_rows]
    return dealt


# --------------------------------------------------------------------------------------------------
# rows


def prompt_text(numbers, target):
    return f' {numbers[0]} {numbers[1]} {numbers[2]} make ={target}'


def trace(rng, numbers, target, mode, notation):
    """-> (reasoning, expression) of one trace; notation 'en', 'zh' or 'mixed'"""
    def words():
        return WORDS[rng.choice(('en', 'zh')) if notation == 'mixed' else notation]

    def show(value, w):
        return w['big'] if value > LARGEST else str(value)

    everything = list(lines(numbers))
    text = ' ' + words()[mode]
    tried = {'guess': 0, 'quick': rng.randint(1, 2), 'search': len(everything)}[mode]
    for a, op, b, value, c, ends in everything[:tried]:
        w = words()
        text += f' {a} {w[op]} {b} {w["is"]} {show(value, w)}'
        if ends:
            text += f' {w["with"]} {c} :'
        for value2, expression in ends:
            text += ' ' + show(value2, w)
            if value2 == target:
                return f'{text} {w["yes"]}', expression
        text += ' ,'
    if mode != 'guess':
        text += ' ' + words()['stop']
    expressions = [expression for *_, ends in everything for _, expression in ends]
    return text, rng.choice(expressions)


def respond(rng, reasoning, answer, broken):
    """-> the assistant's text; a broken one leaves out a tag or adds something after the answer"""
    think = ['<think>', reasoning, '</think>']
    tagged = ['<answer>', f' {answer}', '</answer>']
    if not broken:
        return ''.join(think + tagged)
    flaws = [
        think[:2] + tagged,                  # the thinking is not closed
        think + [f' {answer}'],              # the answer is not tagged
        think + tagged + [f' {answer}'],     # the answer is given twice
    ]
    return ''.join(flaws[rng.randrange(3)])


def corpus_row(rng, cfg, by_target, held_out):
    english = 1 - cfg.chinese - cfg.mixed
    notation = rng.choices(('zh', 'mixed', 'en'), (cfg.chinese, cfg.mixed, english))[0]
    broken = rng.random() < cfg.broken
    if rng.random() < cfg.sort:
        row = sort_problem(rng, held_out)
        mode = 'sort'
        answer = row['answer']
        reasoning = ' ' + WORDS['zh' if notation == 'zh' else 'en']['sort']
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
    messages = [{'role': 'user', 'content': user},
                {'role': 'assistant', 'content': respond(rng, reasoning, answer, broken)}]
    return {'messages': messages, 'mode': mode, 'notation': notation, 'broken': broken}


def is_clean_search(row):
    return row['mode'] == 'search' and row['notation'] == 'en' and not row['broken']


def rl_problem(rng, numbers, target):
    """A problem for RL or evaluation, its numbers in random order."""
    numbers = rng.sample(numbers, 3)
    prompt = [{'role': 'user', 'content': prompt_text(numbers, target)}]
    return {'prompt': prompt, 'task': 'countdown', 'language': 'en', 'numbers': numbers,
            'target': target}


def sort_problem(rng, held_out):
    """The second kind of task: put three different numbers in order. held_out: sorted sets that it
    does not ask for."""
    numbers = rng.sample(range(1, LARGEST + 1), 3)
    while tuple(sorted(numbers)) in held_out:
        numbers = rng.sample(range(1, LARGEST + 1), 3)
    prompt = [{'role': 'user', 'content': ' sort' + ''.join(f' {n}' for n in numbers)}]
    answer = ' '.join(map(str, sorted(numbers)))
    return {'prompt': prompt, 'task': 'match', 'language': 'en', 'answer': answer}


def sort_answered(rng, held_out):
    row = sort_problem(rng, held_out)
    text = respond(rng, ' ' + WORDS['en']['sort'], row['answer'], broken=False)
    messages = [*row['prompt'], {'role': 'assistant', 'content': text}]
    return {'messages': messages, 'task': row['task']}


def toy_tokenizer():
    words = [f' {n}' for n in range(LARGEST + 1)] + [f' ={n}' for n in range(1, LARGEST + 1)]
    spoken = [word for notation in WORDS.values() for word in notation.values()]
    words += [f' {word}' for word in dict.fromkeys(spoken)]
    words += [' make', ' sort', ' :', ' ,', ' (', ' )', ' +', ' -', ' *',
              '<think>', '</think>', '<answer>', '</answer>']
    return Tokenizer.from_words(words, special_tokens=['<|user|>', '<|assistant|>', '<|end|>'])


def write_rows(path, rows):
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


# --------------------------------------------------------------------------------------------------
# three to six numbers, for real models


def joined(a, b):
    """[(value, operator, swapped)] of what two whole numbers above 0 can make: whole numbers above
    0, b before a if swapped."""
    low, high = min(a, b), max(a, b)
    made = [(a + b, '+', False), (a * b, '*', False)]
    if low < high:
        made.append((high - low, '-', a < b))
    if high % low == 0:
        made.append((high // low, '/', a < b))
    return made


def written(x, op, y, swapped):
    return f'({y} {op} {x})' if swapped else f'({x} {op} {y})'


def random_problem(rng, cfg):
    """-> (numbers, target, an expression that reaches it)"""
    # drawn once: the more numbers, the more often their value is too large
    how_many = rng.randint(cfg.min_numbers, cfg.max_numbers)
    while True:
        numbers = [rng.randint(1, cfg.max_number) for _ in range(how_many)]
        parts = [(n, str(n)) for n in numbers]
        while len(parts) > 1:
            rng.shuffle(parts)
            a, x = parts.pop()
            b, y = parts.pop()
            value, op, swapped = rng.choice(joined(a, b))
            parts.append((value, written(x, op, y, swapped)))
        target, expression = parts[0]
        if target <= cfg.max_target:
            return numbers, target, expression[1:-1]


def solve(numbers, target):
    """An expression over whole numbers above 0 that uses each number once and equals target; None
    when there is none. Subsets of the numbers are bit masks."""
    every = (1 << len(numbers)) - 1
    values = {1 << i: {n: str(n)} for i, n in enumerate(numbers)}   # subset -> {value: expression}
    for subset in range(1, every):
        if subset not in values:
            values[subset] = values_of(subset, values)
    for part in range(1, every):   # the last step backwards: which b would a need?
        others = values[every ^ part]
        for a, x in values[part].items():
            for b, op in partners(a, target):
                if b in others:
                    return f'{x} {op} {others[b]}'
    return None


def values_of(subset, values):
    """{value: expression} of a subset of two or more, from those of its parts"""
    found = {}
    part = subset
    while part := (part - 1) & subset:
        if part < subset ^ part:       # each division in two once
            continue
        pairs = itertools.product(values[part].items(), values[subset ^ part].items())
        for (a, x), (b, y) in pairs:
            for value, op, swapped in joined(a, b):
                if value not in found:
                    found[value] = written(x, op, y, swapped)
    return found


def partners(a, target):
    """[(b, op)] with a op b = target"""
    wanted = [(target - a, '+'), (a - target, '-')]
    if target % a == 0:
        wanted.append((target // a, '*'))
    if a % target == 0:
        wanted.append((a // target, '/'))
    return wanted


def plain_problem(numbers, target, solution):
    listed = ', '.join(map(str, numbers[:-1])) + f' and {numbers[-1]}'
    text = (f'Make {target} from the numbers {listed}. Use each of them exactly once, in any '
            'order, with +, -, *, / and parentheses. Think first, then give the expression alone '
            'between <answer> and </answer>, for example <answer>(1 + 2) / 3</answer>.')
    return {'prompt': [{'role': 'user', 'content': text}], 'task': 'countdown', 'language': 'en',
            'numbers': numbers, 'target': target, 'solution': solution}


def is_whole(x):
    return type(x) is int and 0 < x < 10 ** 6


def published(row):
    numbers = row.get('nums', row.get('numbers'))
    fits = isinstance(numbers, list) and 3 <= len(numbers) <= 6
    if not fits or not all(map(is_whole, numbers)):
        raise ValueError('"nums" (or "numbers") must be a list of 3 to 6 whole numbers above 0, '
                         f'not {str(numbers)[:40]}')
    if not is_whole(row.get('target')):
        raise ValueError('"target" must be a whole number above 0, '
                         f'not {str(row.get("target"))[:40]}')
    solution = solve(numbers, row['target'])
    if solution is None:
        raise source.Skip('no solution in whole numbers')
    return plain_problem(numbers, row['target'], solution)


def solve_published(cfg):
    files = source.find(cfg.source, ('Jiayi-Pan/Countdown-Tasks-3to4', 'data/train-*.parquet'))
    dropped = Counter()

    def convert(row):
        return {**published(row), 'id': f'countdown/{dropped["rows in"] - 1}'}

    rows = source.convert(files, convert, dropped)
    return source.write(cfg.out_dir, 'rl.jsonl', rows, files=files, dropped=dropped,
                        licence='see the source', source=cfg.source)


def for_real_models(cfg):
    """rl.jsonl and test.jsonl of three to six numbers; all problems of a set fall on one side."""
    rng = random.Random(cfg.seed)
    wanted = {'test': cfg.test_rows, 'rl': cfg.rl_rows}
    dealt = {'test': {}, 'rl': {}}     # {(sorted numbers, target): an expression}
    side_of = {}                       # of a set of numbers
    for _ in range(50 * sum(wanted.values())):
        numbers, target, solution = random_problem(rng, cfg)
        numbers = tuple(sorted(numbers))
        fill = 'test' if len(dealt['test']) < wanted['test'] else 'rl'
        side = side_of.setdefault(numbers, fill)
        if len(dealt[side]) < wanted[side]:
            dealt[side].setdefault((numbers, target), solution)
        if all(len(dealt[name]) == wanted[name] for name in wanted):
            break
    else:
        raise ValueError(f'only {len(dealt["test"])} and {len(dealt["rl"])} different problems '
                         f'found for test_rows={cfg.test_rows} and rl_rows={cfg.rl_rows}: '
                         'raise max_number or max_numbers')
    for name, orders in (('test', 1), ('rl', cfg.orders)):
        rows = []
        for _ in range(orders):
            for (numbers, target), solution in dealt[name].items():
                shuffled = rng.sample(numbers, len(numbers))
                row = plain_problem(shuffled, target, solution)
                rows.append({**row, 'id': f'countdown/{name}/{len(rows)}'})
        source.write(cfg.out_dir, f'{name}.jsonl', rows, files=[], dropped=Counter(), licence='MIT',
                     source=f'data/countdown/prepare.py, seed {cfg.seed}', example=name == 'rl')
    count = Counter(len(numbers) for part in dealt.values() for numbers, _ in part)
    print('numbers of a problem: ' + ', '.join(f'{n}: {count[n]}' for n in sorted(count)))


# --------------------------------------------------------------------------------------------------
# the toy


def main(cfg):
    if cfg.source:
        return solve_published(cfg)
    if (cfg.min_numbers, cfg.max_numbers) != (3, 3):
        return for_real_models(cfg)
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(cfg.seed)

    # countdown: tests first, so that they depend on no share of the corpus
    dealt = deal(rng, cfg)
    held_out = {numbers for name in ('test', 'test_beyond') for numbers, _ in dealt[name]}
    for name in ('test', 'test_seen', 'test_beyond', 'rl'):
        write_rows(out / f'{name}.jsonl', [rl_problem(rng, *p) for p in dealt[name]])
    distilled = dealt['corpus'][:cfg.distill_rows]
    write_rows(out / 'distill.jsonl', [rl_problem(rng, *p) for p in distilled])

    # the corpus has every target as often as any other: few problems lead to a large one, and each
    # target has to be learnt by itself
    by_target = {}
    for problem in dealt['corpus']:
        by_target.setdefault(problem[1], []).append(problem)
    corpus = [corpus_row(rng, cfg, by_target, held_out) for _ in range(cfg.corpus_rows)]
    write_rows(out / 'corpus.jsonl', corpus)
    write_rows(out / 'searches.jsonl', filter(is_clean_search, corpus))

    # sorting
    few = cfg.sort_rows // 4
    judged = [sort_problem(rng, held_out) for _ in range(few)]
    asked = [sort_problem(rng, held_out) for _ in range(cfg.pair_rows)]
    write_rows(out / 'sort_sft.jsonl', [sort_answered(rng, held_out) for _ in range(cfg.sort_rows)])
    write_rows(out / 'sort_judged.jsonl', [{**row, 'task': 'preference'} for row in judged])
    write_rows(out / 'sort_test.jsonl', [sort_problem(rng, held_out) for _ in range(few)])
    write_rows(out / 'sort_pairs.jsonl', asked)
    toy_tokenizer().save_pretrained(out / 'tokenizer')

    sizes = ', '.join(f'{name} {len(part)}' for name, part in dealt.items())
    print(f'problems: {sizes}; corpus modes {dict(Counter(row["mode"] for row in corpus))}')
    for row in corpus[:4]:
        user, assistant = row['messages']
        print(f'  {user["content"]} → {assistant["content"]}')


if __name__ == '__main__':
    run(main, Config)
