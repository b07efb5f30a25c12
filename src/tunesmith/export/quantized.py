"""Folders with quantized weights: int8 and fp8 by torchao, gptq by GPTQModel, awq by llmcompressor.

All four start from a merged folder in bfloat16. int8 and fp8 quantize the linear layers' weights
alone, without data. gptq and awq measure on samples of the run's own training data, so they are
better than on any other text; they keep 4 bits a weight in groups.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import UserError
from tunesmith.export.merged import write_merged, write_tokenizer
from tunesmith.export.trained import Trained
from tunesmith.export.verify import Sample, logits_of
from tunesmith.export.weights import FileWeights
from tunesmith.export.written import Request, Written, folder_prompts
from tunesmith.types import Reporter

GROUP_SIZES = (128, 64, 32)
"""Weights of a row that share a scale, 128 if rows divide by it."""

PACKAGES = {
    "int8": ("torchao", "export-torchao"),
    "fp8": ("torchao", "export-torchao"),
    "gptq": ("gptqmodel", "export-gptq"),
    "awq": ("llmcompressor", "export-awq"),
}
"""Format -> the package that makes it, and the extra that installs it."""

Quantizer = Callable[[Path, Path, Sequence[Sample]], None]
"""From a merged folder into another one, measured on samples."""


def check_package(kind: str) -> None:
    """Makes sure that a format's package is there.

    Raises:
        UserError: it is not (`export.missing-package`).
    """
    package, extra = PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            "export.missing-package",
            f"--to {kind}",
            found=f"no package {package}",
            expected="it installed",
            try_=f"pip install 'tunesmith[{extra}]'",
        )


def export_quantized(
    trained: Trained, folder: Path, request: Request, reporter: Reporter
) -> Written:
    """Writes a folder that transformers and vLLM load with the package that made it.

    Raises:
        UserError: the package is missing (`export.missing-package`), it fails
            (`export.quantizer`), or the model gives scores (`export.format`).
    """
    kind = request.to
    check_package(kind)
    if trained.head is not None:
        raise UserError(
            "export.format", "--to", found=f"{kind} for a model of scores", expected="merged"
        )
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=folder.parent) as temporary:
        merged = Path(temporary)
        notes = write_merged(
            trained, merged, dtype="bfloat16", max_bytes=request.max_bytes, reporter=reporter
        )
        with reporter.waiting(f"Quantizing to {kind}"), _told(kind):
            QUANTIZERS[kind](merged, folder, request.samples)
        shutil.copyfile(merged / "generation_config.json", folder / "generation_config.json")
    write_tokenizer(trained, folder)
    has_template = trained.tokenizer.chat_template is not None
    return Written(
        {"gptq": "4 bits", "awq": "4 bits"}.get(kind, kind),
        PACKAGES[kind][0] if kind == "gptq" else f"transformers with {PACKAGES[kind][0]}",
        _logits(folder, kind),
        folder_prompts(folder) if has_template else None,
        notes,
    )


@contextmanager
def _told(kind: str) -> Generator[None]:
    """Makes an error of the user's of what a package says against a model or a machine."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, ImportError, AttributeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(
            "export.quantizer",
            f"--to {kind}",
            found=f"{PACKAGES[kind][0]} says: {said}",
            expected="a model that it quantizes on this machine",
            try_="--to gguf -q q8_0 needs no package besides",
        ) from error


def _torchao(config_name: str) -> Quantizer:
    """What quantizes weights alone, each row with a scale of its own."""

    def quantize(merged: Path, folder: Path, samples: Sequence[Sample]) -> None:
        from transformers import AutoModelForCausalLM, TorchAoConfig

        kinds: Any = importlib.import_module("torchao.quantization")
        model: Any = AutoModelForCausalLM.from_pretrained(
            merged,
            dtype=torch.bfloat16,
            trust_remote_code=False,
            quantization_config=TorchAoConfig(getattr(kinds, config_name)()),
        )
        model.save_pretrained(folder)

    return quantize


def _by_gptqmodel(merged: Path, folder: Path, samples: Sequence[Sample]) -> None:
    """GPTQ (arXiv 2210.17323) with 4 bits."""
    # Its pools want two workers; on machines of two cores they get one unless told.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    package: Any = importlib.import_module("gptqmodel")
    settings = package.QuantizeConfig(bits=4, group_size=group_size(merged))
    model = package.GPTQModel.load(str(merged), settings)
    model.quantize(_calibration(samples), batch_size=1)
    model.save(str(folder))


def _by_llmcompressor(merged: Path, folder: Path, samples: Sequence[Sample]) -> None:
    """AWQ (arXiv 2306.00978) with 4 bits, in the compressed-tensors format that vLLM reads.

    Not run to its end: llmcompressor 0.14 pins memory, for which it needs an accelerator, and on
    a CPU it stops with that. What comes before it was run there.
    """
    from transformers import AutoModelForCausalLM

    compressor: Any = importlib.import_module("llmcompressor")
    awq: Any = importlib.import_module("llmcompressor.modifiers.transform.awq")
    rounding: Any = importlib.import_module("llmcompressor.modifiers.quantization")
    data: Any = importlib.import_module("datasets")
    rows = data.Dataset.from_list(_calibration(samples))
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    weights["group_size"] = group_size(merged)
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    model: Any = AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.bfloat16, trust_remote_code=False
    )
    compressor.oneshot(
        model=model,
        dataset=rows,
        recipe=[
            awq.AWQModifier(),
            rounding.QuantizationModifier(ignore=["lm_head"], config_groups=groups),
        ],
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(folder, save_compressed=True)


def group_size(merged: Path) -> int:
    """The largest of GROUP_SIZES that the rows of all matrices inside layers divide by.

    Raises:
        ValueError: there is none.
    """
    facts = FileWeights(sorted(merged.glob("*.safetensors"))).facts
    rows = {each.shape[1] for name, each in facts.items() if ".layers." in name and each.shape[1:]}
    for size in GROUP_SIZES:
        if not any(row % size for row in rows):
            return size
    raise ValueError(f"rows of {min(rows)} weights do not divide into groups of {GROUP_SIZES[-1]}")


def _calibration(samples: Sequence[Sample]) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": list(each.ids), "attention_mask": [1] * len(each.ids)} for each in samples
    ]


QUANTIZERS: dict[str, Quantizer] = {
    "int8": _torchao("Int8WeightOnlyConfig"),
    "fp8": _torchao("Float8WeightOnlyConfig"),
    "gptq": _by_gptqmodel,
    "awq": _by_llmcompressor,
}


def _logits(folder: Path, kind: str) -> Callable[[Sequence[Sample]], list[torch.Tensor]]:
    def logits(samples: Sequence[Sample]) -> list[torch.Tensor]:
        from transformers import AutoModelForCausalLM

        with _told(kind):
            if kind == "gptq":  # transformers would want optimum besides
                model: Any = importlib.import_module("gptqmodel").GPTQModel.load(str(folder)).model
            else:
                model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
            return logits_of(model.eval(), samples)

    return logits
