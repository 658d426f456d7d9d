r"""
Any other BPE of a tokenizer.json, through Hugging Face's tokenizers library.

    bpe = read(folder, config)    # a LibraryBPE, which does what bpe.TiktokenBPE does

The library encodes ordinary text alone. Added tokens are cut out before (data/tokenizer.py), so
that what a message says is never read as one. Ids become bytes here, so that text can be streamed:

    decoder                            token    its bytes
    ByteLevel                          'Ġé'     space, 0xE9 (a visible character for each byte)
    Metaspace, Sequence[Replace, ...]  '▁é'     those of ' é'
      with ByteFallback                '<0xE9>' 0xE9

Tokenizers of the second kind put a space before a text, and leave it out when they decode. A piece
that goes on from other text takes none, so encode is told whether its piece `begins` a text.
"""
import hashlib
import json
import re
from pathlib import Path

from data.bpe import BYTE_OF, is_space, read_json, with_added_tokens


class LibraryBPE:
    """
    Ordinary text to ids.

    added        added tokens as a tokenizer.json lists them
    tokens       id -> bytes of all other tokens
    by_words     False: see bpe.TiktokenBPE
    begins_anew  whether what follows an added token begins a text, as its start does
    """
    by_words = False

    def __init__(self, text: str, added: list[dict]):
        """text: a tokenizer.json; ValueError for what the library or this class cannot read."""
        try:
            from tokenizers import Tokenizer
        except ImportError as e:
            raise ValueError('tiktoken cannot represent it, and the tokenizers library, which can, '
                             "is not installed: pip install -e '.[tokenizers]'") from e
        self._text = text
        self.added = added
        spec = json.loads(text)
        model = _without_tokens(spec['model'], added)
        self._replaced, self._byte_fallback, self._begun = _decoder_of(spec.get('decoder'))
        listed = {t['content'] for t in added}
        self.tokens = {i: self.bytes_of(token) for token, i in model['vocab'].items()
                       if token not in listed}

        try:
            # The steps before the model, as the library writes them: files have older forms too
            steps = {key: spec.get(key) for key in ('normalizer', 'pre_tokenizer')}
            no_model = {'type': 'BPE', 'vocab': {}, 'merges': []}
            bare = {'version': '1.0', 'added_tokens': [], **steps, 'model': no_model}
            bare = json.loads(Tokenizer.from_str(json.dumps(bare)).to_str())
            self._prepended, self._prefix, self.begins_anew = _take_prefix(bare)
            self._normalizer = Tokenizer.from_str(json.dumps(bare)).normalizer
            bare |= {'normalizer': None, 'model': model}
            self._library = Tokenizer.from_str(json.dumps(bare))
        except Exception as e:   # the library raises no other kind
            raise ValueError(f'the tokenizers library refuses tokenizer.json: {e}') from e

    def __reduce__(self):
        return LibraryBPE, (self._text, self.added)   # steps of the library do not all pickle

    def normalized(self, text: str, begins: bool = True) -> str:
        """What encode takes. Surrogates are joined to characters, a lone one becomes U+FFFD, as
        with tiktoken."""
        if not text.isascii():
            text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
        if text and begins:
            text = self._prepended + text
        return self._normalizer.normalize_str(text) if self._normalizer else text

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Normalised ordinary text to ids; what has no token becomes the unknown one, or nothing
        where there is none."""
        if text and begins and not text.startswith((' ', self._prefix)):
            text = self._prefix + text
        return self._library.encode(text, add_special_tokens=False).ids

    def bytes_of(self, token: str) -> bytes:
        """What a token of the vocabulary stands for."""
        if self._replaced is None:
            in_bytes = all(c in BYTE_OF for c in token)
            return bytes(BYTE_OF[c] for c in token) if in_bytes else token.encode()
        if self._byte_fallback and re.fullmatch('<0x[0-9A-Fa-f]{2}>', token):
            return bytes([int(token[3:5], 16)])
        return self.bytes_of_added(token)

    def bytes_of_added(self, text: str) -> bytes:
        for old, new in self._replaced or ():
            text = text.replace(old, new)
        return text.encode()

    def begun(self, first: bytes) -> bytes:
        """What is shown of the first token of a text."""
        if self._begun == 'Metaspace':
            return first.replace(b' ', b'')
        return first.removeprefix(b' ') if self._begun == 'Strip' else first

    def tokenizer_json(self) -> str:
        """The file as it was read."""
        return self._text

    def digest(self) -> str:
        """A hash of all that ids depend on."""
        parts = json.dumps([self._text, self.added], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()


def _without_tokens(model: dict, added: list[dict]) -> dict:
    """The model without its added tokens, so that they never come of ordinary text, be it by merges
    or as whole pieces. Those of spaces alone are words like others."""
    if model['type'] != 'BPE' or model.get('dropout'):
        raise ValueError(f'a model of type={model["type"]}, dropout={model.get("dropout")} is not '
                         'supported; only a BPE without dropout is')
    for t in added:
        i = model['vocab'].get(t['content'], t['id'])
        if i != t['id']:
            raise ValueError(f'token {t["content"]!r} is {i} in the vocabulary and {t["id"]} among '
                             'the added tokens')
    texts = {t['content'] for t in added if not is_space(t)} - {model.get('unk_token')}
    pairs = [merge.split(' ') if isinstance(merge, str) else merge for merge in model['merges']]
    merges = [pair for pair in pairs if not texts & {*pair, ''.join(pair)}]
    vocab = {token: i for token, i in model['vocab'].items() if token not in texts}
    return model | {'vocab': vocab, 'merges': merges}


def _decoder_of(decoder: dict | None) -> tuple[list[tuple[str, str]] | None, bool, str | None]:
    """What is replaced in a token (None: its characters write bytes), whether tokens as '<0x0A>'
    are bytes, and which step takes a space from the beginning. ValueError for other decoders."""
    steps = decoder.get('decoders', [decoder]) if decoder else []
    kinds = ' '.join(step['type'] for step in steps)
    first, last = (steps[0], steps[-1]) if steps else ({}, {})
    if kinds == 'ByteLevel':
        return None, False, None
    if kinds == 'Metaspace':
        takes = first.get('prepend_scheme') != 'never' and first.get('add_prefix_space', True)
        return [(first['replacement'], ' ')], False, 'Metaspace' if takes else None

    plain = re.fullmatch('(Replace )*(ByteFallback )?Fuse( Strip)?', kinds)
    replaced = [(step['pattern'].get('String'), step['content'])
                for step in steps if step['type'] == 'Replace']
    strips = last.get('type') == 'Strip'
    plain = plain and all(old for old, _ in replaced)
    if strips:
        plain = plain and (last['content'], last['start'], last['stop']) == (' ', 1, 0)
    if not plain:
        raise ValueError(f'decoder {json.dumps(decoder, ensure_ascii=False)} is unknown; known '
                         'are ByteLevel, Metaspace and a Sequence of Replace, ByteFallback, Fuse, '
                         'Strip')
    return replaced, 'ByteFallback' in kinds, 'Strip' if strips else None


def _take_prefix(spec: dict) -> tuple[str, str, bool]:
    """
    Takes out of the normalizer and the pre-tokenizer what they put before a text -> what is put
    before it is normalised, what after (where it is not there yet), and whether what follows an
    added token has it too.
    """
    def first_of(key: str, steps: str) -> dict:
        step = spec[key] or {'type': None}
        return step[steps][0] if step.get(steps) else step

    step = first_of('normalizer', 'normalizers')
    if step['type'] == 'Prepend':
        prefix = step['prepend']
        step.clear()
        step |= {'type': 'Sequence', 'normalizers': []}
        return prefix, '', True
    step = first_of('pre_tokenizer', 'pretokenizers')
    if step['type'] == 'Metaspace':
        scheme, step['prepend_scheme'] = step['prepend_scheme'], 'never'
        return '', step['replacement'] if scheme != 'never' else '', scheme == 'always'
    if step['type'] == 'ByteLevel' and step['add_prefix_space']:
        step['add_prefix_space'] = False
        return '', ' ', True
    return '', '', False


def read(folder: Path, config: dict) -> LibraryBPE:
    """Of the folder's tokenizer.json."""
    spec = read_json(folder / 'tokenizer.json')
    with_added_tokens(spec, config)
    text = (folder / 'tokenizer.json').read_text(encoding='utf-8')
    return LibraryBPE(text, spec['added_tokens'])
