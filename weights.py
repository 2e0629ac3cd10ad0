"""Weights in three dialects: ours and Sony's, of NNabla (.h5, see h5_files.py), and torch's (.pth, see torch_files.py).

Everything outside this module sees one dict, name -> float32 array, with the names that the network gives them. Those
of `model.OpenUnmix` have counterparts in openunmix and in Sony's files. A joint model (X-UMX) has all of them once per
target, with `_<target>` after the first component: `fc1_bass/affine/W`, `input_mean_bass`.

Our .h5 carry a description of their network too, see trained.py.
"""

from __future__ import annotations  # unions, on Python 3.9

import collections
import errno
import json
import math
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import utils

if __name__ == "__main__":
    utils.start()  # before imports that take long

import nnabla as nn
import numpy as np

import args
import context
import files
import folders
import h5_files
import torch_files
from model import OpenUnmix

# ----------------------------------------------------------------------------- names and shapes


@context.exclusive()
def asked(graph: Callable) -> dict:
    """The parameters that a network asks for when `graph()` builds it: name -> variable without a value.

    For this NNabla has only a function that makes their values too. Drawing those of a large network takes longer than
    reading its file, and for sizes that come from a damaged file there would not be the memory.
    """
    create, thread = nn.parameter._create_parameter_by_initializer, threading.get_ident()

    def create_without_value(initializer, shape, need_grad):
        if threading.get_ident() != thread:
            return create(initializer, shape, need_grad)
        return nn.Variable(initializer.shape if shape is None else shape, need_grad=need_grad)

    nn.parameter._create_parameter_by_initializer = create_without_value
    try:
        with nn.parameter_scope("", collections.OrderedDict()), nn.auto_forward(False):
            graph()
            return nn.get_parameters(grad_only=False)
    finally:
        nn.parameter._create_parameter_by_initializer = create


def compare(params: dict, graph: Callable) -> dict:
    """Compare parameters with those that a network asks for when `graph()` builds it.

    Args:
        params: name -> array
    Returns:
        {name: whether it is learnt}
    Raises:
        ValueError: names or shapes differ; it says which.
    """
    variables = asked(graph)
    _compare(params, {name: variable.shape for name, variable in variables.items()})
    return {name: variable.need_grad for name, variable in variables.items()}


def _compare(params, expected):
    """ValueError unless arrays by name have the shapes by name, saying where they do not."""
    found = {name: np.shape(value) for name, value in params.items()}
    problems = [f"unknown {name}" for name in found if name not in expected]
    problems += [f"missing {name}" for name in expected if name not in found]
    problems = problems or [
        f"{name} has shape {tuple(found[name])}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if tuple(found[name]) != tuple(shape)
    ]
    if problems:
        raise ValueError(f"these weights do not fit: {utils.some(problems)}")


_JOINT = re.compile("(input_mean|input_scale|output_mean|output_scale|fc1|fc2|fc3|lstm)_([^/]+)(/.*)?")


def by_target(params: dict) -> dict:
    """Split a joint model's parameters: {target: parameters with plain names}; {"": params} if it is not joint."""
    matches = {name: _JOINT.fullmatch(name) for name in params}
    models = {match[2]: {} for match in matches.values() if match}
    if not models:
        return {"": params}
    for name, match in matches.items():  # a name that belongs to no target is found unknown in the first
        model = models[match[2]] if match else next(iter(models.values()))
        model[match[1] + (match[3] or "") if match else name] = params[name]
    return models


def describe(params: dict, path: Path | None = None) -> dict:
    """What rebuilds the model: nb_channels, hidden_size, nb_layers, nb_bins, max_bin, unidirectional.

    Args:
        params: name -> array, of one OpenUnmix or of a joint one (whose targets all have the same sizes)
        path: of the file, for messages
    Raises:
        ValueError: the names or shapes are not those of any such model.
    """
    found = {}
    for target, one in by_target(params).items():
        try:
            sizes = _sizes(one)
            compare(one, lambda: _open_unmix(**sizes))  # noqa: B023, called at once
        except ValueError as error:
            raise ValueError(": ".join(map(str, filter(None, (path, target, error))))) from None
        found[target] = sizes
    if any(other != sizes for other in found.values()):
        raise ValueError(f"the targets of this joint model differ in size: {found}")
    return sizes


