"""Songs of noise that both sides can make, so that golden values need no audio files. NumPy and soundfile only."""

from pathlib import Path

import numpy as np
import soundfile

RATE = 44100
SOURCES = ("bass", "drums", "other", "vocals")
SPARSE = 101  # of this many samples of excerpts, one is kept in golden values

# Lengths of `write_songs` in samples; musdb tells validation songs by their names.
SONGS = {
    "Noise - First": 26000,
    "Noise - Second": 40000,
    "Noise - Third": 33000,
    "Actions - One Minute Smile": 30000,
    "Clara Berry And Wooldog - Waltz For My Victims": 47000,
}


def noise(rng, nb_timesteps, smoothing, peak):
    """Integers (nb_timesteps, 2); a longer smoothing makes a lower sound."""
    song = rng.randint(-peak, peak, (nb_timesteps, 2))
    for _ in range(2):
        # a moving average: all have zeros at a quarter and at half of the rate, where the floor must act
        sums = np.cumsum(song, axis=0)
        song = (sums[smoothing:] - sums[:-smoothing]) // smoothing
    return song


def noise_songs():
    """Three stereo songs of about a second, int16 (nb_timesteps, 2), of different length, loudness and colour.

    RandomState, since its streams never change between releases of NumPy.
    """
    rng = np.random.RandomState(0)
    songs = [(1.0, 4, 300), (0.8, 8, 9000), (1.2, 16, 25000)]
    return [noise(rng, round(seconds * RATE), *kind).astype(np.int16) for seconds, *kind in songs]


def write_layout(root, dataset, times=1):
    """SONGS in folders as a dataset of openunmix has them; returns the folder.

    In trackfolder_var, one song lacks a source, and another, to train with, the vocals.
    """
    songs = write_songs(Path(root, "musdb"), times) / "train"
    root = Path(root, dataset)
    for song in sorted(songs.iterdir()):
        split = "train" if song.name.startswith("Noise") else "valid"
        for path in song.iterdir():
            name = f"{path.stem}/{song.name}.wav" if dataset == "sourcefolder" else f"{song.name}/{path.name}"
            missing = path.stem == "mixture" or name in ("Noise - First/other.wav", "Noise - Second/vocals.wav")
            if dataset != "trackfolder_var" or not missing:
                (root / split / name).parent.mkdir(parents=True, exist_ok=True)
                (root / split / name).write_bytes(path.read_bytes())
    return root


def write_songs(root, times=1):
    """SONGS, each `times` as long, in a folder in MUSDB18-HQ's layout; returns it.

    Sources differ in colour, loudness, and in where they pause. A mixture is not the sum of its sources, as those of
    MUSDB18 are not.
    """
    rng = np.random.RandomState(1)
    for number, (name, length) in enumerate(SONGS.items()):
        folder = Path(root, "train", name)
        folder.mkdir(parents=True)
        length *= times
        mixture = 0
        for kind, source in enumerate(SOURCES):
            smoothing, peak = 3 << kind, 6000 * (number + 2) * (kind + 2) // 4
            audio = noise(rng, length + 2 * smoothing, smoothing, peak)
            audio[(np.arange(length) // 3000 + rng.randint(4)) % 4 == 0] //= 8
            audio[:, number % 2] //= 2
            soundfile.write(folder / f"{source}.wav", audio.astype(np.int16), RATE, subtype="PCM_16")
            mixture = mixture + audio
        mixture = mixture * 3 // 4 + noise(rng, length + 8, 4, 2000)
        soundfile.write(
            folder / "mixture.wav", np.clip(mixture, -32768, 32767).astype(np.int16), RATE, subtype="PCM_16"
        )
    return root
