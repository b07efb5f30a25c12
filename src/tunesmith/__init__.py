"""tunesmith turns a pretrained language model into a specialist on somebody's own data.

In Python, `load_recipe` and `fine_tune` do what `tunesmith train` does:

    from tunesmith import fine_tune, load_recipe

    run, summary = fine_tune(load_recipe("recipe.yaml", ["train.epochs=3"]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.config.load import load_recipe
from tunesmith.errors import TunesmithError

if TYPE_CHECKING:
    from tunesmith.train import train as fine_tune

__version__ = "0.1.0"
__all__ = ["TunesmithError", "__version__", "fine_tune", "load_recipe"]


def __getattr__(name: str) -> Any:
    # train.py brings torch; `tunesmith --help` must not wait for it.
    if name == "fine_tune":
        from tunesmith.train import train

        return train
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
