"""math_reward: pairs written by hand, the real answers of MATH-500 and GSM8K, hostile input, threads and processes."""
import builtins
import json
import multiprocessing
import statistics
import threading
import time
from pathlib import Path

import pytest

import math_grader
import rewards
from math_grader import math_equal
from rewards import math_reward

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

SAME = [
    # numbers
    ("5", "5"), ("5", " 5 "), ("5", "5."), ("5", "05"), ("-5", "−5"), ("5", "+5"), ("5", "5.0"), ("0.4", ".4"),
    ("0", "-0"),
    ("1000", "1,000"), ("1000", "1{,}000"), ("1000", "1\\,000"), ("10,\\!080", "10080"),
    ("11,\\! 111,\\! 100", "11111100"),
    ("7425000", "7,425,000"), ("1000.99", "1,000.99"), ("1000", "1 000"), ("1000.99", "1000,99"), ("0,111", "0.111"),
    ("1200000", "1.2 \\times 10^6"), ("0.00005", "5\\cdot10^{-5}"), ("1.5e-7", "1.5 × 10⁻⁷"), ("32000", "3.2e4"),
    ("2^{99}", "633825300114114700748351602688"), ("4.5", "4\\frac{1}{2}"), ("5", "\\boxed{5}"),
    ("18", "#### 18"), ("18", "The answer is 18."), ("18", "$18$"), ("18", "\\(18\\)"), ("18", "\\[ 18 \\]"),
    ("3.50", "3.5"),
    # fractions
    ("\\frac{1}{2}", "1/2"), ("\\frac{1}{2}", "0.5"), ("\\frac{1}{2}", ".5"), ("\\frac12", "\\dfrac{1}{2}"),
    ("\\frac{1}{2}", "½"),
    ("\\frac{1}{2}", "\\tfrac12"), ("\\frac{1}{2}", "\\frac{2}{4}"), ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("\\frac 59", "5/9"),
    ("-\\frac{1}{2}", "\\frac{1}{-2}"), ("\\frac{270}7", "270 / 7"), ("\\frac9{19}", "9/19"),
    ("3/56", "\\frac{3}{56}"),
    ("\\dfrac{1}{29,\\!322,\\!216}", "1/29322216"), ("1\\frac{4}{5}", "9/5"), ("1\\frac{4}{5}", "1 4/5"),
    ("137 \\frac{1}{2}", "137.5"),
    ("-1\\frac12", "-1.5"), ("1½", "3/2"), ("0.\\overline{3}", "1/3"), ("0.1\\overline{6}", "\\frac{1}{6}"),
    ("\\frac{1}{12}", "0.083333333333"), ("1/3", "0.3333333333333333"), ("3:4", "3/4"), ("7:32", "7 : 32"),
    # percent, money, units, degrees
    ("28\\%", "28"), ("28", "28%"), ("28\\%", "28 percent"), ("28\\%", "0.28"), ("0.28", "28\\%"),
    ("28\\%", "28 pct"),
    ("\\$32,\\!348", "32348"), ("\\$18.90", "18.9"), ("18.90", "$18.90"), ("18", "\\$18"), ("18", "18 dollars"),
    ("$5", "5 dollars"),
    ("10", "10 weeks"), ("10", "10\\text{ cm}"), ("864 \\mbox{ inches}^2", "864"),
    ("864 \\mbox{ inches}^2", "864 square inches"),
    ("15\\mbox{ cm}^2", "15 cm²"), ("5.4 \\text{ cents}", "5.4"), ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}"),
    ("90^\\circ", "90"), ("90", "90°"), ("90^\\circ", "90 degrees"), ("90^{\\circ}", "\\frac{\\pi}{2}"),
    ("30^\\circ", "\\pi/6 radians"),
    ("125 miles", "125\\textnormal{ miles}"), ("5 m", "5 meters"), ("10 km", "10 kilometers"),
    ("5000000", "5 million"),
    ("3 hours", "3 hrs"), ("240\\text{ ways.}", "240"), ("20 \\text{ square units}", "20"), ("60", "60 km/h"),
    # roots, powers, constants
    ("11\\sqrt2", "11\\sqrt{2}"), ("\\sqrt{8}", "2\\sqrt2"), ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
    ("√3", "\\sqrt{3}"),
    ("3\\sqrt{13}", "\\sqrt{117}"), ("3\\sqrt{13}", "3*sqrt(13)"), ("\\sqrt[3]{8}", "2"), ("2", "\\sqrt{4}"),
    ("4^{3/2}", "8"),
    ("\\sqrt{2}+\\sqrt{5}", "\\sqrt5+\\sqrt2"), ("\\sqrt{5+2\\sqrt6}", "\\sqrt2+\\sqrt3"),
    ("\\frac{9}{4}\\pi", "9π/4"), ("\\pi", "pi"),
    ("\\frac{1+\\sqrt5}{2}", "0.5 + \\sqrt{1.25}"), ("288 \\pi", "288π"), ("18+2\\pi", "2(\\pi + 9)"),
    ("\\frac{20000}{\\pi}", "20000/\\pi"),
    ("2^{10}", "2^10"), ("2^{10}", "1024"), ("2^{2^3}", "256"), ("x^{-1}", "1/x"), ("5!", "120"),
    ("\\binom{5}{2}", "10"),
    ("6 - 5i", "-5i + 6"), ("i^2", "-1"), ("\\sqrt{-4}", "2i"), ("(1+i)^2", "2i"), ("e^{i\\pi}", "-1"),
    ("1 - \\frac{1}{\\mathrm{e}}", "1-1/e"),
    ("\\log_2 8", "3"), ("\\ln e^2", "2"), ("\\log_{10} 1000", "3"), ("\\sin 30^\\circ", "1/2"),
    ("\\cos(\\pi/3)", "\\frac12"),
    ("\\sin^2 x + \\cos^2 x", "1"), ("\\tan^2(y)+1", "\\sec^2(y)"), ("\\cot x", "\\frac{\\cos x}{\\sin x}"),
    ("|-3|", "3"),
    ("2 \\sin b \\cos a", "\\sin(a+b) - \\sin(a-b)"), ("\\sin^{-1}(1)", "\\frac{\\pi}{2}"),
    ("\\lfloor 3.7 \\rfloor", "3"), ("\\infty", "∞"),
    ("\\lceil \\sqrt{4} \\rceil", "2"), ("\\arctan 1", "\\pi/4"), ("\\frac{\\ln 9}{\\ln 3}", "2"),
    ("\\exp(2)", "e^2"), ("2^{-99}", "0.5^{99}"),
    # expressions
    ("p - q", "-q+p"), ("(x+1)^2", "x^2+2x+1"), ("(a+5)(b+2)", "(b+2)(a+5)"), ("(a+5)(b+2)", "ab + 2a + 5b + 10"),
    ("3R^2", "3*R**2"),
    ("6r^2-4r-24", "2(3r^2-2r-12)"), ("\\frac{x+2}{7}", "\\frac{x}{7}+\\frac{2}{7}"), ("x^{5}", "x·x⁴"),
    ("5r^5", "5 r^{5}"),
    ("\\frac{11+9a}{20}", "0.45a + 0.55"), ("\\sqrt{x^2}", "|x|"),
    ("\\frac{1}{3\\sqrt[3]{x}^2}", "\\frac{1}{3x^{2/3}}"),
    ("x_1 + x_2", "x_{2}+x_{1}"), ("\\alpha\\beta", "\\beta \\alpha"), ("2\\ln x", "\\ln x^2"),
    ("\\frac{x^2-1}{x-1}", "x+1"), ("f(x)", "f(x)"),
    ("x^8 + x^7 + x + 1", "1+x+x^7+x^8"), ("\\sqrt{ab}", "\\sqrt{a}\\sqrt{b}"),
    ("\\log(x-9)", "-\\log\\frac{1}{x-9}"), ("-x", "- x"),
    # equations
    ("x=5", "5"), ("5", "x = 5"), ("5", "5 = x"), ("x=5", "x = 5.0"), ("y = 2x + 3", "y=3+2x"),
    ("y = 2x + 3", "2x + 3"), ("7", "3+4=7"),
    ("y = 2x + 3", "2x - y + 3 = 0"), ("5x - 7y + 11z + 4 = 0", "-5x+7y-11z=4"),
    ("x^2/4 + y^2/3 = 1", "3x^2+4y^2=12"), ("f(x)=1", "1"),
    ("1/3", "x = \\frac13 \\approx 0.333"), ("11", "x \\approx 11"), ("|AB|=1", "1"), ("V_{1}:V_{2}=11:21", "11:21"),
    ("\\frac{NO}{BO}=\\frac{1}{\\sqrt{6}}", "\\frac{1}{\\sqrt{6}}"), ("(p,q)=(3,2)", "(3,2)"),
    ("\\angle ABC = 30^\\circ", "30"),
    # lists and sets
    ("1,-2", "-2, 1"), ("3, 5, 7", "3,5,7"), ("3, 5, 7", "\\{3, 5, 7\\}"), ("6 \\text{ and } 8", "6,8"),
    ("19, 46, and 82", "19, 46, \\text{ and } 82"),
    ("21,16 or 11", "11, 16, 21"), ("\\{1\\pm\\sqrt{5},-2\\}", "\\{-2, 1-\\sqrt5, 1+\\sqrt5\\}"),
    ("1 \\pm \\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}"),
    ("\\pm 2021", "-2021, 2021"), ("x=1, x=2", "1, 2"), ("x = 1 \\text{ or } x = 2", "x=2 or x=1"),
    ("n=1,2,3", "1,2,3"), ("\\emptyset", "\\{\\}"),
    ("x=3, y=4", "y=4, x=3"), ("x=3, y=4", "3, 4"), ("(3,4)", "x=3, y=4"), ("-12;-11;-10", "\\{-12, -11, -10\\}"),
    ("\\{5\\}", "5"),
    ("p=5,q=2;p=7,q=2", "(7,2),(5,2)"), ("(11,7)or(7,11)", "(7,11),\\ (11,7)"), ("100,200,300", "100, 200, 300"),
    ("{1,2,3}", "1,2,3"),
    ("(1,2),(3,4)", "(3,4), (1,2), (1,2)"), ("\\{1,1,2\\}", "\\{1,2\\}"),
    ("x = \\frac{-1 \\pm \\sqrt{13}}{4}", "\\frac{-1-\\sqrt{13}}{4}, \\frac{\\sqrt{13}-1}{4}"),
    ("a_3 = 2, a_{37} = 19", "a_{37} = 19, \\quad a_3 = 2"), ("W(n) = 1 \\text{ and } W(n) = -1", "W(x)=1orW(x)=-1"),
    # tuples, intervals, inequalities
    ("(3,4)", "(3, 4)"), ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, π/2)"), ("(1,\\frac{9}{2})", "(1, 4.5)"),
    ("(0;0;1)", "(0,0,1)"),
    ("[0,1)", "\\left[0,1\\right)"), ("(2,\\infty)", "(2, +\\infty)"), ("x \\in [-2,7]", "[-2,7]"),
    ("[-2,7]", "-2 \\le x \\le 7"),
    ("(2,\\infty)", "x > 2"), ("(-\\infty, 0]", "x \\leq 0"), ("x \\geq 5", "5 \\leq x"), ("x < 1", "-x > -1"),
    ("2x < 4", "x < 2"),
    ("(0,9) \\cup (9,36)", "(9,36)\\cup(0,9)"), ("(-\\infty, 2) \\cup (3, \\infty)", "x < 2 \\text{ or } x > 3"),
    ("0<f(x)<1", "(0,1)"),
    ("x \\neq 3", "x != 3"), ("\\mathbb{R}", "(-\\infty,\\infty)"), ("\\{-1\\} \\cup [0,7)", "[0,7) \\cup \\{-1\\}"),
    ("7 \\ge x \\ge -2", "[-2,7]"),
    ("\\left(\\frac{3}{5},\\frac{8}{3}\\right]", "(0.6, 8/3]"), ("(1,000, 2)", "(1000, 2)"),
    # matrices
    ("\\begin{pmatrix} 1 & 0 \\\\ 0 & 1 \\end{pmatrix}", "\\begin{bmatrix}1&0\\\\0&1\\end{bmatrix}"),

    ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}",
     "\\begin{pmatrix} -\\frac{1}{3} \\\\ \\frac{2}{3} \\\\ \\end{pmatrix}"),

    ("\\begin{pmatrix}1 & 2 \\\\3 & 4\\end{pmatrix}", "\\left[\\begin{array}{cc}1 & 2 \\\\3 & 4\\end{array}\\right]"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "(1,2)"), ("\\langle 1, 2 \\rangle", "(1,2)"),
    # words and letters
    ("\\text{Evelyn}", "Evelyn"), ("\\text{even}", "Even"), ("\\text{(C)}", "C"), ("\\text{(C)}", "(C)"),
    ("\\textbf{(E)}", "E"),
    ("\\text{two lines}", "two  lines."), ("\\text{Softball, Kickball}", "kickball and softball"),
    ("4:30\\text{ p.m.}", "4:30 p.m."),
    ("52_8", "52_{8}"), ("52_8", "52"), ("\\text{odd}", "odd"),
    ("F_n = \\sum_{k=0}^{n-1} F_k", "F_n = \\sum_{k=0}^{n-1} F_k"),
]

