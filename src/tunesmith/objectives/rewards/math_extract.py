"""Finds the final answer in a text that explains it."""

from __future__ import annotations

import re

from tunesmith.objectives.rewards.math_equal import parsed
from tunesmith.objectives.rewards.math_tree import Words, walk

MAX_LINE = 400
"""Characters that are looked at behind `answer is`."""
MAX_BETWEEN = 30
"""Characters between two boxes that are one answer."""

_BOXED = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{)|\\boxed\s+(\S+)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"[\s$.,;，、。]*(?:and|or|和|或|与)?[\s$.,;，、。]*")
_SAID = re.compile(
    r"(?:final\s+answer|answer|result|solution)\s*\**\s*(?:is|are|=|:)+\s*:?"
    r"|(?:答案|结果|結果|得数)\s*\**\s*(?:应该|应)?(?:是|为|為|等于|[:：=])+\s*|答\s*[:：]",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\.(?=\s+\S)|[。；!！?？](?=\s*\S)")
_FORMULA = re.compile(
    r"\$\$(.{1,400}?)\$\$|\$(.{1,400}?)\$|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.DOTALL
)
_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?(?:[eE][+-]?\d+)?"
    r"(?:\s?\\?%|\s?[万亿]+)?"
)
_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*)</answer>", re.DOTALL)


def final_answer(text: str, *, is_boxed_only: bool = False) -> str | None:
    r"""The final answer in a text, None if nothing looks like one.

    What stands behind `</think>` and inside of the last `<answer>` is looked at, for, in this
    order: the last `\boxed{}` (or several side by side), `#### 42`, `the answer is`, 答案是, the
    whole text where it is nothing but an answer, its last formula, its last number.
    """
    text = text.rpartition("</think>")[2]
    tagged = _ANSWER_TAG.findall(text)
    text = str(tagged[-1]) if tagged else text
    boxed = last_boxed(text)
    if boxed is not None or is_boxed_only:
        return boxed
    if "####" in text:
        return _first_line(text.rpartition("####")[2])
    said = list(_SAID.finditer(text))
    if said:
        found = _in_sentence(text[said[-1].end() :])
        if found is not None:
            return found
    text = text.strip()
    if len(text) <= MAX_LINE and "\n" not in text and _is_answer(text):
        return text
    formulas = [next(group for group in found if group) for found in _FORMULA.findall(text)]
    if formulas:
        return formulas[-1].strip()
    return last_number(text)


def reference_answer(text: str) -> str:
    """The final answer of a data row's own text, which may be nothing but a formula."""
    text = text.strip()
    answer = final_answer(text)
    # Of a formula that is not read, such as a sum with bounds, the last number is no answer.
    is_formula = "\\" in text and "\n" not in text and not _FORMULA.search(text)
    if answer is None or (is_formula and answer == last_number(text)):
        return text
    return answer


def last_boxed(text: str) -> str | None:
    r"""What is inside of the last `\boxed{}`, or of the last ones side by side, with commas."""
    contents: list[str] = []
    end = 0
    closings: dict[int, int] | None = None
    for found in _BOXED.finditer(text):
        if found.start() < end:
            continue  # a box inside of a box
        if found[1]:
            content, next_end = found[1], found.end()
        else:
            closings = _closing_braces(text) if closings is None else closings
            closing = closings.get(found.end())
            if closing is None:
                continue
            content, next_end = text[found.end() + 1 : closing], closing + 1
        between = text[end : found.start()]
        if len(between) > MAX_BETWEEN or not _BETWEEN_BOXES.fullmatch(between):
            contents = []
        contents.append(content.strip().rstrip("$"))
        end = next_end
    return ", ".join(contents) if contents else None


def last_number(text: str) -> str | None:
    """The last number in a text, such as `1,234`, `3/4`, `50%` or `1.2万`."""
    numbers = [found[0].strip() for found in _NUMBER.finditer(text)]
    return numbers[-1] if numbers else None


def _closing_braces(text: str) -> dict[int, int]:
    """Where each opening brace is closed; one pass, since a model may write thousands of boxes."""
    closings: dict[int, int] = {}
    opened: list[int] = []
    for found in _BRACE.finditer(text):
        if found[0] == "{":
            opened.append(found.start())
        elif found[0] == "}" and opened:
            closings[opened.pop()] = found.start()
    return closings


def _first_line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else None


def _is_answer(text: str) -> bool:
    """Whether a text is mathematics without words, units aside, or some words alone."""
    node = parsed(text)
    if node is None or isinstance(node, Words):
        return node is not None
    return not any(isinstance(part, Words) for part in walk(node))


def _in_sentence(text: str) -> str | None:
    """The answer in the rest of a sentence: all of it, its first formula, or its first number."""
    line = (_first_line(text[: 4 * MAX_LINE]) or "")[:MAX_LINE].strip("*_` ")
    if not line:
        return None
    sentence = _SENTENCE_END.split(line, maxsplit=1)[0].strip("*_` ")
    sentence = sentence if "$" in sentence else sentence.rstrip("!！")  # no factorial, but joy
    if _is_answer(sentence):
        return sentence
    formula = _FORMULA.search(sentence)
    if formula:
        return next(group for group in formula.groups() if group).strip()
    number = _NUMBER.search(sentence)
    return number[0].strip() if number else sentence
