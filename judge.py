"""
The learned reward: a reward model, and how it is asked. preference.py trains one, and says what its
score is; rewards.preference_reward is what it says of an answer.
"""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import hub
from data.tokenizer import Tokenizer
from model import Transformer, cast_once
from rewards import split_response


class RewardModel(Transformer):
    """A Transformer whose output is one number for a conversation:

        s = w . h_last + b

    h_last is the hidden state of the last token after the final norm; w and b start at 0. lm_head
    stays in the checkpoint, frozen."""

    def __init__(self, cfg):
        super().__init__(replace(cfg, num_nextn_predict_layers=0))
        self.score = nn.Linear(cfg.hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        if not cfg.tie_word_embeddings:
            self.lm_head.weight.requires_grad_(False)

    @classmethod
    def from_language_model(cls, model):
        """-> RewardModel with the weights of a Transformer, but those of its MTP layer"""
        reward_model = cls(model.cfg).to(model.head_weight.device)
        reward_model.stored_dtype = model.stored_dtype
        names = reward_model.state_dict().keys()
        weights = {name: t for name, t in model.state_dict().items() if name in names}
        reward_model.load_state_dict(weights, strict=False)   # without score.*
        return reward_model

    def scores(self, input_ids, last):
        """input_ids [B, T], conversations padded on the right; last [B], the index of each one's
        last token -> s [B] float32"""
        rope, mask = self.context(input_ids)
        h = self.hidden(input_ids, rope, mask)
        h_last = h[torch.arange(len(h), device=h.device), last]
        weight = cast_once(self.score.weight)
        bias = cast_once(self.score.bias)
        with torch.autocast(h.device.type, enabled=False):
            s = F.linear(h_last.float(), weight.float(), bias.float())
        return s[:, 0].clone()   # FSDP warns of a view


def padded(docs, device):
    """docs: a list of token ids for each conversation -> input_ids [B, T] int64, with 0 on the
    right; last [B] int64, the index of each one's last token"""
    T = max(len(ids) for ids in docs)
    rows = [ids + [0] * (T - len(ids)) for ids in docs]
    last = [len(ids) - 1 for ids in docs]
    return torch.tensor(rows, device=device), torch.tensor(last, device=device)


def conversation(tokenizer, messages, judged):
    """-> token ids of the messages. Where judged is 'summary', only what follows the reasoning is
    left of the last one; where it is 'response', all."""
    *before, last = messages
    if judged == 'summary':
        _, summary = split_response(last['content'], {})
        last = {**last, 'content': summary.strip()}
    ids, _ = tokenizer.apply_chat_template([*before, last])
    return ids


class Judge:
    """A trained reward model, to ask: judge(prompt, text), or judge.read(many) first, which reads
    them in batches. A template that prints the date prints that of its training, so that a run
    which goes on tomorrow has the same rewards."""

    def __init__(self, folder, device='cpu'):
        """folder: out_dir of preference.py. ValueError where it holds no reward model."""
        path = Path(folder) / 'preference.json'
        if not path.exists():
            raise ValueError(f'{folder} holds no reward model: train one with python preference.py '
                             f'--out_dir={folder}')
        about = hub.read_json(path)
        self.judged = about['judged']
        self.model = RewardModel.from_pretrained(folder, device=device)
        self.tokenizer = Tokenizer.from_pretrained(folder)
        if 'date' in about:
            self.tokenizer.date = datetime.fromisoformat(about['date'])
        self.device = device
        self.known = {}   # (prompt as JSON, text) -> sigmoid(s)

    def __call__(self, prompt, text):
        """prompt: messages or text; text: the assistant's whole turn -> sigmoid(s)"""
        key = json.dumps(prompt), text
        if key not in self.known:
            self.read([(prompt, text)])
        return self.known[key]

    @torch.no_grad()
    def read(self, answers, rows=32):
        """answers: [(prompt, text)], which are read `rows` at a time; their values are known
        afterwards, others forgotten. Conversations longer than the context lose their
        beginning."""
        self.known = {}
        docs = {}
        for prompt, text in answers:
            messages = prompt if isinstance(prompt, list) else [{'role': 'user', 'content': prompt}]
            answer = {'role': 'assistant', 'content': text}
            ids = conversation(self.tokenizer, [*messages, answer], self.judged)
            docs[json.dumps(prompt), text] = ids[-self.model.cfg.max_position_embeddings:]

        keys = sorted(docs, key=lambda key: len(docs[key]))   # short ones together: less padding
        for i in range(0, len(keys), rows):
            batch = keys[i:i + rows]
            input_ids, last = padded([docs[key] for key in batch], self.device)
            s = self.model.scores(input_ids, last)
            self.known.update(zip(batch, s.sigmoid().tolist()))


def load_judges(folders, device='cpu'):
    """folders: {name: folder of a reward model} -> {name: Judge}, for rewards.prepare"""
    return {name: Judge(folder, device) for name, folder in folders.items()}
