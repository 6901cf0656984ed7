"""Zero-shot heads, and adapters on the classifier as a whole."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cosine_similarity

import linlora
from linlora.baselines import FunctorchModel
from linlora.quickstart.glyphs import Head, classifier, tasks
from linlora.testing import randomize


@pytest.fixture(scope="module")
def task():
    return tasks(["georgian"])[0]


def test_scores_are_scaled_cosines_to_the_centred_means():
    torch.manual_seed(0)
    tokens, means = torch.randn(5, 17, 128, dtype=torch.float64), torch.randn(3, 128, dtype=torch.float64)
    centred = tokens.mean(1) - means.mean(0)
    expected = [16 * cosine_similarity(centred, (mean - means.mean(0))[None], dim=1) for mean in means]
    torch.testing.assert_close(Head(means)(tokens), torch.stack(expected, dim=1))


@torch.no_grad()
def test_a_head_from_print_is_far_better_than_chance_and_leaves_much_to_learn(task):
    model, test = classifier(task), task.test
    assert 0.25 < (model(test.images).argmax(1) == test.labels).double().mean() < 0.6


def test_all_linear_layers_of_the_encoder_are_adapted_and_nothing_of_the_head(task):
    model = get_peft_model(classifier(task), LoraConfig(r=2, target_modules="all-linear"))
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 4 * 6
    assert all(".encoder." in name for name in adapted)


@pytest.fixture
def images(double, task):
    return task.test.images[:4].double()


def adapted(module):
    torch.manual_seed(0)
    return get_peft_model(module, LoraConfig(r=2, target_modules="all-linear")).double().eval()


def test_model_scope_of_a_classifier_is_linear_up_to_the_scores(task, images):
    ours, functorch = adapted(classifier(task)), FunctorchModel(adapted(classifier(task)))
    linlora.linearize(ours, scope="model")
    for model in (ours, functorch):
        randomize(model, 1, ("lora_B",))
    scores = ours(images)
    torch.testing.assert_close(scores, functorch(pixel_values=images), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(scores, adapted(classifier(task))(images), atol=0.1)  # the adapter has moved them


def test_model_scope_of_the_encoder_is_linear_up_to_the_tokens(task, images):
    whole = classifier(task).double()
    functorch = FunctorchModel(adapted(copy.deepcopy(whole.encoder)))
    whole.encoder = adapted(whole.encoder)
    linlora.linearize(whole.encoder, scope="model")
    for model in (whole.encoder, functorch):
        randomize(model, 1, ("lora_B",))
    torch.testing.assert_close(whole(images), whole.head(functorch(pixel_values=images)), rtol=1e-10, atol=1e-10)


def test_an_adapter_of_one_task_is_applied_to_the_classifier_of_another(task):
    first, second = adapted(classifier(task)).float(), adapted(classifier(tasks(["lao"])[0])).float()
    for model in (first, second):
        linlora.linearize(model, scope="model")
    randomize(first, 1, ("lora_B",))
    linlora.apply(second, linlora.TaskVector.from_model(first))
    second.base_model.model.head = first.base_model.model.head
    torch.testing.assert_close(second(task.test.images[:3]), first(task.test.images[:3]))
