"""The report of compare.py, docs/comparison.md: its pictures and its tables, made of what was measured."""

import math
import sys
from pathlib import Path

import numpy as np
import work
from matplotlib.figure import Figure
from report import ROOT, ratio_of, spread, table, versions_table, write_part

sys.path.append(str(ROOT))  # scores.py, which reads museval's files
from scores import METRICS, medians, read_scores

SIDES = ("ours", "torch")
SEEDED = "vocals"  # the target of the trainings with seeds, scored against the rest
SLOW_LR = work.LR * 0.3**4  # the recipe's after four decays: differences by rounding grow slowly
LOSS_LIMIT = 1e-3
CORES = 2  # of evaluations
COLOURS = {"ours": "C3", "torch": "C0", "torch again": "C2"}
PERTURBATION = 1e-7

REPORT = """\
# Comparison with the PyTorch reference

Written by `make compare` (`{command}`, the last section by another program) on {date}, at commit {commit}. Do not edit.

**ours** is this repository, **torch** the reference, openunmix 1.3.0, on the same machine with {threads} threads. Both
have the same synthetic songs of {duration} s: {train} to train with, {valid} for validation, {test} to separate. The
network is the published one: hidden size {hidden}, three bidirectional layers, STFTs of 4096 samples every 1024. A step
takes {batch_size} excerpts of {seq_dur:g} s; both optimizers are Adam with a weight decay of {weight_decay:g}. The
excerpts of both are drawn by `data.py`; where they should be the same, their checksums are.

{verdicts}

## The same weights, the same excerpts, no dropout

Torch trained {nb_steps} steps from untrained weights. From there both train {nb_steps} steps more, at a learning rate
of {slow:g}: the recipe's after four decays, at which differences by rounding grow slowly (see the next section). In the
lower row, the relative difference of the losses, and the limit of {loss_limit:g} for the first {first} steps.

![Loss curves](comparison/loss.png)

{losses}

## From untrained weights

At the recipe's learning rate of {lr:g}, Adam's first steps change weights by some percent each, and any two runs in
single precision part: a unit of a ReLU that is within rounding of zero is on in one and off in the other, which changes
all gradients by some 1e-4, and grows. No implementation can follow another one here, not even itself. So the yardstick
is torch again, from the same untrained weights ({target}), each times 1 + {perturbation:g} · N(0, 1).

![Loss curves from untrained weights](comparison/untrained.png)

{untrained}

## With dropout

The recipe as it is: {seeds} trainings each of the target {target}, {nb_steps} steps at {lr:g} from untrained weights.
Every training has initial weights, excerpts and dropout of its own. Two sets of {seeds} values from one distribution
have ranges that overlap in {chance:.0%} of all cases.

![Trainings with dropout](comparison/seeds.png)

{dropout}

The training loss is the mean of the last {last} steps; SDRs are medians over frames, then over songs.

## Scores

BSSEval v4 over {test} songs of {duration} s, medians over frames, then over songs, in dB. Each side separates
with the networks that it trained from the same weights (above), with one iteration of the Wiener filter over the whole
song, by its own command:

    python evaluate.py --root SONGS --is-wav --model OURS --cores {cores} --wiener-win-len 0
    python -m openunmix.evaluate --root SONGS --is-wav --model TORCHS --cores {cores}

The second scores by museval, the first by `bsseval.py`.

{scores}

![Scores of songs](comparison/scores.png)

With the same weights, torch's, {nb_frames} scores of frames are finite, and those of the two commands differ by
{frames_difference:.1e} dB at most.

## Speed and memory

Medians, in parentheses the smallest and the largest; ratios below 1: ours is the faster, or the smaller.

{speed}

Training steps are those of the first section. Evaluations are those of torch's weights by both commands, {rounds} times
in turn, once where songs are long, with {cores} processes of {each_threads} thread(s) each: for torch by
OMP_NUM_THREADS, since its command would start as many threads as there are cores in each process. Separation and
scoring are the seconds that a process spends on a minute of audio; the whole command is time by the clock per minute of
audio, with its start, reading and writing. Memory is that of the largest process. Other sizes, and each function:
[performance.md](performance.md).

## Machine

{machine}

{versions}
"""


