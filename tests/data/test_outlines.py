"""The short way through templates and tokenizers says what the long way says, for every text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import CHATML, make_byte_tokenizer, make_rows
from tunesmith.config.recipe import SourceConfig
from tunesmith.data.build import open_store
from tunesmith.data.encode import Pipeline
from tunesmith.data.outlines import Outlines, is_local
from tunesmith.data.sources import Source
from tunesmith.data.store import StoreInputs
from tunesmith.data.templates import Renderer
from tunesmith.data.templates.skeleton import SkeletonMismatchError
from tunesmith.data.tokenize import Encoder, TokenSequence
from tunesmith.errors import Problem
from tunesmith.types import Conversation, Message, Origin, SilentReporter

BYTES = make_byte_tokenizer()
ORDINARY = ["What is 2+2?", "It is 4.", "二加二等于几？", "等于四。🙂", "def f(x):\n    return x"]


def chat(*texts: str, system: str | None = None) -> Conversation:
    messages = [Message("system", system)] if system is not None else []
    for index, text in enumerate(texts):
        messages.append(Message("assistant" if index % 2 else "user", text))
    return Conversation(tuple(messages), Origin("data.jsonl", 1))


PIPELINES: dict[tuple[int, str], Pipeline] = {}


def pipeline_of(tokenizer: Any) -> Pipeline:
    """One pipeline for a tokenizer with a template: to make one takes a second."""
    key = (id(tokenizer), tokenizer.chat_template)
    if key not in PIPELINES:
        PIPELINES[key] = Pipeline(Renderer(tokenizer))
    return PIPELINES[key]


def long_way(tokenizer: Any, samples: Sequence[Any]) -> list[list[TokenSequence] | Problem]:
    pipeline = pipeline_of(tokenizer)
    results: list[list[TokenSequence] | Problem] = []
    for sample in samples:
        segments = pipeline.renderer.render(sample)
        is_wrong = isinstance(segments, Problem)
        results.append(segments if is_wrong else pipeline.encoder.encode([segments])[0])
    return results


def short_way(
    tokenizer: Any, samples: Sequence[Any]
) -> tuple[list[list[TokenSequence] | Problem], int]:
    """What the pipeline makes of the samples, and how many took the short way."""
    batches = list(pipeline_of(tokenizer).run((0, sample) for sample in samples))
    results = [result for batch in batches for _, _, result in batch]
    return results, sum(len(batch.outlines) for batch in batches)


def require_same(
    left: Sequence[list[TokenSequence] | Problem], right: Sequence[list[TokenSequence] | Problem]
) -> None:
    assert len(left) == len(right)
    for one, two in zip(left, right, strict=True):
        if isinstance(one, Problem) or isinstance(two, Problem):
            assert one == two
        else:
            assert [(s.ids.tolist(), s.runs) for s in one] == [
                (s.ids.tolist(), s.runs) for s in two
            ]


@pytest.fixture(scope="session")
def real(tokenizers_folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    names = ("qwen3", "llama3_1", "deepseek_v3")
    return {name: AutoTokenizer.from_pretrained(tokenizers_folder / name) for name in names}


PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}"
    "{% elif m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% else %}{{ 'Assistant: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
QUOTED = PLAIN.replace("'User: ' + m.content", "'User:\"' + m.content + '\"'").replace(
    "'Assistant: '", "'Assistant:'"
)


@pytest.fixture
def named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A tokenizer by name, some with a template that puts plain text around the texts."""

    def get(name: str) -> Any:
        if name == "bytes":
            return BYTES
        base, _, template = name.partition("+")
        tokenizer = request.getfixturevalue("real")[base]
        own = tokenizer.chat_template
        chosen = {"": own, "chatml": CHATML, "plain": PLAIN, "quoted": QUOTED}[template]
        monkeypatch.setattr(tokenizer, "chat_template", chosen)
        return tokenizer

    return get


