"""The checkpoint of a training: all that it needs to go on, in one file, checked whole before any of it is used.

<target>.checkpoint.npz holds NumPy arrays: parameters/<name>, solver/<name>, statistics/<name>, and of --ema
average/<name>, all float32 but solver/step; and `meta`, the JSON of a dict of what `STATE` says. Its last 4 bytes, the
comment of the archive, are the CRC-32 of all before, which costs a third of what SHA-256 does. The one before the last
is kept as <target>.checkpoint.before.npz.
"""

from __future__ import annotations  # unions, on Python 3.9

import contextlib
import errno
import io
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import files
import folders
import randomness
from args import train_parser
from communicator import ALONE, Alone
from trained import STATISTICS, Model
from utils import UsageError

# Options that say what a training minimises.
LOSS = ("loss", "mcoef", "combinations")
# Options that shape the course of a training: they are those of its beginning.
RECIPE = (
    "seq_dur",
    "samples_per_track",
    "source_augmentations",
    "batch_size",
    "lr",
    "lr_decay_patience",
    "lr_decay_gamma",
    "weight_decay",
    "ema",
    "seed",
    *LOSS,
)
# Those that say what it is trained on.
DATASET = (
    "dataset",
    "input_file",
    "output_file",
    "target_file",
    "interferer_files",
    "target_dir",
    "interferer_dirs",
    "ext",
    "random_track_mix",
    "random_interferer_mix",
    "silence_missing",
    "valid_share",
    "valid_seed",
    "sample_rate",
    "nb_train_samples",
    "nb_valid_samples",
)
LARGEST = 2**33  # bytes; 700 million parameters with two moments each


# ------------------------------------------------------------------------------------------ the file


class _OtherScheme(UsageError):
    """A checkpoint that is whole, but cannot be gone on from."""


class Checkpoint(NamedTuple):
    """What a file holds: names and arrays, and the dict `STATE`; its network with the statistics, if it has any."""

    path: Path
    parameters: dict
    average: dict
    solver: dict
    state: dict


def path_of(folder: Path, name: str) -> Path:
    """The checkpoint of a training in a folder."""
    return folder / f"{name}.checkpoint.npz"


def before(path: Path) -> Path:
    """The one before a checkpoint."""
    return path.with_name(f"{path.name.removesuffix('.npz')}.before.npz")


def load(path: str | Path, name: str) -> Checkpoint:
    """Read a checkpoint file, or that of `name` in a folder.

    Raises:
        UsageError: it cannot be read, is damaged, or of another scheme of random numbers; one line, which names the one
            before if that can be gone on from.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path_of(path, name)
    try:
        return _read(path)
    except UsageError as error:
        try:
            former = _read(before(path))
        except UsageError:
            raise error from None
        raise UsageError(f"{error}; the one before it is whole: --checkpoint {former.path}") from None


class _Parts(list):
    """A stream that keeps what is written to it, without copies."""

    def write(self, data):
        self.append(data)
        return len(data)

    def flush(self):
        pass


def _pack(arrays, meta):
    """The parts of a file, bytes or views of the arrays: what np.savez writes, and the checksum."""
    parts = _Parts()
    with zipfile.ZipFile(parts, "w") as archive:
        for name, array in {"meta": np.array(json.dumps(meta)), **arrays}.items():
            array = np.asarray(array, order="C")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                file.write(memoryview(array.reshape(-1).view(np.uint8)))
        archive.comment = bytes(4)  # written last: the place of the checksum
    crc = 0
    for part in parts[:-1]:
        crc = zlib.crc32(part, crc)
    return [*parts[:-1], crc.to_bytes(4, "little")]


def _read(path):
    try:
        data = files.read(path, LARGEST)
        return _checked(path, *_unpack(data))
    except (_OtherScheme, MemoryError):
        raise
    except Exception as error:  # garbage makes zipfile, json and NumPy raise nearly anything
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = f"it is damaged: {error if type(error) in (ValueError, UsageError) else repr(error)}"
        raise UsageError(f"cannot read the checkpoint {path}: {' '.join(reason.split())[:500]}") from None


def _unpack(data):
    """All arrays by name, and what `meta` says."""
    crc = zlib.crc32(memoryview(data)[:-4]).to_bytes(4, "little")
    is_older = data[-22:-18] == b"PK\5\6" and data[-2:] == b"\0\0"  # an archive that ends without a comment
    if not is_older and data[-4:] != crc:
        raise ValueError("its checksum differs")
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(info.file_size for info in archive.infolist()) > len(data):
            raise ValueError("it claims more than it holds")
        for info in archive.infolist():
            arrays[info.filename.removesuffix(".npy")] = _array(archive.read(info))
    if is_older and int.from_bytes(data[-12:-10], "little") != len(arrays):
        raise ValueError("its directory is not whole")
    return arrays, json.loads(str(arrays.pop("meta")))


def _array(data):
    """The array of a .npy file: of all of it, which np.load does not ask for."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array is in another format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)


