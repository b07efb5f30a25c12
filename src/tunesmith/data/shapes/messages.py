"""The row shapes that people have, each read into a canonical sample."""

from __future__ import annotations

import json
from typing import cast

from tunesmith.types import Completion, Conversation, Json, Message, Origin, Role, ToolCall

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role names of all formats."""


class MistakeError(Exception):
    """What is wrong with a row; the caller knows where it is."""

    def __init__(self, code: str, found: str, expected: str) -> None:
        super().__init__(code, found, expected)
        self.code = code
        self.found = found
        self.expected = expected


def from_messages(row: dict[str, Json], origin: Origin) -> Conversation:
    """OpenAI's chat format: messages, tools, tool_calls, weight, the older function_call."""
    items = _objects(row["messages"], "messages")
    messages = tuple(_message(item, f"messages[{i}]") for i, item in enumerate(items))
    tools = _tools(row.get("tools"))
    if row.get("functions"):
        functions = _objects(row["functions"], "functions")
        tools += tuple(_as_tool(function) for function in functions)
    return _conversation(messages, tools, origin)


def from_sharegpt(row: dict[str, Json], origin: Origin) -> Conversation:
    """ShareGPT's `conversations` with `from` and `value` (or role and content)."""
    messages: list[Message] = []
    if row.get("system"):
        messages.append(Message("system", _text(row["system"], "system")))
    for index, item in enumerate(_objects(row["conversations"], "conversations")):
        where = f"conversations[{index}]"
        name = item.get("from", item.get("role"))
        role = _role(name, where)
        content = _text(item.get("value", item.get("content")), f"{where}.value")
        if name == "function_call":
            messages.append(Message(role, None, tool_calls=_calls_in_text(content, where)))
        else:
            messages.append(Message(role, content))
    return _conversation(tuple(messages), _tools(row.get("tools")), origin)


def from_alpaca(row: dict[str, Json], origin: Origin) -> Conversation:
    """Alpaca's instruction, input, output with optional system and history."""
    messages: list[Message] = []
    if row.get("system"):
        messages.append(Message("system", _text(row["system"], "system")))
    history = row.get("history") or []
    if not isinstance(history, list):
        raise MistakeError("data.history", _show(history), "a list of [question, answer] pairs")
    for index, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise MistakeError("data.history", _show(turn), "a [question, answer] pair in history")
        messages.append(Message("user", _text(turn[0], f"history[{index}][0]")))
        messages.append(Message("assistant", _text(turn[1], f"history[{index}][1]")))
    instruction = _text(row["instruction"], "instruction")
    extra = _text(row["input"], "input") if row.get("input") else ""
    question = "\n".join(part for part in (instruction, extra) if part)
    messages.append(Message("user", question))
    messages.append(Message("assistant", _text(row["output"], "output")))
    return _conversation(tuple(messages), (), origin)


def from_completion(row: dict[str, Json], origin: Origin) -> Completion | Conversation:
    """Prompt and completion: two texts, or two lists of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return from_messages({**row, "messages": [*prompt, *completion]}, origin)
    answer = _text(completion, "completion")
    if not answer.strip():
        raise MistakeError("data.empty-answer", "an empty completion", "some text to learn")
    return Completion(_text(prompt, "prompt"), answer, origin)


def _conversation(
    messages: tuple[Message, ...], tools: tuple[dict[str, Json], ...], origin: Origin
) -> Conversation:
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        roles = ", ".join(message.role for message in messages) or "no messages"
        raise MistakeError("data.no-assistant", roles, "at least one assistant message to learn")
    for message in answers:
        if not (message.content or "").strip() and not message.tool_calls and message.weight:
            raise MistakeError(
                "data.empty-answer",
                "an assistant message without text or tool calls",
                "something to learn, or `weight: 0`",
            )
    return Conversation(messages, origin, tools)


def _message(item: dict[str, Json], where: str) -> Message:
    role = _role(item.get("role"), where)
    content = item.get("content")
    calls = _tool_calls(item.get("tool_calls"), where)
    if isinstance(item.get("function_call"), dict):
        calls += (_function(cast("dict[str, Json]", item["function_call"]), where),)
    reasoning = item.get("reasoning_content", item.get("reasoning"))
    name = item.get("name")
    return Message(
        role,
        None if content is None and calls else _text(content, f"{where}.content"),
        tool_calls=calls,
        reasoning=reasoning if isinstance(reasoning, str) else None,
        name=name if isinstance(name, str) else None,
        weight=_weight(item.get("weight"), role, where),
    )


def _weight(value: Json, role: Role, where: str) -> float:
    if value is None:
        return 1.0
    if role != "assistant":
        raise MistakeError("data.weight", f"{where}.weight on a {role} message", "no weight there")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise MistakeError("data.weight", f"{where}.weight = {_show(value)}", "a number, 0 to 1")
    return float(value)


def _role(value: Json, where: str) -> Role:
    if isinstance(value, str) and value.lower() in ROLES:
        return ROLES[value.lower()]
    raise MistakeError(
        "data.bad-role",
        f"{where} with role {_show(value)}",
        "system, user, assistant or tool (human and gpt in ShareGPT)",
    )


def _tool_calls(value: Json, where: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    calls: list[ToolCall] = []
    for index, item in enumerate(_objects(value, f"{where}.tool_calls")):
        function = item.get("function", item)
        if not isinstance(function, dict):
            raise MistakeError(
                "data.tool-call", f"{where}.tool_calls[{index}]", "an object with `function`"
            )
        calls.append(_function(function, f"{where}.tool_calls[{index}]"))
    return tuple(calls)


def _function(function: dict[str, Json], where: str) -> ToolCall:
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise MistakeError("data.tool-call", f"{where} without a name", "a function name")
    if not isinstance(arguments, str):
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
    try:
        is_object = isinstance(json.loads(arguments or "{}"), dict)
    except ValueError as error:
        raise MistakeError(
            "data.tool-call", f"{where}: arguments that are no JSON ({error})", "a JSON object"
        ) from None
    if not is_object:
        raise MistakeError("data.tool-call", f"{where}: arguments {arguments}", "a JSON object")
    return ToolCall(name, arguments or "{}")


def _calls_in_text(text: str, where: str) -> tuple[ToolCall, ...]:
    """ShareGPT's function_call turns: the call is JSON text."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise MistakeError(
            "data.tool-call", f"{where}: a function_call that is no JSON ({error})", "JSON"
        ) from None
    return _tool_calls(cast("Json", value if isinstance(value, list) else [value]), where)


def _tools(value: Json) -> tuple[dict[str, Json], ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except ValueError as error:
            raise MistakeError(
                "data.tools", f"tools that are no JSON ({error})", "a JSON array"
            ) from None
    if not value:
        return ()
    tools = _objects(value, "tools")
    return tuple(tool if "function" in tool else _as_tool(tool) for tool in tools)


def _as_tool(function: dict[str, Json]) -> dict[str, Json]:
    """OpenAI's wrapper around a bare function object."""
    return {"type": "function", "function": function}


def _objects(value: Json, where: str) -> list[dict[str, Json]]:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return cast("list[dict[str, Json]]", value)
    raise MistakeError(
        "data.bad-type", f"{where} = {_show(value)}", f"{where} as a list of objects"
    )


def _text(value: Json, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):  # OpenAI's content parts
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else 0
            for part in value
        ]
        if value and all(isinstance(text, str) for text in texts):
            return "".join(cast("list[str]", texts))
    raise MistakeError("data.bad-type", f"{where} = {_show(value)}", f"{where} as text")


def _show(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
