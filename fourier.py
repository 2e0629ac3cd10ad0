"""The short-time Fourier transform and its inverse, made of native NNabla functions that are quick on any device.

F.stft is a convolution with the matrix of the transform: N (N + 2) multiplications for each frame of N samples, and on
a GPU cuDNN's convolutions. Where N is P · Q, the four steps of Cooley and Tukey (Mathematics of Computation 19, 1965)
need 2 N (P + Q + 2), and are two matrix products. With samples s = Q p + q and bins k = k₁ + P k₂,

    B_q(k₁) = Σ_p x(s) w(s) exp(−2πi k₁ s / N),                    for each q a matrix of its own,
    X(k) = Σ_q B_q(k₁) exp(−2πi k₂ q / Q),    k₂ = 0 … Q / 2:      the bins of a real signal, in their order.

Window and twiddle factors are in the first matrices, which are computed in float64. Both results lie in memory as the
next step reads them. The inverse is the same, backwards.

Shapes: R signals, T frames, F = n_fft // 2 + 1 bins.
"""

from functools import lru_cache

import nnabla as nn
import nnabla.functions as F
import numpy as np

import kernels.spectra

MOST_OVERLAP = 64  # frames that a sample is part of; each is a node of the graph


def _factors(n_fft: int, n_hop: int) -> tuple[int, int]:
    """P and Q, both about √n_fft, where Q divides the hop."""
    q = min(1 << (n_fft.bit_length() - 1) // 2, n_hop & -n_hop)
    return n_fft // q, q


def factored(n_fft: int, n_hop: int) -> bool:
    """Whether there are two short matrix products for frames of this size; F.stft does the others.

    There are for n_fft = 2ⁿ ≥ 4, if n_hop is at least n_fft / 64 and a multiple of a power of two ≥ √n_fft / 4: with
    n_fft 4096, of 16.
    """
    if n_fft < 4 or n_fft & (n_fft - 1) or n_fft > MOST_OVERLAP * n_hop:
        return False
    p, q = _factors(n_fft, n_hop)
    return q > 1 and p <= 16 * q


@lru_cache(maxsize=16)
def _matrices(n_fft, n_hop, inverse):
    """Those of both steps, (Q, 2 P, P) and (1, Q + 2, 2 Q); of the inverse, those to be applied transposed.

    Rows and columns that hold real and imaginary parts: (part, k₁), p; and (part, k₂), (q, part).
    """
    p, q = _factors(n_fft, n_hop)
    window = kernels.spectra.hann(n_fft, np.float64)
    if inverse:  # with the sum of the squared windows that a sample is part of
        window /= np.tile((window.reshape(-1, n_hop) ** 2).sum(0), n_fft // n_hop)
    samples = np.arange(n_fft).reshape(p, q).T  # (Q, P)
    angles = (2 * np.pi / n_fft) * (np.arange(p)[:, None] * samples[:, None] % n_fft)
    first = np.stack([np.cos(angles), -np.sin(angles)], axis=1) * window[samples][:, None, None]
    angles = (2 * np.pi / q) * (np.arange(q // 2 + 1)[:, None] * np.arange(q) % q)
    second = np.array([[np.cos(angles), np.sin(angles)], [-np.sin(angles), np.cos(angles)]]).transpose(0, 2, 3, 1)
    return first.reshape(q, 2 * p, p).astype(np.float32), second.reshape(1, q + 2, 2 * q).astype(np.float32)


def _constants(n_fft, n_hop, inverse=False):
    return [nn.Variable.from_numpy_array(matrix) for matrix in _matrices(n_fft, n_hop, inverse)]


def transform(x: nn.Variable, n_fft: int, n_hop: int) -> tuple[nn.Variable, nn.Variable]:
    """Short-time Fourier transform: periodic Hann window, no normalisation, no frame beyond the audio.

    Args:
        x: audio (R, nb_timesteps) of at least a frame
        n_fft, n_hop: window and hop in samples; `factored` says of which it is quick
    Returns:
        real, imaginary: (F, R, T)
    """
    nb_signals, nb_timesteps = x.shape
    if not factored(n_fft, n_hop):
        parts = F.stft(x, n_fft, n_hop, n_fft, window_type="hanning", center=False)
        return tuple(F.transpose(part, (1, 0, 2)) for part in parts)
    first, second = _constants(n_fft, n_hop)
    p, q = _factors(n_fft, n_hop)
    nb_frames = kernels.spectra.nb_frames(nb_timesteps, n_fft, n_hop, False)
    # Blocks of a hop each: a frame is one of them and those that follow.
    overlap, height = -(-n_fft // n_hop), n_hop // q
    nb_blocks = nb_frames + overlap - 1
    x = _of_length(x, nb_blocks * n_hop)
    blocks = F.transpose(F.reshape(x, (nb_signals, nb_blocks, height, q)), (3, 2, 0, 1))
    parts = []
    for i in range(overlap):
        stop = (q, min(height, p - i * height), nb_signals, i + nb_frames)
        parts.append(F.slice(blocks, start=(0, 0, 0, i), stop=stop))
    frames = F.concatenate(*parts, axis=1) if overlap > 1 else parts[0]
    h = F.batch_matmul(first, F.reshape(frames, (q, p, nb_signals * nb_frames)))
    h = F.batch_matmul(second, F.reshape(h, (1, 2 * q, -1)))
    h = F.reshape(h, (2, -1, nb_signals, nb_frames))
    shape = (n_fft // 2 + 1, nb_signals, nb_frames)
    return tuple(F.reshape(F.slice(h, start=(i, 0, 0, 0), stop=(i + 1, *shape)), shape) for i in (0, 1))


def inverse(real: nn.Variable, imag: nn.Variable, n_fft: int, n_hop: int) -> nn.Variable:
    """Frames windowed once more and added, over the sum of squared windows as though silent frames were around.

    Args:
        real, imag: (F, R, T); imaginary parts of the first and the last bin do not count
        n_fft: even, and a multiple of `n_hop`, but not n_hop
    Returns:
        audio (R, (T − 1) n_hop + n_fft)
    """
    nb_bins, nb_signals, nb_frames = real.shape
    overlap, length = n_fft // n_hop, (nb_frames - 1) * n_hop + n_fft
    if not factored(n_fft, n_hop):
        parts = [F.pad(F.transpose(part, (1, 0, 2)), (0, 0, 0, 0, overlap, overlap)) for part in (real, imag)]
        y = F.istft(*parts, n_fft, n_hop, n_fft, window_type="hanning", center=True, pad_mode="constant")
        start = n_fft - n_fft // 2  # of the silent frames, less what is cut off a centred one
        return F.slice(y, start=(0, start), stop=(nb_signals, start + length))
    first, second = _constants(n_fft, n_hop, inverse=True)
    p, q = _factors(n_fft, n_hop)
    height = n_hop // q
    weights = np.zeros((2, n_fft // 2 + p, 1, 1), np.float32)
    weights[:, :nb_bins] = 2 / n_fft  # with its conjugate, which there is none of for the first and the last
    weights[:, [0, nb_bins - 1]] = 1 / n_fft
    h = F.stack(*(F.pad(part, (0, p - 1, 0, 0, 0, 0)) for part in (real, imag)))
    h = F.reshape(h * nn.Variable.from_numpy_array(weights), (1, q + 2, -1))
    h = F.batch_matmul(second, h, transpose_a=True)
    frames = F.batch_matmul(first, F.reshape(h, (q, 2 * p, -1)), transpose_a=True)
    frames = F.reshape(frames, (q, p, nb_signals, nb_frames))
    parts = []
    for i in range(overlap):
        stop = (q, (i + 1) * height, nb_signals, nb_frames)
        part = F.slice(frames, start=(0, i * height, 0, 0), stop=stop)
        parts.append(F.pad(part, (0, 0, 0, 0, 0, 0, i, overlap - 1 - i)))
    return F.reshape(F.transpose(F.add_n(*parts), (2, 3, 1, 0)), (nb_signals, length))


def _of_length(x, length):
    """Audio (R, nb_timesteps) cropped, or with zeros at its end."""
    if length > x.shape[1]:
        return F.pad(x, (0, length - x.shape[1]))
    return F.slice(x, stop=(x.shape[0], length))
