"""
Rows as other projects publish them, in; rows as the scripts here read them, out. What every
prepare.py shares.

    files = find('path/to/file-or-folder', hub=('openai/gsm8k', 'main/train-*.parquet'))
    for where, row in read(files): ...         # where: 'train.jsonl:7', for messages
    dropped = Counter()
    rows = convert(files, function, dropped)   # function(row) of each, less those that it skips
    write('data/gsm8k', 'train.jsonl', rows, files=files, dropped=dropped, licence='MIT',
          source='openai/gsm8k@main')          # the file, its manifest, a summary, examples

read() knows .jsonl, .json (a list, a dict of rows by id, or one object a line), .csv and .parquet,
each also .gz but the last. read_rows() is for the scripts: JSONL alone, every row checked.
"""
import codecs
import contextlib
import csv
import fnmatch
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from pathlib import Path

from progress import Bar

NO_PYARROW = ("parquet needs pyarrow: pip install -e '.[data]', or give --source= a .jsonl, .json "
              'or .csv file')
KINDS = ('.jsonl', '.json', '.csv', '.parquet')
MOST_CSV_CHARACTERS = 2**31 - 1   # of a field; the module's limit of 131,072 is less than a trace

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


# ---- What error messages say ----

def made_by(path) -> str | None:
    """The command that writes a file or folder of this name: make r1, make smol, or a
    prepare.py."""
    path = Path(path)
    for recipe, usual in (('r1', 'out/r1'), ('smol', 'out/smol')):
        run = usual
        if os.environ.get('CHAIN', 'r1') == recipe:   # which the RUN of make is of
            run = os.environ.get('RUN', usual)
        if Path(run) in (path, *path.parents):
            return f'make {recipe}' if run == usual else f'make {recipe} RUN={run}'

    folder = path.parent.name
    dataset, _, split = path.name.partition('.')[0].partition('_')
    script = path.parent / 'prepare.py'
    flags = ''
    if path.parts[0] == 'out' and '.jsonl' in path.suffixes:   # as in out/gsm8k/train.jsonl
        script = Path('data') / folder / 'prepare.py'
        flags = f' --out_dir={path.parent}'
    if not script.exists():
        return None
    if folder in ('math', 'code', 'medical'):
        flags += f' --dataset={dataset}'
    if folder == 'words' and dataset == 'gsm8k':
        flags += ' --gsm8k=True'
    if split and folder in ('code', 'medical'):
        flags += f' --split={split}'
    return f'python {script}{flags}'


def missing(path, key: str = '') -> FileNotFoundError:
    """The error of what is not there: the command that makes it, or the key that names another."""
    command = made_by(path)
    remedies = []
    if command:
        remedies.append(f'run {command}')
    if key:
        remedies.append(f'set {key}')
    advice = ': ' + ', or '.join(remedies) if remedies else ''
    return FileNotFoundError(f'{path} does not exist{advice}')


