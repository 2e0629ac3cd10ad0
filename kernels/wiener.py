"""The multichannel Wiener filter, for one or two channels."""

import numpy as np
from numba import types

from kernels.compiler import IN, INT, OUT, inline, kernel
from kernels.shapes import check
from kernels.threads import get_threads, run, split

# Complex numbers are read and written as pairs, and in between kept as planes: for n bins of one frame, four
# rows of n numbers, real and imaginary part of the left, then of the right channel. Mono is stereo whose right
# channel is silent. The arithmetic is in double precision, since the inverse of two nearly proportional channels
# needs it, and costs little beside reading and writing. Loops write one row each, as the compiler makes vectors of
# no loop in which too many arrays might overlap.

BINS = 180  # of a task, which filters them over all frames: enough for long rows, few enough for several tasks


@inline
def _load(row, real, imag):
    for f in range(len(real)):
        real[f] = row[2 * f]
        imag[f] = row[2 * f + 1]


@inline
def _store(real, imag, row):
    for f in range(len(real)):
        row[2 * f] = real[f]
        row[2 * f + 1] = imag[f]


@inline
def _initial_estimates(v, t, start, mix, nb_channels, softmask, residual, eps, y):
    """Frame t of the first estimates: magnitudes with the mixture's phases, or shares of the mixture.

    Zero has the phase that NumPy gives it: 0, or π if its real part is −0.

    Args:
        v: (J, T, C or 1, F); mix: (4, n) planes
        y: (J, 4, n) planes, written; or J + 1 sources, the last being what the others leave of the mixture
    """
    nb_sources, n = len(v), mix.shape[1]
    real, imag, share = np.empty(n), np.empty(n), np.ones(n)
    for c in range(nb_channels):
        at = min(c, v.shape[2] - 1)
        real[:] = mix[2 * c]
        imag[:] = mix[2 * c + 1]
        if residual:
            y[nb_sources, 2 * c] = real
            y[nb_sources, 2 * c + 1] = imag
        if softmask:
            share[:] = eps
            for j in range(nb_sources):
                row = v[j, t, at, start : start + n]
                for f in range(n):
                    share[f] += row[f]
            for f in range(n):
                share[f] = 1 / share[f]
        else:
            for f in range(n):
                magnitude = np.sqrt(real[f] * real[f] + imag[f] * imag[f])
                real[f] = real[f] / magnitude if magnitude > 0 else np.copysign(1.0, real[f])
                imag[f] = imag[f] / magnitude if magnitude > 0 else 0.0
        for j in range(nb_sources):
            row, y_real, y_imag = v[j, t, at, start : start + n], y[j, 2 * c], y[j, 2 * c + 1]
            for f in range(n):
                magnitude = row[f] * share[f]
                y_real[f] = magnitude * real[f]
                y_imag[f] = magnitude * imag[f]
        if residual:
            for j in range(nb_sources):
                for k in range(2 * c, 2 * c + 2):
                    for f in range(n):
                        y[nb_sources, k, f] -= y[j, k, f]


@inline
def _add_covariances(y, sums):
    """sums (J, 4, n) += |y₀|², |y₁|², real and imaginary part of y₀ ȳ₁."""
    for j in range(len(y)):
        a, b, c, d = y[j, 0], y[j, 1], y[j, 2], y[j, 3]
        left, right, real, imag = sums[j, 0], sums[j, 1], sums[j, 2], sums[j, 3]
        for f in range(len(a)):
            left[f] += a[f] * a[f] + b[f] * b[f]
        for f in range(len(a)):
            right[f] += c[f] * c[f] + d[f] * d[f]
        for f in range(len(a)):
            real[f] += a[f] * c[f] + b[f] * d[f]
        for f in range(len(a)):
            imag[f] += b[f] * c[f] - a[f] * d[f]


