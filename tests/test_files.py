"""Files appear whole or not at all; what is half done, or of killed processes, is told from what is alive."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import files
import utils

ROOT = Path(files.__file__).parent


@pytest.fixture
def process(request):
    """Start a process that runs some lines, which know `files` and `folder`, until they say that they are ready."""

    def start(lines, folder):
        lines = textwrap.dedent(lines)
        lines = f"import os, sys, time, files, utils\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n{lines}"
        command = [sys.executable, "-c", lines, str(folder)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        request.addfinalizer(child.stdout.close)
        request.addfinalizer(child.wait)
        request.addfinalizer(child.kill)
        assert child.stdout.readline() == "ready\n"
        return child

    return start


WRITER = """
    with files.atomic_path(folder / "value") as temporary:
        temporary.write_text("half")
        print("ready", flush=True)
        time.sleep(60)
"""
FOLDER = """
    with files.temporary_folder(folder) as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "part").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
"""
CLAIM = """
    with files.claimed(folder / "lock", "training"):
        print("ready", flush=True)
        time.sleep(60)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------- writing


def test_the_old_file_stays_on_failure(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, 1)
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == 1
    assert names(tmp_path) == ["value.json"]


def test_what_has_the_name_is_on_the_disk(tmp_path, monkeypatch):
    """Else a machine that loses power right after may find the name, and nothing under it; or not even the name."""
    events, sync, replace = [], os.fsync, os.replace

    def fsync(number):
        events.append(("on the disk", os.fstat(number).st_ino, os.fstat(number).st_size))
        sync(number)

    def rename(source, target):
        events.append(("renamed", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    files.write_json(tmp_path / "value.json", "x" * 5000)
    file, folder = (tmp_path / "value.json").stat(), tmp_path.stat()
    place = events.index(("renamed", file.st_ino, file.st_size))
    assert ("on the disk", file.st_ino, file.st_size) in events[:place]
    assert [event[:2] for event in events[place + 1 :]] == [("on the disk", folder.st_ino)]


@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_a_full_disk_is_an_error_with_the_name_of_the_file(tmp_path, monkeypatch, where):
    """Wherever it shows; the old file stays, nothing else does."""
    path = tmp_path / "value"
    files.write(path, b"old")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError) as caught:
        files.write(path, b"new data")
    monkeypatch.undo()
    assert utils.describe(caught.value) == f"{path}: No space left on device"
    assert path.read_bytes() == b"old" and names(tmp_path) == ["value"]


@pytest.mark.parametrize("room", [0, 1, 99_999])
def test_a_file_that_finds_no_room(tmp_path, process, room):
    """A limit of the size of files does what a full disk does: some of it is written."""
    files.write(tmp_path / "value", b"old")
    lines = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
        try:
            files.write(folder / "value", b"x" * 100_000)
        except OSError as error:
            os.system("echo ready")
            os._exit(utils.describe(error) != f"{{folder / 'value'}}: File too large")
    """
    assert process(lines, tmp_path).wait(10) == 0
    assert (tmp_path / "value").read_bytes() == b"old" and names(tmp_path) == ["value"]


def test_a_library_that_swallows_the_error_of_a_full_disk(tmp_path, monkeypatch):
    """As HDF5 does when it closes a file: the system says that all is well, and zeros are there."""
    path = tmp_path / "value"
    files.write(path, b"old")
    for module, name in ((Path, "write_bytes"), (os, "pwrite")):
        write = getattr(module, name)

        def zeros(file, data, *more, write=write):
            return write(file, bytes(data[:-1]) + b"\0", *more)

        monkeypatch.setattr(module, name, zeros)
    with pytest.raises(OSError, match="not what is there") as caught:
        files.write(path, b"new data")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["value"]


def test_errors_of_other_files_keep_their_names(tmp_path):
    with pytest.raises(OSError) as caught, files.atomic_path(tmp_path / "copy"):
        (tmp_path / "missing").read_bytes()
    assert caught.value.filename == str(tmp_path / "missing")
    assert names(tmp_path) == []


def test_in_a_folder_that_is_not_there(tmp_path):
    for path in (tmp_path / "missing" / "value", tmp_path / "file" / "value"):
        (tmp_path / "file").touch()
        with pytest.raises((FileNotFoundError, NotADirectoryError)) as caught:
            files.write(path, b"")
        assert caught.value.filename == str(path)  # not a name that nobody has heard of


def test_a_folder_at_the_place_of_a_file(tmp_path):
    (tmp_path / "value" / "below").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as caught:
        files.write(tmp_path / "value", b"new")
    assert caught.value.filename == str(tmp_path / "value")
    assert names(tmp_path) == ["value"] and names(tmp_path / "value") == ["below"]


def test_links_are_replaced_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"other")
    (tmp_path / "symbolic").symlink_to(other)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.link(other, tmp_path / "hard")
    for name in ("symbolic", "dangling", "hard"):
        files.write(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new" and not (tmp_path / name).is_symlink()
    assert other.read_bytes() == b"other" and not (tmp_path / "nowhere").exists()


def test_the_longest_name(tmp_path):
    name = "ä" * 127 + "a"  # 255 bytes: a temporary name made of it would be too long
    files.write(tmp_path / name, b"new")
    assert names(tmp_path) == [name]


def test_a_read_only_file_system(tmp_path, monkeypatch):
    opened = os.open

    def read_only(path, flags, *arguments, **options):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError) as caught:
        files.write(tmp_path / "value", b"")
    assert utils.describe(caught.value) == f"{tmp_path / 'value'}: Read-only file system"
    with pytest.raises(utils.UsageError, match=f"cannot write to the output folder {tmp_path}: Read-only"):
        files.writable_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """Everything is written as elsewhere; what might be a leftover stays, since nobody can tell."""
    leftover = tmp_path / ".01234567.partial"
    leftover.touch()

    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    files.writable_folder(tmp_path)
    files.write(tmp_path / "value", b"new")
    with files.temporary_folder(tmp_path) as folder:
        assert folder.is_dir()
    with files.claimed(tmp_path / "lock", "training"):
        assert (tmp_path / "lock").exists()
    assert names(tmp_path) == [leftover.name, "value"]


def test_a_system_that_gives_no_lock(tmp_path, monkeypatch):
    """An error, and nothing left: not one try after another for ever."""

    def flock(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="value"):
        files.write(tmp_path / "value", b"new")
    assert names(tmp_path) == []


def test_a_file_system_that_cannot_sync(tmp_path, monkeypatch):
    def fsync(number):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    files.write(tmp_path / "value", b"new")
    assert (tmp_path / "value").read_bytes() == b"new"


def test_a_folder_that_may_be_written_to_but_not_listed(tmp_path, monkeypatch):
    opened = os.open

    def no_listing(path, flags, *arguments, **options):
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", no_listing)
    files.write(tmp_path / "value", b"new")
    assert (tmp_path / "value").read_bytes() == b"new"


def test_many_writers_of_one_file(tmp_path):
    """Threads here; whoever is last wins, whole."""
    contents = [bytes([k]) * 20_000 for k in range(8)]
    seen = set()

    def write(content):
        for _ in range(5):
            files.write(tmp_path / "value", content)
            files.writable_folder(tmp_path)
            seen.add((tmp_path / "value").read_bytes())

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= set(contents) and names(tmp_path) == ["value"]


# --------------------------------------------------------------------------------------- leftovers


@pytest.mark.parametrize("lines", [WRITER, FOLDER])
def test_what_a_killed_process_leaves_is_deleted(tmp_path, process, lines):
    child = process(lines, tmp_path)
    assert len(names(tmp_path)) == 1
    child.kill()
    child.wait()
    assert len(names(tmp_path)) == 1  # it could do nothing about it
    files.writable_folder(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("lines", [WRITER, FOLDER, CLAIM])
def test_who_is_asked_to_end_leaves_nothing(tmp_path, process, lines, number):
    body = textwrap.indent(textwrap.dedent(lines), "    ")
    child = process(f"@utils.command\ndef main(argv=None):\n{body}\nutils.start()\nmain()\n", tmp_path)
    child.send_signal(number)
    assert child.wait(10) == 128 + number
    assert names(tmp_path) == []


@pytest.mark.parametrize("lines", [WRITER, FOLDER])
@pytest.mark.parametrize("state", ["slow", "stopped"])
def test_what_a_living_process_is_at_stays(tmp_path, process, lines, state):
    child = process(lines, tmp_path)
    before = names(tmp_path)
    if state == "stopped":
        child.send_signal(signal.SIGSTOP)
    files.writable_folder(tmp_path)
    assert names(tmp_path) == before
    child.send_signal(signal.SIGCONT)


def test_what_another_thread_is_at_stays(tmp_path):
    with files.atomic_path(tmp_path / "value") as temporary, files.temporary_folder(tmp_path) as folder:
        temporary.write_text("new")
        thread = threading.Thread(target=files.writable_folder, args=(tmp_path,))
        thread.start()
        thread.join()
        assert temporary.exists() and folder.exists()
    assert (tmp_path / "value").read_text() == "new" and names(tmp_path) == ["value"]


def test_a_cleaner_between_the_making_of_a_file_and_its_lock(tmp_path, monkeypatch):
    """The file is gone, or held by the cleaner: another one is made."""
    flock, rounds = fcntl.flock, []

    def clean_first(number, operation):
        rounds.append(number)
        if len(rounds) == 1:  # the file is made, and not yet locked
            files.writable_folder(tmp_path)
        flock(number, operation)

    monkeypatch.setattr(fcntl, "flock", clean_first)
    files.write(tmp_path / "value", b"new")
    assert (tmp_path / "value").read_bytes() == b"new" and names(tmp_path) == ["value"]
    rounds.clear()
    with files.temporary_folder(tmp_path) as folder:
        (folder / "part").touch()


def test_writers_and_cleaners_at_once(tmp_path, process):
    """In processes: no writer ever loses its file to a cleaner."""
    lines = """
        print("ready", flush=True)
        for k in range(300):
            if sys.argv[0] and k % 3 == 0:
                files.writable_folder(folder)
            files.write(folder / str(os.getpid()), str(k).encode())
            with files.temporary_folder(folder) as temporary:
                (temporary / "part").write_text("half")
                os.replace(temporary / "part", folder / f"{os.getpid()} part")
    """
    children = [process(lines, tmp_path) for _ in range(4)]
    assert [child.wait(60) for child in children] == [0] * 4
    expected = sorted(name for child in children for name in (f"{child.pid}", f"{child.pid} part"))
    assert names(tmp_path) == expected
    assert all((tmp_path / f"{child.pid}").read_text() == "299" for child in children)


def test_only_names_of_ours_are_leftovers(tmp_path):
    kept = [".partial", ".0123456.partial", ".012345678.partial", ".0123456g.partial", "01234567.partial", ".bass.h5"]
    kept += ["x.01234567.partial", ".01234567.partial.h5"]
    for name in kept:
        (tmp_path / name).touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / ".76543210.partial").symlink_to(outside)  # none of ours: those are no links
    files.writable_folder(tmp_path)
    assert names(tmp_path) == sorted([*kept, "outside", ".76543210.partial"])


def test_leftovers_of_another_user_do_not_stop_us(tmp_path, monkeypatch):
    (tmp_path / ".01234567.partial").touch()
    opened = os.open

    def forbidden(path, *arguments, **options):
        if Path(path).name == ".01234567.partial":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", forbidden)
    assert files.writable_folder(tmp_path) == tmp_path


def test_a_pipe_among_the_leftovers(tmp_path):
    os.mkfifo(tmp_path / ".01234567.partial")  # to open it for reading alone would wait for ever
    files.writable_folder(tmp_path)


def test_an_interruption_while_a_folder_is_deleted(tmp_path, monkeypatch):
    """It waits until the folder is gone."""
    monkeypatch.setattr(sys, "argv", ["test"])
    remove = os.rmdir

    def interrupted(*arguments, **options):
        monkeypatch.setattr(os, "rmdir", remove)
        os.kill(os.getpid(), signal.SIGTERM)
        remove(*arguments, **options)

    @utils.command
    def main(argv=None):
        with files.temporary_folder(tmp_path) as folder:
            (folder / "below").mkdir()
            monkeypatch.setattr(os, "rmdir", interrupted)
        raise AssertionError("the interruption is lost")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 143 and names(tmp_path) == []


# --------------------------------------------------------------------------------------- folders


def test_folder_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "below", tmp_path / "file", f"{tmp_path}/a\0b", f"{tmp_path}/{'a' * 300}"):
        with pytest.raises(utils.UsageError, match="cannot write to the output folder"):
            files.writable_folder(path)
    with pytest.raises(utils.UsageError, match="cannot write to the output folder"):
        files.writable_folder("~nobody-of-this-name/x")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="this system has no folder that not even root can write to")
def test_a_folder_without_room_for_files_is_a_usage_error():
    with pytest.raises(utils.UsageError, match="cannot write to the output folder /proc"):
        files.writable_folder("/proc")


def test_a_writable_folder_is_made_and_stays_empty(tmp_path):
    assert files.writable_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert names(tmp_path / "a" / "b") == []


def test_a_temporary_folder_may_be_renamed(tmp_path):
    with files.temporary_folder(tmp_path) as folder:
        (folder / "part").write_text("whole")
        folder.rename(tmp_path / "result")
    files.writable_folder(tmp_path)
    assert names(tmp_path) == ["result"] and names(tmp_path / "result") == ["part"]


# --------------------------------------------------------------------------------------- claims


def test_what_is_claimed_is_refused_to_another_process_and_thread(tmp_path, process):
    def refused():
        with pytest.raises(utils.UsageError, match="another process is training: wait"):  # noqa: SIM117
            with files.claimed(tmp_path / "lock", "training"):
                raise AssertionError
        return True

    child = process(CLAIM, tmp_path)
    assert refused()
    child.send_signal(signal.SIGSTOP)
    assert refused()
    child.kill()
    child.wait()
    assert names(tmp_path) == ["lock"]  # it could do nothing about it: without its lock it says nothing
    results = []
    with files.claimed(tmp_path / "lock", "training"):
        thread = threading.Thread(target=lambda: results.append(refused()))
        thread.start()
        thread.join()
    assert results == [True] and names(tmp_path) == []


def test_claims_pass_from_one_to_the_next(tmp_path, process):
    """Never two at once, though the file is deleted and made again all the time."""
    lines = """
        print("ready", flush=True)
        done, until = 0, time.monotonic() + 1
        while time.monotonic() < until:
            try:
                with files.claimed(folder / "lock", "working"):
                    number = os.open(folder / "working", os.O_CREAT | os.O_EXCL)  # fails if somebody else is at it
                    os.close(number)
                    os.unlink(folder / "working")
                    done += 1
            except utils.UsageError:
                pass
        print(done)
    """
    children = [process(lines, tmp_path) for _ in range(3)]
    done = [int(child.stdout.read() or -1) for child in children]
    assert [child.wait(30) for child in children] == [0] * 3
    assert sum(done) > 100 and names(tmp_path) == []


def test_a_child_does_not_keep_what_its_parent_claimed(tmp_path):
    with files.claimed(tmp_path / "lock", "training"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with files.claimed(tmp_path / "lock", "training"):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_claim_is_given_back_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), files.claimed(tmp_path / "lock", "training"):
            raise ZeroDivisionError
    assert names(tmp_path) == []


def test_claims_where_there_can_be_none(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    for path in (tmp_path / "folder", tmp_path / "link", tmp_path / "missing" / "lock"):
        with pytest.raises(OSError) as caught, files.claimed(path, "training"):
            raise AssertionError
        assert caught.value.filename == path or caught.value.filename == str(path)
    assert names(tmp_path) == ["folder", "link"]


# --------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("content", [None, "", "{", "\xff", "[" * 100_000, "1" * 5000])
def test_a_file_that_is_not_json_is_a_usage_error(tmp_path, content):
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(utils.UsageError, match="cannot read .*value.json"):
        files.read_json(path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "huge", "loop"])
def test_what_is_no_file_is_not_read(tmp_path, kind):
    path = tmp_path / "value.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        with open(path, "wb") as stream:
            stream.truncate(2**40)  # of zeros, which take no room
    start = time.monotonic()
    with pytest.raises(utils.UsageError, match="cannot read .*value.json: ."):
        files.read_json(path)
    assert time.monotonic() - start < 1
    if kind not in ("huge", "loop"):
        with pytest.raises(OSError) as caught:
            files.read(path)
        assert caught.value.filename == str(path)


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "value"
    path.write_bytes(b"x" * 10)
    state = os.fstat

    def grows(number):
        before = state(number)
        with path.open("ab") as stream:
            stream.write(b"x" * 10)
        return before

    assert files.read(path, 10) == b"x" * 10
    monkeypatch.setattr(os, "fstat", grows)
    with pytest.raises(OSError, match="larger than the 10 bytes"):
        files.read(path, 10)


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert files.read(tmp_path / "link") == files.read(str(tmp_path / "file"), 7) == b"content"


def test_numbers_of_open_files_are_not_used_up(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    (tmp_path / "folder").mkdir()
    for _ in range(20):
        files.write(tmp_path / "value", b"new")
        files.writable_folder(tmp_path)
        with contextlib.suppress(OSError):
            files.read(tmp_path / "folder")
        with contextlib.suppress(OSError), files.claimed(tmp_path / "folder", "training"):
            pass
        with files.claimed(tmp_path / "lock", "training"), contextlib.suppress(utils.UsageError):  # noqa: SIM117
            with files.claimed(tmp_path / "lock", "training"):
                pass
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "../a", "a/", "a\0b", "\ud800", None, 5, ["a"]])
def test_names_of_other_places(name):
    assert files.is_file_name("..a") and files.is_file_name("a.b") and files.is_file_name("ä \udcff")
    assert not files.is_file_name(name)
