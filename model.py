"""STFT, Spectrogram and the Open-Unmix network (Stöter et al., Open-Unmix, JOSS 2019)."""

from collections.abc import Sequence
from typing import Optional

import nnabla as nn
import nnabla.functions as F
import numpy as np
from nnabla.initializer import ConstantInitializer
from nnabla.parameter import get_parameter_or_create

import functions
from utils import finite, whole

LARGEST = 2**20  # of sizes: NNabla multiplies some of them, in 64 bits


def STFT(x: nn.Variable, n_fft: int = 4096, n_hop: int = 1024, center: bool = False) -> tuple:
    """Short-time Fourier transform of audio (nb_samples, nb_channels, nb_timesteps).

    Periodic Hann window, no normalisation; `center` pads by reflection.

    Returns:
        real and imaginary parts, (nb_samples, nb_channels, nb_bins, nb_frames)
    """
    return functions.stft(x, n_fft, n_hop, center)


def Spectrogram(real: nn.Variable, imag: nn.Variable, power: float = 1, mono: bool = False) -> nn.Variable:
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
        dropout: probability that a unit is dropped between LSTM layers, in training
    Raises:
        ValueError: arguments, or the shape of an input, that do not fit together.

    Parameters live in the ``nn.parameter_scope`` of the call; names and shapes are those of `functions`,
    besides input_mean, input_scale (max_bin,) and output_mean, output_scale (nb_bins,).
    """

    domain = "spectrogram"

    def __init__(
        self,
        n_fft: int = 4096,
        n_hop: int = 1024,
        input_is_spectrogram: bool = False,
        hidden_size: int = 512,
        nb_channels: int = 2,
        sample_rate: float = 44100,
        nb_layers: int = 3,
        input_mean: Optional[np.ndarray] = None,
        input_scale: Optional[np.ndarray] = None,
        max_bin: Optional[int] = None,
        unidirectional: bool = False,
        power: float = 1,
        dropout: float = 0.4,
    ):
        self.n_fft, self.n_hop = whole("n_fft", n_fft, 2), whole("n_hop", n_hop)
        if n_fft % 2:
            raise ValueError(f"n_fft {n_fft} is odd")
        self.nb_bins = self.n_fft // 2 + 1
        self.max_bin = self.nb_bins if max_bin is None else whole("max_bin", max_bin, 1, self.nb_bins)
        self.hidden_size = whole("hidden_size", hidden_size, 1, LARGEST)
        self.nb_layers = whole("nb_layers", nb_layers, 1, 100)
        self.nb_channels = whole("nb_channels", nb_channels, 1, LARGEST)
        self.sample_rate = finite("sample_rate", sample_rate, 1)
        self.power, self.dropout = finite("power", power, 0), finite("dropout", dropout, 0, 1)
        if dropout == 1:
            raise ValueError("dropout 1 leaves nothing")
        for name, value in (("input_is_spectrogram", input_is_spectrogram), ("unidirectional", unidirectional)):
            if not isinstance(value, (bool, np.bool_)):
                raise ValueError(f"{name} {value!r} is neither True nor False")
        self.input_is_spectrogram, self.unidirectional = bool(input_is_spectrogram), bool(unidirectional)
        if not unidirectional and hidden_size % 2:
            raise ValueError(f"hidden_size {hidden_size} is odd: a bidirectional LSTM has half of it per direction")
        self.input_mean = self._statistic("input_mean", input_mean, lambda mean: -mean, ConstantInitializer(0))
        self.input_scale = self._statistic("input_scale", input_scale, lambda std: 1 / std, ConstantInitializer(1))

    def _statistic(self, name, values, to_parameter, default):
        if values is None:
            return default
        values = np.asarray(values, np.float64)
        if values.ndim != 1 or len(values) < self.max_bin:
            raise ValueError(f"{name} has shape {values.shape}: it needs one value for each of {self.max_bin} bins")
        with np.errstate(all="ignore"):
            parameter = to_parameter(values[: self.max_bin]).astype(np.float32)
        if not np.isfinite(parameter).all():
            raise ValueError(f"{name} has values that are not finite, or deviations of 0")
        return parameter

    @property
    def separator_config(self) -> dict:
        """What a separator needs to know besides the weights (the content of separator.json)."""
        return {
            "nfft": self.n_fft,
            "nhop": self.n_hop,
            "sample_rate": self.sample_rate,
            "nb_channels": self.nb_channels,
        }

    def spectrogram(self, x: nn.Variable) -> nn.Variable:
        """Audio (nb_samples, channels, nb_timesteps) to what the network reads and estimates."""
        mono = self.nb_channels == 1
        if x.ndim != 3 or not (mono or x.shape[1] == self.nb_channels):
            raise ValueError(f"audio of shape {x.shape}: expected (nb_samples, {self.nb_channels}, nb_timesteps)")
        return functions.spectrogram(x, self.n_fft, self.n_hop, center=False, power=self.power, mono=mono)

    def __call__(self, x: nn.Variable, test: bool = False) -> nn.Variable:
        """Estimate the target's spectrogram.

        Args:
            x: audio (nb_samples, nb_channels, nb_timesteps), or with `input_is_spectrogram`
                (nb_frames, nb_samples, nb_channels, nb_bins)
            test: running statistics in the batch normalisations, no dropout
        Returns:
            (nb_frames, nb_samples, nb_channels, nb_bins), non-negative
        """
        X = self._input(x)
        return self.decode(self.encode(X, test), X, test)

    def _input(self, x):
        X = x if self.input_is_spectrogram else self.spectrogram(x)
        if X.ndim != 4 or X.shape[2:] != (self.nb_channels, self.nb_bins):
            raise ValueError(
                f"spectrogram of shape {X.shape}: expected (nb_frames, nb_samples, {self.nb_channels}, {self.nb_bins})"
            )
        return X

    def encode(self, X: nn.Variable, test: bool = False) -> nn.Variable:
        """Mixture (nb_frames, nb_samples, nb_channels, nb_bins) to features (nb_frames, nb_samples, hidden_size)."""
        h = self._reduce(X, test)
        return self._combine(h, self._recur(h, test), test)

    def bottleneck(self, X: nn.Variable, test: bool = False) -> nn.Variable:
        """The first part of `encode`, up to the LSTM."""
        return self._reduce(X, test)

    def listen(self, h: Sequence[nn.Variable], test: bool = False) -> list[nn.Variable]:
        """The rest of `encode`, of several recordings, from the `bottleneck` of each; in training of one."""
        return [self._combine(*pair, test) for pair in zip(h, self._recur(h, test))]

    def decode(self, h: nn.Variable, X: nn.Variable, test: bool = False, target: Optional[str] = None) -> nn.Variable:
        """Features of frames to a mask over all bins of the mixture X of the same frames, applied to it.

        `target` says whose parameters: that of a joint network; None here.
        """
        mean = get_parameter_or_create(_name("output_mean", target), (self.nb_bins,), ConstantInitializer(1))
        scale = get_parameter_or_create(_name("output_scale", target), (self.nb_bins,), ConstantInitializer(1))
        h = functions.affine([h], self.nb_channels * self.nb_bins, name=_name("fc3", target))
        return functions.mask(h, scale, mean, X, test, name=_name("fc3", target))

    def _reduce(self, X, test, target=None):
        """Crop, normalise and reduce the dimension."""
        mean = get_parameter_or_create(_name("input_mean", target), (self.max_bin,), self.input_mean)
        scale = get_parameter_or_create(_name("input_scale", target), (self.max_bin,), self.input_scale)
        h = functions.input_affine(X, self.hidden_size, mean, scale, name=_name("fc1", target))
        return functions.batch_normalization(h, F.tanh, test, name=_name("fc1", target))

    def _recur(self, h, test, target=None):
        size = self.hidden_size if self.unidirectional else self.hidden_size // 2
        bidirectional = not self.unidirectional
        name = _name("lstm", target)
        return functions.lstm(h, size, self.nb_layers, bidirectional, self.dropout, test, name=name)

    def _combine(self, h, s, test, target=None):
        """The LSTM's output beside its input, the skip connection."""
        h = functions.affine([h, s], self.hidden_size, name=_name("fc2", target))
        return functions.batch_normalization(h, F.relu, test, name=_name("fc2", target))


