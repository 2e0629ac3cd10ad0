"""The graph functions that the model is built from, each in two forms with the same meaning.

The plain form is made of native NNabla functions and runs in any context. The fast form, for the CPU, is a
``PythonFunction`` above it, whose arithmetic is in kernels.py. `utils.fast` chooses.

Parametric functions (`input_affine`, `batch_normalization`, `lstm`, `affine`, `mask`) register their
parameters in the current ``nn.parameter_scope`` under `name`, like those of
``nnabla.parametric_functions``; initial values are those of the torch reference (openunmix 1.3.0).

Shapes: T = nb_frames, N = nb_samples, C = nb_channels, F = nb_bins.
"""

import nnabla as nn
import nnabla.functions as F
import numpy as np
from nnabla.function import PythonFunction
from nnabla.initializer import ConstantInitializer, UniformInitializer
from nnabla.parameter import get_parameter_or_create

import kernels
import utils

BN_EPS = 1e-5
BN_DECAY = 0.9


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

    @property
    def name(self):
        return type(self).__name__

    def min_outputs(self):
        return 1

    def output_shape(self, *input_shapes):
        return input_shapes[0]

    def setup_impl(self, inputs, outputs):
        outputs[0].reset_shape(self.output_shape(*[v.shape for v in inputs]), True)

    def grad_depends_output_data(self, i, o):
        return False

    def grad_depends_input_data(self, i, j):
        return True


# ------------------------------------------------------------------------------- audio to spectrogram


def stft(x, n_fft, n_hop, center):
    """Short-time Fourier transform: periodic Hann window, no normalisation.

    Args:
        x: audio (N, C, nb_timesteps)
        n_fft, n_hop: window and hop in samples
        center: pad n_fft // 2 samples by reflection on both sides
    Returns:
        real, imaginary: (N, C, F, T)
    Raises:
        ValueError: the audio is too short for a frame, or for the reflection.
    """
    nb_samples, nb_channels, nb_timesteps = x.shape
    kernels.nb_frames(nb_timesteps, n_fft, n_hop, center)  # raises
    packed = F.reshape(x, (nb_samples * nb_channels, nb_timesteps), inplace=False)
    real, imag = F.stft(packed, n_fft, n_hop, n_fft, window_type="hanning", center=center, pad_mode="reflect")
    shape = (nb_samples, nb_channels) + real.shape[1:]
    return F.reshape(real, shape), F.reshape(imag, shape)


def magnitude(real, imag, power, mono):
    """(real² + imag²)^(power/2) in the network's layout, averaged over channels if mono.

    Args:
        real, imag: (N, C, F, T)
    Returns:
        (T, N, 1 if mono else C, F)
    """
    spectrogram = F.pow_scalar(real**2 + imag**2, power / 2)
    if mono:
        spectrogram = F.mean(spectrogram, axis=1, keepdims=True)
    return F.transpose(spectrogram, (3, 0, 1, 2))


class _Spectrogram(_Function):
    def __init__(self, n_fft, n_hop, center, power, mono):
        super().__init__()
        self.n_fft, self.n_hop, self.center, self.power, self.mono = n_fft, n_hop, center, power, mono

    def output_shape(self, x):
        nb_frames = kernels.nb_frames(x[2], self.n_fft, self.n_hop, self.center)
        return nb_frames, x[0], 1 if self.mono else x[1], self.n_fft // 2 + 1

    def forward_impl(self, inputs, outputs):
        options = (self.n_fft, self.n_hop, self.center, self.power, self.mono)
        kernels.spectrogram(_read(inputs[0]), *options, out=_write(outputs[0]))

    def grad_depends_input_data(self, i, j):
        return False

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        if propagate_down[0]:
            raise NotImplementedError("the fast spectrogram has no gradient towards the audio: use the plain form")


