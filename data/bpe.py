"""
Byte-level BPE as Hugging Face's files hold it, read for tiktoken and written back.

    bpe = read(folder, config)    # a TiktokenBPE
    bpe.encode(text)              # ordinary text to ids
    bpe.tokenizer_json()          # the file that Hugging Face's libraries read

In each piece of text that its pattern cuts out, tiktoken joins the adjacent pair that makes the
token of lowest id, over and over; a Hugging Face BPE follows its list of merges. `check_merges`
refuses a file where the two could differ, and PATTERNS holds the pre-tokenizers that are accepted:
regex engines differ, so each was compared before.
"""
import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tiktoken

# ---- How a text is cut into pieces, inside which tokens are merged ----

_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_DIGITS = r'\p{N}{1,3}'
_WORD = r'[^\r\n\p{L}\p{N}]?\p{L}+'
_REST = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = '|'.join([_CONTRACTED, _WORD, r'\p{N}', _REST])
_LLAMA3 = '|'.join([_CONTRACTED, _WORD, _DIGITS, _REST])

_UPPER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]'
_LOWER = r'[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]'
_KIMI = '|'.join([
    r'[\p{Han}]+',
    rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTED}?',
    rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTED}?',
    _DIGITS,
    _REST,
])

# DeepSeek-V3 cuts in three steps, one after the other
_CJK = '一-龥぀-ゟ゠-ヿ'
_PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK_V3_STEPS = (
    _DIGITS,
    f'[{_CJK}]+',
    '|'.join([
        _PUNCTUATED,
        r'[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+',
        r' ?[\p{P}\p{S}]+[\r\n]*',
        r'\s*[\r\n]+|\s+(?!\S)|\s+',
    ]),
)
# The third step sees the runs of _CJK, and what digits and they leave, each by itself
_DEEPSEEK_V3 = '|'.join([
    _DIGITS,
    rf'[[^\p{{L}}\p{{P}}\p{{S}}]&&[{_CJK}]]?[[\p{{L}}\p{{M}}]&&[{_CJK}]]+',
    rf'[[\p{{P}}\p{{S}}]&&[{_CJK}]]+',
    rf'[[^\p{{L}}\p{{M}}\p{{P}}\p{{S}}]&&[{_CJK}]]+(?![[\p{{L}}\p{{M}}]&&[{_CJK}]])',
    _PUNCTUATED,
    rf'[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}]?[[\p{{L}}\p{{M}}]--[{_CJK}]]+',
    rf' ?[[\p{{P}}\p{{S}}]--[{_CJK}]]+[\r\n]*',
    rf'\s*[\r\n]+|\s+(?![^\s\p{{N}}{_CJK}])|\s+',
    # what no step matches
    rf'[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}{_CJK}]+(?![[\p{{L}}\p{{M}}]--[{_CJK}]])',
])

# Name -> (the regexes of the Split steps, one pattern that cuts the same pieces under tiktoken)
PATTERNS = {
    'gpt2': ((_GPT2,), _GPT2),
    'qwen2': ((_QWEN2,), _QWEN2),
    'llama3': ((_LLAMA3,), _LLAMA3),
    'kimi': ((_KIMI,), _KIMI),
    'deepseek-v3': (_DEEPSEEK_V3_STEPS, _DEEPSEEK_V3),
}

# ---- GPT-2's way of writing bytes as visible characters ----

# printable Latin-1 stands for itself, the other bytes are U+0100, U+0101, ...
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
_VISIBLE = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
BYTE_OF = {c: b for b, c in _VISIBLE.items()}


