"""The graph functions that the model is built from.

Parametric functions (`input_affine`, `batch_normalization`, `lstm`, `affine`, `mask`) register their
parameters in the current ``nn.parameter_scope`` under `name`, like those of
``nnabla.parametric_functions``; initial values are those of the torch reference (openunmix 1.3.0).

Shapes: T = nb_frames, N = nb_samples, C = nb_channels, F = nb_bins.
"""

import nnabla as nn
import nnabla.functions as F
from nnabla.initializer import ConstantInitializer, UniformInitializer
from nnabla.parameter import get_parameter_or_create

BN_EPS = 1e-5
BN_DECAY = 0.9


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
    shortest = n_fft // 2 + 1 if center else n_fft
    if nb_timesteps < shortest:
        raise ValueError(f"{nb_timesteps} samples of audio are too short: n_fft {n_fft} needs {shortest}")
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


def spectrogram(x, n_fft, n_hop, center=False, power=1, mono=False):
    """Audio (N, C, nb_timesteps) to its magnitude (T, N, 1 if mono else C, F)."""
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
    h = F.slice(x, stop=x.shape[:3] + (max_bin,))
    h = (h + F.reshape(mean, (1, 1, 1, -1))) * F.reshape(scale, (1, 1, 1, -1))
    return F.affine(F.reshape(h, x.shape[:2] + (fan_in,)), W, base_axis=2)


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
    h = F.batch_normalization(x, beta, gamma, mean, var, [2], BN_DECAY, BN_EPS, batch_stat=not test)
    return activation(h)


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
    state = (1, nb_directions, x.shape[1], hidden_size)
    for layer in range(nb_layers):
        if layer > 0 and dropout > 0 and not test:
            x = F.dropout(x, dropout)  # F.lstm has an argument for it, which the CPU ignores
        bias_shape = (nb_directions, 4, hidden_size)
        with nn.parameter_scope(name):
            weight = get_parameter_or_create(f"weight_l{layer}", bias_shape + (x.shape[2] + hidden_size,), initializer)
            bias_ih = get_parameter_or_create(f"bias_ih_l{layer}", bias_shape, initializer)
            bias_hh = get_parameter_or_create(f"bias_hh_l{layer}", bias_shape, initializer)
        bias = F.reshape(bias_ih + bias_hh, (1,) + bias_shape)
        h, c = F.constant(0, state), F.constant(0, state)
        x, _, _ = F.lstm(x, h, c, weight, bias=bias, bidirectional=bidirectional, training=not test)
    return x


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
    x = F.concatenate(*inputs, axis=2) if len(inputs) > 1 else inputs[0]
    return F.affine(x, W, base_axis=2)


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
    h = batch_normalization(z, F.identity, test, name)
    h = F.reshape(h, mixture.shape)
    h = F.relu(h * F.reshape(scale, (1, 1, 1, -1)) + F.reshape(mean, (1, 1, 1, -1)))
    mixture = F.identity(mixture).apply(need_grad=False)
    return h * mixture


def squared_error(y_hat, y):
    """Mean over everything of (y_hat − y)², shape ().

    One axis at a time: nnabla adds float32 one by one, and a running sum over a whole batch
    of spectrograms loses 1e-4 of its value.
    """
    loss = F.squared_error(y_hat, y)
    while loss.ndim:
        loss = F.mean(loss, axis=loss.ndim - 1)
    return loss
