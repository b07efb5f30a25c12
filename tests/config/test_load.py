"""Recipes: what is read, and what a mistake says about its key, place and nearest name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.load import (
    LoadedRecipe,
    changed_keys,
    dump_recipe,
    flatten,
    load_recipe,
    merge_recipes,
    recipe_from,
)
from tunesmith.config.recipe import FullConfig, LoraConfig, Recipe
from tunesmith.errors import RecipeError

SHORT = "model: m\ndata: d.jsonl\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(text: str | bytes, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return make


@pytest.fixture
def load(write: Callable[..., Path]) -> Callable[..., Recipe]:
    def make(text: str, *overrides: str) -> Recipe:
        return load_recipe(write(text), overrides).recipe

    return make


@pytest.fixture
def refusal(write: Callable[..., Path]) -> Callable[..., RecipeError]:
    """The error of a recipe, its place without the folder."""

    def make(text: str | bytes, *overrides: str) -> RecipeError:
        path = write(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides)
        error = caught.value
        error.where = error.where.removeprefix(f"{path.parent}/")
        return error

    return make


# What is read


def test_short_forms(load: Callable[..., Recipe]) -> None:
    recipe = load(SHORT + "method: full\nobjective: sft\n")
    assert recipe.model.id == "m"
    assert [source.path for source in recipe.data.train] == ["d.jsonl"]
    assert isinstance(recipe.method, FullConfig)
    assert recipe == recipe_from(
        {
            "model": {"id": "m"},
            "data": {"train": [{"path": "d.jsonl"}]},
            "method": {"name": "full"},
            "objective": {"name": "sft"},
            "output": "runs/mine",
        }
    )


@pytest.mark.parametrize(
    ("data", "paths"),
    [
        ("a.json", ["a.json"]),
        ("[a.json, b.json]", ["a.json", "b.json"]),
        ("{path: a.json, limit: 3}", ["a.json"]),
        ("{train: a.json}", ["a.json"]),
        ("{train: [a.json, {path: b.json}]}", ["a.json", "b.json"]),
        ("{train: {path: a.json}}", ["a.json"]),
    ],
)
def test_forms_of_data(load: Callable[..., Recipe], data: str, paths: list[str]) -> None:
    recipe = load(f"model: m\ndata: {data}\n")
    assert [source.path for source in recipe.data.train] == paths


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("0.2", 0.2), ("20", 20), ("0", 0), ("v.json", "v.json")],
)
def test_forms_of_validation(load: Callable[..., Recipe], text: str, value: Any) -> None:
    found = load(f"model: m\ndata: {{train: d, validation: {text}}}").data.validation
    if value == "v.json":
        assert isinstance(found, list)
        assert [source.path for source in found] == ["v.json"]
    else:
        assert found == value
        assert type(found) is type(value)


def test_the_defaults(load: Callable[..., Recipe]) -> None:
    recipe = load(SHORT)
    assert isinstance(recipe.method, LoraConfig)
    assert (recipe.train.epochs, recipe.train.learning_rate) == ("auto", "auto")
    assert (recipe.train.seed, recipe.checkpoint.keep) == (0, 2)


def test_output_is_named_after_the_recipe(write: Callable[..., Path]) -> None:
    assert load_recipe(write(SHORT, "poems.yaml")).recipe.output == str(Path("runs/poems"))
    assert load_recipe(write(SHORT + "output: there\n")).recipe.output == "there"


def test_a_byte_order_mark_is_no_harm(load: Callable[..., Recipe]) -> None:
    assert load("\ufeff" + SHORT).model.id == "m"


def test_numbers_that_yaml_reads_as_text(load: Callable[..., Recipe]) -> None:
    recipe = load(SHORT + "train: {learning_rate: 1e-4, warmup: 1e2}\n")
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.warmup == 100.0


def test_paths_are_found_beside_the_recipe(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    loaded = load_recipe(write(SHORT))
    assert loaded.locate("d.jsonl") == Path("d.jsonl")
    write("{}", "d.jsonl")
    assert loaded.locate("d.jsonl") == tmp_path.resolve() / "d.jsonl"
    assert loaded.locate("/else/d.jsonl") == Path("/else/d.jsonl")
    assert (loaded.name, loaded.folder) == ("mine", tmp_path.resolve())
    monkeypatch.setenv("HOME", str(elsewhere))
    assert loaded.locate("~/x") == elsewhere / "x"


def test_a_recipe_is_frozen(load: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(SHORT).train.seed = 1  # type: ignore[misc]


# Unknown keys


@pytest.mark.parametrize(
    ("text", "key", "line", "near"),
    [
        ("train: {epoch: 3}\n", "train.epoch", 3, "epochs"),
        ("train:\n  epochs: 1\n\n  learning_rat: 1\n", "train.learning_rat", 6, "learning_rate"),
        ("trian:\n  epochs: 1\n", "trian", 3, "train"),
        ("method: {name: lora, rnk: 4}\n", "method.rnk", 3, "rank"),
        ("evaluate:\n  evry: 3\n", "evaluate.evry", 4, "every"),
        ("lr: 1\n", "lr", 3, "train.learning_rate"),
        ("train: {num_train_epochs: 1}\n", "train.num_train_epochs", 3, "train.epochs"),
        ("lora_rank: 8\n", "lora_rank", 3, "method.rank"),
        ("output_dir: x\n", "output_dir", 3, "output"),
    ],
)
def test_unknown_key(
    refusal: Callable[..., RecipeError], text: str, key: str, line: int, near: str
) -> None:
    error = refusal(SHORT + text)
    assert error.code == "recipe.unknown-key"
    assert error.where == f"mine.yaml:{line}"
    assert error.found == f"the key `{key}`"
    assert error.try_ == f"did you mean `{near}`?"


def test_unknown_key_in_a_source(refusal: Callable[..., RecipeError]) -> None:
    error = refusal("model: m\ndata:\n  train:\n    - path: a\n    - path: b\n      fromat: x\n")
    assert (error.code, error.where) == ("recipe.unknown-key", "mine.yaml:6")
    assert error.found == "the key `data.train.1.fromat`"
    assert error.try_ == "did you mean `format`?"


def test_unknown_key_with_nothing_near(refusal: Callable[..., RecipeError]) -> None:
    error = refusal(SHORT + "log: {zzz: 1}\n")
    assert error.try_ is None
    assert error.expected == "one of every_steps, trackers"


def test_an_unknown_key_goes_before_other_mistakes(refusal: Callable[..., RecipeError]) -> None:
    error = refusal(SHORT + "train:\n  epochs: -1\n  seed: x\n  sead: 1\n")
    assert error.found == "the key `train.sead`"


def test_keys_of_full_and_lora_stay_apart(refusal: Callable[..., RecipeError]) -> None:
    error = refusal(SHORT + "method:\n  name: full\n  rank: 8\n")
    assert error.code == "recipe.unknown-key"
    assert error.where == "mine.yaml:5"
    assert error.found == "the key `method.rank`"


# Missing keys and bad values


@pytest.mark.parametrize(
    ("text", "key", "where"),
    [
        ("model: m\n", "data", "mine.yaml"),
        ("data: d\n", "model", "mine.yaml"),
        ("model: {dtype: auto}\ndata: d\n", "model.id", "mine.yaml:1"),
        ("model: m\ndata:\n - limit: 1\n", "data.train.0.path", "mine.yaml:2"),
    ],
)
def test_missing_key(refusal: Callable[..., RecipeError], text: str, key: str, where: str) -> None:
    error = refusal(text)
    assert error.code == "recipe.missing-key"
    assert error.where == where
    assert error.found == f"no `{key}`"
    assert key in error.expected


@pytest.mark.parametrize(
    ("text", "line", "found", "expected"),
    [
        ("train: {epochs: 0}", 3, "0 for `train.epochs`", "'auto' or greater than or equal to 1"),
        ("train: {epochs: 1.5}", 3, "1.5 for `train.epochs`", "'auto' or"),
        ("train:\n  learning_rate: -1", 4, "-1 for `train.learning_rate`", "greater than 0"),
        ("train: {learning_rate: .inf}", 3, "inf for", "finite number"),
        ("train: {learning_rate: fast}", 3, "'fast' for `train.learning_rate`", "'auto' or"),
        ("train: {schedule: cosin}", 3, "'cosin' for `train.schedule`", "'cosine', 'linear'"),
        ("train: {warmup: -0.1}", 3, "-0.1 for `train.warmup`", "greater than or equal to 0"),
        ("train: 3", 3, "3 for `train`", "dictionary"),
        ("method: {name: lora, dropout: 1}", 3, "1 for `method.dropout`", "less than 1"),
        ("method: {name: lora, rank: 0}", 3, "0 for `method.rank`", "'auto' or"),
        ("evaluate: {every: batch}", 3, "'batch' for `evaluate.every`", "'epoch' or"),
        ("checkpoint: {keep: 0}", 3, "0 for `checkpoint.keep`", "greater than or equal to 1"),
        ("method: dore", 3, "'dore' for `method`", "'full' or 'lora'"),
        ("objective: dop", 3, "'dop' for `objective`", "'sft'"),
    ],
)
def test_bad_value(
    refusal: Callable[..., RecipeError], text: str, line: int, found: str, expected: str
) -> None:
    error = refusal(SHORT + text + "\n")
    assert error.code == "recipe.bad-value"
    assert error.where == f"mine.yaml:{line}"
    assert found in error.found
    assert expected in error.expected


@pytest.mark.parametrize("value", ["1.5", "-1", "-0.5"])
def test_bad_validation(refusal: Callable[..., RecipeError], value: str) -> None:
    error = refusal(f"model: m\ndata:\n  train: d\n  validation: {value}\n")
    assert (error.code, error.where) == ("recipe.bad-value", "mine.yaml:4")
    assert f"{value} for `data.validation`" in error.found


@pytest.mark.parametrize(
    "data",
    [
        "{train: []}",
        "{template: plain}",
        "{names: [a], train: d}",
        "{registry: r.json}",
        "{path: a, train: b}",
    ],
)
def test_no_training_files(refusal: Callable[..., RecipeError], data: str) -> None:
    error = refusal(f"model: m\ndata: {data}\n")
    assert (error.code, error.where) == ("recipe.bad-value", "mine.yaml:2")
    assert "`data`" in error.found
    assert "registry" in error.expected or "not both" in error.expected


@pytest.mark.parametrize(
    "data",
    [
        "{train: d, validation: [{path: v, weight: 2}]}",
        "{train: d, replay: {path: general.jsonl, count: 10}}",
    ],
)
def test_weights_without_effect(refusal: Callable[..., RecipeError], data: str) -> None:
    error = refusal(f"model: m\ndata: {data}\n")
    assert (error.code, error.where) == ("recipe.bad-value", "mine.yaml:2")
    assert "only for data to train on" in error.expected


# Files that are no recipe


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model: m\ndata: [d\nmethod: lora\n", "mine.yaml:3:7"),
        ("model: m\n\tdata: d\n", "mine.yaml:2:1"),
        ("model: m\ndata: d: e\n", "mine.yaml:2:8"),
        ("model: 'm\n", "mine.yaml:2:1"),
    ],
)
def test_yaml_errors_have_their_line(
    refusal: Callable[..., RecipeError], text: str, place: str
) -> None:
    error = refusal(text)
    assert error.code == "recipe.yaml"
    assert error.where == place
    assert error.try_ is not None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "an empty file"),
        ("# no\n", "an empty file"),
        ("- a\n", "a list"),
        ("just text\n", "a str"),
    ],
)
def test_files_without_keys(refusal: Callable[..., RecipeError], text: str, found: str) -> None:
    error = refusal(text)
    assert (error.code, error.found) == ("recipe.shape", found)


def test_a_missing_file_has_a_near_name(write: Callable[..., Path], tmp_path: Path) -> None:
    write(SHORT, "poems.yaml")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "poem.yaml")
    assert caught.value.code == "recipe.missing"
    assert caught.value.try_ == f"did you mean {tmp_path / 'poems.yaml'}?"
    for path in (tmp_path / "quite-other.json", tmp_path / "no" / "poems.yaml"):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert (caught.value.where, caught.value.try_) == (str(path), "check the path")


def test_unreadable_files(refusal: Callable[..., RecipeError], tmp_path: Path) -> None:
    assert refusal("model: 模型\n".encode("gbk")).code == "recipe.unreadable"
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path)
    assert caught.value.code == "recipe.unreadable"


# Overrides


def test_overrides(load: Callable[..., Recipe]) -> None:
    recipe = load(
        SHORT,
        "train.epochs=3",
        "train.learning_rate=1e-4",
        "train.clip_norm=null",
        "data.template_arguments.enable_thinking=false",
        "data.validation=0.2",
        "output=there",
        "method=lora",
        "method.target=[q_proj, v_proj]",
    )
    assert (recipe.train.epochs, recipe.train.learning_rate) == (3, 1e-4)
    assert recipe.train.clip_norm is None
    assert recipe.data.template_arguments == {"enable_thinking": False}
    assert recipe.data.validation == 0.2
    assert [source.path for source in recipe.data.train] == ["d.jsonl"]
    assert recipe.output == "there"
    assert isinstance(recipe.method, LoraConfig)
    assert recipe.method.target == ["q_proj", "v_proj"]


def test_overrides_win_and_the_last_one_most(load: Callable[..., Recipe]) -> None:
    recipe = load(SHORT + "train: {seed: 1, epochs: 9}\n", "train.seed=2", "train.seed=3")
    assert (recipe.train.seed, recipe.train.epochs) == (3, 9)


def test_overrides_of_short_forms(load: Callable[..., Recipe]) -> None:
    recipe = load(
        SHORT + "method: lora\n", "method.rank=8", "model.dtype=float32", "data.overlong=drop"
    )
    assert recipe.method == LoraConfig(name="lora", rank=8)
    assert (recipe.model.id, recipe.model.dtype) == ("m", "float32")
    assert recipe.data.overlong == "drop"
    assert [source.path for source in recipe.data.train] == ["d.jsonl"]


def test_an_override_gives_a_short_form(load: Callable[..., Recipe]) -> None:
    recipe = load(SHORT + "method: {name: lora, rank: 4}\n", "method=full", "model=n")
    assert isinstance(recipe.method, FullConfig)
    assert recipe.model.id == "n"
    # method=lora and then its rank, as on one command line
    assert load(SHORT, "method=lora", "method.rank=8").method == LoraConfig(rank=8)


def test_an_override_beside_a_list_of_files(load: Callable[..., Recipe]) -> None:
    recipe = load("model: m\ndata: [a, b]\n", "data.validation=0")
    assert [source.path for source in recipe.data.train] == ["a", "b"]


def test_an_override_beside_a_source_with_settings(load: Callable[..., Recipe]) -> None:
    recipe = load("model: m\ndata: {path: a, limit: 3}\n", "data.validation=0")
    assert recipe.data.train[0].limit == 3
    assert recipe.data.validation == 0


@pytest.mark.parametrize(
    ("text", "overrides"), [("", ["method.rank=8"]), ("method: {rank: 8}\n", [])]
)
def test_lora_is_the_method_without_a_name(
    load: Callable[..., Recipe], text: str, overrides: list[str]
) -> None:
    assert load(SHORT + text, *overrides).method == LoraConfig(rank=8)


@pytest.mark.parametrize("override", ["train.epochs", "=3", "--lr"])
def test_malformed_overrides(refusal: Callable[..., RecipeError], override: str) -> None:
    error = refusal(SHORT, override)
    assert error.code == "recipe.override"
    assert error.where == f"command line: {override}"


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("train.epoch=3", "recipe.unknown-key"),
        ("train.epochs=none", "recipe.bad-value"),
        ("model.nam=x", "recipe.unknown-key"),
        ("lr=1", "recipe.unknown-key"),
        ("train.seed={a: ", "recipe.bad-value"),
    ],
)
def test_wrong_overrides_are_placed_there(
    refusal: Callable[..., RecipeError], override: str, code: str
) -> None:
    error = refusal(SHORT, override)
    assert error.code == code
    assert error.where == f"command line: {override}"


# Dumping and comparing

FULL = """
model: {id: 模型, dtype: float32}
data:
  train: [{path: a.json, columns: {prompt: q}, encoding: gb18030}, b.json]
  validation: v.json
  template_arguments: {enable_thinking: false, n: [1, 2]}
