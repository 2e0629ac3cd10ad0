"""The graph functions that the model is built from, each in two forms with the same meaning.

The plain form is made of native NNabla functions and runs in any context. The fast form, for the CPU, is in
fast.py. `context.fast` chooses.

Parametric functions (`input_affine`, `batch_normalization`, `lstm`, `affine`, `mask`) register their
parameters in the current ``nn.parameter_scope`` under `name`, like those of
``nnabla.parametric_functions``; initial values are those of the torch reference (openunmix 1.3.0).

Shapes: T = nb_frames, N = nb_samples, C = nb_channels, F = nb_bins.
"""

from collections.abc import Callable, Sequence
from typing import Union

import nnabla as nn
import nnabla.functions as F
from nnabla.initializer import ConstantInitializer, UniformInitializer
from nnabla.parameter import get_parameter_or_create

import context
import fast
import fourier
import kernels.correlations
import kernels.spectra
from fast import BN_DECAY, BN_EPS
from utils import finite, whole

# ------------------------------------------------------------------------------- audio to spectrogram


def _check_frames(x, n_fft, n_hop, center):
    """ValueError unless audio has frames of this size."""
    whole("n_fft", n_fft)
    whole("n_hop", n_hop)
    if x.ndim != 3:
        raise ValueError(f"audio of shape {x.shape}: expected (nb_samples, nb_channels, nb_timesteps)")
    kernels.spectra.nb_frames(x.shape[2], n_fft, n_hop, center)


def stft(x: nn.Variable, n_fft: int, n_hop: int, center: bool) -> tuple[nn.Variable, nn.Variable]:
    """Short-time Fourier transform: periodic Hann window, no normalisation.

    Args:
        x: audio (N, C, nb_timesteps)
        n_fft, n_hop: window and hop in samples
        center: pad n_fft // 2 samples by reflection on both sides
    Returns:
        real, imaginary: (N, C, F, T)
    Raises:
        ValueError: sizes that cannot be; the audio is too short for a frame, or for the reflection.
    """
    _check_frames(x, n_fft, n_hop, center)
    parts = _transform(_centred(x, n_fft) if center else x, n_fft, n_hop)
    return tuple(F.transpose(part, (1, 2, 0, 3)) for part in parts)


