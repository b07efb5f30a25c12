"""The model card: what it was made of, how, how good it is, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from tunesmith.config.recipe import Recipe
from tunesmith.export.record import Record
from tunesmith.export.trained import Trained
from tunesmith.io.redact import redact
from tunesmith.io.safeload import adapter_settings

HUB_NAME = r"[\w.-]+/[\w.-]+"


def write_card(trained: Trained, recipe: Recipe | None, folder: Path, record: Record) -> None:
    """Writes README.md, in the form that both hubs read."""
    parts = (
        _front_matter(trained, recipe, record),
        f"# {_title(trained)}\n\n{_first_line(trained, record)}",
        _section("How to load it", _loading(trained, record)),
        _section("Prompt format", _prompt_format(trained)),
        _section("Data", _data(record)),
        _section("Training", _training(trained, recipe)),
        _section("Results", _results(trained)),
        _section("Verified", _verified(record)),
        _section("Recipe", _recipe(trained)),
    )
    text = "\n\n".join(part for part in parts if part)
    (folder / "README.md").write_text(redact(text) + "\n", encoding="utf-8")


def license_of(trained: Trained) -> str | None:
    """The licence in the front matter of the base's card; None if its folder has no card."""
    file = Path(trained.base.path) / "README.md"
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return None
    try:
        values: Any = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return None
    found = values.get("license") if isinstance(values, dict) else None
    return str(found) if isinstance(found, str) else None


def _front_matter(trained: Trained, recipe: Recipe | None, record: Record) -> str:
    values: dict[str, Any] = {"library_name": _library(record)}
    name = trained.base_name
    if name.count("/") == 1 and not Path(name).exists() and not name.startswith((".", "/", "~")):
        values["base_model"] = name
        values["base_model_relation"] = _relation(trained, record)
    if found := license_of(trained):
        values["license"] = found
    if trained.head is None:
        values["pipeline_tag"] = "text-generation"
    else:
        values["pipeline_tag"] = "text-classification"
    hub_sets = [each.path.partition(":")[2] for each in _sources(recipe) if each.path[:3] == "hf:"]
    if hub_sets:
        values["datasets"] = [each.partition("@")[0] for each in hub_sets]
    objective = [] if recipe is None else [recipe.objective.name]
    values["tags"] = ["tunesmith", record.request.to, *objective]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _library(record: Record) -> str:
    return {"adapter": "peft", "gguf": "gguf", "ollama": "gguf"}.get(
        record.request.to, "transformers"
    )


def _relation(trained: Trained, record: Record) -> str:
    if record.request.to == "adapter":
        return "adapter"
    is_quantized = record.request.to in ("gguf", "ollama", "int8", "fp8", "gptq", "awq")
    return "quantized" if is_quantized and trained.adapter is None else "finetune"


def _title(trained: Trained) -> str:
    return Path(trained.label).name or trained.label


def _first_line(trained: Trained, record: Record) -> str:
    kind = "An adapter for" if record.request.to == "adapter" else "Fine-tuned from"
    license_ = license_of(trained)
    said = f"licence: {license_}" if license_ else "for its licence see there"
    return f"{kind} `{trained.base_name}` ({said}), made with tunesmith."


def _loading(trained: Trained, record: Record) -> str:
    kind = record.request.to
    if kind in ("gguf", "ollama"):
        lines = ["```python", "from llama_cpp import Llama", ""]
        lines += ['model = Llama("model.gguf", n_ctx=4096)']
        lines += ['messages = [{"role": "user", "content": "Hello!"}]']
        lines += ["print(model.create_chat_completion(messages, temperature=0))", "```"]
        if kind == "ollama":
            lines += ["", "```sh", "ollama create mine -f Modelfile", "ollama run mine", "```"]
        return "\n".join(lines)
    if kind == "mindspore":
        return (
            "`model.ckpt` and `model_mindspore.safetensors` hold the weights under the names of "
            "MindFormers; `param_name_map.json` tells those of transformers."
        )
    task = "CausalLM" if trained.head is None else "SequenceClassification"
    name = f"AutoModelFor{task}" if kind != "adapter" else f"AutoPeftModelFor{task}"
    library = "transformers" if kind != "adapter" else "peft"
    code = (
        f"from {library} import {name}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {name}.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
    )
    text = f"```python\n{code}\n```"
    if trained.head is None and kind != "adapter":
        text += "\n\n```sh\nvllm serve path/to/this/folder\n```"
    return text


