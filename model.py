"""STFT, Spectrogram and the Open-Unmix network (Stöter et al., Open-Unmix, JOSS 2019)."""

import nnabla.functions as F
import numpy as np
from nnabla.parameter import get_parameter_or_create

import functions


def STFT(x, n_fft=4096, n_hop=1024, center=False):
    """Short-time Fourier transform of audio (nb_samples, nb_channels, nb_timesteps).

    Periodic Hann window, no normalisation; `center` pads by reflection.

    Returns:
        real and imaginary parts, (nb_samples, nb_channels, nb_bins, nb_frames)
    """
    return functions.stft(x, n_fft, n_hop, center)


def Spectrogram(real, imag, power=1, mono=False):
    """Magnitude to the given power, averaged over channels if mono.

    Returns:
        (nb_frames, nb_samples, 1 if mono else nb_channels, nb_bins), the network's layout
    """
    return functions.magnitude(real, imag, power, mono)


class OpenUnmix:
    """The spectrogram model of one target: a mask, from a three-layer BLSTM, times the mixture.

    Args:
        n_fft, n_hop: STFT window and hop in samples
        input_is_spectrogram: the input is a magnitude, not audio
        hidden_size: width of the bottleneck; the LSTM has half of it per direction if bidirectional
        nb_channels: of the spectrograms; 1 averages the magnitudes of the audio's channels
        sample_rate: of the audio it is made for, in Hz; `separator_config` passes it on
        nb_layers: of the LSTM
        input_mean, input_scale: mean and standard deviation per bin of the training mixtures, (≥ max_bin,);
            the parameters hold −mean and 1/scale; None: zeros and ones
        max_bin: bins that the network reads; None: all. It always writes all of them.
        unidirectional: a causal LSTM
        power: of the magnitudes
        dropout: share of units dropped between LSTM layers in training
    Raises:
        ValueError: arguments, or the shape of an input, that do not fit together.

    Parameters live in the ``nn.parameter_scope`` of the call; names and shapes are those of `functions`,
    besides input_mean, input_scale (max_bin,) and output_mean, output_scale (nb_bins,).
    """

    def __init__(
        self,
        n_fft=4096,
        n_hop=1024,
        input_is_spectrogram=False,
        hidden_size=512,
        nb_channels=2,
        sample_rate=44100,
        nb_layers=3,
        input_mean=None,
        input_scale=None,
        max_bin=None,
        unidirectional=False,
        power=1,
        dropout=0.4,
    ):
        self.n_fft, self.n_hop, self.sample_rate = n_fft, n_hop, sample_rate
        self.nb_bins = n_fft // 2 + 1
        self.max_bin = self.nb_bins if max_bin is None else int(max_bin)
        self.input_is_spectrogram = input_is_spectrogram
        self.hidden_size, self.nb_layers = hidden_size, nb_layers
        self.nb_channels, self.power, self.dropout = nb_channels, power, dropout
        self.unidirectional = unidirectional
        if not 1 <= self.max_bin <= self.nb_bins:
            raise ValueError(f"max_bin {self.max_bin} is not within 1 … {self.nb_bins}, the bins of n_fft {n_fft}")
        if not unidirectional and hidden_size % 2:
            raise ValueError(f"hidden_size {hidden_size} is odd: a bidirectional LSTM has half of it per direction")
        self.input_mean = self._statistic("input_mean", input_mean, lambda mean: -mean, 0)
        self.input_scale = self._statistic("input_scale", input_scale, lambda std: 1 / std, 1)

    def _statistic(self, name, values, to_parameter, default):
        if values is None:
            return np.full(self.max_bin, default, np.float32)
        values = np.asarray(values, np.float64)
        if values.ndim != 1 or len(values) < self.max_bin:
            raise ValueError(f"{name} has shape {values.shape}: it needs one value for each of {self.max_bin} bins")
        return to_parameter(values[: self.max_bin]).astype(np.float32)

    @property
    def separator_config(self):
        """What a separator needs to know besides the weights (the content of separator.json)."""
        return {
            "nfft": self.n_fft,
            "nhop": self.n_hop,
            "sample_rate": self.sample_rate,
            "nb_channels": self.nb_channels,
        }

    def spectrogram(self, x):
        """Audio (nb_samples, channels, nb_timesteps) to what the network reads and estimates."""
        mono = self.nb_channels == 1
        if x.ndim != 3 or not (mono or x.shape[1] == self.nb_channels):
            raise ValueError(f"audio of shape {x.shape}: expected (nb_samples, {self.nb_channels}, nb_timesteps)")
        return functions.spectrogram(x, self.n_fft, self.n_hop, center=False, power=self.power, mono=mono)

    def __call__(self, x, test=False):
        """Estimate the target's spectrogram.

        Args:
            x: audio (nb_samples, nb_channels, nb_timesteps), or with `input_is_spectrogram`
                (nb_frames, nb_samples, nb_channels, nb_bins)
            test: running statistics in the batch normalisations, no dropout
        Returns:
            (nb_frames, nb_samples, nb_channels, nb_bins), non-negative
        """
        X = x if self.input_is_spectrogram else self.spectrogram(x)
        if X.ndim != 4 or X.shape[2:] != (self.nb_channels, self.nb_bins):
            raise ValueError(
                f"spectrogram of shape {X.shape}: expected (nb_frames, nb_samples, {self.nb_channels}, {self.nb_bins})"
            )
        return self.decode(self.encode(X, test), X, test)

    def encode(self, X, test=False):
        """Mixture (nb_frames, nb_samples, nb_channels, nb_bins) to features (nb_frames, nb_samples, hidden_size)."""
        h = self._reduce(X, test)
        return self._combine(h, self._recur(h, test), test)

    def _reduce(self, X, test, suffix=""):
        """Crop, normalise and reduce the dimension."""
        mean = get_parameter_or_create("input_mean" + suffix, (self.max_bin,), self.input_mean)
        scale = get_parameter_or_create("input_scale" + suffix, (self.max_bin,), self.input_scale)
        h = functions.input_affine(X, self.hidden_size, mean, scale, name="fc1" + suffix)
        return functions.batch_normalization(h, F.tanh, test, name="fc1" + suffix)

    def _recur(self, h, test, suffix=""):
        size = self.hidden_size if self.unidirectional else self.hidden_size // 2
        bidirectional = not self.unidirectional
        return functions.lstm(h, size, self.nb_layers, bidirectional, self.dropout, test, name="lstm" + suffix)

    def _combine(self, h, s, test, suffix=""):
        """The LSTM's output beside its input, the skip connection."""
        h = functions.affine([h, s], self.hidden_size, name="fc2" + suffix)
        return functions.batch_normalization(h, F.relu, test, name="fc2" + suffix)

    def decode(self, h, X, test=False, suffix=""):
        """Features of frames to a mask over all bins of the mixture X of the same frames, applied to it."""
        mean = get_parameter_or_create("output_mean" + suffix, (self.nb_bins,), np.ones(self.nb_bins))
        scale = get_parameter_or_create("output_scale" + suffix, (self.nb_bins,), np.ones(self.nb_bins))
        h = functions.affine([h], self.nb_channels * self.nb_bins, name="fc3" + suffix)
        return functions.mask(h, scale, mean, X, test, name="fc3" + suffix)


class JointOpenUnmix(OpenUnmix):
    """X-UMX (Sawata et al., All for One and One for All, ICASSP 2021): networks of all targets, with bridges.

    Before and after the LSTMs, each network goes on with the average over all of them. Arguments as of
    OpenUnmix, and `targets`; the first component of a parameter's name carries its target: fc1_bass/affine/W.
    """

    def __init__(self, targets, **options):
        super().__init__(**options)
        self.targets = tuple(targets)

    def __call__(self, x, test=False):
        """Estimates of all targets, a list; x as of OpenUnmix."""
        X = x if self.input_is_spectrogram else self.spectrogram(x)
        return [self.decode(h, X, test, f"_{target}") for target, h in zip(self.targets, self.encode(X, test))]

    def encode(self, X, test=False):
        """Features of all targets, a list."""
        suffixes = [f"_{target}" for target in self.targets]
        h = self._average(self._reduce(X, test, suffix) for suffix in suffixes)
        s = self._average(self._recur(h, test, suffix) for suffix in suffixes)
        return [self._combine(h, s, test, suffix) for suffix in suffixes]

    def _average(self, variables):
        return sum(variables) / len(self.targets)
