"""
Traces of a teacher behind any OpenAI-compatible server, through huggingface-hub's InferenceClient.

    python data/teacher.py --endpoint=http://localhost:8000/v1 --model=Qwen3-32B \\
        --data="['data/math/math.jsonl']" --out=out/own.jsonl
    python evaluate.py --endpoint=http://localhost:8000/v1 --checkpoint=Qwen3-32B \\
        --data=... --out=... --max_new_tokens=32768

The key of the server is read from the environment variable named by `key_variable`, and nothing
else is sent in its place. Each answer is a line of `out`: the row, and
    "sample"      its number among the row's n
    "key"         what tells it from others: the row's id (without one: a hash of its prompt), then
                  # and the number
    "reasoning"   from reasoning_content, reasoning, thinking, reasoning_details, the parts of a
                  list, or <think>...</think>
    "content"     the answer after it; both are text
    "finish_reason", "model", "usage" (tokens as the server counts them, or null)
data/distill/prepare.py makes rows for fine-tuning of them, data/filter.py --verify=1 grades those.

Requests that time out, break off (a stream must end with a finish_reason), or are answered by 408,
409, 425, 429 or 5xx are repeated after `backoff` seconds, twice that, four times ..., at most 60,
or what Retry-After says; other answers of the 4xx kind fail the row, and 401, 402, 403, 404 and
405, which would meet every row, stop the run.

Only an answer that the model ended (ENDED) or that reached max_tokens (CUT) is written, the
latter with the finish_reason 'length', by which data/distill/prepare.py leaves it out. Where
the server failed (FAILED) the request is repeated; any other finish_reason, such as
content_filter, fails the row. A line is written by one thread, whole, once the answer is
complete. Run again, whatever is in `out` is not asked for again, but for failed rows, and for
cut ones where max_tokens has grown; a line cut by a crash is removed. A second process on the
same file is refused.
"""
import concurrent.futures
import fcntl
import hashlib
import itertools
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # run as a script from anywhere
from configurator import run

import huggingface_hub

from data import source
from progress import Bar, tell

STOPS_ALL = (401, 402, 403, 404, 405)
TRY_AGAIN = (408, 409, 425, 429)
# What servers call an answer's end, in small letters: the model's own, max_tokens', a failure.
ENDED = ('stop', 'eos', 'eos_token', 'end_turn', 'stop_sequence', 'complete', 'completed')
CUT = ('length', 'max_tokens', 'max_length', 'max_output_tokens', 'max_completion_tokens',
       'model_length')
FAILED = ('abort', 'aborted', 'error', 'cancelled', 'timeout', 'insufficient_system_resource')


@dataclass
class Config:
    # server and files
    endpoint: str                 # base URL of the server, which /chat/completions is appended to
    model: str                    # name of the model there
    data: list[str] = field(default_factory=list)   # files with rows that have a "prompt"
    out: str = 'out/teacher.jsonl'         # answers, appended to
    limit: int = 0                         # only the first so many rows; 0: all
    key_variable: str = 'OPENAI_API_KEY'   # environment variable with the key of the server

    # what is asked for
    n: int = 1                             # answers a row
    temperature: float | None = 0.6        # of the samples; None, here and below: not sent
    top_p: float | None = 0.95             # nucleus
    max_tokens: int | None = 32768         # longest answer, reasoning included
    seed: int | None = 1                   # each request has its own, drawn from this and its key
    system: str = ''                       # system message put first
    stream: bool = True                    # False: one piece; some servers cut long answers off
                                           # then
    extra: dict = field(default_factory=dict)   # more fields of the request

    # patience
    concurrency: int = 16                  # requests at a time
    timeout: float = 600.0                 # seconds without a sign of life, after which a request
                                           # is repeated
    deadline: float = 3600.0               # seconds a whole answer may take
    retries: int = 8                       # repetitions of a request
    backoff: float = 1.0                   # seconds before the first
    max_failures: int = 100                # stop when more rows than this have failed

    # what it costs
    price_in: float = 0.0                  # price of a million tokens of prompt
    price_out: float = 0.0                 # price of a million tokens of answer


