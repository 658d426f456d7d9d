import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from configurator import ConfigError, configure, idle, parse, run
from graders import sandbox

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    out_dir: str = 'out/sft'        # folder for checkpoints
    learning_rate: float = 3e-4     # peak learning rate
    steps: int = 100                # optimizer steps,
                                    # warm-up included
    # memory
    compile: bool = False           # torch.compile # or not
    rewards: dict = field(default_factory=lambda: {'accuracy': 1.0})   # weights of the rewards
    weights: dict[str, float] = field(default_factory=dict)
    files: list[str] = field(
        default_factory=list,
    )                               # data files
    numbers: list[int] = field(default_factory=list)
    eval_file: str | None = None    # problems to evaluate on
    top_p: float | None = None
    kind: Literal['grpo', 'dapo', 1] = 'grpo'   # loss
    anything: Any = None

    def __post_init__(self):
        # the steps
        if self.steps < 0:
            raise ValueError('steps must be\nat least 0')


@dataclass
class Required:
    path: str          # where


def write(tmp_path, text, name='x.py'):
    path = tmp_path / name
    path.write_text(text, encoding='utf-8')
    return str(path)


def test_defaults_are_fresh_each_time():
    one, two = parse(Config, []), parse(Config, [])
    assert one == Config()
    one.rewards['accuracy'] = 2.0
    assert two.rewards == {'accuracy': 1.0}


@pytest.mark.parametrize('arg, key, value', [
    ('--learning_rate=1e-4', 'learning_rate', 1e-4),
    ('--learning_rate=-1', 'learning_rate', -1.0),
    ('--learning_rate=3', 'learning_rate', 3.0),
    ('--steps=1e3', 'steps', 1000),
    ('--steps=1_000', 'steps', 1000),
    ('--compile=True', 'compile', True),
    ('--out_dir=out/x=y', 'out_dir', 'out/x=y'),
    ('--out_dir=123', 'out_dir', '123'),
    ('--out_dir="None"', 'out_dir', 'None'),
    ('--out_dir=', 'out_dir', ''),
    ('--eval_file=None', 'eval_file', None),
    ('--eval_file=a b.jsonl', 'eval_file', 'a b.jsonl'),
    ('--top_p=1', 'top_p', 1.0),
    ("--rewards={'format': 0.5, 'language': 1}", 'rewards', {'format': 0.5, 'language': 1}),
    ("--weights={'format': 1}", 'weights', {'format': 1.0}),
    ("--files=['a', 'b']", 'files', ['a', 'b']),
    ('--files=a b.jsonl', 'files', ['a b.jsonl']),
    ('--files=7', 'files', ['7']),
    ('--kind=dapo', 'kind', 'dapo'),
    ('--kind=1', 'kind', 1),
    ('--anything=(1, None)', 'anything', (1, None)),
    ('--anything=plain', 'anything', 'plain'),
])
def test_value_from_the_command_line(arg, key, value):
    got = getattr(parse(Config, [arg]), key)
    assert got == value and type(got) is type(value)
    if isinstance(value, dict):
        assert [type(v) for v in got.values()] == [type(v) for v in value.values()]


@pytest.mark.parametrize('arg', [
    '--learning_rate=fast', '--learning_rate=True', '--learning_rate=None',
    '--learning_rate=' + '9' * 400,
    '--steps=1.5', '--steps=1e999', '--steps=True', '--steps=',
    '--compile=1', '--compile=true', '--compile=0.0',
    '--out_dir=None', '--out_dir=True',
    '--rewards=accuracy', '--rewards=[1]', "--weights={'a': 'b'}", '--weights={1: 1.0}',
    '--files=', '--files=[1]', "--files=['a'", '--files=None',
    '--numbers=3', '--numbers=a', '--top_p=high', '--kind=ppo', '--kind=True', '--kind=1.0',
    '--steps=' + '(' * 5000,
])
def test_value_that_does_not_fit(arg):
    key = arg[2:].partition('=')[0]
    with pytest.raises(ConfigError, match=f'^command line: {key} must be '):
        parse(Config, [arg])


def test_a_path_may_start_at_the_home_folder(monkeypatch):
    monkeypatch.setenv('HOME', '/home/ada')
    cfg = parse(Config, ['--out_dir=~/run', '--files=~/a.jsonl', '--eval_file=a~/b'])
    assert (cfg.out_dir, cfg.files) == ('/home/ada/run', ['/home/ada/a.jsonl'])
    assert cfg.eval_file == 'a~/b'


