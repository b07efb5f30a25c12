"""Studies that go on where they stopped, and what is made of their trials."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.load import recipe_with
from tunesmith.config.sweep import SweepConfig
from tunesmith.errors import RunError
from tunesmith.sweep.results import write_outcome
from tunesmith.sweep.study import Study

pytest.importorskip("optuna")

SPACE: dict[str, Any] = {
    "train.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
    "method.rank": {"low": 4, "high": 64, "log": True},
    "train.schedule": ["cosine", "linear"],
}


def config(**changes: Any) -> SweepConfig:
    return SweepConfig.model_validate({"space": SPACE, "trials": 6, **changes})


def run(study: Study, most: int) -> list[dict[str, Any]]:
    """Asks and answers; the loss is best at a rate of 1e-4."""
    for _ in range(most):
        number = study.ask()
        if number is None:
            break
        rate: Any = study.values_of(study.frozen(number))["train.learning_rate"]
        study.finish(number, "COMPLETE", abs(rate - 1e-4), seconds=1.0, steps=3)
    return [study.values_of(trial) for trial in study.trials]


def test_a_study_that_goes_on_asks_what_it_would_have_asked(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(Study(tmp_path / "a", config()), 6)
    run(Study(tmp_path / "b", config()), 2)
    assert run(Study(tmp_path / "b", config()), 9) == whole
    assert len(whole) == 6
    assert all(isinstance(values["method.rank"], int) for values in whole)


def test_an_unfinished_trial_is_known_again(tmp_path: Path) -> None:
    number = Study(tmp_path, config()).ask()
    again = Study(tmp_path, config())
    assert number is not None
    assert again.unfinished() == [number]
    again.begin(number)
    again.trial(number).report(0.5, 1)
    again.finish(number, "PRUNED", 0.5)
    assert again.unfinished() == []
    assert again.best() is None


def test_a_grid_asks_for_each_point_once(tmp_path: Path) -> None:
    space = {"method.rank": [8, 16], "train.schedule": ["cosine", "linear"]}
    study = Study(tmp_path, config(space=space, sampler="grid", trials=99))
    given: list[dict[str, Any]] = []
    while (number := study.ask()) is not None:
        given.append(study.values_of(study.frozen(number)))
    assert len(given) == 4
    assert given[1] == {"method.rank": 8, "train.schedule": "linear"}


def test_asha_prunes_what_is_not_among_the_best_third(tmp_path: Path) -> None:
    study = Study(tmp_path, config())
    pruned = []
    for loss in (1.0, 2.0, 3.0, 0.5):
        number = study.ask()
        assert number is not None
        trial = study.trial(number)
        trial.report(loss, 1)
        pruned.append(trial.should_prune())
    assert pruned == [False, True, True, False]


def test_the_outcome_is_written(tmp_path: Path) -> None:
    tree = {"model": "some/model", "data": "rows.jsonl", "sweep": {"space": SPACE, "trials": 6}}
    loaded = recipe_with(tree, [])
    study = Study(tmp_path, config())
    run(study, 5)
    number = study.ask()
    assert number is not None
    study.finish(number, "FAIL", None, why="out of memory")
    outcome = write_outcome(loaded, study)
    assert outcome.rows[0].number == outcome.best
    assert outcome.rows[-1].why == "out of memory"
    assert set(outcome.importances) == set(SPACE)
    assert (tmp_path / "sweep.png").read_bytes()[1:4] == b"PNG"
    assert json.loads((tmp_path / "trials.json").read_text())["best"] == outcome.best
    assert "learning_rate" in (tmp_path / "best.yaml").read_text()


def test_trials_that_all_fail_are_an_error(tmp_path: Path) -> None:
    loaded = recipe_with({"model": "m", "data": "d", "sweep": {"space": SPACE}}, [])
    study = Study(tmp_path, config())
    number = study.ask()
    assert number is not None
    study.finish(number, "FAIL", None, why="no such thing")
    with pytest.raises(RunError, match="no such thing"):
        write_outcome(loaded, study)
