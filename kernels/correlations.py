"""Losses in the time domain, as functions of the inner products of signals.

However many sums of targets a loss compares, it needs each signal's samples once for their inner products, and once
more for the gradient. Both are kept in double precision: in the difference of two signals that are nearly alike,
little is left of their energies.

Shapes: R = rows of N samples and C channels, K = signals, M = sets of targets, J = targets.
"""

import numpy as np

from kernels.compiler import IN, INT, OUT, SUMS, kernel
from kernels.shapes import check
from kernels.threads import run

BLOCK = 4096  # samples: those of nine signals stay in the second-level cache
PIECE = 512  # and these in the first-level one
EPS = 1e-10  # against division by zero, of energies; that of Sony's X-UMX


@kernel
def _products(signals: IN(2), length: INT, gram: SUMS):
    for begin in range(0, length, PIECE):
        end = min(begin + PIECE, length)
        for i in range(len(signals)):
            a = signals[i, begin:end]
            for j in range(i + 1):
                b, total = signals[j, begin:end], np.float64(0)
                for k in range(len(a)):
                    total += np.float64(a[k]) * np.float64(b[k])
                gram[i, j] += total


def gram(signals: list[np.ndarray], start: int, stop: int) -> np.ndarray:
    """Inner products, over samples start … stop, of signals (N, C, nb_timesteps): float64 (N, C, K, K)."""
    _check(signals)
    nb_samples, nb_channels, _ = signals[0].shape
    products = np.zeros((nb_samples, nb_channels, len(signals), len(signals)))

    def row(sample, channel):
        block = np.empty((len(signals), BLOCK), np.float32)
        for begin in range(start, stop, BLOCK):
            length = _fill(block, signals, sample, channel, begin, stop)
            _products(block, length, products[sample, channel])

    run([(row, sample, channel) for sample in range(nb_samples) for channel in range(nb_channels)])
    below = np.tril(products, -1)
    return products + below.swapaxes(2, 3)


@kernel
def _mix(weights: IN(2), signals: IN(2), length: INT, out: OUT(2)):
    for begin in range(0, length, PIECE):
        end = min(begin + PIECE, length)
        for i in range(len(weights)):
            y = out[i, begin:end]
            y[:] = 0
            for j in range(len(signals)):
                weight, x = weights[i, j], signals[j, begin:end]
                for k in range(len(y)):
                    y[k] += weight * x[k]


def mix(
    weights: np.ndarray, signals: list[np.ndarray], start: int, stop: int, out: list[np.ndarray], accumulate: list[bool]
) -> None:
    """out[i] (+)= Σ weights[:, :, i, k] · signals[k] in samples start … stop; zeros outside.

    Args:
        weights: (N, C, len(out), K)
        signals, out: (N, C, nb_timesteps) each
        accumulate: for each out, whether it is added to
    """
    _check([*signals, *out])
    weights = np.ascontiguousarray(weights, np.float32)
    nb_samples, nb_channels, _ = signals[0].shape
    check(weights=(weights, f"{nb_samples} {nb_channels} {len(out)} {len(signals)}"))

    def row(sample, channel):
        block, sums = (np.empty((len(some), BLOCK), np.float32) for some in (signals, out))
        for y, add in zip(out, accumulate):
            if not add:
                y[sample, channel, :start] = y[sample, channel, stop:] = 0
        for begin in range(start, stop, BLOCK):
            length = _fill(block, signals, sample, channel, begin, stop)
            _mix(weights[sample, channel], block, length, sums)
            for y, add, total in zip(out, accumulate, sums):
                part = y[sample, channel, begin : begin + length]
                np.add(part, total[:length], part) if add else np.copyto(part, total[:length])

    run([(row, sample, channel) for sample in range(nb_samples) for channel in range(nb_channels)])


def _fill(block, signals, sample, channel, begin, stop):
    """Copy the samples of all signals from `begin` on into a block; returns how many they are."""
    length = min(BLOCK, stop - begin)
    for place, signal in zip(block, signals):
        place[:length] = signal[sample, channel, begin : begin + length]
    return length


