"""Is the merged model still the adapter's model? Both read the same prompts, and their predictions are compared.

At every position, in float64: the divergence KL(a || b) = sum of p_a (log p_a - log p_b) over the vocabulary, in nats;
whether both rank the same token first; and the largest difference of a logit. Merging in float32 changes
only the order of sums. In bfloat16 and float16 each merged weight is also rounded once, which the limits
allow for. They cannot tell a lost adapter from a weak one; with the base beside the two, the divergence
must also be small against what the adapter itself does.

shapes  T tokens of a prompt, V vocabulary
source  tests/test_verify.py, which also repeats the experiment behind LIMITS
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from .errors import Failure, UserError
from .nll import evaluating, takes
from .wording import number, percent, plural

Logits = Callable[[Tensor], Tensor]  # ids (1, T) to logits (1, T, V)
CHUNK = 64  # positions compared at once, which bounds the memory of float64 probabilities
LOST = (
    0.25  # of the adapter's own divergence from the base: a merge that lost half of the layers has about this
)
FLOOR = 1e-9  # nats; below it there is nothing to lose


@dataclass(frozen=True)
class Limit:
    """The largest mean KL in nats, the smallest top-1 agreement, and why these."""

    mean_kl: float
    agreement: float
    reason: str


# Random Llamas (2 and 6 layers, 256 and 2,000 tokens, updates of 2 and 20 % of ||W||), adapter against merged:
# float32 mean KL at most 1e-12, agreement 1; float16 4e-6, 0.997; bfloat16 2e-4, 0.982. Deep models
# round more often, hence the room above these. An update merged at 90 % of its size has 5e-8 to 5e-3.
LIMITS = {
    "float32": Limit(1e-7, 0.999, "float32, where merging changes only the order of sums"),
    "float16": Limit(2e-4, 0.99, "float16, where each merged weight is rounded once to 11 bits"),
    "bfloat16": Limit(1e-2, 0.97, "bfloat16, where each merged weight is rounded once to 8 bits"),
}
LIMITS["float64"] = LIMITS["float32"]


@dataclass(frozen=True)
class Verification:
    """How far two models are apart: KL in nats a position, agreement as a share, logits as they are."""

    prompts: int
    tokens: int
    mean_kl: float
    max_kl: float
    top1_agreement: float
    max_logit_difference: float
    limit_kl: float
    limit_agreement: float
    reason: str  # of the limits
    adapter_kl: float | None = None  # mean KL between the first model and the base: what the adapter does

    @property
    def problems(self) -> list[str]:
        """What is over a limit, in words with numbers; empty if all is well."""
        found = []
        if not self.mean_kl <= self.limit_kl:
            found.append(
                f"mean KL {number(self.mean_kl, 2)} nats, expected at most {number(self.limit_kl, 2)}"
            )
        if not self.top1_agreement >= self.limit_agreement:
            found.append(
                f"top-1 agreement {percent(self.top1_agreement)}, expected at least {percent(self.limit_agreement)}"
            )
        if self.adapter_kl is not None and not self.mean_kl <= max(FLOOR, LOST * self.adapter_kl):
            found.append(
                f"mean KL {number(self.mean_kl, 2)} nats is not small against {number(self.adapter_kl, 2)}, which is "
                "all that the adapter does: merging lost a part of it, or rounded it away"
            )
        return found

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """What merge.json keeps."""
        return asdict(self) | {"ok": self.ok, "problems": self.problems}


def compare_models(
    model_a: nn.Module | Logits,
    model_b: nn.Module | Logits,
    prompts: Sequence[list[int]],
    *,
    dtype: str = "float32",
    base: nn.Module | Logits | None = None,
    on_prompt: Callable[[int], None] | None = None,
) -> Verification:
    """Compare two models on every position of the prompts, one prompt at a time.

    model_a, model_b  models, or functions of ids (1, T) that give logits (1, T, V); a is the one to be kept to
    dtype             in which the merged weights are stored; it sets the limits
    base              the model without the adapter, to measure what the adapter does
    on_prompt         called with 1 after each prompt

    raises  UserError without prompts or for a dtype without limits; Failure if a logit is not finite or the
            vocabularies differ
    """
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError("there is no prompt to compare the models on")
    if dtype not in LIMITS:
        raise UserError(f"no limits are known for a model merged in {dtype}", hint="use " + ", ".join(LIMITS))
    limit = LIMITS[dtype]
    kls, base_kls, agreed, largest = [], [], 0, 0.0
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        logits_TV = logits_of(model_a, ids)
        kl_T, agree_T, difference = compare_logits(logits_TV, logits_of(model_b, ids), i)
        if base is not None:
            base_kls.append(compare_logits(logits_TV, logits_of(base, ids), i)[0])
        kls.append(kl_T)
        agreed += int(agree_T.sum())
        largest = max(largest, difference)
        if on_prompt:
            on_prompt(1)
    kl = torch.cat(kls)
    return Verification(
        prompts=len(prompts),
        tokens=len(kl),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1_agreement=agreed / len(kl),
        max_logit_difference=largest,
        limit_kl=limit.mean_kl,
        limit_agreement=limit.agreement,
        reason=limit.reason,
        adapter_kl=float(torch.cat(base_kls).mean()) if base_kls else None,
    )


def logits_of(model: nn.Module | Logits, ids: Tensor) -> Tensor:
    """The logits (T, V) of one prompt (1, T), on the model's own device; (1, C) of a classifier."""
    if not isinstance(model, nn.Module):
        return model(ids)[0]
    ids = ids.to(next(model.parameters()).device)
    arguments = {"use_cache": False} if takes(model, "use_cache") else {}
    with evaluating(model):
        output = model(input_ids=ids, **arguments)
    logits: Tensor = getattr(output, "logits", output)[0]
    return logits[None] if logits.dim() == 1 else logits


