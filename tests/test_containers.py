"""Whole files are read, whatever is in and around them; parts of files, and several in one, are not."""

import io
import json
import os
import random
import struct
import subprocess

import numpy as np
import pytest
import soundfile

import audio
import containers
import frames
from utils import UsageError

RATE, SECONDS = 44100, 1.507  # no whole number of anybody's frames
# File: ffmpeg's options. Those of FRAMES have no container, of which nobody can tell that one follows another.
KINDS = {
    "song.wav": [],
    "adpcm.wav": ["-c:a", "adpcm_ms"],
    "large.wav": ["-rf64", "always"],
    "song.w64": [],
    "song.aiff": [],
    "song.au": [],
    "song.caf": [],
    "song.flac": [],
    "song.ogg": ["-c:a", "libvorbis"],
    "song.opus": [],
    "song.oga": ["-c:a", "flac"],
    "song.m4a": [],
    "fast.m4a": ["-movflags", "+faststart"],
    "parts.m4a": ["-movflags", "frag_keyframe+empty_moov", "-frag_duration", "300000"],
    "lossless.m4a": ["-c:a", "alac"],
    "song.mka": ["-c:a", "libvorbis"],
    "mp3.mka": ["-c:a", "libmp3lame"],
    "song.webm": ["-c:a", "libopus"],
    "live.webm": ["-c:a", "libopus", "-live", "1"],
    "song.wma": [],
    "song.avi": ["-c:a", "libmp3lame"],
    "song.wv": [],
    "song.tta": [],
    "song.mp3": [],
    "vbr.mp3": ["-q:a", "4"],
}
FRAMES = {
    "plain.mp3": ["-write_xing", "0"],
    "plain vbr.mp3": ["-q:a", "4", "-write_xing", "0"],
    "song.mp2": [],
    "song.aac": [],
    "song.ac3": [],
    "song.eac3": [],
    "song.dts": ["-c:a", "dca", "-strict", "-2", "-ar", "48000"],
}


