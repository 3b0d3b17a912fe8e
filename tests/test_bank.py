"""Many adapters on one model: their sum, a choice for each row, switching, merging, dropout, holding.

The truth of a mixed batch is each row alone under its own adapter. In float64 wide products are reordered
sums: 1e-12 leaves room; where the arithmetic is the same, bits are.
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from loraloom.adapt import Adapters, attach
from loraloom.adapter import AdapterSpec
from loraloom.errors import UserError
from loraloom.kernels.dropout import keep_mask, keyed_dropout, mix, token_key
from loraloom.methods.alora import ALoRA

WIDE = {"rtol": 1e-12, "atol": 1e-12}
ALL = ["q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens"]
LAYERS = 2


class Ops(TorchDispatchMode):
    """The operations that run, without the views between them."""

    VIEWS = ("view", "_unsafe_view", "t", "transpose", "detach", "expand", "unsqueeze", "slice")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in self.VIEWS:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def three(kind="llama", dtype=torch.float64, *, dropout=(0.0, 0.0, 0.0), targets=ALL, **more) -> Adapters:
    """A tiny model with adapters a, b and c of different ranks, away from their starts."""
    model = tiny.build(kind).to(dtype)
    adapters = None
    for i, name in enumerate("abc"):
        spec = {"r": 2 + i, "alpha": 4.0 + i, "dropout": dropout[i], "seed": i, "target_modules": targets}
        if adapters is None:
            adapters = attach(model, name=name, **spec, **more)
        else:
            adapters.add(name, AdapterSpec(**spec, **more))
    assert adapters is not None
    tiny.stir(adapters)
    if dtype == torch.float64:
        for adapter in adapters.adapters.values():
            for _, tensor in adapter.named_tensors():
                tensor.data = tensor.data.double()
    return adapters


def run(adapters, ids=None, **kwargs):
    return adapters.model(tiny.ids() if ids is None else ids, **kwargs).logits


def under(adapters, name, **kwargs):
    adapters.use(name)
    return run(adapters, **kwargs)


# ---- one adapter costs what one LoRA costs ------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_adapter_runs_no_operation_but_loras_own(held, dtype):
    model = nn.Sequential(nn.Linear(5, 7)).to(dtype)
    adapters = attach(model, r=2, dropout=0.3, target_modules=["0"])  # dropout is off in evaluation
    x = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    cast = ["_to_copy"] if dtype == torch.bfloat16 else []  # of the float32 masters, A and B
    if held:
        with adapters.hold():
            assert_loras_own(model, x, cast)
    else:
        with adapters.routed(["default"] * 3):
            assert_loras_own(model, x, cast)


def assert_loras_own(model, x, cast):
    with Ops() as forward:
        y = model(x)
    with Ops() as backward:
        y.backward(torch.ones_like(y))
    assert forward.seen == ["addmm", *cast, "mm", "mul", *cast, "addmm_"]
    # x's gradient through W, z's and its scale, what it adds to x's, A's, and B's from z as it was scaled
    back = ["mm", *cast, "mm", "mul", *cast, "addmm_", "mm", *cast, "mul", "mm", *cast]
    assert backward.seen == ["ones_like", *back]


def test_no_adapter_runs_no_operation_of_ours():
    model = nn.Sequential(nn.Linear(5, 7))
    adapters = attach(model, r=2, target_modules=["0"])
    adapters.use()
    x = torch.randn(3, 5)
    with Ops() as ops:
        model(x)
    assert ops.seen == ["addmm"]


def test_two_adapters_in_a_batch_run_the_same_products():
    """Two products more than the base however many adapters there are: 'the same kernels'."""
    counts = {}
    for names in (["a", None, "a"], ["a", "b", "c"]):
        adapters = three(targets=["q_proj"])
        with adapters.routed(names), Ops() as ops, torch.no_grad():
            run(adapters)
        counts[len(set(names))] = sum(op in ("mm", "addmm", "bmm") for op in ops.seen)
    assert len(set(counts.values())) == 1


# ---- sums and rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "phi3"])
def test_several_at_once_are_the_sum_of_their_deltas(kind):
    adapters = three(kind, targets=["all-linear", "q"] if kind == "llama" else ["q", "v", "mlp", "embed"])
    adapters.use("a", "b", "c")
    together = run(adapters)
    dense = copy.deepcopy(adapters).model
    dense_adapters = next(iter(dense._forward_pre_hooks.values())).__self__
    dense_adapters.detach()
    with torch.no_grad():
        for adapter in adapters.adapters.values():
            for key, site in adapter.sites.items():
                module = dense.get_submodule(adapter.roles[key].name)
                delta_OI = site.layer.spread(site.method.delta(site.layer, site.p))
                moved = module.weight + site.layer.like_weight(delta_OI)
                module.weight = nn.Parameter(moved)  # a new one: a tied head keeps the base's
    torch.testing.assert_close(together, dense(tiny.ids()).logits, rtol=1e-10, atol=1e-10)
    adapters.use("c", "b", "a", "a")
    assert adapters.active == ("c", "b", "a")
    torch.testing.assert_close(run(adapters), together, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "falcon-new"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_row_is_what_it_is_alone(kind, dtype):
    targets = ALL if kind == "llama" else ["q", "v", "mlp", "embed"]
    adapters = three(kind, dtype, targets=targets)
    rows = ["c", None, "a", "b", "a"]
    ids = tiny.ids(rows=len(rows))
    with torch.no_grad():
        with adapters.routed(rows):
            mixed = run(adapters, ids)
        adapters.use()
        base = run(adapters, ids)
        assert torch.equal(mixed[1], base[1])  # bit for bit: nothing but zero is added
        alone = torch.stack([under(adapters, name, ids=ids)[i] for i, name in enumerate(rows)])
    close = {
        torch.float64: WIDE,
        torch.float32: {"rtol": 1e-4, "atol": 1e-4},
        torch.bfloat16: {"rtol": 0.1, "atol": 0.1},
    }
    torch.testing.assert_close(mixed, alone, **close[dtype])
    assert not torch.allclose(alone[0].float(), base[0].float(), atol=0.3)


def test_gradients_of_a_mixed_batch_are_those_of_its_rows():
    adapters, rows = three(), ["c", None, "a", "b", "a"]
    ids = tiny.ids(rows=len(rows))

    def gradients():
        found = {name: p.grad.clone() for name, p in adapters.named_parameters()}
        for p in adapters.parameters():
            p.grad = None
        return found

    with adapters.routed(rows):
        run(adapters, ids).square().sum().backward()
    mixed = gradients()
    for i, name in enumerate(rows):
        if name is not None:
            under(adapters, name, ids=ids[i : i + 1]).square().sum().backward()
    alone = gradients()
    for name, gradient in alone.items():
        torch.testing.assert_close(mixed[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def test_rows_of_one_owner_or_of_none_need_no_mask():
    adapters = three()
    with adapters.routed(["b", "b", "b"]):
        assert adapters.flow.mask_BMK is None
        routed = run(adapters)
    assert torch.equal(routed, under(adapters, "b"))
    with adapters.routed([None, None, None]):
        assert adapters.active == ()


def test_routing_ends_with_its_block_and_after_an_error():
    adapters = three()
    adapters.use("b")
    with pytest.raises(ZeroDivisionError), adapters.routed(["a", "b", "c"]):
        raise ZeroDivisionError
    assert (adapters.active, adapters.flow.mask_BMK) == (("b",), None)
    with adapters.disabled():
        assert adapters.active == ()
        with adapters.routed(["a", "b", "c"]):
            assert adapters.active == ("a", "b", "c")
        assert adapters.active == ()
    assert adapters.active == ("b",)
    with adapters.disabled():
        adapters.remove("b")
    assert adapters.active == ()


def test_more_rows_than_the_batch_has_are_refused():
    adapters = three()
    with adapters.routed(["a", "b"]), pytest.raises(UserError) as caught:
        run(adapters)
    assert caught.value.message == "routed() names 2 rows, the batch has 3"
    with pytest.raises(UserError, match="there is no adapter named 'd'"), adapters.routed(["a", "d"]):
        pass


class Router(nn.Module):
    """A mixture of two experts that see some of the tokens, in an order of their own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCAB, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids).flatten(0, 1)
        return torch.cat([self.experts[0](x[:3]), self.experts[1](x[3:])])


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(tiny.VOCAB, 4), nn.Linear(4, 4)
        self.shape = None

    def forward(self, input_ids):
        return self.layer(self.embed(input_ids).reshape(*self.shape, 4))


