from __future__ import annotations

import pytest

from tunesmith.data.check.truncation import looks_truncated

ENGLISH = (
    "The water cycle has four stages. First the sun heats the sea and water rises as vapor. "
    "Then it cools and forms clouds. "
)
CHINESE = (
    "水循环有四个阶段。首先太阳加热海水，水变成水蒸气上升。"
    "然后水蒸气冷却，形成了云。接着雨水落到地面。"
)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (ENGLISH + "After that, the rain falls,", 'ends with ","'),
        (CHINESE + "最后，雨水流入河流、", 'ends with "、"'),
        (ENGLISH + "After that, the rain falls on the", 'the joining word "the"'),
        (CHINESE + "最后雨水流入河流以及", 'the joining word "以及"'),
        (ENGLISH + "After that the rain falls on the ground and some of it runs do", "has no end"),
        (CHINESE + "最后雨水流入河流和湖泊并且汇入大海而后又一次被太阳加", "has no end"),
        (ENGLISH + "And so it goes on...", "ellipsis"),
        (CHINESE + "如此循环……", "ellipsis"),
        (ENGLISH + "The last stage (called collection, is slow.", '"(" is not closed'),
        (CHINESE + "古人说：“水往低处流。", '"“" is not closed'),
        ("第一章就这样结束了。未完待续", "未完待续"),
        ("The end of part one. (To be continued)", "To be continued"),
        ("A short text.\n[truncated]", "truncated"),
        ('{"name": "Ada", "tags": ["a", "b"', "JSON ends with 2 open brackets"),
        ('[{"a": "x}]\\"', "JSON ends with 2 open brackets"),
        ("Use this:\n```python\nprint(1)\n", "code fence"),
        (
            "Steps to take:\n1. Wash the rice well.\n2. Boil it for ten minutes.\n"
            "3. Drain the rice, put it back into the pot and let it stand for som",
            "has no end",
        ),
    ],
)
def test_cut_answers_are_found(answer: str, reason: str) -> None:
    found = looks_truncated(answer)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "positive",
        "42",
        "Paris, London, Rome",
        "Hello, how are you",
        "Wait...",
        ENGLISH,
        CHINESE,
        ENGLISH + '"It rains."',
        CHINESE + "（完）",
        '{"name": "Ada"}',
        '{"name": "A{d[a"} and more',
        "[Your name]",
        "```python\nprint(1)\n```",
        ENGLISH + "The stages are:\n- evaporation\n- condensation\n- rain",
        ENGLISH + "\n| stage | heat |\n|---|---|\n| rain | none |",
        ENGLISH + "See https://example.com/water/cycle/of/the/earth/in/many/words/and/pictures",
        ENGLISH + "The formula for it is energy = mass times the square of the speed of light",
        ENGLISH + "I love this planet so much that I could write about it all day long #water",
        ENGLISH + "Sincerely,\nAda Lovelace",
        CHINESE + "书名是“水循环“，值得一读。",
        "The meeting was continued.",
        "Roses are red and violets are blue and the long line has no end in it\n" * 4,
    ],
)
def test_whole_answers_are_left_alone(answer: str) -> None:
    assert looks_truncated(answer) is None


def test_few_real_answers_are_reported(real_rows: dict[str, list[dict[str, str]]]) -> None:
    """Most of those reported are indeed cut: "... its memory serves as a reminder of the
    importance of", "...并在202"."""
    for name, rows in real_rows.items():
        hits = sum(looks_truncated(row["output"]) is not None for row in rows)
        assert hits <= 0.01 * len(rows), name


def test_half_of_the_long_answers_cut_at_any_place_are_reported(
    real_rows: dict[str, list[dict[str, str]]],
) -> None:
    for name, share in (("alpaca_en_demo", 0.6), ("alpaca_zh_demo", 0.45)):
        long = [row["output"] for row in real_rows[name] if len(row["output"]) > 200]
        hits = sum(looks_truncated(answer[: len(answer) * 7 // 10]) is not None for answer in long)
        assert hits >= share * len(long), (name, hits / len(long))
