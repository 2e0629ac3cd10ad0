"""Small helpers that know nothing of models: errors, signals, meters, schedules.

Only of Python's own library: a script imports this first, to catch signals while slower imports run.
"""

from __future__ import annotations  # unions, on Python 3.9

import bisect
import contextlib
import functools
import importlib.metadata
import logging
import math
import numbers
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("nnabla", "nnabla-ext-cuda120", "numpy", "scipy", "numba", "soundfile", "musdb", "museval")


class UsageError(ValueError):
    """The user asked for something that cannot be done; the message is one line that says what to do."""


# ------------------------------------------------------------------------------- commands and signals

_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


class _Ending:
    """What signals have asked of this process."""

    signal = None  # the last one that asked it to end
    postponed = False  # whether somebody looks at `signal` from time to time
    unseen = None  # an OSError that came where no exception can, so that nobody has seen it
    others = None  # what is called before a command fails: see `before_failing`


def start() -> None:
    """What a script does before its other imports: a signal during these ends it with one line, too."""
    _handle(_end_at_once)
    for number in (0, 1, 2):  # one that is closed would be the number of the next file, into which messages would go
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files, on a terminal that knows only ASCII
    logging.getLogger("nnabla").setLevel(logging.WARNING)  # else its import is announced


def _handle(handler):
    """Set the handler of all signals that ask to end, but those that nohup, or a shell's &, has made ignored."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: former for number, former in before.items() if former != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before


def _end_at_once(number, frame):
    os.write(2, f"{_program()}: {_SIGNALS[number]}\n".encode(errors="backslashreplace"))
    os._exit(128 + number)


def _program():
    return Path(sys.argv[0]).name


def command(main: Callable) -> Callable:
    """Decorate a script's ``main(argv=None)``: errors become one line on stderr and an exit status.

    Exit status 2: bad input (`UsageError`). 1: a failure while working (`OSError`, a full disk say; no memory).
    130, 143 and 129: asked to end by SIGINT (Ctrl-C), SIGTERM and SIGHUP, whatever has become of that on its way.
    """

    @functools.wraps(main)
    @_hearing()
    def wrapper(argv=None):
        status, message, asked = 1, "", ""
        try:
            with _interruptible():
                result = main(argv)
                print(end="", flush=True)  # else a full disk is noticed when Python ends
                if _Ending.unseen:
                    raise _Ending.unseen
                if _Ending.signal is None:
                    return result
        except UsageError as error:
            status, message = 2, str(error)
        except OSError as error:
            message = describe(error)
        except MemoryError as error:
            message = f"not enough memory{f': {error}' if str(error) else ''}"
        except KeyboardInterrupt as error:
            _Ending.signal, asked = _Ending.signal or signal.SIGINT, str(error)
        except (Exception, SystemExit) as error:
            if _Ending.signal is None and not lacks_memory(error):
                raise
            message = "not enough memory"
            if any(map(str(error).__contains__, _OF_GPU)):
                message += " on the GPU: a smaller --batch-size, --seq-dur or --segment needs less"
        if _Ending.signal is not None:  # of an interruption NNabla, for one, makes another error
            status, message = 128 + _Ending.signal, asked or _SIGNALS[_Ending.signal]
        line = f"{_program()}: {' '.join(message.split())}"
        _say(line)
        if _Ending.others:
            _Ending.others(line, status)
        sys.exit(status)

    return wrapper


def before_failing(others: Callable[[str, int], None]) -> None:
    """Call this with the last line and the exit status before a command ends with an error: it may end others, too."""
    _Ending.others = others


def _say(line):
    """Print the last line. What cannot be written is dropped: Python would complain of it when it ends."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{line}\n")):
        try:
            print(text, end="", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_OF_GPU = ("CudaMemory", "cudaErrorMemoryAllocation", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is of memory that could not be had; NNabla has errors of its own for that."""
    while error is not None:
        text = str(error)
        if (
            isinstance(error, MemoryError)
            or text.startswith("memory error in ")
            or any(map(text.__contains__, _OF_GPU))
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe(error: Exception) -> str:
    """An error in a line: of those of files, the name of the file first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _is_main_thread():
    return threading.current_thread() is threading.main_thread()  # only there signals arrive


@contextlib.contextmanager
def _interruptible():
    """Signals raise KeyboardInterrupt, unless they are `postponed`."""
    if not _is_main_thread():
        yield
        return

    def interrupt(number, frame):
        again, _Ending.signal = _Ending.signal is not None, number
        if again or not _Ending.postponed:
            raise KeyboardInterrupt

    _Ending.signal = _Ending.unseen = None
    before = _handle(interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _hearing():
    """`_unraisable` is asked, until the last frame of an interruption is gone."""
    hook = sys.unraisablehook
    if _is_main_thread():
        sys.unraisablehook = _unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within, a signal raises KeyboardInterrupt, unless it is `postponed`: as in a `command`, for other processes."""
    with _hearing(), _interruptible():
        yield


def _unraisable(unraisable):
    """What Python only reports, of a finalizer or a callback: an interruption comes once more, an error at the end."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt) and _Ending.signal is not None:
        number, _Ending.signal = _Ending.signal, None
        at_the_end = threading.Event()  # within this function, it would be lost once more

        def again():
            at_the_end.wait()
            time.sleep(0.01)
            os.kill(os.getpid(), number)

        threading.Thread(target=again, daemon=True).start()
        at_the_end.set()
    elif isinstance(unraisable.exc_value, OSError):
        _Ending.unseen = unraisable.exc_value
    elif _Ending.signal is None:  # else of an object whose making was interrupted
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def postponed() -> Iterator[Callable[[], bool]]:
    """Within, a first signal does not interrupt; the caller asks from time to time whether one has come."""
    before = _Ending.postponed
    try:
        if _is_main_thread():
            _Ending.postponed = True
        yield lambda: _Ending.signal is not None
    finally:
        if _is_main_thread():
            _Ending.postponed = before


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within, a first signal waits, and interrupts at the end: for what is short, and must not stay half done."""
    asked = _Ending.signal is not None
    with postponed() as ending:
        yield
    if ending() and not asked and not _Ending.postponed and _is_main_thread():
        raise KeyboardInterrupt


def is_ending() -> bool:
    """Whether a signal has asked this process to end."""
    return _Ending.signal is not None


def some(items: list) -> str:
    """The first of many, for a message of one line."""
    return ", ".join(items[:8]) + (f" … ({len(items)} in all)" if len(items) > 8 else "")


def whole(name: str, value: Any, lower: int = 1, upper: int = 2**31 - 1) -> int:
    """A whole number, of Python's or NumPy's; ValueError, with the name, if it is none within these bounds."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not lower <= value <= upper:
        raise ValueError(f"{name} {value!r} is not a whole number within {lower} … {upper}")
    return int(value)


def finite(name: str, value: Any, lower: float, upper: float = 1e9) -> float:
    """A number; ValueError, with the name, if it is none within these bounds."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not lower <= value <= upper:
        raise ValueError(f"{name} {value!r} is not a number within {lower:g} … {upper:g}")
    return value


def run_metadata() -> dict:
    """What a result was made with: versions, the machine, the commit of this repository."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"versions": versions, "commit": commit, "machine": platform.platform()}


# ------------------------------------------------------------------------------------- training


def bandwidth_to_max_bin(sample_rate: float, n_fft: int, bandwidth: float) -> int:
    """Number of STFT bins at or below `bandwidth` Hz."""
    step = sample_rate / 2 / (n_fft // 2)
    return bisect.bisect_right([k * step for k in range(n_fft // 2)] + [sample_rate / 2], bandwidth)


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


class Losses:
    """Losses of the steps of an epoch, which stay on their device until they are read: that waits for the device.

    Args:
        progress: of the epoch: its number, "epoch"; how many were added, "steps"; the sum of those read, "loss"
        agree: of several processes, whether one of them says so: all read at once
    """

    EVERY = 2.0  # seconds between readings: so late a training ends whose loss is no number

    def __init__(self, progress: dict, agree: Callable[[bool], bool] = bool):
        self.progress, self.agree, self.unread, self.time = progress, agree, [], time.time()

    def add(self, loss: Any) -> None:
        """Take the loss of the next step, a scalar array of NNabla."""
        self.unread.append(loss)
        self.progress["steps"] += 1
        if self.agree(time.time() >= self.time + self.EVERY):
            self.settle()

    def settle(self) -> None:
        """Read and add up those that have not been; OSError for the first that is not finite."""
        while self.unread:
            loss = float(self.unread[0].data)
            if not math.isfinite(loss):
                step = self.progress["steps"] - len(self.unread) + 1
                raise OSError(f"the loss of epoch {self.progress['epoch']}, step {step} is {loss}: try a smaller --lr")
            self.progress["loss"] += loss
            del self.unread[0]
        self.time = time.time()


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
    of the `cooldown` after a reduction do not count as bad. Of losses below 0, torch would take one that is higher by
    less than the threshold for a better one; here it is not. `state` is all that resuming needs.
    """

    def __init__(self, lr: float, factor: float, patience: int, cooldown: int = 10, threshold: float = 1e-4):
        self.factor, self.patience = factor, patience
        self.cooldown, self.threshold = cooldown, threshold
        self.state = {"lr": lr, "best": float("inf"), "num_bad_epochs": 0, "cooldown": 0}

    def step(self, loss: float) -> float:
        """Take an epoch's loss; returns the learning rate of the next epoch."""
        state = self.state
        if loss < state["best"] * (1 - math.copysign(self.threshold, state["best"])):
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
