"""The published way of LAS, which the benchmark compares with the engine, computes the same numbers."""

import copy

import pytest
import torch
from conftest import Tiny
from yardsticks import CLASSES, PublishedLas


@pytest.mark.parametrize("model", ["fc", "conv3", "conv3_bn"])
def test_published_las_equals_las_of_the_engine(model):
    t = Tiny(
        "las", model, "protocol.local_reduction=half_sum", "optimizer.lr=1e-4", classes=CLASSES
    )
    published = PublishedLas(copy.deepcopy(t.net), [(None, 0)], 1)
    published.locals.double()
    for copied, module in zip(published.locals, t.method.local_modules.values(), strict=True):
        copied.weight.data.copy_(module.weight.data)
    for _ in range(3):
        t.learner.step(t.x, t.target)
        published.step(t.x, t.target)
    blocks, expected_blocks = (*published.blocks, published.head), (*t.net.blocks, t.net.head)
    for block, expected in zip(blocks, expected_blocks, strict=True):
        for weight, other in zip(block.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-7, atol=1e-10)
