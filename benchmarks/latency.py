"""What a stem that comes sooner costs: SDR against latency, of models with windows of several lengths, used live.

Writes docs/latency.md and its picture. Songs and models are made by the commands that users call, synthesize.py and
train.py, in build/latency/; a model that is there is not trained again. What was measured is kept beside them, from
which --report writes the page again.
"""

import argparse
import math
import shutil
import statistics
import sys
import time

import numpy as np
from matplotlib.figure import Figure
from report import ROOT, execute, measured, table

sys.path.append(str(ROOT))
import bsseval
import context
import demo
from separator import Separator
from streaming import Stream

TARGET = "vocals"
WINDOWS = (1024, 2048, 4096)
TIMES = (2.0, math.inf)  # in which the causal filter forgets, in seconds
OFFLINE = "whole songs"

FULL = {
    "songs": {"train": 8, "valid": 2, "test": 4, "duration": 40},
    "recipe": {"hidden-size": 128, "seq-dur": 3, "batch-size": 8, "samples-per-track": 40, "epochs": 10},
}
QUICK = {
    "songs": {"train": 2, "valid": 1, "test": 1, "duration": 4},
    "recipe": {"hidden-size": 8, "seq-dur": 1, "batch-size": 2, "samples-per-track": 4, "epochs": 1},
}

PAGE = """\
# Latency

Written by `{command}` on {date}, at commit {commit}. Do not edit.

![SDR against latency](latency/sdr.png)

A stem comes [live](inference.md#live) when no later frame can change it, after a window less a sample at most. A
shorter window sees less of the spectrum's detail. Here are unidirectional models of {target} with three windows, and
hops of a quarter of them. All have hidden size {hidden} and one recipe: {epochs} epochs of {steps} steps, of
{batch_size} excerpts of {seq_dur} s each, from {train} synthetic songs of {duration} s. {test} others are separated,
into {target} and the rest, in blocks of a hop.

{scores}

SDR of {target} in dB, of whole songs: the mean over songs, in parentheses the smallest and the largest. Without a
filter, stems have the phase of the mixture. Time is that of one core, as a share of the sound's.

## With a filter

The causal filter averages covariances over the past, which it forgets in that time. Beside it, one iteration of the EM
over {offline}, of the same estimates, which is no longer live. Songs differ more than filters do: these are
differences to the SDR without a filter, within a song.

{gains}

{machine}
"""


# ------------------------------------------------------------------------------------------ measure


