"""
The operations of the model, one file each: the maths, plain PyTorch, the Triton forward and
backward, the autograd function.

    kernels.use('auto')     the default: Triton for CUDA tensors where it is installed, else PyTorch
    kernels.use('torch')    PyTorch everywhere
    kernels.use('triton')   Triton, or an error that says why not

An operation has one public function, which takes one of three paths: Triton where `fused(x)`, the
CPU's own way in training where `cpu.trains(x)` (kernels/cpu.py, which also says how to switch it
off), else plain PyTorch. Triton is imported at the first launch of a kernel, never for CPU tensors
or under 'torch': the project runs where Triton does not exist (macOS). The one exception is
Triton's interpreter, which runs kernels on CPU tensors, slowly: TRITON_INTERPRET=1 in the
environment and kernels.use('triton').

    python tools/aot.py             compiles every kernel for six chips, sm_80 to sm_120, without a
                                    GPU: make kernels
    python tools/kernel_bench.py    checks and times every kernel on a GPU

For the first, each file's compile_cases(sm, x) yields what it launches on chip sm (80, 90, ...) for
numbers of type x ('*bf16' or '*fp32') at the shapes of DeepSeek-V3 and a 1.5B dense model, in the
same order on every chip: (name, kernel, {argument: type}, {constexpr: value}, num_warps,
num_stages, spills), types as Triton spells them ('*bf16', 'i32'; a pointer is taken as aligned,
'i32:16' is a multiple of 16), spills the number of spill instructions tolerated.
"""
import importlib.util
import os

import torch

choice = 'auto'
tl = None    # kernel files import it, and `jit` puts triton.language there at the first launch


def use(name):
    """name: 'auto', 'torch' or 'triton'. ValueError for another, and where 'triton' cannot run."""
    global choice
    if name not in ('auto', 'torch', 'triton'):
        raise ValueError(f"kernels must be 'auto', 'torch' or 'triton', not {name!r}")
    if name == 'triton':
        if not installed():
            raise ValueError("kernels='triton', but Triton is not installed: pip install triton "
                             "(Linux only), or choose 'torch'")
        if not (torch.cuda.is_available() or interpreted()):
            raise ValueError("kernels='triton', but no GPU is visible; choose 'auto' or 'torch' "
                             '(TRITON_INTERPRET=1 runs the kernels on the CPU for tests, very '
                             'slowly)')
    choice = name


def installed():
    return importlib.util.find_spec('triton') is not None


def interpreted():
    return os.environ.get('TRITON_INTERPRET') == '1'


def fused(x):
    """Whether the Triton path is to be taken for tensor x."""
    if choice == 'torch':
        return False
    if x.is_cuda:
        capable = torch.cuda.get_device_capability(x.device) >= (8, 0)
        return installed() and torch.version.hip is None and capable
    return choice == 'triton' and interpreted()


class jit:
    """@jit marks a Triton kernel as @triton.jit does, but imports Triton only when a kernel is
    first launched; from then on the names in the kernel's file stand for Triton's own functions.
    Such files need `from __future__ import annotations`, so that `BLOCK: tl.constexpr` is not
    looked up earlier."""

    def __init__(self, fn):
        self.fn = fn

    def __getitem__(self, grid):
        return self.made()[grid]

    def made(self):
        """-> the triton.jit function; makes all those of the file on the way, since kernels call
        each other by name."""
        scope = self.fn.__globals__
        if scope[self.fn.__name__] is not self:
            return scope[self.fn.__name__]
        import triton
        import triton.language
        scope['tl'] = triton.language
        if interpreted():
            narrow_correctly()
        for name, value in list(scope.items()):
            if isinstance(value, jit):
                is_of_this_file = value.fn.__globals__ is scope
                scope[name] = triton.jit(value.fn) if is_of_this_file else value.made()
        return scope[self.fn.__name__]


def narrow_correctly():
    """Triton's interpreter loses the carry of the mantissa where it rounds to FP8: torch narrows
    instead."""
    from triton.language import float8e4nv, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    wrong = InterpreterBuilder.create_fp_to_fp
    if getattr(wrong, 'corrected', False):
        return

    def create_fp_to_fp(self, source, to, rounding_mode):
        if (source.dtype.scalar, to.scalar) != (float32, float8e4nv):
            return wrong(self, source, to, rounding_mode)
        narrow = torch.from_numpy(source.data.copy()).to(torch.float8_e4m3fn)
        return TensorHandle(narrow.view(torch.uint8).numpy(), to.scalar)

    create_fp_to_fp.corrected = True
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def working_dtype(x):
    """What a product with tensor x is computed in: autocast's dtype where it is on, else its own"""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def precision():
    """How Triton multiplies float32 operands, as torch.backends.cuda.matmul says: 'ieee' is exact
    and without tensor cores"""
    return 'tf32' if torch.backends.cuda.matmul.allow_tf32 else 'ieee'


def chip(device):
    """-> the GPU's architecture, 80 or 90 or 100 and so on; 90 for Triton's interpreter"""
    if device.type != 'cuda':
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def room(sm):
    """-> KiB of shared memory that a block may have. 99, as on 3090, A10 (86), L4, 4090 (89) and
    5090 (120), is the least since sm_80."""
    return {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}.get(sm, 99)


def next_power_of_2(n):
    return 1 << max(0, n - 1).bit_length()


def cdiv(a, b):
    return -(-a // b)
