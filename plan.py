"""
What a run needs in memory, part by part, before anything is allocated: `--plan` of sft.py,
grpo.py and evaluate.py.

    python grpo.py config/grpo_qwen2.5_1.5b.py --plan                 # on this machine
    python grpo.py config/grpo_qwen2.5_7b.py --plan=8x80              # on 8 ranks with 80 GB each
    torchrun --nproc_per_node=8 sft.py config/sft.py --plan

Only config.json of a checkpoint is read. Parameters are counted on the meta device. Activations are not a formula: one layer of each
kind runs forward on fake tensors of the run's own shapes and dtype, and what autograd saves is summed, so they follow the code. A run
that does not fit is refused with the settings that would fit. GB are 10^9 bytes: what a device has beyond that goes to the driver,
NCCL and fragmentation.

Host memory of the rank that needs most stands beside it as host_...: see host_needs.

Left out: the evaluation data, reward models.
"""

import dataclasses
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hub
from kernels import cpu
from kernels.mla_attention import document_mask
from model import Layer, ModelConfig, Transformer

GIB = 2**30
PROMPT = 512  # tokens of the longest prompt that is planned for; the data is not read


def saved_bytes(cfg, index, rows, length, autocast=False, dtype=torch.float32, masked=True, gpu=False):
    """What autograd keeps for the backward pass of layer `index` on [rows, length] tokens, bytes. dtype: of the weights as the layer
    sees them; autocast: to bf16, whose copies of the weights are kept too; masked: documents by a mask, not inside Triton's kernel;
    gpu: attention never keeps its probabilities."""
    kept, patch = {}, mock.patch.object
    with FakeTensorMode(), torch.autocast('cpu', torch.bfloat16, enabled=autocast), \
            patch(cpu.Experts, 'layout', lambda chosen, E: (chosen.flatten(), chosen, [(0, chosen.numel())])), \
            patch(cpu, 'ONEDNN', False), patch(cpu.SwiGLU, 'PIECE', 2**62), patch(cpu.Attention, 'LONGEST', 0 if gpu else cpu.Attention.LONGEST):
        # without numbers there is no sorting: one expert for all keeps as much. oneDNN's operators have no fake version: they would compute
        torch.set_default_dtype(dtype)   # a fake module does not take .to(dtype)
        try:
            layer = Layer(cfg, index)
        finally:
            torch.set_default_dtype(torch.float32)
        seen = torch.bfloat16 if autocast else dtype
        x = torch.empty(rows, length, cfg.hidden_size, dtype=seen, requires_grad=True)
        half = (cfg.qk_rope_head_dim if cfg.mla else cfg.head_dim) // 2
        rope = torch.empty(rows, length, 1, half), torch.empty(rows, length, 1, half)
        mask = document_mask(torch.zeros(rows, length, dtype=torch.int64)) if masked else None
        outside = {t.untyped_storage()._cdata for t in (*rope, *([mask] if masked else []), *layer.parameters())}

        def keep(t):
            storage = t.untyped_storage()
            if storage._cdata not in outside:
                kept[storage._cdata] = storage   # holding it keeps its address from being used again
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(x, lambda attn, h: attn(h, rope, mask))
        return sum(storage.nbytes() for storage in kept.values())


