"""`RoutedModel`: a model whose linear layers hold inventories of skills, called with the tasks of its batch."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from linlora.layers.restoring import restoring
from linlora.routing import checkpoint
from linlora.routing import scope as scopes
from linlora.routing.batch import route_tasks, route_weights
from linlora.routing.context import Routing
from linlora.routing.report import RoutedReport, report
from linlora.routing.selectors import Selector
from linlora.routing.structure import RoutedStructure


class RoutedModel(RoutedStructure):
    """A model with inventories of skills in its linear layers. Made by `linlora.routing.route`, `convert` and others.

    It takes the place of the base model: it has its attributes, and is called as it is, with `task_ids=` or `mixture=`
    in addition. Its state dict holds what was added and what trains, not the frozen base.

    The HF Trainer finds `labels`; other names, as of question answering, are told to it:
    TrainingArguments(label_names=["start_positions", "end_positions"]).

    The arguments are those of `linlora.routing.structure.RoutedStructure`.
    """

    # -- running --------------------------------------------------------------------------------------------------

    def forward(
        self,
        *args: Any,
        task_ids: Tensor | Sequence[int] | None = None,
        mixture: Tensor | None = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base model on a batch of mixed tasks.

        Args:
            args, labels, kwargs: the base model's.
            task_ids: the task of every example, (examples,), or of every token, (examples, length).
            mixture: instead, weights of the skills for every example, (examples, S) or (examples, Q, S), or for every
                token, (examples, length, Q, S); the selectors are not asked.

        Raises ValueError for task ids that are missing, too many or too few, or no task of the model.
        """
        if labels is not None:
            kwargs["labels"] = labels
        with self.context.running(self._routing(args, kwargs, task_ids, mixture)):
            return self.model(*args, **kwargs)

    def generate(
        self,
        *args: Any,
        task_ids: Tensor | Sequence[int] | None = None,
        mixture: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's `generate`, with any number of beams; factors are mixed once for all tokens."""
        with torch.no_grad():
            routing = self._routing(args, kwargs, task_ids, mixture)
        with self.context.running(routing):
            return cast(Any, self.model).generate(*args, **kwargs)

    @torch.compiler.disable
    def _routing(self, args: tuple, kwargs: dict, task_ids: Any, mixture: Tensor | None) -> Routing | None:
        if self.context.disabled:
            return None
        layers = self.routed_layers
        examples = self._examples(args, kwargs)
        if mixture is None:
            return route_tasks(layers, task_ids, self.n_tasks, examples)
        if task_ids is not None:
            raise ValueError("task_ids and mixture were both given: rows are routed by their task or by your weights")
        return route_weights(layers, mixture, examples)

    def _examples(self, args: tuple, kwargs: dict) -> int | None:
        """The size of the batch, where it can be seen in the arguments."""
        names = [getattr(self.model, "main_input_name", "input_ids"), "input_ids", "inputs", "inputs_embeds"]
        names += [*list(inspect.signature(self.model.forward).parameters)[:1], "attention_mask", "decoder_input_ids"]
        encoded = kwargs.get("encoder_outputs")
        candidates = [*args[:1], *(kwargs.get(name) for name in names), encoded[0] if encoded else None]
        return next((len(x) for x in candidates if isinstance(x, Tensor) and x.dim() > 0), None)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Compute the base model's function inside the block; task ids are not needed there."""
        return self.context.off()

    # -- as a model -----------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> RoutedModel:
        """This model: in PEFT `base_model` takes the task ids."""
        return self

    def get_base_model(self) -> nn.Module:
        return self.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(self.model, name)

    def unload(self) -> nn.Module:
        """Put the frozen layers back in their places and return the base model; this model is used up."""
        with restoring(self):
            scopes.leave(self)
            for layer in self.layers:
                parent, _, attribute = layer.layer_name.rpartition(".")
                setattr(self.model.get_submodule(parent), attribute, layer.base_layer)
            return self.model

    def report(self) -> RoutedReport:
        """The layers, selectors and trained parameters of the model; print it."""
        return report(self)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "torch.nn.DataParallel does not split a routed model's task_ids and layers over devices: start one process "
            "a device (torchrun, accelerate launch), or show this one a single device (CUDA_VISIBLE_DEVICES=0)"
        )

    # -- checkpointing of activations -----------------------------------------------------------------------------

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """The `context_fn` for torch.utils.checkpoint, which recomputes with the routing of the forward pass."""
        return self.context.checkpoint_contexts()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute the blocks' activations in backward. Exact; `use_reentrant=True` is refused."""
        self._checkpoint(gradient_checkpointing_kwargs, kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The later name of `gradient_checkpointing_enable`."""
        self._checkpoint(activation_checkpointing_kwargs, kwargs)

    def _checkpoint(self, options: dict[str, Any] | None, kwargs: dict[str, Any]) -> None:
        options = {"use_reentrant": False, **(options or {}), "context_fn": self.checkpoint_contexts}
        if options["use_reentrant"]:
            raise ValueError(
                "re-entrant checkpointing runs a backward of its own for every block, but the blocks of a routed model "
                "share the factors mixed for the batch; use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        model: Any = self.model
        name = "activation_checkpointing_enable"  # as transformers calls it now
        enable = getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable
        enable(options, **kwargs)

    # -- linearization --------------------------------------------------------------------------------------------

    def linearize(self, scope: str = "layer") -> RoutedReport:
        """Linearize in place, as `linlora.linearize(model, scope)` asks."""
        with restoring(self):
            scopes.linearize(self, scope)
        return report(self)

    def set_scope(self, scope: str) -> None:
        """Change the scope in place, as `linlora.set_scope` asks."""
        with restoring(self):
            scopes.set_scope(self, scope)

    def delinearize(self) -> RoutedModel:
        """Give the skills plain LoRA factors again, as `linlora.delinearize` asks."""
        with restoring(self):
            scopes.delinearize(self)
        return self

    # -- files ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `routed_model.safetensors`: inventories, points, selectors and modules_to_save, not the base model."""
        checkpoint.write(self, directory)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, directory: str | os.PathLike, variants: Sequence[type[Selector]] = ()
    ) -> RoutedModel:
        """Put a file of `save_pretrained` onto a base model, in place: the same function, the same parameters train.

        Args:
            model: the base model, as before `route`.
            variants: Selector classes of your own that the model was made with.

        Raises FileNotFoundError, CorruptFileError for a file that is broken or not a routed model's, ValueError for a
        base model it does not fit.
        """
        saved = checkpoint.read(directory, variants)
        checkpoint.check_base(model, saved, directory)
        with restoring(model) as undo:
            for name in saved.modules_to_save:
                undo(model.get_submodule(name).load_state_dict, copy.deepcopy(model.get_submodule(name).state_dict()))
            routed = cls(model, saved.inventories, saved.selectors, saved.modules_to_save)
            checkpoint.restore(routed, saved, directory)
            return routed
