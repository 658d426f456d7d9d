"""
Rows as other projects publish them, in; rows as the scripts here read them, out. What every prepare.py shares.

    files = find('path/to/file-or-folder', hub=('openai/gsm8k', 'main/train-*.parquet'))    # None instead of a path: the hub
    for where, row in read(files): ...                           # where: 'train.jsonl:7', for messages
    write(out_dir, {'train.jsonl': rows}, licence='MIT', ...)    # the files, a manifest beside each, a summary, examples

read() knows .jsonl, .json (a list, a dict of rows by id, or one object a line), .csv and .parquet, each also .gz but the last.
"""
import codecs
import contextlib
import csv
import fnmatch
import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from pathlib import Path

NO_PYARROW = "parquet needs pyarrow: pip install -e '.[data]', or give --source= a .jsonl, .json or .csv file"
KINDS = ('.jsonl', '.json', '.csv', '.parquet')
ROLES = ('system', 'user', 'assistant', 'tool')
# ShareGPT's names of those who speak, and the roles that they stand for
SPEAKERS = {
    'human': 'user', 'user': 'user',
    'gpt': 'assistant', 'assistant': 'assistant', 'model': 'assistant', 'chatgpt': 'assistant',
    'bot': 'assistant', 'bing': 'assistant', 'bard': 'assistant',
    'system': 'system', 'tool': 'tool', 'function': 'tool', 'observation': 'tool',
    'function_response': 'tool', 'tool_response': 'tool', 'ipython': 'tool',
}
REASONING_KEYS = ('reasoning_content', 'reasoning', 'thinking', 'reasoning_details')
MOST_CSV_CHARACTERS = 2**31 - 1   # of a field; the module's limit of 131,072 is less than a trace


def made_by(path) -> str | None:
    """The command that writes a file or folder of this name: make r1, or a prepare.py."""
    path, run = Path(path), os.environ.get('RUN', 'out/r1')
    if Path(run) in (path, *path.parents):
        return 'make r1' if run == 'out/r1' else f'make r1 RUN={run}'
    kind, (dataset, _, split) = path.parent.name, path.name.partition('.')[0].partition('_')
    script, flags = path.parent / 'prepare.py', ''
    if path.parts[0] == 'out' and '.jsonl' in path.suffixes:    # as in out/gsm8k/train.jsonl
        script, flags = Path('data') / kind / 'prepare.py', f' --out_dir={path.parent}'
    if not script.exists():
        return None
    flags += f' --dataset={dataset}' if kind in ('math', 'code', 'medical') else ''
    flags += f' --split={split}' if split and kind in ('code', 'medical') else ''
    return f'python {script}{flags}'


def missing(path, key: str = '') -> FileNotFoundError:
    """The error of what is not there: the command that makes it, or the key that names another."""
    command, other = made_by(path), f'set {key}' if key else ''
    todo = ', or '.join(filter(None, (f'run {command}' if command else '', other)))
    return FileNotFoundError(f'{path} does not exist' + (f': {todo}' if todo else ''))


@contextlib.contextmanager
def at_row(path, number):
    """A ValueError raised within names the file and the row, counted from 1."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f'{path}, row {number}: {error}') from error


class Skip(Exception):
    """Raised by a row's conversion: well-formed, but not wanted. The message is the reason it is counted under."""


def find(source: str | None, hub: tuple[str, str], revision: str = 'main') -> list[tuple[str, str]]:
    """
    -> [(name for messages, path)], sorted by name. source: a file, or a folder that holds the files; None downloads those of
    the data set hub[0] whose name fits the pattern hub[1]. In a folder the pattern's file names are looked for first, then
    every file of a known kind. ValueError when there is none.
    """
    if source is None:
        if hub[1].endswith('.parquet'):
            need_pyarrow()
        from huggingface_hub import HfApi, hf_hub_download
        try:
            names = sorted(fnmatch.filter(HfApi().list_repo_files(hub[0], repo_type='dataset', revision=revision), hub[1]))
            paths = [hf_hub_download(hub[0], name, repo_type='dataset', revision=revision) for name in names]
        except Exception as error:   # the client's and its HTTP library's, which differ by version
            raise ValueError(f'{hub[0]} cannot be downloaded ({type(error).__name__}: {error}); give a local copy as --source=') from error
        if not names:
            raise ValueError(f'{hub[0]} at revision {revision} has no file {hub[1]}; download what you want and give it as --source=')
        return [(f'{hub[0]}/{name}', path) for name, path in zip(names, paths)]
    path = Path(source)
    if not path.exists():
        raise ValueError(f'{source}: no such file or folder')
    if path.is_file():
        return [(str(path), str(path))]
    every = sorted(p for p in path.iterdir() if kind(p) in KINDS)
    fitting = [p for p in every if fnmatch.fnmatch(p.name, Path(hub[1]).name)] or every
    if not fitting:
        raise ValueError(f'{source}: no {", ".join(KINDS)} file in this folder')
    return [(str(p), str(p)) for p in fitting]


