"""The fast forms of the graph functions, for the CPU: each a ``PythonFunction`` whose arithmetic is in kernels/.

functions.py has their meaning, their plain forms and what chooses; arguments arrive here checked.

Shapes: T = nb_frames, N = nb_samples, C = nb_channels, F = nb_bins.
"""

from collections.abc import Callable

import nnabla as nn
import nnabla.functions as F
import numpy as np
from nnabla.function import PythonFunction, UnsafeVariable

import kernels.affine
import kernels.correlations
import kernels.lstm
import kernels.normalization
import kernels.products
import kernels.spectra
import kernels.threads
import kernels.training
from utils import UsageError

BN_EPS = 1e-5
BN_DECAY = 0.9
KINDS = {  # the activations that are fused with batch normalisation
    F.identity: kernels.normalization.IDENTITY,
    F.tanh: kernels.normalization.TANH,
    F.relu: kernels.normalization.RELU,
}
Variables = list[UnsafeVariable]  # as NNabla hands them to a PythonFunction


# --------------------------------------------------------------------------- what fast forms share

# A PythonFunction sees the memory of its variables as NumPy arrays: mode "r" to read, "w" where every value is
# overwritten, "rw" to add; always with a dtype, or v.d = float64_array would turn up as float64.


def _read(variable):
    return variable.data.get_data("r", np.float32)


def _write(variable):
    return variable.data.get_data("w", np.float32)


def _gradient(variable, accumulate):
    return variable.grad.get_data("rw" if accumulate else "w", np.float32)


def _store(variable, accumulate, value):
    gradient = _gradient(variable, accumulate)
    if accumulate:
        gradient += value.reshape(gradient.shape)
    else:
        gradient[...] = value.reshape(gradient.shape)


def _rows(array):
    """(T, N, …) as a matrix of T · N rows."""
    return array.reshape(array.shape[0] * array.shape[1], -1)


class _Function(PythonFunction):
    """One output, no dependency of gradients on it; gradients may depend on any input.

    `accum[i]` says whether a gradient is to be added to what is there. `grad_depends_output_data` and
    `grad_depends_input_data` tell the graph which data must outlive the forward pass: what they deny is released
    by ``backward(clear_buffer=True)`` and must not be read there. An exception within setup_impl, forward_impl or
    backward_impl surfaces as a SystemError; so arguments are checked before, where they arrive.
    """

    is_set_up = False

    @property
    def name(self) -> str:
        return type(self).__name__

    def min_outputs(self) -> int:
        return 1

    def output_shape(self, *input_shapes: tuple) -> tuple:
        return input_shapes[0]

    def output_shapes(self, *input_shapes: tuple) -> list[tuple]:
        return [self.output_shape(*input_shapes)]

    def setup_impl(self, inputs: Variables, outputs: Variables) -> None:
        if self.is_set_up:  # a second time only by nnabla.utils.save, whose file nothing could load
            raise UsageError(
                "a graph of our fast functions cannot be saved, as NNabla could not load it: "
                "build it in their plain form, after context.set_plain(True)"
            )
        self.is_set_up = True
        for output, shape in zip(outputs, self.output_shapes(*[v.shape for v in inputs])):
            output.reset_shape(shape, True)

    def grad_depends_output_data(self, i: int, o: int) -> bool:
        return False

    def grad_depends_input_data(self, i: int, j: int) -> bool:
        return True


# ------------------------------------------------------------------------------- audio to spectrogram


class Spectrogram(_Function):
    """Input: audio."""

    def __init__(self, n_fft: int, n_hop: int, center: bool, power: float, mono: bool):
        super().__init__()
        self.n_fft, self.n_hop, self.center, self.power, self.mono = n_fft, n_hop, center, power, mono

    def output_shape(self, x: tuple) -> tuple:
        nb_frames = kernels.spectra.nb_frames(x[2], self.n_fft, self.n_hop, self.center)
        return nb_frames, x[0], 1 if self.mono else x[1], self.n_fft // 2 + 1

    def forward_impl(self, inputs: Variables, outputs: Variables) -> None:
        options = (self.n_fft, self.n_hop, self.center, self.power, self.mono)
        kernels.spectra.spectrogram(_read(inputs[0]), *options, out=_write(outputs[0]))

    def grad_depends_input_data(self, i: int, j: int) -> bool:
        return False

    def backward_impl(self, inputs: Variables, outputs: Variables, propagate_down: list, accum: list) -> None:
        if propagate_down[0]:
            raise NotImplementedError("the fast spectrogram has no gradient towards the audio: use the plain form")


