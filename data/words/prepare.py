"""
Word problems of one or more steps: MAWPS and ASDiv (train.csv of arkilpatel/SVAMP, MIT licence) to
train and test on, SVAMP as a test of another kind, and with --gsm8k GSM8K through the same traces.

    python data/words/prepare.py                            # downloads three files, 2 MB
    python data/words/prepare.py --source=path/to/folder    # with train.csv, dev.csv, SVAMP.json
    python data/words/prepare.py --gsm8k=True               # also openai/gsm8k; or its folder

writes to out_dir

    cold.jsonl     {"messages": [user: problem, assistant: trace], "answer", "task", "id"} of some
                   training problems, each different text once before any comes again
    sft.jsonl      the same of all training problems
    rl.jsonl       {"prompt": [user: problem], "answer": "63", "task": "math", "form": "number",
                   "id": "words/train/0"} of all training problems, in the order of sft.jsonl
    test.jsonl     as rl.jsonl, held out: each text once
    svamp.jsonl    as rl.jsonl: SVAMP, whose problems were varied to fool models
    gsm8k_train.jsonl, gsm8k_sft.jsonl, gsm8k_test.jsonl   GSM8K, which leaves the files above as
                   they are

and beside each a manifest. Everything is drawn from the seed.

**A trace** is the equation written out in the order in which it is worked out, a step an operation:
`<think>5 + 4 = 9; 7 * 9 = 63</think><answer>63</answer>`. Numbers of the problem stand as there,
but without commas between thousands; results are exact decimals. A row whose steps do not end in
its answer, or need a number that no decimal is equal to, is left out and counted. GSM8K's steps are
its calculator marks, <<48/2=24>>.

**The text** is what a person would have typed: numbers in their places, no space before a comma, a
capital at the head of each sentence and of each name. ASDiv's rows lost their capitals; they come
back for names that other rows have.

**Split by text.** Masked, a text is its words in lower case, with every number one word, every
name and every he, her or their another, and no punctuation. Two texts are near where of the
four-word sequences that either has the share `NEAR` is in both, be it of the masked texts or with
the masks taken out. Texts that are near, or near through others, make a group. A group with a
problem of SVAMP is in svamp.jsonl alone; of the others some, drawn at random, are the test's, and
the rest are for training. GSM8K keeps its own split: a training problem near any test's, or a test
problem near any training problem of MAWPS and ASDiv, is left out.
"""
import ast
import hashlib
import http.client
import itertools
import os
import random
import re
import sys
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # run as a script from anywhere
from configurator import at_least, run
from data import source
from data.gsm8k import prepare as gsm8k
from data.source import Skip

COMMIT = '689d7ccac74b9983a2ac7cc3b264f441b99e7c53'
REPOSITORY = 'arkilpatel/SVAMP'
ADDRESS = f'https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}'
SECONDS = 30   # that a server may stay silent
# name: (its path in the repository, its sha256)
FILES = {
    'train.csv': ('data/mawps-asdiv-a_svamp/train.csv',
                  'c761cdc6390a67a285c6c346a2931f61bc8f47430eceaeb123cc3d0263efa821'),
    'dev.csv': ('data/mawps-asdiv-a_svamp/dev.csv',
                '978425fa0820a147a20d3cb305a571d77b8ba0d1ccec4a96dd1470bf0079c338'),
    'SVAMP.json': ('SVAMP.json',
                   '5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e'),
}
NEAR = 0.35   # what is promised holds from 0.5; the rest leaves room for other ways to mask


@dataclass
class Config:
    out_dir: str = 'data/words'   # folder for the files
    source: str | None = None     # folder with train.csv, dev.csv and SVAMP.json; None downloads
                                  # them
    gsm8k: bool | str = False     # also GSM8K: True downloads it, or a folder with its train.jsonl
                                  # and test.jsonl
    cold_rows: int = 1000         # rows of cold.jsonl, at most
    test_rows: int = 400          # rows of test.jsonl
    repeats: int = 4              # training problems whose texts differ in numbers and names alone
    seed: int = 1                 # everything is drawn from it

    def __post_init__(self):
        at_least(self, 1, 'cold_rows', 'test_rows', 'repeats')


