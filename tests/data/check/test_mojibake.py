from __future__ import annotations

import pytest

from tunesmith.data.check.mojibake import find_mojibake

SENTENCES = (
    "你好，世界。我们今天在北京见面。",
    "请检测这个句子的语法错误。",
    "他说：“这是一个好问题”，然后走了。",
)


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("cafÃ©", "Ã©"),
        ("itâ€™s", "â€™"),
        ("20 Â°C", "Â°"),
        ("ä½\u00a0å¥½", "ä½\u00a0å¥½"),
        ("ä½ å¥½", "å¥½"),
        ("ðŸ˜€", "ðŸ˜€"),
        ("Ð¿Ñ€Ð¸", "Ð¿Ñ€Ð¸"),
        ("浣犲ソ", "浣犲ソ"),
        ("鐨勪", "鐨勪"),
        ("涓€涓", "涓€"),
        ("他说ÄãºÃ。", "ÄãºÃ"),
        ("a\ufffd\ufffdb", "\ufffd\ufffd"),
        ("锟斤拷锟斤拷", "锟斤拷"),
        ("烫烫烫烫", "烫烫烫烫"),
        ("ï»¿id", "ï»¿"),
        ("a\ufeffb", "\ufeff"),
        ("a\x93b", "\x93"),
        ("é\x93b", "\x93"),
        ("a\x00b", "\x00"),
        ("\x1b[31mred", "\x1b"),
    ],
)
def test_broken_pieces_are_found(text: str, piece: str) -> None:
    assert find_mojibake(text) == piece


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize(
    ("written", "read"),
    [("utf-8", "latin-1"), ("utf-8", "gb18030"), ("gbk", "latin-1"), ("gbk", "utf-8")],
)
def test_sentences_read_in_the_wrong_encoding(sentence: str, written: str, read: str) -> None:
    assert find_mojibake(sentence.encode(written).decode(read, errors="replace"))


@pytest.mark.parametrize(
    "text",
    [
        *SENTENCES,
        "",
        "plain\ttext\r\n\x0c",
        "\ufeffat the start it is the reader's business",
        "the so-called “CAFÉ” he said",
        "« J’ai vu le café… », «Où ça ?», déjà\u00a0»",
        "„Spaß“ und Größe; ÄÖÜäöüß; 50 ß–",
        "àâäéèêëîïôùûüÿ",
        "20 °C ±5 µm, ½ cup, ¼ tsp, ©2020 ®",
        "Ångström Å”, MAÇÃO SÃO PAULO, ¿Qué? ¡Olé!",
        "涓涓细流，濂溪先生，體系 國家",
        "Привет, как дела? نص عربي 日本語のテキスト 한국어 👨‍👩‍👧",
        "Việt Nam Đà Nẵng, İstanbul ğış",
        "水很烫烫手，屯里人",
        "°°°° ÀÀÀÀ",
        "the signs ñ¿¡Ñ of Spanish",
    ],
)
def test_healthy_texts_are_left_alone(text: str) -> None:
    assert find_mojibake(text) is None


def test_no_real_text_is_reported(real_texts: list[str]) -> None:
    assert [text for text in real_texts if find_mojibake(text)] == []


def test_nearly_every_broken_real_text_is_reported(
    real_rows: dict[str, list[dict[str, str]]],
) -> None:
    answers = [row["output"] for row in real_rows["instruction"]]
    for written, read in (("utf-8", "gb18030"), ("utf-8", "cp1252"), ("gbk", "latin-1")):
        broken = [
            answer.encode(written, errors="ignore").decode(read, errors="ignore")
            for answer in answers
        ]
        missed = sum(find_mojibake(text) is None for text in broken)
        assert missed <= 0.01 * len(broken), (written, read, missed)
