"""
Multiple choice in medicine and science as files for reinforcement learning and evaluation.

    python data/medical/prepare.py --dataset=medmcqa                              # downloads it; parquet: pip install -e '.[data]'
    python data/medical/prepare.py --dataset=pubmedqa --source=path/to/folder     # a local file or folder

dataset     default hub source                licence              what
medmcqa     openlifescienceai/medmcqa         MIT                  Indian medical entrance exams, four options
pubmedqa    qiaojin/PubMedQA                  MIT                  1,000 abstracts: does it follow, yes, no or maybe?
medqa       GBaker/MedQA-USMLE-4-options      MIT                  United States medical licensing exams, four options
gpqa        Idavidrein/gpqa                   CC-BY-4.0            198 graduate questions in physics, chemistry and biology
                                                                   (ask for access first; keep its questions out of the web)

writes to out_dir
    DATASET.jsonl    {"prompt": [user: question and options "A. ..."], "question": question and options without the letters (what
                      data/filter.py compares; pubmedqa: the question), "choices": [...], "answer": "B", "task": "choice", "id": ...}
and its manifest (source, licence, hash, rows in and out, reasons).
A split is chosen by `split` where the data set has several. pubmedqa in its original form: a folder with ori_pqal.json and
test_ground_truth.json, whose ids are the split "test", all others "train". The options of gpqa, whose right one comes first
there, are put in an order drawn from seed and question. Rows without a right answer, with an empty
option or with two equal ones are left out and counted;
what is malformed stops it, named by file and line.
"""
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script from anywhere
from configurator import run  # noqa: E402
from data import source  # noqa: E402

HUB = {'medmcqa': ('openlifescienceai/medmcqa', 'data/{split}-*.parquet', 'MIT'),
       'pubmedqa': ('qiaojin/PubMedQA', 'pqa_labeled/train-*.parquet', 'MIT'),
       'medqa': ('GBaker/MedQA-USMLE-4-options', 'phrases_no_exclude_{split}.jsonl', 'MIT'),
       'gpqa': ('Idavidrein/gpqa', 'gpqa_diamond.csv', 'CC-BY-4.0')}
LETTERS = 'ABCDE'


@dataclass
class Config:
    dataset: Literal['medmcqa', 'pubmedqa', 'medqa', 'gpqa'] = 'medmcqa'   # which one
    source: str | None = None      # file or folder with its rows; None downloads it
    revision: str = 'main'         # revision of the data set on the hub
    split: str = 'train'           # medmcqa: train, validation; medqa: train, test; pubmedqa: train, test, all
    out_dir: str = 'data/medical'  # folder for the files
    seed: int = 1                  # order of the options of gpqa


def choice_row(question: str, choices: list[str], right: int, name: str, context: str = '', **more) -> dict:
    """The row of a question whose options are `choices`, of which number `right` (from 0) is the answer."""
    if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(c, str) for c in choices):
        raise ValueError(f'the options must be 2 to {len(LETTERS)} strings, not {choices!r}')
    if not all(c.strip() for c in choices):
        raise source.Skip('an empty option')
    if not 0 <= right < len(choices):
        raise ValueError(f'option {right} (from 0) cannot be right: there are {len(choices)}')
    choices = [c.strip() for c in choices]
    if len({c.casefold() for c in choices}) < len(choices):
        raise source.Skip('two equal options')
    text = ''.join(f'\n{letter}. {choice}' for letter, choice in zip(LETTERS, choices))
    compared = question if context else '\n'.join([question, *choices])
    return {'prompt': [{'role': 'user', 'content': f'{context}{question}\n{text}'}], 'question': compared, 'choices': choices,
            'answer': LETTERS[right], 'task': 'choice', 'id': name, **{k: v for k, v in more.items() if v}}


def medmcqa_base(files) -> int:
    """What the first option is called in "cop": 1 in the original files, 0 in the hub's. Told by the values that occur."""
    seen = {row.get('cop') for _, row in source.read(files)}
    if 0 in seen and 4 in seen or not seen & {0, 4}:
        raise ValueError(f'{files[0][0]}: "cop" takes the values {sorted(map(str, seen))}: neither 0 to 3 nor 1 to 4')
    return int(4 in seen)


def medmcqa(row: dict, base: int) -> dict:
    question, right = source.text_of(row, 'question'), row.get('cop')
    if right is None or right == -1:
        raise source.Skip('no answer')
    if not isinstance(right, int):
        raise ValueError(f'"cop" must be the number of the right option, not {right!r}')
    return choice_row(question, [str(row.get(f'op{k}') or '') for k in 'abcd'], right - base, f'medmcqa/{source.text_of(row, "id")}',
                      subject=row.get('subject_name'))


