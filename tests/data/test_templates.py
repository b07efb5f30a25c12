"""Each chat format against the tokenizer's own template: text by text, token by token."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import CHATML, make_byte_tokenizer
from tunesmith.data.shapes.messages import from_messages
from tunesmith.data.templates import Renderer, RenderOptions, install_template
from tunesmith.data.templates.choose import is_plain
from tunesmith.data.templates.render import (
    CALLS_AS_TEXT,
    EMPTY_THINKING,
    FIRST_ANSWER,
    NO_END_MARK,
    SPECIAL_AS_TEXT,
    SPLIT_TURNS,
    TOOLS_AS_TEXT,
)
from tunesmith.data.tokenize import Encoder, TokenSequence
from tunesmith.errors import Problem, RecipeError
from tunesmith.types import Completion, Conversation, Message, Origin

ORIGIN = Origin("data.jsonl", 1)
EMPTY_BLOCK = "<think>\n\n</think>\n\n"
REAL = ("qwen3", "llama3_1", "deepseek_v3")

# Name -> what the format's template makes of an answer, its end token included. The names with a
# plus put ChatML on a real tokenizer: there the newline before an answer merges with the answer's
# own newlines, which the tokenizers' own templates avoid.
ANSWERS: dict[str, Callable[[str], str]] = {
    "bytes": lambda text: f"{text}<|im_end|>",
    "qwen3": lambda text: f"{EMPTY_BLOCK}{text.lstrip(chr(10))}<|im_end|>",
    "llama3_1": lambda text: f"{text.strip()}<|eot_id|>",
    "deepseek_v3": lambda text: f"{text}<｜end▁of▁sentence｜>",
    "qwen3+chatml": lambda text: f"{text}<|im_end|>",
    "llama3_1+chatml": lambda text: f"{text}<|im_end|><|eot_id|>",
}


@pytest.fixture(scope="session")
def real_tokenizers(tokenizers_folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(tokenizers_folder / name) for name in REAL}


@pytest.fixture
def tokenizer_named(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Any]:
    def get(name: str) -> Any:
        if name == "bytes":
            return make_byte_tokenizer()
        real, _, template = name.partition("+")
        tokenizer = request.getfixturevalue("real_tokenizers")[real]
        # setattr even without a change: what a test installs is taken off again after it.
        own = tokenizer.chat_template
        monkeypatch.setattr(tokenizer, "chat_template", CHATML if template else own)
        return tokenizer

    return get


def chat(*texts: str, system: str | None = None, silent: tuple[int, ...] = ()) -> list[dict]:
    """Messages in turns from the user on; answers numbered in `silent` get weight 0."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for index, text in enumerate(texts):
        message: dict[str, Any] = {"role": ("user", "assistant")[index % 2], "content": text}
        if index % 2:
            message["weight"] = 0 if index // 2 in silent else 1
        messages.append(message)
    return messages


def conversation(messages: list[dict], tools: list[dict] | None = None) -> Conversation:
    return from_messages({"messages": messages, "tools": tools}, ORIGIN)


def encode(tokenizer: Any, sample: Any, renderer: Renderer | None = None) -> list[TokenSequence]:
    segments = (renderer or Renderer(tokenizer)).render(sample)
    assert isinstance(segments, list), segments
    return Encoder(tokenizer.backend_tokenizer).encode([segments])[0]


def answers_of(tokenizer: Any, sequences: list[TokenSequence]) -> list[tuple[list[int], str]]:
    """(ids before the answer, text of the answer) for every supervised run."""
    return [
        (sequence.ids[:first].tolist(), tokenizer.decode(sequence.ids[first : first + length]))
        for sequence in sequences
        for first, length, _ in sequence.runs
    ]


def inference_ids(tokenizer: Any, messages: list[dict], **arguments: Any) -> list[int]:
    """What a chat server feeds the model before it answers."""
    clean = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
    encoded = tokenizer.apply_chat_template(clean, add_generation_prompt=True, **arguments)
    return list(encoded["input_ids"])


