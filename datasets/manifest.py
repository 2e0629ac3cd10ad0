"""A manifest: a CSV file that lists the stems of songs, wherever they lie.

Columns: `song`, `stem`, `path`, and optionally `start` and `duration` (seconds; none: all of the file) and `split`
(train, valid or test; none: train, or what a share of songs decides). Paths are relative to the manifest. Several rows
of the same song and stem are added up; the stem `mixture` is the song's own mixture. The order of rows means nothing.
"""

from __future__ import annotations  # unions, on Python 3.9

import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

import files
from utils import UsageError

REQUIRED, OPTIONAL = ("song", "stem", "path"), ("start", "duration", "split")
SPLITS = ("train", "valid", "test")
LARGEST = 2**28  # bytes; a million rows


class Row(NamedTuple):
    """A stretch of a file, in seconds; the number of its line, for messages."""

    path: Path
    start: float
    duration: float | None
    line: int


class Song(NamedTuple):
    name: str
    stems: dict  # name -> [Row, …]
    split: str  # one of SPLITS, or ""


def read_manifest(path: str | Path) -> list[Song]:
    """All songs of a manifest, by name.

    Raises:
        UsageError: it cannot be read, or a line of it cannot be; one line, with the number of that line.
    """
    path = Path(path).expanduser()
    try:
        text = files.read(path, LARGEST).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read the manifest {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the manifest {path} is not a text in UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    songs = {}
    try:
        names = [name.strip() for name in next(reader, [])]
        _check_header(path, names)
        for values in reader:
            if not any(value.strip() for value in values):
                continue
            where = f"{path}, line {reader.line_num}"
            if len(values) != len(names):
                raise UsageError(f"{where}: {len(values)} values for {len(names)} columns")
            _add(songs, dict(zip(names, map(str.strip, values))), path.parent, where, reader.line_num)
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}") from None
    if not songs:
        raise UsageError(f"the manifest {path} lists no songs")
    # in an order that is not that of the rows, as of files: so none of what is drawn depends on it
    for song in songs.values():
        for rows in song.stems.values():
            rows.sort(key=lambda row: (str(row.path), row.start))
    return [songs[name] for name in sorted(songs)]


def _check_header(path, names):
    columns = f"there are {', '.join(REQUIRED)}, and optionally {', '.join(OPTIONAL)}"
    for name in REQUIRED:
        if name not in names:
            raise UsageError(f"the manifest {path} has no column {name!r} in its first line: {columns}")
    for name in names:
        if name not in REQUIRED + OPTIONAL or names.count(name) > 1:
            raise UsageError(f"the manifest {path} has a column {name!r} that cannot be: {columns}, each once")


def _add(songs, values, folder, where, line):
    for name in REQUIRED:
        if not values[name] or "\0" in values[name]:
            raise UsageError(f"{where}: no {name}")
    split = values.get("split", "")
    if split and split not in SPLITS:
        raise UsageError(f"{where}: the split {split!r} is none of {', '.join(SPLITS)}")
    song = songs.setdefault(values["song"], Song(values["song"], {}, split))
    if song.split != split:
        raise UsageError(f"{where}: {song.name!r} is in {song.split or 'no split'} and in {split or 'none'}")
    start = _seconds(values.get("start"), 0.0, where)
    duration = _seconds(values.get("duration"), None, where)
    if duration == 0:
        raise UsageError(f"{where}: a duration of 0 s")
    row = Row(folder / values["path"], start, duration, line)
    if not row.path.is_file():
        raise UsageError(f"{where}: there is no file {row.path}")
    for stem, rows in song.stems.items():
        for other in rows:
            if other[:3] == row[:3]:
                raise UsageError(f"{where}: {row.path} is a part of {song.name!r} already, {stem} in line {other.line}")
    song.stems.setdefault(values["stem"], []).append(row)


def _seconds(text, default, where):
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1e9:
        raise UsageError(f"{where}: {text!r} is no number of seconds")
    return value
