"""Time and memory of ours, of native NNabla and of torch's openunmix, on the same work: ``make bench``.

Every measurement is a process of its own (nnabla_side.py, torch_side.py); those to be compared alternate, so that a
machine that changes its pace changes it for all. The report, docs/performance.md, is written whole.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile

import numpy as np
import work
from report import (
    ROOT,
    add_options,
    execute,
    machine,
    origin,
    ratio_of,
    run,
    spread,
    table,
    versions_table,
    warn_if_busy,
)

REPORT = """\
# Performance

Written by `make bench` (`{command}`) on {date}, at commit {commit}. Do not edit.

**ours** is this repository; **native** the same model with `--plain`, made of NNabla's own functions only; **torch**
the reference, openunmix 1.3.0. All have {threads} threads. The model has three bidirectional layers, reads 1487 bins of
STFTs of 4096 samples every 1024, and works on stereo at 44.1 kHz in single precision. Its hidden size is 512, as of
the published umx and umxhq, or, where that is said, 1024, as of umxl, the default model. Weights are random.

Numbers are medians over {rounds} rounds of alternating processes, in parentheses the smallest and the largest.
Ratios are of medians: below 1, ours is the faster, or the smaller. Memory is the peak of the whole process.

## Machine

{machine}

{versions}

## Training step

STFTs of mixture and target, forward, loss, backward, Adam with weight decay; excerpts of 6 s. Ours is the function
that `train.py` calls, given a batch as its workers prepare it; torch's is the loop of openunmix' `train.py`.

{steps}

Large products are our own (`kernels/blocks.py`), and torch's its own, so `OPENBLAS_CORETYPE`, the processor that
OpenBLAS computes for, should not matter. A step at batch {batch} as it is set here, and otherwise, in one process of
each side:

{coretype}

## Joint step

A step of four targets, with the batches that it reads: four separate trainings, their networks side by side
(`--targets`), with X-UMX's bridges (`--crossing`), and with its loss, too (`--loss xumx`). What networks side by side
have in common is the mixture: how it is read, and its spectrogram, which at batch {batch} is {share:.1%} of a separate
step, so that sharing it leaves {left:.3f} of four. `python benchmarks/bench.py --joint` measures this alone.

{joint}

## Functions

In milliseconds, at batch {batch}; backward includes the gradients of parameters. Ours are timed within a step. torch's
stand alone, cut from `OpenUnmix.forward`, on inputs of the memory layout that they have there.

{functions}

## Native NNabla

A training step at batch 1 of {native_seconds} s, small enough for native NNabla. Ours is {factor:.0f} times as fast.

{native}

## Native transform

The STFT of a batch of {batch}, stereo, 6 s, in native functions: NNabla's own, F.stft, a convolution, and the two
matrix products of `fourier.py`, the form for a GPU; in turns within a process. Operations are those of the products.
`python benchmarks/bench.py --transform` measures this alone.

{transform}

## Separation

Four stems, with one iteration of the Wiener filter, from audio in memory to audio in memory; models are loaded.
Stems of ours and of torch's, from the same weights, differ by {difference:.0e} of the largest sample. Of several songs,
ours go through the networks together (`Separator.together`), torch's one after the other.

{songs}

## Separation of {long}

Measured once, and of ours alone, which reads the recording and yields stems piece by piece, as `separate.py` does with
files. Per minute of audio, torch's time is that of {last} above.

{streams}

## Cold start

From the model to the end of the first training step (batch 1, 6 s), and from files of weights to the first separated
second. With an empty cache, as after installation, our functions are compiled first, once.

