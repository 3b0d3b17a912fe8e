"""What methods see before the first step: against dense gradients, at bounded memory, and LoRA-drop's choice."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import nn

from loraloom import methods, prepare
from loraloom.adapt import Adapters, AdapterSpec, attach
from loraloom.errors import UserError
from loraloom.methods.lora import LoRA
from loraloom.nll import nll_sum
from loraloom.packing import IGNORED, Batch, pack

NEAR = {"rtol": 1e-6, "atol": 1e-9}  # Llama's norms compute in float32
LIVE: list[int] = []  # bytes of statistics that live at once


@dataclass(frozen=True, kw_only=True)
class Spy(LoRA):
    """Keeps what it is shown."""

    needs = "gradients"

    def observe(self, site, store, x_TI, g_TO, labelled_T):
        assert len(x_TI) == len(labelled_T)
        add(store, "G", g_TO.T @ x_TI)
        add(store, "tokens", torch.tensor(len(x_TI)))

    def found(self, site, store):
        LIVE.append(0)
        return dict(store)

    def begin(self, sites, found):
        SEEN.clear()
        SEEN.update(found)
        return {}, {}


@dataclass(frozen=True, kw_only=True)
class SpyInputs(Spy):
    needs = "inputs"

    def observe(self, site, store, x_TI, g_TO, labelled_T):
        assert g_TO is None
        add(store, "x", x_TI.sum(0))
        add(store, "labelled", x_TI[labelled_T].sum(0))


SEEN: dict[str, dict[str, torch.Tensor]] = {}


def add(store, name, value):
    store[name] = store[name] + value if name in store else value


@pytest.fixture(autouse=True)
def _spies(monkeypatch):
    find = methods.find
    spies = {"spy": Spy, "spyinputs": SpyInputs}
    monkeypatch.setattr(methods, "find", lambda name: spies.get(name) or find(name))


class Row:
    def __init__(self, ids, trained):
        self.ids, self.row = ids, "row"
        self.labels = [IGNORED] * (len(ids) - trained) + ids[len(ids) - trained :]
        self.targets = trained


def batches(packing: bool = True) -> list[Batch]:
    gen = torch.Generator().manual_seed(3)
    rows = [Row(torch.randint(3, 50, (n,), generator=gen).tolist(), n // 2) for n in (5, 9, 4, 7, 6)]
    return pack(rows, micro_tokens=16, packing=packing, pad_id=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_the_gradient_shown_is_that_of_a_weight_that_trains(kind, packing, budget):
    """dL/dW over all batches, from autograd on the plain model with its weights trained."""
    model = tiny.build(kind).double()
    adapters = attach(model, "spy", r=2)
    with pytest.raises(UserError, match="must see data before training starts"):
        adapters.train()
    assert prepare.prepare(adapters, batches(packing), budget=budget) == {}
    adapters.train()
    found = dict(SEEN)
    sites = dict(adapters.adapters["default"].sites)
    adapters.detach()
    assert found.keys() == sites.keys()
    for site in sites.values():
        site.layer.module.weight.requires_grad_(True)
    targets = sum(batch.targets for batch in batches(packing))
    for batch in batches(packing):
        (nll_sum(model, batch) / targets).backward()
    tokens = sum(len(range(a, b)) for batch in batches(packing) for _, a, b in batch.spans)
    for key, site in sites.items():
        truth = site.layer.matrix(site.layer.module.weight.grad)
        torch.testing.assert_close(found[key]["G"], truth.cpu(), **NEAR)
        assert int(found[key]["tokens"]) == tokens


def test_roles_of_a_fused_projection_see_their_own_rows():
    model = tiny.build("gpt2").double()
    adapters = attach(model, "spy", r=2, target_modules=["q", "v"])
    prepare.prepare(adapters, batches())
    parts = {key: value["G"] for key, value in SEEN.items()}
    adapters.detach()
    adapters = attach(model, "spy", r=2, target_modules=["c_attn"])
    prepare.prepare(adapters, batches())
    for key, part in parts.items():
        name, _, role = key.partition(":")
        start = {"q": 0, "v": 32}[role]
        torch.testing.assert_close(part, SEEN[name]["G"][start : start + 16], **NEAR)


def test_layers_that_read_one_input_are_shown_it_once():
    model = tiny.build("llama").double()
    adapters = attach(model, "spyinputs", r=2)
    calls: list[str] = []
    original = SpyInputs.observe

    def counted(self, site, *rest):
        calls.append(site.layer.name)
        original(self, site, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpyInputs, "observe", counted)
        prepare.prepare(adapters, batches())
    assert not any(name.endswith(("k_proj", "v_proj", "up_proj")) for name in calls)
    q, k = (SEEN[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj"))
    assert torch.equal(q["x"], k["x"])
    # the input of the first layer, by hand: the embedding behind the norm, of every real token
    total, labelled = torch.zeros(16), torch.zeros(16)
    for batch in batches():
        h = model.model.layers[0].input_layernorm(model.model.embed_tokens(batch.ids)).detach()
        for b, start, stop in batch.spans:
            total = total + h[b, start:stop].sum(0)
            labelled = labelled + h[b, start:stop][batch.labels[b, start:stop] != IGNORED].sum(0)
    torch.testing.assert_close(q["x"], total.double(), **NEAR)
    torch.testing.assert_close(q["labelled"], labelled.double(), **NEAR)


def test_a_pass_stops_where_its_last_layer_has_been_seen():
    """With a small budget each decoder layer has a pass of its own, which runs no layer behind it."""
    model = tiny.build("llama")
    runs = [0, 0]
    for number in (0, 1):
        model.model.layers[number].register_forward_hook(
            lambda *_, number=number: runs.__setitem__(number, runs[number] + 1)
        )
    adapters = attach(model, "spyinputs", r=2)
    prepare.prepare(adapters, batches(), budget=1)
    count = len(batches())
    assert runs == [count, 0]  # the second layer's own last linear ends its pass
    assert all(not module._forward_hooks for module in model.modules() if isinstance(module, nn.Linear))


def test_statistics_are_held_for_one_decoder_layer_at_a_time():
    model = tiny.build("llama")
    adapters = attach(model, "spy", r=2)
    adapter = adapters.adapters["default"]
    groups = list(prepare.grouped(adapter, budget=1))
    assert [sorted({name.split(".")[2] for name in keys}) for keys in groups] == [["0"], ["1"]]
    assert len(list(prepare.grouped(adapter, budget=1 << 30))) == 1
    alive: list[int] = []
    watch = prepare.Watch

    class Counted(watch):
        def store(self, key):
            found = super().store(key)
            alive.append(len(self.stores))
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "Watch", Counted)
        prepare.prepare(adapters, batches(), budget=1)
    assert max(alive) == 7  # the linears of one layer


def test_what_sees_other_tokens_is_refused_by_name():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.lin = nn.Embedding(50, 4), nn.Linear(4, 50)

        def forward(self, input_ids):
            return self.lin(self.emb(input_ids)[:, :2]).repeat(1, 20, 1)[:, : input_ids.shape[1]]

    adapters = attach(Routed(), "spyinputs", r=2, target_modules=["lin"])
    with pytest.raises(UserError, match="lin sees 4 tokens where the batch has 10"):
        prepare.prepare(adapters, batches(packing=False)[:1])


def test_layers_that_only_look_alike_have_statistics_of_their_own():
    """q, k and v by name, but k reads something else (as the key and value of RWKV)."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, h):
            return self.q_proj(h) + self.k_proj(h * 2) + self.v_proj(h)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.attn, self.head = nn.Embedding(50, 4), Attention(), nn.Linear(4, 50)

        def forward(self, input_ids):
            return self.head(self.attn(self.emb(input_ids)))

    adapters = attach(Net(), "spyinputs", r=2, target_modules=["q_proj", "k_proj", "v_proj"])
    prepare.prepare(adapters, batches(packing=False))
    q, k, v = (SEEN[f"attn.{name}_proj"]["x"] for name in "qkv")
    torch.testing.assert_close(k, 2 * q)
    assert torch.equal(q, v)


