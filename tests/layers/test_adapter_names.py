"""Mixtures of adapters in `adapter_names`, against ΔW merged for each row; several adapters trained in one batch."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

import linlora
from linlora.layers.lora_linear import converted_layers
from linlora.testing import randomize, tiny_base, tiny_batch

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name 'a' should not be contained in")

ADAPTERS = {"a": (2, 4, ["query", "value"]), "b": (8, 4, ["query", "key"]), "c": (3, 9, ["value"])}
MIXED = [{"a": 0.6, "b": -0.2}, "c", {"a": 1.5, "b": 0.25, "c": -1.0}, "__base__", {"b": 1}, {}, {"a": 0.6, "b": -0.2}]


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def model_of_strangers(make="accelerate", dtype=torch.float64, architecture="bert", **options):
    """Adapters of other ranks, scalings and layers in one model, each at its own point where it is linearized."""
    model = None
    for name, (rank, alpha, targets) in ADAPTERS.items():
        targets = targets if architecture == "bert" else {"gpt2": ["c_attn"], "t5": ["q", "v"]}[architecture]
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=architecture == "gpt2", **options
        )
        if model is None:
            model = get_peft_model(
                tiny_base(architecture, **(NO_DROPOUT if architecture == "bert" else {})), config, name
            )
        else:
            model.add_adapter(name, config)
    model = model.to(dtype).eval()
    randomize(model, 5)
    if make == "short":
        randomize(model, 5, ("lora_B",), scale=0.0)
    if make == "accelerate":
        linlora.accelerate(model)
    else:
        linlora.linearize(model)
        randomize(model, 6, ("lora_B",) if make == "short" else ("lora_dA", "lora_dB"))
    return model


def merged(model, mixture):
    """The base model with Σ λ ΔW in its weights."""
    base = copy.deepcopy(model)
    for (_, layer), (_, original) in zip(converted_layers(base), converted_layers(model), strict=True):
        for name, weight in mixture.items():
            if name in original.lora_A:
                layer.base_layer.weight.data += weight * original.get_delta_weight(name)
    return base.unload()


def as_mixture(entry):
    return entry if isinstance(entry, dict) else {} if entry == "__base__" else {entry: 1.0}


def row_of(batch, row):
    return {key: value[row : row + 1] for key, value in batch.items()}


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("make", ["accelerate", "short", "pair"])
def test_every_row_is_the_model_with_its_mixture_merged(make, architecture):
    model, batch = model_of_strangers(make, architecture=architecture), tiny_batch(architecture, len(MIXED))
    together = model(**batch, adapter_names=MIXED)[0]
    for row, entry in enumerate(MIXED):
        alone = merged(model, as_mixture(entry))(**row_of(batch, row))[0]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-10, atol=1e-12)
    same = [{"a": 0.1 * row + 0.1, "b": -1.0, "c": row - 2.5} for row in range(len(MIXED))]  # adapters, other weights
    together = model(**batch, adapter_names=same)[0]
    for row, entry in enumerate(same):
        alone = merged(model, entry)(**row_of(batch, row))[0]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-10, atol=1e-12)
    for entry in (MIXED[0], "b", {"b": -0.5}, {}):  # rows that agree
        together = model(**batch, adapter_names=[entry] * len(MIXED))[0]
        alone = merged(model, as_mixture(entry))(**batch)[0]
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*called, not run as one op")
def test_layers_that_are_called_mix_too():
    model, batch = model_of_strangers("pair"), tiny_batch("bert", len(MIXED))
    expected = model(**batch, adapter_names=MIXED).logits
    for _, layer in converted_layers(model):
        for part in (layer.base_layer, *layer.lora_A.values()):
            part.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(**batch, adapter_names=MIXED).logits, expected, rtol=1e-10, atol=1e-12)
    plain = model_of_strangers()
    expected = plain(**batch, adapter_names=MIXED).logits
    next(m for _, m in converted_layers(plain)).lora_B["a"].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(plain(**batch, adapter_names=MIXED).logits, expected, rtol=1e-10, atol=1e-12)


def test_an_adapter_of_weight_zero_has_no_part_in_its_row():
    model, batch = model_of_strangers(), tiny_batch("bert", 3)
    expected = model(**batch, adapter_names=["a", {"a": 2.0}, "__base__"]).logits
    for _, layer in converted_layers(model):
        if "c" in layer.lora_A:
            layer.lora_B["c"].weight.data.fill_(torch.nan)
    zero = [{"a": 1.0, "c": 0.0}, {"c": 0, "a": 2.0}, {"c": -0.0}]
    assert torch.equal(model(**batch, adapter_names=zero).logits, expected)
    beside = model(**batch, adapter_names=["a", {"a": 2.0}, "c"]).logits  # a row of NaN leaves the others alone
    torch.testing.assert_close(beside[:2], expected[:2])
    assert beside[2].isnan().all()


def test_the_order_of_adapters_changes_no_bit():
    model, batch = model_of_strangers(dtype=torch.float32), tiny_batch("bert", 2)
    one = model(**batch, adapter_names=[{"a": 0.3, "b": 0.7, "c": -1.0}, "b"]).logits
    assert torch.equal(model(**batch, adapter_names=[{"c": -1.0, "b": 0.7, "a": 0.3}, "b"]).logits, one)


def test_beams_keep_the_mixture_of_their_row():
    model = model_of_strangers("pair", torch.float32, "t5")
    inputs, rows = {"input_ids": tiny_batch("t5", 3)["input_ids"]}, [{"a": 0.5, "b": 2.0}, "c", {"a": 0.5, "c": 1.0}]
    together = model.generate(**inputs, adapter_names=rows, num_beams=3, max_new_tokens=4)
    for row, entry in enumerate(rows):
        alone = model.generate(**row_of(inputs, row), adapter_names=[entry], num_beams=3, max_new_tokens=4)
        assert torch.equal(together[row : row + 1, : alone.shape[1]], alone)


def test_copies_and_pickles_of_a_model_serve_their_own_adapters():
    model, batch = model_of_strangers(), tiny_batch("bert", 2)
    rows = [{"a": 0.5, "b": 1.0}, "c"]
    expected = model(**batch, adapter_names=rows).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        randomize(model, 9)
        torch.testing.assert_close(other(**batch, adapter_names=rows).logits, expected)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"a": 1.0, "z": 0.5}, "b"], ValueError, "non-existing adapter.*: z"),
        ([{"a": 1.0, "z": 0.0}, "b"], ValueError, "non-existing adapter.*: z"),
        ([{"a": float("nan")}, "b"], ValueError, "row 0: the weight of 'a' is nan; a finite number is expected"),
        (["b", {"a": "1"}], ValueError, "row 1: the weight of 'a' is '1'"),
        (["b", {"a": torch.ones((), requires_grad=True)}], ValueError, "asks for a gradient.*from_vectors"),
        (["b", {"__base__": 0.5}], ValueError, "row 1 weights '__base__', no adapter"),
        (["b", 3], TypeError, "row 1 is 3; a name is expected, or a mapping"),
        ("ab", TypeError, "Got adapter names of type .*str.*, expected a list"),
        ({"a": 0.5}, TypeError, "Got adapter names of type .*dict.*, expected a list"),
        (["b", {"a": 1.0}, "c"], ValueError, "Length of `adapter_names` should be the same .* got 3 and 2"),
    ],
)
def test_rows_that_cannot_be_are_refused_and_leave_no_hooks(rows, error, message):
    model, batch = model_of_strangers(), tiny_batch("bert", 2)
    expected = model(**batch).logits
    with pytest.raises(error, match=message):
        model(**batch, adapter_names=rows)
    assert torch.equal(model(**batch).logits, expected)


def test_where_adapters_are_not_mixed_is_refused():
    model, batch = model_of_strangers(), tiny_batch("bert", 1)
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(**batch, adapter_names=[{"a": 0.5}])
    model.unmerge_adapter()
    model.add_adapter("d", LoraConfig(target_modules=["dense"]))
    with pytest.raises(ValueError, match=r"dense' is a Linear of PEFT's own"):
        model(**batch, adapter_names=[{"a": 0.5}])
    linlora.accelerate(model)
    assert model(**batch, adapter_names=[{"a": 0.5, "d": 1.0}]).logits.isfinite().all()
    model = model_of_strangers("pair")
    linlora.set_scope(model, "model")
    with pytest.raises(ValueError, match=r"linlora.routing.from_vectors"):
        model(**batch, adapter_names=["a"])


def test_modules_trained_whole_are_taken_whole():
    model = get_peft_model(tiny_base("bert"), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]), "a")
    model.add_adapter("b", LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    model.add_adapter("c", LoraConfig(target_modules=["query"]))
    randomize(model.eval(), 3)
    for name, p in model.named_parameters():
        if "modules_to_save.b" in name:
            p.data.normal_()
    linlora.accelerate(model)
    batch = tiny_batch("bert", 3)
    together = model(**batch, adapter_names=["b", {"b": 0.5, "c": 1.0}, "c"]).logits
    with model.disable_adapter():
        base = model(**batch).logits
    model.set_adapter("b")
    torch.testing.assert_close(together[0], model(**batch).logits[0])
    assert not torch.allclose(together[2], base[2])
    with pytest.raises(ValueError, match=r"module 'classifier' was trained whole .* by each of \['a', 'b'\]"):
        model(**batch, adapter_names=[{"a": 0.5, "b": 0.5}, "c", "c"])


# -- training ---------------------------------------------------------------------------------------------------------

STEPS = [["a", "b", "a", "c", "b"], ["b", "b", "c", "b", "c"], ["a", "a", "a", "a", "a"], ["c", "a", "b", "b", "a"]]


def steps_of(model, adapters, names_of_step, optimizer, options):
    """AdamW steps on the rows of some adapters alone, each with the mean loss of its rows."""
    for seed, names in enumerate(names_of_step):
        rows = [row for row, name in enumerate(names) if name in adapters]
        if not rows:
            continue
        batch = {key: value[rows] for key, value in tiny_batch("bert", len(names), seed=seed).items()}
        kept = [names[row] for row in rows]
        labels = torch.tensor(rows) % 3
        losses = cross_entropy(model(**batch, **options(kept)).logits, labels, reduction="none")
        sum(losses[[k == name for k in kept]].mean() for name in adapters if name in kept).backward()
        optimizer.step()
        optimizer.zero_grad()


def parameters_of(model, adapter):
    return {name: p for name, p in model.named_parameters() if adapter in name.split(".")}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("make", ["accelerate", "short", "pair"])
def test_adapters_trained_in_one_batch_are_those_trained_alone(make, dtype, tolerance):
    together = model_of_strangers(make, dtype).train()
    start = copy.deepcopy(together)
    together.set_requires_grad(list(ADAPTERS))
    groups = [{"params": [p for p in parameters_of(together, a).values() if p.requires_grad]} for a in ADAPTERS]
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(groups, **options)
    steps_of(together, list(ADAPTERS), STEPS, optimizer, lambda names: {"adapter_names": names})
    for adapter in ADAPTERS:
        alone = copy.deepcopy(start)
        alone.set_adapter(adapter)
        optimizer = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], **options)
        steps_of(alone, [adapter], STEPS, optimizer, lambda names: {})
        before, trained = parameters_of(start, adapter), parameters_of(alone, adapter)
        assert any(not torch.equal(before[name], trained[name]) for name in trained)
        for name, p in parameters_of(together, adapter).items():
            torch.testing.assert_close(p, trained[name], rtol=0.0, atol=tolerance, msg=name)


def test_an_adapter_without_rows_gets_no_gradient_at_all():
    model = model_of_strangers("pair").train()
    model.set_requires_grad(list(ADAPTERS))
    cross_entropy(
        model(**tiny_batch("bert", 3), adapter_names=["c", "__base__", "c"]).logits, torch.arange(3)
    ).backward()
    for adapter in ADAPTERS:
        gradients = [p.grad is not None for p in parameters_of(model, adapter).values() if p.requires_grad]
        assert all(gradients) if adapter == "c" else not any(gradients)


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpointed_blocks_run_again_with_their_rows(options):
    model, names = model_of_strangers().train(), ["a", "b", "c", "b"]
    model.set_requires_grad(list(ADAPTERS))
    model.enable_input_require_grads()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(options)
        first = model(**tiny_batch("bert", 4), adapter_names=names).logits
        second = model(**tiny_batch("bert", 4, seed=1), adapter_names=[{"a": 0.5, "b": 2.0}, *names[1:]]).logits
        (first.sin().sum() + second.sin().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_calls_with_and_without_rows_share_a_backward():
    model, batch, names = model_of_strangers().train(), tiny_batch("bert", 3), ["a", "b", "c"]
    model.set_requires_grad(list(ADAPTERS))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = model(**batch).logits.sin().sum()
        loss = loss + model(**batch, adapter_names=names).logits.cos().sum()
        with torch.no_grad():
            model(**batch, adapter_names=names[::-1])
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_that_loses_the_rows_is_refused(reentrant):
    model = model_of_strangers().train()
    model.set_requires_grad(list(ADAPTERS))
    layer = next(layer for _, layer in converted_layers(model))
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)

    def block(x):
        return model.base_model.model.bert.encoder.layer[0](x[:, None])[0]

    with model._enable_peft_forward_hooks(adapter_names=["b", "b"]):
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=f"layer '{layer.layer_name}': the layer is recomputed in backward without"):
        y.sum().backward()
    model(**tiny_batch("bert", 2)).logits.sum().backward()  # and a call without rows trains the active adapter again


def test_rows_of_adapters_that_do_not_train_are_warned_of():
    model = model_of_strangers().train()  # "a" is active
    with pytest.warns(UserWarning, match=r"nothing of \['b'\] is: .* model.set_requires_grad\(\['b'\]\)"):
        model(**tiny_batch("bert", 2), adapter_names=["a", "b"])


def test_dropout_is_drawn_for_every_row_fused_or_called():
    model = model_of_strangers(lora_dropout=0.5).train()
    layer = next(layer for _, layer in converted_layers(model) if {"a", "b"} <= layer.lora_A.keys())
    x, names = torch.randn(32, dtype=torch.float64).expand(4000, -1), ["a", {"a": 0.5, "b": 1.0}] * 2000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = layer(x, adapter_names=names)
    layer.lora_dropout["b"].p = 0.1
    with pytest.warns(UserWarning, match=r"have dropouts \[0.1, 0.5\] in one batch, so each is called"):
        called = layer(x, adapter_names=names)
    expected = layer.eval()(x[:2], adapter_names=names[:2])
    for y in (fused, called):
        rows = y.unflatten(0, (2000, 2))
        error = rows.std(0) / 2000**0.5
        assert (rows.std(0) > 0.0).all()
        assert ((rows.mean(0) - expected).abs() < 6.0 * error).all()
