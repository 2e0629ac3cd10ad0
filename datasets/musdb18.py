"""MUSDB18: found by musdb, looked at before it is used. Stems in .mp4 are decoded once, into WAV.

musdb finds the tracks, their split, sources and targets; soundfile reads the excerpts, by seeking, which
is a hundred times faster than a process of ffmpeg per excerpt.
"""

from __future__ import annotations  # unions, on Python 3.9

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

import files
from audio import write
from datasets import cache as kept
from datasets.recordings import Problems, Recording, open_recording
from utils import UsageError, describe, some

if TYPE_CHECKING:
    import musdb

SLACK = 0.1  # seconds by which files of a track may differ: what encoders add or take away at the end


@dataclass(frozen=True)
class Track:
    """One song: recordings of at least `nb_timesteps` samples each; several of one stem are added up.

    `mixture` is the song's own, or all of what it is the sum of.
    """

    name: str
    mixture: tuple[Recording, ...]
    sources: dict[str, tuple[Recording, ...]]
    nb_timesteps: int

    @property
    def recordings(self) -> list[Recording]:
        return list(dict.fromkeys([*self.mixture, *(one for stem in self.sources.values() for one in stem)]))

    @property
    def sample_rate(self) -> int:
        return self.mixture[0].sample_rate

    def read(self, stem: tuple[Recording, ...], dtype: str = "float32") -> np.ndarray:
        """One of its stems (nb_channels, nb_timesteps), to the end that all of them have."""
        return sum(one.read(0, self.nb_timesteps, dtype) for one in stem)


# ----------------------------------------------------------------------------------------- the folder


def database(root: str | Path | None, is_wav: bool, subset: str = "train", split: str | None = None) -> musdb.DB:
    """musdb's database of one subset, or a split of it, and a clear line for everything that can be wrong with it."""
    for program in ("ffmpeg", "ffprobe"):
        if shutil.which(program) is None:
            raise UsageError(f"musdb needs {program} on the PATH: install ffmpeg (apt-get or conda)")
    import musdb

    if root is not None and not isinstance(root, (str, os.PathLike)):
        raise UsageError(f"the root {root!r} is no name of a folder")
    if root is None:
        if is_wav:
            raise UsageError("--is-wav needs --root: the excerpts that musdb downloads are stems")
        try:
            return musdb.DB(subsets=subset, split=split, download=True)
        except (MemoryError, UsageError):
            raise
        except Exception as error:  # whatever a network, or what it delivers, makes of it
            raise UsageError(f"musdb's 7 s excerpts cannot be downloaded ({error}): give --root") from None

    folder = Path(os.path.expanduser(root), subset)
    _check_folder(root, folder, is_wav)
    try:
        mus = musdb.DB(root=str(folder.parent), subsets=subset, split=split, is_wav=is_wav)
    except MemoryError:
        raise
    except Exception:  # of ffprobe, or of what it says
        raise UsageError(_unreadable(folder, is_wav)) from None
    if not mus.tracks:
        names = f"; validation songs are named like {mus.setup['validation_tracks'][0]!r}" if split == "valid" else ""
        names += ", or any way in a --dataset manifest" if names else ""
        raise UsageError(f"no tracks of the {f'split {split!r}' if split else 'subset'} in {folder}{names}")
    return mus


def _check_folder(root, folder, is_wav):
    try:
        if not folder.is_dir():
            raise UsageError(f"{root} has no folder {folder.name}/: --root names the folder of MUSDB18")
        names = [os.fsencode(path) for path in (folder, *sorted(folder.iterdir()))]
        if not is_wav and next(folder.glob("*/*.wav"), None):
            raise UsageError(f"{folder} holds folders of WAV files, not stems: add --is-wav")
        # of musdb's ffprobe, which looks for sound in whatever it is given, up to its end
        for path in sorted(folder.glob("*/mixture.wav" if is_wav else "*.stem.mp4")):
            with files.open_regular(path) as stream:
                head, size = stream.read(8), os.fstat(stream.fileno()).st_size
            if not (head.startswith((b"RIFF", b"RF64")) if is_wav else head.endswith(b"ftyp")):
                raise UsageError(f"{path} is not a {'WAV' if is_wav else 'stem.mp4'} file")
            claim = int.from_bytes(head[4:], "little")
            if head.startswith(b"RIFF") and 0 < claim < 2**32 - 1 and size > claim + 2**20:
                raise UsageError(f"{path} is longer than it says: {size} bytes, not {claim + 8}")
    except OSError as error:
        raise UsageError(f"cannot read {describe(error)}") from None
    if is_wav and any(name.endswith(b".stem.mp4") for name in names):
        raise UsageError(f"{folder} holds .stem.mp4 files, not WAV: leave out --is-wav")
    for name in names:
        if (text := name.decode(errors="backslashreplace")).encode() != name:
            raise UsageError(f"the name of {text} is not in UTF-8, which musdb needs: rename it")


