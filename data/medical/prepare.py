"""
Multiple choice in medicine and science as files for reinforcement learning and evaluation.

    pip install -e '.[data]'                               # for parquet
    python data/medical/prepare.py --dataset=medmcqa       # downloads it
    python data/medical/prepare.py --dataset=pubmedqa --source=path/to/folder    # or a file

dataset     default hub source              licence     what
medmcqa     openlifescienceai/medmcqa       MIT         Indian medical entrance exams, four options
pubmedqa    qiaojin/PubMedQA                MIT         1,000 abstracts: does it follow, yes, no or
                                                        maybe?
medqa       GBaker/MedQA-USMLE-4-options    MIT         United States medical licensing exams, four
                                                        options
gpqa        Idavidrein/gpqa                 CC-BY-4.0   198 graduate questions in physics,
                                                        chemistry and biology (ask for access first;
                                                        keep its questions out of the web)

writes to out_dir
    DATASET.jsonl    {"prompt": [user: question and options "A. ..."],
                      "question": question and options without the letters (what data/filter.py
                      compares; pubmedqa: the question), "choices": [...], "answer": "B",
                      "task": "choice", "id": ...}
and its manifest (source, licence, hash, rows in and out, reasons).
A split is chosen by `split` where the data set has several. pubmedqa in its original form: a folder
with ori_pqal.json and test_ground_truth.json, whose ids are the split "test", all others "train".
The options of gpqa, whose right one comes first there, are put in an order drawn from seed and
question. Rows without a right answer, with an empty option or with two equal ones are left out and
counted; what is malformed stops it, named by file and line.
"""
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # run as a script from anywhere
from configurator import run
from data import source

# dataset -> (hub source, its files, licence)
HUB = {
    'medmcqa': ('openlifescienceai/medmcqa', 'data/{split}-*.parquet', 'MIT'),
    'pubmedqa': ('qiaojin/PubMedQA', 'pqa_labeled/train-*.parquet', 'MIT'),
    'medqa': ('GBaker/MedQA-USMLE-4-options', 'phrases_no_exclude_{split}.jsonl', 'MIT'),
    'gpqa': ('Idavidrein/gpqa', 'gpqa_diamond.csv', 'CC-BY-4.0'),
}
LETTERS = 'ABCDE'
VERDICTS = ['yes', 'no', 'maybe']


@dataclass
class Config:
    dataset: Literal['medmcqa', 'pubmedqa', 'medqa', 'gpqa'] = 'medmcqa'   # which one
    source: str | None = None      # file or folder with its rows; None downloads it
    revision: str = 'main'         # revision of the data set on the hub
    split: str = 'train'           # medmcqa: train, validation; medqa: train, test; pubmedqa:
                                   # train, test, all
    out_dir: str = 'data/medical'  # folder for the files
    seed: int = 1                  # order of the options of gpqa


def choice_row(question: str, choices: list[str], right: int, name: str, context: str = '',
               subject=None) -> dict:
    """The row of a question whose options are `choices`, of which number `right` (from 0) is the
    answer."""
    if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(c, str) for c in choices):
        raise ValueError(f'the options must be 2 to {len(LETTERS)} strings, not {choices!r}')
    choices = [c.strip() for c in choices]
    if not all(choices):
        raise source.Skip('an empty option')
    if not 0 <= right < len(choices):
        raise ValueError(f'option {right} (from 0) cannot be right: there are {len(choices)}')
    if len({c.casefold() for c in choices}) < len(choices):
        raise source.Skip('two equal options')

    listed = ''.join(f'\n{letter}. {choice}' for letter, choice in zip(LETTERS, choices))
    row = {
        'prompt': [{'role': 'user', 'content': f'{context}{question}\n{listed}'}],
        'question': question if context else '\n'.join([question, *choices]),
        'choices': choices,
        'answer': LETTERS[right],
        'task': 'choice',
        'id': name,
    }
    if subject:
        row['subject'] = subject
    return row


# ---- A row of each data set ----

def medmcqa_base(files) -> int:
    """What the first option is called in "cop": 1 in the original files, 0 in the hub's. Told by
    the values that occur."""
    seen = {row.get('cop') for _, row in source.read(files)}
    if 0 in seen and 4 in seen or not seen & {0, 4}:
        raise ValueError(f'{files[0][0]}: "cop" takes the values {sorted(map(str, seen))}: neither '
                         '0 to 3 nor 1 to 4')
    return int(4 in seen)


def medmcqa(row: dict, base: int) -> dict:
    question = source.text_of(row, 'question')
    right = row.get('cop')
    if right is None or right == -1:
        raise source.Skip('no answer')
    if not isinstance(right, int):
        raise ValueError(f'"cop" must be the number of the right option, not {right!r}')
    choices = [str(row.get(key) or '') for key in ('opa', 'opb', 'opc', 'opd')]
    name = f'medmcqa/{source.text_of(row, "id")}'
    return choice_row(question, choices, right - base, name, subject=row.get('subject_name'))