class Waveforms(_Function):
    """Inputs: audio, then magnitudes; outputs: of each magnitude, audio."""

    def __init__(self, nb_targets: int, n_fft: int, n_hop: int):
        super().__init__()
        self.nb_targets, self.options = nb_targets, (n_fft, n_hop)

    def min_outputs(self) -> int:
        return self.nb_targets

    def output_shapes(self, x: tuple, *magnitudes: tuple) -> list[tuple]:
        return [x for _ in magnitudes]

    def forward_impl(self, inputs: Variables, outputs: Variables) -> None:
        x, *magnitudes = (_read(v) for v in inputs)
        kernels.spectra.waveforms(magnitudes, x, *self.options, [_write(v) for v in outputs])

    def grad_depends_input_data(self, i: int, j: int) -> bool:
        return j == 0

    def backward_impl(self, inputs: Variables, outputs: Variables, propagate_down: list, accum: list) -> None:
        dy = [v.grad.get_data("r", np.float32) for v in outputs]
        wanted = [i for i in range(1, len(inputs)) if propagate_down[i]]
        gradients = [_gradient(inputs[i], accum[i]) for i in wanted]
        dy, add = [dy[i - 1] for i in wanted], [accum[i] for i in wanted]
        kernels.spectra.waveforms_backward(dy, _read(inputs[0]), *self.options, gradients, add)
        if propagate_down[0]:
            _store(inputs[0], accum[0], np.zeros(inputs[0].shape, np.float32))


# ------------------------------------------------------------------------------------------- network


class InputAffine(_Function):
    """Inputs: x, W, mean, scale."""

    def output_shape(self, x: tuple, weight: tuple, mean: tuple, scale: tuple) -> tuple:
        return x[0], x[1], weight[1]

    @staticmethod
    def _arrays(inputs):
        x, weight, mean, scale = (_read(v) for v in inputs)
        return x.reshape((-1,) + x.shape[2:]), mean, scale, weight

    def forward_impl(self, inputs: Variables, outputs: Variables) -> None:
        kernels.affine.input_affine(*self._arrays(inputs), _rows(_write(outputs[0])))

    def backward_impl(self, inputs: Variables, outputs: Variables, propagate_down: list, accum: list) -> None:
        dy = _rows(outputs[0].grad.get_data("r", np.float32))
        x, mean, scale, weight = self._arrays(inputs)
        if propagate_down[0]:
            dx = _gradient(inputs[0], accum[0]).reshape(x.shape)
            kernels.affine.input_affine_backward_data(dy, mean, scale, weight, dx, accum[0])
        if any(propagate_down[1:]):
            gradients = kernels.affine.input_affine_backward(x, mean, scale, weight, dy)
            for i, gradient in zip((2, 3, 1), gradients):
                if propagate_down[i]:
                    _store(inputs[i], accum[i], gradient)