REAL = ("qwen3", "llama3_1", "deepseek_v3")
NAMES = ("bytes", *REAL, *(f"{name}+{t}" for name in REAL for t in ("chatml", "plain", "quoted")))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("bytes", "qwen3") else [pytest.mark.slow])
        for name in ("bytes", *REAL, "qwen3+chatml")
    ],
)
def test_ordinary_chats_take_the_short_way(named: Callable[[str], Any], name: str) -> None:
    tokenizer = named(name)
    samples = [chat(*ORDINARY[:count], system=s) for count in (2, 4) for s in (None, "Be brief.")]
    samples = samples * 20
    results, count = short_way(tokenizer, samples)
    require_same(results, long_way(tokenizer, samples))
    assert count == len(samples)


# Any texts at all

ANY = [
    *(
        "a",
        "Hello",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "。",
        "，",
        "你好",
        "🙂",
        "👩‍👧",
        "1",
        "123",
    ),
    *(
        "'",
        "'s",
        "'ll",
        '"',
        '"""',
        "-",
        "-" * 30,
        "=" * 50,
        ".",
        "...",
        "!",
        ")",
        "(",
        "{{",
        "%s",
    ),
    *(
        "e\u0301",
        "\u0301",
        "\u1161",
        "\u1100",
        "\u3099",
        "\u09be",
        "\u200d",
        "\ufeff",
        "\u00a0",
    ),
    *("<think>", "</think>", "<tool_call>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<"),
    *(
        "<｜end▁of▁sentence｜>",
        "<tool_response>",
        "</tool_response>",
        "system",
        "user",
        "\ufdd0",
    ),
    *(
        "\ue000",
        "\ue0000\ue001",
        "\U000f0000",
        "\x00",
        "\x1c",
        "\x85",
        "\u2028",
        "ｱ",
        "ﬁ",
        "😀" * 30,
    ),
]
PIECES = st.sampled_from(ANY)
TEXTS = st.one_of(
    st.lists(PIECES, max_size=8).map("".join),
    st.text(max_size=12).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)),
    st.tuples(PIECES, st.integers(1, 400)).map(lambda pair: pair[0] * pair[1]),
)


FEW_NAMES = ("bytes", "qwen3")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in FEW_NAMES else [pytest.mark.slow]) for n in NAMES],
)
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(TEXTS, min_size=3, max_size=12), st.one_of(st.none(), TEXTS))
def test_any_texts(
    named: Callable[[str], Any], name: str, texts: list[str], system: str | None
) -> None:
    tokenizer = named(name)
    # One of every 512 samples is looked at twice: it shall not hide what is wrong with others.
    first = chat(*ORDINARY[:2])
    samples = [first] + [
        chat(*texts[start : start + 2 * turns], system=system)
        for turns in (1, 2)
        for start in range(len(texts) - 1)
    ]
    results, _ = short_way(tokenizer, samples)
    require_same(results, long_way(tokenizer, samples))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama3_1"])
def test_large_data_is_encoded_alike(named: Callable[[str], Any], name: str) -> None:
    """Much data pays for a faster tokenizer (`byte_bpe.py`), used in several threads."""
    tokenizer = named(name)
    rng = random.Random(name)

    def text() -> str:
        inside = "".join(rng.choices(ANY, k=rng.randrange(5)))
        return f"{rng.choice('aé你🙂(1')}{inside}{rng.choice('.z。1')}"

    samples = [chat(*(text() for _ in range(2 * turns))) for turns in (1, 2, 3) for _ in range(500)]
    pipeline = Pipeline(Renderer(tokenizer), is_large=True)
    assert pipeline.outlines.byte_bpe is not None
    batches = list(pipeline.run((0, sample) for sample in samples))
    results = [result for batch in batches for _, _, result in batch]
    require_same(results, long_way(tokenizer, samples))
    assert sum(len(batch.outlines) for batch in batches) > 300


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FEW_NAMES else [pytest.mark.slow])
        for name in NAMES
        if name != "bytes"
    ],
)
@pytest.mark.parametrize("char", ["-", "=", "a", "1", "你", "...", "_"])
def test_runs_of_one_character_at_the_edges(
    named: Callable[[str], Any], name: str, char: str
) -> None:
    """Tokens of 4, 16 or 80 equal characters must not be cut where a look at the edge ends."""
    tokenizer = named(name)
    texts = [f"a {char * size}" for size in (*range(1, 34), 64, 80, 81, 128)]
    texts += [f"{char * size} z" for size in (*range(1, 10), 16, 64, 80)]
    samples = [chat(*ORDINARY[:2])] + [chat(text, text, text, "yes") for text in texts]
    results, _ = short_way(tokenizer, samples)
    require_same(results, long_way(tokenizer, samples))


