"""What docs/metrics.md says of every metric is what the registry says."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from hand_made import predicted
from tunesmith.evaluate.metrics import METRICS, MeasureOptions, measure

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
ROWS = {
    cells[0].strip("`"): cells[1:]
    for row in TEXT.splitlines()
    if row.startswith("| `")
    for cells in [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]]
}
ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}

YES, FIX = (("yes", -0.1),), "改正\n我的爱你"
EXAMPLES = {
    "json": [predicted('{"a": 1}', '{"a": 1}')],
    "correction": [predicted("我爱你", "我爱你", prompt=FIX)],
    "classification": [predicted("yes", label, logprobs=YES) for label in ("yes", "no")],
    "code": [predicted("x = 1", "assert x")],
}


def test_every_metric_stands_there_in_order() -> None:
    assert list(ROWS) == list(METRICS)
    for name, metric in METRICS.items():
        figures = ", ".join(f"`{key}`{ARROWS[better]}" for key, better in metric.scores.items())
        assert ROWS[name][:4] == [figures, metric.says, metric.fits, metric.limits]


BY_JIEBA = ("rouge_word", "rouge_llamafactory")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in BY_JIEBA)) for name in METRICS],
)
def test_signatures_are_those_of_examples(name: str) -> None:
    if name in BY_JIEBA and importlib.util.find_spec("jieba") is None:
        pytest.skip("jieba is not installed")
    rows = EXAMPLES.get(name, [predicted("今天天气好", "今天天气很好")])
    found = measure(rows, [name], MeasureOptions(resamples=2, allows_code=True))[0].signature

    def plain(signature: str) -> str:
        return re.sub(r"[\d.]+$|-[\d.]+(?=\|)|network:\w+", "", signature.replace("\\|", "|"))

    assert plain(ROWS[name][4].strip("`")) == plain(found)


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, answer in (("base", "a dog"), ("tuned", "a black cat")):
        rows = [predicted(answer, "a black cat", prompt=str(n)).as_json() for n in range(9)]
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(code, {})
    assert "('exact_match', 0.00390625, 'better')" in capsys.readouterr().out
