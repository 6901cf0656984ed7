"""Tiny checkpoints and data sets on disk, in the formats real ones have."""

import csv

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from linlora.testing import tiny_base
from linlora.training import Data, Settings

logging.set_verbosity_error()

WORDS = [
    "good", "bad", "fine", "poor", "film", "food", "day", "red", "blue", "is", "it", "not", "the", "a", "photo", "of",
    "yes", "no", "0", "1", "2", ".", "?",
]  # fmt: skip
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
CPU = {"use_cpu": not torch.cuda.is_available()}
FAST = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_steps": 4, "eval_strategy": "no", **CPU}


def save_tokenizer(folder, template):
    """A tokenizer of whole words; `template` places the special tokens: "<s> $A </s>"."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B </s>", special_tokens=[(name, i) for i, name in enumerate(SPECIAL)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of a BERT, T5, Llama, ViT and CLIP, with a tokenizer or an image processor each."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, base, template in (
        ("bert", tiny_base("bert"), "<s> $A </s>"),
        ("t5", tiny_base("flan_t5", eos_token_id=1), "$A </s>"),
        ("llama", tiny_base("llama", eos_token_id=1), "$A"),
        ("clip", tiny_clip(), "<s> $A </s>"),
    ):
        base.save_pretrained(root / name)
        save_tokenizer(root / name, template)
    encoder = tiny_base("bert").bert
    encoder.save_pretrained(root / "encoder")  # no head
    save_tokenizer(root / "encoder", "<s> $A </s>")
    tiny_vit().save_pretrained(root / "vit")
    size = {"height": 8, "width": 8}
    transformers.ViTImageProcessor(size=size).save_pretrained(root / "vit")
    transformers.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(root / "clip")
    return {folder.name: str(folder) for folder in root.iterdir()}


def tiny_vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    )


def tiny_clip():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes["projection_dim"] = 16
    text = {**sizes, "vocab_size": 64, "bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def reviews(rows=48, seed=0):
    """Sentences with their sentiment, in several columns that tests choose from."""
    rng = np.random.default_rng(seed)
    for _ in range(rows):
        positive = int(rng.integers(2))
        mood = rng.choice([["bad", "poor"], ["good", "fine"]][positive])
        thing = rng.choice(["film", "food", "day"])
        yield {
            "text": f"the {thing} is {mood}", "thing": str(thing), "label": positive, "word": ["no", "yes"][positive],
            "score": float(positive + rng.integers(2)),
        }  # fmt: skip


def write_csv(path, rows):
    rows = list(rows)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture(scope="session")
def review_files(tmp_path_factory):
    """A folder with train.csv, validation.csv and test.csv."""
    root = tmp_path_factory.mktemp("reviews")
    for seed, split in enumerate(("train", "validation", "test")):
        write_csv(root / f"{split}.csv", reviews(48 if split == "train" else 16, seed))
    return str(root)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """train/red/0.png, train/blue/0.png, ...: the classes are the folders."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for channel, colour in enumerate(("red", "blue")):
            folder = root / split / colour
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (10, 12, 3), dtype=np.uint8)
                pixels[..., 2 * channel] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(root)


@pytest.fixture
def settings(checkpoints, review_files, image_folder, tmp_path):
    """Settings of a kind of task, on a tiny checkpoint and data set, with changes."""

    def make(kind="text", **changes):
        table = Data(review_files, test="test", text=("text",))
        images = Data(image_folder, validation=0.25, test="test", image="image")
        bert = {"r": 4, "target_modules": ["query", "value"]}
        choices = {
            "text": ("bert", "classification", table, bert, {}),
            "image": ("vit", "classification", images, {"r": 4, "target_modules": "all-linear"}, {}),
            "seq2seq": ("t5", "text-to-text", table, {"r": 4, "target_modules": ["q", "v"]},
                        {"prompt": "{text} ?", "answers": ("no", "yes"), "max_new_tokens": 3}),
            "causal": ("llama", "text-to-text", table, {"r": 4, "target_modules": ["q_proj", "v_proj"]},
                       {"prompt": "{text} ?", "answers": ("no", "yes"), "max_new_tokens": 3}),
            "zero-shot": ("clip", "zero-shot", images, {"r": 4, "target_modules": ["q_proj", "v_proj"]},
                          {"templates": ("a photo of {}", "the {} photo")}),
        }  # fmt: skip
        checkpoint, task_kind, data, lora, more = choices[kind]
        common = {"out": str(tmp_path / kind), "name": kind, "lora": lora, "training": FAST}
        return Settings(checkpoints[checkpoint], task_kind, data, **common, **more).changed(**changes)

    return make