class _Normalized(_Function):
    """What batch normalization and mask share: statistics, and the two passes over a (T, N, K) input."""

    def __init__(self, kind: int, test: bool):
        super().__init__()
        self.kind, self.test = kind, test

    def _statistics(self, x, mean, var):
        """Sets mean and 1 / std to normalise with; in training also moves the running statistics."""
        if self.test:
            self.mean, var = _read(mean).ravel(), _read(var).ravel().astype(np.float64)
        else:
            n = len(x)
            total, squares = kernels.normalization.column_sums(x)
            batch_mean = total / n
            var_biased = np.maximum(squares / n - batch_mean**2, 0)
            for running, value in ((mean, batch_mean), (var, var_biased * n / max(n - 1, 1))):
                array = running.data.get_data("rw", np.float32)
                array[...] = BN_DECAY * array + (1 - BN_DECAY) * value.reshape(array.shape)
            self.mean, var = batch_mean.astype(np.float32), var_biased
        self.inverse_std = ((var + BN_EPS) ** -0.5).astype(np.float32)

    def _backward(self, inputs, outputs, other, slope, shift, propagate_down, accum):
        """Writes the gradient of inputs[0]; returns Σ r and Σ r u of `kernels.normalization.normalize_backward`."""
        x = _rows(_read(inputs[0]))
        dy = outputs[0].grad.get_data("r", np.float32).reshape(x.shape)
        dx = None
        if propagate_down[0]:
            dx = np.empty_like(x) if accum[0] else _gradient(inputs[0], False).reshape(x.shape)
        sums = kernels.normalization.normalize_backward(
            x, dy, other, self.mean, slope, shift, self.kind, self.inverse_std, not self.test, dx
        )
        if propagate_down[0] and accum[0]:
            _store(inputs[0], True, dx)
        return sums


class BatchNormalization(_Normalized):
    """Inputs: x, beta, gamma, mean, var."""

    def forward_impl(self, inputs: Variables, outputs: Variables) -> None:
        x, beta, gamma, mean, var = inputs
        x, y = _rows(_read(x)), _rows(_write(outputs[0]))
        self._statistics(x, mean, var)
        slope = _read(gamma).ravel() * self.inverse_std
        kernels.normalization.normalize(x, self.mean, slope, _read(beta).ravel(), self.kind, x, y)

    def grad_depends_output_data(self, i: int, o: int) -> bool:
        return self.kind == kernels.normalization.TANH

    def backward_impl(self, inputs: Variables, outputs: Variables, propagate_down: list, accum: list) -> None:
        beta, gamma = _read(inputs[1]).ravel(), _read(inputs[2]).ravel()
        other = _rows(_read(outputs[0] if self.kind == kernels.normalization.TANH else inputs[0]))
        sums = self._backward(inputs, outputs, other, gamma * self.inverse_std, beta, propagate_down, accum)
        for i in (1, 2):
            if propagate_down[i]:
                _store(inputs[i], accum[i], sums[i - 1])


class Lstm(_Function):
    """Inputs: x of each recording, then per layer a weight, then bias_ih of all layers, then bias_hh of all.

    Outputs: of each recording; of several in test mode only.
    """

    def __init__(self, nb_recordings: int, nb_layers: int, dropout: float, test: bool):
        super().__init__()
        self.nb_recordings, self.nb_layers, self.test = nb_recordings, nb_layers, test
        self.dropout = 0.0 if test or nb_layers == 1 else dropout
        self.stack = kernels.lstm.Lstm()

    def min_outputs(self) -> int:
        return self.nb_recordings

    def output_shapes(self, *shapes: tuple) -> list[tuple]:
        nb_directions, _, size, _ = shapes[self.nb_recordings]
        return [(*x[:2], nb_directions * size) for x in shapes[: self.nb_recordings]]

    def _arrays(self, inputs):
        """Of all recordings x, the weights and the biases."""
        m, n = self.nb_recordings, self.nb_layers
        weights = [_read(v) for v in inputs[m : m + n]]
        biases = [_read(ih) + _read(hh) for ih, hh in zip(inputs[m + n : m + 2 * n], inputs[m + 2 * n :])]
        return [_read(v) for v in inputs[:m]], weights, biases

    def forward_impl(self, inputs: Variables, outputs: Variables) -> None:
        seed = nn.random.prng.randint(2**32, dtype=np.uint32) if self.dropout else 0
        (x, *others), *parameters = self._arrays(inputs)
        out = _write(outputs[0])
        if not others:
            self.stack.forward(x, *parameters, self.dropout, seed, out, keep=not self.test)
            return
        shapes = [v.shape[:2] for v in outputs]
        x = np.concatenate([_rows(one) for one in (x, *others)])[:, None]
        out = np.empty((len(x), 1, out.shape[2]), np.float32)
        self.stack.forward(x, *parameters, 0.0, 0, out, False, shapes)
        for y, part in zip(outputs, np.split(out, np.cumsum([nb_frames * n for nb_frames, n in shapes[:-1]]))):
            _write(y)[...] = part.reshape(y.shape)

    def grad_depends_output_data(self, i: int, o: int) -> bool:
        return True

    def backward_impl(self, inputs: Variables, outputs: Variables, propagate_down: list, accum: list) -> None:
        m, n = self.nb_recordings, self.nb_layers
        recordings, weights, biases = self._arrays(inputs)
        accum = list(accum)
        for k, (x, y) in enumerate(zip(recordings, outputs)):
            if self.test:  # then forward keeps nothing, because a backward pass is rare: go again
                self.stack.forward(x, weights, biases, 0.0, 0, np.empty(y.shape, np.float32), keep=True)
            wanted = [k, *range(m, m + n)]
            targets = [_gradient(inputs[i], accum[i]) if propagate_down[i] else None for i in wanted]
            dy = y.grad.get_data("r", np.float32)
            dbiases = self.stack.backward(x, weights, dy, targets[0], targets[1:], [accum[i] for i in wanted])
            for i in range(m + n, m + 3 * n):
                if propagate_down[i]:
                    _store(inputs[i], accum[i], dbiases[(i - m) % n])
            accum[m:] = [True] * (3 * n)  # the other recordings add to it