class TiktokenBPE:
    """
    Ordinary text to ids.

    added        added tokens as a tokenizer.json lists them
    tokens       id -> bytes of all other tokens
    by_words     whether every word is one token wherever it stands (Tokenizer.from_words)
    begins_anew  False: nothing is put before a text, so `begins` does not matter
    """
    begins_anew = False

    def __init__(self, ranks: dict[bytes, int], spec: dict):
        """ranks: bytes -> id; spec: a tokenizer.json less its model. ValueError for what tiktoken
        cannot represent."""
        self._ranks = ranks
        self._spec = spec
        self.added = spec['added_tokens']
        self.tokens = {i: token for token, i in ranks.items()}
        pattern = pattern_of(spec['pre_tokenizer'], ranks)
        self.by_words = pattern == words_pattern(ranks)
        self._nfc = uses_nfc(spec.get('normalizer'))
        self._encoding = tiktoken.Encoding('nanoR1', pat_str=pattern, mergeable_ranks=ranks,
                                           special_tokens={})

    def normalized(self, text: str, begins: bool = True) -> str:
        """What encode takes."""
        return unicodedata.normalize('NFC', text) if self._nfc else text

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Normalised ordinary text to ids."""
        return self._encoding.encode_ordinary(text)

    def bytes_of_added(self, text: str) -> bytes:
        return text.encode()

    def begun(self, first: bytes) -> bytes:
        """What is shown of the first token of a text."""
        return first

    def tokenizer_json(self) -> str:
        special_tokens = {t['content']: t['id'] for t in self.added}
        data = self._spec | {'model': model_of(self._ranks, special_tokens)}
        return json.dumps(data, ensure_ascii=False, indent=1) + '\n'

    def digest(self) -> str:
        """A hash of all that ids depend on."""
        digest = hashlib.sha256()
        for token, i in sorted(self._ranks.items()):
            digest.update(b'%d %d ' % (i, len(token)) + token)
        digest.update(json.dumps(self._spec, sort_keys=True).encode())
        return digest.hexdigest()


# ---- What tiktoken cannot represent exactly is refused ----

def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """
    The pair that tiktoken joins last to make `token` of bytes, or None where merging never makes
    it. No other pair can make it: merges inside a stretch of text that becomes `token` go as they
    do in `token` alone.
    """
    never = float('inf')
    parts = [token[i:i + 1] for i in range(len(token))]
    costs = [ranks.get(a + b, never) for a, b in zip(parts, parts[1:])]
    while len(parts) > 2:
        i = costs.index(min(costs))
        if costs[i] == never:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        del costs[i]
        for j in range(max(i - 1, 0), min(i + 1, len(costs))):
            costs[j] = ranks.get(parts[j] + parts[j + 1], never)
    return tuple(parts)


def check_merges(ranks: dict[bytes, int], merges: list[tuple[bytes, ...]],
                 ignore_merges: bool) -> None:
    """
    ValueError unless tiktoken's merging, by lowest id, gives what following `merges` in order
    gives. It does where ids grow with the merges, where the merge by which tiktoken makes a token
    is listed for every token, and where tokens that no merge makes are yet taken as whole pieces
    (ignore_merges), as tiktoken takes them.
    """
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise ValueError(f'{len(missing)} of the 256 bytes have no token (the first is '
                         f'{missing[0]})')
    last = -1
    for pair in merges:
        i = ranks.get(b''.join(pair))
        if i is None or len(pair) != 2 or not all(part in ranks for part in pair):
            raise ValueError(f'merge {pair} is not of two ordinary tokens into a third')
        if i < last:
            raise ValueError(f'merge {pair} gives id {i} after a merge that gives {last}, but '
                             'tiktoken merges by id')
        last = i
    listed = set(merges)
    for token in ranks:
        if len(token) < 2:
            continue
        pair = last_merge(token, ranks)
        if pair and pair not in listed:
            raise ValueError(f'tiktoken would make token {token} by {pair}, which is not among the '
                             'merges')
        if not pair and not ignore_merges:
            raise ValueError(f'no merges make token {token}, but tiktoken would use it as a whole '
                             'piece')


def check_added_tokens(added: list[dict], tokens: dict[int, bytes]) -> None:
    """ValueError for tokens that could not be told from text, or that are not unique."""
    for t in added:
        if t['single_word'] or len(t['content']) < 2 and not is_space(t):
            fault = 'single_word' if t['single_word'] else 'too short'
            raise ValueError(f'added token {t["content"]!r} ({fault}) is not supported')
    texts = {t['content'] for t in added}
    ids = {t['id'] for t in added}
    if len(texts) < len(added) or len(ids | tokens.keys()) < len(added) + len(tokens):
        raise ValueError('two tokens share an id or a text; every token needs its own')


def is_space(added_token: dict) -> bool:
    """Whether it is a word that any text may have, such as a run of spaces."""
    blank = not added_token['content'].replace('▁', ' ').strip()
    return blank and not added_token.get('special')


def uses_nfc(normalizer: dict | None) -> bool:
    if not normalizer:
        return False
    steps = normalizer.get('normalizers', [normalizer])
    unknown = [step['type'] for step in steps if step['type'] != 'NFC']
    if unknown:
        raise ValueError(f'normalizer {unknown[0]} is not supported; only NFC is')
    return bool(steps)


def words_pattern(ranks: dict[bytes, int]) -> str:
    """Any token of more than one byte, the longest first, or any one character."""
    words = [token.decode(errors='replace') for token in ranks if len(token) > 1]
    words.sort(key=lambda word: (-len(word), word))
    return '|'.join([*map(re.escape, words), r'[\s\S]'])


def pattern_of(pre_tokenizer: dict | None, ranks: dict[bytes, int]) -> str:
    """The pattern for tiktoken; ValueError naming the pre-tokenizer that is not known."""
    *splits, level = (pre_tokenizer or {}).get('pretokenizers', [pre_tokenizer])
    if not level or level['type'] != 'ByteLevel' or level.get('add_prefix_space', True):
        raise ValueError(f'pre-tokenizer {json.dumps(level)} is unknown; the last step must be '
                         'ByteLevel, unprefixed')
    plain = all(s['type'] == 'Split' and s['behavior'] == 'Isolated' and not s['invert']
                for s in splits)
    regexes = [s['pattern'].get('Regex', '') for s in splits] if plain else []
    if level.get('use_regex', True):
        regexes.append(_GPT2)   # ByteLevel then splits by itself

    spelled = tuple(r.replace('\r', r'\r').replace('\n', r'\n') for r in regexes)
    known = dict(PATTERNS.values()).get(spelled)
    if not known and regexes == [words_pattern(ranks)]:
        known = regexes[0]
    if not plain or not known:
        raise ValueError(f'pre-tokenizer {json.dumps(splits or level, ensure_ascii=False)} is '
                         f'unknown; known are those of {", ".join(PATTERNS)} and from_words')
    return known


# ---- Files ----

# An added token, less its id and content
_FLAGS = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
          'special': True}


def spec_of(added_tokens: list[str], first_id: int, regexes: tuple[str, ...],
          nfc: bool = False) -> dict:
    """A tokenizer.json without its model."""
    steps = [{'type': 'Split', 'pattern': {'Regex': regex}, 'behavior': 'Isolated', 'invert': False}
             for regex in regexes]
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
             'use_regex': False}
    return {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': [{'id': first_id + i, 'content': text} | _FLAGS
                         for i, text in enumerate(added_tokens)],
        'normalizer': {'type': 'NFC'} if nfc else None,
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [*steps, level]},
        'post_processor': None,
        'decoder': level,
    }


def _no_names(size: int) -> list[str]:
    return []


def _kimi_names(size: int) -> list[str]:
    return [f'<|reserved_token_{i}|>' for i in range(size, size + 256)]


def _llama3_names(size: int) -> list[str]:
    named = {0: 'begin_of_text', 1: 'end_of_text', 4: 'finetune_right_pad_id',
             6: 'start_header_id', 7: 'end_header_id', 8: 'eom_id', 9: 'eot_id', 10: 'python_tag'}
    reserved = (f'reserved_special_token_{i}' for i in range(256))
    return [f'<|{named[i] if i in named else next(reserved)}|>' for i in range(256)]


def _qwen_names(size: int) -> list[str]:
    extra = [f'<|extra_{i}|>' for i in range(205)]
    return ['<|endoftext|>', '<|im_start|>', '<|im_end|>', *extra]


class _Convention(NamedTuple):
    """What a file leaves unsaid; what tokenizer_config.json says goes before it."""
    pattern: str                                    # how a text is split: a name in PATTERNS
    nfc: bool                                       # whether it is normalised before
    added: Callable[[int], list[str]] = _no_names   # tokens that follow a table of so many
    named: dict = {}                                # bos_token, eos_token


# File -> tokenizer_class -> convention. All but merges.txt are tiktoken tables.
FILES = {
    'merges.txt': {
        'Qwen2Tokenizer': _Convention('qwen2', True),
        'GPT2Tokenizer': _Convention('gpt2', False),
    },
    'tiktoken.model': {
        'TikTokenTokenizer': _Convention('kimi', False, _kimi_names),
    },
    'tokenizer.model': {
        'PreTrainedTokenizer': _Convention('llama3', False, _llama3_names, {
            'bos_token': '<|begin_of_text|>', 'eos_token': '<|end_of_text|>'}),
    },
    'qwen.tiktoken': {
        'QWenTokenizer': _Convention('qwen2', True, _qwen_names, {'eos_token': '<|endoftext|>'}),
    },
}


def read(folder: Path, config: dict) -> TiktokenBPE:
    """Of the first of tokenizer.json and FILES that the folder holds; completes `config`."""
    ranks, spec = _read_files(folder, config)
    return TiktokenBPE(ranks, spec)


def _read_files(folder: Path, config: dict) -> tuple[dict[bytes, int], dict]:
    present = [name for name in ('tokenizer.json', *FILES) if (folder / name).exists()]
    if not present:
        raise ValueError(f'there is no tokenizer.json, vocab.json + {", ".join(FILES)}')
    name = present[0]
    if name == 'tokenizer.json':
        spec = read_json(folder / name)
        model = spec.pop('model')
        added = with_added_tokens(spec, config)
        return _read_bpe(model, added), spec

    convention = _convention_of(name, config)
    for key, text in convention.named.items():
        config.setdefault(key, text)
    regexes = PATTERNS[convention.pattern][0]
    if name == 'merges.txt':
        spec = spec_of([], 0, regexes, convention.nfc)
        lines = (folder / name).read_text(encoding='utf-8').split('\n')
        merges = [line for line in lines if line and not line.startswith('#version')]
        model = {'type': 'BPE', 'vocab': read_json(folder / 'vocab.json'), 'merges': merges}
        added = with_added_tokens(spec, config)
        return _read_bpe(model, added), spec

    ranks = _read_table(folder / name)
    spec = spec_of(convention.added(len(ranks)), len(ranks), regexes, convention.nfc)
    with_added_tokens(spec, config)
    return ranks, spec


def _convention_of(name: str, config: dict) -> _Convention:
    """That of the file's tokenizer_class; without one, the first that is known for the file."""
    known = FILES[name]
    owner = (config.get('tokenizer_class') or next(iter(known))).removesuffix('Fast')
    if owner not in known:
        raise ValueError(f'{name} of tokenizer_class {owner!r} is unknown; known: '
                         f'{", ".join(known)}')
    return known[owner]


