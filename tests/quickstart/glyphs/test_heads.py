"""Zero-shot heads, and adapters on the network up to its features."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cosine_similarity, normalize

import linlora
from linlora.baselines import FunctorchModel
from linlora.quickstart.glyphs import head, network, tasks
from linlora.quickstart.glyphs.heads import means_in_print
from linlora.testing import randomize


@pytest.fixture(scope="module")
def task():
    return tasks(["georgian"])[0]


def test_scores_are_scaled_cosines_to_the_centred_means_of_print(task):
    means = means_in_print(task.classes)
    with torch.no_grad():
        features = network()(task.test.images[:5])
    expected = [16 * cosine_similarity(features, (mean - means.mean(0))[None], dim=1) for mean in means]
    torch.testing.assert_close(head(task)(features), torch.stack(expected, dim=1))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))


@torch.no_grad()
def test_a_head_from_print_is_far_better_than_chance_and_leaves_much_to_learn(task):
    scores = head(task)(network()(task.test.images))
    assert 0.25 < (scores.argmax(1) == task.test.labels).double().mean() < 0.6


def test_all_linear_layers_of_the_encoder_are_adapted():
    model = get_peft_model(network(), LoraConfig(r=2, target_modules="all-linear"))
    layers = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(layers) == 4 * 6
    assert all(".encoder." in name for name in layers)


@pytest.fixture
def images(double, task):
    return task.test.images[:4].double()


def adapted(module):
    torch.manual_seed(0)
    return get_peft_model(module, LoraConfig(r=2, target_modules="all-linear")).double().eval()


def test_model_scope_of_the_network_is_linear_up_to_the_features(images):
    ours, functorch = adapted(network()), FunctorchModel(adapted(network()))
    linlora.linearize(ours, scope="model")
    for model in (ours, functorch):
        randomize(model, 1, ("lora_B",))
    features = ours(images)
    torch.testing.assert_close(features, functorch(pixel_values=images), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(features.norm(dim=1), torch.ones(4).double(), atol=0.1)  # linear: off the sphere


def test_model_scope_of_the_encoder_is_linear_up_to_the_tokens(images):
    whole = network().double()
    functorch = FunctorchModel(adapted(copy.deepcopy(whole.encoder)))
    whole.encoder = adapted(whole.encoder)
    linlora.linearize(whole.encoder, scope="model")
    for model in (whole.encoder, functorch):
        randomize(model, 1, ("lora_B",))
    pooled = normalize(functorch(pixel_values=images).mean(1), dim=1)
    torch.testing.assert_close(whole(images), pooled, rtol=1e-10, atol=1e-10)
