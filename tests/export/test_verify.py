"""Verification finds what differs, and says where."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.errors import ExportError
from tunesmith.export.trained import with_defaults
from tunesmith.export.verify import (
    TOLERANCES,
    Prompt,
    Sample,
    check_kept,
    check_logits,
    check_prompts,
    compare,
)


class Words:
    def decode(self, ids: list[int]) -> str:
        return f"w{ids[0]}"


def logits(shift: float = 0.0, at: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(0)
    values = torch.randn(5, 7)
    values[at, 2] += shift
    return [torch.randn(4, 7), values]


SAMPLES = [Sample("rows.json:1", (1, 2, 3, 4)), Sample("rows.json:2", (1, 2, 3, 4, 5))]


def test_equal_logits_are_the_same() -> None:
    figures = compare(logits(), logits())
    assert (figures.tokens, figures.max_difference, figures.agreement) == (9, 0.0, 1.0)
    assert figures.first is None
    check_logits(figures, TOLERANCES["float32"], SAMPLES, Words(), "out")


def test_the_first_difference_is_named() -> None:
    figures = compare(logits(), logits(50.0))
    with pytest.raises(ExportError, match=r"export\.differs") as caught:
        check_logits(figures, TOLERANCES["q8_0"], SAMPLES, Words(), "out")
    was = int(logits()[1][3].argmax())
    assert f"first at rows.json:2, token 4: 'w{was}' became 'w2'" in str(caught.value)
    assert caught.value.exit_code == 10


def test_what_is_no_number_is_a_difference() -> None:
    broken = logits()
    broken[0][0, 0] = float("nan")
    with pytest.raises(ExportError):
        check_logits(compare(logits(), broken), TOLERANCES["4 bits"], SAMPLES, Words(), "out")


def test_padded_vocabularies_are_compared_where_both_know_a_token() -> None:
    longer = [torch.cat([each, torch.zeros(len(each), 2)], 1) for each in logits()]
    assert compare(logits(), longer).max_difference == 0.0


def test_an_export_that_fell_back_to_the_base_is_refused() -> None:
    trained, base = logits(), logits(3.0)
    near, lost = compare(trained, logits(0.1)), compare(trained, logits(4.0))
    said = check_kept(near, compare(trained, base), "out")
    assert said.startswith("training moved the model by")
    assert "lost" not in said
    assert "lost" in check_kept(compare(trained, logits(2.0)), compare(trained, base), "out")
    with pytest.raises(ExportError, match=r"export\.training-lost"):
        check_kept(lost, compare(trained, base), "out")


@pytest.mark.parametrize(
    ("ids", "said"), [([1, 9, 3], "token 2 is 9"), ([1, 2], "token 3 is the end")]
)
def test_the_first_other_token_of_a_prompt_is_named(ids: list[int], said: str) -> None:
    prompts = [Prompt(({"role": "user", "content": "q"},), (1, 2, 3), "rows.json:1")]
    with pytest.raises(ExportError, match=r"export\.prompt-differs") as caught:
        check_prompts(prompts, [ids], "out")
    assert said in str(caught.value)


def test_defaults_hold_unless_a_variable_is_given() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    values: dict[str, Any] = {"thinking": False, "size": 3, "words": ["a'b", None, {"k": True}]}
    text = with_defaults("{{ thinking }}|{{ size }}|{{ words }}", values)
    template = ImmutableSandboxedEnvironment().from_string(text)
    assert template.render() == f"False|3|{values['words']}"
    assert template.render(thinking=True).startswith("True|3")
