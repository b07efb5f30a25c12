from typing import Any

import pytest
import torch
from tests.conftest import TINY_SIZES
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tunesmith.config.recipe import FullConfig, LoraConfig
from tunesmith.model import fast_layer, fast_path
from tunesmith.model.adapters import attach
from tunesmith.model.fast_layer import FastLayer, UnsuitableError
from tunesmith.model.fast_path import (
    check_equality,
    fast_layers,
    install_adapters,
    install_layers,
    make_fast,
    set_levels,
    uninstall,
)
from tunesmith.model.layers import decoder_of
from tunesmith.model.load import random_model
from tunesmith.ops import products
from tunesmith.types import Segments

LORA = LoraConfig(rank=4, alpha=8.0)
METHODS = {
    "lora": LORA,
    "two targets": LoraConfig(rank=4, alpha=8.0, target=["q_proj", "up_proj"]),
    "full": FullConfig(name="full"),
}


def make_model(config: type = LlamaConfig, method: Any = LORA, **changes: Any) -> Any:
    torch.manual_seed(0)
    base = random_model(config(**{**TINY_SIZES, **changes}), is_bf16=False).double()
    model = attach(base, method).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_layers_equal_the_plain_path(config: type, method: Any) -> None:
    """1e-7 in fp64: transformers norms in fp32 whatever the model's numbers are."""
    model = make_model(config, method)
    assert install_layers(model) == 2
    assert check_equality(model) < 1e-6


@pytest.mark.parametrize("level", ["mlp", "attention", "full", "offload"])
def test_levels_compute_the_same(level: Any) -> None:
    model = make_model()
    install_layers(model)
    set_levels(model, [level, "none"])
    assert [each.level for each in fast_layers(model)] == [level, "none"]
    assert check_equality(model) < 1e-6


def test_deeper_levels_keep_less() -> None:
    model, kept = make_model(num_hidden_layers=1), {}
    install_layers(model)
    for level in ("none", "mlp", "full"):
        sizes: list[int] = []
        set_levels(model, [level])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (sizes.append(tensor.numel()), tensor)[1],  # noqa: B023
            lambda tensor: tensor,
        ):
            run(model)
        kept[level] = sum(sizes)
    assert kept["none"] > kept["mlp"] > kept["full"]


def run(model: Any, segments: Segments | None = None) -> torch.Tensor:
    segments = segments or Segments((7, 5))
    ids = torch.arange(sum(segments.lengths)) % 101
    places = [
        torch.arange(first, first + length)
        for first, length in zip(segments.offsets, segments.lengths, strict=True)
    ]
    return decoder_of(model)(
        input_ids=ids[None],
        position_ids=torch.cat(places)[None],
        use_cache=False,
        segments=segments,
    ).last_hidden_state


def run_at(level: Any, model: Any, segments: Segments) -> list[torch.Tensor]:
    """Output and all gradients."""
    set_levels(model, [level] * len(fast_layers(model)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    out = run(model, Segments(segments.lengths, segments.parents))
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), trained)]


@pytest.fixture
def attention_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the attention kernels of the processor as they run."""
    names: list[str] = []

    def noting(name: str) -> Any:
        kernel = getattr(products, name)
        return lambda *args: (names.append(name), kernel(*args))[1]

    for name in ("_flash", "_tiles"):
        monkeypatch.setattr(products, name, noting(name))
    return names


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("parents", [(), (-1, 0, 1, 0, -1)])
def test_kept_attention_is_bit_for_bit_the_same_and_runs_once(
    attention_runs: list[str], parents: tuple[int, ...], window: int | None, dtype: torch.dtype
) -> None:
    """Grouped queries, sliding windows, shared prefixes; both kernels."""
    model = make_model(MistralConfig, num_key_value_heads=2, sliding_window=window).to(dtype)
    install_layers(model)
    segments = Segments((9, 5, 6, 3, 7), parents)
    found = {level: run_at(level, model, segments) for level in ("none", "attention", "full")}
    for level in ("attention", "full"):
        assert all(map(torch.equal, found[level], found["none"]))
    assert all(each.any() for each in found["none"][1:] if each.shape[0] != 4)
    is_tiled = window is not None or (dtype == torch.bfloat16 and parents)
    assert attention_runs == ["_tiles" if is_tiled else "_flash"] * 2 * (1 + 1 + 2)


def test_kept_attention_of_long_segments_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, attention_runs: list[str]
) -> None:
    """There flash's own backward needs its output and statistics."""
    monkeypatch.setattr(products, "LONG", 8)
    model = make_model().bfloat16()
    install_layers(model)
    segments = Segments((9, 12))
    expected, found = (run_at(level, model, segments) for level in ("none", "attention"))
    assert all(map(torch.equal, found, expected))
    assert attention_runs == ["_flash"] * 2 * 2


