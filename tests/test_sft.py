"""sft.py: accumulation, ranks and resumption of whole runs on a tiny model."""
import copy
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import checkpoint
import evaluate
import rewards
import sft
import train
from data.countdown import prepare
from data.tokenizer import Tokenizer
from model import ModelConfig, Transformer
from sample import Sampler
from sft import Config

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(model_type='deepseek_v3', num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
            intermediate_size=48, moe_intermediate_size=16, max_position_embeddings=256,
            num_nextn_predict_layers=1)


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toy')
    prepare.main(prepare.Config(out_dir=str(folder), corpus_rows=300, rl_rows=64, test_rows=32,
                                max_number=8))
    return folder


def config(toy, out, **changes):
    settings = dict(
        out_dir=str(out), tokenizer=str(toy / 'tokenizer'), data=[str(toy / 'corpus.jsonl')],
        loss_on='all', model=TINY, row_len=160, batch_rows=4, micro_rows=4, steps=6,
        muon_learning_rate=0.02, learning_rate=3e-3, warmup_steps=2, save_every=2, log_every=1,
        threads=1)
    return Config(**{**settings, **changes})


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / 'metrics.jsonl').read_text().splitlines()]


def exported(folder):
    """The bytes of the finished model's weights."""
    return (folder / 'model.safetensors').read_bytes()


def same(a, b, tolerance=0.0):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        for key in x.keys() - {'tokens_per_second', 'memory_gib', 'mtp_acceptance'}:
            if not key.startswith('seconds'):
                close = tolerance and y[key] is not None
                y_key = pytest.approx(y[key], rel=tolerance, abs=1e-5) if close else y[key]
                assert x[key] == y_key, key


def test_training_lowers_the_loss_and_writes_a_model(toy, tmp_path):
    sft.main(config(toy, tmp_path / 'a', steps=40, eval_data=[str(toy / 'test.jsonl')],
                    eval_every=40, eval_rows=4))
    lines = metrics(tmp_path / 'a')
    losses = [line['loss'] for line in lines if 'loss' in line]
    assert losses[0] > 5.5 and losses[-1] < 4.3 and lines[-1]['eval_problems'] == 4
    assert lines[0]['expert_max_load'] >= 1 and lines[-2]['mtp_loss'] < lines[0]['mtp_loss']
    model = Transformer.from_pretrained(tmp_path / 'a')
    assert model.cfg.eos_token_id is not None
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, 'gate')]
    assert any((gate.e_score_correction_bias != 0).any() for gate in gates)


def test_an_evaluation_is_scored_by_a_reward_file(toy, tmp_path, capsys):
    (tmp_path / 'my.py').write_text('def coin_reward(response, row):\n    return row["target"]\n'
                                    'coin_reward.needs = ("target",)\n')
    rows = [json.loads(line) for line in (toy / 'test.jsonl').read_text().splitlines()][:2]
    rows = [{**row, 'task': 'coin', 'target': n} for n, row in enumerate(rows)]
    (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    more = dict(steps=1, eval_data=[str(tmp_path / 'p.jsonl')], eval_every=1, eval_max_new_tokens=2,
                reward_file=str(tmp_path / 'my.py'), reward_workers=1, save_every=1)
    try:
        sft.main(config(toy, tmp_path / 'a', **more))
        assert metrics(tmp_path / 'a')[-1]['eval_pass1'] == 0.5
        state = torch.load(tmp_path / 'a' / 'step_00000001' / 'state.pt', weights_only=True)
        assert state['reward_file'] == rewards.file_stamp() and state['reward_file']['path']
        (tmp_path / 'p.jsonl').write_text(json.dumps({**rows[0], 'target': None}) + '\n')
        with pytest.raises(ValueError, match="p.jsonl:1: 'target' is missing"):
            sft.main(config(toy, tmp_path / 'b', **more))
    finally:
        rewards.use_file('')
        rewards.prepare({'format': 1.0}, ())


def test_gradient_accumulation_changes_only_rounding(toy, tmp_path):
    sft.main(config(toy, tmp_path / 'whole', balance_alpha=0.01))
    sft.main(config(toy, tmp_path / 'parts', balance_alpha=0.01, micro_rows=2))
    same(metrics(tmp_path / 'parts'), metrics(tmp_path / 'whole'), 2e-3)


def test_a_stopped_run_goes_on_to_the_same_bits(toy, tmp_path, monkeypatch):
    sft.main(config(toy, tmp_path / 'whole'))
    calls = iter(range(100))
    monkeypatch.setattr(sft.Stop, 'wanted', lambda self, device: next(calls) >= 2)
    with pytest.raises(SystemExit):
        sft.main(config(toy, tmp_path / 'cut'))
    monkeypatch.undo()
    assert not (tmp_path / 'cut' / 'config.json').exists()
    sft.main(config(toy, tmp_path / 'cut'))
    same(metrics(tmp_path / 'cut'), metrics(tmp_path / 'whole'))
    assert exported(tmp_path / 'cut') == exported(tmp_path / 'whole')


def test_a_resumed_run_takes_the_settings_of_its_command(toy, tmp_path, capsys):
    sft.main(config(toy, tmp_path / 'a', steps=2))
    before = Transformer.from_pretrained(tmp_path / 'a')
    (tmp_path / 'a' / 'config.json').unlink()
    capsys.readouterr()
    sft.main(config(toy, tmp_path / 'a', steps=4, learning_rate=1e-12, muon_learning_rate=1e-12,
                    bias_rate=0.0))
    said = capsys.readouterr().err
    assert 'learning_rate was 0.003; from step 2 on it is 1e-12' in said
    assert 'steps was 2' in said and said.count(' was ') == 4
    after = Transformer.from_pretrained(tmp_path / 'a').state_dict()
    assert before.state_dict().keys() == after.keys()
    for name, weight in before.state_dict().items():
        assert torch.allclose(weight, after[name], atol=1e-8), name


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in sorted(Path(folder).rglob('*'))}


