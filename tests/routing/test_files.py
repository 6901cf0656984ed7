"""Files of routed models, single tasks as adapters, and the checkpoints of the original code."""

import json
import os
import warnings

import peft
import pytest
import torch
from routed_models import TARGETS, fill, folded, mixed_by_hand, routed_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import linlora
from linlora import routing
from linlora.testing import tiny_base, tiny_batch

FILE = "routed_model.safetensors"


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs)[0]


# -- the model's own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [None, "layer", "model"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "granularity": "block",
            "sampling": "straight_through",
            "shared_skill": True,
            "modules_to_save": ["classifier"],
        },
        {"variant": "private", "n_skills": 4, "n_heads": 1, "alpha": 3.0, "dropout": 0.1},
        {"variant": "table", "granularity": "model"},
    ],
    ids=["poly", "options", "private", "table"],
)
def test_what_is_saved_is_read(options, scope, tmp_path, batch, ids):
    routed = routed_model(dtype=torch.float32, **options)
    if scope is not None:
        linlora.linearize(routed, scope)
    if "modules_to_save" in options:
        torch.nn.init.normal_(routed.model.classifier.weight)
    routed.save_pretrained(tmp_path)
    again = routing.RoutedModel.from_pretrained(tiny_base("bert"), tmp_path)
    assert torch.equal(logits(again, **batch, task_ids=ids), logits(routed, **batch, task_ids=ids))
    assert str(again.report()) == str(routed.report())
    trains = [[n for n, p in model.named_parameters() if p.requires_grad] for model in (routed, again)]
    assert trains[0] == trains[1]
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / FILE).read_bytes() == (tmp_path / "again" / FILE).read_bytes()


def test_the_other_variants_are_read_too(tmp_path, batch):
    for variant, options in (("gate", {"hidden": 3}), ("adamix", {}), ("uniform", {}), ("mode", {"n_heads": 1})):
        routed = routed_model(dtype=torch.float32, variant=variant, **options)
        routed.save_pretrained(tmp_path)
        again = routing.RoutedModel.from_pretrained(tiny_base("bert"), tmp_path)
        assert torch.equal(logits(again, **batch), logits(routed, **batch))


def test_the_file_holds_the_adapter_alone(tmp_path):
    routed = routed_model()
    routed.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert {name.rsplit(".", 1)[-1] for name in tensors} == {"lora_A", "lora_B", "logits"}
    assert os.listdir(tmp_path) == [FILE]


