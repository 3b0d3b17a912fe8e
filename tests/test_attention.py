"""Attention by documents against each document's softmax in float64; whole models against documents one by one.

The kernels of a GPU are compared with float64 there; elsewhere the same pieces run as the definition.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from tiny_models import PAD, VOCABULARY, causal
from torch import Tensor, nn

from loraloom import attention
from loraloom.attention import DocumentMask, attend, mask_of, planning, varlen_reason
from loraloom.config import ModelConfig
from loraloom.data import IGNORED, Example
from loraloom.errors import UserError
from loraloom.kernels import attention as kernels
from loraloom.kernels import attention_plan
from loraloom.kernels.attention_plan import pieces, seconds
from loraloom.kernels.attention_short import WIDEST
from loraloom.model import load_model, settle_attention, write_model
from loraloom.nll import honours_boundaries, nll_sum
from loraloom.packing import Batch, Documents, pack
from loraloom.sdpa import fused_attention
from loraloom.skeleton import meta_model
from loraloom.trace import Shapes, Tape

CPU = torch.device("cpu")


def documents(*lengths: int, device: torch.device | str = "cpu") -> Documents:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Documents(starts.to(device), lengths)


def definition(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None
) -> Tensor:
    """Each document's softmax, key by key, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    out, first, share = [], 0, q.shape[1] // k.shape[1]
    for length in lengths:
        for t in range(first, first + length):
            begin = first if window is None else max(first, t + 1 - window)
            keys, values = (x[begin : t + 1].repeat_interleave(share, dim=1) for x in (k, v))
            weight = torch.einsum("hd,jhd->hj", q[t], keys).mul(scale).softmax(-1)
            out.append(torch.einsum("hj,jhd->hd", weight, values))
        first += length
    return torch.stack(out)


