"""Whether the prompt and answer columns look swapped, judged over a sample of rows."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Final

from tunesmith.data.check.labels import common_start

_MIN_ROWS: Final = 20
_SAMPLE_ROWS: Final = 2_000
_MIN_SHARE: Final = 0.35  # of the answers that must read like requests
_TIMES_MORE: Final = 4  # than the prompts that do
_LENGTH_RATIO: Final = 1.5  # swapped "prompts" are the real answers, and longer
_MIN_COMMON: Final = 4  # characters of an instruction that all answers begin with
_COMMON_SHARE: Final = 0.9

_ENDS_AS_QUESTION: Final = re.compile(r"[?？][\s\"'”’)）]*$|[吗呢么]$")
_STARTS_AS_REQUEST: Final = re.compile(
    r"\s*(?:(?:what|how|why|who|when|where|which|can you|could you|would you|please|"
    r"is there|are there|describe|explain|write|generate|create|give|list|name|find|identify|"
    r"classify|categorize|summarize|rewrite|rephrase|edit|convert|translate|calculate|compute|compare|provide|suggest|"
    r"tell me|design|develop|construct|compose|come up with|propose|analyze|evaluate|determine|"
    r"discuss|predict|outline|make a|make up|add|replace|arrange|change|correct|detect|check|fix|"
    r"answer|choose|select|sort|reverse|formulate|brainstorm|recommend|predict|extract|output|"
    r"given (?:a|an|the|two|three|these|this)|imagine|using the|in this task|based on|take the|"
    r"transform|turn|state|produce|organize|draft|research|act as)\b"
    r"|请|帮|你能|能否|如何|怎么|怎样|什么|为什么|哪|谁|写|描述|解释|列出|列举|生成|创建|创作|给出|给定|给我|"
    r"总结|概括|翻译|改写|重写|编辑|编写|撰写|设计|计算|比较|分析|分类|检测|检查|纠正|修改|判断|识别|找出|"
    r"提供|推荐|回答|将|把|根据|使用|提出|评估|说明|确定|构造|制定|制作|想象|建议|介绍|查找|"
    r"讨论|预测|选择|输入|告诉|转换|替换|填|基于|构建)",
    re.IGNORECASE,
)


def looks_swapped(pairs: Sequence[tuple[str, str]]) -> str | None:
    """Why the columns of these (prompt, answer) rows look swapped, with figures, or None.

    Two signs are enough each: far more answers than prompts read like a question or a request,
    while the prompts are longer; or nearly all answers begin with one and the same request.
    Labels, summaries and rewriting do not fire, because there the prompts read like requests or
    the answers do not.

    Not caught: swapped rows whose prompts neither ask nor order (translation pairs, dialogue),
    samples under 20 rows, and languages other than English and Chinese. A set that teaches to
    write questions about bare passages looks just like a swapped one, and is reported.
    """
    rows = _sample([pair for pair in pairs if pair[0].strip() and pair[1].strip()])
    if len(rows) < _MIN_ROWS:
        return None
    prompts = [prompt for prompt, _ in rows]
    answers = [answer for _, answer in rows]
    return _requests_in_answers(prompts, answers) or _instruction_before_answers(prompts, answers)


def _sample(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Evenly spaced rows: files are often sorted by kind, so their beginning is not typical."""
    step = max(1, len(pairs) // _SAMPLE_ROWS)
    return pairs[::step]


def _requests_in_answers(prompts: list[str], answers: list[str]) -> str | None:
    in_prompts = sum(map(_is_request, prompts)) / len(prompts)
    in_answers = sum(map(_is_request, answers)) / len(answers)
    if in_answers < max(_MIN_SHARE, _TIMES_MORE * in_prompts):
        return None
    of_prompts, of_answers = _median_length(prompts), _median_length(answers)
    if of_prompts < _LENGTH_RATIO * of_answers:
        return None
    return (
        f"{in_answers:.0%} of the answers read like questions or requests, but only "
        f"{in_prompts:.0%} of the prompts; half of the prompts are longer than {of_prompts:.0f} "
        f"characters, half of the answers longer than {of_answers:.0f}"
    )


def _instruction_before_answers(prompts: list[str], answers: list[str]) -> str | None:
    opening = _common_opening(answers).strip().partition("\n")[0]
    if len(opening) < _MIN_COMMON or not _STARTS_AS_REQUEST.match(opening):
        return None
    if len(set(answers)) < _COMMON_SHARE * len(answers):
        return None  # repeated answers are labels
    if sum(map(_is_request, prompts)) > (1 - _COMMON_SHARE) * len(prompts):
        return None
    share = sum(answer.lstrip().startswith(opening) for answer in answers) / len(answers)
    return f'{share:.0%} of the answers begin with the request "{opening[:60]}"'


def _common_opening(texts: list[str]) -> str:
    """What nine of ten texts begin with: the common prefix of the middle of the sorted list."""
    ranked = sorted(texts)
    margin = int(len(ranked) * (1 - _COMMON_SHARE) / 2)
    return common_start([ranked[margin], ranked[-1 - margin]])


def _is_request(text: str) -> bool:
    text = text.strip()
    return bool(_STARTS_AS_REQUEST.match(text) or _ENDS_AS_QUESTION.search(text[-12:]))


def _median_length(texts: list[str]) -> float:
    return statistics.median(map(len, texts))