def test_a_finished_run_goes_on_with_more_steps_as_if_it_had_never_ended(toy, tmp_path):
    rates = dict(schedule='constant', save_every=0)
    sft.main(config(toy, tmp_path / 'whole', steps=6, **rates))
    sft.main(config(toy, tmp_path / 'a', steps=4, **rates))
    assert saved_steps(tmp_path / 'a') == [4]      # though save_every is 0
    sft.main(config(toy, tmp_path / 'a', steps=6, **rates))
    same(metrics(tmp_path / 'a'), metrics(tmp_path / 'whole'))
    assert exported(tmp_path / 'a') == exported(tmp_path / 'whole')


def saved_steps(folder):
    return sorted(int(path.name[5:]) for path in Path(folder).glob('step_*'))


def test_a_run_with_nothing_left_to_do_says_what_to_do_and_changes_nothing(toy, tmp_path):
    sft.main(config(toy, tmp_path / 'a', steps=2))
    before = contents(tmp_path / 'a')
    with pytest.raises(ValueError, match='holds the finished model of step 2: raise steps'):
        sft.main(config(toy, tmp_path / 'a', steps=2))
    with pytest.raises(ValueError, match='a is at step 2, past steps=1, and is left as it is'):
        sft.main(config(toy, tmp_path / 'a', steps=1))
    with pytest.raises(ValueError, match='has a checkpoint of step 2 in the way'):
        sft.main(config(toy, tmp_path / 'a', steps=4, resume=False))
    assert contents(tmp_path / 'a') == before
    shutil.rmtree(tmp_path / 'a' / 'step_00000002')
    with pytest.raises(ValueError, match='a finished model and no checkpoint to go on from'):
        sft.main(config(toy, tmp_path / 'a', steps=4))
    process = run(config(toy, tmp_path / 'a', steps=4), stderr=subprocess.PIPE)
    said = process.communicate()[1].decode()
    assert process.returncode == 1 and said.startswith('sft.py: ') and said.count('\n') == 1


def test_a_change_of_the_rate_in_the_middle_is_told_as_a_jump(toy, tmp_path, capsys):
    same_rate = dict(schedule='constant', warmup_steps=0, learning_rate=3e-3)
    sft.main(config(toy, tmp_path / 'a', steps=2, **same_rate))
    sft.main(config(toy, tmp_path / 'a', steps=3, **{**same_rate, 'learning_rate': 1e-3}))
    said = capsys.readouterr().err
    assert 'the learning rate jumps from 0.003 in step 2 to 0.001 in step 3' in said


def test_rows_too_long_are_named_or_dropped_and_counted(toy, tmp_path, capsys, monkeypatch):
    rows = (toy / 'corpus.jsonl').read_text().splitlines()
    long = json.loads(rows[0])
    long['messages'][1]['content'] += ' plus' * 200
    mixed = [*rows[:20], json.dumps(long), *rows[20:40], json.dumps(long)]
    for name, kept in (('mixed', mixed), ('short', rows[:40]), ('all', [json.dumps(long)])):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(kept) + '\n')
    ids, _ = Tokenizer.from_pretrained(toy / 'tokenizer').apply_chat_template(long['messages'])
    where = f'{tmp_path}/mixed.jsonl, row 21: {len(ids)} tokens do not fit row_len=160'
    given = {name: config(toy, tmp_path / name, data=[f'{tmp_path}/{name}.jsonl'], steps=2)
             for name in ('mixed', 'short', 'all')}
    with monkeypatch.context() as patch:
        patch.setattr(sft, 'load_model', None)      # nothing is loaded before
        with pytest.raises(ValueError) as error:
            sft.main(given['mixed'])
        assert str(error.value).startswith(f'{where} (2 of 42 rows are too long)')
        given['all'].long_rows = 'drop'
        with pytest.raises(ValueError, match='1 of 1 rows are too long'):
            sft.main(given['all'])
    given['mixed'].long_rows = 'drop'
    sft.main(given['mixed'])
    assert f'{where}; 2 of 42 rows are too long and dropped' in capsys.readouterr().err
    sft.main(given['short'])
    same(metrics(tmp_path / 'mixed'), metrics(tmp_path / 'short'))


