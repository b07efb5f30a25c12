"""TRL's own preprocessing of a file of messages, timed: what `SFTTrainer` does before it trains.

Run by the python of an environment with `pip install trl`:

    peer/bin/python trl_data.py --data rows.jsonl --tokenizer qwen3/ --processes 2

The trainer is a real one around a model of no size. Timed are loading the file and the trainer's
`_prepare_dataset` with assistant-only loss. For that loss TRL swaps in a training variant of the
chat template, if it knows the template to the letter. It does not know every revision of Qwen3's,
so the tokenizer gets the one that TRL carries (`--template` names the file). The training variant
puts an empty thought before every answer and supervises it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preprocessing import Clock, Work, copy_tokenizer, peer_work, print_result, result_of

PACKAGES = ("trl", "transformers", "tokenizers", "datasets", "torch")


def main() -> None:
    """Preprocesses and prints one line."""
    with peer_work(__doc__, template="qwen3") as work:
        clock = Clock()
        dataset = preprocess(work, clock)
        print_result(result_of(dataset, work, clock, {}, PACKAGES))


def preprocess(work: Work, clock: Clock) -> Any:
    """The training set that the trainer would feed on."""
    import trl
    from datasets import Dataset, load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class TimedTrainer(SFTTrainer):
        """Books the time of the preparation."""

        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            with clock.whole():
                return super()._prepare_dataset(*args, **kwargs)

    tokenizer = AutoTokenizer.from_pretrained(copy_tokenizer(work, {"model_type": "qwen3"}))
    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / f"{work.template}.jinja").read_text(encoding="utf-8")
    config = SFTConfig(
        output_dir=str(work.folder / "output"),
        max_length=work.max_length,
        assistant_only_loss=True,
        dataset_num_proc=work.num_proc,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    model = smallest_model(len(tokenizer))
    Dataset.map = clock.timed(Dataset.map, "map")
    with clock.whole():
        rows = clock.timed(load_dataset, "Loading the file")(
            "json", data_files=str(work.data), split="train"
        )
    loaded = clock.started
    trainer = TimedTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    clock.started = loaded
    return trainer.train_dataset


def smallest_model(num_tokens: int) -> Any:
    """A Qwen3 that costs nothing: the trainer wants one, the preparation does not."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=num_tokens,
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=4,
        )
    )


if __name__ == "__main__":
    main()
