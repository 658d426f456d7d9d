"""
Reasoning traces of a teacher as a file for distillation (supervised fine-tuning).

    pip install -e '.[data]'
    python data/distill/prepare.py         # Mixture-of-Thoughts
    python data/distill/prepare.py --source=out/teacher.jsonl --name=own    # own traces, from
                                           # data/teacher.py or evaluate.py

The hub's open-r1/Mixture-of-Thoughts (Apache-2.0) holds 349,317 traces of DeepSeek-R1 in
mathematics, code and science; `subset` takes one of the three. As a source also do, row by row,
    {"messages": [..., {"role": "assistant", "content": "<think>...</think>..."}]}
                                           evaluate.py, Mixture-of-Thoughts, OpenR1
    the same with "reasoning_content", "reasoning" or "thinking" beside the content, with content in
    parts, or as ShareGPT's {"conversations": [{"from": "human", "value": ...}, ...]}
    {"prompt": chat or text, "reasoning": ..., "content": ...}
                                           data/teacher.py
    {"problem": ..., "gtruth_answer": ..., "message_thinking": ..., "message_content": ...}
                                           logs of other projects
    {"prompt": ..., "samples": [{"response": ...}, ...]}
                                           evaluate.py without keep; one row a sample
writes to out_dir
    NAME.jsonl   {"messages": [..., assistant: "<think>\\nreasoning\\n</think>\\n\\nanswer"],
                  "task", "answer", "id"}
and its manifest. "task", "answer" and what else a reward needs are kept where the source has them,
so that data/filter.py can verify the traces. Rows without reasoning, without an answer after it
(cut short), with a finish_reason other than the model's own end, or with the tags of the reasoning
anywhere else are left out and counted; what is malformed stops it, named by file and line.
"""
import itertools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # run as a script from anywhere
from configurator import run
from data import source, teacher
from graders.rows import is_answer
from rewards import check_answer

REPO = 'open-r1/Mixture-of-Thoughts'
KEPT = ('task', 'answer', 'choices', 'numbers', 'target', 'language', 'tests', 'entry_point',
        'setup', 'asserts', 'question', 'source', 'rewards', 'pass_rate', 'form', 'starter',
        'seconds', 'partial', 'tolerance')


@dataclass
class Config:
    source: str | None = None       # file or folder with traces; None downloads Mixture-of-Thoughts
    subset: Literal['all', 'math', 'code', 'science'] = 'all'   # of Mixture-of-Thoughts
    revision: str = 'main'          # its revision on the hub
    name: str = 'traces'            # the file is called so, and its rows
    task: str | None = None         # task of rows that have an answer but no task
    licence: str = 'Apache-2.0'     # for the manifest
    out_dir: str = 'data/distill'   # folder for the file


def traces_of(row: dict):
    """Yields (messages before the trace, reasoning, answer) of each trace in the row; reasoning
    None: still within the answer."""
    if row.get('messages') is not None or row.get('conversations') is not None:
        chat = [with_reasoning(message) for message in source.chat_of(row, 'messages')]
        if chat[-1]['role'] != 'assistant' or len(chat) < 2:
            raise ValueError("the last message must be an assistant's, after at least one other")
        yield chat[:-1], None, chat[-1]['content']
    elif 'reasoning' in row or 'content' in row:
        chat = source.chat_of(row, 'prompt')
        yield chat, row.get('reasoning') or '', row.get('content') or ''
    elif 'samples' in row:
        chat = source.chat_of(row, 'prompt')
        if not isinstance(row['samples'], list):
            raise ValueError("'samples' must be a list")
        for sample in row['samples']:
            yield chat, None, row.get('prefill', '') + source.text_of(sample, 'response')
    else:
        chat = [{'role': 'user', 'content': source.text_of(row, 'problem', 'question')}]
        yield chat, row.get('message_thinking') or '', row.get('message_content') or ''


def with_reasoning(message: dict) -> dict:
    """The message; an assistant's reasoning from beside its content goes into the content."""
    beside = any(message.get(key) for key in source.REASONING_KEYS)
    if message['role'] != 'assistant' or not beside:
        return message
    reasoning, answer = source.parts_of(message)
    return {'role': 'assistant', 'content': f'<think>\n{reasoning}\n</think>\n\n{answer}'}


def split_trace(text: str) -> tuple[str, str]:
    """'<think>reasoning</think>answer', the first tag may be missing (templates write it)
    -> (reasoning, answer)"""
    reasoning, closed, answer = text.partition('</think>')
    if not closed:
        raise source.Skip('no reasoning' if '<think>' not in text else 'cut short in the reasoning')
    return reasoning.strip().removeprefix('<think>'), answer


def trace_row(row: dict, chat: list, reasoning: str | None, answer: str) -> dict:
    """The SFT row of one trace, without its id. Skip where it is no whole trace."""
    if not isinstance(answer, str) or not isinstance(reasoning, str | None):
        raise ValueError('reasoning and content must be strings')
    reason = row.get('finish_reason')
    if reason is not None and str(reason).lower() not in teacher.ENDED:
        raise source.Skip('cut short')
    if reasoning is None:
        reasoning, answer = split_trace(answer)
    if not reasoning.strip():
        raise source.Skip('no reasoning')
    if not answer.strip():
        raise source.Skip('no answer after the reasoning')
    for tag in ('<think>', '</think>'):
        if tag in reasoning or tag in answer:
            raise source.Skip('tags of the reasoning inside it or after it')

    messages = [{'role': m['role'], 'content': m['content']} for m in chat]
    text = f'<think>\n{reasoning.strip()}\n</think>\n\n{answer.strip()}'
    messages.append({'role': 'assistant', 'content': text})
    out = {'messages': messages}
    for key in KEPT:
        if row.get(key) is not None:
            out[key] = row[key]
    if 'gtruth_answer' in row:
        if not is_answer(row['gtruth_answer']):
            raise ValueError("'gtruth_answer' must be text or a number, not "
                             f'{row["gtruth_answer"]!r}')
        out['answer'] = str(row['gtruth_answer'])
    return out


def rows_of(row: dict, number: int, cfg: Config, dropped: Counter) -> list[dict]:
    """The SFT rows of the whole traces in a row; the others are counted in dropped."""
    name = number if row.get('id') is None else row['id']
    several = len(row.get('samples') or ()) > 1
    found = []
    for i, (chat, reasoning, answer) in enumerate(traces_of(row)):
        try:
            out = trace_row(row, chat, reasoning, answer)
        except source.Skip as reason:
            dropped[str(reason)] += 1
            continue
        if cfg.task and 'answer' in out:
            out.setdefault('task', cfg.task)
        check_answer(out)
        out['id'] = f'{cfg.name}/{name}/{i}' if several else f'{cfg.name}/{name}'
        found.append(out)
    return found


def main(cfg: Config):
    files = source.find(cfg.source, (REPO, f'{cfg.subset}/train-*.parquet'), cfg.revision)
    dropped = Counter()

    def traces(row):
        return rows_of(row, dropped['rows in'] - 1, cfg, dropped)
    found = source.convert(files, traces, dropped)
    rows = itertools.chain.from_iterable(found)
    source.write(cfg.out_dir, f'{cfg.name}.jsonl', rows, files=files, dropped=dropped,
                 licence=cfg.licence, source=cfg.source or f'{REPO}@{cfg.revision}')


if __name__ == '__main__':
    run(main, Config)
