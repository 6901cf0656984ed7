"""route: inventories in models of every make, run on batches of mixed tasks, and what is refused."""

import copy
import inspect
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from routed_models import TARGETS, fill, routed_model, rows_of, task_alone
from torch import nn
from transformers import LongformerConfig, LongformerModel

import linlora
from linlora import routing
from linlora.testing import tiny_base, tiny_batch, tiny_model


@pytest.mark.parametrize("architecture", TARGETS)
def test_every_row_is_what_its_task_computes_alone(architecture, ids):
    routed, batch = routed_model(architecture), tiny_batch(architecture, 5)
    y = routed(**batch, task_ids=ids)[0]
    for task in (0, 2, 3):
        rows = (ids == task).nonzero().squeeze(1)
        torch.testing.assert_close(y[rows], task_alone(routed, task, **rows_of(batch, rows)), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_layers_share_selectors_as_asked(granularity, ids, batch):
    routed = routed_model(granularity=granularity)
    assert len(routed.selectors) == {"layer": 11, "block": 3, "model": 1}[granularity]  # the pooler is in no block
    shared = {layer.layer_name: layer.selector for layer in routed.routed_layers}
    same_block = shared["bert.encoder.layer.0.attention.self.query"] is shared["bert.encoder.layer.0.output.dense"]
    assert same_block == (granularity != "layer")
    y = routed(**batch, task_ids=ids).logits
    torch.testing.assert_close(y[3:4], task_alone(routed, 3, **rows_of(batch, [3])), rtol=1e-6, atol=1e-10)
    assert sum(p.numel() for p in routed.selectors.parameters()) == len(routed.selectors) * 4 * 12


def test_fresh_inventories_keep_the_function_and_only_they_train(batch):
    base = tiny_base("bert")
    expected, pointers = base(**batch).logits, {p.data_ptr() for p in base.parameters()}
    routed = routing.route(base, 3, target_modules=["query"])
    torch.testing.assert_close(routed(**batch, task_ids=[0, 1, 2, 0, 1]).logits, expected)
    assert pointers <= {p.data_ptr() for p in routed.parameters()}
    trained = {n.rsplit(".", 1)[-1] for n, p in routed.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "logits"}


def test_all_linear_is_all_but_the_head():
    names = {layer.layer_name for layer in routed_model("llama", target_modules="all-linear").layers}
    assert len(names) == 2 * 7
    assert "lm_head" not in names


def test_accelerate_saves_and_loads_it(tmp_path, batch, ids):
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(routed_model(dtype=torch.float32))
    expected = model(**batch, task_ids=ids).logits
    accelerator.save_state(tmp_path)
    fill(model, seed=7)
    accelerator.load_state(tmp_path)
    torch.testing.assert_close(model(**batch, task_ids=ids).logits, expected)


def test_private_shared_and_uniform_are_one_word(ids, batch):
    for variant, skills in (("private", 4), ("shared", 1), ("uniform", 3)):
        routed = routed_model(variant=variant, n_skills=3 if variant == "uniform" else None, n_heads=1)
        assert {layer.sizes.n_skills for layer in routed.routed_layers} == {skills}
        y = routed(**batch, **({"task_ids": ids} if variant == "private" else {})).logits
        for layer in routed.routed_layers:  # skill 2 alone, the one skill, the mean
            A, B = layer.lora_A, layer.lora_B
            pick = [A[:, 2:3], B[:, 2:3]] if variant == "private" else [A.mean(1, True), B.mean(1, True)]
            layer.lora_A.data, layer.lora_B.data = (x.expand(-1, skills, -1, -1).clone() for x in pick)
        again = routed(**batch, **({"task_ids": ids} if variant == "private" else {})).logits
        rows = ids == 2 if variant == "private" else slice(None)
        torch.testing.assert_close(y[rows], again[rows])


def test_alpha_and_rank_make_the_scaling():
    assert routed_model(rank=2, alpha=6.0).layers[0].sizes.scaling == 3.0
    assert routed_model(rank=2).layers[0].sizes.scaling == 1.0


def test_half_precision_models_have_float32_skills(ids, batch):
    routed = routed_model(dtype=torch.bfloat16)
    assert {p.dtype for p in routed.parameters() if p.requires_grad} == {torch.float32}
    exact = routed_model(dtype=torch.float64)(**batch, task_ids=ids).logits
    y = routed(**batch, task_ids=ids).logits
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() < 0.05 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        y = routed_model(dtype=torch.float32)(**batch, task_ids=ids).logits
    assert (y.double() - exact).norm() < 0.05 * exact.norm()


def test_dropout_is_of_the_update_in_training_alone(ids, batch):
    routed = routed_model(dropout=0.5)
    for module in routed.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    y = routed(**batch, task_ids=ids).logits
    torch.testing.assert_close(y, routed(**batch, task_ids=ids).logits)
    routed.train()
    noisy = torch.stack([routed(**batch, task_ids=ids).logits for _ in range(2)])
    assert not torch.allclose(noisy[0], noisy[1])
    with routed.disable_adapter():
        torch.testing.assert_close(routed(**batch).logits, routed(**batch).logits)


def test_modules_to_save_train_and_are_no_targets(ids, batch):
    routed = routed_model(modules_to_save=["classifier"], target_modules=["query", "classifier"])
    assert {layer.layer_name.rsplit(".", 1)[-1] for layer in routed.layers} == {"query"}
    routed(**batch, task_ids=ids).logits.sum().backward()
    assert routed.model.classifier.weight.grad is not None
    assert "trained as it is: classifier" in str(routed.report())


def test_the_report_says_what_there_is():
    text = str(routed_model(granularity="model", sampling="straight_through").report())
    assert "linlora: 11 routed layers" in text
    assert "2 x query            32 -> 32, rank 2, 3 skills in 4 heads, scaling 1" in text
    assert "1 x selector Poly(4 tasks, 3 skills in 4 heads, sampling=straight_through)" in text
    assert "backend: torch" in text
    assert "trainable parameters: 4,656 (skills 4,608, selectors 48)" in text


def test_it_has_the_attributes_and_the_signature_of_its_base():
    routed = routed_model("t5")
    assert routed.config.model_type == "t5"
    assert routed.device == routed.model.device
    names = list(inspect.signature(routed.forward).parameters)
    assert {"input_ids", "labels", "task_ids", "mixture"} <= set(names)
    copied = copy.deepcopy(routed)
    assert copied.forward.model is copied
    assert copied.layers[0].context is copied.context
    assert copied.layers[0].selector is copied.selectors[0]


def test_torch_models_and_flat_inputs():
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    routed = fill(routing.route(base, 3, n_heads=2, rank=2, target_modules=["0", "2"]))
    x, ids = torch.randn(7, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    y = routed(x, task_ids=ids)
    for task in range(3):
        torch.testing.assert_close(y[ids == task], routed(x[ids == task], task_ids=ids[ids == task]))
    assert routed(x[:0], task_ids=ids[:0]).shape == (0, 2)
    assert routed(x[:0], task_ids=[]).shape == (0, 2)
    assert routed(x[:1], task_ids=[1]).shape == (1, 2)


def test_a_layer_of_torch_transformers_calls_its_routed_layers_in_eval_mode():
    base = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).double()
    routed = fill(routing.route(base, 3, rank=2, target_modules="all-linear")).eval()
    assert [layer.layer_name for layer in routed.layers] == ["linear1", "linear2"]  # out_proj is never called
    x, ids = torch.randn(3, 5, 16, dtype=torch.float64), [0, 2, 1]
    y = routed(x, task_ids=ids)
    for row, task in enumerate(ids):
        torch.testing.assert_close(y[row : row + 1], task_alone(routed, task, src=x[row : row + 1])[None])
    with pytest.raises(TypeError, match=r"layer 'self_attn.out_proj' is a NonDynamicallyQuantizableLinear"):
        routing.route(nn.TransformerEncoderLayer(16, 2, 32), 3, target_modules=["out_proj"])


def test_layers_that_see_time_first_are_refused():
    config = LongformerConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        attention_window=4,
    )  # fmt: skip
    tokens = torch.randint(2, 64, (2, 8))
    routed = routing.route(LongformerModel(config), 3, n_skills=2, rank=2, target_modules=["query"])
    with pytest.raises(
        ValueError, match=r"query': the routing is of \(2,\) examples, which an input \(8, 2, 32\) does"
    ):
        routed(tokens, task_ids=[0, 2])
    routed = fill(routing.route(routed.unload(), 3, n_skills=2, rank=2, target_modules=["dense"])).eval()
    alone = [routed(tokens[row : row + 1], task_ids=[task])[0] for row, task in enumerate([0, 2])]
    torch.testing.assert_close(routed(tokens, task_ids=[0, 2])[0], torch.cat(alone))


