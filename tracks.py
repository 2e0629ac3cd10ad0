"""The songs of a dataset: found by musdb, looked at before they are used, and read only as they were then.

musdb finds the tracks, their split, sources and targets; soundfile reads the excerpts, by seeking, which
is a hundred times faster than a process of ffmpeg per excerpt. Stems in .mp4 are decoded once, into WAV.
"""

from __future__ import annotations  # unions, on Python 3.9

import errno
import hashlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pooch
import soundfile

import files
from audio import BLOCK, check_samples, write
from utils import UsageError, describe, some

if TYPE_CHECKING:
    import musdb

SLACK = 0.1  # seconds by which files of a track may differ: what encoders add or take away at the end

# -------------------------------------------------------------------------------------- one track


@dataclass
class Track:
    """One song: files of at least `nb_timesteps` samples each, at `sample_rate` Hz, `nb_channels` wide."""

    name: str
    mixture: Path
    sources: dict[str, Path]
    nb_timesteps: int
    sample_rate: int
    nb_channels: int
    stamps: dict[Path, tuple] = field(default_factory=dict, repr=False)  # of files as they were when looked at

    def __post_init__(self):
        self.stamps = self.stamps or {path: _stamp(path) for path in (self.mixture, *self.sources.values())}

    def read(self, path: Path, start: int = 0, nb_timesteps: int | None = None, dtype: str = "float32") -> np.ndarray:
        """Samples of one of its files (nb_channels, nb_timesteps); None: to the end that all of them have.

        Raises:
            OSError: it cannot be read, or is not what it was when the track was looked at.
        """
        nb_timesteps = self.nb_timesteps - start if nb_timesteps is None else nb_timesteps
        try:
            with soundfile.SoundFile(path) as file:
                file.seek(start)
                samples = file.read(nb_timesteps, dtype, always_2d=True)
                is_integer = file.subtype.startswith("PCM")
        except soundfile.LibsndfileError as error:
            self._check(path)  # this may say more
            raise OSError(errno.EIO, error.error_string, str(path)) from None
        self._check(path)  # after the reading: a change meanwhile counts
        if samples.shape != (nb_timesteps, self.nb_channels):
            raise OSError(errno.EIO, f"it ends before sample {start + nb_timesteps}", str(path))
        if not is_integer and not np.isfinite(np.einsum("tc->", samples)):  # the cheapest sum
            raise OSError(errno.EIO, "samples that are not finite", str(path))
        return np.ascontiguousarray(samples.T)

    def _check(self, path):
        if _stamp(path) != self.stamps[path]:
            raise OSError(errno.EIO, "the file has changed since it was looked at", str(path))


def _stamp(path):
    """What changes with a file."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def open_track(track: musdb.MultiTrack, sources: dict[str, str], is_wav: bool, thorough: bool = False) -> Track:
    """A `Track` from musdb's, looked at; stems in .mp4 are decoded on the way.

    Args:
        track: of `database`
        sources: name -> file name, as in musdb's setup["sources"]
        thorough: read all files to their ends, not only those that can hold more than numbers within ±1
    Raises:
        UsageError: files that are missing, cannot be read, differ in length, rate or channels, or have samples that
            are not finite, or huge. It says all that is wrong with the track.
    """
    if is_wav:
        mixture = Path(track.path)
        paths = {name: mixture.with_name(file) for name, file in sources.items()}
    else:
        folder = _decoded(track, sources, Path(pooch.os_cache("open-unmix-nnabla")) / "stems")
        mixture, paths = folder / "mixture.wav", {name: folder / f"{name}.wav" for name in sources}
    stamps, infos, problems = {}, [], []
    for path in (mixture, *paths.values()):
        try:
            stamps[path] = _stamp(path)  # before the look
            infos.append(_look(path, thorough))
        except FileNotFoundError:
            problems.append(f"there is no {path.name} in {path.parent}")
        except (UsageError, OSError) as error:
            problems.append(describe(error))
    formats = {(info.samplerate, info.channels) for info in infos}
    if len(formats) > 1:
        problems.append(f"its files differ in (sample rate, channels): {sorted(formats)}")
    lengths = [info.frames / info.samplerate for info in infos]
    if infos and max(lengths) - min(lengths) > SLACK:
        problems.append(f"its files differ in length: {min(lengths):.2f} to {max(lengths):.2f} s")
    if problems:
        raise UsageError(f"track {track.name!r}: {'; '.join(problems)}")
    nb_timesteps = min(info.frames for info in infos)
    return Track(track.name, mixture, paths, nb_timesteps, infos[0].samplerate, infos[0].channels, stamps)


def _look(path, thorough):
    """soundfile's description of a file, whose samples are then known to be finite, and no absurd numbers."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    with open(path, "rb"):  # of the reason why that fails, soundfile says nothing
        pass
    try:
        info = soundfile.info(path)
        if info.frames < 1 or info.samplerate < 1:
            raise UsageError(f"{path} has no samples")
        if thorough or not info.subtype.startswith("PCM"):  # integers cannot be anything else
            count = 0
            for block in soundfile.blocks(path, max(1, BLOCK // info.channels), dtype="float32", always_2d=True):
                check_samples(block, path)
                count += len(block)
            if count < info.frames:
                raise UsageError(f"{path} is truncated: {count} of {info.frames} samples")
    except soundfile.LibsndfileError as error:
        raise UsageError(f"cannot read {path}: {error.error_string}") from None
    return info


# ----------------------------------------------------------------------------------------- musdb's


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


def _decoded(track, sources, cache):
    """Folder of a musdb track of .stem.mp4 as 16-bit WAV files (musdb's own resolution), made if it is not there."""
    size, time = _stamp(track.path)
    key = f"{Path(track.path).resolve()} {size} {time}"
    target = cache / f"{track.name} {hashlib.sha256(key.encode()).hexdigest()[:8]}"
    streams = {"mixture": track, **{name: track.sources[name] for name in sources}}
    if _is_whole(target, streams):
        return target
    files.writable_folder(cache)
    with files.temporary_folder(cache) as partial:
        for name, stream in streams.items():
            samples = _decode(track, stream)
            write(partial / f"{name}.wav", [samples.T], samples.T.shape, int(track.rate), "WAV", "PCM_16")
        if not _is_whole(target, streams):
            shutil.rmtree(target, ignore_errors=True)
        try:
            partial.rename(target)
        except OSError:  # another process has decoded it meanwhile
            if not _is_whole(target, streams):
                raise
    return target


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


def _is_whole(folder, names):
    """Whether a folder has all these WAV files, each as long as it says itself."""
    try:
        for name in names:
            with open(folder / f"{name}.wav", "rb") as stream:
                head = stream.read(8)
                if head[:4] != b"RIFF" or int.from_bytes(head[4:], "little") + 8 != os.fstat(stream.fileno()).st_size:
                    return False
    except OSError:
        return False
    return True
