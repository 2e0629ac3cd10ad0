"""Recordings in and out, of any length, rate and format: read and written in blocks, so that memory stays bounded.

Everywhere here, samples are float32 (nb_channels, nb_timesteps). Files hold them the other way round: blocks are
transposed views of what is read, and nothing is copied for that.
"""

from __future__ import annotations  # unions, on Python 3.9

import collections
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from utils import UsageError

AUDIO_FILES = {".wav", ".flac", ".ogg", ".mp3", ".m4a", ".mp4", ".aac", ".opus", ".aif", ".aiff", ".wma"}
BLOCK = 2**18  # samples that are read, resampled or written at a time
# How libsndfile notes that a header promises more than the file holds, and that an Ogg ends within a page
TRUNCATED = ("should be", "Last page lacks an end-of-stream bit", "Junk after the last page")


# ---------------------------------------------------------------------------------------- samples


def check_samples(samples: np.ndarray, name: str | Path) -> None:
    """UsageError, which says `name`, unless all samples are finite and at most 1e9."""
    # squares of larger ones leave single precision: the stems would not be finite
    if not np.abs(samples).max(initial=0) <= 1e9:
        raise UsageError(f"{name} has samples that are not finite, or larger than 1e9")


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
        self.stream = open(path, "w+b")  # noqa: SIM115, closed by close()

    def append(self, block: np.ndarray) -> None:
        """Add samples (nb_channels, n)."""
        self.nb_timesteps += block.shape[1]
        self.peak = max(self.peak, float(np.abs(block).max(initial=0)))
        self.stream.write(np.ascontiguousarray(block.T, np.float32).data)

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


def _ffmpeg_blocks(path, nb_channels, first, count):
    trim = f"atrim=start_sample={first}" + ("" if count is None else f":end_sample={first + count}")
    # -xerror: a damaged file is no input, rather than one with gaps
    command = ["ffmpeg", "-v", "error", "-xerror", "-nostdin", "-i", f"file:{path}", "-map", "0:a:0", "-af", trim]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen([*command, "-f", "f32le", "-"], stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        while data := process.stdout.read(BLOCK * nb_channels * 4):
            whole = len(data) // (4 * nb_channels) * (4 * nb_channels)
            yield np.frombuffer(data[:whole], "<f4").reshape(-1, nb_channels).T
        if process.wait():
            errors.seek(0)
            raise UsageError(f"cannot decode {path}: {_last_line(errors.read(), path)}")


@contextlib.contextmanager
def _no_stderr():
    """What libmpg123 has to say about a damaged file, it writes there by itself."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _is_guessed(path):
    """Whether an mp3 does not say how long it is. libsndfile then guesses, and stops there, wherever that is."""
    with open(path, "rb") as stream:
        header = stream.read(10)
        if header.startswith(b"ID3"):  # tags come first, with a length of seven bits per byte
            stream.seek(10 + sum((byte & 127) << shift for byte, shift in zip(header[6:], (21, 14, 7, 0))))
            header = b""
        frame = header + stream.read(4096)
    return not any(name in frame for name in (b"Xing", b"Info", b"VBRI"))


def _last_line(output, path):
    line = (output.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
    return line.replace(f"file:{path}: ", "")


def _open_audio(path, start, duration):
    """Sample rate, number of channels and blocks of an audio file, by soundfile or else by ffmpeg."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    ffmpeg = shutil.which("ffmpeg") is not None and shutil.which("ffprobe") is not None

    def span(rate):
        return round(start * rate), None if duration is None else round(duration * rate)

    try:
        with _no_stderr():
            file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        if not ffmpeg:
            raise UsageError(f"cannot read {path} ({error.error_string}), and there is no ffmpeg to try") from None
    else:
        if any(sign in file.extra_info for sign in TRUNCATED):
            raise UsageError(f"{path} is truncated")
        if not (ffmpeg and file.format == "MP3" and _is_guessed(path)):
            return file.samplerate, file.channels, _soundfile_blocks(path, file, *span(file.samplerate))
    command = ["ffprobe", "-v", "error", "-select_streams", "a:0", "-show_entries", "stream=sample_rate,channels"]
    result = subprocess.run([*command, "-of", "json", f"file:{path}"], capture_output=True)
    streams = json.loads(result.stdout or "{}").get("streams")
    if not streams or not int(streams[0].get("channels", 0)):
        reason = f": {_last_line(result.stderr, path)}" if result.stderr else ""
        raise UsageError(f"{path} is not audio{reason}")
    rate, nb_channels = int(streams[0]["sample_rate"]), int(streams[0]["channels"])
    return rate, nb_channels, _ffmpeg_blocks(path, nb_channels, *span(rate))


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
    """Input files, those of folders included, and a name for each: its own without the ending, if that is unique.

    Raises:
        UsageError: a folder without any, or two of one name.
    """
    paths = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.glob("[!.]*") if file.suffix.lower() in AUDIO_FILES)
            if not found:
                raise UsageError(f"no audio files in the folder {path}")
            paths += found
        else:
            paths.append(path)
    count = collections.Counter(path.stem for path in paths)
    names = [path.stem if count[path.stem] == 1 else path.name for path in paths]
    if repeated := [name for name, number in collections.Counter(names).items() if number > 1]:
        raise UsageError(f"several inputs named {repeated[0]}: separate them with an --outdir each")
    return list(zip(paths, names))


# ---------------------------------------------------------------------------------------- writing


def write(path: Path, recording: RawAudio, form: str, subtype: str, factor: float) -> None:
    """Write a recording times `factor`, if that is below 1, into a sound file.

    Args:
        form, subtype: libsndfile's names, as "WAV" and "PCM_16"; a WAV that would be too large becomes an RF64
    Raises:
        UsageError: the format cannot hold it.
    """
    nb_channels = recording.nb_channels
    if form == "WAV" and recording.nb_timesteps * nb_channels * 4 > 2**32 - 2**16:  # WAV counts bytes in 32 bits
        form = "RF64"
    try:
        with soundfile.SoundFile(path, "w", recording.rate, nb_channels, subtype, format=form) as file:
            for block in recording.blocks():
                file.write(block.T * np.float32(factor) if factor < 1 else block.T)
    except soundfile.LibsndfileError as error:
        raise UsageError(f"cannot write {form.lower()} of {nb_channels} channels: {error.error_string}") from None
