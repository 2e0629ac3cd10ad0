"""Published models by name, from a server on this machine: small files in the place of the real ones."""

import concurrent.futures
import hashlib
import http.server
import os
import resource
import shutil
import threading
from types import SimpleNamespace

import nnabla as nn
import numpy as np
import pytest
import soundfile
import urllib3
from test_separate import N_FFT, N_HOP, RATE, SIZES, random_params, song

import pretrained
import separate
import trained
import weights

TARGETS = {"umx": ("vocals", "bass"), "umxl": ("vocals", "drums"), "umxhq": ("other",), "umxse": ("speech", "noise")}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server in the place of zenodo.org, and small models in the place of the published.

    `files` are what it holds, {path: content}; `requests` what it was asked for; a file named in `cut` ends early.
    """
    state = SimpleNamespace(files={}, requests=[], cut=set(), cache=tmp_path / "cache" / "open-unmix-nnabla")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append(self.path)
            if self.path not in state.files:
                self.send_error(404)
                return
            content = state.files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if self.path in state.cut else content)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()

    def stop():
        if thread.is_alive():
            httpd.shutdown()
            thread.join()
            httpd.server_close()

    state.stop = stop
    address = f"http://127.0.0.1:{httpd.server_address[1]}"
    for name, targets in TARGETS.items():
        separator = "_" if name == "umxse" else "-"
        nb_channels = pretrained.MODELS[name].config["nb_channels"]
        files = {}
        for seed, target in enumerate(targets):
            path = tmp_path / "model.pth"
            weights.save(path, random_params(seed, nb_channels=nb_channels))
            content = path.read_bytes()
            path.unlink()
            files[target] = f"{target}{separator}{hashlib.sha256(content).hexdigest()[:8]}.pth"
            state.files[f"/{name}/{files[target]}"] = content
        config = {"nfft": N_FFT, "nhop": N_HOP, "sample_rate": RATE, "nb_channels": nb_channels}
        note = pretrained.MODELS[name].note
        small = pretrained.Published(f"{address}/{name}", files, config, note)
        monkeypatch.setitem(pretrained.MODELS, name, small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield state
    stop()


def run(tmp_path, capfd, *options):
    """Exit status and stderr of separating a song."""
    if not (tmp_path / "song.wav").exists():
        soundfile.write(tmp_path / "song.wav", song().T, RATE)
    command = [str(tmp_path / "song.wav"), "--outdir", str(tmp_path / "out"), "--quiet", "--context", "cpu"]
    try:
        separate.main([*command, *map(str, options)])
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, capfd.readouterr().err


def stems(tmp_path):
    return {path.stem for path in tmp_path.glob("out/song/*")}


def name_of(model, target):
    return pretrained.MODELS[model].files[target]


def test_what_is_published_is_what_the_reference_lists():
    """openunmix 1.3.0's __init__.py: addresses, targets, and the STFT of each model."""
    records = {"umx": 3370486, "umxhq": 3370489, "umxl": 5069601, "umxse": 3786908}
    assert {name: published.url for name, published in pretrained.MODELS.items()} == {
        name: f"https://zenodo.org/records/{record}/files" for name, record in records.items()
    }
    hashes = {
        "umx": "c8df74a5 5a48008b 646024d3 f8e132cc",
        "umxhq": "b62c91ce 9619578f 8d85a5bd b52fbbf7",
        "umxl": "bccbd9aa 69e0ebd4 2ca1ce51 c8c5b3e6",
        "umxse": "f5e0d9f9 04a6fc2d",
    }
    for name, published in pretrained.MODELS.items():
        speech = name == "umxse"
        assert tuple(published.files) == (("speech", "noise") if speech else ("vocals", "drums", "bass", "other"))
        stft = (1024, 512, 16000, 1) if speech else (4096, 1024, 44100, 2)
        assert tuple(published.config[key] for key in ("nfft", "nhop", "sample_rate", "nb_channels")) == stft
        assert all(file.startswith(target) for target, file in published.files.items())
        assert {file[-12:-4] for file in published.files.values()} == set(hashes[name].split())


def test_downloaded_once_then_used_without_network(server, tmp_path, capfd):
    assert run(tmp_path, capfd, "--model", "umx") == (0, "")
    assert stems(tmp_path) == {"vocals", "bass"}
    assert len(server.requests) == 2
    assert {path.name for path in (server.cache / "umx").iterdir()} == set(pretrained.MODELS["umx"].files.values())
    server.stop()
    assert run(tmp_path, capfd, "--model", "umx") == (0, "")
    assert len(server.requests) == 2


def test_only_what_is_asked_for_is_downloaded(server, tmp_path, capfd):
    assert run(tmp_path, capfd, "--model", "umx", "--targets", "bass") == (0, "")
    assert server.requests == [f"/umx/{name_of('umx', 'bass')}"]
    status, error = run(tmp_path, capfd, "--model", "umx", "--targets", "guitar")
    assert status == 2 and "umx has no target guitar: it has vocals, bass" in error and error.count("\n") == 1


def test_a_folder_of_ones_own_needs_no_network(server, tmp_path, capfd):
    server.stop()
    folder = tmp_path / "mine"
    folder.mkdir()
    for path, content in server.files.items():
        (folder / path.split("/")[-1]).write_bytes(content)
    assert run(tmp_path, capfd, "--model", "umx", "--model-dir", folder) == (0, "")
    assert not server.cache.exists()


def test_speech_in_noise(server, tmp_path, capfd):
    assert run(tmp_path, capfd, "--model", "umxse") == (0, "")
    assert stems(tmp_path) == {"speech", "noise"}


