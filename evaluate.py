"""Scores over MUSDB18: ``python evaluate.py --root MUSDB18`` separates its test set and scores it with museval.

<evaldir>/<subset>/<track>.json is what museval writes (BSSEval v4, frames of 1 s); summary.json and scores.png
sum it up: medians over frames, then over tracks, the way of SiSEC 2018.
"""

from __future__ import annotations  # unions, on Python 3.9

import contextlib
import datetime
import hashlib
import importlib.metadata
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import utils

if __name__ == "__main__":
    utils.start()  # before imports that take long
elif __name__ == "__mp_main__":  # of `in_processes`
    logging.getLogger("nnabla").setLevel(logging.WARNING)  # else its import is announced, in each of them

import nnabla as nn
import numpy as np
from tqdm import tqdm

import context
import files
import folders
import kernels.threads
from args import evaluate_parser
from audio import write
from datasets.musdb18 import Track, database, open_tracks
from scores import FOUR, MODE, PAIR, Labels, is_complete, summarize, without_nan
from separate import Separator, checked_aggregate
from utils import UsageError

if TYPE_CHECKING:
    import musdb  # needs ffmpeg, so data.py imports it where it is used

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
    """Which scores museval gives these stems, and among which they are scored: {label: stems}.

    Scores depend on what a stem is compared with. With vocals and accompaniment among other stems, museval scores
    two things: those two against each other, and the others together with the vocals.

    Args:
        stems: {name: set of sources}
    Raises:
        UsageError: a stem alone, or stems that share a source.
    """
    paired = all(name in stems for name in PAIR)
    together = [name for name in stems if not paired or name != "accompaniment"]
    groups = [(together, [name for name in together if not paired or name != "vocals"])] if len(together) > 1 else []
    groups += [(PAIR, list(PAIR))] if paired else []
    if not groups:
        raise UsageError("BSSEval needs two stems with sources of MUSDB18: --residual gives one more, the rest")
    labels = {}
    for group, scored in groups:
        sources = [source for name in group for source in stems[name]]
        if len(set(sources)) < len(sources):
            raise UsageError(f"stems share sources, so they cannot be told apart: {', '.join(group)}")
        four = len(group) == 4 and all(stems[name] == {name} for name in group)
        labels[FOUR if four else "/".join(group)] = scored
    return labels


