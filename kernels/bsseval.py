"""BSSEval's arithmetic: correlations of whole songs, the filters that they define, the energies that filters leave.

In double precision throughout. References x (nb_sources, nb_timesteps, nb_channels) of any real type are read in
blocks, and so are estimates y, shorter ones as if silence followed. n = nb_sources · nb_channels counts the channels
of all sources.
"""

import ctypes

import numpy as np
import scipy.fft
import scipy.linalg.lapack
from numba import types

from kernels.blas import one_thread, routine
from kernels.compiler import INT, kernel
from kernels.threads import run, split

TAPS = 512  # of a filter
BLOCK = 4096  # samples of an FFT for correlations: few enough that the sums of all pairs stay in the cache
BATCH, BINS, PARTS = 16, 32, 8  # blocks that are summed together, bins in one go, tasks of the sums
LONGEST = 16384  # samples of an FFT for projections, at most
DEFINITE = 1e14  # a condition up to which Cholesky's solution is as good as another

SIGNALS = types.Array(types.float64, 2, "C", readonly=True)
SPECTRA = types.Array(types.complex128, 2, "C", readonly=True)
SPECTRA3 = types.Array(types.complex128, 3, "C", readonly=True)


def _read(audio, start, stop, out):
    """Samples start to stop of audio, as far as it has them, into out (nb_sources, nb_channels, …); then zeros."""
    part = audio[:, start:stop].transpose(0, 2, 1)
    out[:, :, : part.shape[2]] = part
    out[:, :, part.shape[2] :] = 0


# ------------------------------------------------------------------------------------ correlations


@kernel
def _add_products(spectra: SPECTRA3, first: INT, last: INT, out: types.complex128[:, :, ::1]):
    """out[i, k, f] += Σ_b conj(spectra[b, i, f]) · spectra[b, n + k, f], for bins first ≤ f < last."""
    n = len(out)
    for f in range(first, last, BINS):
        for i in range(n):
            for k in range(2 * n):
                total = out[i, k, f : min(last, f + BINS)]
                for b in range(len(spectra)):
                    u, v = spectra[b, i, f : f + len(total)], spectra[b, n + k, f : f + len(total)]
                    for g in range(len(total)):
                        total[g] += u[g].conjugate() * v[g]


