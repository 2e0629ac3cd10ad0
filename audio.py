"""Recordings in and out, of any length, rate and format: read and written in blocks, so that memory stays bounded.

Everywhere here, samples are float32 (nb_channels, nb_timesteps). Files hold them the other way round: blocks are
transposed views of what is read, and nothing is copied for that. A file is read whole or refused, and opens no other
file; what is written is looked at before it counts.
"""

from __future__ import annotations  # unions, on Python 3.9

import collections
import contextlib
import errno
import io
import numbers
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

import containers
import ffmpeg_files
import files
from utils import UsageError

AUDIO_FILES = {".wav", ".flac", ".ogg", ".mp3", ".m4a", ".mp4", ".aac", ".opus", ".aif", ".aiff", ".wma"}
BLOCK = 2**18  # samples that are read, resampled or written at a time
RATES = 100, 1_000_000  # Hz: between others, resampling makes very much of very little
MOST_CHANNELS = 64
# Of libsndfile's formats, those that say how much they hold
SOUNDFILE_FORMATS = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3"}


# ---------------------------------------------------------------------------------------- samples


def check_samples(samples: np.ndarray, name: str | Path) -> None:
    """UsageError, which says `name`, unless all samples are finite and at most 1e9."""
    # squares of larger ones leave single precision: the stems would not be finite
    if not np.abs(samples).max(initial=0) <= 1e9:
        raise UsageError(f"{name} has samples that are not finite, or larger than 1e9")


def check_rate(rate: float, name: str | Path) -> None:
    """UsageError, which says `name`, unless a sample rate is one that can be worked with."""
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not RATES[0] <= rate <= RATES[1]:
        raise UsageError(f"{name} has a sample rate of {rate!r} Hz: expected {RATES[0]} to {RATES[1]}")


def check_channels(nb_channels: int, name: str | Path) -> None:
    if not 1 <= nb_channels <= MOST_CHANNELS:
        raise UsageError(f"{name} has {nb_channels} channels: expected 1 to {MOST_CHANNELS}")


def resample(samples: np.ndarray, rate: float, new_rate: float, nb_timesteps: int | None = None) -> np.ndarray:
    """Samples (nb_channels, …) at another rate; cut or filled with zeros to `nb_timesteps` if given."""
    if rate != new_rate:
        samples = soxr.resample(np.array(samples.T, order="C"), rate, new_rate).T
        if nb_timesteps is not None:
            samples = np.pad(samples[:, :nb_timesteps], ((0, 0), (0, max(0, nb_timesteps - samples.shape[1]))))
    return np.ascontiguousarray(samples)


def _resampled(blocks, rate, new_rate, nb_channels):
    if rate == new_rate:
        yield from blocks
        return
    resampler = soxr.ResampleStream(rate, new_rate, nb_channels, dtype="float32")
    for block in blocks:
        yield resampler.resample_chunk(np.array(block.T, order="C")).T
    yield resampler.resample_chunk(np.zeros((0, nb_channels), np.float32), last=True).T


class RawAudio:
    """Float32 samples (nb_channels, nb_timesteps) in a file: what memory need not hold."""

    def __init__(self, path: Path, rate: float, nb_channels: int):
        self.path, self.rate, self.nb_channels = path, rate, nb_channels
        self.nb_timesteps, self.peak = 0, 0.0
        self.stream = open(path, "w+b", buffering=0)  # noqa: SIM115, closed by close(), with nothing left to write

    def append(self, block: np.ndarray) -> None:
        """Add samples (nb_channels, n)."""
        self.nb_timesteps += block.shape[1]
        self.peak = float(np.maximum(self.peak, np.abs(block).max(initial=0)))  # not a number, if one is none
        self.stream.seek(0, os.SEEK_END)
        _write_all(self.stream, np.ascontiguousarray(block.T, np.float32).reshape(-1).view(np.uint8).data)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Samples (nb_channels, stop − start), C-contiguous."""
        return np.ascontiguousarray(self._view(start, stop))

    def blocks(self) -> Iterator[np.ndarray]:
        """All samples, (nb_channels, n) at a time."""
        for start in range(0, self.nb_timesteps, BLOCK):
            yield self._view(start, min(start + BLOCK, self.nb_timesteps))

    def _view(self, start, stop):
        self.stream.seek(start * self.nb_channels * 4)
        samples = np.fromfile(self.stream, np.float32, (stop - start) * self.nb_channels)
        if samples.size < (stop - start) * self.nb_channels:
            raise OSError(errno.EIO, "what was written is not there any more", str(self.path))
        return samples.reshape(-1, self.nb_channels).T

    def resampled(self, rate: float, nb_timesteps: int) -> RawAudio:
        """The same at another rate, `nb_timesteps` long; replaces this one."""
        other = RawAudio(self.path.with_suffix(".resampled"), rate, self.nb_channels)
        for block in _resampled(self.blocks(), self.rate, rate, self.nb_channels):
            other.append(block[:, : nb_timesteps - other.nb_timesteps])
        while other.nb_timesteps < nb_timesteps:
            other.append(np.zeros((self.nb_channels, min(BLOCK, nb_timesteps - other.nb_timesteps)), np.float32))
        self.close()
        return other

    def close(self) -> None:
        self.stream.close()
        self.path.unlink()


def _write_all(stream, data):
    """Write all bytes into an unbuffered file, which may take them in parts; an error has the file's name."""
    try:
        while data:
            data = data[stream.write(data) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(stream.name)) from None


