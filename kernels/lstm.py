"""Stacked bidirectional LSTM, forward and backward pass."""

import itertools
from typing import Optional

import numpy as np

from kernels.compiler import IN, INT, INTS, OUT, SUMS, inline, kernel, tanh
from kernels.parts import give, progress, shared, take
from kernels.products import PANEL, matmul, panels, products, small_product
from kernels.shapes import check
from kernels.threads import get_threads, run, split
from kernels.training import dropout

# A core keeps about this much, in bytes, of what it reads in every frame. Larger recurrent weights of a direction are
# cut into parts, each of some units with all their gates, one for each thread: where samples are few. With more of them
# a product takes longer than to read the weights, and threads would only wait for each other.
CACHE = 2**20
FEW = 2


@inline
def _quarters(row):
    """The gates i, f, g, o in a row of them."""
    size = len(row) // 4
    return row[:size], row[size : 2 * size], row[2 * size : 3 * size], row[3 * size :]


@inline
def _own(row, begin, end):
    """The gates of some units."""
    i, f, g, o = _quarters(row)
    return i[begin:end], f[begin:end], g[begin:end], o[begin:end]


@inline
def _units(part, units, size):
    """(first, last) of a part."""
    return part * units, min(size, (part + 1) * units)


@kernel
def _lstm_forward(
    gates: OUT(3), bias: IN(2), panels: IN(4), c: OUT(3), h: OUT(3), samples: INTS, d: INT, first: INT, last: INT,
    units: INT, states: OUT(3), progress: INTS, own: INT, most: INT,
):  # fmt: skip
    """Whether all frames are done; states: h after frames 1, 3, … and 0, 2, …, then c."""
    size, rows = h.shape[2], last - first
    nb_steps = samples[first, 2] if rows > 0 else 0
    z = np.empty((rows, panels.shape[1] * PANEL), np.float32)
    places = np.empty(rows, np.intp)
    for _ in range(most):
        step, part = take(progress, own, nb_steps)
        if part < 0:
            return step == nb_steps
        begin_unit, end_unit = _units(part, units, size)
        n = end_unit - begin_unit
        while samples[first + rows - 1, 2] <= step:  # who has no such frame: the longest come first
            rows -= 1
        for r in range(rows):
            begin, stride, nb_frames = samples[first + r, 0], samples[first + r, 1], samples[first + r, 2]
            places[r] = begin + stride * (nb_frames - 1 - step if d else step)
            z[r, 4 * n :] = 0
            for k in range(4):
                row, b = gates[places[r], d, k * size + begin_unit :], bias[d, k * size + begin_unit :]
                preset = z[r, k * n : (k + 1) * n]
                for j in range(len(preset)):
                    preset[j] = row[j] + b[j]
        if step > 0:
            back = step % 2 == 1
            small_product(states[step % 2].ctypes.data, states.shape[2], rows, panels[part], z, back)
        for r in range(rows):
            for k in range(4):  # sigmoid(x) = tanh(x / 2) / 2 + 1 / 2
                row, preset = gates[places[r], d, k * size + begin_unit :], z[r, k * n : (k + 1) * n]
                scale = np.float32(1 if k == 2 else 0.5)
                for j in range(len(preset)):
                    row[j] = (np.float32(1) - scale) + scale * tanh(scale * preset[j])
            i, f, g, o = _own(gates[places[r], d], begin_unit, end_unit)
            h_now, c_now = states[(step + 1) % 2, r, begin_unit:end_unit], states[2, r, begin_unit:end_unit]
            for j in range(n):
                c_now[j] = f[j] * c_now[j] + i[j] * g[j]
            for j in range(n):
                h_now[j] = o[j] * tanh(c_now[j])
            c_kept, h_kept = c[places[r], d, begin_unit:end_unit], h[places[r], d, begin_unit:end_unit]
            for j in range(n):
                c_kept[j], h_kept[j] = c_now[j], h_now[j]
        give(progress)
    return False


