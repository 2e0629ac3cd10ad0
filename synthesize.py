"""Writes synthetic songs in the layout of MUSDB18-HQ: data for a demo, a test, an offline machine.

A song depends on (seed, subset, index) alone, so that asking for more songs changes none of them.
"""

from __future__ import annotations  # unions, on Python 3.9

import os
from collections.abc import Sequence
from pathlib import Path

import utils

if __name__ == "__main__":
    utils.start()  # before imports that take long

import numpy as np
from tqdm import tqdm

import args
import files
from audio import write
from music import song

# By these names (its configs/mus.yaml) musdb tells validation songs from the others in train/.
VALIDATION_NAMES = (
    "Actions - One Minute Smile",
    "Clara Berry And Wooldog - Waltz For My Victims",
    "Johnny Lokke - Promises & Lies",
    "Patrick Talbot - A Reason To Leave",
    "Triviul - Angelsaint",
    "Alexander Ross - Goodbye Bolero",
    "Fergessen - Nos Palpitants",
    "Leaf - Summerghost",
    "Skelpolu - Human Mistakes",
    "Young Griffo - Pennies",
    "ANiMAL - Rockshow",
    "James May - On The Line",
    "Meaxic - Take A Step",
    "Traffic Experiment - Sirens",
)
ADJECTIVES = ("Amber", "Copper", "Distant", "Early", "Gentle", "Hidden", "Marble", "Paper", "Silver", "Velvet")
NOUNS = ("Arcade", "Canyon", "Engine", "Garden", "Harbour", "Lantern", "Letter", "Meadow", "Radio", "Window")


def write_track(folder: Path, sources: dict[str, np.ndarray], sample_rate: int) -> None:
    """Writes 16-bit files, <name>.wav and mixture.wav; the mixture is the exact sum of the written integers."""
    folder.mkdir()
    integers = {name: np.rint(32767 * source).astype(np.int32) for name, source in sources.items()}
    integers["mixture"] = sum(integers.values())
    for name, audio in integers.items():
        write(folder / f"{name}.wav", [audio.astype(np.int16)], audio.shape, sample_rate, "WAV", "PCM_16")


def synthesize(
    output: str | Path,
    nb_train: int = 8,
    nb_valid: int = 2,
    nb_test: int = 2,
    duration: float = 30.0,
    seed: int = 42,
    sample_rate: int = 44100,
    quiet: bool = False,
) -> list[Path]:
    """Writes songs that `musdb.DB(output, is_wav=True)` finds, and returns the list of their folders.

    `duration` is in seconds, `sample_rate` in Hz. A call with the arguments of an earlier one keeps the songs
    that are there and writes the missing ones. Raises utils.UsageError for bad values, and if `output` holds
    anything else: nothing is overwritten.
    """
    counts = {"train": nb_train, "valid": nb_valid, "test": nb_test}
    if min(counts.values()) < 0 or seed < 0:
        raise utils.UsageError(f"numbers of songs and seed cannot be negative: {counts}, seed {seed}")
    if nb_valid > len(VALIDATION_NAMES):
        raise utils.UsageError(f"at most {len(VALIDATION_NAMES)} validation songs have names, {nb_valid} are asked for")
    if not 1 < duration < 3600:
        raise utils.UsageError(f"a song lasts more than 1 s and less than an hour, not {duration} s")

    output = files.writable_folder(output)
    label = output / "synthesize.json"
    settings = {**counts, "duration": duration, "seed": seed, "sample_rate": sample_rate}
    if any(output.iterdir()) and not (label.exists() and files.read_json(label) == settings):
        raise utils.UsageError(f"{output} holds other files, or songs of other settings: choose another folder")
    files.write_json(label, settings)

    folders = []
    songs = [(subset, index) for subset, count in counts.items() for index in range(count)]
    for subset, index in tqdm(songs, desc="synthesize", unit="song", disable=quiet):
        rng = np.random.default_rng((seed, list(counts).index(subset), index))
        artist, title = (f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
        name = VALIDATION_NAMES[index] if subset == "valid" else f"{artist} - {title} No {index + 1}"
        folder = output / ("test" if subset == "test" else "train") / name
        folders.append(folder)
        if folder.exists():
            continue
        # musdb takes every folder below train/ and test/ for a track: an unfinished one must lie elsewhere.
        with files.temporary_folder(output) as partial:
            write_track(partial / name, song(rng, duration, sample_rate), sample_rate)
            folder.parent.mkdir(exist_ok=True)
            os.replace(partial / name, folder)
    return folders


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    options = args.synthesize_parser().parse_args(argv)
    synthesize(
        options.output, options.train, options.valid, options.test, options.duration, options.seed, quiet=options.quiet
    )


if __name__ == "__main__":
    main()