# ---------------------------------------------------------------------------------------- reading


def _soundfile_blocks(path, file, first, count):
    """Blocks (nb_channels, n) of an open sound file, from sample `first` on; count None: to the end."""
    with file:
        first = min(first, file.frames)
        count = file.frames - first if count is None else min(count, file.frames - first)
        file.seek(first)
        while count > 0:
            block = file.read(min(BLOCK, count), dtype="float32", always_2d=True)
            if not len(block):  # formats that tell only then
                raise UsageError(f"{path} is truncated")
            yield block.T
            count -= len(block)


@contextlib.contextmanager
def _no_stderr():
    """What libmpg123 has to say about a damaged file, it writes there by itself."""
    sys.stderr.flush()
    with _stderr:
        saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(null)


_stderr = threading.Lock()  # of two threads at once, one would save the other's /dev/null


def _open_audio(path, start, duration):
    """Sample rate, number of channels and blocks of an audio file, by soundfile or else by ffmpeg."""
    ffmpeg = ffmpeg_files.is_there()
    try:
        with files.open_regular(path) as stream:
            containers.check(stream, path)
            file = _open_soundfile(stream)
            at_once = file is not None and (_is_told(stream, path, file) or not ffmpeg)
            if not at_once and ffmpeg:
                rate, nb_channels, at_least, kind = ffmpeg_files.probe(path)
                walked = containers.check_frames(stream, path, kind)
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    if at_once:
        rate, nb_channels = file.samplerate, file.channels
    elif not ffmpeg:
        raise UsageError(f"cannot read {path}, and there is no ffmpeg to try")
    check_rate(rate, path)
    check_channels(nb_channels, path)
    # which may be more than any file has
    first, count = (None if value is None else round(min(value * rate, 2.0**60)) for value in (start, duration))
    if at_once:
        return rate, nb_channels, _soundfile_blocks(path, file, first, count)
    strict = walked is None or walked.nb_timesteps is None
    if not strict:  # but a tag is no damage, as it may be to ffmpeg
        at_least = walked.nb_timesteps - ffmpeg_files.LEFT_OUT
    return rate, nb_channels, ffmpeg_files.blocks(path, rate, nb_channels, first, count, at_least, strict)


def _open_soundfile(stream):
    """What libsndfile makes of an open file; None if it reads no such files."""
    os.lseek(stream.fileno(), 0, os.SEEK_SET)
    try:
        with _no_stderr():
            # by number: by name, it might open other files (resource forks), or take - for standard input
            file = soundfile.SoundFile(os.dup(stream.fileno()))
    except soundfile.LibsndfileError:
        return None
    return file if file.format in SOUNDFILE_FORMATS and file.seekable() and file.frames < 2**60 else None


def _is_told(stream, path, file):
    """Whether libsndfile knows how long a file is: if MPEG frames do not say so, it guesses, and stops there."""
    if not file.subtype.startswith("MPEG"):
        return True
    if file.format != "MP3":
        return False
    place = os.lseek(stream.fileno(), 0, os.SEEK_CUR)  # which both share
    walked = containers.check_frames(stream, path, "mp3")
    os.lseek(stream.fileno(), place, os.SEEK_SET)
    return walked is not None and walked.is_told


