"""Chat templates compiled once, rendered as transformers does, and kept from running away.

A chat template is a program that came with somebody's weights or recipe. It sees only plain JSON
values, reaches no Python internals (Jinja's immutable sandbox), and works within a budget of time,
output and memory: the compiled code counts what it writes, loops over, adds, compares and calls.
Text equals that of `apply_chat_template(tokenize=False)`: same flags, globals, filters and tags.

Not covered: a limit on the memory of one expression to the byte, and other encodings of the same
attack in Jinja versions with known holes; `jinja2>=3.1.6` is asked for when a template is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import BuiltinMethodType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, cast

import jinja2
from jinja2 import TemplateError, TemplateRuntimeError, TemplateSyntaxError, nodes, pass_context
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tunesmith.data.templates.sandbox_budget import TEXTS, VIEWS, Budget, Limits, TemplateLimitError
from tunesmith.data.templates.sandbox_compiler import DICT_METHODS, BudgetContext, CountingCode
from tunesmith.data.templates.sandbox_guards import (
    call_method,
    guard_format,
    guard_modulo,
    guarded_filters,
    guarded_tests,
)

if TYPE_CHECKING:
    from jinja2.parser import Parser

__all__ = ["ChatTemplate", "Limits", "TemplateLimitError", "compile_template"]

MAX_SOURCE = 1 << 18
"""Longest template in characters; the longest of known models has a tenth of it."""

LOOP_VALUES = frozenset({"depth", "first", "index", "index0", "last", "length", "revindex"})

MAX_STRFTIME = 200
MAX_LIPSUM_WORDS = 10_000
SAFE_JINJA = (3, 1, 6)

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names that a message's reasoning comes under, the standard one first."""

STR_METHODS = frozenset(name for name in dir(str) if name[0] != "_" and name[:6] != "format")


class ChatTemplate:
    """One compiled template; safe to share between threads, each render has its own budget."""

    def __init__(self, template: jinja2.Template, limits: Limits) -> None:
        self._template = template
        self._limits = limits

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation's text.

        Args:
            messages: plain JSON values; keys whose value is None are left out.
            tools: their JSON schemas.
            add_generation_prompt: whether to end in what opens the next answer.
            variables: what else the template may read, the special tokens by name among it.

        Raises:
            TemplateLimitError: it takes too long, or makes too much text.
            TemplateError: the template refuses, or reaches for what it may not have.
            ValueError: there are no messages.
            TypeError: a value is no JSON.
        """
        if not messages:
            raise ValueError("found an empty conversation; expected at least one message")
        plain = [_plain_message(message) for message in messages]
        values: dict[str, Any] = {
            "documents": None,
            **variables,
            "messages": plain,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        size = sum([_count_characters(value) for value in values.values()])
        environment = self._template.environment
        globals_: dict[str, Any] = {**environment.globals, **values}
        context = BudgetContext(environment, globals_, None, self._template.blocks)
        context.budget = Budget(self._limits, len(plain), size)
        try:
            text = "".join(self._template.root_render_func(context))
        except RecursionError:
            raise TemplateLimitError("the template calls itself too deeply") from None
        except MemoryError:
            raise TemplateLimitError("the template needs more memory than there is") from None
        except (ArithmeticError, AssertionError) as error:
            raise TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
        return text


def compile_template(source: str, limits: Limits | None = None) -> ChatTemplate:
    """Compiles a chat template.

    Raises:
        TemplateSyntaxError: the source is no Jinja.
        TemplateLimitError: the source is longer or deeper than any template.
    """
    if _jinja_version() < SAFE_JINJA:
        raise SecurityError(
            f"found jinja2 {jinja2.__version__}; expected 3.1.6 or newer: older ones can be escaped"
        )
    if len(source) > MAX_SOURCE:
        raise TemplateLimitError(f"the template is longer than {MAX_SOURCE} characters")
    try:
        template = _environment().from_string(source)
    except RecursionError:
        raise TemplateLimitError("the template's expressions are nested too deeply") from None
    except (SyntaxError, ValueError) as error:
        # Python's own compiler refuses what Jinja let through, such as 21 nested loops.
        raise TemplateSyntaxError(str(error), 1) from None
    return ChatTemplate(template, limits or Limits())


def _jinja_version() -> tuple[int, ...]:
    return tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without empty keys, its reasoning under all the names that templates read."""
    plain = {key: value for key, value in message.items() if value is not None}
    # Nearly every message has a role and a content alone.
    if len(plain) > 2:
        for name in REASONING_KEYS:
            if name in plain:
                return {"thinking": plain[name], **plain, "reasoning_content": plain[name]}
    return plain


