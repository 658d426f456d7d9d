"""A miniature of `make r1`: every stage with its own config and a hundredth of the steps, through
to the report."""
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import evaluate
import grpo
import preference
import sft
from configurator import parse
from data import pairs
from data.countdown import prepare
from model import Transformer
from tools import report

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The chain's commands in the Makefile's order, in this process."""
    folder = tmp_path_factory.mktemp('chain') / 'r1'
    patch = pytest.MonkeyPatch()
    patch.setenv('RUN', str(folder))
    patch.chdir(ROOT)

    def stage(script, name, *overrides):
        script.main(parse(script.Config, [f'config/r1/{name}.py', *overrides]))

    def sampled(name, of, *overrides):
        stage(evaluate, name, f'--checkpoint={folder}/{of}', *overrides)

    few = ['--max_new_tokens=40', '--prompts=4', '--group=4', '--eval_rows=2', '--eval_every=2']
    short = [*few, '--steps=2']
    keep = ["--keep={'accuracy': 0}", '--limit=24', '--max_new_tokens=40']
    prepare.main(prepare.Config(out_dir=str(folder / 'data'), corpus_rows=2000, rl_rows=64,
                                test_rows=16))
    stage(sft, 'base', '--steps=40', '--batch_rows=8', '--micro_rows=8')
    stage(grpo, 'zero', *short)
    sampled('samples', 'zero', f'--out={folder}/zero/samples.jsonl', *keep)
    stage(sft, 'cold', '--steps=2', '--batch_rows=4')
    stage(grpo, 'rl', *short)
    sampled('teacher', 'rl', f'--out={folder}/rl/samples.jsonl', *keep)
    stage(sft, 'reject', '--steps=2', '--batch_rows=4')
    sampled('pairs', 'reject', f'--out={folder}/reward/samples.jsonl', '--limit=96',
            '--max_new_tokens=12')
    pairs.main(pairs.Config(
        samples=[f'{folder}/reward/samples.jsonl'], tokenizer=f'{folder}/reject', held_out=2,
        out=f'{folder}/reward/pairs.jsonl'))
    stage(preference, 'reward', '--steps=2', '--batch_rows=4')
    stage(grpo, 'final', *short)
    stage(sft, 'student_base', '--steps=4', '--batch_rows=4')
    sampled('teacher', 'final', f'--out={folder}/final/samples.jsonl', *keep)
    stage(sft, 'distill', '--steps=2', '--batch_rows=4')
    stage(sft, 'student_sft', '--steps=2', '--batch_rows=4')
    flops = trained(folder, 'distill')[-1]['flops']
    stage(grpo, 'student_rl', f'--max_flops={flops}', *few)
    for name in report.STAGES:
        sampled('eval', name, f'--out={folder}/{name}/eval.jsonl',
                f'--summary={folder}/{name}/eval.json', '--max_new_tokens=40', '--limit=4',
                '--n=2')
    sampled('eval', 'base', '--prefill=<think> search',
            f'--summary={folder}/base/eval_search.json', '--limit=4', '--n=2')
    for name in ('reject', 'final'):
        sampled('eval_sort', name, f'--summary={folder}/{name}/eval_sort.json', '--limit=4')
    (folder / 'seconds.txt').write_text(f'{folder}/base/config.json 100 112.5\n'
                                        f'{folder}/base/eval.json 120 122.5\n'
                                        f'{folder}/zero/config.json 121 123\n'
                                        f'{folder}/control_sft/config.json 130 190\n')
    report.main(report.Config(run=str(folder)))
    patch.undo()
    return folder


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def trained(folder, stage):
    """The numbers of a stage's training steps."""
    return [m for m in read_jsonl(folder / stage / 'metrics.jsonl') if 'flops' in m]


def test_the_report_has_every_stage_and_the_agreed_keys(run):
    got = json.loads((run / 'report.json').read_text())
    assert list(got['stages']) == ['base', 'zero', 'cold', 'rl', 'reject', 'final', 'student_base',
                                   'distill', 'student_sft', 'student_rl']
    keys = {'pass1', 'pass1_ci', 'seen', 'beyond', 'greedy', 'maj8', 'length', 'format', 'mixing',
            'seconds'}
    for numbers in got['stages'].values():
        assert keys <= numbers.keys()
        assert 0 <= numbers['pass1_ci'][0] <= numbers['pass1'] <= numbers['pass1_ci'][1] <= 1
    assert got['seconds'] == 15.5        # two things at a time count once, controls not at all
    assert got['stages']['base']['seconds'] == 15.0
    assert got['sort'].keys() == {'reject', 'final'}
    assert 0 <= got['reward_model']['eval_accuracy'] <= 1
    text = (run / 'report.md').read_text()
    for name in got['stages']:
        assert re.search(rf'^\| {name} \|', text, re.M)