@pytest.mark.slow
def test_a_first_character_is_no_proof(named: Callable[[str], Any]) -> None:
    """`'` joins a colon before it or not, depending on what follows."""
    for name in ("llama3_1+quoted", "qwen3+quoted", "deepseek_v3+quoted"):
        tokenizer = named(name)
        for ends in (["'\n\nx", "'hello", "'s"], ["(\n", "(x", "((("], ["?\n\n", "?x", "???a"]):
            samples = [chat("q", f"{text} a") for text in ["yes", *ends, *ends[::-1]]]
            results, _ = short_way(tokenizer, samples)
            require_same(results, long_way(tokenizer, samples))


# Templates that do something with texts

SAY = "{{ '<|im_start|>' + m.role + '\n' }}"
END = "{{ '<|im_end|>\n' }}"
LOOP = "{% for m in messages %}" + SAY + "BODY" + END + "{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def template(body: str, before: str = "") -> str:
    return before + LOOP.replace("BODY", body) + ASK


# Name -> (template, texts of which at least one is treated in a way of its own).
TREATMENTS: dict[str, tuple[str, list[str]]] = {
    "trim": (template("{{ m.content | trim }}"), [" a ", "b\n", "\u00a0c"]),
    "strip characters": (template("{{ m.content.strip('xy') }}"), ["xay", "yy", "ay", "a"]),
    "strip in a variable": (
        template("{{ m.content.strip(chars) }}", "{% set chars = 'x' + 'y' %}"),
        ["xay", "yyay", "a"],
    ),
    "upper": (template("{{ m.content | upper }}"), ["ABC", "1"]),
    "title": (template("{{ m.content | title }}"), ["Abc", "1"]),
    "length": (
        template("{{ m.content if m.content | length < 5000 else 'too long' }}"),
        ["w" * 4999, "w" * 5001],
    ),
    "length method": (
        template("{{ m.content if m.content.__len__() < 5000 else 'too long' }}"),
        ["w" * 5001],
    ),
    "number of words": (
        template("{{ m.content if m.content | wordcount < 50 else 'too long' }}"),
        ["w " * 60 + "w"],
    ),
    "slice": (template("{{ m.content[:5000] }}"), ["w" * 5001]),
    "slice from the end": (template("{{ m.content[-5000:] }}"), ["v" + "w" * 5000]),
    "truncate": (template("{{ m.content | truncate(5000) }}"), ["w " * 4000 + "w"]),
    "wordwrap": (template("{{ m.content | wordwrap(5000) }}"), ["w " * 4000 + "w"]),
    "center": (template("{{ m.content | center(4000) }}"), ["w"]),
    "replace": (template("{{ m.content | replace('foo', 'bar') }}"), ["a foo b"]),
    "replace method": (template("{{ m.content.replace('foo', 'bar') }}"), ["a foo b"]),
    "replace what a variable says": (
        template("{{ m.content.replace(word, 'bar') }}", "{% set word = 'foo' %}"),
        ["a foo b"],
    ),
    "tojson": (template("{{ m.content | tojson }}"), ['"', "é", "a"]),
    "escape": (template("{{ m.content | e }}"), ["<", "a"]),
    "safe": (template("{{ ('' | safe) + m.content }}"), ["'", "&", "a"]),
    "format": (template("{{ '%.9s' % m.content }}"), ["0123456789", "a"]),
    "format method": (template("{{ '{:.9}'.format(m.content) }}"), ["0123456789", "a"]),
    "format filter": (template("{{ '%.9s' | format(m.content) }}"), ["0123456789", "a"]),
    "in": (template("{% if 'x1' in m.content %}!{% endif %}{{ m.content }}"), ["ax1b"]),
    "in, key": (template("{% if 'x1' in m['content'] %}!{% endif %}{{ m.content }}"), ["ax1b"]),
    "not in": (template("{% if 'x1' not in m.content %}!{% endif %}{{ m.content }}"), ["ax1b"]),
    "in, by a variable": (
        template("{% if word in m.content %}!{% endif %}{{ m.content }}", "{% set word = 'x1' %}"),
        ["ax1b"],
    ),
    "in, by a joined variable": (
        template("{% if 'x' ~ one in m.content %}!{% endif %}{{ m.content }}", "{% set one = 1 %}"),
        ["ax1b"],
    ),
    "in lower case": (
        template("{% if 'yes' in m.content.lower() %}!{% endif %}{{ m.content }}"),
        ["YES", "Yes!"],
    ),
    "in a list": (
        template("{% if m.content in ['yes', 'no'] %}!{% endif %}{{ m.content }}"),
        ["yes", "no", "maybe"],
    ),
    "in a dict": (
        template("{{ {'yes': '1'}[m.content] if m.content in {'yes': '1'} else m.content }}"),
        ["yes"],
    ),
    "get from a dict": (template("{{ {'yes': '1'}.get(m.content, m.content) }}"), ["yes"]),
    "inside a constant": (
        template("{% if m.content in 'yes or no' %}!{% endif %}{{ m.content }}"),
        ["or", "yes o"],
    ),
    "test in": (
        template("{% if m.content is in ['yes'] %}!{% endif %}{{ m.content }}"),
        ["yes"],
    ),
    "test equalto": (
        template("{% if m.content is equalto 'yes' %}!{% endif %}{{ m.content }}"),
        ["yes"],
    ),
    "equal": (template("{% if m.content == 'yes' %}!{% endif %}{{ m.content }}"), ["yes"]),
    "equal in lower case": (
        template("{% if m.content | lower == 'yes' %}!{% endif %}{{ m.content }}"),
        ["YES"],
    ),
    "less": (template("{% if m.content < 'm' %}!{% endif %}{{ m.content }}"), ["a", "z"]),
    "between": (template("{% if 'a' < m.content < 'm' %}!{% endif %}{{ m.content }}"), ["b", "z"]),
    "is upper": (template("{% if m.content is upper %}!{% endif %}{{ m.content }}"), ["ABC"]),
    "is lower": (template("{% if m.content is lower %}!{% endif %}{{ m.content }}"), ["abc"]),
    "isdigit": (template("{% if m.content.isdigit() %}!{% endif %}{{ m.content }}"), ["123"]),
    "isdigit by item": (
        template("{% if m.content['isdigit']() %}!{% endif %}{{ m.content }}"),
        ["123"],
    ),
    "isdigit by attr": (
        template("{% if (m.content | attr('isdigit'))() %}!{% endif %}{{ m.content }}"),
        ["123"],
    ),
    "isdigit in a variable": (
        template("{% set f = m.content.isdigit %}{% if f() %}!{% endif %}{{ m.content }}"),
        ["123"],
    ),
    "isdigit by map": (
        template("{{ [m.content] | map('int', 7) | join }}{{ m.content }}"),
        ["123"],
    ),
    "int": (template("{{ m.content | int }}{{ m.content }}"), ["123"]),
    "characters": (
        template("{% for c in m.content %}{% if c != 'Z' %}{{ c }}{% endif %}{% endfor %}"),
        ["aZb"],
    ),
    "loop called on a text": (
        template(
            "{% for c in ['='] recursive %}{% if c != 'Z' %}{{ c }}{% endif %}"
            "{% if loop.depth == 1 %}{{ loop(m.content) }}{% endif %}{% endfor %}"
        ),
        ["aZb"],
    ),
    "arguments out of a list": (
        template("{{ m.content.replace(*words) }}", "{% set words = ['foo', 'bar'] %}"),
        ["a foo b"],
    ),
    "unpacked characters": (
        template(
            "{% if m.content | length == 2 %}{% set a, b = m.content %}{{ b }}{% endif %}"
            "{{ m.content }}"
        ),
        ["ab"],
    ),
    "method of a constant": (
        template("{% if 'yes no'.startswith(m.content) %}!{% endif %}{{ m.content }}"),
        ["yes"],
    ),
    "index of a constant": (
        template("{{ {'yes': '1'}[m.content] or m.content }}"),
        ["yes"],
    ),
    "date": (template("{{ strftime_now(m.content) }}"), ["%%", "a"]),
    "list of characters": (template("{{ m.content | list | reject('eq', 'Z') | join }}"), ["aZb"]),
    "reverse": (template("{{ m.content | reverse }}"), ["aba", "ab"]),
    "first character": (
        template("{% if m.content[0] == '/' %}!{% endif %}{{ m.content }}"),
        ["/a"],
    ),
    "first by filter": (
        template("{% if m.content | first == '/' %}!{% endif %}{{ m.content }}"),
        ["/a"],
    ),
    "last character": (
        template("{{ m.content }}{% if m.content[-1] in '.!?' %}~{% endif %}"),
        ["a.", "b!"],
    ),
    "startswith": (
        template("{% if m.content.startswith(('/a', '/b')) %}!{% endif %}{{ m.content }}"),
        ["/b c"],
    ),
    "endswith": (
        template("{% if m.content.endswith('?') %}!{% endif %}{{ m.content }}"),
        ["c?"],
    ),
    "split": (template("{{ m.content.split('</x>')[-1] }}"), ["a</x>b"]),
    "split at space": (
        template("{% if m.content.split()[0] == 'do' %}!{% endif %}{{ m.content }}"),
        ["do it"],
    ),
    "lines": (
        template("{% for l in m.content.splitlines() %}{{ l }}|{% endfor %}"),
        ["a\nb", "c\u2028d"],
    ),
    "count": (template("{{ m.content.count('x') }}{{ m.content }}"), ["xx"]),
    "joined before": (
        template("{% if 'm>a' in m.role ~ '>' ~ m.content %}!{% endif %}{{ m.content }}", ""),
        ["m>a", "a"],
    ),
    "joined with what is looked for": (
        template("{% if 'r: ab' in 'user: ' + m.content %}!{% endif %}{{ m.content }}"),
        ["ab", "abc"],
    ),
    "through a macro": (
        template(
            "{{ show(m.content) }}",
            "{% macro show(text) %}{% if 'x1' in text %}!{% endif %}{{ text }}{% endmacro %}",
        ),
        ["ax1"],
    ),
    "out of a macro": (
        template(
            "{% if 'x1' in show(m.content) %}!{% endif %}{{ m.content }}",
            "{% macro show(text) %}{{ text }}{% endmacro %}",
        ),
        ["ax1"],
    ),
    "out of a block": (
        template("{% set s %}{{ m.content }}{% endset %}{% if 'x1' in s %}!{% endif %}{{ s }}"),
        ["ax1"],
    ),
    "block with a filter": (
        template("{% set shown | replace('x', 'y') %}{{ m.content }}{% endset %}{{ shown }}"),
        ["ax1"],
    ),
    "filter block": (
        template("{% filter replace('x', 'y') %}{{ m.content }}{% endfilter %}"),
        ["ax1"],
    ),
    "call block": (
        template(
            "{% call show() %}{{ m.content }}{% endcall %}",
            "{% macro show() %}{{ caller().replace('x', 'y') }}{% endmacro %}",
        ),
        ["ax1"],
    ),
    "through a namespace": (
        template(
            "{% set ns.text = m.content %}{% if ns.text == 'yes' %}!{% endif %}{{ ns.text }}",
            "{% set ns = namespace(text='') %}",
        ),
        ["yes"],
    ),
    "the same as before": (
        template(
            "{% if m.content != ns.text %}{{ m.content }}{% endif %}{% set ns.text = m.content %}",
            "{% set ns = namespace(text='') %}",
        ),
        ["same", "same"],
    ),
    "changed": (
        template("{% if loop.changed(m.content) %}{{ m.content }}{% endif %}"),
        ["same", "same"],
    ),
    "seen": (
        template(
            "{% if m.content in ns.seen %}!{% endif %}{{ m.content }}"
            "{% set ns.seen = ns.seen + [m.content] %}",
            "{% set ns = namespace(seen=[]) %}",
        ),
        ["same", "same"],
    ),
    "chosen by text": (
        template(
            "{{ messages | selectattr('content', 'eq', 'yes') | list | length }}{{ m.content }}"
        ),
        ["yes"],
    ),
    "chosen by message": (
        template("{% if m == messages[0] %}!{% endif %}{{ m.content }}"),
        ["a", "b"],
    ),
    "unique": (
        template("{{ messages | map(attribute='content') | unique | join }}{{ m.content }}"),
        ["same", "same"],
    ),
    "sorted": (
        template("{{ (messages | sort(attribute='content'))[0].role }}{{ m.content }}"),
        ["a", "b"],
    ),
    "of another message": (
        template("{% if messages[0].content == 'yes' %}!{% endif %}{{ m.content }}"),
        ["yes"],
    ),
    "the role in the text": (
        template("{% if m.role in m.content %}!{% endif %}{{ m.content }}"),
        ["the user", "an assistant"],
    ),
    "unpacked": (
        template(
            "{% set a, b = m.content.split('|') if '|' in m.content else ('', '') %}"
            "{{ a }}{{ m.content }}"
        ),
        ["c|d"],
    ),
    "not empty": (
        template("{% if m.content | length > 0 %}{{ m.content }}{% endif %}"),
        ["", " ", "a"],
    ),
    "by role": (
        template(
            "{% set asked = messages | selectattr('role', 'equalto', 'user') | list | length %}"
            "{% set roles = messages | map(attribute='role') | join(' ') %}"
            "{{ m.content if asked and 'tool' not in roles }}"
        ),
        ["a"],
    ),
    "keys": (
        template(
            "{% if 'content' in m and m.get('content') is string and m != none %}{{ m.content }}"
            "{% endif %}{{ '.' if '' in m.content else '!' }}{{ ['', m.content] | join('') }};"
            "{{ ''.join([m.content]) }}:{{ m.content | string | default('no') }}"
        ),
        ["a", "content"],
    ),
    "chosen by what is no key": (
        template("{{ ['a'] | selectattr('role') | list | length }}{{ m.content }}"),
        ["a"],
    ),
    "chosen from texts": (
        template("{{ [m.content] | selectattr('role') | list | length }}{{ m.content }}"),
        ["a"],
    ),
    "the text itself": (
        template("{% if m.content is sameas m.content %}{{ m.content }}{% endif %}"),
        ["a"],
    ),
    "no text": (
        template("{% if m.content is sameas none or m.content is divisibleby 2 %}{% endif %}"),
        ["a"],
    ),
    "as large as": (template("{% if m.content is gt 'b' %}!{% endif %}{{ m.content }}"), ["c"]),
    "in a number": (template("{% if m.content in 5 %}!{% endif %}{{ m.content }}"), ["c"]),
    "two messages alike": (
        template("{% if m == {'role': 'user', 'content': 'a'} %}!{% endif %}{{ m.content }}"),
        ["a"],
    ),
    "a text joins": (template("{{ m.content.join(['a', 'b']) }}"), [" ", "c"]),
    "a text searched for": (template("{{ m.content.find(m.content) }}{{ m.content }}"), ["c"]),
    "urlize": (template("{{ m.content | urlize }}"), ["http://example.com"]),
    "as written": (template("{{ [m.content] }}"), ["a", "'"]),
    "times": (template("{{ m.content * 2 }}"), ["a"]),
    "autoescape": (
        template("{% autoescape true %}{{ m.content }}{% endautoescape %}"),
        ["<", "a"],
    ),
}


