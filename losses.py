"""What a training minimises: each loss is a function of `Signals`, and a line in `LOSSES`."""

from __future__ import annotations  # unions, on Python 3.9

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, combinations
from typing import Any, NamedTuple

import nnabla as nn
import nnabla.functions as F
import numpy as np

import context
import fast
import foreign
import functions
import kernels.correlations
from utils import UsageError


class Signals:
    """What a loss may compare: of a mixture, its targets and their estimates. What is not asked for is not computed.

    Shapes: audio (nb_samples, nb_channels, nb_timesteps). In a network's domain "spectrogram", magnitudes are
    (nb_frames, nb_samples, nb_channels, nb_bins); in the domain "audio" they are audio, and each pair below is one.

    Attributes:
        x: the mixture, audio; X: what the network reads of it
        y: {target: audio}; Y: {target: the same in the network's domain}
        Y_hat: {target: estimate in the network's domain}
        y_hat: {target: audio of the estimate}, of a magnitude by the mixture's phase; it is whole in `samples` only
        samples: the first sample at which the audio of an estimate is whole, and the one after the last
        targets: their names, in the order of the dicts
    """

    def __init__(self, model: Any, x: nn.Variable, y: dict[str, nn.Variable], test: bool = False):
        """
        Args:
            model: a `trained.Model`
            test: running statistics, no dropout
        """
        self.model, self.x, self.y, self.targets = model, x, y, list(y)
        self.X = model.represent(x)
        self.Y_hat = model.estimates(self.X, test)

    @functools.cached_property
    def Y(self) -> dict[str, nn.Variable]:
        return {target: self.model.represent(y) for target, y in self.y.items()}

    @functools.cached_property
    def y_hat(self) -> dict[str, nn.Variable]:
        if self.model.domain == "audio":
            return self.Y_hat
        magnitudes = [self.Y_hat[target] for target in self.targets]
        audio = functions.waveforms(magnitudes, self.x, self.model.n_fft, self.model.n_hop)
        return dict(zip(self.targets, audio))

    @functools.cached_property
    def samples(self) -> tuple[int, int]:
        if self.model.domain == "audio":
            return 0, self.x.shape[2]
        n_fft, n_hop = self.model.n_fft, self.model.n_hop
        start, stop = n_fft - n_hop, self.X.shape[0] * n_hop  # where frames before and behind are missing
        if not start < stop:
            raise ValueError(
                f"an excerpt or a track of {self.x.shape[2]} samples is too short: the way back to audio needs two "
                f"windows, {2 * n_fft} samples"
            )
        return start, stop


# ------------------------------------------------------------------------------- how far audio is from audio

SDR_EPS = 1e-7  # of mean squares, −70 dB of full scale


def negative_sdr(y_hat: nn.Variable, y: nn.Variable, start: int = 0, stop: int | None = None) -> nn.Variable:
    """10 log₁₀ (⟨(y_hat − y)²⟩ + ε) / (⟨y²⟩ + ε), minus the signal-to-distortion ratio in dB; mean over samples, ().

    The mean squares ⟨…⟩ are over channels and time. ε, 1e-7, makes it a number where the target is silent, and lets
    errors below −70 dB count for nothing (the definition of the Music Demixing Challenge 2021, Mitsufuji et al.,
    Frontiers in Signal Processing 2022, with means for sums).

    Args:
        y_hat, y: estimate and target (N, C, nb_timesteps); no gradient flows to the target
        start, stop: samples that count; None: to the end
    Raises:
        ValueError: shapes differ, or no samples count.
    """
    functions.check_pair(y_hat, y)
    start, stop = _samples(y, start, stop)
    if context.fast():
        return fast.negative_sdr(y_hat, y, start, stop, SDR_EPS)
    y_hat, y = (_rows(v, start, stop, axis=1) for v in (y_hat, y))
    size = y.shape[1]
    error, energy = (_product(v, v) / size + SDR_EPS for v in (y_hat - y, y))
    return F.mean(F.log(error / energy)) * (10 / math.log(10))


