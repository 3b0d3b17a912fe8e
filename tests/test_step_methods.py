"""AdaLoRA, LoRA-FA, LoRA-Pro and Delta-LoRA: the methods that act in the step, before or after the optimizer.

AdaLoRA and LoRA-FA train beside PEFT's, in float64, from one start: what remains is the order of sums (1e-15 a
term), which Adam's division by the root of small squares may raise; 1e-9 leaves it room and any other rule none.
PEFT has neither of the others: their equations stand here in dense float64.
"""

from __future__ import annotations

import json
import warnings

import peft.optimizers.lorafa
import pytest
import tiny
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loraloom import methods
from loraloom.adapt import attach
from loraloom.errors import UserError
from loraloom.methods.adalora import AdaLoRA
from loraloom.quant import dense, quantized

# of transformers to PEFT, about a name that PEFT still asks for
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
PREFIX = "base_model.model."
STEPS = 20


def sites_of(adapters):
    return adapters.adapters["default"].sites


def method_of(adapters):
    return adapters.adapters["default"].method


def widen(adapters) -> None:
    """Every tensor in float64."""
    for _, tensor in adapters.adapters["default"].named_tensors():
        tensor.data = tensor.data.double()


def attached(model, method, **settings):
    adapters = attach(model, method, **settings)
    widen(adapters)
    return adapters


def batch(step: int) -> torch.Tensor:
    return tiny.ids(rows=2, seed=step)


# ---- AdaLoRA: the budget ------------------------------------------------------------------------------------


def test_the_budget_of_the_checked_run():
    method = AdaLoRA(r=6, target_r=2, tinit=2, tfinal=5, deltaT=2)
    budget = [method.budget(t, 30, 24, 4) for t in range(31)]
    assert budget == [24, 24, 24, 22, 20, 18, 17, 15, 14, 13, 12, 11, 10, 10, 9, 9, *[8] * 15]


@pytest.mark.parametrize(("total", "tinit", "tfinal"), [(30, 2, 5), (100, 0, 0), (7, 1, 5), (1000, 333, 1)])
def test_the_budget_is_pefts_at_every_step(total, tinit, tfinal):
    config = AdaLoraConfig(target_r=3, init_r=7, tinit=tinit, tfinal=tfinal, total_step=total)
    theirs = object.__new__(RankAllocator)
    theirs.peft_config, theirs.init_bgt, theirs.target_bgt = config, 5 * 7, 5 * 3
    method = AdaLoRA(r=7, target_r=3, tinit=tinit, tfinal=tfinal)
    for t in range(total + 1):
        assert method.budget(t, total, 5 * 7, 5) == theirs.budget_schedule(t)[0]


def test_shares_of_the_run_and_of_the_rank():
    method = AdaLoRA(r=12)
    assert method.phases(200) == (20, 100)
    assert method.budget(100, 200, 36, 3) == 24  # 8 of 12, as in the paper
    assert AdaLoRA(r=12, target_r=20).budget(200, 200, 36, 3) == 36
    assert AdaLoRA(r=4, alpha=0).scale == 4 / (4 + 1e-5)  # as PEFT takes an alpha that is none


# ---- AdaLoRA: beside PEFT -----------------------------------------------------------------------------------

SCHEDULE = {"target_r": 1, "tinit": 2, "tfinal": 4, "deltaT": 3, "beta1": 0.8, "beta2": 0.7}
KINDS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


