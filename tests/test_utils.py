import json
import os
import signal
import time

import numpy as np
import pytest

import utils


def test_atomic_path_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "value.json"
    utils.write_json(path, 1)
    with pytest.raises(RuntimeError), utils.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a machine that loses power right after may find the name, and nothing under it."""
    events, sync, replace = [], os.fsync, os.replace

    def fsync(number):
        events.append(("on the disk", os.fstat(number).st_ino, os.fstat(number).st_size))
        sync(number)

    def rename(source, target):
        events.append(("renamed", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    utils.write_json(tmp_path / "value.json", "x" * 5000)
    file = (tmp_path / "value.json").stat()
    place = events.index(("renamed", file.st_ino, file.st_size))
    assert ("on the disk", file.st_ino, file.st_size) in events[:place]


@pytest.mark.parametrize(
    "error, status", [(utils.UsageError("bad input"), 2), (OSError("disk full"), 1), (KeyboardInterrupt(), 130)]
)
def test_command_turns_errors_into_one_line_and_a_status(error, status, capsys):
    @utils.command
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == status
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interruption_that_nnabla_disguises(capsys):
    @utils.command
    def main(argv=None):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RuntimeError("error in a function") from None

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err

    @utils.command
    def broken(argv=None):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):  # with its traceback: that is for us
        broken([])


def test_max_bin_of_the_published_models():
    assert utils.bandwidth_to_max_bin(44100, 4096, 16000) == 1487
    assert utils.bandwidth_to_max_bin(44100, 4096, 10**6) == 2049  # never more than there are
    assert utils.bandwidth_to_max_bin(8, 8, 2) == 3  # a bin that lies exactly on the bandwidth is kept


def test_early_stopping_counts_epochs_without_improvement():
    stopping = utils.EarlyStopping(patience=2)
    assert [stopping.step(loss) for loss in (3, 2, 2, 1.5)] == [True, True, False, True]
    assert not stopping.stop
    stopping.step(1.6)
    assert not stopping.stop
    stopping.step(1.5)
    assert stopping.stop
    never = utils.EarlyStopping(patience=0)
    assert not any(never.step(1) and never.stop for _ in range(9)) and not never.stop


def test_plateau_decays_after_patience_and_waits_for_the_cooldown():
    scheduler = utils.ReduceLROnPlateau(1.0, factor=0.5, patience=2, cooldown=3)
    rates = [scheduler.step(1.0) for _ in range(13)]
    # best, 2 bad, decay, 3 epochs of cooldown, 2 bad, decay, …
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


def test_plateau_resumes_from_its_state():
    losses = np.random.RandomState(0).rand(60)
    whole = utils.ReduceLROnPlateau(1.0, 0.5, 3)
    expected = [whole.step(loss) for loss in losses]
    first = utils.ReduceLROnPlateau(1.0, 0.5, 3)
    head = [first.step(loss) for loss in losses[:30]]
    second = utils.ReduceLROnPlateau(1.0, 0.5, 3)
    second.state = json.loads(json.dumps(first.state))
    assert head + [second.step(loss) for loss in losses[30:]] == expected


def test_folder_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(utils.UsageError, match="cannot write"):
        utils.writable_folder(tmp_path / "file" / "below")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="this system has no folder that not even root can write to")
def test_a_folder_without_room_for_files_is_a_usage_error():
    with pytest.raises(utils.UsageError, match="cannot write to the output folder /proc"):
        utils.writable_folder("/proc")


@pytest.mark.parametrize("content", [None, "", "{", "\xff"])
def test_a_file_that_is_not_json_is_a_usage_error(tmp_path, content):
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(utils.UsageError, match="cannot read .*value.json"):
        utils.read_json(path)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "../a", "a/", "a\0b"])
def test_names_of_other_places(name):
    assert utils.is_file_name("..a") and utils.is_file_name("a.b") and not utils.is_file_name(name)
