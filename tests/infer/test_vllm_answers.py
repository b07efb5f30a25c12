"""vLLM's side, by a stand-in with the interface that its documentation has."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.errors import RecipeError
from tunesmith.infer.answers import Answering
from tunesmith.infer.vllm_answers import find_vllm, open_vllm_answers

END = 258


class StandIn:
    """Answers each prompt with its first three tokens, reversed."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.params: list[Any] = []

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.params += params
        return [self.output(prompt["prompt_token_ids"]) for prompt in prompts]

    def output(self, ids: list[int]) -> Any:
        new = [*ids[2::-1], END]
        logprobs = [{token: SimpleNamespace(logprob=-float(n))} for n, token in enumerate(new)]
        answer = SimpleNamespace(token_ids=new, logprobs=logprobs, finish_reason="stop")
        return SimpleNamespace(outputs=[answer])


@dataclass(frozen=True)
class Asked:
    id: str
    ids: tuple[int, ...]
    prompt: str = ""
    messages: tuple[Any, ...] = ()
    tools: tuple[Any, ...] = ()


def test_what_it_is_given_and_what_is_made_of_it(byte_tokenizer: Any, tmp_path: Path) -> None:
    vllm = SimpleNamespace(LLM=StandIn, SamplingParams=lambda **values: values)
    engine = open_vllm_answers(
        vllm, tmp_path, byte_tokenizer, (END,), dtype="bfloat16", most_tokens=40
    )
    ids = byte_tokenizer.encode("cba and more", add_special_tokens=False)
    asked = [Asked("1" * 16, tuple(ids[:5])), Asked("2" * 16, tuple(ids))]
    answering = Answering(max_new_tokens=9, temperature=0.5, has_logprobs=True)
    found = dict(engine.answer(asked, answering))
    assert [found[n].text for n in (0, 1)] == ["abc", "abc"]
    assert found[0].finish_reason == "stop"
    assert (found[1].prompt_tokens, found[1].completion_tokens) == (len(ids), 4)
    assert found[0].logprobs == (("a", 0.0), ("b", -1.0), ("c", -2.0), ("<|im_end|>", -3.0))
    assert engine.llm.settings["max_model_len"] == 40
    longest, other = engine.llm.params
    assert longest["stop_token_ids"] == [END]
    assert longest["seed"] != other["seed"]


def test_it_is_said_that_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RecipeError, match=r"recipe\.engine"):
        find_vllm()
