"""A miniature of `make r1`: every stage with its own config and a hundredth of the steps, through to the report."""
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import grpo
import preference
import evaluate
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
    folder, patch = tmp_path_factory.mktemp('chain') / 'r1', pytest.MonkeyPatch()
    patch.setenv('RUN', str(folder))
    patch.chdir(ROOT)

    def stage(script, name, *overrides):
        script.main(parse(script.Config, [f'config/r1/{name}.py', *overrides]))

    def sampled(name, of, *overrides):
        stage(evaluate, name, f'--checkpoint={folder}/{of}', *overrides)

    prepare.main(prepare.Config(out_dir=str(folder / 'data'), corpus_rows=2000, rl_rows=64, test_rows=16))
    short = ['--max_new_tokens=40', '--steps=2', '--prompts=4', '--group=4', '--eval_rows=2', '--eval_every=2']
    keep = ["--keep={'accuracy': 0}", '--limit=24', '--max_new_tokens=40']
    stage(sft, 'base', '--steps=40', '--batch_rows=8', '--micro_rows=8')
    stage(grpo, 'zero', *short)
    sampled('samples', 'zero', f'--out={folder}/zero/samples.jsonl', *keep)
    stage(sft, 'cold', '--steps=2', '--batch_rows=4')
    stage(grpo, 'rl', *short)
    sampled('teacher', 'rl', f'--out={folder}/rl/samples.jsonl', *keep)
    stage(sft, 'reject', '--steps=2', '--batch_rows=4')
    sampled('pairs', 'reject', f'--out={folder}/reward/samples.jsonl',
          '--limit=96', '--max_new_tokens=12')
    pairs.main(pairs.Config(
        samples=[f'{folder}/reward/samples.jsonl'], tokenizer=f'{folder}/reject', held_out=2,
        out=f'{folder}/reward/pairs.jsonl'))
    stage(preference, 'reward', '--steps=2', '--batch_rows=4')
    stage(grpo, 'final', *short)
    stage(sft, 'student_base', '--steps=4', '--batch_rows=4')
    sampled('teacher', 'final', f'--out={folder}/final/samples.jsonl', *keep)
    stage(sft, 'distill', '--steps=2', '--batch_rows=4')
    flops = json.loads((folder / 'distill' / 'metrics.jsonl').read_text().splitlines()[-1])['flops']
    stage(grpo, 'student_rl', f'--max_flops={flops}', *[flag for flag in short if 'steps' not in flag])
    for name in report.STAGES:
        sampled('eval', name, f'--out={folder}/{name}/eval.jsonl',
                f'--summary={folder}/{name}/eval.json', '--max_new_tokens=40', '--limit=4')
    sampled('eval', 'base', '--prefill=<think> search',
            f'--summary={folder}/base/eval_search.json', '--limit=4')
    for name in ('reject', 'final'):
        sampled('eval_sort', name, f'--summary={folder}/{name}/eval_sort.json', '--limit=4')
    (folder / 'seconds.txt').write_text(f'{folder}/base/config.json 100 112.5\n{folder}/base/eval.json 120 122.5\n{folder}/zero/config.json 121 123\n')
    report.main(report.Config(run=str(folder)))
    patch.undo()
    return folder


def test_the_report_has_every_stage_and_the_agreed_keys(run):
    got = json.loads((run / 'report.json').read_text())
    assert list(got['stages']) == ['base', 'zero', 'cold', 'rl', 'reject', 'final', 'distill', 'student_rl']
    for numbers in got['stages'].values():
        assert {'pass1', 'pass1_ci', 'greedy', 'maj8', 'length', 'format', 'mixing', 'seconds'} <= numbers.keys()
        assert 0 <= numbers['pass1_ci'][0] <= numbers['pass1'] <= numbers['pass1_ci'][1] <= 1
    assert got['seconds'] == 15.5 and got['stages']['base']['seconds'] == 15.0    # two things at a time count once
    assert got['sort'].keys() == {'reject', 'final'} and 0 <= got['reward_model']['eval_accuracy'] <= 1
    text = (run / 'report.md').read_text()
    assert all(re.search(rf'^\| {name} \|', text, re.M) for name in got['stages']) and 'Samples of final' in text


def test_the_plot_is_drawn(run):
    pytest.importorskip('matplotlib')
    assert (run / 'curves.png').stat().st_size > 10_000


def test_the_student_is_dense_and_at_most_a_third_of_the_teacher(run):
    teacher, student = Transformer.from_pretrained(run / 'final'), Transformer.from_pretrained(run / 'distill')
    assert student.cfg.model_type == 'qwen2' and teacher.cfg.model_type == 'deepseek_v3' and teacher.cfg.num_nextn_predict_layers == 1
    assert student.num_params() <= teacher.num_params() / 3


def test_the_students_arms_took_equal_compute_to_one_step(run):
    last = lambda name: [m for m in map(json.loads, (run / name / 'metrics.jsonl').read_text().splitlines()) if 'flops' in m]  # noqa: E731
    rl, distill = last('student_rl'), last('distill')
    assert rl[-1]['flops'] >= distill[-1]['flops'] and (len(rl) == 1 or rl[-2]['flops'] < distill[-1]['flops'])


def test_transformers_loads_the_chains_models(run):
    transformers = pytest.importorskip('transformers')
    for name in ('final', 'distill'):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(run / name).eval()
        ours = Transformer.from_pretrained(run / name)
        import torch
        ids = torch.randint(0, ours.cfg.vocab_size, (1, 20))
        with torch.no_grad():
            assert torch.allclose(theirs(ids).logits.float(), ours(ids), atol=2e-4)


def test_make_skips_what_is_done(run):
    """Each stage's target exists, so that `make r1` after an interruption starts at the first unfinished one."""
    targets = re.findall(r'^\$\(RUN\)/((?!control)\w+/(?:config\.json|samples\.jsonl|test\.jsonl|eval_\w+\.json)):', (ROOT / 'Makefile').read_text(), re.M)
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
    trained = [re.search(r'(\w+)\.py$', stage)[1] for stage in left if re.match('sft|grpo', stage)]
    assert sorted(trained) == sorted([*report.STAGES, 'reward', 'student_base'])
    assert len(left) == len(trained) + 17           # data, samples, pairs, evaluations
    at = {name: trained.index(name) for name in trained}
    chain = ['base', 'zero', 'cold', 'rl', 'reject', 'reward', 'final', 'distill']
    assert [at[name] for name in chain] == sorted(at[name] for name in chain)
