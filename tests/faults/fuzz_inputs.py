"""What fuzz.py reads: for each kind a class that makes an input of random numbers, and the function that reads it.

That function raises what is not declared, and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import nnabla as nn
import numpy as np
import shapes
import soundfile
from archives import with_another_pickle

import args
import audio
import checkpoint
import evaluate
import ffmpeg_files
import folders
import scorer
import scores
import solvers
import torch_files
import trained
import weights
from utils import UsageError

KINDS = ("weights", "checkpoint", "json", "audio", "commandline")
DATA = Path(__file__).resolve().parents[1] / "data"

# ---------------------------------------------------------------------------------------- mutations

NUMBERS = (0, 1, -1, 2, 3, 255, 256, 1000, 2**15, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**20, 10**400)
FLOATS = (0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), 44100.0, 0.1)
TEXTS = ("", "x", "bass", "vocals", "../x", "a/b", "a\0b", "\ud800", "é", "-", ".", "..", "nan", "{}", "x" * 300)


def nasty(rng: random.Random, depth: int = 0):
    """Any value that JSON has."""
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind in (1, 2):
        return rng.choice(NUMBERS) * rng.choice((1, 1, -1))
    if kind == 3:
        return rng.choice(FLOATS)
    if kind in (4, 5):
        return rng.choice(TEXTS)
    if depth > 3:
        return []
    if kind == 6:
        return [nasty(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 5)))]
    if kind == 7:
        return {rng.choice(TEXTS): nasty(rng, depth + 1) for _ in range(rng.choice((0, 1, 2)))}
    value = []
    for _ in range(rng.choice((10, 100, 900))):
        value = [value]
    return value


def mutated(rng: random.Random, value):
    """JSON with a few of its values replaced, left out, doubled or put into others."""
    whole = {"": copy.deepcopy(value)}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder, key = whole, ""
        while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.8:
            holder = holder[key]
            key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        how = rng.randrange(6)
        if how == 0 and holder is not whole:
            del holder[key]
        elif how == 1:
            holder[key] = [holder[key]] * rng.choice((1, 2, 3))
        elif how == 2 and isinstance(holder[key], (int, float)):
            holder[key] = -holder[key] if rng.random() < 0.5 else holder[key] * rng.choice((0, 2, 10**9))
        else:
            holder[key] = nasty(rng)
    return whole[""]


def spoilt(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Bytes with some of them changed, left out, added or moved."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        size = len(data)
        if not size:
            return bytes(data)
        place, how = rng.randrange(size), rng.randrange(9)
        run = min(rng.choice((1, 2, 4, 8, 16, 64)), size - place)
        if how <= 2:
            data[place] ^= 1 << rng.randrange(8)
        elif how == 3:
            data[place : place + run] = rng.randbytes(run)
        elif how == 4:
            data[place : place + run] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * run
        elif how == 5:
            del data[place : rng.choice((size, place + run))]
        elif how == 6:
            data[place:place] = data[rng.randrange(size) :][:run] * rng.choice((1, 1, 100))
        elif how == 7:
            number = rng.choice(NUMBERS[:15]) % 2**64
            form = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
            number %= 256 ** struct.calcsize(form)
            data[place : place + struct.calcsize(form)] = struct.pack(form, number)
        elif other:
            start = rng.randrange(len(other))
            data[place : place + run] = other[start : start + rng.choice((run, len(other)))]
    return bytes(data)


# ------------------------------------------------------------------------------------------- weights

SIZES = {"nb_channels": 1, "hidden_size": 2, "nb_layers": 1, "nb_bins": 3, "max_bin": 2, "unidirectional": False}
OPTIONS = {key: SIZES[key] for key in ("hidden_size", "nb_layers", "max_bin", "unidirectional")}
DESCRIPTION = {"class": "OpenUnmix", "options": {**OPTIONS, "dropout": 0.4}, "targets": ["bass"], "nb_channels": 1}
DESCRIPTION.update(n_fft=4, n_hop=2, sample_rate=44100)
CONFIG = {"nfft": 4, "nhop": 2, "sample_rate": 44100, "nb_channels": 1, "targets": ["bass"]}


def parameters(**sizes) -> dict:
    rng = np.random.default_rng(0)
    wanted = shapes.open_unmix(**{**SIZES, **sizes})
    return {name: rng.uniform(0.1, 1, shape).astype(np.float32) for name, shape in wanted.items()}


def joint(params: dict) -> dict:
    """Of two targets."""
    named = {}
    for target in ("bass", "drums"):
        for name, value in params.items():
            first, slash, rest = name.partition("/")
            named[f"{first}_{target}{slash}{rest}"] = value
    return named


class Weights:
    """Files of weights, alone and in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.params = folder, parameters()
        statistics = {"input_mean": np.ones(3, np.float32), "input_scale": np.ones(3, np.float32)}
        described = {**DESCRIPTION, "class": "mine.py:Mine", "statistics": statistics}
        joint_description = {**DESCRIPTION, "class": "JointOpenUnmix", "targets": ["bass", "drums"]}
        files = {
            "ours.h5": (self.params, DESCRIPTION),
            "mine.h5": (self.params, described),
            "joint.h5": (joint(self.params), joint_description),
            "plain.h5": (self.params, None),
            "ours.pth": (self.params, None),
            "one layer.pth": (parameters(nb_channels=2, unidirectional=True), None),
        }
        for name, (params, description) in files.items():
            weights.save(folder / name, params, description)
        with nn.parameter_scope("", {}):
            weights.set_parameters(self.params)
            nn.save_parameters(str(folder / "nnabla.h5"))
        names = [*files, "nnabla.h5"]
        self.corpus = [(folder / name).read_bytes() for name in names]
        for name in names:
            (folder / name).unlink()
        self.corpus += [path.read_bytes() for path in sorted(DATA.glob("weights_*")) if path.suffix != ".npz"]
        self.zips = [data for data in self.corpus if data.startswith(b"PK")]

    def __call__(self, rng: random.Random) -> Callable:
        how = rng.randrange(20)
        if how < 12:
            data = spoilt(rng, rng.choice(self.corpus), rng.choice(self.corpus))
        elif how < 15:
            data = with_another_pickle(rng.choice(self.zips), lambda pickled: spoilt(rng, pickled))
        elif how < 17:
            data = as_zip(soup(rng))
        elif how < 19:
            data = strange_h5(rng, self.params)
        else:
            data = described_h5(mutated(rng, DESCRIPTION), self.params)
        path = self.folder / rng.choice(("bass.h5", "bass.pth"))
        for old in self.folder.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        path.write_bytes(data)
        if rng.random() < 0.5:
            return lambda: declared((ValueError, OSError), weights.read, path)
        if rng.random() < 0.5:
            (self.folder / folders.CONFIG).write_text(json.dumps(CONFIG))
        source = str(path if rng.random() < 0.5 else self.folder)
        return lambda: declared(UsageError, trained.load_models, source)


