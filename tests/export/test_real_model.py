"""The built-in model with an adapter: what leaves is what was there, in llama.cpp too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_byte_tokenizer, make_tiny_config
from tunesmith.cli.export import ExportOptions, run_export
from tunesmith.errors import ModelError
from tunesmith.export.gguf_reload import llama_cpp_python
from tunesmith.export.merged import write_merged
from tunesmith.export.trained import Trained
from tunesmith.model.load import ModelSource
from tunesmith.types import SilentReporter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on the built-in model that changes its answers."""
    from peft import LoraConfig, get_peft_model

    from tunesmith.config.recipe import ModelConfig
    from tunesmith.model.load import find_model, load_model, load_tokenizer

    try:
        source = find_model(ModelConfig(id="builtin:smollm2-135m"), SilentReporter())
    except ModelError as error:
        pytest.skip(str(error))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    model: Any = get_peft_model(load_model(source), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_gguf_f16_answers_as_the_run_in_llama_cpp(adapter: Path, tmp_path: Path) -> None:
    if llama_cpp_python() is None:
        pytest.skip("no llama_cpp here, and TUNESMITH_LLAMA_CPP_PYTHON is not set")
    out = tmp_path / "out"
    run_export(str(adapter), ExportOptions(to="ollama", out=str(out), quantization="f16"))
    record = json.loads((out / "export.json").read_text())
    said = " ".join(record["verified"]["says"])
    assert "run by llama.cpp" in said
    # Of an adapter drawn at random one answer may hang on less than f16 rounds off.
    assert re.search(r"[23] of 3 likeliest answers of up to 32 tokens are the same", said)
    assert "same prompts by the Modelfile's template: 4, token by token" in said


class Meter(SilentReporter):
    """Watches the memory of this process while tensors go by."""

    def __init__(self) -> None:
        self.peak_bytes = 0

    def track(self, label: str, items: Iterable[Any], total: int | None = None) -> Iterator[Any]:
        for item in items:
            yield item
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """What this process holds that is no page of a file."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


def test_merging_holds_a_tensor_not_the_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = make_tiny_config(hidden_size=512, intermediate_size=4096, num_hidden_layers=10)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    tokenizer = make_byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    size = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.numel() * 4 for parameter in model.parameters())
    del model
    source = ModelSource("base", str(tmp_path / "base"))
    trained = Trained("x", source, tmp_path / "adapter", tokenizer, stop_ids=(258,))
    meter, before = Meter(), anonymous_bytes()
    (tmp_path / "out").mkdir()
    write_merged(trained, tmp_path / "out", dtype="auto", max_bytes=10**8, reporter=meter)
    grown = meter.peak_bytes - before
    assert size > 120e6
    assert grown < 4 * largest, f"{grown:,} bytes for a model of {size:,}"
