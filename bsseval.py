"""BSSEval v4, exact and fast: the scores of museval.evaluate, and whether they are more than noise.

Also the scores of later work, which need no filters: `sdr` of the music demixing challenges, `si_sdr`. Arrays in,
arrays out, references and estimates (nb_sources, nb_timesteps, nb_channels); inputs are never modified.
"""

from __future__ import annotations  # unions, on Python 3.9

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

import kernels.bsseval

METRICS = ("SDR", "ISR", "SIR", "SAR")
VERSION = 1  # of the scores: another one if they change by more than rounding
MAX_SOURCES = 100  # as in museval: more are channels or samples in the wrong place
ALARM = 1e13  # a condition below which scores were never seen to move by a thousandth of a dB
NOISE = 0.5 * np.finfo(float).eps  # of museval's correlations, relative to energies: seen were 0.01 to 0.4
PIECE = 1 << 14  # samples that are read at a time

# ---------------------------------------------------------------------------------------- BSSEval


class Scores(NamedTuple("Scores", [(metric, np.ndarray) for metric in METRICS])):
    """SDR, ISR, SIR and SAR in dB, each (nb_sources, nb_frames): a tuple of four, which knows more.

    Attributes:
        conditions: (nb_sources + 1,) of the equations for the filters of each source, and for those of all together,
            in the 1-norm; infinite if double precision does not determine the filters
        movement: {metric: (nb_sources, nb_frames)} in dB: by how much a score moves if the input is rounded
            differently in its last bit; zero if the conditions are below ALARM
    """

    conditions: np.ndarray
    movement: dict[str, np.ndarray]

    @property
    def doubtful(self) -> dict[str, np.ndarray]:
        """{metric: (nb_sources,)}: whether some frame's score moves by more than 0.01 dB: then it is noise.

        So it is with references in floating point that were decoded from MP3 or AAC, which cut off high
        frequencies: what the filters do there is determined by rounding alone. 16 bits, in which MUSDB18 is usually
        read, bring noise enough. SDR needs no filters.
        """
        return {metric: np.any(movement > 0.01, axis=1) for metric, movement in self.movement.items()}