DIFFERENT = [
    # one digit, one sign, one place
    ("5", "6"), ("5", "-5"), ("5", "50"), ("5", "0.5"), ("12", "21"), ("1000", "1,00"), ("1000", "1, 000"),
    ("1/2", "1/3"), ("1/2", "2"),
    ("1/2", "-1/2"), ("1\\frac12", "1/2"), ("3/2", "1 1/3"), ("2.5", "2.05"), ("32349", "32, 349"),
    ("12.345", "12,345"), ("123", "1 2 3"),
    # tiny differences
    ("2^{-99}", "2^{-98}"), ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}"), ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("\\frac{1}{2004!}", "0"),
    ("10^{-300}", "0"), ("10^{-300}", "10^{-301}"), ("e^{-1000}", "e^{-1001}"), ("e^{-1000}", "0"),
    ("2^{10000}", "2^{10000}+1"),
    ("\\sqrt{2}", "\\sqrt{2}+10^{-60}"), ("\\sqrt{2}", "\\sqrt{2}+10^{-500}"),
    ("\\sqrt{2}", "1.4142135623730950488016887242096980785696718753769480"),
    ("\\pi", "3.14159"), ("\\pi", "\\frac{355}{113}"), ("\\pi", "22/7"), ("1/3", "0.333"), ("1/3", "0.333333"),
    ("1/3", "0.3333333334"),
    ("e^{\\pi\\sqrt{163}}", "262537412640768744"), ("0.1", "0.1000000001"), ("3", "2.9999999999"),
    ("1", "0.99999999999999999999"),
    ("x", "x+10^{-40}"), ("x^2", "x^2 + 10^{-90}x"), ("\\sin x", "x - x^3/6 + x^5/120 - x^7/5040"),
    ("1/5120", "1/28800"),
    ("\\sin(10^{-30})", "10^{-30}"), ("100000000000000000000", "100000000000000000001"),
    ("\\sqrt{10^{40}+1}", "10^{20}"),
    # units, percent
    ("5 cents", "5 dollars"), ("5 cm", "5 m"), ("\\$10", "10 cents"), ("15 cm^2", "15 cm^3"), ("28\\%", "2.8"),
    ("90^\\circ", "9"), ("5", "5 million"),
    ("10", "10 or 11 weeks"), ("18", "18 dollars and 5 cents"), ("5", "5 not 6"), ("3 hours", "3 minutes"),
    ("5", "5 dozen"), ("2", "2x"), ("2", "2ab"),
    # expressions
    ("x+1", "x+2"), ("x+1", "t+1"), ("x^2", "x^3"), ("xy", "xz"), ("f(x)", "f(y)"), ("\\sqrt{x^2}", "x"),
    ("\\frac{1}{x}", "\\frac{1}{x^2}"),
    ("e^{x}", "e^{2x}"), ("\\sin x", "\\cos x"), ("2-2p", "2p-2"), ("\\ln x", "\\log_{10} x"), ("x", "X"),
    ("a^2+b^2", "(a+b)^2"), ("3\\sqrt{2}", "2\\sqrt{3}"),
    ("6-5i", "6+5i"), ("4", "4\\sqrt{2}"), ("1\\sqrt{19}", "1"), ("x", "1"), ("0", "x"),
    ("\\sqrt{2}", "\\pm\\sqrt{2}"), ("4", "\\frac{34}{16}+\\frac{\\sqrt{1358}}{16}"),
    # equations
    ("x=5", "x=6"), ("x=5", "y=5"), ("x=5", "x=x"), ("y=2x+3", "y=2x-3"), ("y=2x+3", "2x+4"), ("a+3z=0", "0"),
    ("2x+z=1", "1"), ("7=11a+c", "11a+c"),
    ("5", "x = 5 = 6"), ("5", "2x = 5"), ("y=x", "y^2=xy"), ("x+y=1", "0=0"), ("x=5", "0=0"), ("1", "7=8"),
    ("8", "7=8"), ("x^2=4", "4"), ("5", "6 \\approx 5"),
    # lists, sets, tuples, intervals
    ("1,-2", "1,2"), ("1,2", "1"), ("1", "1,2"), ("1,2", "1,2,3"), ("1728", "1331 and 1728"), ("1,2,2", "1,1,2"),
    ("\\{1,2\\}", "(1,2)"), ("(1,2)", "\\{1,2\\}"),
    ("(1,2)", "(2,1)"), ("(1,2)", "1,2"), ("(1,2)", "[1,2]"), ("[0,1)", "(0,1]"), ("[0,9)", "[0,1)"),
    ("(2,\\infty)", "[2,\\infty)"), ("(1,2)", "(1,2,3)"), ("12", "1,2"),
    ("x > 5", "x < 5"), ("x \\geq 5", "x > 5"), ("x > 5", "y > 5"), ("x < 1", "x > -1"), ("2x < 4", "x < 4"),
    ("(-\\infty,2)", "2x<2"), ("x<1", "1"), ("[-2,7]", "-2 < x < 7"),
    ("(0,9) \\cup (9,36)", "(0,36)"), ("x=3, y=4", "x=4, y=3"), ("x=3, y=4", "4, 3"), ("(3,4)", "x=4, y=3"),
    ("\\pm 2021", "2021"), ("1 \\pm \\sqrt{19}", "1 + \\sqrt{19}"),
    ("(37,3,3),(17,3)", "(37,3,3,13),(17,3)"), ("\\emptyset", "0"), ("\\emptyset", "\\{0\\}"), ("x \\neq 3", "3"),
    ("12:00", "1:00"), ("(1,2),(3,4)", "(1,2),(4,3)"),
    ("x<2 or x>3", "2<x<3"), ("\\mathbb{R}", "0"), ("(-6, 10)", "[-6, 10]"), ("D=(0,1)", "D=(0,1.5)"),
    # matrices
    ("\\begin{pmatrix}1 & 2 \\\\3 & 4\\end{pmatrix}", "\\begin{pmatrix}1 & 2 \\\\3 & 5\\end{pmatrix}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "(2,1)"),
    ("\\begin{pmatrix}1 & 2 \\\\3 & 4\\end{pmatrix}", "(1,2,3,4)"),
    ("\\begin{pmatrix}1 & 2\\end{pmatrix}", "\\begin{pmatrix}1 \\\\ 2\\end{pmatrix}"),
    # words
    ("\\text{Evelyn}", "Briana"), ("\\text{even}", "odd"), ("\\text{(C)}", "B"), ("\\text{(C)}", "C, D"),
    ("\\text{(C)}", "A B C D"), ("5", "five apples"), ("52_8", "53"), ("52_8", "52_9"), ("42", "52_8"),
    ("5", ""), ("5", "?"), ("5", "\\frac{5}{0}"), ("5", "\\frac{0}{0}"), ("0", "1/\\infty"), ("1/0", "2/0"),
    ("5", "the number of apples"), ("\\infty", "-\\infty"), ("5", "5, 5, 6"),
    ("F_n = \\sum_{k=0}^{n-1} F_k", "F_n = \\sum_{k=0}^{n-2} F_k"), ("5", "5 5"), ("55", "5 5"),
    ("\\tan 90^\\circ", "1/0"), ("5", "\u200b"), ("10", "1\u200b1"),
]

