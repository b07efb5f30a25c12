"""Every method and objective of docs/methods.md, really run: trained, resumed, loaded back.

    python benchmarks/every_method.py --data rows.json --results every_method.jsonl

Each row's recipe trains SmolLM2-135M for a few steps on the first rows of a data file; objectives,
with LoRA, on the example that has what they learn from (--objectives). Then a copy
of the run without its end goes on from an earlier checkpoint, and must write the same bits; and
plain PEFT, or plain transformers, loads the result, whose logits are compared with those of our own
model, with the last checkpoint's weights and our own forward.

A row runs in a process of its own and is stopped after --limit seconds. Results are added to the
file one by one, so the same command goes on where it was stopped; `--only dora ia3` runs these rows
again. At the end the table is printed, or written by --table.

So few steps say nothing about how well a method learns; whether the validation loss falls, they do
say. Seconds are those of training alone; MiB the process at its largest until the result was there.
The exit status is 1 if a row failed, was resumed to other bits, or differs by more than 1e-3.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "builtin:smollm2-135m"
TEXT = "Correct the grammar of this sentence: he go to school every days."
MOST_DIFFERENCE = 1e-3
"""In fp32, of logits around 20: our own forward sums in another order."""


def method_rows(text: str) -> Iterator[tuple[str, str]]:
    """Name and recipe of each row in the tables that have a `method` and a `recipe` column."""
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif not columns:
            columns = cells
        elif {"method", "recipe"} <= set(columns) and not set(line) <= set("|-: "):
            row = dict(zip(columns, cells, strict=False))
            yield row["method"], row["recipe"].strip("`")


EXAMPLES = ROOT / "examples" / "data"
OF_KIND = {
    "Preference": EXAMPLES / "plain-answers.jsonl",
    "Rated": EXAMPLES / "rated-answers.jsonl",
    "Labeled": EXAMPLES / "tickets.jsonl",
    "Text": EXAMPLES / "handbook",
}
"""What objectives learn from that do not learn from conversations."""

REWARDS = ["math", {"kind": "length", "min_tokens": 2, "max_tokens": 16, "weight": 0.5}]
SETTINGS: dict[str, dict[str, Any]] = {
    "exo": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "distill": {"teacher": MODEL, "temperature": 2.0},
    **{
        name: {"rewards": REWARDS, "max_new_tokens": 16, "answers": 4, "updates": 2}
        for name in ("grpo", "dr_grpo", "dapo", "gspo", "rloo")
    },
    "ppo": {"rewards": REWARDS, "max_new_tokens": 16, "updates": 2},
}


def objective_rows() -> Iterator[tuple[str, str]]:
    """Name and recipe of each objective."""
    from tunesmith.objectives import OBJECTIVES

    for name in OBJECTIVES:
        yield name, json.dumps({"objective": {"name": name, **SETTINGS.get(name, {})}})
    yield "sft, dft", json.dumps({"objective": {"name": "sft", "variant": "dft"}})


def data_of(tree: dict[str, Any], data: Path) -> Path:
    """The file that a row learns from."""
    from tunesmith.objectives import OBJECTIVES

    name = tree.get("objective", {}).get("name", "sft")
    if "rewards" in tree.get("objective", {}):
        return EXAMPLES / "sums.jsonl"
    kinds = OBJECTIVES[name].kinds
    return OF_KIND.get(kinds[0], data) if "Conversation" not in kinds else data


def recipe_of(recipe: str, data: Path, output: Path) -> dict[str, Any]:
    """A small run of a row's recipe."""
    import yaml

    tree: dict[str, Any] = yaml.safe_load(recipe)
    model: dict[str, Any] = {**tree.get("model", {}), "id": MODEL, "dtype": "float32"}
    if tree.get("method") == "loftq":
        model["quantize"] = "nf4"  # it goes with nothing else
    return {
        "method": tree.get("method", "lora"),
        "model": model,
        "data": {
            "train": [{"path": str(data_of(tree, data)), "limit": 40}],
            "validation": 4,
            "max_length": "auto" if "objective" in tree else 64,
            "overlong": "auto" if "objective" in tree else "cut_left",
        },
        "objective": tree.get("objective", "sft"),
        "train": {"max_steps": 4, "epochs": 4, "global_batch": 2, "warmup": 0},
        "evaluate": {"every": None},
        "checkpoint": {"every_steps": 2, "keep": 9, "background": False},
        "output": str(output),
    }


