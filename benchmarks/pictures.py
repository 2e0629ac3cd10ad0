"""The pictures that README.md begins with: ``python benchmarks/pictures.py`` writes them into docs/pictures/.

network.png is drawn from what `model.OpenUnmix` calls when it builds its graph: its blocks, their order, what skips
some of them, shapes and numbers of parameters are the network's own. stems.png shows a song that a model separates
which the commands of users have trained, synthesize.py and train.py, in build/pictures/: a few minutes, the first time.
"""

import argparse
import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import matplotlib
import nnabla as nn
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from report import ROOT, execute

sys.path.append(str(ROOT))
import demo
import functions
import model
from args import TARGETS
from separator import Separator

SONGS = ["--train", 8, "--valid", 2, "--test", 1, "--duration", 20, "--quiet"]
TRAINING = ["--hidden-size", 128, "--seq-dur", 3, "--batch-size", 8, "--samples-per-track", 40, "--epochs", 12]
COLOURS = {"spectrogram": "#dfe7f5", "lstm": "#f6d9c5", "mask": "#dcefd8"}  # of blocks; others have none
INK, SOFT = "#22202a", "#77727f"


class Block(NamedTuple):
    """A call of a graph function: its place among those before it, and what it makes."""

    kind: str  # the function's name
    label: str
    inputs: tuple  # numbers of blocks; -1 is the network's input
    shape: tuple
    nb_parameters: int  # that are learnt


# ------------------------------------------------------------------------------------------- network


def _label(kind, arguments):
    if kind == "lstm":
        _, size, nb_layers, bidirectional, *_ = arguments
        width = f"← {size} →" if bidirectional else f"{size} →"
        return f"LSTM\n{nb_layers} layer{'s' * (nb_layers > 1)}\n{width}"
    if kind == "batch_normalization":
        return f"batch norm\n{arguments[1].__name__.replace('relu', 'ReLU')}"
    if kind == "affine":
        return "concatenate\naffine" if len(arguments[0]) > 1 else "affine"
    return {
        "spectrogram": "STFT\nmagnitude",
        "input_affine": "crop\nnormalise\naffine",
        "mask": "batch norm\nscale, shift\nReLU\n× mixture",
    }[kind]


class Recorder:
    """functions.py, and the list `blocks` of its functions that have been called."""

    def __init__(self, x):
        self.blocks, self._made, self._known = [], [x], 0

    def __getattr__(self, kind):
        function = getattr(functions, kind)

        def call(*arguments, **options):
            y = function(*arguments, **options)
            first = arguments[0] if isinstance(arguments[0], list) else arguments
            inputs = [k for k, made in enumerate(self._made) if any(made is one for one in first)]
            total = sum(parameter.size for parameter in nn.get_parameters().values())
            self.blocks.append(
                Block(kind, _label(kind, arguments), tuple(k - 1 for k in inputs), y.shape, total - self._known)
            )
            self._made.append(y)
            self._known = total
            return y

        return call


def blocks(net, x):
    """The network's blocks, in the order of their calls, for audio x (nb_samples, nb_channels, nb_timesteps)."""
    recorder = Recorder(x)
    with nn.parameter_scope("", scope=OrderedDict()), mock.patch.object(model, "functions", recorder):
        net(x)
    return recorder.blocks


def _shape(shape):
    words = [f"{size} ×" for size in shape[:-1]] + [str(shape[-1])]
    middle = len(words) // 2
    return "\n".join([" ".join(words[:middle]), " ".join(words[middle:])])


