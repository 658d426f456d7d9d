"""
Competition mathematics as files for reinforcement learning, fine-tuning and evaluation.

    pip install -e '.[data]'                          # for parquet
    python data/math/prepare.py --dataset=math        # downloads it
    python data/math/prepare.py --dataset=math500 --source=path/to/test.jsonl   # or a folder

dataset     default hub source           licence      what
math        EleutherAI/hendrycks_math    MIT          12,500 problems in 7 subjects (the training
                                                      split: 7,500)
math500     HuggingFaceH4/MATH-500       MIT          500 of its test problems, for evaluation
aime24      HuggingFaceH4/aime_2024      Apache-2.0   30 problems, integer answers; for evaluation
aime25      math-ai/aime25               Apache-2.0   30 problems, integer answers; for evaluation
numina      AI-MO/NuminaMath-1.5         Apache-2.0   900,000 problems from many contests
openr1      open-r1/OpenR1-Math-220k     Apache-2.0   94,000 of them with two to four traces of
                                                      DeepSeek-R1

writes to out_dir
    DATASET.jsonl       {"prompt": [user: problem], "answer": "\\\\frac{3}{4}", "task": "math",
                         "id": "math/0", ...}
    DATASET_sft.jsonl   {"messages": [user: problem, assistant: trace], "answer", "task", "id"};
                        openr1 only: its traces that were verified, at most `traces` a problem
and beside each a manifest (source, licence, hash, rows in and out, reasons). The answer is the
row's own, or else the last \\boxed{...} of its solution. Every answer, put into a box, must get
full marks from rewards.math_reward. Rows without an answer, proofs and, of numina, problems marked
as invalid are left out and counted; what is malformed stops it, named by file and line.
"""
import itertools
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # run as a script from anywhere
from configurator import run
from data import source
from rewards import BOX, close_brace, math_reward

# dataset -> (hub source, its files, licence)
HUB = {
    'math': ('EleutherAI/hendrycks_math', '*/train-*.parquet', 'MIT'),
    'math500': ('HuggingFaceH4/MATH-500', 'test.jsonl', 'MIT'),
    'aime24': ('HuggingFaceH4/aime_2024', 'data/train-*.parquet', 'Apache-2.0 (problems: MAA)'),
    'aime25': ('math-ai/aime25', 'test.jsonl', 'Apache-2.0 (problems: MAA)'),
    'numina': ('AI-MO/NuminaMath-1.5', 'data/train-*.parquet', 'Apache-2.0'),
    'openr1': ('open-r1/OpenR1-Math-220k', 'data/train-*.parquet', 'Apache-2.0'),
}
Dataset = Literal['math', 'math500', 'aime24', 'aime25', 'numina', 'openr1']


@dataclass
class Config:
    dataset: Dataset = 'math'     # which one
    source: str | None = None     # file or folder with its rows; None downloads it
    revision: str = 'main'        # revision of the data set on the hub
    out_dir: str = 'data/math'    # folder for the files
    traces: int = 1               # openr1: verified traces a problem in the SFT file


def last_box(solution: str) -> str | None:
    """The content of the last \\boxed{...} or \\fbox{...} whose braces balance."""
    for box in reversed(list(BOX.finditer(solution))):
        start = box.end()
        if solution[start:start + 1] == '{':
            end = close_brace(solution, start)
            if end > 0:
                return solution[start + 1:end]
    return None


def answer_of(row: dict, dataset: str) -> str:
    """The answer of a row; Skip where it has none, or its problem is to prove something."""
    answer = row.get('answer')
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is None and isinstance(row.get('solution'), str):
        answer = last_box(row['solution'])
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f'the answer must be a string, not {answer!r}')
    answer = (answer or '').strip().lstrip('$')
    answer = re.sub(r'(?<!\\)\$+$', '', answer).strip()

    if dataset.startswith('aime'):
        number = answer.replace('^\\circ', '')
        if not re.fullmatch(r'\d{1,3}', number):
            raise ValueError('the answer of an AIME problem is an integer from 0 to 999, not '
                             f'{answer!r}')
        return str(int(number))
    if not answer or answer.lower() == 'notfound':
        raise source.Skip('no answer')
    if answer.lower() == 'proof':
        raise source.Skip('a proof')
    return answer


def problem_row(row: dict, dataset: str, number: int) -> dict:
    """The RL row of a problem; Skip where it cannot be one."""
    problem = source.text_of(row, 'problem', 'question')
    if 'No' in (row.get('problem_is_valid'), row.get('solution_is_valid')):
        raise source.Skip('marked as invalid')
    if row.get('question_type') == 'proof':
        raise source.Skip('a proof')
    out = {
        'prompt': [{'role': 'user', 'content': problem}],
        'answer': answer_of(row, dataset),
        'task': 'math',
        'id': f'{dataset}/{number}',
    }
    if math_reward(f'\\boxed{{{out["answer"]}}}', out) != 1.0:
        raise source.Skip('an answer that does not fit in a box')

    level = row.get('level', row.get('difficulty'))
    if level is not None:
        out['level'] = int(re.sub(r'\D', '', str(level).split('.')[0]) or 0)
    subject = row.get('subject', row.get('type', row.get('problem_type')))
    if subject is not None:
        out['subject'] = str(subject)
    return out


def trace_rows(row: dict, out: dict, most: int) -> list[dict]:
    """SFT rows of one problem of openr1: of its generations at most so many of those that are
    complete and verified by either judge. Skip without any. out: its RL row"""
    traces = row.get('generations')
    if not isinstance(traces, list) or not all(isinstance(t, str) for t in traces):
        raise ValueError("'generations' must be a list of strings")
    none = [False] * len(traces)
    by_rules = row.get('correctness_math_verify') or none
    by_llama = row.get('correctness_llama') or none
    complete = row.get('is_reasoning_complete') or [True] * len(traces)
    verdicts = [len(verdict) for verdict in (by_rules, by_llama, complete)]
    if any(count != len(traces) for count in verdicts):
        raise ValueError(f'{len(traces)} generations, but verdicts on {verdicts} of them')

    rows = []
    for trace, rules, llama, whole in zip(traces, by_rules, by_llama, complete):
        if whole and (rules or llama) and trace.count('</think>') == 1:
            turn = {'role': 'assistant', 'content': trace.strip()}
            rows.append({'messages': [*out['prompt'], turn], 'answer': out['answer'],
                         'task': 'math', 'id': out['id']})
    if not rows[:most]:
        raise source.Skip('no verified trace')
    return rows[:most]


def main(cfg: Config):
    repo, pattern, licence = HUB[cfg.dataset]
    files = source.find(cfg.source, (repo, pattern), cfg.revision)
    about = {
        'files': files,
        'licence': licence,
        'source': cfg.source or f'{repo}@{cfg.revision}',
    }

    dropped = Counter()

    def problem(row):
        return problem_row(row, cfg.dataset, dropped['rows in'] - 1)
    rows = source.convert(files, problem, dropped)
    source.write(cfg.out_dir, f'{cfg.dataset}.jsonl', rows, dropped=dropped, **about)
    if cfg.dataset != 'openr1':
        return

    left_out = Counter()

    def traces(row):
        out = problem_row(row, cfg.dataset, left_out['rows in'] - 1)
        return trace_rows(row, out, cfg.traces)
    found = source.convert(files, traces, left_out)
    rows = itertools.chain.from_iterable(found)
    source.write(cfg.out_dir, 'openr1_sft.jsonl', rows, dropped=left_out, **about)


if __name__ == '__main__':
    run(main, Config)
