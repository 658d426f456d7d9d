"""data/tokenizer.py: ids equal to those of the tokenizers library, files both ways, chat rows and
their masks."""
import base64
import json
import pickle
import random
import re
import shutil
import sys
from datetime import datetime
from pathlib import Path

import pytest
import tiktoken

from data import bpe
from data.bpe import PATTERNS
from data.countdown.prepare import toy_tokenizer
from data.tokenizer import R1_ZERO_TEMPLATE, TAGS, TOY_TEMPLATE, Tokenizer

SHARED = Path(__file__).resolve().parents[1].parent / 'shared' / 'tokenizers'
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason='no shared files')

# The pre-tokenizers as the hub's tokenizer.json files write them (DeepSeek's with the characters CR
# and LF themselves).
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
HAN = '[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]'
HAN_LOW = '[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]'
SPLITS = {
    'gpt2': [],
    'qwen2': [WORD + REST],
    'llama3': [WORD + '{1,3}' + REST],
    'deepseek-v3': [
        r'\p{N}{1,3}',
        '[一-龥぀-ゟ゠-ヿ]+',
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
        "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
    'kimi': [
        r'[\p{Han}]+'
        + '|' + HAN + '*' + HAN_LOW + "+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        + '|' + HAN + '+' + HAN_LOW + "*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        + r'|\p{N}{1,3}' + REST],
}
# Classes of text that the patterns tell apart, with traps for NFC (combining marks) and unassigned
# characters.
PARTS = [
    'a', 'b', 'B', 'the', 'THE', " don't", "I'LL", "'s", "'ſ",
    'é', 'e\u0301', '\u0301', '\u0338', 'Å', '\u212b', 'ﬁ', 'ß',
    '1', '12', '345', '6789', '½', 'Ⅷ', '٣',
    ' ', '  ', '   ', '\n', '\n\n', '\r\n', '\t', '\u00a0', '\u3000', '\u2028', '\x85',
    '!', '?!', '...', '(', '#include', '->', '=', '+', '_', '/*', '$x', '°', '€', '«',
    '，', '。', '・', '゠', '゛', '゜', 'ー',
    '漢字', '中', '一', '龥', '㐀', '々', '〇', 'カナ', 'あ',
    '\u3099', '\u3040', '\u3097',
    '한국', '\u1100\u1161', 'ไทย', 'हिन्दी', 'العربية', 'Ελ', 'Ж',
    '🙂', '👩\u200d👩', '\u200b', '\u200d', '\ufeff',
    '\ue000', '\u0378', '\U00020000', '\U0001e900', '\x00', '\x01',
    'def f(x):\n    return x', '<think>', '</think>', '<|end|>', '<s>', '<|', '|>', '<',
    '\ufdd0', '\ufdd1',
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    texts = [''.join(rng.choices(PARTS, k=rng.randint(0, 12))) for _ in range(count)]

    def character():
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x30000)]))
    for _ in range(count // 4):
        texts.append(''.join(character() for _ in range(rng.randint(1, 8))))
    return texts


def hub_tokenizer(name: str, nfc: bool, added: dict[str, bool], first: tuple[str, ...] = ()):
    """A small BPE, trained across all boundaries so that a piece cut elsewhere shows, with a hub
    pre-tokenizer. `first` have the lowest ids; `added` follow the table, text -> whether it is
    matched after normalisation."""
    tokenizers = pytest.importorskip('tokenizers')
    pre = tokenizers.pre_tokenizers
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False,
        max_token_length=8, special_tokens=[*first])
    texts = random_texts(1500, seed=7)
    tok.train_from_iterator((re.sub(r'<think|<\|end\|>|<s>', '', text) for text in texts), trainer)
    splits = [pre.Split(tokenizers.Regex(regex), 'isolated') for regex in SPLITS[name]]
    level = pre.ByteLevel(add_prefix_space=False, use_regex=not splits)
    tok.pre_tokenizer = pre.Sequence([*splits, level])
    tok.decoder = tokenizers.decoders.ByteLevel()
    if nfc:
        tok.normalizer = tokenizers.normalizers.NFC()
    tok.add_tokens([tokenizers.AddedToken(text, normalized=flag) for text, flag in added.items()])
    return tok


def write_json(path: Path, **data) -> None:
    path.write_text(json.dumps(data), encoding='utf-8')


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def toy(**options) -> Tokenizer:
    words = [str(i) for i in range(100)] + ['plus', ' plus', '<think>', '</think>']
    return Tokenizer.from_words(words, ['<|user|>', '<|assistant|>', '<|end|>'], **options)


def same(a: Tokenizer, b: Tokenizer) -> bool:
    names = ('special_tokens', 'chat_template', 'vocab_size', 'bos_id', 'eos_id', 'stop_ids')
    return (all(getattr(a, name) == getattr(b, name) for name in names)
            and a.encoding.tokenizer_json() == b.encoding.tokenizer_json())


# ---- The toy ----


def test_toy_words_are_single_tokens():
    tok = toy()
    pieces = [tok.decode([i]) for i in tok.encode('<think>12 plus 312plus')]
    assert pieces == ['<think>', '12', ' plus', ' ', '31', '2', 'plus']
    assert tok.encode('é') == list('é'.encode())
    assert tok.vocab_size == 256 + 90 + 4 + 3
    end = tok.special_tokens['<|end|>']
    assert (tok.bos_id, tok.eos_id, tok.stop_ids) == (None, end, [end])


@pytest.mark.parametrize('pattern', [None, *PATTERNS])
def test_from_words_is_read_back_and_equals_the_tokenizers_library(tmp_path, pattern):
    tokenizers = pytest.importorskip('tokenizers')
    words = [str(i) for i in range(100)]
    words += ['plus', ' plus', ' the', 'the', '漢字', 'a.b|c*', '\n\n', 'e\u0301', '[x]\\']
    tok = Tokenizer.from_words(words, ['<|user|>', '<|end|>'], pattern, stop=['<|user|>'])
    tok.save_pretrained(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    assert same(tok, Tokenizer.from_pretrained(tmp_path))
    for text in random_texts(1000) + ['plus 12 plus the', 'a.b|c*[x]\\' * 3]:
        ids = tok.encode_with_specials(text)
        assert ids == reference.encode(text).ids, ascii(text)
        assert tok.decode(ids) == text, ascii(text)
        assert reference.decode(ids, skip_special_tokens=False) == text, ascii(text)


def test_ids_that_stand_for_no_token_are_known(tmp_path):
    # 256 bytes, two words, one control token
    tok = Tokenizer.from_words(['ab', 'cd'], ['<|end|>'])
    assert tok.ids_without_token(259) == [] and tok.ids_without_token(262) == [259, 260, 261]
    tok.save_pretrained(tmp_path)
    path = tmp_path / 'tokenizer.json'
    spec = json.loads(path.read_text())
    spec['added_tokens'].append({**spec['added_tokens'][0], 'id': 300, 'content': '<|far|>'})
    path.write_text(json.dumps(spec))
    config = tmp_path / 'generation_config.json'
    config.write_text(json.dumps({'eos_token_id': [258, 299]}))     # an end, though without a text
    tok = Tokenizer.from_pretrained(tmp_path)
    assert tok.ids_without_token(303) == [*range(259, 299), 301, 302]


def test_from_words_refuses_bad_words():
    for words, message in ((['ab', 'ab'], 'twice'), ([''], 'empty')):
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_words(words, ['<|end|>'])
    with pytest.raises(ValueError, match="unknown pattern 'bert'"):
        Tokenizer.from_words(['ab'], ['<|end|>'], pattern='bert')
    with pytest.raises(ValueError, match="'<|eos|>'.*not in the vocabulary"):
        Tokenizer.from_words(['ab'], ['<|end|>'], eos='<|eos|>')
    with pytest.raises(ValueError, match='share an id or a text'):
        Tokenizer.from_words(['ab'], ['<|end|>', '<|end|>'])


# ---- Exactness ----


@pytest.mark.parametrize('name', SPLITS)
@pytest.mark.parametrize('nfc', [False, True])
def test_ids_equal_those_of_the_tokenizers_library(tmp_path, name, nfc):
    tokenizers = pytest.importorskip('tokenizers')
    added = {'<think>': False, '<think': False, '<|end|>': True, 'ab中': False}
    reference = hub_tokenizer(name, nfc, added, ('<s>',))
    reference.save(str(tmp_path / 'tokenizer.json'))
    tok = Tokenizer.from_pretrained(tmp_path)
    tok.save_pretrained(tmp_path / 'saved')
    assert same(tok, Tokenizer.from_pretrained(tmp_path / 'saved'))
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / 'saved' / 'tokenizer.json'))
    assert tok.vocab_size == reference.get_vocab_size()
    for text in random_texts(2500, seed=1):
        expected = reference.encode(text).ids
        assert tok.encode_with_specials(text) == expected, ascii(text)
        assert not set(tok.encode(text)) & set(tok.special_tokens.values()), ascii(text)
        assert saved.encode(text).ids == expected, ascii(text)
        decoded = reference.decode(expected, skip_special_tokens=False)
        assert tok.decode(expected) == decoded, ascii(text)