# ---- The files ----

def originals(cfg: Config) -> dict[str, tuple[str, str]]:
    """-> {name in FILES: (name for messages, path)}"""
    if cfg.source is None:
        return {name: download(name, Path(cfg.out_dir) / 'original') for name in FILES}
    folder = Path(cfg.source)
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f'{folder / name}: no such file; source is a folder with '
                             + ', '.join(FILES))
    return {name: (str(folder / name), str(folder / name)) for name in FILES}


def download(name: str, folder: Path) -> tuple[str, str]:
    """A file of the repository into the folder, unless it is there -> (name for messages, path).
    ValueError where it cannot be had, or is not the file that this script was written for."""
    place, wanted = FILES[name]
    url = f'{ADDRESS}/{place}'
    path = folder / name
    told = f'{REPOSITORY}/{place}'
    if path.is_file() and source.sha256(path) == wanted:
        return told, str(path)

    remedy = f'give a folder with {", ".join(FILES)} as --source='
    print(f'{url} -> {path}', flush=True)
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f'{url} cannot be downloaded ({type(error).__name__}: {error}); '
                         f'{remedy}') from error
    found = hashlib.sha256(content).hexdigest()
    if found != wanted:
        raise ValueError(f'{url} is another file than expected: its sha256 is {found}, not '
                         f'{wanted}; {remedy}')

    folder.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(path.name + '.tmp')
    temp.write_bytes(content)
    os.replace(temp, path)
    return told, str(path)


# ---- Equations, written out ----

def decimal(value: Fraction) -> str:
    """25000, 0.5, -3. Skip where no decimal is equal to it."""
    rest = value.denominator
    places = 0
    while rest % 10 == 0 or rest % 2 == 0 or rest % 5 == 0:
        rest //= next(factor for factor in (10, 2, 5) if rest % factor == 0)
        places += 1
    if rest != 1:
        raise Skip('a number is no decimal')
    digits = len(str(abs(value.numerator))) + places
    exact = Context(prec=digits + 1).divide(Decimal(value.numerator), Decimal(value.denominator))
    text = format(exact, 'f')
    return text.rstrip('0').rstrip('.') if '.' in text else text


def number(text: str) -> Fraction:
    """The value of a number as the files write it: 56.0, .5, 1,200. ValueError for anything
    else."""
    if not re.fullmatch(r'-?(\d[\d,]*\.?\d*|\.\d+)', text):
        raise ValueError(f'{text[:40]!r} is no number')
    return Fraction(text.replace(',', ''))


def plain(text: str) -> str:
    """A number as it is printed: 56.0 -> 56, .5 -> 0.5, but 8.00, a price, as it is."""
    text = text.replace(',', '').removesuffix('.0')
    return re.sub(r'^(-?)\.', r'\g<1>0.', text)


# An equation is a number's text, or (operator, left, right).

def from_prefix(text: str, numbers: list[str]):
    """'- number0 * number1 2.0' with the numbers of the problem -> an equation. ValueError for what
    is none."""
    tokens = text.split()

    def take():
        if not tokens:
            raise ValueError(f'the equation {text!r} lacks an operand')
        token = tokens.pop(0)
        if token in OPERATORS:
            left = take()
            return token, left, take()
        if re.fullmatch(r'number\d+', token):
            index = int(token.removeprefix('number'))
            if index >= len(numbers):
                raise ValueError(f'the equation {text!r} has more numbers than the problem')
            return numbers[index]
        number(token)
        return plain(token)

    equation = take()
    if tokens:
        raise ValueError(f'the equation {text!r} goes on after its end')
    return equation


def from_infix(text: str):
    """'( 4.0 - 8.0 ) + 5.0', '48/2' -> an equation. ValueError for what is none."""
    try:
        body = ast.parse(text.strip().replace(',', ''), mode='eval').body
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f'{text[:80]!r} is no equation') from None

    def take(node):
        if isinstance(node, ast.BinOp) and type(node.op) in SYMBOLS:
            return SYMBOLS[type(node.op)], take(node.left), take(node.right)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = take(node.operand)
            if isinstance(inner, str) and not inner.startswith('-'):
                return f'-{inner}'
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            told = ast.unparse(node)
            number(told)
            return plain(told)
        raise ValueError(f'{text[:80]!r} is no equation of numbers with + - * /')

    return take(body)