def check(tokenizer: Any, messages: list[dict], answer: Callable[[str], str]) -> None:
    """Every supervised run is the answer as the template writes it, behind inference's tokens."""
    sequences = encode(tokenizer, conversation(messages))
    supervised = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight", 1)
    ]
    found = answers_of(tokenizer, sequences)
    assert [text for _, text in found] == [answer(messages[i]["content"]) for i in supervised]
    for (before, _), index in zip(found, supervised, strict=True):
        assert before == inference_ids(tokenizer, messages[:index])
    # Nothing is computed behind the last supervised token.
    for sequence in sequences:
        first, length, _ = sequence.runs[-1]
        assert len(sequence.ids) == first + length


CONVERSATIONS = {
    "one turn": chat("What is 2+2?", "It is 4."),
    "one turn, Chinese": chat("二加二等于几？", "等于四。"),
    "system": chat("Who are you?", "A pirate, arr!", system="You are a pirate."),
    "system, Chinese": chat("你是谁？", "我是海盗。", system="你是一名海盗。"),
    "two turns": chat("Hi", "Hello there.", "Bye", "See you soon!"),
    "two turns, Chinese": chat("你好", "您好！", "再见", "回头见。", system="简短回答。"),
    "newlines before": chat("write a poem", "\n\nRoses are red"),
    "one newline before": chat("write a poem", "\nRoses\n\nare red", "more", "\nViolets"),
    "spaces before": chat("indent this", "    return 1", "again", "  return 2"),
    "tab before": chat("indent this", "\treturn 1"),
    "spaces after": chat("say it", "trailing  ", "again", "trailing   \n\n"),
    "newlines and spaces": chat("写一首诗", "\n\n  床前明月光  \n", "再写", " \n 疑是地上霜\n\n"),
    "newline in question": chat("\n\nhm\n\n", "yes", "  \n", "no"),
    "first answer silent": chat("a", "wrong", "b", "right", silent=(0,)),
    "last answer silent": chat("a", "right", "b", "wrong", silent=(1,)),
    "middle answer silent": chat("一", "对", "二", "\n错 ", "三", "对的", silent=(1,)),
    "three turns": chat("a", "1", "b", "2", "c", "3", system="Count."),
    "emoji and code": chat("🙂", "👩‍👩‍👧 `x = 1`\n```py\nprint('你好')\n```"),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_answers_stand_behind_inference_tokens(
    name: str, case: str, tokenizer_named: Callable[[str], Any]
) -> None:
    check(tokenizer_named(name), CONVERSATIONS[case], ANSWERS[name])


PIECES = st.sampled_from([*"\n \tab.中，🙂", "\n\n", "  ", "'s", "12", "<think>", "1.0"])
TEXTS = st.lists(PIECES, min_size=1, max_size=6).map("".join).filter(lambda text: text.strip())


@pytest.mark.parametrize("name", ["bytes", "llama3_1", "deepseek_v3", "qwen3+chatml"])
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(TEXTS, min_size=4, max_size=4), st.sets(st.integers(0, 1), max_size=1))
def test_any_texts(
    tokenizer_named: Callable[[str], Any], name: str, texts: list[str], silent: set[int]
) -> None:
    check(tokenizer_named(name), chat(*texts, silent=tuple(silent)), ANSWERS[name])


def test_answers_share_a_sequence_where_the_template_keeps_history(
    tokenizer_named: Callable[[str], Any],
) -> None:
    for name in ("bytes", "llama3_1", "deepseek_v3"):
        tokenizer = tokenizer_named(name)
        renderer = Renderer(tokenizer)
        sequences = encode(tokenizer, conversation(CONVERSATIONS["three turns"]), renderer)
        assert [len(sequence.runs) for sequence in sequences] == [3]
        assert renderer.notes == {}


