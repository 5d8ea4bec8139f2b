"""Layouts are trees with two sides; mappings take joints where they are found."""

import pytest

from model.skeletons import LAYOUTS, Layout, UnknownLayout, layout, mapping, reachable

NAMES = list(LAYOUTS)
SPATIAL = [name for name in NAMES if LAYOUTS[name].dimensions == 3]


@pytest.mark.parametrize("name", NAMES)
def test_bones_make_trees(name: str) -> None:
    parents = LAYOUTS[name].parents
    assert parents.count(-1) >= 1
    for joint in range(len(parents)):
        seen = set()
        while joint >= 0:
            assert joint not in seen, "a circle"
            seen.add(joint)
            joint = parents[joint]


@pytest.mark.parametrize("name", NAMES)
def test_every_left_has_its_right(name: str) -> None:
    joints = set(LAYOUTS[name].joints)
    for joint in joints:
        other = "_".join({"left": "right", "right": "left"}.get(word, word) for word in joint.split("_"))
        assert other in joints


@pytest.mark.parametrize("name", NAMES)
def test_features_find_the_joints_they_need(name: str) -> None:
    for joint in ("left_hip", "right_hip", "left_shoulder", "right_shoulder"):
        assert LAYOUTS[name].joints[LAYOUTS[name].index(joint)] == joint


@pytest.mark.parametrize(
    ("name", "joints"),
    [("body-13", 13), ("kinect-v1", 20), ("kinect-v2", 25), ("ui-prmd", 22), ("mediapipe-33", 33), ("coco-17", 17), ("openpose-18", 18), ("openpose-25", 25)],
)
def test_has_as_many_joints_as_published(name: str, joints: int) -> None:
    assert len(layout(name).joints) == joints


@pytest.mark.parametrize(
    ("name", "index", "joint"),
    [
        ("kinect-v2", 20, "shoulder_center"),
        ("kinect-v2", 3, "head"),
        ("mediapipe-33", 11, "left_shoulder"),
        ("mediapipe-33", 28, "right_ankle"),
        ("coco-17", 16, "right_ankle"),
        ("openpose-25", 8, "pelvis"),
        ("openpose-25", 24, "right_heel"),
        ("openpose-18", 1, "neck"),
    ],
)
def test_joints_stand_where_the_estimators_put_them(name: str, index: int, joint: str) -> None:
    assert layout(name).joints[index] == joint


@pytest.mark.parametrize("name", NAMES)
def test_onto_itself_nothing_changes(name: str) -> None:
    itself = mapping(name, name)
    assert itself.sources == tuple((j,) for j in range(len(LAYOUTS[name].joints)))
    assert set(itself.signs) == {1}


@pytest.mark.parametrize("name", SPATIAL)
def test_every_spatial_layout_reaches_the_shared_one(name: str) -> None:
    assert name in reachable("body-13")
    found = mapping(name, "body-13")
    for joint, sources in zip(found.target.joints, found.sources, strict=True):
        if joint in found.source.joints:
            assert sources == (found.source.index(joint),)
        else:
            assert joint == "head"
            assert len(sources) in (1, 2)


def test_signs_turn_axes_into_the_common_frame() -> None:
    assert mapping("mediapipe-33", "body-13").signs == (-1, -1, 1)
    assert mapping("ui-prmd", "body-13").signs == (-1, 1, -1)


def test_what_cannot_be_mapped_is_said() -> None:
    with pytest.raises(UnknownLayout, match=r"unknown layout 'kinect'; known: body-13, kinect-v1"):
        layout("kinect")
    with pytest.raises(UnknownLayout, match="coco-17 has 2 coordinates a joint, body-13 has 3"):
        mapping("coco-17", "body-13")
    with pytest.raises(UnknownLayout, match="body-13 has no left_hand, which kinect-v1 needs"):
        mapping("body-13", "kinect-v1")
    assert all(LAYOUTS[name].dimensions == 2 for name in reachable("coco-17"))


def test_a_layout_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        Layout("x", "", ("a", "a"), (-1, 0))
    with pytest.raises(ValueError, match="do not fit together"):
        Layout("x", "", ("a", "b"), (-1,))


def test_bones_are_child_and_parent() -> None:
    assert Layout("x", "", ("a", "b", "c"), (-1, 0, 1)).bones == ((1, 0), (2, 1))