OPERATORS = {
    '+': Fraction.__add__,
    '-': Fraction.__sub__,
    '*': Fraction.__mul__,
    '/': Fraction.__truediv__,
}
SYMBOLS = {ast.Add: '+', ast.Sub: '-', ast.Mult: '*', ast.Div: '/'}


def work_out(equation, steps: list[str]) -> str:
    """The value of an equation as text; appends its steps, left before right. Skip where it has
    none that a decimal can say."""
    if isinstance(equation, str):
        return equation
    operator, left, right = equation
    left = work_out(left, steps)
    right = work_out(right, steps)
    if operator == '/' and number(right) == 0:
        raise Skip('the equation divides by zero')
    value = decimal(OPERATORS[operator](number(left), number(right)))
    steps.append(f'{left} {operator} {right} = {value}')
    return value


def worked_out(equation, answer: Fraction) -> tuple[list[str], str]:
    """-> (steps, answer as text). Skip where they do not end in the answer."""
    steps = []
    value = work_out(equation, steps)
    if not steps:
        raise Skip('the equation has no step')
    if number(value) != answer:
        raise Skip('the equation does not give the answer')
    return steps, decimal(answer)


# ---- Text ----

def detokenised(text: str) -> str:
    """'I ca n't pay $ 3 , he said .' as it is typed: I can't pay $3, he said."""
    text = ' '.join(text.replace('’', "'").split())
    text = re.sub(r"``\s*(.*?)\s*''", r'"\1"', text)
    text = re.sub(r"(?<!\S)' ([^']*?) '(?!\S)", r"'\1'", text)           # ' a title '
    text = re.sub(r"(\w) ?n't\b", r"\1n't", text)
    text = re.sub(r"(\w) ?' ?(s|re|ve|ll|d|m)\b", r"\1'\2", text)
    text = re.sub(r"(\w) '(?= [a-z])", r"\1'", text)                      # the boys ' dog
    text = re.sub(r'(?<=[A-Za-z]) - (?=[A-Za-z])', '-', text)
    text = re.sub(r'\$ (?=\d)', '$', text)
    text = re.sub(r'(?<=\d) %', '%', text)
    text = re.sub(r'\( ', '(', text)
    return re.sub(r' +([.,?!;:)])', r'\1', text)


def joined(body: str, question: str) -> str:
    """'If each box has 5' and 'How many ...?' in one sentence; whole sentences stay apart, and a
    question that begins with a preposition ('for' and 'how much') in one piece."""
    cut = re.fullmatch(r'(.*) (how|what)', body)
    if cut:   # 'Aiyanna has 140 what' and "'s the difference ...?"
        body, question = cut[1], f'{cut[2]} {question}'
    last = body.split(' ')[-1].lower()
    if not body or body[-1] in '.?!,;' or last in ('and', 'at', 'by', 'for', 'from', 'in', 'to'):
        return f'{body} {question}'.strip()
    if question.startswith(('How ', 'What ', 'About ', 'Total ')):
        question = question[0].lower() + question[1:]
    return f'{body}, {question}'


HEAD = re.compile(r'(?:^|[.?!]"? )"?([A-Za-z])')
TITLES = 'mr|mrs|ms|dr|mt'
NO_END = re.compile(rf'\b({TITLES}|[a-z]\.[a-z])\.$', re.IGNORECASE)   # of a sentence
WORD = re.compile(r'[A-Za-z]+|\d[\d,]*(?:\.\d+)?')
HAS_CAPITAL = re.compile('[A-Z]')


def heads_of(text: str) -> list[int]:
    """Where its sentences begin with a letter."""
    found = []
    for match in HEAD.finditer(text):
        before = text[:match.start() + 1] if match.start() else ''
        if not NO_END.search(before):
            found.append(match.start(1))
    return found


