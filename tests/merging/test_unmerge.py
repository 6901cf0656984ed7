"""PEFT's merge_adapter, unmerge_adapter and merge_and_unload on converted layers."""

import warnings

import pytest
import torch
from peft import LoraConfig

import linlora
from linlora.testing import randomize, tiny_base, tiny_batch, tiny_model


def model(architecture="bert", trained=True, dtype=torch.float32):
    made = tiny_model(architecture, trained)
    made.get_base_model().to(dtype)
    linlora.linearize(made)
    randomize(made, 5, ("lora_dA", "lora_dB") if trained else ("lora_B",), scale=0.02)
    return made


def base_bits(made):
    weights = {n: p for n, p in made.state_dict().items() if "lora_" not in n}
    return {name: weight.contiguous().view(-1).view(torch.uint8).clone() for name, weight in weights.items()}


def logits(made, architecture="bert"):
    return made(**tiny_batch(architecture))[0].detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_unmerging_restores_every_bit_of_the_base_weights(architecture, trained, dtype):
    made = model(architecture, trained, dtype)
    before, expected = base_bits(made), logits(made, architecture)
    for _ in range(3):
        made.merge_adapter()
        assert any(not torch.equal(b, before[n]) for n, b in base_bits(made).items())
        error = (logits(made, architecture) - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)
        made.unmerge_adapter()
        assert all(torch.equal(b, before[n]) for n, b in base_bits(made).items())
    assert torch.equal(logits(made, architecture), expected)


def test_adapters_merged_together_and_one_after_the_other_unmerge_exactly():
    made = tiny_model("bert", trained=True)
    made.add_adapter("second", LoraConfig(r=3, target_modules=["query"]))
    randomize(made, 2)
    linlora.linearize(made)
    before = base_bits(made)
    made.merge_adapter(["default", "second"])
    made.unmerge_adapter()
    assert all(torch.equal(b, before[n]) for n, b in base_bits(made).items())
    made.merge_adapter(["default"])
    made.merge_adapter(["second"])
    made.unmerge_adapter()
    assert all(torch.equal(b, before[n]) for n, b in base_bits(made).items())


def test_an_adapter_trained_while_it_is_merged_does_not_disturb_unmerging():
    made = model()
    before = base_bits(made)
    made.merge_adapter()
    randomize(made, 9, ("lora_dA", "lora_dB"))
    made.unmerge_adapter()
    assert all(torch.equal(b, before[n]) for n, b in base_bits(made).items())


def test_a_base_changed_while_merged_is_an_error_that_names_the_layer():
    made = model()
    made.merge_adapter()
    made.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query").weight.data.mul_(2.0)
    with pytest.raises(ValueError, match=r"layer 'bert.encoder.layer.0.attention.self.query': the weight was changed"):
        made.unmerge_adapter()


def test_safe_merge_leaves_the_weight_as_it_was_where_the_sum_overflows():
    made = model(dtype=torch.float16)
    layer = made.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    layer.lora_dB["default"].data.fill_(6e4)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=r"merging \['default'\] gives NaN or infinity; the weight is unchanged"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before)
    assert not layer.merged_adapters


def test_unmerging_what_is_not_merged_warns_as_peft_does():
    with pytest.warns(UserWarning, match="Already unmerged"):
        model().unmerge_adapter()


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_is_peft_s_and_warns_of_nothing(safe):
    made = model()
    expected = logits(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = made.merge_and_unload(safe_merge=safe)
    assert plain.state_dict().keys() == tiny_base("bert").state_dict().keys()
    torch.testing.assert_close(plain(**tiny_batch("bert")).logits, expected, rtol=1e-4, atol=1e-5)


def test_unload_gives_the_base_back():
    made = model()
    plain = made.unload()
    torch.testing.assert_close(logits(plain), logits(tiny_base("bert")), rtol=0, atol=0)


def test_model_scope_is_refused_with_the_remedy():
    made = tiny_model("bert")
    linlora.linearize(made, scope="model")
    with pytest.raises(ValueError, match=r"does not fold into weights.*linlora.set_scope\(model, 'layer'\)"):
        made.merge_adapter()
