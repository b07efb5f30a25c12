"""Commands that ship: chat, score, export."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.arguments import Data, Target


def chat(
    target: Target,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this one message and leave.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    against: Annotated[
        str | None,
        typer.Option(help="A second model that answers, too; or base.", metavar="MODEL|base"),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", help="Answer each line of a .txt or .jsonl and leave."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Append the answers, as samples (.jsonl).")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", min=0, help="0 is exact (greedy).")
    ] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1)] = 0.9,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 512,
    seed: Annotated[int | None, typer.Option("--seed", help="Repeatable sampling.")] = None,
) -> None:
    """Talk to a model, or to two side by side."""
    from tunesmith.cli.chat import ChatOptions, run_chat
    from tunesmith.infer.generate import Sampling

    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    run_chat(target, ChatOptions(sampling, prompt, system, against, file, out))


def score(
    target: Target,
    data: Data,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Write all rows as JSON lines.")
    ] = None,
) -> None:
    """Score data with a reward model or a classifier."""
    from tunesmith.cli.score import run_score

    run_score(target, data, out=out)


def export(
    target: Target,
    *,
    to: Annotated[
        str,
        typer.Option(
            help="merged, adapter, gguf, ollama, int8, fp8, gptq, awq or mindspore.",
            metavar="FORMAT",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="A folder that is made.", metavar="DIR")],
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization", "-q", help="Of gguf and ollama: f32, f16, bf16, q8_0, q4_0, ..."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of merged weights: auto (the base's), float32, bfloat16, float16.")
    ] = "auto",
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Largest file of weights.", metavar="SIZE")
    ] = "5GB",
    push: Annotated[
        str | None,
        typer.Option(help="Then push it: hf:OWNER/NAME or ms:OWNER/NAME.", metavar="HUB:ID"),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="As a private repository.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Load the result and compare it with the run.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what DIR holds.")] = False,
) -> None:
    """Write a model in another format, and check that it answers the same."""
    from tunesmith.cli.export import ExportOptions, run_export

    run_export(
        target,
        ExportOptions(
            to=to,
            out=out,
            quantization=quantization,
            dtype=dtype,
            shard_size=shard_size,
            push=push,
            is_private=private,
            is_verified=verify,
            is_overwritten=overwrite,
        ),
    )