@pytest.mark.parametrize("name", TREATMENTS)
def test_texts_that_a_template_treats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a check after the first sample, and without a wrong one among those that follow."""
    tokenizer = BYTES
    monkeypatch.setattr(tokenizer, "chat_template", TREATMENTS[name][0])
    texts = TREATMENTS[name][1]
    samples = [chat("good morning", "fine thanks")]
    samples += [chat(text, other) for text in texts for other in (*texts, "fine thanks")]
    samples += [chat("good morning", text) for text in texts] + [chat(*texts, *texts[::-1])]
    expected = long_way(tokenizer, samples)
    try:
        results, _ = short_way(tokenizer, samples)
    except SkeletonMismatchError:
        pytest.fail("the watch should have seen it")
    require_same(results, expected)


LETTERS = st.sampled_from(["a", "b", "x", "ab", "A", " ", ""])


def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Expressions around expressions; `c(...)` are conditions."""
    conditions = st.one_of(
        st.builds("'{}' in {}".format, LETTERS, inner),
        st.builds("{} in ['{}', 'ab']".format, inner, LETTERS),
        st.builds("{} == '{}'".format, inner, LETTERS),
        st.builds("{} != {}".format, inner, inner),
        st.builds("{}.startswith('{}')".format, inner, LETTERS),
        st.builds("{} | length > {}".format, inner, st.integers(0, 3)),
        st.builds("{} is equalto '{}'".format, inner, LETTERS),
        st.builds("{} is upper".format, inner),
        st.builds("{}".format, inner),
    )
    return st.one_of(
        st.builds("({} | trim)".format, inner),
        st.builds("{}.strip('{}x')".format, inner, LETTERS),
        st.builds("({} + '{}')".format, inner, LETTERS),
        st.builds("('{}' ~ {})".format, LETTERS, inner),
        st.builds("({} ~ {})".format, inner, inner),
        st.builds("{}.replace('{}b', 'y')".format, inner, LETTERS),
        st.builds("{}.split('x{}')[{}]".format, inner, LETTERS, st.sampled_from([0, -1])),
        st.builds("({} | upper)".format, inner),
        st.builds("{}[{}:]".format, inner, st.integers(0, 2)),
        st.builds("show({})".format, inner),
        st.builds("([{}, 'a'] | join)".format, inner),
        st.builds("({} if {} else {})".format, inner, conditions, inner),
    )


