"""The result of a run: `model/`, which plain transformers or peft loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.io.atomic import atomic_directory
from tunesmith.io.redact import redact
from tunesmith.model.adapters import save_weights
from tunesmith.model.heads import HEAD_FILE, has_scores


def write_result(
    model: Any, tokenizer: Any, folder: Path, *, label: str, base: str, facts: Mapping[str, object]
) -> None:
    """Writes weights, tokenizer (with the chat template used) and a card, all or nothing.

    Args:
        model: what was trained.
        tokenizer: with its template.
        folder: where to.
        label: the run's name.
        base: what the user calls the model that it began with.
        facts: of the run, for the card.
    """
    kind = {"is_adapter": hasattr(model, "peft_config"), "has_scores": has_scores(model)}
    card = result_card(label=label, base=base, facts=facts, **kind)
    with atomic_directory(folder) as temporary:
        save_weights(model, temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(redact(card), encoding="utf-8")


def result_card(
    *, label: str, base: str, is_adapter: bool, facts: Mapping[str, object], has_scores: bool
) -> str:
    """A short model card with working code."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    task = "SequenceClassification" if has_scores else "CausalLM"
    name = f"AutoModelFor{task}"
    imports, arguments = f"from transformers import {name}, AutoTokenizer\n\n", ""
    if is_adapter:
        name = f"AutoPeftModelFor{task}"
        imports = f"from peft import {name}\nfrom transformers import AutoTokenizer\n\n"
    if is_adapter and has_scores:  # PEFT has no place for the names and the number of its scores
        imports = f"import json\nfrom pathlib import Path\n\n{imports}"
        imports += f'head = json.loads(Path("path/to/this/folder/{HEAD_FILE}").read_text())\n'
        arguments = ", **head"
    code = (
        f'{imports}model = {name}.from_pretrained("path/to/this/folder"{arguments})\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
    )
    kind = "An adapter for" if is_adapter else "Fine-tuned from"
    return (
        f"# {label}\n\n{kind} `{base}`, trained with tunesmith.\n\n"
        f"```python\n{code}\n```\n\n| | |\n|---|---|\n{rows}\n"
    )