def kind(path) -> str:
    return Path(str(path).removesuffix('.gz')).suffix


def need_pyarrow():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(NO_PYARROW) from error
    return pyarrow.parquet


def read(files: list[tuple[str, str]]):
    """Yields (where, row), row a dict, one at a time. ValueError names file and line (parquet: row) of what is damaged."""
    for name, path in files:
        if kind(path) == '.parquet':
            table, number = need_pyarrow().ParquetFile(path), 0
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f'{name}: row {number}', row
            continue
        try:
            opener, newline = gzip.open if str(path).endswith('.gz') else open, '' if kind(path) == '.csv' else None
            # utf-8-sig skips a byte order mark
            with opener(path, 'rt', encoding='utf-8-sig', newline=newline) as f:
                yield from {'.json': read_json, '.csv': read_csv}.get(kind(path), read_jsonl)(name, f)
        except FileNotFoundError:
            raise missing(path) from None
        except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
            raise ValueError(f'{name}: damaged: {error}') from error


def read_jsonl(name, lines, first=1):
    for number, line in enumerate(lines, first):
        if line.strip():
            try:
                row = from_json(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f'{name}:{number}: no JSON: {error}') from None
            if not isinstance(row, dict):
                raise ValueError(f'{name}:{number}: a row must be a JSON object, not {type(row).__name__}')
            yield f'{name}:{number}', row


def from_json(text: str):
    """The value of a JSON text, its strings as valid_text makes them. ValueError: it is no JSON."""
    value = json.loads(text)
    return valid_text(value) if HALF.search(text) else value


HALF = re.compile(r'\\u[dD][89a-fA-F]')   # half a surrogate pair, as JSON escapes it


def valid_text(value):
    """The value with halves of surrogate pairs joined; a half that stands alone, which UTF-8 cannot
    hold, becomes U+FFFD."""
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    if isinstance(value, list):
        return [valid_text(item) for item in value]
    if isinstance(value, dict):
        return {valid_text(key): valid_text(item) for key, item in value.items()}
    return value


def read_rows(path, require: tuple = ('messages',)) -> list[dict]:
    """
    The rows of a .jsonl or .jsonl.gz file, one JSON object a line, so row i is line i + 1.
    require: keys each row must have, not null; `messages` must be a chat, `prompt` a chat or text,
    where a chat is a non-empty list of {"role": one of ROLES, "content": str}; content in parts is
    joined, and ShareGPT's "conversations" become "messages" (chat_of).
    Raises ValueError with file and line for a row that is anything else, for a file without rows or
    a damaged .gz. FileNotFoundError names the command that makes the file, where one does.
    """
    rows = []
    for number, line in enumerate(lines_of(path), 1):
        try:
            rows.append(parse_row(line, require))
        except ValueError as error:
            raise ValueError(f'{path}:{number}: {error}') from error
    if not rows:
        raise ValueError(f'{path}: no rows in it')
    return rows


def lines_of(path):
    """Yields the lines of a .jsonl or .jsonl.gz file as bytes, less a byte order mark; errors as
    read_rows."""
    path, number = Path(path), 0
    try:
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
            for number, line in enumerate(file, 1):
                yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except FileNotFoundError:
        raise missing(path) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f'{path}: damaged after line {number}: {error}') from error


def parse_row(line: bytes, require: tuple) -> dict:
    """One row; ValueError says what is wrong with it."""
    if not line.strip():
        raise ValueError('blank line')
    try:
        row = from_json(line.rstrip().decode('utf-8'))
    except json.JSONDecodeError as error:
        raise ValueError(f'no JSON: {error.msg} at column {error.colno}') from error
    except RecursionError:
        raise ValueError('no row: nested too deep') from None
    if not isinstance(row, dict):
        raise ValueError(f'a row must be a JSON object, not {type(row).__name__}')
    for key in require:
        named = 'conversations' if key == 'messages' and row.get(key) is None else key
        if row.get(named) is None:
            keys = ', '.join(map(repr, row)) or 'no keys'
            raise ValueError(f'{key!r} is missing; the row has {keys}')
    for key in {'messages', 'prompt'}.intersection(require):
        chat = chat_of(row, key)
        if not isinstance(row.get(key), str):   # a prompt that is text stays so
            row[key] = chat
    return row


