"""Training networks that enlarge pictures: stages, averaged weights, loss, and going on after a stop."""

import copy
import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dqss.contrastive import ContrastiveLoss
from dqss.data.bicubic import resize
from dqss.data.digits import Digits
from dqss.data.pictures import Pictures
from dqss.errors import DataError, ModelError, NonFiniteError, UserError
from dqss.image_quality import psnr_y
from dqss.lit.checkpoint import SafeKeeping
from dqss.lit.recipe import Trained, TrainingRun
from dqss.lit.super_resolution import SuperResolutionTraining, measure, measure_bicubic
from dqss.lit.super_resolution_recipe import SuperResolutionRecipe
from dqss.models.resnet_cifar import CifarResNet
from dqss.models.rlfn import RLFN
from dqss.models.super_resolution import input_of
from dqss.progress import Interrupted, Reporter
from tests.support.pictures import write_picture


@pytest.fixture
def data(tmp_path: Path) -> Pictures:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        write_picture(folder / f"{number}.png", 44 + number, 50, seed=number)
    found = Pictures(folder, folder, patch=16)
    found.configure(input_of(network()))
    return found


def network() -> RLFN:
    torch.manual_seed(0)
    return RLFN(2, channels=4, blocks=1)


def recipe(**changes: object) -> SuperResolutionRecipe:
    given = {"stages": (4, 3), "batch_size": 2, "measure_every": 2, "checkpoint_every": 1, "decay": 0.5}
    return SuperResolutionRecipe(**{**given, **changes})  # type: ignore[arg-type]


def run(
    found: SuperResolutionRecipe, data: Pictures, folder: Path, reporter: Reporter | None = None
) -> Trained:
    trainer = {"accelerator": "cpu", "deterministic": True}
    return found.train(network(), data, TrainingRun(folder, 3, trainer, reporter or Reporter()))


def rows(folder: Path) -> list[dict[str, float]]:
    with open(folder / "history.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def by_hand(data: Pictures, found: SuperResolutionRecipe, seed: int) -> RLFN:
    """The same training written out: the patches of each step, Adam, restarts, averages."""
    net, stages = network(), found.plan()
    average = copy.deepcopy(net)
    task = SuperResolutionTraining(net, data, stages, found.batch_size, found.decay, 2, seed)
    task._trainer = None
    count = stages.total * found.batch_size
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003))
    patches, contrast, step = data.patches(count), ContrastiveLoss(255.0), 0
    for number, length in enumerate(stages.steps):
        net.load_state_dict(average.state_dict())
        adam = torch.optim.Adam(net.parameters())
        for _ in range(length):
            adam.param_groups[0]["lr"] = stages.rate_at(step)
            chosen = order[step * found.batch_size : (step + 1) * found.batch_size].tolist()
            low, high = (torch.stack(part) for part in zip(*(patches[k] for k in chosen), strict=True))
            output = net(low)
            loss = F.l1_loss(output, high)
            weight = stages.contrastive[number]
            loss = loss + 255 * weight * contrast(output, high, resize(low, 32, 32))
            adam.zero_grad()
            loss.backward()
            adam.step()
            step += 1
            share = min(found.decay, step / (step + 10))
            with torch.no_grad():
                for kept, new in zip(average.parameters(), net.parameters(), strict=True):
                    kept.copy_(share * kept + (1 - share) * new)
    return average


def test_it_is_what_it_says_it_is(data: Pictures, tmp_path: Path) -> None:
    found = recipe(contrastive=[0.0, 0.25])
    expected = by_hand(data, found, 3).state_dict()
    trained = run(found, data, tmp_path)
    for key, value in trained.module.state_dict().items():
        torch.testing.assert_close(value, expected[key], msg=lambda text, key=key: f"{key}: {text}")


def test_history_has_the_course_and_the_last_row_is_what_was_reached(data: Pictures, tmp_path: Path) -> None:
    trained = run(recipe(), data, tmp_path)
    course = rows(tmp_path)
    assert [row["step"] for row in course] == [2, 4, 6, 7]
    assert [row["stage"] for row in course] == [1, 1, 2, 2]
    assert course[-1]["psnr"] == trained.score and "bicubic" in trained.words
    assert all(row["loss"] > 0 for row in course)


def test_training_learns(data: Pictures, tmp_path: Path) -> None:
    trained = run(recipe(stages=[60], measure_every=60, learning_rate=3e-3), data, tmp_path)
    untrained = measure(network(), data)
    assert untrained is not None and trained.score > untrained + 3


class StopsAfter(Reporter):
    """Asks for a stop after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps + 1  # the start is counted too

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.stop_signal = 15
        super().check()


# Between two rows of the history, and at the border of two stages.
@pytest.mark.parametrize("steps", [3, 4])
def test_stopped_and_gone_on_with_it_is_the_same(steps: int, data: Pictures, tmp_path: Path) -> None:
    whole = run(recipe(), data, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(recipe(), data, tmp_path / "stopped", StopsAfter(steps))
    again = run(recipe(), data, tmp_path / "stopped")
    assert again.score == whole.score and rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[key]), key


def test_killed_between_checkpoints_it_is_the_same(
    data: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = recipe(checkpoint_every=3)
    whole = run(found, data, tmp_path / "whole")
    keep = SafeKeeping.on_train_batch_end

    class Killed(BaseException):
        pass

    def kill(self: SafeKeeping, trainer, *args) -> None:  # type: ignore[no-untyped-def]
        keep(self, trainer, *args)
        if trainer.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SafeKeeping, "on_train_batch_end", kill)
        run(found, data, tmp_path / "killed")
    assert run(found, data, tmp_path / "killed").score == whole.score
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_bicubic_is_measured_on_the_same_pictures(data: Pictures) -> None:
    loader = data.val_dataloader()
    assert loader is not None
    each = [psnr_y(resize(low, *high.shape[2:]), high, peak=255.0, border=2) for low, high in loader]
    assert measure_bicubic(data) == pytest.approx(float(torch.cat(each).mean()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, r"recipe\.stages=\[\]"),
        ({"stages": [3, 0]}, r"recipe\.stages=\[3, 0\]"),
        ({"contrastive": [0.1]}, r"recipe\.contrastive=\[0.1\].*2 stages"),
        ({"contrastive": -1.0}, r"recipe\.contrastive=-1"),
        ({"batch_size": 0}, r"recipe\.batch_size=0"),
        ({"decay": 1.0}, r"recipe\.decay=1"),
        ({"max_minutes": 0.0}, r"recipe\.max_minutes=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(**changes)


def test_other_data_and_other_networks_are_refused(data: Pictures, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data=digits has no pictures to enlarge: use photographs"):
        recipe().check(Digits())
    where = TrainingRun(tmp_path, 0, {"accelerator": "cpu"}, Reporter())
    with pytest.raises(ModelError, match="CifarResNet is no network that enlarges pictures"):
        recipe().train(CifarResNet(20), data, where)


def test_losses_that_explode_are_one_line(data: Pictures, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"at step \d+: lower recipe\.learning_rate"):
        run(recipe(learning_rate=1e30), data, tmp_path)