def evaluate(references: np.ndarray, estimates: np.ndarray, win: float = 44100, hop: float = 44100) -> Scores:
    """BSSEval v4 as museval.evaluate computes it with its defaults, exactly, in a fraction of time and memory.

    An estimate e of a source s is compared with its projection P_j e on delayed versions, by 0 to 511 samples, of
    the channels of s, and its projection P e on those of all sources. The filters that project are those of the
    whole song; energies |·|² are of a frame, filtered as if there were silence around it:

        SDR = |s|² / |e − s|²   ISR = |s|² / |P_j e − s|²   SIR = |P_j e|² / |P e − P_j e|²   SAR = |P e|² / |e − P e|²

    Channels that are sums of others, as in a centred source, add nothing to a projection and are left out. An SIR
    that would be infinite, as of sources that are copies of each other, ends at 313 dB, unless there is one source.

    Beside its input, it needs memory for the equations, 134 MB for four stereo sources (it grows with the square of
    the channels), and about 150 MB more, however long the song is.

    Args:
        references, estimates: real numbers of any type; (nb_sources, nb_timesteps) is mono. Estimates that are
            longer are cut off, and shorter ones are followed by silence.
        win, hop: samples of a frame, and from frame to frame; the end that fills no frame is not scored, but one
            frame of all if win is longer than the song
    Returns:
        Scores; NaN for all sources in frames where a source or an estimate is silent, that is, its channels sum to
        zero
    Raises:
        ValueError: shapes or types do not fit, numbers are not finite, a source or an estimate is silent throughout.

    E. Vincent, R. Gribonval and C. Févotte, "Performance measurement in blind audio source separation", IEEE TASLP
    2006; F.-R. Stöter, A. Liutkus and N. Ito, "The 2018 signal separation evaluation campaign", LVA/ICA 2018.

    >>> references = np.random.default_rng(0).normal(size=(2, 30000, 2))  # 2 sources, 30000 samples, stereo
    >>> SDR, ISR, SIR, SAR = evaluate(references, references + references[::-1], win=10000, hop=10000)
    >>> SDR.shape
    (2, 3)
    """
    x, y = _checked(references, estimates)
    frames = _frames(x.shape[1], win, hop)
    for audio, what in ((x, "reference"), (y, "estimate")):
        for j, source in enumerate(audio):
            if _silent(source, 0, x.shape[1]):
                raise ValueError(f"the {what} of source {j} is silent: BSSEval gives it no score")
    with np.errstate(over="ignore", invalid="ignore"):
        r = kernels.bsseval.correlations(x, y)
    if not np.isfinite(r).all():
        raise ValueError("references or estimates hold numbers that are NaN, infinite or too large")
    n = len(r)
    nb_sources, nb_channels = x.shape[0], x.shape[2]
    groups = [slice(start, start + nb_channels) for start in range(0, n, nb_channels)]
    kept = [_independent(x[j : j + 1], r[group, group, 0]) for j, group in enumerate(groups)]
    kept_of_all = _independent(x, r[:, :n, 0])
    sounding = [t for t, frame in enumerate(frames) if not any(_silent(source, *frame) for source in (*x, *y))]

    def score(r):
        r, d = r[:, :n], r[:, n:]
        own, conditions = zip(
            *(kernels.bsseval.solve(r[g, g], d[g, g], some, x.shape[1]) for g, some in zip(groups, kept))
        )
        joint, condition = own[0], conditions[0]
        if nb_sources > 1:
            joint, condition = kernels.bsseval.solve(r, d, kept_of_all, x.shape[1])
        energies = np.full((7, nb_sources, len(frames)), np.nan)
        some = [frames[t] for t in sounding]
        energies[:, :, sounding] = kernels.bsseval.energies(x, y, some, np.stack(own), joint).T
        source, distortion, spatial, target, interference, projection, artifacts = energies
        if nb_sources > 1:
            interference = np.maximum(interference, np.finfo(float).eps ** 2 * target)
        scores = _decibels(source, distortion), _decibels(source, spatial)
        return (*scores, _decibels(target, interference), _decibels(projection, artifacts)), [*conditions, condition]

    four, conditions = score(r)
    scores = Scores(*four)
    scores.conditions = np.array(conditions)
    scores.movement = {metric: np.zeros_like(values) for metric, values in zip(METRICS, four)}
    if scores.conditions.max() > ALARM:
        pieces = (y[:, t : t + PIECE].astype(float) for t in range(0, y.shape[1], PIECE))
        level = np.sqrt([*r[range(n), range(n), 0], *sum((piece**2).sum(axis=1) for piece in pieces).ravel()])
        noise = NOISE * level[:n, None, None] * level[:, None] * np.random.default_rng(0).standard_normal(r.shape)
        for metric, before, after in zip(METRICS, four, score(r + noise)[0]):
            with np.errstate(invalid="ignore"):
                scores.movement[metric] = np.where(before == after, 0, np.abs(after - before))
    return scores


