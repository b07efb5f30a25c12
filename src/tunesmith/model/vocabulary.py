"""New tokens: the tokenizer learns them, the model gets rows for them.

Each new row of the embedding, and of a head of its own, begins as the mean of the rows of all
tokens that were there (as transformers begins them, without its tiny noise: so every start builds
the same). With LoRA these rows alone are trained, as PEFT's `trainable_token_indices`.

Shape letters: V tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.config.method import AdapterConfig, FreezeConfig, LoraConfig, Method
from tunesmith.config.recipe import ModelConfig, Recipe
from tunesmith.errors import RecipeError


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What a recipe adds to a model's vocabulary.

    Args:
        plain: tokens that may stand in any text.
        special: tokens that only templates write; in the data's texts they are text.
        multiple: the embedding's rows become a multiple of this.
    """

    plain: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    multiple: int | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """All of them, in the order of their ids."""
        return (*self.special, *self.plain)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.texts or self.multiple)

    def num_rows(self, there: int, num_tokens: int) -> int:
        """Rows that an embedding of `there` rows needs for so many tokens; never fewer."""
        rows, multiple = max(there, num_tokens), self.multiple or 1
        return -(-rows // multiple) * multiple


NOTHING_NEW = NewTokens()


def new_tokens_of(model: ModelConfig) -> NewTokens:
    """What the recipe's model asks for."""
    return NewTokens(
        tuple(model.new_tokens), tuple(model.new_special_tokens), model.pad_vocabulary_to
    )


def extend_tokenizer(tokenizer: Any, new: NewTokens) -> None:
    """Adds the tokens to a tokenizer.

    Raises:
        RecipeError: one is there already (`recipe.known-token`).
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    for key, texts in (("new_special_tokens", new.special), ("new_tokens", new.plain)):
        for text in texts:
            if text in known:
                raise RecipeError(
                    "recipe.known-token",
                    f"model.{key}",
                    found=f"{text!r}, which is token {known[text]} already",
                    expected="texts that are no tokens yet",
                    try_="leave it out; `method: {name: lora, train_tokens: [...]}` trains the "
                    "embeddings of tokens that are there",
                )
    if new.special:
        special = [AddedToken(text, normalized=False, special=True) for text in new.special]
        tokenizer.add_special_tokens(
            {"additional_special_tokens": special}, replace_extra_special_tokens=False
        )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in new.plain])


def ids_of(tokenizer: Any, new: NewTokens) -> list[int]:
    """The ids of the new tokens."""
    return [int(tokenizer.convert_tokens_to_ids(text)) for text in new.texts]


def extend_config(config: Any, new: NewTokens, tokenizer: Any) -> None:
    """Lets a configuration say how many rows the extended embedding has."""
    text = config.get_text_config()
    text.vocab_size = new.num_rows(text.vocab_size, len(tokenizer))


def extend_embeddings(model: Any, new: NewTokens, tokenizer: Any) -> None:
    """Gives a model rows for the new tokens, and writes their first values.

    Args:
        model: on its device; embeddings and head are never quantized.
        new: what is added.
        tokenizer: extended already.
    """
    ids, num_tokens = ids_of(tokenizer, new), len(tokenizer)
    there = model.get_input_embeddings().weight.shape[0]
    make_room(model, new.num_rows(there, num_tokens))
    known = min(there, num_tokens - len(ids))
    weights = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    with torch.no_grad():
        for weight_VH in weights:
            weight_VH[ids] = weight_VH[:known].float().mean(0).to(weight_VH.dtype)
            weight_VH[there:] = weight_VH[:known].float().mean(0).to(weight_VH.dtype)


def make_room(model: Any, num_rows: int) -> None:
    """Gives embedding and head at least so many rows, the new ones without meaning yet."""
    if num_rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(num_rows, mean_resizing=False)


def with_new_tokens(recipe: Recipe, tokenizer: Any, new: NewTokens) -> Recipe:
    """The recipe with the new tokens' embeddings among what is trained.

    Raises:
        RecipeError: the method leaves them as they are (`recipe.new-tokens`), or the rows are
            padded and the result is an adapter.
    """
    if not new:
        return recipe
    method, ids = recipe.method, ids_of(tokenizer, new)
    if new.multiple and isinstance(method, LoraConfig | AdapterConfig):
        raise _refusal(
            "model.pad_vocabulary_to", f"`pad_vocabulary_to` with `method: {method.name}`",
            "`method: full` or `freeze`: who loads an adapter sizes the embedding by its tokenizer",
        )  # fmt: skip
    if isinstance(method, LoraConfig):
        ids = sorted({*method.train_tokens, *ids})
        return _with_method(recipe, method.model_copy(update={"train_tokens": ids}))
    if isinstance(method, AdapterConfig) and method.kind == "TRAINABLE_TOKENS":
        settings = {"token_indices": ids, **method.settings}
        return _with_method(recipe, AdapterConfig(name="adapter", kind=method.kind, **settings))
    if new.texts and not _trains_embeddings(method):
        raise _refusal(
            "model.new_tokens", f"new tokens with `method: {method.name}`",
            "a method that trains their embeddings: lora, full, trainable_tokens, or freeze with "
            "`embeddings: true`",
        )  # fmt: skip
    return recipe


def _with_method(recipe: Recipe, method: Method) -> Recipe:
    return recipe.model_copy(update={"method": method})


def _trains_embeddings(method: Method) -> bool:
    if isinstance(method, FreezeConfig):
        return method.embeddings
    return not isinstance(method, AdapterConfig)


def _refusal(where: str, found: str, expected: str) -> RecipeError:
    return RecipeError("recipe.new-tokens", where, found=found, expected=expected)


def token_layers(model: Any, method: LoraConfig) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices`: the layers with a row for each token, but for whole ones.

    Raises:
        RecipeError: an id is beyond the embedding (`recipe.target`).
    """
    ids = sorted(set(method.train_tokens))
    if not ids:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = embedding.weight.shape[0]
    if ids[-1] >= rows:
        raise RecipeError(
            "recipe.target", "method.train_tokens", found=f"token {ids[-1]}",
            expected=f"ids below {rows}, the rows of the embedding",
        )  # fmt: skip
    is_tied = head is None or head.weight is embedding.weight
    names = {id(module): name for name, module in model.named_modules()}
    wanted = [names[id(each)] for each in ([embedding] if is_tied else [embedding, head])]
    if is_tied and head is not None and _is_whole(names.get(id(head), ""), method):
        return None
    return {name.rpartition(".")[2]: ids for name in wanted if not _is_whole(name, method)} or None


def _is_whole(name: str, method: LoraConfig) -> bool:
    return any(f".{name}".endswith(f".{each}") for each in method.train_modules)


def prepare_token_rows(model: Any) -> None:
    """Keeps the trained rows in fp32, as LoRA's matrices are: PEFT makes them as the weights.

    And lets a head behind PEFT's wrapper say how wide it is.
    """
    for module in model.modules():
        adapter = vars(module)["_modules"].get("token_adapter")
        if adapter is not None:
            module.out_features = adapter.base_layer.weight.shape[0]
    for name, parameter in model.named_parameters():
        if ".trainable_tokens_delta." in name:
            parameter.data = parameter.data.float()


def target_token_layers(model: Any, config: Any) -> None:
    """Lets PEFT's TRAINABLE_TOKENS train rows of a head of its own as well, unless told otherwise.

    Of a new token without a row in the head no model could be made again.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if config.target_modules is None and head is not None and head.weight is not embedding.weight:
        names = {id(module): name for name, module in model.named_modules()}
        config.target_modules = [names[id(each)].rpartition(".")[2] for each in (embedding, head)]


def saves_rows_alone(model: Any) -> dict[str, Any]:
    """Arguments of PEFT's saving: an embedding that was resized is not written beside its rows.

    The rows take the place of the embedding's whatever these are, so any base of the tokenizer's
    size will do, and `AutoPeftModelForCausalLM` makes one.
    """
    if not hasattr(model, "peft_config"):
        return {}
    config, base = model.peft_config["default"], model.get_base_model()
    rows = ("trainable_token_indices", "token_indices")
    is_whole = hasattr(base.get_input_embeddings(), "modules_to_save")
    has_rows = any(getattr(config, key, None) for key in rows)
    return {"save_embedding_layers": False} if has_rows or is_whole else {}
