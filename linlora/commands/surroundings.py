"""The surroundings of a command: no library's chatter, and no waiting for a hub that is out of reach."""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path


def quiet() -> AbstractContextManager[None]:
    """Keep the bars, hints and warnings of other libraries from the console; their errors are raised all the same."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from linlora.training import checkpoints

    return checkpoints.quiet()


def offline_without_network(names: Iterable[str | None]) -> None:
    """Take what is of the hub from its cache where the hub is out of reach, at once instead of after retries.

    To be called before the hub's own packages are imported.
    """
    if os.environ.get("HF_HUB_OFFLINE") or not any(name and not Path(name).expanduser().exists() for name in names):
        return
    if urllib.request.getproxies():
        return
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("://")[-1].split("/")[0].split(":")[0]
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