HOSTILE = [
    "9**9**9**9", "9^{9^{9^{9}}}", "9!!!!!!!!", "(((9!)!)!)!", "10^{10^{10}}", "2^{300000}", "\\binom{10^9}{10^8}",
    "4000!*3999!", "*".join(["(2^{60000}+1)"] * 60), "+".join(f"1/(2^{{60000}}+{i})" for i in range(50)),
    "((x+1)^{500}+1)^{500}", "(x+y+z)^{200000}", "\\sqrt{x}^{99999}", "1e9999", "1e999999999", "(1e4999)^{4999}",
    "1" * 990, "1." * 490, "1_" * 490, "(" * 495 + ")" * 495, "(" * 490 + "1" + ")" * 490, "{" * 990, "√" * 990,
    "\\frac" * 198, "\\frac{1}{" * 90 + "x" + "}" * 90, "-" * 990 + "1", "2" + "!" * 990, "x" + "^x" * 490,
    "x" + "^{x" * 240 + "}" * 240, "|" * 990, "|x" * 490, "sin " * 240 + "x", "\\sin(" * 140 + "x" + ")" * 140,
    "e^{e^{e^{e^{e}}}}", "e^{10^9}", "\\sin(10^{9999})", "\\ln(10^{4999})", "\\sqrt{10^{4999}+1}",
    "\\arctan(" * 20 + "10^{4999}" + ")" * 20, "+".join(f"\\sqrt{{{i}}}" for i in range(2, 110)), "1/0", "0^0", "∞-∞",
    "0*∞", "*".join(f"\\sin({i})" for i in range(100)), "+".join(f"\\ln(10^{{1200}}+{i})" for i in range(2, 60)),
    "i^i^i^i^i^i", "1,2" * 330, "1," * 490 + "1", "(1,2)," * 160 + "(3,4)", "\\{" * 330 + "\\}" * 330, "1&" * 490,
    "∪" * 990, "(1,2)∪" * 160 + "(3,4)", "x=" * 490 + "1", "x<" * 490 + "1", "1 \\pm " * 140 + "2", "a" * 990,
    "ab " * 330, "1 ab " * 190, "1" + " " * 980 + "a", "1 000" * 190, "1 " * 490 + "/ 3", "\\text{" * 160 + "}" * 160,
    "0." + "3" * 450 + "\\overline{" + "3" * 450 + "}", "%" * 990, "=" * 990, "≈" * 990, "\u0301" * 990, "½" * 990,
    "²" * 990, "\x00", "\\" * 990, "x" * 10 ** 6, "(" * 10 ** 6, "$" * 10 ** 6,
]


