"""Whether a sound file is all there, and is one recording: its container, walked from end to end.

Decoders are made to go on: after a hole, at the end of half a file, at the end of the first of several recordings in
one file, most of them say nothing. So what the file says of itself is compared with what lies in it: the lengths of
its chunks, the checksums and numbers of its pages, the headers of its frames. Nothing is decoded, and what cannot be
told (a file that was streamed, and says no length) is not held against it.
"""

from __future__ import annotations  # unions, on Python 3.9

import contextlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import frames
from frames import SEVERAL, TRUNCATED, Damage, damage_at
from utils import UsageError

_ASF, _ASF_DATA = (bytes.fromhex(f"{first}26b2758e66cf11a6d900aa0062ce6c") for first in ("30", "36"))
_EBML = b"\x1a\x45\xdf\xa3"


def check(stream: BinaryIO, name: str | Path) -> None:
    """UsageError, which says `name`, if a sound file is truncated, has a hole, or holds several recordings.

    A file that is no container of a known kind passes. The stream is left anywhere.
    """
    start, end = frames.span(stream)
    stream.seek(start)
    magic = stream.read(16)
    for sign, look in _KINDS.items():
        if magic.startswith(sign, 4 if look is _mp4 else 0):
            with _named(name):
                look(stream, start, end)


def check_frames(stream: BinaryIO, name: str | Path, kind: str) -> frames.Frames | None:
    """As `check`, for files of frames without a container: see `frames.walk`."""
    with _named(name):
        return frames.walk(stream, kind)


@contextlib.contextmanager
def _named(name) -> Iterator[None]:
    try:
        yield
    except Damage as damage:
        raise UsageError(f"{name} {damage}") from None


def _unpack(form, data):
    """As struct.unpack; of data that are too short, the file ends there."""
    if len(data) < struct.calcsize(form):
        raise Damage(TRUNCATED)
    return struct.unpack_from(form, data)


# ---------------------------------------------------------------------------------------- chunks


def _chunks(stream, start, end, form, inclusive=False, pad=1):
    """Yield (kind, start, stop) of chunks that begin with their kind and length; the last may reach beyond the end.

    It does so by 2^62 bytes or more if its length was not known when the header was written.
    """
    size, long = struct.calcsize(form), None
    while start + size <= end:
        stream.seek(start)
        kind, length = struct.unpack(form, stream.read(size))
        if not kind.strip(b"\0") and not length:  # padding, however much of it
            return
        if kind == b"ds64":  # RF64: of the samples, whose own length has 32 bits
            (long,) = _unpack("<8xQ", stream.read(16))
        elif kind == b"data" and length == 2**32 - 1:
            length = 2**63 if long is None else long
        stop = start + length + (0 if inclusive else size)
        if stop < start + size:
            raise damage_at(start)
        yield kind, start + size, stop
        start = stop + -length % pad


def _sound(kind, form, inclusive=False, pad=1, skip=12):
    """A look at the chunk with the samples, and at what comes behind it."""

    def look(stream, start, end):
        stream.seek(start)
        magic = stream.read(4)
        for name, _, stop in _chunks(stream, start + skip, end, form, inclusive, pad):
            if name[:4] == kind and end < stop < 2**62:
                raise Damage(TRUNCATED)
            if name[:4] == magic:
                raise Damage(SEVERAL)

    return look


def _caf(stream, start, end):
    for kind, _, stop in _chunks(stream, start + 8, end, ">4sQ"):
        if kind == b"caff":
            raise Damage(SEVERAL)
        if end < stop < 2**62:
            raise Damage(TRUNCATED)


def _au(stream, start, end):
    stream.seek(start + 4)
    header, length = _unpack(">II", stream.read(8))
    if length == 2**32 - 1:
        return
    if start + header + length > end:
        raise Damage(TRUNCATED)
    stream.seek(start + header + length)
    if stream.read(4) == b".snd":
        raise Damage(SEVERAL)


def _riff(stream, start, end):
    stream.seek(start + 8)
    if stream.read(4) != b"AVI ":
        return _sound(b"data", "<4sI", pad=2)(stream, start, end)
    for kind, begin, stop in _chunks(stream, start, end, "<4sI", pad=2):
        stream.seek(begin)
        if kind == b"RIFF" and stream.read(4) == b"AVI " and begin > start + 8:
            raise Damage(SEVERAL)
        if stop > end and stop - begin != 2**32 - 1:
            raise Damage(TRUNCATED)


def _asf(stream, start, end):
    for kind, begin, stop in _chunks(stream, start, end, "<16sQ", inclusive=True):
        if kind == _ASF and begin > start + 24:
            raise Damage(SEVERAL)
        if kind == _ASF_DATA and begin + 26 == stop:  # of a length that was not known
            return
        if stop > end:
            raise Damage(TRUNCATED)


