"""Training and validation data from MUSDB18, its augmentations and statistics.

musdb finds the tracks, their split, sources and targets; soundfile reads the excerpts, by seeking, which
is a hundred times faster than a process of ffmpeg per excerpt. Stems in .mp4 are decoded once, into WAV.
"""

import hashlib
import shutil
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
import scipy.fft
import soundfile
from tqdm import tqdm

from args import data_parser
from utils import UsageError, command

# ------------------------------------------------------------------------------- augmentations


def gain(audio, rng):
    """Audio (nb_channels, nb_timesteps) times a random factor in [0.25, 1.25)."""
    return audio * np.float32(0.25 + rng.random())


def channelswap(audio, rng):
    """Stereo audio (2, nb_timesteps) with its channels swapped, with a probability of one half."""
    return audio[::-1] if len(audio) == 2 and rng.random() < 0.5 else audio


AUGMENTATIONS = {"gain": gain, "channelswap": channelswap}


# -------------------------------------------------------------------------------------- tracks


@dataclass
class Track:
    """One song: WAV files that all have the first `frames` samples, at `sample_rate` Hz, `nb_channels` wide."""

    name: str
    mixture: Path
    sources: dict  # name -> file
    frames: int
    sample_rate: int
    nb_channels: int


def read(path, start=0, frames=-1):
    """Samples of an audio file, float32 (nb_channels, nb_timesteps)."""
    audio, _ = soundfile.read(path, start=start, frames=frames, dtype="float32", always_2d=True)
    return np.ascontiguousarray(audio.T)


def database(root, is_wav, subset="train", split=None):
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
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, audio in [("mixture", track), *((source, track.sources[source]) for source in sources)]:
        samples = np.round(audio.audio * 32768).astype(np.int16)
        soundfile.write(partial / f"{name}.wav", samples, int(track.rate), subtype="PCM_16")
    partial.rename(target)
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


def open_track(track, sources, is_wav):
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
    frames = [info.frames for info in infos.values()]
    if max(frames) - min(frames) > 0.1 * sample_rate:  # less is what encoders add or take away at the end
        raise UsageError(f"files of track {name!r} differ in length: {min(frames)} to {max(frames)} samples")
    return Track(name, mixture, files, min(frames), sample_rate, nb_channels)


# ------------------------------------------------------------------------------------- sources


class MusdbSource:
    """Pairs (mixture, target) of one split of MUSDB18, float32 (nb_channels, nb_timesteps).

    With `seq_dur`, item `index` of an `epoch` is a mixture that never was: for each source, in musdb's
    order, a track drawn with replacement, a start drawn uniformly, then the augmentations. All draws
    depend on (seed, epoch, index) alone, so neither threads nor an interruption change the data.
    Without, item `index` is a whole track with its official mixture.

    Args:
        target: a source of musdb, or one of its sums of sources (accompaniment, linear_mixture)
        root: folder of MUSDB18; None downloads musdb's 7 s excerpts
        split: "train" or "valid"
        is_wav: tracks are folders of WAV files
        seq_dur: seconds per excerpt; None: whole tracks
        samples_per_track: times the number of tracks is the number of items
        augmentations: names in AUGMENTATIONS, in their order
        quiet: no progress bar while tracks are found, or decoded
    Raises:
        UsageError: no such folder, split, stem or target; a track shorter than an excerpt.
    """

    def __init__(
        self,
        target,
        root=None,
        split="train",
        is_wav=False,
        seq_dur=None,
        samples_per_track=1,
        augmentations=(),
        seed=42,
        quiet=True,
    ):
        self.tracks, targets = _find_tracks(root, is_wav, split, quiet)
        if target not in targets:
            raise UsageError(f"unknown target {target!r}: musdb knows {', '.join(targets)}")
        self.gains = targets[target]
        self.samples_per_track = samples_per_track
        self.augmentations = [AUGMENTATIONS[name] for name in augmentations]
        self.seed = seed
        self.sample_rate, self.nb_channels = self.tracks[0].sample_rate, self.tracks[0].nb_channels
        self.nb_timesteps = None if seq_dur is None else round(seq_dur * self.sample_rate)
        for track in self.tracks:
            if self.nb_timesteps is not None and track.frames < self.nb_timesteps:
                seconds = track.frames / self.sample_rate
                raise UsageError(f"track {track.name!r} has {seconds:.2f} s: too short for --seq-dur {seq_dur}")

    def __len__(self):
        return len(self.tracks) * self.samples_per_track

    def item(self, epoch, index):
        """Mixture and target, each (nb_channels, nb_timesteps)."""
        if self.nb_timesteps is None:
            return self.whole_track(self.tracks[index // self.samples_per_track])
        rng = np.random.default_rng((self.seed, epoch, index))
        mixture = target = np.float32(0)
        for source in self.tracks[0].sources:
            track = self.tracks[rng.integers(len(self.tracks))]
            start = int(rng.uniform(0, track.frames - self.nb_timesteps))
            audio = read(track.sources[source], start, self.nb_timesteps)
            for augment in self.augmentations:
                audio = augment(audio, rng)
            mixture = mixture + audio
            target = target + np.float32(self.gains.get(source, 0)) * audio
        return mixture, target

    def whole_track(self, track):
        sources = ((gain, read(track.sources[source], 0, track.frames)) for source, gain in self.gains.items())
        target = sum(np.float32(gain) * audio for gain, audio in sources)
        return read(track.mixture, 0, track.frames), target


class DataIterator:
    """Batches of a source, prepared ahead by `nb_workers` threads; 0 prepares each when it is asked for.

    The last batch of an epoch is smaller if the items do not come out even.
    """

    AHEAD = 3  # batches in preparation: enough to bridge one slow read, little memory

    def __init__(self, source, batch_size, nb_workers=0):
        self.source, self.batch_size, self.nb_workers = source, batch_size, nb_workers

    def __len__(self):
        return -(-len(self.source) // self.batch_size)

    def epoch(self, epoch):
        """Yield mixtures and targets, (nb_samples, nb_channels, nb_timesteps) each, in the epoch's own order."""
        order = np.random.default_rng((self.source.seed, epoch)).permutation(len(self.source))
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


def magnitudes(audio, n_fft, n_hop):
    """Magnitude, averaged over channels, of uncentred frames of audio (nb_channels, nb_timesteps).

    Returns:
        (nb_frames, nb_bins) float32
    """
    window = np.hanning(n_fft + 1)[:-1].astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(audio, n_fft, axis=1)[:, ::n_hop]
    return np.abs(scipy.fft.rfft(frames * window)).mean(axis=0)


def statistics(tracks, n_fft, n_hop, quiet=True):
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
        nb_frames = 1 + (track.frames - n_fft) // n_hop
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
def main(argv=None):
    """Check a dataset: read everything that training would read, say what is there and how fast it is drawn."""
    options = data_parser().parse_args(argv)
    musdb = {"target": options.target, "root": options.root, "is_wav": options.is_wav, "quiet": options.quiet}
    for split in ("train", "valid"):
        source = MusdbSource(**musdb, split=split)
        hours = sum(track.frames for track in source.tracks) / source.sample_rate / 3600
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
