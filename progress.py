"""
How far long work is, of how much, and the time left: on a terminal tqdm's bar, elsewhere (a file, a
pipe) a line every half minute.

    with Bar('sampling', 1200, 'samples') as bar:
        for sample in sampled:
            bar.update()

    sampling:  35%|███▌      | 420/1200 [02:11<04:03,  3.20sample/s]
    sampling: 420/1200 samples (35%), 3.20/s, 04:03 left

Work that is done within DELAY seconds shows nothing. Only rank 0 shows anything.
"""

import sys
import textwrap
import time

from configurator import first_rank

DELAY = 3.0    # seconds before a bar or a first line
APART = 30.0   # seconds between lines


class Bar:
    """Counts what is done. The rate is the mean since the start, or since `restart`."""

    def __init__(self, what, total=None, unit='rows', done=0, show=True, leave=False):
        """what: its name. total: of how many; None: not known. done: before the start, as the
        steps of a run that goes on. leave: whether its last state stays."""
        self.what = what
        self.total = total
        self.unit = unit
        self.n = done
        self.before = done     # not part of the rate
        self.note = ''
        self.show = show and first_rank()
        self.leave = leave
        self.began = time.monotonic()
        self.told = self.began + DELAY - APART
        self.tqdm = None
        if self.show and sys.stderr.isatty():
            from tqdm import tqdm   # only here: processes that grade start faster without
            self.tqdm = tqdm(desc=what, total=total, initial=done, unit=unit.removesuffix('s'),
                             unit_scale=unit == 'B', leave=leave, delay=DELAY, smoothing=0,
                             miniters=1, dynamic_ncols=True)

    def update(self, n=1):
        """n more are done."""
        self.n += n
        if self.tqdm is not None:
            self.tqdm.update(n)
        elif self.show and time.monotonic() - self.told >= APART:
            self.write_line()

    def skip(self, n=1):
        """n more were done before: they are no part of the rate."""
        self.before += n
        self.n += n
        if self.tqdm is not None:
            self.tqdm.initial += n
            self.tqdm.update(n)

    def expect(self, total):
        """As much as is now known to be ahead."""
        self.total = total
        if self.tqdm is not None:
            self.tqdm.total = total

    def say(self, note):
        """What stands behind the time left, from the next update on."""
        self.note = note
        if self.tqdm is not None:
            self.tqdm.set_postfix_str(note, refresh=False)

    def restart(self):
        """The rate counts from here: what went before was something else."""
        self.before = self.n
        self.began = time.monotonic()
        if self.tqdm is not None:
            self.tqdm.unpause()

    def write_line(self):
        print(self.line(), file=sys.stderr, flush=True)
        self.told = time.monotonic()

    def line(self):
        """-> what a log gets"""
        seconds = time.monotonic() - self.began
        done = self.n - self.before
        parts = [f'{self.what}: {self.amount()}']
        if done:
            parts.append(rate(done, seconds, self.unit))
        if done and self.total is not None and self.n < self.total:
            left = seconds / done * (self.total - self.n)
            parts.append(f'{minutes(left)} left')
        else:
            parts.append(f'after {minutes(seconds)}')
        if self.note:
            parts.append(self.note)
        return ', '.join(parts)

    def amount(self):
        n, total, unit = self.n, self.total, self.unit
        if total is None:
            return f'{n} {unit}'
        share = n / total if total else 1.0
        if unit == 'B':
            n, total, unit = f'{n / 1e6:.1f}', f'{total / 1e6:.1f}', 'MB'
        return f'{n}/{total} {unit} ({share:.0%})'

    def close(self):
        if self.tqdm is not None:
            self.tqdm.close()
        elif self.show and self.leave:
            self.write_line()
        self.show = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def rate(done, seconds, unit):
    """-> '3.20/s', or '24.1 s each' where that is slower than one a second"""
    each = max(seconds, 1e-9) / done
    if unit == 'B':
        return f'{1e-6 / each:.3g} MB/s'
    return f'{1 / each:.3g}/s' if each < 1 else f'{each:.3g} s each'


def minutes(seconds):
    """-> '04:03', '1:04:03'"""
    whole = round(seconds)
    hours = f'{whole // 3600}:' if whole >= 3600 else ''
    return f'{hours}{whole // 60 % 60:02d}:{whole % 60:02d}'


def tell(text):
    """A line on stderr, above the bars that are there."""
    if not first_rank():
        return
    if sys.stderr.isatty():
        from tqdm import tqdm
        tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


def glance(text, lines=3):
    """-> the text in at most so many indented lines, its middle left out, and what would move a
    terminal's cursor"""
    text = ''.join(c for c in ' '.join(text.split()) if c.isprintable())
    most = 90 * lines
    if len(text) > most:
        text = f'{text[:most // 2 - 3]} [..] {text[-most // 2 + 3:]}'
    return textwrap.indent('\n'.join(textwrap.wrap(text, 96)), '    ')
