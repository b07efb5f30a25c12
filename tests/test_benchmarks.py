"""The pure parts of the training benchmarks: costs, shapes, rows, comparisons, settings."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_on_path() -> Iterator[None]:
    """The scripts find each other from their own folder."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def shape_of(sizes: dict[str, Any]) -> Any:
    from peers.train_flops import Shape

    return Shape.of(sizes)


def row(length: int, supervised: int, first: int = 0) -> dict[str, Any]:
    ids = list(range(first, first + length))
    labels = [-100] * (length - supervised) + ids[length - supervised :]
    return {"input_ids": ids, "labels": labels, "prompt": "p", "response": "r"}


def make_shared(batches: list[list[dict[str, Any]]]) -> Any:
    from peers.train_work import Shared

    return Shared("model", "bfloat16", None, None, 1.0, batches)


def make_measured(seconds: float, loss: float, steps: int = 4) -> Any:
    from peers.train_work import Measured

    losses = [loss - 0.1 * step for step in range(steps)]
    return Measured(
        label="as it is",
        versions={"torch": "2"},
        losses=losses,
        gradient_norms=[1.0] * steps,
        seconds=[10 * seconds] * 2 + [seconds] * (steps - 2),
        cpu_seconds=[seconds] * steps,
        loss_again=loss - 1,
        level_bytes=2**20,
        peak_bytes=3 * 2**20,
    )


# Costs


@pytest.mark.parametrize(("name", "billions"), [("0.5b", 0.494), ("3b", 3.213), ("8b", 8.030)])
def test_shapes_have_the_size_of_their_models(name: str, billions: float) -> None:
    from peers.train_gpu_model import SHAPES

    sizes = SHAPES[name]
    shape = shape_of(sizes)
    embedding = 0 if sizes["tie_word_embeddings"] else shape.head
    assert (shape.matrices + embedding) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_matrices_are_those_of_the_model() -> None:
    import torch
    from peers.train_gpu_model import TINY, model_config
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(model_config(TINY))
    linear = [each for each in model.modules() if isinstance(each, torch.nn.Linear)]
    assert shape_of(TINY).matrices == sum(each.weight.numel() for each in linear)


def test_random_logits_deviate_by_one() -> None:
    import torch
    from peers.train_gpu_model import TINY, model_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(TINY), dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(64)[None]).logits
    assert 0.7 < float(logits.std()) < 1.4


def test_step_flops_follow_the_formula() -> None:
    from peers.train_gpu_model import SHAPES

    shape = shape_of(SHAPES["8b"])
    attention = 2 * 2 * 32 * 32 * 128 * 4096 / 2  # per token, forward
    per_token = shape.step_flops("lora", [4096]) / 4096
    assert per_token == 4 * shape.matrices + 3 * attention
    assert shape.step_flops("full", [10, 20]) > 1.4 * shape.step_flops("lora", [10, 20])
    # Two sequences do not see each other.
    assert shape.step_flops("lora", [64, 64]) < shape.step_flops("lora", [128])


def test_peak_is_found() -> None:
    from peers.train_flops import measure_peak

    peak = measure_peak("float32", [(8, 8, 8), (64, 64, 64)], seconds=0.001)
    assert peak.flops_per_second > 0
    assert peak.product in ("8 x 8 x 8", "64 x 64 x 64")


# Rows