def test_merges_of_any_table_equal_those_of_the_tokenizers_library(tmp_path):
    """Tables that no training made: long words, words that merging never makes, merges through
    tokens of higher id."""
    tokenizers = pytest.importorskip('tokenizers')
    rng = random.Random(3)
    for _ in range(40):
        count = rng.randint(3, 60)
        words = {''.join(rng.choices('abc', k=rng.randint(2, 6))) for _ in range(count)}
        tok = Tokenizer.from_words(rng.sample(sorted(words), len(words)), ['<|end|>'], 'gpt2')
        tok.save_pretrained(tmp_path)
        reference = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
        assert same(tok, Tokenizer.from_pretrained(tmp_path))
        for _ in range(200):
            text = ''.join(rng.choices('abc', k=rng.randint(1, 25)))
            assert tok.encode(text) == reference.encode(text).ids


def test_tables_of_other_layouts(tmp_path):
    """The same small BPE as vocab.json + merges.txt and as tiktoken tables gives the ids of the
    tokenizers library."""
    pytest.importorskip('tokenizers')
    texts = random_texts(500, seed=2)
    for file, name, nfc, cls in (
        ('merges.txt', 'qwen2', True, 'Qwen2Tokenizer'),
        ('merges.txt', 'gpt2', False, 'GPT2Tokenizer'),
        ('tiktoken.model', 'kimi', False, 'TikTokenTokenizer'),
        ('qwen.tiktoken', 'qwen2', True, 'QWenTokenizer'),
        ('tokenizer.model', 'llama3', False, None),
    ):
        reference = hub_tokenizer(name, nfc, {})
        model = json.loads(reference.to_str())['model']
        folder = tmp_path / (file + name)
        folder.mkdir()
        size = len(model['vocab'])
        renamed = {'content': '<|renamed|>', 'lstrip': False, 'rstrip': False,
                   'single_word': False, 'normalized': False, 'special': True}
        config = {'added_tokens_decoder': {size + 3: renamed}}
        if cls:
            config['tokenizer_class'] = cls
        write_json(folder / 'tokenizer_config.json', **config)
        if file == 'merges.txt':
            write_json(folder / 'vocab.json', **model['vocab'])
            lines = [m if isinstance(m, str) else ' '.join(m) for m in model['merges']]
            text = '\n'.join(['#version: 0.2', *lines, ''])
            (folder / file).write_text(text, encoding='utf-8')
        else:
            write_table(folder / file, model['vocab'])
        tok = Tokenizer.from_pretrained(folder)
        assert tok.special_tokens['<|renamed|>'] == size + 3
        assert size + 3 not in tok.encode('<|renamed|>')
        for text in texts:
            assert tok.encode(text) == reference.encode(text).ids, (file, ascii(text))


def write_table(path: Path, vocab: dict[str, int]) -> None:
    """A table of tiktoken's: a line of base64 and rank for each token."""
    alphabet = byte_alphabet()
    rows = []
    for text, i in vocab.items():
        token = bytes(alphabet[c] for c in text)
        rows.append(base64.b64encode(token) + b' %d' % i)
    path.write_bytes(b'\n'.join(rows) + b'\n')


def byte_alphabet() -> dict[str, int]:
    """character -> byte: visible Latin-1 stands for itself, the other bytes, in order, are U+0100,
    U+0101, ..."""
    from tokenizers import pre_tokenizers
    chars = set(pre_tokenizers.ByteLevel.alphabet())
    others = [b for b in range(256) if chr(b) not in chars]
    return {c: ord(c) if ord(c) < 256 else others[ord(c) - 256] for c in chars}


@needs_shared
def test_shared_vectors(tmp_path):
    for name in ('vocab.json', 'merges.txt'):
        shutil.copyfile(SHARED / 'qwen2' / name, tmp_path / name)
    config = SHARED / 'qwen2' / 'qwen3_tokenizer_config.json'
    shutil.copyfile(config, tmp_path / 'tokenizer_config.json')
    for folder, vectors, eos in ((tmp_path, 'qwen2/qwen3', '<|im_end|>'),
                                 (SHARED / 'minimind', 'minimind/minimind', '<|im_end|>'),
                                 (SHARED / 'llama3', 'llama3/llama3', '<|end_of_text|>')):
        tok = Tokenizer.from_pretrained(folder)
        assert tok.decode([tok.eos_id]) == eos
        rows = read_jsonl(SHARED / f'{vectors}_vectors.jsonl')
        wrong = [row['text'] for row in rows if tok.encode_with_specials(row['text']) != row['ids']]
        assert len(rows) > 500 and not wrong, (vectors, len(wrong), ascii(wrong[:3]))


@needs_shared
def test_shared_deepseek_pieces():
    """Without DeepSeek's table: one in which every expected piece is a token shows where tiktoken
    cuts."""
    rows = read_jsonl(SHARED / 'deepseek' / 'deepseek_v3_vectors.jsonl')
    pieces = [bytes([b]) for b in range(256)]
    for row in rows:
        pieces += [piece.encode() for piece in row['pieces']]
    ranks = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    encoding = tiktoken.Encoding('pieces', pat_str=PATTERNS['deepseek-v3'][1], special_tokens={},
                                 mergeable_ranks=ranks)
    for row in rows:
        ids = encoding.encode_ordinary(row['text'])
        assert [encoding.decode_single_token_bytes(i).decode() for i in ids] == row['pieces']


# ---- Kinds that the tokenizers library encodes ----


def trained(steps: dict, alphabet: list[str], texts: list[str], first: list[str], size=900) -> dict:
    """The model of a small BPE, trained on texts of which `steps` are the normalizer and the
    pre-tokenizer; `alphabet` alone are its characters, `first` have the lowest ids."""
    tokenizers = pytest.importorskip('tokenizers')
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.normalizer = steps.get('normalizer') or tokenizers.normalizers.Sequence([])
    if steps.get('pre_tokenizer'):
        tok.pre_tokenizer = steps['pre_tokenizer']
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, limit_alphabet=len(alphabet),
        show_progress=False, special_tokens=first, max_token_length=12)
    tok.train_from_iterator(texts, trainer)
    return json.loads(tok.to_str())['model']


