"""h5_files.py against HDF5's own library, through h5py: each reads what the other has written."""

import io

import h5py
import numpy as np
import pytest

import h5_files

TEXTS = ("", "x", "é" * 3000, "y" * 5000, '{"class": "OpenUnmix"}')


def random_file(seed):
    """Arrays by name in any order, which of them are learnt, and attributes."""
    rng = np.random.default_rng(seed)
    names = {"/".join(rng.choice(list("abcdé "), rng.integers(1, 4))) for _ in range(rng.integers(1, 30))}
    names = [name for name in names if not any(other.startswith(f"{name}/") for other in names)]
    names += [f"many/{k}" for k in range(rng.choice((0, 9, 300)))]
    shapes = ((), (1,), (3,), (2, 3), (5, 1, 7), (1,) * 9, (100, 1000))
    arrays = {name: rng.standard_normal(shapes[rng.integers(len(shapes))]).astype(np.float32) for name in names}
    attributes = {f"text {k}": TEXTS[rng.integers(len(TEXTS))] for k in range(rng.integers(0, 4))}
    attributes.update({f"array {k}": rng.standard_normal(k).astype(np.float32) for k in (1, 4, 15_000)[: seed % 4]})
    learnt = {name: bool(rng.integers(2)) for name in names}
    return arrays, learnt, attributes


def by_h5py(content):
    """What h5py finds: arrays and their attributes by name, and the attributes of the file."""
    arrays, told = {}, {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            arrays[name], told[name] = item[()], dict(item.attrs)

    with h5py.File(io.BytesIO(content), "r") as file:
        file.visititems(visit)
        return arrays, told, dict(file.attrs)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, str):
            assert found[name] == value
        else:
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
            np.testing.assert_array_equal(found[name], value)


def written(seed):
    arrays, learnt, attributes = random_file(seed)
    stream = io.BytesIO()
    h5_files.write(stream, arrays, learnt.get, attributes)
    return stream.getvalue()


@pytest.mark.parametrize("seed", range(12))
def test_hdf5_reads_what_is_written(seed):
    arrays, learnt, attributes = random_file(seed)
    found, told, more = by_h5py(written(seed))
    assert_same(found, arrays)
    assert len(more.pop("checksum")) == 64
    assert_same(more, attributes)
    for index, name in enumerate(arrays):
        assert told[name] == {"index": index, "need_grad": learnt[name]}
        assert told[name]["need_grad"].dtype == np.bool_ and told[name]["index"].dtype == np.int64


@pytest.mark.parametrize("seed", range(12))
def test_what_is_written_is_read(seed):
    arrays, _, attributes = random_file(seed)
    content = written(seed)
    found, more = h5_files.read(io.BytesIO(content), len(content))
    assert_same(found, arrays)
    assert list(found) == list(arrays)
    assert_same(more, attributes)


@pytest.mark.parametrize("seed", range(12))
def test_what_hdf5_writes_is_read(seed):
    """Also in other types of floats, with what h5py puts beside them."""
    arrays, learnt, attributes = random_file(seed)
    kinds = ("<f4", ">f4", "<f8", ">f8", "<f2", ">f2")
    arrays = {name: value.astype(kinds[k % len(kinds)]) for k, (name, value) in enumerate(arrays.items())}
    stream = io.BytesIO()
    with h5py.File(stream, "w", track_order=False) as file:
        file.attrs.update(attributes)
        file.attrs["list"] = ["a", "b"]
        for index, (name, value) in enumerate(arrays.items()):
            file.create_dataset(name, data=value, track_times=bool(seed % 2))
            file[name].attrs["index"] = index
            file[name].attrs["need_grad"] = learnt[name]
            file[name].attrs["a note"] = "é"
    found, more = h5_files.read(stream, len(stream.getvalue()))
    assert_same(found, arrays)
    assert list(found) == list(arrays)
    assert more.pop("list") is None
    assert_same(more, attributes)


def test_hdf5_changes_what_is_written(tmp_path):
    """Its structures have the room that the library counts on."""
    arrays, _, _ = random_file(3)
    path = tmp_path / "a.h5"
    path.write_bytes(written(3))
    with h5py.File(path, "r+") as file:
        for k in range(400):
            file[f"many/more {k}"] = np.full(3, k, np.float32)
            file[f"new {k}/x"] = np.full(3, k, np.float32)
        del file["many/more 7"]
        file.attrs["text 0"] = "x" * 9000
        del file.attrs["checksum"]
    with open(path, "rb") as stream:
        found, attributes = h5_files.read(stream, path.stat().st_size)
    assert found["new 399/x"][0] == 399 and "many/more 7" not in found and attributes["text 0"] == "x" * 9000
    assert_same({name: found[name] for name in arrays}, arrays)


def test_equal_contents_have_equal_bytes():
    assert written(5) == written(5) != written(6)
