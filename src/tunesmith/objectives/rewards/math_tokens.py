"""Splits a mathematical answer, LaTeX or plain, English or Chinese, into tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from tunesmith.objectives.rewards.math_tree import NotMathError

MAX_CHARACTERS = 2_000
"""Of an answer that is taken for mathematics."""
MAX_TOKENS = 200
"""Of it; this also bounds how deep its tree can be, far below Python's limit of recursion."""

TokenKind = Literal["number", "symbol", "function", "command", "words", "separator", "mark"]


@dataclass(frozen=True)
class Token:
    """A piece of the text; `mark` is any single sign, `words` a unit or a name."""

    kind: TokenKind
    text: str


FUNCTIONS = {
    **{name: name for name in ("sin", "cos", "tan", "sec", "csc", "cot", "exp", "log", "ln")},
    **{name: name for name in ("sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "abs")},
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
    "tg": "tan",
    "ctg": "cot",
    "lg": "log",
    "floor": "floor",
    "ceil": "ceil",
}
GREEK = frozenset(
    re.findall(
        r"\w+",
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu "
        "xi rho sigma tau phi varphi chi psi omega "
        "Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega",
    )
)
UNITS = frozenset(
    re.findall(
        r"\w+",
        "cm mm km kg mg ml dm ft lb lbs oz hr hrs min mins sec ms mph kmh usd eur rmb cny yd mi "
        "per day days hour year week men cup cups box boxes pm am deg rad pts pt of the for in to",
    )
)
"""Short words that would else be read as a product of letters."""
SHORT_UNITS = frozenset("mghsLN")
"""Units where they are set as text in LaTeX; elsewhere they are variables."""
PRODUCT_LETTERS = frozenset("abckmnpqrstxyz")

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "∙": r"\cdot ", "⋅": r"\cdot ",
    "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "±": r"\pm ", "∪": r"\cup ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "ℝ": r"\mathbb{R}",
    "∅": r"\emptyset ", "²": "^{2}", "³": "^{3}", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "°": r"^\circ ", "℃": "",
    "￥": "", "¥": "", "€": "", "£": "", "　": " ", "，": ";", "、": ";", "；": ";", "。": ".",
    "【": "[", "】": "]", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
}  # fmt: skip
_TRANSLATION = str.maketrans(
    {**{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}, **_SIGNS}
)

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\{,\}|(?<=\d),\\!\s*(?=\d{3}(?!\d))|\\(?:measured)?angle(?![a-zA-Z])", ""),
        (r"(?<=\d)\\[,!;: ](?=\d{3}(?!\d))", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits)(?![a-zA-Z])\.?", ""),
        (r"\\[,!;: ]|\\(?:quad|qquad|hspace\{[^{}]*\})(?![a-zA-Z])|~", " "),
        (
            r"\\?(sin|cos|tan|sec|csc|cot)\s*[({]?\s*(\d+(?:\.\d+)?)"
            r"\s*\^\s*\{?\\circ\s?\}?[)}]?",
            r"\\\1(\2\\pi/180)",
        ),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![a-zA-Z])|\\[$]|[$]", ""),
        (r"\\%", "%"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\begin\{[pbBvV]?matrix\}", r"\\matrix "),
        (r"\\end\{[pbBvV]?matrix\}", r"\\endmatrix "),
        (r"\\mathbb\s*\{?R\}?|\\R(?![a-zA-Z])", r"\\reals "),
        (r"\*\*", "^"),
        (r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt "),
        (r"\\hline|\\boxed(?![a-zA-Z])|\\fbox(?![a-zA-Z])", ""),
    )
]
_TOKEN = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|operatorname\*?|rm)"
    r"\s*\{(?P<said>[^{}]*)\}"
    r"|(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d{1,4}(?![\dA-Za-z]))?|\.\d+)"
    r"|\\(?P<command>[a-zA-Z]+|[{}|\\])"
    r"|(?P<word>[A-Za-z]+)"
    r"|(?P<chinese>[\u3400-\u9fff]+)"
    r"|(?P<mark><=|>=|!=|==|\S)"
)
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\d.])\d{1,3}(?: \d{3})+(?!\d)")
_REPEATING = re.compile(r"(\d+)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}")
_JOINERS = frozenset({"and", "or", "和", "或", "或者", "与", "以及", "及"})

_DIGITS = {**dict(zip("〇一二三四五六七八九", range(10), strict=True)), "零": 0, "两": 2}
_PLACES = {"十": 10, "百": 100, "千": 1000}
_SCALES = {"万": 10**4, "亿": 10**8}
_NUMERAL = "〇零一二两三四五六七八九十百千万亿"
_CHINESE = [
    (re.compile(rf"百分之([{_NUMERAL}点]+|\d+(?:\.\d+)?)"), r"\1%"),
    (
        re.compile(rf"([{_NUMERAL}]+|\d+)分之([{_NUMERAL}]+|\d+)"),
        lambda found: rf"\frac{{{_plain(found[2])}}}{{{_plain(found[1])}}}",
    ),
    (re.compile(r"^\s*[负負]"), "-"),
    (
        re.compile(r"(\d+(?:\.\d+)?)\s*([万亿]+)"),
        lambda found: str(_decimal(Fraction(found[1]) * _scale(found[2]))),
    ),
    (re.compile(rf"[{_NUMERAL}]+(?:点[{_NUMERAL}]+)?"), lambda found: _plain(found[0])),
]