def test_a_token_over_the_edge_splits_the_sequence(tokenizer_named: Callable[[str], Any]) -> None:
    # "assistant\n" + "\n\nRoses" would become one token of three newlines, which inference never
    # feeds before an answer.
    tokenizer = tokenizer_named("qwen3+chatml")
    messages = chat("a", "\n\nRoses", "b", "Violets")
    sequences = encode(tokenizer, conversation(messages))
    assert [len(sequence.runs) for sequence in sequences] == [1, 1]
    whole = tokenizer.apply_chat_template(messages[:2])["input_ids"]
    prompt = inference_ids(tokenizer, messages[:1])
    assert list(whole[: len(prompt)]) != prompt
    assert sequences[0].ids[: len(prompt)].tolist() == prompt


def test_a_split_sample_stays_in_its_place(tokenizer_named: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_named("qwen3+chatml")
    renderer = Renderer(tokenizer)
    samples = [chat("a", "b"), chat("a", "\n\nc", "d", "\ne"), chat("f", "\ng"), chat("h", "i")]
    rendered = [renderer.render(conversation(messages)) for messages in samples]
    together = Encoder(tokenizer.backend_tokenizer).encode(rendered)  # type: ignore[arg-type]
    for messages, sequences in zip(samples, together, strict=True):
        alone = encode(tokenizer, conversation(messages))
        assert [s.ids.tolist() for s in sequences] == [s.ids.tolist() for s in alone]
        assert [s.runs for s in sequences] == [s.runs for s in alone]
    assert [len(sequences) for sequences in together] == [1, 2, 1, 1]


def test_no_samples_encode_to_nothing(byte_tokenizer: Any) -> None:
    assert Encoder(byte_tokenizer.backend_tokenizer).encode([]) == []


@pytest.mark.parametrize("name", ["bytes", "llama3_1", "qwen3"])
def test_nothing_supervised_gives_no_sequence(
    name: str, tokenizer_named: Callable[[str], Any]
) -> None:
    tokenizer = tokenizer_named(name)
    assert encode(tokenizer, conversation(chat("a", "b", silent=(0,)))) == []


def test_weights_reach_the_runs(byte_tokenizer: Any) -> None:
    messages = chat("a", "b", "c", "d")
    messages[1]["weight"] = 0.25
    (sequence,) = encode(byte_tokenizer, conversation(messages))
    assert [weight for _, _, weight in sequence.runs] == [0.25, 1.0]


@pytest.mark.parametrize(
    "name", ["bytes", "qwen3", pytest.param("deepseek_v3", marks=pytest.mark.slow)]
)
def test_special_tokens_in_the_text(name: str, tokenizer_named: Callable[[str], Any]) -> None:
    """They are encoded as the text they are; apart from them the tokens are the template's own."""
    tokenizer = tokenizer_named(name)
    end = tokenizer.eos_token
    renderer = Renderer(tokenizer)
    segments = renderer.render(conversation(chat(f"what is {end}?", f"{end} ends a turn")))
    assert not isinstance(segments, Problem)
    (sequence,) = Encoder(tokenizer.backend_tokenizer).encode([segments])[0]
    text = tokenizer.apply_chat_template(
        chat(f"what is {end}?", f"{end} ends a turn"), tokenize=False
    )
    assert tokenizer.decode(sequence.ids) == text[: text.rindex(end) + len(end)]
    # In the whole text the spelling occurs twice more than the token.
    plain = tokenizer.apply_chat_template(chat("what is ?", " ends a turn"), tokenize=False)
    is_end = sequence.ids == tokenizer.convert_tokens_to_ids(end)
    assert is_end.sum() == plain[: plain.rindex(end) + len(end)].count(end)
    assert renderer.notes[SPECIAL_AS_TEXT] == 1


def test_an_answer_at_the_very_start_carries_no_loss(byte_tokenizer: Any) -> None:
    renderer = Renderer(byte_tokenizer)
    (segment,) = renderer.render(  # type: ignore[misc]
        conversation([{"role": "assistant", "content": "Welcome!"}, *chat("q", "a")])
    )
    assert [span.text for span in segment if span.is_supervised] == ["a<|im_end|>"]
    assert "Welcome!" in segment[0].text
    assert renderer.notes == {FIRST_ANSWER: 1}
    assert renderer.render(conversation([{"role": "assistant", "content": "Welcome!"}])) == []


def test_text_that_the_tokenizer_composes(tokenizer_named: Callable[[str], Any]) -> None:
    # Qwen's tokenizer normalizes to NFC: characters of the text and of the tokens differ.
    tokenizer = tokenizer_named("qwen3")
    text = "cafe\u0301 au lait"
    check(
        tokenizer,
        chat(f"{text}?", f"{text}!", "encore", f"\u0301{text}"),
        lambda content: ANSWERS["qwen3"](unicodedata.normalize("NFC", content)),
    )


# Qwen3: thinking blocks


def test_qwen3_gives_each_answer_its_own_sequence(tokenizer_named: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_named("qwen3")
    renderer = Renderer(tokenizer)
    sequences = encode(tokenizer, conversation(CONVERSATIONS["two turns"]), renderer)
    assert [len(sequence.runs) for sequence in sequences] == [1, 1]
    assert renderer.notes == {EMPTY_THINKING: 1, SPLIT_TURNS: 1}
    second = tokenizer.decode(sequences[1].ids)
    assert "assistant\nHello there.<|im_end|>" in second  # without the block it was learned with
    assert second.count("<think>") == 1


def test_qwen3_one_turn_needs_no_split(tokenizer_named: Callable[[str], Any]) -> None:
    renderer = Renderer(tokenizer_named("qwen3"))
    for _ in range(3):
        renderer.render(conversation(CONVERSATIONS["one turn"]))
    assert renderer.notes == {EMPTY_THINKING: 3}


def test_qwen3_without_thinking(tokenizer_named: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_named("qwen3")
    renderer = Renderer(tokenizer, RenderOptions({"enable_thinking": False}))
    messages = CONVERSATIONS["two turns, Chinese"]
    sequences = encode(tokenizer, conversation(messages), renderer)
    found = answers_of(tokenizer, sequences)
    assert [text for _, text in found] == ["您好！<|im_end|>", "回头见。<|im_end|>"]
    for (before, _), index in zip(found, (2, 4), strict=True):
        assert before == inference_ids(tokenizer, messages[:index], enable_thinking=False)
        assert tokenizer.decode(before).endswith(EMPTY_BLOCK)
    assert renderer.notes == {SPLIT_TURNS: 1}


def test_qwen3_learns_given_reasoning(tokenizer_named: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_named("qwen3")
    renderer = Renderer(tokenizer)
    messages = chat("2+2?", "4")
    messages[1]["reasoning_content"] = "Two and two."
    ((before, text),) = answers_of(tokenizer, encode(tokenizer, conversation(messages), renderer))
    assert text == "<think>\nTwo and two.\n</think>\n\n4<|im_end|>"
    assert before == inference_ids(tokenizer, messages[:1])
    assert renderer.notes == {}


def test_qwen3_takes_reasoning_from_the_text(tokenizer_named: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_named("qwen3")
    renderer = Renderer(tokenizer)
    messages = chat("2+2?", "<think>\nEasy.\n</think>\n\n4", "3+3?", "<think>\nHm.\n</think>\n\n6")
    found = answers_of(tokenizer, encode(tokenizer, conversation(messages), renderer))
    assert [text for _, text in found] == [
        "<think>\nEasy.\n</think>\n\n4<|im_end|>",
        "<think>\nHm.\n</think>\n\n6<|im_end|>",
    ]
    assert "Easy" not in tokenizer.decode(found[1][0])
    assert renderer.notes == {SPLIT_TURNS: 1}


# Templates of other makes, on the byte tokenizer


def test_a_prompt_that_opens_thinking(byte_tokenizer: Any) -> None:
    # DeepSeek-R1's way: generation starts inside the block, history leaves the block out.
    byte_tokenizer.chat_template = CHATML.replace(
        "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"
    )
    messages = chat("2+2?", "4", "3+3?", "6")
    messages[1]["reasoning_content"] = "Easy."
    found = answers_of(byte_tokenizer, encode(byte_tokenizer, conversation(messages)))
    assert [text for _, text in found] == [
        "Easy.\n</think>\n\n4<|im_end|>",
        "\n</think>\n\n6<|im_end|>",
    ]
    for (before, _), index in zip(found, (1, 3), strict=True):
        assert before == inference_ids(byte_tokenizer, messages[:index])


def test_a_prompt_that_is_no_prefix_is_refused(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = CHATML.replace("assistant\n' }}{% endif", "helper\n' }}{% endif")
    problem = Renderer(byte_tokenizer).render(conversation(chat("q", "a")))
    assert isinstance(problem, Problem)
    assert (problem.where, problem.code) == ("data.jsonl:1", "data.template")
    assert "generation prompt" in problem.found


def test_the_template_s_own_refusal_is_a_problem(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}"
        "{% endif %}" + CHATML
    )
    renderer = Renderer(byte_tokenizer)
    assert isinstance(renderer.render(conversation(chat("q", "a"))), list)
    problem = renderer.render(conversation(chat("q", "a", system="s")))
    assert isinstance(problem, Problem)
    assert problem.code == "data.template"
    assert "no system role here" in problem.found


def test_no_end_mark_adds_eos(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    renderer = Renderer(byte_tokenizer)
    messages = chat("q", "a", "r", "b")
    found = answers_of(byte_tokenizer, encode(byte_tokenizer, conversation(messages), renderer))
    assert [text for _, text in found] == [" a<|im_end|>", " b<|im_end|>"]
    for (before, _), index in zip(found, (1, 3), strict=True):
        assert before == inference_ids(byte_tokenizer, messages[:index])
    assert renderer.notes[NO_END_MARK] == 1


def test_names_reach_the_template(byte_tokenizer: Any) -> None:
    messages = [
        {"role": "user", "name": "Ann", "content": "q"},
        {"role": "assistant", "name": "helper", "content": "a"},
    ]
    byte_tokenizer.chat_template = CHATML.replace(
        "message['role'] +", "message['role'] + (' ' + message.name if message.name else '') +"
    ).replace("assistant\n", "assistant helper\n")
    ((before, text),) = answers_of(byte_tokenizer, encode(byte_tokenizer, conversation(messages)))
    assert byte_tokenizer.decode(before).startswith("<|im_start|>user Ann\nq<|im_end|>")
    assert text == "a<|im_end|>"


# Tools

SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "北京天气？"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sky": "晴"}'},
    {"role": "assistant", "content": "晴天。"},
]
CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'


@pytest.mark.parametrize("is_text", [False, True])
def test_qwen3_writes_tool_calls_itself(
    tokenizer_named: Callable[[str], Any], is_text: bool
) -> None:
    tokenizer = tokenizer_named("qwen3")
    messages = json.loads(json.dumps(TOOL_CHAT))
    if is_text:  # OpenAI's own form: the arguments are JSON text
        messages[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "北京"}'
    renderer = Renderer(tokenizer)
    sequences = encode(tokenizer, conversation(messages, [SCHEMA]), renderer)
    found = answers_of(tokenizer, sequences)
    assert [text for _, text in found] == [
        f"{EMPTY_BLOCK}{CALL_TEXT}<|im_end|>",
        f"{EMPTY_BLOCK}晴天。<|im_end|>",
    ]
    own = [dict(TOOL_CHAT[0]), {**TOOL_CHAT[1], "content": ""}, *TOOL_CHAT[2:]]
    for (before, _), index in zip(found, (1, 3), strict=True):
        assert before == inference_ids(tokenizer, own[:index], tools=[SCHEMA])
    assert CALLS_AS_TEXT not in renderer.notes
    assert TOOLS_AS_TEXT not in renderer.notes


def test_qwen3_writes_two_calls_with_content(tokenizer_named: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_named("qwen3")
    messages = [TOOL_CHAT[0], {"role": "assistant", "content": "看看", "tool_calls": [CALL, CALL]}]
    ((_, text),) = answers_of(tokenizer, encode(tokenizer, conversation(messages, [SCHEMA])))
    assert text == f"{EMPTY_BLOCK}看看\n{CALL_TEXT}\n{CALL_TEXT}<|im_end|>"


@pytest.mark.parametrize("name", ["bytes", "llama3_1", "deepseek_v3"])
@pytest.mark.parametrize("system", [None, "简短回答。"])
def test_templates_without_tools_get_text(
    name: str, system: str | None, tokenizer_named: Callable[[str], Any]
) -> None:
    tokenizer = tokenizer_named(name)
    renderer = Renderer(tokenizer)
    head: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    sample = conversation([*head, *TOOL_CHAT], [SCHEMA])
    found = answers_of(tokenizer, encode(tokenizer, sample, renderer))
    assert [text for _, text in found] == [ANSWERS[name](CALL_TEXT), ANSWERS[name]("晴天。")]
    assert renderer.notes == {CALLS_AS_TEXT: 1, TOOLS_AS_TEXT: 1}
    instructions = (
        "You may call one or more functions. Their signatures stand within <tools></tools>:\n"
        f"<tools>\n{json.dumps(SCHEMA, ensure_ascii=False)}\n</tools>\n"
        "To call one, answer with a JSON object within <tool_call></tool_call>:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>'
    )
    spelled = [
        {"role": "system", "content": f"{system}\n\n{instructions}" if system else instructions},
        TOOL_CHAT[0],
        {"role": "assistant", "content": CALL_TEXT},
        {"role": "user", "content": '<tool_response>\n{"sky": "晴"}\n</tool_response>'},
    ]
    assert [before for before, _ in found] == [
        inference_ids(tokenizer, spelled[:2]),
        inference_ids(tokenizer, spelled),
    ]


def test_calls_as_text_keep_content_and_weight(byte_tokenizer: Any) -> None:
    messages = [
        TOOL_CHAT[0],
        {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, CALL], "weight": 0.5},
    ]
    (sequence,) = encode(byte_tokenizer, conversation(messages))
    ((first, length, weight),) = sequence.runs
    text = byte_tokenizer.decode(sequence.ids[first : first + length])
    assert text == f"Wait.\n{CALL_TEXT}\n{CALL_TEXT}<|im_end|>"
    assert weight == 0.5


def test_schemas_only_where_the_template_shows_calls(byte_tokenizer: Any) -> None:
    # Shows calls, with arguments as text, but no schemas: only the schemas are spelled out.
    byte_tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}"
        "[{{ c.function.name }}:{{ c.function.arguments if c.function.arguments is string }}]"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = Renderer(byte_tokenizer)
    assert renderer.traits.call_arguments == "text"
    found = answers_of(
        byte_tokenizer, encode(byte_tokenizer, conversation(TOOL_CHAT, [SCHEMA]), renderer)
    )
    assert found[0][1] == '[weather:{"city": "北京"}]<|im_end|>'
    prompt = byte_tokenizer.decode(found[0][0])
    assert json.dumps(SCHEMA, ensure_ascii=False) in prompt
    assert "To call one" not in prompt
    assert renderer.notes == {TOOLS_AS_TEXT: 1}


# The plain template and the choice of one


def test_a_tokenizer_s_own_template_stays(byte_tokenizer: Any) -> None:
    before = byte_tokenizer.chat_template
    assert install_template(byte_tokenizer) == "the tokenizer's own chat template"
    assert byte_tokenizer.chat_template == before
    assert not is_plain(byte_tokenizer)


@pytest.mark.parametrize("choice", ["auto", "plain"])
def test_plain_template(byte_tokenizer: Any, choice: str) -> None:
    if choice == "auto":
        byte_tokenizer.chat_template = None
    said = install_template(byte_tokenizer, choice)
    assert "plain User:/Assistant:" in said
    assert ("has none" in said) == (choice == "auto")
    assert is_plain(byte_tokenizer)
    messages = chat("q", "a", "你好", "\n 好 ", system="S")
    check(byte_tokenizer, messages, lambda text: f" {text}<|im_end|>")
    (sequence,) = encode(byte_tokenizer, conversation(messages))
    assert byte_tokenizer.decode(sequence.ids) == (
        "S\n\nUser: q\n\nAssistant: a<|im_end|>\n\nUser: 你好\n\nAssistant: \n 好 <|im_end|>"
    )


@pytest.mark.parametrize(("name", "bos"), [("qwen3", ""), ("llama3_1", "<|begin_of_text|>")])
def test_plain_template_on_base_tokenizers(
    name: str, bos: str, tokenizer_named: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_named(name)
    tokenizer.chat_template = None
    install_template(tokenizer)
    eos = tokenizer.eos_token
    for case in ("two turns", "two turns, Chinese", "newlines before", "spaces after"):
        check(tokenizer, CONVERSATIONS[case], lambda text: f" {text}{eos}")
    (sequence,) = encode(tokenizer, conversation(chat("q", "a")))
    assert tokenizer.decode(sequence.ids) == f"{bos}User: q\n\nAssistant: a{eos}"
    (bare,) = encode(tokenizer, Completion("从前有座山，", "山里有座庙。", ORIGIN))
    ((first, length, weight),) = bare.runs
    assert bare.ids[:first].tolist() == tokenizer("从前有座山，")["input_ids"]
    assert tokenizer.decode(bare.ids[first : first + length]) == f"山里有座庙。{eos}"
    assert weight == 1.0


def test_completions_are_bare_text_with_eos(byte_tokenizer: Any) -> None:
    install_template(byte_tokenizer, "plain")
    (sequence,) = encode(byte_tokenizer, Completion("1 + 1 =", " 2", ORIGIN))
    assert byte_tokenizer.decode(sequence.ids) == "1 + 1 = 2<|im_end|>"
    assert sequence.runs == ((7, 3, 1.0),)
    assert sequence.ids[-1] == byte_tokenizer.eos_token_id


def test_completions_are_chats_under_a_chat_template(byte_tokenizer: Any) -> None:
    bare = encode(byte_tokenizer, Completion("q", "a", ORIGIN))
    asked = encode(byte_tokenizer, conversation(chat("q", "a")))
    assert bare[0].ids.tolist() == asked[0].ids.tolist()
    assert bare[0].runs == asked[0].runs


def test_a_template_file(byte_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ '中' }}" + CHATML, encoding="utf-8")
    said = install_template(byte_tokenizer, "mine.jinja", tmp_path)
    assert said == f"the chat template in {tmp_path / 'mine.jinja'}"
    assert byte_tokenizer.chat_template == "{{ '中' }}" + CHATML


def test_a_missing_template_file(byte_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file") as caught:
        install_template(byte_tokenizer, "none.jinja", tmp_path)
    assert caught.value.code == "recipe.template"
    assert caught.value.where == "data.template"


def test_an_assistant_message_without_content_is_rendered(byte_tokenizer: Any) -> None:
    sample = Conversation(
        (Message("user", None), Message("assistant", None, weight=0.0), Message("assistant", "x")),
        ORIGIN,
    )
    ((before, text),) = answers_of(byte_tokenizer, encode(byte_tokenizer, sample))
    assert text == "x<|im_end|>"
    assert byte_tokenizer.decode(before).startswith("<|im_start|>user\n<|im_end|>\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "deepseek_v3"])
def test_bare_prompts_keep_their_own_tokens(tokenizers_folder: Path, name: str) -> None:
    """Prompts may end anywhere, in two spaces for one: alone and in training they are the same."""
    import random

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers_folder / name)
    install_template(tokenizer, "plain")
    renderer = Renderer(tokenizer)
    rng = random.Random(0)
    prompts = ["Total:  ", *("".join(rng.choices("a1 \n\t.，好", k=6)) for _ in range(300))]
    answers = ["23", *("".join(rng.choices("a1 \n\t.，好", k=4)) for _ in range(300))]
    for prompt, answer in zip(prompts, answers, strict=True):
        segments = renderer.render(Completion(prompt, answer, Origin("x", 1)))
        assert isinstance(segments, list)
        ((sequence,),) = Encoder(tokenizer.backend_tokenizer).encode([segments])
        ((first, _, _),) = sequence.runs
        text = segments[0][0].text
        alone = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert sequence.ids[:first].tolist() == alone
