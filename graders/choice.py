"""
Which letter does an answer to a multiple-choice question choose?

    choice_of('**Answer: (b)**', {})                                     # 'B'
    choice_of('aspirin', {'choices': ['Ibuprofen', 'Aspirin']})          # 'B'
    choice_of('B or C', {})                                              # None
"""
import re
import unicodedata

from graders.maths import FONTS

# ---------------------------------------------------------------- what stands around a letter

HENCE = re.compile(r'^(?i:so|thus|hence|therefore|then|finally)\b[, ]*')

LEAD = re.compile(  # The best answer is; 所以选
    r'(?:'
    r'(?:(?:i(?: would|\'d)? )?(?:choose|pick|select|say)'
    r'|it(?: is|\'s)'
    r'|(?:(?:the|my|our|final|correct|best|right|most likely|most appropriate) )*'
    r'(?:answer|ans|option|choice|letter|statement)'
    r'(?: (?:is|was|would be|should be|must be))?)(?![a-z])'
    r'|[所以因此故综上述本题我应该,]*(?:正确|最佳|最终)?的?'
    r'(?:答案|选项|选择|选)(?:应该|应)?[是为选]?'
    r')'
    r'(?:[ :."]|[=–—-] )*', re.IGNORECASE)

LETTER = re.compile(  # the letter, what closes it, and what follows: (B) Aspirin
    r'[(\[{"\'“‘「]*([A-Ea-e])(?![A-Za-z0-9])'
    r'( [-–—](?= )|[)\]}.:,;。"\'”’」]*)(.*)')

CORRECT = re.compile(  # B is the right answer; B选项
    r'(?i:is (?:the )?(?:(?:correct|right|best)(?: (?:answer|option|choice))?|answer))'
    r'|选?项?(?:是?正确的?)?')

REASON = re.compile(
    r'(?i:explanation|reason|rationale|justification|because|since)\b|解析|解释|理由|因为')

EXPLAINED = re.compile(  # it may speak of the other letters, but choose none
    r'(?i)^\W*(?:explanation|reason(?:ing)?|rationale|justification|解析|解释|理由) ?[:：]'
    r'(?!.*(?:\b(?:no|not|wait|actually|answer|correct|right|best|instead|rather|choose|pick'
    r'|select|or)\b|选|对|正确)).*')

LONE = re.compile(r'(?<![A-Za-z0-9])[A-E](?![A-Za-z0-9])')

ARTICLE = re.compile(  # A beta blocker; but A can, A should
    r'(?<![A-Za-z0-9])A (?!(?:and|but|not|nor|are|was|has|can|may|for|because|should|would|could'
    r'|also|with|seems?|might|must|instead|rather|then|than|too|does|only|looks|plus|versus)\b)'
    r'(?=[a-z]{3})')

QUOTES = ' $"\'“”‘’「」`_{}'

# ---------------------------------------------------------------- reading


def plain(text):
    """A text as options are compared: one spelling of fonts, case, white space and what ends it."""
    text = _one_font(str(text))
    return ' '.join(text.casefold().split()).strip(QUOTES + '.。!')


def _one_font(text):
    text = re.sub(FONTS, r' \1 ', text)
    return unicodedata.normalize('NFKC', text).replace('*', '')


def _without_leads(answer):
    """An answer as it stands, without one lead and without two: 'The answer is', 'option'."""
    text = re.sub(r'\\[,;:! ()\[\]]|~', ' ', _one_font(answer))
    text = text.split('####')[-1].strip(QUOTES)
    texts = [HENCE.sub('', text)]
    for _ in range(2):
        text = texts[-1]
        if lead := LEAD.match(text):
            text = text[lead.end():].strip(QUOTES)
        texts.append(text)
    return texts


def choice_of(answer, row):
    """The letter A-E that an answer chooses, or None: 'B', '(b)', '**B.**', '\\text{B}', '选B',
    'Answer: B', 'B - Aspirin', 'B (Aspirin)', 'B because ...', and an option's text alone.

    What follows the letter may name no other letter, and not the text of another of row['choices'],
    unless it is the text of its own.
    """
    options = [plain(option) for option in row.get('choices') or ()]
    texts = _without_leads(answer)
    found = LETTER.fullmatch(texts[-1])

    # the letter, with nothing or with its own option's text
    if found and _is_plain_choice(found, options):
        return found[1].upper()

    # the text of one option
    read = {plain(answer), *map(plain, texts)}
    named = [i for i, option in enumerate(options) if option in read]
    if len(named) == 1:
        return 'ABCDE'[named[0]]

    # the letter, with words about it
    if found and _is_explained_choice(found, options):
        return found[1].upper()
    return None


def _parts(found, options):
    """A match of LETTER -> what follows the letter, the same without parentheses around it, and the
    text of the letter's own option, None where there is none."""
    rest = found[3].strip(' .。!')
    inner = rest[1:-1] if rest[:1] + rest[-1:] == '()' else rest
    index = ord(found[1].upper()) - ord('A')
    own = options[index] if index < len(options) else None
    return rest, inner, own


def _is_plain_choice(found, options):
    rest, inner, own = _parts(found, options)
    if not rest or CORRECT.fullmatch(rest):
        return True
    return own == plain(inner)


def _is_explained_choice(found, options):
    rest, inner, own = _parts(found, options)
    if plain(inner) in options:  # another's
        return False

    after = rest
    if own is not None and rest.casefold().startswith(own):
        after = rest[len(own):]
    after = EXPLAINED.sub('', after)
    after = ARTICLE.sub('', after)
    others = set(LONE.findall(after)) - {found[1].upper()}
    if others:
        return False

    is_marked = found[2] or inner != rest or REASON.match(rest)
    return bool(is_marked) and found[1].isupper()
