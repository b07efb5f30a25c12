"""Reads a mathematical answer into a tree, by recursive descent; no text is ever run as code.

sympy's own parsers call `eval`, and its LaTeX parser needs a generated grammar; an answer of a
model is text that anybody may have shaped, so it is read by this small grammar alone.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from tunesmith.objectives.rewards.math_tokens import Token, tokenize
from tunesmith.objectives.rewards.math_tree import (
    INFINITY,
    Apply,
    Group,
    Node,
    NotMathError,
    Number,
    Relation,
    Symbol,
    Words,
    children,
    walk,
)

MAX_DEPTH = 30
"""Of brackets in brackets."""

_SIGNS = {
    "=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "le": "<=", "leq": "<=",
    "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=",
    "neq": "!=", "in": "in", "approx": "=", "≈": "=", "equiv": "=", "simeq": "=",
}  # fmt: skip
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_TIMES = {"*", "times", "cdot", "ast"}
_OVER = {"/", "div", ":"}
_ONE = Number(Fraction(1))


def parse(text: str) -> Node:
    r"""The tree of an answer such as `\frac{1}{2}`, `x = 3`, `(1, 2]` or `1, 2 或 3`.

    Raises:
        NotMathError: it is not of this kind.
    """
    reader = _Reader(tokenize(text))
    if not reader.tokens:
        raise NotMathError("nothing")
    node = reader.several("")
    if reader.position < len(reader.tokens):
        raise NotMathError("more than one expression")
    return node


class _Reader:
    """A place in the tokens, and one method for each rule of the grammar."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.bars = 0

    def peek(self, ahead: int = 0) -> Token:
        place = self.position + ahead
        return self.tokens[place] if place < len(self.tokens) else Token("mark", "")

    def take(self) -> Token:
        token = self.peek()
        self.position += 1
        return token

    def takes(self, *texts: str) -> bool:
        """Steps over a mark or command if it is one of these."""
        token = self.peek()
        if token.kind in ("mark", "command", "separator") and token.text in texts and token.text:
            self.position += 1
            return True
        return False

    def needs(self, text: str) -> None:
        if not self.takes(text):
            raise NotMathError(f"no {text}")

    def several(self, closing: str) -> Node:
        """Items with commas between them; one alone is itself."""
        items = [self.union()]
        while self.peek().kind == "separator":
            self.take()
            if self.peek().kind != "separator" and self.peek().text != closing:
                items.append(self.union())
        flat = [one for item in items for one in _both_signs(item)]
        return flat[0] if len(flat) == 1 else Group("list", tuple(flat))

    def union(self) -> Node:
        parts = [self.relation()]
        while self.takes("cup"):
            parts.append(self.relation())
        return parts[0] if len(parts) == 1 else Group("union", tuple(parts))

    def relation(self) -> Node:
        sides, signs = [self.quantity()], list[str]()
        while self.peek().kind in ("mark", "command") and self.peek().text in _SIGNS:
            signs.append(_SIGNS[self.take().text])
            sides.append(self.quantity())
        return Relation(tuple(signs), tuple(sides)) if signs else sides[0]

    def quantity(self) -> Node:
        """A sum with its unit, which is left out, or words alone."""
        if self.peek().kind == "words":
            said = self.take().text
            while self.peek().kind in ("words", "symbol"):
                said += f" {self.take().text}"
            return Words(said)
        node = self.sum()
        units = ("words",)
        while self.peek().kind in units or (
            self.peek().text == "/" and self.peek(1).kind in ("words", *units)
        ):
            units = ("words", "symbol")  # km/h
            self.take()
            if self.peek().text == "^":
                self.take()
                self.argument()
        return node

    def sum(self) -> Node:
        node = self.product()
        while True:
            if self.takes("+"):
                node = Apply("add", (node, self.product()))
            elif self.takes("-"):
                node = Apply("add", (node, Apply("neg", (self.product(),))))
            elif self.takes("pm"):
                node = Apply("pm", (node, self.product()))
            else:
                return node

    def product(self) -> Node:
        node = self.signed()
        while True:
            if self.takes(*_TIMES):
                node = Apply("mul", (node, self.signed()))
            elif self.peek().text in _OVER and self.peek(1).kind != "words":
                self.take()
                node = Apply("div", (node, self.signed()))
            elif self.starts_factor():
                node = self.juxtaposed(node)
            else:
                return node

    def juxtaposed(self, node: Node) -> Node:
        r"""`2x`, and `1 1/2` or `1\frac{1}{2}`, which are sums."""
        is_whole = isinstance(node, Number) and not node.is_decimal
        if self.peek().kind == "number":
            if not (is_whole and self.peek(1).text == "/" and self.peek(2).kind == "number"):
                raise NotMathError("two numbers side by side")
            top, _, low = self.power(), self.take(), self.power()
            return Apply("add", (node, Apply("div", (top, low))))
        factor = self.power()
        parts = children(factor)
        is_fraction = isinstance(factor, Apply) and factor.name == "div"
        if is_whole and is_fraction and all(isinstance(part, Number) for part in parts):
            return Apply("add", (node, factor))
        return Apply("mul", (node, factor))

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind in ("number", "symbol", "function"):
            return True
        if token.kind == "command":
            return token.text in _STARTS
        return token.text in ("(", "{") or (token.text == "|" and not self.bars)

    def signed(self) -> Node:
        if self.takes("-"):
            return Apply("neg", (self.signed(),))
        if self.takes("+"):
            return self.signed()
        if self.takes("pm"):
            return Apply("pm", (Number(Fraction(0)), self.signed()))
        return self.power()

    def power(self) -> Node:
        node = self.primary()
        while True:
            if self.takes("^"):
                node = Apply("pow", (node, self.argument()))
            elif self.takes("!"):
                node = Apply("factorial", (node,))
            elif self.takes("%"):
                node = Apply("percent", (node,))
            else:
                return node

    def argument(self) -> Node:
        r"""What stands behind ^, _ or \sqrt: a group, or one sign with its minus."""
        if self.takes("-"):
            return Apply("neg", (self.argument(),))
        return self.primary()

    def primary(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMathError("too deep")
        node = self._primary()
        self.depth -= 1
        return node

    def _primary(self) -> Node:
        token = self.take()
        if token.kind == "number":
            if self.takes("_"):  # the base that it is written in
                self.argument()
            return Number(Fraction(token.text), not token.text.isdecimal())
        if token.kind == "symbol":
            return self.symbol(token.text)
        if token.kind == "function":
            return self.function(token.text)
        if token.kind == "command":
            return self.command(token.text)
        if token.text in _CLOSING:
            return self.bracketed(token.text)
        if token.text == "|":
            self.bars += 1
            node = self.sum()
            self.needs("|")
            self.bars -= 1
            return Apply("abs", (node,))
        raise NotMathError(f"{token.text!r} where a value is expected")

    def symbol(self, name: str) -> Node:
        if self.takes("_"):
            index = self.argument()
            name += "_" + _flat(index)
        return Symbol(name)

    def bracketed(self, opening: str) -> Node:
        bars, self.bars = self.bars, 0
        kinds = ("}",) if opening == "{" else (")", "]")
        if self.takes(*kinds):
            raise NotMathError("empty brackets")
        inside = self.several("")
        self.bars = bars
        closing = self.peek().text
        self.needs(closing if closing in kinds else kinds[0])
        if isinstance(inside, Group) and inside.kind == "list":
            kind = "set" if opening == "{" else opening + closing
            return replace(inside, kind=kind)
        if closing != _CLOSING[opening]:
            raise NotMathError("brackets do not match")
        return inside

    def function(self, name: str) -> Node:
        power: Node | None = None
        base: Node = Number(Fraction(10)) if name == "log" else Symbol("e")
        for _ in range(2):
            if self.takes("_"):
                base = self.argument()
            elif self.takes("^"):
                power = self.argument()
        if power == Apply("neg", (_ONE,)) and name in ("sin", "cos", "tan"):
            name, power = f"arc{name}", None
        inside = self.function_argument()
        node = Apply("log", (inside, base)) if name in ("log", "ln") else Apply(name, (inside,))
        return Apply("pow", (node, power)) if power is not None else node

    def function_argument(self) -> Node:
        r"""What is in its brackets, or the factors side by side behind it: `\sin 2x`."""
        if self.peek().text in ("(", "[", "{"):
            return self.primary()
        node = self.signed()
        while self.starts_factor() and self.peek().kind in ("number", "symbol", "command"):
            node = self.juxtaposed(node)
        if self.takes("/"):  # \arctan 1/2 and \sin x/2 as they are mostly meant
            node = Apply("div", (node, self.power()))
        return node

    def command(self, name: str) -> Node:
        if name in _COMMANDS:
            return _COMMANDS[name]
        if name in ("frac", "binom", "dbinom", "tbinom"):
            parts = (self.short_argument(), self.short_argument())
            return Apply("div" if name == "frac" else "binom", parts)
        if name == "sqrt":
            degree: Node = Number(Fraction(2))
            if self.takes("["):
                degree = self.sum()
                self.needs("]")
            return Apply("root", (self.short_argument(), degree))
        if name == "{":
            if self.takes("}"):
                return Group("set", ())
            self.bars += 1  # the bar of {x | x > 2} opens nothing
            inside = self.several("}")
            self.bars -= 1
            if self.takes("|", "mid"):
                inside = self.several("}")
                self.needs("}")
                return inside
            self.needs("}")
            items = inside.items if isinstance(inside, Group) and inside.kind == "list" else None
            return Group("set", (inside,) if items is None else items)
        if name in _FENCES:
            operation, closing = _FENCES[name]
            node = self.sum()
            self.needs(closing)
            return Apply(operation, (node,))
        if name == "matrix":
            return self.matrix()
        raise NotMathError(f"\\{name}")

    def short_argument(self) -> Node:
        r"""A group or one sign: in `\frac12` the number 12 is two arguments."""
        token = self.peek()
        if token.kind == "number" and len(token.text) > 1 and token.text.isdecimal():
            first, rest = token.text[0], token.text[1:]
            self.tokens = [*self.tokens]
            self.tokens[self.position] = Token("number", rest)
            return Number(Fraction(first))
        return self.argument()

    def matrix(self) -> Node:
        rows: list[Node] = []
        row: list[Node] = []
        while True:
            row.append(self.sum())
            if self.takes("&"):
                continue
            is_end = not self.takes("\\")
            rows.append(Group("row", tuple(row)))
            row = []
            if is_end or self.peek().text == "endmatrix":
                self.needs("endmatrix")
                return Group("matrix", tuple(rows))


_COMMANDS: dict[str, Node] = {
    "pi": Symbol("pi"),
    "infty": INFINITY,
    "emptyset": Group("set", ()),
    "varnothing": Group("set", ()),
    "reals": Group("()", (Apply("neg", (INFINITY,)), INFINITY)),
}
_FENCES = {
    "lfloor": ("floor", "rfloor"),
    "lceil": ("ceil", "rceil"),
    "lvert": ("abs", "rvert"),
    "|": ("abs", "|"),
}
_STARTS = frozenset({"frac", "sqrt", "pi", "binom", "dbinom", "tbinom", "infty", "{", *_FENCES}) - {
    "|"
}


def _flat(node: Node) -> str:
    """An index as a name."""
    names = [part.name if isinstance(part, Symbol) else "" for part in walk(node)]
    numbers = [str(part.value) if isinstance(part, Number) else "" for part in walk(node)]
    return "".join(name or number for name, number in zip(names, numbers, strict=True))


def _both_signs(node: Node) -> list[Node]:
    r"""Two values for one with a \pm."""
    if not any(isinstance(part, Apply) and part.name == "pm" for part in walk(node)):
        return [node]
    return [_with_sign(node, "add"), _with_sign(node, "neg")]


def _with_sign(node: Node, sign: str) -> Node:
    if isinstance(node, Apply):
        parts = tuple(_with_sign(part, sign) for part in node.parts)
        if node.name == "pm":
            second = parts[1] if sign == "add" else Apply("neg", (parts[1],))
            return Apply("add", (parts[0], second))
        return Apply(node.name, parts)
    if isinstance(node, Relation):
        return replace(node, sides=tuple(_with_sign(side, sign) for side in node.sides))
    return node
