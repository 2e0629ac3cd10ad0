"""Normalisation over rows, with the activation or the mask that follows it in the same pass."""

from typing import Optional

import numpy as np

from kernels.compiler import IN, INT, OUT, SUMS, inline, kernel, tanh
from kernels.shapes import check
from kernels.threads import get_threads, run, split

# What follows the normalisation. MASK is ReLU, then the product with the mixture.
IDENTITY, TANH, RELU, MASK = range(4)
COLUMNS = 1024  # per pass over the rows, so that the running sums stay in the first-level cache


@kernel
def _column_sums(x: IN(2), sums: SUMS, start: INT, stop: INT):
    sums[:, start:stop] = 0
    for begin in range(start, stop, COLUMNS):
        end = min(begin + COLUMNS, stop)
        plain, square = sums[0, begin:end], sums[1, begin:end]
        for r in range(x.shape[0]):
            row = x[r, begin:end]
            for j in range(end - begin):
                value = np.float64(row[j])
                plain[j] += value
                square[j] += value * value


def column_sums(x: np.ndarray) -> np.ndarray:
    """Sums over the rows of x and of x², float64 (2, K). In float64 squares may be summed as they are."""
    check(x=(x, "M K"))
    sums = np.empty((2, x.shape[1]))
    run([(_column_sums, x, sums, *columns) for columns in split(x.shape[1], 2 * get_threads(), 64)])
    return sums


@kernel
def _normalize(x: IN(2), mean: IN(1), slope: IN(1), shift: IN(1), kind: INT, mixture: IN(2), out: OUT(2)):
    for r in range(len(x)):
        row, y, factor = x[r], out[r], mixture[r]
        for j in range(len(y)):
            y[j] = (row[j] - mean[j]) * slope[j] + shift[j]
        if kind == TANH:
            for j in range(len(y)):
                y[j] = tanh(y[j])
        elif kind == RELU:
            for j in range(len(y)):
                y[j] = np.float32(0) if y[j] < 0 else y[j]
        elif kind == MASK:
            for j in range(len(y)):
                value = y[j] * factor[j]
                y[j] = np.float32(0) if y[j] < 0 else value


def normalize(
    x: np.ndarray,
    mean: np.ndarray,
    slope: np.ndarray,
    shift: np.ndarray,
    kind: int,
    mixture: np.ndarray,
    out: np.ndarray,
) -> None:
    """kind((x − mean) · slope + shift), and times the mixture if kind is MASK.

    Args:
        x, mixture, out: (M, K); the mixture is only read by MASK
        mean, slope, shift: (K,)
    """
    vectors = {"mean": (mean, "K"), "slope": (slope, "K"), "shift": (shift, "K")}
    check(x=(x, "M K"), mixture=(mixture, "M K"), out=(out, "M K"), **vectors)
    run(
        [
            (_normalize, x[i:j], mean, slope, shift, kind, mixture[i:j], out[i:j])
            for i, j in split(len(x), 4 * get_threads())
        ]
    )


@inline
def _through(kind, dy, other, x, mean, slope, shift, r):
    """r = gradient towards the normalisation's output, from dy behind the activation, of one row.

    `other` is the output itself for TANH, the mixture for MASK.
    """
    if kind == IDENTITY:
        for j in range(len(r)):
            r[j] = dy[j]
    elif kind == TANH:
        for j in range(len(r)):
            r[j] = dy[j] * (np.float32(1) - other[j] * other[j])
    else:
        for j in range(len(r)):
            value = dy[j]  # a load under a condition would not become part of a vector
            r[j] = value if (x[j] - mean[j]) * slope[j] + shift[j] > 0 else np.float32(0)
        if kind == MASK:
            for j in range(len(r)):
                r[j] *= other[j]


@kernel
def _gradient_sums(
    x: IN(2), dy: IN(2), other: IN(2), mean: IN(1), slope: IN(1), shift: IN(1), kind: INT,
    sums: SUMS, start: INT, stop: INT,
):  # fmt: skip
    sums[:, start:stop] = 0
    buffers = np.empty((3, COLUMNS), np.float32)
    for begin in range(start, stop, COLUMNS):
        end = min(begin + COLUMNS, stop)
        middle, a, b = mean[begin:end], slope[begin:end], shift[begin:end]
        plain, product = sums[0, begin:end], sums[1, begin:end]
        r, p, q = buffers[0, : end - begin], buffers[1, : end - begin], buffers[2, : end - begin]
        for block in range(0, len(x), 64):  # float32 within a block, float64 over blocks
            p[:] = 0
            q[:] = 0
            for i in range(block, min(block + 64, len(x))):
                row = x[i, begin:end]
                _through(kind, dy[i, begin:end], other[i, begin:end], row, middle, a, b, r)
                # one array written per loop: with more, the compiler gives up proving that they do not overlap
                for j in range(len(r)):
                    p[j] += r[j]
                for j in range(len(r)):
                    q[j] += r[j] * (row[j] - middle[j])
            for j in range(len(r)):
                plain[j] += p[j]
            for j in range(len(r)):
                product[j] += q[j]


@kernel
def _normalize_backward(
    x: IN(2), dy: IN(2), other: IN(2), mean: IN(1), slope: IN(1), shift: IN(1), kind: INT,
    along: IN(1), offset: IN(1), dx: OUT(2),
):  # fmt: skip
    for i in range(len(x)):
        row, out = x[i], dx[i]
        _through(kind, dy[i], other[i], row, mean, slope, shift, out)
        for j in range(len(row)):
            out[j] = out[j] * slope[j] + (row[j] - mean[j]) * along[j] + offset[j]


def normalize_backward(
    x: np.ndarray,
    dy: np.ndarray,
    other: np.ndarray,
    mean: np.ndarray,
    slope: np.ndarray,
    shift: np.ndarray,
    kind: int,
    inverse_std: np.ndarray,
    batch_statistics: bool,
    dx: Optional[np.ndarray],
) -> np.ndarray:
    """Gradient of `normalize`, towards x and the sums that give those of its parameters.

    Let u = (x − mean) / std, v = slope·std·u + shift and r the gradient towards v. Returned are, in
    float64 and over rows, Σ r and Σ r u, (K,) each. If mean and std are those of the M rows themselves,
    they depend on x too (Ioffe & Szegedy 2015):
        dx = slope · (r − Σ r / M − u · Σ r u / M)

    Args:
        x, dy, other: (M, K); other: the output for TANH, the mixture for MASK, else not read
        dx: (M, K), or None if not wanted
    """
    vectors = {"mean": (mean, "K"), "slope": (slope, "K"), "shift": (shift, "K")}
    vectors["inverse_std"] = (inverse_std, "K", np.float32)
    written = {} if dx is None else {"dx": (dx, "M K")}
    check(x=(x, "M K"), dy=(dy, "M K"), other=(other, "M K"), **vectors, **written)
    sums = np.empty((2, x.shape[1]))
    common = (mean, slope, shift, kind)
    columns = split(x.shape[1], 2 * get_threads(), 64)
    run([(_gradient_sums, x, dy, other, *common, sums, *part) for part in columns])
    sums[1] *= inverse_std
    if dx is not None:
        along, offset = np.zeros((2, x.shape[1]), np.float32)
        if batch_statistics:
            along[:] = -slope * inverse_std * sums[1] / len(x)
            offset[:] = -slope * sums[0] / len(x)
        run(
            [
                (_normalize_backward, x[i:j], dy[i:j], other[i:j], *common, along, offset, dx[i:j])
                for i, j in split(len(x), 4 * get_threads())
            ]
        )
    return sums
