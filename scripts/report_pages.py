"""The pages of docs/ and the picture of the README, from a real run: python -m scripts.report_pages CHECKPOINT DATA.

CHECKPOINT is the published ResNet-20 for CIFAR-10, DATA a folder with the images. It needs a Chromium for the picture.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

DOCS = Path(__file__).parents[1] / "docs"
SIZE = 1280, 1150
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main(checkpoint: Path, data: Path) -> None:
    with TemporaryDirectory() as folder:
        work = Path(folder)
        # Commands are shown on pages: what they name lies beside them.
        (work / checkpoint.name).symlink_to(checkpoint.absolute())
        (work / "cifar10").symlink_to(data.absolute())
        images = ("--calib", "cifar10:cifar10", "--data", "cifar10:cifar10")

        ttcompress(
            work,
            "compress",
            checkpoint.name,
            "--ratio",
            "2",
            "--effort",
            "fast",
            *images,
            "--html",
            "report-2x.html",
        )
        ratios = ("--ratios", "1.5,2,3,4,6", "--effort", "fast", "--max-drop", "2", "--limit", "2000")
        ttcompress(
            work, "sweep", checkpoint.name, *ratios, *images, "-o", "sizes", "--html", "report-sweep.html"
        )

        for name in ("report-2x.html", "report-sweep.html"):
            (DOCS / name).write_bytes((work / name).read_bytes())
        draw(DOCS / "report-sweep.html", DOCS / "report.png")


def ttcompress(work: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "ttcompress", *arguments], cwd=work, check=True)


def draw(page: Path, picture: Path) -> None:
    """The upper part of a page as a browser shows it."""
    browser = next(filter(None, map(which, BROWSERS)))
    size = f"--window-size={','.join(map(str, SIZE))}"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size]
    subprocess.run(
        [browser, *options, f"--screenshot={picture}", page.absolute().as_uri()],
        check=True,
        stderr=subprocess.DEVNULL,
    )


def arguments(given: Sequence[str]) -> tuple[Path, Path]:
    if len(given) != 2:
        sys.exit("usage: python -m scripts.report_pages CHECKPOINT DATA")
    return Path(given[0]), Path(given[1])


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))
    main(*arguments(sys.argv[1:]))
