from __future__ import annotations

import pytest

from tunesmith.data.check.width import mixed_widths


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ＡＢＣ公司与ABC公司", "full-width letters (Ａ Ｂ Ｃ) beside half-width ones (A B C)"),
        ("共１２人，另有3人", "full-width digits (１ ２) beside half-width ones (3)"),
        ("狗更忠诚,更依赖人,而猫，则独立，自由。", "2 half-width signs (,) between Chinese"),
        ("你好!\n很好，谢谢，再见!", "2 half-width signs (!) between Chinese"),
    ],
)
def test_mixtures_are_named(text: str, reason: str) -> None:
    found = mixed_widths(text)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain, text; in English!",
        "你好，世界；再见！",
        "你好,世界,再见",
        "用 Python, Java 和 C++, 共 1,000 行，谢谢，再见。",
        "一个笔误,但是其余，都对，很好。",
        "ＡＢＣ１２３",
        "答案:是(对)，好，的.",
    ],
)
def test_consistent_texts_are_left_alone(text: str) -> None:
    assert mixed_widths(text) is None


def test_few_real_texts_are_reported(real_texts: list[str]) -> None:
    assert sum(mixed_widths(text) is not None for text in real_texts) <= 0.002 * len(real_texts)
