"""Which files a folder of a trained model holds: one answer, whichever command asks."""

import json

import numpy as np
import pytest
import shapes

import evaluate
import folders
import separate
import train
import weights
from utils import UsageError

SIZES = {"nb_channels": 2, "hidden_size": 4, "nb_layers": 1, "nb_bins": 129, "max_bin": 60, "unidirectional": False}
CONFIG = {"nfft": 256, "nhop": 64, "sample_rate": 44100, "nb_channels": 2}


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.1, 1, shape).astype(np.float32) for name, shape in shapes.open_unmix(**SIZES).items()}


def make(folder, *files, config=CONFIG, targets=None):
    folder.mkdir()
    for seed, name in enumerate(files):
        if name.endswith((".h5", ".pth")):
            weights.save(folder / name, params(seed))
        else:
            (folder / name).write_text("{}")
    if config:
        (folder / "separator.json").write_text(json.dumps({**config, **({"targets": targets} if targets else {})}))
    return folder


# Files of the folder, targets in separator.json; then the answer when all targets are asked for, and when it is bass
# alone: {target: file}, or a part of the message.
TWO = "several files of the target 'bass'"
FOLDERS = {
    "two files": (["bass-aaaaaaaa.pth", "bass-bbbbbbbb.pth"], None, TWO, TWO),
    "two files, listed": (["bass-aaaaaaaa.pth", "bass-bbbbbbbb.pth"], ["bass"], TWO, TWO),
    "underscore": (["bass_aaaa.pth"], None, {"bass": "bass_aaaa.pth"}, {"bass": "bass_aaaa.pth"}),
    "longer name": (
        ["bass-x.pth", "bassoon.pth"],
        None,
        {"bass": "bass-x.pth", "bassoon": "bassoon.pth"},
        {"bass": "bass-x.pth"},
    ),
    "no bass.json": (
        ["bass.h5", "drums.h5", "drums.json"],
        None,
        {"drums": "drums.h5", "bass": "bass.h5"},
        {"bass": "bass.h5"},
    ),
    "listed without weights": (
        ["bass.h5"],
        ["bass", "drums"],
        "no weights of the target 'drums' (drums.h5",
        {"bass": "bass.h5"},
    ),
    "another target's file": (
        ["bass.pth", "bass-drum.pth"],
        ["bass", "bass-drum"],
        {"bass": "bass.pth", "bass-drum": "bass-drum.pth"},
        {"bass": "bass.pth"},
    ),
    "only another target's": (
        ["bass-drum.pth", "bass-drum.json"],
        None,
        {"bass-drum": "bass-drum.pth"},
        "no weights of the target 'bass'",
    ),
    "both formats": (["bass.h5", "bass.pth"], None, {"bass": "bass.h5"}, {"bass": "bass.h5"}),
    "empty": ([], None, "no weights", "no weights of the target 'bass'"),
}


