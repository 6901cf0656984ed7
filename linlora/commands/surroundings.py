"""The surroundings of a command: no library's chatter, and no waiting for a hub that is out of reach."""

from __future__ import annotations

import os
import socket
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars, hints and warnings of other libraries from the console; their errors are raised all the same."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logs = (logging, hub_logging, datasets.logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|peft|datasets|torch|accelerate|huggingface_hub)\b")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        logging.enable_progress_bar()
        datasets.enable_progress_bars()


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
