"""LLaMA-Factory's own preprocessing, timed: `get_dataset` on a ShareGPT file, as for training.

Run by the python of a throw-away environment. LLaMA-Factory 0.9.5 imports torchaudio, and pip alone
picks a torch that does not go with it, so the three of one release are named:

    python3 -m venv peer
    peer/bin/pip install llamafactory==0.9.5 torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0
    peer/bin/python llamafactory_data.py --data twin.jsonl --tokenizer qwen3/ --processes 2

Two templates fit Qwen3. `qwen3`, the default here, puts an empty thought before every answer and
supervises it, as TRL does; it encodes the thought anew for each answer. `qwen3_nothink` adds
nothing: fewer tokens and fewer calls. Neither is what Qwen3's own chat template makes, which has
the empty thought only before the last answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from preprocessing import Clock, Work, copy_tokenizer, peer_work, print_result, result_of

DATASET = "rows"

PACKAGES = ("llamafactory", "transformers", "tokenizers", "datasets", "torch")


def main() -> None:
    """Preprocesses and prints one line."""
    with peer_work(__doc__, template="qwen3") as work:
        clock = Clock()
        dataset = preprocess(work, clock)
        print_result(result_of(dataset, work, clock, {}, PACKAGES))


def preprocess(work: Work, clock: Clock) -> Any:
    """The training set, made in the order of LLaMA-Factory's `run_sft`."""
    import llamafactory.data.loader as loader
    from datasets import Dataset
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    write_registry(work)
    model_args, data_args, training_args, _, _ = get_train_args(arguments(work))
    tokenizer_module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], data_args)
    loader.load_dataset = clock.timed(loader.load_dataset, "Loading the file")
    Dataset.map = clock.timed(Dataset.map, "map")
    with clock.whole():
        module = get_dataset(
            template, model_args, data_args, training_args, stage="sft", **tokenizer_module
        )
    return module["train_dataset"]


def write_registry(work: Work) -> None:
    """The `dataset_info.json` that names the file."""
    entry = {
        "file_name": str(work.data.resolve()),
        "formatting": "sharegpt",
        "columns": {"messages": "conversations"},
    }
    registry = work.folder / "dataset_info.json"
    registry.write_text(json.dumps({DATASET: entry}), encoding="utf-8")


def arguments(work: Work) -> dict[str, Any]:
    """A training recipe in LLaMA-Factory's terms; all that is not named keeps its default."""
    model: Path = copy_tokenizer(work, {"model_type": "qwen3"})
    return {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": DATASET,
        "dataset_dir": str(work.folder),
        "template": work.template,
        "cutoff_len": work.max_length,
        "overwrite_cache": True,
        "preprocessing_num_workers": work.num_proc,
        "output_dir": str(work.folder / "output"),
        "report_to": "none",
    }


if __name__ == "__main__":
    main()