def test_layers_left_out_stay_out_when_ranks_are_given_anew():
    model = tiny.build("llama")
    adapters = attach(model, "eva", r=2, options={"rho": 2.0}, rank_pattern={".*q_proj": 0})
    changes = prepare.prepare(adapters, batches())
    assert next(iter(changes["rank_pattern"].items())) == (".*q_proj", 0)
    assert not any(key.endswith("q_proj") for key in adapters.adapters["default"].sites)


# ---- LoRA-drop ----------------------------------------------------------------------------------------------


def test_lora_drop_keeps_the_layers_that_its_probe_moved_most():
    """Scores written out: the squared norm of every real token's update, after the probe's own steps."""
    model = tiny.build("llama")
    adapters = attach(model, "loradrop", r=2, probe_steps=3, samples=5, threshold=0.6)
    made: dict[str, dict[str, torch.Tensor]] = {}
    original = methods.find("loradrop").begin

    def begin(self, sites, found):
        made.update({k: {n: t.detach().clone() for n, t in s.p.items()} | found[k] for k, s in sites.items()})
        return original(self, sites, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods.find("loradrop"), "begin", begin)
        changes = prepare.prepare(adapters, batches())
    kept = changes["options"]["kept"]
    scores = {key: p["g"].item() for key, p in made.items()}
    assert all(score > 0 for score in scores.values())
    for leaf in ("q_proj", "down_proj"):
        group = {key: score for key, score in scores.items() if key.endswith(leaf)}
        ordered = sorted(group, key=group.get, reverse=True)
        expected, share = [], 0.0
        while share < 0.6:
            expected.append(ordered[len(expected)])
            share += group[expected[-1]] / sum(group.values())
        assert sorted(key for key in kept if key.endswith(leaf)) == sorted(expected)
    key = "model.layers.0.self_attn.q_proj"
    truth = 0.0
    for batch in batches():
        h = model.model.layers[0].input_layernorm(model.model.embed_tokens(batch.ids))
        u = h @ made[key]["A"].T @ made[key]["B"].T * 2  # s = alpha / r = 2
        truth += sum(float(u[b, start:stop].double().square().sum()) for b, start, stop in batch.spans)
    assert scores[key] == pytest.approx(truth, rel=1e-4)  # float32 on both sides


