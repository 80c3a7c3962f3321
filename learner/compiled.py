"""Step functions compiled for the shapes they meet, by a child process, while training goes on.

The child exports a function for one set of shapes and has torch compile it ahead of time into a package that
is kept in the user's cache; the learner loads packages that are there and takes up new ones when they are
done. Nothing waits for a compiler, nothing needs one: what is missing, late or broken is computed as it is
written.

A step function takes tensors, named tuples of tensors and plain numbers, and returns fresh tensors, never
views of its arguments. `python -m learner.compiled JOB` is the child.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from learner.native.build import cache_directory, processor

log = logging.getLogger(__name__)

CompileSetting = Literal["auto", "off"]
Body = Callable[..., tuple[Tensor, ...]]
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]

COMPILE_SECONDS = 300.0
"""Longest life of a child; one package takes half a minute to one and a half on two cores."""
POLL_SECONDS = 1.0
SUFFIX = ".pt2"


def make_compiler(setting: CompileSetting, dtype: str) -> StepCompiler | None:
    """What compiles steps; None where they run as written, with a log line when that was not asked for."""
    if setting == "off":
        return None
    if dtype != "fp32":
        log.info("steps are not compiled", extra={"why": f"only fp32 steps are, not {dtype}"})
        return None
    try:
        return StepCompiler(cache_directory())
    except OSError as error:
        log.warning("steps are not compiled", extra={"why": str(error)})
        return None


class StepCompiler:
    """Chooses what to call for a step function: a package made for these arguments, or the function itself.

    One child at a time, at low priority. A function whose package cannot be made is not tried again.
    """

    def __init__(self, directory: Path, *, seconds: float = COMPILE_SECONDS) -> None:
        self._directory, self._seconds = directory, seconds
        self._found: dict[str, Body | None] = {}  # by digest; None: not yet, or never
        self._waiting: list[_Wanted] = []
        self._child: _Child | None = None
        self._looked = 0.0
        self.version = 0
        """Grows whenever a package is taken up: what was recorded before is out of date."""

    @property
    def busy(self) -> bool:
        """Whether packages are still being made."""
        return self._child is not None or bool(self._waiting)

    def __call__(self, function: Body, *args: Any) -> Body:
        """What to call instead of `function` with arguments of these shapes, types and numbers."""
        job = describe(function, args)
        digest = _digest(job)
        if digest not in self._found:
            self._found[digest] = None
            path = self._directory / f"step-{function.__name__}-{digest}{SUFFIX}"
            wanted = _Wanted(path, digest, job, function, [_layout(x) for x in tensors_of(args)])
            if path.exists():
                self._take(wanted)
            else:
                self._waiting.append(wanted)
                self._start_next()
        return self._found[digest] or function

    def poll(self) -> None:
        """Take up what the child has finished. Costs nothing between two looks a second apart."""
        child = self._child
        if child is None or time.monotonic() - self._looked < POLL_SECONDS:
            return
        self._looked = time.monotonic()
        if (code := child.process.poll()) is None and child.age() < self._seconds:
            return
        self._child = None
        child.end()
        if code == 0 and child.wanted.path.exists():
            self._take(child.wanted)
        else:
            why = f"exit code {code}" if code is not None else f"not done after {self._seconds:g} s"
            self._give_up(child.wanted, f"{why}; see {child.log}")
        self._start_next()

    def wait(self, seconds: float) -> bool:
        """Return when nothing is being made any more; False when that took longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while self.busy and time.monotonic() < deadline:
            if self._child is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.process.wait(POLL_SECONDS)
            self._looked = 0.0
            self.poll()
        return not self.busy

    def close(self) -> None:
        """End the child, if there is one, and forget what waits."""
        self._waiting.clear()
        if self._child is not None:
            self._child.end()
            self._child = None

    def _start_next(self) -> None:
        while self._child is None and self._waiting:
            wanted = self._waiting.pop(0)
            try:
                self._child = _Child(wanted, self._seconds)
            except OSError as error:
                self._give_up(wanted, str(error))

    def _take(self, wanted: _Wanted) -> None:
        try:
            self._found[wanted.digest] = _Package(wanted)
        except (OSError, RuntimeError, ValueError, KeyError) as error:  # damaged, or of another build
            with contextlib.suppress(OSError):
                wanted.path.unlink()
            self._give_up(wanted, f"{wanted.path} cannot be loaded: {error}")
            return
        self.version += 1
        log.info("compiled step taken up", extra={"step": wanted.path.stem})

    @staticmethod
    def _give_up(wanted: _Wanted, why: str) -> None:
        extra = {"step": wanted.job["function"], "why": why}
        log.warning("step not compiled, it runs as written", extra=extra)


class _Wanted(NamedTuple):
    """A package to be made."""

    path: Path
    digest: str
    job: dict[str, Any]
    function: Body
    layout: list[Layout]  # of its tensors


