"""kill -9 at random moments, over and over: a run ends with the bits of one that was left alone,
and repeats at most a save interval."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.countdown import prepare
from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parents[1]
SHAPE = dict(model_type='deepseek_v3', num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
             intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4,
             num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=256,
             num_nextn_predict_layers=1)
SAVE_EVERY = 2


def run(script, settings):
    """In a process of its own, with its messages in a file."""
    sys.path.insert(0, str(ROOT))
    import importlib
    module = importlib.import_module(script)
    Path(settings['out_dir']).mkdir(parents=True, exist_ok=True)
    sys.stderr = open(Path(settings['out_dir']) / 'stderr.txt', 'a')
    module.main(module.Config(**settings))


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toy')
    prepare.main(prepare.Config(out_dir=str(folder), corpus_rows=300, rl_rows=64, test_rows=32,
                                max_number=8))
    tokenizer = prepare.toy_tokenizer()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id,
                                    **SHAPE))
    model.save_pretrained(folder / 'm')
    tokenizer.save_pretrained(folder / 'm')
    return folder


def settings_of(script, toy, out, steps):
    common = dict(out_dir=str(out), steps=steps, save_every=SAVE_EVERY, threads=1, device='cpu',
                  muon_learning_rate=0.01, bias_rate=1e-3)
    if script == 'sft':
        return dict(common, tokenizer=str(toy / 'tokenizer'), data=[str(toy / 'corpus.jsonl')],
                    loss_on='all', model=SHAPE, row_len=160, batch_rows=4, micro_rows=2,
                    log_every=1)
    return dict(common, init_from=str(toy / 'm'), data=[str(toy / 'rl.jsonl')],
                rewards={'random': 1.0}, prompts=4, group=4, updates=2, max_new_tokens=8,
                eval_every=0, kl_coef=0.1, reference_every=3, dynamic_sampling=1)


def steps_of(out):
    path = Path(out) / 'metrics.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)['step'] for line in lines if line.endswith('}')]


def saved_in(out):
    return max([int(p.name[5:]) for p in Path(out).glob('step_????????')], default=0)


def unfinished(out):
    """Folders of checkpoints that are being written, or were when a process was killed, and when
    they changed."""
    found = {}
    for path in Path(out).glob('step_*.tmp'):
        try:
            found[path.name] = path.stat().st_mtime_ns
        except FileNotFoundError:
            pass
    return found


def started(processes, script, settings):
    process = processes.Process(target=run, args=(script, settings))
    process.start()
    return process


def run_to_the_end(processes, script, settings):
    process = started(processes, script, settings)
    process.join(300)
    assert process.exitcode == 0, (Path(settings['out_dir']) / 'stderr.txt').read_text()


def seconds_a_step(out, steps):
    """The start is not in it."""
    last = (Path(out) / 'metrics.jsonl').read_text().splitlines()[-1]
    return json.loads(last)['seconds'] / steps


def wait_for_a_step(process, out, seconds=120):
    before, limit = len(steps_of(out)), time.time() + seconds
    while process.is_alive() and time.time() < limit and len(steps_of(out)) == before:
        time.sleep(0.002)


def wait_for_a_save(process, out):
    before = unfinished(out)
    while process.is_alive() and unfinished(out).items() <= before.items():
        time.sleep(0.0005)


def kill_loop(script, toy, tmp_path, processes, kills, steps, during_saves):
    """-> kills that landed, those that landed during a save"""
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    run_to_the_end(processes, script, settings_of(script, toy, whole, steps))
    pace = seconds_a_step(whole, steps)
    settings = settings_of(script, toy, cut, steps)
    rng = random.Random(1)
    landed, in_save = 0, 0
    for attempt in range(4 * kills):
        process = started(processes, script, settings)
        if in_save < during_saves and attempt % 2 == 0:
            wait_for_a_save(process, cut)
            time.sleep(rng.uniform(0, 0.01))
        else:
            wait_for_a_step(process, cut)
            time.sleep(rng.uniform(0, SAVE_EVERY * pace))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break                                      # it was faster
        assert process.exitcode == -signal.SIGKILL, (cut / 'stderr.txt').read_text()
        landed += 1
        saved = saved_in(cut)
        in_save += any(int(name[5:13]) > saved for name in unfinished(cut))
        repeated = max(steps_of(cut), default=0) - saved     # by the next process
        assert repeated <= SAVE_EVERY
        if landed == kills:
            break
    run_to_the_end(processes, script, settings)
    assert steps_of(cut) == list(range(1, steps + 1))
    assert model_bytes(cut) == model_bytes(whole)
    return landed, in_save


def model_bytes(out):
    return (Path(out) / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('script', ['sft', 'grpo'])
def test_killed_runs_end_with_the_same_bits(toy, tmp_path, processes, script):
    landed, in_save = kill_loop(script, toy, tmp_path, processes, kills=3, steps=12, during_saves=1)
    assert landed >= 2


@pytest.mark.slow
def test_twenty_kills_over_both_scripts_five_during_a_save(toy, tmp_path, processes):
    counts = {}
    for script in ('sft', 'grpo'):
        counts[script] = kill_loop(script, toy, tmp_path / script, processes, kills=12, steps=80,
                                   during_saves=5)
    print('kills, of them during a save:', counts)
    assert sum(landed for landed, _ in counts.values()) >= 20
    assert sum(in_save for _, in_save in counts.values()) >= 5


def children(pid):
    """The processes that pid started, those that these started, and so on"""
    found = []
    for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split():
        found += [int(child), *children(int(child))]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='finds ranks through /proc')
def test_torchrun_restarts_a_killed_rank_from_the_last_checkpoint(toy, tmp_path):
    cut, whole = tmp_path / 'cut', tmp_path / 'whole'
    settings = settings_of('sft', toy, cut, 14)
    flags = [f'--{key}={value}' for key, value in settings.items() if key != 'out_dir']
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
             '--max-restarts=2', 'sft.py', *flags]
    where = dict(cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    process = subprocess.Popen([*start, f'--out_dir={cut}'], **where, stderr=subprocess.PIPE,
                               text=True)
    limit = time.time() + 200
    while time.time() < limit and process.poll() is None and max(steps_of(cut), default=0) < 5:
        time.sleep(0.005)
    ranks = [child for child in children(process.pid)
             if b'sft.py' in Path(f'/proc/{child}/cmdline').read_bytes()]
    os.kill(ranks[-1], signal.SIGKILL)
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 0, said
    assert 'from step ' in said                        # it went on, not anew
    subprocess.run([*start, f'--out_dir={whole}'], **where, check=True, timeout=200)
    assert steps_of(cut) == steps_of(whole) == list(range(1, 15))
    assert model_bytes(cut) == model_bytes(whole)
