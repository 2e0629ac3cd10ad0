"""The synthetic songs: the folder that musdb reads, the exactness of the mixture, and what is heard."""

import hashlib

import numpy as np
import pytest
import soundfile

import music
import synthesize
import utils

SOURCES = ("vocals", "drums", "bass", "other")
RATE = 44100


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("songs") / "root"
    synthesize.synthesize(folder, nb_train=2, nb_valid=2, nb_test=1, duration=3.5, quiet=True)
    return folder


@pytest.fixture(scope="module")
def played():
    """Four songs of 20 s: dicts of name -> audio (nb_channels, nb_timesteps)."""
    return [music.song(np.random.default_rng((7, index)), 20, RATE) for index in range(4)]


@pytest.fixture(scope="module")
def powers(played):
    """Their power spectra: dicts of name -> (nb_bins,), bins of 0.05 Hz."""
    return [{name: np.sum(np.abs(np.fft.rfft(audio)) ** 2, axis=0) for name, audio in song.items()} for song in played]


def digests(root):
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.wav")}


def decibel(ratio):
    return 10 * np.log10(ratio)


# ------------------------------------------------------------------------------------------ files


def test_musdb_finds_songs_sources_and_splits(root):
    import musdb

    sizes = {
        (subset, split): len(musdb.DB(root, is_wav=True, subsets=subset, split=split))
        for subset, split in (("train", None), ("train", "train"), ("train", "valid"), ("test", None))
    }
    assert sizes == {("train", None): 4, ("train", "train"): 2, ("train", "valid"): 2, ("test", None): 1}
    for track in musdb.DB(root, is_wav=True):
        assert set(track.sources) == set(SOURCES), track.name
        assert track.rate == RATE
        assert len(track.artist) and len(track.title), "musdb splits names at the dash"
    assert sorted(path.name for path in root.iterdir()) == ["synthesize.json", "test", "train"]


def test_validation_names_are_those_of_musdb(root):
    import musdb

    assert musdb.DB(root, is_wav=True).setup["validation_tracks"] == list(synthesize.VALIDATION_NAMES)


def test_files_are_stereo_pcm16_and_the_mixture_is_the_exact_sum(root):
    tracks = [folder for subset in ("train", "test") for folder in (root / subset).iterdir()]
    assert len(tracks) == 5
    for track in tracks:
        assert sorted(path.name for path in track.iterdir()) == sorted(f"{name}.wav" for name in ("mixture", *SOURCES))
        audio = {}
        for path in track.iterdir():
            info = soundfile.info(path)
            assert (info.subtype, info.channels, info.samplerate, info.frames) == ("PCM_16", 2, RATE, 3.5 * RATE)
            audio[path.stem] = soundfile.read(path, dtype="int16")[0].astype(int)
        np.testing.assert_array_equal(audio["mixture"], sum(audio[name] for name in SOURCES))
        loudest = max(np.max(np.abs(sound)) for sound in audio.values())
        assert 0.9 * 32767 < loudest < 0.96 * 32767, "loud, and far from clipping"


def test_a_song_depends_on_seed_subset_and_index_only(root, tmp_path):
    synthesize.synthesize(tmp_path / "same", 1, 1, 1, duration=3.5, quiet=True)
    synthesize.synthesize(tmp_path / "other", 1, 1, 1, duration=3.5, seed=43, quiet=True)
    many, few, other = digests(root), digests(tmp_path / "same"), digests(tmp_path / "other")
    assert len(few) == 15 and few.items() <= many.items()
    assert len(set(many.values())) == 25, "all files differ, within a song and between songs"
    assert not set(other.values()) & set(many.values())


def test_names_never_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize, "song", lambda *arguments: {})
    monkeypatch.setattr(synthesize, "write_track", lambda folder, *arguments: folder.mkdir(parents=True))
    folders = synthesize.synthesize(tmp_path, 300, 14, 300, quiet=True)
    assert len(set(folders)) == 614 and all(folder.is_dir() for folder in folders)
    assert sum(folder.name in synthesize.VALIDATION_NAMES for folder in folders) == 14


# ---------------------------------------------------------------------------- interruption, errors


