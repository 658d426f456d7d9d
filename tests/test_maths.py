"""math_reward: pairs written by hand, the real answers of MATH-500 and GSM8K, hostile input,
threads and processes."""
import builtins
import json
import multiprocessing
import re
import statistics
import threading
import time
from pathlib import Path

import pytest

import rewards
from graders import maths
from graders.maths import math_equal
from rewards import math_reward

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def lines(text, cells=2):
    """'gold | answer', one a line -> tuples of texts; lines that begin with '# ' are headings"""
    rows = [line for line in text.strip('\n').split('\n') if not line.startswith('# ')]
    return [tuple(cell.strip() for cell in row.split(' | ', cells - 1)) for row in rows]


# ---------------------------------------------------------------- pairs that say the same, or not

SAME = lines(r'''
# numbers
5 | 5
5 | 5.
5 | 05
-5 | −5
5 | +5
5 | 5.0
0.4 | .4
0 | -0
1000 | 1,000
1000 | 1{,}000
1000 | 1\,000
10,\!080 | 10080
11,\! 111,\! 100 | 11111100
7425000 | 7,425,000
1000.99 | 1,000.99
1000 | 1 000
0,111 | 0.111
1200000 | 1.2 \times 10^6
0.00005 | 5\cdot10^{-5}
1.5e-7 | 1.5 × 10⁻⁷
32000 | 3.2e4
2^{99} | 633825300114114700748351602688
4.5 | 4\frac{1}{2}
5 | \boxed{5}
18 | #### 18
18 | The answer is 18.
18 | $18$
18 | \(18\)
18 | \[ 18 \]
3.50 | 3.5
# fractions
\frac{1}{2} | 1/2
\frac{1}{2} | 0.5
\frac{1}{2} | .5
\frac12 | \dfrac{1}{2}
\frac{1}{2} | ½
\frac{1}{2} | \tfrac12
\frac{1}{2} | \frac{2}{4}
-\frac{1}{2} | \frac{-1}{2}
\frac 59 | 5/9
-\frac{1}{2} | \frac{1}{-2}
\frac{270}7 | 270 / 7
\frac9{19} | 9/19
3/56 | \frac{3}{56}
\dfrac{1}{29,\!322,\!216} | 1/29322216
1\frac{4}{5} | 9/5
1\frac{4}{5} | 1 4/5
137 \frac{1}{2} | 137.5
-1\frac12 | -1.5
1½ | 3/2
0.\overline{3} | 1/3
0.1\overline{6} | \frac{1}{6}
\frac{1}{12} | 0.083333333333
1/3 | 0.3333333333333333
3:4 | 3/4
7:32 | 7 : 32
# percent, money, units, degrees
28\% | 28
28 | 28%
28\% | 28 percent
28\% | 0.28
0.28 | 28\%
28\% | 28 pct
\$32,\!348 | 32348
\$18.90 | 18.9
18.90 | $18.90
18 | \$18
18 | 18 dollars
$5 | 5 dollars
10 | 10 weeks
10 | 10\text{ cm}
864 \mbox{ inches}^2 | 864
864 \mbox{ inches}^2 | 864 square inches
15\mbox{ cm}^2 | 15 cm²
5.4 \text{ cents} | 5.4
\frac{270}7\text{ degrees} | \frac{270}{7}
90^\circ | 90
90 | 90°
90^\circ | 90 degrees
90^{\circ} | \frac{\pi}{2}
30^\circ | \pi/6 radians
125 miles | 125\textnormal{ miles}
5 m | 5 meters
10 km | 10 kilometers
5000000 | 5 million
9 | 9 years old
20 | USD 20
20 | ₹20
20 rupees | Rs. 20
20 | 20 ₹
-5 euros | -EUR 5
10 | 10 J
10 joules | 10 J
9 years | 9 years old
05:00 | 5:00
10:15 | 2:3
7:32 | 7/32
3:30 | 3:30 pm
3 hours | 3 hrs
240\text{ ways.} | 240
20 \text{ square units} | 20
60 | 60 km/h
# roots, powers, constants
11\sqrt2 | 11\sqrt{2}
\sqrt{8} | 2\sqrt2
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}}
√3 | \sqrt{3}
3\sqrt{13} | \sqrt{117}
3\sqrt{13} | 3*sqrt(13)
\sqrt[3]{8} | 2
2 | \sqrt{4}
4^{3/2} | 8
\sqrt{2}+\sqrt{5} | \sqrt5+\sqrt2
\sqrt{5+2\sqrt6} | \sqrt2+\sqrt3
\frac{9}{4}\pi | 9π/4
\pi | pi
\frac{1+\sqrt5}{2} | 0.5 + \sqrt{1.25}
288 \pi | 288π
18+2\pi | 2(\pi + 9)
\frac{20000}{\pi} | 20000/\pi
2^{10} | 2^10
2^{10} | 1024
2^{2^3} | 256
x^{-1} | 1/x
5! | 120
\binom{5}{2} | 10
6 - 5i | -5i + 6
i^2 | -1
\sqrt{-4} | 2i
(1+i)^2 | 2i
e^{i\pi} | -1
1 - \frac{1}{\mathrm{e}} | 1-1/e
\log_2 8 | 3
\ln e^2 | 2
\log_{10} 1000 | 3
\sin 30^\circ | 1/2
\cos(\pi/3) | \frac12
\sin^2 x + \cos^2 x | 1
\tan^2(y)+1 | \sec^2(y)
\cot x | \frac{\cos x}{\sin x}
|-3| | 3
2 \sin b \cos a | \sin(a+b) - \sin(a-b)
\sin^{-1}(1) | \frac{\pi}{2}
\lfloor 3.7 \rfloor | 3
\infty | ∞
\lceil \sqrt{4} \rceil | 2
\arctan 1 | \pi/4
\frac{\ln 9}{\ln 3} | 2
\exp(2) | e^2
2^{-99} | 0.5^{99}
# expressions
p - q | -q+p
(x+1)^2 | x^2+2x+1
(a+5)(b+2) | (b+2)(a+5)
(a+5)(b+2) | ab + 2a + 5b + 10
3R^2 | 3*R**2
6r^2-4r-24 | 2(3r^2-2r-12)
\frac{x+2}{7} | \frac{x}{7}+\frac{2}{7}
x^{5} | x·x⁴
5r^5 | 5 r^{5}
\frac{11+9a}{20} | 0.45a + 0.55
\sqrt{x^2} | |x|
\frac{1}{3\sqrt[3]{x}^2} | \frac{1}{3x^{2/3}}
x_1 + x_2 | x_{2}+x_{1}
\alpha\beta | \beta \alpha
2\ln x | \ln x^2
\frac{x^2-1}{x-1} | x+1
f(x) | f(x)
x^8 + x^7 + x + 1 | 1+x+x^7+x^8
\sqrt{ab} | \sqrt{a}\sqrt{b}
\log(x-9) | -\log\frac{1}{x-9}
-x | - x
# equations
x=5 | 5
5 | x = 5
5 | 5 = x
x=5 | x = 5.0
y = 2x + 3 | y=3+2x
y = 2x + 3 | 2x + 3
7 | 3+4=7
y = 2x + 3 | 2x - y + 3 = 0
5x - 7y + 11z + 4 = 0 | -5x+7y-11z=4
x^2/4 + y^2/3 = 1 | 3x^2+4y^2=12
f(x)=1 | 1
1/3 | x = \frac13 \approx 0.333
11 | x \approx 11
|AB|=1 | 1
V_{1}:V_{2}=11:21 | 11:21
\frac{NO}{BO}=\frac{1}{\sqrt{6}} | \frac{1}{\sqrt{6}}
(p,q)=(3,2) | (3,2)
\angle ABC = 30^\circ | 30
# lists and sets
1,-2 | -2, 1
3, 5, 7 | 3,5,7
3, 5, 7 | \{3, 5, 7\}
6 \text{ and } 8 | 6,8
19, 46, and 82 | 19, 46, \text{ and } 82
21,16 or 11 | 11, 16, 21
\{1\pm\sqrt{5},-2\} | \{-2, 1-\sqrt5, 1+\sqrt5\}
1 \pm \sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}
\pm 2021 | -2021, 2021
x=1, x=2 | 1, 2
x = 1 \text{ or } x = 2 | x=2 or x=1
n=1,2,3 | 1,2,3
\emptyset | \{\}
x=3, y=4 | y=4, x=3
x=3, y=4 | 3, 4
(3,4) | x=3, y=4
-12;-11;-10 | \{-12, -11, -10\}
\{5\} | 5
(2,3) | y=3, x=2
(5,\pi) | r=5, \theta=\pi
(2,19) | a_{37}=19, a_3=2
(2,3) | m=2,n=3
2,3 | b=3, a=2
p=5,q=2;p=7,q=2 | (7,2),(5,2)
(11,7)or(7,11) | (7,11),\ (11,7)
100,200,300 | 100, 200, 300
{1,2,3} | 1,2,3
(1,2),(3,4) | (3,4), (1,2), (1,2)
\{1,1,2\} | \{1,2\}
x = \frac{-1 \pm \sqrt{13}}{4} | \frac{-1-\sqrt{13}}{4}, \frac{\sqrt{13}-1}{4}
a_3 = 2, a_{37} = 19 | a_{37} = 19, \quad a_3 = 2
W(n) = 1 \text{ and } W(n) = -1 | W(x)=1orW(x)=-1
# tuples, intervals, inequalities
(3,4) | (3, 4)
\left( 3, \frac{\pi}{2} \right) | (3, π/2)
(1,\frac{9}{2}) | (1, 4.5)
(0;0;1) | (0,0,1)
[0,1) | \left[0,1\right)
(2,\infty) | (2, +\infty)
x \in [-2,7] | [-2,7]
[-2,7] | -2 \le x \le 7
(2,\infty) | x > 2
(-\infty, 0] | x \leq 0
x \geq 5 | 5 \leq x
x < 1 | -x > -1
2x < 4 | x < 2
(0,9) \cup (9,36) | (9,36)\cup(0,9)
(-\infty, 2) \cup (3, \infty) | x < 2 \text{ or } x > 3
0<f(x)<1 | (0,1)
x \neq 3 | x != 3
\mathbb{R} | (-\infty,\infty)
\{-1\} \cup [0,7) | [0,7) \cup \{-1\}
7 \ge x \ge -2 | [-2,7]
\left(\frac{3}{5},\frac{8}{3}\right] | (0.6, 8/3]
(1,000, 2) | (1000, 2)
# matrices
\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix} | \begin{bmatrix}1&0\\0&1\end{bmatrix}
\begin{pmatrix}1 & 2 \\3 & 4\end{pmatrix} | \left[\begin{array}{cc}1 & 2 \\3 & 4\end{array}\right]
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | (1,2)
\langle 1, 2 \rangle | (1,2)
# words and letters
\text{Evelyn} | Evelyn
\text{even} | Even
\text{(C)} | C
\text{(C)} | (C)
\textbf{(E)} | E
\text{two lines} | two  lines.
\text{Softball, Kickball} | kickball and softball
4:30\text{ p.m.} | 4:30 p.m.
52_8 | 52_{8}
52_8 | 52
\text{odd} | odd
F_n = \sum_{k=0}^{n-1} F_k | F_n = \sum_{k=0}^{n-1} F_k
# sums and products of matrices, |x|, numbers left out, ratios, n!, number words, letter and value
1 \leq |z| \leq \frac{3}{2} | [-\frac{3}{2}, -1] \cup [1, \frac{3}{2}]
0<|x-2|<1 | (1,2)\cup(2,3)
5 | \text{five}
(-\infty,-1)\cup(1,\infty) | |x|>1
(-1,1) | |x|<1
\mathbb{R}\setminus\{0\} | (-\infty,0)\cup(0,\infty)
\begin{pmatrix}2&4\\6&8\end{pmatrix} | 2\begin{pmatrix}1&2\\3&4\end{pmatrix}
B | \textbf{(B)}
B | \textbf{(B)}\ 12
25 \pmod{7} | 25 \pmod 7
\overline{AB} | AB
\begin{pmatrix}-1&-2\end{pmatrix} | -\begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}^T
\begin{pmatrix}7&10\\15&22\end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}^2
\begin{pmatrix}x&2x\end{pmatrix} | x\begin{pmatrix}1&2\end{pmatrix}
(1,5) | |x-3|<2
(-5,-1) | |x+3|<2
[1,5] | |x-3|\le 2
(-\infty,1]\cup[5,\infty) | |x-3|\ge2
(-\infty,-2)\cup(2,\infty) | 2<|x|
(-2,2) | 2>|x|
|x|<3 | -3<x<3
x\neq 0 | (-\infty,0)\cup(0,\infty)
x \ne 0 | \mathbb R\setminus\{0\}
\mathbb{R}\setminus\{1,-1\} | (-\infty,-1)\cup(-1,1)\cup(1,\infty)
A | \text{(A) } \frac{1}{2}
3 | \text{three}
\text{zero} | 0
\overline{CD} | CD
7 \pmod{11} | 7 \pmod 11
\ln|x|+C | \ln |x| + C
1:2:3 | 1:2:3
n! | n(n-1)!
7 | seven
1:2:3 | 2:4:6
\binom{n}{k} | \binom{n}{n-k}
n!\sqrt{x} | \sqrt{x}\,n!
''') + [
    ('5', ' 5 '),
    (r'\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}',
     r'\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \\ \end{pmatrix}'),
    (r'\begin{pmatrix}2&3\\3&5\end{pmatrix}',
     r'\begin{pmatrix}1&2\\3&4\end{pmatrix}+\begin{pmatrix}1&1\\0&1\end{pmatrix}'),
    (r'\begin{pmatrix}3\\7\end{pmatrix}',
     r'\begin{pmatrix}1&2\\3&4\end{pmatrix}\begin{pmatrix}1\\1\end{pmatrix}'),
    (r'\begin{pmatrix}4&3\\2&1\end{pmatrix}',
     r'\begin{pmatrix}1&2\\3&4\end{pmatrix}-\begin{pmatrix}-3&-1\\1&3\end{pmatrix}'),
]

