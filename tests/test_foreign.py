"""A loss of one's own, FILE.py:FUNCTION: named, recorded, asked for again; one line for all that is wrong with it."""

import json

import numpy as np
import pytest
from trainings import TINY, assert_same_state

import losses
import train
from utils import UsageError

FILE = """import nnabla.functions as F

import losses


def cubic(signals):
    return losses.sum_over_targets(lambda a, b: F.mean(F.abs(a - b) ** 3), signals.Y_hat, signals.Y)


def weighted(signals, mcoef):
    return losses.mse(signals) * mcoef


def whole(signals):
    return signals.Y_hat["bass"]


def fails(signals):
    return signals.nothing


def refuses(signals):
    raise ValueError("nothing of the kind")


number = 3
"""


@pytest.fixture
def elsewhere(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    (tmp_path / "raises.py").write_text("a = 1\n\nb = a / 0\n")
    return file


def run(songs, output, *options):
    train.main([*TINY, "--root", str(songs), "--output", str(output), *map(str, options)])
    return json.loads((output / "bass.json").read_text())


def refused(capsys, *arguments):
    """The line of an error, which is the only one."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


def test_a_training_with_a_loss_of_ones_own(songs, tmp_path, elsewhere, capsys):
    """Two epochs at once are one and another after resuming, which takes the file again, wherever it is now."""
    log = run(songs, tmp_path / "a", "--loss", f"{elsewhere}:cubic", "--epochs", "2")
    assert log["args"]["loss"] == "mine.py:cubic"
    assert log["valid_loss_history"] != run(songs, tmp_path / "mse", "--epochs", "1")["valid_loss_history"]
    run(songs, tmp_path / "b", "--loss", f"{elsewhere}:cubic", "--epochs", "1")
    (tmp_path / "moved").mkdir()
    moved = elsewhere.rename(tmp_path / "moved" / "mine.py")
    again = (songs, tmp_path / "b", "--checkpoint", tmp_path / "b", "--epochs", "2")
    assert "name its file again: --loss mine.py:cubic" in refused(capsys, *again)
    assert "--loss mine.py:weighted: " in refused(capsys, *again, "--loss", f"{moved}:weighted")
    assert "--loss mse: " in refused(capsys, *again, "--loss", "mse")
    run(*again, "--loss", f"{moved}:cubic")
    assert_same_state(tmp_path / "a", tmp_path / "b")


def test_a_checkpoint_runs_no_file(songs, tmp_path, elsewhere, monkeypatch, capsys):
    """Not even one of the name that it holds, right here."""
    run(songs, tmp_path / "a", "--loss", f"{elsewhere}:cubic", "--epochs", "1")
    monkeypatch.chdir(tmp_path)
    elsewhere.write_text("open('touched', 'w')\n")
    refused(capsys, songs, tmp_path / "a", "--checkpoint", tmp_path / "a", "--epochs", "2")
    assert not (tmp_path / "touched").exists()


def test_options_of_a_loss_of_ones_own(songs, tmp_path, elsewhere, capsys):
    """Those of ours that it has."""
    one, three = (
        run(songs, tmp_path / mcoef, "--epochs", "1", "--loss", f"{elsewhere}:weighted", "--mcoef", mcoef, "--lr", 1e-9)
        for mcoef in "13"
    )
    np.testing.assert_allclose(three["valid_loss_history"], 3 * np.array(one["valid_loss_history"]), rtol=1e-5)
    wrong = (songs, tmp_path / "c", "--epochs", "1", "--loss", f"{elsewhere}:cubic", "--mcoef", "3")
    assert "--loss mine.py:cubic has no option mcoef: it has none" in refused(capsys, *wrong)


@pytest.mark.parametrize(
    "loss, message",
    [
        ("cubic", "there are mse, l1, sdr, xumx, and FILE.py:FUNCTION"),
        ("{folder}/mine.py:", "expected FILE.py:FUNCTION"),
        (":cubic", "expected FILE.py:FUNCTION"),
        ("{folder}/none.py:cubic", "there is no file"),
        ("{folder}/mine.py:cube", "has no function cube"),
        ("{folder}/mine.py:number", "has no function number"),
        ("{folder}/raises.py:cubic", "raises.py, line 3: ZeroDivisionError"),
        ("{folder}/mine.py:whole", "expected a variable of shape ()"),
        ("{folder}/mine.py:fails", "mine.py, line 19: AttributeError"),
        ("{folder}/mine.py:refuses", "mine.py, line 23: ValueError: nothing of the kind"),
    ],
)
def test_what_is_no_loss(songs, tmp_path, elsewhere, capsys, loss, message):
    """One line, exit status 2, nothing written."""
    loss = loss.format(folder=tmp_path)
    error = refused(capsys, songs, tmp_path / "a", "--epochs", "1", "--loss", loss)
    assert message in error and error.count("--loss") == 1
    assert not (tmp_path / "a").exists()


def test_a_loss_can_be_called_from_python(elsewhere):
    assert losses.read("mse") is None
    own = losses.read(f"{elsewhere}:fails")
    assert own.name == "mine.py:fails"
    with pytest.raises(UsageError, match="line 19: AttributeError"):
        own.function(None)
