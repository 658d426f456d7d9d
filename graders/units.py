"""
What do the words after a number say? Units, multipliers, fractions, powers, signs, counted nouns.

    split_words('5 square feet')     # '5', Words(units={'foot': 2}, ...)
    split_words('3 dozen eggs')      # '3', Words(scale=12, nouns=('egg',), ...)
    number_of('two thirds')          # Fraction(2, 3)
    compound('1 hour 30 minutes')    # Fraction(90), Words(units={'minute': 1}, ...)

A unit is a number times powers of base units: values in units of the same powers are compared by
these numbers. A word that is in no table is a noun; nouns are compared as they are spelled, but for
case and plural. Where a word may change the number in another way (of, times, or), split_words()
reads none of them.
"""
import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

# ---------------------------------------------------------------- units

# symbols | names | prefixes of the symbols | measure
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
PREFIXES = {
    'f': -15, 'p': -12, 'n': -9, 'μ': -6, 'u': -6, 'm': -3, 'c': -2, 'd': -1,
    'h': 2, 'k': 3, 'M': 6, 'G': 9, 'T': 12}
PREFIX_NAMES = {
    'femto': -15, 'pico': -12, 'nano': -9, 'micro': -6, 'milli': -3, 'centi': -2, 'deci': -1,
    'deca': 1, 'hecto': 2, 'kilo': 3, 'mega': 6, 'giga': 9, 'tera': 12}
# names = measure, several where the word is ambiguous
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
# a unit from above and its names, between bars
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
CURRENCY_CODES = 'aud cad chf hkd sgd brl mxn sek nok dkk pln zar thb php vnd twd nzd'.split()


def parse_measure(text):
    """'1000 g m s^-2' -> (Fraction(1000), {'g': 1, 'm': 1, 's': -2})"""
    factor, *bases = text.split()
    powers = {}
    for base in bases:
        name, _, power = base.partition('^')
        powers[name] = int(power or 1)
    return Fraction(factor), powers


def add_others(measures, spellings):
    """The units of the table OTHERS, each by all its names."""
    for line in OTHERS.strip().split('\n'):
        names, _, measure = line.partition(' = ')
        unit, *_ = names = names.split()
        measures[unit] = [parse_measure(m) for m in measure.split(', ')]
        spellings.update(dict.fromkeys(names, unit))


def add_si(measures, spellings):
    """The units of the table SI with all their prefixes; a spelling that is taken stays so."""
    def add(words, prefixes, tens_of, unit, measure):
        factor, bases = measure
        for prefix in ('', *prefixes):
            exponent = tens_of.get(prefix, 0)
            prefixed = f'10^{exponent} {unit}' if prefix else unit
            for word in words:
                if prefix + word in spellings:
                    continue
                spellings[prefix + word] = prefixed
                measures.setdefault(prefixed, [(factor * Fraction(10) ** exponent, bases)])

    for line in SI.strip().split('\n'):
        symbols, names, prefixes, measure = (part.strip().split() for part in line.split('|'))
        unit = (names or symbols)[0]
        measure = parse_measure(' '.join(measure))
        add(symbols, prefixes, PREFIXES, unit, measure)
        add(names, PREFIX_NAMES, PREFIX_NAMES, unit, measure)


def add_other_scripts(measures, spellings):
    """Names in other scripts; a unit that no table has measures itself."""
    for group in OTHER_SCRIPTS.replace('\n', '|').strip('|').split('|'):
        unit, *names = group.split()
        spellings.update(dict.fromkeys(names, spellings.get(unit, unit)))
        measures.setdefault(spellings[names[0]], [(Fraction(1), {unit: 1})])


def add_currencies(measures, spellings):
    """Currencies that are known by their code alone."""
    for code in CURRENCY_CODES:
        spellings[code] = code
        measures[code] = [(Fraction(1), {code: 1})]


