"""What a run ran on, as far as it can be told without importing torch."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

PACKAGES = ("loraloom", "torch", "transformers")


def environment() -> dict[str, Any]:
    """Versions and platform, without importing the packages."""
    versions = {name: version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions,
        "commit": commit(),
    }


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the git repository around the working folder, or None."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def now() -> str:
    """This instant in ISO 8601, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
