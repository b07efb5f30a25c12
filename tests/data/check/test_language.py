from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.check.chinese import SIMPLIFIED, TRADITIONAL, count_scripts
from tunesmith.data.check.language import detect_language, script_mix

PYTHON = "def add(a, b):\n    total = a + b\n    return total\n\nprint(add(1, 2))\n"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("zh-Hans", "这个问题应该怎么解决？请详细说明。"),
        ("zh-Hant", "這個問題應該怎麼解決？請詳細說明。"),
        ("zh-Hans", "你好，世界"),
        ("zh-Hans", "使用 Python 的 pandas 库读取 CSV 文件，然后计算平均值。"),
        ("en", "What is the capital of France?"),
        ("en", "Thank you for reading this, it was a pleasure."),
        ("ja", "この問題はどうやって解決すればいいですか。"),
        ("ko", "이 문제를 어떻게 해결해야 합니까?"),
        ("ru", "Как решить эту задачу?"),
        ("ar", "كيف يمكنني حل هذه المشكلة؟"),
        ("de", "Wie kann ich das Problem mit dem Drucker lösen? Es ist nicht einfach."),
        ("fr", "Comment est-ce que je peux résoudre le problème avec cette imprimante ?"),
        ("es", "¿Cómo puedo resolver el problema con la impresora? No es muy fácil."),
        ("other", "Como é que eu posso resolver o problema da impressora? Não é fácil."),
        ("other", "Hoe kan ik het probleem met de printer oplossen? Het is niet gemakkelijk."),
        ("other", "Πώς μπορώ να λύσω το πρόβλημα;"),
        ("other", "Bawo ni mo se le yanju isoro yii pelu itewe tuntun ti mo ra ana"),
        ("code", PYTHON),
        ("code", f"```python\n{PYTHON}```"),
        ("code", '{\n  "name": "Ada",\n  "age": 36\n}'),
        ("code", "#include <stdio.h>\nint main() {\n    return 0;\n}"),
        ("", ""),
        ("", "42"),
        ("", "Lake Como"),
        ("", "3.14 × 2 = 6.28"),
        ("", "😀😀😀😀😀😀😀"),
    ],
)
def test_language(language: str, text: str) -> None:
    assert detect_language(text) == language


def test_only_the_beginning_is_read() -> None:
    assert detect_language(
        "这是一个很长的中文文本。" * 200 + "the end of it is in English " * 9999
    ) == ("zh-Hans")


@given(st.text(st.characters(), max_size=300))
def test_any_text_has_an_answer(text: str) -> None:
    known = {"zh-Hans", "zh-Hant", "en", "ja", "ko", "ru", "ar", "de", "fr", "es", "code"}
    assert detect_language(text) in known | {"other", ""}


def test_the_table_agrees_with_the_national_standards() -> None:
    """GB2312 has no traditional forms and Big5 no simplified ones."""

    def has(encoding: str, char: str) -> bool:
        return bool(char.encode(encoding, errors="ignore"))

    assert len(SIMPLIFIED) == len(TRADITIONAL) > 500
    assert all(has("gb2312", char) and not has("big5", char) for char in SIMPLIFIED)
    assert all(has("big5", char) and not has("gb2312", char) for char in TRADITIONAL)


def test_scripts_are_counted() -> None:
    assert count_scripts("国國学abc") == (2, 1)


def test_a_mixture_of_scripts_is_named() -> None:
    reason = script_mix("这个问题很简单，请說明為什麼會這樣。")
    assert reason is not None
    assert "simplified (这 个 问 题 简)" in reason
    assert "traditional (說 為" in reason


@pytest.mark.parametrize(
    "text",
    [
        "这个问题很简单，请说明为什么会这样。",
        "這個問題很簡單，請說明為什麼會這樣。",
        "他姓國，这个姓很少见，問他。",  # two strays
        "國國國国",
        "这个问题很简单，请说明为什么会这样。" * 20 + "問過說",  # a quotation
        "",
        "No Chinese at all.",
    ],
)
def test_one_script_is_no_mixture(text: str) -> None:
    assert script_mix(text) is None


def test_real_rows_have_the_language_of_their_file(
    real_rows: dict[str, list[dict[str, str]]],
) -> None:
    for name, language in (("alpaca_en_demo", "en"), ("alpaca_zh_demo", "zh-Hans")):
        seen = Counter(detect_language(row["instruction"]) for row in real_rows[name])
        assert seen[language] + seen[""] > 0.98 * len(real_rows[name]), seen
    for name in ("instruction", "nacgec_dev_instruct_zh"):
        assert {detect_language(row["output"]) for row in real_rows[name]} == {"zh-Hans"}
