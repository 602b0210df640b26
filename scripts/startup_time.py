"""How long the commands take that must answer at once: python scripts/startup_time.py [FILE] (aim: under 0.5 s).

Each is timed in alternation with `python -c pass`, so that the interpreter's own start can be told apart.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 9


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    tool = [sys.executable, "-m", "ttcompress"]
    commands = {"--help": [*tool, "--help"], "--version": [*tool, "--version"]}
    if len(sys.argv) > 1:
        commands["report"] = [*tool, "report", sys.argv[1]]
    baseline = [sys.executable, "-c", "pass"]
    for name, command in commands.items():
        pairs = [(seconds(command), seconds(baseline)) for _ in range(RUNS)]
        own, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"{name:<10} median {own:.3f} s of {RUNS} runs (python alone {bare:.3f} s)")


if __name__ == "__main__":
    main()