EXPRESSIONS = st.recursive(
    st.sampled_from(["m.content", "m['content']", "(m.content | trim)", "messages[0].content"]),
    grow,
    max_leaves=5,
)
FEW_LETTERS = st.text(alphabet="abxA ", min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(EXPRESSIONS, st.lists(FEW_LETTERS, min_size=4, max_size=12))
def test_any_templates(expression: str, texts: list[str]) -> None:
    """The watch never lets a text through that a template treats, whatever the template."""
    tokenizer = make_byte_tokenizer()
    macro = "{% macro show(t) %}{% if 'x' in t %}!{% endif %}{{ t }}{% endmacro %}"
    tokenizer.chat_template = template("{{ " + expression + " }}", macro)
    samples = [chat("good morning", "fine thanks")]
    samples += [chat(one, other) for one in texts for other in texts]
    pipeline = Pipeline(Renderer(tokenizer))
    batches = list(pipeline.run((0, sample) for sample in samples))
    for sample, result in zip(samples, [r for b in batches for _, _, r in b], strict=True):
        segments = pipeline.renderer.render(sample)
        if isinstance(segments, Problem):
            assert result == segments
        else:
            require_same([result], pipeline.encoder.encode([segments]))


EASY = (
    *("trim", "strip characters", "strip in a variable", "in", "in, key", "not in", "in a list"),
    *("in, by a variable", "equal", "startswith", "endswith", "split", "replace", "replace method"),
    *(
        "not empty",
        "by role",
        "keys",
        "test equalto",
        "through a macro",
        "out of a macro",
        "through a namespace",
        "count",
    ),
)


@pytest.mark.parametrize("name", EASY)
def test_other_texts_take_the_short_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BYTES
    monkeypatch.setattr(tokenizer, "chat_template", TREATMENTS[name][0])
    samples = [chat("good morning", f"fine thanks {number}") for number in range(10)]
    results, count = short_way(tokenizer, samples)
    require_same(results, long_way(tokenizer, samples))
    assert count == 10


def test_a_template_too_deep_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RecursionError

    monkeypatch.setattr("tunesmith.data.templates.watch.WatchedTemplate", fail)
    tokenizer = make_byte_tokenizer()
    renderer = Renderer(tokenizer)
    assert renderer.skeletons is None
    assert renderer.find_skeleton(chat("a", "b")) is None
    pipeline = Pipeline(renderer)
    ((batch),) = pipeline.run([(0, chat("a", "b"))])
    require_same([result for _, _, result in batch], long_way(tokenizer, [chat("a", "b")]))


def test_a_template_that_fails_a_check_ends_the_shortcut(
    tmp_path: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the watch ever miss something, the build starts again without the shortcut."""
    monkeypatch.setattr("tunesmith.data.templates.skeleton.CHECK_EVERY", 2)
    monkeypatch.setattr("tunesmith.data.templates.watch._search", lambda text, piece: None)
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = template("{{ '!' if 'question 8' in m.content }}{{ m.content }}")
    notes: list[str] = []

    class Reporter(SilentReporter):
        def note(self, text: str) -> None:
            notes.append(text)

    source = Source(SourceConfig(path="d"), (write_jsonl(make_rows(20)),))
    renderer = Renderer(tokenizer)
    store = open_store(StoreInputs([source], renderer, folder=tmp_path / "stores"), Reporter())
    texts = [tokenizer.decode(store.sequence(sample).ids) for sample in range(20)]
    assert [n for n, text in enumerate(texts) if "user\n!" in text] == [8]
    assert renderer.skeletons is None
    assert "every sample is rendered by the template itself" in notes[0]


# Tokenizers


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        (
            {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}},
            False,
        ),
        ({"normalizer": {"type": "Lowercase"}}, False),
        ({"normalizer": {"type": "NFKC"}}, False),
        ({"normalizer": {"type": "Sequence", "normalizers": []}}, True),
        ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, False),
    ],
)
def test_which_tokenizers_are_local(change: dict[str, Any], expected: bool) -> None:
    tree = json.loads(make_byte_tokenizer().backend_tokenizer.to_str())
    tree.update(change)
    assert is_local(tree) is expected


def test_edges_are_kept_by_what_stands_before(named: Callable[[str], Any]) -> None:
    tokenizer = named("llama3_1+plain")
    outlines = Outlines(Encoder(tokenizer.backend_tokenizer))
    found = Renderer(tokenizer).find_skeleton(chat("word", "another"))
    assert found is not None
    # " word" is one token: such a text goes the long way.
    assert outlines.steps_of(*found) is None
