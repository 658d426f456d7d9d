"""
Runs programs that a model wrote: bubblewrap's namespaces around a Python of its own, resource limits within.

    result = run('print(int(input()) * 2)', '21')                            # result.stdout == '42\n'
    passed = run_asserts('def f(x): return x + 1', ['assert f(1) == 2'])     # [True]

The program sees /usr, an empty /tmp of 64 MB and nothing else: no network, no other process, no environment, no user. It never
sees what is expected of it either. What it prints is compared out here; asserts run in a second sandbox, which asks the
program's for the values of calls, and plain data is all that comes back: an object that equals everything, an early exit or a
forged line on any file descriptor is at most a wrong value. When its time is over, or its parent dies, all its processes die.

As root a sandbox is started as uid 65534, as the kernel counts no processes of root's. Without bubblewrap everything here
raises SandboxError, unless `require(unsafe=True)` allowed to go on with resource limits alone.

The address spaces of a program's processes together are looked at 20 times a second and bounded by MEMORY; memory that belongs
to no process (memfd, System V) cannot be had at all.

Left out: other languages than Python, packages (the interpreter runs with -I -S), asserts about what a function did to its
arguments (it gets copies), a bound of memory that holds at every instant (that takes a cgroup; these processes are the first that
the kernel kills when memory runs out).
"""
import ast
import builtins
import json
import math
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

if hasattr(sys, 'set_int_max_str_digits'):  # tests may hold longer integers than Python reads
    sys.set_int_max_str_digits(0)

SECONDS = 5              # CPU time of a program; it may take twice as much by the clock
OUTPUT = 1 << 20         # longest output that is read, bytes
MEMORY = 1 << 30         # bytes of all processes of a program together; of one of them 512 MB
unsafe = False           # set by require()
_works = {}              # uid of this process -> (prefix of the command, interpreter), once the self-test has passed


class SandboxError(ValueError):
    """Programs cannot be run safely on this machine, as the settings ask for."""


@dataclass
class Result:
    stdout: str          # at most OUTPUT bytes of it
    code: int            # exit status, 0 where all went well
    timed_out: bool


# ---------------------------------------------------------------------------------------------------------------------
# the programs around the program: each starts with LIMITS, argv is file descriptors

LIMITS = '''
import os, sys, resource, signal
seconds = int(sys.argv[1])
program = os.fork()
if program:  # the namespace's first process, with which all others die: it ends in time even where nobody outside is left to see to it
    def end(*_):
        os.kill(program, signal.SIGKILL)
        os._exit(124)
    os.closerange(0, 64)
    signal.signal(signal.SIGALRM, end)
    signal.alarm(2 * seconds + 2)
    while True:
        pid, status = os.wait()
        if pid == program:
            os._exit(os.waitstatus_to_exitcode(status) % 256)
for name, most in (('AS', 512 << 20), ('FSIZE', 16 << 20), ('NOFILE', 32), ('CORE', 0), ('NPROC', 16), ('CPU', seconds)):
    try:
        resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (most, most + (name == 'CPU')))
    except ValueError:
        if sys.platform == 'linux':  # macOS has no limit of memory
            raise
try:
    with open('/proc/self/oom_score_adj', 'w') as file:
        file.write('1000')
except OSError:
    pass
import site  # whose main, which python -S leaves out, gives exit, quit and help
site.setquit()
site.sethelper()
site.setcopyright()
if hasattr(sys, 'set_int_max_str_digits'):
    sys.set_int_max_str_digits(0)
'''

RUN = LIMITS + '''
with open(int(sys.argv[2]), encoding='utf-8') as file:
    source = file.read()
sys.argv = ['program']
code = compile(source, 'program', 'exec')
del seconds, name, most, file, program, resource, signal, os, sys, site, source
exec(code)
'''

