"""
graders/sandbox.py and the code reward: attacks, each contained and with nothing left running;
honest programs; HumanEval and MBPP.
"""
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rewards
from data.code.prepare import call_assert
from graders import sandbox
from rewards import code_reward, program_of

SHARED = Path(__file__).resolve().parents[1].parent / 'shared' / 'data'


def cannot_run():
    try:
        sandbox.require()
    except sandbox.SandboxError as error:
        return str(error)


REASON = cannot_run()
needs_sandbox = pytest.mark.skipif(REASON is not None, reason=REASON or '')


# ---------------------------------------------------------------- attacks

ATTACKS = {  # each prints BREACH where it got somewhere
    'internet': 'import socket\nsocket.create_connection(("1.1.1.1", 53), 1)\nprint("BREACH")',
    'loopback': 'import socket\nsocket.create_connection(("127.0.0.1", PORT), 1)\nprint("BREACH")',
    'abstract socket': '''
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("\\0nanor1-test-PORT")
print("BREACH")''',
    'raw packets': '''
import socket
socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
print("BREACH")''',
    'files of the host': '''
import os
for path in ("/etc/passwd", "/etc/shadow", "/root", "/home", "/var/log", "/sys", "HERE",
             "/proc/1/root/etc/passwd", "/proc/self/root/root"):
    if os.path.exists(path):
        print("BREACH", path)''',
    'environment': '''
import os, glob
seen = str(dict(os.environ))
for path in glob.glob("/proc/*/environ"):
    try:
        seen += open(path).read()
    except OSError:
        pass
if "hush-hush" in seen:
    print("BREACH")''',
    'processes of the host': '''
import os
if os.getppid() > 2 or len([p for p in os.listdir("/proc") if p.isdigit()]) > 3:
    print("BREACH")''',
    'ruining the memory of the timer within': '''
import time
with open("/proc/1/mem", "r+b", buffering=0) as memory:
    for line in open("/proc/1/maps"):
        start, end = (int(x, 16) for x in line.split()[0].split("-"))
        if "rw" in line.split()[1]:
            memory.seek(start)
            memory.write(b"x" * (end - start))
time.sleep(1000)''',
    'overwriting a library': '''
import json, os
open(json.__file__, "a").write("raise SystemExit(0)")
print("BREACH")''',
    'writing outside of /tmp': '''
import os
for folder in ("/", "/dev", "/dev/shm", "/usr", "/usr/bin", "/proc/sys/kernel", "/bin", "/etc",
               "/lib"):
    try:
        open(folder + "/mark", "w").write("x")
        print("BREACH", folder)
    except OSError:
        pass''',
    'kernel settings': 'open("/proc/sys/vm/overcommit_memory", "w").write("1")\nprint("BREACH")',
    'fork bomb': '''
import os, time
made = 0
try:
    while made < 3000:
        if os.fork() == 0:
            time.sleep(100)
        made += 1
    print("BREACH")
except OSError:
    print("stopped after", made)
''',
    'exponential fork bomb': '''
import os
while True:
    try:
        os.fork()
    except OSError:
        pass''',
    'thread bomb': '''
import threading, time
try:
    for _ in range(3000):
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
    print("BREACH")
except RuntimeError:
    pass''',
    'memory': 'x = bytearray(4 << 30)\nx[::4096] = b"x" * len(x[::4096])\nprint("BREACH")',
    'memory by little': '''
x = []
while len(x) < 4000:
    x.append(bytearray(b"x" * (1 << 20)))
print("BREACH")''',
    'mapped memory': '''
import mmap
x = [mmap.mmap(-1, 64 << 20) for _ in range(64)]
print("BREACH")''',
    'memory of many processes': '''
import mmap, os, time
ready, tell = os.pipe()
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            x = mmap.mmap(-1, 400 << 20)
            os.write(tell, b"x")
            time.sleep(1000)
        os._exit(0)
for _ in range(5):
    os.read(ready, 1)
time.sleep(0.5)
print("BREACH")''',
    'memory of no process': '''
import ctypes, os
libc = ctypes.CDLL(None)
if libc.shmget(0, 4096, 0o1600) != -1 or libc.msgget(0, 0o1600) != -1:
    print("BREACH")
if libc.memfd_create(b"x", 0) != -1:
    print("BREACH")
if os.uname().machine == "x86_64" and libc.syscall((1 << 30) + 319, b"x", 0) != -1:
    print("BREACH")''',
    'CPU': 'while True:\n    pass',
    'CPU in one operation': 'print(len(str(9 ** 9 ** 9)))',
    'regular expression': 'import re\nre.match("(a+)+$", "a" * 60 + "b")',
    'sleeping': 'import time\ntime.sleep(1000)',
    'waiting for input': 'import sys\nwhile True:\n    sys.stdin.read()',
    'filling the disk': '''
total = 0
try:
    for i in range(1000):
        with open(f"/tmp/{i}", "wb") as f:
            for _ in range(15):
                total += f.write(b"x" * (1 << 20))
except OSError:
    pass
if total > 80 << 20:
    print("BREACH", total)''',
    'one huge file': 'f = open("/tmp/x", "wb")\nf.truncate(1 << 30)\nprint("BREACH")',
    'endless output': 'while True:\n    print("x" * 10000)',
    'endless errors': 'import sys\nwhile True:\n    sys.stderr.write("x" * 10000)',
    'output by a hole': 'import os\nos.ftruncate(1, 1 << 40)\nprint("BREACH")',
    'detached children': '''
import os, signal, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGXCPU):
                signal.signal(number, signal.SIG_IGN)
            os.closerange(0, 30)
            time.sleep(1000)
        os._exit(0)
print("gone")''',
    'signals to everyone': 'import os, signal\nos.kill(-1, signal.SIGKILL)',
    'signals to the parent': '''
import os, signal
for pid in [os.getppid(), 1, *range(2, 4000)]:
    if pid != os.getpid():
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass''',
    'deaf to signals': '''
import signal
for number in range(1, 32):
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_IGN)
while True:
    pass''',
    'user namespace': '''
import ctypes
if ctypes.CDLL(None).unshare(0x10000000) == 0:
    print("BREACH")''',
    'mounting': '''
import ctypes
libc = ctypes.CDLL(None)
if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0 or libc.chroot(b"/tmp") == 0:
    print("BREACH")''',
    'becoming root': 'import os\nos.setuid(0)\nprint("BREACH")',
    'raising limits': '''
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print("BREACH")''',
    'stopping the timer within': '''
import ctypes, os, signal, time
ctypes.CDLL(None).ptrace(16, 1, 0, 0)
for number in range(1, 65):
    try:
        os.kill(1, number)
    except OSError:
        pass
time.sleep(1000)''',
    'devices': 'import os\nos.mknod("/tmp/disk", 0o60666, os.makedev(8, 0))\nprint("BREACH")',
    'terminal': 'import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b"x")\nprint("BREACH")',
    'message queues of the host': '''
import ctypes
libc = ctypes.CDLL(None)
if libc.shmget(KEY, 4096, 0o600) != -1:
    print("BREACH")''',
    'hundreds of files': '''
import os
kept = [os.open("/tmp/x", os.O_CREAT | os.O_RDWR) for _ in range(500)]
print("BREACH")''',
    'crash': 'import ctypes\nctypes.string_at(0)\nprint("BREACH")',
    'deep recursion': '''
import sys
sys.setrecursionlimit(10 ** 9)
f = lambda: f()
f()
print("BREACH")''',
    'reading all descriptors': '''
import os
for fd in range(3, 256):
    try:
        if b"expected-42" in os.read(fd, 10 ** 6):
            print("BREACH")
    except OSError:
        pass''',
}