def pubmedqa(row: dict) -> dict:
    question = source.text_of(row, 'QUESTION', 'question')
    answer = source.text_of(row, 'final_decision')
    contexts = row.get('CONTEXTS') or (row.get('context') or {}).get('contexts')
    is_list = isinstance(contexts, list) and contexts
    if not is_list or not all(isinstance(c, str) for c in contexts):
        raise ValueError('the contexts must be a list of strings')
    if answer not in VERDICTS:
        raise ValueError(f'final_decision must be yes, no or maybe, not {answer!r}')
    name = str(row.get('pubid', row.get('id', '')))
    context = '\n'.join(contexts) + '\n\n'
    return choice_row(question, VERDICTS, VERDICTS.index(answer), f'pubmedqa/{name}', context)


def medqa(row: dict, number: int) -> dict:
    question = source.text_of(row, 'question')
    options = row.get('options')
    if not isinstance(options, dict) or list(options) != list(LETTERS[:len(options)]):
        raise ValueError(f'the options must be an object with the keys A, B, ..., not {options!r}')
    right = row.get('answer_idx')
    if not right:
        right = next((key for key, text in options.items() if text == row.get('answer')), None)
    if right not in options or row.get('answer', options[right]) != options[right]:
        raise ValueError(f'the answer {row.get("answer")!r} ({right}) is none of the options')
    return choice_row(question, list(options.values()), LETTERS.index(right), f'medqa/{number}',
                      subject=row.get('meta_info'))


def gpqa(row: dict, seed: int) -> dict:
    question = source.text_of(row, 'Question')
    wrong = [row.get(f'Incorrect Answer {i}') for i in (1, 2, 3)]
    choices = [row.get('Correct Answer'), *wrong]
    order = list(range(4))
    random.Random(f'{seed} {question}').shuffle(order)
    name = f'gpqa/{source.text_of(row, "Record ID")}'
    return choice_row(question, [choices[i] for i in order], order.index(0), name,
                      subject=row.get('High-level domain'))


# ---- All rows ----

def pubmedqa_test_ids(cfg: Config) -> set | None:
    """The ids of the test split; None when all rows are wanted, as of a single file."""
    folder = Path(cfg.source) if cfg.source else None
    if cfg.split == 'all' or folder and folder.is_file():
        return None
    if cfg.split not in ('train', 'test'):
        raise ValueError(f'pubmedqa has the splits train, test and all, not {cfg.split!r}')
    path = folder / 'test_ground_truth.json' if folder else None
    if path is None or not path.exists():
        raise ValueError('the split of pubmedqa is named by test_ground_truth.json of '
                         'github.com/pubmedqa/pubmedqa: give a folder with it and ori_pqal.json as '
                         '--source=, or take --split=all')
    ids = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(ids, dict) or not ids:
        raise ValueError(f'{path}:1: must be an object {{id: decision}}')
    return set(ids)


def converter(cfg: Config, files, test_ids: set | None, dropped: Counter):
    """The function that makes a row of one of the data set's."""
    if cfg.dataset == 'gpqa':
        return lambda row: gpqa(row, cfg.seed)
    if cfg.dataset == 'medqa':
        return lambda row: medqa(row, dropped['rows in'] - 1)
    if cfg.dataset == 'medmcqa':
        base = medmcqa_base(files)
        return lambda row: medmcqa(row, base)

    def of_split(row):
        out = pubmedqa(row)
        if test_ids is not None:
            is_test = out['id'].split('/')[1] in test_ids
            if is_test != (cfg.split == 'test'):
                raise source.Skip('of the other split')
        return out
    return of_split


def main(cfg: Config):
    repo, pattern, licence = HUB[cfg.dataset]
    given = cfg.source
    test_ids = None
    if cfg.dataset == 'pubmedqa':
        test_ids = pubmedqa_test_ids(cfg)
        if given and Path(given).is_dir():
            given = str(Path(given) / 'ori_pqal.json')
    files = source.find(given, (repo, pattern.format(split=cfg.split)), cfg.revision)
    dropped = Counter()
    rows = source.convert(files, converter(cfg, files, test_ids, dropped), dropped)
    name = 'gpqa.jsonl' if cfg.dataset == 'gpqa' else f'{cfg.dataset}_{cfg.split}.jsonl'
    source.write(cfg.out_dir, name, rows, files=files, dropped=dropped, licence=licence,
                 source=cfg.source or f'{repo}@{cfg.revision}')


if __name__ == '__main__':
    run(main, Config)