def _name(name, target):
    """Of a layer, or of a parameter: a joint network has one per target."""
    return name if target is None else f"{name}_{target}"


class JointOpenUnmix(OpenUnmix):
    """Networks of all targets, side by side; if `crossing`, X-UMX (Sawata et al., All for One and One for All, 2021).

    Then each network goes on with the average over all of them, before and after the LSTMs. Any number of targets, any
    names; the first component of a parameter's name carries its target: fc1_bass/affine/W. Other arguments are
    those of OpenUnmix.

    Raises:
        ValueError: no targets, or names that parameters cannot carry; `crossing` is neither True nor False.
    """

    def __init__(self, targets: Sequence[str], crossing: bool = True, **options):
        super().__init__(**options)
        if not isinstance(crossing, (bool, np.bool_)):
            raise ValueError(f"crossing {crossing!r} is neither True nor False")
        self.crossing = bool(crossing)
        if isinstance(targets, str) or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"targets {targets!r} are not a sequence of names")
        self.targets = tuple(targets)
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets {self.targets}: expected different names, at least one")
        if any(not target or "/" in target for target in self.targets):
            raise ValueError(f"targets {self.targets}: a name cannot be empty, or hold a /")

    def __call__(self, x: nn.Variable, test: bool = False) -> dict:
        """Estimates of all targets, {target: variable}; x as of OpenUnmix."""
        X = self._input(x)
        return {target: self.decode(h, X, test, target) for target, h in self.encode(X, test).items()}

    def encode(self, X: nn.Variable, test: bool = False) -> dict:
        """Features of all targets, {target: variable}."""
        h = self._bridged({target: self._reduce(X, test, target) for target in self.targets})
        s = self._bridged({target: self._recur(h[target], test, target) for target in self.targets})
        return {target: self._combine(h[target], s[target], test, target) for target in self.targets}

    def bottleneck(self, X: nn.Variable, test: bool = False) -> dict:
        """The first part of `encode`, up to the bridges before the LSTMs, {target: variable}."""
        return {target: self._reduce(X, test, target) for target in self.targets}

    def listen(self, h: Sequence[dict], test: bool = False) -> list[dict]:
        """The rest of `encode`, of several recordings."""
        h = [self._bridged(one) for one in h]
        s = [self._recur([one[target] for one in h], test, target) for target in self.targets]
        s = [self._bridged(dict(zip(self.targets, one))) for one in zip(*s)]
        return [
            {target: self._combine(one[target], other[target], test, target) for target in self.targets}
            for one, other in zip(h, s)
        ]

    decode = OpenUnmix.decode  # made for this call: inherited, it might be older (see trained.is_parted)

    def _bridged(self, variables):
        """Of each target its own variable, or the average of all."""
        if not self.crossing:
            return variables
        return dict.fromkeys(self.targets, sum(variables.values()) / len(self.targets))
