"""The real data sets beside the checkout, for measuring false alarms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
FILES = (
    "llamafactory-demo/alpaca_en_demo.json",
    "llamafactory-demo/alpaca_zh_demo.json",
    "llamafactory-demo/identity.json",
    "grammargpt/instruction.json",
    "grammargpt/nacgec_dev_instruct_zh.json",
)


@pytest.fixture(scope="session")
def real_rows() -> dict[str, list[dict[str, str]]]:
    """Alpaca rows by file name."""
    if not all((SHARED / name).exists() for name in FILES):
        pytest.skip("the shared folder of real data is not beside this checkout")
    return {Path(name).stem: _read(SHARED / name) for name in FILES}


@pytest.fixture(scope="session")
def real_texts(real_rows: dict[str, list[dict[str, str]]]) -> list[str]:
    return [text for rows in real_rows.values() for row in rows for text in row.values() if text]


def _read(path: Path) -> list[dict[str, str]]:
    raw = path.read_text(encoding="utf-8")
    try:
        return json.loads(raw)
    except json.JSONDecodeError:
        return [json.loads(line) for line in raw.splitlines() if line.strip()]