def read_json(name, f):
    """A list of rows, a dict of rows (whose key becomes "id" where the row has none), or one object a line."""
    head, second = f.readline(), f.readline()
    try:
        whole = json.loads(head)
    except json.JSONDecodeError:
        whole = None
    if isinstance(whole, dict) and (second.strip() or not all(isinstance(v, dict) for v in whole.values())):   # .jsonl by another name
        yield from read_jsonl(name, [head, second])
        yield from read_jsonl(name, f, 3)
        return
    text, at, line = head + second + f.read(), 0, 1
    decoder, opener = json.JSONDecoder(), text.lstrip()[:1]
    halves = bool(HALF.search(text))
    if opener not in ('[', '{'):
        raise ValueError(f'{name}:1: neither a JSON list nor an object')

    def skip(characters):
        nonlocal at, line
        start = at
        while at < len(text) and text[at] in characters:
            at += 1
        line += text.count('\n', start, at)

    def value():
        nonlocal at, line
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{name}: no JSON: {error}') from None
        number, line, at = line, line + text.count('\n', at, end), end
        return number, valid_text(found) if halves else found

    skip(' \t\r\n')
    at += 1
    while True:
        skip(' \t\r\n,')
        if text[at:at + 1] in (']', '}'):
            return
        number, row = value()
        if opener == '{':
            key = row
            skip(' \t\r\n:')
            number, row = value()
            row = {'id': key, **row} if isinstance(row, dict) else row
        if not isinstance(row, dict):
            raise ValueError(f'{name}:{number}: a row must be a JSON object, not {type(row).__name__}')
        yield f'{name}:{number}', row


def read_csv(name, f):
    csv.field_size_limit(MOST_CSV_CHARACTERS)
    reader = csv.DictReader(f)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f'{name}:{reader.line_num}: {len(reader.fieldnames)} columns in the head, more or fewer in this row')
            yield f'{name}:{reader.line_num}', row
    except csv.Error as error:
        raise ValueError(f'{name}:{reader.line_num}: {error}') from None


def convert(files, function, dropped: Counter):
    """Yields function(row) of every row; Skip is counted in dropped, a ValueError gets file and line."""
    for where, row in read(files):
        dropped['rows in'] += 1
        try:
            yield function(row)
        except Skip as reason:
            dropped[str(reason)] += 1
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from error


def text_of(row: dict, *keys: str) -> str:
    """The first of the keys that the row has, a string with text in it, stripped. ValueError otherwise."""
    for key in keys:
        if row.get(key) is not None:
            if not isinstance(row[key], str) or not row[key].strip():
                raise ValueError(f'{key!r} must be a string with text in it, not {str(row[key])[:40]!r}')
            return row[key].strip()
    raise ValueError(f'{" or ".join(map(repr, keys))} is missing; the row has {", ".join(map(repr, row)) or "no keys"}')


def chat_of(row: dict, key: str) -> list[dict]:
    """
    row[key] as a non-empty list of {"role": one of ROLES, "content": text}. A "prompt" may be the
    user's text; content may be a list of parts, whose texts are joined (the assistant's thoughts as
    "reasoning_content"); where "messages" are missing, ShareGPT's "conversations" stand for them.
    ValueError names what is anything else.
    """
    chat = row.get(key)
    if key == 'prompt' and isinstance(chat, str):
        return [{'role': 'user', 'content': chat}]
    if key == 'messages' and chat is None and row.get('conversations') is not None:
        return conversation_of(row)
    if not isinstance(chat, list) or not chat:
        raise ValueError(f'{key!r} must be a list of messages')
    messages = []
    for i, message in enumerate(chat):
        role = message.get('role') if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f'{key}[{i}] must be {{"role": ..., "content": ...}} with a role of {", ".join(ROLES)}')
        content = message.get('content')
        if isinstance(content, list):
            thoughts = [part for part in content if is_thought(part)] if role == 'assistant' else []
            said = [part for part in content if part not in thoughts]
            message = {**message, 'content': joined_parts(said, f'{key}[{i}]')}
            if thoughts:
                message['reasoning_content'] = text_in(thoughts)
        elif not isinstance(content, str):
            raise ValueError(f'{key}[{i}] must have a string as content')
        messages.append(message)
    return messages


def joined_parts(parts: list, where: str) -> str:
    """[{"type": "text", "text": ...}, ...], or strings among them -> the texts in a row.
    ValueError: a part is no text."""
    texts = []
    for i, part in enumerate(parts):
        text, place = part, f'{where}: part {i} of its content'
        if isinstance(part, dict):
            if part.get('type', 'text') not in ('text', 'input_text', 'output_text'):
                raise ValueError(f'{place} is of type {part["type"]!r}; only text can be read')
            text = part.get('text')
        if not isinstance(text, str):
            raise ValueError(f'{place} must be {{"type": "text", "text": ...}} or a string')
        texts.append(text)
    return ''.join(texts)