def run_row(recipe: str, data: Path, folder: Path) -> dict[str, Any]:
    """Trains, resumes and loads back one row; see the table's columns."""
    from tunesmith.config.load import recipe_with
    from tunesmith.train import train

    loaded = recipe_with(recipe_of(recipe, data, folder / "run"), [])
    run_dir, summary = train(loaded)
    found: dict[str, Any] = {
        "before": summary["eval_loss_before"],
        "after": summary["eval_loss"],
        "seconds": summary["runtime_seconds"],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "result_mib": sum(f.stat().st_size for f in run_dir.model.glob("*.safetensors")) / 2**20,
    }
    half = resume(run_dir.path, folder / "half", recipe, data)
    found["same_bits"] = weights_of(half) == weights_of(run_dir.model)
    found["difference"] = compare(loaded, run_dir)
    return found


def resume(done: Path, half: Path, recipe: str, data: Path) -> Path:
    """Goes on from the first checkpoint in a copy of a finished run; gives its result."""
    from tunesmith.config.load import recipe_with
    from tunesmith.train import train

    shutil.copytree(done, half, ignore=shutil.ignore_patterns("model", "summary.json", "*.png"))
    checkpoints = sorted((half / "checkpoints").iterdir())
    if len(checkpoints) < 2:
        raise RuntimeError("no earlier checkpoint to go on from")
    for later in checkpoints[1:]:
        shutil.rmtree(later)
    run_dir, _ = train(recipe_with(recipe_of(recipe, data, half), []))
    return run_dir.model


def weights_of(folder: Path) -> dict[str, bytes]:
    """The weight files, whole."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def compare(loaded: Any, run_dir: Any) -> float:
    """The largest difference between logits of our model and of what plain libraries load."""
    import torch

    from tunesmith.data.pack import build_batch
    from tunesmith.data.tokenize import TokenSequence, as_ids
    from tunesmith.engine.loop import restore
    from tunesmith.engine.session import open_session
    from tunesmith.engine.signals import StopSignal
    from tunesmith.job import prepare
    from tunesmith.objectives.lm import decode
    from tunesmith.train import build
    from tunesmith.types import SilentReporter

    reporter = SilentReporter()
    job = prepare(loaded, reporter, run_dir.resolved(loaded.recipe))
    with (
        StopSignal("compare") as stop,
        open_session(run_dir, stop, loaded.recipe.guard, ()) as session,
    ):
        run, job, _ = build(job, session, reporter)
        restore(run, job.fingerprints)
    ids: list[int] = job.tokenizer.backend_tokenizer.encode_batch([TEXT], add_special_tokens=False)[
        0
    ].ids
    batch = build_batch([(0, TokenSequence(as_ids(ids), ((1, len(ids) - 1, 1.0),)))])
    if job.source.head is not None:
        return compare_scores(run.model, run_dir.model, ids)
    with torch.no_grad():
        model = run.model.eval()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        ours = base.get_output_embeddings()(decode(base, batch)).float()
        plain = load_plainly(run_dir.model, job.source.path, loaded.recipe.model.quantize)
        theirs = plain(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].float()
    return float((ours - theirs).abs().max())


def compare_scores(model: Any, folder: Path, ids: list[int]) -> float:
    """The same for scores at the last token, of an adapter that its card says how to load."""
    import torch
    from peft import AutoPeftModelForSequenceClassification

    from tunesmith.model.heads import scores_of
    from tunesmith.types import Segments

    ids_T, position_T = torch.tensor(ids), torch.arange(len(ids))
    head = json.loads((folder / "head.json").read_text())
    load: Any = AutoPeftModelForSequenceClassification.from_pretrained
    plain = load(str(folder), dtype=torch.float32, **head).eval()
    with torch.no_grad():
        last = torch.tensor([len(ids) - 1])
        ours = scores_of(model.eval(), ids_T, position_T, Segments((len(ids),)), last).float()
        theirs = plain(input_ids=ids_T[None]).logits.float()
    return float((ours - theirs).abs().max())


def load_plainly(folder: Path, base: str, quantize: str) -> Any:
    """A result as its own card says to load it, on the base as it was trained."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    how: dict[str, Any] = {}
    if quantize == "nf4":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    if quantize == "int8":
        how["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **how)
    if quantize == "int8":  # as it was trained: bitsandbytes' forward rounds inputs, too
        model = model.dequantize(dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)).eval()


