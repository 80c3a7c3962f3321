"""Compiled loop bodies: the same numbers, never waited for, never needed."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from learner import compiled
from learner.compiled import POLL_SECONDS, StepCompiler, describe, make_compiler
from learner.native.build import find_compiler
from tests.unit.learner.tape import TapeRecorder
from tests.unit.learner.test_update_capture import batches, build, vector_env

SECONDS = 170.0
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def mixing_step(x: Tensor, pair: Pair, rate: float) -> tuple[Tensor, ...]:
    """A step as the compiler takes them: tensors, a named tuple and a number."""
    y = torch.tanh(x @ pair.first) * rate
    return y, y + pair.second


def arguments(rows: int = 3) -> tuple[Tensor, Pair, float]:
    generator = torch.Generator().manual_seed(0)
    x, first, second = (torch.randn(s, generator=generator) for s in ((rows, 4), (4, 5), (rows, 5)))
    return x, Pair(first, second), 0.5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[StepCompiler]:
    made = StepCompiler(tmp_path, seconds=SECONDS)
    yield made
    made.close()


def assert_same_numbers(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_arguments_of_another_layout_are_copied_and_of_another_shape_go_to_the_function(
    tmp_path: Path, compiler: StepCompiler, monkeypatch: pytest.MonkeyPatch
):
    x, pair, rate = arguments()
    layout = [(y.shape, y.stride()) for y in (x, *pair)]

    def blind(path: str):  # reads memory as a package does: as if it had the layout it was made for
        def run(x: Tensor, *pair: Tensor) -> tuple[Tensor, ...]:
            x, *pair = (y.as_strided(*given) for y, given in zip((x, *pair), layout, strict=True))
            return mixing_step(x, Pair(*pair), rate)

        return run

    monkeypatch.setattr(torch._inductor, "aoti_load_package", blind)
    compiler(mixing_step, x, pair, rate)
    (name,) = [path.stem for path in tmp_path.glob("*.log")]
    compiler.close()
    (tmp_path / f"{name}.pt2").touch()
    run = StepCompiler(tmp_path)(mixing_step, x, pair, rate)
    assert run is not mixing_step
    turned = x.t().contiguous().t()  # the same numbers in another order of memory
    assert turned.stride() != x.stride()
    assert_same_numbers(run(turned, pair, rate), mixing_step(x, pair, rate))
    more = arguments(rows=7)
    assert_same_numbers(run(*more), mixing_step(*more))


@pytest.mark.drill
@needs_compiler
@pytest.mark.timeout(400)
def test_package_is_made_meanwhile_kept_and_called_with_any_layout(tmp_path: Path, compiler: StepCompiler):
    args = arguments()
    assert compiler(mixing_step, *args) is mixing_step  # nobody waits
    assert compiler.busy
    assert compiler.wait(SECONDS)
    assert compiler.version == 1
    run = compiler(mixing_step, *args)
    assert run is not mixing_step
    assert_same_numbers(run(*args), mixing_step(*args))
    x, pair, rate = args
    turned = x.t().contiguous().t()
    assert_same_numbers(run(turned, pair, rate), mixing_step(*args))
    bad = x.clone()
    bad[0, 0] = torch.nan
    assert run(bad, pair, rate)[0][0].isnan().all()
    again = StepCompiler(tmp_path)  # a later process
    assert again(mixing_step, *args) is not mixing_step
    assert not again.busy
    assert again(mixing_step, x, pair, 0.25) is mixing_step  # numbers are part of a package
    again.close()


def test_damaged_package_is_removed_and_the_function_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    args = arguments()
    first = StepCompiler(tmp_path)
    first(mixing_step, *args)
    first.close()
    (name,) = [path.stem for path in tmp_path.glob("*.log")]
    (tmp_path / f"{name}.pt2").write_bytes(b"half a package")
    later = StepCompiler(tmp_path)
    assert later(mixing_step, *args) is mixing_step
    assert not list(tmp_path.glob("*.pt2"))
    assert "runs as written" in caplog.text


def test_child_that_takes_too_long_is_ended_and_not_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    compiler = StepCompiler(tmp_path, seconds=0.01)
    compiler(mixing_step, *arguments())
    child = compiler._child.process
    assert compiler.wait(SECONDS)
    assert child.returncode is not None
    assert "not done after 0.01 s" in caplog.records[-1].why
    assert compiler(mixing_step, *arguments()) is mixing_step
    assert not compiler.busy
    assert compiler.version == 0


def test_closing_ends_the_child(compiler: StepCompiler):
    compiler(mixing_step, *arguments())
    child = compiler._child.process
    begun = time.monotonic()
    compiler.close()
    assert child.returncode is not None
    assert time.monotonic() - begun < SECONDS


def test_off_and_other_types_compile_nothing():
    assert make_compiler("off", "fp32") is None
    assert make_compiler("auto", "bf16") is None


def test_description_tells_apart_what_a_package_depends_on():
    x, pair, rate = arguments()
    base = describe(mixing_step, (x, pair, rate))
    assert describe(mixing_step, (x + 1, pair, rate)) == base
    assert describe(mixing_step, (x.double(), pair, rate)) != base
    assert describe(mixing_step, (x.t().contiguous().t(), pair, rate)) != base
    assert describe(mixing_step, (x, pair, 2 * rate)) != base


def test_another_processor_has_other_packages_even_of_the_same_model(monkeypatch: pytest.MonkeyPatch):
    base = describe(mixing_step, arguments())
    monkeypatch.setattr(compiled, "processor", lambda: "of that model, with fewer instructions")
    compiled._machine.cache_clear()
    other = describe(mixing_step, arguments())
    compiled._machine.cache_clear()
    assert other != base


# ---- inside an agent ------------------------------------------------------------------------------


class Renamed:
    """Stands for packages that arrive at the third update: the same function, as another call."""

    def __init__(self) -> None:
        self.version = self.asked = self.polled = 0

    def poll(self) -> None:
        self.polled += 1
        self.version = int(self.polled >= 3)

    def __call__(self, function, *args):
        self.asked += 1
        return (lambda *args: function(*args)) if self.version else function


def test_recordings_are_made_again_when_a_step_was_taken_up():
    env = vector_env()
    recorder, steps = TapeRecorder(), Renamed()
    direct = build(env, steps=Renamed(), backend="torch")
    compiled = build(env, recorder, steps=steps, backend="torch")
    for batch in batches(env, 5):
        assert direct.learn(batch, {})[1] == compiled.learn(batch, {})[1]
    assert (recorder.warmed, recorder.recorded) == (2, 2)
    assert steps.asked > 0


def curves(
    directory: Path, updates: int, packages: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Metrics of an eager agent and of one with so many compiled steps, on the same batches."""
    env = vector_env()
    steps = StepCompiler(directory, seconds=SECONDS)
    eager, compiled = build(env, backend="torch"), build(env, steps=steps, backend="torch")
    state = compiled.state()
    several = batches(env, 4)
    compiled.learn(several[0], {})
    while steps.version < packages:
        assert steps.busy
        steps.wait(POLL_SECONDS)
    steps.close()
    compiled.load(state)
    runs: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for update in range(updates):
        for run, agent in zip(runs, (eager, compiled), strict=True):
            run.append(agent.learn(several[update % 4], {})[1])
    return runs


def assert_same_curves(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert one != other  # compiled code sums in another order: were the bits the same, it did not run
    for a, b in zip(one, other, strict=True):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@needs_compiler
def test_agent_with_a_compiled_step_has_the_same_losses(tmp_path: Path):
    assert_same_curves(*curves(tmp_path, 3, packages=1))


@pytest.mark.drill
@needs_compiler
@pytest.mark.timeout(600)
def test_compiled_and_eager_agents_have_the_same_loss_curve_over_50_updates(tmp_path: Path):
    eager, compiled = curves(tmp_path, 50, packages=2)
    assert eager[0]["loss/total"] > eager[-1]["loss/total"]
    assert_same_curves(eager, compiled)
