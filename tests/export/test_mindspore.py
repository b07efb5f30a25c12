"""MindSpore's files: what it wrote is read and written again, and names go both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tunesmith.errors import ModelError, UserError
from tunesmith.export import mindspore
from tunesmith.export.mindspore import (
    CKPT,
    SAFETENSORS,
    CkptWeights,
    export_mindspore,
    mindspore_name,
    transformers_name,
    write_ckpt,
)
from tunesmith.export.trained import Trained
from tunesmith.export.verify import Sample, compare, logits_of
from tunesmith.export.written import Request, load_trained
from tunesmith.types import SilentReporter

FIXTURES = Path(__file__).with_name("mindspore")
"""Written by MindSpore 2.10 on a CPU."""

OPTIMIZER = ("epoch_num", "step_num", "global_step", "loss_scale")


@pytest.mark.parametrize("name", ["tiny_llama_fp32.ckpt", "tiny_llama_bf16.ckpt"])
def test_a_file_of_mindspore_is_written_again_byte_for_byte(name: str, tmp_path: Path) -> None:
    weights = CkptWeights(FIXTURES / name)
    tensors = [(tag, weights.read(tag)) for tag in weights.facts]
    write_ckpt(tensors, tmp_path / "again.ckpt")
    assert (tmp_path / "again.ckpt").read_bytes() == (FIXTURES / name).read_bytes()


def test_its_values_and_names_are_those_of_transformers() -> None:
    weights = CkptWeights(FIXTURES / "tiny_llama_fp32.ckpt")
    stored = load_file(FIXTURES / "tiny_llama_fp32.safetensors")
    with np.load(FIXTURES / "tiny_llama_hf_names.npz") as theirs:
        expected = {name: torch.from_numpy(theirs[name]) for name in theirs}
    own = [tag for tag in weights.facts if not tag.startswith(("adam", *OPTIMIZER))]
    assert {transformers_name(tag) for tag in own} == set(expected)
    assert {mindspore_name(name) for name in expected} == set(own)
    for tag in own:
        assert torch.equal(weights.read(tag), expected[transformers_name(tag)])
        assert torch.equal(weights.read(tag), stored[tag])


def test_biases_have_names_and_what_is_no_weight_has_none() -> None:
    name = "model.layers.11.self_attn.q_proj.bias"
    assert mindspore_name(name) == "model.layers.11.attention.wq.bias"
    assert transformers_name(mindspore_name(name)) == name
    with pytest.raises(KeyError):
        transformers_name("adam_m.model.layers.0.attention.wq.weight")


def test_long_tensors_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore, "SLICE_BYTES", 100)
    value = torch.arange(120.0).reshape(10, 12)
    write_ckpt([("a", value), ("b", torch.tensor(3, dtype=torch.int64))], tmp_path / "x.ckpt")
    again = CkptWeights(tmp_path / "x.ckpt")
    assert torch.equal(again.read("a"), value)
    assert again.read("b").item() == 3


@pytest.mark.parametrize("cut", [1, 60, 4000, -1])
def test_a_file_that_is_cut_off_is_refused(cut: int, tmp_path: Path) -> None:
    content = (FIXTURES / "tiny_llama_fp32.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[:cut])
    with pytest.raises(ModelError, match=r"model\.bad-ckpt"):
        CkptWeights(tmp_path / "cut.ckpt")


@pytest.mark.slow
def test_an_export_holds_the_merged_model(
    make_trained: Callable[..., Trained], tmp_path: Path
) -> None:
    from peft import LoraConfig

    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trained = make_trained(adapter)
    samples = (Sample("a", tuple(range(40))),)
    folder = tmp_path / "out"
    folder.mkdir()
    written = export_mindspore(trained, folder, Request("mindspore"), SilentReporter())
    assert written.logits is not None
    ours = logits_of(load_trained(trained, dtype="float32"), samples)
    assert compare(ours, written.logits(samples)).max_difference < 2e-6
    state, again = load_file(folder / SAFETENSORS), CkptWeights(folder / CKPT)
    assert set(state) == set(again.facts)
    assert all(torch.equal(state[name], again.read(name)) for name in state)


def test_other_families_are_refused(make_trained: Callable[..., Trained], tmp_path: Path) -> None:
    trained = make_trained()
    file = Path(trained.base.path) / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"gemma"').replace("Llama", "Gemma"))
    with pytest.raises(UserError, match=r"export\.mindspore-family.*gemma"):
        export_mindspore(trained, tmp_path, Request("mindspore"), SilentReporter())
