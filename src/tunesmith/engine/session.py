"""What surrounds a run from its start to its end: event stream, signals, watchdog; its summary."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tunesmith.config.recipe import GuardConfig, LogConfig
from tunesmith.engine.events import EventLog
from tunesmith.engine.rundir import RunDirectory
from tunesmith.engine.sample_losses import SampleLosses
from tunesmith.engine.signals import StopSignal
from tunesmith.engine.state import TrainState
from tunesmith.engine.step import Run
from tunesmith.engine.trackers.feed import close_feeds
from tunesmith.engine.trackers.opening import open_feeds
from tunesmith.engine.watchdog import Watchdog
from tunesmith.types import Json, Listener


@dataclass(frozen=True)
class Session:
    """What one start of a run has around it."""

    run_dir: RunDirectory
    events: EventLog
    stop: StopSignal
    watchdog: Watchdog
    losses: SampleLosses


@contextmanager
def open_session(
    run_dir: RunDirectory,
    stop: StopSignal,
    guard: GuardConfig,
    listeners: Sequence[Listener] = (),
    log: LogConfig | None = None,
) -> Generator[Session]:
    """Opens the event stream and the trackers, and sets the watchdog, whose warnings go there."""

    def note(text: str) -> None:
        events.emit("warning", watchdog.step, {"message": text})

    feeds = open_feeds(log.trackers if log else (), run_dir.path, note)
    watchdog = Watchdog(
        run_dir.path,
        warn_seconds=guard.hang_warn_seconds,
        stop_seconds=guard.hang_stop_seconds,
        note=note,
    )
    losses = SampleLosses(run_dir.path / "samples")
    is_finished = False
    with EventLog(run_dir.events, [*listeners, *feeds]) as events, watchdog:
        try:
            yield Session(run_dir, events, stop, watchdog, losses)
            is_finished = True
        finally:
            losses.close()
            close_feeds(feeds, is_finished=is_finished)


def summarize(run: Run, state: TrainState, memory: dict[str, int]) -> dict[str, Json]:
    """What a finished run measured."""
    seconds = max(state.train_seconds, 1e-9)
    rewards: dict[str, Json] = {}
    if run.rollouts is not None and state.first_loss is not None and state.best_loss is not None:
        rewards = {"reward_before": -state.first_loss, "eval_reward": -state.best_loss}
    return {
        "train_loss": state.loss_sum / max(1, state.num_learned),
        "eval_loss_before": state.first_loss,
        "eval_loss": state.best_loss,
        **rewards,
        "best_step": state.best_step,
        "steps": state.step,
        "skipped_steps": state.num_skipped,
        "rollbacks": state.num_rollbacks,
        "epochs": round(state.step / run.loader.steps_per_epoch, 3),
        "runtime_seconds": round(state.train_seconds, 2),
        "samples_per_second": round(state.samples_seen / seconds, 3),
        "tokens_per_second": round(state.tokens_seen / seconds, 1),
        "tokens": state.tokens_seen,
        "trained_parameters": sum(parameter.numel() for _, parameter in run.parameters),
        **memory,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