class Net(nn.Module):
    """A convolution and a linear layer; PEFT adds its penalty only to what has a loss."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.lin = nn.Linear(16, 5)

    def forward(self, x):
        return self.lin(torch.tanh(self.conv(x)).flatten(1))


def case_of(kind):
    """(a fresh float64 model, its loss at a step, its targets, whether PEFT's penalty works)"""
    if kind != "net":
        return tiny.build(kind).double(), lambda m, t: m(batch(t), labels=batch(t)).loss, KINDS[kind], True

    def loss(m, t):
        gen = torch.Generator().manual_seed(t)
        return (m(torch.randn(6, 2, 4, 4, generator=gen).double()) - 1).square().mean()

    torch.manual_seed(0)
    return Net().double(), loss, ["conv", "lin"], False


def one_step(adapters, optimizer, loss, step, num_steps=STEPS) -> None:
    """What the trainer does with a method."""
    method, sites = method_of(adapters), list(sites_of(adapters).values())
    optimizer.zero_grad()
    loss.backward()
    penalty = method.penalty(sites)
    if penalty is not None:
        penalty.backward()
    method.before_step(sites, step)
    optimizer.step()
    method.after_step(sites, step, num_steps)


def ours_and_theirs(kind):
    model, loss, targets, has_loss = case_of(kind)
    settings = {"r": 3, "alpha": 5.0, "orth": 0.3 if has_loss else 0.0, **SCHEDULE}
    adapters = attached(model, "adalora", target_modules=targets, **settings)
    config = AdaLoraConfig(
        init_r=3,
        lora_alpha=5,
        target_modules=targets,
        total_step=STEPS,
        orth_reg_weight=0.3,
        fan_in_fan_out=kind == "gpt2",
        **SCHEDULE,
    )
    theirs = get_peft_model(case_of(kind)[0], config)
    for key, site in sites_of(adapters).items():
        module = theirs.get_submodule(PREFIX + key)
        for ours, name in (("A", "lora_A"), ("B", "lora_B")):
            getattr(module, name)["default"].data = site.p[ours].detach().clone()
    return model, adapters, theirs, loss


def both(adapters, theirs):
    for key, site in sites_of(adapters).items():
        module = theirs.get_submodule(PREFIX + key)
        for ours, name in (("A", "lora_A"), ("B", "lora_B"), ("E", "lora_E")):
            yield site.p[ours], getattr(module, name)["default"]


@pytest.fixture(scope="module", params=["llama", "gpt2", "net"])
def trained(request):
    """Ours and PEFT's after 20 steps side by side; every step's gradients, tensors and masks are compared."""
    model, adapters, theirs, loss = ours_and_theirs(request.param)
    optimizer = torch.optim.AdamW(adapters.groups(0.01), weight_decay=0.01)
    # its `ranknum`, the r of the scale, takes gradients there, and is not in its files
    trains = [p for name, p in theirs.named_parameters() if p.requires_grad and "ranknum" not in name]
    other = torch.optim.AdamW(trains, lr=0.01, weight_decay=0.01)
    masked = set()
    for step in range(STEPS):
        one_step(adapters, optimizer, loss(model, step), step)
        other.zero_grad()
        loss(theirs.base_model, step).backward()  # PeftModel without a task type passes the penalty by
        other.step()
        theirs.base_model.update_and_allocate(step + 1)
        for mine, truth in both(adapters, theirs):
            torch.testing.assert_close(mine.grad, truth.grad.view_as(mine), **CLOSE)
            torch.testing.assert_close(mine, truth.view_as(mine), **CLOSE)
            assert torch.equal(mine == 0, truth.view_as(mine) == 0)
        masked.add(sum(int((site.p["E"] == 0).sum()) for site in sites_of(adapters).values()))
    assert len(masked) > 3  # the budget did fall, and what was dropped did come back
    return request.param, model, adapters, theirs, loss


def test_twenty_steps_beside_peft(trained):
    _, model, adapters, theirs, loss = trained
    torch.testing.assert_close(loss(model.eval(), 0).detach(), task_loss(theirs, loss), **CLOSE)
    pattern = theirs.peft_config["default"].rank_pattern
    pattern = {name.removesuffix(".default"): marks for name, marks in pattern.items()}
    ranks = []
    for key, site in sites_of(adapters).items():
        kept = site.p["keep"].bool()
        assert pattern[f"{key}.lora_E"] == kept.tolist()
        assert torch.equal(site.p["E"] != 0, kept)
        ranks.append(int(kept.sum()))
    assert sum(ranks) == len(ranks)  # target_r is 1


def task_loss(theirs, loss):
    """PEFT's loss without its penalty."""
    return loss(theirs.base_model.model, 0).detach()


def file_tensors(adapters):
    """PEFT's keys and shapes."""
    found = {
        f"{PREFIX}{key}.{site.method.peft_keys[name]}": site.p[name].detach().clone()
        for key, site in sites_of(adapters).items()
        for name in ("A", "B", "E")
    }
    return {key: tensor.view(-1, 1) if key.endswith("E") else tensor for key, tensor in found.items()}


def test_what_we_pack_is_pefts_file(trained, tmp_path):
    _, _, adapters, theirs, _ = trained
    with warnings.catch_warnings():  # a layer without any triplet looks like a broken shard to it
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path))
    truth = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    found, settings = method_of(adapters).packed(file_tensors(adapters))
    assert found.keys() == truth.keys()
    for key in truth:
        torch.testing.assert_close(found[key], truth[key], **CLOSE)
    for key, value in (method_of(adapters).peft_config() | settings).items():
        if key not in ("total_step", "orth_reg_weight"):  # ours is no longer known, and off for the net
            assert config[key] == value, key


