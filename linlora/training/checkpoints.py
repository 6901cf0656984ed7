"""Reads base models, tokenizers and image processors; refuses a checkpoint that lacks what is asked of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from linlora.training.settings import Settings


def config_of(settings: Settings) -> Any:
    """The configuration of a checkpoint."""
    from transformers import AutoConfig

    return _read(settings, AutoConfig, "a configuration")


def tokenizer_of(settings: Settings) -> Any:
    """The tokenizer of a checkpoint; it pads behind, with the end of text where it has no padding of its own.

    In front, padding would move the texts of a model with absolute positions by the length of others in their batch.
    XLNet has none, and a text is classified by its last token there.
    """
    from transformers import AutoTokenizer

    tokenizer = _read(settings, AutoTokenizer, "a tokenizer")
    tokenizer.padding_side = "left" if config_of(settings).model_type == "xlnet" else "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"model '{settings.model}': its tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def image_processor_of(settings: Settings) -> Any:
    """The image processor of a checkpoint."""
    from transformers import AutoImageProcessor

    return _read(settings, AutoImageProcessor, "an image processor")


def load_model(settings: Settings, kind: Any, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """A frozen model of a transformers (auto) class, in eval mode, and the weights its checkpoint lacks.

    Those are drawn from the seed of the settings; `refuse_new` says which may be.
    """
    torch.manual_seed(settings.seed)
    with quiet():
        try:
            model, info = kind.from_pretrained(
                settings.model, output_loading_info=True, **{**settings.model_options, **options}
            )
        except (TypeError, AttributeError) as error:  # such as a dtype that torch does not have
            raise ValueError(f"model_options: {error}") from error
        except (OSError, RuntimeError) as error:
            raise ValueError(f"model '{settings.model}' could not be read as {kind.__name__}: {error}") from error
    mismatched = (key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys", ()))
    return model.requires_grad_(False).eval(), tuple(sorted({*info["missing_keys"], *mismatched}))


def refuse_new(settings: Settings, new: Sequence[str], trained: Sequence[str] = (), remedy: str = "") -> None:
    """Raise a ValueError for weights that the checkpoint lacks, outside the modules that are trained as a whole."""
    random = [name for name in new if not any(f".{module}." in f".{name}" for module in trained)]
    if random:
        more = f" and {len(random) - 3} more" if len(random) > 3 else ""
        raise ValueError(f"model '{settings.model}' lacks {', '.join(random[:3])}{more}, which would be random{remedy}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars, hints and warnings of other libraries from the console; their errors are raised all the same."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logs = (logging, hub_logging, datasets.logging)
    levels, bars = [log.get_verbosity() for log in logs], logging.is_progress_bar_enabled()
    of_datasets = datasets.are_progress_bars_disabled()
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
        if bars:
            logging.enable_progress_bar()
        if not of_datasets:
            datasets.enable_progress_bars()


def check_kind(settings: Settings, config: Any, mapping: Any, what: str) -> None:
    """Raise a ValueError unless transformers has a model of this configuration in one of its auto mappings."""
    if type(config) not in mapping:
        raise ValueError(
            f"model '{settings.model}' is a {config.model_type}, which transformers has no {what} model of; choose "
            f"another model, or a kind other than '{settings.kind}'"
        )


def _read(settings: Settings, kind: Any, what: str) -> Any:
    if not Path(settings.model).exists():
        try:
            validate_repo_id(settings.model)
        except HFValidationError as error:
            raise ValueError(
                f"model '{settings.model}': no such folder, and no name of the Hugging Face hub, OWNER/NAME"
            ) from error
    revision = settings.model_options.get("revision")
    trust = settings.model_options.get("trust_remote_code", False)
    try:
        with quiet():
            return kind.from_pretrained(settings.model, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        missing = "" if Path(settings.model).exists() else f"there is no folder {settings.model}, and "
        raise ValueError(f"model '{settings.model}': {missing}{what} could not be read: {reason}") from error
