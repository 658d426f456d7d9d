"""
Which languages is a text written in? By the script of its words, and among those in Latin letters
by their commonest words.

    language_counts('First we add, 然后乘', 'en')     # Counter({'en': 3, 'zh': 3})

Told apart: Chinese, Japanese, Korean, Russian (all that is Cyrillic), Greek, Arabic, Hebrew, Hindi
and Thai by script; of those in Latin letters English from all others, these among each other as far
as their FUNCTION_WORDS differ (da is also Norwegian, hr also Serbian and Bosnian, id also Malay;
hi-Latn and zh-Latn are romanised Hindi and pinyin), and a sentence that looks like none of them is
'und'. That takes some words: capitals, units and variables tell nothing, and what holds fewer than
three others is in the language of the text around it, or else in the wanted one.

Measured, each text by itself: of 4,929 sentences of six to fourteen words in 48 other Latin
languages (Django's translations) 2.1% are taken for English, 1.4% in those listed here; of what is
English less than half is taken for it in 0.03% of GSM8K's solutions, 0.04% of their lines, none of
MATH-500's solutions and R1's traces, 0.6% of MedMCQA's explanations, half of which are names.
Models that identify languages (lingua, py3langid) miss 0.7% and 0.1% of the foreign sentences, but
2.3% and 2.9% of GSM8K's lines and 6% and 5% of MATH's sentences. Honest reasoning would pay for
that, so none is an option here.
"""
import re
import unicodedata
from collections import Counter

# ---------------------------------------------------------------- scripts

LETTERS = r'A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff'
WORD = re.compile(  # one script a group; a run of letters, or one Han, kana or hangul character
    rf"(?P<latin>[{LETTERS}]+(?:['\u2019-][{LETTERS}]+)*)"
    r'|(?P<han>[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])'
    r'|(?P<kana>[\u3041-\u3096\u30a1-\u30fa])'
    r'|(?P<hangul>[\u1100-\u11ff\u3131-\u3163\uac00-\ud7a3])'
    r'|(?P<cyrillic>[\u0400-\u052f]+)'
    r'|(?P<greek>[\u0370-\u03ff\u1f00-\u1fff]+)'
    r'|(?P<hebrew>[\u05d0-\u05ea]+)'
    r'|(?P<arabic>[\u0620-\u06d3\u06fa-\u06ff\u0750-\u077f]+)'
    r'|(?P<devanagari>[\u0900-\u0963]+)'
    r'|(?P<thai>[\u0e01-\u0e4e]+)'
    r'|(?P<other>[^\W\d_])')
SCRIPT_LANGUAGES = {
    'kana': 'ja', 'hangul': 'ko', 'cyrillic': 'ru', 'greek': 'el', 'arabic': 'ar', 'hebrew': 'he',
    'devanagari': 'hi', 'thai': 'th'}

# ---------------------------------------------------------------- words in Latin letters

