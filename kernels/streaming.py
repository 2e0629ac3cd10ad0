"""Layers of a network for one frame at a time: their weights are arranged once, and an LSTM keeps its state.

With one row, a product takes the time to read its weights, whatever else is done.
"""

import numpy as np

from kernels.compiler import IN, OUT, kernel, tanh
from kernels.products import PANEL, panels, small_product
from kernels.shapes import check
from kernels.threads import get_threads, run, split


@kernel
def _product(x: IN(1), panels: IN(3), bias: IN(1), out: OUT(2)):
    row = out[0]
    for j in range(len(row)):
        row[j] = bias[j]
    small_product(x.ctypes.data, len(x), 1, panels, out, False)


class Affine:
    """x W + b of one row x.

    Args:
        weight: (depth, columns), copied
        bias: (columns,), copied
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray):
        check(weight=(weight, "K N"), bias=(bias, "N"))
        self.depth, self.nb_columns = weight.shape
        (self.panels,) = panels([weight])
        self.bias = np.zeros(len(self.panels) * PANEL, np.float32)
        self.bias[: self.nb_columns] = bias
        self.x = np.zeros(self.panels.shape[1], np.float32)  # as deep as they are filled up to
        self.out = np.empty((1, self.bias.size), np.float32)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Of x (depth,) the result (1, columns), which the next call overwrites."""
        check(x=(x, f"{self.depth}"))
        self.x[: self.depth] = x
        tasks = []
        for start, stop in split(len(self.panels), get_threads()):
            columns = slice(start * PANEL, stop * PANEL)
            tasks.append((_product, self.x, self.panels[start:stop], self.bias[columns], self.out[:, columns]))
        run(tasks)
        return self.out[:, : self.nb_columns]


@kernel
def _cell(gates: IN(2), c: OUT(1), h: OUT(1)):
    size, row, half = len(c), gates[0], np.float32(0.5)
    for j in range(size):  # sigmoid(x) = tanh(x / 2) / 2 + 1 / 2
        i = half + half * tanh(half * row[j])
        f = half + half * tanh(half * row[size + j])
        c[j] = f * c[j] + i * tanh(row[2 * size + j])
    for j in range(size):
        h[j] = (half + half * tanh(half * row[3 * size + j])) * tanh(c[j])


class Lstm:
    """One layer of one direction, gates in the order input, forget, cell, output; its state is zero at first.

    Args:
        weight: (1, 4, size, inputs + size)
        bias: (1, 4, size)
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray):
        check(weight=(weight, "1 4 S K"), bias=(bias, "1 4 S"))
        size = weight.shape[2]
        self.affine = Affine(weight.reshape(4 * size, -1).T, bias.reshape(-1))
        self.row = np.zeros(weight.shape[3], np.float32)  # the input beside the state
        self.x, self.h = self.row[:-size], self.row[-size:]
        self.c = np.zeros(size, np.float32)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The output (size,) for the next x (inputs,), which the next call overwrites."""
        self.x[:] = x
        _cell(self.affine(self.row), self.c, self.h)
        return self.h

    def reset(self) -> None:
        """Back to the state zero."""
        self.row[:], self.c[:] = 0, 0