def children_of(pid):
    """Processes that a process has started."""
    found = []
    try:
        for task in os.listdir(f'/proc/{pid}/task'):
            found += Path(f'/proc/{pid}/task/{task}/children').read_text().split()
    except OSError:
        return []
    return found


def namespace_of(process):
    """Inode of the process namespace that a sandbox's program has made, or None where it is already
    gone."""
    own = os.stat('/proc/self/ns/pid').st_ino
    end = time.monotonic() + 5
    while time.monotonic() < end and process.poll() is None:
        for pid in children_of(process.pid):
            try:
                found = os.stat(f'/proc/{pid}/ns/pid').st_ino
            except OSError:
                continue
            if found != own:
                return found
    return None


def inhabitants(namespaces):
    """Processes that run there; zombies do not."""
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            namespace = os.stat(f'/proc/{pid}/ns/pid').st_ino
            state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
        except OSError:
            continue
        if namespace in namespaces and state != 'Z':
            found.append(pid)
    return found


@pytest.fixture
def watched(monkeypatch):
    """Remembers the namespaces of all sandboxes of a test, and looks for survivors after it."""
    start = sandbox._start
    namespaces = set()

    def watching(*args, **named):
        process = start(*args, **named)
        namespaces.add(namespace_of(process))
        return process
    monkeypatch.setattr(sandbox, '_start', watching)
    yield namespaces
    namespaces.discard(None)
    end = time.monotonic() + 2   # the kernel takes a moment to clear a namespace away
    while inhabitants(namespaces) and time.monotonic() < end:
        time.sleep(0.01)
    assert inhabitants(namespaces) == []


ENDED = {  # attacks that are ended, or end badly
    'CPU', 'CPU in one operation', 'sleeping', 'deaf to signals', 'regular expression',
    'endless errors', 'crash', 'memory', 'memory of many processes', 'stopping the timer within',
    'ruining the memory of the timer within'}


@needs_sandbox
@pytest.mark.parametrize('name', ATTACKS)
def test_attack(name, watched, monkeypatch, tmp_path):
    monkeypatch.setenv('SECRET', 'hush-hush')
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
        server.bind(('127.0.0.1', 0))
        server.listen()
        port = server.getsockname()[1]
        local.bind(f'\0nanor1-test-{port}')
        local.listen()
        program = ATTACKS[name]
        for word, value in (('PORT', port), ('HERE', tmp_path), ('KEY', port)):
            program = program.replace(word, str(value))
        before = time.monotonic()
        result = sandbox.run(program, 'some input', seconds=1)
    assert time.monotonic() - before < 8
    assert 'BREACH' not in result.stdout and len(result.stdout) <= sandbox.OUTPUT
    assert os.getppid() > 0 and not list(tmp_path.iterdir())
    if name in ENDED:
        assert result.timed_out or result.code != 0
    if name == 'fork bomb':
        assert int(result.stdout.split()[-1]) < 30


