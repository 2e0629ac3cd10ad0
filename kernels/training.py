"""What only training needs: dropout, the loss, Adam, an average of the weights."""

import numpy as np
from numba import types

from kernels.compiler import FLOAT, IN, INT, OUT, SUMS, inline, kernel
from kernels.shapes import check
from kernels.threads import get_threads, run, split


@inline
def _hash(x):
    """Mixes the bits of 32-bit words (the finalizer of MurmurHash3)."""
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x85EBCA6B))
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(x * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@kernel
def _dropout(x: IN(1), p: FLOAT, seed: types.uint32, layer: types.uint32, out: OUT(1), start: INT):
    limit = np.uint32(np.float64(p) * 4294967296.0)
    scale = np.float32(1 / (1 - np.float64(p)))
    key = _hash(seed + np.uint32(0x9E3779B9) * layer)
    for i in range(len(x)):
        kept = _hash(_hash(np.uint32(start + i) ^ seed) + key) >= limit
        out[i] = x[i] * scale if kept else np.float32(0)


def dropout(x: np.ndarray, p: float, seed: int, layer: int, out: np.ndarray) -> None:
    """Zero each number with probability p, multiply the others by 1 / (1 − p); out may be x.

    Which ones is a function of (seed, layer, index) alone: nothing is stored for the backward pass,
    and the number of threads does not matter. x, out: flat; seed: 32 bits.
    """
    check(x=(x, "K"), out=(out, "K"))
    run([(_dropout, x[i:j], p, seed, layer, out[i:j], i) for i, j in split(len(x), get_threads())])


@kernel
def _squared_error(a: IN(1), b: IN(1), sums: SUMS, part: INT):
    total = np.float64(0)
    for i in range(len(a)):
        difference = np.float64(a[i] - b[i])
        total += difference * difference
    sums[0, part] = total


def squared_error(a: np.ndarray, b: np.ndarray) -> float:
    """Mean of (a − b)² over flat arrays, accumulated in float64."""
    check(a=(a, "K"), b=(b, "K"))
    parts = split(len(a), -(-len(a) // 2**18))  # by length alone: the same for any number of threads
    sums = np.empty((1, len(parts)))
    run([(_squared_error, a[i:j], b[i:j], sums, part) for part, (i, j) in enumerate(parts)])
    return sums.sum() / max(1, len(a))


@kernel
def _difference(a: IN(1), b: IN(1), factor: FLOAT, add: FLOAT, out: OUT(1)):
    if add:
        for i in range(len(a)):
            out[i] += factor * (a[i] - b[i])
    else:
        for i in range(len(a)):
            out[i] = factor * (a[i] - b[i])


def difference(a: np.ndarray, b: np.ndarray, factor: float, out: np.ndarray, accumulate: bool = False) -> None:
    """out (+)= factor · (a − b), flat arrays."""
    check(a=(a, "K"), b=(b, "K"), out=(out, "K"))
    parts = split(len(a), 4 * get_threads())
    run([(_difference, a[i:j], b[i:j], factor, accumulate, out[i:j]) for i, j in parts])


@kernel
def _adam(
    w: OUT(1), g: IN(1), m: OUT(1), v: OUT(1), rate: FLOAT, new_m: FLOAT, new_v: FLOAT, beta2: FLOAT,
    correction: FLOAT, eps: FLOAT, decay: FLOAT,
):  # fmt: skip
    for i in range(len(w)):
        gradient = g[i] + decay * w[i]
        m[i] += new_m * (gradient - m[i])
        v[i] = beta2 * v[i] + new_v * gradient * gradient
        w[i] -= rate * m[i] / (np.sqrt(v[i]) * correction + eps)


def adam(
    parameters: list[tuple], step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> None:
    """One step of Adam with L2 weight decay, as torch.optim.Adam: eps is added after v's bias correction.

    Args:
        parameters: tuples (value, gradient, first moment, second moment) of flat arrays; all but the
            gradient are updated in place
        step: 1 for the first
    """
    rate = lr / (1 - beta1**step)
    correction = 1 / np.sqrt(1 - beta2**step)
    # 1 − β₂ in double precision: a float32 of 0.999 would put it off by 5e-5
    numbers = (rate, 1 - beta1, 1 - beta2, beta2, correction, eps, weight_decay)
    tasks = []
    for arrays in parameters:
        value, gradient, first, second = arrays
        check(value=(value, "K"), gradient=(gradient, "K"), first=(first, "K"), second=(second, "K"))
        size = len(value)
        parts = split(size, -(-size // 2**17))
        tasks += [(_adam, *(array[i:j] for array in arrays), *numbers) for i, j in parts]
    run(tasks)


@kernel
def _approach(average: OUT(1), value: IN(1), rate: FLOAT):
    for i in range(len(average)):
        average[i] += rate * (value[i] - average[i])


def approach(pairs: list[tuple], rate: float) -> None:
    """average += rate · (value − average), for pairs (average, value) of flat arrays."""
    tasks = []
    for average, value in pairs:
        check(average=(average, "K"), value=(value, "K"))
        parts = split(len(value), -(-len(value) // 2**17))
        tasks += [(_approach, average[i:j], value[i:j], rate) for i, j in parts]
    run(tasks)
