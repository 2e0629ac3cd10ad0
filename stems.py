"""Stems as files: what they are called, where they go, and how they get there."""

from __future__ import annotations  # unions, on Python 3.9

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

import audio
import files
import utils
from args import TARGETS
from audio import RawAudio
from utils import UsageError

SUBTYPES = {"16": "PCM_16", "24": "PCM_24", "float": "FLOAT"}


class Separating(Protocol):
    """What is needed of a `separator.Separator`."""

    sources: list
    targets: list
    softmask: bool
    residual: bool
    sample_rate: float

    def stream(
        self, read: Callable[[int, int], np.ndarray], nb_channels: int, nb_timesteps: int
    ) -> Iterator[tuple[int, np.ndarray]]: ...


def write_stems(
    separator: Separating,
    path: str | Path,
    outdir: str | Path,
    start: float = 0.0,
    duration: float | None = None,
    aggregate: dict[str, list[str]] | None = None,
    ext: str = "wav",
    subtype: str | None = None,
    sum_to_mixture: bool = False,
    quiet: bool = True,
) -> float:
    """Write the stems of a recording to <outdir>/<stem>.<ext>, at its own rate and of its length.

    Memory does not grow with the recording. Stems that would clip in an integer format are all scaled down alike. All
    of them appear at the end, together.

    Args:
        aggregate: {name: stems that are added to make it}; None: the separator's stems
        subtype: "16", "24" or "float"; None: float for wav, 24 for flac
        sum_to_mixture: what the stems leave of the recording is spread over them, in proportion to their energies, so
            that what is written adds up: integers to the recording's, rounded; floats in a sum that is exact to it,
            but for rounding one of them. See `check_sum`.
    Returns:
        the factor that the stems are scaled with
    Raises:
        UsageError: the recording cannot be used; nothing is written.
    """
    path, outdir = Path(path), Path(os.path.expanduser(outdir)).absolute()
    aggregate = aggregate or {name: [name] for name in separator.sources}
    subtype = checked_subtype(ext, subtype)
    check_places([(path, outdir)], aggregate, ext)
    is_new = not os.path.exists(outdir)
    outdir = files.writable_folder(outdir)
    try:
        with files.temporary_folder(outdir) as folder:
            stems = _raw_stems(separator, path, folder, start, duration, aggregate, ext.upper(), subtype, quiet)
            names, mixture = list(aggregate), None
            if sum_to_mixture:
                mixture, _, _ = audio.decode(path, stems[0].rate, folder, start, duration)
                names, stems = _completed(names, stems, mixture, folder)
            peak = max(stem.peak for stem in stems)
            if not peak < np.inf:
                raise UsageError(f"the stems of {path} are not finite: the model, or its options, do not suit it")
            factor = 0.999 / peak if peak > 0.999 and subtype != "FLOAT" else 1.0
            with utils.postponed() as is_ending:  # either all stems get their names or none does
                with contextlib.ExitStack() as renamed_together:
                    for name, stem, blocks in zip(names, stems, _blocks(stems, mixture, factor, subtype)):
                        temporary = renamed_together.enter_context(files.atomic_path(outdir / f"{name}.{ext}"))
                        shape = stem.nb_channels, stem.nb_timesteps
                        audio.write(temporary, _until(is_ending, blocks), shape, stem.rate, ext.upper(), subtype)
                        stem.close()
                if is_ending():
                    raise KeyboardInterrupt
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                outdir.rmdir()
    return factor


def _raw_stems(separator, path, folder, start, duration, aggregate, form, subtype, quiet):
    """The stems of a recording at its own rate, a RawAudio in `folder` for each of `aggregate`."""
    recording, rate, nb_timesteps = audio.decode(path, separator.sample_rate, folder, start, duration)
    audio.check_writable(rate, recording.nb_channels, form, subtype)  # now, not after the work
    stems = [RawAudio(folder / f"stem{k}", recording.rate, recording.nb_channels) for k in range(len(aggregate))]
    parts = [[separator.sources.index(name) for name in names] for names in aggregate.values()]
    with tqdm(total=round(recording.nb_timesteps / recording.rate), desc=path.name, unit="s", disable=quiet) as bar:
        for _, block in separator.stream(recording.read, recording.nb_channels, recording.nb_timesteps):
            for stem, part in zip(stems, parts):
                stem.append(block[part].sum(axis=0))
            bar.update(round(stems[0].nb_timesteps / recording.rate) - bar.n)
    recording.close()
    return [stem.resampled(rate, nb_timesteps) for stem in stems] if rate != recording.rate else stems


def _completed(names, stems, mixture, folder):
    """Names and stems, the loudest first, with what these leave of the mixture: new RawAudio in `folder`.

    Each has a share of it in proportion to its energy, so that silence stays silence; if all are silent, they share
    alike.
    """
    energies = [sum(float(np.sum(block.astype(np.float64) ** 2)) for block in stem.blocks()) for stem in stems]
    energies = np.array(energies) if any(energies) else np.ones(len(stems))
    order = np.argsort(-energies, kind="stable")
    shares = energies[order] / energies.sum()
    names, stems = [names[k] for k in order], [stems[k] for k in order]
    completed = [RawAudio(folder / f"completed{k}", stem.rate, stem.nb_channels) for k, stem in enumerate(stems)]
    for block, *parts in zip(mixture.blocks(), *(stem.blocks() for stem in stems)):
        rest = block.astype(np.float64) - sum(part.astype(np.float64) for part in parts)
        for stem, part, share in zip(completed, parts, shares):
            stem.append((part + share * rest).astype(np.float32))
    for stem in stems:
        stem.close()
    return names, completed


