"""How long packing takes, and how much room it leaves.

    python benchmarks/packing.py

Lengths: those of LLaMA-Factory's demo data and GrammarGPT (characters / 2, ten per cent of noise),
repeated to the number wanted, and two lognormal ones as of chats.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tunesmith.data.pack import pack

SHARED = Path(__file__).parents[1] / "../shared/data"
FILES = ("llamafactory-demo/alpaca_zh_demo.json", "llamafactory-demo/alpaca_en_demo.json")
FILES += ("grammargpt/instruction.json",)


def main() -> None:
    """Packs every distribution into every budget and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, default=1_000_000)
    count = parser.parse_args().lengths
    random = np.random.default_rng(0)
    chats = {
        f"lognormal, median {median}": np.exp(random.normal(np.log(median), 0.9, count))
        for median in (500, 1500)
    }
    for name, lengths in {"real": real_lengths(random, count), **chats}.items():
        for budget in (2048, 8192):
            show(name, np.clip(lengths, 10, 8192).astype(int).tolist(), budget)


def real_lengths(random: np.random.Generator, count: int) -> np.ndarray:
    """Lengths of real rows with noise."""
    rows = [row for name in FILES for row in json.loads((SHARED / name).read_text("utf-8"))]
    characters = np.array([sum(map(len, map(str, row.values()))) for row in rows])
    return random.choice(characters, count) / 2 * random.uniform(0.9, 1.1, count)


def show(name: str, lengths: Sequence[int], budget: int) -> None:
    """One line: time, bins, and waste; what is longer than the budget has a bin of its own."""
    started = time.perf_counter()
    bins = pack(lengths, budget)
    seconds = time.perf_counter() - started
    shared = [b for b in bins if lengths[b[0]] <= budget]
    filled = sum(lengths[index] for b in shared for index in b)
    assert sorted(index for b in bins for index in b) == list(range(len(lengths)))
    waste = 1 - filled / (len(shared) * budget)
    print(f"| {name} | {budget} | {seconds:.2f} s | {len(bins):,} | {100 * waste:.3f} % |")


if __name__ == "__main__":
    main()
