"""What the programs of this folder share: songs, commands, their outcomes, what a folder holds, what was counted."""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
LIMIT = 60  # seconds for a command that takes one or two: one that takes longer hangs

# The network and the recipe of all that is trained here: as small as can be
SMALL = ["--context", "cpu", "--threads", "1", "--quiet"]
TRAIN = [*SMALL, "--target", "bass", "--is-wav", "--hidden-size", "16", "--nfft", "512", "--nhop", "256"]
TRAIN += ["--bandwidth", "4000", "--seq-dur", "1", "--batch-size", "2", "--samples-per-track", "2"]
# What a log says of a run that was interrupted, and not of one that was not
VOLATILE = {"train_time_history", "checkpoint", "overwrite", "date", "seconds_per_minute", "commit", "seconds", "time"}

# ------------------------------------------------------------------------------------------ commands


class Outcome(NamedTuple):
    """How a command ended."""

    status: int  # that of Python's subprocess: a negative one is a signal
    errors: str  # what stderr got
    hangs: bool = False

    def problem(self, *allowed: int) -> str:
        """What is wrong with it, "" if nothing is: no crash, hang, traceback; one line if the status is not 0.

        Scripts that go on with the next of many songs have a line for each that they cannot use.
        """
        lines = [line for line in self.errors.splitlines() if line.strip()]
        many = [line for line in lines if line.startswith(("separate.py: ", "evaluate.py: ", "data.py: "))]
        if self.hangs:
            return f"hangs {self.errors[:1500]!r}"
        if "Traceback" in self.errors or "Exception ignored" in self.errors:
            return f"traceback {self.errors[-600:]!r}"
        if self.status not in allowed:
            return f"status {self.status} {self.errors[-300:]!r}"
        if self.status and len(lines) != 1 and (not lines or lines != many):
            return f"{len(lines)} lines {self.errors[-600:]!r}"
        return ""


def start(script: str, arguments: Iterable, folder: Path, errors) -> subprocess.Popen:
    """Start one of the scripts in a folder, with a cache folder of its own there."""
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    options = {"cwd": folder, "env": environment(folder), "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    return subprocess.Popen(command, stderr=errors, **options)


def environment(folder: Path) -> dict:
    """Of a command: one thread, and caches of its own in the folder."""
    limits = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "MKL", "OMP")}
    cache = os.environ.get("XDG_CACHE_HOME", str(Path("~/.cache").expanduser()))
    caches = {"XDG_CACHE_HOME": str(folder / "cache"), "MPLCONFIGDIR": f"{cache}/matplotlib"}
    return {**os.environ, **limits, **caches, "PYTHONFAULTHANDLER": "1"}


def run(script: str, arguments: Iterable, folder: Path, limit: float = LIMIT) -> Outcome:
    """Run one of the scripts to its end."""
    with tempfile.TemporaryFile("w+") as errors:
        process = start(script, arguments, folder, errors)
        hangs = not ends(process, limit)
        return Outcome(process.returncode, read_back(errors), hangs)


def ends(process: subprocess.Popen, limit: float) -> bool:
    """Wait for the end of a process; one that hangs is ended so that Python's faulthandler says where it was."""
    deadline = Deadline(process.pid, limit)
    while process.poll() is None:
        if not deadline.left():
            process.send_signal(signal.SIGABRT)
            process.wait()
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(1, deadline.left()))
    return True


class Deadline:
    """Seconds for a process, of which those do not count when others had the processor (as Linux tells)."""

    def __init__(self, pid: int, limit: float):
        self.place, self.end = Path(f"/proc/{pid}/schedstat"), time.monotonic() + limit

    def left(self) -> float:
        try:
            delayed = int(self.place.read_text().split()[1]) / 1e9
        except (OSError, IndexError):
            delayed = 0
        return max(0, self.end + delayed - time.monotonic())


def read_back(stream) -> str:
    stream.seek(0)
    return stream.read()


