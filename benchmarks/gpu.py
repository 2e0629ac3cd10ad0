"""Checks and measures everything on a GPU, within ten minutes, and writes docs/gpu.md: ``make gpu``.

Every stage is a process of its own, with a time limit: one that crashes, or hangs in the driver, is the only one lost.
After each, what it has found is in build/gpu/<stage>.json, and the page is written again; --report only does that.

--context cpu rehearses all of it on a machine without a GPU: at small sizes, the plain forms of our functions against
the fast ones. Then everything is in build/gpu-rehearsal, the page too.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from report import HERE, ROOT, environment_of, last_line, origin, table

sys.path.append(str(ROOT))
import utils


class Stage(NamedTuple):
    title: str
    limit: float  # seconds
    program: Path


CHECKS, MEASURES = HERE / "gpu_checks.py", HERE / "gpu_measures.py"
STAGES = {
    "device": Stage("Device and libraries", 120, CHECKS),
    "functions": Stage("Graph functions of the recipe", 120, CHECKS),
    "network": Stage("Whole networks, and three steps of Adam", 120, CHECKS),
    "repeats": Stage("Dropout, and the same steps twice", 60, CHECKS),
    "steps": Stage("Training steps", 150, MEASURES),
    "validation": Stage("Validation of long songs", 90, MEASURES),
    "training": Stage("train.py: two epochs, and resumed", 120, MEASURES),
    "separation": Stage("Separation", 120, MEASURES),
    "reading": Stage("Reading of excerpts", 90, MEASURES),
    "waveforms": Stage("Graph functions of other losses", 90, CHECKS),
}
FOLDERS = {"cudnn": ROOT / "build" / "gpu", "cpu": ROOT / "build" / "gpu-rehearsal"}
PAGES = {"cudnn": ROOT / "docs" / "gpu.md", "cpu": FOLDERS["cpu"] / "gpu.md"}
MARK = "gpu.py: "  # a line that begins so is a row, see gpu_work.py
NO_DEVICE = 2  # the status of a stage, as of a command, that cannot be done here

PAGE = """\
# {title}

Written by `make gpu{variable}`. Do not edit.

{about}

{verdict}
"""
ABOUT = {
    "cudnn": """\
`train.py --context cudnn` and what belongs to it: checked on a GPU against the fast functions of the CPU, which the
tests compare with torch, and measured beside torch's openunmix 1.3.0 on the same device. Differences are relative to
the largest value of a tensor where nothing else is said. torch's side is measured without TF32, which NNabla does not
use either, and with it, torch's default for cuDNN. Ratios below 1: ours is the faster, or the smaller.""",
    "cpu": """\
A rehearsal of docs/gpu.md on a CPU: the same program, at small sizes, the plain forms of our functions against the fast
ones. Its times say nothing.""",
}


# -------------------------------------------------------------------------------------------- stages


def run_stage(name, stage, arguments, limit):
    """Run a stage to its end, or to its limit in seconds.

    Returns:
        what its file says: `why` it has not finished, or None; its rows, also those before it ended; seconds
    """
    command = [sys.executable, str(stage.program), json.dumps([name, *arguments])]
    start, why = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        environment = environment_of(sys.executable, [ROOT])
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status, why = None, f"killed at its limit of {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps it
            process.wait(5)
        for stream in (output, errors):
            stream.seek(0)
        rows = list(read_rows(output))
        said = last_line(errors.read())
    if status:
        said = f": {said}" if said else ""
        why = f"ended by {signal.Signals(-status).name}{said}" if status < 0 else f"status {status}{said}"
    return {"why": why, "status": status, "seconds": round(time.perf_counter() - start, 1), "rows": rows, **origin()}


def read_rows(lines):
    """Rows among what a stage has printed; one that was cut off is none."""
    for line in lines:
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):
                yield json.loads(line[len(MARK) :])


def is_good(result):
    return result["why"] is None and all(row.get("passed", True) for row in result["rows"])


# ---------------------------------------------------------------------------------------------- page


