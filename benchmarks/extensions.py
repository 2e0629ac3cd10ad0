"""What extensions gain: configurations, trained for the same time, on the same synthetic songs, with several seeds.

Writes its part of docs/comparison.md. Everything is done by the commands that users call, train.py and evaluate.py, in
this process. What was measured is kept in build/extensions/results.json, from which --report writes the part again.

Another configuration is a line in CONFIGURATIONS.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import statistics
import sys
from typing import NamedTuple

import scipy.stats
from report import ROOT, execute, measured, table, write_part

sys.path.append(str(ROOT))
from comparison import scores_of

import evaluate
import train
from args import TARGETS
from scores import medians


class Configuration(NamedTuple):
    """A way to make a model of all targets.

    Args:
        trainings: options of train.py, of each of them; they share the time of a model
        against: the configuration that it is compared with
        nb_models: whose estimates are averaged; the first is the model of `against`, others are trained like it, with
            seeds of their own
    """

    trainings: list
    against: str = ""
    nb_models: int = 1


EACH = [["--target", target] for target in TARGETS]
JOINT = ["--targets", *TARGETS]
CROSSNET = [*JOINT, "--crossing", "--loss", "xumx"]
UMX, XUMX = "separate networks", "X-UMX"
CONFIGURATIONS = {
    UMX: Configuration(EACH),
    "joint training": Configuration([JOINT], UMX),
    XUMX: Configuration([CROSSNET], UMX),
    "X-UMX without bridges": Configuration([[*JOINT, "--loss", "xumx"]], XUMX),
    "X-UMX without combinations": Configuration([[*CROSSNET, "--no-combinations"]], XUMX),
    "X-UMX without the time domain, --mcoef 0": Configuration([[*CROSSNET, "--mcoef", "0"]], XUMX),
    "averaged weights, --ema 0.97": Configuration([[*one, "--ema", "0.97"] for one in EACH], UMX),
    "two models averaged": Configuration(EACH, UMX, nb_models=2),
}

FULL = {
    "songs": {"train": 8, "valid": 2, "test": 4, "duration": 12},
    "recipe": {"hidden-size": 64, "seq-dur": 2, "batch-size": 8, "epochs": 6},
    "seconds": 30,
    "seeds": 5,
}
QUICK = {
    "songs": {"train": 2, "valid": 1, "test": 1, "duration": 4},
    "recipe": {"hidden-size": 8, "seq-dur": 1, "batch-size": 2, "epochs": 2},
    "seconds": 4,
    "seeds": 2,
}

PART = """\
## Extensions

Written by `{command}` on {date}, at commit {commit}. Do not edit.

Models of {nb_targets} targets, each trained for about {seconds} s in all, validation included, on {threads} threads:
{train} synthetic songs of {duration} s to train with, {valid} for validation, {test} to separate. Networks have hidden
size {hidden}; a step takes {batch_size} excerpts of {seq_dur} s; a training has {epochs} epochs, of as many excerpts as
there is time for. Each has {nb_seeds} seeds: of initial weights, excerpts, dropout. SDR of BSSEval v4, median over
frames, then over songs, mean over targets, in dB.

{scores}

In parentheses: the standard deviation over seeds. Differences are between models of the same seed; the interval holds
95 % of Student's distribution. One that holds zero shows nothing.

{targets}

