"""`tunesmith chat`: one answer, a conversation, or a file of prompts, by one model or by two."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tunesmith.cli.console import ConsoleReporter, quiet_libraries
from tunesmith.data.templates import install_template
from tunesmith.errors import DataError, Problem, UserError
from tunesmith.infer.chat_model import open_chat_model
from tunesmith.infer.dialogue import (
    Dialogue,
    Message,
    Side,
    Turn,
    append_line,
    open_against,
    read_prompts,
)
from tunesmith.infer.generate import Sampling, num_missing_tokens

QUOTES = '"""'
CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in range(32) if chr(code) not in "\n\t"}
"""Signs with which an answer could move the cursor or change the terminal."""


@dataclass(frozen=True)
class ChatOptions:
    """What the command line says beside the model."""

    sampling: Sampling
    prompt: str | None = None
    system: str | None = None
    against: str | None = None
    file: str | None = None
    out: str | None = None


def run_chat(target: str, options: ChatOptions) -> None:
    """Answers one prompt or a file of them, or talks until the user leaves."""
    prompts = _prompts(options)
    quiet_libraries()
    console = Console(stderr=prompts is not None)
    reporter = ConsoleReporter(console)
    chat = open_chat_model(target, reporter)
    sides = [Side(chat.label, chat)]
    if options.against is not None:
        sides.append(open_against(chat, target, options.against, reporter))
    for side in sides:
        install_template(side.chat.tokenizer)
    if prompts is None:
        names = " and ".join(side.label for side in sides)
        console.print(f"talking to {names}; /help lists commands", highlight=False)
        Talk(sides, options.sampling, console, Dialogue(options.system)).run()
    else:
        _answer_all(sides, prompts, options)


def _prompts(options: ChatOptions) -> list[list[Message]] | None:
    """What is to be answered; None to talk."""
    found, expected = None, "one of them"
    if options.prompt is not None and options.file is not None:
        found = "both --prompt and --file"
    elif options.out is not None and options.prompt is None and options.file is None:
        found, expected = "--out in a conversation", "--file or --prompt with it; /save FILE here"
    elif options.out is not None and not options.out.endswith(".jsonl"):
        found, expected = f"--out {options.out}", "a name that ends in .jsonl"
    if found is not None:
        raise DataError([Problem("command line", "data.prompts", found, expected)])
    if options.prompt is not None:
        return [Dialogue(options.system, [Turn(options.prompt)]).messages()]
    if options.file is not None:
        return read_prompts(Path(options.file), options.system)
    return None


def _answer_all(
    sides: Sequence[Side], prompts: Sequence[list[Message]], options: ChatOptions
) -> None:
    """Prints the answers, with their prompts if there are several, and writes them as samples."""
    console = Console()
    for number, messages in enumerate(prompts, 1):
        if options.file is not None:
            console.rule(f"{number} of {len(prompts)}", style="dim")
            _print(f"{messages[-1]['content']}\n", end="\n")
        answers = show_answers(sides, [messages] * len(sides), options.sampling, console)
        if len(answers) < len(sides):  # Ctrl-C before the last one began
            return
        if options.out is not None:
            row: dict[str, Any] = {
                "messages": [*messages, {"role": "assistant", "content": answers[0]}]
            }
            if len(sides) > 1:
                row["against"] = {"model": sides[1].label, "content": answers[1]}
            append_line(Path(options.out), row)


# Answers on the screen


def show_answers(
    sides: Sequence[Side],
    conversations: Sequence[list[Message]],
    sampling: Sampling,
    console: Console,
) -> list[str]:
    """Shows what each side says as it comes; Ctrl-C ends the answer and keeps what was said."""
    streams = [
        side.stream(messages, sampling) for side, messages in zip(sides, conversations, strict=True)
    ]
    if len(sides) == 1:
        return [_stream_plain(streams[0])]
    if console.is_terminal:
        return _stream_columns(sides, streams, console)
    answers: list[str] = []
    for side, stream in zip(sides, streams, strict=True):
        _print(f"[{side.label}]", end="\n")
        answers.append(_stream_plain(stream))
    return answers


def _stream_plain(stream: Generator[str]) -> str:
    pieces: list[str] = []
    try:
        for piece in stream:
            pieces.append(piece)
            _print(piece)
    except KeyboardInterrupt:
        stream.close()
    _print("", end="\n")
    return "".join(pieces)


