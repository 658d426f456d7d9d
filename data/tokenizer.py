"""Byte-level BPE tokenizers on tiktoken, read from and written to Hugging Face's files with identical ids.

    tok = Tokenizer.from_pretrained("Qwen/Qwen2.5-1.5B")          # a folder or a hub id
    tok = Tokenizer.from_pretrained("Qwen/Qwen2.5-1.5B", "r1_zero")  # with another chat template
    tok = Tokenizer.from_words(["10", "11", " plus"], ["<|user|>", "<|assistant|>", "<|end|>"], eos="<|end|>")
    tok.encode("text"), tok.decode(ids), tok.apply_chat_template(messages)

In each piece of text that its pattern cuts out, tiktoken joins the adjacent pair that makes the token of lowest id,
over and over; a Hugging Face BPE follows its list of merges. `_check_merges` refuses a file where the two could differ,
and PATTERNS holds the pre-tokenizers that are accepted: regex engines differ, so each was compared before.
"""
import base64
import codecs
import hashlib
import json
import os
import re
import unicodedata
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import tiktoken

from data.source import REASONING_KEYS, parts_of

_CONTRACTED, _DIGITS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\p{N}{1,3}"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2, _LLAMA3 = (rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_REST}" for digits in (r"\p{N}", _DIGITS))
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_WORDS = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}{_CONTRACTED}?" for a, b in ("*+", "+*"))
_KIMI = "|".join([r"[\p{Han}]+", *_WORDS, _DIGITS, _REST])
_CJK, _PUNCTUATED = "一-龥぀-ゟ゠-ヿ", r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK_V3 = "|".join([  # its third step sees the runs of _CJK, and what digits and they leave, each by itself
    _DIGITS,
    rf"[[^\p{{L}}\p{{P}}\p{{S}}]&&[{_CJK}]]?[[\p{{L}}\p{{M}}]&&[{_CJK}]]+",
    rf"[[\p{{P}}\p{{S}}]&&[{_CJK}]]+",
    rf"[[^\p{{L}}\p{{M}}\p{{P}}\p{{S}}]&&[{_CJK}]]+(?![[\p{{L}}\p{{M}}]&&[{_CJK}]])",
    _PUNCTUATED,
    rf"[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}]?[[\p{{L}}\p{{M}}]--[{_CJK}]]+",
    rf" ?[[\p{{P}}\p{{S}}]--[{_CJK}]]+[\r\n]*",
    rf"\s*[\r\n]+|\s+(?![^\s\p{{N}}{_CJK}])|\s+",
    rf"[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}{_CJK}]+(?![[\p{{L}}\p{{M}}]--[{_CJK}]])",  # what no step matches
])
# Name -> (the regexes of the Split steps, one pattern that cuts the same pieces under tiktoken).
PATTERNS = {
    "gpt2": ((_GPT2,), _GPT2),
    "qwen2": ((_QWEN2,), _QWEN2),
    "llama3": ((_LLAMA3,), _LLAMA3),
    "kimi": ((_KIMI,), _KIMI),
    "deepseek-v3": ((_DIGITS, f"[{_CJK}]+", _PUNCTUATED + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
                     r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), _DEEPSEEK_V3),
}

R1_ZERO_TEMPLATE = (
    "{{ bos_token }}A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>."
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ ' User: ' + m.content + '.' }}"
    "{% elif m.role == 'assistant' %}{{ ' Assistant:' + m.content }}{{ eos_token }}"
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

TEMPLATES = {"r1_zero": R1_ZERO_TEMPLATE, "toy": TOY_TEMPLATE}

# Tags that the assistant itself writes: in its messages they become the tokenizer's own tokens, and decode keeps them.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>")
_EMPTY = re.compile(r"\s*(?:<think>)?\s*</think>")  # reasoning that holds nothing
_GUARD, _HOLE = "\ufdd0", "\ufdd1"  # noncharacters; in messages they are replaced

_USER = {"role": "user", "content": "?"}
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

# GPT-2's way of writing bytes as visible characters: printable Latin-1 as itself, the others from U+0100 on.
_VISIBLE = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
_VISIBLE |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in _VISIBLE)}
_BYTE = {c: b for b, c in _VISIBLE.items()}


