"""
What do the words after a number say? Units, multipliers, fractions, powers, signs, counted nouns.

    split('5 square feet')           # '5', Words(units={'foot': 2}, ...)
    split('3 dozen eggs')            # '3', Words(scale=12, nouns={'egg'}, ...)
    number_of('two thirds')          # Fraction(2, 3)

A unit is a number times powers of base units: values in units of the same powers are compared by
these numbers. A word that is in no table is a noun; nouns are compared as they are spelled, but for
case and plural. Where a word may change the number in another way (of, times, or), split() reads
none of them.
"""
import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

# ---------------------------------------------------------------- units

SI = '''
m | meter metre | f p n μ u m c d h k | 1 m
g | gram gramme gm | n μ u m c d h k | 1 g
s | second sec | f p n μ u m | 1 s
L l | liter litre | μ u m c d h k | 1/1000 m^3
Hz | hertz | m k M G T | 1 s^-1
N | newton | m k M | 1000 g m s^-2
J | joule | m k M G | 1000 g m^2 s^-2
W | watt | μ u m k M G T | 1000 g m^2 s^-3
Pa | pascal | h k M G | 1000 g m^-1 s^-2
V | volt | μ u m k M | 1000 g m^2 s^-3 A^-1
A | ampere amp | n μ u m k | 1 A
C | coulomb | n μ u m | 1 A s
F | farad | p n μ u m | 1/1000 A^2 s^4 g^-1 m^-2
H | henry | μ u m | 1000 g m^2 s^-2 A^-2
T | tesla | μ u m | 1000 g s^-2 A^-1
Ω | ohm | m k M | 1000 g m^2 s^-3 A^-2
mol | mole | m k | 1 mol
K | kelvin | m | 1 kelvin
cd | candela | | 1 cd
lm | lumen | | 1 lm
lx | lux | | 1 lx
Bq | becquerel | k M G | 1 Bq
Sv | sievert | μ m | 1 Sv
eV | electronvolt | m k M G T | 1 eV
cal | calorie | k | 1 cal
bar | bar | m | 100000000 g m^-1 s^-2
dB | decibel | | 1 dB
Wh | watthour watt-hour | k M G | 3600000 g m^2 s^-2
rad | radian | m | 1/2 turn π^-1
B | byte | | 8 bit
bit | bit | k M G T | 1 bit
bps | | k M G | 1 bit s^-1
t | tonne | k M | 1000000 g
pc | parsec | k M | 1 pc
'''
PREFIXES = {'f': -15, 'p': -12, 'n': -9, 'μ': -6, 'u': -6, 'm': -3, 'c': -2, 'd': -1, 'h': 2,
            'k': 3, 'M': 6, 'G': 9, 'T': 12}
PREFIX_NAMES = {'femto': -15, 'pico': -12, 'nano': -9, 'micro': -6, 'milli': -3, 'centi': -2,
                'deci': -1, 'deca': 1, 'hecto': 2, 'kilo': 3, 'mega': 6, 'giga': 9, 'tera': 12}
