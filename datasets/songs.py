"""Datasets of songs with stems: MUSDB18, and whatever a manifest lists."""

from __future__ import annotations  # unions, on Python 3.9

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from args import TARGETS
from datasets.cache import open_recordings
from datasets.manifest import read_manifest
from datasets.mixing import Item, Part
from datasets.musdb18 import Track, database, open_tracks
from datasets.recordings import Recording
from datasets.sources import Dataset, checked_names, validating
from randomness import random_stream
from utils import UsageError, some, whole


class SongDataset(Dataset):
    """Songs whose sources are drawn apart from each other, each with replacement.

    With `seq_dur`, item `index` of an `epoch` is a mixture that never was: for each source, in their order, a song
    drawn of those that have it, a start drawn uniformly, then the augmentations. Without, it is a whole song with its
    own mixture.

    Attributes:
        tracks: all songs of the split
        gains: of each target {source: gain}
    """

    tracks: list[Track]

    def _prepare(self, target, known, samples_per_track, silence_missing=False):
        """Finish what the subclass began with `tracks`: `known` are all targets, name -> {source: gain}."""
        targets = targets_of(target, known)
        self.gains = [known[name] for name in targets]
        self.stacked, self.nb_targets = not isinstance(target, str), len(targets)
        self.samples_per_track = whole("samples_per_track", samples_per_track, 1, 10**6)
        found = {source for track in self.tracks for source in track.sources}
        self.sources = in_order(found | {source for gains in self.gains for source in gains})
        self._having = {
            source: [track for track in self.tracks if silence_missing or source in track.sources]
            for source in self.sources
        }

    def __len__(self) -> int:
        return len(self.tracks) * self.samples_per_track

    def plan(self, epoch: int, index: int) -> Item:
        if self.nb_timesteps is None:
            return self.whole(self.tracks[index // self.samples_per_track])
        return Item([self._excerpt(source, epoch, index) for source in self.sources], self.nb_timesteps)

    def _excerpt(self, source, epoch, index):
        key, tracks = self.key(epoch, index, source), self._having[source]
        rng = random_stream("draw", **key)
        track = tracks[rng.integers(len(tracks))]
        start = self.start(rng, track.nb_timesteps)
        return Part(track.sources.get(source, ()), True, self._weights(source), start, self.augmentations, key)

    def _weights(self, source):
        return tuple(gains.get(source, 0.0) for gains in self.gains)

    def whole(self, track: Track) -> Item:
        """A song with its own mixture."""
        silent = (0.0,) * len(self.gains)
        stems = [Part(stem, False, self._weights(source)) for source, stem in track.sources.items()]
        return Item([Part(track.mixture, True, silent), *stems], track.nb_timesteps)

    def whole_track(self, track: Track) -> tuple[np.ndarray, np.ndarray]:
        """The own mixture of a song and its target, shaped like those of an item."""
        return self.render(self.whole(track))

    def mixtures(self) -> Iterator[Item]:
        return map(self.whole, self.tracks)

    def recordings(self) -> list[Recording]:
        return [one for track in self.tracks for one in track.recordings]

    def sums(self) -> Iterator[tuple[str, Item, Item]]:
        for track in self.tracks:
            if not {one for stem in track.sources.values() for one in stem}.issuperset(track.mixture):
                total = Item([Part(stem, True, ()) for stem in track.sources.values()], track.nb_timesteps)
                yield track.name, self.whole(track), total


def targets_of(target: str | Sequence[str], known: dict) -> tuple[str, ...]:
    """The names of targets, one or several; UsageError if one is unknown, or there is none."""
    targets = checked_names("target", [target] if isinstance(target, str) else target, known)
    if not targets:
        raise UsageError("no target is named")
    return targets


def in_order(names: Iterable[str]) -> list[str]:
    """Names of sources: those of MUSDB18 in the usual order, others behind them by name."""
    return sorted(names, key=lambda name: (TARGETS.index(name) if name in TARGETS else len(TARGETS), name))


# ------------------------------------------------------------------------------------------- MUSDB18


class MusdbSource(SongDataset):
    """MUSDB18.

    Args:
        target: a source of musdb, or one of its sums of sources (accompaniment, linear_mixture); or several of
            them, then a target is an array (nb_targets, nb_channels, nb_timesteps)
        root: folder of MUSDB18; None downloads musdb's 7 s excerpts
        split: "train" or "valid"
        is_wav: tracks are folders of WAV files
        seq_dur: seconds per excerpt; None: whole tracks
        samples_per_track: times the number of tracks is the number of items
        augmentations: names in AUGMENTATIONS, in their order
        nb_channels: at least so many in items
        cache: folder of decoded stems; None: where the user's caches are
        quiet: no progress bar while tracks are found, or decoded
        thorough: read all files to their ends, to see whether they are whole
    Raises:
        UsageError: no such folder, split, stem, target or augmentation; a track shorter than an excerpt.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        root: str | Path | None = None,
        split: str = "train",
        is_wav: bool = False,
        seq_dur: float | None = None,
        samples_per_track: int = 1,
        augmentations: Iterable[str] = (),
        seed: int = 42,
        nb_channels: int = 1,
        cache: str | Path | None = None,
        quiet: bool = True,
        thorough: bool = False,
    ):
        super().__init__(split, seq_dur, augmentations, seed)
        mus = database(root, is_wav, split=split)
        targets_of(target, mus.setup["targets"])
        self.tracks = open_tracks(mus.tracks, mus.setup["sources"], is_wav, cache, quiet, thorough)
        formats = {(one.sample_rate, one.nb_channels) for track in self.tracks for one in track.recordings}
        if len(formats) > 1:
            raise UsageError(f"tracks of {mus.root} differ in (sample rate, channels): {sorted(formats)}; convert them")
        self.adopt_formats((one for track in self.tracks for one in track.recordings), nb_channels)
        self._prepare(target, mus.setup["targets"], samples_per_track)
        for track in self.tracks:
            if self.nb_timesteps is not None and track.nb_timesteps < self.nb_timesteps:
                seconds = track.nb_timesteps / self.sample_rate
                raise UsageError(f"track {track.name!r} has {seconds:.2f} s: too short for --seq-dur {seq_dur}")


# ------------------------------------------------------------------------------------------ manifest


class ManifestSource(SongDataset):
    """Songs of a manifest, a CSV file: see manifest.py.

    A song's mixture is its stem `mixture`, or the sum of all its stems. Targets are stems, and, unless stems are named
    so, `accompaniment` (all but vocals) and `linear_mixture` (all). A song is as long as its shortest file. Sources are
    drawn of the songs that have them; with `silence_missing`, of all songs, and are silent where a song has none.
    A song without any source of a target does not validate, unless `silence_missing`.

    Args:
        manifest: the file
        valid_share, valid_seed: which songs validate, if its column `split` tells of none
        the others: as of MusdbSource
    """

    def __init__(
        self,
        target: str | Sequence[str],
        manifest: str | Path,
        split: str = "train",
        seq_dur: float | None = None,
        samples_per_track: int = 1,
        augmentations: Iterable[str] = (),
        seed: int = 42,
        nb_channels: int = 1,
        silence_missing: bool = False,
        valid_share: float = 0.1,
        valid_seed: int = 42,
        sample_rate: int | None = None,
        cache: str | Path | None = None,
        quiet: bool = True,
        thorough: bool = False,
    ):
        super().__init__(split, seq_dur, augmentations, seed)
        songs = read_manifest(manifest)
        if not any(song.split == "valid" for song in songs):
            unsaid = [song.name for song in songs if not song.split]
            if not unsaid:
                raise UsageError(f"no song of {manifest} has the split valid: some must, or no song a split")
            chosen = validating(unsaid, valid_share, valid_seed)
            songs = [song._replace(split="valid") if song.name in chosen else song for song in songs]
        stems = {name for song in songs if song.split != "test" for name in song.stems} - {"mixture"}
        known = {name: {name: 1.0} for name in in_order(stems)}
        if "vocals" in stems and len(stems) > 1:
            known.setdefault("accompaniment", {name: 1.0 for name in in_order(stems - {"vocals"})})
        known.setdefault("linear_mixture", {name: 1.0 for name in in_order(stems)})
        songs = [song for song in songs if (song.split or "train") == split]
        targets = targets_of(target, known)

        paths = [row.path for song in songs for rows in song.stems.values() for row in rows]
        found = open_recordings(paths, sample_rate, cache, quiet, thorough)
        tracks = [_track_of(song, found, manifest) for song in songs]
        if split == "valid" and not silence_missing:
            wanted = {name for one in targets for name in known[one]}
            lacking = [track.name for track in tracks if not wanted & set(track.sources)]
            if lacking:
                self.notes.append(f"without the target, and left out of validation: {some(lacking)}")
            tracks = [track for track in tracks if track.name not in set(lacking)]
        if not tracks:
            raise UsageError(f"{manifest} has no songs for {split}{': ' if self.notes else ''}{'; '.join(self.notes)}")
        self.adopt_formats(found.values(), nb_channels)
        enough = set(self.long_enough({track.name: track.nb_timesteps for track in tracks}))
        self.tracks = [track for track in tracks if track.name in enough]
        if not self.tracks:
            raise UsageError(f"{manifest}: {'; '.join(self.notes)}")
        self._prepare(target, known, samples_per_track, silence_missing)
        for source, having in self._having.items():
            if self.nb_timesteps is not None and not having:
                raise UsageError(f"no song of {manifest} that trains has {source!r}")


def _track_of(song, found, manifest):
    stems = {}
    for name in in_order(song.stems):
        recordings = []
        for row in song.stems[name]:
            recording = found[row.path]
            start, end = round(row.start * recording.sample_rate), recording.nb_timesteps
            if row.duration is not None:
                end = start + round(row.duration * recording.sample_rate)
            if start >= recording.nb_timesteps or end > recording.nb_timesteps + 1 or end <= start:
                seconds = recording.nb_timesteps / recording.sample_rate
                raise UsageError(
                    f"{manifest}, line {row.line}: {row.path} has {seconds:.2f} s, and not what is asked for"
                )
            recordings.append(recording.stretch(start, min(end, recording.nb_timesteps) - start))
        stems[name] = tuple(recordings)
    mixture = stems.pop("mixture", None) or tuple(one for stem in stems.values() for one in stem)
    if not stems:
        raise UsageError(f"{manifest}: the song {song.name!r} has no stem but its mixture")
    lengths = [one.nb_timesteps for stem in [mixture, *stems.values()] for one in stem]
    return Track(song.name, mixture, stems, min(lengths))
