"""
Compiles every kernel, without a GPU, and prints what the compiler made of it: in bfloat16 and in
float32, at the shapes of DeepSeek-V3 and of a 1.5B dense model, for sm_80 (A100), 86 (3090, A10),
89 (4090, L4), 90 (H100, H200), 100 (B200) and 120 (5090).

    python tools/aot.py                          the whole table, on all cores: make kernels
    python tools/aot.py --sm=90 --only=rmsnorm   one architecture, the files or cases whose name
                                                 holds the text

Exit status 1 if a kernel does not compile, needs more shared memory than a block may have, spills
more registers than its file allows, or, a matrix kernel on sm_90, has no HGMMA instruction (float32
without tf32 has none anywhere).

Columns: registers a thread, shared memory a block in KiB, spill instructions (LDL and STL) and
those tolerated, and the matrix instructions: HGMMA and QGMMA (warpgroup, sm_90), HMMA (sm_80, 86,
89, 120), UTC*MMA (tensor memory, sm_100).
"""
import argparse
import collections
import importlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere

import kernels
from kernels import room

FILES = sorted(p.stem for p in Path(kernels.__file__).parent.glob('*.py') if p.stem != '__init__')
JOBS = []   # [(file, chip, case)], which worker processes inherit: a case cannot be sent to them


def compile_case(case, sm):
    """
    A case, as kernels/__init__.py describes it -> dict with 'name', 'sm', 'allowed', then
    'skipped', or 'registers', 'spills', 'mma', 'shared'; 'fault' says what is wrong, '' if nothing
    """
    name, _, signature, _, _, _, allowed = case
    out = {'name': name, 'sm': sm, 'allowed': allowed, 'fault': ''}
    if sm < 89 and '*fp8e4nv' in signature.values():
        return {**out, 'skipped': 'no FP8 on this chip'}
    try:
        kernel = compiled(case, sm)
    except Exception as error:
        *_, last = [''] + [line for line in str(error).splitlines() if line.strip(' ^')]
        fault = f'does not compile: {type(error).__name__}: {last}'
        return {**out, 'fault': fault[:300]}
    out.update(read_cubin(kernel.asm['cubin']), shared=kernel.metadata.shared)
    out['fault'] = fault_of(out, kernel.asm['ttir'])
    return out


def compiled(case, sm):
    """-> triton's compiled kernel; raises whatever its compiler does"""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    _, kernel, signature, constexprs, warps, stages, _ = case
    if isinstance(kernel, kernels.jit):
        kernel = kernel.made()

    types = dict.fromkeys(kernel.arg_names, 'constexpr')
    attributes = {}
    for argument, kind in signature.items():
        types[argument] = kind.removesuffix(':16')
        if kind.startswith('*') or kind.endswith(':16'):
            place = kernel.arg_names.index(argument)
            attributes[(place,)] = [['tt.divisibility', 16]]
    source = ASTSource(kernel, types, constexprs, attributes)
    options = {'num_warps': warps, 'num_stages': stages, 'enable_fp_fusion': True}
    return triton.compile(source, target=GPUTarget('cuda', sm, 32), options=options)


def fault_of(out, ttir):
    """ttir: the kernel in Triton's own representation -> what is wrong, '' if nothing"""
    most = 1024 * room(out['sm'])
    if out['shared'] > most:
        return f'{out["shared"]} bytes of shared memory, {most} at most'
    if out['spills'] > out['allowed']:
        return f'{out["spills"]} spill instructions, {out["allowed"]} tolerated'
    multiplies = re.search(r'tt\.dot .*(tf32|xb?f16|xf8)', ttir)
    warpgroup = out['mma']['HGMMA'] or out['mma']['QGMMA']
    if out['sm'] == 90 and multiplies and not warpgroup:
        return 'a matrix kernel without HGMMA'
    return ''


def read_cubin(cubin):
    """
    -> registers, spill instructions and counts of matrix instructions, from the disassembly by the
    tools in Triton's package
    """
    import triton
    tools = Path(triton.__file__).parent / 'backends/nvidia/bin'

    def said(tool, option, path):
        return subprocess.run([tools / tool, option, path], capture_output=True, text=True).stdout

    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        usage = said('cuobjdump', '-res-usage', file.name)
        sass = said('nvdisasm', '-c', file.name)
    if 'EXIT' not in sass:
        raise RuntimeError(f'{tools}/nvdisasm gave no disassembly; is the triton package complete?')
    registers = re.search(r'REG:(\d+)', usage)
    return {
        'registers': int(registers[1]) if registers else -1,
        'spills': len(re.findall(r'\b(?:LDL|STL)\b', sass)),
        'mma': collections.Counter(
            re.findall(r'\b(HGMMA|QGMMA|IGMMA|HMMA|QMMA|UTC\w*MMA)\b', sass)),
    }


def cases(sms, only=''):
    """
    Yields (file, sm, case), the chips of a case side by side. A case comes in float32 only where it
    differs; and on 89 beside 86 only where it is FP8: else they differ by a few registers.
    """
    for file in FILES:
        module = importlib.import_module(f'kernels.{file}')
        if not hasattr(module, 'compile_cases'):
            continue
        seen = []
        for x in ('*bf16', '*fp32'):
            for on_chips in zip(*(module.compile_cases(sm, x) for sm in sms), strict=True):
                name, _, signature, *_ = on_chips[0]
                known = (name, signature) in seen
                seen.append((name, signature))
                if known or not (only in file or only in name):
                    continue
                title = name if x == '*bf16' else f'{name} float32'
                fp8 = '*fp8e4nv' in signature.values()
                for sm, (_, *rest) in zip(sms, on_chips):
                    if sm != 89 or 86 not in sms or fp8:
                        yield file, sm, (title, *rest)


def compile_job(i):
    _, sm, case = JOBS[i]
    return compile_case(case, sm)


def row(file, result):
    """A line of the table"""
    start = f'{file:15} {result["name"]:47} sm_{result["sm"]:<4}'
    if 'skipped' in result:
        return f'{start} {result["skipped"]}'
    if 'shared' not in result:
        return f'{start} {result["fault"]}'
    mma = ' '.join(f'{name} {count}' for name, count in sorted(result['mma'].items()))
    return (f'{start} {result["registers"]:4} {result["shared"] / 1024:7.1f} '
            f'{result["spills"]:5}/{result["allowed"]:<4} {mma:22} {result["fault"] or "ok"}')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sm', default='80,86,89,90,100,120', help='architectures')
    parser.add_argument('--only', default='', help='part of the name of a file or case')
    args = parser.parse_args()
    if importlib.util.find_spec('triton') is None:
        print('Triton is not installed: pip install triton (Linux only)', file=sys.stderr)
        return 2
    if os.environ.pop('TRITON_INTERPRET', None):
        print('TRITON_INTERPRET is set; ignored here', file=sys.stderr)

    print(f'{"file":15} {"case":47} {"chip":7} regs     KiB    spills matrix')
    JOBS[:] = cases([int(sm) for sm in args.sm.split(',')], args.only)
    faults = 0
    with multiprocessing.get_context('fork').Pool() as pool:
        for (file, *_), result in zip(JOBS, pool.imap(compile_job, range(len(JOBS)))):
            faults += bool(result['fault'])
            print(row(file, result), flush=True)
    print(f'{faults} faults' if faults else 'all fit')
    return 1 if faults else 0


if __name__ == '__main__':
    sys.exit(main())