ENGLISH = '''
the of and is are was were to that this with for we it its if then which have has had be been by
from so can could now let but not as per he she his her they them their you your my me us our at
each how many much will would there here more most than after before does do did in on or an all
any both what when where who why because since while until about into out up down over under
between through again also only just very too same other another some no yes one two three four
five six seven eight nine ten eleven twelve twenty hundred thousand half third first second next
last finally therefore thus hence however maybe perhaps wait okay ok well hmm oh alright actually
right wrong correct answer total number numbers sum product difference value values equal equals
equation divide divided multiply multiplied add added adding subtract times plus minus get gets
got give gives given take takes make makes made need needs use using used find know see check
think say says means mean must may might should cannot possible start like new old less fewer
least every left remaining time day days week weeks year years hour hours minute minutes money
cost costs price dollars cents people points point line side sides square area length case cases
set sets form term terms function factor root angle triangle circle solve solution step order way
work works problem question example big small large largest smallest greater positive negative
even odd part parts whole together go goes going come want buy buys bought sell sells sold pay
pays paid spend spends spent earn earns long back still such these those once twice age man men
good gave read saw ate caught put brought found full away today tomorrow yesterday inch inches
foot feet mile miles pound pounds gallon gallons member members student students boy boys girl
girls kid kids child children friend friends mother father brother sister family woman book books
card cards apple apples ball balls box boxes bag bags car cars cat cats dog dogs food water house
school page pages piece pieces row rows room ticket tickets game games color red blue white black
class group average percent rate speed distance meter meters final wide tall high deep dice roll
rolled show shows weight height volume width radius degree degrees prime integer integers digit
digits fraction power real constant coefficient variable expression polynomial matrix vector limit
graph lines list item items string return write note similar issue common simple hard easy able
sure quite really ever never always often own main patient cell cells blood drug disease treatment
guess quick search enough stop sort
'''
FUNCTION_WORDS = {  # frequent in one of these languages, rare in formulas
    'en': ENGLISH,
    'de': 'der die das und ist sind ein eine einen nicht wir mit von zu den dem des für auf '
          'auch wenn dann oder wird aber es ich sich noch wie nur man kann alle zwei drei bei '
          'zum durch also denn werden diese dieser sein haben ihr muss müssen keine',
    'fr': 'le les est sont et une des du nous avec pour dans que qui sur donc alors mais pas ou '
          'cette ce il elle au aux un la je ne si par deux trois on se car leur soit être',
    'es': 'el los las es son una del con para por que como entonces pero lo si cuando este esta '
          'al hay se la un en su más no dos tres luego sea pues también y le',
    'it': 'il gli è sono una della con per che come quindi allora non se questo questa nel '
          'abbiamo più lo la un in le si due tre ed anche poi da del sia ha',
    'pt': 'os as é são uma da do dos com para por que como então mas não se quando isto este '
          'esta em temos um ou no na ao mais dois três depois pelo seja também ser',
    'nl': 'de het een en van is dat we in op te niet voor met zijn er aan als dan dus maar ook '
          'om die naar nog bij wordt tot of deze uit hij ze twee drie heeft kan hoeveel moet',
    'sv': 'och att det som en är vi på av för med inte den till har om ett de så men eller '
          'från då nu kan alltså detta här vara två tre han får jag blir hur ska',
    'da': 'og at det er en vi på af for med ikke den til har om et de så men eller fra da nu '
          'kan altså dette vil som være to tre han skal jeg der bliver hvor må',
    'pl': 'nie to jest się na że do jak ale więc co dla od po czy tak za jego tylko jeszcze '
          'który która są dwa trzy oraz przez mamy teraz jeśli bo ze potem',
    'cs': 'je se na že to tak ale jako do pro po od jsou když už jen nebo pak tedy má kde '
          'dva tři který ve ze si není by také co této jeho bude podle protože',
    'hr': 'je da se na su za od to kako ali ili što sa do ako iz bi koji koja samo dva tri onda '
          'dakle jer nije imamo ovo broj in ki pa po ter',
    'ro': 'și este în de la cu pe nu că să se un o din sunt pentru mai care ce dar sau deci '
          'am cei cele două trei avem atunci dacă are lui acest',
    'tr': 've bir bu da de için ile ne çok daha olan o sonra kadar gibi ama olarak var yok mi '
          'en her iki üç eğer olur ise değil çünkü zaman şimdi',
    'vi': 'là và của có không một các được cho với trong này đó để ta '
          'chúng số khi thì nếu vì vậy hai ba ra từ bằng phải hay như còn',
    'id': 'yang dan ini itu dengan untuk dari adalah kita tidak ada akan pada ke jadi maka atau '
          'juga karena sudah bisa dua tiga harus oleh saya lalu dalam satu jika kami',
    'fi': 'ja on ei se että niin mutta kun kuin jos myös tämä ovat voi joka mitä nyt sitten '
          'siis tai kaksi kolme meidän vielä ole hän olla saadaan sen',
    'hu': 'és hogy az nem egy is meg de ez van volt már csak ha mint vagy kell két három '
          'tehát akkor azt még el le ki mert olyan pedig ezt szám be most',
    'sw': 'na ya wa ni kwa katika cha la za kuwa hii hiyo yake sasa lakini kama mbili tatu tu '
          'pia hivyo namba ili au vya baada si',
    'tl': 'ang ng sa mga ay na at ito ko mo niya natin ating para hindi kung isang dalawang '
          'tatlo kaya lang pa si may ako siya dahil nating',
    'hi-Latn': 'hai hain ka ki ke ko se aur mein hum yah yeh kya nahi bhi liye toh ek do teen '
               'kar ham is jo hua wo ho kyunki tak phir karte hume hoga saat',
    'zh-Latn': 'de shi wo ni ta men women zhe zhege na ge ba ji er san si wu liu qi jiu jia '
               'suoyi yinwei xian ranhou hou dengyu yao you hao le bu xia he da an dao xianzai',
}
LANGUAGES = sorted({*FUNCTION_WORDS, *SCRIPT_LANGUAGES.values(), 'zh'})


