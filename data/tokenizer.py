"""Byte-level BPE tokenizers on tiktoken, read from and written to Hugging Face's files with identical ids.

    tok = Tokenizer.from_pretrained("Qwen/Qwen2.5-1.5B")          # a folder or a hub id
    tok = Tokenizer.from_words(["10", "11", " plus"], ["<|user|>", "<|assistant|>", "<|end|>"], eos="<|end|>")
    tok.encode("text"), tok.decode(ids), tok.apply_chat_template(messages)

tiktoken merges, in each piece of text that the pattern cuts out, the adjacent pair whose concatenation has the lowest
rank, ranks being ids; a Hugging Face BPE follows its list of merges. `_check_merges` refuses a file in which the two
could differ, and `PATTERNS` holds the only pre-tokenizers that are accepted: regex engines differ in details, so that a
pattern is added here once it has been compared.
"""
import base64
import binascii
import codecs
import json
import os
import re
import unicodedata
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox
import tiktoken

# Name -> (the regexes of the Split steps, one pattern that cuts the same pieces under tiktoken).
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2, _LLAMA3 = _WORD + r"\p{N}" + _REST, _WORD + r"\p{N}{1,3}" + _REST
_UPPER, _LOWER = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]")
_KIMI = "|".join([r"[\p{Han}]+"] + [
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}(?i:'s|'t|'re|'ve|'m|'ll|'d)?" for a, b in ("*+", "+*")
]) + r"|\p{N}{1,3}" + _REST
_CJK, _ASCII_PUNCTUATION = "一-龥぀-ゟ゠-ヿ", r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK_V3 = (  # later steps only see what earlier ones left, hence the lookaheads
    rf"\p{{N}}{{1,3}}|[{_CJK}]+|{_ASCII_PUNCTUATION}|[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}]?(?:(?![{_CJK}])[\p{{L}}\p{{M}}])+"
    rf"| ?(?:(?![{_CJK}])[\p{{P}}\p{{S}}])+[\r\n]*|\s*[\r\n]+|\s+(?![^\s\p{{N}}{_CJK}])|\s+"
    rf"|[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}]+(?!(?![{_CJK}])[\p{{L}}\p{{M}}])"
)
PATTERNS = {
    "gpt2": ((_GPT2,), _GPT2),
    "qwen2": ((_QWEN2,), _QWEN2),
    "llama3": ((_LLAMA3,), _LLAMA3),
    "kimi": ((_KIMI,), _KIMI),
    "deepseek-v3": ((r"\p{N}{1,3}", f"[{_CJK}]+", _ASCII_PUNCTUATION + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
                     r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), _DEEPSEEK_V3),
}

R1_ZERO_TEMPLATE = (
    "{{ bos_token }}A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>."
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ ' User: ' + m.content + '.' }}"
    "{% elif m.role == 'assistant' %}{{ ' Assistant:' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('the R1-Zero template has no role ' + m.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' Assistant:' }}{% endif %}"
)
TOY_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>' + m.content + '<|end|>' }}"
    "{% else %}{{ raise_exception('the toy template has no role ' + m.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Tags that the assistant itself writes: in its messages they become the tokenizer's own tokens, and decode keeps them.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>")
_GUARD, _HOLE = "\ufdd0", "\ufdd1"  # noncharacters; in messages they are replaced

# GPT-2's way of writing bytes as visible characters: printable Latin-1 as itself, the others from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_VISIBLE = {b: chr(b) for b in _PRINTABLE}
_VISIBLE |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in _VISIBLE)}
_BYTE = {c: b for b, c in _VISIBLE.items()}


