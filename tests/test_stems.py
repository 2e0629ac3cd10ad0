"""Stems that add up to the mixture, and the short form for two of them."""

import json

import numpy as np
import pytest
import soundfile
from test_separate import RATE, make_folder, read, run, song

import trained
import weights
from args import TARGETS

FORMATS = {"16": 2.0**-15, "24": 2.0**-23, "float": 2.0**-24}  # a unit in the last place; of floats, relative


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A song in 16 bits, with a silent part."""
    audio = song()
    audio[:, 1000:2000] = 0
    path = tmp_path_factory.mktemp("songs") / "song.wav"
    soundfile.write(path, audio.T, RATE, "PCM_16")
    return path


def difference(stems, path, factor=1.0):
    """Largest difference of the sum of stems from the recording, and their largest sample."""
    expected = soundfile.read(path, always_2d=True)[0].T
    assert all(stem.shape == expected.shape for stem in stems.values())
    return np.abs(sum(stems.values()) - factor * expected).max(), max(np.abs(stem).max() for stem in stems.values())


def test_a_rate_in_the_form_of_a_float(mixture, tmp_path):
    folder = make_folder(tmp_path / "tiny", ["vocals"])
    (model,), _ = trained.load_models(folder)
    weights.save(folder / "vocals.h5", model.arrays(), {**model.description, "sample_rate": float(RATE)})
    run(folder, tmp_path, mixture)
    assert difference(read(tmp_path / "song"), mixture)[1] > 0


@pytest.mark.parametrize(
    "subtype, ext", [("16", "wav"), ("24", "wav"), ("float", "wav"), ("16", "flac"), ("24", "flac")]
)
@pytest.mark.parametrize("options", [[], ["--residual", "rest"]], ids=["targets", "residual"])
def test_stems_add_up(folder, mixture, tmp_path, subtype, ext, options):
    form = ["--subtype", subtype, "--ext", ext, *options]
    run(folder, tmp_path / "plain", mixture, *form)
    run(folder, tmp_path / "sum", mixture, *form, "--sum-to-mixture")
    plain, completed = read(tmp_path / "plain"), read(tmp_path / "sum")
    before, (after, largest) = difference(plain, mixture)[0], difference(completed, mixture)
    print(f"\n{subtype} {ext} {options}: {before:.1e} -> {after:.1e}")
    # a mixture of 16 bits is held by each of the formats: integers add up to it to the bit
    assert after == 0 if subtype != "float" else after <= FORMATS["float"] * largest
    assert before > 100 * after and set(plain) == set(completed)
    assert not any(stem[:, 1300:1700].any() for stem in plain.values())
    assert not any(stem[:, 1300:1700].any() for stem in completed.values())


def test_whole_numbers_are_the_nearest(folder, mixture, tmp_path):
    """Of all stems but one, the loudest, which has what the others' rounding leaves."""
    for subtype in ("16", "float"):
        run(folder, tmp_path / subtype, mixture, "--sum-to-mixture", "--subtype", subtype)
    stems, exact = (read(tmp_path / subtype) for subtype in ("16", "float"))
    *errors, loudest = sorted(np.abs(stems[name] - exact[name]).max() / FORMATS["16"] for name in exact)
    assert max(errors) < 0.501 < loudest < 0.5 * len(exact)


@pytest.mark.parametrize("subtype", ["16", "24"])
def test_stems_that_are_scaled_add_up_to_the_scaled_mixture(folder, tmp_path, capsys, subtype):
    path = tmp_path / "song.wav"
    soundfile.write(path, 9 * song().T, RATE, "FLOAT")
    run(folder, tmp_path / "out", path, "--subtype", subtype, "--sum-to-mixture")
    written = read(tmp_path / "out")
    told = float(capsys.readouterr().err.split("scaled by ")[1].split(",")[0])  # to three places
    total, audio = sum(written.values()), soundfile.read(path)[0].T
    factor = np.vdot(total, audio) / np.vdot(audio, audio)
    after, largest = difference(written, path, factor)
    assert abs(factor - told) < 1e-3 and after <= FORMATS[subtype] and 0.99 < largest < 1


