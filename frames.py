"""Sound files that are nothing but frames, and tags around them: whether each frame follows the one before.

MPEG audio (mp3), AAC, AC-3 and DTS. A frame's header says how long it is, so that all of a file can be walked without
decoding anything. What comes before the first frame is not held against a file: radio begins anywhere.
"""

from __future__ import annotations  # unions, on Python 3.9

import functools
import os
import struct
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

TRUNCATED = "is truncated"
SEVERAL = "holds several recordings, one after the other: cut it into one file for each"
_HEADER = 64  # bytes of a frame that are looked at


class Damage(Exception):
    """What is wrong with a file, to be read after its name."""


def damage_at(position: int) -> Damage:
    return Damage(f"is damaged at byte {position}")


class Frames(NamedTuple):
    """What a file of frames holds."""

    count: int
    nb_timesteps: int | None  # samples of all frames, at least; None where the header does not say it
    is_told: bool  # whether the file itself says how many there are


def walk(stream: BinaryIO, kind: str) -> Frames | None:
    """Walk the frames of a file; None if it is of another kind, or none are found.

    Args:
        kind: ffmpeg's name of the format: mp3, aac, ac3, eac3, dts
    Raises:
        Damage: there are holes or strange bytes between frames, the last one is cut, or a second recording follows.
    """
    if kind not in _KINDS:
        return None
    length_of, sync, constant = _KINDS[kind]
    start, end = span(stream)
    position = _first(stream, start, end, length_of, sync)
    if position is None:
        return None
    stream.seek(position)
    header = stream.read(_HEADER)
    common, count = int.from_bytes(header[:4], "big") & constant, 0
    claim = _claim(header) if kind == "mp3" else None
    nb_timesteps = _nb_timesteps(header) if kind == "mp3" else None
    read, seek = stream.read, stream.seek
    seek(position)
    while position < end:
        header = read(_HEADER)
        length = length_of(header)
        if length and int.from_bytes(header[:4], "big") & constant == common:
            if count and kind == "mp3" and _claim(header) is not None:
                raise Damage(SEVERAL)
            position += length
            count += 1
            if position > end:
                raise Damage(TRUNCATED)
        elif (after := _after_tags(stream, position)) > position:  # files may be put together with their tags
            position = after
        else:
            seek(position)
            if read(end - position).strip(b"\0"):
                raise damage_at(position)
            break
        seek(position)
    # the first frame holds the claim; some count it, too
    if claim is not None and count - 1 != claim != count:
        raise Damage(TRUNCATED if count < claim else SEVERAL)
    return Frames(count, nb_timesteps and count * nb_timesteps, claim is not None)


def _first(stream, start, end, length_of, sync):
    """Where the first of three frames in a row, or of all there are, begins; None if not near the start."""
    stream.seek(start)
    data = stream.read(min(2**17, end - start))
    begin = -1
    while 0 <= (begin := data.find(sync, begin + 1)) < 2**16:
        position = begin
        for _ in range(3):
            length = length_of(data[position : position + _HEADER])
            position += length
            if not length or start + position >= end:
                break
        if length and (start + position <= end or begin == 0):
            return start + begin
    return None


# ------------------------------------------------------------------------------------------ tags


def span(stream: BinaryIO) -> tuple[int, int]:
    """Where a file begins and ends, but for tags (ID3, APE, Lyrics3)."""
    end = stream.seek(0, os.SEEK_END)
    start = min(_after_tags(stream, 0), end)
    while end > start:
        begin = max(start, end - 128)
        stream.seek(begin)
        tail = stream.read(end - begin)
        if tail.startswith(b"TAG") and len(tail) == 128:
            length = 128
        elif tail[-32:].startswith(b"APETAGEX") and len(tail) >= 32:
            size, flags = struct.unpack("<12xI4xI8x", tail[-32:])
            length = max(32, size) + (32 if flags & 2**31 else 0)
        elif tail[-10:].startswith(b"3DI"):
            length = 20 + _seven_bits(tail[-4:])
        elif tail.endswith(b"LYRICS200") and tail[-15:-9].isdigit():
            length = 15 + int(tail[-15:-9])
        else:
            break
        end = max(start, end - length)
    return start, end


