"""Runs a function of tensors as one recorded sequence of device calls, where the device can do that.

A DreamerV3 update is thousands of small launches, which keep a GPU waiting for the host; as one CUDA graph it
is a single launch. The function must look at no value, draw no random number and keep its state in tensors
that it changes in place. Used by agents around their whole update; `learner.transfer` brings the inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Literal, Protocol

import torch
from torch import Tensor

from learner.distributed import rank_count

log = logging.getLogger(__name__)

GraphSetting = Literal["auto", "off"]
Tensors = dict[str, Tensor]


class Recording(Protocol):
    """A recorded call. `outputs` are overwritten by every replay."""

    outputs: Tensors

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Records what a call does to the device."""

    executes: bool  # whether recording a call also carries it out
    warmups: int  # ordinary calls before one is recorded

    def warm(self, call: Callable[[], Tensors]) -> Tensors: ...  # an ordinary call that prepares recording
    def record(self, call: Callable[[], Tensors]) -> Recording: ...  # Raises: RuntimeError when it cannot


def make_recorder(device: torch.device, setting: GraphSetting) -> Recorder | None:
    """What records on this device; None where calls are simply made, with a log line that says why."""
    if device.type != "cuda":
        return None
    if setting == "off":
        log.info("updates are not captured", extra={"why": "graph is off"})
        return None
    if rank_count() > 1:
        log.info(
            "updates are not captured", extra={"why": f"{rank_count()} learner ranks exchange gradients"}
        )
        return None
    return CudaRecorder(device)


class GraphedStep:
    """Calls `function`; after the warm-ups, calls with inputs of the same shapes replay a recording of it.

    The warm-ups are ordinary ones, so nothing is computed that does not count. A recording that fails is
    logged once and not tried again: from then on the function is simply called.
    """

    def __init__(self, function: Callable[..., Tensors], recorder: Recorder | None) -> None:
        self._function, self._recorder = function, recorder
        self._key: Hashable = None
        self._calls = 0  # with inputs of this shape
        self._inputs: Tensors = {}
        self._recording: Recording | None = None

    @property
    def replays(self) -> bool:
        """Whether the newest call was a replay."""
        return self._recording is not None

    def __call__(self, inputs: Tensors, *static: Hashable) -> Tensors:
        """`function(inputs, *static)`. The outputs belong to the caller; the inputs may change afterwards.

        static: what the course of the function depends on besides names and shapes of its inputs.
        """
        recorder = self._recorder
        if recorder is None:
            return self._function(inputs, *static)
        key = (static, tuple((name, tuple(x.shape), x.dtype) for name, x in inputs.items()))
        if key != self._key:
            self._key, self._calls, self._recording, self._inputs = key, 0, None, {}
        self._calls += 1
        if self._calls <= recorder.warmups:
            return recorder.warm(lambda: self._function(inputs, *static))
        if self._recording is None:
            return self._record(recorder, inputs, static)
        for name, static_input in self._inputs.items():
            static_input.copy_(inputs[name])
        self._recording.replay()
        return self._outputs(self._recording)

    def _record(self, recorder: Recorder, inputs: Tensors, static: tuple[Hashable, ...]) -> Tensors:
        self._inputs = {name: x.clone() for name, x in inputs.items()}
        try:
            recording = recorder.record(lambda: self._function(self._inputs, *static))
        except RuntimeError as error:  # whatever the driver or an operation refuses: nothing has run
            log.warning("update not captured, it runs launch by launch", extra={"why": str(error)})
            self._recorder, self._inputs = None, {}
            return self._function(inputs, *static)
        self._recording = recording
        if not recorder.executes:
            recording.replay()
        log.info("update captured", extra={"inputs": len(inputs), "static": list(static)})
        return self._outputs(recording)

    @staticmethod
    def _outputs(recording: Recording) -> Tensors:
        # The next replay overwrites the recording's own outputs, perhaps before they have been copied away.
        return {name: output.clone() for name, output in recording.outputs.items()}


class CudaRecorder:
    """Records on a stream of its own as a CUDA graph with a private memory pool."""

    executes = False
    warmups = 3  # libraries choose algorithms and allocate workspaces in them

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def warm(self, call: Callable[[], Tensors]) -> Tensors:
        """The call on the recording stream, between what was launched before and what will be after it."""
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            outputs = call()
        main.wait_stream(self._stream)
        for output in outputs.values():
            output.record_stream(main)
        return outputs

    def record(self, call: Callable[[], Tensors]) -> CudaRecording:
        main = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the threads that draw batches may allocate meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                outputs = call()
        except RuntimeError:
            torch.cuda.set_stream(main)  # a capture that fails to end leaves its own stream current
            raise
        return CudaRecording(graph, outputs)


class CudaRecording:
    """A CUDA graph and the tensors it writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Tensors) -> None:
        self._graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self._graph.replay()