def _stream_columns(
    sides: Sequence[Side], streams: Sequence[Generator[str]], console: Console
) -> list[str]:
    """One after the other, side by side: at once they would share the machine."""
    answers = ["" for _ in sides]

    def columns() -> RenderableType:
        table = Table(expand=True)
        for side in sides:
            table.add_column(Text(side.label), ratio=1)
        table.add_row(*(Text(answer.translate(CONTROL)) for answer in answers))
        return table

    with Live(columns(), console=console, transient=True, auto_refresh=False) as live:
        for number, stream in enumerate(streams):
            try:
                for piece in stream:
                    answers[number] += piece
                    live.update(columns(), refresh=True)
            except KeyboardInterrupt:
                stream.close()
    console.print(columns())
    return answers


def _print(text: str, end: str = "") -> None:
    """Prints as it is: brackets in answers are no markup."""
    shown = text.translate(CONTROL) if sys.stdout.isatty() else text
    print(shown, end=end, flush=True)  # noqa: T201


# Talking


@dataclass
class Talk:
    """A conversation at the terminal, or from what is piped in."""

    sides: Sequence[Side]
    sampling: Sampling
    console: Console
    dialogue: Dialogue = field(default_factory=Dialogue)

    def run(self) -> None:
        """Talks until the user leaves."""
        importlib.import_module("readline")  # gives input() line editing and history
        while True:
            try:
                message = read_message(self._read_line)
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if message in ("/exit", "/quit"):
                return
            try:
                self._take(message)
            except UserError as error:
                self._say(str(error))

    def _read_line(self, mark: str) -> str:
        if sys.stdin.isatty():
            return input(f"\n{mark}" if mark == "you> " else mark)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        _print(f"{mark}{line.rstrip()}", end="\n")  # so that what comes out can be read alone
        return line.rstrip("\n")

    def _take(self, message: str) -> None:
        if message.startswith("//"):
            self._ask(message[1:])
        elif message.startswith("/"):
            word, _, rest = message[1:].partition(" ")
            command = COMMANDS.get(word)
            if command is None:
                near = difflib.get_close_matches(word, COMMANDS, n=1)
                hint = f"; did you mean /{near[0]}?" if near else "; /help lists them"
                self._say(f"no command /{word}{hint} (//{word} says it to the model)")
            else:
                command.act(self, rest.strip())
        elif message:
            self._ask(message)

    def _ask(self, question: str) -> None:
        self.dialogue.turns.append(Turn(question))
        conversations = [self.dialogue.messages(number) for number in range(len(self.sides))]
        for side, messages in zip(self.sides, conversations, strict=True):
            missing = num_missing_tokens(side.chat, messages, self.sampling)
            if missing:
                self._say(
                    f"note: {missing:,} tokens over what {side.label} can see at once: answers get "
                    "worse; /clear begins anew"
                )
        answers: list[str] = []
        try:
            answers = show_answers(self.sides, conversations, self.sampling, self.console)
        finally:
            if answers:
                self.dialogue.turns[-1].answers = answers
                if len(self.sides) == 1 and not answers[0].strip():
                    self._say("(an empty answer)")
            else:
                self.dialogue.turns.pop()

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    # Commands

    def help(self, _: str) -> None:
        """Lists the commands."""
        table = Table.grid(padding=(0, 2))
        for name, command in COMMANDS.items():
            table.add_row(Text(f"/{name} {command.argument}".rstrip()), command.help)
        table.add_row("/exit", "leaves, as Ctrl-D does")
        self.console.print(table)
        self._say(f"Several lines: end a line with \\, or begin and end with {QUOTES}. // says /.")

    def clear(self, _: str) -> None:
        """Forgets the conversation."""
        self.dialogue.turns.clear()

    def system(self, text: str) -> None:
        """Sets the system message; begins anew."""
        self.dialogue = Dialogue(text or None)

    def history(self, _: str) -> None:
        """Shows the conversation."""
        for number, side in enumerate(self.sides):
            if len(self.sides) > 1:
                _print(f"[{side.label}]", end="\n")
            for message in self.dialogue.messages(number):
                _print(f"{message['role']}: {message['content']}", end="\n")

    def undo(self, _: str) -> None:
        """Takes the last turn back."""
        turn = self._last_turn()
        if turn is not None:
            self.dialogue.turns.pop()
            self._say(f"taken back: {turn.question}")

    def retry(self, _: str) -> None:
        """Asks the last message again."""
        turn = self._last_turn()
        if turn is not None:
            self._ask_again(turn, turn.question)

    def edit(self, text: str) -> None:
        """Asks another message in place of the last one."""
        turn = self._last_turn()
        if turn is None:
            return
        if not text and sys.stdin.isatty():
            text = _edited(turn.question)
        if text:
            self._ask_again(turn, text)
        else:
            self._say("/edit TEXT asks TEXT in place of the last message")

    def answer(self, text: str) -> None:
        """Puts a better answer in place of the last one."""
        turn = self._last_turn()
        if turn is not None and text:
            turn.answers[0] = text

    def save(self, name: str) -> None:
        """Appends the conversation to a file of samples."""
        file = Path(name or "chat.jsonl").expanduser()
        count = self.dialogue.save(file)
        self._say(f"saved to {file}: a sample with {count} answer{'s' * (count > 1)}")

    def set_value(self, name: str, text: str) -> None:
        """Changes how answers are drawn, or shows it."""
        kinds: dict[str, Callable[[str], Any]] = {"max_new_tokens": int, "seed": _seed}
        least = {"temperature": 0.0, "top_p": 0.0, "max_new_tokens": 1}.get(name, 0)
        try:
            value = kinds.get(name, float)(text) if text else getattr(self.sampling, name)
        except ValueError:
            value = -1
        if value is not None and (value < least or (name == "top_p" and value > 1)):
            self._say(f"{name} cannot be {text!r}")
            return
        self.sampling = replace(self.sampling, **{name: value})
        self._say(f"{name} is {value}")

    def _last_turn(self) -> Turn | None:
        if not self.dialogue.turns:
            self._say("nothing was said yet")
            return None
        return self.dialogue.turns[-1]

    def _ask_again(self, turn: Turn, question: str) -> None:
        """Asks in place of a turn, which comes back if that fails."""
        self.dialogue.turns.pop()
        before = len(self.dialogue.turns)
        try:
            self._ask(question)
        finally:
            if len(self.dialogue.turns) == before:
                self.dialogue.turns.append(turn)


