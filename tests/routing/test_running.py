"""Task ids travel with the batch: beam search, checkpointing, accumulation, processes, the HF Trainer."""

import copy
import logging
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from processes import small_network
from routed_models import fill, routed_model, rows_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput

import linlora
from linlora import routing
from linlora.testing import tiny_base, tiny_batch


def gradients(routed, *batches):
    for batch in batches:
        routed(**batch)[0].sin().mean().backward()
    found = {n: p.grad for n, p in routed.named_parameters() if p.requires_grad}
    routed.zero_grad()
    return found


def assert_same(actual, expected, **options):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, **options)


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [None, "layer", "model"])
@pytest.mark.parametrize("architecture", ["t5", "llama"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_generation_of_a_mixed_batch_is_that_of_every_row(architecture, search, scope):
    routed = routed_model(architecture)
    if scope is not None:
        linlora.linearize(routed, scope)
    inputs, ids = {"input_ids": tiny_batch(architecture, 3)["input_ids"]}, torch.tensor([3, 0, 3])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, **search}
    together = routed.generate(**inputs, task_ids=ids, **options)
    copies = search.get("num_return_sequences", 1)
    for row in range(3):
        alone = routed.generate(**rows_of(inputs, [row]), task_ids=ids[row : row + 1], **options)
        assert torch.equal(together[row * copies : (row + 1) * copies, : alone.shape[1]], alone)


def test_generation_checks_the_ids_too():
    routed = routed_model("t5")
    with pytest.raises(ValueError, match="got 1 of them for a batch of 3"):
        routed.generate(input_ids=tiny_batch("t5", 3)["input_ids"], task_ids=[0])
    encoded = BaseModelOutput(torch.randn(4, 5, routed.config.d_model, dtype=torch.float64))
    with pytest.raises(ValueError, match="got 2 of them for a batch of 4"):
        routed.generate(encoder_outputs=encoded, task_ids=[0, 1])
    with pytest.raises(ValueError, match="task_ids are missing"):
        routed.generate(input_ids=tiny_batch("t5", 3)["input_ids"])


# -- backward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [None, "layer", "model"])
@pytest.mark.parametrize("options", [{}, {"sampling": "relaxed_bernoulli", "dropout": 0.2}], ids=["plain", "noise"])
def test_checkpointing_is_exact_whenever_backward_comes(options, scope):
    batches = [{**tiny_batch("llama", 3, seed), "task_ids": torch.tensor([seed, 3, 0])} for seed in (1, 2)]
    results = []
    for checkpointing in (False, True):
        routed = routed_model("llama", **options).train()
        if scope is not None:
            linlora.linearize(routed, scope)
        if checkpointing:
            routed.gradient_checkpointing_enable()
        torch.manual_seed(3)
        losses = [routed(**batch)[0].sin().mean() for batch in batches]  # both forward passes before any backward
        sum(losses).backward()
        results.append({n: p.grad for n, p in routed.named_parameters() if p.requires_grad})
    assert_same(results[1], results[0])


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match=r"use gradient_checkpointing_kwargs=\{'use_reentrant': False\}"):
        routed_model("llama").gradient_checkpointing_enable({"use_reentrant": True})


def test_checkpointing_of_your_own_needs_the_contexts():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.contexts = nn.Linear(6, 6), None

        def forward(self, x):
            options = {} if self.contexts is None else {"context_fn": self.contexts}
            return checkpoint(self.linear, x, use_reentrant=False, **options)

    routed = fill(routing.route(Checkpointed(), 3, n_heads=2, rank=2, target_modules=["linear"]))
    x, ids = torch.randn(4, 6), torch.tensor([0, 2, 2, 1])
    with pytest.raises(RuntimeError, match=r"context_fn=routed.checkpoint_contexts"):
        routed(x, task_ids=ids).sum().backward()
    routed.model.contexts = routed.checkpoint_contexts
    routed.zero_grad()
    routed(x, task_ids=ids).sin().sum().backward()
    grad = routed.layers[0].lora_A.grad.clone()
    routed.zero_grad()
    with_none = copy.deepcopy(routed)
    with_none.model.forward = with_none.model.linear.forward
    with_none(x, task_ids=ids).sin().sum().backward()
    torch.testing.assert_close(grad, with_none.layers[0].lora_A.grad)