def _languages_of_words():
    known = {}
    for language, words in FUNCTION_WORDS.items():
        for word in sorted(set(words.split())):
            known.setdefault(word, []).append(language)
    return known


KNOWN = _languages_of_words()  # word -> the languages whose function word it is
LOANS = set('plus minus total problem list item factor matrix vector variable group class limit '
            'graph normal radius system test real prime main term set line per'.split())
UNITS = set('cm mm km kg mg ml ft lb lbs oz min max sec hr mph gcd lcm mod log sin cos tan cot exp '
            'det abc xyz lhs rhs const def int len print'.split())
ENGLISH_LOOKS = re.compile(  # half a word of English
    r"(?:ing|ed|tions?|sions?|ly|ness|ments?|ght|cks?|ies|ous|ful|ism|ist|ical|ive"
    r"|['\u2019]s|n['\u2019]t)$|^(?:th|wh)|ough")


def _language_of(words, default, fewest, share):
    """The language of words in Latin letters: the one of which there are most function words, each
    counted once, and two or more; else `default`, or 'und' where `fewest` words or more tell and
    none is of that language, or, as it is English, no more than `share` of them are or look it."""
    words = list(dict.fromkeys(words))  # in their order, which decides between equals
    lower = [w for w in dict.fromkeys(map(str.lower, words)) if w not in UNITS]
    votes = Counter()
    for word in lower:
        votes.update(KNOWN.get(word, ()))
    english = votes.pop('en', 0)
    loans = len([w for w in lower if w in LOANS])

    # another language than English
    best = max(votes, key=votes.get, default=default)
    if votes[best] >= 2 and votes[best] > max(english - loans, votes[default]):
        return best

    # English, the default, or none that is known
    telling = [w for w in words if _tells(w)]
    if default == 'en':
        likeness = english - loans / 2 + _looks(words, telling)
        return 'en' if _may_be_english(telling, likeness, fewest, share) else 'und'
    if english >= 2 and english > votes[default] and english >= 0.3 * len(telling):
        return 'en'
    if len(telling) >= fewest and not votes[default]:
        return 'und'
    return default


def _tells(word):
    """Whether a word says something of its language: no unit, name or variable."""
    lower = word.lower()
    if lower in UNITS:
        return False
    return lower in KNOWN or word.islower() and (len(word) > 2 or not word.isascii())


def _looks(words, telling):
    """How much like English the words look that are no function words of English: half a word for
    an ending of English, a word less for a letter that English has not."""
    unknown = [w for w in telling if 'en' not in KNOWN.get(w.lower(), ())]
    endings = len([w for w in unknown if ENGLISH_LOOKS.search(w)])
    foreign = len([w for w in words if w[0].islower() and not w.replace('\u2019', '').isascii()])
    return endings / 2 - foreign