def _mp4(stream, start, end):
    found, position = set(), start
    while position < end:
        stream.seek(position)
        header = stream.read(16)
        length, kind = _unpack(">I4s", header.ljust(8, b"\0"))
        if length == 1:
            (length,) = _unpack(">8xQ", header)
        elif length == 0 and kind.strip(b"\0"):  # up to the end
            length = end - position
        if not length:
            stream.seek(position)
            if not stream.read(end - position).strip(b"\0"):
                break
        if length < 8 or not (kind.isascii() or kind[:1] == b"\xa9"):
            raise damage_at(position)
        if kind == b"moov" and kind in found:
            raise Damage(SEVERAL)
        found.add(kind)
        position += length
    if position > end or b"moov" not in found:
        raise Damage(TRUNCATED)


# -------------------------------------------------------------------------------------- Matroska

_HEAD, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
_IN_SEGMENT = {0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, 0xEC, 0xBF}
_IN_CLUSTER = {0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0x5854, 0xAF}


def _matroska(stream, start, end):
    position, segment = start, None  # where the segment ends
    while position < (end if segment is None else min(end, segment)):
        stream.seek(position)
        kind, length, body = _element(stream.read(12), position)
        if kind == _HEAD and position > start:
            raise Damage(SEVERAL)
        if kind == _SEGMENT:
            segment = None if length is None else body + length
            length = 0  # what is in it comes next
            if segment is not None and segment > end:
                raise Damage(TRUNCATED)
        elif kind == _CLUSTER and length is None:
            length = 0
        elif kind not in _IN_SEGMENT | _IN_CLUSTER | {_HEAD, _CLUSTER} or length is None:
            raise damage_at(position)
        position = body + length
    if position > end:
        raise Damage(TRUNCATED)
    if position != (end if segment is None else segment):
        raise damage_at(position)
    stream.seek(position)
    if stream.read(4) == _EBML:
        raise Damage(SEVERAL)


def _element(data, position):
    """Number, length (None: unknown) and start of an element, from the bytes at its position."""
    size = 9 - data[0].bit_length()
    if size > 4:
        raise damage_at(position)
    if len(data) <= size or len(data) < size + (more := 9 - data[size].bit_length()):
        raise Damage(TRUNCATED)
    if more > 8:
        raise damage_at(position)
    length = int.from_bytes(data[size : size + more], "big") - (1 << 7 * more)
    if length == (1 << 7 * more) - 1:
        length = None
    return int.from_bytes(data[:size], "big"), length, position + size + more


# ------------------------------------------------------------------------------------------- Ogg

_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))  # each byte's bits, last first
_FIRST, _LAST = 2, 4


def _ogg(stream, start, end):
    """Of every page its checksum, and its number in its stream; of the file its end, and that nothing begins twice."""
    following, flags, begun = {}, 0, False  # the number of each stream's next page; whether the sound has begun
    stream.seek(start)
    while header := stream.read(27):
        position = start
        if not b"OggS".startswith(header[:4]):
            raise damage_at(position)
        flags, serial, number, crc, segments = _unpack("<5xB8xIIIB", header)
        table = stream.read(segments)
        page = b"".join((header[:22], bytes(4), header[26:], table, stream.read(sum(table))))
        start += len(page)
        if len(page) < 27 + segments + sum(table) or len(table) < segments:
            raise Damage(TRUNCATED)
        # Ogg's CRC is that of zlib with the bits of every byte the other way round, and from 0
        found = zlib.crc32(page.translate(_REVERSED), 2**32 - 1) ^ (2**32 - 1)
        if found != int.from_bytes(header[22:26].translate(_REVERSED), "big"):
            raise damage_at(position)
        if flags & _FIRST and begun:
            raise Damage(SEVERAL)
        begun |= not flags & _FIRST
        if not flags & _FIRST and following.get(serial) != number:
            raise damage_at(position)
        following[serial] = (number + 1) % 2**32
    if not flags & _LAST:
        raise Damage(TRUNCATED)


# ---------------------------------------------------------------------------- lossless, in frames


def _once(stream, start, end):
    """Their decoders know how long they are, and stop there: all that is left to find is a second header."""
    stream.seek(start)
    header = stream.read(8)
    before = b""
    while block := stream.read(2**20):
        window = before + block
        found = -1
        while (found := window.find(header[:4], found + 1)) >= 0:
            if window[found + 5 : found + 8] == header[5:]:  # the fifth byte of FLAC has a flag
                raise Damage(SEVERAL)
        before = window[-7:]


# ----------------------------------------------------------------------------------------- kinds

_KINDS = {  # by how they begin
    b"OggS": _ogg,
    b"fLaC": _once,
    b"TTA1": _once,
    b"MAC ": _once,
    b"RIFF": _riff,
    b"RIFX": _sound(b"data", ">4sI", pad=2),
    b"RF64": _sound(b"data", "<4sI", pad=2),
    b"FORM": _sound(b"SSND", ">4sI", pad=2),
    b"riff\x2e\x91\xcf\x11": _sound(b"data", "<16sQ", inclusive=True, pad=8, skip=40),
    b"caff": _caf,
    b".snd": _au,
    _ASF: _asf,
    _EBML: _matroska,
    **dict.fromkeys((b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"), _mp4),
}