def test_the_figure_of_the_report_is_of_the_unseen_test_alone(run):
    got = json.loads((run / 'report.json').read_text())['stages']['final']
    for kind, path in (('pass1', 'test'), ('seen', 'test_seen'), ('beyond', 'test_beyond')):
        asked = {row['prompt'][0]['content'] for row in read_jsonl(run / 'data' / f'{path}.jsonl')}
        rows = [row for row in read_jsonl(run / 'final' / 'eval.jsonl')
                if row['prompt'][0]['content'] in asked]
        right = [s['rewards']['accuracy'] == 1 for row in rows for s in row['samples']]
        assert len(rows) == 4 and got[kind] == pytest.approx(sum(right) / len(right))


def test_three_problems_go_through_every_stage_in_the_report_and_every_column_is_explained(run):
    text = (run / 'report.md').read_text()
    shown = text[text.index('## Three problems'):]
    for path in ('test', 'test_seen', 'test_beyond'):
        first = read_jsonl(run / 'data' / f'{path}.jsonl')[0]
        assert first['prompt'][0]['content'].strip() in shown
    for stage in report.STAGES:
        assert len(re.findall(rf'^{stage}\s', shown, re.M)) == 3
    heads = text[text.index('| stage |'):].split('\n')[0].strip('| ').split(' | ')
    explained = ', '.join(report.COLUMNS)
    assert [head for head in heads[2:] if head not in explained] == []


def test_a_paired_difference_is_that_of_a_loop_over_the_problems_and_its_interval_of_the_sets():
    before = {((1, 2, n), t): 0.25 * (n % 3) for n in range(3, 30) for t in (5, 6)}
    after = {p: share + 0.1 * (p[0][2] % 2) for p, share in before.items()}
    mean, (low, high) = report.paired(before, after)
    by_set = torch.tensor([0.1 * (n % 2) for n in range(3, 30)], dtype=torch.float64)
    half = 1.96 * by_set.std() / len(by_set) ** 0.5      # both targets of a set move together
    assert mean == pytest.approx(by_set.mean().item())
    assert (high - low) / 2 == pytest.approx(half.item(), rel=1e-6)


HELD_OUT = ('test.jsonl', 'test_beyond.jsonl')
TESTS = ('test.jsonl', 'test_seen.jsonl', 'test_beyond.jsonl', 'sort_test.jsonl', 'eval.jsonl')


def question(row):
    """What a row asks: its prompt, or the first message."""
    messages = row.get('messages') or row.get('prompt') or row['chosen']
    return messages[0]['content']


def test_no_file_that_any_stage_is_trained_on_has_the_numbers_of_a_held_out_problem(run):
    """Every row of every file but the tests, as prepared and as sampled; order does not matter."""
    held_out = set()
    for name in HELD_OUT:
        held_out |= {tuple(sorted(row['numbers'])) for row in read_jsonl(run / 'data' / name)}
    files = [path for path in run.rglob('*.jsonl')
             if path.name not in (*TESTS, 'metrics.jsonl')]
    assert {'corpus.jsonl', 'rl.jsonl', 'distill.jsonl', 'searches.jsonl', 'samples.jsonl',
            'pairs.jsonl', 'sort_sft.jsonl'} <= {path.name for path in files}
    assert {'zero', 'rl', 'final', 'reward'} <= {path.parent.name for path in files}
    for path in files:
        for row in read_jsonl(path):
            asked = tuple(sorted(map(int, re.findall(r'(?<![=\d])\d+', question(row)))))
            assert len(asked) == 3 and asked not in held_out, (path, question(row))