OTHERS = '''
inch in inche = 127/5000 m
foot feet ft = 381/1250 m
yard yd = 1143/1250 m
mile mi = 201168/125 m
nautical-mile nmi = 1852 m
furlong = 25146/125 m
fathom = 1143/625 m
light-year lightyear ly = 9460730472580800 m
astronomical-unit au = 149597870700 m
angstrom å = 1/10000000000 m
acre = 316160658/78125 m^2
hectare ha = 10000 m^2
gallon gal = 473176473/125000000000 m^3
quart qt = 473176473/500000000000 m^3
pint pt = 473176473/1000000000000 m^3
cup = 473176473/2000000000000 m^3
fluid-ounce floz = 473176473/16000000000000 m^3
tablespoon tbsp = 473176473/32000000000000 m^3
teaspoon tsp = 473176473/96000000000000 m^3
cc ccm = 1/1000000 m^3
pound = 45359237/100000 g, 1 gbp
lb = 45359237/100000 g
ounce oz = 45359237/1600000 g
stone = 317514659/50000 g
ton = 45359237/50 g, 1000000 g, 5080234544/5000 g
carat = 1/5 g
quintal = 100000 g
minute min = 60 s
hour h hr = 3600 s
day = 86400 s
week wk = 604800 s
fortnight = 1209600 s
month mos = 1 month
year yr = 12 month, 31536000 s
decade = 120 month
century = 1200 month
millennium millennia = 12000 month
mph = 1397/3125 m s^-1
kmh kph kmph = 5/18 m s^-1
knot kt kts = 463/900 m s^-1
rpm = 1/60 turn s^-1
mpg = 1 mpg
hp horsepower = 1 hp
psi = 1 psi
atm atmosphere = 101325000 g m^-1 s^-2
mmhg torr = 1 torr
btu = 1 btu
amu dalton = 1 dalton
dollar buck usd = 1 usd
cent = 1/100 usd
penny pennie = 1/100 usd, 1/100 gbp
nickel = 1/20 usd
dime = 1/10 usd
euro eur = 1 eur
sterling gbp quid = 1 gbp
pence = 1/100 gbp
shilling = 1/20 gbp
rupee inr rs = 1 inr
paisa paise = 1/100 inr
yen jpy = 1 jpy
yuan cny rmb renminbi = 1 cny
yenyuan = 1 jpy, 1 cny
jiao = 1/10 cny
fen = 1/100 cny
won krw = 1 krw
ruble rouble rub = 1 rub
kopeck kopek = 1/100 rub
peso = 1 peso
franc = 1 franc
degree deg ° = 1/360 turn, 1 celsius, 1 fahrenheit
arcminute arcmin = 1/21600 turn
arcsecond arcsec = 1/1296000 turn
gradian gon = 1/400 turn
turn revolution rotation = 1 turn
celsius centigrade = 1 celsius
fahrenheit = 1 fahrenheit
percent % pct percentage = 1 percent
unit = 1 unit
am a.m = 1 am
pm p.m = 1 pm
kilobyte kb KB kB = 8000 bit, 8192 bit
megabyte mb MB = 8000000 bit, 8388608 bit
gigabyte gb GB = 8000000000 bit, 8589934592 bit
terabyte tb TB = 8000000000000 bit, 8796093022208 bit
petabyte PB = 8000000000000000 bit, 9007199254740992 bit
kibibyte KiB = 8192 bit
mebibyte MiB = 8388608 bit
gibibyte GiB = 8589934592 bit
tebibyte TiB = 8796093022208 bit
kilo = 1000 g
jin = 500 g
'''
OTHER_SCRIPTS = '''
yuan 元 圆 块 块钱 人民币|yen 円|won 원|jiao 角 毛
dollar 美元 ドル 달러 доллар долларов доллара
ruble рубль рубля рублей руб|rupee रुपये रुपए रुपया
euro 欧元 ユーロ 유로 евро
m 米 公尺 メートル 미터 метр метра метров м मीटर|dm 分米 дм
cm 厘米 公分 センチ センチメートル 센티미터 сантиметр
cm сантиметров см
mm 毫米 ミリ ミリメートル 밀리미터 миллиметров мм
km 千米 公里 キロ キロメートル 킬로미터 километр километра
km километров км
g 克 グラム 그램 грамм граммов г|mg 毫克 мг
t 吨 噸 トン 톤 тонна тонны тонн
kg 千克 公斤 キログラム 킬로그램 килограмм килограммов кг
l 升 リットル 리터 литр литра литров л
ml 毫升 ミリリットル 밀리리터 мл
second 秒 秒钟 초 секунда секунды секунд сек
minute 分钟 分鐘 분 минута минуты минут мин
hour 小时 小時 時間 시간 час часа часов|day 天 日 일 день дня дней
week 周 星期 週間 주 неделя недели недель
year 年 년 год года лет
month 个月 個月 ヶ月 か月 개월 месяц месяца месяцев|degree 度 도
celsius 摄氏度
percent 百分点 パーセント 퍼센트 процент процента процентов
hectare 公顷|jin 斤
'''


