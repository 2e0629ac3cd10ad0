"""The scores of one song: which of its stems are compared with what, and the file that holds what comes out.

<evaldir>/<subset>/<track>.json is what museval writes: BSSEval v4, in frames of 1 s.
"""

from __future__ import annotations  # unions, on Python 3.9

import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

import bsseval
import files
import utils
from audio import write
from datasets.musdb18 import Track, open_tracks
from datasets.recordings import Recording
from scores import METRICS, Labels, groups, is_complete, labels_of
from separator import Separator
from utils import UsageError

if TYPE_CHECKING:
    import musdb  # needs ffmpeg, so it is imported where it is used
    import museval

Sources = dict[str, set[str]]  # {stem: the sources that it should hold}

# ------------------------------------------------------------------------------ what is compared with what


def references(separator: Separator, aggregate: dict[str, list[str]] | None, targets: dict[str, dict]) -> Sources:
    """The sources whose sum each stem should be, {stem: set of names}, of the stems that should hold any.

    Args:
        aggregate: {stem: names of the separator's} or None
        targets: musdb's, {name: {source: gain}}
    Raises:
        UsageError: a stem that MUSDB18 lacks, or one that is named like another sum of sources.
    """
    if unknown := [name for name in separator.targets if name not in targets]:
        raise UsageError(f"MUSDB18 has no {unknown[0]} to score it with: it has {', '.join(targets)}")
    parts = {name: set(targets[name]) for name in separator.targets}
    if separator.residual:
        parts[separator.sources[-1]] = set(targets["linear_mixture"]).difference(*parts.values())
    if aggregate:
        parts = {stem: set().union(*(parts[name] for name in names)) for stem, names in aggregate.items()}
    for stem, sources in parts.items():
        if sources != set(targets.get(stem, sources)):
            holds = " + ".join(sorted(sources)) or "none of its sources"
            raise UsageError(f"the stem {stem!r} would be {holds}, which is not what MUSDB18 calls so: rename it")
    return {stem: sources for stem, sources in parts.items() if sources}


def evaluations(stems: Sources) -> Labels:
    """What the scores of these stems are called, and which they are: {label: stems}.

    Args:
        stems: {name: set of sources}
    Raises:
        UsageError: a stem alone, or stems that share a source.
    """
    for group, _ in groups(stems):
        sources = [source for name in group for source in stems[name]]
        if len(set(sources)) < len(sources):
            raise UsageError(f"stems share sources, so they cannot be told apart: {', '.join(group)}")
    labels = labels_of(stems)
    if not labels:
        raise UsageError("BSSEval needs two stems with sources of MUSDB18: --residual gives one more, the rest")
    return labels


# ------------------------------------------------------------------------------------------ one track


def scored_by(original: bool) -> str:
    """Who scores, and which version."""
    return f"museval {importlib.metadata.version('museval')}" if original else f"bsseval {bsseval.VERSION}"


def score(
    name: str, truth: dict[str, np.ndarray], estimates: dict[str, np.ndarray], rate: int, original: bool
) -> museval.TrackStore:
    """The scores of a track, as museval keeps them; those that are noise by name, under "doubtful".

    Args:
        truth, estimates: {stem: audio (nb_timesteps, nb_channels)}
        original: by museval itself, which does not tell what is noise
    """
    import museval

    if original:
        targets = {stem: SimpleNamespace(audio=audio.astype(np.float64)) for stem, audio in truth.items()}
        return museval.eval_mus_track(SimpleNamespace(name=name, rate=rate, targets=targets), estimates)
    store, doubtful = museval.TrackStore(name), {}
    for together, kept in groups(truth):
        audio = ([some[stem] for stem in together] for some in (truth, estimates))
        scores = bsseval.evaluate(*audio, win=rate, hop=rate)
        for k, stem in enumerate(together):
            if stem in kept:
                store.add_target(stem, {metric: getattr(scores, metric)[k].tolist() for metric in METRICS})
                if noise := [metric for metric in METRICS if scores.doubtful[metric][k]]:
                    doubtful[stem] = noise
    store.scores.update(scorer=scored_by(original), doubtful=doubtful)
    return store


