"""The sandboxed chat template: equal to transformers, out of reach, and never run away."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2.exceptions import SecurityError

from conftest import CHATML
from tunesmith.data.templates.sandbox import Limits, TemplateLimitError, compile_template

QUESTION = [{"role": "user", "content": "q"}]
REAL = ("qwen3", "llama3_1", "deepseek_v3")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "天气 & <weather> in a 'city'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}

# SmolLM2's: ChatML with a system message of its own where the conversation has none.
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turns(count: int, text: str = "some words, 一些字 ") -> list[dict[str, Any]]:
    return [
        {"role": ("user", "assistant")[index % 2], "content": f"{index}: {text}"}
        for index in range(2 * count)
    ]


def call(arguments: Any, content: Any = "") -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }


TOOL = {"role": "tool", "content": '{"weather": "sunny"}'}
SYSTEM = {"role": "system", "content": "  Be brief. "}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": QUESTION,
    "one turn": turns(1),
    "system": [SYSTEM, *turns(1)],
    "empty system": [{"role": "system", "content": ""}, *turns(1)],
    "two systems": [SYSTEM, *turns(1), SYSTEM, *turns(1)],
    "many turns": [SYSTEM, *turns(20)],
    "thinking in the text": [*turns(1), QUESTION[0], THOUGHT],
    "reasoning": [QUESTION[0], {"role": "assistant", "content": "yes", "reasoning_content": "hm"}],
    "reasoning, other name": [QUESTION[0], {**THOUGHT, "reasoning": "hm", "thinking": None}],
    "call as object": [QUESTION[0], call({"city": "北京"}), TOOL, TOOL, *turns(1)[1:]],
    "call as text": [QUESTION[0], call('{"city": "北京"}', "let me see"), TOOL],
    "call without content": [QUESTION[0], call('{"city": "Rome"}', None), TOOL],
    "white space": [{"role": "user", "content": "\n a {{ b }} {% c %} \n\n"}, *turns(1)[1:]],
    "list content": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "starts with an answer": turns(2)[1:],
}


@pytest.fixture(scope="module")
def tokenizers(shared: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {n: AutoTokenizer.from_pretrained(shared / "tokenizers" / n) for n in REAL}


def outcome(render: Any) -> str:
    """The text, or the kind of error with what it says."""
    try:
        return render()
    except SecurityError:
        return "SecurityError"
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def assert_equal(tokenizer: Any, source: str, messages: list[dict[str, Any]], **more: Any) -> None:
    template = compile_template(source)
    names = dict(tokenizer.special_tokens_map)
    for prompt in (False, True):
        for tools in (None, [WEATHER]):
            ours = outcome(
                lambda p=prompt, t=tools: template.render(
                    messages, tools=t, add_generation_prompt=p, **{**names, **more}
                )
            )
            theirs = outcome(
                lambda p=prompt, t=tools: tokenizer.apply_chat_template(
                    messages,
                    tools=t,
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=p,
                    **more,
                )
            )
            assert ours == theirs


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", REAL)
def test_real_templates_give_transformers_text(
    name: str, case: str, tokenizers: dict[str, Any]
) -> None:
    tokenizer = tokenizers[name]
    assert_equal(tokenizer, tokenizer.chat_template, CONVERSATIONS[case])
    assert_equal(tokenizer, tokenizer.chat_template, CONVERSATIONS[case], enable_thinking=False)


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("source", [CHATML, SMOL])
def test_chatml_gives_transformers_text(source: str, case: str, byte_tokenizer: Any) -> None:
    assert_equal(byte_tokenizer, source, CONVERSATIONS[case])


# Everything a template may do, in one or two lines each.
FEATURES = [
    "{% for m in messages %}\n  {% if loop.first %}\n A\n  "
    "{%- endif +%}\n {{ m.role }}\n{% endfor %}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% if loop.first %}"
    "{% continue %}{% endif %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined }}"
    "{{ loop.nextitem.content }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ tools | tojson(sort_keys=true) }}",
    "{{ messages | tojson(ensure_ascii=True, separators=(',', ':')) }}{{ '<&\\'>' | tojson }}",
    "{{ raise_exception('roles must alternate') }}",
    "{{ strftime_now('%Y') }}{{ documents is none }}{{ tools is defined }}{{ nothing is defined }}",
    "{% macro say(a, b='x') %}[{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}]"
    "{% endmacro %}{{ say(1) }}{{ say(1, 2, 3, k=4) }}{% call say('c') %}in{% endcall %}",
    "{% set ns = namespace(a=1, b=[]) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}"
    "{% set ns.b = ns.b + [m.role] %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.missing }}{{ ns }}",
    "{% set ns = namespace(_a=1) %}",
    "{% set ns = namespace() %}{% set ns.__x = 1 %}",
    "{% set text %}a{{ 1 }}b{% endset %}{{ text }}{% filter upper %}x{{ text }}{% endfilter %}",
    "{% generation %}{% set x = 1 %}{{ messages[-1].content }}{% endgeneration %}{{ x }}",
    "{{ messages[::-1] }}{{ messages[1:] }}"
    "{{ messages[0]['role'][0:2] }}{{ messages[-1:] | length }}",
    "{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | join('|', attribute='role') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list }}"
    "{{ messages | rejectattr('tools') | list }}",
    "{{ messages | groupby('role') }}{{ messages | sum('content') if false }}{{ [3, 1] | sort }}",
    "{{ [1, [2, {'a': 'b'}]] }}{{ (1, 2) + (3,) }}"
    "{{ [1] * 3 }}{{ 'ab' * 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}",
    "{{ '%s is %05.1f%%' % ('x', 2.25) }}{{ '%(a)s' % {'a': 1} }}{{ '%s-%s' | format(1, 2) }}",
    "{{ '{} {a!r:>8}'.format(1, a='b') }}{{ '{a[k]}'.format_map({'a': {'k': 3}}) }}",
    "{{ 1 ~ 'a' ~ none ~ [2] ~ 3.5 }}{{ 'a' + 'b' + 'c' }}{{ 1 + 2 + 3.5 }}{{ [1] + [2] + [3] }}",
    "{{ 1 + 'a' }}",
    "{{ 'a' + messages[0].nothing }}",
    "{{ messages[0].nothing.deeper }}",
    "{{ messages[0]['items'] is defined }}"
    "{{ messages[0].items() | list }}{{ messages[0].get('x', 5) }}",
    "{{ 'a,b,c'.split(',') }}{{ ' x '.strip() }}{{ 'xxaxx'.strip('x') }}{{ 'a\\nb'.splitlines() }}",
    "{{ 'A'.center(7, '*') }}{{ 'a' | center(9) }}"
    "{{ 'a'.ljust(3) }}|{{ '7'.zfill(3) }}{{ 'a\\tb'.expandtabs() }}",
    "{{ 'aXbX'.replace('X', 'yy') }}{{ 'aXbX' | replace('X', 'yy', 1) }}{{ '-'.join(['a', 'b']) }}",
    "{{ 'x y' | title }}{{ 'aB' | upper | lower | capitalize }}"
    "{{ '  a ' | trim }}{{ 'xax' | trim('x') }}",
    "{{ 'a\\nb' | indent }}{{ 'a\\nb' | indent(2, true) }}"
    "{{ 'a b c d' | wordwrap(3) }}{{ 'abc def ghi' | truncate(5, leeway=0) }}",
    "{{ [1, 2, 3] | batch(2, 'f') | list }}{{ [1, 2, 3] | slice(2) | list }}{{ range(3) | list }}",
    "{{ [1, 2] | sum }}{{ 2.6 | round }}{{ '42' | int + 1 }}"
    "{{ '1.5' | float }}{{ none | default('d') }}",
    "{{ [1, 2, 1] | unique | list }}{{ [2, 1] | min }}"
    "{{ {'b': 1, 'a': 2} | dictsort }}{{ {'a': 1} | items | list }}",
    "{{ 'a' in 'abc' }}{{ 1 in [1, 2] }}"
    "{{ messages[0] in messages }}{{ [1] == [1] }}{{ 1 < 2 < 3 }}",
    "{{ messages[0] == messages[-1] }}{{ 'a' != messages[0].role }}"
    "{{ not 1 is in([2]) }}{{ 3 is eq 3 }}",
    "{% autoescape true %}{{ '<b>' }}{{ '<b>' ~ '&' }}"
    "{{ '<i>' | safe }}{{ '<u>' | e }}{% endautoescape %}",
    "{{ '<b>' | escape | length }}{{ 'a b/ä' | urlencode }}"
    "{{ 'x' | string }}{{ [1] | string }}{{ 1 | pprint }}",
    "{% for a, b in [(1, 2), (3, 4)] recursive %}{{ a }}"
    "{{ b }}{{ loop([(5, 6)]) if a == 1 }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{% set a, b = 3, 4 %}{{ a }}{{ b }}",
    "{% block top %}{{ messages[0].role }}{% endblock %}{{ self.top() }}",
    "{{ dict(a=1) }}{{ dict.fromkeys('ab', 1) }}"
    "{{ cycler('x', 'y').next() }}{% set j = joiner('/') %}{{ j() }}{{ j() }}",
    "{{ lipsum(0) }}{{ 'é'.encode('utf-8') }}{{ 'a'.upper() }}"
    "{{ 'abc'.find('c') }}{{ 'abc'.startswith('ab') }}",
    "{{ messages.append(1) }}",
    "{{ {}.update(a=1) }}",
    "{{ messages is string }}{{ messages is iterable }}{{ messages is mapping }}{{ 'x' is lower }}",
    "{{ 'abc' | first }}{{ 'abc' | last }}{{ 'abc' | reverse }}"
    "{{ 'abc' | list }}{{ 'a b' | wordcount }}",
    "{% if messages %}yes{% elif tools %}no{% else %}never"
    "{% endif %}{{ bos_token }}{{ 'x' if 0 else 'y' }}",
    "{{ none.x }}",
    "{{ 1 / 0 if false }}{{ 7 // 2 }}{{ 7 / 2 }}{{ -3 | abs }}{{ 1 - 2 }}",
    "{# a comment #}{%- raw %}{{ raw }}{% endraw %}\n\nend\n",
    "{% set m = messages[0] %}{{ m['role'] }}{{ m.content }}"
    "{{ m['nothing'] }}{{ m[0] }}{{ m.keys() | list }}",
    "{% include 'x' %}",
    "{{ 'x'|nothing }}",
]


@pytest.mark.parametrize("source", FEATURES)
def test_every_feature_gives_transformers_text(source: str, byte_tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "s"}, *turns(2)]
    try:
        assert_equal(byte_tokenizer, source, messages)
    except jinja2.TemplateSyntaxError:
        with pytest.raises(jinja2.TemplateSyntaxError):
            byte_tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)


def test_variables_stand_over_special_tokens_and_defaults() -> None:
    template = compile_template("{{ bos_token }}{{ documents }}{{ more }}")
    assert template.render(QUESTION, bos_token="<s>", documents=[], more=True) == "<s>[]True"


def test_a_broken_template_is_a_syntax_error() -> None:
    with pytest.raises(jinja2.TemplateSyntaxError, match="Unexpected end of template"):
        compile_template("{% for m in messages %}")


@pytest.mark.parametrize("value", [{1, 2}, b"x", object(), Path()])
def test_only_json_values_reach_a_template(value: Any) -> None:
    with pytest.raises(TypeError, match="expected plain JSON values"):
        compile_template("{{ x }}").render(QUESTION, x=value)


def test_an_empty_conversation_is_refused_as_transformers_does() -> None:
    with pytest.raises(ValueError, match="at least one message"):
        compile_template("x").render([])


def test_transformers_is_not_imported() -> None:
    code = (
        "import sys; from tunesmith.data.templates.sandbox import compile_template;"
        "assert not {'transformers', 'torch'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Escapes: from Jinja's own advisories and the usual lists of server-side template injections

ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__base__']['__subclasses__']() }}",
    "{{ [] | attr('__class__') }}",
    "{{ '' | attr('_' * 2 + 'class' + '_' * 2) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ (messages | map('attr', '__class__') | list)[0].__base__ }}",
    "{{ ''.format.__self__.__class__ }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ ('{0.__class__}' | attr('format'))(1) }}",
    "{% set f = ['{0.__class__}'] | map(attribute='format') | first %}{{ f(1) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__ }}",
    "{{ self.__init__.__globals__.__builtins__['__import__']('os') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ range.__wrapped__ }}",
    "{{ dict.__call__.__func__.__globals__ }}",
    "{{ dict.mro() }}",
    "{{ ().__class__.__bases__[0].__subclasses__()[40]('/etc/passwd').read() }}",
    "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% for m in messages %}{{ loop.__class__ }}{{ loop._iterator.gi_frame }}{% endfor %}",
    "{% set g = messages | map('upper') %}{{ g.gi_frame.f_globals }}",
    "{% set g = messages | select %}{{ g['gi_code'] }}",
    "{{ undefined_name.__init__.__globals__ }}",
    "{{ (undefined_name | attr('_undefined_exception')).__traceback__ }}",
    "{% set x = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__class__ = dict %}",
    "{{ ''.join.__self__ }}",
    "{% set dict.x = 1 %}{{ dict.fromkeys.__func__ }}",
    "{{ context.environment }}",
    "{{ environment.globals }}",
    "{% autoescape true %}{{ ('<' | safe).__class__ }}{{ ('{0.__class__}' | safe).format(1) }}"
    "{% endautoescape %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes_are_refused(source: str) -> None:
    """They fail, or show the empty text of an undefined value."""
    try:
        text = compile_template(source).render(QUESTION)
    except (SecurityError, jinja2.UndefinedError, jinja2.TemplateRuntimeError):
        return
    assert text in ("", "[Undefined]")


def test_an_escape_that_is_only_shown_is_empty() -> None:
    """An unsafe attribute of a value is undefined: it may be tested, never used."""
    template = compile_template("{{ ''.__class__ is defined }}{{ lipsum.__globals__ is defined }}")
    assert template.render(QUESTION) == "FalseFalse"


def test_the_callers_messages_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": ["a"], "name": None}]
    before = json.dumps(messages)
    for source in (
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role=1) }}",
        "{{ messages[0].content.clear() }}",
        "{{ messages | map(attribute='content') | map('attr', 'pop') | list }}",
    ):
        outcome(lambda source=source: compile_template(source).render(messages))
    assert json.dumps(messages) == before


def test_errors_of_arithmetic_are_template_errors() -> None:
    for source in ("{{ 1 / 0 }}", "{{ 'abc' | truncate(1) }}"):
        with pytest.raises(jinja2.TemplateRuntimeError):
            compile_template(source).render(QUESTION)


# Bombs

GROW = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx', l=[1]) %}{% for i in range(99999) %}"
MANY = "{% for a in range(99999) %}{% for b in range(99999) %}"
NEST = (
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
)
BIG = "{% set big = 'x' * 4000000 %}"

BOMBS = [
    # time
    MANY + "{% endfor %}{% endfor %}",
    MANY + "x{% endfor %}{% endfor %}",
    MANY + "{{ '' }}{% endfor %}{% endfor %}",
    MANY + "{% set x = a + b %}{% endfor %}{% endfor %}",
    MANY + "{% if a == b %}{% continue %}{% endif %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) if range(99999) | select('eq', 'x') | list %}{% endfor %}",
    "{% for a in range(99999) %}{% if 'a' in range(99999) %}{% endif %}{% endfor %}",
    "{% set l = range(50000) | list %}{% for a in l %}{% if a + 1 in l %}{% endif %}{% endfor %}",
    "{{ range(99999) | select('in', range(99999)) | list }}",
    "{{ range(99999) | map('string') | map('center', 999) | list }}",
    "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(40) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 18
    + "x"
    + "{% endcall %}" * 18
    + "{{ 'x' * 9999999 }}",
    BIG + "{% for i in range(99999) %}{% if big + 'a' == big + 'b' %}{% endif %}{% endfor %}",
    BIG + "{% for i in range(99999) %}{{ big | upper | length }}{% endfor %}",
    BIG + "{% for i in range(99999) %}{{ big.count('xy') }}{% endfor %}",
    BIG + "{{ big.rfind('y' + 'x' * 2000000) }}",
    BIG + "{{ big.strip('y' * 2000000 + 'x') }}",
    BIG + "{{ big | trim('y' * 2000000 + 'x') }}",
    BIG + "{{ big.rsplit('y' + 'x' * 2000000) }}",
    BIG + "{{ ('<!--' + big[:999999] * 4) | striptags }}",
    BIG + "{{ big | wordwrap(1) }}",
    BIG + "{{ big | urlize }}",
    "{{ ('\u4e2d' * 2000000).encode('punycode') }}",
    "{{ ('a\u4e2d' * 200000).encode('idna') }}",
    "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ 10 ** (10 ** 8) }}",
    "{{ 7 ** 99999999 % 5 }}",
    "{{ 1 | round(99999999, 'ceil') }}",
    NEST + "{{ ns.x == ns.x }}",
    "{% set n1 = namespace(x=[1]) %}{% set n2 = namespace(x=[1]) %}"
    "{% for i in range(60) %}"
    "{% set n1.x = [n1.x, n1.x] %}{% set n2.x = [n2.x, n2.x] %}{% endfor %}{{ n1.x == n2.x }}",
    "{% set ns = namespace(x=(1,)) %}"
    "{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
    "{{ {}.get(ns.x) }}",
    "{% set ns = namespace(x=1) %}{% macro m() %}{% set ns.x = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ m(ns.x, ns.x) }}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=1) %}{% macro m() %}{% set ns.x = kwargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ m(a=ns.x, b=ns.x) }}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = cycler(ns.x, ns.x).items %}"
    "{% endfor %}{{ ns.x | string | length }}",
    "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}"
    "{% endfor %}{{ ns.x | tojson | length }}",
    "{% set ns = namespace(x=1) %}"
    "{% for i in range(60) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}"
    "{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=1) %}"
    "{% for i in range(60) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}"
    "{% endfor %}{{ raise_exception(ns.x) }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x] | batch(2, ns.x) | first %}{% endfor %}{{ ns.x | pprint }}",
    "{{ range(99999) | batch(1) | sum(start=[]) }}",
    "{{ range(99999) | map('batch', 3) | list | string | length }}" * 3
    + MANY
    + "{% endfor %}{% endfor %}",
    # memory and output
    "{{ 'x' * 300000000 }}",
    "{{ 300000000 * 'x' }}",
    "{{ ['x'] * 300000000 }}",
    "{{ ('x' * 1000) * 1000 * 1000 }}",
    "{{ 'x' | center(300000000) }}",
    "{{ 'x'.center(300000000) }}{{ 'x'.ljust(9) }}",
    "{{ 'x'.ljust(300000000) }}",
    "{{ 'x'.rjust(300000000) }}",
    "{{ 'x'.zfill(300000000) }}",
    "{{ 'x'.encode().center(300000000) }}",
    "{{ (1).to_bytes(300000000, 'big') }}",
    "{{ '%300000000d' % 1 }}",
    "{{ '%*d' % (300000000, 1) }}",
    "{{ '%.300000000f' % 1 }}",
    "{{ '%300000000s' | format('x') }}",
    "{{ '%(a)300000000s' % {'a': 1} }}",
    "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "{{ '{:300000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 300000000) }}",
    "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "{{ '{a:300000000}'.format_map({'a': 1}) }}",
    "{{ ('\t' * 1000000).expandtabs(300) }}",
    "{{ ('x' * 1000000).replace('x', 'x' * 1000) }}",
    "{{ ('x' * 1000000) | replace('x', 'x' * 1000) }}",
    "{{ ('x' * 1000000) | replace('', 'x' * 1000) }}",
    "{{ ('x' * 1000000).translate({120: 'x' * 1000}) }}",
    "{{ ('x' * 1000000).join(['a'] * 1000) }}",
    "{{ (['a' * 1000000] * 1000) | join }}",
    "{{ range(99999) | join('x' * 1000) }}",
    "{{ [none] | map(attribute='z', default='x' * 4000000) | list | length }}"
    "{{ range(99999) | map(attribute='z', default='x' * 4000000) | join }}",
    "{{ ('x\n' * 1000000) | indent(300) }}",
    "{{ 'x' | indent(300000000, true) }}",
    "{{ messages | tojson(indent=300000000) }}",
    "{{ messages | tojson(separators=('x' * 3000000, ':')) }}{{ 'x' * 9999999 }}",
    "{{ [1] | batch(300000000, 'x') | list }}",
    "{{ [1] | slice(300000000) | list }}",
    "{{ ('x' * 4000000) | list }}",
    "{{ ('\u4e2d' * 4000000) | list }}",
    "{{ ('xy ' * 1300000).split() | length }}{{ ('xy ' * 1300000).split() | length }}" * 4,
    "{{ ('xy ' * 1300000).split(' ') | length }}",
    "{{ ('xy\n' * 1300000).splitlines() | length }}",
    "{{ range(300000000) }}",
    "{{ lipsum(300000000) }}",
    "{{ strftime_now('%c' * 1000000) }}",
    "{{ ('&' * 4000000) | escape | escape }}",
    GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    GROW + "{% set ns.s = ns.s * 2 %}{% endfor %}",
    GROW + "{% set ns.s = ns.s | replace('x', 'xx') %}{% endfor %}",
    GROW + "{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    GROW + "{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
    GROW + "{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    GROW + "{% set ns.s = ns.s | tojson | tojson %}{% endfor %}",
    GROW + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    GROW + "{% set ns.l = ns.l + [ns.s ~ i] %}{% endfor %}",
    GROW + "{% set ns.l = ns.l + [range(99999) | list] %}{% endfor %}",
    GROW + "{% set ns.l = ns.l + [('x' * 100000) ~ i] %}{% endfor %}",
    GROW + "{% set ns.l = [ns.l, range(99999) | map('string') | list] %}{% endfor %}",
    GROW + "{% set ns.l = [ns.l, ('x' * 1000000)[1:]] %}{% endfor %}",
    GROW + "{{ 'x' * 100 }}" + "x" * 1000 + "{% endfor %}",
    GROW + "{{ '" + "x" * 5000 + "' }}{% endfor %}",
    "{% set t %}" + GROW + "x" * 1000 + "{% endfor %}{% endset %}",
    "{% macro m() %}" + GROW + "x" * 1000 + "{% endfor %}{% endmacro %}{{ m() | length }}",
    "{% filter upper %}" + GROW + "x" * 1000 + "{% endfor %}{% endfilter %}",
    "{% autoescape true %}"
    + GROW
    + "{% set ns.s = ns.s ~ '<' ~ ns.s %}{% endfor %}{% endautoescape %}",
    NEST + "{{ ns.x }}",
    NEST + "{{ ns.x | string | length }}",
    NEST + "{{ ns.x | tojson | length }}",
    NEST + "{{ 'a' ~ ns.x }}",
    NEST + "{{ '%s' % ns.x }}",
]


FUSE = Limits(seconds=0.1)
"""A tenth of the usual time, to keep the tests short."""


EVERY_BOMB = [
    pytest.param(bomb, id=str(number), marks=[pytest.mark.slow] if number % 10 else [])
    for number, bomb in enumerate(BOMBS)
]


@pytest.mark.parametrize("source", EVERY_BOMB)
def test_bombs_are_stopped(source: str) -> None:
    started = time.thread_time()
    with pytest.raises(TemplateLimitError):
        compile_template(source, FUSE).render(QUESTION)
    assert time.thread_time() - started < 0.7
    tracemalloc.start()
    try:
        with pytest.raises(TemplateLimitError):
            compile_template(source, FUSE).render(QUESTION)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50 << 20


def test_the_default_limit_is_below_a_second() -> None:
    started = time.thread_time()
    with pytest.raises(TemplateLimitError, match=r"more than 0\.8 s of processor time"):
        compile_template(BOMBS[0]).render(QUESTION)
    assert 0.7 < time.thread_time() - started < 1


def test_a_message_may_be_long() -> None:
    text = compile_template("{{ messages[0].content }}").render(
        [{"role": "user", "content": "字" * 5_000_000}]
    )
    assert len(text) == 5_000_000


@pytest.mark.parametrize("name", [*REAL, "chatml", "growing", "copying"])
def test_long_honest_conversations_pass(name: str, request: pytest.FixtureRequest) -> None:
    """200 turns of 4,000 characters, also where a template copies all text for each message."""
    sources = {
        "chatml": CHATML,
        "growing": "{% set ns = namespace(t='') %}{% for m in messages %}"
        "{% set ns.t = ns.t + m.role + m.content %}{% endfor %}{{ ns.t }}",
        "copying": "{% set ns = namespace(l=[]) %}{% for m in messages %}"
        "{% set ns.l = ns.l + [m] %}{% endfor %}{% for m in ns.l %}{{ m.content | tojson }}"
        "{{ messages[loop.index:] | length }}{% endfor %}",
    }
    source = sources.get(name) or request.getfixturevalue("tokenizers")[name].chat_template
    messages = turns(200, "words and 字 " * 400)
    text = compile_template(source).render(messages, bos_token="<s>", eos_token="</s>")
    assert len(text) > 400 * 4000


def test_a_huge_source_is_refused() -> None:
    with pytest.raises(TemplateLimitError, match="longer than"):
        compile_template("x" * 300_000)
    with pytest.raises(TemplateLimitError, match="too deeply"):
        compile_template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")


def test_loops_nested_too_deeply_are_a_syntax_error() -> None:
    source = "{% for a in messages %}" * 30 + "{% endfor %}" * 30
    with pytest.raises(jinja2.TemplateSyntaxError):
        compile_template(source)


def test_threads_share_a_template() -> None:
    template = compile_template(SMOL)
    expected = template.render(turns(50))
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(template.render(turns(50)))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8