DIFFERENT = lines(r'''
# one digit, one sign, one place
5 | 6
5 | -5
5 | 50
5 | 0.5
12 | 21
1000 | 1,00
1000 | 1, 000
1/2 | 1/3
1/2 | 2
1/2 | -1/2
1\frac12 | 1/2
3/2 | 1 1/3
2.5 | 2.05
32349 | 32, 349
12.345 | 12,345
123 | 1 2 3
# tiny differences
2^{-99} | 2^{-98}
\frac{1}{2^{99}} | \frac{1}{2^{98}}
\frac{1}{2004!} | \frac{1}{2006!}
\frac{1}{2004!} | 0
10^{-300} | 0
10^{-300} | 10^{-301}
e^{-1000} | e^{-1001}
e^{-1000} | 0
2^{10000} | 2^{10000}+1
\sqrt{2} | \sqrt{2}+10^{-60}
\sqrt{2} | \sqrt{2}+10^{-500}
\sqrt{2} | 1.4142135623730950488016887242096980785696718753769480
\pi | 3.14159
\pi | \frac{355}{113}
\pi | 22/7
1/3 | 0.333
1/3 | 0.333333
1/3 | 0.3333333334
e^{\pi\sqrt{163}} | 262537412640768744
0.1 | 0.1000000001
3 | 2.9999999999
1 | 0.99999999999999999999
x | x+10^{-40}
x^2 | x^2 + 10^{-90}x
\sin x | x - x^3/6 + x^5/120 - x^7/5040
1/5120 | 1/28800
\sin(10^{-30}) | 10^{-30}
100000000000000000000 | 100000000000000000001
\sqrt{10^{40}+1} | 10^{20}
# units, percent
5 cents | 5 dollars
5 cm | 5 m
\$10 | 10 cents
15 cm^2 | 15 cm^3
28\% | 2.8
90^\circ | 9
5 | 5 million
10 | 10 or 11 weeks
18 | 18 dollars and 5 cents
5 | 5 not 6
3 hours | 3 minutes
5 | 5 dozen
2 | 2x
2 | 2ab
# expressions
x+1 | x+2
x+1 | t+1
x^2 | x^3
xy | xz
f(x) | f(y)
\sqrt{x^2} | x
\frac{1}{x} | \frac{1}{x^2}
e^{x} | e^{2x}
\sin x | \cos x
2-2p | 2p-2
\ln x | \log_{10} x
x | X
a^2+b^2 | (a+b)^2
3\sqrt{2} | 2\sqrt{3}
6-5i | 6+5i
4 | 4\sqrt{2}
1\sqrt{19} | 1
x | 1
0 | x
\sqrt{2} | \pm\sqrt{2}
4 | \frac{34}{16}+\frac{\sqrt{1358}}{16}
# equations
x=5 | x=6
x=5 | y=5
x=5 | x=x
y=2x+3 | y=2x-3
y=2x+3 | 2x+4
a+3z=0 | 0
2x+z=1 | 1
7=11a+c | 11a+c
5 | x = 5 = 6
5 | 2x = 5
y=x | y^2=xy
x+y=1 | 0=0
x=5 | 0=0
1 | 7=8
8 | 7=8
x^2=4 | 4
5 | 6 \approx 5
# lists, sets, tuples, intervals
1,-2 | 1,2
1,2 | 1
1 | 1,2
1,2 | 1,2,3
1728 | 1331 and 1728
1,2,2 | 1,1,2
\{1,2\} | (1,2)
(1,2) | \{1,2\}
(1,2) | (2,1)
(1,2) | 1,2
(1,2) | [1,2]
[0,1) | (0,1]
[0,9) | [0,1)
(2,\infty) | [2,\infty)
(1,2) | (1,2,3)
12 | 1,2
x > 5 | x < 5
x \geq 5 | x > 5
x > 5 | y > 5
x < 1 | x > -1
2x < 4 | x < 4
(-\infty,2) | 2x<2
x<1 | 1
[-2,7] | -2 < x < 7
(0,9) \cup (9,36) | (0,36)
x=3, y=4 | x=4, y=3
x=3, y=4 | 4, 3
(3,4) | x=4, y=3
\pm 2021 | 2021
1 \pm \sqrt{19} | 1 + \sqrt{19}
(37,3,3),(17,3) | (37,3,3,13),(17,3)
\emptyset | 0
\emptyset | \{0\}
x \neq 3 | 3
12:00 | 1:00
3:30 | 1:10
3:30 pm | 1:10 pm
3:30 | 2:20
(2,3) | y=2, x=3
2,3 | y=2, x=3
(1,2,3) | x=1, z=2, y=3
(2,19) | a_3=19, a_{37}=2
USD 20 | €20
₹20 | 20 dollars
20 | USD 20 or 30
10 | 10 j
10 | 10J
9 | old 9
(1,2),(3,4) | (1,2),(4,3)
x<2 or x>3 | 2<x<3
\mathbb{R} | 0
(-6, 10) | [-6, 10]
D=(0,1) | D=(0,1.5)
# matrices
\begin{pmatrix}1 & 2 \\3 & 4\end{pmatrix} | \begin{pmatrix}1 & 2 \\3 & 5\end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | (2,1)
\begin{pmatrix}1 & 2 \\3 & 4\end{pmatrix} | (1,2,3,4)
\begin{pmatrix}1 & 2\end{pmatrix} | \begin{pmatrix}1 \\ 2\end{pmatrix}
# words
\text{Evelyn} | Briana
\text{even} | odd
\text{(C)} | B
\text{(C)} | C, D
\text{(C)} | A B C D
5 | five apples
52_8 | 53
52_8 | 52_9
42 | 52_8
5 | ?
5 | \frac{5}{0}
5 | \frac{0}{0}
0 | 1/\infty
1/0 | 2/0
5 | the number of apples
\infty | -\infty
5 | 5, 5, 6
F_n = \sum_{k=0}^{n-1} F_k | F_n = \sum_{k=0}^{n-2} F_k
5 | 5 5
55 | 5 5
\tan 90^\circ | 1/0
# sums and products of matrices, |x|, numbers left out, ratios, n!
1<|z|\leq 2 | [-2,-1] \cup [1,2]
1<|z|<2 | (1,2)
0<|x-2|<1 | (1,3)
2<|x| | (-2,2)
1<|x|<2 | 1<|y|<2
(-1,1) | |x|\leq 1
\begin{pmatrix}1&2\end{pmatrix} | -\begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1&4\\9&16\end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}^2
\begin{pmatrix}x&2x\end{pmatrix} | x\begin{pmatrix}1&3\end{pmatrix}
(1,5) | |x+3|<2
(-\infty,1]\cup[5,\infty) | |x-3|>2
|x|<3 | x<3
|x|<3 | |y|<3
|x|>3 | |x|<3
x\neq 0 | x\ne1
\mathbb{R}\setminus\{1,-1\} | (-\infty,-1)\cup(1,\infty)
3 | \text{thirteen}
2 | \text{two or three}
\overline{CD} | CE
\overline{z} | z
7 \pmod{11} | 7\pmod{13}
7 \pmod{11} | 8 \pmod{11}
\ln|x|+C | \ln|x|
1:2:3 | 1:3:2
n! | (n-1)!
n!x | n!|x|
\binom{n}{k} | \binom{n}{k+1}
1:2:3 | (1,2,3)
1:2:3 | 2:4:5
A | (A) or (B)
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}^2
x-1 | |x-1|
''') + [
    ('5', ''), ('5', '\u200b'), ('10', '1\u200b1'),
    (r'\begin{pmatrix}2&3\\3&5\end{pmatrix}',
     r'\begin{pmatrix}1&2\\3&4\end{pmatrix}+\begin{pmatrix}1&1\\0&2\end{pmatrix}'),
    (r'\begin{pmatrix}3\\8\end{pmatrix}',
     r'\begin{pmatrix}1&2\\3&4\end{pmatrix}\begin{pmatrix}1\\1\end{pmatrix}'),
]