def test_an_interrupted_call_leaves_whole_songs_and_is_taken_up(tmp_path, monkeypatch):
    write, count = synthesize.write, []

    def fail_in_the_second_song(path, *arguments, **options):
        count.append(path)
        if len(count) == 8:
            raise KeyboardInterrupt
        write(path, *arguments, **options)

    monkeypatch.setattr(synthesize, "write", fail_in_the_second_song)
    with pytest.raises(KeyboardInterrupt):
        synthesize.synthesize(tmp_path, 2, 0, 1, duration=2, quiet=True)
    (whole,) = (tmp_path / "train").iterdir()
    assert len(list(whole.iterdir())) == 5
    kept = (whole / "mixture.wav").stat().st_mtime_ns

    monkeypatch.undo()
    folders = synthesize.synthesize(tmp_path, 2, 0, 1, duration=2, quiet=True)
    assert [len(list(folder.iterdir())) for folder in folders] == [5, 5, 5]
    assert (whole / "mixture.wav").stat().st_mtime_ns == kept, "a finished song is not written again"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("change", [{"duration": 3}, {"seed": 1}, {"nb_train": 0}, {"nb_test": 1}])
def test_songs_of_other_settings_are_left_alone(tmp_path, change):
    settings = dict(nb_train=1, nb_valid=0, nb_test=0, duration=2, seed=0, quiet=True)
    synthesize.synthesize(tmp_path, **settings)
    before = digests(tmp_path)
    with pytest.raises(utils.UsageError, match="other settings"):
        synthesize.synthesize(tmp_path, **{**settings, **change})
    assert digests(tmp_path) == before


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(utils.UsageError, match="choose another folder"):
        synthesize.synthesize(tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"nb_train": -1}, "negative"),
        ({"nb_test": -1}, "negative"),
        ({"seed": -1}, "negative"),
        ({"nb_valid": 15}, "at most 14"),
        ({"duration": 1}, "more than 1 s"),
        ({"duration": float("nan")}, "more than 1 s"),
    ],
)
def test_bad_values_raise_one_line_and_write_nothing(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        synthesize.synthesize(tmp_path / "songs", quiet=True, **wrong)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "songs").exists()


def test_command_line(tmp_path, capsys):
    command = [str(tmp_path / "songs"), "--train", "1", "--valid", "1", "--test", "0", "--duration", "2", "--quiet"]
    synthesize.main(command)
    synthesize.main(command)
    assert len(list((tmp_path / "songs" / "train").iterdir())) == 2
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    for folder, options in (("songs", ["--seed", "1"]), ("more", ["--valid", "15"]), ("file", [])):
        with pytest.raises(SystemExit) as status:
            synthesize.main([str(tmp_path / folder), *options])
        assert status.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error


# ------------------------------------------------------------------------------------------ sound


@pytest.mark.parametrize("duration, rate", [(1.01, 44100), (4, 44100), (4, 16000)])
def test_short_songs_and_other_rates_have_every_source(duration, rate):
    for index in range(4):
        sources = music.song(np.random.default_rng(index), duration, rate)
        for name, audio in sources.items():
            assert audio.shape == (2, round(duration * rate)) and audio.dtype == np.float32
            assert np.sqrt(np.mean(audio**2)) > 0.01, (name, index)  # also false for NaN


def test_every_source_sounds_in_most_seconds(played):
    for index, song in enumerate(played):
        rms = {name: np.sqrt(np.mean(audio.reshape(2, 20, RATE) ** 2, axis=(0, 2))) for name, audio in song.items()}
        silent = {name: int(np.sum(values < 1e-3)) for name, values in rms.items()}
        assert silent["other"] == 0 and max(silent["drums"], silent["bass"]) <= 3 and silent["vocals"] <= 5, silent
        assert np.mean(np.min(list(rms.values()), axis=0) > 1e-3) >= 0.7, (index, silent)


def test_levels_are_those_of_a_mix(played):
    """The mixture, taken for an estimate of each source, scores as in pop songs: no source is alone or buried."""
    for index, song in enumerate(played):
        mixture = sum(song.values())
        assert 0.94 < max(np.max(np.abs(audio)) for audio in (mixture, *song.values())) < 0.96
        for name, audio in song.items():
            sdr = 10 * np.log10(np.sum(audio**2) / np.sum((mixture - audio) ** 2))
            assert -10 < sdr < 0, (index, name, sdr)