def compare_logits(a_TV: Tensor, b_TV: Tensor, prompt: int) -> tuple[Tensor, Tensor, float]:
    """(KL, agreement) by position, and the largest difference of a logit.

    Two tokens with equal logits are both first, so a tie is no disagreement. One output is a number, the mean of a
    normal distribution of variance 1: KL is half the squared difference.
    """
    if a_TV.shape != b_TV.shape:
        raise Failure(
            f"the models give logits of different shapes: {list(a_TV.shape)} and {list(b_TV.shape)}"
        )
    kls, agreed, largest = [], [], 0.0
    with torch.no_grad():
        for a, b in zip(a_TV.split(CHUNK), b_TV.split(CHUNK), strict=True):
            # In float64: in float32 the rounding of log_softmax alone gives a KL of 1e-7.
            a, b = a.double(), b.to(a.device).double()
            if not (a.isfinite().all() and b.isfinite().all()):
                side = "first" if not a.isfinite().all() else "second"
                raise Failure(
                    f"the {side} model gives logits that are not finite numbers on prompt {prompt + 1}"
                )
            log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
            kl = (log_a.exp() * (log_a - log_b)).sum(-1).clamp_min(0)
            kls.append(((a - b)[:, 0] ** 2 / 2 if a.shape[-1] == 1 else kl).cpu())
            top_a, top_b = a.argmax(-1, keepdim=True), b.argmax(-1, keepdim=True)
            same = (a.gather(-1, top_a) == a.gather(-1, top_b)) | (b.gather(-1, top_a) == b.gather(-1, top_b))
            agreed.append(same.squeeze(-1).cpu())
            largest = max(largest, float((a - b).abs().max()))
    return torch.cat(kls), torch.cat(agreed), largest


def render(result: Verification, console: Console) -> None:
    """Print the comparison in a line, and what is wrong if it fails."""
    verdict = "[green]ok[/green]" if result.ok else "[red]over the limit[/red]"
    console.print(
        f"verify {plural(result.prompts, 'prompt')}, {plural(result.tokens, 'token')}: "
        f"top-1 agree {percent(result.top1_agreement)}, mean KL {number(result.mean_kl, 2)}, "
        f"max KL {number(result.max_kl, 2)}, max logit difference {number(result.max_logit_difference, 2)}   {verdict}",
        highlight=False,
    )
    for problem in result.problems:
        console.print(f"  {problem}", highlight=False, markup=False)
    if not result.ok:
        console.print(f"  the limits are those of {result.reason}", highlight=False)
        console.print(
            "  the merged model does not answer as its adapter does: keep the adapter, or merge in float32"
        )