def spectrogram(x, n_fft, n_hop, center=False, power=1, mono=False):
    """Audio (N, C, nb_timesteps) to its magnitude (T, N, 1 if mono else C, F), as `magnitude` of `stft`."""
    kernels.nb_frames(x.shape[2], n_fft, n_hop, center)
    if utils.fast() and not x.need_grad:  # the fast form has no gradient
        return _Spectrogram(n_fft, n_hop, center, power, mono)(x)
    return magnitude(*stft(x, n_fft, n_hop, center), power, mono)


# ------------------------------------------------------------------------------------------- network


def _uniform(fan_in):
    """torch's initial values of linear layers and LSTMs."""
    return UniformInitializer((-(fan_in**-0.5), fan_in**-0.5))


def _bn_parameters(nb_features):
    shape = (1, 1, nb_features)
    beta = get_parameter_or_create("bn/beta", shape, ConstantInitializer(0))
    gamma = get_parameter_or_create("bn/gamma", shape, ConstantInitializer(1))
    mean = get_parameter_or_create("bn/mean", shape, ConstantInitializer(0), need_grad=False)
    var = get_parameter_or_create("bn/var", shape, ConstantInitializer(1), need_grad=False)
    return beta, gamma, mean, var


class _InputAffine(_Function):
    def output_shape(self, x, weight, mean, scale):
        return x[0], x[1], weight[1]

    @staticmethod
    def _arrays(inputs):
        x, weight, mean, scale = (_read(v) for v in inputs)
        return x.reshape((-1,) + x.shape[2:]), mean, scale, weight

    def forward_impl(self, inputs, outputs):
        kernels.input_affine(*self._arrays(inputs), _rows(_write(outputs[0])))

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        dy = _rows(outputs[0].grad.get_data("r", np.float32))
        x, mean, scale, weight = self._arrays(inputs)
        if propagate_down[0]:
            dx = _gradient(inputs[0], accum[0]).reshape(x.shape)
            kernels.input_affine_backward_data(dy, mean, scale, weight, dx, accum[0])
        if any(propagate_down[1:]):
            gradients = kernels.input_affine_backward(x, mean, scale, weight, dy)
            for i, gradient in zip((2, 3, 1), gradients):
                if propagate_down[i]:
                    _store(inputs[i], accum[i], gradient)


def input_affine(x, n_outmaps, mean, scale, name):
    """((x + mean) · scale) W, over the first bins only: as many as `mean` has.

    Args:
        x: spectrogram (T, N, C, F)
        mean, scale: variables (max_bin,)
    Returns:
        (T, N, n_outmaps)
    Parameters:
        affine/W (C · max_bin, n_outmaps), no bias
    """
    max_bin = mean.shape[0]
    fan_in = x.shape[2] * max_bin
    with nn.parameter_scope(name):
        W = get_parameter_or_create("affine/W", (fan_in, n_outmaps), _uniform(fan_in))
    if utils.fast():
        return _InputAffine()(x, W, mean, scale)
    h = F.slice(x, stop=x.shape[:3] + (max_bin,))
    h = (h + F.reshape(mean, (1, 1, 1, -1))) * F.reshape(scale, (1, 1, 1, -1))
    return F.affine(F.reshape(h, x.shape[:2] + (fan_in,)), W, base_axis=2)


class _Normalized(_Function):
    """What batch normalization and mask share: statistics, and the two passes over a (T, N, K) input."""

    def __init__(self, kind, test):
        super().__init__()
        self.kind, self.test = kind, test

    def statistics(self, x, mean, var):
        """Center and 1 / std to normalise with; in training also moves the running statistics."""
        if self.test:
            self.center, var = _read(mean).ravel(), _read(var).ravel().astype(np.float64)
        else:
            n = len(x)
            total, squares = kernels.column_sums(x)
            center = total / n
            var_biased = np.maximum(squares / n - center**2, 0)
            for running, value in ((mean, center), (var, var_biased * n / max(n - 1, 1))):
                array = running.data.get_data("rw", np.float32)
                array[...] = BN_DECAY * array + (1 - BN_DECAY) * value.reshape(array.shape)
            self.center, var = center.astype(np.float32), var_biased
        self.inverse_std = ((var + BN_EPS) ** -0.5).astype(np.float32)

    def backward(self, inputs, outputs, other, slope, shift, propagate_down, accum):
        """Writes the gradient of inputs[0]; returns Σ r and Σ r u of `kernels.normalize_backward`."""
        x = _rows(_read(inputs[0]))
        dy = outputs[0].grad.get_data("r", np.float32).reshape(x.shape)
        dx = None
        if propagate_down[0]:
            dx = np.empty_like(x) if accum[0] else _gradient(inputs[0], False).reshape(x.shape)
        sums = kernels.normalize_backward(
            x, dy, other, self.center, slope, shift, self.kind, self.inverse_std, not self.test, dx
        )
        if propagate_down[0] and accum[0]:
            _store(inputs[0], True, dx)
        return sums