def test_layers_that_see_other_tokens_refuse_to_be_mixed():
    """Three experts' tokens happen to be as many as there are rows: the name tells, not the number."""
    adapters = attach(Router(), name="a", r=2, target_modules=["experts.0", "experts.1"])
    adapters.add("b", AdapterSpec(r=2, target_modules=["experts.0"]))
    with adapters.routed(["a", "b", "a"]), pytest.raises(UserError) as caught:
        adapters.model(tiny.ids())
    assert caught.value.message == (
        "experts.0 sees (3,) tokens where the batch has (3, 7): it cannot be told which adapter each of them belongs to"
    )
    adapters.use("a")
    adapters.model(tiny.ids())


def test_flattened_tokens_are_known_and_transposed_ones_refused():
    model = Odd()
    adapters = attach(model, name="a", r=2, target_modules=["layer"])
    adapters.add("b", AdapterSpec(r=2, target_modules=["layer"], seed=1))
    tiny.stir(adapters)
    model.shape = (3, 7)
    with adapters.routed(["a", "b", None]):
        truth = model(tiny.ids())
        for model.shape in ((21,), (1, 21), (3, 7, 1)):
            torch.testing.assert_close(model(tiny.ids()).reshape(truth.shape), truth)
        for model.shape in ((7, 3), (21, 1), (1, 3, 7)):
            with pytest.raises(UserError, match="it cannot be told which adapter"):
                model(tiny.ids())