def with_added_tokens(spec: dict, config: dict) -> set[str]:
    """Puts the configuration's added tokens into the spec, over its own -> the texts of all."""
    added = {t['id']: t for t in spec['added_tokens']}
    for i, token in config.get('added_tokens_decoder', {}).items():
        added[int(i)] = {'id': int(i)} | _FLAGS | token
    spec['added_tokens'] = [added[i] for i in sorted(added)]
    return {t['content'] for t in added.values()}


def _read_bpe(model: dict, added: set[str]) -> dict[bytes, int]:
    options = ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback')
    found = [f'{key}={model[key]}' for key in ('type', *options) if model.get(key)]
    if found != ['type=BPE']:
        raise ValueError(f'a model of {", ".join(found)} is not a plain byte-level BPE')

    vocab = {text: i for text, i in model['vocab'].items() if text not in added}
    pairs = [merge.split(' ') if isinstance(merge, str) else merge for merge in model['merges']]

    def bytes_of(text: str) -> bytes:
        return bytes(BYTE_OF[c] for c in text)
    try:
        ranks = {bytes_of(text): i for text, i in vocab.items()}
        merges = [tuple(map(bytes_of, pair)) for pair in pairs]
    except KeyError as e:
        raise ValueError(f'{e} in the vocabulary is not a character of the byte-level alphabet'
                         ) from e
    check_merges(ranks, merges, model.get('ignore_merges', False))
    return ranks


