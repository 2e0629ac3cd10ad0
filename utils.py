"""Small helpers that know nothing of models: errors, files, meters, schedules."""

from __future__ import annotations  # unions, on Python 3.9

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("nnabla", "nnabla-ext-cuda120", "numpy", "scipy", "numba", "soundfile", "musdb", "museval")


class UsageError(ValueError):
    """The user asked for something that cannot be done; the message is one line that says what to do."""


def command(main: Callable) -> Callable:
    """Decorate a script's ``main(argv=None)``: errors become one line on stderr and an exit status.

    Exit status 2: bad input (`UsageError`). 1: a failure while working (`OSError`, a full disk say).
    130: interrupted by the user.
    """

    @functools.wraps(main)
    def wrapper(argv=None):
        interrupted = False

        def interrupt(*_):
            nonlocal interrupted
            interrupted = True
            raise KeyboardInterrupt

        try:
            with _on_interrupt(interrupt):
                return main(argv)
        except UsageError as error:
            status, message = 2, str(error)
        except OSError as error:
            status, message = 1, str(error)
        except KeyboardInterrupt as error:
            status, message = 130, str(error) or "interrupted"
        except Exception:
            if not interrupted:
                raise
            # within a graph function of ours, NNabla makes another error of it
            status, message = 130, "interrupted"
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(status)

    return wrapper


@contextlib.contextmanager
def _on_interrupt(handler):
    if threading.current_thread() is not threading.main_thread():  # only there signals arrive
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def some(items: list) -> str:
    """The first of many, for a message of one line."""
    return ", ".join(items[:8]) + (f" … ({len(items)} in all)" if len(items) > 8 else "")


# ---------------------------------------------------------------------------------------- files


def is_file_name(name: str) -> bool:
    """Whether it names a file of the folder where it is used, and no other place."""
    return bool(name) and name == Path(name).name and name != ".." and "\0" not in name


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, delete it on failure.

    A reader, or a machine that lost power, so sees the old file or the new one, never half of one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=4, sort_keys=True) + "\n")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; `UsageError` if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None


def writable_folder(path: str | Path) -> Path:
    """Create a folder, and make sure now that files can be written to it, not after hours of work."""
    path = Path(path).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write to the output folder {path}: {error.strerror}") from None
    return path


def run_metadata() -> dict:
    """What a result was made with: versions, the machine, the commit of this repository."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"versions": versions, "commit": commit, "machine": platform.platform()}


# ----------------------------------------------------------------------------------- randomness

# All that a training draws at random, and what each draw may depend on.
STREAMS = {
    "initial weights": ("seed",),
    "dropout": ("seed", "epoch"),
    "order": ("seed", "epoch"),
    "draw": ("seed", "epoch", "index", "source"),
    "augmentation": ("seed", "epoch", "index", "source", "name"),
}


def random_stream(purpose: str, **key: int | str) -> np.random.Generator:
    """The random numbers of one purpose: a stream of its own for each key, the same whenever it is asked for.

    Args:
        purpose: a key of STREAMS
        key: numbers or names for all that STREAMS lists there
    """
    parts = [purpose, *(f"{name}={key.pop(name)}" for name in STREAMS[purpose])]
    if key:
        raise TypeError(f"random numbers for {purpose!r} do not depend on {', '.join(key)}")
    # a hash keeps apart what differs in any part; of numbers added up or padded, some pairs would be the same
    digest = hashlib.sha256("/".join(parts).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, "<u4"))


# ------------------------------------------------------------------------------------- training


def bandwidth_to_max_bin(sample_rate: float, n_fft: int, bandwidth: float) -> int:
    """Number of STFT bins at or below `bandwidth` Hz."""
    frequencies = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    return int(np.searchsorted(frequencies, bandwidth, side="right"))


class AverageMeter:
    """Mean of the values seen so far."""

    def __init__(self):
        self.sum = 0.0
        self.count = 0

    def update(self, value: float) -> None:
        self.sum += value
        self.count += 1

    @property
    def average(self) -> float:
        return self.sum / self.count


class EarlyStopping:
    """Stop after `patience` epochs in a row without a lower loss; patience 0 never stops.

    `state` (a dict of numbers) is all that resuming needs.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.state = {"best": float("inf"), "num_bad_epochs": 0}

    def step(self, loss: float) -> bool:
        """Take an epoch's loss; returns whether it is the best so far."""
        improved = loss < self.state["best"]
        if improved:
            self.state["best"] = loss
        self.state["num_bad_epochs"] = 0 if improved else self.state["num_bad_epochs"] + 1
        return improved

    @property
    def stop(self) -> bool:
        return 0 < self.patience <= self.state["num_bad_epochs"]


class ReduceLROnPlateau:
    """Learning rate times `factor` after more than `patience` epochs without a loss lower by `threshold`.

    The rule of torch.optim.lr_scheduler.ReduceLROnPlateau (mode "min", relative threshold): epochs
    of the `cooldown` after a reduction do not count as bad. `state` is all that resuming needs.
    """

    def __init__(self, lr: float, factor: float, patience: int, cooldown: int = 10, threshold: float = 1e-4):
        self.factor, self.patience = factor, patience
        self.cooldown, self.threshold = cooldown, threshold
        self.state = {"lr": lr, "best": float("inf"), "num_bad_epochs": 0, "cooldown": 0}

    def step(self, loss: float) -> float:
        """Take an epoch's loss; returns the learning rate of the next epoch."""
        state = self.state
        if loss < state["best"] * (1 - self.threshold):
            state["best"], state["num_bad_epochs"] = loss, 0
        else:
            state["num_bad_epochs"] += 1
        if state["cooldown"] > 0:
            state["cooldown"] -= 1
            state["num_bad_epochs"] = 0
        if state["num_bad_epochs"] > self.patience:
            lr = state["lr"] * self.factor
            if state["lr"] - lr > 1e-8:  # torch's limit of what counts as a change
                state["lr"] = lr
            state["cooldown"], state["num_bad_epochs"] = self.cooldown, 0
        return state["lr"]
