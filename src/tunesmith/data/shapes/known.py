"""The table of shapes: which columns each has, under which names they are met, who reads them."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tunesmith.data.shapes.fields import MistakeError, is_truth
from tunesmith.data.shapes.labeled import LABEL_NAMES, TEXT_NAMES, from_labeled
from tunesmith.data.shapes.messages import from_messages, from_sharegpt
from tunesmith.data.shapes.pairs import (
    from_alpaca,
    from_completion,
    from_llama_chinese,
    from_question,
    from_text,
)
from tunesmith.data.shapes.preference import from_openai_preference, from_preference, from_rated
from tunesmith.data.shapes.prompts import (
    ANSWER_NAMES,
    PROMPT_COLUMNS,
    PROMPT_NAMES,
    from_prompt,
)
from tunesmith.types import Json, Origin, Sample

Parser = Callable[[dict[str, Json], Origin], Sample]


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape of rows: canonical columns (needed and possible), and its parser.

    `aliases` are other names that its columns have in this shape alone. A shape `on_request` is
    read only where the recipe asks for it: its columns are those of other shapes, too.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Parser
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    on_request: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """All canonical columns."""
        return (*self.required, *self.optional)


_TOOLS = ("tools", "functions")
_TURNS = ("system", "history")
_BEFORE = (*_TURNS, "reasoning")
_CHATS = ("messages", "conversations")

# The order decides which shape a row with the columns of several is taken for.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "openai-preference",
            ("input", "preferred_output", "non_preferred_output"),
            (),
            from_openai_preference,
        ),
        Shape(
            "preference",
            ("chosen", "rejected"),
            ("prompt", *_CHATS, "instruction", "input", "question", "context", *_TURNS, *_TOOLS),
            from_preference,
        ),
        Shape(
            "kto",
            ("label",),
            (*_CHATS, "instruction", "input", "output", "prompt", "completion", *_TURNS, *_TOOLS),
            from_rated,
        ),
        Shape("messages", ("messages",), ("system", *_TOOLS), from_messages),
        Shape("sharegpt", ("conversations",), ("system", *_TOOLS), from_sharegpt),
        Shape("alpaca", ("instruction", "output"), ("input", *_BEFORE, *_TOOLS), from_alpaca),
        Shape("completion", ("prompt", "completion"), (*_BEFORE, *_TOOLS), from_completion),
        Shape("qa", ("question", "answer"), ("context", *_BEFORE, *_TOOLS), from_question),
        Shape("text", ("text",), (), from_text),
        Shape("llama-chinese", ("text",), (), from_llama_chinese),
        Shape(
            "labeled",
            ("label",),
            ("text", *_CHATS, "system", *_TOOLS),
            from_labeled,
            {"label": LABEL_NAMES, "text": TEXT_NAMES},
            on_request=True,
        ),
        Shape(
            "prompt",
            (),
            (
                *(*PROMPT_COLUMNS, "answer", "reward_model"),
                *("input", "context", *_TURNS, *_TOOLS),
            ),
            from_prompt,
            {"answer": ANSWER_NAMES, "prompt": PROMPT_NAMES},
            on_request=True,
        ),
    )
}

# Other names under which a column is met, most telling first.
ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("dialog", "dialogue", "对话", "消息", "conversations", "conversation"),
    "conversations": ("conversation", "messages"),
    "instruction": ("指令",),
    "input": ("输入", "context", "上下文"),
    "output": ("输出", "response", "answer", "completion", "回答", "答案", "回复"),
    "prompt": ("query", "提示", "提示词", "input", "输入"),
    "completion": ("response", "target", "生成", "output", "输出", "content"),
    "question": ("问题", "问", "提问", "q", "title", "ask"),
    "answer": ("回答", "答案", "答", "答复", "回复", "a", "response", "reply"),
    "context": ("背景", "上下文", "资料", "参考", "background", "passage"),
    "system": ("system_prompt", "系统", "系统提示"),
    "history": ("历史",),
    "reasoning": ("reasoning_content", "thinking", "cot", "complex_cot", "思考", "推理"),
    "chosen": ("chosen_response", "response_chosen", "preferred", "better", "优选"),
    "rejected": ("rejected_response", "response_rejected", "dispreferred", "worse", "拒绝"),
    "label": ("kto_tag",),
    "text": ("content", "正文", "文本", "内容"),
}

# Other names of these columns say as much as their own: a row that has them and `messages` is not
# a plain conversation.
TELLING = ("label", "chosen", "rejected")

RAW = ("text", "llama-chinese")
"""Shapes that are tried last: data sets with columns often carry their texts put together too."""


def shape_of(row: Mapping[str, Json], fixed: Mapping[str, str]) -> tuple[Shape, dict[str, str]]:
    """The shape that a row's columns speak of, with canonical name -> name in the file.

    Args:
        row: the row.
        fixed: columns that the recipe maps; they come first, and the shape has to know them all.

    Raises:
        MistakeError: no shape fits (`data.columns`).
    """
    check_names(fixed)
    shapes = [shape for shape in SHAPES.values() if not shape.on_request]
    able = [shape for shape in shapes if set(fixed) <= set(shape.columns)]
    for are_raw in (False, True):
        for with_aliases in (False, True):
            for shape in (shape for shape in able if (shape.name in RAW) is are_raw):
                columns = columns_of(shape, row, fixed, with_aliases=with_aliases)
                if all(columns.get(name) in row for name in shape.required) and _means(
                    shape, row, columns
                ):
                    return shape, columns_of(shape, row, fixed, with_aliases=True)
    raise _no_shape(row, fixed)


def columns_of(
    shape: Shape, row: Iterable[str], fixed: Mapping[str, str], *, with_aliases: bool
) -> dict[str, str]:
    """Canonical name -> name in the file, for the shape's columns that the row has.

    Upper case, spaces around a name and between its words make no difference.
    """
    found = {column: fixed[column] for column in shape.columns if column in fixed}
    taken = set(fixed.values())
    there: dict[str, str] = {}
    for name in row:
        if name not in taken:
            plain = plain_name(name)
            there[plain] = name if plain == name else there.get(plain, name)
    for column in shape.columns:
        if column not in found and column in there:
            found[column] = there.pop(column)
    for column in shape.columns:
        if column not in found and (with_aliases or column in TELLING):
            known = shape.aliases.get(column, ALIASES.get(column, ()))
            other = next((name for name in known if name in there), None)
            if other is not None:
                found[column] = there.pop(other)
    return found


@functools.cache
def plain_name(name: str) -> str:
    """A column's name as the tables above spell it."""
    return "_".join(name.strip().lower().replace("-", " ").split())