@pytest.mark.parametrize('changes, said', [
    ({'data': ['absent.jsonl']}, 'absent.jsonl does not exist'),
    ({'eval_data': ['absent.jsonl']}, 'absent.jsonl does not exist'),
    ({'eval_data': ['test.jsonl'], 'eval_max_new_tokens': 251}, r'test.jsonl, row 1: the prompt '
     r'has \d tokens, and eval_max_new_tokens=251 leaves room for 5 in the context of 256'),
    ({'init_from': 'out/none/base'}, 'out/none/base does not exist: run make r1 RUN='),
])
def test_mistakes_are_told_before_the_model_is_loaded(toy, tmp_path, changes, said, monkeypatch):
    monkeypatch.setenv('RUN', 'out/none')
    monkeypatch.setattr(sft, 'load_model', None)
    monkeypatch.chdir(toy)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        sft.main(config(toy, tmp_path / 'a', **changes))
    assert not (tmp_path / 'a').exists()


def test_without_eval_every_the_end_is_evaluated_and_samples_show_their_prompts(toy, tmp_path):
    graded = dict(eval_data=[str(toy / 'test.jsonl')], eval_rows=2, eval_max_new_tokens=8)
    sft.main(config(toy, tmp_path / 'a', steps=2, **graded))
    assert [line['step'] for line in metrics(tmp_path / 'a') if 'eval_pass1' in line] == [2]
    sft.main(config(toy, tmp_path / 'a', steps=4, **graded))
    text = (tmp_path / 'a' / 'samples.txt').read_text(encoding='utf-8')
    prompts = [json.loads(line)['prompt'] for line in (toy / 'test.jsonl').read_text().splitlines()]
    head = r'^step (\d), evaluation, problem (\d): accuracy \S+, .*total \S+, tokens 8$'
    heads = re.findall(head, text, re.M)
    assert heads == [('2', '1'), ('2', '2'), ('4', '1'), ('4', '2')]
    for (message,) in prompts[:2]:
        assert text.count(f'    ⟦<|user|>⟧{message["content"]}⟦<|assistant|>⟧\n') == 2
    (tmp_path / 'a' / 'config.json').unlink()
    shutil.rmtree(tmp_path / 'a' / 'step_00000004')      # a run taken back to step 2
    sft.main(config(toy, tmp_path / 'a', steps=3, **graded))
    text = (tmp_path / 'a' / 'samples.txt').read_text(encoding='utf-8')
    assert re.findall(r'^step (\d), ', text, re.M) == ['2', '2', '3', '3']


def test_show_prints_rows_with_control_tokens_and_loads_nothing(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sft, 'load_model', None)
    row = {'messages': [{'role': 'user', 'content': ' 1 2 <|end|>'},
                        {'role': 'assistant', 'content': '<think> guess</think>'}]}
    (tmp_path / 'x.jsonl').write_text(3 * (json.dumps(row) + '\n'))
    sft.main(config(toy, tmp_path / 'a', data=[f'{tmp_path}/x.jsonl'], loss_on='assistant', show=2))
    shown = capsys.readouterr().out
    # 7 bytes of <|end|> as text; user, 1, 2, a space, assistant; 3 words and the end
    expected = (f'{tmp_path}/x.jsonl, row {{}}: 16 tokens, 4 with loss\n'
                '  context\n    ⟦<|user|>⟧ 1 2 <|end|>⟦<|assistant|>⟧\n'
                '  loss\n    <think> guess</think>⟦<|end|>⟧\n\n')
    assert shown == expected.format(1) + expected.format(2)
    assert not (tmp_path / 'a').exists()


def test_an_export_with_an_mtp_layer_says_what_transformers_will_say(toy, tmp_path, capsys):
    transformers = pytest.importorskip('transformers')
    sft.main(config(toy, tmp_path / 'a', steps=1))
    said = capsys.readouterr().err
    load = transformers.AutoModelForCausalLM.from_pretrained
    _, info = load(tmp_path / 'a', output_loading_info=True)
    listed = {re.match(r'model\.layers\.\d+\.', name)[0] for name in info['unexpected_keys']}
    assert listed == {'model.layers.2.'} and 'model.layers.2.* as UNEXPECTED' in said
    plain = {**TINY, 'num_nextn_predict_layers': 0}
    sft.main(config(toy, tmp_path / 'b', steps=1, model=plain))
    assert 'as UNEXPECTED' not in capsys.readouterr().err


def test_padding_counts_in_no_experts_load(toy, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sft, 'update_router_bias', lambda model, counts, rate: seen.append(counts))
    sft.main(config(toy, tmp_path / 'a', steps=3, micro_rows=2))
    K = Transformer.from_pretrained(tmp_path / 'a').cfg.num_experts_per_tok
    tokens = [0] + [line['tokens'] for line in metrics(tmp_path / 'a')]
    assert 0 < tokens[-1] < 3 * 4 * 160      # some is padding
    assert len(seen) == 3
    for step, counts in enumerate(seen):
        assert (counts.sum(1) == K * (tokens[step + 1] - tokens[step])).all()