def _number(text):
    top, _, bottom = text.partition('/')
    return Fraction(int(top), int(bottom or 1))


def _measure(text):
    """'1000 g m s^-2' -> (Fraction(1000), {'g': 1, 'm': 1, 's': -2})"""
    factor, *bases = text.split()
    parts = [base.partition('^') for base in bases]
    return _number(factor), {name: int(power or 1) for name, _, power in parts}


def _tables():
    """-> {unit: [(factor, {base: power}), ...]}, several where the word is ambiguous, and
    {spelling: unit}."""
    measures, spellings = {}, {}
    for line in OTHERS.strip().split('\n'):
        names, _, measure = line.partition(' = ')
        names = names.split()
        measures[names[0]] = [_measure(m) for m in measure.split(', ')]
        spellings.update(dict.fromkeys(names, names[0]))
    for line in SI.strip().split('\n'):
        symbols, names, prefixes, measure = (part.strip() for part in line.split('|'))
        factor, bases = _measure(measure)
        for exponents, spelled in ((PREFIXES, symbols), (PREFIX_NAMES, names)):
            for prefix in ('', *(prefixes.split() if spelled is symbols else PREFIX_NAMES)):
                tens = Fraction(10) ** exponents.get(prefix, 0)
                for name in spelled.split():
                    if prefix + name not in spellings:
                        first = (names.split() or symbols.split())[0]
                        unit = f'10^{exponents[prefix]} {first}' if prefix else first
                        measures.setdefault(unit, [(factor * tens, bases)])
                        spellings[prefix + name] = unit
    for group in OTHER_SCRIPTS.replace('\n', '|').strip('|').split('|'):
        unit, *names = group.split()
        spellings.update(dict.fromkeys(names, spellings.get(unit, unit)))
        measures.setdefault(spellings[names[0]], [(Fraction(1), {unit: 1})])
    for code in 'aud cad chf hkd sgd brl mxn sek nok dkk pln zar thb php vnd twd nzd'.split():
        spellings[code] = code
        measures[code] = [(Fraction(1), {code: 1})]
    return measures, spellings


MEASURES, SPELLINGS = _tables()
MONEY = {SPELLINGS[word] for word in 'dollar euro sterling rupee yen yuan cent yenyuan'.split()}


# ---------------------------------------------------------------- words that change the number

CARDINALS = {word: n for n, word in enumerate(
    'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen '
    'sixteen seventeen eighteen nineteen'.split())}
CARDINALS.update({word: 10 * n for n, word in enumerate(
    'twenty thirty forty fifty sixty seventy eighty ninety'.split(), 2)}, fourty=40)
THOUSANDS = {word: 1000 ** n for n, word in enumerate(
    'thousand million billion trillion quadrillion quintillion sextillion septillion octillion '
    'nonillion decillion'.split(), 1)}
ORDINALS = {
    **{word + 'th': n for word, n in CARDINALS.items() if n > 3}, 'third': 3, 'fifth': 5,
    'eighth': 8, 'ninth': 9, 'twelfth': 12, 'quarter': 4, 'half': 2, 'halve': 2, 'hundredth': 100,
    **{word[:-1] + 'ieth': n for word, n in CARDINALS.items() if word[-2:] == 'ty'},
    **{word + 'th': n for word, n in THOUSANDS.items()}}
for misspelled in ('fiveth', 'eightth', 'nineth', 'twelveth'):
    del ORDINALS[misspelled]
