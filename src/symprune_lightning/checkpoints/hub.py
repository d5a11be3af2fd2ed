"""Connectivity of the hub."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

HUB_TIMEOUT = 5.0
"""Seconds to wait for a connection to the hub."""


def check_hub(name: str, kind: Literal["model", "dataset"], advice: str) -> None:
    """Check that a repository is in the cache, or that the hub can be reached.

    The libraries that load it would retry for a minute.

    Args:
        name: Name of the repository.
        kind: Its type.
        advice: What to pass in its place.

    Raises:
        OSError: It is neither.
    """
    folder = repo_folder_name(repo_id=name, repo_type=kind)
    is_cached = (Path(constants.HF_HUB_CACHE) / folder).is_dir()
    if is_cached or constants.HF_HUB_OFFLINE or getproxies().keys() & {"https", "all"}:
        return
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((str(address.hostname), port), timeout=HUB_TIMEOUT).close()
    except OSError as error:
        raise OSError(
            f"{name} is no folder here and not in the cache, and {constants.ENDPOINT} cannot be "
            f"reached ({error}): {advice}, or connect to the network"
        ) from error
