"""The network's input stage: shift and scale of each bin and the affine map behind them, in one."""

import numpy as np

from kernels.compiler import IN, INT, OUT, SUMS, kernel
from kernels.normalization import column_sums
from kernels.products import matmul, products
from kernels.shapes import check
from kernels.threads import get_threads, run, split


@kernel
def _scale_rows(weight: IN(2), mean: IN(1), scale: IN(1), scaled: OUT(2), sums: SUMS, part: INT, start: INT, stop: INT):
    shift = sums[part]
    shift[:] = 0
    for i in range(start, stop):
        b = i % len(mean)
        w, s = weight[i], scaled[i]
        for j in range(len(w)):
            s[j] = scale[b] * w[j]
        for j in range(len(w)):
            shift[j] += mean[b] * s[j]


def _scaled(weight, mean, scale):
    """scale · W, and (mean · scale) W."""
    scaled = np.empty_like(weight)
    parts = split(len(weight), get_threads())
    sums = np.empty((len(parts), weight.shape[1]))
    run([(_scale_rows, weight, mean, scale, scaled, sums, i, *part) for i, part in enumerate(parts)])
    return scaled, sums.sum(0)


def input_affine(x: np.ndarray, mean: np.ndarray, scale: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """((x + mean) · scale) W over the first B bins, as x (scale · W) + (mean · scale) W.

    Args:
        x: (M, C, F); mean, scale: (B,)
        weight: (C · B, K)
        out: (M, K)
    """
    check(mean=(mean, "B"), scale=(scale, "B"), x=(x, "M C F"), weight=(weight, "C*B K"), out=(out, "M K"))
    nb_bins = _nb_bins(mean, x)
    scaled, out[:] = _scaled(weight, mean, scale)
    for c in range(x.shape[1]):
        matmul(x[:, c, :nb_bins], scaled[c * nb_bins : (c + 1) * nb_bins], out, accumulate=True)


def _nb_bins(mean, x):
    if not 0 < len(mean) <= x.shape[2]:
        raise ValueError(f"mean and scale of {len(mean)} bins: x has {x.shape[2]}")
    return len(mean)


@kernel
def _input_gradients(
    weight: IN(2), mean: IN(1), scale: IN(1), total: IN(1), dw: OUT(2), sums: SUMS, start: INT, stop: INT
):
    for i in range(start, stop):
        b = i % len(mean)
        w, d = weight[i], dw[i]
        along, across = np.float64(0), np.float64(0)
        for j in range(len(d)):
            product = d[j] + mean[b] * total[j]
            along += w[j] * product
            across += w[j] * total[j]
            d[j] = scale[b] * product
        sums[0, i] = along
        sums[1, i] = across


def input_affine_backward(
    x: np.ndarray, mean: np.ndarray, scale: np.ndarray, weight: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients (dmean, dscale, dW) of `input_affine`.

    With P = xᵀ dY, s the sum of dY's rows, and b the bin of W's row i = (channel, b):
        dW[i]     = scale[b] (P[i] + mean[b] s)
        dscale[b] = Σ over channels of W[i] · (P[i] + mean[b] s)
        dmean[b]  = Σ over channels of scale[b] W[i] · s
    """
    check(mean=(mean, "B"), scale=(scale, "B"), x=(x, "M C F"), weight=(weight, "C*B K"), dy=(dy, "M K"))
    nb_bins, nb_channels = _nb_bins(mean, x), x.shape[1]
    dw = np.empty_like(weight)
    tasks = []
    for c in range(nb_channels):
        tasks += products(x[:, c, :nb_bins].T, dy, dw[c * nb_bins : (c + 1) * nb_bins])
    run(tasks)
    total = column_sums(dy)[0].astype(np.float32)
    sums = np.empty((2, len(weight)))
    run([(_input_gradients, weight, mean, scale, total, dw, sums, *rows) for rows in split(len(dw), get_threads())])
    along, across = sums.reshape(2, nb_channels, nb_bins).sum(1)
    return (scale * across).astype(np.float32), along.astype(np.float32), dw


def input_affine_backward_data(
    dy: np.ndarray, mean: np.ndarray, scale: np.ndarray, weight: np.ndarray, dx: np.ndarray, accumulate: bool
) -> None:
    """Gradient of `input_affine` towards x (M, C, F); bins that it does not read have none."""
    check(mean=(mean, "B"), scale=(scale, "B"), dx=(dx, "M C F"), weight=(weight, "C*B K"), dy=(dy, "M K"))
    nb_bins = _nb_bins(mean, dx)
    scaled, _ = _scaled(weight, mean, scale)
    if not accumulate:
        dx[:, :, nb_bins:] = 0
    for c in range(dx.shape[1]):
        matmul(dy, scaled[c * nb_bins : (c + 1) * nb_bins].T, dx[:, c, :nb_bins], accumulate)