MEASURES = {}    # unit -> [(factor, {base: power}), ...], several where the word is ambiguous
SPELLINGS = {}   # a word or symbol -> its unit
for add_table in (add_others, add_si, add_other_scripts, add_currencies):
    add_table(MEASURES, SPELLINGS)
MONEY = {SPELLINGS[word] for word in 'dollar euro sterling rupee yen yuan cent yenyuan'.split()}


def unit_of(word):
    """The name of the unit that a word spells, '' where it spells none."""
    if word in SPELLINGS:
        return SPELLINGS[word]
    if len(word) < 3:
        return ''
    return SPELLINGS.get(singular(word.casefold()), '')


# ---------------------------------------------------------------- words that change the number

CARDINALS = {word: n for n, word in enumerate(
    'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen '
    'sixteen seventeen eighteen nineteen'.split())}
TENS = 'twenty thirty forty fifty sixty seventy eighty ninety'.split()
CARDINALS.update({word: 10 * n for n, word in enumerate(TENS, 2)}, fourty=40)
THOUSANDS = {word: 1000 ** n for n, word in enumerate(
    'thousand million billion trillion quadrillion quintillion sextillion septillion octillion '
    'nonillion decillion'.split(), 1)}
ORDINALS = {
    **{word + 'th': n for word, n in CARDINALS.items() if n > 3},
    'third': 3, 'fifth': 5, 'eighth': 8, 'ninth': 9, 'twelfth': 12,
    'quarter': 4, 'half': 2, 'halve': 2, 'hundredth': 100,
    **{word[:-1] + 'ieth': n for word, n in CARDINALS.items() if word[-2:] == 'ty'},
    **{word + 'th': n for word, n in THOUSANDS.items()}}
for misspelled in ('fiveth', 'eightth', 'nineth', 'twelveth'):
    del ORDINALS[misspelled]

SCALES = {   # what the number is multiplied by
    **THOUSANDS,
    'hundred': 100, 'dozen': 12, 'dz': 12, 'score': 20, 'gross': 144, 'grand': 1000,
    'myriad': 10 ** 4, 'googol': 10 ** 100, 'lakh': 10 ** 5, 'lac': 10 ** 5, 'crore': 10 ** 7,
    'milliard': 10 ** 9, 'half-dozen': 6,
    'mn': 10 ** 6, 'mln': 10 ** 6, 'bn': 10 ** 9, 'bln': 10 ** 9, 'tn': 10 ** 12,
    'doubled': 2, 'double': 2, 'twice': 2, 'tripled': 3, 'triple': 3, 'thrice': 3,
    'quadrupled': 4, 'quintupled': 5, 'sextupled': 6, 'halved': '1/2',
    # parts
    '‰': '1/1000', 'permille': '1/1000', 'permil': '1/1000',
    'ppm': '1/1000000', 'ppb': '1/1000000000', 'bps-of-interest': '1/10000',
    # German, French, Spanish, Italian, Portuguese, as singular() leaves them
    'tausend': 1000, 'millionen': 10 ** 6, 'milliarde': 10 ** 9, 'milliarden': 10 ** 9,
    'mille': 1000, 'millier': 1000, 'mil': 1000,
    'millón': 10 ** 6, 'millone': 10 ** 6, 'milione': 10 ** 6,
    'milhõe': 10 ** 6, 'milhão': 10 ** 6,
    'docena': 12, 'douzaine': 12, 'dutzend': 12, 'dúzia': 12,
    # Russian
    'тысяч': 1000, 'тысяча': 1000, 'тысячи': 1000, 'тыс': 1000,
    'миллион': 10 ** 6, 'миллиона': 10 ** 6, 'миллионов': 10 ** 6,
    'миллиард': 10 ** 9, 'миллиарда': 10 ** 9, 'миллиардов': 10 ** 9,
    'млн': 10 ** 6, 'млрд': 10 ** 9,
    # Hindi
    'हजार': 1000, 'हज़ार': 1000, 'लाख': 10 ** 5,
    'करोड़': 10 ** 7, 'अरब': 10 ** 9,
    # Chinese, Japanese
    '十': 10, '百': 100, '千': 1000, '万': 10 ** 4, '萬': 10 ** 4,
    '亿': 10 ** 8, '億': 10 ** 8, '兆': 10 ** 12,
    '打': 12, '成': '1/10', '割': '1/10', '折': '1/10',
    # Korean
    '백': 100, '천': 1000, '만': 10 ** 4, '억': 10 ** 8}
