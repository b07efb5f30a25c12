"""Named templates: their exact text, the prompt before each answer, what carries loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import make_byte_tokenizer
from tunesmith.data.templates import Renderer
from tunesmith.data.templates.named import FOLDER, NAMED, missing_tokens, template_files
from tunesmith.data.templates.render import NO_END_MARK, SPLIT_TURNS
from tunesmith.data.templates.sandbox import compile_template
from tunesmith.types import Conversation, Message, Origin, ToolCall

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]

# The conversation's whole text; (E) stands for the tokenizer's EOS token.
TEXTS = {
    "vanilla": "Be brief.你好HelloByeSee you",
    "alpaca": "Be brief.\n\n### Instruction:\n你好\n\n### Response:\nHello(E)\n\n"
    "### Instruction:\nBye\n\n### Response:\nSee you(E)\n\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\nSee you<|im_end|>\n",
    "qwen": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\nSee you<|im_end|>\n",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n你好 [/INST] Hello </s>"
    "<s>[INST] Bye [/INST] See you </s>",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n你好<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nSee you<|eot_id|>",
    "deepseek": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>你好<｜Assistant｜>Hello"
    "<｜end▁of▁sentence｜><｜User｜>Bye<｜Assistant｜>See you<｜end▁of▁sentence｜>",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\n你好<end_of_turn>\n"
    "<start_of_turn>model\nHello<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"
    "<start_of_turn>model\nSee you<end_of_turn>\n",
    "mistral": "<s>[INST] Be brief.\n\n你好[/INST] Hello</s>[INST] Bye[/INST] See you</s>",
    "chatglm": "[gMASK]<sop><|system|>\nBe brief.<|user|>\n你好<|assistant|>\nHello<|user|>\nBye"
    "<|assistant|>\nSee you<|user|>",
    "baichuan": "Be brief.<reserved_106>你好<reserved_107>Hello</s>"
    "<reserved_106>Bye<reserved_107>See you</s>",
    "llama-chinese": "<s>System: Be brief.\n</s><s>Human: 你好\n</s><s>Assistant: Hello\n</s>"
    "<s>Human: Bye\n</s><s>Assistant: See you\n</s>",
    "belle": "Be brief.\n\nHuman: 你好\n\nAssistant: Hello(E)\n\n"
    "Human: Bye\n\nAssistant: See you(E)\n\n",
}

# What opens an answer, and the second answer as it is learned.
ANSWERS = {
    "vanilla": ("", "See you(E)"),
    "alpaca": ("### Response:\n", "See you(E)"),
    "chatml": ("<|im_start|>assistant\n", "See you<|im_end|>"),
    "qwen": ("<|im_start|>assistant\n", "See you<|im_end|>"),
    "llama2": (" [/INST]", " See you </s>"),
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "See you<|eot_id|>"),
    "deepseek": ("<｜Assistant｜>", "See you<｜end▁of▁sentence｜>"),
    "gemma": ("<start_of_turn>model\n", "See you<end_of_turn>"),
    "mistral": ("[/INST]", " See you</s>"),
    "chatglm": ("<|assistant|>", "\nSee you<|user|>"),
    "baichuan": ("<reserved_107>", "See you</s>"),
    "llama-chinese": ("<s>Assistant:", " See you\n</s>"),
    "belle": ("Assistant:", " See you(E)"),
}


def tokenizer_for(name: str) -> Any:
    """The byte tokenizer with the template and the special tokens that it asks for."""
    tokenizer = make_byte_tokenizer()
    named = NAMED[name]
    tokenizer.add_special_tokens({"additional_special_tokens": list(named.tokens)})
    tokenizer.chat_template = named.read()
    return tokenizer


def render(name: str, messages: list[dict[str, Any]], **more: Any) -> str:
    return compile_template(NAMED[name].read()).render(messages, eos_token="(E)", **more)


def as_sample(messages: list[dict[str, Any]]) -> Conversation:
    return Conversation(tuple(Message(**message) for message in messages), Origin("x.jsonl", 1))


def test_the_table_and_the_files_name_the_same() -> None:
    assert list(NAMED) == list(TEXTS) == list(ANSWERS)
    assert len(NAMED) == 13
    assert sorted(template_files()) == sorted(FOLDER.glob("*.jinja"))
    for name, template in NAMED.items():
        assert template.name == name
        assert template.description
        assert template.source
        assert template.end == "eos" or template.end in template.tokens


@pytest.mark.parametrize("name", TEXTS)
def test_text_of_a_conversation(name: str) -> None:
    assert render(name, MESSAGES) == TEXTS[name]


@pytest.mark.parametrize("name", TEXTS)
def test_transformers_writes_the_same(name: str) -> None:
    tokenizer = tokenizer_for(name)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == TEXTS[name].replace("(E)", "<|im_end|>")


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_continues_the_prompt_before_each_answer(name: str) -> None:
    opening, answer = ANSWERS[name]
    for start in (0, 1):
        text = render(name, MESSAGES[start:])
        for stop in (2, 4):
            prompt = render(name, MESSAGES[start:stop], add_generation_prompt=True)
            assert prompt.endswith(opening)
            assert text.startswith(prompt)
        assert text[len(prompt) :].rstrip("\n") == answer.replace("(E)" * (name == "vanilla"), "")


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    "roles",
    [
        ("user",),
        ("system",),
        ("system", "user", "user"),
        ("user", "assistant", "assistant", "user"),
        ("user", "assistant", "system", "user"),
        ("system", "system", "user"),
    ],
)
def test_unusual_orders_lose_no_message(name: str, roles: tuple[str, ...]) -> None:
    messages = [{"role": role, "content": f"text{n}"} for n, role in enumerate(roles)]
    prompt = render(name, messages, add_generation_prompt=True)
    for number in range(len(roles)):
        assert prompt.count(f"text{number}") == 1
    full = render(name, [*messages, {"role": "assistant", "content": "answer"}])
    assert full.startswith(prompt)


@pytest.mark.parametrize("name", TEXTS)
def test_answers_and_their_end_carry_loss(name: str) -> None:
    tokenizer = tokenizer_for(name)
    renderer = Renderer(tokenizer)
    segments = renderer.render(as_sample(MESSAGES))
    assert isinstance(segments, list)
    spans = [span for segment in segments for span in segment]
    answer = ANSWERS[name][1].replace("(E)", "<|im_end|>")
    supervised = [span.text for span in spans if span.is_supervised]
    assert supervised == [answer.replace("See you", "Hello"), answer]
    if name == "vanilla":
        assert set(renderer.notes) == {NO_END_MARK, SPLIT_TURNS}
        assert len(segments) == 2
    else:
        assert not renderer.notes
        assert len(segments) == 1
        text = "".join(span.text for span in spans)
        assert TEXTS[name].replace("(E)", "<|im_end|>").startswith(text)


TOOLS = ({"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}},)
CALLS = (
    Message("user", "Weather?"),
    Message("assistant", None, (ToolCall("look", '{"at": "天"}'), ToolCall("look", "{}"))),
    Message("tool", "sun"),
    Message("tool", "rain"),
    Message("assistant", "Both."),
)

CALL_TEXTS = {
    "chatml": '<tool_call>\n{"name": "look", "arguments": {"at": "天"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>',
    "llama3": '{"name": "look", "parameters": {"at": "天"}}; '
    '{"name": "look", "parameters": {}}<|eot_id|>',
}
CALL_TEXTS["qwen"] = CALL_TEXTS["chatml"]


@pytest.mark.parametrize("name", TEXTS)
def test_calls_in_the_format_or_as_text(name: str) -> None:
    tokenizer = tokenizer_for(name)
    renderer = Renderer(tokenizer)
    assert renderer.traits.shows_tools == NAMED[name].shows_tools == (name in CALL_TEXTS)
    assert (renderer.traits.call_arguments is not None) == NAMED[name].shows_tools
    segments = renderer.render(Conversation(CALLS, Origin("x.jsonl", 1), TOOLS))
    assert isinstance(segments, list)
    spans = [span for segment in segments for span in segment]
    text = "".join(span.text for span in spans)
    assert '"name": "look"' in spans[0].text
    for word in ("Weather?", "sun", "rain", "Both."):
        assert text.count(word) == 1 or (name == "vanilla" and word in text)
    supervised = [span.text for span in spans if span.is_supervised]
    assert len(supervised) == 2
    if name in CALL_TEXTS:
        assert supervised[0] == CALL_TEXTS[name]


@pytest.mark.parametrize("name", TEXTS)
def test_marks_come_from_the_list(name: str) -> None:
    """A tokenizer with the listed tokens reads every mark of the format as one token."""
    tokenizer = tokenizer_for(name)
    vocabulary = tokenizer.get_vocab()
    assert missing_tokens(name, vocabulary) == []
    assert missing_tokens(name, {}) == list(NAMED[name].tokens)
    ids = tokenizer.encode(TEXTS[name], add_special_tokens=False)
    for token in NAMED[name].tokens:
        if token in TEXTS[name]:
            assert vocabulary[token] in ids


# Against real tokenizers of the same formats


@pytest.fixture(scope="module")
def tokenizers(shared: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {
        name: AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
        for name in ("qwen3", "llama3_1", "deepseek_v3")
    }


def own_text(tokenizer: Any, messages: list[dict[str, Any]], **more: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **more)


@pytest.mark.parametrize("name", ["qwen", "chatml"])
def test_qwen3_differs_in_its_thinking_block_alone(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["qwen3"]
    assert missing_tokens(name, tokenizer.get_vocab()) == []
    for stop in (1, 2, 4):
        assert render(name, MESSAGES[:stop], add_generation_prompt=True) == own_text(
            tokenizer, MESSAGES[:stop], add_generation_prompt=True
        )
    # Qwen3 puts an empty block before its last answer; a base model without thinking needs none.
    theirs = own_text(tokenizer, MESSAGES)
    assert render(name, MESSAGES) == theirs.replace("<think>\n\n</think>\n\n", "")


def test_qwen_writes_tools_as_qwen3_does(tokenizers: dict[str, Any]) -> None:
    function = {"name": "look", "arguments": {"at": "天"}}
    messages = [
        *MESSAGES[:2],
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "rain"},
    ]
    for stop in (2, 5):
        assert render(
            "qwen", messages[:stop], tools=list(TOOLS), add_generation_prompt=True
        ) == own_text(
            tokenizers["qwen3"],
            messages[:stop],
            tools=list(TOOLS),
            add_generation_prompt=True,
        ).replace("<think>\n\n</think>\n\n", "")


def test_qwen_says_whose_assistant_it_is_without_a_system_message() -> None:
    """So did Qwen 1.5 and 2; Qwen3 writes none."""
    text = render("qwen", MESSAGES[1:2])
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


@pytest.mark.parametrize(("name", "real"), [("llama3", "llama3_1"), ("deepseek", "deepseek_v3")])
def test_llama_and_deepseek_write_the_same(
    name: str, real: str, tokenizers: dict[str, Any]
) -> None:
    """Llama's own has no date header in this tokenizer; those that have one differ in it alone."""
    tokenizer = tokenizers[real]
    assert missing_tokens(name, tokenizer.get_vocab()) == []
    for start in (0, 1):
        for stop in range(start + 1, 6):
            for prompt in (False, True):
                messages = MESSAGES[start:stop]
                assert render(name, messages, add_generation_prompt=prompt) == own_text(
                    tokenizer, messages, add_generation_prompt=prompt
                )


def test_llama3_does_not_fit_qwen(tokenizers: dict[str, Any]) -> None:
    assert missing_tokens("llama3", tokenizers["qwen3"].get_vocab()) == [
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
