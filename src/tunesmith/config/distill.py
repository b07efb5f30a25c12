"""The recipe's `objective: distill`: a teacher to be followed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tunesmith.config.base import Strict


class DistillConfig(Strict):
    """Learning another model's probabilities, all of them, on the tokens that carry loss."""

    name: Literal["distill"]
    teacher: str
    """A model with the same tokenizer: a folder, a hub id, a `.gguf` file, a built-in one, a run
    directory, or a LoRA adapter, which is put on the model it was made for."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """KL(teacher || student), which covers all that the teacher does; KL(student || teacher), which
    keeps to what it does most; or a mixture of both (arXiv 2306.13649 §2)."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of jsd: the teacher's share of the mixture; near 0 it is as forward, near 1 as reverse."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both models' logits; above 1 unlikely tokens count more. Gradients are not multiplied
    by its square."""
    sft_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the plain loss on the data's own tokens; the divergence has the rest."""
    teacher_quantize: Literal["none", "nf4"] = "none"
    """How the teacher's weights are kept; nf4 is 4.13 bits a weight. Needs bitsandbytes."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> DistillConfig:
        if self.divergence != "jsd" and "beta" in self.model_fields_set and self.beta != 0.5:
            raise ValueError("`beta` with `divergence: jsd`")
        if self.sft_weight == 1.0:
            raise ValueError("`sft_weight` below 1: at 1 nothing is learned from the teacher (sft)")
        return self