def test_pefts_file_comes_back_with_zeros(trained, tmp_path):
    kind, _, _, theirs, loss = trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    options = AdaLoRA.from_peft(config)
    assert (options["target_r"], options["tfinal"], options["orth"]) == (1, 4, 0.3)
    assert methods.make("adalora", options).beta2 == 0.7
    again, _, targets, _ = case_of(kind)
    fresh = attached(again, "adalora", r=3, alpha=5.0, target_modules=targets)
    truth = load_file(tmp_path / "adapter_model.safetensors")
    whole = AdaLoRA.unpacked(truth, config, file_tensors(fresh))
    with torch.no_grad():
        for key, site in sites_of(fresh).items():
            for name in ("A", "B", "E"):
                site.p[name].copy_(
                    whole[f"{PREFIX}{key}.{site.method.peft_keys[name]}"].view_as(site.p[name])
                )
    torch.testing.assert_close(loss(again, 0).detach(), task_loss(theirs, loss), **CLOSE)
    repacked, _ = method_of(fresh).packed(file_tensors(fresh))
    assert all(torch.equal(repacked[key], truth[key]) for key in truth)


def read_by_peft(model, folder):
    """Any warning but one is an error: it takes its own rank_pattern of this method for LoRA's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        return PeftModel.from_pretrained(model, str(folder))


def test_peft_reads_what_we_pack(trained, tmp_path):
    kind, model, adapters, _, loss = trained
    found, settings = method_of(adapters).packed(file_tensors(adapters))
    save_file(
        {key: tensor.contiguous() for key, tensor in found.items()}, tmp_path / "adapter_model.safetensors"
    )
    config = {"peft_type": "ADALORA", "target_modules": case_of(kind)[2], "fan_in_fan_out": kind == "gpt2"}
    config |= {
        "init_r": 3,
        "lora_alpha": 5,
        "inference_mode": True,
        **method_of(adapters).peft_config(),
        **settings,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    theirs = read_by_peft(case_of(kind)[0], tmp_path)
    torch.testing.assert_close(task_loss(theirs, loss), loss(model, 0).detach(), **CLOSE)


def test_what_does_not_fit_comes_back_as_it_is():
    """For the list of misfits, which names both shapes."""
    whole = {f"m.{name}": torch.zeros(shape) for name, shape in (("lora_A", (3, 5)), ("lora_E", (3, 1)))}
    wrong = {"m.lora_A": torch.ones(2, 6), "m.lora_E": torch.ones(2, 1)}
    for marks in ([True, False, False], [True, True, True], [False, False, True, True]):
        found = AdaLoRA.unpacked(wrong, {"rank_pattern": {"m.lora_E": marks}}, whole)
        assert all(torch.equal(found[key], wrong[key]) for key in wrong)
    found = AdaLoRA.unpacked(wrong, {"rank_pattern": {"m.lora_E": [True, False, True]}}, whole)
    assert found["m.lora_E"].tolist() == [[1], [0], [1]]
    assert found["m.lora_A"].shape == (2, 6)
    assert AdaLoRA.unpacked(wrong, {"rank_pattern": None}, whole)["m.lora_E"].shape == (2, 1)


def test_nothing_is_dropped_before_training():
    """All of Lambda is zero then; nor is there a pattern where nothing is zero."""
    for value in (0.0, 1.0):
        tensors = {
            "m.lora_A": torch.ones(3, 5),
            "m.lora_B": torch.ones(4, 3),
            "m.lora_E": torch.full((3, 1), value),
        }
        assert AdaLoRA(r=3).packed(tensors) == (tensors, {})


# ---- AdaLoRA: alone -----------------------------------------------------------------------------------------


def with_scores(scores, **settings):
    """Two layers whose triplets have these scores, one step before the last choice."""
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)}).double()
    adapters = attached(
        model, "adalora", r=3, target_modules=["one", "two"], tinit=0, tfinal=1, orth=0, **settings
    )
    for site, score in zip(sites_of(adapters).values(), scores):
        site.p["E_m"].copy_(torch.tensor(score).double())
        site.p["E_u"].fill_(1.0)
        site.p["E"].data.fill_(0.7)
    return model, adapters, list(sites_of(adapters).values())


@pytest.mark.parametrize(
    ("scores", "target", "kept"),
    [
        ([[1, 2, 3], [4, 5, 6]], 2, [[0, 0, 1], [1, 1, 1]]),  # the two least of all, from one layer
        ([[1, 2, 2], [2, 5, 6]], 2, [[0, 0, 0], [0, 1, 1]]),  # ties with the last to go: all go
        ([[0, 0, 0], [0, 0, 0]], 2, [[0, 0, 0], [0, 0, 0]]),
        ([[1, 2, 3], [4, 5, 6]], 3, [[1, 1, 1], [1, 1, 1]]),  # nothing to drop: there is no zeroth least
    ],
)
def test_the_least_of_all_layers_lose_their_lambda_and_only_that(scores, target, kept):
    model, adapters, sites = with_scores(scores, target_r=target)
    before = [{name: tensor.detach().clone() for name, tensor in site.p.items()} for site in sites]
    method_of(adapters).after_step(sites, 0, 2)
    for site, was, marks in zip(sites, before, kept):
        assert site.p["keep"].tolist() == marks
        assert torch.equal(site.p["E"], 0.7 * torch.tensor(marks).double())
        assert torch.equal(site.p["A"], was["A"])
        assert torch.equal(site.p["B"], was["B"])
    x = torch.randn(2, 4, dtype=torch.float64)
    for name, marks in zip(("one", "two"), kept):  # a layer of rank 0 is its base, bit for bit
        assert torch.equal(model[name](x), nn.Linear.forward(model[name], x)) == (not any(marks))


def test_a_score_is_lambdas_and_the_means_of_its_row_and_column():
    """E 3 and 1 and 1, then A's row adds 2.25 on average to the second and B's column 0.5 to the third."""
    _, adapters, sites = with_scores([[3.0, 1.0, 1.0], [9.0, 9.0, 9.0]], target_r=2)
    sites[0].p["A_m"][1, 2], sites[0].p["A_u"][1, 2] = 3.0, 3.0
    sites[0].p["B_m"][0, 2], sites[0].p["B_u"][0, 2] = 1.0, 2.0
    method_of(adapters).after_step(sites, 0, 2)
    assert sites[0].p["keep"].tolist() == [0, 1, 0]


def test_the_last_mask_stays_and_a_resumed_run_ends_the_same():
    """All that the steps need is in the tensors, the masks and running means too."""

    def fresh():
        model, loss, targets, _ = case_of("llama")
        adapters = attached(model, "adalora", r=3, target_modules=targets, **SCHEDULE)
        return model, adapters, torch.optim.AdamW(adapters.groups(0.01)), loss

    def tensors(adapters):
        return dict(adapters.adapters["default"].named_tensors())

    model, adapters, optimizer, loss = fresh()
    copies, last = {}, None
    for step in range(STEPS):
        if step in (7, 17):  # between two choices, and after the last one
            kept = {name: tensor.detach().clone() for name, tensor in tensors(adapters).items()}
            copies[step] = (kept, optimizer.state_dict()["state"])
            copies[step] = (
                kept,
                {i: {k: v.clone() for k, v in s.items()} for i, s in copies[step][1].items()},
            )
        one_step(adapters, optimizer, loss(model, step), step)
        keep = torch.cat([site.p["keep"] for site in sites_of(adapters).values()])
        if step + 1 >= STEPS - SCHEDULE["tfinal"]:
            last = keep if last is None else last
            assert torch.equal(keep, last)
            assert torch.equal(
                torch.cat([site.p["E"] for site in sites_of(adapters).values()]) != 0, last != 0
            )
    for start, (state, moments) in copies.items():
        again, resumed, second, loss = fresh()
        for name, tensor in tensors(resumed).items():
            tensor.data.copy_(state[name])
        second.load_state_dict({"state": moments, "param_groups": second.state_dict()["param_groups"]})
        for step in range(start, STEPS):
            one_step(resumed, second, loss(again, step), step)
        for name, tensor in tensors(resumed).items():
            assert torch.equal(tensor, tensors(adapters)[name]), (start, name)


def test_without_a_tail_the_last_step_sets_the_last_mask():
    model, loss, targets, _ = case_of("net")
    adapters = attached(
        model, "adalora", r=3, target_r=1, target_modules=targets, tinit=0, tfinal=0, deltaT=7
    )
    optimizer = torch.optim.AdamW(adapters.groups(0.01))
    for step in range(STEPS):
        one_step(adapters, optimizer, loss(model, step), step)
    assert sum(int((site.p["E"] != 0).sum()) for site in sites_of(adapters).values()) == 2


def test_a_layer_that_a_step_did_not_reach_only_fades():
    _, adapters, sites = with_scores([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], target_r=3)
    method_of(adapters).after_step(sites, 0, 4)
    torch.testing.assert_close(sites[0].p["E_m"], torch.full((3,), 0.85).double())
    torch.testing.assert_close(sites[0].p["E_u"], torch.full((3,), 0.85 + 0.15 * 0.85).double())


@pytest.mark.parametrize(("width", "truth"), [(768, 2.39), (2500, 0.26), (4096, 2.26)])
def test_the_penalty_at_the_start(width, truth):
    """|4e-4 d - 1| sqrt(r), as measured on PEFT; 0.26 is what chance leaves where that is zero."""
    with torch.device("meta"):
        layer = nn.Linear(width, width)
    p = AdaLoRA(r=12).init(methods.base.Layer(layer, "layer"), torch.Generator().manual_seed(0))
    site = methods.base.Site(None, AdaLoRA(r=12), p)
    assert abs(AdaLoRA(r=12, orth=1.0).penalty([site]).item() - truth) < 0.05


def test_the_penalty_in_both_forms():
    model = nn.ModuleDict({"one": nn.Linear(5, 7), "two": nn.Linear(7, 4)}).double()
    adapters = attached(model, "adalora", r=3, target_modules=["one", "two"])
    sites = list(sites_of(adapters).values())
    squares = []
    for site in sites:
        for gram in (site.p["A"] @ site.p["A"].T, site.p["B"].T @ site.p["B"]):
            squares.append(sum((gram[i, j] - float(i == j)) ** 2 for i in range(3) for j in range(3)))
    truth = {"mean": sum(x.sqrt() for x in squares) / 4, "squares": sum(squares)}
    for form, value in truth.items():
        torch.testing.assert_close(AdaLoRA(orth=0.2, orth_form=form).penalty(sites), 0.2 * value, **TIGHT)
    assert AdaLoRA(orth=0).penalty(sites) is None


def test_adalora_has_a_rate_of_its_own_for_b():
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = attach(model, "adalora", r=2, lr_ratio=4, target_modules=["0"])
    p = sites_of(adapters)["0"].p
    rest, b = adapters.groups(1e-3)
    assert (rest["lr"], b["lr"]) == (1e-3, 4e-3)
    assert [id(x) for x in rest["params"]] == [id(p["A"]), id(p["E"])]
    assert [id(x) for x in b["params"]] == [id(p["B"])]


# ---- LoRA-FA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_steps_of_pefts_lora_fa_optimizer(kind, monkeypatch):
    """With AdamW behind it, at several scales. PEFT's product is kept from bfloat16, where it rounds at 0.4 %.

    Both put epsilon elsewhere: it is next to nothing here.
    """
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    model, loss, targets, _ = case_of(kind)
    ranks = {targets[0]: 2}
    adapters = attached(model, "lorafa", r=4, alpha=6.0, target_modules=targets, rank_pattern=ranks)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, rank_pattern=ranks, fan_in_fan_out=kind == "gpt2"
    )
    theirs = get_peft_model(case_of(kind)[0], config)
    pairs = []
    for key, site in sites_of(adapters).items():
        module = theirs.get_submodule(PREFIX + key)
        module.lora_A["default"].weight.data = site.p["A"].clone()
        pairs.append((site.p, module))
    optimizer = torch.optim.AdamW(adapters.groups(0.01), eps=1e-30, weight_decay=0.0)
    other = create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=0.01)
    other.param_groups[0]["eps"] = 1e-30
    starts = [p["A"].clone() for p, _ in pairs]
    for step in range(6):
        one_step(adapters, optimizer, loss(model, step), step)
        other.zero_grad()
        loss(theirs, step).backward()
        other.step()
        for p, module in pairs:
            torch.testing.assert_close(p["B"], module.lora_B["default"].weight, **CLOSE)
    assert all(torch.equal(p["A"], a) for (p, _), a in zip(pairs, starts))
    trained = sum(p.numel() for p in adapters.parameters())
    assert trained == sum(site.method.r * site.layer.out_features for site in sites_of(adapters).values())


def one_layer(method, r=3, sizes=(6, 8), **settings):
    """A float64 layer whose adapter has left its start, with gradients; and dL/dW of the whole weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes)).double()
    adapters = attached(model, method, r=r, alpha=5.0, target_modules=["0"], **settings)
    tiny.stir(adapters, size=0.5)
    x, goal = torch.randn(9, sizes[0]).double(), torch.randn(9, sizes[1]).double()
    (model(x) - goal).square().sum().backward()
    [site] = sites_of(adapters).values()
    with torch.no_grad():
        w = model[0].weight + site.method.scale * site.p["B"] @ site.p["A"]
        full = 2 * (x @ w.T + model[0].bias - goal).T @ x
    return site, full


