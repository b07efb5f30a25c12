"""Conversations as lists of messages: OpenAI's format, ShareGPT's, and what both hold in common."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import cast

from tunesmith.data.shapes.blocks import as_openai, tool_of_anthropic
from tunesmith.data.shapes.fields import (
    MistakeError,
    first_of,
    from_json_text,
    json_value,
    objects,
    optional_text,
    root,
    show,
    text,
)
from tunesmith.types import Conversation, Json, Message, Origin, Role, ToolCall

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role names of all formats."""

CALL_TURNS = ("function_call", "tool_call")
"""Roles (ShareGPT's, ms-swift's) whose content is the JSON of calls."""


def from_messages(row: dict[str, Json], origin: Origin) -> Conversation:
    """OpenAI's chat format: messages, tools, tool_calls, weight, the older function_call."""
    return conversation(prompt_messages(row, "messages"), read_tools(row), origin)


def from_sharegpt(row: dict[str, Json], origin: Origin) -> Conversation:
    """ShareGPT's `conversations` with `from` and `value` (or role and content)."""
    return conversation(prompt_messages(row, "conversations"), read_tools(row), origin)


def prompt_messages(row: dict[str, Json], column: str) -> tuple[Message, ...]:
    """The messages of a column, behind that of a `system` column."""
    system = optional_text(row.get("system"), "system")
    messages = read_messages(row[column], column)
    if not system or messages[:1] == (Message("system", system),):
        return messages
    return (Message("system", system), *messages)


def read_messages(value: Json, column: str) -> tuple[Message, ...]:
    """Every message of a list."""
    messages: list[Message] = []
    for index, item in enumerate(objects(value, column)):
        plain = _plain_message(item)
        if plain is not None:
            messages.append(plain)
            continue
        where = f"{column}[{index}]"
        for part in as_openai(item, where):
            message = _message(part, where)
            before = messages[-1] if messages else None
            if before and before.role == message.role == "assistant" and _is_call(part):
                # A turn may hold one call each: all calls up to the next result are one message.
                calls = before.tool_calls + message.tool_calls
                messages[-1] = replace(before, tool_calls=calls)
            else:
                messages.append(message)
    return tuple(messages)


def _plain_message(item: dict[str, Json]) -> Message | None:
    """The message that nearly all items are: a known role and a text, nothing else."""
    if len(item) != 2:
        return None
    name, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(name, str) or not isinstance(content, str) or name in CALL_TURNS:
        return None
    role = ROLES.get(name)
    return Message(role, content) if role else None


def conversation(
    messages: tuple[Message, ...], tools: tuple[dict[str, Json], ...], origin: Origin
) -> Conversation:
    """Puts a conversation together if there is something in it to learn.

    Raises:
        MistakeError: no answer, an empty one, roles in an impossible order, an unknown tool.
    """
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        roles = ", ".join(message.role for message in messages) or "no messages"
        raise MistakeError("data.no-assistant", roles, "at least one assistant message to learn")
    for message in answers:
        check_answer(message)
    check_order(messages)
    check_tools(messages, tools)
    return Conversation(messages, origin, tools)


def check_answer(message: Message) -> None:
    """Refuses an answer that has neither text nor tool calls."""
    if not (message.content or "").strip() and not message.tool_calls and message.weight:
        raise MistakeError(
            "data.empty-answer",
            "an assistant message without text or tool calls",
            "something to learn, or `weight: 0`",
        )


def check_order(messages: tuple[Message, ...]) -> None:
    """Refuses what no chat produces: a role twice in a row, a tool result that nobody asked for."""
    for index, message in enumerate(messages):
        before = messages[index - 1] if index else None
        if message.role == "tool":
            is_fine = before is not None and (before.role == "tool" or bool(before.tool_calls))
            expected = "a tool result behind a tool call"
        else:
            is_fine = before is None or before.role != message.role or before.name != message.name
            expected = "user and assistant in turns (join the two messages, or drop one)"
        if not is_fine:
            place = f"right behind {before.role}" if before else "as the first"
            found = f"message {index + 1}, {message.role}, {place}"
            raise MistakeError("data.role-order", found, expected)


def check_tools(messages: tuple[Message, ...], tools: tuple[dict[str, Json], ...]) -> None:
    """Refuses calls of tools that the row does not define, where it defines some."""
    if not tools:
        return
    known = {str(cast("dict[str, Json]", tool["function"])["name"]) for tool in tools}
    for call in (call for message in messages for call in message.tool_calls):
        if call.name not in known:
            raise MistakeError(
                "data.unknown-tool",
                f"a call of {call.name!r}",
                f"one of the row's tools: {', '.join(sorted(known))}",
            )


