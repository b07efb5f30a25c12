"""Predictions a second: tunesmith, LLaMA-Factory's `predict_with_generate`, plain transformers.

    OMP_NUM_THREADS=1 python benchmarks/predict.py RUN DATA --rows 100 --llamafactory PYTHON

All sides answer the same rendered prompts greedily with the same base, adapter and number format,
one after another, each in a process of its own. Loading is left out. Answers are compared: what is
measured must be equal work. LLaMA-Factory's python needs jieba, nltk and rouge-chinese.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.predict_work import Clock, Work, write_result

PEER = Path(__file__).parent / "peers" / "predict_llamafactory.py"


def main() -> None:
    """Measures the sides asked for and prints a table."""
    options = read_options()
    if options.child:
        children = {"tunesmith": tunesmith_side, "transformers": transformers_side}
        children[options.child](options.folder, options.batch_size)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        work = make_work(options, folder)
        sides = [("tunesmith", 0), *(("transformers", n) for n in options.transformers)]
        if options.llamafactory:
            sides += [("llamafactory", n) for n in options.batch_sizes]
        found = {side: run_side(side, folder, options) for side in sides}
    show(work, found)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", help="a run directory with an adapter")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--llamafactory", type=Path, help="python with LLaMA-Factory 0.9.5")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[8, 32], help="of its runs")
    parser.add_argument("--transformers", type=int, nargs="*", default=[8], help="batch sizes")
    parser.add_argument("--folder", type=Path, help="kept, with every side's answers")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_work(options: argparse.Namespace, folder: Path) -> Work:
    """The rows as tunesmith renders them, and an adapter that names its base by a folder."""
    from tunesmith.cli.answering import open_target
    from tunesmith.cli.check import load_data
    from tunesmith.data.sources import find_sources
    from tunesmith.infer.answerer import find_answerer
    from tunesmith.types import SilentReporter

    reporter = SilentReporter()
    loaded = load_data([options.data])
    sources = find_sources(loaded.recipe.data, loaded.locate, reporter).train
    opened = open_target(options.run, sources, loaded, reporter, rows=options.rows)
    answerer = find_answerer(options.run, reporter)
    if answerer.adapter is None:
        raise ValueError(f"{options.run} has no adapter")
    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    weights = (answerer.adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    settings = json.loads((answerer.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = answerer.base.path
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    work = Work(
        model=answerer.base.path,
        adapter=str(adapter.resolve()),
        dtype=options.dtype,
        max_new_tokens=options.max_new_tokens,
        threads=options.threads,
        rows=[
            {"prompt": each.prompt, "ids": list(each.ids), "label": each.label or "", "id": each.id}
            for each in opened.questions
        ],
    )
    work.write(folder)
    return work


def run_side(
    side: tuple[str, int], folder: Path, options: argparse.Namespace
) -> dict[str, Any] | None:
    """One side in a process of its own; None if it failed."""
    name, size = side
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    command += ["--batch-size", str(size)]
    if name == "llamafactory":
        command = [str(options.llamafactory), str(PEER), str(folder), str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    log = folder / f"{name}-{size}.log"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if code:
        print(f"{name} {size} failed; see {log}", file=sys.stderr)
        return None
    found = json.loads((folder / f"{name}-{size}.json").read_text(encoding="utf-8"))
    print(f"{name} {size}: {found['wall']:.0f} s, {found['cpu']:.0f} CPU s", flush=True)
    return found


def tunesmith_side(folder: Path, _: int) -> None:
    """What `tunesmith predict` does once its rows are read."""
    import torch

    from tunesmith.infer.answerer import find_answerer, load_answerer
    from tunesmith.infer.answers import Answering
    from tunesmith.model.device import find_device, prepare_machine
    from tunesmith.types import SilentReporter

    work = Work.read(folder)
    prepare_machine(find_device())
    torch.set_num_threads(work.threads)
    answerer = find_answerer(work.adapter, SilentReporter(), dtype=work.dtype)
    loaded = load_answerer(answerer, answerer.tokenizer(), SilentReporter())
    asked = [Asked(row["id"], tuple(row["ids"])) for row in work.rows]
    clock = Clock()
    found = dict(loaded.engine.answer(asked, Answering(max_new_tokens=work.max_new_tokens)))
    seconds = clock.seconds()
    texts = [found[place].text for place in range(len(asked))]
    packages = ("torch", "transformers", "peft")
    write_result(folder / "tunesmith-0.json", texts, seconds, packages)


class Asked:
    """A row, as far as the engine looks at it."""

    prompt = ""
    messages: tuple[Any, ...] = ()
    tools: tuple[Any, ...] = ()

    def __init__(self, row_id: str, ids: tuple[int, ...]) -> None:
        self.id, self.ids = row_id, ids


def transformers_side(folder: Path, batch_size: int) -> None:
    """A script as people write it: the adapter by PEFT, padded batches in the data's order."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work = Work.read(folder)
    torch.set_num_threads(work.threads)
    tokenizer: Any = AutoTokenizer.from_pretrained(work.model)
    dtype = getattr(torch, work.dtype)
    base = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype)
    model: Any = PeftModel.from_pretrained(base, work.adapter).eval()
    filler = tokenizer.pad_token_id or tokenizer.eos_token_id
    texts: list[str] = []
    clock = Clock()
    for start in range(0, len(work.rows), batch_size):
        prompts = [row["ids"] for row in work.rows[start : start + batch_size]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[filler] * (longest - len(each)) + each for each in prompts])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=work.max_new_tokens,
                pad_token_id=filler,
            )
        texts += tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    packages = ("torch", "transformers", "peft")
    write_result(folder / f"transformers-{batch_size}.json", texts, clock.seconds(), packages)


def show(work: Work, found: dict[tuple[str, int], dict[str, Any] | None]) -> None:
    """The table: rows a second, CPU seconds, how far the answers are the same work."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(work.model)
    own = found["tunesmith", 0]
    if own is None:
        raise RuntimeError("tunesmith's side failed")
    print(f"\n{len(work.rows)} rows, at most {work.max_new_tokens} new tokens, {work.dtype}")
    print("| side | rows/s | CPU s | ratio of CPU s | new tokens | answers equal to ours |")
    print("|---|---|---|---|---|---|")
    for (name, size), side in found.items():
        if side is None:
            continue
        tokens = sum(len(tokenizer.encode(t, add_special_tokens=False)) for t in side["texts"])
        pairs = zip(side["texts"], own["texts"], strict=True)
        equal = sum(one.strip() == other.strip() for one, other in pairs)
        label = f"{name}, batches of {size}" if size else name
        print(
            f"| {label} | {len(work.rows) / side['wall']:.2f} | {side['cpu']:.0f} "
            f"| {side['cpu'] / own['cpu']:.1f} | {tokens:,} | {equal}/{len(work.rows)} |"
        )
        print(f"<!-- {label}: {side['versions']} -->", file=sys.stderr)


if __name__ == "__main__":
    main()
