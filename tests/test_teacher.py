import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import progress
from data import teacher
from data.distill import prepare as distill
from data.source import parts_of
from data.teacher import Config, generate_remote

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ('429', '500', '503', 'timeout', 'cut', 'cut_before', 'reset', 'garbage',
          'error_in_stream', 'empty', 'no_finish')
STYLES = ('reasoning_content', 'reasoning', 'thinking', 'inline', 'inline_prefilled', 'details',
          'parts')


def message(style, thought, answer):
    """The message of a server that puts the reasoning where this style has it."""
    told = {'type': 'text', 'text': thought}
    styles = {
        'inline': {'content': f'<think>\n{thought}\n</think>\n\n{answer}'},
        'inline_prefilled': {'content': f'{thought}\n</think>\n{answer}'},
        'details': {'reasoning_details': [{**told, 'type': 'reasoning.text'}], 'content': answer},
        'parts': {'content': [{'type': 'thinking', 'thinking': [told]},
                              {'type': 'text', 'text': answer}]},
        'unspaced': {'content': answer},
        'surrogate': {'content': 'fine \ud83d'},
        'halves': {'content': 'fine 😀'},
    }
    return styles.get(style) or {style: thought, 'content': answer}


def deltas(whole):
    """The message in pieces, strings cut in the middle."""
    for key, value in whole.items():
        if isinstance(value, str):
            yield from ({key: value[:len(value) // 2]}, {key: value[len(value) // 2:]})
        else:
            yield from ({key: [part]} for part in value)


class Server(ThreadingHTTPServer):
    """Answers after the faults that the prompt asks for: 'name|style|fault,fault'."""
    daemon_threads = True
    request_queue_size = 128
    block_on_close = False

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}/v1'
        self.lock = threading.Lock()
        self.seen = Counter()     # (name, seed) -> requests
        self.times = {}           # name -> when
        self.bodies = []
        self.headers = []
        self.running = 0          # requests now, and
        self.most = 0             # at most
        self.gate = threading.Semaphore(10)   # so many prompts of the style 'gated' are answered
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        pass   # clients that gave up


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def reply(self, status, body, **headers):
        data = json.dumps(body).encode()
        self.send_response(status)
        headers = {'Content-Type': 'application/json', 'Content-Length': str(len(data)), **headers}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(2)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with server.lock:
            server.running += 1
            server.most = max(server.most, server.running)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
        try:
            self.answer(server, body)
        finally:
            with server.lock:
                server.running -= 1

    def answer(self, server, body):
        name, style, faults = body['messages'][-1]['content'].split('|')
        with server.lock:
            attempt = server.seen[name, body.get('seed')]
            server.seen[name, body.get('seed')] += 1
            server.times.setdefault(name, []).append(time.monotonic())
        faults = [f for f in faults.split(',') if f]
        fault = faults[attempt] if attempt < len(faults) else ''
        if fault.isdigit():
            after = {'Retry-After': '1'} if fault == '429' and style == 'wait' else {}
            return self.reply(int(fault), {'error': {'message': f'no: {fault}'}}, **after)
        if fault == 'timeout':
            return time.sleep(5)
        if style == 'gated':
            server.gate.acquire()
        if fault == 'reset':
            return self.hang_up()
        if fault == 'drip':
            return self.drip()

        whole = {}
        if fault != 'empty':
            whole = message(style, f'thinking of {name}', f'the answer to {name}')
        finish = 'length' if name == 'long' else 'stop'
        if fault == 'no_finish':
            finish = None
        if fault.startswith('finish:'):
            finish = fault.removeprefix('finish:')
        usage = {'prompt_tokens': 7, 'completion_tokens': 11, 'total_tokens': 18}
        if not body['stream']:
            choice = {'index': 0, 'message': {'role': 'assistant', **whole}}
            choice['finish_reason'] = finish
            return self.reply_at_once({'choices': [choice], 'usage': usage}, fault)
        pieces = [{**delta, 'role': 'assistant'} for delta in deltas(whole)]
        lines = [self.chunk(piece) for piece in pieces]
        lines.append(self.chunk({}, finish))
        if name != 'uncounted':
            lines.append({'choices': [], 'usage': usage})
        self.stream(lines, fault, space='' if style == 'unspaced' else ' ')

    def chunk(self, delta, finish=None):
        return {'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}]}

    def drip(self):
        """Never silent for long, never done."""
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.end_headers()
        line = f'data: {json.dumps(self.chunk({"content": "x"}))}\n\n'
        for _ in range(200):
            self.wfile.write(line.encode())
            self.wfile.flush()
            time.sleep(0.1)
        self.hang_up()

    def reply_at_once(self, data, fault):
        if fault not in ('cut', 'cut_before', 'garbage', 'error_in_stream'):
            return self.reply(200, data)
        self.send_response(200)
        self.send_header('Content-Length', '5000')
        self.end_headers()
        self.wfile.write(json.dumps(data).encode()[:40])
        if fault == 'garbage':
            self.wfile.write(b'}' * 4960)
        else:
            self.hang_up()

    def stream(self, lines, fault, space):
        if fault == 'error_in_stream':
            lines[1:] = [{'error': 'worker died', 'error_type': 'server'}]
        text = [f'data:{space}{piece}\n\n' for piece in [*map(json.dumps, lines), '[DONE]']]
        if fault == 'garbage':
            text[1] = 'data: {"choices": [{"del\n\n'
        if fault == 'cut':
            text = text[:2]
        if fault == 'cut_before':
            text = []
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()
        for line in text:
            self.wfile.write(f'{len(line.encode()):x}\r\n'.encode() + line.encode() + b'\r\n')
            self.wfile.flush()
        if fault in ('cut', 'cut_before'):
            return self.hang_up()   # without the last chunk
        self.wfile.write(b'0\r\n\r\n')


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


QUICK = dict(timeout=60, backoff=0.01, concurrency=12, progress=False)


def ask(server, rows, out, **settings):
    return generate_remote(rows, server.url, 'teacher', str(out), **{**QUICK, **settings})


def lines(path):
    return [json.loads(line) for line in open(path, encoding='utf-8')]


def prompts(*texts):
    about = {'task': 'math', 'answer': '1'}
    return [{'prompt': text, 'id': text.split('|')[0], **about} for text in texts]


def jsonl(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_parts_of_by_hand():
    assert parts_of({'content': 'a'}) == ('', 'a')
    assert parts_of({'content': '<think>never closed'}) == ('never closed', '')
    assert parts_of({'content': None, 'reasoning': 'b'}) == ('b', '')
    twice = {'content': 'a', 'reasoning': 'b', 'reasoning_details': [{'text': 'b'}]}
    assert parts_of(twice) == ('b', 'a')
    assert parts_of({'content': '<think>b</think>a', 'reasoning_content': ''}) == ('b', 'a')
    assert parts_of({'content': '<think>b</think> a', 'reasoning_content': 'b'}) == ('b', 'a')
    said = 'the tag </think> ends it'
    assert parts_of({'content': said, 'reasoning_content': 'b'}) == ('b', said)
    details = [{'type': 'reasoning.summary', 'summary': 'b'}]
    assert parts_of({'reasoning_details': details, 'content': 'a'}) == ('b', 'a')


@pytest.mark.parametrize('stream', [True, False])
def test_reasoning_and_answer_apart_whatever_the_field(server, tmp_path, stream):
    asked = prompts(*(f'{style}|{style}|' for style in STYLES))
    out = tmp_path / 'o.jsonl'
    numbers = ask(server, asked, out, stream=stream, price_in=1e6, price_out=2e6)
    rows = lines(out)
    found = {r['id']: (r['reasoning'], r['content']) for r in rows}
    assert found == {s: (f'thinking of {s}', f'the answer to {s}') for s in STYLES}
    n = len(STYLES)
    assert numbers['answers'] == n and numbers['failed'] == {}
    assert numbers['prompt_tokens'] == 7 * n and numbers['completion_tokens'] == 11 * n
    assert numbers['cost'] == n * (7 + 2 * 11)
    assert all(r['finish_reason'] == 'stop' and r['task'] == 'math' for r in rows)
    assert all(r['usage']['completion_tokens'] == 11 for r in rows)


@pytest.mark.parametrize('stream', [True, False])
def test_no_row_lost_or_doubled_under_faults(server, tmp_path, stream):
    texts = [f'{fault}-{style}|{style}|{fault}' for fault in FAULTS
             for style in ('reasoning', 'inline')]
    texts += [f'{a}-{b}|reasoning|{a},{b}' for a in FAULTS[:7] for b in FAULTS[4:8]]
    texts += [f'fine{i}|reasoning|' for i in range(20)]
    out = tmp_path / 'o.jsonl'
    numbers = ask(server, prompts(*texts), out, n=2, stream=stream, timeout=1.5, retries=20)

    # Every answer is there once
    rows = lines(out)
    names = [text.split('|')[0] for text in texts]
    assert sorted(r['key'] for r in rows) == sorted(f'{n}#{k}' for n in names for k in range(2))
    for row in rows:
        assert row['reasoning'] == f'thinking of {row["id"]}'
        assert row['content'] == f'the answer to {row["id"]}'
    assert numbers['answers'] == len(rows) and not numbers['failed']

    # Every fault was met once by each of two samples, but a busy machine is late by itself, and
    # then a fault may go unseen
    injected = Counter()
    for text in texts:
        injected.update(fault for fault in text.split('|')[2].split(',') if fault)
    late = numbers['faults']['InferenceTimeoutError']
    others = sum(numbers['faults'].values()) - late
    unmet = late - 2 * injected['timeout']
    wanted = 2 * (injected.total() - injected['timeout'])
    assert 0 <= wanted - others <= unmet
    for status in ('429', '500', '503'):
        assert 0 <= 2 * injected[status] - numbers['faults'].get(status, 0) <= unmet
    assert server.most > 4

    assert len(server.bodies) <= len(rows) + others + late   # nothing asked twice
    asked = {(body['messages'][-1]['content'], body['seed']) for body in server.bodies}
    assert len(asked) == len(rows)   # samples differ by their seed


def test_resumes_to_the_row(server, tmp_path):
    out = tmp_path / 'o.jsonl'
    rows = prompts(*(f'r{i}|reasoning|' for i in range(10)))
    ask(server, rows, out, limit=6)
    whole = out.read_bytes()
    cut = whole.splitlines(keepends=True)
    out.write_bytes(b''.join(cut[:5]) + cut[5][:20])   # a crash in the middle of the sixth line
    lost = json.loads(cut[5])['key']
    server.bodies.clear()
    numbers = ask(server, rows, out)
    assert numbers['already'] == 5 and numbers['answers'] == 5 == len(server.bodies)
    after = lines(out)
    keys = [r['key'] for r in after]
    assert sorted(keys) == sorted(f'r{i}#0' for i in range(10)) and lost in keys
    assert out.read_bytes().startswith(b''.join(cut[:5]))
    assert ask(server, rows, out)['answers'] == 0 and len(server.bodies) == 5
    with pytest.raises(ValueError, match="o.jsonl:1: an answer of 'teacher', not of 'other'"):
        generate_remote(rows, server.url, 'other', str(out), **QUICK)
    out.write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match='o.jsonl:1: no answer of this script'):
        ask(server, rows, out)


def test_killed_in_the_middle(server, tmp_path):
    """kill -9 of the script at some point, then the same command again."""
    data = tmp_path / 'in.jsonl'
    out = tmp_path / 'o.jsonl'
    jsonl(data, prompts(*(f'r{i}|gated|' for i in range(40))))
    command = [sys.executable, str(ROOT / 'data' / 'teacher.py'), f'--endpoint={server.url}',
               '--model=teacher', f"--data=['{data}']", f'--out={out}', '--concurrency=4',
               '--backoff=0.01']
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, cwd=tmp_path)
    end = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b'\n') >= 5) and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.wait()
    server.gate.release(100)
    before = out.read_bytes().count(b'\n')
    assert 5 <= before <= 10
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(r['key'] for r in lines(out)) == sorted(f'r{i}#0' for i in range(40))
    assert f'{40 - before} answers, {before} were there already' in done.stdout


