"""Answers of the tiny model: alone, in a batch, as a stream."""

from pathlib import Path

import pytest
import torch

from tunesmith.errors import ModelError
from tunesmith.infer.chat_model import ChatModel, open_chat_model
from tunesmith.infer.generate import Sampling, answer_all, stream_answer
from tunesmith.types import SilentReporter

GREEDY = Sampling(temperature=0, max_new_tokens=8)


@pytest.fixture(scope="module")
def chat(tiny_model_folder: Path) -> ChatModel:
    chat = open_chat_model(str(tiny_model_folder), SilentReporter())
    torch.manual_seed(0)
    with torch.no_grad():  # weights this wide make answers differ from question to question
        for parameter in chat.model.parameters():
            parameter.normal_(std=0.5)
    return chat


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_batch_answers_as_each_alone(chat: ChatModel) -> None:
    questions = [ask("a"), ask("a much longer question"), ask("中文")]
    together = answer_all(chat, questions, GREEDY)
    alone = ["".join(stream_answer(chat, question, GREEDY)).strip() for question in questions]
    assert together == alone
    assert len(set(together)) > 1


def test_a_seed_repeats_a_drawn_answer(chat: ChatModel) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=8, seed=5)
    first, second = ("".join(stream_answer(chat, ask("a"), sampling)) for _ in range(2))
    other = "".join(stream_answer(chat, ask("a"), Sampling(1.0, max_new_tokens=8, seed=6)))
    assert first == second
    assert first != other


def test_closing_a_stream_stops_it(chat: ChatModel) -> None:
    stream = stream_answer(chat, ask("a"), Sampling(temperature=0, max_new_tokens=400))
    next(stream)
    stream.close()  # returns: the thread has ended
    assert list(stream) == []


def test_stop_tokens_are_those_of_tokenizer_and_model(chat: ChatModel) -> None:
    assert chat.tokenizer.eos_token_id in chat.stop_ids


def test_template_arguments_of_the_run_are_used(chat: ChatModel) -> None:
    import copy
    from dataclasses import replace

    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] * times }}"
    seen: list[int] = []
    for times in (1, 50):
        changed = replace(chat, tokenizer=tokenizer, template_arguments={"times": times})
        from tunesmith.infer.generate import _prompt_ids

        seen.append(_prompt_ids(changed, ask("a")).shape[1])
    assert seen == [1, 50]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.not-a-model"):
        open_chat_model(str(tmp_path), SilentReporter())
