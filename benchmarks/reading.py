"""Excerpts per second of ours and of openunmix' loader, on the same folders; written to docs/data.md.

Every measurement is a process of its own (nnabla_side.py, torch_side.py), and the sides alternate. Both are given the
same options of their train.py.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import stempeg
import work
from bench import alternate
from report import ROOT, add_options, execute, machine, origin, spread, table, versions_table, warn_if_busy

REPORT = """\
# Data

Written by `{command}` on {date}, at commit {commit}. Do not edit.

How fast training data are prepared: batches of {batch_size} excerpts of {seconds} s, stereo at 44.1 kHz, nothing else.
**ours** is `data.py`; **torch** `torch.utils.data.DataLoader` over the datasets of openunmix 1.3.0, as its `train.py`
makes them. Workers are threads of ours, and processes of torch's; with none, excerpts are prepared when they are asked
for.

Numbers are medians over {rounds} rounds of alternating processes, in parentheses the smallest and the largest. Files
are of 16 bits, and in memory before. CPU time is of all processes, also of those that decode for torch. The main thread
is the one that trains: what a batch costs it, in CPU time, when workers prepare it. Memory is of all processes while
the last batch is there, libraries included; what they share counts once.

## Machine

{machine}

{versions}

## Excerpts per second

{speeds}

`musdb` is {nb_songs} songs of {duration} s; each of the four sources of an excerpt is drawn on its own, with a random
gain and a channel swap. torch's side reads them with musdb, which starts ffmpeg for each source. Ours decodes
`.stem.mp4` once, into `--cache`: {decoding:.1f} s per minute of music here, which do not count above. The others are
links to the same WAV files in {nb_folders} folders, with random mixing and the same augmentations where there are
sources: four, but in `aligned`, which has two files. torch's side reads those with soundfile, in place of torchaudio.

## What they cost

{costs}

## A step