def test_the_corrected_gradient_is_the_one_nearest_to_full_fine_tuning():
    """s g_B A nearest to dL/dW: least squares, which the 1e-8 of the rule moves by 1e-6."""
    site, full = one_layer("lorafa")
    site.method.before_step([site], 0)
    truth = torch.linalg.lstsq((site.method.scale * site.p["A"]).T, full.T).solution.T
    torch.testing.assert_close(site.p["B"].grad, truth, rtol=1e-5, atol=1e-5)


def test_without_correction_the_gradient_is_plain():
    site, full = one_layer("lorafa", corrected=False)
    site.method.before_step([site], 0)
    torch.testing.assert_close(site.p["B"].grad, site.method.scale * full @ site.p["A"].T, **TIGHT)
    assert set(site.p) == {"A", "B"}


def test_a_is_inverted_once_and_after_it_was_read(monkeypatch):
    site, full = one_layer("lorafa")
    calls = []
    inverted = torch.linalg.pinv
    monkeypatch.setattr(torch.linalg, "pinv", lambda *args: calls.append(1) or inverted(*args))
    site.p["A"].mul_(3.0)  # as a file's
    for step in range(3):
        site.p["B"].grad = site.method.scale * full @ site.p["A"].T
        site.method.before_step([site], step)
    assert len(calls) == 1
    truth = torch.linalg.lstsq((site.method.scale * site.p["A"]).T, full.T).solution.T
    torch.testing.assert_close(site.p["B"].grad, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "lorafa"])