def test_a_config_file_may_name_one_file_for_a_list_of_one(tmp_path):
    assert parse(Config, [write(tmp_path, "files = 'a.jsonl'")]).files == ['a.jsonl']


SCRIPTS = ['sft.py', 'grpo.py', 'sample.py', 'evaluate.py', 'preference.py', 'data/pairs.py',
           'data/countdown/prepare.py', 'data/filter.py', 'data/mix.py', 'data/teacher.py',
           'tools/bench.py', 'tools/report.py', 'tools/report_smol.py', 'tools/budget.py']


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_python_without_torch_is_told_where_the_right_one_is(script):
    bare = subprocess.run([sys.executable, '-S', script, '--help'], cwd=ROOT,
                          capture_output=True, text=True)
    assert bare.returncode == 1 and bare.stdout == '' and bare.stderr.count('\n') == 1
    assert bare.stderr.startswith(f'{Path(script).name}: No module named')
    assert 'source .venv/bin/activate, or call .venv/bin/python' in bare.stderr


def test_another_missing_module_keeps_its_traceback(tmp_path):
    code = 'import sys; sys.path.insert(0, sys.argv[1]); import configurator, absent_module'
    got = subprocess.run([sys.executable, '-c', code, str(ROOT)], cwd=tmp_path,
                         capture_output=True, text=True)
    assert 'Traceback' in got.stderr and 'activate' not in got.stderr


def test_later_wins_and_files_mix_with_keys(tmp_path):
    first = write(tmp_path, 'learning_rate = 1e-3   # high\nsteps = 5\n', 'first.py')
    second = write(tmp_path, 'import math\n_double = 2 * 4\nsteps = _double\n'
                   'learning_rate = math.pi\n', 'second.py')
    config = parse(Config, ['--steps=1', first, '--learning_rate=2', second,
                            '--steps=9', '--steps=10'])
    assert (config.learning_rate, config.steps) == (3.141592653589793, 10)
    assert parse(Config, [second, first]).steps == 5


@pytest.mark.parametrize('text, message', [
    ('learning_rat = 1.0', "unknown key 'learning_rat'; the nearest known one is 'learning_rate'"),
    ('from math import sqrt', "unknown key 'sqrt'"),
    ('steps = 2.5', 'steps must be int, not 2.5'),
    ("learning_rate = '1e-4'", "learning_rate must be float, not '1e-4'"),
    ('kind = "ppo"', "kind must be 'grpo' or 'dapo' or 1, not 'ppo'"),
    ('eval_file = 3', 'eval_file must be str | None, not 3'),
])
def test_mistake_in_a_file_names_the_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        parse(Config, [path])
    assert str(error.value).startswith(f'{path}: {message}')


