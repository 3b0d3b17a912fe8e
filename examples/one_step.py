"""Follow one tensor through one training step of a tiny model, and print where it passes.

python examples/one_step.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import loraloom
from loraloom import bank, head, nll, step
from loraloom.data import Example
from loraloom.kernels import lora_linear
from loraloom.packing import pack

rows: list[tuple[str, str, str]] = []


def shape(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def note(where: str, what: str, tensor: torch.Tensor) -> None:
    if where not in [row[0] for row in rows]:
        rows.append((where, what, shape(tensor)))


def watch(owner: object, name: str, where: str, what: str, pick=lambda result: result) -> None:
    """Print the result of a function the first time it is called."""
    original = getattr(owner, name)

    def watched(*args, **kwargs):
        result = original(*args, **kwargs)
        note(where, what, pick(result))
        return result

    setattr(owner, name, watched)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    adapters = loraloom.attach(model, r=4)
    adapters.train()
    examples = [
        Example([1, 5, 6, 7, 8], [-100, -100, 6, 7, 8], "a.jsonl:1"),
        Example([1, 9, 4], [-100, -100, 4], "a.jsonl:2"),
    ]
    note("data/tokens.py", "a row becomes ids; its prompt's labels are -100", torch.tensor(examples[0].ids))
    batches = pack(examples, micro_tokens=256, packing=True, pad_id=0)
    note("packing.py::pack", "examples share a row; positions restart", batches[0].ids)

    nll.head_of(model, batches[0].ids)  # proves on the model that its head alone makes the logits
    watch(lora_linear, "times", "kernels/lora_linear.py::times", "x W^T, through the frozen weight")
    watch(lora_linear, "scaled", "kernels/lora_linear.py::scaled", "s = x A^T, scaled")
    watch(bank, "lora_linear", "bank.py::forward", "s B^T added to it, in the same node")
    watch(head, "cross_entropy", "head.py::nll_sum", "nats of the labelled tokens, by chunks of logits")
    watch(step, "nll_sum", "nll.py::nll_sum", "their sum; its gradient is known already")

    named = dict(adapters.named_parameters())
    name = next(key for key in named if key.endswith("q_proj/B"))
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-3)
    before = named[name].detach().clone()
    stats = step.train_step(
        model,
        adapters,
        optimizer,
        batches,
        step=0,
        num_steps=1,
        max_norm=1.0,
        inspect=lambda: note("step.py::train_step", "the gradient of B; W has none", named[name].grad),
    )
    note("torch.optim", "B has moved", named[name].detach() - before)
    width = max(len(where) for where, _, _ in rows)
    words = max(len(what) for _, what, _ in rows)
    for number, (where, what, form) in enumerate(rows, start=1):
        print(f"{number}  {where:<{width}}  {what:<{words}}  {form}")
    print(f"\nloss {stats.loss:.3f} nats a target, {stats.targets} targets, {stats.tokens} tokens")


if __name__ == "__main__":
    main()
