"""Items of a dataset: what they are made of, and how that becomes a mixture and its targets."""

from __future__ import annotations  # unions, on Python 3.9

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from datasets.augmentations import AUGMENTATIONS, LENGTHS, MATRICES, longest
from datasets.recordings import Recording
from kernels.mixing import mix
from randomness import random_stream


class Part(NamedTuple):
    """A stem within an item: some recordings, added up, from sample `start` on.

    `mixture` says whether it is in the mixture, `targets` how much of it is in each target. `key` has the seed, epoch,
    index and source by which the `augmentations` draw.
    """

    recordings: tuple[Recording, ...]
    mixture: bool
    targets: tuple[float, ...]
    start: int = 0
    augmentations: tuple[str, ...] = ()
    key: dict = {}


class Item(NamedTuple):
    """One pair (mixture, targets) of `nb_timesteps` samples: the sum of its parts."""

    parts: Sequence[Part]
    nb_timesteps: int

    def render(self, mixture: np.ndarray, targets: Sequence[np.ndarray], start: int = 0) -> None:
        """Write it, or what there is of it from sample `start` on.

        Args:
            mixture: float32 (nb_channels, nb_timesteps)
            targets: of each, an array like it; none, if only the mixture is wanted
        """
        places = [mixture, *targets]
        touched = [False] * len(places)
        for part in self.parts:
            factors = [float(part.mixture), *part.targets][: len(places)]
            if not any(factors):
                continue
            for recording in part.recordings:
                samples, matrix = _augmented(part, recording, start, mixture.shape)
                for k, factor in enumerate(factors):
                    if factor:
                        mix(samples, matrix * np.float32(factor), places[k], touched[k])
                        touched[k] = True
        for place, is_touched in zip(places, touched):
            if not is_touched:
                place[:] = 0

    def read_mixture(self, start: int, nb_timesteps: int) -> np.ndarray:
        """A stretch of the mixture, float32 (nb_channels, nb_timesteps), as wide as its recordings."""
        widths = [recording.nb_channels for part in self.parts if part.mixture for recording in part.recordings]
        mixture = np.empty((min(2, max(widths)), nb_timesteps), np.float32)
        self.render(mixture, (), start)
        return mixture


_own = threading.local()
LARGEST_BUFFER = 2**24  # bytes; excerpts are smaller, and whole songs are rare


def _buffer(size):
    """Memory of this thread, used again: fresh memory would cost more time than what is read into it."""
    if size > LARGEST_BUFFER:
        return np.empty(size, np.uint8)
    if len(getattr(_own, "buffer", ())) < size:
        _own.buffer = np.empty(size, np.uint8)
    return _own.buffer


def _augmented(part, recording, start, shape):
    """Samples of a recording (nb_timesteps, 1 or 2), and the matrix that makes the channels of the item of them."""
    nb_channels, nb_timesteps = shape
    names, wanted = part.augmentations, longest(part.augmentations, nb_timesteps)
    if wanted > recording.nb_timesteps:  # there is no more of it: as it is, rather than silence at the end
        names, wanted = [name for name in names if AUGMENTATIONS[name] not in LENGTHS], nb_timesteps
    functions = [(AUGMENTATIONS[name], random_stream("augmentation", **part.key, name=name)) for name in names]
    is_matrix = all(function in MATRICES for function, _ in functions)
    first = part.start + start
    if wanted > nb_timesteps:
        first = min(first, recording.nb_timesteps - wanted)
    buffer = _buffer(4 * wanted * recording.nb_channels)
    samples = recording.samples(first, wanted, None if is_matrix else "float32", buffer)
    if recording.nb_channels > 2:
        samples = np.ascontiguousarray(samples[:, :2])
    audio = np.eye(samples.shape[1], dtype=np.float32) if is_matrix else samples.T
    if len(audio) < nb_channels:
        audio = np.repeat(audio, nb_channels, axis=0)
    for function, rng in functions:
        audio = function(audio, rng)
    if is_matrix:
        return samples, np.ascontiguousarray(audio)
    return np.array(audio[:, :nb_timesteps].T, np.float32, order="C"), np.eye(nb_channels, dtype=np.float32)
