"""Shapes, disks that fail, files that are no whole recording, and what ffmpeg is given.

Formats are tests/test_separate.py's, and tests/test_containers.py's.
"""

import os
import resource
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import audio
import ffmpeg_files
import files
from utils import UsageError

RATE = 44100


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
    blocks = [factor * block for block in recording.blocks()]
    audio.write(tmp_path / "song.wav", blocks, (2, 100), 8000, "WAV", "FLOAT")
    np.testing.assert_array_equal(soundfile.read(tmp_path / "song.wav", dtype="float32")[0], factor * samples.T)
    decoded, rate, nb_timesteps = audio.decode(tmp_path / "song.wav", 8000, tmp_path, start=10 / 8000)
    assert (rate, nb_timesteps) == (8000, 90)
    np.testing.assert_array_equal(decoded.read(0, 90), factor * samples[:, 10:])


def test_a_wav_that_would_be_too_large_is_an_rf64(tmp_path):
    """WAV counts its bytes in 32 bits."""
    samples = np.zeros((2, 100), np.float32)
    audio.write(tmp_path / "song.wav", [samples], samples.shape, 8000, "WAV", "FLOAT")
    assert soundfile.info(tmp_path / "song.wav").format == "WAV"
    with pytest.raises(OSError, match="not what is there"):  # those that are announced do not come
        audio.write(tmp_path / "song.wav", [samples], (2, 2**29), 8000, "WAV", "FLOAT")
    assert soundfile.info(tmp_path / "song.wav").format == "RF64"


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


def test_names_of_recordings_are_those_of_folders(tmp_path):
    """Without its ending, the first would be the folder above."""
    names = [name for _, name in audio.recordings([tmp_path / "...wav", tmp_path / "a.wav"])]
    assert names == ["...wav", "a"]


@pytest.mark.parametrize("name", ["...wav", "..wav", ".wav", "-", "~.wav", "a|b.wav", os.fsdecode(b"\xff.wav")])
def test_names_stay_in_their_folder(tmp_path, name):
    ((path, found),) = audio.recordings([str(tmp_path / name)])
    assert path == tmp_path / name and files.is_file_name(found) and (tmp_path / found).parent == tmp_path


# ------------------------------------------------------------------------------- disks that fail

SAMPLES = (0.1 * np.random.default_rng(0).standard_normal((2, 20000))).astype(np.float32)


