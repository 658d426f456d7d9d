"""
Runs programs that a model wrote: bubblewrap's namespaces around a Python of its own, resource
limits within.

    result = run('print(int(input()) * 2)', '21')                            # result.stdout '42\\n'
    passed = run_asserts('def f(x): return x + 1', ['assert f(1) == 2'])     # [True]

The program sees /usr, an empty /tmp of 64 MB and nothing else: no network, no other process, no
environment, no user. It never sees what is expected of it either. What it prints is compared out
here; asserts run in a second sandbox, which asks the program's for the values of calls (see
inside.py), and plain data is all that comes back: an object that equals everything, an early exit
or a forged line on any file descriptor is at most a wrong value. When its time is over, or its
parent dies, all its processes die.

As root a sandbox is started as uid 65534, as the kernel counts no processes of root's. Without
bubblewrap everything here raises SandboxError, unless `require(unsafe_code=True)` allowed to go on
with resource limits alone.

The address spaces of a program's processes together are looked at 20 times a second and bounded by
MEMORY; memory that belongs to no process (memfd, System V) cannot be had at all.

Left out: other languages than Python, packages (the interpreter runs with -I -S), asserts about
what a function did to its arguments (it gets copies), a bound of memory that holds at every instant
(that takes a cgroup; these processes are the first that the kernel kills when memory runs out).
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

from graders.inside import ANSWER, ASK, RUN, SELF_TEST

if hasattr(sys, 'set_int_max_str_digits'):  # tests may hold longer integers than Python reads
    sys.set_int_max_str_digits(0)

SECONDS = 5              # CPU time of a program; it may take twice as much by the clock
OUTPUT = 1 << 20         # longest output that is read, bytes
MEMORY = 1 << 30         # bytes of all processes of a program together; of one of them 512 MB
unsafe = False           # set by require()
_works = {}              # uid of this process -> (prefix of the command, interpreter) that passed


class SandboxError(ValueError):
    """Programs cannot be run safely on this machine, as the settings ask for."""


@dataclass
class Result:
    stdout: str          # at most OUTPUT bytes of it
    code: int            # exit status, 0 where all went well
    timed_out: bool


# ---------------------------------------------------------------- running

def run(program, stdin='', seconds=SECONDS, how=None):
    """Runs a Python program (str) as __main__ -> Result. Whatever the program does, only
    SandboxError is raised."""
    with _file(program) as source, _file(stdin) as given, tempfile.TemporaryFile() as printed:
        process = _start(RUN, [source.fileno()], seconds, given, printed, how)
        end = time.monotonic() + 2 * seconds
        try:
            for look in _looks([process], end):
                if _wait(process, look):
                    break
        finally:
            timed_out = time.monotonic() >= end
            _stop(process)
        printed.seek(0)
        stdout = printed.read(OUTPUT).decode('utf-8', 'replace')
    return Result(stdout, process.returncode, timed_out)


def run_asserts(program, asserts, setup='', entry_point=None, seconds=SECONDS):
    """Runs asserts (source of statements) against a program -> list of bool, one an assert.

    The asserts and `setup` share one namespace, in which names that they use and do not define are
    the program's, and so is `entry_point` after `setup` has run; a method of the program's class
    Solution is a function too. `same(a, b)` there is equality but for tuples against lists and the
    last digits; nan is nan.
    """
    tests = json.dumps([setup, asserts, _free_names(setup, asserts), entry_point])
    asks, answers, verdicts = os.pipe(), os.pipe(), os.pipe()  # (to read, to write)
    theirs = [*asks, *answers, verdicts[1]]                    # closed here once they have them
    processes = []
    passed = b''                                               # b'1' or b'0' an assert
    try:
        with _file(program) as source, _file(tests) as questions:
            ends = source.fileno(), asks[0], answers[1]
            processes.append(_start(ANSWER, ends, seconds))
            ends = questions.fileno(), answers[0], asks[1], verdicts[1]
            processes.append(_start(ASK, ends, seconds))
        while theirs:
            os.close(theirs.pop())

        for look in _looks(processes, time.monotonic() + 2 * seconds):
            if _readable(verdicts[0], look):
                more = os.read(verdicts[0], len(asserts) - len(passed))
                passed += more
                if not more or len(passed) == len(asserts):
                    break
    finally:
        for process in processes:
            _stop(process)
        for descriptor in [*theirs, verdicts[0]]:
            os.close(descriptor)
    return [passed[i:i + 1] == b'1' for i in range(len(asserts))]


def _free_names(setup, asserts):
    """Names that the tests use and nobody there defines. ValueError: the tests are not Python."""
    used = set()
    defined = {*vars(builtins), 'same'}
    for text in (setup, *asserts):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f'a test is not Python: {text[:80]!r}: {error}') from None
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
            elif isinstance(node, ast.Name):
                defined.add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                defined.update((name.asname or name.name).split('.')[0] for name in node.names)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
    return sorted(used - defined)


def _file(text):
    """An open, unnamed file that holds text."""
    file = tempfile.TemporaryFile()
    file.write(text.encode('utf-8', 'replace'))
    file.seek(0)
    return file


# ---------------------------------------------------------------- starting

def _bubblewrap(prefix):
    """The command that a program's command is appended to; `prefix`: where the interpreter lives,
    if outside /usr."""
    alone = ('--unshare-all --unshare-user --disable-userns --as-pid-1 --die-with-parent'
             ' --new-session')
    environment = '--clearenv --setenv PATH /usr/bin:/bin --setenv HOME /tmp --setenv LANG C.UTF-8'
    system = ('--ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib'
              ' --symlink usr/lib64 /lib64 --ro-bind-try /etc/ld.so.cache /etc/ld.so.cache')
    devices = '--proc /proc --dev /dev --remount-ro /dev'
    disk = '--size 67108864 --tmpfs /tmp --chdir /tmp'
    user = '--cap-drop ALL --uid 65534 --gid 65534 --hostname box'

    command = ['bwrap', *f'{alone} {environment} {system}'.split()]
    if prefix != '/usr' and not prefix.startswith('/usr/'):
        command += ['--ro-bind', prefix, prefix]
    command += f'{devices} {disk} {user}'.split()
    return [*command, '--remount-ro', '/']


REFUSED = {  # machine -> its number for the kernel, and those of the calls that are refused:
    'x86_64': (0xC000003E, (29, 68, 319, 447)),      # shmget, msgget, memfd_create, memfd_secret
    'aarch64': (0xC00000B7, (194, 186, 279, 447)),
}


def _filter():
    """A seccomp filter: memfd_create, memfd_secret, shmget and msgget fail, and so do all calls of
    another architecture. b'' on a machine that is not in REFUSED."""
    architecture, calls = REFUSED.get(os.uname().machine, (0, ()))
    if not calls:
        return b''
    load, equal, above, give = 0x20, 0x15, 0x35, 0x06   # instructions of the kernel's BPF
    fail = (give, 0, 0, 0x00050001)                     # with EPERM
    allow = (give, 0, 0, 0x7FFF0000)

    # (instruction, lines to skip if true, if false, operand)
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), fail]
    code += [(load, 0, 0, 0), (above, 0, 1, 1 << 30), fail]   # 32-bit calls of x86_64
    for number in calls:
        code += [(equal, 0, 1, number), fail]
    code.append(allow)
    return b''.join(struct.pack('HBBI', *line) for line in code)


def _start(runner, descriptors, seconds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
           how=None):
    """Starts the source `runner` in a sandbox, which inherits the descriptors -> its Popen."""
    if how is None:
        how = ([], sys.executable) if unsafe else _checked()
    command, python = how
    user = {}
    if command and os.getuid() == 0:
        user = dict(user=65534, group=65534, extra_groups=[])

    code = _filter()
    rules, fill = os.pipe()
    try:
        with open(fill, 'wb') as file:
            file.write(code)
        if command and code:
            command = [*command, '--seccomp', str(rules)]
        args = [str(math.ceil(seconds)), *map(str, descriptors)]
        return subprocess.Popen(
            [*command, python, '-I', '-S', '-c', runner, *args], stdin=stdin, stdout=stdout,
            stderr=subprocess.DEVNULL, env={'PATH': '/usr/bin:/bin'},
            pass_fds=[*descriptors, rules], start_new_session=True, **user)
    finally:
        os.close(rules)


# ---------------------------------------------------------------- watching and stopping

def _looks(processes, end):
    """Yields the time of the next look at the processes' memory, until `end` on the monotonic clock
    or until it is too much."""
    while (now := time.monotonic()) < end:
        yield min(end, now + 0.05)
        if any(_memory(process) > MEMORY for process in processes):
            return


def _memory(process):
    """Bytes of address space of a sandbox's processes together. Looked at from outside, where no
    program can deceive it."""
    pages = 0
    left = [str(process.pid)]
    while left:
        pid = left.pop()
        try:
            pages += int(Path(f'/proc/{pid}/statm').read_text().split()[0])
            for task in os.listdir(f'/proc/{pid}/task'):
                left += _children(pid, task)
        except OSError:
            pass  # gone meanwhile
    return pages * os.sysconf('SC_PAGE_SIZE')


def _children(pid, task):
    return Path(f'/proc/{pid}/task/{task}/children').read_text().split()


def _readable(descriptor, end):
    """-> True when there is something to read before `end` on the monotonic clock."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, end - time.monotonic()) * 1000))


