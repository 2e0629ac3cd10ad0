"""A recording into its stems, in memory: `Separator`. What is read from and written to files: separate.py."""

from __future__ import annotations  # unions, on Python 3.9

import contextlib
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import nnabla as nn
import nnabla_ext.cpu
import numpy as np

import context
import ensemble
import files
import filtering
import functions
import kernels.spectra
import trained
from args import MOST_ALPHA, MOST_ITERATIONS
from audio import check_channels, check_rate, check_samples, resample
from context import extension_context
from utils import UsageError

OVERLAPS = 8  # a piece is as long, or to encode two at once would save less time than the added overlap costs
SMALLEST_EPS = float(np.finfo(np.float64).eps)  # of the Wiener filter: norbert's default


class Separator:
    """Separates recordings into stems: the models' estimates, a multichannel Wiener filter, the inverse STFT.

    Estimates of networks in the time domain are the stems as they are. With the same weights, the stems equal those of
    openunmix 1.3.0's Separator. Recordings longer than `segment` are worked through in pieces that overlap by
    `overlap`, with a crossfade, so that memory stays bounded: two at a time, each not half as long, unless that is
    short.

    Args:
        models: with the same STFT, or all in the time domain; estimates of a target that several have are averaged
        targets: which of their targets to estimate, in this order; None: all
        niter: iterations of the Wiener filter's EM; of no use, so left out, if there is only one source
        softmask: start the EM from a soft mask rather than from the mixture's phase
        alpha: exponent of the estimates in the soft mask
        residual: True or a name: one more stem, what the estimates leave of the mixture
        wiener_win_len: frames that are filtered together; None: all (of a segment)
        context: "cpu", "cudnn" or None for cudnn where it works
        segment, overlap: in seconds, made whole windows of the filter (13.9 s of overlap for the defaults at 44.1 kHz)
        wiener_eps: regularisation of the filter, openunmix' 1e-10; None: norbert's, the precision of float64, 2.2e-16
    """

    def __init__(
        self,
        models: list[trained.Model],
        targets: Sequence[str] | None = None,
        niter: int = 1,
        softmask: bool = False,
        alpha: float = 1.0,
        residual: bool | str = False,
        wiener_win_len: int | None = 300,
        context: str | None = None,
        device_id: str = "0",
        segment: float = 480.0,
        overlap: float = 10.0,
        wiener_eps: float | None = 1e-10,
    ):
        if not models or not all(isinstance(model, trained.Model) for model in models):
            raise UsageError("expected a list of models, as trained.load_models gives them")
        if not _is(numbers.Integral, niter) or not 0 <= niter <= MOST_ITERATIONS:
            raise UsageError(f"niter is {niter!r}: expected a whole number from 0 to {MOST_ITERATIONS}")
        if wiener_win_len is not None and not (_is(numbers.Integral, wiener_win_len) and wiener_win_len > 0):
            raise UsageError(f"wiener_win_len is {wiener_win_len!r}: a window is a whole number of frames, or None")
        if not _is(numbers.Real, segment) or not _is(numbers.Real, overlap) or not segment > 2 * overlap >= 0:
            raise UsageError(
                f"segment {segment!r}, overlap {overlap!r}: a segment is longer than two overlaps, in seconds"
            )
        if not _is(numbers.Real, alpha) or not 0 < alpha <= MOST_ALPHA:
            raise UsageError(f"alpha is {alpha!r}: expected more than 0, at most {MOST_ALPHA}")
        if wiener_eps is not None and not (_is(numbers.Real, wiener_eps) and SMALLEST_EPS <= wiener_eps <= 1):
            raise UsageError(f"wiener_eps is {wiener_eps!r}: expected {SMALLEST_EPS:.3g} to 1, or None for the least")
        if not isinstance(residual, (bool, str)):
            raise UsageError(f"residual is {residual!r}: expected True, False or a name")
        self.models = list(models)
        known = list(dict.fromkeys(target for model in models for target in model.targets))
        self.targets = _names(targets) or known
        if unknown := [target for target in self.targets if target not in known]:
            raise UsageError(f"the models have no target {unknown[0]!r}: they have {', '.join(known)}")
        self.sources = self.targets + ([residual if isinstance(residual, str) else "residual"] if residual else [])
        if len(set(self.sources)) < len(self.sources):
            raise UsageError(f"two stems of one name: {', '.join(self.sources)}")
        if not all(map(files.is_file_name, self.sources)):
            raise UsageError(f"stems become files, but {', '.join(map(repr, self.sources))} are not all names of files")
        if alpha != 1 and not softmask:
            raise UsageError("alpha is the exponent in the soft mask: it has no effect without softmask")
        self.n_fft, self.n_hop = models[0].n_fft, models[0].n_hop
        self.nb_channels, self.sample_rate = models[0].nb_channels, models[0].sample_rate
        self.is_spectral = models[0].domain == "spectrogram"
        if any(model.domain != models[0].domain for model in models):
            raise UsageError("models of spectrograms and models in the time domain cannot be filtered together")
        if any(model.config != models[0].config for model in models):
            raise UsageError("the models differ in sample rate, channels or STFT")
        if self.is_spectral and self.n_hop > self.n_fft // 2:
            raise UsageError(f"a hop of {self.n_hop} leaves gaps between windows of {self.n_fft} samples")
        if softmask and not self.is_spectral:
            raise UsageError("a soft mask starts the Wiener filter, which networks in the time domain do without")
        self.niter = niter if len(self.sources) > 1 else 0
        self.softmask, self.alpha, self.residual = softmask, alpha, bool(residual)
        self.wiener_win_len = wiener_win_len and min(wiener_win_len, 2**40)
        self.wiener_eps = SMALLEST_EPS if wiener_eps is None else float(wiener_eps)
        self.context = extension_context(context, device_id)
        segment, overlap = min(segment, 1e9), min(overlap, 4e8)  # more is no recording, and less than infinity
        # whole windows of the filter, so that a segment's windows are those of the whole recording
        unit = (self.wiener_win_len or 1) * self.n_hop
        self.overlap = -(round(overlap * self.sample_rate) // -unit) * unit  # rounded up
        self.segment = max(self.overlap, round(segment * self.sample_rate / unit) * unit, unit) + self.overlap
        # not quite half of it: two that are encoded at once need a tenth more memory than one as long as both
        piece = max(unit, 9 * self.segment // (20 * unit) * unit)
        self.piece = piece if piece >= OVERLAPS * self.overlap and self.is_spectral else self.segment

    @classmethod
    def load(
        cls,
        model: str | Path | Sequence[str | Path] = "umxl",
        targets: str | Sequence[str] | None = None,
        niter: int = 1,
        softmask: bool = False,
        residual: bool | str = False,
        wiener_win_len: int | None = 300,
        context: str | None = None,
        *,
        model_dir: str | Path | None = None,
        network: str | None = None,
        network_options: dict | None = None,
        quiet: bool = True,
        **options,
    ) -> Separator:
        """A Separator of a named, or of one's own, model; arguments as of `ensemble.load_models` and Separator.

        Of several models, estimates are averaged; each has all of the targets. `network`, "FILE.py:CLASS", names the
        class of a network that is not ours again, whose file is run.
        """
        targets = _names(targets) or None
        network = trained.read_network(network, network_options)
        models = ensemble.load_models(model, targets, model_dir, network, quiet)
        options.update(niter=niter, softmask=softmask, residual=residual)
        return cls(models, targets, wiener_win_len=wiener_win_len, context=context, **options)

    def __call__(self, audio: np.ndarray, rate: float) -> dict[str, np.ndarray]:
        """Separate a recording.

        Args:
            audio: floats within ±1 (nb_channels, nb_timesteps); more channels than two are separated in pairs,
                a single one by a stereo model as two equal ones
            rate: its sample rate in Hz; resampled to the model's and back
        Returns:
            dict of stems float32, of the shape and rate of `audio`
        Raises:
            UsageError: not floats of that shape, empty, with samples that are not finite (or huge), or no rate.
        """
        return next(self.together([audio], rate))

    def together(self, recordings: Iterable[np.ndarray], rate: float) -> Iterator[dict[str, np.ndarray]]:
        """Separate several recordings of one rate: yields of each, in turn, what a call gives, but for rounding.

        Our networks encode several at once, so that the weights of their LSTMs are read once for all: as many as
        follow each other and are no longer than a segment in all, so that memory stays that of one recording.
        """
        for group in self._groups(self._checked(recording, rate) for recording in recordings):
            several = self.is_spectral and len(group) > 1
            features = self._encode([part for x, _ in group for part in self._parts(x)]) if several else []
            for x, nb_timesteps in group:
                if several:
                    blocks = self._segment(x, [features.pop(0) for _ in self._parts(x)])
                else:  # one alone may be longer than a segment
                    blocks = self.stream(lambda start, stop, x=x: x[:, start:stop], *x.shape)
                yield self._collected(blocks, x.shape, nb_timesteps, rate)

    def _groups(self, recordings):
        """Lists of recordings that follow each other: of one, or of several no longer than a segment in all."""
        group, total = [], 0
        for x, nb_timesteps in recordings:
            length = -(-len(x) // 2) * x.shape[1]  # of all pairs of channels
            if group and total + length > self.segment:
                yield group
                group, total = [], 0
            group.append((x, nb_timesteps))
            total += length
        if group:
            yield group

    def _checked(self, audio, rate):
        """Audio at the model's rate, and its length before."""
        try:
            audio = np.asarray(audio)
        except ValueError as error:
            raise UsageError(f"expected audio (nb_channels, nb_timesteps): {error}") from None
        if audio.ndim != 2 or not audio.size or audio.dtype.kind != "f":
            raise UsageError(f"audio {audio.dtype} {audio.shape}: expected floats (nb_channels, nb_timesteps)")
        check_channels(len(audio), "the audio")
        check_rate(rate, "the audio")
        with np.errstate(over="ignore"):  # infinity, which is no sample
            audio = np.asarray(audio, np.float32)
        check_samples(audio, "the audio")
        return resample(audio, rate, self.sample_rate), audio.shape[1]

    def _collected(self, blocks, shape, nb_timesteps, rate):
        """Stems by name, at the rate and of the length of a recording, of the blocks of its audio of this shape."""
        stems = np.empty((len(self.sources), *shape), np.float32)
        for start, block in blocks:
            stems[:, :, start : start + block.shape[2]] = block
        return {name: resample(stem, self.sample_rate, rate, nb_timesteps) for name, stem in zip(self.sources, stems)}

    def stream(
        self, read: Callable[[int, int], np.ndarray], nb_channels: int, nb_timesteps: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Separate a recording at the model's rate, piece by piece.

        Args:
            read: function of (start, stop) that returns these samples, float32 (nb_channels, stop − start)
        Yields:
            start, stems (nb_sources, nb_channels, …): consecutive pieces of all stems
        """
        fade = tail = None  # the end of the piece before, faded out
        for start, stop, blocks in self._pieces(read, nb_timesteps):
            last = stop == nb_timesteps
            following = np.zeros((len(self.sources), nb_channels, 0 if last else self.overlap), np.float32)
            keep = stop - start - following.shape[2]  # from here on, the next piece takes over
            if fade is None and not last:  # flat where it begins: an estimate is worst at the end of its piece
                fade = (np.sin(np.linspace(0, np.pi / 2, self.overlap + 2)[1:-1]) ** 2).astype(np.float32)
            for position, block in blocks:
                end = position + block.shape[2]
                if tail is not None and position < self.overlap:
                    both = slice(position, min(end, self.overlap))
                    block[:, :, : both.stop - position] *= fade[both]
                    block[:, :, : both.stop - position] += tail[:, :, both]
                if end > keep:
                    begin = max(position, keep)
                    part = slice(begin - keep, end - keep)
                    following[:, :, part] = block[:, :, begin - position :] * fade[::-1][part]
                    block = block[:, :, : begin - position]
                if block.shape[2]:
                    yield start + position, block
            tail = following

    def _pieces(self, read, nb_timesteps):
        """(start, stop, blocks) of the pieces of a recording; arguments as of `stream`, blocks as of `_segment`.

        Two that are shorter than a segment are encoded at once, so that the weights of LSTMs are read once for both.
        """
        piece = self.piece if nb_timesteps > self.segment else self.segment
        starts = range(0, max(1, nb_timesteps - self.overlap), piece - self.overlap)
        places = [(start, min(start + piece, nb_timesteps)) for start in starts]
        at_once = min(2, self.segment // piece)
        for k in range(0, len(places), at_once):
            several = [read(*place) for place in places[k : k + at_once]]
            features = [None] * len(several)
            if self.is_spectral:
                pairs = zip(*map(self._parts, several))  # of channels: one pair after the other, as there may be many
                features = list(zip(*map(self._encode, pairs)))
            for place in places[k : k + at_once]:
                yield *place, self._segment(several.pop(0), features.pop(0))

    def _segment(self, x, features):
        """Pairs (0, …) of start and stems of audio x (nb_channels, nb_timesteps), window by window.

        `features` are those of its parts.
        """
        if not self.is_spectral:
            yield 0, self._waveforms(x)
            return
        parts = self._parts(x)
        pairs = [self._estimates(*pair) for pair in zip(parts, features)]
        overlap_add = kernels.spectra.OverlapAdd(self.n_fft, self.n_hop, x.shape[1])
        for parts in zip(*pairs):
            y = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
            for position, block in overlap_add(y):
                yield position, block
        for position, block in overlap_add.end():
            yield position, block

    def _parts(self, x):
        """What goes through the networks of spectrograms one at a time: pairs of channels."""
        length = x.shape[1]
        # shorter audio cannot be reflected at its ends, which the centred STFT does
        if length <= self.n_fft // 2:
            x = np.pad(x, ((0, 0), (0, self.n_fft // 2 + 1 - length)))
        return [x[k : k + 2] for k in range(0, len(x), 2)]

    def _waveforms(self, x):
        """Stems (nb_sources, nb_channels, nb_timesteps) of networks in the time domain."""
        stems = np.empty((len(self.sources), *x.shape), np.float32)
        for k in range(0, len(x), self.nb_channels):
            part = x[k : k + self.nb_channels]
            twice = len(part) < self.nb_channels
            with self._graphs():
                audio = nn.Variable.from_numpy_array((np.concatenate([part, part]) if twice else part)[None])
                estimates = ensemble.waveforms(*ensemble.encode(self.models, self.targets, [audio]))
            for stem, target in zip(stems, self.targets):
                stem[k : k + len(part)] = estimates[target].mean(axis=0) if twice else estimates[target]
        if self.residual:
            stems[-1] = x - stems[:-1].sum(axis=0)
        return stems

    def _estimates(self, x, features):
        """Spectra of all stems of one or two channels: (nb_sources, nb_channels, window, nb_bins) per window."""
        x, nb_channels = self._stereo(x), len(x)
        nb_frames = kernels.spectra.nb_frames(x.shape[1], self.n_fft, self.n_hop, center=True)
        window = self.wiener_win_len or nb_frames
        y = None
        for start in range(0, nb_frames, window):
            spectra = kernels.spectra.stft(x, self.n_fft, self.n_hop, start, min(start + window, nb_frames))
            X = kernels.spectra.magnitude(spectra, self.nb_channels == 1)
            with self._graphs():
                v = ensemble.magnitudes(features, X, start)
                if self.alpha != 1:
                    v **= np.float32(self.alpha)
            if y is None or y.shape[2] != v.shape[1]:
                y = np.empty((len(self.sources),) + spectra.shape, np.complex64)  # the memory of all windows
            filtering.source_spectra(v, spectra, self.niter, self.softmask, self.residual, self.wiener_eps, out=y)
            del spectra, X, v  # before the next ones come
            yield y.mean(axis=1, keepdims=True) if nb_channels < len(x) else y

    @contextlib.contextmanager
    def _graphs(self):
        """Where graphs are built and run. It must not span a yield: what runs in between has contexts of its own."""
        with context.exclusive(), nn.context_scope(self.context), nn.auto_forward(False):
            yield

    def _stereo(self, x):
        """One or two channels as the networks read them."""
        return np.concatenate([x, x]) if self.nb_channels == 2 and len(x) == 1 else x

    def _encode(self, parts):
        """Features of all frames of each part, see ensemble.py."""
        with self._graphs():
            features = ensemble.encode(self.models, self.targets, map(self._spectrogram, parts))
        nnabla_ext.cpu.clear_memory_cache()
        return features

    def _spectrogram(self, x):
        """Magnitudes of one or two channels, an input of graphs to come."""
        nnabla_ext.cpu.clear_memory_cache()  # that of the part before: they are the largest, and come only once
        audio = nn.Variable.from_numpy_array(self._stereo(x)[None])
        X = functions.spectrogram(audio, self.n_fft, self.n_hop, center=True, mono=self.nb_channels == 1)
        X.forward()
        return X.get_unlinked_variable(need_grad=False)


def _is(kind, value):
    """Whether it is a number of a kind: True and False are none, though Python counts with them."""
    return isinstance(value, kind) and not isinstance(value, (bool, np.bool_))


def _names(targets):
    """A list of names, which may be a single one, or None."""
    try:
        names = [targets] if isinstance(targets, str) else list(() if targets is None else targets)
    except TypeError:
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"targets {targets!r}: expected names")
    return names
