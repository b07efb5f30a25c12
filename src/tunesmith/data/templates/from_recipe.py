"""The renderer that a recipe asks for: its template installed, its options checked."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import TemplateSyntaxError

from tunesmith.config.recipe import DataConfig
from tunesmith.data.templates.choose import install_template
from tunesmith.data.templates.infill import find_infill_tokens
from tunesmith.data.templates.render import Renderer, RenderOptions
from tunesmith.data.templates.skeleton import added_tokens
from tunesmith.errors import RecipeError
from tunesmith.types import Json, Tokenizer

THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which chat templates turn thinking on and off (Qwen and GLM; DeepSeek, Granite)."""


def build_renderer(
    tokenizer: Tokenizer, data: DataConfig, folder: Path | None = None
) -> tuple[Renderer, str]:
    """Installs the recipe's template in the tokenizer; the renderer, and a line on the template.

    Args:
        tokenizer: changed in place.
        data: the recipe's part.
        folder: where a template file with a relative path is looked for.

    Raises:
        RecipeError: the template or an option does not fit the tokenizer.
    """
    said = install_template(tokenizer, data.template, folder)
    arguments: dict[str, Json] = {**_thinking(tokenizer, data), **data.template_arguments}
    infill = None
    if data.fill_in_middle > 0:
        tokens = find_infill_tokens(added_tokens(tokenizer.backend_tokenizer))
        infill = (data.fill_in_middle, tokens)
    train_on = data.train_on if isinstance(data.train_on, str) else tuple(data.train_on)
    try:
        return Renderer(tokenizer, RenderOptions(arguments, train_on, infill)), said
    except TemplateSyntaxError as error:
        raise RecipeError(
            "recipe.template-syntax",
            f"{said}, line {error.lineno}",
            found=str(error.message),
            expected="a Jinja template",
        ) from None


def _thinking(tokenizer: Tokenizer, data: DataConfig) -> dict[str, Json]:
    if data.thinking == "auto":
        return {}
    source = str(tokenizer.chat_template)
    # A variable, not a field such as `message.thinking`.
    switches = [n for n in THINKING_SWITCHES if re.search(rf"(?<![.\w'\"]){n}\b", source)]
    if not switches:
        raise RecipeError(
            "recipe.thinking",
            f"data.thinking: {data.thinking}",
            found="a chat template without such a switch",
            expected=f"a template with {' or '.join(THINKING_SWITCHES)}",
            try_="leave data.thinking out",
        )
    return dict.fromkeys(switches, data.thinking == "on")