# ------------------------------------------------------------------------------------------- scores


def scores_of(evaldir):
    """museval's store of its JSON files."""
    return read_scores(sorted(Path(evaldir, "test").glob("*.json")))


def frames_difference(one, other):
    """How far the scores of single frames differ at most, where finite; and how many are."""
    keys = ["track", "target", "metric", "time"]
    a, b = (store.df.set_index(keys).score.astype(float).sort_index() for store in (one, other))
    if not (a.index.equals(b.index) and np.isfinite(a).equals(np.isfinite(b))):
        return np.inf, 0
    finite = np.isfinite(a)
    return float(abs(a - b)[finite].max()), int(finite.sum())


# ------------------------------------------------------------------------------------------ pictures


def apart(reports, one="ours", other="torch"):
    """The relative difference of two trainings' losses, in every step."""
    return abs(np.array(reports[one]["losses"]) / np.array(reports[other]["losses"]) - 1)


def draw_losses(axes, reports):
    """Training losses as lines, validation losses as circles; torch's pale and wide, ours on top of it."""
    for side in sorted(reports, key="ours".__eq__):  # ours last
        report = reports[side]
        look = {"lw": 0.8} if side == "ours" else {"lw": 2.5, "alpha": 0.4}
        steps = np.arange(1, len(report["losses"]) + 1)
        axes.plot(steps, report["losses"], color=COLOURS[side], label=side, **look)
        ends = steps[-1] * np.arange(1, len(report["validation"]) + 1) / len(report["validation"])
        size = 4 if side == "ours" else 8
        axes.plot(ends, report["validation"], "o", mfc="none", color=COLOURS[side], ms=size)
    log_scale(axes)


def log_scale(axes):
    axes.set(yscale="log", xlabel="step")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize="small")


def draw_apart(axes, differences, label, color):
    axes.plot(np.arange(1, len(differences) + 1), np.maximum(differences, 1e-8), lw=0.8, label=label, color=color)
    axes.set(yscale="log", xlabel="step", ylim=(1e-8, 1))
    axes.grid(axis="y", lw=0.4)


def plot_same(path, same, first):
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    for (above, below), (target, reports) in zip(figure.subplots(2, len(same), sharey="row").T, same.items()):
        draw_losses(above, reports)
        above.set_title(target)
        draw_apart(below, apart(reports), "ours and torch", "0.3")
        below.plot([1, first], [LOSS_LIMIT] * 2, ":", color="C1", label="limit")
    for axes, label in zip(figure.axes[:: len(same)], ("loss (line), validation (circles)", "relative difference")):
        axes.set_ylabel(label)
        axes.legend()
    figure.savefig(path, dpi=110)


def plot_scratch(path, scratch):
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, scratch)
    left.set_ylabel("loss (line), validation (circles)")
    draw_apart(right, apart(scratch), "ours and torch", "C3")
    draw_apart(right, apart(scratch, "torch again"), "torch and torch again", "C2")
    right.set_ylabel("relative difference")
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=110)


def plot_seeds(path, seeds, last):
    figure = Figure(figsize=(12, 4), layout="constrained")
    curves, *strips = figure.subplots(1, 1 + len(SEED_QUANTITIES), width_ratios=[3] + [1] * len(SEED_QUANTITIES))
    for side, reports in seeds.items():
        for number, report in enumerate(reports):
            smooth = np.convolve(report["losses"], np.ones(last) / last, "valid")
            steps = np.arange(last, len(report["losses"]) + 1)
            curves.plot(steps, smooth, lw=1, color=COLOURS[side], label=None if number else side)
    log_scale(curves)
    curves.set_ylabel(f"loss, mean of {last} steps")
    curves.legend()
    for axes, (name, quantity) in zip(strips, SEED_QUANTITIES.items()):
        for x, (side, reports) in enumerate(seeds.items()):
            axes.plot([x] * len(reports), [quantity(report, last) for report in reports], "o", color=COLOURS[side])
        axes.set_xticks(range(len(seeds)), seeds)
        axes.set(title=name, xlim=(-0.5, len(seeds) - 0.5))
        axes.grid(axis="y", lw=0.4)
    figure.savefig(path, dpi=110)