def test_the_whole_input_is_kept_for_lora_and_not_for_lora_fa(method):
    """By what autograd asks to be saved: B's gradient needs x A^T alone."""
    model = nn.Sequential(nn.Linear(64, 48))
    attach(model, method, r=4, target_modules=["0"])
    x = torch.randn(5, 64, requires_grad=True)
    sizes, kept = [], []

    def pack(tensor):
        kept.append(tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr())
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    y.sum().backward()
    assert any(kept) == (method == "lora")
    assert (5, 4) in sizes


# ---- LoRA-Pro -----------------------------------------------------------------------------------------------


def reach(site):
    """The matrix that takes (dA, dB), flat, to the step of W: s (B dA + dB A), flat."""
    a, b, s = site.p["A"].detach(), site.p["B"].detach(), site.method.scale
    from_a = torch.kron(b, torch.eye(a.shape[1], dtype=a.dtype))
    from_b = torch.kron(torch.eye(len(b), dtype=a.dtype), a.T.contiguous())
    return s * torch.cat([from_a, from_b], 1)


def gradients(site):
    return torch.cat([site.p["A"].grad.flatten(), site.p["B"].grad.flatten()])


def projection(site, full):
    """What of dL/dW a step of A and B can reach, by the singular vectors of `reach`."""
    u, s, _ = torch.linalg.svd(reach(site), full_matrices=False)
    u = u[:, s > 1e-9 * s[0]]
    return u @ (u.T @ full.flatten())


