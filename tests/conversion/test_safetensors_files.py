import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from t5x_domain.conversion.safetensors_files import (
    INDEX,
    SINGLE,
    open_file,
    open_folder,
    write_file,
    write_folder,
)
from t5x_domain.conversion.tensors import Tensor
from t5x_domain.errors import UserError

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(d) for d in ("f8", "f4", "f2", "i8", "i4", "?")] + [BF16]


@st.composite
def arrays(draw):
    """Any bits of any dtype, nan among them."""
    shape, dtype = draw(nps.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)), draw(st.sampled_from(DTYPES))
    size = int(np.prod(shape))
    if dtype.kind == "b":
        return draw(nps.arrays(bool, shape))
    return np.frombuffer(
        draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize)), dtype
    ).reshape(shape)


def equal_bits(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
files = st.dictionaries(names, arrays(), max_size=4)


def as_tensors(arrays):
    return {name: Tensor.of(array) for name, array in arrays.items()}


def of_library(path):
    """What the safetensors library reads: {name: (dtype, shape, bytes)}; it has no bfloat16 for NumPy."""
    content = dict(safetensors.deserialize(path.read_bytes()))
    return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in content.items()}


LIBRARY_DTYPES = dict(zip(DTYPES, ("F64", "F32", "F16", "I64", "I32", "BOOL", "BF16"), strict=True))


@given(files)
@settings(max_examples=60, deadline=None)
def test_written_as_the_library_reads(tmp_path_factory, arrays):
    path = tmp_path_factory.mktemp("f") / SINGLE
    write_file(path, as_tensors(arrays))
    expected = {name: (LIBRARY_DTYPES[a.dtype], a.shape, a.tobytes()) for name, a in arrays.items()}
    assert of_library(path) == expected
    assert list(open_file(path)) == list(arrays)
    for name, tensor in open_file(path).items():
        equal_bits(tensor.read(), arrays[name])


@given(files)
@settings(max_examples=60, deadline=None)
def test_read_as_the_library_writes(tmp_path_factory, arrays):
    path = tmp_path_factory.mktemp("f") / SINGLE
    arrays = {name: array for name, array in arrays.items() if array.dtype != BF16}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt", "other": "ü"})
    tensors = open_file(path)
    assert tensors.keys() == arrays.keys()
    for name, tensor in tensors.items():
        equal_bits(tensor.read(), arrays[name])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_parts(tmp_path_factory, data):
    """Of the second tensor of a file, all of its numbers different, so that a wrong offset is seen."""
    path = tmp_path_factory.mktemp("f") / SINGLE
    first, like = data.draw(arrays()), data.draw(arrays())
    array = np.arange(like.size).astype(like.dtype).reshape(like.shape)
    write_file(path, as_tensors({"first": first, "second": array}))
    index = []
    for size in array.shape[: data.draw(st.integers(0, array.ndim))]:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    equal_bits(open_file(path)["second"].read(tuple(index)), array[tuple(index)])


def test_only_the_rows_asked_for_are_read(tmp_path, monkeypatch):
    array = np.arange(12.0).reshape(6, 2)
    write_file(tmp_path / SINGLE, as_tensors({"a": array}))
    counts, empty = [], np.empty  # what is read is read into such an array
    monkeypatch.setattr(np, "empty", lambda count, dtype: counts.append(count) or empty(count, dtype))
    np.testing.assert_array_equal(open_file(tmp_path / SINGLE)["a"].read((slice(2, 5), slice(0, 1))), array[2:5, :1])
    assert counts == [3 * 2]


def test_transformers_is_told_that_matrices_stand_as_in_torch(tmp_path):
    write_file(tmp_path / SINGLE, as_tensors({"a": np.zeros(2, np.float32)}))
    with safetensors.safe_open(tmp_path / SINGLE, "np") as file:
        assert file.metadata() == {"format": "pt"}


ARRAYS = {f"layer.{i}": np.full((3, i + 1), i, np.float32) for i in range(6)}  # of 12, 24, 36, 48, 60, 72 bytes


@pytest.mark.parametrize(
    "max_bytes, sizes", [(1, [1, 1, 1, 1, 1, 1]), (72, [3, 1, 1, 1]), (108, [3, 2, 1]), (252, [6]), (251, [5, 1])]
)
def test_shards(tmp_path, max_bytes, sizes):
    """As many tensors in a shard as fit (12 + 24 + 36 = 72, 48 + 60 = 108, all: 252); a larger one has its own."""
    write_folder(tmp_path, as_tensors(ARRAYS), max_shard_bytes=max_bytes)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if len(sizes) == 1:
        assert files == [SINGLE] and not (tmp_path / INDEX).exists()
    else:
        count = len(sizes)
        assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == 252
        in_file = {name: file for file in files for name in safetensors.numpy.load_file(tmp_path / file)}
        assert index["weight_map"] == in_file
    assert [len(safetensors.numpy.load_file(tmp_path / file)) for file in files] == sizes
    found = open_folder(tmp_path)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        equal_bits(found[name].read(), array)


def test_one_tensor_in_memory_at_a_time(tmp_path):
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= self.base is None

    def read(index):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return Counted((100,), np.float32)

    write_folder(tmp_path, {str(i): Tensor((100,), np.dtype(np.float32), read) for i in range(5)})
    assert most == 1


