"""A linearized model trains with plain PyTorch, HF Trainer and accelerate with no further change."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import linlora
from linlora.baselines import linearize_with_functorch
from linlora.testing import tiny_model


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 64, (48, 7))
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": (tokens[:, 0] % 3).tolist()})


def batches(dataset, size=16):
    rows = dataset.with_format("torch")
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def train(model, dataset, steps=6):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in (batches(dataset) * steps)[:steps]:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
def test_plain_pytorch_follows_the_torch_func_training_step_by_step(dataset, trained):
    ours, oracle = (tiny_model("bert", trained).double() for _ in range(2))
    linlora.linearize(ours)
    linearize_with_functorch(oracle, over="adapter")
    if not trained:  # weight decay would move the frozen A of the oracle, not its function
        for name, parameter in oracle.named_parameters():
            parameter.requires_grad_("lora_B" in name)
    np.testing.assert_allclose(train(ours, dataset), train(oracle, dataset), rtol=1e-3 if trained else 1e-9)


def test_hf_trainer_trains_saves_and_resumes(dataset, tmp_path):
    def trainer(steps):
        model = tiny_model("bert", trained=True)
        linlora.linearize(model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-2, save_steps=3,
            logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(), seed=0,
            lr_scheduler_type="constant",
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=dataset)

    def losses(run):
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    whole = trainer(6)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    np.testing.assert_allclose(losses(resumed)[-3:], losses(whole)[-3:], rtol=1e-4)
    difference = linlora.TaskVector.from_model(resumed.model) - linlora.TaskVector.from_model(whole.model)
    assert difference.norm() < 1e-3 * linlora.TaskVector.from_model(whole.model).norm()


def test_accelerate_with_gradient_accumulation(dataset):
    model = tiny_model("bert")
    linlora.linearize(model)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for batch in batches(dataset) * 4:
        with accelerator.accumulate(model):
            loss = model(**{k: v.to(accelerator.device) for k, v in batch.items()}).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert linlora.TaskVector.from_model(accelerator.unwrap_model(model)).norm() > 0


def test_autocast_bf16_keeps_parameters_and_gradients_in_fp32(dataset):
    model = tiny_model("bert", trained=True)
    linlora.linearize(model)
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16):
        loss = model(**batches(dataset)[0]).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert loss.item() == pytest.approx(model(**batches(dataset)[0]).loss.item(), rel=2e-2)
