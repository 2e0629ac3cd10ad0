"""Songs over processes and over ranks of mpirun, with songs that are numbers: what comes back, and what dies."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from mpirun import mpirun, needs_mpirun

import pool
import utils

LIMITS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def squares(threads):
    """Hears no Ctrl-C; tells where it was made, and with how many threads."""
    made = time.monotonic()

    def square(song):
        os.kill(os.getpid(), signal.SIGINT)
        return song, song**2, os.getpid(), made, threads, [os.environ[name] for name in LIMITS]

    return partial(map, square)


def not_done(song, line):
    return song, line


def test_each_song_has_its_result_and_a_process_its_share_of_threads(monkeypatch):
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(LIMITS[0], "7")
    before = dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    found = sorted(pool.results(range(8), squares, not_done, 2, 6))
    assert [one[:2] for one in found] == [(song, song**2) for song in range(8)]
    assert {(threads, *limits) for *_, threads, limits in found} == {(3, "3", "3", "3")}
    assert len({one[2] for one in found}) == len({one[2:4] for one in found}) == 2  # begun once in each
    assert before == (dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, []))
    assert not multiprocessing.active_children()


def mortal(folder, threads):
    """Song 1 kills the first process that it meets, 3 each, and 5 is one of an error that cannot be pickled."""

    class Odd(Exception):
        pass

    def work(song):
        is_first = song == 1 and not Path(folder, "died").exists()
        if is_first:
            Path(folder, "died").touch()
        if is_first or song == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if song == 5:
            raise Odd("two\nlines")
        return song, "done"

    return partial(map, work)


def sizes(threads):
    return lambda songs: ((song, songs) for song in songs)


def test_groups_of_songs_become_smaller_towards_the_end():
    found = dict(pool.results(range(14), sizes, not_done, 2, None, 4))
    groups = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [11, 12], [13]]  # half of what is left
    assert found == {song: group for group in groups for song in group}


@pytest.mark.parametrize("together, groups", [(1, ["a song is"] * 3), (3, ["2 songs are", "3 songs are", "a song is"])])
def test_a_song_whose_process_dies_is_tried_again_and_the_others_go_on(tmp_path, capsys, together, groups):
    """Those of its group, too, which are tried again without it."""
    found = list(pool.results(range(7), partial(mortal, tmp_path), not_done, 2, None, together))
    assert len(found) == 7
    found = dict(found)
    twice = {3: f"tried twice: {pool.DIED}", 5: "tried twice: Odd: two lines"}
    assert found == {**dict.fromkeys(range(7), "done"), **twice}
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.split(": ")[1].split(" tried")[0] for line in said) == groups
    assert sum(pool.DIED in line for line in said) == 2


def test_a_song_that_no_process_can_begin():
    found = dict(pool.results(range(2), partial(int, "x"), not_done, 2, None))
    assert all(line.startswith("tried twice: TypeError: ") for line in found.values()) and set(found) == {0, 1}


def patient(folder, threads):
    def work(song):
        if song == 0:
            with utils.postponed():
                Path(folder, "begun").touch()
                time.sleep(0.5)
                Path(folder, "whole").touch()
            return song
        while not Path(folder, "begun").exists():
            time.sleep(0.01)
        return song

    return partial(map, work)


def test_who_wants_no_more_results_ends_the_processes_once_their_files_are_whole(tmp_path):
    found = pool.results(range(2), partial(patient, tmp_path), not_done, 2, None)
    assert next(found) == 1
    assert not (tmp_path / "whole").exists()
    found.close()
    assert (tmp_path / "whole").exists() and not multiprocessing.active_children()


# ------------------------------------------------------------------------------------------- mpirun

SCRIPT = f"""
import sys
sys.path[:0] = [{str(Path(pool.__file__).parent)!r}, {str(Path(__file__).parent)!r}]
import pool
if __name__ in ("__main__", "__mp_main__"):
    pool.start(__name__)
import functools, json, os
import utils

def begin(folder, threads):
    from test_pool import mortal
    work = mortal(folder, threads)
    return lambda songs: [(*done, os.getppid(), threads) for done in work(songs)]

def failed(song, line):
    return song, line

@utils.command
def main(argv=None):
    folder, cores = sys.argv[1:]
    places = pool.places(int(cores))
    songs = pool.results(range(9), functools.partial(begin, folder), failed, places, 6)
    print(json.dumps([places, *songs]))

if __name__ == "__main__":
    pool.run(main)
"""


def launch(tmp_path, cores, **environment):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = mpirun(3, sys.executable, tmp_path / "script.py", tmp_path, cores)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


@needs_mpirun
def test_ranks_survive_what_their_processes_die_of(tmp_path):
    result = launch(tmp_path, 1)
    assert result.returncode == 0
    places, *found = json.loads(result.stdout)
    assert places == 3 and {one[0] for one in found} == set(range(9))
    done = {song: (where, threads) for song, _, *rest in found if rest for where, threads in [rest]}
    assert set(range(9)) - set(done) == {3, 5}
    assert {threads for _, threads in done.values()} == {2}  # 6 among the three of this machine
    assert len({where for where, _ in done.values()}) > 1
    assert result.stderr.count(pool.DIED) == 2


@needs_mpirun
@pytest.mark.parametrize(
    "module, message",
    [
        ("raise ImportError('no such module')", "which need mpi4py and MPI (no such module)"),
        ("class MPI: COMM_WORLD = type('', (), {'Get_size': int})()", "of which mpi4py sees 0"),
        (None, "under mpirun, its -n tells how many"),
    ],
)
def test_what_is_wrong_is_said_once(tmp_path, module, message):
    environment = {}
    if module:
        (tmp_path / "mpi4py").mkdir()
        (tmp_path / "mpi4py" / "__init__.py").write_text(module)
        (tmp_path / "mpi4py" / "futures.py").write_text("MPICommExecutor = None")
        environment["PYTHONPATH"] = str(tmp_path)
    result = launch(tmp_path, 2, **environment)
    assert result.returncode == 2 and result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("script.py")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in result.stderr