# ---- switching and merging never move a bit -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_switches_leave_every_bit(dtype):
    adapters = three(dtype=dtype, targets=["q_proj", "embed_tokens"])
    bits, names = tiny.digest(adapters.model), ("a", "b", "c", None)
    with torch.no_grad():
        adapters.use()
        before = run(adapters)
        for i in range(1000):
            adapters.use(names[i * 7 % 4])
            if i % 100 == 0:
                run(adapters)
        adapters.use()
        assert torch.equal(run(adapters), before)
    assert tiny.digest(adapters.model) == bits


MOVES = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["merge", "use"]), st.lists(st.sampled_from("abc"), max_size=3, unique=True)
        ),
        st.tuples(st.sampled_from(["unmerge", "run", "add", "remove"]), st.just([])),
    ),
    max_size=12,
)
STARTS: dict[torch.dtype, Adapters] = {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(moves=MOVES)
@settings(max_examples=25, deadline=None)
def test_any_sequence_of_merges_leaves_the_base_as_it_was(dtype, moves):
    """After every move each weight is W0, or W0 + its deltas summed in float32 and rounded once."""
    if dtype not in STARTS:
        STARTS[dtype] = three(dtype=dtype, targets=["q_proj", "lm_head"])
    adapters = copy.deepcopy(STARTS[dtype])
    bits = tiny.digest(adapters.model)
    for move, names in moves:
        try:
            step(adapters, move, names)
        except UserError:
            assert adapters.merged or move == "remove"
        now = tiny.digest(adapters.model)
        changed = {name for name in now if now[name] != bits[name]}
        assert changed <= {f"{name}.weight" for name in adapters.banks if adapters.merged}
        if adapters.merged:
            assert_summed_once(adapters, STARTS[dtype].model)
    adapters.detach()
    assert tiny.digest(adapters.model) == bits
    assert all("forward" not in module.__dict__ for module in adapters.model.modules())


def step(adapters, move, names):
    match move:
        case "merge":
            adapters.merge(*names)
        case "use":
            adapters.use(*names)
        case "unmerge":
            adapters.unmerge()
        case "add":
            adapters.add("d", AdapterSpec(r=1, target_modules=["q_proj"]))
        case "remove":
            adapters.remove("d")
        case "run":
            with torch.no_grad():
                run(adapters)


def assert_summed_once(adapters, pristine):
    for name, bank in adapters.banks.items():
        own = pristine.get_submodule(name).weight.detach()
        total = own.float().clone()
        for adapter in adapters.merged:
            for site in bank.sites.get(adapter, ()):
                total += site.method.delta(site.layer, site.p).detach()
        assert torch.equal(bank.module.weight, total.to(own.dtype))


def test_merging_b_after_a_gives_b_exactly():
    adapters = three(dtype=torch.bfloat16)
    adapters.merge("b")
    alone = tiny.digest(adapters.model)
    adapters.unmerge()
    adapters.merge("a")
    adapters.merge("b")
    assert tiny.digest(adapters.model) == alone
    assert adapters.merged == ("b",)


def test_merging_several_equals_using_them():
    adapters = three(targets=["all-linear", "head"])
    adapters.use("a", "c")
    truth = run(adapters)
    adapters.merge()
    torch.testing.assert_close(run(adapters), truth, rtol=1e-10, atol=1e-10)
    with pytest.raises(UserError, match="a, c is merged into the weights"):
        adapters.use("a")
    adapters.unmerge()
    assert torch.equal(run(adapters), truth)


def test_a_failed_merge_changes_nothing():
    adapters = three(dtype=torch.bfloat16)
    bits = tiny.digest(adapters.model)
    with torch.no_grad():
        adapters.parameters("b")[-1].fill_(float("inf"))
    with pytest.raises(UserError, match="is not finite"):
        adapters.merge("b")
    with pytest.raises(UserError, match="no adapter named"):
        adapters.merge("z")
    assert adapters.merged == ()
    assert tiny.digest(adapters.model) == bits
    adapters.merge("a")
    with pytest.raises(UserError, match="no adapter named"):
        adapters.merge("z")
    assert adapters.merged == ("a",)


# ---- dropout ------------------------------------------------------------------------------------------------


def masks(adapters, ids, **batch):
    """What dropout leaves of ones, by adapted layer: 0 or 1 / (1 - p)."""
    seen = {}
    for name, bank in adapters.banks.items():
        original = type(bank).drop

        def spy(x, compute, bank=bank, name=name, original=original):
            seen[name] = original(bank, torch.ones_like(x), compute)
            return original(bank, x, compute)

        bank.drop = spy
    with adapters.batch(**batch) if batch else adapters.routed([adapters.active[0]] * len(ids)):
        run(adapters, ids)
    for bank in adapters.banks.values():
        del bank.drop
    return seen


@pytest.fixture
def dropping():
    adapters = three(dropout=(0.5, 0.2, 0.0), targets=["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"])
    adapters.use("a")
    adapters.train()
    return adapters


def test_a_mask_depends_on_the_token_and_not_on_its_neighbours(dropping):
    """Split, in another order, packed into one row, or beside another adapter's rows: the same masks."""
    ids = tiny.ids(rows=4)
    token_BT = torch.arange(4)[:, None] * 2**20 + torch.arange(7)
    whole = masks(dropping, ids, step=3, token_BT=token_BT)
    for rows in ([0, 1], [3], [2, 0, 1]):
        part = masks(dropping, ids[rows], step=3, token_BT=token_BT[rows])
        assert all(torch.equal(part[name], whole[name][rows]) for name in whole)
    packed = masks(dropping, ids.view(1, 28), step=3, token_BT=token_BT.view(1, 28))
    assert all(torch.equal(packed[name][0], whole[name].flatten(0, 1)) for name in whole)
    with dropping.routed(["b", "a", None, "c"]):
        mixed = masks(dropping, ids, step=3, token_BT=token_BT)
    for name in whole:
        assert torch.equal(mixed[name][1], whole[name][1])
        assert set(mixed[name][0].unique().tolist()) == {0.0, 1.25}
        assert mixed[name][2:].eq(1).all()


def test_what_reads_one_input_shares_one_mask(dropping):
    seen = masks(dropping, tiny.ids(), step=0, token_BT=torch.arange(21).view(3, 7))
    first, second = (
        [m for name, m in seen.items() if f"layers.{i}.self_attn" in name] for i in range(LAYERS)
    )
    assert len(first) == len(second) == 3
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], second[0])
    mlp = [m for name, m in seen.items() if "layers.0.mlp" in name]
    assert torch.equal(mlp[0], mlp[1])
    assert not torch.equal(mlp[0], first[0])