@pytest.fixture
def read(monkeypatch):
    """Names of the files that weights are read from."""
    names, whole = [], weights.read

    def recorded(path):
        names.append(path.name)
        return whole(path)

    monkeypatch.setattr(weights, "read", recorded)
    return names


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.parametrize("command", ["separate", "evaluate", "weights", "train"])
def test_one_answer_for_all_commands(songs, tmp_path, read, capsys, case, command):
    files, targets, answer_for_all, answer_for_bass = FOLDERS[case]
    folder = make(tmp_path / "model", *files, targets=targets)
    mixture = next((songs / "test").iterdir()) / "mixture.wav"
    common = ["--model", str(folder), "--context", "cpu", "--quiet"]
    musdb = ["--root", str(songs), "--is-wav"]
    commands = {
        "separate": (separate.main, [str(mixture), "--outdir", str(tmp_path / "stems"), "--duration", "0.1", *common]),
        "evaluate": (evaluate.main, [*musdb, "--residual", "rest", *common]),
        "weights": (weights.main, [str(folder), str(tmp_path / "converted")]),
        "train": (train.main, ["--output", str(tmp_path / "o"), *musdb, *common, "--epochs", "1", "--seq-dur", "0.1"]),
    }
    main, options = commands[command]
    asked = {"all": answer_for_all, "bass": answer_for_bass}
    asked.pop({"weights": "bass", "train": "all"}.get(command), None)  # one converts all, the other trains one
    for which, answer in asked.items():
        if command == "weights" and case == "both formats":
            answer = "both .h5 and .pth: say --to"
        if command == "weights" and case == "empty":
            answer = "neither .h5 nor .pth"
        if command == "evaluate" and which == "all" and answer == {"bass": "bass-x.pth", "bassoon": "bassoon.pth"}:
            continue  # there is no bassoon in MUSDB18
        read.clear()
        capsys.readouterr()
        option = {"train": "--target"}.get(command, "--targets")
        evaldir = ["--evaldir", str(tmp_path / which)] if command == "evaluate" else []
        try:
            main([*options, *evaldir, *([option, "bass"] if which == "bass" else [])])
            error, status = "", 0
        except SystemExit as stop:
            error, status = capsys.readouterr().err, stop.code
        if isinstance(answer, dict):
            known = status == 0 or command == "evaluate" and "MUSDB18 has no" in error
            assert known and sorted(read) == sorted(answer.values()), error
        else:
            assert status == 2 and answer in error and error.count("\n") == 1, error


def test_find_says_which_file_is_whose(tmp_path):
    for number, (files, targets, answer_for_all, answer_for_bass) in enumerate(FOLDERS.values()):
        folder = make(tmp_path / str(number), *files, targets=targets)
        for asked, answer in ((None, answer_for_all), (["bass"], answer_for_bass)):
            if isinstance(answer, dict):
                found, config = folders.find(folder, asked)
                assert {target: path.name for target, path in found.items()} == answer
                assert config["nhop"] == 64
            else:
                with pytest.raises(UsageError) as error:
                    folders.find(folder, asked)
                assert answer in str(error.value)


def test_a_joint_file_is_that_of_each_target(tmp_path):
    folder = make(tmp_path / "a", "vocals+drums.h5", "bass.h5")
    found, _ = folders.find(folder)
    assert {target: path.name for target, path in found.items()} == {
        "vocals": "vocals+drums.h5",
        "drums": "vocals+drums.h5",
        "bass": "bass.h5",
    }
    folder = make(tmp_path / "b", "vocals+drums.h5", "drums.h5")
    with pytest.raises(UsageError, match="several files of the target 'drums'"):
        folders.find(folder)


@pytest.mark.parametrize(
    "name, target",
    [
        ("bass.h5", "bass"),
        ("bass-0123abcd.pth", "bass"),
        ("speech_f5e0d9f9.pth", "speech"),
        ("umx_vocals_h8.h5", "vocals"),
        ("bassoon.pth", "bassoon"),
        ("vocals_and_drums.h5", "vocals_and_drums"),
        ("piano-left.h5", "piano-left"),
    ],
)
def test_the_target_that_a_file_is_named_after(tmp_path, name, target):
    assert folders.target_of(tmp_path / name) == target