CODEC = '''
import json
KINDS = {kind.__name__: kind for kind in (int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict, bool)}
NUMBERS = {'Fraction': 'fractions', 'Decimal': 'decimal'}

def encode(x, other):
    """Plain data as JSON; `other` names the rest."""
    if x is None or x is True or x is False:
        return x
    if type(x) is type and x in KINDS.values():
        return ['k', x.__name__]
    if isinstance(x, str):
        return str.__str__(x)
    for kind, tag in ((int, 'i'), (float, 'f')):
        if isinstance(x, kind):
            return [tag, hex(int.__index__(x)) if kind is int else float.hex(x)]
    if isinstance(x, complex):
        return ['c', float.hex(x.real), float.hex(x.imag)]
    if isinstance(x, (bytes, bytearray)):
        return ['b', bytes(x).hex()]
    for kind, tag in ((list, 'l'), (tuple, 't'), (set, 's'), (frozenset, 'z')):
        if isinstance(x, kind):
            return [tag, *[encode(y, other) for y in kind.__iter__(x)]]
    if isinstance(x, dict):
        return ['d', *[[encode(k, other), encode(v, other)] for k, v in dict.items(x)]]
    if type(x) is range:
        return ['r', *[encode(y, other) for y in (x.start, x.stop, x.step)]]
    if NUMBERS.get(type(x).__name__) == type(x).__module__:
        return ['n', type(x).__name__, str(x)]
    return ['o', other(x)]

def decode(x, other):
    if not isinstance(x, list):
        return x
    tag, *rest = x
    if tag == 'k':
        return KINDS[rest[0]]
    if tag in 'ltsz':
        return {'l': list, 't': tuple, 's': set, 'z': frozenset}[tag](decode(y, other) for y in rest)
    if tag == 'd':
        return {decode(k, other): decode(v, other) for k, v in rest}
    if tag == 'r':
        return range(*[decode(y, other) for y in rest])
    if tag == 'n':
        return getattr(__import__(NUMBERS[rest[0]]), rest[0])(rest[1])
    return {'i': lambda v: int(v, 16), 'f': float.fromhex, 'b': bytes.fromhex, 'o': other,
            'c': lambda re, im: complex(float.fromhex(re), float.fromhex(im))}[tag](*rest)
'''

ANSWER = LIMITS + CODEC + '''
import operator, types
with open(int(sys.argv[2]), encoding='utf-8') as file:
    source = file.read()
incoming, outgoing = open(int(sys.argv[3])), open(int(sys.argv[4]), 'w')
things = []

def keep(x):
    for i, y in enumerate(things):
        if y is x:
            return i
    things.append(x)
    return len(things) - 1

module = types.ModuleType('program')
sys.modules['program'] = module
sys.argv = ['program']

def find(name):
    """The program's function, or the method of its class Solution on an instance of its own."""
    solution = vars(module).get('Solution')
    if hasattr(solution, name):
        return lambda *args, **named: getattr(solution(), name)(*args, **named)
    return getattr(module, name)

do = {'name': find, 'call': lambda f, *args, **named: f(*args, **named), 'getattr': getattr,
      'setattr': setattr, 'getitem': operator.getitem, 'len': len, 'next': next, 'list': list}
try:
    exec(compile(source, 'program', 'exec'), module.__dict__)
except SystemExit as end:  # a program that ends well has its functions still
    if end.code is not None and end.code != 0:
        os._exit(1)
except BaseException:
    os._exit(1)
for line in incoming:
    try:
        what, args, named = json.loads(line)
        args, named = ([decode(x, things.__getitem__) for x in args], {k: decode(x, things.__getitem__) for k, x in named.items()})
        answer = ['value', encode(do[what](*args, **named), keep)]
    except BaseException as error:
        answer = ['error', type(error).__name__]
    outgoing.write(json.dumps(answer) + '\\n')
    outgoing.flush()
'''