CHEATS = {  # programs against `assert f(1) == 2` and a second that is never true
    'early exit': 'import os\nos._exit(0)',
    'exit': 'import sys\nsys.exit(0)',
    'exit in the call': 'def f(x):\n    raise SystemExit(0)',
    'exit in the call, at once': 'import os\ndef f(x):\n    os._exit(0)',
    'equal to everything': '''
class E:
    def __eq__(self, other): return True
def f(x): return E()''',
    'an integer equal to everything': '''
class E(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return E(7)''',
    'a list equal to everything': '''
class E(list):
    def __eq__(self, other): return True
def f(x): return E()''',
    'all of its own': '''
import builtins
builtins.all = builtins.any = builtins.isinstance = lambda *a: True
def f(x): return 7''',
    'equality of its own': '''
import operator, json
json.loads = lambda *a: ["call", [], {}]
operator.eq = lambda *a: True
def f(x): return 7''',
    'reading the tests': '''
import gc, os, sys
found = []
def look(x):
    for y in gc.get_objects():
        if isinstance(y, (str, bytes, list)) and 'expected' in repr(y)[:1000]:
            found.append(y)
for fd in range(0, 40):
    try:
        os.lseek(fd, 0, 0)
        text = os.read(fd, 10 ** 6).decode()
        if 'assert' in text and 'f(1)' in text and 'lseek' not in text:
            found.append(text)
    except (OSError, ValueError):
        pass
def f(x):
    return 2 if found else 0''',
    'forged verdicts': '''
import os
for fd in range(0, 256):
    try:
        os.write(fd, b"1" * 1000)
    except OSError:
        pass
def f(x): return 0''',
    'forged answers': '''
import os
for fd in range(3, 40):
    try:
        os.write(fd, b'["value", true]\\n' * 50)
    except OSError:
        pass
def f(x): return 0''',
    'forged things': '''
import os
for fd in range(3, 40):
    try:
        os.write(fd, b'["value", ["o", 0]]\\n' * 50)
    except OSError:
        pass
def f(x): return 0''',
    'hanging': 'def f(x):\n    while True: pass',
    'flooding': '''
import os
for fd in range(3, 40):
    try:
        while True: os.write(fd, b"x" * 65536)
    except OSError: pass''',
    'a value too deep': 'def f(x):\n    y = []\n    for _ in range(100000): y = [y]\n    return y',
    'a value too long': 'def f(x): return "x" * (1 << 28)',
    'not a number': 'def f(x): return float("nan")',
    'infinity': 'def f(x): return float("inf")',
    'minus infinity': 'def f(x): return -float("inf")',
    'infinity by multiplication': 'def f(x): return 1e308 * 10',
    'an infinite decimal': 'from decimal import Decimal\ndef f(x): return Decimal("Infinity")',
    'a decimal that is no number': 'from decimal import Decimal\ndef f(x): return Decimal("sNaN")',
    'a huge fraction': '''
class Fraction:
    def __str__(self): return "1e99999999"
Fraction.__module__ = "fractions"
def f(x): return Fraction()''',
    'a class': 'def f(x): return int',
    'a class equal to everything': '''
class M(type):
    def __eq__(self, other): return True
    __hash__ = type.__hash__
class C(metaclass=M): pass
def f(x): return C''',
    'no function': 'x = 2',
    'syntax': 'def f(x: return 2',
    'nothing': '',
}


@needs_sandbox
@pytest.mark.parametrize('name', CHEATS)
def test_cheat(name, watched):
    asserts = ['assert f(1) == 2', 'assert 2 == f(1)', 'expected = 2\nassert f(1) == expected',
               'assert f(1) == 2 and f(1) == 3', 'assert not f(1) != 2']
    assert sandbox.run_asserts(CHEATS[name], asserts, seconds=1) == [False] * 5


@needs_sandbox
@pytest.mark.parametrize('value', [
    'float("inf")', '-float("inf")', '1e308 * 10', 'float("nan")', '[float("inf")] * 2',
    '(-float("inf"), float("inf"))', '{"a": float("inf")}', '1.7e308', '[1e308 * 10, 2.5]', 'True',
    '10 ** 400'])
def test_cheats_that_are_compared_by_same(value):
    wanted = [5, 2.5, -1, 0, False, 1e-300, [1, 2], [1.5, 2.5], {'a': 3}, {'a': 2.5}, -1.7e308,
              10 ** 300, '5', None]
    asserts = [call_assert('f', [1], x) for x in wanted]
    asserts += [f'assert same({x!r}, f(1))' for x in wanted]
    passed = sandbox.run_asserts(f'def f(x): return {value}', asserts, entry_point='f')
    assert passed == [False] * len(asserts)


# ---------------------------------------------------------------- honest programs


def graded(program, **row):
    reasoning = '<think>\n```python\nprint(0)\n```\n</think>'
    answer = f'Here:\n```python\n{program}\n```\nDone.'
    return code_reward(reasoning + answer, {'prefill': '', **row})


TESTS = [{'input': '1 2\n', 'output': '3\n'}, {'input': '10 20', 'output': '30'}]


ADDS = 'print(sum(map(int, input().split())))'
WITH_MAIN = '''
import sys
def main():
    a, b = map(int, sys.stdin.readline().split())
    print(a + b)
if __name__ == "__main__":
    main()'''
WITH_DATACLASS = '''
from dataclasses import dataclass
@dataclass
class P:
    x: "int"
print(sum(P(int(s)).x for s in open(0).read().split()))'''


