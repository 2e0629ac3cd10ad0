"""The demo's page: what it refers to, the numbers it shows, and how it looks in a browser."""

import contextlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import matplotlib.image
import numpy as np
import pytest
import soundfile

import demo
import separate
import train

NAME = "Bits & Pieces - <i>Half"  # of a song; as HTML it would be something else
STEMS = ["mixture", "bass", "bass-true", "rest", "rest-true"]


@pytest.fixture(scope="module")
def folders(songs, tmp_path_factory):
    """Two test songs, one of them of 2.5 s, and a tiny model: the folders of songs and model."""
    root = tmp_path_factory.mktemp("demo")
    shutil.copytree(songs / "test", root / "songs" / "test")
    (root / "songs" / "test" / NAME).mkdir()
    for path in next((songs / "train").iterdir()).glob("*.wav"):
        audio, rate = soundfile.read(path, dtype="int16")
        soundfile.write(root / "songs" / "test" / NAME / path.name, audio[: int(2.5 * rate)], rate)
    options = "--nfft 1024 --nhop 512 --hidden-size 8 --seq-dur 0.3 --samples-per-track 20 --epochs 3 --lr 0.01"
    options += " --batch-size 4 --is-wav --context cpu --quiet --target bass"
    train.main([*options.split(), "--root", str(songs), "--output", str(root / "model")])
    return root / "songs", root / "model"


def arguments(songs, model, outdir):
    return ["--songs", str(songs), "--model", str(model), "--outdir", str(outdir), "--quiet"]


class Page(HTMLParser):
    """The addresses, the texts of table cells, and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.addresses, self.rows, self.text = [], [], [], ""
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [unquote(value) for key, value in attributes if key in ("src", "href", "srcset", "poster")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.tags and self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def printed(folders, tmp_path_factory):
    """The folder of the page, and what the command prints."""
    outdir = tmp_path_factory.mktemp("page") / "new"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        demo.main(arguments(*folders, outdir))
    return outdir, output.getvalue()


@pytest.fixture(scope="module")
def outdir(printed):
    return printed[0]


# ---------------------------------------------------------------------------------------- the page


def test_everything_referred_to_lies_beside_the_page_and_is_sound_or_picture(outdir, folders):
    page = Page(outdir / "index.html")
    assert sorted(page.addresses) == sorted(
        [f"media/{name}.{ext}" for name in STEMS for ext in ("png", "flac")] + ["media/bass-loss.png"]
    )
    assert {f"media/{path.name}" for path in (outdir / "media").iterdir()} == set(page.addresses)
    assert sorted(path.name for path in outdir.iterdir()) == ["index.html", "media"]
    shown = folders[0] / "test" / sorted(path.name for path in (folders[0] / "test").iterdir())[0]
    audio = {}
    for name in STEMS:
        audio[name], rate = soundfile.read(outdir / "media" / f"{name}.flac")
        info = soundfile.info(shown / "mixture.wav")
        assert (rate, audio[name].shape) == (info.samplerate, (info.frames, info.channels))
        assert np.sqrt(np.mean(audio[name] ** 2)) > 0.001, f"{name} is silent"
        picture = matplotlib.image.imread(outdir / "media" / f"{name}.png")
        assert picture.shape[:2] == (240, 1200) and picture[..., :3].std() > 0.02, f"the picture of {name} is empty"
    np.testing.assert_allclose(audio["bass-true"] + audio["rest-true"], audio["mixture"], atol=2 / 32768)
    played, _ = soundfile.read(shown / "bass.wav")
    np.testing.assert_allclose(audio["bass-true"] * (played.max() / audio["bass-true"].max()), played, atol=2 / 32768)


def test_page_needs_no_network_and_no_script(outdir):
    page = Page(outdir / "index.html")
    assert not re.search(r"https?:|//|@import|url\(", page.source)
    assert not {"script", "link", "iframe"}.intersection(page.tags)
    assert "$" not in page.source, "something was not filled in"


def test_names_of_songs_are_text(outdir, folders):
    page = Page(outdir / "index.html")
    assert NAME.replace(" - ", "\N{NO-BREAK SPACE}\N{EN DASH} ") in page.text


# ------------------------------------------------------------------------------------- the numbers


def seconds_sdr(truth, estimate, rate):
    """SDR of audio (nb_timesteps, nb_channels), in the middle of its seconds: what BSSEval's comes to for images."""
    ratios = []
    for start in range(0, len(truth) - rate + 1, rate):
        s, e = truth[start : start + rate].astype(float), estimate[start : start + rate].astype(float)
        if s.any():
            ratios.append(10 * np.log10(np.sum(s**2) / np.sum((s - e) ** 2)))
    return np.median(ratios)