def fingerprint(separator: Separator) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for model in separator.models:
        with model.parameter_scope():
            for name, parameter in sorted(nn.get_parameters(grad_only=False).items()):
                digest.update(name.encode() + parameter.d.tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ one track


class Scorer:
    """Separates and scores tracks: <evaldir>/<subset>/<track>.json, and the stems if they are to be kept.

    Args:
        aggregate, stems: see `references`
        sources: {source: its file in a folder of WAV}, musdb's
        is_wav: whether tracks are such folders
        outdir: of the stems, or None
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
    ):
        self.separator, self.aggregate, self.stems = separator, aggregate or {}, stems
        self.sources, self.is_wav = sources, is_wav
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

    def __call__(self, track: musdb.MultiTrack) -> dict:
        """Separate and score a musdb track; whatever is wrong with it, the others must go on.

        Returns:
            dict: track; silent or error, if it has no scores, why; or seconds: of audio, of the work on it
        """
        try:
            return {"track": track.name, **self.score(track)}
        except Exception as error:
            with utils.postponed() as is_ending:
                if is_ending():  # within a function of NNabla, which turned an interruption into another error
                    raise KeyboardInterrupt from error
            kind = "" if isinstance(error, (UsageError, OSError)) else f"{type(error).__name__}: "
            return {"track": track.name, "error": " ".join(f"{kind}{utils.describe(error)}".split())}

    def score(self, track: musdb.MultiTrack) -> dict:
        import museval

        (song,) = open_tracks([track], self.sources, self.is_wav)
        truth = {
            stem: sum(song.read(song.sources[source], dtype="float64").T for source in sorted(sources))
            for stem, sources in self.stems.items()
        }
        silent = next((f"the source {name!r} is silent" for name, audio in truth.items() if is_silent(audio)), None)
        if silent and all(path.exists() for path in self.files(track).values()):
            return {"silent": silent}
        start = time.perf_counter()
        estimates = self.estimates(song)
        separated = time.perf_counter()
        self.write(track, estimates, song.sample_rate)
        silent = silent or next(
            (f"the estimate {name!r} is silent" for name in truth if is_silent(estimates[name])), None
        )
        if silent:  # museval would raise
            return {"silent": silent}
        scoring = time.perf_counter()
        scores = museval.eval_mus_track(
            SimpleNamespace(
                name=track.name,
                rate=song.sample_rate,
                targets={name: SimpleNamespace(audio=audio) for name, audio in truth.items()},
            ),
            {name: estimates[name] for name in truth},
        )
        scores.validate()
        # not by museval's output_dir: it writes in place, and says nothing about a full disk
        files.write(self.json(track), scores.json.encode())
        seconds = {"separation": separated - start, "museval": time.perf_counter() - scoring}
        return {"seconds": {"audio": song.nb_timesteps / song.sample_rate, **seconds}}

    def estimates(self, song: Track) -> dict[str, np.ndarray]:
        """Stems (nb_timesteps, nb_channels) by name."""
        stems = self.separator(song.read(song.mixture), song.sample_rate)
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


# ------------------------------------------------------------------------------------------ all tracks


def set_up(loading: dict, threads: int, plain: bool, **options) -> Scorer:
    """A Scorer with a Separator of its own; arguments as of Separator.load and Scorer."""
    context.use(loading["context"], loading["device_id"], plain, threads)
    return Scorer(Separator.load(**loading), **options)


_scorer = None  # of a process of `in_processes`


def _start(arguments):
    def end_with_parent():  # else a process would work on after kill -9, and then wait for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    global _scorer
    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is one between processes, which those that are killed leave behind
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):  # the parent said it
            _scorer = set_up(**arguments)
    except Exception as error:  # which the parent has not met: now it is that of each track
        line = f"{type(error).__name__}: {utils.describe(error)}"

        def _scorer(track):
            return {"track": track.name, "error": line}


def _score(track):
    return _scorer(track)


def in_processes(tracks: list[musdb.MultiTrack], cores: int, threads: int, arguments: dict) -> Iterator[dict]:
    """Results of tracks, as they come, from `cores` processes of `threads` threads each.

    Processes are spawned, not forked: a fork would copy NNabla's state and our pool, but not their threads.
    """
    limits = {f"{name}_NUM_THREADS": str(threads) for name in ("OPENBLAS", "MKL", "OMP")}
    before = {name: os.environ.get(name) for name in limits}
    with ProcessPoolExecutor(
        cores, multiprocessing.get_context("spawn"), _start, ({**arguments, "threads": threads},)
    ) as pool:
        try:
            # What processes are born with: BLAS reads its limits when it is imported, and Ctrl-C is for us alone.
            os.environ.update(limits)
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            pending = {}
            try:
                for track in tracks:
                    with contextlib.suppress(BrokenProcessPool):  # one has died already
                        pending[pool.submit(_score, track)] = track
            finally:
                signal.signal(signal.SIGINT, handler)
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.update({name: value})
            left = list(tracks)
            for future in as_completed(pending):
                with contextlib.suppress(BrokenProcessPool):
                    yield future.result()
                    left.remove(pending[future])
            died = "not scored, a process died: of too little memory? Try fewer --cores"
            yield from ({"track": track.name, "error": died} for track in left)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


# ---------------------------------------------------------------------------------------------- results


def prepare(evaldir: Path, subset: str, settings: dict) -> dict:
    """The folder of the scores, ready for a new run, or for another one with the same settings.

    Returns:
        the content of summary.json
    """
    summary, folder = Path(evaldir, "summary.json"), files.writable_folder(Path(evaldir, subset))
    if not summary.exists():
        if any(folder.glob("*.json")):
            raise UsageError(f"{evaldir} holds scores, but no summary.json that tells whose: choose another --evaldir")
        files.write_json(summary, {"settings": settings})
    earlier = files.read_json(summary)
    if not isinstance(earlier, dict) or not isinstance(earlier.get("settings"), dict):
        raise UsageError(f"{summary} is not what evaluate.py writes: choose another --evaldir")
    former = {"wiener_eps": 1e-10, **earlier["settings"]}  # which earlier versions did not write
    for key, value in settings.items():
        was = former.get(key)
        if was != value:
            raise UsageError(f"{evaldir} holds scores with {key} {was!r:.200}, not {value!r}: choose another --evaldir")
    return earlier


def per_minute(results: Iterable[dict]) -> dict[str, float]:
    """Seconds of work per minute of audio, {part: seconds}; of the tracks that were scored in this run."""
    scored = [result["seconds"] for result in results if "seconds" in result]
    minutes = sum(seconds["audio"] for seconds in scored) / 60
    return {part: sum(seconds[part] for seconds in scored) / minutes for part in ("separation", "museval") if scored}


def report(
    results: list[dict], paths: list[Path], labels: Labels, evaldir: Path, subset: str, summary: dict, cores: int
) -> bool:
    """Print what has come out, and write summary.json, which is to hold `summary` too.

    Args:
        results: of this run
        paths: of the JSON files of all tracks that have scores
    Returns:
        whether there are scores, and no track has failed
    """
    silent = {result["track"]: result["silent"] for result in results if "silent" in result}
    failed = {result["track"]: result["error"] for result in results if "error" in result}
    summary = {**summary, "silent": silent, "failed": failed, **utils.run_metadata()}
    summary["date"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    if paths:
        lines, scores = summarize(evaldir, paths, labels, subset)
        summary.update(scores)
        print(lines)
        if scores["frames_without_score"]:
            print("Without a score, since a stem is silent, are the frames:")
        for track, count in scores["frames_without_score"].items():
            print(f"  {track}: {count}")
    if seconds := per_minute(results):
        summary["seconds_per_minute"] = {**seconds, "cores": cores}
        print(
            ", ".join(f"{part} {value:.1f} s" for part, value in seconds.items()) + " per minute of audio and process"
        )
    files.write_json(evaldir / "summary.json", without_nan(summary))
    for track, reason in silent.items():
        print(f"Not scored: {track}: {reason}")
    for track, error in failed.items():
        print(f"evaluate.py: {track}: {error}", file=sys.stderr)
    if failed or not paths:
        print(f"evaluate.py: {len(failed)} track(s) failed, {len(paths)} scored", file=sys.stderr)
    return bool(paths) and not failed


# ----------------------------------------------------------------------------------------- command line


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    args = evaluate_parser().parse_args(argv)
    subset, split = ("train", "valid") if args.subset == "valid" else (args.subset, None)
    evaldir = Path(os.path.expanduser(args.evaldir or Path("evaluation", folders.name_of_models(args.model))))
    mus = database(args.root, args.is_wav, subset, split)
    loading = {
        "model": args.model,
        "targets": args.targets,
        "model_dir": args.model_dir,
        "network": args.network,
        "network_options": args.network_options,
        "quiet": args.quiet,
        "niter": args.niter,
        "softmask": args.softmask,
        "alpha": args.alpha,
        "residual": args.residual or False,
        "wiener_win_len": args.wiener_win_len or None,
        "wiener_eps": args.wiener_eps or None,
        "context": args.context,
        "device_id": args.device_id,
        "segment": args.segment,
    }
    context.use(args.context, args.device_id, args.plain, args.threads)
    separator = Separator.load(**loading)
    aggregate = checked_aggregate(separator, args.aggregate)
    stems = references(separator, aggregate, mus.setup["targets"])
    labels = evaluations(stems)
    # What changes scores by more than rounding: neither --context nor --threads.
    settings = {
        "root": str(Path(mus.root).resolve()),
        "subset": args.subset,
        "targets": separator.targets,
        "stems": {stem: sorted(sources) for stem, sources in stems.items()},
        "sample_rate": separator.sample_rate,
        "n_hop": separator.n_hop,
        "museval": importlib.metadata.version("museval"),
        "mode": MODE,
        **{key: loading[key] for key in ("niter", "softmask", "alpha", "residual")},
        **{key: loading[key] for key in ("wiener_win_len", "wiener_eps", "segment")},
        "weights": fingerprint(separator),
    }
    files.writable_folder(evaldir)
    with files.claimed(evaldir / ".lock", f"evaluating into {evaldir}"):
        earlier = prepare(evaldir, subset, settings)
        outdir = args.outdir and files.writable_folder(args.outdir)
        options = {"sources": mus.setup["sources"], "is_wav": args.is_wav, "evaldir": evaldir, "outdir": outdir}
        options.update(aggregate=aggregate, stems=stems)
        scorer = Scorer(separator, **options)
        todo = [track for track in mus.tracks if not scorer.done(track)]
        if len(todo) < len(mus.tracks) and not args.quiet:
            print(f"{len(mus.tracks) - len(todo)} of {len(mus.tracks)} tracks have their scores already")
        cores = max(1, min(args.cores, len(todo)))
        if cores > 1:
            arguments = {"loading": {**loading, "quiet": True}, "plain": args.plain, **options}
            results = in_processes(todo, cores, max(1, kernels.threads.get_threads() // cores), arguments)
        else:
            results = map(scorer, todo)
        try:
            results = list(tqdm(results, "Separating and scoring", len(todo), disable=args.quiet, unit="track"))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted: the same command continues") from None
        paths = [scorer.json(track) for track in mus.tracks if scorer.scored(track)]
        summary = {"settings": settings, "model": args.model if len(args.model) > 1 else args.model[0]}
        summary["seconds_per_minute"] = earlier.get("seconds_per_minute")
        is_whole = report(results, paths, labels, evaldir, args.subset, summary, cores)
    if not is_whole:
        sys.exit(1)


if __name__ == "__main__":
    main()
