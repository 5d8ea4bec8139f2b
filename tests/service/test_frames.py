from __future__ import annotations

import io
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import skeletons
from service.errors import Empty, LayoutUnknown, Malformed, NotFinite, ServiceError, WrongShape
from service.frames import FrameReader, _flatten
from tests import toy_models
from tests.toy_models import CHANNELS, GAPPY, GAPPY_CHANNELS, SKELETON, Toy


def reader(toy: Toy, layout: str | None = None) -> FrameReader:
    return FrameReader(toy_models.manifest_of(toy, toy_models.build(toy), "toy"), layout)


def npy(array: Any, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(array), version)
    return stream.getvalue()


def test_all_forms_give_the_same_frames() -> None:
    frames = toy_models.example_frames(SKELETON, 5)
    one = reader(SKELETON)
    for read in (
        one.from_json(frames.tolist()),
        one.from_bytes(frames.tobytes()),
        one.from_npy(npy(frames)),
        one.from_npy(npy(frames.astype(">f4"))),
        one.from_npy(npy(np.asfortranarray(frames))),
        one.from_npy(npy(frames.astype(np.float64), (2, 0))),
    ):
        assert read.dtype == np.float32
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, frames)


def test_whole_numbers_are_numbers() -> None:
    np.testing.assert_array_equal(reader(CHANNELS).from_json([[1, 2, 3], [1, 2.5, -3]]), np.array([[1, 2, 3], [1, 2.5, -3]], np.float32))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e6, -1e6, np.nextafter(np.float32(1e6), np.float32(2e6)), -1.1e6, np.inf, -np.inf, np.nan])
def test_single_and_double_precision_are_judged_alike(value: float) -> None:
    frames = np.array([[0.5, value, -2.0]], np.float32)
    legal = bool(abs(value) <= 1e6)
    for read in (lambda: reader(CHANNELS).from_bytes(frames.tobytes()), lambda: reader(CHANNELS).from_npy(npy(frames.astype(np.float64)))):
        if legal:
            np.testing.assert_array_equal(read(), frames)
        else:
            with pytest.raises(NotFinite, match="frame 0"):
                read()


def test_the_largest_legal_value_passes() -> None:
    reader(CHANNELS).from_json([[1e6, -1e6, 0]])
    with pytest.raises(NotFinite, match="frame 8"):
        reader(CHANNELS).from_json([[0, 0, 0], [1000001, 0, 0]], first=7)


@pytest.mark.parametrize(
    ("frames", "where"),
    [
        ([[0, 0, 0], [0, 0]], r"frames\[1\]: expected 3 numbers, got 2"),
        ([[0, 0, "1"]], r"frames\[0\]\[2\]: expected a number, got a string"),
        ([[0, False, 1]], r"frames\[0\]\[1\]: expected a number, got true or false"),
        ([[0, [1], 1]], r"frames\[0\]\[1\]: expected a number, got a list"),
        ([0, 0, 0], r"frames\[0\]: expected 3 numbers, got a number"),
        ("abc", "frames: expected a list of frames, got a string"),
        (None, "frames: expected a list of frames, got null"),
    ],
)
def test_the_slow_path_names_the_place(frames: Any, where: str) -> None:
    with pytest.raises(WrongShape, match=where):
        reader(CHANNELS).from_json(frames)


def test_skeleton_places() -> None:
    frames: Any = toy_models.example_frames(SKELETON, 4).tolist()
    frames[3][4] = [0, 0]
    with pytest.raises(WrongShape, match=r"frames\[3\]\[4\]: expected 3 numbers, got 2"):
        reader(SKELETON).from_json(frames)


def test_missing_joints_and_bodies() -> None:
    frames: Any = toy_models.example_frames(GAPPY, 3).tolist()
    frames[0][2] = None
    frames[1][5] = [None, None, None]
    frames[2] = None
    read = reader(GAPPY).from_json(frames)
    gone = np.isnan(read)
    assert gone.all(-1)[0].tolist() == [j == 2 for j in range(13)]
    assert gone.all(-1)[1].tolist() == [j == 5 for j in range(13)]
    assert gone[2].all()
    frames[1][5] = [None, 0, None]
    with pytest.raises(NotFinite, match="as a whole"):
        reader(GAPPY).from_json(frames)


def test_a_channel_may_be_missing_alone() -> None:
    assert np.isnan(reader(GAPPY_CHANNELS).from_json([[None, 1, 2]])).tolist() == [[True, False, False]]


