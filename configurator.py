"""
Settings of a script: a dataclass with a comment on each field, changed by config files and by
--key=value.

    @dataclass
    class Config:
        out_dir: str = 'out/sft'       # folder for checkpoints and metrics
        # optimizer
        learning_rate: float = 3e-4    # peak learning rate

    config = configure(Config, sys.argv[1:])

    python sft.py config/x.py --learning_rate=1e-4 --out_dir=out/y

Arguments are read from left to right and the later one wins:

    config/x.py    Python lines `key = value`, run in an empty namespace; imported modules and names
                   that begin with _ (helpers of the file) are no keys
    --key=value    value as a Python literal (1e-4, True, None, "{'format': 0.5}") or inf, else the
                   text itself, in which ~/ at the start is the home folder (a shell leaves it after
                   a =). The = is required: `--key value` is refused, and a bare `--key` is True
                   where the key takes that
    --help         every key with its type, default and comment, under its heading: a comment of
                   one line between fields, such as "optimizer" above; fields that a dataclass
                   inherits stand under the headings of their class

A list or dict replaces the default as a whole; where a list of texts is wanted, one text will do
(--data=a.jsonl). Unknown keys are refused with the nearest known one named. A value must fit the
field's annotation: an int may stand for a float, a float for an int only where it is whole (1e3),
nothing but True and False for a bool. A ValueError of the dataclass's own __post_init__ is reported
like any other mistake.
"""
import ast
import dataclasses
import difflib
import importlib.util
import inspect
import io
import math
import os
import sys
import textwrap
import tokenize
import traceback
import types
import typing
from pathlib import Path


class ConfigError(ValueError):
    """A setting is unknown, or its value does not fit; the message is one line that says where and
    what to do."""


def configure(cls, argv: list[str]):
    """
    cls: a dataclass type; argv: config files and --key=value, e.g. sys.argv[1:]. Returns an
    instance of cls. --help prints the keys and exits with status 0; a mistake is told in one line
    on stderr, exit status 2.
    """
    if '--help' in argv or '-h' in argv:
        print(help_text(cls))
        raise SystemExit(0)
    try:
        return parse(cls, argv)
    except ConfigError as error:
        print(f'{Path(sys.argv[0]).name}: {error}', file=sys.stderr)
        raise SystemExit(2) from error


def run(main, cls, errors=(ValueError, OSError, FloatingPointError)):
    """A script's last line: `main` with the settings of the command line; one of `errors`, or
    Ctrl-C, ends it with a line that names the script."""
    script = Path(sys.argv[0]).name
    try:
        main(configure(cls, sys.argv[1:]))
    except errors as error:
        sys.exit(f'{script}: ' + ' '.join(str(error).split()))
    except KeyboardInterrupt:
        print(f'{script}: interrupted', file=sys.stderr)
        sys.exit(130)


def without_torch(kind, error, trace):
    """sys.excepthook: where torch is missing too, it was not the environment's Python."""
    if not issubclass(kind, ModuleNotFoundError) or importlib.util.find_spec('torch'):
        return sys.__excepthook__(kind, error, trace)
    print(f'{Path(sys.argv[0]).name}: {error} in {sys.executable}: source .venv/bin/activate, '
          'or call .venv/bin/python (make setup makes it)', file=sys.stderr)


sys.excepthook = without_torch


def at_least(cfg, low, *keys, finite=True):
    """For a __post_init__: ValueError names the first of the keys whose number is below `low`, no
    number, or with `finite` infinite."""
    for key in keys:
        value = getattr(cfg, key)
        if not low <= value <= math.inf or finite and value == math.inf:
            raise ValueError(f'{key} must be {low} or more, not {value!r}')


def idle(cfg, cases) -> list[str]:
    """cases: [(whether, keys, reason)]. A line for each key that is not at its default although it
    does nothing where its case holds."""
    lines = []
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        reasons = [reason for holds, keys, reason in cases if holds and f.name in keys]
        if reasons and value != default_of(f):
            lines.append(f'{f.name}={value!r} does nothing: {reasons[0]}')
    return lines


def first_rank():
    """Whether this process is the only one, or the first of torchrun's."""
    return int(os.environ.get('RANK', 0)) == 0


def tell_idle(cfg, cases):
    """Rank 0 names on stderr the settings that do nothing, see `idle`."""
    if first_rank():
        for line in idle(cfg, cases):
            print(f'warning: {line}', file=sys.stderr)


def default_of(f):
    """f: a field of a dataclass -> its default, dataclasses.MISSING without one"""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def parse(cls, argv: list[str]):
    """Like configure, but --help is no special case and mistakes raise ConfigError."""
    annotations = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for arg in argv:
        if arg.startswith('-'):
            key, text = split_argument(arg, annotations)
            source, settings, convert = 'command line', {key: text}, from_text
        else:
            source, settings, convert = arg, read_file(arg), fit
        for key, value in settings.items():
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1, cutoff=0)[0]
                raise ConfigError(f'{source}: unknown key {key!r}; the nearest known one is '
                                  f'{near!r} (see --help)')
            try:
                values[key] = convert(value, annotations[key])
            except (TypeError, OverflowError):
                raise ConfigError(f'{source}: {key} must be {name_of(annotations[key])}, '
                                  f'not {value!r}') from None

    for key, f in fields.items():
        if key not in values and default_of(f) is dataclasses.MISSING:
            raise ConfigError(f'{key} has no default: give it as --{key}=VALUE or in a config file')
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(' '.join(str(error).split())) from error