def test_accumulated_gradients_are_those_of_the_whole_batch(batch, ids):
    routed = routed_model()
    whole = gradients(routed, {**batch, "task_ids": ids})
    parts = gradients(routed, *({**rows_of(batch, [i]), "task_ids": ids[i : i + 1]} for i in range(5)))
    assert_same({n: g / 5 for n, g in parts.items()}, whole, rtol=1e-6, atol=1e-12)


def test_every_gradient_is_that_of_finite_differences(batch, ids):
    routed = routed_model(target_modules=["query"], n_skills=2, n_heads=2, rank=1)
    for name, parameter in routed.named_parameters():
        if not parameter.requires_grad:
            continue
        (gradient,) = torch.autograd.grad(routed(**batch, task_ids=ids).logits.sin().sum(), parameter)
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(routed(**batch, task_ids=ids).logits.sin().sum())
                parameter.sub_(direction, alpha=step)
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-9, msg=name)


# -- processes --------------------------------------------------------------------------------------------------------


def test_distributed_data_parallel_averages_over_processes_of_different_tasks(tmp_path, patience):
    command = [sys.executable, Path(__file__).with_name("processes.py")]
    processes = [subprocess.Popen([*command, str(rank), tmp_path], stderr=subprocess.PIPE) for rank in range(2)]
    try:
        for process in processes:
            _, error = process.communicate(timeout=patience)
            assert process.returncode == 0, error.decode()
    finally:
        for process in processes:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    routed, x, ids = small_network()
    routed(x, task_ids=ids).sin().mean().backward()
    expected = {n: p.grad for n, p in routed.named_parameters() if p.requires_grad}
    assert_same(first, expected, rtol=1e-4, atol=1e-7)
    assert_same(second, expected, rtol=1e-4, atol=1e-7)


# -- Trainer ----------------------------------------------------------------------------------------------------------


def test_the_trainer_trains_saves_resumes_and_predicts(tmp_path, caplog):
    """With its defaults: task_ids are a column, unknown columns are dropped, checkpoints hold what trains."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 64, (16, 6), generator=generator)
    tasks = torch.arange(16) % 2
    labels = torch.where(tasks == 0, tokens[:, 0] > 32, tokens[:, 0] <= 32).long()  # tasks that contradict each other
    columns = {"input_ids": tokens, "task_ids": tasks, "labels": labels, "source": torch.zeros(16)}
    data = datasets.Dataset.from_dict({name: x.tolist() for name, x in columns.items()})

    def trainer(steps, resume=False):
        torch.manual_seed(1)
        routed = routing.route(
            tiny_base("bert"), 2, variant="private", rank=8, target_modules=["query", "value", "dense"],
            modules_to_save=["classifier"],
        )  # fmt: skip
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=1e-2, gradient_checkpointing=True, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
            logging_strategy="no", lr_scheduler_type="constant",
        )  # fmt: skip
        made = Trainer(routed, arguments, train_dataset=data, eval_dataset=data)
        made.train(resume_from_checkpoint=resume)
        return made

    with caplog.at_level(logging.WARNING):
        whole = trainer(4)
        resumed = trainer(4, resume=str(tmp_path / "checkpoint-2"))
    assert "missing" not in caplog.text
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    saved = (tmp_path / "checkpoint-4" / "model.safetensors").stat().st_size
    assert saved < 4 * sum(p.numel() for p in whole.model.parameters() if p.requires_grad) + 20_000
    prediction = whole.predict(data)
    assert prediction.predictions.shape == (16, 3)
    losses = [whole.evaluate()["eval_loss"], prediction.metrics["test_loss"]]
    assert losses[0] == pytest.approx(losses[1])