method: {name: lora, rank: 8, alpha: 2.5, target: [q, v]}
train: {learning_rate: 1e-5, clip_norm: null, max_steps: 7}
evaluate: {every: 3, early_stopping: 2}
output: "1e5"
"""


@pytest.mark.parametrize("text", [SHORT, FULL, SHORT + "method: full\n"])
@pytest.mark.parametrize("has_reasons", [False, True])
def test_a_dumped_recipe_reads_back(
    load: Callable[..., Recipe], write: Callable[..., Path], text: str, has_reasons: bool
) -> None:
    recipe = load(text)
    reasons = {key: f"the reason of {key}: 10 %" for key in flatten(recipe.model_dump())}
    dumped = dump_recipe(recipe, reasons if has_reasons else None)
    assert load_recipe(write(dumped)).recipe == recipe


def test_reasons_stand_behind_their_values(load: Callable[..., Recipe]) -> None:
    reasons = {"train.epochs": "few rows", "method.rank": "enough", "no.such": "never"}
    rows = dump_recipe(load(SHORT), reasons).splitlines()
    assert "  epochs: auto  # few rows" in rows
    assert "  rank: auto  # enough" in rows
    assert sum("#" in row for row in rows) == 2


def test_changed_keys(load: Callable[..., Recipe]) -> None:
    old = load(SHORT)
    new = load(SHORT, "train.seed=1", "method=full", "data.template_arguments.a=1", "output=x")
    found = changed_keys(old, new)
    assert found["train.seed"] == (0, 1)
    assert found["method.name"] == ("lora", "full")
    assert found["method.rank"] == ("auto", None)
    assert found["data.template_arguments.a"] == (None, 1)
    assert found["output"][1] == "x"
    assert changed_keys(old, old) == {}


def test_merged_recipes_take_what_changed_and_keep_the_rest(load: Callable[..., Recipe]) -> None:
    base = load(SHORT, "train.seed=1", "train.epochs=7", "checkpoint.every_steps=9")
    asked = load(SHORT, "train.seed=2", "method=full", "checkpoint.keep=5", "output=x")
    keys = ["train.seed", "method.name", "checkpoint.keep", "output"]
    merged = merge_recipes(base, asked, keys)
    assert (merged.train.seed, merged.train.epochs) == (2, 7)
    assert (merged.checkpoint.keep, merged.checkpoint.every_steps) == (5, 9)
    assert (merged.method.name, merged.output) == ("full", "x")


def test_recipe_from_names_its_place() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from({"model": "m", "data": "d", "lr": 1}, where="quickstart")
    assert caught.value.where == "quickstart"
    assert isinstance(recipe_from({"model": "m", "data": "d"}), Recipe)


def test_loaded_recipes_compare_by_value(write: Callable[..., Path]) -> None:
    path = write(SHORT)
    assert load_recipe(path) == load_recipe(str(path))
    assert isinstance(load_recipe(path), LoadedRecipe)