def test_rows_without_ids_and_twice_the_same(server, tmp_path):
    rows = [
        {'prompt': 'a|reasoning|'},
        {'prompt': [{'role': 'user', 'content': 'a|reasoning|'}]},
        {'prompt': 'b|reasoning|', 'id': 0},
        {'prompt': 'c|reasoning|', 'id': 0},
    ]
    ask(server, rows, tmp_path / 'o.jsonl', system='Be brief.')
    found = lines(tmp_path / 'o.jsonl')
    assert len({r['key'] for r in found}) == 4
    assert sorted(r['content'][-1] for r in found) == ['a', 'a', 'b', 'c']
    assert {b['messages'][0]['content'] for b in server.bodies} == {'Be brief.'}
    assert all('Be brief.' not in json.dumps(r) for r in found)


def test_refused_rows_are_named_and_asked_again(server, tmp_path):
    rows = prompts('bad|reasoning|400', 'worse|reasoning|500,500,500', 'good|reasoning|')
    numbers = ask(server, rows, tmp_path / 'o.jsonl', retries=2)
    failed = numbers['failed']
    assert failed.keys() == {'bad#0', 'worse#0'}
    assert failed['bad#0'].startswith('400') and '3 attempts failed' in failed['worse#0']
    assert [r['id'] for r in lines(tmp_path / 'o.jsonl')] == ['good']
    with pytest.raises(ValueError, match='2 rows failed, for example bad#0: 400'):
        teacher.report(numbers, 'o')
    assert ask(server, rows, tmp_path / 'o.jsonl')['answers'] == 2   # the faults are over
    with pytest.raises(teacher.Stopped, match='more than max_failures=1'):
        rows = prompts(*(f'x{i}|reasoning|400' for i in range(9)))
        ask(server, rows, tmp_path / 'p.jsonl', max_failures=1)