# Pairs of the kinds that the tests of public graders hold, one a line.
MORE_SAME = r'''
3x-4y+1=0 | -3x+4y-1=0
1000.99 | 1000,99
1.5 | 1,5
05\!:\!00 | $05:00$.
x-1=0 | 1-x=0
x^2-y^2=0 | (x-y)(x+y)=0
x-y-1=0 | 2y-2x+2=0
\{x : x > 1\} | (1,\infty)
[0, 1[ | [0,1)
]0, 1] | (0,1]
0.1\dot{6} | \frac{1}{6}
0.1666... | 1/6
no | No
60 \text{ miles per hour} | 60 mph
0.\overline{9} | 1
\frac{1}{3} | 1/3
\frac{3}{2} | 1.5
x^2-1 | (x-1)(x+1)
\frac{n(n+1)}{2} | \frac{n^2+n}{2}
n(n+1)/2 | \frac{n^2}{2}+\frac{n}{2}
2\sqrt{3} | \sqrt{12}
\frac{\sqrt{2}}{2} | \frac{1}{\sqrt{2}}
\log 2 | \log(2)
\ln 2 | \log_e 2
\log_{2}{8} | 3
(1, 2, 3) | (1,2,3)
\{1,2,3\} | {3,2,1}
\{1,2,3\} | \left\{3, 1, 2\right\}
[1, 2) | [1,2)
(-\infty, 1] \cup [3, \infty) | (-\infty,1]\cup[3,+\infty)
(-\infty,1]\cup[3,\infty) | x \le 1 \text{ or } x \ge 3
x\in(1,2) | 1<x<2
a=1,b=2 | a = 1, b = 2
a=1,b=2 | b=2, a=1
\text{Monday} | Monday
\text{yes} | Yes
3\text{ cm} | 3 cm
3\text{ cm}^2 | 3
\$3.50 | 3.50
\$3.50 | \text{\$}3.50
50\% | 50
50\% | \frac{1}{2}
50\% | 0.5
\frac{1}{2} | 50\%
10,000 | 10000
10,000 | 10^4
1.5\times10^{3} | 1500
6.02 \times 10^{23} | 6.02e23
\frac{\pi}{3} | 60^\circ
\pi/3 | \frac{1}{3}\pi
45^{\circ} | \frac{\pi}{4}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{bmatrix}1\\2\end{bmatrix}
\begin{bmatrix}1&2\\3&4\end{bmatrix} | \begin{pmatrix} 1.0 & 2 \\ 3 & \frac{8}{2} \end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{array}{c}1\\2\end{array}
[1, 2, 3] | (1,2,3)
(3, \frac{\pi}{2}) | \left(3,\frac{\pi}{2}\right)
\left(\frac{1}{2},3\right) | (0.5, 3)
\boxed{5} | 5
\text{(A)} | A
\textbf{(A)} | (A)
\mathbf{A} | A
\mathrm{A} | A
A. | A
5x-7=0 | 5x=7
y=mx+b | mx+b=y
y = x^2 | x^2 = y
x=\frac{1}{2} | \frac12
x_1=1, x_2=2 | 1, 2
x=1,2 | x=1 \text{ or } x=2
1 \text{ and } 2 | 1,2
1, 2, \text{ and } 3 | 1,2,3
\pm 1 | 1, -1
\pm\sqrt{2} | \sqrt{2},-\sqrt{2}
3 \pm 2i | 3+2i, 3-2i
2+3i | 3i+2
i | \mathrm{i}
e | \mathrm{e}
\sin(x)\cos(x) | \frac{1}{2}\sin(2x)
\sin^2 x | (\sin x)^2
\sin^{2}(x)+\cos^{2}(x) | 1
\tan x | \frac{\sin x}{\cos x}
e^{x+y} | e^x e^y
\exp(x) | e^x
\ln(xy) | \ln x + \ln y
2^{n+1} | 2\cdot 2^n
4^n | 2^{2n}
x^{\frac{1}{2}} | \sqrt{x}
\sqrt[3]{x} | x^{1/3}
\sqrt[3]{2} | 2^{\frac{1}{3}}
|x| | \left|x\right|
|x| | \lvert x \rvert
\lfloor x \rfloor | \left\lfloor x\right\rfloor
n! | n!
\frac{10!}{8!} | 90
\binom{10}{3} | 120
{10 \choose 3} | 120
C_{10}^{3} | C_{10}^{3}
\sum_{i=1}^{n} i | \sum_{i=1}^n i
0.\overline{142857} | \frac{1}{7}
0.\dot{3} | \frac13
0.333\ldots | \frac13
0.\bar{3} | \frac13
1\frac{1}{2} | \frac{3}{2}
1 \frac{1}{2} | 1.5
-2\frac{3}{4} | -\frac{11}{4}
3:2 | 3/2
3:2 | \frac32
1:2:3 | 1:2:3
12:30 | 12:30
12:30 \text{ PM} | 12:30 pm
x \geq 3 | x>=3
x \ge 3 | [3,\infty)
3 \le x | x \geq 3
x \neq 0 | x \ne 0
\mathbb{R} | \mathbb R
\mathbb{R} | (-\infty, \infty)
\varnothing | \emptyset
\{x \mid x>1\} | x>1
\frac{x+1}{x-1} | \frac{-(x+1)}{1-x}
-\frac{1}{x} | \frac{-1}{x}
(x+y)^2 | x^2+2xy+y^2
a(b+c) | ab+ac
\frac{a}{b} | a/b
\frac{a}{b} | a \div b
\frac{2}{\sqrt{3}} | \frac{2\sqrt{3}}{3}
\sqrt{\frac{1}{2}} | \frac{\sqrt{2}}{2}
\sqrt{0.25} | \frac12
0.5 | .5
1,234.5 | 1234.5
-5 | - 5
25^\circ\text{C} | 25
60 \text{ mph} | 60
60 \text{ miles per hour} | 60
2 \text{ hours} | 2\text{ hrs}
90 \text{ minutes} | 90
3 \text{ apples} | 3
5\,\text{kg} | 5 kg
5\ \mathrm{m/s} | 5
9.8 m/s^2 | 9.8
9.8 \text{ m/s}^2 | 9.8
100\text{ km/h} | 100
12 \text{ dozen} | 12 \text{ dozen}
five | five
\text{no solution} | no solution
\text{No solution} | \text{no solution}
\text{infinitely many} | infinitely many
f(x)=x^2+1 | x^2+1
g(x) = 3 | 3
P(x) = x^3 - x | x^3-x
\overline{AB} | \overline{AB}
\angle A = 30^\circ | 30
\triangle ABC | \triangle ABC
AB = 5 | 5
m = 3 \text{ and } n = 4 | m=3,n=4
(2,3), (4,5) | (4,5),(2,3)
\{(2,3),(4,5)\} | (2,3),(4,5)
\frac{\sqrt{5}-1}{2} | \frac{-1+\sqrt5}{2}
\frac{-1 + \sqrt{5}}{2} | 0.5(\sqrt{5}-1)
3.0 | 3
3.14 | 3.140
1e3 | 1000
2.5e-3 | 0.0025
10^{-3} | 0.001
\tfrac{3}{4} | \dfrac{3}{4}
\frac34 | 3/4
\frac3{4} | \frac{3}{4}
34 | \text{34}
34 | **34**
\(\frac{1}{2}\) | 0.5
$$\frac{1}{2}$$ | 0.5
\displaystyle \frac{1}{2} | 0.5
2\cdot3 | 6
2 \times 3 | 6
7 \mod 10 | 7 \mod 10
7 \pmod{10} | 7 \pmod{10}
k\pi, k \in \mathbb{Z} | k\pi, k\in\mathbb{Z}
\frac{\pi}{4} + k\pi | k\pi + \frac{\pi}{4}
2n\pi | 2\pi n
\vec{v} = (1,2) | (1,2)
\langle 1,2,3\rangle | (1,2,3)
\mathbf{i} + 2\mathbf{j} | \mathbf{i}+2\mathbf{j}
1+\sqrt{2}+\sqrt{3} | \sqrt3+\sqrt2+1
\cos 60^\circ | \frac{1}{2}
\sin\frac{\pi}{6} | 0.5
\arcsin\frac{1}{2} | \frac{\pi}{6}
\tan^{-1}(1) | \frac{\pi}{4}
2^{3^2} | 512
\sqrt{2}\sqrt{3} | \sqrt{6}
1024_{5} | 1024_5
101_2 | 101_{2}
1011_2 | 1011
\text{Thursday.} | Thursday
\text{even} | \text{ even }
\text{C} | \text{(C)}
\frac{1}{2}x + 3 | 0.5x+3
-x^2 + 2x | 2x - x^2
x(x-1)(x-2) | x^3-3x^2+2x
(x - 3)^2 + (y + 2)^2 = 25 | (x-3)^2+(y+2)^2=5^2
x^2+y^2=4 | y^2+x^2-4=0
2x+3y=6 | 4x+6y=12
y=-\frac{2}{3}x+2 | 2x+3y=6
1.0 \times 10^{5} | 100000
\frac{123}{1000} | 0.123
7 : 5 | 7/5
\sqrt{16} | 4
\sqrt {16} | 4
{5} | 5
\left(5\right) | 5
(5) | 5
\lbrace 1, 2 \rbrace | \{1,2\}
\left[ 0, 1 \right] | [0,1]
] 0, 1 [ | (0,1)
1\,000\,000 | 1000000
1 000 000 | 1000000
1\;000 | 1000
$1,000 | 1000 dollars
\text{\$}1000 | 1000
25 \text{¢} | 25
£5 | 5
€5 | 5
5 € | 5
72^{\circ}F | 72
5 \times 5 | 5\times5
\frac{7}{8} \text{ inch} | 7/8
6\pi \text{ square units} | 6\pi
6\pi \text{ cm}^3 | 6\pi
3\sqrt{2} \text{ units} | 3\sqrt{2}
x = 5 \text{ or } -3 | 5, -3
x \in \{1, 2\} | \{1,2\}
x \in \{1, 2\} | 1,2
x \in \mathbb{R} | \mathbb{R}
2\text{ and }3 | 2 and 3
\mathcal{O}(n) | \mathcal{O}(n)
O(n^2) | O(n^2)
\neg p | \neg p
p \to q | p \to q
\text{Alice, Bob} | Bob, Alice
May 5 | \text{May 5}
n=4k+1 | n = 4k + 1
4\frac{1}{3} | \frac{13}{3}
1\tfrac{1}{2} | 1.5
\sqrt{x+1} | (x+1)^{1/2}
\frac{d}{dx} | \frac{d}{dx}
-\frac{\sqrt{3}}{2} + \frac{1}{2} i | -\frac{\sqrt{3}}{2}+\frac{i}{2}
\operatorname{cis} 30^\circ | \operatorname{cis} 30^\circ
\log_3 x | \frac{\ln x}{\ln 3}
\max(a,b) | \max(a,b)
\gcd(6,4) | \gcd(6,4)
'''

MORE_DIFFERENT = r'''
3x-4y+1=0 | 3x-4y-1=0
x-1=0 | x+1=0
x-y=0 | x^2-y^2=0
x-1=0 | 0=0
25^\circ\text{C} | 25^\circ\text{F}
1,50 | 2.50
]0,1[ | [0,1]
0.333... | 0.333
\{x \mid x>1\} | x \ge 1
5 € | 5 dollars
£5 | €5
{10 \choose 3} | {10 \choose 2}
9.8 \text{ m/s}^2 | 9.8 \text{ m/s}
yes | no
\sum_{i=1}^{n} i | \sum_{i=1}^{m} i
0.\dot{3} | 0.\dot{6}
[0,1[ | ]0,1]
\frac{1}{3} | 0.33
\frac{1}{3} | 0.333
\frac{2}{3} | 0.67
\pi | 3.14
\sqrt{2} | 1.41
\sqrt{2} | 1.414
x^2-1 | (x-1)^2
(1,2) | (2,1)
[1,2) | (1,2]
[1,2) | [1,2]
(1,2) | [1,2]
\{1,2\} | \{1,2,3\}
\{1,2,3\} | \{1,2\}
\{1,2\} | (1,2)
50\% | 5
50\% | 0.05
\frac{1}{2} | 5\%
10,000 | 1000
3 \text{ cm} | 3 \text{ m}
3 \text{ hours} | 3 \text{ minutes}
\$3 | 3 cents
1500 | 1.5
6.02\times10^{23} | 6.02\times10^{22}
60^\circ | \frac{\pi}{4}
\text{Monday} | \text{Tuesday}
\text{yes} | \text{no}
\text{True} | \text{False}
A | B
A | AB
\text{(A)} | \text{(B)}
x=1 | x=2
x=1 | y=1
a=1,b=2 | a=2,b=1
y=2x+1 | y=2x-1
x>3 | x \ge 3
x>3 | x<3
x \ge 3 | (3,\infty)
-1<x<1 | -1 \le x \le 1
\pm 1 | 1
1, -1 | 1
1,2,3 | 1,2
3 \pm 2i | 3+2i
2+3i | 2-3i
2+3i | 3+2i
\sin x | \sin(2x)
\sin x | \cos x
e^{x} | e^{-x}
\ln x | \log_{10} x
2^{n} | n^2
4^n | 2^n
\sqrt{x} | x
\sqrt[3]{x} | \sqrt{x}
|x| | x
n! | n
\binom{10}{3} | \binom{10}{4}
0.\overline{3} | 0.3
0.\overline{3} | 0.33333
1\frac{1}{2} | \frac{1}{2}
1\frac{1}{2} | \frac{11}{2}
3:2 | 2:3
12:30 | 12:31
12:30 \text{ PM} | 12:30 \text{ AM}
101_2 | 101_3
1011_2 | 11
1 | 1.0000001
1 | 0.9999999
1000000 | 1000001
123456789 | 123456788
\frac{123456789}{987654321} | \frac{123456788}{987654321}
\frac{1}{10^{20}} | 0
2^{100} | 2^{100}+1
10^{100} | 10^{101}
\frac{1}{100!} | \frac{1}{101!}
e^{-100} | 0
e^{100} | e^{101}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1&2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
\mathbb{R} | \mathbb{Z}
\mathbb{R} | \mathbb{Q}
\emptyset | 0
\infty | -\infty
x^2+y^2=4 | x^2+y^2=2
2x+3y=6 | 2x+3y=7
x+y | x-y
a/b | b/a
abc | abd
-5 | 5
5 | 5i
5 | 5x
0 | \emptyset
7 \pmod{10} | 7 \pmod{11}
7 \pmod{10} | 7
\frac{\pi}{4}+k\pi | \frac{\pi}{4}+2k\pi
2n\pi | n\pi
(-1,1) | (-1,0)\cup(0,1)
(2,3),(4,5) | (2,5),(4,3)
12 | 1 2
34 | 3, 4
1,234 | 1,243
5 | 5 or 6
5 | 5, 6
5 | \text{between 4 and 6}
5 | 4 < x < 6
10 | 10^2
x | x, y
\sqrt{4} | -2
\frac{1}{0} | \infty
5 m/s | 5 km/h
9.8 | 9.81
\text{Alice} | \text{Alice and Bob}
\text{no solution} | 0
f(x)=2x | g(x)=3x
(3,4) | 3,4
(3,4) | 3/4
O(n) | O(n^2)
\frac{x+1}{x-1} | \frac{x-1}{x+1}
1e3 | 1e4
\cos 60^\circ | \cos 60
\sin 1 | \sin 1^\circ
90^\circ | 90 \text{ radians}
\log_2 8 | \log_8 2
'''

