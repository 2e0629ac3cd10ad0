"""Weights of Open-Unmix in three dialects: ours (.h5), Sony's NNabla files (.h5) and torch's (.pth).

Everything outside this module sees one dict, name -> float32 array, with the names of `model.OpenUnmix`
(listed once, in `_shapes`). A joint model (X-UMX) has all of them once per target, with `_bass`,
`_drums`, `_vocals` or `_other` after the first component: `fc1_bass/affine/W`, `input_mean_bass`.

torch is not needed, and reading a file never runs what the file says: `_Unpickler` knows tensors only.
"""

import functools
import io
import math
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import h5py
import nnabla as nn
import numpy as np

import args
import utils

# ----------------------------------------------------------------------------- names and shapes


def _shapes(nb_channels, hidden_size, nb_layers, nb_bins, max_bin, unidirectional):
    """Name -> shape of every parameter of one OpenUnmix."""
    shapes = {"input_mean": (max_bin,), "input_scale": (max_bin,)}
    shapes.update({"output_mean": (nb_bins,), "output_scale": (nb_bins,)})
    layers = {
        "fc1": (nb_channels * max_bin, hidden_size),
        "fc2": (2 * hidden_size, hidden_size),  # the LSTM's input beside its output
        "fc3": (hidden_size, nb_channels * nb_bins),
    }
    for name, shape in layers.items():
        shapes[f"{name}/affine/W"] = shape
        shapes.update({f"{name}/bn/{ours}": (1, 1, shape[1]) for ours in _BN})
    directions = 1 if unidirectional else 2
    gates = (directions, 4, hidden_size // directions)
    for k in range(nb_layers):
        shapes[f"lstm/weight_l{k}"] = gates + (hidden_size + gates[2],)  # input and state side by side
        shapes[f"lstm/bias_ih_l{k}"] = shapes[f"lstm/bias_hh_l{k}"] = gates
    return shapes


_BN = {"beta": "bias", "gamma": "weight", "mean": "running_mean", "var": "running_var"}  # ours: torch's
_COUNTERS = tuple(f"bn{i}.num_batches_tracked" for i in (1, 2, 3))
# What openunmix' own strict=False passes over: the filter bank that models of 2019 kept in their state.
_IGNORED = _COUNTERS + ("sample_rate", "stft.window", "transform.0.window")


def _compare(found, expected):
    """ValueError unless two dicts name -> shape agree, saying where they do not."""
    problems = [f"unknown {name}" for name in found if name not in expected]
    problems += [f"missing {name}" for name in expected if name not in found]
    problems = problems or [
        f"{name} has shape {tuple(found[name])}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if tuple(found[name]) != tuple(shape)
    ]
    if problems:
        more = f" … ({len(problems)} in all)" if len(problems) > 8 else ""
        raise ValueError("these weights do not fit: " + ", ".join(problems[:8]) + more)


def by_target(params):
    """Split a joint model's parameters: {target: parameters with plain names}; {"": params} if not joint."""
    suffixed = re.compile(rf"([^/]+)_({'|'.join(args.TARGETS)})(/.*)?")
    matches = {name: suffixed.fullmatch(name) for name in params}
    if not any(matches.values()):
        return {"": params}
    models = {target: {} for target in args.TARGETS}
    for name, match in matches.items():
        target = match[2] if match else args.TARGETS[0]  # a name that belongs to no target is found unknown there
        models[target][match[1] + (match[3] or "") if match else name] = params[name]
    return models


def describe(params):
    """What rebuilds the model: nb_channels, hidden_size, nb_layers, nb_bins, max_bin, unidirectional.

    Args:
        params: name -> array, of one model or of a joint one (whose targets all have the same sizes)
    Raises:
        ValueError: the names or shapes are not those of any such model.
    """
    found = {}
    for target, model in by_target(params).items():
        try:
            found[target] = _describe_one({name: np.shape(value) for name, value in model.items()})
        except ValueError as error:
            raise ValueError(f"{target}: {error}" if target else str(error)) from None
    sizes = next(iter(found.values()))
    if any(other != sizes for other in found.values()):
        raise ValueError(f"the targets of this joint model differ in size: {found}")
    return sizes


def _describe_one(shapes):
    nb_layers = max(1, sum(name.startswith("lstm/weight_l") for name in shapes))
    _compare(dict.fromkeys(shapes, ()), dict.fromkeys(_shapes(1, 2, nb_layers, 1, 1, False), ()))  # names only
    ndims = {"input_mean": 1, "output_mean": 1, "fc1/affine/W": 2, "fc3/affine/W": 2, "lstm/weight_l0": 4}
    for name, ndim in ndims.items():
        if len(shapes[name]) != ndim or 0 in shapes[name]:
            raise ValueError(f"{name} has shape {shapes[name]}, expected {ndim} dimensions")
    hidden_size, nb_bins = shapes["fc1/affine/W"][1], shapes["output_mean"][0]
    sizes = {
        "nb_channels": shapes["fc3/affine/W"][1] // nb_bins,
        "hidden_size": hidden_size,
        "nb_layers": nb_layers,
        "nb_bins": nb_bins,
        "max_bin": shapes["input_mean"][0],
        "unidirectional": shapes["lstm/weight_l0"][0] == 1,
    }
    if hidden_size % 2 and not sizes["unidirectional"]:
        raise ValueError(f"hidden size {hidden_size} is odd: a bidirectional LSTM has half of it per direction")
    _compare(shapes, _shapes(**sizes))
    return sizes


# ------------------------------------------------------------------------------- parameter scope


def set_parameters(params):
    """Copy values into the current ``nn.parameter_scope``, or create them there if it is empty.

    Args:
        params: name -> array, as `load` returns them
    Raises:
        ValueError: names or shapes are not those in the scope (an empty one takes any OpenUnmix or joint
            model), or values are not finite. The scope is then unchanged.
    """
    values = {name: np.asarray(value, np.float32) for name, value in params.items()}
    existing = nn.get_parameters(grad_only=False)
    if existing:
        _compare({name: value.shape for name, value in values.items()}, {n: v.shape for n, v in existing.items()})
    else:
        describe(values)
    if broken := [name for name, value in values.items() if not np.isfinite(value).all()]:
        raise ValueError(f"these weights are not finite: {', '.join(broken[:8])}")
    for name, value in values.items():
        variable = existing.get(name)
        if variable is None:
            variable = nn.Variable(value.shape, need_grad=_need_grad(name))
            nn.parameter.set_parameter(name, variable)
        variable.data.cast(np.float32)[...] = value


def get_parameters():
    """Copies of everything in the current ``nn.parameter_scope``, name -> float32 array."""
    variables = nn.get_parameters(grad_only=False)
    return {name: np.array(variable.data.get_data("r"), np.float32) for name, variable in variables.items()}


def _need_grad(name):
    return not name.endswith(("/bn/mean", "/bn/var"))


# --------------------------------------------------------------------------------- torch's names


def to_torch(params):
    """Our parameters in the names and shapes of openunmix 1.3.0's state_dict.

    Batch counters, which we do not keep, are 0. Raises ValueError for anything but one OpenUnmix.
    """
    if "" not in by_target(params):
        raise ValueError("a joint model has no counterpart in openunmix")
    sizes = describe(params)
    state = {name: params[name] for name in ("input_mean", "input_scale", "output_mean", "output_scale")}
    for i in (1, 2, 3):
        state[f"fc{i}.weight"] = params[f"fc{i}/affine/W"].T
        state.update({f"bn{i}.{theirs}": params[f"fc{i}/bn/{ours}"].reshape(-1) for ours, theirs in _BN.items()})
        state[f"bn{i}.num_batches_tracked"] = np.int64(0)
    for k in range(sizes["nb_layers"]):
        directions, _, hidden, _ = params[f"lstm/weight_l{k}"].shape
        for d, reverse in enumerate(("", "_reverse")[:directions]):
            weight = params[f"lstm/weight_l{k}"][d].reshape(4 * hidden, -1)
            state[f"lstm.weight_ih_l{k}{reverse}"] = weight[:, :-hidden]
            state[f"lstm.weight_hh_l{k}{reverse}"] = weight[:, -hidden:]
            for bias in ("bias_ih", "bias_hh"):
                state[f"lstm.{bias}_l{k}{reverse}"] = params[f"lstm/{bias}_l{k}"][d].reshape(-1)
    return {name: np.array(value, order="C") for name, value in state.items()}


def from_torch(state):
    """Our parameters from an openunmix state_dict (name -> array); the inverse of `to_torch`.

    Raises ValueError if names or shapes are not those of an OpenUnmix; buffers of older versions are dropped.
    """
    state = {name: np.asarray(value) for name, value in state.items() if name not in _IGNORED}
    nb_layers = max(1, sum(bool(re.fullmatch(r"lstm\.weight_ih_l\d+", name)) for name in state))
    reverses = ("", "_reverse") if "lstm.weight_ih_l0_reverse" in state else ("",)
    smallest = {name: np.empty(shape) for name, shape in _shapes(1, 2, nb_layers, 1, 1, len(reverses) == 1).items()}
    names = to_torch(smallest).keys() - set(_COUNTERS)
    _compare(dict.fromkeys(state, ()), dict.fromkeys(sorted(names), ()))

    params = {name: state[name] for name in ("input_mean", "input_scale", "output_mean", "output_scale")}
    for i in (1, 2, 3):
        params[f"fc{i}/affine/W"] = state[f"fc{i}.weight"].T
        params.update({f"fc{i}/bn/{ours}": state[f"bn{i}.{theirs}"][None, None] for ours, theirs in _BN.items()})
    for k in range(nb_layers):
        parts = {p: [state[f"lstm.{p}_l{k}{r}"] for r in reverses] for p in _LSTM}
        try:
            weight = np.stack([np.concatenate(pair, axis=1) for pair in zip(parts["weight_ih"], parts["weight_hh"])])
            params[f"lstm/weight_l{k}"] = weight.reshape(len(weight), 4, weight.shape[1] // 4, -1)
            for bias in ("bias_ih", "bias_hh"):
                value = np.stack(parts[bias])
                params[f"lstm/{bias}_l{k}"] = value.reshape(len(value), 4, -1)
        except ValueError:
            shapes = ", ".join(f"{part} {[value.shape for value in values]}" for part, values in parts.items())
            raise ValueError(f"the LSTM's layer {k} does not fit together: {shapes}") from None
    params = {name: np.array(value, np.float32, order="C") for name, value in params.items()}
    describe(params)
    return params


_LSTM = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _from_sony(params):
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


# --------------------------------------------------------------------------------------- reading


def load(path):
    """Read weights: our .h5, Sony's .h5, or a .pth or .chkpnt of openunmix (zip and legacy format).

    The content decides, not the extension. Nothing in the file is executed.

    Returns:
        name -> float32 array in our names
    Raises:
        ValueError: not such a file, or damaged, or it asks for more than tensors; one line with the path.
        OSError: it cannot be opened.
    """
    data = Path(path).read_bytes()
    try:
        if data.startswith(b"\x89HDF\r\n\x1a\n"):
            return _from_sony(_read_h5(data))
        if data.startswith((b"PK\x03\x04", b"\x80")):
            return from_torch(_read_torch(data))
        raise ValueError("neither NNabla's .h5 nor torch's .pth")
    except Exception as error:  # garbage makes zipfile, h5py and pickle raise nearly anything
        reason = str(error) if type(error) is ValueError else f"damaged file: {error!r}"
    line = " ".join(f"{path}: {reason}".split()).encode("utf-8", "backslashreplace").decode()
    raise ValueError(line if len(line) < 1000 else line[:1000] + " …")


def _read_h5(data):
    found = []

    def visit(name, item):
        nonlocal room
        if isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual or item.dtype.kind != "f" or not item.size:
                raise ValueError(f"{name} is not an array of numbers")
            room -= item.nbytes
            if room < 0:  # NNabla never compresses: whoever claims more than the file holds is no friend
                raise ValueError(f"{name} claims shape {item.shape}, more than the file holds")
            found.append((int(item.attrs.get("index", 0)), name, item[()].astype(np.float32)))

    room = len(data)
    with h5py.File(io.BytesIO(data), "r") as file:
        file.visititems(visit)
    if not found:
        raise ValueError("no parameters in it")
    return {name: value for _, name, value in sorted(found, key=lambda entry: entry[:2])}


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


def _read_torch(data):
    """The state_dict in what torch.save wrote: name -> float32 array."""
    saved, read, byteorder = _open_zip(data) if data.startswith(b"PK") else _open_legacy(data)
    if isinstance(saved, dict):
        saved = saved.get("state_dict", saved)  # a training checkpoint has it beside the optimizer's
    if not isinstance(saved, dict):
        raise ValueError("not a state_dict")
    saved = {str(name): tensor for name, tensor in saved.items() if name not in _IGNORED}
    for name, tensor in saved.items():
        if not isinstance(tensor, _Tensor):
            raise ValueError(f"{name} is not a tensor")
    # strides of 0 let a few bytes claim any size; what a real model holds fits into its file
    if sum(math.prod(tensor.size) for tensor in saved.values()) > max(len(data), 2**26):
        raise ValueError("its tensors claim more than the file holds")
    return {name: tensor.array(read(tensor.storage.key), byteorder) for name, tensor in saved.items()}


def _open_zip(data):
    archive = zipfile.ZipFile(io.BytesIO(data))
    records = archive.infolist()
    if any(record.compress_type for record in records) or sum(record.file_size for record in records) > len(data):
        raise ValueError("its zip records are compressed, or claim more than the file holds: not torch's")
    pickles = [record.filename for record in records if record.filename.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError("a zip archive, but not of torch.save")
    folder = pickles[0][: -len("data.pkl")]
    saved = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
    order = archive.read(folder + "byteorder") if folder + "byteorder" in archive.namelist() else b"little"
    byteorder = {b"little": "<", b"big": ">"}[order]
    return saved, functools.cache(lambda key: archive.read(f"{folder}data/{key}")), byteorder


def _open_legacy(data):
    stream = io.BytesIO(data)
    if _Unpickler(stream).load() != 0x1950A86A20F9469CFC6C:  # torch.serialization.MAGIC_NUMBER
        raise ValueError("a pickle, but not of torch.save")
    for _ in ("version of the format", "the writer's machine"):
        _Unpickler(stream).load()
    unpickler = _Unpickler(stream)
    saved, storages = unpickler.load(), {}
    for key in _Unpickler(stream).load():
        if type(key) is not str:
            raise ValueError("a storage of an unknown kind")
        dtype = unpickler.storages[key].dtype
        nbytes = int.from_bytes(stream.read(8), "little") * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)
        storages[key] = stream.read(nbytes)
        if len(storages[key]) < nbytes:
            raise ValueError("the file is truncated")
    return saved, storages.__getitem__, "<"


# --------------------------------------------------------------------------------------- writing


def save(path, params):
    """Write weights: .h5 (also for nn.load_parameters) or .pth (openunmix 1.3.0 loads it strictly).

    Args:
        path: its extension chooses the format; an existing file is replaced whole
        params: name -> array in our names
    Raises:
        ValueError: another extension, or a .pth of anything but one OpenUnmix.
    """
    path = Path(path)
    params = {name: np.asarray(value, np.float32) for name, value in params.items()}
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path}: weights are written as {' or '.join(_WRITERS)}")
    writer = _WRITERS[path.suffix]
    content = to_torch(params) if writer is _write_pth else params
    with utils.atomic_path(path) as temporary:
        writer(temporary, content)


def _write_h5(path, params):
    with h5py.File(path, "w") as file:  # the layout of nn.save_parameters
        for index, (name, value) in enumerate(params.items()):
            file[name] = value
            file[name].attrs["need_grad"] = _need_grad(name)
            file[name].attrs["index"] = index


def _write_pth(path, state):
    """torch.save's zip format, spelt out: its pickle names things of torch that are not here to be pickled."""

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
        records[f"data/{key}"] = value.astype(value.dtype.newbyteorder("<")).tobytes()
        storage_type = b"ctorch\nLongStorage\n" if value.dtype == np.int64 else b"ctorch\nFloatStorage\n"
        storage = item(("storage", storage_type, str(key), "cpu", value.size)) + pickle.BINPERSID
        strides = tuple(stride // value.itemsize for stride in value.strides)
        arguments = item((storage, 0, value.shape, strides, pickle.NEWFALSE, ordered_dict))
        tensors += item(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + pickle.REDUCE
    content = pickle.PROTO + b"\x02" + ordered_dict + pickle.MARK + tensors + pickle.SETITEMS + pickle.STOP
    records = {"data.pkl": content, "byteorder": b"little", **records, "version": b"3\n"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), record)  # no date: same weights, same file


_WRITERS = {".h5": _write_h5, ".pth": _write_pth}


# ---------------------------------------------------------------------------------- command line


def convert_folder(source, destination, to=None):
    """Convert a model folder (separator.json, and <target>.json and <target>*.pth or *.h5 per target).

    Args:
        source, destination: folders; `destination` is new or empty, and appears whole or not at all
        to: "h5", "pth" or None for the one that `source` does not have
    Raises:
        ValueError: files are missing, ambiguous, damaged, or contradict each other.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty folder")
    kinds = {kind for kind in _OTHER if any(source.glob(f"*.{kind}"))}
    if to is None and len(kinds) != 1:
        raise ValueError(f"{source} has {'both .h5 and .pth: say --to' if kinds else 'neither .h5 nor .pth files'}")
    to = to or _OTHER[kinds.pop()]

    def files(target):  # openunmix' names are <target>.pth or <target>-<hash>.pth
        exact = source / f"{target}.{_OTHER[to]}"
        return [exact] if exact.exists() else sorted(source.glob(f"{target}*.{_OTHER[to]}"))

    config_path = source / "separator.json"
    config = _read_dict(config_path)
    found = sorted(path.stem for path in source.glob("*.json") if path != config_path and files(path.stem))
    found.sort(key=lambda target: args.TARGETS.index(target) if target in args.TARGETS else len(args.TARGETS))
    targets = config.setdefault("targets", found)
    # names of files to write, so never paths
    if not isinstance(targets, list) or not targets or any(target != Path(str(target)).name for target in targets):
        raise ValueError(f"{source} has no targets, or strange ones: {targets}")

    models, logs = {}, {}
    for target in targets:
        if len(files(target)) != 1:
            raise ValueError(f"{source} has {len(files(target))} files {target}*.{_OTHER[to]}, expected one")
        models[target], sizes = _load_model(files(target)[0])
        sizes["nfft"] = 2 * (sizes["nb_bins"] - 1)
        log_path = source / f"{target}.json"
        logs[target] = _read_dict(log_path)
        arguments = logs[target].setdefault("args", {})
        for path, settings, keys in (
            (config_path, config, ("nfft", "nb_channels")),
            (log_path, arguments, ("nfft", "nb_channels", "hidden_size")),
        ):
            for key in keys:
                if settings.setdefault(key, sizes[key]) != sizes[key]:
                    raise ValueError(f"{path} says {key} {settings[key]}, but the weights have {sizes[key]}")
        # the reference's training logs --unidirectional without heeding it: the weights know better
        arguments.update({key: sizes[key] for key in ("nb_layers", "unidirectional")})
    if missing := [key for key in ("nhop", "sample_rate") if key not in config]:
        raise ValueError(f"{config_path} lacks {' and '.join(missing)}")

    staging = destination.with_name(f".{destination.name}.{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        for target in targets:
            save(staging / f"{target}.{to}", models[target])
            utils.write_json(staging / f"{target}.json", logs[target])
        utils.write_json(staging / "separator.json", config)
        staging.replace(destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


_OTHER = {"h5": "pth", "pth": "h5"}


def _load_model(path):
    params = load(path)
    try:
        return params, describe(params)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_dict(path):
    value = utils.read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("args", {}), dict):
        raise ValueError(f"{path} is not what a training writes")
    return value


@utils.command
def main(argv=None):
    options = args.weights_parser().parse_args(argv)
    source, destination = Path(options.src).expanduser(), Path(options.dst).expanduser()
    try:
        if not source.exists():
            raise ValueError(f"{source} does not exist")
        if source.is_dir():
            convert_folder(source, destination, options.to)
        elif options.to:
            raise ValueError("--to is for folders; a file's format follows from its extension")
        else:
            save(destination, _load_model(source)[0])
    except ValueError as error:
        raise utils.UsageError(str(error)) from error


if __name__ == "__main__":
    main()
