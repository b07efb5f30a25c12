"""Labels of a classifier: what they are, and that data has no others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.config.heads import ClassifyConfig
from tunesmith.config.objective import ObjectiveConfig
from tunesmith.data.store import TokenStore
from tunesmith.errors import MAX_PROBLEMS, DataError, Problem


def choose_labels(
    objective: ObjectiveConfig,
    of_model: Sequence[str],
    stores: tuple[TokenStore, TokenStore | None],
) -> tuple[str, ...]:
    """The labels of a classifier, in the order of its head's rows; none for other objectives.

    Args:
        objective: of the recipe.
        of_model: what the model tells apart already; empty if it is no classifier.
        stores: of the training data, and of validation data of its own.

    Raises:
        DataError: the data has labels that are not among them (`data.label`), or only one.
    """
    if not isinstance(objective, ClassifyConfig):
        return ()
    (train, validation), is_auto = stores, objective.labels == "auto"
    labels = tuple(sorted(train.labels) if objective.labels == "auto" else objective.labels)
    if is_auto and set(labels) <= set(of_model):
        labels = tuple(of_model)  # in this order its head has learned them
    if len(labels) < 2:
        found = f"the label {labels[0]!r} alone" if labels else "no labels"
        problem = Problem(str(train.origin(0)), "data.label", found, "at least two labels")
        raise DataError([problem])
    _check_known(train, labels, "the recipe's `objective.labels`")
    if validation is not None:
        _check_known(validation, labels, "the training data")
    return labels


def _check_known(store: TokenStore, labels: Sequence[str], known_from: str) -> None:
    unknown = [number for number, label in enumerate(store.labels) if label not in labels]
    found = np.flatnonzero(np.isin(store.sample_labels, unknown))
    problems = [
        Problem(
            str(store.origin(int(sample))),
            "data.label",
            f"the label {store.labels[int(store.sample_labels[sample])]!r}",
            f"one of {known_from}: {', '.join(labels[:12])}{', ...' if len(labels) > 12 else ''}",
        )
        for sample in found[:MAX_PROBLEMS]
    ]
    if problems:
        raise DataError(problems, num_problems=len(found))