def test_a_dtype_that_the_format_has_not(tmp_path):
    with pytest.raises(UserError, match="scores: safetensors files hold no complex64; convert with --dtype=float32"):
        write_folder(tmp_path, {"scores": Tensor.of(np.zeros(3, np.complex64))})
    assert not any(tmp_path.iterdir())


def a_file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def an_entry(dtype="F32", shape=(2,), start=0, stop=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


SOUND = a_file({"a": an_entry(), "b": an_entry(start=8, stop=16)}, bytes(16))
DAMAGED = {
    "empty": b"",
    "half of the length": SOUND[:4],
    "nothing after the length": SOUND[:8],
    "half of the header": SOUND[:30],
    "no data": SOUND[:-16],
    "one byte too few": SOUND[:-1],
    "one byte too many": SOUND + b"\0",
    "absurd length": a_file({"a": an_entry()}, bytes(8), length=2**63),
    "length beyond the end": a_file({"a": an_entry()}, bytes(8), length=2**40),
    "length of the whole file": struct.pack("<Q", len(SOUND)) + SOUND[8:],
    "not JSON": a_file(b"{'a': 1}"),
    "not UTF-8": a_file(b'{"\xff": 1}'),
    "a list": a_file([1, 2]),
    "a number": a_file(7),
    "an entry that is none": a_file({"a": 3}),
    "no dtype": a_file({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "no offsets": a_file({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "three offsets": a_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)),
    "a dtype that is no text": a_file({"a": an_entry(["F32"])}, bytes(8)),
    "shape and offsets disagree": a_file({"a": an_entry(shape=(3,))}, bytes(8)),
    "negative shape": a_file({"a": an_entry(shape=(-1, -2))}, bytes(8)),
    "broken shape": a_file({"a": an_entry(shape=(2.0,))}, bytes(8)),
    "broken offsets": a_file({"a": an_entry(start=0.0, stop=8.0)}, bytes(8)),
    "negative offsets": a_file({"a": an_entry(start=-8, stop=0)}),
    "offsets turned round": a_file({"a": an_entry(start=8, stop=0)}, bytes(8)),
    "overlapping": a_file({"a": an_entry(), "b": an_entry(start=4, stop=12)}, bytes(12)),
    "the same bytes twice": a_file({"a": an_entry(), "b": an_entry()}, bytes(8)),
    "a gap": a_file({"a": an_entry(), "b": an_entry(start=12, stop=20)}, bytes(20)),
    "a gap at the beginning": a_file({"a": an_entry(start=8, stop=16)}, bytes(16)),
    "beyond the end": a_file({"a": an_entry(start=8, stop=16)}, bytes(8)),
    "a page of a web site": b"<!DOCTYPE html><html><head><title>Not found</title></head></html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_said(tmp_path, damage):
    path = tmp_path / SINGLE
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(safetensors.SafetensorError):  # or else the damage is none
        safetensors.deserialize(DAMAGED[damage])
    with pytest.raises(UserError) as error:
        open_folder(tmp_path)
    assert str(path) in str(error.value)
    assert "copy it anew" in str(error.value)


@given(st.integers(0, len(SOUND) - 1))
def test_cut_off_anywhere(tmp_path_factory, length):
    path = tmp_path_factory.mktemp("cut") / SINGLE
    path.write_bytes(SOUND[:length])
    with pytest.raises(UserError, match=SINGLE):
        open_file(path)


@given(st.binary(max_size=60), st.booleans())
@settings(deadline=None)
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, with_length):
    path = tmp_path_factory.mktemp("any") / SINGLE
    path.write_bytes(struct.pack("<Q", len(content)) + content if with_length else content)
    try:
        open_file(path)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / SINGLE
    path.write_bytes(SOUND)
    tensor = open_file(path)["b"]
    path.write_bytes(SOUND[:-1])
    with pytest.raises(UserError, match=f"{path}: became shorter"):
        tensor.read()


def test_a_dtype_that_is_not_read_is_named(tmp_path):
    (tmp_path / SINGLE).write_bytes(a_file({"w": an_entry("F8_E4M3", (8,))}, bytes(8)))
    with pytest.raises(UserError, match=rf"{SINGLE}: w is of dtype F8_E4M3, which is not converted"):
        open_folder(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    write_folder(tmp_path, as_tensors(ARRAYS), max_shard_bytes=72)
    return tmp_path


def test_a_missing_shard(sharded):
    (sharded / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00004.safetensors: cannot be read \(No such file"):
        open_folder(sharded)


def test_a_cut_off_shard(sharded):
    path = sharded / "model-00003-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="model-00003-of-00004.safetensors: cut off"):
        open_folder(sharded)


def test_a_tensor_that_only_the_index_has(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["layer.9"] = "model-00001-of-00004.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{INDEX}: names tensors that no file has: layer.9"):
        open_folder(sharded)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", "3", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}']
)
def test_an_index_that_is_none(sharded, content):
    (sharded / INDEX).write_text(content)
    with pytest.raises(UserError, match=f"{INDEX}: not an index"):
        open_folder(sharded)


def test_a_whole_file_comes_before_an_index(sharded):
    """As in transformers, should a folder hold both."""
    write_file(sharded / SINGLE, as_tensors({"new": np.zeros(1, np.float32)}))
    assert list(open_folder(sharded)) == ["new"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tf_model.h5", "pytorch_model-00001-of-00002.bin"])
def test_other_formats_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"only {name}: save the model as safetensors"):
        open_folder(tmp_path)


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match=f"has neither {SINGLE} nor {INDEX}.$"):
        open_folder(tmp_path)