@inline
def _filter_frame(mix, R, nb_channels, noise, y):
    """y_j ← p_j R_j z with z = (Σ_i p_i R_i + noise)⁻¹ mix, where p_j is the mean of |y_j|² over channels.

    The matrices are Hermitian, and inverted in closed form:
        ⎡ a  b ⎤⁻¹          1      ⎡  d  −b ⎤
        ⎣ b̄  d ⎦    =  ─────────── ⎣ −b̄   a ⎦ ,    a and d real
                       a d − |b|²

    Args:
        mix: (4, n) planes; y: (J, 4, n) planes, read and overwritten
        R: (J, 4, n), ordered like the sums of `_add_covariances`
    """
    nb_sources, n = len(y), mix.shape[1]
    powers, total, z, scale = np.empty((nb_sources, n)), np.zeros((4, n)), np.empty((4, n)), np.empty(n)
    total[0] = noise
    total[1] = noise if nb_channels == 2 else 1  # the silent channel: any number but 0, as it cancels
    for j in range(nb_sources):
        p, y0, y1, y2, y3 = powers[j], y[j, 0], y[j, 1], y[j, 2], y[j, 3]
        for f in range(n):
            p[f] = (y0[f] * y0[f] + y1[f] * y1[f] + y2[f] * y2[f] + y3[f] * y3[f]) / nb_channels
        for k in range(4):
            r, out = R[j, k], total[k]
            for f in range(n):
                out[f] += p[f] * r[f]

    a, d, b, b_imag = total[0], total[1], total[2], total[3]
    x0, x1, x2, x3 = mix[0], mix[1], mix[2], mix[3]
    z0, z1, z2, z3 = z[0], z[1], z[2], z[3]
    for f in range(n):
        scale[f] = 1 / (a[f] * d[f] - b[f] * b[f] - b_imag[f] * b_imag[f])
    for f in range(n):
        z0[f] = scale[f] * (d[f] * x0[f] - b[f] * x2[f] + b_imag[f] * x3[f])
    for f in range(n):
        z1[f] = scale[f] * (d[f] * x1[f] - b[f] * x3[f] - b_imag[f] * x2[f])
    for f in range(n):
        z2[f] = scale[f] * (a[f] * x2[f] - b[f] * x0[f] - b_imag[f] * x1[f])
    for f in range(n):
        z3[f] = scale[f] * (a[f] * x3[f] - b[f] * x1[f] + b_imag[f] * x0[f])

    for j in range(nb_sources):
        p, y0, y1, y2, y3 = powers[j], y[j, 0], y[j, 1], y[j, 2], y[j, 3]
        left, right, real, imag = R[j, 0], R[j, 1], R[j, 2], R[j, 3]
        for f in range(n):
            y0[f] = p[f] * (left[f] * z0[f] + real[f] * z2[f] - imag[f] * z3[f])
        for f in range(n):
            y1[f] = p[f] * (left[f] * z1[f] + real[f] * z3[f] + imag[f] * z2[f])
        for f in range(n):
            y2[f] = p[f] * (right[f] * z2[f] + real[f] * z0[f] + imag[f] * z1[f])
        for f in range(n):
            y3[f] = p[f] * (right[f] * z3[f] + real[f] * z1[f] - imag[f] * z0[f])


@inline
def _covariances(sums, weight, nb_channels, R):
    """R_j = sums_j / (weight + Σ p_j), both (J, 4, n), as the sum of powers is the trace of sums_j over channels."""
    for j in range(len(R)):
        for f in range(R.shape[2]):
            scale = 1 / (weight + (sums[j, 0, f] + sums[j, 1, f]) / nb_channels)
            for k in range(4):
                R[j, k, f] = scale * sums[j, k, f]


@inline
def _wiener_bins(v, x, iterations, softmask, residual, eps, weight, noise, out, start, stop):
    """Some bins of `wiener`; x (C, T, 2 F) and out (J, C, T, 2 F) are seen as pairs."""
    nb_sources, nb_channels, nb_frames, _ = out.shape
    n = stop - start
    mix, y = np.zeros((4, n)), np.zeros((nb_sources, 4, n))
    sums, R = np.zeros((nb_sources, 4, n)), np.empty((nb_sources, 4, n))
    # Sweep 0 makes the initial estimates, each later one is an iteration, and every one adds up what the next
    # needs. The initial estimates are not kept for the first iteration: making them again is cheaper.
    for sweep in range(iterations + 1):
        for t in range(nb_frames):
            for c in range(nb_channels):
                _load(x[c, t, 2 * start : 2 * stop], mix[2 * c], mix[2 * c + 1])
            if sweep < 2:
                _initial_estimates(v, t, start, mix, nb_channels, softmask, residual, eps, y)
            else:
                for j in range(nb_sources):
                    for c in range(nb_channels):
                        _load(out[j, c, t, 2 * start : 2 * stop], y[j, 2 * c], y[j, 2 * c + 1])
            if sweep > 0:
                _filter_frame(mix, R, nb_channels, noise, y)
            if sweep > 0 or iterations == 0:
                for j in range(nb_sources):
                    for c in range(nb_channels):
                        _store(y[j, 2 * c], y[j, 2 * c + 1], out[j, c, t, 2 * start : 2 * stop])
            if sweep < iterations:
                _add_covariances(y, sums)
        _covariances(sums, weight, nb_channels, R)
        sums[:] = 0


DOUBLE = types.float64


@kernel
def _wiener_single(
    v: IN(4), x: IN(3), iterations: INT, softmask: INT, residual: INT, eps: DOUBLE, weight: DOUBLE, noise: DOUBLE,
    out: OUT(4), start: INT, stop: INT,
):  # fmt: skip
    _wiener_bins(v, x, iterations, softmask, residual, eps, weight, noise, out, start, stop)


@kernel
def _wiener_double(
    v: types.Array(DOUBLE, 4, "C", readonly=True), x: types.Array(DOUBLE, 3, "C", readonly=True), iterations: INT,
    softmask: INT, residual: INT, eps: DOUBLE, weight: DOUBLE, noise: DOUBLE, out: types.Array(DOUBLE, 4, "C"),
    start: INT, stop: INT,
):  # fmt: skip
    _wiener_bins(v, x, iterations, softmask, residual, eps, weight, noise, out, start, stop)


