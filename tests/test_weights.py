"""weights.py: formats, names, damaged and malicious files (tests/data/weights_* were written by torch 2.13)."""

import builtins
import collections
import io
import json
import os
import pickle
import random
import threading
import zipfile
from pathlib import Path

import h5py
import nnabla as nn
import numpy as np
import pytest
import shapes

import args
import model
import torch_files
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
    more, other = "more than the file holds", "not an array of numbers"
    for name, reason in {"bomb.pth": more, "bomb.h5": more, "other.h5": other, "text.h5": other}.items():
        with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
            weights.load(tmp_path / name)


def with_another_pickle(content, change):
    """A zip file of torch with its pickle changed and its checksums right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as archive:
        for name in source.namelist():
            record = source.read(name)
            archive.writestr(name, change(record) if name.endswith("data.pkl") else record)
    return buffer.getvalue()


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
        ((DATA / PTH[0], tmp_path / "new.bin"), ".h5 or .pth"),
        ((DATA / PTH[0], tmp_path / "new.h5", "--to", "h5"), "--to"),
        ((tmp_path / "foreign.h5", tmp_path / "new.pth"), "foreign.h5: these weights do not fit: unknown conv/W"),
    ):
        status, error = run(capsys, *command)
        assert status == 2 and message in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