def _wait(process, end):
    """-> True when the process ended before `end`. Popen.wait(timeout) would look only every
    50 ms."""
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


def _stop(process):
    """Kills the program and all its processes. The namespace dies with its first process,
    bubblewrap's child; killed through it rather than bubblewrap itself, it leaves no zombie for the
    machine's first process to reap, which in a container may be us."""
    try:
        if process.poll() is None:
            for child in _children(process.pid, process.pid):
                os.kill(int(child), signal.SIGKILL)
            _wait(process, time.monotonic() + 1)
    except OSError:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # the latter by macOS, where all have ended
        pass
    process.wait()


# ---------------------------------------------------------------- does it hold?

def require(unsafe_code=False):
    """Before training: raises SandboxError unless programs are contained, or else, if unsafe_code,
    warns and goes on without."""
    global unsafe
    unsafe = False
    try:
        _checked()
    except SandboxError as error:
        if not unsafe_code:
            raise
        unsafe = True
        warnings.warn('programs written by the model run WITHOUT a sandbox, with your rights: '
                      f'{error}', stacklevel=2)


def _checked():
    """-> command prefix, interpreter of the sandbox; tested once in a process."""
    if os.getuid() in _works:
        return _works[os.getuid()]
    if not shutil.which('bwrap'):
        raise SandboxError(
            'bubblewrap is missing: install it (apt install bubblewrap), or pass '
            "--unsafe_code=True to run the model's programs with resource limits only")
    found = []
    for python, prefix in ((sys.executable, sys.base_prefix), ('/usr/bin/python3', '/usr')):
        how = _bubblewrap(prefix), os.path.realpath(python)
        try:
            result = run(SELF_TEST, how=how)
        except OSError as error:
            result = Result(str(error), 1, False)
        if result.stdout == 'contained\n':
            _works[os.getuid()] = how
            return how
        said = result.stdout.strip()
        said = said or f'exit status {result.code}, timed out: {result.timed_out}'
        found.append(f'with {how[1]}: {said}')
    raise SandboxError(
        f'bubblewrap does not contain programs on this machine ({"; ".join(found)}): it needs user '
        'namespaces and, as root, a Python that other users can read; --unsafe_code=True runs '
        'programs with resource limits only')