@matplotlib.rc_context({"font.size": 8})
def draw_network(path, found, x):
    """Blocks from left to right, shapes below, parameters in them, what skips others above."""
    figure = Figure(figsize=(9.5, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-1.3, len(found) - 0.55), ylim=(-1.05, 1.3))
    axes.axis("off")
    width, height = 0.76, 0.62
    arrow = {"arrowstyle": "-|>", "color": SOFT, "shrinkA": 0, "shrinkB": 0, "lw": 1}
    axes.text(-1, 0, "audio", ha="center", va="center", weight="bold", color=INK)
    axes.text(-1, -height - 0.1, _shape(x.shape), ha="center", va="top", color=SOFT)
    nb_skips = 0
    for k, block in enumerate(found):
        box = (k - width / 2, -height)
        style = "round,pad=0,rounding_size=0.06"
        colour = COLOURS.get(block.kind, "#f1eff3")
        axes.add_patch(FancyBboxPatch(box, width, 2 * height, boxstyle=style, fc=colour, ec=SOFT, lw=0.8))
        axes.text(k, 0.08, block.label, ha="center", va="center", color=INK)
        if block.nb_parameters:
            axes.text(k, -height + 0.06, f"{block.nb_parameters:,}", ha="center", va="bottom", color=SOFT, size=7)
        axes.text(k, -height - 0.1, _shape(block.shape), ha="center", va="top", color=SOFT)
        for origin in block.inputs:
            left = -0.75 if origin < 0 else origin + width / 2
            if origin == k - 1:
                axes.annotate("", (k - width / 2, 0), (left, 0), arrowprops=arrow)
            else:
                nb_skips += 1
                top = height + 0.3 * nb_skips
                axes.plot([origin, origin, k], [height, top, top], color=SOFT, lw=1, solid_joinstyle="round")
                axes.annotate("", (k, height), (k, top + 0.01), arrowprops=arrow)
    figure.savefig(path, dpi=160)


# --------------------------------------------------------------------------------------------- stems


def train(folder):
    """A small joint model of all targets, and synthetic songs, in `folder`, if they are not there yet."""
    songs, trained = folder / "songs", folder / "model"
    execute([sys.executable, ROOT / "synthesize.py", songs, *SONGS])
    if not trained.exists():
        command = [sys.executable, ROOT / "train.py", "--root", songs, "--is-wav", "--output", trained, "--quiet"]
        execute([*command, "--context", "cpu", "--targets", *TARGETS, *TRAINING])
    return next(songs.glob("test/*")), trained


@matplotlib.rc_context({"font.size": 8})
def draw_stems(path, song, trained):
    """Spectrograms of a mixture, of its stems as estimated, and as played; one scale of colours for all."""
    mixture, rate = demo.read(song / "mixture.wav")
    stems = Separator.load(trained, context="cpu")(mixture, rate)
    names = ["mixture", *stems]
    played = {name: demo.read(song / f"{name}.wav")[0] for name in names}
    rows = {"separated": {"mixture": mixture, **stems}, "as played": played}
    levels = {row: {name: demo.spectrogram(y, rate) for name, y in sounds.items()} for row, sounds in rows.items()}
    top = levels["separated"]["mixture"].max()
    figure = Figure(figsize=(11, 3.3), layout="constrained")
    grid = figure.add_gridspec(2, len(names) + 1, width_ratios=[2, 0.02, *[1] * len(stems)])
    extent = (0, mixture.shape[1] / rate, np.log2(demo.LOW), np.log2(demo.HIGH))
    style = {"vmin": top - demo.RANGE, "vmax": top, "cmap": demo.COLOURS, "origin": "lower", "aspect": "auto"}

    def show(place, picture, title):
        axes = figure.add_subplot(place)
        axes.imshow(picture, extent=extent, interpolation="antialiased", **style)
        axes.set_title(title, color=INK, size=9)
        axes.set_yticks([np.log2(hz) for hz in demo.TICKS], [] if title != "mixture" else demo.TICKS.values())
        axes.tick_params(colors=SOFT, length=2)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        return axes

    show(grid[:, 0], levels["separated"]["mixture"], "mixture").set_xlabel("seconds", color=SOFT)
    for i, (row, pictures) in enumerate(levels.items()):
        for k, name in enumerate(names[1:], start=2):
            axes = show(grid[i, k], pictures[name], name if i == 0 else "")
            axes.set_xticks([])
            if k == 2:
                axes.set_ylabel(row, color=INK, size=9)
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--song", type=Path, help="folder of a song, as synthesize.py writes it; with --model")
    parser.add_argument("--model", type=Path, help="folder of a trained model; default: one that is trained now")
    parser.add_argument("--outdir", type=Path, default=ROOT / "docs" / "pictures")
    args = parser.parse_args(argv)
    args.outdir.mkdir(parents=True, exist_ok=True)
    net, x = model.OpenUnmix(max_bin=1487), nn.Variable((16, 2, 6 * 44100))
    draw_network(args.outdir / "network.png", blocks(net, x), x)
    song, trained = (args.song, args.model) if args.model else train(ROOT / "build" / "pictures")
    draw_stems(args.outdir / "stems.png", song, trained)


if __name__ == "__main__":
    main()