SCALES.update({word: n for word, n in CARDINALS.items() if n > 1})
SCALES.update({word: Fraction(1, n) for word, n in ORDINALS.items()})
SCALES = {word: Fraction(n) for word, n in SCALES.items()}
ABBREVIATED = {'k': 1000, 'K': 1000, 'M': 10 ** 6, 'B': 10 ** 9}   # before money

POWERS = {'squared': 2, 'cubed': 3, '平方': 2, '立方': 3}   # after a unit, or of the number
SQUARES = {   # before a unit
    'square': 2, 'sq': 2, 'cubic': 3, 'cu': 3, '平方': 2, '立方': 3,
    'квадратных': 2, 'кубических': 3}

# The number lies on the other side of nought from where it would without the word.
NEGATIVE = set(
    'loss losse debt deficit below beneath negative minus earlier before ago west westward '
    'westwards south southward southwards counterclockwise counter-clockwise anticlockwise '
    'anti-clockwise decrease decreased decline drop downward downwards underwater underground '
    'backward backwards behind bc bce b.c b.c.e overdrawn 亏损 亏 以前 之前 以下'.split())
# May stand on one side alone.
NEUTRAL = NEGATIVE | set(
    'old long tall wide high deep thick away apart left remaining total altogether more extra '
    'distinct different possible exactly only whole exact profit gain increase surplus above later '
    'after ahead north east clockwise up upward forward positive zero sea level ground freezing '
    'point'.split())
# May do anything to a number.
UNCLEAR = set(
    'not but to is are was were maybe either neither if than vs versus times plus minus over of '
    'none no non or without except excluding mod modulo modulus base choose root radical '
    'at least most reciprocal inverse st nd rd th remainder approximately roughly almost nearly '
    'fold factorial factorials repeating recurring zillion '
    '半 个半 倍半 半个 一半 的一半 '
    '的平方 的立方 次方 的倒数 分之一 以上'.split())
# Several words, or a word with a sign in it -> one.
PHRASES = [(re.compile(pattern), word) for pattern, word in (
    (r'(?i)\bper ?(?:mille?|thousand)\b', '‰'),
    (r'(?i)\bper (?:cent|hundred)\b', 'percent'),
    (r'(?i)\bparts per million\b', 'ppm'),
    (r'(?i)\bparts per billion\b', 'ppb'),
    (r'(?i)\bbasis points?\b', 'bps-of-interest'),
    (r"(?i)\bbaker['’]?s dozens?\b", 'thirteen'),
    (r'(?i)\b(nautical) (mile)s?\b', 'nautical-mile'),
    (r'(?i)\blight years?\b', 'light-year'),
    (r'(?i)\bfl(?:uid|\.)? ?(?:ounces?|oz)\b\.?', 'fluid-ounce'),
    (r'(?i)\bdegrees? (celsius|centigrade|fahrenheit|kelvin)\b', r'\1'),
    (r'(?i)\bastronomical units?\b', 'astronomical-unit'),
    (r"(?i)\bo['’]clock\b", ''),
)]

IRREGULAR = {
    'feet': 'foot', 'inches': 'inch', 'children': 'child', 'men': 'man', 'women': 'woman',
    'people': 'person', 'mice': 'mouse', 'geese': 'goose', 'teeth': 'tooth', 'dice': 'die',
    'halves': 'half', 'knives': 'knife', 'leaves': 'leaf', 'loaves': 'loaf', 'oxen': 'ox',
    'wolves': 'wolf', 'shelves': 'shelf', 'calves': 'calf', 'pennies': 'penny',
    'vertices': 'vertex', 'indices': 'index', 'matrices': 'matrix', 'buses': 'bus',
    'bonuses': 'bonus', 'viruses': 'virus', 'wives': 'wife', 'lives': 'life',
    'centuries': 'century', 'bacteria': 'bacterium', 'grey': 'gray',
    'pgs': 'page', 'ppl': 'person'}