class Tokenizer:
    """A tiktoken encoding with its added tokens, chat template and stop tokens.

    special_tokens: text -> id of every added token; vocab_size: highest id + 1; bos_id, eos_id: int or None;
    chat_template: Jinja text or None, free to be set; template_args: what every rendering of it is
    given, as {"enable_thinking": False}, unless a call says otherwise; date: the datetime that
    templates print as today's; stop_ids: ids that end a completion, among them the one that ends
    the template's assistant turn;
    generation: what the folder's generation_config.json recommends (temperature, top_p, ...).
    """

    def __init__(self, ranks: dict[bytes, int], spec: dict, config: dict, stop_ids: list[int] | None = None):
        """`ranks`: bytes -> id; `spec`: a tokenizer.json less its model; `config`: a tokenizer_config.json."""
        self.ranks, self.spec, self.config = ranks, spec, config
        self.template_args, self.date = config.get("template_args") or {}, datetime.now()
        self.generation = {}
        self.special_tokens = _checked_added_tokens(spec["added_tokens"], ranks)
        self._nfc = _uses_nfc(spec.get("normalizer"))
        pattern = _pattern(spec["pre_tokenizer"], ranks)
        self._by_words = pattern == _words_pattern(ranks)
        self._encoding = tiktoken.Encoding("nanoR1", pat_str=pattern,
                                           mergeable_ranks=ranks, special_tokens=self.special_tokens)
        self._bytes = {i: token for token, i in ranks.items()}
        self._bytes |= {i: text.encode() for text, i in self.special_tokens.items()}
        self._control_ids = {i for text, i in self.special_tokens.items() if text not in TAGS}
        self._special = _any_of(self.special_tokens)
        self._before, self._after = (  # matched before and after normalisation
            _any_of(t["content"] for t in spec["added_tokens"] if t["normalized"] == flag) for flag in (False, True))
        self._named = {name: value["content"] if isinstance(value, dict) else value for name, value in config.items()
                       if value and name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.vocab_size = max(self._bytes) + 1
        ids = {token.decode(errors="replace"): i for i, token in self._bytes.items()}
        ends = config.get("stop_tokens", [t for t in (self._named.get("eos_token"), *_ENDS) if t in ids])
        bos, eos = (self._named.get(name) for name in ("bos_token", "eos_token"))
        for text in (bos, eos, *ends):
            if text is not None and text not in ids:
                raise ValueError(f"{text!r}, which the configuration names, is not in the vocabulary")
        self.bos_id, self.eos_id = ids.get(bos), ids.get(eos)
        self._ends = stop_ids or sorted({ids[t] for t in ends})
        self.chat_template = config.get("chat_template")

    @property
    def chat_template(self) -> str | None:
        return self._template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self._template, self.turn_end = template, None
        try:
            tail = self._around([_USER, {"role": "assistant"}], 1, {})[1]
            found = (m[0] for m in self._special.finditer(tail) if m[0] not in TAGS)
            self.turn_end = next(found, None)
        except ValueError:  # none, or one that fails: rendering says so
            pass
        end = [self.special_tokens[self.turn_end]] if self.turn_end else []
        self.stop_ids = list(dict.fromkeys([*self._ends, *end]))

    # ---- Construction and files ----

    @classmethod
    def from_words(cls, words: list[str], special_tokens: list[str], pattern: str | None = None,
                   chat_template: str | None = TOY_TEMPLATE, bos: str | None = None, eos: str | None = "<|end|>",
                   stop: list[str] | None = None) -> "Tokenizer":
        """Ids 0-255 are the bytes, then come `words` (those of one byte are there already), then `special_tokens`.

        Without a `pattern` (a name in PATTERNS) every word is one token wherever it stands, the longest word first, and
        all other text is bytes: with the words "12" and " plus", "312 plus" becomes "3", "12", " plus". With one, a
        piece that it cuts out and that is a word is one token.
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
            config["stop_tokens"] = [*stop, *filter(None, [eos])]
        return cls(ranks, _spec(special_tokens, len(ranks), regexes), config)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, chat_template: str | None = None,
                        template_args: dict | None = None) -> "Tokenizer":
        """Reads a folder or a hub id: tokenizer.json, else vocab.json + merges.txt, else a tiktoken table.

        chat_template: a name in TEMPLATES or a file, in place of the folder's own; template_args:
        over those saved with it. Raises ValueError, naming the folder and the reason, for a
        tokenizer that tiktoken cannot represent exactly, a template that is not there, and an
        argument that it does not read.
        """
        other, folder = _template_of(chat_template), _local_folder(source)
        try:
            config = _read_json(folder / "tokenizer_config.json", {})
            template = config.get("chat_template")
            if (folder / "chat_template.jinja").exists():
                config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
            elif isinstance(template, list):
                config["chat_template"] = {t["name"]: t["template"] for t in template}.get("default")
            config["chat_template"] = other or config.get("chat_template")
            config["template_args"] = config.get("template_args", {}) | (template_args or {})
            _check_arguments(config["chat_template"], template_args or {})
            ranks, spec = _read_files(folder, config)
            generation = _read_json(folder / "generation_config.json", {})
            stop_ids = generation.get("eos_token_id")
            stop_ids = stop_ids if isinstance(stop_ids, list) or stop_ids is None else [stop_ids]
            if not all(type(i) is int for i in stop_ids or ()):
                raise ValueError(f"eos_token_id {stop_ids} in generation_config.json is not of ids")
            tokenizer = cls(ranks, spec, config, stop_ids)
            tokenizer.generation = generation
            return tokenizer
        except ValueError as e:
            raise ValueError(f"tokenizer in {folder}: {e}") from e
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"tokenizer in {folder} is malformed: {e!r}") from e

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json, which from_pretrained and transformers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokens = sorted(self.ranks, key=self.ranks.get)
        visible = {token: "".join(map(_VISIBLE.__getitem__, token)) for token in tokens}
        merges = filter(None, (_last_merge(token, self.ranks) for token in tokens if len(token) > 1))
        # Added tokens are listed in the vocabulary too: the tokenizers library numbers anew those that are not.
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                 "vocab": {visible[token]: i for token, i in self.ranks.items()} | self.special_tokens,
                 "merges": [[visible[a], visible[b]] for a, b in merges]}
        config = {k: v for k, v in self.config.items() if k not in ("auto_map", "added_tokens_decoder")}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.chat_template,
                   "template_args": self.template_args,
                   "stop_tokens": [self.decode([i]) for i in self.stop_ids if i in self._bytes]}
        generation = self.generation | {"eos_token_id": self.stop_ids} | ({} if self.bos_id is None else {"bos_token_id": self.bos_id})
        for name, data in (("tokenizer.json", self.spec | {"model": model}), ("tokenizer_config.json", config),
                           ("generation_config.json", generation)):
            (folder / name).write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """A hash of all that the ids and the mask of a chat depend on."""
        digest = hashlib.sha256()
        for token, i in sorted(self.ranks.items()):
            digest.update(b"%d %d " % (i, len(token)) + token)
        template = self.chat_template or ""
        formats = re.findall(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)", template)
        dated = [self.date.strftime(a or b) for a, b in formats]
        if template.count("strftime_now(") > len(formats):  # of a format that is not plain to see
            dated = self.date.isoformat()
        rest = [self.spec, self._named, template, self.template_args, dated]
        digest.update(json.dumps(rest, sort_keys=True).encode())
        return digest.hexdigest()

    def check_model(self, vocab_size: int, where: str) -> None:
        """ValueError unless a model with an embedding of `vocab_size` rows can be this tokenizer's: rows for all tokens, and no more rows
        without one than come from rounding up."""
        spare = vocab_size - self.vocab_size
        if spare < 0 or spare > max(1024, vocab_size // 10):
            raise ValueError(f"{where} do not belong together: the tokenizer has {self.vocab_size} tokens, the model an embedding of {vocab_size}")

    def ids_without_token(self, vocab_size: int) -> list[int]:
        """The ids of an embedding of `vocab_size` rows that stand for no token, and no end."""
        return sorted(set(range(vocab_size)) - self._bytes.keys() - set(self.stop_ids))

    # ---- Text to ids and back ----

    def encode(self, text: str) -> list[int]:
        """Ordinary text to ids, none added before or after; text that looks like an added token stays text."""
        return self._encoding.encode_ordinary(self._normalized(text))

    def spelled(self, text: str) -> list[str]:
        """The parts of `text` that a tokenizer of words (from_words without a pattern) has no word
        for and spells in bytes, which its model has hardly seen; none for other tokenizers."""
        if not self._by_words:
            return []
        runs = groupby(self.encode(text), lambda i: len(self._bytes[i]) == 1)
        return [self.decode(list(run)) for in_bytes, run in runs if in_bytes]

    def encode_with_specials(self, text: str, _drop: str = "") -> list[int]:
        """Text whose added tokens are meant as such (a rendered template) to ids."""
        ids = []
        for i, piece in enumerate(self._before.split(text)):  # odd pieces are the tokens
            for j, part in enumerate([piece] if i % 2 else self._after.split(self._normalized(piece))):
                token = self.special_tokens.get(part) if i % 2 or j % 2 else None
                ids += self._encoding.encode_ordinary(part.replace(_drop, "")) if token is None else [token]
        return ids

    def encode_assistant(self, text: str) -> list[int]:
        """Text as the assistant writes it (a sample, a prefill) to ids: TAGS become tokens, the rest is ordinary."""
        return self.encode_with_specials(self._guarded(text, TAGS), _GUARD)

    def _normalized(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._nfc else text

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Ids to text; broken UTF-8 and ids without a token (padding of the embedding) become U+FFFD.

        `skip_special` leaves out the added tokens except the tags in TAGS.
        """
        return b"".join(self._bytes_of(i, skip_special) for i in ids).decode("utf-8", errors="replace")

    def _bytes_of(self, i: int, skip_special: bool) -> bytes:
        if i < 0:
            raise ValueError(f"token id {i} is negative")
        return b"" if skip_special and i in self._control_ids else self._bytes.get(i, "\ufffd".encode())

    def stream(self, skip_special: bool = False) -> "Stream":
        """A decoder of one id at a time: the texts of .add(id) and .flush() join to decode(ids)."""
        return Stream(self, skip_special)

    # ---- Chat ----

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False,
                            **kwargs) -> tuple[list[int], list[int]]:
        """Renders `messages` (dicts with role and content) and returns (ids, mask), lists of equal length.

        The mask is 1 on what the assistant is to be trained to write: all that follows the prompt
        that sampling has, up to the token that ends its turn. A last turn whose content reasons
        (holds "</think>") stands as sampling would have made it: whole, less the text which the
        prompt prefills. Earlier turns stand as the template shows history, without outer space that
        it trims and a reasoning block that it puts before the last turn alone. Where it changes
        more (R1's drops reasoning) they are context, mask 0, and so is a turn that does not begin
        as the prompt does (no reasoning after a prefilled "<think>"). `document` says which.

        Added tokens come from the template alone. In messages their text is encoded as ordinary text, except that the
        assistant's TAGS become tokens, since it is trained to write them. No token straddles the start of what the
        assistant writes, as none can when sampling.

        `kwargs` go to the template (tools=, enable_thinking=, ...), over template_args. Raises
        ValueError for a template that is missing, fails, or does not show the assistant's content
        once, and for messages without a role.
        """
        return self.document(messages, add_generation_prompt, **kwargs)[:2]

    def document(self, messages: list[dict], add_generation_prompt: bool = False,
                 **kwargs) -> tuple[list[int], list[int], list[str | None]]:
        """ids and mask of apply_chat_template, and for each turn of the assistant's None, or why it
        carries no loss."""
        messages = [self._guarded_message(m) for m in messages]
        ends_with_assistant = bool(messages) and messages[-1]["role"] == "assistant"
        if ends_with_assistant and (add_generation_prompt or not isinstance(messages[-1].get("content"), str)):
            raise ValueError("the last message is the assistant's: it takes text as content and no generation prompt")
        places = [k for k, m in enumerate(messages) if not add_generation_prompt
                  and m["role"] == "assistant" and isinstance(m.get("content"), str)]
        turns = [self._turn(messages[: k + 1], kwargs, k == len(messages) - 1) for k in places]
        if ends_with_assistant:
            text = "".join(turns[-1][:3])
        else:
            text = self._render(messages, add_generation_prompt, kwargs)
        ids, mask, reasons, done = [], [], [], 0
        for k, (start, written, _, reason) in zip(places, turns):
            if reason is None and not text.startswith(start + written):
                start, written, reason = self._in_history(messages, k, text, kwargs)
            reasons.append(reason)
            if reason is None:
                for part, flag in ((text[done : len(start)], 0), (written, 1)):
                    ids += self.encode_with_specials(part, _GUARD)
                    mask += [flag] * (len(ids) - len(mask))
                done = len(start + written)
        ids += self.encode_with_specials(text[done:], _GUARD)
        return ids, mask + [0] * (len(ids) - len(mask)), reasons

    def generation_prefill(self, messages: list[dict] = (_USER,), **kwargs) -> str:
        """The reasoning tag, and what follows it, with which the generation prompt begins the assistant's answer.

        "<think>\n" for newer R1 templates, "" for most: a completion's whole text is this plus what was sampled.
        """
        return self._prompt(messages, kwargs)[1]

    def _prompt(self, messages: list[dict], kwargs: dict) -> tuple[str, str]:
        """The messages with the generation prompt, and of that the reasoning which it begins."""
        prompt, without = (self._render(messages, flag, kwargs) for flag in (True, False))
        added = prompt[len(os.path.commonprefix([prompt, without])) :]
        tag = re.search("</?think>", added)
        return prompt, added[tag.start() :] if tag else ""

    def _around(self, messages: list[dict], k: int, kwargs: dict) -> tuple[str, str]:
        """What the template puts before and after the content of message k, the assistant's; all
        of it and nothing where that calls tools and its content is not shown."""
        messages = [*messages[:k], {**messages[k], "content": _HOLE}, *messages[k + 1 :]]
        shown = self._render(messages, False, kwargs).split(_HOLE)
        if len(shown) == 1 and messages[k].get("tool_calls"):
            return shown[0], ""
        if len(shown) != 2:
            raise ValueError(f"the chat template shows the assistant's content {len(shown) - 1} times instead of once")
        return shown[0], shown[1]

    def _end_of_turn(self, tail: str) -> str:
        """Of what follows the assistant's content, the part up to the token that ends its turn; ""
        where none does."""
        at = tail.find(self.turn_end) if self.turn_end else -1
        if at >= 0:
            return tail[: at + len(self.turn_end)]
        return next((tail[: m.end()] for m in self._special.finditer(tail) if m[0] not in TAGS), "")

    def _turn(self, messages: list[dict], kwargs: dict,
              final: bool) -> tuple[str, str, str, str | None]:
        """(the prompt, what the assistant writes, what the template puts after) of the last
        message, the assistant's, and None, or why that is no example of what is sampled. `final`:
        nothing follows it."""
        *before, last = messages
        whole, body = self._render(messages, False, kwargs), last["content"]
        start, tail = self._around(messages, len(before), kwargs)
        shown, end = whole.removesuffix(tail), self._end_of_turn(tail)
        silent = {key: value for key, value in last.items() if key != "tool_calls"}
        if last.get("tool_calls") and whole == self._render([*before, silent], False, kwargs):
            return whole, "", "", "the chat template does not show their calls of tools"
        try:
            prompt, prefill = self._prompt(before, kwargs)
        except ValueError:  # a conversation that the assistant begins: nothing is sampled so
            prompt, prefill = start, ""
        hidden = start == whole  # of a call of tools Llama's template shows no content
        bare = not body.strip() and not shown.startswith(start)  # others no line before it
        if (hidden or bare or not whole.endswith(tail)) and whole.startswith(prompt):
            rest = whole[len(prompt) :]  # it depends on the content
            end = self._end_of_turn(rest)
            return prompt, end or rest, rest.removeprefix(end or rest), None
        if hidden or bare:
            return whole, "", "", f"they do not begin as the generation prompt ends ({prefill!r})"
        tag, after = prefill.rstrip(), tail.removeprefix(end)
        kept = shown.startswith(prompt) and shown[len(prompt) :].strip() == body.strip()
        begun = bool(tag) and body.lstrip().startswith(tag)
        if kept:
            body = shown[len(prompt) :]
        elif begun:
            body = body.lstrip().removeprefix(tag).removeprefix(prefill.removeprefix(tag))
        if "</think>" in body and "</think>" in prefill:
            if not final:
                reason = f"they reason after a prompt that ends reasoning ({prefill!r})"
                return whole, "", "", reason
            raise ValueError("the assistant's message reasons, but the prompt before it ends "
                             f"reasoning ({prefill!r}); pass the template's switch in "
                             "template_args (thinking=True, enable_thinking=True, ...)")
        if kept or begun or "</think>" in body:
            return prompt, body + end, after, None
        if shown.startswith(prompt):  # perhaps with an empty reasoning block, which it then writes
            return prompt, shown[len(prompt) :] + end, after, None
        if prefill:
            return whole, "", "", f"they do not begin with the generation prompt's {prefill!r}"
        return prompt, shown.removeprefix(start) + end, after, None

    def _in_history(self, messages: list[dict], k: int, text: str,
                    kwargs: dict) -> tuple[str, str, str | None]:
        """(what stands before, what the assistant writes) of message k where it stands in `text`,
        and None, or why that is no example to train on."""
        (start, tail), body = self._around(messages, k, kwargs), messages[k]["content"]
        whole, written = self._render(messages, False, kwargs), ""
        if not body.strip():  # a call of tools may begin otherwise without text before it
            tail = whole.removeprefix(start)
        end = self._end_of_turn(tail)
        if whole.startswith(start) and whole.endswith(tail):
            written = whole[len(start) : len(whole) - len(tail)]
        said = _EMPTY.sub("", body, 1) if _EMPTY.match(body) else body
        same = written.strip() in (body.strip(), said.strip())
        if same and start != whole and text.startswith(start + written + end):
            return start, written + end, None
        dropped = "</think>" in body and "</think>" not in written
        what = "drops their reasoning from" if dropped else "changes their text in"
        return "", "", f"the chat template {what} the history"

    def _guarded_message(self, message: dict) -> dict:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {message!r} is not a dict with a role")
        message = self._guarded(message, TAGS if message["role"] == "assistant" else ())
        beside = any(message.get(key) for key in REASONING_KEYS)
        if message["role"] == "assistant" and beside:
            reasoning, answer = parts_of(message)
            message = {k: v for k, v in message.items() if k not in REASONING_KEYS}
            message["content"] = f"<think>\n{reasoning}\n</think>\n\n{answer}"
        return message

    def _guarded(self, value, keep: tuple[str, ...]):
        """`value` with a noncharacter inside every text that an added token would match, at any depth."""
        if isinstance(value, dict):
            return {k: self._guarded(v, keep) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guarded(v, keep) for v in value]
        if not isinstance(value, str):
            return value
        value = value.replace(_GUARD, "\ufffd").replace(_HOLE, "\ufffd")
        return self._special.sub(lambda m: m[0] if m[0] in keep else m[0][0] + _GUARD + m[0][1:], value)

    def _render(self, messages: list[dict], add_generation_prompt: bool, kwargs: dict) -> str:
        if not self.chat_template:
            raise ValueError("the tokenizer has no chat template; set .chat_template (R1_ZERO_TEMPLATE, ...)")
        variables = {"tools": None, "documents": None} | self._named
        variables["strftime_now"] = self.date.strftime
        variables |= self._guarded(self.template_args | kwargs, ())
        try:
            return _compiled(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except Exception as e:  # a template is foreign code
            raise ValueError(f"the chat template fails: {e}") from e


class Stream:
    """Decodes ids as they come, never half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, i: int) -> str:
        """The text that id `i` completes."""
        return self._decoder.decode(self._tokenizer._bytes_of(i, self._skip_special))

    def flush(self) -> str:
        """U+FFFD for a character left unfinished; the stream can be used again."""
        return self._decoder.decode(b"", final=True)


# ---- The Hugging Face form, read and checked ----


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The pair that tiktoken joins last to make `token` of bytes, or None where merging never makes it.

    No other pair can make it: merges inside a stretch of text that becomes `token` go as they do in `token` alone.
    """
    parts, never = [token[i : i + 1] for i in range(len(token))], float("inf")
    costs = [ranks.get(a + b, never) for a, b in zip(parts, parts[1:])]
    while len(parts) > 2:
        i = costs.index(min(costs))
        if costs[i] == never:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del costs[i]
        for j in range(max(i - 1, 0), min(i + 1, len(costs))):
            costs[j] = ranks.get(parts[j] + parts[j + 1], never)
    return tuple(parts)


def _check_merges(ranks: dict[bytes, int], merges: list[tuple[bytes, ...]], ignore_merges: bool) -> None:
    """ValueError unless tiktoken's merging, by lowest id, gives what following `merges` in order gives.

    It does where ids grow with the merges, where the merge by which tiktoken makes a token is listed for every token,
    and where tokens that no merge makes are yet taken as whole pieces (ignore_merges), as tiktoken takes them.
    """
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise ValueError(f"{len(missing)} of the 256 bytes have no token (the first is {missing[0]})")
    last = -1
    for pair in merges:
        i = ranks.get(b"".join(pair))
        if i is None or len(pair) != 2 or not all(part in ranks for part in pair):
            raise ValueError(f"merge {pair} is not of two ordinary tokens into a third")
        if i < last:
            raise ValueError(f"merge {pair} gives id {i} after a merge that gives {last}, but tiktoken merges by id")
        last = i
    listed = set(merges)
    for token in ranks:
        pair = _last_merge(token, ranks) if len(token) > 1 else None
        if pair and pair not in listed:
            raise ValueError(f"tiktoken would make token {token} by {pair}, which is not among the merges")
        if len(token) > 1 and not pair and not ignore_merges:
            raise ValueError(f"no merges make token {token}, but tiktoken would use it as a whole piece")


def _checked_added_tokens(added: list[dict], ranks: dict[bytes, int]) -> dict[str, int]:
    """text -> id; ValueError for tokens that would be matched in a way of their own, or that are not unique."""
    for t in added:
        flags = [f for f in ("lstrip", "rstrip", "single_word") if t[f]]
        if flags or len(t["content"]) < 2:
            raise ValueError(f"added token {t['content']!r} ({', '.join(flags) or 'too short'}) is not supported")
    specials = {t["content"]: t["id"] for t in added}
    if len({*specials.values(), *ranks.values()}) < len(added) + len(ranks):
        raise ValueError("two tokens share an id or a text; every token needs its own")
    return specials


def _uses_nfc(normalizer: dict | None) -> bool:
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    unknown = [n["type"] for n in steps if n["type"] != "NFC"]
    if unknown:
        raise ValueError(f"normalizer {unknown[0]} is not supported; only NFC is")
    return bool(steps)


def _words_pattern(ranks: dict[bytes, int]) -> str:
    """Any token of more than one byte, the longest first, or any one character."""
    words = sorted((token.decode(errors="replace") for token in ranks if len(token) > 1), key=lambda w: (-len(w), w))
    return "|".join([*map(re.escape, words), r"[\s\S]"])


def _pattern(pre_tokenizer: dict | None, ranks: dict[bytes, int]) -> str:
    """The pattern for tiktoken; ValueError naming the pre-tokenizer that is not known."""
    *splits, level = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    if not level or level["type"] != "ByteLevel" or level.get("add_prefix_space", True):
        raise ValueError(f"pre-tokenizer {json.dumps(level)} is unknown; the last step must be ByteLevel, unprefixed")
    plain = all(s["type"] == "Split" and s["behavior"] == "Isolated" and not s["invert"] for s in splits)
    regexes = [s["pattern"].get("Regex", "") for s in splits if plain]
    if level.get("use_regex", True):
        regexes.append(_GPT2)  # ByteLevel then splits by itself
    known = dict(PATTERNS.values()).get(tuple(r.replace("\r", r"\r").replace("\n", r"\n") for r in regexes))
    if not known and regexes == [_words_pattern(ranks)]:
        known = regexes[0]
    if not plain or not known:
        raise ValueError(f"pre-tokenizer {json.dumps(splits or level, ensure_ascii=False)} is unknown; "
                         f"known are those of {', '.join(PATTERNS)} and from_words")
    return known


def _spec(added_tokens: list[str], first_id: int, regexes: tuple[str, ...], nfc: bool = False) -> dict:
    """A tokenizer.json without its model."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in regexes]
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": first_id + i, "content": text} | _FLAGS for i, text in enumerate(added_tokens)],
            "normalizer": {"type": "NFC"} if nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]},
            "post_processor": None, "decoder": level}


def _any_of(texts) -> re.Pattern:
    """Matches any of `texts`, the longest first, in one group; nothing where there is none."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)") + ")")