def _may_be_english(telling, likeness, fewest, share):
    is_enough = len(telling) >= fewest or len(telling) == fewest - 1 and likeness <= 0
    are_variables = all(len(w) < 4 for w in telling)
    return not is_enough or are_variables or likeness > share * len(telling)


# ---------------------------------------------------------------- the words of a text

GREEK_TEXT = re.compile(  # an accent, or the sigma at the end of a word
    '[\u03ac-\u03af\u03c2\u03ca-\u03ce\u0386\u0388-\u038f\u1f00-\u1fff]')
NEUTRAL = {'```': '```', '`': '`', '$$': '$$', '\\(': '\\)', '\\[': '\\]', '$': '$',
           '[asy]': '[/asy]'}
OPENER = re.compile(
    r'```|`|\$\$|\\\(|\\\[|\$|\[asy\]|\\begin\{(?:(?:align|equation|gather|multline|eqnarray'
    r'|alignat)\*?|[pbvBV]?matrix|array|cases|split|aligned|gathered)\}')


def _without_formulas(text):
    """text with the Latin and Greek letters of its code and LaTeX blanked; words of other scripts
    there still count."""
    kept = []
    pos = 0
    absent = set()  # openers that are never closed any more
    for m in OPENER.finditer(text):
        opener = m[0]
        if m.start() < pos or opener in absent:
            continue
        closer = NEUTRAL.get(opener) or '\\end' + opener.removeprefix('\\begin')
        end = text.find(closer, m.end())
        if end < 0:
            absent.add(opener)
            continue
        inside = text[m.end():end]
        if opener == '$' and _is_money(inside):
            continue
        kept.append(text[pos:m.start()])
        kept.append(re.sub(rf'[{LETTERS}\u0370-\u03ff]+', ' ', inside))
        pos = end + len(closer)
    return re.sub(r'\\[A-Za-z]+', ' ', ''.join(kept) + text[pos:])


def _is_money(inside):
    """What stands between the dollars of $5 and $10."""
    return inside[:1].isspace() or inside[-1:].isspace() or '\n' in inside


def _words_of(sentence):
    """{script: its words}, without variables: single Latin letters, Greek ones without accents."""
    words = {}
    is_greek = GREEK_TEXT.search(sentence)
    for m in WORD.finditer(sentence):
        script = m.lastgroup
        is_variable = script == 'latin' and len(m[0]) == 1 or script == 'greek' and not is_greek
        if not is_variable:
            words.setdefault(script, []).append(m[0])
    return words


def language_counts(text, target):
    """Counter {language: words}. Single Latin letters, and runs of Greek ones in a sentence without
    any accent (αβ), are variables and neutral. Han characters are Japanese in a sentence with
    kana; Latin words are in the language that their sentence shows, or else the whole text, or
    else in the target."""
    if target not in LANGUAGES:
        known = ', '.join(LANGUAGES)
        raise ValueError(f'unknown language {target!r} in the row: use one of {known}')
    text = _without_formulas(unicodedata.normalize('NFKC', text))
    sentences = [_words_of(sentence) for sentence in re.split(r'[\n.!?;。！？；]', text)]

    latin = []
    for words in sentences:
        latin += words.get('latin', ())
    default = target if target in FUNCTION_WORDS else 'en'
    whole = _language_of(latin, default, fewest=4, share=0.2)

    counts = Counter()
    for words in sentences:
        for script, found in words.items():
            if script == 'latin':
                language = _language_of(found, whole, fewest=5, share=0.1)
            elif script == 'han':
                kana = len(words.get('kana', ()))
                language = 'ja' if 10 * kana > len(found) else 'zh'
            else:
                language = SCRIPT_LANGUAGES.get(script, script)
            counts[language] += len(found)
    return counts