def test_tables_hold_the_scores_of_all_test_songs(printed, folders):
    outdir, output = printed
    songs, model = folders
    separator, expected = separate.Separator.load(model, residual="rest", context="cpu"), {}
    for folder in sorted((songs / "test").iterdir()):
        mixture, rate = soundfile.read(folder / "mixture.wav", dtype="float32")
        bass, _ = soundfile.read(folder / "bass.wav", dtype="float32")
        estimate = separator(mixture.T, rate)["bass"].T
        before, after = seconds_sdr(bass, mixture, rate), seconds_sdr(bass, estimate, rate)
        expected[folder.name] = [before, after, after - before]
    expected["Median"] = np.median(list(expected.values()), axis=0)
    assert len(expected) == 3

    head, *rows = Page(outdir / "index.html").rows
    assert head == ["Song", "Mixture", "Estimate", "Improvement"]
    lines = output.splitlines()[1:4]
    assert len(rows) == len(lines) == len(expected)
    for (name, values), row, line in zip(expected.items(), rows, lines):
        assert row[0] == name.replace(" - ", "\N{NO-BREAK SPACE}\N{EN DASH} ")
        np.testing.assert_allclose([float(cell.replace("\N{MINUS SIGN}", "-")) for cell in row[1:]], values, atol=0.02)
        assert line.startswith(name)
        np.testing.assert_allclose([float(cell) for cell in line.split()[-3:]], values, atol=0.02)


def test_of_silence_there_is_no_score(folders):
    noise = np.random.default_rng(0).standard_normal((2, 66150)).astype(np.float32)
    assert np.isnan(demo.sdr(0 * noise, noise, 44100)) and np.isnan(demo.sdr(noise, 0 * noise, 44100))
    assert demo.sdr(noise, 0.9 * noise, 44100) == pytest.approx(20)
    assert demo.number(np.nan) == "&ndash;" and demo.number(-1.5) == "&minus;1.50"


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("frequency", [40, 60, 440, 4000])
def test_spectrogram_shows_a_tone_where_the_axis_says(frequency, rate):
    audio = np.sin(2 * np.pi * frequency * np.arange(rate) / rate).astype(np.float32)[None]
    levels = demo.spectrogram(audio, rate)
    rows = (np.argmax(levels[:, 100:-100], axis=0) + 0.5) / len(levels)
    heard = demo.LOW * (demo.HIGH / demo.LOW) ** rows
    np.testing.assert_allclose(heard, frequency, rtol=0.05)


def test_pictures_share_their_colours_and_sounds_their_factor(tmp_path):
    loud = 2 * np.random.default_rng(0).standard_normal((2, 44100)).astype(np.float32)
    quiet = loud * np.float32(10 ** (-(demo.RANGE + 1) / 20))
    demo.write_figures(tmp_path, {"mixture": ("Mixture", "", loud), "one": ("One", "", quiet)}, 44100)
    pictures = [matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3] for name in ("mixture", "one")]
    assert pictures[0].max() > 0.9 and pictures[1].max() < 0.05
    sounds = [soundfile.read(tmp_path / f"{name}.flac")[0] for name in ("mixture", "one")]
    assert 0.99 < np.abs(sounds[0]).max() < 1
    np.testing.assert_allclose(sounds[1] * (loud.max() / quiet.max()), sounds[0], atol=0.04)


def test_a_stem_may_be_louder_than_the_mixture(tmp_path):
    audio = np.random.default_rng(0).uniform(-1, 1, (2, 44100)).astype(np.float32)
    demo.write_figures(tmp_path, {"mixture": ("Mixture", "", audio), "one": ("One", "", 2 * audio)}, 44100)
    mixture, one = (soundfile.read(tmp_path / f"{name}.flac")[0] for name in ("mixture", "one"))
    assert 0.99 < np.abs(one).max() < 1
    np.testing.assert_allclose(2 * mixture, one, atol=1e-4)


# ---------------------------------------------------------------------------------------- failures