@needs_sandbox
@pytest.mark.parametrize('program, score', [
    (ADDS, 1), ('print(sum(map(int, input().split())), end="  \\n\\n")', 1),
    ('print(3)', 0), ('print(3)\nprint(30)', 0), (f'{ADDS}\nprint()\nprint(1)', 0), ('', 0),
    ('print(', 0), (f'{ADDS}\nraise SystemExit(1)', 0), (f'{ADDS}\nraise SystemExit(0)', 1),
    (WITH_MAIN, 1), (WITH_DATACLASS, 1),
])
def test_programs(program, score):
    assert graded(program, tests=TESTS) == score


@needs_sandbox
def test_a_right_beginning_is_not_enough():
    """Comparing line by line with zip would let both pass."""
    test = [{'input': '', 'output': 'a\nb\n'}]
    assert graded('print("a")', tests=test) == 0
    assert graded('print("a\\nb\\nc")', tests=test) == 0
    assert graded('print("a\\nb")', tests=test) == 1


@needs_sandbox
def test_share_of_tests():
    tests = [{'input': str(i), 'output': str(i % 2)} for i in range(4)]
    assert graded('input()\nprint(1)', tests=tests) == 0
    assert graded('input()\nprint(1)', tests=tests, partial=True) == 0.5
    asserts = [f'assert f({i}) == {i % 2}' for i in range(4)]
    assert graded('def f(x): return 1', asserts=asserts, partial=True) == 0.5
    with pytest.raises(ValueError, match='no tests'):
        graded('print(1)', tests=[])
    with pytest.raises(ValueError, match='not Python'):
        graded('print(1)', asserts=['assert ('])


NODES = '''
class Node:
    def __init__(self, value): self.value = value
def total(nodes): return sum(n.value for n in nodes)'''
RAISES = '''
try:
    f(0)
    assert False
except ZeroDivisionError:
    pass'''


@needs_sandbox
@pytest.mark.parametrize('asserts, program', [
    (['assert f(2) == 4', 'assert f(x=3) == 9'],
     'def f(x): return x * x'),
    (['assert f() == (1, [2.5, None, True], {"a": {1, 2}}, b"x", 1j)'],
     'def f(): return (1, [2.5, None, True], {"a": {1, 2}}, b"x", 1j)'),
    (['assert not f()'],
     'def f(): return []'),
    (['assert f(10 ** 5000) == 10 ** 5000 + 1', 'assert f(-1) == 0'],
     'def f(x): return x + 1'),
    (['assert list(f(3)) == [0, 1, 2]', 'assert next(f(1)) == 0'],
     'def f(n): yield from range(n)'),
    (['assert Node(3).value == 3', 'n = Node(4)\nn.value = 5\nassert total([Node(1), n]) == 6'],
     NODES),
    (['assert Solution().twice(4) == 8'],
     'class Solution:\n    def twice(self, x): return 2 * x'),
    (['assert same(f(3), [[1, 2], 0.3])'],
     'def f(x): return ((1, 2), 0.1 + 0.2)'),
    ([RAISES],
     'def f(x): return 1 // x'),
    (['assert f("\\u00e9\\n\\udc80") == 3'],
     'def f(s): return len(s)'),
    (['assert f([1, "a", 2.5], int) == [1]', 'assert f([1, "a"], str) == ["a"]'],
     'def f(x, kind): return [y for y in x if type(y) is kind]'),
    (['assert f() == [int, {"a": str}]'],
     'def f(): return [int, {"a": str}]'),
    (['assert f([3, 1])(1) == 2'],
     'def f(y): return lambda x: x + 1'),
    (['assert f(2) == 0.5',
      'from fractions import Fraction\n'
      'assert f(3) == Fraction(1, 3) and f(Fraction(1, 3)) == 3'],
     'from fractions import Fraction\ndef f(x): return 1 / Fraction(x)'),
    (['from decimal import Decimal\nassert f("0.1") == Decimal("0.3")', 'assert f("1.5") == 4.5'],
     'from decimal import Decimal\ndef f(x): return Decimal(x) * 3'),
    (['assert f(3) == range(3)',
      'assert list(f(3)) == [0, 1, 2] and same(f(3), [0, 1, 2])',
      'assert f(10 ** 30)[-1] == 10 ** 30 - 1'],
     'def f(x): return range(x)'),
    (['assert same(f(), 1e308 * 10)',
      'assert same(f(10 ** 20), 10 ** 20 + 1)',
      'assert same(f(True), 1)'],
     'def f(x=1e309): return float(x) if x != 1 else x'),
])
def test_functions(asserts, program, watched):
    assert sandbox.run_asserts(program, asserts) == [True] * len(asserts)


@needs_sandbox
@pytest.mark.parametrize('program, score', [
    ('print(int(input()) + 1)\nexit()', 1), ('print(int(input()) + 1)\nquit(0)', 1),
    ('def main():\n    print(int(input()) + 1)\n    exit(0)\nmain()\nprint(5)', 1),
    ('print(int(input()) + 1)\nexit(1)', 0), ('print(int(input()) + 1)\nquit("no")', 0),
    ('exit()', 0), ('print(int(input()) + 1)\nexit(None)', 1),
    ('try:\n    exit(3)\nexcept SystemExit:\n    print(2)', 1)])
def test_exit_and_quit_end_a_program_as_in_python(program, score):
    assert graded(program, tests=[{'input': '1', 'output': '2'}]) == score


@needs_sandbox
@pytest.mark.parametrize('end, score', [('exit()', 1), ('quit(0)', 1), ('exit(1)', 0),
                                        ('import sys\nsys.exit()', 1), ('exit("no")', 0),
                                        ('raise KeyError', 0)])
