"""tunesmith by its command line: `tunesmith train recipe.yaml`; the same command resumes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fault_rows.spec import GLOBAL_BATCH, KEEP, RANK, SAVE_EVERY, Spec

# All that the command imports when it trains: the runs are forked from here.
from tunesmith.cli.main import main
from tunesmith.io import fault as faults_of_tunesmith

TOKENS_PER_ROW = 56
"""Its micro-batches are counted in tokens; a row here has at most so many."""


def train(spec: Spec) -> None:
    """One start of the command."""
    Path("recipe.yaml").write_text(json.dumps(recipe_of(spec)), encoding="utf-8")  # JSON is YAML
    os.environ["TUNESMITH_FAULT_HITS"] = "hits.txt"
    os.environ["TUNESMITH_FAULT"] = planted(spec)
    faults_of_tunesmith.arm()
    sys.argv = ["tunesmith", "train", "recipe.yaml"]
    main()


def recipe_of(spec: Spec) -> dict[str, Any]:
    """The recipe."""
    return {
        "model": {"id": spec.model, "dtype": "float32"},
        "data": {
            "train": list(spec.sources),
            "mix": "concat" if len(spec.sources) > 1 else "shuffle",
            "validation": 0,
            "max_length": spec.max_length,
        },
        "method": {"name": "lora", "rank": RANK, "alpha": 2 * RANK, "dropout": spec.dropout},
        "train": {
            "epochs": spec.epochs,
            "global_batch": GLOBAL_BATCH,
            "micro_batch_tokens": spec.micro_batch * TOKENS_PER_ROW,
            "learning_rate": spec.learning_rate,
            "seed": spec.seed,
        },
        "checkpoint": {"every_steps": SAVE_EVERY, "keep": KEEP},
        "log": {"every_steps": spec.log_every},
        "output": "run",
    }


def planted(spec: Spec) -> str:
    """A spec's fault as a TUNESMITH_FAULT, as far as it comes from inside.

    Faults inside a window come by count: which micro-batch it is depends on how rows were packed.
    """
    fault = spec.fault
    return {
        "kill_step": f"step.micro:step={fault.step}:kill",
        "kill_micro": f"step.backward:{fault.number}:kill",
        "term_micro": f"step.backward:{fault.number}:term",
        "int_micro": f"step.backward:{fault.number}:int",
        "nan": f"step.micro:step={fault.step}:nan",
        "oom": f"step.micro:tokens>{fault.number * TOKENS_PER_ROW}:oom",
        "planted": fault.text,
    }.get(fault.kind, "")