# ------------------------------------------------------------------------------------- what it must be


def _is(kind: type, lower: float, upper: float = 1e300) -> Callable:
    """Whether a value is a number within these bounds, a whole one if `kind` is int; NaN is within none."""
    return lambda value: type(value) in (int, kind) and lower <= value <= upper


_COUNT = _is(int, 0, 2**53)
_SIZE = _is(int, 1, 2**31)
_NUMBER = _is(float, 0)
_LOSS = _is(float, -1e300)  # of some, the less the better, below 0, too
_BEST = _is(float, -1e300, float("inf"))  # before the first validation


def _is_name(value):
    return type(value) is str


# Of dicts, what they hold at least; of lists, what each item is.
STATE = {
    "log": {
        "args": {},
        "network": {
            "class": _is_name,
            "options": {},
            "targets": [_is_name],
            "nb_channels": _SIZE,
            "sample_rate": _is(float, 1, 2**31),
            "n_fft": _SIZE,
            "n_hop": _SIZE,
        },
        "train_loss_history": [_LOSS],
        "valid_loss_history": [_LOSS],
        "train_time_history": [_is(float, -1e300)],  # clocks are set back
        "lr_history": [_NUMBER],
        "epochs_trained": _COUNT,
        "best_epoch": _COUNT,
    },
    "scheduler": {"lr": _NUMBER, "best": _BEST, "num_bad_epochs": _COUNT, "cooldown": _COUNT},
    "stopping": {"best": _BEST, "num_bad_epochs": _COUNT},
    # the epoch that it is in, its steps so far, the sum of their losses, and what they took
    "progress": {"epoch": _SIZE, "steps": _COUNT, "loss": _LOSS, "seconds": _is(float, -1e300)},
}


def _check(value, expected, name):
    """ValueError unless a value is what is expected of it."""
    if isinstance(expected, dict):
        if type(value) is not dict:
            raise ValueError(f"{name} is not a dict")
        for key, item in expected.items():
            if key not in value:
                raise ValueError(f"{name} has no {key}")
            _check(value[key], item, f"{name}/{key}")
    elif isinstance(expected, list):
        if type(value) is not list:
            raise ValueError(f"{name} is not a list")
        for item in value:
            _check(item, expected[0], name)
    elif not expected(value):
        raise ValueError(f"{name} is {value!r}")