def singular(word):
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


def scale_of(word):
    """What the number is multiplied by: 'dozen' 12, 'twenty-fifth' 1/25; None for other words."""
    if word in SCALES:
        return SCALES[word]
    parts = word.split('-')
    if len(parts) != 2 or parts[1] not in ORDINALS:
        return None
    first, last = parts[0], ORDINALS[parts[1]]
    if first in CARDINALS and last >= 100:
        return Fraction(1, CARDINALS[first] * last)
    if first in CARDINALS:
        return Fraction(1, CARDINALS[first] + last)
    if first == 'hundred':
        return Fraction(1, 100 * last)
    return None


# ---------------------------------------------------------------- numbers in words

def number_of(text):
    """'twenty-one', 'two hundred and five', 'one half', 'one and a half', 'two dozen' -> Fraction;
    None for what is not a number in English words."""
    words = text.casefold().replace('-', ' ').split()
    negative = words[:1] in (['minus'], ['negative'])
    if negative:
        words = words[1:]
    if not words or len(words) > 20 or not text[:1].isalpha():
        return None
    value = mixed_number(words)
    if value is None:
        return None
    return -value if negative else value


def mixed_number(words):
    """['one', 'and', 'a', 'half'] -> 3/2; a mere integer or fraction too; None for other words"""
    if 'and' in words:
        last_and = len(words) - 1 - words[::-1].index('and')
        fraction = fraction_of(words[last_and + 1:])
        if fraction:
            whole = integer_of(words[:last_and])
            return None if whole is None else whole + fraction
    value = integer_of(words)
    return fraction_of(words) if value is None else value


def fraction_of(words):
    """['two', 'thirds'] -> 2/3; None where this is no fraction"""
    *top, bottom = words
    denominator = ORDINALS.get(singular(bottom))
    if len(top) > 1 and top[-1] in TENS and ORDINALS.get(singular(bottom), 10) < 10:
        denominator += CARDINALS[top.pop()]   # two twenty fifths
    if not denominator or not top and bottom != 'half':
        return None
    if not top or top[0] in ('a', 'an'):
        return Fraction(1, denominator)
    whole = integer_of(top)
    return Fraction(whole, denominator) if whole else None


def integer_of(words):
    """['two', 'hundred', 'and', 'five'] -> 205; None where this is no English number"""
    total = 0         # of the thousands that are complete
    part = None       # the number below a thousand that is being read
    last = 10 ** 30   # the thousands must fall: million, thousand
    for i, word in enumerate(words):
        if word == 'and':
            between = 0 < i < len(words) - 1
            if not between or words[i - 1] not in ('hundred', *THOUSANDS):
                return None
        elif word in ('a', 'an') and i == 0 and len(words) > 1 and words[1] in SCALES:
            part = 1
        elif word in CARDINALS:
            n = CARDINALS[word]
            if not may_follow(n, part):
                return None
            part = (part or 0) + n
        elif word == 'hundred' and part is not None and 0 < part < 100:
            part *= 100
        elif word in THOUSANDS and part and THOUSANDS[word] < last:
            last = THOUSANDS[word]
            total += part * last
            part = None
        elif word in ('dozen', 'score', 'gross', 'lakh', 'crore') and part and i == len(words) - 1:
            part *= int(SCALES[word])
        else:
            return None
    if part is None and not total:
        return None
    return total + (part or 0)


def may_follow(n, part):
    """May the cardinal n be said after `part`? One after twenty, all but nought after hundreds."""
    if part is None:
        return True
    if part and part % 100 == 0:
        return n > 0
    return 0 < n < 10 and part % 100 > 19 and part % 10 == 0


