"""A language model goes the same way: tokens in, [B, T, vocabulary] out, the head tied to the embedding."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dqss
from dqss.apply import apply_strategy
from dqss.choice import OPERANDS
from dqss.discretize import RefineSettings
from dqss.fused import fused
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.losses import KLDivergence
from dqss.samples import split
from tests.support.llama import Llama, Tokenizer
from tests.support.nets import small_space

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
LENGTH, COUNT = 32, 12


@pytest.fixture(scope="module")
def llama(shared_data: Path) -> tuple[Llama, Tokenizer]:
    folder = shared_data / "lm"
    return Llama.load(folder / "stories260K.bin"), Tokenizer(folder / "tok512.bin", 512)


@pytest.fixture(scope="module")
def tokens(llama: tuple[Llama, Tokenizer], shared_data: Path) -> Tensor:
    """``[12, 32]`` from the beginning of wikitext-2."""
    text = (shared_data / "lm" / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")[:1500]
    ids = llama[1].encode(text)
    return torch.tensor(ids[: COUNT * LENGTH]).view(COUNT, LENGTH)


@pytest.fixture(autouse=True)
def _light() -> Iterator[None]:
    """Two steps are over long before a compiler is, or before threads have met on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fused(False):
        yield
    torch.set_num_threads(threads)


@torch.no_grad()
def next_token_loss(model: torch.nn.Module, tokens: Tensor) -> float:
    return float(F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def test_the_model_and_its_tokenizer_are_read_rightly(llama: tuple[Llama, Tokenizer], tokens: Tensor) -> None:
    model, tokenizer = llama
    ids = tokenizer.encode(STORY)
    assert tokenizer.decode(ids) == STORY and len(ids) < 0.4 * len(STORY)
    strange = "naïve 日本 @-@"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    assert next_token_loss(model, torch.tensor(ids)[None]) < 0.1 * math.log(512)
    assert next_token_loss(model, tokens) < 0.95 * math.log(512)  # it has only ever seen stories


def test_two_steps_of_search(llama: tuple[Llama, Tokenizer], tokens: Tensor, tmp_path: Path) -> None:
    model, tokenizer = llama
    settings = PTQSettings(steps=2, batch_size=4, refine=RefineSettings(passes=4), discrete_every=0)
    result = search_ptq(model, tokens, small_space(6, products=True), settings, run_dir=tmp_path)
    assert len(result.history) == 2 and result.metrics["distance"] == "kl"
    # Every projection and the head, weights and inputs; the embedding is no layer.
    assert set(result.bundle.strategy.layers) == {
        *(f"blocks.{k}.attention.{w}" for k in range(5) for w in ("wq", "wk", "wv", "wo")),
        *(f"blocks.{k}.{w}" for k in range(5) for w in ("w1", "w2", "w3")),
        "head",
    }
    # Causal attention is one function: queries by keys and probabilities by values.
    products = result.bundle.strategy.products
    assert list(products) == [f"blocks.{k}.attention.product0" for k in range(5)]
    assert all(set(product.operands) == set(OPERANDS["attention"]) for product in products.values())
    searched, best = (result.metrics[row]["selection"]["distance"] for row in ("searched", "best_uniform"))
    assert 0 < searched <= best

    applied = apply_strategy(model, dqss.load(tmp_path))
    story = torch.tensor(tokenizer.encode(STORY))[None]
    chosen = result.discretized.assignments[result.discretized.exported]
    with torch.no_grad(), result.supernet.assign(chosen):
        assert torch.equal(applied(tokens), result.supernet(tokens))
        assert torch.equal(applied(story), result.supernet(story))  # another length
    assert torch.equal(applied.embedding.weight, model.embedding.weight)
    assert not torch.equal(applied.head.weight, model.head.weight)
    assert model.head.weight is model.embedding.weight
    assert next_token_loss(applied, story) < 0.5 * math.log(512)
    with torch.no_grad():
        selection = tokens[split(COUNT, settings.parts, 0)[1]]
        kl = KLDivergence()(applied(selection), model(selection))
    assert float(kl) == pytest.approx(searched, rel=1e-3, abs=1e-6)