def test_a_wrong_key_stops_the_run_and_keeps_what_came(server, tmp_path):
    rows = prompts('good|reasoning|', *(f'x{i}|reasoning|' + '401,' * 9 for i in range(50)))
    with pytest.raises(teacher.Stopped, match='answers 401'):
        ask(server, rows, tmp_path / 'o.jsonl', concurrency=1)
    assert [r['id'] for r in lines(tmp_path / 'o.jsonl')] == ['good'] and len(server.bodies) == 2
    with pytest.raises(teacher.Stopped, match='answers 401'):
        ask(server, rows, tmp_path / 'o.jsonl', concurrency=8)
    assert [r['id'] for r in lines(tmp_path / 'o.jsonl')] == ['good'] and len(server.bodies) <= 10


def test_the_hub_token_goes_nowhere_and_the_key_does(server, tmp_path, monkeypatch):
    ask(server, prompts('a|reasoning|'), tmp_path / 'o.jsonl')
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-1')
    ask(server, prompts('b|reasoning|'), tmp_path / 'o.jsonl', extra={'top_k': 20})
    sent = [{k.lower(): v for k, v in h.items()}.get('authorization') for h in server.headers]
    assert sent == ['Bearer none', 'Bearer sk-1'] and server.bodies[1]['top_k'] == 20
    assert server.bodies[0]['model'] == 'teacher'
    assert server.bodies[0]['max_tokens'] == Config.max_tokens


