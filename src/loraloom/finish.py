"""What a run proves before it calls itself done: checks.json, the traffic lights of the report."""

from __future__ import annotations

import torch

from .adapter_io import folder_tensors, read_safetensors
from .checkpoint import Progress
from .data import DataReport, Labelled
from .metrics import majority
from .rundir import Run
from .workshop import Workshop


def check_run(shop: Workshop, run: Run, progress: Progress) -> None:
    """Record every check of a finished run; a failed one is said, it does not undo the run."""
    if isinstance(shop.prepared, Labelled):
        check_labels(shop.prepared, run, progress)
    else:
        check_text(shop.prepared.report, run)
    layers = len(next(iter(shop.adapters.adapters.values())).sites)
    run.add_check("gradients", True, f"all {layers} adapted layers received a gradient in the first step")
    norms = [record["grad_norm"] for record in run.metrics("train")]
    if norms:
        run.add_check("finite", True, f"loss and gradient were finite in all {len(norms)} steps")
    check_loss(run, progress)
    check_stops(run)
    check_file(shop, run, progress)


def check_text(report: DataReport, run: Run) -> None:
    """Whether there was something to learn, and answers that end."""
    run.add_check(
        "trained tokens",
        report.targets > 0,
        f"{report.targets:,} of {report.tokens:,} tokens carry loss ({report.target_share:.1%})",
    )
    run.add_check(
        "answers end",
        report.all_ended,
        f"every training answer ends in {report.end_token}, which is trained"
        if report.all_ended
        else "some training answers do not end in a trained end token: the model may not learn to stop",
    )


def check_labels(prepared: Labelled, run: Run, progress: Progress) -> None:
    """Whether training has every class, and whether the model beats the answer that needs no text."""
    report = prepared.report
    missing = [name for name in report.labels if not report.counts["train"].get(name)]
    if report.labels:
        told = (
            f"each of {len(report.labels)} classes stands in training"
            if not missing
            else "without a training row: "
        )
        run.add_check("classes", not missing, told + ", ".join(missing[:10]))
    held = [record for record in run.metrics("eval") if record.get("step") == progress.best_step]
    if held and report.labels and len(prepared.eval):
        floor = majority(prepared.train.labels, prepared.eval.labels)
        share = held[-1]["accuracy"]
        told = f"accuracy {share:.1%} on held-out rows, {floor:.1%} by always answering training's commonest class"
        advice = (
            ""
            if share > floor
            else "; a new head may need a higher train.learning_rate, or more train.epochs"
        )
        run.add_check("beats the commonest class", share > floor, told + advice)


def check_loss(run: Run, progress: Progress) -> None:
    """Whether the held-out loss fell below the base's."""
    if progress.base_loss is None or progress.best_loss is None:
        run.add_check("learnt", False, "there is no held-out set, so nothing shows whether the model learnt")
        return
    better = progress.best_loss < progress.base_loss
    run.add_check(
        "learnt",
        better,
        f"held-out loss {progress.base_loss:.4f} -> {progress.best_loss:.4f} (best at step {progress.best_step})",
    )


def check_stops(run: Run) -> None:
    """Whether the last sampled answers ended by themselves."""
    samples = run.samples()
    last = [sample for sample in samples if sample["step"] == samples[-1]["step"]]
    if last:
        stopped = sum(sample["stopped"] for sample in last)
        within = f"within {run.config.eval.max_new_tokens} tokens"
        run.add_check(
            "answers stop", stopped == len(last), f"{stopped} of {len(last)} sampled answers ended {within}"
        )


def check_file(shop: Workshop, run: Run, progress: Progress) -> None:
    """Whether the adapter's file holds finite numbers, and just those in memory if they are the best ones."""
    now = folder_tensors(shop.adapters, next(iter(shop.adapters.adapters)))
    held = {file: read_safetensors(run.adapter_path / file) for file in now}
    finite = all(bool(tensor.isfinite().all()) for part in held.values() for tensor in part.values())
    same = True
    if progress.best_step in (None, progress.step):
        same = all(alike(now[file], held[file]) for file in now)
    count = sum(map(len, held.values()))
    run.add_check("adapter reads back", finite and same, f"{count} tensors, finite, equal to those in memory")


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of named tensors are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
