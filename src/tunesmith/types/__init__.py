"""Canonical samples, packed batches and the protocols between the layers."""

from tunesmith.types.batches import GlobalBatch, PackedBatch, Segments
from tunesmith.types.json import Json
from tunesmith.types.progress import Event, EventKind, Listener, Reporter, SilentReporter
from tunesmith.types.samples import (
    Completion,
    Conversation,
    Labeled,
    Message,
    Origin,
    Preference,
    Rated,
    Role,
    Sample,
    Span,
    Text,
    ToolCall,
)
from tunesmith.types.tokenizer import BackendTokenizer, Encoding, Tokenizer

__all__ = [
    "BackendTokenizer",
    "Completion",
    "Conversation",
    "Encoding",
    "Event",
    "EventKind",
    "GlobalBatch",
    "Json",
    "Labeled",
    "Listener",
    "Message",
    "Origin",
    "PackedBatch",
    "Preference",
    "Rated",
    "Reporter",
    "Role",
    "Sample",
    "Segments",
    "SilentReporter",
    "Span",
    "Text",
    "Tokenizer",
    "ToolCall",
]
