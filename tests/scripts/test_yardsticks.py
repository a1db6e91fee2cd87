"""The code that the benchmark compares with the engine computes the same numbers as the engine."""

import copy

import pytest
import torch
from conftest import Tiny
from yardsticks import CLASSES, PublishedLas


@pytest.mark.parametrize("model", ["fc", "conv3", "conv3_bn"])
def test_the_published_way_of_las_is_las(model):
    t = Tiny(
        "las", model, "protocol.local_reduction=half_sum", "optimizer.lr=1e-4", classes=CLASSES
    )
    theirs = PublishedLas(copy.deepcopy(t.net), [(None, 0)], 1)
    theirs.locals.double()
    for own, module in zip(theirs.locals, t.method.local_modules.values(), strict=True):
        own.weight.data.copy_(module.weight.data)
    for _ in range(3):
        t.learner.step(t.x, t.target)
        theirs.step(t.x, t.target)
    pairs = zip((*theirs.blocks, theirs.head), (*t.net.blocks, t.net.head), strict=True)
    for block, other in pairs:
        for a, b in zip(block.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
