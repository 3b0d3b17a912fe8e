"""The one door to lm-evaluation-harness: its tasks, its prompts, its metrics, over a model that is loaded already.

`Live` is lm-eval's own `hf` model around ours as it stands: with its adapter in use, or without. It differs in three
ways. What a prefix method puts into a text is put in. Memory is asked for by tokens instead of rows, and halved where
it does not suffice, so that nobody need name a batch size. And nobody asks the hub which model it is.

shapes  B requests of a batch, T tokens of the longest one
source  tests/test_harness.py: each log-likelihood equals that of lm-eval's `hf` on the merged folder
"""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import constants
from torch import Tensor

from .data.tables import no_requests
from .dressing import holding, tokens_of
from .environment import version
from .errors import Failure, NonFinite, OutOfMemory, UserError, did_you_mean
from .nll import evaluating

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError("benchmarks need lm-evaluation-harness", hint="pip install 'loraloom[eval]'") from error

ROOT = Path(lm_eval.__file__).parent / "tasks"
CPU_BYTES = 2**30  # of logits and their logarithms at once, on a CPU
GPU_SHARE = 0.4  # the same on a GPU, of what is free
MOST_ROWS = 256
ANSWER_ROWS = 32  # prompts answered at once, to begin with
Request = tuple[Any, list[int], list[int]]  # strings, context, continuation
Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """How tasks are asked.

    shots  solved examples before each question; None: as the task says
    limit  the first so many items of each task; None: all
    chat   whether prompts are written by the tokenizer's chat template
    batch  requests at once; None: as many as fit
    """

    shots: int | None = None
    limit: int | None = None
    chat: bool = False
    batch: int | None = None