{cold}
"""


# ---------------------------------------------------------------------------------------- processes


def alternate(rounds, sides, reference, **options):
    """{side: its reports as one, with times and results of all rounds}; every other round goes backwards."""
    reports = {side: [] for side in sides}
    for i in range(rounds):
        for side in sides[:: -1 if i % 2 else 1]:
            said = " ".join(f"{key} {value}" for key, value in options.items() if key in ("nb_samples", "seconds"))
            print(f"{options['work']} {said}: {side}, round {i + 1} of {rounds}", file=sys.stderr, flush=True)
            reports[side].append(run(side, reference, **options))
    return {
        side: {
            **some[0],
            "times": {name: sum((report["times"][name] for report in some), []) for name in some[0]["times"]},
            "peak": statistics.median(report["peak"] for report in some),
            "results": [report["result"] for report in some],
        }
        for side, some in reports.items()
    }


# ------------------------------------------------------------------------------------------ report


def whole_table(other, work_name, cases):
    """Time and memory of `work_name` as a whole; `cases` maps the first cell to the reports of ours and the other."""
    rows = []
    for case, reports in cases.items():
        times, peaks = ([reports[side][key] for side in ("ours", other)] for key in ("times", "peak"))
        times = [some[work_name] for some in times]
        rows.append([case, *(f"{spread(t, '.3f')} s" for t in times)])
        rows[-1] += [f"{ratio_of(*times):.3f}", *(f"{peak / 2**20:.0f} MiB" for peak in peaks)]
        rows[-1].append(f"{peaks[0] / peaks[1]:.2f}")
    return table(["", "ours", other, "ratio", "memory: ours", other, "ratio"], rows)


def function_table(other, reports):
    rows = []
    for name, does in work.FUNCTIONS.items():
        row = [f"`{name}`: {does}"]
        for phase in ("forward", "backward"):
            times = [reports[side]["times"].get(f"{name} {phase}", []) for side in ("ours", other)]
            row += [f"{statistics.median(t) * 1e3:.1f}" if t else "" for t in times]
            row.append(f"{ratio_of(*times):.3f}" if all(times) else "")
        rows.append(row)
    return table(["", "forward: ours", other, "ratio", "backward: ours", other, "ratio"], rows)


def joint_table(rounds, repeats, threads):
    """Of `work.JOINT`, in alternating processes."""
    rows = []
    with tempfile.TemporaryDirectory() as songs:
        lengths = ("--train", "4", "--valid", "1", "--test", "0", "--duration", "20")
        execute([sys.executable, ROOT / "synthesize.py", songs, *lengths, "--quiet"])
        for n, repeat in repeats.items():
            times, peaks = ({kind: [] for kind in work.JOINT} for _ in range(2))
            size = {"nb_samples": n, "seconds": 6.0, "warm_up": 2, "repeat": repeat}
            for i in range(rounds):
                for kind in list(work.JOINT)[:: -1 if i % 2 else 1]:
                    print(f"joint step {n}: {kind}, round {i + 1} of {rounds}", file=sys.stderr, flush=True)
                    report = run("ours", None, work="joint", songs=songs, kind=kind, threads=threads, **size)
                    factor = 4 if kind == "separate" else 1
                    times[kind] += [factor * seconds for seconds in report["times"]["step"]]
                    peaks[kind].append(report["peak"])
            row = [f"batch {n}", f"{spread(times['separate'], '.3f')} s"]
            for kind, other in (("side by side", "separate"), ("bridges", "side by side"), ("X-UMX", "side by side")):
                row += [f"{spread(times[kind], '.3f')} s", f"{ratio_of(times[kind], times[other]):.3f}"]
            rows.append([*row, f"{statistics.median(peaks['X-UMX']) / 2**20:.0f} MiB"])
    header = ["", "four separate", "side by side", "ratio to these", "bridges", "to side by side"]
    return table([*header, "X-UMX", "to side by side", "its memory"], rows)


def coretype_table(other, steps, **options):
    """Of reports of `steps` with the machine's setting, and of one process each with another one, or without."""
    set_here, rows = os.environ.get("OPENBLAS_CORETYPE"), []
    another = None if set_here else "Haswell"
    print(f"step with OPENBLAS_CORETYPE {another}", file=sys.stderr, flush=True)
    changed = {side: run(side, environment={"OPENBLAS_CORETYPE": another}, **options) for side in ("ours", other)}
    for setting, reports in ((set_here, steps), (another, changed)):
        times = [reports[side]["times"]["step"] for side in ("ours", other)]
        rows.append([f"`{setting}`" if setting else "not set", *(f"{spread(t, '.3f')} s" for t in times)])
        rows[-1].append(f"{ratio_of(*times):.3f}")
    return table(["`OPENBLAS_CORETYPE`", "ours", other, "ratio"], rows)


