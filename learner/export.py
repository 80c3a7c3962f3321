"""A policy outside of its run: a folder with weights, a specification and, if asked for, a program.

`weights.safetensors` and `policy.json` are all that `load_policy` reads: arrays and numbers, no code.
`policy.pt2` is one acting step for those who want neither this package nor its Python: a `torch.export`
program. PyTorch's own loader of such files may unpickle and evaluates expressions it finds in them, so
nothing here ever opens one.

Exporting the same weights twice with the same versions gives the same bytes. Between `deploy.export_cli`
and users.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from learner.catalog import make_config, make_policy, policy_shapes
from learner.state_files import write_arrays
from system.errors import ConfigError, IntegrityError, PreflightError, SchemaError
from system.experience import Step
from system.interfaces import Mode, Policy
from system.specs import ArraySpec, EnvSpec
from system.weights import PolicyVersion, Weights, nonfinite

KIND, FORMAT = "dreamfleet-policy", 1
SPEC, WEIGHTS, PROGRAM = "policy.json", "weights.safetensors", "policy.pt2"
MAX_SPEC_BYTES = 1 << 20
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """What an exported policy is. Made by `export_policy` and `load_policy`."""

    family: str
    settings: Mapping[str, Any]  # every setting of the family
    env: EnvSpec  # what it sees and what it answers
    version: PolicyVersion
    source: Mapping[str, Any]  # where the weights are from: run, checkpoint, updates, environment steps
    weights_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a policy remembers of its environments. Made by LoadedPolicy.initial, changed in place by act."""

    num_envs: int
    carry: Any


class LoadedPolicy:
    """An exported policy, ready to act. Made by `load_policy`; `policy` is the one actors run."""

    def __init__(self, spec: PolicySpec, policy: Policy) -> None:
        self.spec, self.policy = spec, policy

    def initial(self, num_envs: int = 1) -> Memory:
        """The memory of `num_envs` environments that nothing has been seen of."""
        return Memory(num_envs=num_envs, carry=self.policy.initial(num_envs))

    def act(
        self,
        carry: Memory,
        obs: Mapping[str, NDArray[np.generic]],
        is_first: bool | NDArray[np.bool_] = False,
        mode: Mode = "eval",
    ) -> NDArray[np.generic]:
        """Actions [n, *shape] for the newest observations of all n environments, each value [n, *shape].

        is_first [n], or one for all: rows that begin an episode, whose past is forgotten. mode "eval" takes
        the most probable action, "train" samples. Discrete actions are int32 indices [n, K]; continuous
        ones float32 in [-1, 1], to be rescaled to the bounds of the environment.
        Raises: SchemaError when the observations are not those of `spec.env`, or is_first is not theirs.
        """
        rows = carry.num_envs
        _check_obs(self.spec.env, obs, rows)
        if np.shape(is_first) not in ((), (rows,)):
            raise SchemaError(f"is_first has shape {np.shape(is_first)}, must be one bool or {(rows,)}")
        if mode not in ("train", "eval"):
            raise SchemaError(f"mode {mode!r} must be eval (the most probable action) or train (a sample)")
        never = np.zeros(rows, bool)
        step = Step(
            env_id=np.arange(rows, dtype=np.int32),
            obs=obs,
            reward=np.zeros(rows, np.float32),
            is_first=np.broadcast_to(np.asarray(is_first, bool), rows),
            is_last=never,
            is_terminal=never,
        )
        return self.policy.act(carry.carry, step, mode)[0]


def _check_obs(env: EnvSpec, obs: Mapping[str, NDArray[np.generic]], rows: int) -> None:
    """Raises: SchemaError naming what does not fit."""
    if obs.keys() != env.obs.keys():
        raise SchemaError(f"observations have keys {sorted(obs)}, this policy reads {sorted(env.obs)}")
    for key, spec in env.obs.items():
        value = obs[key]
        if value.shape[1:] != spec.shape or value.dtype != spec.dtype:
            raise SchemaError(
                f"observation {key!r} is {value.dtype} {value.shape}, must be {spec.dtype} "
                f"{('n', *spec.shape)}; convert it as the environment adapter of the run did"
            )
        if value.shape[:1] != (rows,):
            raise SchemaError(
                f"observation {key!r} has {len(value)} rows, this carry remembers {rows} environments; give "
                "one row for each"
            )


