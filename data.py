"""Training and validation data from MUSDB18, its augmentations and statistics; tracks.py finds and reads the songs."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import utils

if __name__ == "__main__":
    utils.start()  # before imports that take long

import numpy as np
import scipy.fft
from tqdm import tqdm

from args import data_parser
from randomness import random_stream
from tracks import Track, database, open_track
from utils import UsageError, finite, whole

# ------------------------------------------------------------------------------- augmentations


def gain(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Audio (nb_channels, nb_timesteps) times a random factor in [0.25, 1.25)."""
    return audio * np.float32(0.25 + rng.random())


def channelswap(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stereo audio (2, nb_timesteps) with its channels swapped, with a probability of one half."""
    return audio[::-1] if len(audio) == 2 and rng.random() < 0.5 else audio


# The one place that names them; another one is a function as above, and a line here.
AUGMENTATIONS = {"gain": gain, "channelswap": channelswap}


# ------------------------------------------------------------------------------------- sources


def _checked_names(kind, names, known):
    """A tuple of names; `UsageError` for one that is unknown, or given twice."""
    if not isinstance(names, Iterable) or isinstance(names, str):
        raise UsageError(f"expected names of {kind}s, not {names!r}")
    names = tuple(map(str, names))
    for name, count in Counter(names).items():
        if name not in known:
            raise UsageError(f"unknown {kind} {name!r}: there are {', '.join(known)}")
        if count > 1:
            raise UsageError(f"the {kind} {name!r} is named {count} times")
    return names


class MusdbSource:
    """Pairs (mixture, target) of one split of MUSDB18, float32 (nb_channels, nb_timesteps).

    With `seq_dur`, item `index` of an `epoch` is a mixture that never was: for each source, in musdb's
    order, a track drawn with replacement, a start drawn uniformly, then the augmentations. All draws
    depend on (seed, epoch, index) alone, so neither threads nor an interruption change the data.
    Without, item `index` is a whole track with its official mixture.

    Args:
        target: a source of musdb, or one of its sums of sources (accompaniment, linear_mixture); or several of
            them, then a target is an array (nb_targets, nb_channels, nb_timesteps)
        root: folder of MUSDB18; None downloads musdb's 7 s excerpts
        split: "train" or "valid"
        is_wav: tracks are folders of WAV files
        seq_dur: seconds per excerpt; None: whole tracks
        samples_per_track: times the number of tracks is the number of items
        augmentations: names in AUGMENTATIONS, in their order
        quiet: no progress bar while tracks are found, or decoded
    Raises:
        UsageError: no such folder, split, stem, target or augmentation; a track with anything wrong, as `open_track`
            finds it, or shorter than an excerpt.
        ValueError: numbers that cannot be.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        root: str | Path | None = None,
        split: str = "train",
        is_wav: bool = False,
        seq_dur: float | None = None,
        samples_per_track: int = 1,
        augmentations: Iterable[str] = (),
        seed: int = 42,
        quiet: bool = True,
    ):
        if seq_dur is not None:
            finite("seq_dur", seq_dur, 0)
        self.seed = whole("seed", seed, 0, 2**64)
        self.samples_per_track = whole("samples_per_track", samples_per_track, 1, 10**6)
        self.augmentations = _checked_names("augmentation", augmentations, AUGMENTATIONS)
        _checked_names("split", [split], ("train", "valid"))
        mus = database(root, is_wav, split=split)
        known = mus.setup["targets"]
        targets = _checked_names("target", [target] if isinstance(target, str) else target, known)
        if not targets:
            raise UsageError("no target is named")
        self.gains = [known[name] for name in targets]  # of each target: {source: gain}
        self.stacked = not isinstance(target, str)
        self.tracks = [
            open_track(track, mus.setup["sources"], is_wav)
            for track in tqdm(mus.tracks, f"Reading {split} tracks", leave=False, disable=quiet)
        ]
        formats = {(track.sample_rate, track.nb_channels) for track in self.tracks}
        if len(formats) > 1:
            raise UsageError(f"tracks of {mus.root} differ in (sample rate, channels): {sorted(formats)}; convert them")
        (self.sample_rate, self.nb_channels), *_ = formats
        self.nb_timesteps = None if seq_dur is None else round(seq_dur * self.sample_rate)
        if self.nb_timesteps == 0:
            raise UsageError(f"--seq-dur {seq_dur} is less than a sample")
        for track in self.tracks:
            if self.nb_timesteps is not None and track.nb_timesteps < self.nb_timesteps:
                seconds = track.nb_timesteps / self.sample_rate
                raise UsageError(f"track {track.name!r} has {seconds:.2f} s: too short for --seq-dur {seq_dur}")

    def __len__(self) -> int:
        return len(self.tracks) * self.samples_per_track

    def item(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Mixture and target, each (nb_channels, nb_timesteps); of several targets (nb_targets, …)."""
        if self.nb_timesteps is None:
            return self.whole_track(self.tracks[index // self.samples_per_track])
        sources = {source: self._excerpt(source, epoch, index) for source in self.tracks[0].sources}
        return sum(sources.values()), self._target(sources.items())

    def _excerpt(self, source, epoch, index):
        key = {"seed": self.seed, "epoch": epoch, "index": index, "source": source}
        rng = random_stream("draw", **key)
        track = self.tracks[rng.integers(len(self.tracks))]
        # to the nearest sample, like ffmpeg, which reads for the reference
        start = round(rng.uniform(0, track.nb_timesteps - self.nb_timesteps))
        audio = track.read(track.sources[source], start, self.nb_timesteps)
        for name in self.augmentations:
            audio = AUGMENTATIONS[name](audio, random_stream("augmentation", **key, name=name))
        return audio

    def _target(self, sources):
        targets = [0] * len(self.gains)
        for name, audio in sources:
            for k, gains in enumerate(self.gains):
                if name in gains:
                    targets[k] = targets[k] + np.float32(gains[name]) * audio
        return np.stack(targets) if self.stacked else targets[0]

    def whole_track(self, track: Track) -> tuple[np.ndarray, np.ndarray]:
        """The official mixture of a track and its target, shaped like those of an item."""
        names = [name for name in track.sources if any(name in gains for gains in self.gains)]
        sources = ((name, track.read(track.sources[name])) for name in names)
        return track.read(track.mixture), self._target(sources)


class DataIterator:
    """Batches of a source, prepared ahead by `nb_workers` threads; 0 prepares each when it is asked for.

    The last batch of an epoch is smaller if the items do not come out even.
    """

    AHEAD = 3  # batches in preparation: enough to bridge one slow read, little memory

    def __init__(self, source: MusdbSource, batch_size: int, nb_workers: int = 0):
        self.source = source
        self.batch_size, self.nb_workers = whole("batch_size", batch_size), whole("nb_workers", nb_workers, 0, 1024)

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield mixtures and targets, (nb_samples, nb_channels, nb_timesteps) each, in the epoch's own order.

        Args:
            start: number of batches that are left out at its beginning
        """
        order = random_stream("order", seed=self.source.seed, epoch=epoch).permutation(len(self.source))
        batches = (order[k : k + self.batch_size] for k in range(start * self.batch_size, len(order), self.batch_size))
        if self.nb_workers == 0:
            for batch in batches:
                yield self._stack([self.source.item(epoch, index) for index in batch])
            return
        pool = ThreadPoolExecutor(self.nb_workers)
        try:
            pending = deque()
            for batch in batches:
                pending.append([pool.submit(self.source.item, epoch, index) for index in batch])
                if len(pending) > self.AHEAD:
                    yield self._stack([item.result() for item in pending.popleft()])
            while pending:
                yield self._stack([item.result() for item in pending.popleft()])
        finally:
            pool.shutdown(cancel_futures=True)

    @staticmethod
    def _stack(items):
        return tuple(np.stack(arrays) for arrays in zip(*items))


# ---------------------------------------------------------------------------------- statistics


def magnitudes(audio: np.ndarray, n_fft: int, n_hop: int) -> np.ndarray:
    """Magnitude, averaged over channels, of uncentred frames of audio (nb_channels, nb_timesteps).

    Returns:
        (nb_frames, nb_bins) float32
    """
    window = np.hanning(n_fft + 1)[:-1].astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(audio, n_fft, axis=1)[:, ::n_hop]
    return np.abs(scipy.fft.rfft(frames * window)).mean(axis=0)


def statistics(tracks: Sequence[Track], n_fft: int, n_hop: int, quiet: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per bin of the mixtures' magnitudes, over all frames of all tracks.

    The reference's recipe: uncentred STFT of whole mixtures, no augmentation, magnitude averaged over
    channels; deviations floored at 1e-4 of the largest. A bin that never changes counts as deviation 1,
    as in scikit-learn's StandardScaler, which the reference uses.

    Returns:
        mean, std: float64 (nb_bins,)
    Raises:
        ValueError: no track, or one shorter than `n_fft`; sizes that cannot be.
        OSError: as `Track.read`.
    """
    whole("n_fft", n_fft), whole("n_hop", n_hop)
    if min((track.nb_timesteps for track in tracks), default=0) < n_fft:
        raise ValueError(f"no tracks, or one shorter than a frame of {n_fft} samples")
    count, mean, squares = 0, np.zeros(n_fft // 2 + 1), np.zeros(n_fft // 2 + 1)
    block = 512 * n_hop  # a few seconds at a time: a whole song's frames would take a gigabyte
    for track in tqdm(tracks, "Dataset statistics", leave=False, disable=quiet):
        nb_frames = 1 + (track.nb_timesteps - n_fft) // n_hop
        used = (nb_frames - 1) * n_hop + n_fft
        for start in range(0, nb_frames * n_hop, block):
            audio = track.read(track.mixture, start, min(block - n_hop + n_fft, used - start))
            X = magnitudes(audio, n_fft, n_hop).astype(np.float64)
            # Chan, Golub & LeVeque 1979: merge two groups' means and sums of squared deviations
            n, delta = len(X), X.mean(axis=0) - mean
            squares += X.var(axis=0) * n + delta**2 * (count * n / (count + n))
            mean += delta * (n / (count + n))
            count += n
    std = np.sqrt(squares / count)
    # what rounding leaves of a constant bin, by the bound that scikit-learn uses
    eps = np.finfo(np.float64).eps
    std[std**2 <= count * eps * std**2 + (count * mean * eps) ** 2] = 1
    return mean, np.maximum(std, 1e-4 * std.max())


# -------------------------------------------------------------------------------- command line


def problems(target: str, root: str | Path | None, is_wav: bool, split: str, quiet: bool) -> list[str]:
    """All that is wrong with the tracks of a split, a line for each; all their files are read to their ends."""
    try:
        mus = database(root, is_wav, split=split)
        _checked_names("target", [target], mus.setup["targets"])
    except UsageError as error:
        return [str(error)]
    found = []
    for track in tqdm(mus.tracks, f"Reading {split} tracks", leave=False, disable=quiet):
        try:
            open_track(track, mus.setup["sources"], is_wav, thorough=True)
        except (UsageError, OSError) as error:
            found.append(utils.describe(error))
    return found


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    """Check a dataset: read everything that is there, say all that is wrong with it, how much there is, how fast."""
    options = data_parser().parse_args(argv)
    musdb = {"target": options.target, "root": options.root, "is_wav": options.is_wav, "quiet": options.quiet}
    lines = [line for split in ("train", "valid") for line in problems(**musdb, split=split)]
    for line in dict.fromkeys(lines):
        print(f"data.py: {line}", file=sys.stderr)
    if lines:
        sys.exit(2)
    train = MusdbSource(**musdb, seq_dur=options.seq_dur, samples_per_track=64)
    for split, source in (("train", train), ("valid", MusdbSource(**musdb, split="valid"))):
        hours = sum(track.nb_timesteps for track in source.tracks) / source.sample_rate / 3600
        print(
            f"{split}: {len(source.tracks)} tracks, {hours:.2f} h, {source.sample_rate} Hz, "
            f"{source.nb_channels} channel(s)"
        )
    start, nb_items = time.time(), 64
    for index in range(nb_items):
        train.item(0, index)
    print(f"excerpts: {nb_items / (time.time() - start):.0f} mixtures of {options.seq_dur} s per second and thread")


if __name__ == "__main__":
    main()