class _BatchNormalization(_Normalized):
    def forward_impl(self, inputs, outputs):
        x, beta, gamma, mean, var = inputs
        x, y = _rows(_read(x)), _rows(_write(outputs[0]))
        self.statistics(x, mean, var)
        slope = _read(gamma).ravel() * self.inverse_std
        kernels.normalize(x, self.center, slope, _read(beta).ravel(), self.kind, x, y)

    def grad_depends_output_data(self, i, o):
        return self.kind == kernels.TANH

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        beta, gamma = _read(inputs[1]).ravel(), _read(inputs[2]).ravel()
        other = _rows(_read(outputs[0] if self.kind == kernels.TANH else inputs[0]))
        sums = self.backward(inputs, outputs, other, gamma * self.inverse_std, beta, propagate_down, accum)
        for i in (1, 2):
            if propagate_down[i]:
                _store(inputs[i], accum[i], sums[i - 1])


_KINDS = {F.identity: kernels.IDENTITY, F.tanh: kernels.TANH, F.relu: kernels.RELU}


def batch_normalization(x, activation, test, name):
    """Batch normalisation over frames and samples, then the activation.

    Args:
        x: (T, N, features)
        activation: a function of one variable, such as nnabla's F.tanh
        test: use the running statistics rather than the batch's
    Parameters:
        bn/beta, bn/gamma, bn/mean, bn/var (1, 1, features)
    """
    with nn.parameter_scope(name):
        beta, gamma, mean, var = _bn_parameters(x.shape[2])
    if utils.fast() and activation in _KINDS:
        return _BatchNormalization(_KINDS[activation], test)(x, beta, gamma, mean, var)
    h = F.batch_normalization(x, beta, gamma, mean, var, [2], BN_DECAY, BN_EPS, batch_stat=not test)
    return activation(h)


class _Lstm(_Function):
    """Inputs: x, then per layer a weight, then bias_ih of all layers, then bias_hh of all."""

    def __init__(self, nb_layers, dropout, test):
        super().__init__()
        self.nb_layers, self.test = nb_layers, test
        self.dropout = 0.0 if test or nb_layers == 1 else dropout
        self.stack = kernels.Lstm()

    def output_shape(self, x, weight, *others):
        return x[0], x[1], weight[0] * weight[2]

    def _arrays(self, inputs):
        n = self.nb_layers
        weights = [_read(v) for v in inputs[1 : 1 + n]]
        biases = [_read(ih) + _read(hh) for ih, hh in zip(inputs[1 + n : 1 + 2 * n], inputs[1 + 2 * n :])]
        return _read(inputs[0]), weights, biases

    def forward_impl(self, inputs, outputs):
        seed = nn.random.prng.randint(2**32, dtype=np.uint32) if self.dropout else 0
        self.stack.forward(*self._arrays(inputs), self.dropout, seed, _write(outputs[0]), keep=not self.test)

    def grad_depends_output_data(self, i, o):
        return True

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        n = self.nb_layers
        x, weights, biases = self._arrays(inputs)
        if self.test:  # then forward keeps nothing, because there is seldom a way back: go again
            self.stack.forward(x, weights, biases, 0.0, 0, np.empty(outputs[0].shape, np.float32), keep=True)
        targets = [_gradient(v, accum[i]) if propagate_down[i] else None for i, v in enumerate(inputs[: 1 + n])]
        dy = outputs[0].grad.get_data("r", np.float32)
        dbiases = self.stack.backward(x, weights, dy, targets[0], targets[1:], accum)
        for i in range(1 + n, 1 + 3 * n):
            if propagate_down[i]:
                _store(inputs[i], accum[i], dbiases[(i - 1) % n])


