"""The result of a run: `model/`, which plain transformers or peft loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.io.atomic import atomic_directory
from tunesmith.io.redact import redact
from tunesmith.model.adapters import save_weights


def write_result(model: Any, tokenizer: Any, folder: Path, card: str) -> None:
    """Writes weights, tokenizer (with the chat template used) and a card, all or nothing."""
    with atomic_directory(folder) as temporary:
        save_weights(model, temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(redact(card), encoding="utf-8")


def result_card(*, label: str, base: str, is_adapter: bool, facts: dict[str, object]) -> str:
    """A short model card with working code."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    if is_adapter:
        code = (
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        )
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        )
    code += 'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
    kind = "An adapter for" if is_adapter else "Fine-tuned from"
    return (
        f"# {label}\n\n{kind} `{base}`, trained with tunesmith.\n\n"
        f"```python\n{code}\n```\n\n| | |\n|---|---|\n{rows}\n"
    )
