"""What becomes of a run when something goes wrong: tunesmith beside its peers.

    python benchmarks/faults_vs_peers.py --make-peers peers/

That makes the peers' environments and runs all rows. Environments that exist are named by --hf
(transformers and PEFT), --trl and --llamafactory; a peer without one is left out. `--rows 1,18,34`
and `--tools tunesmith trl` take a part, `--markdown FILE` and `--json FILE` write the table.

The rows are those of docs/reliability.md that need neither a GPU nor a network. Every tool trains
LoRA on the same tiny model and the same 40 rows in 20 steps, saves every 4 and keeps 3, and is
started again as its users do: Trainer and SFTTrainer with `resume_from_checkpoint=True`,
LLaMA-Factory and tunesmith by the same command. Faults come from outside or through what users may
register (callbacks, hooks on a model, resource limits); nothing of a tool is replaced. tunesmith's
are planted by TUNESMITH_FAULT at the same places.

A row is passed (1), half passed (0.5), or failed (0); rows that a tool has nothing for do not
count. Each verdict has the line of evidence that it rests on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fault_rows.bench import FAIL, SCORES, Bench, Verdict
from fault_rows.matrix import ROWS, Row
from fault_rows.tiny_model import write_tiny_model
from fault_rows.tools import Peer, Tool, Tunesmith
from peers import train_environments

NAMES = {"hf": "HF Trainer", "trl": "TRL", "llamafactory": "LLaMA-Factory"}


def main() -> int:
    """Runs the rows, prints and writes the table; exit status 1 if tunesmith fails one."""
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        root = Path(name)
        write_tiny_model(root / "model")
        write_tiny_model(root / "able", spread=0.2)
        found: dict[str, dict[str, Verdict]] = {}
        for tool in make_tools(options, root):
            folder = root / tool.kind
            (folder / "runs").mkdir()
            bench = Bench(tool, folder / "runs", root)
            found[tool.name] = run_rows(bench, chosen_rows(options.rows))
            tool.server.close()
    print(table(found))
    if options.markdown:
        options.markdown.write_text(table(found) + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(report(found), indent=1) + "\n", encoding="utf-8")
    own = found.get("tunesmith", {})
    return int(any(verdict.score == FAIL for verdict in own.values()))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", help="python of an environment that has transformers and peft")
    parser.add_argument("--trl", help="python of an environment that has trl")
    parser.add_argument("--llamafactory", help="python of an environment that has llamafactory")
    parser.add_argument("--make-peers", type=Path, help="folder for their environments")
    parser.add_argument("--tools", nargs="+", choices=["tunesmith", *NAMES])
    parser.add_argument("--rows", help="numbers with commas; all where it is not given")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--json", type=Path, help="write the verdicts here")
    options = parser.parse_args()
    if options.make_peers:
        folder = options.make_peers.resolve()
        options.trl = options.trl or str(train_environments.make_trl(folder / "trl"))
        made = train_environments.make_llamafactory
        options.llamafactory = options.llamafactory or str(made(folder / "llamafactory"))
        options.hf = options.hf or options.trl
    return options


def make_tools(options: argparse.Namespace, root: Path) -> list[Tool]:
    """tunesmith and those peers that there is an environment for."""
    tools: list[Tool] = []
    wanted = options.tools or ["tunesmith", *NAMES]
    if "tunesmith" in wanted:
        (root / "tunesmith").mkdir()
        tools.append(Tunesmith(root / "tunesmith"))
    for kind, name in NAMES.items():
        python = getattr(options, kind)
        if kind in wanted and python:
            (root / kind).mkdir()
            tools.append(Peer(name, kind, python, root / kind))
    return tools


def chosen_rows(numbers: str | None) -> list[Row]:
    """The rows of some numbers."""
    wanted = None if numbers is None else set(numbers.split(","))
    return [row for row in ROWS if wanted is None or row.number in wanted]


def run_rows(bench: Bench, rows: list[Row]) -> dict[str, Verdict]:
    """All rows of one tool."""
    found: dict[str, Verdict] = {}
    for row in rows:
        started = time.monotonic()
        try:
            verdict = row.check(bench)
        except (OSError, RuntimeError, LookupError, ValueError) as error:
            # A row that cannot be judged must not take the others with it.
            verdict = Verdict("error", f"{type(error).__name__}: {str(error)[-600:]}")
        seconds = time.monotonic() - started
        found[row.number] = verdict
        text = (
            f"{bench.tool.name} {row.number}: {verdict.score} ({seconds:.0f} s) {verdict.evidence}"
        )
        print(text, file=sys.stderr, flush=True)
    return found


def share(verdicts: dict[str, Verdict]) -> tuple[float, int]:
    """Points, and rows that count."""
    points = [SCORES[each.score] for each in verdicts.values() if each.score in SCORES]
    return sum(points), len(points)


def table(found: dict[str, dict[str, Verdict]]) -> str:
    """Markdown: verdicts, then the evidence of each row."""
    names = list(found)
    numbers = list(next(iter(found.values()), {}))
    rows = {row.number: row for row in ROWS}
    lines = ["| row | fault | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for number in numbers:
        cells = " | ".join(found[name][number].score for name in names)
        lines.append(f"| {number} | {rows[number].title} | {cells} |")
    totals = [share(found[name]) for name in names]
    cells = " | ".join(
        f"{points:g} of {count} ({points / max(count, 1):.0%})" for points, count in totals
    )
    lines += [f"| | share | {cells} |", ""]
    for number in numbers:
        lines += [f"**{number}. {rows[number].title}.** Expected: {rows[number].expected}.", ""]
        for name in names:
            verdict = found[name][number]
            lines.append(f"- {name}, {verdict.score}: {verdict.evidence.replace('|', '/')}")
        lines.append("")
    return "\n".join(lines).rstrip()


def report(found: dict[str, dict[str, Verdict]]) -> dict[str, Any]:
    """The same for a program."""
    return {
        name: {
            "points": share(verdicts)[0],
            "rows": share(verdicts)[1],
            "verdicts": {
                number: {"score": verdict.score, "evidence": verdict.evidence}
                for number, verdict in verdicts.items()
            },
        }
        for name, verdicts in found.items()
    }


if __name__ == "__main__":
    sys.exit(main())