class Tokenizer:
    """A tiktoken encoding with its added tokens, chat template and stop tokens.

    special_tokens: text -> id of every added token; vocab_size: highest id + 1; bos_id, eos_id: int or None;
    stop_ids: ids that end a completion; chat_template: Jinja text or None, free to be set.
    """

    def __init__(self, ranks: dict[bytes, int], spec: dict, config: dict, stop_ids: list[int] | None = None):
        """`ranks`: the table, bytes -> id; `spec`: a tokenizer.json without its model; `config`: a tokenizer_config.json."""
        self.ranks, self.spec, self.config = ranks, spec, config
        self.chat_template = config.get("chat_template")
        self.special_tokens = {t["content"]: t["id"] for t in spec["added_tokens"]}
        self._check_added_tokens()
        self._nfc = _uses_nfc(spec.get("normalizer"))
        self._encoding = tiktoken.Encoding("nanoR1", pat_str=_pattern(spec["pre_tokenizer"], ranks), mergeable_ranks=ranks,
                                           special_tokens=self.special_tokens)
        self._bytes = {i: token for token, i in ranks.items()}
        self._bytes |= {i: text.encode() for text, i in self.special_tokens.items()}
        self._control_ids = {i for text, i in self.special_tokens.items() if text not in TAGS}
        # Those that are matched before and after normalisation; the longest wins.
        self._first = _any_of(t["content"] for t in spec["added_tokens"] if not t.get("normalized"))
        self._second = _any_of(t["content"] for t in spec["added_tokens"] if t.get("normalized"))
        self._any = _any_of(self.special_tokens)
        self.vocab_size = max(self._bytes) + 1
        self.bos_id, self.eos_id = self._named("bos_token"), self._named("eos_token")
        names = config.get("stop_tokens", [t for t in _END_TOKENS if t in self.special_tokens])
        ends = [self.eos_id, *(self._id_of(t, "stop token") for t in names)]
        self.stop_ids = stop_ids or sorted({i for i in ends if i is not None})

    # ---- Construction and files ----

    @classmethod
    def from_words(cls, words: list[str], special_tokens: list[str], pattern: str | None = None,
                   chat_template: str | None = TOY_TEMPLATE, bos: str | None = None, eos: str | None = "<|end|>",
                   stop: list[str] | None = None) -> "Tokenizer":
        """Ids 0-255 are the bytes, then come `words` (those of one byte are there already), then `special_tokens`.

        Without a `pattern` (a name in PATTERNS) every word is one token wherever it stands, the longest word first, and
        all other text is bytes: with the words "12" and " plus", "312 plus" becomes "3", "12", " plus".
        """
        ranks = {bytes([b]): b for b in range(256)}
        for word in words:
            if not word or (len(word.encode()) > 1 and word.encode() in ranks):
                raise ValueError(f"word {word!r} is {'listed twice' if word else 'empty'}; list each word once")
            ranks.setdefault(word.encode(), len(ranks))
        if pattern is not None and pattern not in PATTERNS:
            raise ValueError(f"unknown pattern {pattern!r}; use one of {', '.join(PATTERNS)}, or None")
        regexes = PATTERNS[pattern][0] if pattern else (_words_pattern(ranks),)
        config = {"bos_token": bos, "eos_token": eos, "chat_template": chat_template}
        if stop is not None:
            config["stop_tokens"] = stop
        added = [_added_token(text, len(ranks) + i) for i, text in enumerate(special_tokens)]
        return cls(ranks, _spec(added, regexes), config)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike) -> "Tokenizer":
        """Reads a folder or a hub id: tokenizer.json, else vocab.json + merges.txt, else a tiktoken table.

        Raises ValueError, naming the file and the reason, for a tokenizer that tiktoken cannot represent exactly.
        """
        folder = Path(source)
        config = _read_json(folder / "tokenizer_config.json", {})
        spec = _read_json(folder / "tokenizer.json")
        model = spec.pop("model")
        taken = {t["content"] for t in spec["added_tokens"]}
        ranks = {bytes(_BYTE[c] for c in text): i for text, i in model["vocab"].items() if text not in taken}
        return cls(ranks, spec, config)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which from_pretrained and transformers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        visible = {token: "".join(map(_VISIBLE.__getitem__, token)) for token in self.ranks}
        pairs = [_last_merge(token, self.ranks) for token in sorted(self.ranks, key=self.ranks.get) if len(token) > 1]
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                 "vocab": {visible[token]: i for token, i in self.ranks.items()},
                 "merges": [[visible[a], visible[b]] for a, b in filter(None, pairs)]}
        config = {k: v for k, v in self.config.items() if k not in ("auto_map", "added_tokens_decoder")}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.chat_template}
        for name, data in (("tokenizer.json", self.spec | {"model": model}), ("tokenizer_config.json", config)):
            (folder / name).write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def _check_added_tokens(self) -> None:
        for t in self.spec["added_tokens"]:
            flags = [f for f in ("lstrip", "rstrip", "single_word") if t.get(f)]
            if flags:
                raise ValueError(f"added token {t['content']!r} is matched with {', '.join(flags)}, which is not supported")
            if len(t["content"]) < 2:
                raise ValueError(f"added token {t['content']!r} is shorter than two characters, which is not supported")
        ids = [*self.ranks.values(), *self.special_tokens.values()]
        if len(set(ids)) != len(ids) or len(self.special_tokens) != len(self.spec["added_tokens"]):
            raise ValueError("two tokens share an id or a text; every token needs its own")

    def _id_of(self, text: str, what: str) -> int:
        i = self.special_tokens.get(text, self.ranks.get(text.encode()))
        if i is None:
            raise ValueError(f"{what} {text!r} is not in the vocabulary")
        return i

    def _named(self, name: str) -> int | None:
        text = self._text_of(name)
        return self._id_of(text, name) if text else None

    def _text_of(self, name: str) -> str:
        value = self.config.get(name) or ""
        return value["content"] if isinstance(value, dict) else value

    # ---- Text to ids and back ----

    def encode(self, text: str) -> list[int]:
        """Ordinary text to ids; text that looks like an added token stays text."""
        return self._encoding.encode_ordinary(unicodedata.normalize("NFC", text) if self._nfc else text)

    def encode_with_specials(self, text: str) -> list[int]:
        """Text whose added tokens are meant as such (a rendered template) to ids."""
        ids = []
        for i, piece in enumerate(self._first.split(text)):  # odd pieces are the tokens
            if i % 2:
                ids.append(self.special_tokens[piece])
                continue
            piece = unicodedata.normalize("NFC", piece) if self._nfc else piece
            for j, part in enumerate(self._second.split(piece)):
                ids += [self.special_tokens[part]] if j % 2 else self._encoding.encode_ordinary(part.replace(_GUARD, ""))
        return ids

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Ids to text; broken UTF-8 and ids without a token (padding of the embedding) become U+FFFD.

        `skip_special` leaves out the added tokens except the tags in TAGS.
        """
        return b"".join(self._bytes_of(i, skip_special) for i in ids).decode("utf-8", errors="replace")

    def stream(self, skip_special: bool = False) -> "Stream":
        """A decoder of one id at a time: the texts of .add(id) and .flush() join to decode(ids)."""
        return Stream(self, skip_special)

    def _bytes_of(self, i: int, skip_special: bool) -> bytes:
        if i < 0:
            raise ValueError(f"token id {i} is negative")
        return b"" if skip_special and i in self._control_ids else self._bytes.get(i, "\ufffd".encode())

    # ---- Chat ----

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False,
                            **kwargs) -> tuple[list[int], list[int]]:
        """Renders `messages` (dicts with role and content) and returns (ids, mask), lists of equal length.

        The mask is 1 on what the assistant is to be trained to write: its content and the token that ends its turn.
        A turn whose content reasons (holds "</think>") stands as sampling would have made it: right after the generation
        prompt, whole, less the text which that prompt prefills. Other turns stand where the template puts them. Earlier
        turns are as the template shows history; those it changes (R1's drops the reasoning) are context, mask 0.

        Added tokens come from the template alone. In messages their text is encoded as ordinary text, except that the
        assistant's TAGS become tokens, since it is trained to write them. No token straddles the start of what the
        assistant writes, as none can when sampling.

        `kwargs` go to the template (tools=, enable_thinking=, ...). Raises ValueError for a template that is missing,
        fails, or does not show the assistant's content once.
        """
        if not messages:
            raise ValueError("apply_chat_template needs at least one message")
        messages = [self._guarded_message(m) for m in messages]
        ends_with_assistant = messages[-1]["role"] == "assistant"
        if ends_with_assistant and (add_generation_prompt or not isinstance(messages[-1].get("content"), str)):
            raise ValueError("the last message is the assistant's: it takes text as content and no generation prompt")
        turns = [self._turn(messages[: k + 1], kwargs) for k, m in enumerate(messages)
                 if m["role"] == "assistant" and isinstance(m.get("content"), str)]
        text = "".join(turns[-1]) if ends_with_assistant else self._render(messages, add_generation_prompt, kwargs)
        ids, mask, done = [], [], 0
        for start, body, tail in turns + [(text, "", "")]:
            end = self._any.search(tail)
            written = body + (tail[: end.end()] if end else "")
            if text.startswith(start + written):
                for part, flag in ((text[done : len(start)], 0), (written, 1)):
                    new = self.encode_with_specials(part)
                    ids, mask = ids + new, mask + [flag] * len(new)
                done = len(start + written)
        return ids, mask

    def generation_prefill(self, **kwargs) -> str:
        """The reasoning tag, and what follows it, with which the generation prompt begins the assistant's answer.

        "<think>\\n" for newer R1 templates, "" for most: a completion's whole text is this plus what was sampled.
        """
        return self._prefill([{"role": "user", "content": "?"}], kwargs)

    def _prefill(self, messages: list[dict], kwargs: dict) -> str:
        with_prompt, without = self._render(messages, True, kwargs), self._render(messages, False, kwargs)
        added = with_prompt[len(os.path.commonprefix([with_prompt, without])) :]
        tag = re.search("</?think>", added)
        return added[tag.start() :] if tag else ""

    def _turn(self, messages: list[dict], kwargs: dict) -> tuple[str, str, str]:
        """(what stands before, the content, what the template puts after) of the last message, the assistant's."""
        *before, last = messages
        body = last["content"]
        shown = self._render([*before, {**last, "content": _HOLE}], False, kwargs).split(_HOLE)
        if len(shown) != 2:
            raise ValueError(f"the chat template shows the assistant's content {len(shown) - 1} times instead of once")
        if "</think>" not in body:
            return shown[0], body, shown[1]
        prefill = self._prefill(before, kwargs)
        if "</think>" in prefill:
            raise ValueError(f"the template's generation prompt ends the reasoning ({prefill!r}) but the assistant's message "
                             "reasons; pass the template's switch (thinking=True, enable_thinking=True, ...)")
        for opening in (prefill, prefill.rstrip()):
            if opening and body.lstrip().startswith(opening):
                body = body.lstrip()[len(opening) :]
                break
        return self._render(before, True, kwargs), body, shown[1]

    def _guarded_message(self, message: dict) -> dict:
        if message.get("role") != "assistant":
            return self._guarded(message)
        message = self._guarded(message, keep=TAGS)
        reasoning = message.pop("reasoning_content", None)
        if reasoning:
            message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message.get('content') or ''}"
        return message

    def _guarded(self, value, keep: tuple[str, ...] = ()):
        """`value` with a noncharacter inside every text that an added token would match, at any depth."""
        if isinstance(value, dict):
            return {k: self._guarded(v, keep) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guarded(v, keep) for v in value]
        if not isinstance(value, str):
            return value
        value = value.replace(_GUARD, "\ufffd").replace(_HOLE, "\ufffd")
        return self._any.sub(lambda m: m[0] if m[0] in keep else m[0][0] + _GUARD + m[0][1:], value)

    def _render(self, messages: list[dict], add_generation_prompt: bool, kwargs: dict) -> str:
        if not self.chat_template:
            raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template (such as R1_ZERO_TEMPLATE)")
        names = {name: self._text_of(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        variables = {"tools": None, "documents": None} | names | self._guarded(kwargs)
        try:
            return _compiled(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except (jinja2.TemplateError, TypeError) as e:
            raise ValueError(f"the chat template fails: {e}") from e


class Stream:
    """Decodes ids as they come. `add(id)` returns the text that is complete so far, never half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._tokenizer, self._skip = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, i: int) -> str:
        return self._decoder.decode(self._tokenizer._bytes_of(i, self._skip))

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD; the stream can be used again."""
        return self._decoder.decode(b"", final=True)


# ---- Pieces of the Hugging Face form ----


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The pair that merging joins last to make `token`, or None where merging never makes it.

    No other pair can make it: merges inside the stretch of a text that becomes `token` go as they do in `token` alone.
    """
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        candidates = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:])]
        best = min(candidates)
        if best == limit:
            return None
        i = candidates.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def _words_pattern(ranks: dict[bytes, int]) -> str:
    """Any listed word, the longest first, or any one character."""
    words = sorted((token.decode() for token in ranks if len(token) > 1), key=lambda w: (-len(w), w))
    return "|".join([*map(re.escape, words), r"[\s\S]"])


def _pattern(pre_tokenizer: dict, ranks: dict[bytes, int]) -> str:
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    regexes = tuple(s["pattern"]["Regex"] for s in steps[:-1])
    for known, pattern in PATTERNS.values():
        if regexes == known:
            return pattern
    return regexes[0]


def _uses_nfc(normalizer: dict | None) -> bool:
    return normalizer is not None


def _added_token(text: str, i: int, special: bool = True) -> dict:
    return {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": special}


def _spec(added_tokens: list[dict], regexes: tuple[str, ...], nfc: bool = False) -> dict:
    """A tokenizer.json without its model."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in regexes]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens,
            "normalizer": {"type": "NFC"} if nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]},
            "post_processor": None, "decoder": level}


def _any_of(texts) -> re.Pattern:
    """Matches any of `texts`, the longest first, in one group; nothing where there is none."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)") + ")")


def _read_json(path: Path, default=None):
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not JSON: {e}") from e


# ---- Jinja, as transformers sets it up ----


class _GenerationTag(jinja2.ext.Extension):
    """Accepts {% generation %} ... {% endgeneration %}; what is trained on is found without it."""
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


@lru_cache
def _compiled(template: str) -> jinja2.Template:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag])
    env.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False} | options)
    env.globals |= {"raise_exception": _raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    return env.from_string(template)
