"""Which chat template a run uses; the tokenizer carries it from then on, into `model/` too."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import RecipeError
from tunesmith.types import Tokenizer

PLAIN_FILE = Path(__file__).with_name("plain.jinja")


def install_template(tokenizer: Tokenizer, choice: str = "auto", folder: Path | None = None) -> str:
    """Gives the tokenizer the chosen template and says in one line which that is.

    Args:
        tokenizer: changed in place.
        choice: `auto` (its own, else plain), `plain`, or a .jinja file.
        folder: where a relative file is looked for.

    Raises:
        RecipeError: the file is not there (`recipe.template`).
    """
    if choice == "auto" and tokenizer.chat_template:
        return "the tokenizer's own chat template"
    if choice in ("auto", "plain"):
        start = "{{ bos_token }}" if _adds_bos(tokenizer) else ""
        tokenizer.chat_template = start + PLAIN_FILE.read_text(encoding="utf-8")
        reason = "the tokenizer has none" if choice == "auto" else "the recipe asks for it"
        return f"the plain User:/Assistant: template with {tokenizer.eos_token} ({reason})"
    path = (folder or Path()) / choice
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            "recipe.template",
            "data.template",
            found=f"{path}: {error.strerror}",
            expected="auto, plain, or a readable .jinja file",
        ) from None
    return f"the chat template in {path}"


def is_plain(tokenizer: Tokenizer) -> bool:
    """Whether the installed template is the plain one."""
    return str(tokenizer.chat_template).endswith(PLAIN_FILE.read_text(encoding="utf-8"))


def _adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether inference on plain text starts with the BOS token (add_bos_token)."""
    encoded = tokenizer.backend_tokenizer.encode_batch(["a"], add_special_tokens=True)[0]
    return bool(tokenizer.bos_token) and encoded.tokens[0] == str(tokenizer.bos_token)