def forked(function: Callable, limit: float = LIMIT) -> Outcome:
    """Call a function in a child of this process, which saves it the imports; its SystemExit is the status.

    Of this process no other thread may be alive.
    """
    sys.stdout.flush()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.setsid()  # so that its children can be ended with it
            null = os.open(os.devnull, os.O_RDWR)
            for number, stream in ((null, 0), (null, 1), (writer, 2)):
                os.dup2(number, stream)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
            function()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    output, hangs, deadline = b"", False, Deadline(pid, limit)
    while not hangs:
        ready, _, _ = select.select([reader], [], [], min(1, deadline.left()))
        if ready:
            data = os.read(reader, 65536)
            output += data
            if not data:
                break
        elif not deadline.left():
            hangs = True
            os.killpg(pid, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    status = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Outcome(status, output.decode(errors="replace"), hangs)


def call(script: str, arguments: Iterable, folder: Path, limit: float = LIMIT) -> Outcome:
    """As `run`, in a child of this process, which has imported the scripts: see `warm_up`."""

    def work():
        os.chdir(folder)
        os.environ.update(environment(folder))
        sys.argv[0] = script
        MAINS[script]([str(argument) for argument in arguments])

    return forked(work, limit)


def again(script: str, folder: Path) -> list:
    """What a training that goes on is told besides: its output is the folder `out`."""
    if script != "train.py":
        return []
    if any((folder / "out").glob("*.checkpoint.npz")):
        return ["--checkpoint", "out"]
    return ["--overwrite"] if any((folder / "out").glob("*.h5")) else []


MAINS = {}  # {script: its main}


def warm_up(*scripts: str) -> None:
    """Import scripts, for `call`."""
    os.environ.update({f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "MKL", "OMP")})
    logging.getLogger("nnabla").setLevel(logging.WARNING)  # else its import is announced
    for script in scripts:
        MAINS[script] = __import__(script.removesuffix(".py")).main


# ------------------------------------------------------------------------------------------ folders


def contents(folder: Path) -> dict:
    """What a folder holds, {relative path: digest}: of logs without times, of archives and checkpoints the arrays.

    Folders without files count too. Caches of libraries do not.
    """
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            found[name] = "special"
        elif path.is_dir():
            if not any(path.iterdir()):
                found[name + "/"] = "empty"
        else:
            found[name] = digest(path)
    return found


def digest(path: Path) -> str:
    if path.stat().st_size > 2**30:
        return "huge"
    data = path.read_bytes()
    with contextlib.suppress(Exception):  # what is damaged counts as it is
        if path.suffix == ".json":
            data = json.dumps(steady(json.loads(data)), sort_keys=True).encode()
        elif path.suffix == ".npz":
            data = repr(archive(path)).encode()
        elif path.suffix == ".wav":  # of floats, it says when it was written
            import soundfile

            samples, rate = soundfile.read(path, dtype="float64")
            data = f"{rate} {samples.shape} {soundfile.info(path).subtype}".encode() + samples.tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def archive(path: Path) -> dict:
    """What a checkpoint holds, {name: digest, or text}."""
    import numpy as np

    with np.load(path) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    values = {}
    for name, array in found.items():
        if array.dtype.kind == "U":
            values[name] = json.dumps(steady(json.loads(str(array))), sort_keys=True)
        elif "checksum" not in name:
            values[name] = array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest()
    return dict(sorted(values.items()))


def steady(value):
    """A log without what no two runs have alike."""
    if isinstance(value, dict):
        return {key: steady(item) for key, item in value.items() if key not in VOLATILE}
    return [steady(item) for item in value] if isinstance(value, list) else value


def is_temporary(name: str) -> bool:
    """Whether it may lie in a folder while somebody is at work there, or after he was killed."""
    return bool(re.search(r"(^|/)\.[0-9a-f]{8}\.partial(/|$)|\.lock$", name))