@kernel
def _lstm_backward(
    gates: OUT(4), panels: IN(4), c: IN(4), dy: IN(4), d: INT, first: INT, last: INT, sums: SUMS,
    group: INT, units: INT, dc_states: OUT(2), progress: INTS, own: INT, most: INT,
):  # fmt: skip
    """Whether all frames are done; sums[group] (4 · size): of the gates' gradients."""
    nb_frames, _, nb_directions, size = dy.shape
    rows = last - first
    dh = np.zeros((rows, panels.shape[1] * PANEL), np.float32)
    zeros, one = np.zeros(size, np.float32), np.float32(1)
    for _ in range(most):
        step, part = take(progress, own, nb_frames)
        if part < 0:
            return step == nb_frames
        begin_unit, end_unit = _units(part, units, size)
        n = end_unit - begin_unit
        t = step if d else nb_frames - 1 - step
        before, after = (t + 1, t - 1) if d else (t - 1, t + 1)
        for r in range(rows):
            source, target = dy[t, first + r, d, begin_unit:end_unit], dh[r]
            for j in range(n):
                target[j] = source[j]
        if step > 0:
            small_product(
                gates[after, first, d].ctypes.data, gates.strides[1] // 4, rows, panels[part], dh, step % 2 == 1
            )
        for r in range(rows):
            i, f, g, o = _own(gates[t, first + r, d], begin_unit, end_unit)  # each becomes its gradient
            c_before = (c[before, first + r, d] if step < nb_frames - 1 else zeros)[begin_unit:end_unit]
            c_now = c[t, first + r, d, begin_unit:end_unit]
            dh_now, dc_now = dh[r, :n], dc_states[r, begin_unit:end_unit]
            for j in range(n):  # h = o tanh(c)
                tanh_c = tanh(c_now[j])
                dc_now[j] += dh_now[j] * o[j] * (one - tanh_c * tanh_c)
                o[j] = dh_now[j] * tanh_c * o[j] * (one - o[j])
            for j in range(n):  # c = f c_before + i g
                di = dc_now[j] * g[j] * i[j] * (one - i[j])
                g[j] = dc_now[j] * i[j] * (one - g[j] * g[j])
                i[j] = di
            for j in range(n):
                dc_before = dc_now[j] * f[j]
                f[j] = dc_before * c_before[j] * (one - f[j])
                dc_now[j] = dc_before
            for k in range(4):
                total, row = sums[group, k * size + begin_unit :], gates[t, first + r, d, k * size + begin_unit :]
                for j in range(n):
                    total[j] += row[j]
        give(progress)
    return False