class Affine(_Function):
    """Inputs: x₁ … xₙ, W; the rows of W are spread over the xᵢ in turn."""

    def output_shape(self, x: tuple, *others: tuple) -> tuple:
        return x[0], x[1], others[-1][1]

    @staticmethod
    def _slices(inputs):
        bounds = np.cumsum([0] + [x.shape[2] for x in inputs[:-1]])
        return [slice(*pair) for pair in zip(bounds, bounds[1:])]

    def forward_impl(self, inputs: Variables, outputs: Variables) -> None:
        weight, y = _read(inputs[-1]), _rows(_write(outputs[0]))
        for i, part in enumerate(self._slices(inputs)):
            kernels.products.matmul(_rows(_read(inputs[i])), weight[part], y, accumulate=i > 0)

    def backward_impl(self, inputs: Variables, outputs: Variables, propagate_down: list, accum: list) -> None:
        weight, dy = _read(inputs[-1]), _rows(outputs[0].grad.get_data("r", np.float32))
        dw = _gradient(inputs[-1], accum[-1]) if propagate_down[-1] else None
        tasks = []
        for i, part in enumerate(self._slices(inputs)):
            if propagate_down[i]:
                tasks += kernels.products.products(dy, weight[part].T, _rows(_gradient(inputs[i], accum[i])), accum[i])
            if dw is not None:
                tasks += kernels.products.products(_rows(_read(inputs[i])).T, dy, dw[part], accum[-1])
        kernels.threads.run(tasks)


