"""
Which languages is a text written in? By the script of its words, and among those in Latin letters by their commonest words.

    language_counts('First we add, 然后乘', 'en')     # Counter({'en': 3, 'zh': 3})
"""
import re
import unicodedata
from collections import Counter

LETTERS = r'A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff'
WORD = re.compile(  # one script a group; a run of letters is a word, but each Han, kana or hangul character is one
    rf"(?P<latin>[{LETTERS}]+(?:['\u2019-][{LETTERS}]+)*)"
    r'|(?P<han>[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])'
    r'|(?P<kana>[\u3041-\u3096\u30a1-\u30fa])|(?P<hangul>[\u1100-\u11ff\u3131-\u3163\uac00-\ud7a3])'
    r'|(?P<cyrillic>[\u0400-\u052f]+)|(?P<greek>[\u0370-\u03ff\u1f00-\u1fff]+)|(?P<hebrew>[\u05d0-\u05ea]+)'
    r'|(?P<arabic>[\u0620-\u06d3\u06fa-\u06ff\u0750-\u077f]+)|(?P<devanagari>[\u0900-\u0963]+)'
    r'|(?P<thai>[\u0e01-\u0e4e]+)|(?P<other>[^\W\d_])')
SCRIPT_LANGUAGES = {'kana': 'ja', 'hangul': 'ko', 'cyrillic': 'ru', 'greek': 'el', 'arabic': 'ar', 'hebrew': 'he',
                    'devanagari': 'hi', 'thai': 'th'}
FUNCTION_WORDS = {  # frequent in one of these languages, rare in the others and in formulas
    'en': 'the of and is are was to that this with for we it if then which have has be by from so can now let but not as per he she '
          'his her they their you at each how many much will would there more than after does',
    'de': 'der die das und ist sind ein eine nicht wir mit von zu den dem für auf auch wenn dann oder wird aber es',
    'fr': 'le les est sont et une des du nous avec pour dans que qui sur donc alors mais pas ou cette ce il elle au',
    'es': 'el los las es son y una del con para por que como entonces pero lo si cuando este esta al hay se',
    'it': 'il gli è sono e una della di con per che come quindi allora ma non se questo questa nel abbiamo più lo',
    'pt': 'o os as é são e uma da do dos com para por que como então mas não se quando isto este esta em temos',
}
FUNCTION_WORDS = {language: set(words.split()) for language, words in FUNCTION_WORDS.items()}
LANGUAGES = sorted({*FUNCTION_WORDS, *SCRIPT_LANGUAGES.values(), 'zh'})
NEUTRAL = {'```': '```', '`': '`', '$$': '$$', '\\(': '\\)', '\\[': '\\]', '$': '$'}


def _without_formulas(text):
    """text with the Latin and Greek letters of its code and LaTeX blanked; words of other scripts there still count."""
    kept, pos, absent = [], 0, set()
    for m in re.finditer(r'```|`|\$\$|\\\(|\\\[|\$', text):
        opener = m[0]
        if m.start() < pos or opener in absent:
            continue
        end = text.find(NEUTRAL[opener], m.end())
        if end < 0:
            absent.add(opener)
            continue
        inside = text[m.end():end]
        if opener == '$' and (inside[:1].isspace() or inside[-1:].isspace() or '\n' in inside):
            continue  # money: $5 and $10
        kept += [text[pos:m.start()], re.sub(rf'[{LETTERS}\u0370-\u03ff]+', ' ', inside)]
        pos = end + len(opener)
    return re.sub(r'\\[A-Za-z]+', ' ', ''.join(kept) + text[pos:])


def _vote(words, default):
    """The Latin-script language whose function words are most frequent; `default` when fewer than two tell."""
    votes = {language: sum(w in known for w in words) for language, known in FUNCTION_WORDS.items()}
    best = max(votes, key=votes.get)
    return best if votes[best] >= 2 and votes[best] > votes.get(default, 0) else default


def language_counts(text, target):
    """Counter {language: words}. Single Latin and Greek letters are variables and neutral. Han characters are Japanese
    in a sentence with kana; Latin words take the language their sentence shows, or else the whole text."""
    if target not in LANGUAGES:
        raise ValueError(f"unknown language {target!r} in the row: use one of {', '.join(LANGUAGES)}")
    sentences = []
    for sentence in re.split(r'[\n.!?;。！？；]', _without_formulas(unicodedata.normalize('NFKC', text))):
        words = {}
        for m in WORD.finditer(sentence):
            if len(m[0]) > 1 or m.lastgroup not in ('latin', 'greek'):
                words.setdefault(m.lastgroup, []).append(m[0].lower())
        sentences.append(words)
    latin = [w for words in sentences for w in words.get('latin', ())]
    whole = _vote(latin, target if target in FUNCTION_WORDS else 'en')
    counts = Counter()
    for words in sentences:
        for script, found in words.items():
            if script == 'latin':
                language = _vote(found, whole)
            elif script == 'han':
                language = 'ja' if 10 * len(words.get('kana', ())) > len(found) else 'zh'
            else:
                language = SCRIPT_LANGUAGES.get(script, script)
            counts[language] += len(found)
    return counts