def train(folder, window, sizes):
    """Path of a model, which is trained if it is not there."""
    model, partial = folder / "models" / str(window), folder / "partial"
    if not model.exists():
        print(f"train: {window}", file=sys.stderr, flush=True)
        shutil.rmtree(partial, ignore_errors=True)
        recipe = {**sizes["recipe"], "nfft": window, "nhop": window // 4}
        options = [word for name, value in recipe.items() for word in (f"--{name}", value)]
        command = [sys.executable, ROOT / "train.py", "--root", folder / "songs", "--is-wav", "--output", partial]
        command += ["--target", TARGET, "--unidirectional", "--context", "cpu", "--threads", 1, "--quiet"]
        execute([*command, *options])
        model.parent.mkdir(exist_ok=True)
        partial.rename(model)
    return model


def live(separator, seconds):
    """A function of audio (nb_channels, nb_timesteps) that gives the first stem, in blocks of a hop."""
    stream = Stream(separator, seconds)

    def separate(audio):
        starts = range(0, audio.shape[1], separator.n_hop)
        pieces = [stream(audio[:, start : start + separator.n_hop]) for start in starts]
        return np.concatenate([*pieces, stream.flush()], axis=2)[0]

    return separate


def ways(model):
    """{filter: function of a song at the model's rate}; the first is no filter."""
    options = {"residual": True, "wiener_win_len": None, "context": "cpu"}
    plain, whole = (Separator.load(model, niter=niter, **options) for niter in (0, 1))
    return {
        "none": live(plain, None),
        **{f"{seconds:g} s": live(plain, seconds) for seconds in TIMES},
        OFFLINE: lambda audio: whole(audio, whole.sample_rate)[TARGET],
    }


def score(separate, songs):
    """SDR of each song, and the time that they take as a share of theirs."""
    mixture, rate = demo.read(songs[0] / "mixture.wav")
    separate(mixture[:, :rate])  # compiles
    found, seconds, duration = [], 0, 0
    for song in songs:
        mixture, truth = (demo.read(song / f"{name}.wav")[0] for name in ("mixture", TARGET))
        begin = time.perf_counter()
        stem = separate(mixture)
        seconds += time.perf_counter() - begin
        duration += mixture.shape[1] / rate
        found.append(float(bsseval.sdr(truth.T[None], stem.T[None])[0, 0]))
    return {"SDR": found, "time": seconds / duration}


def measure(folder, sizes):
    """{window: {filter: SDR of each song, time}}"""
    context.use("cpu", threads=1)
    lengths = [word for name, value in sizes["songs"].items() for word in (f"--{name}", value)]
    execute([sys.executable, ROOT / "synthesize.py", folder / "songs", *lengths, "--quiet"])
    songs = sorted((folder / "songs" / "test").iterdir())
    models = {window: train(folder, window, sizes) for window in WINDOWS}
    results = {}
    for window, model in models.items():
        print(f"separate: {window}", file=sys.stderr, flush=True)
        results[window] = {way: score(separate, songs) for way, separate in ways(model).items()}
    return {"models": results, "rate": Separator.load(model, context="cpu").sample_rate}


# ------------------------------------------------------------------------------------------- report


def summary(values, form):
    """Their mean, and in parentheses the smallest and the largest."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} … {max(values):{form}})"


def named(way):
    """A filter in words."""
    words = {"none": "no filter", OFFLINE: f"filter over {OFFLINE}", "inf s": "causal, forgets nothing"}
    return words.get(way, f"causal, {way}")


def draw(path, models, rate):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    latencies = [1000 * (int(window) - 1) / rate for window in models]
    for way in next(iter(models.values())):
        means = [statistics.mean(found[way]["SDR"]) for found in models.values()]
        axes.plot(latencies, means, "o:" if way == OFFLINE else "o-", label=named(way))
    axes.set_xscale("log", base=2)
    axes.set_xticks(latencies, [f"{window}\n{latency:.0f} ms" for window, latency in zip(models, latencies)])
    axes.set(xlabel="window, latency", ylabel=f"SDR of {TARGET}, dB")
    axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def write_report(results, page):
    """The page, and its picture in a folder beside it."""
    models, rate = results["models"], results["rate"]
    scores, gains = [], []
    for window, found in models.items():
        (_, none), *others = found.items()
        latency = int(window) - 1
        row = [window, f"{latency}", f"{1000 * latency / rate:.0f} ms", summary(none["SDR"], ".2f")]
        scores.append([*row, f"{none['time']:.3f}", f"{others[0][1]['time']:.3f}"])
        gains.append([window])
        for _, filtered in others:
            gains[-1].append(summary([a - b for a, b in zip(filtered["SDR"], none["SDR"])], "+.2f"))
    sizes = results["sizes"]
    recipe = {name.replace("-", "_"): value for name, value in sizes["recipe"].items()}
    text = PAGE.format(
        **results["origin"],
        **sizes["songs"],
        **recipe,
        target=TARGET,
        hidden=recipe["hidden_size"],
        steps=sizes["songs"]["train"] * recipe["samples_per_track"] // recipe["batch_size"],
        offline=OFFLINE,
        scores=table(["window", "latency, samples", "", "SDR", "time", "with a causal filter"], scores),
        gains=table(["window", *map(named, list(found)[1:])], gains),
        machine=results["machine"],
    )
    page.write_text(text)
    draw(page.parent / "latency" / "sdr.png", models, rate)
    print(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute or two, to see that it runs; into build/ only")
    parser.add_argument("--report", action="store_true", help="write the page of the last run again")
    parser.set_defaults(threads=1)
    results, _, page = measured(parser.parse_args(argv), "latency", (FULL, QUICK), measure, "latency.md")
    write_report(results, page)


if __name__ == "__main__":
    main()
