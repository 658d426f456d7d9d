"""
What runs inside a sandbox around a model's program, as source for `python -c`. The arguments are
seconds of CPU time, then file descriptors.

    RUN       runs a program as __main__
    ANSWER    runs a program, then answers what is asked about its functions, a line of JSON each
    ASK       runs asserts, and asks an ANSWER for the values of calls

Each begins with LIMITS. ASK's process never runs a line of the program, and ANSWER's never sees a
line of the asserts.
"""

LIMITS = '''
import os, sys, resource, signal
seconds = int(sys.argv[1])

# The namespace's first process, with which all others die, only waits: it ends the program in time
# even where nobody outside is left to see to it.
program = os.fork()
if program:
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

for name, most in (('AS', 512 << 20), ('FSIZE', 16 << 20), ('NOFILE', 32), ('CORE', 0),
                   ('NPROC', 16), ('CPU', seconds)):
    hard = most + 1 if name == 'CPU' else most
    try:
        resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (most, hard))
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
del seconds, name, most, hard, file, program, resource, signal, os, sys, site, source
exec(code)
'''

CODEC = '''
import json
KINDS = {kind.__name__: kind for kind in (int, float, complex, str, bytes, bytearray, list, tuple,
                                          set, frozenset, dict, bool)}
NUMBERS = {'Fraction': 'fractions', 'Decimal': 'decimal'}

def encode(x, other):
    """Plain data as JSON: itself, or [a letter for its type, ...]; `other` numbers the rest."""
    if x is None or x is True or x is False:
        return x
    if type(x) is type and x in KINDS.values():
        return ['k', x.__name__]
    if isinstance(x, str):
        return str.__str__(x)
    if isinstance(x, int):
        return ['i', hex(int.__index__(x))]
    if isinstance(x, float):
        return ['f', float.hex(x)]
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
    """What encode made; `other` is given the number of what is not plain data."""
    if not isinstance(x, list):
        return x
    tag, *rest = x
    if tag == 'k':
        return KINDS[rest[0]]
    if tag == 'i':
        return int(rest[0], 16)
    if tag == 'f':
        return float.fromhex(rest[0])
    if tag == 'c':
        return complex(float.fromhex(rest[0]), float.fromhex(rest[1]))
    if tag == 'b':
        return bytes.fromhex(rest[0])
    for kind, letter in ((list, 'l'), (tuple, 't'), (set, 's'), (frozenset, 'z')):
        if tag == letter:
            return kind(decode(y, other) for y in rest)
    if tag == 'd':
        return {decode(k, other): decode(v, other) for k, v in rest}
    if tag == 'r':
        return range(*[decode(y, other) for y in rest])
    if tag == 'n':
        return getattr(__import__(NUMBERS[rest[0]]), rest[0])(rest[1])
    if tag == 'o':
        return other(rest[0])
    raise ValueError(tag)
'''

ANSWER = LIMITS + CODEC + '''
import operator, types
with open(int(sys.argv[2]), encoding='utf-8') as file:
    source = file.read()
incoming = open(int(sys.argv[3]))
outgoing = open(int(sys.argv[4]), 'w')

things = []  # what the other process knows by its place here

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
    if not hasattr(solution, name):
        return getattr(module, name)
    def method(*args, **named):
        return getattr(solution(), name)(*args, **named)
    return method

def call(function, *args, **named):
    return function(*args, **named)

do = {'name': find, 'call': call, 'getattr': getattr, 'setattr': setattr,
      'getitem': operator.getitem, 'len': len, 'next': next, 'list': list}

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
        args = [decode(x, things.__getitem__) for x in args]
        named = {key: decode(x, things.__getitem__) for key, x in named.items()}
        answer = ['value', encode(do[what](*args, **named), keep)]
    except BaseException as error:
        answer = ['error', type(error).__name__]
    outgoing.write(json.dumps(answer) + '\\n')
    outgoing.flush()
'''

ASK = LIMITS + CODEC + '''
with open(int(sys.argv[2]), encoding='utf-8') as file:
    setup, asserts, names, entry_point = json.load(file)
incoming = open(int(sys.argv[3]))
outgoing = open(int(sys.argv[4]), 'w')
verdict = int(sys.argv[5])
remotes = {}
ERRORS = {error.__name__: error for error in (StopIteration, ValueError, TypeError, KeyError,
                                              IndexError, AttributeError, ZeroDivisionError)}

def number_of(remote):
    return object.__getattribute__(remote, 'number')

def remote_of(number):
    return remotes.setdefault(number, Remote(number))

def ask(what, *args, **named):
    """Has the program's process do something -> its value, or the error that it raised."""
    args = [encode(x, number_of) for x in args]
    named = {key: encode(x, number_of) for key, x in named.items()}
    outgoing.write(json.dumps([what, args, named]) + '\\n')
    outgoing.flush()
    line = incoming.readline(1 << 24)
    if line[-1:] != '\\n':
        raise EOFError
    kind, value = json.loads(line)
    if kind == 'error':
        raise ERRORS.get(value, RuntimeError)(value)
    return decode(value, remote_of)

class Remote:
    """Something in the program's process that is not plain data. It equals only itself, and is
    neither true nor false."""
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
    """Equality, but JSON has no tuples, and its numbers were printed once."""
    if isinstance(a, (list, tuple, range)) and isinstance(b, (list, tuple, range)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if float in (type(a), type(b)) and {type(a), type(b)} <= {int, float}:
        both_nan = a != a and b != b
        largest = max(abs(a), abs(b), 1e-3)
        return a == b or both_nan or abs(a - b) <= 1e-9 * largest < float('inf')
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

SELF_TEST = '''
import os, signal, socket
bad = [path for path in ('/root', '/home', '/etc/passwd', '/var', '/sys') if os.path.exists(path)]
if set(os.environ) - {'PATH', 'HOME', 'LANG', 'PWD', 'LC_CTYPE'}:
    bad.append('environment')
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