def _blocks(stems, mixture, factor, subtype):
    """Of each stem, blocks as a file is to hold them; with a mixture, the first is what the others leave."""
    if mixture is None:
        return [_scaled(stem, factor) for stem in stems]
    others = stems[1:]
    return [_rounded(mixture, others, factor, subtype), *(_rounded(stem, [], factor, subtype) for stem in others)]


def _scaled(stem, factor):
    for block in stem.blocks():
        yield block * np.float32(factor) if factor < 1 else block


def _rounded(sound, others, factor, subtype):
    """A sound less others, each rounded before: floats, or the upper of 32 bits, which libsndfile takes as they are."""
    bits = {"PCM_16": 16, "PCM_24": 24}.get(subtype)
    for block, *parts in zip(sound.blocks(), *(other.blocks() for other in others)):
        if bits is None:
            yield (block.astype(np.float64) - sum(part.astype(np.float64) for part in parts)).astype(np.float32)
        else:
            whole, *parts = (np.rint(b * (factor * 2.0 ** (bits - 1))).astype(np.int64) for b in (block, *parts))
            yield ((whole - sum(parts)) << (32 - bits)).astype(np.int32)


def _until(is_ending, blocks):
    for block in blocks:
        if is_ending():
            raise KeyboardInterrupt
        yield block


def checked_subtype(ext: str, subtype: str | None) -> str:
    """libsndfile's name of "16", "24" or "float", or of the default of wav and flac; UsageError if they do not fit."""
    if ext not in ("wav", "flac") or subtype not in (None, *SUBTYPES):
        raise UsageError(f"stems are wav or flac, of 16, 24 or float, not {ext} of {subtype}")
    if ext == "flac" and subtype == "float":
        raise UsageError("flac holds integers: --subtype 16 or 24")
    return SUBTYPES[subtype or ("float" if ext == "wav" else "24")]


def checked_aggregate(separator: Separating, text: str | None) -> dict[str, list[str]] | None:
    """What --aggregate says, {name: stems to add up}, or None if it is not given.

    Raises:
        UsageError: it does not fit the separator; or, for both commands alike, a soft mask of a single target, which
            would be all of the mixture (the class computes it, as the reference does).
    """
    if separator.softmask and len(separator.targets) == 1:
        raise UsageError("--softmask shares the mixture out among targets: it needs two of them")
    if not text:
        return None
    sources = separator.sources
    try:
        aggregate = json.loads(text)
        fits = all(
            isinstance(names, list) and names and set(names) <= set(sources) and files.is_file_name(name)
            for name, names in aggregate.items()
        )
    except (ValueError, AttributeError, TypeError, RecursionError):
        fits = False
    if not fits or not aggregate:
        example = json.dumps({"accompaniment": sources[1:]})
        raise UsageError(f"--aggregate {text}: expected stems ({', '.join(sources)}) by name, as {example}")
    return aggregate


def check_sum(separator: Separating, aggregate: dict[str, list[str]] | None) -> None:
    """UsageError unless the stems, or their sums in `aggregate`, are meant to be all of the mixture, each of it once.

    They are if there is a residual; or several targets that are not only some of vocals, drums, bass and other.
    """
    written = [name for names in (aggregate or {}).values() for name in names] or separator.sources
    if sorted(written) != sorted(separator.sources):
        raise UsageError(f"--sum-to-mixture: --aggregate does not have each of {', '.join(separator.sources)} once")
    targets = set(separator.targets)
    if not separator.residual and (len(targets) == 1 or targets < set(TARGETS)):
        names = ", ".join(separator.targets)
        raise UsageError(
            f"--sum-to-mixture: {names} are not all of the mixture, add the rest as a stem, --residual rest"
        )


def check_places(songs: Sequence[tuple[Path, Path]], stems: Iterable[str], ext: str) -> None:
    """UsageError if stems would take the place of a recording, or of another recording's stems.

    Args:
        songs: pairs of a recording and the folder of its stems
    """
    if any("\0" in f"{path}{outdir}" for path, outdir in songs):
        raise UsageError("a name of a file or folder holds a null character")
    recordings = {os.path.realpath(path) for path, _ in songs}  # and the names of those that are links
    recordings |= {os.path.join(os.path.realpath(path.parent), path.name) for path, _ in songs}
    taken = {}
    for path, outdir in songs:
        folder = os.path.realpath(outdir)
        if folder in taken:
            raise UsageError(f"the stems of {taken[folder]} and of {path} would go to the same folder, {outdir}")
        taken[folder] = path
        for stem in stems:
            if os.path.join(folder, f"{stem}.{ext}") in recordings:
                raise UsageError(
                    f"the stem {outdir / f'{stem}.{ext}'} would replace a recording: choose another --outdir"
                )