class Scorer:
    """Separates and scores tracks: <evaldir>/<subset>/<track>.json, and the stems if they are to be kept.

    Args:
        aggregate, stems: see `references`
        sources: {source: its file in a folder of WAV}, musdb's
        is_wav: whether tracks are such folders
        outdir: of the stems, or None
        precision: of the references: "16" bits, as musdb reads them, or that of the "file"
        original: whether museval itself scores
    """

    def __init__(
        self,
        separator: Separator,
        aggregate: dict[str, list[str]] | None,
        stems: Sources,
        sources: dict[str, str],
        is_wav: bool,
        evaldir: str | Path,
        outdir: str | Path | None,
        precision: str,
        original: bool,
    ):
        self.separator, self.aggregate, self.stems = separator, aggregate or {}, stems
        self.sources, self.is_wav, self.precision, self.original = sources, is_wav, precision, original
        self.evaldir, self.outdir = Path(evaldir), outdir and Path(outdir)
        self.names = list(aggregate or separator.sources)

    def json(self, track: musdb.MultiTrack) -> Path:
        return self.evaldir / track.subset / f"{track.name}.json"

    def files(self, track: musdb.MultiTrack) -> dict[str, Path]:
        return {name: self.outdir / track.subset / track.name / f"{name}.wav" for name in self.names if self.outdir}

    def scored(self, track: musdb.MultiTrack) -> bool:
        """Whether a track has all its scores; what museval has not written is written again."""
        try:
            return is_complete(files.read_json(self.json(track)), self.stems)
        except UsageError:
            return False

    def done(self, track: musdb.MultiTrack) -> bool:
        return self.scored(track) and all(path.exists() for path in self.files(track).values())

    def __call__(self, tracks: Sequence[musdb.MultiTrack]) -> Iterator[dict]:
        """Separate and score musdb tracks; those of one rate that follow each other go through the networks together.

        Whatever is wrong with a track, the others must go on.

        Yields:
            dict: track; silent or error, if it has no scores, why; or seconds: of audio, of the work on it
        """
        opened = [(track, self.told(track, self.opened, track)) for track in tracks]
        for rate, some in itertools.groupby(opened, lambda pair: "song" in pair[1] and pair[1]["song"].sample_rate):
            if rate:
                yield from self.together([(track, found["song"]) for track, found in some])
            else:
                yield from (found for _, found in some)

    def told(self, track: musdb.MultiTrack, function: Callable[..., dict], *arguments) -> dict:
        """What a function gives of a track, or in a line what was wrong."""
        try:
            return {"track": track.name, **function(*arguments)}
        except Exception as error:
            with utils.postponed() as is_ending:
                if is_ending():  # within a function of NNabla, which turned an interruption into another error
                    raise KeyboardInterrupt from error
            kind = "" if isinstance(error, (UsageError, OSError)) else f"{type(error).__name__}: "
            return {"track": track.name, "error": " ".join(f"{kind}{utils.describe(error)}".split())}

    def opened(self, track: musdb.MultiTrack) -> dict:
        """Its song; or why it has no scores, if it need not be separated either."""
        (song,) = open_tracks([track], self.sources, self.is_wav)
        has_stems = all(path.exists() for path in self.files(track).values())
        silent = has_stems and silence("source", self.truth(song))
        return {"silent": silent} if silent else {"song": song}

    def together(self, pairs: list[tuple[musdb.MultiTrack, Track]]) -> Iterator[dict]:
        """Of songs of one rate. The references of a song are read when its stems are there: they would take memory."""
        songs = [song for _, song in pairs]
        mixtures = (song.read(song.mixture) for song in songs)
        stems = map(self.estimates, self.separator.together(mixtures, songs[0].sample_rate))
        left, spent = sum(song.nb_timesteps for song in songs), 0.0
        for k, (track, song) in enumerate(pairs):
            start = time.perf_counter()
            found = self.told(track, lambda: {"estimates": next(stems)})
            if "error" in found:  # of any of them
                yield from [found] if len(pairs) == 1 else (one for pair in pairs[k:] for one in self.together([pair]))
                return
            # What is done for all is done with the first: what was spent is shared by those that are left, by length.
            spent += time.perf_counter() - start
            separation = spent * song.nb_timesteps / left
            left, spent = left - song.nb_timesteps, spent - separation
            yield self.told(track, self.score, track, song, found.pop("estimates"), separation)

    def score(self, track: musdb.MultiTrack, song: Track, estimates: dict[str, np.ndarray], separation: float) -> dict:
        """Write the stems and the scores.

        Args:
            separation: its seconds
        """
        truth = dict(self.truth(song))
        self.write(track, estimates, song.sample_rate)
        estimates = {name: estimates[name] for name in truth}
        if silent := silence("source", truth.items()) or silence("estimate", estimates.items()):
            return {"silent": silent}
        start = time.perf_counter()
        scores = score(track.name, truth, estimates, song.sample_rate, self.original)
        scores.validate()
        # not by museval's output_dir: it writes in place, and says nothing about a full disk
        files.write(self.json(track), scores.json.encode())
        seconds = {"separation": separation, "scoring": time.perf_counter() - start}
        return {"seconds": {"audio": song.nb_timesteps / song.sample_rate, **seconds}}

    def truth(self, song: Track) -> Iterator[tuple[str, np.ndarray]]:
        """Pairs of a stem and its reference."""
        return ((stem, self.reference(song, sources)) for stem, sources in self.stems.items())

    def reference(self, song: Track, sources: set[str]) -> np.ndarray:
        """The sum of sources (nb_timesteps, nb_channels). Of a few of 16 bits, single precision holds it exactly."""
        recordings = [one for source in sorted(sources) for one in song.sources[source]]
        read = Recording.read_16_bits if self.precision == "16" else partial(Recording.read, dtype="float64")
        return sum(read(one, 0, song.nb_timesteps) for one in recordings).T

    def estimates(self, stems: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Stems (nb_timesteps, nb_channels) by name, of those that the separator gives."""
        if self.aggregate:
            stems = {name: sum(stems[part] for part in parts) for name, parts in self.aggregate.items()}
        return {name: audio.T for name, audio in stems.items()}

    def write(self, track: musdb.MultiTrack, estimates: dict[str, np.ndarray], rate: int) -> None:
        """The layout of musdb's save_estimates; in float, so that the files have the scores of what they hold."""
        for name, path in self.files(track).items():
            files.writable_folder(path.parent)
            with files.atomic_path(path) as temporary:
                write(temporary, [estimates[name].T], estimates[name].T.shape, rate, "WAV", "FLOAT")


def is_silent(audio: np.ndarray) -> bool:
    """museval's idea of silence: channels that sum to zero, in audio (nb_timesteps, nb_channels)."""
    return not audio.sum(axis=1).any()


def silence(kind: str, some: Iterable[tuple[str, np.ndarray]]) -> str | None:
    """Which of some (name, audio) is silent, if any, in words."""
    return next((f"the {kind} {name!r} is silent" for name, audio in some if is_silent(audio)), None)
