"""Adam in relative steps, and beside a mean field."""

import torch
from torch import nn

from dqss.decision import Decision, Sampled, draw_all
from dqss.lit.mean_field import MeanField
from dqss.lit.optimizer import RELATIVE, RelativeAdamW, WithMeanField


def test_relative_steps_scale_with_the_parameter() -> None:
    """Stretched values with gradients as if the loss were the same stay stretched by the same factor."""
    factors = torch.tensor([1e-3, 1.0, 1e3])
    small, large = (nn.Parameter(torch.tensor([0.5, 1.0, 2.0]) * unit) for unit in (1.0, 100.0))
    both = [
        RelativeAdamW([{"params": [p], "lr": 0.05, RELATIVE: True, "weight_decay": 0.0}])
        for p in (small, large)
    ]
    for step in range(5):
        gradient = torch.sin(factors + step)
        small.grad, large.grad = gradient.clone(), gradient / 100
        for optimizer in both:
            optimizer.step()
    torch.testing.assert_close(large, 100 * small, rtol=1e-4, atol=0)


def test_the_first_relative_step_is_a_share_of_the_value() -> None:
    parameter = nn.Parameter(torch.tensor([1e-4, 10.0]))
    parameter.grad = torch.tensor([3.0, -7.0])
    before = parameter.detach().clone()
    RelativeAdamW([{"params": [parameter], "lr": 0.01, RELATIVE: True, "weight_decay": 0.0}]).step()
    # Near zero, in comparison with the others, it moves as a tenth of their mean.
    unit = torch.tensor([0.1 * float(before.mean()), 10.0])
    torch.testing.assert_close(parameter.detach(), before - 0.01 * torch.tensor([1.0, -1.0]) * unit)


def test_other_groups_are_plain_adam() -> None:
    ours, theirs = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    optimizers = RelativeAdamW([{"params": [ours], "lr": 0.1}]), torch.optim.AdamW([theirs], lr=0.1)
    for step in range(4):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.tensor([1.0 + step, 0.3])
            optimizer.step()
    assert torch.equal(ours, theirs)


def _decided(steps: int, reload_at: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and logits after steps on a loss that prefers the third option."""
    decision, weight = Decision("d", "abc"), nn.Parameter(torch.tensor([1.0]))
    decision.relaxation = Sampled()

    def make() -> WithMeanField:
        return WithMeanField(torch.optim.AdamW([weight], lr=0.1), MeanField([decision], lambda done: 0.5))

    optimizer = make()
    for step in range(steps):
        if step == reload_at:
            kept, optimizer = optimizer.state_dict(), make()
            optimizer.load_state_dict(kept)
        draw_all([decision], [torch.Generator().manual_seed(step)])
        optimizer.zero_grad()
        loss = (decision.weights() * torch.tensor([3.0, 2.0, 1.0])).sum() + weight.square().sum()
        loss.backward()
        optimizer.step()
    return weight.detach(), decision.logits.detach()


def test_one_step_moves_weights_and_sets_logits() -> None:
    weight, logits = _decided(8)
    assert float(weight) < 0.5 and int(logits.argmax()) == 2


def test_its_state_comes_back() -> None:
    for one, other in zip(_decided(8), _decided(8, reload_at=4), strict=True):
        assert torch.equal(one, other)


def test_lightning_and_schedules_see_one_optimizer_with_all_groups() -> None:
    decision, weight = Decision("d", "abc"), nn.Parameter(torch.ones(1))
    optimizer = WithMeanField(torch.optim.AdamW([weight], lr=0.1), MeanField([decision], lambda done: 0.5))
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5, lambda step: 1.0])
    assert len(optimizer.param_groups) == 2 and optimizer.others.param_groups[0]["lr"] == 0.05