def test_a_whole_answer_has_a_deadline(server, tmp_path):
    numbers = ask(server, prompts('a|reasoning|drip'), tmp_path / 'o.jsonl', deadline=2.0)
    first, second, *_ = server.times['a']
    assert numbers['faults']['ConnectionError'] >= 1
    assert 1.9 < second - first < 15   # it would drip for 20 s
    assert [r['content'] for r in lines(tmp_path / 'o.jsonl')] == ['the answer to a']


def test_retry_after_is_kept_to(server, tmp_path):
    ask(server, prompts('a|wait|429'), tmp_path / 'o.jsonl')
    first, second = server.times['a']
    assert second - first >= 1.0


def test_cut_answers_are_marked_and_left_out_of_the_distillation_file(server, tmp_path):
    asked = prompts('long|reasoning|', 'a|reasoning|', 'uncounted|reasoning|')
    numbers = ask(server, asked, tmp_path / 'o.jsonl')
    assert numbers['cut'] == 1 and numbers['without_usage'] == 1
    distill.main(distill.Config(source=str(tmp_path / 'o.jsonl'), name='own',
                                out_dir=str(tmp_path)))
    rows = lines(tmp_path / 'own.jsonl')
    assert sorted(r['id'] for r in rows) == ['own/a', 'own/uncounted']
    found = next(r for r in rows if r['id'] == 'own/a')
    text = '<think>\nthinking of a\n</think>\n\nthe answer to a'
    assert found['messages'] == [{'role': 'user', 'content': 'a|reasoning|'},
                                 {'role': 'assistant', 'content': text}]
    assert json.loads((tmp_path / 'own.manifest.json').read_text())['dropped'] == {'cut short': 1}


