"""A file to read and how: what every reader is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.types import Origin

COMPRESSED_ENDINGS = (".gz", ".zst")


@dataclass(slots=True)
class Meter:
    """Counts the bytes that readers have taken from disk, compressed ones as they lie there.

    One meter may be passed on from file to file; against `total_bytes` it moves a progress bar.
    """

    bytes_read: int = 0


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file with the settings of its source."""

    path: Path
    encoding: str = "auto"
    sheet: str | None = None
    meter: Meter = field(default_factory=Meter)

    @property
    def ending(self) -> str:
        """What the name says of the format: `.csv` for `data.CSV.gz`."""
        return format_ending(self.path)

    def origin(self, line: int) -> Origin:
        """The place of a row."""
        return Origin(str(self.path), line)


def format_ending(path: Path) -> str:
    """The name's ending in lower case, without the one of compression."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSED_ENDINGS:
        endings.pop()
    return endings[-1] if endings else ""
