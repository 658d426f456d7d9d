"""
What a run needs in memory, part by part, before anything is allocated: `--plan` of sft.py, grpo.py
and evaluate.py.

    python grpo.py config/grpo_qwen2.5_1.5b.py --plan                 # on this machine
    python grpo.py config/grpo_qwen2.5_7b.py --plan=8x80              # on 8 ranks with 80 GB each
    torchrun --nproc_per_node=8 sft.py config/sft.py --plan

Only config.json of a checkpoint is read. Parameters are counted on the meta device. Activations are
not a formula: one layer of each kind runs forward on fake tensors of the run's own shapes and
dtype, and what autograd saves is summed, so they follow the code. A run that does not fit is
refused with the settings that would fit. GB are 10^9 bytes: what a device has beyond that goes to
the driver, NCCL and fragmentation.

Host memory of the rank that needs most stands beside it as host_...: see host_needs.

Left out: the evaluation data, reward models.
"""
import dataclasses
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hub
from configurator import first_rank
from kernels import cpu
from kernels.attention import Mask
from model import Layer, ModelConfig, Transformer

GIB = 2**30
PROMPT = 512   # tokens of the longest prompt that is planned for; the data is not read
PARTS = ('parameters', 'gradients', 'optimizer', 'reference', 'gathered', 'activations', 'logits',
         'cache')
LIBRARIES = {False: 0.6 * GIB, True: 3 * GIB}   # Python and torch; estimated: with CUDA
ROW_OBJECTS = 10   # bytes of Python objects for a byte of rows: 4.3 of GSM8K's, 9.5 of the toy's


# ---- of a model ----

@dataclass
class Workload:
    """What decides, beside the model, how much memory a rank needs."""
    train: bool = True            # gradients and optimizer too
    # micro-batch
    rows: int = 1
    length: int = 1024            # tokens of a row
    reference: bool = False       # a frozen copy for the KL
    checkpointing: bool = False   # activations are computed again in the backward pass
    optimizer_bytes: int = 8      # of a parameter
    # sampler
    slots: int = 0                # completions decoded at once; 0: nothing is sampled
    prompts: int = 0              # different ones among them; 0: as many as slots
    prompt: int = PROMPT          # tokens of the longest
    new_tokens: int = 0           # of the longest completion
    # machine
    dtype: str = 'float32'
    ranks: int = 1
    shard_ranks: int = 0          # ranks that share one copy of the weights (HSDP); 0: all
    gpu: bool = True
    triton: bool = True

    @property
    def shards(self):
        return self.shard_ranks or self.ranks

    @property
    def bf16(self):
        return self.dtype == 'bfloat16'

    @property
    def gathers_bf16(self):
        """FSDP gathers the weights in bf16 on GPUs; elsewhere autocast makes copies in bf16."""
        return self.bf16 and self.gpu and self.ranks > 1

    @property
    def autocasts(self):
        return self.bf16 and not self.gathers_bf16

    @property
    def weight_dtype(self):
        """Of the weights as a layer sees them."""
        return torch.bfloat16 if self.gathers_bf16 else torch.float32


def meta_model(cfg):
    with torch.device('meta'):
        return Transformer(cfg)


def count(module):
    return sum(p.numel() for p in module.parameters())


def memory(cfg, work):
    """cfg: ModelConfig, work: Workload -> {part: bytes} on one rank, with 'peak' the larger of
    training and sampling"""
    model = meta_model(cfg)
    P, shards = count(model), work.shards
    parts = dict.fromkeys(PARTS, 0)
    training = sampling = 0

    # what stays
    if work.train:
        parts['parameters'] = 4 * P // shards       # trained weights stay float32
        parts['optimizer'] = work.optimizer_bytes * P // shards
        if work.reference:
            parts['reference'] = 4 * P // shards
    else:
        parts['parameters'] = 2 * P if work.bf16 else 4 * P
    held = parts['parameters'] + parts['optimizer'] + parts['reference']

    # what comes and goes
    if work.train:
        parts['gradients'] = 4 * P // shards
        if shards > 1:
            parts['gathered'] = gathered_bytes(model, work)
        kept, again = activation_bytes(cfg, model, work)
        parts['activations'] = kept + again
        parts['logits'] = logits_bytes(cfg, work)
        training = held + parts['gradients'] + parts['gathered']
        training += kept + max(again, parts['logits'])   # again: when the logits are gone
    if work.slots:
        parts['cache'] = cache_bytes(cfg, work)
        sampling = held + parts['cache']
        if shards > 1:
            sampling += work.weight_dtype.itemsize * P   # all layers stay gathered
    parts['peak'] = max(training, sampling)
    return parts