@contextlib.contextmanager
def at_row(path, number):
    """A ValueError raised within names the file and the row, counted from 1."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f'{path}, row {number}: {error}') from error


def keys_in(row: dict) -> str:
    return ', '.join(map(repr, row)) or 'no keys'


# ---- Files of other projects ----

def find(source: str | None, hub: tuple[str, str], revision: str = 'main') -> list[tuple[str, str]]:
    """
    -> [(name for messages, path)], sorted by name. source: a file, or a folder that holds the
    files; None downloads those of the data set hub[0] whose name fits the pattern hub[1]. In a
    folder the pattern's file names are looked for first, then every file of a known kind.
    ValueError when there is none.
    """
    if source is None:
        return download(*hub, revision)
    path = Path(source)
    if not path.exists():
        raise ValueError(f'{source}: no such file or folder')
    if path.is_file():
        return [(str(path), str(path))]
    every = sorted(p for p in path.iterdir() if kind(p) in KINDS)
    pattern = Path(hub[1]).name
    found = [p for p in every if fnmatch.fnmatch(p.name, pattern)] or every
    if not found:
        raise ValueError(f'{source}: no {", ".join(KINDS)} file in this folder')
    return [(str(p), str(p)) for p in found]


def download(repo: str, pattern: str, revision: str) -> list[tuple[str, str]]:
    """As find, from the hub."""
    if pattern.endswith('.parquet'):
        need_pyarrow()
    from huggingface_hub import HfApi, hf_hub_download
    hub = {'repo_type': 'dataset', 'revision': revision}
    try:
        names = sorted(fnmatch.filter(HfApi().list_repo_files(repo, **hub), pattern))
        paths = [hf_hub_download(repo, name, **hub) for name in names]
    except Exception as error:   # the client's and its HTTP library's, which differ by version
        raise ValueError(f'{repo} cannot be downloaded ({type(error).__name__}: {error}); give a '
                         'local copy as --source=') from error
    if not names:
        raise ValueError(f'{repo} at revision {revision} has no file {pattern}; download what you '
                         'want and give it as --source=')
    return [(f'{repo}/{name}', path) for name, path in zip(names, paths)]


def kind(path) -> str:
    return Path(str(path).removesuffix('.gz')).suffix


def need_pyarrow():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(NO_PYARROW) from error
    return pyarrow.parquet


def read(files: list[tuple[str, str]], show: bool = True):
    """Yields (where, row), row a dict, one at a time. ValueError names file and line (parquet: row)
    of what is damaged. show: how far it is, in bytes of the files."""
    sizes = [os.path.getsize(path) for _, path in files if os.path.exists(path)]
    with Bar('reading', sum(sizes), 'B', show=show) as bar:
        for name, path in files:
            if kind(path) == '.parquet':
                yield from read_parquet(name, path, bar)
            else:
                yield from read_text(name, path, bar)


def read_parquet(name, path, bar):
    file = need_pyarrow().ParquetFile(path)
    number = 0
    for batch in file.iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield f'{name}: row {number}', row
        bar.update(os.path.getsize(path) * len(batch) // file.metadata.num_rows)


def read_text(name, path, bar):
    reader = {'.json': read_json, '.csv': read_csv}.get(kind(path), read_jsonl)
    newline = '' if reader is read_csv else None
    try:
        with open(path, 'rb') as file:
            # utf-8-sig skips a byte order mark
            how = {'encoding': 'utf-8-sig', 'newline': newline}
            if str(path).endswith('.gz'):
                text = gzip.open(file, 'rt', **how)
            else:
                text = io.TextIOWrapper(file, **how)
            at = 0
            for row in reader(name, text):
                yield row
                bar.update(file.tell() - at)
                at = file.tell()
    except FileNotFoundError:
        raise missing(path) from None
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f'{name}: damaged: {error}') from error


def checked_row(row, where: str) -> tuple[str, dict]:
    """-> (where, row); ValueError for a row that is no dict"""
    if not isinstance(row, dict):
        raise ValueError(f'{where}: a row must be a JSON object, not {type(row).__name__}')
    return where, row


def read_jsonl(name, lines, first=1):
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        try:
            row = from_json(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{name}:{number}: no JSON: {error}') from None
        yield checked_row(row, f'{name}:{number}')


def read_json(name, f):
    """A list of rows, a dict of rows (whose key becomes "id" where the row has none), or one object
    a line."""
    head = f.readline()
    second = f.readline()
    if is_jsonl(head, second):
        yield from read_jsonl(name, [head, second])
        yield from read_jsonl(name, f, 3)
        return

    text = head + second + f.read()
    opener = text.lstrip()[:1]
    if opener not in ('[', '{'):
        raise ValueError(f'{name}:1: neither a JSON list nor an object')
    values = JsonValues(name, text)
    values.skip(' \t\r\n')
    values.at += 1   # the opener
    while True:
        values.skip(' \t\r\n,')
        if values.at_end():
            return
        number, row = values.next()
        if opener == '{':
            key = row
            values.skip(' \t\r\n:')
            number, row = values.next()
            if isinstance(row, dict):
                row = {'id': key, **row}
        yield checked_row(row, f'{name}:{number}')


def is_jsonl(head: str, second: str) -> bool:
    """Whether the first two lines of a .json file show one row a line."""
    try:
        row = json.loads(head)
    except json.JSONDecodeError:
        return False
    if not isinstance(row, dict):
        return False
    return bool(second.strip()) or not all(isinstance(value, dict) for value in row.values())


class JsonValues:
    """Values of a JSON text, one at a time, and the line on which each begins."""

    def __init__(self, name: str, text: str):
        self.name = name
        self.text = text
        self.at = 0
        self.line = 1
        self.decoder = json.JSONDecoder()
        self.halves = bool(HALF.search(text))

    def move(self, end: int):
        self.line += self.text.count('\n', self.at, end)
        self.at = end

    def skip(self, characters: str):
        end = self.at
        while end < len(self.text) and self.text[end] in characters:
            end += 1
        self.move(end)

    def at_end(self) -> bool:
        return self.text[self.at:self.at + 1] in (']', '}')

    def next(self) -> tuple:
        """-> (number of its line, the value)"""
        try:
            value, end = self.decoder.raw_decode(self.text, self.at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{self.name}: no JSON: {error}') from None
        number = self.line
        self.move(end)
        return number, valid_text(value) if self.halves else value


def read_csv(name, f):
    csv.field_size_limit(MOST_CSV_CHARACTERS)
    reader = csv.DictReader(f)
    try:
        for row in reader:
            where = f'{name}:{reader.line_num}'
            if None in row or None in row.values():
                raise ValueError(f'{where}: {len(reader.fieldnames)} columns in the head, more or '
                                 'fewer in this row')
            yield where, row
    except csv.Error as error:
        raise ValueError(f'{name}:{reader.line_num}: {error}') from None


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


# ---- Rows for the scripts ----

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
    path = Path(path)
    opener = gzip.open if path.suffix == '.gz' else open
    number = 0
    try:
        with opener(path, 'rb') as file:
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
        stands_for_it = key == 'messages' and row.get('conversations') is not None
        if row.get(key) is None and not stands_for_it:
            raise ValueError(f'{key!r} is missing; the row has {keys_in(row)}')
    for key in {'messages', 'prompt'}.intersection(require):
        chat = chat_of(row, key)
        if not isinstance(row.get(key), str):   # a prompt that is text stays so
            row[key] = chat
    return row


# ---- Chats ----

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
    return [message_of(message, f'{key}[{i}]') for i, message in enumerate(chat)]


def message_of(message, where: str) -> dict:
    """The message with its content as text; ValueError if it is none."""
    role = message.get('role') if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f'{where} must be {{"role": ..., "content": ...}} with a role of '
                         f'{", ".join(ROLES)}')
    content = message.get('content')
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise ValueError(f'{where} must have a string as content')

    thoughts = []
    if role == 'assistant':
        thoughts = [part for part in content if is_thought(part)]
    said = [part for part in content if part not in thoughts]
    message = {**message, 'content': joined_parts(said, where)}
    if thoughts:
        message['reasoning_content'] = text_in(thoughts)
    return message


def joined_parts(parts: list, where: str) -> str:
    """[{"type": "text", "text": ...}, ...], or strings among them -> the texts in a row.
    ValueError: a part is no text."""
    texts = []
    for i, part in enumerate(parts):
        text = part
        place = f'{where}: part {i} of its content'
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
        messages = [message_by(turn, f'conversations[{i}]') for i, turn in enumerate(turns)]
    system = row.get('system')
    if system is not None and not isinstance(system, str):
        raise ValueError("'system' must be a string")
    if system and messages[0]['role'] != 'system':
        messages = [{'role': 'system', 'content': system}, *messages]
    return messages


def message_by(turn, where: str) -> dict:
    """A turn of ShareGPT's as a message; ValueError if it is none."""
    speaker = turn.get('from') if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
        raise ValueError(f'{where} must be {{"from": ..., "value": ...}} with from of '
                         + ', '.join(SPEAKERS))
    if not isinstance(turn.get('value'), str):
        raise ValueError(f'{where} must have a string as value')
    reasoning = {key: turn[key] for key in REASONING_KEYS if turn.get(key)}
    return {'role': SPEAKERS[speaker.lower()], 'content': turn['value'], **reasoning}