def _llama3_names(first: int) -> list[str]:
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id", 7: "end_header_id",
             8: "eom_id", 9: "eot_id", 10: "python_tag"}
    reserved = iter(range(256))
    return [f"<|{named.get(i) or f'reserved_special_token_{next(reserved)}'}|>" for i in range(256)]


# Files that do not say how they split text -> tokenizer_class -> (pattern, NFC, texts of the added tokens that follow a
# table of n tokens, named tokens). What tokenizer_config.json says goes before these.
_FILES = {
    "merges.txt": {"Qwen2Tokenizer": ("qwen2", True, None, {}), "GPT2Tokenizer": ("gpt2", False, None, {})},
    "tiktoken.model": {"TikTokenTokenizer": (
        "kimi", False, lambda n: [f"<|reserved_token_{i}|>" for i in range(n, n + 256)], {})},
    "tokenizer.model": {"PreTrainedTokenizer": (
        "llama3", False, _llama3_names, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"})},
    "qwen.tiktoken": {"QWenTokenizer": (
        "qwen2", True, lambda n: ["<|endoftext|>", "<|im_start|>", "<|im_end|>",
                                  *(f"<|extra_{i}|>" for i in range(205))], {"eos_token": "<|endoftext|>"})},
}


def _read_files(folder: Path, config: dict) -> tuple[dict[bytes, int], dict]:
    """(ranks, spec) of the first of tokenizer.json and _FILES that the folder holds; completes `config`."""
    name = next((name for name in ("tokenizer.json", *_FILES) if (folder / name).exists()), None)
    if name is None:
        raise ValueError(f"there is no tokenizer.json, vocab.json + {', '.join(_FILES)}")
    if name == "tokenizer.json":
        spec = _read_json(folder / name)
        model = spec.pop("model")
    else:
        owner = (config.get("tokenizer_class") or [*_FILES[name]][0]).removesuffix("Fast")
        if owner not in _FILES[name]:
            raise ValueError(f"{name} of tokenizer_class {owner!r} is unknown; known: {', '.join(_FILES[name])}")
        pattern, nfc, texts, named = _FILES[name][owner]
        config |= named | config
        ranks = _read_table(folder / name) if texts else {}
        spec = _spec(texts(len(ranks)) if texts else [], len(ranks), PATTERNS[pattern][0], nfc)
    if name == "merges.txt":
        lines = (folder / name).read_text(encoding="utf-8").split("\n")
        model = {"type": "BPE", "vocab": _read_json(folder / "vocab.json"),
                 "merges": [line for line in lines if line and not line.startswith("#version")]}
    added = {t["id"]: t for t in spec["added_tokens"]}
    added |= {int(i): {"id": int(i)} | _FLAGS | t for i, t in config.get("added_tokens_decoder", {}).items()}
    spec["added_tokens"] = [added[i] for i in sorted(added)]
    if name in ("tokenizer.json", "merges.txt"):
        ranks = _read_bpe(model, {t["content"] for t in added.values()})
    return ranks, spec


def _read_bpe(model: dict, added: set[str]) -> dict[bytes, int]:
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    found = [f"{k}={model[k]}" for k in ("type", *options) if model.get(k)]
    if found != ["type=BPE"]:
        raise ValueError(f"a model of {', '.join(found)} is not a plain byte-level BPE")
    vocab = {text: i for text, i in model["vocab"].items() if text not in added}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    try:
        ranks = {bytes(map(_BYTE.__getitem__, text)): i for text, i in vocab.items()}
        merges = [tuple(bytes(map(_BYTE.__getitem__, text)) for text in pair) for pair in pairs]
    except KeyError as e:
        raise ValueError(f"{e} in the vocabulary is not a character of the byte-level alphabet") from e
    _check_merges(ranks, merges, model.get("ignore_merges", False))
    return ranks


def _read_table(path: Path) -> dict[bytes, int]:
    """A tiktoken table: lines of base64, space, rank."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as e:
            raise ValueError(f"{path.name}:{number} is not 'base64 rank' (a SentencePiece model?)") from e
    return ranks


def _local_folder(source: str | os.PathLike) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    names = ["tokenizer*", "chat_template.jinja", "generation_config.json", "vocab.json", *_FILES]
    name, _, revision = str(source).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=names, ignore_patterns=["*/*"]))
    except Exception as e:  # of the hub, of its HTTP client, of the disk
        raise ValueError(f"{source} is no folder here, and the hub gave no tokenizer: {' '.join(str(e).split())[:300]}") from e


def _read_json(path: Path, default=None):
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path.name} is not JSON: {e}") from e


# ---- Jinja, as transformers sets it up ----


class _GenerationTag(jinja2.ext.Extension):
    """Accepts {% generation %} ... {% endgeneration %}; what is trained on is found without it."""
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_EXTENSIONS = [jinja2.ext.loopcontrols, _GenerationTag]


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


@lru_cache
def _compiled(template: str) -> jinja2.Template:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=_EXTENSIONS)
    env.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False} | options)
    env.globals["raise_exception"] = _raise_exception
    return env.from_string(template)


def _template_of(name: str | None) -> str | None:
    """The text of a template by its name in TEMPLATES or its file."""
    if name is None or name in TEMPLATES:
        return TEMPLATES.get(name)
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as e:
        known = ", ".join(TEMPLATES)
        raise ValueError(f"chat_template={name!r} is neither one of {known} nor a file: {e}") from e


def _check_arguments(template: str | None, arguments: dict) -> None:
    """ValueError for a name that the template does not read."""
    try:
        tree = jinja2.Environment(extensions=_EXTENSIONS).parse(template or "")
        names = {node.name for node in tree.find_all(jinja2.nodes.Name)}
    except jinja2.TemplateSyntaxError as e:
        raise ValueError(f"the chat template fails: {e}") from e
    if unknown := arguments.keys() - names:
        raise ValueError(f"template_args: the chat template reads no {min(unknown)!r}, but "
                         + ", ".join(sorted(names)))