def test_a_model_with_new_tasks_is_read(tmp_path, batch, ids):
    routed = routed_model(dtype=torch.float32)
    before = logits(routed, **batch, task_ids=ids)
    report = routing.mhr_z(routed, n_tasks=2)
    assert sum(report.trainable.values()) == report.trainable["selectors"] == 11 * 2 * 12
    assert torch.equal(logits(routed, **batch, task_ids=ids), before)
    optimizer = torch.optim.AdamW(routed.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        routed(**batch, task_ids=[4, 5, 4, 5, 4], labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
        optimizer.step()
    assert torch.equal(logits(routed, **batch, task_ids=ids), before)  # the tasks so far are as they were
    routed.save_pretrained(tmp_path)
    again = routing.RoutedModel.from_pretrained(tiny_base("bert"), tmp_path)
    new = {**batch, "task_ids": torch.tensor([5, 4, 0, 5, 4])}
    assert torch.equal(logits(again, **new), logits(routed, **new))
    assert str(again.report()) == str(routed.report())


def test_a_state_dict_is_the_adapter_and_loads_strictly(batch, ids):
    routed, other = routed_model(), routed_model()
    fill(other, seed=9)
    other.load_state_dict(routed.state_dict())
    assert torch.equal(logits(other, **batch, task_ids=ids), logits(routed, **batch, task_ids=ids))
    assert not any("base_layer" in name or "embeddings" in name for name in routed.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*query.lora_A"):
        other.load_state_dict({n: x for n, x in routed.state_dict().items() if "query.lora_A" not in n})


def test_parameters_of_the_base_that_train_are_saved_too(tmp_path, batch, ids):
    routed = routed_model(dtype=torch.float32)
    for name, parameter in routed.named_parameters():
        if "LayerNorm" in name:
            torch.nn.init.normal_(parameter.requires_grad_(True))
    routed.save_pretrained(tmp_path)
    again = routing.RoutedModel.from_pretrained(tiny_base("bert"), tmp_path)
    assert torch.equal(logits(again, **batch, task_ids=ids), logits(routed, **batch, task_ids=ids))
    with pytest.raises(ValueError, match=r"base model train, .*LayerNorm.*modules_to_save"):
        routing.export_task(routed, tmp_path, 1)


@pytest.mark.parametrize(
    ("saved", "given", "warns"),
    [
        ("org/Base", "org/other", True),
        ("org/base-v1", "org/base-v2", True),
        ("org/Base", "/cache/models--org--Base/snapshots/0a1b", False),
        ("./base/", "base", False),
        ("org/base", "", False),
        ("", "org/base", False),
    ],
)
def test_a_base_of_another_name_is_warned_of(saved, given, warns, tmp_path):
    routed = routed_model(dtype=torch.float32)
    routed.model.config._name_or_path = saved
    routed.save_pretrained(tmp_path)
    base = tiny_base("bert")
    base.config._name_or_path = given
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        routing.RoutedModel.from_pretrained(base, tmp_path)
    told = [str(warning.message) for warning in caught if "was saved from a model on" in str(warning.message)]
    assert len(told) == warns
    assert all(f"'{saved}'" in message and f"'{given}'" in message for message in told)


class TestBrokenFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{FILE}: no such file"):
            routing.RoutedModel.from_pretrained(tiny_base("bert"), tmp_path)

    def test_truncated_foreign_and_of_another_version(self, tmp_path):
        routed_model(dtype=torch.float32).save_pretrained(tmp_path)
        whole = (tmp_path / FILE).read_bytes()
        tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / FILE).items()}  # it is mapped
        with safe_open(tmp_path / FILE, "pt") as file:
            metadata = {k: v for k, v in file.metadata().items() if k != "header_checksum"}
        (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(linlora.CorruptFileError, match="truncated"):
            routing.RoutedModel.from_pretrained(tiny_base("bert"), tmp_path)
        save_file(tensors, tmp_path / FILE, {"format": "pt"})
        with pytest.raises(linlora.CorruptFileError, match="not a routed model"):
            routing.RoutedModel.from_pretrained(tiny_base("bert"), tmp_path)
        save_file(tensors, tmp_path / FILE, {**metadata, "format_version": "7"})
        with pytest.raises(linlora.CorruptFileError, match="format version 7, this linlora reads 1"):
            routing.RoutedModel.from_pretrained(tiny_base("bert"), tmp_path)
        name = next(iter(tensors))
        save_file({n: x for n, x in tensors.items() if n != name}, tmp_path / FILE, metadata)
        with pytest.raises(ValueError, match=f"'{name}' is None in the file"):
            routing.RoutedModel.from_pretrained(tiny_base("bert"), tmp_path)

    def test_another_base(self, tmp_path):
        routed_model(dtype=torch.float32).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"T5ForConditionalGeneration has no module 'bert.encoder"):
            routing.RoutedModel.from_pretrained(tiny_base("t5"), tmp_path)


# -- single tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linearized", [False, True], ids=["plain", "linearized"])
@pytest.mark.parametrize("architecture", TARGETS)
def test_an_exported_task_is_what_stock_peft_computes(architecture, linearized, tmp_path):
    routed, batch = routed_model(architecture, dtype=torch.float32), tiny_batch(architecture, 5)
    if linearized:
        linlora.linearize(routed)
    for task in (0, 3):
        routing.export_task(routed, tmp_path / str(task), task)
        loaded = peft.PeftModel.from_pretrained(tiny_base(architecture), tmp_path / str(task))
        expected = logits(routed, **batch, task_ids=[task] * 5)
        torch.testing.assert_close(logits(loaded, **batch), expected, rtol=1e-3, atol=1e-4)
        config = json.loads((tmp_path / str(task) / "adapter_config.json").read_text())
        assert config["r"] == (4 if linearized else 2)
    assert sorted(os.listdir(tmp_path / "0")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_task_is_exported_with_its_head(tmp_path, batch):
    routed = routed_model(dtype=torch.float32, modules_to_save=["classifier"])
    torch.nn.init.normal_(routed.model.classifier.weight)
    routing.export_task(routed, tmp_path, 1)
    loaded = peft.PeftModel.from_pretrained(tiny_base("bert"), tmp_path)
    torch.testing.assert_close(logits(loaded, **batch), logits(routed, **batch, task_ids=[1] * 5))


def test_an_exported_task_is_of_its_layers_alone(tmp_path):
    def network():
        torch.manual_seed(0)
        block = torch.nn.ModuleDict({"fc": torch.nn.Linear(6, 6), "last": torch.nn.Linear(6, 6)})
        network = torch.nn.ModuleDict({"fc": torch.nn.Linear(6, 6), "block": block})
        network.forward = lambda x: block["last"](block["fc"](network["fc"](x).tanh()).tanh())
        return network

    x = torch.randn(3, 6)
    for place, targets in enumerate([r"fc", ["fc", "last"]]):
        routed = fill(routing.route(network(), 2, n_skills=2, rank=2, target_modules=targets))
        for layer in routed.layers[1:]:
            torch.nn.init.zeros_(layer.lora_B)  # linearized, the first layer has twice the rank of the others
        linlora.linearize(routed)
        expected = routed(x, task_ids=[1] * 3)
        routing.export_task(routed, tmp_path / str(place), 1)
        loaded = peft.PeftModel.from_pretrained(network(), tmp_path / str(place))
        torch.testing.assert_close(loaded(x), expected)
        adapted = [n for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        assert len(adapted) == len(routed.layers)
        torch.testing.assert_close(routing.collapse(routed, 1)(x), expected)


@pytest.mark.parametrize("linearized", [False, True], ids=["plain", "linearized"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_merged_task_is_a_plain_model(architecture, linearized):
    routed, batch = routed_model(architecture), tiny_batch(architecture, 5)
    if linearized:
        linlora.linearize(routed)
    expected = logits(routed, **batch, task_ids=[2] * 5)
    merged = routing.merge_task(routed, 2)
    assert type(merged) is type(tiny_base(architecture))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged, **batch), expected)


@pytest.mark.parametrize("linearized", [False, True], ids=["plain", "linearized"])
def test_a_merged_weight_in_half_precision_is_rounded_once(linearized):
    routed = fill(routed_model())
    if linearized:
        linlora.linearize(routed)
    routed.bfloat16()
    layer, weights = routed.routed_layers[0], routing.task_weights(routed, 1)
    A, B = (factor.detach().double() for factor in layer.adapter(weights[layer.layer_name]))
    exact = layer.weight.double() + layer.sizes.scaling * (B @ A)
    merged = routing.merge_task(routed, 1).get_submodule(layer.layer_name).weight
    assert merged.dtype == torch.bfloat16
    assert (merged == exact.bfloat16()).double().mean() > 0.999  # the others are ties in float32


def test_a_weight_that_an_embedding_shares_is_not_merged():
    base = tiny_base("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    routed = fill(routing.route(base, 2, n_skills=2, rank=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"'lm_head' shares its weight with 'transformer.wte'"):
        routing.merge_task(routed, 1)


def test_nan_is_not_merged(batch, ids):
    routed = routed_model()
    expected = logits(routed, **batch, task_ids=ids)
    with torch.no_grad():
        routed.layers[-1].lora_B[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"pooler\.dense': W \+ ΔW is not finite"):
        routing.merge_task(routed, 2)
    with torch.no_grad():
        routed.layers[-1].lora_B[0, 0, 0, 0] = fill(routed_model()).layers[-1].lora_B[0, 0, 0, 0]
    torch.testing.assert_close(logits(routed, **batch, task_ids=ids), expected)


@pytest.mark.parametrize("scope", [None, "layer", "model"])
@pytest.mark.parametrize("task", [None, 2])
def test_collapsed_it_is_a_peft_model_that_trains_on(task, scope, batch, double):
    routed = routed_model(modules_to_save=["classifier"])
    if scope is not None:
        linlora.linearize(routed, scope)
    if task is None:
        expected = logits(routed, **batch, mixture=torch.full((5, 3), 1 / 3, dtype=torch.float64))
    else:
        expected = logits(routed, **batch, task_ids=[task] * 5)
    collapsed = routing.collapse(routed, task)
    assert isinstance(collapsed, peft.PeftModel)
    torch.testing.assert_close(logits(collapsed, **batch), expected)
    collapsed(**batch).logits.sum().backward()
    assert all(p.grad is not None for p in collapsed.parameters() if p.requires_grad)
    if scope is not None:
        assert linlora.TaskVector.from_model(collapsed).scope == scope


def test_the_mean_kept_trains_all_copies_alike(batch):
    kept, collapsed = routed_model(), routing.collapse(routed_model())
    routing.mhr_mu(kept)
    labels = torch.tensor([0, 1, 2, 0, 1])
    kept(**batch, labels=labels).loss.backward()
    collapsed(**batch, labels=labels).loss.backward()
    layer = kept.layers[0]
    single = collapsed.get_submodule(f"base_model.model.{layer.layer_name}")
    A, _ = routing.average(layer.lora_A.grad, layer.lora_B.grad)  # dA_s = dA / S
    torch.testing.assert_close(3 * A, single.lora_A["default"].weight.grad)


def test_what_no_adapter_can_be_is_refused(tmp_path, batch):
    routed = routed_model()
    with pytest.raises(ValueError, match="task id 4 is unknown: the ids of 4 tasks are 0 to 3"):
        routing.export_task(routed, tmp_path, 4)
    linlora.linearize(routed, "model")
    for action in (lambda: routing.export_task(routed, tmp_path, 0), lambda: routing.merge_task(routed, 0)):
        with pytest.raises(ValueError, match=r"no LoRA adapter has the function.*set_scope\(model, 'layer'\)"):
            action()
    with pytest.raises(ValueError, match="weights depend on the input, so no single adapter"):
        routing.export_task(routed_model(variant="gate"), tmp_path, 0)
    with pytest.raises(ValueError, match="dyadic"):
        routing.merge_task(routed_model(variant="mode", n_heads=1), 0)


# -- the original code ------------------------------------------------------------------------------------------------

LAYERS = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.2.DenseReluDense.wi"]


def original_state(layout, shared=False, prefix="model."):
    """A state dict as the released code writes it, with skills of known values."""
    generator = torch.Generator().manual_seed(2)
    state, factors, logits = {}, {}, None
    for layer in LAYERS:
        n = 48 if layer.endswith("wi") else 32
        A = torch.randn(4, 3, 8, 2, generator=generator) * 0.2
        B = torch.randn(4, 3, 2, n // 4, generator=generator) * 0.2
        logits = logits if shared and logits is not None else torch.randn(5, 12, generator=generator)
        factors[layer] = A, B, logits
        first = layout == "skills_first"
        state[f"{prefix}{layer}.lora_a"] = A.transpose(0, 1).contiguous() if first else A
        state[f"{prefix}{layer}.lora_b"] = B.permute(1, 2, 0, 3).contiguous() if first else B
        state[f"{prefix}{layer}.selector.module_logits"] = logits
    return state, factors


@pytest.mark.parametrize("shared", [False, True], ids=["layer", "shared"])
@pytest.mark.parametrize("layout", ["camera_ready", "skills_first"])
def test_both_layouts_of_the_original_code_are_read(layout, shared, tmp_path):
    state, factors = original_state(layout, shared)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    routed = routing.from_original(tiny_base("t5"), tmp_path / "last.ckpt", alpha=4.0, layout=layout)
    assert len(routed.selectors) == (1 if shared else 2)
    batch = tiny_batch("t5", 5)
    y = logits(routed, **batch, task_ids=[4, 0, 4, 1, 2])

    def delta_weight(layer):
        A, B, Z = factors[layer.layer_name]
        p = torch.sigmoid(Z[4].view(4, 3))
        A_z, B_z = mixed_by_hand(A, B, p / p.sum(-1, keepdim=True))
        return 4.0 / 2 * (A_z @ B_z).t()

    expected = folded(routed, delta_weight, lambda: logits(routed, **batch))
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)


def test_private_checkpoints_have_no_logits():
    state, _ = original_state("camera_ready", prefix="")
    state = {n: x for n, x in state.items() if "logits" not in n}
    routed = routing.from_original(tiny_base("t5"), state, alpha=2.0)
    assert "Private(3 tasks" in str(routed.report())


def test_original_checkpoints_that_do_not_fit(tmp_path):
    state, _ = original_state("camera_ready")
    with pytest.raises(ValueError, match=r"'skills_first' .*differ in heads.*or layer|try the other layout"):
        routing.from_original(tiny_base("t5"), state, alpha=1.0, layout="skills_first")
    with pytest.raises(ValueError, match=r"'model.encoder.*q' is no layer of BertFor"):
        routing.from_original(tiny_base("bert"), state, alpha=1.0)
    with pytest.raises(ValueError, match=r"no '<layer>.lora_a'; it has \['weight'\]"):
        routing.from_original(tiny_base("t5"), {"weight": torch.zeros(1)}, alpha=1.0)
    with pytest.raises(TypeError, match="alpha"):
        routing.from_original(tiny_base("t5"), state)
    (tmp_path / "broken.ckpt").write_bytes(b"nothing")
    with pytest.raises(
        linlora.CorruptFileError, match=r"broken.ckpt: torch.load\(weights_only=True\) does not read it"
    ):
        routing.from_original(tiny_base("t5"), tmp_path / "broken.ckpt", alpha=1.0)


def test_an_original_checkpoint_that_was_altered_or_diverged_is_refused(tmp_path):
    state, _ = original_state("camera_ready")
    path, name = tmp_path / "mhr.pt", next(name for name in state if name.endswith("lora_a"))
    torch.save(state, path)
    raw = bytearray(path.read_bytes())
    raw[raw.find(state[name].numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(raw)
    with pytest.raises(linlora.CorruptFileError, match="was altered"):
        routing.from_original(tiny_base("t5"), path, alpha=1.0)
    path.write_bytes(b"")
    with pytest.raises(linlora.CorruptFileError, match=r"mhr\.pt"):
        routing.from_original(tiny_base("t5"), path, alpha=1.0)
    for name in state:
        diverged = state | {name: torch.full_like(state[name], torch.nan)}
        with pytest.raises(ValueError, match="NaN or infinity"):
            routing.from_original(tiny_base("t5"), diverged, alpha=1.0)