def export_policy(
    out: Path,
    *,
    family: str,
    settings: Mapping[str, Any],
    env: EnvSpec,
    weights: Weights,
    source: Mapping[str, Any],
    program: bool = True,
) -> Path:
    """Write a policy to the new folder `out`; it appears when it is whole.

    Raises: ConfigError when `out` exists or a weight is not finite, SchemaError for weights of another model,
    PreflightError when the folder cannot be written.
    """
    config = make_config(family, settings)
    if out.exists():
        raise ConfigError(f"{out} exists already; give --out a new folder")
    if broken := nonfinite(weights.arrays):
        raise ConfigError(f"weights {broken[0]!r} are not finite; export an older checkpoint")
    policy = make_policy(family, config, env, seed=0, threads=0)
    policy.load(weights)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.exporting")
    try:
        temporary.mkdir(parents=True)
        size, sha = write_arrays(temporary / WEIGHTS, weights.arrays)
        body: dict[str, Any] = {
            "kind": KIND,
            "format": FORMAT,
            "family": family,
            "settings": config.model_dump(mode="json"),
            "env": env.to_json(),
            "version": list(weights.version),
            "source": dict(source),
            "weights_digest": weights.digest,
            "reads": {key: _reading(spec) for key, spec in sorted(env.obs.items())},
            "answers": _answer(env),
            "files": {WEIGHTS: {"size": size, "sha256": sha}},
        }
        if program:
            from learner.program import write_program

            body["program"] = write_program(temporary / PROGRAM, policy, env)
            body["files"][PROGRAM] = _about(temporary / PROGRAM)
        text = json.dumps(body | {"digest": _digest(body)}, indent=1, sort_keys=True, allow_nan=False)
        (temporary / SPEC).write_text(text + "\n")
        temporary.rename(out)
    except OSError as error:
        raise PreflightError(
            f"cannot write {out} ({error.strerror}); free space there or give --out another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _reading(spec: ArraySpec) -> str:
    """How a policy reads one observation array; it is handed over as the environment shows it."""
    if spec.kind == "image":
        return "pixels / 255 - 0.5 through the CNN; below 16 pixels a side symlog through the MLP"
    if spec.kind == "discrete":
        return f"one-hot of {spec.classes} classes through the MLP"
    return "symlog through the MLP"


def _answer(env: EnvSpec) -> str:
    """What an action is, as `LoadedPolicy.act` returns it."""
    if env.action.kind == "discrete":
        return (
            f"int32 [n, {len(env.action.classes)}]: one index for each of {list(env.action.classes)} choices"
        )
    return f"float32 [n, {env.action.size}] in [-1, 1]; rescale it to the bounds of the environment"


def load_policy(path: str | Path, *, seed: int = 0, threads: int = 1) -> LoadedPolicy:
    """The policy that `dreamfleet export` wrote to the folder `path`, on the CPU; `policy.pt2` is not read.

    seed: of the latent samples, and of actions in mode "train". threads: as torch.set_num_threads; 0 leaves
    it. Raises: ConfigError when there is none or it needs another version of this package, IntegrityError
    naming the damaged file.
    """
    folder = Path(path)
    body = _read_spec(folder)
    try:
        spec = PolicySpec(
            family=str(body["family"]),
            settings=dict(body["settings"]),
            env=_checked(EnvSpec.from_json(body["env"])),
            version=PolicyVersion(*map(int, body["version"])),
            source=dict(body["source"]),
            weights_digest=str(body["weights_digest"]),
        )
        about = body["files"][WEIGHTS]
        expected = {"size": int(about["size"]), "sha256": str(about["sha256"])}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder / SPEC, repr(error)) from error
    if (found := _about(folder / WEIGHTS)) != expected:
        raise _damaged(folder / WEIGHTS, f"{found['size']} bytes with sha256 {found['sha256'][:12]}")
    try:
        with safe_open(folder / WEIGHTS, framework="np") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(folder / WEIGHTS, repr(error)) from error
    weights = Weights(version=spec.version, arrays=arrays, digest=spec.weights_digest).verify()
    config = _config_for(spec, weights, folder / SPEC)
    policy = make_policy(spec.family, config, spec.env, seed=seed, threads=threads)
    policy.load(weights)
    return LoadedPolicy(spec, policy)


def _checked(env: EnvSpec) -> EnvSpec:
    """The specification itself. Raises: ValueError for arrays that no environment shows."""
    for key, spec in env.obs.items():
        if min(spec.shape, default=1) < 1 or (spec.kind == "image" and len(spec.shape) != 3):
            raise ValueError(f"observation {key!r} is {spec.kind} of shape {spec.shape}")
    return env


def _config_for(spec: PolicySpec, weights: Weights, file: Path) -> Any:
    """The family's config, once it is sure that what it asks for is as large as the weights: policy.json may
    be forged, and sizes in it must not cost memory. Raises: SchemaError, IntegrityError.
    """
    from learner.nn.optim import check_arrays

    config = make_config(spec.family, spec.settings)
    try:
        shapes = policy_shapes(spec.family, config, spec.env)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes that no tensor can have
        raise _damaged(file, str(error)) from error
    check_arrays(shapes, weights.arrays, f"weights for {file.name}")
    return config


def _read_spec(folder: Path) -> dict[str, Any]:
    """The verified contents of policy.json."""
    file = folder / SPEC
    if not file.is_file():
        raise ConfigError(
            f"{folder} holds no exported policy (no {SPEC}); make one with: dreamfleet export RUN --out DIR"
        )
    try:
        if file.stat().st_size > MAX_SPEC_BYTES:
            raise ValueError(f"more than {MAX_SPEC_BYTES} bytes")
        body = json.loads(file.read_bytes())
        if not isinstance(body, dict) or body.get("kind") != KIND:
            raise ValueError(f"it does not say that it is a {KIND}")
        digest = body.pop("digest", None)
        if body.get("format") != FORMAT:
            raise ConfigError(
                f"{file} has format {body.get('format')!r:.40}, this version reads {FORMAT}; "
                "use the version that wrote it, or export again"
            )
        if digest != _digest(body):
            raise ValueError("its digest is wrong")
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from error
    return body


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _about(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file. Raises: IntegrityError when it cannot be read."""
    sha, size = hashlib.sha256(), 0
    try:
        with file.open("rb") as opened:
            while piece := opened.read(READ_BYTES):
                sha.update(piece)
                size += len(piece)
    except OSError as error:
        raise _damaged(file, error.strerror or repr(error)) from error
    return {"size": size, "sha256": sha.hexdigest()}


def _damaged(file: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"{file} is not what export wrote ({why:.200}); export again or restore it from a copy"
    )