def lstm(x, hidden_size, nb_layers, bidirectional, dropout, test, name):
    """Stacked LSTM with dropout between its layers (not after the last).

    Args:
        x: (T, N, features)
        hidden_size: units per direction
    Returns:
        (T, N, hidden_size · directions)
    Parameters, of layer k: weight_l{k} (directions, 4, hidden_size, inputs + hidden_size) with gates in
        the order input, forget, cell, output; bias_ih_l{k}, bias_hh_l{k} (directions, 4, hidden_size).
        Two biases that are only ever added, because the reference's optimizer moves both.
    """
    nb_directions = 2 if bidirectional else 1
    initializer = _uniform(hidden_size)
    weights, biases_ih, biases_hh = [], [], []
    with nn.parameter_scope(name):
        for layer in range(nb_layers):
            gates = (nb_directions, 4, hidden_size)
            nb_inputs = x.shape[2] if layer == 0 else nb_directions * hidden_size
            weights.append(get_parameter_or_create(f"weight_l{layer}", gates + (nb_inputs + hidden_size,), initializer))
            biases_ih.append(get_parameter_or_create(f"bias_ih_l{layer}", gates, initializer))
            biases_hh.append(get_parameter_or_create(f"bias_hh_l{layer}", gates, initializer))
    if utils.fast():
        return _Lstm(nb_layers, dropout, test)(x, *weights, *biases_ih, *biases_hh)
    for layer, (weight, bias_ih, bias_hh) in enumerate(zip(weights, biases_ih, biases_hh)):
        if layer > 0 and dropout > 0 and not test:
            x = F.dropout(x, dropout)  # F.lstm has an argument for it, which the CPU ignores
        state = (1, nb_directions, x.shape[1], hidden_size)
        h, c = F.constant(0, state), F.constant(0, state)
        bias = F.reshape(bias_ih + bias_hh, (1,) + bias_ih.shape)
        x, _, _ = F.lstm(x, h, c, weight, bias=bias, bidirectional=bidirectional, training=not test)
    return x


class _Affine(_Function):
    """Inputs: x₁ … xₙ, W; the rows of W are spread over the xᵢ in turn."""

    def output_shape(self, x, *others):
        return x[0], x[1], others[-1][1]

    @staticmethod
    def _slices(inputs):
        bounds = np.cumsum([0] + [x.shape[2] for x in inputs[:-1]])
        return [slice(*pair) for pair in zip(bounds, bounds[1:])]

    def forward_impl(self, inputs, outputs):
        weight, y = _read(inputs[-1]), _rows(_write(outputs[0]))
        for i, part in enumerate(self._slices(inputs)):
            kernels.matmul(_rows(_read(inputs[i])), weight[part], y, accumulate=i > 0)

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        weight, dy = _read(inputs[-1]), _rows(outputs[0].grad.get_data("r", np.float32))
        dw = _gradient(inputs[-1], accum[-1]) if propagate_down[-1] else None
        tasks = []
        for i, part in enumerate(self._slices(inputs)):
            if propagate_down[i]:
                tasks += kernels.products(dy, weight[part].T, _rows(_gradient(inputs[i], accum[i])), accum[i])
            if dw is not None:
                tasks += kernels.products(_rows(_read(inputs[i])).T, dy, dw[part], accum[-1])
        kernels.run(tasks)


