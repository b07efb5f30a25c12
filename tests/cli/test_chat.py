"""`tunesmith chat`: commands, several lines, two sides, files of prompts, saved samples."""

import io
import json
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tunesmith.cli import chat as chat_module
from tunesmith.cli.chat import ChatOptions, Talk, read_message, run_chat
from tunesmith.errors import DataError, ModelError, UserError
from tunesmith.infer.dialogue import Dialogue, Side, Turn, open_against, read_prompts
from tunesmith.infer.generate import Sampling
from tunesmith.types import SilentReporter


class Parrot:
    """Answers with what it was told, its label, and how many messages it saw."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.seen: list[list[dict[str, Any]]] = []
        self.sampled: list[Sampling] = []

    def stream(self, messages: list[dict[str, Any]], sampling: Sampling) -> Generator[str]:
        if messages[-1]["content"] == "refuse":
            raise UserError("model.template-refuses", self.label, found="no", expected="yes")
        self.seen.append(messages)
        self.sampled.append(sampling)
        yield f"{self.label} "
        yield messages[-1]["content"]

    @property
    def chat(self) -> Any:
        text_config = SimpleNamespace(max_position_embeddings=None)
        config = SimpleNamespace(get_text_config=lambda: text_config)
        return SimpleNamespace(model=SimpleNamespace(config=config), tokenizer=None)


@pytest.fixture
def say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, Talk, list[Parrot]]]:
    """Pipes lines into a talk with as many parrots as there are names."""

    def run(lines: Iterable[str], names: str = "A") -> tuple[str, Talk, list[Parrot]]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        parrots = [Parrot(name) for name in names.split()]
        sides: Any = parrots
        talk = Talk(sides, Sampling(), Console(width=200))
        talk.run()
        return capsys.readouterr().out, talk, parrots

    return run


def test_a_transcript_reads_well_when_piped(say: Callable[..., Any]) -> None:
    out, talk, _ = say(["hello", "again"])
    assert out == "you> hello\nA hello\nyou> again\nA again\n\n"
    assert [turn.answers for turn in talk.dialogue.turns] == [["A hello"], ["A again"]]


def test_undo_edit_retry_and_clear(say: Callable[..., Any]) -> None:
    _, talk, (parrot,) = say(["one", "two", "/undo", "/edit three", "/retry"])
    assert [turn.question for turn in talk.dialogue.turns] == ["three"]
    assert [len(messages) for messages in parrot.seen] == [1, 3, 1, 1]
    out, talk, _ = say(["/undo", "/edit x", "one", "/clear", "/history"])
    assert out.count("nothing was said yet") == 2
    assert talk.dialogue.turns == []


def test_a_refused_message_is_told_and_taken_back(say: Callable[..., Any]) -> None:
    out, talk, _ = say(["one", "refuse", "/edit refuse", "/history"])
    assert out.count("model.template-refuses") == 2
    assert [turn.answers for turn in talk.dialogue.turns] == [["A one"]]


def test_system_and_settings(say: Callable[..., Any]) -> None:
    lines = ["/system be kind", "/temperature 0", "/top_p 2", "/seed 7", "/seed", "hi"]
    out, talk, (parrot,) = say([*lines, "/seed none", "/max_new_tokens 0"])
    assert parrot.seen[0][0] == {"role": "system", "content": "be kind"}
    assert parrot.sampled == [Sampling(temperature=0.0, seed=7)]
    assert "top_p cannot be '2'" in out
    assert "max_new_tokens cannot be '0'" in out
    assert talk.sampling.seed is None


def test_unknown_commands_get_the_nearest_and_slashes_can_be_said(say: Callable[..., Any]) -> None:
    out, _, (parrot,) = say(["/histry", "//etc is a folder", "/help", "/exit", "never"])
    assert "did you mean /history?" in out
    assert [messages[-1]["content"] for messages in parrot.seen] == ["/etc is a folder"]
    assert "/save [FILE]" in out


def test_two_sides_see_their_own_answers_alone(say: Callable[..., Any]) -> None:
    out, _, (first, second) = say(["one", "two"], "A B")
    assert "[A]\nA one\n[B]\nB one\n" in out
    assert [m["content"] for m in first.seen[1]] == ["one", "A one", "two"]
    assert [m["content"] for m in second.seen[1]] == ["one", "B one", "two"]


def test_a_saved_conversation_is_a_sample(say: Callable[..., Any], tmp_path: Path) -> None:
    from tunesmith.config.recipe import SourceConfig
    from tunesmith.data.columns import read_samples

    file = tmp_path / "mine.jsonl"
    lines = ["/system s", "one", "two", "/answer better", f"/save {file}", "/undo", f"/save {file}"]
    out, _, _ = say([*lines, f"/save {tmp_path}/x.txt", "/clear", f"/save {file}"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [message["content"] for message in rows[0]["messages"]] == (
        ["s", "one", "A one", "two", "better"]
    )
    assert len(rows) == 2
    assert out.count("data.save") == 2
    source = SourceConfig(path=str(file))
    assert len(list(read_samples(source, [file]))) == 2


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["plain "], "plain"),
        (["first\\", "second\\", " third"], "first\nsecond\n third"),
        (['"""one', "", 'two"""'], "one\n\ntwo"),
        (['"""', "one", '"""'], "one"),
        (['"""one line"""'], "one line"),
    ],
)
def test_messages_of_several_lines(lines: list[str], expected: str) -> None:
    given = iter(lines)
    assert read_message(lambda _: next(given)) == expected


def test_files_of_prompts(tmp_path: Path) -> None:
    text, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one\n\n{two}\n")
    assert [messages[-1]["content"] for messages in read_prompts(text)] == ["one", "{two}"]
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "gone"}]
    with_system = [{"role": "system", "content": "own"}, talk[0]]
    given = ["a", {"prompt": "b"}, {"messages": talk}, {"messages": with_system}]
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in given))
    found = read_prompts(rows, "s")
    assert [messages[0]["content"] for messages in found] == ["s", "s", "s", "own"]
    assert [messages[-1]["content"] for messages in found] == ["a", "b", "hi", "hi"]


def test_broken_files_of_prompts_name_their_lines(tmp_path: Path) -> None:
    rows = tmp_path / "p.jsonl"
    rows.write_text('"fine"\n{"prompt": 3}\n{"a"\n{"messages": [{"role": "user"}]}\n')
    with pytest.raises(DataError) as caught:
        read_prompts(rows)
    assert [problem.where.rpartition(":")[2] for problem in caught.value.problems] == [
        "2",
        "3",
        "4",
    ]
    rows.write_text("\n")
    with pytest.raises(DataError, match=r"data\.empty-file"):
        read_prompts(rows)
    with pytest.raises(DataError, match=r"data\.missing-file"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    "options",
    [{"prompt": "a", "file": "b"}, {"out": "a.jsonl"}, {"prompt": "a", "out": "a.txt"}],
)
def test_options_that_do_not_go_together(options: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"data\.prompts"):
        run_chat("nothing", ChatOptions(Sampling(), **options))


def test_a_file_is_answered_by_two_and_written_as_samples(tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "out.jsonl"
    prompts.write_text("one\ntwo\n")
    pair: Any = [Parrot("A"), Parrot("B")]
    chat_module._answer_all(
        pair, read_prompts(prompts), ChatOptions(Sampling(), file=str(prompts), out=str(out))
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[1]["messages"][-1] == {"role": "assistant", "content": "A two"}
    assert rows[1]["against"] == {"model": "B", "content": "B two"}


def test_the_base_of_a_whole_model_is_unknown() -> None:
    chat: Any = SimpleNamespace(model=object(), template_arguments={})
    with pytest.raises(ModelError, match=r"model\.no-base"):
        open_against(chat, "some/model", "base", SilentReporter())


def test_a_dialogue_gives_messages_up_to_the_open_question() -> None:
    dialogue = Dialogue("s", [Turn("a", ["b"]), Turn("c")])
    assert [message["content"] for message in dialogue.messages()] == ["s", "a", "b", "c"]
    assert [message["content"] for message in dialogue.messages(1)] == ["s", "a", "c"]


@pytest.mark.slow
def test_a_run_against_its_base_without_loading_twice(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    from tunesmith import fine_tune, load_recipe
    from tunesmith.infer.chat_model import open_chat_model

    recipe = load_recipe(tiny_recipe())
    fine_tune(recipe)
    silent, exact = SilentReporter(), Sampling(temperature=0.0, max_new_tokens=8)
    tuned = open_chat_model(str(tmp_path / "run"), silent)
    base = open_against(tuned, str(tmp_path / "run"), "base", silent)
    assert base.chat is tuned
    messages = [{"role": "user", "content": "question 1"}]
    plain = open_chat_model(recipe.recipe.model.id, silent)
    expected = "".join(Side("plain", plain).stream(messages, exact))
    before = "".join(Side("tuned", tuned).stream(messages, exact))
    assert "".join(base.stream(messages, exact)) == expected
    assert "".join(Side("tuned", tuned).stream(messages, exact)) == before != expected
