"""
A pool of processes for calls that may hang or die: a call that takes too long is killed with its
process, a call whose process was killed is tried once more in a new one, and the others never
notice.

    with Pool(workers=4, seconds=60) as pool:
        values = pool.map('math', 'gcd', [(4, 6), (9, 12)])    # [2, 3]

A failed call's value is an exception. The workers are plain interpreters that import the function's
module and nothing else, so that they start fast, hold no GPU memory, and inherit no threads or
locks; concurrent.futures breaks as a whole when one of its workers dies.
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


# ---------------------------------------------------------------- in a worker

def serve():
    """Reads (module, function, arguments) from stdin, and writes what the function returned or
    raised to what was stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)                                 # whatever a function prints is no answer
    while True:
        try:
            module, name, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            value = getattr(importlib.import_module(module), name)(*args)
        except Exception as error:
            value = error
        try:
            answer = pickle.dumps(value)
        except Exception as error:
            answer = pickle.dumps(TypeError(f'{name} returned what cannot be sent: {error}'))
        answers.write(answer)
        answers.flush()


# ---------------------------------------------------------------- here

class Call:
    """A call of a map: a function's module, its name and arguments, and what came of it."""

    def __init__(self, module, name, args):
        self.task = module, name, args
        self.name = name
        self.tries = 0
        self.value = None


class Worker:
    """A process, and the call that it is busy with."""

    COMMAND = 'import sys; sys.path.insert(0, sys.argv[1]); from graders import pool; pool.serve()'

    def __init__(self):
        root = str(Path(__file__).resolve().parents[1])
        self.process = subprocess.Popen(
            [sys.executable, '-c', self.COMMAND, root], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        self.call = None
        self.end = None  # when the call has taken too long

    def send(self, call, seconds):
        self.call = call
        self.end = time.monotonic() + seconds
        call.tries += 1
        try:
            pickle.dump(call.task, self.process.stdin)
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
        self.seconds = seconds
        self.workers = [Worker() for _ in range(workers)]

    def map(self, module, name, arguments, update=None):
        """-> list of values of `module.name(*args)` in order; of a failed call the exception: what
        the function raised, TimeoutError, or Died. update(n): called when n more calls ended."""
        calls = [Call(module, name, args) for args in arguments]
        waiting = deque(calls)
        slow = 0  # calls that took too long
        told = 0  # ended calls that were told to `update`
        while waiting or self.busy():
            ended = len(calls) - len(waiting) - len(self.busy())
            if update and ended > told:
                update(ended - told)
                told = ended
            if waiting and slow == ended and slow >= max(self.HOPELESS, len(self.workers)):
                said = f'not tried: the first {slow} took more than {self.seconds} s each'
                for call in waiting:
                    call.value = TimeoutError(said)
                waiting.clear()
                continue

            for worker in self.workers:
                if worker.call is None and waiting:
                    worker.send(waiting.popleft(), self.seconds)

            ready = self.wait()
            for worker in self.busy():
                if worker in ready:
                    self.receive(worker, waiting)
                elif time.monotonic() > worker.end:
                    slow += 1
                    self.give_up(worker, aloud=slow == 1)
        return [call.value for call in calls]

    def busy(self):
        return [worker for worker in self.workers if worker.call is not None]

    def wait(self):
        """Until a worker answers or dies, or a call has taken too long -> the workers to read."""
        busy = self.busy()
        poll = select.poll()
        for worker in busy:
            poll.register(worker.process.stdout, select.POLLIN)
        patience = min(worker.end for worker in busy) - time.monotonic()
        ready = {descriptor for descriptor, _ in poll.poll(max(0.0, patience) * 1000)}
        return [worker for worker in busy if worker.process.stdout.fileno() in ready]

    def receive(self, worker, waiting):
        """Takes what a worker answers; where its process died, its call is tried once more."""
        call = worker.call
        try:
            call.value = pickle.load(worker.process.stdout)
            worker.call = None
        except (EOFError, pickle.UnpicklingError):
            self.replace(worker)
            if call.tries < 2:
                waiting.appendleft(call)
            else:
                call.value = Died(f'the process that ran {call.name} was killed twice')

    def give_up(self, worker, aloud):
        """Ends a call that took too long, with its process."""
        said = f'{worker.call.name} took more than {self.seconds} s'
        worker.call.value = TimeoutError(said)
        self.replace(worker)
        if aloud:
            print(f'{said}; its process was ended', file=sys.stderr)

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
