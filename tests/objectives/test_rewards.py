"""Reward functions: what each kind says of which answers, and what their configs refuse."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import EntryPoint
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from tunesmith.config.rewards import RewardFunctionConfig
from tunesmith.errors import TunesmithError, UserError
from tunesmith.objectives.rewards import REWARDS, Answered, build_reward, plugins, total_rewards

CONFIG = TypeAdapter[Any](list[RewardFunctionConfig])


def reward(tree: dict[str, Any]) -> Any:
    (config,) = CONFIG.validate_python([tree])
    return build_reward(config.kind, config.settings())


def judge(tree: dict[str, Any], answer: str, reference: str = "", num_tokens: int = 0) -> Any:
    return reward(tree)([Answered("", answer, reference, num_tokens=num_tokens)])[0]


# Configs


def test_each_kind_has_a_config_with_the_same_defaults() -> None:
    models = get_args(get_args(RewardFunctionConfig)[0])
    configs = {get_args(model.model_fields["kind"].annotation)[0]: model for model in models}
    del configs["model"]  # needs a model: rollout/judge.py builds it
    assert configs.keys() == REWARDS.keys()
    for kind, model in configs.items():
        made: Any = REWARDS[kind]
        assert is_dataclass(made)
        own = {item.name: item for item in fields(made)}
        assert own.keys() | {"kind", "weight"} == model.model_fields.keys()
        for name, field in model.model_fields.items():
            if name in own and not field.is_required():
                default: Any = own[name].default_factory
                default = own[name].default if not callable(default) else default()
                value = field.get_default(call_default_factory=True)
                assert default == (tuple(value) if isinstance(value, list) else value), (kind, name)


def test_a_word_is_a_whole_config() -> None:
    math_config, length = CONFIG.validate_python(
        ["math", {"kind": "length", "min_tokens": 1, "max_tokens": 2, "weight": -0.5}]
    )
    assert (math_config.kind, math_config.weight, length.weight) == ("math", 1.0, -0.5)


@pytest.mark.parametrize(
    "tree",
    [
        {"kind": "unknown"},
        {"kind": "math", "weight": math.nan},
        {"kind": "math", "other": 1},
        {"kind": "regex", "pattern": "("},
        {"kind": "regex", "pattern": "(a)", "group": 2},
        {"kind": "regex"},
        {"kind": "json_schema"},
        {"kind": "json_schema", "file": "a.json", "inline": {}},
        {"kind": "format", "tags": ["<think>"]},
        {"kind": "format", "tags": ["a", "a"]},
        {"kind": "length", "min_tokens": 5, "max_tokens": 5},
        {"kind": "http", "url": "file:///etc/passwd"},
        {"kind": "http", "url": "https://me:secret@host/"},
        {"kind": "http", "url": "https://host:port/"},
        {"kind": "http", "url": "https://host/", "headers_from": {"a: b\n": "VARIABLE"}},
    ],
)
def test_wrong_configs_are_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        reward(tree)


# Sums


def test_the_total_leaves_out_what_was_not_judged() -> None:
    columns = [[1.0, None, math.nan], [0.5, 0.5, None]]
    functions = [lambda answers, column=column: column for column in columns]
    totals, seen = total_rewards(functions, [2.0, -1.0], [Answered("", "", "")] * 3)
    assert totals[:2] == [1.5, -0.5]
    assert math.isnan(totals[2])
    assert seen[0][0] == 1.0
    assert math.isnan(seen[0][1])
    assert math.isnan(total_rewards([], [], [Answered("", "", "")])[0][0])
    assert total_rewards(functions[:0], [], []) == ([], [])


@pytest.mark.parametrize(
    "tree",
    [
        {"kind": "match"},
        {"kind": "regex", "pattern": "a"},
        {"kind": "json_schema", "inline": {}},
        {"kind": "math"},
        {"kind": "format"},
        {"kind": "length", "min_tokens": 1, "max_tokens": 2},
        {"kind": "repetition"},
        {"kind": "http", "url": "http://localhost:1/"},
    ],
)
def test_no_answers_have_no_rewards(tree: dict[str, Any]) -> None:
    if tree["kind"] == "json_schema":
        pytest.importorskip("jsonschema")
    assert list(reward(tree)([])) == []


# match


@pytest.mark.parametrize(
    ("settings", "answer", "reference", "verdict"),
    [
        ({}, "  The Cat. ", "the cat", 1),
        ({}, "the cats", "the cat", 0),
        ({}, "巴黎，法国。", "巴黎 法国", 1),
        ({}, "ＡＢＣ　１２", "abc 12", 1),
        ({}, "你好！", "你好!", 1),
        ({}, "3.5", "35", 0),
        ({}, "-2", "2", 0),
        ({}, "«It's»", "it's", 1),
        ({}, "anything", "", None),
        ({}, "anything", " ! ", None),
        ({"ignore_case": False}, "Cat", "cat", 0),
        ({"ignore_punctuation": False}, "cat.", "cat", 0),
        ({"ignore_space": False}, "a  b", "a b", 0),
        ({"ignore_space": False}, "a b", "a b", 1),
        ({"where": "contains"}, "It is Paris, of course", "paris", 1),
        ({"where": "contains"}, "It is 42", "4", 0),
        ({"where": "contains"}, "我住在巴黎市", "巴黎", 1),
        ({"where": "start"}, "Yes, it is", "yes", 1),
        ({"where": "start"}, "Yesterday", "yes", 0),
        ({"where": "end"}, "I say: no.", "no", 1),
        ({"where": "last_line"}, "because\n\nParis\n \n", "Paris", 1),
        ({"where": "last_line"}, "", "Paris", 0),
        ({"text": "yes"}, "Yes!", "no", 1),
    ],
)
def test_match(settings: dict[str, Any], answer: str, reference: str, verdict: Any) -> None:
    assert judge({"kind": "match", **settings}, answer, reference) == verdict


# regex


@pytest.mark.parametrize(
    ("settings", "answer", "reference", "verdict"),
    [
        ({"pattern": "^<think>.*</think>"}, "<think>a\nb</think>c", "", 1),
        ({"pattern": "^<think>.*</think>"}, "a", "", 0),
        ({"pattern": "[a-z]+", "how": "fullmatch"}, "abc", "", 1),
        ({"pattern": "[a-z]+", "how": "fullmatch"}, "abc.", "", 0),
        ({"pattern": "is (.*)", "group": 1}, "it is Paris.", "paris", 1),
        ({"pattern": "is (?P<it>.*)", "group": "it"}, "it is Rome", "paris", 0),
        ({"pattern": "is (.*)", "group": 1}, "no", "paris", 0),
        ({"pattern": "a|(b)", "group": 1}, "a", "paris", 0),
        ({"pattern": "(.*)", "group": 1}, "a", "", None),
    ],
)
def test_regex(settings: dict[str, Any], answer: str, reference: str, verdict: Any) -> None:
    assert judge({"kind": "regex", **settings}, answer, reference) == verdict


def test_a_pattern_without_end_is_stopped() -> None:
    start = time.monotonic()
    tree = {"kind": "regex", "pattern": r"^(a|aa)+$", "timeout_seconds": 0.05}
    assert judge(tree, "a" * 60 + "b") is None
    assert time.monotonic() - start < 1


# format


@pytest.mark.parametrize(
    ("settings", "answer", "verdict"),
    [
        ({}, "<think>a</think><answer>b</answer>", 1),
        ({}, "\n<think>\na < b\n</think>\n<answer>\n<b>1</b>\n</answer>\n", 1),
        ({}, "<answer>b</answer><think>a</think>", 0),
        ({}, "<think>a</think><think>a</think><answer>b</answer>", 0),
        ({}, "<think><think>a</think><answer>b</answer>", 0),
        ({}, "<think>a</think><answer>b</answer> more", 0),
        ({}, "<think> </think><answer>b</answer>", 0),
        ({}, "", 0),
        ({"is_opened": True}, "a</think><answer>b</answer>", 1),
        ({"is_opened": True}, "<think>a</think><answer>b</answer>", 0),
        ({"tags": ["think"], "whole": False}, "<think>a</think>\nb", 1),
        ({"tags": ["think"], "whole": False}, "<think>a</think>\n", 0),
        ({"tags": ["think"], "whole": False}, "<think>a</think>b<think>c</think>", 0),
        ({"partial": True}, "<think>a</think>b", 0.5),
        ({"partial": True}, "<think>a</think><answer>b", 0.75),
        ({"partial": True, "is_opened": True}, "a</think>b", 1 / 3),
    ],
)
def test_format(settings: dict[str, Any], answer: str, verdict: float) -> None:
    assert judge({"kind": "format", **settings}, answer) == verdict


def test_format_does_not_backtrack() -> None:
    start = time.monotonic()
    judge({"kind": "format"}, "<think>" + " <" * 50_000)
    judge({"kind": "format"}, "<think>" * 10_000)
    assert time.monotonic() - start < 1


# length and repetition


@pytest.mark.parametrize(("num_tokens", "value"), [(0, 0), (100, 0), (150, -0.5), (200, -1)])
def test_length(num_tokens: int, value: float) -> None:
    tree = {"kind": "length", "min_tokens": 100, "max_tokens": 200}
    assert judge(tree, "", num_tokens=num_tokens) == value
    tree |= {"at_min": 1.0, "at_max": 0.0}
    assert judge(tree, "", num_tokens=num_tokens) == 1 + value


@pytest.mark.parametrize(
    ("settings", "answer", "value"),
    [
        ({}, "all of these words differ", 0),
        ({}, "a b", 0),
        ({}, "a b c A B C", -1 / 4),
        ({}, "no no no no no no", -3 / 4),
        ({"n": 2, "max_penalty": 2.0}, "好好好好好", -1.5),
        ({"n": 2}, "今天天气很好", 0),
        ({"n": 2, "unit": "character"}, "ab ab", -1 / 3),
    ],
)
def test_repetition(settings: dict[str, Any], answer: str, value: float) -> None:
    assert judge({"kind": "repetition", **settings}, answer) == pytest.approx(value)


# json_schema

SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("settings", "answer", "verdict"),
    [
        ({}, '{"age": 3}', 1),
        ({}, 'Here it is:\n```json\n{"age": 3}\n```\nDone.', 1),
        ({}, 'I think {x} is {"age": 3}, so', 1),
        ({}, '{"age": "3"}', 0),
        ({"valid_json": 0.25}, '{"age": "3"}', 0.25),
        ({"valid_json": 0.25}, "{age: 3}", 0),
        ({}, '{"age": NaN}', 0),
        ({}, "none", 0),
        ({}, "", 0),
        ({"whole": True}, ' {"age": 3}\n', 1),
        ({"whole": True}, 'It is {"age": 3}', 0),
        ({}, "[" * 200_000, 0),
        ({}, "1" * 10_000, 0),
    ],
)
def test_json_schema(settings: dict[str, Any], answer: str, verdict: float) -> None:
    pytest.importorskip("jsonschema")
    assert judge({"kind": "json_schema", "inline": SCHEMA, **settings}, answer) == verdict


def test_schemas_are_checked_before_they_are_used(tmp_path: Any) -> None:
    pytest.importorskip("jsonschema")
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert judge({"kind": "json_schema", "file": str(file)}, '{"age": 3}') == 1
    wrong = [
        {"file": str(tmp_path / "none.json")},
        {"inline": {"type": "nothing"}},
        {"inline": {"anyOf": [{"$ref": "https://example.com/schema.json"}]}},
    ]
    for settings in wrong:
        with pytest.raises(UserError, match=r"reward\.schema"):
            reward({"kind": "json_schema", **settings})


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jsonschema", None)
    with pytest.raises(UserError, match="pip install jsonschema"):
        reward({"kind": "json_schema", "inline": {}})


# http

Reply = Callable[[list[dict[str, Any]]], tuple[int, Any]]


class Server:
    """A stand-in for a reward server; each request takes the next of its replies."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.requests: list[tuple[dict[str, str], list[dict[str, Any]]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((dict(self.headers), body["answers"]))
                status, reply = outer.replies.pop(0)(body["answers"])
                text = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                if status in (301, 302):
                    self.send_header("Location", outer.url + "other")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def lengths(answers: list[dict[str, Any]]) -> tuple[int, Any]:
    return 200, {"rewards": [len(answer["answer"]) or None for answer in answers]}


