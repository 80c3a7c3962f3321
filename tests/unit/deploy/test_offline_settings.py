"""Runs without actors: what must be set, what is refused, what the plan says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.plan import check_settings
from deploy.run_config import RunConfig
from replay.datasets.episodes import About, Episode
from replay.datasets.ingest import import_dataset
from replay.offline import OfflineLedger
from system.errors import ConfigError, SchemaError
from system.specs import ActionSpec, ArraySpec, EnvSpec

OBS = {"vector": ArraySpec(shape=(5,), dtype="float32")}
ENV = EnvSpec(name="e", obs=OBS, action=ActionSpec(kind="discrete", classes=(3,)))


def config(sources: dict[str, Path], **more: Any) -> RunConfig:
    named = {name: {"path": path} for name, path in sources.items()}
    values: dict[str, Any] = {
        "env": {"name": "toy:counter"},
        "actors": {"count": 0},
        "updates": 10,
        "replay": {"own_weight": 0, "sources": named},
        "learner": {"settings": {"size": "nano"}, "batch": 4, "length": 8},
    }
    return RunConfig.model_validate(values | more)


def dataset(root: Path, action: ActionSpec | None, obs: dict[str, ArraySpec] = OBS) -> Path:
    step = np.arange(40)
    columns: dict[str, Any] = {key: np.zeros((40, *spec.shape), spec.dtype) for key, spec in obs.items()}
    columns |= {"reward": np.zeros(40, np.float32), "is_first": step == 0, "is_last": step == 39}
    columns["is_terminal"] = columns["is_last"]
    if action is not None:
        columns["action"] = np.zeros((40, *action.shape), action.dtype)

    class One:
        about = About(name="one", obs=obs, action=action)
        rows = 40

        def __iter__(self) -> Any:
            yield Episode(name="one", columns=columns)

    import_dataset(One(), root)
    return root


def test_a_fitting_dataset_passes(tmp_path: Path) -> None:
    check_settings(config({"d": dataset(tmp_path / "d", ENV.action)}), ENV)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"updates": None}, "updates"),
        ({"replay": {"own_weight": 0}}, "own_weight"),
        ({"replay": {"sources": {"d": {"path": "d"}}}}, "own_weight"),
    ],
)
def test_what_could_never_end_or_begin_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config({"d": Path("d")}, **change)


def test_sources_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    video = dataset(tmp_path / "video", None)
    with pytest.raises(ConfigError, match=r"source video .*without actions"):
        check_settings(config({"video": video}), ENV)
    other = dataset(tmp_path / "other", ENV.action, {"vector": ArraySpec(shape=(6,), dtype="float32")})
    with pytest.raises(SchemaError, match="vector"):
        check_settings(config({"other": other}), ENV)
    more = dataset(tmp_path / "more", ActionSpec(kind="discrete", classes=(9,)))
    with pytest.raises(ConfigError, match=r"source more .*\[9\] classes"):
        check_settings(config({"more": more}), ENV)
    with pytest.raises(ConfigError, match=r"source gone .*table\.json"):
        check_settings(config({"gone": tmp_path / "gone"}), ENV)


def test_source_paths_hold_in_every_process() -> None:
    assert config({"d": Path("d")}).replay.sources["d"].path.is_absolute()


def test_the_ledger_waits_for_rows_alone() -> None:
    ledger = OfflineLedger()
    ledger.check_update(10_000)
    assert not ledger.can_train(64)
    ledger.observe(0, 0, 5)
    assert ledger.can_train(64)
    ledger.record(64)
    assert ledger.can_train(64)
    assert ledger.error == 0.0
    assert ledger.insert_budget() == 0
    again = OfflineLedger()
    again.load(ledger.state())
    assert again.trained == 64
