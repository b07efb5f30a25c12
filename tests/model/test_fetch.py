"""Models and adapters of the hub: fetched by names that are checked, loaded from views."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from tunesmith.config.recipe import ModelConfig
from tunesmith.errors import ModelError
from tunesmith.infer.chat_model import open_chat_model
from tunesmith.io.snapshot import HubRepository
from tunesmith.model import fetch
from tunesmith.model.fetch import fetch_model, list_files
from tunesmith.model.load import (
    ModelSource,
    check_weights_exist,
    find_model,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
)
from tunesmith.types import SilentReporter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a folder into an empty hub cache under an id, as a download leaves it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(folder: Path, model_id: str) -> ModelSource:
        home = cache / f"models--{model_id.replace('/', '--')}"
        snapshot = home / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (home / "blobs").mkdir()
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)
        for file in folder.iterdir():
            shutil.copy(file, home / "blobs" / file.name)
            (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
        return find_model(ModelConfig(id=model_id), SilentReporter())

    return put


def test_a_hub_model_is_that_of_its_folder(put: Any, tiny_model_folder: Path) -> None:
    source = put(tiny_model_folder, "org/tiny")
    assert not source.is_local
    check_weights_exist(source)  # the hub cannot be asked, which is no error here
    model, plain = load_model(source), load_model(ModelSource("t", str(tiny_model_folder)))
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    # What is saved later says which model it was made of, not where a view of it was.
    assert model.name_or_path == model.config.name_or_path == "org/tiny"
    assert load_tokenizer(source).name_or_path == "org/tiny"
    assert fingerprint(source, load_config(source)) == COMMIT[:12]


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT asks the hub itself
def test_an_adapter_on_the_hub_brings_its_base(
    put: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    base = put(tiny_model_folder, "org/tiny")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_model(base), config).save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/tiny"
    put(tmp_path / "adapter", "org/adapter")
    chat = open_chat_model("org/adapter", SilentReporter())
    assert chat.model.peft_config["default"].r == 2
    assert chat.label == "org/adapter"
    assert chat.tokenizer.eos_token == "<|im_end|>"


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings first; then, of the same commit, the files that the index names and no others."""
    asked: list[tuple[str | None, list[str]]] = []
    folder = tmp_path / COMMIT
    folder.mkdir()
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}

    def snapshot(repository: HubRepository, names: list[str], **_: Any) -> Path:
        asked.append((repository.revision, names))
        return folder

    monkeypatch.setattr(fetch, "fetch_snapshot", snapshot)
    assert fetch_model("org/m", "main", with_weights=False) == folder
    fetch_model("org/m", "main", with_weights=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fetch_model("org/m", "main", with_weights=True)
    settings = ("main", fetch.SETTINGS)
    single = (COMMIT, ["model.safetensors", "adapter_model.safetensors"])
    shards = (COMMIT, ["model-1.safetensors", "model-2.safetensors"])
    assert asked == [settings, settings, single, settings, shards]
    assert not any(name.endswith((".py", ".bin", "*")) for name in fetch.SETTINGS)


def test_an_index_that_names_patterns(put: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(tiny_model_folder, tmp_path / "bad")
    (bad / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../x.safetensors"}}
    (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model\.bad-index"):
        load_model(put(bad, "org/bad"))


def test_a_hub_that_cannot_be_asked_lists_nothing(put: Any) -> None:
    assert list_files("org/none", None) == []
    with pytest.raises(ModelError, match=r"model\.hub.*HF_HUB_OFFLINE"):
        load_config(ModelSource("org/none", "org/none"))


def test_errors_of_memory_are_not_the_files(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RuntimeError about memory passes; another one says that the model cannot be read."""
    from transformers import AutoModelForCausalLM

    source = ModelSource("t", str(tiny_model_folder))
    for text, kind in (("CUDA out of memory", RuntimeError), ("sizes differ", ModelError)):

        def fail(*_: Any, text: str = text, **__: Any) -> None:
            raise RuntimeError(text)

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
        with pytest.raises(kind, match=text):
            load_model(source)
