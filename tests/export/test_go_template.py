"""Go templates of Ollama's Modelfiles say what the Jinja templates say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunesmith.data.templates.named import NAMED
from tunesmith.export.go_template import UnlikeError, find_pieces, go_template, render_go

CHATML_DEFAULT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_THINKING = CHATML_DEFAULT.replace(
    "<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
)
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello {{ there }}!"}],
    [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三\n四"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ],
]


def jinja(template: str) -> Callable[[Sequence[Mapping[str, Any]]], str]:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        return compiled.render(
            messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
        )

    return render


TEMPLATES = {"chatml with a default": CHATML_DEFAULT, "no thinking": NO_THINKING}
TEMPLATES |= {name: template.read() for name, template in NAMED.items()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_renders_as_the_jinja_template(name: str) -> None:
    render = jinja(TEMPLATES[name])
    try:
        pieces = find_pieces(render)
    except (UnlikeError, ValueError) as error:
        pytest.skip(f"no Go template: {error}")
    template = go_template(pieces)
    for messages in CONVERSATIONS:
        if pieces.is_folded and messages[0]["role"] == "system":
            continue
        assert render_go(template, messages) == render(messages), template


def test_common_formats_have_a_go_template() -> None:
    found = []
    for name, template in TEMPLATES.items():
        try:
            find_pieces(jinja(template))
        except (UnlikeError, ValueError):
            continue
        found.append(name)
    for name in ("chatml", "llama2", "llama3", "mistral", "gemma", "no thinking"):
        assert name in found, (name, found)


def test_the_go_language_beyond_our_part_is_refused() -> None:
    with pytest.raises(UnlikeError):
        render_go("{{ template .System }}", CONVERSATIONS[0])


def test_a_template_whose_first_turn_differs_is_refused() -> None:
    odd = "{{ messages[0].content }}|{% for m in messages[1:] %}<{{ m.content }}>{% endfor %}"
    with pytest.raises(UnlikeError):
        find_pieces(jinja(odd))


def test_white_space_is_trimmed_where_dashes_ask_for_it() -> None:
    messages = [{"role": "user", "content": "x"}]
    text = 'a \n{{- range .Messages -}} \n [{{ .Content }}] {{- end }} z{{ "{{" }}'
    assert render_go(text, messages) == "a[x] z{{"
