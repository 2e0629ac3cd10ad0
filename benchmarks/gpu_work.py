"""What the stages of gpu.py share: sizes, the two sides of a comparison, songs, and rows that say what is found.

A row is a JSON object, printed as soon as it is known on a line of its own that begins with gpu.MARK: what a stage has
found before it crashes, or is killed, is not lost.
"""

import contextlib
import csv
import json
import math
import statistics
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import nnabla as nn
import work
from gpu import MARK
from nnabla.ext_utils import import_extension_module

import context
import utils
from synthesize import synthesize

# Lengths are in seconds. Where cpu is rehearsed, all is as small as it can be.
SIZES = {
    "cudnn": {
        "nb_samples": 16, "seconds": 6, "hidden_size": 512, "joint_samples": 4, "nb_frames": 255, "n_fft": 4096,
        "warm_up": 10, "steps": 150, "parts": 20, "validation": (240, 600, 1500), "workers": (0, 1, 2, 4, 8, 12, 16),
        "nb_batches": 60, "songs": (6, 30), "samples_per_track": 400, "song": 180, "excerpt": 20,
    },
    "cpu": {
        "nb_samples": 2, "seconds": 0.5, "hidden_size": 16, "joint_samples": 2, "nb_frames": 11, "n_fft": 1024,
        "warm_up": 1, "steps": 2, "parts": 1, "validation": (1, 2), "workers": (0, 1),
        "nb_batches": 2, "songs": (2, 4), "samples_per_track": 4, "song": 3, "excerpt": 2,
    },
}  # fmt: skip


# --------------------------------------------------------------------------------------------- rows


def _row(kind, what, **values):
    print(f"\n{MARK}{json.dumps({'kind': kind, 'what': what, **values})}", flush=True)


def fact(what, value):
    """Something to know."""
    _row("fact", what, value=str(value))


def check(what, difference, tolerance):
    """A difference from what must be; it passes if it is at most the tolerance."""
    _row("check", what, difference=float(difference), tolerance=tolerance, passed=bool(difference <= tolerance))


def measure(what, ours, unit, torch=None, tf32=None):
    """A number, beside those of torch, without TF32 and with its own defaults, where there are any."""
    _row("measure", what, ours=float(ours), unit=unit, torch=torch, tf32=tf32)


# -------------------------------------------------------------------------------------------- sides


class Sides:
    """The two that are compared: what a GPU computes, or in a rehearsal the plain forms; and the fast ones of the CPU.

    Attributes:
        name: the context that is looked at, "cudnn" or "cpu"
        plain: whether its graph functions are the plain ones only if they are asked for
        sizes: of the work, see SIZES; those that `work` has are changed there
        torch, modules: torch's interpreter, and a folder of modules for it, or None
    """

    def __init__(self, name, torch, modules):
        self.name, self.plain, self.sizes = name, name == "cpu", SimpleNamespace(**SIZES[name])
        self.torch, self.modules = torch, modules
        self.device, self.cpu = context.use(name), context.extension_context("cpu")
        work.HIDDEN_SIZE, work.N_FFT, work.N_HOP = self.sizes.hidden_size, self.sizes.n_fft, self.sizes.n_fft // 4
        work.MAX_BIN = utils.bandwidth_to_max_bin(work.RATE, work.N_FFT, 16000)

    @contextlib.contextmanager
    def tested(self):
        context.set_plain(self.plain)
        try:
            with nn.context_scope(self.device):
                yield
        finally:
            context.set_plain(False)

    @contextlib.contextmanager
    def reference(self):
        with nn.context_scope(self.cpu):
            yield

    def wait(self):
        """Until the device has done all that it was asked for."""
        wait_for(self.name)


def wait_for(name):
    """Until the device of a context has done all that it was asked for."""
    import_extension_module("cpu" if name == "cpu" else "cuda").device_synchronize("0")


class Samples:
    """Of the GPU while a block runs, by nvidia-smi; NaN where there is none.

    Attributes:
        busy: share of the time in which a kernel ran, median over samples: beginnings that are short do not count
        memory: bytes, the most, beyond what was taken when the block began
    """

    FIELDS = "--query-gpu=utilization.gpu,memory.used"
    COMMAND = ["nvidia-smi", FIELDS, "--format=csv,noheader,nounits", "--id=0"]

    def __enter__(self):
        self.busy = self.memory = math.nan
        self.file, self.process = tempfile.TemporaryFile("w+"), None
        with contextlib.suppress(OSError):
            self.before = self._parsed(subprocess.run(self.COMMAND, capture_output=True, text=True).stdout)
            self.process = subprocess.Popen([*self.COMMAND, "--loop-ms=100"], stdout=self.file)
        return self

    def __exit__(self, *error):
        with self.file:
            if self.process is None:
                return
            self.process.terminate()
            self.process.wait()
            self.file.seek(0)
            samples = self._parsed(self.file.read())
        if samples and self.before:
            self.busy = statistics.median(busy for busy, _ in samples) / 100
            self.memory = (max(memory for _, memory in samples) - self.before[0][1]) * 2**20

    @staticmethod
    def _parsed(text):
        lines = (line.split(",") for line in text.splitlines() if line.count(",") == 1)
        return [tuple(map(float, line)) for line in lines if all(value.strip().isdecimal() for value in line)]

    def tell(self, what):
        if not math.isnan(self.memory):
            measure(f"{what}: memory of the GPU", self.memory / 2**20, "MiB")


# -------------------------------------------------------------------------------------------- songs


def write_songs(folder, nb_songs, seconds):
    """Synthetic songs, one of them for validation, and their manifest, whose path is returned: musdb needs ffmpeg."""
    folders = synthesize(folder / "songs", nb_songs - 1, 1, 0, seconds, quiet=True)
    manifest = folder / "songs.csv"
    with manifest.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["song", "stem", "path", "split"])
        for number, song in enumerate(folders):
            split = "valid" if number == nb_songs - 1 else "train"
            rows.writerows([song.name, path.stem, path, split] for path in sorted(song.glob("*.wav")))
    return manifest


# --------------------------------------------------------------------------------------------- main


@utils.command
def main(stages):
    """Run a stage: the command line is a JSON list of its name and the arguments of `Sides`.

    Args:
        stages: functions of `Sides`, by name
    """
    stage, *options = json.loads(sys.argv[1])
    stages[stage](Sides(*options))