def _transform(x, y, start, stop, out):
    """Spectra of references cut off at stop, of references, of estimates: (3n, bins)."""
    signals = np.empty((3, len(x), x.shape[2], BLOCK))
    _read(x, start, stop, signals[0])
    _read(x, start, start + BLOCK, signals[1])
    _read(y, start, start + BLOCK, signals[2])
    out[:] = scipy.fft.rfft(signals.reshape(-1, BLOCK), overwrite_x=True)


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Σ_t x_i(t) z_k(t + lag), where z are the channels of x and then those of y: (n, 2n, TAPS), lags from 0."""
    n, nb_timesteps = x.shape[0] * x.shape[2], x.shape[1]
    spectra = np.empty((BATCH, 3 * n, BLOCK // 2 + 1), complex)
    sums = np.zeros((n, 2 * n, BLOCK // 2 + 1), complex)
    blocks = split(nb_timesteps, nb_timesteps, BLOCK - TAPS + 1)
    for b in range(0, len(blocks), BATCH):
        some = blocks[b : b + BATCH]
        run([(_transform, x, y, *block, out) for block, out in zip(some, spectra)])
        run([(_add_products, spectra[: len(some)], *bins, sums) for bins in split(sums.shape[2], PARTS, BINS)])
    return scipy.fft.irfft(sums, BLOCK)[:, :, :TAPS]


# ----------------------------------------------------------------------------------------- filters


def normal_matrix(r: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """The matrix of the normal equations (m · TAPS, m · TAPS) of m channels, whose rows are (channel, lag).

    Args:
        r: correlations (m, m, TAPS)
        diagonal: (m,) what is added to it
    """
    m = len(r)
    matrix = np.empty((m, TAPS, m, TAPS))
    for i in range(m):
        for k in range(i + 1):
            both = np.concatenate([r[k, i, :0:-1], r[i, k]])  # lags 1 − TAPS … TAPS − 1
            matrix[i, :, k] = np.lib.stride_tricks.sliding_window_view(both, TAPS)[:, ::-1]
            if i != k:
                matrix[k, :, i] = matrix[i, :, k].T
    matrix = matrix.reshape(m * TAPS, m * TAPS)
    matrix[np.diag_indices(len(matrix))] += np.repeat(diagonal, TAPS)
    return matrix


class _Tiles:
    """The steps of a Cholesky factorisation in place, on tiles of TAPS rows and columns.

    BLAS counts by columns: it sees the lower triangle L that is kept here as an upper one, U = Lᵀ.
    """

    def __init__(self, matrix):
        self.matrix, self.definite = matrix, True
        self.size, self.row = (ctypes.byref(ctypes.c_int(number)) for number in (TAPS, len(matrix)))
        self.one, self.minus = (ctypes.byref(ctypes.c_double(number)) for number in (1, -1))

    def at(self, i, k):
        return self.matrix.ctypes.data + self.matrix.itemsize * TAPS * (i * len(self.matrix) + k)

    def factor(self, k):
        info = ctypes.c_int()
        dpotrf = routine("cython_lapack", "dpotrf", 5)
        dpotrf(b"U", self.size, self.at(k, k), self.row, ctypes.byref(info))
        self.definite = info.value == 0

    def divide(self, i, k):
        dtrsm = routine("cython_blas", "dtrsm", 11)
        size, row, triangle = self.size, self.row, self.at(k, k)
        dtrsm(b"L", b"U", b"T", b"N", size, size, self.one, triangle, row, self.at(i, k), row)

    def subtract(self, i, j, k):
        dgemm = routine("cython_blas", "dgemm", 13)
        size, row, left, right = self.size, self.row, self.at(j, k), self.at(i, k)
        dgemm(b"T", b"N", size, size, size, self.minus, left, row, right, row, self.one, self.at(i, j), row)


def cholesky(matrix: np.ndarray) -> bool:
    """Factor a symmetric matrix (m · TAPS, m · TAPS) in place, in its lower triangle; False if it is not definite."""
    tiles, m = _Tiles(matrix), len(matrix) // TAPS
    for k in range(m):
        tiles.factor(k)
        if not tiles.definite:
            return False
        run([(tiles.divide, i, k) for i in range(k + 1, m)])
        run([(tiles.subtract, i, j, k) for i in range(k + 1, m) for j in range(k + 1, i + 1)])
    return True


def _scaled(r, d):
    """Filters and condition of channels that are scaled by powers of two, which round nothing; infinite without."""
    eps, m = np.finfo(float).eps, len(r)
    scale = np.exp2(-np.round(np.log2(r[range(m), range(m), 0]) / 2))[:, None, None]
    r, d = r * scale * scale[:, 0], d * scale
    matrix = normal_matrix(r, eps * scale.ravel() ** 2)
    sums = np.abs(r).sum(axis=2)
    norm = (sums + sums.T).sum(axis=0).max() + eps * scale.max() ** 2
    with one_thread:
        if not cholesky(matrix):
            return None, np.inf
        condition = 1 / scipy.linalg.lapack.dpocon(matrix.T, norm, uplo="U")[0]
        filters = scipy.linalg.lapack.dpotrs(matrix.T, d.transpose(0, 2, 1).reshape(m * TAPS, -1))[0]
    return filters.reshape(m, TAPS, -1).transpose(0, 2, 1) * scale, condition


def solve(r: np.ndarray, d: np.ndarray, kept: list[int], nb_timesteps: int) -> tuple[np.ndarray, float]:
    """Least-squares filters from m channels to others, and the condition of their normal equations.

    museval adds the machine's epsilon to the diagonal, so it is here. Where double precision does not determine the
    filters, they are what comes out of museval's own way: LU with all channels, and if that stops, least squares.

    Args:
        r: correlations of the m channels (m, m, TAPS)
        d: theirs with other channels (m, nb_others, TAPS)
        kept: the channels that are not sums of others; the filters of the rest become zero
        nb_timesteps: of the signals; fewer than unknowns leave nothing to determine them
    Returns:
        filters (m, nb_others, TAPS); the condition, in the 1-norm, with all channels scaled to about one
    """
    m, condition = len(r), np.inf
    if kept and nb_timesteps + TAPS > m * TAPS:
        solution, condition = _scaled(r[np.ix_(kept, kept)], d[kept])
        if condition < DEFINITE:
            filters = np.zeros((m, d.shape[1], TAPS))
            filters[kept] = solution
            return filters, condition
    right = d.transpose(0, 2, 1).reshape(m * TAPS, -1)
    try:
        solution = np.linalg.solve(normal_matrix(r, np.full(m, np.finfo(float).eps)), right)
    except np.linalg.LinAlgError:
        solution = np.linalg.lstsq(normal_matrix(r, np.zeros(m)), right, rcond=-1)[0]
    return solution.reshape(m, TAPS, -1).transpose(0, 2, 1), condition


# ------------------------------------------------------------------------------------- projections


@kernel
def _filter(x: SPECTRA, filters: SPECTRA3, out: types.complex128[:, ::1]):
    """out[k] = Σ_i filters[i, k] · x[i]"""
    out[:] = 0
    for i in range(len(x)):
        u = x[i]
        for k in range(len(out)):
            v, total = filters[i, k], out[k]
            for f in range(len(u)):
                total[f] += v[f] * u[f]


@kernel
def _measure(s: SIGNALS, e: SIGNALS, own: SIGNALS, joint: SIGNALS, out: types.float64[::1]):
    """The energies that `energies` names, of one source, summed over its channels, from sample TAPS − 1 on."""
    out[:] = 0
    for c in range(len(s)):
        s_c, e_c = s[c, TAPS - 1 :], e[c, TAPS - 1 :]
        own_c, joint_c = own[c, TAPS - 1 :], joint[c, TAPS - 1 :]
        source = distortion = spatial = target = interference = projection = artifacts = 0.0
        for t in range(len(s_c)):
            source += s_c[t] ** 2
            distortion += (e_c[t] - s_c[t]) ** 2
            spatial += (own_c[t] - s_c[t]) ** 2
            target += own_c[t] ** 2
            interference += (joint_c[t] - own_c[t]) ** 2
            projection += joint_c[t] ** 2
            artifacts += (e_c[t] - joint_c[t]) ** 2
        out += np.array([source, distortion, spatial, target, interference, projection, artifacts])


def _project(x, y, start, stop, at, length, own, joint, out):
    """Energies of one block of a frame's projections, by overlap-save: from sample `at` of the frame on."""
    nb_sources, _, nb_channels = x.shape
    n, past = len(joint), TAPS - 1
    begin, end = start + at, min(stop, start + at + length - past)
    signals = np.zeros((2, nb_sources, nb_channels, length))
    if at == 0:  # before a frame is silence
        _read(x, begin, end, signals[0, :, :, past:])
    else:
        _read(x, begin - past, end, signals[0])
    _read(y, begin, end, signals[1, :, :, past:])
    spectra = scipy.fft.rfft(signals[0].reshape(n, length))
    filtered = np.empty((2 * n, spectra.shape[1]), complex)
    for j, filters in enumerate(own):
        channels = slice(j * nb_channels, (j + 1) * nb_channels)
        _filter(spectra[channels], filters, filtered[channels])
    _filter(spectra, joint, filtered[n:])
    filtered = scipy.fft.irfft(filtered, length).reshape(2, nb_sources, nb_channels, length)
    for j in range(nb_sources):
        _measure(signals[0, j], signals[1, j], filtered[0, j], filtered[1, j], out[j])