def pubmedqa(row: dict) -> dict:
    question, answer = source.text_of(row, 'QUESTION', 'question'), source.text_of(row, 'final_decision')
    contexts = row.get('CONTEXTS') or (row.get('context') or {}).get('contexts')
    if not isinstance(contexts, list) or not contexts or not all(isinstance(c, str) for c in contexts):
        raise ValueError('the contexts must be a list of strings')
    if answer not in ('yes', 'no', 'maybe'):
        raise ValueError(f'final_decision must be yes, no or maybe, not {answer!r}')
    name = str(row.get('pubid', row.get('id', '')))
    return choice_row(question, ['yes', 'no', 'maybe'], ['yes', 'no', 'maybe'].index(answer), f'pubmedqa/{name}',
                      context='\n'.join(contexts) + '\n\n')


def medqa(row: dict, number: int) -> dict:
    question, options = source.text_of(row, 'question'), row.get('options')
    if not isinstance(options, dict) or list(options) != list(LETTERS[:len(options)]):
        raise ValueError(f'the options must be an object with the keys A, B, ..., not {options!r}')
    right = row.get('answer_idx') or next((k for k, v in options.items() if v == row.get('answer')), None)
    if right not in options or row.get('answer', options[right]) != options[right]:
        raise ValueError(f'the answer {row.get("answer")!r} ({right}) is none of the options')
    return choice_row(question, list(options.values()), LETTERS.index(right), f'medqa/{number}', subject=row.get('meta_info'))


def gpqa(row: dict, seed: int) -> dict:
    question = source.text_of(row, 'Question')
    wrong = [row.get(f'Incorrect Answer {i}') for i in (1, 2, 3)]
    choices = [row.get('Correct Answer'), *wrong]
    order = list(range(4))
    random.Random(f'{seed} {question}').shuffle(order)
    return choice_row(question, [choices[i] for i in order], order.index(0), f'gpqa/{source.text_of(row, "Record ID")}',
                      subject=row.get('High-level domain'))


def pubmedqa_test_ids(cfg: Config) -> set | None:
    """The ids of the test split; None when all rows are wanted, as of a single file."""
    folder = Path(cfg.source) if cfg.source else None
    if cfg.split == 'all' or folder and folder.is_file():
        return None
    if cfg.split not in ('train', 'test'):
        raise ValueError(f'pubmedqa has the splits train, test and all, not {cfg.split!r}')
    path = folder / 'test_ground_truth.json' if folder else None
    if path is None or not path.exists():
        raise ValueError('the split of pubmedqa is named by test_ground_truth.json of github.com/pubmedqa/pubmedqa: give a folder '
                         'with it and ori_pqal.json as --source=, or take --split=all')
    ids = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(ids, dict) or not ids:
        raise ValueError(f'{path}:1: must be an object {{id: decision}}')
    return set(ids)


def main(cfg: Config):
    repo, pattern, licence = HUB[cfg.dataset]
    dropped = Counter()
    if cfg.dataset == 'pubmedqa':
        test = pubmedqa_test_ids(cfg)
        folder = Path(cfg.source) if cfg.source else None
        files = source.find(str(folder / 'ori_pqal.json') if folder and folder.is_dir() else cfg.source, (repo, pattern), cfg.revision)

        def function(row):
            out = pubmedqa(row)
            if test is not None and (out['id'].split('/')[1] in test) != (cfg.split == 'test'):
                raise source.Skip('of the other split')
            return out
    else:
        files = source.find(cfg.source, (repo, pattern.format(split=cfg.split)), cfg.revision)
        base = medmcqa_base(files) if cfg.dataset == 'medmcqa' else 0
        function = {'medmcqa': lambda row: medmcqa(row, base), 'medqa': lambda row: medqa(row, dropped['rows in'] - 1),
                    'gpqa': lambda row: gpqa(row, cfg.seed)}[cfg.dataset]
    name = f'{cfg.dataset}.jsonl' if cfg.dataset == 'gpqa' else f'{cfg.dataset}_{cfg.split}.jsonl'
    source.write(cfg.out_dir, name, source.convert(files, function, dropped), files=files, dropped=dropped, licence=licence,
                 source=cfg.source or f'{repo}@{cfg.revision}')


if __name__ == '__main__':
    run(main, Config)
