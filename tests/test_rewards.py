import json
import operator
import random
import subprocess
import sys
import time
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import pytest

import rewards
from rewards import (
    answer_of, choice_reward, combined, countdown_reward, format_reward, language_mixed,
    language_reward, length_reward, match_reward, overlong_reward, repetition_reward,
    split_response,
)

PREFILL = {"prefill": "<think>"}


# ---------------------------------------------------------------- splitting

@pytest.mark.parametrize("response, row, expected", [
    ("<think>a</think>b", {}, ("a", "b")),
    ("a</think>b", PREFILL, ("a", "b")),
    ("\na</think>\nb", {"prefill": "<think>\n"}, ("\n\na", "\nb")),
    ("a</think>b", {}, ("a", "b")),   # the template prefilled it and the row does not say so
    ("b", {}, ("", "b")),
    ("<think>a \\boxed{1}", {}, ("a \\boxed{1}", "")),   # cut off while thinking
    ("a \\boxed{1}", PREFILL, ("a \\boxed{1}", "")),
    ("<think>a</think>b</think>c", {}, ("a", "")),
    ("<think>a</think>b<think>c", {}, ("a", "")),
    ("", {}, ("", "")),
    ("", PREFILL, ("", "")),
])
def test_split(response, row, expected):
    assert split_response(response, row) == expected


