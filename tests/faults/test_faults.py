"""Short runs of the programs of this folder, and what they must notice. Long ones: make faults."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import common
import damage
import disk
import pytest

FOLDER = Path(__file__).parent
SHORT = {  # with the same seeds each time: to find more is for the long runs
    "kill.py": ["--runs", "4", "--only", "train", "--seed", "1"],
    "disk.py": ["--runs", "8", "--seed", "1"],
    "damage.py": ["--runs", "40", "--seed", "1"],
    "media.py": ["relative.ffconcat", "pipe.m3u8", "hls.mp3", "alias.m4a", "concat:", "frame%"],
    "fuzz.py": ["--seconds", "8", "--seed", "1"],
}


@pytest.mark.parametrize("program", SHORT)
def test_a_short_run(program):
    command = [sys.executable, FOLDER / program, *SHORT[program]]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert result.returncode == 0, result.stdout
    print(result.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------- what they must notice


def forgetful(folder):
    """Writes in place, and takes no error seriously."""
    try:
        (folder / "value").write_bytes(b"new" * 10_000)
    except OSError:
        print("disk.py: value: File too large", file=sys.stderr)
        sys.exit(1)


def littering(folder):
    (folder / "value.part").write_bytes(b"new" * 5_000)
    (folder / "value.more").write_bytes(b"new" * 5_000)
    os.replace(folder / "value.more", folder / "value.part")
    os.replace(folder / "value.part", folder / "value")


def crashing(folder):
    try:
        littering(folder)
    except OSError:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "work, result", [(forgetful, "BAD file"), (littering, "BAD end"), (crashing, "BAD end"), (None, "good")]
)
def test_a_bad_writer_is_noticed(tmp_path, work, result):
    def earlier(folder):
        (folder / "value").write_bytes(b"old")

    writer = disk.Writer("bad", work or littering, earlier)
    writer.make(tmp_path)
    assert disk.limited(writer, tmp_path, 0.5 if work else 1).result == result


@pytest.mark.parametrize(
    "lines, problem",
    [
        ("sys.exit(0)", ""),
        ("sys.exit('one line')", ""),
        ("sys.exit('two\\nlines')", "2 lines"),
        ("sys.exit(1)", "0 lines"),
        ("sys.exit(3)", "status 3"),
        ("raise ValueError", "traceback"),
        ("os.kill(os.getpid(), 9)", "status -9"),
        ("time.sleep(60)", "hangs"),
    ],
)
def test_a_bad_end_is_noticed(lines, problem):
    outcome = common.forked(lambda: exec(f"import os, sys, time\n{lines}"), limit=1)
    assert outcome.problem(0, 1).startswith(problem) and bool(outcome.problem(0, 1)) == bool(problem)


def test_what_folders_hold(tmp_path):
    left, right = tmp_path / "left", tmp_path / "right"
    for folder, seconds, value in ((left, 1.5, 1), (right, 2.5, 1)):
        (folder / "below").mkdir(parents=True)
        (folder / "log.json").write_text(f'{{"train_time_history": [{seconds}], "value": {value}}}')
    assert not common.difference(common.contents(left), common.contents(right))
    (right / "log.json").write_text('{"value": 2}')
    (left / ".0123abcd.partial").touch()
    (right / "below" / "link").symlink_to("nowhere")
    found = common.difference(common.contents(left), common.contents(right))
    assert found == ".0123abcd.partial is left, below/ is left, below/link is missing, log.json differs"


@pytest.mark.parametrize("harm", [*set(damage.BYTES), *damage.KINDS, damage.shape], ids=lambda harm: harm.__name__)
def test_damages_damage(tmp_path, harm):
    import random

    path = tmp_path / "folder" / "value.json"
    path.parent.mkdir()
    (tmp_path / "another").write_bytes(b"another")
    changes = 0
    for seed in range(5):
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_text('{"targets": ["bass"], "nfft": 512, "args": {"lr": 0.1}}' * (1 if harm is damage.shape else 40))
        before = common.contents(path.parent)
        harm(path, random.Random(seed))
        changes += common.contents(path.parent) != before
    assert changes >= 3
