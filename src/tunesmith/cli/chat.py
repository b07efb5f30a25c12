"""`tunesmith chat`."""

from __future__ import annotations

import importlib
from typing import Any

from rich.console import Console

from tunesmith.cli.console import ConsoleReporter, quiet_libraries
from tunesmith.data.templates import install_template
from tunesmith.infer.chat_model import ChatModel, open_chat_model
from tunesmith.infer.generate import Sampling, stream_answer

HELP = "/clear forgets the conversation, /system TEXT sets a system message, /exit or Ctrl-D leaves"


def run_chat(target: str, *, prompt: str | None, system: str | None, sampling: Sampling) -> None:
    """Answers one prompt, or talks until the user leaves."""
    quiet_libraries()
    console = Console(stderr=prompt is not None)
    chat = open_chat_model(target, ConsoleReporter(console))
    install_template(chat.tokenizer)
    start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        _print_answer(chat, [*start, {"role": "user", "content": prompt}], sampling)
        return
    console.print(f"talking to {chat.label}; {HELP}", highlight=False)
    _talk(chat, start, sampling, console)


def _talk(
    chat: ChatModel, start: list[dict[str, Any]], sampling: Sampling, console: Console
) -> None:
    importlib.import_module("readline")  # gives input() line editing and history

    messages = list(start)
    while True:
        try:
            line = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command == "/clear":
            messages = list(start)
        elif command == "/system":
            start = [{"role": "system", "content": rest}] if rest else []
            messages = list(start)
        elif command == "/help":
            console.print(HELP, highlight=False)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _print_answer(chat, messages, sampling)
            messages.append({"role": "assistant", "content": answer})


def _print_answer(chat: ChatModel, messages: list[dict[str, Any]], sampling: Sampling) -> str:
    """Prints the answer as it comes; Ctrl-C ends it and keeps what was said."""
    pieces: list[str] = []
    stream = stream_answer(chat, messages, sampling)
    try:
        for piece in stream:
            pieces.append(piece)
            print(piece, end="", flush=True)  # noqa: T201 - plain: markup in answers is text
    except KeyboardInterrupt:
        stream.close()
    print()  # noqa: T201
    return "".join(pieces)