# Names that only rows without capitals have, or mostly, and words that are capitalised for another
# reason
MORE_NAMES = set(
    'alan alex alexa alexander alicia alvin anderson andy annette antonia asia audrey australians '
    'bella belle beryl billie blithe bruno bryon buddy caitlin canada carey chad charlene '
    'charlotte chicago chris christmas chuck corey danny denver derrick dora dubai easter edgar '
    'england erica erie erin evan finn flannery france frankie frannie griffin harvey hazel '
    'howard huron italy janine jasmine jasper jen jenn kale katerina kurt laurie lee lenny lex '
    'lily liz lizzie london lou luis macadams marcie margaret marian marin matt maura max meg '
    'michigan mikayla miki millie mona monday morgan naples nick ontario penny phyllis pinky '
    'ramon randall richard rick riley rob robyn sammy sandra savant seattle simon smith susie '
    'thanksgiving trevor tripp tuesday vegas vinnie wally washington wednesday welch winnie'
    .split())
NO_NAMES = set(
    'ace assume assuming bay ca carefully cd cds central chalet city countertop cremes delicious '
    'determine dos dvd greasy grove hawks heads hoping hound ipo lemon life march mustang '
    'north patrol paving pcs planet professor recently roadster salesperson spoon states tigers '
    'unfortunately united upon vegetarian wafting wear'.split())


def names_in(texts: list[str]) -> set[str]:
    """The names in texts, in lower case: words that in those with capitals have one inside
    sentences more often than not, or only begin sentences; in the others what follows a title."""
    capital = Counter()
    small = Counter()
    at_head = Counter()
    titled = set()
    for text in texts:
        if not HAS_CAPITAL.search(text):
            titled.update(re.findall(rf'\b(?:{TITLES})\. ([a-z]+)', text))
            continue
        heads = heads_of(text)
        for match in WORD.finditer(text):
            word = match[0]
            if match.start() in heads:
                at_head[word.lower()] += 1
            elif word[0].isupper():
                capital[word.lower()] += 1
            else:
                small[word] += 1
    names = {word for word in capital if capital[word] > small[word]}
    names |= {word for word in at_head if not small[word]}
    return {word for word in names | titled | MORE_NAMES if len(word) > 1} - NO_NAMES


def capitalised(text: str, names: set[str]) -> str:
    """Capitals at the heads of sentences, for I, and in a text without any for names."""
    if not HAS_CAPITAL.search(text):
        known = names | set(TITLES.split('|'))
        text = re.sub('[a-z]+', lambda m: m[0].title() if m[0] in known else m[0], text)
    text = re.sub(r"\bi\b(?!\.)", 'I', text)
    for at in heads_of(text):
        text = text[:at] + text[at].upper() + text[at + 1:]
    return text


# ---- Problems ----

@dataclass
class Problem:
    """A word problem, the steps to its answer, and its text masked as the head of this file
    says."""
    text: str
    steps: list[str]
    answer: str
    id: str
    masked: str = ''


def problem_rows(file, read, dropped: Counter) -> list[Problem]:
    """The problems of a file, each read from its row by read(row, index)."""
    indices = itertools.count()
    return list(source.convert([file], lambda row: read(row, next(indices)), dropped))


def numbers_of(row: dict) -> list[str]:
    """The numbers of a row of train.csv or dev.csv, as they are printed."""
    texts = source.text_of(row, 'Numbers').split()
    for text in texts:
        number(text)
    return [plain(text) for text in texts]


def read_train(row: dict, index: int) -> Problem:
    """A row of train.csv."""
    numbers = numbers_of(row)
    for text in numbers:
        if len(text.partition('.')[2]) > 4:   # 0.3333333333333333, in words a third
            raise Skip('a number has more than four decimals')
    question = source.text_of(row, 'Question')
    body = (row.get('Body') or '').strip()
    if body and question.startswith(body) and body[-1:] not in '.?!,':
        question = joined(body, question[len(body):].strip())
    written = source.text_of(row, 'Equation')
    equation = from_prefix(written, numbers)

    for i, value in enumerate(numbers):
        is_used = f'number{i}' in written.split() or f'$ number{i}' in question
        if value == '1' and not is_used:
            value = 'one'   # as it was before it was taken for a number: one of them, one day
        question = re.sub(rf'\bnumber{i}\b', value, question)
    if re.search(r'\bnumber\d+\b', question):
        raise ValueError(f'{question[:80]!r} has more numbers than {numbers}')
    steps, answer = worked_out(equation, number(source.text_of(row, 'Answer')))
    return Problem(detokenised(question), steps, answer, f'words/train/{index}')