def test_bass_is_low_but_not_alone_there(powers):
    for index, song in enumerate(powers):
        bass = np.cumsum(song["bass"]) / np.sum(song["bass"])
        assert bass[20 * 300] > 0.85, index
        assert bass[20 * 35] < 0.02, index
        low = {name: np.sum(power[: 20 * 250]) for name, power in song.items()}
        assert 0.25 < low["bass"] / sum(low.values()) < 0.9, (index, low)


def test_sources_differ_in_register(powers):
    """What makes them separable: the median over songs of the frequency below which half of the power lies."""

    def middle(name):
        return np.median([np.searchsorted(np.cumsum(song[name]), np.sum(song[name]) / 2) / 20 for song in powers])

    assert 40 < middle("bass") < 150 < middle("other") < 1000
    assert 200 < middle("vocals") < 1500


def test_sources_share_their_key(powers):
    """Bass and accompaniment play the same notes: their pitch classes agree better than after a transposition."""
    frequencies = np.arange(20 * 60, 20 * 1000) / 20
    pitch_class = np.rint(12 * np.log2(frequencies / 440)).astype(int) % 12

    def chroma(power):
        return np.sqrt(np.bincount(pitch_class, power[20 * 60 : 20 * 1000], 12))

    agreement = np.zeros(12)
    for song in powers:
        bass, other = chroma(song["bass"]), chroma(song["other"])
        agreement += [np.corrcoef(np.roll(bass, shift), other)[0, 1] for shift in range(12)]
    assert np.argmax(agreement) == 0, agreement


def test_drums_fall_on_the_grid():
    """Kick and snare patterns come out where the score says: the drums' energy peaks on the sixteenths."""
    score = music.compose(np.random.default_rng(3), 12, RATE)._replace(late="", swing=0.0)
    drums = np.sum(music.play_drums(np.random.default_rng(3), score) ** 2, axis=0)
    window = int(0.03 * RATE)
    steps = [score.at(step) for step in range(4, 16 * len(score.bars)) if score.at(step + 1) < score.nb_timesteps]
    on = sum(np.sum(drums[start : start + window]) for start in steps)
    off = sum(np.sum(drums[start - window : start]) for start in steps)
    assert on > 2 * off


def test_tone_plays_the_pitch_and_has_no_aliases():
    t = music.seconds(RATE, RATE)
    harmonics = 1 / np.arange(1, 61)
    sound = music.tone(np.full(RATE, 1000.0), harmonics, harmonics, 0.5, RATE)
    amplitude = np.abs(np.fft.rfft(sound)) * 2 / RATE  # one bin is 1 Hz
    np.testing.assert_allclose(amplitude[1000:20000:1000], harmonics[:19], rtol=0.02)
    amplitude[1000:20000:1000] = 0
    assert np.max(amplitude) < 1e-3
    blended = music.tone(np.full(RATE, 1000.0), np.array([1.0]), np.array([0.0, 1.0]), t, RATE)
    start, end = (np.abs(np.fft.rfft(blended[part])) for part in (slice(4410), slice(-4410, None)))
    assert np.argmax(start) == 100 and np.argmax(end) == 200  # bins of 10 Hz


def test_swing_delays_the_middle_of_the_beat():
    score = music.compose(np.random.default_rng(0), 10, RATE)
    straight, triplet = score._replace(swing=0.0), score._replace(swing=1 / 3)
    beat = straight.at(4)
    assert [round(6 * straight.at(step) / beat) for step in (0, 2, 4, 6, 8)] == [0, 3, 6, 9, 12]
    assert [round(6 * triplet.at(step) / beat) for step in (0, 2, 4, 6, 8)] == [0, 4, 6, 10, 12]


def test_a_sound_is_placed_where_it_is_to_be():
    """At constant power from left to right, and cut at the end."""
    for pan, left, right in ((-1, 1, 0), (0, 0.5**0.5, 0.5**0.5), (1, 0, 1)):
        track = np.zeros((2, 5), np.float32)
        music.place(track, np.array([1, 2, 3], np.float32), 3, pan, gain=0.5)
        np.testing.assert_allclose(track, np.outer([left, right], [0, 0, 0, 0.5, 1]), atol=1e-6)
