"""A dataset of one's own: lists the stems of a folder tree in a manifest, which train.py and data.py read.

    python examples/manifest.py RECORDINGS songs.csv
    python data.py --dataset manifest --manifest songs.csv --target vocals
    python train.py --dataset manifest --manifest songs.csv --target vocals

As it is, it takes every folder with audio files for a song, its name for the song's, a file's name for the stem's, and
folders train, valid and test above them for splits. Other collections have other habits: `describe` is what to edit.
"""

import csv
import os
import sys
from pathlib import Path

ENDINGS = {".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff"}
SPLITS = {"train", "valid", "test"}
# How stems of the collection are to be called; others keep their names. What has the same name is added up.
STEMS = {"voice": "vocals", "lead vocals": "vocals", "backing vocals": "vocals", "mix": "mixture"}
# Songs that validate although they lie in train/: MUSDB18's, by which models are compared.
VALID = """Actions - One Minute Smile|Clara Berry And Wooldog - Waltz For My Victims|Johnny Lokke - Promises & Lies
Patrick Talbot - A Reason To Leave|Triviul - Angelsaint|Alexander Ross - Goodbye Bolero|Fergessen - Nos Palpitants
Leaf - Summerghost|Skelpolu - Human Mistakes|Young Griffo - Pennies|ANiMAL - Rockshow|James May - On The Line
Meaxic - Take A Step|Traffic Experiment - Sirens""".replace("\n", "|").split("|")


def describe(path):
    """Song, stem and split of a file, given its path below the folder; None: it is to be left out."""
    song = path.parent
    splits = [part for part in song.parts if part in SPLITS]
    split = "valid" if song.name in VALID else splits[0] if splits else ""
    stem = path.stem.lower()
    return str(song), STEMS.get(stem, stem), split


def main(folder, manifest):
    folder, manifest = Path(folder), Path(manifest)
    rows = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in ENDINGS and (described := describe(path.relative_to(folder))):
            song, stem, split = described
            rows.append((song, stem, os.path.relpath(path, manifest.parent), split))
    with open(manifest, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("song", "stem", "path", "split"), *rows])
    print(f"{manifest}: {len(rows)} files of {len({row[0] for row in rows})} songs")


if __name__ == "__main__":
    main(*sys.argv[1:])