@pytest.mark.parametrize('reason', ['abort', 'error', 'insufficient_system_resource', 'ERROR'])
def test_an_answer_that_the_server_broke_off_is_asked_for_again(server, tmp_path, reason):
    rows = prompts(f'a|reasoning|finish:{reason}', 'b|reasoning|')
    numbers = ask(server, rows, tmp_path / 'o.jsonl')
    assert numbers['answers'] == 2 and numbers['faults'] == {'ConnectionError': 1}
    assert len(server.bodies) == 3
    assert {row['finish_reason'] for row in lines(tmp_path / 'o.jsonl')} == {'stop'}


@pytest.mark.parametrize('reason', ['content_filter', 'safety', 'tool_calls', 'what_nobody_knows'])
def test_what_the_model_did_not_end_is_asked_for_by_the_next_run(server, tmp_path, reason):
    out = tmp_path / 'o.jsonl'
    numbers = ask(server, prompts(f'a|reasoning|finish:{reason}', 'b|reasoning|'), out)
    assert set(numbers['failed']) == {'a#0'} and reason in numbers['failed']['a#0']
    assert [row['id'] for row in lines(out)] == ['b']
    assert len(server.bodies) == 2   # not repeated: it would be refused again
    assert ask(server, prompts(f'a|reasoning|finish:{reason}', 'b|reasoning|'), out)['answers'] == 1


@pytest.mark.parametrize('reason', ['length', 'max_tokens', 'model_length', 'MAX_TOKENS'])
def test_a_cut_answer_is_asked_for_again_with_more_tokens(server, tmp_path, reason):
    out, rows = tmp_path / 'o.jsonl', prompts(f'a|reasoning|finish:{reason}')
    assert ask(server, rows, out, max_tokens=100)['cut'] == 1
    assert [row['finish_reason'] for row in lines(out)] == ['length']
    assert ask(server, rows, out, max_tokens=100)['already'] == 1
    assert len(server.bodies) == 1                   # as many tokens would cut it at the same place
    for more in (200, None):
        assert ask(server, rows, out, max_tokens=more)['answers'] == (more == 200)
    distill.main(distill.Config(source=str(out), name='own', out_dir=str(tmp_path)))
    assert len(lines(tmp_path / 'own.jsonl')) == 1   # the whole one


@pytest.mark.parametrize('reason', ['stop', 'eos_token', 'end_turn', 'stop_sequence', 'STOP'])
def test_what_the_model_ended_is_whole_whatever_it_is_called(server, tmp_path, reason):
    rows = prompts(f'a|reasoning|finish:{reason}')
    assert ask(server, rows, tmp_path / 'o.jsonl')['answers'] == 1