class Live(HFLM):
    """A loaded model as lm-eval wants it, in whatever state its adapters are."""

    batch_size_per_gpu: Any  # rows, or "auto"

    def __init__(self, model: Any, tokenizer: Any, batch: int | None) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch or "auto")
        self.tokens = token_budget(model)
        self.used: set[int] = set()  # rows of the batches that were run
        self._first = 0  # where the batch that is being gathered starts

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval keeps of a model; its own version asks the hub for the commit."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.dtype)}

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Request]) -> int:
        """The rows of the batch that request `pos` is in; requests come the longest first."""
        if pos == 0:
            self._first = 0
        _, context, continuation = n_reordered_requests[self._first]
        rows = self.rows(min(len(context) + len(continuation), self.max_length))
        if pos - self._first + 1 == rows:
            self._first = pos + 1
        return rows

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        return self.rows(self.max_length)

    def rows(self, length: int) -> int:
        """How many texts of a length are read at once."""
        return max(1, min(MOST_ROWS, self.tokens // length))

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        prefix, infix = tokens_of(self.model)
        if prefix or infix:
            room = self.max_length + 1 - len(prefix) - len(infix)
            requests = [
                (text, [*prefix, *context[-max(room - len(answer), 1) :], *infix], answer)
                for text, context, answer in requests
            ]
        run = super()._loglikelihood_tokens
        found = self.patiently(lambda: run(requests, disable_tqdm=disable_tqdm, override_bs=override_bs))
        broken = sum(math.isnan(value) for value, _ in found)
        if broken:  # the first choice would be taken for the likeliest
            raise NonFinite(
                f"{broken} of {len(found)} log-likelihoods are no numbers: the model does not compute",
                hint="evaluate an earlier checkpoint, or --dtype float32 if the model overflows in 16 bits",
            )
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        given, rows = self.batch_size_per_gpu, ANSWER_ROWS
        run = super().generate_until
        try:
            while True:
                self.batch_size_per_gpu = rows if given == "auto" else given
                try:
                    return run(requests, disable_tqdm=disable_tqdm)
                except torch.OutOfMemoryError as error:
                    if given != "auto" or rows == 1:
                        raise no_room(self.batch_size_per_gpu) from error
                rows //= 2
                torch.cuda.empty_cache()
        finally:
            self.batch_size_per_gpu = given

    def patiently(self, work: Callable[[], Result]) -> Result:
        """Do it with half of the tokens at once as long as the GPU's memory does not suffice; the longest come first.

        raises  OutOfMemory if one text alone does not fit, or the batch was set
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                if self.batch_size_per_gpu != "auto" or self.tokens < 2:
                    raise no_room(self.batch_size_per_gpu) from error
            self.tokens //= 2
            torch.cuda.empty_cache()

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.used.add(inps.shape[0])
        return super()._model_call(inps, *args, **kwargs)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **settings: Any
    ) -> Tensor:
        """lm-eval's own; prompts are padded on the left, so that what comes before one stands inside its row."""
        self.used.add(context.shape[0])
        prefix, infix = tokens_of(self.model)
        dressed, mask = dress_rows(context, attention_mask, prefix, infix)
        more = len(prefix) + len(infix)
        out = super()._model_generate(dressed, max_length + more, stop, attention_mask=mask, **settings)
        return torch.cat([context, out[:, dressed.shape[1] :]], dim=1)


def dress_rows(ids_BT: Tensor, mask_BT: Tensor, prefix: list[int], infix: list[int]) -> tuple[Tensor, Tensor]:
    """Rows padded on the left with a prefix before their text and an infix behind it."""
    if not prefix and not infix:
        return ids_BT, mask_BT
    rows, width = [], ids_BT.shape[1]
    for row, length in zip(ids_BT.tolist(), mask_BT.sum(1).tolist(), strict=True):
        rows.append(row[: width - length] + prefix + row[width - length :] + infix)
    more = mask_BT.new_ones(len(rows), len(prefix) + len(infix))
    return ids_BT.new_tensor(rows), torch.cat([mask_BT, more], dim=1)


def token_budget(model: Any) -> int:
    """How many tokens' logits are held at once, with their logarithms, in four bytes each."""
    device = next(model.parameters()).device
    room: float = CPU_BYTES
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what a former pass left would make this one's batches smaller
        room = GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    return max(1, int(room / (8 * model.get_input_embeddings().weight.shape[0])))


def no_room(batch: Any) -> OutOfMemory:
    if batch in ("auto", 1):
        return OutOfMemory("the model cannot read one text of these tasks", hint="use model.quantize=nf4")
    return OutOfMemory(
        f"--batch {batch} does not fit into memory", hint="leave --batch out: it is found by itself"
    )


# ==== tasks ==================================================================================================


def task_names() -> dict[str, list[str]]:
    """Every name that lm-eval knows, by kind."""
    manager = TaskManager()
    return {"groups": manager.all_groups, "tags": manager.all_tags, "tasks": manager.all_subtasks}


def yaml_of(folder_and_file: str) -> Path:
    """A task's own YAML in the installed lm-eval.

    raises  UserError if this version has none there
    """
    path = ROOT / folder_and_file
    if not path.is_file():
        raise UserError(
            f"lm-eval {version('lm_eval')} has no {folder_and_file}", hint="pip install -U 'loraloom[eval]'"
        )
    return path


def load_tasks(specs: Sequence[str | Path], *, offline: bool, progress: bool) -> list[Any]:
    """lm-eval's tasks by name, or by YAML file, with their data.

    raises  UserError for an unknown name, one whose data cannot be had, or one that runs what a model wrote
    """
    manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
    known = set(manager.all_tasks)
    loaded: list[Any] = []
    for spec in specs:
        if isinstance(spec, str) and spec not in known:
            raise UserError(f"there is no task {spec!r}", hint=did_you_mean(spec, known))
        if isinstance(spec, Path) and not spec.is_file():
            raise UserError(
                f"there is no file {spec}", hint="a task of your own is a YAML file of lm-eval's kind"
            )
        with fetching(spec if isinstance(spec, str) else spec.stem, offline), quietly(shown=progress):
            found = manager.load([str(spec)])
        for name, task in found["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                what = (
                    "runs code that a model wrote"
                    if getattr(task, "UNSAFE_CODE", False)
                    else "wants images or sound"
                )
                raise UserError(f"{name} {what}, which is not done here", hint="choose another task")
        grouped = {name for names in found["group_map"].values() for name in names}
        loaded += [
            thing
            for kind in ("groups", "tasks")
            for name, thing in found[kind].items()
            if name not in grouped
        ]
    return loaded


@contextmanager
def fetching(task: str, offline: bool) -> Iterator[None]:
    """Without requests if offline; says what could not be had in the user's words."""
    try:
        with no_requests(offline):
            yield
    except Exception as error:
        if not is_connection(error):
            raise
        where = "" if offline or constants.is_offline_mode() else " and there is no connection to fetch it"
        raise Failure(
            f"the data of {task} is not on this machine{where}",
            details=[str(error).splitlines()[0]],
            hint="--data-dir DIR reads the six tasks of the article from files; others need the hub once",
        ) from error


def is_connection(error: BaseException | None) -> bool:
    """Whether a request failed: huggingface_hub, datasets and httpx each say it in their own class."""
    if error is None:
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ConnectionError", "NetworkError", "OfflineModeIsEnabled", "TimeoutException"})


# ==== a run ==================================================================================================


def measure(
    model: Any, tokenizer: Any, tasks: Sequence[Any], options: Options, *, offline: bool, progress: bool
) -> dict[str, Any]:
    """lm-eval's results, with its samples, of the model as it is now; "used" has the rows of its batches.

    raises  UserError if prompts shall be written by a chat template that the tokenizer has not
    """
    if options.chat and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", hint="leave --chat-template out")
    with no_requests(offline), quietly(shown=progress), evaluating(model), holding(model):
        live = Live(model, tokenizer, options.batch)
        results = lm_eval.simple_evaluate(
            model=live,
            tasks=list(tasks),
            num_fewshot=options.shots,
            batch_size=options.batch or "auto",
            limit=options.limit,
            apply_chat_template=options.chat,
            task_manager=TaskManager(include_defaults=False),  # the tasks are here; its own would be searched
        )
    return results | {"used": sorted(live.used)}


@contextmanager
def quietly(*, shown: bool) -> Iterator[None]:
    """lm-eval's bars on stderr if that is a terminal, and nothing else of what it says."""
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    level, asked = logger.level, evaluator.get_git_commit_hash
    stderr = sys.stderr if shown and sys.stderr.isatty() else io.StringIO()
    logger.setLevel(logging.CRITICAL)
    try:
        evaluator.get_git_commit_hash = lambda: None  # of whatever folder one stands in
        with redirect_stdout(io.StringIO()), redirect_stderr(stderr):
            yield
    finally:
        evaluator.get_git_commit_hash = asked
        logger.setLevel(level)