def test_masks_change_with_the_step_and_without_one_at_every_pass(dropping):
    token_BT = torch.arange(21).view(3, 7)
    one, same, other = (
        masks(dropping, tiny.ids(), step=step, token_BT=token_BT)["model.layers.0.self_attn.q_proj"]
        for step in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(run(dropping), run(dropping))


def test_dropout_is_off_in_evaluation_and_in_the_base(dropping):
    dropping.eval()
    assert torch.equal(run(dropping), run(dropping))
    dropping.train()
    with dropping.disabled():
        assert torch.equal(run(dropping), run(dropping))


def test_a_pass_of_the_base_does_not_move_the_masks_of_a_pass_before_it(dropping):
    """As in preference training: the reference runs between a forward pass and its backward pass."""
    clock = dropping.flow.clock
    with dropping.disabled():
        run(dropping)
    assert dropping.flow.clock == clock


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_right_for_every_feature_and_token(p):
    """400 tokens x 500 features: each share within 5 standard deviations, and no correlation of neighbours."""
    key = token_key(torch.arange(400), seed=7, step=3, group=11)
    keep = keep_mask(key, 500, p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * sigma / 200_000**0.5
    assert (keep.mean(0) - (1 - p)).abs().max() < 5 * sigma / 400**0.5
    assert (keep.mean(1) - (1 - p)).abs().max() < 5 * sigma / 500**0.5
    centred = (keep - keep.mean()) / sigma
    for other in (centred.roll(1, 0), centred.roll(1, 1)):
        assert abs((centred * other).mean()) < 5 / 200_000**0.5
    again = keep_mask(token_key(torch.arange(400), seed=8, step=3, group=11), 500, p).double()
    assert abs((centred * (again - again.mean()) / sigma).mean()) < 5 / 200_000**0.5


def test_the_hash_is_murmurs_and_keeps_to_32_bits():
    assert mix(torch.tensor([0, 1])).tolist() == [0, 0x514E28B7]  # fmix32's published values
    assert mix(torch.tensor([2**32 - 1])).item() < 2**32
    keys = token_key(torch.arange(5) + 2**40, seed=2**59 + 3, step=2**31, group=2**32 - 1)
    assert keys.min() >= 0
    assert keys.max() < 2**32
    assert len(set(keys.tolist())) == 5


def test_dropout_of_rate_zero_and_its_gradient():
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    key = token_key(torch.arange(6), seed=1, step=0, group=0)
    assert torch.equal(keyed_dropout(x, key, 0.0), x)
    assert torch.autograd.gradcheck(lambda x: keyed_dropout(x, key, 0.3), (x,))
    rates = torch.tensor([0.0, 0.9] * 3, dtype=torch.float64)
    dropped = keyed_dropout(torch.ones(6, 8), key, rates)
    assert dropped[::2].eq(1).all()
    assert not dropped[1::2].all()


def test_gradients_with_dropout_do_not_depend_on_the_split(dropping):
    ids, token_BT = tiny.ids(rows=4), torch.arange(28).view(4, 7) + 2**33
    whole = accumulated(dropping, ids, token_BT, [[0, 1, 2, 3]])
    for split in ([[0], [1], [2], [3]], [[2, 0], [3, 1]]):
        parts = accumulated(dropping, ids, token_BT, split)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-9)


def accumulated(adapters, ids, token_BT, split, *, hold=True):
    """Gradients of a step in micro-batches."""
    for parameter in adapters.parameters():
        parameter.grad = None

    def micro_batches():
        for rows in split:
            with adapters.batch(step=5, token_BT=token_BT[rows]):
                run(adapters, ids[rows]).square().sum().backward()

    if hold:
        with adapters.hold():
            micro_batches()
    else:
        micro_batches()
    return {n: p.grad.clone() for n, p in adapters.named_parameters(*adapters.active)}


def test_a_sum_with_dropout_is_refused_in_training():
    adapters = three(dropout=(0.5, 0.2, 0.0), targets=["q_proj"])
    adapters.use("c")
    adapters.train()
    with pytest.raises(UserError) as caught:
        adapters.use("a", "c")
    assert caught.value.message == "a trains with dropout, so each token must have one adapter"
    assert adapters.active == ("c",)
    adapters.eval()
    adapters.use("a", "c")
    with pytest.raises(UserError, match="each token must have one adapter"):
        adapters.train()
    assert not adapters.flow.training
    with adapters.routed(["a", "b", "c"]):
        adapters.train()
        run(adapters)


# ---- holding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")])
def test_gradients_held_equal_gradients_live(names):
    adapters = three(
        "gpt2", targets=["q", "v", "c_fc", "embed"]
    )  # roles are laid side by side: not used as is
    adapters.use(*names)
    ids, token_BT = tiny.ids(rows=4), torch.arange(28).view(4, 7)
    held = accumulated(adapters, ids, token_BT, [[0, 1], [2, 3]])
    live = accumulated(adapters, ids, token_BT, [[0, 1], [2, 3]], hold=False)
    for name in live:
        torch.testing.assert_close(held[name], live[name], rtol=1e-10, atol=1e-10)


def fail(adapters):
    assert any(bank.held for bank in adapters.banks.values())
    raise ZeroDivisionError


def test_an_error_inside_hold_lets_go_of_everything():
    adapters = three()
    adapters.use("a", "b")
    with pytest.raises(ZeroDivisionError), adapters.hold():
        fail(adapters)
    assert not any(bank.held for bank in adapters.banks.values())
    assert all(parameter.grad is None for parameter in adapters.parameters())
    adapters.use("c")


def test_an_error_while_taking_hold_lets_go_too(monkeypatch):
    adapters = three()
    last = list(adapters.banks.values())[-1]
    monkeypatch.setattr(last, "build", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), adapters.hold():
        pass
    assert not any(bank.held for bank in adapters.banks.values())


def test_nothing_changes_hands_while_held():
    adapters = three()
    with adapters.hold():
        for change in (
            lambda: adapters.use("a"),
            lambda: adapters.add("d", AdapterSpec(r=1)),
            lambda: adapters.remove("a"),
            lambda: adapters.merge("a"),
            lambda: adapters.hold().__enter__(),
        ):
            with pytest.raises(RuntimeError, match="the bank is held"):
                change()
    assert adapters.names == ["a", "b", "c"]


def test_a_backward_pass_after_hold_is_refused_before_its_gradient_is_lost():
    adapters = three()
    adapters.use("a", "b")
    with adapters.hold():
        loss = run(adapters).square().sum()
    with pytest.raises(RuntimeError, match=r"backward\(\) came after hold\(\) had ended"):
        loss.backward()


# ---- gradient checkpointing ---------------------------------------------------------------------------------


def checkpointed(dropout=0.0):
    adapters = three(dropout=(dropout, 0.1, 0.0))
    adapters.use("a")
    adapters.model.train()
    adapters.train()
    return adapters


def save_memory(model, reentrant):
    """Checkpoints in every layer, by the name that this version of transformers has for it."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_through_checkpoints_are_equal(dropout, reentrant):
    ids, token_BT = tiny.ids(rows=4), torch.arange(28).view(4, 7)
    plain, saving = checkpointed(dropout), checkpointed(dropout)
    save_memory(saving.model, reentrant)
    for rows in (None, ["b", "a", None, "c"]):
        for adapters in (plain, saving):
            for parameter in adapters.parameters():
                parameter.grad = None
            if rows is not None:
                with adapters.routed(rows), adapters.hold(), adapters.batch(step=1, token_BT=token_BT):
                    run(adapters, ids).square().sum().backward()
            else:
                run(adapters, ids).square().sum().backward()
        assert plain.parameters()[0].grad is not None
        for one, other in zip(plain.parameters(), saving.parameters()):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, **WIDE)


def test_a_recomputation_for_another_choice_is_refused():
    adapters = checkpointed(0.4)
    save_memory(adapters.model, False)
    with adapters.routed(["a", "b", "c"]):
        loss = run(adapters).square().sum()
    with pytest.raises(RuntimeError, match="call backward"):
        loss.backward()
    loss = run(adapters).square().sum()
    with adapters.disabled():
        run(adapters)  # a reference model between the two
    loss.backward()


def test_llama_on_meta_takes_many_adapters():
    """Names, counts and switching do not need memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1))
    adapters = attach(model, name="a", r=8)
    adapters.add("b", AdapterSpec(r=4))
    adapters.use("a", "b")
    assert run(adapters, torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 32000)