def wiener(
    v: np.ndarray,
    x: np.ndarray,
    iterations: int,
    softmask: bool,
    residual: bool,
    eps: float,
    weight: float,
    noise: float,
    out: np.ndarray,
) -> None:
    """Multichannel Wiener filter for one or two channels; `filtering.source_spectra` explains what it computes.

    Two passes over the data for the first iteration, one for each further one. No bin depends on another one,
    and sums over frames have one order: the number of threads does not change a bit.

    Args:
        v: (J, T, C or 1, F) magnitudes
        x: (C, T, F) complex mixture
        iterations, softmask, residual: as in `filtering.source_spectra`
        eps: added to the sum of magnitudes in the soft mask
        weight: added to the sum of powers that the covariances are divided by
        noise: added to the diagonal of the mixture's covariance
        out: (J, C, T, F) complex, written; J + 1 sources with a residual
    """
    nb_channels = 1 if np.shape(v)[2:3] == (1,) else "C"
    check(x=(x, "C T F"), v=(v, f"J T {nb_channels} F"), out=(out, f"J+{int(residual)} C T F"))
    if not 1 <= len(x) <= 2 or out.dtype != x.dtype or v.dtype != x.real.dtype:
        raise ValueError(f"{len(x)} channels of {x.dtype}, magnitudes {v.dtype}, result {out.dtype}: they do not fit")
    function = _wiener_single if x.dtype == np.complex64 else _wiener_double
    numbers = (iterations, int(softmask), int(residual), eps, weight, noise)
    x, out = x.view(v.dtype), out.view(v.dtype)
    nb_bins = v.shape[3]
    run([(function, v, x, *numbers, out, *part) for part in split(nb_bins, -(-nb_bins // BINS))])


@kernel
def _causal_bins(
    v: IN(4), x: IN(3), softmask: INT, residual: INT, eps: DOUBLE, weight: DOUBLE, noise: DOUBLE, forgetting: DOUBLE,
    sums: types.Array(DOUBLE, 3, "C"), out: OUT(4), start: INT, stop: INT,
):  # fmt: skip
    nb_sources, nb_channels, nb_frames, _ = out.shape
    mix, y = np.zeros((4, stop - start)), np.zeros((nb_sources, 4, stop - start))
    own, R = sums[:, :, start:stop], np.empty(y.shape)
    for t in range(nb_frames):
        for c in range(nb_channels):
            _load(x[c, t, 2 * start : 2 * stop], mix[2 * c], mix[2 * c + 1])
        _initial_estimates(v, t, start, mix, nb_channels, softmask, residual, eps, y)
        for j in range(nb_sources):
            for k in range(4):
                own[j, k] *= forgetting
        _add_covariances(y, own)
        _covariances(own, weight, nb_channels, R)
        _filter_frame(mix, R, nb_channels, noise, y)
        for j in range(nb_sources):
            for c in range(nb_channels):
                _store(y[j, 2 * c], y[j, 2 * c + 1], out[j, c, t, 2 * start : 2 * stop])


def causal(
    v: np.ndarray,
    x: np.ndarray,
    softmask: bool,
    residual: bool,
    eps: float,
    weight: float,
    noise: float,
    forgetting: float,
    sums: np.ndarray,
    out: np.ndarray,
) -> None:
    """One iteration in one pass: covariances of a frame are those of the frames so far, as `filtering.Causal` says.

    Args:
        v, x, softmask, residual, eps, weight, noise, out: as of `wiener`, in single precision
        forgetting: what sums are multiplied with from frame to frame
        sums: (J, 4, F) float64, or J + 1 with a residual: |y₀|², |y₁|², real and imaginary part of y₀ ȳ₁, summed over
            the frames before, and then over these as well
    """
    nb_channels, nb_all = 1 if np.shape(v)[2:3] == (1,) else "C", f"J+{int(residual)}"
    check(x=(x, "C T F", np.complex64), v=(v, f"J T {nb_channels} F"))
    check(v=(v, "J T V F"), sums=(sums, f"{nb_all} 4 F"), out=(out, f"{nb_all} {len(x)} T F", np.complex64))
    if not 1 <= len(x) <= 2:
        raise ValueError(f"{len(x)} channels: expected one or two")
    numbers = (int(softmask), int(residual), eps, weight, noise, forgetting)
    x, out = x.view(np.float32), out.view(np.float32)
    parts = split(v.shape[3], get_threads())
    run([(_causal_bins, v, x, *numbers, sums, out, *part) for part in parts])


def peak(x: np.ndarray) -> float:
    """max |x| of a complex array (C, T, F), without an array of all magnitudes."""
    check(x=(x, "C T F"))
    peaks = np.zeros((x.shape[0], x.shape[1]))

    def block(start, stop):
        np.abs(x[:, start:stop]).max(axis=2, initial=0, out=peaks[:, start:stop])

    run([(block, *part) for part in split(x.shape[1], -(-x.shape[1] // 32))])
    return peaks.max(initial=0)
