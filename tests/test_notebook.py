"""The notebook of examples/, run from its first cell to its last, in a process of its own.

Without Jupyter, which is heavy: cells are executed as Python executes them, one after the other, in one namespace, and
what IPython would play and show is recorded instead. A cell with a magic of IPython (%, !) would fail here.
"""

import json
import os
import subprocess
import sys

import numpy as np
from test_project import ROOT

NOTEBOOK = ROOT / "examples" / "separate.ipynb"
PLAYER = """
import json, sys, types
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot
import numpy as np

shown = []
display = types.ModuleType("IPython.display")
display.Audio = lambda data, rate: ("sound", np.asarray(data), rate)
display.display = lambda *things: shown.extend(things)
package = types.ModuleType("IPython")
package.version_info, package.get_ipython = (9, 0), lambda: None  # which matplotlib asks for
sys.modules.update({"IPython": package, "IPython.display": display})
matplotlib.pyplot.show = lambda: shown.append(("figure", matplotlib.pyplot.gcf()))

cells = json.load(open(sys.argv[1]))["cells"]
space = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
figure = shown.pop(0)[1]
figure.canvas.draw()
assert len(figure.axes) == len(shown[::2])
names, sounds = shown[::2], shown[1::2]
np.savez(sys.argv[2], rate=[rate for _, _, rate in sounds], **{n: data for n, (_, data, _) in zip(names, sounds)})
"""


def test_the_notebook_separates_shows_and_plays(tmp_path):
    command = [sys.executable, "-c", PLAYER, str(NOTEBOOK), str(tmp_path / "played.npz")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.run(
        command, cwd=ROOT / "examples", env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    played = dict(np.load(tmp_path / "played.npz"))
    assert set(played.pop("rate")) == {44100}
    mixture = played.pop("mixture")
    assert list(played) == ["vocals", "drums", "bass", "other"]
    assert all(stem.shape == mixture.shape and np.abs(stem).max() > 0 for stem in played.values())
    # all stems together are the mixture, nearly: the filter is regularised
    assert np.linalg.norm(sum(played.values()) - mixture) < 0.1 * np.linalg.norm(mixture)


def test_the_notebook_is_kept_without_output():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | (
            {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        )
        assert not cell.get("outputs") and cell.get("execution_count") is None