def flags(cfg):
    return [f'--{name}={value}' for name, value in vars(cfg).items()]


def run(cfg, **options):
    command = [sys.executable, 'sft.py', *flags(cfg)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **options)


@pytest.mark.parametrize('how, code', [
    (signal.SIGTERM, 0),
    (signal.SIGINT, 130),
    (signal.SIGKILL, -9),
])
def test_signals_and_kills_lose_at_most_a_save_interval(toy, tmp_path, how, code):
    sft.main(config(toy, tmp_path / 'whole', steps=12))
    process = run(config(toy, tmp_path / 'cut', steps=12), stderr=subprocess.PIPE)

    def is_under_way():
        has_saved = any((tmp_path / 'cut').glob('step_*'))
        return has_saved and len(metrics(tmp_path / 'cut')) >= 3

    limit = time.time() + 120
    while time.time() < limit and not is_under_way():
        time.sleep(0.02)
    process.send_signal(how)
    said = process.communicate()[1].decode()
    reached = len(metrics(tmp_path / 'cut'))
    if reached < 12:      # else it finished first
        assert process.returncode == code, said
        assert how == signal.SIGKILL or 'goes on from there' in said
        saved = max(int(p.name[5:]) for p in (tmp_path / 'cut').glob('step_????????'))
        assert reached - saved <= (2 if how == signal.SIGKILL else 0)
    assert run(config(toy, tmp_path / 'cut', steps=12), stderr=subprocess.DEVNULL).wait() == 0
    same(metrics(tmp_path / 'cut'), metrics(tmp_path / 'whole'))
    assert exported(tmp_path / 'cut') == exported(tmp_path / 'whole')


def train_alone(settings):
    sft.main(Config(**settings))


def test_ranks_with_unequal_rows_and_tokens_train_what_one_does(toy, tmp_path, ranks):
    """One row to evaluate, and as training rows long ones of two labels beside short ones of many.
    What a rank samples last, or nothing, must not decide what its next backward pass gathers."""
    rows = [json.loads(line) for line in (toy / 'corpus.jsonl').read_text().splitlines()[:30]]
    asked = [row['messages'][0]['content'] * 12 for row in rows]
    answer = {'role': 'assistant', 'content': '3'}
    rows += [{'messages': [{'role': 'user', 'content': text}, answer]} for text in asked]
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    more = dict(data=[str(tmp_path / 'rows.jsonl')], loss_on='assistant', batch_rows=6, steps=3,
                micro_rows=2, device='cpu', save_every=2, eval_data=[str(toy / 'test.jsonl')],
                eval_every=1, eval_rows=1, eval_max_new_tokens=8)
    sft.main(config(toy, tmp_path / 'one', **more))
    for world in (2, 3):
        ranks(world, train_alone, vars(config(toy, tmp_path / f'{world}', **more)))
        same(metrics(tmp_path / f'{world}'), metrics(tmp_path / 'one'), 2e-3)
    assert metrics(tmp_path / 'one')[1]['eval_problems'] == 1


def as_on_gpus(function, *args):
    """With FSDP's policy for bf16 on GPUs, on CPUs."""
    mixed_precision = train.mixed_precision

    def on_gpus(cfg, device):
        return mixed_precision(cfg, torch.device('cuda'))

    train.mixed_precision = on_gpus
    function(*args)


def test_fsdp_as_on_gpus_collects_routes(toy, tmp_path, ranks):
    more = dict(device='cpu', dtype='bfloat16', balance_alpha=0.01, steps=3)
    ranks(2, as_on_gpus, train_alone, vars(config(toy, tmp_path / 'a', **more)))
    sft.main(config(toy, tmp_path / 'b', **more))
    for a, b in zip(metrics(tmp_path / 'a'), metrics(tmp_path / 'b'), strict=True):
        for key in ('loss', 'mtp_loss', 'balance_loss'):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
        assert a['tokens'] == b['tokens']
        assert a['expert_max_load'] == pytest.approx(b['expert_max_load'], rel=0.02)


def sharded_equals_whole(shapes, cfg):
    device = torch.device('cpu')
    for shape in shapes:
        torch.manual_seed(0)
        model = Transformer(ModelConfig(vocab_size=64, initializer_range=0.2, **shape))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.02 * torch.randn_like(p)     # norms too: none of them is a bf16 number
        whole = copy.deepcopy(model)
        ids = torch.randint(0, 64, (3, 20))
        sharded = sft.shard(model, cfg, device)
        with torch.autocast('cpu', torch.bfloat16):
            mtp = 'num_nextn_predict_layers' in shape
            a = whole.logprobs(ids, ids.roll(-1, 1), mtp=mtp, entropy=True)
            b = sharded.logprobs(ids, ids.roll(-1, 1), mtp=mtp, entropy=True)
            sampled = [Sampler(whole).generate(ids.tolist(), n, 9, seed=1) for n in (2, 8)]
            with sft.Unsharded(sharded):
                again = [Sampler(sharded).generate(ids.tolist(), n, 9, seed=1) for n in (2, 8)]
        assert all(torch.equal(x, y) for x, y in zip(a, b) if x is not None)
        assert sampled == again
        for logp, _, mtp_logp in (a, b):
            (logp.sum() if mtp_logp is None else logp.sum() + mtp_logp.sum()).backward()
        for (name, p), q in zip(whole.named_parameters(), sharded.parameters()):
            if p.grad is not None:
                assert (q.grad.full_tensor() - p.grad).norm() < 0.01 * p.grad.norm(), name