@pytest.mark.parametrize("gold, answer", SAME)
def test_the_same(gold, answer):
    assert math_equal(gold, answer)
    assert math_equal(gold, f" {gold} .") and math_equal(gold, f"${answer}$")
    if not answer.startswith("52"):  # 52 for 52_8 is right, 52_8 for 52 is wrong
        assert math_equal(answer, gold)


@pytest.mark.parametrize("gold, answer", DIFFERENT)
def test_different(gold, answer):
    assert not math_equal(gold, answer)
    assert answer == "" or not math_equal(answer, gold)


def test_math_reward():
    row = {"answer": "\\frac{1}{2}", "prefill": "<think>"}
    assert math_reward("half</think>So it is $\\boxed{0.5}$.", row) == 1
    assert math_reward("half</think><answer>1/2</answer>", row) == 1
    assert math_reward("half</think><answer>1/3</answer>", row) == 0
    assert math_reward("half</think>It is 1/2.", row) == 0
    assert math_reward("\\boxed{5}", {"answer": 5}) == 1
    with pytest.raises(ValueError, match="empty"):
        math_reward("\\boxed{5}", {"answer": " "})


# ---------------------------------------------------------------- real answers

def rows(path):
    if not (SHARED / path).exists():
        pytest.skip("needs the shared data")
    return [json.loads(line) for line in (SHARED / path).read_text().splitlines()]