@pytest.mark.parametrize("shape", [(3, (6, 8)), (5, (9, 5)), (6, (8, 4))], ids=["thin", "square", "wide"])
@pytest.mark.parametrize("x", ["sylvester", "symmetric", "zero"])
def test_the_step_of_w_is_the_projection_of_its_gradient(x, shape):
    """Also where B has no full column rank, as r = 6 on four outputs."""
    site, full = one_layer("lorapro", *shape, x=x)
    before, matrix = gradients(site), reach(site)
    truth = projection(site, full)
    assert (matrix @ before - truth).norm() > 0.1 * truth.norm()  # plain LoRA's is another
    site.method.before_step([site], 4)
    torch.testing.assert_close(matrix @ gradients(site), truth, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, (6, 8)), (5, (9, 5))])
def test_sylvesters_choice_is_nearest_to_the_plain_gradients(shape):
    site, full = one_layer("lorapro", *shape)
    before, matrix = gradients(site), reach(site)
    truth = before + torch.linalg.pinv(matrix, rtol=1e-9) @ (projection(site, full) - matrix @ before)
    site.method.before_step([site], 4)
    torch.testing.assert_close(gradients(site), truth, rtol=1e-7, atol=1e-7)


def test_the_other_choices_share_what_both_can_express():
    parts = {}
    for x in ("symmetric", "zero"):
        site, full = one_layer("lorapro", x=x)
        site.method.before_step([site], 4)
        a, b, s = site.p["A"].detach(), site.p["B"].detach(), site.method.scale
        on_a, on_b = torch.linalg.pinv(a) @ a, b @ torch.linalg.pinv(b)
        common = on_b @ full @ on_a
        parts[x] = s * b @ site.p["A"].grad @ on_a, on_b @ (s * site.p["B"].grad @ a)
        shares = {"symmetric": (0.5, 0.5), "zero": (1.0, 0.0)}[x]
        for part, share in zip(parts[x], shares):
            torch.testing.assert_close(part, share * common, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Embedding(9, 6)], ids=["B is zero", "A is zero"])
def test_at_the_start_the_gradients_stay_as_they_are(layer):
    model = nn.Sequential(layer).double()
    adapters = attached(model, "lorapro", r=3, target_modules=["0"])
    x = torch.arange(5) if isinstance(layer, nn.Embedding) else torch.randn(5, 6).double()
    model(x).square().sum().backward()
    [site] = sites_of(adapters).values()
    before = gradients(site)
    site.method.before_step([site], 0)
    assert torch.equal(gradients(site), before)
    assert before.any()