# All rows


def run_child(name: str, recipe: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs a row in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--row", recipe, "--data", str(args.data)]
        try:
            done = subprocess.run(
                [*command, "--folder", folder],
                capture_output=True, text=True, timeout=args.limit, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"name": name, "error": f"stopped after {args.limit} s"}
        result = Path(folder) / "result.json"
        if not result.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"name": name, "error": last[:200]}
        return {"name": name, **json.loads(result.read_text())}


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """Results so far; the last one of a name counts."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


def table(results: list[dict[str, Any]], what: str) -> str:
    """The results in Markdown; `what` they are of stands above the names."""
    head = f"| {what} | validation loss before | after | resumed | logits, largest difference |"
    rows = [f"{head} result MiB | seconds | peak MiB |", "|---|---|---|---|---|---|---|---|"]
    for result in results:
        if "error" in result:
            rows.append(f"| {result['name']} | | | {result['error']} | | | | |")
            continue
        same = "same bits" if result["same_bits"] else "**other bits**"
        rows.append(
            f"| {result['name']} | {result['before']:.4f} | {result['after']:.4f} | {same} | "
            f"{result['difference']:.1e} | {result['result_mib']:.2f} | "
            f"{result['seconds']:.1f} | {result['peak_mib']:,} |"
        )
    return "\n".join(rows)


def is_good(result: dict[str, Any]) -> bool:
    """Whether a row did what it is to do."""
    return (
        "error" not in result
        and math.isfinite(result["after"])
        and result["same_bits"]
        and result["difference"] <= MOST_DIFFERENCE
    )


def run_all(args: argparse.Namespace) -> int:
    """Runs what has no result yet; returns the exit status."""
    rows = dict(objective_rows())
    if not args.objectives:
        rows = dict(method_rows((ROOT / "docs" / "methods.md").read_text(encoding="utf-8")))
    unknown = sorted(set(args.only or ()) - set(rows))
    if unknown:
        sys.exit(f"no row {', '.join(unknown)}; there are {', '.join(rows)}")
    results = read_results(args.results)
    for name, recipe in rows.items():
        if name not in args.only if args.only else name in results:
            continue
        results[name] = run_child(name, recipe, args)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(results[name]) + "\n")
        print(json.dumps(results[name]), flush=True)
    done = [results[name] for name in rows if name in results]
    what = "objective" if args.objectives else "method"
    text = table(done, what)
    print(text)
    if args.table is not None:
        before = args.table.read_text(encoding="utf-8").partition(f"\n| {what} ")[0]
        args.table.write_text(f"{before.rstrip()}\n\n{text}\n", encoding="utf-8")
    return 0 if all(map(is_good, done)) else 1


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="rows to train on")
    parser.add_argument("--results", type=Path, default=Path("every_method.jsonl"))
    parser.add_argument("--objectives", action="store_true", help="the objectives, not the methods")
    parser.add_argument("--only", nargs="+", help="run these rows again")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a row")
    parser.add_argument("--table", type=Path, help="a Markdown file whose table is written anew")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is None:
        sys.exit(run_all(args))
    warnings.simplefilter("ignore")
    found = run_row(args.row, args.data.resolve(), args.folder)
    (args.folder / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
