"""Named joint layouts of cameras and pose estimators, their bones and axes, and the maps between them. Standard library only.

Every layout states how its axes turn into the common frame that models are trained in, the Kinect's camera frame:
x to the sensor's left (a person facing the sensor has the left hand at smaller x), y up, z away from the sensor, metres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COMMON_AXES = "x to the sensor's left, y up, z away from the sensor"


class UnknownLayout(ValueError):
    """No layout of this name, or no way from one layout to another; the message says what there is."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A skeleton as one device or estimator delivers it: joint names in order, the parent of each, axis signs.

    `parents[j]` is the index of joint j's parent, -1 for a root. `signs` turns a coordinate triple into the common frame by
    multiplication; layouts whose sensors deliver pixels have no such frame and say so with `dimensions=2`.
    """

    name: str
    title: str
    joints: tuple[str, ...]
    parents: tuple[int, ...]
    signs: tuple[int, ...] = (1, 1, 1)

    def __post_init__(self) -> None:
        if len(self.joints) != len(self.parents) or len(set(self.joints)) != len(self.joints):
            raise ValueError(f"layout {self.name}: joints and parents do not fit together")

    @property
    def dimensions(self) -> int:
        return len(self.signs)

    @property
    def bones(self) -> tuple[tuple[int, int], ...]:
        """(child, parent) index pairs."""
        return tuple((child, parent) for child, parent in enumerate(self.parents) if parent >= 0)

    def index(self, joint: str) -> int:
        return self.joints.index(joint)


@dataclass(frozen=True, slots=True)
class Mapping:
    """How frames of one layout become frames of another: joint j of the target is the mean of `sources[j]`, times `signs`."""

    source: Layout
    target: Layout
    sources: tuple[tuple[int, ...], ...]
    signs: tuple[int, ...]


def _tree(text: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Reads "joint:parent joint:parent ..."; a root has no parent."""
    pairs = [word.partition(":")[::2] for word in text.split()]
    names = tuple(name for name, _ in pairs)
    return names, tuple(names.index(parent) if parent else -1 for _, parent in pairs)


# One vocabulary for all layouts: a joint that means the same has the same name everywhere.
_BODY_13 = """head left_shoulder:head left_elbow:left_shoulder left_wrist:left_elbow right_shoulder:head right_elbow:right_shoulder
right_wrist:right_elbow left_hip:left_shoulder left_knee:left_hip left_ankle:left_knee right_hip:right_shoulder right_knee:right_hip right_ankle:right_knee"""

_KINECT_V1 = """pelvis spine:pelvis shoulder_center:spine head:shoulder_center left_shoulder:shoulder_center left_elbow:left_shoulder
left_wrist:left_elbow left_hand:left_wrist right_shoulder:shoulder_center right_elbow:right_shoulder right_wrist:right_elbow
right_hand:right_wrist left_hip:pelvis left_knee:left_hip left_ankle:left_knee left_foot:left_ankle right_hip:pelvis
right_knee:right_hip right_ankle:right_knee right_foot:right_ankle"""

_KINECT_V2 = """pelvis spine:pelvis neck:shoulder_center head:neck left_shoulder:shoulder_center left_elbow:left_shoulder left_wrist:left_elbow
left_hand:left_wrist right_shoulder:shoulder_center right_elbow:right_shoulder right_wrist:right_elbow right_hand:right_wrist
left_hip:pelvis left_knee:left_hip left_ankle:left_knee left_foot:left_ankle right_hip:pelvis right_knee:right_hip
right_ankle:right_knee right_foot:right_ankle shoulder_center:spine left_hand_tip:left_hand left_thumb:left_wrist
right_hand_tip:right_hand right_thumb:right_wrist"""

_UI_PRMD = """pelvis spine:pelvis shoulder_center:spine neck:shoulder_center head_base:neck head_top:head_base left_collar:shoulder_center
left_shoulder:left_collar left_elbow:left_shoulder left_wrist:left_elbow right_collar:shoulder_center right_shoulder:right_collar
right_elbow:right_shoulder right_wrist:right_elbow left_hip:pelvis left_knee:left_hip left_ankle:left_knee left_foot:left_ankle
right_hip:pelvis right_knee:right_hip right_ankle:right_knee right_foot:right_ankle"""

_COCO_17 = """nose left_eye:nose right_eye:nose left_ear:left_eye right_ear:right_eye left_shoulder:nose right_shoulder:nose
left_elbow:left_shoulder right_elbow:right_shoulder left_wrist:left_elbow right_wrist:right_elbow left_hip:left_shoulder
right_hip:right_shoulder left_knee:left_hip right_knee:right_hip left_ankle:left_knee right_ankle:right_knee"""

_OPENPOSE_18 = """nose:neck neck right_shoulder:neck right_elbow:right_shoulder right_wrist:right_elbow left_shoulder:neck
left_elbow:left_shoulder left_wrist:left_elbow right_hip:neck right_knee:right_hip right_ankle:right_knee left_hip:neck
left_knee:left_hip left_ankle:left_knee right_eye:nose left_eye:nose right_ear:right_eye left_ear:left_eye"""