def stream_table(other, seconds, reports, compared, shorter):
    """Of one report of ours for each size, and those of both for recordings of `shorter` seconds."""
    rows = []
    for size, report in reports.items():
        whole, theirs = report["times"]["separate"], compared[size][other]["times"]["separate"]
        minutes = [[60 / length * t for t in times] for length, times in ((seconds, whole), (shorter, theirs))]
        rows.append([size, f"{whole[0]:.0f} s", *(f"{statistics.median(t):.2f} s" for t in minutes)])
        rows[-1] += [f"{ratio_of(*minutes):.3f}", f"{report['peak'] / 2**20:.0f} MiB"]
    return table(["", "ours", "per minute: ours", other, "ratio", "memory: ours"], rows)


def transform_table(nb_samples, threads):
    """F.stft and fourier.py: of frames of N samples N (N + 2) products, or 2 N (P + Q + 2) with P = Q = √N."""
    times = run("ours", None, work="transform", nb_samples=nb_samples, seconds=6.0, repeat=3, threads=threads)["times"]
    n, nb_frames = work.N_FFT, 2 * nb_samples * ((6 * work.RATE - work.N_FFT) // work.N_HOP + 1)
    products = {"F.stft": n * (n + 2), "fourier": 2 * n * (2 * math.isqrt(n) + 2)}
    rows = [["time", *(f"{spread(times[name], '.2f')} s" for name in products)]]
    rows[0].append(f"{ratio_of(times['fourier'], times['F.stft']):.3f}")
    rows.append(["operations", *(f"{2e-9 * nb_frames * count:.1f} GFLOP" for count in products.values())])
    rows[1].append(f"{products['fourier'] / products['F.stft']:.3f}")
    return table(["", *products, "ratio"], rows)


def _songs(size, nb_songs, seconds):
    return (
        (f"{nb_songs} songs of " if nb_songs > 1 else "") + f"{seconds} s" + (", hidden 1024" if size == 1024 else "")
    )


# --------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side per measurement")
    parser.add_argument("--joint", action="store_true", help="joint steps alone; writes no report")
    parser.add_argument("--transform", action="store_true", help="the native transform alone; writes no report")
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it runs; writes no report")
    add_options(parser)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    repeats = {1: 2, 2: 1} if args.quick else {1: 20, 4: 8, 16: 4}  # training steps of a process, by batch
    batch, native_seconds, lengths, hour = max(repeats), *((1, (10,), 20) if args.quick else (3, (60, 180), 3600))
    hidden = {size: {"HIDDEN_SIZE": size} for size in (512, 1024)}

    def compare(*sides, **options):
        return alternate(rounds, sides, args.reference, threads=args.threads, **options)

    warn_if_busy()
    joint = {4: 2} if args.quick else {4: 8, 16: 4}
    if args.joint:
        print(joint_table(rounds, joint, args.threads))
        return
    if args.transform:
        print(transform_table(batch, args.threads))
        return
    computer = machine()  # before our own load
    sizes = {n: {"nb_samples": n, "seconds": 6, "warm_up": 2, "repeat": repeat} for n, repeat in repeats.items()}
    steps = {n: compare("ours", "torch", work="step", **size) for n, size in sizes.items()}
    large = {**sizes[batch], "warm_up": 1, "repeat": 2, "sizes": hidden[1024]}
    large = compare("ours", "torch", work="step", **large)
    options = {"reference": args.reference, "work": "step", "threads": args.threads, **sizes[batch]}
    coretype = coretype_table("torch", steps[batch], **options)
    functions = compare("ours", "torch", work="functions", **sizes[batch])
    small = {"nb_samples": 1, "seconds": native_seconds, "warm_up": 1, "repeat": 10}
    native = compare("ours", "native", work="functions", **small)
    cold, songs, streams = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for size, of_size in hidden.items():
            song = {"work": "separate", "folder": f"{folder}/{size}", "sizes": of_size}
            run("torch", args.reference, **{**song, "work": "weights"})
            for nb_songs, seconds in [*((1, seconds) for seconds in lengths), (4, lengths[0])]:
                songs[size, nb_songs, seconds] = compare("ours", "torch", seconds=seconds, nb_songs=nb_songs, **song)
            print(f"stream {hour} s", file=sys.stderr, flush=True)
            stream = {**song, "work": "stream", "seconds": hour, "threads": args.threads}
            streams[f"hidden {size}"] = run("ours", None, **stream)
        song = {"work": "separate", "folder": f"{folder}/512", "seconds": 1}
        for name, options in {"step": {"work": "step", **sizes[1]}, "separate": song}.items():
            with tempfile.TemporaryDirectory() as cache:
                cache = {"NUMBA_CACHE_DIR": cache}
                cold[name] = run("ours", None, cache, threads=args.threads, **options)["times"]["first"]

    stems = [[np.array(reports[side]["result"]) for side in ("ours", "torch")] for reports in songs.values()]
    difference = max(abs(ours - torch).max() / abs(torch).max() for ours, torch in stems)
    if difference > 1e-4:
        sys.exit(f"stems of ours and of torch differ by {difference:.1e}: they did not do the same work")
    firsts = {"training step": [cold["step"], steps[1]["ours"]["times"]["first"]]}
    firsts["separation"] = [cold["separate"], songs[512, 1, lengths[0]]["ours"]["times"]["first"]]
    last = {f"hidden {size}": songs[size, 1, lengths[-1]] for size in hidden}
    songs = {_songs(*which): reports for which, reports in songs.items()}
    steps = {**{f"batch {n}": some for n, some in steps.items()}, f"batch {batch}, hidden 1024": large}
    times = functions["ours"]["times"]  # of both spectrograms, the mixture's and the target's
    share = statistics.median(times["spectrogram forward"]) / 2 / statistics.median(times["step"])
    report = REPORT.format(
        **origin(),
        share=share,
        left=1 - 0.75 * share,
        threads=args.threads,
        rounds=rounds,
        machine=computer,
        versions=versions_table(*(functions[side]["versions"] for side in ("ours", "torch")), "ours, native"),
        steps=whole_table("torch", "step", steps),
        coretype=coretype,
        joint=joint_table(rounds, joint, args.threads),
        batch=batch,
        functions=function_table("torch", functions),
        native_seconds=native_seconds,
        factor=ratio_of(*(native[side]["times"]["step"] for side in ("native", "ours"))),
        native=whole_table("native", "step", {"step": native}) + "\n\n" + function_table("native", native),
        transform=transform_table(batch, args.threads),
        difference=difference,
        songs=whole_table("torch", "separate", songs),
        long="an hour" if hour == 3600 else f"{hour} s",
        last=f"{lengths[-1]} s",
        streams=stream_table("torch", hour, streams, last, lengths[-1]),
        cold=table(
            ["", "empty cache", "later"],
            [[name, *(f"{statistics.median(t):.1f} s" for t in both)] for name, both in firsts.items()],
        ),
    )
    print(report)
    if not args.quick:
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "performance.md").write_text(report)


if __name__ == "__main__":
    main()
