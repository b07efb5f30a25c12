"""The space of a sweep: what is refused before anything runs, and the recipes of trials."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.config.load import load_recipe, recipe_from
from tunesmith.config.sweep import SweepConfig
from tunesmith.errors import RecipeError
from tunesmith.sweep.space import best_recipe, check_space, points, trial_recipe

SPACE = """\
model: some/model
data: {path: rows.jsonl, validation: 0.2}
method: {name: lora, dropout: 0.1}
sweep:
  space:
    train.learning_rate: {low: 1e-5, high: 1e-3, log: true}
    method.rank: [8, 16]
"""


def write(folder: Path, text: str = SPACE) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def refused(folder: Path, old: str, new: str) -> str:
    assert old in SPACE
    file = write(folder, SPACE.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        check_space(load_recipe(file), file)
    return str(caught.value)


def test_a_good_space_passes(tmp_path: Path) -> None:
    file = write(tmp_path)
    check_space(load_recipe(file), file)


def test_an_unknown_key_has_its_line_and_the_nearest(tmp_path: Path) -> None:
    text = refused(tmp_path, "train.learning_rate", "train.learning_rat")
    assert "recipe.yaml:6: recipe.unknown-key" in text
    assert "did you mean `learning_rate`" in text


def test_a_wrong_value_has_its_line(tmp_path: Path) -> None:
    text = refused(tmp_path, "[8, 16]", "[8, many]")
    assert "recipe.yaml:7: recipe.bad-value: found 'many'" in text


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("low: 1e-5", "lo: 1e-5", "recipe.unknown-key"),
        ("low: 1e-5", "low: 1", "`low` below `high`"),
        ("low: 1e-5", "low: 0", "`low` above 0"),
        ("[8, 16]", "[]", "not empty"),
        ("method.rank: [8, 16]", "output: [a, b]", "a key that trials may differ in"),
        ("validation: 0.2", "validation: 0", "rows to compare trials by"),
        ("  space:", "  sampler: grid\n  space:", "a grid has no ranges"),
    ],
)
def test_what_makes_no_sweep_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert said in refused(tmp_path, old, new)


def test_a_recipe_without_a_sweep_says_what_to_write(tmp_path: Path) -> None:
    file = write(tmp_path, SPACE.partition("sweep:")[0])
    with pytest.raises(RecipeError, match=r"sweep: \{space:"):
        check_space(load_recipe(file), file)


def test_a_trial_is_the_recipe_with_its_values_alone(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path))
    values = {"train.learning_rate": 2e-4, "method.rank": 16}
    trial = trial_recipe(loaded, values, tmp_path / "trial-000")
    method: Any = trial.recipe.method
    assert (trial.recipe.train.learning_rate, method.rank, method.dropout) == (2e-4, 16, 0.1)
    assert trial.recipe.sweep is None
    assert trial.recipe.evaluate.general is None
    assert trial.folder == loaded.folder


def test_the_best_recipe_works_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    recipe = best_recipe(load_recipe(write(tmp_path)), {"method.rank": 8}, "out-best")
    assert recipe.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert recipe.model.id == "some/model"
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True))
    assert recipe_from(yaml.safe_load(text)) == recipe


def test_a_grid_has_all_points() -> None:
    sweep = SweepConfig.model_validate({"space": {"a": [1, 2], "b": {"values": ["1e-3", "x"]}}})
    assert list(points(sweep)) == [
        {"a": 1, "b": 0.001},
        {"a": 1, "b": "x"},
        {"a": 2, "b": 0.001},
        {"a": 2, "b": "x"},
    ]