def number(value):
    """Four digits, as they are read best; nothing for what there is not."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ratio(value, other):
    return f"{value / other:.2f}" if other and not math.isnan(other) else ""


def section(stage, result):
    """What a stage has found: facts, checks, measurements; or why there is nothing."""
    parts = [f"## {stage.title}"]
    if result is None:
        return "\n\n".join([*parts, "Not run."])
    kinds = {kind: [row for row in result["rows"] if row["kind"] == kind] for kind in ("fact", "check", "measure")}
    if result["why"]:
        parts.append(f"**Not finished**: {result['why']}.")
    if kinds["fact"]:
        parts.append("\n".join(f"- {row['what']}: {row['value']}" for row in kinds["fact"]))
    if kinds["check"]:
        rows = [
            [row["what"], f"{row['difference']:.1e}", f"{row['tolerance']:g}", "yes" if row["passed"] else "**no**"]
            for row in kinds["check"]
        ]
        parts.append(table(["checked", "largest difference", "tolerance", "passed"], rows))
    if kinds["measure"]:
        rows = [
            [f"{row['what']}, {row['unit']}"]
            + [number(row["ours"]), number(row["torch"]), ratio(row["ours"], row["torch"])]
            + [number(row["tf32"]), ratio(row["ours"], row["tf32"])]
            for row in kinds["measure"]
        ]
        with_torch = any(row["torch"] or row["tf32"] for row in kinds["measure"])
        header = ["measured", "ours", "torch", "ours / torch", "torch, TF32", "ours / that"]
        parts.append(table(header, rows) if with_torch else table(header[:2], [row[:2] for row in rows]))
    parts.append(f"{result['seconds']:.0f} s, on {result['date']}, at commit {result['commit']}.")
    return "\n\n".join(parts)


def verdict(results):
    """The whole in a few lines; `results`: {stage: what its file says, or None}."""
    if not any(results.values()):
        return "**Not run**: no GPU was at hand. `make gpu`, on a machine with one, fills this page."
    checks = [row for result in results.values() if result for row in result["rows"] if row["kind"] == "check"]
    failed = sum(not row["passed"] for row in checks)
    lines = [f"**{len(checks) - failed} of {len(checks)} checks passed.**"]
    for text, names in (
        ("Checks failed in", [name for name, r in results.items() if r and r["why"] is None and not is_good(r)]),
        ("Not finished", [name for name, r in results.items() if r and r["why"]]),
        ("Not run", [name for name, r in results.items() if r is None]),
    ):
        if names:
            lines.append(f"{text}: {', '.join(STAGES[name].title for name in names)}.")
    return "\n".join(lines)


def page(context, results):
    head = PAGE.format(
        title="On a GPU" if context == "cudnn" else "On a GPU: a rehearsal",
        variable="" if context == "cudnn" else " CONTEXT=cpu",
        about=ABOUT[context],
        verdict=verdict(results),
    )
    sections = [section(stage, results[name]) for name, stage in STAGES.items()] if any(results.values()) else []
    return "\n\n".join([head.rstrip(), *sections]) + "\n"


def read_results(folder):
    """{stage: what its file says}; None of one that has not been run."""
    paths = {name: folder / f"{name}.json" for name in STAGES}
    return {name: json.loads(path.read_text()) if path.exists() else None for name, path in paths.items()}


# ---------------------------------------------------------------------------------------------- main


def run_stages(context, names, arguments, limit, commit):
    """Run stages one after the other, for so many seconds together; the page is written after each.

    Returns:
        an exit status
    Raises:
        UsageError: there is no such device; nothing is written then.
    """
    folder, end = FOLDERS[context], time.perf_counter() + limit
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        seconds = min(STAGES[name].limit, end - time.perf_counter())
        if seconds <= 0:
            result = {"why": f"no time was left of {limit:.0f} s", "status": None, "seconds": 0, "rows": [], **origin()}
        else:
            result = run_stage(name, STAGES[name], [context, *arguments], seconds)
        if name == names[0]:
            if result["status"] == NO_DEVICE:
                raise utils.UsageError(result["why"].split(": ", 2)[-1])
            for each in names:
                (folder / f"{each}.json").unlink(missing_ok=True)
        result["commit"] = commit or result["commit"]
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1))
        PAGES[context].write_text(page(context, read_results(folder)))
        failed = [row["what"] for row in result["rows"] if not row.get("passed", True)]
        said = result["why"] or f"{result['seconds']:.0f} s{'; failed: ' if failed else ''}{', '.join(failed)}"
        print(f"{STAGES[name].title}: {said}", flush=True)
    return 0 if all(is_good(result) for result in read_results(folder).values() if result) else 1


@utils.command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", choices=("cudnn", "cpu"), default="cudnn", help="cpu: a rehearsal")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--limit", type=float, default=570, help="seconds of all stages together")
    parser.add_argument("--report", action="store_true", help="write the page from what earlier runs have found")
    reference = ROOT / ".venv-reference" / "bin" / "python"
    reference = str(reference) if reference.exists() else shutil.which("python3")
    parser.add_argument("--torch", default=reference, help="an interpreter that has torch; default: %(default)s")
    parser.add_argument(
        "--openunmix", help="folder that holds openunmix (pip's --target), if that interpreter lacks it"
    )
    parser.add_argument("--commit", help="what is measured, where git does not tell")
    args = parser.parse_args(argv)
    if args.report:
        PAGES[args.context].write_text(page(args.context, read_results(FOLDERS[args.context])))
        return
    arguments = [args.torch, args.openunmix and str(Path(args.openunmix).resolve())]
    sys.exit(run_stages(args.context, args.only or list(STAGES), arguments, args.limit, args.commit))


if __name__ == "__main__":
    main()