SCALES = {  # what the number is multiplied by
    **THOUSANDS, 'hundred': 100, 'dozen': 12, 'dz': 12, 'score': 20, 'gross': 144, 'grand': 1000,
    'myriad': 10 ** 4, 'googol': 10 ** 100, 'lakh': 10 ** 5, 'lac': 10 ** 5, 'crore': 10 ** 7,
    'milliard': 10 ** 9, 'mn': 10 ** 6, 'mln': 10 ** 6, 'bn': 10 ** 9, 'bln': 10 ** 9,
    'tn': 10 ** 12,
    'doubled': 2, 'double': 2, 'twice': 2, 'tripled': 3, 'triple': 3, 'thrice': 3, 'halved': '1/2',
    'quadrupled': 4, 'quintupled': 5, 'sextupled': 6, 'half-dozen': 6,
    '‰': '1/1000', 'permille': '1/1000', 'permil': '1/1000', 'ppm': '1/1000000',
    'ppb': '1/1000000000', 'bps-of-interest': '1/10000',
    'tausend': 1000, 'millionen': 10 ** 6, 'milliarde': 10 ** 9, 'milliarden': 10 ** 9,
    'mille': 1000, 'millier': 1000, 'mil': 1000, 'millón': 10 ** 6, 'millone': 10 ** 6,
    'milione': 10 ** 6,
    'milhõe': 10 ** 6, 'milhão': 10 ** 6, 'docena': 12,
    'douzaine': 12, 'dutzend': 12, 'dúzia': 12, 'тысяч': 1000, 'тысяча': 1000,
    'тысячи': 1000, 'тыс': 1000,
    'миллион': 10 ** 6, 'миллиона': 10 ** 6, 'миллионов': 10 ** 6,
    'млн': 10 ** 6,
    'миллиард': 10 ** 9, 'миллиарда': 10 ** 9, 'миллиардов': 10 ** 9,
    'млрд': 10 ** 9,
    'हजार': 1000, 'हज़ार': 1000, 'लाख': 10 ** 5,
    'करोड़': 10 ** 7, 'करोड़': 10 ** 7,
    '十': 10, '百': 100, '千': 1000, '万': 10 ** 4, '萬': 10 ** 4, '亿': 10 ** 8,
    '億': 10 ** 8,
    '兆': 10 ** 12, '打': 12, '成': '1/10', '割': '1/10', '折': '1/10', 'अरब': 10 ** 9,
    '만': 10 ** 4, '억': 10 ** 8, '천': 1000,
    '백': 100}
ABBREVIATED = {'k': 1000, 'K': 1000, 'M': 10 ** 6, 'B': 10 ** 9}  # before money
SCALES.update({word: n for word, n in CARDINALS.items() if n > 1})
SCALES.update({word: Fraction(1, n) for word, n in ORDINALS.items()})
SCALES = {word: Fraction(n) for word, n in SCALES.items()}
POWERS = {'squared': 2, 'cubed': 3, '平方': 2, '立方': 3}
SQUARES = {'square': 2, 'sq': 2, 'cubic': 3, 'cu': 3, '平方': 2, '立方': 3,
'квадратных': 2,
           'кубических': 3}  # before a unit
NEGATIVE = set(  # the number lies on the other side of nought from where it would without the word
    'loss losse debt deficit below beneath negative minus earlier before ago west westward '
    'westwards south southward southwards counterclockwise counter-clockwise anticlockwise '
    'anti-clockwise decrease decreased decline drop downward downwards underwater underground '
    'backward backwards behind bc bce b.c b.c.e overdrawn 亏损 亏 以前 之前 以下'.split())
NEUTRAL = NEGATIVE | set(  # may stand on one side alone
    'old long tall wide high deep thick away apart left remaining total altogether more extra '
    'distinct different possible exactly only whole exact profit gain increase surplus above later '
    'after ahead north east clockwise up upward forward positive zero sea level ground freezing '
    'point'.split())