class Stopped(ValueError):
    """The server refuses in a way that every row would meet, or too many rows failed."""


class Refused(Exception):
    """The server refuses this row."""


# ---- One request ----

def request(cfg: Config, chat: list, seed: int | None, stop: threading.Event) -> dict:
    """One answer: {"reasoning", "content", "finish_reason", "usage"}. Raises whatever went wrong;
    ConnectionError: it broke off."""
    end = time.monotonic() + cfg.deadline
    client = huggingface_hub.InferenceClient(
        base_url=cfg.endpoint,
        # without a key of its own the client would send the user's token of the hub
        api_key=os.environ.get(cfg.key_variable) or 'none',
        timeout=min(cfg.timeout, cfg.deadline),
    )
    settings = {
        'model': cfg.model,
        'stream': cfg.stream,
        'temperature': cfg.temperature,
        'top_p': cfg.top_p,
        'max_tokens': cfg.max_tokens,
        'seed': seed,
        'extra_body': cfg.extra,
        'stream_options': {'include_usage': True} if cfg.stream else None,
    }
    message = {}
    usage = reason = None
    with client:
        answer = client.chat_completion(chat, **settings)
        for chunk in without_the_end(answer) if cfg.stream else [answer]:
            usage = chunk.usage or usage
            # choices as attributes: as items they have lost the fields that the client does not
            # know
            for choice in chunk.choices or ():
                delta = choice.delta if cfg.stream else choice.message
                add_delta(message, delta or {})
                reason = choice.finish_reason or reason
            if stop.is_set():
                raise ConnectionError('stopped')
            if time.monotonic() > end:
                raise ConnectionError(f'no complete answer in deadline={cfg.deadline} s')

    reason = checked_reason(reason)
    reasoning, content = source.parts_of(source.valid_text(message))
    if not reasoning and not content:
        raise ConnectionError('an empty answer')
    counts = None
    if usage:
        counts = {key: value for key, value in usage.items() if value is not None}
    return {'reasoning': reasoning, 'content': content, 'finish_reason': reason, 'model': cfg.model,
            'max_tokens': cfg.max_tokens, 'usage': counts}


def without_the_end(chunks):
    """The client takes the end of a stream, where it is "data:[DONE]" without the space, for a
    chunk that is no JSON."""
    try:
        yield from chunks
    except json.JSONDecodeError as error:
        if error.doc != '[DONE]':
            raise


def add_delta(message: dict, delta: dict):
    """Appends to the message what came next of it: texts, or lists of parts."""
    for key in ('content', *source.REASONING_KEYS):
        piece = delta.get(key)
        if not piece:
            continue
        have = message.get(key)
        if isinstance(piece, list) or isinstance(have, list):
            message[key] = as_parts(have) + as_parts(piece)
        else:
            message[key] = (have or '') + piece


def as_parts(content) -> list:
    if isinstance(content, list):
        return content
    return [{'type': 'text', 'text': content}] if content else []


def checked_reason(reason: str | None) -> str:
    """-> 'length' for what CUT holds, the reason itself for what ENDED holds. ConnectionError: no
    whole answer, ask again. Refused: the server will not give one."""
    if reason is None:
        raise ConnectionError('the answer broke off: no finish_reason')
    known = str(reason).lower()
    if known in CUT:
        return 'length'
    if known in FAILED:
        raise ConnectionError(f'the answer broke off: finish_reason {reason!r}')
    if known not in ENDED:
        raise Refused(f'finish_reason {reason!r}: not an answer that the model ended')
    return reason


