"""Noise songs that both sides can make, so that golden statistics need no audio files. NumPy only."""

import numpy as np

RATE = 44100


def noise_songs():
    """Three stereo songs of about a second, int16 (nb_timesteps, 2), of different length, loudness and colour.

    RandomState, since its streams never change between releases of NumPy.
    """
    rng = np.random.RandomState(0)
    songs = []
    for seconds, smoothing, peak in [(1.0, 4, 300), (0.8, 8, 9000), (1.2, 16, 25000)]:
        song = rng.randint(-peak, peak, (round(seconds * RATE), 2))
        for _ in range(2):
            # a moving average: all have zeros at a quarter and at half of the rate, where the floor must act
            sums = np.cumsum(song, axis=0)
            song = (sums[smoothing:] - sums[:-smoothing]) // smoothing
        songs.append(song.astype(np.int16))
    return songs