# Words that are no products; words after a number that change it; units and nouns that differ.
WORDS_DIFFER = r'''
10 | -10 degrees below zero
LR | RL
iv | vi
(iv) | (vi)
xi | ix
H T T | T T H
W-L-L | L-L-W
A-B-A | A-A-B
5 | 5 twofold
5 | 5 hundredfold
5 | 5 factorials
0.3 | 0.3 repeating
5 | 5 octillion
5 | 5 K USD
5 | 5 quintupled
5 | 5 half-dozen
5 | 5折
5 | 5的平方
5 | 5次方
5 | 5%以上
42 | 42\approx 43
33.3 | 33.3 \approx 40
5 | 5 \approx 4.6
1,000 | 1,0
10,000 | 0, 10
3 dogs | 3x
3 dogs | 3 cat
5 seconds | 5 sec x
\sec x | 5 sec
1 hour 30 minutes | 1 hour 20 minutes
1 hour 30 minutes | 1 hour
1 hour 30 minutes | 130 minutes
5 feet 3 inches | 3 feet 5 inches
5 feet 3 inches | 5 feet 3 apples
SAS | SSA
IV | VI
HT | TH
WLL | LLW
RGB | BGR
AMY | MAY
III | I^3
II | I^2
HH | H^2
TTT | T^3
XIX | XXI
ASA | AAS
SSS | S^3
\text{SAS} | \text{SSA}
\text{HT} | \text{TH}
\text{IV} | \text{VI}
\text{IV} | VI
\mathrm{SAS} | \mathrm{SSA}
\textbf{RGB} | \textbf{BGR}
\text{dog} | \text{god}
\text{AB} | \text{BA}
\text{by SAS} | \text{by SSA}
A to B | B to A
Mia | Mai
Ian | Ina
IX | XI
XL | LX
HTT | TTH
(HT, TH) | (TH, TH)
\{HHT\} | \{HTH\}
BGB | GBB
MCD | CMD
CAB | BAC
\text{III} | \text{I}^3
2\text{ SAS} | 2\text{ SSA}
5 | 5 squared
5 | 5 cubed
5 | 5 tenths
5 | 5 \text{ thousandths}
5 | 5 dozens
5 | 5 crore
3 | 3 quarters
12 | 12 halves
5 | 5 hundredths
5 | 5 millionths
5 | 5 thirds
5 | 5 sixteenths
5 | 5 twenty-fifths
5 | 5 gross
5 | 5 score
5 | 5 lakh
5 | 5 lakhs
5 | 5\text{ million}
5 | 5 hundreds
5 | 5 tens
5 | 5 per mille
5 | 5‰
5 | 5 万
5 | 5亿
3 | 3万
5 | 5千
5 | 5 grand
5 | 5 factorial
5 | 5 doubled
5 dollars | 5 dollars per dozen
5 | 5 per hundred thousand
5 | 5 \text{ at least}
5 at least | 5 at most
5 | 5th
5 | \text{5th}
\$20 profit | \$20 loss
10° above zero | 10° below zero
10^\circ \text{ above zero} | 10^\circ \text{ below zero}
2 days earlier | 2 days later
2 days before | 2 days after
5 miles east | 5 miles west
5 miles north | 5 miles east
90^\circ clockwise | 90^\circ counterclockwise
90 degrees clockwise | 90 degrees anticlockwise
\$20 surplus | \$20 deficit
\$20 credit | \$20 debt
20 | \$20 loss
10 | 10 degrees below zero
5 floors up | 5 floors down
5% increase | 5% decrease
300 BC | 300 AD
5 gallons | 5 quarts
5 tons | 5 kg
3 knots | 3 mph
5 watts | 5 kilowatts
5 dimes | 5 cents
8 milliseconds | 8 seconds
10 decades | 10 years
5 apples | 5 oranges
5 boys | 5 girls
5 GB | 5 MB
5 kB | 5 MB
5 bits | 5 bytes
5 mm | 5 nm
5 Hz | 5 kHz
5 acres | 5 hectares
5 ounces | 5 pounds
5 pints | 5 cups
5 nickels | 5 dimes
5 euros | 5 dollars
5元 | 5角
5 km | 5 miles
5 degrees | 5 radians
5 arcminutes | 5 degrees
5 m^2 | 5 m^3
5 square feet | 5 feet
5 m/s | 5 m/s^2
5 J | 5 W
5 N | 5 kg
5 hours | 5 days
5\text{ kW} | 5\text{ MW}
5 mW | 5 MW
5 \mu\text{m} | 5\text{ mm}
5 quarters | 5 dimes
5 pennies | 5 nickels
5 rupees | 5 paise
5 公斤 | 5 克
5米 | 5厘米
5 cats | 5 dogs
5 cm | 5 apples
5 pairs | 5 dozen
5 centuries | 5 decades
5 weeks | 5 fortnights
5 furlongs | 5 miles
5 red balls | 5 blue balls
5 liters | 5 milliliters
5 kPa | 5 Pa
5 volts | 5 amps
60 min | 1 min
5 apples per day | 5 apples per hour
5 dollars per hour | 5 dollars
4 cups | 4 mugs
3 pm | 3 am
5 € | 5 £
5 USD | 5 EUR
5 AUD | 5 CAD
£5 | 5 lb
5 percent | 5 per mille
5 percent | 5 cm
5 tons | 5 grams
5 | 5 半
5 twins | 5 triplets
2 | 2cd
5 | 5A
5 | 5 of 6
1 | 1 dozen
5 | 5 Millionen
5 | 5 mil
5 | 5 bn
5 | 5 ppm
5 | 5 basis points
7 | 7 halves
5 | 5 negative
12 | a dozen dozen
20 | twenty-one
7 | 7 \times
5 inclusive | 5 exclusive
25^\circ C | 25^\circ F
0.33 | 0.33...
0.7 | 0.7\ldots
-four | 4
5 hundred | 5 thousand
5 million | 5 billion
5 kilograms | 5 pounds
5 liters | 5 gallons
5 g | 5 mg
5 mi | 5 km
5 \text{ m} | 5 \text{ cm}
5 \,\mathrm{m} | 5\,\mathrm{km}
5 rad | 5^\circ
5 F | 5 C
5\text{ F} | 5\text{ C}
12 noon | 12 midnight
5 hrs | 5 mins
5 yards | 5 meters
5 lbs | 5 oz
5 kWh | 5 kW
5 A | 5 V
5\text{ A} | 5\text{ V}
5 MB/s | 5 Mb/s
5 Mbps | 5 kbps
2 pairs | 2 dozens
5 students | 5 teachers
5 triangles | 5 squares
5 ways | 5 days
5 hundredths | 5 hundreds
5 hours ago | 5 hours later
3 floors above | 3 floors below
\$5 gain | \$5 loss
\$5 owed | \$5 owned
5 points ahead | 5 points behind
50 m deep | 50 m high
5 to the left | 5 to the right
5 left | 5 right
5 feet tall | 5 feet wide
5 more | 5 fewer
5 more | 5 less
5 faster | 5 slower
increase of 5 | decrease of 5
5 older | 5 younger
100 AD | 100 BC
5 degrees warmer | 5 degrees colder
5 km upstream | 5 km downstream
90^\circ \text{ CW} | 90^\circ \text{ CCW}
5 | 5 dozen eggs
5 | 5 hundred dollars
7 | 7 tenths of a mile
7 | 7 quarters
2 | 2 thirds
4 | 4 fifths
3 | 3 eighths
9 | 9 ten-thousandths
8 | 8 ninths
100 | 100 basis points
5 | 5 scores
3 | 3 million
5 thousand | 5 million
\$5 | \$5 million
\$5 | \$5k
\$5 | \$5M
5 | 5K
5 | 5万元
5亿 | 5万
5千克 | 5克
5平方米 | 5立方米
5米 | 5平方米
5小时 | 5分钟
5岁 | 5年
5本 | 5个
5 rubles | 5 euros
5 рублей | 5 евро
5 | 5 тысяч
5 | 5 миллионов
5 | 5 लाख
5 | 5 करोड़
5 | 5만
5 원 | 5 엔
5 | 5 squared units
5 | 5^2 \text{ units}
5 squared | 5 cubed
5 square meters | 5 cubic meters
3 m | 3 mm
1 lb | 1 kg
16 oz | 2 lb
60 s | 1 h
100 cm | 10 m
2 weeks | 15 days
1 mile | 1 km
1 acre | 1 hectare
1 quart | 1 gallon
4 quarts | 2 gallons
1 yard | 2 feet
1 MiB | 1 kiB
SSA | ASS
VIII | IIIV
LIV | LVI
MMXX | XXMM
HHT | THH
TTH | HTT
GBB | BBG
ABBA | BAAB
NNE | NEN
BAC | CAB
ABC | CBA
PQR | RQP
XIV | XVI
CXL | CLX
MIX | MXI
\text{HHT} | \text{HTH}
\mathrm{HHT} | \mathrm{HTH}
\textbf{RGB} | \textbf{GRB}
\text{II} | \text{I}^2
\text{AAS} | \text{ASA}
\text{red} | \text{der}
\text{Amy} | \text{May}
\text{amy} | \text{may}
\text{VI} | \text{IV}
\text{cat} | \text{act}
\text{Leo} | \text{Ole}
(SAS) | (SSA)
\{SAS, ASA\} | \{SSA, ASA\}
SAS, ASA | SSA, ASA
x=SAS | x=SSA
XX | X^2
HT | H \cdot T
VV | V^2
TF | FT
YN | NY
WL | LW
RB | BR
GB | BG
MF | FM
RRB | RBR
Sam | Mas
5 dogs | 5 Gods
2\text{ HT} | 2\text{ TH}
P(HT) | P(TH)
IV, VI | VI, VI
IV | 4V
IX | I\times X
3k, k\in\mathbb{Z} | 3k, k\in\mathbb{N}
3k, k\in\mathbb{Z} | 3k+1, k\in\mathbb{Z}
1<x<5, x\in\mathbb{Z} | 1<x<5
x>1, x<5 | x>1
x>1, x<5 | x>1, y<5
x>1, x<5 | 1\le x<5
x<1, x>5 | 1<x<5
x\equiv 3\pmod 7 | x\equiv 4\pmod 7
x\equiv 3\pmod 7 | x\equiv 3\pmod 8
x\equiv 3\pmod 7 | y\equiv 3\pmod 7
x\equiv 3\pmod 7 | 3
x\equiv 3\pmod 7 | x=3
x\equiv 3, 4\pmod 7 | x\equiv 3\pmod 7
0.\dot1\dot8 | 0.18
0.(27) | 0.27
0.(27) | 0.2(7)
0.\bar3 | 0.3
0.1\dot8 | 0.\dot1\dot8
0.272727... | 0.272727
\begin{vmatrix}1&2\\3&4\end{vmatrix} | 2
\begin{vmatrix}1&2\\3&4\end{vmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{cases}x=1\\y=2\end{cases} | x=2,y=1
\begin{cases}1&x>0\\0&x\le0\end{cases} | \begin{cases}0&x>0\\1&x\le0\end{cases}
20 | twelve
20 | two hundred
\frac12 | one third
\frac12 | two halves
all real numbers | \mathbb{Z}
all real numbers | \text{all positive real numbers}
\mathbb{R} | \mathbb{R}^+
1101_2 | 1101_3
1101_2 | 1011_2
1,2,\ldots | 1,2
1,2,\ldots,10 | 1,2,10
33.3 | \frac{100}{3}\approx 33.4
33.3 | \frac{101}{3}\approx 33.3
33.3 | 33.4\approx 33.3
33.3 | \frac{100}{3}
33.34 | \frac{100}{3}\approx 33.34
33 | \frac{101}{3} \approx 33
5 | \frac{16}{3}\approx 5
5 | 5.2\approx 5
\tan x | ctg x
x\ne0 | \text{all real numbers except } 1
\emptyset | \text{no}
5元 | 5美元
3万 | 3千
3 | 3万
8 m/s | 8\,\mathrm{m\,s}
8 m/s | 8\,\mathrm{m\,s^{-2}}
5 Hz | 5 s
42 | 41.7 \approx 41
5 | 5 to the fourth power
5 | 5 raised to the third
5 | five squared
25 | five cubed
5 | half of 5
5 | twice 5
5 | 5 doz
5 | 5 thousand
5 | 5 lac
5 | 5 k
5 | 5k
5 K | 5 k
3 | 3/4 of
5 | 5 half
5 | 5 and a half
5 | 5½
5 | 5 fifths
5 | 5 nanoseconds ago
5 apples | 5 apple trees
5 cups of milk | 5 cups of water
5 cups of milk | 5 liters of milk
5 | 5 of them
5 tenths of a mile | 5 miles
10 apples | 10 pears
5 dollar bills | 5 dollars
5 light years | 5 years
5 square miles | 5 miles
5 mph | 5 km/h
5 MHz | 5 GHz
5 mA | 5 A
5\text{ mg} | 5\text{ g}
5\text{ kcal} | 5\text{ cal}
5 Wh | 5 W
5 atm | 5 psi
5 carats | 5 grams
5 tbsp | 5 tsp
5 stone | 5 pounds
5 fathoms | 5 feet
5 leagues | 5 miles
5 quarts | 5 pints
5 pounds | 5 dollars
5 yen | 5 yuan
5 pesos | 5 dollars
5 rupees | 5 dollars
5 francs | 5 marks
5 chickens | 5 rabbits
5 heads | 5 tails
5 heads | 5 legs
3 men | 3 women
5 adults | 5 children
5 rows | 5 columns
5 edges | 5 vertices
5 wins | 5 losses
3 boys and 2 girls | 2 boys and 3 girls
5 minutes early | 5 minutes late
5 minutes before noon | 5 minutes after noon
5 m to the left | 5 m to the right
\$5 debt | \$5 credit
\$50 discount | \$50 surcharge
5 feet below sea level | 5 feet above sea level
5 steps forward | 5 steps backward
30^\circ \text{N} | 30^\circ \text{S}
30^\circ N | 30^\circ S
30° east | 30° west
N 30° E | N 30° W
5 km NE | 5 km SW
5 steps up | 5 steps down
-5 °C | 5 °C
12 AM | 12 PM
10:30 AM | 10:30 PM
5 in the morning | 5 in the evening
5 \times 10^3 | 5 \times 10^4
45^\circ \text{ CW} | 45^\circ\text{ CCW}
'''