class Mask(_Normalized):
    """Inputs: z, beta, gamma, mean, var, scale, bias, mixture.

    scale · (gamma u + beta) + bias is a normalisation of its own, with slope scale · gamma / std and shift
    scale · beta + bias; its sums S₀ = Σ r, S₁ = Σ r u give all gradients.
    """

    def __init__(self, test: bool):
        super().__init__(kernels.normalization.MASK, test)

    def output_shape(self, *shapes: tuple) -> tuple:
        return shapes[-1]

    def _parameters(self, inputs):
        beta, gamma = (_read(v).ravel() for v in inputs[1:3])
        nb_channels = inputs[7].shape[2]
        scale, bias = (np.tile(_read(v), nb_channels) for v in inputs[5:7])
        return beta, gamma, scale, scale * gamma * self.inverse_std, scale * beta + bias

    def forward_impl(self, inputs: Variables, outputs: Variables) -> None:
        z, mixture, y = _rows(_read(inputs[0])), _rows(_read(inputs[7])), _rows(_write(outputs[0]))
        self._statistics(z, *inputs[3:5])
        _, _, _, slope, shift = self._parameters(inputs)
        kernels.normalization.normalize(z, self.mean, slope, shift, self.kind, mixture, y)

    def backward_impl(self, inputs: Variables, outputs: Variables, propagate_down: list, accum: list) -> None:
        beta, gamma, scale, slope, shift = self._parameters(inputs)
        mixture = _rows(_read(inputs[7]))
        s0, s1 = self._backward(inputs, outputs, mixture, slope, shift, propagate_down, accum)
        per_bin = (inputs[7].shape[2], inputs[7].shape[3])
        gradients = {
            1: scale * s0,
            2: scale * s1,
            5: (gamma * s1 + beta * s0).reshape(per_bin).sum(0),
            6: s0.reshape(per_bin).sum(0),
            7: np.float32(0),  # like in the reference, none to the mixture from here
        }
        for i, gradient in gradients.items():
            if propagate_down[i]:
                _store(inputs[i], accum[i], np.broadcast_to(gradient, inputs[i].shape) if i == 7 else gradient)


class SquaredError(_Function):
    """Inputs: y_hat, y."""

    def output_shape(self, *shapes: tuple) -> tuple:
        return ()

    def forward_impl(self, inputs: Variables, outputs: Variables) -> None:
        _write(outputs[0])[...] = kernels.training.squared_error(_read(inputs[0]).ravel(), _read(inputs[1]).ravel())

    def backward_impl(self, inputs: Variables, outputs: Variables, propagate_down: list, accum: list) -> None:
        a, b = (_read(v).ravel() for v in inputs)
        factor = 2 * float(outputs[0].grad.get_data("r", np.float32)) / len(a)
        for i, sign in enumerate((1, -1)):
            if propagate_down[i]:
                kernels.training.difference(a, b, sign * factor, _gradient(inputs[i], accum[i]).reshape(-1), accum[i])


class _Correlated(_Function):
    """A loss that is a function of inner products, and its gradient towards inputs first … last; 0 towards others.

    `loss` maps `kernels.correlations.gram` of the inputs, in samples start … stop, to both.
    """

    def __init__(self, loss: Callable, first: int, last: int, start: int, stop: int):
        super().__init__()
        self.loss, self.estimates, self.samples = loss, range(first, last), (start, stop)

    def output_shape(self, *shapes: tuple) -> tuple:
        return ()

    def forward_impl(self, inputs: Variables, outputs: Variables) -> None:
        products = kernels.correlations.gram([_read(v) for v in inputs], *self.samples)
        _write(outputs[0])[...], self.weights = self.loss(products)

    def backward_impl(self, inputs: Variables, outputs: Variables, propagate_down: list, accum: list) -> None:
        wanted = [i for i in self.estimates if propagate_down[i]]
        weights = self.weights[:, :, [i - self.estimates.start for i in wanted]]
        weights = weights * outputs[0].grad.get_data("r", np.float32)
        gradients, add = [_gradient(inputs[i], accum[i]) for i in wanted], [accum[i] for i in wanted]
        kernels.correlations.mix(weights, [_read(v) for v in inputs], *self.samples, gradients, add)
        for i, variable in enumerate(inputs):
            if propagate_down[i] and i not in self.estimates:
                _store(variable, accum[i], np.zeros(variable.shape, np.float32))


def negative_sdr(y_hat: nn.Variable, y: nn.Variable, start: int, stop: int, eps: float) -> nn.Variable:
    def loss(products):
        return kernels.correlations.sdr(products, stop - start, eps)

    return _Correlated(loss, 0, 1, start, stop)(y_hat, y)


def weighted_sdr(
    x: nn.Variable, estimates: list[nn.Variable], targets: list[nn.Variable], sets: np.ndarray, start: int, stop: int
) -> nn.Variable:
    def loss(products):
        return kernels.correlations.weighted_sdr(products, sets)

    return _Correlated(loss, 1, 1 + len(estimates), start, stop)(x, *estimates, *targets)