PHRASES = [(re.compile(pattern), word) for pattern, word in (
    (r'(?i)\bper ?(?:mille?|thousand)\b', '‰'), (r'(?i)\bper (?:cent|hundred)\b', 'percent'),
    (r'(?i)\bparts per million\b', 'ppm'), (r'(?i)\bparts per billion\b', 'ppb'),
    (r'(?i)\bbasis points?\b', 'bps-of-interest'), (r"(?i)\bbaker['’]?s dozens?\b", 'thirteen'),
    (r'(?i)\b(nautical) (mile)s?\b', 'nautical-mile'), (r'(?i)\blight years?\b', 'light-year'),
    (r'(?i)\bfl(?:uid|\.)? ?(?:ounces?|oz)\b\.?', 'fluid-ounce'),
    (r'(?i)\bdegrees? (celsius|centigrade|fahrenheit|kelvin)\b', r'\1'),
    (r'(?i)\bastronomical units?\b', 'astronomical-unit'), (r"(?i)\bo['’]clock\b", ''))]
# Words that may do anything to a number.
UNCLEAR = set(
    'not but to is are was were maybe either neither if than vs versus times plus minus over of '
    'none no non or without except excluding mod modulo modulus base choose root radical '
    'at least most reciprocal inverse st nd rd th remainder approximately roughly almost nearly '
    'fold factorial factorials repeating recurring zillion '
    '半 个半 倍半 半个 一半 的一半 '
    '的平方 的立方 次方 的倒数 分之一 以上'.split())
IRREGULAR = {'feet': 'foot', 'inches': 'inch', 'children': 'child', 'men': 'man', 'women': 'woman',
             'people': 'person', 'mice': 'mouse', 'geese': 'goose', 'teeth': 'tooth', 'dice': 'die',
             'halves': 'half', 'knives': 'knife', 'leaves': 'leaf', 'loaves': 'loaf', 'oxen': 'ox',
             'wolves': 'wolf', 'shelves': 'shelf', 'calves': 'calf', 'pennies': 'penny',
             'vertices': 'vertex', 'indices': 'index', 'matrices': 'matrix', 'buses': 'bus',
             'bonuses': 'bonus', 'viruses': 'virus', 'wives': 'wife', 'lives': 'life',
             'centuries': 'century', 'bacteria': 'bacterium', 'grey': 'gray',
             'pgs': 'page', 'ppl': 'person'}


