"""The manifest: what goes in comes out, and every fault is named by its field."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import contract
from model.contract import Architecture, DataSource, EventRules, Manifest, ManifestError, Metrics, Parity, SelfTest, StreamReport, decode

ROOT = Path(__file__).parents[2]


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "contract": contract.CONTRACT_VERSION,
        "model": "waves",
        "task": "classification",
        "frame_shape": (2, 3),
        "units": "metres",
        "layout": None,
        "joints": (),
        "axes": "",
        "fps": 30.0,
        "classes": ("rest", "wäve"),
        "missing": True,
        "state_width": 7,
        "chunk": 4,
        "stream": StreamReport(verified_frames=100, horizon=30, accuracy_first=0.9, accuracy_last=0.8),
        "architecture": Architecture(kind="plain", layers=1, units=4, parameters=20),
        "data": DataSource(name="none", terms="public domain", citation=""),
        "metrics": Metrics(protocol="none", values={"accuracy": 0.5}),
        "parity": Parity(scores_abs=0.0, state_rel=0.0, chunked_abs=0.0, batched_abs=0.0, clips=3),
        "self_test": SelfTest(frames=[[[0.0, None, 1.0], [0.0, 0.0, 0.0]]], scores=[[0.25, 0.75]]),
        "fingerprint": "ab" * 32,
        "made_by": "tests",
    }
    return Manifest(**values | changes)


RULES = EventRules(nothing="rest", enter=0.6, leave=0.4, least=5, gap=3)


@pytest.mark.parametrize("stream", [None, manifest().stream])
@pytest.mark.parametrize("events", [None, RULES, dataclasses.replace(RULES, nothing=None)])
def test_what_goes_in_comes_out(stream: StreamReport | None, events: EventRules | None) -> None:
    before = manifest(stream=stream, events=events)
    assert Manifest.from_json(before.to_json()) == before


def test_files_from_before_there_were_events_are_read() -> None:
    value = manifest().to_dict()
    del value["events"]
    assert Manifest.from_json(json.dumps(value)) == manifest()


def test_summary_leaves_the_numbers_of_the_self_test_out() -> None:
    assert set(manifest().to_dict()) - set(manifest().summary()) == {"self_test"}


def test_non_finite_numbers_never_get_into_a_file() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifest(metrics=Metrics(protocol="", values={"accuracy": math.nan})).to_json()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Manifest) if field.name != "events"])
def test_a_missing_field_is_named(name: str) -> None:
    value = manifest().to_dict()
    del value[name]
    with pytest.raises(ManifestError, match=f"field '{name}' is missing"):
        Manifest.from_json(json.dumps(value))


def _changed(where: str, new: Any) -> str:
    value = json.loads(manifest().to_json())
    *path, last = where.split(".")
    inner = value
    for part in path:
        inner = inner[part]
    inner[last] = new
    return json.dumps(value)


@pytest.mark.parametrize("where", ["surplus", "stream.surplus", "self_test.surplus", "data.surplus"])
def test_an_unknown_field_is_named(where: str) -> None:
    with pytest.raises(ManifestError, match=r"unknown field 'surplus'"):
        Manifest.from_json(_changed(where, 1))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("model", 3),
        ("model", None),
        ("task", "poetry"),
        ("task", ["classification"]),
        ("frame_shape", "2"),
        ("frame_shape", [2, "3"]),
        ("frame_shape", [2, 3.0]),
        ("fps", "30"),
        ("fps", True),
        ("fps", 10**400),
        ("classes", {"a": 1}),
        ("classes", ["a", None]),
        ("missing", 1),
        ("missing", "false"),
        ("state_width", 7.0),
        ("state_width", True),
        ("stream", []),
        ("stream.horizon", "30"),
        ("parity", None),
        ("metrics.values", [1]),
        ("metrics.values", {"accuracy": "good"}),
        ("self_test.scores", [0.5]),
        ("layout", 5),
    ],
)
def test_a_field_of_another_type_is_named(where: str, value: Any) -> None:
    with pytest.raises(ManifestError, match=rf"^manifest\.{where}"):
        Manifest.from_json(_changed(where, value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contract": 2}, "contract version 2, this program reads 1"),
        ({"model": "../up"}, "model name '../up'"),
        ({"model": ""}, "model name ''"),
        ({"model": "a" * 129}, "model name"),
        ({"frame_shape": ()}, "frame_shape"),
        ({"frame_shape": (0, 3)}, "frame_shape"),
        ({"state_width": 0}, "state_width"),
        ({"chunk": 0}, "chunk"),
        ({"fps": 0.0}, "fps"),
        ({"fps": math.inf}, "fps"),
        ({"fps": math.nan}, "fps"),
        ({"classes": ()}, "classes"),
        ({"classes": ("a", "a")}, "classes"),
        ({"layout": "body-13"}, "0 joint names"),
        ({"fingerprint": "AB" * 32}, "fingerprint"),
        ({"fingerprint": "ab" * 31}, "fingerprint"),
        ({"self_test": SelfTest(frames=[], scores=[])}, "self_test"),
        ({"self_test": SelfTest(frames=[[0.0]], scores=[[0.5, 0.5], [0.5, 0.5]])}, "self_test"),
        ({"self_test": SelfTest(frames=[[0.0]], scores=[[0.5]])}, "self_test.scores"),
    ],
)
def test_fields_that_make_no_sense_are_refused_both_ways(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        manifest(**changes)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"nothing": "idle"}, "events.nothing 'idle' is none of the classes"),
        ({"enter": 1.5}, "events.enter 1.5 must be above 0 and at most 1"),
        ({"enter": 0}, "events.enter 0.0 must be"),
        ({"enter": "0.5"}, "manifest.events.enter: expected float, got '0.5'"),
        ({"leave": 0.7}, "events.leave 0.7 must be above 0 and at most events.enter, 0.6"),
        ({"leave": -1}, "events.leave -1.0"),
        ({"least": 0}, "events.least 0 must be at least 1"),
        ({"least": 2.5}, "manifest.events.least: expected int, got 2.5"),
        ({"gap": 0}, "events.gap 0 must be at least 1"),
        ({"gaps": 3}, "manifest.events: unknown field 'gaps'"),
    ],
)
def test_rules_of_events_that_make_no_sense_are_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(message)):
        Manifest.from_json(_changed("events", {**dataclasses.asdict(RULES), **rules}))


def test_rules_of_events_need_classes_to_start() -> None:
    with pytest.raises(ManifestError, match="a model whose task is regression has none"):
        manifest(task="regression", events=RULES)
    with pytest.raises(ManifestError, match="there is no class but 'rest'"):
        manifest(classes=("rest",), events=RULES, self_test=SelfTest(frames=[[0.0]], scores=[[1.0]]))
    with pytest.raises(ManifestError, match=r"manifest\.events: field 'gap' is missing"):
        Manifest.from_json(_changed("events", {"nothing": None, "enter": 0.6, "leave": 0.4, "least": 5}))


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", '"x"', "[" * 100_000])
def test_what_is_no_manifest_at_all_is_refused(text: str) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(text)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(name=st.sampled_from([field.name for field in dataclasses.fields(Manifest)]), value=_JSON)
def test_any_value_in_any_field_is_read_or_refused(name: str, value: Any) -> None:
    """Nothing but `ManifestError` ever comes out of a strange file."""
    try:
        read = Manifest.from_json(_changed(name, value))
    except ManifestError:
        return
    assert read.model


def test_integers_serve_where_floats_are_wanted() -> None:
    assert decode([1, 2.5], tuple[float, ...], "x") == (1.0, 2.5)


def test_a_stream_declines_only_beyond_chance() -> None:
    report = StreamReport(verified_frames=1, horizon=0, accuracy_first=0.9, accuracy_last=0.85, ci95=0.06)
    assert not report.declines
    assert dataclasses.replace(report, ci95=0.04).declines
    assert not dataclasses.replace(report, accuracy_last=0.895, ci95=0.0).declines  # a hundredth is nothing


def test_needs_the_standard_library_alone() -> None:
    """The service imports these two; torch and numpy stay out."""
    program = "import sys, model.contract, model.skeletons; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'onnx')))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)
