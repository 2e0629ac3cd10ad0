"""Scores over tracks: museval's files summed up in medians, in a table beside published scores, in a picture.

Medians are over frames, then over tracks, the way of SiSEC 2018.
"""

from __future__ import annotations  # unions, on Python 3.9

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import files

if TYPE_CHECKING:
    import museval  # slow to import

METRICS = ("SDR", "SIR", "ISR", "SAR")
PAIR = ("vocals", "accompaniment")
FOUR = "four sources"
MODE = "BSSEval v4, frames of 1 s"  # museval's defaults, which SiSEC 2018 used
PUBLISHED = Path(__file__).parent / "docs" / "published_scores.json"

Scores = dict[str, dict[str, float]]  # {target: {metric: value}}
Labels = dict[str, list[str]]  # {label of an evaluation: the targets that it scores}


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
        return are_numbers and len(frames) == len(track["targets"]) and len(times) == 1 and set(frames) == set(targets)
    except (KeyError, TypeError, AttributeError, OverflowError):  # OverflowError: an integer of 1000 digits
        return False


def medians(store: museval.EvalStore) -> Scores:
    """{target: {metric: median over frames, then over tracks}}, NaN where no frame has a score."""
    scores = store.agg_frames_tracks_scores().unstack()
    return {target: {metric: float(scores[metric][target]) for metric in METRICS} for target in scores.index}


def table(scores: Scores, labels: Labels, title: str, published: dict) -> str:
    """Lines: own medians, an evaluation after the other, and beside them the published ones.

    Args:
        scores: of `medians`
        labels: which targets were scored together, {label: targets}
        published: the content of published_scores.json
    """
    lines, width = [], max(map(len, [*labels, *scores]))
    for label, targets in labels.items():
        others = published["models"] if label == published["evaluation"] else []
        beside = "   published SDR: " + "  ".join(model["name"] for model in others) if others else ""
        lines += ["", f"{label:{width}}" + "".join(f"{metric:>8}" for metric in METRICS) + beside]
        for target in targets:
            line = f"{target:{width}}" + "".join(f"{scores[target][metric]:8.2f}" for metric in METRICS)
            if others:
                line += " " * len("   published SDR:")
                for model in others:
                    line += f"{model['scores'][target]['SDR']:{len(model['name']) + 1}.2f} "
            lines.append(line.rstrip())
    return "\n".join([title, *lines[1:]])


def plot(path: Path, tracks: dict[str, Scores], labels: Labels, title: str) -> None:
    """Box plots over tracks: a row per evaluation, a column per metric.

    Args:
        tracks: {track: {target: {metric: median over frames}}}
        labels: see `table`
    """
    from matplotlib.figure import Figure  # slow to import

    boxes = len(METRICS) * max(map(len, labels.values()))
    figure = Figure(figsize=(2 + 0.55 * max(12, boxes), 0.6 + 3 * len(labels)), layout="constrained")
    figure.suptitle(title)
    for row, (label, targets) in zip(figure.subplots(len(labels), len(METRICS), squeeze=False), labels.items()):
        for axes, metric in zip(row, METRICS):
            columns = [[scores[target][metric] for scores in tracks.values()] for target in targets]
            columns = [[value for value in column if np.isfinite(value)] for column in columns]
            axes.boxplot(columns, widths=0.6, medianprops={"color": "C3"}, flierprops={"marker": ""})
            for x, column in enumerate(columns, 1):
                aside = np.linspace(-0.2, 0.2, len(column) + 2)[1:-1]
                axes.plot(x + aside, column, ".", color="C0", ms=4, alpha=0.5)
            axes.set_xticks(range(1, len(targets) + 1), map(_verbatim, targets), rotation=30, ha="right")
            axes.set_title(metric)
            axes.grid(axis="y", lw=0.4)
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
    scores, by_track = medians(store), store.agg_frames_scores().unstack()
    tracks = {
        path.stem: {
            target: {metric: float(by_track[metric][path.stem, target]) for metric in METRICS} for target in scores
        }
        for path in paths
    }
    unscored = store.df[store.df.metric == "SDR"].groupby(["track", "time"]).score.apply(lambda sdr: sdr.isna().any())
    frames = {track: (int(nans.sum()), len(nans)) for track, nans in unscored.groupby("track")}
    counted = by_track["SDR"].dropna().index.get_level_values("track").nunique()
    title = f"{MODE}, median over frames, then over {counted} track{'s' * (counted != 1)} of {subset}, in dB"
    plot(Path(evaldir, "scores.png"), tracks, labels, title)
    return table(scores, labels, f"{title}\n", files.read_json(PUBLISHED)), {
        "scores": {label: {target: scores[target] for target in targets} for label, targets in labels.items()},
        "tracks": tracks,
        "frames_without_score": {track: f"{count} of {total}" for track, (count, total) in frames.items() if count},
    }
