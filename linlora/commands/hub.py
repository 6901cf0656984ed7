"""`--push-to-hub`: a folder as a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

_LEFT_OUT = ["checkpoint-*/**", "learning_rates/**", ".lock", "rows.json", "point.safetensors"]


def push(folder: Path, name: str) -> str:
    """Upload a folder, checkpoints aside; the address of the repository, which is made private if it is new.

    Raises ValueError in one line where the hub says no.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api = HfApi()
        address = str(api.create_repo(name, private=True, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=str(folder), ignore_patterns=_LEFT_OUT)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--push-to-hub {name}: {reason}; log in with: hf auth login") from error
    return address
