"""The programs of benchmarks/: parts of a page, intervals; gpu.py's stages and page."""

import inspect
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
from test_separate import RATE, make_folder, song

import args
import functions
import utils
from separator import Separator

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import extensions
import gpu
import gpu_checks
import gpu_work
import latency
import report


def test_parts_of_a_page_are_written_one_at_a_time(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Old\n\n| a |\n")  # without parts: compare.py's
    report.write_part(page, "extensions.py", "## New\n\n{text} \\1\n")
    assert page.read_text() == "# Old\n\n| a |\n\n<!-- extensions.py -->\n\n## New\n\n{text} \\1\n"
    report.write_part(page, "compare.py", "# Newer\n")
    report.write_part(page, "other.py", "## Other\n")
    report.write_part(page, "extensions.py", "## Newest\n\n")
    expected = "# Newer\n\n<!-- extensions.py -->\n\n## Newest\n\n<!-- other.py -->\n\n## Other\n"
    assert page.read_text() == expected
    report.write_part(page, "other.py", "## Other\n")
    assert page.read_text() == expected
    for order in (("extensions.py", "compare.py"), ("compare.py", "extensions.py")):
        page.unlink()
        for writer in order:
            report.write_part(page, writer, writer)
        assert page.read_text() == "compare.py\n\n<!-- extensions.py -->\n\nextensions.py\n"


def test_intervals_are_students():
    rng = np.random.default_rng(0)
    for n in (2, 5, 30):
        a, b = rng.normal(3, 1, (2, n))
        mean, reach = extensions.interval(list(a - b))
        low, high = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
        np.testing.assert_allclose((mean - reach, mean + reach), (low, high))


# ---------------------------------------------------------------------------------------- latency.py


def test_what_is_scored_live_is_what_the_separator_separates(tmp_path):
    model, audio = make_folder(tmp_path / "live", ["vocals"], unidirectional=True), song(3000)
    found = {way: separate(audio) for way, separate in latency.ways(model).items()}
    assert list(found) == ["none", "2 s", "inf s", latency.OFFLINE]
    for way, niter in {"none": 0, latency.OFFLINE: 1}.items():
        separator = Separator.load(model, residual=True, niter=niter, wiener_win_len=None, context="cpu")
        np.testing.assert_allclose(found[way], separator(audio, RATE)["vocals"], atol=1e-6)
    others = [found[way] for way in found if way != "none"]
    assert all(np.abs(found["none"] - other).max() > 1e-3 for other in others)


def test_a_model_is_trained_once(tmp_path, monkeypatch):
    commands = []

    def execute(command):
        commands.append([str(word) for word in command])
        (tmp_path / "partial").mkdir()

    monkeypatch.setattr(latency, "execute", execute)
    folders = [latency.train(tmp_path, 1024, latency.FULL) for _ in range(2)]
    assert folders == [tmp_path / "models" / "1024"] * 2 and folders[0].is_dir()
    ((_, _, *words),) = commands
    options = args.train_parser().parse_args(words)
    assert (options.nfft, options.nhop, options.unidirectional, options.target) == (1024, 256, True, "vocals")
    assert (options.hidden_size, options.epochs, options.samples_per_track) == (128, 10, 40)


def test_page_of_latencies(tmp_path):
    filters = ["none", *(f"{seconds:g} s" for seconds in latency.TIMES), latency.OFFLINE]
    models = {
        name: {way: {"SDR": [i + k, i - k], "time": 0.01 * k} for k, way in enumerate(filters, 1)}
        for i, name in enumerate(["1024", "2048", "4096"])
    }
    about = {"sizes": latency.FULL, "origin": {"command": "c", "date": "d", "commit": "abc"}, "machine": "- one"}
    latency.write_report({"models": models, "rate": 44100, **about}, tmp_path / "latency.md")
    page = (tmp_path / "latency.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["2048", "2047", "46 ms", "1.00 (0.00 … 2.00)", "0.010", "0.020"] in rows
    gains = [f"{0:+.2f} ({-k:+.2f} … {k:+.2f})" for k in (1, 2, 3)]
    assert ["4096", *gains] in rows
    assert "10 epochs of 40 steps, of 8 excerpts" in " ".join(page.split()) and "commit abc" in page
    picture = matplotlib.image.imread(tmp_path / "latency" / "sdr.png")
    assert picture[..., :3].std() > 0.1


# -------------------------------------------------------------------------------------------- gpu.py

FINISHED = {"why": None, "status": 0, "seconds": 1.5, "date": "2026-01-02", "commit": "abc"}
FACT = {"kind": "fact", "what": "GPU", "value": "one"}
CHECK = {"kind": "check", "what": "lstm: output", "difference": 3e-6, "tolerance": 1e-5, "passed": True}
MEASURE = {"kind": "measure", "what": "a step", "ours": 20.0, "unit": "ms", "torch": 25.0, "tf32": None}


def results_of(**found):
    return {**dict.fromkeys(gpu.STAGES), **found}


def test_page_of_a_gpu_without_results_says_so_and_is_the_one_in_docs_until_there_are_some():
    page = gpu.page("cudnn", results_of())
    assert "**Not run**" in page and "##" not in page
    committed = (report.ROOT / "docs" / "gpu.md").read_text()
    assert committed == page or "checks passed" in committed


def test_page_of_a_gpu_shows_what_was_found_what_failed_and_what_is_missing():
    failed = {**CHECK, "what": "mask: output", "difference": float("nan"), "passed": False}
    killed = {**FINISHED, "why": "killed at its limit of 9 s", "status": None, "rows": [MEASURE]}
    found = {
        "functions": {**FINISHED, "rows": [CHECK, failed]},
        "steps": killed,
        "device": {**FINISHED, "rows": [FACT]},
    }
    page = gpu.page("cudnn", json.loads(json.dumps(results_of(**found))))
    sections = dict(zip(gpu.STAGES, page.split("\n## ")[1:]))
    assert page.startswith("# On a GPU\n") and "1 of 2 checks passed" in page
    assert "Checks failed in: Graph functions of the recipe." in page and "Not finished: Training steps." in page
    assert "Not run: Whole networks" in page and "Separation" in page.split("Not run: ")[1]
    assert "- GPU: one" in sections["device"] and "commit abc" in sections["device"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in sections["functions"].splitlines()]
    assert ["lstm: output", "3.0e-06", "1e-05", "yes"] in rows and ["mask: output", "nan", "1e-05", "**no**"] in rows
    assert "**Not finished**: killed at its limit of 9 s." in sections["steps"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in sections["steps"].splitlines()]
    assert ["a step, ms", "20", "25", "0.80", "", ""] in rows
    assert sections["network"].strip().endswith("Not run.")
    alone = gpu.page("cpu", results_of(steps={**FINISHED, "rows": [{**MEASURE, "torch": None}]}))
    assert "| measured   | ours |\n" in alone and "rehearsal" in alone


def stage(folder, text, limit=20):
    program = folder / "stage.py"
    program.write_text(f"import json, os, subprocess, sys, time\n{text}")
    return gpu.Stage("A stage", limit, program)


def say(row):
    return f"print({gpu.MARK + json.dumps(row)!r}, flush=True)\n"


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_stage_is_killed_at_its_limit_with_all_that_it_started_and_what_it_found_is_kept(tmp_path):
    sleeping = (
        f"child = subprocess.Popen(['sleep', '60'])\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
    )
    cut = f"print({gpu.MARK + '{'!r}, flush=True)\n"
    result = gpu.run_stage("a", stage(tmp_path, sleeping + say(CHECK) + cut + "time.sleep(60)"), [], 1.5)
    assert result["why"] == "killed at its limit of 2 s" and result["rows"] == [CHECK] and result["seconds"] < 10
    assert not gpu.is_good(result)
    end = time.monotonic() + 5
    while is_running((tmp_path / "pid").read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running((tmp_path / "pid").read_text())


@pytest.mark.parametrize(
    "text, why",
    [
        ("print('no driver', file=sys.stderr)\nos.abort()", "ended by SIGABRT: no driver"),
        ("raise ValueError('it does not fit')", "status 1: ValueError: it does not fit"),
        ("sys.exit(3)", "status 3"),
    ],
)
def test_a_stage_that_dies_says_why_and_what_it_found_is_kept(tmp_path, text, why):
    result = gpu.run_stage("a", stage(tmp_path, say(CHECK) + text), [], 20)
    assert result["why"] == why and result["rows"] == [CHECK] and not gpu.is_good(result)


@pytest.fixture
def gpu_folders(tmp_path, monkeypatch):
    """gpu.py, whose results and page are in tmp_path."""
    monkeypatch.setattr(gpu, "FOLDERS", {"cpu": tmp_path / "found"})
    monkeypatch.setattr(gpu, "PAGES", {"cpu": tmp_path / "gpu.md"})
    return tmp_path


def test_stages_after_one_that_fails_run_and_the_status_tells(gpu_folders, monkeypatch):
    names = []
    for name, text in {
        "a": say(CHECK),
        "b": "os.abort()",
        "c": say({**CHECK, "passed": False}),
        "d": say(FACT),
    }.items():
        (gpu_folders / name).mkdir()
        names.append(
            (name, stage(gpu_folders / name, f"assert json.loads(sys.argv[1]) == [{name!r}, 'cpu', 1]\n{text}"))
        )
    monkeypatch.setattr(gpu, "STAGES", dict(names))
    assert gpu.run_stages("cpu", ["a", "b", "c", "d"], [1], 60, "abc") == 1
    found = gpu.read_results(gpu_folders / "found")
    assert [found[name]["why"] for name in "abcd"] == [None, "ended by SIGABRT", None, None]
    assert found["d"]["rows"] == [FACT] and found["d"]["commit"] == "abc"
    assert "1 of 2 checks passed" in (gpu_folders / "gpu.md").read_text()
    for name, status in (("a", 0), ("b", 1), ("c", 1)):
        monkeypatch.setattr(gpu, "STAGES", {name: dict(names)[name]})
        assert gpu.run_stages("cpu", [name], [1], 60, None) == status
    assert gpu.run_stages("cpu", [name], [1], 0, None) == 1
    assert gpu.read_results(gpu_folders / "found")[name]["why"] == "no time was left of 0 s"


def test_without_the_device_one_line_says_so_and_earlier_results_stay(gpu_folders, monkeypatch):
    monkeypatch.setattr(gpu, "STAGES", {"device": stage(gpu_folders, say(FACT))})
    assert gpu.run_stages("cpu", ["device"], [], 60, None) == 0
    page = (gpu_folders / "gpu.md").read_text()
    text = "print('gpu_checks.py: there is no GPU', file=sys.stderr)\nsys.exit(2)"
    monkeypatch.setattr(gpu, "STAGES", {"device": stage(gpu_folders, text)})
    with pytest.raises(utils.UsageError, match="^there is no GPU$"):
        gpu.run_stages("cpu", ["device"], [], 60, None)
    assert (gpu_folders / "gpu.md").read_text() == page and gpu.read_results(gpu_folders / "found")["device"]


def test_every_graph_function_is_compared_on_a_gpu():
    sizes = SimpleNamespace(**gpu_work.SIZES["cpu"])
    compared = {
        what.partition(",")[0] for cases in (gpu_checks.of_network, gpu_checks.of_waveforms) for what in cases(sizes)
    }
    own = {"negative_sdr", "weighted_sdr"}  # of losses.py
    for name, value in vars(functions).items():
        if inspect.isfunction(value) and value.__module__ == "functions" and not name.startswith("_"):
            own |= {name} - {"check_pair"}
    assert compared == own


def test_the_largest_difference_is_found_also_where_there_is_no_number():
    expected = {"a": np.array([1.0, -4.0]), "b": np.array([2.0])}
    assert gpu_checks.worst({"a": np.array([1.0, -4.1]), "b": np.array([2.1])}, expected) == (pytest.approx(0.05), "b")
    assert gpu_checks.worst({"a": np.array([1.0, np.nan]), "b": np.array([2.1])}, expected) == (np.inf, "a")
    assert gpu_checks.worst({"": np.array([0.5])}, {"": np.zeros(1)}) == (0.5, "")
    ones, few = np.ones(1000), np.ones(1000)
    few[[3, 500]] = 1.5, np.nan
    assert gpu_checks.worst({"": few}, {"": 4 * ones}, share=2e-3) == (0.75, "")
    assert gpu_checks.worst({"": few}, {"": 4 * ones}, share=1e-3, relative=False) == (3, "")
    assert gpu_checks.worst({"": few}, {"": ones}, share=1e-3) == (0.5, "")


def test_samples_of_a_gpu(tmp_path, monkeypatch):
    """nvidia-smi, as it is called: once before, then ten times a second."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *loop-ms*) echo "90, 700\n[N/A], 700\n96, 900\n94, 600"; exec sleep 60;; esac\n'
        'echo "3, 500"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with gpu_work.Samples() as samples:
        time.sleep(0.5)
    assert (samples.busy, samples.memory) == (0.94, 400 * 2**20)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with gpu_work.Samples() as samples:
        pass
    assert np.isnan(samples.busy) and np.isnan(samples.memory)


def test_another_interpreter_gets_nothing_of_ours(monkeypatch):
    home = Path(sys.prefix).parent
    monkeypatch.setenv("PYTHONHOME", sys.prefix)
    monkeypatch.setenv("PYTHONPATH", "/site")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{home}/lib:/driver:{sys.prefix}/lib")
    ours, other = (report.environment_of(python, ["/a", "/b"]) for python in (sys.executable, "/usr/bin/python3"))
    assert ours["PYTHONPATH"] == "/a:/b:/site" and ours["PYTHONHOME"] == sys.prefix
    assert other["PYTHONPATH"] == "/a:/b" and "PYTHONHOME" not in other and other["LD_LIBRARY_PATH"] == "/driver"
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{home}/lib")
    assert "LD_LIBRARY_PATH" not in report.environment_of("/usr/bin/python3", [])
