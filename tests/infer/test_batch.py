"""The engine of slots: the answers of each row alone, whatever else is under way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.config.recipe import ModelConfig
from tunesmith.errors import OutOfMemoryError
from tunesmith.infer import batch
from tunesmith.infer.answers import Answer, Answering
from tunesmith.infer.batch import BatchEngine, cache_bytes, row_numbers
from tunesmith.infer.generate_engine import GenerateEngine
from tunesmith.infer.slot_proof import slot_error
from tunesmith.model.load import find_model, load_model, load_tokenizer
from tunesmith.types import SilentReporter

STOPS = (258, *range(24))


@dataclass(frozen=True)
class Asked:
    id: str
    ids: tuple[int, ...]
    prompt: str = ""
    messages: tuple[Any, ...] = ()
    tools: tuple[Any, ...] = ()


def wide(model: Any) -> Any:
    """In double precision, with weights wide enough that answers differ."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.double().eval()


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Any:
    source = find_model(ModelConfig(id=str(tiny_model_folder)), SilentReporter())
    return wide(load_model(source, dtype="float32"))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return load_tokenizer(find_model(ModelConfig(id=str(tiny_model_folder)), SilentReporter()))


def questions(count: int = 23, shared: int = 12) -> list[Asked]:
    """Prompts of different lengths, all with the same start."""
    start = list(range(60, 60 + shared))
    return [
        Asked(f"{n:016x}", tuple(start + [(n * 31 + k * 7) % 250 for k in range(1 + n * 5 % 37)]))
        for n in range(count)
    ]


def engine(model: Any, tokenizer: Any, rows: int = 6, **changes: Any) -> BatchEngine:
    return BatchEngine(model, tokenizer, STOPS, lambda: 1 << 30, rows, **changes)


def answers(found: Any) -> list[Answer]:
    by_place = dict(found)
    return [by_place[place] for place in sorted(by_place)]


GREEDY = Answering(max_new_tokens=14)
DRAWN = Answering(max_new_tokens=14, temperature=0.9, top_p=0.95, seed=5)


@pytest.mark.parametrize("answering", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_answers_in_a_batch_are_those_of_each_alone(
    model: Any, tokenizer: Any, answering: Answering
) -> None:
    asked = questions()
    together = answers(engine(model, tokenizer).answer(asked, answering))
    assert len(together) == len(asked)
    for each, answer in zip(asked, together, strict=True):
        ((_, alone),) = engine(model, tokenizer).answer([each], answering)
        assert alone == answer
    lengths = {answer.completion_tokens for answer in together}
    assert len(lengths) > 3, "no row ever left the batch early"


def test_greedy_answers_are_those_of_transformers(model: Any, tokenizer: Any) -> None:
    asked = questions()
    ours = answers(engine(model, tokenizer).answer(asked, GREEDY))
    for each, answer in zip(asked, ours, strict=True):
        ids = torch.tensor([each.ids])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=14,
            eos_token_id=list(STOPS), pad_token_id=0,
        )  # fmt: skip
        new = out[0, ids.shape[1] :].tolist()
        assert answer.completion_tokens == len(new)
        assert answer.finish_reason == ("stop" if new[-1] in STOPS else "length")


def test_log_probabilities_are_those_of_a_plain_forward(model: Any, tokenizer: Any) -> None:
    answering = Answering(max_new_tokens=8, temperature=0.7, has_logprobs=True)
    asked = questions(5)
    for each, answer in zip(
        asked, answers(engine(model, tokenizer).answer(asked, answering)), strict=False
    ):
        assert answer.logprobs is not None
        texts, logps = zip(*answer.logprobs, strict=True)
        assert len(texts) == answer.completion_tokens
        # The tokens of bytes are their own numbers, so the answer is known from a forward.
        numbers = row_numbers(0, each.id, 8)
        ids = list(each.ids)
        for number, logp in zip(numbers, logps, strict=False):
            with torch.no_grad():
                logit_V = model(torch.tensor([ids])).logits[0, -1] / 0.7
            p_V = logit_V.softmax(-1)
            token = int(torch.searchsorted(p_V.cumsum(-1), torch.tensor([number]), right=True))
            assert logp == pytest.approx(float(p_V[token].log()), abs=1e-5)
            ids.append(token)


def test_a_seed_repeats_and_another_differs(model: Any, tokenizer: Any) -> None:
    def drawn(seed: int) -> list[str]:
        answering = Answering(max_new_tokens=10, temperature=1.0, seed=seed)
        return [a.text for a in answers(engine(model, tokenizer).answer(questions(8), answering))]

    assert drawn(1) == drawn(1) != drawn(2)


def test_numbers_of_a_row_are_the_same_for_ever() -> None:
    """Golden: a restart on another machine goes on with these."""
    found = row_numbers(7, "00000000000000ff", 3)
    assert found.tolist() == row_numbers(7, "00000000000000ff", 9)[:3].tolist()
    assert all(0 <= number < 1 for number in found)
    assert found.tolist() != row_numbers(8, "00000000000000ff", 3).tolist()


def test_slots_grow_in_number_as_prompts_get_shorter(model: Any, tokenizer: Any) -> None:
    """One long row leaves memory for two slots; the short ones behind it get more."""
    long = Asked("f" * 16, tuple(n % 250 for n in range(400)))
    asked = [*questions(20), long]
    room = 3 * 448 * cache_bytes(model)
    narrow = BatchEngine(model, tokenizer, STOPS, lambda: room, 16)
    found = answers(narrow.answer(asked, GREEDY))
    assert found == answers(engine(model, tokenizer).answer(asked, GREEDY))