def test_every_file_that_a_config_of_the_chain_trains_on_is_among_those(run):
    read = set()
    for config in (ROOT / 'config' / 'r1').glob('*.py'):
        text = config.read_text()
        named = re.search(r'^data = .*$', text, re.M)
        if 'out_dir' in text or 'keep' in text or 'pairs' in config.name:
            read |= set(re.findall(r"\{_run\}/([\w./]+)'", named[0]))
    assert len(read) >= 9
    for path in read:
        assert (run / path).exists() and Path(path).name not in TESTS


def test_the_plot_is_drawn(run):
    pytest.importorskip('matplotlib')
    assert (run / 'curves.png').stat().st_size > 10_000


def test_the_student_is_dense_and_at_most_a_third_of_the_teacher(run):
    teacher = Transformer.from_pretrained(run / 'final')
    student = Transformer.from_pretrained(run / 'distill')
    assert student.cfg.model_type == 'qwen2' and teacher.cfg.model_type == 'deepseek_v3'
    assert teacher.cfg.num_nextn_predict_layers == 1
    assert student.num_params() <= teacher.num_params() / 3


def test_the_students_arms_took_equal_compute_to_one_step(run):
    rl, distill = trained(run, 'student_rl'), trained(run, 'distill')
    assert rl[-1]['flops'] >= distill[-1]['flops']
    assert len(rl) == 1 or rl[-2]['flops'] < distill[-1]['flops']
    assert trained(run, 'student_sft')[-1]['flops'] == pytest.approx(distill[-1]['flops'], rel=0.1)


def test_transformers_loads_the_chains_models(run):
    transformers = pytest.importorskip('transformers')
    for name in ('final', 'distill'):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(run / name).eval()
        ours = Transformer.from_pretrained(run / name)
        ids = torch.randint(0, ours.cfg.vocab_size, (1, 20))
        with torch.no_grad():
            assert torch.allclose(theirs(ids).logits.float(), ours(ids), atol=2e-4)


def test_make_skips_what_is_done(run):
    """Each stage's target exists, so `make r1` after an interruption starts at the first
    unfinished one."""
    last = r'config\.json|samples\.jsonl|test\.jsonl|eval_\w+\.json'
    made = rf'^\$\(RUN\)/((?!control)\w+/(?:{last})):'
    targets = re.findall(made, (ROOT / 'Makefile').read_text(), re.M)
    assert len(targets) >= 14
    assert [t for t in targets if not (run / t).exists()] == []


def stages_left(folder):
    """The commands that make would run for the report in `folder`, and their targets."""
    if not shutil.which('make'):
        pytest.skip('no make')
    made = subprocess.run(['make', '-n', f'RUN={folder}', f'{folder}/report.json'], cwd=ROOT,
                          check=True, capture_output=True, text=True).stdout
    commands = re.findall(r"echo '\S+ (\S+\.py (?:config/r1/\w+\.py|--\w+))", made)
    return commands, re.findall(r'echo "(\S+) \$start', made)


def test_a_copy_with_dates_in_any_order_runs_nothing_again_but_what_is_missing(tmp_path):
    for target in [*stages_left(tmp_path / 'r1')[1], tmp_path / 'r1' / 'report.json']:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).touch()
    copy = tmp_path / 'copy'
    shutil.copytree(tmp_path / 'r1', copy, copy_function=shutil.copy)        # cp -r: without dates
    for age, path in enumerate(sorted(copy.rglob('*'))):
        os.utime(path, (1e9 - age * 7919 % 1000, 1e9 - age * 7919 % 1000))
    assert stages_left(copy) == ([], [])
    (copy / 'zero' / 'config.json').unlink()
    (copy / 'final' / 'eval.json').unlink()
    assert stages_left(copy)[0] == ['grpo.py config/r1/zero.py', 'evaluate.py config/r1/eval.py']


def test_make_runs_every_stage_of_a_new_run_once_and_in_order(tmp_path):
    left, _ = stages_left(tmp_path / 'new')
    trainers = re.compile('sft|grpo|preference')
    trained = [re.search(r'(\w+)\.py$', stage)[1] for stage in left if trainers.match(stage)]
    assert sorted(trained) == sorted([*report.STAGES, 'reward'])
    assert len(left) == len(trained) + 19           # data, samples, pairs, evaluations
    at = {name: trained.index(name) for name in trained}
    chain = ['base', 'zero', 'cold', 'rl', 'reject', 'reward', 'final', 'distill']
    assert [at[name] for name in chain] == sorted(at[name] for name in chain)