def parts_of(message: dict) -> tuple[str, str]:
    """-> (reasoning, content) of an assistant's message, whatever keys hold them; '' if none do."""
    content = message.get('content') or ''
    thought = ''
    if isinstance(content, list):   # {"type": "thinking", "thinking": ...}, {"type": "text", ...}
        thought = text_in([part for part in content if is_thought(part)])
        content = text_in([part for part in content if not is_thought(part)])
    beside = [text_in(message.get(key)) for key in REASONING_KEYS]
    thought = next((text for text in beside if text.strip()), thought)

    opens = content.lstrip().startswith('<think>')
    if '</think>' in content and (opens or not thought):
        inside, content = content.split('</think>', 1)
        thought = thought or inside.strip().removeprefix('<think>')
    elif opens:   # and never closes: all of it is reasoning
        thought = thought or content.lstrip().removeprefix('<think>')
        content = ''
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


# ---- What every prepare.py does ----

class Skip(Exception):
    """Raised by a row's conversion: well-formed, but not wanted. The message is the reason it is
    counted under."""


def convert(files, function, dropped: Counter):
    """Yields function(row) of every row; Skip is counted in dropped, a ValueError gets file and
    line."""
    for where, row in read(files):
        dropped['rows in'] += 1
        try:
            yield function(row)
        except Skip as reason:
            dropped[str(reason)] += 1
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from error


