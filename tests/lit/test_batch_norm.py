"""Batch norms estimated anew have the mean statistics of the batches, and nothing else changes."""

import copy

import torch
from torch import nn

from dqss.lit.batch_norm import reestimate
from tests.support.nets import cnn, images


def test_statistics_are_the_mean_over_the_batches() -> None:
    model = cnn()
    before = copy.deepcopy(model.state_dict())
    batches = [images(4) + shift for shift in (0.0, 1.0, 5.0)]
    with torch.no_grad():
        seen = [model[0](batch) for batch in batches]
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.transpose(0, 1).flatten(1).var(1, unbiased=True) for x in seen]).mean(0)
    assert reestimate(model, batches) == 1
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert not model.training and model[1].momentum == 0.1
    for name, value in model.state_dict().items():
        assert name.startswith("1.") or torch.equal(value, before[name])


def test_no_batches_leave_everything_as_it_was() -> None:
    model = cnn()
    before = copy.deepcopy(model.state_dict())
    assert reestimate(model, []) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert reestimate(nn.Linear(2, 2), [torch.zeros(1, 2)]) == 0