def test_a_file_has_the_sizes_of_its_folder(tmp_path):
    """separator.json counts for a single file of its folder, too."""
    folder = make(tmp_path / "a", "bass.h5", config={**CONFIG, "sample_rate": 8000})
    by_file, by_folder = (separate.Separator.load(path, context="cpu") for path in (folder / "bass.h5", folder))
    assert (by_file.sample_rate, by_file.n_hop) == (by_folder.sample_rate, by_folder.n_hop) == (8000, 64)
    (folder / "separator.json").unlink()
    with pytest.raises(UsageError, match="a hop of 1024"):  # what music models have
        separate.Separator.load(folder / "bass.h5", context="cpu")


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "not what a training writes"),
        ("3", "not what a training writes"),
        ("[" * 100_000, "cannot read"),
        ("{" * 100_000, "cannot read"),
        ('{"nhop": 64, "sample_rate": NaN}', "sample_rate nan"),
        ('{"nhop": 1e999, "sample_rate": 8000}', "nhop inf"),
        ('{"nhop": [64], "sample_rate": 8000}', "nhop"),
        ('{"nhop": 1' + "0" * 4000 + ', "sample_rate": 8000}', "nhop 1000"),
        ('{"nhop": 1' + "0" * 5000 + ', "sample_rate": 8000}', "cannot read"),
        ('{"nhop": 64, "sample_rate": 8000, "targets": [3]}', "the target 3 cannot name a file"),
        ('{"nhop": 64, "sample_rate": 8000, "targets": ["\\ud800"]}', "cannot name a file"),
        ('{"nhop": 64, "sample_rate": 8000, "targets": [' + '"a",' * 10_000 + '"b"]}', "not a list of names"),
        ("\0", "cannot read"),
        ("{}", "lacks nhop and sample_rate"),
        ('{"nhop": 64, "sample_rate": -1}', "sample_rate -1"),
        ('{"nhop": true, "sample_rate": 8000}', "nhop True"),
        ('{"nhop": 64, "sample_rate": 8000.5}', "8000.5"),
        ('{"nhop": 64, "sample_rate": 8000, "targets": "bass"}', "not a list of names"),
        ('{"nhop": 64, "sample_rate": 8000, "targets": ["a/b"]}', "'a/b' cannot name a file"),
        ('{"nhop": 64, "sample_rate": 8000, "targets": ["bass", "bass"]}', "named twice"),
    ],
)
def test_a_separator_json_that_cannot_be(tmp_path, content, message):
    folder = make(tmp_path / "a", "bass.h5")
    (folder / "separator.json").write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        folders.find(folder)
    assert str(folder / "separator.json") in str(error.value)


def test_targets_enter_separator_json_one_by_one(tmp_path):
    folders.write_config(tmp_path, CONFIG, ["speech"])
    folders.write_config(tmp_path, CONFIG, ["noise", "speech"])
    assert json.loads((tmp_path / "separator.json").read_text()) == {**CONFIG, "targets": ["noise", "speech"]}
    with pytest.raises(UsageError, match="says nhop = 64, not 32: use another --output"):
        folders.check_config(tmp_path, {**CONFIG, "nhop": 32})


def test_what_a_separator_json_says_and_what_is_so_without(tmp_path):
    (tmp_path / "bass.h5").touch()
    assert folders.find(tmp_path)[1] == {"nhop": 1024, "sample_rate": 44100}  # as openunmix trains
    (tmp_path / "separator.json").write_text('{"sample_rate": 48000.0, "nhop": 512.0, "targets": ["bass"]}')
    config = folders.find(tmp_path)[1]
    assert config == {"nhop": 512, "sample_rate": 48000, "targets": ["bass"]}
    assert {type(config[key]) for key in ("nhop", "sample_rate")} == {int}


def test_targets_have_an_order_of_their_own(tmp_path):
    """Not that of separator.json, which is the alphabet's."""
    usual = ["vocals", "drums", "bass", "other", "noise"]
    for target in usual:
        (tmp_path / f"{target}.h5").touch()
    assert list(folders.find(tmp_path)[0]) == usual
    (tmp_path / "separator.json").write_text(json.dumps({"sample_rate": 8000, "nhop": 64, "targets": sorted(usual)}))
    assert list(folders.find(tmp_path)[0]) == usual


def test_targets_that_a_caller_names():
    assert folders.asked_for(None) is None
    assert folders.asked_for("bass") == ["bass"] == folders.asked_for(("bass",))
    for targets in ([], "", (), 3, b"bass", {"bass": 1}, [None], ["a\nb"], ["x" * 1000]):
        with pytest.raises(UsageError, match="target") as error:
            folders.asked_for(targets)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("targets", [["a+b"], ["../a"], [".a"], [""], ["a/b"], ["a", "b", "a"]])
def test_names_that_targets_cannot_have(targets):
    folders.check_targets(["a", "b-c", "d.e"])
    with pytest.raises(UsageError, match="target"):
        folders.check_targets(targets)