def _read_table(path: Path) -> dict[bytes, int]:
    """A tiktoken table: lines of base64, space, rank."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as e:
            raise ValueError(f"{path.name}:{number} is not 'base64 rank' (a SentencePiece model?)"
                             ) from e
    return ranks


def read_json(path: Path, default=None):
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:
        raise ValueError(f'{path.name} is not JSON: {e}') from e


def model_of(ranks: dict[bytes, int], special_tokens: dict[str, int]) -> dict:
    """The "model" of a tokenizer.json."""
    tokens = sorted(ranks, key=ranks.get)
    visible = {token: ''.join(_VISIBLE[b] for b in token) for token in tokens}
    merges = []
    for token in tokens:
        pair = last_merge(token, ranks) if len(token) > 1 else None
        if pair:
            merges.append([visible[part] for part in pair])
    # Added tokens too: the tokenizers library gives a new number to those not listed here.
    vocab = {visible[token]: i for token, i in ranks.items()} | special_tokens
    return {
        'type': 'BPE',
        'dropout': None,
        'unk_token': None,
        'continuing_subword_prefix': None,
        'end_of_word_suffix': None,
        'fuse_unk': False,
        'byte_fallback': False,
        'ignore_merges': True,
        'vocab': vocab,
        'merges': merges,
    }
