"""Guards before the string methods and filters with which a small template can make huge work.

Each guard takes the budget and then exactly the arguments of the call it stands before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, TypeAlias, cast

from jinja2 import pass_context
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.tests import TESTS

from tunesmith.data.templates.sandbox_budget import TEXTS, Budget, TemplateLimitError

Guard: TypeAlias = Callable[..., None]

SLOW_TEXT = 1 << 16
"""Longest text for filters that no chat template needs and whose time may grow with its square."""

MAX_INDENT = 64
MAX_DIGITS = 400
MAX_SUMMED_LISTS = 10_000
GUARDED_OWNERS = (str, bytes, int)
CODECS = {"ascii", "latin-1", "utf-8", "utf-16", "utf-32", "utf8"}

JINJA_FILTERS = cast("dict[str, Callable[..., Any]]", FILTERS)
JINJA_TESTS = cast("dict[str, Callable[..., Any]]", TESTS)

FORMAT_FIELDS = re.compile(r"[%{]")
FORMAT_WIDTHS = re.compile(r"\d+")
WIDTH_GIVEN = re.compile(r"\*|:[^{}]*\{")
WHITE_SPACE = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
LINE_ENDS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


# Guards of methods and filters alike; the first argument after the budget is the text


def guard_width(budget: Budget, text: Any, width: Any = 80, *_: Any) -> None:
    """Center, ljust, rjust, zfill: as wide as asked for."""
    size = budget.measure(text)
    budget.require(max(size, width) if isinstance(width, int) else size)


def guard_tabs(budget: Budget, text: Any, tabsize: Any = 8) -> None:
    """Expandtabs: every tab may become that many spaces."""
    tabs = text.count(b"\t" if isinstance(text, bytes) else "\t")
    budget.require(len(text) + tabs * max(tabsize, 1))


def guard_replace(budget: Budget, text: Any, old: Any, new: Any, count: Any = -1) -> None:
    """Replace: grows by each occurrence; an empty pattern occurs between all characters."""
    if isinstance(text, str):
        old, new = str(old), str(new)
    times = text.count(old)
    if isinstance(count, int) and count >= 0:
        times = min(times, count)
    budget.require(len(text) + times * max(0, len(new) - len(old)))


def guard_format(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> None:
    """Format and `%`: as if every field showed all arguments as wide as any number in sight."""
    size = budget.measure([args, kwargs])
    source = text.decode("latin-1") if isinstance(text, bytes) else text
    widths = [int(digits[:20]) for digits in FORMAT_WIDTHS.findall(source)]
    if WIDTH_GIVEN.search(source):
        widths += [abs(v) for v in chain(args, kwargs.values()) if isinstance(v, int)]
    fields = len(FORMAT_FIELDS.findall(source))
    budget.require(len(text) + fields * (size + max(widths, default=0)))


def guard_modulo(budget: Budget, text: Any, values: Any) -> None:
    """Text % values, where the values are one, a tuple or a mapping."""
    if isinstance(values, Mapping):
        guard_format(budget, text, *values.values())
    else:
        guard_format(budget, text, *(values if isinstance(values, tuple) else (values,)))


def guard_split(budget: Budget, text: Any, separator: Any = None, *_: Any, **__: Any) -> None:
    """Split and rsplit: each piece is a text of its own."""
    if separator is None:
        source = text.decode("latin-1") if isinstance(text, bytes) else text
        budget.spend_memory(len(text) + 64 * sum(map(source.count, WHITE_SPACE)))
    else:
        budget.spend_memory(len(text) + 64 * text.count(separator))
        budget.require_product(len(text), len(separator))


def guard_lines(budget: Budget, text: Any, *_: Any, **__: Any) -> None:
    """Splitlines: at worst a piece for each character, if the text has many line ends."""
    budget.spend_memory(len(text) + 64 * _count_line_ends(budget, text))


def _count_line_ends(budget: Budget, text: Any) -> int:
    budget.require(budget.measure(text))
    source = text.decode("latin-1") if isinstance(text, bytes) else str(text)
    return sum(1 for _ in LINE_ENDS.finditer(source))


def guard_search(budget: Budget, text: Any, pattern: Any = "", *_: Any) -> None:
    """Rfind and strip: compare each character of one text with each of the other at worst."""
    if isinstance(pattern, TEXTS):
        budget.require_product(budget.measure(text), len(pattern))


def guard_codec(budget: Budget, text: Any, encoding: str = "utf-8", *_: Any) -> None:
    """Encode and decode: some codecs take time that grows with the square of the length."""
    if str(encoding).lower() not in CODECS:
        raise TemplateLimitError(f"the template uses the encoding {str(encoding)[:20]!r}")
    budget.require(len(text))


def guard_translate(budget: Budget, text: Any, table: Any, *_: Any) -> None:
    """Translate: every character may become the longest entry of the table."""
    longest = 1
    if isinstance(table, Mapping):
        longest = max((len(v) for v in table.values() if isinstance(v, str)), default=1)
    budget.require(len(text) * max(1, longest))


def guard_bytes(budget: Budget, _: Any, length: Any = 1, *__: Any, **___: Any) -> None:
    """to_bytes: as long as asked for."""
    budget.require(length if isinstance(length, int) else 1)


def guard_slow(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> None:
    """Filters for web pages and consoles, made for short texts."""
    budget.look_at_clock()
    size = budget.measure([text, args, kwargs])
    if size > SLOW_TEXT:
        raise TemplateLimitError("the template gives a long text to a slow filter")
    budget.require(size)


METHOD_GUARDS: dict[str, Guard] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), guard_width),
    **dict.fromkeys(("rfind", "rindex", "rpartition", "strip", "lstrip", "rstrip"), guard_search),
    **dict.fromkeys(("encode", "decode"), guard_codec),
    **dict.fromkeys(("striptags", "unescape"), guard_slow),
    "expandtabs": guard_tabs,
    "replace": guard_replace,
    "format": guard_format,
    "format_map": guard_modulo,
    "split": guard_split,
    "rsplit": guard_split,
    "splitlines": guard_lines,
    "translate": guard_translate,
    "to_bytes": guard_bytes,
}
"""By the name of the method; `join` is not here, it needs its pieces collected first."""


# Guards of filters alone


def guard_indent(budget: Budget, text: str, width: Any = 4, *_: Any, **__: Any) -> None:
    """Indent: each line gets that much in front."""
    size = width if isinstance(width, int) else len(width)
    lines = 1 + _count_line_ends(budget, text)
    budget.require(budget.measure(text) + lines * max(64, size))


def guard_replace_filter(budget: Budget, text: Any, old: str, new: str, count: Any = None) -> None:
    """The filter makes text of everything first."""
    budget.require(budget.measure(text))
    guard_replace(budget, str(text), old, new, count)


def guard_format_filter(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> None:
    """The filter is the `%` operator."""
    guard_format(budget, str(text), *args, **kwargs)


def guard_groups(budget: Budget, value: Any, count: Any, fill_with: Any = None) -> None:
    """Batch and slice: as many groups or places as asked for, filled with the same value."""
    if isinstance(count, int):
        budget.require(max(count, 1) * (8 + budget.measure(fill_with)))


def guard_round(budget: Budget, value: Any, precision: int = 0, method: str = "common") -> None:
    """Round: ten to the precision."""
    if abs(precision) > MAX_DIGITS:
        raise TemplateLimitError("the template computes with an enormous number")


def guard_sum(budget: Budget, value: Any, attribute: Any = None, start: Any = 0) -> None:
    """Sum: of lists it copies what it has for each."""
    is_short = isinstance(value, list | tuple) and len(value) <= MAX_SUMMED_LISTS
    if isinstance(start, list | tuple) and not is_short:
        raise TemplateLimitError("the template adds up too many lists")


def guard_whole(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    """Filters that look at everything in a value: text of it, order, groups."""
    budget.spend_memory(budget.measure([value, args, kwargs]))


def guard_step(budget: Budget, *_: Any, **__: Any) -> None:
    """Filters whose work and result are about as large as the text given."""
    budget.tick()


FILTER_GUARDS: dict[str, Guard] = {
    **dict.fromkeys(("batch", "slice"), guard_groups),
    **dict.fromkeys(("pprint", "striptags", "urlize", "wordwrap", "xmlattr"), guard_slow),
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "unique"), guard_whole),
    **dict.fromkeys(("e", "escape", "forceescape", "string", "urlencode"), guard_whole),
    **dict.fromkeys(("capitalize", "lower", "reverse", "title", "truncate"), guard_step),
    **dict.fromkeys(("float", "int", "upper", "wordcount"), guard_step),
    "center": guard_width,
    "format": guard_format_filter,
    "indent": guard_indent,
    "replace": guard_replace_filter,
    "round": guard_round,
    "sum": guard_sum,
}
"""Filters that are in neither table take one step whatever they are given, or make none at all."""

COMPARING_TESTS = (
    *("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">="),
    *("<", "lt", "lessthan", "<=", "le", "lower", "upper"),
)


def _guarded(function: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    """The filter or test with its guard before it and its result counted."""
    passed = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    def run(context: Any, *args: Any, **kwargs: Any) -> Any:
        guard(context.budget, *args, **kwargs)
        if passed == "eval_context":
            args = (context.eval_ctx, *args)
        elif passed == "environment":
            args = (context.environment, *args)
        elif passed == "context":
            args = (context, *args)
        return context.budget.made(function(*args, **kwargs))

    return run


@pass_context
def join(context: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    """The filter `join`, which takes values from a generator no longer than they fit."""
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    pieces = collect_pieces(context.budget, value, d)
    return JINJA_FILTERS["join"](context.eval_ctx, pieces, d)


def collect_pieces(budget: Budget, values: Iterable[Any], separator: Any) -> list[Any]:
    """The values as a list, if their text with the separator between them is not too long."""
    pieces: list[Any] = []
    size = 0
    for value in values:
        size += budget.measure(value) + budget.measure(separator)
        budget.tick()
        if size > budget.output_limit:
            budget.refuse_length()
        pieces.append(value)
    budget.spend_memory(size + 8 * len(pieces))
    return pieces


@pass_context
def trim(context: Any, value: Any, chars: str | None = None) -> str:
    """The filter `trim`, which stands in most templates."""
    if chars is None and type(value) is str:
        context.budget.tick()
        return value.strip()
    if chars is not None:
        guard_search(context.budget, value, chars)
    return JINJA_FILTERS["trim"](value, chars)


@pass_context
def as_list(context: Any, value: Iterable[Any]) -> list[Any]:
    """The filter `list`."""
    return context.budget.collect(value)


@pass_context
def to_json(
    context: Any,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of chat templates: plain JSON, nothing escaped for HTML."""
    budget: Budget = context.budget
    size = budget.measure(value)
    if indent is None and separators is None:
        return budget.made(json.dumps(value, ensure_ascii=ensure_ascii, sort_keys=sort_keys))
    if len(str(indent)) > MAX_INDENT or (isinstance(indent, int) and indent > MAX_INDENT):
        raise TemplateLimitError("the template indents JSON too far")
    if separators is not None:
        budget.require((1 + size // 4) * (1 + budget.measure(separators)))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return "".join(collect_pieces(budget, encoder.iterencode(value), ""))


def guarded_filters() -> dict[str, Callable[..., Any]]:
    """Jinja's filters for chat templates, none of them able to run away."""
    filters = {name: _guarded(JINJA_FILTERS[name], guard) for name, guard in FILTER_GUARDS.items()}
    return {
        **JINJA_FILTERS,
        **filters,
        "join": join,
        "list": as_list,
        "tojson": to_json,
        "trim": trim,
    }


def guarded_tests() -> dict[str, Callable[..., Any]]:
    """Jinja's tests, with a cost for those that compare."""
    return {
        **JINJA_TESTS,
        **{name: _guarded(JINJA_TESTS[name], guard_whole) for name in COMPARING_TESTS},
    }


def call_method(budget: Budget, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a method of a text, list, mapping or number behind its guard."""
    owner, name = method.__self__, method.__name__
    budget.tick()
    guard = METHOD_GUARDS.get(name)
    if guard and isinstance(owner, GUARDED_OWNERS):
        guard(budget, owner, *args, **kwargs)
    elif name == "join" and isinstance(owner, TEXTS) and args:
        args = (collect_pieces(budget, args[0], owner), *args[1:])
    return budget.made(method(*args, **kwargs))
