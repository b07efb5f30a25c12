"""Rows of a text, or a conversation, and the label that a classifier learns to tell."""

from __future__ import annotations

from tunesmith.data.shapes.fields import MistakeError, show, text
from tunesmith.data.shapes.messages import check_order, check_tools, prompt_messages, read_tools
from tunesmith.types import Conversation, Json, Labeled, Origin, Text

CONTENT_COLUMNS = ("messages", "conversations", "text")
"""What is to be labeled stands in one of these."""

LABEL_NAMES = ("category", "class", "标签", "类别", "分类")
TEXT_NAMES = (
    *("sentence", "content", "input", "question", "review"),
    *("文本", "内容", "正文", "句子", "问题", "评论"),
)
"""Other names of `label` and `text`, here alone: elsewhere these columns are something else."""


def from_labeled(row: dict[str, Json], origin: Origin) -> Labeled:
    """A text or a conversation with its label: a text, a whole number, or true or false."""
    return Labeled(content_of(row, origin), label_of(row["label"]))


def label_of(value: Json) -> str:
    """A label as text; numbers and truths as JSON spells them."""
    label = value.strip() if isinstance(value, str) else ""
    if isinstance(value, bool):
        label = "true" if value else "false"
    elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        label = str(int(value))  # tables with empty cells hold whole numbers as floats
    if not label:
        expected = "a text, a whole number, or true or false"
        raise MistakeError("data.label", f"label = {show(value)}", expected, "label")
    return label


def content_of(row: dict[str, Json], origin: Origin) -> Conversation | Text:
    """What is to be labeled; a conversation may end with anyone's message."""
    column = next((name for name in CONTENT_COLUMNS if row.get(name) is not None), None)
    if column is None:
        found = f"columns {', '.join(row)}"
        raise MistakeError("data.columns", found, "a `text` or `messages` to label")
    if column == "text":
        content = text(row["text"], "text")
        if not content.strip():
            raise MistakeError("data.empty-text", "an empty text", "some text to label", "text")
        return Text(content, origin)
    messages, tools = prompt_messages(row, column), read_tools(row)
    if not messages:
        raise MistakeError("data.empty-text", "no messages", "a conversation to label", column)
    check_order(messages)
    check_tools(messages, tools)
    return Conversation(messages, origin, tools)
