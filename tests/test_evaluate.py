"""The evaluation, run as a user runs it: on short mono songs, which museval scores within a fraction of a second."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import musdb
import museval
import numpy as np
import pooch
import pytest
import scipy.stats
import shapes
import soundfile
import stempeg
from mpirun import mpirun, needs_mpirun

import args
import bsseval
import context
import ensemble
import evaluate
import files
import kernels.threads
import pool
import scorer
import scores
import separate
import weights
from args import TARGETS
from datasets import musdb18
from scores import PUBLISHED
from utils import UsageError

RATE, N_FFT, N_HOP = 8000, 256, 64
SIZES = {"nb_channels": 1, "hidden_size": 8, "nb_layers": 3, "nb_bins": 129, "max_bin": 100, "unidirectional": False}
ACCOMPANIMENT = ["--targets", "vocals", "--residual", "accompaniment"]
NAMES = ["First - Song", "Second - Song", "Third - Song"]
METRICS = ("SDR", "SIR", "ISR", "SAR")


def write_song(folder, seed, seconds=3.5, silent=None):
    """Tones in noise. `silent` {source: slice} is zeroed."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    sources = {}
    for k, name in enumerate(TARGETS):
        tone = np.sin(2 * np.pi * 110 * 2**k * t + 3 * np.sin(4 * t)) * (1 + np.sin((2 + k) * t))
        sources[name] = np.round(3000 * tone + 500 * rng.standard_normal(t.size)).astype(np.int16)
        if silent and name in silent:
            sources[name][silent[name]] = 0
    folder.mkdir(parents=True)
    for name, audio in {**sources, "mixture": sum(sources.values())}.items():
        soundfile.write(folder / f"{name}.wav", audio, RATE)


def write_model(folder, seed=0):
    folder.mkdir()
    for k, target in enumerate(TARGETS):
        rng = np.random.default_rng(seed + k)
        params = {name: 0.4 * rng.standard_normal(shape) for name, shape in shapes.open_unmix(**SIZES).items()}
        for name, values in params.items():
            if name.endswith(("/var", "/gamma")) or name.startswith(("input_scale", "output_scale", "output_mean")):
                values[...] = 1 + np.abs(values)
        weights.save(folder / f"{target}.h5", {name: values.astype(np.float32) for name, values in params.items()})
    config = {"nfft": N_FFT, "nhop": N_HOP, "sample_rate": RATE, "nb_channels": 1}
    (folder / "separator.json").write_text(json.dumps(config))


