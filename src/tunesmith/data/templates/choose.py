"""Which chat template a run uses; the tokenizer carries it from then on, into `model/` too."""

from __future__ import annotations

import difflib
from pathlib import Path

from tunesmith.data.templates.named import NAMED, missing_tokens
from tunesmith.data.templates.traits import adds_bos
from tunesmith.errors import RecipeError
from tunesmith.types import Tokenizer

PLAIN_FILE = Path(__file__).with_name("plain.jinja")


def install_template(tokenizer: Tokenizer, choice: str = "auto", folder: Path | None = None) -> str:
    """Gives the tokenizer the chosen template and says in one line which that is.

    Args:
        tokenizer: changed in place.
        choice: `auto` (its own, else plain), `plain`, a name of `NAMED`, or a .jinja file.
        folder: where a relative file is looked for.

    Raises:
        RecipeError: there is no such template (`recipe.template`), or the tokenizer lacks its
            special tokens (`recipe.template-tokens`).
    """
    if choice == "auto" and tokenizer.chat_template:
        return "the tokenizer's own chat template"
    start = "{{ bos_token }}" if adds_bos(tokenizer) else ""
    if choice in ("auto", "plain"):
        tokenizer.chat_template = start + PLAIN_FILE.read_text(encoding="utf-8")
        reason = "the tokenizer has none" if choice == "auto" else "the recipe asks for it"
        return f"the plain User:/Assistant: template with {tokenizer.eos_token} ({reason})"
    if choice in NAMED:
        _check_tokens(tokenizer, choice)
        named = NAMED[choice]
        tokenizer.chat_template = ("" if named.writes_bos else start) + named.read()
        return f"the template {choice}: {named.description}"
    path = (folder or Path()) / choice
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(choice, ["auto", "plain", *NAMED], n=1)
        raise RecipeError(
            "recipe.template",
            "data.template",
            found=f"{choice}: {getattr(error, 'strerror', None) or error}",
            expected=f"auto, plain, {', '.join(NAMED)}, or a readable .jinja file",
            try_=f"did you mean {near[0]}?" if near else None,
        ) from None
    return f"the chat template in {path}"


def _check_tokens(tokenizer: Tokenizer, name: str) -> None:
    lacking = missing_tokens(name, tokenizer.get_vocab())
    if lacking:
        raise RecipeError(
            "recipe.template-tokens",
            f"data.template: {name}",
            found=f"a tokenizer without {', '.join(lacking)}",
            expected="a template whose special tokens the tokenizer has",
            try_="leave data.template out: auto takes the tokenizer's own template"
            if tokenizer.chat_template
            else "template: plain fits every tokenizer",
        )


def is_plain(tokenizer: Tokenizer) -> bool:
    """Whether the installed template is the plain one, or the one that adds nothing."""
    plain = (PLAIN_FILE.read_text(encoding="utf-8"), NAMED["vanilla"].read())
    return str(tokenizer.chat_template).endswith(plain)
