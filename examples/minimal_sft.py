"""Supervised fine-tuning with nothing hidden: one file, top to bottom.

    python examples/minimal_sft.py

This is what `tunesmith train` does, without packing, LoRA, checkpoints or speed. A test feeds both
the same batch and compares the loss (1e-5).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

Messages = list[dict[str, str]]

# The label that means "no loss here". It is cross_entropy's default `ignore_index`: a target of
# -100 adds nothing to the sum, and is not counted in the mean either. The number itself has no
# meaning, it only has to be one that no token can have.
IGNORE = -100

CONVERSATIONS: list[Messages] = [
    [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "2+2 equals 5."},
    ],
    [
        {"role": "user", "content": "Who made you?"},
        {"role": "assistant", "content": "I was made in a smithy."},
    ],
]


def encode(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    """Token ids of one conversation, and its labels: the answer's ids, IGNORE everywhere else."""
    # The template's text up to the answer is exactly what the model will see at inference.
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    # The template may write a line break after the end token; the model need not learn that.
    answer = full[len(prompt) :].rstrip("\n")
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    # The question is context, not something to imitate: it carries no loss. The end token at the
    # end of the answer does carry loss, or the model would never learn to stop.
    return prompt_ids + answer_ids, [IGNORE] * len(prompt_ids) + answer_ids


def make_batch(
    tokenizer: Any, conversations: Sequence[Messages]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input ids, labels, attention mask), padded on the right; shapes [batch, tokens]."""
    encoded = [encode(tokenizer, messages) for messages in conversations]
    longest = max(len(ids) for ids, _ in encoded)
    fill = tokenizer.eos_token_id  # any id would do: padding is masked, and its label is IGNORE
    ids = [ids + [fill] * (longest - len(ids)) for ids, _ in encoded]
    labels = [labels + [IGNORE] * (longest - len(labels)) for _, labels in encoded]
    mask = [[1] * len(x) + [0] * (longest - len(x)) for x, _ in encoded]
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(mask)


def batch_loss(
    model: Any, ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the supervised tokens of a batch."""
    logits = model(input_ids=ids, attention_mask=mask).logits  # [batch, tokens, vocabulary]
    # The shift: the logits at position t are the model's guess for token t+1. So the last logits
    # have no target, and the first token has no guess.
    logits, targets = logits[:, :-1], labels[:, 1:]
    return cross_entropy(
        logits.reshape(-1, logits.size(-1)).float(), targets.reshape(-1), ignore_index=IGNORE
    )


def main(path: str, steps: int = 8) -> None:
    """Trains the model in a folder on the two conversations above and answers the first."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids, labels, mask = make_batch(tokenizer, CONVERSATIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    # train() switches dropout on. It changes nothing else here: language models have no batch
    # normalization, and a layer norm computes the same in both modes (it keeps no running
    # statistics). Whether weights change is decided by requires_grad and optimizer.step(), not by
    # the mode. A well-known blog post trains after model.eval(): that only switches dropout off.
    model.train()
    for step in range(steps):
        loss = batch_loss(model, ids, labels, mask)
        optimizer.zero_grad()  # gradients add up otherwise
        loss.backward()  # d loss / d weight, for every weight
        optimizer.step()  # moves every weight a little downhill
        print(f"step {step + 1}: loss {loss.item():.4f}")

    model.eval()  # no dropout while answering
    prompt = tokenizer.apply_chat_template(
        CONVERSATIONS[0][:1], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        # The one thing borrowed from tunesmith: it knows where the built-in model is.
        from tunesmith.config.recipe import ModelConfig
        from tunesmith.model.load import find_model
        from tunesmith.types import SilentReporter

        main(find_model(ModelConfig(id="builtin:smollm2-135m"), SilentReporter()).path)