ASK = LIMITS + CODEC + '''
with open(int(sys.argv[2]), encoding='utf-8') as file:
    setup, asserts, names, entry_point = json.load(file)
incoming, outgoing, verdict = open(int(sys.argv[3])), open(int(sys.argv[4]), 'w'), int(sys.argv[5])
remotes = {}

def ask(what, *args, **named):
    number = lambda x: object.__getattribute__(x, 'number')
    other = lambda i: remotes.setdefault(i, Remote(i))
    outgoing.write(json.dumps([what, [encode(x, number) for x in args], {k: encode(x, number) for k, x in named.items()}]) + '\\n')
    outgoing.flush()
    line = incoming.readline(1 << 24)
    if line[-1:] != '\\n':
        raise EOFError
    kind, value = json.loads(line)
    if kind == 'error':
        known = {e.__name__: e for e in (StopIteration, ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError)}
        raise known.get(value, RuntimeError)(value)
    return decode(value, other)

class Remote:
    """Something in the program's process that is not plain data. It equals only itself, and is neither true nor false."""
    def __init__(self, number):
        object.__setattr__(self, 'number', int(number))
    def __call__(self, *args, **named):
        return ask('call', self, *args, **named)
    def __getattr__(self, name):
        return ask('getattr', self, name)
    def __setattr__(self, name, value):
        ask('setattr', self, name, value)
    def __getitem__(self, key):
        return ask('getitem', self, key)
    def __len__(self):
        return ask('len', self)
    def __next__(self):
        return ask('next', self)
    def __iter__(self):
        return iter(ask('list', self))
    def __bool__(self):
        raise TypeError('neither true nor false')

def same(a, b):
    """JSON has no tuples, and its numbers were printed once."""
    if isinstance(a, (list, tuple, range)) and isinstance(b, (list, tuple, range)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if float in (type(a), type(b)) and {type(a), type(b)} <= {int, float}:
        both_nan = a != a and b != b
        return a == b or both_nan or abs(a - b) <= 1e-9 * max(abs(a), abs(b), 1e-3) < float('inf')
    return a == b

space = {'__name__': 'tests', 'same': same}
try:
    for name in names:
        try:
            space[name] = ask('name', name)
        except AttributeError:
            pass
    exec(compile(setup, 'setup', 'exec'), space)
    if entry_point:
        space[entry_point] = ask('name', entry_point)
    for text in asserts:
        try:
            exec(compile(text, 'assert', 'exec'), space)
            os.write(verdict, b'1')
        except EOFError:
            break
        except BaseException:
            os.write(verdict, b'0')
except BaseException:
    pass
'''


# ---------------------------------------------------------------------------------------------------------------------
# starting and stopping


def _bubblewrap(prefix):
    """The command that a program's command is appended to; `prefix`: where the interpreter lives, if outside /usr."""
    return [*'''bwrap --unshare-all --unshare-user --disable-userns --as-pid-1 --die-with-parent --new-session --clearenv
        --setenv PATH /usr/bin:/bin --setenv HOME /tmp --setenv LANG C.UTF-8 --ro-bind /usr /usr
        --symlink usr/bin /bin --symlink usr/lib /lib --symlink usr/lib64 /lib64 --ro-bind-try /etc/ld.so.cache /etc/ld.so.cache'''.split(),
        *([] if prefix == '/usr' or prefix.startswith('/usr/') else ['--ro-bind', prefix, prefix]),
        *'''--proc /proc --dev /dev --remount-ro /dev --size 67108864 --tmpfs /tmp --chdir /tmp --cap-drop ALL --uid 65534 --gid 65534
        --hostname box --remount-ro /'''.split()]


def _filter():
    """A seccomp filter: memfd_create, memfd_secret, shmget and msgget fail, and so does all of another architecture's calls."""
    known = {'x86_64': (0xC000003E, (29, 68, 319, 447)), 'aarch64': (0xC00000B7, (194, 186, 279, 447))}
    architecture, calls = known.get(os.uname().machine, (0, ()))
    load, equal, above, give = 0x20, 0x15, 0x35, 0x06
    denied, allowed = 0x00050001, 0x7FFF0000
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, denied), (load, 0, 0, 0), (above, 0, 1, 1 << 30), (give, 0, 0, denied)]
    for number in calls:
        code += [(equal, 0, 1, number), (give, 0, 0, denied)]
    return b''.join(struct.pack('HBBI', *line) for line in [*code, (give, 0, 0, allowed)]) if calls else b''


