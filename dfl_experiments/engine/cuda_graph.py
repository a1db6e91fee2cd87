"""Replay the whole training step as one CUDA graph.

One launch of the graph replaces hundreds of kernel launches, whose overhead slows a small network. The graph contains
the forward pass, local modules, error signals, alignment and both optimizers. Each batch is copied into the
graph's input tensors. The learning rate is a tensor on the device, so it can change without a new graph.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from dfl_experiments.engine.learner import Learner

log = logging.getLogger(__name__)

# eager steps before a capture, in which optimizers create their state and libraries choose kernels
WARM_UP = 3


def renew_generator(device: torch.device) -> None:
    """Make the device's default random generator usable again after a failed capture."""
    default = torch.cuda.default_generators[device.index]
    fresh = torch.Generator(device)
    fresh.set_state(default.get_state())
    default.graphsafe_set_state(fresh.graphsafe_get_state())


@dataclass(frozen=True)
class Recording:
    """A captured training step with its input and output tensors."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    """(N, *h_0), input of the graph."""
    target: Tensor
    """(N,), input of the graph."""
    row: Tensor
    """The step's metrics, output of the graph."""


class CapturedStep:
    """A replacement for `Learner.step`, with equal results up to rounding.

    The first steps run eagerly; later steps replay a CUDA graph. Batches of another size than `batch_size` run eagerly.
    After a failed capture all steps run eagerly, and one warning is logged. There are two graphs: one for steps that
    measure alignment, and one for the other steps.
    """

    def __init__(self, learner: Learner, batch_size: int, device: torch.device) -> None:
        self.learner = learner
        self.batch_size = batch_size
        self.stream = torch.cuda.Stream(device)
        self.recordings: dict[bool, Recording] = {}
        self.eager_steps = {False: 0, True: 0}
        self.failed = False

    def __call__(self, x: Tensor, target: Tensor, align: bool = False) -> Tensor:
        """Run one step and return the tensor of its metrics. The next call overwrites this tensor.

        Arguments: see `Learner.step`.
        """
        if self.failed or len(target) != self.batch_size:
            return self.learner.step(x, target, align)
        if align not in self.recordings:
            if self.eager_steps[align] < WARM_UP:
                return self._warm_up(x, target, align)
            try:
                self.recordings[align] = self._record(x, target, align)
            except RuntimeError as error:  # raised by CUDA and its allocator
                return self._give_up(error, x, target, align)
        recording = self.recordings[align]
        recording.x.copy_(x)
        recording.target.copy_(target)
        recording.graph.replay()
        return recording.row

    def _warm_up(self, x: Tensor, target: Tensor, align: bool) -> Tensor:
        # use the stream of the later capture, because some libraries keep a workspace for each stream
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
            # "thread_local": other threads, for example of W&B, may use the device during the capture
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                row = self.learner.step(x, target, align)
        finally:
            torch.cuda.set_stream(main)  # a failed capture does not restore the stream
        return Recording(graph, x, target, row)

    def _give_up(self, error: RuntimeError, x: Tensor, target: Tensor, align: bool) -> Tensor:
        self.failed = True
        self.recordings.clear()  # releases the memory of a graph that was captured before
        torch.cuda.synchronize()
        renew_generator(self.stream.device)
        for optimizer in self.learner.optimizers:
            # the failed capture recorded these gradients but did not compute them
            optimizer.zero_grad()
        reason = str(error).strip().partition("\n")[0]
        log.warning(
            "the training step cannot be captured as a CUDA graph, so it runs eagerly: %s", reason
        )
        return self.learner.step(x, target, align)