def difference(found: dict, expected: dict) -> str:
    """The first few names in which two `contents` differ."""
    names = [f"{name} is left" for name in found if name not in expected]
    names += [f"{name} is missing" for name in expected if name not in found]
    names += [f"{name} differs" for name in expected if name in found and found[name] != expected[name]]
    return ", ".join(names[:5])


def songs(folder: Path, duration: float = 2.5) -> Path:
    """Two songs to train on, one to validate and one to test, at 8 kHz so that all goes fast."""
    import synthesize

    synthesize.synthesize(folder, 2, 1, 1, duration, seed=5, sample_rate=8000, quiet=True)
    return folder


def stems(songs: Path, folder: Path) -> Path:
    """The songs as .stem.mp4."""
    import numpy as np
    import soundfile

    for song in sorted(songs.glob("t*/*")):
        path = folder / song.parent.name / f"{song.name}.stem.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        names = ("mixture", "drums", "bass", "other", "vocals")
        audio = [soundfile.read(song / f"{name}.wav", dtype="float32")[0] for name in names]
        with tempfile.TemporaryDirectory() as temporary:
            inputs, maps = [], []
            for k, (name, samples) in enumerate(zip(names, audio)):
                soundfile.write(f"{temporary}/{name}.wav", np.repeat(samples, 6, axis=0)[: 6 * len(samples)], 48000)
                inputs += ["-i", f"{temporary}/{name}.wav"]
                maps += ["-map", f"{k}:a"]
            subprocess.run(["ffmpeg", "-v", "error", "-y", *inputs, *maps, "-c:a", "aac", path], check=True)
    return folder


@contextlib.contextmanager
def workplace():
    """A new folder, with what every program needs: songs/."""
    with tempfile.TemporaryDirectory(prefix="faults.") as name:
        folder = Path(name).resolve()
        songs(folder / "songs")
        yield folder


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# ------------------------------------------------------------------------------------------ counting


def options(description: str, runs: int, help_of_runs: str, **flags: str) -> argparse.Namespace:
    """The command line of a program; `flags` are options of its own, with their help."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--runs", type=int, default=runs, help=f"{help_of_runs}; default: {runs}")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="default: another one each time")
    parser.add_argument("--processes", type=int, default=2, help="at a time")
    parser.add_argument("--only", default="", metavar="WORDS", help="kinds with these words in their name")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args()


class Case(NamedTuple):
    """What came of one case."""

    kind: str
    result: str  # in a word or two; what is not good begins with "BAD"
    detail: str = ""


def count(title: str, function: Callable, cases: list, options: argparse.Namespace) -> int:
    """Call function(case), which returns a `Case`, for all cases; print what came of them; the exit status.

    The calls are spread over processes, forked from this one.
    """
    begin, counted = time.monotonic(), collections.defaultdict(collections.Counter)
    for case in spread(function, cases, options.processes):
        counted[case.kind][case.result] += 1
        if case.result.startswith("BAD"):
            print(f"  {case.kind}: {case.result}: {case.detail}", flush=True)
    for kind, results in sorted(counted.items()):
        print(f"  {kind:28} " + ", ".join(f"{number} {result}" for result, number in sorted(results.items())))
    total = sum(counted.values(), collections.Counter())
    bad = sum(number for result, number in total.items() if result.startswith("BAD"))
    seconds = time.monotonic() - begin
    print(f"{title}: {sum(total.values())} cases, {bad} bad, in {seconds:.0f} s (--seed {options.seed})", flush=True)
    return int(bad > 0)


def spread(function: Callable, cases: list, processes: int) -> Iterator:
    """Results of function(case), as they come; each process takes a case after the other."""
    global _work
    _work = function, cases  # forked with the processes: nothing of it is pickled
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(processes, fork) as pool:
        for future in concurrent.futures.as_completed([pool.submit(_call, k) for k in range(len(cases))]):
            yield future.result()


def _call(k):
    function, cases = _work
    return function(cases[k])
