"""Configurations: strict, with faults named by key; `--set` on top; every shipped file reads."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.training.synthetic import settings, write_config
from training.config import Config, ConfigError, StreamConfig, from_dict, load, override

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


def test_there_are_shipped_configurations() -> None:
    assert len(list(CONFIGS.glob("*.toml"))) >= 2


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_reads_and_is_named_like_its_file(path: Path) -> None:
    config = load(path)
    assert config.name == path.stem
    assert load(path, ["final=true"]).final
    assert from_dict(tomllib.loads(tomli_w.dumps(config.to_dict()))) == config  # what a run folder keeps


def test_what_is_left_out_has_defaults() -> None:
    config = from_dict({"name": "x", "final": True, "data": {"reader": "nw_ucla"}})
    assert config.data.test == {"split": ["test"]}
    assert config.model.kind == "residual"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("surplus", 1, "config: unknown field 'surplus'"),
        ("model.depth", 4, "config.model: unknown field 'depth'"),
        ("train.lr", 0.1, "config.train: unknown field 'lr'"),
        ("data.extra", {}, "config.data: unknown field 'extra'"),
        ("name", 5, "config.name: expected str"),
        ("final", "yes", "config.final: expected bool"),
        ("model", [], "config.model: expected an object"),
        ("model.layers", 2.0, "config.model.layers: expected int"),
        ("model.layers", True, "config.model.layers: expected int"),
        ("model.kind", "deep", "config.model.kind: 'deep' is none of"),
        ("train.epochs", "4", "config.train.epochs: expected int"),
        ("train.ema", "0.9", "config.train.ema: expected float"),
        ("augment.mirror", 1, "config.augment.mirror: expected bool"),
        ("data.test", {"split": "test"}, "config.data.test.split: expected a list"),
        ("data.validation", {"subject": [1]}, r"config.data.validation.subject\[0\]: expected str"),
        ("model.layers", 0, "model: layers must be at least 1"),
        ("model.dropout", 1.0, "dropout rates"),
        ("name", "../up", "name '../up' must match"),
        ("name", "", "name '' must match"),
        ("name", "two words", "name 'two words' must match"),
        ("seed", -1, "seed must not be negative"),
        ("train.epochs", 0, "epochs, batch and max_frames must be at least 1"),
        ("train.batch", 0, "epochs, batch and max_frames must be at least 1"),
        ("train.learning_rate", 0.0, "train.learning_rate must be positive"),
        ("train.learning_rate", float("inf"), "train.learning_rate must be a finite number"),
        ("train.learning_rate", float("nan"), "train.learning_rate must be a finite number"),
        ("train.weight_decay", -0.1, "train.weight_decay must be a finite number, not negative"),
        ("train.clip_gradient", 0.0, "train.clip_gradient must be positive"),
        ("train.warm_up", 1.0, "train.warm_up"),
        ("train.early", 1.5, "train.early"),
        ("train.ema", 1.0, "train.ema"),
        ("train.label_smoothing", 1.0, "train.label_smoothing"),
        ("train.threads", -1, "train.threads"),
        ("augment.speed", 0.5, "augment.speed must be at least 1"),
        ("augment.amplitude", 0.5, "augment.amplitude must be at least 1"),
        ("augment.noise", -1.0, "augment.noise"),
        ("augment.rotate", float("nan"), "augment.rotate"),
        ("augment.scale", 1.0, "augment.scale"),
        ("augment.cut_start", 1.1, "at most 1"),
        ("augment.drop_joints", 0.1, "set model.missing = true"),
        ("export.chunk", 0, "export.chunk"),
        ("train.optimizer", "sgd", "config.train.optimizer: 'sgd' is none of"),
        ("train.schedule", "step", "config.train.schedule: 'step' is none of"),
        ("train.precision", "int8", "config.train.precision: 'int8' is none of"),
        ("train.device", "tpu", "config.train.device: 'tpu' is none of"),
        ("train.class_weights", "rare", "config.train.class_weights: 'rare' is none of"),
        ("train.plateau_factor", 1.0, "train.plateau_factor must be between 0 and 1"),
        ("train.early_stop", -1, "train.early_stop"),
        ("data.validation_share", 0.2, "each say what to hold out: give one of them"),
        ("data.validation_share", 1.0, "data.validation_share must be in"),
        ("data.folds", 3, "each say what to hold out: give one of them"),
        ("data.folds", 1, "data.folds must be at least 2"),
        ("data.fold", 1, "data.fold must be in 0..0"),
        ("data.validation", {}, "data.validation is empty"),
    ],
)
def test_faults_are_named_by_key(key: str, value: Any, message: str) -> None:
    config: dict[str, Any] = settings(export={})
    *sections, last = key.split(".")
    inner = config
    for section in sections:
        inner = inner[section]
    inner[last] = value
    if (key, value) == ("data.validation", {}):
        inner[last] = {}
    with pytest.raises(ConfigError, match=message):
        from_dict(config)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"surplus": 1}, "config.streams: unknown field 'surplus'"),
        ({"steps": 0}, "streams.steps and frames must be at least 1"),
        ({"frames": 0}, "streams.steps and frames must be at least 1"),
        ({"stay": [6]}, "streams.stay must be two whole numbers of at least 1"),
        ({"stay": [0, 6]}, "streams.stay must be two whole numbers of at least 1"),
        ({"stay": [6, 5]}, "streams.stay goes from the lower to the higher number"),
        ({"blend": [20, 10]}, "streams.blend goes from the lower to the higher number"),
        ({"validation": [0, 10]}, "streams.validation must be two whole numbers of at least 1"),
        ({"cuts": 1.1}, "shares: at most 1"),
        ({"pauses": -0.1}, "streams.pauses must be a finite number, not negative"),
        ({"nothing_weight": float("nan")}, "streams.nothing_weight must be a finite number"),
        ({"idle": -1}, "streams.idle must not be negative"),
        ({"least_pause": -1}, "streams.least_pause must not be negative"),
        ({"action_frames": -1}, "streams.action_frames must not be negative"),
        ({"dropped": 1.0}, "streams.dropped must be in"),
        ({"together": ["view", "view"]}, "streams.together names a group twice"),
        ({"together": "view"}, "config.streams.together: expected a list"),
    ],
)
def test_faults_of_streams_are_named_by_key(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(settings(streams=section))


@pytest.mark.parametrize("head", ["last", "tokens"])
def test_streams_teach_every_step(head: str) -> None:
    with pytest.raises(ConfigError, match=f"streams teach every step, and model.head is '{head}'"):
        from_dict(settings(streams={}, model={"head": head}))
    assert from_dict(settings(model={"head": head})).streams is None


def test_streams_are_absent_or_there_and_come_back_as_they_were(tmp_path: Path) -> None:
    assert "streams" not in from_dict(settings()).to_dict()
    for section in ({}, {"together": ["subject", "view"], "stay": [2, 3], "nothing": ""}):
        config = from_dict(settings(streams=section))
        assert config.streams is not None
        assert from_dict(tomllib.loads(tomli_w.dumps(config.to_dict()))) == config
    assert load(write_config(tmp_path / "c.toml"), ["streams.cuts=0.5"]).streams == StreamConfig(cuts=0.5)


@pytest.mark.parametrize("section", [{"schedule": "plateau"}, {"early_stop": 3}])
def test_a_final_run_cannot_go_by_a_validation_part(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"train.{next(iter(section))}.* goes by the validation part"):
        from_dict(settings(final=True, train=section))


@pytest.mark.parametrize("key", ["name", "data"])
def test_what_must_be_there_is_named(key: str) -> None:
    config = settings()
    del config[key]
    with pytest.raises(ConfigError, match=f"field '{key}' is missing"):
        from_dict(config)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda c: c.seed == 7),
        ("final=true", lambda c: c.final is True),
        ("name=other", lambda c: c.name == "other"),
        ('name="other"', lambda c: c.name == "other"),
        ("train.learning_rate=1e-3", lambda c: c.train.learning_rate == 1e-3),
        ("train.learning_rate=1", lambda c: c.train.learning_rate == 1.0),
        ("train.label_smoothing = 0", lambda c: c.train.label_smoothing == 0),
        ("data.path=/a b/c=d", lambda c: c.data.path == "/a b/c=d"),
        ("data.path=", lambda c: c.data.path == ""),
        ('data.test.subject=["d"]', lambda c: c.data.test == {"split": ["test"], "subject": ["d"]}),
        ('data.test={subject=["d"]}', lambda c: c.data.test == {"subject": ["d"]}),
        ("data.options.missing=true", lambda c: c.data.options["missing"] is True),
        ("export.protocol=leave one out", lambda c: c.export.protocol == "leave one out"),
    ],
)
def test_set_overrides_one_value(tmp_path: Path, override: str, read: Any) -> None:
    assert read(load(write_config(tmp_path / "c.toml"), [override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: expected section.key=value"),
        ("train.lr=1", "unknown field 'lr'"),
        ("=1", "unknown field ''"),
        ("name.first=x", "name is not a section"),
        ("train.epochs=many", "config.train.epochs: expected int, got 'many'"),
        ("model.layers=[1]", "config.model.layers: expected int"),
    ],
)
def test_set_is_as_strict_as_the_file(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write_config(tmp_path / "c.toml"), [override])


def test_later_overrides_win(tmp_path: Path) -> None:
    assert load(write_config(tmp_path / "c.toml"), ["seed=1", "seed=2"]).seed == 2


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        load(tmp_path / "none.toml")
    for content in (b"name = ", b"\xff\xfe", b"[data\n"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.toml: not TOML"):
            load(tmp_path / "bad.toml")
    (tmp_path / "list.toml").write_text("name = 3")
    with pytest.raises(ConfigError, match=r"list.toml: config: field 'data' is missing"):
        load(tmp_path / "list.toml")


def test_is_a_value() -> None:
    assert from_dict(settings()) == from_dict(settings())
    assert isinstance(from_dict(settings()), Config)


def test_values_may_be_laid_over_a_configuration_that_was_read(tmp_path: Path) -> None:
    read = load(write_config(tmp_path / "c.toml", streams={"together": ["subject"]}))
    changed = override(read, ['export.events={ nothing = "nothing", enter = 0.6, leave = 0.4, least = 5, gap = 3 }', "streams.stay=[2, 3]"])
    assert changed.export.events is not None
    assert (changed.export.events.enter, changed.export.events.gap) == (0.6, 3)
    assert changed.streams == replace(read.streams, stay=(2, 3))
    assert replace(changed, export=read.export, streams=read.streams) == read
    assert override(read, None) is read
    with pytest.raises(ConfigError, match=r"events\.leave"):
        override(read, ['export.events={ nothing = "nothing", enter = 0.6, leave = 0.7, least = 5, gap = 3 }'])