def _count_characters(value: Any) -> int:
    """About how long a JSON value's text is; other values have methods that nobody looked at."""
    kind = type(value)
    if kind is str:
        return len(value) + 8
    if kind is dict:
        size = 8
        for key, item in value.items():
            size += len(key) + (len(item) + 8 if type(item) is str else _count_characters(item))
        return size
    if kind is list or kind is tuple:
        return 8 + sum([_count_characters(item) for item in value])
    if value is None or kind in (int, float, bool):
        return 24
    raise TypeError(f"found a {kind.__name__} for the chat template; expected plain JSON values")


class SandboxEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, its operators and calls behind a budget."""

    code_generator_class = CountingCode
    context_class = BudgetContext
    intercepted_binops = frozenset({"*", "%", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that make much of little."""
        budget = cast("BudgetContext", context).budget
        if operator == "*":
            return budget.multiply(left, right)
        if operator == "**":
            return budget.power(left, right)
        if isinstance(left, TEXTS):
            guard_modulo(budget, left, right)
            return budget.made(left % right)
        return left % right

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, or an item of that name; the common ones without Jinja's long look."""
        kind = type(obj)
        if kind is dict and attribute not in DICT_METHODS:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        if kind is str and attribute in STR_METHODS:
            return getattr(obj, attribute)
        if kind is TemplateNamespace and attribute[0] != "_":
            values = object.__getattribute__(obj, "_Namespace__attrs")
            if attribute in values:
                return values[attribute]
        if kind is LoopContext and attribute in LOOP_VALUES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Any call from the template."""
        budget = cast("BudgetContext", context).budget
        is_built_in = isinstance(obj, BuiltinMethodType)
        if is_built_in and not isinstance(obj.__self__, SAFE_OWNERS):
            raise SecurityError(f"{obj.__name__} is not safely callable")
        if is_built_in or (isinstance(obj, MethodType) and isinstance(obj.__self__, str)):
            return call_method(budget, obj, args, _without_scope(kwargs))
        wrapped = getattr(obj, "__wrapped__", None) if isinstance(obj, FunctionType) else None
        if isinstance(wrapped, (BuiltinMethodType, MethodType)):
            guard = guard_format if wrapped.__name__ == "format" else guard_modulo
            guard(budget, wrapped.__self__, *args, **_without_scope(kwargs))
        budget.tick()
        return budget.made(super().call(context, obj, *args, **kwargs))


def _without_scope(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments without the variables of loops and blocks that compiled code passes along."""
    if kwargs:
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
    return kwargs


SAFE_OWNERS = (str, bytes, int, float, list, tuple, dict, set, frozenset, range, type, *VIEWS)
"""Whose built-in methods a template may call: JSON values and what it makes of them."""


class GenerationTag(Extension):
    """`{% generation %}` around an answer, which marks it for others and writes it as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag's body, as the body of a call that gives it back."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("write_body"), [], [], body).set_lineno(line)

    def write_body(self, caller: Macro) -> str:
        """The body's text."""
        return caller()


class TemplateNamespace(Namespace):
    """Jinja's namespace, closed to names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"found the namespace attribute {name!r}; expected no underscore first")


class TemplateDict:
    """The global `dict`, without the type itself."""

    @pass_context
    def __call__(self, context: Any, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """A new dict."""
        return context.budget.built(dict(*args, **kwargs))

    @pass_context
    def fromkeys(self, context: Any, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """A dict of the same value under all keys."""
        return context.budget.built(dict.fromkeys(context.budget.collect(keys), value))


@pass_context
def make_range(context: Any, *args: int) -> range:
    """Python's range, as long as the sandbox allows."""
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise TemplateLimitError(f"the template asks for a range of more than {MAX_RANGE}")
    return numbers


@pass_context
def raise_exception(context: Any, message: Any) -> None:
    """How a template refuses a conversation."""
    context.budget.measure(message)
    raise TemplateError(message)


@pass_context
def strftime_now(context: Any, format: str) -> str:
    """The date, for templates that tell the model what day it is."""
    if len(format) > MAX_STRFTIME:
        raise TemplateLimitError("the template asks for too long a date")
    return datetime.now().strftime(format)


@pass_context
def make_lipsum(context: Any, n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    """Jinja's filler text."""
    if n * max > MAX_LIPSUM_WORDS:
        raise TemplateLimitError("the template asks for too much filler text")
    lipsum: Any = DEFAULT_NAMESPACE["lipsum"]
    return lipsum(n, html, min, max)


@pass_context
def make_cycler(context: Any, *items: Any) -> Any:
    """Jinja's cycler, whose items are a tuple that the template can have back."""
    cycler: Any = DEFAULT_NAMESPACE["cycler"]
    return cycler(*context.budget.built(items))


@functools.cache
def _environment() -> SandboxEnvironment:
    environment = SandboxEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters.update(guarded_filters())
    environment.tests.update(guarded_tests())
    names: dict[str, Any] = {
        "range": make_range,
        "dict": TemplateDict(),
        "namespace": TemplateNamespace,
        "cycler": make_cycler,
        "lipsum": make_lipsum,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    environment.globals.update(names)
    return environment
