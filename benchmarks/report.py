"""What the reports are made of: processes of either side, tables, the machine."""

import contextlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def add_options(parser):
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--reference", default=ROOT / ".venv-reference" / "bin" / "python", help="torch's interpreter")


# ---------------------------------------------------------------------------------------- processes


def execute(command, environment=None):
    """Run a command whose output only matters if it fails, and return its output."""
    command = [str(word) for word in command]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{shlex.join(command)}\n{process.stderr}\nfailed with status {process.returncode}")
    return process.stdout


def last_line(text):
    """What matters of the output of a command that failed, also of one that it has executed itself."""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line and not line.startswith("failed with status")), "")


def run(side, reference, environment=None, modules=None, **options):
    """One process of a side; returns what it reports, and `seconds`, from its start to its end.

    Args:
        reference: torch's interpreter
        environment: variables for the process; None: not set
        modules: a folder in which torch's side finds modules that its interpreter lacks
        options: the work, see nnabla_side.py and torch_side.py
    """
    script, python, path = HERE / "nnabla_side.py", sys.executable, [ROOT]
    if side == "torch":  # with our stand-in for torchaudio
        script, python, path = HERE / "torch_side.py", reference, [ROOT / "tests" / "reference", ROOT]
        path += [modules] if modules else []
    elif side == "native":
        options.update(plain=True, repeat=1)
    environment = {**environment_of(python, path), **(environment or {})}
    environment = {name: value for name, value in environment.items() if value is not None}
    start = time.perf_counter()
    output = execute([python, script, json.dumps(options)], environment)
    return {**json.loads(output.splitlines()[-1]), "seconds": time.perf_counter() - start}


def environment_of(python, path):
    """The environment of an interpreter that finds modules in some folders; another one gets nothing of our own.

    What makes up ours may be named by variables: its home, its packages, and libraries that lie beside it.
    """
    environment = dict(os.environ)
    packages = environment.pop("PYTHONPATH", "").split(os.pathsep)
    if python == sys.executable:
        path = [*path, *filter(None, packages)]
    else:
        environment.pop("PYTHONHOME", None)
        ours, libraries = Path(sys.prefix).parent, environment.pop("LD_LIBRARY_PATH", "").split(os.pathsep)
        if libraries := [folder for folder in libraries if folder and ours not in Path(folder).parents]:
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return environment


def warn_if_busy():
    if os.getloadavg()[0] > 0.5:  # OpenMP's threads spin while they wait for one that lost its core
        print("The machine is busy: torch will look much slower than it is", file=sys.stderr)


# --------------------------------------------------------------------------------------------- text


def table(header, rows):
    """A table in Markdown that is readable as it is."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = ([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def measured(args, name, sizes, measure, page="comparison.md"):
    """What a page in docs/, or a part of one, says, kept in build/ so that --report writes it again.

    Args:
        args: quick, report, threads
        name: of the folder in build/
        sizes: those of a full run, and with --quick
        measure: function of folder and sizes that returns a dict
    Returns:
        results of `measure`, or of the last run, with sizes, threads, machine and origin; the folder; the page
    """
    folder = ROOT / "build" / (f"quick-{name}" if args.quick else name)
    page = (folder if args.quick else ROOT / "docs") / page
    kept = folder / "results.json"
    if not args.report:
        warn_if_busy()
        sizes = sizes[args.quick]
        about = {"sizes": sizes, "threads": args.threads, "machine": machine(), "origin": origin()}
        results = measure(folder, sizes)
        kept.write_text(json.dumps({**about, **results}))
    return json.loads(kept.read_text()), folder, page


def write_part(path, writer, text):
    """Write what a program says on a page that it shares with others: their parts stay as they are.

    A part begins with a comment that names its writer; what stands before the first of them is compare.py's.
    """
    head, *rest = re.split(r"^<!-- (\S+\.py) -->\n\n", path.read_text() if path.exists() else "", flags=re.MULTILINE)
    parts = {"compare.py": head, **dict(zip(rest[::2], rest[1::2])), writer: f"{text.rstrip()}\n"}
    first = parts.pop("compare.py").rstrip()
    others = [f"<!-- {name} -->\n\n{part.rstrip()}" for name, part in parts.items()]
    path.write_text("\n\n".join(filter(None, [first, *others])) + "\n")


def spread(values, form):
    """The median, and in parentheses the smallest and the largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def ratio_of(a, b):
    return statistics.median(a) / statistics.median(b)


def machine():
    """What the numbers depend on, as a list in Markdown."""
    info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    extensions = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in info.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    settings = [f"{k}={v}" for k, v in os.environ.items() if k.startswith(("OMP_", "OPENBLAS_", "MKL_", "NUMBA_"))]
    return "\n".join(
        [
            f"- {info.get('model name', platform.machine())} (model {info.get('model', '?')}), "
            f"{len(os.sched_getaffinity(0))} cores, {', '.join(extensions)}",
            f"- {memory:.0f} GiB memory, {platform.platform()}, load {os.getloadavg()[0]:.1f} before",
            f"- environment: {' '.join(settings) or 'no settings of OpenMP, OpenBLAS, MKL or Numba'}",
        ]
    )


def versions_table(ours, torch, heading="ours"):
    """Versions of packages, as reported by both sides."""
    names = dict.fromkeys([*ours, *torch])
    return table(["", heading, "torch"], [[name, ours.get(name, ""), torch.get(name, "")] for name in names])


def origin():
    """Command, date and commit, for the first line of a report."""
    commit = _git("describe", "--always", "--exclude", "*")
    if _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"
    ):  # pages are written one after another
        commit += "-dirty"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or "unknown",
    }


def _git(*arguments):
    """What git prints, in a line; nothing where there is no git, or no repository."""
    with contextlib.suppress(OSError):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
    return ""