def test_functions_of_a_program_that_ends_well_are_there(end, score):
    program = f'def f(x):\n    return x + 1\n{end}'
    assert graded(program, asserts=['assert f(1) == 2'], entry_point='f') == score


@needs_sandbox
def test_other_builtins_of_site_are_there():
    program = 'help, copyright, credits, license\nprint(help(abs) is None)'
    assert sandbox.run(program).stdout.endswith('True\n')


@needs_sandbox
def test_integers_of_any_length_are_read_and_printed():
    ten = '1' + '0' * 6000
    read = 'print(int(input()) + 1)'
    assert graded(read, tests=[{'input': ten, 'output': ten[:-1] + '1'}]) == 1
    assert graded(read, tests=[{'input': ten, 'output': ten}]) == 0
    program = 'def f(x):\n    return 10 ** x'
    right = [f'assert f(6000) == {ten}', f'assert str(f(6000)) == "{ten}"']
    assert graded(program, asserts=right) == 1
    assert graded(program, asserts=[f'assert f(6001) == {ten}']) == 0


SOLUTION = 'class Solution:\n    '


@needs_sandbox
@pytest.mark.parametrize('program, score', [
    (SOLUTION + 'def f(self, x):\n        return x + 1', 1), ('def f(x):\n    return x + 1', 1),
    (SOLUTION + 'def f(self, x):\n        return x', 0),
    (SOLUTION + 'def g(self, x):\n        return x + 1', 0),
    (SOLUTION + '@staticmethod\n    def f(x):\n        return x + 1', 1),
    (SOLUTION + 'f = lambda self, x: x + 1', 1), (SOLUTION + 'seen = 0', 0), ('Solution = 5', 0),
    (SOLUTION + 'n = 1\n    def f(self, x):\n        self.n += x\n        return self.n', 1),
    (f'def f(x):\n    return 0\n{SOLUTION}def f(self, x):\n        return x + 1', 1)])
def test_a_method_of_the_class_solution_is_called_on_an_instance_of_its_own(program, score):
    asserts = ['assert f(1) == 2', 'assert f(x=2) == 3', 'assert f(1) == 2']
    assert graded(program, asserts=asserts, entry_point='f') == score


@needs_sandbox
def test_nan_is_right_where_it_is_wanted_only():
    nan, infinity = float('nan'), float('inf')
    asserts = [call_assert('f', [nan], nan),
               call_assert('f', [infinity], [infinity, {'a': -infinity}])]
    right = 'def f(x): return x if x != x else [x, {"a": -x}]'
    liar = 'class E(float):\n    def __ne__(s, o): return True\ndef f(x): return E(1)'
    assert sandbox.run_asserts(right, asserts) == [True, True]
    assert sandbox.run_asserts('def f(x): return 5', asserts) == [False, False]
    assert sandbox.run_asserts(liar, asserts) == [False, False]


@needs_sandbox
@pytest.mark.parametrize('printed, wanted, tolerance, score', [
    ('0.3333333333333333', '0.333333333333', 1e-9, 1),
    ('0.3333333333333333', '0.333333333333', 0, 0),
    ('0.34', '0.333333333333', 1e-3, 0), ('YES 2.0000001', 'YES 2', 1e-6, 1),
    ('NO 2.0', 'YES 2.0', 1e-6, 0), ('1e-7', '0.0', 1e-6, 1), ('3000000.5', '3000000.0', 1e-6, 1),
    ('1000001', '1000000', 1e-3, 0), ('nan', '1.0', 1e-6, 0), ('inf', '1.0', 1e-6, 0),
    ('1e999', '1.0', 1e-6, 0), ('1.0 2.0', '1.0', 1e-6, 0), ('-0.5', '0.5', 1e-6, 0),
    ('1.0', '1.0 1.0', 1e-6, 0), ('', '0.0', 1e-6, 0), ('0.5\n0.25', '0.50000001\n0.25', 1e-6, 1),
    ('1  2\t3', '1 2 3', 0, 1), ('  1 2', '1 2', 0, 1), ('1\n\n2', '1\n2', 0, 1),
    ('12', '1 2', 0, 0),
    ('1 2', '2 1', 0, 0), ('a  b', 'a b', 0, 0), ('  a', 'a', 0, 0), ('YES  1', 'YES 1', 0, 0),
    ('[0.1000001, 2]', '[0.1, 2]', 1e-6, 1), ('[0.2, 2]', '[0.1, 2]', 1e-6, 0),
    ('x=0.5, 1.5', 'x=0.50, 1.5', 1e-6, 1), ('0.50,1.50', '0.5,1.5', 1e-6, 1),
    ('$0.50', '$0.5', 1e-6, 1), ('x=0.5', 'y=0.5', 1e-6, 0), ('0.5,2', '0.5,3', 1e-6, 0),
    ('0.5,1', '0.5', 1e-6, 0), ('[0.1, 3]', '[0.1, 2]', 1e-6, 0), ('0.1000001]', '[0.1]', 1e-6, 0),
    ('YES\n1  2 -3.5', 'YES\n1 2 -3.5', 0, 1), ('1.50', '1.5', 0, 0)])
def test_numbers_that_are_printed(printed, wanted, tolerance, score):
    row = {'tests': [{'input': '', 'output': wanted}], 'tolerance': tolerance}
    assert graded(f'print({printed!r})', **row) == score


