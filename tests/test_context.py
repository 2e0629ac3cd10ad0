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


@pytest.mark.parametrize("device_id, is_there", [(0, True), ("1", True), (2, False)])
def test_a_gpu_is_one_of_those_that_are_there(monkeypatch, device_id, is_there):
    cuda = SimpleNamespace(get_device_count=lambda: 2)
    monkeypatch.setitem(sys.modules, "nnabla_ext.cuda", cuda)
    monkeypatch.setattr(nnabla_ext, "cuda", cuda, raising=False)
    made = SimpleNamespace()
    monkeypatch.setattr(context, "get_extension_context", lambda name, **options: made if name == "cudnn" else None)
    if is_there:
        assert context.extension_context(None, device_id) is made
    else:
        with pytest.raises(UsageError, match=f"{device_id}: this machine has 2|'{device_id}' is not a number of a GPU"):
            context.extension_context("cudnn", device_id)


@pytest.mark.parametrize("device_id", [-1, "abc", "", None, 1.5])
@pytest.mark.parametrize("name", [None, "cpu", "cudnn"])
def test_what_is_no_number_of_a_gpu_is_not_the_cpu(name, device_id):
    with pytest.raises(UsageError, match="GPUs have numbers"):
        context.use(name, device_id)


def test_nnabla_can_be_heard_after_the_search_for_a_gpu():
    context.extension_context(None)
    assert not nn.logger.disabled