def test_in_bf16_fsdp_as_on_gpus_computes_what_one_process_does(toy, tmp_path, ranks):
    """Bit for bit, log-probs, entropies and samples (24 rows take reordered weights, 6 do not);
    gradients to their rounding. FSDP gathers bf16 weights; autocast leaves embedding, norms, router
    and head in float32."""
    qwen3 = dict(model_type='qwen3', num_hidden_layers=2, hidden_size=32, intermediate_size=48,
                 head_dim=16, tie_word_embeddings=True)
    cfg = config(toy, tmp_path / 'a', dtype='bfloat16')
    ranks(2, as_on_gpus, sharded_equals_whole, [TINY, qwen3], cfg)


def gathers_alone(cfg):
    train.PASS_TIMEOUT = timedelta(seconds=1)
    model = Transformer(ModelConfig(vocab_size=64, **TINY))
    gathered = sft.Unsharded(sft.shard(model, cfg, torch.device('cpu')))
    if torch.distributed.get_rank() == 1:
        return time.sleep(3)
    with pytest.raises(RuntimeError, match='Timed out waiting 1000ms'), gathered:
        pass


def test_a_rank_that_gathers_alone_stops_soon(toy, tmp_path, ranks):
    """Not after the patience that saving needs."""
    ranks(2, gathers_alone, config(toy, tmp_path / 'a'))


@pytest.mark.slow
@pytest.mark.parametrize('script', ['sft', 'grpo'])
def test_two_copies_of_two_ranks_equal_one_process(toy, tmp_path, script):
    """HSDP: 4 ranks, each copy of the weights on 2 of them."""
    settings = config(toy, tmp_path / 'x', device='cpu', keep_checkpoints=1)
    if script == 'grpo':
        sft.main(config(toy, tmp_path / 'm', steps=2))
        given = [f'--init_from={tmp_path / "m"}', f"--data=['{toy / 'rl.jsonl'}']",
                 "--rewards={'random': 1.0}", '--steps=3', '--prompts=4', '--group=4',
                 '--max_new_tokens=8', '--eval_every=0', '--updates=2', '--kl_coef=0.1',
                 '--threads=1', '--device=cpu', '--muon_learning_rate=0.01', '--micro_tokens=128']
    else:
        given = [flag for flag in flags(settings) if '--out_dir' not in flag]
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=4']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    for out, start, more in (('four', torchrun, ['--shard_ranks=2']), ('one', [], [])):
        command = [sys.executable, *start, f'{script}.py', *given, f'--out_dir={tmp_path / out}']
        subprocess.run([*command, *more], cwd=ROOT, env=environment, check=True, timeout=280)
    same(metrics(tmp_path / 'four'), metrics(tmp_path / 'one'), 2e-3)


def test_longer_context_by_rope_keys(toy, tmp_path):
    sft.main(config(toy, tmp_path / 'short', steps=1))
    yarn = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 256,
            'beta_fast': 32, 'beta_slow': 1, 'mscale': 1.0, 'mscale_all_dim': 1.0}
    longer = {'max_position_embeddings': 1024, 'rope_scaling': yarn}
    sft.main(config(toy, tmp_path / 'long', steps=1, learning_rate=0.0, muon_learning_rate=0.0,
                    bias_rate=0.0, init_from=str(tmp_path / 'short'), tokenizer=None,
                    model=longer, row_len=700))
    short = Transformer.from_pretrained(tmp_path / 'short')
    long = Transformer.from_pretrained(tmp_path / 'long')
    assert short.cfg.rope_scaling is None
    assert long.cfg.max_position_embeddings == 1024 and long.cfg.rope_scaling['factor'] == 4.0
    assert torch.equal(short.model.embed_tokens.weight, long.model.embed_tokens.weight)
    ids = torch.randint(0, short.cfg.vocab_size, (1, 200))
    with torch.no_grad():
        assert not torch.allclose(short(ids), long(ids), atol=1e-3)


def break_losses(monkeypatch, *broken):
    """From here on the losses of the calls of these numbers, from 0, are infinite."""
    logprobs = Transformer.logprobs
    calls = itertools.count()

    def infinite(self, *args, **kwargs):
        logp, *rest = logprobs(self, *args, **kwargs)
        if next(calls) in broken:
            logp = logp * float('inf')
        return logp, *rest

    monkeypatch.setattr(Transformer, 'logprobs', infinite)


