"""The teaching twin and the engine see the same loss on the same batch."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.config.recipe import FullConfig
from tunesmith.data.pack import build_batch
from tunesmith.data.templates import Renderer
from tunesmith.data.tokenize import Encoder
from tunesmith.model.adapters import attach
from tunesmith.model.load import PACKED_ATTENTION, ModelSource, load_model, load_tokenizer
from tunesmith.objectives import OBJECTIVES
from tunesmith.types import Conversation, Message, Origin

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "minimal_sft.py"


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("minimal_sft", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_loss_equals_the_engines(tiny_model_folder: Path) -> None:
    twin = load_example()
    source = ModelSource("tiny", str(tiny_model_folder))
    tokenizer = load_tokenizer(source)
    plain = load_model(source, dtype="float32")
    loss = twin.batch_loss(plain, *twin.make_batch(tokenizer, twin.CONVERSATIONS))
    loss.backward()

    model = attach(
        load_model(source, dtype="float32", attention=PACKED_ATTENTION), FullConfig(name="full")
    )
    samples = [
        Conversation(tuple(Message(m["role"], m["content"]) for m in c), Origin("x", 1))
        for c in twin.CONVERSATIONS
    ]
    rendered = [Renderer(tokenizer).render(sample) for sample in samples]
    encoded = Encoder(tokenizer.backend_tokenizer).encode(rendered)  # type: ignore[arg-type]
    batch = build_batch([(i, sequence) for i, group in enumerate(encoded) for sequence in group])
    ours = OBJECTIVES["sft"].make().step(model, batch).loss_sum / batch.weight_N.sum()
    ours.backward()

    torch.testing.assert_close(ours, loss, rtol=0, atol=1e-5)
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-5)


def test_it_runs_and_its_loss_falls(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_example().main(str(tiny_model_folder), steps=3)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:3]]
    assert losses[2] < losses[0]
