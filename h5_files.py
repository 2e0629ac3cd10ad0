"""NNabla's .h5 files: arrays by name, as nn.save_parameters writes them, and a checksum over all that ours hold.

HDF5's own library is not asked. Damaged or made up files end the process with a segmentation fault in it, or keep it
for ever, and so does a disk that is full. Of its format, files of parameters need little: superblock 0, object headers
1, groups that are B-trees of names, contiguous arrays (HDF5 File Format Specification 3.0). That is read and written
here, anything else is refused.

The checksum is over what a file says: names, types, shapes and values, their order, which are learnt, and the
attributes of the file. So it also notices a value that somebody changed with care.
"""

from __future__ import annotations  # unions, on Python 3.9

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from struct import Struct
from typing import Any, BinaryIO, NamedTuple

import numpy as np

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_CHECKSUM = "checksum"  # the attribute of the file that holds it

# --------------------------------------------------------------------------------------- reading


def read(stream: BinaryIO, size: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file of `size` bytes, name -> float array, in their order; and its attributes.

    Those are text or arrays of numbers; of others it says None.

    Raises:
        ValueError: it holds other things than arrays, claims more than it holds, or does not match its checksum.
            Garbage raises errors of other kinds, too.
    """
    file, found = _File(stream, size), []
    with ThreadPoolExecutor(1) as pool:
        attributes = {name: file.value(claim) for name, claim in file.root.attributes.items()}
        for name, item in file.arrays():
            index, need_grad = (int(file.value(item.attributes.get(key, _ZERO))) for key in ("index", "need_grad"))
            value = file.array(name, item)
            found.append((index, name, need_grad, value, pool.submit(zlib.crc32, _bytes(value))))
    found.sort(key=lambda entry: entry[:2])
    if _CHECKSUM in attributes:
        claimed = attributes.pop(_CHECKSUM)
        if claimed != _checksum([(*entry[:4], entry[4].result()) for entry in found], attributes):
            raise ValueError("it is damaged: its contents do not match its checksum")
    arrays = {name: value for _, name, _, value, _ in found}
    if len(arrays) < len(found):
        raise ValueError("it is damaged: a name is there twice")
    return arrays, attributes


class _Claim(NamedTuple):
    """What an attribute says of itself."""

    dtype: np.dtype | None  # None: neither numbers nor text; object: text that lies elsewhere
    shape: tuple | None  # None: no value
    data: bytes


_ZERO = _Claim(np.dtype("u1"), (), b"\0")


class _Object(NamedTuple):
    """A group or an array, of the messages of its header."""

    attributes: dict[str, _Claim]
    messages: dict[int, bytes]  # {kind: content}, of those of which there is one


# Kinds of messages
_NIL, _SPACE, _TYPE, _LAYOUT, _ATTRIBUTE, _CONTINUED, _GROUP = 0, 1, 3, 8, 12, 16, 17
_PASSED_OVER = {4, 5, 18}  # values where nothing was written; when it was
# Structures: after the superblock, headers of objects, a pair of numbers; of a group its names, its B-tree, a leaf of
# that, an entry of this; of texts their heap, an item of it, and how an attribute refers to that
_SUPERBLOCK = Struct("<8sB4xBBxHHIQQQQQQ24x")
_HEADER, _MESSAGE, _PLACE = Struct("<BxHII4x"), Struct("<HHB3x"), Struct("<QQ")
_NAMES, _TREE, _LEAF, _ENTRY = Struct("<4sB3xQQQ"), Struct("<4sBBHQQ"), Struct("<4sBxH"), Struct("<QQI4x16x")
_HEAP, _ITEM, _TEXT, _PARTS = Struct("<4sB3xQ"), Struct("<HH4xQ"), Struct("<IQI"), Struct("<BxHHH")
_MOST, _DEEPEST = 2**16, 32  # pieces that are looked at, some 8 per array; groups within groups
_LONGEST, _LARGEST = 2**10, 2**22  # bytes of a name, and of a heap of texts


class _File:
    """Looks at pieces of a file, of which none is believed. Raises ValueError and what Struct and NumPy raise."""

    def __init__(self, stream, size):
        self.stream, self.size, self.room, self.left = stream, size, 2 * size, _MOST
        _, version, of_offsets, of_lengths, _, _, _, base, _, end, _, _, root = self.unpack(_SUPERBLOCK, 0)
        if version:
            raise ValueError("its HDF5 format is newer than that of NNabla's files")
        if (of_offsets, of_lengths, base) != (8, 8, 0) or end > size:
            raise ValueError("it is truncated, or of another kind than NNabla's files")
        self.root = self.object(root)

    def take(self, address, size):
        """A piece; all of them together are not much more than the file."""
        self.left, self.room = self.left - 1, self.room - size
        if self.left < 0 or self.room < 0:
            raise ValueError("it has more arrays and groups, or larger ones, than a network of its size")
        if address + size > self.size:
            raise ValueError("it is damaged: something should lie behind its end")
        self.stream.seek(address)
        return self.stream.read(size)

    def unpack(self, form, address):
        return form.unpack(self.take(address, form.size))

    def object(self, address):
        version, count, _, length = self.unpack(_HEADER, address)
        blocks, attributes, messages, number = [(address + _HEADER.size, length)], {}, {}, 0
        for place in blocks:
            block, position = self.take(*place), 0
            while position < len(block):
                kind, size, flags = _MESSAGE.unpack_from(block, position)
                position += _MESSAGE.size + size
                content, number = block[position - size : position], number + 1
                if kind == _CONTINUED:
                    blocks.append(_PLACE.unpack(content))
                elif kind == _ATTRIBUTE:
                    name, claim = _attribute(content)
                    if name in attributes:
                        raise ValueError(f"its attribute {name} is there twice")
                    attributes[name] = claim
                elif kind in (_SPACE, _TYPE, _LAYOUT, _GROUP) and kind not in messages:
                    messages[kind] = content
                elif kind != _NIL and kind not in _PASSED_OVER:
                    kind = -1
                if kind < 0 or flags & 2 or position > len(block):  # shared with other objects
                    raise ValueError("it is damaged, or holds more than NNabla's files do")
        if version != 1 or number != count:
            raise ValueError("it is damaged, or its HDF5 format is newer than that of NNabla's files")
        return _Object(attributes, messages)

    def arrays(self, group=None, path="", depth=0) -> Iterator[tuple[str, _Object]]:
        """Those of a group and of the groups in it, with their names."""
        if depth > _DEEPEST:
            raise ValueError("it has more groups within each other than a network")
        tree, heap = _PLACE.unpack((group or self.root).messages[_GROUP])
        signature, version, size, _, address = self.unpack(_NAMES, heap)
        if signature != b"HEAP" or version != 0:
            raise ValueError("it is damaged: there are no names of a group")
        names = self.take(address, size)
        for offset, address, kind in self.entries(tree):
            name = path + names[offset : offset + _LONGEST].partition(b"\0")[0].decode()
            if kind not in (0, 1):
                raise ValueError(f"{name} is a link to something else")
            item = self.object(address)
            if _GROUP in item.messages:
                yield from self.arrays(item, f"{name}/", depth + 1)
            else:
                yield name, item

    def entries(self, address, expected=None):
        """What a B-tree lists: place of the name, of the object, and whether it is a link."""
        signature, kind, level, count, _, _ = self.unpack(_TREE, address)
        if signature != b"TREE" or kind != 0 or level != (level if expected is None else expected):
            raise ValueError("it is damaged: there is no list of a group")
        places = np.frombuffer(self.take(address + _TREE.size, 16 * count), "<u8")[1::2].tolist()
        for place in places:
            if level:
                yield from self.entries(place, level - 1)
                continue
            signature, version, count = self.unpack(_LEAF, place)
            if signature != b"SNOD" or version != 1:
                raise ValueError("it is damaged: there is no part of a list of a group")
            yield from _ENTRY.iter_unpack(self.take(place + _LEAF.size, _ENTRY.size * count))

    def array(self, name, item):
        """The values of an array of floats."""
        dtype, shape, layout = _dtype(item.messages[_TYPE]), _shape(item.messages[_SPACE]), item.messages[_LAYOUT]
        # version 3, contiguous: of a chunk, and of what is compressed, a file could claim any size
        if dtype is None or dtype.kind != "f" or shape is None or 0 in shape or layout[:2] != b"\3\1":
            raise ValueError(f"{name} is not an array of numbers")
        address, size = _PLACE.unpack_from(layout, 2)
        if size != math.prod(shape) * dtype.itemsize or address + size > self.size or size > self.room:
            raise ValueError(f"{name} claims shape {shape}, more than the file holds")
        self.room -= size
        self.stream.seek(address)
        values = np.empty(math.prod(shape), dtype)
        if self.stream.readinto(values) < size:
            raise ValueError("it is truncated")
        return values.reshape(shape)

    def value(self, claim):
        """Of an attribute: text, a number or an array of numbers; None if it is something else."""
        dtype, shape, data = claim
        if dtype is None or shape is None or (dtype.kind in "OS" and shape != ()):
            return None
        if dtype.kind == "O":
            length, address, index = _TEXT.unpack_from(data)
            return self.text(address, index, length).decode() if length else ""
        values = np.frombuffer(data, dtype, math.prod(shape)).reshape(shape)[()]
        return values.decode() if dtype.kind == "S" else values

    def text(self, address, index, length):
        """An item of a heap that several share."""
        signature, version, size = self.unpack(_HEAP, address)
        heap, position = self.take(address, min(size, _LARGEST)), _HEAP.size
        while signature == b"GCOL" and version == 1:
            number, _, size = _ITEM.unpack_from(heap, position)
            position += _ITEM.size
            if number == index and length <= size:
                return heap[position : position + length]
            position += -(size // -8) * 8
            if not number:
                break
        raise ValueError("it is damaged: a text is not where it should be")


def _attribute(content):
    """Name and claim, of the message of an attribute."""
    version, of_name, of_type, of_space = _PARTS.unpack_from(content)
    position, parts = 8 + (version == 3), []
    if version not in (1, 3):
        raise ValueError("it is damaged, or holds more than NNabla's files do")
    for size in (of_name, of_type, of_space):
        parts.append(content[position : position + size])
        position += -(size // -8) * 8 if version == 1 else size
    return parts[0].rstrip(b"\0").decode(), _Claim(_dtype(parts[1]), _shape(parts[2]), content[position:])


def _shape(content):
    """Of the message of a data space; None if it has no elements at all."""
    version, rank, _, kind = content[:4]
    if version not in (1, 2) or rank > 32:
        raise ValueError("it is damaged: an array has no shape")
    start = 8 if version == 1 else 4
    return None if version == 2 and kind == 2 else tuple(Struct(f"<{rank}Q").unpack_from(content, start))


def _dtype(content):
    """Of the message of a type; object for text that lies elsewhere, None for what is neither number nor text."""
    kind, bits, size = content[0] & 15, content[1], int.from_bytes(content[4:8], "little")
    if kind == 8:  # an enumeration, such as true and false: its numbers
        return _dtype(content[8:])
    if kind == 3 and 0 < size < 2**16:
        return np.dtype(f"S{size}")
    if kind == 9 and bits & 15 == 1:
        return np.dtype(object)
    if kind == 0 and size in (1, 2, 4, 8):
        return np.dtype(f"{'<>'[bits & 1]}{'ui'[bits >> 3 & 1]}{size}")
    return _FLOATS.get((content[1:4], content[4:20])) if kind == 1 else None


_FLOATS = {  # sign, exponent and mantissa where IEEE 754 has them
    (bytes([0x20 | order, 8 * size - 1, 0]), Struct("<IHHBBBBI").pack(size, 0, 8 * size, m, e, 0, m, bias)): np.dtype(
        f"{'<>'[order]}f{size}"
    )
    for size, m, e, bias in ((2, 10, 5, 15), (4, 23, 8, 127), (8, 52, 11, 1023))
    for order in (0, 1)
}


# ------------------------------------------------------------------------------------- checksum


def _bytes(value):
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _checksum(entries, attributes):
    """Of (index, name, need_grad, array, the array's CRC-32), sorted.

    CRC-32, which zip files trust, costs a third of what SHA-256 does, where processors have instructions for that.
    """
    told = [[*entry[:3], entry[3].dtype.str, entry[3].shape, entry[4]] for entry in entries]
    for name, value in sorted(attributes.items()):
        if value is None:
            raise ValueError(f"its attribute {name} is neither text nor numbers")
        array = np.asarray(value.encode() if isinstance(value, str) else value)
        told.append([name, array.dtype.str, array.shape, zlib.crc32(_bytes(array))])
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


# -------------------------------------------------------------------------------------- writing


def write(
    stream: BinaryIO, arrays: dict[str, np.ndarray], is_learnt: Callable[[str], bool], attributes: dict[str, Any]
) -> None:
    """Write a file in the layout of nn.save_parameters.

    Args:
        stream: at the start of a new file
        arrays: name -> float32 array, C-contiguous, not empty
        is_learnt: says of a name whether it has a gradient
        attributes: text, or float32 arrays
    """
    entries = [(index, name, int(is_learnt(name)), value) for index, (name, value) in enumerate(arrays.items())]
    root, position = {}, _SUPERBLOCK.size
    stream.write(bytes(position))
    with ThreadPoolExecutor(1) as pool:
        sums = pool.map(zlib.crc32, map(_bytes, arrays.values()))  # meanwhile
        for index, name, need_grad, value in entries:
            stream.write(_bytes(value))
            stream.write(bytes(-value.nbytes % 8))
            messages = [
                _message(_SPACE, _space(value.shape)),
                _message(_TYPE, _FLOAT),
                _message(_LAYOUT, b"\3\1" + _PLACE.pack(position, value.nbytes)),
                _attribute_message("need_grad", _TRUTH, (), bytes([need_grad])),
                _attribute_message("index", _INTEGER, (), index.to_bytes(8, "little")),
            ]
            position += value.nbytes + -value.nbytes % 8
            *groups, last = name.split("/")
            group = root
            for component in groups:
                group = group.setdefault(component, {})
            group[last] = messages
        checksum = _checksum([(*entry, crc) for entry, crc in zip(entries, sums)], attributes)
    places = _Places(position, max(4, (_largest(root) + 1) // 2))
    messages = places.attributes({**attributes, _CHECKSUM: checksum})
    address = places.group(root, messages)
    stream.write(places.data)
    stream.seek(0)
    end = position + len(places.data)
    stream.write(_SUPERBLOCK.pack(SIGNATURE, 0, 8, 8, places.leaf, _BRANCH, 0, 0, _NOWHERE, end, _NOWHERE, 0, address))


_NOWHERE = 2**64 - 1
_BRANCH = 16  # half of the places that each node of a B-tree has
# Types: float32, int64, true or false in a byte, and text in UTF-8 that lies elsewhere
_FLOAT = b"\x11" + next(key[0] + key[1] for key, dtype in _FLOATS.items() if dtype == np.dtype("<f4"))
_INTEGER = b"\x10\x08\0\0" + Struct("<IHH").pack(8, 0, 64)
_TRUTH = b"\x18\2\0\0\1\0\0\0" + b"\x10\x08\0\0" + Struct("<IHH").pack(1, 0, 8) + b"FALSE\0\0\0TRUE\0\0\0\0" + b"\0\1"
_STRING = b"\x19\1\1\0" + Struct("<I").pack(16) + b"\x10\0\0\0" + Struct("<IHH").pack(1, 0, 8)


def _padded(content):
    return content + bytes(-len(content) % 8)


def _message(kind, content):
    content = _padded(content)
    return _MESSAGE.pack(kind, len(content), 0) + content


def _space(shape):
    return Struct(f"<BBB5x{len(shape)}Q").pack(1, len(shape), 0, *shape)


def _attribute_message(name, kind, shape, data):
    parts = name.encode() + b"\0", kind, _space(shape)
    return _message(_ATTRIBUTE, _PARTS.pack(1, *map(len, parts)) + b"".join(map(_padded, parts)) + data)


def _largest(group):
    """How many names the largest of a group and the groups in it has."""
    return max([len(group), *(_largest(item) for item in group.values() if isinstance(item, dict))])


class _Places:
    """What stands behind the arrays, from an address on."""

    def __init__(self, start, leaf):
        self.start, self.data, self.leaf = start, bytearray(), leaf  # half of the places that each leaf has

    def add(self, content):
        """Its address."""
        self.data += _padded(content)
        return self.start + len(self.data) - len(_padded(content))

    def attributes(self, attributes):
        texts = {name: value.encode() for name, value in attributes.items() if isinstance(value, str)}
        items = [_padded(_ITEM.pack(k, 1, len(text)) + text) for k, text in enumerate(texts.values(), 1)]
        heap = b"".join(items).ljust(4096 - _HEAP.size - _ITEM.size, b"\0")  # with an item of no text behind it
        used = sum(map(len, items))
        heap = heap[:used] + _ITEM.pack(0, 0, len(heap) - used + _ITEM.size) + heap[used:]
        address = self.add(_HEAP.pack(b"GCOL", 1, _HEAP.size + len(heap)) + heap)
        messages = [
            _attribute_message(name, _STRING, (), _TEXT.pack(len(text), address, k))
            for k, (name, text) in enumerate(texts.items(), 1)
        ]
        for name, value in attributes.items():
            if name not in texts:
                messages.append(_attribute_message(name, _FLOAT, value.shape, value.tobytes()))
        return messages

    def header(self, messages):
        return self.add(_HEADER.pack(1, len(messages), 1, sum(map(len, messages))) + b"".join(messages))

    def group(self, items, messages=()):
        """Address of the header of a group of arrays (lists of messages) and groups (dicts), by name."""
        names, entries, offset = bytearray(8), b"", 0
        for name, item in sorted((name.encode(), item) for name, item in items.items()):
            offset = len(names)
            names += _padded(name + b"\0")
            place = self.group(item) if isinstance(item, dict) else self.header(item)
            entries += _ENTRY.pack(offset, place, 0)
        heap = self.add(_NAMES.pack(b"HEAP", 0, len(names), 1, self.start + len(self.data) + _NAMES.size) + names)
        leaf = self.add(_LEAF.pack(b"SNOD", 1, len(items)) + entries.ljust(2 * self.leaf * _ENTRY.size, b"\0"))
        tree = _TREE.pack(b"TREE", 0, 0, 1, _NOWHERE, _NOWHERE) + Struct("<QQQ").pack(0, leaf, offset)
        tree = self.add(tree.ljust(_TREE.size + 8 * (4 * _BRANCH + 1), b"\0"))
        return self.header([_message(_GROUP, _PLACE.pack(tree, heap)), *messages])


# --------------------------------------------------------------------------------- Sony's names


def from_sony(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sony's LSTM (all layers after the first in one array; one bias) to ours. Other names are the same."""
    converted = {}
    for name, value in params.items():
        scope, _, leaf = name.partition("/lstm/")
        if leaf == "weight_l0":
            converted[f"{scope}/weight_l0"] = value
        elif leaf == "weight":
            converted.update({f"{scope}/weight_l{k}": weight for k, weight in enumerate(value, start=1)})
        elif leaf == "bias":
            for k, bias in enumerate(value):
                converted[f"{scope}/bias_ih_l{k}"] = bias
                converted[f"{scope}/bias_hh_l{k}"] = np.zeros_like(bias)
        else:
            converted[name] = value
    return converted
