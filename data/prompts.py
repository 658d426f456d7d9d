"""
From the problems of a file to what the model reads: prompts as token ids, and token ids as text.
"""

import sys
from itertools import groupby

from configurator import first_rank
from data.source import at_row, chat_of
from progress import Bar


def instructed(row, text):
    """-> the row with `text` as the last line of what the user says last; text='': the row"""
    if not text:
        return row
    prompt = row['prompt']
    if isinstance(prompt, str):
        return {**row, 'prompt': f'{prompt}\n{text}'}
    *before, last = prompt
    last = {**last, 'content': f'{last["content"]}\n{text}'}
    return {**row, 'prompt': [*before, last]}


def encode_prompts(tokenizer, rows, prefill=''):
    """rows: with "prompt", messages or text. prefill: text that the assistant's turn starts with,
    after what the template starts it with.
    -> token ids of each prompt; the rows, with both of those texts under "prefill", where the
    rewards look for it"""
    all_ids = []
    prefilled = []
    for row in rows:
        messages = row['prompt']
        if not isinstance(messages, list):
            messages = [{'role': 'user', 'content': messages}]
        ids, _ = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        all_ids.append(ids + tokenizer.encode_assistant(prefill))
        prefilled.append({**row, 'prefill': tokenizer.generation_prefill(messages) + prefill})
    return all_ids, prefilled


def fitting(tokenizer, path, rows, context, new, prefill='', long='error', key='max_new_tokens',
            switch='long_prompts'):
    """-> numbers, from 0, of the rows of a file whose prompts leave room for `new` tokens in a
    context of so many.

    Other rows are an error, or with long='drop' left out with a line on stderr. ValueError names
    file, row and tokens of the first of them, also where no row is left; and the row that the
    template refuses. key, switch: the settings that `new` and `long` come from."""
    lengths = prompt_lengths(tokenizer, path, rows, prefill)
    kept = [i for i, length in enumerate(lengths) if length + new <= context]
    if len(kept) == len(rows):
        return kept

    first = next(i for i, length in enumerate(lengths) if length + new > context)
    message = (f'{path}, row {first + 1}: the prompt has {lengths[first]} tokens, and {key}={new} '
               f'leaves room for {max(0, context - new)} in the context of {context}')
    count = f'{len(rows) - len(kept)} of {len(rows)} rows are too long'
    if not kept:
        raise ValueError(f'{message} ({count}): shorten or remove such rows, lower {key}')
    if long != 'drop':
        raise ValueError(f'{message} ({count}): shorten or remove such rows, lower {key}, '
                         f"or set {switch}='drop'")
    if first_rank():
        print(f'{message}; {count} and dropped', file=sys.stderr)
    return kept


def prompt_lengths(tokenizer, path, rows, prefill):
    """-> tokens of each row's prompt, with the prefill. ValueError names the row that the template
    refuses."""
    added = len(tokenizer.encode_assistant(prefill))
    lengths = []
    with Bar(f'measuring {path}', len(rows)) as bar:
        for number, row in enumerate(rows, 1):
            with at_row(path, number):
                ids, _ = tokenizer.apply_chat_template(chat_of(row, 'prompt'), True)
            lengths.append(len(ids) + added)
            bar.update()
    return lengths


def visible(tokenizer, ids):
    """-> text of token ids. ⟦ ⟧ stand around control tokens, not around text that looks so."""
    control = set(tokenizer.special_tokens.values())
    parts = []
    for is_control, run in groupby(ids, control.__contains__):
        if is_control:
            parts += [f'⟦{tokenizer.decode([i])}⟧' for i in run]
        else:
            parts.append(tokenizer.decode(list(run)))   # together: a letter may be several tokens
    return ''.join(parts)
