"""A recording into its stems while it goes on: `Stream`, for networks that look at no later frame.

What goes from frame to frame is the state of the LSTMs, and of the Wiener filter the sums; what the frames share with
each other, the end of the input and of the overlap-add. So memory does not grow with the recording.
"""

from __future__ import annotations  # unions, on Python 3.9

import math
import numbers
from collections.abc import Iterator

import numpy as np

import filtering
import kernels.normalization
import kernels.spectra
import kernels.streaming
import trained
import weights
from audio import check_samples
from functions import BN_EPS
from kernels.normalization import MASK, RELU, TANH
from separator import Separator
from utils import UsageError


class Stream:
    """Separates a recording that comes in blocks of any size.

    Without a filter, its stems are those of the separator, but for rounding.

    A sample of the stems is there as soon as no later frame can change it: `latency` samples later at most, which is a
    window less one; and if n_hop divides n_fft / 2 and blocks are multiples of a hop, a window less a hop.

    Args:
        separator: of one or several of our own models, unidirectional, and without the EM of the Wiener filter, which
            needs frames to come: niter=0. Residual and soft mask are per frame, and as they are there.
        wiener: the seconds in which a causal Wiener filter, `filtering.Causal`, forgets all but 1/e of what was, or
            infinity; None: no filter. It is of no use, so left out, if there is only one source.
    Attributes:
        sources: names of the stems
        nb_channels, sample_rate: of blocks and stems, those of the models
        latency: in samples
    Raises:
        UsageError: a separator of other models, or with iterations; a time that is none.
    """

    def __init__(self, separator: Separator, wiener: float | None = None):
        if separator.niter:
            raise UsageError("a stream has no iterations of the Wiener filter, which need frames to come: niter=0")
        if wiener is not None and not (isinstance(wiener, numbers.Real) and wiener > 0):
            raise UsageError(f"wiener is {wiener!r}: expected seconds, more than 0, or None for no filter")
        for model in separator.models:
            if not model.is_own:
                raise UsageError(f"{model.name} is a network of one's own: only ours go frame by frame")
            if not model.net.unidirectional:
                names = ", ".join(model.targets)
                raise UsageError(f"the network of {names} is bidirectional: it needs the whole recording")
        self.separator, self.sources = separator, separator.sources
        self.nb_channels, self.sample_rate = separator.nb_channels, separator.sample_rate
        self.latency = separator.n_fft - 1
        self._networks = [_Network(model, separator.targets) for model in separator.models]
        self._filter = None
        if wiener is not None and len(self.sources) > 1:
            forgetting = math.exp(-separator.n_hop / (wiener * separator.sample_rate))
            sizes = len(separator.targets), self.nb_channels, separator.n_fft // 2 + 1
            rest = separator.softmask, separator.residual, separator.wiener_eps
            self._filter = filtering.Causal(*sizes, forgetting, *rest)
        # A frame that waits needs half a window before its centre and after, and blocks are taken hop by hop.
        self._audio = np.empty((self.nb_channels, separator.n_fft + 2 * separator.n_hop + 1), np.float32)
        self._begin()

    def _begin(self):
        """As for a recording of which nothing has come yet."""
        n_fft, n_hop = self.separator.n_fft, self.separator.n_hop
        self._overlap_add = kernels.spectra.OverlapAdd(n_fft, n_hop, 2**62)  # how long it is, nobody knows yet
        self._start = self._stop = 0  # what of the recording self._audio holds
        self._frame = 0  # the next one
        for part in [*self._networks, *filter(None, [self._filter])]:
            part.reset()

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Take the next samples; returns those of the stems that are finished.

        Args:
            block: floats (nb_channels, n), n ≥ 0
        Returns:
            float32 (nb_sources, nb_channels, m), m ≥ 0
        Raises:
            UsageError: not floats of that shape, or samples that are not finite (or huge); nothing is taken then.
        """
        block = np.asarray(block)
        if block.ndim != 2 or len(block) != self.nb_channels or block.dtype.kind != "f":
            raise UsageError(f"block {block.dtype} {block.shape}: expected floats ({self.nb_channels}, n)")
        with np.errstate(over="ignore"):  # infinity, which is no sample
            block = block.astype(np.float32, copy=False)
        check_samples(block, "the block")
        finished = []
        n_fft, n_hop = self.separator.n_fft, self.separator.n_hop
        for start in range(0, block.shape[1], n_hop):
            self._take(block[:, start : start + n_hop])
            if self._stop > n_fft // 2:  # else the first frame lacks what is reflected at the beginning
                finished += self._frames((self._stop - n_fft // 2) // n_hop + 1)
        return self._joined(finished)

    def flush(self) -> np.ndarray:
        """The rest of the stems, (nb_sources, nb_channels, m): the recording has ended, the next block begins another.

        With it, the stems are as long as the recording.
        """
        n_fft, n_hop = self.separator.n_fft, self.separator.n_hop
        finished = []
        if self._stop:
            self._overlap_add.nb_timesteps = self._stop
            # as a Separator does: shorter audio cannot be reflected
            self._take(np.zeros((self.nb_channels, max(0, n_fft // 2 + 1 - self._stop)), np.float32))
            finished += self._frames(self._stop // n_hop + 1)
            finished += [piece for _, piece in self._overlap_add.end()]
        self._begin()
        return self._joined(finished)

    def _take(self, block):
        """Append to self._audio, from which goes what the next frame does not need, nor its reflection at an end."""
        n_fft, n_hop = self.separator.n_fft, self.separator.n_hop
        start = max(0, (self._frame * n_hop - n_fft // 2 - 1) // n_hop * n_hop)
        kept, end = self._stop - start, self._stop - start + block.shape[1]
        self._audio[:, :kept] = self._audio[:, start - self._start : self._stop - self._start]
        self._audio[:, kept:end] = block
        self._start, self._stop = start, start + end

    def _frames(self, stop: int) -> Iterator[np.ndarray]:
        """Finished samples of the stems, with each of the next frames until `stop`."""
        s = self.separator
        audio = self._audio[:, : self._stop - self._start]
        first = self._start // s.n_hop  # the frame whose centre is the first sample of these
        while self._frame < stop:
            spectra = kernels.spectra.stft(audio, s.n_fft, s.n_hop, self._frame - first, self._frame - first + 1)
            X = kernels.spectra.magnitude(spectra, self.nb_channels == 1)[0, 0]
            estimates = [network(X) for network in self._networks]
            v = [np.mean([one[target] for one in estimates if target in one], axis=0) for target in s.targets]
            v = np.array(v)[:, None]
            if s.alpha != 1:
                v **= np.float32(s.alpha)
            if self._filter:
                y = self._filter(v, spectra)
            else:
                y = filtering.source_spectra(v, spectra, 0, s.softmask, s.residual, s.wiener_eps)
            for _, piece in self._overlap_add(y):
                yield piece
            self._frame += 1

    def _joined(self, pieces):
        nothing = np.empty((len(self.sources), self.nb_channels, 0), np.float32)
        return np.concatenate([nothing, *pieces], axis=2)


class _Network:
    """A model, frame by frame: the magnitude of the mixture (nb_channels, nb_bins) to that of each of its targets."""

    def __init__(self, model: trained.Model, targets: list[str]):
        self.crossing = getattr(model.net, "crossing", False)
        self.wanted = [target for target in model.targets if target in targets]
        layers = weights.by_target(model.arrays())
        if not model.joint:
            layers = {model.targets[0]: layers[""]}
        self.layers = {
            target: _Layers(parameters)
            for target, parameters in layers.items()
            if self.crossing or target in self.wanted  # through the bridges, all take part
        }

    def __call__(self, X: np.ndarray) -> dict[str, np.ndarray]:
        h = self._bridged({target: layers.reduce(X) for target, layers in self.layers.items()})
        s = self._bridged({target: layers.recur(h[target]) for target, layers in self.layers.items()})
        return {target: self.layers[target].decode(h[target], s[target], X) for target in self.wanted}

    def _bridged(self, rows):
        return dict.fromkeys(rows, np.mean(list(rows.values()), axis=0)) if self.crossing else rows

    def reset(self) -> None:
        for layers in self.layers.values():
            layers.reset()


class _Layers:
    """The layers of `model.OpenUnmix` with these parameters; what they return, the next frame overwrites."""

    def __init__(self, parameters: dict):
        p = {name: value.astype(np.float64) for name, value in parameters.items()}
        self.max_bin, nb_bins = p["input_mean"].size, p["output_mean"].size
        nb_channels = p["fc3/affine/W"].shape[1] // nb_bins
        # Shift and scale of a bin go into the weights of the first layer, or into the normalisation of the last one.
        mean, scale = (np.tile(p[name], nb_channels)[:, None] for name in ("input_mean", "input_scale"))
        weight = scale * p["fc1/affine/W"]
        self.fc1 = _Normalized(p, "fc1", weight, (mean * weight).sum(axis=0), TANH)
        self.fc2 = _Normalized(p, "fc2", p["fc2/affine/W"], 0, RELU)
        mean, scale = (np.tile(p[name], nb_channels) for name in ("output_mean", "output_scale"))
        self.fc3 = _Normalized(p, "fc3", p["fc3/affine/W"], 0, MASK, mean, scale)
        nb_layers = sum(name.startswith("lstm/weight_l") for name in p)
        self.lstm = [
            kernels.streaming.Lstm(p[f"lstm/weight_l{k}"], p[f"lstm/bias_ih_l{k}"] + p[f"lstm/bias_hh_l{k}"])
            for k in range(nb_layers)
        ]

    def reduce(self, X: np.ndarray) -> np.ndarray:
        return self.fc1(X[:, : self.max_bin])

    def recur(self, h: np.ndarray) -> np.ndarray:
        for layer in self.lstm:
            h = layer(h)
        return h

    def decode(self, h: np.ndarray, s: np.ndarray, X: np.ndarray) -> np.ndarray:
        return self.fc3(self.fc2(np.concatenate([h, s])), X).reshape(X.shape)

    def reset(self) -> None:
        for layer in self.lstm:
            layer.reset()


class _Normalized:
    """kind(scale · batch normalisation of (x W + bias) + mean), kind as of `kernels.normalization`, of one row."""

    def __init__(self, parameters, name, weight, bias, kind, mean=0.0, scale=1.0):
        beta, gamma, average, var = (
            parameters[f"{name}/bn/{part}"].ravel() for part in ("beta", "gamma", "mean", "var")
        )
        slope = scale * gamma / np.sqrt(var + BN_EPS)
        self.affine = kernels.streaming.Affine(weight, np.broadcast_to(bias, beta.shape))
        vectors = average, slope, scale * beta + mean
        self.average, self.slope, self.shift = (vector.astype(np.float32) for vector in vectors)
        self.kind, self.out = kind, np.empty((1, beta.size), np.float32)

    def __call__(self, x: np.ndarray, mixture: np.ndarray | None = None) -> np.ndarray:
        z = self.affine(np.ascontiguousarray(x).reshape(-1))
        mixture = z if mixture is None else mixture.reshape(1, -1)
        vectors = self.average, self.slope, self.shift
        kernels.normalization.normalize(z, *vectors, self.kind, mixture, self.out)
        return self.out[0]