def test_an_earlier_page_is_replaced_whole_or_kept(outdir, folders, tmp_path, monkeypatch):
    shutil.copytree(outdir, tmp_path / "page")
    before = {path: path.read_bytes() for path in (tmp_path / "page").rglob("*.*")}

    def fail(temporary, *arguments, **options):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(demo, "sdr", lambda *arguments: 0.0)  # museval takes its time
    monkeypatch.setattr(demo, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.demo(*folders, tmp_path / "page", quiet=True)
    assert {path: path.read_bytes() for path in (tmp_path / "page").rglob("*.*")} == before


def test_the_page_itself_is_replaced_whole_or_kept(outdir, folders, tmp_path, monkeypatch):
    shutil.copytree(outdir, tmp_path / "page")
    page = tmp_path / "page" / "index.html"
    before = page.read_bytes()

    write = demo.files.write

    def fail(path, data):
        if path == page:
            raise OSError("disk full")
        write(path, data)

    monkeypatch.setattr(demo, "sdr", lambda *arguments: 0.0)
    monkeypatch.setattr(demo.files, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.demo(*folders, tmp_path / "page", quiet=True)
    assert page.read_bytes() == before and len(list((tmp_path / "page").iterdir())) == 2


@pytest.mark.parametrize("missing", ["songs", "model", "stem", "length"])
def test_bad_input_is_one_line(missing, folders, tmp_path, capsys):
    songs, model = folders
    if missing == "songs":
        songs = tmp_path
    elif missing == "model":
        model = tmp_path / "nothing"
    else:
        shutil.copytree(songs / "test" / NAME, tmp_path / "test" / NAME)
        songs = tmp_path
        audio, rate = soundfile.read(tmp_path / "test" / NAME / "bass.wav")
        (tmp_path / "test" / NAME / "bass.wav").unlink()
        if missing == "length":
            soundfile.write(tmp_path / "test" / NAME / "bass.wav", audio[:-1], rate)
    with pytest.raises(SystemExit) as status:
        demo.main(arguments(songs, model, tmp_path / "page"))
    error = capsys.readouterr().err
    assert status.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "page" / "index.html").exists()


# ------------------------------------------------------------------------------------- the browser

PROBE = """<script>addEventListener("load", () => setTimeout(() => { const all = (tag, f) =>
  Object.fromEntries([...document.querySelectorAll(tag)].map(e => [e.getAttribute("src"), f(e)]));
  parent.postMessage({images: all("img", e => [e.naturalWidth, e.clientWidth, e.clientHeight]),
    sounds: all("audio", e => [e.duration, e.error && e.error.message]),
    width: [innerWidth, document.documentElement.scrollWidth]}, "*"); }, 1000))</script>"""
# a frame, since the browser's own window is never narrower than 500 pixels
FRAME = """<iframe src="index.html" style="width: {}px; height: 900px"></iframe>
<script>addEventListener("message", event => {{
  document.body.innerHTML = "<pre id=result>" + JSON.stringify(event.data) + "</pre>"; }})</script>"""


def browse(page, profile, *options):
    """Open a page in Debian's chromium, without network; returns what it prints."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    quiet = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync"
    command = [browser, *(f"--{option}" for option in quiet.split()), "--disable-component-update"]
    command += ["--hide-scrollbars", f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("width", [1280, 375])
def test_browser_loads_everything_and_nothing_sticks_out(width, outdir, tmp_path):
    shutil.copytree(outdir, tmp_path / "page")
    page = tmp_path / "page" / "index.html"
    page.write_text(page.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(width))
    dom = browse(frame, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=10000", "--window-size=1400,1000")
    result = json.loads(re.search(r'<pre id="result">(.*?)</pre>', dom)[1])
    assert len(result["images"]) == 6 and len(result["sounds"]) == 5
    for name, (natural, shown, height) in result["images"].items():
        assert natural > 0 and 300 < shown <= width and height > 100, name
    for name, (duration, error) in result["sounds"].items():
        assert error is None and duration in (pytest.approx(2.5, abs=0.1), pytest.approx(4, abs=0.1)), name
    assert result["width"] == [width, width]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screenshot_shows_text_and_pictures(theme, outdir, tmp_path):
    picture = tmp_path / "page.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    options = [f"--screenshot={picture}", "--window-size=1280,1700", "--virtual-time-budget=3000", *dark]
    browse(outdir / "index.html", tmp_path / "profile", *options)
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (1700, 1280)
    margin, brightness = pixels[:, :40], pixels.mean(axis=2)
    assert margin.std(axis=(0, 1)).max() < 0.001, "the margins are empty"
    assert (margin.mean() > 0.9) if theme == "light" else (margin.mean() < 0.15)
    heading = np.abs(brightness[60:170, 100:700] - margin.mean())
    assert 0.02 < np.mean(heading > 0.5) < 0.5, "letters stand out"
    colourful = pixels.max(axis=2) - pixels.min(axis=2) > 0.3  # as only the spectrograms are
    rows = colourful.mean(axis=1) > 0.2
    assert 0.2 < rows.mean() < 0.6, "three rows of spectrograms"
    assert np.sum(np.diff(rows.astype(int)) == 1) >= 3
