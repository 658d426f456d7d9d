r"""
BPE tokenizers, read from and written to Hugging Face's files with equal ids.

    tok = Tokenizer.from_pretrained('Qwen/Qwen2.5-1.5B')               # a folder or a hub id
    tok = Tokenizer.from_pretrained('Qwen/Qwen2.5-1.5B', 'r1_zero')    # with another chat template
    tok = Tokenizer.from_words(['10', '11', ' plus'], ['<|user|>', '<|assistant|>', '<|end|>'])
    tok.encode('text'), tok.decode(ids), tok.apply_chat_template(messages)

tiktoken encodes where it gives the same ids (data/bpe.py), and the tokenizers library does where it
does not (data/library_bpe.py, the extra [tokenizers]): digits one by one, bytes without a token,
words that hold their spaces.
"""
import codecs
import hashlib
import json
import os
import re
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from data import bpe, library_bpe
from data.source import REASONING_KEYS, parts_of

# ---- Chat templates ----

R1_ZERO_TEMPLATE = (
    '{{ bos_token }}A conversation between User and Assistant. The user asks a question, and the '
    'Assistant solves it. The assistant first thinks about the reasoning process in the mind and '
    'then provides the user with the answer. The reasoning process and answer are enclosed within '
    '<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process '
    'here </think> <answer> answer here </answer>.'
    '{% for m in messages %}'
    "{% if m.role == 'user' %}{{ ' User: ' + m.content + '.' }}"
    "{% elif m.role == 'assistant' %}{{ ' Assistant:' + m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('the R1-Zero template has no role ' + m.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' Assistant:' }}{% endif %}"
)
TOY_TEMPLATE = (
    '{% for m in messages %}'
    "{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>' + m.content + '<|end|>' }}"
    "{% else %}{{ raise_exception('the toy template has no role ' + m.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TEMPLATES = {'r1_zero': R1_ZERO_TEMPLATE, 'toy': TOY_TEMPLATE}

# Tags that the assistant itself writes: in its messages they become the tokenizer's own tokens,
# and decode keeps them.
TAGS = ('<think>', '</think>', '<answer>', '</answer>')
# Tokens that end a completion wherever a vocabulary has them.
_ENDS = ('<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<|end_of_text|>', '<|endoftext|>',
         '<｜end▁of▁sentence｜>')
_EMPTY_REASONING = re.compile(r'\s*(?:<think>)?\s*</think>')

# Noncharacters of Unicode, which messages may not hold: they are replaced there.
_GUARD = '\ufdd0'   # inside a text that would otherwise be read as an added token
_HOLE = '\ufdd1'    # in place of a content, to see where the template puts it

# Spaces as Unicode has them (str.isspace has four more)
_WHITE = ''.join(c for c in map(chr, range(0x3001)) if c.isspace() and not '\x1c' <= c <= '\x1f')

_USER = {'role': 'user', 'content': '?'}


class Turn(NamedTuple):
    """
    A turn of the assistant in a rendered conversation: prompt + written + after is the text that
    ends with the turn. written is what the assistant is to be trained to write; it is empty where
    `reason` says why the turn carries no loss.
    """
    prompt: str
    written: str
    after: str
    reason: str | None = None


class Tokenizer:
    """
    A BPE with its added tokens, chat template and stop tokens.

    special_tokens   text -> id of every added token but those of spaces alone, which are words
    vocab_size       highest id + 1
    bos_id, eos_id   int or None
    chat_template    Jinja text or None, free to be set
    template_args    what every rendering of the template is given, as {'enable_thinking': False},
                     unless a call says otherwise
    date             the datetime that templates print as today's
    stop_ids         ids that end a completion, among them the one that ends the template's
                     assistant turn (whose text is turn_end, or None)
    generation       what the folder's generation_config.json recommends (temperature, top_p, ...)
    """

    def __init__(self, encoding: 'bpe.TiktokenBPE | library_bpe.LibraryBPE', config: dict,
                 stop_ids: list[int] | None = None):
        """encoding: of ordinary text; config: a tokenizer_config.json."""
        self.encoding = encoding
        self.config = config
        self.template_args = config.get('template_args') or {}
        self.date = datetime.now()
        self.generation = {}

        # Text <-> ids
        bpe.check_added_tokens(encoding.added, encoding.tokens)
        matched = {t['id']: _as_matched(t, encoding) for t in encoding.added}
        self._added_ids = set(matched)
        self._bytes = encoding.tokens | {i: encoding.bytes_of_added(s) for i, s in matched.items()}
        self.vocab_size = max(self._bytes) + 1

        # Added tokens: text may hold those that are spaces, and only a template the others
        spaces = [t for t in encoding.added if bpe.is_space(t)]
        self.special_tokens = {t['content']: t['id'] for t in encoding.added if not bpe.is_space(t)}
        self._special = _any_of(self.special_tokens)
        self._all = _matchers(encoding, encoding.added)
        self._spaces = _matchers(encoding, spaces)
        self._control_ids = {i for text, i in self.special_tokens.items() if text not in TAGS}

        # Tokens that the configuration names
        self._named = _named_tokens(config)
        bos = self._named.get('bos_token')
        eos = self._named.get('eos_token')
        ids = {token.decode(errors='replace'): i for i, token in self._bytes.items()}
        ids |= self.special_tokens
        ends = config.get('stop_tokens', [text for text in (eos, *_ENDS) if text in ids])
        for text in (bos, eos, *ends):
            if text is not None and text not in ids:
                raise ValueError(f'{text!r}, which the configuration names, is not in the '
                                 'vocabulary')
        self.bos_id = ids.get(bos)
        self.eos_id = ids.get(eos)
        self._ends = stop_ids or sorted({ids[text] for text in ends})
        self.chat_template = config.get('chat_template')

    @property
    def chat_template(self) -> str | None:
        return self._template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self._template = template
        self.turn_end = None
        try:
            _, tail = self._around([_USER, {'role': 'assistant'}], 1, {})
            found = (m[0] for m in self._special.finditer(tail) if m[0] not in TAGS)
            self.turn_end = next(found, None)
        except ValueError:   # none, or one that fails: rendering says so
            pass
        end = [self.special_tokens[self.turn_end]] if self.turn_end else []
        self.stop_ids = list(dict.fromkeys([*self._ends, *end]))

    # ---- Construction and files ----

    @classmethod
    def from_words(cls, words: list[str], special_tokens: list[str], pattern: str | None = None,
                   chat_template: str | None = TOY_TEMPLATE, bos: str | None = None,
                   eos: str | None = '<|end|>', stop: list[str] | None = None) -> 'Tokenizer':
        """
        Ids 0-255 are the bytes, then come `words` (those of one byte are there already), then
        `special_tokens`.

        Without a `pattern` (a name in bpe.PATTERNS) every word is one token wherever it stands,
        the longest word first, and all other text is bytes: with the words '12' and ' plus',
        '312 plus' becomes '3', '12', ' plus'. With one, a piece that it cuts out and that is a
        word is one token.
        """
        ranks = {bytes([b]): b for b in range(256)}
        for word in words:
            if not word or (len(word.encode()) > 1 and word.encode() in ranks):
                fault = 'listed twice' if word else 'empty'
                raise ValueError(f'word {word!r} is {fault}; list each word once')
            ranks.setdefault(word.encode(), len(ranks))

        if pattern is not None and pattern not in bpe.PATTERNS:
            known = ', '.join(bpe.PATTERNS)
            raise ValueError(f'unknown pattern {pattern!r}; use one of {known}, or None')
        regexes = bpe.PATTERNS[pattern][0] if pattern else (bpe.words_pattern(ranks),)

        config = {'bos_token': bos, 'eos_token': eos, 'chat_template': chat_template}
        if stop is not None:
            config['stop_tokens'] = [*stop, *filter(None, [eos])]
        spec = bpe.spec_of(special_tokens, len(ranks), regexes)
        return cls(bpe.TiktokenBPE(ranks, spec), config)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, chat_template: str | None = None,
                        template_args: dict | None = None) -> 'Tokenizer':
        """
        Reads a folder or a hub id: tokenizer.json, else vocab.json + merges.txt, else a tiktoken
        table.

        chat_template: a name in TEMPLATES or a file, in place of the folder's own; template_args:
        over those saved with it. Raises ValueError, naming the folder and the reason, for a
        tokenizer that neither tiktoken nor the library reads, a template that is not there, and an
        argument that it does not read.
        """
        template = _template_of(chat_template)
        template_args = template_args or {}
        folder = _local_folder(source)
        try:
            config = bpe.read_json(folder / 'tokenizer_config.json', {})
            config['chat_template'] = template or _template_in(folder, config)
            config['template_args'] = config.get('template_args', {}) | template_args
            _check_arguments(config['chat_template'], template_args)
            generation = bpe.read_json(folder / 'generation_config.json', {})
            tokenizer = cls(_encoding_in(folder, config), config, _stop_ids_in(generation))
            tokenizer.generation = generation
            return tokenizer
        except ValueError as e:
            raise ValueError(f'tokenizer in {folder}: {e}') from e
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f'tokenizer in {folder} is malformed: {e!r}') from e

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json, which
        from_pretrained and transformers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self.config.items() if key != 'auto_map'}
        config |= {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'chat_template': self.chat_template,
            'template_args': self.template_args,
            'stop_tokens': [self._bytes[i].decode(errors='replace') for i in self.stop_ids
                            if i in self._bytes],
        }
        generation = self.generation | {'eos_token_id': self.stop_ids}
        if self.bos_id is not None:
            generation['bos_token_id'] = self.bos_id
        files = {
            'tokenizer.json': self.encoding.tokenizer_json(),
            'tokenizer_config.json': json.dumps(config, ensure_ascii=False, indent=1) + '\n',
            'generation_config.json': json.dumps(generation, ensure_ascii=False, indent=1) + '\n',
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding='utf-8')

    def fingerprint(self) -> str:
        """A hash of all that the ids and the mask of a chat depend on."""
        # Dates count as far as the template prints them
        template = self.chat_template or ''
        formats = re.findall(r"""strftime_now\(\s*(?:'([^']*)'|"([^"]*)")\s*\)""", template)
        dated = [self.date.strftime(single or double) for single, double in formats]
        if template.count('strftime_now(') > len(formats):   # of a format that is not plain to see
            dated = self.date.isoformat()

        parts = [self.encoding.digest(), self._named, template, self.template_args, dated]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def check_model(self, vocab_size: int, where: str) -> None:
        """ValueError unless a model with an embedding of `vocab_size` rows can be this tokenizer's:
        rows for all tokens, and no more rows without one than come from rounding up."""
        spare = vocab_size - self.vocab_size
        if spare < 0 or spare > max(1024, vocab_size // 10):
            raise ValueError(f'{where} do not belong together: the tokenizer has {self.vocab_size} '
                             f'tokens, the model an embedding of {vocab_size}')

    def ids_without_token(self, vocab_size: int) -> list[int]:
        """The ids of an embedding of `vocab_size` rows that stand for no token, and no end."""
        return sorted(set(range(vocab_size)) - self._bytes.keys() - set(self.stop_ids))

    # ---- Text to ids and back ----

    def encode(self, text: str) -> list[int]:
        """Ordinary text to ids, none added before or after; text that looks like an added token
        stays text."""
        return self._ids(text, self._spaces)

    def spelled(self, text: str) -> list[str]:
        """The parts of `text` that a tokenizer of words (from_words without a pattern) has no word
        for and spells in bytes, which its model has hardly seen; none for other tokenizers."""
        if not self.encoding.by_words:
            return []
        runs = groupby(self.encode(text), lambda i: len(self._bytes[i]) == 1)
        return [self.decode(list(run)) for in_bytes, run in runs if in_bytes]

    def encode_with_specials(self, text: str) -> list[int]:
        """Text whose added tokens are meant as such (a rendered template) to ids."""
        return self._ids(text, self._all)

    def encode_assistant(self, text: str) -> list[int]:
        """Text as the assistant writes it after a prompt (a sample, a prefill) to ids: TAGS become
        tokens, the rest is ordinary."""
        return self._ids(self._guarded(text, TAGS), self._all, _GUARD, begins=False)

    def _ids(self, text: str, added: tuple['_Matcher', '_Matcher'], drop: str = '',
             begins: bool = True) -> list[int]:
        """Ids of a text that has these added tokens, and else is ordinary, less the characters to
        drop; `begins`: no other text stands before it."""
        before, after = added
        ids = []
        for piece, token in before.cut(text):
            for part, other in after.cut(self.encoding.normalized(piece, begins)):
                if part:
                    ids += self.encoding.encode(part.replace(drop, ''), begins)
                if other is not None:
                    ids.append(other)
                    begins = self.encoding.begins_anew
            if token is not None:
                ids.append(token)
                begins = self.encoding.begins_anew
        return ids

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """
        Ids to text; broken UTF-8 and ids without a token (padding of the embedding) become U+FFFD.
        `skip_special` leaves out the added tokens except the tags in TAGS. A space that the
        tokenizer puts before every text is left out.
        """
        stream = self.stream(skip_special)
        return b''.join(map(stream.bytes_of, ids)).decode('utf-8', errors='replace')

    def _bytes_of(self, i: int, skip_special: bool) -> bytes:
        if i < 0:
            raise ValueError(f'token id {i} is negative')
        if skip_special and i in self._control_ids:
            return b''
        return self._bytes.get(i, '\ufffd'.encode())

    def stream(self, skip_special: bool = False) -> 'Stream':
        """A decoder of one id at a time: the texts of .add(id) and .flush() join to decode(ids)."""
        return Stream(self, skip_special)

    # ---- Chat ----

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False,
                            **kwargs) -> tuple[list[int], list[int]]:
        """
        Renders `messages` (dicts with role and content) -> (ids, mask), lists of equal length.

        The mask is 1 on what the assistant is to be trained to write: all that follows the prompt
        that sampling has, up to the token that ends its turn. A last turn whose content reasons
        (holds "</think>") stands as sampling would have made it: whole, less the text which the
        prompt prefills. Earlier turns stand as the template shows history, without outer space that
        it trims and a reasoning block that it puts before the last turn alone. Where it changes
        more (R1's drops reasoning) they are context, mask 0, and so is a turn that does not begin
        as the prompt does (no reasoning after a prefilled "<think>"). `document` says which.

        Added tokens come from the template alone. In messages their text is encoded as ordinary
        text, except that the assistant's TAGS become tokens, since it is trained to write them. No
        token straddles the start of what the assistant writes, as none can when sampling.

        `kwargs` go to the template (tools=, enable_thinking=, ...), over template_args. Raises
        ValueError for a template that is missing, fails, or does not show the assistant's content
        once, and for messages without a role.
        """
        ids, mask, _ = self.document(messages, add_generation_prompt, **kwargs)
        return ids, mask

    def document(self, messages: list[dict], add_generation_prompt: bool = False,
                 **kwargs) -> tuple[list[int], list[int], list[str | None]]:
        """ids and mask of apply_chat_template, and for each turn of the assistant's None, or why it
        carries no loss."""
        messages = [self._guarded_message(m) for m in messages]
        last = len(messages) - 1
        ends_with_assistant = bool(messages) and messages[-1]['role'] == 'assistant'
        if ends_with_assistant and (add_generation_prompt or not _is_text(messages[-1])):
            raise ValueError("the last message is the assistant's: it takes text as content and no "
                             'generation prompt')

        # 1. each turn of the assistant's, as if the conversation ended with it
        turns = {}
        if not add_generation_prompt:
            for k, message in enumerate(messages):
                if message['role'] == 'assistant' and _is_text(message):
                    turns[k] = self._turn(messages[:k + 1], kwargs, final=k == last)

        # 2. the whole conversation
        if ends_with_assistant:
            text = turns[last].prompt + turns[last].written + turns[last].after
        else:
            text = self._render(messages, add_generation_prompt, kwargs)

        # 3. its ids, turn after turn; where history shows a turn otherwise, as it stands there
        ids, mask, reasons = [], [], []
        done = 0   # characters of the text

        def add(end: int, learn: int):
            nonlocal done
            begins = not ids or (ids[-1] in self._added_ids and self.encoding.begins_anew)
            ids.extend(self._ids(text[done:end], self._all, _GUARD, begins))
            mask.extend([learn] * (len(ids) - len(mask)))
            done = end

        for k, turn in turns.items():
            if turn.reason is None and not text.startswith(turn.prompt + turn.written):
                turn = self._turn_in_history(messages, k, text, kwargs)
            reasons.append(turn.reason)
            if turn.reason is None:
                add(len(turn.prompt), learn=0)
                add(len(turn.prompt + turn.written), learn=1)
        add(len(text), learn=0)
        return ids, mask, reasons

    def generation_prefill(self, messages: list[dict] = (_USER,), **kwargs) -> str:
        r"""
        The reasoning tag, and what follows it, with which the generation prompt begins the
        assistant's answer: '<think>\n' for newer R1 templates, '' for most. A completion's whole
        text is this plus what was sampled.
        """
        return self._prompt(messages, kwargs)[1]

    def _prompt(self, messages: list[dict], kwargs: dict) -> tuple[str, str]:
        """The messages with the generation prompt, and of that the reasoning which it begins."""
        prompt = self._render(messages, True, kwargs)
        without = self._render(messages, False, kwargs)
        added = prompt[len(os.path.commonprefix([prompt, without])):]
        tag = re.search('</?think>', added)
        return prompt, added[tag.start():] if tag else ''

    def _around(self, messages: list[dict], k: int, kwargs: dict) -> tuple[str, str]:
        """What the template puts before and after the content of message k, the assistant's; all
        of it and nothing where that calls tools and its content is not shown."""
        hollow = {**messages[k], 'content': _HOLE}
        text = self._render([*messages[:k], hollow, *messages[k + 1:]], False, kwargs)
        shown = text.split(_HOLE)
        if len(shown) == 1 and messages[k].get('tool_calls'):
            return shown[0], ''
        if len(shown) != 2:
            raise ValueError(f"the chat template shows the assistant's content {len(shown) - 1} "
                             'times instead of once')
        return shown[0], shown[1]

    def _end_of_turn(self, tail: str) -> str:
        """Of what follows the assistant's content, the part up to the token that ends its turn; ''
        where none does."""
        at = tail.find(self.turn_end) if self.turn_end else -1
        if at >= 0:
            return tail[:at + len(self.turn_end)]
        for m in self._special.finditer(tail):
            if m[0] not in TAGS:
                return tail[:m.end()]
        return ''

    def _turn(self, messages: list[dict], kwargs: dict, final: bool) -> Turn:
        """The turn of the last message, the assistant's. `final`: nothing follows it."""
        *before, last = messages
        body = last['content']
        whole = self._render(messages, False, kwargs)
        start, tail = self._around(messages, len(before), kwargs)
        end = self._end_of_turn(tail)
        shown = whole.removesuffix(tail)

        if last.get('tool_calls'):
            without_calls = {key: value for key, value in last.items() if key != 'tool_calls'}
            if whole == self._render([*before, without_calls], False, kwargs):
                reason = 'the chat template does not show their calls of tools'
                return Turn(whole, '', '', reason)
        try:
            prompt, prefill = self._prompt(before, kwargs)
        except ValueError:   # a conversation that the assistant begins: nothing is sampled so
            prompt, prefill = start, ''

        # A template whose text around the content depends on the content
        hidden = start == whole   # of a call of tools Llama's template shows no content
        bare = not body.strip() and not shown.startswith(start)   # others no line before it
        depends = hidden or bare or not whole.endswith(tail)
        if depends and whole.startswith(prompt):
            rest = whole[len(prompt):]
            written = self._end_of_turn(rest) or rest
            return Turn(prompt, written, rest.removeprefix(written))
        if hidden or bare:
            return Turn(whole, '', '', _begins_otherwise(prefill))

        # What the assistant wrote itself: its content, less what the prompt has begun of it
        tag = prefill.rstrip()
        kept = shown.startswith(prompt) and shown[len(prompt):].strip() == body.strip()
        begun = bool(tag) and body.lstrip().startswith(tag)
        if kept:
            body = shown[len(prompt):]
        elif begun:
            body = body.lstrip().removeprefix(tag).removeprefix(prefill.removeprefix(tag))

        if '</think>' in body and '</think>' in prefill:
            if final:
                raise ValueError("the assistant's message reasons, but the prompt before it ends "
                                 f"reasoning ({prefill!r}); pass the template's switch in "
                                 'template_args (thinking=True, enable_thinking=True, ...)')
            reason = f'they reason after a prompt that ends reasoning ({prefill!r})'
            return Turn(whole, '', '', reason)

        after = tail.removeprefix(end)
        if kept or begun or '</think>' in body:
            return Turn(prompt, body + end, after)
        if shown.startswith(prompt):   # perhaps with an empty reasoning block, which it then writes
            return Turn(prompt, shown[len(prompt):] + end, after)
        if prefill:
            reason = f"they do not begin with the generation prompt's {prefill!r}"
            return Turn(whole, '', '', reason)
        return Turn(prompt, shown.removeprefix(start) + end, after)

    def _turn_in_history(self, messages: list[dict], k: int, text: str, kwargs: dict) -> Turn:
        """The turn of message k where it stands in `text`, the whole conversation."""
        body = messages[k]['content']
        start, tail = self._around(messages, k, kwargs)
        whole = self._render(messages, False, kwargs)
        if not body.strip():   # a call of tools may begin otherwise without text before it
            tail = whole.removeprefix(start)
        end = self._end_of_turn(tail)

        written = ''
        if whole.startswith(start) and whole.endswith(tail):
            written = whole[len(start):len(whole) - len(tail)]
        said = _EMPTY_REASONING.sub('', body, 1) if _EMPTY_REASONING.match(body) else body
        same = written.strip() in (body.strip(), said.strip())
        if same and start != whole and text.startswith(start + written + end):
            return Turn(start, written + end, '')

        dropped = '</think>' in body and '</think>' not in written
        what = 'drops their reasoning from' if dropped else 'changes their text in'
        return Turn('', '', '', f'the chat template {what} the history')

    def _guarded_message(self, message: dict) -> dict:
        if not isinstance(message, dict) or not isinstance(message.get('role'), str):
            raise ValueError(f'message {message!r} is not a dict with a role')
        if message['role'] != 'assistant':
            return self._guarded(message, ())
        message = self._guarded(message, TAGS)
        if any(message.get(key) for key in REASONING_KEYS):
            reasoning, answer = parts_of(message)
            message = {key: value for key, value in message.items() if key not in REASONING_KEYS}
            message['content'] = f'<think>\n{reasoning}\n</think>\n\n{answer}'
        return message

    def _guarded(self, value, keep: tuple[str, ...]):
        """`value` with a noncharacter inside every text that an added token would match, at any
        depth."""
        if isinstance(value, dict):
            return {key: self._guarded(item, keep) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guarded(item, keep) for item in value]
        if not isinstance(value, str):
            return value

        def guard(m):
            return m[0] if m[0] in keep else m[0][0] + _GUARD + m[0][1:]
        value = value.replace(_GUARD, '\ufffd').replace(_HOLE, '\ufffd')
        return self._special.sub(guard, value)

    def _render(self, messages: list[dict], add_generation_prompt: bool, kwargs: dict) -> str:
        if not self.chat_template:
            raise ValueError('the tokenizer has no chat template; set .chat_template '
                             '(R1_ZERO_TEMPLATE, ...)')
        variables = {'tools': None, 'documents': None} | self._named
        variables['strftime_now'] = self.date.strftime
        variables |= self._guarded(self.template_args | kwargs, ())
        try:
            return _compiled(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except Exception as e:   # a template is foreign code
            raise ValueError(f'the chat template fails: {e}') from e


class Stream:
    """Decodes ids as they come, never half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self._begun = False

    def add(self, i: int) -> str:
        """The text that id `i` completes."""
        return self._decoder.decode(self.bytes_of(i))

    def flush(self) -> str:
        """U+FFFD for a character left unfinished; the stream can be used again."""
        self._begun = False
        return self._decoder.decode(b'', final=True)

    def bytes_of(self, i: int) -> bytes:
        """Those of the next id."""
        token = self._tokenizer._bytes_of(i, self._skip_special)
        if self._begun or not token:
            return token
        self._begun = True
        return self._tokenizer.encoding.begun(token)


class _Matcher:
    """Finds added tokens in a text as the tokenizers library does: the first, of those the
    longest, with the spaces beside it that it takes."""

    def __init__(self, tokens: dict[str, dict]):
        """tokens: text -> added token"""
        self._tokens = tokens
        self._pattern = _any_of(tokens)

    def cut(self, text: str):
        """Yields (text before a token, id of the token) and at last (text, None)."""
        done = 0
        for m in self._pattern.finditer(text) if self._tokens else ():
            start, end = m.span()
            if start < done:   # in the spaces that the last one took
                continue
            token = self._tokens[m[0]]
            if token['lstrip']:
                start = done + len(text[done:start].rstrip(_WHITE))
            if token['rstrip']:
                end = len(text) - len(text[end:].lstrip(_WHITE))
            yield text[done:start], token['id']
            done = end
        yield text[done:], None


def _matchers(encoding, added: list[dict]) -> tuple[_Matcher, _Matcher]:
    """Of the added tokens that are matched before a text is normalised, and of the others."""
    before, after = {}, {}
    for token in added:
        (after if token['normalized'] else before)[_as_matched(token, encoding)] = token
    return _Matcher(before), _Matcher(after)


def _as_matched(token: dict, encoding) -> str:
    """The text that an added token matches."""
    return encoding.normalized(token['content']) if token['normalized'] else token['content']


def _is_text(message: dict) -> bool:
    return isinstance(message.get('content'), str)


def _begins_otherwise(prefill: str) -> str:
    return f'they do not begin as the generation prompt ends ({prefill!r})'


def _encoding_in(folder: Path, config: dict) -> 'bpe.TiktokenBPE | library_bpe.LibraryBPE':
    """Through tiktoken where it gives the same ids, else through the tokenizers library."""
    try:
        return bpe.read(folder, config)
    except ValueError:
        if not (folder / 'tokenizer.json').exists():
            raise
        return library_bpe.read(folder, config)


def _template_in(folder: Path, config: dict) -> str | None:
    """The chat template of a folder: its own file, or that in its tokenizer_config.json."""
    if (folder / 'chat_template.jinja').exists():
        return (folder / 'chat_template.jinja').read_text(encoding='utf-8')
    template = config.get('chat_template')
    if isinstance(template, list):
        return {t['name']: t['template'] for t in template}.get('default')
    return template


def _stop_ids_in(generation: dict) -> list[int] | None:
    """The ids that a generation_config.json names as ends, None if it does not."""
    ids = generation.get('eos_token_id')
    if not isinstance(ids, list) and ids is not None:
        ids = [ids]
    if not all(type(i) is int for i in ids or ()):
        raise ValueError(f'eos_token_id {ids} in generation_config.json is not of ids')
    return ids


def _local_folder(source: str | os.PathLike) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    names = ['tokenizer*', 'chat_template.jinja', 'generation_config.json', 'vocab.json']
    name, _, revision = str(source).partition('@')
    try:
        return Path(snapshot_download(name, revision=revision or None,
                                      allow_patterns=[*names, *bpe.FILES],
                                      ignore_patterns=['*/*']))
    except Exception as e:   # of the hub, of its HTTP client, of the disk
        said = ' '.join(str(e).split())[:300]
        raise ValueError(f'{source} is no folder here, and the hub gave no tokenizer: {said}'
                         ) from e


def _any_of(texts) -> re.Pattern:
    """Matches any of `texts`, the longest first, in one group; nothing where there is none."""
    longest_first = sorted(texts, key=len, reverse=True)
    pattern = '|'.join(map(re.escape, longest_first)) or '(?!)'
    return re.compile(f'({pattern})')


def _named_tokens(config: dict) -> dict[str, str]:
    """bos_token, eos_token, ... -> text, of those that a tokenizer_config.json has."""
    named = {}
    for name in ('bos_token', 'eos_token', 'pad_token', 'unk_token'):
        value = config.get(name)
        if value:
            named[name] = value['content'] if isinstance(value, dict) else value
    return named


# ---- Jinja, as transformers sets it up ----

class _GenerationTag(jinja2.ext.Extension):
    """Accepts {% generation %} ... {% endgeneration %}; what is trained on is found without it."""
    tags = {'generation'}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(('name:endgeneration',), drop_needle=True)


_EXTENSIONS = [jinja2.ext.loopcontrols, _GenerationTag]


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value, **options) -> str:
    return json.dumps(value, **{'ensure_ascii': False} | options)


@lru_cache
def _compiled(template: str) -> jinja2.Template:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=_EXTENSIONS)
    env.filters['tojson'] = _to_json
    env.globals['raise_exception'] = _raise_exception
    return env.from_string(template)


def _template_of(name: str | None) -> str | None:
    """The text of a template by its name in TEMPLATES or its file."""
    if name is None or name in TEMPLATES:
        return TEMPLATES.get(name)
    try:
        return Path(name).read_text(encoding='utf-8')
    except (OSError, UnicodeError) as e:
        known = ', '.join(TEMPLATES)
        raise ValueError(f'chat_template={name!r} is neither one of {known} nor a file: {e}') from e


def _check_arguments(template: str | None, arguments: dict) -> None:
    """ValueError for a name that the template does not read."""
    try:
        tree = jinja2.Environment(extensions=_EXTENSIONS).parse(template or '')
        names = {node.name for node in tree.find_all(jinja2.nodes.Name)}
    except jinja2.TemplateSyntaxError as e:
        raise ValueError(f'the chat template fails: {e}') from e
    if unknown := arguments.keys() - names:
        raise ValueError(f'template_args: the chat template reads no {min(unknown)!r}, but '
                         + ', '.join(sorted(names)))