def _unreadable(folder, is_wav):
    """What is wrong with those files that make musdb fail, in a line."""
    import stempeg

    found = []
    for path in sorted(folder.glob("*/mixture.wav" if is_wav else "*.stem.mp4")):
        try:
            info = stempeg.Info(str(path))
            info.samples(0), info.duration(0), info.rate(0)
        except Exception as error:
            lines = (getattr(error, "stderr", None) or b"").decode(errors="backslashreplace").strip().splitlines()
            reason = lines[-1] if lines else "no audio"
            found.append(reason if str(path) in reason else f"{path}: {reason}")
    return f"tracks in {folder} cannot be read: {some(found) or 'ffprobe fails'}"


# ---------------------------------------------------------------------------------------- the tracks


def open_tracks(
    tracks: Sequence[musdb.MultiTrack],
    sources: dict[str, str],
    is_wav: bool,
    cache: str | Path | None = None,
    quiet: bool = True,
    thorough: bool = False,
) -> list[Track]:
    """`Track`s from musdb's, looked at; stems in .mp4 are decoded on the way.

    Args:
        tracks: of `database`
        sources: name -> file name, as in musdb's setup["sources"]
        cache: folder of decoded stems; None: where the user's caches are
        thorough: read all files to their ends, not only those that can hold more than numbers within ±1
    Raises:
        Problems: of every track, all that is wrong with it: files that are missing, cannot be read, differ in length,
            rate or channels, or have samples that are not finite, or huge.
    """
    if is_wav:
        folders = [Path(track.path).parent for track in tracks]
    else:
        folders = kept.get([_wanted(track, sources) for track in tracks], cache, "decoding stems", quiet)
        sources = {name: f"{name}.wav" for name in sources}
    found, problems = [], []
    for track, folder in zip(tqdm(tracks, "Reading tracks", leave=False, disable=quiet), folders):
        try:
            mixture = Path(track.path).name if is_wav else "mixture.wav"
            found.append(_open_track(track.name, folder, mixture, sources, thorough))
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise Problems(problems)
    return found


def _open_track(name, folder, mixture, sources, thorough):
    found, problems = {}, []
    for path in [folder / mixture, *(folder / file for file in sources.values())]:
        try:
            found[path.name] = open_recording(path, thorough)
        except FileNotFoundError:
            problems.append(f"there is no {path.name} in {folder}")
        except (UsageError, OSError) as error:
            problems.append(describe(error))
    formats = {(one.sample_rate, one.nb_channels) for one in found.values()}
    if len(formats) > 1:
        problems.append(f"its files differ in (sample rate, channels): {sorted(formats)}")
    lengths = [one.nb_timesteps / one.sample_rate for one in found.values()]
    if found and max(lengths) - min(lengths) > SLACK:
        problems.append(f"its files differ in length: {min(lengths):.2f} to {max(lengths):.2f} s")
    if problems:
        raise UsageError(f"track {name!r}: {'; '.join(problems)}")
    stems = {source: (found[file],) for source, file in sources.items()}
    return Track(name, (found[mixture],), stems, min(one.nb_timesteps for one in found.values()))


def _wanted(track, sources):
    """The entry of a musdb track of .stem.mp4 as 16-bit WAV files (musdb's own resolution)."""

    def make(folder):
        for name, stream in {"mixture": track, **{source: track.sources[source] for source in sources}}.items():
            samples = _decode(track, stream)
            write(folder / f"{name}.wav", [samples.T], samples.T.shape, int(track.rate), "WAV", "PCM_16")

    nb_bytes = round(track.duration * track.rate) * 4 * (1 + len(sources))
    return kept.Wanted(Path(track.path), "stems", nb_bytes, make)


def _decode(track, stream):
    """Samples int16 (nb_timesteps, nb_channels) of one of the streams of a file of stems."""
    try:
        audio = stream.audio
        expected = round(track.info.duration(stream.stem_id) * track.rate)
    except MemoryError:
        raise
    except Exception as error:
        raise UsageError(f"cannot decode {track.path}: {error}") from None
    if len(audio) < expected - SLACK * track.rate:  # musdb does not ask whether ffmpeg has failed
        raise UsageError(f"cannot decode {track.path}: {len(audio)} of {expected} samples, it is damaged or truncated")
    return np.round(audio * 32768).astype(np.int16)