@pytest.mark.parametrize("seed", range(4))
def test_directions_that_b_lacks_are_left_out_and_not_blown_up(seed):
    """Six columns on four outputs, in float32: what rounding leaves of the two others is no direction."""
    found = []
    for dtype in (torch.float64, torch.float32):
        site, _ = one_layer("lorapro", 6, (8, 4))
        gen = torch.Generator().manual_seed(seed)
        full = torch.randn(4, 8, generator=gen).double()
        for tensor in (site.p["A"], site.p["B"]):
            tensor.grad = None
            tensor.data = torch.randn(tensor.shape, generator=gen).to(dtype)
        a, b = site.p["A"].detach().double(), site.p["B"].detach().double()
        site.p["A"].grad = (site.method.scale * b.T @ full).to(dtype)
        site.p["B"].grad = (site.method.scale * full @ a.T).to(dtype)
        site.method.before_step([site], 1)
        found.append(gradients(site).double())
    assert (found[1] - found[0]).norm() < 1e-3 * found[0].norm()


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_nothing_is_larger_than_a_or_b_and_each_layer_has_its_own_rank_and_scale():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(40, 70) for name in ("one", "two", "three")}).double()
    adapters = attached(
        model, "lorapro", r=3, alpha=6.0, target_modules=["one", "two", "three"], rank_pattern={"two": 2}
    )
    tiny.stir(adapters, size=0.5)
    sites = sites_of(adapters)
    truths, fulls = {}, {}
    for name, site in sites.items():
        fulls[name] = torch.randn(70, 40).double()
        site.p["A"].grad = site.method.scale * site.p["B"].detach().T @ fulls[name]
        site.p["B"].grad = site.method.scale * fulls[name] @ site.p["A"].detach().T
        truths[name] = projection(site, fulls[name])
    with Largest() as seen:
        method_of(adapters).before_step(list(sites.values()), 3)
    assert seen.numel == 70 * 3
    for name, site in sites.items():
        torch.testing.assert_close(reach(site) @ gradients(site), truths[name], rtol=1e-7, atol=1e-7)


# ---- Delta-LoRA ---------------------------------------------------------------------------------------------

LAM, SCALE = 2.0, 5.0 / 3


class InPlace(nn.Module):
    """Two layers with LoRA, and their W moved in place by the paper's rule."""

    def __init__(self, weights, biases, pairs):
        super().__init__()
        self.w = [w.clone() for w in weights]
        self.biases = biases
        self.pairs = nn.ParameterList([nn.Parameter(t.clone()) for pair in pairs for t in pair])

    def forward(self, x):
        for i, w in enumerate(self.w):
            a, b = self.pairs[2 * i], self.pairs[2 * i + 1]
            x = x @ w.T + self.biases[i] + SCALE * (x @ a.T) @ b.T
            x = torch.tanh(x) if i == 0 else x
        return x

    def products(self):
        return [(self.pairs[2 * i + 1] @ self.pairs[2 * i]).detach() for i in range(len(self.w))]


def two_layers(quantize, start, dtype=torch.float64, method="deltalora", **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)
    if quantize:
        for i in (0, 2):
            model[i].weight = quantized(model[i].weight)
    settings |= {"lam": LAM, "start": start} if method == "deltalora" else {}
    adapters = attach(model, method, r=3, alpha=5.0, target_modules=["0", "2"], **settings)
    return model, adapters


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("start", [0, 4])
def test_the_branch_is_a_w_that_moves_in_place(start, quantize):
    """14 steps of AdamW with decay: losses, gradients of A, B and x, and what is merged in the end."""
    model, adapters = two_layers(quantize, start)
    widen(adapters)
    sites = list(sites_of(adapters).values())
    weights = [dense(model[i].weight, torch.float64).detach() for i in (0, 2)]
    biases = [model[i].bias.detach() for i in (0, 2)]
    pairs = [(site.p["A"].detach(), site.p["B"].detach()) for site in sites]
    truth = InPlace(weights, biases, pairs)
    optimizer = torch.optim.AdamW(adapters.groups(0.05), weight_decay=0.1)
    other = torch.optim.AdamW(truth.parameters(), lr=0.05, weight_decay=0.1)
    gen = torch.Generator().manual_seed(3)
    goal = torch.randn(7, 5, generator=gen).double()
    anchor = None
    for step in range(14):
        x = torch.randn(7, 6, generator=gen).double().requires_grad_()
        before = truth.products()
        anchor = (
            [(a.detach().clone(), b.detach().clone()) for a, b in zip(*[iter(truth.pairs)] * 2)]
            if (step == start)
            else anchor
        )
        loss = (model(x) - goal).square().mean()
        one_step(adapters, optimizer, loss, step, 14)
        mine, x.grad = x.grad, None
        other.zero_grad()
        theirs = (truth(x) - goal).square().mean()
        theirs.backward()
        other.step()
        torch.testing.assert_close(loss, theirs, **TIGHT)
        torch.testing.assert_close(mine, x.grad, **TIGHT)
        for site, (a, b) in zip(sites, zip(*[iter(truth.pairs)] * 2)):
            torch.testing.assert_close(site.p["A"].grad, a.grad, **TIGHT)
            torch.testing.assert_close(site.p["B"].grad, b.grad, **TIGHT)
        if step + 1 > start:
            for w, old, new in zip(truth.w, before, truth.products()):
                w += LAM * SCALE * (new - old)
    for i, site in enumerate(sites):
        moved = truth.w[i] + SCALE * truth.products()[i]
        torch.testing.assert_close(weights[i] + site.method.delta(site.layer, site.p), moved, **TIGHT)
        a_k, b_k = anchor[i]
        closed = SCALE * ((1 + LAM) * truth.products()[i] - LAM * b_k @ a_k)
        torch.testing.assert_close(moved - weights[i], closed, **TIGHT)
        rank = torch.linalg.matrix_rank(moved - weights[i], rtol=1e-9)
        assert rank == min(6 if start else 3, *weights[i].shape)  # B_K is zero at K = 0