def test_what_is_none_is_not_sent(server, tmp_path):
    unsent = dict(max_tokens=None, seed=None, temperature=None, top_p=None)
    ask(server, prompts('a|reasoning|'), tmp_path / 'o.jsonl', **unsent)
    assert not {'max_tokens', 'seed', 'temperature', 'top_p'} & set(server.bodies[0])


def test_an_empty_account_stops_the_run(server, tmp_path):
    with pytest.raises(teacher.Stopped, match='answers 402'):
        rows = prompts(*(f'x{i}|reasoning|402' for i in range(9)))
        ask(server, rows, tmp_path / 'o.jsonl', concurrency=1)
    assert len(server.bodies) == 1


def test_a_stream_without_spaces_is_read_to_its_end(server, tmp_path):
    numbers = ask(server, prompts('a|unspaced|'), tmp_path / 'o.jsonl')
    assert numbers['answers'] == 1 and numbers['completion_tokens'] == 11 and not numbers['faults']


@pytest.mark.parametrize('stream', [True, False])
def test_half_a_character_from_the_server_or_the_rows_loses_no_row(server, tmp_path, stream):
    data, out = tmp_path / 'in.jsonl', tmp_path / 'o.jsonl'
    cut = {'prompt': 'c|reasoning|', 'id': 'c', 'note': 'cut \ud83d'}
    rows = [*prompts('a|surrogate|', 'b|halves|'), cut]
    jsonl(data, rows)   # halves of characters as escapes
    teacher.main(Config(endpoint=server.url, model='teacher', data=[str(data)], out=str(out),
                        stream=stream, backoff=0.01))
    found = {row['id']: row for row in lines(out)}
    assert found['a']['content'] == 'fine \ufffd' and found['b']['content'] == 'fine 😀'
    assert found['c']['note'] == 'cut \ufffd'


def test_a_server_on_this_machine_is_reached_while_the_hub_is_offline(server, tmp_path):
    data = tmp_path / 'in.jsonl'
    data.write_text(json.dumps(prompts('a|reasoning|')[0]) + '\n')
    command = [sys.executable, str(ROOT / 'data' / 'teacher.py'), f'--endpoint={server.url}',
               '--model=teacher', f"--data=['{data}']", f'--out={tmp_path / "o.jsonl"}',
               '--retries=0']
    offline = {**os.environ, 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=offline)
    assert done.returncode == 0 and '1 answers' in done.stdout, done.stderr


def test_a_second_process_on_the_same_file_is_refused(server, tmp_path):
    fcntl = pytest.importorskip('fcntl')
    with open(tmp_path / 'o.jsonl', 'ab') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match='another process is writing'):
            ask(server, prompts('a|reasoning|'), tmp_path / 'o.jsonl')
    assert os.path.getsize(tmp_path / 'o.jsonl') == 0


