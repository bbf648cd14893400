"""Products of two activations in a supernet, and in what a strategy makes of the model."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.apply import apply_strategy
from dqss.bundle import Bundle
from dqss.errors import NonFiniteError, SearchSpaceError, StrategyError
from dqss.space import SearchSpace
from dqss.supernet import Supernet
from dqss.uniform import uniform_assignments
from tests.support.nets import (
    THREE,
    bundle_of,
    calibrated,
    cnn,
    evaluator_of,
    every_other,
    images,
    output,
    prepared_supernet,
    small_space,
)

WIDTH = 6


def space(bits: int = 3, algorithms: Any = THREE, **options: Any) -> SearchSpace:
    return small_space(bits, algorithms, products=True, **options)


def products_only(bits: int = 3, algorithms: Any = THREE, **options: Any) -> SearchSpace:
    """Nothing but products, so that what changes the output is known."""
    return space(bits, algorithms, skip=["*"], force_types=["Product"], **options)


class Pair(nn.Module):
    """The one-convolution equivalent: the product of two inputs, nothing else."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right


class SDPA(nn.Module):
    """Attention as one function."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """Attention in the modules' own words: one product function after another, and a parent's."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.qkv, self.head, self.fused = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return self.head(F.scaled_dot_product_attention(q, k, v))
        return self.head(torch.softmax(q @ k.mT, -1) @ v)


