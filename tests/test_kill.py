"""Killed at any call to the file system, or out of disk, a run is whole and goes on to the same bytes.

Child processes are killed by SIGKILL from inside, at calls spread over a whole run; see kill_runner.py.
LORALOOM_TEST_KILLS=400 kills at more of them.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import adapter_bytes, run_tiny, settings

from loraloom import api, cli, files
from loraloom.errors import Failure
from loraloom.rundir import Run

HERE = Path(__file__).parent
SHM = Path("/dev/shm")  # flushing to a real disk takes most of the time elsewhere
NUM_KILLS = os.environ.get("LORALOOM_TEST_KILLS", "50")
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="forks after torch is loaded, which only Linux does safely"
)


@pytest.fixture(scope="module")
def results(
    model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    base = SHM if SHM.is_dir() else tmp_path_factory.mktemp("kill")
    with tempfile.TemporaryDirectory(dir=base, prefix="loraloom-kill-") as folder:
        command = [
            sys.executable,
            str(HERE / "kill_runner.py"),
            str(model_folder),
            str(data_file),
            folder,
            NUM_KILLS,
        ]
        environment = os.environ | {"LORALOOM_CACHE": f"{folder}/cache"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        yield json.loads(done.stdout)


@linux
@pytest.mark.parametrize("case", ["held-4", "held-0"])
def test_killed_anywhere_a_run_goes_on_to_the_same_bytes(results: dict[str, Any], case: str) -> None:
    calls, kills = results[case]["calls"], results[case]["kills"]
    assert len(kills) >= (int(NUM_KILLS) if case == "held-4" else int(NUM_KILLS) // 5) * 0.9
    assert {kill["call"][0] for kill in kills} == {kind for kind, _ in calls}
    assert {"write", "fsync", "replace", "rename", "mkdir"} <= {kind for kind, _ in calls}
    renamed = {name for kind, name in calls if kind == "rename"}
    assert {kill["call"][1] for kill in kills if kill["call"][0] == "rename"} == renamed
    numbers = [kill["number"] for kill in kills]
    assert numbers[0] < 0.03 * len(calls)
    assert numbers[-1] > 0.97 * len(calls)
    for kill in kills:
        told = f"killed at call {kill['number']}, {kill['call']}: {kill}"
        assert kill["equal"], told
        assert kill["status"] == "done", told
        assert kill["steps"] == [1, 2, 3, 4, 5, 6], told
        assert kill["checkpoints"] <= 3, told
        assert kill["finished"] or not kill["left"], told
        if kill["created"] and kill["checkpoints"]:
            assert kill["adapter"], told
    assert sum(kill["checkpoints"] > 0 for kill in kills) > len(kills) / 4
    if case == "held-4":
        assert any(not kill["created"] for kill in kills)


@linux
def test_a_full_disk_ends_a_run_with_words_and_leaves_what_was_written(results: dict[str, Any]) -> None:
    cases = results["full"]
    for case in cases:
        assert case["code"] == 1, case
        assert "error: the disk is full: " in case["shown"], case
        assert "free some space" in case["shown"], case
        assert "Traceback" not in case["shown"], case
        assert case["equal"], case
        assert not case["left"], case
    first = cases[0]["shown"]  # the file that found no space, not what failed after it
    assert "checkpoints/step-000003/state.safetensors was not written" in first
    assert "then go on with: loraloom resume" in first
    assert cases[0]["checkpoints"] == 2


@linux
@pytest.mark.usefixtures("quick")
def test_a_disk_that_is_really_full(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)]
    try:
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a small file system can be mounted by root alone")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    try:
        changes = {"train__max_steps": 6, "train__save_every": 1, "train__keep": 9}
        flags = [
            f"--set={k}={v}" for k, v in settings(model_folder, data_file, small / "run", **changes).items()
        ]
        assert cli.run(["train", *flags, "--offline"]) == 1
        shown = capsys.readouterr().err
        assert "error: the disk is full: " in shown
        saved = Run.open(small / "run").checkpoints()
        assert 1 <= len(saved) < 6
        subprocess.run(["mount", "-o", "remount,size=40m", str(small)], check=True)
        again = api.resume(small / "run", offline=True)
        whole = run_tiny(model_folder, data_file, tmp_path / "whole", **changes)
        assert adapter_bytes(again) == adapter_bytes(whole)
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ---- files ----------------------------------------------------------------------------------------------------


def filled(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "place"
    for content in ("old", "new"):
        with files.whole_folder(place) as folder:
            assert folder.name == files.PARTIAL + "place"
            (folder / "file").write_text(content)
            if content == "new":
                assert (place / "file").read_text() == "old"  # untouched until the end
        assert (place / "file").read_text() == content
    assert [path.name for path in place.parent.iterdir()] == ["place"]


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    place = filled(tmp_path / "place", "old")

    def write() -> None:
        with files.whole_folder(place) as folder:
            (folder / "file").write_text("new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert (place / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"place": "old"}, "old"),  # nothing was going on
        ({"place": "old", "partial": "half"}, "old"),  # killed while it was filled
        ({"old": "old", "partial": "new"}, "new"),  # killed between the two renames: the new one is whole
        ({"old": "old"}, "old"),  # the new one was lost
        ({"place": "new", "old": "old"}, "new"),  # killed while the old one was removed
        ({"place": "new", "old": "old", "partial": "half"}, "new"),
        ({"partial": "half"}, None),  # killed while the first one was filled
        ({}, None),
    ],
)
def test_each_state_that_a_kill_leaves(tmp_path: Path, there: dict[str, str], expected: str | None) -> None:
    names = {"place": "place", "partial": files.PARTIAL + "place", "old": files.OLD + "place"}
    for key, content in there.items():
        filled(tmp_path / names[key], content)
    files.finish_folder(tmp_path / "place")
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([] if expected is None else ["place"])
    if expected is not None:
        assert (tmp_path / "place" / "file").read_text() == expected
    files.finish_folder(tmp_path / "place")  # a second time changes nothing
    assert [path.name for path in tmp_path.iterdir()] == left


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "file.json"
    files.write_json(path, {"word": "straße"})
    assert json.loads(path.read_text()) == {"word": "straße"}
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:7]))  # short writes go on
    files.write_bytes(path, b"0123456789" * 10)
    assert path.read_bytes() == b"0123456789" * 10

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(Failure, match=r"the disk is full: .*file\.json was not written") as caught:
        files.write_text(path, "new")
    assert caught.value.exit_code == 1
    assert path.read_bytes() == b"0123456789" * 10


def test_no_permission_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write everywhere
    with pytest.raises(Failure, match="no permission to write") as caught:
        files.write_text(tmp_path / "folder" / "file", "x")
    assert caught.value.hint is not None


def test_lines_are_appended_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for i in range(3):
        files.append_line(path, f"line {i}")
    assert path.read_text() == "line 0\nline 1\nline 2\n"


def test_a_line_that_finds_no_space_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    files.append_line(path, "first")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:3]))  # the disk fills up here
    with pytest.raises(Failure, match="the disk is full"):
        files.append_line(path, "second")
    assert path.read_text() == "first\n"


def test_a_folder_is_removed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "place", "x")
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # as if killed before it has begun
    files.remove_folder(tmp_path / "place")
    assert [path.name for path in tmp_path.iterdir()] == [files.PARTIAL + "place"]
    monkeypatch.undo()
    filled(tmp_path / "place", "y")
    files.remove_folder(tmp_path / "place")
    assert list(tmp_path.iterdir()) == []


def test_digests_do_not_run_parts_together() -> None:
    assert files.digest("ab", "c") != files.digest("a", "bc")
    assert files.digest(b"ab") == files.digest("ab")
