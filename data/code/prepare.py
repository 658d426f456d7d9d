r"""
Programming problems as files for reinforcement learning and evaluation.

    python data/code/prepare.py --dataset=humaneval --source=HumanEval.jsonl.gz
    python data/code/prepare.py --dataset=stdin --source=problems.jsonl \
        --verify=True                         # run the given solutions in the sandbox

dataset     default hub source                          licence     what
humaneval   openai/openai_humaneval                     MIT         164 functions to complete, for
                                                                    evaluation
mbpp        google-research-datasets/mbpp               CC-BY-4.0   974 short functions; train,
                                                                    validation, test, prompt by
                                                                    task_id
stdin       open-r1/verifiable-coding-problems-python   see there   programs that read input,
            (also the files of APPS and TACO)                       functions and methods to call

writes to out_dir DATASET.jsonl (mbpp: mbpp_SPLIT.jsonl) and its manifest (source, licence, hash,
rows in and out, reasons):
    {"prompt": [user: problem], "question": the bare problem, "task": "code", "id": ...,
     "solution": where there is one, and for functions
         "entry_point": "name", "setup": code before the asserts,
         "asserts": ["assert name(1) == 2", ...]
     for programs
         "tests": [{"input": "3\\n", "output": "6\\n"}, ...]}
HumanEval's check(candidate) becomes one assert a statement, with what stands before the function as
its setup; asserts that test nothing are left out. MBPP's prompt shows the first `shown` of its
three asserts.
Where the tests of a problem of stdin call a function, its prompt names that and shows the starter
code, if any; a method of a class Solution will do, and what such problems take for granted (typing,
collections, heapq ...: PRELUDE) is imported. Problems that came without tests, and with verify
those whose own solution fails, are left out and counted; what is malformed stops it, named by file
and line.
"""
import ast
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # run as a script from anywhere
from configurator import run
from data import source
from rewards import accuracy_reward

# dataset -> (hub source, its files, licence)
HUB = {
    'humaneval': ('openai/openai_humaneval', 'openai_humaneval/test-*.parquet', 'MIT'),
    'mbpp': ('google-research-datasets/mbpp', 'full/{split}-*.parquet', 'CC-BY-4.0'),
    'stdin': ('open-r1/verifiable-coding-problems-python', 'data/train-*.parquet',
              'see the data set'),
}
MBPP_SPLITS = {   # -> its task_ids
    'prompt': range(1, 11),
    'test': range(11, 511),
    'validation': range(511, 601),
    'train': range(601, 975),
}
PRELUDE = """import bisect, collections, copy, functools, heapq, itertools, math
import operator, random, re, string, sys
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush, nlargest, nsmallest
from itertools import accumulate, chain, combinations, groupby, permutations, product
from math import ceil, comb, factorial, floor, gcd, inf, log, log2, sqrt
from typing import *
"""


@dataclass
class Config:
    dataset: Literal['humaneval', 'mbpp', 'stdin'] = 'mbpp'   # which one
    source: str | None = None      # file or folder with its rows; None downloads it
    revision: str = 'main'         # revision of the data set on the hub
    split: Literal['train', 'validation', 'test', 'prompt'] = 'train'   # mbpp: which rows
    shown: int = 1                 # mbpp: asserts shown in the prompt; published scores show all 3
    verify: bool = False           # run each row's own solution; leave out the row when it fails
    max_tests: int = 20            # stdin: keep at most so many tests a problem, the shortest
    tolerance: float = 0.0         # stdin: error that the decimals of an output may have, e.g. 1e-6
    out_dir: str = 'data/code'     # folder for the files


def parse(code: str, what: str) -> list:
    try:
        return ast.parse(code).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f'{what} is no Python: {error}') from None


def functions(statements: list) -> dict:
    """Name -> definition, of those among the statements"""
    return {s.name: s for s in statements if isinstance(s, ast.FunctionDef)}


# ---- HumanEval ----

def humaneval(row: dict) -> dict:
    prompt = source.text_of(row, 'prompt')
    source.text_of(row, 'test')
    entry = source.text_of(row, 'entry_point')
    source.text_of(row, 'canonical_solution')

    given = parse(row['prompt'] + '    pass\n', 'the prompt')
    checks = [s for s in parse(row['test'], 'the test')
              if isinstance(s, ast.FunctionDef) and s.name == 'check']
    if len(checks) != 1 or entry not in functions(given):
        raise ValueError(f'the prompt must define {entry} and the test one function check')
    before = [ast.unparse(s) for s in given if getattr(s, 'name', None) != entry]
    prepared, asserts = asserts_of(checks[0], entry)
    if not asserts:
        raise source.Skip('no tests')
    text = f'Complete this function.\n```python\n{prompt}\n```'
    return {
        'prompt': [{'role': 'user', 'content': text}],
        'question': prompt,
        'task': 'code',
        'id': source.text_of(row, 'task_id'),
        'entry_point': entry,
        'starter': ''.join(f'{part}\n' for part in before),
        'setup': '\n'.join(before + prepared),
        'asserts': asserts,
        'solution': row['prompt'] + row['canonical_solution'],
    }