def ffmpeg(*arguments, **options):
    command = ["ffmpeg", "-v", "error", "-y", "-nostdin", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, **options).stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tone in noise, so that encoders have something to do all the time."""
    rng, t = np.random.default_rng(0), np.arange(round(RATE * SECONDS)) / RATE
    samples = 0.3 * np.sin(2 * np.pi * 330 * t + np.sin(5 * t)) + 0.05 * rng.standard_normal((2, len(t)))
    path = tmp_path_factory.mktemp("source") / "source.wav"
    soundfile.write(path, samples.T, RATE)
    return path


def seconds(path):
    rate, nb_channels, blocks = audio._open_audio(path, 0, None)
    assert nb_channels == 2
    try:
        return sum(block.shape[1] for block in blocks) / rate
    except soundfile.LibsndfileError:
        raise UsageError(f"{path} is damaged") from None  # as audio.decode says


@pytest.mark.parametrize("name", [*KINDS, *FRAMES])
def test_a_part_is_not_the_whole(source, tmp_path, name):
    """The whole is read; not what is left of it after its end, a quarter, or a byte has gone, nor two in one file."""
    path = tmp_path / name
    ffmpeg("-i", source, *{**KINDS, **FRAMES}[name], path)
    assert abs(seconds(path) - SECONDS) < 0.06
    whole, rng = path.read_bytes(), random.Random(name)
    size = len(whole)
    hole = rng.randrange(size // 10, size // 2)
    parts = [whole[: rng.randrange(size // 20, size)] for _ in range(3)] + [
        whole[:hole] + whole[hole + size // 4 - 1 :]
    ]
    if name != "song.tta":  # whose last four bytes are a checksum that no decoder misses
        parts.append(whole[:-1])
    for part in parts:
        path.write_bytes(part)
        with pytest.raises(UsageError):
            seconds(path)
    path.write_bytes(whole * 2)
    if name in FRAMES:
        assert seconds(path) > 1.9 * SECONDS
    else:
        said = "cannot decode" if name == "song.wv" else "several recordings, one after the other"
        with pytest.raises(UsageError, match=said):
            seconds(path)


def tag(kind):
    """A tag, by what programs call it."""
    ape = b"Title\0" + b"x" * 500
    size, head = len(ape) + 8, b"APETAGEX"
    footer = struct.pack("<IIII", 2000, size + 32, 1, 0x80000000) + bytes(8)
    header = struct.pack("<IIII", 2000, size + 32, 1, 0xA0000000) + bytes(8)
    items = struct.pack("<II", 500, 0) + ape
    lyrics = b"LYRICSBEGININD0000200LYR00010[00:01]song"
    return {
        "ID3v1": b"TAG" + b"x" * 125,
        "ID3v2": b"ID3\4\0\0\0\0\x20\0" + bytes(4096),
        "ID3v2 at the end": b"ID3\4\0\x10\0\0\1\0" + bytes(128) + b"3DI\4\0\x10\0\0\1\0",
        "APE": head + header + items + head + footer,
        "APE without header": items + head + footer[:-12] + bytes(12),
        "Lyrics3": lyrics + b"%06dLYRICS200" % len(lyrics),
        "zeros": bytes(3000),
    }[kind]


TAGS = {
    "song.mp3": [["ID3v2"], ["ID3v1"], ["APE", "ID3v1"], ["APE without header"], ["Lyrics3", "ID3v1"], ["zeros"]],
    "plain.mp3": [["ID3v2"], ["ID3v1"], ["APE", "ID3v1"], ["Lyrics3", "ID3v1"], ["zeros"], ["ID3v2 at the end"]],
    "song.aac": [["ID3v2"], ["ID3v1"], ["APE"], ["ID3v2 at the end"]],
    "song.flac": [["ID3v2"], ["ID3v1"]],
    "song.wav": [["ID3v1"], ["zeros"]],
}


@pytest.mark.parametrize("name", TAGS)
def test_tags_are_no_damage(source, tmp_path, name):
    path = tmp_path / name
    ffmpeg("-i", source, *{**KINDS, **FRAMES}[name], path)
    whole, before = path.read_bytes(), seconds(path)
    for kinds in TAGS[name]:
        tags = b"".join(map(tag, kinds))
        path.write_bytes(tags + whole if kinds == ["ID3v2"] else whole + tags)
        assert seconds(path) == before, kinds
    if name in ("song.mp3", "song.aac"):  # and do not hide damage
        for kind in ("ID3v2", "ID3v1", "APE", "Lyrics3"):
            path.write_bytes(tag(kind) + whole[:-50] if kind == "ID3v2" else whole[:-50] + tag(kind))
            with pytest.raises(UsageError, match="truncated"):
                seconds(path)


def chunk(kind, data):
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def test_chunks_of_a_wav(source, tmp_path):
    whole = source.read_bytes()
    form, samples = whole[12:36], whole[44:]
    data, extra = chunk(b"data", samples), chunk(b"LIST", b"INFOIART\5\0\0\0abcd\0\0")
    path = tmp_path / "song.wav"
    for body in (
        chunk(b"JUNK", bytes(28)) + chunk(b"bext", bytes(603)) + form + data,
        form + extra + data + extra + chunk(b"id3 ", b"ID3\3" + bytes(101)),
        form + b"data" + struct.pack("<I", 2**32 - 1) + samples,  # of a length that was not known
    ):
        for size in (4 + len(body), 0, 2**32 - 1, 2 * len(body)):  # which programs get wrong
            path.write_bytes(b"RIFF" + struct.pack("<I", size) + b"WAVE" + body)
            assert seconds(path) == pytest.approx(SECONDS, abs=1e-3)


@pytest.fixture(scope="module")
def extras(tmp_path_factory):
    """A picture, a video of 3 s, chapters."""
    folder = tmp_path_factory.mktemp("extras")
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=300x300:d=0.04", "-frames:v", "1", folder / "cover.jpg")
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64:d=3:r=5", "-c:v", "mpeg4", folder / "video.mkv")
    chapter = "[CHAPTER]\nTIMEBASE=1/1000\nSTART={}\nEND={}\ntitle=x\n"
    (folder / "chapters").write_text(f";FFMETADATA1\ntitle=a\n{chapter.format(0, 500)}{chapter.format(500, 1500)}")
    return folder


COVER = ["-i", "{}/cover.jpg", "-map", "0:a", "-map", "1:v", "-c:v", "copy", "-disposition:v:0", "attached_pic"]
VIDEO = ["-i", "{}/video.mkv", "-map", "0:a", "-map", "1:v"]
CHAPTERS = ["-i", "{}/chapters", "-map_metadata", "1", "-map_chapters", "1"]
REAL = {
    "cover.mp3": [*COVER, "-id3v2_version", "3", "-write_id3v1", "1"],
    "cover 4.mp3": [*COVER, "-id3v2_version", "4", "-write_xing", "0"],
    "cover.m4a": COVER,
    "cover.flac": COVER,
    "cover.aiff": [*COVER, "-write_id3v2", "1"],
    "chapters.m4a": CHAPTERS,
    "chapters.m4b": [*CHAPTERS, "-c:a", "aac", "-f", "mp4"],
    "chapters.mp3": CHAPTERS,
    "chapters.mka": CHAPTERS,
    "chapters.ogg": [*CHAPTERS, "-c:a", "libvorbis"],
    "video.mp4": VIDEO,
    "video.mov": [*VIDEO, "-c:a", "pcm_s16le"],
    "video.mkv": VIDEO,
    "video.webm": [*VIDEO, "-c:v", "libvpx"],
    "video.avi": [*VIDEO, "-c:v", "copy"],
    "video.ogv": [*VIDEO, "-c:v", "libtheora", "-c:a", "libvorbis"],
    "video.wmv": VIDEO,
    "two.mka": ["-map", "0:a", "-map", "0:a"],
    "large.opus": ["-b:a", "256k"],
}
STREAMED = ["wav", "flac", "ogg", "opus", "webm", "matroska", "mp3", "adts", "au", "aiff", "w64", "avi", "asf", "mp4"]


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read(source, extras, tmp_path, name):
    ffmpeg("-i", source, *(option.format(extras) for option in REAL[name]), tmp_path / name)
    assert abs(seconds(tmp_path / name) - SECONDS) < 0.06


@pytest.mark.parametrize("form", STREAMED)
def test_streamed_files_are_read(source, tmp_path, form):
    """Written where nothing could be put right at the end: they do not say how long they are."""
    options = ["-movflags", "frag_keyframe+empty_moov"] if form == "mp4" else []
    (tmp_path / "song").write_bytes(ffmpeg("-i", source, *options, "-f", form, "-"))
    assert abs(seconds(tmp_path / "song") - SECONDS) < 0.06


@pytest.mark.parametrize("name", ["song.ogg", "song.opus"])
def test_every_bit_of_an_ogg_counts(source, tmp_path, name):
    path, rng = tmp_path / name, random.Random(0)
    ffmpeg("-i", source, *KINDS[name], path)
    whole = path.read_bytes()
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with open(path, "rb") as stream, pytest.raises(UsageError):
            containers.check(stream, path)
            assert not damaged.startswith(b"OggS"), "only what is no Ogg any more passes"
            raise UsageError


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 32000, 44100, 48000])
@pytest.mark.parametrize("kind", ["mp3", "vbr.mp3", "mp2", "ac3"])
def test_frames_are_those_that_ffprobe_counts(source, tmp_path, kind, rate):
    if rate < {"mp2": 16000, "ac3": 32000}.get(kind, 0):
        pytest.skip("there are no such files")
    path = tmp_path / f"song.{kind}"
    options = {"mp3": ["-b:a", "64k", "-write_xing", "0"], "vbr.mp3": ["-q:a", "5", "-write_xing", "0"]}.get(kind, [])
    ffmpeg("-i", source, "-ar", rate, *options, path)
    entries = ["-count_packets", "-show_entries", "stream=nb_read_packets", "-of", "json"]
    found = subprocess.run(["ffprobe", "-v", "error", *entries, path], capture_output=True, check=True).stdout
    with open(path, "rb") as file:
        walked = frames.walk(file, "ac3" if kind == "ac3" else "mp3")
    assert walked.count == int(json.loads(found)["streams"][0]["nb_read_packets"]) and not walked.is_told


SIGNS = [b"ID3\4\0\0\x7f\x7f\x7f\x7f", b"TAG", b"APETAGEX", b"LYRICS200", b"000000LYRICS200", b"3DI\4\0\0\0\0\0\0"]
SIGNS += [*containers._KINDS, b"\xff\xfb\x90\0", b"\xff\xf1\x50\x80", b"\x0b\x77", b"\x7f\xfe\x80\x01", b""]


@pytest.mark.parametrize("sign", SIGNS, ids=repr)
def test_bytes_that_are_nothing(sign):
    """Walking ends, with a line or without, whatever a file holds."""
    rng = random.Random(0)
    for size in (0, 1, 3, 7, 11, 23, 100, 5000):
        for filling in (bytes(size), b"\xff" * size, *(rng.randbytes(size) for _ in range(10))):
            boxes = (b"\0\0\0\x08" + sign + filling, b"\0\0\0\x01" + sign + filling)
            for content in (sign + filling, filling + sign, sign + filling + sign, *boxes):
                stream = io.BytesIO(content)
                for kind in (None, "mp3", "aac", "ac3", "dts"):
                    try:
                        containers.check_frames(stream, "file", kind) if kind else containers.check(stream, "file")
                    except UsageError as error:
                        assert str(error).startswith("file ")


def test_zeros_behind_the_sound_are_no_damage_and_take_no_time(tmp_path):
    path = tmp_path / "song.wav"
    soundfile.write(path, np.full((1000, 2), 0.5), RATE)
    os.truncate(path, 2**36)
    _, rate, nb_timesteps = audio.decode(path, RATE, tmp_path)
    assert (rate, nb_timesteps) == (RATE, 1000)