def test_threads_run_batches_of_their_own(batch):
    routed = routed_model()
    every_ids = [torch.full((5,), task) for task in range(4)]
    with torch.no_grad():
        expected = [routed(**batch, task_ids=ids).logits for ids in every_ids]
    both_are_inside = threading.Barrier(2)

    def wait(*_):
        both_are_inside.wait(60)

    routed.layers[0].register_forward_pre_hook(wait)

    @torch.no_grad()
    def run(task):
        return routed(**batch, task_ids=every_ids[task]).logits

    with ThreadPoolExecutor(2) as pool:
        torch.testing.assert_close(list(pool.map(run, [1, 3])), [expected[1], expected[3]])


def test_it_compiles():
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    routed = fill(routing.route(base, 3, n_heads=2, rank=2, target_modules=["0", "2"]))
    x, ids = torch.randn(7, 5, 6), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    compiled = torch.compile(routed, backend="aot_eager")
    torch.testing.assert_close(compiled(x, task_ids=ids), routed(x, task_ids=ids), rtol=1e-4, atol=1e-5)


def test_linearizing_then_copying_gives_independent_models(ids, batch):
    routed = routed_model()
    linlora.linearize(routed, "model")
    copied = copy.deepcopy(routed)
    fill(copied, seed=5)
    assert not torch.allclose(copied(**batch, task_ids=ids).logits, routed(**batch, task_ids=ids).logits)


