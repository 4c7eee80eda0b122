import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from t5x_domain.conversion.tensors import Tensor

ARRAY = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)


@st.composite
def parts(draw, shape):
    """A slice of step 1 for each of the first axes."""
    index = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        start = draw(st.integers(0, size))
        index.append(draw(st.sampled_from([slice(None), slice(start, draw(st.integers(start, size)))])))
    return tuple(index)


shapes = nps.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_part_is_that_of_the_whole(data):
    array = data.draw(nps.arrays(np.int32, shapes, elements=st.integers(-9, 9)))
    index = data.draw(parts(array.shape))
    part = Tensor.of(array).read(index)
    np.testing.assert_array_equal(part, array[index])
    assert part.shape == array[index].shape


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_parts_of_changed_tensors(data):
    """Each change commutes with taking a part: changing the array and then slicing it gives the same."""
    array = data.draw(nps.arrays(np.int32, nps.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=4)))
    axis = data.draw(st.integers(0, 1))
    changed = {"transposed": (Tensor.of(array).transposed(), array.T)}
    changed["reshaped"] = (Tensor.of(array).reshaped((array.size, 1)), array.reshape(array.size, 1))
    changed["astype"] = (Tensor.of(array).astype(np.float32), array.astype(np.float32))
    if array.shape[axis]:
        position = data.draw(st.integers(0, array.shape[axis] - 1))
        changed["at"] = (Tensor.of(array).at(axis, position), array.take(position, axis))
    for name, (tensor, expected) in changed.items():
        index = data.draw(parts(expected.shape))
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
        np.testing.assert_array_equal(tensor.read(index), expected[index], strict=True, err_msg=name)


@pytest.mark.parametrize("axis, position", list(itertools.product((0, 1, 2), (0, 1))))
def test_one_layer_of_any_axis(axis, position):
    index = (slice(1, 2), slice(0, 2))
    layer = Tensor.of(ARRAY).at(axis, position)
    np.testing.assert_array_equal(layer.read(index), ARRAY.take(position, axis)[index])


def test_no_more_is_read_than_asked_for():
    asked = []
    tensor = Tensor(ARRAY.shape, ARRAY.dtype, lambda index: asked.append(index) or ARRAY[index])
    tensor.at(0, 1).transposed().astype(np.float64).read((slice(0, 2), slice(1, 3)))
    assert asked == [(slice(1, 2), slice(1, 3), slice(0, 2))]


def test_size_in_bytes():
    assert Tensor.of(ARRAY.astype(ml_dtypes.bfloat16)).nbytes == 2 * 3 * 4 * 2
    assert Tensor.of(np.float32(1)).nbytes == 4
    big = Tensor((70_000, 70_000), np.dtype(np.float32), lambda index: None)
    assert big.nbytes == 19_600_000_000  # beyond 32 bits


def test_a_tensor_of_its_own_dtype_is_itself():
    tensor = Tensor.of(ARRAY)
    assert tensor.astype(np.float32) is tensor


def test_bfloat16_rounds_to_even():
    """With 8 bits 1 + 2^-8 lies half-way between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between that and 1 + 2^-6."""
    array = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    rounded = Tensor.of(array).astype(ml_dtypes.bfloat16).read()
    np.testing.assert_array_equal(rounded.astype(np.float32), [1, 1 + 2**-6])
