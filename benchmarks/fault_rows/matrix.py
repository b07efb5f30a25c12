"""The rows: what goes wrong, what is expected, and how it is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fault_rows import rows_damage, rows_data, rows_numbers, rows_resume, rows_stops
from fault_rows.bench import Bench, Verdict


@dataclass(frozen=True)
class Row:
    """One row of the fault matrix; its number is that of docs/reliability.md."""

    number: str
    title: str
    expected: str
    check: Callable[[Bench], Verdict]


ROWS = (
    Row("1", "SIGKILL between steps", "the same bits in the end", rows_resume.killed_between_steps),
    Row(
        "2",
        "SIGKILL in epochs 2 and 3",
        "no row lost or doubled",
        rows_resume.killed_in_later_epochs,
    ),
    Row(
        "3",
        "random numbers on the data's side",
        "the same bits in the end",
        rows_resume.random_data_side,
    ),
    Row(
        "4",
        "SIGKILL between two micro-batches of a step",
        "the same bits in the end",
        rows_resume.killed_in_a_window,
    ),
    Row(
        "7",
        "other micro-batch, same global batch",
        "the same rows, losses within 1e-6",
        rows_resume.other_micro_batch,
    ),
    Row(
        "8",
        "a row of the data edited before resume",
        "refused, with the reason",
        rows_resume.data_edited,
    ),
    Row(
        "9",
        "learning rate or seed edited before resume",
        "refused, naming the setting; harmless edits let through",
        rows_resume.config_edited,
    ),
    Row(
        "16",
        "SIGKILL during a save",
        "an earlier whole checkpoint, the same bits in the end",
        rows_damage.killed_in_a_save,
    ),
    Row("17", "empty newer directory", "ignored", rows_damage.empty_newer_directory),
    Row(
        "18",
        "newest checkpoint cut off",
        "the one before it, with a warning",
        rows_damage.newest_truncated,
    ),
    Row(
        "19",
        "one bit turned in the newest weights",
        "found, the one before it",
        rows_damage.bit_in_weights,
    ),
    Row(
        "20",
        "one bit turned in the optimizer's state",
        "found, the one before it",
        rows_damage.bit_in_optimizer,
    ),
    Row("21", "all checkpoints damaged", "stops, naming each", rows_damage.all_bad),
    Row(
        "22",
        "disk full during a save",
        "says so, and goes on exactly when there is space",
        rows_damage.disk_full,
    ),
    Row(
        "24",
        "SIGKILL while an old checkpoint is removed",
        "never chosen",
        rows_damage.killed_in_rotation,
    ),
    Row(
        "26",
        "two runs in one directory",
        "the second refused, naming the first's process",
        rows_stops.two_runs,
    ),
    Row(
        "28",
        "SIGTERM in a step",
        "saved within the step, exit 143, the same bits in the end",
        rows_stops.terminated,
    ),
    Row(
        "30",
        "SIGINT in a save, and a second SIGINT",
        "stops, no half checkpoint",
        rows_stops.interrupted_in_a_save,
    ),
    Row("34", "NaN loss", "no weight changed, step named", rows_numbers.nan_loss),
    Row("36", "loss spike", "not learned from, and said", rows_numbers.loss_spike),
    Row(
        "38", "batches without labels", "add nothing, no NaN, counted", rows_numbers.without_labels
    ),
    Row(
        "40", "out of memory", "smaller micro-batches, the same losses", rows_numbers.out_of_memory
    ),
    Row("47", "malformed JSON", "file and line named", rows_data.malformed_json),
    Row("48", "wrong type in one row", "file and line named", rows_data.wrong_type),
    Row(
        "49",
        "two user turns, empty answer, unknown role",
        "file and line named",
        rows_data.bad_conversations,
    ),
    Row(
        "50",
        "prompt longer than the limit",
        "file and line named, or counted",
        rows_data.long_prompt,
    ),
    Row(
        "51",
        "BOM, CRLF, invalid UTF-8",
        "read as without; file and line named",
        rows_data.encodings,
    ),
)