def _independent(x, energies):
    """The channels of x (…, nb_channels) that are no sum of earlier ones but for rounding.

    Args:
        energies: Σ_t x_i x_k (n, n), whose own rounding can only tell which ones to look at
    """
    nb_channels, kept = x.shape[2], []
    for k, energy in enumerate(energies.diagonal()):
        weights = np.linalg.lstsq(energies[np.ix_(kept, kept)], energies[kept, k], rcond=None)[0]
        if energy - weights @ energies[kept, k] <= 1e-12 * energy:
            rest, terms = 0.0, [(k, 1), *zip(kept, -weights)]
            for t in range(0, x.shape[1], PIECE):
                part = sum(w * x[i // nb_channels, t : t + PIECE, i % nb_channels].astype(float) for i, w in terms)
                rest += np.vdot(part, part)
            if rest <= 1e-24 * energy:
                continue
        kept.append(k)
    return kept


# --------------------------------------------------------------------------------- without filters


def sdr(references: np.ndarray, estimates: np.ndarray, win: float = math.inf, hop: float = math.inf) -> np.ndarray:
    """The SDR of the music demixing challenges, of whole songs or of frames: (nb_sources, nb_frames) in dB.

    10 log₁₀((Σ s² + ε) / (Σ (s − e)² + ε)), ε = 1e-7, summed over all samples and channels. So it is defined where a
    source is silent, and tells how loud its estimate is: 10 log₁₀(ε / (Σ e² + ε)), at best 0.

    Args, Raises: as of `evaluate`, but that silence is no error.

    Y. Mitsufuji et al., "Music demixing challenge 2021", Frontiers in Signal Processing 2022.
    """
    x, y = _checked(references, estimates)
    frames, eps = _frames(x.shape[1], win, hop), 1e-7
    source, distortion = np.full((2, len(x), len(frames)), eps)
    for j, t, s, e in _pieces(x, y, frames):
        source[j, t] += np.vdot(s, s)
        distortion[j, t] += np.vdot(s - e, s - e)
    return _decibels(source, distortion)


def si_sdr(references: np.ndarray, estimates: np.ndarray, win: float = math.inf, hop: float = math.inf) -> np.ndarray:
    """The scale-invariant SDR, of whole songs or of frames: (nb_sources, nb_frames) in dB.

    10 log₁₀(Σ (a s)² / Σ (a s − e)²) with a = Σ e s / Σ s², summed over all samples and channels: one gain for all
    channels. Means are not subtracted. NaN where a source or an estimate is silent; minus infinity where they have
    nothing in common.

    Args, Raises: as of `evaluate`, but that silence is no error.

    J. Le Roux et al., "SDR – half-baked or well done?", ICASSP 2019.
    """
    x, y = _checked(references, estimates)
    frames = _frames(x.shape[1], win, hop)
    source, common, rest = np.zeros((3, len(x), len(frames)))
    for j, t, s, e in _pieces(x, y, frames):
        source[j, t] += np.vdot(s, s)
        common[j, t] += np.vdot(e, s)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = common / source
        for j, t, s, e in _pieces(x, y, frames):
            part = gain[j, t] * s - e
            rest[j, t] += np.vdot(part, part)
        return 10 * np.log10(gain**2 * source / rest)


# ------------------------------------------------------------------------------------ what all share


def _checked(references, estimates):
    """Both as arrays of three dimensions, the estimates not longer than the references."""
    x, y = np.asarray(references), np.asarray(estimates)
    for audio, what in ((x, "references"), (y, "estimates")):
        if audio.dtype.kind not in "biuf":
            raise ValueError(f"{what} of type {audio.dtype}: expected real numbers")
        if audio.ndim not in (2, 3) or audio.size == 0:
            raise ValueError(f"{what} of shape {audio.shape}: expected (nb_sources, nb_timesteps, nb_channels)")
    x, y = np.atleast_3d(x), np.atleast_3d(y)
    if x.shape[::2] != y.shape[::2] or len(x) > MAX_SOURCES:
        raise ValueError(
            f"references of shape {x.shape} and estimates of shape {y.shape}: expected (nb_sources, nb_timesteps, "
            f"nb_channels), the same sources and channels of both, and at most {MAX_SOURCES} sources"
        )
    return x, y[:, : x.shape[1]]


def _frames(nb_timesteps, win, hop):
    """(start, stop) of museval's frames: those that are whole, or one of everything."""
    if not (win > 0 and hop > 0):
        raise ValueError(f"frames of {win} samples every {hop}: expected positive numbers")
    if win >= nb_timesteps:
        return [(0, nb_timesteps)]
    if hop == math.inf:
        return [(0, math.floor(win))]
    starts = (i * hop for i in range(math.floor((nb_timesteps - win + hop) / hop)))
    return [(math.floor(start), math.floor(min(start + win, nb_timesteps))) for start in starts]


def _silent(source, start, stop):
    """museval's idea of silence: the channels of a source (nb_timesteps, nb_channels) sum to zero everywhere."""
    return not any(source[t : min(stop, t + PIECE)].sum(axis=1).any() for t in range(start, stop, PIECE))


def _pieces(x: np.ndarray, y: np.ndarray, frames: list[tuple[int, int]]) -> Iterator[tuple]:
    """(source, frame, samples of its reference, of its estimate), in double precision, not too many at a time."""
    for j in range(len(x)):
        for t, (start, stop) in enumerate(frames):
            for at in range(start, stop, PIECE):
                s = x[j, at : min(stop, at + PIECE)].astype(float)
                e, part = np.zeros_like(s), y[j, at : at + len(s)]
                e[: len(part)] = part
                yield j, t, s, e


def _decibels(numerator, denominator):
    """museval's: infinite wherever the denominator is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.inf, 10 * np.log10(numerator / denominator))