class _Package:
    """A loaded package, called as the function it was made from.

    Its code takes the layout it was made for as given and would read anything else as nonsense: arguments
    laid out otherwise are copied, those of other shapes go to the function itself.
    """

    def __init__(self, wanted: _Wanted) -> None:
        self._run = torch._inductor.aoti_load_package(str(wanted.path))
        self._function, self._layout = wanted.function, wanted.layout

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        tensors = tensors_of(args)
        for i, (x, layout) in enumerate(zip(tensors, self._layout, strict=True)):
            if _layout(x) != layout:
                shape, stride, kind, device = layout
                if (x.shape, x.dtype, x.device) != (shape, kind, device):
                    return self._function(*args)
                tensors[i] = torch.empty_strided(shape, stride, dtype=kind, device=device).copy_(x)
        return tuple(self._run(*tensors))


def _layout(x: Tensor) -> Layout:
    return x.shape, x.stride(), x.dtype, x.device


class _Child:
    """One compilation in a session of its own, so that its compiler ends with it."""

    def __init__(self, wanted: _Wanted, seconds: float) -> None:
        self.wanted, self.log = wanted, wanted.path.with_suffix(".log")
        self._begun = time.monotonic()
        order = json.dumps({"job": wanted.job, "path": str(wanted.path), "seconds": seconds})
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "learner.compiled", order],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).resolve().parent.parent,
                start_new_session=True,
            )
        self._finalizer = weakref.finalize(self, _kill, self.process)

    def age(self) -> float:
        return time.monotonic() - self._begun

    def end(self) -> None:
        self._finalizer()


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tensors_of(args: Any) -> list[Tensor]:
    """All tensors of nested tuples, in order."""
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, tuple):
            found += tensors_of(arg)
    return found


# ---- what is compiled -----------------------------------------------------------------------------


def describe(function: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """What a package depends on, as JSON: function, arguments without their values, machine, sources."""
    device = next(x.device for x in tensors_of(args))
    return {
        "function": f"{function.__module__}:{function.__qualname__}",
        "args": [_shape_of(arg) for arg in args],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": _machine(device),
        "sources": _sources(function.__module__),
    }


def _shape_of(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        kind = str(arg.dtype).removeprefix("torch.")
        return {"tensor": [list(arg.shape), list(arg.stride()), kind, str(arg.device)]}
    if isinstance(arg, tuple):
        kind = type(arg)
        return {"tuple": f"{kind.__module__}:{kind.__qualname__}", "items": [_shape_of(x) for x in arg]}
    return {"value": arg}


def _digest(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:24]


@functools.cache
def _machine(device: torch.device) -> str:
    """What its code depends on: inductor uses every instruction of the processor it runs on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    of = hashlib.sha256(processor().encode()).hexdigest()[:24]
    return f"{torch.backends.cpu.get_cpu_capability()} {of}"


_SOURCES: dict[str, str] = {}


def _sources(module: str) -> str:
    """Digest of all sources beside `module`: whatever a step function calls lies there."""
    package = module.rpartition(".")[0]
    if package not in _SOURCES:
        found = hashlib.sha256()
        where = importlib.import_module(package).__path__[0]
        for path in sorted(Path(where).glob("*.py")):
            found.update(path.read_bytes())
        _SOURCES[package] = found.hexdigest()[:24]
    return _SOURCES[package]


# ---- the child ------------------------------------------------------------------------------------


class _Flat(nn.Module):
    """A step function of a flat list of tensors, its numbers fixed."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], args: list[Any]) -> None:
        super().__init__()
        self._function, self._args = function, args

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        return tuple(self._function(*(_fill(arg, left) for arg in self._args)))


def _fill(shape: Any, tensors: Any) -> Any:
    """The argument that `_shape_of` described, with the next of `tensors`."""
    if "tensor" in shape:
        return next(tensors)
    if "items" in shape:
        items = [_fill(item, tensors) for item in shape["items"]]
        kind = _named(shape["tuple"])
        return tuple(items) if kind is tuple else kind(*items)
    return shape["value"]


def _examples(shape: Any) -> list[Tensor]:
    if "tensor" in shape:
        size, stride, kind, device = shape["tensor"]
        return [torch.empty_strided(size, stride, dtype=getattr(torch, kind), device=device).zero_()]
    return [x for item in shape.get("items", ()) for x in _examples(item)]


def _named(name: str) -> Any:
    module, _, qualname = name.partition(":")
    return getattr(importlib.import_module(module), qualname)


def compile_job(job: dict[str, Any], path: Path) -> None:
    """Write the package of one job to `path`, whole or not at all."""
    examples = tuple(x for arg in job["args"] for x in _examples(arg))
    torch.set_num_threads(job["threads"])
    module = _Flat(_named(job["function"]), job["args"])
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with torch.no_grad():
            program = torch.export.export(module, examples)
            torch._inductor.aoti_compile_and_package(program, package_path=str(unfinished))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def main(order: str) -> None:
    asked = json.loads(order)
    signal.alarm(int(asked["seconds"]))  # ends even when nobody is left to end us
    os.nice(10)
    compile_job(asked["job"], Path(asked["path"]))


if __name__ == "__main__":
    main(sys.argv[1])
