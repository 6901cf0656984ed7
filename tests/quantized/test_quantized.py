"""A quantized base: the model is that of the weights the base stands for, and stays quantized."""

import pytest
import torch
from peft import PeftModel

import linlora
from linlora import TaskVector
from linlora.layers.quantized import QuantizedLoraLinear
from linlora.testing import randomize, relative_error, tiny_batch

SCOPES = ["layer", "model"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about their own kernels


def batch(labels=False):
    made = tiny_batch("llama")
    return {**made, "labels": made["input_ids"]} if labels else made


def displaced(models, seed=3, trained=True):
    for model in models:
        randomize(model, seed, ("lora_dA", "lora_dB") if trained else ("lora_B",))


def layers(model):
    return [module for module in model.modules() if isinstance(module, QuantizedLoraLinear)]


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
@pytest.mark.parametrize("scope", SCOPES)
def test_outputs_and_gradients_are_those_of_the_weights_it_stands_for(pair, tolerance, scope, trained):
    models = pair(trained)
    for model in models:
        linlora.linearize(model, scope=scope)
    displaced(models, trained=trained)
    losses = [model(**batch(labels=True)) for model in models]
    quantized, plain = (out.logits for out in losses)
    assert relative_error(quantized, plain) < tolerance
    for out in losses:
        out.loss.backward()
    expected = {name: p.grad for name, p in models[1].named_parameters() if p.grad is not None}
    actual = {name: p.grad for name, p in models[0].named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    assert len(actual) == (12 if trained else 6)
    assert all(relative_error(actual[name], expected[name]) < 5 * tolerance for name in actual)


def test_accelerated_plain_lora_is_peft_s(pair, tolerance):
    model = pair()[0]
    expected = model(**batch()).logits
    linlora.accelerate(model)
    assert relative_error(model(**batch()).logits, expected) < tolerance
    linlora.delinearize(model)
    assert relative_error(model(**batch()).logits, expected) < tolerance
    assert not layers(model)


def test_the_report_says_what_runs(pair, kind):
    report = str(linlora.linearize(pair()[0]))
    name = {
        "torchao-int8": "Int8Tensor", "torchao-int4": "IntxUnpackedToInt8Tensor",
        "bitsandbytes-int8": "Linear8bitLt", "bitsandbytes-nf4": "Linear4bit",
    }[kind]  # fmt: skip
    assert f"backend: quantized base ({name}): its own forward and a low-rank update, in place of the fused" in report


@pytest.mark.parametrize("scope", SCOPES)
def test_training_moves_the_adapter_and_nothing_else(pair, scope):
    model = pair(trained=False, lora_dropout=0.1)[0].train()
    linlora.linearize(model, scope=scope)
    weights = [layer.base_layer.weight for layer in layers(model)]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch(labels=True)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.01
    assert all(layer.base_layer.weight is weight for layer, weight in zip(layers(model), weights, strict=True))


def test_the_tangent_is_linear_in_the_vector(pair):
    """Of model scope, exactly, whatever the base does to the primal: F(2δ) - F(0) = 2 (F(δ) - F(0))."""
    model = pair()[0]
    linlora.linearize(model, scope="model")
    with torch.no_grad():
        zero = model(**batch()).logits
        displaced([model])
        once = model(**batch()).logits
        linlora.apply(model, 2.0 * TaskVector.from_model(model))
        twice = model(**batch()).logits
    assert relative_error(twice - zero, 2.0 * (once - zero)) < 5e-2


def test_vectors_apply_fuse_and_export_to_stock_peft(pair, bases, tolerance, tmp_path):
    import copy

    model = pair()[0]
    linlora.linearize(model)
    vectors = []
    for seed in (3, 4):
        displaced([model], seed)
        vectors.append(TaskVector.from_model(model))
    linlora.apply(model, linlora.fuse(vectors, "average"))
    expected = model(**batch()).logits
    linlora.export(model, tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(bases[0]), tmp_path)
    assert relative_error(stock(**batch()).logits, expected) < tolerance


def test_a_plain_adapter_s_vector_is_read(pair):
    quantized, plain = (TaskVector.from_model(model) for model in pair())
    assert quantized.deltas.keys() == plain.deltas.keys()
    assert quantized.point_hash == plain.point_hash


def test_adapters_switched_off_leave_the_base(pair, bases, tolerance):
    model = pair()[0]
    linlora.linearize(model)
    with model.disable_adapter():
        assert relative_error(model(**batch()).logits, bases[0](**batch()).logits) < tolerance


def test_merging_is_refused_with_the_remedy(pair):
    model = pair()[0]
    linlora.linearize(model)
    for merge in (linlora.merge, lambda m: m.merge_adapter()):
        with pytest.raises(ValueError, match=r"base is quantized .* Serve base and adapter unmerged, or merge"):
            merge(model)


def test_every_row_has_its_mixture(pair):
    model = pair()[0]
    linlora.linearize(model)
    displaced([model], 3)
    model.eval()
    with model.disable_adapter():
        base = model(**batch()).logits
    logits = model(**batch(), adapter_names=["default", "__base__", {"default": 1.0}]).logits
    expected = model(**batch()).logits
    torch.testing.assert_close(logits, torch.stack([expected[0], base[1], expected[2]]))


def test_autocast_computes_in_its_dtype(pair):
    model = pair()[0]
    linlora.linearize(model)
    expected = model(**batch()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**batch()).logits
    assert relative_error(logits, expected) < 6e-2