def plot_scores(path, own, torch):
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    own, torch = (store.agg_frames_scores() for store in (own, torch))  # a median per song, target and metric
    for axes, metric in zip(figure.subplots(1, len(METRICS)), METRICS):
        for target in work.TARGETS:
            values = [scores[:, target, metric].sort_index() for scores in (torch, own)]
            axes.plot(*values, "o", mfc="none", label=target)
        axes.axline((0, 0), slope=1, color="gray", lw=0.6)
        axes.set(title=f"{metric}, dB", xlabel="torch")
        axes.set_aspect("equal", "datalim")
    figure.axes[0].set_ylabel("ours")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------ report

SEED_QUANTITIES = {
    "training loss": lambda report, last: float(np.mean(report["losses"][-last:])),
    "validation loss": lambda report, last: report["validation"][-1],
    "SDR, dB": lambda report, last: report["SDR"],
}


def same_table(same, first):
    header = ["", f"difference, {first} steps", "all steps", "validation: ours", "torch", "difference"]
    rows = []
    for target, reports in same.items():
        ours, torch = (np.array(reports[side]["validation"]) for side in SIDES)
        row = [target, f"{apart(reports)[:first].max():.1e}", f"{apart(reports).max():.1e}"]
        rows.append([*row, f"{ours[-1]:.4f}", f"{torch[-1]:.4f}", f"{abs(ours / torch - 1).max():.1e}"])
    return table(header, rows)


def scratch_table(scratch):
    nb_steps = len(scratch["ours"]["losses"])
    ends = [end for end in (1, 3, 10, 30, 100, 300) if end <= nb_steps]
    rows = [
        [f"{one} and torch", *(f"{apart(scratch, one)[:end].max():.1e}" for end in ends)]
        for one in ("ours", "torch again")
    ]
    return table(["largest difference until step", *map(str, ends)], rows)


def overlap(a, b):
    return max(min(a), min(b)) <= min(max(a), max(b))


def seeds_of(seeds, last):
    """{quantity: {side: its values}}."""
    return {
        name: {side: [quantity(report, last) for report in reports] for side, reports in seeds.items()}
        for name, quantity in SEED_QUANTITIES.items()
    }


def scores_table(own, torch):
    own, torch = medians(own), medians(torch)
    header = [""] + [cell for metric in METRICS for cell in (f"{metric}: ours", "torch")]
    rows = [
        [target, *(f"{side[target][metric]:.2f}" for metric in METRICS for side in (own, torch))]
        for target in work.TARGETS
    ]
    return table(header, rows)


def speed_table(same, evaluations):
    """Of trainings, and of the evaluations of songs of each length, {seconds: {side: reports}}."""
    steps = [sum((reports[side]["steps"] for reports in same.values()), []) for side in SIDES]
    peaks = [[reports[side]["peak"] / 2**20 for reports in same.values()] for side in SIDES]
    rows = [
        ["training step", *(f"{spread(values, '.3f')} s" for values in steps), f"{ratio_of(*steps):.2f}"],
        ["memory of a training", *(f"{spread(values, '.0f')} MiB" for values in peaks), f"{ratio_of(*peaks):.2f}"],
    ]
    for duration, reports in evaluations.items():
        for part in ("separation", "scoring", "whole command"):
            values = [[report[part] for report in reports[side]] for side in SIDES]
            rows.append([f"songs of {duration} s: {part}", *(f"{spread(some, '.1f')} s" for some in values)])
            rows[-1].append(f"{ratio_of(*values):.2f}")
        peaks = [[report["peak"] / 2**20 for report in reports[side]] for side in SIDES]
        rows.append([f"songs of {duration} s: memory", *(f"{spread(values, '.0f')} MiB" for values in peaks)])
        rows[-1].append(f"{ratio_of(*peaks):.2f}")
    return table(["", "ours", "torch", "ratio"], rows)


