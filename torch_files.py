"""torch's files without torch: state_dicts as torch.save writes them, in its zip and its legacy format.

Reading a file never runs what the file says: `_Unpickler` knows tensors only.
"""

from __future__ import annotations  # unions, on Python 3.9

import functools
import io
import math
import pickle
import re
import zipfile
from typing import BinaryIO, NamedTuple

import numpy as np

import utils

# ----------------------------------------------------------------------------- names of openunmix

_SAME = ("input_mean", "input_scale", "output_mean", "output_scale")
_BN = {"beta": "bias", "gamma": "weight", "mean": "running_mean", "var": "running_var"}  # ours: torch's
_LSTM = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_COUNTERS = tuple(f"bn{i}.num_batches_tracked" for i in (1, 2, 3))
# What openunmix' own strict=False passes over: the filter bank that models of 2019 kept in their state.
_IGNORED = _COUNTERS + ("sample_rate", "stft.window", "transform.0.window")


def to_state(params: dict, nb_layers: int) -> dict:
    """The parameters of one OpenUnmix, by our names, as openunmix 1.3.0's state_dict; see `weights.to_torch`."""
    state = {name: params[name] for name in _SAME}
    for i in (1, 2, 3):
        state[f"fc{i}.weight"] = params[f"fc{i}/affine/W"].T
        state.update({f"bn{i}.{theirs}": params[f"fc{i}/bn/{ours}"].reshape(-1) for ours, theirs in _BN.items()})
        state[f"bn{i}.num_batches_tracked"] = np.int64(0)
    for k in range(nb_layers):
        directions, _, hidden, _ = params[f"lstm/weight_l{k}"].shape
        for d, reverse in enumerate(("", "_reverse")[:directions]):
            weight = params[f"lstm/weight_l{k}"][d].reshape(4 * hidden, -1)
            state[f"lstm.weight_ih_l{k}{reverse}"] = weight[:, :-hidden]
            state[f"lstm.weight_hh_l{k}{reverse}"] = weight[:, -hidden:]
            for bias in ("bias_ih", "bias_hh"):
                state[f"lstm.{bias}_l{k}{reverse}"] = params[f"lstm/{bias}_l{k}"][d].reshape(-1)
    return {name: np.array(value, order="C") for name, value in state.items()}


