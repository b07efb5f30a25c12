"""Anthropic's content blocks (tool_use, tool_result, thinking) as messages of OpenAI's form."""

from __future__ import annotations

from tunesmith.data.shapes.fields import MistakeError, root, show, text
from tunesmith.types import Json

BLOCKS = ("tool_use", "tool_result", "thinking", "redacted_thinking")
"""Types of content blocks that only Anthropic's messages have."""


def as_openai(item: dict[str, Json], where: str) -> list[dict[str, Json]]:
    """The messages that one message stands for: itself, but for one with Anthropic's blocks.

    Tool results stand inside a user message there, so they become messages of their own in front
    of what else the user says. Redacted thoughts are left out: nobody can read them.
    """
    content = item.get("content")
    if not isinstance(content, list) or not any(_type_of(block) in BLOCKS for block in content):
        return [item]
    results: list[dict[str, Json]] = []
    calls: list[Json] = []
    thoughts: list[str] = []
    others: list[Json] = []
    for block in content:
        match block:
            case {"type": "tool_result"}:
                results.append({"role": "tool", "content": block.get("content") or ""})
            case {"type": "tool_use"}:
                calls.append({"name": block.get("name"), "arguments": block.get("input")})
            case {"type": "thinking"}:
                thoughts.append(text(block.get("thinking"), f"{where}.thinking"))
            case {"type": "redacted_thinking"}:
                pass
            case _:
                others.append(block)
    if not others and not calls and not thoughts:
        return results
    if calls and results:
        found = f"{where} = {show(content)}"
        expected = "calls in the assistant's message, results in the user's"
        raise MistakeError("data.tool-call", found, expected, root(where))
    rest: dict[str, Json] = {**item, "content": others or None}
    if calls:
        rest["tool_calls"] = calls
    if thoughts:
        rest["reasoning_content"] = "\n\n".join(thoughts)
    return [*results, rest]


def tool_of_anthropic(tool: dict[str, Json]) -> dict[str, Json]:
    """A function object whose parameters stand under Anthropic's name for them, or as it is."""
    if "input_schema" not in tool:
        return tool
    others = {name: value for name, value in tool.items() if name != "input_schema"}
    return {**others, "parameters": tool["input_schema"]}


def _type_of(block: Json) -> Json:
    return block.get("type") if isinstance(block, dict) else None