def test_math500_paraphrases_and_neighbours():
    golds = [r["answer"] for r in rows("data/math500/test.jsonl")]
    assert len(golds) == 500
    for gold in golds:
        for paraphrase in (f"${gold}$", f"\\( {gold} \\).", gold.replace("\\frac", "\\dfrac"), gold.replace(" ", "  "),
                           gold.replace("\\left", "").replace("\\right", ""), gold.replace("\\!", ""),
                           f"\\boxed{{{gold}}}"):
            assert math_reward(f"\\boxed{{{paraphrase}}}", {"answer": gold}) == 1, (gold, paraphrase)
        digit = next((i for i, c in enumerate(gold) if c.isdigit()), None)
        if digit is not None:
            changed = gold[:digit] + str((int(gold[digit]) + 1) % 10) + gold[digit + 1:]
            assert math_reward(f"\\boxed{{{changed}}}", {"answer": gold}) == 0, (gold, changed)


def test_math500_different_answers_differ():
    golds = list(dict.fromkeys(r["answer"] for r in rows("data/math500/test.jsonl")))[:110]
    same = {(a, b) for i, a in enumerate(golds) for b in golds[:i] if math_equal(a, b)}
    assert same == {("x=5", "5"), ("120", "120^\\circ")}


def test_gsm8k_paraphrases_and_neighbours():
    for row in rows("data/gsm8k/test.jsonl")[:400]:
        gold = row["answer"].split("####")[1].strip()
        n = int(gold.replace(",", ""))
        for right in (n, f"{n:,}", f"\\${n}", f"${n:,}", f"{n}.00", f"{n} dollars", f"{n}\\text{{ apples}}", f"x = {n}",
                      f"#### {n}", f"The answer is {n}.", f"{2 * n}/2", f"{n} \\text{{ cm}}^2"):
            assert math_reward(f"<answer>{right}</answer>", {"answer": gold}) == 1, (gold, right)
        for wrong in (n + 1, -n - 1, 10 * n + 1, f"{n}.5", f"{n} or {n + 1}", f"{n}, {n + 2}", f"{n} and {n + 1}",
                      f"{n}1", f"not {n}"):
            assert math_reward(f"<answer>{wrong}</answer>", {"answer": gold}) == 0, (gold, wrong)