def _is_call(item: dict[str, Json]) -> bool:
    """Whether a turn's content is the JSON of calls."""
    return str(first_of(item, "role", "from")[1]).lower() in CALL_TURNS


def _message(item: dict[str, Json], where: str) -> Message:
    name_of_role, role = first_of(item, "role", "from")
    role = _role(role, where)
    field, content = first_of(item, "content", "value")
    if content is None and "value" not in item and name_of_role == "from":
        field = "value"
    if _is_call(item):
        calls = _calls_in_text(text(content, f"{where}.{field}"), where)
        content = None
    else:
        calls = _tool_calls(item.get("tool_calls"), where)
        if isinstance(item.get("function_call"), dict):
            calls += (_function(cast("dict[str, Json]", item["function_call"]), where),)
    thought, reasoning = first_of(item, "reasoning_content", "reasoning", "thinking")
    name = item.get("name")
    return Message(
        role,
        None if content is None and calls else text(content, f"{where}.{field}"),
        tool_calls=calls,
        reasoning=optional_text(reasoning, f"{where}.{thought}"),
        name=name if isinstance(name, str) else None,
        weight=_weight(item, role, where),
    )


def _weight(item: dict[str, Json], role: Role, where: str) -> float:
    """OpenAI's `weight`; also `loss` (ms-swift) and `train` (axolotl)."""
    key = next((key for key in ("weight", "loss", "train") if item.get(key) is not None), None)
    if key is None:
        return 1.0
    value = item[key]
    if role != "assistant" and value:
        raise MistakeError(
            "data.weight", f"{where}.{key} on a {role} message", "no weight there", root(where)
        )
    if isinstance(value, bool):
        value = float(value)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise MistakeError(
            "data.weight", f"{where}.{key} = {show(value)}", "a number, 0 to 1", root(where)
        )
    return float(value) if role == "assistant" else 1.0


def _role(value: Json, where: str) -> Role:
    role = ROLES.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise MistakeError(
            "data.bad-role",
            f"{where} with role {show(value)}",
            "system, user, assistant or tool (human and gpt in ShareGPT)",
            root(where),
        )
    return role


def _tool_calls(value: Json, where: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    calls: list[ToolCall] = []
    for index, item in enumerate(objects(value, f"{where}.tool_calls")):
        place = f"{where}.tool_calls[{index}]"
        function = item if item.get("function") is None else item["function"]
        if not isinstance(function, dict):
            raise MistakeError("data.tool-call", place, "an object with `function`", root(where))
        calls.append(_function(function, place))
    return tuple(calls)


def _function(function: dict[str, Json], where: str) -> ToolCall:
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise MistakeError(
            "data.tool-call", f"{where} without a name", "a function name", root(where)
        )
    if arguments is None or arguments == "":
        return ToolCall(name, "{}")
    value = arguments
    if isinstance(arguments, str):
        value = json_value(arguments, where, "data.tool-call", f"{where}: arguments that are")
    if not isinstance(value, dict):
        found = f"{where}: arguments {show(arguments)}"
        raise MistakeError("data.tool-call", found, "a JSON object", root(where))
    if isinstance(arguments, str):
        return ToolCall(name, arguments)
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _calls_in_text(value: str, where: str) -> tuple[ToolCall, ...]:
    """ShareGPT's function_call turns: the call is JSON text."""
    calls = json_value(value, where, "data.tool-call", f"{where}: a function_call that is")
    return _tool_calls(calls if isinstance(calls, list) else [calls], where)


def read_tools(row: dict[str, Json]) -> tuple[dict[str, Json], ...]:
    """The function objects of `tools` (a list or its JSON) and of the older `functions`."""
    found: list[dict[str, Json]] = []
    for column in ("tools", "functions"):
        try:
            value = from_json_text(row.get(column), column)
        except MistakeError as mistake:
            raise MistakeError("data.tools", mistake.found, "a JSON array", column) from None
        if value:
            found += [_tool(tool, column) for tool in objects(value, column)]
    return tuple(found)


def _tool(tool: dict[str, Json], column: str) -> dict[str, Json]:
    if not isinstance(tool.get("function"), dict):
        tool = {"type": "function", "function": tool_of_anthropic(tool)}
    name = cast("dict[str, Json]", tool["function"]).get("name")
    if not isinstance(name, str) or not name:
        raise MistakeError("data.tools", f"a tool without a name: {show(tool)}", "a name", column)
    return tool
