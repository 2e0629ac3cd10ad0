import sys
from types import SimpleNamespace

import nnabla as nn
import nnabla_ext
import pytest

import context
import kernels.threads
from utils import UsageError


@pytest.fixture(autouse=True)
def fast():
    yield
    context.set_plain(False)


def test_use_sets_all_of_it_and_starts_from_the_defaults():
    before = nn.get_current_context()
    chosen = context.use("cpu", plain=True, threads=3)
    assert chosen.backend == ["cpu:float"] and kernels.threads.get_threads() == 3 and not context.fast()
    assert nn.get_current_context().backend == before.backend
    context.use("cpu")
    kernels_of_all_cores = kernels.threads.get_threads()
    kernels.threads.set_threads(None)
    assert kernels_of_all_cores == kernels.threads.get_threads() and context.fast()


def test_the_fast_forms_are_the_cpu_s():
    assert context.fast()
    with nn.context_scope(nn.Context(["cudnn:float", "cuda:float", "cpu:float"], "CudaCachedArray")):
        assert not context.fast()


@pytest.mark.parametrize("threads", [0, -1, 10**20, 2.5, "2"])
def test_numbers_of_threads_that_cannot_be(threads):
    context.use("cpu", plain=True, threads=3)
    with pytest.raises(UsageError, match="--threads: .*at least one is needed"):
        context.use("cpu", threads=threads)
    assert kernels.threads.get_threads() == 3 and not context.fast()


@pytest.mark.parametrize("name", ["gpu", "", "CPU"])
def test_an_unknown_name_is_not_the_cpu(name):
    context.use("cpu", plain=True, threads=3)
    with pytest.raises(UsageError, match=f"unknown context '{name}': choose cpu or cudnn"):
        context.use(name)
    assert kernels.threads.get_threads() == 3 and not context.fast()


def extension(monkeypatch, get_device_count=lambda: 2, cudnn=lambda **options: "cudnn"):
    """As if NNabla's CUDA extension were there: what it answers, or how it fails."""
    cuda = SimpleNamespace(get_device_count=get_device_count)
    monkeypatch.setitem(sys.modules, "nnabla_ext.cuda", cuda)
    monkeypatch.setattr(nnabla_ext, "cuda", cuda, raising=False)
    contexts = {"cudnn": cudnn, "cpu": lambda **options: "cpu"}
    monkeypatch.setattr(context, "get_extension_context", lambda name, **options: contexts[name](**options))


def fails(error):
    def fail(**options):
        print("GPU compatibility could not be verified")  # as the extension does, to stdout
        nn.logger.warning("CUDA initialization failed.")
        raise error

    return fail


@pytest.mark.parametrize("device_id, is_there", [(0, True), ("1", True), (2, False)])
@pytest.mark.parametrize("name", [None, "cudnn"])
def test_a_gpu_is_one_of_those_that_are_there(monkeypatch, name, device_id, is_there):
    extension(monkeypatch)
    if is_there:
        assert context.extension_context(name, device_id) == "cudnn"
    else:
        with pytest.raises(UsageError, match=r"--device-id 2: this machine has 2 CUDA device\(s\), from 0 on"):
            context.extension_context(name, device_id)


def of_cuda(text):
    """The form that NNabla's C++ errors have."""
    return RuntimeError(f"target_specific error in cuda_get_device_count\n/home/src/nbla/cuda/init.cpp:350\n{text}\n")