def test_a_loss_that_is_not_finite_skips_the_step_and_then_stops_the_run(
        toy, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        break_losses(patch, 1)
        sft.main(config(toy, tmp_path / 'a', steps=4))
    assert [line['skipped'] for line in metrics(tmp_path / 'a')] == [0, 1, 0, 0]
    said = capsys.readouterr().err
    assert 'step 2: loss or gradient is not finite, update skipped (1 in a row)' in said
    weights = Transformer.from_pretrained(tmp_path / 'a').state_dict()
    assert all(torch.isfinite(t).all() for t in weights.values())
    break_losses(monkeypatch, 3, 4, 5)
    with pytest.raises(FloatingPointError, match='3 updates in a row.*bad_batch_rank0.pt'):
        sft.main(config(toy, tmp_path / 'b', steps=9))
    saved = torch.load(tmp_path / 'b' / 'bad_batch_rank0.pt', weights_only=True)
    assert saved['step'] == 5 and saved['input_ids'].shape == (4, 160)


def test_wandb_gets_the_numbers_where_it_is_installed(toy, tmp_path, monkeypatch):
    said = []

    class WandbRun:
        def log(self, numbers, step):
            said.append((step, numbers))

        def finish(self):
            said.append('finished')

    def init(**given):
        said.append(given)
        return WandbRun()

    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    sft.main(config(toy, tmp_path / 'a', steps=2, wandb='tests'))
    assert said[0]['project'] == 'tests' and said[0]['resume'] == 'allow' and said[-1] == 'finished'
    logged = [(step, numbers['loss']) for step, numbers in said[1:-1]]
    assert logged == [(line['step'], line['loss']) for line in metrics(tmp_path / 'a')]
    # an id of its own, whatever the folder's last name; the same where a run goes on, another
    # in a copy and where it begins again
    for folder in ('b/a', 'c'):
        sft.main(config(toy, tmp_path / folder, steps=2, wandb='tests'))
    shutil.copytree(tmp_path / 'a', tmp_path / 'copy')
    for folder in ('a', 'copy'):
        (tmp_path / folder / 'config.json').unlink()
        sft.main(config(toy, tmp_path / folder, steps=3, wandb='tests'))
    shutil.rmtree(tmp_path / 'c')
    sft.main(config(toy, tmp_path / 'c', steps=2, wandb='tests'))
    ids = [given['id'] for given in said if isinstance(given, dict)]
    assert ids[0] == ids[3] and len(set(ids)) == len(ids) - 1 == 5
    (tmp_path / 'a').rename(tmp_path / 'moved')     # is no copy: the run has moved
    sft.main(config(toy, tmp_path / 'moved', steps=4, wandb='tests'))
    assert next(given['id'] for given in reversed(said) if isinstance(given, dict)) == ids[0]
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(SystemExit, match=r'\[wandb\]'):
        sft.main(config(toy, tmp_path / 'd', steps=2, wandb='tests'))


def test_a_model_is_saved_as_its_start_is_stored_and_a_new_one_in_float32(toy, tmp_path):
    def saved(folder):
        tensors = load_file(tmp_path / folder / 'model.safetensors')
        biases = {str(t.dtype) for name, t in tensors.items() if name.endswith('correction_bias')}
        assert biases == {'torch.float32'}
        dtype = tensors['model.embed_tokens.weight'].dtype
        written = json.loads((tmp_path / folder / 'config.json').read_text())
        assert written['torch_dtype'] == str(dtype)[6:]
        return dtype
    sft.main(config(toy, tmp_path / 'new', steps=1, dtype='bfloat16'))
    sft.main(config(toy, tmp_path / 'half', steps=1, save_dtype='bfloat16'))
    assert saved('new') == torch.float32 and saved('half') == torch.bfloat16
    onward = dict(steps=2, save_every=1, model={}, dtype='bfloat16',
                  init_from=str(tmp_path / 'half'))
    sft.main(config(toy, tmp_path / 'on', **onward))
    sft.main(config(toy, tmp_path / 'asked', **{**onward, 'steps': 1}, save_dtype='float16'))
    assert saved('on') == torch.bfloat16 and saved('asked') == torch.float16
    weights = load_file(tmp_path / 'on' / 'step_00000002' / 'weights.safetensors')
    assert {t.dtype for t in weights.values()} == {torch.float32}
    written = load_file(tmp_path / 'on' / 'model.safetensors')['model.embed_tokens.weight']
    assert torch.equal(written, weights['model.embed_tokens.weight'].bfloat16())


def test_a_row_beyond_the_context_of_the_model_is_named(toy, tmp_path):
    tokenizer = Tokenizer.from_pretrained(toy / 'tokenizer')
    lengths = [len(tokenizer.apply_chat_template(json.loads(line)['messages'])[0])
               for line in (toy / 'corpus.jsonl').read_text().splitlines()]
    row = next(i for i, n in enumerate(lengths, 1) if n > 40)
    short = {**TINY, 'max_position_embeddings': 40}
    said = rf'corpus.jsonl, row {row}: {lengths[row - 1]} tokens are more than the 40 .*model={{'
    with pytest.raises(ValueError, match=said):
        sft.main(config(toy, tmp_path / 'a', model=short))
    assert not (tmp_path / 'a').exists()
    enough = {**TINY, 'max_position_embeddings': max(lengths)}      # though row_len is more
    sft.main(config(toy, tmp_path / 'b', model=enough, steps=1))


def test_ids_without_a_token_are_left_out_of_training_and_sampling(toy, tmp_path):
    """A vocabulary rounded up, whose spare rows would be the likeliest of all."""
    folder = tmp_path / 'padded'
    tokenizer = Tokenizer.from_pretrained(toy / 'tokenizer')
    n = tokenizer.vocab_size
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**TINY, 'vocab_size': n + 20, 'initializer_range': 0.2}))
    with torch.no_grad():
        model.lm_head.weight[n:] = 100 * torch.randn(20, 32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    cfg = config(toy, tmp_path / 'out', init_from=str(folder), model={}, tokenizer=None, steps=2)
    read, _ = sft.load_model(cfg, torch.device('cpu'))
    assert read.absent.tolist() == list(range(n, n + 20))
    ids = torch.tensor([tokenizer.encode('3 7 8 make 29, or so')])
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    logp, entropy, mtp = read.logprobs(ids, labels, mtp=True, entropy=True)
    with torch.no_grad():
        z = read(ids)[0, :-1]
        p = torch.distributions.Categorical(logits=z[:, :n])
    assert z.argmax(-1).min() >= n      # exported logits are as they were
    assert torch.allclose(logp, p.log_prob(ids[0, 1:]), atol=1e-5)
    assert torch.allclose(entropy, p.entropy(), atol=1e-5)
    assert mtp.min() > -40
    sft.main(cfg)
    assert metrics(tmp_path / 'out')[0]['loss'] < 20      # hundreds, were they counted
    before, after = (load_file(f / 'model.safetensors')['lm_head.weight']
                     for f in (folder, tmp_path / 'out'))
    assert torch.equal(before[n:], after[n:]) and not torch.equal(before[:n], after[:n])


def test_utilisation_is_flops_over_time_over_the_devices_peak(toy, tmp_path):
    sft.main(config(toy, tmp_path / 'a', steps=2, peak_tflops=0.5))
    last = metrics(tmp_path / 'a')[-1]
    assert last['mfu'] == pytest.approx(last['flops'] / last['seconds'] / 0.5e12)
    assert last['memory_gib'] > 0 and 'memory_plan_gib' not in last      # --plan says it


@pytest.mark.parametrize('changes, said', [
    ({'row_len': 16}, 'tokens do not fit row_len=16'),
    ({'tokenizer': None}, 'set init_from'),
    ({'data': ['nowhere.jsonl']}, 'nowhere.jsonl'),
])
def test_what_cannot_run_is_refused(toy, tmp_path, changes, said):
    with pytest.raises((ValueError, OSError)) as error:
        sft.main(config(toy, tmp_path / 'a', **changes))
    assert said in str(error.value)


def test_a_batch_that_the_ranks_cannot_share_names_its_key(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, 'start_processes', lambda cfg: (torch.device('cpu'), 0, 3))
    with pytest.raises(ValueError, match='batch_rows=4 does not divide into 3 ranks'):
        sft.main(config(toy, tmp_path / 'a'))


def test_a_malformed_row_is_named(toy, tmp_path):
    rows = (toy / 'corpus.jsonl').read_text().splitlines()
    rows[6] = '{"messages": []}'
    (tmp_path / 'bad.jsonl').write_text('\n'.join(rows))
    with pytest.raises(ValueError, match='bad.jsonl:7'):
        sft.main(config(toy, tmp_path / 'a', data=[str(tmp_path / 'bad.jsonl')]))


# ---- chat templates

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
FORGETFUL = CHATML.replace('m.content', "(m.content.split('</think>') | last)")  # in its history
TODAY = "{{ strftime_now('%d %B %Y') }}" + CHATML
SMALL = dict(model_type='qwen2', num_hidden_layers=1, hidden_size=32, num_attention_heads=2,
             num_key_value_heads=2, intermediate_size=48, max_position_embeddings=256)


def base_tokenizer(folder, template=CHATML):
    """As a base model's folder has it: generation_config.json does not know the template's end."""
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<think>', '</think>', '<answer>',
               '</answer>']
    tokenizer = Tokenizer.from_words(['assistant', 'user'], special, 'qwen2', template,
                                     eos='<|endoftext|>')
    tokenizer.save_pretrained(folder)
    ends = tokenizer.special_tokens['<|endoftext|>']
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': ends}))
    return str(folder)


