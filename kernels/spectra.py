"""Audio to spectrogram and back: windows, frames, magnitudes, overlap-add."""

import numpy as np
import scipy.fft

from kernels.compiler import COMPLEX3, FLOAT, IN, INT, OUT, kernel
from kernels.shapes import check
from kernels.threads import run, split


def hann(n_fft: int) -> np.ndarray:
    """Periodic Hann window."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(np.float32)


def nb_frames(nb_timesteps: int, n_fft: int, n_hop: int, center: bool) -> int:
    """Frames of an STFT.

    Raises:
        ValueError: the audio is too short for a frame, or for the reflection; a window or a hop of no sample.
    """
    if n_fft < 1 or n_hop < 1:
        raise ValueError(f"n_fft {n_fft}, n_hop {n_hop}: at least one sample is needed")
    shortest = n_fft // 2 + 1 if center else n_fft
    if nb_timesteps < shortest:
        raise ValueError(f"{nb_timesteps} samples of audio are too short: n_fft {n_fft} needs {shortest}")
    return (nb_timesteps + (n_fft // 2 * 2 if center else 0) - n_fft) // n_hop + 1


def _spectra(x, window, n_hop, center, start, stop):
    """Complex spectra (C, stop − start, F) of some frames of audio (C, nb_timesteps)."""
    n_fft, nb_timesteps = len(window), x.shape[1]
    begin = start * n_hop - (n_fft // 2 if center else 0)
    end = begin + (stop - start - 1) * n_hop + n_fft
    if begin >= 0 and end <= nb_timesteps:
        x = x[:, begin:end]
    else:  # reflect the indices at both ends, which are not repeated
        last = nb_timesteps - 1
        x = x[:, last - np.abs(last - np.abs(np.arange(begin, end)))]
    frames = np.lib.stride_tricks.sliding_window_view(x, n_fft, axis=1)[:, ::n_hop]
    return scipy.fft.rfft(frames * window)


def _blocks(nb_frames, n_fft):
    """Ranges of frames that stay in the second-level cache."""
    length = max(1, 2**16 // n_fft)
    return [(start, min(start + length, nb_frames)) for start in range(0, nb_frames, length)]


@kernel
def _magnitude(spectra: COMPLEX3, power: FLOAT, mono: INT, out: OUT(4), start: INT, sample: INT):
    nb_channels, nb_frames, nb_bins = spectra.shape
    scale = np.float32(1 / nb_channels) if mono else np.float32(1)
    for t in range(nb_frames):
        for c in range(nb_channels):
            s = spectra[c, t]
            y = out[start + t, sample, 0 if mono else c]
            if c == 0 or not mono:
                y[:] = 0
            if power == 1:
                for f in range(nb_bins):
                    y[f] += scale * np.sqrt(s[f].real * s[f].real + s[f].imag * s[f].imag)
            else:
                for f in range(nb_bins):
                    y[f] += scale * (s[f].real * s[f].real + s[f].imag * s[f].imag) ** (power / 2)


def spectrogram(x: np.ndarray, n_fft: int, n_hop: int, center: bool, power: float, mono: bool, out: np.ndarray) -> None:
    """Magnitude to a power, block by block of frames, so that no complex spectrogram is ever held.

    Args:
        x: audio (N, C, nb_timesteps)
        out: (T, N, 1 if mono else C, F)
    """
    check(x=(x, "N C L", np.float32))
    nb_samples, nb_channels, nb_timesteps = x.shape
    shape = (nb_frames(nb_timesteps, n_fft, n_hop, center), nb_samples, 1 if mono else nb_channels, n_fft // 2 + 1)
    check(out=(out, "{} {} {} {}".format(*shape)))
    window = hann(n_fft)

    def block(sample, start, stop):
        spectra = _spectra(x[sample], window, n_hop, center, start, stop)
        _magnitude(spectra, power, mono, out, start, sample)

    run([(block, sample, *frames) for sample in range(x.shape[0]) for frames in _blocks(len(out), n_fft)])


def stft(x: np.ndarray, n_fft: int, n_hop: int, start: int, stop: int) -> np.ndarray:
    """Frames start … stop of the centred STFT of audio (C, nb_timesteps): complex64 (C, stop − start, F)."""
    check(x=(x, "C L", np.float32))
    if not 0 <= start <= stop <= nb_frames(x.shape[1], n_fft, n_hop, True):
        raise ValueError(f"frames {start} … {stop} of {x.shape[1]} samples with n_fft {n_fft}, n_hop {n_hop}")
    window = hann(n_fft)
    out = np.empty((len(x), stop - start, n_fft // 2 + 1), np.complex64)

    def block(begin, end):
        out[:, begin:end] = _spectra(x, window, n_hop, True, start + begin, start + end)

    run([(block, *part) for part in split(stop - start, -(-(stop - start) // 16)) if part[0] < part[1]])
    return out


def magnitude(spectra: np.ndarray, mono: bool) -> np.ndarray:
    """Magnitude of complex64 spectra (C, T, F) in the network's layout, (T, 1, 1 if mono else C, F)."""
    check(spectra=(spectra, "C T F"))
    nb_channels, nb_frames, nb_bins = spectra.shape
    out = np.empty((nb_frames, 1, 1 if mono else nb_channels, nb_bins), np.float32)
    _magnitude(spectra, 1, mono, out, 0, 0)
    return out


@kernel
def _overlap_add(frames: IN(2), window: IN(1), n_hop: INT, out: OUT(1), start: INT):
    for t in range(len(frames)):
        begin = (start + t) * n_hop
        frame, place = frames[t], out[begin : begin + len(window)]
        for i in range(len(window)):
            place[i] += frame[i] * window[i]


def overlap_add(y: np.ndarray, n_fft: int, n_hop: int, sums: np.ndarray, envelope: np.ndarray) -> None:
    """Add windowed frames of audio, and their windows squared, from spectra.

    Args:
        y: complex64 (J, C, T, F)
        sums: (J, C, nb_timesteps), envelope: (nb_timesteps,), both added to; nb_timesteps = (T − 1) n_hop + n_fft
    """
    spectra = (y, f"J C T {n_fft // 2 + 1}", np.complex64)
    check(y=spectra, envelope=(envelope, "L", np.float32), sums=(sums, "J C L", np.float32))
    if y.shape[2] and envelope.size != (y.shape[2] - 1) * n_hop + n_fft:
        raise ValueError(f"{y.shape[2]} frames have {(y.shape[2] - 1) * n_hop + n_fft} samples, not {envelope.size}")
    window = hann(n_fft)

    def row(spectra, out):
        for start in range(0, len(spectra), 16):
            frames = scipy.fft.irfft(spectra[start : start + 16], n_fft)
            _overlap_add(frames, window, n_hop, out, start)

    run([(row, y[j, c], sums[j, c]) for j in range(len(y)) for c in range(y.shape[1])])
    squares = window * window
    for t in range(y.shape[2]):
        envelope[t * n_hop : t * n_hop + n_fft] += squares