def _checked(path, arrays, meta):
    """The checkpoint of these arrays; ValueError if they cannot be what a training has left."""
    scheme = meta["log"].get("randomness", 1)
    if scheme != randomness.SCHEME:
        raise _OtherScheme(
            f"{path} drew its random numbers by scheme {scheme}, this version by scheme {randomness.SCHEME}: "
            "finish it with the version that began it, or go on from its weights with --model"
        )
    _check(meta, STATE, "meta")
    log, network, parser = meta["log"], meta["log"]["network"], train_parser()
    for name in ("ema", *LOSS, *DATASET):  # which earlier versions did not have
        log["args"].setdefault(name, parser.get_default(name))
    for name in RECIPE + DATASET:
        if not parser.accepts(name, log["args"][name]):
            raise ValueError(f"its {name} is {log['args'][name]!r}")
    if not network["targets"]:
        raise ValueError("it has no targets")
    folders.check_targets(network["targets"])
    epochs, best = log["epochs_trained"], log["best_epoch"]
    if any(len(values) != epochs for key, values in log.items() if key.endswith("_history")):
        raise ValueError(f"its histories are not of {epochs} epochs")
    if meta["progress"]["epoch"] != epochs + 1 or not bool(epochs) <= best <= epochs:
        raise ValueError(f"epoch {meta['progress']['epoch']}, after {epochs} with the best in {best}")
    if epochs and not log["best_loss"] == meta["stopping"]["best"] == log["valid_loss_history"][best - 1]:
        raise ValueError("its best loss is not that of the best epoch")

    groups = {"parameters": {}, "average": {}, "solver": {}, "statistics": {}}
    for key, value in arrays.items():
        group, _, name = key.partition("/")
        if key != "solver/step" and value.dtype != np.float32:
            raise ValueError(f"{key} is of {value.dtype}, not of float32")
        groups[group][name] = value
    for name, value in groups["statistics"].items():
        if name not in STATISTICS or value.shape != (network["n_fft"] // 2 + 1,) or not np.isfinite(value).all():
            raise ValueError(f"the statistics {name} are not one number per bin")
    if groups["statistics"]:
        network["statistics"] = groups["statistics"]
    shapes = [{name: value.shape for name, value in groups[key].items()} for key in ("average", "parameters")]
    if shapes[0] != (shapes[1] if log["args"]["ema"] else {}):
        raise ValueError(f"its averages are not those of its parameters, with ema {log['args']['ema']}")
    return Checkpoint(path, groups["parameters"], groups["average"], groups["solver"], meta)


# ---------------------------------------------------------------------------------------------- saving


class Keeper:
    """Saves a training, and ends it where nothing is half done.

    Args:
        path: of the checkpoint
        model, solver: what is trained
        kept: the model whose weights are validated and kept, averages or the model itself
        state: see `STATE`; its dicts change while the training goes on
        settle: brings them up to date, before anything is saved
        every: seconds between checkpoints within an epoch
        asked: whether a signal has asked for the end
        resumed: path of the checkpoint that the training goes on from; None: it is new
        processes: all that train it; the first one saves
    """

    def __init__(
        self,
        path: Path,
        model: Model,
        kept: Model,
        solver: Any,
        state: dict,
        settle: Callable[[], None],
        every: float,
        asked: Callable[[], bool],
        resumed: Path | None = None,
        processes: Alone = ALONE,
    ):
        self.processes = processes
        self.path, self.model, self.kept, self.solver = path, model, kept, solver
        self.state, self.settle, self.every, self.asked = state, settle, every, asked
        # A training that goes on from the one before: the last one is damaged, and does not become the one before.
        origin = resumed and resumed.resolve()
        self.is_ours = origin == path.resolve()  # what lies at `path`
        self.replaces = not self.is_ours and origin != before(path).resolve()  # another training's, if there is one
        self.saved = dict(state["progress"]) if self.is_ours else None
        self.time = time.monotonic()

    def between(self, items: Iterable) -> Iterator:
        """The items; between two of them, save if it is time; if a signal has come, save and end.

        If to get the next one fails, what has been done so far is saved. All processes have as many items, and end
        together.

        Raises:
            KeyboardInterrupt: a signal has come.
            OSError: the checkpoint cannot be written, or the parameters are not finite.
        """
        items = iter(items)
        while True:
            error = None
            try:
                item = next(items)
            except StopIteration:
                return
            except Exception as raised:
                error = raised
            try:
                self.processes.check(error)
            except Exception:
                with contextlib.suppress(OSError, MemoryError):
                    self._save_news()
                raise
            yield item
            ends = self.asked()
            if not self.processes.any(ends or time.monotonic() >= self.time + self.every):
                continue
            self._save_news()
            if self.processes.any(ends):
                where = f"in epoch {self.state['progress']['epoch']}, step {self.state['progress']['steps']}"
                raise KeyboardInterrupt(f"interrupted {where}; --checkpoint {self.path.parent} continues")

    def _save_news(self):
        if self.solver.step and self.saved != self.state["progress"]:
            self.save()

    def begin(self) -> None:
        """Before the first weights are written: no checkpoint of an earlier training, or none, may lie beside them."""
        if not self.is_ours:
            self.save()

    def save(self) -> None:
        """Write the checkpoint; the last one becomes the one before.

        Raises:
            OSError: it cannot be written, or numbers are not finite; what was there is still there. Or what `settle`
                raises.
        """
        self.settle()
        self.processes.first(self._write)
        self.is_ours, self.replaces = True, False
        self.saved, self.time = dict(self.state["progress"]), time.monotonic()

    def _write(self):
        arrays = {f"parameters/{name}": value for name, value in self.model.arrays().items()}
        if self.kept is not self.model:
            arrays.update({f"average/{name}": value for name, value in self.kept.arrays().items()})
        arrays.update({f"solver/{name}": value for name, value in self.solver.moments().items()})
        # a sum, the cheapest way to see it; one that is beyond single precision is as bad
        if broken := [name for name, value in arrays.items() if not np.isfinite(np.sum(value))]:
            raise OSError(f"{broken[0]} is not finite after {self.solver.step} steps: try a smaller --lr")
        statistics = self.model.description.get("statistics", {})
        arrays.update({f"statistics/{name}": value for name, value in statistics.items()})
        arrays["solver/step"] = np.array(self.solver.step)
        parts = _pack(arrays, self.state)
        if sum(map(len, parts)) > LARGEST:
            raise OSError(errno.EFBIG, "a checkpoint of this network would be too large to be read", str(self.path))
        files.write(self.path, *parts, former=before(self.path) if self.is_ours else None)
        if self.replaces:
            before(self.path).unlink(missing_ok=True)
