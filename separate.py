"""Stems from recordings: ``python separate.py song.mp3``; from Python, `Separator`, and `Stream` while they go on."""

from __future__ import annotations  # unions, on Python 3.9

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import pool

if __name__ in ("__main__", "__mp_main__"):
    pool.start(__name__)  # before imports that take long

import nnabla_ext.cpu
from tqdm import tqdm

import audio
import context
import folders
import live
import utils
from args import separate_parser, separator_options
from separator import Separator
from stems import check_places, check_sum, checked_aggregate, checked_subtype, write_stems
from streaming import Stream  # noqa: F401, for those who import it from here
from utils import UsageError


def set_up(loading: dict, threads: int, plain: bool, writing: tuple) -> Callable[[list], Iterable[dict]]:
    """`separate_song` of a list, with a Separator of its own; arguments as of Separator.load and `write_stems`."""
    context.use(loading["context"], loading["device_id"], plain, threads)
    return partial(map, partial(separate_song, Separator.load(**loading), writing))


def separate_song(separator: Separator, writing: tuple, song: tuple[Path, Path]) -> dict:
    """Write the stems of a song, (recording, folder of its stems); whatever is wrong with it, the others must go on.

    Returns:
        dict: song; the factor that its stems are scaled with; or an error in a line, and the exit status for it
    """
    try:
        return {"song": song, "factor": write_stems(separator, *song, *writing)}
    except Exception as error:
        if utils.is_ending():
            raise
        return {"song": song, "error": _line(song[0], error), "status": 2 if isinstance(error, UsageError) else 1}


def not_separated(song: tuple[Path, Path], line: str) -> dict:
    """The same, of a song that no process could be handed."""
    return {"song": song, "error": f"{song[0]}: {line}", "status": 1}


def _line(path, error):
    """What went wrong with a song, in a line that says where."""
    if isinstance(error, MemoryError):
        error = f"{path}: not enough memory"
    elif not isinstance(error, (UsageError, OSError)):
        error = f"{path}: {type(error).__name__}: {error}"
    elif isinstance(error, OSError):
        error = utils.describe(error) if error.filename else f"{path}: {error}"
    return " ".join(str(error).split())


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    args, given = separate_parser().parse(argv)
    if args.karaoke:
        if double := sorted(given & {"targets", "residual", "aggregate"}):
            raise UsageError(f"--karaoke is --targets vocals --residual accompaniment: leave out --{double[0]}")
        args.targets, args.residual = ["vocals"], "accompaniment"
    if args.stream or args.play:
        return live.stream(args, given)
    if own := sorted(given & live.OWN):
        raise UsageError(f"--{own[0].replace('_', '-')} is an option of --stream, which is not there")
    if not args.inputs:  # behind a model: "--model umxhq song.mp3"
        args.model, args.inputs = args.model[:1], args.model[1:]
    if not args.inputs:
        raise UsageError("which recordings? python separate.py song.mp3 --model umxhq")
    checked_subtype(args.ext, args.subtype)
    recordings = audio.recordings(args.inputs)
    cores = min(pool.places(args.cores), len(recordings))
    context.use(args.context, args.device_id, args.plain, args.threads)
    loading = separator_options(args)
    separator = Separator.load(**loading)
    aggregate = checked_aggregate(separator, args.aggregate)
    if args.sum_to_mixture:
        check_sum(separator, aggregate)
    outdir, model = args.outdir and os.path.expanduser(args.outdir), folders.name_of_models(args.model)
    songs = [(path, Path(outdir, name) if outdir else Path(f"{name}_{model}")) for path, name in recordings]
    check_places(songs, aggregate or separator.sources, args.ext)
    writing = args.start, args.duration, aggregate, args.ext, args.subtype, args.sum_to_mixture
    if cores > 1:
        del separator  # each process has its own
        nnabla_ext.cpu.clear_memory_cache()
        begin = partial(set_up, {**loading, "quiet": True}, plain=args.plain, writing=(*writing, True))
        results = pool.results(songs, begin, not_separated, cores, args.threads)
    else:
        results = map(partial(separate_song, separator, (*writing, args.quiet)), songs)
    failures = set()
    # Of several songs at a time, there is one bar; else each has its own.
    for result in tqdm(results, "Separating", len(songs), disable=args.quiet or cores == 1, unit="song"):
        path, outdir = result["song"]
        if "error" in result:
            tqdm.write(f"separate.py: {result['error']}", file=sys.stderr)
            failures.add(result["status"])
            continue
        if not args.quiet:
            tqdm.write(f"{path} -> {outdir}")
        if result["factor"] < 1:
            tqdm.write(
                f"{path}: stems scaled by {result['factor']:.3f}, or they would clip; --subtype float keeps levels",
                file=sys.stderr,
            )
    if failures:
        sys.exit(min(failures))


if __name__ == "__main__":
    pool.run(main)
