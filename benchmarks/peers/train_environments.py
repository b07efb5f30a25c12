"""Throw-away environments for the peers of the training benchmark.

torch comes first and by its exact version: a range could bring another build, and all sides have
to run on the same one. What pip is told elsewhere (its configuration, its environment variables)
holds here, too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"

TRL = ("trl==1.16.0", "peft", "datasets")

LLAMAFACTORY = "llamafactory==0.9.5"

UNWANTED = ("torch", "torchvision", "torchaudio")
"""LLaMA-Factory asks for all three. The latter two exist for other builds of torch than the one
for CPUs, and training on text uses neither."""


def make_trl(folder: Path) -> Path:
    """An environment with TRL; returns its python. What is there already is taken as it is."""
    python = folder / "bin/python"
    if not python.exists():
        make_environment(folder)
        pip(python, *TRL)
    return python


def make_llamafactory(folder: Path) -> Path:
    """An environment with LLaMA-Factory; returns its python."""
    python = folder / "bin/python"
    if python.exists():
        return python
    make_environment(folder)
    pip(python, "--no-deps", LLAMAFACTORY)
    listing = "import json; from importlib.metadata import requires; "
    listing += "print(json.dumps(requires('llamafactory')))"
    listed = subprocess.run([python, "-c", listing], capture_output=True, text=True, check=True)
    # Once more by name: the range in a requirement must not bring another torch.
    pip(python, TORCH, *wanted(json.loads(listed.stdout)))
    # It imports torchaudio when it starts, and uses it for sound alone: an empty module will do.
    site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = subprocess.run([python, "-c", site], capture_output=True, text=True, check=True)
    module = Path(place.stdout.strip()) / "torchaudio/__init__.py"
    module.parent.mkdir()
    module.write_text('"""Empty: only there to be imported."""\n', encoding="utf-8")
    return python


def wanted(requirements: list[str]) -> list[str]:
    """What a package requires, without its extras and without what is UNWANTED."""
    names = [re.split(r"[^A-Za-z0-9._-]", each, maxsplit=1)[0].lower() for each in requirements]
    return [
        each
        for each, name in zip(requirements, names, strict=True)
        if name not in UNWANTED and "extra ==" not in each
    ]


def make_environment(folder: Path) -> None:
    """A virtual environment with torch."""
    print(f"making {folder} ...", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip(folder / "bin/python", TORCH)


def pip(python: Path, *arguments: str) -> None:
    """Installs."""
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)
