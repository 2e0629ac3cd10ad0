"""Excerpts: interleaved samples, as files hold them, times a matrix of channels, into their place in a batch."""

import numpy as np
from numba import types

from kernels.compiler import IN, INT, OUT, inline, kernel

INT16 = types.Array(types.int16, 2, "C", readonly=True)


BLOCK = 2048  # samples that stay in the first-level cache while all channels are made of them


@inline
def _mix(samples, matrix, is_first, out):
    nb_timesteps, nb_inputs = samples.shape
    inputs = np.zeros((2, BLOCK), np.float32)  # channels apart from each other: vectors are loaded at once
    for start in range(0, nb_timesteps, BLOCK):
        x = samples[start : min(start + BLOCK, nb_timesteps)]
        for k in range(nb_inputs):
            for t in range(len(x)):
                inputs[k, t] = np.float32(x[t, k])
        for c in range(len(out)):
            y = out[c, start : start + len(x)]
            a = matrix[c, 0]
            if is_first:
                y[:] = 0
            if nb_inputs == 1:
                for t in range(len(x)):
                    y[t] += a * inputs[0, t]
            else:
                b = matrix[c, 1]
                for t in range(len(x)):
                    y[t] += a * inputs[0, t] + b * inputs[1, t]


@kernel
def _mix_int16(samples: INT16, matrix: IN(2), is_first: INT, out: OUT(2)):
    _mix(samples, matrix, is_first, out)


@kernel
def _mix_float(samples: IN(2), matrix: IN(2), is_first: INT, out: OUT(2)):
    _mix(samples, matrix, is_first, out)


def mix(samples: np.ndarray, matrix: np.ndarray, out: np.ndarray, accumulate: bool = True) -> None:
    """out (+)= matrix · samplesᵀ, in one pass without the GIL.

    Args:
        samples: (nb_timesteps, 1 or 2) float32; or int16, which stand for multiples of 1/32768
        matrix: (nb_channels, 1 or 2) float32
        out: (nb_channels, nb_timesteps) float32
    """
    if samples.dtype == np.int16:
        _mix_int16(samples, matrix * np.float32(2**-15), not accumulate, out)  # a power of two: nothing is rounded
    else:
        _mix_float(samples, matrix, not accumulate, out)
