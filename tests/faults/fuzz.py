"""Inputs that nobody would make on purpose, by the hundred thousand, for everything here that reads.

    python tests/faults/fuzz.py --seconds 60
    python tests/faults/fuzz.py --inputs 1000000 --processes 2 --seed 1
    python tests/faults/fuzz.py --kinds weights json --number 4711     (one of them again, with its traceback)

An input follows from the seed and its number alone. Each is read within a process of many; another one watches, so
that an input that ends its process, or keeps it for more than LIMIT seconds, is a finding too, and the work goes on.
What is found lies in build/faults/<kind>-<seed>-<number>/ with the files that were read. Exit status 1: something was.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import fuzz_inputs  # noqa: E402

LIMIT = 10.0  # seconds
MEMORY = 500.0  # MB, of a process with all that it has imported
FOUND = ROOT / "build" / "faults"
KEPT = 3  # of findings at one place; all are counted
SCHEDULE = [
    *["commandline", "json", "audio", "weights", "json"],
    *["commandline", "checkpoint", "json", "audio", "json"],
]


def kind_of(number: int, kinds: list) -> str:
    """Kinds take turns, by the shares that they have in SCHEDULE."""
    turns = [kind for kind in SCHEDULE if kind in kinds]
    return turns[number % len(turns)]


# ------------------------------------------------------------------------------------- one input


class Reader:
    """Reads inputs in a folder of its own."""

    def __init__(self, folder: Path, seed: int, kinds: list):
        self.folder, self.seed, self.kinds = folder, seed, kinds
        self.makers = {}
        for kind in kinds:
            (folder / kind).mkdir()
            self.makers[kind] = getattr(fuzz_inputs, kind.capitalize())(folder / kind)

    def make(self, number: int) -> tuple[str, Callable]:
        """The kind of an input, and the function that reads it; its files are then in the folder."""
        kind = kind_of(number, self.kinds)
        rng = random.Random(f"{self.seed} {kind} {number}")
        return kind, self.makers[kind](rng)

    def keep(self, kind: str, number: int, text: str) -> None:
        keep(self.folder / kind, kind, self.seed, number, text)


def keep(folder: Path, kind: str, seed: int, number: int, text: str) -> None:
    """The files of a finding, and what was found."""
    kept = FOUND / f"{kind}-{seed}-{number}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept, symlinks=True)
    (kept / "found.txt").write_text(text, errors="backslashreplace")


def memory() -> float:
    """The most that this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --------------------------------------------------------------------------------------- workers


class Board:
    """What a worker has done, where the watcher sees it even if the worker has died."""

    def __init__(self, kinds: list):
        self.until = multiprocessing.RawValue("d", 0.0)  # when it stops, of what it knows once it has begun
        self.number = multiprocessing.RawValue("q", -1)  # of the input that is read now
        self.since = multiprocessing.RawValue("d", 0.0)  # when that began; 0: none is read
        self.count, self.found = (multiprocessing.RawArray("q", len(kinds)) for _ in range(2))
        self.slowest, self.peak = (multiprocessing.RawArray("d", len(kinds)) for _ in range(2))
        self.slowest_number = multiprocessing.RawArray("q", len(kinds))


