"""BLEU, chrF, ROUGE and LLaMA-Factory's figures, equal to those of the libraries."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hand_made import predicted
from tunesmith.evaluate.metrics import MeasureOptions, measure
from tunesmith.evaluate.metrics.llamafactory import sentence_bleu
from tunesmith.evaluate.metrics.ngrams import bleu_of_sums, bleu_tokenizer, chrf_of_sums
from tunesmith.evaluate.metrics.rouge import jieba_words
from tunesmith.evaluate.prediction import Prediction
from tunesmith.evaluate.scores import Score, by_name

OPTIONS = MeasureOptions(resamples=50)

CHINESE = [
    ("今天天气很好，我们去公园玩。", "今天的天气很好，我们去了公园玩耍。"),
    ("他说：“你好吗？”", "他问：“你还好吗？”然后走了。"),
    ("共有 3.5 万人参加了 2024 年的 marathon 比赛。", "共有3.5万人参加2024年的Marathon比赛。"),
    ("是", "不是"),
    ("", "空的回答"),
    ("完全一样的句子。", "完全一样的句子。"),
    ("没有共同之处", "xyz"),
    ("……好吧……\n\n再见？ 真的吗？", "好吧……再见？ 真的？！\n\n走了"),
]
ENGLISH = [
    ("The cat sat on the mat.", "The cat is sitting on the mat."),
    ("It costs $3.50, doesn't it?", "It cost $3.50, didn't it?"),
    ("completely different words here", "nothing in common at all"),
    ("", "empty"),
    ("a b", "a b"),
    ("the the the the", "the cat the dog"),
]


def rows_of(pairs: list[tuple[str, str]]) -> list[Prediction]:
    return [predicted(answer, label) for answer, label in pairs]


def figures(pairs: list[tuple[str, str]], *names: str) -> dict[str, Score]:
    return by_name(measure(rows_of(pairs), names, OPTIONS))


@pytest.mark.parametrize(("pairs", "tokenizer"), [(CHINESE, "zh"), (ENGLISH, "13a")])
def test_bleu_and_chrf_are_sacrebleus(pairs: list[tuple[str, str]], tokenizer: str) -> None:
    import sacrebleu

    found = figures(pairs, "bleu", "chrf")
    answers, labels = [pair[0] for pair in pairs], [[pair[1] for pair in pairs]]
    bleu = sacrebleu.corpus_bleu(answers, labels, tokenize=tokenizer)
    assert found["bleu"].value == pytest.approx(bleu.score, abs=1e-10)
    assert f"tok:{tokenizer}(" in found["bleu"].signature
    chrf = sacrebleu.corpus_chrf(answers, labels)
    assert found["chrf"].value == pytest.approx(chrf.score, abs=1e-10)
    for row, (answer, label) in enumerate(pairs):
        alone = sacrebleu.sentence_bleu(answer, [label], tokenize=tokenizer)
        assert found["bleu"].rows[row] == pytest.approx(alone.score, abs=1e-10)
        alone = sacrebleu.sentence_chrf(answer, [label])
        assert found["chrf"].rows[row] == pytest.approx(alone.score, abs=1e-10)


def test_formulas_over_sums_are_sacrebleus_on_any_counts() -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    generator, chrf = np.random.default_rng(0), CHRF()
    for _ in range(300):
        totals = np.sort(generator.integers(0, 12, 4))[::-1]
        counts = [int(generator.integers(0, total + 1)) for total in totals]
        lengths = [int(totals[0]), int(generator.integers(0, 20))]
        sums = np.array([[*lengths, *counts, *totals]], dtype=float)
        expected = BLEU.compute_bleu(counts, totals.tolist(), *lengths, smooth_method="exp")
        assert bleu_of_sums(sums)[0] == pytest.approx(expected.score, abs=1e-10)
        triples = generator.integers(0, 9, (6, 2))
        both = [int(generator.integers(0, min(pair) + 1)) for pair in triples]
        stats = [int(n) for pair, same in zip(triples, both, strict=True) for n in (*pair, same)]
        expected = chrf._compute_f_score(stats)
        assert chrf_of_sums(np.array([stats], dtype=float))[0] == pytest.approx(expected, abs=1e-10)


def test_the_tokenizer_goes_by_the_labels() -> None:
    for label, expected in (("中文", "zh"), ("English", "13a"), ("ไทย", "char")):
        assert bleu_tokenizer([predicted("a", label)])[0] == expected
    assert bleu_tokenizer([predicted("a", "これは日本語です")])[0] in ("ja-mecab", "char")


def test_intervals_hold_the_value() -> None:
    for score in figures(CHINESE * 5, "bleu", "chrf", "rouge").values():
        assert score.low is not None and score.high is not None
        assert score.low < score.value < score.high


def test_rouge_of_chinese_is_not_zero() -> None:
    found = figures([("今天天气很好", "今天的天气很好")], "rouge")
    assert found["rouge_1"].value == pytest.approx(100 * 2 * 6 / 13)
    assert found["rouge_2"].value == pytest.approx(100 * 2 * 4 / 11)
    assert found["rouge_l"].value == pytest.approx(100 * 2 * 6 / 13)
    assert "tok:char(zh)" in found["rouge_l"].signature
    assert "tok:word" in figures(ENGLISH, "rouge")["rouge_l"].signature


def test_the_sentence_bleu_by_hand() -> None:
    # 1-grams 2 of 2, 2-grams 1 of 1, none longer: 1/2 and 1/4 of one each; shortness e^(1 - 3/2).
    expected = np.exp(-0.5) * (1 * 1 * 0.5 * 0.25) ** 0.25
    assert sentence_bleu("ab", "abc") == pytest.approx(expected)
    assert sentence_bleu("x", "abc") == 0.0 == sentence_bleu("", "abc")


# Against the libraries


def many(alphabet: str, count: int) -> list[tuple[str, str]]:
    chooser = random.Random(0)
    return [
        tuple("".join(chooser.choices(alphabet, k=chooser.randrange(1, 60))) for _ in "ab")
        for _ in range(count)
    ]  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rouge_is_rouge_scores_on_english() -> None:
    scorer_module = pytest.importorskip("rouge_score.rouge_scorer")
    pairs = ENGLISH + many("ab cd ef, 12. ", 60)
    scorer = scorer_module.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    found = figures(pairs, "rouge")
    for row, (answer, label) in enumerate(pairs):
        expected = scorer.score(label, answer)
        for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
            value = 100 * expected[theirs].fmeasure
            assert found[ours].rows[row] == pytest.approx(value, abs=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_llamafactorys_figures_are_those_of_its_libraries() -> None:
    """As its metric.py has it: nltk over characters, rouge-chinese over jieba's words."""
    rouge_chinese = pytest.importorskip("rouge_chinese")
    bleu_module = pytest.importorskip("nltk.translate.bleu_score")
    jieba = pytest.importorskip("jieba")
    pairs = [(a, b) for a, b in CHINESE + ENGLISH if a and b] + many("今天。？”…好 ab\n", 80)
    pairs = [(a, b) for a, b in pairs if a.strip() and b.strip()]
    names = ("bleu4_llamafactory", "rouge_llamafactory")
    found = figures(pairs, *names)
    smoothing = bleu_module.SmoothingFunction().method3
    for row, (answer, label) in enumerate(pairs):
        bleu = bleu_module.sentence_bleu([list(label)], list(answer), smoothing_function=smoothing)
        assert found["bleu4_llamafactory"].rows[row] == round(bleu * 100, 4)
        texts = (" ".join(jieba.cut(answer)), " ".join(jieba.cut(label)))
        expected = rouge_chinese.Rouge().get_scores(*texts)[0]
        for ours, theirs in (("rouge1", "rouge-1"), ("rouge2", "rouge-2"), ("rougel", "rouge-l")):
            value = round(expected[theirs]["f"] * 100, 4)
            assert found[f"{ours}_llamafactory"].rows[row] == pytest.approx(value, abs=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rouge_by_words_and_characters_is_rouge_chineses() -> None:
    """Its ROUGE-L counts as ours does; its 1 and 2 do with `exclusive=False`."""
    rouge_chinese = pytest.importorskip("rouge_chinese")
    cut = jieba_words()
    pairs = [("今天天气很好，我们去公园玩", "今天的天气很好，我们去公园玩了"), ("很很好", "好很好")]
    found = figures(pairs, "rouge", "rouge_word")
    counting = rouge_chinese.Rouge(exclusive=False)
    for row, pair in enumerate(pairs):
        for prefix, tokens in (("rouge", list), ("rouge_word", cut)):
            expected = counting.get_scores(*(" ".join(tokens(text)) for text in pair))[0]
            for order in "12l":
                value = 100 * expected[f"rouge-{order}"]["f"]
                assert found[f"{prefix}_{order}"].rows[row] == pytest.approx(value, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "tokenizer"), [(CHINESE, "zh"), (ENGLISH, "13a")])
def test_bleu_is_what_sacrebleus_command_prints(
    tmp_path: Path, pairs: list[tuple[str, str]], tokenizer: str
) -> None:
    flat = [tuple(" ".join(text.split()) for text in pair) for pair in pairs]
    for name, side in (("answers", 0), ("labels", 1)):
        text = "".join(f"{pair[side]}\n" for pair in flat)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = figures(flat, "bleu", "chrf")  # type: ignore[arg-type]
    for metric, options in (("bleu", ["-tok", tokenizer]), ("chrf", [])):
        command = [sys.executable, "-m", "sacrebleu", "labels", "-i", "answers", "-m", metric]
        printed = subprocess.run(
            [*command, *options, "-b", "-w", "8"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert printed.strip() == f"{found[metric].value:.8f}"