def weighted_sdr(
    x: nn.Variable,
    estimates: Sequence[nn.Variable],
    targets: Sequence[nn.Variable],
    sets: Sequence[Sequence[int]],
    start: int = 0,
    stop: int | None = None,
) -> nn.Variable:
    """The time-domain loss of X-UMX, for sets of targets; within 0 … 2, shape ().

    Of a set, let y be the sum of its targets, p that of its estimates, and ρ = |y|² / (|y|² + |x − y|²). The loss is
        1 − ρ ⟨y, p⟩ / |y| |p| − (1 − ρ) ⟨x − y, x − p⟩ / |x − y| |x − p|,
    mean over sets, samples and channels (Sawata et al., ICASSP 2021, equation 4; the 1 and the ε that keep it a number
    in silence are those of Sony's implementation).

    Args:
        x: mixture (N, C, nb_timesteps); no gradient flows to it, nor to targets
        estimates, targets: of each target, of the shape of x
        sets: which targets are added up, by their indices
        start, stop: samples that count; None: to the end
    Raises:
        ValueError: shapes differ, or no samples count.
    """
    for v in (*estimates, *targets):
        functions.check_pair(v, x)
    start, stop = _samples(x, start, stop)
    if context.fast():
        members = np.array([[float(i in some) for i in range(len(targets))] for some in sets])
        return fast.weighted_sdr(x, list(estimates), list(targets), members, start, stop)
    x, *signals = (_rows(v, start, stop, axis=2) for v in (x, *estimates, *targets))
    losses = []
    for some in sets:
        p, y = (sum(signals[offset + i] for i in some) for offset in (0, len(targets)))
        energy, rest = _product(y, y), _product(x - y, x - y)
        rho = energy / (energy + rest + WEIGHTED_SDR_EPS)
        losses.append(1 - F.mean(rho * _cosine(y, p) + (1 - rho) * _cosine(x - y, x - p)))
    return sum(losses) / len(losses)


WEIGHTED_SDR_EPS = kernels.correlations.EPS


def _samples(x, start, stop):
    stop = x.shape[2] if stop is None else stop
    if not 0 <= start < stop <= x.shape[2]:
        raise ValueError(f"samples {start} … {stop} of {x.shape[2]}: there is nothing to compare")
    return start, stop


def _rows(x, start, stop, axis):
    """Audio (N, C, nb_timesteps) from start to stop as rows; channels are in one if axis is 1."""
    x = F.slice(x, start=(0, 0, start), stop=(*x.shape[:2], stop))
    return F.reshape(x, (math.prod(x.shape[:axis]), -1))


def _product(a, b):
    """Inner products of rows (R, L), shape (R,), by a matrix product: F.sum adds float32 one by one."""
    rows, size = a.shape
    return F.reshape(F.batch_matmul(F.reshape(a, (rows, 1, size)), F.reshape(b, (rows, size, 1))), (rows,))


def _cosine(a, b):
    sizes = [(_product(v, v) + WEIGHTED_SDR_EPS) ** 0.5 for v in (a, b)]
    return _product(a, b) / (sizes[0] * sizes[1] + WEIGHTED_SDR_EPS)


# ------------------------------------------------------------------------------------------ the losses


def mse(signals: Signals) -> nn.Variable:
    """Mean squared error in the network's domain, summed over targets: that of Open-Unmix."""
    return sum_over_targets(functions.squared_error, signals.Y_hat, signals.Y)


def l1(signals: Signals) -> nn.Variable:
    """Mean absolute error in the network's domain, summed over targets."""
    return sum_over_targets(functions.absolute_error, signals.Y_hat, signals.Y)


def sdr(signals: Signals) -> nn.Variable:
    """Minus the signal-to-distortion ratio of the audio in dB, summed over targets; of silent ones, too."""

    def error(y_hat, y):
        return negative_sdr(y_hat, y, *signals.samples)

    return sum_over_targets(error, signals.y_hat, signals.y)


def xumx(signals: Signals, mcoef: float = 10.0, combinations: bool = True) -> nn.Variable:
    """X-UMX's: squared error in the network's domain + mcoef · weighted SDR of the audio, mean over sets of targets.

    Sets are all combinations of one to all but one of the targets, added up (14 of 4), or without `combinations` each
    target alone. Sawata et al., All for One and One for All, ICASSP 2021, section 3; as Sony's implementation does it.
    """
    nb_targets = len(signals.targets)
    sets = sets_of(nb_targets) if combinations else sets_of(nb_targets, largest=1)
    loss = _squared_error_of_sets(signals, sets)
    if mcoef:
        estimates, targets = ([some[target] for target in signals.targets] for some in (signals.y_hat, signals.y))
        loss = loss + mcoef * weighted_sdr(signals.x, estimates, targets, sets, *signals.samples)
    return loss


