"""The family catalog, its configs, and the rule that both come without torch."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from learner.catalog import make_agent, make_config, make_policy, overlay_columns, policy_shapes
from learner.devices import describe, resolve_device
from learner.families.dreamer.config import SIZES, DreamerConfig
from learner.interfaces import check_needs
from system.errors import ConfigError, PreflightError
from system.specs import ActionSpec, ArraySpec, EnvSpec

ENV = EnvSpec(
    name="toy",
    obs={"vector": ArraySpec(shape=(3,), dtype="float32")},
    action=ActionSpec(kind="discrete", classes=(2,)),
)


def test_defaults_are_the_official_numbers():
    config = make_config("dreamer", {})
    assert (config.deter, config.hidden, config.stoch, config.classes, config.blocks) == (512, 64, 32, 4, 8)
    assert (config.lr, config.warmup, config.agc, config.agc_floor) == (4e-5, 1000, 0.3, 1e-3)
    assert (config.beta1, config.beta2, config.eps) == (0.9, 0.999, 1e-20)
    assert (config.horizon, config.lambda_, config.discount_horizon, config.entropy) == (
        15,
        0.95,
        333.0,
        3e-4,
    )
    assert (config.unimix, config.free_nats, config.bins, config.slow_rate) == (0.01, 1.0, 255, 0.02)
    assert (config.return_low, config.return_high, config.return_rate, config.return_floor) == (
        0.05,
        0.95,
        0.01,
        1.0,
    )
    assert config.scales.model_dump() == {
        "reconstruction": 1.0,
        "reward": 1.0,
        "cont": 1.0,
        "dyn": 1.0,
        "rep": 0.1,
        "policy": 1.0,
        "value": 1.0,
        "replay_value": 0.3,
    }


def test_sizes_fill_what_was_not_set():
    assert make_config("dreamer", {"size": "size200m"}).deter == 8192
    assert make_config("dreamer", {"size": "size12m", "deter": 1024}).deter == 1024
    assert make_config("dreamer", {"size": "size12m"}).lr == 4e-5
    for size in SIZES:
        assert make_config("dreamer", {"size": size}).size == size


def test_every_setting_is_documented():
    for name, field in DreamerConfig.model_fields.items():
        assert field.description, name


def test_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        make_config("dreamer", {}).lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rat": 1}, "learning_rat"),
        ({"horizn": 3}, "did you mean 'horizon'"),
        ({"size": ["nano"]}, "a value has the wrong type"),
        ({"scales": {"rewrd": 1.0}}, "dreamer.scales.rewrd is not a setting; did you mean 'reward'"),
        ({"lr": -1}, "dreamer.lr (-1): Input should be greater than 0"),
        ({"deter": 100}, "deter (100) must be a multiple of blocks (8)"),
        ({"bins": 254}, "must be odd"),
        ({"size": "huge"}, "dreamer.size"),
        ({"return_low": 0.9, "return_high": 0.1}, "return_low (0.9) must be < return_high (0.1)"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ConfigError) as caught:
        make_config("dreamer", settings)
    assert words in str(caught.value)


def test_unknown_family_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'dreamer'"):
        make_config("dreamr", {})


def test_config_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="does not belong to family"):
        make_agent("dreamer", object(), ENV, device="cpu", seed=0)  # type: ignore[arg-type]


def test_overlay_columns_follow_the_size():
    columns = overlay_columns("dreamer", make_config("dreamer", {"size": "size1m"}), ENV)
    assert columns == {
        "deter": ArraySpec(shape=(512,), dtype="uint16"),
        "stoch": ArraySpec(shape=(32,), dtype="uint8"),
    }


@pytest.mark.parametrize("side", [0, 8, 32])
@pytest.mark.parametrize(
    "action", [ActionSpec(kind="discrete", classes=(2, 3)), ActionSpec(kind="continuous", size=2)]
)
def test_shapes_told_beforehand_are_those_of_the_policy(action: ActionSpec, side: int):
    image = {"image": ArraySpec(shape=(side, side, 3), dtype="uint8", kind="image")} if side else {}
    env = EnvSpec(name="toy", obs={**ENV.obs, **image} if side < 32 else image, action=action)
    config = make_config("dreamer", {"size": "nano"})
    policy = make_policy("dreamer", config, env, seed=0, threads=0)
    made = {name: tuple(p.shape) for name, p in policy.plain.named_parameters()}  # type: ignore[attr-defined]
    assert policy_shapes("dreamer", config, env) == made


def test_config_and_columns_need_no_torch():
    code = (
        "import sys\n"
        "from learner.catalog import make_config, overlay_columns\n"
        "config = make_config('dreamer', {'size': 'nano'})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_model_that_lacks_a_capability_is_refused():
    check_needs("actor-critic", frozenset({"step"}), "dreamer", frozenset({"step", "reward"}))
    with pytest.raises(ConfigError, match=r"needs \['value'\]"):
        check_needs("search", frozenset({"step", "value"}), "dreamer", frozenset({"step"}))


def test_device_is_never_silently_replaced():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda")
    assert "cpu" in describe(resolve_device("cpu"))
    with pytest.raises(PreflightError, match=r"sees [0-9]+ CUDA devices"):
        resolve_device("cuda:99")
    with pytest.raises(ConfigError, match="must be auto"):
        resolve_device("tpu")