_OPENPOSE_25 = """nose:neck neck:pelvis right_shoulder:neck right_elbow:right_shoulder right_wrist:right_elbow left_shoulder:neck
left_elbow:left_shoulder left_wrist:left_elbow pelvis right_hip:pelvis right_knee:right_hip right_ankle:right_knee left_hip:pelvis
left_knee:left_hip left_ankle:left_knee right_eye:nose left_eye:nose right_ear:right_eye left_ear:left_eye left_foot:left_ankle
left_small_toe:left_foot left_heel:left_ankle right_foot:right_ankle right_small_toe:right_foot right_heel:right_ankle"""

_MEDIAPIPE_33 = """nose left_eye_inner:nose left_eye:left_eye_inner left_eye_outer:left_eye right_eye_inner:nose right_eye:right_eye_inner
right_eye_outer:right_eye left_ear:left_eye_outer right_ear:right_eye_outer mouth_left:nose mouth_right:nose left_shoulder:nose
right_shoulder:nose left_elbow:left_shoulder right_elbow:right_shoulder left_wrist:left_elbow right_wrist:right_elbow
left_pinky:left_wrist right_pinky:right_wrist left_index:left_wrist right_index:right_wrist left_thumb:left_wrist
right_thumb:right_wrist left_hip:left_shoulder right_hip:right_shoulder left_knee:left_hip right_knee:right_hip left_ankle:left_knee
right_ankle:right_knee left_heel:left_ankle right_heel:right_ankle left_foot:left_ankle right_foot:right_ankle"""

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("body-13", "head and limbs, what all 3-D layouts share", *_tree(_BODY_13)),
        Layout("kinect-v1", "Kinect v1, 20 joints (NW-UCLA, UTKinect)", *_tree(_KINECT_V1)),
        Layout("kinect-v2", "Kinect v2, 25 joints (NTU RGB+D)", *_tree(_KINECT_V2)),
        Layout("ui-prmd", "UI-PRMD as published, 22 joints, z negative away from the camera", *_tree(_UI_PRMD), signs=(-1, 1, -1)),
        Layout("mediapipe-33", "MediaPipe Pose world landmarks, 33 joints, metres, y down", *_tree(_MEDIAPIPE_33), signs=(-1, -1, 1)),
        Layout("coco-17", "COCO key points, 17 joints, pixels", *_tree(_COCO_17), signs=(1, 1)),
        Layout("openpose-18", "OpenPose COCO output, 18 joints, pixels", *_tree(_OPENPOSE_18), signs=(1, 1)),
        Layout("openpose-25", "OpenPose BODY_25, 25 joints, pixels", *_tree(_OPENPOSE_25), signs=(1, 1)),
    )
}

# Joints a layout may lack, made from others it has: the first line whose joints are all there is taken.
_DERIVED: dict[str, tuple[tuple[str, ...], ...]] = {
    "head": (("head_base", "head_top"), ("left_ear", "right_ear"), ("nose",)),
    "pelvis": (("left_hip", "right_hip"),),
    "shoulder_center": (("left_shoulder", "right_shoulder"),),
    "neck": (("shoulder_center",), ("left_shoulder", "right_shoulder")),
    "spine": (("pelvis", "shoulder_center"), ("left_hip", "right_hip", "left_shoulder", "right_shoulder")),
}


def layout(name: str) -> Layout:
    """The layout of this name; raises `UnknownLayout` with the list of names."""
    try:
        return LAYOUTS[name]
    except KeyError:
        raise UnknownLayout(f"unknown layout {name!r}; known: {', '.join(LAYOUTS)}") from None


def mapping(source: str, target: str) -> Mapping:
    """The map that turns frames (T, joints of `source`, 3) into frames (T, joints of `target`, 3).

    Raises `UnknownLayout` when a name is unknown, when dimensions differ, or when a joint can be neither found nor derived.
    """
    have, want = layout(source), layout(target)
    if have.dimensions != want.dimensions:
        raise UnknownLayout(f"{source} has {have.dimensions} coordinates a joint, {target} has {want.dimensions}")
    sources = tuple(_find(joint, have, target) for joint in want.joints)
    return Mapping(have, want, sources, tuple(a * b for a, b in zip(have.signs, want.signs, strict=True)))


def reachable(target: str) -> tuple[str, ...]:
    """Names of the layouts whose frames can be mapped onto `target`."""
    names = []
    for name in LAYOUTS:
        try:
            mapping(name, target)
        except UnknownLayout:
            continue
        names.append(name)
    return tuple(names)


def _find(joint: str, have: Layout, target: str) -> tuple[int, ...]:
    candidates: Sequence[tuple[str, ...]] = ((joint,), *_DERIVED.get(joint, ()))
    for names in candidates:
        if all(name in have.joints for name in names):
            return tuple(have.index(name) for name in names)
    raise UnknownLayout(f"{have.name} has no {joint}, which {target} needs")
