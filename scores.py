"""Scores over tracks: museval's files summed up in medians, in a table beside published scores, in a picture.

Medians are over frames, then over tracks, the way of SiSEC 2018. Their intervals say how far they would move with
other songs of the kind; for two evaluations of the same songs, those of the differences say much more.
"""

from __future__ import annotations  # unions, on Python 3.9

import io
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import files
from args import TARGETS
from utils import UsageError, some

if TYPE_CHECKING:
    import museval  # slow to import

METRICS = ("SDR", "SIR", "ISR", "SAR")
PAIR = ("vocals", "accompaniment")
FOUR = "four sources"
MODE = "BSSEval v4, frames of 1 s"  # museval's defaults, which SiSEC 2018 used
PUBLISHED = Path(__file__).parent / "docs" / "published_scores.json"

Scores = dict[str, dict[str, float]]  # {target: {metric: value}}
Intervals = dict[str, dict[str, tuple[float, float]]]  # {target: {metric: (lower, upper)}}
Labels = dict[str, list[str]]  # {label of an evaluation: the targets that it scores}


def groups(names: Iterable[str]) -> list[tuple[list[str], list[str]]]:
    """Which stems museval scores together, and of which of them it keeps the scores.

    Scores depend on what a stem is compared with. With vocals and accompaniment among other stems, museval scores
    two things: those two against each other, and the others together with the vocals.
    """
    names = list(names)
    paired = all(name in names for name in PAIR)
    together = [name for name in names if not paired or name != "accompaniment"]
    found = [(together, [name for name in together if not paired or name != "vocals"])] if len(together) > 1 else []
    return found + ([(list(PAIR), list(PAIR))] if paired else [])


def labels_of(names: Iterable[str]) -> Labels:
    """What the scores of these stems are called, {label: targets}; see `groups`."""
    return {FOUR if set(all_of) == set(TARGETS) else "/".join(all_of): kept for all_of, kept in groups(names)}


def read_scores(paths: Iterable[Path]) -> museval.EvalStore:
    """museval's EvalStore of its JSON files: it knows how to aggregate them."""
    import museval
    from museval.aggregate import json2df

    store = museval.EvalStore()
    for path in paths:
        store.add_track(json2df(files.read_json(path), path.stem))
    return store


def is_complete(track: Any, targets: Iterable[str]) -> bool:
    """Whether the content of a JSON file is what museval writes: all metrics, in the same frames of these targets."""
    try:
        frames = {target["name"]: target["frames"] for target in track["targets"]}
        times = {tuple(frame["time"] for frame in some) for some in frames.values()}
        numbers = []
        for frame in (frame for some in frames.values() for frame in some):
            if frame.keys() != {"time", "duration", "metrics"} or frame["metrics"].keys() != set(METRICS):
                return False
            numbers += [frame["time"], frame["duration"], *frame["metrics"].values()]
        are_numbers = all(type(number) in (int, float) and not math.isinf(number) for number in numbers)
        for name, metrics in track.get("doubtful", {}).items():
            if name not in frames or not isinstance(metrics, list) or not set(metrics) <= set(METRICS):
                return False
        return are_numbers and len(frames) == len(track["targets"]) and len(times) == 1 and set(frames) == set(targets)
    except (KeyError, TypeError, AttributeError, OverflowError):  # OverflowError: an integer of 1000 digits
        return False


def medians(store: museval.EvalStore) -> Scores:
    """{target: {metric: median over frames, then over tracks}}, NaN where no frame has a score."""
    scores = store.agg_frames_tracks_scores().unstack()
    return {target: {metric: float(scores[metric][target]) for metric in METRICS} for target in scores.index}


def by_track(store: museval.EvalStore) -> dict[str, Scores]:
    """{track: {target: {metric: median over frames}}}, NaN where no frame has a score."""
    scores = store.agg_frames_scores().unstack()
    found = {}
    for track, target in scores.index:
        found.setdefault(track, {})[target] = {metric: float(scores[metric][track, target]) for metric in METRICS}
    return found


def intervals(tracks: dict[str, Scores]) -> Intervals:
    """95 % intervals of the medians over tracks, by the percentiles of 9999 bootstrap samples, always the same ones.

    NaN with less than two tracks that have a score.

    Args:
        tracks: of `by_track`

    B. Efron and R. Tibshirani, "An introduction to the bootstrap", 1993.
    """
    from scipy.stats import bootstrap  # slow to import

    def interval(values):
        values = [value for value in values if np.isfinite(value)]
        if len(values) < 2:
            return (math.nan, math.nan)
        ends = bootstrap([values], np.median, method="percentile", random_state=0).confidence_interval
        return tuple(map(float, ends))

    targets = next(iter(tracks.values()), {})
    columns = {target: [scores[target] for scores in tracks.values()] for target in targets}
    return {
        target: {metric: interval([scores[metric] for scores in column]) for metric in METRICS}
        for target, column in columns.items()
    }