def text_of(row: dict, *keys: str) -> str:
    """The first of the keys that the row has, a string with text in it, stripped. ValueError
    otherwise."""
    for key in keys:
        text = row.get(key)
        if text is None:
            continue
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{key!r} must be a string with text in it, not {str(text)[:40]!r}')
        return text.strip()
    wanted = ' or '.join(map(repr, keys))
    raise ValueError(f'{wanted} is missing; the row has {keys_in(row)}')


def write(out_dir, name: str, rows, *, files: list, dropped: Counter, licence: str, source: str,
          example: bool = True) -> int:
    """
    The rows as out_dir/name with its manifest; prints counts and the first three rows; returns how
    many rows there are. rows may be a generator: only one is held at a time. dropped: as filled by
    convert(), read after the last row. ValueError without any row, and where a file to be written
    is one of those read.
    """
    out = Path(out_dir) / name
    if any(Path(path).resolve() == out.resolve() for _, path in files):
        raise ValueError(f'{out} would be overwritten: choose another out_dir')
    temp = out.with_name(out.name + '.tmp')
    out.parent.mkdir(parents=True, exist_ok=True)
    count, first = 0, []
    try:
        with open(temp, 'w', encoding='utf-8') as f:
            for row in rows:
                if count < 3:
                    first.append(row)
                f.write(json.dumps(row, ensure_ascii=False) + '\n')
                count += 1
        if not count:
            read_from = ', '.join(name for name, _ in files) or source
            told = ''.join(f'; {n} {reason}' for reason, n in dropped.items())
            raise ValueError(f'{read_from}: no row is left for {name}{told}')
        os.replace(temp, out)
    finally:
        temp.unlink(missing_ok=True)

    reasons = {reason: n for reason, n in dropped.items() if reason != 'rows in'}
    write_json(manifest_path(out), {
        'source': source,
        'licence': licence,
        'read': {name: sha256(path) for name, path in files},
        'sha256': sha256(out),
        'rows_in': dropped['rows in'] or count,
        'rows_out': count,
        'dropped': reasons,
    })
    told = ''.join(f'; {n} dropped: {reason}' for reason, n in reasons.items())
    print(f'{out}: {count} rows, {out.stat().st_size:,} bytes{told}')
    if example:
        print_examples(first)
    return count


def print_examples(rows: list[dict]):
    """Prints the first row on several lines, the others on one each."""
    for i, row in enumerate(rows):
        text = json.dumps(row, ensure_ascii=False, indent=2 if i == 0 else None)
        print(text if len(text) <= 3000 else text[:3000] + ' ...')


def manifest_path(path) -> Path:
    """train.jsonl -> train.manifest.json: where rows come from, their licence and hash, how many
    were dropped and why."""
    return Path(path).with_suffix('.manifest.json')


def write_json(path, value):
    """Complete or not at all, like every file here: written beside its place, then moved there."""
    temp = Path(f'{path}.tmp')
    temp.write_text(json.dumps(value, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')
    os.replace(temp, path)


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