def chat_rows(path, *chats):
    """Each chat: what user and assistant say in turn."""
    with open(path, 'w') as f:
        for chat in chats:
            turns = [{'role': role, 'content': text}
                     for role, text in zip(itertools.cycle(('user', 'assistant')), chat)]
            f.write(json.dumps({'messages': turns}) + '\n')
    return [str(path)]


def test_a_fine_tuned_base_stops_where_its_training_ended(toy, tmp_path):
    tokenizer = base_tokenizer(tmp_path / 't')
    data = chat_rows(tmp_path / 'rows.jsonl', ['hi', '<answer>ok</answer>'])
    sft.main(config(toy, tmp_path / 'a', tokenizer=tokenizer, data=data, model=SMALL, row_len=32,
                    loss_on='assistant', steps=40, muon_learning_rate=0.0, learning_rate=1e-2,
                    save_every=0))
    exported = json.loads((tmp_path / 'a' / 'generation_config.json').read_text())['eos_token_id']
    special = Tokenizer.from_pretrained(tokenizer).special_tokens
    assert set(exported) == {special['<|endoftext|>'], special['<|im_end|>']}
    problem = {'prompt': 'hi', 'task': 'match', 'answer': 'ok'}
    (tmp_path / 'p.jsonl').write_text(json.dumps(problem) + '\n')
    (numbers,) = evaluate.main(evaluate.Config(
        checkpoint=str(tmp_path / 'a'), data=[str(tmp_path / 'p.jsonl')], n=4, max_new_tokens=8,
        out=str(tmp_path / 'kept.jsonl'), keep={'accuracy': 1.0}, greedy=False, temperature=0.2,
    )).values()
    assert (numbers['truncated'], numbers['pass1'], numbers['length']) == (0.0, 1.0, 5.0)
    rows = [json.loads(line) for line in (tmp_path / 'kept.jsonl').read_text().splitlines()]
    assert rows[0]['messages'][-1] == {'role': 'assistant', 'content': '<answer>ok</answer>'}