def energies(
    x: np.ndarray, y: np.ndarray, frames: list[tuple[int, int]], own: np.ndarray, joint: np.ndarray
) -> np.ndarray:
    """Energies of frames, each filtered as if there were silence around it, with the TAPS − 1 samples that follow.

    Args:
        frames: (start, stop) of each, all about as long
        own: filters from each source's reference to its estimate (nb_sources, nb_channels, nb_channels, TAPS)
        joint: filters from all references to all estimates (n, n, TAPS)
    Returns:
        (nb_frames, nb_sources, 7): of s, e − s, P_j e − s, P_j e, P e − P_j e, P e and e − P e, where s is the
        source's reference, e its estimate, P_j e the estimate's projection on s, P e that on all references
    """
    nb_timesteps = max((stop - start for start, stop in frames), default=0) + TAPS - 1
    nb_blocks = -(-nb_timesteps // (LONGEST - TAPS + 1))
    length = scipy.fft.next_fast_len(-(-nb_timesteps // nb_blocks) + TAPS - 1, real=True)
    own, joint = scipy.fft.rfft(own, length), scipy.fft.rfft(joint, length)
    out = np.empty((len(frames), nb_blocks, len(x), 7))
    run(
        [
            (_project, x, y, start, stop, b * (length - TAPS + 1), length, own, joint, out[t, b])
            for t, (start, stop) in enumerate(frames)
            for b in range(nb_blocks)
        ]
    )
    return out.sum(axis=1)
