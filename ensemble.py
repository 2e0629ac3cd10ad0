"""Several trained models as one: for each target, the mean of the estimates of all that have it.

Each estimate has errors of its own, besides those that all share, and the mean has less of the former. So S. Uhlich et
al., "Improving music source separation based on deep neural networks through data augmentation and network blending",
ICASSP 2017, blend two networks: their raw estimates, before the Wiener filter.
"""

from __future__ import annotations  # unions, on Python 3.9

import os
from collections.abc import Iterable, Sequence

import nnabla as nn
import nnabla_ext.cpu
import numpy as np

import trained
from utils import UsageError

Features = dict[str, list[tuple[trained.Model, np.ndarray]]]


def load_models(
    model: str | os.PathLike | Sequence[str | os.PathLike],
    targets: list[str] | None = None,
    model_dir: str | None = None,
    network: trained.Network | None = None,
    quiet: bool = True,
) -> list[trained.Model]:
    """What `trained.load_models` gives of one or of several.

    Raises:
        UsageError: as there; or models that differ in their targets (unless some are asked for, which all have), STFT,
            sample rate, channels or domain.
    """
    names = [model] if isinstance(model, (str, os.PathLike)) else model
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, (str, os.PathLike)) for n in names):
        raise UsageError(f"model is {model!r}: expected a name, a folder or a file, or a list of them")
    loaded = [trained.load_models(name, targets, model_dir, network, quiet)[0] for name in names]
    first, *others = (({t for one in models for t in one.targets}, models[0]) for models in loaded)
    for name, other in zip(names[1:], others):
        if not targets and (lacking := sorted(first[0] ^ other[0])):
            one, two = (names[0], name) if lacking[0] in first[0] else (name, names[0])
            raise UsageError(f"{one} has the target {lacking[0]!r}, {two} has not: name --targets that all models have")
        one, two = ({**model.config, "domain": model.domain} for _, model in (first, other))
        for key, value in one.items():
            if two[key] != value:
                raise UsageError(f"{names[0]} has {key} {value}, {name} {two[key]}: they cannot be averaged")
    return [one for models in loaded for one in models]


def encode(models: list[trained.Model], targets: list[str], recordings: Iterable[nn.Variable]) -> list[Features]:
    """Of each recording {target: pairs of a model that has it, and its features of all frames}.

    Args:
        recordings: what `trained.Model.represent` gives of each; the next one is asked for when the last one, which may
            be large, is no longer needed
    """
    models = [model for model in models if not set(targets).isdisjoint(model.targets)]
    bottlenecks = [[] for _ in models]
    for x in recordings:
        for model, found in zip(models, bottlenecks):
            found += _computed([model.bottleneck(x)])
        del x
    features = [{target: [] for target in targets} for _ in bottlenecks[0]]
    for model in models:
        nnabla_ext.cpu.clear_memory_cache()  # of bottlenecks that are no longer needed
        for ours, found in zip(features, _computed(model.listen(bottlenecks.pop(0)))):
            for target in ours.keys() & found.keys():
                ours[target].append((model, found[target].data.get_data("r", np.float32).copy()))
    return features


def _computed(recordings):
    """Variables {target: variable} of each recording with the values that their graphs give, and without these."""
    nn.forward_all([h for one in recordings for h in one.values() if h.parent], clear_buffer=True)  # inputs have none
    return [{target: h.get_unlinked_variable(need_grad=False) for target, h in one.items()} for one in recordings]


def waveforms(features: Features) -> dict[str, np.ndarray]:
    """{target: (nb_channels, nb_timesteps)}, of networks in the time domain."""
    return {target: np.mean([y[0] for _, y in found], axis=0) for target, found in features.items()}


def magnitudes(features: Features, X: np.ndarray, start: int) -> np.ndarray:
    """Estimates (nb_targets, nb_frames, nb_channels, nb_bins), of networks of spectrograms.

    Args:
        X: some frames of the mixture's magnitude (nb_frames, 1, nb_channels, nb_bins)
        start: number of the first of them
    """
    v = np.empty((len(features), len(X)) + X.shape[2:], np.float32)
    mixture = nn.Variable.from_numpy_array(X)
    for estimate, (target, found) in zip(v, features.items()):
        for k, (model, h) in enumerate(found):
            Y = model.decode(target, nn.Variable.from_numpy_array(h[start : start + len(X)]), mixture)
            if Y.parent:  # else these are the features themselves
                Y.forward(clear_buffer=True)
            # a magnitude is not negative, which a network that is not ours need not know
            magnitude = np.maximum(Y.data.get_data("r", np.float32)[:, 0], 0, out=None if k else estimate)
            if k:
                estimate += magnitude
        if len(found) > 1:
            estimate /= len(found)
    return v
