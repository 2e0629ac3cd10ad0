"""Audio to spectrogram and back: windows, frames, magnitudes, overlap-add."""

from collections.abc import Iterator

import numpy as np
import scipy.fft

from kernels.compiler import COMPLEX3, FLOAT, IN, INT, OUT, kernel
from kernels.shapes import check
from kernels.threads import run, split


def hann(n_fft: int, dtype: type = np.float32) -> np.ndarray:
    """Periodic Hann window."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(dtype)


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


def dual(n_fft: int, n_hop: int) -> np.ndarray:
    """The window that undoes `hann` by overlap-add: it, divided by the sum of its squares over all frames."""
    window = hann(n_fft).astype(np.float64)
    squares = np.zeros(n_hop)
    np.add.at(squares, np.arange(n_fft) % n_hop, window**2)
    return (window / squares[np.arange(n_fft) % n_hop]).astype(np.float32)


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


class OverlapAdd:
    """The inverse of the centred STFT, for frames that come in pieces: torch.istft's formula.

    Each frame is windowed once more, and the sum divided by that of the squared windows.
    """

    def __init__(self, n_fft: int, n_hop: int, nb_timesteps: int):
        self.n_fft, self.n_hop, self.nb_timesteps = n_fft, n_hop, nb_timesteps
        self.position = -(n_fft // 2)  # of the first sample that is not finished
        self.open = None

    def __call__(self, y: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Add the next frames (nb_sources, nb_channels, nb_frames, nb_bins); yields start and finished samples."""
        size = (y.shape[2] - 1) * self.n_hop + self.n_fft
        sums, envelope = np.zeros(y.shape[:2] + (size,), np.float32), np.zeros(size, np.float32)
        if self.open is not None:
            sums[..., : self.open[1].size], envelope[: self.open[1].size] = self.open
        overlap_add(y, self.n_fft, self.n_hop, sums, envelope)
        done = min(size, y.shape[2] * self.n_hop)
        self.open = sums[..., done:].copy(), envelope[done:].copy()
        yield from self._finish(sums[..., :done], envelope[:done])

    def end(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields what the last frames leave."""
        yield from self._finish(*self.open)

    def _finish(self, sums, envelope):
        start = self.position
        self.position += envelope.size
        cut = slice(max(0, -start), max(0, min(envelope.size, self.nb_timesteps - start)))
        if cut.start < cut.stop:
            sums = sums[..., cut]
            sums /= np.maximum(envelope[cut], 1e-11)  # where no frame reaches: zeros
            yield start + cut.start, sums


# Estimated magnitudes with the phase of a mixture as audio. Blocks of frames stay in the cache from the mixture's
# samples to the estimates', and no complex spectrogram is ever held: to compute the mixture's twice costs less.


@kernel
def _unit(spectra: COMPLEX3):
    """Divide numbers by their magnitudes; zeros have the phase 0."""
    rows, nb_frames, nb_bins = spectra.shape
    for r in range(rows):
        for t in range(nb_frames):
            s = spectra[r, t]
            for f in range(nb_bins):
                size = np.sqrt(s[f].real * s[f].real + s[f].imag * s[f].imag)
                s[f] = s[f] / size if size > 0 else np.complex64(1)


@kernel
def _with_phase(unit: COMPLEX3, v: IN(4), start: INT, sample: INT, channel: INT, out: COMPLEX3):
    for t in range(unit.shape[1]):
        u, y, size = unit[0, t], out[0, t], v[start + t, sample, channel]
        for f in range(len(u)):
            y[f] = size[f] * u[f]


@kernel
def _along_phase(
    unit: COMPLEX3, dy: COMPLEX3, scale: IN(1), add: INT, start: INT, sample: INT, channel: INT, dv: OUT(4)
):
    for t in range(unit.shape[1]):
        u, d, out = unit[0, t], dy[0, t], dv[start + t, sample, channel]
        if add:
            for f in range(len(u)):
                out[f] += scale[f] * (d[f].real * u[f].real + d[f].imag * u[f].imag)
        else:
            for f in range(len(u)):
                out[f] = scale[f] * (d[f].real * u[f].real + d[f].imag * u[f].imag)


def _units(x, n_fft, n_hop, nb_frames):
    """Ranges of frames, and for each the phases of audio (1, nb_timesteps), complex numbers of magnitude 1."""
    window = hann(n_fft)
    for start, stop in _blocks(nb_frames, n_fft):
        unit = _spectra(x, window, n_hop, False, start, stop)
        _unit(unit)
        yield start, stop, unit


def waveforms(v: list[np.ndarray], x: np.ndarray, n_fft: int, n_hop: int, out: list[np.ndarray]) -> None:
    """Magnitudes with the phases of uncentred frames of audio, back to audio: overlap-add with the `dual` window.

    Frames before the first and after the last count as silent, so that n_fft − n_hop samples at both ends are faded.

    Args:
        v: magnitudes, each (T, N, C or 1, F); one channel goes with the phases of all
        x: audio (N, C, nb_timesteps)
        n_fft: even
        out: of each, audio of the shape of x
    """
    _check_waveforms(v, x, n_fft, n_hop, out)
    window = dual(n_fft, n_hop)

    def row(sample, channel):
        for y in out:
            y[sample, channel] = 0
        for start, _, unit in _units(x[sample, channel : channel + 1], n_fft, n_hop, len(v[0])):
            spectra = np.empty_like(unit)
            for size, y in zip(v, out):
                _with_phase(unit, size, start, sample, min(channel, size.shape[2] - 1), spectra)
                _overlap_add(scipy.fft.irfft(spectra[0], n_fft), window, n_hop, y[sample, channel], start)

    run([(row, sample, channel) for sample in range(x.shape[0]) for channel in range(x.shape[1])])


def waveforms_backward(
    dy: list[np.ndarray], x: np.ndarray, n_fft: int, n_hop: int, dv: list[np.ndarray], accumulate: list[bool]
) -> None:
    """Gradients of `waveforms` towards magnitudes from those towards audio; each is added to what is there, or not."""
    _check_waveforms(dv, x, n_fft, n_hop, dy)
    window = dual(n_fft, n_hop)
    scale = np.full(n_fft // 2 + 1, 2 / n_fft, np.float32)  # a bin stands for itself and its conjugate
    scale[[0, -1]] = 1 / n_fft
    nb_channels = x.shape[1]

    def rows(sample, channels):
        for channel in channels:
            for start, stop, unit in _units(x[sample, channel : channel + 1], n_fft, n_hop, len(dv[0])):
                for gradient, out, add in zip(dy, dv, accumulate):
                    spectra = _spectra(gradient[sample, channel : channel + 1], window, n_hop, False, start, stop)
                    is_shared = out.shape[2] < nb_channels
                    add = add or (is_shared and channel > 0)
                    _along_phase(unit, spectra, scale, add, start, sample, 0 if is_shared else channel, out)

    # channels that share a magnitude add to one place, one after the other
    one_by_one = any(out.shape[2] < nb_channels for out in dv)
    groups = [range(nb_channels)] if one_by_one else [range(c, c + 1) for c in range(nb_channels)]
    run([(rows, sample, channels) for sample in range(x.shape[0]) for channels in groups])


def _check_waveforms(v, x, n_fft, n_hop, y):
    check(x=(x, "N C L", np.float32))
    nb_samples, nb_channels, nb_timesteps = x.shape
    shape = f"{nb_frames(nb_timesteps, n_fft, n_hop, False)} {nb_samples} {{}} {n_fft // 2 + 1}"
    for size, audio in zip(v, y):
        check(v=(size, shape.format(1 if size.shape[2] == 1 else nb_channels)), x=(x, "N C L"), y=(audio, "N C L"))
