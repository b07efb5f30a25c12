"""Trackers: fed once and in order, through failures, hangs and restarts; none of them for real but
TensorBoard, whose files are read back. The others meet stand-ins with the same interface."""

import json
import math
import sys
import threading
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tunesmith.config.load import load_recipe, recipe_from
from tunesmith.engine.trackers import feed as feed_module
from tunesmith.engine.trackers.feed import Feed, close_feeds, figures_of
from tunesmith.engine.trackers.ledger import Ledger
from tunesmith.engine.trackers.opening import check_trackers, open_feeds
from tunesmith.errors import RecipeError
from tunesmith.types import Event

MINIMAL = {"model": "some/model", "data": "data.json"}


class Recorder:
    """A tracker that remembers what it got, and fails or hangs where it is told to."""

    def __init__(self, *, fails_at: str = "", hangs_at: str = "") -> None:
        self.fails_at, self.hangs_at = fails_at, hangs_at
        self.release = threading.Event()
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ids: list[str | None] = []
        self.summary: Any = "none came"

    def _pass(self, place: str) -> None:
        if place == self.fails_at:
            raise ConnectionError(f"no answer at {place}, password=hunter2hunter2")
        if place == self.hangs_at:
            self.release.wait(20)

    def start(self, run: Any) -> str:
        self._pass("start")
        self.ids.append(run.id)
        return "id-1"

    def log(self, step: int, figures: Any) -> None:
        self._pass("log")
        self.logged.append((step, dict(figures)))

    def finish(self, summary: Any) -> None:
        self._pass("finish")
        self.summary = summary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.resolved.yaml").write_text(json.dumps(MINIMAL))
    return tmp_path


def step_event(step: int, loss: float = 1.0) -> Event:
    return Event("step", step, 0.0, {"loss": loss, "note": "text", "is_it": True})


def feed_with(
    folder: Path, tracker: Any, steps: Any, *, is_finished: bool = True
) -> tuple[Feed, list[str]]:
    warnings: list[str] = []
    feed = Feed("fake", lambda: tracker, folder, warnings.append)
    feed(Event("start", 0, 0.0, {}))
    for step in steps:
        feed(step_event(step))
    if is_finished:
        feed(Event("done", max(steps), 0.0, {"eval_loss": 0.5}))
    close_feeds([feed], is_finished=is_finished)
    return feed, warnings


def test_figures_are_the_finite_numbers_alone() -> None:
    event = Event("step", 1, 0.0, {"loss": math.nan, "norm": 2, "text": "x", "best": True})
    assert figures_of(event, "train") == {"train/norm": 2.0}


def test_a_tracker_gets_everything_once_and_in_order(folder: Path) -> None:
    tracker = Recorder()
    _, warnings = feed_with(folder, tracker, range(1, 6))
    assert [step for step, _ in tracker.logged] == [1, 2, 3, 4, 5]
    assert tracker.logged[0][1] == {"train/loss": 1.0}
    assert tracker.summary == {"eval_loss": 0.5}
    assert warnings == []


def test_a_run_that_goes_on_has_the_same_id_and_no_step_twice(folder: Path) -> None:
    first, second = Recorder(), Recorder()
    feed_with(folder, first, range(1, 6), is_finished=False)
    assert first.summary is None
    feed_with(folder, second, range(3, 9))  # the checkpoint was at step 2
    assert second.ids == ["id-1"]
    assert [step for step, _ in second.logged] == [6, 7, 8]


def test_what_a_tracker_missed_comes_when_the_run_goes_on(folder: Path) -> None:
    _, warnings = feed_with(folder, Recorder(fails_at="log"), [1, 2], is_finished=False)
    assert len(warnings) == 1
    lines = [{"event": "step", "step": step, "time": 0, "loss": 2.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "events.jsonl").write_text(text)
    tracker = Recorder()
    feed_with(folder, tracker, [3, 4])
    assert [step for step, _ in tracker.logged] == [1, 2, 3, 4]


@pytest.mark.parametrize("place", ["start", "log", "finish"])
def test_a_failure_is_told_once_and_without_secrets(folder: Path, place: str) -> None:
    _, warnings = feed_with(folder, Recorder(fails_at=place), range(1, 50))
    assert len(warnings) == 1
    assert "tracker fake is left alone" in warnings[0]
    assert "ConnectionError: no answer" in warnings[0]
    assert "hunter2" not in warnings[0]


@pytest.mark.parametrize("place", ["start", "log", "finish"])
def test_a_hang_costs_the_time_limit_at_the_end_alone(
    folder: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "FINISH_SECONDS", 0.1)
    tracker, started = Recorder(hangs_at=place), time.monotonic()
    _, warnings = feed_with(folder, tracker, range(1, 50))
    assert time.monotonic() - started < 2
    assert len(warnings) == 1
    assert "in time" in warnings[0]
    tracker.release.set()


def test_a_tracker_far_behind_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "QUEUE_EVENTS", 10)
    tracker = Recorder(hangs_at="start")
    _, warnings = feed_with(folder, tracker, range(1, 50))
    assert [text for text in warnings if "10 events behind" in text] == warnings != []
    tracker.release.set()


def test_a_ledger_cut_off_in_a_line_is_read_and_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "trackers" / "fake.jsonl"
    ledger = Ledger(file)
    ledger.name("abc")
    ledger.note("step", 7)
    ledger.close()
    file.write_text(file.read_text() + '{"step": 8')
    again = Ledger(file)
    assert (again.id, again.steps) == ("abc", {"step": 7})
    again.note("step", 9)
    again.close()
    assert Ledger(file).steps == {"step": 9}