@pytest.mark.parametrize("form, subtype", [("WAV", "FLOAT"), ("WAV", "PCM_16"), ("FLAC", "PCM_24"), ("FLAC", "PCM_16")])
def test_a_full_disk_is_told(tmp_path, form, subtype):
    """Wherever it is full, near the end above all, which libsndfile does not tell of."""
    path = tmp_path / "stem"

    def write():
        with files.atomic_path(path) as temporary:
            audio.write(temporary, np.split(SAMPLES, 2, axis=1), SAMPLES.shape, 8000, form, subtype)

    write()
    size, whole = path.stat().st_size, soundfile.read(path)[0]
    before, failures = resource.getrlimit(resource.RLIMIT_FSIZE), 0
    for limit in [*range(0, size, size // 15), *range(size - 20, size), size, size + 5]:
        path.write_text("of yesterday")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            write()
            np.testing.assert_array_equal(soundfile.read(path)[0], whole)
        except OSError as error:
            failures += 1
            assert error.filename == str(path) and path.read_text() == "of yesterday"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert os.listdir(tmp_path) == ["stem"]
    assert failures >= 30


@pytest.mark.parametrize("form, subtype", [("WAV", "FLOAT"), ("FLAC", "PCM_24")])
@pytest.mark.parametrize("lost", [1, 8000, 40000])
def test_what_did_not_reach_the_disk_is_missed(tmp_path, monkeypatch, form, subtype, lost):
    def lose(number):
        os.truncate(number, os.fstat(number).st_size - lost)

    monkeypatch.setattr(os, "fsync", lose)
    with pytest.raises(OSError, match="not what is there"):
        audio.write(tmp_path / "stem", [SAMPLES], SAMPLES.shape, 8000, form, subtype)


def test_raw_audio_on_a_full_disk(tmp_path, capfd):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    recording = audio.RawAudio(tmp_path / "samples", 8000, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100001, before[1]))
    try:
        with pytest.raises(OSError, match="samples"):
            recording.append(SAMPLES)
        del recording
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capfd.readouterr().err == ""  # no "Exception ignored in"


# -------------------------------------------------------------------------- what is no whole recording


def make(path, *options):
    """A recording of 2 s, of noise so that no two of its parts are alike; the ending says of which format."""
    wav = path.with_suffix(".source.wav")
    soundfile.write(wav, 0.1 * np.random.default_rng(0).standard_normal((2 * RATE, 2)), RATE)
    subprocess.run(["ffmpeg", "-y", "-v", "error", "-i", wav, *options, path], check=True)
    wav.unlink()
    return path.read_bytes()


def decode(path):
    """Number of its samples."""
    recording, _, nb_timesteps = audio.decode(path, RATE, path.parent)
    recording.close()
    return nb_timesteps


FORMATS = ("wav", "aiff", "au", "caf", "flac", "ogg", "mp3", "bare.mp3", "aac", "ac3", "m4a", "mka", "live.mka", "wma")
BARE = ("bare.mp3", "aac", "ac3")  # nothing but frames: of two files together, nobody can tell
OPTIONS = {"bare.mp3": ["-write_xing", "0"], "live.mka": ["-live", "1"]}  # which do not say how long they are


@pytest.mark.parametrize("ending", FORMATS)
def test_a_recording_that_is_cut_or_followed_by_another(tmp_path, ending):
    path = tmp_path / f"song.{ending}"
    content = make(path, *OPTIONS.get(ending, []))
    assert 1.98 * RATE <= decode(path) < 2.1 * RATE
    damaged = [(content[:-20], "truncated"), (content[: len(content) // 2], "truncated|damaged")]
    damaged += [] if ending in BARE else [(content * 2, "holds several recordings")]
    for data, message in damaged:
        path.write_bytes(data)
        with pytest.raises(UsageError, match=message) as error:
            decode(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("number", [1, 20])
def test_an_mp3_without_its_last_frames(tmp_path, number):
    path = tmp_path / "song.mp3"
    content = make(path, "-ar", "48000", "-b:a", "128k")
    path.write_bytes(content[: -384 * number])  # bytes of each
    with pytest.raises(UsageError, match="song.mp3 is truncated"):
        decode(path)


@pytest.mark.parametrize("first", [0, 1])
def test_an_mp3_that_says_how_long_it_is_and_one_that_does_not(tmp_path, first):
    """In either order: who believes the one, and stops there, has lost the other."""
    parts = [make(tmp_path / "song.mp3", "-write_xing", number) for number in "01"]
    (tmp_path / "song.mp3").write_bytes(parts[first] + parts[1 - first])
    with pytest.raises(UsageError, match="holds several recordings"):
        decode(tmp_path / "song.mp3")


@pytest.mark.parametrize("ending", ["ogg", "mp3", "bare.mp3", "aac", "ac3"])
def test_a_hole_in_a_recording(tmp_path, ending):
    path = tmp_path / f"song.{ending}"
    content = make(path, *OPTIONS.get(ending, []))
    middle = len(content) // 2
    path.write_bytes(content[:middle] + content[middle + 100 :])
    with pytest.raises(UsageError, match="is damaged at byte"):
        decode(path)


def test_pages_of_ogg_that_are_damaged_or_left_out(tmp_path):
    path = tmp_path / "song.ogg"
    content = make(path, "-page_duration", "100000")
    middle = len(content) // 2
    page = content.index(b"OggS", middle)
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (flipped, content[:page] + content[content.index(b"OggS", page + 1) :]):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="is damaged at byte"):
            decode(path)
    path.write_bytes(content[: content.rindex(b"OggS")])
    with pytest.raises(UsageError, match="is truncated"):
        decode(path)


# ------------------------------------------------------------------------------------------- ffmpeg


def test_damage_that_only_a_decoder_sees(tmp_path):
    """Which ffmpeg reports, to go on with a gap."""
    path = tmp_path / "song.m4a"
    content = bytearray(make(path, "-movflags", "+faststart"))
    middle = (content.index(b"mdat") + len(content)) // 2
    content[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot decode .*song.m4a: ."):
        decode(path)


def test_less_than_a_file_says_to_hold(tmp_path):
    path = tmp_path / "song.m4a"
    make(path)
    rate, nb_channels, at_least, kind = ffmpeg_files.probe(path)
    assert (rate, nb_channels) == (RATE, 2) and 1.7 * RATE < at_least < 2 * RATE and "m4a" in kind
    assert sum(block.shape[1] for block in ffmpeg_files.blocks(path, rate, 2, 0, None, at_least, True)) >= 2 * RATE
    with pytest.raises(UsageError, match="song.m4a is damaged or truncated"):
        list(ffmpeg_files.blocks(path, rate, 2, 0, None, 3 * RATE, True))


def test_no_other_file_is_opened(tmp_path):
    """A playlist would be read as that what it names."""
    make(tmp_path / "private.wav")
    (tmp_path / "song.mp3").write_text("ffconcat version 1.0\nfile private.wav\n")
    with pytest.raises(UsageError, match="song.mp3 is of a format that cannot be checked, or refers to other files"):
        decode(tmp_path / "song.mp3")


def test_an_ffmpeg_that_gives_no_sign_of_life(tmp_path, monkeypatch):
    for program in ("ffmpeg", "ffprobe"):
        (tmp_path / program).write_text("#!/bin/sh\nexec sleep 5\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(ffmpeg_files, "PATIENCE", 0.1)
    start = time.monotonic()
    with pytest.raises(UsageError, match="song.m4a: ffprobe found nothing in 0.1 s"):
        ffmpeg_files.probe(tmp_path / "song.m4a")
    with pytest.raises(UsageError, match="song.m4a: nothing came for 0.1 s"):
        list(ffmpeg_files.blocks(tmp_path / "song.m4a", RATE, 2, 0, None, 0, True))
    assert time.monotonic() - start < 4


def header(nb_channels=1, rate=8000, bits=16, data=bytes(2000)):
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, nb_channels, rate, rate * 2 % 2**32, 2, bits)
    body = b"WAVE" + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "content, message",
    [
        (header(nb_channels=0), "is not audio"),
        (header(nb_channels=65535), "bad.wav"),
        (header(nb_channels=65), "65 channels"),
        (header(rate=0), "bad.wav"),
        (header(rate=1), "sample rate of 1 Hz"),
        (header(rate=10**9), "sample rate of 1000000000 Hz"),
        (header(rate=2**32 - 1), "bad.wav"),
        (header(bits=0), "bad.wav"),
        (header()[:30], "bad.wav"),
        (b"fLaC\0\0\0\x22" + bytes(34), "bad.wav"),
        (b"OggS" + bytes(100), "is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_headers_that_say_odd_things(tmp_path, content, message):
    (tmp_path / "bad.wav").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        audio.decode(tmp_path / "bad.wav", 8000, tmp_path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", Path("/dev/zero"), tmp_path, tmp_path / "missing", tmp_path / "a\0b"):
        with pytest.raises((UsageError, ValueError)):
            audio.decode(path, 8000, tmp_path)


def test_an_ffmpeg_that_never_ends_or_fails(tmp_path, monkeypatch):
    (tmp_path / "song.xyz").write_text("something")
    found = '{"streams": [{"codec_type": "audio", "sample_rate": "8000", "channels": 1}], "format": {}}'
    for name, script in {"ffprobe": f"echo '{found}'", "ffmpeg": "exec cat /dev/zero"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert audio.decode(tmp_path / "song.xyz", 8000, tmp_path, 10.0, 20.0)[2] == 160000
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\nhead -c 32000 /dev/zero; echo reason >&2; exit 1\n")
    with pytest.raises(UsageError, match="song.xyz: reason"):
        audio.decode(tmp_path / "song.xyz", 8000, tmp_path)
    (tmp_path / "ffprobe").write_text("#!/bin/sh\necho no JSON\n")
    with pytest.raises(UsageError, match="is not audio"):
        audio.decode(tmp_path / "song.xyz", 8000, tmp_path)
