"""What every test runs under: one thread, no way to the hub, a cache of its own, and no terminal to draw bars on."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

IN_CI = bool(os.environ.get("CI"))  # what may be skipped at home must run there
USERS_CACHE = os.environ.get("LORALOOM_CACHE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there; the hub's tests name their own
os.environ["CI"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # kernels run on the CPU then; read when triton is imported

from tiny_run import make_data, make_model

from loraloom.small_model import small_model

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[Path]:
    """Prepared data and converted models go to a folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="loraloom-tests-") as folder:
        before = os.environ.get("LORALOOM_CACHE")
        os.environ["LORALOOM_CACHE"] = folder
        yield Path(folder)
        if before is None:
            del os.environ["LORALOOM_CACHE"]
        else:
            os.environ["LORALOOM_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def _float32_everywhere() -> Iterator[None]:
    """`auto` means float32 on every CPU, so that tests compute the same on all machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraloom.devices.cpu_computes_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tied head and its tokenizer."""
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own cache, so that nothing is fetched twice."""
    use_own(monkeypatch)


def use_own(patch: pytest.MonkeyPatch) -> None:
    patch.delenv("LORALOOM_CACHE")
    if USERS_CACHE is not None:
        patch.setenv("LORALOOM_CACHE", USERS_CACHE)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of the real small model in the user's own cache; made there if it is not there yet."""
    with pytest.MonkeyPatch.context() as patch:
        use_own(patch)
        return small_model(progress=False)


@pytest.fixture(scope="session")
def real_instructions() -> Path:
    """3,102 Alpaca-style records that lie beside the project, not in it."""
    file = Path(__file__).parents[2] / "shared" / "data" / "alpaca_libre.json"
    if not file.is_file() and not IN_CI:
        pytest.skip(f"{file.name} does not lie beside the project")
    return file


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions and answers of different lengths."""
    return make_data(tmp_path_factory.mktemp("data") / "sums.jsonl")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without what takes longer than a tiny training: drawing the page, and waiting for the disk."""
    monkeypatch.setattr("loraloom.api.build_report", lambda run: None)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach the network fails the test, also one whose error somebody swallows."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
