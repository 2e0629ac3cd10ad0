"""What a training leaves in its output folder, beside its checkpoint, and what it does not replace there."""

from __future__ import annotations  # unions, on Python 3.9

import io
from pathlib import Path

import checkpoint
import files
import folders
from trained import Model
from utils import UsageError


def check_new(output: Path, name: str) -> None:
    """UsageError if a new training would replace what an earlier one has left in the folder."""
    last = checkpoint.path_of(output, name)
    for path in (last, checkpoint.before(last), output / f"{name}.h5"):
        if path.exists():
            ways = "" if path.suffix == ".h5" else f"--checkpoint {output} continues it, "
            raise UsageError(f"{path} is there already: {ways}--overwrite replaces it; or use another --output")


def check_output(output: Path, model: Model, name: str) -> None:
    """UsageError if the weights of this training cannot lie in the folder beside what is there."""
    folders.check_config(output, model.config)
    for target in model.targets:
        path = folders.weights_of(output, target)
        if path and path.name != f"{name}.h5":
            raise UsageError(f"{path} holds weights of {target} already: use another --output")


def bring_best(origin: Path, has_best: bool, output: Path, name: str) -> None:
    """Copy the best weights of a training that goes on in another folder than that of its checkpoint `origin`."""
    best, copy = origin.with_name(f"{name}.h5"), output / f"{name}.h5"
    if has_best and not best.is_file():
        raise UsageError(f"there is no {best}, the best weights so far, beside {origin.name}")
    if output.samefile(origin.parent):
        return
    if copy.exists() and not (has_best and copy.read_bytes() == best.read_bytes()):
        raise UsageError(f"{copy} is of another training, or of this one later on: use another --output")
    if has_best and not copy.exists():
        files.write(copy, best.read_bytes())


def plot_losses(path: Path, log: dict) -> None:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(log["train_loss_history"]) + 1)
    axes.plot(epochs, log["train_loss_history"], ".-", label="training")
    axes.plot(epochs, log["valid_loss_history"], ".-", label="validation")
    axes.axvline(log["best_epoch"], color="gray", lw=0.8, ls=":", label=f"best epoch ({log['best_epoch']})")
    is_positive = min(log["train_loss_history"] + log["valid_loss_history"]) > 0
    axes.set(xlabel="epoch", ylabel=f"loss: {log['args']['loss']}", title=" + ".join(log["network"]["targets"]))
    axes.set_yscale("log" if is_positive else "linear")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    stream = io.BytesIO()
    figure.savefig(stream, dpi=120)
    files.write(path, stream.getvalue())


def write_log(output: Path, name: str, log: dict) -> None:
    files.write_json(output / f"{name}.json", log)
    plot_losses(output / f"{name}.png", log)
    monitor = files.writable_folder(output / "monitor" / name)
    for kind in ("training", "validation"):
        losses = enumerate(log[f"{kind[:5]}_loss_history"], 1)
        lines = "".join(f"{epoch} {loss:g}\n" for epoch, loss in losses)
        files.write(monitor / f"{kind}-loss.series.txt", lines.encode())
