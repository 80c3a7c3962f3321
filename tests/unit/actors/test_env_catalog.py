"""Finding environments by name, their specs, and refusals that say what to do."""

import importlib
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from actors.envs.catalog import make_env
from actors.envs.envpool_door import dmc_task
from actors.envs.faults import EnvFault
from actors.envs.options import EnvOptions
from actors.envs.spaces import ActionCodec, ObsCodec
from system.errors import ConfigError


def spec_of(name, **options):
    env = make_env(name, 1, options=options)
    env.close()
    return {key: (spec.shape, spec.dtype, spec.kind, spec.classes) for key, spec in env.spec.obs.items()}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("CartPole-v1", "envpool:CartPole-v1"),
        ("envpool:CartPol-v1", "CartPole-v1"),
        ("gym:CartPol-v1", "CartPole-v1"),
        ("gym:MiniGrid-Emty-5x5-v0", "MiniGrid-Empty-5x5-v0"),
        ("dmc:walker_wakl", "WalkerWalk-v1"),
        ("toy:nothing", "toy:counter"),
        ("no_such_module:make", "cannot be imported"),
        ("json:no_such_name", "cannot be imported"),
        (":x", "must be written"),
        ("envpool:", "must be written"),
    ],
)
def test_an_unknown_environment_is_refused_with_the_nearest_names(name, says):
    with pytest.raises(ConfigError, match=says):
        make_env(name, 1)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("envpool:CartPole-v1", {"colour": 3}, "colour"),
        ("envpool:CartPole-v1", {"batch_size": 9}, "batch_size"),
        ("envpool:Pong-v5", {"img_height": 0}, "img_height"),
        ("gym:CartPole-v1", {"colour": 3}, "colour"),
        ("gym:CartPole-v1", {"vectorization": "turbo"}, "sync, async or native"),
        ("gym:CartPole-v1", {"autoreset": "never"}, "next_step, same_step, disabled"),
        ("gym:CartPole-v1", {"context": "fork"}, "forkserver or spawn"),
        ("gym:CartPole-v1", {"vectorization": "native", "action_repeat": 2}, "action_repeat"),
        ("gym:CartPole-v1", {"wrappers": ["json:Nope"]}, "wrappers"),
        ("gym:CartPole-v1", {"drop_obs": "vector"}, "list"),
        ("gym:CartPole-v1", {"as_vector": ["nothing"]}, "nothing"),
        ("gym:CartPole-v1", {"action_repeat": 0}, "action_repeat"),
        ("gym:CartPole-v1", {"time_limit": -1}, "time_limit"),
        ("gym:CartPole-v1", {"frame": "hcw"}, "frame"),
        ("toy:counter", {"shortest": 9, "longest": 3}, "shortest"),
        ("toy:counter", {"colour": 3}, "colour"),
        ("toy:faulty", {"fault": "boredom"}, "fault"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(name, options, says):
    with pytest.raises(ConfigError, match=says):
        make_env(name, 2, options=options)


def test_zero_environments_are_refused():
    with pytest.raises(ConfigError, match="num_envs"):
        make_env("toy:counter", 0)


@pytest.mark.parametrize(
    ("callable_", "options", "says"),
    [
        ("nothing", {}, "returned str"),
        ("raises", {}, "licence"),
        ("NUMBER", {}, "must be callable"),
        ("picky", {}, "size"),
        ("Vector", {}, "autoreset mode 'sometimes'"),
        ("Vector", {"mode": None}, "autoreset mode None"),
    ],
)
def test_a_callable_of_the_user_that_does_not_fit_is_refused(strange, callable_, options, says):
    with pytest.raises(ConfigError, match=says):
        make_env(f"{strange}:{callable_}", 2, options=options)


def test_envpool_missing_names_the_way_round(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ConfigError, match="gym:<id>"):
        make_env("envpool:CartPole-v1", 1)
    make_env("gym:CartPole-v1", 1).close()


def test_an_old_envpool_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.import_module("envpool"), "__version__", "0.8.4")
    with pytest.raises(ConfigError, match=r"must be >= 1\.2\.3"):
        make_env("envpool:CartPole-v1", 1)