def test_signalling_nan_becomes_the_one_nan() -> None:
    read = reader(GAPPY_CHANNELS).from_bytes(np.array([0x7F800001, 0xFFC12345, 0], "<u4").tobytes())
    assert read.view(np.uint32)[0, 0] == read.view(np.uint32)[0, 1] == np.float32(np.nan).view(np.uint32)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (npy(np.zeros((2, 4), np.float32)), WrongShape),
        (npy(np.zeros(3, np.float32)), WrongShape),
        (npy(np.zeros((0, 3), np.float32)), Empty),
        (npy(np.zeros((2, 3), np.complex64)), Malformed),
        (npy(np.zeros((2, 3), np.bool_)), Malformed),
        (npy(np.array([["a", "b", "c"]])), Malformed),
        (npy(np.zeros(2, [("x", "<f4")])), Malformed),
        (npy(np.zeros((2, 3), np.float32))[:-1], Malformed),
        (npy(np.zeros((2, 3), np.float32)) + b"1", Malformed),
        (npy(np.zeros((2, 3), np.float32)).replace(b"(2, 3)", b"(9**9,"), Malformed),
        (npy(np.zeros((2, 3), np.float32)).replace(b"(2, 3)", b"(-2,3)"), Malformed),
        (npy(np.zeros((1, 3), np.float32)).replace(b"(1, 3), }   ", b"(True, 3), }"), Malformed),
        (b"\x93NUMPY\x07\x00", Malformed),
        (b"", Malformed),
    ],
)
def test_npy_that_is_refused(body: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        reader(CHANNELS).from_npy(body)


def test_pickled_objects_are_refused() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{}], object), allow_pickle=True)
    with pytest.raises(Malformed, match="real numbers"):
        reader(CHANNELS).from_npy(stream.getvalue())


def test_a_header_must_fit_its_payload() -> None:
    with pytest.raises(Malformed, match="announces 2 frames, the payload holds 1"):
        reader(CHANNELS).from_bytes(b"\0" * 12, count=2)


@pytest.mark.parametrize("layout", skeletons.reachable("body-13"))
def test_layouts_are_mapped(layout: str) -> None:
    one = reader(SKELETON, layout)
    source = skeletons.layout(layout)
    assert one.shape == (len(source.joints), 3)
    frames = np.random.default_rng(1).normal(size=(4, *one.shape)).astype(np.float32)
    mapping = skeletons.mapping(layout, "body-13")
    expected = np.stack([frames[:, list(joints)].mean(axis=1) for joints in mapping.sources], axis=1) * np.array(mapping.signs)
    read = one.from_json(frames.tolist())
    np.testing.assert_allclose(read, expected, rtol=1e-6)
    np.testing.assert_array_equal(
        np.concatenate([one.from_json(frames[i : i + 1].tolist()) for i in range(4)]), read
    )  # a frame's bits do not depend on its neighbours


def test_frames_are_checked_in_the_clients_layout() -> None:
    with pytest.raises(WrongShape, match=r"frames\[0\]: expected 25 lists, got 13"):
        reader(SKELETON, "kinect-v2").from_json(toy_models.example_frames(SKELETON, 1).tolist())


@pytest.mark.parametrize(("toy", "layout"), [(SKELETON, "lego"), (SKELETON, "coco-17"), (CHANNELS, "kinect-v2")])
def test_layouts_that_lead_nowhere(toy: Toy, layout: str) -> None:
    with pytest.raises(LayoutUnknown):
        reader(toy, layout)


numbers = st.one_of(
    st.floats(allow_nan=False, width=64), st.integers(-(2**63), 2**64 - 1), st.sampled_from([0, -0.0, 1e6, 1000000.01, 999999.99, 1e-46, 5e-324])
)
others = st.one_of(st.booleans(), st.none(), st.text(max_size=3), st.lists(numbers, max_size=2), st.dictionaries(st.text(max_size=1), numbers, max_size=3))


@st.composite
def nearly_frames(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """Frames as JSON has them: right, or with one thing put where it does not belong."""
    value: Any = draw(st.lists(_nested(shape), min_size=1, max_size=3))
    at = value
    if len(shape) > 1 and shape[0] > 1 and draw(st.integers(0, 3)) == 0:
        value[-1][-1].append(value[-1][0].pop())  # as many numbers as before, in lists of other lengths
    while draw(st.booleans()) and isinstance(at, list) and at:
        i = draw(st.integers(0, len(at) - 1))
        if draw(st.integers(0, 3)) == 0:
            at[i] = draw(others)
            break
        at = at[i]
    return value


def _nested(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    usual = st.floats(-3, 3, width=32)
    element = st.one_of(usual, usual, usual, numbers) if len(shape) == 1 else _nested(shape[1:])
    return st.lists(element, min_size=shape[0], max_size=shape[0])


@pytest.mark.parametrize(
    "toy", [CHANNELS, GAPPY_CHANNELS, Toy(shape=(2, 3)), Toy(shape=(2, 2, 2)), Toy(shape=(1,))], ids=lambda toy: f"{toy.shape}{toy.missing}"
)
def test_the_fast_path_of_json_says_what_the_slow_one_says(toy: Toy) -> None:
    one = reader(toy)

    def outcome(read: Any) -> Any:
        try:
            return read().tobytes()
        except ServiceError as error:
            return type(error), error.message, error.facts

    def slowly(value: Any) -> Any:
        values = _flatten(value, (len(value), *one.shape), "frames")
        return one._checked(np.array(list(values), np.float64).reshape(-1, *one.shape), 5)

    @settings(deadline=None)
    @given(nearly_frames(toy.shape))
    def same(value: Any) -> None:
        text = orjson.dumps(value)
        value = orjson.loads(text)
        expected = outcome(lambda: slowly(value))
        assert outcome(lambda: one.from_json(value, 5)) == expected
        assert outcome(lambda: one.from_json(value, 5, literals=any(literal in text for literal in (b"true", b"false", b"null")))) == expected

    same()
