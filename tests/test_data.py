"""The data source: what it draws, and what it says when the folder is not what it was told."""

import dataclasses
import itertools
import os
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pooch
import pytest
import soundfile
import stempeg
from formulas import float64_magnitudes
from trainings import as_numpy

import data
import randomness
import utils
from datasets import musdb18
from datasets.mixing import Item, Part
from datasets.recordings import open_recording
from utils import UsageError

RATE = 44100


def source(root, **options):
    defaults = {"target": "bass", "root": root, "is_wav": True, "seq_dur": 1.0, "samples_per_track": 4, "seed": 3}
    return data.MusdbSource(**{**defaults, **options})


def find(excerpt, track, name):
    """Start of an excerpt, up to its gain, in a source of a track, or None: by normalised correlation."""
    stem = track.read(track.sources[name])[0].astype(np.float64)
    probe = excerpt[0].astype(np.float64)
    size = len(stem) + len(probe)
    correlation = np.fft.irfft(np.fft.rfft(stem, size) * np.conj(np.fft.rfft(probe, size)), size)
    start = int(np.argmax(correlation[: len(stem) - len(probe) + 1]))
    piece = stem[start : start + len(probe)]
    similarity = piece @ probe / np.sqrt(piece @ piece * (probe @ probe) + 1e-20)
    return start if similarity > 0.999999 else None


def test_excerpts_come_from_the_stems(songs):
    train = source(songs)
    seen = set()
    for index in range(12):
        mixture, target = train.item(epoch=1, index=index)
        assert mixture.shape == target.shape == (2, RATE)
        assert mixture.dtype == target.dtype == np.float32
        places = [(track.name, find(target, track, "bass")) for track in train.tracks]
        places = [place for place in places if place[1] is not None]
        assert len(places) == 1, "the target is an excerpt of exactly one bass stem"
        seen.update(places)
    assert len({name for name, _ in seen}) == 3, "tracks are drawn with replacement from all"
    assert len(seen) > 8, "starts vary"


def test_mixture_is_the_sum_of_four_draws(songs):
    """One seed, all four targets: their sum is the mixture, although tracks and starts differ."""
    targets = ("vocals", "drums", "bass", "other")
    items = {
        target: source(songs, target=target, augmentations=("gain", "channelswap")).item(2, 5) for target in targets
    }
    total = sum(items[target][1].astype(np.float64) for target in targets)
    for target in targets:
        np.testing.assert_allclose(items[target][0], total, atol=1e-6)
    accompaniment = source(songs, target="accompaniment", augmentations=("gain", "channelswap")).item(2, 5)[1]
    np.testing.assert_allclose(accompaniment, total - items["vocals"][1], atol=1e-6)
    linear = source(songs, target="linear_mixture", augmentations=("gain", "channelswap")).item(2, 5)
    np.testing.assert_allclose(linear[1], total, atol=1e-6)


def test_draws_depend_on_seed_epoch_and_index_only(songs):
    base = source(songs).item(1, 0)[0]
    np.testing.assert_array_equal(base, source(songs).item(1, 0)[0])
    for other in (source(songs).item(1, 1), source(songs).item(2, 0), source(songs, seed=4).item(1, 0)):
        assert np.abs(base - other[0]).max() > 1e-3


@pytest.fixture
def invert(monkeypatch):
    """One more augmentation, which draws more numbers than any other."""

    def invert(audio, rng):
        return audio if rng.random(7)[-1] < 0.5 else -audio

    monkeypatch.setitem(data.AUGMENTATIONS, "invert", invert)


def test_augmentations_change_nothing_but_their_own_effect(songs, invert):
    """What is drawn for each source, and by each augmentation, stays when another one comes, goes or changes places."""
    names = ["gain", "channelswap", "invert"]
    train = source(songs)
    for index in range(4):
        excerpts = {}
        for train.augmentations in (some for n in range(4) for some in itertools.permutations(names, n)):
            excerpts[train.augmentations] = train.item(1, index)[1]
        plain = excerpts[()]
        factor = np.abs(excerpts["gain",]).max() / np.abs(plain).max()
        sign = 1 if np.array_equal(excerpts["invert",], plain) else -1
        swapped = np.array_equal(excerpts["channelswap",], plain[::-1])
        for some, excerpt in excerpts.items():
            expected = plain[::-1] if swapped and "channelswap" in some else plain
            expected = expected * (factor if "gain" in some else 1) * (sign if "invert" in some else 1)
            np.testing.assert_allclose(excerpt, expected, atol=1e-6, err_msg=str(some))