def tokenize(text: str) -> list[Token]:
    """The tokens of an answer.

    Raises:
        NotMathError: it is too long.
    """
    if len(text) > MAX_CHARACTERS:
        raise NotMathError("too long")
    tokens: list[Token] = []
    for found in _TOKEN.finditer(_rewritten(text)):
        kind = found.lastgroup or "mark"
        tokens.extend(_READERS[kind](found[kind]))
        if len(tokens) > MAX_TOKENS:
            raise NotMathError("too long")
    return tokens


def number_from_chinese(text: str) -> Fraction:
    """The value of a Chinese numeral up to 亿亿, such as 三百零二, 一亿两千万 or 三点一四.

    Raises:
        NotMathError: it is none, such as 十十.
    """
    whole, _, decimals = text.partition("点")
    value = Fraction(_whole_from_chinese(whole))
    for place, digit in enumerate(decimals, start=1):
        value += Fraction(_DIGITS.get(digit, 0), 10**place)
    return value


def _whole_from_chinese(text: str) -> int:
    if all(character in _DIGITS for character in text):
        return int("".join(str(_DIGITS[character]) for character in text))  # 二〇二六
    total = section = 0
    digit: int | None = None
    for character in text:
        if character in _DIGITS:
            digit = _DIGITS[character]
        elif character in _PLACES:
            section += (1 if digit is None else digit) * _PLACES[character]
            digit = None
        else:
            scale = _SCALES[character]
            section += digit or 0
            total = total + section * scale if section else max(total, 1) * scale
            section, digit = 0, None
    if section + (digit or 0) + total == 0 and "零" not in text:
        raise NotMathError("no numeral")
    return total + section + (digit or 0)


def _scale(text: str) -> int:
    scale = 1
    for character in text:
        scale *= _SCALES[character]
    return scale


def _plain(text: str) -> str:
    return text if text[:1].isdecimal() else str(_decimal(number_from_chinese(text)))


def _decimal(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else str(float(value))


def _rewritten(text: str) -> str:
    text = text.translate(_TRANSLATION).strip().rstrip(".,;:?* ").strip()
    text = _REPEATING.sub(_repeating_decimal, text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if any("\u3007" <= character <= "\u9fff" for character in text):
        for pattern, replacement in _CHINESE:
            text = pattern.sub(replacement, text)
    # Inside of brackets "1,234" may be two things, outside it is one number.
    if text.lstrip(" \\")[:1] not in ("(", "[", "{"):
        text = _GROUPED.sub(lambda found: re.sub("[, ]", "", found[0]), text)
    return text


def _repeating_decimal(found: re.Match[str]) -> str:
    whole, fixed, repeated = found[1], found[2], found[3]
    value = Fraction(int(whole + fixed)) + Fraction(int(repeated), 10 ** len(repeated) - 1)
    value /= 10 ** len(fixed)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _read_word(text: str) -> list[Token]:
    lower = text.lower()
    if lower in _JOINERS:
        return [Token("separator", ";")]
    if lower in FUNCTIONS:
        return [Token("function", FUNCTIONS[lower])]
    if lower in ("sqrt", "pi", "infty", "infinity", "inf", "oo"):
        return [Token("command", {"sqrt": "sqrt", "pi": "pi"}.get(lower, "infty"))]
    is_unit = lower in UNITS or len(text) > 3
    if len(text) > 1 and (is_unit or (len(text) == 3 and not PRODUCT_LETTERS.issuperset(lower))):
        return [Token("words", text)]
    return [Token("symbol", letter) for letter in text]


def _read_said(text: str) -> list[Token]:
    """Text inside of LaTeX: a joiner, a function, a number, one letter, or words."""
    content = text.strip().strip("()").strip()
    if re.fullmatch(r"[\d.,\s]+", content) or content.lower() in _JOINERS:
        return tokenize(content)
    if content in SHORT_UNITS:
        return [Token("words", content)]
    if content.lower() in FUNCTIONS or len(content) == 1:
        return _read_word(content)
    return [Token("words", content)] if content else []


def _read_command(name: str) -> list[Token]:
    if name in FUNCTIONS:
        return [Token("function", FUNCTIONS[name])]
    if name in GREEK:
        return [Token("symbol", name)]
    return [Token("command", name)]


def _read_chinese(text: str) -> list[Token]:
    if text in _JOINERS:
        return [Token("separator", ";")]
    return [Token("words", text)]


def _read_mark(text: str) -> list[Token]:
    return [Token("separator" if text in ",;" else "mark", "=" if text == "==" else text)]


_READERS = {
    "said": _read_said,
    "number": lambda text: [Token("number", text)],
    "command": _read_command,
    "word": _read_word,
    "chinese": _read_chinese,
    "mark": _read_mark,
}