def gathered_bytes(model, work):
    """Of FSDP: embedding, norm and head are one unit, which stays gathered; of the layers this one,
    the next one, and the gradient of this one."""
    layers = [count(layer) for layer in model.model.layers]
    size = work.weight_dtype.itemsize
    root = count(model) - sum(layers)
    return (size + 4) * root + (2 * size + 4) * max(layers)


def activation_bytes(cfg, model, work):
    """-> bytes that are kept from the forward pass of a micro-batch until its backward pass, and
    bytes that checkpointing then makes again"""
    is_moe = [cfg.is_moe(i) for i in range(len(model.model.layers))]
    of_kind = {kind: saved_bytes(cfg, is_moe.index(kind), work) for kind in set(is_moe)}
    if not work.checkpointing:
        return sum(of_kind[kind] for kind in is_moe), 0
    size = 2 if work.bf16 else 4
    boundary = work.rows * work.length * cfg.hidden_size * size
    copies = 2 * count(model) if work.autocasts else 0   # kept while the forward pass runs
    with_gradients = max(of_kind.values()) * 4 // 3      # of one layer
    return boundary * len(is_moe), max(with_gradients, copies)


def saved_bytes(cfg, index, work):
    """Bytes that autograd keeps of a micro-batch for the backward pass of layer `index`; copies of
    the weights that autocast makes are among them."""
    shape = work.rows, work.length
    seen = torch.bfloat16 if work.autocasts else work.weight_dtype
    with fake_tensors(work.gpu), torch.autocast('cpu', torch.bfloat16, enabled=work.autocasts):
        torch.set_default_dtype(work.weight_dtype)   # a fake module does not take .to(dtype)
        try:
            layer = Layer(cfg, index)
        finally:
            torch.set_default_dtype(torch.float32)
        x = torch.empty(*shape, cfg.hidden_size, dtype=seen, requires_grad=True)
        half = (cfg.qk_rope_head_dim if cfg.mla else cfg.head_dim) // 2
        rope = torch.empty(*shape, 1, half), torch.empty(*shape, 1, half)
        mask = Mask.causal()
        given = [*rope, *layer.parameters()]
        if not (work.gpu and work.triton):      # documents need a table outside Triton's kernel
            mask = Mask.documents(torch.zeros(shape, dtype=torch.int64))
            given.append(mask.visible)
        outside = {tensor.untyped_storage()._cdata for tensor in given}

        kept = {}   # storages by address; to hold one keeps its address from being used again

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in outside:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x, rope, mask)
        return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def fake_tensors(gpu):
    """Within, tensors have shapes and no numbers, and layers compute as on a GPU, or a CPU."""
    with FakeTensorMode(), cpu.on_fake_tensors(keep_probabilities=not gpu):
        yield


