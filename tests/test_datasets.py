"""Datasets of folders and of manifests: what they draw, what they leave out, what they say of what cannot be.

What openunmix 1.3.0 makes of the same folders is in test_recipe.py.
"""

import csv
import itertools
import json
import os
import random
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import stempeg
import trainings
from reference.songs import RATE, write_layout, write_songs

import args
import data
import separate
import train
from datasets import cache
from datasets.augmentations import AUGMENTATIONS
from datasets.recordings import open_recording
from examples import manifest
from kernels.mixing import mix
from utils import UsageError

LAYOUTS = {
    "aligned": {"input_file": "mixture.wav", "output_file": "drums.wav"},
    "sourcefolder": {"target_dir": "bass", "interferer_dirs": ["vocals", "drums"], "nb_train_samples": 12},
    "trackfolder_fix": {"target_file": "vocals.wav", "interferer_files": ["drums.wav", "other.wav"]},
    "trackfolder_var": {"target_file": "vocals.wav"},
}


def load(dataset, given=(), **options):
    """Both splits, as the commands open them."""
    parser = args.train_parser()
    settings = {**vars(parser.parse_args([])), "seq_dur": 0.1, "dataset": dataset, **options}
    targets = data.choose_targets(settings, set(given) | options.keys())
    return data.load(
        targets=targets, **{name: settings[name] for name in ("dataset", "seed", "nb_channels", *data.OPTIONS)}
    )


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    return {name: write_layout(tmp_path_factory.mktemp(name), name) for name in LAYOUTS}


def write_manifest(path, rows, columns="song,stem,path,split"):
    with open(path, "w", newline="") as stream:
        csv.writer(stream).writerows([columns.split(","), *rows])
    return path


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    return write_songs(tmp_path_factory.mktemp("songs"))


def rows_of(root, folder):
    """Rows of a manifest, in `folder`, of the songs of `write_songs`."""
    for song in sorted((root / "train").iterdir()):
        split = "train" if song.name.startswith("Noise") else "valid"
        for path in sorted(song.glob("*.wav")):
            yield song.name, path.stem, os.path.relpath(path, folder), split


@pytest.fixture(params=[*LAYOUTS, "manifest", "musdb"])
def any_dataset(request, layouts, songs, tmp_path):
    """Name and options of each dataset, on small songs."""
    if request.param == "manifest":
        return request.param, {"manifest": write_manifest(tmp_path / "m.csv", rows_of(songs, tmp_path))}
    if request.param == "musdb":
        return request.param, {"root": songs, "is_wav": True}
    return request.param, {"root": layouts[request.param], **LAYOUTS[request.param]}


# ----------------------------------------------------------------------------------------- all of them


