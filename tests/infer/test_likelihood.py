"""Likelihoods of given answers, against one plain forward for each."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.infer import likelihood as module
from tunesmith.infer.likelihood import (
    GivenAnswer,
    Likeliest,
    divergence,
    read_likelihoods,
)


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float64).eval()


def answers() -> list[GivenAnswer]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 1), (30, 12), (9, 8), (30, 2), (17, 9))
    return [
        GivenAnswer(tuple(torch.randint(0, 250, (length,), generator=generator).tolist()), first)
        for length, first in sizes
    ]


def plain_logp(model: Any, answer: GivenAnswer) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([answer.ids])).logits[0]
    return logits[answer.first - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("batch_tokens", [1, 40, 2048])
def test_likelihoods_equal_plain_forwards(
    model: Any, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", batch_tokens)
    given = answers()
    found = dict(read_likelihoods(model, given, remembers=True))
    assert sorted(found) == list(range(len(given)))
    for number, answer in enumerate(given):
        logp_LV = plain_logp(model, answer)
        target_L = torch.tensor(answer.ids[answer.first :])
        expected = logp_LV.gather(1, target_L[:, None])[:, 0].float()
        torch.testing.assert_close(found[number].logp_L, expected, rtol=0, atol=1e-5)
        assert torch.equal(found[number].is_likeliest_L, logp_LV.argmax(-1) == target_L)
        likeliest = found[number].likeliest
        assert likeliest is not None
        assert likeliest.ids_LK.shape == (len(target_L), module.TOP_TOKENS)


def test_the_model_is_as_it_was_between_answers(model: Any) -> None:
    attention = model.config._attn_implementation
    model.train()
    for _ in read_likelihoods(model, answers()):
        assert model.training
        assert model.config._attn_implementation == attention
    model.eval()


def test_the_longest_comes_first_and_it_stops_when_told(model: Any) -> None:
    given = answers()
    numbers = [number for number, _ in read_likelihoods(model, given)]
    assert [len(given[number].ids) for number in numbers] == [30, 30, 17, 9, 5]
    assert list(read_likelihoods(model, given, is_stopped=lambda: True)) == []


def test_the_divergence_from_itself_is_nothing(model: Any) -> None:
    given = answers()
    first = dict(read_likelihoods(model, given, remembers=True))
    beside = [first[number].likeliest for number in range(len(given))]
    again = dict(read_likelihoods(model, given, beside=[each for each in beside if each]))
    for reading in again.values():
        assert reading.kl_L is not None
        assert not reading.kl_L.any()


def test_the_divergence_is_a_lower_bound_and_exact_with_all_tokens() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(6, 200).mul(2).log_softmax(-1) for _ in range(2))
    exact = (p.exp() * (p - q)).sum(-1)
    for size in (1, 8, 64):
        top = p.topk(size)
        bound = divergence(Likeliest(top.indices, top.values), q)
        assert (bound <= exact + 1e-6).all()
        assert (bound >= 0).all()
    everything = p.topk(199)  # the rest is one token
    found = divergence(Likeliest(everything.indices, everything.values), q)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


def test_an_answer_has_something_before_it() -> None:
    with pytest.raises(ValueError, match="an answer from 0 on"):
        GivenAnswer((1, 2, 3), 0)
    with pytest.raises(ValueError, match="an answer from 3 on"):
        GivenAnswer((1, 2, 3), 3)
