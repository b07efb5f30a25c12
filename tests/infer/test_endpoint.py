"""A server of the OpenAI API: what is sent, what is taken from it, what is tried again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tunesmith.errors import EvaluationError
from tunesmith.infer.answers import Answering
from tunesmith.infer.endpoint import Endpoint, EndpointEngine, api_key

SECRET = "sk-thisisasecret0123456789"


@dataclass
class Server:
    """Answers requests one after another with what it was told to."""

    url: str = ""
    replies: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    seen: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    echo: Callable[[dict[str, Any]], Any] | None = None


def chat(text: str | None, reason: str = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **more}
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    return {"choices": [{"message": message, "finish_reason": reason}], "usage": usage}


@pytest.fixture
def server() -> Iterator[Server]:
    state, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.seen.append((self.path, body, dict(self.headers)))
                if state.echo is not None:
                    code, headers, reply = 200, {}, state.echo(body)
                else:
                    code, headers, reply = state.replies.pop(0)
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

    class Http(ThreadingHTTPServer):
        request_queue_size = 64  # with 5, a ninth connection would wait for a second

    http = Http(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()
    http.server_close()


@dataclass(frozen=True)
class Asked:
    id: str
    messages: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    ids: tuple[int, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


def user(text: str, number: int = 1) -> Asked:
    return Asked(f"{number:08x}" + "0" * 8, ({"role": "user", "content": text},))


def endpoint(server: Server, **values: Any) -> Endpoint:
    waited: list[float] = []
    made = Endpoint(server.url, "tiny", SECRET, wait=waited.append, **values)
    object.__setattr__(made, "waited", waited)
    return made


def test_what_is_sent_and_what_comes_back(server: Server) -> None:
    server.replies.append((200, {}, chat("four END five", "stop")))
    answering = Answering(max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=3, stop=("END",))
    answer = endpoint(server).chat([{"role": "user", "content": "2+2?"}], answering, seed=9)
    assert (answer.text, answer.finish_reason) == ("four ", "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (5, 2)
    ((path, body, headers),) = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert body == {
        "model": "tiny", "messages": [{"role": "user", "content": "2+2?"}], "max_tokens": 7,
        "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 9, "stop": ["END"],
    }  # fmt: skip


def test_calls_log_probabilities_and_plain_texts(server: Server) -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    reply = chat(None, "tool_calls", tool_calls=[call])
    reply["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": -0.5}]}
    plain = {"text": "on", "finish_reason": "length"}
    plain["logprobs"] = {"tokens": ["on"], "token_logprobs": [-1.0]}
    server.replies += [(200, {}, reply), (200, {}, {"choices": [plain]})]
    answering = Answering(has_logprobs=True)
    answer = endpoint(server).chat([], answering, tools=({"type": "function"},))
    assert answer.text == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert answer.logprobs == (("x", -0.5),)
    texts = Endpoint(f"{server.url}/completions", "tiny")
    ((_, found),) = EndpointEngine(texts).answer([user("go")], answering)
    assert (found.text, found.finish_reason, found.logprobs) == ("on", "length", (("on", -1.0),))
    (_, first, _), (path, second, headers) = server.seen
    assert first["tools"] == [{"type": "function"}]
    assert first["logprobs"] is True
    assert path == "/v1/completions"
    assert second["prompt"] == "go"
    assert "Authorization" not in headers


def test_what_may_pass_is_tried_again(server: Server) -> None:
    server.replies += [
        (429, {"Retry-After": "7"}, {}),
        (500, {}, {}),
        (503, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, {}),
        (200, {}, chat("late")),
    ]
    made = endpoint(server)
    assert made.chat([], Answering()).text == "late"
    assert made.waited == [7.0, 2.0, 4.0]  # type: ignore[attr-defined]


def test_the_last_attempt_and_what_never_passes(server: Server) -> None:
    server.replies += [(500, {}, b"down")] * 2 + [(401, {}, b"who?"), (200, {}, b"<html>")]
    with pytest.raises(EvaluationError, match=r"status 500: down \(the last of 2 attempts\)"):
        endpoint(server, attempts=2).chat([], Answering())
    for found in ("status 401: who", "html"):
        with pytest.raises(EvaluationError, match=found) as caught:
            endpoint(server).chat([], Answering())
        assert SECRET not in str(caught.value)
    assert SECRET not in repr(endpoint(server))
    server.replies.append((200, {}, {"choices": []}))
    with pytest.raises(EvaluationError, match="another form"):
        endpoint(server).chat([], Answering())


def test_redirects_are_not_followed(server: Server) -> None:
    server.replies.append((302, {"Location": "http://127.0.0.1:9/elsewhere"}, b""))
    with pytest.raises(EvaluationError, match="status 302"):
        endpoint(server).chat([], Answering())


def test_nobody_there() -> None:
    waited: list[float] = []
    nobody = Endpoint("http://127.0.0.1:9/v1", "m", attempts=3, wait=waited.append)
    with pytest.raises(EvaluationError, match=r"evaluate\.endpoint"):
        nobody.chat([], Answering())
    assert waited == [1.0, 2.0]
    with pytest.raises(EvaluationError, match="the address"):
        Endpoint("file:///etc/passwd", "m").chat([], Answering())


def test_the_newer_name_of_the_limit(server: Server) -> None:
    said = b"Unsupported parameter: use 'max_completion_tokens'"
    server.replies += [(400, {}, said), (200, {}, chat("ok"))]
    assert endpoint(server).chat([], Answering(max_new_tokens=3)).text == "ok"
    assert server.seen[-1][1]["max_completion_tokens"] == 3
    assert "max_tokens" not in server.seen[-1][1]


def test_many_at_once_each_row_once(server: Server) -> None:
    server.echo = lambda body: chat(body["messages"][0]["content"].upper())
    asked = [user(f"row {number}", number) for number in range(30)]
    engine = EndpointEngine(Endpoint(server.url, "tiny"))
    found = dict(engine.answer(asked, Answering(temperature=1.0)))
    assert {n: found[n].text for n in range(30)} == {n: f"ROW {n}" for n in range(30)}
    seeds = {body["messages"][0]["content"]: body["seed"] for _, body, _ in server.seen}
    assert len(set(seeds.values())) > 1
    again = dict(engine.answer(asked[:2], Answering(temperature=1.0)))
    assert server.seen[-1][1]["seed"] in seeds.values()
    assert len(again) == 2


def test_a_failure_among_many_ends_the_work(server: Server) -> None:
    server.replies += [(403, {}, b"no")] * 12
    engine = EndpointEngine(Endpoint(server.url, "tiny"))
    with pytest.raises(EvaluationError, match="403"):
        list(engine.answer([user("x", n) for n in range(12)], Answering()))
    assert len(server.seen) <= 12


def test_a_conversation_is_no_plain_text(server: Server) -> None:
    talk = Asked("0" * 16, ({"role": "system", "content": "s"}, {"role": "user", "content": "u"}))
    texts = EndpointEngine(Endpoint(f"{server.url}/completions", "tiny"))
    with pytest.raises(EvaluationError, match="plain texts alone"):
        list(texts.answer([talk], Answering()))


def test_whose_key_goes_where(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TUNESMITH_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert api_key("https://api.example/v1") is None
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    assert api_key("https://api.example/v1") == "theirs"
    assert api_key("http://localhost:8000/v1") == "theirs"
    assert api_key("http://10.0.0.7:8000/v1") is None
    monkeypatch.setenv("TUNESMITH_API_KEY", "ours")
    assert api_key("http://10.0.0.7:8000/v1") == "ours"
    monkeypatch.setenv("TUNESMITH_API_KEY", "línea")
    with pytest.raises(EvaluationError, match=r"evaluate\.key") as caught:
        api_key("https://api.example/v1")
    assert "línea" not in str(caught.value)
