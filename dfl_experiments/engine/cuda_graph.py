"""Replay the whole training step as one CUDA graph: one launch in place of hundreds, which slow a small network.

The graph holds forward pass, local modules, error signals, alignment and both optimizers. Each batch is copied into the
tensors of the recorded batch. The learning rate is a tensor on the device, so it can change without a new graph.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from dfl_experiments.engine.learner import Learner

log = logging.getLogger(__name__)

WARM_UP = 3  # eager steps before a capture, in which optimizers make their state and libraries choose kernels


def renew_generator(device: torch.device) -> None:
    """Renew the state of the device's default generator, which a failed capture leaves unusable."""
    default = torch.cuda.default_generators[device.index]
    fresh = torch.Generator(device)
    fresh.set_state(default.get_state())
    default.graphsafe_set_state(fresh.graphsafe_get_state())


@dataclass(frozen=True)
class Recording:
    """A captured step with its fixed tensors."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    """(N, *h_0), input of the graph."""
    target: Tensor
    """(N,), input of the graph."""
    row: Tensor
    """The step's metrics, output of the graph."""


class CapturedStep:
    """A replacement for `Learner.step` with equal results up to rounding: first eager, then a replayed CUDA graph.

    Batches of another size than `batch_size` run eagerly. So do all steps after a failed capture, with one warning.
    Steps with and without a measurement of alignment have a graph each.
    """

    def __init__(self, learner: Learner, batch_size: int, device: torch.device) -> None:
        self.learner = learner
        self.batch_size = batch_size
        self.stream = torch.cuda.Stream(device)
        self.recordings: dict[bool, Recording] = {}
        self.eager_steps = {False: 0, True: 0}
        self.failed = False

    def __call__(self, x: Tensor, target: Tensor, align: bool = False) -> Tensor:
        """Run one step and return its metrics; the next call overwrites them. Arguments: see `Learner.step`."""
        if self.failed or len(target) != self.batch_size:
            return self.learner.step(x, target, align)
        if align not in self.recordings:
            if self.eager_steps[align] < WARM_UP:
                return self._warm_up(x, target, align)
            try:
                self.recordings[align] = self._record(x, target, align)
            except RuntimeError as error:  # what CUDA and its allocator raise
                return self._give_up(error, x, target, align)
        recording = self.recordings[align]
        recording.x.copy_(x)
        recording.target.copy_(target)
        recording.graph.replay()
        return recording.row

    def _warm_up(self, x: Tensor, target: Tensor, align: bool) -> Tensor:
        # on the stream of the later capture, because some libraries keep a workspace for each stream
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            row = self.learner.step(x, target, align)
        main.wait_stream(self.stream)
        self.eager_steps[align] += 1
        return row

    def _record(self, x: Tensor, target: Tensor, align: bool) -> Recording:
        graph, x, target = torch.cuda.CUDAGraph(), x.clone(), target.clone()
        main = torch.cuda.current_stream()
        try:
            # other threads, for example of W&B, may use the device meanwhile
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                row = self.learner.step(x, target, align)
        finally:
            torch.cuda.set_stream(main)  # a failed capture does not restore it
        return Recording(graph, x, target, row)

    def _give_up(self, error: RuntimeError, x: Tensor, target: Tensor, align: bool) -> Tensor:
        self.failed = True
        self.recordings.clear()  # releases the memory of the other graph
        torch.cuda.synchronize()
        renew_generator(self.stream.device)
        for optimizer in self.learner.optimizers:
            optimizer.zero_grad()  # the gradients were recorded, but never computed
        reason = str(error).strip().partition("\n")[0]
        log.warning("the step cannot be captured as a CUDA graph and stays eager: %s", reason)
        return self.learner.step(x, target, align)