def test_control_suite_names_map_to_envpool_tasks():
    assert dmc_task("walker_walk") == "WalkerWalk-v1"
    assert dmc_task("ball_in_cup_catch") == "BallInCupCatch-v1"
    assert dmc_task("cartpole_swingup_sparse") == "CartpoleSwingupSparse-v1"


def test_specs_of_real_tasks():
    image, direction = ((7, 7, 3), "uint8", "image", 0), ((1,), "int32", "discrete", 4)
    assert spec_of("envpool:MiniGrid-Empty-5x5-v0") == {"image": image, "direction": direction}
    assert spec_of("gym:MiniGrid-Empty-5x5-v0") == {"image": image, "direction": direction}
    assert spec_of("gym:MiniGrid-Empty-5x5-v0", as_vector=["image"], drop_obs=["direction"]) == {
        "image": ((147,), "float32", "vector", 0)
    }
    pong = {"img_height": 64, "img_width": 64, "gray_scale": False, "stack_num": 1}
    assert spec_of("envpool:Pong-v5", **pong) == {"image": ((64, 64, 3), "uint8", "image", 0)}
    walker = spec_of("dmc:walker_walk")
    assert walker["height"] == ((1,), "float32", "vector", 0)
    assert sorted(walker) == ["height", "orientations", "velocity"]


def test_a_wrapper_changes_what_a_gymnasium_environment_shows():
    shown = spec_of("gym:MiniGrid-Empty-5x5-v0", wrappers=["minigrid.wrappers:RGBImgPartialObsWrapper"])
    assert shown["image"] == ((56, 56, 3), "uint8", "image", 0)


def test_nested_observations_become_dotted_names_and_scalars_vectors(strange):
    assert spec_of(f"{strange}:strange") == {
        "count": ((2,), "float32", "vector", 0),
        "height": ((1,), "float32", "vector", 0),
        "nested.door": ((1,), "int32", "discrete", 3),
    }


def test_action_repeat_sums_rewards_and_stops_at_the_end(strange):
    env = make_env(f"{strange}:strange", 1, options={"action_repeat": 3})
    env.start(0)
    rows = []
    for _ in range(4):
        step = env.recv(5.0)
        rows.append((float(step.reward[0]), int(step.obs["height"][0, 0]), bool(step.is_last[0])))
        live = step.env_id[~step.is_last]
        env.send(np.zeros((len(live), 1), np.int32), live)
    env.close()
    assert rows == [(0.0, 0, False), (6.0, 3, False), (4.0, 4, True), (0.0, 0, False)]


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}])
def test_envpool_repeats_actions_like_the_gymnasium_adapter(options):
    env = make_env("envpool:CartPole-v1", 3, options={"action_repeat": 4, **options})
    env.start(0)
    episode_rewards = {i: [] for i in range(3)}
    for _ in range(60):
        step = env.recv(5.0)
        for i, env_id in enumerate(step.env_id):
            if step.is_first[i]:
                assert step.reward[i] == 0
            elif not step.is_last[i]:
                assert step.reward[i] == 4, "four simulator steps, one reward each"
            else:
                assert 1 <= step.reward[i] <= 4
                episode_rewards[int(env_id)].append(step.reward[i])
        live = step.env_id[~step.is_last]
        env.send(np.zeros((len(live), 1), np.int32), live)
    env.close()
    assert sum(len(ends) for ends in episode_rewards.values()) >= 3


def test_a_time_limit_ends_an_episode_without_a_terminal():
    for name in ("gym:Pendulum-v1", "envpool:Pendulum-v1", "actors.envs.example_env:make"):
        env = make_env(name, 1, options={"time_limit": 3})
        env.start(0)
        flags = []
        for _ in range(4):
            step = env.recv(5.0)
            flags.append((bool(step.is_last[0]), bool(step.is_terminal[0])))
            if not step.is_last[0]:
                env.send(np.zeros((1, 1), np.float32), step.env_id)
        env.close()
        assert flags == [(False, False)] * 3 + [(True, False)], name


