"""What a run came to, in about three sentences with numbers, and one light: good, warn or bad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .config import RunConfig, shown_alpha
from .results import Result
from .rundir import Run
from .wording import amount, duration, number, percent, plural, size

STATUS = {
    "done": ("good", "done"),
    "stopped_early": ("good", "stopped early"),
    "running": ("warn", "not finished"),
    "interrupted": ("warn", "interrupted"),
    "failed": ("bad", "failed"),
}


def verdict(run: Run, outcome: Result) -> list[str]:
    """The sentences: what was trained on what, the result against the base, the checks."""
    result = labels_result(run, outcome) or against_base(outcome)
    sentences = [trained(run, outcome), *end(run, outcome), result, checked(run.checks())]
    return [sentence for sentence in sentences if sentence]


def light(run: Run, outcome: Result) -> tuple[str, str]:
    """The run as (good | warn | bad, a few words)."""
    colour, words = STATUS.get(outcome.status, ("warn", outcome.status))
    if colour != "good":
        return colour, words
    failed = [check for check in run.checks() if not check.get("ok")]
    if failed:
        return "bad", f"{words}, {plural(len(failed), 'check')} failed"
    if (
        outcome.best_loss is not None
        and outcome.base_loss is not None
        and outcome.best_loss >= outcome.base_loss
    ):
        return "bad", f"{words}, no better than the base"
    if outcome.best_loss is None:
        return "warn", f"{words}, not measured"
    return "good", words


def trained(run: Run, outcome: Result) -> str:
    """What was trained, on what, with which effort."""
    config, env = run.config, run.env
    share = ""
    if outcome.trainable and outcome.total:
        part = percent(outcome.trainable / outcome.total)
        share = f"; {amount(outcome.trainable)} of {amount(outcome.total)} weights, {part}"
    effort = [plural(outcome.steps, "step")]
    if outcome.seconds is not None:
        effort.append(f"in {duration(outcome.seconds)}")
    device = env.get("device_name") or env.get("device")
    effort += [f"on {device}"] if device else []
    effort += [f"in {env['dtype']}"] if env.get("dtype") else []
    memory = f", with at most {size(outcome.memory)} of memory" if outcome.memory else ""
    whole = config.method.get("name") == "full"
    done = "fine-tuned" if whole else "trained"
    trained = f"was {done}" if outcome.steps else f"was to be {done}"
    took = f" It took {' '.join(effort)}{memory}." if outcome.steps else ""
    data = ", ".join(source.path for source in config.data.train)
    what = config.model.id if whole else f"An adapter for {config.model.id}"
    return f"{what} ({method(config)}{share}) {trained} on {data}.{took}"


def method(config: RunConfig) -> str:
    """The method with its rank and scale, such as lora, r 16, alpha 32; without, where it has none or none is set."""
    ranks = "" if config.r == "auto" else f", r {config.r}, alpha {shown_alpha(config)}"
    return f"{config.method.get('name', 'lora')}{ranks}"


def end(run: Run, outcome: Result) -> list[str]:
    """How it ended, where it did not simply end."""
    state = run.state
    message = str(state.get("message") or "").strip()
    said = f": {message}" if message else ""
    match outcome.status:
        case "failed":
            return [f"The run failed after {plural(outcome.steps, 'step')}{said.rstrip('.')}."]
        case "interrupted":
            return [
                f"The run was interrupted after {plural(outcome.steps, 'step')}; `loraloom resume` goes on."
            ]
        case "running":
            return [
                f"The run has not ended; what stands here is what it had written by step {outcome.steps}."
            ]
        case "stopped_early":
            return [f"It was stopped early{said.rstrip('.') or ', since the held-out loss no longer fell'}."]
    return []


def against_base(outcome: Result) -> str:
    """The held-out loss beside the base's."""
    best, base = outcome.best_loss, outcome.base_loss
    if best is None:
        return "No held-out loss was measured, so nothing is claimed about the result."
    at = f" at step {outcome.best_step}" if outcome.best_step is not None else ""
    if base is None:
        return f"The best held-out loss is {number(best)} nats per token{at}; the base was not measured."
    perplexity = f"perplexity {number(exp(base), 3)} to {number(exp(best), 3)}"
    if best >= base:
        return (
            f"Held-out loss did not fall below the base's {number(base)} nats per token: {number(best)}{at}."
        )
    fell = f"Held-out loss fell from {number(base)} (the base) to {number(best)} nats per token"
    sentence = f"{fell}{at} ({perplexity})"
    if outcome.exact_match is not None and outcome.base_match is not None:
        went = "rose" if outcome.exact_match > outcome.base_match else "went"
        sentence += (
            f", and exact match {went} from {percent(outcome.base_match)} to {percent(outcome.exact_match)}"
        )
    return sentence + "."


def labels_result(run: Run, outcome: Result) -> str | None:
    """A classifier's best metric beside the head as it was drawn; None for a run on text."""
    best = run.state.get("best") or {}
    metric = best.get("metric") or "loss"
    held = [record for record in run.metrics("eval") if record.get(metric) is not None]
    if run.config.task == "causal" or not held or best.get(metric) is None:
        return None
    first, last = float(held[0][metric]), float(best[metric])
    sentence = (
        f"Held-out {metric} went from {number(first, 3)} with the head as it was drawn to {number(last, 3)}"
    )
    sentence += f" at step {best['step']}"
    floor = next((c for c in run.checks() if c.get("name") == "beats the commonest class"), None)
    return f"{sentence}: {floor['detail']}." if floor else sentence + "."


def exp(loss: float) -> float:
    """The perplexity of a loss in nats; infinite where it is too large to write."""
    return math.exp(loss) if loss < 700 else math.inf


def checked(checks: Sequence[dict[str, Any]]) -> str:
    """How the checks came out."""
    failed = [str(check.get("name")) for check in checks if not check.get("ok")]
    if not checks:
        return "No checks were recorded."
    if not failed:
        return f"All {len(checks)} checks passed." if len(checks) > 1 else "The one check passed."
    return f"{len(failed)} of {plural(len(checks), 'check')} failed: {', '.join(failed)}."


def tiles(run: Run, outcome: Result) -> list[dict[str, str]]:
    """The headline figures: label, value and a note beneath; those that were measured."""
    best, base = outcome.best_loss, outcome.base_loss
    chosen = run.state.get("best") or {}
    metric = str(chosen.get("metric", "metric"))
    found: list[tuple[str, str | None, str]] = [
        (metric, number(float(chosen[metric]), 3) if metric in chosen else None, "best, on held-out rows"),
        ("held-out loss", number(best) if best is not None else None, against(base, best)),
        ("exact match", share(outcome.exact_match), f"base {percent(outcome.base_match)}"),
        ("time", duration(outcome.seconds) if outcome.seconds else None, plural(outcome.steps, "step")),
        ("throughput", f"{number(outcome.speed, 3)}" if outcome.speed else None, "tokens per second"),
        ("peak memory", size(outcome.memory) if outcome.memory else None, str(run.env.get("device") or "")),
        (
            "trained weights",
            amount(outcome.trainable) if outcome.trainable else None,
            f"of {amount(outcome.total)}" if outcome.total else "",
        ),
    ]
    return [
        {"label": label, "value": value, "note": note} for label, value, note in found if value is not None
    ]


def share(value: float | None) -> str | None:
    return None if value is None else percent(value)


def against(base: float | None, best: float | None) -> str:
    if base is None or best is None:
        return "nats per token"
    change = f", {percent((best - base) / base, 2)}" if base else ""
    return f"base {number(base)}{change}"
