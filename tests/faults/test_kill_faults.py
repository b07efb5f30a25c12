"""SIGKILL, anywhere: the same command goes on to the same bits. Tolerance zero."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.runs import KILLED, Place, count_points, train_to_the_end
from tunesmith.io.fault import POINTS

pytestmark = pytest.mark.slow

NUM_STEPS = 20


def kill_and_go_on(place: Place, fault: str, oracle: Place) -> None:
    """Plants a kill, starts again, and compares with the uninterrupted run."""
    assert place.train(fault=fault) == KILLED, place.printed[-3000:]
    assert not (place.output / "summary.json").exists()
    train_to_the_end(place)
    assert place.final_bytes() == oracle.final_bytes()
    assert place.losses == oracle.losses


@pytest.mark.parametrize(
    "step", [pytest.param(k, marks=[] if k in (1, 8, 19) else pytest.mark.whole) for k in range(20)]
)
def test_row_01_sigkill_between_steps(place: Place, oracle: Place, step: int) -> None:
    """SIGKILL before step k: resumed weights and optimizer are equal, tolerance 0."""
    kill_and_go_on(place, f"step.micro:step={step}:kill", oracle)


@pytest.mark.parametrize("step", [6, pytest.param(11, marks=pytest.mark.whole)])
def test_row_02_sigkill_in_a_later_epoch(place: Place, oracle: Place, step: int) -> None:
    """SIGKILL in epochs 2 and 3 (4 steps each): no row is lost or doubled."""
    hits = place.output.parent / "samples"
    kill_and_go_on(place, f"step.update:step={step}:kill", oracle)
    assert not hits.exists()
    # Every step has the loss of the uninterrupted run to the last bit, so it had the same rows.
    assert sorted(place.losses) == list(range(1, NUM_STEPS + 1))


def test_row_03_random_numbers_in_the_middle_of_an_epoch(place: Place, oracle: Place) -> None:
    """Dropout (0.1) draws the same numbers again: they come from (seed, step), not from a state."""
    assert json.loads(oracle.recipe.read_text())["method"]["dropout"] > 0
    kill_and_go_on(place, "step.update:step=9:kill", oracle)


@pytest.mark.parametrize("micro", [2, pytest.param(3, marks=pytest.mark.whole)])
def test_row_04_sigkill_in_the_middle_of_an_accumulation(
    place: Place, oracle: Place, micro: int
) -> None:
    """SIGKILL at a later micro-batch of a step: the step is replayed from its start."""
    kill_and_go_on(place, f"step.backward:{3 * 7 + micro}:kill", oracle)


def test_row_05_batches_made_ahead_do_not_matter(
    make_place: Callable[..., Place], oracle: Place, tmp_path: Path
) -> None:
    """There are no data workers: one thread makes batches ahead, each a function of its step.

    Killed while it is two steps ahead, or slowed down so that it is never ahead: equal.
    """
    ahead = make_place(tmp_path / "ahead")
    kill_and_go_on(ahead, "data.next:step=9:kill", oracle)
    behind = make_place(tmp_path / "behind")
    assert behind.train(fault="data.next:*:sleep:0.02") == 0
    assert behind.final_bytes() == oracle.final_bytes()


def test_row_10_sigkill_with_packing(place: Place, oracle: Place) -> None:
    """Packs of several samples are made anew from (seed, step): the same tokens and rows."""
    several = [e["tokens"] for e in oracle.events_of("step")]
    assert max(several) > 128  # more than one pack a step
    kill_and_go_on(place, "data.next:step=13:kill", oracle)


def points_of_a_save(make_place: Callable[..., Place], folder: Path) -> Counter[str]:
    clean = make_place(folder)
    hits = folder / "hits"
    assert clean.train(TUNESMITH_FAULT_HITS=str(hits)) == 0
    return count_points(hits)


def test_every_point_is_passed_in_a_plain_run(
    make_place: Callable[..., Place], tmp_path: Path
) -> None:
    """A hook that was moved away cannot silently disarm a row: all are passed, but downloads and
    sampling, which test_objective_faults.py counts."""
    place = make_place(tmp_path)
    hits = tmp_path / "hits"
    assert place.train(TUNESMITH_FAULT_HITS=str(hits), fault="step.update:step=9:kill") == KILLED
    assert place.train(TUNESMITH_FAULT_HITS=str(hits)) == 0
    elsewhere = {"net.read", "sample.token", "sample.judge", "sample.look", "predict.row"}
    assert set(POINTS) - set(count_points(hits)) == elsewhere


SAVE_POINTS = ("save.open", "save.write", "save.fsync", "save.rename", "save.rotate")


def sampled_saves() -> list[tuple[str, int]]:
    """Five passings of points of saves; the whole matrix takes every one."""
    chosen = random.Random(5)
    return [(point, chosen.randint(1, 25)) for point in SAVE_POINTS]


@pytest.mark.parametrize(("point", "count"), sampled_saves())
def test_row_16_sigkill_in_a_save(place: Place, oracle: Place, point: str, count: int) -> None:
    """SIGKILL at a write, sync, rename or removal: an earlier checkpoint loads, temporaries go."""
    code = place.train(fault=f"{point}:{count}:kill")
    assert code in (KILLED, 0)  # a run passes some points less often
    train_to_the_end(place)
    assert place.final_bytes() == oracle.final_bytes()
    assert not list(place.output.rglob(".tmp-*"))


@pytest.mark.whole
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_row_16_sigkill_at_every_point_of_every_save(
    make_place: Callable[..., Place], oracle: Place, tmp_path: Path, point: str
) -> None:
    """SIGKILL at each passing of each point of all saves of a run."""
    count = points_of_a_save(make_place, tmp_path / "clean")[point]
    assert count >= 5
    for number in range(1, count + 1):
        place = make_place(tmp_path / str(number))
        code = place.train(fault=f"{point}:{number}:kill")
        assert code in (KILLED, 0), place.printed[-3000:]
        train_to_the_end(place)
        assert place.final_bytes() == oracle.final_bytes(), (point, number)
        assert not list(place.output.rglob(".tmp-*")), (point, number)


def test_row_24_sigkill_in_a_rotation(place: Place, oracle: Place) -> None:
    """SIGKILL while an old checkpoint is removed: the half-removed one is never chosen."""
    kill_and_go_on(place, "save.rotate:2:kill", oracle)