@pytest.fixture(autouse=True)
def fast():
    yield
    context.set_plain(False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A MUSDB18 of three test songs, and beside it two models, in m0/ and m1/."""
    folder = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(NAMES):
        write_song(folder / "musdb" / "test" / name, seed)
    write_model(folder / "m0")
    write_model(folder / "m1", 10)
    return folder / "musdb"


def copy(root, folder):
    """The songs in another folder, and the models beside them."""
    shutil.copytree(root.parent, folder, dirs_exist_ok=True)
    return folder / root.name


def command(root, evaldir, *options):
    model = ["--model", str(root.parent / "m0"), "--context", "cpu", "--is-wav", "--quiet"]
    return ["--root", str(root), *model, "--evaldir", str(evaldir), *map(str, options)]


def run(root, evaldir, *options):
    """Returns summary.json."""
    evaluate.main(command(root, evaldir, *options))
    return summary(evaldir)


def fails(capsys, root, evaldir, *options, status=2):
    """Returns what it says."""
    with pytest.raises(SystemExit) as error:
        run(root, evaldir, *options)
    assert error.value.code == status
    return capsys.readouterr().err


def summary(evaldir):
    return json.loads((evaldir / "summary.json").read_text())


def scores_of(path):
    """{target: {metric: array over frames}} of museval's JSON."""
    targets = json.loads(path.read_text())["targets"]
    return {
        one["name"]: {metric: np.array([frame["metrics"][metric] for frame in one["frames"]]) for metric in METRICS}
        for one in targets
    }


def truth(root, track):
    sources = {name: soundfile.read(root / "test" / track / f"{name}.wav", always_2d=True)[0] for name in TARGETS}
    return {**sources, "accompaniment": sources["drums"] + sources["bass"] + sources["other"]}


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run without interruption, that keeps the stems: evaldir, outdir."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate.main(command(root, folder / "eval", "--outdir", folder / "stems"))
    return folder / "eval", folder / "stems"


@pytest.fixture(scope="module")
def pair(root, tmp_path_factory):
    """Likewise, of vocals and accompaniment."""
    folder = tmp_path_factory.mktemp("pair")
    evaluate.main(command(root, folder, *ACCOMPANIMENT))
    return folder


# ------------------------------------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def theirs(root, whole, tmp_path_factory):
    """The folder of museval's JSON files for the stems, from musdb's own reading of the sources."""
    folder = tmp_path_factory.mktemp("theirs")
    for track in musdb.DB(root=str(root), subsets="test", is_wav=True).tracks:
        files = list((whole[1] / "test" / track.name).iterdir())
        assert {path.name for path in files} == {f"{target}.wav" for target in TARGETS}
        estimates = {path.stem: soundfile.read(path, always_2d=True)[0] for path in files}
        museval.eval_mus_track(track, estimates, output_dir=str(folder))
    return folder


def test_scores_are_musevals_own_for_the_same_stems(whole, theirs):
    """Files have five decimals; in which other numbers are rounded, another one can come out."""
    for name in NAMES:
        own, expected = (json.loads((folder / "test" / f"{name}.json").read_text()) for folder in (whole[0], theirs))
        assert [target["name"] for target in own["targets"]] == [target["name"] for target in expected["targets"]]
        for one, other in zip(own["targets"], expected["targets"]):
            assert one.keys() == other.keys()
            for frame, twin in zip(one["frames"], other["frames"], strict=True):
                assert (frame["time"], frame["duration"]) == (twin["time"], twin["duration"])
                assert frame["metrics"] == pytest.approx(twin["metrics"], abs=1.1e-5, nan_ok=True)


def test_scores_by_museval_itself(root, whole, theirs, tmp_path):
    """With its version, and to the letter."""
    shutil.copytree(root.parent, tmp_path / "copy")
    for name in NAMES[1:]:
        shutil.rmtree(tmp_path / "copy" / "musdb" / "test" / name)
    written = run(tmp_path / "copy" / "musdb", tmp_path / "eval", "--museval")
    assert written["settings"]["scorer"] == "museval 0.4.1" and not written["doubtful"]
    own, expected = (folder / "test" / f"{NAMES[0]}.json" for folder in (tmp_path / "eval", theirs))
    assert own.read_text() == expected.read_text()


@pytest.mark.parametrize("original", [False, True])
def test_what_is_scored_together_is_what_museval_scores_together(original):
    """Any stems, in any order: the same targets of the same values, in a file of museval's form."""
    rng = np.random.default_rng(1)
    audio = {name: rng.standard_normal((3 * RATE, 1)).astype(np.float32) for name in (*TARGETS, "accompaniment")}
    for names in (["accompaniment", "drums", "vocals"], ["drums", "bass"], ["vocals", "accompaniment"]):
        truth = {name: audio[name] for name in names}
        estimates = {name: sum(truth.values()) / 2 + truth[name] for name in names}
        own = scorer.score("Song", truth, estimates, RATE, original)
        own.validate()
        targets = {name: SimpleNamespace(audio=audio[name].astype(float)) for name in names}
        expected = museval.eval_mus_track(SimpleNamespace(name="Song", rate=RATE, targets=targets), estimates)
        assert list(own.scores["targets"][0]) == list(expected.scores["targets"][0])
        np.testing.assert_allclose(own.df.score, expected.df.score, atol=1.1e-5)
        for column in ("target", "metric", "time", "track"):
            assert list(own.df[column]) == list(expected.df[column])


@pytest.mark.parametrize(
    "subtype, values",
    [("PCM_16", 16), ("PCM_24", 24), ("PCM_32", 32), ("PCM_U8", 8), ("FLOAT", 26), ("DOUBLE", 40)],
)
def test_references_are_those_that_musdb_reads(root, tmp_path, subtype, values):
    """In 16 bits, whatever the files hold; by --reference-precision file, what they hold."""
    folder = tmp_path / "musdb" / "test" / "Song"
    folder.mkdir(parents=True)
    audio = {name: np.random.default_rng(k).uniform(-1.2, 1.2, (RATE, 2)) for k, name in enumerate(TARGETS)}
    for name, samples in {**audio, "mixture": sum(audio.values()) / 4}.items():
        soundfile.write(folder / f"{name}.wav", samples.clip(-1, 1) if "PCM" in subtype else samples, RATE, subtype)
    mus = musdb.DB(root=str(tmp_path / "musdb"), subsets="test", is_wav=True)
    (song,) = musdb18.open_tracks(mus.tracks, mus.setup["sources"], True)
    options = {"sources": mus.setup["sources"], "is_wav": True, "evaldir": tmp_path, "outdir": None, "original": False}
    for names in (["bass"], ["drums", "other", "bass"]):
        own, whole = (
            scorer.Scorer(SimpleNamespace(sources=[]), None, {}, precision=precision, **options).reference(song, names)
            for precision in ("16", "file")
        )
        np.testing.assert_array_equal(own, sum(mus.tracks[0].sources[name].audio for name in names))
        exact = sum(soundfile.read(folder / f"{name}.wav")[0] for name in names)
        np.testing.assert_allclose(whole, exact, rtol=0, atol=1e-15)
        assert (np.abs(own - exact).max() > 1e-5) == (values > 16)


def test_scores_that_are_noise_are_marked(root, tmp_path, capsys, monkeypatch):
    """In the table, in the track's JSON, in the summary, with what to do."""
    songs = copy(root, tmp_path / "copy")
    evaluated = bsseval.evaluate

    def noisy(references, estimates, **options):
        found = evaluated(references, estimates, **options)
        if len(next(iter(references))) == 4 * RATE:
            found.movement["SIR"][1, 0] = 1
        return found

    shutil.rmtree(songs / "test" / NAMES[2])
    shutil.rmtree(songs / "test" / NAMES[1])
    write_song(songs / "test" / "Noise - Song", 7, 4)
    monkeypatch.setattr(bsseval, "evaluate", noisy)
    for precision, advice in (
        ("file", "rely on SDR there, or use --reference-precision 16"),
        ("16", "rely on SDR there"),
    ):
        evaldir = tmp_path / precision
        written = run(songs, evaldir, *ACCOMPANIMENT, "--reference-precision", precision)
        assert written["doubtful"] == {"Noise - Song": {"accompaniment": ["SIR"]}}
        assert written["settings"]["reference_precision"] == precision
        printed = capsys.readouterr().out
        row = re.search("^accompaniment +(.*)$", printed, re.MULTILINE)[1].split()
        assert [cell.endswith("*") for cell in row] == [False, True, False, False]
        assert "last bit of the sources: Noise - Song\n" in printed and f"{advice}\n" in printed
        track = json.loads((evaldir / "test" / "Noise - Song.json").read_text())
        assert track["doubtful"] == written["doubtful"]["Noise - Song"] and track["scorer"] == "bsseval 1"
        assert json.loads((evaldir / "test" / f"{NAMES[0]}.json").read_text())["doubtful"] == {}
    assert "reference_precision" in fails(capsys, songs, evaldir, *ACCOMPANIMENT, "--reference-precision", "file")


def test_the_table_has_the_medians_over_frames_then_over_tracks(root, whole, theirs, capsys):
    frames = [scores_of(theirs / "test" / f"{name}.json") for name in NAMES]
    expected = np.array(
        [
            [np.median([np.nanmedian(track[target][metric]) for track in frames]) for target in TARGETS]
            for metric in METRICS
        ]
    )
    scores = run(root, whole[0])["scores"]["four sources"]
    found = [[scores[target][metric] for target in TARGETS] for metric in METRICS]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    printed = capsys.readouterr().out
    for k, target in enumerate(TARGETS):
        row = re.search(rf"^{target} +(.*)$", printed, re.MULTILINE)[1].split()
        np.testing.assert_allclose(np.array(row[:4], float), expected[:, k], atol=0.006)
        assert row[4:] == [f"{model['scores'][target]['SDR']:.2f}" for model in published()["models"]]


def test_the_medians_are_those_of_museval_for_the_folder(whole):
    evaldir, _ = whole
    store = museval.EvalStore()
    store.add_eval_dir(str(evaldir))
    expected = store.agg_frames_tracks_scores()
    for target, medians in summary(evaldir)["scores"]["four sources"].items():
        for metric, value in medians.items():
            assert value == pytest.approx(expected[target, metric])


def test_vocals_and_accompaniment_are_an_evaluation_of_their_own(root, whole, pair, tmp_path, capsys):
    assert list(summary(pair)["scores"]) == ["vocals/accompaniment"]
    aggregate = json.dumps({**{name: [name] for name in TARGETS}, "accompaniment": list(TARGETS[1:])})
    both = run(root, tmp_path, "--aggregate", aggregate, "--outdir", tmp_path / "stems")
    assert {label: set(scores) for label, scores in both["scores"].items()} == {
        "four sources": {"drums", "bass", "other"},
        "vocals/accompaniment": {"vocals", "accompaniment"},
    }
    printed = capsys.readouterr().out
    assert printed.index("four sources") < printed.index("drums") < printed.index("vocals/accompaniment")
    four = summary(whole[0])["scores"]["four sources"]
    assert both["scores"]["four sources"]["drums"] == pytest.approx(four["drums"], abs=1e-3)
    # a source's interference is that of what it is compared with
    assert both["scores"]["vocals/accompaniment"]["vocals"]["SIR"] != pytest.approx(four["vocals"]["SIR"], abs=0.1)
    names, expected = ["vocals", "accompaniment"], []
    for track in NAMES:
        files = [tmp_path / "stems" / "test" / track / f"{name}.wav" for name in names]
        estimates = [soundfile.read(path, always_2d=True)[0] for path in files]
        reference = [truth(root, track)[name] for name in names]
        expected.append(np.nanmedian(museval.evaluate(reference, estimates, win=RATE, hop=RATE)[2], axis=1))
    own = [both["scores"]["vocals/accompaniment"][name]["SIR"] for name in names]
    np.testing.assert_allclose(own, np.median(expected, axis=0), atol=1e-4)


def test_a_target_alone_is_scored_beside_the_rest(root, tmp_path):
    scores = run(root, tmp_path, "--targets", "bass", "--residual", "rest")["scores"]
    assert set(scores["bass/rest"]) == {"bass", "rest"}


def test_stems_in_mp4(root, tmp_path, monkeypatch):
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    (tmp_path / "musdb" / "test").mkdir(parents=True)
    track = root / "test" / NAMES[0]
    audio = [soundfile.read(track / f"{name}.wav")[0] for name in ("mixture", "drums", "bass", "other", "vocals")]
    path = tmp_path / "musdb" / "test" / f"{NAMES[0]}.stem.mp4"
    stereo = np.repeat(np.stack(audio)[:, :, None], 2, axis=2)
    stereo[..., 1] *= 0.5  # channels in proportion would be one
    stereo[:, 1:, 1] += 0.1 * stereo[:, :-1, 0]
    stempeg.write_stems(str(path), stereo, sample_rate=RATE, writer=stempeg.StreamsWriter())
    options = [
        option for option in command(tmp_path / "musdb", tmp_path / "eval", *ACCOMPANIMENT) if option != "--is-wav"
    ]
    options[options.index("--model") + 1] = str(root.parent / "m0")
    evaluate.main([*options, "--outdir", str(tmp_path / "stems")])
    (mp4,) = musdb.DB(root=str(tmp_path / "musdb"), subsets="test").tracks
    folder = tmp_path / "stems" / "test" / NAMES[0]
    estimates = {path.stem: soundfile.read(path, always_2d=True)[0] for path in folder.iterdir()}
    museval.eval_mus_track(mp4, estimates, output_dir=str(tmp_path / "expected"))
    own, expected = (scores_of(tmp_path / name / "test" / f"{NAMES[0]}.json") for name in ("eval", "expected"))
    np.testing.assert_allclose(own["vocals"]["SDR"], expected["vocals"]["SDR"], atol=1e-4)


def published():
    return json.loads(PUBLISHED.read_text())


def test_published_scores_have_a_source_each():
    for model in published()["models"]:
        assert "https://" in model["source"]
        assert set(model["scores"]) == set(TARGETS)
        assert all("SDR" in scores for scores in model["scores"].values())


def test_stems_hold_what_was_scored(whole):
    """Neither rounded nor clipped."""
    assert {soundfile.info(path).subtype for path in whole[1].rglob("*.wav")} == {"FLOAT"}


def test_the_picture_and_the_summary(whole):
    evaldir, _ = whole
    assert (evaldir / "scores.png").read_bytes().startswith(b"\x89PNG")
    written = summary(evaldir)
    assert written["settings"]["scorer"] == "bsseval 1" and written["settings"]["mode"].startswith("BSSEval v4")
    assert written["settings"]["niter"] == 1 and len(written["settings"]["weights"]) == 64
    assert written["model"].endswith("m0") and written["versions"]["nnabla"] == "1.39.0" and written["date"]
    assert set(written["tracks"]) == set(NAMES)
    assert written["seconds_per_minute"]["scoring"] > 0


# ------------------------------------------------------------------------- tracks that cannot be scored


def test_silence_is_reported_and_kept_out(root, pair, tmp_path, capsys):
    """A silent source, one that is silent for a second, one that is silent wherever the other sounds."""
    songs = copy(root, tmp_path)
    write_song(songs / "test" / "All - Silent", 5, silent={"vocals": slice(None)})
    write_song(songs / "test" / "Never - Together", 6, 3, silent={"vocals": slice(RATE, None)})
    for name in TARGETS[1:]:
        path = songs / "test" / "Never - Together" / f"{name}.wav"
        audio, _ = soundfile.read(path, dtype="int16")
        audio[:RATE] = 0
        soundfile.write(path, audio, RATE)
    written = run(songs, tmp_path / "eval", *ACCOMPANIMENT)
    assert written["silent"] == {"All - Silent": "the source 'vocals' is silent"}
    assert written["frames_without_score"] == {"Never - Together": "3 of 3"}
    assert written["scores"] == summary(pair)["scores"]
    printed = capsys.readouterr().out
    assert "All - Silent: the source 'vocals' is silent" in printed and "Never - Together: 3 of 3" in printed
    assert "over 3 tracks" in printed
    assert written["tracks"]["Never - Together"]["vocals"]["SDR"] is None


@pytest.mark.parametrize(
    "audio",
    [
        [[0, 0], [0, 0]],
        [[0, 0], [0, 1e-30]],
        [[0.5, -0.5], [-0.25, 0.25]],  # opposite channels
        [[0.5, -0.5], [-0.25, 0.375]],
        [[0.5, 0.5], [-0.5, -0.5]],  # each channel sums to zero
        [[1, -1], [-1, 1]],
        [[0.5], [-0.5]],
        [[0], [0]],
        [[np.nan, 0], [0, 0]],
    ],
    ids=str,
)
def test_silence_is_what_museval_takes_for_it(audio):
    """It raises an error then, whatever else the audio holds."""
    audio = np.array(audio)
    assert scorer.is_silent(audio) == museval.metrics._any_source_silent(audio[None])


def test_frames_of_silence_are_left_out(root, tmp_path):
    songs = tmp_path / "musdb"
    write_song(songs / "test" / "Pause - Song", 1, silent={"vocals": slice(0, RATE)})
    written = run(songs, tmp_path / "eval", *ACCOMPANIMENT, "--model", root.parent / "m0")
    assert written["frames_without_score"] == {"Pause - Song": "1 of 3"}
    sdr = scores_of(tmp_path / "eval" / "test" / "Pause - Song.json")["vocals"]["SDR"]
    assert np.isnan(sdr[0])
    assert written["scores"]["vocals/accompaniment"]["vocals"]["SDR"] == pytest.approx(np.median(sdr[1:]))


def test_files_that_differ_by_a_few_samples(tmp_path, root):
    songs = copy(root, tmp_path)
    for name in NAMES:
        audio, _ = soundfile.read(songs / "test" / name / "bass.wav", dtype="int16")
        soundfile.write(songs / "test" / name / "bass.wav", audio[:-9], RATE)
    assert run(songs, tmp_path / "eval", *ACCOMPANIMENT)["failed"] == {}


@pytest.mark.parametrize("cores", [1, 2])
def test_a_failing_track_does_not_stop_the_others(root, pair, tmp_path, capsys, cores):
    songs = copy(root, tmp_path)
    write_song(songs / "test" / "Broken - Song", 5)
    (songs / "test" / "Broken - Song" / "bass.wav").unlink()
    error = fails(capsys, songs, tmp_path / "eval", *ACCOMPANIMENT, "--cores", cores, status=1)
    assert "Broken - Song" in error and "bass.wav" in error and "Traceback" not in error
    assert summary(tmp_path / "eval")["scores"] == summary(pair)["scores"]
    shutil.copy(songs / "test" / NAMES[0] / "bass.wav", songs / "test" / "Broken - Song")
    assert run(songs, tmp_path / "eval", *ACCOMPANIMENT)["failed"] == {}


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(28, "No space left on device", "/disk/x.wav"), "/disk/x.wav: No space left on device"),
        (MemoryError(), "MemoryError: MemoryError"),
        (RuntimeError("two\nlines"), "RuntimeError: two lines"),
        (RecursionError("deep"), "RecursionError: deep"),
    ],
)
def test_whatever_is_wrong_with_a_track_the_others_go_on(root, tmp_path, capsys, monkeypatch, error, line):
    def opened(tracks, *arguments):
        if tracks[0].name == NAMES[0]:
            raise error
        return musdb18.open_tracks(tracks, *arguments)

    monkeypatch.setattr(scorer, "open_tracks", opened)
    assert f"evaluate.py: {NAMES[0]}: {line}\n" in fails(capsys, root, tmp_path, *ACCOMPANIMENT, status=1)
    assert set(summary(tmp_path)["tracks"]) == set(NAMES[1:])


