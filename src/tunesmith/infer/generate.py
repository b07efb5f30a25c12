"""Answers: one at a time as a stream of text, or many at once."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from jinja2 import TemplateError

from tunesmith.errors import UserError
from tunesmith.infer.chat_model import ChatModel


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn; temperature 0 always takes the likeliest token."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512
    seed: int | None = None


def stream_answer(
    chat: ChatModel, messages: list[dict[str, Any]], sampling: Sampling
) -> Generator[str, None, None]:
    """Yields the answer to a conversation piece by piece; closing the iterator stops it."""
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    class StopWhenClosed(StoppingCriteria):
        is_closed = False

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((input_ids.shape[0],), self.is_closed, device=input_ids.device)

    ids_1T = _prompt_ids(chat, messages)
    streamer: Any = TextIteratorStreamer(
        chat.tokenizer,  # pyright: ignore[reportArgumentType]
        skip_prompt=True,
        skip_special_tokens=True,
    )
    stop = StopWhenClosed()
    arguments = _arguments(chat, sampling) | {
        "input_ids": ids_1T,
        "attention_mask": torch.ones_like(ids_1T),
        "streamer": streamer,
        "stopping_criteria": StoppingCriteriaList([stop]),
    }
    failure: list[BaseException] = []

    def generate() -> None:
        try:
            chat.model.generate(**arguments)
        except BaseException as error:  # noqa: BLE001 - handed to the reader of the stream below
            failure.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        stop.is_closed = True
        thread.join()
    if failure:
        raise failure[0]


def num_missing_tokens(chat: ChatModel, messages: list[dict[str, Any]], sampling: Sampling) -> int:
    """Tokens by which conversation and longest answer are more than the model was made for."""
    most = getattr(chat.model.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return 0
    return max(0, _prompt_ids(chat, messages).shape[1] + sampling.max_new_tokens - most)


def answer_all(
    chat: ChatModel, conversations: Sequence[list[dict[str, Any]]], sampling: Sampling
) -> list[str]:
    """Answers many conversations in one padded batch."""
    prompts = [_prompt_ids(chat, messages)[0].tolist() for messages in conversations]
    longest = max(len(ids) for ids in prompts)
    filler = chat.tokenizer.eos_token_id
    # Left padding: every answer starts in the same column.
    ids_BT = torch.tensor([[filler] * (longest - len(ids)) + ids for ids in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    device = chat.model.device
    with torch.inference_mode():
        out_BT = chat.model.generate(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            **_arguments(chat, sampling),
        )
    return [
        str(chat.tokenizer.decode(row[longest:], skip_special_tokens=True)).strip()
        for row in out_BT
    ]


def _prompt_ids(chat: ChatModel, messages: list[dict[str, Any]]) -> torch.Tensor:
    try:
        text = chat.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **chat.template_arguments
        )
    except TemplateError as error:
        raise UserError(
            "model.template-refuses",
            chat.label,
            found=f"the chat template's refusal: {error}",
            expected="messages that it can render",
            try_="leave the system message out",
        ) from error
    encoding = chat.tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=False)[0]
    return torch.tensor([encoding.ids], device=chat.model.device)


def _arguments(chat: ChatModel, sampling: Sampling) -> dict[str, Any]:
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    arguments: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "eos_token_id": chat.stop_ids,
        "pad_token_id": chat.tokenizer.eos_token_id,
    }
    if sampling.temperature <= 0:
        # Sampling values of the model's own generation config would only draw warnings.
        return arguments | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return arguments | {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
