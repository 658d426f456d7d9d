"""A miniature of `make smol`: every stage with its own config and two steps, on a random Llama of
one layer with a tokenizer of SmolLM2's kind, killed once, through to the report."""
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

tokenizers = pytest.importorskip('tokenizers')

import evaluate
import grpo
import sft
from configurator import parse
from data.tokenizer import Tokenizer
from data.words import prepare
from model import ModelConfig, Transformer
from tools import report_smol as report

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    '{% for message in messages %}'
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = ('Ann', 'Ben', 'Cleo', 'Dan', 'Eve', 'Finn')
THINGS = ('apples', 'pens', 'coins', 'shells', 'cards', 'eggs', 'stones', 'maps', 'nuts', 'keys')
PLACES = ('on the table', 'in a red box', 'under his bed', 'at the market', 'by the old river')


def problems(count, offset):
    """Rows of the source's train.csv: texts that differ in more than numbers and names"""
    rows = ['Question,Numbers,Equation,Answer,Body,Ques']
    for i in range(offset, offset + count):
        name, thing, place = NAMES[i % 6], THINGS[i % 10], PLACES[i // 10 % 5]
        other = THINGS[(i // 3 + 1) % 10]
        a, b = 2 + i % 17, 3 + i % 11
        text = (f'{name} keeps number0 {thing} {place} with {other} {i // 50} . Later number1 more '
                f'{thing} come {PLACES[i % 5]} . How many {thing} are there ?')
        rows.append(f'"{text}",{a} {b},+ number0 number1,{a + b}.0,b,q')
    return '\n'.join(rows) + '\n'


def small_tokenizer(folder, texts):
    """SmolLM2's kind: digits one by one, GPT-2's pieces, bytes without a token"""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
        show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.save(str(folder / 'tokenizer.json'))
    config = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'chat_template': CHATML}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))