def _prompt_format(trained: Trained) -> str:
    tokenizer = trained.tokenizer
    if tokenizer.chat_template is None:
        return ""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello!"}],
            tokenize=False,
            add_generation_prompt=True,
            **trained.template_arguments,
        )
    except TemplateError:
        return ""
    stops = ", ".join(f"`{tokenizer.decode([token])}`" for token in trained.stop_ids)
    return f"The chat template writes it:\n\n```text\n{text}\n```\n\nAnswers end with {stops}."


def _sources(recipe: Recipe | None) -> Sequence[Any]:
    return [] if recipe is None else recipe.data.train


def _data(record: Record) -> str:
    rows = [("file", "rows", "sha256")]
    rows += [(each.name, f"{each.rows:,}", each.sha256[:16]) for each in record.data]
    return _table(rows) if len(rows) > 1 else ""


TRAINING = (
    *("train.epochs", "train.max_steps", "train.global_batch", "train.learning_rate"),
    *("train.schedule", "train.warmup", "train.weight_decay", "train.seed", "data.max_length"),
    *("model.dtype", "model.quantize"),
)


def _training(trained: Trained, recipe: Recipe | None) -> str:
    if recipe is None:
        return _adapter_facts(trained)
    tree = recipe.model_dump(mode="json")
    rows: list[tuple[str, ...]] = [("setting", "value")]
    rows += [("objective", str(recipe.objective.name)), ("method", str(recipe.method.name))]
    method: dict[str, Any] = tree["method"]
    shown = ("rank", "alpha", "target", "dropout", "rslora", "dora", "layers", "kind")
    rows += [(f"method.{key}", str(method[key])) for key in shown if method.get(key) is not None]
    for name in TRAINING:
        part, _, key = name.partition(".")
        value = tree[part].get(key)
        if value is not None:
            rows.append((name, str(value)))
    rows.append(("optimizer", str(tree["train"]["optimizer"].get("name"))))
    return _table(rows)


def _adapter_facts(trained: Trained) -> str:
    if trained.adapter is None:
        return ""
    settings = adapter_settings(trained.adapter, trained.label)
    keys = ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora")
    return _table([("setting", "value"), *((k, str(settings[k])) for k in keys if k in settings)])


SHOWN = ("train_loss", "eval_loss_before", "eval_loss", "best_step", "steps", "tokens")


def _results(trained: Trained) -> str:
    if trained.run is None:
        return ""
    summary = _json_of(trained.run / "summary.json")
    rows: list[tuple[str, ...]] = [("measure", "value")]
    shown = [key for key in SHOWN if key in summary]
    shown += [key for key in summary if key.startswith("eval_") and key not in SHOWN]
    rows += [(key, _number(summary[key])) for key in shown]
    text = _table(rows) if len(rows) > 1 else ""
    for file in sorted(trained.run.glob("evaluation/*/evaluation.json")):
        scores = _scores(_json_of(file))
        if scores:
            text += f"\n\nEvaluation `{file.parent.name}`:\n\n{scores}"
    return text.strip()


def _scores(values: Mapping[str, Any]) -> str:
    """A table of all models and scores, with the bounds of 95 % where there are some."""
    models: Any = values.get("models")
    if not isinstance(models, list):
        return ""
    rows: list[tuple[str, ...]] = [("model", "score", "value", "95 %")]
    for model in cast("list[Any]", models):
        scores: Any = model.get("scores") if isinstance(model, dict) else None
        if not isinstance(scores, dict):
            continue
        for name, score in cast("dict[str, Any]", scores).items():
            value = score if isinstance(score, dict) else {"value": score}
            bounds = [value.get("low"), value.get("high")]
            between = " to ".join(map(_number, bounds)) if None not in bounds else ""
            label = str(model.get("label") or model.get("name") or model.get("model") or "")
            rows.append((label, str(name), _number(value.get("value")), between))
    return _table(rows) if len(rows) > 1 else ""


def _verified(record: Record) -> str:
    lines = [f"- {line}" for line in record.seen.get("says", ())]
    if "prompts" in record.seen:
        lines.append(f"- {record.seen['prompts']} prompts have the token ids of training")
    lines += [f"- {note}" for note in record.notes]
    return "\n".join(lines)


def _recipe(trained: Trained) -> str:
    file = trained.run / "recipe.resolved.yaml" if trained.run else None
    if file is None or not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8").strip()
    return f"<details><summary>all values</summary>\n\n```yaml\n{text}\n```\n\n</details>"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    width = lines[0].count("|") - 1
    return "\n".join([lines[0], f"|{'---|' * width}", *lines[1:]])


def _number(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _json_of(file: Path) -> dict[str, Any]:
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", values) if isinstance(values, dict) else {}