def table(
    scores: Scores,
    labels: Labels,
    title: str,
    published: dict,
    spread: Intervals | None = None,
    doubtful: Iterable[tuple[str, str]] = (),
) -> str:
    """Lines: own medians, an evaluation after the other, beside them the published ones, below them the intervals.

    Args:
        scores: of `medians`
        labels: which targets were scored together, {label: targets}
        published: the content of published_scores.json
        spread: of `intervals`
        doubtful: (target, metric) of those that get an asterisk
    """
    lines, width, doubtful = [], max(map(len, [*labels, *scores, "  95 %"])), set(doubtful)
    for label, targets in labels.items():
        others = published["models"] if label == published["evaluation"] else []
        beside = "  published SDR: " + "  ".join(model["name"] for model in others) if others else ""
        lines += ["", f"{label:{width}}" + "".join(f"{metric:>14} " for metric in METRICS) + beside]
        for target in targets:
            line = f"{target:{width}}"
            for metric in METRICS:
                line += f"{scores[target][metric]:14.2f}{'*' if (target, metric) in doubtful else ' '}"
            if others:
                line += " " * len("  published SDR:")
                for model in others:
                    line += f"{model['scores'][target]['SDR']:{len(model['name']) + 1}.2f} "
            lines.append(line.rstrip())
            ends = [spread[target][metric] for metric in METRICS] if spread else []
            if np.isfinite(ends).any():
                lines.append(f"{'  95 %':{width}}" + "".join(f"{f'{low:.2f}…{high:.2f}':>14} " for low, high in ends))
    return "\n".join(line.rstrip() for line in [title, *lines[1:]])


def plot(
    path: Path, tracks: dict[str, Scores], spread: Intervals, labels: Labels, title: str, zero: bool = False
) -> None:
    """Box plots over tracks, the intervals of the medians as bars: a row per evaluation, a column per metric.

    Args:
        tracks: of `by_track`
        spread: of `intervals`
        labels: see `table`
        zero: draw a line there
    """
    from matplotlib.figure import Figure  # slow to import

    boxes = len(METRICS) * max(map(len, labels.values()))
    figure = Figure(figsize=(2 + 0.55 * max(12, boxes), 0.6 + 3 * len(labels)), layout="constrained")
    figure.suptitle(_verbatim(title))
    for row, (label, targets) in zip(figure.subplots(len(labels), len(METRICS), squeeze=False), labels.items()):
        for axes, metric in zip(row, METRICS):
            columns = [[scores[target][metric] for scores in tracks.values()] for target in targets]
            columns = [[value for value in column if np.isfinite(value)] for column in columns]
            axes.boxplot(columns, widths=0.6, medianprops={"color": "C3"}, flierprops={"marker": ""})
            for x, column in enumerate(columns, 1):
                aside = np.linspace(-0.2, 0.2, len(column) + 2)[1:-1]
                axes.plot(x + aside, column, ".", color="C0", ms=4, alpha=0.5)
            ends = np.transpose([spread[target][metric] for target in targets])
            axes.vlines(range(1, len(targets) + 1), *ends, "C3", lw=6, alpha=0.3, zorder=1)
            axes.set_xticks(range(1, len(targets) + 1), map(_verbatim, targets), rotation=30, ha="right")
            axes.set_title(metric)
            axes.grid(axis="y", lw=0.4)
            if zero:
                axes.axhline(0, color="0.5", lw=1)
        row[0].set_ylabel(_verbatim(f"{label}, dB"))
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    files.write(path, picture.getvalue())


