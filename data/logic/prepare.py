"""
Knights and knaves, generated: who always tells the truth, who always lies? Every puzzle has exactly
one solution.

    python data/logic/prepare.py --train_rows=5000 --test_rows=500
    python data/logic/prepare.py --source=people3.jsonl    # puzzles in the form of the hub's
                                                           # K-and-K/knights-and-knaves, checked

writes to out_dir train.jsonl and test.jsonl, which share no puzzle, and a manifest beside each:
    {"prompt": [user: puzzle], "answer": "knight, knave, knave", "task": "match", "people": 3,
     "id": "logic/train/0"}
The answer names the kinds in the order in which the puzzle introduces the people. Each person says
one sentence about others or all: an atom (X is a knight, X is a knave), not, and, or, if ... then,
if and only if, or a count. A puzzle is kept when, of the 2^n ways to be knights and knaves, exactly
one makes what each knight says true and what each knave says false: all are tried. Puzzles are
alike when the people, renamed in their order, say the same; none occurs twice. Everything is drawn
from the seed.

With a source (rows with "quiz", "names", "statements", "solution") the puzzles are its own, in
puzzles.jsonl, after the same check: those without exactly one solution, or with another than they
claim, are left out and counted.
"""
import ast
import itertools
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # run as a script from anywhere
from configurator import run
from data import source

NAMES = ('Ada', 'Ben', 'Cleo', 'Dora', 'Emil', 'Finn', 'Gwen', 'Hugo', 'Iris', 'Jonas', 'Kira',
         'Leo', 'Mona', 'Nils', 'Olga', 'Paul')
KINDS = ('knave', 'knight')


@dataclass
class Config:
    out_dir: str = 'data/logic'   # folder for train.jsonl and test.jsonl
    source: str | None = None     # file or folder with published puzzles; None generates them
    train_rows: int = 5000        # puzzles of train.jsonl
    test_rows: int = 500          # puzzles of test.jsonl
    min_people: int = 2           # fewest people of a puzzle; how many is drawn
    max_people: int = 6           # most
    seed: int = 1                 # everything is drawn from it

    def __post_init__(self):
        if not 2 <= self.min_people <= self.max_people <= 10:
            raise ValueError(f'min_people={self.min_people} and max_people={self.max_people} must '
                             'rise and lie in 2 to 10')


# ---- Sentences and their truth ----

def statement(rng, speaker: int, n: int):
    """A random sentence as a tuple: ('is', person, kind), ('not', s), ('count', how many, kind),
    or ('and' | 'or' | 'if' | 'iff', s, s)."""
    others = [i for i in range(n) if i != speaker]

    def atom():
        whom = others if rng.random() < 0.9 else range(n)
        return ('is', rng.choice(whom), rng.randrange(2))

    shape = rng.choice(('is', 'not', 'and', 'or', 'if', 'iff', 'count'))
    if shape == 'is':
        return atom()
    if shape == 'not':
        return ('not', atom())
    if shape == 'count':
        return ('count', rng.randint(0, n), rng.randrange(2))
    first = atom()
    second = atom()
    while second[1] == first[1] and n > 2 or second == first:
        second = atom()
    return (shape, first, second)


def holds(s, kinds) -> bool:
    """Is the sentence true when person i is of kinds[i] (1: knight)?"""
    head = s[0]
    if head == 'is':
        return kinds[s[1]] == s[2]
    if head == 'count':
        return sum(kind == s[2] for kind in kinds) == s[1]
    if head == 'not':
        return not holds(s[1], kinds)
    a = holds(s[1], kinds)
    b = holds(s[2], kinds)
    return {'and': a and b, 'or': a or b, 'if': not a or b, 'iff': a == b}[head]


def solutions(statements) -> list[tuple]:
    """Every way to be knights (1) and knaves (0) in which exactly the knights' sentences are
    true."""
    found = []
    for kinds in itertools.product((0, 1), repeat=len(statements)):
        if all(holds(s, kinds) == bool(kind) for s, kind in zip(statements, kinds)):
            found.append(kinds)
    return found


# ---- In words ----

def in_words(s, names) -> str:
    head = s[0]
    if head == 'is':
        return f'{names[s[1]]} is a {KINDS[s[2]]}'
    if head == 'not':
        return f'it is not true that {in_words(s[1], names)}'
    if head == 'count':
        kind = KINDS[s[2]]
        if s[1] == 1:
            return f'among us there is exactly 1 {kind}'
        return f'among us there are exactly {s[1]} {kind}s'
    first = in_words(s[1], names)
    second = in_words(s[2], names)
    return {
        'and': f'{first} and {second}',
        'or': f'{first} or {second}, or both',
        'if': f'if {first}, then {second}',
        'iff': f'{first} if and only if {second}',
    }[head]


def puzzle_text(statements, names) -> str:
    listed = ', '.join(names[:-1]) + ' and ' + names[-1]
    said = '\n'.join(f'{name} says: "{in_words(s, names)}."' for s, name in zip(statements, names))
    return ('On an island everyone is either a knight, who always tells the truth, or a knave, who '
            f'always lies. You meet {listed}.\n'
            f'{said}\n'
            f'What are {listed}? Answer with knight or knave for each, in this order, separated by '
            'commas.')