def test_the_licence_is_told(server, tmp_path, capfd):
    status, error = run(tmp_path, capfd, "--model", "umxl")
    assert status == 0 and "non-commercial" in error and error.count("\n") == 1


def test_progress_is_shown(server, capfd):
    pretrained.fetch("umxhq", quiet=False)
    assert "100%" in capfd.readouterr().err
    pretrained.fetch("umxse")
    assert capfd.readouterr().err == ""


def damage(server, kind):
    """Make the server bad; what the message says."""
    path = f"/umx/{name_of('umx', 'bass')}"
    if kind == "truncated":
        server.cut.add(path)
        # before its version 2, urllib3 did not compare what came with what was promised
        return "cannot download" if urllib3.__version__ >= "2" else "is not the published file"
    if kind == "tampered":
        server.files[path] = server.files[path].replace(b"input_mean", b"input_evil")
        return "is not the published file"
    if kind == "empty":
        server.files[path] = b""
        return "is not the published file"
    if kind == "404":
        del server.files[path]
        return "404"
    server.stop()
    return "no connection"


@pytest.mark.parametrize("kind", ["truncated", "tampered", "empty", "404", "no network"])
def test_a_bad_download(server, tmp_path, capfd, kind):
    """One line; what is wrong is not kept; a second try works."""
    before = dict(server.files)
    message = damage(server, kind)
    status, error = run(tmp_path, capfd, "--model", "umx")
    assert status == 2 and message in error and error.count("\n") == 1
    if message != "is not the published file":  # it says which files to put where
        assert name_of("umx", "bass") in error and str(server.cache / "umx") in error
        assert pretrained.MODELS["umx"].url in error
        assert (name_of("umx", "vocals") in error) == (kind == "no network")
    kept = {path.name for path in server.cache.glob("umx/*")}
    assert kept == (set() if kind == "no network" else {name_of("umx", "vocals")})
    assert not stems(tmp_path)
    if kind != "no network":
        server.files, server.cut = before, set()
        assert run(tmp_path, capfd, "--model", "umx") == (0, "")


@pytest.mark.parametrize("kind", ["truncated", "tampered", "swapped"])
def test_a_bad_file_in_the_cache(server, tmp_path, capfd, kind):
    """Checked at every use."""
    paths = pretrained.fetch("umx")
    path = paths["bass"]
    content = path.read_bytes()
    if kind == "swapped":
        shutil.copy(paths["vocals"], path)
    else:
        path.write_bytes(content[:-9] if kind == "truncated" else content.replace(b"input_mean", b"input_evil"))
    status, error = run(tmp_path, capfd, "--model", "umx")
    assert status == 2 and f"{path} is damaged" in error and "delete it" in error and error.count("\n") == 1
    assert not stems(tmp_path)


def test_a_cache_that_cannot_be_written(server, tmp_path, capfd):
    (tmp_path / "file").touch()
    status, error = run(tmp_path, capfd, "--model", "umx", "--model-dir", tmp_path / "file")
    assert status == 2 and "cannot write to" in error and error.count("\n") == 1
    assert not server.requests


def test_what_a_killed_download_leaves_the_next_one_removes(server):
    folder = server.cache / "umx"
    folder.mkdir(parents=True)
    (folder / ".01234567.partial").write_bytes(b"half a file")
    pretrained.fetch("umx")
    assert {path.name for path in folder.iterdir()} == set(pretrained.MODELS["umx"].files.values())


def test_two_downloads_at_once(server):
    """Each gets a whole file, whoever comes first."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: pretrained.fetch("umx"), range(8)))
    assert all(paths == found[0] for paths in found)
    for path in found[0].values():
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem[-8:])
    assert {path.name for path in (server.cache / "umx").iterdir()} == {path.name for path in found[0].values()}


def test_a_full_disk(server, tmp_path, capfd):
    """A failure while working: status 1, with the name of the file; nothing is left of it."""
    size = resource.getrlimit(resource.RLIMIT_FSIZE)
    soundfile.write(tmp_path / "song.wav", song().T, RATE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, size[1]))
    try:
        status, error = run(tmp_path, capfd, "--model", "umx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
    assert status == 1 and error.count("\n") == 1
    assert f"{server.cache / 'umx' / name_of('umx', 'vocals')}: File too large" in error
    assert not list((server.cache / "umx").iterdir())


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_no_file_in_the_cache(server, tmp_path, capfd, make):
    (server.cache / "umx").mkdir(parents=True)
    make(server.cache / "umx" / name_of("umx", "bass"))
    status, error = run(tmp_path, capfd, "--model", "umx", "--targets", "bass")
    assert status == 2 and "is damaged" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", TARGETS)
def test_spectrogram_models(server, name, monkeypatch):
    """umx_spec and its like give what openunmix' functions of that name do: a network per target."""
    spec = {
        "umx": trained.umx_spec,
        "umxhq": trained.umxhq_spec,
        "umxl": trained.umxl_spec,
        "umxse": trained.umxse_spec,
    }[name]
    models = spec()
    assert tuple(models) == TARGETS[name]
    assert list(spec(targets=TARGETS[name][0])) == [TARGETS[name][0]]
    nb_channels = 1 if name == "umxse" else 2
    X = np.random.default_rng(0).uniform(0, 1, (9, 1, nb_channels, SIZES["nb_bins"])).astype(np.float32)
    for seed, target in enumerate(TARGETS[name]):
        Y = models[target](nn.Variable.from_numpy_array(X))
        Y.forward()
        alone = trained.described(random_params(seed, nb_channels=nb_channels), [target], N_HOP, RATE)
        expected = alone(nn.Variable.from_numpy_array(X))
        expected.forward()
        assert Y.shape == X.shape
        np.testing.assert_array_equal(Y.d, expected.d)
