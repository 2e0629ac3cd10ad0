"""The pictures that README.md begins with: they show what model.py builds, and are those that the program draws."""

import sys

import matplotlib.image
import nnabla as nn
import numpy as np
import pytest
import shapes
from test_project import ROOT
from trainings import run

import model

sys.path.append(str(ROOT / "benchmarks"))

import pictures


@pytest.fixture(scope="module")
def drawn():
    net, x = model.OpenUnmix(max_bin=1487), nn.Variable((16, 2, 6 * 44100))
    return x, pictures.blocks(net, x)


def test_blocks_are_those_of_the_network(drawn):
    x, found = drawn
    sizes = shapes.open_unmix(2, 512, 3, 2049, 1487, False)
    learnt = [np.prod(shape) for name, shape in sizes.items() if not name.endswith(("/mean", "/var"))]
    assert sum(block.nb_parameters for block in found) == sum(learnt)
    kinds = [block.kind for block in found]
    assert found[0].inputs == (-1,) and found[-1].shape == found[0].shape == (255, 16, 2, 2049)
    assert found[-1].inputs == (0, len(found) - 2), "the mixture skips all"
    lstm = kinds.index("lstm")
    assert found[lstm + 1].inputs == (lstm - 1, lstm), "the LSTM's input skips it"
    assert all(block.inputs == (k - 1,) for k, block in enumerate(found) if k not in (len(found) - 1, lstm + 1))


def test_another_network_looks_otherwise(drawn):
    net = model.OpenUnmix(hidden_size=64, nb_layers=1, unidirectional=True, n_fft=1024, n_hop=512, nb_channels=1)
    found = pictures.blocks(net, nn.Variable((1, 1, 8192)))
    lstm = next(block for block in found if block.kind == "lstm")
    assert lstm.shape == (15, 1, 64) and lstm.label == "LSTM\n1 layer\n64 →"
    assert not nn.get_parameters() and model.functions.__name__ == "functions", "it leaves nothing behind"
    assert lstm.nb_parameters == 4 * 64 * (64 + 64 + 2)


def test_the_readme_shows_the_network_as_it_is(drawn, tmp_path):
    x, found = drawn
    pictures.draw_network(tmp_path / "network.png", found, x)
    now, shown = (matplotlib.image.imread(folder / "network.png") for folder in (tmp_path, ROOT / "docs" / "pictures"))
    assert now.shape == shown.shape and np.abs(now - shown).mean() < 1e-3, "python benchmarks/pictures.py"


def test_stems_are_drawn(songs, tmp_path):
    run(songs, tmp_path / "model")
    song = next(songs.glob("test/*"))
    pictures.main(["--song", str(song), "--model", str(tmp_path / "model"), "--outdir", str(tmp_path / "out")])
    assert matplotlib.image.imread(tmp_path / "out" / "stems.png")[..., :3].std() > 0.1
    assert (tmp_path / "out" / "network.png").exists()