Of what `train.py` does in a step at batch {batch_size}, its main thread takes {host} ms besides the network,
forward and backward, and the optimizer: it takes over a batch that a worker has prepared, seeds the dropout, keeps the
loss, looks at the clock and for signals. Where a GPU computes the others, that is what it waits for. Measured on the
CPU, with a network that does nothing for {pause:.0f} ms a step, as time that goes by; of CPU, it is {host_cpu} ms.
"""

SOURCES = ("vocals", "drums", "bass", "other")
BATCH_SIZE, SECONDS, NB_FOLDERS = 16, 6, 512
AUGMENTED = ["--source-augmentations", "gain", "channelswap"]
PAUSE = 0.1  # seconds per step: one worker keeps up
FULL = {"songs": 4, "duration": 60, "ours": 80, "torch": {"musdb": 2, "folders": 16}, "rounds": 3}
QUICK = {"songs": 2, "duration": 10, "ours": 16, "torch": {"musdb": 1, "folders": 4}, "rounds": 1}


# ------------------------------------------------------------------------------------------- folders


def write_stems(songs, folder):
    """The songs as .stem.mp4."""
    (folder / "train").mkdir(parents=True)
    for song in sorted((songs / "train").iterdir()):
        names = ("mixture", "drums", "bass", "other", "vocals")  # musdb's order
        audio = np.stack([soundfile.read(song / f"{name}.wav")[0] for name in names])
        path = folder / "train" / f"{song.name}.stem.mp4"
        stempeg.write_stems(str(path), audio, sample_rate=work.RATE, writer=stempeg.StreamsWriter())


def write_links(songs, folder):
    """Many folders of the few songs: epochs have an excerpt of each."""
    songs = sorted((songs / "train").iterdir())
    for split, number in (("train", NB_FOLDERS), ("valid", 2)):
        for k in range(number):
            song, name = songs[k % len(songs)], f"{k:03}"
            links = {f"pairs/{split}/{name}/{stem}.wav": stem for stem in ("mixture", "vocals")}
            links.update({f"tracks/{split}/{name}/{stem}.wav": stem for stem in SOURCES})
            links.update({f"sounds/{split}/{stem}/{name}.wav": stem for stem in SOURCES})
            for link, stem in links.items():
                (folder / link).parent.mkdir(parents=True, exist_ok=True)
                (folder / link).symlink_to(song / f"{stem}.wav")


def cases(folder, samples_per_track):
    """{what: options of train.py}; those of ours alone follow later."""
    target, interferers = "vocals.wav", ["--interferer-files", *(f"{name}.wav" for name in SOURCES[1:])]
    musdb = ["--dataset", "musdb", "--target", "vocals", "--samples-per-track", str(samples_per_track), *AUGMENTED]
    found = {
        "musdb, WAV": [*musdb, "--is-wav", "--root", folder / "songs"],
        "musdb, .stem.mp4": [*musdb, "--root", folder / "stems"],
        "aligned": ["--input-file", "mixture.wav", "--output-file", target, "--root", folder / "pairs"],
        "sourcefolder": ["--target-dir", "vocals", "--interferer-dirs", *SOURCES[1:], *AUGMENTED]
        + ["--nb-train-samples", NB_FOLDERS, "--root", folder / "sounds"],
        "trackfolder_fix": ["--target-file", target, *interferers, "--random-track-mix", *AUGMENTED]
        + ["--root", folder / "tracks"],
        "trackfolder_var": ["--target-file", target, "--random-interferer-mix", *AUGMENTED]
        + ["--root", folder / "tracks"],
    }
    for name, options in found.items():
        prefix = [] if name.startswith("musdb") else ["--dataset", name]
        found[name] = [str(option) for option in [*prefix, *options, "--seq-dur", SECONDS]]
    return found


# -------------------------------------------------------------------------------------------- report


def values(reports, side, name, factor=1):
    return [factor * result[name] for result in reports[side]["results"]]


def speed_table(measured):
    rows = []
    for (case, nb_workers), reports in measured.items():
        rates = [[1 / seconds for seconds in values(reports, side, "seconds")] for side in ("ours", "torch")]
        ratio = statistics.median(rates[0]) / statistics.median(rates[1])
        rows.append([f"{case}, {nb_workers} worker(s)", spread(rates[0], ".0f"), spread(rates[1], ".1f")])
        rows[-1].append(f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}")
    return table(["", "ours", "torch", "ours / torch"], rows)


def cost_table(measured):
    rows = []
    for (case, nb_workers), reports in measured.items():
        row = [f"{case}, {nb_workers} worker(s)"]
        for name, factor, form in (("cpu", 1e3, ".1f"), ("own", 1e3, ".1f"), ("memory", 2**-20, ".0f")):
            for side in ("ours", "torch"):
                median = statistics.median(values(reports, side, name, factor))
                row.append(f"{median:{form}}" if nb_workers or name != "own" else "")
        rows.append(row)
    header = ["", "CPU per excerpt, ms: ours", "torch", "main thread per batch, ms: ours", "torch"]
    return table([*header, "memory, MiB: ours", "torch"], rows)


def measure_host(folder, rounds, reference, samples_per_track):
    """Steps of train.py whose network runs elsewhere: spreads of milliseconds, wall and CPU."""
    options = [*cases(folder, samples_per_track)["musdb, WAV"], "--batch-size", str(BATCH_SIZE), "--context", "cpu"]
    options += ["--epochs", "1", "--output", str(folder / "model"), "--overwrite", "--nb-workers", "1"]
    reports = alternate(rounds, ("ours",), reference, work="host", arguments=options, pause=PAUSE)
    cpu, wall = ([1e3 * seconds for seconds in of_kind] for of_kind in zip(*reports["ours"]["results"]))
    return {"host": spread(wall, ".1f"), "host_cpu": spread(cpu, ".1f"), "pause": 1e3 * PAUSE}


def check_same(case, reports):
    """Both sides did the same work: batches of the same shape, of music as loud."""
    ours, torch = (reports[side]["results"] for side in ("ours", "torch"))
    if ours[0]["shape"] != torch[0]["shape"]:
        sys.exit(f"{case}: batches of {ours[0]['shape']} and {torch[0]['shape']}")
    levels = [statistics.median(result["level"] for result in results) for results in (ours, torch)]
    if not 1 / 3 < levels[0] / levels[1] < 3:
        sys.exit(f"{case}: mean squares of {levels[0]:.1e} and {levels[1]:.1e}")


# ---------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="processes of each side per measurement")
    parser.add_argument("--quick", action="store_true", help="to see that it runs; writes no report")
    parser.add_argument("--only", default="", help="cases whose names begin so; writes no report")
    add_options(parser)
    args = parser.parse_args()
    sizes = QUICK if args.quick else FULL
    rounds = args.rounds or sizes["rounds"]
    warn_if_busy()
    computer, measured, decoding = machine(), {}, None
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        lengths = ["--train", sizes["songs"], "--valid", 1, "--test", 0, "--duration", sizes["duration"]]
        execute([sys.executable, ROOT / "synthesize.py", folder / "songs", *lengths, "--quiet"])
        write_stems(folder / "songs", folder / "stems")
        write_links(folder / "songs", folder)
        cache = {"XDG_CACHE_HOME": str(folder / "cache")}
        os.environ.update(cache)
        for case, options in cases(folder, sizes["ours"] * BATCH_SIZE // sizes["songs"]).items():
            if not case.startswith(args.only):
                continue
            for nb_workers in (0, 1, 2):
                torch = sizes["torch"]["musdb"] * max(1, nb_workers)
                torch = torch if case.startswith("musdb") else sizes["torch"]["folders"]
                print(f"{case}, {nb_workers} worker(s)", file=sys.stderr)
                measured[case, nb_workers] = reports = alternate(
                    rounds,
                    ("ours", "torch"),
                    args.reference,
                    work="read",
                    arguments=options,
                    batch_size=BATCH_SIZE,
                    nb_workers=nb_workers,
                    nb_batches={"ours": sizes["ours"], "torch": torch},
                )
                check_same(case, reports)
                if case == "musdb, .stem.mp4" and nb_workers == 0:
                    decoding = max(reports["ours"]["times"]["open"]) / (sizes["songs"] * sizes["duration"] / 60)
        host = measure_host(folder, rounds, args.reference, sizes["ours"] * BATCH_SIZE // sizes["songs"])
    versions = [reports[side]["versions"] for side in ("ours", "torch")]
    report = REPORT.format(
        **origin(),
        batch_size=BATCH_SIZE,
        seconds=SECONDS,
        rounds=rounds,
        machine=computer,
        versions=versions_table(*versions),
        speeds=speed_table(measured),
        costs=cost_table(measured),
        nb_songs=sizes["songs"],
        duration=sizes["duration"],
        nb_folders=NB_FOLDERS,
        decoding=decoding or float("nan"),
        **host,
    )
    print(report)
    if not (args.quick or args.only):
        (ROOT / "docs" / "data.md").write_text(report)


if __name__ == "__main__":
    main()