def test_up_to_k_it_is_lora_to_the_last_bit():
    results = []
    for method in ("lora", "deltalora"):
        model, adapters = two_layers(False, 5, torch.bfloat16, method, seed=1)
        optimizer = torch.optim.AdamW(adapters.groups(0.05))
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(3)).bfloat16()
        outputs = []
        for step in range(8):
            y = model(x)
            outputs.append(y.detach())
            one_step(adapters, optimizer, y.square().mean(), step, 8)
        results.append(outputs)
    same = [torch.equal(a, b) for a, b in zip(*results)]
    assert same[:6] == [True] * 6
    assert not any(same[6:])


def test_gradients_of_a_and_b_have_factor_1_and_that_of_x_has_1_and_lambda():
    model, adapters = two_layers(False, 0)
    widen(adapters)
    tiny.stir(adapters, size=0.5)
    site = sites_of(adapters)["0"]
    x = torch.randn(7, 6).double().requires_grad_()
    g = torch.randn(7, 8).double()
    model[0](x).backward(g)
    a, b = site.p["A"].detach(), site.p["B"].detach()
    torch.testing.assert_close(site.p["A"].grad, SCALE * b.T @ g.T @ x.detach(), **TIGHT)
    torch.testing.assert_close(site.p["B"].grad, SCALE * g.T @ x.detach() @ a.T, **TIGHT)
    torch.testing.assert_close(x.grad, g @ (model[0].weight + (1 + LAM) * SCALE * b @ a), **TIGHT)


def test_peft_takes_the_pair_as_a_lora_of_twice_the_rank():
    model, adapters = two_layers(False, 1)
    sites = sites_of(adapters)
    optimizer = torch.optim.AdamW(adapters.groups(0.05))
    x = torch.randn(7, 6)
    widen(adapters)
    for step in range(4):
        one_step(adapters, optimizer, model(x.double()).square().mean(), step, 4)
    base = two_layers(False, 1)[0]
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    plain.load_state_dict(base.state_dict())
    theirs = get_peft_model(plain, LoraConfig(r=6, lora_alpha=10, target_modules=["0", "2"]))
    for key, site in sites.items():
        pair = site.method.pair(site.layer, site.p)
        assert (pair.A.shape[0], pair.B.shape[1], pair.e) == (6, 6, 10 / 6)
        module = theirs.get_submodule(PREFIX + key)
        module.lora_A["default"].weight.data = pair.A.detach()
        module.lora_B["default"].weight.data = pair.B.detach()
    torch.testing.assert_close(theirs(x.double()), model(x.double()), **TIGHT)


# ---- settings that are none ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("adalora", {"beta1": 1.0}, "beta1 is 1.0"),
        ("adalora", {"beta2": 0}, "beta2 is 0"),
        ("adalora", {"target_r": -1}, "target_r is -1"),
        ("adalora", {"target_r": 2.5}, "method.target_r is 2.5"),
        ("adalora", {"deltaT": 0}, "deltaT is 0"),
        ("adalora", {"orth": -0.1}, "orth is -0.1"),
        ("adalora", {"orth_form": "sum"}, "orth_form is 'sum'"),
        ("adalora", {"tinit": 0.5, "tfinal": 0.5}, "tinit 0.5 and tfinal 0.5 leave the budget no steps"),
        ("adalora", {"tinit": -1}, "tinit -1.0 and tfinal 0.5 leave the budget no steps"),
        ("lorapro", {"x": "half"}, "x is 'half'"),
        ("deltalora", {"lam": -1}, "lam is -1.0"),
        ("deltalora", {"start": -1}, "start is -1"),
        ("deltalora", {"start": 0.5}, "method.start is 0.5"),
    ],
)
def test_wrong_settings_are_named(method, wrong, message):
    with pytest.raises(UserError) as caught:
        methods.make(method, wrong)
    assert caught.value.message.startswith(message)


def test_a_run_too_short_for_its_schedule_is_no_silent_run_without_a_budget():
    method = AdaLoRA(tinit=10, tfinal=20)
    with pytest.raises(UserError, match="tinit 10 and tfinal 20 leave none of 30 steps"):
        method.after_step([], 0, 30)
    assert method.phases(31) == (10, 11)
