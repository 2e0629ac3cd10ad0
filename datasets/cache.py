"""What has to be decoded or resampled before samples of it can be found: once, into a folder that is kept.

An entry is a folder, named after its recording and a hash of that file's place, size and time, so that a file which has
changed has another entry. It appears whole, with a list of its files, their sizes and checksums; it is used if it
is what the list says. Several processes may make the same entry: the first one's is taken.
"""

from __future__ import annotations  # unions, on Python 3.9

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pooch
from tqdm import tqdm

import audio
import files
from datasets.recordings import IN_PLACE, Problems, Recording, open_recording
from utils import UsageError, describe

LIST = "entry.json"


class Wanted(NamedTuple):
    """An entry: of which file, what distinguishes it besides, how many bytes it will have, and what makes its files."""

    source: Path
    kind: str
    nb_bytes: int
    make: Callable[[Path], None]


def folder_of(cache: str | Path | None) -> Path:
    """The folder that is kept; None: where the user's caches are."""
    return Path(cache).expanduser() if cache else Path(pooch.os_cache("open-unmix-nnabla"))


def get(wanted: Iterable[Wanted], cache: str | Path | None, what: str, quiet: bool = True) -> list[Path]:
    """Folders of entries, which are made where they are missing, or not what they should be.

    Args:
        what: is done to make them, for the progress bar
    Raises:
        UsageError: the disk is too small for them.
    """
    wanted, folder = list(wanted), folder_of(cache) / "stems"
    paths = [_path(one, folder) for one in wanted]
    missing = [(one, path) for one, path in zip(wanted, paths) if not is_whole(path)]
    if missing:
        folder = files.writable_folder(folder)
        needed, free = sum(one.nb_bytes for one, _ in missing), shutil.disk_usage(folder).free
        sizes = f"{what} of {len(missing)} files needs {_size(needed)}"
        if needed > free:
            raise UsageError(f"{sizes}, {folder} has {_size(free)} left: --cache names another folder")
        if not quiet:
            print(f"{sizes} in {folder}, which has {_size(free)} left; it is done once", flush=True)
        for one, path in tqdm(missing, what.capitalize(), leave=False, disable=quiet):
            _make(one, path)
    return paths


def _size(nb_bytes):
    return f"{nb_bytes / 1e9:.1f} GB" if nb_bytes >= 1e8 else f"{nb_bytes / 1e6:.1f} MB"


def _path(wanted, folder):
    stat = wanted.source.stat()
    key = f"{wanted.source.resolve()} {stat.st_size} {stat.st_mtime_ns} {wanted.kind}"
    name = wanted.source.name.removesuffix(".stem.mp4")[:100]
    return folder / f"{name} {hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:16]}"


def _make(wanted, path):
    with files.temporary_folder(path.parent) as partial:
        wanted.make(partial)
        files.write_json(partial / LIST, {file.name: _describe(file) for file in sorted(partial.iterdir())})
        if path.exists() and not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)
        try:
            partial.rename(path)
        except OSError:  # another process has made it meanwhile
            if not is_whole(path):
                raise


def _describe(path):
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
        os.fsync(stream.fileno())
    stat = path.stat()
    return {"size": stat.st_size, "time": stat.st_mtime_ns, "sha256": digest.hexdigest()}


def is_whole(path: Path) -> bool:
    """Whether an entry has the files of its list; those that somebody has touched are compared with their checksums."""
    try:
        listed = files.read_json(path / LIST)
        for name, expected in listed.items():
            stat = (path / name).stat()
            if stat.st_size != expected["size"]:
                return False
            is_touched = stat.st_mtime_ns != expected["time"]
            if is_touched and _describe(path / name)["sha256"] != expected["sha256"]:
                return False
    except (OSError, UsageError, AttributeError, KeyError, TypeError):
        return False
    return True


# ---------------------------------------------------------------------------- other rates and formats


def open_recordings(
    paths: Iterable[Path],
    sample_rate: int | None = None,
    cache: str | Path | None = None,
    quiet: bool = True,
    thorough: bool = False,
) -> dict[Path, Recording]:
    """Look at files. Those of formats that have to be read from their beginning (mp3, Ogg) are decoded into the cache.

    Args:
        sample_rate: what they shall have, in Hz: those of other rates are resampled into the cache; None: the one that
            they all have
        thorough: see `open_recording`
    Raises:
        Problems: of all that cannot be read, what is wrong with it.
        UsageError: they differ in rate.
    """
    found, problems = {}, []
    for path in tqdm(list(dict.fromkeys(map(Path, paths))), "Reading files", leave=False, disable=quiet):
        try:
            found[path] = open_recording(path, thorough)
        except (UsageError, OSError) as error:
            problems.append(describe(error))
    if problems:
        raise Problems(problems)
    rates = {one.sample_rate: path for path, one in found.items()}
    if sample_rate is None:
        if len(rates) > 1:
            examples = ", ".join(f"{rate} Hz ({path})" for rate, path in sorted(rates.items()))
            raise UsageError(
                f"files differ in sample rate: {examples}; --sample-rate {min(rates)} resamples the others, once"
            )
        sample_rate = next(iter(rates), None)
    others = [one for one in found.values() if one.sample_rate != sample_rate or one.form not in IN_PLACE]
    wanted = []
    for one in others:
        nb_bytes = 4 * one.nb_channels * round(one.nb_timesteps / one.sample_rate * sample_rate)

        def make(folder, one=one):
            recording, _, _ = audio.decode(one.path, sample_rate, folder)
            shape = recording.nb_channels, recording.nb_timesteps
            audio.write(folder / "audio.wav", recording.blocks(), shape, sample_rate, "WAV", "FLOAT")
            recording.close()

        wanted.append(Wanted(one.path, f"{sample_rate} Hz", nb_bytes, make))
    for one, folder in zip(others, get(wanted, cache, "resampling and decoding", quiet)):
        found[one.path] = dataclasses.replace(open_recording(folder / "audio.wav"), origin=one.path)
    return found