def merged(
    tokens: int, heads: int, shared: int, width: int, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One buffer, and q, k and v as views of it."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(tokens, (heads + 2 * shared) * width, dtype=torch.float64, generator=generator)
    whole = whole.to(**options).requires_grad_()
    parts = whole.split([heads * width, shared * width, shared * width], dim=1)
    return whole, tuple(part.unflatten(1, (-1, width)) for part in parts)


def both_ways(out: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of a weighted sum of it."""
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    (grad,) = torch.autograd.grad(out, whole, weight)
    return out.detach().double().cpu(), grad.double().cpu()


LENGTHS = {
    "mixed": (5, 1, 12, 1, 1, 3),
    "equal": (6, 6, 6),
    "one": (17,),
    "of one token": (1, 1, 1, 1),
    "empty among": (0, 4, 0, 0, 7, 0),
}


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attend_is_each_documents_softmax(lengths, shared, window):
    whole, (q, k, v) = merged(sum(lengths), 4, shared, 8, dtype=torch.float64)
    out, grad = both_ways(attend(q, k, v, documents(*lengths), 0.3, window), whole)
    expected, expected_grad = both_ways(definition(q, k, v, lengths, 0.3, window), whole)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-11)


def test_the_scale_is_the_root_of_the_width_where_none_is_given():
    _, (q, k, v) = merged(9, 2, 2, 16, dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v, documents(4, 5)), definition(q, k, v, (4, 5), 0.25, None))


def test_lengths_may_be_unknown():
    """As in a step that is replayed: only the starts say where documents begin."""
    _, (q, k, v) = merged(12, 2, 1, 8, dtype=torch.float64)
    starts = torch.tensor([0, 3, 8, 12, 12], dtype=torch.int32)
    out = attend(q, k, v, Documents(starts, (6, 6, 6, 6), known=False), 0.3)
    torch.testing.assert_close(out, definition(q, k, v, (3, 5, 4), 0.3, None))


def test_what_does_not_fit_is_refused():
    _, (q, k, v) = merged(8, 4, 2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        attend(q, k[:, :, :4], v, documents(8))
    with pytest.raises(ValueError, match="do not fit"):
        attend(q[:, :3], k, v, documents(8))
    with pytest.raises(ValueError, match="7 tokens for 8"):
        attend(q, k, v, documents(3, 4))
    with pytest.raises(ValueError, match="32 bits"):
        kernels.varlen(
            *(x.expand(2**19, 32, 128) for x in torch.empty(3, 1, 1, 1)), documents(2**19).starts, 2**19
        )


# ==== which kernel serves what ===============================================================================


def kinds(
    *lengths: int, window: int | None = None, hopper: bool = True, heads: int = 32, short: bool = True
) -> list[tuple[str, int]]:
    return [(piece.kind, piece.count) for piece in pieces(lengths, heads, 128, window, hopper, short)]


def test_equal_long_documents_are_a_dense_batch():
    assert kinds(*[2048] * 4) == [("dense", 4)]
    assert kinds(*[1024] * 8) == [("dense", 8)]
    assert kinds(8192) == [("dense", 1)]
    assert kinds(2048, hopper=False) == [("short", 1)]
    assert kinds(2048, hopper=False, short=False) == [("varlen", 1)]
    assert kinds(*[2048] * 4, window=1024, short=False) == [("varlen", 4)]
    assert kinds(*[2048] * 4, window=2048) == [("dense", 4)]


def test_short_documents_have_kernels_of_their_own():
    assert kinds(*[60] * 640) == [("short", 640)]
    assert kinds(*[60] * 640, short=False) == [("dense", 640)]
    assert kinds(*[60] * 640, short=False, hopper=False) == [("varlen", 640)]
    assert kinds(100, 90, 16000, hopper=False) == [("varlen", 3)]


def test_long_documents_of_a_mixed_batch_go_alone():
    short = [100, 90] * 10
    assert kinds(*short, 300, 200) == [("short", 22)]
    assert kinds(8000, *short, 300) == [("dense", 1), ("short", 21)]
    assert kinds(*short, 8000, 300) == [("short", 20), ("dense", 1), ("short", 1)]
    assert kinds(8000, 8000, *short) == [("dense", 2), ("short", 20)]
    assert kinds(1100, *short) == [("short", 21)]  # padding and cutting would cost more than is gained
    assert kinds(8000, *short, 300, short=False) == [("dense", 1), ("varlen", 21)]


@pytest.mark.parametrize("lengths", [(8000, 100, 100, 50), (90, 7000, 0, 7000, 20), (5000, 4000, 3000)])
def test_pieces_cover_every_token_once(lengths):
    plan = pieces(lengths, 32, 128, None, True, True)
    assert [piece.documents[0] for piece in plan] == [0, *(piece.documents[1] for piece in plan[:-1])]
    assert plan[-1].documents[1] == len(lengths)
    for piece in plan:
        first, behind = piece.documents
        assert piece.tokens == (sum(lengths[:first]), sum(lengths[:behind]))
        assert piece.longest == max(lengths[first:behind]) <= piece.padded


def test_no_call_counts_beyond_32_bits():
    """2^31 / (64 * 128) = 262,144 rows, 128 of them for each document."""
    lengths = (100, 90) * 1500
    plan = pieces(lengths, 64, 128, None, True, False)
    assert len(plan) == 3
    for piece in plan:
        rows = piece.tokens[1] - piece.tokens[0] + 128 * piece.count
        assert rows * 64 * 128 < 2**31
        assert (rows + 228) * 64 * 128 >= 2**31 or piece is plan[-1]


def test_the_rates_are_those_measured():
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "attention_kernels.json"
    measured = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["heads"] == "7B"]
    found = {(row["kind"], row["length"]): row for row in measured if row["length"] != "alpaca"}
    assert {length for _, length in found} == set(attention_plan.LENGTHS)
    for (kind, length), row in found.items():
        place = attention_plan.LENGTHS.index(length)
        assert [rates[place] for rates in attention_plan.RATES[kind]] == [
            round(rate) for rate in row["tflop_per_s"]
        ]
        own = row["forward_ms"] + row["backward_ms"]
        assert seconds(kind, length, 16384 // length, 4096) == pytest.approx(own / 1e3, rel=0.1)


def test_below_the_lengths_measured_a_token_takes_one_time():
    assert seconds("short", 4, 800, 4096) == pytest.approx(seconds("short", 32, 100, 4096))


@pytest.mark.parametrize("shared", [4, 2])
def test_a_batch_cut_into_pieces_is_the_same(monkeypatch, shared):
    """Lengths small enough for float64, and calls and copies that cost nothing, so that it is cut."""
    monkeypatch.setattr(attention_plan, "CALL", 0.0)
    monkeypatch.setattr(attention_plan, "MOVED", 0.0)
    monkeypatch.setattr(attention_plan, "GRAIN", 8)
    monkeypatch.setattr(attention_plan, "LENGTHS", (10, 20, 40, 80))
    rates = {"varlen": (1,) * 4, "dense": (2,) * 4, "short": (1.5,) * 4}
    monkeypatch.setattr(attention_plan, "RATES", {kind: (rate, rate) for kind, rate in rates.items()})
    lengths = (3, 14, 14, 1, 2, 23, 3)
    plan = pieces.__wrapped__(lengths, 4, 8, None, True, True)
    assert [piece.kind for piece in plan] == ["short", "dense", "short", "dense", "short"]
    whole, (q, k, v) = merged(sum(lengths), 4, shared, 8, dtype=torch.float64)
    out, grad = both_ways(attention.run(plan, q, k, v, documents(*lengths), 0.3, None), whole)
    expected, expected_grad = both_ways(definition(q, k, v, lengths, 0.3, None), whole)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-11)


# ==== whole models ===========================================================================================

PLAIN = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN |= {"max_position_embeddings": 96, "bos_token_id": None, "eos_token_id": 257, "pad_token_id": PAD}
SHARED = PLAIN | {"intermediate_size": 64, "num_key_value_heads": 2}
OTHERS = {
    "mistral, window": lambda: tf.MistralConfig(**SHARED, sliding_window=6),
    "phi3": lambda: tf.Phi3Config(**SHARED, original_max_position_embeddings=96),
    "gemma": lambda: tf.GemmaConfig(**SHARED, head_dim=8),
    "gemma3": lambda: tf.Gemma3TextConfig(**SHARED, head_dim=8, sliding_window=5),
    "qwen3": lambda: tf.Qwen3Config(**SHARED, head_dim=8),
    "qwen2, window": lambda: tf.Qwen2Config(
        **SHARED, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "opt": lambda: tf.OPTConfig(**PLAIN, ffn_dim=64, word_embed_proj_dim=32),
}
KINDS = ["llama", "qwen2", "neox", "gpt2", *OTHERS]


def made(kind: str, *, attention: str = "sdpa", scale: float = 6.0) -> Any:
    if kind not in OTHERS:
        return causal(kind, attention=attention, scale=scale)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(OTHERS[kind](), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return model.eval()


def with_documents(kind: str, **options: Any) -> Any:
    model = made(kind, **options)
    assert settle_attention(model, "varlen", CPU, torch.float32) == "varlen: as set"
    return model


def examples(lengths: tuple[int, ...] = (5, 21, 9, 14, 30, 2)) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(256, (length,), generator=generator).tolist()
        first = 1 + length // 3
        found.append(Example(ids, [IGNORED] * first + ids[first:], f"rows.jsonl:{number + 1}"))
    return found


def loss_and_gradients(model: nn.Module, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    total = torch.stack([nll_sum(model, batch) for batch in batches]).sum()
    total.backward()
    return float(total.detach()), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("kind", KINDS)
def test_packed_by_documents_is_one_by_one_by_sdpa(kind):
    rows = examples()
    plain = made(kind).double()
    alone = pack(rows, micro_tokens=1, packing=False, pad_id=PAD)
    expected, expected_grads = loss_and_gradients(plain, alone)
    model = with_documents(kind).double()
    for packing in (True, False):
        for micro_tokens in (64, 40):
            batches = pack(rows, micro_tokens=micro_tokens, packing=packing, pad_id=PAD)
            loss, grads = loss_and_gradients(model, batches)
            assert loss == pytest.approx(expected, rel=1e-9)
            assert grads.keys() == expected_grads.keys()
            size = max(float(grad.abs().max()) for grad in expected_grads.values())
            within = 1e-5 if "gemma" in kind else 1e-12  # Gemma's norms compute in float32 in any case
            for name, grad in grads.items():
                assert float((grad - expected_grads[name]).abs().max()) <= within * size, name


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_attends_by_documents_and_no_mask_is_made(kind, monkeypatch):
    model = with_documents(kind)
    (batch,) = pack(examples((5, 21, 9)), micro_tokens=64, packing=True, pad_id=PAD)
    seen = []

    def count(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args[3].lengths)
        return attend(*args, **kwargs)

    def no_mask(*_: Any, **__: Any) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setattr(attention, "attend", count)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", no_mask)
    nll_sum(model, batch)
    lengths = batch.documents.lengths
    assert len(seen) >= 2  # layers; the head's proof may run the model too
    assert seen[-2:] == [lengths, lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_generation_and_own_calls_are_as_before(kind):
    plain, model = made(kind), with_documents(kind)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 250, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padded on the left
    for arguments in (
        {},
        {"attention_mask": mask},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]] * 2)},
    ):
        with torch.no_grad():
            assert torch.equal(
                model(input_ids=ids, **arguments).logits, plain(input_ids=ids, **arguments).logits
            )
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind, dtype):
    for scale in (1.0, 6.0):
        model = with_documents(kind, scale=scale).to(dtype)
        assert honours_boundaries(model, VOCABULARY) is None


def test_documents_that_leak_are_caught(monkeypatch):
    """An attention that joins all documents of a row is found by the probe that guards packing."""
    model = with_documents("llama")

    def joined(q: Tensor, k: Tensor, v: Tensor, documents_: Documents, *rest: Any) -> Tensor:
        return attend(q, k, v, documents(len(q)), *rest)

    monkeypatch.setattr(attention, "attend", joined)
    assert "see the one before" in (honours_boundaries(model, VOCABULARY) or "")
    assert "other logits than alone" in (varlen_reason(model) or "")


def test_a_recomputed_layer_finds_its_documents():
    model = with_documents("llama").double()
    batches = pack(examples(), micro_tokens=64, packing=True, pad_id=PAD)
    expected, expected_grads = loss_and_gradients(model, batches)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:  # its name in transformers before 5.23
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    loss, grads = loss_and_gradients(model, batches)
    assert loss == expected
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name])


def test_whoever_takes_the_mask_for_numbers_fails():
    mask = mask_of(documents(3, 4))
    scores = torch.zeros(1, 2, 7, 7)
    for take in (lambda: scores + mask, lambda: scores.masked_fill(mask, 0.0)):
        with pytest.raises(RuntimeError):
            take()
    q = torch.zeros(1, 2, 7, 8)
    with pytest.raises(RuntimeError):
        nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert type(mask & mask) is Tensor  # what is made of it carries nothing


# ==== models that cannot =====================================================================================

GEMMA2 = SHARED | {"head_dim": 8, "query_pre_attn_scalar": 8}
CANNOT = {
    "softcap": (lambda: tf.Gemma2Config(**GEMMA2, sliding_window=5), "softcap"),
    "sinks": (
        lambda: tf.GptOssConfig(
            **SHARED, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=5
        ),
        "s_aux",
    ),
    "falcon": (lambda: tiny.CONFIGS["falcon-7b"](), "attention of its own"),
    "values of another width": (
        lambda: tf.DeepseekV3Config(
            **PLAIN,
            intermediate_size=64,
            moe_intermediate_size=16,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=1,
            n_shared_experts=1,
            first_k_dense_replace=2,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        ),
        "values",
    ),
    "chunks": (
        lambda: tf.Llama4TextConfig(
            **SHARED,
            head_dim=8,
            intermediate_size_mlp=64,
            num_local_experts=2,
            moe_layers=[],
            attention_chunk_size=4096,
        ),
        "mask's window is 4096",
    ),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_a_model_that_cannot_is_told_so(kind):
    config, why = CANNOT[kind]
    torch.manual_seed(0)
    for implementation in ("sdpa", "eager"):
        try:
            model = tf.AutoModelForCausalLM.from_config(config(), attn_implementation=implementation).eval()
            break
        except ValueError:
            continue
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=why) as caught:
        settle_attention(model, "varlen", CPU, torch.float32)
    assert "model.attention=sdpa" in (caught.value.hint or "")
    assert model.config._attn_implementation == before


def test_a_window_that_the_layers_do_not_know_is_found_at_any_length():
    """A mask of 4,096 tokens shuts nothing out of twenty: the mask itself is asked."""
    model = made("mistral, window")
    model.config.sliding_window = 4096
    assert settle_attention(model, "varlen", CPU, torch.float32) == "varlen: as set"
    for layer in model.model.layers:
        own = type(layer.self_attn).forward

        def without(*args: Any, _own: Any = own, _self: Any = layer.self_attn, **kwargs: Any) -> Any:
            config, _self.config = _self.config, tf.MistralConfig(**SHARED, sliding_window=None)
            _self.config._attn_implementation = config._attn_implementation
            try:
                return _own(_self, *args, **kwargs)
            finally:
                _self.config = config

        layer.self_attn.forward = without
    assert "its mask's window is 4096, and its layers say None" in (varlen_reason(model) or "")


# ==== settings ===============================================================================================


def test_the_setting(model_folder: Path, tmp_path: Path):
    for name, implementation, words in (
        ("auto", "sdpa", "for GPUs"),
        ("varlen", attention.NAME, "as set"),
        ("eager", "eager", "as set"),
    ):
        loaded = load_model(ModelConfig(id=str(model_folder), device="cpu", attention=name))
        assert loaded.model.config._attn_implementation == implementation
        assert words in loaded.attention
        written = write_model(loaded.model, loaded.tokenizer, tmp_path / name)
        assert attention.NAME not in json.dumps(json.loads((written / "config.json").read_text()))


def test_auto_on_shapes_is_what_a_gpu_would_take():
    llama = tf.LlamaConfig(**SHARED)
    for shape, dtype, chosen in (
        (llama, torch.bfloat16, attention.NAME),
        (llama, torch.float32, "sdpa"),
        (tf.LlamaConfig(**SHARED | {"head_dim": 20}), torch.bfloat16, "sdpa"),
        (tiny.CONFIGS["falcon-7b"](), torch.bfloat16, "sdpa"),
    ):
        assert meta_model(shape, dtype=dtype, attention="auto").config._attn_implementation == chosen
    assert meta_model(llama, dtype=torch.bfloat16, attention="sdpa").config._attn_implementation == "sdpa"


def peak_of_shapes(lengths: tuple[int, ...], shared: int, width: int) -> int:
    """The most bytes at once, forward and backward, with 4 heads."""
    tape = Tape()
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    q, k, v = (torch.empty(sum(lengths), heads, width, **options) for heads in (4, shared, shared))
    with Shapes(), tape, fused_attention(cudnn=True):
        tape.hold([q, k, v], "base")
        out = attend(q, k, v, documents(*lengths, device="meta"))
        out.backward(torch.empty_like(out))
    return max(peak.total for peak in tape.peaks.values())


@pytest.mark.parametrize("shared", [4, 2])
@pytest.mark.parametrize("width", [256, 64], ids=["varlen", "short"])
def test_what_shapes_take_is_what_the_kernels_take(width, shared):
    """q, k, v and their gradients, out and its own, logsumexp; FlashAttention's sums of dq, and each query head's dk
    and dv; the short kernels' bounds."""
    lengths = (1000, 500, 36)
    tokens = sum(lengths)
    half, rows = tokens * width * 2, tokens + 128 * 3
    tensors = 2 * (4 + 2 * shared) * half + 2 * 4 * half + tokens * 4 * 4
    room = rows * 4 * width * 4 + rows * 4 * 4 + (2 * 4 * half if shared == 2 else 0)
    if width <= WIDEST:
        room = tokens * (2 * 4 + 4 * 4)
    assert peak_of_shapes(lengths, shared, width) == pytest.approx(tensors + room, abs=4096)


def test_shapes_stand_for_the_gpu_that_is_planned_for():
    meta = torch.device("meta")
    assert attention.has_fast_dense(meta)
    with fused_attention(cudnn=False):
        assert not attention.has_fast_dense(meta)
    with planning(cudnn=True):
        assert attention.has_fast_dense(meta)


# ==== on a GPU ===============================================================================================


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("the kernels of a GPU need one")
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("FlashAttention needs a GPU of 2020 or later")
    return torch.device("cuda", torch.cuda.current_device())


ON_GPU = {
    "mixed": (300, 1, 129, 77, 1, 64),
    "equal": (256,) * 4,
    "empty": (0, 400, 0, 112, 0),
}


def close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Within what 16 bits round: 2^-8 of the size of the whole, element by element four times that."""
    for x, y in zip(found, expected, strict=True):
        size = float(y.square().mean().sqrt())
        assert float((x - y).square().mean().sqrt()) <= 2**-7 * size
        assert float((x - y).abs().max()) <= 2**-4 * max(size, float(y.abs().max()))


def on_cpu(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """The definition in float64 of the same 16-bit numbers; against `definition` it is tested above."""
    return kernels.one_by_one(q.double().cpu(), k.double().cpu(), v.double().cpu(), lengths, 0.1, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("shared", [8, 2])
@pytest.mark.parametrize("lengths", ON_GPU.values(), ids=ON_GPU)
def test_flash_attention_on_the_gpu(gpu, lengths, shared, width, window, dtype):
    whole, (q, k, v) = merged(sum(lengths), 8, shared, width, dtype=dtype, device=gpu)
    where = documents(*lengths, device=gpu)
    found = both_ways(kernels.varlen(q, k, v, where.starts, max(lengths), 0.1, window), whole)
    close(found, both_ways(on_cpu(q, k, v, lengths, window).to(gpu), whole))


@pytest.mark.parametrize("shared", [8, 2])
@pytest.mark.parametrize(("count", "length", "width"), [(4, 512, 128), (2, 1000, 64), (1, 2048, 128)])
def test_dense_attention_on_the_gpu(gpu, count, length, width, shared):
    whole, (q, k, v) = merged(count * length, 8, shared, width, dtype=torch.bfloat16, device=gpu)
    out = kernels.dense(q, k, v, count, 0.1)
    assert out.shape == q.shape
    assert out.is_contiguous()  # rows first, as q: no copy
    close(both_ways(out, whole), both_ways(on_cpu(q, k, v, (length,) * count, None).to(gpu), whole))


def test_a_mixed_batch_on_the_gpu(gpu, monkeypatch):
    lengths = (1500, 40, 40, 120, 1500, 1500, 7)
    whole, (q, k, v) = merged(sum(lengths), 8, 2, 128, dtype=torch.bfloat16, device=gpu)
    monkeypatch.setattr(attention_plan, "CALL", 0.0)
    monkeypatch.setattr(attention_plan, "MOVED", 0.0)
    where = documents(*lengths, device=gpu)
    expected = both_ways(on_cpu(q, k, v, lengths, None).to(gpu), whole)
    for ragged in ("varlen", "short"):
        plan = pieces.__wrapped__(lengths, 8, 128, None, True, ragged == "short")
        assert [piece.kind for piece in plan] == ["dense", ragged, "dense", ragged]
        close(both_ways(attention.run(plan, q, k, v, where, 0.1, None), whole), expected)
    close(both_ways(attend(q, k, v, where, 0.1), whole), expected)
    unknown = Documents(where.starts, (sum(lengths),) * len(lengths), known=False)
    close(both_ways(attend(q, k, v, unknown, 0.1), whole), expected)


@pytest.mark.parametrize(
    ("lengths", "width"),
    [((1000, 500, 36), 64), ((1000, 500, 36), 256), ((2048, 2048), 64)],
    ids=["short", "varlen", "dense"],
)
@pytest.mark.parametrize("shared", [4, 2])
def test_shapes_take_what_the_gpu_takes(gpu, lengths, width, shared):
    gc.collect()  # what other tests left would go while this one counts
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": gpu, "requires_grad": True}
    leaves = [torch.randn(sum(lengths), heads, width, **options) for heads in (4, shared, shared)]
    torch.cuda.reset_peak_memory_stats()
    out = attend(*leaves, documents(*lengths, device=gpu))
    out.backward(torch.empty_like(out))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak_of_shapes(lengths, shared, width) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("kind", ["llama", "mistral, window", "gpt2", "phi3"])
def test_models_on_the_gpu(gpu, kind):
    """Heads of 8 features in bfloat16: packed by documents, against float64 one by one."""
    rows = examples()
    model = made(kind, scale=1.0)
    alone = pack(rows, micro_tokens=1, packing=False, pad_id=PAD)
    expected = sum(float(nll_sum(model.double(), batch).detach()) for batch in alone)
    model = model.to(gpu, torch.bfloat16)
    assert settle_attention(model, "auto", gpu, torch.bfloat16).startswith("varlen")
    assert honours_boundaries(model, VOCABULARY) is None
    batches = pack(rows, micro_tokens=64, packing=True, pad_id=PAD)
    total = sum(float(nll_sum(model, batch.to(gpu)).detach()) for batch in batches)
    assert total == pytest.approx(expected, rel=0.01)


def test_nothing_waits_for_the_gpu(gpu):
    model = made("llama", scale=1.0).to(gpu, torch.bfloat16)
    settle_attention(model, "varlen", gpu, torch.bfloat16)
    (batch,) = pack(examples((5, 21, 9)), micro_tokens=64, packing=True, pad_id=PAD)
    batch = batch.to(gpu)
    arguments = attention.arguments_of(model, batch.documents, batch.position, batch.ids)
    assert isinstance(arguments["attention_mask"], DocumentMask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(input_ids=batch.ids, use_cache=False, **arguments).logits.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