def _after_tags(stream, position):
    """Where the tags that begin at a position end."""
    while True:
        stream.seek(position)
        header = stream.read(32)
        if header.startswith(b"ID3") and len(header) >= 10:
            position += 10 + _seven_bits(header[6:10]) + (10 if header[5] & 16 else 0)
        elif header.startswith(b"TAG"):
            position += 128
        elif header.startswith(b"APETAGEX") and len(header) == 32:
            size, flags = struct.unpack("<12xI4xI8x", header)
            position += 32 + (size if flags & 2**29 else 0)
        else:
            return position


def _seven_bits(data):
    return sum((byte & 127) << shift for byte, shift in zip(data, (21, 14, 7, 0)))


# --------------------------------------------------------- lengths of frames, 0 if they cannot be one


def _mpeg(header):
    return _mpeg_length(header[1], header[2]) if header[:1] == b"\xff" and len(header) >= 4 else 0


_KBPS = {  # by version 1 or not, and layer
    (True, 1): range(0, 449, 32),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_KBPS[False, 3] = _KBPS[False, 2]


@functools.cache
def _mpeg_length(second, third):
    """From the two bytes that say it; frames of a free bit rate do not."""
    version, layer, rate = second >> 3 & 3, 4 - (second >> 1 & 3), third >> 2 & 3
    if second < 0xE0 or version == 1 or layer == 4 or rate == 3 or third >> 4 in (0, 15):
        return 0
    rate = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits = 1000 * _KBPS[version == 3, layer][third >> 4]
    padding = third >> 1 & 1
    if layer == 1:
        return 4 * (12 * bits // rate + padding)
    return (72 if layer == 3 and version != 3 else 144) * bits // rate + padding


def _nb_timesteps(header):
    """Samples of an MPEG audio frame."""
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    return 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152


def _claim(header):
    """How many frames an MPEG audio file has, as its first one says in a place that decoders skip; None if not."""
    if len(header) < _HEADER:
        return None
    mono = header[3] >> 6 == 3
    place = 4 + ((17 if mono else 32) if header[1] & 8 else (9 if mono else 17))
    if header[place : place + 4] in (b"Xing", b"Info") and header[place + 7] & 1:
        return int.from_bytes(header[place + 8 : place + 12], "big")
    return int.from_bytes(header[50:54], "big") if header[36:40] == b"VBRI" else None


def _adts(header):
    if len(header) < 6 or header[0] != 0xFF or header[1] & 0xF6 != 0xF0:
        return 0
    length = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    return length if length >= 7 else 0


_AC3_KBPS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)


def _ac3(header):
    if header[:2] != b"\x0b\x77" or len(header) < 6:
        return 0
    if header[5] >> 3 > 10:  # E-AC-3
        return 2 * (((header[2] & 7) << 8 | header[3]) + 1)
    rate, code = header[4] >> 6, header[4] & 63
    if rate == 3 or code >= 2 * len(_AC3_KBPS):
        return 0
    kbps = _AC3_KBPS[code // 2]
    return 2 * (2 * kbps, 320 * kbps // 147 + code % 2, 3 * kbps)[rate]


def _dts(header):
    if header[:4] != b"\x7f\xfe\x80\x01" or len(header) < 8:
        return 0
    return ((header[5] & 3) << 12 | header[6] << 4 | header[7] >> 4) + 1


# Length of a frame; how it begins; which bits of its first four bytes are the same in all frames
_KINDS: dict[str, tuple[Callable, bytes, int]] = {
    "mp3": (_mpeg, b"\xff", 0xFFFE0C00),
    "aac": (_adts, b"\xff", 0xFFFE3C00),
    "ac3": (_ac3, b"\x0b\x77", 0xFFFF0000),
    "eac3": (_ac3, b"\x0b\x77", 0xFFFF0000),
    "dts": (_dts, b"\x7f\xfe\x80\x01", 0xFFFFFFFF),
}
