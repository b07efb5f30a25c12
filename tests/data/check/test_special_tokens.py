from __future__ import annotations

import pytest

from tunesmith.data.check.special_tokens import WELL_KNOWN, find_special_tokens

OWN = frozenset({"<|im_start|>", "<|im_end|>", "<|endoftext|>"})


def test_own_and_foreign_tokens_are_told_apart() -> None:
    text = "Hi<|im_end|> [INST] hello [/INST] </s><|im_end|><｜end▁of▁sentence｜>"
    found = find_special_tokens(text, OWN)
    assert found.own == ["<|im_end|>"]
    assert found.foreign == ["[INST]", "[/INST]", "</s>", "<｜end▁of▁sentence｜>"]


@pytest.mark.parametrize("token", sorted(WELL_KNOWN))
def test_every_known_spelling_is_found_whole(token: str) -> None:
    assert find_special_tokens(f"a{token}b", []).foreign == [token]
    assert find_special_tokens(f"a{token}b", [token]).own == [token]


def test_the_longest_token_wins() -> None:
    assert find_special_tokens("<a><b>", ["<a>", "<a><b>"]).own == ["<a><b>"]


def test_an_empty_token_matches_nothing() -> None:
    assert find_special_tokens("abc", [""]) == ([], [])


@pytest.mark.parametrize(
    "text", ["", "a < b and c > d", "list[INT]", "<p>html</p>", "<| not one |>", "[1] a source"]
)
def test_ordinary_texts_hold_none(text: str) -> None:
    assert find_special_tokens(text, OWN) == ([], [])


def test_no_real_text_holds_one(real_texts: list[str]) -> None:
    assert [text for text in real_texts if find_special_tokens(text, OWN) != ([], [])] == []
