"""Methods that start from the weight: PiSSA, MiLoRA and OLoRA against PEFT and in float64, LoftQ against PEFT.

PEFT writes W - s B0 A0 into the base. Both sides then sum the same numbers in another order, W being rounded
once more on theirs: 1e-5 in float32.
"""

from __future__ import annotations

import json
import warnings

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.loftq_utils import loftq_init
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from loraloom import methods
from loraloom.adapt import attach
from loraloom.adapter_io import load_adapter
from loraloom.errors import UserError
from loraloom.layers import view
from loraloom.methods.base import Site
from loraloom.quant import Weight4, dense, quantized

# of transformers to PEFT, about a name that PEFT still asks for
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
STARTS = ["pissa", "milora", "olora"]
R = 4
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "c_proj"]}
CASES = [("pissa", "llama", 4.0), ("pissa", "llama", 6.0), ("pissa", "gpt2", 6.0)]
CASES += [("olora", "llama", 4.0), ("olora", "llama", 6.0)]
against_peft = pytest.mark.parametrize(("method", "kind", "alpha"), CASES)


def logits(model):
    return model(tiny.ids()).logits


def theirs(method, kind, alpha):
    return get_peft_model(tiny.build(kind), config_of(method, kind, alpha)).eval()


def config_of(method, kind, alpha, **settings):
    settings |= {"r": R, "lora_alpha": alpha, "target_modules": TARGETS[kind]}
    return LoraConfig(init_lora_weights=method, fan_in_fan_out=kind == "gpt2", **settings)


def ours(method, kind, alpha, **settings):
    model = tiny.build(kind)
    adapters = attach(model, method, r=R, alpha=alpha, target_modules=TARGETS[kind], **settings)
    return model, adapters.adapters["default"].sites


def their_pairs(model):
    """PEFT's A and B by module, as parameters."""
    parameters = dict(model.named_parameters())
    found = {}
    for name, parameter in parameters.items():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            found[module] = (parameter, parameters[name.replace("lora_A", "lora_B")])
    return found


def train_both(model, sites, size=0.1):
    """The same change of A and B on both sides."""
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module, pair in their_pairs(model).items():
            for tensor, mine in zip(pair, (sites[module].p["A"], sites[module].p["B"])):
                noise = torch.randn(tensor.shape, generator=gen) * size
                tensor.add_(noise)
                mine.add_(noise)


def saved(model, folder, **options):
    with warnings.catch_warnings():  # of configurations that PEFT cannot look up offline
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), **options)


