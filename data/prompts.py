"""
From the problems of a file to what the model reads: prompts as token ids, and token ids as text.
"""
import sys
from itertools import groupby

from tqdm import tqdm

from configurator import first_rank
from data.source import at_row, chat_of


def instructed(row, text):
    """The row with `text` as a last line of what the user says last."""
    if not text:
        return row
    if isinstance(row['prompt'], str):
        return {**row, 'prompt': f'{row["prompt"]}\n{text}'}
    *before, last = row['prompt']
    return {**row, 'prompt': [*before, {**last, 'content': f'{last["content"]}\n{text}'}]}


def encode_prompts(tokenizer, rows, prefill=''):
    """rows with "prompt" (messages or text) -> token ids of each prompt, and the rows with what the
    assistant's turn starts with (the template's own prefill and `prefill`) under "prefill", where
    the rewards look for it."""
    ids, out = [], []
    for row in rows:
        messages = row['prompt']
        if not isinstance(messages, list):
            messages = [{'role': 'user', 'content': messages}]
        prompt, _ = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids.append(prompt + tokenizer.encode_assistant(prefill))
        out.append({**row, 'prefill': tokenizer.generation_prefill(messages) + prefill})
    return ids, out


def fitting(tokenizer, path, rows, context, new, prefill='', long='error', key='max_new_tokens',
            switch='long_prompts'):
    """-> numbers, from 0, of the rows whose prompts leave room for `new` tokens in the context.
    ValueError names file, row and tokens of one that does not; with long='drop' they are told and
    left out, and only where none is left that is an error; and the row that the template refuses.
    key, switch: the settings that `new` and `long` come from."""
    added, lengths = len(tokenizer.encode_assistant(prefill)), []
    bar = tqdm(rows, desc=f'measuring {path}', delay=3, leave=False, disable=not first_rank())
    for number, row in enumerate(bar, 1):
        with at_row(path, number):
            ids, _ = tokenizer.apply_chat_template(chat_of(row, 'prompt'), True)
        lengths.append(len(ids) + added)
    kept = [i for i, length in enumerate(lengths) if length + new <= context]
    if len(kept) < len(rows):
        i = next(i for i, length in enumerate(lengths) if length + new > context)
        told = (f'{path}, row {i + 1}: the prompt has {lengths[i]} tokens, and {key}={new} leaves '
                f'room for {max(0, context - new)} in the context of {context}')
        count = f'{len(rows) - len(kept)} of {len(rows)} rows are too long'
        if long != 'drop' or not kept:
            raise ValueError(f'{told} ({count}): shorten or remove such rows, lower {key}'
                             + (f", or set {switch}='drop'" if kept and long != 'drop' else ''))
        if first_rank():
            print(f'{told}; {count} and dropped', file=sys.stderr)
    return kept


def visible(tokenizer, ids):
    """Text of token ids; ⟦ ⟧ stand around control tokens, not around text that looks so."""
    control = set(tokenizer.special_tokens.values())
    return ''.join(''.join(f'⟦{tokenizer.decode([i])}⟧' for i in run) if special
                   else tokenizer.decode(list(run))
                   for special, run in groupby(ids, control.__contains__))