def asserts_of(check: ast.FunctionDef, entry: str) -> tuple[list[str], list[str]]:
    """The body of check(candidate) -> (statements that prepare, asserts that call something)"""
    prepared = []
    asserts = []
    for s in check.body:
        text = re.sub(r'\bcandidate\b', entry, ast.unparse(s))
        if isinstance(s, (ast.Assert, ast.For)):
            if any(isinstance(node, ast.Call) for node in ast.walk(s)):
                asserts.append(text)
        elif not isinstance(s, ast.Expr):
            prepared.append(text)
    return prepared, asserts


# ---- MBPP ----

def mbpp(row: dict, shown: int) -> dict:
    text = source.text_of(row, 'text', 'prompt')
    code = source.text_of(row, 'code').replace('\r\n', '\n')
    setup = (row.get('test_setup_code') or '').replace('\r\n', '\n')
    tests = row.get('test_list')
    if not isinstance(tests, list) or not all(isinstance(t, str) for t in tests):
        raise ValueError("'test_list' must be a list of strings")
    if not tests:
        raise source.Skip('no tests')
    tests = [test.strip() for test in tests]

    defined = functions(parse(code, 'the code'))
    calls = Counter()
    for test in tests:
        for name in called_in(parse(test, 'a test')):
            if name in defined:
                calls[name] += 1
    if not calls:
        raise ValueError('the tests call no function that the code defines')
    problem = text
    if shown:
        example = '\n'.join(tests[:shown])
        problem += f'\nThis must hold:\n```python\n{example}\n```'
    return {
        'prompt': [{'role': 'user', 'content': problem}],
        'question': text,
        'task': 'code',
        'id': f'mbpp/{row.get("task_id")}',
        'entry_point': calls.most_common(1)[0][0],
        'setup': setup,
        'asserts': tests,
        'solution': code,
    }


def called_in(statements: list):
    """Yields the names of the functions that are called by name."""
    for node in ast.walk(ast.Module(statements, [])):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


# ---- Programs, and functions as APPS, TACO and open-r1 have them ----

def stdin(row: dict, number: int, most: int, tolerance: float = 0.0) -> dict:
    """Rows with "tests", with APPS's "input_output" or with open-r1's "verification_info" (the last
    two may be JSON in a string)."""
    problem = source.text_of(row, 'problem', 'question', 'problem_statement', 'prompt')
    tests, name = tests_of(row)
    name = name or optional(row, 'fn_name')
    starter = optional(row, 'starter_code')
    if name and not str(name).isidentifier():
        raise ValueError(f"'fn_name' must be the name of a function, not {name!r}")

    text = problem
    if starter:
        text += f'\n\nComplete this code:\n```python\n{starter.rstrip()}\n```'
    if name and not re.search(rf'\b{name}\b', text):
        text += f'\n\nWrite a function `{name}`.'
    out = {
        'prompt': [{'role': 'user', 'content': text}],
        'question': problem,
        'task': 'code',
        'id': f'stdin/{number}',
    }
    if name:
        hidden = f'globals().pop({name!r}, None)\n'   # what is asked for is not given
        out['entry_point'] = name
        out['starter'] = PRELUDE + hidden
        out['setup'] = ''
        out['asserts'] = [call_assert(name, arguments(t['input']), from_json(t['output']))
                          for t in tests[:most]]
    else:
        out['tests'] = shortest(tests, most)
        tolerance = row.get('tolerance') or tolerance
        if tolerance and any(re.search(r'\d\.\d|\de-', t['output']) for t in out['tests']):
            out['tolerance'] = tolerance
    solution = solution_of(row)
    if solution.strip():
        out['solution'] = solution
    return out


def tests_of(row: dict) -> tuple[list[dict], str | None]:
    """-> ([{"input": ..., "output": ...}, ...], the name of the function that they call, if they
    say so). Skip without any."""
    keys = ('tests', 'input_output', 'verification_info')
    given = next((row[key] for key in keys if row.get(key)), None)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f'the tests are no JSON: {error}') from None

    if isinstance(given, dict) and 'inputs' in given:   # APPS
        name = given.get('fn_name')
        inputs = given['inputs']
        outputs = given.get('outputs', [])
        if len(inputs) != len(outputs):
            raise ValueError(f'{len(inputs)} inputs, but {len(outputs)} outputs')
        tests = [{'input': i, 'output': o} for i, o in zip(inputs, outputs)]
    else:
        tests = given.get('test_cases') if isinstance(given, dict) else given
        named = (t['fn_name'] for t in tests or () if isinstance(t, dict) and t.get('fn_name'))
        name = next(named, None)

    if not tests:
        raise source.Skip('no tests')
    if not isinstance(tests, list) or not all(map(is_test, tests)):
        raise ValueError('the tests must be a list of {"input": ..., "output": ...}')
    return tests, name


