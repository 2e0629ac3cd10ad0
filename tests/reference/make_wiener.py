"""Makes tests/data/golden_wiener.npz, for tests/test_filtering.py, with the reference: openunmix 1.3.0.

    python make_wiener.py OUT.npz

Runs in the environment of make_cases.py. The reference computes in double precision, so that the file holds
what it means rather than how it rounds; the file holds single precision, to be small.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))  # our stand-in for torchaudio, before openunmix imports it

from openunmix import filtering

SIZES = {  # frames, bins, channels of v, channels, sources
    "stereo": (8, 7, 2, 2, 3),
    "mono": (8, 7, 1, 1, 3),
    "shared": (8, 7, 1, 2, 2),  # a mono model on stereo: magnitudes that both channels share
    "long": (230, 3, 2, 2, 2),  # the reference works through 200 frames at a time
}


def reference(v, x, iterations, softmask, residual):
    """openunmix.filtering.wiener on complex arrays: (nb_frames, nb_bins, nb_channels, nb_sources)."""
    pairs = torch.view_as_real(torch.from_numpy(x.astype(np.complex128)))  # a copy: it is written to
    y = filtering.wiener(torch.from_numpy(v.astype(np.float64)), pairs, iterations, softmask, residual)
    return torch.view_as_complex(y.movedim(3, -1).contiguous()).numpy()


def main(path):
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (nb_frames, nb_bins, v_channels, nb_channels, nb_sources) in SIZES.items():
        # Magnitudes of music: over a wide range, up to some 50, so that the filter scales them. In bins 0 to 2
        # frames 3 and 4 are silent; in bin 5, the last source.
        x = rng.normal(size=(nb_frames, nb_bins, nb_channels, 2)) @ (1, 1j)
        x *= np.exp(rng.normal(0, 1.5, (nb_frames, nb_bins, 1)))
        v = np.abs(x[..., None]).mean(axis=2, keepdims=True) if v_channels < nb_channels else np.abs(x[..., None])
        v = v * rng.uniform(0, 0.8, v.shape[:-1] + (nb_sources,))
        x[3:5, :3] = v[3:5, :3] = 0
        v[:, 5:6, :, -1] = 0
        v, x = v.astype(np.float32), x.astype(np.complex64)
        arrays[f"{name}/v"], arrays[f"{name}/x"] = v, x
        everything = itertools.product((0, 1, 2), (False, True), (False, True))
        for options in [(1, False, False)] if name == "long" else everything:
            iterations, softmask, residual = options
            key = f"{name}/{iterations}" + "-softmask" * softmask + "-residual" * residual
            arrays[key] = reference(v, x, *options).astype(np.complex64)
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
