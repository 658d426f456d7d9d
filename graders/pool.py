"""
A pool of processes for calls that may hang or die: a call that takes too long is killed with its process, a call whose process
was killed is tried once more in a new one, and the others never notice.

    with Pool(workers=4, seconds=60) as pool:
        values = pool.map('math', 'gcd', [(4, 6), (9, 12)])        # [2, 3]; a failed call's value is an exception

The workers are plain interpreters that import the function's module and nothing else, so that they start fast, hold no GPU
memory, and inherit no threads or locks; concurrent.futures breaks as a whole when one of its workers dies.
"""
import importlib
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path


class Died(RuntimeError):
    """The process of a call was killed, twice."""


def serve():
    """A worker: reads (module, function, arguments) from stdin, writes (True, value) or (False, exception) to what was stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)                                 # whatever a function prints is no answer
    while True:
        try:
            module, name, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, getattr(importlib.import_module(module), name)(*args)
        except Exception as error:
            answer = False, error
        try:
            answer = pickle.dumps(answer)
        except Exception as error:
            answer = pickle.dumps((False, TypeError(f'{name} returned what cannot be sent: {error}')))
        answers.write(answer)
        answers.flush()


class Worker:
    def __init__(self):
        command = 'import sys; sys.path.insert(0, sys.argv[1]); from graders import pool; pool.serve()'
        self.process = subprocess.Popen([sys.executable, '-c', command, str(Path(__file__).resolve().parents[1])],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        self.call = self.end = None

    def send(self, call, task, seconds):
        self.call, self.end = call, time.monotonic() + seconds
        try:
            pickle.dump(task, self.process.stdin)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died while idle; reading says so

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass


class Pool:
    """workers: processes. seconds: longest that a call may take; starting the process is not
    counted twice. Where the first HOPELESS calls of a map all take longer, the others are not
    tried."""

    HOPELESS = 4

    def __init__(self, workers, seconds=60.0):
        self.seconds, self.workers = seconds, [Worker() for _ in range(workers)]

    def map(self, module, name, arguments):
        """-> list of values of `module.name(*args)` in order; of a failed call the exception: what the function raised,
        TimeoutError, or Died."""
        values, waiting, tries = [None] * len(arguments), deque(range(len(arguments))), [0] * len(arguments)
        left, slow = len(arguments), 0
        while left:
            if slow == len(arguments) - left and slow >= max(self.HOPELESS, len(self.workers)):
                for call in waiting:
                    said = f'not tried: the first {slow} took more than {self.seconds} s each'
                    values[call] = TimeoutError(said)
                left, waiting = left - len(waiting), deque()
                if not left:
                    break
            for worker in self.workers:
                if worker.call is None and waiting:
                    call = waiting.popleft()
                    tries[call] += 1
                    worker.send(call, (module, name, arguments[call]), self.seconds)
            busy = [worker for worker in self.workers if worker.call is not None]
            patience = max(0.0, min(worker.end for worker in busy) - time.monotonic())
            poll = select.poll()
            for worker in busy:
                poll.register(worker.process.stdout, select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll(patience * 1000)}
            for worker in busy:
                call, again = worker.call, False
                if worker.process.stdout.fileno() in ready:
                    try:
                        good, value = pickle.load(worker.process.stdout)
                        worker.call = None
                    except (EOFError, pickle.UnpicklingError):
                        self.replace(worker)
                        again, value = tries[call] < 2, Died(f'the process that ran {name} was killed twice')
                elif time.monotonic() > worker.end:
                    self.replace(worker)
                    said = f'{name} took more than {self.seconds} s'
                    value, slow = TimeoutError(said), slow + 1
                    if slow == 1:
                        print(f'{said}; its process was ended', file=sys.stderr)
                else:
                    continue
                if again:
                    waiting.appendleft(call)
                else:
                    values[call], left = value, left - 1
        return values

    def replace(self, worker):
        worker.kill()
        self.workers[self.workers.index(worker)] = Worker()

    def close(self):
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
