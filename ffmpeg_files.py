"""What libsndfile does not read, by ffmpeg: one file at a time, and no other that it may refer to."""

from __future__ import annotations  # unions, on Python 3.9

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils import UsageError

BLOCK = 2**18  # samples at a time
# Of its demuxers, those of formats that say how much they hold, or have frames that can be counted, so that a part is
# not taken for the whole; and that open no other file, as playlists do, and scripts, patterns of names, and subtitles
FORMATS = "aac,ac3,aiff,ape,asf,au,avi,caf,dts,eac3,flac,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,ogg,tta,w64,wav,wv"
LEFT_OUT = 4608  # samples at both ends that encoders count and decoders may leave out: up to 3700 were seen
PATIENCE = 60  # seconds without a sign of life of ffmpeg


def is_there() -> bool:
    return shutil.which("ffmpeg") is not None and shutil.which("ffprobe") is not None


def _command(program, level, path, *options):
    """A command of ffmpeg or ffprobe that reads a file, and nothing else."""
    only = ["-protocol_whitelist", "file", "-format_whitelist", FORMATS]
    return [program, "-v", level, *only, "-i", f"file:{path}", *options]


def probe(path: Path) -> tuple[int, int, int, str]:
    """Sample rate, number of channels, how many samples it says to have at least, and ffmpeg's name of the format.

    Raises:
        UsageError: not audio, or of a format that is not read.
    """
    entries = "stream=codec_type,sample_rate,channels,duration,start_time:stream_disposition=attached_pic"
    command = _command(
        "ffprobe", "warning", path, "-show_entries", f"{entries}:format=duration,format_name", "-of", "json"
    )
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
        found = json.loads(result.stdout or b"{}")
    except subprocess.TimeoutExpired:
        raise UsageError(f"cannot read {path}: ffprobe found nothing in {PATIENCE} s") from None
    except ValueError:
        found = {}
    timed = [
        stream
        for stream in found.get("streams", [])
        if stream.get("codec_type") in ("audio", "video") and not stream.get("disposition", {}).get("attached_pic")
    ]
    stream = next((stream for stream in timed if stream["codec_type"] == "audio"), {})
    rate, nb_channels = int(stream.get("sample_rate", 0)), int(stream.get("channels", 0))
    if b"not on whitelist" in result.stderr:
        raise UsageError(f"{path} is of a format that cannot be checked, or refers to other files: convert it to wav")
    if not rate or not nb_channels:
        reason = f": {_last_line(result.stderr, path)}" if result.stderr else ""
        raise UsageError(f"{path} is not audio{reason}")
    claim, form = 0.0, found.get("format", {})
    # Several streams share the duration of the longest; an AVI that was streamed claims anything
    if len(timed) == 1 and form.get("format_name") != "avi" and b"Estimating duration" not in result.stderr:
        claim = float(form.get("duration", 0)) - max(0, float(stream.get("start_time", 0))) - 0.1
    return rate, nb_channels, int(claim * rate) - LEFT_OUT, form.get("format_name")


def blocks(
    path: Path, rate: int, nb_channels: int, first: int, count: int | None, at_least: int, strict: bool
) -> Iterator[np.ndarray]:
    """Samples float32 (nb_channels, n), from `first` on, `count` of them or (None) to the end.

    Args:
        at_least: samples that the file must have up to its end
        strict: whether all that ffmpeg takes for an error is one
    Raises:
        UsageError: it is damaged or truncated, or ffmpeg says nothing more.
    """
    form = ["-map", "0:a:0", "-ac", str(nb_channels), "-ar", str(rate), "-f", "f32le", "-"]
    # -xerror: a damaged file is no input, rather than one with gaps; but a tag is no damage, to ffmpeg it may be
    command = _command("ffmpeg", "error", path, "-nostdin", *["-xerror"] * strict, *form)
    position, stop = 0, float("inf") if count is None else first + count
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        try:
            while position < stop:
                data = _output(process, BLOCK * nb_channels * 4, path)
                block = np.frombuffer(data, "<f4", len(data) // (4 * nb_channels) * nb_channels)
                block = block.reshape(-1, nb_channels).T
                if not block.size:
                    break
                part = block[:, max(0, first - position) : max(0, min(stop - position, block.shape[1]))]
                position += block.shape[1]
                if part.size:
                    yield part
            else:
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            if process.returncode != 0:
                errors.seek(0)
                raise UsageError(f"cannot decode {path}: {_last_line(errors.read(), path)}")
            if position < at_least:
                raise UsageError(f"{path} is damaged or truncated: it says that it is longer than what is in it")
        finally:
            process.kill()


def _output(process, size, path):
    """The next bytes that a process writes, `size` or, at its end, fewer."""
    data, ready = bytearray(), select.poll()
    ready.register(process.stdout, select.POLLIN)
    while len(data) < size:
        if not ready.poll(1000 * PATIENCE):
            raise UsageError(f"cannot decode {path}: nothing came for {PATIENCE} s")
        part = os.read(process.stdout.fileno(), size - len(data))
        if not part:
            break
        data += part
    return data


def _last_line(output, path):
    lines = output.replace(os.fsencode(f"file:{path}: "), b"").decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason given"