def _cut(nb_directions, nb_samples, size, multiple):
    """(units of each part, first and last sample of each group): samples do not depend on each other."""
    nb_threads, needed = get_threads(), -(-16 * size * size // CACHE)
    shares = needed > 1 and nb_samples <= FEW
    nb_parts = min(nb_threads, max(needed, nb_threads // nb_directions)) if shares else 1
    units = multiple * -(-size // (multiple * nb_parts))
    return units, split(nb_samples, -(-nb_threads // (nb_directions * nb_parts)))


def _parts(weight, units):
    """Of weights (D, depth, …, size), per direction the panels of each part (parts, nb_panels, depth, PANEL)."""
    nb_directions, size = len(weight), weight.shape[-1]
    found = panels([w[..., u : u + units] for w in weight for u in range(0, size, units)])
    return found.reshape(nb_directions, -1, *found.shape[1:])


def _samples(shapes):
    """Of each sample of all recordings, the longest first: its first row, the rows to its next frame, its frames."""
    samples, begin = [], 0
    for nb_frames, nb_samples in shapes:
        samples += [(begin + n, nb_samples, nb_frames) for n in range(nb_samples)]
        begin += nb_frames * nb_samples
    samples.sort(key=lambda sample: -sample[2])
    return np.array(samples, np.intp).reshape(-1, 3)


def lstm_layer(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    gates: np.ndarray,
    c: np.ndarray,
    h: np.ndarray,
    shapes: Optional[list[tuple[int, int]]] = None,
) -> None:
    """One LSTM layer, initial states zero, gates in the order input, forget, cell, output.

    Of several recordings, each is a sequence of its own; the recurrent weights, which are read in every frame, are read
    once for all that have such a frame.

    Args:
        x: (T, N, I); of several recordings, their rows one after another, T · N in all
        shapes: (T, N) of each of the recordings; None: there is one
        weight: (D, 4, size, I + size), bias: (D, 4, size)
        gates: (T, N, D, 4 · size), written: the gates behind their sigmoid and tanh
        c, h: (T, N, D, size), written: cell and output
    """
    check(
        x=(x, "T N I"),
        weight=(weight, "D 4 S I+S"),
        bias=(bias, "D 4 S"),
        gates=(gates, "T N D 4*S"),
        c=(c, "T N D S"),
        h=(h, "T N D S"),
    )
    nb_directions, size, nb_inputs = weight.shape[0], weight.shape[2], x.shape[2]
    nb_rows = x.shape[0] * x.shape[1]
    shapes = [x.shape[:2]] if shapes is None else shapes
    if sum(nb_frames * nb_samples for nb_frames, nb_samples in shapes) != nb_rows or np.min(shapes, initial=0) < 0:
        raise ValueError(f"{nb_rows} rows are not those of recordings of shapes {shapes}")
    inputs = weight.reshape(-1, nb_inputs + size)[:, :nb_inputs].T  # towards all gates of both directions at once
    matmul(x.reshape(nb_rows, -1), inputs, gates.reshape(nb_rows, -1))
    bias = bias.reshape(nb_directions, -1)
    gates, c, h = (array.reshape(nb_rows, nb_directions, -1) for array in (gates, c, h))
    samples = _samples(shapes)
    units, groups = _cut(nb_directions, len(samples), size, PANEL // 4)
    recurrent = _parts(weight[:, :, :, nb_inputs:].transpose(0, 3, 1, 2), units)
    jobs = []
    for (d, w), (first, last) in itertools.product(enumerate(recurrent), groups):
        states, done = np.zeros((3, last - first, w.shape[2]), np.float32), progress(len(w))
        jobs.append((gates, bias, w, c, h, samples, d, first, last, units, states, done))
    run(shared(_lstm_forward, jobs, recurrent.shape[1]))


def lstm_layer_backward(
    x: np.ndarray,
    weight: np.ndarray,
    gates: np.ndarray,
    c: np.ndarray,
    h: np.ndarray,
    dy: np.ndarray,
    dx: Optional[np.ndarray],
    dweight: Optional[np.ndarray],
    accumulate: tuple[bool, bool] = (False, False),
) -> np.ndarray:
    """Gradients of `lstm_layer`; the gates are overwritten with their own.

    Args:
        dy: (T, N, D, size)
        dx: like x, or None
        dweight: like weight, or None
        accumulate: whether to add to dx, to dweight
    Returns:
        dbias (D, 4, size)
    """
    check(
        x=(x, "T N I"),
        weight=(weight, "D 4 S I+S"),
        gates=(gates, "T N D 4*S"),
        c=(c, "T N D S"),
        h=(h, "T N D S"),
        dy=(dy, "T N D S"),
        **({} if dx is None else {"dx": (dx, "T N I")}),
        **({} if dweight is None else {"dweight": (dweight, "D 4 S I+S")}),
    )
    nb_directions, size, nb_inputs = weight.shape[0], weight.shape[2], x.shape[2]
    nb_samples, nb_rows = x.shape[1], x.shape[0] * x.shape[1]
    units, groups = _cut(nb_directions, nb_samples, size, PANEL)
    recurrent = _parts(weight.reshape(nb_directions, 4 * size, -1)[:, :, nb_inputs:], units)
    sums = np.zeros((nb_directions, len(groups), 4 * size))  # of the gates' gradients, over a group's frames
    jobs = []
    for (d, w), (k, (first, last)) in itertools.product(enumerate(recurrent), enumerate(groups)):
        dc, done = np.zeros((last - first, size), np.float32), progress(len(w))
        jobs.append((gates, w, c, dy, d, first, last, sums[d], k, units, dc, done))
    run(shared(_lstm_backward, jobs, recurrent.shape[1]))

    flat, x, d_gates = weight.reshape(nb_directions * 4 * size, -1), x.reshape(nb_rows, -1), gates.reshape(nb_rows, -1)
    tasks = []
    if dx is not None:
        tasks += products(d_gates, flat[:, :nb_inputs], dx.reshape(nb_rows, -1), accumulate[0])
    if dweight is not None:
        d_flat = dweight.reshape(nb_directions * 4 * size, -1)
        tasks += products(d_gates.T, x, d_flat[:, :nb_inputs], accumulate[1])
        h = h.reshape(nb_rows, -1)
        for d in range(nb_directions):
            # frame t reads the h of frame t − 1, or of t + 1 in the reverse direction
            reader, read = (slice(0, -nb_samples), slice(nb_samples, None))[:: 1 if d else -1]
            own = slice(4 * size * d, 4 * size * (d + 1))
            if nb_rows > nb_samples:
                tasks += products(
                    d_gates[reader, own].T, h[read, size * d : size * (d + 1)], d_flat[own, nb_inputs:], accumulate[1]
                )
            elif not accumulate[1]:
                d_flat[own, nb_inputs:] = 0
    run(tasks)
    return sums.sum(1).reshape(nb_directions, 4, size).astype(np.float32)


class Lstm:
    """Stacked LSTM with dropout between the layers, and the memory of what the backward pass needs."""

    def __init__(self):
        self.layers = []
        self.buffers = {}

    def _buffer(self, name, shape):
        """An array that is kept from step to step: memory fresh from the system costs a tenth of the time."""
        if name not in self.buffers or self.buffers[name].shape != shape:
            self.buffers[name] = np.empty(shape, np.float32)
        return self.buffers[name]

    def _input(self, h, layer):
        """The input of a layer > 0: the output of the one below, (T, N, D, size), with dropout."""
        h = h.reshape(h.shape[:2] + (-1,))
        if self.p == 0:
            return h
        out = self._buffer("input", h.shape)
        dropout(h.reshape(-1), self.p, self.seed, layer, out.reshape(-1))
        return out

    def forward(
        self,
        x: np.ndarray,
        weights: list,
        biases: list,
        p: float,
        seed: int,
        out: np.ndarray,
        keep: bool,
        shapes: Optional[list[tuple[int, int]]] = None,
    ):
        """Args:
        x: (T, N, I)
        weights: per layer (D, 4, size, inputs + size)
        biases: per layer (D, 4, size)
        p, seed: probability of dropout, 0 for none, and its 32 bits
        out: (T, N, D · size), written
        keep: what `backward` needs; without, memory does not grow with the number of layers
        shapes: see `lstm_layer`; `backward` knows nothing of them
        """
        self.p, self.seed = p, seed
        self.layers = []
        nb_directions, _, size, _ = weights[0].shape
        shape = x.shape[:2] + (nb_directions,)
        below = x
        for k, (weight, bias) in enumerate(zip(weights, biases)):
            last = k == len(weights) - 1
            slot = k if keep else 0
            gates = self._buffer(("gates", slot), shape + (4 * size,))
            c = self._buffer(("c", slot), shape + (size,))
            h = out.reshape(c.shape) if last else self._buffer(("h", k if keep else k % 2), c.shape)
            lstm_layer(below, weight, bias, gates, c, h, shapes)
            self.layers.append((gates, c, h))
            if not last:
                below = self._input(h, k + 1)
        if not keep:
            self.layers, self.buffers = [], {}

    def backward(
        self, x: np.ndarray, weights: list, dy: np.ndarray, dx: Optional[np.ndarray], dweights: list, accumulate: list
    ) -> list:
        """Gradients, into dx and dweights (None: not wanted); `forward` comes first each time.

        Args:
            dy: (T, N, D · size)
            accumulate: whether to add to dx, then to each of dweights
        Returns:
            gradients of the biases
        """
        dbiases = []
        for k in reversed(range(len(weights))):
            gates, c, h = self.layers.pop()
            if k == 0:
                below, d_below, add = x, dx, accumulate[0]
            else:
                below, add = self._input(self.layers[-1][2], k), False
                d_below = self._buffer(("d_below", k % 2), below.shape)
            options = (add, accumulate[1 + k])
            dy = dy.reshape(c.shape)
            dbiases.append(lstm_layer_backward(below, weights[k], gates, c, h, dy, d_below, dweights[k], options))
            if k > 0 and self.p > 0:
                dropout(d_below.reshape(-1), self.p, self.seed, k, d_below.reshape(-1))
            dy = d_below
        return dbiases[::-1]