def check_claims(params: dict, description: dict) -> None:
    """ValueError, before a graph of any size is built, if a network of ours would have more values than there are."""
    claims = [description["options"].get("hidden_size", 1), description["nb_channels"], description["n_fft"] // 2]
    have = sum(np.size(value) for value in params.values())
    if not all(isinstance(size, int) and 0 < size <= have for size in claims) or math.prod(claims) > have:
        raise ValueError(f"it describes a network of hidden_size, channels, bins {claims}, and has {have} values")


def _open_unmix(nb_bins, **options):
    """The graph of an OpenUnmix for a single frame."""
    net = OpenUnmix(n_fft=2 * (nb_bins - 1), input_is_spectrogram=True, **options)
    return net(nn.Variable((1, 1, net.nb_channels, nb_bins)), test=True)


def _sizes(params):
    """What the shapes of an OpenUnmix say of it; `compare` then finds those that say something else."""
    nb_layers = max(1, sum(name.startswith("lstm/weight_l") for name in params))
    smallest = {"hidden_size": 2, "nb_channels": 1, "max_bin": 1, "nb_layers": nb_layers}
    expected = asked(lambda: _open_unmix(nb_bins=2, **smallest))
    _compare(dict.fromkeys(params, 0), dict.fromkeys(expected, ()))  # names, before shapes are looked at
    shapes = {name: np.shape(value) for name, value in params.items()}
    ndims = {"input_mean": 1, "output_mean": 1, "fc1/affine/W": 2, "fc3/affine/W": 2, "lstm/weight_l0": 4}
    for name, ndim in ndims.items():
        if len(shapes[name]) != ndim or 0 in shapes[name]:
            raise ValueError(f"{name} has shape {shapes[name]}, expected {ndim} dimensions")
    nb_bins = shapes["output_mean"][0]
    sizes = {
        "nb_channels": shapes["fc3/affine/W"][1] // nb_bins,
        "hidden_size": shapes["fc1/affine/W"][1],
        "nb_layers": nb_layers,
        "nb_bins": nb_bins,
        "max_bin": shapes["input_mean"][0],
        "unidirectional": shapes["lstm/weight_l0"][0] == 1,
    }
    if not sizes["nb_channels"] or nb_bins < 2:
        raise ValueError(f"fc3/affine/W has shape {shapes['fc3/affine/W']}, for {nb_bins} bins")
    return sizes


# ------------------------------------------------------------------------------- parameter scope


def set_parameters(params: dict) -> None:
    """Copy values into the current ``nn.parameter_scope``, or create them there if it is empty.

    Args:
        params: name -> array, as `load` returns them
    Raises:
        ValueError: names or shapes are not those in the scope (an empty one takes any OpenUnmix or joint
            model), or values are not finite. The scope is then unchanged.
    """
    existing = nn.get_parameters(grad_only=False)
    if existing:
        _compare(params, {name: variable.shape for name, variable in existing.items()})
    else:
        describe(params)
    fill(params, {name: _need_grad(name) for name in params})


def fill(params: dict, need_grad: dict) -> None:
    """Copy values into the current ``nn.parameter_scope``, whatever they are: `compare` comes first.

    Args:
        need_grad: {name: whether it is learnt}, for those that are not there yet
    Raises:
        ValueError: values are not finite.
    """
    _check_finite(params)
    existing = nn.get_parameters(grad_only=False)
    for name, value in params.items():
        variable = existing.get(name)
        if variable is None:
            variable = nn.Variable(np.shape(value), need_grad=need_grad[name])
            nn.parameter.set_parameter(name, variable)
        variable.data.cast(np.float32)[...] = value


def _check_finite(params):
    if broken := [name for name, value in params.items() if not np.isfinite(value).all()]:
        raise ValueError(f"these weights are not finite: {utils.some(broken)}")


def get_parameters() -> dict:
    """Copies of everything in the current ``nn.parameter_scope``, name -> float32 array."""
    variables = nn.get_parameters(grad_only=False)
    return {name: np.array(variable.data.get_data("r"), np.float32) for name, variable in variables.items()}


def _need_grad(name):
    return not name.endswith(("/bn/mean", "/bn/var"))


# --------------------------------------------------------------------------------------- dialects


def to_torch(params: dict) -> dict:
    """Our parameters in the names and shapes of openunmix 1.3.0's state_dict.

    Batch counters, which we do not keep, are 0. Raises ValueError for anything but one OpenUnmix.
    """
    if "" not in by_target(params):
        raise ValueError("a joint model has no counterpart in openunmix")
    return torch_files.to_state(params, describe(params)["nb_layers"])


def from_torch(state: dict) -> dict:
    """Our parameters from an openunmix state_dict (name -> array); the inverse of `to_torch`.

    Raises ValueError if names or shapes are not those of an OpenUnmix; buffers of older versions are dropped.
    """
    params = torch_files.from_state(state)
    describe(params)
    return params


# --------------------------------------------------------------------------------------- reading


def load(path: str | Path) -> dict:
    """Read weights: our .h5, Sony's .h5, or a .pth or .chkpnt of openunmix (zip and legacy format).

    The content decides, not the extension. Nothing in the file is executed.

    Returns:
        name -> float32 array in our names
    Raises:
        ValueError: not such a file, or damaged, or it asks for more than tensors; one line with the path.
        OSError: it cannot be opened.
    """
    return read(path)[0]


def read(path: str | Path) -> tuple:
    """What `load` returns, and the description of the network that the file carries, None if it does not."""
    with files.open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        signature = stream.read(8)
        stream.seek(0)
        try:
            params, description = _read(stream, signature, size)
            _check_finite(params)
            return params, description
        except MemoryError:
            raise
        except Exception as error:  # garbage makes zipfile, h5py and pickle raise nearly anything
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the disk's
                raise OSError(error.errno, error.strerror, str(path)) from error
            reason = str(error) if type(error) in (ValueError, utils.UsageError) else f"damaged file: {error!r}"
    line = " ".join(f"{path}: {reason}".split()).encode("utf-8", "backslashreplace").decode()
    raise ValueError(line if len(line) < 1000 else line[:1000] + " …")


def _read(stream, signature, size):
    is_torch = signature.startswith((b"PK\x03\x04", b"\x80"))
    if not is_torch and signature != h5_files.SIGNATURE:
        raise ValueError("neither NNabla's .h5 nor torch's .pth")
    if size > LARGEST:
        raise ValueError(f"{size} bytes are more than a network has")
    if is_torch:
        return from_torch(torch_files.read(stream, size)), None
    found, attributes = h5_files.read(stream, size)
    if not found:
        raise ValueError("no parameters in it")
    description = _description(attributes) if _NETWORK in attributes else None
    with np.errstate(over="ignore"):
        params = {name: value.astype(np.float32, copy=False) for name, value in found.items()}
    return h5_files.from_sony(params), description


LARGEST = 2**31  # bytes of a file
_NETWORK = "network"  # the attribute of the file that describes it
MOST_BINS = 16000  # of statistics: an attribute has less than 64 KB


def _description(attributes):
    """What the attributes of a file say of its network; ValueError if it cannot be so."""
    text = attributes[_NETWORK]
    description = json.loads(text) if isinstance(text, str) and len(text) < 2**20 else None
    kinds = {"class": (str,), "options": (dict,), "targets": (list,), "statistics": (list,)}
    kinds.update(nb_channels=(int,), n_fft=(int,), n_hop=(int,), sample_rate=(int, float))
    if not isinstance(description, dict) or any(type(description.get(k, [])) not in kinds[k] for k in kinds):
        raise ValueError("its description of the network is damaged")
    if not all(0 < description[key] < 2**31 for key in ("nb_channels", "n_fft", "n_hop", "sample_rate")):
        raise ValueError("its description of the network has sizes that cannot be")
    if not 0 < len(description["targets"]) <= folders.MOST_TARGETS:
        raise ValueError(f"its description of the network has {len(description['targets'])} targets")
    folders.check_targets(description["targets"])
    statistics = {str(name): attributes.get(str(name)) for name in description.pop("statistics", [])}
    for name, values in statistics.items():
        expected = (description["n_fft"] // 2 + 1,)
        if np.shape(values) != expected or not np.isfinite(values).all():
            raise ValueError(f"its {name} are not finite numbers of shape {expected}")
    statistics = {name: values.astype(np.float32) for name, values in statistics.items()}
    return {**description, "statistics": statistics} if statistics else description


# --------------------------------------------------------------------------------------- writing


def save(path: str | Path, params: dict, description: dict | None = None) -> None:
    """Write weights: .h5 (also for nn.load_parameters) or .pth (openunmix 1.3.0 loads it strictly).

    Args:
        path: its extension chooses the format; an existing file is replaced whole
        params: name -> array in our names
        description: of the network, see trained.py; a .pth cannot carry it
    Raises:
        ValueError: another extension, or a .pth of anything but one OpenUnmix.
    """
    path = Path(path)
    params = {name: np.asarray(value, np.float32, order="C") for name, value in params.items()}
    if path.suffix not in folders.KINDS:
        raise ValueError(f"{path}: weights are written as {' or '.join(folders.KINDS)}")
    state = to_torch(params) if path.suffix == ".pth" else None
    with files.writing(path) as stream:
        if state is not None:
            torch_files.write(stream, state)
            return
        attributes = {}
        if description is not None:
            statistics = description.get("statistics", {})
            text = json.dumps({**description, "statistics": list(statistics)}, sort_keys=True)
            attributes = {name: np.asarray(values, np.float32) for name, values in statistics.items()}
            attributes[_NETWORK] = text
        h5_files.write(stream, params, _need_grad, attributes)


# ---------------------------------------------------------------------------------- command line


def convert_folder(source: Path, destination: Path, to: str | None = None) -> None:
    """Convert a model folder (separator.json, and the weights and perhaps <target>.json of each target).

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
    config_path = source / folders.CONFIG
    if not config_path.exists():
        raise ValueError(f"there is no {config_path}, which says what the weights do not: nhop and sample_rate")
    found, config = folders.find(source, kinds=(f".{_OTHER[to]}",))
    config["targets"] = list(found)

    models, logs = {}, {}
    for target, path in found.items():
        models[target] = params, _ = read(path)
        if to == "pth" and "" not in by_target(params):
            raise ValueError(f"{path}: a joint model has no counterpart in openunmix")
        sizes = describe(params, path)
        sizes["nfft"] = 2 * (sizes["nb_bins"] - 1)
        log_path = source / f"{target}.json"
        logs[target] = _read_log(log_path)
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

    with files.temporary_folder(files.writable_folder(destination.parent)) as staging:
        for target, (params, description) in models.items():
            save(staging / f"{target}.{to}", params, description)
            files.write_json(staging / f"{target}.json", logs[target])
        files.write_json(staging / folders.CONFIG, config)
        staging.replace(destination)
    files.sync_folder(destination.parent)


_OTHER = {"h5": "pth", "pth": "h5"}


def _read_log(path):
    value = files.read_json(path) if path.exists() else {}
    if not isinstance(value, dict) or not isinstance(value.get("args", {}), dict):
        raise ValueError(f"{path} is not what a training writes")
    return value


@utils.command
def main(argv=None):
    options = args.weights_parser().parse_args(argv)
    source, destination = Path(os.path.expanduser(options.src)), Path(os.path.expanduser(options.dst))
    try:
        if not source.exists():
            raise ValueError(f"{source} does not exist")
        if not source.is_dir() and not source.is_file():
            raise ValueError(f"{source} is neither a file nor a folder")
        if not source.is_dir() and not destination.parent.is_dir():
            raise ValueError(f"there is no folder {destination.parent}")
        if source.is_dir():
            convert_folder(source, destination, options.to)
        elif options.to:
            raise ValueError("--to is for folders; a file's format follows from its extension")
        else:
            params, description = read(source)
            if description is None or destination.suffix == ".pth":
                describe(params, source)
            files.writable_folder(destination.parent)
            save(destination, params, description)
    except ValueError as error:
        raise utils.UsageError(str(error)) from error


if __name__ == "__main__":
    main()