ANSWERS = [Answered("p", "abc", "r"), Answered("p", "", "")]


def test_http_sends_batches_and_headers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "Bearer hidden")
    server.replies = [lengths, lengths]
    tree = {"kind": "http", "url": server.url, "batch_size": 2}
    tree["headers_from"] = {"Authorization": "REWARD_TOKEN"}
    assert reward(tree)([*ANSWERS, ANSWERS[0]]) == [3.0, None, 3.0]
    assert [len(answers) for _, answers in server.requests] == [2, 1]
    headers, (first, _) = server.requests[0]
    assert headers["Authorization"] == "Bearer hidden"
    assert first == {"prompt": "p", "answer": "abc", "reference": "r"}


def test_http_tries_again(server: Server) -> None:
    server.replies = [lambda _: (503, {}), lambda _: (429, {}), lengths]
    tree = {"kind": "http", "url": server.url, "retry_seconds": 0.001}
    assert reward(tree)(ANSWERS) == [3.0, None]
    server.replies = [lambda _: (500, b"broken")] * 2
    with pytest.raises(TunesmithError, match=r"status 500: broken \(the last of 2") as caught:
        reward(tree | {"attempts": 2})(ANSWERS)
    assert caught.value.code == "reward.http"


@pytest.mark.parametrize(
    "reply",
    [
        (404, {}),
        (302, {}),
        (200, b"no json"),
        (200, [1, 2]),
        (200, {"reward": [1, 2]}),
        (200, {"rewards": 1}),
        (200, {"rewards": [1]}),
        (200, {"rewards": [1, "2"]}),
        (200, {"rewards": [1, True]}),
        (200, b'{"rewards": [1, NaN]}'),
        (200, b'{"rewards": [1, 1e999]}'),
    ],
)
def test_http_refuses_what_is_wrong_at_once(server: Server, reply: tuple[int, Any]) -> None:
    server.replies = [lambda _: reply]
    with pytest.raises(TunesmithError) as caught:
        reward({"kind": "http", "url": server.url})(ANSWERS)
    assert caught.value.code == "reward.http"
    assert len(server.requests) == 1