class TestRefusals:
    def test_heads_that_do_not_divide_name_the_layer(self):
        base = tiny_base("bert")
        with pytest.raises(
            ValueError, match=r"layer 'bert.encoder.layer.0.attention.self.query': n_heads = 5 does not"
        ):
            routing.route(base, 2, n_heads=5, target_modules=["query"])
        assert not any(isinstance(m, routing.routed_layer.RoutedLayer) for m in base.modules())

    def test_no_match_lists_the_candidates(self):
        with pytest.raises(
            ValueError, match=r"match no layer of BertForSequence.*classifier, dense, key, query, value"
        ):
            routing.route(tiny_base("bert"), 2, target_modules=["q_proj"])

    def test_layers_that_are_not_linear(self):
        with pytest.raises(TypeError, match=r"'bert.embeddings.word_embeddings' is a Embedding"):
            routing.route(tiny_base("bert"), 2, target_modules=["word_embeddings"])

    def test_models_with_adapters(self):
        with pytest.raises(TypeError, match=r"linlora.routing.convert"):
            routing.route(tiny_model("bert"), 2)
        with pytest.raises(TypeError, match="without adapters"):
            routing.route(routed_model(), 2, target_modules=["key"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"variant": "moe"}, "unknown variant 'moe': choose one of adamix, gate, mode, poly"),
            ({"granularity": "row"}, "unknown granularity 'row'"),
            ({"variant": "private", "n_skills": 3}, "'private' has 2 skills for 2 tasks, got n_skills=3"),
            ({"rank": 0}, "at least 1"),
            ({"sampling": "gumbel"}, "unknown sampling 'gumbel'"),
            ({"l2_norm": True, "shared_skill": True}, "l2_norm"),
            ({"dropout": 1.5}, "dropout is a probability below 1, got 1.5"),
            ({"modules_to_save": ["head"]}, "no module 'head'; it has bert, dropout, classifier"),
            ({"variant": "gate", "granularity": "block", "target_modules": ["dense"]}, "48 inputs and shares"),
        ],
        ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
    )
    def test_options_that_do_not_fit(self, options, message):
        with pytest.raises(ValueError, match=message):
            routing.route(tiny_base("bert"), 2, **{"target_modules": ["query"], **options})

    @pytest.mark.parametrize("variant", ["poly", "shared", "uniform", "adamix", "table", "gate", "mode"])
    def test_options_that_a_variant_does_not_have(self, variant):
        with pytest.raises(TypeError, match="temperature"):
            routing.route(tiny_base("bert"), 2, target_modules=["query"], variant=variant, temperature=2.0)

    def test_targets_are_asked_for_where_peft_has_none(self):
        with pytest.raises(ValueError, match=r"pass target_modules=\[...\] of: 0, 1"):
            routing.route(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 2)
        found = {layer.layer_name.rsplit(".", 1)[-1] for layer in routing.route(tiny_base("bert"), 2).layers}
        assert found == {"query", "value"}  # PEFT's own for BERT

    @pytest.mark.parametrize(
        ("task_ids", "message"),
        [
            (None, r"task_ids are missing: .*the ids of the 4 tasks are 0 to 3"),
            ([0, 1], "got 2 of them for a batch of 5 examples"),
            ([0, 1, 4, 0, 0], "task id 4 is unknown: the ids of 4 tasks are 0 to 3"),
            ([0, 1, -1, 0, 0], "task id -1 is unknown"),
            ([0.0] * 5, "integers .* are expected"),
        ],
        ids=["missing", "length", "unknown", "negative", "floats"],
    )
    def test_task_ids_that_do_not_fit(self, task_ids, message, batch):
        with pytest.raises(ValueError, match=message):
            routed_model()(**batch, task_ids=task_ids)

    def test_too_few_task_ids_for_inputs_given_by_name(self):
        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(6, 6)

            def forward(self, features):
                return self.linear(features)

        routed = routing.route(Network(), 3, rank=2, target_modules=["linear"])
        with pytest.raises(ValueError, match="got 2 of them for a batch of 4 examples"):
            routed(features=torch.randn(4, 6), task_ids=[0, 1])

    def test_data_parallel(self):
        with pytest.raises(RuntimeError, match=r"one process a device \(torchrun"):
            routed_model()._replicate_for_data_parallel()  # what nn.DataParallel does first

    def test_calling_the_inner_model_says_what_to_call(self, batch):
        with pytest.raises(RuntimeError, match=r"layer 'bert.*': no batch is being routed. Call the routed model"):
            routed_model().model(**batch)

    def test_an_error_in_the_batch_leaves_no_routing_behind(self, batch, ids):
        routed = routed_model()
        with pytest.raises(IndexError):
            routed(input_ids=batch["input_ids"] + 1000, task_ids=ids)
        assert routed.context.routing is None

    def test_ids_and_weights_at_once(self, batch, ids):
        with pytest.raises(ValueError, match="both given"):
            routed_model()(**batch, task_ids=ids, mixture=torch.ones(5, 4, 3))


def test_every_variant_trains(batch, ids):
    for variant, granularity in itertools.product(routing.variants.VARIANTS, ("layer", "model")):
        if variant == "gate" and granularity == "model":
            continue
        heads = 1 if variant == "private" else 4
        skills = 4 if variant == "private" else 3
        routed = routed_model(variant=variant, granularity=granularity, n_heads=heads, n_skills=skills).train()
        routed(**batch, task_ids=ids).logits.sin().sum().backward()
        without = [n for n, p in routed.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, (variant, without)