def test_streams_of_random_numbers_do_not_meet():
    """Each purpose and key has a stream of its own; also where numbers could be padded, or run together."""
    numbers = (0, 1, 2, 10, 12, 120, 2**32, 2**64)
    values = {"seed": numbers, "epoch": numbers, "step": numbers, "index": numbers[:5], "source": ("bass", "drums")}
    values["rank"] = numbers[1:4]
    values.update(name=tuple(data.AUGMENTATIONS), song=("", "1", "10"))
    streams = []
    for purpose, names in randomness.STREAMS.items():
        keys = itertools.product(*(values[name] for name in names))
        streams += [(purpose, dict(zip(names, key))) for key in keys]
    draws = {randomness.random_stream(purpose, **key).integers(2**63) for purpose, key in streams}
    assert len(draws) == len(streams)
    first, again = (randomness.random_stream("order", seed=1, epoch=np.int64(2)).random(9) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    with pytest.raises(KeyError):
        randomness.random_stream("order", seed=1)
    with pytest.raises(TypeError, match="do not depend on index"):
        randomness.random_stream("order", seed=1, epoch=2, index=3)


def test_several_targets_are_stacked(songs):
    names = ["drums", "accompaniment", "bass"]
    for options in ({}, {"seq_dur": None}):
        several = source(songs, target=names, augmentations=["gain"], **options)
        mixture, targets = several.item(1, 2)
        assert targets.shape == (3, 2, mixture.shape[1]) and targets.dtype == np.float32
        for name, target in zip(names, targets):
            expected = source(songs, target=name, augmentations=["gain"], **options).item(1, 2)
            np.testing.assert_array_equal(mixture, expected[0])
            np.testing.assert_array_equal(target, expected[1])
    batches = as_numpy(data.DataIterator(source(songs, target=names), 5).epoch(1))
    assert [y.shape for _, y in batches] == [(5, 3, 2, RATE), (5, 3, 2, RATE), (2, 3, 2, RATE)]


def test_names_that_cannot_be_right(songs):
    with pytest.raises(UsageError, match="the target 'bass' is named 2 times"):
        source(songs, target=["bass", "drums", "bass"])
    with pytest.raises(UsageError, match="unknown target 'guitar'"):
        source(songs, target=["bass", "guitar"])
    with pytest.raises(UsageError, match="no target is named"):
        source(songs, target=[])
    with pytest.raises(UsageError, match="unknown augmentation 'reverb': there are gain, channelswap, "):
        source(songs, augmentations=["gain", "reverb"])
    with pytest.raises(UsageError, match="the augmentation 'gain' is named 2 times"):
        source(songs, augmentations=["gain", "gain"])


@pytest.mark.parametrize("nb_workers", [1, 3])
def test_workers_do_not_change_the_batches(songs, nb_workers):
    train = source(songs)
    expected = as_numpy(data.DataIterator(train, 5).epoch(1))
    batches = as_numpy(data.DataIterator(train, 5, nb_workers).epoch(1))
    assert [len(x) for x, _ in batches] == [5, 5, 2], "the last batch holds what is left"
    for (x, y), (x0, y0) in zip(batches, expected):
        np.testing.assert_array_equal(x, x0)
        np.testing.assert_array_equal(y, y0)


def test_an_error_in_a_worker_reaches_the_caller(songs, tmp_path):
    shutil.copytree(songs, tmp_path / "songs")
    train = source(tmp_path / "songs")
    shutil.rmtree(tmp_path / "songs")
    with pytest.raises(OSError) as error:
        list(data.DataIterator(train, 4, 2).epoch(1))
    assert Path(error.value.filename) in {one.path for track in train.tracks for one in track.recordings}


class Slow:
    """A hundred items that take their time; the one that `fails` cannot be read."""

    seed = 0

    def __init__(self, fails=None):
        self.fails, self.prepared = fails, []

    def __len__(self):
        return 100

    nb_timesteps = nb_channels = nb_targets = 1

    def fill(self, epoch, index, mixture, targets):
        time.sleep(0.002)
        self.prepared.append(index)
        if index == self.fails:
            raise OSError(f"item {index}")


def test_workers_end_with_an_interruption():
    """Rather than prepare what nobody will ask for."""
    slow = Slow()
    batches = data.DataIterator(slow, batch_size=10, nb_workers=1).epoch(1)
    next(batches)
    batches.close()
    seen = len(slow.prepared)
    time.sleep(0.1)
    assert len(slow.prepared) == seen < 30


@pytest.mark.parametrize("nb_workers", [0, 2])
@pytest.mark.parametrize("place", [0, 50, 99])
def test_an_error_anywhere_in_an_epoch_ends_it(nb_workers, place):
    """After the batches before it."""
    slow = Slow()
    list(data.DataIterator(slow, batch_size=100).epoch(1))  # their order
    batches = data.DataIterator(Slow(slow.prepared[place]), batch_size=1, nb_workers=nb_workers).epoch(1)
    for _ in range(place):
        next(batches)
    with pytest.raises(OSError, match=f"item {slow.prepared[place]}"):
        next(batches)


def test_gain_is_uniform_and_swap_happens_half_of_the_time():
    rng = np.random.default_rng(0)
    ones = np.ones((2, 1), np.float32)
    gains = np.array([data.AUGMENTATIONS["gain"](ones, rng)[0, 0] for _ in range(4000)])
    assert 0.25 <= gains.min() < 0.26 and 1.24 < gains.max() < 1.25
    assert abs(gains.mean() - 0.75) < 0.02
    stereo = np.array([[1.0], [2.0]], np.float32)
    swapped = [data.AUGMENTATIONS["channelswap"](stereo, rng)[0, 0] == 2 for _ in range(4000)]
    assert abs(np.mean(swapped) - 0.5) < 0.03
    mono = ones[:1]
    assert data.AUGMENTATIONS["channelswap"](mono, rng) is mono


def test_validation_gives_whole_tracks_with_their_official_mixture(songs):
    valid = source(songs, split="valid", seq_dur=None, target="accompaniment", samples_per_track=1)
    assert [track.name for track in valid.tracks] == ["Actions - One Minute Smile"]
    folder = songs / "train" / valid.tracks[0].name
    mixture, target = valid.item(0, 0)
    np.testing.assert_array_equal(mixture.T, soundfile.read(folder / "mixture.wav", dtype="float32")[0])
    parts = sum(soundfile.read(folder / f"{name}.wav")[0] for name in ("bass", "drums", "other"))
    np.testing.assert_allclose(target.T, parts, atol=1e-6)


def test_statistics_equal_a_plain_formula_over_all_frames(songs):
    train = source(songs)
    mean, std = data.statistics(train.mixtures(), 512, 128)
    songs = [float64_magnitudes(soundfile.read(track.mixture[0].path)[0].T, 512, 128) for track in train.tracks]
    frames = np.concatenate(songs).mean(axis=1)
    np.testing.assert_allclose(mean, np.mean(frames, axis=0), rtol=1e-5)
    np.testing.assert_allclose(std, np.maximum(np.std(frames, axis=0), 1e-4 * np.std(frames, axis=0).max()), rtol=1e-5)


def test_statistics_of_bins_that_never_change(tmp_path):
    """Silence has deviation 0 in every bin; like scikit-learn's scaler we divide by 1 then."""
    soundfile.write(tmp_path / "silence.wav", np.zeros((4000, 2)), RATE)
    silence = Item([Part((open_recording(tmp_path / "silence.wav"),), True, ())], 4000)
    mean, std = data.statistics([silence], 512, 128)
    np.testing.assert_array_equal(mean, 0)
    np.testing.assert_array_equal(std, 1)


@pytest.fixture(scope="module")
def stems(songs, tmp_path_factory):
    """The songs as .stem.mp4, in musdb's order of streams."""
    root = tmp_path_factory.mktemp("stems")
    for folder in sorted((songs / "train").iterdir()):
        audio = np.stack(
            [soundfile.read(folder / f"{name}.wav")[0] for name in ("mixture", "drums", "bass", "other", "vocals")]
        )
        (root / "train").mkdir(exist_ok=True)
        path = root / "train" / f"{folder.name}.stem.mp4"
        stempeg.write_stems(str(path), audio, sample_rate=RATE, writer=stempeg.StreamsWriter())
    return root


def test_stems_are_decoded_once_and_equal_musdb(stems, tmp_path, monkeypatch):
    import musdb

    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    train = source(stems, is_wav=False)
    theirs = musdb.DB(root=str(stems), subsets="train", split="train").tracks
    assert [track.name for track in train.tracks] == [track.name for track in theirs]
    track = train.tracks[0]
    for name in ("bass", "vocals"):
        np.testing.assert_array_equal(track.read(track.sources[name]).T, theirs[0].sources[name].audio)
    np.testing.assert_array_equal(mixture_of(track).T, theirs[0].audio)
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.wav"))]
    source(stems, is_wav=False)
    assert times == [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.wav"))]


@pytest.fixture
def one_stem(stems, tmp_path, monkeypatch):
    """A file of stems, and an empty folder where decoded ones are kept."""
    kept = tmp_path / "kept"
    monkeypatch.setattr(pooch, "os_cache", lambda name: kept)
    path = tmp_path / "songs" / "train" / "Song.stem.mp4"
    path.parent.mkdir(parents=True)
    shutil.copy(sorted((stems / "train").iterdir())[0], path)
    return path, kept / "stems"


def decoded(path):
    (track,) = source(path.parents[1], is_wav=False).tracks
    return track


def mixture_of(track):
    return track.read(track.mixture)


def test_stems_that_have_changed_are_decoded_again(stems, one_stem):
    path, kept = one_stem
    before = mixture_of(decoded(path))
    shutil.copy(sorted((stems / "train").iterdir())[1], path)
    after = mixture_of(decoded(path))
    assert not np.array_equal(before, after)
    assert len(list(kept.iterdir())) == 2
    os.utime(path, (0, 0))  # a change may keep the size
    np.testing.assert_array_equal(mixture_of(decoded(path)), after)
    assert len(list(kept.iterdir())) == 3


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_stems_are_decoded_wholly_or_not_at_all(one_stem, monkeypatch, interruption):
    path, kept = one_stem
    written, count = musdb18.write, itertools.count(1)

    def interrupted(*args, **options):
        written(*args, **options)
        if next(count) == 3:
            raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(musdb18, "write", interrupted)
        with pytest.raises(interruption):
            decoded(path)
    assert not list(kept.rglob("*.wav")), "nothing is left, and nothing could be taken for whole"
    track = decoded(path)
    assert {path.stem for path in track.mixture[0].path.parent.iterdir()} == {"entry", "mixture", *track.sources}


def test_stems_that_two_processes_decode_at_once(one_stem, monkeypatch):
    """Each in a folder of its own; the first gives it its name, the second takes that."""
    path, kept = one_stem
    written, count, other = musdb18.write, itertools.count(1), []

    def interrupted(*args, **options):
        if next(count) == 3:
            other.append(decoded(path))
        written(*args, **options)

    monkeypatch.setattr(musdb18, "write", interrupted)
    assert [decoded(path)] == other
    assert [other[0].mixture[0].path.parent] == list(kept.iterdir())


def test_wav_and_stem_folders_are_told_apart(songs, stems):
    with pytest.raises(UsageError, match="add --is-wav"):
        source(songs, is_wav=False)
    with pytest.raises(UsageError, match="leave out --is-wav"):
        source(stems, is_wav=True)


def spoil_missing_stem(track):
    (track / "drums.wav").unlink()


def spoil_missing_mixture(track):
    (track / "mixture.wav").unlink()


def spoil_length(track):
    soundfile.write(track / "drums.wav", np.zeros((RATE, 2)), RATE)


def spoil_rate(track):
    for path in track.glob("*.wav"):
        soundfile.write(path, np.zeros((4 * RATE, 2)), 22050)


def spoil_content(track):
    (track / "bass.wav").write_bytes(b"not audio")


def spoil_mixture(track):
    (track / "mixture.wav").write_bytes(b"not audio")


def spoil_length_of_the_file(track):
    os.truncate(track / "mixture.wav", 2**36)  # ffprobe would read it to its end


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_length_of_the_file, "is longer than it says: 68719476736 bytes"),
        (spoil_missing_stem, "no drums.wav"),
        (spoil_missing_mixture, "no mixture.wav"),
        (spoil_length, "differ in length"),
        (spoil_rate, "differ in"),
        (spoil_content, "cannot read"),
        (spoil_mixture, "is not a WAV file"),
    ],
)
def test_damaged_tracks_are_named(songs, tmp_path, spoil, message):
    shutil.copytree(songs, tmp_path / "songs")
    spoil(sorted((tmp_path / "songs" / "train").iterdir())[1])
    with pytest.raises(UsageError, match=message) as error:
        source(tmp_path / "songs")
    assert "\n" not in str(error.value)


