import signal

import hypothesis
import nnabla as nn
import numpy as np
import pytest

import kernels.threads
import synthesize

# Ctrl-C is ignored by what a shell's & has started, a lost terminal by what nohup has, and so by all that these start:
# tests send them, and wait
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# for mutants.py, which asks only whether a test fails: not with what example, made as small as can be
hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.generate], derandomize=True, database=None)


@pytest.fixture(autouse=True)
def fresh_parameters():
    """Every test starts with empty parameters and the same random numbers."""
    nn.clear_parameters()
    nn.set_default_context(nn.Context(["cpu:float"], "CpuCachedArray"))
    nn.random.prng = np.random.RandomState(0)
    nn.random.set_function_seed(0)
    yield
    kernels.threads.set_threads(None)


@pytest.fixture(scope="session")
def songs(tmp_path_factory):
    """A small MUSDB18-HQ folder: three training songs, one validation song and one test song of 4 s."""
    root = tmp_path_factory.mktemp("songs")
    synthesize.synthesize(root, nb_train=3, nb_valid=1, nb_test=1, duration=4.0, seed=7, quiet=True)
    return root