def conversation_of(row: dict) -> list[dict]:
    """ShareGPT's {"conversations": [{"from": "human", "value": ...}, ...], "system": ...} as
    messages. ValueError otherwise."""
    turns = row['conversations']
    if not isinstance(turns, list) or not turns:
        raise ValueError("'conversations' must be a list of turns")
    if isinstance(turns[0], dict) and 'role' in turns[0]:   # the hub's messages by ShareGPT's name
        messages = chat_of({'messages': turns}, 'messages')
    else:
        messages = []
        for i, turn in enumerate(turns):
            place = f'conversations[{i}]'
            speaker = turn.get('from') if isinstance(turn, dict) else None
            if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
                raise ValueError(f'{place} must be {{"from": ..., "value": ...}} with from of '
                                 + ', '.join(SPEAKERS))
            if not isinstance(turn.get('value'), str):
                raise ValueError(f'{place} must have a string as value')
            message = {'role': SPEAKERS[speaker.lower()], 'content': turn['value']}
            messages.append(message | {key: turn[key] for key in REASONING_KEYS if turn.get(key)})
    system = row.get('system')
    if system is not None and not isinstance(system, str):
        raise ValueError("'system' must be a string")
    if system and messages[0]['role'] != 'system':
        messages = [{'role': 'system', 'content': system}, *messages]
    return messages


def parts_of(message: dict) -> tuple[str, str]:
    """-> (reasoning, content) of an assistant's message, whatever keys hold them; '' if none do."""
    content, thought = message.get('content') or '', ''
    if isinstance(content, list):   # {"type": "thinking", "thinking": ...}, {"type": "text", ...}
        thought = text_in([part for part in content if is_thought(part)])
        content = text_in([part for part in content if not is_thought(part)])
    beside = [text_in(message.get(key)) for key in REASONING_KEYS]
    thought = next((text for text in beside if text.strip()), thought)
    if '</think>' in content and (not thought or content.lstrip().startswith('<think>')):
        inside, content = content.split('</think>', 1)
        thought = thought or inside.strip().removeprefix('<think>')
    elif content.lstrip().startswith('<think>'):
        thought, content = thought or content.lstrip().removeprefix('<think>'), ''
    return thought.strip(), content.strip()


def is_thought(part) -> bool:
    return isinstance(part, dict) and part.get('type') in ('thinking', 'reasoning')


def text_in(part) -> str:
    """The text in a string, a part of a message, or a list of such."""
    if isinstance(part, list):
        return ''.join(map(text_in, part))
    if isinstance(part, dict):
        keys = ('text', 'thinking', 'reasoning', 'summary', 'content')
        return next((text_in(part[key]) for key in keys if part.get(key)), '')
    return part if isinstance(part, str) else ''


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path, value):
    """Complete or not at all, like every file here: written beside its place, then moved there."""
    temp = Path(f'{path}.tmp')
    temp.write_text(json.dumps(value, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')
    os.replace(temp, path)


def manifest_path(path) -> Path:
    """train.jsonl -> train.manifest.json: where rows come from, their licence and hash, how many were dropped and why."""
    return Path(path).with_suffix('.manifest.json')


def write(out_dir, name: str, rows, *, files: list, dropped: Counter, licence: str, source: str, example: bool = True) -> int:
    """
    The rows as out_dir/name with its manifest; prints counts and the first three rows; returns how many rows there are. rows may be a
    generator: only one is held at a time. dropped: as filled by convert(), read after the last row. ValueError without any row,
    and where a file to be written is one of those read.
    """
    out, count, first = Path(out_dir) / name, 0, []
    if any(Path(path).resolve() == out.resolve() for _, path in files):
        raise ValueError(f'{out} would be overwritten: choose another out_dir')
    temp = out.with_name(out.name + '.tmp')
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temp, 'w', encoding='utf-8') as f:
            for row in rows:
                first += [row] if count < 3 else []
                f.write(json.dumps(row, ensure_ascii=False) + '\n')
                count += 1
        if not count:
            raise ValueError(f'{", ".join(name for name, _ in files) or source}: no row is left for {name}'
                             + ''.join(f'; {n} {reason}' for reason, n in dropped.items()))
        os.replace(temp, out)
    finally:
        temp.unlink(missing_ok=True)
    reasons = {reason: n for reason, n in dropped.items() if reason != 'rows in'}
    write_json(manifest_path(out), {
        'source': source, 'licence': licence, 'read': {name: sha256(path) for name, path in files}, 'sha256': sha256(out),
        'rows_in': dropped['rows in'] or count, 'rows_out': count, 'dropped': reasons})
    print(f'{out}: {count} rows, {out.stat().st_size:,} bytes' + ''.join(f'; {n} dropped: {reason}' for reason, n in reasons.items()))
    if example:
        for text in (json.dumps(first[0], ensure_ascii=False, indent=2), *(json.dumps(row, ensure_ascii=False) for row in first[1:])):
            print(text if len(text) <= 3000 else text[:3000] + ' ...')
    return count
