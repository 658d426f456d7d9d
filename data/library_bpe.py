"""
Any other BPE of a tokenizer.json, through Hugging Face's tokenizers library.

    bpe = read(folder, config)    # a LibraryBPE, which does what bpe.TiktokenBPE does

The library encodes ordinary text. Added tokens are cut out before, in data/tokenizer.py, so that
what a message says is never read as one; and ids become bytes here, so that text can be streamed.
"""
import hashlib
import json
from pathlib import Path

from data.bpe import bytes_of, read_json, with_added_tokens


class LibraryBPE:
    """
    added     added tokens as a tokenizer.json lists them
    tokens    id -> bytes of all other tokens
    by_words  False: see bpe.TiktokenBPE
    """
    by_words = False

    def __init__(self, text: str, added: list[dict]):
        """text: a tokenizer.json; ValueError for what the library or this class cannot read."""
        try:
            import tokenizers
        except ImportError as e:
            raise ValueError("tiktoken cannot represent it, and the tokenizers library, which can, "
                             "is not installed: pip install -e '.[tokenizers]'") from e
        self._text = text
        self.added = added
        spec = json.loads(text)
        model = spec['model']
        _check(model, spec.get('decoder'))

        # Added tokens never come of ordinary text: not by merges, nor as whole pieces
        texts = {t['content'] for t in added} - {model.get('unk_token')}
        pairs = [merge.split(' ') if isinstance(merge, str) else merge for merge in model['merges']]
        model['merges'] = [pair for pair in pairs if not texts & {*pair, ''.join(pair)}]
        model['vocab'] = {token: i for token, i in model['vocab'].items() if token not in texts}
        self.tokens = {i: bytes_of(token) for token, i in model['vocab'].items()}

        plain = dict.fromkeys(('normalizer', 'post_processor', 'truncation', 'padding'))
        try:
            self._normalizer = tokenizers.Tokenizer.from_str(text).normalizer
            spec = spec | plain | {'added_tokens': []}
            self._library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as e:   # the library raises no other kind
            raise ValueError(f'the tokenizers library refuses tokenizer.json: {e}') from e

    def normalized(self, text: str) -> str:
        """What encode takes. Surrogates are joined to characters, a lone one becomes U+FFFD, as
        tiktoken has it."""
        if not text.isascii():
            text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
        return self._normalizer.normalize_str(text) if self._normalizer else text

    def encode(self, text: str) -> list[int]:
        """Normalised ordinary text to ids; bytes without a token vanish."""
        return self._library.encode(text, add_special_tokens=False).ids

    def tokenizer_json(self) -> str:
        """The file as it was read."""
        return self._text

    def digest(self) -> str:
        """A hash of all that ids depend on."""
        parts = json.dumps([self._text, self.added], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()


def _check(model: dict, decoder: dict | None) -> None:
    if model['type'] != 'BPE' or model.get('dropout'):
        raise ValueError(f'a model of type={model["type"]}, dropout={model.get("dropout")} is not '
                         'supported; only a BPE without dropout is')
    if not decoder or decoder['type'] != 'ByteLevel':
        raise ValueError(f'decoder {json.dumps(decoder)} is unknown; known is ByteLevel')


def read(folder: Path, config: dict) -> LibraryBPE:
    spec = read_json(folder / 'tokenizer.json')
    with_added_tokens(spec, config)
    text = (folder / 'tokenizer.json').read_text(encoding='utf-8')
    return LibraryBPE(text, spec['added_tokens'])
