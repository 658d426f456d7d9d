"""preference.py: the loss in closed form, scores against a batch of one, training, resumption and
the reward on a tiny model."""
import json
import math
import os
import random
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

import checkpoint
import grpo
import preference
import rewards
import sft
from data import pairs as pairs_script
from data import tokenizer as data_tokenizer
from data.countdown import prepare
from data.tokenizer import TOY_TEMPLATE, Tokenizer
from judge import Judge, RewardModel, conversation, load_judges, padded
from model import ModelConfig, Transformer
from preference import accuracy, judge_pairs, read_pairs

TINY = dict(model_type='qwen2', num_hidden_layers=2, hidden_size=32, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, intermediate_size=64, max_position_embeddings=136)


def write_rows(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def turn(prompt, answer):
    """A conversation of one turn each."""
    return [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': answer}]


def pair(rng):
    """The answer that names an 8 is preferred; the reasoning says nothing about it."""
    digits = [rng.choice('1234567') for _ in range(5)]
    good = digits.copy()
    good[rng.randrange(5)] = '8'
    thought = ' '.join(rng.choice('123456789') for _ in range(6))
    prompt = f'{rng.randrange(1, 9)} {rng.randrange(1, 9)}'
    chosen = f'<think>{thought}</think> ' + ' '.join(good)
    rejected = f'<think>{thought}</think> ' + ' '.join(digits)
    return {'chosen': turn(prompt, chosen), 'rejected': turn(prompt, rejected)}


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pairs')
    prepare.main(prepare.Config(out_dir=str(folder), corpus_rows=50, rl_rows=8, test_rows=8,
                                max_number=8))
    rng = random.Random(1)
    for name, n in (('pairs', 400), ('held_out', 100)):
        write_rows(folder / f'{name}.jsonl', [pair(rng) for _ in range(n)])
    return folder


def config(toy, out, **changes):
    settings = dict(
        out_dir=str(out), tokenizer=str(toy / 'tokenizer'), data=[str(toy / 'pairs.jsonl')],
        eval_data=[str(toy / 'held_out.jsonl')], model=TINY, row_len=96, batch_rows=16,
        micro_rows=8, steps=120, learning_rate=5e-3, warmup_steps=5, save_every=0, log_every=10,
        threads=1)
    return preference.Config(**{**settings, **changes})


@pytest.fixture(scope='module')
def trained(toy):
    preference.main(config(toy, toy / 'reward'))
    return toy / 'reward'


def metrics(folder):
    return read_lines(Path(folder) / 'metrics.jsonl')


def test_accuracy_and_loss_in_closed_form():
    chosen = torch.tensor([1.0, 0.0, 2.0, -3.0])
    rejected = torch.tensor([0.0, 0.0, 3.0, -5.0])
    right, interval, loss = accuracy(chosen, rejected)
    assert right == pytest.approx(2.5 / 4)
    losses = [math.log(1 + math.exp(b - a)) for a, b in [(1, 0), (0, 0), (2, 3), (-3, -5)]]
    assert loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert 0 <= interval[0] < right < interval[1] <= 1


def test_the_interval_is_over_prompts():
    chosen = torch.tensor([1.0] * 36 + [0.0] * 4)
    prompts = [str(i // 4) for i in range(40)]
    level = torch.full((40,), 0.5)
    right, interval, _ = accuracy(chosen, level, prompts)   # four alike pairs of each of ten
    assert right == 0.9 and interval == pytest.approx([0.5958, 0.9821], abs=0.02)   # Wilson: 9, 10
    assert accuracy(chosen, level)[1] == pytest.approx([0.7695, 0.9604], abs=4e-3)   # 36 of 40
    assert accuracy(level, chosen * 0, prompts)[1] == pytest.approx([0.7225, 1], abs=1e-3)  # 10, 10


def test_scores_do_not_depend_on_padding_and_start_as_the_language_model():
    torch.manual_seed(0)
    language_model = Transformer(ModelConfig.from_hub({'vocab_size': 40, **TINY}, 'test'))
    model = RewardModel.from_language_model(language_model)
    torch.nn.init.normal_(model.score.weight)
    docs = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [3]]
    together = model.scores(*padded(docs, 'cpu'))
    for doc, s in zip(docs, together):
        ids = torch.tensor([doc])
        h = language_model.hidden(ids, *language_model.context(ids))[0, -1]
        assert s.item() == pytest.approx((h @ model.score.weight[0]).item(), abs=1e-5)


def test_training_orders_pairs_it_has_not_seen(trained):
    lines = metrics(trained)
    held = [line for line in lines if 'eval_accuracy' in line]
    assert lines[0]['loss'] < 0.75      # log 2 = 0.693 at the start
    assert held[-1]['step'] == 120
    assert held[-1]['eval_accuracy'] > 0.95 and held[-1]['eval_accuracy_ci'][0] > 0.9
    about = json.loads((trained / 'preference.json').read_text())
    assert about['judged'] == 'summary' and about.keys() == {'judged', 'date'}


def test_a_run_in_two_parts_is_the_run_in_one(toy, tmp_path):
    preference.main(config(toy, tmp_path / 'whole', steps=4, schedule='constant', eval_data=[]))
    preference.main(config(toy, tmp_path / 'parts', steps=2, schedule='constant', eval_data=[],
                           save_every=2))
    (tmp_path / 'parts' / 'config.json').unlink()
    preference.main(config(toy, tmp_path / 'parts', steps=4, schedule='constant', eval_data=[]))
    whole = RewardModel.from_pretrained(tmp_path / 'whole').state_dict()
    parts = RewardModel.from_pretrained(tmp_path / 'parts').state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_resumed_on_another_day_keeps_the_date_of_its_start(toy, tmp_path, monkeypatch):
    class AnotherDay(datetime):
        @classmethod
        def now(cls):
            return cls(2031, 2, 3)
    (tmp_path / 'today.jinja').write_text("{{ strftime_now('%d %B') }}" + TOY_TEMPLATE)
    settings = dict(chat_template=str(tmp_path / 'today.jinja'), row_len=136, eval_data=[])
    preference.main(config(toy, tmp_path / 'a', steps=2, save_every=2, **settings))
    monkeypatch.setattr(data_tokenizer, 'datetime', AnotherDay)
    (tmp_path / 'a' / 'config.json').unlink()
    monkeypatch.setattr(checkpoint, 'datetime', AnotherDay)
    preference.main(config(toy, tmp_path / 'a', steps=3, **settings))  # "other pairs" else
    judge = Judge(tmp_path / 'a')                # and so has what asks the model on that day
    assert judge.tokenizer.date.isoformat() == checkpoint.began(tmp_path / 'a')
    assert judge.tokenizer.date.year < 2031


def test_reward(toy, trained):
    rewards.prepare({'accuracy': 1.0}, {'preference'},
                    judges=load_judges({'helpfulness': str(trained)}))
    held = read_lines(toy / 'held_out.jsonl')
    values = {}
    for side in ('chosen', 'rejected'):
        rows = [{'task': 'preference', 'prompt': r[side][:-1], 'prefill': '<think>'} for r in held]
        responses = [r[side][-1]['content'].removeprefix('<think>') for r in held]
        graded = rewards.grade(list(zip(responses, rows)), {'accuracy': 1.0})
        values[side] = [parts['accuracy'] for _, parts in graded]
    assert all(0 < v < 1 for side in values.values() for v in side)
    assert sum(a > b for a, b in zip(values['chosen'], values['rejected'])) > 95
    judge = Judge(trained)
    ids = conversation(judge.tokenizer, held[0]['chosen'], 'summary')
    score = judge.model.scores(torch.tensor([ids]), torch.tensor([len(ids) - 1]))
    assert values['chosen'][0] == pytest.approx(score.sigmoid().item(), abs=1e-6)
    mean = sum(values['chosen'] + values['rejected']) / 200
    assert 0.2 < mean < 0.8      # a typical answer is at one half


def test_a_sample_that_cannot_be_judged_scores_zero_and_the_others_do_not(toy, trained):
    rewards.prepare({'preference': 1.0}, (), judges=load_judges({'helpfulness': str(trained)}))
    good = ('1</think> 8 8', {'prompt': '1 2', 'prefill': '<think>'})
    before = rewards.FAILURES.total()
    nobody = ('8', {'prompt': '1', 'judge': 'nobody'})
    graded = rewards.grade([good, ('8', {}), good, nobody], {'preference': 1.0})
    assert graded[0] == graded[2] and graded[0][0] > 0 and graded[1][0] == graded[3][0] == 0
    assert rewards.FAILURES.total() == before + 2


def test_hacks_of_the_reward_model(toy, trained):
    """What is judged is the summary: promises in the reasoning are not read, and no summary is no
    reward."""
    rewards.prepare({'preference': 1.0}, (), judges=load_judges({'helpfulness': str(trained)}))
    row = {'prompt': '1 2', 'prefill': '<think>'}
    bad = rewards.preference_reward('1 2</think> 1 2 3 4 5', row)
    assert rewards.preference_reward('8 8 8 8 8</think> 1 2 3 4 5', row) == bad < 0.5
    assert rewards.preference_reward('8 8 8 8 8', row) == 0.0
    assert rewards.preference_reward('1</think> 1<think> 8</think> 8', row) == 0.0


def test_safety_judges_the_whole_response(toy):
    tokenizer = Tokenizer.from_pretrained(toy / 'tokenizer')
    a = turn('1', '<think>7</think> 5')
    b = turn('1', '<think>8</think> 5')
    assert conversation(tokenizer, a, 'summary') == conversation(tokenizer, b, 'summary')
    assert conversation(tokenizer, a, 'response') != conversation(tokenizer, b, 'response')


@pytest.mark.parametrize('row, message', [
    ({'chosen': [], 'rejected': []}, 'row 1.*chosen.*assistant'),
    ({'chosen': turn('1', '2')[:1], 'rejected': turn('1', '2')[:1]}, 'chosen.*assistant'),
    ({'chosen': turn('1', '2'), 'rejected': turn('2', '2')}, 'same conversation'),
    (dict.fromkeys(('chosen', 'rejected'), [{'role': 'system', 'content': '1'},
                                            {'role': 'assistant', 'content': '2'}]),
     'pairs.jsonl, row 1: the chat template fails'),
])
def test_rows_that_are_no_pairs(toy, tmp_path, row, message):
    (tmp_path / 'pairs.jsonl').write_text(json.dumps(row) + '\n')
    with pytest.raises(ValueError, match=message):
        tokenizer = Tokenizer.from_pretrained(toy / 'tokenizer')
        read_pairs(tmp_path / 'pairs.jsonl', tokenizer, 'summary', 96)


def test_a_run_without_its_reward_model_does_not_start(tmp_path):
    with pytest.raises(ValueError, match='reward model.*preference='):
        rewards.prepare({'accuracy': 1.0}, {'preference'})
    with pytest.raises(ValueError, match='python preference.py'):
        load_judges({'helpfulness': str(tmp_path)})


def test_reinforcement_learning_asks_the_reward_model(toy, trained, tmp_path):
    sft.main(sft.Config(
        out_dir=str(tmp_path / 'policy'), tokenizer=str(toy / 'tokenizer'), model=TINY, steps=1,
        data=[str(toy / 'corpus.jsonl')], loss_on='all', batch_rows=16, micro_rows=8,
        learning_rate=5e-3, warmup_steps=5, save_every=0, threads=1))
    problems = [{'prompt': f'{n} {n}', 'task': 'preference'} for n in range(1, 9)]
    write_rows(tmp_path / 'rl.jsonl', problems)
    before = rewards.FAILURES.total()
    grpo.main(grpo.Config(
        init_from=str(tmp_path / 'policy'), out_dir=str(tmp_path / 'rl'),
        data=[str(tmp_path / 'rl.jsonl')], rewards={'accuracy': 1.0},
        preference={'helpfulness': str(trained)}, steps=2, prompts=4, group=4, max_new_tokens=12,
        eval_every=0, save_every=0, threads=1, device='cpu'))
    lines = metrics(tmp_path / 'rl')
    assert len(lines) == 2 and all(0 < line['reward'] < 1 for line in lines)
    assert rewards.FAILURES.total() == before


def test_pairs_from_scored_samples(toy, tmp_path):
    samples = [{'response': f'<think>1</think> {text}', 'total': total}
               for text, total in [('a', 0.0), ('b', 1.0), ('c', 0.5), ('d', 1.0)]]
    rows = [{'prompt': f'{n}', 'samples': samples} for n in range(6)]
    rows.append({'prompt': 'all alike', 'samples': [{'response': 'a', 'total': 1.0}] * 4})
    write_rows(tmp_path / 'samples.jsonl', rows)
    given = dict(samples=[str(tmp_path / 'samples.jsonl')], tokenizer=str(toy / 'tokenizer'))
    pairs_script.main(pairs_script.Config(**given, out=str(tmp_path / 'pairs.jsonl'), held_out=2))
    kept = read_lines(tmp_path / 'pairs.jsonl')
    held_out = read_lines(tmp_path / 'pairs.held_out.jsonl')
    assert len(kept) == 4 and len(held_out) == 2
    for row in kept + held_out:
        assert row['chosen'][-1]['content'][-1] in 'bd'
        assert row['rejected'][-1]['content'][-1] == 'a'
        assert row['chosen'][:-1] == row['rejected'][:-1]
    prompts = {row['chosen'][0]['content'] for row in kept}
    assert prompts.isdisjoint(row['chosen'][0]['content'] for row in held_out)
    with pytest.raises(ValueError, match='7 prompts, 6 of them'):
        pairs_script.main(pairs_script.Config(**given, held_out=6))


def test_two_ranks_train_what_one_does(toy, tmp_path):
    given = config(toy, tmp_path, steps=6, log_every=1, schedule='constant')
    flags = [f'--{name}={value}' for name, value in vars(given).items() if name != 'out_dir']
    root = Path(preference.__file__).parent
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    for out, start in (('one', []), ('two', torchrun)):
        command = [sys.executable, *start, 'preference.py', *flags, f'--out_dir={tmp_path / out}']
        process = subprocess.run(command, cwd=root, env=environment, timeout=280,
                                 capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert 'returned a view' not in process.stderr, process.stderr
    for one, two in zip(metrics(tmp_path / 'one'), metrics(tmp_path / 'two'), strict=True):
        for name in one.keys() & {'loss', 'accuracy', 'grad_norm', 'eval_accuracy', 'eval_loss'}:
            assert one[name] == pytest.approx(two[name], rel=2e-3), name
    tokenizer = Tokenizer.from_pretrained(toy / 'tokenizer')
    pairs = read_pairs(str(toy / 'pairs.jsonl'), tokenizer, 'summary', 96)[:256]
    for out in ('one', 'two'):
        model = RewardModel.from_pretrained(tmp_path / out)
        scores = judge_pairs(model, pairs, torch.device('cpu'), 32)
        assert abs(scores.mean().item()) < 1e-4, out      # a typical answer scores 0


def test_pairs_too_long_are_named_or_dropped_and_a_finished_run_goes_on(toy, tmp_path, capsys):
    rows = (toy / 'pairs.jsonl').read_text().splitlines()[:40]
    long = json.loads(rows[0])
    long['rejected'][-1]['content'] += ' 8' * 100
    for name, kept in (('mixed', [rows[0], json.dumps(long), *rows[1:]]), ('short', rows)):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(kept) + '\n')
    flat = dict(schedule='constant', warmup_steps=0, log_every=1)

    def given(name, steps=2, **more):
        paths = [f'{tmp_path}/{name}.jsonl']
        more = {'data': paths, 'eval_data': paths, **flat, **more}
        return config(toy, tmp_path / name, steps=steps, **more)
    with pytest.raises(ValueError, match=r'mixed.jsonl, row 2: \d+ tokens do not fit row_len=96'):
        preference.main(given('mixed'))
    preference.main(given('mixed', long_rows='drop'))
    assert capsys.readouterr().err.count('1 of 41 rows are too long and dropped') == 2
    preference.main(given('short'))
    wanted = [line['loss'] for line in metrics(tmp_path / 'short') if 'loss' in line]
    assert [line['loss'] for line in metrics(tmp_path / 'mixed') if 'loss' in line] == wanted
    with pytest.raises(ValueError, match='holds the finished model of step 2: raise steps'):
        preference.main(given('short'))
    preference.main(given('short', steps=4))
    whole = config(toy, tmp_path / 'whole', steps=4, data=[f'{tmp_path}/short.jsonl'], **flat)
    preference.main(whole)
    short = (tmp_path / 'short' / 'model.safetensors').read_bytes()
    assert short == (tmp_path / 'whole' / 'model.safetensors').read_bytes()


def test_pairs_without_samples_or_a_tokenizer_say_what_to_set():
    for given in (pairs_script.Config(), pairs_script.Config(samples=['samples.jsonl'])):
        with pytest.raises(ValueError, match='set samples .* and tokenizer'):
            pairs_script.main(given)


def test_show_prints_both_answers_of_a_pair(toy, tmp_path, capsys):
    preference.main(config(toy, tmp_path / 'a', show=2))
    shown = capsys.readouterr().out
    for name in ('chosen', 'rejected'):
        assert shown.count(f'  {name}\n    ⟦<|user|>⟧') == 2
    assert shown.startswith(f'{toy}/pairs.jsonl, row 1: ') and not (tmp_path / 'a').exists()
