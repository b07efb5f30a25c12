"""Differences between texts: by character in Chinese, by word elsewhere, and always whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.evaluate.report.diff import Piece, compare_texts, cut_pieces, tokens_of

TEXTS = st.text(alphabet="的地得 ab,\n，😀龘𠮷é", max_size=40)


def looks(text: str, label: str | None = None, earlier: str | None = None) -> list[str]:
    """Pieces as text: extra in [], missing in {}, new behind +, other in <>."""
    marks = {"same": "{}", "extra": "[{}]", "missing": "{{{}}}", "other": "<{}>"}
    return [
        ("+" if piece.is_new else "") + marks[piece.kind].format(piece.text)
        for piece in compare_texts(text, label, earlier)
    ]


def test_chinese_differs_by_character() -> None:
    before, label = "受凉气流的影响，气温下降。", "受寒流的影响，气温下降。"
    assert looks(before, label) == ["受", "[凉气]", "{寒}", "流的影响，气温下降。"]


def test_english_differs_by_word() -> None:
    assert looks("He go to school.", "He goes to school.") == [
        *("He ", "[go]", "{goes}", " to school."),
    ]
    assert tokens_of("don't stop, 你好a1 b") == [
        *("don't", " ", "stop", ",", " ", "你", "好", "a1", " ", "b"),
    ]


def test_what_is_new_is_marked_beside_what_is_wrong() -> None:
    found = looks("我们明天去北京玩", "我们今天去北京", "我们今天去上海玩")
    assert found == ["我们", "+[明]", "{今}", "天去", "+北京", "[玩]"]


def test_without_a_label_only_what_is_new_is_marked() -> None:
    assert looks("a b c", None, "a c") == ["a ", "+b ", "c"]
    assert looks("a b c") == ["a b c"]
    assert looks("same", "same", "same") == ["same"]


def test_texts_with_nothing_in_common_are_not_cut_up() -> None:
    found = looks("The sentence is correct.", "受寒流的影响，气温下降。")
    assert found == ["<The sentence is correct.>"]


def test_an_empty_answer_lacks_everything() -> None:
    assert looks("", "好") in ([], ["{好}"])


@given(TEXTS, TEXTS, TEXTS)
def test_no_character_is_lost(text: str, label: str, earlier: str) -> None:
    pieces = compare_texts(text, label, earlier)
    assert "".join(piece.text for piece in pieces if piece.kind != "missing") == text
    if text and all(piece.kind != "other" for piece in pieces):
        assert "".join(piece.text for piece in pieces if piece.kind != "extra") == label
    same = compare_texts(text, text, text)
    assert same == ([Piece(text)] if text else [])


@given(TEXTS, st.integers(0, 50))
def test_cutting_keeps_everything(text: str, characters: int) -> None:
    pieces = compare_texts(text, "的ab", None)
    shown, hidden = cut_pieces(pieces, characters)
    assert sum(len(piece.text) for piece in shown) <= characters
    assert "".join(p.text for p in (*shown, *hidden)) == "".join(p.text for p in pieces)


@pytest.mark.parametrize("text", ["的" * 20_000, "the " * 9_000])
def test_long_loops_take_no_time(text: str) -> None:
    pieces = compare_texts(text, "的the" + text[:500], text[1:])
    assert "".join(piece.text for piece in pieces if piece.kind != "missing") == text
