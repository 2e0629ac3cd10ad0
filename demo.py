"""What a model has learnt: ``python demo.py`` writes a page to look at and listen to, and prints a table of scores.

One test song is separated into the model's targets and the rest, and all test songs are scored. The page is plain
HTML that works from the file system, without network: its sounds and pictures lie in media/ beside it.
"""

from __future__ import annotations  # unions, on Python 3.9

import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

import utils

if __name__ == "__main__":
    utils.start()  # before imports that take long

import numpy as np
import scipy.fft
import soundfile
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import bsseval
import files
from args import demo_parser
from audio import write
from separator import Separator
from utils import UsageError

REST = "rest"  # the residual's name
LOW, HIGH = 30, 6000  # Hz: what the pictures show
TICKS = {100: "100 Hz", 300: "300 Hz", 1000: "1 kHz", 3000: "3 kHz"}
RANGE = 60  # dB: what their colours show
COLOURS = colormaps["magma"]

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title &middot; Open-Unmix for NNabla</title>
<style>
:root { color-scheme: light dark; --page: #fbfaf8; --text: #1c1a20; --soft: #6b6672; --line: #e2dee5;
  --accent: #a52c6c; --blend: multiply; --tone: none; }
@media (prefers-color-scheme: dark) { :root { --page: #131116; --text: #eeebf0; --soft: #a19aa9; --line: #332f39;
  --accent: #fd9a6a; --blend: screen; --tone: invert(1) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { max-width: 70rem; margin: 0 auto; padding: clamp(1.75rem, 5vw, 4rem) clamp(1rem, 4vw, 2.5rem);
  background: var(--page); color: var(--text); font: 1rem/1.6 system-ui, sans-serif; }
h1, h2, p, figure, caption { margin: 0; text-wrap: pretty; }
h1 { margin: 0.4rem 0 1rem; font-size: clamp(2rem, 5vw, 3rem); line-height: 1.1; letter-spacing: -0.025em; }
h2 { margin: 3.5rem 0 0.25rem; font-size: 1.375rem; line-height: 1.3; letter-spacing: -0.01em; }
p { max-width: 44rem; }
.lead { font-size: 1.125rem; }
.soft, caption, figcaption span, th { color: var(--soft); font-weight: 400; }
.accent { color: var(--accent); font-weight: 600; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 2rem 1.75rem;
  margin-top: 1.5rem; align-items: start; }
.whole { grid-column: 1 / -1; }
figcaption { margin-bottom: 0.4rem; font-weight: 600; }
.picture { position: relative; height: clamp(9rem, 20vw, 12rem); border-radius: 0.5rem; overflow: hidden; }
.picture img { display: block; width: 100%; height: 100%; }
.picture i { position: absolute; padding: 0 0 0.15rem 0.4rem; color: #fffd; font: 0.6875rem/1 system-ui, sans-serif;
  text-shadow: 0 0 0.2rem #000, 0 0 0.2rem #000; }
.hz { width: 100%; border-bottom: 1px solid #fff3; }
.s { bottom: 0.3rem; border-left: 1px solid #fff9; }
audio { display: block; width: 100%; height: 2.75rem; margin-top: 0.5rem; }
.scale { display: inline-block; width: 6rem; height: 0.6rem; margin: 0 0.5rem; border-radius: 0.2rem;
  background: linear-gradient(to right, $colours); }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { margin-bottom: 0.4rem; text-align: left; }
th, td { padding: 0.6rem 0 0.6rem 1rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  line-height: 1.35; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
td { text-wrap: balance; }
tbody tr:last-child { font-weight: 600; }
@media (max-width: 30rem) { table { font-size: 0.875rem; } th, td { padding-left: 0.6rem; } }
.loss { width: 100%; mix-blend-mode: var(--blend); filter: var(--tone); }
</style>
<header>
<p class="accent">Open-Unmix for NNabla</p>
<h1>$title, out of the mix</h1>
<p class="lead">A network that learnt to find the $targets in a mixture takes apart a song that it never heard. Compare
its estimates with what was played, by ear and by eye. Over $songs, it improves the SDR $gains (median).</p>
</header>
<main>
<h2>$song</h2>
<p class="soft">The pictures share one scale of colours: &minus;$range&nbsp;dB<span class="scale"></span>0&nbsp;dB</p>
<div class="columns">
$figures</div>
<h2>Scores</h2>
<p class="soft">The signal to distortion ratio (SDR, BSSEval v4, in dB) says how far the errors lie below the true stem;
that of the mixture is the score of doing nothing.</p>
<div class="columns">
$results</div>
</main>
</html>
""")
FIGURE = Template("""<figure$whole><figcaption>$label <span>$remark</span></figcaption>
<div class="picture"><img src="$url.png" alt="Spectrogram: $label, $remark">$ticks</div>
<audio controls preload="metadata" src="$url.flac"></audio></figure>
""")
TABLE = Template("""<table><caption>SDR of the $target</caption>
<thead><tr><th>Song<th>Mixture<th>Estimate<th>Improvement
<tbody>
$body</table>
""")
LOSS = Template("""<figure><figcaption><span>Loss of the $target in training</span></figcaption>
<img class="loss" src="$url" alt="Loss curves: $target"></figure>
""")


def number(value: float, digits: int = 2) -> str:
    return "&ndash;" if np.isnan(value) else f"{value:.{digits}f}".replace("-", "&minus;")


def enumeration(words: Iterable[str]) -> str:
    return " and ".join(", ".join(words).rsplit(", ", 1))


def html_name(name: str) -> str:
    """The name of a song, "artist - title"."""
    return escape(name).replace(" - ", "&nbsp;&ndash; ")


# ----------------------------------------------------------------------------------------- scores


def read(path: Path) -> tuple[np.ndarray, int]:
    """Audio (nb_channels, nb_timesteps) and its sample rate."""
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UsageError(f"cannot read {path}: {error.error_string}") from None
    return audio.T, rate


def sdr(truth: np.ndarray, estimate: np.ndarray, rate: int) -> float:
    """Signal to distortion ratio in dB of audio (nb_channels, nb_timesteps): BSSEval v4, median over seconds."""
    if not truth.sum(axis=0).any() or not estimate.sum(axis=0).any():
        return np.nan  # BSSEval has no such ratio of what it takes for silence
    return np.nanmedian(bsseval.evaluate([truth.T], [estimate.T], win=rate, hop=rate).SDR)


def with_median(scores: dict[str, Sequence[float]]) -> list[tuple]:
    """Rows of name, SDR of the mixture and of the estimate, improvement; below them their medians.

    Args:
        scores: {song: (SDR of the mixture, SDR of the estimate)}
    """
    rows = [(song, mixture, estimate, estimate - mixture) for song, (mixture, estimate) in scores.items()]
    return rows + [("Median", *np.nanmedian([row[1:] for row in rows], axis=0))]


# --------------------------------------------------------------------------------- sounds, pictures


def spectrogram(audio: np.ndarray, rate: int, nb_bands: int = 240, nb_columns: int = 1200) -> np.ndarray:
    """Power in dB (nb_bands, nb_columns) of audio (nb_channels, nb_timesteps), in bands of equal width in octaves."""
    size = 2 ** round(np.log2(0.2 * rate))  # long frames, since low notes differ by a few Hz
    mono = np.pad(audio.mean(axis=0), size // 2)
    starts = np.linspace(0, len(mono) - size, nb_columns).astype(int)
    frames = np.lib.stride_tricks.sliding_window_view(mono, size)[starts] * np.hanning(size).astype(np.float32)
    power = np.abs(scipy.fft.rfft(frames, 2 * size)) ** 2
    edges = np.geomspace(LOW, HIGH, nb_bands + 1) * 2 * size / rate
    # the part of each bin that lies below an edge; what lies between two edges is a band's
    below = np.clip(edges[:, None] - np.arange(power.shape[1]) + 0.5, 0, 1).astype(np.float32)
    return 10 * np.log10(np.diff(below, axis=0) @ power.T + 1e-12)


def ticks(seconds: float) -> str:
    """A picture's axes. As HTML they stay legible on narrow screens, where the picture shrinks."""
    rows = {np.log(hz / LOW) / np.log(HIGH / LOW): text for hz, text in TICKS.items()}
    times = [s for s in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, seconds) if 0 < s < seconds]
    marks = [f'<i class="hz" style="bottom: {height:.2%}">{text}</i>' for height, text in rows.items()]
    return "".join(marks + [f'<i class="s" style="left: {s / seconds:.2%}">{s:g} s</i>' for s in times])


def write_figures(media: Path, sounds: dict[str, tuple[str, str, np.ndarray]], rate: int) -> str:
    """Write sounds and their spectrograms into the folder `media`; returns the HTML that shows them.

    Args:
        sounds: {name of the files: (label, remark, audio (nb_channels, nb_timesteps))}, first the mixture
    """
    levels = {name: spectrogram(audio, rate) for name, (_, _, audio) in sounds.items()}
    top = max(levels["mixture"].max(), RANGE - 120)  # where all is silent, all is dark
    peak = max(np.abs(audio).max() for _, _, audio in sounds.values())
    html = ""
    for name, (label, remark, audio) in sounds.items():
        # FLAC plays in every browser, and adds no errors of its own; one factor for all keeps them comparable
        with files.atomic_path(media / f"{name}.flac") as temporary:
            write(temporary, [audio / max(1, peak / 0.999)], audio.shape, rate, "FLAC", "PCM_16")
        picture = io.BytesIO()
        imsave(picture, levels[name], vmin=top - RANGE, vmax=top, cmap=COLOURS, origin="lower", format="png")
        files.write(media / f"{name}.png", picture.getvalue())
        html += FIGURE.substitute(
            whole="" if html else " class=whole",
            label=escape(label),
            remark=remark,
            url=f"{media.name}/{quote(name)}",
            ticks=ticks(audio.shape[1] / rate),
        )
    return html


def write_results(media: Path, target: str, rows: list[tuple], losses: Path) -> str:
    """The HTML of a table of scores, see `with_median`, and of the picture `losses`, if there is one."""
    body = "".join(
        f"<tr><td>{html_name(song)}<td>{number(mixture)}<td>{number(estimate)}<td class=accent>{number(gain)}\n"
        for song, mixture, estimate, gain in rows
    )
    html = TABLE.substitute(target=escape(target), body=body)
    if losses.exists():
        files.write(media / f"{target}-loss.png", files.read(losses))
        html += LOSS.substitute(target=escape(target), url=f"{media.name}/{quote(target)}-loss.png")
    return html


# ------------------------------------------------------------------------------------ command line


def demo(songs: str | Path, model: str | Path, outdir: str | Path, quiet: bool = False) -> dict[str, list[tuple]]:
    """Separate and score the songs in <songs>/test, and show the first of them on <outdir>/index.html.

    Returns:
        {target: rows of `with_median`}
    """
    folders = [path.parent for path in sorted(Path(songs, "test").glob("*/mixture.wav"))]
    if not folders:
        raise UsageError(f"no songs (folders with a mixture.wav) in {Path(songs, 'test')}")
    media = files.writable_folder(Path(outdir, "media"))
    separator = Separator.load(model, residual=REST, context="cpu")
    scores, figures = {target: {} for target in separator.targets}, None
    for folder in tqdm(folders, "Separating and scoring", leave=False, disable=quiet):
        mixture, rate = read(folder / "mixture.wav")
        truth = {target: read(folder / f"{target}.wav")[0] for target in separator.targets}
        if any(stem.shape != mixture.shape for stem in truth.values()):
            raise UsageError(f"the files in {folder} differ in length or channels")
        truth[REST] = mixture - sum(truth.values())
        stems = separator(mixture, rate)
        for target in separator.targets:
            scores[target][folder.name] = [sdr(truth[target], y, rate) for y in (mixture, stems[target])]
        if not figures:
            sounds = {"mixture": ("Mixture", "all that the network hears", mixture)}
            for name, stem in stems.items():
                sounds[name] = name.capitalize(), "estimated", stem
                sounds[f"{name}-true"] = name.capitalize(), "as played", truth[name]
            figures = write_figures(media, sounds, rate)

    tables = {target: with_median(songs_scores) for target, songs_scores in scores.items()}
    gains = [
        f'of the {escape(target)} by <b class="accent">{number(rows[-1][-1], 1)}&nbsp;dB</b>'
        for target, rows in tables.items()
    ]
    page = PAGE.substitute(
        targets=enumeration(map(escape, tables)),
        title=enumeration(map(escape, tables)).capitalize(),
        gains=enumeration(gains),
        songs=f"{len(folders)} such songs" if len(folders) > 1 else "this song",
        song=html_name(folders[0].name),
        range=RANGE,
        colours=", ".join(to_hex(COLOURS(k / 8)) for k in range(9)),
        figures=figures,
        results="".join(write_results(media, *item, Path(model, f"{item[0]}.png")) for item in tables.items()),
    )
    files.write(Path(outdir, "index.html"), page.encode(errors="backslashreplace"))
    return tables


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    args = demo_parser().parse_args(argv)
    for target, rows in demo(args.songs, args.model, args.outdir, args.quiet).items():
        title, width = f"SDR of the {target}, in dB", max(len(row[0]) for row in rows)
        print(f"{title:{width}}  mixture  estimate  improvement")
        for song, mixture, estimate, gain in rows:
            print(f"{song:{max(width, len(title))}}  {mixture:7.2f}  {estimate:8.2f}  {gain:11.2f}")
    print(f"To look at and listen to: {Path(args.outdir, 'index.html')}")


if __name__ == "__main__":
    main()