# ---------------------------------------------------------------- bounds and safety

@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20].encode("ascii", "replace").decode())
def test_hostile_input_is_bounded(text):
    math_equal("1/3", "\\sqrt{2}")  # the import of sympy is not what is timed
    for gold, answer in (("5", text), (text, text + "*1"), ("x^2+1", text), ("\\sqrt{2}", text), ("1,2", text)):
        start = time.perf_counter()
        math_equal(gold, answer)
        assert time.perf_counter() - start < 2


def test_the_usual_answer_takes_less_than_2_ms():
    pairs = SAME * 2
    math_equal("1/3", "\\sqrt{2}")
    times = []
    for gold, answer in pairs:
        start = time.perf_counter()
        math_equal(gold, answer)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 2e-3


def test_model_text_is_never_evaluated(monkeypatch, tmp_path):
    from sympy.parsing import sympy_parser
    math_equal("1/3", "\\sqrt{2}")
    def refuse(*args, **kwargs):
        raise AssertionError("evaluated")
    monkeypatch.setattr(sympy_parser, "parse_expr", refuse)
    monkeypatch.setattr(sympy_parser, "eval_expr", refuse)
    monkeypatch.setattr(builtins, "eval", refuse)
    for gold, answer in SAME:
        assert math_equal(gold, answer)
    target = tmp_path / "hacked"
    for attack in (f"__import__('pathlib').Path('{target}').touch()", f"open('{target}','w')",
                   f"exec(\"open('{target}','w')\")"):
        assert not math_equal("5", attack)
        assert math_reward(f"\\boxed{{{attack}}}", {"answer": "5"}) == 0
    assert not target.exists()


