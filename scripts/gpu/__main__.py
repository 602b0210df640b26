"""What is worth knowing of a GPU, in so many minutes:

    python -m scripts.gpu MINUTES --cifar10 cifar10:ROOT --checkpoints FOLDER --results FILE [--work FOLDER]

First times of layers and networks, which have the GPU for themselves, then trainings, several processes at a time, both
in order of worth. A row writes its line to FILE (JSON lines) the moment it ends. Whatever runs when the time is over
saves its state under --work, and the same command goes on from there: rows that have a line are not run again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.gpu.rows import Place, Run, append, device_name, done

LEFT_TO_SAVE = 15.0
"""Seconds at the end, in which trainings save their state."""
SPEED_SHARE = 0.3
"""Of the minutes, at most, go to times."""
SPEED = "speed"
"""What the process that takes all times is called."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("minutes", type=float)
    parser.add_argument("--cifar10", help="cifar10:ROOT")
    parser.add_argument("--checkpoints", type=Path, help="folder of the published CIFAR-10 ResNets")
    parser.add_argument("--results", type=Path, required=True, help="file of lines")
    parser.add_argument("--work", type=Path, default=Path("gpu-work"), help="keeps networks, states and logs")
    parser.add_argument(
        "--at-a-time",
        type=int,
        default=2,
        help="trainings (2): more share the GPU, and are no faster together",
    )
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows, in this order")
    parser.add_argument("--device", default="cuda", help="cpu, to try it")
    parser.add_argument("--epochs-scale", type=float, default=1.0, help="of trainings, to try it")
    parser.add_argument("--tiny", action="store_true", help="small layers instead of real ones, to try it")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        run_row(arguments.row, place_of(arguments), time.time() + 60 * arguments.minutes)
    else:
        sys.exit(Session(arguments).run())


def place_of(arguments: argparse.Namespace) -> Place:
    return Place(
        arguments.cifar10,
        arguments.checkpoints,
        arguments.results,
        arguments.work,
        torch.device(arguments.device),
        arguments.epochs_scale,
        arguments.tiny,
    )


# ---------------------------------------------------------------------------------------------------------- one process


def run_row(name: str, place: Place, until: float) -> None:
    """Run a row, or all times one after the other."""
    # What a row needs takes seconds to import.
    from scripts.gpu.speed import all_rows
    from scripts.gpu.trainings import ROWS
    from ttcompress.errors import TTCompressError

    if name != SPEED:
        try:
            _run(name, ROWS[name], place)
        except TTCompressError as error:
            sys.exit(f"{name}: {error}")
        return
    left = [(each, run) for each, run in all_rows() if each not in done(place.results)]
    for number, (each, run) in enumerate(left):
        if time.time() > until:
            print(f"{len(left) - number} times are left", flush=True)
            return
        try:
            _run(each, run, place)
        except Exception as error:  # One that does not run must not cost the others.
            print(f"{each}: {type(error).__name__}: {error}", flush=True)


def _run(name: str, run: Run, place: Place) -> None:
    begin = time.perf_counter()
    row = run(place)
    minutes = round((time.perf_counter() - begin) / 60, 2)
    found = {"gpu_row": name, "hardware": device_name(place.device), "torch": torch.__version__, **row}
    append(place.results, {"minutes": minutes, **found})
    print(f"{name}: done in {minutes} minutes", flush=True)


# ---------------------------------------------------------------------------------------------------- several processes


class Session:
    """The minutes, and the processes that run in them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.begin = time.time()
        self.end = self.begin + 60 * arguments.minutes
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.failed: list[str] = []

    def run(self) -> int:
        """The exit code: 0 where every row has its line."""
        from scripts.gpu.trainings import ROWS

        arguments = self.arguments
        arguments.work.mkdir(parents=True, exist_ok=True)
        asked = arguments.only or [SPEED, *ROWS]
        if unknown := [each for each in asked if each not in (SPEED, *ROWS)]:
            sys.exit(f"--only: no such rows: {', '.join(unknown)}; there are {', '.join((SPEED, *ROWS))}")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

        waiting = [each for each in asked if each != SPEED]
        try:
            if SPEED in asked:
                self.start(SPEED, SPEED_SHARE * arguments.minutes if waiting else arguments.minutes)
                self.wait_for_all(
                    self.begin + 60 * SPEED_SHARE * arguments.minutes + 60 if waiting else self.end
                )
            self.train(waiting)
        finally:
            self.stop()
        return self.summary(asked)

    def start(self, name: str, minutes: float = 0.0) -> None:
        given = self.arguments
        command = [sys.executable, "-m", "scripts.gpu", str(minutes), "--row", name]
        for option in ("cifar10", "checkpoints", "results", "work", "device", "epochs_scale"):
            value = getattr(given, option)
            if value is not None:
                command += [f"--{option.replace('_', '-')}", str(value)]
        command += ["--tiny"] if given.tiny else []

        cores = max(1, len(os.sched_getaffinity(0)) // (1 if name == SPEED else given.at_a_time))
        shares = {"OMP_NUM_THREADS": str(cores), "TORCHINDUCTOR_COMPILE_THREADS": str(max(4, cores))}
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **shares}
            )
        self.say(f"{name}: started")

    def train(self, waiting: Sequence[str]) -> None:
        """As many at a time as are asked for, until the time is over."""
        queue = [each for each in waiting if each not in done(self.arguments.results)]
        while (queue or self.running) and time.time() < self.end - LEFT_TO_SAVE:
            while queue and len(self.running) < self.arguments.at_a_time:
                self.start(queue.pop(0))
            self.look()
            time.sleep(0.2)

    def wait_for_all(self, until: float) -> None:
        while self.running and time.time() < until:
            self.look()
            time.sleep(0.2)
        self.stop()

    def look(self) -> None:
        """Take away what has ended."""
        for name, process in [*self.running.items()]:
            if process.poll() is not None:
                del self.running[name]
                self.say(f"{name}: {'ended' if process.returncode == 0 else 'FAILED'}")
                if process.returncode:
                    self.failed.append(name)
                    print(self.last_lines(name, 12), flush=True)

    def stop(self) -> None:
        """Have everything save its state, and end."""
        for process in self.running.values():
            process.terminate()
        until = time.time() + LEFT_TO_SAVE
        for name, process in self.running.items():
            try:
                process.wait(max(0.1, until - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self.say(f"{name}: stopped: {self.last_lines(name, 1)[-150:]}")
        self.running.clear()

    def summary(self, asked: Sequence[str]) -> int:
        from scripts.gpu.speed import all_rows

        found = done(self.arguments.results)
        left = [each for each in asked if each not in (SPEED, *found)]
        times = len([each for each, _ in all_rows() if each not in found]) if SPEED in asked else 0
        self.say(f"{len(found)} lines in {self.arguments.results}; left: {', '.join(left) or 'no training'}")
        if times:
            self.say(f"{times} times are left")
        if left or times:
            print("the same command goes on with these", flush=True)
        return 1 if left or times or self.failed else 0

    def say(self, text: str) -> None:
        print(f"{time.time() - self.begin:6.0f} s  {text}", flush=True)

    def log(self, name: str) -> Path:
        file: Path = self.arguments.work / f"{name.replace(' ', '-').replace(',', '')}.log"
        return file

    def last_lines(self, name: str, count: int) -> str:
        lines = self.log(name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-count:])


if __name__ == "__main__":
    main()