def letters(text: str) -> str:
    return re.sub('[^a-z0-9]', '', text.lower())


def answers_of_dev(file) -> dict[str, Fraction]:
    """The letters of a problem of dev.csv -> its answer."""
    answers = {}
    for where, row in source.read([file]):
        try:
            text = source.text_of(row, 'Question')
            for i, value in enumerate(numbers_of(row)):
                text = re.sub(rf'\bnumber{i}\b', value, text)
            answers[letters(text)] = number(source.text_of(row, 'Answer'))
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from error
    return answers


def read_svamp(row: dict, others: dict[str, Fraction]) -> Problem:
    """A row of SVAMP.json. others: what dev.csv, an earlier form of it, has for answers."""
    body = source.text_of(row, 'Body')
    question = source.text_of(row, 'Question')
    answer = number(str(row.get('Answer')))
    if others.get(letters(body + question), answer) != answer:
        raise Skip('SVAMP.json and dev.csv have different answers')
    steps, answer = worked_out(from_infix(source.text_of(row, 'Equation')), answer)
    text = detokenised(joined(body, question))
    return Problem(text, steps, answer, f'words/svamp/{source.text_of(row, "ID")}')


def read_gsm8k(row: dict, name: str) -> Problem:
    """A row of GSM8K, whose marks <<48/2=24>> are the steps."""
    rl, _ = gsm8k.convert(row, name)
    answer = number(rl['answer'])
    marks = re.findall(r'<<([^<>]*)>>', row['answer'])
    if not marks:
        raise Skip('no calculator mark')
    steps = []
    for mark in marks:
        left, equals, right = mark.partition('=')
        try:
            equation = from_infix(left)
            result = number(right.strip())
        except ValueError:
            raise Skip('a calculator mark is no equation') from None
        if isinstance(equation, str):
            continue   # <<5=5>>
        value = work_out(equation, steps)
        if number(value) != result:
            raise Skip('a calculator mark does not compute')
    if not steps or number(steps[-1].rpartition(' = ')[2]) != answer:
        raise Skip('the marks do not end in the answer')
    return Problem(rl['prompt'][0]['content'], steps, decimal(answer), name)


# ---- Texts that are near ----

NUMBERS = set('one two three four five six seven eight nine ten eleven twelve'.split())
PERSONS = set('he she they him her them his hers their theirs'.split())   # who stand for names


def masked(text: str, names: set[str]) -> str:
    """The words of a text in lower case, a number as #, a name of one or more words, or what
    stands for it, as @."""
    words = []
    for word in WORD.findall(text):
        word = word.lower()
        if word[0].isdigit() or word in NUMBERS:
            word = '#'
        elif word in names or word in PERSONS:
            word = '@'
        if not (word == '@' and words and words[-1] == '@'):
            words.append(word)
    return ' '.join(words)


def grams_of(text: str) -> frozenset:
    """Four words in a row, each such sequence once; of a shorter text all."""
    words = text.split()
    last = max(len(words) - 3, 1)
    return frozenset(' '.join(words[i:i + 4]) for i in range(last))


def near_pairs(texts: list[str], firsts: int | None = None):
    """Yields (i, j) with j < i of masked texts that are near: as they are, or without their masks,
    as where one has a name more. firsts: only with j below it."""
    bare = [' '.join(re.findall('[a-z]+', text)) for text in texts]
    for form in (texts, bare):
        yield from pairs_of(form, len(texts) if firsts is None else firsts)


def pairs_of(texts: list[str], firsts: int):
    """Yields (i, j) with j < i and j < firsts, each pair once, where the Jaccard index of the grams
    of two texts is NEAR or more. Exact: every two texts that share a gram are compared."""
    grams = [grams_of(text) for text in texts]
    holders = defaultdict(list)   # gram -> the texts so far that have it
    for i, own in enumerate(grams):
        shared = Counter()
        for gram in own:
            shared.update(holders.get(gram, ()))
            if i < firsts:
                holders[gram].append(i)
        for j, common in shared.items():
            if common >= NEAR * (len(own) + len(grams[j]) - common):
                yield i, j