def _stem(word):
    """The singular of a lower-case word, in one of its spellings."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith('ies') and len(word) > 4:
        return word[:-3] + 'y'
    if word.endswith(('sses', 'xes', 'ches', 'shes', 'tatoes', 'matoes', 'heroes')):
        return word[:-2]
    if word.endswith('s') and not word.endswith(('ss', 'us')) and len(word) > 3:
        word = word[:-1]
    return word.replace('colour', 'color').replace('centre', 'center')


def number_of(text):
    """'twenty-one', 'two hundred and five', 'one half', 'one and a half', 'two dozen' -> Fraction;
    None for what is not a number in English words."""
    words = text.casefold().replace('-', ' ').split()
    sign = -1 if words[:1] in (['minus'], ['negative']) else 1
    words = words[sign < 0:]
    if not words or len(words) > 20 or not text[:1].isalpha():
        return None
    if 'and' in words and (fraction := _fraction(words[len(words) - words[::-1].index('and'):])):
        whole = _integer(words[:len(words) - 1 - words[::-1].index('and')])
        return None if whole is None else sign * (whole + fraction)
    value = _integer(words)
    value = _fraction(words) if value is None else value
    return None if value is None else sign * value


def _fraction(words):
    """['two', 'thirds'] -> 2/3"""
    *top, bottom = words
    if top[-1:] and top[-1] in ('twenty', 'thirty', 'forty', 'fifty', 'sixty', 'seventy', 'eighty',
                                'ninety') and ORDINALS.get(_stem(bottom), 10) < 10 and len(top) > 1:
        denominator = CARDINALS[top.pop()] + ORDINALS[_stem(bottom)]  # two twenty fifths
    else:
        denominator = ORDINALS.get(_stem(bottom))
    if not denominator or not top and bottom != 'half':
        return None
    whole = _integer(top) if top and top[0] not in ('a', 'an') else 1
    return None if not whole else Fraction(whole, denominator)


def _integer(words):
    """['two', 'hundred', 'and', 'five'] -> 205; None where this is no English number"""
    total, part, last = 0, None, 10 ** 30
    for i, word in enumerate(words):
        if word == 'and':
            if not 0 < i < len(words) - 1 or words[i - 1] not in ('hundred', *THOUSANDS):
                return None
        elif word in ('a', 'an') and i == 0 and len(words) > 1 and words[1] in SCALES:
            part = 1
        elif word in CARDINALS:
            n = CARDINALS[word]
            if part is not None and not (n and part % 100 == 0 and part or
                                         0 < n < 10 and part % 100 > 19 and part % 10 == 0):
                return None
            part = (part or 0) + n
        elif word == 'hundred' and part is not None and 0 < part < 100:
            part *= 100
        elif word in THOUSANDS and part and THOUSANDS[word] < last:
            last = THOUSANDS[word]
            total, part = total + part * last, None
        elif word in ('dozen', 'score', 'gross', 'lakh', 'crore') and part and i == len(words) - 1:
            part *= int(SCALES[word])
        else:
            return None
    return None if part is None and not total else total + (part or 0)


# ---------------------------------------------------------------- the words after a number

class Words(NamedTuple):
    """scale, power: the value is (sign * scale * number) ** power; units: {unit: power}; nouns: in
    the singular; sure: they can be no product of variables, as '5 N' and '3 mg' can."""
    scale: Fraction
    power: int
    units: dict
    nouns: tuple
    sure: bool


PIECE = re.compile(
    r'(?P<power>\^ ?(?:-?\d|\{ ?-?\d{1,2} ?\}))|(?P<op>[*/])|(?P<space> +)'
    r"|(?P<word>[°%‰′″¢]|[μkMGm]?Ω|μ(?=[A-Za-z])[A-Za-z]+"
    r"|(?:(?![Α-Ωα-ωϑϕϖϱϵ])[^\W\d_])+(?:\.?['’.-](?:(?![Α-Ωα-ω])[^\W\d_])+)*\.?"
    r'|-(?=[A-Za-z]{3}))|(?P<other>.)', re.DOTALL)
CLOSERS = '0123456789)}]⌋⌉!π∞|⟧'
WITHOUT_SPACES = re.compile('[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]')
# Of one letter after a space, and of several right after the number: units rather than variables.
LONE = set('m s h g l L J N W V K Ω % ° ‰ ¢'.split())
GLUED = set('mm cm km in ft yd mi kg mg ml hr yr wk sec min lb lbs oz am pm deg rad mph kmh kph '
            '% ° ‰ ¢ ′ ″ Ω kΩ MΩ'.split())


def split(text, upright=frozenset(), functions=frozenset()):
    """'5 square feet' -> ('5', Words); (text, None) where no words follow a number, or where these
    may change it in a way that is not known here. upright: the words that stood in \\text{} or
    \\mathrm{}; functions: names that are none."""
    if text[-1:].isdigit() and '^' not in text:
        return text, None
    for pattern, word in PHRASES:
        text = pattern.sub(word, text)
    pieces = [(m.lastgroup, m[0]) for m in PIECE.finditer(text)]
    start = len(pieces)
    while start and pieces[start - 1][0] != 'other':
        start -= 1
    while start < len(pieces) and pieces[start][0] in ('op', 'power'):  # 5^2, (x)*5
        start += 1
    head, tail = ''.join(p for _, p in pieces[:start]), pieces[start:]
    if not head.strip() or head.rstrip()[-1] not in CLOSERS or \
            not any(kind == 'word' for kind, _ in tail):
        return text, None
    words = _words([piece for piece in tail if piece[0] != 'space'],
                   glued=tail[0][0] == 'word', upright=upright, functions=functions)
    if words and words.scale < 0 and head.lstrip()[:1] == '-':
        return text, None  # -5 degrees below zero may be 5 or -5
    return (head.rstrip(), words) if words else (text, None)


def _words(pieces, glued, upright, functions):
    """The pieces after a number, without spaces, as Words; None where they say something else.
    glued: the first stands right after the number."""
    scale, power, units, nouns, sure = Fraction(1), 1, Counter(), [], False
    sign, square, last, of = 1, 0, None, ''  # of the next unit; the unit that a power belongs to
    pieces = [(kind, part) for kind, piece in pieces
              for part in (_segments(piece) if kind == 'word' else [piece])]
    if len(pieces) > 16:
        return None
    for i, (kind, piece) in enumerate(pieces):
        word = piece.strip(".-'’")
        lower = word.casefold()
        stem = _stem(lower)
        if kind == 'op':
            sign = -1 if piece == '/' else sign
            if piece == '*' and not last:
                return None
            continue
        if kind == 'power' or lower in POWERS and last:
            if last is None:
                return None
            n = POWERS[lower] if kind == 'word' else int(piece.strip('^{} '))
            units[last] += (n - 1) * (1 if units[last] > 0 else -1)
            last = None
            continue
        if not word:
            continue
        if lower == 'of' and i and (units or nouns) and not of:
            of = 'of '  # cups of milk, slices of pizza
            continue
        if lower in UNCLEAR or lower.endswith('fold') and lower[:-4] in SCALES:
            return None
        following = [part for _, part in pieces[i + 1:]]
        if word in functions and not (word == 'sec' and (
                sign < 0 or not following or following[0] in '*/')):
            return None
        if word in ABBREVIATED and following and SPELLINGS.get(following[0].casefold()) in MONEY:
            scale *= ABBREVIATED[word]  # 5 K USD
            continue
        known = SPELLINGS.get(word)
        if not known and (len(word) > 2 or lower in GLUED and (word in upright or not glued)):
            known = SPELLINGS.get(lower) or SPELLINGS.get(stem) or SPELLINGS.get(lower.rstrip('s'))
        short = len(word) < 4 and word.isascii() and word.isalpha()
        if short and _may_be_variables(word, stem, known, upright, glued and i == 0,
                                       len(pieces) == 1):
            return None
        sure = sure or not short or word in upright and len(word) > 1
        if lower in ('per', 'each', 'every', '每'):
            sign = -1
        elif lower in SQUARES and (lower in ('square', 'cubic') or
                                   any(kind == 'word' for kind, _ in pieces[i + 1:])):
            square = SQUARES[lower]
        elif lower in POWERS:
            power *= POWERS[lower]
        elif known and not of:
            if known not in MONEY or not units[known]:  # $5 dollars
                units[known] += sign * (square or 1)
            last, square, sign = known, 0, 1
        elif (factor := _scale(stem)) is not None:
            scale *= factor ** sign
        else:
            if lower in NEGATIVE:
                scale = -scale
            nouns.append(of + '/' * (sign < 0) + stem)
            last, sign, sure = None, 1, True
    if square or len(nouns) > 6:
        return None
    return Words(scale, power, {unit: n for unit, n in units.items() if n}, tuple(nouns), sure)


def _may_be_variables(word, stem, known, upright, glued, alone):
    """Is a run of up to three letters rather a product? 2x, 5A, 2ab, 2cd, 2AM; not 5 m, 5cm."""
    if word in upright:
        return len(word) == 1 and not known
    if len(word) == 1:
        return word not in LONE or glued and alone
    if glued and (word.islower() and word not in GLUED or len(word) == 2 and word.isupper()):
        return True
    return not (known or stem in SCALES or stem in SQUARES or stem in NEGATIVE or
                word in IRREGULAR or stem in ('old', 'per'))


def _scale(stem):
    """What the number is multiplied by: 'dozen' 12, 'twenty-fifth' 1/25; None for other words."""
    if stem in SCALES:
        return SCALES[stem]
    parts = stem.split('-')
    if len(parts) == 2 and parts[0] in CARDINALS and parts[1] in ORDINALS:
        first, n = CARDINALS[parts[0]], ORDINALS[parts[1]]
        return Fraction(1, first * n if n >= 100 else first + n)
    if len(parts) == 2 and parts[0] == 'hundred' and parts[1] in ORDINALS:
        return Fraction(1, 100 * ORDINALS[parts[1]])
    return None


def _segments(word):
    """A word of a script that writes no spaces, cut at the units and multipliers that it holds."""
    if not WITHOUT_SPACES.search(word):
        return [word]
    parts = []
    while word:
        n = next((n for n in range(min(8, len(word)), 0, -1) if word[:n] in SPELLINGS
                  or word[:n] in SCALES or word[:n] in SQUARES or word[:n] == '每'), len(word))
        parts.append(word[:n])
        word = word[n:]
    return parts


def unit_of(word):
    """The name of the unit that a word spells, '' where it spells none."""
    return SPELLINGS.get(word) or len(word) > 2 and SPELLINGS.get(_stem(word.casefold())) or ''


AMOUNT = r'(\d+(?:\.\d+)?) ?([A-Za-z]+)\.?'
COMPOUND = re.compile(rf'{AMOUNT} ?,? ?{AMOUNT}(?: ?,? ?{AMOUNT})?')


def compound(text):
    """'1 hour 30 minutes' -> (Fraction(90), Words of minutes): units of one kind, each smaller than
    the one before. None for other texts."""
    m = COMPOUND.fullmatch(text)
    if not m:
        return None
    numbers = [Fraction(number) for number in m.groups()[::2] if number]
    units = [unit_of(unit) for unit in m.groups()[1::2] if unit]
    if not all(units):
        return None
    sizes, bases = zip(*(MEASURES[unit][0] for unit in units))
    if any(base != bases[0] for base in bases) or any(
            one <= other for one, other in zip(sizes, sizes[1:])):
        return None
    total = sum(number * size for number, size in zip(numbers, sizes)) / sizes[-1]
    return total, Words(Fraction(1), 1, {units[-1]: 1}, (), True)


# ---------------------------------------------------------------- comparison

def factors(g, p):
    """Words of two texts -> [(a, b, pi), ...]: their values agree if a * value and b * value *
    pi ** pi do, by any of these. [] where the two are of different things."""
    if not (g and p) or not (g.units or g.nouns) or not (p.units or p.nouns):
        return [(Fraction(1), Fraction(1), 0)]
    if bool(g.units) != bool(p.units) or not _same_nouns(g.nouns, p.nouns) or \
            not g.units and not (g.nouns and p.nouns):
        return []
    if g.units == p.units:
        return [(Fraction(1), Fraction(1), 0)]
    found = []
    for a, one in _measures(g.units):
        for b, other in _measures(p.units):
            pi = other.pop('π', 0) - one.get('π', 0)
            if {k: n for k, n in one.items() if n and k != 'π'} == \
                    {k: n for k, n in other.items() if n}:
                found.append((a, b, pi))
            if pi or 'π' in one:
                other['π'] = pi + one.get('π', 0)
    return found


def _same_nouns(g, p):
    """The same words, or some that only describe them more: 5 (red) balls, 9 years (old); 5 cups
    (of milk); but 5 apples are no 5 apple trees."""
    if all(word[:3] != 'of ' for word in g) or all(word[:3] != 'of ' for word in p):
        g, p = ([word for word in words if word[:3] != 'of '] for words in (g, p))
    few, many = sorted((tuple(g), tuple(p)), key=len)
    return {*few} <= {*many} and ({*many} - {*few} <= NEUTRAL or few[-1:] == many[-1:] != ())


def _measures(units):
    """Every reading of a product of units: [(factor, {base: power}), ...]"""
    readings = [(Fraction(1), Counter())]
    for unit, power in list(units.items())[:6]:
        readings = [(factor * f ** power, Counter({k: bases[k] + power * other.get(k, 0)
                                                   for k in {*bases, *other}}))
                    for factor, bases in readings for f, other in MEASURES[unit]][:12]
    return readings