@pytest.mark.parametrize('text, line, message', [
    ('steps = 1\n\nsteps = = 2\n', 3, 'SyntaxError: '),
    ('steps = 1\nlearning_rate = steps / 0\n', 2, 'ZeroDivisionError: division by zero'),
    ('def _f():\n    raise KeyError("a\\nb")\nsteps = _f()\n', 3, 'KeyError: '),
    ('import no_such_module_here\n', 1, 'ModuleNotFoundError: '),
])
def test_broken_file_names_the_line(tmp_path, text, line, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        parse(Config, [path])
    assert str(error.value).startswith(f'{path}:{line}: {message}')
    assert '\n' not in str(error.value)


def test_config_file_does_not_see_or_change_this_module(tmp_path):
    with pytest.raises(ConfigError, match='NameError'):
        parse(Config, [write(tmp_path, 'steps = len(fields)')])


def test_missing_file_and_malformed_arguments(tmp_path):
    with pytest.raises(ConfigError, match='absent.py: no config file .*--key=VALUE'):
        parse(Config, [str(tmp_path / 'absent.py')])
    with pytest.raises(ConfigError, match='no config file'):
        parse(Config, [str(tmp_path)])
    (tmp_path / 'latin.py').write_bytes(b'out_dir = "\xff"')
    with pytest.raises(ConfigError, match='latin.py:1: UnicodeDecodeError'):
        parse(Config, [str(tmp_path / 'latin.py')])
    assert parse(Config, ['--compile']).compile is True
    for arg in ('--out_dir', '--steps', '-steps=3', '--', '-compile'):
        with pytest.raises(ConfigError, match='write --'):
            parse(Config, [arg, '3'])
    with pytest.raises(ConfigError, match="unknown key 'stepz'; the nearest known one is 'steps'"):
        parse(Config, ['--stepz=3'])


def test_required_key_and_post_init():
    with pytest.raises(ConfigError, match='path has no default: give it as --path='):
        parse(Required, [])
    assert parse(Required, ['--path=x']).path == 'x'
    with pytest.raises(ConfigError, match='^steps must be at least 0$'):
        parse(Config, ['--steps=-1'])


def test_configure_exits(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['runs/sft.py'])
    assert configure(Config, ['--steps=3']).steps == 3
    with pytest.raises(SystemExit) as error:
        configure(Config, ['--stesp=3'])
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == ''
    assert isinstance(error.value.__cause__, ConfigError)
    assert err == ("sft.py: command line: unknown key 'stesp'; the nearest known one is 'steps' "
                   '(see --help)\n')


def test_help_lists_every_key_with_type_default_and_comment(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['runs/sft.py'])
    with pytest.raises(SystemExit) as error:
        configure(Config, ['--steps=wrong', '--help'])
    out, err = capsys.readouterr()
    assert error.value.code == 0 and err == ''
    rows = [line.split() for line in out.splitlines() if line.startswith('  --')]
    lines = {key: ' '.join(rest) for key, *rest in rows}
    assert lines == {
        '--out_dir': "str 'out/sft' folder for checkpoints",
        '--learning_rate': 'float 0.0003 peak learning rate',
        '--steps': 'int 100 optimizer steps, warm-up included',
        '--compile': 'bool False torch.compile # or not',
        '--rewards': "dict {'accuracy': 1.0} weights of the rewards",
        '--weights': 'dict[str, float] {}',
        '--files': 'list[str] [] data files',
        '--numbers': 'list[int] []',
        '--eval_file': 'str | None None problems to evaluate on',
        '--top_p': 'float | None None',
        '--kind': "'grpo' or 'dapo' or 1 'grpo' loss",
        '--anything': 'Any None',
    }
    with pytest.raises(SystemExit):
        configure(Required, ['-h'])
    assert capsys.readouterr().out.splitlines()[2].split() == ['--path', 'str', 'required', 'where']


@dataclass
class Common:
    out_dir: str = 'out'   # folder
    # optimizer
    learning_rate: float = 1e-3   # peak,
                                  # AdamW
    beta1: float = 0.9   # first moment
    # machine
    threads: int = 2   # CPU threads


@dataclass
class Derived(Common):
    out_dir: str = 'out/derived'
    # loss
    clip: float = 0.2   # of the ratio
    # optimizer
    beta1: float = 0.8   # of Adam
    grad_clip: float = 1.0
    # no heading: nothing stands under it

    def __post_init__(self):
        # no heading either
        pass


def test_help_puts_keys_under_headings_and_knows_what_is_inherited(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['runs/sft.py'])
    with pytest.raises(SystemExit):
        configure(Derived, ['--help'])
    out = capsys.readouterr().out
    assert [' '.join(line.split()) for line in out.splitlines()[1:]] == [
        '',
        "--out_dir str 'out/derived' folder",
        '',
        'optimizer',
        '--learning_rate float 0.001 peak, AdamW',
        '--beta1 float 0.8 of Adam',
        '--grad_clip float 1.0',
        '',
        'machine',
        '--threads int 2 CPU threads',
        '',
        'loss',
        '--clip float 0.2 of the ratio',
    ]
    assert parse(Derived, ['--threads=3']).threads == 3


def test_help_without_source(capsys):
    names = {'__name__': __name__}
    exec('import dataclasses\n@dataclasses.dataclass\nclass Unseen:\n    steps: int = 1', names)
    with pytest.raises(SystemExit):
        configure(names['Unseen'], ['--help'])
    assert '--steps  int  1' in capsys.readouterr().out


def test_settings_that_do_nothing_are_named_where_they_were_changed():
    cases = [(True, ('steps', 'files'), 'one'), (False, ('top_p',), 'two'),
             (True, ('steps',), 'three')]
    assert idle(Config(), cases) == []
    assert idle(Config(steps=7, top_p=0.5, files=['a']), cases) == [
        'steps=7 does nothing: one', "files=['a'] does nothing: one"]


def test_a_machine_that_cannot_contain_programs_is_told_in_a_line(monkeypatch):
    def main(cfg):
        raise sandbox.SandboxError('bubblewrap is missing:\ninstall it')
    monkeypatch.setattr(sys, 'argv', ['runs/grpo.py'])
    with pytest.raises(SystemExit) as error:
        run(main, Config)
    assert error.value.code == 'grpo.py: bubblewrap is missing: install it'