class Outer(nn.Module):
    """Multiplies around and between the modules that multiply themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = Block(), nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.register_buffer("steps", torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        gram = x @ x.mT
        x = gram @ (x @ self.table)
        y = self.inner(x)
        return (y @ self.steps.T)[..., :1] * torch.einsum("bij,bkj->bik", y, self.inner(x))


NETWORKS = {
    "matmul": (Block, lambda: torch.randn(4, 5, WIDTH)),
    "attention": (lambda: Block(True), lambda: torch.randn(4, 5, WIDTH)),
    "nested": (Outer, lambda: torch.randn(4, 5, WIDTH)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        lambda: {
            "src": torch.randn(3, 5, 8),
            "src_key_padding_mask": torch.arange(5) > torch.tensor([[4], [2], [3]]),
        },
    ),
}


@pytest.fixture(params=list(NETWORKS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    make, batch = NETWORKS[request.param]
    return make().eval(), batch()


def test_the_product_of_mixtures_is_the_sum_of_all_pairs() -> None:
    batch = torch.randn(2, 5, 4), torch.randn(2, 4, 3)
    supernet = calibrated(Pair(), batch, space=products_only())
    for decision in supernet.decisions.values():
        decision.logits.data.normal_()
    left, right = (quantizer for _, quantizer in supernet.products["product0"].operands())
    alpha, beta = left.decision.weights(), right.decision.weights()
    wanted = sum(
        alpha[i] * beta[j] * (left[i](batch[0]) @ right[j](batch[1])) for i in range(3) for j in range(3)
    )
    with supernet.mode("relaxed"):
        found = supernet(*batch)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - batch[0] @ batch[1]).abs().max() > 1e-2


def test_probabilities_by_values_are_the_sum_of_all_pairs() -> None:
    q, k, v = torch.randn(3, 2, 5, 4)
    supernet = calibrated(SDPA(), (q, k, v), space=products_only())
    operands = dict(supernet.products["product0"].operands())
    with torch.no_grad():
        for name, quantizer in operands.items():
            quantizer.decision.logits.normal_()
            if name in ("query", "key"):  # one of these, so that the scores are known
                quantizer.decision.logits.add_(torch.tensor([200.0, 0.0, 0.0]))
    scores = operands["query"][0](q) @ operands["key"][0](k).mT / 2
    p, values = operands["probabilities"], operands["value"]
    alpha, beta = p.decision.weights(), values.decision.weights()
    wanted = sum(
        alpha[i] * beta[j] * (p[i](torch.softmax(scores, -1)) @ values[j](v))
        for i in range(3)
        for j in range(3)
    )
    with supernet.mode("relaxed"):
        torch.testing.assert_close(supernet(q, k, v), wanted, rtol=1e-4, atol=1e-5)


def test_a_choice_is_that_candidate() -> None:
    q, k, v = torch.randn(3, 2, 5, 4)
    supernet = calibrated(SDPA(), (q, k, v), space=products_only())
    operands = dict(supernet.products["product0"].operands())
    for assignment in (every_other(supernet, start) for start in range(3)):
        chosen = {n: quantizer[assignment[quantizer.decision.name]] for n, quantizer in operands.items()}
        scores = chosen["query"](q) @ chosen["key"](k).mT / 2
        wanted = chosen["probabilities"](torch.softmax(scores, -1)) @ chosen["value"](v)
        with supernet.assign(assignment), torch.no_grad():
            found = supernet(q, k, v)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        with supernet.pinned(assignment):
            assert torch.equal(supernet(q, k, v), found)


def test_what_was_observed_is_the_range_of_each_operand() -> None:
    q, k, v = torch.randn(3, 2, 5, 4)
    supernet = calibrated(
        SDPA(), (q, k, v), (2 * q, k, v), space=products_only(bits=8, algorithms=["minmax"])
    )
    for name, quantizer in supernet.products["product0"].operands():
        seen = {"query": 2 * q, "key": k, "value": v}.get(name)
        if seen is None:
            seen = torch.cat([torch.softmax(f * q @ k.mT / 2, -1) for f in (1, 2)])
        width = max(float(seen.max()), 0) - min(float(seen.min()), 0)
        assert float(quantizer[0].scale) == pytest.approx(width / 255, rel=1e-5)


@torch.no_grad()
def test_float_mode_is_the_original_network(case: tuple[nn.Module, Any]) -> None:
    model, batch = case
    model.requires_grad_(False)
    torch.backends.mha.set_fastpath_enabled(False)
    wanted = output(model, batch)
    supernet = calibrated(model, batch, space=space())
    observed = []
    supernet.calibrate([batch], lambda index, found: observed.append(found))
    torch.backends.mha.set_fastpath_enabled(True)
    assert torch.equal(output(supernet, batch), wanted)
    assert torch.equal(observed[0], wanted)


def test_every_decision_gets_a_gradient(case: tuple[nn.Module, Any]) -> None:
    model, batch = case
    _, supernet = prepared_supernet(model, batch, space())
    operands = [name for product in supernet.products for name in supernet.decisions if product in name]
    assert len(operands) >= 4
    with supernet.mode("relaxed"):
        output(supernet, batch).square().sum().backward()
    for name, decision in supernet.decisions.items():
        assert decision.logits.grad is not None and decision.logits.grad.abs().max() > 0, name
    assert {id(p) for p in supernet.arch_parameters()} >= {
        id(p) for n, p in supernet.named_parameters() if n.endswith("logits")
    }


def test_errors_of_operands_are_weighed_by_their_gradients() -> None:
    """A key that every query gives nothing to may be clipped; the plain squares of values do not know."""

    class Ignores(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = torch.arange(k.shape[-2]) > 0
            return F.scaled_dot_product_attention(q, k, v, mask.expand(q.shape[-2], -1))

    q, k, v = torch.randn(3, 2, 9, 4)
    k[:, 0], v[:, 0] = 50.0, 50.0
    supernet = calibrated(Ignores(), (q, k, v), space=products_only(4, ["minmax", "mse", "hessian"]))
    operands = dict(supernet.products["product0"].operands())
    for name in ("key", "value"):
        minmax, mse, hessian = (float(operands[name][option].scale) for option in range(3))
        assert hessian < 0.5 * min(minmax, mse)


@torch.no_grad()
def test_applied_is_the_discrete_supernet_bit_for_bit(case: tuple[nn.Module, Any], tmp_path: Any) -> None:
    model, batch = case
    prepared, supernet = prepared_supernet(model, batch, space())
    assert supernet.products
    for start in range(3):
        assignment = every_other(supernet, start)
        with supernet.assign(assignment):
            wanted = output(supernet, batch)
            assert torch.equal(output(copy.deepcopy(supernet), batch), wanted)
        bundle = bundle_of(prepared, supernet, assignment, batch)
        bundle.save(tmp_path / str(start))
        applied = apply_strategy(model, Bundle.load(tmp_path / str(start)))
        with torch.inference_mode():
            assert torch.equal(output(applied, batch), wanted)
        for twin in (applied, copy.deepcopy(applied), pickle.loads(pickle.dumps(applied))):
            assert torch.equal(output(twin, batch), wanted)
        without = bundle.strategy.model_copy(update={"products": {}})
        less = apply_strategy(model, Bundle(without, bundle.tensors))
        assert not torch.equal(output(less, batch), wanted)
    assert torch._C._len_torch_function_stack() == 0
    assert list(bundle.strategy.products) == list(supernet.products)


@torch.no_grad()
def test_compiled_and_exported_it_multiplies_the_same(case: tuple[nn.Module, Any]) -> None:
    """Under a compiler a mode would see the functions inside ``scaled_dot_product_attention`` too."""
    model, batch = case
    prepared, supernet = prepared_supernet(model, batch, space())
    applied = apply_strategy(model, bundle_of(prepared, supernet, supernet.argmax(), batch))
    wanted = output(applied, batch)
    assert torch.equal(output(torch.compile(applied, backend="eager"), batch), wanted)
    inputs = ((), batch) if isinstance(batch, dict) else ((batch,), {})
    exported = torch.export.export(applied, *inputs, strict=False).module()
    torch.testing.assert_close(output(exported, batch), wanted)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_precision(dtype: torch.dtype, fused: bool) -> None:
    model, batch = Block(fused).eval().to(dtype), torch.randn(2, 5, WIDTH, dtype=dtype)
    prepared, supernet = prepared_supernet(model, batch, space())
    with supernet.mode("discrete"):
        wanted = supernet(batch)
    applied = apply_strategy(model, bundle_of(prepared, supernet, supernet.argmax(), batch))
    assert wanted.dtype == dtype and torch.equal(applied(batch), wanted)
    with supernet.mode("relaxed"):
        assert supernet(batch).dtype == dtype


def test_products_belong_to_the_innermost_module() -> None:
    supernet = calibrated(Outer(), torch.randn(4, 5, WIDTH), space=space())
    # product2 has a parameter for an operand, product3 a view of a buffer
    assert list(supernet.products) == [
        "product0", "product2", "inner.product0", "inner.product1", "product4",
    ]  # fmt: skip
    assert supernet.coverage.hidden_products == []


def test_numbers_count_products_with_weights() -> None:
    """Whether an operand is a weight cannot be seen once weights are quantized."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.inner.weight.T) @ x.mT

    model, batch = Reads().eval(), torch.randn(2, 3, 4)
    prepared, supernet = prepared_supernet(model, batch, space())
    assert list(supernet.products) == ["product1"]
    applied = apply_strategy(model, bundle_of(prepared, supernet, every_other(supernet), batch))
    with torch.no_grad(), supernet.assign(every_other(supernet)):
        assert torch.equal(applied(batch), supernet(batch))