# ---------------------------------------------------------------- the words after a number

class Words(NamedTuple):
    """What the words after a number say. The value is (scale * number) ** power, in `units`."""
    scale: Fraction   # negative for 'below zero'
    power: int
    units: dict       # {unit: power}
    nouns: tuple      # what is counted, in the singular
    sure: bool        # they can be no product of variables, as '5 N' and '3 mg' can


class Unclear(Exception):
    """The words may change the number in a way that is not known here."""


PIECE = re.compile(
    r'(?P<power>\^ ?(?:-?\d|\{ ?-?\d{1,2} ?\}))|(?P<op>[*/])|(?P<space> +)'
    r"|(?P<word>[°%‰′″¢]|[μkMGm]?Ω|μ(?=[A-Za-z])[A-Za-z]+"
    r"|(?:(?![Α-Ωα-ωϑϕϖϱϵ])[^\W\d_])+(?:\.?['’.-](?:(?![Α-Ωα-ω])[^\W\d_])+)*\.?"
    r'|-(?=[A-Za-z]{3}))|(?P<other>.)', re.DOTALL)
CLOSERS = '0123456789)}]⌋⌉!π∞|⟧'   # what a number ends with
WITHOUT_SPACES = re.compile('[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]')
# Of one letter after a space, and of several right after the number: units rather than variables.
LONE = set('m s h g l L J N W V K Ω % ° ‰ ¢'.split())
GLUED = set('mm cm km in ft yd mi kg mg ml hr yr wk sec min lb lbs oz am pm deg rad mph kmh kph '
            '% ° ‰ ¢ ′ ″ Ω kΩ MΩ'.split())
LONGEST_TAIL = 16   # pieces
MOST_NOUNS = 6


def split_words(text, upright=frozenset(), functions=frozenset()):
    """'5 square feet' -> ('5', Words); (text, None) where no words follow a number, or where these
    may change it in a way that is not known here. upright: the words that stood in \\text{} or
    \\mathrm{}; functions: names that are none."""
    if text[-1:].isdigit() and '^' not in text:
        return text, None
    for pattern, word in PHRASES:
        text = pattern.sub(word, text)
    pieces = [(m.lastgroup, m[0]) for m in PIECE.finditer(text)]

    # The tail begins after the last piece that is neither word nor operator, power nor space.
    start = len(pieces)
    while start and pieces[start - 1][0] != 'other':
        start -= 1
    while start < len(pieces) and pieces[start][0] in ('op', 'power'):   # 5^2, (x)*5
        start += 1
    head = ''.join(piece for _, piece in pieces[:start]).rstrip()
    tail = pieces[start:]
    if not head or head[-1] not in CLOSERS or all(kind != 'word' for kind, _ in tail):
        return text, None

    glued = tail[0][0] == 'word'
    try:
        words = Reader(tail, glued, upright, functions).read()
    except Unclear:
        return text, None
    if words.scale < 0 and head.lstrip()[:1] == '-':
        return text, None   # -5 degrees below zero may be 5 or -5
    return head, words