def test_gpu_rows_have_the_length_asked_for(tmp_path: Path) -> None:
    from peers.train_gpu_model import byte_tokenizer, write_rows

    write_rows(tmp_path / "rows.jsonl", 3, 40, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 3
    tokenizer = byte_tokenizer()
    assert [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows] == [
        39
    ] * 3


def test_row_is_split_where_the_answer_begins() -> None:
    from peers.train_tunesmith import row_of

    class Letters:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(chr(97 + each) for each in ids)

    found = row_of([0, 1, 2, 3, 4], ((2, 3, 1.0),), Letters())
    assert (found["prompt"], found["response"]) == ("ab", "cde")
    assert found["labels"] == [-100, -100, 2, 3, 4]
    with pytest.raises(ValueError, match="weight"):
        row_of([0, 1], ((1, 1, 0.5),), Letters())


def test_packs_of_a_peer_are_compared_row_by_row() -> None:
    from peers.train_llamafactory import differences

    batches = [[row(4, 2), row(3, 1, 50)], [row(5, 3, 90), row(2, 1, 70)]]
    shared = make_shared(batches)

    def pack(rows: list[dict[str, Any]]) -> dict[str, Any]:
        """As neat_packing makes them: padded, the rows numbered in the mask."""
        numbered = list(enumerate(rows, 1))
        return {
            "input_ids": [token for each in rows for token in each["input_ids"]] + [0] * 3,
            "labels": [label for each in rows for label in each["labels"]] + [-100] * 3,
            "attention_mask": [n for n, each in numbered for _ in each["labels"]] + [0] * 3,
        }

    packs = [pack(batch[::-1]) for batch in [*batches, batches[0]]]
    single = [pack([each]) for each in shared.rows(2)]
    assert differences(shared, 2, packs) == differences(shared, 2, single) == 0
    packs[1]["labels"][0] = packs[1]["input_ids"][0]
    assert differences(shared, 2, packs) == 1
    packs[1]["input_ids"][0] += 1
    with pytest.raises(ValueError, match="step 2"):
        differences(shared, 2, packs)


# Comparisons


def compared(theirs: Any) -> dict[str, dict[str, Any]]:
    from peers.train_flops import Shape
    from peers.train_work import Work
    from train_cpu import figures, with_ratio

    work = Work("d", "m", "lora", 8, 4, 2, 64, 1e-4, 0, 1)
    shared = make_shared([[row(6, 2), row(4, 2)]] * 4)
    shape = Shape(2, 8, 16, 2, 1, 4, 100)
    sides = {"tunesmith": make_measured(1.0, 3.0), "peer": theirs}
    found = {name: figures(side, work, shared, shape, 1e6) for name, side in sides.items()}
    return {name: with_ratio(side, found["tunesmith"]) for name, side in found.items()}


def test_figures_leave_the_warm_up_out() -> None:
    found = compared(make_measured(2.0, 3.01))
    own, peer = found["tunesmith"], found["peer"]
    assert own["tokens_per_second"] == own["tokens_per_second_median"] == 10
    assert own["supervised_per_second"] == 4
    assert peer["times"] == 2
    assert (own["peak_mebibytes"], own["above_level_mebibytes"]) == (3, 2)
    assert own["mfu"] == 2 * peer["mfu"]


def test_unequal_work_is_told() -> None:
    from train_cpu import difficulties

    good = make_measured(1.0, 3.0)
    assert difficulties(compared(good)) == []
    bad = {
        "does not fall": replace(good, loss_again=4.0),
        "is 0": replace(good, gradient_norms=[1.0, 0.0, 1.0, 1.0]),
        "not finite": replace(good, gradient_norms=[1.0, math.nan, 1.0, 1.0]),
        "2 tokens more": replace(good, supervised_extra=2),
        "differs by": replace(good, losses=[3.5, 3.4, 3.3, 3.2]),
    }
    for text, side in bad.items():
        problems = difficulties(compared(side))
        assert len(problems) == 1
        assert text in problems[0]


def test_several_runs_keep_the_fastest_time_of_a_step() -> None:
    from train_cpu import fastest

    runs = [
        replace(make_measured(1.0, 3.0), seconds=times, peak_bytes=peak)
        for times, peak in (([1.0, 4.0], 5), ([2.0, 3.0], 6))
    ]
    assert fastest(runs).seconds == [1.0, 3.0]
    assert fastest(runs).peak_bytes == 6


# Preferences


def alpaca_rows(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"question {n}", "input": "x" * (n % 2), "output": f"{n} " + "word " * 100}
        for n in range(count)
    ]


def test_pairs_are_made_of_rows_of_middle_length() -> None:
    from preference import EARLIER_CHARACTERS, make_pairs

    rows = [*alpaca_rows(20), {"instruction": "q", "input": "", "output": "short"}]
    pairs = make_pairs(rows, 8, seed=0)
    assert pairs == make_pairs(rows, 8, seed=0) != make_pairs(rows, 8, seed=1)
    for pair in pairs:
        assert [turn["role"] for turn in pair["prompt"]] == ["user", "assistant", "user"]
        assert len(pair["prompt"][1]["content"]) <= EARLIER_CHARACTERS
        number = pair["chosen"].split()[0]
        assert pair["prompt"][-1]["content"].split("\n")[0] == f"question {number}"
        assert pair["rejected"].split()[0] != number
    with pytest.raises(ValueError, match="too few"):
        make_pairs(rows, 21, seed=0)


def test_a_pair_is_cut_where_its_answers_begin() -> None:
    from types import SimpleNamespace

    from peers.preference_sides import pair_of

    chosen = SimpleNamespace(ids=[1, 2, 3, 4, 9], runs=((2, 2, 1.0),))
    rejected = SimpleNamespace(ids=[1, 2, 5], runs=((2, 1, 1.0),))
    expected = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    assert pair_of(chosen, rejected) == expected
    with pytest.raises(ValueError, match="other prompts"):
        pair_of(chosen, SimpleNamespace(ids=[1, 7, 5], runs=((2, 1, 1.0),)))


def test_sides_of_preferences_are_compared_over_common_steps() -> None:
    from peers.train_work import Work
    from preference import difficulties, figures, with_ratios

    def run(seconds: float, losses: list[float], again: float = 0.5) -> dict[str, Any]:
        measured = make_measured(seconds, 1.0, len(losses))
        found = replace(measured, losses=losses, loss_again=again)
        return {**asdict(found), "pass_seconds": 0.0}

    work = Work("d", "m", "lora", 8, 4, 2, 64, 1e-4, 0, 1)
    own = figures([run(1.0, [0.693, 0.69, 0.6, 0.5]), run(3.0, [0.693, 0.69, 0.6, 0.5])], work)
    assert own["pairs_per_second"] == 2 / 3.0  # [10, 1, 1] and [30, 3, 3] without the first steps
    short = figures([run(10.0, [0.69, 0.68])], work)
    found = with_ratios(short, own, own)
    assert found["loss_difference"] == pytest.approx(0.01 / 0.69)
    assert difficulties({"peer": found}) == []
    for text, side in {
        "not ln 2": {**found, "loss_first": 0.8},
        "does not fall": {**found, "loss_again": 0.7},
        "0 or not finite": {**found, "gradient_norms": [1.0, 0.0]},
        "differs by": {**found, "loss_difference": 0.06},
    }.items():
        (problem,) = difficulties({"peer": side})
        assert text in problem


