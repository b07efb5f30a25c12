"""Bad numbers: what counts as one, and what becomes of the samples that made it.

A step whose loss or gradient norm is not finite, or whose loss leaps far above those before it, is
skipped: the device itself leaves the weights as they are. After several in a row the run goes back
to its last scheduled checkpoint and trains without their samples, as PaLM's authors did by hand
(arXiv 2204.02311, section 5.1); after several of these it stops. All of it is decided from
`TrainState`, so a restart decides the same.
"""

from __future__ import annotations

import math

from tunesmith.config.recipe import GuardConfig
from tunesmith.engine.state import TrainState

LAG_STEPS = 1
"""The loss of the step just before is not looked at: on an accelerator it has not arrived yet, and
what is skipped must not depend on the device."""

LEAST_SHARE, LEAST_DEVIATION = 0.05, 0.02
"""Of the mean, and in nats: losses that hardly vary would make a spike of anything."""


def highest_loss(state: TrainState, step: int, guard: GuardConfig) -> float:
    """The largest loss that a step may have to be learned from; infinite while too few are known.

    Args:
        state: with the losses so far.
        step: the step about to run, from 0.
        guard: how far above the mean.
    """
    known = [loss for at, loss in state.recent_losses if at < step - LAG_STEPS]
    known = known[-guard.window_steps :]
    sigma = guard.spike_sigma
    if sigma is None or sigma == "auto" or len(known) < max(2, guard.window_steps // 4):
        return math.inf
    mean = math.fsum(known) / len(known)
    variance = math.fsum((loss - mean) ** 2 for loss in known) / len(known)
    deviation = max(math.sqrt(variance), LEAST_SHARE * abs(mean), LEAST_DEVIATION)
    return mean + sigma * deviation


def record_loss(state: TrainState, step: int, loss: float, guard: GuardConfig) -> None:
    """Takes the loss of a step in that was learned from."""
    state.bad_steps, state.bad_are_finite = [], True
    state.num_learned += 1
    state.loss_sum += loss
    state.recent_losses.append((step, loss))
    del state.recent_losses[: -(guard.window_steps + LAG_STEPS)]


def record_skip(state: TrainState, sample_ids: tuple[int, ...], *, is_finite: bool) -> None:
    """Takes a step in whose numbers were bad: only too high, or not even finite."""
    state.num_skipped += 1
    state.bad_steps.append(sample_ids)
    state.bad_are_finite = state.bad_are_finite and is_finite


def accept_losses(state: TrainState) -> None:
    """Learns from high losses again: the data has become harder, and will not be what it was."""
    state.bad_steps, state.recent_losses = [], []


def must_roll_back(state: TrainState, guard: GuardConfig) -> bool:
    """Whether too many steps in a row were bad."""
    return len(state.bad_steps) >= guard.rollback_after


def rolled_back(state: TrainState, target: TrainState | None) -> TrainState:
    """The state to go on from, without the samples of the bad steps.

    Args:
        state: where the run is.
        target: the state of the checkpoint to go back to. None: there is none yet, the run goes on
            where it is; no bad step has touched its weights.
    """
    bad = {sample for step in state.bad_steps for sample in step}
    new = (target or state).copy()
    new.bad_steps, new.bad_are_finite = [], True
    new.excluded = sorted({*state.excluded, *bad})
    new.num_rollbacks = state.num_rollbacks + 1
    new.num_skipped = state.num_skipped
    new.train_seconds = state.train_seconds
    return new
