"""fuzz.py notices what it is there for, goes on after it, and makes the same input again."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INPUTS = """
import os, time
KINDS = ("json",)
class Json:
    def __init__(self, folder):
        self.folder = folder
    def __call__(self, rng):
        drawn = rng.randrange(1000)
        (self.folder / "input").write_text(str(drawn))
        return lambda: self.read(drawn)
    def read(self, drawn):
        number = int((self.folder / "count").read_text()) + 1 if (self.folder / "count").exists() else 0
        (self.folder / "count").write_text(str(number))
        if number == 5:
            FAULT
"""
FAULTS = {
    "nothing": ("pass", ""),
    "an exception": ("raise KeyError(drawn)", "KeyError"),
    "a crash": ("(drawn % 2 or True) and os.kill(os.getpid(), 11)", "status -11"),
    "a hang": ("time.sleep(60)", "no end after 1.0 s"),
    "memory": ('b"x" * 520_000_000', "MB of memory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_it_notices(fault, tmp_path):
    code, found = FAULTS[fault]
    folder = tmp_path / "tests" / "faults"
    folder.mkdir(parents=True)
    program = folder / "fuzz.py"
    program.write_text(
        Path(__file__)
        .with_name("fuzz.py")
        .read_text()
        .replace("LIMIT = 10.0", "LIMIT = 1.0" if fault == "a hang" else "LIMIT = 30.0")
    )
    (folder / "fuzz_inputs.py").write_text(INPUTS.replace("FAULT", code))
    command = [sys.executable, program, "--processes", "1", "--inputs", "9" if fault in ("a crash", "a hang") else "20"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == bool(found), result.stdout + result.stderr
    kept = list((tmp_path / "build" / "faults").iterdir())
    if not found:
        assert not kept and "20 inputs in" in result.stdout and ": 0 findings" in result.stdout
        return
    assert len(kept) == 1 and found in (kept[0] / "found.txt").read_text()
    assert kept[0].name == "json-0-5" and ": 1 findings" in result.stdout
    assert "8 inputs in" in result.stdout or "20 inputs in" in result.stdout  # the others
    drawn = (kept[0] / "input").read_text()
    shutil.rmtree(tmp_path / "build")
    again = [
        sys.executable,
        "-c",
        "import fuzz, pathlib, sys; fuzz.Reader(pathlib.Path(sys.argv[1]), 0, ['json']).make(5)",
    ]
    subprocess.run([*again, tmp_path], cwd=folder, check=True, timeout=60)
    assert (tmp_path / "json" / "input").read_text() == drawn