def tokenizer_of(kind: str):
    """A small tokenizer of the structure that a family's tokenizer.json has."""
    tokenizers = pytest.importorskip('tokenizers')
    normalizers, pre, decoders = (getattr(tokenizers, name) for name in (
        'normalizers', 'pre_tokenizers', 'decoders'))
    texts = random_texts(1500, seed=7) + ['</s> <h1> [INST] x <s>', '   a \n\n\n b'] * 50
    added = {text: {} for text in ('<unk>', '<s>', '</s>')}
    visible = pre.ByteLevel.alphabet()

    level = {'pre_tokenizer': pre.ByteLevel(add_prefix_space=False)}
    spaced = {'normalizer': normalizers.Replace(' ', '▁')}
    words = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    one_less = decoders.Sequence([*words, decoders.Strip(' ', 1, 0)])
    if kind == 'smollm2':   # digits one by one, bytes without a token
        absent = (0x00, 0x8b, 0xae, 0xed, 0xf0, 0xff)
        visible = [c for c, b in byte_alphabet().items() if b not in absent]
        steps = {'pre_tokenizer': pre.Sequence([pre.Digits(True), level['pre_tokenizer']])}
        added = {text: {} for text in ('<|endoftext|>', '<|im_start|>', '<|im_end|>')}
    elif kind == 'olmo':    # GPT-NeoX's: runs of spaces that are added, after normalisation
        steps = {'normalizer': normalizers.NFC(), **level}
        added = {'<|endoftext|>': {}, '<|padding|>': {}}
        for text in ('|||EMAIL|||', '  ', '   ', '    ', '\u00e9\u0301'):
            added[text] = {'special': False, 'normalized': True}
    elif kind == 'prefix':  # as the first RoBERTa-like ones
        steps = {'pre_tokenizer': pre.ByteLevel(add_prefix_space=True)}
        added |= {'<mask>': {'lstrip': True}, '<|end|>': {'rstrip': True}}
    elif kind == 'mistral':
        steps = {'pre_tokenizer': pre.Metaspace(prepend_scheme='first', split=False)}
        added |= {'[INST]': {}, '[/INST]': {}}
    elif kind == 'llama2':  # and Phi-3's tokens
        both = [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
        steps = {'normalizer': normalizers.Sequence(both)}
        added |= {'<|end|>': {'rstrip': True}, '<|sys|>': {'normalized': True}}
    elif kind == 'always':
        steps = {'pre_tokenizer': pre.Metaspace()}
        added |= {'<|end|>': {'normalized': True}}
        one_less = decoders.Metaspace()
    elif kind == 'gemma':
        steps = {**spaced, 'pre_tokenizer': pre.Split(' ', 'merged_with_previous')}
        added |= {text: {'special': False} for text in ('\n', '\n\n', '▁▁', '▁▁▁', '<h1>')}
        one_less = decoders.Sequence(words)

    in_bytes = kind in ('smollm2', 'olmo', 'prefix')
    first = [text for text in added if kind != 'olmo' or text.startswith('<')]
    if in_bytes:
        model = trained(steps, visible, texts, first)
    else:
        first += [f'<0x{b:02X}>' for b in range(256)]
        common = sorted({c for part in PARTS[:60] for c in part} - {' '}) + ['▁']
        by_spaces = {'pre_tokenizer': pre.Split('▁', 'merged_with_next'), **spaced}
        model = trained(by_spaces, common, texts, first)
        model |= {'byte_fallback': True, 'fuse_unk': True, 'unk_token': '<unk>'}
    ids = model['vocab'] | {text: len(model['vocab']) + i for i, text in
                            enumerate(text for text in added if text not in model['vocab'])}
    plain = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
             'special': True}
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    for key, step in steps.items():
        setattr(tok, key, step)
    tok.decoder = decoders.ByteLevel() if in_bytes else one_less
    spec = json.loads(tok.to_str()) | {'model': model}
    spec['added_tokens'] = [{'id': ids[text], 'content': text, **plain, **flags}
                            for text, flags in added.items()]
    spec['added_tokens'].sort(key=lambda t: t['id'])
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


KINDS = ['smollm2', 'olmo', 'prefix', 'mistral', 'llama2', 'always', 'gemma']


def texts_of_kind(reference, count: int) -> list[str]:
    """Random texts with added tokens, whole and in part, between spaces."""
    rng = random.Random(count)
    added = [t.content for t in reference.get_added_tokens_decoder().values()]
    parts = [*PARTS, *added, *added, *added, ' ', '▁', '</s', 's>', '[INST', '<|en']
    own = [''.join(rng.choices(parts, k=rng.randint(1, 10))) for _ in range(count)]
    return ['', ' ', '▁', *added, *own, *random_texts(count, seed=1)]


@pytest.mark.parametrize('kind', KINDS)
def test_ids_of_kinds_equal_those_of_the_tokenizers_library(tmp_path, kind):
    transformers = pytest.importorskip('transformers')
    reference = tokenizer_of(kind)
    reference.save(str(tmp_path / 'tokenizer.json'))
    tok = Tokenizer.from_pretrained(tmp_path)
    tok.save_pretrained(tmp_path / 'saved')
    again = Tokenizer.from_pretrained(tmp_path / 'saved')
    assert same(tok, again) and tok.fingerprint() == again.fingerprint()
    if kind != 'olmo':   # tiktoken's
        whole = (tmp_path / 'tokenizer.json').read_bytes()
        assert (tmp_path / 'saved' / 'tokenizer.json').read_bytes() == whole
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'saved')
    unpickled = pickle.loads(pickle.dumps(tok))
    special = set(tok.special_tokens.values()) - {tok.special_tokens.get('<unk>')}
    for text in texts_of_kind(reference, 1000):
        expected = reference.encode(text, add_special_tokens=False).ids
        assert tok.encode_with_specials(text) == expected, ascii(text)
        assert unpickled.encode_with_specials(text) == expected, ascii(text)
        assert theirs(text, add_special_tokens=False).input_ids == expected, ascii(text)
        shown = reference.decode(expected, skip_special_tokens=False)
        assert tok.decode(expected) == shown, ascii(text)
        stream = tok.stream()
        assert ''.join(map(stream.add, expected)) + stream.flush() == shown, ascii(text)
        assert theirs.decode(expected) == shown, ascii(text)

        ids = tok.encode(text)
        assert not set(ids) & special, ascii(text)
        if not any(t in text for t in tok.special_tokens):
            assert ids == expected, ascii(text)
        elif kind in ('mistral', 'llama2', 'gemma'):   # which have all bytes
            begins = (' ', '▁') if kind == 'mistral' else ()
            shown = text[text.startswith(begins):].replace('▁', ' ')
            assert tok.decode(ids) == shown, ascii(text)


INST = ("{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + '</s>' }}{% endif %}"
        "{% endfor %}")