def test_the_end_of_memory_halves_the_batch(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(engine(model, tokenizer).answer(questions(), GREEDY))
    own, sizes = batch.read_tokens, list[int]()

    def scarce(model: Any, slots: Any, ids: Any, places: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return own(model, slots, ids, places)

    monkeypatch.setattr(batch, "read_tokens", scarce)
    assert answers(engine(model, tokenizer, 8).answer(questions(), GREEDY)) == expected
    assert max(sizes) == 8


def test_one_row_that_does_not_fit_is_told(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(batch, "read_prompts", none)
    with pytest.raises(OutOfMemoryError, match=r"memory\.one-answer"):
        list(engine(model, tokenizer).answer(questions(), GREEDY))


def test_the_attention_is_as_before_and_other_errors_come_through(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("something else")

    before = model.config._attn_implementation
    monkeypatch.setattr(batch, "read_prompts", broken)
    with pytest.raises(RuntimeError, match="something else"):
        list(engine(model, tokenizer).answer(questions(), GREEDY))
    assert model.config._attn_implementation == before


def test_an_answer_ends_with_the_context(model: Any, tokenizer: Any) -> None:
    asked = [Asked("0" * 16, tuple(n % 250 for n in range(509)))]
    (answer,) = answers(engine(model, tokenizer).answer(asked, GREEDY))
    assert answer.completion_tokens <= 3


def test_stop_texts_end_answers_and_are_cut_off(model: Any, tokenizer: Any) -> None:
    plain = answers(engine(model, tokenizer).answer(questions(), GREEDY))
    stop = next(a.text[2:4] for a in plain if len(a.text) > 6 and "\ufffd" not in a.text[:4])
    stopped = answers(
        engine(model, tokenizer).answer(questions(), Answering(max_new_tokens=14, stop=(stop,)))
    )
    assert any(stop in answer.text for answer in plain)
    for before, after in zip(plain, stopped, strict=True):
        if stop in before.text:
            assert after.text == before.text[: before.text.index(stop)]
            assert after.finish_reason == "stop"
            assert after.completion_tokens <= before.completion_tokens
        else:
            assert after == before


def test_a_plain_model_fits_slots(model: Any) -> None:
    assert slot_error(model) is None


@pytest.mark.parametrize("kind", ["Gemma2", "Mistral", "Qwen2", "Qwen3", "Phi3"])
def test_other_builds_answer_as_transformers_does(kind: str, tokenizer: Any) -> None:
    """Soft caps, windows that slide, norms of heads."""
    import transformers

    from conftest import TINY_SIZES

    config = getattr(transformers, f"{kind}Config")(
        **TINY_SIZES | {"vocab_size": 259, "sliding_window": 16, "pad_token_id": 0}
    )
    model = wide(getattr(transformers, f"{kind}ForCausalLM")(config))
    assert slot_error(model) is None
    asked = questions(7)
    ours = answers(engine(model, tokenizer).answer(asked, GREEDY))
    theirs = answers(GenerateEngine(model, tokenizer, STOPS).answer(asked[:1], GREEDY))
    assert ours[:1] == theirs


def test_recurrent_layers_are_left_to_transformers(tokenizer: Any) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config).double().eval()
    assert slot_error(model) is not None


@pytest.mark.parametrize("answering", [GREEDY, Answering(max_new_tokens=6, has_logprobs=True)])
def test_transformers_generate_gives_the_same(
    model: Any, tokenizer: Any, answering: Answering
) -> None:
    asked = questions(9)
    ours = answers(engine(model, tokenizer).answer(asked, answering))
    theirs = answers(GenerateEngine(model, tokenizer, STOPS, at_once=4).answer(asked, answering))
    for one, other in zip(ours, theirs, strict=True):
        assert one.text == other.text
        assert one.finish_reason == other.finish_reason
        for (text, logp), (same, near) in zip(
            one.logprobs or (), other.logprobs or (), strict=False
        ):
            assert text == same
            assert math.isclose(logp, near, abs_tol=1e-4)


@pytest.mark.slow
def test_the_real_model_answers_as_transformers_does() -> None:
    """Three questions of different lengths, greedily, in the number format of the files."""
    from tunesmith.infer.answerer import find_answerer, load_answerer

    answerer = find_answerer("builtin:smollm2-135m", SilentReporter())
    tokenizer: Any = answerer.tokenizer()
    loaded = load_answerer(answerer, tokenizer, SilentReporter())
    assert isinstance(loaded.engine, BatchEngine)
    texts = ["Hi", "What is 2 + 2? Answer with a number.", "为什么天空是蓝色的？" * 3]
    asked = [
        Asked(
            f"{number:016x}",
            tuple(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], add_generation_prompt=True
                )["input_ids"]
            ),
        )
        for number, text in enumerate(texts)
    ]
    ours = answers(loaded.engine.answer(asked, Answering(max_new_tokens=12)))
    stops = tuple(loaded.engine.stop_ids)
    for each, answer in zip(asked, ours, strict=True):
        plain = GenerateEngine(loaded.model, tokenizer, stops)
        ((_, expected),) = plain.answer([each], Answering(max_new_tokens=12))
        assert answer == expected
