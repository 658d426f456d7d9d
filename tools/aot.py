"""
Compiles every kernel in bfloat16 and in float32 for sm_80 (A100), 86 (3090, A10), 89 (4090, L4), 90 (H100, H200), 100 (B200) and 120
(5090) at the shapes of DeepSeek-V3 and of a 1.5B dense model, on a machine without a GPU, and prints what the compiler made of it.
Exit status 1 if a kernel does not compile, needs more shared memory than a block may have, spills more registers than its file
allows, or, a matrix kernel on sm_90, has no HGMMA instruction (float32 without tf32 has none anywhere).

    python tools/aot.py                          the whole table, on all cores: make kernels
    python tools/aot.py --sm=90 --only=rmsnorm   one architecture, the files or cases whose name
                                                 holds the text

Columns: registers a thread, shared memory a block in KiB, spill instructions (LDL and STL) and those tolerated, and the
matrix instructions: HGMMA and QGMMA (warpgroup, sm_90), HMMA (sm_80, 86, 89, 120), UTC*MMA (tensor memory, sm_100).
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
    """-> dict of what came out; 'fault' says what is wrong, '' if nothing"""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    name, fn, signature, constexprs, warps, stages, allowed = case
    fn = fn.made() if hasattr(fn, 'made') else fn
    out = {'name': name, 'sm': sm, 'allowed': allowed, 'fault': ''}
    if sm < 89 and any('fp8e4nv' in str(t) for t in signature.values()):
        return {**out, 'skipped': 'no FP8 on this chip'}
    aligned = [n for n, t in signature.items() if t.startswith('*') or t.endswith(':16')]
    types = {n: signature[n].removesuffix(':16') if n in signature else 'constexpr' for n in fn.arg_names}
    source = ASTSource(fn, types, constexprs, {(fn.arg_names.index(n),): [['tt.divisibility', 16]] for n in aligned})
    try:
        kernel = triton.compile(source, target=GPUTarget('cuda', sm, 32), options={'num_warps': warps, 'num_stages': stages,
                                                                                   'enable_fp_fusion': True})
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip(' ^')]
        return {**out, 'fault': f'does not compile: {type(error).__name__}: {lines[-1] if lines else ""}'[:300]}
    out.update(read_cubin(kernel.asm['cubin']), shared=kernel.metadata.shared)
    if out['shared'] > 1024 * room(sm):
        out['fault'] = f'{out["shared"]} bytes of shared memory, {1024 * room(sm)} at most'
    elif out['spills'] > allowed:
        out['fault'] = f'{out["spills"]} spill instructions, {allowed} tolerated'
    elif sm == 90 and re.search(r'tt\.dot .*(tf32|xb?f16|xf8)', kernel.asm['ttir']) and not (out['mma']['HGMMA'] or out['mma']['QGMMA']):
        out['fault'] = 'a matrix kernel without HGMMA'
    return out


def read_cubin(cubin):
    """-> registers, spill instructions and counts of matrix instructions, from the disassembly by the tools in Triton's package"""
    import triton
    tools = Path(triton.__file__).parent / 'backends/nvidia/bin'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(cubin)
        f.flush()
        usage = subprocess.run([tools / 'cuobjdump', '-res-usage', f.name], capture_output=True, text=True).stdout
        sass = subprocess.run([tools / 'nvdisasm', '-c', f.name], capture_output=True, text=True).stdout
    if 'EXIT' not in sass:
        raise RuntimeError(f'{tools}/nvdisasm gave no disassembly; is the triton package complete?')
    mma = collections.Counter(re.findall(r'\b(HGMMA|QGMMA|IGMMA|HMMA|QMMA|UTC\w*MMA)\b', sass))
    registers = re.search(r'REG:(\d+)', usage)
    return {'registers': int(registers[1]) if registers else -1, 'spills': len(re.findall(r'\b(?:LDL|STL)\b', sass)), 'mma': mma}


def cases(sms, only=''):
    """(file, sm, case), the chips of a case side by side; one of float32 only where it differs, and 89 beside 86 only for FP8: else they
    differ by a few registers"""
    for file in FILES:
        make, seen = getattr(importlib.import_module(f'kernels.{file}'), 'compile_cases', lambda sm, x: ()), []
        for x in ('*bf16', '*fp32'):
            for on_chips in zip(*(make(sm, x) for sm in sms), strict=True):
                name, _, signature, *_ = on_chips[0]
                if (only in file or only in name) and (name, signature) not in seen:
                    title, fp8 = name if x == '*bf16' else f'{name} float32', '*fp8e4nv' in signature.values()
                    yield from ((file, sm, (title, *case[1:])) for sm, case in zip(sms, on_chips) if sm != 89 or 86 not in sms or fp8)
                seen.append((name, signature))


def compile_job(i):
    _, sm, case = JOBS[i]
    return compile_case(case, sm)


def row(file, r):
    if 'skipped' in r:
        return f'{file:15} {r["name"]:47} sm_{r["sm"]:<4} {r["skipped"]}'
    if 'shared' not in r:
        return f'{file:15} {r["name"]:47} sm_{r["sm"]:<4} {r["fault"]}'
    mma = ' '.join(f'{k} {n}' for k, n in sorted(r['mma'].items()))
    return (f'{file:15} {r["name"]:47} sm_{r["sm"]:<4} {r["registers"]:4} {r["shared"] / 1024:7.1f} {r["spills"]:5}/{r["allowed"]:<4} '
            f'{mma:22} {r["fault"] or "ok"}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
