"""What a page shows beside a report: what a command came to know on its way and no file holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from ttcompress.records.common import Json

MOST_SAMPLES = 10
MOST_SPECTRA = 12
"""Layers whose singular values are drawn."""


@dataclass
class Extras:
    """Filled in while a command runs; whoever wants none of it hands none in.

    Args:
        command: as it was given, without folders.
        seconds: that it took.
        spectra: of some layers the singular values of each cut over the largest: `fqn`, `format` and `cuts`, each with
            the `rank` that was taken, how many values there are (`size`), and at `places`, counted from 1, `values`.
        samples: whose answer changed: `index`, `label`, and of both networks `answer` and `confidence` in percent.
        images: the same as data URIs of pictures, None where there is none.
    """

    command: str = ""
    seconds: float | None = None
    spectra: list[Json] = field(default_factory=list)
    samples: list[Json] = field(default_factory=list)
    images: list[str | None] = field(default_factory=list)

    def to_json(self) -> Json:
        """The `page` of JSON that is printed beside a page; pictures are on the page only."""
        return {
            "command": self.command,
            "seconds": self.seconds,
            "spectra": self.spectra,
            "samples": self.samples,
        }