def test_a_timeout_scores_zero_and_is_counted(monkeypatch):
    monkeypatch.setattr(math_grader, "SECONDS", 0.0)
    before = rewards.FAILURES["math", "TimeoutError"]
    assert math_reward("\\boxed{\\frac{2}{4}}", {"answer": "1/2"}) == 0
    assert rewards.FAILURES["math", "TimeoutError"] == before + 1


def grade_all():
    return [math_equal(*pair) for pair in SAME] == [True] * len(SAME) and \
        [math_equal(*pair) for pair in DIFFERENT] == [False] * len(DIFFERENT)


def test_threads():
    """Each at its own precision at the same time."""
    results = []
    threads = [threading.Thread(target=lambda: results.append(grade_all())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(method):
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(grade_all).get(timeout=60)


@pytest.mark.slow
def test_not_below_math_verify():
    """The same pairs in \\boxed{} through Math-Verify."""
    math_verify = pytest.importorskip("math_verify")
    def theirs(gold, answer):
        return math_verify.verify(math_verify.parse(f"\\boxed{{{gold}}}"), math_verify.parse(f"\\boxed{{{answer}}}"))
    right = sum(theirs(*pair) for pair in SAME) + sum(not theirs(*pair) for pair in DIFFERENT)
    assert right < len(SAME) + len(DIFFERENT)  # 328 of 406 with Math-Verify 0.9; here all, by the tests above
