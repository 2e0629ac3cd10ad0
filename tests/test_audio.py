"""What audio.py says of shapes; files, formats and damage are tests/test_separate.py's."""

import numpy as np
import pytest
import soundfile

import audio


def test_raw_audio_has_one_orientation(tmp_path, monkeypatch):
    """(nb_channels, nb_timesteps) in, (nb_channels, nb_timesteps) out."""
    monkeypatch.setattr(audio, "BLOCK", 40)
    samples = np.random.default_rng(0).standard_normal((3, 100)).astype(np.float32)
    recording = audio.RawAudio(tmp_path / "samples", 8000, 3)
    for part in np.split(samples, [1, 70], axis=1):
        recording.append(part)
    assert recording.nb_timesteps == 100 and recording.peak == np.abs(samples).max()
    np.testing.assert_array_equal(recording.read(30, 90), samples[:, 30:90])
    assert [block.shape for block in recording.blocks()] == [(3, 40), (3, 40), (3, 20)]
    np.testing.assert_array_equal(np.concatenate(list(recording.blocks()), axis=1), samples)
    longer = recording.resampled(8000, 130)
    np.testing.assert_array_equal(longer.read(0, 130), np.pad(samples, ((0, 0), (0, 30))))
    longer.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_what_is_written_is_decoded_again(tmp_path, factor):
    samples = np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)
    recording = audio.RawAudio(tmp_path / "samples", 8000, 2)
    recording.append(samples)
    audio.write(tmp_path / "song.wav", recording, "WAV", "FLOAT", factor)
    np.testing.assert_array_equal(soundfile.read(tmp_path / "song.wav", dtype="float32")[0], factor * samples.T)
    decoded, rate, nb_timesteps = audio.decode(tmp_path / "song.wav", 8000, tmp_path, start=10 / 8000)
    assert (rate, nb_timesteps) == (8000, 90)
    np.testing.assert_array_equal(decoded.read(0, 90), factor * samples[:, 10:])


def test_a_wav_that_would_be_too_large_is_an_rf64(tmp_path, monkeypatch):
    """WAV counts its bytes in 32 bits."""
    samples = np.zeros((2, 100), np.float32)
    recording = audio.RawAudio(tmp_path / "samples", 8000, 2)
    monkeypatch.setattr(recording, "blocks", lambda: iter([samples]))
    for nb_timesteps, form in ((100, "WAV"), (2**29 - 2**13, "WAV"), (2**29, "RF64")):
        recording.nb_timesteps = nb_timesteps
        audio.write(tmp_path / "song.wav", recording, "WAV", "FLOAT", 1.0)
        assert soundfile.info(tmp_path / "song.wav").format == form


def test_recordings_of_a_folder(tmp_path):
    for name in ("b.wav", "A.WAV", "c.Mp3", "c.flac", ".hidden.wav", "notes.txt"):
        (tmp_path / name).touch()
    found = audio.recordings([tmp_path])
    assert [(path.name, name) for path, name in found] == [
        ("A.WAV", "A"),
        ("b.wav", "b"),
        ("c.Mp3", "c.Mp3"),
        ("c.flac", "c.flac"),
    ]