def test_how_far_it_is_stands_in_a_log(server, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'o.jsonl'
    rows = prompts(*(f'r{i}|reasoning|' for i in range(6)), 'b|reasoning|finish:content_filter',
                   'c|reasoning|500')
    ask(server, rows, out, limit=4)
    monkeypatch.setattr(progress, 'DELAY', 0.0)
    monkeypatch.setattr(progress, 'APART', 0.0)   # a line for every answer
    ask(server, rows, out, count=len(rows), progress=True, concurrency=1)
    told = capsys.readouterr().err.splitlines()
    told = [line for line in told if line.startswith('o.jsonl: ')]
    assert [line.split(' answers')[0] for line in told] == [
        'o.jsonl: 5/8', 'o.jsonl: 6/8', 'o.jsonl: 7/8', 'o.jsonl: 8/8']
    assert re.search(r'5/8 answers \(62%\), [0-9.e+]+(/s| s each), 00:0\d left$', told[0])
    assert told[2].endswith(' left, 1 failed')
    assert told[3].endswith(', 1 failed, 1 faults overcome')


def test_mode_of_evaluate(server, tmp_path):
    evaluate = pytest.importorskip('evaluate')
    data = tmp_path / 'in.jsonl'
    jsonl(data, prompts('a|inline|429', 'b|reasoning|'))
    cfg = evaluate.Config(
        checkpoint='teacher', endpoint=server.url, data=[str(data)], out=str(tmp_path / 'o.jsonl'),
        n=2, temperature=0.7, max_new_tokens=99, remote={'backoff': 0.01, 'progress': False})
    assert evaluate.main(cfg)[str(data)]['pass1'] == 0    # the answer to a is not 1
    keys = {r['key'] for r in lines(tmp_path / 'o.jsonl')}
    assert keys == {'a#0', 'a#1', 'b#0', 'b#1'}
    sent = {(b['temperature'], b['max_tokens'], b['model']) for b in server.bodies}
    assert sent == {(0.7, 99, 'teacher')}
    with pytest.raises(ValueError, match='--out=FILE'):
        evaluate.main(evaluate.Config(endpoint=server.url))


def test_a_server_is_graded_as_a_checkpoint_is(server, tmp_path, capsys):
    """Of two files, the first so many rows of each; asked once, graded as often as one likes."""
    evaluate = pytest.importorskip('evaluate')
    rows = prompts('<answer>1</answer>|inline|', 'long|reasoning|', 'c|inline|', 'd|inline|')
    files = [tmp_path / 'one.jsonl', tmp_path / 'two.jsonl']
    jsonl(files[0], [rows[0], rows[2]])
    jsonl(files[1], [rows[1], rows[3]])
    cfg = evaluate.Config(
        checkpoint='teacher', endpoint=server.url, data=[str(path) for path in files], n=2,
        limit=1, out=str(tmp_path / 'o.jsonl'), summary=str(tmp_path / 'summary.json'),
        remote={'progress': False}, instruction='briefly')
    numbers = evaluate.main(cfg)
    one, two = (numbers[str(path)] for path in files)
    assert (one['problems'], one['samples'], one['pass1']) == (1, 2, 1.0)
    assert (one['length'], one['truncated']) == (11, 0)
    assert (two['problems'], two['pass1'], two['truncated']) == (1, 0.0, 1.0)
    assert json.loads((tmp_path / 'summary.json').read_text()) == numbers
    assert server.bodies[0]['messages'][0]['content'].endswith('|\nbriefly')
    assert len(server.bodies) == 4 and evaluate.main(cfg) == numbers and len(server.bodies) == 4
    assert 'does nothing' not in capsys.readouterr().err


@pytest.mark.parametrize('thought, answer', [
    ('6 x 7 = 42', '<answer>42</answer>'), ('never closed', ''), ('', '<answer>42</answer>')])
def test_a_response_is_put_together_as_the_model_said_it(thought, answer):
    evaluate = pytest.importorskip('evaluate')
    raw = answer
    if thought:
        raw = f'<think>{thought}</think>{answer}' if answer else f'<think>{thought}'
    reasoning, content = parts_of({'content': raw})
    said = evaluate.said_by_server({'reasoning': reasoning, 'content': content, 'usage': None,
                                    'finish_reason': 'stop'})
    assert said == (raw, 0, True)


@pytest.fixture
def transformers_serve(tmp_path):
    """start(folder) -> URL of `transformers serve` with the model in it; as often as one likes, on
    the same port, the server before is killed -9."""
    for name in ('transformers', 'fastapi', 'uvicorn', 'openai'):
        pytest.importorskip(name, reason="needs pip install 'transformers[serving]'")
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    running = []

    def start(folder):
        for process in running:
            process.kill()
            process.wait()
        command = [sys.executable, '-c', 'from transformers.cli.transformers import main; main()',
                   'serve', str(folder), '--device=cpu', '--dtype=float32', '--host=127.0.0.1',
                   f'--port={port}']
        environment = {**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'hf'),
                       'OMP_NUM_THREADS': '1'}
        with open(tmp_path / 'serve.log', 'a') as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        end = time.monotonic() + 300
        while time.monotonic() < end and running[-1].poll() is None:
            with socket.socket() as client:
                if client.connect_ex(('127.0.0.1', port)) == 0:
                    break
            time.sleep(0.1)
        else:
            pytest.fail((tmp_path / 'serve.log').read_text()[-3000:])
        return f'http://127.0.0.1:{port}/v1'

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_transformers_serves_our_checkpoint_and_kills_lose_and_double_nothing(
        transformers_serve, tmp_path):
    """A model that our hub.py wrote: 60 answers through two kill -9 of the collector and one of
    the server, and they are the greedy answers of our own sampler."""
    torch = pytest.importorskip('torch')
    import evaluate
    from data.countdown.prepare import rl_problem, toy_tokenizer
    from model import ModelConfig, Transformer
    tokenizer = toy_tokenizer()
    torch.manual_seed(0)
    shape = dict(model_type='llama', num_hidden_layers=2, hidden_size=64, num_attention_heads=4,
                 num_key_value_heads=2, intermediate_size=96, max_position_embeddings=256)
    ids = dict(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    model = Transformer(ModelConfig(**ids, **shape))
    with torch.no_grad():   # it says words and ends: single bytes and control tokens are no text
        for token in range(tokenizer.vocab_size):
            if token != tokenizer.eos_id and not tokenizer.decode([token]).startswith(' '):
                model.lm_head.weight[token] = 0
    model.save_pretrained(tmp_path / 'm')
    tokenizer.save_pretrained(tmp_path / 'm')
    rng = random.Random(0)
    rows = [{**rl_problem(rng, (1 + i, 2, 3), 6 + i), 'id': i} for i in range(60)]
    data = tmp_path / 'in.jsonl'
    out = tmp_path / 'o.jsonl'
    jsonl(data, rows)

    url = transformers_serve(tmp_path / 'm')
    command = [sys.executable, str(ROOT / 'data' / 'teacher.py'), f'--endpoint={url}',
               f'--model={tmp_path / "m"}', f"--data=['{data}']", f'--out={out}',
               '--temperature=0', '--top_p=None', '--max_tokens=40', '--concurrency=4',
               '--backoff=0.2', '--retries=100']

    def collect_until(count):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 300
        while time.monotonic() < end and process.poll() is None:
            if out.exists() and out.read_bytes().count(b'\n') >= count:
                break
            time.sleep(0.01)
        return process

    for count in (10, 25):
        process = collect_until(count)
        process.kill()
        process.wait()
    process = collect_until(40)
    transformers_serve(tmp_path / 'm')
    assert process.wait(300) == 0
    assert sorted(answer['key'] for answer in lines(out)) == sorted(f'{i}#0' for i in range(60))

    # Both are graded alike, and say the same
    about = dict(data=[str(data)], n=1, temperature=0.0, max_new_tokens=40, threads=1)
    here = evaluate.main(evaluate.Config(checkpoint=str(tmp_path / 'm'), greedy=False, **about,
                                         out=str(tmp_path / 'here.jsonl')))
    there = evaluate.main(evaluate.Config(checkpoint=str(tmp_path / 'm'), endpoint=url, **about,
                                          out=str(out), remote={'top_p': None}))
    for name in ('pass1', 'length', 'truncated', 'format'):
        assert there[str(data)][name] == pytest.approx(here[str(data)][name])
    said = {row['id']: row['samples'][0]['response'] for row in lines(tmp_path / 'here.jsonl')}
    for answer in lines(out):
        reasoning, content = parts_of({'content': said[answer['id']]})
        assert (answer['reasoning'], answer['content']) == (reasoning, content)

    # Sampled only where the request brings a generation_config that says so
    generation = json.dumps({'do_sample': True, 'top_k': 0, 'eos_token_id': tokenizer.eos_id})
    for extra, different in (({}, 1), ({'generation_config': generation}, 4)):
        out.unlink()
        generate_remote(rows, url, str(tmp_path / 'm'), str(out), limit=1, n=4, max_tokens=40,
                        temperature=1.0, top_p=1.0, extra=extra, progress=False)
        assert len({answer['content'] for answer in lines(out)}) == different