def test_http_without_a_server_or_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    tree = {"kind": "http", "url": "http://127.0.0.1:9/", "attempts": 2, "retry_seconds": 0.001}
    with pytest.raises(TunesmithError, match="of 2 attempts"):
        reward(tree)(ANSWERS)
    with pytest.raises(UserError, match="environment variable NO_SUCH_SECRET"):
        reward(tree | {"headers_from": {"Authorization": "NO_SUCH_SECRET"}})
    monkeypatch.setenv("TWO_LINES", "hidden\nlines")
    with pytest.raises(UserError, match="environment variable TWO_LINES") as caught:
        reward(tree | {"headers_from": {"Authorization": "TWO_LINES"}})
    assert "hidden" not in str(caught.value)
    with pytest.raises(TunesmithError, match=r"file:///etc"):
        build_reward("http", {"url": "file:///etc/passwd"})(ANSWERS)


# python


def word_count(answers: Sequence[Answered], *, factor: float = 1.0) -> list[float | None]:
    return [factor * len(answered.answer.split()) or None for answered in answers]


def picky(answers: Sequence[Answered]) -> list[float]:
    return [1 / len(answered.answer) for answered in answers]


def short(answers: Sequence[Answered]) -> list[float]:
    if len(answers) > 1:
        raise KeyError("together")
    return []


