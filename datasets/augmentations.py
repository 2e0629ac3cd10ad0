"""What may be done to each source of a training mixture."""

from __future__ import annotations  # unions, on Python 3.9

import math
from collections.abc import Callable

import numpy as np
import soxr


def gain(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Audio (nb_channels, nb_timesteps) times a random factor in [0.25, 1.25)."""
    return audio * np.float32(0.25 + rng.random())


def channelswap(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stereo audio (2, nb_timesteps) with its channels swapped, with a probability of one half."""
    return audio[::-1] if len(audio) == 2 and rng.random() < 0.5 else audio


def force_stereo(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The first two channels; of one, it twice."""
    return np.repeat(audio, 2, axis=0) if len(audio) == 1 else audio[:2]


def force_mono(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mean of all channels, in as many."""
    return np.repeat(audio.mean(axis=0, dtype=np.float32, keepdims=True), len(audio), axis=0)


def pitch(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Audio higher or lower, and faster or slower, by up to two semitones, as of a tape; with a probability of 0.2.

    Défossez et al., "Music Source Separation in the Waveform Domain" (arXiv 1911.13254), change pitch and tempo of a
    fifth of the sources; so do Cohen-Hadria et al., "Improving singing voice separation using Deep U-Net and
    Wave-U-Net with data augmentation" (EUSIPCO 2019), of whole songs. They change the two apart from each other.
    """
    changed, semitones = rng.random() < 0.2, rng.uniform(-2, 2)
    return soxr.resample(np.array(audio.T, order="C"), 2 ** (semitones / 12), 1).T if changed else audio


# The one place that names them; another one is a function as above, and a line here.
AUGMENTATIONS: dict[str, Callable] = {
    "gain": gain,
    "channelswap": channelswap,
    "force_stereo": force_stereo,
    "force_mono": force_mono,
    "pitch": pitch,
}

# Those that do the same to every sample, a product with a matrix: applied to unit vectors they give it, and the samples
# need not be touched but once, when they are mixed.
MATRICES = {gain, channelswap, force_stereo, force_mono}

# How much audio an augmentation wants, as a multiple of what is left of it.
LENGTHS = {pitch: 2 ** (2 / 12)}

# Not of a source alone: the same source of another item of the epoch, each once. Défossez et al. (arXiv 1911.13254)
# shuffle the sources within a batch; here among all items, so that no draw depends on the size of batches.
REMIX = "remix"


def longest(names: tuple[str, ...], nb_timesteps: int) -> int:
    """How many samples augmentations want, to leave `nb_timesteps`."""
    factor = math.prod(LENGTHS.get(AUGMENTATIONS[name], 1) for name in names)
    return nb_timesteps if factor == 1 else math.ceil(nb_timesteps * factor) + 1