@pytest.mark.parametrize('tolerance', [-1e-6, 1, float('nan'), float('inf'), '1e-6', True, [0.1]])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(ValueError, match="'tolerance' must be a number from 0 to below 1"):
        graded('print(1)', tests=TESTS, tolerance=tolerance)


@needs_sandbox
def test_seconds_need_not_be_whole():
    assert sandbox.run('print(1)', seconds=1.5).stdout == '1\n'
    assert graded('def f(x): return x', asserts=['assert f(1) == 1'], seconds=0.5) == 1
    assert graded('def f(x):\n    while True: pass', asserts=['assert f(1) == 1'], seconds=0.5) == 0


@needs_sandbox
def test_builtins_of_the_program_are_not_the_tests():
    """But for the function that is asked for: MBPP has a `sum` of its own."""
    program = 'def abs(x): return 0\ndef isinstance(x, y): return True\ndef f(x): return 7'
    asserts = ['assert abs(f(1) - 2) < 1', 'assert isinstance(f(1), str)']
    assert sandbox.run_asserts(program, asserts) == [False, False]
    own = 'def sum(a, b): return a * b'
    assert sandbox.run_asserts(own, ['assert sum(2, 3) == 6'], entry_point='sum') == [True]


@needs_sandbox
def test_the_function_named_is_the_programs():
    setup = '''
def f(x):
    return 0
def helper(x):
    return x + 1
def check(candidate):
    assert candidate(1) == helper(1)'''
    assert sandbox.run_asserts('def f(x): return x + 1', ['check(f)'], setup, 'f') == [True]
    assert sandbox.run_asserts('def f(x): return x', ['check(f)'], setup, 'f') == [False]
    assert sandbox.run_asserts('def helper(x): return x', ['check(f)'], setup, 'f') == [False]


@pytest.mark.parametrize('answer, program', [
    ('```python\na\n```', 'a'), ('```\na\nb\n```', 'a\nb'),
    ('```py\na\n```\ntext\n```python\nb\n```', 'b'),
    ('```python\na\n```\n```text\nb\n```', 'a'),
    ('<answer>\n```python\na\n```\n</answer>', 'a'),
    ('```python\nx\n```\n<answer>a</answer>', 'a'), ('a', None), ('```python\na', None),
    ('```python\na\n```\n```python\nb', None), ('<answer>a</answer><answer>b</answer>', None),
    ('', None), ('   ```python\na\n   ```', 'a'),
    ('```python\na\n```\nExample output:\n```\n6\n```', 'a'),
    ('```\n6\n```\n```py\na\n```', 'a'), ('```\na\n```\n```\nb\n```', 'b'),
    ('```text\na\n```', None),
    ('```python title="x"\na\n```', 'a'), ('``` Python3 \na\n```', 'a'),
    ('```python{1,3}\na\n```', 'a'), ('```python a\n```\n```bash\nb\n```', '')])
def test_program_of(answer, program):
    assert program_of('<think>\n```python\nno\n```</think>' + answer, {}) == program
    assert program_of(answer + '</think>', {'prefill': '<think>'}) is None


ADD, ASSERTS = 'def add(a, b):\n    return a + b', {'asserts': ['assert add(1, 2) == 3']}
DOUBLE = 'def solve():\n    print(2 * int(input()))\nsolve()'
LOOP = 'for i in range(int(input())):\n    print(i)'


def fenced(program, fence='```', kind='python', indent=''):
    return '\n'.join(indent + line for line in [fence + kind, *program.split('\n'), fence])


@pytest.mark.parametrize('usage', [
    'print(add(1, 2))', 'result = add(1, 2)\nprint(result)', '>>> add(1, 2)\n3', '# add(1, 2) is 3',
    'from solution import add\nassert add(1, 2) == 3', '',
    'import time\nt = time.time()\nadd(1, 2)',
    'def test():\n    assert add(1, 2) == 3\ntest()', 'print(input())'])
def test_an_example_of_its_use_is_not_the_program(usage):
    """Of functions: the last block that defines what is called."""
    stub, use = fenced('def add(a, b): ...'), fenced(usage)
    for row in (ASSERTS, {**ASSERTS, 'entry_point': 'add'}):
        assert program_of(f'{fenced(ADD)}\nExample usage:\n{use}', row) == ADD
        assert program_of(f'First\n{stub}\nNow\n{fenced(ADD)}\nUsage\n{use}', row) == ADD
        assert program_of(f'{use}\nThat needs\n{fenced(ADD)}', row) == ADD


@pytest.mark.parametrize('usage', [
    'solve()', 'print(solve())', '# Input: 3\n# Output: 6', 'x = 3\nprint(x)', '>>> solve()\n6', '',
    'n = int(input())', 'from solution import solve\nsolve()\nprint()',
    'import io, sys\nsys.stdin = io.StringIO("3")\n'
    'def test():\n    solve()\n    print("ok")\ntest()'])
def test_an_example_of_its_use_is_not_the_program_that_reads_and_prints(usage):
    output = fenced('6', kind='')
    assert program_of(f'{fenced(DOUBLE)}\nUsage:\n{fenced(usage)}\nprints\n{output}', {}) == DOUBLE


