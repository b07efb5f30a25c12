"""First values of LoRA that make up for what quantizing has rounded off (LoftQ, arXiv 2310.08659).

The paper takes turns: quantize what the adapter leaves, fit the adapter to what the quantizer
leaves. From the second turn on the quantized base is no longer that of the plain weights, and who
loads the result would quantize the plain weights. So the base stays Q = nf4(W) here, and the
adapter is fitted to it once, as PEFT's `replace_lora_weights_loftq` does: B A is the best product
of its rank for (W - Q) / scale. An adapter trained from there is for the same Q that
`model.quantize: nf4` or plain transformers make, and a further turn would change nothing.

Not covered: layers whose weight the files have under another name or in parts.

Shape letters: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import ModelError
from tunesmith.io.safeload import weight_files
from tunesmith.model.load import ModelSource, fetched
from tunesmith.model.low_rank import PREFIX, truncated_svd
from tunesmith.model.quantize import dense_weight


def make_up_for_rounding(model: Any, source: ModelSource) -> int:
    """Gives each adapter on a quantized layer LoftQ's first values; returns how many there are.

    Args:
        model: a PEFT model of LoRA on a base in nf4, nothing trained yet.
        source: of the plain weights that the base was quantized from.

    Raises:
        ModelError: the files do not have a layer's plain weight (`model.no-plain-weight`).
    """
    folder = fetched(source, "model.unreadable", "a causal language model", with_weights=True)
    layers = list(_adapted_layers(model))
    with _open_weights(folder, source.label) as weights, torch.no_grad():
        for name, layer in layers:
            _fit(layer, weights.read(name).to(layer.weight.device))
    return len(layers)


def _fit(layer: Any, plain_OI: torch.Tensor) -> None:
    dense = dense_weight(layer.base_layer)
    if dense is None:
        raise ValueError("only quantized layers have something to make up for")
    rest_OI = plain_OI.float() - dense(torch.float32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    u_OR, s_R, v_IR = truncated_svd(rest_OI / float(layer.scaling["default"]), len(a))
    count = len(s_R)  # a rank above the layer's width leaves the rest of B at zero
    b[:, :count].copy_(u_OR * s_R.sqrt())
    a[:count].copy_((v_IR * s_R.sqrt()).T)


def _adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        has_adapter = "default" in getattr(module, "lora_A", {})
        if has_adapter and dense_weight(module.base_layer) is not None:
            yield name.removeprefix(PREFIX), module


class _Weights:
    """Weights of safetensors files by the names of the model's modules, read one at a time."""

    def __init__(self, files: list[Any], label: str) -> None:
        self._places = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        self._label = label

    def read(self, module: str) -> torch.Tensor:
        """The plain weight of a linear layer.

        Raises:
            ModelError: there is none (`model.no-plain-weight`).
        """
        # Files of the decoder alone leave out what the causal model puts before its names.
        for key in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
            if key in self._places:
                weight: torch.Tensor = self._places[key].get_tensor(key)
                if weight.is_floating_point():
                    return weight
        raise ModelError(
            "model.no-plain-weight",
            self._label,
            found=f"`init: loftq`, and no plain weight of {module} in the files",
            expected="safetensors with the weights that were quantized",
            try_="another `method.init`",
        )


@contextmanager
def _open_weights(folder: Path, label: str) -> Generator[_Weights]:
    from safetensors import safe_open

    with ExitStack() as stack:
        opened = [
            stack.enter_context(safe_open(file, framework="pt"))
            for file in weight_files(folder, label)
        ]
        yield _Weights(opened, label)