def declared(errors, function: Callable, *arguments):
    """What a function returns; None if it raises one of these errors, of which the message must be one line."""
    try:
        return function(*arguments)
    except errors as error:
        if not str(error) or len(str(error)) > 5000:
            raise AssertionError(f"a message of {len(str(error))} characters") from error
    return None


def as_zip(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", np.arange(4, dtype="<f4").tobytes())
    return buffer.getvalue()


PARTS = [bytes([code]) for code in torch_files._Unpickler.dispatch] + [
    b"K\1",
    b"M\0\1",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 8,
    b"X\1\0\0\0" + b"0",
    b"X\7\0\0\0storage",
    b"X\3\0\0\0cpu",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ccollections\nOrderedDict\n",
    b"cos\nsystem\n",
    b"q\0",
    b"h\0",
    b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tQ",
]


def soup(rng: random.Random) -> bytes:
    """Operations of pickle in any order."""
    parts = [rng.choice(PARTS) * rng.choice((1, 1, 1, 1, 1, 3, 50)) for _ in range(rng.choice((5, 20, 80)))]
    return b"\x80\x02" + b"".join(parts) + rng.choice((b".", b""))


def described_h5(description, params: dict) -> bytes:
    """A file with another description, and no checksum."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        with contextlib.suppress(UnicodeEncodeError, ValueError):  # no text that a file could hold
            file.attrs["network"] = json.dumps(description, ensure_ascii=True)
        for name, value in params.items():
            file[name] = value
    return buffer.getvalue()


def strange_h5(rng: random.Random, params: dict) -> bytes:
    """A valid file that NNabla would not write."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=rng.choice((None, "latest", ("v108", "v108")))) as file:
        for index, (name, value) in enumerate(params.items()):
            file[name] = value
            file[name].attrs["index"] = index
        for _ in range(rng.choice((1, 1, 2, 3))):
            name = rng.choice(list(params))
            with contextlib.suppress(ValueError, TypeError, KeyError, RuntimeError, OSError, AttributeError):
                rng.choice(STRANGE)(rng, file, name)  # which not all go together
    return buffer.getvalue()


def replaced(make: Callable) -> Callable:
    def strange(rng, file, name):
        del file[name]
        make(rng, file, name)

    return strange


def number_of_objects(rng, file, name):
    for k in range(rng.choice((10, 100, 1000))):
        file.create_group(f"{name} {k}") if rng.random() < 0.5 else file.create_dataset(f"{name} {k}", data=k)


def cycle(rng, file, name):
    group = file.require_group("fc1")
    group["again"] = rng.choice((file, group))


def attribute(rng, item):
    key = rng.choice(("index", "need_grad", "network", "checksum", "input_mean", "other"))
    kinds = ("S3", "f4", "i8", "u1", "?", "c8", h5py.string_dtype(), h5py.ref_dtype, h5py.vlen_dtype("f4"))
    shape = rng.choice(((), (0,), (1,), (3,), (2, 2), (5000,)))
    value = rng.choice(("x", "é", b"\xff", 10**18, -1, float("nan"), np.zeros(shape), h5py.Empty("f4"), None))
    if value is None:
        item.attrs.create(key, None, shape, rng.choice(kinds))
    else:
        item.attrs[key] = value


DTYPES = ("f2", "f8", ">f4", "longdouble", "i4", "?", "c8", "S5", h5py.string_dtype(), [("a", "f4"), ("b", "i8")])
LINKS = (h5py.SoftLink("/fc1"), h5py.SoftLink("/nowhere"), h5py.ExternalLink("/etc/passwd", "/"), h5py.SoftLink("."))
STRANGE = (
    replaced(lambda rng, file, name: file.create_dataset(name, file["input_mean"].shape, rng.choice(DTYPES))),
    replaced(lambda rng, file, name: file.create_dataset(name, rng.choice(((), (0,), (2, 0), (1,) * 20)), "f4")),
    replaced(lambda rng, file, name: file.create_dataset(name, (10 ** rng.randrange(1, 15),), "f4", chunks=True)),
    replaced(lambda rng, file, name: file.create_dataset(name, (10 ** rng.randrange(1, 8),), "f4")),  # it is all there
    replaced(lambda rng, file, name: file.create_dataset(name, data=np.zeros(10**5, "f4"), compression="gzip")),
    replaced(lambda rng, file, name: file.create_dataset(name, data=np.float32(rng.choice(FLOATS)))),
    replaced(lambda rng, file, name: file.create_dataset(name, (4,), "f4", external=[("/etc/passwd", 0, 16)])),
    replaced(lambda rng, file, name: file.create_dataset(name, data=h5py.Empty("f4"))),
    replaced(lambda rng, file, name: file.__setitem__(name, rng.choice(LINKS))),
    replaced(lambda rng, file, name: file.__setitem__(name, np.dtype("f4"))),
    lambda rng, file, name: file.__setitem__(f"{name} again", file[name]),
    lambda rng, file, name: file.require_group("/".join("g" * rng.choice((5, 40, 200)))),
    lambda rng, file, name: file[name].__setitem__(..., rng.choice(FLOATS)),
    lambda rng, file, name: file.__setitem__(rng.choice(("é", "\udcff", "a b\n", "x" * 1000)), np.ones(2, "f4")),
    lambda rng, file, name: attribute(rng, rng.choice((file, file[name]))),
    lambda rng, file, name: attribute(rng, rng.choice((file, file[name]))),
    number_of_objects,
    cycle,
)

# ----------------------------------------------------------------------------------------- checkpoint


class Checkpoint:
    """Checkpoints: damaged ones, and whole ones of wrong contents."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = trained.Model(DESCRIPTION, trained.OWN["OpenUnmix"], parameters())
        solver = solvers.Adam(self.model.variables(), 0.001, 0.0)
        self.arrays = {f"parameters/{name}": value for name, value in self.model.get_parameters().items()}
        self.arrays.update({f"solver/{name}": value for name, value in solver.get_state().items()})
        options = vars(args.train_parser().parse_args([]))
        log = {f"{name}_history": [0.5, 0.25] for name in ("train_loss", "valid_loss", "train_time", "lr")}
        log.update(args=options, network=DESCRIPTION, epochs_trained=2, best_epoch=2, best_loss=0.25)
        log["randomness"] = checkpoint.randomness.SCHEME
        self.meta = {
            "log": log,
            "scheduler": {"lr": 0.1, "best": 0.25, "num_bad_epochs": 0, "cooldown": 0},
            "stopping": {"best": 0.25, "num_bad_epochs": 0},
            "progress": {"epoch": 3, "steps": 0, "loss": 0.0, "seconds": 0.0},
        }
        self.whole = b"".join(checkpoint._pack(self.arrays, self.meta))
        path = folder / "bass.checkpoint.npz"
        path.write_bytes(self.whole)
        checkpoint.load(path, "bass")  # raises if this is not one
        path.unlink()
        self.members = npz_members(self.whole)

    def __call__(self, rng: random.Random) -> Callable:
        how = rng.randrange(10)
        if how < 3:
            data = spoilt(rng, self.whole, self.whole)
        elif how < 5:
            data = signed(spoilt(rng, self.whole[:-4], self.whole))
        elif how < 7:
            data = b"".join(checkpoint._pack(self.arrays, mutated(rng, self.meta)))
        else:
            members = dict(self.members)
            for _ in range(rng.choice((1, 1, 2))):
                name = rng.choice(list(members))
                members.update(strange_member(rng, name, members[name]))
                if rng.random() < 0.2:
                    del members[name]
            data = signed(as_npz(members))
        path = self.folder / "bass.checkpoint.npz"
        path.write_bytes(data)
        return lambda: self.read(path)

    def read(self, path):
        """As train.py does: load it, build its network, give its state to a solver."""
        found = declared(UsageError, checkpoint.load, path, "bass")
        if found is None:
            return
        description = found.state["log"]["network"]
        cls = declared(UsageError, trained.class_of, path, description, None)
        if cls is not None:
            model = declared(ValueError, trained.Model, description, cls, found.parameters)
            if model is not None:
                declared(ValueError, solvers.Adam(model.variables(), 0.001, 0.0).set_state, found.solver)


def npz_members(data: bytes) -> dict:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def as_npz(members: dict) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, record in members.items():
            archive.writestr(zipfile.ZipInfo(name), record)
    return buffer.getvalue() + bytes(32)


def signed(data: bytes) -> bytes:
    """With the checksum that belongs to it."""
    data = data.removesuffix(bytes(4))
    if data[-2:] == b"\0\0":
        data = data[:-2] + b"\4\0"
    return data + zlib.crc32(data).to_bytes(4, "little")


def strange_member(rng, name, record) -> dict:
    """Another array in the place of one of an archive, by its name."""
    how = rng.randrange(5)
    if how == 0:
        return {name: spoilt(rng, record)}
    if how == 1:
        return {rng.choice(("parameters/", "solver/", "x", "../x.npy", "meta", "meta.npy", "é/\n")): record}
    if how == 2:
        header = {"descr": rng.choice(("<f4", "|O", "<U9", "|V8", "<f8", "<M8[s]", "x", [("a", "<f4")])), "shape": (2,)}
        header["shape"] = rng.choice(((), (0,), (2,), (-1,), (10**18,), (2**62, 4), (1,) * 40, "x"))
        text = (repr({**header, "fortran_order": rng.choice((True, False, 3))}) + "\n").encode()
        return {name: b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + rng.randbytes(rng.choice((0, 8, 32)))}
    buffer = io.BytesIO()
    dtype = rng.choice(("f4", "f8", "i4", "?", "c8", "U3", "O", [("a", "f4"), ("b", "O")]))
    values = np.zeros(rng.choice(((), (0,), (1,), (3,), (2, 2))), dtype)
    if values.dtype.kind == "f":
        values[...] = rng.choice(FLOATS)
    np.lib.format.write_array(buffer, values, allow_pickle=True)
    return {name: buffer.getvalue()}


# ----------------------------------------------------------------------------------------------- JSON


class Json:
    """separator.json, logs, museval's scores and summary.json, of values that nobody writes."""

    def __init__(self, folder: Path):
        self.folder = folder
        metrics = {name: 1.5 for name in scores.METRICS}
        frames = [{"time": float(k), "duration": 1.0, "metrics": metrics} for k in range(2)]
        self.track = {"targets": [{"name": name, "frames": frames} for name in ("vocals", "accompaniment")]}
        self.documents = {
            self.config: CONFIG,
            self.log: {"args": {"nfft": 4, "hidden_size": 2}, "best_loss": 0.5},
            self.scored: self.track,
            self.summary: {"settings": {"niter": 1, "targets": ["bass"]}, "seconds_per_minute": {"scoring": 1.0}},
        }
        self.scorer = SimpleNamespace(
            evaldir=folder, stems={"vocals": 0, "accompaniment": 0}, json=lambda track: folder / "track.json"
        )
        (folder / "test").mkdir()

    def __call__(self, rng: random.Random) -> Callable:
        read = rng.choice(list(self.documents))
        text = json.dumps(mutated(rng, self.documents[read]))
        data = rng.choice((text.encode(), text.encode("utf-16"))) if rng.random() < 0.1 else text.encode()
        if rng.random() < 0.3:
            data = spoilt(rng, data, b'[{"x":1e5,null' * rng.choice((1, 1000)))
        path = self.folder / {self.config: folders.CONFIG, self.summary: "summary.json"}.get(read, "track.json")
        path.write_bytes(data)
        return lambda: read(path, rng)

    def config(self, path, rng):
        declared(UsageError, folders.read_config, path)

    def log(self, path, rng):
        declared(ValueError, weights._read_log, path)

    def scored(self, path, rng):
        if scorer.Scorer.scored(self.scorer, None) and rng.random() < 0.3:  # which pandas takes long for
            declared(UsageError, lambda: scores.medians(scores.read_scores([path])))

    def summary(self, path, rng):
        declared(UsageError, evaluate.prepare, self.folder, "test", {"niter": 1, "targets": ["bass"]})


# ---------------------------------------------------------------------------------------------- audio


class Audio:
    """Sound files with damaged headers and contents. Most of them ffmpeg, a process each, never sees."""

    BY_FFMPEG = ("m4a", "mka", "aac", "wma", "avi", "mp3")  # of what libsndfile does not write, or writes differently

    def __init__(self, folder: Path):
        self.folder, self.probe, self.blocks = folder, ffmpeg_files.probe, ffmpeg_files.blocks
        samples = 0.5 * np.sin(np.arange(200) / 7).reshape(100, 2).astype(np.float32)
        forms = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "PCM_24"), ("RF64", "PCM_16"), ("WAVEX", "PCM_16")]
        forms += [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16")]
        self.corpus = []
        for form, subtype in forms:
            for nb_channels in (1, 2):
                buffer = io.BytesIO()
                rate = 48000 if subtype == "OPUS" else 44100
                soundfile.write(buffer, samples[:, :nb_channels], rate, subtype, format=form)
                self.corpus.append(buffer.getvalue())
        (folder / "song.wav").write_bytes(self.corpus[1])
        for kind in self.BY_FFMPEG if ffmpeg_files.is_there() else ():
            path = folder / f"song.{kind}"
            subprocess.run(["ffmpeg", "-v", "error", "-i", folder / "song.wav", path], check=True)
            self.corpus.append(path.read_bytes())

    def __call__(self, rng: random.Random) -> Callable:
        data = rng.choice(self.corpus)
        if rng.random() < 0.5:  # the header alone
            data = spoilt(rng, data[:64], rng.choice(self.corpus)) + data[64:]
        else:
            data = spoilt(rng, data, rng.choice(self.corpus))
        path = self.folder / "song.wav"
        path.write_bytes(data)
        ffmpeg_files.probe, ffmpeg_files.blocks = self.probe, self.blocks
        if rng.random() > 0.0005:
            kind = rng.choice(("mp3", "aac", "ac3", "eac3", "flac", "ogg", "x"))
            ffmpeg_files.probe = lambda path: (44100, 2, 0, kind)
            ffmpeg_files.blocks = lambda *arguments: iter(())
        return lambda: self.read(path)

    def read(self, path):
        found = declared((UsageError, OSError), audio.decode, path, 44100, self.folder)
        if found is not None:
            found[0].close()


# --------------------------------------------------------------------------------------- command lines

VALUES = [*map(str, NUMBERS[:16]), *map(str, FLOATS), *(text for text in TEXTS if "/" not in text and ".." not in text)]
VALUES += ["~nobody", "0x10", "1_000", "１", " 1", "-1", "--", "-h", "'", "*", "\n", "1,5", "[]", '{"a": ["bass"]}']
VALUES += ['{"\\ud800": ["bass"]}', "[" * 5000, "gain", "cudnn", "cpu", "file.py:Class", "wav", "flac", "16", "float"]
MAINS = {  # what keeps them from work: of what they need, nothing is there
    "train": ["--root", "missing"],
    "data": ["--root", "missing"],
    "evaluate": ["--root", "missing", "--model", "missing"],
    "separate": ["--model", "missing"],
    "weights": [],
}


class Commandline:
    """Options that there are, with any values: parsed, and now and then given to the command itself."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.parsers = {name: getattr(args, f"{name}_parser") for name in ("demo", "synthesize", *MAINS)}
        self.options = {
            name: [(action.option_strings, action.nargs) for action in parser()._actions]
            for name, parser in self.parsers.items()
        }
        self.mains = {name: importlib.import_module(name).main for name in MAINS}

    def __call__(self, rng: random.Random) -> Callable:
        name, argv = rng.choice(list(self.parsers)), []
        for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
            strings, nargs = rng.choice(self.options[name])
            if strings:
                argv.append(rng.choice(strings) + rng.choice(("", "", "", "", "=", "=x", "x")))
            if nargs != 0 or rng.random() < 0.1:
                argv += [rng.choice(VALUES) for _ in range(rng.choice((0, 1, 1, 1, 1, 2)))]
        if name in MAINS and rng.random() < 0.2:
            return lambda: self.command(self.mains[name], [*argv, *MAINS[name]])
        return lambda: self.command(self.parsers[name]().parse_args, argv)

    def command(self, function, argv):
        """SystemExit of status 0 or 2 (1 if files cannot be written), with a line, is what may come of it."""
        out, errors, before = io.StringIO(), io.StringIO(), os.getcwd()
        (self.folder / "here").mkdir()
        os.chdir(self.folder / "here")
        (self.folder / "argv.json").write_text(json.dumps(argv))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
                function(argv)
        except SystemExit as stop:
            lines = errors.getvalue().count("\n")
            if stop.code not in (0, 1, 2) or (stop.code and lines != 1):
                raise AssertionError(f"status {stop.code}, {lines} lines: {errors.getvalue()!r}") from stop
        finally:
            os.chdir(before)
            shutil.rmtree(self.folder / "here")