class Reader:
    """Reads the pieces after a number, one by one, into Words; raises Unclear.

    pieces: (kind, text) as PIECE names them; glued: the first stands right after the number.
    """

    def __init__(self, pieces, glued, upright, functions):
        self.pieces = []
        for kind, piece in pieces:
            if kind == 'word':
                self.pieces += [(kind, part) for part in segments(piece)]
            elif kind != 'space':
                self.pieces.append((kind, piece))
        self.glued = glued
        self.upright = upright
        self.functions = functions

        # what has been read
        self.scale = Fraction(1)
        self.power = 1
        self.units = Counter()
        self.nouns = []
        self.sure = False

        # what is said of the next unit or noun
        self.sign = 1     # -1 after a slash, per, each
        self.square = 0   # 2 after square, 3 after cubic
        self.of = ''      # 'of ' after it, for the rest: cups of milk, slices of pizza
        self.last = None  # the unit that a power would belong to

    def read(self):
        if len(self.pieces) > LONGEST_TAIL:
            raise Unclear
        for i, (kind, piece) in enumerate(self.pieces):
            word = piece.strip(".-'’")
            if kind == 'op':
                self.read_operator(piece)
            elif kind == 'power':
                self.read_power(int(piece.strip('^{} ')))
            elif word.casefold() in POWERS and self.last:
                self.read_power(POWERS[word.casefold()])
            elif word:
                self.read_word(i, word)
        if self.square or len(self.nouns) > MOST_NOUNS:
            raise Unclear
        units = {unit: power for unit, power in self.units.items() if power}
        return Words(self.scale, self.power, units, tuple(self.nouns), self.sure)

    def read_operator(self, operator):
        if operator == '/':
            self.sign = -1
        elif not self.last:
            raise Unclear

    def read_power(self, n):
        """The power n of the unit before; s^2 after a slash makes s^-1 s^-2."""
        if self.last is None:
            raise Unclear
        sign = 1 if self.units[self.last] > 0 else -1
        self.units[self.last] += (n - 1) * sign
        self.last = None

    def read_word(self, i, word):
        """A word, piece number i."""
        lower = word.casefold()
        if lower == 'of' and i and (self.units or self.nouns) and not self.of:
            self.of = 'of '
            return
        self.refuse_what_is_unclear(i, word)
        following = [piece for _, piece in self.pieces[i + 1:]]
        if word in ABBREVIATED and following and SPELLINGS.get(following[0].casefold()) in MONEY:
            self.scale *= ABBREVIATED[word]   # 5 K USD
            return
        unit = self.unit(word)
        short = len(word) < 4 and word.isascii() and word.isalpha()
        if short and self.may_be_variables(i, word, unit):
            raise Unclear
        if not short or word in self.upright and len(word) > 1:
            self.sure = True
        self.read_known(i, lower, unit)

    def refuse_what_is_unclear(self, i, word):
        """Raises Unclear for words that may do anything to the number, and names of functions."""
        lower = word.casefold()
        if lower in UNCLEAR or lower.endswith('fold') and lower[:-4] in SCALES:
            raise Unclear
        if word not in self.functions:
            return
        following = [piece for _, piece in self.pieces[i + 1:]]
        ends_here = not following or following[0] in ('*', '/')
        seconds = word == 'sec' and (self.sign < 0 or ends_here)   # or the secant
        if not seconds:
            raise Unclear

    def unit(self, word):
        """The unit that a word spells, or None."""
        if word in SPELLINGS:
            return SPELLINGS[word]
        lower = word.casefold()
        if len(word) > 2 or lower in GLUED and (word in self.upright or not self.glued):
            names = lower, singular(lower), lower.rstrip('s')
            return next((SPELLINGS[name] for name in names if name in SPELLINGS), None)
        return None

    def may_be_variables(self, i, word, unit):
        """Is a run of up to three letters rather a product? 2x, 5A, 2ab, 2cd, 2AM; not 5 m, 5cm."""
        if word in self.upright:
            return len(word) == 1 and not unit
        glued = self.glued and i == 0
        if len(word) == 1:
            alone = len(self.pieces) == 1
            return word not in LONE or glued and alone
        if glued and word.islower() and word not in GLUED:
            return True
        if glued and len(word) == 2 and word.isupper():
            return True
        stem = singular(word.casefold())
        known = unit or word in IRREGULAR or stem in ('old', 'per') or any(
            stem in table for table in (SCALES, SQUARES, NEGATIVE))
        return not known

    def read_known(self, i, lower, unit):
        """What a word says: per, square, squared, a unit, a multiplier, or else a noun."""
        stem = singular(lower)
        scale = scale_of(stem)
        word_follows = any(kind == 'word' for kind, _ in self.pieces[i + 1:])
        if lower in ('per', 'each', 'every', '每'):
            self.sign = -1
        elif lower in ('square', 'cubic') or lower in SQUARES and word_follows:
            self.square = SQUARES[lower]
        elif lower in POWERS:
            self.power *= POWERS[lower]
        elif unit and not self.of:
            if unit not in MONEY or not self.units[unit]:   # $5 dollars
                self.units[unit] += self.sign * (self.square or 1)
            self.last = unit
            self.square = 0
            self.sign = 1
        elif scale is not None:
            self.scale *= scale ** self.sign
        else:
            self.read_noun(lower, stem)

    def read_noun(self, lower, stem):
        if lower in NEGATIVE:
            self.scale = -self.scale
        per = '/' if self.sign < 0 else ''
        self.nouns.append(self.of + per + stem)
        self.last = None
        self.sign = 1
        self.sure = True