{machine}
"""


# ------------------------------------------------------------------------------------------ measure


def quietly(command, words):
    """Run a command of ours in this process; what it prints matters only if it fails."""
    with contextlib.redirect_stdout(io.StringIO()):
        command([str(word) for word in [*words, "--is-wav", "--context", "cpu", "--quiet"]])


class Runs:
    """Trainings and evaluations, in a folder of their own.

    Args:
        folder: for songs, models and scores; sizes: FULL or QUICK
    """

    def __init__(self, folder, sizes, threads):
        self.folder, self.sizes, self.threads = folder, sizes, threads
        self.songs = folder / "songs"
        shutil.rmtree(folder, ignore_errors=True)
        lengths = [word for name, value in sizes["songs"].items() for word in (f"--{name}", value)]
        execute([sys.executable, ROOT / "synthesize.py", self.songs, *lengths, "--quiet"])

    def train(self, options, output, seed, samples, **recipe):
        """One training; returns its log."""
        recipe = {**self.sizes["recipe"], "samples-per-track": samples, "seed": seed, **recipe}
        words = [word for name, value in recipe.items() for word in (f"--{name}", value)]
        before = set(output.glob("*.json"))
        quietly(train.main, ["--root", self.songs, "--output", output, "--threads", self.threads, *options, *words])
        (path,) = set(output.glob("*.json")) - before - {output / "separator.json"}
        return json.loads(path.read_text())

    def calibrate(self, name):
        """Samples per track with which a model of a configuration takes its time, validation included.

        An epoch takes some seconds for its validation, and others per sample: two lengths tell both.
        """
        trainings = CONFIGURATIONS[name].trainings
        seconds = []
        for samples in (lengths := (8, 40)):
            log = self.train(trainings[0], self.folder / "calibration" / name / str(samples), 0, samples, epochs=3)
            seconds.append(min(log["train_time_history"][1:]))
        per_sample = (seconds[1] - seconds[0]) / (lengths[1] - lengths[0])
        per_epoch = self.sizes["seconds"] / len(trainings) / self.sizes["recipe"]["epochs"]
        return max(1, round(lengths[1] + (per_epoch - seconds[1]) / per_sample))

    def model(self, name, seed, samples):
        """Train all networks of a model; returns the seconds that it took."""
        output = self.folder / "models" / name / str(seed)
        logs = [self.train(options, output, seed, samples) for options in CONFIGURATIONS[name].trainings]
        return output, sum(sum(log["train_time_history"]) for log in logs)

    def score(self, name, seed, models):
        """SDR by target."""
        evaldir = self.folder / "scores" / name / str(seed)
        quietly(
            evaluate.main,
            ["--root", self.songs, "--model", *models, "--evaldir", evaldir, "--cores", 2, "--threads", self.threads],
        )
        found = medians(scores_of(evaldir))
        return {target: found[target]["SDR"] for target in TARGETS}


def measure(runs):
    """{configuration: of each seed, seconds and SDRs}; seeds in turn, so that a machine's pace is that of all."""
    samples = {name: runs.calibrate(name) for name, one in CONFIGURATIONS.items() if one.nb_models == 1}
    samples.update({name: samples[one.against] for name, one in CONFIGURATIONS.items() if one.nb_models > 1})
    results, places = {name: [] for name in CONFIGURATIONS}, {}
    for seed in range(1, 1 + runs.sizes["seeds"]):
        for name, configuration in CONFIGURATIONS.items():
            print(f"{name}, seed {seed}: {samples[name]} samples per track", file=sys.stderr, flush=True)
            # an average shares its first model with what it is compared with
            shared = [places[configuration.against, seed]] if configuration.nb_models > 1 else []
            own = range(len(shared), configuration.nb_models)
            made = [runs.model(name, seed + 1000 * number, samples[name]) for number in own]
            models = shared + [output for output, _ in made]
            places[name, seed] = models[0]
            seconds = statistics.mean(seconds for _, seconds in made)
            results[name].append({"seconds": seconds, "SDR": runs.score(name, seed, models)})
    return results


# ------------------------------------------------------------------------------------------- report


def interval(differences):
    """Mean of paired differences, and how far Student's 95 % interval reaches to both sides of it."""
    n = len(differences)
    reach = scipy.stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5
    return statistics.mean(differences), reach


def write_report(results, path):
    """The part of docs/comparison.md that is ours."""
    runs = {name: results["runs"][name] for name in CONFIGURATIONS}
    means = {name: [statistics.mean(run["SDR"].values()) for run in some] for name, some in runs.items()}
    rows, by_target = [], []
    for name, configuration in CONFIGURATIONS.items():
        row = [name, f"{statistics.mean(run['seconds'] for run in runs[name]):.1f} s"]
        row.append(f"{statistics.mean(means[name]):.2f} ({statistics.stdev(means[name]):.2f})")
        if against := configuration.against:
            mean, reach = interval([a - b for a, b in zip(means[name], means[against])])
            row += [f"{mean:+.2f} ± {reach:.2f}", against]
        rows.append(row + [""] * (5 - len(row)))
        values = [statistics.mean(run["SDR"][target] for run in runs[name]) for target in TARGETS]
        by_target.append([name, *(f"{value:.2f}" for value in values)])
    recipe = {re.sub("-", "_", name): value for name, value in results["sizes"]["recipe"].items()}
    text = PART.format(
        **results["origin"],
        **results["sizes"]["songs"],
        **recipe,
        hidden=recipe["hidden_size"],
        nb_targets=len(TARGETS),
        seconds=results["sizes"]["seconds"],
        nb_seeds=results["sizes"]["seeds"],
        threads=results["threads"],
        scores=table(["", "training", "SDR", "difference", "to"], rows),
        targets=table(["SDR", *TARGETS], by_target),
        machine=results["machine"],
    )
    write_part(path, "extensions.py", text)
    print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute or two, to see that it runs; into build/ only")
    parser.add_argument("--report", action="store_true", help="write the part of the last run again")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    args = parser.parse_args()
    results, _, page = measured(
        args, "extensions", (FULL, QUICK), lambda *where: {"runs": measure(Runs(*where, args.threads))}
    )
    write_report(results, page)


if __name__ == "__main__":
    main()