def write_report(results, scores, path):
    """docs/comparison.md and its pictures; returns whether everything is as it should be.

    Args:
        results: of `measure`, and what `main` adds; scores: folder of the JSON files
    """
    sizes, scratch, same, seeds = (results[key] for key in ("sizes", "scratch", "same", "seeds"))
    own, ours, torch = (scores_of(scores / label) for label in ("own", "ours", "torch"))
    nb_steps = len(scratch["ours"]["losses"])
    first, last = min(100, nb_steps), min(50, nb_steps // 2)
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    plot_same(pictures / "loss.png", same, first)
    plot_scratch(pictures / "untrained.png", scratch)
    plot_seeds(pictures / "seeds.png", seeds, last)
    plot_scores(pictures / "scores.png", own, torch)

    difference, nb_frames = frames_difference(ours, torch)
    loss = max(apart(reports)[:first].max() for reports in same.values())
    sdr = max(abs(medians(own)[target]["SDR"] - medians(torch)[target]["SDR"]) for target in work.TARGETS)
    evaluations = {
        sizes["songs"]["duration"]: results["speed"],
        sizes["long songs"]["duration"]: results["long"],
    }
    time, long_time = (
        ratio_of(*([report["whole command"] for report in reports[side]] for side in SIDES))
        for reports in evaluations.values()
    )
    quantities = seeds_of(seeds, last)
    verdicts = [
        [f"losses from the same weights, {first} steps, relative", loss, LOSS_LIMIT, ".1e"],
        ["SDR after these trainings, dB", sdr, 0.1, ".3f"],
        ["scores of single frames with the same weights, dB", difference, 0.01, ".1e"],
        ["time of the whole evaluation, ratio", time, 0.25, ".2f"],
        [f"the same, songs of {sizes['long songs']['duration']} s", long_time, 0.18, ".2f"],
    ]
    fine = [measured <= limit for _, measured, limit, _ in verdicts]
    rows = [[name, f"{measured:{form}}", f"{limit:g}"] for name, measured, limit, form in verdicts]
    dropout = []
    for name, values in quantities.items():
        fine.append(overlap(*values.values()))
        rows.append([f"ranges with dropout: {name}", "overlap" if fine[-1] else "are apart", "overlap"])
        dropout.append([name, *(spread(some, ".2f") for some in values.values())])

    draws = math.comb(2 * sizes["seeds"], sizes["seeds"])
    report = REPORT.format(
        **results["origin"],
        **sizes["songs"],
        **sizes["recipe"],
        hidden=work.HIDDEN_SIZE,
        weight_decay=work.WEIGHT_DECAY,
        threads=results["threads"],
        verdicts=table(["ours and torch", "measured", "limit"], rows),
        nb_steps=nb_steps,
        lr=work.LR,
        slow=SLOW_LR,
        loss_limit=LOSS_LIMIT,
        first=first,
        losses=same_table(same, first),
        target=SEEDED,
        perturbation=PERTURBATION,
        untrained=scratch_table(scratch),
        seeds=sizes["seeds"],
        chance=1 - 2 / draws,
        last=last,
        dropout=table(["", *SIDES], dropout),
        cores=CORES,
        scores=scores_table(own, torch),
        nb_frames=nb_frames,
        frames_difference=difference,
        speed=speed_table(same, evaluations),
        rounds=sizes["rounds"],
        each_threads=max(1, results["threads"] // CORES),
        machine=results["machine"],
        versions=versions_table(*(scratch[side]["versions"] for side in SIDES)),
    )
    write_part(path, "compare.py", report)
    print(report)
    return all(fine)