def segments(word):
    """A word of a script that writes no spaces, cut at the units and multipliers that it holds."""
    if not WITHOUT_SPACES.search(word):
        return [word]
    parts = []
    while word:
        length = len(word)
        for n in range(min(8, len(word)), 0, -1):
            start = word[:n]
            if start in SPELLINGS or start in SCALES or start in SQUARES or start == '每':
                length = n
                break
        parts.append(word[:length])
        word = word[length:]
    return parts


# ---------------------------------------------------------------- several numbers with units

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
    if any(base != bases[0] for base in bases):
        return None
    if any(size <= smaller for size, smaller in zip(sizes, sizes[1:])):
        return None
    total = sum(number * size for number, size in zip(numbers, sizes)) / sizes[-1]
    words = Words(scale=Fraction(1), power=1, units={units[-1]: 1}, nouns=(), sure=True)
    return total, words


# ---------------------------------------------------------------- comparison

SAME_UNITS = (Fraction(1), Fraction(1), 0)


def conversions(one, other):
    """
    Words of two texts -> [(a, b, pi), ...]: the values x and y of the texts agree if a x equals
    b y π^pi, by any of these. [] where the two are of different things.
    """
    def named(words):
        return words and (words.units or words.nouns)

    if not named(one) or not named(other):
        return [SAME_UNITS]
    if bool(one.units) != bool(other.units) or not same_nouns(one.nouns, other.nouns):
        return []
    if not one.units and not (one.nouns and other.nouns):
        return []
    if one.units == other.units:
        return [SAME_UNITS]
    found = []
    for a, bases in readings(one.units):
        for b, other_bases in readings(other.units):
            if dimension(bases) == dimension(other_bases):
                found.append((a, b, other_bases['π'] - bases['π']))
    return found


def readings(units):
    """A product of units, {unit: power} -> all that it may mean: [(factor, {base: power}), ...]"""
    found = [(Fraction(1), Counter())]
    for unit, power in list(units.items())[:6]:
        longer = []
        for factor, bases in found:
            for one, its_bases in MEASURES[unit]:
                together = Counter(bases)
                for base, n in its_bases.items():
                    together[base] += power * n
                longer.append((factor * one ** power, together))
        found = longer[:12]
    return found


def dimension(bases):
    """{base: power} but for what cancels, and for π, which is a number."""
    return {base: power for base, power in bases.items() if power and base != 'π'}


def same_nouns(nouns, others):
    """The same words, or some that only describe them more: 5 (red) balls, 9 years (old); 5 cups
    (of milk); but 5 apples are no 5 apple trees."""
    def without_of(words):
        return [word for word in words if not word.startswith('of ')]

    if without_of(nouns) == list(nouns) or without_of(others) == list(others):
        nouns = without_of(nouns)
        others = without_of(others)
    few, many = sorted((tuple(nouns), tuple(others)), key=len)
    more = {*many} - {*few}
    same_thing = few[-1:] == many[-1:] != ()
    return {*few} <= {*many} and (more <= NEUTRAL or same_thing)
