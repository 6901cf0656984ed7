"""Weights that several modules share: whoever merges gives the adapter's function, or refuses and changes nothing."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import linlora
from linlora.layers.sharing import refuse_shared, shared_names
from linlora.merging import merge_files
from linlora.testing import randomize, relative_error, tiny_base

INPUT = torch.arange(8)[None]


def tied():
    return tiny_base("llama", tie_word_embeddings=True)


def logits(model):
    return model.eval()(input_ids=INPUT).logits.detach()


def adapted(base, **options):
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, **{"target_modules": ["q_proj"], **options}))
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) * ("modules_to_save" in name)
    return model


def refused_unchanged(model, message):
    before, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        linlora.merge(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)
    assert not any(type(module).__module__.startswith("linlora") for module in model.modules())


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]], ids=str)
def test_a_tied_head_is_not_merged(targets):
    refused_unchanged(adapted(tied(), target_modules=targets), "'lm_head' shares its weight with 'model.embed_tokens'")


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("make", [linlora.accelerate, linlora.linearize])
def test_nor_by_peft_on_converted_layers(make, merge):
    model = adapted(tied(), target_modules=["q_proj", "lm_head"])
    make(model)
    before = logits(model)
    with pytest.raises(ValueError, match=f"{merge}: layer 'lm_head' shares its weight with 'model.embed_tokens'"):
        getattr(model, merge)()
    assert torch.equal(logits(model), before)
    assert "merge_adapter" not in vars(linlora.delinearize(model).base_model)


def test_repeated_layers_are_not_merged():
    model = adapted(tiny_base("llama"), layer_replication=[[0, 2], [1, 2]])
    refused_unchanged(model, r"layers\.1\.self_attn\.q_proj' shares its weight with 'model\.layers\.2")


class Twice(nn.Module):
    """One layer under two names: by itself, or with the module around it."""

    def __init__(self, whole):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8))
        self.second = self.first if whole else nn.Sequential(self.first[0])

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_a_layer_under_two_names_is_merged_where_the_adapter_is_of_both(monkeypatch):
    x = torch.randn(3, 8)
    model = get_peft_model(Twice(whole=True), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    expected = model(x)
    torch.testing.assert_close(linlora.merge(model)(x), expected)
    model = get_peft_model(Twice(whole=False), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    before = model(x)
    with pytest.raises(ValueError, match=r"'first\.0' shares its weight with 'second\.0'"):
        linlora.merge(model)
    assert torch.equal(model(x), before)


def test_views_of_one_memory_share_it_and_neighbours_in_it_do_not():
    memory = torch.randn(6, 4)
    model = nn.ModuleDict({name: nn.Linear(4, 3, bias=False) for name in "abc"})
    for name, rows in (("a", slice(0, 3)), ("b", slice(3, 6)), ("c", slice(2, 5))):
        model[name].weight = nn.Parameter(memory[rows])
    assert shared_names(model) == [["a.weight", "b.weight", "c.weight"]]
    del model["c"]
    assert shared_names(model) == []
    refuse_shared(model, ["a", "b"], "merge", "")


@pytest.mark.parametrize("tying", [False, True])
def test_a_trained_embedding_of_a_tied_model(tmp_path, tying):
    """In memory the output embedding keeps its weight, or trains with it; from file to file too, or it is refused."""
    model = adapted(tied(), modules_to_save=["embed_tokens"], ensure_weight_tying=tying)
    tied().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "a")
    expected = logits(model)
    if tying:
        merge_files(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert relative_error(logits(merged), expected) < 1e-5
    else:
        with pytest.raises(
            ValueError, match=r"'model\.embed_tokens\.weight' is changed by .*tied to 'lm_head\.weight'"
        ):
            merge_files(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
        assert not (tmp_path / "out").exists()
    linlora.merge(model).save_pretrained(tmp_path / "memory")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    assert relative_error(logits(again), expected) < 1e-5


def test_an_embedding_of_a_model_that_transformers_does_not_know(tmp_path):
    model = adapted(tied(), modules_to_save=["embed_tokens"])
    base = tied()
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "a")
    config = tmp_path / "base" / "config.json"
    config.write_text('{"model_type": "of_tomorrow"}')
    with pytest.raises(ValueError, match="tied to 'the output embedding'"):
        merge_files(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    config.write_text('{"model_type": "of_tomorrow", "tie_word_embeddings": false}')
    assert merge_files(tmp_path / "base", [tmp_path / "a"], tmp_path / "out").replaced == 1


def test_heads_that_were_saved_but_not_trained_are_no_heads(tmp_path):
    tiny_base("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        model = get_peft_model(
            tiny_base("llama"), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        )
        randomize(model, seed)
        model.to(torch.bfloat16).save_pretrained(tmp_path / f"a{seed}")
    merged = merge_files(tmp_path / "base", [tmp_path / "a1", tmp_path / "a2"], tmp_path / "out")
    assert merged.replaced == 0
