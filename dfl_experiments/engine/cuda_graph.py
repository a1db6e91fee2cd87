"""The whole training step as one CUDA graph: one launch in place of the hundreds that keep a small network waiting.

Forward pass, local modules, error signals, alignment and both optimizers are recorded once and replayed on the next
batch copied to where the recorded one lay. The learning rate lives on the device, so a change of it needs no new graph.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from dfl_experiments.engine.learner import Learner

log = logging.getLogger(__name__)

WARM_UP = 3  # eager steps before a capture: optimizers make their state, libraries choose their kernels


def renew_generator(device: torch.device) -> None:
    """Let the device's default generator draw on, which a capture that fails leaves waiting for the capture's end."""
    left = torch.cuda.default_generators[device.index]
    fresh = torch.Generator(device)
    fresh.set_state(left.get_state())
    left.graphsafe_set_state(fresh.graphsafe_get_state())


@dataclass(frozen=True)
class Recording:
    """A captured step, where it reads its batch from and where it leaves its row."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    target: Tensor
    row: Tensor


class CapturedStep:
    """Calls like `Learner.step`, and gives the same to rounding: eagerly at first, then as a replayed CUDA graph.

    A batch of any other size than `batch_size` stays eager, and so does every step after a capture that fails, which
    one warning tells. Steps that measure alignment and steps that do not are recorded apart.
    """

    def __init__(self, learner: Learner, batch_size: int, device: torch.device) -> None:
        self.learner = learner
        self.batch_size = batch_size
        self.stream = torch.cuda.Stream(device)
        self.recordings: dict[bool, Recording] = {}
        self.eager_steps = {False: 0, True: 0}
        self.failed = False

    def __call__(self, x: Tensor, target: Tensor, align: bool = False) -> Tensor:
        """x: (N, *h_0), target: (N,), on the device. The row is overwritten by the next call."""
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
        # beside the main stream, as the capture will be: some libraries keep their workspaces by stream
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
            # other threads, W&B's say, may go on using the device meanwhile
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                row = self.learner.step(x, target, align)
        finally:
            torch.cuda.set_stream(main)  # where a capture that fails does not return
        return Recording(graph, x, target, row)

    def _give_up(self, error: RuntimeError, x: Tensor, target: Tensor, align: bool) -> Tensor:
        self.failed = True
        self.recordings.clear()  # with the memory that a recording of the other kind holds
        torch.cuda.synchronize()
        renew_generator(self.stream.device)
        for optimizer in self.learner.optimizers:
            optimizer.zero_grad()  # gradients that were recorded, never computed
        reason = str(error).strip().partition("\n")[0]
        log.warning("the step cannot be captured as a CUDA graph and stays eager: %s", reason)
        return self.learner.step(x, target, align)