def test_batches_are_the_same_for_any_number_of_workers_and_wherever_they_begin(any_dataset):
    name, options = any_dataset
    augmentations = {} if name == "aligned" else {"source_augmentations": ["gain", "channelswap", "pitch"]}
    source, _ = load(name, **options, **augmentations)

    def batches(nb_workers, start=0):
        batches = data.DataIterator(source, 5, nb_workers).epoch(2, start)
        return [(x.tobytes(), y.tobytes()) for x, y in trainings.as_numpy(batches)]

    expected = batches(0)
    assert len(set(expected)) == len(expected) == -(-len(source) // 5)
    for nb_workers in (1, 4):
        assert batches(nb_workers) == expected
    assert batches(4, len(expected) // 2) == expected[len(expected) // 2 :]


def test_batches_that_a_reader_keeps_are_not_written_to(any_dataset):
    name, options = any_dataset
    source, _ = load(name, **options)
    iterator = data.DataIterator(source, 1, 2)
    kept = list(iterator.epoch(1))
    copies = [(x.data.copy(), y[0].data.copy()) for x, y in kept]
    last = [y[0].data[0] for _, y in iterator.epoch(2)]  # parts of arrays count, too
    again = [y.copy() for y in last]
    list(iterator.epoch(3))
    for (x, y), (x0, y0) in zip(kept, copies):
        np.testing.assert_array_equal(x.data, x0)
        np.testing.assert_array_equal(y[0].data, y0)
    np.testing.assert_array_equal(last, again)


def test_arrays_of_batches_are_used_again(songs):
    source, _ = load("musdb", root=songs, is_wav=True)
    places = set()
    for x, _ in data.DataIterator(source, 4, 2).epoch(1):
        places.add(x.data.ctypes.data)
    assert len(places) <= 2 * (data.DataIterator.AHEAD + 2) < len(source) // 4


@pytest.mark.parametrize("nb_workers", [0, 2])
@pytest.mark.parametrize("seq_dur", [0, 0.1])
def test_what_is_validated_is_all_items_in_their_order(any_dataset, nb_workers, seq_dur):
    name, options = any_dataset
    if name == "sourcefolder" and not seq_dur:
        pytest.skip("it has no whole songs")
    _, source = load(name, **{**options, "seq_dur": seq_dur})
    expected = [source.item(0, index) for index in range(len(source))]
    found = trainings.as_numpy(data.DataIterator(source, 1, nb_workers).items())
    assert len(found) == len(expected)
    for (x, y), (x0, y0) in zip(found, expected):
        np.testing.assert_array_equal(x, x0[None])
        np.testing.assert_array_equal(y, y0[None])


def test_every_epoch_draws_anew_and_validation_does_not(any_dataset):
    name, options = any_dataset
    source, valid = load(name, **options)
    first, second = (np.stack([source.item(epoch, index)[0] for index in range(len(source))]) for epoch in (1, 2))
    assert not any(np.array_equal(a, b) for a, b in zip(first, second))
    for (x, y), (x0, y0) in zip(valid.items(), valid.items()):
        np.testing.assert_array_equal(x, x0)
        np.testing.assert_array_equal(y, y0)
        assert x.any() and y.any()


def test_a_training_of_each_goes_on_as_if_it_had_not_stopped(any_dataset, tmp_path, monkeypatch):
    name, options = any_dataset
    flags = ["--context", "cpu", "--quiet", "--dataset", name, "--seq-dur", "0.1", "--batch-size", "8", "--nfft", "256"]
    flags += ["--nhop", "128", "--hidden-size", "2"]
    for option, value in options.items():
        flags += ["--" + option.replace("_", "-")]
        flags += [] if value is True else [*map(str, value)] if isinstance(value, list) else [str(value)]
    target = {"aligned": "drums", "sourcefolder": "bass"}.get(name, "vocals")
    if name in ("musdb", "manifest"):
        flags += ["--samples-per-track", "4"]

    def run(folder, *more):
        train.main([*flags, "--output", str(tmp_path / folder), *more])
        return json.loads((tmp_path / folder / f"{target}.json").read_text())

    whole = run("whole", "--epochs", "2")
    run("parts", "--epochs", "1")
    parts = run("parts", "--epochs", "2", "--checkpoint", str(tmp_path / "parts"), "--nb-workers", "4")
    for key in ("train_loss_history", "valid_loss_history"):
        assert parts[key] == whole[key]


# ------------------------------------------------------------------------------------------- manifest


def test_a_manifest_of_musdb_s_songs_trains_like_musdb(songs, tmp_path):
    """Bit for bit, in whatever order its rows are."""
    rows = list(rows_of(songs, tmp_path))
    random.Random(0).shuffle(rows)
    ours = load("manifest", manifest=write_manifest(tmp_path / "m.csv", rows), target="accompaniment")
    musdb = load("musdb", root=songs, is_wav=True, target="accompaniment")
    for index in range(0, len(musdb[0]), 7):
        for a, b in zip(ours[0].item(3, index), musdb[0].item(3, index)):
            np.testing.assert_array_equal(a, b)
    for pair, expected in zip(ours[1].items(), musdb[1].items()):
        for a, b in zip(pair, expected):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(*(data.statistics(source.mixtures(), 512, 128) for source in (ours[0], musdb[0]))):
        np.testing.assert_array_equal(a, b)


def test_the_manifest_of_the_example_trains_like_musdb(songs, tmp_path):
    """Bit for bit: losses, weights, and all that a training goes on with."""
    manifest.main(songs, tmp_path / "m.csv")
    options = "--context cpu --quiet --target bass --seq-dur 0.2 --batch-size 4 --samples-per-track 4 --epochs 2"
    options += " --nfft 512 --nhop 256 --hidden-size 4 --nb-workers 2"
    sides = {"manifest": ["--manifest", tmp_path / "m.csv"], "musdb": ["--root", songs, "--is-wav"]}
    for name, more in sides.items():
        train.main([*options.split(), "--dataset", name, *map(str, more), "--output", str(tmp_path / name)])
    trainings.assert_same(*(tmp_path / name for name in sides))


def write(path, samples, rate=RATE, subtype="PCM_16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def constant(value, nb_timesteps=8000, nb_channels=2):
    return np.full((nb_timesteps, nb_channels), float(value))


def few_songs(folder, columns="song,stem,path,split", more=()):
    """A manifest of songs that have not all the same stems; every file is a number."""
    stems = {"a": {"vocals": 1, "piano": 2}, "b": {"vocals": 4}, "c": {"piano": 8}, "v": {"vocals": 16, "piano": 32}}
    rows = []
    for song, values in stems.items():
        for stem, value in values.items():
            write(folder / f"{song}-{stem}.wav", constant(value / 128))
            rows.append((song, stem, f"{song}-{stem}.wav", "valid" if song == "v" else ""))
    return write_manifest(folder / "songs.csv", [*rows, *more], columns)


def values(source, epoch=1):
    """The first sample of mixtures and targets, times 128."""
    items = [source.item(epoch, index) for index in range(len(source))]
    return [tuple(int(np.rint(128 * audio[..., 0, 0].ravel()[0])) for audio in item) for item in items]


def test_sources_are_drawn_of_the_songs_that_have_them(tmp_path):
    source, valid = load("manifest", manifest=few_songs(tmp_path), source_augmentations=[])
    assert set(values(source)) == {(v + p, v) for v, p in itertools.product((1, 4), (2, 8))}
    assert values(valid) == [(48, 16)]
    source, _ = load("manifest", manifest=few_songs(tmp_path), source_augmentations=[], silence_missing=True)
    assert set(values(source)) == {(v + p, v) for v, p in itertools.product((0, 1, 4), (0, 2, 8))}


def test_targets_of_a_manifest_have_any_names_and_sums(tmp_path):
    path = few_songs(tmp_path)
    for target, expected in (("piano", {2, 8}), ("accompaniment", {2, 8}), ("linear_mixture", {3, 6, 9, 12})):
        source, _ = load("manifest", manifest=path, source_augmentations=[], target=target)
        assert {y for _, y in values(source)} == expected
    with pytest.raises(UsageError, match="unknown target 'drums': there are vocals, piano"):
        load("manifest", manifest=path, target="drums")


def test_rows_of_a_stem_are_added_up_and_cut(tmp_path):
    ramp = np.stack([np.arange(8000), np.zeros(8000)], axis=1) / 32768
    write(tmp_path / "one.wav", ramp), write(tmp_path / "two.wav", ramp[:4000])
    rows = [("a", "vocals", "one.wav", "0.01", "0.05", "valid"), ("a", "vocals", "two.wav", "", "", "valid")]
    rows += [("b", "vocals", "one.wav", "", "", "")]
    path = write_manifest(tmp_path / "m.csv", rows, "song,stem,path,start,duration,split")
    _, valid = load("manifest", manifest=path)
    ((mixture, target),) = valid.items()
    length = round(0.05 * RATE)
    assert mixture.shape == (2, length)
    np.testing.assert_allclose(mixture[0] * 32768, 2 * np.arange(length) + 441)
    np.testing.assert_array_equal(target[0], mixture)


def test_the_order_of_rows_means_nothing(tmp_path):
    """Three files of one stem are added up in one order: else the last bits of their sum would depend on the rows."""
    rng = np.random.default_rng(1)
    for name in "abc":
        write(tmp_path / f"{name}.wav", rng.uniform(-0.3, 0.3, (8000, 2)), subtype="FLOAT")
    rows = [("song", "vocals", f"{name}.wav", start, "0.02", "valid") for name in "abc" for start in ("0", "0.01")]
    rows += [("other", "vocals", "a.wav", "", "", "train")]

    def audio(rows):
        _, valid = load(
            "manifest", manifest=write_manifest(tmp_path / "m.csv", rows, "song,stem,path,start,duration,split")
        )
        return next(valid.items())[0]

    expected = audio(rows)
    for _ in range(4):
        np.testing.assert_array_equal(audio([rows[k] for k in rng.permutation(len(rows))]), expected)


def test_songs_that_validate_by_a_share_do_not_depend_on_the_seed_of_the_training(tmp_path):
    rows = []
    for number in range(20):
        write(tmp_path / f"{number}.wav", constant(number / 128))
        rows.append((f"song {number}", "vocals", f"{number}.wav"))
    path = write_manifest(tmp_path / "m.csv", rows, "song,stem,path")

    def names(**options):
        both = [{track.name for track in one.tracks} for one in load("manifest", manifest=path, **options)]
        assert not both[0] & both[1] and len(both[0] | both[1]) == 20
        return both[1]

    assert len(names()) == 2 and len(names(valid_share=0.3)) == 6 and names() < names(valid_share=0.3)
    assert names(seed=1) == names() != names(valid_seed=1)


# -------------------------------------------------------------------------------------- rates and formats


def test_other_rates_are_resampled_once(layouts, tmp_path, capsys):
    root = tmp_path / "songs"
    shutil.copytree(layouts["trackfolder_fix"], root)
    path = root / "train" / "Noise - First" / "drums.wav"
    samples = soundfile.read(path)[0]
    write(path, soxr.resample(samples, RATE, 48000), 48000, "FLOAT")
    options = {"root": root, **LAYOUTS["trackfolder_fix"], "cache": tmp_path / "kept"}
    with pytest.raises(UsageError, match=r"44100 Hz \(.*48000 Hz \(.*drums.wav.*--sample-rate 44100"):
        load("trackfolder_fix", **options)
    source, _ = load("trackfolder_fix", **options, sample_rate=RATE)
    assert source.sample_rate == RATE
    (kept,) = (tmp_path / "kept").rglob("*.wav")
    resampled = soundfile.read(kept)[0]
    assert np.abs(resampled[2000:-2000] - samples[2000 : len(resampled) - 2000]).max() < 4e-3
    times = kept.stat().st_mtime_ns
    load("trackfolder_fix", **options, sample_rate=RATE)
    assert kept.stat().st_mtime_ns == times
    kept.write_bytes(kept.read_bytes()[:-8] + b"damaged!")  # of the same size
    load("trackfolder_fix", **options, sample_rate=RATE)
    np.testing.assert_array_equal(soundfile.read(kept)[0], resampled)
    os.utime(path)  # another file, as far as one can tell
    load("trackfolder_fix", **options, sample_rate=RATE)
    assert len(list((tmp_path / "kept").rglob("*.wav"))) == 2


def test_a_disk_that_is_too_small_is_noticed_before(layouts, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    options = {"root": layouts["aligned"], **LAYOUTS["aligned"], "cache": tmp_path, "sample_rate": 8000}
    with pytest.raises(UsageError, match=r"of 6 files needs .* MB, .* has 0.0 MB left: --cache"):
        load("aligned", **options)
    assert not list(tmp_path.rglob("*.wav"))


@pytest.mark.parametrize(
    "form, subtype",
    [("flac", "PCM_16"), ("flac", "PCM_24"), ("aiff", "PCM_16"), ("ogg", "VORBIS"), ("mp3", "MPEG_LAYER_III")],
)
def test_any_format_that_soundfile_reads(layouts, tmp_path, form, subtype):
    root = tmp_path / "songs"
    for path in layouts["trackfolder_var"].rglob("*.wav"):
        new = (root / path.relative_to(layouts["trackfolder_var"])).with_suffix(f".{form}")
        write(new, soundfile.read(path)[0], subtype=subtype)
    _, valid = load("trackfolder_var", root=root, target_file=f"vocals.{form}", ext=f".{form}", cache=tmp_path / "kept")
    _, expected = load("trackfolder_var", root=layouts["trackfolder_var"], target_file="vocals.wav")
    for (x, _), (x0, _) in zip(valid.items(), expected.items()):
        length = min(x.shape[1], x0.shape[1])
        error = np.abs(x[:, :length] - x0[:, :length])
        assert error.max() <= 1e-6 or (form in ("ogg", "mp3") and error.mean() < 0.3 * np.abs(x0).mean())


def test_mono_is_in_both_channels_where_the_model_is_stereo(tmp_path):
    for song, split in (("a", "train"), ("b", "valid")):
        write(tmp_path / split / song / "voice.wav", constant(0.25, nb_channels=1))
        write(tmp_path / split / song / "rest.wav", np.stack([constant(0.25, nb_channels=1)[:, 0], np.zeros(8000)], 1))
    options = {"root": tmp_path, "target_file": "voice.wav", "interferer_files": ["rest.wav"]}
    for one in load("trackfolder_fix", **options):
        mixture, target = one.item(1, 0)
        np.testing.assert_array_equal(mixture[:, 0], [0.5, 0.25])
        np.testing.assert_array_equal(target[0, :, 0], [0.25, 0.25])
    options["interferer_files"] = ["voice.wav"]
    for nb_channels in (1, 2):
        source, _ = load(
            "aligned", root=tmp_path, input_file="voice.wav", output_file="voice.wav", nb_channels=nb_channels
        )
        assert source.item(1, 0)[0].shape[0] == nb_channels


def test_stems_of_unequal_length_are_cut_to_the_shortest(tmp_path):
    for song, split in (("a", "train"), ("b", "valid")):
        write(tmp_path / split / song / "voice.wav", constant(0.25, 8000))
        write(tmp_path / split / song / "rest.wav", constant(0.25, 7000))
    _, valid = load("trackfolder_fix", root=tmp_path, target_file="voice.wav", interferer_files=["rest.wav"])
    assert [x.shape for x, _ in valid.items()] == [(2, 7000)]


# -------------------------------------------------------------------------------------- augmentations


def test_matrices_do_what_their_functions_do():
    """The fast form, of channels, and the plain one, of samples."""
    audio = np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)
    for name in ("gain", "channelswap", "force_stereo", "force_mono"):
        for seed in range(4):
            matrix = AUGMENTATIONS[name](np.eye(2, dtype=np.float32), np.random.default_rng(seed))
            expected = AUGMENTATIONS[name](audio, np.random.default_rng(seed))
            np.testing.assert_allclose(matrix @ audio, expected, atol=1e-6)
    assert AUGMENTATIONS["force_stereo"](audio[:1], None).shape == (2, 100)
    assert AUGMENTATIONS["force_stereo"](np.repeat(audio, 3, axis=0), None).shape == (2, 100)
    np.testing.assert_allclose(AUGMENTATIONS["force_mono"](audio, None)[1], audio.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("nb_inputs, nb_channels", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_mixing_is_a_product_with_a_matrix(dtype, nb_inputs, nb_channels):
    rng = np.random.default_rng(0)
    samples = rng.integers(-32768, 32768, (9001, nb_inputs)).astype(dtype)
    if dtype == "float32":
        samples /= 32768
    matrix = rng.standard_normal((nb_channels, nb_inputs)).astype(np.float32)
    expected = matrix.astype(np.float64) @ samples.T / (32768 if dtype == "int16" else 1)
    out = np.full((nb_channels, 9001), 7, np.float32)
    mix(samples, matrix, out, accumulate=False)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    mix(samples, matrix, out)
    np.testing.assert_allclose(out, 2 * expected, atol=2e-6)


def test_pitch_changes_a_fifth_of_the_sources_by_two_semitones_at_most(tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(3 * RATE) / RATE)
    for song, split in (("a", "train"), ("b", "valid")):
        write(tmp_path / split / song / "voice.wav", tone[:, None])
        write(tmp_path / split / song / "rest.wav", np.zeros((3 * RATE, 1)))
    options = {"root": tmp_path, "target_file": "voice.wav", "interferer_files": ["rest.wav"]}
    source, _ = load("trackfolder_fix", **options, source_augmentations=["pitch"], seq_dur=1.0, nb_channels=1)
    found = []
    for epoch in range(200):
        _, target = source.item(epoch, 0)
        assert np.abs(target[0, 0]).reshape(10, -1).max(axis=1).min() > 0.45, "no silence at the end"
        found.append(np.argmax(np.abs(np.fft.rfft(target[0, 0]))))
    changed = np.array([frequency for frequency in found if frequency != 1000])
    assert 20 < len(changed) < 65
    assert 888 <= changed.min() < 930 and 1070 < changed.max() <= 1124


def test_remix_takes_each_source_once_in_an_epoch(tmp_path):
    for number in range(12):
        for name, factor in (("voice", 1), ("rest", 16)):
            write(tmp_path / "train" / f"{number:02}" / f"{name}.wav", constant(factor * number / 512))
    (
        write(tmp_path / "valid" / "a" / "voice.wav", constant(0.5)),
        write(tmp_path / "valid" / "a" / "rest.wav", constant(0)),
    )
    options = {"root": tmp_path, "target_file": "voice.wav"}
    for dataset, more in (("trackfolder_fix", {"interferer_files": ["rest.wav"]}), ("trackfolder_var", {})):
        source, valid = load(dataset, **options, **more, source_augmentations=["remix"])
        drawn = []
        for epoch in (1, 2):
            pairs = np.array([[audio.ravel()[0] * 512 for audio in source.item(epoch, k)] for k in range(12)])
            voices, rests = pairs[:, 1], (pairs[:, 0] - pairs[:, 1]) / 16
            for numbers in (voices, rests):
                np.testing.assert_allclose(np.sort(numbers), np.arange(12))
            assert (voices == rests).sum() < 6
            drawn.append(tuple(rests))
        assert drawn[0] != drawn[1] and len(list(valid.items())) == 1
    with pytest.raises(UsageError, match="unknown augmentation 'remix'"):
        load("aligned", root=tmp_path, input_file="rest.wav", output_file="voice.wav", source_augmentations=["remix"])


# ------------------------------------------------------------------------- what is left out, what cannot be


def test_songs_that_lack_a_file_or_are_short_are_left_out_and_named(layouts, tmp_path):
    root = tmp_path / "songs"
    shutil.copytree(layouts["trackfolder_fix"], root)
    (root / "train" / "Noise - First" / "drums.wav").unlink()
    write(root / "train" / "Noise - Third" / "other.wav", np.zeros((100, 2)))
    source, _ = load("trackfolder_fix", root=root, **LAYOUTS["trackfolder_fix"])
    assert source.names == ["Noise - Second"]
    first, second = source.notes
    assert "drums.wav" in first and "Noise - First" in first and "Noise - Third" in second
    for note in source.notes:
        assert "\n" not in note


def spoil(path, content):
    path.write_bytes(content)


def nan(path):
    samples = np.zeros((20000, 2))
    samples[15000] = np.nan
    write(path, samples, subtype="FLOAT")


SPOILED = {
    "garbage": lambda path: spoil(path, b"not audio"),
    "empty": lambda path: spoil(path, b""),
    "truncated": lambda path: spoil(path, path.read_bytes()[:30]),
    "no samples": lambda path: write(path, np.zeros((0, 2))),
    "not finite": nan,
    "huge": lambda path: write(path, 1e12 * np.ones((20000, 2)), subtype="DOUBLE"),
    "three channels": lambda path: write(path, np.zeros((20000, 3))),
    "another rate": lambda path: write(path, np.zeros((20000, 2)), 22050),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_file_that_cannot_be_used_is_named(any_dataset, tmp_path, how, capsys):
    name, options = any_dataset
    root = tmp_path / "spoiled"
    if name == "manifest":
        text = options["manifest"].read_text().splitlines()
        lines = list(csv.reader(text))
        for line in lines[1:]:
            (root / line[0]).mkdir(parents=True, exist_ok=True)
            shutil.copy(options["manifest"].parent / line[2], root / line[0] / f"{line[1]}.wav")
            line[2] = f"{line[0]}/{line[1]}.wav"
        options = {"manifest": write_manifest(root / "m.csv", lines[1:])}
    else:
        shutil.copytree(options["root"], root)
        options = {**options, "root": root}
    path = next(root.rglob("drums.wav"), None) or next(root.rglob("drums/*.wav"))
    SPOILED[how](path)
    with pytest.raises(UsageError) as error:
        load(name, **options)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message or (name == "musdb" and path.parent.name in message), message


MISTAKES = {  # what the folder of trackfolder_fix becomes, options, and what the line says
    "no root": (None, {"root": "nowhere"}, "nowhere has no folder train/"),
    "root is a file": (lambda root: None, {"root": __file__}, "has no folder train/"),
    "nothing in train": (lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], {}, "no folders"),
    "nothing in valid": (lambda root: [shutil.rmtree(path) for path in (root / "valid").iterdir()], {}, "valid has no"),
    "a name that is nowhere": (None, {"target_file": "voice.wav"}, "voice.wav"),
    "target among interferers": (None, {"interferer_files": ["drums.wav", "vocals.wav"]}, "named twice"),
    "all too short": (None, {"seq_dur": 100.0}, "shorter than 100 s"),
    "excerpts of no length": (None, {"seq_dur": 1e-6}, "less than a sample"),
    "whole songs mixed": (None, {"seq_dur": 0.0, "random_track_mix": True}, "--random-track-mix"),
    "an option of another dataset": (None, {"ext": ".flac"}, "--ext is no option of --dataset trackfolder_fix"),
    "another target": (None, {"target": "bass"}, "--target-file names, vocals"),
    "an option that is missing": (None, {"interferer_files": None}, "needs --interferer-files"),
    "an unknown augmentation": (None, {"source_augmentations": ["reverb"]}, "unknown augmentation 'reverb'"),
    "a folder by the name of a file": (
        lambda root: [[path.unlink(), path.mkdir()] for path in root.rglob("vocals.wav")], {}, "vocals.wav"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(layouts, tmp_path, mistake):
    change, options, message = MISTAKES[mistake]
    root = tmp_path / "songs"
    shutil.copytree(layouts["trackfolder_fix"], root)
    if change:
        change(root)
    with pytest.raises(UsageError) as error:
        load("trackfolder_fix", **{"root": root, **LAYOUTS["trackfolder_fix"], **options})
    assert message in str(error.value) and "\n" not in str(error.value)


MANIFESTS = {
    "empty": ("", "no column 'song'"),
    "no songs": ("song,stem,path\n", "lists no songs"),
    "no column": ("song,path\na,a.wav\n", "no column 'stem'"),
    "an unknown column": ("song,stem,path,length\n", "a column 'length'"),
    "a column twice": ("song,stem,path,path\n", "a column 'path'"),
    "a value too many": ("song,stem,path\na,b,a.wav,c\n", "line 2: 4 values for 3 columns"),
    "no name": ("song,stem,path\n,b,a.wav\n", "line 2: no song"),
    "no file": ("song,stem,path\na,b,nowhere.wav\n", "line 2: there is no file"),
    "a folder": ("song,stem,path\na,b,.\n", "line 2: there is no file"),
    "an unknown split": ("song,stem,path,split\na,b,a.wav,dev\n", "line 2: the split 'dev'"),
    "two splits": ("song,stem,path,split\na,b,a.wav,train\na,c,b.wav,valid\n", "line 3: 'a' is in train and in valid"),
    "a start that is no number": ("song,stem,path,start\na,b,a.wav,x\n", "line 2: 'x' is no number"),
    "a start below zero": ("song,stem,path,start\na,b,a.wav,-1\n", "line 2: '-1' is no number"),
    "a start behind the end": ("song,stem,path,start\na,b,a.wav,9\nb,b,b.wav,\n", "line 2: "),
    "more than there is": ("song,stem,path,duration\na,b,a.wav,9\nb,b,b.wav,\n", "line 2: "),
    "a duration of nothing": ("song,stem,path,duration\na,b,a.wav,0\n", "line 2: a duration of 0 s"),
    "twice": ("song,stem,path\na,b,a.wav\na,b,a.wav\n", "line 3: "),
    "only a mixture": ("song,stem,path\na,mixture,a.wav\nb,b,b.wav\n", "no stem but its mixture"),
    "nothing validates": ("song,stem,path,split\na,b,a.wav,train\n", "no song of"),
    "one song": ("song,stem,path\na,b,a.wav\n", "no songs for valid"),
    "a quote that stays open": ('song,stem,path\n"a,b,a.wav\n', "m.csv, line"),
    "not a text": (b"\xff\xfe\x00", "not a text"),
}


@pytest.mark.parametrize("mistake", MANIFESTS)
def test_manifests_that_cannot_be(tmp_path, mistake):
    content, message = MANIFESTS[mistake]
    write(tmp_path / "a.wav", constant(0.1)), write(tmp_path / "b.wav", constant(0.2))
    path = tmp_path / "m.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as error:
        load("manifest", manifest=path, target="b")
    assert message in str(error.value) and "\n" not in str(error.value) and "m.csv" in str(error.value)


def test_a_mixture_among_its_sources_is_noticed(layouts, tmp_path):
    root = tmp_path / "songs"
    shutil.copytree(layouts["trackfolder_var"], root)
    shutil.copy(root / "train" / "Noise - Third" / "bass.wav", root / "train" / "Noise - Third" / "mixture.wav")
    with pytest.raises(UsageError, match="Noise - Third/mixture.wav would be added"):
        load("trackfolder_var", root=root, target_file="vocals.wav")


def test_a_pattern_that_stands_for_several_files(layouts):
    with pytest.raises(UsageError, match=r"\*s.wav stands for several files"):
        load("aligned", root=layouts["aligned"], input_file="mix*.wav", output_file="*s.wav")
    source, _ = load("aligned", root=layouts["aligned"], input_file="mix*.wav", output_file="voc*.wav")
    assert len(source) == 3


def test_folders_without_a_validation_set_share_their_songs(layouts, tmp_path):
    for name in LAYOUTS:
        root = tmp_path / name
        shutil.copytree(layouts[name] / "train", root / "train")
        source, valid = load(name, root=root, **LAYOUTS[name])
        if name != "sourcefolder":
            assert len(source) == 2 - (name == "trackfolder_var" and "Noise - Second" not in valid.names) and len(valid)
            assert not set(source.names) & set(valid.names)


def test_the_validation_set_of_source_folders_is_the_reference_s(layouts):
    """Whatever the seed; and it leaves the random numbers of Python alone."""
    random.seed(3)
    expected = random.random()
    random.seed(3)
    sets = [
        list(load("sourcefolder", root=layouts["sourcefolder"], **LAYOUTS["sourcefolder"], seed=seed)[1].items())
        for seed in (1, 2)
    ]
    assert random.random() == expected
    np.testing.assert_array_equal(sets[0][0][0], sets[1][0][0])


def test_excerpts_of_aligned_files_are_of_one_place(tmp_path):
    ramp = np.arange(20000)[:, None] / 32768
    for split in ("train", "valid"):
        write(tmp_path / split / "a" / "in.wav", ramp), write(tmp_path / split / "a" / "out.wav", ramp)
    source, valid = load("aligned", root=tmp_path, input_file="in.wav", output_file="out.wav", nb_channels=1)
    starts = set()
    for epoch in range(20):
        x, y = source.item(epoch, 0)
        np.testing.assert_array_equal(x, y[0])
        starts.add(x[0, 0])
    assert len(starts) == 20
    ((x, _),) = valid.items()
    np.testing.assert_allclose(x[0] * 32768, np.arange(round(0.1 * RATE)))


def test_recordings_that_change_are_not_read(tmp_path):
    recording = open_recording(write(tmp_path / "a.wav", constant(0.1)))
    os.utime(tmp_path / "a.wav", (0, 0))
    with pytest.raises(OSError, match="has changed"):
        recording.samples(0, 10)


# ------------------------------------------------------------------------------------------- the commands


def look(capsys, *options, status=0):
    """What data.py says: lines of its output, and of its errors."""
    arguments = ["--quiet", "--seq-dur", "0.1", "--batch-size", "4", "--nb-workers", "1", *map(str, options)]
    if status:
        with pytest.raises(SystemExit) as stop:
            data.main(arguments)
        assert stop.value.code == status
    else:
        data.main(arguments)
    return [text.splitlines() for text in capsys.readouterr()]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of songs with two stems and their sum, as `manifest` options; looking at the speed takes no time."""
    rng = np.random.default_rng(0)
    for song, split in (("a", "train"), ("b", "train"), ("c", "valid"), ("d", "test")):
        voice, rest = rng.integers(-9000, 9000, (2, 9000, 2)).astype(np.int16)
        for name, samples in (("vocals", voice), ("rest", rest), ("mixture", voice + rest)):
            write(tmp_path / split / song / f"{name}.wav", samples)
    speeds = data.inspection.speeds
    monkeypatch.setattr(data.inspection, "speeds", lambda *options: speeds(*options, seconds=0.01))
    return tmp_path


def as_manifest(folder):
    manifest.main(folder, folder / "songs.csv")
    return "--dataset", "manifest", "--manifest", folder / "songs.csv"


def test_a_look_at_a_dataset_with_nothing_wrong(own, capsys):
    out, err = look(capsys, *as_manifest(own), "--page", own / "page.png")
    assert err == []
    assert out[1].startswith("train: 2 tracks, 0.00 h, 44100 Hz, 2 channel(s)") and out[2].startswith("valid: 1 tracks")
    assert out[3].startswith("1 worker(s): ") and "page.png" in out[4] and len(out) == 5
    assert (own / "page.png").read_bytes().startswith(b"\x89PNG")


def test_a_look_tells_silence_clipping_and_sums_that_differ(own, capsys):
    write(own / "train" / "a" / "vocals.wav", np.zeros((9000, 2)))
    write(own / "train" / "b" / "rest.wav", np.clip(4 * soundfile.read(own / "train" / "b" / "rest.wav")[0], -1, 1))
    out, err = look(capsys, *as_manifest(own))
    assert err == []
    text = "\n".join(out)
    assert "train: silent: " in text and "train/a/vocals.wav" in text
    assert "train: clipped: " in text and "train/b/rest.wav (" in text
    assert "mixtures that are not the sum of their sources: train/a (-3 dB), train/b (" in text


def test_a_look_is_at_the_samples_that_train(own, capsys):
    """Those in the cache, where files are resampled or decoded; but it names the files that there were."""
    for path in own.rglob("*.wav"):
        write(path, soundfile.read(path)[0], 48000)
    write(own / "train" / "a" / "vocals.wav", np.zeros((9000, 2)), 48000)
    loud = np.sign(np.sin(np.arange(9000) / 40))[:, None] * [0.99, 0.99]  # clips when it is resampled, and not before
    write(own / "train" / "b" / "rest.wav", loud, 48000)
    shutil.copy(own / "train" / "b" / "vocals.wav", own / "test" / "d" / "vocals.wav")
    options = *as_manifest(own), "--sample-rate", RATE, "--cache", own / "kept"
    out, (line,) = look(capsys, *options, status=2)
    assert f"train: silent: {own}/train/a/vocals.wav" in out
    assert any(line.startswith(f"train: clipped: {own}/train/b/rest.wav (") for line in out)
    assert line == f"data.py: {own}/test/d/vocals.wav of test has the samples of {own}/train/b/vocals.wav of train"
    for path in (own / "kept").rglob("audio.wav"):
        write(path, np.full((8269, 2), np.nan), subtype="FLOAT")
    again, _ = look(capsys, *options, status=2)
    assert again[:-1] == out[1:-1], "what is damaged is made again"


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_song_that_trains_and_is_to_judge_is_wrong(own, capsys, split):
    shutil.copy(own / "train" / "b" / "rest.wav", next((own / split).iterdir()) / "rest.wav")
    _, (line,) = look(capsys, *as_manifest(own), status=2)
    copy = next((own / split).iterdir()) / "rest.wav"
    assert line == f"data.py: {copy} of {split} has the samples of {own}/train/b/rest.wav of train"


def test_a_look_names_all_files_that_cannot_be_read(own, capsys):
    for name in ("vocals", "rest"):
        (own / "train" / "a" / f"{name}.wav").write_bytes(b"not audio")
    (own / "valid" / "c" / "rest.wav").write_bytes(b"not audio")
    _, err = look(capsys, *as_manifest(own), status=2)
    assert len(err) == 3 and all("cannot read" in line for line in err)


TRAINING = Path(train.__file__).parent / "docs" / "training.md"


def commands():
    """Those of docs/training.md that say with what to train, in their order."""
    text = TRAINING.read_text().partition("## Own recordings")[2]
    blocks = re.findall("```sh\n(.*?)```", text, re.DOTALL)
    return [block.replace("\\\n", " ").strip() for block in blocks]


SMALL = "--seq-dur 0.1 --nfft 256 --nhop 128 --hidden-size 2 --samples-per-track 2"


@pytest.mark.parametrize("number", range(6))
def test_commands_of_the_documentation(songs, layouts, tmp_path, monkeypatch, number):
    """As they are written, but with a small network."""
    monkeypatch.chdir(tmp_path)
    Path("songs").symlink_to(songs)
    for name, dataset in (("pairs", "aligned"), ("sounds", "sourcefolder")):
        Path(name).symlink_to(layouts[dataset])
    Path("tracks").symlink_to(layouts["trackfolder_fix" if number < 5 else "trackfolder_var"])
    small = "--context cpu --quiet --epochs 1 " + SMALL
    for line in commands()[number].splitlines():
        script, *options = shlex.split(line)[1:]
        if script == "train.py":
            options += shlex.split(small if number < 2 else small.rpartition(" --samples")[0])
            options += ["--nb-train-samples", "4", "--nb-valid-samples", "2"] if "sourcefolder" in options else []
            train.main(options)
        else:
            assert script == "examples/manifest.py"
            manifest.main(*options)
    assert len(commands()) == 6 and Path("open-unmix/vocals.h5").is_file()


# ------------------------------------------------------------------------------------------- real music

REAL = next(Path(stempeg.__file__).parent.glob("data/*.stem.mp4"))  # a song of MUSDB18's kind, of six seconds


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with that song under its own name, one that validates, and one to test; and its streams, by stempeg."""
    folder = tmp_path_factory.mktemp("real")
    for name in (f"train/{REAL.name}", "train/Actions - One Minute Smile.stem.mp4", "test/Another.stem.mp4"):
        (folder / "songs" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REAL, folder / "songs" / name)
    return folder, stempeg.read_stems(str(REAL), ffmpeg_format="s16le")[0]


def decibels(error, signal):
    return 10 * np.log10((error**2).sum() / (signal**2).sum())


def test_real_music_as_stems(real, capsys, monkeypatch):
    """Encoded stems do not add up to their encoded mixture: data.py says how far."""
    folder, streams = real
    mixture, vocals = streams[0], streams[4]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(data.inspection, "speeds", lambda *options: ())
    expected = decibels(mixture - streams[1:].sum(axis=0), mixture)
    assert -20 < expected < -10
    out, err = look(capsys, "--root", "songs", "--seq-dur", "3", "--cache", "kept", status=2)
    for line, name in zip(out[2:], (REAL.name.removesuffix(".stem.mp4"), "Actions - One Minute Smile")):
        assert line.endswith(f": mixtures that are not the sum of their sources: {name} ({expected:.0f} dB)")
    assert len(out) == 4 and len(err) == 7 and all(" of valid has the samples of " in line for line in err[:5])
    assert err[6] == f"data.py: songs/test/Another.stem.mp4 is a copy of songs/train/{REAL.name}"

    times = {path: path.stat().st_mtime_ns for path in Path("kept").rglob("*.wav")}
    source, valid = load("musdb", root="songs", cache="kept", seq_dur=3.0, target="vocals", source_augmentations=[])
    assert len(times) == 10 and times == {path: path.stat().st_mtime_ns for path in Path("kept").rglob("*.wav")}
    ((x, (y,)),) = valid.items()
    np.testing.assert_array_equal(x.T, mixture)
    np.testing.assert_array_equal(y.T, vocals)
    x, (y,) = source.item(1, 0)
    starts = np.lib.stride_tricks.sliding_window_view(vocals[:, 0], y.shape[1])[:, ::1000]
    (start,) = np.flatnonzero((starts == y[0, ::1000]).all(axis=1))
    np.testing.assert_array_equal(y.T, vocals[start : start + y.shape[1]])
    assert not np.array_equal(x, y)


def test_real_music_trains_a_model_that_separates(real, monkeypatch):
    """Six seconds are learnt by heart: the estimate is closer to the vocals than the mixture is, and the rest is it."""
    folder, streams = real
    mixture, vocals = streams[0], streams[4]
    monkeypatch.chdir(folder)
    options = "--context cpu --quiet --target vocals --nfft 1024 --nhop 512 --hidden-size 32 --seq-dur 2 --batch-size 4"
    options += " --samples-per-track 16 --epochs 6 --lr 0.01 --root songs --cache kept --output model"
    train.main(options.split())
    losses = json.loads(Path("model/vocals.json").read_text())["valid_loss_history"]
    assert losses[-1] < 0.5 * losses[0]
    options = "--model model --outdir stems --residual rest --quiet --context cpu"
    separate.main([f"songs/train/{REAL.name}", *options.split()])
    stems = {path.stem: soundfile.read(path)[0] for path in Path("stems").rglob("*.wav")}
    assert stems.keys() == {"vocals", "rest"} and stems["vocals"].shape == mixture.shape
    assert decibels(stems["vocals"] + stems["rest"] - mixture, mixture) < -40
    assert decibels(stems["vocals"] - vocals, vocals) < decibels(mixture - vocals, vocals) - 3