def is_test(test) -> bool:
    return isinstance(test, dict) and {'input', 'output'} <= set(test)


def shortest(tests: list[dict], most: int) -> list[dict]:
    """So many of the tests, as text: a list is one line an item."""
    def joined(x):
        return '\n'.join(map(str, x)) if isinstance(x, list) else str(x)
    tests = [{'input': joined(t['input']), 'output': joined(t['output'])} for t in tests]
    return sorted(tests, key=lambda t: len(t['input']) + len(t['output']))[:most]


def from_json(value):
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value   # a plain text


def literal(x) -> str:
    """Plain data as Python: JSON's Infinity and NaN have no literal there."""
    if isinstance(x, list):
        return '[' + ', '.join(map(literal, x)) + ']'
    if isinstance(x, dict):
        return '{' + ', '.join(f'{literal(k)}: {literal(v)}' for k, v in x.items()) + '}'
    if isinstance(x, float) and not math.isfinite(x):
        return f'float({str(x)!r})'
    return repr(x)


def arguments(given) -> list:
    """The arguments of a call: a list, or a text with one a line, each in JSON."""
    if isinstance(given, str) and '\n' in given.strip():
        return [from_json(line) for line in given.strip().split('\n')]
    return from_json(given)


def call_assert(name: str, args, wanted) -> str:
    """APPS wraps some of the wanted results in a list of one."""
    if not isinstance(args, list):
        raise ValueError(f'the input of {name} must be a list of arguments, not {args!r}')
    call = f'{name}(*{literal(args)})'
    if isinstance(wanted, list) and len(wanted) == 1:
        either = f'same(result, {literal(wanted)}) or same(result, {literal(wanted[0])})'
        return f'result = {call}\nassert {either}'
    return f'assert same({call}, {literal(wanted)})'


def optional(row: dict, key: str) -> str:
    """The text under a key that may be missing, None or blank."""
    text = row.get(key)
    if text is not None and not isinstance(text, str):
        raise ValueError(f'{key!r} must be a string, not {text!r}'[:200])
    return text if text and text.strip() else ''


def solution_of(row: dict) -> str:
    """The row's first solution, or ''; APPS and TACO have lists of them, as JSON."""
    keys = ('solution', 'gold_standard_solution', 'solutions')
    given = next((row[key] for key in keys if row.get(key)), '')
    if isinstance(given, str) and given.lstrip()[:1] == '[':
        given = from_json(given)
    if isinstance(given, list):
        given = next((text for text in given if isinstance(text, str)), '')
    fence = re.search(r'```(?:python)?\n(.*?)```', given, re.DOTALL)
    return fence[1] if fence else given


# ---- All rows ----

def convert(row: dict, number: int, cfg: Config) -> dict:
    """Row `number` (from 0) of the data set -> its row here; Skip where it is not wanted."""
    if cfg.dataset == 'humaneval':
        out = humaneval(row)
    elif cfg.dataset == 'mbpp':
        task_id = row.get('task_id')
        if type(task_id) is not int:
            raise ValueError("'task_id' must be a whole number, which tells the split, not "
                             f'{task_id!r}')
        if task_id not in MBPP_SPLITS[cfg.split]:
            raise source.Skip('of another split')
        out = mbpp(row, cfg.shown)
    else:
        out = stdin(row, number, cfg.max_tests, cfg.tolerance)
    return verified(out) if cfg.verify else out


def verified(row: dict) -> dict:
    """The row, when its own solution gets full marks; Skip otherwise."""
    if not row.get('solution'):
        raise source.Skip('no solution to verify the tests with')
    if accuracy_reward(f'```python\n{row["solution"]}\n```', row) != 1.0:
        raise source.Skip('its own solution fails')
    return row


def main(cfg: Config):
    repo, pattern, licence = HUB[cfg.dataset]
    files = source.find(cfg.source, (repo, pattern.format(split=cfg.split)), cfg.revision)
    dropped = Counter()

    def numbered(row):
        return convert(row, dropped['rows in'] - 1, cfg)
    rows = source.convert(files, numbered, dropped)
    name = f'mbpp_{cfg.split}.jsonl' if cfg.dataset == 'mbpp' else f'{cfg.dataset}.jsonl'
    source.write(cfg.out_dir, name, rows, files=files, dropped=dropped, licence=licence,
                 source=cfg.source or f'{repo}@{cfg.revision}')


if __name__ == '__main__':
    # RuntimeError: programs cannot be contained here
    run(main, Config, (ValueError, OSError, RuntimeError))
