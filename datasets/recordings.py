"""A stretch of an audio file: looked at before it is used, and read only as it was then."""

from __future__ import annotations  # unions, on Python 3.9

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import soundfile

from audio import BLOCK, check_samples
from utils import UsageError

# Formats in which soundfile finds a sample at once, and all of them: others are decoded first.
IN_PLACE = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC"}


class Problems(UsageError):
    """All that is wrong with files, a line each; as a message, the first of them."""

    def __init__(self, lines: list[str]):
        super().__init__(lines[0] + (f" (data.py lists {len(lines) - 1} more)" if len(lines) > 1 else ""))
        self.lines = lines


@dataclasses.dataclass(frozen=True)
class Recording:
    """`nb_timesteps` samples of an audio file, from sample `first` on."""

    path: Path
    nb_timesteps: int
    sample_rate: int  # Hz
    nb_channels: int
    form: str  # libsndfile's name of the format
    subtype: str  # and of its samples
    stamp: tuple  # of the file as it was when it was looked at
    first: int = 0
    origin: Path | None = None  # the file of which it is a decoded or resampled copy

    @property
    def name(self) -> str:
        """The file to which people put their hands."""
        return str(self.origin or self.path)

    def stretch(self, start: int, nb_timesteps: int) -> Recording:
        """A part of it."""
        return dataclasses.replace(self, first=self.first + start, nb_timesteps=nb_timesteps)

    def samples(
        self, start: int, nb_timesteps: int, dtype: str | None = None, buffer: np.ndarray | None = None
    ) -> np.ndarray:
        """Samples (nb_timesteps, nb_channels).

        Args:
            dtype: of NumPy; None: as the file holds them, int16 or float32
            buffer: bytes to put them into; None: memory of their own
        Raises:
            OSError: it cannot be read, or is not what it was when it was looked at.
        """
        dtype = dtype or ("int16" if self.subtype == "PCM_16" else "float32")
        out = None
        if buffer is not None:
            size = nb_timesteps * self.nb_channels * np.dtype(dtype).itemsize
            out = buffer[:size].view(dtype).reshape(nb_timesteps, self.nb_channels)
        try:
            with soundfile.SoundFile(self.path) as file:
                file.seek(self.first + start)
                samples = file.read(nb_timesteps, dtype, always_2d=True, out=out)
                is_integer = file.subtype.startswith("PCM")
        except soundfile.LibsndfileError as error:
            self._check()  # this may say more
            raise OSError(errno.EIO, error.error_string, str(self.path)) from None
        self._check()  # after the reading: a change meanwhile counts
        if samples.shape != (nb_timesteps, self.nb_channels):
            raise OSError(errno.EIO, f"it ends before sample {self.first + start + nb_timesteps}", str(self.path))
        if not is_integer and not np.isfinite(np.einsum("tc->", samples)):  # the cheapest sum
            raise OSError(errno.EIO, "samples that are not finite", str(self.path))
        return samples

    def _check(self):
        if stamp_of(self.path) != self.stamp:
            raise OSError(errno.EIO, "the file has changed since it was looked at", str(self.path))

    def read(self, start: int = 0, nb_timesteps: int | None = None, dtype: str = "float32") -> np.ndarray:
        """Samples (nb_channels, nb_timesteps); None: to the end."""
        nb_timesteps = self.nb_timesteps - start if nb_timesteps is None else nb_timesteps
        return np.ascontiguousarray(self.samples(start, nb_timesteps, dtype).T)

    def read_16_bits(self, start: int, nb_timesteps: int) -> np.ndarray:
        """Samples float32 (nb_channels, nb_timesteps) in the resolution of musdb, which has ffmpeg turn all to 16 bits.

        Like ffmpeg: integers lose their last bits, floats are rounded and clipped.
        """
        if self.subtype.startswith("PCM"):
            samples = self.samples(start, nb_timesteps, "int16")
        else:
            samples = np.rint(self.samples(start, nb_timesteps, "float64") * 32768).clip(-32768, 32767)
        return np.ascontiguousarray(samples.T, np.float32) / 32768


def stamp_of(path: str | Path) -> tuple[int, int]:
    """What changes with a file."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def open_recording(path: str | Path, thorough: bool = False) -> Recording:
    """Look at a file: its samples are then known to be finite, and no absurd numbers.

    Args:
        thorough: read it to its end, also if it holds integers, which cannot be anything else
    Raises:
        UsageError: it is no audio, empty, truncated, or has samples that are not finite, or huge.
        OSError: there is none, or it may not be read.
    """
    path = Path(path)
    stamp = stamp_of(path)  # before the look
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    with open(path, "rb"):  # of the reason why that fails, soundfile says nothing
        pass
    try:
        info = soundfile.info(path)
        if info.frames < 1 or info.samplerate < 1:
            raise UsageError(f"{path} has no samples")
        if thorough or not info.subtype.startswith("PCM"):
            count = 0
            for block in soundfile.blocks(path, max(1, BLOCK // info.channels), dtype="float32", always_2d=True):
                check_samples(block, path)
                count += len(block)
            if count < info.frames:
                raise UsageError(f"{path} is truncated: {count} of {info.frames} samples")
    except soundfile.LibsndfileError as error:
        raise UsageError(f"cannot read {path}: {error.error_string}") from None
    return Recording(path, info.frames, info.samplerate, info.channels, info.format, info.subtype, stamp)