# Recipes


def trackers(*given: Any) -> Any:
    return recipe_from({**MINIMAL, "log": {"trackers": [*given]}}).log.trackers


def test_a_word_and_a_whole_entry() -> None:
    first, second = trackers("tensorboard", {"name": "wandb", "project": "p"})
    assert (first.name, second.project) == ("tensorboard", "p")


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean `swanlab`"):
        trackers("swanlb")


def test_one_tracker_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="each tracker once"):
        trackers("wandb", {"name": "wandb", "project": "p"})


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.engine.trackers.opening.find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"pip install 'tunesmith\[wandb\]'"):
        check_trackers(trackers("wandb"))


def test_a_plugin_must_be_enabled_and_known(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    config = trackers({"name": "plugin", "tracker": "mine", "settings": {"fails_at": "log"}})
    with pytest.raises(RecipeError, match="TUNESMITH_PLUGINS=mine"):
        check_trackers(config)
    monkeypatch.setenv("TUNESMITH_PLUGINS", "mine")
    points = [SimpleNamespace(name="mina", load=lambda: Recorder)]
    place = "tunesmith.engine.trackers.opening.entry_points"
    monkeypatch.setattr(place, lambda group: points)
    with pytest.raises(RecipeError, match="did you mean mina"):
        check_trackers(config)
    points[0].name = "mine"
    warnings: list[str] = []
    (feed,) = open_feeds(config, folder, warnings.append)
    feed(Event("start", 0, 0.0, {}))
    feed(step_event(1))
    close_feeds([feed], is_finished=True)
    assert "tracker mine" in warnings[0]


# The interfaces of others


class Calls(ModuleType):
    """A module that writes down how it is called, and gives runs that do so, too."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def record(self, name: str, result: Any = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, {**kwargs, "args": args}))
            return result

        return call

    def run(self) -> Any:
        return SimpleNamespace(
            id="r1", name="r1", summary={}, log=self.record("log"), finish=self.record("finish")
        )

    def of(self, name: str) -> list[dict[str, Any]]:
        return [kwargs for called, kwargs in self.calls if called == name]


def stand_in(name: str) -> Calls:
    module: Any = Calls(name)
    run = module.run()
    module.init = module.record("init", run)
    module.Settings = SimpleNamespace
    module.login = module.record("login", result=True)
    module.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="online"))
    found = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    module.start_run = module.record("start_run", found)
    for each in ("set_tracking_uri", "set_experiment", "log_params", "log_metrics", "end_run"):
        setattr(module, each, module.record(each))
    return module


def feed_real(config: Any, folder: Path, steps: list[int], **how: Any) -> list[str]:
    warnings: list[str] = []
    (feed,) = open_feeds([config], folder, warnings.append)
    feed(Event("start", 0, 0.0, {}))
    for step in steps:
        feed(step_event(step))
    if how.get("is_finished", True):
        feed(Event("done", steps[-1], 0.0, {"eval_loss": 0.5}))
    close_feeds([feed], is_finished=how.get("is_finished", True))
    return warnings


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_wandb_swanlab_and_trackio_are_called_as_they_want(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = stand_in(name)
    monkeypatch.setitem(sys.modules, name, module)
    (config,) = trackers({"name": name, "project": "p", "run": "mine"})
    assert feed_real(config, folder, [1, 2], is_finished=False) == []
    assert feed_real(config, folder, [2, 3]) == []
    first, second = module.of("init")
    assert first["project"] == "p"
    assert first["config"]["model"] == "some/model"
    assert second["resume"] == "allow"
    assert "r1" in (second.get("id"), second["name"])
    assert [call["step"] for call in module.of("log")] == [1, 2, 3]
    assert len(module.of("finish")) == 2
    if name == "wandb":
        assert [call["exit_code"] for call in module.of("finish")] == [1, 0]
        assert first["settings"].console == "off"


def test_wandb_without_a_key_does_not_ask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = stand_in("wandb")
    module.login = module.record("login", result=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    (warning,) = feed_real(trackers("wandb")[0], folder, [1])
    assert "wandb login" in warning
    assert module.of("init") == []


def test_mlflow_is_called_as_it_wants(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = stand_in("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", module)
    (config,) = trackers({"name": "mlflow", "tracking_uri": "http://user:pw@host"})
    assert feed_real(config, folder, [1, 2], is_finished=False) == []
    assert feed_real(config, folder, [2, 3]) == []
    assert [call["run_id"] for call in module.of("start_run")] == [None, "r1"]
    assert len(module.of("log_params")) == 1
    steps = [call["step"] for call in module.of("log_metrics") if "step" in call]
    assert steps == [1, 2, 3]
    assert [call["args"] for call in module.of("end_run")] == [("KILLED",), ("FINISHED",)]


def test_a_real_run_goes_to_tensorboard_and_past_a_tracker_that_is_down(
    tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tunesmith import fine_tune

    module: Any = stand_in("wandb")
    module.init = lambda **_: (_ for _ in ()).throw(ConnectionError("no network"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    recipe = tiny_recipe(log={"trackers": ["tensorboard", "wandb"]}, train={"epochs": 2})
    fine_tune(load_recipe(recipe))
    run = tmp_path / "run"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    warnings = [event for event in events if event["event"] == "warning"]
    assert len(warnings) == 1
    assert "no network" in warnings[0]["message"]
    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    expected = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
    found = {scalar.step: scalar.value for scalar in reader.Scalars("train/loss")}
    assert found == pytest.approx(expected, rel=1e-6)
    assert "recipe/text_summary" in reader.Tags()["tensors"]
