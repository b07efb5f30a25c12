"""Stop texts and pieces of text across the borders of tokens and characters."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.infer.stop_text import StopTexts, pieces, plain_text


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=False)[0].ids


def first_hit(stops: StopTexts, ids: list[int]) -> int | None:
    return next((n for n in range(1, len(ids) + 1) if stops.have_come(ids[:n])), None)


@pytest.mark.parametrize("stop", ["END", "。", "\n\n", "你好"])
def test_a_stop_text_is_seen_with_its_last_byte(byte_tokenizer: Any, stop: str) -> None:
    text = f"先说几句话 and more{stop}后面的"
    ids = ids_of(byte_tokenizer, text)
    stops = StopTexts(byte_tokenizer, ("never", stop))
    end = text.index(stop) + len(stop)
    assert first_hit(stops, ids) == len(text[:end].encode())
    assert stops.answer(ids[: len(text[:end].encode())]) == text[: text.index(stop)]


def test_no_stop_text_is_ever_there(byte_tokenizer: Any) -> None:
    stops = StopTexts(byte_tokenizer, ())
    assert not stops.have_come([1, 2, 3])
    assert stops.cut("all of it") == "all of it"


def test_a_character_that_was_cut_is_left_out(byte_tokenizer: Any) -> None:
    ids = ids_of(byte_tokenizer, "好的")
    assert StopTexts(byte_tokenizer, ()).answer(ids[:-1]) == "好"


def test_pieces_join_to_the_text_and_spell_special_tokens(byte_tokenizer: Any) -> None:
    text = "中文 and English 混合 " * 5
    ids = [*ids_of(byte_tokenizer, text), byte_tokenizer.eos_token_id]
    found = pieces(byte_tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text + byte_tokenizer.eos_token
    assert found[:3] == ["", "", "中"]


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "deepseek_v3"])
def test_pieces_of_real_tokenizers(tokenizers_folder: Any, name: str) -> None:
    from tunesmith.model.load import ModelSource, load_tokenizer

    tokenizer = load_tokenizer(ModelSource(name, str(tokenizers_folder / name)))
    text = "2017年《财富》全球论坛 🙂 said: it's   fine.\n\n龘靐 done"
    ids = ids_of(tokenizer, text)
    assert "".join(pieces(tokenizer, ids)) == text
    assert plain_text(tokenizer, ids) == text