def test_of_several_whole_programs_the_last_is_graded():
    other = 'seen = set()\nfor x in map(int, input().split()):\n    seen.add(x)\nprint(len(seen))'
    first = 'def add(x):\n    return x + 1\ndef input(): return "3"\nprint(add(input()))'
    assert program_of(f'{fenced(first)}\nor\n{fenced(other)}', {}) == other  # seen.add is not add
    assert program_of(f'{fenced(other)}\nor\n{fenced(DOUBLE)}', {}) == DOUBLE
    short = 'add = lambda a, b: a + b'
    assert program_of(f'{fenced(ADD)}\nor\n{fenced(short)}', ASSERTS) == short


@pytest.mark.parametrize('answer', [
    fenced(LOOP, indent='   '), fenced(LOOP, indent='\t'), fenced(LOOP, '~~~'),
    fenced(LOOP, '````'),
    fenced(LOOP, '~~~~~', ' python'), '1. ' + fenced(LOOP, indent='   ')[3:],
    '- ' + fenced(LOOP, indent='  ')[2:], '10) ' + fenced(LOOP, indent='    ')[4:],
    '   ```python\n' + '\n'.join('     ' + line for line in LOOP.split('\n')) + '\n   ```',
    '```python\n' + '\n'.join('    ' + line for line in LOOP.split('\n')) + '\n```',
    fenced(LOOP, '```', 'Python3'), fenced(LOOP, kind='python:main.py'),
    fenced(LOOP, kind='py'), fenced(LOOP, '~~~', ''),
    f'```python\n{LOOP}\n`````', '1. Read.\n\n' + fenced(LOOP, indent='      ') + '\n2. Done.'])
def test_fences_of_all_kinds_and_indents(answer):
    assert program_of(f'Here:\n{answer}\nDone.', {}) == LOOP


@pytest.mark.parametrize('program', [
    'def f():\n    """\n    ```\n    f()\n    ```\n    """\n    return 1',
    '"""\n```python\nf()\n```\n"""\nprint(1)', 'x = \'"""\'  # a quote\nprint(x)',
    "'''\n~~~\n```\n'''\nprint(1)", 'x = "\\"" + """\n```\n"""', '# it\'s """\nprint(1)'])
def test_fences_in_strings_are_the_programs(program):
    output = fenced('6', kind='')
    assert program_of(f'{fenced(program)}\nand\n{output}', {}) == program


def test_a_quote_that_is_never_closed_ends_at_the_fence():
    assert program_of(fenced('x = """') + '\nDone.', {}) == 'x = """'
    assert program_of(fenced('x = """') + '\n' + fenced('no')[:-3], {}) is None


def test_the_body_of_a_function_that_the_row_starts_keeps_its_indent():
    row = {'starter': 'def add(a, b):\n    """Adds."""\n'}
    assert program_of('```python\n    return a + b\n```', row) == '    return a + b'


TRIPLE = fenced('print(int(input()) * 3)')
PROGRAM_HACKS = {  # the right program prints twice its input; each of these earns nothing
    'the right one first, another last': f'{fenced(DOUBLE)}\n{TRIPLE}',
    'the right one as an example of use':
        fenced('def solve(): pass\nprint(input())') + '\n'
        + fenced('print(2 * int(input()))\nsolve()'),
    'the right one unmarked': fenced(DOUBLE, kind='') + '\n' + TRIPLE,
    'the right one as text': fenced(DOUBLE, kind='text'),
    'the right one in a string': fenced(f"x = '''\n{fenced(DOUBLE)}\n'''"),
    'the right one in a longer fence of text': fenced(fenced(DOUBLE), '````', 'markdown'),
    'the right one before the reasoning ends': fenced(DOUBLE) + '</think>\n' + TRIPLE,
    'the right one never closed': fenced(DOUBLE)[:-3],
    'a shorter fence at its end': fenced(DOUBLE, '````')[:-1],
    'another fence at its end': fenced(DOUBLE)[:-3] + '~~~',
    'leaving before the end': fenced('print(input())\nexit()'),
    'leaving with success': fenced('exit(0)'),
    'both outputs': fenced('n = int(input())\nprint(2 * n)\nprint(3 * n)'),
    'many numbers': fenced('input()\nprint(*range(100))'),
    'not a number': fenced('input()\nprint("nan")'), 'infinity': fenced('input()\nprint("1e999")'),
    'a number in words': fenced('input()\nprint("six")'), 'no number': fenced('input()\nprint()')}


@needs_sandbox
@pytest.mark.parametrize('name', PROGRAM_HACKS)
def test_program_hacks(name):
    tests = [{'input': '3', 'output': '6'}, {'input': '4', 'output': '8.0'}]
    row = {'prefill': '<think>', 'tests': tests, 'tolerance': 0.01}
    assert code_reward(f'x</think>{PROGRAM_HACKS[name]}', row) == 0
    assert code_reward(f'x</think>{fenced(DOUBLE)}', row) == 1


@pytest.mark.parametrize('text', [
    '~' * 10 ** 6 + '`', ' ' * 10 ** 6 + '`', '- ' * 10 ** 6, '```python\n' + '"\\' * 10 ** 6,
    '```python\n"""\n' * 10 ** 5, '```python\nx=1\n```\n' * 10 ** 4,
    '```python\n' + 'a ' * 10 ** 6 + '\n```', '```python\n' + 'def f(\n' * 10 ** 5 + '\n```',
    '```\n' * 10 ** 5, '```python\n' * 10 ** 5, '<answer>' * 10 ** 5, '`' * 10 ** 6])
def test_program_of_is_linear(text):
    start = time.process_time()
    program_of(text, {})
    assert time.process_time() - start < 2


# ---------------------------------------------------------------- real problems