@pytest.mark.parametrize("engine", ["processes", pytest.param("ranks", marks=needs_mpirun)])
def test_a_process_that_is_killed_changes_nothing(long, tmp_path, engine):
    """Whoever kills it: the system, when memory is short. The scores are those of one process, to the letter."""
    root, expected = long
    if engine == "processes":
        process = start(root, tmp_path / "eval", "--cores", 2)
        parents = [process]
    else:
        process = start(root, tmp_path / "eval", launcher=mpirun(3))
        wait_for_scores(process, tmp_path / "eval")
        parents = [SimpleNamespace(pid=pid) for pid in children_of(process)[1:]]  # not of the first rank
    wait_for_scores(process, tmp_path / "eval")
    os.kill(children_of(parents[-1])[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in error
    found = summary(tmp_path / "eval")
    assert not found["failed"] and found["tracks"] == expected["tracks"] and found["scores"] == expected["scores"]
    for path in (root.parent / "eval" / "test").iterdir():
        assert path.read_bytes() == (tmp_path / "eval" / "test" / path.name).read_bytes()


def test_a_process_that_cannot_begin(root, tmp_path, capfd, monkeypatch):
    """Its tracks are named with the reason."""
    folder = copy(root, tmp_path / "copy")

    def results(*arguments):
        shutil.rmtree(folder.parent / "m0")  # after the parent has read it
        return in_processes(*arguments)

    in_processes = pool.results
    monkeypatch.setattr(pool, "results", results)
    with pytest.raises(SystemExit) as error:
        run(folder, tmp_path / "eval", *ACCOMPANIMENT, "--cores", 2)
    said = capfd.readouterr().err
    assert error.value.code == 1 and "Traceback" not in said
    assert all(f"{name}: tried twice: UsageError: unknown model" in said for name in NAMES)


def test_an_error_of_the_scores_is_that_of_its_track(root, tmp_path, capsys, monkeypatch, encoded):
    score = scorer.score

    def scored(name, *arguments):
        if name == NAMES[1]:
            raise ZeroDivisionError("of the scores")
        return score(name, *arguments)

    monkeypatch.setattr(scorer, "score", scored)
    error = fails(capsys, root, tmp_path, *ACCOMPANIMENT, status=1)
    assert f"{NAMES[1]}: ZeroDivisionError: of the scores\n" in error
    assert {path.stem for path in (tmp_path / "test").glob("*.json")} == {NAMES[0], NAMES[2]}
    assert encoded == [3]  # none is separated again


# ---------------------------------------------------------------------------------- songs together


@pytest.fixture
def encoded(monkeypatch):
    """How many songs went through the networks together, time after time."""

    def encode(models, targets, recordings):
        recordings = list(recordings)
        calls.append(len(recordings))
        return together(models, targets, recordings)

    calls, together = [], ensemble.encode
    monkeypatch.setattr(ensemble, "encode", encode)
    return calls


def test_scores_do_not_depend_on_which_songs_are_together(root, tmp_path, monkeypatch, encoded):
    """Of other lengths and sample rates: only those of one rate go together."""
    songs = copy(root, tmp_path)
    write_song(songs / "test" / "Other - Rate", 5, 5)
    for path in (songs / "test" / "Other - Rate").iterdir():
        soundfile.write(path, soundfile.read(path, dtype="int16")[0], 2 * RATE)
    write_song(songs / "test" / "Short - Song", 6, 2)
    write_song(songs / "test" / "Third - Song, too", 7)
    run(songs, tmp_path / "together", *ACCOMPANIMENT)
    assert encoded == [1, 1, 2, 2]  # First; Other; Second and Short; both Third: four at most
    encoded.clear()
    monkeypatch.setattr(evaluate, "TOGETHER", 1)
    run(songs, tmp_path / "alone", *ACCOMPANIMENT)
    assert encoded == [1] * 6
    for path in (tmp_path / "alone" / "test").iterdir():
        assert path.read_bytes() == (tmp_path / "together" / "test" / path.name).read_bytes()


def test_a_mixture_that_cannot_be_read_costs_no_other_song(root, pair, tmp_path, capsys, monkeypatch, encoded):
    songs = copy(root, tmp_path)

    def opened(tracks, *arguments):
        found = musdb18.open_tracks(tracks, *arguments)
        if tracks[0].name == NAMES[1]:
            os.utime(tracks[0].path, (0, 0))
        return found

    monkeypatch.setattr(scorer, "open_tracks", opened)
    error = fails(capsys, songs, tmp_path / "eval", *ACCOMPANIMENT, status=1)
    assert error.splitlines() == [
        f"evaluate.py: {NAMES[1]}: {songs / 'test' / NAMES[1] / 'mixture.wav'}: "
        "the file has changed since it was looked at",
        "evaluate.py: 1 track(s) failed, 2 scored",
    ]
    assert encoded == [1, 1]
    for name in (f"{NAMES[0]}.json", f"{NAMES[2]}.json"):
        assert (tmp_path / "eval" / "test" / name).read_bytes() == (pair / "test" / name).read_bytes()


def test_a_silent_song_is_separated_for_its_stems_only(root, tmp_path, encoded):
    write_song(tmp_path / "musdb" / "test" / "All - Silent", 5, silent={"vocals": slice(None)})
    shutil.copytree(root.parent / "m0", tmp_path / "m0")
    for evaldir, options, count in (
        ("0", [], []),
        ("1", ["--outdir", tmp_path], [1]),
        ("1", ["--outdir", tmp_path], []),
    ):
        encoded.clear()
        with pytest.raises(SystemExit):  # there are no scores
            run(tmp_path / "musdb", tmp_path / evaldir, *ACCOMPANIMENT, *options)
        assert summary(tmp_path / evaldir)["silent"] == {"All - Silent": "the source 'vocals' is silent"}
        assert encoded == count


def test_seconds_are_shared_among_songs_that_are_separated_together(root, tmp_path, capsys, monkeypatch):
    """Of 10 s for all three and one for each, one that has no scores takes its part with it."""

    def together(self, *arguments):
        for k, stems in enumerate(separated(self, *arguments)):
            clock[0] += 11 if k == 0 else 1
            yield stems

    def scored(name, *arguments):
        clock[0] += 2
        if name == NAMES[0]:
            raise ZeroDivisionError
        return score(name, *arguments)

    clock, separated, score = [0.0], evaluate.Separator.together, scorer.score
    monkeypatch.setattr(evaluate.Separator, "together", together)
    monkeypatch.setattr(scorer, "score", scored)
    monkeypatch.setattr(scorer, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    fails(capsys, root, tmp_path, *ACCOMPANIMENT, status=1)
    seconds = summary(tmp_path)["seconds_per_minute"]
    assert seconds["separation"] == pytest.approx((13 - 11 / 3) * 60 / 7)
    assert seconds["scoring"] == pytest.approx(4 * 60 / 7)


# ------------------------------------------------------------------------------------ interruptions


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Six songs, which take a while, and what an uninterrupted run makes of them."""
    folder = tmp_path_factory.mktemp("long")
    for seed in range(6):
        write_song(folder / "musdb" / "test" / f"Song {seed}", seed, 20)
    write_model(folder / "m0")
    return folder / "musdb", run(folder / "musdb", folder / "eval", *ACCOMPANIMENT)


def alive(pid):
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def start(root, evaldir, *options, launcher=()):
    """The command in a process of its own."""
    script = [sys.executable, str(Path(evaluate.__file__)), *command(root, evaldir, *ACCOMPANIMENT, *options)]
    return subprocess.Popen([*launcher, *script], stderr=subprocess.PIPE, text=True)


def wait_for_scores(process, evaldir):
    """Until it has those of the first song."""
    limit = time.monotonic() + 60
    while not any((evaldir / "test").glob("Song*.json")):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)


def children_of(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize(
    "number, status, cores",
    [
        (signal.SIGINT, 130, 1),
        (signal.SIGINT, 130, 2),
        (signal.SIGTERM, 143, 1),
        (signal.SIGTERM, 143, 2),
        (signal.SIGKILL, -9, 2),
    ],
)
def test_an_interrupted_run_continues(long, tmp_path, number, status, cores):
    root, expected = long
    folder = tmp_path / "eval" / "test"
    process = start(root, tmp_path / "eval", "--cores", cores)
    wait_for_scores(process, tmp_path / "eval")
    children = children_of(process)
    assert len(children) >= cores if cores > 1 else True
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in error
    if number != signal.SIGKILL:
        assert error == "evaluate.py: interrupted: the same command continues\n"
        assert not [path for path in (tmp_path / "eval").rglob(".*")], "nothing is left"
    limit = time.monotonic() + 60
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("Song*.json")}
    assert 0 < len(done) < 6
    while any(map(alive, children)):  # they see it at once, but a kernel or a product may have to end
        assert time.monotonic() < limit
        time.sleep(0.05)
    (folder / ".12345678.partial").write_text("{")  # what a kill at the wrong moment leaves
    written = run(root, tmp_path / "eval", *ACCOMPANIMENT)
    assert written["scores"] == expected["scores"] and written["tracks"] == expected["tracks"]
    assert all((folder / name).stat().st_mtime_ns == then for name, then in done.items())
    assert len(list(folder.iterdir())) == 6


def test_half_a_json_is_made_again(root, pair, tmp_path):
    shutil.copytree(pair, tmp_path / "eval")
    path = tmp_path / "eval" / "test" / f"{NAMES[1]}.json"
    text = path.read_text()
    for half in (text[:100], "{}", "["):
        path.write_text(half)
        run(root, tmp_path / "eval", *ACCOMPANIMENT)
        assert path.read_text() == text


def spoiled(value):
    """What museval writes, with a part of it replaced, or taken away, at a time."""
    if isinstance(value, dict):
        for key in value:
            yield {name: item for name, item in value.items() if name != key}
            yield from ({**value, key: other} for other in spoiled(value[key]))
        yield {**value, "more": 1}
    elif isinstance(value, list):
        yield from ([], [*value, value[0]], [*value, {}], value[1:])
        yield from ([other, *value[1:]] for other in spoiled(value[0]))
    yield from (None, True, "x", [], {}, float("inf"), 10**400, [value])


def test_scores_are_only_what_museval_writes(pair, tmp_path):
    """Of anything else, the track is scored again. Whatever is taken for complete can be summed up."""
    track = json.loads((pair / "test" / f"{NAMES[0]}.json").read_text())
    for target in track["targets"]:
        target["frames"] = target["frames"][:2]
    stems = ["vocals", "accompaniment"]
    assert scores.is_complete(track, stems) and not scores.is_complete(track, [*stems, "drums"])
    others = list(spoiled(track))
    complete = [other for other in others if scores.is_complete(other, stems)]
    assert len(complete) < 40 < 120 < len(others)
    path = tmp_path / "Song.json"
    for other in complete:
        path.write_text(json.dumps(other))
        medians = scores.medians(scores.read_scores([path]))
        assert set(medians) == set(stems) and all(set(values) == set(METRICS) for values in medians.values())
    metrics = track["targets"][0]["frames"][0]["metrics"]
    for value, is_score in ((float("nan"), True), (3, True), (None, False), ("3", False), (float("inf"), False)):
        metrics["SDR"] = value
        assert scores.is_complete(track, stems) == is_score


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"settings": 3}', "[" * 100000, "{", '"x"'])
def test_a_summary_that_is_none(root, pair, tmp_path, capsys, text):
    shutil.copytree(pair, tmp_path / "eval")
    (tmp_path / "eval" / "summary.json").write_text(text)
    error = fails(capsys, root, tmp_path / "eval", *ACCOMPANIMENT)
    assert "summary.json" in error and error.count("\n") == 1
    assert (tmp_path / "eval" / "summary.json").read_text() == text


def test_two_evaluations_into_one_folder(root, pair, tmp_path, capsys):
    shutil.copytree(pair, tmp_path / "eval")
    with files.claimed(tmp_path / "eval" / ".lock", "at it"):
        error = fails(capsys, root, tmp_path / "eval", *ACCOMPANIMENT)
    assert f"another process is evaluating into {tmp_path / 'eval'}: wait" in error and error.count("\n") == 1
    run(root, tmp_path / "eval", *ACCOMPANIMENT)


def test_a_picture_of_any_names_and_of_no_scores(tmp_path):
    names = ["$\\frac$", "$", "\udcff", "ü\n"]
    nothing = {"Song": {name: dict.fromkeys(METRICS, float("nan")) for name in names}}
    scores.plot(tmp_path / "x.png", nothing, scores.intervals(nothing), {"/".join(names): names}, "title")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_scores_are_written_whole_or_not_at_all(root, tmp_path, monkeypatch, capsys):
    write = os.pwrite

    def full(number, data, place):
        if Path(os.readlink(f"/proc/self/fd/{number}")).parent.name == "test":
            write(number, data[:100], place)
            raise OSError(28, "No space left on device")
        return write(number, data, place)

    monkeypatch.setattr(os, "pwrite", full)
    error = fails(capsys, root, tmp_path / "eval", *ACCOMPANIMENT, status=1)
    assert all(f"{name}.json: No space left on device\n" in error for name in NAMES)
    assert not list((tmp_path / "eval" / "test").iterdir())


def test_validation_songs_are_a_part_of_the_training_songs(root, tmp_path):
    for number, name in enumerate(("Actions - One Minute Smile", "Fourth - Song")):
        write_song(tmp_path / "musdb" / "train" / name, number)
    shutil.copytree(root.parent / "m0", tmp_path / "m0")
    tracks = {
        subset: set(run(tmp_path / "musdb", tmp_path / subset, *ACCOMPANIMENT, "--subset", subset)["tracks"])
        for subset in ("valid", "train")
    }
    one = {"Actions - One Minute Smile"}
    assert tracks == {"valid": one, "train": one | {"Fourth - Song"}}


def test_stems_are_written_though_the_scores_are_there(root, pair, tmp_path):
    shutil.copytree(pair, tmp_path / "eval")
    run(root, tmp_path / "eval", *ACCOMPANIMENT, "--outdir", tmp_path / "stems")
    assert len(list((tmp_path / "stems").rglob("*.wav"))) == 2 * len(NAMES)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--niter", "2"], "niter 1, not 2"),
        (["--wiener-win-len", "100"], "wiener_win_len 300, not 100"),
        (["--segment", "31"], "segment 480.0, not 31.0"),
        (["--model", "m1"], "weights"),
        (["--model", "m0", "m1"], "weights"),
        (["--wiener-eps", "0"], "wiener_eps 1e-10, not None"),
        (["--subset", "train"], "subset 'test', not 'train'"),
        (["--root", "copy"], "root"),
        (["--targets", "vocals", "drums", "--residual", "rest"], "targets"),
    ],
)
def test_scores_of_other_settings_are_not_mixed(root, pair, tmp_path, capsys, options, message):
    shutil.copytree(pair, tmp_path / "eval")
    shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "copy" / "test").rename(tmp_path / "copy" / "train")
    shutil.copytree(tmp_path / "copy" / "train", tmp_path / "copy" / "test")
    places = {name: str(root.parent / name) for name in ("m0", "m1")}
    places = {**places, "copy": str(tmp_path / "copy")}
    options = [places.get(option, option) for option in options]
    if "--subset" in options:
        options += ["--root", places["copy"]]
    before = sorted(path.read_text() for path in (tmp_path / "eval").rglob("*.json"))
    error = fails(capsys, root, tmp_path / "eval", *ACCOMPANIMENT, *options)
    assert ("root" if "--subset" in options else message) in error and "choose another --evaldir" in error
    assert error.count("\n") == 1
    assert before == sorted(path.read_text() for path in (tmp_path / "eval").rglob("*.json"))


def test_scores_of_versions_with_museval_go_on(root, pair, tmp_path, capsys):
    shutil.copytree(pair, tmp_path / "eval")
    earlier = summary(tmp_path / "eval")
    del earlier["settings"]["scorer"], earlier["settings"]["reference_precision"]
    earlier["settings"]["museval"] = "0.4.1"
    (tmp_path / "eval" / "summary.json").write_text(json.dumps(earlier))
    assert "scorer 'museval 0.4.1', not 'bsseval 1'" in fails(capsys, root, tmp_path / "eval", *ACCOMPANIMENT)
    run(root, tmp_path / "eval", *ACCOMPANIMENT, "--museval", "--reference-precision", "file")


def test_scores_of_versions_without_the_regularisation_go_on(root, pair, tmp_path, capsys):
    shutil.copytree(pair, tmp_path / "eval")
    earlier = summary(tmp_path / "eval")
    assert earlier["settings"].pop("wiener_eps") == 1e-10
    (tmp_path / "eval" / "summary.json").write_text(json.dumps(earlier))
    assert "wiener_eps 1e-10, not None" in fails(capsys, root, tmp_path / "eval", *ACCOMPANIMENT, "--wiener-eps", 0)
    assert run(root, tmp_path / "eval", *ACCOMPANIMENT)["settings"]["wiener_eps"] == 1e-10


def test_several_models_are_scored_together(root, tmp_path, capsys, monkeypatch):
    """By the command, from processes too; the summary says of which, and only they go on."""
    monkeypatch.chdir(tmp_path)
    root = copy(root, tmp_path / "copy")
    shutil.rmtree(root / "test" / NAMES[2])
    models = [str(root.parent / name) for name in ("m0", "m1")]
    options = ["--root", str(root), "--context", "cpu", "--is-wav", "--quiet", *ACCOMPANIMENT]
    evaluate.main([*options, "--model", *models, "--outdir", "stems", "--cores", "2"])
    written = summary(tmp_path / "evaluation" / "m0+m1")
    assert written["model"] == models
    separator = separate.Separator.load(models, "vocals", residual="accompaniment", context="cpu")
    for track in NAMES[:2]:
        audio = soundfile.read(root / "test" / track / "mixture.wav", dtype="float32", always_2d=True)[0].T
        for name, stem in separator(audio, RATE).items():
            found = soundfile.read(tmp_path / "stems" / "test" / track / f"{name}.wav", always_2d=True)[0].T
            np.testing.assert_allclose(found, stem, atol=1e-6)
    assert "weights" in fails(capsys, root, tmp_path / "evaluation" / "m0+m1", *ACCOMPANIMENT)


# ------------------------------------------------------------------------------- spread, comparison


def test_intervals_are_those_of_medians_over_songs():
    """Of nine songs the median of a draw is at most the k-th, if at least five of it are: so likely is each end.

    And the intervals hold what they promise.
    """
    values = [2.0**k for k in range(9)]
    tracks = {f"{k}": {"bass": dict.fromkeys(METRICS, value)} for k, value in enumerate(values)}
    tracks["none"] = {"bass": dict.fromkeys(METRICS, float("nan"))}
    at_most = scipy.stats.binom.sf(4, 9, np.arange(1, 10) / 9)
    expected = tuple(values[np.argmax(at_most >= share)] for share in (0.025, 0.975))
    assert scores.intervals(tracks)["bass"]["SDR"] == expected
    rng, hits = np.random.default_rng(0), 0
    for _ in range(40):
        drawn = rng.normal(3, 2, 50)
        tracks = {k: {"bass": {"SDR": value, "SIR": 0, "ISR": 0, "SAR": 0}} for k, value in enumerate(drawn)}
        low, high = scores.intervals(tracks)["bass"]["SDR"]
        assert high - low < 2.5
        hits += low <= 3 <= high
    assert hits >= 34
    assert np.isnan(scores.intervals({"0": tracks[0]})["bass"]["SDR"]).all()


def test_the_spread_is_in_the_table_and_the_summary(root, pair, capsys):
    spread = run(root, pair, *ACCOMPANIMENT)["intervals"]["vocals/accompaniment"]
    printed = capsys.readouterr().out.splitlines()
    for name in ("vocals", "accompaniment"):
        k = next(k for k, line in enumerate(printed) if line.startswith(f"{name} "))
        ends = [spread[name][metric] for metric in METRICS]
        assert printed[k + 1].split() == ["95", "%", *(f"{low:.2f}…{high:.2f}" for low, high in ends)]
        medians = [summary(pair)["tracks"][track][name]["SDR"] for track in NAMES]
        assert spread[name]["SDR"] == [min(medians), max(medians)]  # each is the median of 7 in 27 draws of three


def other_than(pair, folder, gains, keep=NAMES):
    """A copy of an evaluation whose scores are higher by gains {song: dB}."""
    shutil.copytree(pair, folder)
    for path in (folder / "test").iterdir():
        if path.stem not in keep:
            path.unlink()
            continue
        track = json.loads(path.read_text())
        for frame in (frame for target in track["targets"] for frame in target["frames"]):
            frame["metrics"]["SDR"] += gains[path.stem]
        path.write_text(json.dumps(track))
    return folder


def compared(*arguments):
    evaluate.main(["--compare", *map(str, arguments)])


def test_two_evaluations_song_by_song(root, pair, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gains = dict(zip(NAMES, (0.5, -0.25, 1.0)))
    other = other_than(pair, tmp_path / "other", gains)
    changed = summary(other)
    changed["settings"]["niter"] = 2
    (other / "summary.json").write_text(json.dumps(changed))
    compared(pair, other)
    written = json.loads((tmp_path / "evaluation" / f"{pair.name}-other" / "comparison.json").read_text())
    assert (tmp_path / "evaluation" / f"{pair.name}-other" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for name in ("vocals", "accompaniment"):
        assert written["scores"]["vocals/accompaniment"][name] == pytest.approx(
            {"SDR": 0.5, "SIR": 0, "ISR": 0, "SAR": 0}
        )
        assert written["intervals"]["vocals/accompaniment"][name]["SDR"] == pytest.approx([-0.25, 1])
        for track, gain in gains.items():
            assert written["tracks"][track][name]["SDR"] == pytest.approx(gain)
    printed = capsys.readouterr().out
    assert "SDR of vocals: higher in 2 songs, lower in 1\n" in printed
    assert "differ in niter: 1 and 2\n" in printed
    assert printed.startswith(f"{other} less {pair}, median over 3 songs")


def test_a_comparison_with_museval_s_own_folder(pair, tmp_path, capsys):
    """It has no summary; and of the songs, one is missing."""
    other = other_than(pair, tmp_path / "other", dict.fromkeys(NAMES, 1), NAMES[:2])
    (other / "summary.json").unlink()
    compared(other, pair, "--evaldir", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(written["tracks"]) == set(NAMES[:2]) and written["settings"] == {}
    assert f"Only in {pair}: {NAMES[2]}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoil, message",
    [
        ("nothing", "holds no scores"),
        ("no folder", "holds no scores"),
        ("track", "does not hold scores of museval's kind"),
        ("json", "cannot read"),
        ("targets", "cannot be compared: choose the same stems"),
        ("alone", "alone"),
        ("one target", "the one before of"),
        ("songs", "no song in common"),
        ("subsets", "two scores of a song"),
        ("summary", "is not what evaluate.py writes"),
        ("stems", "hold other sources"),
    ],
)
def test_what_cannot_be_compared(pair, whole, tmp_path, capsys, spoil, message):
    other = other_than(pair, tmp_path / "other", dict.fromkeys(NAMES, 0))
    first, paths = pair, sorted((other / "test").iterdir())
    track = json.loads(paths[1].read_text())
    if spoil == "nothing":
        shutil.rmtree(other / "test")
    elif spoil == "no folder":
        other = tmp_path / "nowhere"
    elif spoil in ("track", "json"):
        paths[1].write_text('{"targets": 3}' if spoil == "track" else "{")
    elif spoil == "targets":
        other = whole[0]
    elif spoil in ("one target", "alone"):
        del track["targets"][1:]
        for path in paths if spoil == "alone" else paths[1:2]:
            path.write_text(json.dumps(track))
        first = other
    elif spoil == "songs":
        (other / "test").rename(other / "x")
        (other / "test").mkdir()
        (other / "x" / f"{NAMES[0]}.json").rename(other / "test" / "Another.json")
        shutil.rmtree(other / "x")
    elif spoil == "subsets":
        shutil.copytree(other / "test", other / "train")
    else:
        changed = {"settings": {**summary(other)["settings"], "stems": {}}}
        (other / "summary.json").write_text("[]" if spoil == "summary" else json.dumps(changed))
    with pytest.raises(SystemExit) as error:
        compared(first, other, "--evaldir", tmp_path / "out")
    said = capsys.readouterr().err
    assert error.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--niter", "1"], ["--quiet"], ["--museval"], ["--root", "x"]])
def test_a_comparison_takes_no_other_options(pair, capsys, options):
    with pytest.raises(SystemExit) as error:
        compared(pair, pair, *options)
    said = capsys.readouterr().err
    assert error.value.code == 2 and options[0] in said and said.count("\n") == 1


# ------------------------------------------------------------------------------------------ options


class Stop(Exception):
    pass


OPTIONS = {
    "model": ["m1", "m2"],
    "model_dir": "somewhere",
    "network": "file.py:Class",
    "network_options": {"size": 4},
    "targets": ["bass", "vocals"],
    "niter": 3,
    "softmask": True,
    "alpha": 1.5,
    "wiener_win_len": 77,
    "wiener_eps": 1e-5,
    "residual": "rest",
    "segment": 50.0,
    "context": "cpu",
    "device_id": 1,
}
ELSEWHERE = {"aggregate", "threads", "plain"}  # reach the stems and the threads, see below


def test_every_option_of_separation_has_a_test():
    parser = args.Parser()
    args.add_separation_options(parser)
    args.add_context_options(parser)
    assert {action.dest for action in parser._actions} - {"help"} == OPTIONS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", OPTIONS)
def test_options_reach_the_separator(root, tmp_path, monkeypatch, name):
    def load(**options):
        seen.update(options)
        raise Stop

    seen = {}
    monkeypatch.setattr(evaluate.Separator, "load", load)
    value, option = OPTIONS[name], f"--{name.replace('_', '-')}"
    values = [] if value is True else value if isinstance(value, list) else [json.dumps(value)]
    values = [value] if isinstance(value, str) else values
    with pytest.raises(Stop):
        run(root, tmp_path, option, *values)
    assert seen[name] == value


def test_options_change_the_stems_alike_in_both_commands(root, tmp_path):
    """Stems of evaluate.py are those of separate.py, also from processes."""
    root = copy(root, tmp_path / "copy")
    shutil.rmtree(root / "test" / NAMES[2])
    options = [
        "--niter",
        "2",
        "--softmask",
        "--alpha",
        "1.3",
        "--wiener-win-len",
        "20",
        "--residual",
        "rest",
        "--plain",
    ]
    options += [
        "--targets",
        "vocals",
        "bass",
        "--aggregate",
        json.dumps({"rest": ["rest"], "sung": ["vocals", "bass"]}),
    ]
    run(root, tmp_path / "eval", *options, "--outdir", tmp_path / "stems", "--cores", 2)
    shared = ["--model", str(root.parent / "m0"), "--context", "cpu", "--quiet", *options]
    for track in NAMES[:2]:
        separate.main([str(root / "test" / track / "mixture.wav"), "--outdir", str(tmp_path / track), *shared])
        for stem in ("rest", "sung"):
            own, _ = soundfile.read(tmp_path / "stems" / "test" / track / f"{stem}.wav")
            np.testing.assert_allclose(own, soundfile.read(tmp_path / track / "mixture" / f"{stem}.wav")[0], atol=1e-6)


@pytest.mark.parametrize("start", ["the command", "a process of its own"])
def test_threads_and_plain_functions(root, tmp_path, monkeypatch, start):
    def load(**options):
        assert kernels.threads.get_threads() == 3 and not context.fast()
        raise Stop

    monkeypatch.setattr(evaluate.Separator, "load", load)
    with pytest.raises(Stop):
        if start == "the command":
            run(root, tmp_path, "--threads", 3, "--plain")
        else:
            evaluate.set_up(loading={"context": "cpu", "device_id": "0"}, threads=3, plain=True)


def test_processes_and_threads_reach_the_pool(root, tmp_path, monkeypatch):
    def results(tracks, begin, failed, cores, threads, together):
        seen.append((len(tracks), cores, threads, together))
        return []

    seen = []
    monkeypatch.setattr(pool, "results", results)
    for cores, threads in ((2, 8), (50, 2)):
        with pytest.raises(SystemExit):
            run(root, tmp_path, "--cores", cores, "--threads", threads)
    assert seen == [(3, 2, 8, 4), (3, 3, 2, 4)]


# --------------------------------------------------------------------------------- which stems are what


def stems_of(targets, residual=None, aggregate=None):
    sources = [*targets, residual] if residual else list(targets)
    separator = SimpleNamespace(targets=list(targets), sources=sources, residual=bool(residual))
    known = {name: {name: 1} for name in TARGETS}
    known.update(accompaniment=dict.fromkeys(TARGETS[1:], 1), linear_mixture=dict.fromkeys(TARGETS, 1))
    return scorer.references(separator, aggregate, known)


@pytest.mark.parametrize(
    "arguments, labels",
    [
        ((TARGETS,), {"four sources": list(TARGETS)}),
        ((TARGETS, "residual"), {"four sources": list(TARGETS)}),
        ((["vocals"], "accompaniment"), {"vocals/accompaniment": ["vocals", "accompaniment"]}),
        ((["vocals", "accompaniment"],), {"vocals/accompaniment": ["vocals", "accompaniment"]}),
        ((TARGETS[:3], "other"), {"four sources": list(TARGETS)}),
        ((TARGETS[:3], "rest"), {"vocals/drums/bass/rest": ["vocals", "drums", "bass", "rest"]}),
        ((["bass"], "rest"), {"bass/rest": ["bass", "rest"]}),
        ((TARGETS[:2],), {"vocals/drums": ["vocals", "drums"]}),
        (
            (TARGETS, None, {"vocals": ["vocals"], "accompaniment": ["drums", "bass", "other"]}),
            {"vocals/accompaniment": ["vocals", "accompaniment"]},
        ),
        (
            (TARGETS, None, {**{name: [name] for name in TARGETS}, "accompaniment": ["drums", "bass", "other"]}),
            {"four sources": ["drums", "bass", "other"], "vocals/accompaniment": ["vocals", "accompaniment"]},
        ),
    ],
)
def test_labels(arguments, labels):
    assert scorer.evaluations(stems_of(*arguments)) == labels


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["vocals"],), "--residual"),
        ((["speech"],), "MUSDB18 has no speech"),
        ((["vocals", "drums"], "other"), "'other' would be bass \\+ other"),
        ((TARGETS, None, {"vocals": ["drums"], "drums": ["vocals"]}), "'vocals' would be drums"),
        ((TARGETS, None, {"a": ["drums", "bass"], "b": ["drums"]}), "cannot be told apart: a, b"),
    ],
)
def test_stems_that_cannot_be_scored(arguments, message):
    with pytest.raises(UsageError, match=message):
        scorer.evaluations(stems_of(*arguments))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--root", "nowhere"], "no folder test/"),
        (["--subset", "train"], "no folder train/"),
        (["--model", "nothing"], "unknown model"),
        (["--targets", "vocals"], "--residual"),
        (["--targets", "piano"], "no weights of the target 'piano'"),
        (["--cores", "0"], "0 is not at least 1"),
        (["--threads", str(10**20)], "threads"),
        (["--root", __file__], "no folder test/"),
        (["--root", "~nobody/songs"], "no folder test/"),
        (["--aggregate", "{"], "--aggregate {"),
        (["--alpha", "2"], "alpha"),
        (["--subset", "all"], "invalid choice"),
    ],
)
def test_bad_input(root, tmp_path, capsys, options, message):
    error = fails(capsys, root, tmp_path / "eval", *options)
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "eval").exists()


def test_stems_and_wav_are_told_apart(root, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([option for option in command(root, tmp_path) if option != "--is-wav"])
    assert "add --is-wav" in capsys.readouterr().err


def test_scores_of_somebody_else_are_left_alone(root, tmp_path, capsys):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / f"{NAMES[0]}.json").write_text("{}")
    assert "no summary.json" in fails(capsys, root, tmp_path)
