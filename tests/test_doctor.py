"""The doctor's findings: the truth about this machine, no request, and no crash on a broken one."""

import io
import json
import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console
from transformers import GPT2Config, LlamaConfig

from loraloom import cli, doctor
from loraloom.doctor import Check, examine, render
from loraloom.errors import UserError


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_findings_without_a_request(
    no_sockets: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "ours"))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "weights").write_bytes(bytes(30_000_000))
    (tmp_path / "ours" / "link").symlink_to(tmp_path / "ours" / "weights")
    found = by_name(examine())
    assert found["torch"] == Check("torch", doctor.version("torch") or "", True)
    assert found["our cache"].value == "0.03 GB"
    assert found["hub cache"].value == "0.00 GB"
    assert found["self-test"].ok is True
    assert "connection" not in found
    assert found["extra: gguf"].ok is True
    json.dumps([check.to_json() for check in found.values()])


def test_the_token_is_said_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = by_name(list(doctor.hub()))
    assert found["hub token"].value == "present"
    assert "offline" in found["hub"].note
    assert "secret" not in str(found)


def test_a_missing_extra_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "version", lambda name: None if name in ("gguf", "datasets", "pyarrow") else "1"
    )
    found = by_name(list(doctor.extras()))
    assert found["extra: gguf"].note.endswith("pip install 'loraloom[gguf]'")
    assert (found["extra: data"].value, found["extra: data"].ok) == ("not installed", None)
    assert found["extra: report"].ok is True


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70_000_000_000, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Example")
    for capability, formats in (((8, 0), "bf16"), ((8, 9), "bf16 and fp8"), ((7, 5), "no bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, it=capability: it)
        found = by_name(list(doctor.gpus()))
        assert formats in found["gpu 1"].note
        assert ("fp8" in found["gpu 0"].note) == (capability == (8, 9))
        assert found["gpu 0"].value == "Example, 70.0 GB free of 80.0 GB"
        assert found["8-bit products"].value == ("yes" if capability == (8, 9) else "no")
        assert found["attention"].value == ("sdpa" if capability == (7, 5) else "FlashAttention")
        assert found["CUDA graphs"].value == "yes"


def test_a_gpu_of_hoppers_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    found = by_name(list(doctor.abilities(True)))
    assert found["attention"].value == "FlashAttention, cuDNN for long documents"
    assert found["8-bit products"].value == "yes"
    assert found["kernels"].ok in (None, False)  # false where triton is missing


def test_how_a_model_would_run(tmp_path: Path, no_sockets: None, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaConfig(**wide, vocab_size=96, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "llama")
    GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_inner=200, bos_token_id=1, eos_token_id=2
    ).save_pretrained(tmp_path / "gpt2")
    found = by_name(doctor.examine_model(str(tmp_path / "llama")))
    assert found["model"].value == "llama, 3 layers"
    assert found["attention"].value == "varlen"
    assert found["fused layers"].value == "3 of 3"
    assert found["loss"].value == "in chunks"
    assert found["8-bit products"].value == "every linear layer"
    other = by_name(doctor.examine_model(str(tmp_path / "gpt2")))
    assert other["fused layers"].value.startswith("none: ")
    assert "200 is no multiple of 16" in other["8-bit products"].note
    assert cli.run(["doctor", str(tmp_path / "llama"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[2]["value"] == "3 of 3"
    with pytest.raises(UserError):
        doctor.examine_model(str(tmp_path))


def test_a_broken_part_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("driver is too old\nsecond line")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: broken())
    found = by_name(examine())
    assert found["gpus"] == Check("gpus", "could not be examined", False, "RuntimeError: driver is too old")
    assert found["torch"].ok is False
    assert found["self-test"].ok is False if "self-test" in found else found["self_test"].ok is False


def test_memory_and_disk_that_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "main_memory", lambda: (8_000_000_000, 1_000_000_000))
    assert by_name(list(doctor.processor()))["memory"].ok is False
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert by_name(list(doctor.disks()))["disk here"].ok is False


def test_memory_within_a_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    total, free = doctor.main_memory() or (0, 0)
    assert 0 < free <= total
    limits = {"memory.max": total // 2, "memory.current": total // 8}
    monkeypatch.setattr(doctor, "cgroup", limits.get)
    assert doctor.main_memory() == (total // 2, pytest.approx(min(free, total // 2 - total // 8), rel=0.1))


@pytest.mark.skipif(os.name != "posix", reason="the memory of a process is asked of a POSIX system")
def test_online_makes_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: asked.append(1) or {"name": "ada"})
    assert [check.value for check in doctor.connection()] == ["logged in as ada"]
    assert len(asked) == 1
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: 1 / 0)
    (failed,) = doctor.connection()
    assert (failed.ok, failed.note.split(": ")[1]) == (False, "ZeroDivisionError")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [check.value for check in doctor.connection()] == ["not tried"]


def test_the_self_test_sees_numbers_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, finite = doctor.tiny_step(torch.device("cpu"), torch.float32)
    assert finite
    assert abs(loss - torch.log(torch.tensor(64.0))) < 1  # close to chance
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda x, y: x.sum() * float("nan"))
    (check,) = doctor.self_test()
    assert (check.ok, check.note) == (False, "loss or gradients are not finite numbers")


def test_the_table() -> None:
    out = io.StringIO()
    render([Check("a", "1 [x]", True), Check("b", "2", False, "mend it")], Console(file=out, width=60))
    assert "1 [x]" in out.getvalue()
    assert "1 to mend: b" in out.getvalue()
    out = io.StringIO()
    render([Check("a", "1", None)], Console(file=out, width=60))
    assert "All is well." in out.getvalue()