def _check(signals):
    for signal in signals:
        check(signal=(signal, "{} {} {}".format(*signals[0].shape)))


# ------------------------------------------------------------------------------------ the losses themselves


def sdr(products: np.ndarray, nb_timesteps: int, eps: float) -> tuple[float, np.ndarray]:
    """Minus the signal-to-distortion ratio in dB, mean over samples.

    Args:
        products: `gram` of (estimate, target) over nb_timesteps samples
        eps: added to the mean squares of target and error
    Returns:
        the loss; its gradient towards the estimate, as weights of `mix` (N, C, 1, 2)
    """
    nb_samples, nb_channels = products.shape[:2]
    nb_values = nb_channels * nb_timesteps
    energies = products.sum(axis=1)
    error = np.maximum(energies[:, 0, 0] - 2 * energies[:, 0, 1] + energies[:, 1, 1], 0) / nb_values + eps
    target = energies[:, 1, 1] / nb_values + eps
    factor = 20 / np.log(10) / (nb_samples * nb_values) / error  # d loss / d error · 2 / nb_values
    weights = factor[:, None, None, None] * np.array([1.0, -1.0])
    return np.mean(10 * np.log10(error / target)), np.broadcast_to(weights, (nb_samples, nb_channels, 1, 2))


def weighted_sdr(products: np.ndarray, sets: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss of Sawata et al. in the time domain, plus 1: mean over channels, samples and sets of targets.

    Of a set, let y be the sum of its targets, p that of its estimates, x the mixture, and
    ρ = |y|² / (|y|² + |x − y|²): the loss is −ρ cos(y, p) − (1 − ρ) cos(x − y, x − p).

    Args:
        products: `gram` of (mixture, estimates, targets), K = 2 J + 1
        sets: 1 where a target is in a set, else 0 (M, J)
    Returns:
        the loss; its gradient towards the estimates, as weights of `mix` (N, C, J, K)
    """
    nb_sets, nb_targets = sets.shape
    estimates, targets = slice(1, 1 + nb_targets), slice(1 + nb_targets, None)

    def of_sets(some, others):
        return np.einsum("ncij,si,sj->ncs", products[:, :, some, others], sets, sets, optimize=True)

    pp, yp, yy = of_sets(estimates, estimates), of_sets(estimates, targets), of_sets(targets, targets)
    xx, xp, xy = products[:, :, :1, 0], products[:, :, 0, estimates] @ sets.T, products[:, :, 0, targets] @ sets.T
    rest = np.maximum(xx - 2 * xy + yy, 0)  # |x − y|²
    error = np.maximum(xx - 2 * xp + pp, 0)  # |x − p|²
    rho = yy / (yy + rest + EPS)
    near, near_pp, near_yp = _cosine(pp, yp, yy)
    far, far_error, far_product = _cosine(error, xx - xp - xy + yp, rest)
    loss = 1 - np.mean(rho * near + (1 - rho) * far)

    nb_terms = rho.size
    of_pp = -(rho * near_pp + (1 - rho) * far_error) / nb_terms
    of_yp = -(rho * near_yp + (1 - rho) * far_product) / nb_terms
    of_xp = (1 - rho) * (2 * far_error + far_product) / nb_terms
    weights = np.empty((*products.shape[:2], nb_targets, 1 + 2 * nb_targets))
    weights[..., 0] = of_xp @ sets
    weights[..., estimates] = 2 * np.einsum("ncs,si,sj->ncij", of_pp, sets, sets, optimize=True)
    weights[..., targets] = np.einsum("ncs,si,sj->ncij", of_yp, sets, sets, optimize=True)
    return loss, weights


def _cosine(aa, ab, bb):
    """ab / (|a| |b|), and its derivatives by aa = |a|² and ab."""
    a, b = np.sqrt(EPS + aa), np.sqrt(EPS + bb)
    size = a * b + EPS
    return ab / size, -ab / size**2 * b / (2 * a), 1 / size
