"""`math`: the final answer is found, and what is equal is equal, in bounded time."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.objectives.rewards import Answered, build_reward
from tunesmith.objectives.rewards.math_equal import is_same_answer
from tunesmith.objectives.rewards.math_extract import final_answer, last_boxed
from tunesmith.objectives.rewards.math_parse import parse
from tunesmith.objectives.rewards.math_tokens import number_from_chinese
from tunesmith.objectives.rewards.math_tree import NotMathError, evaluate


def judge(answer: str, reference: str, **options: object) -> float | None:
    return build_reward("math", options)([Answered("", answer, reference)])[0]


# Answer, reference, and what Math-Verify 0.9 says of parse(reference), parse(answer).
MATH_VERIFY = [
    (r"$\boxed{42}$", "42", 1),
    (r"$\boxed{1{,}234}$", "1234", 1),
    ("1,234", "1234", 1),
    ("1,234.50", "1234.5", 1),
    (r"$\frac{1}{2}$", "0.5", 1),
    (r"\frac12", "1/2", 0),
    ("0.333333", "1/3", 1),
    ("0.333", "1/3", 0),
    ("0.3333333", "1/3", 1),
    ("50%", "0.5", 1),
    ("50%", "50", 1),
    (r"50\%", "1/2", 0),
    ("0.5%", "50%", 0),
    (r"$\sqrt{8}$", r"$2\sqrt{2}$", 1),
    (r"$2\pi$", "6.283185", 1),
    (r"$2\pi$", "6.28", 0),
    ("$x^2+2x+1$", "$(x+1)^2$", 1),
    ("$x+y$", "$y+x$", 1),
    ("$x$", "$y$", 0),
    (r"$\{1,2,3\}$", r"$\{3,2,1\}$", 1),
    ("$1,2,3$", "$3,2,1$", 1),
    ("$(1,2)$", "$(2,1)$", 0),
    ("$(1,2)$", "$(1,2)$", 1),
    ("$[1,2)$", "$[1,2]$", 0),
    (r"$(-\infty,3]$", r"$(-\infty, 3]$", 1),
    (r"$(1,2)\cup(3,4)$", r"$(3,4)\cup(1,2)$", 1),
    ("$x>3$", r"$(3,\infty)$", 0),
    ("$x=5$", "$5$", 1),
    ("$5$", "$x=5$", 1),
    ("$y=2x+3$", "$2x+3$", 1),
    ("$y=2x+3$", "$y-2x=3$", 1),
    ("$2x+y=3$", "$4x+2y=6$", 1),
    (r"$\frac{\sqrt{3}}{3}$", r"$\frac{1}{\sqrt{3}}$", 1),
    (r"$\sin^2 x+\cos^2 x$", "$1$", 1),
    ("$2^{10}$", "$1024$", 1),
    (r"$1.5\times 10^3$", "$1500$", 1),
    ("1.5e3", "1500", 0),
    (r"$90^\circ$", "$90$", 1),
    (r"$18\text{ dollars}$", "$18$", 1),
    (r"$\$18$", "$18$", 1),
    (r"$10\text{ cm}$", "$10$", 1),
    (r"$2\frac{1}{2}$", "$2.5$", 1),
    (r"$2\frac{1}{2}$", "$1$", 0),
    (r"$\log_2 8$", "$3$", 1),
    (r"$\log 100$", "$2$", 1),
    (r"$\ln e$", "$1$", 1),
    (r"$\log e$", "$1$", 0),
    ("$5!$", "$120$", 1),
    (r"$\binom{5}{2}$", "$10$", 1),
    ("$|-3|$", "$3$", 1),
    (r"$3\pm 2$", r"$\{1,5\}$", 1),
    ("$x=1$ or $x=2$", r"$\{1,2\}$", 1),
    ("$1010_2$", "$1010_2$", 1),
    ("$1010_2$", "$1010$", 1),
    (r"$0.\overline{3}$", "$1/3$", 0),
    ("$-3$", "$3$", 0),
    ("$3$", "$3.0$", 1),
    ("$i^2$", "$-1$", 0),
    ("$1+2i$", "$2i+1$", 1),
    (r"$\begin{pmatrix}1\\2\end{pmatrix}$", r"$\begin{pmatrix}1\\2\end{pmatrix}$", 1),
    (r"$\begin{pmatrix}1\\2\end{pmatrix}$", r"$\begin{pmatrix}2\\1\end{pmatrix}$", 0),
    (r"$\text{A}$", "$A$", 1),
    ("(A)", "A", 0),
    (r"$\text{Evelyn}$", r"$\text{evelyn}$", 1),
    (r"$\tfrac{3}{4}$", "$0.75$", 1),
    (r"$e^{i\pi}$", "$-1$", 0),
    ("$a^2-b^2$", "$(a-b)(a+b)$", 1),
    ("The answer is 42.", "42", 1),
    ("So we get 3 apples and 4 pears. The final answer is $7$", "7", 1),
    ("#### 72", "72", 1),
    ("1e100", "1", 1),
    ("$2^{100}$", "$1267650600228229401496703205376$", 1),
    ("$2^{100}$", "$1267650600228229401496703205377$", 0),
    (r"$\frac{x}{2}$", "$0.5x$", 1),
    (r"$\sqrt[3]{27}$", "$3$", 1),
    ("3/4", "0.75", 1),
    ("$(3,4)$", "$3,4$", 1),
    (r"$\{3,4\}$", "$3,4$", 1),
    ("$1<x<2$", "$(1,2)$", 0),
    (r"$x\in[1,2]$", "$[1,2]$", 1),
    (r"$x\ge 3$", r"$[3,\infty)$", 0),
    ("$x>3$", "$3<x$", 1),
    (r"$\sqrt{x^2}$", "$x$", 0),
    ("$x-x$", "$0$", 1),
    (r"\boxed{1} and \boxed{2}", "$1,2$", 1),
    (r"$\boxed{5}$ no wait $\boxed{6}$", "6", 1),
    (r"$\boxed{5}$ no wait $\boxed{6}$", "5", 0),
    ("$f(x)=x^2$", "$x^2$", 1),
    ("$10^{-3}$", "$0.001$", 1),
    (r"$\mathbb{R}$", r"$(-\infty,\infty)$", 1),
    (r"$\emptyset$", r"$\{\}$", 1),
    (r"$12\,345$", "$12345$", 0),
    ("10 000", "10000", 1),
    (r"$\infty$", r"$\infty$", 1),
    (r"$-\infty$", r"$\infty$", 0),
    (r"$\arctan 1$", r"$\pi/4$", 1),
    ("$x^{1/2}$", r"$\sqrt{x}$", 1),
    ("$3:4$", "$3/4$", 1),
    ("$3:4$", "$3:4$", 1),
    ("12:30", "12:30", 1),
    (r"$11\sqrt2$", r"$\sqrt{242}$", 1),
    (r"$\frac{3\sqrt{3}}{4}$", r"$\frac{3}{4}\sqrt{3}$", 1),
    (r"$y=-\frac{1}{2}x+3$", "$y = 3 - x/2$", 1),
    (r"$\left(3,\frac{\pi}{2}\right)$", r"$(3,\pi/2)$", 1),
    (r"$3\left(x-2\right)^2$", "$3x^2-12x+12$", 1),
    (
        r"$\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}$",
        r"$\begin{pmatrix}-1&0\\0&-1\end{pmatrix}$",
        1,
    ),
    (r"$\sqrt{2+\sqrt{3}}$", r"$\frac{\sqrt{6}+\sqrt{2}}{2}$", 1),
    (r"$\text{Monday}$", r"$\text{Monday}$", 1),
    ("$4{,}000$", "$4000$", 1),
    (r"$\{1\pm\sqrt{5},-2\}$", r"$\{-2,1+\sqrt{5},1-\sqrt{5}\}$", 1),
    ("$6-5i$", "$6 - 5i$", 1),
    ("$2^{n-1}$", r"$\frac{2^n}{2}$", 1),
    ("$x^4-x^2+1$", "$x^4 - x^2 + 1$", 1),
    (r"$\frac{1}{2}\ln 2$", r"$\ln\sqrt{2}$", 1),
    (r"$\tan^2 \theta$", r"$\sec^2\theta-1$", 1),
    (r"$\$32,\!348$", "$32348$", 1),
    (r"$1.25\times10^{-3}$", "$0.00125$", 1),
    (r"$x=\pm 3$", "$3,-3$", 1),
    (r"$\cos 60^\circ$", "$0.5$", 0),
    (r"$\sin(30^\circ)$", r"$\frac12$", 0),
    ("$x^2+y^2=4$", "$x^2 + y^2 - 4 = 0$", 1),
    (r"$\frac{a+b}{c}$", r"$\frac{a}{c}+\frac{b}{c}$", 1),
    ("$(x+1)(x-1)$", "$x^2-1$", 1),
    (r"$\log_{3} 81$", "$4$", 1),
    ("$3^{2x}$", "$9^x$", 1),
    (r"$\frac{-1}{2}$", r"$-\frac{1}{2}$", 1),
    (r"$-\frac{1}{-2}$", "$0.5$", 1),
    (r"$2\sqrt{3}\text{ cm}$", r"$2\sqrt{3}$", 1),
    (r"$5\text{ and }6$", "$5,6$", 1),
    ("$(2,3),(4,5)$", "$(4,5),(2,3)$", 1),
    (r"$(-2,1)\cup[3,5)$", r"$[3,5)\cup(-2,1)$", 1),
    (r"$\frac{\pi}{4}+k\pi$", r"$k\pi+\frac{\pi}{4}$", 1),
    ("$n(n+1)/2$", r"$\frac{n^2+n}{2}$", 1),
    (r"$0.5\overline{3}$", r"$\frac{8}{15}$", 0),
    (r"$3\frac{1}{3}$", r"$\frac{10}{3}$", 1),
    ("$a_n=2n+1$", "$2n+1$", 1),
    (r"$x\ge 0$", r"$x \geq 0$", 1),
    (r"$-1\le x\le 1$", "$[-1,1]$", 0),
    (r"$\mathrm{True}$", "$True$", 1),
    (r"$\left\{ 1,2 \right\}$", r"$\{2,1\}$", 1),
    ("$1,2$", "$(1,2)$", 1),
    (r"$\frac{1}{x}+\frac{1}{y}$", r"$\frac{x+y}{xy}$", 1),
    ("$|x|$", r"$\sqrt{x^2}$", 1),
    (r"$e^{\ln 3}$", "$3$", 1),
    (r"$\frac{d}{dx}$", r"$\frac{d}{dx}$", 1),
    (r"$\int_0^1 x dx$", "$0.5$", 1),
    (r"$\sum_{i=1}^3 i$", "$6$", 1),
    (r"$12\,\text{m}^2$", "$12$", 1),
    ("$x=1,y=2$", "$(1,2)$", 1),
    ("$2:3$", r"$\frac{2}{3}$", 1),
    ("$10!$", "$3628800$", 1),
    ("$1.0$", "$1$", 1),
    ("$007$", "$7$", 1),
    ("$+5$", "$5$", 1),
    (r"$\frac{1}{3}$", "$0.33$", 0),
    ("$0.67$", r"$\frac{2}{3}$", 0),
    (r"$33.3\%$", "$1/3$", 0),
    (r"$\text{The answer is }5$", "$5$", 0),
    (r"$5\%$", "$0.05$", 1),
    (r"$\sqrt[4]{16}$", "$2$", 1),
    ("$f(x)=3x-2$", "$f(x)=-2+3x$", 1),
    ("$AB=5$", "$5$", 1),
    (r"$\angle A=30^\circ$", "$30$", 1),
    (r"$\pi r^2$", r"$\pi r^{2}$", 1),
    ("$9.99$", "$10$", 0),
    ("$1e-3$", "$0.001$", 0),
    (r"$\lfloor 3.5\rfloor$", "$3$", 1),
    (r"$\left|-4\right|$", "$4$", 1),
    ("$x_1=2, x_2=3$", "$2,3$", 1),
    (r"$\frac{2}{4}$", r"$\frac{1}{2}$", 1),
    (r"$\frac{\frac{1}{2}}{3}$", r"$\frac16$", 1),
    (r"$\dfrac{9}{2}\sqrt{5}$", r"$4.5\sqrt5$", 1),
    ("$-x$", "$x$", 0),
    (r"$\sin x\cos x$", r"$\frac{1}{2}\sin 2x$", 1),
    (r"$\arcsin\frac{1}{2}$", r"$\frac{\pi}{6}$", 1),
    (r"$k\in\mathbb{Z}$", r"$k\in\mathbb{Z}$", 1),
    (r"$\mathbb{Z}$", r"$\mathbb{Z}$", 1),
    (r"$\text{A, B}$", r"$\text{B, A}$", 0),
    ("$(1+i)^2$", "$2i$", 0),
    (r"$\boxed{4}$", "$4$", 1),
    ("$a^{-1}$", r"$\frac{1}{a}$", 1),
    (r"$\sqrt{-4}$", "$2i$", 0),
    ("$2x=6$", "$x=3$", 0),
    (r"$\{x\mid x>2\}$", r"$(2,\infty)$", 0),
    (r"$\{x|x>2\}$", "$x>2$", 0),
    (r"$\ne 3$", r"$\ne 3$", 1),
    (r"$x\neq 3$", r"$x\neq 3$", 1),
]
DISAGREED = {
    (r"\frac12", "1/2"): "it reads LaTeX between dollars only",
    (r"50\%", "1/2"): "likewise",
    ("1.5e3", "1500"): "it does not read exponents outside of LaTeX",
    ("1e100", "1"): "likewise: it reads 1",
    ("$12\\,345$", "$12345$"): "a thin space between thousands",
    (r"$0.\overline{3}$", "$1/3$"): "a repeating decimal",
    ("$i^2$", "$-1$"): "i is the imaginary unit",
    (r"$e^{i\pi}$", "$-1$"): "likewise",
    ("(A)", "A"): "a letter of multiple choice in its brackets",
    ("$x>3$", r"$(3,\infty)$"): "a solved inequality is its interval",
    ("$1<x<2$", "$(1,2)$"): "likewise",
    (r"$x\ge 3$", r"$[3,\infty)$"): "likewise",
    (r"$\cos 60^\circ$", "$0.5$"): "degrees in a function count",
    (r"$\sin(30^\circ)$", r"$\frac12$"): "likewise",
    (r"$0.5\overline{3}$", r"$\frac{8}{15}$"): "a repeating decimal",
    (r"$-1\le x\le 1$", "$[-1,1]$"): "a solved inequality is its interval",
    (r"$\int_0^1 x dx$", "$0.5$"): "integrals are not read",
    (r"$\sum_{i=1}^3 i$", "$6$"): "sums with bounds are not read",
    (r"$\text{The answer is }5$", "$5$"): "words inside of a formula",
    ("$1e-3$", "$0.001$"): "an exponent",
    ("$(1+i)^2$", "$2i$"): "i is the imaginary unit",
    (r"$\sqrt{-4}$", "$2i$"): "likewise",
    (r"$\{x\mid x>2\}$", r"$(2,\infty)$"): "the interval of a condition",
    (r"$\{x|x>2\}$", "$x>2$"): "likewise",
}
"""Where our verdict is the other one, and why it should be."""


@pytest.mark.parametrize(("answer", "reference", "verdict"), MATH_VERIFY)
def test_verdicts_are_those_of_math_verify(answer: str, reference: str, verdict: int) -> None:
    expected = 1 - verdict if (answer, reference) in DISAGREED else verdict
    assert judge(answer, reference) == expected


FOUND = [
    ("so \\boxed{1}, no: \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
    ("\\boxed{1} and $\\boxed{2}$", "1, 2"),
    ("\\boxed{\\boxed{3}}", "\\boxed{3}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed 5", "5"),
    ("\\boxed{1} is not closed: \\boxed{2", "1"),
    ("5 * 3 = <<5*3=15>>15\n#### 15", "15"),
    ("The final answer is: $\\frac{3}{4}$. I hope it is correct.", "$\\frac{3}{4}$"),
    ("**Answer:** 42", "42"),
    ("The answer is 42!", "42"),
    ("The answer is not easy, but 7.", "7"),
    ("所以答案是：12个。", "12个。"),
    ("First $x = 1$, so $y = 2$", "y = 2"),
    ("She pays $1,234 in all", "1,234"),
    ("<think>\\boxed{1}</think>It is \\boxed{2}", "2"),
    ("<answer>7</answer> or so 8", "7"),
    ("no idea", "no idea"),
    ("No idea!\nNone.", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), FOUND)
def test_final_answers_are_found(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


SAME = [
    ("答案是四十二。", "42"),
    ("答案：三分之二", "2/3"),
    ("所以答案是 1.2万元。", "12000"),
    ("答案是3亿", "300000000"),
    ("一共有 25 个苹果。", "25"),
    ("答案为百分之五十", "0.5"),
    ("因此，x＝３，答案是３", "3"),
    ("答：一百零三只", "103"),
    ("答案是负三", "-3"),
    ("答案是一亿两千万", "120000000"),
    ("答案是1和2", "2,1"),
    ("The answer is **42**.", "42"),
    ("Final answer: $12.50", "12.5"),
    ("\\boxed{x = 2 \\text{ or } x = 3}", "\\{3,2\\}"),
    ("\\boxed{5\\,\\mathrm{cm}^2}", "5"),
    ("\\boxed{60 km/h}", "60"),
    ("12 dollars per day", "12"),
    ("\\boxed{\\text{no solution}}", "no solution"),
    ("\\boxed{\\sum_{i=1}^n i}", "\\sum_{i=1}^n i"),
    ("The answer is (B).", "B"),
    ("1½", "1.5"),
    ("√12", "2√3"),
    ("2x²", "2x^2"),
    ("\\boxed{5!}", "120"),
    ("\\boxed{x \\in (-\\infty,-1)\\cup(2,\\infty)}", "(-\\infty,-1)\\cup(2,\\infty)"),
    ("\\boxed{1\\frac{3}{4}}", "7 \\div 4"),
    ("7 3/4", "7.75"),
    ("\\boxed{1,000,000}", "10^6"),
    ("\\boxed{b=2, a=1}", "a=1,b=2"),
    ("\\boxed{\\ln(2)}", "\\log_e 2"),
    ("\\boxed{9^{9^{9^9}}}", "\\boxed{9^{9^{9^9}}}"),
    ("\\boxed{\\sqrt[3]{-8}}", "-2"),
    ("\\boxed{\\lfloor 2.7 \\rfloor}", "2"),
    ("\\boxed{\\sin^{-1} 1}", "\\pi/2"),
    ("\\boxed{a_1 + a_{12}}", "a_{12} + a_1"),
    ("\\boxed{2x + 1 < y}", "y > 1 + 2x"),
]
DIFFERENT = [
    ("25%", "0.25%"),
    ("\\boxed{1/0}", "1"),
    ("\\boxed{0^{-1}}", "0"),
    ("\\boxed{1000!}", "1"),
    ("\\boxed{10^{10^{10}}}", "1"),
    ("\\boxed{1000001}", "1000000"),
    ("\\boxed{0.0000001}", "0.0000002"),
    ("\\boxed{2x + 1 > y}", "y > 1 + 2x"),
    ("\\boxed{(1,2,3)}", "(1,2)"),
    ("\\boxed{\\text{yes}}", "no"),
    ("\\boxed{}", "1"),
    ("\\boxed{x=}", "1"),
    ("\\boxed{)(}", "1"),
    ("\\boxed{\\frac{1}{2}", "1/3"),
]


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_equal_answers(answer: str, reference: str) -> None:
    assert judge(answer, reference) == 1


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different_answers(answer: str, reference: str) -> None:
    assert judge(answer, reference) == 0


def test_without_a_reference_nothing_is_judged() -> None:
    assert judge("\\boxed{1}", " ") is None


def test_settings() -> None:
    assert judge("the answer is 42", "42", boxed_only=True) == 0
    assert judge("\\boxed{42}", "42", boxed_only=True) == 1
    assert judge("3.14", "\\pi", tolerance=0.01) == 1
    assert judge("3.14", "\\pi") == 0


SLOW = [
    "42" * 3000, "\\boxed{" * 8000, "(" * 5000, "-" * 1500 + "1", "1+" * 900 + "1",
    "\\boxed{" + "(" * 190 + "}", "\\boxed{9^9^9^9^9^9}", "$" * 20_000, "\\(" * 5_000,
    "answer is " * 3000, "\\boxed{1}" + " " * 20_000 + "\\boxed{2}", "1" * 20_000,
    "1 " * 20_000, "<answer>" * 5000, "\\boxed{" + "1," * 95 + "}", "{" * 30_000, "一" * 20_000,
    "\\text{" * 5000, "\\boxed{" + "-" * 199 + "}", "\\boxed{\\matrix" + "&" * 190 + "}",
]  # fmt: skip


@pytest.mark.parametrize("answer", SLOW, ids=range(len(SLOW)))
def test_no_answer_takes_long_or_raises(answer: str) -> None:
    start = time.process_time()
    judge(answer, "17")
    judge("17", answer)
    assert time.process_time() - start < 0.5


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="0123456789.+-*/^_(){}[]|\\,;%=<> xyfracsqt十万点", max_size=40))
def test_any_text_is_itself_and_never_raises(text: str) -> None:
    assert judge(f"\\boxed{{{text}}}", "\\frac{1}{2}") in (0, 1)
    assert is_same_answer(text, text) in (True, False)


FRACTIONS = st.fractions(max_denominator=10**6, min_value=-(10**6), max_value=10**6)


@settings(max_examples=25, deadline=None)
@given(FRACTIONS)
def test_renderings_of_a_fraction_are_equal(value: Fraction) -> None:
    top, low = abs(value.numerator), value.denominator
    sign = "-" if value < 0 else ""
    plain = f"{value.numerator}/{low}"
    renderings = [
        f"{sign}\\frac{{{top}}}{{{low}}}",
        f"\\dfrac{{{value.numerator}}}{{{low}}}",
        f"{value.numerator} \\div {low}",
        f"{sign}{top}\\cdot {low}^{{-1}}",
        f"{sign}{top // low} + {sign}{top % low}/{low}",
        f"x = {sign}{top:,} / {low}",
    ]
    for rendering in renderings:
        assert is_same_answer(rendering, plain), rendering
        assert judge(f"It is $\\boxed{{{rendering}}}$", plain) == 1
        assert not is_same_answer(rendering, f"{value.numerator + 1}/{low}")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=5, unique=True))
def test_sets_have_no_order_and_tuples_have_one(numbers: list[int]) -> None:
    turned = numbers[1:] + numbers[:1]
    text, other = ", ".join(map(str, numbers)), ", ".join(map(str, turned))
    assert is_same_answer(rf"\{{{text}\}}", rf"\{{{other}\}}")
    assert not is_same_answer(f"({text})", f"({other})")


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(-9, 9)] * 4))
def test_products_equal_their_expansions(numbers: tuple[int, int, int, int]) -> None:
    a, b, c, d = numbers
    product = f"({a}x + {b})({c}x + {d})"
    expansion = f"{a * c}x^2 + {a * d + b * c}x + {b * d}"
    assert is_same_answer(product, expansion)
    assert not is_same_answer(product, f"{expansion} + 1")


def test_chinese_numerals() -> None:
    values = {
        "十": 10,
        "二十三": 23,
        "一百零五": 105,
        "两千": 2000,
        "一万二千": 12000,
        "三亿": 3 * 10**8,
    }
    assert {text: number_from_chinese(text) for text in values} == values
    assert number_from_chinese("三点一四") == Fraction(314, 100)


def test_trees_have_values() -> None:
    assert evaluate(parse("3x^2 + \\binom{4}{2}"), {"x": 2.0}) == 18
    for text in ("x", "1/0", "\\infty", "(1, 2)", "\\text{a b}", "2000!", "10^{400}*1.5\\pi"):
        with pytest.raises(NotMathError):
            evaluate(parse(text), {})
    for text in ("", "1 2", "(", "\\foo", "[1", "1)", "{}", "\\frac{1}", "x" * 3000):
        with pytest.raises(NotMathError):
            parse(text)


def test_boxes() -> None:
    assert last_boxed("none") is None
    assert last_boxed("\\boxed{1} far away from the other one, \\boxed{2}") == "2"
