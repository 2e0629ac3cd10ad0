"""Mean and deviation of the spectra of a dataset, by which a network scales what it reads."""

from __future__ import annotations  # unions, on Python 3.9

from collections.abc import Iterable

import numpy as np
import scipy.fft
from tqdm import tqdm

from datasets.mixing import Item
from utils import whole


def magnitudes(audio: np.ndarray, n_fft: int, n_hop: int) -> np.ndarray:
    """Magnitude, averaged over channels, of uncentred frames of audio (nb_channels, nb_timesteps).

    Returns:
        (nb_frames, nb_bins) float32
    """
    window = np.hanning(n_fft + 1)[:-1].astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(audio, n_fft, axis=1)[:, ::n_hop]
    return np.abs(scipy.fft.rfft(frames * window)).mean(axis=0)


def statistics(mixtures: Iterable[Item], n_fft: int, n_hop: int, quiet: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per bin of the mixtures' magnitudes, over all frames of all of them.

    The reference's recipe: uncentred STFT of `Dataset.mixtures`, no augmentation, magnitude averaged over
    channels; deviations floored at 1e-4 of the largest. A bin that never changes counts as deviation 1,
    as in scikit-learn's StandardScaler, which the reference uses.

    Args:
        mixtures: none shorter than `n_fft`
    Returns:
        mean, std: float64 (nb_bins,)
    Raises:
        ValueError: no mixture, or one shorter than `n_fft`; sizes that cannot be.
        OSError: as `Recording.samples`.
    """
    whole("n_fft", n_fft), whole("n_hop", n_hop)
    mixtures = list(mixtures)
    if min((mixture.nb_timesteps for mixture in mixtures), default=0) < n_fft:
        raise ValueError(f"no mixtures, or one shorter than a frame of {n_fft} samples")
    count, mean, squares = 0, np.zeros(n_fft // 2 + 1), np.zeros(n_fft // 2 + 1)
    block = 512 * n_hop  # a few seconds at a time: a whole song's frames would take a gigabyte
    for mixture in tqdm(mixtures, "Dataset statistics", leave=False, disable=quiet):
        nb_frames = 1 + (mixture.nb_timesteps - n_fft) // n_hop
        used = (nb_frames - 1) * n_hop + n_fft
        for start in range(0, nb_frames * n_hop, block):
            audio = mixture.read_mixture(start, min(block - n_hop + n_fft, used - start))
            X = magnitudes(audio, n_fft, n_hop).astype(np.float64)
            # Chan, Golub & LeVeque 1979: merge two groups' means and sums of squared deviations
            n, delta = len(X), X.mean(axis=0) - mean
            squares += X.var(axis=0) * n + delta**2 * (count * n / (count + n))
            mean += delta * (n / (count + n))
            count += n
    std = np.sqrt(squares / count)
    # what rounding leaves of a constant bin, by the bound that scikit-learn uses
    eps = np.finfo(np.float64).eps
    std[std**2 <= count * eps * std**2 + (count * mean * eps) ** 2] = 1
    return mean, np.maximum(std, 1e-4 * std.max())