@pytest.mark.parametrize("rate, nb_channels", [(11025, 2), (22050, 1), (RATE, 3)])
def test_at_any_rate_and_of_an_excerpt(folder, tmp_path, rate, nb_channels):
    audio = song(6000, nb_channels, rate=rate)
    path = tmp_path / "song.wav"
    soundfile.write(path, audio.T, rate, "FLOAT")
    for subtype, unit in FORMATS.items():
        start = ["--start", str(1000 / rate), "--duration", str(3000 / rate)]
        run(folder, tmp_path / subtype, path, "--subtype", subtype, "--sum-to-mixture", *start)
        total = sum(read(tmp_path / subtype).values())
        assert np.abs(total - audio[:, 1000:4000]).max() <= unit  # half of one, and the rounding of sums


def test_what_is_left_is_shared_by_energy(folder, mixture, tmp_path):
    """What rounding leaves goes to the loudest."""
    run(folder, tmp_path / "plain", mixture)
    run(folder, tmp_path / "sum", mixture, "--sum-to-mixture")
    run(folder, tmp_path / "16", mixture, "--sum-to-mixture", "--subtype", "16")
    plain, completed, rounded = (read(tmp_path / name) for name in ("plain", "sum", "16"))
    rest = soundfile.read(mixture)[0].T - sum(plain.values())
    energies = {name: (stem**2).sum() for name, stem in plain.items()}
    for name, stem in completed.items():
        np.testing.assert_allclose(stem - plain[name], energies[name] / sum(energies.values()) * rest, atol=1e-6)
        is_nearest = np.abs(rounded[name] - stem).max() <= 0.5001 * FORMATS["16"]
        assert is_nearest != (energies[name] == max(energies.values()))


def test_silence_adds_up(folder, tmp_path):
    soundfile.write(tmp_path / "song.wav", np.zeros((2000, 2)), RATE, "PCM_16")
    run(folder, tmp_path / "out", tmp_path / "song.wav", "--sum-to-mixture")
    assert not any(stem.any() for stem in read(tmp_path / "out").values())


def test_karaoke(folder, mixture, tmp_path):
    run(folder, tmp_path / "short", mixture, "--karaoke", "--sum-to-mixture")
    run(folder, tmp_path / "long", mixture, "--targets", "vocals", "--residual", "accompaniment", "--sum-to-mixture")
    short, long = read(tmp_path / "short"), read(tmp_path / "long")
    assert set(short) == {"song/vocals.wav", "song/accompaniment.wav"}
    for name, stem in long.items():
        np.testing.assert_array_equal(short[name], stem)


ALL = {"vocals": ["vocals"], "rest": ["drums", "bass", "other"]}


def test_sums_of_stems_add_up(folder, mixture, tmp_path):
    run(folder, tmp_path / "out", mixture, "--sum-to-mixture", "--subtype", "24", "--aggregate", json.dumps(ALL))
    assert difference(read(tmp_path / "out"), mixture)[0] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--targets", "vocals"], "vocals are not all of the mixture"),
        (["--targets", "vocals", "drums"], "vocals, drums are not all of the mixture, add the rest as a stem"),
        (["--aggregate", json.dumps({"rest": ["drums", "bass", "other"]})], "--aggregate does not have each of"),
        (["--aggregate", json.dumps({**ALL, "all": [*TARGETS]})], "--aggregate does not have each of"),
        (["--residual", "x", "--aggregate", json.dumps(ALL)], "--aggregate does not have each of"),
        (["--karaoke", "--residual", "rest"], "leave out --residual"),
        (["--karaoke", "--aggregate", json.dumps(ALL)], "leave out --aggregate"),
    ],
    ids=str,
)
def test_stems_that_are_not_all_of_the_mixture(folder, mixture, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path / "out", mixture, "--sum-to-mixture", *options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_targets_of_other_names_may_be_all(mixture, tmp_path):
    model = make_folder(tmp_path / "model", ["speech", "noise"])
    run(model, tmp_path / "out", mixture, "--sum-to-mixture")
    assert difference(read(tmp_path / "out"), mixture)[0] < 1e-7