def linear(outs, ins, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(ins, outs)


def start_of(method, module, *, seed=1, r=R, **settings):
    made = methods.find(method)(r=r, **settings)
    return made, made.init(view(module, "layer"), torch.Generator().manual_seed(seed))


# ---- against PEFT -------------------------------------------------------------------------------------------


@against_peft
def test_their_start_and_what_they_leave_of_w(method, kind, alpha):
    model = theirs(method, kind, alpha)
    pristine = tiny.build(kind)
    _, sites = ours(method, kind, alpha)
    pairs = their_pairs(model)
    assert set(pairs) == set(sites)
    for module, (a, b) in pairs.items():
        p = sites[module].p
        torch.testing.assert_close(p["A0"], a.detach(), **CLOSE)
        torch.testing.assert_close(p["B0"], b.detach(), **CLOSE)
        left = view(model.base_model.model.get_submodule(module).base_layer, module).weight()
        whole = view(pristine.get_submodule(module), module).weight()
        torch.testing.assert_close(left + alpha / R * p["B0"] @ p["A0"], whole, **CLOSE)
        assert not torch.allclose(left, whole, atol=1e-2)


@against_peft
def test_their_outputs_and_gradients_without_their_change_of_the_base(method, kind, alpha):
    model = theirs(method, kind, alpha)
    mine, sites = ours(method, kind, alpha)
    train_both(model, sites)
    assert not torch.allclose(logits(mine), logits(tiny.build(kind)), atol=1e-2)
    torch.testing.assert_close(logits(mine), logits(model), **CLOSE)
    for side in (mine, model):
        logits(side).square().mean().backward()
    for module, (a, b) in their_pairs(model).items():
        p = sites[module].p
        assert b.grad.any()
        torch.testing.assert_close(p["A"].grad, a.grad, **CLOSE)
        torch.testing.assert_close(p["B"].grad, b.grad, **CLOSE)


@against_peft
def test_their_folder_means_our_start_on_the_pristine_base_and_their_pair(method, kind, alpha, tmp_path):
    """Saved without path_initial_model_for_weight_conversion: A and B alone, and the base is not the one."""
    model = theirs(method, kind, alpha)
    train_both(model, ours(method, kind, alpha)[1])
    saved(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert methods.find(method).from_peft(config) == {}
    mine, sites = ours(method, kind, alpha)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    with torch.no_grad():
        for module, site in sites.items():
            for name in "AB":
                site.p[name].copy_(tensors[f"base_model.model.{module}.lora_{name}.weight"])
    torch.testing.assert_close(logits(mine), logits(model), **CLOSE)
    again = PeftModel.from_pretrained(tiny.build(kind), str(tmp_path)).eval()  # which starts anew, too
    torch.testing.assert_close(logits(mine), logits(again), **CLOSE)


@against_peft
def test_their_converted_folder_is_our_pair_as_a_lora_of_twice_the_rank(method, kind, alpha, tmp_path):
    model = theirs(method, kind, alpha)
    mine, sites = ours(method, kind, alpha)
    model.peft_config["default"].init_lora_weights = True
    saved(model, tmp_path / "start")
    model.peft_config["default"].init_lora_weights = method
    train_both(model, sites)
    saved(model, tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    tensors = load_file(tmp_path / "end" / "adapter_model.safetensors")
    plain = tiny.build(kind)
    adapters = attach(plain, r=2 * R, alpha=2 * alpha, target_modules=TARGETS[kind])
    for module, site in adapters.adapters["default"].sites.items():
        pair = sites[module].method.pair(sites[module].layer, sites[module].p)
        a, b = (tensors[f"base_model.model.{module}.lora_{name}.weight"] for name in "AB")
        assert pair.A.shape == a.shape
        assert pair.B.shape == b.shape
        torch.testing.assert_close(pair.B @ pair.A, b @ a, **CLOSE)
        site.p["A"].data, site.p["B"].data = pair.A.detach(), pair.B.detach()
    torch.testing.assert_close(logits(plain), logits(mine), **CLOSE)
    read = tiny.build(kind)
    load_adapter(read, tmp_path / "end")
    torch.testing.assert_close(logits(read), logits(mine), **CLOSE)


def test_a_convolution_of_one_dimension_that_peft_takes_the_wrong_way_round():
    """PEFT's OLoRA forgets the transpose: on a square weight its start is not the base's, and ours is."""
    pristine = tiny.build("gpt2")
    config = LoraConfig(r=R, target_modules=["attn.c_proj"], init_lora_weights="olora", fan_in_fan_out=True)
    wrong = get_peft_model(tiny.build("gpt2"), config).eval()
    assert not torch.allclose(logits(wrong), logits(pristine), atol=1e-2)
    module = pristine.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(module, Conv1D)
    same = nn.Linear(*module.weight.shape)
    same.weight.data = module.weight.data.T.contiguous()
    _, p = start_of("olora", module)
    _, q = start_of("olora", same)
    torch.testing.assert_close(p["B0"] @ p["A0"], q["B0"] @ q["A0"], **CLOSE)


def test_which_of_their_files_are_read():
    pissa, olora = methods.find("pissa").from_peft, methods.find("olora").from_peft
    for init in (True, "pissa_niter_4", "corda", "loftq", "gaussian"):
        assert pissa({"init_lora_weights": init}) is None
        assert olora({"init_lora_weights": init}) is None
    assert olora({"init_lora_weights": "OLoRA"}) == {}
    for read, init in ((pissa, "pissa"), (olora, "olora")):
        assert read({"init_lora_weights": init, "use_rslora": False, "fan_in_fan_out": False}) == {}
        assert read({"init_lora_weights": init, "use_rslora": True}) is None
        assert read({"init_lora_weights": init, "use_dora": True}) is None
    assert olora({"init_lora_weights": "olora", "fan_in_fan_out": True}) is None
    assert methods.find("milora").from_peft({"init_lora_weights": "milora"}) is None
    assert methods.find("loftq").from_peft({"init_lora_weights": "loftq"}) is None


# ---- the start ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", STARTS)
def test_a_bfloat16_model_is_unchanged_at_the_start_to_the_last_bit(method, kind):
    """Under dropout too. As PEFT does it, in two parts that cancel, bfloat16 does not bring W back."""
    model = tiny.build(kind).bfloat16()
    truth = logits(model)
    attach(model, method, r=R, dropout=0.5)
    assert torch.equal(logits(model), truth)
    model.train()
    assert torch.equal(logits(model), truth)
    if (method, kind) in {case[:2] for case in CASES}:
        with_peft = get_peft_model(tiny.build(kind).bfloat16(), config_of(method, kind, 8)).eval()
        assert not torch.equal(logits(with_peft), truth)


@pytest.mark.parametrize("method", STARTS)
def test_in_4_bits_the_start_is_that_of_the_numbers_they_stand_for(method):
    coded = linear(70, 50)
    coded.weight = quantized(coded.weight)
    same = linear(70, 50)
    same.weight.data = dense(coded.weight)
    p, q = start_of(method, coded)[1], start_of(method, same)[1]
    assert all(torch.equal(p[name], q[name]) for name in ("A", "B", "A0", "B0"))
    x = torch.randn(3, 50).bfloat16()
    model = nn.Sequential(coded).bfloat16()
    truth = model(x)
    attach(model, method, r=R, target_modules=["0"])
    assert isinstance(coded.weight, Weight4)
    assert torch.equal(model(x), truth)


def in_float64(module):
    return torch.linalg.svd(module.weight.detach().double(), full_matrices=False)


@pytest.mark.parametrize("alpha", [2.0, 4.0, 12.0])
@pytest.mark.parametrize(("method", "part"), [("pissa", slice(0, R)), ("milora", slice(-R, None))])
def test_the_start_is_a_part_of_the_spectrum_whatever_alpha_is(method, part, alpha):
    """s B0 A0 = U S V of that part, shared out evenly: B0 has the norms of A0, sqrt(S / s)."""
    for module in (linear(9, 20), linear(20, 9)):
        u, s, v = in_float64(module)
        made, p = start_of(method, module, alpha=alpha)
        truth = u[:, part] * s[part] @ v[part]
        torch.testing.assert_close(made.scale * p["B0"].double() @ p["A0"].double(), truth, **CLOSE)
        norm = (s[part] / (alpha / R)).sqrt().float()
        torch.testing.assert_close(p["A0"].norm(dim=1), norm, **CLOSE)
        torch.testing.assert_close(p["B0"].norm(dim=0), norm, **CLOSE)


def test_oloras_start_is_an_orthonormal_basis_of_the_first_columns():
    """B0 A0 projects W on the span of its first r columns, and A0 is triangular."""
    for module in (linear(9, 20), linear(20, 9)):
        w = module.weight.detach().double()
        _, p = start_of("olora", module, alpha=12.0)
        torch.testing.assert_close(p["B0"].T @ p["B0"], torch.eye(R), **CLOSE)
        projected = w[:, :R] @ torch.linalg.pinv(w[:, :R]) @ w
        torch.testing.assert_close(p["B0"].double() @ p["A0"].double(), projected, **CLOSE)
        assert not p["A0"].tril(-1).any()


@pytest.mark.parametrize("niter", [1, 2, 5])
@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
def test_the_fast_decomposition_is_torchs_with_a_draw_of_our_own(shape, niter):
    module = linear(*shape)
    made, p = start_of("pissa", module, seed=7, niter=niter, alpha=6.0)
    torch.manual_seed(7)
    u, s, v = torch.svd_lowrank(module.weight.detach(), R, niter=niter)
    torch.testing.assert_close(made.scale * p["B0"] @ p["A0"], u * s @ v.T, **CLOSE)
    assert torch.equal(start_of("pissa", module, seed=7, niter=niter, alpha=6.0)[1]["A"], p["A"])
    assert not torch.equal(start_of("pissa", module, seed=8, niter=niter, alpha=6.0)[1]["A"], p["A"])


def test_more_steps_of_the_fast_decomposition_come_nearer_to_the_exact_one():
    module = linear(60, 80)
    exact = start_of("pissa", module)[1]
    truth = exact["B0"] @ exact["A0"]
    errors = []
    for niter in (1, 4, 16, 64):
        p = start_of("pissa", module, niter=niter)[1]
        errors.append(float((p["B0"] @ p["A0"] - truth).norm() / truth.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 < 0.1 < errors[0]


@pytest.mark.parametrize("niter", [-1, 2.5, "many", None])
def test_a_number_of_steps_that_is_none(niter):
    with pytest.raises(UserError, match=r"method\.niter is "):
        methods.make("pissa", {"niter": niter})


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_a_weight_of_zeros_starts_as_lora_does_and_can_learn(method):
    module = linear(9, 20)
    nn.init.zeros_(module.weight)
    adapters = attach(nn.Sequential(module), method, r=R, target_modules=["0"])
    p = adapters.adapters["default"].sites["0"].p
    assert p["A"].any(dim=1).all()
    assert not p["B"].any()
    module(torch.randn(3, 20)).square().sum().backward()
    assert p["B"].grad.any()


@pytest.mark.parametrize("niter", [0, 2])
@pytest.mark.parametrize("method", [*STARTS, "loftq"])
def test_a_weight_without_numbers_gives_the_shapes(method, niter):
    settings = {"niter": niter} if method == "pissa" else {}
    for shape in ((9, 20), (20, 9)):
        p = start_of(method, linear(*shape).to("meta"), **settings)[1]
        assert p["A"].shape == (R, shape[1])
        assert p["B"].shape == (shape[0], R)


# ---- LoftQ --------------------------------------------------------------------------------------------------


class OnCPU(TorchFunctionMode):
    """PEFT's LoftQ insists on a GPU: its calls for one are answered by the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = tuple("cpu" if arg == "cuda" else arg for arg in args)
        kwargs = {name: "cpu" if arg == "cuda" else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def by_peft(w, r):
    """PEFT's Q, A and B after one iteration.

    Rows must be whole blocks of 64: on a CPU bitsandbytes dequantises others with the wrong scales.
    """
    with OnCPU(), torch.compiler.set_stance("force_eager"):
        return loftq_init(w, num_bits=4, reduced_rank=r, num_iter=1)


def loftq_on(w, *, r, alpha, **quantisation):
    """(Q, s B A) of ours."""
    module = linear(*w.shape)
    module.weight = quantized(w, **quantisation)
    method, p = start_of("loftq", module, r=r, alpha=alpha)
    layer = view(module, "layer")
    p = method.from_original(Site(layer, method, p), w)
    return layer.weight(torch.float32), method.delta(layer, p).detach()


@pytest.mark.parametrize("shape", [(48, 64), (32, 128)])
def test_loftq_is_pefts_where_alpha_is_the_rank(shape):
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 0.02
    their_q, a, b = by_peft(w.clone(), 8)
    q, delta = loftq_on(w, r=8, alpha=8.0, double=False)
    assert torch.equal(q, their_q)
    torch.testing.assert_close(delta, b @ a, rtol=1e-4, atol=1e-7)  # of numbers of about 1e-3
    # at twice the rank they add twice the correction: the error turns its sign, and keeps its size
    error = (w - q).norm()
    torch.testing.assert_close((w - q - 2.0 * b @ a).norm(), error, **CLOSE)
    _, delta = loftq_on(w, r=8, alpha=16.0, double=False)
    torch.testing.assert_close(delta, b @ a, rtol=1e-4, atol=1e-7)
    assert (w - q - delta).norm() < 0.95 * error


@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_every_layer_starts_nearer_to_the_original_by_the_largest_values_of_its_error(alpha):
    model = tiny.build("gpt2")
    originals = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            originals[name] = module.weight.detach().T.clone()
            module.weight = quantized(module.weight, flipped=True)
    adapters = attach(model, "loftq", r=R, alpha=alpha, target_modules=["q", "v", "c_fc", "c_proj"])
    sites = adapters.adapters["default"].sites
    assert len(sites) == 2 * 5
    before = {name: model.get_submodule(name).weight for name in originals}
    for site in sites.values():
        w = originals[site.layer.name.partition(":")[0]]
        w = w if site.layer.rows is None else w[site.layer.rows]
        error = w - site.layer.weight(torch.float32)
        found = site.method.from_original(site, w)
        assert set(found) == {"A", "B"} == set(site.p)
        assert all(isinstance(tensor, nn.Parameter) for tensor in found.values())
        assert all(found[name].shape == site.p[name].shape for name in found)
        left = error - site.method.delta(site.layer, found)
        tail = torch.linalg.svdvals(error.double())[R:].norm().float()
        torch.testing.assert_close(left.norm().detach(), tail, rtol=1e-5, atol=1e-7)
        assert left.norm() < error.norm()
    assert all(model.get_submodule(name).weight is weight for name, weight in before.items())


def test_loftq_before_it_sees_the_original_is_lora():
    coded = linear(9, 20)
    coded.weight = quantized(coded.weight)
    p, q = start_of("loftq", coded)[1], start_of("lora", linear(9, 20))[1]
    assert torch.equal(p["A"], q["A"])
    assert not p["B"].any()


def test_loftq_where_quantising_lost_nothing_stays_lora():
    coded = linear(9, 20)
    coded.weight = quantized(coded.weight)
    method, p = start_of("loftq", coded)
    found = method.from_original(Site(view(coded, "layer"), method, p), dense(coded.weight))
    assert torch.equal(found["A"], p["A"])
    assert not found["B"].any()


def test_loftq_needs_4_bits():
    with pytest.raises(UserError, match="loftq cannot go with a dense layer"):
        attach(nn.Sequential(linear(9, 20)), "loftq", r=R, target_modules=["0"])
