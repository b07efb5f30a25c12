"""Numbers, times and texts as people read them."""

from __future__ import annotations

import re

from tunesmith.io.redact import redact

CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
ROUGE = re.compile(r"rouge_?(word_)?([12l])(?=_|$)")
NAMES = {
    "eval_loss": "validation loss",
    "f05": "F0.5",
    "f0.5": "F0.5",
    "f1": "F1",
    "bleu": "BLEU",
    "bleu4": "BLEU-4",
    "chrf": "chrF",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "cer": "CER",
    "wer": "WER",
    "json": "JSON",
    "kl": "KL",
    "llamafactory": "(LLaMA-Factory)",
}
"""Words of metrics' names that are no ordinary words."""


def metric_name(name: str) -> str:
    """`correction_f05` as `correction F0.5`."""
    rouge = ROUGE.match(name)
    start = f"ROUGE-{rouge[2].upper()}{' by words' if rouge[1] else ''} " if rouge else ""
    words = name[rouge.end() :].split("_") if rouge else name.split("_")
    return (start + " ".join(NAMES.get(word, word) for word in words if word)).strip()


def figure(value: float | None) -> str:
    """Three digits, of small numbers three decimals; whole and large ones with commas."""
    if value is None:
        return "–"
    size = abs(value)
    if isinstance(value, int) or size >= 100:
        return f"{value:,.0f}"
    if 0 < size < 5e-4:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    decimals = 3 if size < 1 else 3 - len(str(int(size)))
    return f"{value:.{decimals}f}"


def signed(value: float) -> str:
    """With its sign; a true minus."""
    shown = figure(abs(value))
    return f"+{shown}" if value > 0 else f"−{shown}" if value < 0 else "0"


def percent(value: float) -> str:
    """A share in percent; never 0 % or 100 % of what is only nearly so."""
    shown = 100 * value
    if 0 < abs(shown) < 1:
        return f"{shown:.1g} %"
    if 99 < shown < 100:
        return f"{min(shown, 99.9):.1f} %"
    return f"{shown:.0f} %"


def p_value(value: float) -> str:
    """As papers write it."""
    return (
        "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"
    )


def duration(seconds: float | None) -> str:
    """As `42 s`, `3:16 min` or `2:05 h`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def size(num_bytes: float | None) -> str:
    """Bytes as B, KiB, MiB or GiB."""
    if num_bytes is None:
        return "–"
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 2**power:
            return (
                f"{num_bytes / 2**power:,.2f} {unit}"
                if power == 30
                else (f"{num_bytes / 2**power:,.1f} {unit}")
            )
    return f"{num_bytes:.0f} B"


def counted(count: int, name: str) -> str:
    """A number with its noun: `1 row`, `1,020 rows`."""
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"


def moment(text: str) -> str:
    """A time in ISO's form without its `T` and its parts of a minute."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d).*$", r"\1 \2", text)


def clean(text: str) -> str:
    """What a page may show of a text: no secrets, and control characters as signs of their own."""
    text = redact(text.replace("\r\n", "\n").replace("\r", "\n"))
    return CONTROLS.sub(
        lambda match: chr(0x2400 + ord(match[0])) if match[0] != "\x7f" else "␡", text
    )