class TestCodecs:
    def test_frames_come_out_height_width_channel(self):
        chw = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5) % 7
        codec = ObsCodec("x", spaces.Box(0, 255, (3, 4, 5), np.uint8), EnvOptions(frame="chw"))
        out = codec.encode(chw, 2, copy=False)["image"]
        assert out.shape == (2, 4, 5, 3)
        assert out.flags.c_contiguous
        assert out[1, 2, 3, 1] == chw[1, 1, 2, 3]

    @pytest.mark.parametrize(
        ("shape", "want"),
        [
            ((4, 84, 84), (84, 84, 4)),
            ((84, 84, 3), (84, 84, 3)),
            ((7, 7, 3), (7, 7, 3)),
            ((84, 84), (84, 84, 1)),
        ],
    )
    def test_the_channel_axis_is_recognised(self, shape, want):
        codec = ObsCodec("x", spaces.Box(0, 255, shape, np.uint8), EnvOptions())
        assert codec.spec["image"].shape == want

    def test_a_value_beyond_float32_is_a_fault(self):
        codec = ObsCodec("x", spaces.Box(-np.inf, np.inf, (1,), np.float64), EnvOptions())
        with pytest.raises(EnvFault, match="float32"):
            codec.encode(np.array([[1e300]]), 1, copy=False)

    def test_names_that_rows_reserve_are_prefixed(self):
        space = spaces.Dict({"reward": spaces.Discrete(2), "a/b c": spaces.Discrete(2)})
        assert set(ObsCodec("x", space, EnvOptions()).spec) == {"obs.reward", "a.b_c"}

    def test_names_that_collide_are_refused(self):
        space = spaces.Dict({"a/b": spaces.Discrete(2), "a": spaces.Dict({"b": spaces.Discrete(2)})})
        with pytest.raises(ConfigError, match="collide"):
            ObsCodec("x", space, EnvOptions())

    def test_a_space_without_array_form_names_the_remedy(self):
        space = spaces.Dict({"g": spaces.Graph(spaces.Discrete(2), None), "x": spaces.Discrete(2)})
        with pytest.raises(ConfigError, match="drop_obs"):
            ObsCodec("x", space, EnvOptions())
        assert set(ObsCodec("x", space, EnvOptions(drop_obs=("g",))).spec) == {"x"}

    def test_reading_the_encoded_space_gives_the_same_spec(self):
        space = spaces.Dict({
            "image": spaces.Box(0, 255, (3, 32, 40), np.uint8),
            "bits": spaces.MultiBinary(4),
            "pos": spaces.Box(-1, 1, (2, 2), np.float64),
        })  # fmt: skip
        codec = ObsCodec("x", space, EnvOptions())
        assert ObsCodec("x", codec.space(), EnvOptions(frame="hwc")).spec == codec.spec

    def test_box_actions_are_rescaled_and_clipped_to_the_bounds(self):
        codec = ActionCodec("x", spaces.Box(np.array([0.0, -2.0]), np.array([10.0, 2.0]), dtype=np.float64))
        native = codec.native(np.array([[-1, -1], [0, 0.5], [3, -9]], np.float32))
        np.testing.assert_allclose(native, [[0, -2], [5, 1], [10, -2]])
        assert native.dtype == np.float64

    def test_discrete_actions_count_from_the_start_of_their_space(self):
        codec = ActionCodec("x", spaces.Discrete(3, start=-1))
        assert codec.native(np.array([[0], [2]], np.int32)).tolist() == [-1, 1]
        many = ActionCodec("x", spaces.MultiDiscrete([2, 5]))
        assert many.spec.classes == (2, 5)
        assert many.native(np.array([[1, 4]], np.int32)).tolist() == [[1, 4]]

    def test_an_action_space_we_cannot_serve_is_refused(self):
        with pytest.raises(ConfigError, match="supported are"):
            ActionCodec("x", spaces.Dict({"a": spaces.Discrete(2)}))


def test_frames_can_be_rendered():
    for name in ("gym:MiniGrid-Empty-5x5-v0", "envpool:MiniGrid-Empty-5x5-v0"):
        env = make_env(name, 2, options={"render_mode": "rgb_array"})
        env.start(0)
        env.recv(10.0)
        frame = env.render(1)
        env.close()
        assert frame is not None
        assert frame.ndim == 3
        assert frame.dtype == np.uint8
        assert frame.std() > 0
    assert "MiniGrid-Empty-5x5-v0" in gymnasium.registry