def test_a_method_that_chooses_tokens_does_so_in_the_first_held_step():
    """Held rows are built before the model is called, when the choice of tokens is not known yet."""
    model = tiny.build("llama").double()
    ids = torch.tensor([[9, 7, 5, 6], [5, 5, 6, 9]])
    adapters = attach(model, "alora", r=2, options={"invocation": [7]})
    tiny.stir(adapters, size=0.5)
    for parameter in adapters.parameters():
        parameter.data = parameter.data.double()
    with adapters.hold():
        first = model(input_ids=ids).logits
    with adapters.hold():
        again = model(input_ids=ids).logits
    with adapters.disabled():
        base = model(input_ids=ids).logits
    assert torch.equal(first, again)
    assert torch.equal(first[0, :1], base[0, :1])
    assert torch.equal(first[1], base[1])
    assert not torch.equal(first[0, 1:], base[0, 1:])


def test_an_invocation_counts_within_its_own_document():
    """Two documents in a row: the run of ids must not cross their border, and reaches to the end of its own."""
    method = ALoRA(invocation=[7, 8])
    ids = torch.tensor([[1, 7, 8, 2, 7, 8, 3, 5, 5, 7], [8, 7, 8, 1, 1, 1, 1, 1, 7, 8]])
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    on = method.token_mask(ids, position)
    assert on[0].tolist() == [False, True, True, True, True, False, False, False, False, False]
    assert on[1].tolist() == [False, True, True, True, True, False, False, False, True, True]
    whole = method.token_mask(ids, None)
    assert whole[0].tolist() == [False] * 4 + [True] * 6
    assert whole[1].tolist() == [False] * 8 + [True] * 2
