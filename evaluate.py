"""Scores over MUSDB18: ``python evaluate.py --root MUSDB18`` separates its test set and scores it by BSSEval v4.

<evaldir>/<subset>/<track>.json is what museval writes (frames of 1 s); summary.json and scores.png sum it up:
medians over frames, then over tracks, the way of SiSEC 2018. ``--compare A B`` compares two of them, song by song.
"""

from __future__ import annotations  # unions, on Python 3.9

import datetime
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pool

if __name__ in ("__main__", "__mp_main__"):
    pool.start(__name__)  # before imports that take long

import nnabla as nn
from tqdm import tqdm

import context
import files
import folders
import utils
from args import evaluate_parser, separator_options
from datasets.musdb18 import database
from scorer import Scorer, evaluations, references, scored_by
from scores import MODE, Labels, compare, summarize, without_nan
from separator import Separator
from stems import checked_aggregate
from utils import UsageError

if TYPE_CHECKING:
    import musdb  # needs ffmpeg, so it is imported where it is used

# Songs that go through the networks together, so that weights are read once for all of them: four take 0.7 to 0.86 of
# the time that they take alone. More gain little, and have more memory, and more to lose.
TOGETHER = 4

# ------------------------------------------------------------------------------------------ all tracks


def fingerprint(separator: Separator) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for model in separator.models:
        with model.parameter_scope():
            for name, parameter in sorted(nn.get_parameters(grad_only=False).items()):
                digest.update(name.encode() + parameter.d.tobytes())
    return digest.hexdigest()


def set_up(loading: dict, threads: int, plain: bool, **options) -> Scorer:
    """A Scorer with a Separator of its own; arguments as of Separator.load and Scorer."""
    context.use(loading["context"], loading["device_id"], plain, threads)
    return Scorer(Separator.load(**loading), **options)


def not_scored(track: musdb.MultiTrack, line: str) -> dict:
    """What a Scorer gives, of a track that it could not be handed to."""
    return {"track": track.name, "error": line}


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
    former = {"wiener_eps": 1e-10, "reference_precision": "file"}  # which earlier versions did not write
    former["scorer"] = f"museval {earlier['settings'].get('museval')}"
    former.update(earlier["settings"])
    for key, value in settings.items():
        was = former.get(key)
        if was != value:
            raise UsageError(f"{evaldir} holds scores with {key} {was!r:.200}, not {value!r}: choose another --evaldir")
    return earlier


def per_minute(results: Iterable[dict]) -> dict[str, float]:
    """Seconds of work per minute of audio, {part: seconds}; of the tracks that were scored in this run."""
    scored = [result["seconds"] for result in results if "seconds" in result]
    minutes = sum(seconds["audio"] for seconds in scored) / 60
    return {part: sum(seconds[part] for seconds in scored) / minutes for part in ("separation", "scoring") if scored}


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
        if doubtful := utils.some(list(scores["doubtful"])):
            is_file = summary["settings"]["reference_precision"] == "file"
            print(f"* is noise, which moves by 0.01 dB with the last bit of the sources: {doubtful}")
            print("  rely on SDR there" + (", or use --reference-precision 16" if is_file else ""))
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
    args, given = evaluate_parser().parse(argv)
    if args.compare:
        if others := sorted(given - {"compare", "evaldir"}):
            raise UsageError(f"--compare reads scores that are there, so --{others[0].replace('_', '-')} has no effect")
        names = "-".join(Path(folder).resolve().name for folder in args.compare)
        compare(*args.compare, Path(os.path.expanduser(args.evaldir or Path("evaluation", names))))
        return
    cores = pool.places(args.cores)
    subset, split = ("train", "valid") if args.subset == "valid" else (args.subset, None)
    evaldir = Path(os.path.expanduser(args.evaldir or Path("evaluation", folders.name_of_models(args.model))))
    mus = database(args.root, args.is_wav, subset, split)
    loading = separator_options(args)
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
        "scorer": scored_by(args.museval),
        "reference_precision": args.reference_precision,
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
        options.update(aggregate=aggregate, stems=stems, precision=args.reference_precision, original=args.museval)
        scorer = Scorer(separator, **options)
        todo = [track for track in mus.tracks if not scorer.done(track)]
        if len(todo) < len(mus.tracks) and not args.quiet:
            print(f"{len(mus.tracks) - len(todo)} of {len(mus.tracks)} tracks have their scores already")
        cores = max(1, min(cores, len(todo)))
        if cores > 1:
            begin = partial(set_up, loading={**loading, "quiet": True}, plain=args.plain, **options)
            results = pool.results(todo, begin, not_scored, cores, args.threads, TOGETHER)
        else:
            groups = (todo[k : k + TOGETHER] for k in range(0, len(todo), TOGETHER))
            results = itertools.chain.from_iterable(map(scorer, groups))
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
    pool.run(main)
