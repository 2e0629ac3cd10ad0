"""Training and validation data from MUSDB18, its augmentations and statistics.

musdb finds the tracks, their split, sources and targets; soundfile reads the excerpts, by seeking, which
is a hundred times faster than a process of ffmpeg per excerpt. Stems in .mp4 are decoded once, into WAV.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pooch
import scipy.fft
import soundfile
from tqdm import tqdm

from args import data_parser
from utils import UsageError, command, random_stream

if TYPE_CHECKING:
    import musdb

# Which numbers are drawn for a seed: another scheme gets another number. 1 (no number in the log) drew the order of an
# epoch and its first excerpt from one stream, and an augmentation more changed what later sources drew.
RANDOMNESS = 2

# ------------------------------------------------------------------------------- augmentations


def gain(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Audio (nb_channels, nb_timesteps) times a random factor in [0.25, 1.25)."""
    return audio * np.float32(0.25 + rng.random())


def channelswap(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stereo audio (2, nb_timesteps) with its channels swapped, with a probability of one half."""
    return audio[::-1] if len(audio) == 2 and rng.random() < 0.5 else audio


# The one place that names them; another one is a function as above, and a line here.
AUGMENTATIONS = {"gain": gain, "channelswap": channelswap}


# -------------------------------------------------------------------------------------- tracks


@dataclass
class Track:
    """One song: files of at least `nb_timesteps` samples each, at `sample_rate` Hz, `nb_channels` wide."""

    name: str
    mixture: Path
    sources: dict[str, Path]
    nb_timesteps: int
    sample_rate: int
    nb_channels: int


def read(path: str | Path, start: int = 0, nb_timesteps: int = -1) -> np.ndarray:
    """Samples of an audio file, float32 (nb_channels, nb_timesteps); -1: all from `start` on."""
    audio, _ = soundfile.read(path, start=start, frames=nb_timesteps, dtype="float32", always_2d=True)
    return np.ascontiguousarray(audio.T)


def database(root: str | Path | None, is_wav: bool, subset: str = "train", split: str | None = None) -> musdb.DB:
    """musdb's database of one subset, or a split of it, and a clear line for everything that can be wrong with it."""
    for program in ("ffmpeg", "ffprobe"):
        if shutil.which(program) is None:
            raise UsageError(f"musdb needs {program} on the PATH: install ffmpeg (apt-get or conda)")
    import ffmpeg
    import musdb

    if root is None:
        if is_wav:
            raise UsageError("--is-wav needs --root: the excerpts that musdb downloads are stems")
        try:
            return musdb.DB(subsets=subset, split=split, download=True)
        except OSError as error:
            raise UsageError(f"musdb's 7 s excerpts cannot be downloaded ({error}): give --root") from None

    folder = Path(root).expanduser() / subset
    if not folder.is_dir():
        raise UsageError(f"{root} has no folder {subset}/: --root names the folder of MUSDB18")
    if is_wav and next(folder.glob("*.stem.mp4"), None):
        raise UsageError(f"{folder} holds .stem.mp4 files, not WAV: leave out --is-wav")
    if not is_wav and next(folder.glob("*/*.wav"), None):
        raise UsageError(f"{folder} holds folders of WAV files, not stems: add --is-wav")
    try:
        mus = musdb.DB(root=root, subsets=subset, split=split, is_wav=is_wav)
    except (ffmpeg.Error, KeyError) as error:  # KeyError: ffprobe reads the file, but finds no audio in it
        detail = error.stderr.decode().strip().splitlines()[-1] if isinstance(error, ffmpeg.Error) else "no audio"
        raise UsageError(f"a track in {folder} cannot be read: {detail}") from None
    if not mus.tracks:
        names = f"; validation songs are named like {mus.setup['validation_tracks'][0]!r}" if split == "valid" else ""
        raise UsageError(f"no tracks of the {f'split {split!r}' if split else 'subset'} in {folder}{names}")
    return mus


def _decode_stems(track, sources, folder):
    """Write a musdb track of .stem.mp4 as 16-bit WAV files (musdb's own resolution) into `folder`, once."""
    stat = Path(track.path).stat()
    key = f"{Path(track.path).resolve()} {stat.st_size} {stat.st_mtime_ns}"
    target = folder / f"{track.name} {hashlib.sha256(key.encode()).hexdigest()[:8]}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
        partial = Path(temporary, "stems")
        partial.mkdir()
        for name, audio in [("mixture", track), *((source, track.sources[source]) for source in sources)]:
            samples = np.round(audio.audio * 32768).astype(np.int16)
            soundfile.write(partial / f"{name}.wav", samples, int(track.rate), subtype="PCM_16")
        try:
            partial.rename(target)
        except OSError:  # another process has decoded it meanwhile
            if not target.is_dir():
                raise
    return target


def _find_tracks(root, is_wav, split, quiet):
    """All tracks of a split ("train" or "valid"), and musdb's targets: name -> {source: gain}."""
    mus = database(root, is_wav, split=split)
    tracks = [
        open_track(track, mus.setup["sources"], is_wav)
        for track in tqdm(mus.tracks, f"Reading {split} tracks", leave=False, disable=quiet)
    ]
    formats = {(track.sample_rate, track.nb_channels) for track in tracks}
    if len(formats) > 1:
        raise UsageError(f"tracks of {mus.root} differ in (sample rate, channels): {sorted(formats)}; convert them")
    return tracks, mus.setup["targets"]


def open_track(track: musdb.MultiTrack, sources: dict[str, str], is_wav: bool) -> Track:
    """A `Track` from musdb's; stems in .mp4 are decoded on the way.

    Args:
        track: of `database`
        sources: name -> file name, as in musdb's setup["sources"]
    Raises:
        UsageError: files that are missing, cannot be read, or differ in length, rate or channels.
    """
    if is_wav:
        mixture = Path(track.path)
        files = {name: mixture.with_name(file) for name, file in sources.items()}
    else:
        folder = _decode_stems(track, sources, Path(pooch.os_cache("open-unmix-nnabla")) / "stems")
        mixture, files = folder / "mixture.wav", {name: folder / f"{name}.wav" for name in sources}
    return _checked_track(track.name, mixture, files)


def _checked_track(name, mixture, files):
    infos = {}
    for path in [mixture, *files.values()]:
        if not path.is_file():
            raise UsageError(f"track {name!r} has no {path.name} in {path.parent}")
        try:
            infos[path.name] = soundfile.info(path)
        except soundfile.LibsndfileError as error:
            raise UsageError(f"cannot read {path}: {error.error_string}") from None
    formats = {(info.samplerate, info.channels) for info in infos.values()}
    if len(formats) > 1:
        raise UsageError(f"files of track {name!r} differ in (sample rate, channels): {sorted(formats)}")
    sample_rate, nb_channels = formats.pop()
    lengths = [info.frames for info in infos.values()]
    if max(lengths) - min(lengths) > 0.1 * sample_rate:  # less is what encoders add or take away at the end
        raise UsageError(f"files of track {name!r} differ in length: {min(lengths)} to {max(lengths)} samples")
    return Track(name, mixture, files, min(lengths), sample_rate, nb_channels)


# ------------------------------------------------------------------------------------- sources


def _check_names(kind, names, known):
    """Raise `UsageError` for a name that is unknown, or given twice."""
    for name, count in Counter(names).items():
        if name not in known:
            raise UsageError(f"unknown {kind} {name!r}: there are {', '.join(known)}")
        if count > 1:
            raise UsageError(f"the {kind} {name!r} is named {count} times")


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
        UsageError: no such folder, split, stem, target or augmentation; a track shorter than an excerpt.
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
        self.augmentations = tuple(augmentations)
        _check_names("augmentation", self.augmentations, AUGMENTATIONS)
        self.tracks, known = _find_tracks(root, is_wav, split, quiet)
        targets = [target] if isinstance(target, str) else target
        if not targets:
            raise UsageError("no target is named")
        _check_names("target", targets, known)
        self.gains = [known[name] for name in targets]  # of each target: {source: gain}
        self.stacked = not isinstance(target, str)
        self.samples_per_track = samples_per_track
        self.seed = seed
        self.sample_rate, self.nb_channels = self.tracks[0].sample_rate, self.tracks[0].nb_channels
        self.nb_timesteps = None if seq_dur is None else round(seq_dur * self.sample_rate)
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
        audio = read(track.sources[source], start, self.nb_timesteps)
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
        sources = ((name, read(track.sources[name], 0, track.nb_timesteps)) for name in names)
        return read(track.mixture, 0, track.nb_timesteps), self._target(sources)


class DataIterator:
    """Batches of a source, prepared ahead by `nb_workers` threads; 0 prepares each when it is asked for.

    The last batch of an epoch is smaller if the items do not come out even.
    """

    AHEAD = 3  # batches in preparation: enough to bridge one slow read, little memory

    def __init__(self, source: MusdbSource, batch_size: int, nb_workers: int = 0):
        self.source, self.batch_size, self.nb_workers = source, batch_size, nb_workers

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield mixtures and targets, (nb_samples, nb_channels, nb_timesteps) each, in the epoch's own order."""
        order = random_stream("order", seed=self.source.seed, epoch=epoch).permutation(len(self.source))
        batches = (order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size))
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

    Args:
        tracks: none shorter than `n_fft`
    Returns:
        mean, std: float64 (nb_bins,)
    """
    count, mean, squares = 0, np.zeros(n_fft // 2 + 1), np.zeros(n_fft // 2 + 1)
    block = 512 * n_hop  # a few seconds at a time: a whole song's frames would take a gigabyte
    for track in tqdm(tracks, "Dataset statistics", leave=False, disable=quiet):
        nb_frames = 1 + (track.nb_timesteps - n_fft) // n_hop
        used = (nb_frames - 1) * n_hop + n_fft
        for start in range(0, nb_frames * n_hop, block):
            audio = read(track.mixture, start, min(block - n_hop + n_fft, used - start))
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


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Check a dataset: read everything that training would read, say what is there and how fast it is drawn."""
    options = data_parser().parse_args(argv)
    musdb = {"target": options.target, "root": options.root, "is_wav": options.is_wav, "quiet": options.quiet}
    for split in ("train", "valid"):
        source = MusdbSource(**musdb, split=split)
        hours = sum(track.nb_timesteps for track in source.tracks) / source.sample_rate / 3600
        print(
            f"{split}: {len(source.tracks)} tracks, {hours:.2f} h, {source.sample_rate} Hz, "
            f"{source.nb_channels} channel(s)"
        )
        for track in tqdm(source.tracks, f"Reading {split} tracks", leave=False, disable=options.quiet):
            mixture, target = source.whole_track(track)
            for name, audio in (("mixture", mixture), (options.target, target)):
                if not np.isfinite(audio).all():
                    raise UsageError(f"the {name} of track {track.name!r} has samples that are not finite")
    source = MusdbSource(**musdb, seq_dur=options.seq_dur, samples_per_track=64)
    start, nb_items = time.time(), 64
    for index in range(nb_items):
        source.item(0, index)
    print(f"excerpts: {nb_items / (time.time() - start):.0f} mixtures of {options.seq_dur} s per second and thread")


if __name__ == "__main__":
    main()
