"""LLaMA-Factory's side of the prediction benchmark: `predict_with_generate`, as it drives it.

    PYTHON predict_llamafactory.py FOLDER BATCH_SIZE

The rows' prompts are rendered already, so its template is `empty`: the tokens of the first prompt
are compared with tunesmith's. The clock runs from the trainer's making to the end of `predict`:
neither the model's loading nor tokenizing counts.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peers.predict_work import Clock, Work, write_result

PACKAGES = ("torch", "transformers", "peft", "llamafactory")


def main(folder: Path, batch_size: int) -> None:
    """Predicts with `run_sft`."""
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from llamafactory.hparams import get_train_args
    from llamafactory.train.sft import run_sft

    work = Work.read(folder)
    torch.set_num_threads(work.threads)
    rows = [{"prompt": row["prompt"], "response": row["label"]} for row in work.rows]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"prompt": "prompt", "response": "response"}
    entry = {"file_name": "rows.json", "formatting": "alpaca", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": entry}), encoding="utf-8")
    out = folder / "llamafactory"
    shutil.rmtree(out, ignore_errors=True)
    callback = clock_callback(work)
    run_sft(*get_train_args(arguments(work, folder, out, batch_size)), callbacks=[callback])
    lines = (out / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["predict"] for line in lines]
    write_result(folder / f"llamafactory-{batch_size}.json", texts, callback.seconds, PACKAGES)


def arguments(work: Work, folder: Path, out: Path, batch_size: int) -> dict[str, Any]:
    """A recipe in LLaMA-Factory's words; all that is not named keeps its default."""
    return {
        "model_name_or_path": work.model,
        "adapter_name_or_path": work.adapter,
        "stage": "sft",
        "do_predict": True,
        "predict_with_generate": True,
        "finetuning_type": "lora",
        "eval_dataset": "rows",
        "dataset_dir": str(folder),
        "template": "empty",
        "cutoff_len": 4096,
        "overwrite_cache": True,
        "output_dir": str(out),
        "per_device_eval_batch_size": batch_size,
        "max_new_tokens": work.max_new_tokens,
        "do_sample": False,
        "bf16": work.dtype == "bfloat16",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def clock_callback(work: Work) -> Any:
    """Starts when the trainer is made, stops when the predictions are there."""
    from transformers import TrainerCallback

    class Timed(TrainerCallback):
        clock = Clock()
        seconds = (0.0, 0.0)
        is_checked = False

        def on_init_end(self, *args: Any, **kwargs: Any) -> None:
            self.clock = Clock()

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            if not self.is_checked:
                self.is_checked = True
                ids = next(iter(kwargs["eval_dataloader"].dataset))["input_ids"]
                if ids != work.rows[0]["ids"]:
                    raise ValueError("other prompt tokens than tunesmith's")

        def on_predict(self, *args: Any, **kwargs: Any) -> None:
            self.seconds = self.clock.seconds()

    return Timed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
