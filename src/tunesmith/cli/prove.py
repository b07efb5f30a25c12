"""Commands that prove: predict, evaluate, report, compare, sweep."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.arguments import Data, Overrides, RecipePath, Target

NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Longest answer.", metavar="N")
]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", min=0, help="0 takes the likeliest token.")
]
Rows = Annotated[int | None, typer.Option("--rows", min=1, help="The first N rows alone.")]
Engine = Annotated[
    str,
    typer.Option(
        help="transformers, vllm, or the URL of an OpenAI-compatible server.", metavar="NAME|URL"
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Text that ends an answer; may be repeated.", metavar="TEXT"),
]


def predict(
    target: Target,
    data: Data,
    *,
    out: Annotated[str, typer.Option("--out", "-o", help="Where the predictions go (.jsonl).")],
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint",
            help="Of a run: a checkpoint (a step), or `all`; may be repeated. Each has a file.",
            metavar="STEP",
        ),
    ] = None,
    engine: Engine = "transformers",
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1)] = 1.0,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1)] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling: the same again.")] = 0,
    stop: Stop = None,
    system: Annotated[
        str | None, typer.Option("--system", help="A system message for rows without one.")
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Log-probabilities of the answers' tokens.")
    ] = False,
    rows: Rows = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Anew, not on from what the file has.")
    ] = False,
) -> None:
    """Answer every row of a data file; run again, it goes on where it stopped."""
    from tunesmith.cli.predict import PredictOptions, run_predict

    run_predict(
        target,
        data,
        PredictOptions(
            out=out,
            checkpoints=tuple(checkpoints or ()),
            engine=engine,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=tuple(stop or ()),
            system=system,
            has_logprobs=logprobs,
            rows=rows,
            is_restarted=restart,
        ),
    )


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            help="A run, adapter, model or hub id; or a file that predict wrote.", metavar="TARGET"
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help="A data file; a run's own held-out rows if left out; KEY.PATH=VALUE as for train.",
            metavar="[DATA...]",
        ),
    ] = None,
    *,
    against: Annotated[
        str,
        typer.Option(help="What it is compared with: base, none, or another model or run."),
    ] = "base",
    metrics: Annotated[
        str, typer.Option(help="Names with commas, or auto: those that fit the data.")
    ] = "auto",
    benchmarks: Annotated[
        list[str] | None,
        typer.Option("--benchmark", help="A task of lm-eval; may be repeated.", metavar="TASK"),
    ] = None,
    tasks_folder: Annotated[
        str | None, typer.Option("--tasks", help="A folder of own lm-eval tasks.", metavar="DIR")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="A model that judges: URL of an OpenAI-compatible server.", metavar="URL"
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", help="Its name there.")
    ] = None,
    engine: Engine = "transformers",
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    stop: Stop = None,
    rows: Rows = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", help="Folder of the results; of a run: its own.", metavar="DIR"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Metric `code` may run what a model wrote.")
    ] = False,
) -> None:
    """Measure a model on data, beside the one it began as."""
    from tunesmith.cli.evaluate import EvaluateOptions, run_evaluate

    run_evaluate(
        target,
        data or [],
        EvaluateOptions(
            against=against,
            metrics=metrics,
            benchmarks=tuple(benchmarks or ()),
            tasks_folder=tasks_folder,
            judge=judge,
            judge_model=judge_model,
            engine=engine,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=tuple(stop or ()),
            rows=rows,
            out=out,
            is_json=as_json,
            allows_code=allow_code,
        ),
    )


def report(
    run: Annotated[str, typer.Argument(help="A run directory.", metavar="RUN")],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Another place than RUN/report.html.")
    ] = None,
) -> None:
    """Write a run's report.html anew: one file with all that is known of it."""
    from tunesmith.cli.report import run_report

    run_report(run, out=out)


def compare(
    runs: Annotated[list[str], typer.Argument(help="Run directories.", metavar="RUN...")],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Also as a page.", metavar="HTML")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Put runs side by side: what differs in their recipes, their curves, their results."""
    from tunesmith.cli.compare import run_compare

    run_compare(runs, out=out, as_json=as_json)


def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    trials: Annotated[
        int | None,
        typer.Option("--trials", "-n", min=1, help="How many; the recipe's if left out."),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Search anew.")] = False,
) -> None:
    """Search for the best values of a recipe; run again, it goes on where it stopped."""
    from tunesmith.cli.sweep import run_sweep

    run_sweep(recipe, overrides or [], trials=trials, restart=restart)