def _verbatim(text):
    """Text that matplotlib shows as it is: neither formulas in it nor half characters."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON has not."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def summarize(evaldir: str | Path, paths: list[Path], labels: Labels, subset: str) -> tuple[str, dict]:
    """Read the tracks' JSON files, draw scores.png; returns the table, and what summary.json says of scores.

    Args:
        evaldir: folder of the picture
        paths: of the JSON files
        labels: see `table`
        subset: what the title calls the tracks
    """
    store = read_scores(paths)
    scores, tracks = medians(store), by_track(store)
    spread = intervals(tracks)
    marks = {path.stem: files.read_json(path).get("doubtful") for path in paths}
    marks = {track: noise for track, noise in marks.items() if noise}
    unscored = store.df[store.df.metric == "SDR"].groupby(["track", "time"]).score.apply(lambda sdr: sdr.isna().any())
    frames = {track: (int(nans.sum()), len(nans)) for track, nans in unscored.groupby("track")}
    counted = sum(any(np.isfinite(one["SDR"]) for one in track.values()) for track in tracks.values())
    title = f"{MODE}, median over frames, then over {counted} track{'s' * (counted != 1)} of {subset}, in dB"
    title += ", with 95 % intervals" if counted > 1 else ""
    plot(Path(evaldir, "scores.png"), tracks, spread, labels, title)
    doubtful = {(target, metric) for noise in marks.values() for target in noise for metric in noise[target]}
    return table(scores, labels, f"{title}\n", files.read_json(PUBLISHED), spread, doubtful), {
        "scores": _labelled(scores, labels),
        "intervals": _labelled(spread, labels),
        "tracks": tracks,
        "doubtful": marks,
        "frames_without_score": {track: f"{count} of {total}" for track, (count, total) in frames.items() if count},
    }


def _labelled(values, labels):
    return {label: {target: values[target] for target in targets} for label, targets in labels.items()}


# ------------------------------------------------------------------------------ two, song by song


def read_folder(folder: str | Path) -> tuple[dict[str, Scores], dict]:
    """The scores of an evaluation, of whoever writes museval's files: `by_track`, and summary.json's settings, if any.

    Raises:
        UsageError: there are none; a file holds something else, or has other targets than the one before.
    """
    paths, names = sorted(Path(folder).glob("*/*.json")), None
    for path in paths:
        track, before = files.read_json(path), names
        try:
            names = {target["name"]: None for target in track["targets"]}
        except (KeyError, TypeError):
            names = {}
        if not names or not is_complete(track, names):
            raise UsageError(f"{path} does not hold scores of museval's kind")
        if names != (before or names):
            raise UsageError(f"{path} has scores of {some([*names])}, the one before of {some([*before])}")
    if not paths:
        raise UsageError(f"{folder} holds no scores: --compare takes folders that evaluate.py, or museval, has written")
    if len({path.stem for path in paths}) < len(paths):
        raise UsageError(f"{folder} holds two scores of a song: --compare takes folders of one subset each")
    summary = Path(folder, "summary.json")
    settings = files.read_json(summary) if summary.exists() else {"settings": {}}
    if not isinstance(settings, dict) or not isinstance(settings.get("settings"), dict):
        raise UsageError(f"{summary} is not what evaluate.py writes")
    return by_track(read_scores(paths)), settings["settings"]


def compare(one: str | Path, other: str | Path, evaldir: Path) -> None:
    """How much better the second evaluation is than the first, song by song: printed, comparison.json and .png.

    Args:
        one, other: folders of evaluations
        evaldir: folder of what is written
    Raises:
        UsageError: they have no song in common, or not the same stems: scores depend on what a stem is compared with.
    """
    (before, former), (after, settings) = read_folder(one), read_folder(other)
    songs = [song for song in before if song in after]
    if not songs:
        raise UsageError(f"{one} and {other} have no song in common")
    targets, others = (sorted(one[songs[0]], key=lambda name: (*TARGETS, name).index(name)) for one in (before, after))
    if set(targets) != set(others):
        raise UsageError(f"scores of {some(targets)} and of {some(others)} cannot be compared: choose the same stems")
    if not (labels := labels_of(targets)):
        raise UsageError(f"scores of {some(targets)} alone are none of BSSEval, which needs two stems")
    differ = {key: (former[key], settings[key]) for key in former if former[key] != settings.get(key, former[key])}
    if "stems" in differ:
        raise UsageError(f"the stems of {one} and of {other} hold other sources: they cannot be compared")
    tracks = {
        song: {
            target: {metric: after[song][target][metric] - before[song][target][metric] for metric in METRICS}
            for target in targets
        }
        for song in songs
    }
    values = np.array([[[tracks[song][target][metric] for metric in METRICS] for target in targets] for song in songs])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a target without scores has no median
        scores = {name: dict(zip(METRICS, row.tolist())) for name, row in zip(targets, np.nanmedian(values, axis=0))}
    spread = intervals(tracks)
    title = f"{other} less {one}, median over {len(songs)} song{'s' * (len(songs) != 1)}, in dB"
    title += ", with 95 % intervals" if len(songs) > 1 else ""
    print(table(scores, labels, f"{title}\n", {"evaluation": None, "models": []}, spread))
    for k, target in enumerate(targets):
        sdr = values[:, k, METRICS.index("SDR")]
        print(f"SDR of {target}: higher in {(sdr > 0).sum()} songs, lower in {(sdr < 0).sum()}")
    for key, (was, value) in differ.items():
        print(f"They differ in {key}: {was!r:.80} and {value!r:.80}")
    alone = {str(one): [*before.keys() - after.keys()], str(other): [*after.keys() - before.keys()]}
    for folder, names in alone.items():
        if names:
            print(f"Only in {folder}: {some(sorted(names))}")
    files.writable_folder(evaldir)
    plot(evaldir / "comparison.png", tracks, spread, labels, title, zero=True)
    summary = {"compared": [str(one), str(other)], "settings": differ}
    summary.update(scores=_labelled(scores, labels), intervals=_labelled(spread, labels), tracks=tracks)
    files.write_json(evaldir / "comparison.json", without_nan(summary))