def check_names(fixed: Iterable[str], shape: Shape | None = None) -> None:
    """Refuses mapped columns that the shape, or no shape at all, has.

    Raises:
        MistakeError: with the nearest name (`data.columns`).
    """
    shapes = [shape] if shape else SHAPES.values()
    known = list(dict.fromkeys(name for each in shapes for name in each.columns))
    for name in fixed:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            expected = f"one of: {', '.join(known)}"
            raise MistakeError(
                "data.columns",
                f"`{name}` among the recipe's columns" + (f" of {shape.name}" if shape else ""),
                f"`{near[0]}`, or {expected}" if near else expected,
            )


def _no_shape(row: Mapping[str, Json], fixed: Mapping[str, str]) -> MistakeError:
    found = f"columns {listed(row)}"
    missing = [name for name in fixed.values() if name not in row]
    if missing:
        return MistakeError("data.columns", found, f"`{missing[0]}`, mapped in the recipe")
    if "input_ids" in row:
        expected = "texts: token ids fit one tokenizer alone, so give what they were made from"
        return MistakeError("data.columns", found, expected)
    if fixed:
        found += f", of which {', '.join(fixed)} are mapped"
    shapes = "; ".join(dict.fromkeys(" + ".join(shape.required) for shape in SHAPES.values()))
    mapping = _near_mapping(row, fixed) or "{prompt: question, completion: answer}"
    expected = f"one of: {shapes}; other names are mapped in the recipe, e.g. columns: {mapping}"
    return MistakeError("data.columns", found, expected)


def _near_mapping(row: Iterable[str], fixed: Mapping[str, str]) -> str | None:
    """A mapping for a name that seems to be misspelled."""
    known = {name for shape in SHAPES.values() for name in shape.required} - set(fixed)
    for name in row:
        near = difflib.get_close_matches(plain_name(name), known, n=1, cutoff=0.8)
        if near and near[0] not in row:
            return f"{{{near[0]}: {name}}}"
    return None


def _means(shape: Shape, row: Mapping[str, Json], columns: Mapping[str, str]) -> bool:
    """Whether a row that has a shape's columns has what it means by them."""
    if shape.name == "kto":  # `label` is a common column: it must be a yes or no, beside an answer
        label = row[columns["label"]]
        has_answer = "completion" in columns or "output" in columns
        has_prompt = any(name in columns for name in ("prompt", "instruction", "input"))
        is_chat = "messages" in columns or "conversations" in columns
        is_whole = is_chat or (has_prompt and has_answer)
        return is_whole and is_truth(label)
    if shape.name in ("messages", "sharegpt"):  # `dialogue` may as well be one long text
        column = shape.required[0]
        value = row[columns[column]]
        is_list = isinstance(value, list) or str(value).lstrip().startswith("[")
        return is_list or plain_name(columns[column]) == column
    return True


def listed(row: Iterable[str]) -> str:
    """The first columns of a row, for a message."""
    return ", ".join(list(row)[:12]) or "(none)"