def logits_bytes(cfg, work):
    """Of the chunks of tokens that are kept, and one's gradients, in float32; and the head's
    gradient."""
    tokens = work.rows * work.length
    chunk = max(1, min(tokens, (2**29 if work.gpu else 2**24) // cfg.vocab_size))
    kept = chunk if work.gpu else min(tokens, 4 * chunk)
    return 4 * (kept + chunk) * cfg.vocab_size + 4 * cfg.vocab_size * cfg.hidden_size


def cache_bytes(cfg, work):
    """Of the sampler: keys and values, logits, and the layers' own while prompts are computed."""
    bf16 = work.gathers_bf16 if work.train else work.bf16
    size = 2 if bf16 else 4
    token = cfg.cache_width * (cfg.num_hidden_layers + cfg.num_nextn_predict_layers) * size
    prompt_tokens = min(work.prompts or work.slots, work.slots + 1) * work.prompt
    slot = work.new_tokens * (token + 12) + 16 * cfg.vocab_size
    cache = work.slots * slot + prompt_tokens * token

    wide = cfg.intermediate_size
    if cfg.is_moe(cfg.num_hidden_layers - 1):
        wide = max(wide, cfg.num_experts_per_tok * cfg.moe_intermediate_size)
    at_once = min(8192, prompt_tokens)
    return cache + at_once * ((3 * wide + 6 * cfg.hidden_size) * size + token)


# ---- of a script's settings ----

def work_of(run, ranks, gpu):
    """run: Config of sft.py, grpo.py or evaluate.py -> Workload"""
    work = Workload(dtype=run.dtype, ranks=ranks, gpu=gpu,
                    new_tokens=getattr(run, 'max_new_tokens', 0))
    if hasattr(run, 'checkpoint'):      # evaluate.py: each rank has a model of its own
        return dataclasses.replace(work, train=False, ranks=1, slots=run.slots)

    work.shard_ranks = run.shard_ranks
    work.optimizer_bytes = optimizer_bytes(run)
    work.checkpointing = run.activation_checkpointing
    work.triton = run.kernels != 'torch'
    if hasattr(run, 'group'):           # grpo.py
        work.length = PROMPT + work.new_tokens
        work.rows = max(1, run.micro_tokens // work.length)
        work.reference = bool(run.kl_coef)
        work.slots = max(1, min(run.slots, run.prompts * run.group // ranks))
        work.prompts = max(1, run.prompts // ranks)
    else:
        work.length = run.row_len
        work.rows = min(run.micro_rows, max(1, run.batch_rows // ranks))
    return work


def optimizer_bytes(run):
    """A parameter: Muon keeps one momentum where AdamW keeps two moments; it takes nearly all of
    the weights."""
    return 4 if run.muon_learning_rate else 8


def needs(run, model, ranks, gpu):
    """run: Config of a script; model: ModelConfig -> {part: bytes} of the device of one rank"""
    return memory(model, work_of(run, ranks, gpu))


def host_needs(run, model, ranks, gpu):
    """
    Bytes of host memory of rank 0, which needs most -> {part: bytes}, with 'peak' their sum.

    data: rows that are tokenised into files which all ranks map cost a byte a token at most (four
    characters are taken for a token); rows of problems are held as Python objects. saving: rank 0
    gathers the weights, the optimizer's state and the reference. On a CPU what `needs` says is
    host memory too, and is in `device`.
    """
    sizes = [Path(path).stat().st_size for path in run.data if Path(path).exists()]
    mapped = hasattr(run, 'loss_on')      # sft.py
    parts = {'libraries': LIBRARIES[gpu], 'saving': 0}
    parts['data'] = sum(sizes) / 4 if mapped else ROW_OBJECTS * sum(sizes)
    if hasattr(run, 'muon_learning_rate'):
        reference = 4 if getattr(run, 'kl_coef', 0) else 0
        of_parameter = 4 + optimizer_bytes(run) + reference
        parts['saving'] = of_parameter * meta_model(model).num_params()
    if not gpu:
        parts['device'] = needs(run, model, ranks, gpu)['peak']
    parts['peak'] = sum(parts.values())
    return parts


def knobs(run):
    """Settings that save memory, the least costly first: (key, values in the order to try)"""
    tried = []
    if run.dtype != 'bfloat16':
        tried.append(('dtype', ['bfloat16']))
    for key in ('slots', 'micro_rows', 'micro_tokens'):
        if hasattr(run, key):
            halves = [getattr(run, key) >> i for i in range(1, 12)]
            tried.append((key, [n for n in halves if n]))
    if hasattr(run, 'activation_checkpointing'):
        tried.append(('activation_checkpointing', [True]))
    if getattr(run, 'kl_coef', 0):
        tried.append(('kl_coef', [0.0]))
    return tried


def advice(run, model, ranks, gpu, limit):
    """-> the change that makes the run fit: one key where one is enough, several, more ranks, or
    what to do otherwise"""
    def peak(changed, n=ranks):
        return needs(dataclasses.replace(run, **changed), model, n, gpu)['peak']

    def flags(changed):
        return ' '.join(f'--{key}={value}' for key, value in changed.items())

    # one key
    tried = [(key, value) for key, values in knobs(run) for value in values]
    for key, value in tried:
        if peak({key: value}) <= limit:
            return f'{flags({key: value})} fits'

    # several: of each key the values that save
    changed, least = {}, peak({})
    for key, value in tried:
        now = peak({**changed, key: value})
        if now < least:
            changed, least = {**changed, key: value}, now
        if least <= limit:
            return f'{flags(changed)} fits'

    # more ranks
    more = [2**i for i in range(1, 11) if 2**i > ranks]
    if hasattr(run, 'checkpoint'):    # each rank has a model of its own
        more = []
    for n in more:
        for change in ({}, changed):
            if peak(change, n) <= limit:
                return f'{flags(change)} on {n} ranks fits'.strip()
    return 'nothing short of a smaller model or a larger device fits'


# ---- on the terminal ----

def show(run, source, where):
    """
    Prints the plan of a script's settings. Exits with status 1 and what would fit, if it does not.

    source: checkpoint to start from, or a dict of ModelConfig; where: True for this machine (the
    ranks of torchrun), or ranks x GB.
    """
    model = config_of(source, getattr(run, 'model', {}))
    ranks, gpu, limit = this_machine(run) if where is True else machine(run, where)
    if not first_rank():
        return
    if ranks % (getattr(run, 'shard_ranks', 0) or ranks):
        raise ValueError(f'shard_ranks={run.shard_ranks} does not divide {ranks} ranks')

    device, host = needs(run, model, ranks, gpu), host_needs(run, model, ranks, gpu)
    parameters = count(meta_model(model)) / 1e6
    plural = 's' if ranks > 1 else ''
    print(f'{parameters:.1f}M parameters, {ranks} rank{plural} of {limit / GIB:.1f} GiB; '
          'GiB on each:')
    for name, size in device.items():
        print(f'  {name:12s} {size / GIB:9.3f}')
    for name, size in host.items():
        print(f'  host_{name:12s} {size / GIB:9.3f}')
    sys.stdout.flush()
    for path in run.data:
        if not Path(path).exists():
            print(f'{path} is not there yet and not counted', file=sys.stderr)

    if where is True and host['peak'] > memory_of_host():
        sys.exit(f'does not fit: {host["peak"] / GIB:.1f} GiB of host memory, this machine has '
                 f'{memory_of_host() / GIB:.1f} GiB; use fewer rows of data, or a machine with '
                 'more')
    if device['peak'] > limit:
        sys.exit(f'does not fit: the peak of {device["peak"] / GIB:.1f} GiB is above '
                 f'{limit / GIB:.1f} GiB; {advice(run, model, ranks, gpu, limit)}')


def config_of(source, changes):
    """source: as in `show` -> ModelConfig, of which no more than config.json is read"""
    if isinstance(source, dict):
        return ModelConfig.new(source)
    path = hub.local_folder(source, ('config.json',)) / 'config.json'
    return ModelConfig.read(path, **changes)


def this_machine(run):
    """-> ranks, whether they have a GPU each, bytes of a rank"""
    ranks = int(os.environ.get('WORLD_SIZE', 1))
    if torch.cuda.is_available() and run.device != 'cpu':
        return ranks, True, torch.cuda.get_device_properties(0).total_memory
    return ranks, False, memory_of_host() // ranks


def machine(run, where):
    """where: ranks x GB, as 8x80 -> the same of a machine like that"""
    try:
        ranks, gigabytes = (int(n) for n in str(where).lower().split('x'))
        if min(ranks, gigabytes) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f'plan={where!r}: write ranks x GB of each, such as 8x80, or nothing for '
                         'this machine') from None
    return ranks, run.device != 'cpu', gigabytes * 10**9


def memory_of_host():
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