def _start(runner, descriptors, seconds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, how=None):
    command, python = how or (([], sys.executable) if unsafe else _checked())
    user = dict(user=65534, group=65534, extra_groups=[]) if command and os.getuid() == 0 else {}
    rules, fill = os.pipe()
    try:
        with open(fill, 'wb') as file:
            file.write(code := _filter())
        command = [*command, '--seccomp', str(rules)] if command and code else command
        return subprocess.Popen([*command, python, '-I', '-S', '-c', runner, str(math.ceil(seconds)), *map(str, descriptors)], stdin=stdin,
                                stdout=stdout, stderr=subprocess.DEVNULL, env={'PATH': '/usr/bin:/bin'}, pass_fds=[*descriptors, rules],
                                start_new_session=True, **user)
    finally:
        os.close(rules)


def _stop(process):
    """Kills the program and all its processes. The namespace dies with its first process, bubblewrap's child; killed through it
    rather than bubblewrap itself, it leaves no zombie for the machine's first process to reap, which in a container may be us."""
    try:
        if process.poll() is None:
            for child in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split():
                os.kill(int(child), signal.SIGKILL)
            _wait(process, time.monotonic() + 1)
    except OSError:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):   # the latter by macOS, where all have ended
        pass
    process.wait()


def _file(text):
    """An open, unnamed file that holds text."""
    file = tempfile.TemporaryFile()
    file.write(text.encode('utf-8', 'replace'))
    file.seek(0)
    return file


def _readable(descriptor, end):
    """-> True when there is something to read before `end` on the monotonic clock."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, end - time.monotonic()) * 1000))


def _wait(process, end):
    """-> True when the process ended before `end`. Popen.wait(timeout) would look only every 50 ms."""
    if not hasattr(os, 'pidfd_open'):
        try:
            process.wait(max(0.0, end - time.monotonic()))
            return True
        except subprocess.TimeoutExpired:
            return False
    descriptor = os.pidfd_open(process.pid)
    try:
        return _readable(descriptor, end)
    finally:
        os.close(descriptor)


def _memory(process):
    """Bytes of address space of a sandbox's processes together. Looked at from outside, where no program can deceive it."""
    total, left = 0, [str(process.pid)]
    while left:
        pid = left.pop()
        try:
            total += int(Path(f'/proc/{pid}/statm').read_text().split()[0]) * os.sysconf('SC_PAGE_SIZE')
            for task in os.listdir(f'/proc/{pid}/task'):
                left += Path(f'/proc/{pid}/task/{task}/children').read_text().split()
        except OSError:
            pass  # gone meanwhile
    return total


def _looks(processes, end):
    """Yields the time of the next look at the processes' memory, until `end` on the monotonic clock or until it is too much."""
    while (now := time.monotonic()) < end:
        yield min(end, now + 0.05)
        if any(_memory(process) > MEMORY for process in processes):
            return


def run(program, stdin='', seconds=SECONDS, how=None):
    """Runs a Python program (str) as __main__ -> Result. Whatever the program does, only SandboxError is raised."""
    with _file(program) as source, _file(stdin) as given, tempfile.TemporaryFile() as printed:
        process = _start(RUN, [source.fileno()], seconds, given, printed, how)
        end = time.monotonic() + 2 * seconds
        try:
            any(_wait(process, look) for look in _looks([process], end))
        finally:
            timed_out = time.monotonic() >= end
            _stop(process)
        printed.seek(0)
        return Result(printed.read(OUTPUT).decode('utf-8', 'replace'), process.returncode, timed_out)