# ---- Puzzles of one's own ----

def generate(rng, n: int) -> tuple:
    """(statements, the one solution) of n people, by trying."""
    while True:
        statements = tuple(statement(rng, i, n) for i in range(n))
        found = solutions(statements)
        if len(found) == 1:
            return statements, found[0]


def puzzles(cfg: Config, rng) -> tuple[list[dict], int]:
    """-> rows of different puzzles, without ids, and how many were drawn twice"""
    seen = set()
    rows = []
    alike = 0
    wanted = cfg.train_rows + cfg.test_rows
    while len(rows) < wanted:
        n = rng.randint(cfg.min_people, cfg.max_people)
        statements, solution = generate(rng, n)
        if statements in seen:
            alike += 1
            if alike > 20 * (len(rows) + 100):
                raise ValueError(f'only {len(rows)} different puzzles found for {wanted} rows: '
                                 'raise max_people')
            continue
        seen.add(statements)
        names = rng.sample(NAMES, n)
        rows.append({
            'prompt': [{'role': 'user', 'content': puzzle_text(statements, names)}],
            'question': '\n'.join(in_words(s, names) for s in statements),
            'answer': ', '.join(KINDS[kind] for kind in solution),
            'task': 'match',
            'people': n,
        })
    return rows, alike


def write_generated(cfg: Config):
    rng = random.Random(cfg.seed)
    rows, alike = puzzles(cfg, rng)
    rng.shuffle(rows)   # small puzzles, soon used up, would otherwise crowd the front
    parts = {'test': rows[:cfg.test_rows], 'train': rows[cfg.test_rows:]}
    for name, part in parts.items():
        part = [{**row, 'id': f'logic/{name}/{i}'} for i, row in enumerate(part)]
        source.write(cfg.out_dir, f'{name}.jsonl', part, files=[], dropped=Counter(), licence='MIT',
                     source=f'data/logic/prepare.py, seed {cfg.seed}', example=name == 'train')
    people = Counter(row['people'] for row in rows)
    counts = ', '.join(f'{n}: {people[n]}' for n in sorted(people))
    print(f'people: {counts}; {alike} drawn twice and left out')


# ---- Published puzzles ----

FOREIGN = {'telling-truth': 1, 'lying': 0, '->': 'if', '<=>': 'iff'}


def foreign(s, n: int):
    """A published sentence, ('lying', 1) or ('->', s, s), in the form of statement(). and, or may
    join more than two."""
    head, *rest = s if isinstance(s, (tuple, list)) and s else (None,)
    if head in ('telling-truth', 'lying') and len(rest) == 1 and rest[0] in range(n):
        return ('is', rest[0], FOREIGN[head])
    if head == 'not' and len(rest) == 1:
        return ('not', foreign(rest[0], n))
    if head in ('and', 'or') and len(rest) > 1 or head in ('->', '<=>') and len(rest) == 2:
        first, *more = (foreign(part, n) for part in rest)
        for part in more:
            first = (FOREIGN.get(head, head), first, part)
        return first
    raise ValueError(f'unknown sentence {s!r}')


def published(row: dict) -> dict:
    """The row of a published puzzle, without its id; Skip where its solution is not the one."""
    quiz = source.text_of(row, 'quiz')
    names = row.get('names')
    statements = row.get('statements')
    solution = row.get('solution')
    lists = isinstance(names, list) and isinstance(solution, list)
    if not lists or not 1 < len(names) == len(solution) <= 10:
        raise ValueError('"names" and "solution" must be lists of 2 to 10 people')
    try:
        if isinstance(statements, str):
            statements = ast.literal_eval(statements)
        sentences = [foreign(s, len(names)) for s in statements]
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f'"statements" must be a list of sentences: {error}') from None
    if len(sentences) != len(names):
        raise ValueError(f'{len(names)} names, but {len(sentences)} statements')

    found = solutions(sentences)
    if not found:
        raise source.Skip('no solution')
    if len(found) > 1:
        raise source.Skip('more than one solution')
    if found[0] != tuple(map(int, solution)):
        raise source.Skip('another solution than it claims')
    ask = (f'Answer with knight or knave for each of {", ".join(map(str, names))}, in this order, '
           'separated by commas.')
    return {
        'prompt': [{'role': 'user', 'content': f'{quiz}\n{ask}'}],
        'question': quiz,
        'answer': ', '.join(KINDS[kind] for kind in found[0]),
        'task': 'match',
        'people': len(names),
    }


def write_published(cfg: Config):
    files = source.find(cfg.source, ('K-and-K/knights-and-knaves', '*.jsonl'))
    dropped = Counter()

    def numbered(row):
        return {**published(row), 'id': f'logic/{dropped["rows in"] - 1}'}
    rows = source.convert(files, numbered, dropped)
    source.write(cfg.out_dir, 'puzzles.jsonl', rows, files=files, dropped=dropped,
                 licence='see the source', source=cfg.source)


def main(cfg: Config):
    if cfg.source:
        write_published(cfg)
    else:
        write_generated(cfg)


if __name__ == '__main__':
    run(main, Config)