def from_state(state: dict) -> dict:
    """The inverse of `to_state`, as float32.

    Raises:
        ValueError: names that are unknown or missing, or an LSTM whose arrays cannot be put together.
    """
    state = {name: np.asarray(value) for name, value in state.items() if name not in _IGNORED}
    nb_layers = max(1, sum(bool(re.fullmatch(r"lstm\.weight_ih_l\d+", name)) for name in state))
    reverses = ("", "_reverse") if "lstm.weight_ih_l0_reverse" in state else ("",)
    taken = {}

    def take(name):
        taken[name] = state.get(name, np.empty((0, 0)))
        return taken[name]

    params = {name: take(name) for name in _SAME}
    for i in (1, 2, 3):
        params[f"fc{i}/affine/W"] = take(f"fc{i}.weight").T
        params.update({f"fc{i}/bn/{ours}": take(f"bn{i}.{theirs}")[None, None] for ours, theirs in _BN.items()})
    layers = [
        {part: [take(f"lstm.{part}_l{k}{reverse}") for reverse in reverses] for part in _LSTM} for k in range(nb_layers)
    ]
    problems = [f"unknown {name}" for name in state if name not in taken]
    problems += [f"missing {name}" for name in taken if name not in state]
    if problems:
        raise ValueError(f"these weights do not fit: {utils.some(problems)}")
    for k, parts in enumerate(layers):
        try:
            weight = np.stack([np.concatenate(pair, axis=1) for pair in zip(parts["weight_ih"], parts["weight_hh"])])
            params[f"lstm/weight_l{k}"] = weight.reshape(len(weight), 4, weight.shape[1] // 4, -1)
            for bias in ("bias_ih", "bias_hh"):
                value = np.stack(parts[bias])
                params[f"lstm/{bias}_l{k}"] = value.reshape(len(value), 4, -1)
        except ValueError:
            shapes = ", ".join(f"{part} {[value.shape for value in values]}" for part, values in parts.items())
            raise ValueError(f"the LSTM's layer {k} does not fit together: {shapes}") from None
    return {name: np.array(value, np.float32, order="C") for name, value in params.items()}


# --------------------------------------------------------------------------------------- reading


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple
    stride: tuple

    def array(self, data, byteorder):
        """The tensor's values in a float32 array; `data` are the bytes of its storage."""
        dtype = np.dtype("u2" if self.storage.dtype == "bfloat16" else self.storage.dtype).newbyteorder(byteorder)
        nbytes = self.storage.numel * dtype.itemsize
        if not 0 <= nbytes <= len(data):
            raise ValueError(f"a storage of {nbytes} bytes has only {len(data)}")
        strides = [dtype.itemsize * stride for stride in self.stride]
        try:  # numpy refuses a view that leaves its buffer
            view = np.ndarray(self.size, dtype, memoryview(data)[:nbytes], dtype.itemsize * self.offset, strides)
        except (ValueError, OverflowError):
            raise ValueError(f"a tensor of shape {self.size} that does not lie within its storage") from None
        if self.storage.dtype == "bfloat16":  # the upper half of a float32
            return (view.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            return view.astype(np.float32, copy=False)


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    tensor = _Tensor(storage, offset, tuple(size), tuple(stride))
    numbers = (offset, *tensor.size, *tensor.stride)  # lists, multiplied, would fill the memory
    if not isinstance(storage, _Storage) or metadata or len(numbers) > 17 or any(type(n) is not int for n in numbers):
        raise ValueError("a tensor of an unknown kind")
    return tensor


_DTYPES = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64"}
_DTYPES.update({"Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"})
_GLOBALS = {
    ("collections", "OrderedDict"): lambda: {},
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad=True, hooks=None: tensor,
    **{(module, f"{name}Storage"): dtype for name, dtype in _DTYPES.items() for module in ("torch", "torch.cuda")},
    **{("torch", dtype): dtype for dtype in _DTYPES.values()},
}


_OPCODES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    EMPTY_DICT EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BINPERSID
"""


class _Opcodes(dict):
    def __missing__(self, code):
        raise ValueError(f"pickle operation {code:#04x} is refused: only tensors are read")


class _Unpickler(pickle._Unpickler):
    """Reads pickles of dicts of tensors: a few opcodes, and the few globals in `_GLOBALS`.

    Python's own unpickler in Python rather than in C, since the latter allocates whatever a file claims.
    """

    dispatch = _Opcodes(
        (getattr(pickle, name)[0], pickle._Unpickler.dispatch[getattr(pickle, name)[0]]) for name in _OPCODES.split()
    )

    def __init__(self, stream):
        super().__init__(stream)
        self.storages = {}

    def find_class(self, module, name):
        if (module, name) not in _GLOBALS:
            raise ValueError(f"it refers to {module}.{name}, which is refused: only tensors are read")
        return _GLOBALS[module, name]

    def persistent_load(self, saved):
        storage = _Storage(*saved[1:3], saved[4])
        view = saved[5] if len(saved) > 5 else None  # of the time before torch 1.0
        if saved[0] != "storage" or view or [type(field) for field in storage] != [str, str, int]:
            raise ValueError("a storage of an unknown kind")
        if storage.dtype not in _DTYPES.values():  # a string of the file's own, such as numpy's "O": pointers
            raise ValueError(f"a storage of unknown type {storage.dtype}")
        return self.storages.setdefault(storage.key, storage)

    def set_items(self, pairs):
        # plain keys only: the hash of a deeply nested tuple overflows the C stack
        if type(self.stack[-1]) is not dict or any(type(key) not in (str, int) for key in pairs[::2]):
            raise ValueError("a dict of an unknown kind")
        self.stack[-1].update(zip(pairs[::2], pairs[1::2]))

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self):
        self.set_items(self.pop_mark())

    def load_build(self):
        self.stack.pop()  # attributes of an OrderedDict (its _metadata): nothing we need

    dispatch.update({pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.BUILD[0]: load_build})


class _Limited:
    """A stream of which no more than `room` bytes are read: first a directory or pickles, which are small."""

    def __init__(self, stream):
        self.stream, self.room = stream, _LARGEST
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def _take(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise ValueError("it holds more than a few tensors")
        return data

    def read(self, size=-1):
        return self._take(self.stream.read(min(size, self.room + 1) if size >= 0 else self.room + 1))

    def readline(self):
        return self._take(self.stream.readline(self.room + 1))


_LARGEST = 2**18  # bytes: the pickle of a training checkpoint of umxl has 20 000


def read(stream: BinaryIO, size: int) -> dict[str, np.ndarray]:
    """The state_dict in what torch.save wrote: name -> float32 array.

    Args:
        stream: a file of `size` bytes, in the zip or the legacy format
    Raises:
        ValueError: the file asks for more than tensors, or claims more than it holds. Garbage raises nearly anything.
    """
    is_zip = stream.read(2) == b"PK"
    stream.seek(0)
    saved, storage, byteorder = _open_zip(stream, size) if is_zip else _open_legacy(stream, size)
    if isinstance(saved, dict):
        saved = saved.get("state_dict", saved)  # a training checkpoint has it beside the optimizer's
    if not isinstance(saved, dict):
        raise ValueError("not a state_dict")
    saved = {str(name): tensor for name, tensor in saved.items() if name not in _IGNORED}
    for name, tensor in saved.items():
        if not isinstance(tensor, _Tensor):
            raise ValueError(f"{name} is not a tensor")
    # strides of 0 let a few bytes claim any size; what a real model holds fits into its file
    if sum(math.prod(tensor.size) for tensor in saved.values()) > max(size, 2**20):
        raise ValueError("its tensors claim more than the file holds")
    return {name: tensor.array(storage(tensor.storage.key), byteorder) for name, tensor in saved.items()}


def _open_zip(stream, size):
    limited = _Limited(stream)
    archive = zipfile.ZipFile(limited)
    records = archive.infolist()
    if any(record.compress_type for record in records) or sum(record.file_size for record in records) > size:
        raise ValueError("its zip records are compressed, or claim more than the file holds: not torch's")
    limited.room = 2 * size  # for the records, with their headers
    pickles = [record for record in records if record.filename.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError("a zip archive, but not of torch.save")
    folder = pickles[0].filename[: -len("data.pkl")]
    saved = _Unpickler(_Limited(io.BytesIO(archive.read(pickles[0])))).load()
    order = archive.read(folder + "byteorder") if folder + "byteorder" in archive.namelist() else b"little"
    byteorder = {b"little": "<", b"big": ">"}[order[:6]]
    return saved, functools.cache(lambda key: archive.read(f"{folder}data/{key}")), byteorder


def _open_legacy(stream, size):
    limited = _Limited(stream)
    if _Unpickler(limited).load() != 0x1950A86A20F9469CFC6C:  # torch.serialization.MAGIC_NUMBER
        raise ValueError("a pickle, but not of torch.save")
    for _ in ("version of the format", "the writer's machine"):
        _Unpickler(limited).load()
    unpickler = _Unpickler(limited)
    saved, storages = unpickler.load(), {}
    for key in _Unpickler(limited).load():
        if type(key) is not str:
            raise ValueError("a storage of an unknown kind")
        dtype = unpickler.storages[key].dtype
        nbytes = int.from_bytes(stream.read(8), "little") * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)
        storages[key] = stream.read(nbytes) if nbytes <= size else b""
        if len(storages[key]) < nbytes:
            raise ValueError("the file is truncated")
    return saved, storages.__getitem__, "<"


# --------------------------------------------------------------------------------------- writing


def write(stream: BinaryIO, state: dict[str, np.ndarray]) -> None:
    """Write a state_dict, name -> float32 or int64 array, C-contiguous, as torch.save does.

    The zip format is spelt out: its pickle names things of torch that are not here to be pickled.
    """

    def item(value):
        if isinstance(value, bytes):  # already pickled
            return value
        if isinstance(value, str):
            return pickle.BINUNICODE + len(value).to_bytes(4, "little") + value.encode("ascii")
        if isinstance(value, tuple):
            return pickle.MARK + b"".join(map(item, value)) + pickle.TUPLE
        return pickle.BININT + value.to_bytes(4, "little")

    ordered_dict = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    records, tensors = {}, b""
    for key, (name, value) in enumerate(state.items()):
        records[f"data/{key}"] = value.astype(value.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data
        storage_type = b"ctorch\nLongStorage\n" if value.dtype == np.int64 else b"ctorch\nFloatStorage\n"
        storage = item(("storage", storage_type, str(key), "cpu", value.size)) + pickle.BINPERSID
        strides = tuple(stride // value.itemsize for stride in value.strides)
        arguments = item((storage, 0, value.shape, strides, pickle.NEWFALSE, ordered_dict))
        tensors += item(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + pickle.REDUCE
    content = pickle.PROTO + b"\x02" + ordered_dict + pickle.MARK + tensors + pickle.SETITEMS + pickle.STOP
    records = {"data.pkl": content, "byteorder": b"little", **records, "version": b"3\n"}
    with zipfile.ZipFile(stream, "w") as archive:
        for name, record in records.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), record)  # no date: same weights, same file
