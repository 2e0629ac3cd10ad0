import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import utils

ROOT = Path(utils.__file__).parent


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


# ------------------------------------------------------------------------- commands in processes of their own


SCRIPTS = ("train.py", "separate.py", "evaluate.py", "weights.py", "data.py", "synthesize.py", "demo.py")


def run(lines, *arguments, **options):
    """Run the lines of a script, `main`'s below the usual head; returns the finished process."""
    lines = f"import os, signal, sys, time, utils\nutils.start()\n{textwrap.dedent(lines)}\nmain()\n"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-c", lines, *arguments], cwd=ROOT, timeout=30, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_while_a_script_imports(script, number, tmp_path):
    """One line and a status, whichever import it meets."""
    rng = random.Random(f"{script} {number}")
    ends = []
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, ROOT / script, "--help"], stdout=-3, stderr=subprocess.PIPE, text=True
        )
        status = Path(f"/proc/{child.pid}/status")
        while status.exists() and child.poll() is None:  # until Python has its handlers, which takes a few ms
            caught = int(status.read_text().partition("SigCgt:")[2].split()[0], 16)
            if caught >> (signal.SIGTERM - 1) & 1:
                break
        time.sleep(rng.uniform(0, 0.12))
        child.send_signal(number)
        errors = child.communicate(timeout=30)[1]
        ends.append(child.returncode)
        name = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
        # without a line: Python has ended, and taken its handlers back
        assert (child.returncode, errors) in [(128 + number, f"{script}: {name}\n"), (0, ""), (-number, "")]
    assert 128 + number in ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_command_works(number):
    result = run(f"""
        @utils.command
        def main(argv=None):
            os.kill(os.getpid(), {number.value})
            time.sleep(20)
    """)
    assert result.returncode == 128 + number and result.stderr.count(b"\n") == 1


def test_signals_that_are_ignored_stay_ignored():
    """nohup does it, and a shell's & with SIGINT."""
    result = run(
        """
        @utils.command
        def main(argv=None):
            for number in (signal.SIGINT, signal.SIGHUP):
                os.kill(os.getpid(), number)
            print("still there")
        """,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)],
    )
    assert result.returncode == 0 and result.stdout == b"still there\n"


@pytest.mark.parametrize(
    "swallow",
    [
        "Finalizer()",
        "weakref.ref(Object(), lambda _: interrupted())",
        "ctypes.CFUNCTYPE(None)(interrupted)()",
        "[None for _ in [0] if suppressed()]",
    ],
)
def test_an_interruption_that_python_swallows(swallow):
    """In a finalizer or a callback no exception can be raised: Python reports it, and would go on for ever."""
    result = run(f"""
        import contextlib, ctypes, weakref

        def interrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass

        def suppressed():
            with contextlib.suppress(BaseException):
                interrupted()

        class Finalizer:
            def __del__(self):
                interrupted()

        class Object:
            pass

        @utils.command
        def main(argv=None):
            {swallow}
            if "suppressed" not in {swallow!r}:  # of that nothing is known before the end
                time.sleep(20)
                print("nothing has happened")
    """)
    assert (result.returncode, result.stdout, result.stderr) == (143, b"", b"-c: terminated\n")


@pytest.mark.parametrize("error, status", [("OSError(28, 'No space left', 'file')", 1), ("RuntimeError('a bug')", 0)])
def test_an_error_that_python_swallows(error, status):
    """What a finalizer could not write is lost: the command has failed. A bug has its traceback: that is for us."""
    result = run(f"""
        class Finalizer:
            def __del__(self):
                raise {error}

        @utils.command
        def main(argv=None):
            Finalizer()
    """)
    assert result.returncode == status
    assert result.stderr == b"-c: file: No space left\n" if status else b"a bug" in result.stderr


def test_an_object_whose_making_is_interrupted():
    """Its finalizer misses what it has not got yet; that is no news."""
    result = run("""
        class Half:
            def __init__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(20)
                self.value = 1

            def __del__(self):
                print(self.value)

        @utils.command
        def main(argv=None):
            Half()
    """)
    assert (result.returncode, result.stdout, result.stderr) == (143, b"", b"-c: terminated\n")


@pytest.mark.parametrize("error", ["utils.UsageError('bad')", "OSError('bad')", "RuntimeError('bad')", "SystemExit(2)"])
def test_what_becomes_of_an_interruption_on_its_way(error):
    result = run(f"""
        @utils.command
        def main(argv=None):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(20)
            except KeyboardInterrupt:
                raise {error}
    """)
    assert (result.returncode, result.stderr) == (143, b"-c: terminated\n")