def made_source(folder):
    """The three files of the source, of made-up problems"""
    folder.mkdir()
    (folder / 'train.csv').write_text(problems(300, 0))
    svamp = []
    dev = ['Question,Numbers,Equation,Answer,Type,Variation Type,Body,Ques']
    for i in range(12):
        a, b = 9 + i, 2 + i % 5
        body = f'{NAMES[i % 6]} has {a} {THINGS[i % 10]} and gives away {b}'
        svamp.append({
            'ID': f'chal-{i + 1}', 'Body': body, 'Question': 'What is left?',
            'Equation': f'( {a}.0 - {b}.0 )', 'Answer': float(a - b), 'Type': 'Subtraction'})
        text = body.lower().replace(str(a), 'number0', 1).replace(f'away {b}', 'away number1')
        dev.append(f'{text} . what is left ?,{a} {b},- number0 number1,{a - b}.0,S,1,b,q')
    (folder / 'SVAMP.json').write_text(json.dumps(svamp))
    (folder / 'dev.csv').write_text('\n'.join(dev) + '\n')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The chain's commands in the order of config/smol/chain.mk; RL in a process that is killed
    after its first step."""
    folder = tmp_path_factory.mktemp('chain') / 'smol'
    model = folder / 'released'
    model.mkdir(parents=True)
    made_source(folder / 'source')
    patch = pytest.MonkeyPatch()
    patch.setenv('RUN', str(folder))
    patch.setenv('MODEL', str(model))
    patch.chdir(ROOT)

    def stage(script, names, *overrides):
        configs = [f'config/smol/{name}.py' for name in names.split()]
        script.main(parse(script.Config, [*configs, *overrides]))

    def sampled(names, of, *overrides):
        configs = [f'config/smol/{name}.py' for name in names.split()]
        evaluate.main(parse(evaluate.Config, [
            *configs, f'--checkpoint={of}', '--max_new_tokens=8', *overrides]))

    def tested(names, stage, of):
        (folder / stage).mkdir(exist_ok=True)
        sampled(names, of, f'--out={folder}/{stage}/eval.jsonl',
                f'--summary={folder}/{stage}/eval.json', '--limit=4')

    # data and the released model
    prepare.main(prepare.Config(source=str(folder / 'source'), out_dir=str(folder / 'data'),
                                cold_rows=20, test_rows=8))
    texts = [row['prompt'][0]['content'] for row in read_jsonl(folder / 'data' / 'rl.jsonl')]
    small_tokenizer(model, [*texts, '<think>5 + 4 = 9; 7</think><answer>63</answer> system user'])
    torch.manual_seed(1)
    size = Tokenizer.from_pretrained(model).vocab_size
    Transformer(ModelConfig(
        model_type='llama', vocab_size=size, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        max_position_embeddings=512, tie_word_embeddings=True)).save_pretrained(model)

    # the stages
    short = ['--steps=2', '--save_every=1']
    few = [*short, '--prompts=2', '--group=4', '--max_new_tokens=8', '--eval_rows=2',
           '--eval_every=1']
    tested('eval before', 'before', model)
    stage(sft, 'cold', *short)
    done = killed(folder / 'rl', ['grpo.py', 'config/smol/rl.py', *few, '--steps=500'])
    stage(grpo, 'rl', *few, f'--steps={done + 1}')
    sampled('samples', folder / 'rl', f'--out={folder}/rl/samples.jsonl', '--limit=4',
            "--keep={'accuracy': 0}")
    stage(sft, 'cold reject', *short)
    stage(grpo, 'rl final', *few)
    stage(grpo, 'rl control_zero', *few)
    stage(sft, 'cold control_sft', *short)
    for name in ('cold', 'rl', 'reject', 'final', 'control_sft'):
        tested('eval', name, folder / name)
    tested('eval eval_zero', 'control_zero', folder / 'control_zero')
    (folder / 'seconds.txt').write_text(f'{folder}/cold/config.json 100 112.5\n')
    report.main(report.Config(run=str(folder)))
    patch.undo()
    return folder


def killed(out, command):
    """Starts a training and kills it when a checkpoint is there -> the step of the newest"""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE,
                               text=True)
    ends = time.time() + 60
    while not (out / 'step_00000001').exists():
        assert process.poll() is None and time.time() < ends, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    return max(int(path.name[5:]) for path in out.glob('step_????????'))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_every_stage_trains_and_is_evaluated(run):
    for stage in ('cold', 'rl', 'reject', 'final', 'control_zero', 'control_sft'):
        assert (run / stage / 'config.json').exists()
        steps = [m['step'] for m in read_jsonl(run / stage / 'metrics.jsonl') if 'flops' in m]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 2
    for stage in ('before', 'cold', 'rl', 'reject', 'final', 'control_zero', 'control_sft'):
        [numbers] = read_jsonl(run / stage / 'eval.json')
        assert {Path(path).name for path in numbers} == {'test.jsonl', 'svamp.jsonl'}
        assert all(n['problems'] == 4 and 0 <= n['pass1'] <= 1 for n in numbers.values())


def test_the_killed_stage_went_on(run):
    lines = read_jsonl(run / 'rl' / 'metrics.jsonl')
    assert [m['step'] for m in lines if 'eval_pass1' in m] == sorted(
        {m['step'] for m in lines if 'eval_pass1' in m})


def test_the_report_has_every_stage(run):
    got = json.loads((run / 'report.json').read_text())
    stages = ['before', 'cold', 'rl', 'reject', 'final', 'control_zero', 'control_sft']
    assert list(got['stages']) == stages
    text = (run / 'report.md').read_text()
    for stage in stages:
        assert re.search(rf'^\| {stage} \|', text, re.M)


def test_the_result_loads_in_transformers_with_equal_logits_and_ids(run):
    transformers = pytest.importorskip('transformers')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / 'final').eval()
    text = 'Ann has 12 apples. <think>12 + 5 = 17</think>'
    ids = Tokenizer.from_pretrained(run / 'final').encode(text)
    their_ids = transformers.AutoTokenizer.from_pretrained(run / 'final').encode(text)
    assert ids == their_ids
    with torch.no_grad():
        ours = Transformer.from_pretrained(run / 'final')(torch.tensor([ids]))
        assert torch.allclose(theirs(torch.tensor([ids])).logits.float(), ours, atol=2e-4)


def made(folder, *targets):
    """What make would run, and for what target"""
    if not shutil.which('make'):
        pytest.skip('no make')
    told = subprocess.run(
        ['make', '-n', '-f', 'config/smol/chain.mk', f'RUN={folder}', *map(str, targets)], cwd=ROOT,
        check=True, capture_output=True, text=True).stdout
    return re.findall(r'echo "(\S+) \$start', told)


def test_make_runs_the_stages_in_order_and_skips_what_is_done(run, tmp_path):
    folder = tmp_path / 'new'
    targets = made(folder, folder / 'report.json')
    stages = [t.removeprefix(f'{folder}/') for t in targets]
    trained = [s for s in stages if s.endswith('config.json')]
    assert trained == [f'{s}/config.json' for s in ('cold', 'rl', 'reject', 'final')]
    assert len(stages) == 4 + 5 + 2        # trainings, evaluations, data and samples
    assert stages[0] == 'data/test.jsonl' and stages.index('rl/samples.jsonl') < stages.index(
        'reject/config.json')
    assert set(made(folder, 'smol')) == set(targets)      # and what runs two at a time lacks none
    assert made(run, 'smol') == []


def test_make_refuses_another_model_in_the_same_run(tmp_path):
    (tmp_path / 'model.txt').write_text('one\n')
    told = subprocess.run(['make', '-f', 'config/smol/chain.mk', f'RUN={tmp_path}', 'MODEL=other',
                           'model'], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode and 'MODEL=one, not other' in told.stdout
