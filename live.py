"""separate.py --stream: from standard input to standard output, or with --play from sound device to sound device."""

from __future__ import annotations  # unions, on Python 3.9

import argparse
import os
import sys
from typing import BinaryIO

import numpy as np

import context
from args import separator_options
from separator import Separator
from stems import checked_aggregate
from streaming import Stream
from utils import UsageError

OWN = {"stream", "play", "causal_wiener"}  # options of a stream alone
SHARED = {"inputs", "model", "model_dir", "targets", "karaoke", "residual", "aggregate", "softmask", "alpha"}
SHARED |= {"wiener_eps", "threads", "quiet"}


def stream(args: argparse.Namespace, given: set[str]) -> None:
    """What --stream says; `given` are the names of the options that are there."""
    if unused := sorted(given - OWN - SHARED):
        raise UsageError(f"--{unused[0].replace('_', '-')} has no effect on a stream: leave it out")
    if args.causal_wiener is None and "wiener_eps" in given:
        raise UsageError("--wiener-eps has no effect on a stream without --causal-wiener: leave it out")
    if args.inputs:
        raise UsageError(f"--stream separates what comes, not {args.inputs[0]}")
    sounddevice = import_sounddevice() if args.play else None
    if not args.play and (os.isatty(0) or os.isatty(1)):
        raise UsageError("--stream reads and writes raw samples: pipes or files, not a terminal (docs/inference.md)")
    context.use("cpu", threads=args.threads)
    separator = Separator.load(**{**separator_options(args), "niter": 0, "context": "cpu"})
    live = Stream(separator, args.causal_wiener)
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
    parts = [separator.sources.index(part) for part in parts]
    if sounddevice:
        return play(live, parts, separator.n_hop, sounddevice)
    with open(0, "rb", closefd=False) as source:
        copy_stem(live, parts, source, sys.stdout.buffer)


def copy_stem(live: Stream, parts: list[int], source: BinaryIO, sink: BinaryIO) -> None:
    """Raw samples, float32 with channels side by side, into those of the sum of some stems, as soon as they come.

    Raises:
        UsageError: samples that are none, or the last one lacks channels; what came before it is written.
    """

    def write(stems):
        try:
            sink.write(_interleaved(stems, parts).data)
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


def _interleaved(stems, parts):
    """The sum of some stems (nb_sources, nb_channels, n) as (n, nb_channels)."""
    return np.ascontiguousarray(stems[parts].sum(axis=0).T, "<f4")


# ---------------------------------------------------------------------------------------- devices


def import_sounddevice():
    """The package of that name; UsageError if it, or what it needs, is not there."""
    try:
        import sounddevice
    except ImportError:
        raise UsageError("--play needs the package sounddevice: pip install sounddevice") from None
    except OSError as error:  # its wheels for Linux do without
        raise UsageError(f"--play: {error}: install it, as by apt-get install libportaudio2") from None
    return sounddevice


def play(live: Stream, parts: list[int], nb_timesteps: int, sounddevice) -> None:
    """What the system's sound device takes in, block by block, as the sum of some stems to that which it plays.

    Blocks of nb_timesteps go in and come out alike, with silence until the first stem is there. It has no end of
    its own.

    Raises:
        UsageError: devices that there are not, or that do not do what is asked of them.
        OSError: they fail on the way.
    """
    form = {"samplerate": live.sample_rate, "channels": live.nb_channels, "dtype": "float32"}
    try:
        device = sounddevice.Stream(blocksize=nb_timesteps, **form)
    except sounddevice.PortAudioError as error:
        raise UsageError(f"--play: {error}: python -m sounddevice lists the devices") from None
    behind, is_slow = 0, False
    with device:
        while True:
            try:
                block, overflowed = device.read(nb_timesteps)
                stem = _interleaved(live(block.T), parts)
                behind += nb_timesteps - len(stem)
                silence = np.zeros((max(0, behind), live.nb_channels), np.float32)
                behind -= len(silence)
                device.write(np.concatenate([silence, stem]))
            except sounddevice.PortAudioError as error:
                raise OSError(f"--play: {error}") from None
            if overflowed and not is_slow:
                is_slow = True
                print("samples were lost: the stems take longer than the sound", file=sys.stderr, flush=True)