class Varies(nn.Module):
    """Multiplies as often as there are inputs in the batch, and once in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.steady = Block()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for row in x:
            y = y @ (row.mT @ row)
        return self.steady(y / y.norm())


class Hides(nn.Module):
    """Torch's own attention, whose products nobody sees, and modules that cannot be extended."""

    class Copies(Block):
        def __deepcopy__(self, memo: Any) -> nn.Module:
            return Hides.Copies(self.fused)

    class Reduces(Block):
        def __reduce__(self) -> Any:
            return Hides.Reduces, (self.fused,)

    class Rows(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x @ x.mT @ x)

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_zero_attn=True)
        self.rows = Hides.Rows(nn.Linear(WIDTH, 3))
        self.more = nn.ModuleList([Hides.Copies(True), Hides.Reduces(True), Block(True)])
        self.more[2].forward = self.more[2].forward  # somebody else's wrapper would stand here

    def forward(self, x: Tensor) -> Tensor:
        y = self.rows(self.attention(x, x, x)[0]) + torch.matmul(x.long(), x.mT.long()).float().mean()
        return y + sum(module(x) for module in self.more)


def test_what_cannot_be_searched_is_listed_and_stays_in_float() -> None:
    batches = [torch.randn(2, 5, WIDTH), torch.randn(3, 5, WIDTH)]
    supernet = calibrated(Varies(), *batches, space=space())
    assert list(supernet.products) == ["steady.product0", "steady.product1"]
    varying = [f"product{k}" for k in range(6)]
    assert supernet.coverage.hidden_products == varying and not supernet.coverage.products
    with supernet.mode("discrete"):
        assert torch.isfinite(supernet(torch.randn(4, 5, WIDTH))).all()

    hides = calibrated(Hides().eval(), batches[0], space=space())
    assert not hides.products
    assert hides.coverage.hidden_products == [
        "attention.product0", "rows.product0", "rows.product1", "product0",
        "more.0.product0", "more.1.product0", "more.2.product0",
    ]  # fmt: skip


