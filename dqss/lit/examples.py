"""The inputs that the exported strategy changes most, with what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dqss.calls import call_model, first_tensor
from dqss.data.bicubic import resize
from dqss.measure import Context, Evaluator, to_device
from dqss.report.pictures import crops, is_picture, thumbnail
from dqss.report.record import Answer, Example

FLOAT, UNIFORM, SEARCHED = "float", "best uniform", "searched"
BICUBIC, WANTED = "bicubic", "original"
"""Of networks that enlarge pictures: what interpolation makes of the input, and what it was made from."""


def most_changed(
    evaluator: Evaluator, distances: list[float], contexts: Mapping[str, Context], count: int
) -> list[Example]:
    """The ``count`` inputs of the selection part with the largest distance, largest first.

    Args:
        evaluator: of the search.
        distances: of the exported strategy on each input of the selection part.
        contexts: networks to run them in; :data:`FLOAT` and :data:`SEARCHED` at least.
        count: 0 for none: a page may be shown to people who may not see the inputs.
    """
    order = sorted(range(len(distances)), key=lambda k: -distances[k])[:count]
    part = evaluator.parts["select"]
    return [_example(evaluator, part[k], distances[k], contexts) for k in order]


def shows_pictures(evaluator: Evaluator) -> bool:
    """Whether the network's outputs are pictures."""
    output = evaluator.reference([evaluator.parts["select"][0]])[0]
    return is_picture(output)


@torch.no_grad()
def _example(evaluator: Evaluator, index: int, distance: float, contexts: Mapping[str, Context]) -> Example:
    inputs = evaluator.samples.batch([index])
    outputs = {name: _run(evaluator, inputs, context) for name, context in contexts.items()}
    source = first_tensor(inputs)[0]
    answers, pictures, target = {}, {}, evaluator.samples.targets([index])
    if is_picture(outputs[FLOAT]):
        pictures, target = crops(source, framed(source, outputs, target), FLOAT, SEARCHED), None
    else:
        if is_picture(source):
            pictures = {"input": thumbnail(source)}
        if outputs[FLOAT].ndim == 1:
            answers = {name: _answer(outputs[name]) for name in (FLOAT, SEARCHED)}
    label = None if target is None or target.numel() != 1 else int(target)
    return Example(index=index, distance=distance, target=label, answers=answers, pictures=pictures)


def framed(source: Tensor, outputs: dict[str, Tensor], target: Tensor | None) -> dict[str, Tensor]:
    """The outputs of a network that enlarges pictures between what it is up against and what it is after."""
    height, width = outputs[FLOAT].shape[1:]
    if not is_picture(source) or source.shape[0] != outputs[FLOAT].shape[0] or height <= source.shape[1]:
        return outputs
    framed = {BICUBIC: resize(source.float().cpu(), height, width), **outputs}
    if target is not None and target[0].shape == outputs[FLOAT].shape:
        framed[WANTED] = target[0].float().cpu()
    return framed


def _run(evaluator: Evaluator, inputs: Any, context: Context) -> Tensor:
    with context():
        output = call_model(evaluator.supernet, to_device(inputs, evaluator.device))
    return evaluator.distance.read(output)[0].float().cpu()


def _answer(logits: Tensor) -> Answer:
    probabilities = torch.softmax(logits, dim=0)
    best = int(probabilities.argmax())
    return Answer(best=best, probability=float(probabilities[best]))
