"""Charts: what is drawn is where it belongs, whatever the values."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from report_runs import evaluations, falling, steps, write_run
from tunesmith.evaluate.report.charts import (
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    Axis,
    Chart,
    Drawing,
    Mark,
    Series,
    draw,
    round_step,
    smoothed,
    thinned,
    y_axis,
)
from tunesmith.evaluate.report.curves import curves_of
from tunesmith.evaluate.report.reading import read_run


def drawn(*points: tuple[float, float], **more: object) -> Drawing:
    found = draw(Chart("t", (Series("s", points),), **more))  # type: ignore[arg-type]
    assert found is not None
    return found


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]


def test_a_line_goes_through_its_points() -> None:
    drawing = drawn((0, 1.0), (5, 3.0), (10, 2.0))
    (x0, y0), (x1, y1), (x2, y2) = places(drawing.lines[0].path)
    assert (x0, x1, x2) == (0, WIDTH / 2, WIDTH)
    assert y1 < y2 < y0 < HEIGHT and y1 > 0
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_ticks_are_round_and_stand_where_they_say() -> None:
    drawing = drawn((0, 0.0), (60, 0.48))
    assert [tick.text for tick in drawing.x_ticks] == ["0", "10", "20", "30", "40", "50", "60"]
    assert [tick.at for tick in drawing.x_ticks][:2] == [0, pytest.approx(100 / 6)]
    assert [tick.text for tick in drawing.y_ticks] == ["0.0", "0.2", "0.4"]
    small = drawn((0, 1e-5), (9, 3e-5))
    assert small.y_ticks[-1].text == "3e-5"


@pytest.mark.parametrize(
    "points",
    [
        ((3, 2.0),),
        ((0, 0.0), (1, 0.0)),
        ((0, -5.0), (1, -5.0)),
        ((0, 0.1), (1, 0.1 + 1e-17)),
        ((0, 0.1), (1, 0.10000000000000002)),
        ((0, 1e-30), (1, 1e30)),
        ((0, -1e9), (1, 1e9)),
        ((7, 0.1), (7, 0.2)),
    ],
)
def test_odd_values_are_drawn(points: tuple[tuple[float, float], ...]) -> None:
    drawing = drawn(*points)
    for x, y in places(drawing.lines[0].path):
        assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT
    assert all(0 <= tick.at <= 100 for tick in (*drawing.x_ticks, *drawing.y_ticks))
    assert json.loads(drawing.data)["series"]


def test_nothing_is_no_chart() -> None:
    assert draw(Chart("t", (Series("s", ()),))) is None


def test_a_single_point_is_a_dot() -> None:
    assert drawn((3, 2.0)).lines[0].dots


def test_a_spike_makes_the_axis_logarithmic() -> None:
    assert y_axis([0.1, 0.12, 0.11, 90.0]).is_log
    assert not y_axis([0.1, 0.12, 0.11, 0.9]).is_log
    assert not y_axis([-0.1, 0.12, 0.11, 90.0]).is_log
    axis = Axis(0.01, 100, is_log=True)
    assert axis.share(1.0) == pytest.approx(0.5)
    assert {0.01, 1.0, 100.0} & set(axis.ticks(4))


def test_thinning_keeps_spikes_and_ends() -> None:
    points = [(float(n), 1.0) for n in range(50_000)]
    points[31_234] = (31_234.0, 99.0)
    points[777] = (777.0, -99.0)
    thin = thinned(points)
    assert len(thin) <= MOST_POINTS
    assert {points[0], points[-1], points[31_234], points[777]} <= set(thin)
    assert thin == sorted(thin)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_smoothing_follows_a_level() -> None:
    flat = smoothed([(float(n), 2.0) for n in range(90)])
    assert all(y == pytest.approx(2.0) for _, y in flat)
    noisy = smoothed([(float(n), 2.0 + math.sin(n * 9.7)) for n in range(900)])
    assert max(abs(y - 2.0) for _, y in noisy[100:]) < 0.3


def test_round_steps() -> None:
    assert [round_step(v) for v in (0.011, 0.02, 3.0, 60.0)] == [0.02, 0.02, 5.0, 100.0]
    assert round_step(0) == round_step(math.inf) == 1.0


def test_marks_stand_at_their_steps() -> None:
    drawing = drawn(
        (0, 1.0), (10, 2.0), marks=(Mark(5, "resume"), Mark(5, "skip"), Mark(8, "skip"))
    )
    assert dict(drawing.marks)["resume"] == "M500.0 400V0"
    assert dict(drawing.marks)["skip"] == "M500.0 400V380M800.0 400V380"


@pytest.mark.parametrize(
    ("figures", "titles"),
    [
        ({}, ["Loss"]),
        ({"reward": 0.5, "answer_tokens": 9.0}, ["Mean reward"]),
        ({"reward_accuracy": 0.5, "reward_margin": 1.0}, ["Accuracy of rewards", "Loss"]),
        ({"accuracy": 0.5, "macro_f1": 0.4}, ["Accuracy", "Macro F1", "Loss"]),
        (
            {"general_loss": 2.0, "general_kl": 0.1},
            ["Loss", "Forgetting: loss on general text", "Forgetting: KL from the base model"],
        ),
    ],
)
def test_every_kind_of_run_has_its_curves(
    figures: dict[str, float], titles: list[str], tmp_path: Path
) -> None:
    events = [*steps(falling(20), **figures), *evaluations({0: 1.0, 20: 0.4}, **figures)]
    curves = curves_of(read_run(write_run(tmp_path / "run", events)))
    assert [each.chart.title for each in curves.large] == titles
    small = [each.chart.title for each in curves.small]
    assert small == ["Learning rate", "Gradient norm", "Tokens per second"]
    assert ("Tokens of an answer" in [d.chart.title for d in curves.more]) == ("reward" in figures)
    best = curves.large[0].best
    assert best is not None and best[2].startswith("best")
    assert "training from" in curves.large[0].chart.about