def affine(inputs, n_outmaps, name):
    """Affine map, without bias, of several inputs side by side.

    Args:
        inputs: variables (T, N, features_i)
    Returns:
        (T, N, n_outmaps)
    Parameters:
        affine/W (Σ features_i, n_outmaps)
    """
    fan_in = sum(x.shape[2] for x in inputs)
    with nn.parameter_scope(name):
        W = get_parameter_or_create("affine/W", (fan_in, n_outmaps), _uniform(fan_in))
    if utils.fast():
        return _Affine()(*inputs, W)
    x = F.concatenate(*inputs, axis=2) if len(inputs) > 1 else inputs[0]
    return F.affine(x, W, base_axis=2)


class _Mask(_Normalized):
    """Inputs: z, beta, gamma, mean, var, scale, bias, mixture.

    scale · (gamma u + beta) + bias is a normalisation of its own, with slope scale · gamma / std and shift
    scale · beta + bias; its sums S₀ = Σ r, S₁ = Σ r u give all gradients.
    """

    def __init__(self, test):
        super().__init__(kernels.MASK, test)

    def output_shape(self, *shapes):
        return shapes[-1]

    def _parameters(self, inputs):
        beta, gamma = (_read(v).ravel() for v in inputs[1:3])
        nb_channels = inputs[7].shape[2]
        scale, bias = (np.tile(_read(v), nb_channels) for v in inputs[5:7])
        return beta, gamma, scale, scale * gamma * self.inverse_std, scale * beta + bias

    def forward_impl(self, inputs, outputs):
        z, mixture, y = _rows(_read(inputs[0])), _rows(_read(inputs[7])), _rows(_write(outputs[0]))
        self.statistics(z, *inputs[3:5])
        _, _, _, slope, shift = self._parameters(inputs)
        kernels.normalize(z, self.center, slope, shift, self.kind, mixture, y)

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        beta, gamma, scale, slope, shift = self._parameters(inputs)
        mixture = _rows(_read(inputs[7]))
        s0, s1 = self.backward(inputs, outputs, mixture, slope, shift, propagate_down, accum)
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


def mask(z, scale, mean, mixture, test, name):
    """The decoder's end: relu(batch normalisation of z · scale + mean) · mixture.

    Args:
        z: (T, N, C · F)
        scale, mean: variables (F,)
        mixture: (T, N, C, F); like in the reference, no gradient flows to it from here
    Returns:
        (T, N, C, F)
    Parameters:
        bn/beta, bn/gamma, bn/mean, bn/var (1, 1, C · F)
    """
    if utils.fast():
        with nn.parameter_scope(name):
            return _Mask(test)(z, *_bn_parameters(z.shape[2]), scale, mean, mixture)
    h = batch_normalization(z, F.identity, test, name)
    h = F.reshape(h, mixture.shape)
    h = F.relu(h * F.reshape(scale, (1, 1, 1, -1)) + F.reshape(mean, (1, 1, 1, -1)))
    mixture = F.identity(mixture).apply(need_grad=False)
    return h * mixture


class _SquaredError(_Function):
    def output_shape(self, *shapes):
        return ()

    def forward_impl(self, inputs, outputs):
        _write(outputs[0])[...] = kernels.squared_error(_read(inputs[0]).ravel(), _read(inputs[1]).ravel())

    def backward_impl(self, inputs, outputs, propagate_down, accum):
        a, b = (_read(v).ravel() for v in inputs)
        factor = 2 * float(outputs[0].grad.get_data("r", np.float32)) / len(a)
        for i, sign in enumerate((1, -1)):
            if propagate_down[i]:
                kernels.difference(a, b, sign * factor, _gradient(inputs[i], accum[i]).reshape(-1), accum[i])


def squared_error(y_hat, y):
    """Mean over everything of (y_hat − y)², shape ().

    Raises:
        ValueError: shapes differ.
    """
    if y_hat.shape != y.shape:
        raise ValueError(f"estimate of shape {y_hat.shape}, target of shape {y.shape}")
    if utils.fast():
        return _SquaredError()(y_hat, y)
    # One axis at a time: nnabla adds float32 one by one, and a running sum over a whole batch of spectrograms
    # loses 1e-4 of its value.
    loss = F.squared_error(y_hat, y)
    while loss.ndim:
        loss = F.mean(loss, axis=loss.ndim - 1)
    return loss