# Settings


def test_candidates_fit_method_machine_and_batch() -> None:
    from peers import train_llamafactory, train_trl

    lora = train_trl.candidates("lora", "bfloat16", 8)
    assert lora[0] == train_trl.BEST
    assert {each.weights for each in train_trl.candidates("full", "bfloat16", 8)} == {"float32"}
    assert not any(each.has_autocast for each in train_trl.candidates("lora", "float32", 8))
    assert not any(each.is_bf16 for each in train_llamafactory.candidates("float32", 8))
    for each in train_llamafactory.candidates("bfloat16", 6):
        assert 6 % (each.rows_per_forward or 1) == 0
        assert not each.has_checkpointing


def test_the_fastest_settings_that_work_are_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import train_cpu
    from peers.train_trl import BEST
    from peers.train_work import Work, write_json

    seconds = {"sdpa": 2.0, "eager": 1.0}

    def run_side(side: Any, *_: Any) -> Any:
        if side.settings.attention not in seconds:
            raise RuntimeError("trl ended with 1:\nno such attention")
        return make_measured(seconds[side.settings.attention], 3.0)

    monkeypatch.setattr(train_cpu, "run_side", run_side)
    write_json(tmp_path / "shared.json", asdict(make_shared([[row(6, 2)]] * 4)))
    tries = [
        train_cpu.Side("TRL, best", "trl", "python", replace(BEST, attention=each))
        for each in ("flash", *seconds)
    ]
    work, tried = Work("d", "m", "lora", 8, 4, 1, 64, 1e-4, 0, 1), {}
    options = argparse.Namespace(tune=True, tune_steps=4)
    assert train_cpu.tune(tries, tmp_path, work, options, tried) == tries[2]
    assert list(tried.values()) == ["no such attention", 3.0, 6.0]


def test_peers_bring_no_torch_of_their_own() -> None:
    from peers.train_environments import wanted

    requirements = [
        "torch>=2.4",
        "torchvision",
        "torchaudio>=2",
        "torchdata<1",
        "x>1; extra == 'y'",
    ]
    assert wanted(requirements) == ["torchdata<1"]


def test_gpu_script_skips_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_gpu

    monkeypatch.setattr(sys, "argv", ["train_gpu.py"])
    monkeypatch.setattr(train_gpu, "has_cuda", lambda: False)
    assert train_gpu.main() == 0
    assert "skipped: no CUDA device" in capsys.readouterr().out


def test_full_tuning_of_the_largest_shape_is_left_out() -> None:
    from train_gpu import combinations

    assert [each.method for each in combinations("8b", ["lora", "full"])] == ["lora"]
    assert [each.method for each in combinations("3b", ["lora", "full"])] == ["lora", "full"]


# Start


def test_imports_are_added_up_by_package() -> None:
    from startup import sum_imports

    lines = [
        "import time: self [us] | cumulative | imported package",
        "import time:       100 |        100 |   torch._C",
        "import time:    200000 |     200100 | torch",
        "import time:      5000 |       5000 |     json.decoder",
        "a warning",
    ]
    seconds = sum_imports(lines)
    assert seconds["torch"] == pytest.approx(0.2001)
    assert seconds["json"] == pytest.approx(0.005)


def test_phases_add_up() -> None:
    from startup import PHASES, phases, total

    found = phases([10.0, 11.0, 13.0, 16.0, 20.0])
    assert tuple(found) == PHASES
    assert list(found.values()) == [1.0, 2.0, 3.0, 4.0]
    assert total(found) == 10.0


def test_step_clock_counts_its_steps_alone() -> None:
    from peers.train_work import StepClock

    clock = StepClock(2)
    for loss in (3.0, 2.0, 1.0):
        clock.start()
        clock.stop()
        clock.note(loss, 0.5)
    measured = clock.measured("a label", ("pytest",), 1.0)
    assert len(measured.seconds) == len(measured.cpu_seconds) == 2
    assert measured.losses == [3.0, 2.0]
    assert measured.peak_bytes >= measured.level_bytes // 2 > 0


def test_the_rows_of_faults_vs_peers_are_those_of_the_matrix() -> None:
    from fault_rows.matrix import ROWS

    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    beside = page.partition("## Beside its peers")[2]
    listed = [line.split("|")[1].strip() for line in beside.splitlines() if line.startswith("| ")]
    assert [str(row.number) for row in ROWS] == [cell for cell in listed if cell.isdecimal()]
