"""What test_communicator.py starts: mpirun -n N python tests/processes.py WHAT OUTPUT SONGS.

WHAT is "equal", trainings that do not depend on N; "all", what else several processes do; or "crash". Each process
writes what it has seen into OUTPUT/<its number>.json.
"""

import contextlib
import io
import json
import os
import signal
import sys
import zlib
from pathlib import Path

import nnabla as nn
import nnabla.communicators
import numpy as np
import pytest
from test_checkpoint import at_item
from trainings import TINY

import communicator
import data
import files
import outputs
import train
import utils
from utils import UsageError

FROZEN = ["--network", f"{Path(__file__).with_name('networks.py')}:Frozen", "--source-augmentations", "--epochs", "2"]
STILL = ["--hidden-size", "8", "--lr", "1e-12", "--epochs", "1"]
OURS = ["--hidden-size", "8", "--ema", "0.9", "--epochs", "2"]


def main(what, output, songs):
    communicator.PATIENCE = 1.0
    processes, models, trainings = communicator.start(), [], {}

    class Model(train.Model):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            models.append(self)

    train.Model = Model
    outputs.plot_losses = lambda path, log: files.write(path, b"png")

    def run(name, *options, second=None):
        """Train; notes what is said, the exit status, a checksum of all weights. `second` changes process 1."""
        models.clear()
        own = [option for option in TINY if option not in ("--hidden-size", "8")]
        said, status = io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch:
            if second and processes.rank == 1:
                second(patch)
            try:
                with contextlib.redirect_stderr(said) if processes.rank == 0 else contextlib.nullcontext():
                    train.main([*own, "--root", songs, "--output", str(output / name), "--threads", "1", *options])
            except SystemExit as stop:
                status = stop.code
        arrays = [array.tobytes() for model in models for array in model.arrays().values()]
        trainings[name] = {"said": said.getvalue(), "status": status, "crc": zlib.crc32(b"".join(arrays))}

    if what == "crash":
        run("crash", *OURS, second=lambda patch: patch.setattr(train, "train_step", lambda *_: {}["nothing"]))
    seen = {"size": processes.size, "cores": processes.cores, "trainings": trainings}
    run("frozen", *FROZEN)
    if what == "all":
        several(run, output)
        seen.update(told(processes), averaged=averaged(processes), nccl=nccl(processes))
    (output / f"{processes.rank}.json").write_text(json.dumps(seen))


def several(run, output):
    run("ours", *OURS)
    run("interrupted", *OURS, second=lambda patch: at_item(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    run("resumed", *OURS, "--checkpoint", str(output / "interrupted"))
    run("unreadable", *OURS, second=lambda patch: at_item(patch, 3, fail))
    run("not a number", *OURS, second=lambda patch: patch.setattr(data.MusdbSource, "fill", not_a_number))
    run("still", *STILL)
    run("whole tracks", *OURS, "--seq-dur", "0", "--batch-size", "2", "--samples-per-track", "1", "--epochs", "1")
    run("nowhere", "--root", "/nowhere")
    run("small", "--batch-size", "1")
    run("device", "--device-id", "1")


def fail(*_):
    raise OSError(5, "Input/output error", "song.wav")


def not_a_number(source, epoch, index, mixture, target):
    mixture[...] = np.nan


def told(processes):
    """What they tell each other."""
    raised = []
    for error in (UsageError("one"), OSError(5, "two", "file"), MemoryError(), KeyError("other")):
        try:
            processes.check(error if processes.rank == 1 else None)
        except Exception as same:
            raised.append([type(same).__name__, str(same)])
    same = {"x": nn.Variable.from_numpy_array(np.full((2, 3), processes.rank + 5.0))}
    processes.equalize(same)
    return {
        "first": processes.first(lambda: processes.rank),
        "on each machine": processes.on_each_machine(lambda: processes.rank),
        "any": [processes.any(flag) for flag in (False, processes.rank == 1, True)],
        "merged": [processes.merge(processes.turns(nb_items), nb_items) for nb_items in (1, 2, 5)],
        "equal": same["x"].d.tolist(),
        "raised": raised,
    }


def averaged(processes, share=None):
    """What becomes of gradients, a loss, and of what is not learnt; the second process has a third of the batch."""
    learnt, changed, constant = (nn.Variable((3,), need_grad=k == 0) for k in range(3))
    learnt.d, learnt.g = 0, np.float32([1, 2, 3]) * (processes.rank + 1)
    changed.d, constant.d = [0.5, 0.25, 0], np.float32([1 / 3, 1e-7, 3e7])
    before, loss = constant.d.copy(), nn.NdArray.from_numpy_array(np.array(6.0 * processes.rank, np.float32))
    average = processes.averaging({"learnt": learnt}, {"learnt": learnt, "changed": changed, "constant": constant})
    changed.d += [1, 0, processes.rank]
    average((2 / 3, 1 / 3)[processes.rank] if share is None else share, loss)
    is_constant = bool((before == constant.d).all())
    return [learnt.g.tolist(), changed.d.tolist(), float(loss.data), is_constant]


def nccl(processes):
    """Calls of NNabla's communicator for GPUs, and what comes of it, where its mean is done as on a CPU."""
    calls = []

    class Fake:
        rank, size, local_rank = processes.rank, processes.size, processes.local_rank

        def __init__(self, device):
            calls.append(["made for", device.backend[0], device.device_id])

        def init(self):
            calls.append(["init"])

        def all_reduce(self, arrays, **options):
            calls.append(["all_reduce", [list(array.shape) for array in arrays], options])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(processes, "_nccl", None)
                processes._mean(arrays)

    class Miscounting(Fake):
        local_rank = 7

    def use(backend, made):
        patch.setattr(nnabla.communicators, "MultiProcessDataParallelCommunicator", made)
        try:
            processes.use(nn.Context([backend], "", str(processes.local_rank)))
        except UsageError as error:
            return str(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_nccl", None)
        use("cudnn:float", Fake)
        values = averaged(processes), averaged(processes, 0.5)
        wrong = [use("cudnn:float", Miscounting), use("cudnn:float", fail)]
        wrong.append(use("cudnn:float" if processes.rank else "cpu:float", Fake))
    return {"calls": calls[:4], "averaged": values, "wrong": wrong}


if __name__ == "__main__":
    utils.start()
    what, output, songs = sys.argv[1:]
    sys.argv[0] = "train.py"
    main(what, Path(output), songs)