def split_argument(arg: str, annotations: dict) -> tuple[str, str]:
    """'--key=text' -> key, text; a bare '--key' is True where the key takes that."""
    key, equals, text = arg.removeprefix('--').partition('=')
    annotation = annotations.get(key)
    if not equals and bool in (annotation, *typing.get_args(annotation)):
        return key, 'True'
    if not arg.startswith('--') or not equals:
        raise ConfigError(f'{arg}: write --{key.lstrip("-")}=VALUE (see --help)')
    return key, text


def read_file(path: str) -> dict:
    """The names a config file sets, less modules and names that begin with _. ConfigError names the
    file and line."""
    names = {}
    try:
        exec(compile(Path(path).read_text(encoding='utf-8'), path, 'exec'), names)
    except OSError as error:
        raise ConfigError(f'{path}: no config file ({error.strerror}); settings are written '
                          '--key=VALUE') from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        lines.append(1)   # a file that is no text has no frame in it
        line = getattr(error, 'lineno', None) or lines[0]
        message = ' '.join(str(getattr(error, 'msg', error)).split())
        raise ConfigError(f'{path}:{line}: {type(error).__name__}: {message}') from error
    return {name: value for name, value in names.items()
            if not name.startswith('_') and not isinstance(value, types.ModuleType)}


def from_text(text: str, annotation):
    """The value written on the command line as text, fitted to annotation. Raises TypeError where
    neither fits."""
    if text.startswith('~/'):
        text = str(Path(text).expanduser())
    try:
        value = math.inf if text == 'inf' else ast.literal_eval(text)
        return fit(value, annotation)
    except (TypeError, ValueError, SyntaxError, OverflowError, MemoryError, RecursionError):
        # where these do not fit, no folder or run of that name is meant
        if text in ('None', 'True', 'False'):
            raise TypeError(text) from None
        return fit(text, annotation)


def fit(value, annotation):
    """value as annotation wants it (int -> float, whole float -> int). Raises TypeError where it
    does not fit."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    kind = type(value)
    if origin in (typing.Union, types.UnionType):
        for choice in args:
            try:
                return fit(value, choice)
            except TypeError:
                pass
    elif origin is typing.Literal:
        if any(value == choice and kind is type(choice) for choice in args):
            return value
    elif annotation is float and kind is int:
        return float(value)
    elif annotation is int and kind is float and value.is_integer():
        return int(value)
    elif annotation == list[str] and kind is str and value and value[0] not in '[({':
        return [value]   # but for what was meant as a list and is none
    elif annotation is typing.Any or kind is (origin or annotation):   # by type: a bool is an int
        if origin is list:
            return [fit(item, args[0]) for item in value]
        if origin is dict:
            return {fit(k, args[0]): fit(v, args[1]) for k, v in value.items()}
        return value
    raise TypeError(f'{value!r} is no {annotation}')


def name_of(annotation) -> str:
    """An annotation as a reader would write it: `int`, `str | None`, `'a' or 'b'`."""
    if typing.get_origin(annotation) is typing.Literal:
        return ' or '.join(map(repr, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return ' | '.join(map(name_of, typing.get_args(annotation))).replace('NoneType', 'None')
    return str(annotation) if typing.get_args(annotation) else annotation.__name__


def help_text(cls) -> str:
    """Usage, and under each heading a line for each key: --key, type, default, comment."""
    annotations = typing.get_type_hints(cls)
    comments, headings = written(cls)
    rows = []
    groups = {}   # heading -> rows under it, in the order of first appearance
    for f in dataclasses.fields(cls):
        default = default_of(f)
        shown = 'required' if default is dataclasses.MISSING else repr(default)
        row = (f'--{f.name}', name_of(annotations[f.name]), shown, comments.get(f.name, ''))
        rows.append(row)
        groups.setdefault(headings.get(f.name, ''), []).append(row)

    *columns, _ = zip(*rows)
    widths = [min(max(map(len, column)), 32) for column in columns]
    lines = [f'usage: {Path(sys.argv[0]).name} [config/file.py ...] [--key=VALUE ...]']
    for heading, group in groups.items():
        lines.append('')
        if heading:
            lines.append(heading)
        for *cells, comment in group:
            cells = [cell.ljust(width) for cell, width in zip(cells, widths)]
            lines.append('  ' + '  '.join([*cells, comment]).rstrip())
    return '\n'.join(lines)


def written(cls) -> tuple[dict[str, str], dict[str, str]]:
    """
    What is written beside and above the fields of a dataclass and of those that it inherits from:
    field -> comment, field -> heading. Where a field is defined again, its own comment and heading
    come before those of the base class, which it keeps where it has none.
    """
    comments, headings = {}, {}
    for base in reversed(cls.__mro__):
        if '__dataclass_fields__' in vars(base):
            own_comments, own_headings = written_in_body(base)
            comments |= own_comments
            headings |= own_headings
    return comments, headings


def written_in_body(cls) -> tuple[dict[str, str], dict[str, str]]:
    """As `written`, of the fields in the body of this class alone."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:   # no source file, e.g. a class typed at the prompt: help goes without comments
        return {}, {}
    body = ast.parse(source).body[0].body
    statements = {node.lineno: node for node in body}
    comments, headings = {}, {}
    field, heading = None, ''
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, column = token.start
        if line in statements:
            node = statements.pop(line)
            field = node.target.id if isinstance(node, ast.AnnAssign) else None
            if field and heading:
                headings[field] = heading
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.lstrip('# ')
        if column == body[0].col_offset:
            heading = text
        elif field:
            comments.setdefault(field, []).append(text)
    return {key: ' '.join(lines) for key, lines in comments.items()}, headings