def test_files_that_differ_by_a_few_samples_are_cut_alike(songs, tmp_path):
    shutil.copytree(songs, tmp_path / "songs")
    track = tmp_path / "songs" / "train" / "Actions - One Minute Smile"
    drums, _ = soundfile.read(track / "drums.wav")
    soundfile.write(track / "drums.wav", drums[:-100], RATE)
    mixture, target = source(tmp_path / "songs", split="valid", seq_dur=None, target="accompaniment").item(0, 0)
    assert mixture.shape == target.shape == (2, len(drums) - 100)


def test_folders_without_tracks(songs, tmp_path):
    with pytest.raises(UsageError, match="no folder train"):
        source(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(UsageError, match="no tracks of the split 'train'"):
        source(tmp_path)
    with pytest.raises(UsageError, match="validation songs are named like"):
        source(tmp_path, split="valid")
    with pytest.raises(UsageError, match="unknown target 'guitar'.*accompaniment"):
        source(songs, target="guitar")
    with pytest.raises(UsageError, match="too short for --seq-dur 5"):
        source(songs, seq_dur=5.0)


def test_the_download_needs_a_network(monkeypatch):
    import musdb

    def refuse(self, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(musdb.DB, "download", refuse)
    with pytest.raises(UsageError, match="give --root"):
        source(None, is_wav=False)


def test_the_command_checks_a_dataset(songs, tmp_path, capsys):
    data.main(["--root", str(songs), "--is-wav", "--seq-dur", "1", "--quiet"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: 3 tracks") and lines[1].startswith("valid: 1 tracks")
    shutil.copytree(songs, tmp_path / "songs")
    track = next((tmp_path / "songs" / "train").iterdir())
    broken = np.zeros((4 * RATE, 2))
    broken[5] = np.nan
    soundfile.write(track / "vocals.wav", broken, RATE, subtype="FLOAT")
    with pytest.raises(SystemExit) as stop:
        data.main(["--root", str(tmp_path / "songs"), "--is-wav", "--quiet"])
    assert stop.value.code == 2
    assert "not finite" in capsys.readouterr().err


# ------------------------------------------------------------------- looked at, and read as they were then


def write(path, audio, subtype="FLOAT", rate=RATE):
    soundfile.write(path, audio, rate, subtype=subtype, format="WAV")


def noise(seconds=1.0):
    return (0.1 * np.random.default_rng(0).standard_normal((int(seconds * RATE), 2))).astype(np.float32)


def small(root, **others):
    """A folder with a song each of both splits, of floats; `others`: what is another file of the one to train on."""
    for song in ("Song", "Actions - One Minute Smile"):
        folder = root / "train" / song
        folder.mkdir(parents=True)
        for name in ("mixture", "vocals", "drums", "bass", "other"):
            write(folder / f"{name}.wav", others.get(name, noise()) if song == "Song" else noise())
    return root / "train" / "Song"


def lines_of(capsys, root, status=2):
    with pytest.raises(SystemExit) as stop:
        data.main(["--root", str(root), "--is-wav", "--quiet", "--seq-dur", "0.5"])
    assert stop.value.code == status
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e10])
@pytest.mark.parametrize("name", ["mixture", "vocals", "other"])
@pytest.mark.parametrize("place", [0, 2**18 + 7])
def test_any_stem_with_numbers_that_cannot_be_is_named(tmp_path, name, value, place):
    """Whatever the target: they all make up the mixtures."""
    spoiled = noise(7.0)
    spoiled[place, 1] = value
    folder = small(tmp_path, **{key: noise(7.0) for key in ("mixture", "vocals", "drums", "bass", "other")})
    write(folder / f"{name}.wav", spoiled)
    with pytest.raises(UsageError, match=f"{name}.wav has samples that are not finite, or larger") as error:
        source(tmp_path, seq_dur=0.5)
    assert "\n" not in str(error.value) and "track 'Song'" in str(error.value)


def test_doubles_that_single_precision_cannot_hold(tmp_path):
    folder = small(tmp_path)
    audio = noise().astype(np.float64)
    audio[100] = 1e300
    write(folder / "drums.wav", audio, "DOUBLE")
    with pytest.raises(UsageError, match="drums.wav has samples"):
        source(tmp_path, seq_dur=0.5)


def test_the_command_says_all_that_is_wrong(tmp_path, capsys):
    folder = small(tmp_path, vocals=np.full((RATE, 2), np.nan, np.float32), bass=noise(0.5))
    (folder / "drums.wav").unlink()
    valid = tmp_path / "train" / "Actions - One Minute Smile"
    soundfile.write(valid / "other.wav", noise(), RATE, "PCM_16", format="FLAC")
    size = (valid / "other.wav").stat().st_size
    with open(valid / "other.wav", "r+b") as stream:  # within the data: only who reads it notices
        stream.seek(size // 2)
        stream.write(bytes(size // 8))
    first, second = lines_of(capsys, tmp_path)
    for part in ("'Song'", "vocals.wav has samples", "no drums.wav", "differ in length: 0.50 to 1.00 s"):
        assert part in first
    assert "'Actions - One Minute Smile'" in second and "other.wav" in second


def header(nb_channels=2, rate=RATE, data=b"", size=None):
    bits = 16
    block = (nb_channels * bits // 8) & 0xFFFF
    form = struct.pack("<HHIIHH", 1, nb_channels, rate, rate * block & 0xFFFFFFFF, block, bits)
    chunks = (
        b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data) if size is None else size)
    )
    return b"RIFF" + struct.pack("<I", len(chunks) + len(data)) + chunks + data


@pytest.mark.parametrize("name", ["mixture", "bass"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF",
        header(),
        header(0, data=bytes(4000)),
        header(65535, data=bytes(2**18)),
        header(rate=0, data=bytes(400)),
    ]
    + [header(data=bytes(400), size=2**31 - 1), header(data=bytes(RATE * 2)), bytes(1000)],
    ids=["empty", "cut", "nothing", "0 channels", "65535 channels", "0 Hz", "2 GB", "half", "zeros"],
)
def test_files_that_are_no_song(tmp_path, capsys, name, content):
    folder = small(tmp_path)
    (folder / f"{name}.wav").write_bytes(content)
    with pytest.raises(UsageError) as error:
        source(tmp_path, seq_dur=0.5)
    assert "Song" in str(error.value) and "\n" not in str(error.value)
    (line,) = lines_of(capsys, tmp_path)
    assert "Song" in line


def replace_by_a_folder(folder):
    (folder / "bass.wav").unlink()
    (folder / "bass.wav").mkdir()


def replace_by_a_pipe(folder):
    (folder / "bass.wav").unlink()
    os.mkfifo(folder / "bass.wav")


def add_an_empty_folder(folder):
    (folder.parent / "Empty").mkdir()


def name_in_latin_1(folder):
    os.rename(folder, os.fsencode(folder.parent) + b"/S\xf6ng")


@pytest.mark.parametrize(
    "spoil, part",
    [
        (replace_by_a_folder, "bass.wav is not a file"),
        (replace_by_a_pipe, "bass.wav is not a file"),
        (add_an_empty_folder, "there is no mixture.wav"),
        (name_in_latin_1, "S\\xf6ng is not in UTF-8"),
    ],
)
def test_folders_that_are_no_song(tmp_path, capsys, spoil, part):
    spoil(small(tmp_path))
    with pytest.raises(UsageError) as error:
        source(tmp_path, seq_dur=0.5)
    assert part in str(error.value) and "\n" not in str(error.value)
    str(error.value).encode()  # any terminal can show it
    assert part in lines_of(capsys, tmp_path)[0]


def vanish(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def replace(path):
    write(path.with_name("new"), noise()[::-1])
    os.replace(path.with_name("new"), path)


def overwrite(path):
    write(path, 2 * noise())


def spoil_in_secret(path):
    """Size and time stay."""
    stat, audio = path.stat(), noise()
    audio[RATE // 2] = np.nan
    write(path, audio)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def truncate_in_secret(path):
    """The size of the file stays: it is that of what it says of itself that does not."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = struct.pack("<I", 8)
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [vanish, truncate, replace, overwrite, spoil_in_secret, truncate_in_secret])
@pytest.mark.parametrize("nb_workers", [0, 2])
def test_a_file_that_changes_during_training_is_named(tmp_path, change, nb_workers):
    folder = small(tmp_path)
    train = source(tmp_path, seq_dur=1.0, samples_per_track=40)
    batches = data.DataIterator(train, 2, nb_workers).epoch(1)
    next(batches)
    change(folder / "drums.wav")
    with pytest.raises(OSError) as error:
        list(batches)
    assert error.value.filename == str(folder / "drums.wav") and "\n" not in utils.describe(error.value)
    with pytest.raises(OSError):
        data.statistics(
            [train.whole(dataclasses.replace(train.tracks[0], mixture=train.tracks[0].sources["drums"]))], 512, 128
        )


def test_integers_are_not_read_twice(songs, monkeypatch):
    """They cannot be anything but numbers within ±1."""
    monkeypatch.setattr(soundfile, "blocks", lambda *args, **options: pytest.fail("read"))
    source(songs)


@pytest.mark.parametrize("damage", [truncate, vanish, lambda path: path.write_bytes(b"RIFF")])
def test_decoded_stems_that_are_damaged_are_decoded_again(one_stem, damage):
    path, kept = one_stem
    before = mixture_of(decoded(path))
    track = decoded(path)
    damage(track.sources["drums"][0].path)
    again = decoded(path)
    np.testing.assert_array_equal(mixture_of(again), before)
    assert len(again.read(again.sources["drums"])) == 2 and len(list(kept.iterdir())) == 1


def test_what_a_killed_process_left_of_decoding_is_deleted(one_stem):
    path, kept = one_stem
    (kept / ".0123abcd.partial").mkdir(parents=True)
    (kept / ".0123abcd.partial" / "mixture.wav").write_bytes(b"RIFF")
    decoded(path)
    assert len(list(kept.iterdir())) == 1


def test_stems_that_are_truncated(one_stem):
    """ffmpeg decodes what is there, and musdb does not ask whether it has failed."""
    path, kept = one_stem
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat") or content.count(b"moov") == 1
    place = content.index(b"mdat")
    middle = place + (len(content) - place) // 3
    path.write_bytes(content[:middle] + bytes(len(content) // 3) + content[middle + len(content) // 3 :])
    with pytest.raises(UsageError, match="Song.stem.mp4") as error:
        decoded(path)
    assert "\n" not in str(error.value) and not list(kept.rglob("*.wav"))


@pytest.mark.parametrize(
    "options",
    [{"seq_dur": value} for value in (0, -1, float("nan"), float("inf"), 1e308, 1e-9, "6", [6], True)]
    + [{"samples_per_track": value} for value in (0, -1, 10**20, 2.5, "4", None, True)]
    + [{"seed": value} for value in (-1, 10**30, 1.5, "3", None)]
    + [{"augmentations": value} for value in ("gain", None, 3, [3], [["gain"]], ["gain", "gain"])]
    + [{"target": value} for value in (None, 3, [], [3], [["bass"]], b"bass")]
    + [{"root": value} for value in (3, "", "no\0where", "~nobody/songs", __file__, [])]
    + [{"split": value} for value in (None, "test", 3)],
    ids=str,
)
def test_arguments_that_cannot_be(songs, options):
    with pytest.raises(ValueError) as error:
        source(**{"root": songs, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 0), (2.5, 0), (10**20, 0), (2, -1), (2, 10**20), (2, None)])
def test_sizes_of_batches_that_cannot_be(songs, arguments):
    with pytest.raises(ValueError, match="whole number"):
        data.DataIterator(source(songs), *arguments)


@pytest.mark.parametrize("sizes", [(0, 1), (512, 0), (-4, 2), (512.5, 2), (10**7, 2)])
def test_sizes_of_statistics_that_cannot_be(songs, sizes):
    with pytest.raises(ValueError):
        data.statistics(source(songs).mixtures(), *sizes)
    with pytest.raises(ValueError, match="no mixtures"):
        data.statistics([], 512, 128)