def sum_over_targets(error: Callable, estimates: dict, targets: dict) -> nn.Variable:
    """Σ error(estimate, target)."""
    errors = [error(estimate, targets[target]) for target, estimate in estimates.items()]
    return sum(errors[1:], errors[0])


def sets_of(nb_targets: int, largest: int | None = None) -> list[tuple]:
    """All combinations of 1 … `largest` of so many targets, by default all but one: tuples of indices."""
    largest = max(1, nb_targets - 1) if largest is None else largest
    sizes = range(1, largest + 1)
    return list(chain.from_iterable(combinations(range(nb_targets), size) for size in sizes))


def _squared_error_of_sets(signals, sets):
    """Mean over sets of the squared error of their sums.

    Let e be the error of each target, and let `one` sets hold a given target, `two` of them a given pair. Then
        Σ |Σ e|² over sets = one Σ |e|² + two Σ e e' over pairs = (one − two) Σ |e|² + two |Σ e|²,
    in which all sets together cost little more than each target alone.
    """
    one, two = (sum({0, other} <= set(some) for some in sets) for other in (0, 1))
    loss = (one - two) * sum_over_targets(functions.squared_error, signals.Y_hat, signals.Y)
    if two:
        together = [F.add_n(*(some[target] for target in signals.targets)) for some in (signals.Y_hat, signals.Y)]
        loss = loss + two * functions.squared_error(*together)
    return loss / len(sets)


LOSSES = {"mse": mse, "l1": l1, "sdr": sdr, "xumx": xumx}
OPTIONS = ("mcoef", "combinations")  # arguments of any of them that have an option of the command line


# ------------------------------------------------------------------------------------------ choosing one


class Own(NamedTuple):
    """A loss that is not ours, as a user names it."""

    name: str  # by which a training refers to it, FILE.py:FUNCTION
    function: Callable[[Signals], nn.Variable]


def read(name: str) -> Own | None:
    """The function FUNCTION of the Python file FILE, from "FILE.py:FUNCTION"; the file is run. None for other names.

    Raises:
        UsageError: no such file or function, or an error while it runs; so does the function for its errors.
    """
    if ":" not in name:
        return None
    path, attribute, found = foreign.read("--loss", name, "FUNCTION")
    if not callable(found):
        raise UsageError(f"--loss {name}: {path} has no function {attribute}")

    @functools.wraps(found)
    def loss(signals, **options):
        value = foreign.call(path, f"--loss {name}", found, signals, **options)
        shape = getattr(value, "shape", type(value).__name__)
        if shape != ():
            raise UsageError(f"--loss {name} returns {shape}: expected a variable of shape ()")
        return value

    return Own(f"{path.name}:{attribute}", loss)


def choose(
    name: str, options: dict[str, Any], given: Iterable[str] = (), own: Own | None = None
) -> Callable[[Signals], nn.Variable]:
    """The loss of this name, a function of signals.

    Args:
        options: all of `OPTIONS`, for the losses that have them
        given: names of options that were asked for, of other things, too
        own: the one that was read, if it is not ours
    Raises:
        UsageError: there is no such loss, or it does not have one of `OPTIONS` that is given.
    """
    if ":" in name and own is None:
        raise UsageError(f"the loss of this training is not ours, name its file again: --loss {name}")
    if not own and name not in LOSSES:
        raise UsageError(f"--loss {name}: there are {', '.join(LOSSES)}, and FILE.py:FUNCTION")
    function = own.function if own else LOSSES[name]
    known = [option for option in OPTIONS if option in inspect.signature(function).parameters]
    if unknown := sorted(set(given) & set(OPTIONS) - set(known)):
        raise UsageError(f"--loss {name} has no option {unknown[0]}: it has {', '.join(known) or 'none'}")
    return functools.partial(function, **{option: options[option] for option in known})


@context.exclusive()
def check(name: str, loss: Callable[[Signals], nn.Variable], model: Any, shape: tuple) -> None:
    """UsageError, which names the loss, unless it can be computed of audio of this shape; nothing is computed."""
    try:
        loss(Signals(model, nn.Variable(shape), {target: nn.Variable(shape) for target in model.targets}))
    except UsageError:  # which says whose it is
        raise
    except ValueError as error:
        raise UsageError(f"--loss {name}: {error}") from None
