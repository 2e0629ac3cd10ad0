"""Stems from recordings: ``python separate.py song.mp3``; from Python, `Separator`, and `Stream` while they go on."""

from __future__ import annotations  # unions, on Python 3.9

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pool

if __name__ in ("__main__", "__mp_main__"):
    pool.start(__name__)  # before imports that take long

import nnabla_ext.cpu
import numpy as np
from tqdm import tqdm

import audio
import context
import folders
import utils
from args import separate_parser, separator_options
from separator import Separator
from stems import check_places, check_sum, checked_aggregate, checked_subtype, write_stems
from streaming import Stream
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


# Options that say something of a stream.
STREAMING = {"stream", "inputs", "model", "model_dir", "targets", "karaoke", "residual", "aggregate", "softmask"}
STREAMING |= {"alpha", "threads", "quiet"}


def stream(args: argparse.Namespace, given: set[str]) -> None:
    """Standard input to standard output, as --stream says; `given` are the names of the options that are there."""
    if unused := sorted(given - STREAMING):
        raise UsageError(f"--{unused[0].replace('_', '-')} has no effect on a stream: leave it out")
    if args.inputs:
        raise UsageError(f"--stream separates what comes on standard input, not {args.inputs[0]}")
    if os.isatty(0) or os.isatty(1):
        raise UsageError("--stream reads and writes raw samples: pipes or files, not a terminal (docs/inference.md)")
    context.use("cpu", threads=args.threads)
    separator = Separator.load(**{**separator_options(args), "niter": 0, "context": "cpu"})
    live = Stream(separator)
    stems = checked_aggregate(separator, args.aggregate) or {name: [name] for name in separator.sources}
    if args.karaoke:
        stems.pop("vocals")
    if len(stems) > 1:
        raise UsageError(f"a stream has one stem, not {', '.join(stems)}: choose it by --targets, or --aggregate")
    ((name, parts),) = stems.items()
    if not args.quiet:
        seconds = live.latency / live.sample_rate
        form = f"float32, {live.nb_channels} channels, {live.sample_rate:g} Hz"
        print(f"{name}: {form}, {live.latency} samples ({1000 * seconds:.0f} ms) late", file=sys.stderr, flush=True)
    with open(0, "rb", closefd=False) as source:
        copy_stem(live, [separator.sources.index(part) for part in parts], source, sys.stdout.buffer)


def copy_stem(live: Stream, parts: list[int], source: BinaryIO, sink: BinaryIO) -> None:
    """Raw samples, float32 with channels side by side, into those of the sum of some stems, as soon as they come.

    Raises:
        UsageError: samples that are none, or the last one lacks channels; what came before it is written.
    """

    def write(stems):
        try:
            sink.write(np.ascontiguousarray(stems[parts].sum(axis=0).T, "<f4").data)
            sink.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from None

    size, data = 4 * live.nb_channels, b""
    while more := source.read1(2**16):
        data += more
        whole = len(data) // size * size
        write(live(np.frombuffer(data[:whole], "<f4").reshape(-1, live.nb_channels).T))
        data = data[whole:]
    write(live.flush())
    if data:
        raise UsageError(
            f"standard input ends within a sample: {live.nb_channels} channels of float32 are {size} bytes"
        )


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    args, given = separate_parser().parse(argv)
    if args.karaoke:
        if double := sorted(given & {"targets", "residual", "aggregate"}):
            raise UsageError(f"--karaoke is --targets vocals --residual accompaniment: leave out --{double[0]}")
        args.targets, args.residual = ["vocals"], "accompaniment"
    if args.stream:
        return stream(args, given)
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