def _centred(x, n_fft):
    return F.pad(x, (n_fft // 2, n_fft // 2), mode="reflect")


def _transform(x, n_fft, n_hop):
    """The uncentred STFT of audio (N, C, nb_timesteps), laid out as it is computed: real, imaginary (F, N, C, T)."""
    rows = F.reshape(x, (x.shape[0] * x.shape[1], x.shape[2]), inplace=False)
    parts = fourier.transform(rows, n_fft, n_hop)
    return [F.reshape(part, (part.shape[0], *x.shape[:2], part.shape[2])) for part in parts]


BLOCK = 2**26  # samples in frames that are transformed at once: two batches of 16, some 1 GB of memory


def _blocks(x, n_fft, n_hop):
    """Audio (N, C, nb_timesteps) in pieces, as many as memory needs, and of each the first frame and the one after."""
    nb_frames = kernels.spectra.nb_frames(x.shape[2], n_fft, n_hop, False)
    size = max(1, BLOCK // (x.shape[0] * x.shape[1] * n_fft))
    for start in range(0, nb_frames, size):
        stop = min(start + size, nb_frames)
        samples = start * n_hop, (stop - 1) * n_hop + n_fft
        yield F.slice(x, start=(0, 0, samples[0]), stop=(*x.shape[:2], samples[1])), start, stop


def magnitude(real: nn.Variable, imag: nn.Variable, power: float, mono: bool) -> nn.Variable:
    """(real² + imag²)^(power/2) in the network's layout, averaged over channels if mono.

    Args:
        real, imag: (N, C, F, T)
    Returns:
        (T, N, 1 if mono else C, F)
    Raises:
        ValueError: shapes differ, or the power is none.
    """
    if real.ndim != 4 or real.shape != imag.shape:
        raise ValueError(f"real part of shape {real.shape}, imaginary of {imag.shape}: expected (N, C, F, T) of both")
    finite("power", power, 0)
    return _magnitude(real, imag, power, mono, (3, 0, 1, 2))


def _magnitude(real, imag, power, mono, axes):
    """`magnitude` in any layout: `axes` are where its T, N, C and F are."""
    X = F.transpose(F.pow_scalar(real**2 + imag**2, power / 2), axes)
    return F.mean(X, axis=2, keepdims=True) if mono else X


def spectrogram(
    x: nn.Variable, n_fft: int, n_hop: int, center: bool = False, power: float = 1, mono: bool = False
) -> nn.Variable:
    """Audio (N, C, nb_timesteps) to its magnitude (T, N, 1 if mono else C, F), as `magnitude` of `stft`."""
    _check_frames(x, n_fft, n_hop, center)
    finite("power", power, 0)
    if context.fast() and not x.need_grad:  # the fast form has no gradient
        return fast.Spectrogram(n_fft, n_hop, center, power, mono)(x)
    x = _centred(x, n_fft) if center else x
    parts = []
    for block, _, _ in _blocks(x, n_fft, n_hop):
        parts.append(_magnitude(*_transform(block, n_fft, n_hop), power, mono, (3, 1, 2, 0)))
    return F.concatenate(*parts, axis=0) if len(parts) > 1 else parts[0]


def waveforms(magnitudes: Sequence[nn.Variable], x: nn.Variable, n_fft: int, n_hop: int) -> list[nn.Variable]:
    """Magnitudes with the phase of the mixture as audio: the inverse of the uncentred `stft`.

    torch.istft's formula (frames windowed once more and added, over the sum of squared windows) as though silent frames
    came before the first and after the last. So n_fft − n_hop samples at the beginning, and as many before the last
    frame's end, are faded: to be divided by the sum of the windows that there are, which vanishes at the ends, would
    enlarge errors beyond all bounds. Samples beyond the last frame are 0. Sony's X-UMX centres its frames instead.

    Args:
        magnitudes: of each target (T, N, C or 1, F); a single channel is heard with the phases of all C
        x: mixture, audio (N, C, nb_timesteps); no gradient flows to it from here
    Returns:
        of each target, audio (N, C, nb_timesteps)
    Raises:
        ValueError: shapes that do not fit together; n_fft is no multiple of n_hop.
    """
    _check_frames(x, n_fft, n_hop, False)
    if n_fft % 2 or n_fft % n_hop or n_fft == n_hop:
        raise ValueError(f"n_fft {n_fft}, n_hop {n_hop}: the way back to audio needs an even window, of several hops")
    nb_samples, nb_channels, nb_timesteps = x.shape
    nb_frames, nb_bins = kernels.spectra.nb_frames(nb_timesteps, n_fft, n_hop, False), n_fft // 2 + 1
    for Y in magnitudes:
        if Y.shape not in {(nb_frames, nb_samples, channels, nb_bins) for channels in (1, nb_channels)}:
            raise ValueError(f"magnitude of shape {Y.shape} for audio of shape {x.shape}")
    if context.fast():
        audio = fast.Waveforms(len(magnitudes), n_fft, n_hop)(x, *magnitudes)
        return audio if len(magnitudes) > 1 else [audio]
    audio = [[] for _ in magnitudes]
    for block, start, stop in _blocks(x, n_fft, n_hop):
        real, imag = _transform(block, n_fft, n_hop)
        phase = F.atan2(imag, real).apply(need_grad=False)
        directions = F.cos(phase), F.sin(phase)
        for Y, parts in zip(magnitudes, audio):
            Y = F.slice(Y, start=(start, 0, 0, 0), stop=(stop, *Y.shape[1:]))
            Y = F.transpose(Y, (3, 1, 2, 0))
            spectra = [F.reshape(Y * direction, (nb_bins, -1, stop - start)) for direction in directions]
            y = fourier.inverse(*spectra, n_fft, n_hop)
            before = start * n_hop
            parts.append(F.pad(y, (0, 0, before, nb_timesteps - before - y.shape[1])))
    return [F.reshape(sum(parts[1:], parts[0]), x.shape) for parts in audio]


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


def input_affine(x: nn.Variable, n_outmaps: int, mean: nn.Variable, scale: nn.Variable, name: str) -> nn.Variable:
    """((x + mean) · scale) W, over the first bins only: as many as `mean` has.

    Args:
        x: spectrogram (T, N, C, F)
        mean, scale: (max_bin,)
    Returns:
        (T, N, n_outmaps)
    Parameters:
        affine/W (C · max_bin, n_outmaps), no bias
    """
    max_bin = mean.shape[0]
    fan_in = x.shape[2] * max_bin
    with nn.parameter_scope(name):
        W = get_parameter_or_create("affine/W", (fan_in, n_outmaps), _uniform(fan_in))
    if context.fast():
        return fast.InputAffine()(x, W, mean, scale)
    # x (scale W) + mean (scale W): mean and scale have their gradients from those of W, which is the smaller, not of x
    W = F.reshape(F.reshape(W, (-1, max_bin, n_outmaps)) * F.reshape(scale, (1, -1, 1)), W.shape)
    mean = F.reshape(F.broadcast(F.reshape(mean, (1, -1)), (x.shape[2], max_bin)), (1, fan_in))
    h = F.reshape(F.slice(x, stop=x.shape[:3] + (max_bin,)), x.shape[:2] + (fan_in,))
    return F.affine(h, W, F.reshape(F.affine(mean, W), (n_outmaps,)), base_axis=2)


def batch_normalization(
    x: nn.Variable, activation: Callable[[nn.Variable], nn.Variable], test: bool, name: str
) -> nn.Variable:
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
    if context.fast() and activation in fast.KINDS:
        return fast.BatchNormalization(fast.KINDS[activation], test)(x, beta, gamma, mean, var)
    return activation(_normalized(x, beta, gamma, mean, var, test))


def _normalized(x, beta, gamma, mean, var, test):
    """Batch normalisation of the features of x (T, N, features).

    With running statistics, cuDNN takes no more than 65535 frames, 25 minutes (PyTorch's Normalization.cpp states its
    limits); so there it is written out.
    """
    if test:
        return (x - mean) * (gamma * (var + BN_EPS) ** -0.5) + beta
    return F.batch_normalization(x, beta, gamma, mean, var, [2], BN_DECAY, BN_EPS)


def lstm(
    x: Union[nn.Variable, Sequence[nn.Variable]],
    hidden_size: int,
    nb_layers: int,
    bidirectional: bool,
    dropout: float,
    test: bool,
    name: str,
) -> Union[nn.Variable, list[nn.Variable]]:
    """Stacked LSTM with dropout between its layers (not after the last).

    Args:
        x: (T, N, features); or a sequence of such, of recordings each with its own T, in test mode. The fast form
            reads its weights once for all of them.
        hidden_size: units per direction
    Returns:
        (T, N, hidden_size · directions), or a list of such
    Raises:
        ValueError: several recordings in training, or none, or features that differ in number.
    Parameters, of layer k: weight_l{k} (directions, 4, hidden_size, inputs + hidden_size) with gates in
        the order input, forget, cell, output; bias_ih_l{k}, bias_hh_l{k} (directions, 4, hidden_size).
        Two biases that are only ever added, because the reference's optimizer moves both.
    """
    recordings = [x] if isinstance(x, nn.Variable) else list(x)
    if len(recordings) > 1 and not test:
        raise ValueError("several recordings go through an LSTM together in test mode only")
    if len({one.shape[2] for one in recordings}) != 1:
        raise ValueError(f"recordings of shapes {[one.shape for one in recordings]}: expected equal features")
    nb_directions = 2 if bidirectional else 1
    initializer = _uniform(hidden_size)
    weights, biases_ih, biases_hh = [], [], []
    with nn.parameter_scope(name):
        for layer in range(nb_layers):
            gates = (nb_directions, 4, hidden_size)
            nb_inputs = recordings[0].shape[2] if layer == 0 else nb_directions * hidden_size
            weights.append(get_parameter_or_create(f"weight_l{layer}", gates + (nb_inputs + hidden_size,), initializer))
            biases_ih.append(get_parameter_or_create(f"bias_ih_l{layer}", gates, initializer))
            biases_hh.append(get_parameter_or_create(f"bias_hh_l{layer}", gates, initializer))
    if context.fast():
        y = fast.Lstm(len(recordings), nb_layers, dropout, test)(*recordings, *weights, *biases_ih, *biases_hh)
        outputs = [y] if isinstance(y, nn.Variable) else list(y)
    else:
        outputs = [_lstm(one, weights, biases_ih, biases_hh, dropout, test) for one in recordings]
    return outputs[0] if isinstance(x, nn.Variable) else outputs


def _lstm(x, weights, biases_ih, biases_hh, dropout, test):
    """Of one recording, in native functions."""
    for layer, (weight, bias_ih, bias_hh) in enumerate(zip(weights, biases_ih, biases_hh)):
        if layer > 0 and dropout > 0 and not test:
            x = F.dropout(x, dropout)  # F.lstm has an argument for it, which the CPU ignores
        nb_directions, _, hidden_size, _ = weight.shape
        h, c = (nn.Variable((1, nb_directions, x.shape[1], hidden_size)) for _ in range(2))
        h.data.zero()  # F.constant is a function of the CPU: in every step its values would be copied to the device
        c.data.zero()
        bias = F.reshape(bias_ih + bias_hh, (1,) + bias_ih.shape)
        x, _, _ = F.lstm(x, h, c, weight, bias=bias, bidirectional=nb_directions == 2, training=not test)
    return x


def affine(inputs: Sequence[nn.Variable], n_outmaps: int, name: str) -> nn.Variable:
    """Affine map, without bias, of several inputs side by side.

    Args:
        inputs: each (T, N, features_i)
    Returns:
        (T, N, n_outmaps)
    Parameters:
        affine/W (Σ features_i, n_outmaps)
    """
    fan_in = sum(x.shape[2] for x in inputs)
    with nn.parameter_scope(name):
        W = get_parameter_or_create("affine/W", (fan_in, n_outmaps), _uniform(fan_in))
    if context.fast():
        return fast.Affine()(*inputs, W)
    x = F.concatenate(*inputs, axis=2) if len(inputs) > 1 else inputs[0]
    return F.affine(x, W, base_axis=2)


def mask(
    z: nn.Variable, scale: nn.Variable, mean: nn.Variable, mixture: nn.Variable, test: bool, name: str
) -> nn.Variable:
    """The decoder's end: relu(batch normalisation of z · scale + mean) · mixture.

    Args:
        z: (T, N, C · F)
        scale, mean: (F,)
        mixture: (T, N, C, F); like in the reference, no gradient flows to it from here
    Returns:
        (T, N, C, F)
    Parameters:
        bn/beta, bn/gamma, bn/mean, bn/var (1, 1, C · F)
    """
    with nn.parameter_scope(name):
        beta, gamma, *running = _bn_parameters(z.shape[2])
    if context.fast():
        return fast.Mask(test)(z, beta, gamma, *running, scale, mean, mixture)
    # Scale and mean go into gamma and beta: that is a product per feature, rather than one per number of z.
    beta, gamma = (F.reshape(v, mixture.shape[2:]) * F.reshape(scale, (1, -1)) for v in (beta, gamma))
    beta = beta + F.reshape(mean, (1, -1))
    h = _normalized(z, *(F.reshape(v, (1, 1, -1)) for v in (beta, gamma)), *running, test)
    h = F.relu(F.reshape(h, mixture.shape))
    mixture = F.identity(mixture).apply(need_grad=False)
    return h * mixture


# ------------------------------------------------------------------------------------------- losses


def squared_error(y_hat: nn.Variable, y: nn.Variable) -> nn.Variable:
    """Mean over everything of (y_hat − y)², shape ().

    Raises:
        ValueError: shapes differ.
    """
    check_pair(y_hat, y)
    if context.fast():
        return fast.SquaredError()(y_hat, y)
    return _mean(F.squared_error(y_hat, y))


def absolute_error(y_hat: nn.Variable, y: nn.Variable) -> nn.Variable:
    """Mean over everything of |y_hat − y|, shape (); in native functions alone. Raises as `squared_error`."""
    check_pair(y_hat, y)
    return _mean(F.absolute_error(y_hat, y))


def check_pair(y_hat: nn.Variable, y: nn.Variable) -> None:
    """ValueError unless their shapes are the same."""
    if y_hat.shape != y.shape:
        raise ValueError(f"estimate of shape {y_hat.shape}, target of shape {y.shape}")


def _mean(x):
    """One axis at a time: nnabla adds float32 one by one, and a running sum over a whole batch of spectrograms loses
    1e-4 of its value."""
    while x.ndim:
        x = F.mean(x, axis=x.ndim - 1)
    return x