def real_rows(step):
    """(program, names that it defines, row) of HumanEval and MBPP"""
    if not SHARED.exists():
        pytest.skip('needs the shared data')
    found = []
    with gzip.open(SHARED / 'humaneval/HumanEval.jsonl.gz', 'rt') as file:
        for row in map(json.loads, file):
            name = row['entry_point']
            tests = {'asserts': [f'check({name})'], 'setup': row['prompt'] + row['test'],
                     'entry_point': name, 'starter': row['prompt']}
            found.append((row['canonical_solution'], [name], tests))
    for row in map(json.loads, (SHARED / 'mbpp/mbpp.jsonl').read_text().splitlines()):
        names = re.findall(r'^(?:def|class) (\w+)', row['code'], re.MULTILINE)
        tested = [name for name in names if re.search(rf'\b{name}\b', row['test_list'][0])]
        tests = {'asserts': row['test_list'] + row['challenge_test_list'],
                 'setup': row['test_setup_code'], 'entry_point': tested[0]}
        found.append((row['code'], names, tests))
    return found[::step]


def right_and_broken(step):
    wrong = []
    for program, names, row in real_rows(step):
        if code_reward(f'```python\n{program}\n```', row) != 1:
            wrong.append(('right', names, row['asserts'][0]))
        broken = '\n\n'.join(f'def {name}(*args, **named):\n    return None' for name in names)
        if code_reward(f'```python\n{program}\n\n{broken}\n```', row) != 0:
            wrong.append(('broken', names, row['asserts'][0]))
    return wrong


@needs_sandbox
def test_some_of_humaneval_and_mbpp():
    assert right_and_broken(53) == []


@needs_sandbox
@pytest.mark.slow
def test_all_of_humaneval_and_mbpp():
    assert right_and_broken(1) == []


@needs_sandbox
@pytest.mark.slow
def test_twenty_programs_a_second():
    # of the processor, children's included: the clock would also count what others do
    start = sum(os.times()[:4])
    for _ in range(60):
        assert sandbox.run('print(int(input()) * 2)', '21').stdout == '42\n'
    assert (sum(os.times()[:4]) - start) / 60 < 1 / 20


# ---------------------------------------------------------------- without a sandbox


def test_training_refuses_to_start_without_bubblewrap(monkeypatch):
    monkeypatch.setattr(sandbox, '_works', {})
    monkeypatch.setattr(sandbox.shutil, 'which', lambda name: None)
    with pytest.raises(sandbox.SandboxError, match='apt install bubblewrap.*--unsafe_code=True'):
        rewards.prepare({'accuracy': 1.0}, {'code'})
    rewards.prepare({'accuracy': 1.0}, {'math'})  # runs no programs
    before = rewards.FAILURES.total()
    row = {'task': 'code', 'tests': TESTS}
    assert rewards.combined('```\nprint(1)\n```', row, {'accuracy': 1.0})[0] == 0
    assert rewards.FAILURES.total() == before + 1


@needs_sandbox
def test_a_sandbox_that_leaks_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, '_works', {})
    whole = sandbox._bubblewrap

    def leaking(prefix):
        return [*whole(prefix), '--ro-bind', '/etc', '/etc']
    monkeypatch.setattr(sandbox, '_bubblewrap', leaking)
    with pytest.raises(sandbox.SandboxError, match='bad: /etc/passwd'):
        sandbox.require()


def test_the_unsafe_way_warns_and_still_limits(monkeypatch):
    monkeypatch.setattr(sandbox, '_works', {})
    monkeypatch.setattr(sandbox, 'unsafe', False)
    monkeypatch.setattr(sandbox.shutil, 'which', lambda name: None)
    with pytest.warns(UserWarning, match='WITHOUT a sandbox'):
        rewards.prepare({'accuracy': 1.0}, {'code'}, unsafe_code=True, workers=0)
    assert graded('print(sum(map(int, input().split())))', tests=TESTS) == 1
    assert graded('def f(x): return x', asserts=['assert f(1) == 1']) == 1
    result = sandbox.run('while True: pass', seconds=1)
    assert result.code != 0 or result.timed_out
    assert sandbox.run('x = bytearray(4 << 30)').code != 0


@needs_sandbox
@pytest.mark.parametrize('at_once', [True, False])
def test_a_killed_parent_takes_its_programs_along(at_once):
    """A grader that is killed leaves nothing behind: not while a program runs, nor (after the
    seconds of the timer within) while a sandbox starts."""
    code = ('import sys\nfrom graders import sandbox\nsandbox.require()\nprint("on", flush=True)\n'
            f'sandbox.run("import time; time.sleep(1000)", seconds={1 if at_once else 100})')
    root = Path(sandbox.__file__).parents[1]
    process = subprocess.Popen([sys.executable, '-c', code], cwd=root, stdout=subprocess.PIPE,
                               text=True)
    assert process.stdout.readline() == 'on\n'

    # the sandbox's namespace, and in it the timer and the program
    end = time.monotonic() + 30
    found = None
    while found is None and time.monotonic() < end:
        for child in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split():
            inner = Path(f'/proc/{child}/task/{child}/children').read_text().split()
            found = os.stat(f'/proc/{inner[0]}/ns/pid').st_ino if inner else None
    while not at_once and len(inhabitants({found})) < 2 and time.monotonic() < end:
        time.sleep(0.01)

    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 30
    while inhabitants({found}) and time.monotonic() < end:
        time.sleep(0.01)
    assert found and inhabitants({found}) == []