def test_kept_attention_survives_a_second_backward(attention_runs: list[str]) -> None:
    model = make_model()
    install_layers(model)
    set_levels(model, ["attention"] * 2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = run(model).square().sum()
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    again = torch.autograd.grad(loss, trained)
    assert all(map(torch.equal, first, again))
    assert len(attention_runs) == 2 + 2


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_layer, "Kept", None)
    model = make_model()
    install_layers(model)
    set_levels(model, ["attention"] * 2)
    with torch.no_grad():
        run(model)


def test_the_whole_decoder_computes_the_same() -> None:
    model = make_model(Qwen3Config)
    expected = run(model)
    install_layers(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-6, atol=1e-6)
    uninstall(model)
    assert torch.equal(run(model), expected)


def test_disabled_and_merged_adapters_are_respected() -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    install_layers(model)
    adapted = run(model)
    with model.disable_adapter():
        bare = run(model)
    assert not torch.allclose(adapted, bare)
    uninstall(model)
    with model.disable_adapter():
        torch.testing.assert_close(run(model), bare, rtol=1e-6, atol=1e-6)
    install_layers(model)
    model.merge_adapter()
    torch.testing.assert_close(run(model), adapted, rtol=1e-6, atol=1e-6)
    model.unmerge_adapter()


def test_generation_goes_the_usual_way() -> None:
    model = make_model()
    model.get_base_model().set_attn_implementation("sdpa")
    ids = torch.arange(5)[None]
    expected = model(input_ids=ids).logits
    install_layers(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)


def test_training_weights_are_untouched_by_the_check() -> None:
    model = make_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert make_fast(model).startswith("own forward and backward for all 2 layers, equal within")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_dropout_goes_to_peft_with_a_line() -> None:
    model = make_model(method=LoraConfig(rank=4, alpha=8.0, dropout=0.1))
    note = make_fast(model)
    assert note == "transformers' and PEFT's own forward: dropout before the adapters"
    assert not fast_layers(model)


def test_strange_layers_keep_transformers_forward_with_our_adapters() -> None:
    model = make_model(hidden_act="gelu")
    note = make_fast(model)
    assert note.startswith("own forward and backward for 14 adapters, transformers' layers (")
    assert "GELU" in note


def test_adapters_alone_equal_the_plain_path() -> None:
    model = make_model()
    assert install_adapters(model) == 14
    assert check_equality(model) < 1e-12


def test_a_difference_leaves_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = FastLayer.forward
    monkeypatch.setattr(FastLayer, "forward", lambda *args: forward(*args) * 1.01)
    model = make_model()
    expected = run(model)
    assert "ours differs from it by 0.0" in make_fast(model)
    assert torch.equal(run(model), expected)


def test_other_builds_are_refused_by_name() -> None:
    model = make_model()
    decoder_of(model).layers[1].mlp.extra = torch.nn.Identity()
    with pytest.raises(UnsuitableError, match="LlamaMLP with extra"):
        install_layers(model)
    assert not fast_layers(model)
    assert "forward" not in vars(decoder_of(model).norm)


def test_nan_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_path, "check_equality", lambda model: float("nan"))
    assert "differs" in make_fast(make_model())


def test_what_cannot_be_compared_leaves_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any) -> float:
        raise TypeError("rotary_emb wants a layer type")

    monkeypatch.setattr(fast_path, "check_equality", fail)
    model = make_model()
    assert "could not be compared (rotary_emb wants" in make_fast(model)
    assert not fast_layers(model)


def test_an_attention_of_another_name_is_not_guessed() -> None:
    model = make_model()
    attention = decoder_of(model).layers[0].self_attn
    attention.__class__ = type("MinistralAttention", (type(attention),), {})
    with pytest.raises(UnsuitableError, match="attention of the kind MinistralAttention"):
        install_layers(model)


def test_an_adapted_head_takes_bfloat16() -> None:
    torch.manual_seed(0)
    base = random_model(LlamaConfig(**TINY_SIZES, tie_word_embeddings=False), is_bf16=True)
    model = attach(base, LoraConfig(rank=4, alpha=8.0, target=["q_proj", "lm_head"]))
    assert make_fast(model).startswith("own forward and backward for all 2 layers")
    logits = model.get_base_model().get_output_embeddings()(run(model))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
