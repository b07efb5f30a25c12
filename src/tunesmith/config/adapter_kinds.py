"""PEFT's kinds of adapters: which can be trained here, and why the others cannot."""

from __future__ import annotations

TUNER_KINDS = (
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "PEANUT",
    "PSOFT",
    "RANDLORA",
    "ROAD",
    "SUPERTUNING",
    "TINYLORA",
    "TRAINABLE_TOKENS",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
)
"""Put into or around the model's own modules."""

PROMPT_KINDS = ("P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")
"""Virtual tokens before every sequence, or their keys and values in every layer."""

ADAPTER_KINDS = (*TUNER_KINDS, *PROMPT_KINDS)

REFUSED_KINDS = {
    "LORA": "it has a method of its own, `method: lora`",
    "ADAMSS": "it needs scikit-learn, and PEFT must be called after every step",
    "ADALORA": "PEFT must be called after every step, with the gradients, to share out its ranks",
    "ADAPTION_PROMPT": "PEFT puts it into layers by replacing their attention",
    "CARTRIDGE": "it starts from the keys and values of a text",
    "CPT": "it has a loss of its own, and types of tokens that a chat template does not give",
    "FROD": "PEFT needs the weights to build it, and so plans of memory would need them",
    "LILY": "its mixture looks at all tokens of a batch, which are of several samples here",
    "MULTITASK_PROMPT_TUNING": "it needs the number of a task with every sample",
    "OSF": "it changes the weights themselves and the gradients of every step",
    "POLY": "it needs the number of a task with every sample",
    "PVERA": "it draws noise in every pass, also while it is measured",
    "SHADOW": "it is a second model with a loss of its own",
    "SHIRA": "what it trains can only be counted with the weights at hand",
    "XLORA": "it is a mixture of LoRA adapters that are there already",
}
"""Why not."""

OTHER_NAMES = {"P_TUNING_V2": "PREFIX_TUNING", "PROMPT": "PROMPT_TUNING", "PREFIX": "PREFIX_TUNING"}
"""What else kinds are called: P-tuning v2 (arXiv 2110.07602) is a prefix in every layer."""

SHORT_METHODS: dict[str, dict[str, object]] = {
    "dora": {"name": "lora", "dora": True},
    "rslora": {"name": "lora", "rslora": True},
    "pissa": {"name": "lora", "init": "pissa"},
    "olora": {"name": "lora", "init": "olora"},
    "loftq": {"name": "lora", "init": "loftq"},
    "eva": {"name": "lora", "init": "eva"},
    **{
        short: {"name": "adapter", "kind": short}
        for short in (*(kind.lower() for kind in ADAPTER_KINDS), "p_tuning_v2")
    },
}
"""Names of methods that stand for one of the four with some of its settings."""

VIRTUAL_TOKENS = 20
"""Of kinds that have some; arXiv 2104.08691 sees little gain beyond."""