def test_turns_without_loss_are_counted_and_refused_where_they_are_most(toy, tmp_path, capsys):
    def trained(name, *chats, template=FORGETFUL, **changes):
        data = chat_rows(tmp_path / f'{name}.jsonl', *chats)
        changes = {'loss_on': 'assistant', 'row_len': 128, **changes}
        tokenizer = Tokenizer.from_pretrained(base_tokenizer(tmp_path / name, template))
        docs = sft.tokenise(config(toy, tmp_path / 'out', data=data, **changes), tokenizer)
        return len(docs), capsys.readouterr().err

    plain = ['q', 'a']
    reasoned = ['a', '<think>x</think>one', 'b', '<think>y</think>two']
    longer = [*reasoned[:2], *reasoned]
    assert trained('half', plain, reasoned) == (2, (
        '1 of 3 assistant turns carry no loss, because the chat template drops their reasoning '
        'from the history (1)\n'))
    assert trained('none', plain, ['q', ' a\n', 'r', 'b ']) == (2, '')
    said = r'2 of 3 assistant turns carry no loss.*\(2\).*skip_turns=True'
    with pytest.raises(ValueError, match=said):
        trained('most', longer)
    rows, printed = trained('skipped', longer, skip_turns=True)
    assert rows == 1 and printed.startswith('2 of 3 assistant turns carry no loss')
    rows, printed = trained('unfinished', plain, plain, [*reasoned[:2], 'b'])
    assert rows == 2 and printed.endswith('(1)\n1 rows have no other turn and are left out\n')
    with pytest.raises(ValueError, match="mute.jsonl, row 2: no turn of the assistant's"):
        trained('mute', plain, ['q'])
    assert trained('all', longer, ['q'], loss_on='all') == (2, '')
    refusing = CHATML + "{{ raise_exception('no c') if messages[0].content == 'c' }}"
    with pytest.raises(ValueError, match='broken.jsonl, row 2: .*fails: no c'):
        trained('broken', plain, ['c', 'a'], template=refusing)
    _, printed = trained('endless', plain, template=CHATML.replace('<|im_end|>', ''))
    assert 'the model does not learn to stop' in printed


class AnotherDay(datetime):
    @classmethod
    def now(cls):
        return cls(2031, 2, 3)


def test_a_run_resumed_on_another_day_keeps_the_date_of_its_start(toy, tmp_path, monkeypatch):
    data = chat_rows(tmp_path / 'r.jsonl', *([f'q{i}', f'a{i}'] for i in range(9)))
    settings = dict(tokenizer=base_tokenizer(tmp_path / 't', TODAY), data=data, model=SMALL,
                    row_len=96)
    sft.main(config(toy, tmp_path / 'whole', **settings))
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(sft.Stop, 'wanted', lambda self, device: next(calls) >= 2)
        with pytest.raises(SystemExit):
            sft.main(config(toy, tmp_path / 'cut', **settings))
    monkeypatch.setattr(checkpoint, 'datetime', AnotherDay)
    sft.main(config(toy, tmp_path / 'cut', **settings))
    same(metrics(tmp_path / 'cut'), metrics(tmp_path / 'whole'))
    new = config(toy, tmp_path / 'new', **settings)
    docs = sft.tokenise(new, sft.load_model(new, 'cpu')[1])
    assert docs[0][0][:4].tolist() == list(b'03 F')   # a run that begins then has its date