# The same where order does not matter, units that convert, spellings of other countries and books.
WORDS_SAME = r'''
5 sec | 5 seconds
10 m/sec | 10 m/s
9.8 m/sec^2 | 9.8 m/s^2
2\sec x | 2 sec x
5 amps | 5 A
3 dogs | 3 dog
5 boxes | 5 box
5 km/h | 5 kmph
24 | 2 dz
\triangle ABC | △ABC
\angle ABC = 30^\circ | 30
H T T | HTT
A-B-C | A-(B+C)
A B | B A
\frac{2}{3}\approx 0.66 | \frac23
\frac{10000}{3} \approx 3300 | \frac{10000}{3}
1 \text{ hour}\approx 60\text{ min} | 1 hour
5000 USD | 5 K USD
xx | x^2
\operatorname{sen} x | \sin x
1 hour 30 minutes | 90 minutes
1 hour and 30 minutes | 1.5 hours
5 ft 3 in. | 63 inches
1 hour, 2 minutes, and 3 seconds | 3723 seconds
5 dollars 30 cents | \$5.30
2 m 30 cm | 230 cm
AB | BA
\overline{AB} | BA
\overline{DC} | CD
PQ | QP
xyz | zyx
ab | ba
abc | cab
x^2y | yx^2
\text{SAS} | SAS
SAS | SAS
\mathrm{SAS} | \text{SAS}
\text{dog} | dog
60 min | 1 h
60 minutes | 1 hour
1 km | 1000 m
5 cm | 50 mm
1 dollar | 100 cents
2 dozen | 24
5 crore | 50000000
3 feet | 1 yard
3 feet | 36 inches
1 kg | 1000 g
1 year | 12 months
5 dimes | 50 cents
1 m/s | 3.6 km/h
1 L | 1000 mL
1 GB | 1000 MB
1 GB | 1024 MB
180 degrees | \pi radians
5 N m | 5 J
5 apples | 5
5 | 5 apples
5 apple | 5 apples
5 metres | 5 m
5 inches | 5 in
5 feet | 5 ft
5 sq ft | 5 square feet
5 cm^2 | 5 square centimeters
5 cubic meters | 5 m^3
5 | 5 Hz
5 Hz | 5 hertz
8 m/s | 8\,\mathrm{m\,s^{-1}}
8 m/s | 8 meters per second
5 | 5元
30000 | 3万
5元 | 5 yuan
3 万元 | 30000 元
-20 | \$20 loss
-10 | 10 degrees below zero
5N | 5 N
5N | 5 \cdot N
9 years | 9 years old
20 | \$20 profit
20 | 20 dollars profit
$20 profit | 20 dollars profit
5 | 5\text{ N}
5 | 5\text{ men}
5 | 5 kW
0.5 | 5 tenths
6 | 12 halves
25 | 5 squared
5 people | 5 persons
\$5 million | 5000000
\$5 million | 5 million dollars
£5 | 5 pounds
¥5 | 5 yuan
¥5 | 5 yen
5 children | 5 child
5 lb | 5 pounds
5 colours | 5 colors
1 day | 24 hours
1 week | 7 days
5 kWh | 5000 Wh
1/1000 | 1‰
20 | $20
-5 | -\$5
5 | 5 km/h
(5\text{ cm}) | 5
33.3 | \frac{100}{3}\approx 33.3
33.3 | x = \frac{100}{3} \approx 33.3
1.41 | \sqrt{2}\approx 1.414
67 | \frac{200}{3}\approx 67
1,2,\ldots | 1,2,…
1,2,\ldots,10 | 1, 2, \dots, 10
1,2,... | 1,2,\cdots
x\equiv 3\pmod 7 | x \equiv 3 \pmod{7}
x\equiv 3\pmod 7 | x≡3 (mod 7)
x\equiv 3\pmod 7 | x \equiv 3 \bmod 7
x\equiv 3\pmod 7 | 3 \pmod 7
x\equiv 3\pmod 7 | x = 3 mod 7
x\equiv 3\pmod 7 | x\equiv 10 \pmod{7}
x \equiv 1, 4 \pmod 7 | x \equiv 4 \pmod 7 \text{ or } x\equiv 1 \pmod 7
x=3k, k\in\mathbb{Z} | 3k
x=3k, k\in\mathbb{Z} | x=3n, n\in\mathbb{Z}
x=3k, k\in\mathbb{Z} | 3k, \text{ where } k \text{ is an integer}
x=3k, k\in\mathbb{Z} | 3k \text{ for any integer } k
x=3k, k\in\mathbb{Z} | x = 3k \quad (k \in \mathbb{Z})
x=3k, k∈ℤ | x=3k, k\in Z
x=\frac{\pi}{2}+k\pi, k \in \mathbb Z | \frac{\pi}{2}+k\pi
\{3k \mid k\in\mathbb{Z}\} | 3k, k \in \mathbb{Z}
x>1, x<5 | 1<x<5
x>1 \text{ and } x<5 | (1,5)
x<5, x \ge 1 | 1 \le x < 5
x > 1 \land x < 5 | 1<x<5
x>0, x \ne 1 | (0,1)\cup(1,\infty)
x<1, x>5 | x<1 \text{ or } x>5
0.\dot1\dot8 | \frac{2}{11}
0.(27) | \frac{3}{11}
0.\bar3 | \frac13
0.\dot{1}\dot{8} | 0.\overline{18}
0.\dot12\dot3 | \frac{123}{999}
0.1(6) | 1/6
0.1\bar6 | 1/6
0.\overline3 | 1/3
0.\dot 3 | 1/3
0.3̅ | 1/3
\begin{smallmatrix}1&2\\3&4\end{smallmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
\left(\begin{smallmatrix}1\\2\end{smallmatrix}\right) | \begin{pmatrix}1\\2\end{pmatrix}
\begin{vmatrix}1&2\\3&4\end{vmatrix} | -2
\begin{vmatrix}1&0&0\\0&2&0\\0&0&3\end{vmatrix} | 6
\begin{cases}x=1\\y=2\end{cases} | x=1, y=2
\begin{cases}x=1\\y=2\end{cases} | (1,2)
\left\{\begin{array}{l}x=1\\y=2\end{array}\right. | x=1,y=2
\begin{cases}1 & x>0\\x & x\le0\end{cases} | \begin{cases}x, & x\le0\\1, & \text{if } x>0\end{cases}
f(x)=\begin{cases}1 & x>0\\x & x\le0\end{cases} | \begin{cases}1 & x>0\\x & 0\ge x\end{cases}
\begin{aligned} x&=1\\ y&=2\end{aligned} | x=1,y=2
20 | twenty
20 | \text{twenty}
twenty-one | 21
\frac12 | one half
\frac12 | one-half
\frac12 | \text{one half}
\frac23 | two thirds
105 | one hundred and five
1.5 | one and a half
\frac34 | three quarters
all real numbers | \mathbb{R}
\text{all real numbers} | (-\infty,\infty)
\mathbb{R} | \text{All real numbers}
x \in \mathbb{R} | all reals
ℝ | all real x
\text{the set of all real numbers} | \mathbb{R}
(1101)_2 | 1101_2
1101_2 | 1101_{2}
1101₂ | 1101_2
(1101)_{2} | 1101_2
1101_{two} | 1101_2
13 | (13)_{10}
\tan x | \mathrm{tg}\,x
\tan x | tg x
\cot x | ctg x
\cot x | \operatorname{ctg} x
\arctan 1 | arctg 1
\tan 45^\circ | tg 45°
24 | two dozen
5.5 | 5 and a half
43_5 | \boxed{43_5.}
8.25 | \sqrt{68}\approx 8.246
5 | 5\,\Omega
5 km | 5000 m
2 hours | 120 minutes
1.5 hours | 90 min
1 gallon | 4 quarts
1 pound | 16 ounces
2 pints | 1 quart
1 mile | 5280 feet
1 foot | 12 inches
90 min | 1.5\text{ h}
50 cents | \$0.50
\$1.25 | 125 cents
\$1.25 | 125¢
5 quarters | 1.25
1 kW | 1000 W
1 N | 1 kg m/s^2
1 hectare | 10000 m^2
1 m^3 | 1000 L
1 mL | 1 cm^3
1 cc | 1 mL
60 mph | 88 ft/s
1 rpm | 360 degrees per minute
1 century | 10 decades
1 decade | 10 years
3 \text{ dozen eggs} | 36 eggs
5 dollars | \$5
5 USD | \$5
5 dollars | 5
7 apples | 7\text{ apples}
12 in | 1 ft
12\text{ in.} | 1\text{ ft.}
5 ft. | 5 feet
5 sq. ft. | 5 square feet
5\text{ sq. units} | 5\text{ square units}
100 square centimeters | 100 cm^2
100 cm squared | 100 cm^2
3 hrs | 3 hours
3 hr | 3 h
5 secs | 5 s
5 kgs | 5 kg
10 kph | 10 km/h
10 m/s | 10 meters/second
10 \text{ m/s} | 10 m s^{-1}
9.8\,\mathrm{m/s^2} | 9.8 m/s²
9.8\ \mathrm{m\cdot s^{-2}} | 9.8 m/s^2
5\,\mu\mathrm{m} | 5 micrometers
5 μm | 0.005 mm
5 kΩ | 5000 ohms
5\text{ k}\Omega | 5000\text{ ohm}
20\,^{\circ}\mathrm{C} | 20 degrees Celsius
20°C | 20
5\% | 5 percent
5\% | 5 per cent
45 degrees | \pi/4 radians
45 deg | 45^\circ
5 天 | 5 days
5小时 | 5 hours
5 米 | 5 m
5平方米 | 5 m^2
5公里/小时 | 5 km/h
100 元 | 100
5 个 | 5
5人 | 5
5 штук | 5
5 рублей | 5
5 km | 5 km
5 Kilometer | 5 kilometers
5 KM | 5 km
5 Dollars | 5 dollars
5 EUR | 5 euros
5 € | €5
¥500 | 500 yen
500円 | 500 yen
twenty-five | 25
\text{Twenty} | 20
three hundred | 300
one million | 1000000
one third | 1/3
three fourths | 0.75
two and a half | 2.5
minus five | -5
a half | 1/2
half | 0.5
zero | 0
x = twenty | 20
SAS | \text{SAS}
SAS | \textbf{SAS}
IV | \text{IV}
RGB | \mathrm{RGB}
2AB | 2BA
AB+CD | CD+BA
MN | NM
AB \cdot CD | CD \cdot AB
PQ = 5 | 5
lwh | whl
abc + d | d + cba
mgh | hmg
xy | yx
nRT | RTn
mv^2 | v^2 m
I^2R | RI^2
3mg | 3gm \cdot 1
(1,5) | (1,\infty)\cap(-\infty,5)
1<x<5 | 1<x, x<5
1<x<5 | x<5 \wedge x>1
[0,1)\cup(1,\infty) | x\ge0, x\ne1
-1<x<3, x\neq 0 | (-1,0)\cup(0,3)
x>2 | x>1, x>2
3k, k\in\mathbb{Z} | 3k, k \in \mathbb{Z}
3k | 3k \text{ for all } k\in\mathbb{Z}
3k | 3k, \forall k\in\mathbb{Z}
3k | 3k \text{ (}k\text{ is an integer)}
3k | 3k \text{ for integer } k
3k | 3k, \text{ where } k \text{ is any integer}
3k | 3k \text{ for all integers } k
3k | 3k, k \text{ any integer}
3k | 3k, k \text{ an integer}
2\pi k | x = 2k\pi, k\in\mathbb{Z}
x = k\pi \text{ or } x = \frac{\pi}{2}+2k\pi, k\in\mathbb{Z} | k\pi, \frac{\pi}{2}+2k\pi
x\equiv 3\pmod 7 | x\equiv 3\ (\mathrm{mod}\ 7)
x\equiv 3\pmod 7 | x\equiv 3 \text{ mod } 7
x\equiv 3\pmod 7 | x\equiv 3 \mod 7
x\equiv 3\pmod 7 | x\equiv 3\,(\text{mod }7)
x\equiv 3\pmod 7 | x≡3 mod 7
x\equiv 3\pmod 7 | x \bmod 7 = 3
x\equiv 3\pmod 7 | x \equiv 3\ [7]
x\equiv 3\pmod 7 | x \equiv -4 \pmod 7
x\equiv 3\pmod 7 | x \equiv 3 \pmod{7}.
3 \pmod 7 | 3 \bmod 7
3 \pmod 7 | 3\ (\text{mod } 7)
n\equiv a \pmod m | n \equiv a \ (\bmod\ m)
\frac{3}{11} | 0.272727\ldots
\frac{3}{11} | 0.272727...
\frac{1}{7} | 0.142857142857142857...
\frac13 | .\overline{3}
\frac13 | 0.\widehat{3}
\frac{3}{11} | 0.\dot{2}\dot{7}
\frac{3}{11} | 0.\overline{27}
\frac{37}{30} | 1.2\overline{3}
\frac{3}{11} | 0.(27)
\frac{1}{6} | 0.1\dot{6}
-2 | \det\begin{pmatrix}1&2\\3&4\end{pmatrix}
-2 | \left|\begin{matrix}1&2\\3&4\end{matrix}\right|
-2 | \left|\begin{array}{cc}1&2\\3&4\end{array}\right|
ad-bc | \begin{vmatrix}a&b\\c&d\end{vmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix*}[r]1\\2\end{pmatrix*}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{psmallmatrix}1&2\\3&4\end{psmallmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \bigl(\begin{smallmatrix}1&2\\3&4\end{smallmatrix}\bigr)
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \left[\begin{smallmatrix}1&2\\3&4\end{smallmatrix}\right]
x=1,y=2 | \left\{\begin{aligned}x&=1\\y&=2\end{aligned}\right.
x=1,y=2 | \begin{cases}x=1,\\y=2.\end{cases}
x=1,y=2 | \begin{cases}x&=1\\y&=2\end{cases}
x=1,y=2 | \begin{dcases}x=1\\y=2\end{dcases}
|x|=\begin{cases}x&x\ge0\\-x&x<0\end{cases} | \begin{cases}-x&x<0\\x&x\ge0\end{cases}
99 | ninety-nine
1234 | one thousand two hundred thirty-four
3.5 | three and one half
2.75 | two and three quarters
\frac43 | one and one-third
30\% | thirty percent
20 | twenty dollars
5 feet | five feet
-3 | negative three
-5 | minus 5
\mathbb{R} | \text{all real numbers } x
\mathbb{R} | \text{the real numbers}
\mathbb{R} | x \text{ can be any real number}
\mathbb{R} | \text{all real values of } x
x\ne0 | \text{all real numbers except } 0
(0,\infty) | \mathbb{R}^+
(0,\infty) | \text{all positive real numbers}
x \ge 0 | \text{all nonnegative real numbers}
[0,\infty) | \mathbb{R}_{\ge 0}
\emptyset | \text{no solution}
\emptyset | \text{no real solutions}
\mathbb{Z} | \text{all integers}
\text{DNE} | \text{does not exist}
1101_2 | 1101_{(2)}
1101_2 | \text{1101}_2
1101_2 | 1101 \text{ base } 2
1101_2 | 1101 \text{ (base 2)}
1101_2 | 1101 base two
1101_2 | (1101)_{\text{two}}
\text{A5}_{11} | A5_{11}
\tan x | \tg x
\cot x | \ctg x
\tan^2 x | tg^2 x
\tan\alpha | \mathrm{tg}\,\alpha
\arctan x | \mathrm{arctg}\,x
\text{arccot } x | \operatorname{arcctg} x
\csc x | \operatorname{cosec} x
1,2,3,\dots | 1, 2, 3, \ldots
(1,2,\ldots,n) | (1,2,…,n)
5 | 5 \text{ A}
5 | 5 \text{ K}
5 | 5\,\text{N}
5 | 5 cd
10 | 10 \mathrm{kJ}
8 m/s | 8\,\mathrm{m}\,\mathrm{s}^{-1}
8 m/s | 8 \mathrm{m \cdot s^{-1}}
8 m/s | 8\ \text{m/s}
8\text{ kg m}^2 | 8\,\mathrm{kg\cdot m^2}
1.60\times10^{-19} C | 1.6\times10^{-19}\,\mathrm{C}
7 \text{ distinct integers} | 7 integers
14 \text{ right triangles} | 14 triangles
5\text{ red balls} | 5
9 years old | 9 years
5 cups of milk | 5 cups
20 | 20 \text{ cups of feed}
8 slices of pizza | 8
\$20 | 20 dollars profit
-10 degrees | 10 degrees below zero
'''