def run_asserts(program, asserts, setup='', entry_point=None, seconds=SECONDS):
    """Runs asserts (source of statements) against a program -> list of bool, one an assert.

    The asserts and `setup` share one namespace, in which names that they use and do not define are the program's, and so is
    `entry_point` after `setup` has run; a method of the program's class Solution is a function too.
    `same(a, b)` there is equality but for tuples against lists and the last digits; nan is nan.
    """
    names = _free_names(setup, asserts)
    asks, answers, verdicts = os.pipe(), os.pipe(), os.pipe()
    processes, passed = [], b''
    try:
        with _file(program) as source, _file(json.dumps([setup, asserts, names, entry_point])) as tests:
            processes.append(_start(ANSWER, [source.fileno(), asks[0], answers[1]], seconds))
            processes.append(_start(ASK, [tests.fileno(), answers[0], asks[1], verdicts[1]], seconds))
        for descriptor in (*asks, *answers, verdicts[1]):
            os.close(descriptor)
        asks = answers = ()
        for look in _looks(processes, time.monotonic() + 2 * seconds):
            if _readable(verdicts[0], look):
                more = os.read(verdicts[0], len(asserts) - len(passed))
                passed += more
                if not more or len(passed) == len(asserts):
                    break
    finally:
        for process in processes:
            _stop(process)
        for descriptor in (*asks, *answers, *((verdicts[1],) if asks else ()), verdicts[0]):
            os.close(descriptor)
    return [passed[i:i + 1] == b'1' for i in range(len(asserts))]


def _free_names(setup, asserts):
    """Names that the tests use and nobody there defines. ValueError: the tests are not Python."""
    used, defined = set(), set(vars(builtins)) | {'same'}
    for text in (setup, *asserts):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f'a test is not Python: {text[:80]!r}: {error}') from None
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                defined.update((alias.asname or alias.name).split('.')[0] for alias in node.names)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
    return sorted(used - defined)


# ---------------------------------------------------------------------------------------------------------------------
# does it hold?

SELF_TEST = '''
import os, signal, socket
bad = [path for path in ('/root', '/home', '/etc/passwd', '/var', '/sys') if os.path.exists(path)]
bad += ['environment'] * (set(os.environ) - {'PATH', 'HOME', 'LANG', 'PWD', 'LC_CTYPE'} != set())
for path in ('/', '/dev', '/usr', '/proc/sys/kernel'):
    try:
        open(path + '/written', 'w').close()
        bad.append('writing in ' + path)
    except OSError:
        pass
if os.getuid() == 0 or len([p for p in os.listdir('/proc') if p.isdigit()]) > 3:
    bad.append('root, or processes of others')
server = socket.socket()
server.settimeout(1)
if server.connect_ex(('1.1.1.1', 53)) != 101:
    bad.append('network')
children = []
try:
    for _ in range(40):
        children.append(os.fork())
        if not children[-1]:
            signal.pause()
    bad.append('forks')
except OSError:
    pass
print('bad: ' + ', '.join(bad) if bad else 'contained')
'''


def _checked():
    """-> command prefix, interpreter of the sandbox; tested once in a process."""
    if os.getuid() in _works:
        return _works[os.getuid()]
    if not shutil.which('bwrap'):
        raise SandboxError("bubblewrap is missing: install it (apt install bubblewrap), or pass --unsafe_code=True to run the model's "
                           'programs with resource limits only')
    found = []
    for python, prefix in ((sys.executable, sys.base_prefix), ('/usr/bin/python3', '/usr')):
        how = _bubblewrap(prefix), os.path.realpath(python)
        try:
            result = run(SELF_TEST, how=how)
        except OSError as error:
            result = Result(str(error), 1, False)
        if result.stdout == 'contained\n':
            return _works.setdefault(os.getuid(), how)
        found.append(f'with {how[1]}: ' + (result.stdout.strip() or f'exit status {result.code}, timed out: {result.timed_out}'))
    raise SandboxError(f'bubblewrap does not contain programs on this machine ({"; ".join(found)}): it needs user namespaces and, as '
                       'root, a Python that other users can read; --unsafe_code=True runs programs with resource limits only')


def require(unsafe_code=False):
    """Before training: raises SandboxError unless programs are contained, or else, if unsafe_code, warns and goes on without."""
    global unsafe
    unsafe = False
    try:
        _checked()
    except SandboxError as error:
        if not unsafe_code:
            raise
        unsafe = True
        warnings.warn(f'programs written by the model run WITHOUT a sandbox, with your rights: {error}', stacklevel=2)