def test_sparse_operands_are_no_trouble() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("edges", torch.eye(5).to_sparse())
            self.register_buffer("nothing", torch.zeros(0, 5))
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(torch.matmul(self.edges, torch.matmul(torch.eye(5).to_sparse(), x)))
            return y + (self.nothing.T @ self.nothing @ x).mean() + (x @ x.T @ y)

    supernet = calibrated(Graph(), torch.randn(5, WIDTH), space=space())
    assert supernet.coverage.hidden_products == ["product0"]
    assert list(supernet.products) == ["product3", "product4", "product5"]


def test_without_the_option_they_are_listed() -> None:
    supernet = calibrated(Block(), torch.randn(2, 5, WIDTH), torch.randn(3, 5, WIDTH))
    assert not supernet.products and not supernet.coverage.hidden_products
    assert supernet.coverage.products == ["product0", "product1"]
    assert type(supernet.model) is Block
    supernet.calibrate([torch.randn(2, 5, WIDTH)])  # once more
    assert supernet.coverage.products == ["product0", "product1"]
    assert calibrated(cnn(), images(2)).coverage.products == []


def test_rules_speak_about_products() -> None:
    def searched(**options: Any) -> tuple[list[str], list[str]]:
        found = calibrated(Outer(), torch.randn(4, 5, WIDTH), space=space(**options))
        return list(found.products), found.coverage.skipped

    every = ["product0", "product2", "inner.product0", "inner.product1", "product4"]
    assert searched(skip_types=["Product"]) == ([], every)
    assert searched(skip=["inner.*"])[0] == ["product0", "product2", "product4"]
    assert searched(skip=["*product*"], force=["*.product1"])[0] == ["inner.product1"]
    with pytest.raises(SearchSpaceError, match=r"no layer matches 'product9'.*product"):
        searched(skip=["product9"])
    assert not calibrated(cnn(), images(2), space=space(skip_types=["Product"])).products
    with pytest.raises(SearchSpaceError, match="no layer is a 'Product'"):
        calibrated(cnn(), images(2), space=small_space(skip_types=["Product"]))


