"""Puts faults into copies of the project, one at a time, and sees whether the tests notice: make mutants.

mutants.yml lists them, by file: what is replaced by what, and the tests that are to notice. In it, `quick` marks the
faults that continuous integration puts in, and `why` says of a fault that no test notices why that may stay so.
Exit status 1 if another one is not noticed, 2 if the tests fail without any.
"""

import argparse
import concurrent.futures
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".yml")
LIMIT = 300  # seconds for the tests of a fault; one that makes them hang is noticed


class Mutant(NamedTuple):
    file: str  # relative to the repository
    name: str
    old: str  # occurs once in the file
    new: str
    tests: str  # pytest's names of them, relative to tests/, separated by spaces
    quick: bool = False
    why: str = ""

    def __str__(self):
        return f"{self.file}: {self.name}"

    def text(self, folder: Path = ROOT) -> str:
        """The file with the fault.

        Raises:
            ValueError: the old text does not occur once, or the new one is not Python.
        """
        text = (folder / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self}: the old text occurs {text.count(self.old)} times")
        text = text.replace(self.old, self.new)
        try:
            compile(text, self.file, "exec")
        except SyntaxError as error:
            raise ValueError(f"{self}: {error}") from None
        return text


def read() -> list:
    """All that are listed."""
    files = yaml.safe_load(LIST.read_text())
    return [Mutant(file, **fields) for file, mutants in files.items() for fields in mutants]


def copy_project(tree: Path) -> None:
    """All files but those that git ignores; of these only the compiled kernels, which carry what they were made of."""
    listed = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, check=True, text=True).stdout.split("\0")
    compiled = [str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/__pycache__/*.nb[ci]")]
    for name in names + compiled:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)  # compiled kernels go with the time of their source


class Pytest:
    """Runs tests in copies of the project; `close` ends those that are running, from another thread."""

    def __init__(self):
        self.processes, self.lock, self.closed = set(), threading.Lock(), False

    def __call__(self, tree: Path, tests: list) -> tuple:
        """Exit status, None after LIMIT seconds; output; seconds."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short"]
        command += ["-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
        command += [f"--basetemp={tempfile.mkdtemp(dir=tree.parent)}", *(f"tests/{test}" for test in tests)]
        environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
        start = time.monotonic()
        with tempfile.TemporaryFile("w+") as output:
            with self.lock:
                if self.closed:
                    raise KeyboardInterrupt
                process = subprocess.Popen(
                    command, cwd=tree, env=environment, stdout=output, stderr=output, start_new_session=True
                )
                self.processes.add(process)
            try:
                status = process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                self.end(process)
            output.seek(0)
            return status, output.read(), time.monotonic() - start

    def end(self, process):
        with contextlib.suppress(ProcessLookupError):  # with all that it has started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.processes.discard(process)

    def close(self):
        with self.lock:
            self.closed = True
        for process in list(self.processes):
            self.end(process)


def results(pool, function, items):
    """Pairs of an item and its result, as they come."""
    futures = {pool.submit(function, item): item for item in items}
    for future in concurrent.futures.as_completed(futures):
        yield futures[future], future.result()


def check_tests(pool, pytest, tree, mutants):
    """Whether the tests pass as the project is."""
    tests = sorted({test for mutant in mutants for test in mutant.tests.split()})
    files = {}
    for test in tests:  # a process for those of a file, which share what they prepare
        files.setdefault(test.partition("::")[0], []).append(test)
    passed = True
    by_size = sorted(files, key=lambda file: -len(files[file]))
    for file, (status, output, seconds) in results(pool, lambda file: pytest(tree, files[file]), by_size):
        print(f"{'passed' if status == 0 else 'FAILED'} {seconds:6.1f} s  {file}: without a fault", flush=True)
        if status != 0:
            print(output)
            passed = False
    return passed


def verdict(status, output):
    """What the exit status of pytest says of a fault, and how the tests noticed it."""
    if status == 0:
        return "SURVIVED", ""
    if status is None:
        return "noticed", f"no end within {LIMIT} s"
    if status < 0:
        return "noticed", signal.Signals(-status).name
    if status > 1:  # tests that cannot be collected say nothing of the fault
        return "ERROR", output
    failed = [line.partition(" ")[2] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return "noticed", failed[0] if failed else ""


def main():
    parser = argparse.ArgumentParser(prog="mutants.py", description="Put faults in, and see whether tests notice.")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only faults whose file or name holds one of these")
    parser.add_argument("--quick", action="store_true", help="only those that continuous integration puts in")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at a time; default: all cores")
    options = parser.parse_args()
    words = options.words or [""]
    chosen = [mutant for mutant in read() if any(word in str(mutant) for word in words)]
    chosen = [mutant for mutant in chosen if mutant.quick or not options.quick]
    if not chosen:
        parser.error("there is no such fault")
    for mutant in chosen:
        mutant.text()  # raises

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the copies removed, and no test left running
    pytest, start = Pytest(), time.monotonic()
    found = {"noticed": [], "SURVIVED": [], "ERROR": []}
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        whole = Path(folder, "whole")
        copy_project(whole)

        def run(mutant):
            tree = Path(tempfile.mkdtemp(dir=folder), "tree")
            shutil.copytree(whole, tree)
            (tree / mutant.file).write_text(mutant.text(whole))
            result = pytest(tree, mutant.tests.split())
            shutil.rmtree(tree.parent)
            return result

        try:
            if not check_tests(pool, pytest, whole, chosen):
                return 2
            for mutant, (status, output, seconds) in results(pool, run, chosen):
                word, how = verdict(status, output)
                found[word].append(mutant)
                print(f"{word:8} {seconds:5.1f} s  {mutant}{how and ': '}{how}"[: None if word == "ERROR" else 200])
                sys.stdout.flush()
        finally:
            pytest.close()
            pool.shutdown(cancel_futures=True)

    seconds = time.monotonic() - start
    print(f"\n{len(chosen)} faults, {len(found['noticed'])} noticed, in {seconds:.0f} s")
    left = found["SURVIVED"] + found["ERROR"]
    for mutant in left:
        print(f"Not noticed: {mutant}: {mutant.why or 'NO TEST'}")
    return int(any(not mutant.why for mutant in left))


if __name__ == "__main__":
    sys.exit(main())
