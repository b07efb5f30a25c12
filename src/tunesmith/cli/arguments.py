"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

RecipePath = Annotated[str, typer.Argument(help="The recipe (YAML).", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values that replace the recipe's.", metavar="[KEY.PATH=VALUE]..."),
]
Target = Annotated[
    str, typer.Argument(help="A run directory, adapter, model, or hub id.", metavar="MODEL")
]
Data = Annotated[
    list[str],
    typer.Argument(help="A data file; KEY.PATH=VALUE as for train.", metavar="DATA..."),
]