def test_products_take_the_per_tensor_candidates_only() -> None:
    batch = torch.randn(4, 5, WIDTH)
    both = calibrated(Block(), batch, space=space(activation_granularity=["channel", "tensor"]))
    assert len(both.decisions["qkv.activation"].options) == 2 * len(THREE)
    assert len(both.decisions["product0.left"].options) == len(THREE)
    assert len(uniform_assignments(both)) == len(THREE) * len(THREE) * 2
    with pytest.raises(SearchSpaceError, match="activation_granularity"):
        space(activation_granularity="channel")
    channels = small_space(activation_granularity="channel")
    with pytest.raises(SearchSpaceError, match=r"per-tensor .* 'product0'.*skip_types=\[Product\]"):
        calibrated(Block(), batch, space=SearchSpace("own", channels.rules, products=True))


def test_uniform_strategies_and_first_order_effects_know_them() -> None:
    supernet, inputs = calibrated(Block(), torch.randn(8, 5, WIDTH), space=space()), torch.randn(8, 5, WIDTH)
    for assignment in uniform_assignments(supernet).values():
        assert assignment.keys() == supernet.decisions.keys()
    evaluator = evaluator_of(supernet, inputs, {"refine": list(range(8))})
    effects = evaluator.first_order(every_other(supernet), "refine")
    assert float(effects["product1.left"].abs().max()) > 0


def test_nothing_is_left_behind_by_an_exception() -> None:
    supernet, batch = calibrated(Block(), torch.randn(2, 5, WIDTH), space=space()), torch.randn(2, 5, WIDTH)
    for error in (KeyboardInterrupt, RuntimeError):

        def fail(*_: Any, error: type[BaseException] = error) -> None:
            raise error

        handle = supernet.model.head.register_forward_pre_hook(fail)
        with pytest.raises(error), supernet.mode("discrete"):
            supernet(batch)
        with pytest.raises(error):
            supernet.calibrate([batch])
        handle.remove()
        assert torch._C._len_torch_function_stack() == 0
        assert not nn.modules.module._global_forward_hooks
        assert not nn.modules.module._global_forward_pre_hooks
    supernet.calibrate([batch])
    assert list(supernet.products) == ["product0", "product1"]
    with supernet.mode("discrete"):
        assert not torch.equal(supernet(batch), Block.forward(supernet.model, batch))


def test_operands_that_are_not_finite_are_named() -> None:
    class Breaks(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ torch.full((3, 2), float("nan"))

    with pytest.raises(NonFiniteError, match=r"^right of product 'product2': "):
        calibrated(Breaks(), torch.randn(2, 5, WIDTH), space=space())


@torch.no_grad()
def test_another_model_is_refused() -> None:
    model, batch = Block(fused=False).eval(), torch.randn(2, 5, WIDTH)
    prepared, supernet = prepared_supernet(model, batch, space())
    bundle = bundle_of(prepared, supernet, supernet.argmax(), batch)
    model.fused = True
    with pytest.raises(StrategyError, match=r"'product0' is of the kind 'attention' here and was 'matmul'"):
        apply_strategy(model, bundle)
    model.fused = False
    renamed = {"product9": bundle.strategy.products["product0"]}
    tensors = {key.replace("product0", "product9"): value for key, value in bundle.tensors.items()}
    fewer = Bundle(bundle.strategy.model_copy(update={"products": renamed}), tensors)
    with pytest.raises(StrategyError, match=r"product 'product9' was not computed"):
        apply_strategy(model, fewer)
    strategy = bundle.strategy.model_copy(
        update={"products": {"other.product0": bundle.strategy.products["product0"]}}
    )
    tensors = {key.replace("product0", "other.product0"): value for key, value in bundle.tensors.items()}
    with pytest.raises(StrategyError, match=r"no product 'other\.product0'"):
        apply_strategy(model, Bundle(strategy, {**bundle.tensors, **tensors}))


def test_moving_the_network_moves_them() -> None:
    supernet = calibrated(Block(), torch.randn(2, 5, WIDTH), space=space())
    assert isinstance(supernet, Supernet)
    supernet.to("meta")
    assert all(q[0].scale.device.type == "meta" for q in supernet.quantizers())
