"""Installs the fast forwards on a model, and proves them equal to transformers' and PEFT's own.

Only instances get a new `forward`; taking it away gives back the model as it was. A model whose
layers are of another build keeps transformers' layers, with each adapter computed by our own
function; an adapter of a kind that PEFT alone knows leaves everything as it is.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tunesmith.model.agreement import relative_error
from tunesmith.model.fast_layer import (
    FastLayer,
    FastLinear,
    FastNorm,
    Level,
    UnsuitableError,
    check_norm,
    describe_layer,
    describe_projection,
    is_adapted,
)
from tunesmith.model.layers import decoder_of
from tunesmith.types import Segments

CHECK_LENGTHS = (21, 14, 9)
TOLERANCE: dict[torch.dtype, float] = {torch.float64: 1e-5, torch.float32: 1e-3}
"""In fp64, too, transformers norms in fp32."""
HALF_TOLERANCE = 0.05
"""Relative error of one layer allowed in bfloat16, where every product rounds."""


def make_fast(model: Any) -> str:
    """Installs what fits, if it computes the same; returns a line that says what runs how."""
    try:
        count = install_layers(model)
        what = f"own forward and backward for all {count} layers"
    except UnsuitableError as reason:
        try:
            count = install_adapters(model)
        except UnsuitableError as of_adapter:
            return f"transformers' and PEFT's own forward: {of_adapter}"
        if not count:
            return f"transformers' own forward: {reason}"
        what = f"own forward and backward for {count} adapters, transformers' layers ({reason})"
    try:
        error = check_equality(model)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as problem:
        uninstall(model)
        return f"transformers' and PEFT's own forward: ours could not be compared ({problem})"
    limit = TOLERANCE.get(compute_dtype(model), HALF_TOLERANCE)
    if not error <= limit:
        uninstall(model)
        return (
            "transformers' and PEFT's own forward: ours differs from it by "
            f"{error:.2g} (at most {limit:g})"
        )
    return f"{what}, equal within {error:.1e}"


def install_layers(model: Any) -> int:
    """Gives all decoder layers and the final norm their fast forwards; returns the layers.

    Raises:
        UnsuitableError: a layer is of another build; the model is as it was.
    """
    decoder = decoder_of(model)
    if not hasattr(decoder, "layers") or not hasattr(decoder, "norm"):
        raise UnsuitableError(f"a decoder of the kind {type(decoder).__name__}")
    layers = [describe_layer(layer) for layer in decoder.layers]
    check_norm(decoder.norm)
    for fast in layers:
        fast.layer.forward = fast
    inside = {id(module) for layer in decoder.layers for module in layer.modules()}
    for module in model.modules():
        # An adapted head gets hidden states in the model's type, without autocast around it.
        if is_adapted(module) and id(module) not in inside:
            module.cast_input_dtype_enabled = True
    decoder.norm.forward = FastNorm(decoder.norm)
    return len(layers)


def install_adapters(model: Any) -> int:
    """Gives all adapted linear layers of the decoder their fast forwards; returns how many.

    Raises:
        UnsuitableError: an adapter is of a kind that PEFT alone knows; the model is as it was.
    """
    modules = [module for module in decoder_of(model).modules() if is_adapted(module)]
    forwards = [FastLinear(module, describe_projection(module)) for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    return len(modules)


def uninstall(model: Any) -> None:
    """Takes all fast forwards away."""
    for module, _ in _installed(decoder_of(model)):
        del module.forward


def fast_layers(model: Any) -> list[FastLayer]:
    """The installed forwards of decoder layers, none if there are none."""
    found = [forward for _, forward in _installed(decoder_of(model))]
    return [forward for forward in found if isinstance(forward, FastLayer)]


def set_levels(model: Any, levels: Sequence[Level]) -> None:
    """Says for each layer what its backward makes again."""
    for fast, level in zip(fast_layers(model), levels, strict=True):
        fast.level = level


def compute_dtype(model: Any) -> torch.dtype:
    """The floating-point type of a decoder's hidden states."""
    return decoder_of(model).get_input_embeddings().weight.dtype


# Proof


def check_equality(model: Any) -> float:
    """The largest relative error of a layer against transformers' and PEFT's own forward.

    The first, the middle and the last layer run both ways on the same input: output, gradient of
    the input, and gradients of all that is trained in them are compared. The others are of the same
    build; running all thirty of SmolLM2 would add seconds to every start. B matrices are random for
    the time of the check: with zeros A would have no gradient.
    """
    decoder = decoder_of(model)
    dtype, device = compute_dtype(model), next(decoder.parameters()).device
    generator = torch.Generator().manual_seed(7)
    size = decoder.config.get_text_config().hidden_size
    x_1TH = torch.randn(1, sum(CHECK_LENGTHS), size, generator=generator).to(device, dtype)
    seed_1TH = torch.randn(x_1TH.shape, generator=generator).to(device, dtype)
    places = [torch.arange(length, device=device) for length in CHECK_LENGTHS]
    angles = decoder.rotary_emb(x_1TH, position_ids=torch.cat(places)[None])
    worst = 0.0
    with _random_adapters(decoder, generator):
        for number in sorted({0, len(decoder.layers) // 2, len(decoder.layers) - 1}):
            layer = decoder.layers[number]
            found = _outputs(layer, x_1TH, seed_1TH, angles)
            with _as_it_was(layer), torch.autocast(device.type, torch.bfloat16, dtype.itemsize < 4):
                expected = _outputs(layer, x_1TH, seed_1TH, angles)
            worst = max(worst, *map(relative_error, found, expected))
    return worst


def _outputs(
    layer: Any,
    x_1TH: torch.Tensor,
    seed_1TH: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
) -> list[torch.Tensor]:
    x_1TH = x_1TH.detach().requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    y_1TH = layer(
        x_1TH,
        attention_mask=None,
        position_embeddings=angles,
        segments=Segments(CHECK_LENGTHS),
    )
    grads = torch.autograd.grad(y_1TH, [x_1TH, *trained], seed_1TH.to(y_1TH.dtype))
    return [y_1TH.detach(), *grads]


@contextmanager
def _as_it_was(module: Any) -> Generator[None]:
    """The module without fast forwards inside the block."""
    installed = _installed(module)
    for each, _ in installed:
        del each.forward
    try:
        yield
    finally:
        for each, forward in installed:
            each.forward = forward


@contextmanager
def _random_adapters(decoder: Any, generator: torch.Generator) -> Generator[None]:
    """B matrices as large as trained ones inside the block, then as they were."""
    adapted = [module for module in decoder.modules() if is_adapted(module)]
    parameters = [layer.weight for module in adapted for layer in module.lora_B.values()]
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.copy_(values)


def _installed(module: Any) -> list[tuple[Any, Any]]:
    forwards = [(each, vars(each).get("forward")) for each in module.modules()]
    return [
        (each, forward)
        for each, forward in forwards
        if isinstance(forward, FastLayer | FastNorm | FastLinear)
    ]
