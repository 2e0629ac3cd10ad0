"""weights.py: formats, names, damaged and malicious files (tests/data/weights_* were written by torch 2.13)."""

import builtins
import collections
import errno
import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import h5py
import nnabla as nn
import numpy as np
import pytest
import shapes
from archives import with_another_pickle

import args
import model
import torch_files
import trained
import utils
import weights

DATA = Path(__file__).parent / "data"
SIZES = {"nb_channels": 2, "hidden_size": 4, "nb_layers": 2, "nb_bins": 17, "max_bin": 11, "unidirectional": False}
PTH = ("weights_zip.pth", "weights_legacy.pth", "weights_odd.chkpnt", "weights_odd_legacy.chkpnt")
VARIANTS = {
    "stereo": {},
    "mono": {"nb_channels": 1},
    "unidirectional": {"unidirectional": True, "hidden_size": 5},
    "one layer": {"nb_layers": 1},
    "all bins": {"max_bin": 17},
}


def expected(kind):
    """The state_dict that tests/data/weights_* were made of."""
    with np.load(DATA / "weights_expected.npz") as arrays:
        state = {name[len("plain/") :]: arrays[name] for name in arrays if name.startswith("plain/")}
        odd = {name[len("odd/") :]: arrays[name] for name in arrays if name.startswith("odd/")}
    return {**state, **odd} if "odd" in kind else state


def random_params(seed=0, **sizes):
    rng = np.random.default_rng(seed)
    wanted = shapes.open_unmix(**{**SIZES, **sizes})
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in wanted.items()}


def joint_params():
    """Of X-UMX: every name once per target, with a suffix on its first component."""
    params = {}
    for seed, target in enumerate(args.TARGETS):
        for name, value in random_params(seed).items():
            first, slash, rest = name.partition("/")
            params[f"{first}_{target}{slash}{rest}"] = value
    return params


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


# --------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("name", PTH)
def test_reads_what_torch_wrote(name):
    params = weights.load(DATA / name)
    assert all(value.dtype == np.float32 and value.flags.c_contiguous for value in params.values())
    assert weights.describe(params) == SIZES
    state = expected(name)
    for key in torch_files._COUNTERS:
        state[key] = np.zeros_like(state[key])
    assert_same(weights.to_torch(params), state)
    assert_same(weights.from_torch(state), params)


def test_the_content_decides_not_the_extension(tmp_path):
    wanted = weights.load(DATA / "weights_zip.pth")
    for name in PTH[:2]:
        path = tmp_path / "model.h5"
        path.write_bytes((DATA / name).read_bytes())
        assert_same(weights.load(path), wanted)


