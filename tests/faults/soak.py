"""The randomized soak: runs with one to three faults at random moments, until each has ended.

    make soak                                     200 runs
    python tests/faults/soak.py --runs 5 --seed 7 one seed after the other, printed

A run is started again, without a fault, as long as it was killed or stopped by a signal. The only
ends that count are `succeeded, equal bits` and `stopped with a documented code`; anything else is
printed with its seed, kept on disk, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from conftest import make_byte_tokenizer, make_tiny_config, write_tiny_recipe
from faults.runs import Place

LETHAL = ("kill", "kill", "kill", "term", "int", "usr1", "raise:KeyError", "sleep:0.3")
FULL = ("enospc", "raise:OSError")
POINTS = {
    "data.tokenize": (1, LETHAL),
    "data.next": (40, LETHAL),
    "model.load": (1, LETHAL),
    "step.micro": (80, LETHAL),
    "step.backward": (80, LETHAL),
    "step.update": (20, LETHAL),
    "eval.batch": (18, LETHAL),
    "load.read": (2, LETHAL),
    "save.open": (14, (*LETHAL, *FULL)),
    "save.write": (40, (*LETHAL, *FULL)),
    "save.fsync": (60, (*LETHAL, *FULL)),
    "save.rename": (24, (*LETHAL, *FULL)),
    "save.rotate": (10, (*LETHAL, *FULL)),
    "log.emit": (60, (*LETHAL, *FULL)),
}
"""How often a run passes a point, about, and what may happen there."""

LASTING = (
    "",
    "",
    "",
    "step.micro:step=6:nan",
    "step.micro:samples=7:nan",
    "step.micro:step=15:scale:10",
    "step.micro:tokens>100:oom",
)
"""What is wrong at every start of a run, and at that of its oracle."""

RESTARTED = {-signal.SIGKILL, 1, 6, 75, 129, 130, 143}
"""Ends after which a person runs the same command again."""

DOCUMENTED = {2, 3, 4, 5, 6, 7}
MOST_STARTS = 6


@dataclass(frozen=True)
class Kind:
    """A recipe whose uninterrupted run is known."""

    name: str
    changes: dict[str, object]


KINDS = (
    Kind("lora", {}),
    Kind("full", {"method": {"name": "full"}}),
    Kind("background off", {"checkpoint": {"background": False}}),
    Kind("bf16 states", {"method": {"name": "full"}, "train": {"optimizer": "adamw_bf16_sr"}}),
    Kind("freeze", {"method": {"name": "freeze", "layers": 1}}),
    Kind("rollbacks", {"guard": {"rollback_after": 1, "window_steps": 8}}),
)


def make(kind: Kind, model: Path, folder: Path) -> Place:
    """A place for a run of a kind."""
    folder.mkdir(parents=True)
    recipe = write_tiny_recipe(folder, model, **kind.changes)
    if kind.changes.get("method"):  # nothing of LoRA's settings
        import json

        values = json.loads(recipe.read_text())
        recipe.write_text(json.dumps({**values, "method": kind.changes["method"]}))
    return Place(recipe, folder / "run")


def plan_faults(chosen: random.Random) -> str:
    """One to three faults, each at a random passing of a random point."""
    parts: list[str] = []
    for _ in range(chosen.randint(1, 3)):
        point = chosen.choice(sorted(POINTS))
        times, actions = POINTS[point]
        parts.append(f"{point}:{chosen.randint(1, times)}:{chosen.choice(actions)}")
    return ",".join(parts)


class Oracles:
    """What uninterrupted runs give, each made when it is first asked for."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self._known: dict[tuple[str, str], tuple[int, dict[str, bytes]]] = {}
        self._lock = threading.Lock()

    def find(self, kind: Kind, lasting: str) -> tuple[int, dict[str, bytes]]:
        """(Exit code, final bytes) of a kind with what lasts."""
        with self._lock:
            if (kind.name, lasting) not in self._known:
                place = make(kind, self.model, self.folder / str(len(self._known)))
                code = place.train(fault=lasting)
                found = place.final_bytes() if code == 0 else {}
                self._known[kind.name, lasting] = (code, found)
            return self._known[kind.name, lasting]


def soak_one(seed: int, model: Path, folder: Path, oracles: Oracles) -> str:
    """One run to its end, whatever happens to it; says what the end was."""
    chosen = random.Random(seed)
    kind, lasting = chosen.choice(KINDS), chosen.choice(LASTING)
    code, expected = oracles.find(kind, lasting)
    place = make(kind, model, folder)
    codes: list[int] = []
    plans: list[str] = []
    while True:
        # Faults strike the first starts; at last a start is left alone.
        fault = plan_faults(chosen) if len(codes) < chosen.randint(1, 3) else ""
        plans.append(fault or "none")
        codes.append(place.train(fault=",".join(filter(None, (lasting, fault)))))
        if codes[-1] not in RESTARTED or len(codes) >= MOST_STARTS:
            break
    story = f"seed {seed}, {kind.name}, {lasting or 'healthy'}: {' | '.join(plans)} -> {codes}"
    if codes[-1] == 0:
        if code == 0 and place.final_bytes() == expected:
            return "succeeded, equal bits"
        return f"OTHER BITS: {story}"
    if codes[-1] in DOCUMENTED and "Traceback" not in place.printed:
        return f"stopped with a documented code ({codes[-1]})"
    return f"NO SUCH END: {story}"


def main() -> int:
    """Runs the soak; 0 if every run ended as it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="soak-"))
    os.environ["TUNESMITH_CACHE"] = str(base / "cache")
    model = make_model(base / "model")
    oracles = Oracles(model, base / "oracles")
    seeds = range(options.seed, options.seed + options.runs)
    print(f"{options.runs} runs, seeds {seeds[0]} to {seeds[-1]}, in {base}", flush=True)
    ends = Counter[str]()
    with ThreadPoolExecutor(options.jobs) as pool:
        ended = pool.map(lambda s: (s, soak_one(s, model, base / str(s), oracles)), seeds)
        for number, (seed, end) in enumerate(ended, start=1):
            is_bad = end.startswith(("OTHER", "NO SUCH"))
            ends[end.split(":")[0]] += 1
            if is_bad:
                print(f"  {end}\n  kept: {base / str(seed)}", flush=True)
            else:
                shutil.rmtree(base / str(seed))
            if number % 20 == 0 or number == options.runs:
                print(f"{number} of {options.runs}: {dict(ends)}", flush=True)
    num_bad = sum(count for end, count in ends.items() if end.startswith(("OTHER", "NO SUCH")))
    if not num_bad:
        shutil.rmtree(base)
    return 1 if num_bad else 0


def make_model(folder: Path) -> Path:
    """The tiny model with its byte tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(make_tiny_config()).save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