def reach_offline(endpoint: str):
    """HF_HUB_OFFLINE=1 has huggingface-hub refuse all addresses: all but the endpoint now."""
    session = huggingface_hub.get_session()

    def elsewhere(hook):
        def checked(request):
            ours = str(type(request.url)(endpoint))   # spelled as the request's: without a port 80
            return None if str(request.url).startswith(ours) else hook(request)
        return checked
    hooks = session.event_hooks
    session.event_hooks = hooks | {'request': [elsewhere(hook) for hook in hooks['request']]}


TOLD = set()   # kinds of faults, of which the first is told


def patiently(cfg: Config, chat: list, seed: int | None,
              stop: threading.Event) -> tuple[dict, Counter]:
    """request(), repeated -> (answer, faults by kind). Raises Stopped or Refused."""
    faults = Counter()
    for attempt in itertools.count():
        try:
            return request(cfg, chat, seed, stop), faults
        except Refused:
            raise
        except Exception as error:   # the client's exceptions differ by its version
            response = getattr(error, 'response', None)
            status = getattr(response, 'status_code', None)
            message = ' '.join(str(error).split())[:300]
            if status in STOPS_ALL:
                raise Stopped(f'{cfg.endpoint} answers {status}: {message}') from error
            if status is not None and status < 500 and status not in TRY_AGAIN:
                raise Refused(f'{status}: {message}') from error

            kind = str(status or type(error).__name__)
            faults[kind] += 1
            if kind not in TOLD:
                TOLD.add(kind)
                tell(f'{cfg.endpoint}: {kind}: {message}; such requests are sent again, '
                     f'{cfg.retries} times')
            if attempt >= cfg.retries:
                raise Refused(f'{attempt + 1} attempts failed, the last with '
                              f'{type(error).__name__}: {message}') from error
            if stop.wait(pause(cfg, attempt, response)):
                raise Refused('stopped') from error


def pause(cfg: Config, attempt: int, response) -> float:
    """Seconds before a request is repeated."""
    seconds = min(60.0, cfg.backoff * 2 ** attempt) * random.uniform(0.5, 1.0)
    after = response.headers.get('retry-after', '') if response is not None else ''
    if after.isdigit():
        seconds = max(seconds, min(300.0, float(after)))
    return seconds


# ---- All rows ----

class Request(NamedTuple):
    """An answer that is wanted: sample number `sample` of the row."""
    key: str
    sample: int
    row: dict
    chat: list
    seed: int | None


def requests_of(rows, cfg: Config):
    """Yields the Request of every answer that is wanted; the same for the same rows."""
    seen = Counter()
    for number, row in enumerate(itertools.islice(rows, cfg.limit or None), 1):
        try:
            chat = source.chat_of(row, 'prompt')
        except ValueError as error:
            raise ValueError(f'row {number}: {error}') from error
        if row.get('id') is not None:
            name = str(row['id'])
        else:
            name = hashlib.sha256(json.dumps(chat).encode()).hexdigest()[:16]
        seen[name] += 1
        if seen[name] > 1:
            name += f'~{seen[name]}'   # the same id or prompt once more: rows of their own
        if cfg.system:
            chat = [{'role': 'system', 'content': cfg.system}, *chat]
        for sample in range(cfg.n):
            key = f'{name}#{sample}'
            yield Request(key, sample, row, chat, seed_of(cfg, key))


def seed_of(cfg: Config, key: str) -> int | None:
    if cfg.seed is None:
        return None
    digest = hashlib.sha256(f'{cfg.seed} {key}'.encode()).digest()
    return int.from_bytes(digest[:4], 'big') >> 1


