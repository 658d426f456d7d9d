"""
GSM8K (grade-school word problems, MIT licence) as files for reinforcement learning and fine-tuning.

    pip install -e '.[data]'
    python data/gsm8k/prepare.py                            # downloads openai/gsm8k
    python data/gsm8k/prepare.py --source=path/to/folder    # with train.jsonl and test.jsonl

writes to out_dir
    train.jsonl, test.jsonl   {"prompt": [user: question], "answer": "42", "task": "math",
                               "id": "gsm8k/train/0"}
    sft.jsonl                 {"messages": [user: question, assistant: solution of the training
                               row], "answer", "task", "id"}
and beside each a manifest: source, licence, hash, rows in and out.
The assistant's turn is <think>, the written solution without its <<48/2=24>> calculator marks,
</think>, then <answer>42</answer>. Answers lose their thousands separators. Training rows are
shuffled by the seed, test rows keep their order. A row that is not a question with a solution
ending in "#### number" stops it, named by file and line.
"""
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # run as a script from anywhere
from configurator import run
from data import source


@dataclass
class Config:
    out_dir: str = 'data/gsm8k'   # folder for train.jsonl, test.jsonl and sft.jsonl
    source: str | None = None     # folder with the original train.jsonl and test.jsonl; None
                                  # downloads them
    revision: str = 'main'        # revision of openai/gsm8k on the hub
    seed: int = 1                 # order of the training rows


def originals(cfg: Config, split: str) -> tuple[str, str, list[dict]]:
    """The name and the path of the file a split comes from, and its rows with question and
    answer."""
    if cfg.source is not None:
        path = Path(cfg.source) / f'{split}.jsonl'
        if path.resolve() == (Path(cfg.out_dir) / path.name).resolve():
            raise ValueError(f'{path} would be overwritten: choose another out_dir')
        return str(path), str(path), source.read_rows(path, require=('question', 'answer'))
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("the hub has GSM8K as parquet: pip install -e '.[data]', or give a folder "
                         'with its .jsonl files as --source=') from error
    [(name, path)] = source.find(None, ('openai/gsm8k', f'main/{split}-*.parquet'), cfg.revision)
    return name, path, pyarrow.parquet.read_table(path).to_pylist()


SOLUTION = re.compile(r'(.*\S)\s*\n#### (-?\d+|-?\d{1,3}(?:,\d{3})+)\s*', re.DOTALL)


def convert(row: dict, name: str) -> tuple[dict, dict]:
    """A row of GSM8K -> (RL row, SFT row). ValueError says what is wrong with it."""
    question = row.get('question')
    answer = row.get('answer')
    has_text = isinstance(question, str) and question.strip()
    if not has_text or not isinstance(answer, str):
        raise ValueError('question and answer must be strings with text in them')
    match = SOLUTION.fullmatch(answer)
    if match is None:
        raise ValueError('the answer must be a solution and a last line "#### number", it ends in '
                         f'{answer[-40:]!r}')
    solution = re.sub(r'<<[^<>]*>>', '', match[1])
    number = match[2].replace(',', '')
    if '<<' in solution or '>>' in solution:
        raise ValueError('a calculator mark <<...>> in the answer is not closed')

    user = {'role': 'user', 'content': question.strip()}
    text = f'<think>\n{solution.strip()}\n</think>\n<answer>{number}</answer>'
    about = {'answer': number, 'task': 'math', 'id': name}
    rl = {'prompt': [user], **about}
    sft = {'messages': [user, {'role': 'assistant', 'content': text}], **about}
    return rl, sft


def convert_split(cfg: Config, split: str) -> tuple[tuple[str, str], list[tuple[dict, dict]]]:
    """-> (name and path of the file), [(RL row, SFT row), ...]"""
    name, path, rows = originals(cfg, split)
    pairs = []
    for number, row in enumerate(rows, 1):
        try:
            pairs.append(convert(row, f'gsm8k/{split}/{number - 1}'))
        except ValueError as error:
            raise ValueError(f'{name}:{number}: {error}') from error
    return (name, path), pairs


def check_held_out(train: list[dict], test: list[dict]):
    """ValueError where a question of the test is one of the training rows."""
    seen = {row['prompt'][0]['content']: row['id'] for row in train}
    for row in test:
        question = row['prompt'][0]['content']
        if question in seen:
            raise ValueError(f'{row["id"]} is the same question as {seen[question]}: no held-out '
                             'test')


def main(cfg: Config):
    train_file, train = convert_split(cfg, 'train')
    test_file, test = convert_split(cfg, 'test')
    check_held_out([rl for rl, _ in train], [rl for rl, _ in test])
    random.Random(cfg.seed).shuffle(train)
    parts = [
        ('train.jsonl', train_file, [rl for rl, _ in train]),
        ('test.jsonl', test_file, [rl for rl, _ in test]),
        ('sft.jsonl', train_file, [sft for _, sft in train]),
    ]
    for name, file, rows in parts:
        source.write(cfg.out_dir, name, rows, files=[file], dropped=Counter(), licence='MIT',
                     source=cfg.source or f'openai/gsm8k@{cfg.revision}',
                     example=name != 'test.jsonl')


if __name__ == '__main__':
    run(main, Config)