def test_a_postponed_signal():
    """The first one is told to who asks, the second one interrupts, and in other threads nothing changes."""
    lines = """
        import threading

        @utils.command
        def main(argv=None):
            def in_a_thread():
                with utils.postponed(), utils.uninterrupted():
                    started.set()
                    time.sleep(0.1)
            started = threading.Event()
            thread = threading.Thread(target=in_a_thread)
            thread.start()
            started.wait()
            with utils.postponed() as ending:
                thread.join()
                assert not ending()
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
                with utils.uninterrupted():
                    pass
                assert ending()
                print("finished a step", flush=True)
                if len(sys.argv) > 1:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(20)
                raise KeyboardInterrupt("terminated: the same command continues")
    """
    result = run(lines)
    assert result.returncode == 143 and result.stdout == b"finished a step\n"
    assert result.stderr == b"-c: terminated: the same command continues\n"
    result = run(lines, "twice")
    assert result.returncode == 130 and result.stderr == b"-c: interrupted\n"


def test_what_is_uninterrupted():
    result = run("""
        @utils.command
        def main(argv=None):
            with utils.uninterrupted():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
                print("not half done", flush=True)
            print("but no more")
    """)
    assert (result.returncode, result.stdout, result.stderr) == (143, b"not half done\n", b"-c: terminated\n")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_streams(closed, tmp_path):
    """A file that is opened then must not become the place of messages."""

    def close():
        for number in closed:
            os.close(number)

    result = run(
        f"""
        @utils.command
        def main(argv=None):
            with open({str(tmp_path / "value")!r}, "w") as stream:
                os.write(2, b"of a library\\n")
                os.system("echo to stdout; echo to stderr >&2")
                print("printed")
                stream.write("content")
            raise utils.UsageError("bad input")
        """,
        preexec_fn=close,
    )
    assert result.returncode == 2 and (tmp_path / "value").read_text() == "content"
    if 2 not in closed:
        assert result.stderr.endswith(b"-c: bad input\n")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_names_of_files_on_a_terminal_that_knows_only_ascii(environment):
    result = run(
        """
        @utils.command
        def main(argv=None):
            print(sys.argv[1])
            raise utils.UsageError(f"there is no {sys.argv[1]}")
        """,
        "Grüße \udcff".encode("utf-8", "surrogateescape"),
        env={**os.environ, **environment},
    )
    assert result.returncode == 2 and result.stdout.startswith(b"Gr") and b"Traceback" not in result.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_standard_stream_that_takes_nothing(stream):
    with open("/dev/full", "wb") as full:
        result = run(
            """
            @utils.command
            def main(argv=None):
                print("a result")
                if sys.argv[1] == "stderr":
                    raise utils.UsageError("bad input")
            """,
            stream,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
            **{stream: full},
        )
    if stream == "stdout":  # what nobody can read is not done
        assert result.returncode == 1 and b"No space left" in result.stderr and result.stderr.count(b"\n") == 1
    else:
        assert result.returncode == 2


@pytest.mark.parametrize(
    "error, is_gpu",
    [
        ("memory error in alloc\nmemory.cpp:39\nFailed: N4nbla10CudaMemoryE allocation failed.", True),
        ("memory error in alloc\nmemory.cpp:39\nFailed: N4nbla9CpuMemoryE allocation failed.", False),
        ('target_specific error in x\n(cudaMalloc) failed with "out of memory" (cudaErrorMemoryAllocation).', True),
        ("target_specific error in x\nCUBLAS_STATUS_ALLOC_FAILED occured in `cublasCreate(&handle)`.", True),
    ],
)
def test_no_memory_on_a_gpu(capsys, error, is_gpu):
    @utils.command
    def main(argv=None):
        raise RuntimeError(error)

    with pytest.raises(SystemExit) as stop:
        main()
    advice = " on the GPU: a smaller --batch-size, --seq-dur or --segment needs less" if is_gpu else ""
    assert stop.value.code == 1 and capsys.readouterr().err.endswith(f": not enough memory{advice}\n")


def test_no_memory():
    result = run("""
        @utils.command
        def main(argv=None):
            bytearray(2**60)
    """)
    assert (result.returncode, result.stderr) == (1, b"-c: not enough memory\n")


# ------------------------------------------------------------------------------------------ training


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


def test_the_commit_of_an_edited_tree_is_marked(tmp_path):
    """With git itself, on a copy: what a log says of the code that made it."""

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, check=True, text=True)

    def commit():
        script = "import utils; print(utils.run_metadata()['commit'])"
        result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
        return result.stdout.strip()

    shutil.copy(utils.__file__, tmp_path)
    assert commit() == "None"
    git("init", "-q")
    git("add", "utils.py")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert head.startswith(commit()) and len(commit()) >= 7
    (tmp_path / "utils.py").write_text((tmp_path / "utils.py").read_text() + "\n# edited\n")
    assert commit().endswith("-dirty") and head.startswith(commit().removesuffix("-dirty"))