def test_lora_drop_trains_one_pair_for_all_that_it_dropped():
    model = tiny.build("llama")
    keep = ["model.layers.0.self_attn.q_proj"]
    adapters = attach(model, "loradrop", r=2, options={"kept": keep})
    sites = adapters.adapters["default"].sites
    count = sum({id(p): p.numel() for site in sites.values() for p in site.p.values()}.values())
    per_type = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
    per_type |= {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
    assert count == sum(2 * (o + i) for o, i in per_type.values()) + 2 * (16 + 16)
    assert sum(p.numel() for p in adapters.parameters()) == count
    one, two = (sites[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1))
    assert one.p["A"] is two.p["A"]
    assert one.p["B"] is two.p["B"]
    model(tiny.ids()).logits.square().sum().backward()
    both = one.p["B"].grad.clone()
    for key in sites:  # the shared gradient is the sum over the layers that share
        if key.endswith("up_proj"):
            alone = attach_alone(key)
            both = both - alone
    torch.testing.assert_close(both, torch.zeros_like(both), atol=2e-3, rtol=0)  # of gradients about 100


def attach_alone(key: str) -> torch.Tensor:
    """The gradient of one layer's own B, from the same start."""
    model = tiny.build("llama")
    adapters = attach(model, "loradrop", r=2, options={"kept": ["model.layers.0.self_attn.q_proj"]})
    shared = adapters.adapters["default"].sites["model.layers.0.mlp.up_proj"].p
    plain = Adapters(tiny.build("llama"))
    plain.add("default", AdapterSpec(r=2, target_modules=[key]))
    site = plain.adapters["default"].sites[key]
    site.p["A"].data = shared["A"].detach().clone()
    plain.model(tiny.ids()).logits.square().sum().backward()
    return site.p["B"].grad