def answered(path: Path, model: str, max_tokens: int | None) -> set[str]:
    """Keys of the answers in the file, less those that a limit below max_tokens (None: no limit)
    cut short; cuts off a last line that a crash left unfinished."""
    keys = set()
    good = 0   # bytes of whole lines
    with open(path, 'rb+') as f:
        for number, line in enumerate(f, 1):
            if not line.endswith(b'\n'):
                f.truncate(good)
                break
            try:
                row = json.loads(line)
                cut = row.get('finish_reason') == 'length' and row.get('max_tokens') is not None
                if not cut or max_tokens is not None and max_tokens <= row['max_tokens']:
                    keys.add(row['key'])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f'{path}:{number}: no answer of this script '
                                 f'({type(error).__name__}: {error}); choose another out') from None
            if row.get('model') != model:
                raise ValueError(f'{path}:{number}: an answer of {row.get("model")!r}, not of '
                                 f'{model!r}; choose another out')
            good += len(line)
    return keys


class Tally:
    """What became of the requests so far."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.counts = Counter()
        self.faults = Counter()
        self.failed = {}     # key -> message
        self.fatal = None    # the Stopped that ends the run
        self.stop = threading.Event()   # set at the end: no waiting for retries

    def answer(self, answer: dict, faults: Counter):
        usage = answer['usage'] or {}
        self.counts['answers'] += 1
        if not usage:
            self.counts['without_usage'] += 1
        if answer['finish_reason'] == 'length':
            self.counts['cut'] += 1
        for key in ('prompt_tokens', 'completion_tokens'):
            self.counts[key] += usage.get(key) or 0
        self.faults += faults

    def failure(self, key: str, error: Exception):
        if isinstance(error, Stopped):
            self.fatal = self.fatal or error
        else:
            self.failed[key] = str(error)
        if len(self.failed) > self.cfg.max_failures and not self.fatal:
            self.fatal = Stopped(f'{len(self.failed)} rows failed, more than max_failures='
                                 f'{self.cfg.max_failures}; the last: {error}')
        if self.fatal:
            self.stop.set()

    def troubles(self) -> str:
        """-> '2 failed, 7 faults overcome', for the bar"""
        parts = []
        if self.failed:
            parts.append(f'{len(self.failed)} failed')
        if self.faults:
            parts.append(f'{self.faults.total()} faults overcome')
        return ', '.join(parts)

    def numbers(self) -> dict:
        """As generate_remote returns them."""
        names = ('answers', 'already', 'prompt_tokens', 'completion_tokens', 'without_usage', 'cut')
        counts = {name: self.counts[name] for name in names}
        price = (counts['prompt_tokens'] * self.cfg.price_in
                 + counts['completion_tokens'] * self.cfg.price_out)
        return {**counts, 'failed': self.failed, 'faults': dict(self.faults), 'cost': price / 1e6}


def generate_remote(rows, endpoint: str, model: str, out: str, count: int | None = None,
                    progress: bool = True, **settings) -> dict:
    """
    Answers to every row ("prompt": text or chat), appended to the file `out`; count: how many rows
    there are, where that is known, for the time left; settings: fields of Config. Returns counts:
    {"answers", "already", "failed": {key: message}, "faults": {kind: n}, "prompt_tokens",
    "completion_tokens", "without_usage", "cut": answers that ended at max_tokens, "cost"}; tokens
    and cost are of this run's answers.
    Stopped: the server refuses every row, or more than max_failures failed; what was answered by
    then is in the file.
    """
    cfg = Config(endpoint=endpoint, model=model, out=out, **settings)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    tally = Tally(cfg)
    with open(path, 'ab') as f, concurrent.futures.ThreadPoolExecutor(cfg.concurrency) as pool:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f'{path}: another process is writing to it') from None
        done = answered(path, model, cfg.max_tokens)
        reach_offline(endpoint)
        if count is not None:
            count = cfg.n * min(count, cfg.limit or count)
        with Bar(path.name, count, 'answers', show=progress) as bar:
            try:
                for answer in answers_to(requests_of(rows, cfg), done, cfg, tally, pool, bar):
                    f.write(json.dumps(answer, ensure_ascii=False).encode() + b'\n')
                    f.flush()
            finally:
                tally.stop.set()   # also on Ctrl-C
                os.fsync(f.fileno())
    if tally.fatal:
        raise tally.fatal
    return tally.numbers()


def answers_to(requests, done: set[str], cfg: Config, tally: Tally, pool, bar: Bar):
    """Yields the rows of answers as they come, of the requests whose key is not in `done`; all that
    happens is counted in the tally, and shown by the bar."""
    running = {}   # future -> Request
    while True:
        # 1. as many requests as may be under way
        while tally.fatal is None and len(running) < cfg.concurrency:
            wanted = next(requests, None)
            if wanted is None:
                break
            if wanted.key in done:
                tally.counts['already'] += 1
                bar.skip()
            else:
                future = pool.submit(patiently, cfg, wanted.chat, wanted.seed, tally.stop)
                running[future] = wanted
        if not running:
            return

        # 2. those that have ended
        ended, _ = concurrent.futures.wait(
            running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in ended:
            wanted = running.pop(future)
            try:
                answer, faults = future.result()
            except (Stopped, Refused) as error:
                tally.failure(wanted.key, error)
                bar.say(tally.troubles())
                bar.update()
                continue
            tally.answer(answer, faults)
            bar.say(tally.troubles())
            bar.update()
            yield {**wanted.row, 'key': wanted.key, 'sample': wanted.sample, **answer}


def main(cfg: Config):
    if not cfg.data:
        raise ValueError('no data: give files with rows that have a "prompt", '
                         '--data="[\'rows.jsonl\']"')
    settings = asdict(cfg)
    for key in ('data', 'endpoint', 'model', 'out'):
        settings.pop(key)
    numbers = generate_remote(rows_of(cfg.data), cfg.endpoint, cfg.model, cfg.out,
                              count_rows(cfg.data), **settings)
    report(numbers, cfg.out)


def from_sample(cfg, rows: list):
    """The same from a Config of evaluate.py, whose `remote` holds further settings of this one.
    Yields for each of the rows the list of its answers, once all are there."""
    settings = {
        'n': cfg.n,
        'temperature': cfg.temperature,
        'top_p': cfg.top_p,
        'max_tokens': cfg.max_new_tokens,
        'seed': cfg.seed,
        **cfg.remote,
    }
    numbers = generate_remote(rows, cfg.endpoint, cfg.checkpoint, cfg.out, len(rows), **settings)
    report(numbers, cfg.out)

    settings.pop('progress', None)
    asked = requests_of(rows, Config(cfg.endpoint, cfg.checkpoint, **settings))
    with open(cfg.out, encoding='utf-8') as f:
        answers = {answer['key']: answer for answer in map(json.loads, f)}
    for _ in rows:
        yield [answers[request.key] for request in itertools.islice(asked, settings['n'])]


def rows_of(paths: list[str]):
    for _, row in source.read([(path, path) for path in paths], show=False):
        yield row


def count_rows(paths: list[str]) -> int:
    """Reads them through once, so that the time left is known from the start, and no row is found
    damaged after a night of answers."""
    return sum(1 for _ in source.read([(path, path) for path in paths]))


def report(numbers: dict, out: str):
    """Prints what generate_remote returned; ValueError when rows failed."""
    print(f'{out}: {numbers["answers"]} answers, {numbers["already"]} were there already; '
          f'{numbers["prompt_tokens"]:,} tokens of prompt, {numbers["completion_tokens"]:,} of '
          f'answer ({numbers["without_usage"]} without counts, {numbers["cut"]} cut at '
          f'max_tokens); cost {numbers["cost"]:.4f}; faults overcome: '
          f'{numbers["faults"] or "none"}')
    if numbers['failed']:
        key, message = next(iter(numbers['failed'].items()))
        raise ValueError(f'{len(numbers["failed"])} rows failed, for example {key}: {message}; run '
                         'again to ask for them again')


if __name__ == '__main__':
    run(main, Config)