def groups_of(problems: list[Problem]) -> list[list[Problem]]:
    """Problems that are near, or near through others, together; in the order of their firsts."""
    texts = list(dict.fromkeys(problem.masked for problem in problems))
    parent = list(range(len(texts)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in near_pairs(texts):
        parent[root(i)] = root(j)
    place = {text: i for i, text in enumerate(texts)}
    groups = defaultdict(list)
    for problem in problems:
        groups[root(place[problem.masked])].append(problem)
    return list(groups.values())


def without_repeats(problems: list[Problem], most: int, dropped: Counter) -> list[Problem]:
    """Less those that came before, word for word, and what has the masked text of `most` earlier
    ones."""
    texts = set()
    times = Counter()
    kept = []
    for problem in problems:
        if problem.text.lower() in texts:
            dropped['the same problem again'] += 1
        elif times[problem.masked] == most:
            dropped[f'more than {most} that differ in numbers and names alone'] += 1
        else:
            texts.add(problem.text.lower())
            times[problem.masked] += 1
            kept.append(problem)
    return kept


def split(cfg: Config, ours: list[Problem], svamp: list[Problem], dropped: Counter):
    """-> (training problems, test problems) of MAWPS and ASDiv, shuffled, with SVAMP's kept out of
    both. Counts in dropped what is in neither."""
    rng = random.Random(cfg.seed)
    groups = groups_of(ours + svamp)
    theirs = {problem.id for problem in svamp}
    free = []
    for group in groups:
        if any(problem.id in theirs for problem in group):
            dropped['near a problem of SVAMP'] += sum(p.id not in theirs for p in group)
        else:
            free.append(group)
    rng.shuffle(free)

    # whole groups, until the test has its rows
    test = []
    taken = 0
    while taken < len(free) and len(test) < cfg.test_rows:
        group = without_repeats(rng.sample(free[taken], len(free[taken])), 1, Counter())
        test += group[:cfg.test_rows - len(test)]
        taken += 1
    if len(test) < cfg.test_rows or taken == len(free):
        raise ValueError(f'test_rows={cfg.test_rows}: the split by text has {len(test)} different '
                         'texts for a test, and none would be left to train on; lower test_rows')
    rng.shuffle(test)
    dropped['of a group of the test, which has each text once'] += (
        sum(map(len, free[:taken])) - len(test))

    train = [problem for group in free[taken:] for problem in group]
    rng.shuffle(train)
    sizes = sorted((len(group) for group in groups), reverse=True)
    print(f'{len(ours)} problems and {len(svamp)} of SVAMP in {len(groups)} groups of near texts, '
          f'the largest of {", ".join(map(str, sizes[:5]))}')
    return without_repeats(train, cfg.repeats, dropped), test


# ---- Files ----

def rl_row(problem: Problem) -> dict:
    return {'prompt': [{'role': 'user', 'content': problem.text}], 'answer': problem.answer,
            'task': 'math', 'form': 'number', 'id': problem.id}


def sft_row(problem: Problem) -> dict:
    trace = f'<think>{"; ".join(problem.steps)}</think><answer>{problem.answer}</answer>'
    messages = [{'role': 'user', 'content': problem.text},
                {'role': 'assistant', 'content': trace}]
    return {'messages': messages, 'answer': problem.answer, 'task': 'math', 'id': problem.id}


def first_texts_first(problems: list[Problem]) -> list[Problem]:
    """In the same order, but a masked text comes again only after all others came."""
    times = Counter()
    rank = []
    for problem in problems:
        rank.append(times[problem.masked])
        times[problem.masked] += 1
    order = sorted(range(len(problems)), key=lambda i: rank[i])
    return [problems[i] for i in order]


def write(cfg: Config, name: str, row_of, problems: list[Problem], files, dropped: Counter,
          whence: str, example: bool = False):
    rows = (row_of(problem) for problem in problems)
    source.write(cfg.out_dir, name, rows, files=files, dropped=dropped, licence='MIT',
                 source=whence, example=example)
    steps = Counter(min(len(problem.steps), 4) for problem in problems)
    told = ', '.join(f'{n if n < 4 else "4 or more"}: {steps[n]}' for n in sorted(steps))
    print(f'    {len({p.masked for p in problems})} different texts; steps {told}')


def main(cfg: Config):
    files = originals(cfg)
    whence = cfg.source or f'{REPOSITORY}@{COMMIT}'

    # problems of both kinds, their text made whole
    left_out = {'train': Counter(), 'svamp': Counter()}
    ours = problem_rows(files['train.csv'], read_train, left_out['train'])
    others = answers_of_dev(files['dev.csv'])
    svamp = problem_rows(files['SVAMP.json'], lambda row, _: read_svamp(row, others),
                         left_out['svamp'])
    names = names_in([problem.text for problem in ours + svamp])
    for problem in ours + svamp:
        problem.text = capitalised(problem.text, names)
        problem.masked = masked(problem.text, names)

    train, test = split(cfg, ours, svamp, left_out['train'])
    random.Random(cfg.seed).shuffle(svamp)
    cold = first_texts_first(train)[:cfg.cold_rows]
    from_train = [files['train.csv']]
    write(cfg, 'cold.jsonl', sft_row, cold, from_train, Counter(), whence, example=True)
    write(cfg, 'sft.jsonl', sft_row, train, from_train, left_out['train'], whence)
    write(cfg, 'rl.jsonl', rl_row, train, from_train, left_out['train'], whence, example=True)
    write(cfg, 'test.jsonl', rl_row, test, from_train, Counter(), whence)
    write(cfg, 'svamp.jsonl', rl_row, svamp, [files['SVAMP.json'], files['dev.csv']],
          left_out['svamp'], whence)
    if cfg.gsm8k:
        main_gsm8k(cfg, names, train, test + svamp)


def main_gsm8k(cfg: Config, names: set[str], train: list[Problem], tests: list[Problem]):
    """GSM8K's files. train, tests: the problems that they must not be near to."""
    folder = None if cfg.gsm8k is True else cfg.gsm8k
    from_gsm8k = gsm8k.Config(out_dir=cfg.out_dir, source=folder)
    files, problems, left_out = {}, {}, {}
    for part in ('train', 'test'):
        try:
            name, path, rows = gsm8k.originals(from_gsm8k, part)
        except ValueError as error:
            raise ValueError(str(error).replace('--source=', '--gsm8k=')) from error
        files[part] = (name, path)
        left_out[part] = Counter({'rows in': len(rows)})
        problems[part] = []
        for i, row in enumerate(rows):
            try:
                problems[part].append(read_gsm8k(row, f'gsm8k/{part}/{i}'))
            except Skip as reason:
                left_out[part][str(reason)] += 1
            except ValueError as error:
                raise ValueError(f'{name}:{i + 1}: {error}') from error

    names = names | names_in([p.text for part in problems.values() for p in part])
    for problem in train + tests + problems['train'] + problems['test']:
        problem.masked = masked(problem.text, names)
    held_out = far_from(train, problems['test'], left_out['test'], 'near a training problem')
    training = far_from(tests + held_out, problems['train'], left_out['train'],
                        'near a problem of a test')
    random.Random(cfg.seed).shuffle(training)
    training = without_repeats(training, cfg.repeats, left_out['train'])

    whence = folder or f'openai/gsm8k@{from_gsm8k.revision}'
    for name, row_of, part in (('train', rl_row, 'train'), ('sft', sft_row, 'train'),
                               ('test', rl_row, 'test')):
        rows = training if part == 'train' else held_out
        write(cfg, f'gsm8k_{name}.jsonl', row_of, rows, [files[part]], left_out[part], whence,
              example=name == 'sft')


def far_from(fixed: list[Problem], problems: list[Problem], dropped: Counter, reason: str):
    """The problems that are near none of the fixed ones; the others are counted under the
    reason."""
    texts = [problem.masked for problem in fixed + problems]
    near = {i for i, _ in near_pairs(texts, len(fixed)) if i >= len(fixed)}
    dropped[reason] += len(near)
    return [problem for i, problem in enumerate(problems, len(fixed)) if i not in near]


if __name__ == '__main__':
    run(main, Config)
