"""Quantized folders: what stands around the packages that make them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tunesmith.errors import UserError
from tunesmith.export import quantized
from tunesmith.export.formats import check_request
from tunesmith.export.quantized import PACKAGES, QUANTIZERS, export_quantized, group_size
from tunesmith.export.trained import Trained
from tunesmith.export.verify import Sample, compare, logits_of
from tunesmith.export.written import Request, load_trained
from tunesmith.types import SilentReporter

SAMPLES = (Sample("a", tuple(range(40))),)


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_missing_package_is_told_with_its_extra(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, kind, ("no_such_package", PACKAGES[kind][1]))
    with pytest.raises(UserError, match=r"export\.missing-package.*no_such_package") as caught:
        check_request(Request(kind))
    assert f"pip install 'tunesmith[{PACKAGES[kind][1]}]'" in str(caught.value)


def test_what_a_package_says_is_passed_on(
    make_trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(merged: Path, folder: Path, samples: Sequence[Sample]) -> None:
        assert (merged / "model.safetensors").exists()
        raise RuntimeError("no kernel for this machine")

    monkeypatch.setitem(QUANTIZERS, "int8", refuse)
    monkeypatch.setitem(PACKAGES, "int8", ("json", "export-torchao"))
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match=r"export\.quantizer.*no kernel for this machine"):
        export_quantized(make_trained(), folder, Request("int8"), SilentReporter())
    assert not list(tmp_path.glob(".merged-*"))


def test_groups_divide_the_rows(make_trained: Callable[..., Trained]) -> None:
    assert group_size(Path(make_trained().base.path)) == 32  # rows of 32 and 64
    odd = make_trained(intermediate_size=40)
    with pytest.raises(ValueError, match="do not divide"):
        group_size(Path(odd.base.path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_torchao(kind: str, make_trained: Callable[..., Trained], tmp_path: Path) -> None:
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    trained = make_trained()
    folder = tmp_path / "out"
    folder.mkdir()
    written = export_quantized(trained, folder, Request(kind), SilentReporter())
    assert written.logits is not None
    ours = logits_of(load_trained(trained, dtype="float32"), SAMPLES)
    tolerance = quantized.torch and {"int8": 0.3, "fp8": 0.6}[kind]
    assert compare(ours, written.logits(SAMPLES)).deviations < tolerance
    assert torch.is_tensor(ours[0])
