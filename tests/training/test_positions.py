"""How many tokens models take, and what is said of texts that are longer."""

from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from linlora.testing import tiny_base
from linlora.training import Data, load_task
from linlora.training.positions import positions

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 50,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    ("auto", "config", "tokens"),
    [
        (AutoModelForSequenceClassification, transformers.BertConfig(**TINY, max_position_embeddings=40), 40),
        (AutoModelForSequenceClassification, transformers.RobertaConfig(**TINY, max_position_embeddings=42), 40),
        (AutoModelForCausalLM, transformers.GPT2Config(n_positions=40, n_embd=16, n_layer=1, n_head=2), 40),
        (
            AutoModelForCausalLM,
            transformers.GPTJConfig(n_positions=40, n_embd=16, n_layer=1, n_head=2, rotary_dim=8),
            40,
        ),
        (AutoModelForSeq2SeqLM, transformers.BartConfig(**SEQ2SEQ), 40),
        (AutoModelForSeq2SeqLM, transformers.MarianConfig(**SEQ2SEQ, pad_token_id=1), 40),
        (AutoModelForCausalLM, transformers.LlamaConfig(**TINY, max_position_embeddings=40), None),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_say_how_many_tokens_they_take(settings, auto, config, tokens):
    assert positions(settings("text"), auto, config) == {"encoder": tokens, "decoder": tokens}
    if tokens is None or config.is_encoder_decoder:
        return
    model = auto.from_config(config).eval()
    model.config.pad_token_id = 1
    with torch.no_grad():
        model(input_ids=torch.full((1, tokens), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, tokens + 1), 5))


@pytest.fixture
def gpt2(checkpoints, tmp_path):
    """A causal model of 32 positions."""
    tiny_base("gpt2").save_pretrained(tmp_path / "gpt2")
    transformers.AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


def check(settings, **changes):
    task = load_task(settings("causal", **changes))
    task.check("train")
    return task.notes["train"]


def test_prompts_without_room_for_an_answer_are_refused_in_one_sentence(settings, gpt2):
    long = {"model": gpt2, "prompt": "{text} " + "good " * 40}
    with pytest.raises(
        ValueError, match=r"32 positions, too few for a prompt of 44 .* an answer of 3; .*max_length: 29"
    ):
        check(settings, **long)
    with pytest.raises(
        ValueError, match=r"32 positions, too few for an answer of 32 tokens; .*max_new_tokens \(32 now\)"
    ):
        check(settings, model=gpt2, max_new_tokens=32)
    assert check(settings, **long, max_length=29) == [
        "48 of 48 prompts are longer than 29 tokens (max_length), and cut"
    ]
    assert check(settings, model=gpt2) == []


def test_answers_that_no_model_writes_whole_are_told(settings, review_files):
    data = Data(review_files, label="text")
    notes = check(settings, data=data, prompt="{thing}", answers=())
    assert notes == ["48 of 48 answers are longer than 3 tokens (max_new_tokens), which is all a model writes"]


def test_an_answer_that_is_given_is_told(settings):
    said = ["column 'word' is the answer, and given to the model too"]
    data = replace(settings("causal").data, label="word")
    assert check(settings, data=data, prompt="{text} {word}", answers=("no", "yes")) == said
    assert check(settings, data=data, prompt="{text}", answers=("no", "yes")) == []


def test_texts_are_cut_where_the_model_has_no_more_positions(settings, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(settings("text").model)
    size = model.config.max_position_embeddings
    (tmp_path / "rows.csv").write_text(f"text,label\n{'good ' * size},1\nbad,0\n")
    task = load_task(settings("text", data=replace(settings("text").data, train=str(tmp_path / "rows.csv"))))
    task.check("train")
    assert task.notes["train"] == [f"1 of 2 texts are longer than {size} tokens and cut"]
    assert task.logits(model, task.inputs(list(task.rows("train")))).shape == (2, model.config.num_labels)


def test_prompts_of_columns_without_text_are_refused(settings, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "", "label": 1}\n{"text": "", "label": 0}\n')
    with pytest.raises(ValueError, match=r"the train split, .*: 1 prompts are without a token"):
        check(settings, data=Data(train=str(path), validation=1), prompt="{text}")
    with pytest.raises(ValueError, match=r"prompt '\{text:\.2f\}' does not fit a row: Unknown format code 'f'"):
        check(settings, data=Data(train=str(path), validation=1), prompt="{text:.2f}")
