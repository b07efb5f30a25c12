"""Reads LoRA adapters that PEFT wrote, here or elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.config.recipe import ModelConfig
from tunesmith.errors import ModelError
from tunesmith.io.manifest import file_sha256
from tunesmith.io.safeload import ADAPTER_CONFIG, adapter_settings, adapter_view, adapter_weights
from tunesmith.model.heads import has_scores
from tunesmith.model.load import ModelSource, fetched, loading_errors
from tunesmith.ops.memory_errors import is_out_of_memory


def find_adapter(source: ModelSource) -> Path | None:
    """The folder of an adapter, fetched if it is on the hub; None for a whole model.

    Raises:
        ModelError: the hub cannot be reached, and the cache has no copy (`model.missing`).
    """
    folder = fetched(source, "model.missing", "a model or an adapter")
    if (folder / "config.json").exists() or not (folder / ADAPTER_CONFIG).exists():
        return None
    return fetched(source, "model.missing", "the weights of an adapter", with_weights=True)


def adapter_fingerprints(folder: str | None, label: str = "model.adapter") -> dict[str, str]:
    """Hashes of an adapter's files, by names that a person knows; nothing for no adapter."""
    files = sorted(Path(folder).glob("adapter_*")) if folder else []
    return {f"{label}: {file.name}": file_sha256(file) for file in files}


def base_of(folder: Path, label: str) -> ModelConfig:
    """The model that a sound adapter was made for, by its own word.

    Raises:
        ModelError: it is no LoRA adapter (`model.bad-adapter`, `model.bad-config`), or its weights
            are pickled or damaged (`model.pickle`, `model.bad-safetensors`).
    """
    adapter_weights(folder, label)
    settings = adapter_settings(folder, label)
    return ModelConfig(id=settings["base_model_name_or_path"], revision=settings.get("revision"))


def load_adapter(base: Any, folder: Path, label: str) -> Any:
    """Puts an adapter on its base model, which it changes.

    Raises:
        ModelError: it does not fit the base model (`model.bad-adapter`), or its weights are pickled
            or damaged (`model.pickle`, `model.bad-safetensors`).
    """
    with adapter_view(folder, label) as view:
        try:
            return _put_on(base, view)
        except loading_errors() as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                "model.bad-adapter",
                label,
                found=(str(error).strip() or type(error).__name__).splitlines()[0][:300],
                expected=f"a LoRA adapter for {base.name_or_path}",
            ) from error


def _put_on(base: Any, view: Path) -> Any:
    """The adapted model; an adapter of a language model also goes on one of scores."""
    from peft import PeftConfig, PeftModel

    config: Any = PeftConfig.from_pretrained(str(view))
    if has_scores(base) and config.task_type != "SEQ_CLS":
        config.task_type = None  # else PEFT looks for a language model's methods, or for a head
    return PeftModel.from_pretrained(base, view, config=config)
