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
    """A Transformer whose output is one number a conversation. lm_head stays in the checkpoint,
    frozen."""

    def __init__(self, cfg):
        super().__init__(replace(cfg, num_nextn_predict_layers=0))
        self.score = nn.Linear(cfg.hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        if not cfg.tie_word_embeddings:
            self.lm_head.weight.requires_grad_(False)

    @classmethod
    def from_language_model(cls, model):
        made = cls(model.cfg).to(model.head_weight.device)
        made.stored_dtype = model.stored_dtype
        wanted = made.state_dict()
        known = {name: t for name, t in model.state_dict().items() if name in wanted}
        made.load_state_dict(known, strict=False)
        return made

    def scores(self, input_ids, last):
        """Conversations [B, T] padded on the right, last [B]: the index of each one's last token
        -> s [B] float32"""
        rope, mask = self.context(input_ids)
        h = self.hidden(input_ids, rope, mask)
        h = h[torch.arange(len(h), device=h.device), last]
        weight, bias = cast_once(self.score.weight), cast_once(self.score.bias)
        with torch.autocast(h.device.type, enabled=False):
            s = F.linear(h.float(), weight.float(), bias.float())
        return s[:, 0].clone()   # of a view FSDP warns


def padded(docs, device):
    """[ids] -> input_ids [B, T], last [B]"""
    T = max(map(len, docs))
    ids = torch.tensor([doc + [0] * (T - len(doc)) for doc in docs], device=device)
    return ids, torch.tensor([len(doc) - 1 for doc in docs], device=device)


def conversation(tokenizer, messages, judged):
    """-> ids of the messages, of whose last only the summary (what follows the reasoning) is left
    where that is what is judged"""
    *before, last = messages
    if judged == 'summary':
        last = {**last, 'content': split_response(last['content'], {})[1].strip()}
    return tokenizer.apply_chat_template([*before, last])[0]


class Judge:
    """A trained reward model, to ask: judge(prompt, text), or judge.read(many) first, which reads
    them in batches. A template that prints the date prints that of its training, so that a run
    which goes on tomorrow has the same rewards."""

    def __init__(self, folder, device='cpu'):
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
        self.device, self.known = device, {}

    def __call__(self, prompt, text):
        """prompt: messages or text; text: the assistant's whole turn -> sigmoid(s)"""
        key = json.dumps(prompt), text
        if key not in self.known:
            self.read([(prompt, text)])
        return self.known[key]

    @torch.no_grad()
    def read(self, asked, rows=32):
        """asked: [(prompt, text)]; their values are known afterwards, others forgotten. Longer
        conversations lose their beginning."""
        docs, self.known = {}, {}
        for prompt, text in asked:
            messages = prompt if isinstance(prompt, list) else [{'role': 'user', 'content': prompt}]
            answer = {'role': 'assistant', 'content': text}
            ids = conversation(self.tokenizer, [*messages, answer], self.judged)
            docs[json.dumps(prompt), text] = ids[-self.model.cfg.max_position_embeddings:]
        keys = sorted(docs, key=lambda key: len(docs[key]))
        for i in range(0, len(keys), rows):
            part = keys[i:i + rows]
            scores = self.model.scores(*padded([docs[key] for key in part], self.device))
            self.known.update(zip(part, scores.sigmoid().tolist()))


def load_judges(folders, device='cpu'):
    """folders: {name: folder of a reward model} -> {name: Judge}, for rewards.prepare"""
    return {name: Judge(folder, device) for name, folder in folders.items()}
