"""A look at a dataset before hours are spent on it: levels, silence, clipping, sums, duplicates, speed, pictures."""

from __future__ import annotations  # unions, on Python 3.9

import filecmp
import hashlib
import io
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

import files
from audio import BLOCK
from datasets.batches import DataIterator
from datasets.recordings import Recording
from datasets.sources import Dataset
from datasets.statistics import magnitudes
from utils import UsageError, some

CLIPPED = 32767 / 32768  # the largest sample that 16 bits hold
SUMS_DIFFER = 0.01  # of the level of a mixture, by which the sum of its sources may differ: 40 dB below


class Levels(NamedTuple):
    """Of a recording: its largest sample, how many are at the limit, and a checksum of all."""

    peak: float
    nb_clipped: int
    checksum: bytes


def levels(recording: Recording) -> Levels:
    peak, nb_clipped, checksum = 0.0, 0, hashlib.blake2b(digest_size=16)
    for start in range(0, recording.nb_timesteps, BLOCK):
        samples = recording.samples(start, min(BLOCK, recording.nb_timesteps - start), "float32")
        magnitude = np.abs(samples)
        peak = max(peak, float(magnitude.max()))
        nb_clipped += int((magnitude >= CLIPPED).sum())
        checksum.update(samples)
    return Levels(peak, nb_clipped, checksum.digest())


def look(splits: dict[str, Dataset], test: Iterable[Recording] = (), quiet: bool = True) -> tuple[list[str], list[str]]:
    """Read all that is there.

    Args:
        splits: name -> dataset
        test: what must not be among theirs
    Returns:
        lines on what should not be trained with, and lines on what is to be known
    """
    wrong, known, seen = [], [], {}
    recordings = {name: list(dict.fromkeys(source.recordings())) for name, source in splits.items()}
    recordings["test"] = list(test)
    for split, of_split in recordings.items():
        silent, clipped = [], []
        for one in tqdm(of_split, f"Looking at {split}", leave=False, disable=quiet):
            found = levels(one)
            if found.peak == 0:
                silent.append(one.name)
                continue
            if found.nb_clipped > 3:
                clipped.append(f"{one.name} ({found.nb_clipped} samples)")
            earlier, other = seen.setdefault(found.checksum, (split, one))
            if other is not one:
                line = f"{one.name} of {split} has the samples of {other.name} of {earlier}"
                (wrong if earlier != split else known).append(line)
        if split != "test":
            known += [f"{split}: silent: {some(silent)}"] if silent else []
            known += [f"{split}: clipped: {some(clipped)}"] if clipped else []
    for split, source in splits.items():
        known += [f"{split}: {line}" for line in sums_that_differ(source)]
    return wrong, known


def copies(files: Iterable[Path], test: Iterable[Path]) -> list[str]:
    """Lines on files of a test set that are those to train or validate with, byte for byte."""
    files, test = sorted(files), sorted(test)
    return [f"{b} is a copy of {a}" for b in test for a in files if filecmp.cmp(a, b, shallow=False)]


def sums_that_differ(source: Dataset) -> list[str]:
    """Songs whose mixture is not the sum of their sources, and by how much."""
    found = []
    for name, mixture, total in source.sums():
        error = power = 0.0
        for start in range(0, mixture.nb_timesteps, BLOCK):
            nb_timesteps = min(BLOCK, mixture.nb_timesteps - start)
            x, y = (one.read_mixture(start, nb_timesteps).astype(np.float64) for one in (mixture, total))
            error, power = error + ((x - y) ** 2).sum(), power + (x**2).sum()
        if error > SUMS_DIFFER**2 * power:
            found.append(f"{name} ({10 * np.log10(error / max(power, 1e-12)):.0f} dB)")
    return [f"mixtures that are not the sum of their sources: {some(found)}"] if found else []


def speeds(source: Dataset, batch_size: int, most: int, seconds: float = 2.0) -> Iterable[str]:
    """Lines on how many excerpts a second 1, 2, … `most` workers prepare, and what step of a device that feeds."""
    for nb_workers in (n for n in (1, 2, 4, 8, 16) if n <= most):
        iterator, count, epoch, start = DataIterator(source, batch_size, nb_workers), 0, 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            epoch += 1
            batches = iterator.epoch(epoch)
            for mixtures, _ in batches:
                count += mixtures.shape[0]
                elapsed = time.perf_counter() - start
                if elapsed > seconds:
                    break
            batches.close()
        rate = count / elapsed
        step = 1000 * batch_size / rate
        yield f"{nb_workers} worker(s): {rate:.0f} excerpts per second, for steps of {step:.0f} ms or more"


def draw_page(path: str | Path, source: Dataset, targets: list[str], batch_size: int, n_fft: int = 2048) -> None:
    """One page with a batch: spectrograms of mixtures and targets, below each other, and their levels."""
    from matplotlib.figure import Figure  # slow to import

    x, y = next(DataIterator(source, min(batch_size, 8)).epoch(1))
    rows = [(name, audio.data) for name, audio in zip(["mixture", *targets], [x, *y])]
    nb_samples = x.shape[0]
    figure = Figure(figsize=(2.2 * nb_samples + 1, 2.2 * len(rows) + 2), layout="constrained")
    axes = figure.subplots(len(rows) + 1, nb_samples, squeeze=False)
    for row, (name, audio) in enumerate(rows):
        for column, excerpt in enumerate(audio):
            place, duration = axes[row, column], excerpt.shape[1] / source.sample_rate
            n_fft = min(n_fft, excerpt.shape[1])
            decibels = 20 * np.log10(magnitudes(excerpt, n_fft, n_fft // 4).T + 1e-4)
            extent = (0, duration, 0, source.sample_rate / 2000)
            place.imshow(decibels, origin="lower", aspect="auto", extent=extent, vmin=-60, vmax=40, cmap="magma")
            place.set(title=name if column == 0 else "", xticks=[], ylabel="kHz" if column == 0 else "")
            blocks = excerpt[:, : excerpt.shape[1] // 64 * 64].reshape(len(excerpt), 64, -1)
            level = 20 * np.log10(np.sqrt((blocks**2).mean(axis=(0, 2))) + 1e-5)
            axes[-1, column].plot(np.linspace(0, duration, 64), level, lw=1, label=name)
    for column, place in enumerate(axes[-1]):
        place.set(ylim=(-80, 0), xlabel="s", ylabel="dB" if column == 0 else "")
    axes[-1, 0].legend(fontsize="x-small")
    stream, form = io.BytesIO(), Path(path).suffix[1:].lower() or "png"
    if form not in ("png", "pdf", "svg"):
        raise UsageError(f"the page {path} is none of png, pdf and svg")
    figure.savefig(stream, format=form, dpi=100)
    files.write(path, stream.getvalue())


def audio_files(folder: Path) -> list[Path]:
    """Files that soundfile reads, in a folder and those in it."""
    endings = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".aifc"}
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
