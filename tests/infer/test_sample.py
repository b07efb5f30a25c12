"""Sampling many answers at once: the right distribution, the same as one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.config.recipe import ModelConfig
from tunesmith.infer.sample import LEAST_ROWS, Drawing, draw_tokens, sample_answers
from tunesmith.model.load import PACKED_ATTENTION, find_model, load_model
from tunesmith.types import SilentReporter

STOP = 258
DRAWING = Drawing(stop_ids=(STOP,), max_tokens=12)
PROMPTS = [[1, 2, 3], [9, 8, 7, 6, 5, 4, 3, 2, 1], [100] * 40]


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Any:
    """In double precision, with weights wide enough that answers differ."""
    source = find_model(ModelConfig(id=str(tiny_model_folder)), SilentReporter())
    model = load_model(source, dtype="float32", attention=PACKED_ATTENTION).double()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model.get_input_embeddings().weight[STOP] *= 2  # answers of different lengths
    return model


def numbers(prompts: int, answers: int, tokens: int = DRAWING.max_tokens) -> torch.Tensor:
    return torch.rand(prompts, answers, tokens, generator=torch.Generator().manual_seed(0))


def test_answers_in_a_batch_are_those_of_each_alone(model: Any) -> None:
    uniform_PKL = numbers(3, 11)
    together = sample_answers(model, PROMPTS, uniform_PKL, DRAWING)
    assert together is not None
    for prompt, own, answers in zip(PROMPTS, uniform_PKL, together, strict=True):
        for uniform_L, answer in zip(own, answers, strict=True):
            found = sample_answers(model, [prompt], uniform_L[None, None], DRAWING)
            assert found is not None
            ((alone,),) = found
            assert alone.ids == answer.ids
            assert alone.logp == pytest.approx(answer.logp, abs=1e-5)
    lengths = {len(answer.ids) for own in together for answer in own}
    assert len(lengths) > 3, "the batch never shrank"
    assert 2 * LEAST_ROWS < 3 * 11


def test_log_probabilities_are_those_of_a_plain_forward(model: Any) -> None:
    drawing = Drawing(stop_ids=(STOP,), max_tokens=12, temperature=0.7)
    answers = sample_answers(model, PROMPTS[:2], numbers(2, 4), drawing)
    assert answers is not None
    model.set_attn_implementation("eager")
    for prompt, own in zip(PROMPTS, answers, strict=False):
        for answer in own:
            with torch.no_grad():
                logits_TV = model(torch.tensor([[*prompt, *answer.ids]])).logits[0]
            logp_TV = (logits_TV / 0.7).log_softmax(-1)
            rows = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(answer.ids))
            expected = logp_TV[rows, torch.tensor(answer.ids)]
            assert answer.logp == pytest.approx(expected.tolist(), abs=1e-5)
    model.set_attn_implementation(PACKED_ATTENTION)


def test_an_answer_ends_with_a_stop_token_or_at_the_limit(model: Any) -> None:
    answers = sample_answers(model, PROMPTS, numbers(3, 20), DRAWING)
    assert answers is not None
    flat = [answer for own in answers for answer in own]
    assert {answer.is_complete for answer in flat} == {True, False}
    for answer in flat:
        assert STOP not in answer.ids[:-1]
        assert answer.is_complete == (answer.ids[-1] == STOP)
        assert len(answer.ids) == len(answer.logp) <= DRAWING.max_tokens
        assert answer.is_complete or len(answer.ids) == DRAWING.max_tokens


def test_the_model_is_as_before(model: Any) -> None:
    model.train()
    sample_answers(model, PROMPTS, numbers(3, 1), DRAWING)
    assert model.training
    assert model.config._attn_implementation == PACKED_ATTENTION


def test_a_signal_stops_it(model: Any) -> None:
    asked: list[int] = []

    def is_stopped() -> bool:
        asked.append(1)
        return len(asked) == 3

    assert sample_answers(model, PROMPTS, numbers(3, 1), DRAWING, is_stopped) is None
    assert len(asked) == 3


def frequencies(drawing: Drawing, logits_V: torch.Tensor, count: int = 40_000) -> torch.Tensor:
    uniform_B = (torch.arange(count).double() + 0.5) / count
    ids, _ = draw_tokens(logits_V.expand(count, -1), uniform_B, drawing)
    return torch.bincount(ids, minlength=len(logits_V)) / count


@pytest.mark.parametrize("size", [7, 256, 300, 1000])
def test_tokens_come_as_often_as_they_should(size: int) -> None:
    logits_V = torch.randn(size, generator=torch.Generator().manual_seed(1))
    drawing = Drawing((0,), 1, temperature=0.8)
    expected = (logits_V / 0.8).softmax(-1)
    assert torch.allclose(frequencies(drawing, logits_V), expected, atol=2 / 40_000)


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    logits_V = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05]))
    by_k = frequencies(Drawing((0,), 1, top_k=2), logits_V)
    assert torch.allclose(by_k, torch.tensor([0, 0.4, 0, 0.25, 0]) / 0.65, atol=1e-4)
    by_p = frequencies(Drawing((0,), 1, top_p=0.7), logits_V)
    assert torch.allclose(by_p, torch.tensor([0, 0.4, 0.2, 0.25, 0]) / 0.85, atol=1e-4)
    assert frequencies(Drawing((0,), 1, top_p=1e-6), logits_V)[1] == 1


def test_the_ends_of_the_unit_interval_give_tokens_that_may_be_drawn() -> None:
    """Rounding must not step over the last token with any probability."""
    logits_V = torch.full((600,), -torch.inf)
    logits_V[[3, 270]] = 0.0
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    ids, logp = draw_tokens(logits_V.expand(2, -1), ends, Drawing((0,), 1))
    assert ids.tolist() == [3, 270]
    assert logp.tolist() == pytest.approx([-0.693147] * 2, abs=1e-5)


def test_temperature_0_takes_the_likeliest() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    ids, logp = draw_tokens(logits_BV, torch.tensor([0.99, 0.99]), Drawing((0,), 1, temperature=0))
    assert ids.tolist() == [1, 0]
    assert torch.allclose(logp, logits_BV.log_softmax(-1).amax(-1))
