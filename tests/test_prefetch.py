"""Packing ahead changes no bit, hands errors on in their place, and ends with the loop that it works for.

The truth is the same steps packed one by one, where they are needed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_shop, run_tiny, timeless

from loraloom import train
from loraloom.data import Example
from loraloom.packing import Batch, pack
from loraloom.prefetch import Ahead

CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device(request.param)


def batches(step: int) -> list[Batch]:
    """Three examples of lengths that the step decides."""
    gen = torch.Generator().manual_seed(step)
    made = []
    for i in range(3):
        length = int(torch.randint(4, 90, (), generator=gen))
        ids = torch.randint(0, 256, (length,), generator=gen).tolist()
        made.append(Example(ids, [-100, *ids[1:]], f"rows:{i}"))
    return pack(made, micro_tokens=64, packing=step % 2 == 0, pad_id=0)


def tensors(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.each(lambda tensor: found.append(tensor.clone()) or tensor)  # type: ignore[func-returns-value]
    return found


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loraloom-packing"]


def within(seconds: float, done: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.002)
    return done()


def test_the_batches_are_those_of_their_steps_in_order(device: torch.device) -> None:
    with Ahead(batches, range(5, 25), device) as ahead:
        for step, found in zip(range(5, 25), ahead, strict=True):
            expected = batches(step)
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                assert one.ids.device.type == device.type
                assert (one.rows, one.spans, one.targets) == (other.rows, other.spans, other.targets)
                assert one.documents.lengths == other.documents.lengths
                assert (one.position is None) == (other.position is None)
                for mine, theirs in zip(tensors(one), tensors(other), strict=True):
                    assert torch.equal(mine.cpu(), theirs)
    assert not threads()


def test_only_so_many_steps_are_made_ahead() -> None:
    made: list[int] = []

    def make(step: int) -> list[Batch]:
        made.append(step)
        return []

    with Ahead(make, range(100), CPU, depth=3) as ahead:
        assert within(5, lambda: len(made) == 3)
        next(ahead)
        assert within(5, lambda: len(made) == 4)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]


def test_an_error_comes_where_its_step_does() -> None:
    def make(step: int) -> list[Batch]:
        if step == 2:
            raise KeyError("the third step")
        return batches(step)

    with Ahead(make, range(9), CPU) as ahead:
        assert within(5, lambda: not threads())  # it has failed, and the steps before it are still good
        assert len([next(ahead), next(ahead)]) == 2
        with pytest.raises(KeyError, match="the third step"):
            next(ahead)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None])
def test_however_the_loop_is_left_the_thread_ends(error: type[BaseException] | None) -> None:
    def leave() -> None:
        with Ahead(batches, range(1_000_000), CPU) as ahead:
            next(ahead)
            if error is not None:
                raise error

    began = time.monotonic()
    if error is None:
        leave()
    else:
        with pytest.raises(error):
            leave()
    assert not threads()
    assert time.monotonic() - began < 5


class Now:
    """In the place of `Ahead`: each step is packed when it is asked for."""

    def __init__(self, make: Any, steps: range, device: torch.device) -> None:
        self.steps = map(make, steps)

    def __enter__(self) -> Any:
        return self.steps

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", ["lora", "lora_prefix"])
def test_a_run_is_the_same_bit_by_bit(
    method: str, model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where evaluations take the adapter off while its tokens are put into what is packed."""
    chosen = {"method": method, "dropout": 0.1, "train__max_steps": 6, "train__micro_tokens": 64}
    ahead = run_tiny(model_folder, data_file, tmp_path / "ahead", **chosen)
    monkeypatch.setattr(train, "Ahead", Now)
    now = run_tiny(model_folder, data_file, tmp_path / "now", **chosen)
    assert timeless(ahead.metrics()) == timeless(now.metrics())
    first, second = (
        {
            path.relative_to(run.adapter_path): path.read_bytes()
            for path in run.adapter_path.rglob("*.safetensors")
        }
        for run in (ahead, now)
    )
    assert first
    assert first == second
    assert ahead.state["step"] == 6
    assert not threads()


@pytest.mark.usefixtures("quick")
def test_what_is_packed_has_the_tokens_of_the_adapter_that_trains(
    model_folder: Path, data_file: Path
) -> None:
    shop = make_shop(model_folder, data_file, method="prefix_embedding")
    make = train.packer(shop)
    before = make(0)
    with shop.adapters.disabled():
        during = make(0)
    assert all(
        torch.equal(mine, theirs)
        for one, other in zip(before, during, strict=True)
        for mine, theirs in zip(tensors(one), tensors(other), strict=True)
    )
    assert any(int(batch.ids.max()) >= len(shop.tokenizer) for batch in before)