SAME_PAIRS = SAME + lines(MORE_SAME) + lines(WORDS_SAME)
DIFFERENT_PAIRS = DIFFERENT + lines(MORE_DIFFERENT) + lines(WORDS_DIFFER)

HOSTILE = [
    "9**9**9**9", "9^{9^{9^{9}}}", "9!!!!!!!!", "(((9!)!)!)!", "10^{10^{10}}", "2^{300000}",
    "\\binom{10^9}{10^8}", "4000!*3999!", "*".join(["(2^{60000}+1)"] * 60),
    "+".join(f"1/(2^{{60000}}+{i})" for i in range(50)), "((x+1)^{500}+1)^{500}",
    "(x+y+z)^{200000}", "\\sqrt{x}^{99999}", "1e9999", "1e999999999", "(1e4999)^{4999}",
    "1" * 990, "1." * 490, "1_" * 490, "(" * 495 + ")" * 495, "(" * 490 + "1" + ")" * 490,
    "{" * 990, "√" * 990, "\\frac" * 198, "\\frac{1}{" * 90 + "x" + "}" * 90, "-" * 990 + "1",
    "2" + "!" * 990, "x" + "^x" * 490, "x" + "^{x" * 240 + "}" * 240, "|" * 990, "|x" * 490,
    "sin " * 240 + "x", "\\sin(" * 140 + "x" + ")" * 140, "e^{e^{e^{e^{e}}}}", "e^{10^9}",
    "\\sin(10^{9999})", "\\ln(10^{4999})", "\\sqrt{10^{4999}+1}",
    "\\arctan(" * 20 + "10^{4999}" + ")" * 20, "+".join(f"\\sqrt{{{i}}}" for i in range(2, 110)),
    "1/0", "0^0", "∞-∞", "0*∞", "*".join(f"\\sin({i})" for i in range(100)),
    "+".join(f"\\ln(10^{{1200}}+{i})" for i in range(2, 60)), "i^i^i^i^i^i", "1,2" * 330,
    "1," * 490 + "1", "(1,2)," * 160 + "(3,4)", "\\{" * 330 + "\\}" * 330, "1&" * 490,
    "∪" * 990, "(1,2)∪" * 160 + "(3,4)", "x=" * 490 + "1", "x<" * 490 + "1",
    "1 \\pm " * 140 + "2", "a" * 990, "ab " * 330, "1 ab " * 190, "1" + " " * 980 + "a",
    "1 000" * 190, "1 " * 490 + "/ 3", "\\text{" * 160 + "}" * 160,
    "0." + "3" * 450 + "\\overline{" + "3" * 450 + "}", "%" * 990, "=" * 990, "≈" * 990,
    "\u0301" * 990, "½" * 990, "⟦1&2⏎3&4⟧" * 100, "⟦" + "1&" * 20 + "1⟧+" * 20,
    "+".join(["⟦9⟧^3"] * 150), "⟦" + "9!&" * 300 + "1⟧⟦" + "1⏎" * 30 + "1⟧",
    "-".join(["⟦" + "x^{99}&" * 9 + "1⟧"] * 9), "(-∞,∞)∖⦃" + "9!," * 300 + "1⦄",
    "|x-" + "9!" * 400 + "|<1", "n!" * 490, "1:" * 490 + "2", "1" * 500 + "." + "1" * 499,
    "⑪" * 500 + "." + "⑪" * 499, "1" * 495 + "." + "1" * 495 + "...",
    "⑪" * 200 + "." + "⑪" * 200, "ﷺ" * 999, "1²" * 490,
    # cases, determinants, congruences, conditions, units and words
    "\\$1 " * 240, "$" * 3 + "1 dollar" * 100, "1 " + "km " * 320, "1 " + "km^2 s^{-1} " * 80,
    "1" + "/km" * 330, "1 per mille " * 80, "\\begin{cases}" * 70,
    "\\begin{cases}" * 30 + "\\end{cases}" * 30, "⟬" * 990, "⟬" * 490 + "1" + "⟭" * 490,
    "⟪" * 990, "⟪" * 490 + "1" + "⟫" * 490, "⟪" + "1&1&1&1⏎" * 100 + "⟫",
    "⟪1&1&1&1⏎1&1&1&1⏎1&1&1&1⏎1&1&1&1⟫" * 25, "⟪9!&x^{99}⏎x^{98}&9!⟫" * 40,
    "(mod 7)" * 140, "1 mod " * 160, "x≡1," * 240 + "2 (mod 7)", "k∈Z," * 240,
    "3k, " * 200 + "k ∈ Z", "where " * 160 + "k integer", "x>1," * 240 + "x<5",
    "x≠1," * 240 + "x≠2", ",".join(f"x≠{i}" for i in range(150)),
    ",".join(f"x≠\\sqrt{{{i}}}" for i in range(90)), "|x|>1," * 150+"|x|<5",
    "0.\\dot1\\dot8" * 80, "0.(1)" * 190, "\\dot1" * 190, "one hundred " * 80, "a half " * 140,
    "twenty-" * 140 + "one", "≡" * 990, "≈".join(["1.5"] * 240), "x≈" * 490 + "1",
    "1 \\approx 1.0 " * 70, "3" + "万" * 990, "3 " + "万亿" * 490,
    "3 " + "平方" * 490 + "米", "5 " + "half " * 190, "5 googol " * 110,
    "5 " + "googol " * 130, "5 " + "dozen " * 160, "5" + " squared" * 120,
    "9" * 400 + " " + "cubed " * 90, "\\text{" + "ab " * 300 + "}", "\\text{ab}" * 110,
    "⟬" + "x&x>1⏎" * 160 + "⟭", "⟬" + "x=1⏎" * 240 + "⟭",
    "\\left\\{\\begin{array}{l}" * 40, "\\begin{aligned}" * 60, "5 " + "a-" * 480 + "a",
    "5 " + "é" * 990, "5" + "'" * 990, "5 " + "pound " * 160,
    "5 " + "pound ton degree year " * 40, "tg" * 490, "ctg " * 240,
    "(" * 400 + "5 km" + ")" * 400, "{x|" * 300, "\\{3k|k∈Z," * 80, "k integer " * 95,
    "∈" * 990, " ∈" * 490, "k ∈ " * 240, ", k∈" * 240 + ")" * 10, "²" * 990, "\x00",
    "\\" * 990, "x" * 10 ** 6, "(" * 10 ** 6, "$" * 10 ** 6,
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


@pytest.mark.parametrize("gold, answer", lines(MORE_SAME))
def test_more_of_the_same(gold, answer):
    assert math_equal(gold, answer)


@pytest.mark.parametrize("gold, answer", lines(MORE_DIFFERENT))
def test_more_that_differ(gold, answer):
    assert not math_equal(gold, answer) and not math_equal(answer, gold)


@pytest.mark.parametrize("gold, answer", lines(WORDS_SAME))
def test_words_that_say_the_same(gold, answer):
    assert math_equal(gold, answer) and math_equal(answer, gold)


@pytest.mark.parametrize("gold, answer", lines(WORDS_DIFFER))
def test_words_that_differ(gold, answer):
    assert not math_equal(gold, answer) and not math_equal(answer, gold)


def test_a_comma_in_the_gold_is_no_decimal_comma():
    assert not math_equal("1,5", "1.5")
    assert not math_equal("12,34", "12.34")
    assert math_equal("1,5", "5, 1")
    assert math_equal("1.5", "1,5")


def test_math_reward():
    row = {"answer": "\\frac{1}{2}", "prefill": "<think>"}
    assert math_reward("half</think>So it is $\\boxed{0.5}$.", row) == 1
    assert math_reward("half</think><answer>1/2</answer>", row) == 1
    assert math_reward("half</think><answer>1/3</answer>", row) == 0
    assert math_reward("half</think>It is 1/2.", row) == 0
    assert math_reward("\\boxed{5}", {"answer": 5}) == 1
    with pytest.raises(ValueError, match="empty"):
        math_reward("\\boxed{5}", {"answer": " "})


@pytest.mark.parametrize("gold, boxes, score", [
    ("1, 3", ["1", "3"], 1), ("1, 3", ["3", "1"], 1), ("1, 3", ["1", "3", "1", "3.0"], 1),
    ("1, 3", ["1"], 0), ("1, 3", ["1", "2"], 0), ("1, 3", ["1", "2", "3"], 0),
    ("1, 3", ["1", "1"], 0), ("1, 3", ["1, 3", "3, 1"], 1), ("1, 3", ["1", "3", "1, 3"], 1),
    ("1, 3", ["1", "1, 3, 5"], 0),
    ("\\{1, 3\\}", ["1", "3"], 1), ("1 \\text{ and } 3", ["1", "3"], 1),
    ("x = 1 \\text{ or } x = 3", ["x = 3", "x = 1"], 1), ("\\pm 3", ["3", "-3"], 1),
    ("\\pm 3", ["3"], 0), ("(1, 2), (3, 4)", ["(3, 4)", "(1, 2)"], 1),
    ("(1, 2), (3, 4)", ["(4, 3)", "(1, 2)"], 0), ("1, 2, 2", ["1", "2"], 1),
    ("x = 3, y = 4", ["x = 3", "y = 4"], 1), ("x = 3, y = 4", ["x = 4", "y = 3"], 0),
    ("(1, 3)", ["1", "3"], 0), ("[1, 3]", ["1", "3"], 0), ("1", ["1", "3"], 0),
    ("13", ["1", "3"], 0), ("1,000", ["1", "0"], 0), ("1,200", ["1", "200"], 0),
    ("1,000, 2,000", ["1000", "2,000"], 1), ("2, 3, \\text{ and } 4", ["4", "3", "2"], 1),
    ("1 \\pm \\sqrt{19}", ["1 - \\sqrt{19}", "1 + \\sqrt{19}"], 1),
    ("x^2, x^3", ["x^3", "x^2"], 1), ("\\frac12, 2", ["0.5", "2"], 1),
    ("3\\text{ cm}, 4\\text{ cm}", ["3", "4\\text{ cm}"], 1),
    ("3\\text{ cm}, 4\\text{ cm}", ["3\\text{ m}", "4\\text{ cm}"], 0),
    ("IV, VI", ["VI", "IV"], 1), ("IV, VI", ["VI"], 0),
    ("\\frac{1}{3}", ["1", "3"], 0), ("\\text{A, C}", ["A", "C"], 1),
    ("\\text{A, C}", ["A", "B"], 0),
    ("1, 3", [str(n) for n in range(100)], 0), ("1, 3", ["1", "3", ""], 1),
])
def test_several_boxes_are_the_list_where_the_gold_is_one(gold, boxes, score):
    assert math_reward(" ".join(f"\\boxed{{{box}}}" for box in boxes), {"answer": gold}) == score


def test_many_boxes_against_a_list_are_bounded_in_time():
    boxes = "".join(f"\\boxed{{\\sin(7^{{{n}}}\\pi)}}" for n in range(400, 2400))
    start = time.process_time()
    assert math_reward(boxes, {"answer": "1, \\sin(7^{401}\\pi)"}) == 0
    assert time.process_time() - start < 2


# Prompt, gold, and an answer that is the question again.
ECHOES = r'''
Compute $6\times 7$. | 42 | 6\times 7
Compute $6\times 7$. | 42 | 6*7
Compute $6\times 7$. | 42 | 7 \cdot 6
Compute $6\times 7$. | 42 | x = 6\times 7
Compute $6\times 7$. | 42 | \left(6\times 7\right)
Compute $6\times 7$. | 42 | 6 \times 7 \text{ apples}
Compute $\binom{8}{4}$. | 70 | \binom{8}{4}
Compute $\binom{8}{4}$. | 70 | \dbinom84
Compute $\binom{8}{4}$. | 70 | {8 \choose 4}
What is 48+48/2? | 72 | 48+48/2
What is 48+48/2? | 72 | 48+\frac{48}{2}
What is 48 + 48 ÷ 2? | 72 | 48/2+48
Compute 5! | 120 | 5!
Evaluate $5!$. | 120 | 5!
Write $\frac{3}{20}$ as a decimal. | 0.15 | \frac{3}{20}
Write $\frac{3}{20}$ as a decimal. | 0.15 | 3/20
Simplify $\sqrt{8}$. | 2\sqrt{2} | \sqrt{8}
Expand $(x+1)(x+2)$. | x^2+3x+2 | (x+1)(x+2)
Factor $x^2+3x+2$. | (x+1)(x+2) | x^2+3x+2
How many minutes are 2 hours? | 120 minutes | 2 hours
How many minutes are 2 hours? | 120\text{ min} | 2\text{ h}
How many eggs are 5 dozen? | 60 | 5 dozen
Convert $60^\circ$ to radians. | \frac{\pi}{3} | 60^\circ
Solve $|x-3|<2$. | (1,5) | |x-3|<2
Solve $2x<4$. | x<2 | 2x<4
Evaluate $2^{10}$ | 1024 | 2^{10}
Evaluate $2^{10}$ | 1024 | 2^10
Evaluate $\log_2 8$. | 3 | \log_2 8
Evaluate $\log_{2}{8}$. | 3 | \log_2(8)
Compute $\sqrt{144}$ | 12 | \sqrt[2]{144}
What is 6 times 7? | 42 | 6 \times 7
What is the product of 6 and 7? | 42 | 7 \cdot 6
What is the sum of $6$ and $7$? | 13 | 6+7
What is 84 divided by 2? | 42 | \frac{84}{2}
What is the square root of 144? | 12 | \sqrt{144}
What is 5 squared? | 25 | 5^2
What is $5^2$? | 25 | 5 squared
What is 25\% of 80? | 20 | 25\% \cdot 80
Find $5!$ | 120 | 1 \cdot 5!
Find $5!$ | 120 | 5!+0
Find $5!$ | 120 | \frac{5!}{1}
Find $5!$ | 120 | (5!)^{1}
Find $5!$ | 120 | 0+5!\cdot 1
Evaluate $\sin 30^\circ$ | \frac12 | \sin 30^\circ
Write 25% as a decimal. | 0.25 | 25\%
What is $1.45$ expressed as a fraction? | \frac{29}{20} | 1.45
Write 2.24 as a simplified fraction. | \frac{56}{25} | 2.240
Write $1.2\times10^6$ in standard form | 1200000 | 1.2 \times 10^6
Express $0.\overline{7}$ as a fraction. | \frac79 | 0.\overline{7}
Find $100-58$ | 42 | 100 - 58
Compute $\frac{12}{4}$ | 3 | \frac{12}{4}
Compute $\frac{12}{4}$ | 3 | 12/4
Evaluate $\lfloor 3.7 \rfloor$ | 3 | \lfloor 3.7\rfloor
Compute $1+2+3$ | 6 | 3+2+1
Compute $\sqrt{16}$ | 4 | \sqrt{16}
Calculate $16^{1/2}$. | 4 | 16^{\frac{1}{2}}
Find $\begin{vmatrix}1&2\\3&4\end{vmatrix}$. | -2 | \begin{vmatrix}1&2\\3&4\end{vmatrix}
What is $i^2$? | -1 | i^2
What is $10\%$ of 50, that is $0.1 \cdot 50$? | 5 | 0.1 \cdot 50
Compute 1,000 + 2,000. | 3000 | 1000+2000
'''

# The same where the answer is a number, is written like the gold, or is not in the prompt.
NO_ECHOES = r'''
There are 10 apples. How many? | 10 | 10
There are 10 apples. How many? | 10.0 | 10
There are 0.5 kg. | 0.50 | .5
[asy] draw((0,0)--(0.5,1)); [/asy] Which share? | \frac{1}{2} | 0.5
Compute $6\times 7$. | 42 | 42
Compute $6\times 7$. | 42 | 42 \times 1
Compute $6 + 7 + 1$. | 14 | 13 + 1
Compute $6\times 7$. | 42 | 6 \times 7 = 42
Compute $6\times 7$. | 6 \times 7 | 6\times 7
What is the power of two? | 1024 | 2^{10}
Natalia sold 48 clips in April and half as many in May. | 72 | 48+48/2
3/4 of the boys. Which share? | 3/4 | 3/4
3/4 of the boys. Which share? | \frac{3}{4} | 3/4
Solve $x+1 = y$ for y. | x+1 | x+1
Solve $x+1 = y$ for y. | x+1 | 1 + x
Solve $x+1 = y$ for y. | y=x+1 | y = x+1
She ran 5 km. How far? | 5 | 5 km
She ran 5 km. How far? | 5 km | 5
A test with 50\% right | 50 | 50\%
Angle of $60^\circ$ | 60 | 60^\circ
Is it -5 or 5? | -5 | -5
Who, Evelyn or Ann? | \text{Evelyn} | evelyn
$x$ or $y$? | x | x
$(1,2)$ or $(2,1)$? | (1,2) | (1,2)
$\sqrt{2}$ or 2 | \sqrt{2} | \sqrt2
Pick from 1, 2, 3 | 2, 1 | 1, 2
Convert 60 degrees. | 60 | 60 degrees
Expand $(x+1)^2$. | x^2+2x+1 | 1+2x+x^2
$5 and $10 | 15 | \$15
Compute $5!$ | 120 | 5 \cdot 24
Is $15!$ more than | 120 | 5!
The right-angled one? | right-angled | Right-angled
'''


def as_messages(prompt):
    return [{'role': 'system', 'content': 'Reason step by step.'},
            {'role': 'user', 'content': prompt + '\nPut the final answer within \\boxed{}.'}]


@pytest.mark.parametrize('prompt, gold, answer', lines(ECHOES, 3))
def test_the_question_is_not_its_own_answer(prompt, gold, answer):
    for given in (prompt, as_messages(prompt)):
        row = {'answer': gold, 'prompt': given}
        assert math_reward(f'\\boxed{{{answer}}}', row) == 0
        assert math_reward(f'\\boxed{{{gold}}}', row) == 1
        assert math_reward(f'\\boxed{{{answer}}} that is \\boxed{{{gold}}}', row) == 1
    assert math_reward(f'\\boxed{{{answer}}}', {'answer': gold}) == 1
    assert math_reward(f'\\boxed{{{answer}}}', {'answer': gold, 'prompt': 'How many?'}) == 1
    assert math_reward(f'\\boxed{{{answer}}}', {'answer': answer, 'prompt': prompt}) == 1


@pytest.mark.parametrize('prompt, gold, answer', lines(NO_ECHOES, 3))
def test_what_the_prompt_holds_may_be_the_answer(prompt, gold, answer):
    for given in (prompt, as_messages(prompt)):
        assert math_reward(f'\\boxed{{{answer}}}', {'answer': gold, 'prompt': given}) == 1


def test_elements_of_a_list_are_no_echoes_either():
    row = {'answer': '4, 9', 'prompt': 'Compute $2^2$ and $3^2$.'}
    assert math_reward('\\boxed{4} \\boxed{9}', row) == 1
    assert math_reward('\\boxed{2^2} \\boxed{3^2}', row) == 0
    assert math_reward('\\boxed{4} \\boxed{3^2}', row) == 0


@pytest.mark.parametrize('prompt', ['a ' * 5 * 10 ** 5, '1+' * 5 * 10 ** 5, '. ' * 5 * 10 ** 5,
                                    [{'role': 'user', 'content': '2*2'}] * 10 ** 5])
def test_a_long_prompt_takes_no_time(prompt):
    start = time.process_time()
    assert math_reward('\\boxed{21*2}', {'answer': '42', 'prompt': prompt}) == 1
    assert time.process_time() - start < 2


def test_a_row_may_demand_a_number():
    for answer in ('42', '42.0', '84.0 / 2.0 = 42', 'x = 42', '42 \\text{ km}', '\\$42',
                   'forty-two', '4.2\\times 10^1', '4.2e1'):
        assert math_reward(f'\\boxed{{{answer}}}', {'answer': '42', 'form': 'number'}) == 1
    for answer in ('6 * 7', '84/2', '\\frac{84}{2}', '\\sqrt{1764}', '40+2', '\\binom{42}{1}',
                   '2(21)', '|42|'):
        assert math_reward(f'\\boxed{{{answer}}}', {'answer': '42'}) == 1
        assert math_reward(f'\\boxed{{{answer}}}', {'answer': '42', 'form': 'number'}) == 0
    for answer in ('1.5', '3/2', '\\frac{3}{2}', '1\\frac12', '1\\tfrac{1}{2}', '150\\%'):
        assert math_reward(f'\\boxed{{{answer}}}', {'answer': '1.5', 'form': 'number'}) == 1
    with pytest.raises(ValueError, match="form.*'number'"):
        rewards.check_row({'task': 'math', 'answer': '42', 'form': 'nubmer'}, ['accuracy'])


# ---------------------------------------------------------------- real answers

def rows(path):
    if not (SHARED / path).exists():
        pytest.skip("needs the shared data")
    return [json.loads(line) for line in (SHARED / path).read_text().splitlines()]


def paraphrases(gold):
    yield f"${gold}$"
    yield f"\\( {gold} \\)."
    yield f"\\boxed{{{gold}}}"
    yield gold.replace("\\frac", "\\dfrac")
    yield gold.replace(" ", "  ")
    yield gold.replace("\\left", "").replace("\\right", "")
    yield gold.replace("\\!", "")


def test_math500_paraphrases_and_neighbours():
    golds = [r["answer"] for r in rows("data/math500/test.jsonl")]
    assert len(golds) == 500
    for gold in golds:
        for paraphrase in paraphrases(gold):
            reward = math_reward(f"\\boxed{{{paraphrase}}}", {"answer": gold})
            assert reward == 1, (gold, paraphrase)
        first_digit = re.search(r"\d", gold)
        if first_digit:
            digit = (int(first_digit[0]) + 1) % 10
            changed = gold[:first_digit.start()] + str(digit) + gold[first_digit.end():]
            assert math_reward(f"\\boxed{{{changed}}}", {"answer": gold}) == 0, (gold, changed)


def test_math500_different_answers_differ():
    golds = list(dict.fromkeys(r["answer"] for r in rows("data/math500/test.jsonl")))[:110]
    same = {(a, b) for i, a in enumerate(golds) for b in golds[:i] if math_equal(a, b)}
    assert same == {("x=5", "5"), ("120", "120^\\circ")}


def test_gsm8k_paraphrases_and_neighbours():
    for row in rows("data/gsm8k/test.jsonl")[:400]:
        gold = row["answer"].split("####")[1].strip()
        n = int(gold.replace(",", ""))
        rights = [
            n, f"{n:,}", f"{n}.00", f"{2 * n}/2", f"\\${n}", f"${n:,}", f"{n} dollars",
            f"{n}\\text{{ apples}}", f"{n} \\text{{ cm}}^2",
            f"x = {n}", f"#### {n}", f"The answer is {n}."]
        for right in rights:
            assert math_reward(f"<answer>{right}</answer>", {"answer": gold}) == 1, (gold, right)
        wrongs = [
            n + 1, -n - 1, 10 * n + 1, f"{n}.5", f"{n}1", f"not {n}",
            f"{n} or {n + 1}", f"{n}, {n + 2}", f"{n} and {n + 1}"]
        for wrong in wrongs:
            assert math_reward(f"<answer>{wrong}</answer>", {"answer": gold}) == 0, (gold, wrong)


# ---------------------------------------------------------------- bounds and safety

def beginning(text):
    return text[:20].encode("ascii", "replace").decode()


@pytest.mark.parametrize("text", HOSTILE, ids=beginning)
def test_hostile_input_is_bounded(text):
    math_equal("1/3", "\\sqrt{2}")   # the import of sympy is not what is timed
    pairs = [(gold, text) for gold in ("5", "x^2+1", "\\sqrt{2}", "1,2")]
    for gold, answer in [*pairs, (text, text + "*1")]:
        start = time.process_time()
        math_equal(gold, answer)
        assert time.process_time() - start < 2


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


@pytest.mark.parametrize("text", [
    "(x^2<1)∩(2,3)", "\\left\\{\\begin{array}{l}\\end{array}\\right.",
])
def test_what_cannot_be_read_equals_nothing_and_raises_nothing(text):
    assert not math_equal("5", text) and not math_equal(text, "5")


def test_a_timeout_scores_zero_and_is_counted(monkeypatch):
    monkeypatch.setattr(maths, "SECONDS", 0.0)
    before = rewards.FAILURES["math", "TimeoutError"]
    assert math_reward("\\boxed{\\frac{2}{4}}", {"answer": "1/2"}) == 0
    assert rewards.FAILURES["math", "TimeoutError"] == before + 1


def grade_all():
    missed = [pair for pair in SAME if not math_equal(*pair)]
    fooled = [pair for pair in DIFFERENT if math_equal(*pair)]
    return not missed and not fooled


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
    pool = multiprocessing.get_context(method).Pool(1)
    assert pool.apply_async(grade_all).get(timeout=60)
    pool.close()     # not terminate: a forked worker has this process's handler of SIGTERM
    pool.join()


@pytest.mark.slow
def test_not_below_math_verify():
    """The same pairs in \\boxed{} through Math-Verify."""
    math_verify = pytest.importorskip("math_verify")

    def theirs(gold, answer):
        parsed = [math_verify.parse(f"\\boxed{{{text}}}") for text in (gold, answer)]
        return math_verify.verify(*parsed)

    missed = [pair for pair in SAME_PAIRS if not theirs(*pair)]
    fooled = [pair for pair in DIFFERENT_PAIRS if theirs(*pair)]
    print(f"Math-Verify: {len(missed)} of {len(SAME_PAIRS)} missed, "
          f"{len(fooled)} of {len(DIFFERENT_PAIRS)} taken for right")
    # With Math-Verify 0.9 about a fifth of the same and a seventh of the others; ours none, by the
    # tests above.
    assert len(missed) + len(fooled) > 0