NOT_A_FUNCTION = 3


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["word_count", "picky", "short", "NOT_A_FUNCTION", "missing"]
    points = [EntryPoint(name, f"{__name__}:{name}", plugins.GROUP) for name in names]
    module = __import__("sys").modules
    monkeypatch.setitem(module, __name__, module.get(__name__) or _this_module())
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    monkeypatch.setenv(plugins.ENABLED_VARIABLE, "all")


def _this_module() -> Any:
    module = __import__("types").ModuleType(__name__)
    module.__dict__.update(globals())
    return module


@pytest.mark.usefixtures("installed")
def test_python_calls_what_is_installed() -> None:
    answers = [Answered("", "two words", ""), Answered("", "", "")]
    assert reward({"kind": "python", "name": "word_count"})(answers) == [2.0, None]
    tree = {"kind": "python", "name": "word_count", "arguments": {"factor": 0.5}}
    assert reward(tree)(answers) == [1.0, None]


@pytest.mark.usefixtures("installed")
def test_python_names_the_answer_that_it_fails_at() -> None:
    answers = [Answered("", "a", ""), Answered("", "", "")]
    with pytest.raises(TunesmithError, match=r"answer 2 of 2.*ZeroDivisionError") as caught:
        reward({"kind": "python", "name": "picky"})(answers)
    assert caught.value.code == "reward.failed"
    with pytest.raises(TunesmithError, match="none of them alone"):
        reward({"kind": "python", "name": "short"})(answers)
    with pytest.raises(TunesmithError, match="0 rewards for 1 answers"):
        reward({"kind": "python", "name": "short"})(answers[:1])


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("word_counts", "did you mean word_count"),
        ("missing", "has no attribute"),
        ("NOT_A_FUNCTION", "a int"),
    ],
)
def test_python_without_a_function(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        reward({"kind": "python", "name": name})
    assert caught.value.code == "reward.plugin"


@pytest.mark.usefixtures("installed")
def test_python_runs_only_what_the_operator_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    for enabled in ("", "picky", "picky,other"):
        monkeypatch.setenv(plugins.ENABLED_VARIABLE, enabled)
        with pytest.raises(UserError, match="TUNESMITH_PLUGINS=word_count"):
            reward({"kind": "python", "name": "word_count"})
    monkeypatch.setenv(plugins.ENABLED_VARIABLE, "picky, word_count")
    assert reward({"kind": "python", "name": "word_count"})([]) == []