def work(board: Board, folder: Path, seed: int, kinds: list, first: int, step: int, end: int, seconds: float) -> None:
    """Read the inputs first, first + step, … below `end`, for that long."""
    output = os.open(folder / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    reader, places = Reader(folder / "work", seed, kinds), {}
    board.until.value = board.until.value or time.monotonic() + seconds
    for number in range(first, end, step):
        if time.monotonic() > board.until.value:
            break
        index = kinds.index(kind_of(number, kinds))
        board.number.value = number
        kind, read = reader.make(number)
        text, start = "", time.monotonic()
        board.since.value = start
        try:
            read()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            text, place = traceback.format_exc(), (kind, type(error), frames[-1][:2])
        seconds = time.monotonic() - start
        board.since.value = 0.0
        board.count[index] += 1
        if seconds > board.slowest[index]:
            board.slowest[index], board.slowest_number[index] = seconds, number
        peak = memory()
        if peak > MEMORY and not text:
            text, place = f"{peak:.0f} MB of memory", (kind, "memory")
        board.peak[index] = max(board.peak[index], peak)
        if text:
            board.found[index] += 1
            places[place] = places.get(place, 0) + 1
            if places[place] <= KEPT:
                reader.keep(kind, number, text)
        if peak > MEMORY:
            Path("/proc/self/clear_refs").write_text("5")  # the most is what it has now
    board.number.value = -1


class Watched:
    """A worker and its board; started again behind an input that it does not survive."""

    def __init__(self, index: int, folder: Path, seed: int, kinds: list, step: int, end: int, seconds: float):
        self.board, self.folder, self.seed, self.kinds = Board(kinds), folder / str(index), seed, kinds
        self.rest = step, end, seconds
        self.start(index)

    def start(self, first: int) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "work").mkdir(parents=True)
        self.board.since.value, self.board.number.value = 0.0, -1
        arguments = (self.board, self.folder, self.seed, self.kinds, first, *self.rest)
        self.process = multiprocessing.get_context("spawn").Process(target=work, args=arguments, daemon=True)
        self.process.start()

    def is_done(self) -> bool:
        """Whether it has ended; start it again if it should not have."""
        since, number = self.board.since.value, self.board.number.value
        if self.process.is_alive():
            if not since or time.monotonic() - since < LIMIT:
                return False
            text = f"no end after {LIMIT} s"
            self.process.kill()
        elif self.process.exitcode == 0:
            return True
        else:
            text = f"the process ended with status {self.process.exitcode}"
        self.process.join()
        if number < 0:
            raise RuntimeError((self.folder / "output.txt").read_text())
        kind = kind_of(number, self.kinds)
        self.board.found[self.kinds.index(kind)] += 1
        text += "\n" + (self.folder / "output.txt").read_text(errors="replace")[-10000:]
        keep(self.folder / "work" / kind, kind, self.seed, number, text)
        self.start(number + self.rest[0])
        return False


def run(
    seconds: float = float("inf"),
    inputs: int = 2**60,
    kinds: Iterable[str] = fuzz_inputs.KINDS,
    seed: int = 0,
    processes: int = 2,
) -> dict[str, dict]:
    """Read that many inputs, or for that long.

    Returns:
        {kind: {"inputs", "found", "slowest" in seconds, "slowest_number", "peak" in MB}}
    """
    kinds = [kind for kind in fuzz_inputs.KINDS if kind in kinds]
    FOUND.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        arguments = (Path(folder), seed, kinds, processes, inputs, seconds)
        workers = [Watched(index, *arguments) for index in range(processes)]
        try:
            while not all([worker.is_done() for worker in workers]):
                time.sleep(0.1)
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()
        boards = [worker.board for worker in workers]
    report = {}
    for k, kind in enumerate(kinds):
        slowest = max(boards, key=lambda board: board.slowest[k])
        report[kind] = {
            "inputs": sum(board.count[k] for board in boards),
            "found": sum(board.found[k] for board in boards),
            "slowest": slowest.slowest[k],
            "slowest_number": slowest.slowest_number[k],
            "peak": max(board.peak[k] for board in boards),
        }
    return report


# ---------------------------------------------------------------------------------- command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="how long")
    parser.add_argument("--inputs", type=int, help="how many; default: a million, or as many as --seconds allow")
    parser.add_argument("--kinds", nargs="+", choices=fuzz_inputs.KINDS, default=fuzz_inputs.KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--number", type=int, help="read this input only, in this process")
    options = parser.parse_args(argv)
    if options.number is not None:
        with tempfile.TemporaryDirectory() as folder:
            kinds = [kind for kind in fuzz_inputs.KINDS if kind in options.kinds]
            kind, read = Reader(Path(folder), options.seed, kinds).make(options.number)
            read()
            print(f"{kind}: nothing undeclared, {memory():.0f} MB")
        return
    inputs = options.inputs or (1_000_000 if options.seconds == float("inf") else 2**60)
    start = time.time()
    report = run(options.seconds, inputs, options.kinds, options.seed, options.processes)
    print(f"{'':12} {'inputs':>9} {'found':>7} {'slowest':>9} {'(number)':>10} {'memory':>8}")
    for kind, values in report.items():
        print(
            f"{kind:12} {values['inputs']:9} {values['found']:7} {values['slowest']:7.2f} s "
            f"{values['slowest_number']:10} {values['peak']:5.0f} MB"
        )
    total, found = (sum(values[key] for values in report.values()) for key in ("inputs", "found"))
    print(f"{total} inputs in {time.time() - start:.0f} s, seed {options.seed}: {found} findings")
    if found:
        print(f"they lie in {FOUND}")
        sys.exit(1)


if __name__ == "__main__":
    main()