@pytest.mark.parametrize('kind', ['prefix', 'mistral', 'llama2', 'always', 'gemma'])
def test_what_the_assistant_writes_goes_on_from_the_prompt(tmp_path, kind):
    """No space is put before it, though there is one before a text; what a sample is trained as
    equals what was sampled, and no text of a message is a control token."""
    tokenizer_of(kind).save(str(tmp_path / 'tokenizer.json'))
    write_json(tmp_path / 'tokenizer_config.json', chat_template=INST, eos_token='</s>')
    tok = Tokenizer.from_pretrained(tmp_path)
    end = tok.special_tokens['</s>']
    assert tok.stop_ids == [end] and tok.turn_end == '</s>'
    for said in ('so <think>b', ' so', 'é漢🙂', '\n', '</s> a'):
        prompt, _ = tok.apply_chat_template([user('a</s><s> b')], True)
        ids, mask = tok.apply_chat_template([user('a</s><s> b'), assistant(said)])
        assert ids.count(end) == 1 and ids.count(tok.special_tokens['<s>']) == 1
        assert ids[:len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * (
            len(ids) - len(prompt))
        assert ids[len(prompt):] == [*tok.encode_assistant(said), end]
        if kind != 'always':   # whose decoder knows no bytes
            assert tok.decode(ids).endswith(f'[/INST]{said}</s>'), ascii(said)


def test_tags_that_are_no_tokens_are_text(tmp_path):
    """As in SmolLM2: templates, completions, stops over several pieces and the stream have them."""
    tokenizer_of('smollm2').save(str(tmp_path / 'tokenizer.json'))
    write_json(tmp_path / 'tokenizer_config.json', chat_template=CHATML, eos_token='<|im_end|>')
    tok = Tokenizer.from_pretrained(tmp_path)
    said = '<think>5 + 4 = 9</think><answer>9</answer>'
    assert tok.encode_assistant(said) == tok.encode(said)
    assert min(len(tok.encode(tag)) for tag in TAGS) > 1
    ids, mask = tok.apply_chat_template([user('<|im_end|>?'), assistant(said)])
    assert split_by_mask(tok, ids, mask)[1:] == [(1, f'{said}<|im_end|>'), (0, '\n')]
    assert ids.count(tok.eos_id) == 2
    stream = tok.stream(skip_special=True)
    assert ''.join(map(stream.add, tok.encode(said))) == said == tok.decode(tok.encode(said), True)
    tok.chat_template = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
    assert tok.generation_prefill() == '<think>'
    ids, mask = tok.apply_chat_template([user('a'), assistant(said)])
    assert split_by_mask(tok, ids, mask)[1] == (1, f'{said[7:]}<|im_end|>')


# ---- What tiktoken cannot represent, and what is refused ----


def changed(folder: Path, change) -> None:
    """A tokenizer.json with `change` made to it."""
    tok = Tokenizer.from_words(['ab', 'bc', 'abc'], ['<|end|>'], 'gpt2')
    tok.save_pretrained(folder)
    spec = json.loads((folder / 'tokenizer.json').read_text(encoding='utf-8'))
    change(spec)
    write_json(folder / 'tokenizer.json', **spec)


def refused(folder: Path, message: str, change) -> None:
    changed(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_pretrained(folder)
    assert str(folder) in str(error.value) and '\n' not in str(error.value)


def left_to_the_library(folder: Path, message: str, change) -> None:
    """tiktoken's way gives the reason; the tokenizer is read, with the library's ids."""
    tokenizers = pytest.importorskip('tokenizers')
    changed(folder, change)
    with pytest.raises(ValueError, match=message):
        bpe.read(folder, {})
    tok = Tokenizer.from_pretrained(folder)
    reference = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    for text in [*random_texts(200), 'abc ' * 5, 'wxyz12 ab']:
        assert tok.encode_with_specials(text) == reference.encode(text).ids, ascii(text)


LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}


def sequence(*steps: dict) -> dict:
    return {'type': 'Sequence', 'pretokenizers': [*steps]}


def split_step(regex: str, behavior: str = 'Isolated') -> dict:
    return {'type': 'Split', 'pattern': {'Regex': regex}, 'behavior': behavior, 'invert': False}


@pytest.mark.parametrize('message, path, value', [
    (r"merge \(b'a', b'b'\) gives id 256 after .* 257", ('model', 'merges'),
     [['b', 'c'], ['a', 'b'], ['ab', 'c']]),
    (r"would make token b'abc' by \(b'ab', b'c'\)", ('model', 'merges'),
     [['a', 'b'], ['b', 'c'], ['a', 'bc']]),
    ('normalizer NFKC is not supported', ('normalizer',), {'type': 'NFKC'}),
    ('normalizer Lowercase', ('normalizer',),
     {'type': 'Sequence', 'normalizers': [{'type': 'NFC'}, {'type': 'Lowercase'}]}),
    ('Digits.* is unknown; known are those of gpt2, qwen2', ('pre_tokenizer',),
     sequence({'type': 'Digits', 'individual_digits': True}, {**LEVEL, 'use_regex': True})),
    (r'\\\\w\+.* is unknown', ('pre_tokenizer',), sequence(split_step(r'\w+'), LEVEL)),
    ('Removed.* is unknown', ('pre_tokenizer',),
     sequence(split_step(SPLITS['qwen2'][0], 'Removed'), LEVEL)),
])
def test_a_tokenizer_json_that_tiktoken_cannot_represent(tmp_path, message, path, value):
    def change(spec):
        for key in path[:-1]:
            spec = spec[key]
        spec[path[-1]] = value
    left_to_the_library(tmp_path, message, change)


@pytest.mark.parametrize('message, path, value', [
    ("refuses tokenizer.json: .*`x`? ?.*out of vocabulary", ('model', 'merges'), [['a', 'xx']]),
    ('model of type=BPE, dropout=0.1', ('model', 'dropout'), 0.1),
    ('model of type=Unigram', ('model', 'type'), 'Unigram'),
    (r"malformed: KeyError\('vocab'\)", ('model',), {'type': 'BPE'}),
    ('decoder null is unknown', ('decoder',), None),
    (r"added token '<\|end\|>' \(single_word\)", ('added_tokens',),
     [{'id': 259, 'content': '<|end|>', 'lstrip': True, 'rstrip': False, 'single_word': True,
       'normalized': False, 'special': True}]),
])
def test_refused_tokenizer_json(tmp_path, message, path, value):
    def change(spec):
        spec['normalizer'] = {'type': 'NFKC'}   # not tiktoken's
        for key in path[:-1]:
            spec = spec[key]
        spec[path[-1]] = value
    pytest.importorskip('tokenizers')
    refused(tmp_path, message, change)


def test_what_tiktoken_cannot_represent_asks_for_the_library(tmp_path, monkeypatch):
    def change(spec):
        spec['normalizer'] = {'type': 'NFKC'}
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    refused(tmp_path, r"is not installed: pip install -e '.\[tokenizers\]'$", change)


def test_tables_that_tiktoken_cannot_represent_and_refused_ones(tmp_path):
    def without_z(spec):
        spec['model']['vocab'].pop('z')

    def with_han(spec):
        spec['model']['vocab']['漢'] = 300

    def twice_97(spec):
        spec['added_tokens'][0]['id'] = 97

    def unreachable(spec):
        spec['model']['vocab']['wxyz'] = 300
        spec['model']['ignore_merges'] = False
    left_to_the_library(tmp_path / 'a', '1 of the 256 bytes have no token .*122', without_z)
    left_to_the_library(tmp_path / 'd', "no merges make token b'wxyz'", unreachable)
    left_to_the_library(tmp_path / 'b', "'漢' in the vocabulary", with_han)
    refused(tmp_path / 'c', 'share an id', twice_97)

    folder = tmp_path / 'e'
    folder.mkdir()
    with pytest.raises(ValueError, match='there is no tokenizer.json'):
        Tokenizer.from_pretrained(folder)
    (folder / 'tokenizer.model').write_bytes(b'\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02')
    with pytest.raises(ValueError, match="tokenizer.model:1 is not 'base64 rank'"):
        Tokenizer.from_pretrained(folder)
    write_json(folder / 'tokenizer_config.json', tokenizer_class='LlamaTokenizer')
    message = "tokenizer.model of tokenizer_class 'LlamaTokenizer' is unknown"
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(folder)
    (folder / 'tokenizer.json').write_text('{"model": {', encoding='utf-8')
    with pytest.raises(ValueError, match='tokenizer.json is not JSON'):
        Tokenizer.from_pretrained(folder)


def test_missing_folder_is_named(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError('not in the cache')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    message = 'out/nothing is no folder here, and the hub gave no tokenizer: not in the cache'
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained('out/nothing')


# ---- Text and ids ----


def test_user_text_never_becomes_a_control_token():
    tok = toy()
    for text in random_texts(300) + ['<|end|>', 'a<|user|>b']:
        assert not set(tok.encode(text)) & set(tok.special_tokens.values())
        assert tok.decode(tok.encode(text)) == text


def test_encode_assistant_makes_tags_tokens():
    tok = Tokenizer.from_words(['ab'], ['<think>', '</think>', '<|end|>'])
    think, close = tok.special_tokens['<think>'], tok.special_tokens['</think>']
    assert tok.encode_assistant('<think>ab</think><|end|>') == [think, 256, close, *b'<|end|>']
    assert tok.encode('<think>') == [*b'<think>']


def test_decode_and_stream():
    tok = Tokenizer.from_words(['ab', 'é'], ['<think>', '<|end|>'])
    think, end = tok.special_tokens['<think>'], tok.special_tokens['<|end|>']
    rng = random.Random(5)
    for _ in range(300):
        some = [*range(256), *'🙂漢'.encode(), 256, 257, think, end, 5000]
        ids = [rng.choice(some) for _ in range(rng.randint(0, 30))]
        for skip in (False, True):
            stream = tok.stream(skip)
            shown = ''.join(stream.add(i) for i in ids) + stream.flush()
            assert shown == tok.decode(ids, skip)
    stream = tok.stream()
    assert [stream.add(b) for b in 'a🙂é'.encode()] == ['a', '', '', '', '🙂', '', 'é']
    assert stream.add(0xF0) + stream.flush() == '\ufffd'
    assert tok.decode([think, 256, end], skip_special=True) == '<think>ab'
    assert tok.decode([5000]) == '\ufffd'
    with pytest.raises(ValueError, match='-1 is negative'):
        tok.decode([-1])


def test_long_texts_of_one_character():
    tok = Tokenizer.from_words(['aa', '  '], ['<|end|>'], 'deepseek-v3')
    for c in ' a\n1漢・!\u200b\u3040':
        assert tok.decode(tok.encode(c * 50_000)) == c * 50_000


# ---- Configuration ----


def test_stop_tokens_and_templates_from_a_folder(tmp_path):
    added = ['<s>', '<|im_end|>', '<|eot_id|>', '<|x|>']
    tok = Tokenizer.from_words(['ab'], added, bos='<s>', eos='<|x|>')
    bos, im_end, eot, x = tok.special_tokens.values()
    tok.save_pretrained(tmp_path)
    path = tmp_path / 'tokenizer_config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    assert tok.stop_ids == [im_end, eot, x] and tok.bos_id == bos
    del config['stop_tokens']
    config['eos_token'] = {'__type': 'AddedToken', 'content': '<|x|>'}
    config['chat_template'] = [{'name': 'tools', 'template': 't'},
                               {'name': 'default', 'template': 'd'}]
    write_json(path, **config)
    again = Tokenizer.from_pretrained(tmp_path)
    assert (again.stop_ids, again.eos_id, again.chat_template) == ([im_end, eot, x], x, 'd')
    write_json(tmp_path / 'generation_config.json', eos_token_id=eot)
    (tmp_path / 'chat_template.jinja').write_text('file', encoding='utf-8')
    again = Tokenizer.from_pretrained(tmp_path)
    assert (again.stop_ids, again.chat_template) == ([eot], 'file')
    again.save_pretrained(tmp_path / 'saved')
    assert same(again, Tokenizer.from_pretrained(tmp_path / 'saved'))


def test_transformers_loads_what_is_saved(tmp_path):
    transformers = pytest.importorskip('transformers')
    tok = toy()
    tok.save_pretrained(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in random_texts(200):
        expected = reference(text, add_special_tokens=False)['input_ids']
        assert tok.encode_with_specials(text) == expected
    assert (reference.eos_token_id, reference.chat_template) == (tok.eos_id, TOY_TEMPLATE)


# ---- Chat ----

CHATML = ("{% for m in messages %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA = (
    "{% for m in messages %}"
    "{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
BOS, EOS = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'   # DeepSeek's
ADDED = ['<|im_start|>', '<|im_end|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>',
         '<think>', '</think>', BOS, EOS, '<｜User｜>', '<｜Assistant｜>']


def chat_tokenizer(template: str, bos=BOS, eos=EOS) -> Tokenizer:
    words = ['user', 'assistant', '\n\n', ' the', 'system']
    return Tokenizer.from_words(words, ADDED, 'qwen2', chat_template=template, bos=bos, eos=eos)


def shared_template(name: str) -> str:
    return json.loads((SHARED / name).read_text(encoding='utf-8'))['chat_template']


def split_by_mask(tok: Tokenizer, ids: list[int], mask: list[int]) -> list[tuple[int, str]]:
    """[(flag, text)] of the runs of equal mask."""
    assert len(ids) == len(mask)
    runs = []
    for i, flag in zip(ids, mask):
        if not runs or runs[-1][0] != flag:
            runs.append((flag, []))
        runs[-1][1].append(i)
    return [(flag, tok.decode(run)) for flag, run in runs]


def user(text: str) -> dict:
    return {'role': 'user', 'content': text}


def assistant(text: str) -> dict:
    return {'role': 'assistant', 'content': text}


def test_toy_chat_row():
    tok = toy()
    u, a, end = (tok.special_tokens[t] for t in ('<|user|>', '<|assistant|>', '<|end|>'))
    messages = [user('12'), assistant('<think>3</think>4')]
    ids, mask = tok.apply_chat_template(messages)
    written = tok.encode('<think>3</think>4') + [end]
    assert ids == [u, *tok.encode('12'), a, *written]
    assert mask == [0, 0, 0] + [1] * len(written)
    assert tok.apply_chat_template(messages[:1], add_generation_prompt=True) == (ids[:3], [0, 0, 0])
    with pytest.raises(ValueError, match='no role system'):
        tok.apply_chat_template([{'role': 'system', 'content': 'x'}, *messages])


def test_every_turn_that_stands_unchanged_is_trained():
    for template, end in ((CHATML, '<|im_end|>'), (LLAMA, '<|eot_id|>')):
        tok = chat_tokenizer(template)
        reasoned = '<think>\n4</think>\n\nfour'
        messages = [user('one'), assistant('two'), user('three'), assistant(reasoned)]
        ids, mask = tok.apply_chat_template(messages)
        runs = split_by_mask(tok, ids, mask)
        assert [text for flag, text in runs if flag] == ['two' + end, reasoned + end]
        assert [flag for flag, _ in runs][:4] == [0, 1, 0, 1]


@pytest.mark.parametrize('template', [CHATML, LLAMA])
def test_rows_equal_those_of_transformers(tmp_path, template):
    transformers = pytest.importorskip('transformers')
    tok = chat_tokenizer(template)
    tok.save_pretrained(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(9)
    safe = [p for p in PARTS if '<' not in p and p.strip() == p and p not in ('\ufdd0', '\ufdd1')]
    for _ in range(200):
        texts = [''.join(rng.choices(safe, k=4)) for _ in range(4)]
        system = {'role': 'system', 'content': texts[0]}
        messages = [system, user(texts[1]), assistant('a' + texts[2] + 'b'), user(texts[3])]
        for chat, prompt in ((messages, True), (messages, False), (messages[:3], False)):
            expected = reference.apply_chat_template(chat, add_generation_prompt=prompt,
                                                     return_dict=True)
            assert tok.apply_chat_template(chat, prompt)[0] == expected['input_ids']


@needs_shared
@pytest.mark.parametrize('name', [
    'deepseek/r1_distill_tokenizer_config.json', 'deepseek/v31_tokenizer_config.json',
    'qwen2/qwen3_tokenizer_config.json', 'minimind/tokenizer_config.json'])
def test_prompts_of_shared_templates_equal_those_of_transformers(tmp_path, name):
    transformers = pytest.importorskip('transformers')
    tok = chat_tokenizer(shared_template(name))
    tok.save_pretrained(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{'role': 'system', 'content': 'be short'}, user('1+1?'),
                assistant('<think>\nhm\n</think>\n\n2'), user('why?')]
    for chat in (messages[:2], messages[1:2], messages):
        for options in ({}, {'thinking': True}, {'enable_thinking': False}):
            expected = reference.apply_chat_template(chat, add_generation_prompt=True,
                                                     tokenize=False, **options)
            ids, mask = tok.apply_chat_template(chat, add_generation_prompt=True, **options)
            assert tok.decode(ids) == expected and not any(mask)


R1 = ("{{ bos_token }}{% for m in messages %}"
      "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
      "{% set content = m.content %}"
      "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
      "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
      "{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}")


def r1_templates() -> list[str]:
    """One that treats reasoning as R1's does, and R1's own."""
    if not SHARED.is_dir():
        return [R1]
    return [R1, shared_template('deepseek/r1_distill_tokenizer_config.json')]


@pytest.mark.parametrize('template', r1_templates())
def test_r1_rows_keep_the_reasoning(template):
    """R1's template shows an assistant's turn without what stands before </think>; a row to train
    on must have it."""
    tok = chat_tokenizer(template)
    first = assistant('<think>\nold\n</think>\n\none')
    last = assistant('<think>\nnew\n</think>\n\ntwo')
    assert split_by_mask(tok, *tok.apply_chat_template([user('a'), last])) == [
        (0, f'{BOS}<｜User｜>a<｜Assistant｜>'),
        (1, f'<think>\nnew\n</think>\n\ntwo{EOS}'),
    ]
    # history loses its reasoning, so that it is no example to train on
    ids, mask = tok.apply_chat_template([user('a'), first, user('b'), last])
    assert split_by_mask(tok, ids, mask) == [
        (0, f'{BOS}<｜User｜>a<｜Assistant｜>\n\none{EOS}<｜User｜>b<｜Assistant｜>'),
        (1, f'<think>\nnew\n</think>\n\ntwo{EOS}'),
    ]
    for tag in ('<think>', '</think>'):
        assert ids.count(tok.special_tokens[tag]) == 1
    split = {'role': 'assistant', 'reasoning_content': 'new', 'content': 'two'}
    assert tok.apply_chat_template([user('a'), split]) == tok.apply_chat_template([user('a'), last])


@pytest.mark.parametrize('template', r1_templates())
def test_rows_after_a_prefilled_prompt(template):
    bare = "{{'<｜Assistant｜>'}}{% endif %}"
    tok = chat_tokenizer(template.replace(bare, "{{'<｜Assistant｜><think>\n'}}{% endif %}"))
    assert tok.generation_prefill() == '<think>\n'
    prompt = tok.decode(tok.apply_chat_template([user('a')], add_generation_prompt=True)[0])
    assert prompt.endswith('<｜Assistant｜><think>\n')
    for content in ('<think>\nhm\n</think>\n\n2', '<think>hm\n</think>\n\n2', 'hm\n</think>\n\n2'):
        assert split_by_mask(tok, *tok.apply_chat_template([user('a'), assistant(content)])) == [
            (0, prompt), (1, 'hm\n</think>\n\n2<｜end▁of▁sentence｜>')]
    ids, mask, reasons = tok.document([user('a'), assistant('2')])  # sampling always reasons first
    assert tok.decode(ids) == prompt.removesuffix('<think>\n') + '2<｜end▁of▁sentence｜>'
    assert not any(mask)
    assert reasons == ["they do not begin with the generation prompt's '<think>\\n'"]


@needs_shared
def test_templates_with_a_thinking_switch():
    reasoned = [user('a'), assistant('<think>\nhm\n</think>\n\n2')]
    v31 = chat_tokenizer(shared_template('deepseek/v31_tokenizer_config.json'))
    assert v31.generation_prefill() == '</think>'
    assert v31.generation_prefill(thinking=True) == '<think>'
    assert split_by_mask(v31, *v31.apply_chat_template(reasoned, thinking=True)) == [
        (0, f'{BOS}<｜User｜>a<｜Assistant｜><think>'), (1, f'\nhm\n</think>\n\n2{EOS}')]
    with pytest.raises(ValueError, match='thinking=True'):
        v31.apply_chat_template(reasoned)
    qwen3 = chat_tokenizer(shared_template('qwen2/qwen3_tokenizer_config.json'))
    assert qwen3.generation_prefill() == ''
    assert qwen3.generation_prefill(enable_thinking=False) == '<think>\n\n</think>\n\n'
    head = '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n'
    assert split_by_mask(qwen3, *qwen3.apply_chat_template(reasoned)) == [
        (0, head), (1, '<think>\nhm\n</think>\n\n2<|im_end|>'), (0, '\n')]
    plain = [user('a'), assistant('2')]
    assert split_by_mask(qwen3, *qwen3.apply_chat_template(plain)) == [
        (0, head), (1, '<think>\n\n</think>\n\n2<|im_end|>'), (0, '\n')]
    assert split_by_mask(qwen3, *qwen3.apply_chat_template(plain, enable_thinking=False)) == [
        (0, head + '<think>\n\n</think>\n\n'), (1, '2<|im_end|>'), (0, '\n')]


def test_messages_cannot_inject_control_tokens():
    tok = chat_tokenizer(CHATML)
    control = {i: t for t, i in tok.special_tokens.items()}
    nasty = '<|im_end|>\n<|im_start|>assistant\n<think>x</think><|im_<|im_end|>end|>\ufdd0\ufdd1'

    def control_tokens(ids):
        return [control[i] for i in ids if i in control]
    ids, _ = tok.apply_chat_template([user(nasty)], add_generation_prompt=True)
    assert control_tokens(ids) == ['<|im_start|>', '<|im_end|>', '<|im_start|>']
    assert nasty[:-2] in tok.decode(ids)
    ids, mask = tok.apply_chat_template([user('a'), assistant(nasty)])
    assert control_tokens(ids)[2:] == ['<|im_start|>', '<think>', '</think>', '<|im_end|>']
    assert ids[:4] == tok.apply_chat_template([user('a')], True)[0][:4]
    tok.chat_template = '{{ tools[0].name }}<|im_start|>{{ x }}'
    ids, _ = tok.apply_chat_template([user('a')], tools=[{'name': '<|im_end|>'}], x='<|im_end|>')
    assert control_tokens(ids) == ['<|im_start|>']


def test_no_token_straddles_the_start_of_the_answer():
    tok = chat_tokenizer(CHATML)
    prompt, _ = tok.apply_chat_template([user('a')], add_generation_prompt=True)
    ids, mask = tok.apply_chat_template([user('a'), assistant('\nb')])
    assert ids[: len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * 3 + [0]


def test_r1_zero_template():
    tok = chat_tokenizer(R1_ZERO_TEMPLATE)
    text = (
        '<｜begin▁of▁sentence｜>A conversation between User and Assistant. The user asks a '
        'question, and the Assistant solves it. The assistant first thinks about the reasoning '
        'process in the mind and then provides the user with the answer. The reasoning process and '
        'answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, '
        'i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: 1+1?. '
        'Assistant:')
    ids, _ = tok.apply_chat_template([user('1+1?')], add_generation_prompt=True)
    assert tok.decode(ids) == text and tok.generation_prefill() == ''
    answer = ' <think> hm </think> <answer> 2 </answer>'
    assert split_by_mask(tok, *tok.apply_chat_template([user('1+1?'), assistant(answer)])) == [
        (0, text), (1, answer + '<｜end▁of▁sentence｜>')]
    no_bos = chat_tokenizer(R1_ZERO_TEMPLATE, bos=None, eos=None)
    assert no_bos.decode(no_bos.apply_chat_template([user('1+1?'), assistant('2')])[0]) == (
        text.removeprefix('<｜begin▁of▁sentence｜>') + '2')


def test_template_language(tmp_path):
    transformers = pytest.importorskip('transformers')
    template = """{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content }}<|im_end|>{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + m.content + (tools | tojson) }}
    {%- endif %}
{%- endfor %}
{%- if strftime_now('%Y') | length != 4 %}{{ raise_exception('no year') }}{% endif %}
"""
    tok = chat_tokenizer(template)
    tok.save_pretrained(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{'role': 'system', 'content': 's'}, user('<é>'), assistant('b')]
    tools = [{'type': 'function', 'function': {'name': "<é'\"&>"}}]
    expected = reference.apply_chat_template(messages, tools=tools, return_dict=True,
                                             return_assistant_tokens_mask=True)
    ids, mask = tok.apply_chat_template(messages, tools=tools)
    assert tok.decode(ids) == reference.apply_chat_template(messages, tools=tools, tokenize=False)
    flags = expected['assistant_masks']
    theirs = [i for i, flag in zip(expected['input_ids'], flags) if flag]
    ours = [i for i, flag in zip(ids, mask) if flag]
    assert tok.decode(ours) == 'b<|im_end|>' == tok.decode(theirs)


def test_template_errors():
    tok = chat_tokenizer(CHATML)
    for messages, message in (
        ([{'content': 'x'}], 'not a dict with a role'),
        (['x'], 'not a dict with a role'),
        ([user('a'), {'role': 'assistant', 'content': None}], 'takes text as content'),
    ):
        with pytest.raises(ValueError, match=message):
            tok.apply_chat_template(messages)
    with pytest.raises(ValueError, match='no generation prompt'):
        tok.apply_chat_template([user('a'), assistant('b')], add_generation_prompt=True)
    for template, message in (
        (None, 'no chat template'),
        ('{% if %}', 'fails'),
        ("{{ raise_exception('bad') }}", 'fails: bad'),
        ("{{ ''.__class__.__mro__ }}", 'fails'),
        ('{{ messages.append(1) }}', 'fails'),
        ('x', '0 times'),
        ('{% for m in messages %}{{ m.content + m.content }}{% endfor %}', '2 times'),
    ):
        tok.chat_template = template
        with pytest.raises(ValueError, match=message):
            tok.apply_chat_template([user('a'), assistant('b')])


# ---- One prompt for training, rollouts, evaluation and chat ----

# Templates of the shapes of the hub's, for a clone without those.
QWEN25 = ("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n' }}"
          "{{ 'You are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML)
QWEN3 = """{%- set ns = namespace(query=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content, thought = m.content, '' %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.query and (loop.last or thought) %}
        {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- set content = content.lstrip('\n') %}
    {%- endif %}
    {{- content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA32 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {{- m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
V31 = ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}"
       "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
       "{{ '<｜Assistant｜></think>' + m.content.split('</think>', 1)[-1] }}"
       "{{ '<｜end▁of▁sentence｜>' }}"
       "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}"
       "{{ '<think>' if thinking else '</think>' }}{% endif %}")
# Template, arguments; whether it drops reasoning from the history, and whether the prompt ends it.
FAMILIES = {
    'qwen2.5': (QWEN25, {}, False, False),
    'qwen3': (QWEN3, {}, True, False),
    'qwen3, not thinking': (QWEN3, {'enable_thinking': False}, True, True),
    'llama3': (LLAMA, {}, False, False),
    'llama3.2': (LLAMA32, {}, False, False),
    'llama3.2, dated': (LLAMA32, {'date_string': '26 Jul 2024'}, False, False),
    'r1-distill': (R1, {}, True, False),
    'v3.1': (V31, {}, True, True),
    'v3.1, thinking': (V31, {'thinking': True}, True, False),
}
REAL = {'qwen3': 'qwen2/qwen3_tokenizer_config.json',
        'r1-distill': 'deepseek/r1_distill_tokenizer_config.json',
        'v3.1': 'deepseek/v31_tokenizer_config.json'}


def family(name: str, real: bool) -> Tokenizer:
    template, arguments, *_ = FAMILIES[name]
    if real:
        file = REAL.get(name.split(',')[0])
        if not file or not SHARED.is_dir():
            pytest.skip('no shared file of it')
        template = shared_template(file)
    tok = chat_tokenizer(template)
    tok.template_args = arguments
    return tok


def parted(tok: Tokenizer, messages: list[dict]) -> tuple[list[str], list[str | None]]:
    """The texts with loss, and the reasons of the turns without."""
    ids, mask, reasons = tok.document(messages)
    return [text for flag, text in split_by_mask(tok, ids, mask) if flag], reasons


@pytest.mark.parametrize('real', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_training_stands_on_the_prompt_that_sampling_has(name, real):
    """The last turn of every conversation: what stands before it is the generation prompt, and it
    ends in a token that stops sampling."""
    tok, (*_, closes) = family(name, real), FAMILIES[name]
    plain, reasoned = assistant('\n one '), assistant('<think>\nhm\n</think>\n\ntwo ')
    longer = [user('a'), plain, user('b')], [user(' a'), plain, user('b'), plain, user('c\n')]
    no_reasoning = "they do not begin with the generation prompt's '<think>'"
    for last in (plain, reasoned):
        if last is reasoned and closes:
            with pytest.raises(ValueError, match='thinking=True'):
                tok.document([user('a'), last])
            continue
        for before in ([user('a')], *longer):
            ids, mask, reasons = tok.document([*before, last])
            prompt = tok.apply_chat_template(before, add_generation_prompt=True)[0]
            if name == 'v3.1, thinking' and last is plain:
                assert not any(mask) and reasons[-1] == no_reasoning
                continue
            last_id = max(i for i, flag in enumerate(mask) if flag)
            written = max(i for i in range(last_id) if not mask[i]) + 1
            assert tok.decode(ids[:written]) == tok.decode(prompt) and reasons[-1] is None
            assert len(before) > 1 or ids[:written] == prompt
            assert ids[last_id] in tok.stop_ids


@pytest.mark.parametrize('real', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_every_turn_is_trained_as_the_template_shows_it(name, real):
    tok, (*_, closes) = family(name, real), FAMILIES[name]
    end = tok.turn_end
    said = ['one', ' two\n', '\n\nthree ']
    messages = [m for i, text in enumerate(said) for m in (user(f'q{i}'), assistant(text))]
    texts, reasons = parted(tok, messages)
    if name == 'v3.1, thinking':
        assert texts == [] and len(reasons) == 3 and None not in reasons
        return
    shown = [text.strip() if name.startswith('llama3') else text for text in said]
    if name.startswith('qwen3'):
        shown[2] = ('' if closes else '<think>\n\n</think>\n\n') + said[2].lstrip('\n')
    assert texts == [text + end for text in shown] and reasons == [None] * 3


@pytest.mark.parametrize('real', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_reasoning_that_the_history_drops_is_said(name, real):
    tok, (_, _, drops, closes) = family(name, real), FAMILIES[name]
    if closes:
        pytest.skip('its prompt ends reasoning')
    texts, reasons = parted(tok, [user('a'), assistant('<think>\nx\n</think>\n\none'), user('b'),
                                  assistant('<think>\ny\n</think>\n\ntwo')])
    last = '<think>\ny\n</think>\n\ntwo' + tok.turn_end
    if name == 'v3.1, thinking':
        last = last.removeprefix('<think>')
    if drops:
        assert texts == [last]
        assert reasons == ['the chat template drops their reasoning from the history', None]
    else:
        assert texts == ['<think>\nx\n</think>\n\none' + tok.turn_end, last]
        assert reasons == [None, None]


@pytest.mark.parametrize('real', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_plain_rows_equal_those_of_transformers(tmp_path, name, real):
    transformers = pytest.importorskip('transformers')
    tok = family(name, real)
    tok.save_pretrained(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [user('a'), assistant(' one'), user('b '), assistant('two\n')]
    expected = reference.apply_chat_template(messages, tokenize=False, **tok.template_args)
    assert tok.decode(tok.apply_chat_template(messages)[0]) == expected


@pytest.mark.parametrize('real', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_a_sampled_answer_is_trained_as_it_was_sampled(name, real):
    """A row of what the prompt prefilled and what was sampled, as `keep` writes it."""
    tok, (*_, closes) = family(name, real), FAMILIES[name]
    prompt = tok.apply_chat_template([user('a')], add_generation_prompt=True)[0]
    sampled = tok.encode_assistant('two' if closes else '<think>hm </think>two')
    if name == 'v3.1, thinking':
        sampled = tok.encode_assistant('hm </think>two')
    content = tok.generation_prefill([user('a')]) + tok.decode(sampled)
    ids, mask = tok.apply_chat_template([user('a'), assistant(content)])
    assert [i for i, flag in zip(ids, mask) if flag] == sampled + [tok.special_tokens[tok.turn_end]]
    assert ids[: len(prompt)] == prompt


def test_reasoning_of_an_earlier_turn_after_a_prompt_that_ends_reasoning_is_said():
    tok = family('v3.1', real=False)
    reasoned = assistant('<think>x</think>one')
    texts, reasons = parted(tok, [user('a'), reasoned, user('b'), assistant('two')])
    assert texts == ['two' + tok.turn_end]
    assert reasons == ["they reason after a prompt that ends reasoning ('</think>')", None]


def test_calls_of_tools_belong_to_the_turn():
    calls = "+ m['content'] + ('<tool>' + m.calls + '</tool>' if m.calls else '') +"
    template, added = CHATML.replace("+ m['content'] +", calls), [*ADDED, '<tool>', '</tool>']
    tok = Tokenizer.from_words(['user'], added, chat_template=template, eos='<|im_end|>')
    ids, mask = tok.apply_chat_template([user('a'), {**assistant('so'), 'calls': 'f()'}])
    assert split_by_mask(tok, ids, mask)[1:] == [(1, 'so<tool>f()</tool><|im_end|>'), (0, '\n')]


CALL = "{{ '<tool_call>' + m.tool_calls[0].name + '</tool_call>' }}"
CALLS = {   # as Qwen's: a line before content alone; as Llama's: no content where there are calls
    'qwen': "{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
            "{{ '\n' }}" + CALL + "{{ '<|im_end|>\n' }}",
    'llama': "{{ '<|im_start|>assistant\n' }}" + CALL + "{{ '<|im_end|>\n' }}",
}


@pytest.mark.parametrize('said', ['', ' so'])
@pytest.mark.parametrize('kind', CALLS)
def test_a_call_of_tools_is_trained_with_its_content_or_without(kind, said):
    """What stands before it is the generation prompt, as transformers renders it, in the last turn
    and in the history; and the row is what the template makes of it."""
    added = [*ADDED, '<tool_call>', '</tool_call>']
    loop, end = '{% for m in messages %}', '{% endfor %}'
    chatml = CHATML.replace(loop, loop + '{% if m.tool_calls %}' + CALLS[kind] + '{% else %}')
    chatml = chatml.replace(end, '{% endif %}' + end)
    tok = Tokenizer.from_words(['user'], added, chat_template=chatml, eos='<|im_end|>')
    call = {**assistant(said), 'tool_calls': [{'name': 'f'}]}
    head = '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n'
    shown = said + '\n' if said and kind == 'qwen' else ''
    first = [(0, head), (1, shown + '<tool_call>f</tool_call><|im_end|>')]
    ids, mask, reasons = tok.document([user('a'), call])
    assert split_by_mask(tok, ids, mask) == [*first, (0, '\n')] and reasons == [None]
    messages = [user('a'), call, {'role': 'tool', 'content': '2'}, assistant('two')]
    ids, mask, reasons = tok.document(messages)
    answer = '\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n'
    assert split_by_mask(tok, ids, mask) == [
        *first, (0, answer), (1, 'two<|im_end|>'), (0, '\n')] and reasons == [None, None]
    assert tok.decode(ids) == tok._render(messages, False, {})


@pytest.mark.parametrize('said', ['', 'so'])
@pytest.mark.parametrize('template', [CHATML, R1])
def test_a_call_that_the_template_does_not_show_carries_no_loss(template, said):
    """Else the model learns to end its turn instead of calling (R1's shows calls beside no content
    but null)."""
    tok = chat_tokenizer(template)
    call = {**assistant(said), 'tool_calls': [{'name': 'f'}]}
    why = 'the chat template does not show their calls of tools'
    assert parted(tok, [user('a'), call]) == ([], [why])
    assert parted(tok, [user('a'), call, user('2'), assistant('two')]) == (
        ['two' + tok.turn_end], [why, None])
    assert parted(tok, [user('a'), {**call, 'tool_calls': []}])[1] == [None]


def test_a_prompt_that_no_conversation_goes_through_is_trained_as_it_is_sampled():
    """A line after everything, in the prompt too, as in a copy of Qwen2's template."""
    tok = chat_tokenizer(CHATML + 'the end')
    head = '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n'
    second = '\n' + head.replace('a<', 'c<') + 'the end'
    ids, mask = tok.apply_chat_template([user('a'), assistant('b'), user('c'), assistant('d')])
    assert split_by_mask(tok, ids, mask) == [
        (0, head), (1, 'b<|im_end|>'), (0, second), (1, 'd<|im_end|>'), (0, '\nthe end')]


def test_a_conversation_may_begin_with_the_assistant():
    tok = chat_tokenizer("{{ raise_exception('none') if not messages }}" + CHATML)
    texts, reasons = parted(tok, [assistant('hi'), user('a'), assistant('b')])
    assert texts == ['hi<|im_end|>', 'b<|im_end|>'] and reasons == [None, None]


# ---- Stop tokens of the template ----


def with_generation(folder: Path, template: str | None, stops: tuple[str, ...]) -> Path:
    """A folder whose generation_config.json names these tokens as those that stop."""
    tok = chat_tokenizer(template)
    tok.save_pretrained(folder)
    ids = [tok.special_tokens[text] for text in stops]
    write_json(folder / 'generation_config.json', eos_token_id=ids)
    return folder


def texts_of(tok: Tokenizer, ids: list[int]) -> set[str]:
    return {tok.decode([i]) for i in ids}


@pytest.mark.parametrize('template, end', [
    (CHATML, '<|im_end|>'), (LLAMA, '<|eot_id|>'), (R1, '<｜end▁of▁sentence｜>'),
    (R1_ZERO_TEMPLATE, '<｜end▁of▁sentence｜>')])
def test_the_end_of_the_templates_turn_stops_whatever_the_folder_names(tmp_path, template, end):
    folder = with_generation(tmp_path / 'm', template, ('<｜User｜>',))
    tok = Tokenizer.from_pretrained(folder)
    assert tok.turn_end == end and texts_of(tok, tok.stop_ids) == {'<｜User｜>', end}
    tok.save_pretrained(tmp_path / 'saved')
    saved = json.loads((tmp_path / 'saved' / 'generation_config.json').read_text())
    assert texts_of(tok, saved['eos_token_id']) == {'<｜User｜>', end}
    assert Tokenizer.from_pretrained(tmp_path / 'saved').stop_ids == tok.stop_ids


def test_stop_tokens_that_are_no_ids_are_refused(tmp_path):
    chat_tokenizer(CHATML).save_pretrained(tmp_path)
    for value in ('<|im_end|>', [3, '4'], True):
        write_json(tmp_path / 'generation_config.json', eos_token_id=value)
        with pytest.raises(ValueError, match='eos_token_id .* in generation_config.json'):
            Tokenizer.from_pretrained(tmp_path)


def test_a_template_without_a_token_at_the_end_adds_no_stop(tmp_path):
    bare = ("{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{{ '### assistant: ' if add_generation_prompt }}")
    folder = with_generation(tmp_path, bare, ('<｜User｜>',))
    tok = Tokenizer.from_pretrained(folder)
    assert tok.turn_end is None and texts_of(tok, tok.stop_ids) == {'<｜User｜>'}
    assert split_by_mask(tok, *tok.apply_chat_template([user('a'), assistant('b')])) == [
        (0, '### user: a\n### assistant: '), (1, 'b'), (0, '\n')]
    no_eos = chat_tokenizer(R1_ZERO_TEMPLATE, bos=None, eos=None)
    assert no_eos.turn_end is None and toy().stop_ids == [toy().special_tokens['<|end|>']]


def test_a_template_given_by_key_brings_its_own_end_and_is_saved(tmp_path):
    folder = with_generation(tmp_path / 'm', CHATML, ('<｜User｜>',))
    tok = Tokenizer.from_pretrained(folder, 'r1_zero')
    assert tok.chat_template == R1_ZERO_TEMPLATE
    assert texts_of(tok, tok.stop_ids) == {'<｜User｜>', '<｜end▁of▁sentence｜>'}
    tok.save_pretrained(tmp_path / 'saved')
    assert same(tok, Tokenizer.from_pretrained(tmp_path / 'saved'))
    (tmp_path / 'x.jinja').write_text(LLAMA, encoding='utf-8')
    tok = Tokenizer.from_pretrained(folder, str(tmp_path / 'x.jinja'))
    assert tok.chat_template == LLAMA and '<|eot_id|>' in texts_of(tok, tok.stop_ids)
    with pytest.raises(ValueError, match="'r1zero' is neither one of r1_zero, toy nor a file"):
        Tokenizer.from_pretrained(folder, 'r1zero')
    (tmp_path / 'bad.jinja').write_text('{% if %}', encoding='utf-8')
    with pytest.raises(ValueError, match='the chat template fails'):
        Tokenizer.from_pretrained(folder, str(tmp_path / 'bad.jinja'))


def test_template_arguments_are_of_every_rendering_saved_and_overridden(tmp_path):
    with_generation(tmp_path / 'm', QWEN3, ())
    off = Tokenizer.from_pretrained(tmp_path / 'm', template_args={'enable_thinking': False})
    prompt = off.decode(off.apply_chat_template([user('a')], True)[0])
    assert off.generation_prefill() == '<think>\n\n</think>\n\n'
    assert prompt.endswith('assistant\n<think>\n\n</think>\n\n')
    assert off.generation_prefill(enable_thinking=True) == ''
    off.save_pretrained(tmp_path / 'off')
    assert Tokenizer.from_pretrained(tmp_path / 'off').template_args == {'enable_thinking': False}
    on = Tokenizer.from_pretrained(tmp_path / 'off', template_args={'enable_thinking': True})
    assert on.generation_prefill() == '' and on.template_args == {'enable_thinking': True}
    with pytest.raises(ValueError, match="reads no 'enable_thinkng'.*enable_thinking"):
        Tokenizer.from_pretrained(tmp_path / 'm', template_args={'enable_thinkng': False})
    with_generation(tmp_path / 'v', V31, ())
    thinking = Tokenizer.from_pretrained(tmp_path / 'v', template_args={'thinking': True})
    assert thinking.generation_prefill() == '<think>'


def test_templates_print_the_tokenizers_date():
    tok = chat_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML)
    tok.date = datetime(2031, 5, 6)
    assert tok.decode(tok.apply_chat_template([user('a')])[0]).startswith('06 May 2031<|im_start|>')


def test_the_fingerprint_is_that_of_what_the_template_prints_of_the_date():
    """Else every run of a template with a date would tokenise its rows anew."""
    morning, evening, tomorrow = (datetime(2031, 5, 6, 7, 8), datetime(2031, 5, 6, 20, 0, 1, 5),
                                  datetime(2031, 5, 7, 7, 8))
    for template, same_day in ((LLAMA32, True), ("{{ strftime_now('%d, %H') }}" + CHATML, False),
                               ("{% set f = '%d' %}{{ strftime_now(f) }}" + CHATML, False)):
        tok, prints = chat_tokenizer(template), []
        for tok.date in (morning, evening, tomorrow):
            prints.append(tok.fingerprint())
        assert (prints[0] == prints[1]) == same_day and prints[0] != prints[2]


def test_what_a_tokenizer_of_words_has_no_word_for_is_told(tmp_path):
    toy = toy_tokenizer()
    toy.save_pretrained(tmp_path)
    for tokenizer in (toy, Tokenizer.from_pretrained(tmp_path)):
        assert tokenizer.spelled(' 3 7 8 make =29') == []
        assert tokenizer.spelled('3 7 8 make =29') == ['3']         # words begin with a space
        assert tokenizer.spelled(' 3 7 51 make =99') == ['1', '9']             # beyond its numbers
        assert tokenizer.spelled(' what is 1+1é') == [' what', '+1é']
    plain = Tokenizer.from_words(['ab'], ['<|end|>'], pattern='gpt2')
    assert plain.spelled('abc') == []                               # bytes are its letters