def plan(cfg, train=True, rows=1, length=1024, dtype='float32', ranks=1, shards=None, optimizer_bytes=8, reference=False,
         checkpointing=False, slots=0, prompts=0, prompt=PROMPT, new_tokens=0, gpu=True, triton=True):
    """Bytes of each part on one rank -> {part: bytes}, with 'peak' the larger of training and sampling.

    cfg: ModelConfig. train: gradients and optimizer too, on micro-batches of [rows, length] tokens. shards: ranks that share a copy of
    the weights (HSDP). reference: a frozen copy for the KL. slots, prompts, prompt, new_tokens: the sampler's, 0 slots for none."""
    with torch.device('meta'):
        model = Transformer(cfg)
    shards, count = shards or ranks, lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    layers, P, half = list(model.model.layers), count(model), dtype == 'bfloat16'
    fsdp = half and gpu and ranks > 1                       # FSDP gathers in bf16 on GPUs; elsewhere autocast makes bf16 copies
    seen = torch.bfloat16 if fsdp else torch.float32        # the weights as a layer sees them
    root = P - sum(map(count, layers))                      # embedding, norm and head are one unit, which stays gathered
    parts = dict.fromkeys(('parameters', 'gradients', 'optimizer', 'reference', 'gathered', 'activations', 'logits', 'cache'), 0)
    parts['parameters'] = (4 * P // shards) if train else (2 if half else 4) * P   # trained weights stay float32
    if train:
        parts['gradients'], parts['optimizer'] = 4 * P // shards, optimizer_bytes * P // shards
        parts['reference'] = 4 * P // shards if reference else 0
        if shards > 1:                                      # this layer, the next one, and the gradient of this one
            parts['gathered'] = (seen.itemsize + 4) * root + (2 * seen.itemsize + 4) * max(map(count, layers))
        moe = [cfg.is_moe(i) for i in range(len(layers))]
        bytes_of = {kind: saved_bytes(cfg, moe.index(kind), rows, length, half and not fsdp, seen, not (gpu and triton), gpu) for kind in set(moe)}
        boundary = rows * length * cfg.hidden_size * (2 if half else 4)
        copies = 2 * P if half and not fsdp else 0          # autocast keeps them while the forward pass runs
        again = max(max(bytes_of.values()) * 4 // 3, copies) if checkpointing else 0   # one layer and its gradients, when the logits are gone
        parts['activations'] = boundary * len(layers) + again if checkpointing else sum(bytes_of[kind] for kind in moe)
        chunk = max(1, min(rows * length, (2**29 if gpu else 2**24) // cfg.vocab_size))
        parts['logits'] = 2 * 4 * chunk * cfg.vocab_size + 4 * cfg.vocab_size * cfg.hidden_size
    if slots:
        size = seen.itemsize if train else (2 if half else 4)
        token = cfg.cache_width * (cfg.num_hidden_layers + cfg.num_nextn_predict_layers) * size
        P_in = min(prompts or slots, slots + 1) * prompt
        parts['cache'] = slots * (new_tokens * (token + 12) + 16 * cfg.vocab_size) + P_in * token
        wide = max(cfg.intermediate_size, cfg.num_experts_per_tok * cfg.moe_intermediate_size if cfg.is_moe(cfg.num_hidden_layers - 1) else 0)
        parts['cache'] += min(8192, P_in) * ((3 * wide + 6 * cfg.hidden_size) * size + token)   # while prompts are computed
    held = parts['parameters'] + parts['optimizer'] + parts['reference']
    training = held + parts['gradients'] + parts['gathered'] + parts['activations'] + parts['logits'] - min(again, parts['logits']) if train else 0
    sampling = held + parts['cache'] + (seen.itemsize * P if shards > 1 else 0) if slots else 0
    parts['peak'] = max(training, sampling)
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# of a script's settings


def needs(run, model, ranks, gpu):
    """run: Config of sft.py, grpo.py or evaluate.py; model: ModelConfig -> plan()"""
    new = getattr(run, 'max_new_tokens', 0)
    common = dict(dtype=run.dtype, ranks=ranks, gpu=gpu)
    if hasattr(run, 'checkpoint'):
        return plan(model, train=False, slots=run.slots, new_tokens=new, **{**common, 'ranks': 1})
    common |= dict(shards=run.shard_ranks or None, optimizer_bytes=optimizer_bytes(run),
                   checkpointing=run.activation_checkpointing, triton=run.kernels != 'torch')
    if hasattr(run, 'group'):
        samples, length = run.prompts * run.group // ranks, PROMPT + new
        return plan(model, rows=max(1, run.micro_tokens // length), length=length, reference=bool(run.kl_coef), new_tokens=new,
                    slots=max(1, min(run.slots, samples)), prompts=max(1, run.prompts // ranks), **common)
    return plan(model, rows=min(run.micro_rows, max(1, run.batch_rows // ranks)), length=run.row_len, **common)


LIBRARIES = {False: 0.6 * GIB, True: 3 * GIB}   # Python and torch; estimated: with CUDA
ROW_OBJECTS = 10   # bytes of Python objects for a byte of rows: 4.3 of GSM8K's, 9.5 of the toy's


def host_needs(run, model, ranks, gpu):
    """Bytes of host memory of rank 0, which needs most -> {part: bytes}, with 'peak' their sum.

    data: rows that are tokenised into files which all ranks map cost a byte a token at most (four
    characters are taken for a token); rows of problems are held as Python objects. saving: rank 0
    gathers the weights, the optimizer's state and the reference. On a CPU what `needs` says is
    host memory too, and is in `device`."""
    with torch.device('meta'):
        P = Transformer(model).num_params()
    sizes = [Path(path).stat().st_size for path in run.data if Path(path).exists()]
    mapped = hasattr(run, 'loss_on')
    parts = {'libraries': LIBRARIES[gpu], 'saving': 0}
    parts['data'] = sum(sizes) / 4 if mapped else ROW_OBJECTS * sum(sizes)
    if hasattr(run, 'muon_learning_rate'):
        reference = 4 if getattr(run, 'kl_coef', 0) else 0
        parts['saving'] = (4 + optimizer_bytes(run) + reference) * P
    if not gpu:
        parts['device'] = needs(run, model, ranks, gpu)['peak']
    parts['peak'] = sum(parts.values())
    return parts


def optimizer_bytes(run):
    """A parameter: Muon keeps one momentum where AdamW keeps two moments; it takes nearly all of
    the weights."""
    return 4 if run.muon_learning_rate else 8


def knobs(run):
    """Settings that save memory, the least costly first: (key, values in the order to try)"""
    halves = lambda key: (key, [getattr(run, key) >> i for i in range(1, 12) if getattr(run, key) >> i])  # noqa: E731
    tried = [('dtype', ['bfloat16'])] if run.dtype != 'bfloat16' else []
    tried += [halves(key) for key in ('slots', 'micro_rows', 'micro_tokens') if hasattr(run, key)]
    if hasattr(run, 'activation_checkpointing'):
        tried.append(('activation_checkpointing', [True]))
    return tried + ([('kl_coef', [0.0])] if getattr(run, 'kl_coef', 0) else [])


def advice(run, model, ranks, gpu, limit):
    """-> the change that makes the run fit: one key where one is enough, several, more ranks, or what to do otherwise"""
    peak = lambda changed, n=ranks: needs(dataclasses.replace(run, **changed), model, n, gpu)['peak']  # noqa: E731
    write = lambda changed: ' '.join(f'--{key}={value}' for key, value in changed.items())  # noqa: E731
    for key, values in knobs(run):
        for value in values:
            if peak({key: value}) <= limit:
                return write({key: value}) + ' fits'
    changed, least = {}, peak({})
    for key, values in knobs(run):
        for value in values:
            if (now := peak({**changed, key: value})) < least:
                changed, least = {**changed, key: value}, now
            if least <= limit:
                return write(changed) + ' fits'
    if not hasattr(run, 'checkpoint'):
        for n in (2**i for i in range(1, 11)):
            for change in ({}, changed):
                if n > ranks and peak(change, n) <= limit:
                    return f'{write(change)} on {n} ranks fits'.strip()
    return 'nothing short of a smaller model or a larger device fits'


def show(run, source, where):
    """Prints the plan of a script's settings. source: checkpoint to start from, or a dict of ModelConfig; where: True for this machine
    (the ranks of torchrun), or ranks x GB. Exits with status 1 and what would fit, if it does not."""
    if isinstance(source, dict):
        model = ModelConfig.new(source)
    else:
        path = hub.local_folder(source, ('config.json',)) / 'config.json'
        model = ModelConfig.read(path, **getattr(run, 'model', {}))
    if where is True:
        ranks, gpu = int(os.environ.get('WORLD_SIZE', 1)), torch.cuda.is_available() and run.device != 'cpu'
        limit = torch.cuda.get_device_properties(0).total_memory if gpu else os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // ranks
    else:
        try:
            ranks, gigabytes = (int(n) for n in str(where).lower().split('x'))
            if min(ranks, gigabytes) < 1:
                raise ValueError
        except ValueError:
            raise ValueError(f'plan={where!r}: write ranks x GB of each, such as 8x80, or nothing for this machine') from None
        gpu, limit = run.device != 'cpu', gigabytes * 10**9
    if int(os.environ.get('RANK', 0)):
        return
    if ranks % (getattr(run, 'shard_ranks', 0) or ranks):
        raise ValueError(f'shard_ranks={run.shard_ranks} does not divide {ranks} ranks')
    parts = needs(run, model, ranks, gpu)
    with torch.device('meta'):
        count = Transformer(model).num_params()
    print(f'{count / 1e6:.1f}M parameters, {ranks} rank{"s" * (ranks > 1)} of {limit / GIB:.1f} GiB; GiB on each:')
    for name, size in parts.items():
        print(f'  {name:12s} {size / GIB:9.3f}')
    host = host_needs(run, model, ranks, gpu)
    for name, size in host.items():
        print(f'  host_{name:12s} {size / GIB:9.3f}')
    sys.stdout.flush()
    for path in run.data:
        if not Path(path).exists():
            print(f'{path} is not there yet and not counted', file=sys.stderr)
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if where is True and host['peak'] > memory:
        sys.exit(f'does not fit: {host["peak"] / GIB:.1f} GiB of host memory, this machine has '
                 f'{memory / GIB:.1f} GiB; use fewer rows of data, or a machine with more')
    if parts['peak'] > limit:
        sys.exit(f'does not fit: the peak of {parts["peak"] / GIB:.1f} GiB is above {limit / GIB:.1f} GiB; {advice(run, model, ranks, gpu, limit)}')