def decode(
    path: Path, rate: float, folder: Path, start: float = 0.0, duration: float | None = None
) -> tuple[RawAudio, int, int]:
    """Decode a recording into `folder`, at the given rate.

    Args:
        start, duration: in seconds; None: to the end
    Returns:
        RawAudio at `rate`; the recording's own rate; its number of samples at that rate
    Raises:
        UsageError: not audio, truncated, empty, or with samples that are not finite (or huge).
    """
    if not start >= 0 or not (duration is None or duration > 0):
        raise UsageError(f"{path}: it cannot start at {start} s and last {duration} s")
    own_rate, nb_channels, blocks = _open_audio(path, start, duration)
    recording, nb_timesteps = RawAudio(folder / "input", rate, nb_channels), 0

    def counted():
        nonlocal nb_timesteps
        for block in blocks:
            check_samples(block, path)
            nb_timesteps += block.shape[1]
            yield block

    try:
        for block in _resampled(counted(), own_rate, rate, nb_channels):
            recording.append(block)
    except soundfile.LibsndfileError as error:
        raise UsageError(f"cannot decode {path}, it is damaged or truncated: {error.error_string}") from None
    if not nb_timesteps:
        raise UsageError(f"{path} has no samples" + (f" after {start} s" if start else ""))
    return recording, own_rate, nb_timesteps


def recordings(inputs: Iterable[str | Path]) -> list[tuple[Path, str]]:
    """Input files, those of folders included, and a name for each, which can be that of a folder.

    It is the file's own without the ending, if that is unique.

    Raises:
        UsageError: a folder without any, or two of one name.
    """
    paths = []
    for name in inputs:
        path = Path(name if os.path.lexists(name) else os.path.expanduser(name))
        if path.is_dir():
            found = sorted(file for file in path.glob("[!.]*") if file.suffix.lower() in AUDIO_FILES)
            if not found:
                raise UsageError(f"no audio files in the folder {path}")
            paths += found
        else:
            paths.append(path)
    count = collections.Counter(path.stem for path in paths)
    names = [path.stem if count[path.stem] == 1 and files.is_file_name(path.stem) else path.name for path in paths]
    if repeated := [name for name, number in collections.Counter(names).items() if number > 1]:
        raise UsageError(f"several inputs named {repeated[0]}: separate them with an --outdir each")
    return list(zip(paths, names))


# ---------------------------------------------------------------------------------------- writing


def check_writable(rate: float, nb_channels: int, form: str, subtype: str) -> None:
    """UsageError if a sound file cannot be of that rate and number of channels; form and subtype as in `write`."""
    try:
        soundfile.SoundFile(io.BytesIO(), "w", int(rate), nb_channels, subtype, format=form).close()
    except soundfile.LibsndfileError as error:
        raise UsageError(f"{form} cannot hold {nb_channels} channels at {rate} Hz: {error.error_string}") from None


def write(
    path: Path, blocks: Iterable[np.ndarray], shape: tuple[int, int], rate: float, form: str, subtype: str
) -> None:
    """Write a sound file and make sure that it is there: all of it, on the disk, and to be decoded.

    Args:
        blocks: samples (nb_channels, n), floats within ±1 or integers of 16 bits
        shape: (nb_channels, nb_timesteps) of all of them
        form, subtype: libsndfile's names, as "WAV" and "PCM_16"; a WAV that would be too large becomes an RF64
    Raises:
        UsageError: the format cannot hold it.
        OSError: it could not be written, or what was written is not what is there.
    """
    nb_channels, nb_timesteps = shape
    if form == "WAV" and nb_timesteps * nb_channels * 4 > 2**32 - 2**16:  # WAV counts bytes in 32 bits
        form = "RF64"
    check_writable(rate, nb_channels, form, subtype)
    with open(path, "w+b", buffering=0) as stream:
        number = stream.fileno()
        try:
            with soundfile.SoundFile(os.dup(number), "w", int(rate), nb_channels, subtype, format=form) as file:
                for block in blocks:
                    file.write(block.T)
            os.fsync(number)
            whole = _has(number, nb_timesteps)
        except (soundfile.LibsndfileError, AssertionError):  # the latter if fewer samples were written than given
            whole = False
        if not whole:  # libsndfile does not tell of all errors, nor why: a full disk does
            stream.seek(0, os.SEEK_END)
            _write_all(stream, bytes(2**20))
            raise OSError(errno.EIO, "what was written is not what is there", str(path))


def _has(number, nb_timesteps):
    """Whether a sound file, given by the number of an open one, has so many samples, and the last can be decoded."""
    os.lseek(number, 0, os.SEEK_SET)
    with soundfile.SoundFile(os.dup(number)) as file:
        nb_last = min(file.frames, 2**14)
        file.seek(-nb_last, os.SEEK_END)
        return file.frames == nb_timesteps and len(file.read(nb_last, always_2d=True)) == nb_last