@dataclass(frozen=True)
class Command:
    """What a line that begins with a slash does."""

    argument: str
    help: str
    act: Callable[[Talk, str], None]


def _setting(name: str) -> Callable[[Talk, str], None]:
    return lambda talk, text: talk.set_value(name, text)


COMMANDS = {
    "help": Command("", "lists the commands", Talk.help),
    "clear": Command("", "forgets the conversation", Talk.clear),
    "system": Command("[TEXT]", "begins anew with a system message, or without one", Talk.system),
    "history": Command("", "shows the conversation", Talk.history),
    "undo": Command("", "takes the last message and its answer back", Talk.undo),
    "retry": Command("", "asks the last message again", Talk.retry),
    "edit": Command("[TEXT]", "changes the last message and asks again", Talk.edit),
    "answer": Command("TEXT", "puts a better answer in place of the last one", Talk.answer),
    "save": Command("[FILE]", "appends the conversation to a .jsonl as a sample", Talk.save),
    "temperature": Command("[X]", "0 takes the likeliest token", _setting("temperature")),
    "top_p": Command("[X]", "draws from the likeliest tokens that make up X", _setting("top_p")),
    "max_new_tokens": Command("[N]", "longest answer", _setting("max_new_tokens")),
    "seed": Command("[N|none]", "the same answers again", _setting("seed")),
}


def read_message(read_line: Callable[[str], str]) -> str:
    """One message, of several lines if one ends with a backslash or they stand in triple quotes."""
    line = read_line("you> ").strip()
    if line.startswith(QUOTES):
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES) or lines == [""]:
            lines.append(read_line("...> "))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(read_line("...> ").rstrip())
    return "\n".join(lines)


def _edited(text: str) -> str:
    """The text as the user changes it on the line."""
    readline: Any = importlib.import_module("readline")
    readline.set_startup_hook(lambda: readline.insert_text(text.replace("\n", " ")))
    try:
        return input("edit> ").strip()
    finally:
        readline.set_startup_hook(None)


def _seed(text: str) -> int | None:
    return None if text == "none" else int(text)