@pytest.mark.parametrize("answer, expected", [
    ("<answer>5</answer>", "5"),
    ("<answer> 3 +\n 4 </answer>", "3 + 4"),
    ("So \\boxed{5}.", "5"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\fbox{5}", "5"),
    ("\\boxed 5", "5"),
    ("\\boxed{}: \\boxed{5}", "5"),
    ("\\boxed{5} and again \\boxed{ 5 }", "5"),
    ("\\boxed{5} <answer>5</answer>", "5"),
    ("<answer>it is \\boxed{5}</answer>", "5"),
    ("<answer>5</answer><answer>6</answer>", None),
    ("\\boxed{5} or \\boxed{6}", None),
    ("\\boxed{5} <answer>6</answer>", None),
    ("<answer>\\boxed{5} \\boxed{6}</answer>", None),
    ("<answer><answer>5</answer></answer>", None),
    ("<answer>5", None),
    ("5</answer>", None),
    ("</answer>5<answer>", None),
    ("\\boxed{5", None),
    ("\\boxed{5} \\boxed{5", None),
    ("<answer> </answer>", None),
    ("5", None),
    ("", None),
])
def test_answer_of(answer, expected):
    assert answer_of(answer, {}) == expected
    assert answer_of("x \\boxed{7} <answer>8</answer></think>" + answer, PREFILL) == expected


@pytest.mark.parametrize("answer, spellings", [
    ("\\boxed{x = 2} or shorter \\boxed{2}", ["x = 2", "2"]),
    ("\\boxed{\\frac12} <answer>1/2</answer>", ["\\frac12", "1/2"]),
    ("\\boxed{12\\text{ cm}}, so \\boxed{12}", ["12\\text{ cm}", "12"]),
    ("\\boxed{18} <answer>18.</answer>", ["18", "18."]),
    ("\\boxed{0.5} $\\boxed{ 50\\% }$ \\boxed{1/2} \\boxed{0.5}", ["0.5", "50\\%", "1/2"]),
])
def test_one_answer_in_several_spellings_is_one_answer(answer, spellings):
    assert rewards.answers_of(answer, {}) == spellings
    assert answer_of(answer, {"task": "math"}) == spellings[0]
    for gold in spellings:
        assert rewards.math_reward(answer, {"answer": gold}) == 1
        assert rewards.math_reward(f"\\boxed{{7}} {answer}", {"answer": gold}) == 0
        assert rewards.math_reward(f"{answer} \\boxed{{7}}", {"answer": gold}) == 0
    assert answer_of(f"{answer} \\boxed{{7}}", {"task": "math"}) is None


@pytest.mark.parametrize("mention", [
    "I shall put it in \\boxed as asked.", "The answer in `\\boxed`:",
    "With \\boxed, it is", "\\boxed.",
    "In \\boxed{} goes", "I write \\boxed{...} around it:", "\\boxed{\\ldots} is",
    "\\boxed a number:",
    "put it in \\boxed{answer}:", "\\boxed{\\text{your answer}} is", "the \\boxed command:",
    "\\fbox or \\boxed:", "\\boxed{ … }", "\\boxedanswer", "**\\boxed**"])
def test_a_mention_of_the_box_is_no_answer(mention):
    assert rewards.answers_of(mention, {}) == []
    assert rewards.answers_of(f"{mention} \\boxed{{18}} {mention}", {}) == ["18"]
    assert rewards.math_reward(f"{mention} \\boxed{{18}}", {"answer": "18"}) == 1
    assert rewards.math_reward(f"{mention} \\boxed{{18}}", {"answer": "17"}) == 0


def test_a_box_without_braces_holds_what_tex_would_box():
    assert answer_of("\\boxed 12", {}) == "12" and answer_of("\\boxed -3.5.", {}) == "-3.5"
    assert answer_of("\\boxed B", {}) == "B" and answer_of("\\boxed x.", {}) == "x"
    assert answer_of("\\boxed 12 \\boxed{13}", {}) is None


# ---------------------------------------------------------------- format, match

@pytest.mark.parametrize("response, score", [
    ("<think>a</think><answer>5</answer>", 1),
    ("<think>\na\nb\n</think>\n\n<answer>\n5\n</answer>", 1),
    ("<think>a</think><answer>5</answer>\n", 0),
    (" <think>a</think><answer>5</answer>", 0),
    ("<think>a</think><answer>5</answer> so it is 5", 0),
    ("<think>a</think> so <answer>5</answer>", 0),
    ("x<think>a</think><answer>5</answer>", 0),
    ("<think></think><answer>5</answer>", 0),
    ("<think> \n\t </think><answer>5</answer>", 0),
    ("<think>\u200b\u2060\ufeff\u00ad\u3164</think><answer>5</answer>", 0),
    ("<think>a</think><answer></answer>", 0),
    ("<think>a<think>b</think><answer>5</answer>", 0),
    ("<think>a</think>b</think><answer>5</answer>", 0),
    ("<think>a</think><answer>5</answer><answer>5</answer>", 0),
    ("<think>a <answer>5</answer></think>", 0),
    ("<think>a <answer>4</answer></think><answer>5</answer>", 0),
    ("<answer>5</answer><think>a</think>", 0),
    ("<think>a</think><answer>5", 0),
    ("<think>a</think>5", 0),
    ("<think>a<answer>5</answer>", 0),
    ("<answer>5</answer>", 0),
    ("", 0),
])
def test_format(response, score):
    assert format_reward(response, {}) == score
    if response.startswith("<think>"):
        assert format_reward(response.removeprefix("<think>"), PREFILL) == score
        assert format_reward(response, PREFILL) == 0  # two opening tags


def test_match():
    row = {"answer": "3 1 2 "}
    assert match_reward("<answer> 3 1\n2</answer>", row) == 1
    assert match_reward("<answer>3 1 2 4</answer>", row) == 0
    assert match_reward("<answer>312</answer>", row) == 0
    assert match_reward("3 1 2", row) == 0
    assert match_reward("<answer>7</answer>", {"answer": 7}) == 1


KNAVES = {"answer": "knight, knave, knave"}


@pytest.mark.parametrize("right", [
    "knight, knave, knave", "Knight, Knave, Knave", "knight,knave,knave", "knight , knave, knave.",
    "KNIGHT,\n knave, knave"])
def test_match_but_for_case_and_white_space(right):
    assert match_reward(f"<answer>{right}</answer>", KNAVES) == 1
    assert match_reward(f"<answer>{KNAVES['answer']}</answer>", {"answer": right}) == 1


@pytest.mark.parametrize("wrong", [
    "knight, knave, knight", "knight, knave", "knight knave knave", "knightknave, knave",
    "knight, knave, knave, knave", "knight, knave, knave..", "knight, knave, knave or knight",
    ".knight, knave, knave", ",knight, knave, knave", "", "."])
def test_match_takes_nothing_else(wrong):
    assert match_reward(f"<answer>{wrong}</answer>", KNAVES) == 0


# ---------------------------------------------------------------- countdown

def countdown(answer, numbers, target):
    row = {"numbers": numbers, "target": target}
    return countdown_reward(f"<think>x</think><answer>{answer}</answer>", row)


@pytest.mark.parametrize("answer, numbers, target", [
    ("(3 + 7) * 8", [3, 7, 8], 80),
    ("(3+7)*8 = 80", [8, 7, 3], 80),
    ("8×(3+7)", [3, 7, 8], 80),
    ("8 \\times (3+7)", [3, 7, 8], 80),
    ("8 ÷ (3 − 1)", [8, 3, 1], 4),
    ("8/(3-8/3)", [8, 8, 3, 3], 24),        # through a fraction
    ("((8)/(((3))-(8/3)))", [8, 8, 3, 3], 24),
    ("1-2-3", [1, 2, 3], -4),               # left to right
    ("1-2-3 = -4", [1, 2, 3], -4),
    ("12/6/2", [12, 6, 2], 1),
    ("100*75+50-25", [25, 50, 75, 100], 7525),
    ("5", [5], 5),
    ("\\text{(3+7)*8}", [3, 7, 8], 80), ("\\mathbf{(3+7) \\times 8}", [3, 7, 8], 80),
    ("*(3+7)*8*", [3, 7, 8], 80), ("10 \u2010 2 \u2011 3", [10, 2, 3], 5),
])
def test_countdown_right(answer, numbers, target):
    assert countdown(answer, numbers, target) == 1


@pytest.mark.parametrize("answer, numbers, target", [
    ("(3 + 7) * 8", [3, 7, 8], 81),
    ("3 + 7", [3, 7, 8], 10),                    # one unused
    ("3 + 7 + 7", [3, 7, 8], 17),                # one twice, one unused
    ("3 + 7 + 8 + 8 - 8", [3, 7, 8], 18),
    ("37 + 8", [3, 7, 8], 45),                   # concatenation
    ("3 7 + 8", [3, 7, 8], 45),
    ("3 7 8", [3, 7, 8], 378),
    ("80", [3, 7, 8], 80),
    ("80 = 80", [3, 7, 8], 80),
    ("(3+7)*8 = 81", [3, 7, 8], 80),
    ("(3+7)*8 = 80 = 80", [3, 7, 8], 80),
    ("(3+7)*8 =", [3, 7, 8], 80),
    ("80 = (3+7)*8", [3, 7, 8], 80),
    ("(3+7)*8.", [3, 7, 8], 80),
    ("(3+7)*8 or 3", [3, 7, 8], 80),
    ("(3+7)8", [3, 7, 8], 80),
    ("(3+7)*8)", [3, 7, 8], 80),
    ("((3+7)*8", [3, 7, 8], 80),
    ("()", [3, 7, 8], 0),
    ("3 - -7 + 8", [3, 7, 8], 18),               # signs
    ("-3 + 7 + 8", [3, 7, 8], 12),
    ("+3 + 7 + 8", [3, 7, 8], 18),
    ("2 ** 3", [2, 3], 8), ("2 ^ 3", [2, 3], 8), ("2³", [2, 3], 8), ("7 // 2", [7, 2], 3),
    ("7 % 2", [7, 2], 1),
    ("3!", [3], 6), ("3e1", [3, 1], 30), ("3.0", [3], 3), ("0x3", [3], 3), ("3_0", [30], 30),
    ("三", [3], 3), ("３", [3], 3),
    ("1/0", [1, 0], 0), ("0/0", [0, 0], 0), ("1/(2-2)", [1, 2, 2], 0),
    ("__import__('os')", [3], 3), ("target", [3], 3), ("", [3], 3),
    ("0.1+0.2", [1, 2], 3),
    ("1/3*3", [1, 3], 1),
])
def test_countdown_wrong(answer, numbers, target):
    assert countdown(answer, numbers, target) == 0


@pytest.mark.parametrize("answer", [
    r"\left(3+7\right)\times 8", "$(3+7)*8$", r"\((3+7) \times 8\)", "[3+7]*8", "(3+7)⋅8",
    "**(3+7)*8**",
    "**(3+7)*8** = 80", "`(3+7)*8`", r"\bigl(3+7\bigr)\cdot 8 = 80", r"\{3+7\}*8",
    r"{(3+7)}\times{8}",
    r"\[ (3+7)\times 8 = 80 \]", "(3 + 7) x 8", "（3＋7）×8", r"8 \cdot\left[3+7\right]",
    "(3+7)∙8=80.0",
    r"\displaystyle (3+7)\,\times\,8", r"\Bigg[\,3+7\,\Bigg] \ast 8", "[3+7]•8",
    r"8\times\lbrack 3+7\rbrack"])
def test_countdown_in_latex_and_unicode(answer):
    assert countdown(answer, [3, 7, 8], 80) == 1
    assert countdown(answer, [3, 7, 8], 81) == 0
    assert countdown(answer, [3, 7, 9], 80) == 0


@pytest.mark.parametrize("answer, numbers, target, score", [
    (r"\frac{8}{2}+3", [8, 2, 3], 7, 1), (r"\frac82+3", [8, 2, 3], 7, 1), ("10–3", [10, 3], 7, 1),
    (r"\dfrac{8}{2} + 3 = 7", [8, 2, 3], 7, 1), (r"\tfrac{\frac{8}{2}}{4}", [8, 2, 4], 1, 1),
    (r"\frac{8+4}{2}", [8, 4, 2], 6, 1), (r"\frac 8 2", [8, 2], 4, 1),
    (r"\frac{1}{3} = 1/3", [1, 3], Fraction(1, 3), 1),
    (r"3\frac{8}{2}", [8, 2, 3], 12, 0), (r"\frac{8}{2}3", [8, 2, 3], 12, 0),
    ("(3+7]*8", [3, 7, 8], 80, 0),
    (r"\frac{8}", [8], 8, 0), (r"\frac(8)(2)", [8, 2], 4, 0), (r"\frac{8}{2", [8, 2], 4, 0),
    (r"\frac123", [12, 3], 4, 0),
    ("**2**3**", [2, 3], 8, 0), ("2**3", [2, 3], 8, 0), ("3x", [3], 3, 0), ("x", [3], 3, 0),
    (r"\frac{8}{2-2}", [8, 2, 2], 0, 0),
    (r"\text{any}", [3], 3, 0), (r"\left(", [3], 3, 0), ("$$", [3], 3, 0)])
def test_countdown_fractions_and_what_is_none(answer, numbers, target, score):
    assert countdown(answer, numbers, target) == score


@pytest.mark.parametrize("numbers, target", [
    ([3.0, 7.0], 10), ([3, 7], "10"), (["3", "7"], 10.0), ([3, "7.0"], " 10 ")])
def test_countdown_rows_whose_numbers_are_spelled_otherwise(numbers, target):
    assert countdown("3+7", numbers, target) == 1
    assert countdown("3*7", numbers, target) == 0
    row = {"task": "countdown", "numbers": numbers, "target": target}
    rewards.check_row(row, {"accuracy": 1.0})


@pytest.mark.parametrize("numbers, target, said", [
    ([2.5, 3], 5, "2.5 is no whole"), ([True], 1, "True is no number"), (["a"], 3, "'a' is no"),
    ([-3, 7], 4, "-3 is no whole"),
    ([3], None, "None is no"), ([3], "ten", "'ten' is no"), ([3], float("nan"), "nan is no"),
    ([[3]], 3, "is no number")])
def test_countdown_rows_without_numbers_are_errors(numbers, target, said):
    with pytest.raises(ValueError, match=said):
        countdown("3", numbers, target)


def test_countdown_against_enumeration():
    """Every way to write three numbers with two operators, against values computed here without a
    parser."""
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    random.seed(0)
    checked = 0
    for a, b, c in permutations([3, 4, 9]):
        for p, q in product("+-*/", repeat=2):
            left = apply[q](apply[p](Fraction(a), b), c)
            right = apply[p](Fraction(a), apply[q](Fraction(b), c))
            for text, value in ((f"({a}{p}{b}){q}{c}", left), (f"{a}{p}({b}{q}{c})", right)):
                numbers = random.sample([3, 4, 9], 3)
                assert countdown(text, numbers, value) == 1
                assert countdown(text, numbers, value + Fraction(1, 10 ** 30)) == 0
                checked += 1
    assert checked == 192


@pytest.mark.parametrize("answer", [
    "(" * 10 ** 6, "(" * 400 + "3" + ")" * 400, "9" * 10 ** 6, "3+" * 10 ** 6 + "3",
    "<answer>" * 10 ** 5, "\\boxed{" * 10 ** 5, "\\boxed" * 10 ** 5])
def test_huge_inputs_are_wrong_and_fast(answer):
    start = time.process_time()
    assert countdown(answer, [3, 7, 8], 80) == 0
    assert time.process_time() - start < 2


def test_countdown_needs_its_row():
    with pytest.raises(KeyError):
        countdown_reward("<answer>3</answer>", {"numbers": [3]})


# ---------------------------------------------------------------- language

def language(reasoning, target):
    answer = "</think><answer>答案 answer ответ</answer>"
    return language_reward(reasoning + answer, {**PREFILL, "language": target})


EN = "3 plus 7 is 10, 10 times 8 is 80"
ZH = "3 加 7 得 10，10 乘 8 得 80"


@pytest.mark.parametrize("reasoning, target, score", [
    (EN, "en", 1), (EN, "zh", 0), (ZH, "zh", 1), (ZH, "en", 0),
    ("3 plus 7 得 10", "en", 0.5), ("3 plus 7 得 10", "zh", 0.5),
    ("3 加 7 is 10 得 10", "zh", 2 / 3),
    ("3 + 7 = 10", "en", 0), ("", "en", 0), (" \n\u200b", "zh", 0), ("x = 3, y = 4", "zh", 0),
    ("设 x = 3, 则 y = $\\frac{x}{2}$", "zh", 1),
    ("It costs $5 and then $10 for 两 of them", "en", 7 / 8),
    ("Сначала сложим 3 и 7", "ru", 1), ("Сначала сложим 3 и 7", "en", 0),
    ("まず3と7を足すと10になる", "ja", 1), ("まず3と7を足すと10になる", "zh", 0),
    ("먼저 3과 7을 더하면 10", "ko", 1), ("首先把三和七相加", "ja", 0),
    ("First we add the two numbers and then it is done", "en", 1),
    ("Zuerst addieren wir die beiden Zahlen und dann ist es fertig", "en", 0),
    ("Zuerst addieren wir die beiden Zahlen und dann ist es fertig", "de", 1),
    ("D'abord nous additionnons les deux nombres et le total est dix", "en", 0),
    ("D'abord nous additionnons les deux nombres et le total est dix", "fr", 1),
    ("Primero sumamos los dos números y el total es diez", "es", 1),
    ("Primero sumamos los dos números y el total es diez", "en", 0),
    ("First we add the two numbers and then it is done", "fr", 0),
    ("We add the two of them. Los dos números y el total es diez", "en", 6 / 13),
])
def test_language(reasoning, target, score):
    assert language(reasoning, target) == pytest.approx(score)


def test_language_defaults_to_english_and_refuses_the_unknown():
    assert language_reward(EN + "</think>5", PREFILL) == 1
    with pytest.raises(ValueError, match="klingon.*en.*zh"):
        language_reward(EN, {"language": "klingon"})


@pytest.mark.parametrize("reasoning, mixed", [
    (EN, False), (ZH, False), ("3 plus 7 得 10", True), ("3 + 7", False), ("", False),
    ("まず3と7を足す", False),
    ("设 x = 3", False), ("First we add the 数", True),
    ("We add the two of them. Los dos y el total es diez", True)])
def test_language_mixed(reasoning, mixed):
    for target in ("en", "zh"):
        row = {**PREFILL, "language": target}
        assert language_mixed(reasoning + "</think>5 五 five", row) is mixed


@pytest.mark.parametrize("text", [
    "$" * 10 ** 5, "\\(" * 10 ** 5, "`" * 10 ** 5 + "a", "a`$\\[" * 10 ** 5,
    "a-" * 10 ** 5, "'" * 10 ** 5, "\u0301" * 10 ** 5, "得a" * 10 ** 5])
def test_language_is_linear(text):
    start = time.process_time()
    language(text, "en")
    assert time.process_time() - start < 2


FOREIGN = {  # sentences of about eight words
    "pl": [
        "Najpierw dodajemy dwie liczby, a potem mnożymy wynik",
        "To jest proste zadanie, wystarczy policzyć wszystko razem",
        "Wczoraj poszliśmy z przyjaciółmi do kina na nowy film",
        "Janek ma piec jablek i kupuje jeszcze dwa",
    ],
    "nl": [
        "Eerst tellen we de twee getallen bij elkaar op",
        "Ik weet nog niet hoeveel appels er over zijn",
        "De kat zit op het dak en kijkt rond",
        "Wij delen beide kanten van de vergelijking door vijf",
    ],
    "tr": [
        "Önce iki sayıyı toplayalım ve sonra ikiyle çarpalım",
        "Bu yüzden cevap yedi olur çünkü üç artı dört",
        "Dün arkadaşlarımla birlikte yeni bir film izlemeye gittik",
        "Simdi bu sayilari toplayalim ve sonucu bulalim hemen",
    ],
    "vi": [
        "Trước tiên chúng ta cộng hai số với nhau",
        "Vậy đáp án là bảy vì ba cộng bốn",
        "Con mèo ngồi trên mái nhà nhìn chim",
        "Dau tien chung ta cong hai so voi nhau",
    ],
    "id": [
        "Pertama kita jumlahkan kedua bilangan itu lalu kalikan hasilnya",
        "Jadi jawabannya adalah tujuh karena tiga ditambah empat",
        "Kucing duduk di atas atap melihat burung kecil",
        "Saya beli 3 buku plus 2 pensil hari ini",
    ],
    "sv": [
        "Först lägger vi ihop de två talen noga",
        "Jag vet inte hur många äpplen som finns kvar",
        "Katten sitter på taket och tittar på fåglarna",
        "Han har fem bocker och koper tre till",
    ],
    "hi-Latn": [
        "Pehle hum teen aur char ko jodte hain",
        "Isliye uttar saat hai kyunki teen aur char",
        "Kal hum apne doston ke saath film dekhne gaye",
        "Bhai pehle total nikalte hain phir minus karenge",
    ],
    "zh-Latn": [
        "women xian ba san he qi jia qilai",
        "suoyi da an shi qi yinwei san jia si",
        "zuotian women he pengyou yiqi qu kan dianying",
        "xiān bǎ liǎng gè shù jiā qǐ lái",
    ],
    "es": [
        "Primero sumamos los dos números y luego multiplicamos todo",
        "El gato mira los pajaros desde su tejado",
    ],
    "fr": [
        "La réponse est donc sept car trois plus quatre",
        "Le total est de sept pommes dans ce panier",
    ],
    "de": [
        "Wir suchen eine Zahl, die durch zwei teilbar ist",
        "Teile beide Seiten durch fünf und vereinfache anschließend",
    ],
    "pt": [
        "Portanto a resposta é sete porque três mais quatro",
        "Vamos verificar agora se tudo isso está certo",
    ],
    "it": [
        "Quindi la risposta è sette perché tre più quattro",
        "Il problema si risolve in due minuti appena",
    ],
    "cs": [
        "Nejprve sečteme obě čísla a potom výsledek vynásobíme",
        "Kocka sedi na strese a diva se dolu",
    ],
    "fi": [
        "Ensin lasketaan kaksi lukua yhteen ja sitten kerrotaan",
        "Kissa istuu katolla ja katselee lintuja rauhassa",
    ],
    "hu": [
        "Először összeadjuk a két számot, majd megszorozzuk az eredményt",
        "Helyettesítsük be x értékét az egyenletbe most",
    ],
    "ro": [
        "Mai întâi adunăm cele două numere și înmulțim",
        "Pisica sta pe acoperis si priveste pasarile",
    ],
    "sw": [
        "Kwa hiyo jibu ni saba kwa sababu tatu",
        "Paka amekaa juu ya paa akitazama ndege",
    ],
    "tl": [
        "Una, pagsamahin natin ang dalawang numero at paramihin",
        "Kaya ang sagot ay pito dahil tatlo at apat",
    ],
    "da": [
        "Svaret er altså syv, fordi tre plus fire",
        "I går gikk vi på kino med vennene våre",
    ],
    "und": [
        "Pirmiausia sudedame du skaičius ir padauginame rezultatą iš",
        "Yn gyntaf rydym yn adio'r ddau rif at",
        "Unue ni adicias la du nombrojn kaj multiplikas",
        "mazu san to nana wo tashite ju ni narimasu",
        "meonjeo du sutjareul deohago geu daeume gopha gessseumnida",
        "Snachala slozhim dva chisla, a potom umnozhim rezultat",
        "Okokuqala sihlanganisa izinombolo ezimbili bese siphinda impendulo",
        "Së pari mbledhim dy numrat dhe pastaj shumëzojmë",
    ],
}


@pytest.mark.parametrize("name, sentence", [(name, s) for name in FOREIGN for s in FOREIGN[name]])
def test_languages_in_latin_letters_are_not_english(name, sentence):
    assert language(sentence, "en") < 0.5
    assert language(f"{sentence}. {sentence}: 3 + 4 = 7 cm.", "en") < 0.5
    mixed = language(f"We add the two of them first. {sentence}.", "en")
    assert mixed < 1 or name == "und"


def test_the_commonest_languages_in_latin_letters_are_told_apart():
    texts = {name: ". ".join(sentences) for name, sentences in FOREIGN.items()}
    names = texts.keys() - {"und", "fi", "ro", "pt"}
    for name in names:
        assert name == max(names, key=lambda other: language(texts[name], other))


@pytest.mark.parametrize("text", [
    "First, 3 + 4 = 7.", "So x = 5.", "Let me check: 2*3=6, yes.", "Then 8 / 2 = 4.",
    "Total: 3 + 4 = 7 apples", "Hence y = 2.", "Yes.",
    "Simplify: 2x = 10, x = 5.", "Factor x^2 - 1 = (x-1)(x+1).",
    "Natalia sold 48/2 = 24 clips in May.", "Speed = 60 km/h, time = 2 h.",
    "By Vieta, ab = 6.", "Cost: $5 * 3 = $15", "Area = pi r^2", "Jack has 5 marbles",
    "Ella ate 4 pizzas Monday", "gcd(12, 18) = 6", "LHS = RHS.",
    "Aspirin inhibits cyclooxygenase irreversibly.", "det(A) = 3, det(B) = 4, det(AB) = 12",
    "(a+bi)(c+di) = ac + adi + bci - bd", "F = ma, ma = 6 N",
    "Triangle ABC has sides 3, 4, 5.", "Recall Euler's totient function.",
    "Poincaré and Erdős proved it.", "QED", "guess", "3 plus 7 is 10, plus 4",
    "Coefficient comparison: a = 1, b = -2.", "A die is rolled; the die shows 3.",
    "\\begin{align*} ab + ac &= yi + yi \\end{align*} so it holds"])
def test_short_mathematical_english_is_english(text):
    assert language(text, "en") == 1


@pytest.mark.parametrize("text", [
    "αβ", "αβγ + βγ = 3", "ΔΑΒΓ", "$αβ$ = 2, μν", "λμ = μλ", "sin αβ"[4:]])
def test_greek_letters_are_mathematics(text):
    assert language(f"So {text} = 5", "en") == 1
    assert language(text, "el") == 0


def test_greek_with_accents_is_greek():
    assert language("Πρώτα προσθέτουμε δύο αριθμούς, αβ", "el") == 1
    assert language("Πρώτα προσθέτουμε τους δύο αριθμούς", "en") == 0


def test_english_solutions_are_english():
    """By published texts: GSM8K's answers and R1's traces."""
    data = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not data.exists():
        pytest.skip("needs the shared data")
    lines = (data / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    low = [text for text in answers if language(text, "en") < 0.9]
    assert len(low) <= len(answers) // 200, low
    traces = (data / "r1_traces_sample/deepseek_r1_openrouter.json").read_text(encoding="utf-8")
    assert all(language(trace["message_thinking"], "en") == 1 for trace in json.loads(traces))


# ---------------------------------------------------------------- multiple choice

@pytest.mark.parametrize("answer, gold, score", [
    ("B", "B", 1), ("b", "B", 1), ("(B)", "B", 1), ("[b]", "B", 1), ("B.", "B", 1), ("B)", "B", 1),
    ("**B**", "B", 1), ("**B.**", "B", 1),
    ("\\text{B}", "B", 1), ("\\textbf{(B)}", "B", 1), ("$B$", "B", 1), ("Answer: B", "B", 1),
    ("The correct answer is (B).", "B", 1),
    ("option b", "B", 1), ("B. Aspirin", "B", 1), ("(B) 12 mg", "B", 1),
    ("B: both of them", "B", 1), ("E", "E", 1),
    ("A", "B", 0), ("C", "B", 0), ("A, B", "B", 0), ("B, C", "B", 0), ("B or C", "B", 0),
    ("B and C", "B", 0),
    ("BC", "B", 0), ("A B C D E", "B", 0),
    ("B. C", "B", 0), ("B. no, C.", "B", 0), ("(B) (C)", "B", 0), ("B/C", "B", 0),
    ("not A", "A", 0),
    ("A drug", "A", 0), ("be", "B", 0), ("Aspirin", "A", 0),
    ("Banana", "B", 0), ("F", "B", 0), ("2", "B", 0), ("Aspirin B", "B", 0), ("B1", "B", 0),
    ("", "B", 0),
    ("В", "B", 0), ("\u200bB", "B", 0),
    ("**Answer: B**", "B", 1), ("**Answer:** B", "B", 1), ("**Answer**: **(B)**", "B", 1),
    ("B - Aspirin", "B", 1), ("**B** – Aspirin", "B", 1),
    ("The correct answer is option B", "B", 1), ("The correct answer is: Option (b).", "B", 1),
    ("答案：B", "B", 1), ("正确答案是B。", "B", 1), ("B。", "B", 1),
    ("（B）", "B", 1), ("选项 B", "B", 1), ("Ｂ", "B", 1), ("B - A", "B", 0),
    ("B - Aspirin, C", "B", 0), ("B-C", "B", 0), ("B.或C", "B", 0), ("B。C", "B", 0),
    ("答案：B或C", "B", 0), ("Answer: B, answer: C", "B", 0), ("option B option C", "B", 0),
    ("**Answer: B** **Answer: C**", "B", 0), ("B. _C_", "B", 0),
    ("The answer is option B or C", "B", 0), ("answer answer answer B", "B", 0),
    ("B*C", "B", 0), ("B - ", "B", 0), ("Ｂ Ｃ", "B", 0), ("B. Ⓒ", "B", 0),
])
def test_choice(answer, gold, score):
    response = f"<think>A, C or D</think><answer>{answer}</answer>"
    assert choice_reward(response, {"answer": gold}) == score


def test_choice_with_the_text_of_the_options():
    row = {"answer": "B", "choices": ["Vitamin C", "Vitamin A deficiency", "Vitamin D"]}
    assert choice_reward("\\boxed{B. vitamin A deficiency}", row) == 1
    assert choice_reward("\\boxed{B. Vitamin C}", row) == 0
    assert choice_reward("\\boxed{B}", {**row, "choices": []}) == 1
    assert choice_reward("\\boxed{A} \\boxed{B}", row) == 0
    for wrong in ("b", "F", "AB", "", "Vitamin A"):
        with pytest.raises(ValueError, match="A-E"):
            choice_reward("\\boxed{B}", {"answer": wrong})


OPTIONS = {"choices": ["Ibuprofen", "Aspirin", "A beta blocker", "E. coli"]}


@pytest.mark.parametrize("answer, letter", [
    ("C. A beta blocker.", "C"), ("B\nExplanation: it inhibits COX.", "B"), ("B (Aspirin)", "B"),
    ("So the answer is B", "B"), ('"B"', "B"), ("{B}", "B"), ("#### B", "B"), ("选B", "B"),
    ("Aspirin", "B"),
    ("The answer is Aspirin.", "B"), ("a beta blocker", "C"), ("E. coli", "D"), ("D. E. coli", "D"),
    ("**E. coli**", "D"),
    ("B. Aspirin\n\nExplanation: a COX inhibitor", "B"), ("B (Ibuprofen)", None),
    ("B\nExplanation: A would be wrong, C too.", "B"), ("B\nExplanation: the answer is C", None),
    ("B\nExplanation: no, it is C", None), ("B\nExplanation: A or C", None),
    ("B. Ibuprofen", None), ("A. Aspirin", None),
    ("Aspirin, Ibuprofen", None), ("not Aspirin", None), ("Aspirin or A", None),
    ("B. Aspirin or C", None), ("(B) Aspirin.", "B"),
    ("Therefore, the correct answer is (B) Aspirin.", "B"), ("aspirin", "B"),
    ("\\text{Aspirin}", "B"), ("Aspirin A", None)])
def test_choice_reads_the_options_texts(answer, letter):
    for gold in "ABCD":
        row = {**OPTIONS, "answer": gold}
        assert choice_reward(f"<answer>{answer}</answer>", row) == (gold == letter)


@pytest.mark.parametrize("answer", [
    "I'd choose B", "Answer - B", "Answer = B", "The correct statement is B",
    "故选：B。", "答案选B", "所以答案是B", "选项B正确",
    "因此，正确答案为B。", "B is correct", "Option B is the correct answer.",
    "I would choose B",
    "It is B.", "B is the answer.", "Ans. B", "ANSWER: B", "Choose (B)", "B选项", "故答案为B",
    "答案是：B", "正确选项：B", "(B) is correct", "Thus B",
    "Hence, the best option is (B).", "B because it inhibits COX",
    '{"answer": "B"}', "\\(B\\)", "`B`", "B;", "“B”", "\\mathbf{B}",
    "\\textbf{(B)}\\ 12", "B) 12", "My final answer: **B**", "'B'", "[B]",
    "B. A drug for the heart", "Reasoning #### B"])
def test_choice_without_options(answer):
    for gold in "ABC":
        assert choice_reward(f"<answer>{answer}</answer>", {"answer": gold}) == (gold == "B")


@pytest.mark.parametrize("answer, letter", [
    ("yes", "A"), ("No.", "B"), ("**Maybe**", "C"), ("The answer is maybe", "C"),
    ("B. no", "B"), ("B (no)", "B"), ("yes or no", None), ("yes no", None), ("B. yes", None),
    ("not yes", None), ("no maybe", None)])
def test_choice_of_yes_no_maybe(answer, letter):
    for gold in "ABC":
        row = {"answer": gold, "choices": ["yes", "no", "maybe"]}
        assert choice_reward(f"\\boxed{{{answer}}}", row) == (gold == letter)


def test_choice_of_letters_whose_texts_are_letters():
    row = {"choices": ["O", "A", "B", "AB"]}
    answers = ("A", "AB", "C. B", "A. B", "C (B)", "B or A")
    read = [rewards.choice_of(answer, row) for answer in answers]
    assert read == ["A", "D", "C", None, "C", None]


def test_choice_in_two_spellings_is_one_choice():
    row = {**OPTIONS, "answer": "B", "task": "choice"}
    assert choice_reward("\\boxed{B} <answer>B. Aspirin</answer>", row) == 1
    assert choice_reward("\\boxed{Aspirin} \\boxed{(b)}", row) == 1
    assert choice_reward("\\boxed{B} <answer>A. Ibuprofen</answer>", row) == 0
    assert choice_reward("\\boxed{Ibuprofen} \\boxed{Aspirin}", row) == 0


@pytest.mark.parametrize("answer, right", [
    ("B) 4", 1), ("B. 4", 1), ("B: 4", 1), ("\\text{B) }4", 1), ("(B)\\ \\frac{1}{2}", 1),
    ("\\textbf{(B)}\\ 12", 1), ("B", 1), ("C) 4", 0),
    ("B) C", 0), ("B: C", 0), ("(B) (C)", 0), ("B) 4 or C", 0), ("B:4", 0), ("4", 0)])
def test_a_lettered_answer_in_mathematics(answer, right):
    assert rewards.math_reward(f"\\boxed{{{answer}}}", {"answer": "B"}) == right


# ---------------------------------------------------------------- length and repetition

@pytest.mark.parametrize("length, right, score", [
    (100, True, 0.5), (200, True, 0.0), (300, True, -0.5), (150, True, 0.25), (50, True, 0.5),
    (900, True, -0.5),
    (100, False, 0.0), (200, False, 0.0), (300, False, -0.5), (250, False, -0.25)])
def test_length(length, right, score):
    row = {"task": "match", "answer": "5", "shortest": 100, "longest": 300}
    response = "<answer>5</answer>" if right else "<answer>6</answer>"
    counted = {**row, "completion_tokens": length}
    assert length_reward(response, counted) == pytest.approx(score)


def test_length_in_characters_and_of_a_group_of_equals():
    row = {"task": "match", "answer": "5", "shortest": 18, "longest": 38}
    assert length_reward("<answer>5</answer>", row) == pytest.approx(0.5)
    assert length_reward(" " * 20 + "<answer>5</answer>", row) == pytest.approx(-0.5)
    assert length_reward("<answer>5</answer>", {**row, "longest": 18}) == 0
    with pytest.raises(KeyError):
        length_reward("<answer>5</answer>", {"task": "match", "answer": "5"})


@pytest.mark.parametrize("length, score", [
    (0, 0), (800, 0), (850, -0.25), (900, -0.5), (1000, -1), (5000, -1)])
def test_overlong(length, score):
    in_tokens = {"max_length": 1000, "completion_tokens": length}
    assert overlong_reward("", in_tokens) == pytest.approx(score)
    in_characters = {"max_length": 1000, "overlong_margin": 200}
    assert overlong_reward("x" * length, in_characters) == pytest.approx(score)


def test_repetition():
    assert repetition_reward("one two three four five", {"ngram": 3}) == 0
    assert repetition_reward("a b", {"ngram": 3}) == 0
    assert repetition_reward("", {}) == 0
    # abc bca cab abc; ab ba ab ba; 4 different of 6
    assert repetition_reward("a b c a b c", {"ngram": 3}) == pytest.approx(-1 / 4)
    assert repetition_reward("a b a b a", {"ngram": 2}) == pytest.approx(-1 / 2)
    assert repetition_reward("加三得十加三得十", {"ngram": 3}) == pytest.approx(-1 / 3)
    assert repetition_reward("wait " * 1000, {}) < -0.99
    assert repetition_reward("!" * 1000, {}) < -0.99
    assert repetition_reward(" ".join(map(str, range(1000))), {}) == 0


# ---------------------------------------------------------------- choosing and combining

def test_accuracy_dispatches_and_names_the_known_tasks():
    row = {"task": "countdown", "numbers": [3, 7], "target": 10}
    assert rewards.accuracy_reward("<answer>3+7</answer>", row) == 1
    assert rewards.accuracy_reward("<answer>3+7</answer>", {"task": "match", "answer": "3+7"}) == 1
    with pytest.raises(ValueError, match="chess.*countdown.*match"):
        rewards.accuracy_reward("<answer>3+7</answer>", {"task": "chess"})


def test_combined_weighs_the_components():
    row = {"task": "countdown", "numbers": [3, 7], "target": 10, **PREFILL}
    total, components = combined("3 plus 7 得 10</think><answer>3+7</answer>", row,
                                 {"accuracy": 1.0, "format": 0.5, "language": 2.0})
    assert components == {"accuracy": 1.0, "format": 1.0, "language": 0.5}
    assert total == pytest.approx(2.5)


def test_combined_refuses_unknown_names():
    with pytest.raises(ValueError, match="'languag'.*'language'"):
        combined("", {}, {"languag": 1.0})


@pytest.mark.parametrize("broken", [
    lambda response, row: 1 / 0, lambda response, row: float("nan"), lambda response, row: None])
def test_a_reward_that_fails_scores_zero_and_is_counted(broken, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "broken", broken)
    before = rewards.FAILURES.total()
    assert combined("<think>a</think><answer>5</answer>", {}, {"broken": 1.0, "format": 0.5}) \
        == (0.5, {"broken": 0.0, "format": 1.0})
    assert rewards.FAILURES.total() == before + 1


def test_import_is_light():
    code = "import sys, rewards; print('sympy' in sys.modules, 'torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True)
    assert printed.split() == ["False", "False"]


# ---------------------------------------------------------------- right, votes

@pytest.mark.parametrize("scored, is_right", [
    ({"task": "math", "rewards": {"accuracy": 1.0}}, True),
    ({"task": "code", "rewards": {"accuracy": 0.99}}, False),   # partial credit is not right
    ({"task": "math", "rewards": {"math": 1.0}}, True),       # the task's own name is its accuracy
    ({"task": "math", "rewards": {"random": 1.0}}, None),       # nobody looked
    ({"task": "preference", "rewards": {"accuracy": 1.0}}, None),   # judged, not checked
])
def test_right_has_one_meaning(scored, is_right):
    assert rewards.right(scored) is is_right


@pytest.mark.parametrize("row, answers, expected", [
    ({"task": "math"}, ["1/2", "0.5", "3", "\\frac{1}{2}", None, "3"], [0, 0, 2, 0, None, 2]),
    ({"task": "math"}, ["33.3", "\\frac{100}{3}"], [0, 1]),
    ({"task": "choice"}, ["(B)", "b", "C", "**B.**", "Aspirin"], [0, 0, 2, 0, 4]),
    ({"task": "choice", "choices": ["x", "y"]}, ["B. y", "B"], [0, 0]),
    ({"task": "match"}, ["knight, knave", "Knight,knave.", "knave"], [0, 0, 2]),
    ({"task": "countdown", "numbers": [3, 7, 8]},
     ["(3+7)*8", "8 × (7+3) = 80", "3+7", "3 + 7 ", "3*7*8", "7-3"], [0, 0, 2, 3, 4, 5]),
    ({"task": "code"}, ["print(1)", "print(1)"], [None, None]),
    ({"task": "preference"}, ["a", "a"], [None, None]),
])
def test_answers_that_the_grader_calls_equal_are_one_vote(row, answers, expected):
    assert rewards.votes(answers, row) == [None if i is None else answers[i] for i in expected]


def test_votes_end_in_time_and_then_go_by_spelling(monkeypatch):
    def slow(one, other, row):
        time.sleep(0.02)
        raise TimeoutError
    monkeypatch.setitem(rewards.SAME, "math", slow)
    monkeypatch.setattr(rewards, "VOTE_SECONDS", 0.1)
    start, answers = time.monotonic(), [str(n) for n in range(64)] * 2
    assert rewards.votes(answers, {"task": "math"}) == answers
    assert time.monotonic() - start < 2


# ---------------------------------------------------------------- rows

TASK = {"math": {"answer": "70"}, "match": {"answer": "knave"}, "preference": {},
        "choice": {"answer": "B", "choices": ["x", "y"]},
        "countdown": {"numbers": [3, 7, 8], "target": 80},
        "code": {"tests": [{"input": "", "output": "7"}], "seconds": 2, "starter": "x = 1\n",
                 "setup": None}}


@pytest.mark.parametrize("task, changes, said", [
    ("math", {"answer": None}, "'answer' is missing"),
    ("math", {"answer": ["70"]}, r"'answer' must be text or a number.*\['70'\]"),
    ("math", {"answer": True}, "'answer' must be text or a number"),
    ("math", {"answer": " "}, "the row's answer is empty"),
    ("math", {"answer": float("nan")}, "'answer' must be text"),
    ("match", {"answer": {"value": 3}}, "'answer' must be text"),
    ("choice", {"answer": "F"}, "one letter A-E"), ("choice", {"answer": 2}, "one letter A-E"),
    ("choice", {"choices": "x, y"}, "'choices' must be a list of texts"),
    ("countdown", {"numbers": None}, "'numbers' is missing"),
    ("countdown", {"target": "ten"}, "'target' must be"),
    ("countdown", {"numbers": "3 7 8"}, "'numbers' must be"),
    ("countdown", {"numbers": [3, 7.5]}, "'numbers' must be"),
    ("countdown", {"numbers": []}, "'numbers' must be"),
    ("countdown", {"target": True}, "'target' must be"),
    ("code", {"tests": '[{"input": "", "output": "7"}]'}, "'tests' must be a list"),
    ("code", {"tests": [{"input": "", "output": 7}]}, "'tests' must be a list"),
    ("code", {"tests": [{"input": ""}]}, "'tests' must be a list"),
    ("code", {"tests": []}, "needs 'tests'"),
    ("code", {"tests": [], "asserts": "assert f(1)"}, "'asserts' must be a list of texts"),
    ("code", {"seconds": "5"}, "'seconds' must be a number"),
    ("math", {"language": "klingon"}, "unknown language 'klingon'"),
    ("math", {"language": None}, "unknown language"),
    ("math", {"task": "chess"}, "unknown task 'chess'.*countdown"),
    ("math", {"task": ["math"]}, "unknown task"),
    ("math", {"prefill": 5}, "'prefill' must be text"),
])
def test_a_row_that_lacks_what_its_reward_reads_is_named_by_file_line_and_key(task, changes, said):
    good = {"prompt": "?", "task": task, **TASK[task]}
    assert rewards.checked("d.jsonl", [good, good], {"accuracy": 1.0}) == [good, good]
    with pytest.raises(ValueError, match="^d.jsonl:2: .*" + said):
        rewards.checked("d.jsonl", [good, {**good, **changes}], {"length": 1.0, "format": 0.2})


def test_only_what_the_chosen_rewards_read_is_demanded():
    row = {"prompt": "?", "task": "math"}
    assert rewards.checked("d.jsonl", [row], {"format": 1.0, "random": 1.0}) == [row]
    for weights in ({"accuracy": 0.0}, {"math": 1.0}, {"length": 1.0}):
        with pytest.raises(ValueError, match="d.jsonl:1: 'answer' is missing, .*'math' reads"):
            rewards.checked("d.jsonl", [row], weights)
    with pytest.raises(ValueError, match="d.jsonl:1: 'numbers' is missing"):
        rewards.checked("d.jsonl", [row], {"countdown": 1.0})
    with pytest.raises(ValueError, match="'ngram' must be a whole number above 0"):
        rewards.checked("d.jsonl", [{**row, "ngram": 0}], {"repetition": 1.0})


# ---------------------------------------------------------------- rewards of one's own

@pytest.fixture
def own(tmp_path):
    """own(text) -> path of a reward file that is in use; it is not afterwards."""
    def use(text, name="my.py"):
        (tmp_path / name).write_text(text)
        rewards.use_file(str(tmp_path / name))
        return str(tmp_path / name)
    yield use
    rewards.use_file("")


def test_a_function_of_a_file_is_a_reward_and_a_task(own, tmp_path, capsys):
    (tmp_path / "neighbour.py").write_text("bonus = 0.25\n")
    path = own("from neighbour import bonus\nfrom rewards import answer_of, format_reward\n"
               "def coin_reward(response, row):\n"
               "    return bonus + (answer_of(response, row) == row['side'])\n"
               "coin_reward.needs = ('side',)\n"
               "def coin_equal(one, other, row):\n    return one[0] == other[0]\n"
               "def _helper_reward(x):\n    return x\nbest_reward = 3.0\n")
    row = {"task": "coin", "side": "head", "prompt": "?"}
    total, parts = combined("<answer>head</answer>", row, {"coin": 2.0, "accuracy": 1.0})
    assert total == 3.75 and parts == {"coin": 1.25, "accuracy": 1.25}
    assert rewards.votes(["head", "h", "tail"], row) == ["head", "head", "tail"]
    rewards.prepare({"coin": 1.0}, {"coin"}, workers=0)
    with pytest.raises(ValueError, match="d.jsonl:1: 'side' is missing"):
        rewards.checked("d.jsonl", [{"task": "coin", "prompt": "?"}], {"accuracy": 1.0})
    rewards.REWARDS["coin"].needs = "side"                       # ("side") is a text, no tuple
    with pytest.raises(ValueError, match="d.jsonl:1: 'side' is missing"):
        rewards.checked("d.jsonl", [{"task": "coin", "prompt": "?"}], {"accuracy": 1.0})
    with pytest.raises(ValueError, match="unknown reward 'coinn'.*'coin'.*Known: .*coin"):
        rewards.check_names({"coinn": 1.0})
    assert capsys.readouterr().err == ""
    rewards.prepare({"accuracy": 1.0}, {"math"}, workers=0)
    told = f"warning: no reward or task asks for what {path} defines: coin\n"
    assert told in capsys.readouterr().err
    before = rewards.file_stamp()
    assert before["path"] == path and rewards.file_changed(before) is None
    assert rewards.file_changed(None).startswith("the reward_file of the checkpoint was none, now")
    Path(path).write_text("def dice_reward(response, row):\n    return 1.0\n")
    rewards.use_file(path)                                       # another file takes its place
    assert "coin" not in rewards.REWARDS and "coin" not in rewards.SAME
    assert rewards.REWARDS["dice"]("", {}) == 1.0
    assert f'{path} (sha256 {before["sha256"][:12]})' in rewards.file_changed(before)
    rewards.use_file("")
    assert "dice" not in rewards.REWARDS and "dice" not in rewards.ACCURACY
    assert rewards.file_stamp() == {"path": "", "sha256": ""}


@pytest.mark.parametrize("text, said", [
    ("import os\n\ndef x_reward(response, row):\n    return nothing +\n", "my.py:4: SyntaxError: "),
    ("import os\nimport nothing_here\n", "my.py:2: ModuleNotFoundError: No module named"),
    ("def f():\n    return 1 / 0\nf()\n", "my.py:2: ZeroDivisionError: "),
    ("import sys\nsys.exit(3)\n", "my.py:2: SystemExit: 3"),
    ("def math_reward(response, row):\n    pass\n", "my.py:1: math_reward: the name 'math' is"),
    ("\ndef accuracy_reward(response, row):\n    pass\n", "my.py:2: accuracy_reward: the name 'a"),
    ("def worker_reward(response, row):\n    pass\n", "the name 'worker' is taken"),
    ("def x_reward(response):\n    pass\n", r"my.py:1: x_reward must take \(response, row\)"),
    ("def reward(response, row):\n    pass\n", r"my.py: no function name_reward\(response, row\)"),
    ("from rewards import math_reward\n", "my.py: no function"), ("", "my.py: no function"),
])
def test_a_reward_file_with_a_mistake_is_a_line_with_its_place(own, text, said):
    with pytest.raises(ValueError, match=said):
        own(text)
    assert rewards.file_stamp() == {"path": "", "sha256": ""}
    with pytest.raises(ValueError, match="reward_file='nowhere.py': No such file"):
        rewards.use_file("nowhere.py")


def test_a_task_added_to_accuracy_is_a_reward_whenever_it_is_added(monkeypatch):
    monkeypatch.setitem(rewards.ACCURACY, "late", lambda response, row: 0.5)
    total, parts = combined("", {"task": "late"}, {"late": 1.0, "accuracy": 1.0})
    assert total == 1.0 and parts == {"late": 0.5, "accuracy": 0.5}
    rewards.prepare({"late": 1.0}, {"late"})


def test_the_first_failure_of_a_kind_is_kept_with_its_line(own, monkeypatch):
    monkeypatch.setattr(rewards, "FAILURES", type(rewards.FAILURES)())
    monkeypatch.setattr(rewards, "EXAMPLES", {})
    path = own("import sys\ndef bad_reward(response, row):\n    return row['tagret']\n"
               "def gone_reward(response, row):\n    sys.exit(1)\n")
    weights = {"bad": 1.0, "gone": 1.0, "format": 1.0}
    rewards.grade([("a", {"task": "match", "answer": "a"})] * 3, weights)
    assert rewards.told() == (f"bad: KeyError 3 times (KeyError: 'tagret' ({path}:3)), "
                              f"gone: SystemExit 3 times (SystemExit: 1 ({path}:5))")
    failed = rewards.failures(type(rewards.FAILURES)(), {"bad": 1.0, "format": 1.0})
    assert failed == {"bad": 3, "format": 0}
    rewards.require_working(failed, 4)
    with pytest.raises(ValueError, match=rf"'bad' failed on all of 3 sampl.*'tagret' \({path}:3"):
        rewards.require_working(failed, 3)