COUNT = '(cudaGetDeviceCount(&count)) failed with "%s" (%s).'
OBJECT = "%s: cannot open shared object file: No such file or directory"
REASONS = [
    (ModuleNotFoundError("No module named 'nnabla_ext.cuda'"), "pip install nnabla-ext-cuda120==1.39.0"),
    (ImportError(OBJECT % "libcuda.so.1"), "the NVIDIA driver, or a part of it, is missing"),
    (ImportError(OBJECT % "libcudnn.so.8"), "cuDNN 8 is missing"),
    (ImportError(OBJECT % "libcudart.so.11.0"), "the library libcudart.so.11.0 is missing"),
    (ImportError("/x/libcublas.so.12: version `libcublas.so.12' not found"), "the library libcublas.so.12 is missing"),
    (
        of_cuda(
            COUNT % ("CUDA driver version is insufficient for CUDA runtime version", "cudaErrorInsufficientDriver")
        ),
        "the NVIDIA driver is too old: CUDA 12.0 needs 525.60.13 or later",
    ),
    (of_cuda(COUNT % ("no CUDA-capable device is detected", "cudaErrorNoDevice")), "there is no NVIDIA GPU"),
    (of_cuda(COUNT % ("out of order", "cudaErrorOther")), r"failed with \"out of order\" \(cudaErrorOther\)"),
    (ValueError("Currently, nnabla-ext-cuda120 does not support your gtx 1 GPU."), "does not support your gtx 1 GPU"),
    (RuntimeError(), "RuntimeError"),
]


@pytest.mark.parametrize("where", ["get_device_count", "cudnn"])
@pytest.mark.parametrize("error, reason", REASONS, ids=[reason for _, reason in REASONS])
def test_what_is_missing_is_said_in_one_line_and_only_if_it_was_asked_for(monkeypatch, capsys, error, reason, where):
    extension(monkeypatch, **{where: fails(error)})
    with pytest.raises(
        UsageError, match=f"--context cudnn does not work here: .*{reason}.*or use --context cpu"
    ) as found:
        context.extension_context("cudnn")
    assert "\n" not in str(found.value)
    assert context.extension_context(None) == "cpu"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("is_installed", [False, True])
def test_nvidia_s_wheels_come_before_what_the_machine_has(monkeypatch, tmp_path, is_installed):
    """In an order in which none needs one that is not there yet; and only if the extension is there."""
    names = ["cublas/lib/libcublas.so.12", "cublas/lib/libcublasLt.so.12", "cudnn/lib/libcudnn.so.8", "cudnn/lib/no.so"]
    for name in names:
        (tmp_path / "nvidia" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvidia" / name).touch()
    if is_installed:
        (tmp_path / "cuda").mkdir()
        (tmp_path / "cuda" / "__init__.py").write_text("import ctypes\nraise ImportError(ctypes.CDLL('the extension'))")
        monkeypatch.setattr(nnabla_ext, "__path__", [*nnabla_ext.__path__, str(tmp_path)])
    loaded = []
    monkeypatch.setattr(context.ctypes, "CDLL", loaded.append)
    monkeypatch.syspath_prepend(tmp_path)
    assert context.extension_context(None).backend == ["cpu:float"]
    wheels = [str(tmp_path / "nvidia" / names[k]) for k in (1, 0, 2)]
    assert loaded == ([*wheels, "the extension"] if is_installed else [])


@pytest.mark.parametrize("value, is_allowed", [(None, False), ("0", False), ("1", True), ("", True)])
def test_reduced_precision_is_refused(monkeypatch, value, is_allowed):
    """The extension takes whatever is not 0 for a yes."""
    extension(monkeypatch)
    monkeypatch.delenv("NNABLA_CUDA_ALLOW_TF32", raising=False)
    if value is not None:
        monkeypatch.setenv("NNABLA_CUDA_ALLOW_TF32", value)
    for name in (None, "cudnn"):
        if is_allowed:
            with pytest.raises(UsageError, match="NNABLA_CUDA_ALLOW_TF32 is set: .*above 10 kHz.*unset it"):
                context.extension_context(name)
        else:
            assert context.extension_context(name) == "cudnn"
    assert context.extension_context("cpu") == "cpu"


@pytest.mark.parametrize("device_id", [-1, "abc", "", None, 1.5])
@pytest.mark.parametrize("name", [None, "cpu", "cudnn"])
def test_what_is_no_number_of_a_gpu_is_not_the_cpu(name, device_id):
    with pytest.raises(UsageError, match="GPUs have numbers"):
        context.use(name, device_id)


def test_nnabla_can_be_heard_after_the_search_for_a_gpu():
    context.extension_context(None)
    assert not nn.logger.disabled