def test_big_endian_pth(tmp_path):
    path = tmp_path / "big.pth"
    with zipfile.ZipFile(DATA / "weights_zip.pth") as little, zipfile.ZipFile(path, "w") as big:
        for name in little.namelist():
            record = little.read(name)
            if "/data/" in name:
                record = np.frombuffer(record, "<i8" if len(record) == 8 else "<f4").byteswap().tobytes()
            big.writestr(name, b"big" if name.endswith("/byteorder") else record)
    # the eight bytes of bn?.num_batches_tracked are the only int64 of this model
    assert_same(weights.load(path), weights.load(DATA / "weights_zip.pth"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("extension", [".h5", ".pth"])
def test_round_trip(variant, extension, tmp_path):
    params = random_params(**VARIANTS[variant])
    weights.save(tmp_path / f"a{extension}", params)
    weights.save(tmp_path / f"b{extension}", params)
    assert_same(weights.load(tmp_path / f"a{extension}"), params)
    assert weights.describe(params) == {**SIZES, **VARIANTS[variant]}
    assert_same(weights.from_torch(weights.to_torch(params)), params)
    if extension == ".pth":
        assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "b"]


def test_from_torch_names_what_does_not_fit():
    state = expected("plain")
    with pytest.raises(ValueError, match="unknown conv.weight.*missing fc1.weight"):
        weights.from_torch(
            {**{k: v for k, v in state.items() if k != "fc1.weight"}, "conv.weight": state["fc1.weight"]}
        )
    with pytest.raises(ValueError, match=r"fc2/bn/gamma has shape \(1, 1, 3\), expected \(1, 1, 4\)"):
        weights.from_torch({**state, "bn2.weight": np.ones(3)})
    with pytest.raises(ValueError, match="layer 1"):
        weights.from_torch({**state, "lstm.weight_hh_l1": np.ones((3, 2))})


# -------------------------------------------------------------------------------------- NNabla


def test_h5_is_nnablas_own_layout(tmp_path):
    params = random_params()
    weights.save(tmp_path / "ours.h5", params)
    nn.load_parameters(str(tmp_path / "ours.h5"))
    assert_same(weights.get_parameters(), params)
    frozen = {name for name, variable in nn.get_parameters(grad_only=False).items() if not variable.need_grad}
    assert frozen == {f"fc{i}/bn/{name}" for i in (1, 2, 3) for name in ("mean", "var")}
    nn.save_parameters(str(tmp_path / "nnabla.h5"))
    assert_same(weights.load(tmp_path / "nnabla.h5"), params)


@pytest.mark.parametrize("suffix", ["", "_drums"])
@pytest.mark.parametrize("nb_layers", [1, 3])
def test_sony_names(suffix, nb_layers, tmp_path):
    params = random_params(nb_layers=nb_layers)
    with h5py.File(tmp_path / "sony.h5", "w") as file:
        for name, value in params.items():
            if not name.startswith("lstm"):
                first, slash, rest = name.partition("/")
                file[f"{first}{suffix}{slash}{rest}"] = value
        layers = range(nb_layers)
        file[f"lstm{suffix}/lstm/weight_l0"] = params["lstm/weight_l0"]
        if nb_layers > 1:
            file[f"lstm{suffix}/lstm/weight"] = np.stack([params[f"lstm/weight_l{k}"] for k in layers[1:]])
        file[f"lstm{suffix}/lstm/bias"] = np.stack([params[f"lstm/bias_ih_l{k}"] for k in layers])
    for k in layers:
        params[f"lstm/bias_hh_l{k}"][...] = 0
    found = weights.load(tmp_path / "sony.h5")
    assert all((name + "/").split("/")[0].endswith(suffix) for name in found)
    assert_same({name.replace(suffix or "/", "/" * (not suffix), 1): value for name, value in found.items()}, params)


def test_a_joint_model(tmp_path):
    params = joint_params()
    assert weights.describe(params) == SIZES
    for seed, target in enumerate(args.TARGETS):
        assert_same(weights.by_target(params)[target], random_params(seed))
    weights.save(tmp_path / "joint.h5", params)
    assert_same(weights.load(tmp_path / "joint.h5"), params)
    with nn.parameter_scope("joint"):
        weights.set_parameters(params)
        assert_same(weights.get_parameters(), params)
    with pytest.raises(ValueError, match="joint"):
        weights.save(tmp_path / "joint.pth", params)
    assert not (tmp_path / "joint.pth").exists()
    del params["fc1_bass/affine/W"]
    with pytest.raises(ValueError, match="bass: .*missing fc1/affine/W"):
        weights.describe(params)
    with pytest.raises(ValueError, match="unknown fc4"):
        weights.describe({**joint_params(), "fc4/affine/W": np.ones(3)})


def test_targets_of_a_joint_model_have_one_size():
    params = joint_params()
    for name, value in random_params(hidden_size=6).items():
        first, slash, rest = name.partition("/")
        params[f"{first}_bass{slash}{rest}"] = value
    with pytest.raises(ValueError, match="differ in size"):
        weights.describe(params)


def test_parameters_keep_their_order(tmp_path):
    """That in which a network made them."""
    params = {name: np.ones(2, np.float32) for name in ("b", "c/z", "a", "c/a")}
    weights.save(tmp_path / "ordered.h5", params)
    assert list(weights.load(tmp_path / "ordered.h5")) == list(params)


def test_what_a_network_asks_for_leaves_nnabla_as_it_was():
    with pytest.raises(ZeroDivisionError):
        weights.asked(lambda: 1 / 0)
    assert not nn.get_parameters(grad_only=False)
    np.testing.assert_array_equal(threes("w"), 3)


def threes(name):
    """The value of a new parameter that starts with threes."""
    initializer = nn.initializer.ConstantInitializer(3)
    return nn.parameter.get_parameter_or_create(name, (2,), initializer).data.get_data("r").copy()


def test_another_thread_may_make_a_network_meanwhile():
    values = []
    thread = threading.Thread(target=lambda: values.append(threes("other")))

    def graph():
        thread.start()
        thread.join()
        threes("own")

    assert weights.asked(graph)["own"].shape == (2,)
    np.testing.assert_array_equal(values, [[3, 3]])


# ------------------------------------------------------------------------------ parameter scope


@pytest.mark.parametrize("variant", VARIANTS)
def test_set_parameters_is_what_the_model_has(variant):
    sizes = {**SIZES, **VARIANTS[variant]}
    params = random_params(**VARIANTS[variant])
    config = {key: sizes[key] for key in ("nb_channels", "hidden_size", "nb_layers", "max_bin", "unidirectional")}
    net = model.OpenUnmix(n_fft=32, input_is_spectrogram=True, **config)
    x = nn.Variable.from_numpy_array(np.ones((3, 1, sizes["nb_channels"], 17)))
    with nn.parameter_scope("new"):
        weights.set_parameters(params)
        net(x)  # finds exactly its parameters, or creates some
        assert_same(weights.get_parameters(), params)
        created = {name: variable.need_grad for name, variable in nn.get_parameters(grad_only=False).items()}
    with nn.parameter_scope("existing"):
        net(x)
        before = nn.get_parameters(grad_only=False)
        data = {name: variable.data for name, variable in before.items()}
        weights.set_parameters({name: value.astype(np.float64) for name, value in params.items()})
        after = nn.get_parameters(grad_only=False)
        assert all(after[name].data == data[name] for name in data)  # in place: graphs keep seeing them
        assert created == {name: variable.need_grad for name, variable in after.items()}
        assert_same(weights.get_parameters(), params)


def without(name):
    return lambda params: params.pop(name)


WRONG = {
    r"missing fc2/affine/W": without("fc2/affine/W"),
    r"missing lstm/bias_hh_l1": without("lstm/bias_hh_l1"),
    r"unknown fc4/affine/W": lambda params: params.update({"fc4/affine/W": np.ones((2, 2))}),
    r"\(3, 3\), expected \(8, 4\)": lambda params: params.update({"fc2/affine/W": np.ones((3, 3))}),
    r"fc2/bn/var.*not finite|not finite: fc2/bn/var": lambda params: params["fc2/bn/var"].fill(np.nan),
}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("message", WRONG)
def test_set_parameters_refuses_and_changes_nothing(message, existing):
    before = random_params(seed=1) if existing else {}
    if existing:
        weights.set_parameters(before)
    params = random_params(seed=2)
    WRONG[message](params)
    with pytest.raises(ValueError, match=message):
        weights.set_parameters(params)
    assert_same(weights.get_parameters(), before)


def test_set_parameters_of_another_size():
    weights.set_parameters(random_params())
    with pytest.raises(ValueError, match=r"input_mean has shape \(9,\), expected \(11,\)"):
        weights.set_parameters(random_params(max_bin=9))


@pytest.mark.parametrize(
    "change",
    [{"output_mean": np.ones((17, 1))}, {"fc1/affine/W": np.ones((22, 0))}, {"fc3/affine/W": np.ones((4, 35))}],
    ids=str,
)
def test_describe_refuses_shapes_of_no_model(change):
    with pytest.raises(ValueError, match="shape"):
        weights.describe({**random_params(), **change})


# ------------------------------------------------------------------------- malicious and damaged


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


class Innocent:
    pass


def state_pickle(value, protocol=2):
    return pickle.dumps(collections.OrderedDict(input_mean={"nested": [value]}), protocol=protocol)


def as_file(content, form):
    """A pickle in the place of the state_dict's."""
    if form == "raw":
        return content
    if form == "legacy":
        header = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        return b"".join(pickle.dumps(part, protocol=2) for part in header) + content + pickle.dumps([], protocol=2)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["raw", "legacy", "zip"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_malicious_pickles_are_refused_by_name(form, protocol, tmp_path):
    touched = tmp_path / "touched"
    attacks = {
        f"{os.system.__module__}.system": Evil(os.system, f"touch {touched}"),
        ".eval": Evil(builtins.eval, f"open({str(touched)!r}, 'w')"),
        ".getattr": Evil(getattr, touched),
        "Innocent": Innocent(),
    }
    for name, value in attacks.items():
        path = tmp_path / "evil.pth"
        path.write_bytes(as_file(state_pickle(value, protocol), form))
        with pytest.raises(ValueError) as caught:
            weights.load(path)
        message = str(caught.value)
        assert name in message and "refused" in message and str(path) in message and "\n" not in message
    assert not touched.exists()


def tensor_pickle(storage, size, stride, offset=0, numel=4):
    """A state_dict with one tensor, whose arguments are anything."""
    mark, call = pickle.MARK, pickle.REDUCE
    persistent = b"X\x07\x00\x00\x00storage" + storage + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    persistent = mark + persistent + pickle.dumps(numel, 2)[2:-1] + pickle.TUPLE + pickle.BINPERSID
    arguments = persistent + b"".join(pickle.dumps(value, 2)[2:-1] for value in (offset, size, stride))
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n" + mark + arguments + pickle.NEWFALSE + b"N" + pickle.TUPLE + call
    return b"\x80\x02}X\x0a\x00\x00\x00input_mean" + rebuilt + b"s."


FLOAT = b"ctorch\nFloatStorage\n"
HOSTILE = {
    "beyond the end": tensor_pickle(FLOAT, (5,), (1,)),
    "before the start": tensor_pickle(FLOAT, (2,), (1,), offset=-1),
    "offset": tensor_pickle(FLOAT, (2,), (1,), offset=3),
    "huge offset": tensor_pickle(FLOAT, (2,), (1,), offset=2**64),
    "huge stride": tensor_pickle(FLOAT, (2, 2), (2**62, 1)),
    "huge storage": tensor_pickle(FLOAT, (2,), (1,), numel=2**60),
    "negative storage": tensor_pickle(FLOAT, (2,), (1,), numel=-1),
    "huge by stride 0": tensor_pickle(FLOAT, (2**40,), (0,)),
    "strides missing": tensor_pickle(FLOAT, (2, 2), (1,)),
    "list times number": tensor_pickle(FLOAT, ([0], 2**40), (1, 1)),
    "numbers without end": tensor_pickle(FLOAT, (2**2000,) * 1000, (1,) * 1000),
    "pointers": tensor_pickle(b"X\x01\x00\x00\x00O", (1,), (1,), numel=1),
    "memo": b"\x80\x02}r\xff\xff\xff\x7f" + b"K\x01K\x02s.",
    "deep key": b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s.",
    "deep storage": b"\x80\x02)" + b"\x85" * 300_000 + b"Q.",
    "bytes": b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b".",
    "no dict": pickle.dumps([1, 2], 2),
    "number": pickle.dumps({"input_mean": 1}, 2),
    "attributes": b"\x80\x02ccollections\nOrderedDict\n}X\x04\x00\x00\x00evilK\x01sb.",
    "instance": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
}


REASONS = {  # of what must be refused before it is tried
    "huge by stride 0": "more than the file holds",
    "bytes": "pickle operation 0x96 is refused",
    "instance": "pickle operation 0x81 is refused",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_structures(attack, tmp_path):
    path = tmp_path / "evil.pth"
    content = as_file(HOSTILE[attack], "zip")
    with zipfile.ZipFile(buffer := io.BytesIO(content), "a") as archive:
        archive.writestr("archive/data/0", np.arange(4, dtype="<f4").tobytes())
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="evil.pth: ") as caught:
        weights.load(path)
    assert "\n" not in str(caught.value) and REASONS.get(attack, "") in str(caught.value)


def test_archives_that_claim_more_than_they_hold(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("input_mean", (2**40,), np.float32)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_dataset("input_mean", (4,), np.float32, external=[(str(DATA / PTH[0]), 0, 16)])
    with h5py.File(tmp_path / "text.h5", "w") as file:
        file["input_mean"] = "text"
    more, other = "more than the file holds", "holds more than NNabla's"
    reasons = {"bomb.pth": more, "bomb.h5": more, "other.h5": other, "text.h5": "not an array of numbers"}
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
            weights.load(tmp_path / name)


@pytest.mark.parametrize("name", [*PTH, "ours.h5", "ours.pth"])
def test_damage_gives_weights_or_a_value_error(name, tmp_path):
    if name.startswith("ours"):
        weights.save(tmp_path / name, random_params())
        content = (tmp_path / name).read_bytes()
    else:
        content = (DATA / name).read_bytes()
    rng = random.Random(name)

    def flip(data):
        data = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)

    cut = [content[: rng.randrange(len(content))] for _ in range(30)] + [b"", content[:1], content[:-1]]
    damaged = cut + [flip(content) for _ in range(60)]
    if content.startswith(b"PK"):
        damaged += [with_another_pickle(content, flip) for _ in range(40)]
    path = tmp_path / "damaged"
    refused = 0
    for number, data in enumerate(damaged):
        path.write_bytes(data)
        try:
            assert all(value.dtype == np.float32 for value in weights.load(path).values())
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
        else:
            assert number >= len(cut), f"truncated to {len(data)} of {len(content)} bytes, and accepted"
    assert refused > len(cut)


def test_other_files(tmp_path):
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="text.pth: neither"):
        weights.load(tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError):
        weights.load(tmp_path / "missing.pth")
    with pytest.raises(ValueError, match=r"\.h5 or \.pth"):
        weights.save(tmp_path / "weights.bin", random_params())


# ------------------------------------------------------------------------------------- checksums

DESCRIPTION = {"class": "OpenUnmix", "targets": ["bass"], "nb_channels": 2, "n_fft": 32, "n_hop": 8}
DESCRIPTION["options"] = {key: SIZES[key] for key in ("hidden_size", "nb_layers", "max_bin", "unidirectional")}
DESCRIPTION.update(sample_rate=8000, statistics={"input_mean": np.arange(17, dtype=np.float32)})


def assert_same_file(found, wanted):
    """Weights and description, as `weights.read` returns them."""
    assert_same(found[0], wanted[0])
    assert list(found[0]) == list(wanted[0])
    statistics, expected = (description.get("statistics", {}) for _, description in (found, wanted))
    assert {**found[1], "statistics": 0} == {**wanted[1], "statistics": 0}
    assert_same(statistics, expected)


def test_a_flipped_bit_is_named_or_harmless(tmp_path):
    path, rng = tmp_path / "bass.h5", random.Random(0)
    weights.save(
        path,
        random_params(hidden_size=2, nb_bins=3, max_bin=2, nb_layers=1),
        {**DESCRIPTION, "n_fft": 4, "statistics": {"input_mean": np.ones(3, np.float32)}},
    )
    wanted, content = weights.read(path), path.read_bytes()
    assert wanted[1]["n_fft"] == 4
    refused = 0
    for bit in rng.sample(range(8 * len(content)), 400):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = weights.read(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert_same_file(found, wanted)
    assert refused > 50


CHANGES = {  # with h5py, carefully
    "a value": lambda file: file["fc1/affine/W"].__setitem__((0, 0), 1),
    "another order": lambda file: file["fc1/affine/W"].attrs.__setitem__("index", 99),
    "what is learnt": lambda file: file["fc1/bn/mean"].attrs.__setitem__("need_grad", True),
    "a name": lambda file: file.move("fc1/affine/W", "fc1/affine/V"),
    "a type": lambda file: (
        data := file["input_mean"][()],
        file.__delitem__("input_mean"),
        file.create_dataset("input_mean", data=data.astype("f8")),
    ),
    "one more": lambda file: file.create_dataset("more", data=np.ones(1, np.float32)),
    "one less": lambda file: file.__delitem__("input_mean"),
    "the description": lambda file: file.attrs.__setitem__(
        "network", json.dumps({**DESCRIPTION, "n_hop": 9, "statistics": []})
    ),
    "no description": lambda file: file.attrs.__delitem__("network"),
    "statistics": lambda file: file.attrs.__setitem__("input_mean", np.ones(17, np.float32)),
    "the checksum": lambda file: file.attrs.__setitem__("checksum", "0" * 64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_refused(change, tmp_path):
    path = tmp_path / "bass.h5"
    weights.save(path, random_params(), DESCRIPTION)
    assert weights.read(path)[1]["n_hop"] == 8
    with h5py.File(path, "r+") as file:
        CHANGES[change](file)
    with pytest.raises(ValueError, match=f"^{path}: it is damaged: its contents do not match its checksum$"):
        weights.load(path)


def test_files_without_a_checksum(tmp_path):
    """Those of nn.save_parameters, and ours of before."""
    path, params = tmp_path / "bass.h5", random_params()
    weights.save(path, params, DESCRIPTION)
    with h5py.File(path, "r+") as file:
        del file.attrs["checksum"]
        file["input_mean"][0] = params["input_mean"][0] = 7
    found, description = weights.read(path)
    assert_same(found, params)
    assert_same(description["statistics"], DESCRIPTION["statistics"])


def test_the_checksum_is_that_of_the_contents(tmp_path):
    """Not of how a file holds them: the same weights have the same."""
    sums = []
    for name, params in (("a", random_params(0)), ("b", random_params(0)), ("c", random_params(1))):
        weights.save(tmp_path / f"{name}.h5", params, DESCRIPTION)
        with h5py.File(tmp_path / f"{name}.h5") as file:
            sums.append(file.attrs["checksum"])
    assert sums[0] == sums[1] != sums[2]
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize("extension", [".h5", ".pth"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(extension, value, tmp_path, capsys):
    """Refused wherever they are read, in a line."""
    params = random_params()
    params["fc2/bn/beta"][0, 0, 1] = value
    path = tmp_path / f"bass{extension}"
    weights.save(path, params)
    with pytest.raises(ValueError, match=f"^{path}: these weights are not finite: fc2/bn/beta$"):
        weights.load(path)
    with pytest.raises(utils.UsageError, match="not finite: fc2/bn/beta"):
        trained.load_models(path)
    status, error = run(capsys, path, tmp_path / "converted.h5")
    assert status == 2 and "not finite: fc2/bn/beta" in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# ---------------------------------------------------------------------------------- hostile files


def sparse(path, signature, size=10**11):
    with open(path, "wb") as stream:
        stream.write(signature)
        stream.truncate(size)


def nested(path):
    with h5py.File(path, "w") as file:
        group = file
        for _ in range(1500):
            group = group.create_group("g")
        group["input_mean"] = np.ones(3, np.float32)


def doubled(path):
    """Each of 40 groups holds the next one twice: 2**40 names."""
    with h5py.File(path, "w") as file:
        group = file
        for _ in range(25):
            below = group.create_group("a")
            group["b"] = below
            group = below
        group["input_mean"] = np.ones(3, np.float32)


def many(path):
    with h5py.File(path, "w") as file:
        for k in range(15_000):
            file.create_group(str(k))


def one_by_many_names(path):
    with h5py.File(path, "w") as file:
        file["0"] = np.zeros(10**6, np.float32)
        for k in range(1, 300):
            file[str(k)] = file["0"]


def newer(path):
    with h5py.File(path, "w", libver="latest") as file:
        file["input_mean"] = np.ones(3, np.float32)


def shared_text(path):
    """An attribute of many texts, all of them the same megabyte of the file."""
    with h5py.File(path, "w") as file:
        file.attrs.create("network", ["x" * 2**16] * 2000, dtype=h5py.string_dtype())
        file["input_mean"] = np.ones(3, np.float32)


def dataset(**options):
    def make(path):
        with h5py.File(path, "w") as file:
            file.create_dataset("input_mean", dtype="f4", **options)

    return make


def linked(link):
    def make(path):
        with h5py.File(path, "w") as file:
            file["input_mean"] = link

    return make


def records(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"}.")
        for k in range(20_000):
            archive.writestr(f"a/data/{k}", b"")


def zip64(path):
    """An archive that says of its directory that it has 2**60 bytes."""
    content = as_file(b"}.", "zip")
    end = content[-22:]
    more = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2**60, 2**60, 2**60, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(content) - 22, 1)
    path.write_bytes(content[:-22] + more + locator + end[:8] + b"\xff" * 12 + end[20:])


def pickled(content, form):
    return lambda path: path.write_bytes(as_file(content, form))


def directory(path):
    path.mkdir()


LARGE = {
    "a pipe": (os.mkfifo, "not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a folder": (directory, "Is a directory"),
    "zeros": (lambda path: sparse(path, b""), "neither NNabla's"),
    "a sparse h5": (lambda path: sparse(path, b"\x89HDF\r\n\x1a\n"), "more than a network has"),
    "a sparse zip": (lambda path: sparse(path, b"PK\3\4"), "more than a network has"),
    "a sparse pickle": (lambda path: sparse(path, b"\x80\x02"), "more than a network has"),
    "a smaller sparse pickle": (lambda path: sparse(path, b"\x80\x02", 10**9), "refused"),
    "nested groups": (nested, "within each other"),
    "names without end": (doubled, "more arrays and groups"),
    "many groups": (many, "more arrays and groups"),
    "one array by many names": (one_by_many_names, "more than the file holds"),
    "shared text": (shared_text, "its description of the network is damaged"),
    "chunks": (dataset(shape=(10,), maxshape=(None,), chunks=(2**28,)), "not an array of numbers"),
    "compressed": (dataset(data=np.zeros(10**6), compression="gzip"), "holds more than NNabla's"),
    "a newer format": (newer, "its HDF5 format is newer than that of NNabla's"),
    "a soft link": (linked(h5py.SoftLink("/other")), "input_mean is a link"),
    "an external link": (linked(h5py.ExternalLink("/etc/passwd", "/")), "holds more than NNabla's"),
    "marks": (pickled(b"\x80\x02" + b"(" * 5_000_000, "zip"), "more than a few tensors"),
    "marks, legacy": (pickled(b"\x80\x02" + b"(" * 5_000_000, "raw"), "more than a few tensors"),
    "dicts": (pickled(b"\x80\x02" + b"}" * 5_000_000, "zip"), "more than a few tensors"),
    "memo": (pickled(b"\x80\x04}" + b"\x94" * 5_000_000, "zip"), "more than a few tensors"),
    "a long text": (pickled(b"\x80\x02X\xff\xff\xff\x7f", "raw"), "damaged|more than"),
    "records": (records, "more than a few tensors"),
    "zip64": (zip64, "damaged"),
}


@pytest.mark.parametrize("attack", LARGE)
def test_files_that_would_take_long_or_fill_the_memory(attack, tmp_path):
    make, message = LARGE[attack]
    path = tmp_path / "bass.h5"
    make(path)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, OSError), match=message) as caught:
        weights.load(path)
    assert time.process_time() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1200


BAD = {  # what a description says instead
    "no dict": [1],
    "a class": {"class": ["OpenUnmix"]},
    "options": {"options": []},
    "no targets": {"targets": []},
    "too many targets": {"targets": [f"t{k}" for k in range(1000)]},
    "a number for a target": {"targets": [3]},
    "half a character": {"targets": ["\ud800"]},
    "a truth for a size": {"nb_channels": True},
    "half a hop": {"n_hop": 0.5},
    "a rate of nan": {"sample_rate": float("nan")},
    "a rate of text": {"sample_rate": "44100"},
    "statistics that are not there": {"statistics": ["input_scale"]},
    "statistics of another size": {"n_fft": 64},
    "statistics of numbers": {"statistics": [[1]]},
    "hidden_size": {"options": {**DESCRIPTION["options"], "hidden_size": 10**9}},
    "n_fft": {"n_fft": 2**30, "statistics": []},
    "nb_channels": {"nb_channels": 2**30},
    "nb_layers": {"options": {**DESCRIPTION["options"], "nb_layers": -1}},
    "many layers": {"options": {**DESCRIPTION["options"], "nb_layers": 10**9}},
    "max_bin": {"options": {**DESCRIPTION["options"], "max_bin": 0}},
    "dropout": {"options": {**DESCRIPTION["options"], "dropout": "x"}},
    "an unknown option": {"options": {**DESCRIPTION["options"], "size": 3}},
    "a joint network": {"class": "JointOpenUnmix"},
    "text": "[" * 100_000,
}


@pytest.mark.parametrize("what", BAD)
def test_descriptions_that_lie(what, tmp_path):
    path, start = tmp_path / "bass.h5", time.process_time()
    weights.save(path, random_params(), DESCRIPTION)
    bad = BAD[what]
    with h5py.File(path, "r+") as file:
        whole = json.loads(file.attrs["network"])
        text = bad if isinstance(bad, str) else json.dumps({**whole, **bad} if isinstance(bad, dict) else bad)
        file.attrs["network"] = text
        del file.attrs["checksum"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(utils.UsageError) as caught:
        trained.load_models(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "what",
    [
        {"model": None},
        {"model": 3},
        {"model": b"x"},
        {"model": ["a"]},
        {"model": ""},
        {"model": "a\0b"},
        {"model": "~nobody/x"},
        {"targets": []},
        {"targets": ""},
        {"targets": [3]},
        {"targets": 3},
        {"targets": {"bass": 1}},
        {"targets": "tuba"},
        {"targets": ["bass", "bass"]},
        {"model_dir": 3},
    ],
    ids=str,
)
def test_arguments_that_cannot_be(what, tmp_path):
    weights.save(tmp_path / "bass.h5", random_params(), DESCRIPTION)
    with pytest.raises(utils.UsageError) as caught:
        trained.load_models(**{"model": tmp_path / "bass.h5", **what})
    assert "\n" not in str(caught.value)
    if "model" not in what:
        with pytest.raises(utils.UsageError):
            trained.umx_spec(**what)


# ----------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("extension", [".h5", ".pth"])
def test_a_disk_that_fills_at_any_moment(extension, tmp_path):
    """The error is told, and what was there stays; no library sees it, and dies of it."""
    path, params = tmp_path / f"bass{extension}", random_params()
    weights.save(path, params)
    good = path.read_bytes()
    child = """
import resource, sys
import numpy as np
import weights
params = weights.load(sys.argv[1])
for size in range(0, int(sys.argv[2]), int(sys.argv[2]) // 60):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        weights.save(sys.argv[1], params, None)
        print("saved")
    except OSError as error:
        print(error.errno, error.filename == sys.argv[1])
"""
    command = [sys.executable, "-c", child, str(path), str(len(good))]
    result = subprocess.run(command, cwd=Path(weights.__file__).parent, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split("\n")) == {f"{errno.EFBIG} True", ""}
    assert path.read_bytes() == good and [file.name for file in tmp_path.iterdir()] == [path.name]


# --------------------------------------------------------------------------------- command line


def run(capsys, *command):
    """Exit status and stderr of weights.py."""
    try:
        weights.main([str(part) for part in command])
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


@pytest.fixture
def torch_folder(tmp_path):
    """A model folder of openunmix: one plain file name, one with a hash."""
    folder = tmp_path / "openunmix"
    folder.mkdir()
    config = {"nfft": 32, "nhop": 8, "sample_rate": 8000, "nb_channels": 2}
    (folder / "separator.json").write_text(json.dumps(config))
    for target, name in (("bass", "bass.pth"), ("vocals", "vocals-0123abcd.pth")):
        (folder / name).write_bytes((DATA / "weights_zip.pth").read_bytes())
        arguments = {"nfft": 32, "hidden_size": 4, "nb_channels": 2, "unidirectional": True, "lr": 0.001}
        (folder / f"{target}.json").write_text(json.dumps({"args": arguments, "best_loss": 0.5}))
    return folder


def test_convert_files(tmp_path, capsys):
    source, ours, theirs = DATA / "weights_legacy.pth", tmp_path / "a.h5", tmp_path / "b.pth"
    assert run(capsys, source, ours) == (0, "")
    assert run(capsys, ours, theirs) == (0, "")
    assert_same(weights.load(theirs), weights.load(source))


def test_convert_folders(torch_folder, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "new" / "back"
    assert run(capsys, torch_folder, ours) == (0, "")
    names = ["bass.h5", "bass.json", "separator.json", "vocals.h5", "vocals.json"]
    assert sorted(path.name for path in ours.iterdir()) == names
    config = {"nfft": 32, "nhop": 8, "sample_rate": 8000, "nb_channels": 2, "targets": ["vocals", "bass"]}
    assert json.loads((ours / "separator.json").read_text()) == config
    log = json.loads((ours / "vocals.json").read_text())
    assert log["best_loss"] == 0.5 and log["args"]["lr"] == 0.001 and log["args"]["nb_layers"] == 2
    assert not log["args"]["unidirectional"]  # the reference notes the option and ignores it
    assert run(capsys, ours, back, "--to", "pth") == (0, "")
    assert_same(weights.load(back / "vocals.pth"), weights.load(DATA / "weights_zip.pth"))
    assert json.loads((back / "separator.json").read_text()) == config


def spoil(folder, name, content):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("separator.json", None, "separator.json"),
        ("separator.json", b'{"nfft": 32, "nhop": 8}', "lacks sample_rate"),
        ("separator.json", b'{"nfft": 64, "nhop": 8, "sample_rate": 8000}', "nfft 64"),
        ("separator.json", b'{"targets": ["../bass"]}', "'../bass' cannot name a file"),
        (
            "separator.json",
            b'{"nhop": 8, "sample_rate": 8000, "targets": ["drums"]}',
            "no weights of the target 'drums'",
        ),
        ("separator.json", b'{"targets": 3}', "not a list of names"),
        ("separator.json", b"[]", "separator.json"),
        ("separator.json", b"[" * 100_000, "cannot read"),
        ("bass.json", b"[" * 100_000, "cannot read"),
        ("bass.json", b"[]", "bass.json is not what a training writes"),
        ("bass.json", b'{"args": {"hidden_size": [4]}}', "hidden_size [4]"),
        ("bass.json", b'{"args": {"hidden_size": 512}}', "hidden_size 512"),
        ("bass.json", b'{"args": 3}', "bass.json"),
        ("vocals-fedcba98.pth", b"", "several files of the target 'vocals'"),
        ("vocals-0123abcd.pth", b"PK\3\4 and no more", "vocals-0123abcd.pth"),
        ("bass.h5", b"", "both"),
    ],
)
def test_convert_a_spoilt_folder(name, content, message, torch_folder, tmp_path, capsys):
    spoil(torch_folder, name, content)
    status, error = run(capsys, torch_folder, tmp_path / "ours")
    assert status == 2 and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["openunmix"]


def test_what_a_killed_conversion_leaves_the_next_one_removes(torch_folder, tmp_path, capsys):
    """Killed where each of its files gets its name: nothing is there but what is not yet whole."""
    child = """
import os, sys
import weights
left, replace = int(sys.argv[3]), os.replace
def count(*paths):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    replace(*paths)
os.replace = count
weights.convert_folder(sys.argv[1], sys.argv[2])
"""
    ours, killed = tmp_path / "new" / "ours", 0
    for number in (0, 2, 4):
        command = [sys.executable, "-c", child, str(torch_folder), str(ours), str(number)]
        status = subprocess.run(command, cwd=Path(weights.__file__).parent, capture_output=True).returncode
        assert status == -9 and len(list(ours.parent.iterdir())) == 1 and not ours.exists()
        killed += 1
    ours.mkdir()  # an empty folder may be there already
    assert run(capsys, torch_folder, ours) == (0, "")
    assert [path.name for path in ours.parent.iterdir()] == ["ours"] and killed == 3
    assert sorted(path.name for path in ours.iterdir()) == sorted(
        ["bass.h5", "bass.json", "separator.json", "vocals.h5", "vocals.json"]
    )
    status, error = run(capsys, torch_folder, ours)
    assert status == 2 and "not an empty folder" in error
    (tmp_path / ".01234567.partial").touch()
    assert run(capsys, ours / "bass.h5", tmp_path / "bass.pth") == (0, "")
    assert not (tmp_path / ".01234567.partial").exists()


def test_convert_into_a_folder_that_cannot_be_written(torch_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    for command, message in (
        ((torch_folder, tmp_path / "file" / "new"), "cannot write to the output folder"),
        ((torch_folder / "bass.pth", tmp_path / "file" / "new.h5"), "there is no folder"),
        ((torch_folder / "bass.pth", tmp_path / "nowhere" / "new.h5"), "there is no folder"),
        ((torch_folder / "bass.pth", Path("/proc/new.h5")), "cannot write to the output folder /proc"),
        ((torch_folder, Path("/proc/new")), "cannot write to the output folder /proc"),
        ((torch_folder / "bass.pth", "~nobody-of-that-name/new.h5"), "there is no folder"),
    ):
        status, error = run(capsys, *command)
        assert status == 2 and message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "openunmix"]


def test_convert_refuses(torch_folder, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    (tmp_path / "empty").mkdir()
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["conv/W"] = np.ones(3)
    before = sorted(tmp_path.rglob("*"))
    for command, message in (
        ((torch_folder, full), "not an empty folder"),
        ((tmp_path / "empty", tmp_path / "new"), "neither .h5 nor .pth"),
        ((tmp_path / "missing.pth", tmp_path / "new.h5"), "does not exist"),
        (("/dev/null", tmp_path / "new.h5"), "/dev/null is neither a file nor a folder"),
        ((DATA / PTH[0], tmp_path / "new.bin"), ".h5 or .pth"),
        ((DATA / PTH[0], tmp_path / "new.h5", "--to", "h5"), "--to"),
        ((tmp_path / "foreign.h5", tmp_path / "new.pth"), "foreign.h5: these weights do not fit: unknown conv/W"),
    ):
        status, error = run(capsys, *command)
        assert status == 2 and message in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
