from __future__ import annotations

import random
import string

import pytest

from tunesmith.data.check.near_duplicates import SIMILAR, NearDuplicates, jaccard


def filled(texts: list[str]) -> NearDuplicates:
    duplicates = NearDuplicates()
    for text in texts:
        duplicates.add(text)
    return duplicates


def random_text(rng: random.Random, length: int = 500) -> str:
    return "".join(rng.choices(string.ascii_lowercase + "   ", k=length))


def edited(text: str, rng: random.Random, times: int) -> str:
    characters = list(text)
    for _ in range(times):
        characters[rng.randrange(len(characters))] = rng.choice(string.ascii_uppercase)
    return "".join(characters)


def plain_jaccard(a: str, b: str, length: int) -> float:
    left = {a[i : i + length] for i in range(len(a) - length + 1)}
    right = {b[i : i + length] for i in range(len(b) - length + 1)}
    return len(left & right) / len(left | right)


def test_nothing_in_nothing_out() -> None:
    assert NearDuplicates().groups() == []
    assert NearDuplicates().exact_groups() == []
    assert len(NearDuplicates()) == 0


def test_identical_texts_are_exact_and_stand_in_no_near_group() -> None:
    texts = ["one text", "another one", "one text", "", "another one", "one text", ""]
    duplicates = filled(texts)
    assert duplicates.exact_groups() == [[0, 2, 5], [1, 4], [3, 6]]
    assert duplicates.groups() == []


def test_near_texts_are_grouped() -> None:
    rng = random.Random(1)
    a, b, c = (random_text(rng) for _ in range(3))
    texts = [a, b, edited(a, rng, 2), c, edited(b, rng, 2), edited(a, rng, 2), a]
    duplicates = filled(texts)
    assert duplicates.groups() == [[0, 2, 5], [1, 4]]
    assert duplicates.groups(texts.__getitem__) == [[0, 2, 5], [1, 4]]
    assert duplicates.exact_groups() == [[0, 6]]


def test_case_and_white_space_do_not_count() -> None:
    texts = ["The quick brown fox jumps over the dog", "the quick  brown\nfox jumps over the DOG "]
    assert filled(texts).groups() == [[0, 1]]
    assert filled(texts).exact_groups() == []


def test_chinese_is_compared_in_pieces_of_three() -> None:
    a = "自由贸易试验区设立了优化营商环境的试点项目，大大提高了效率，吸引了许多国际企业。"
    b = a.replace("许多", "大量")
    assert jaccard(a, b) == pytest.approx(plain_jaccard(a, b, 3))
    assert (
        filled([a, "完全不同的另外一句话，与它没有关系。", b]).groups([a, "", b].__getitem__) == []
    )
    c = a.replace("。", "！")
    assert filled([a, c]).groups([a, c].__getitem__) == [[0, 1]]


def test_jaccard_is_exact() -> None:
    rng = random.Random(2)
    for times in range(0, 40, 4):
        a = random_text(rng, 300).strip()
        a = " ".join(a.split())
        b = edited(a, rng, times).lower()
        b = " ".join(b.split())
        assert jaccard(a, b) == pytest.approx(plain_jaccard(a, b, 5))
    assert jaccard("", "") == 1.0
    assert jaccard("ab", "cd") == 0.0


def test_precision_and_recall() -> None:
    """The figures of the class's docstring, on 600 pairs of known similarity."""
    rng = random.Random(3)
    texts: list[str] = []
    for _ in range(600):
        text = random_text(rng)
        texts += [text, edited(text, rng, rng.randint(1, 18))]
    similar = [jaccard(texts[i], texts[i + 1]) for i in range(0, len(texts), 2)]
    duplicates = filled(texts)
    for groups in (duplicates.groups(), duplicates.groups(texts.__getitem__)):
        assert all(len(group) == 2 and group[0] % 2 == 0 for group in groups)
        assert all(group[1] == group[0] + 1 for group in groups)
    sketched = {group[0] // 2 for group in duplicates.groups()}
    exact = {group[0] // 2 for group in duplicates.groups(texts.__getitem__)}
    alike = {i for i, value in enumerate(similar) if value >= SIMILAR}
    assert exact <= alike
    assert len(exact) >= 0.98 * len(alike)
    clear = {i for i, value in enumerate(similar) if value >= 0.92}
    assert len(sketched & clear) >= 0.98 * len(clear)
    unlike = {i for i, value in enumerate(similar) if value < 0.75}
    assert len(sketched & unlike) <= 0.02 * len(unlike)


def test_a_long_text_is_hashed_in_slices() -> None:
    rng = random.Random(4)
    text = random_text(rng, 20_000)
    assert filled([text, edited(text, rng, 20)]).groups() == [[0, 1]]


def test_many_blocks_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.check.near_duplicates._ROWS_PER_BLOCK", 4)
    monkeypatch.setattr("tunesmith.data.check.near_duplicates._PAIRS_AT_A_TIME", 3)
    rng = random.Random(5)
    first = [random_text(rng) for _ in range(11)]
    duplicates = filled(first + [edited(text, rng, 2) for text in first])
    assert len(duplicates) == 22
    assert duplicates.groups() == [[i, i + 11] for i in range(11)]


def test_a_chain_is_one_group() -> None:
    rng = random.Random(6)
    texts = [random_text(rng)]
    for _ in range(6):
        texts.append(edited(texts[-1], rng, 2))
    order = [3, 0, 6, 1, 5, 2, 4]
    shuffled = [texts[i] for i in order]
    assert filled(shuffled).groups() == [list(range(7))]


def test_lone_surrogates_do_no_harm() -> None:
    assert filled(["a\ud800b", "a\ud800b"]).exact_groups() == [[0, 1]]
