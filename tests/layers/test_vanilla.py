"""The rule of what vanilla LoRA is: every field of PEFT's configuration is classified, and every door asks."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file

import linlora
from linlora import TaskVector, formats
from linlora.formats.export import export_stored
from linlora.layers import vanilla
from linlora.layers.finding import UnsupportedLayerError
from linlora.merging import merge_files
from linlora.testing import tiny_base, tiny_model

FIELDS = [field.name for field in dataclasses.fields(LoraConfig)]
REFUSED = {
    "use_dora": True,
    "velora_config": dataclasses.asdict(VeloraConfig()),
    "alora_invocation_tokens": [5, 6],
    "use_qalora": True,
    "monteclora_config": {},
    "use_bdlora": {},
    "arrow_config": {},
    "kasa_config": {},
    "lora_bias": True,
    "target_parameters": ["experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "enable_lora": [True, False],
    "of_tomorrow": 4,
}
INIT = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "of_tomorrow", 4]


@dataclasses.dataclass
class ConfigOfTomorrow(LoraConfig):
    of_tomorrow: bool = True


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, a PEFT adapter, linlora's export of a linearized one and an L-LoRA checkpoint."""
    root = tmp_path_factory.mktemp("vanilla")
    tiny_base("bert").save_pretrained(root / "base")
    model = tiny_model("bert", trained=True, target_modules=["query"])
    model.save_pretrained(root / "PEFT")
    start = load_file(root / "PEFT" / "adapter_model.safetensors")
    linlora.linearize(model)
    linlora.export(model, root / "export")
    layer = "base_model.model.bert.encoder.layer.0.attention.self.query"
    A, B = (start[f"{layer}.lora_{kind}.weight"] for kind in "AB")
    tensors = {f"{layer}.model.lora_A.default.weight": A, f"{layer}.model.lora_B.default.weight": B}
    tensors |= {f"{layer}.params0_values.2": A.clone(), f"{layer}.params0_values.3": torch.zeros_like(B)}
    (root / "L-LoRA").mkdir()
    save_file(tensors, root / "L-LoRA" / "linearized_adapter_model.safetensors")
    config = (root / "PEFT" / "adapter_config.json").read_text()
    (root / "L-LoRA" / "adapter_config.json").write_text(config)
    return root


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_peft_s_configuration_is_in_one_table(name):
    tables = (vanilla.FOLLOWED, vanilla.INERT, vanilla.REFUSED)
    assert sum(name in table for table in tables) == 1, f"{name} is new: say what it does to the function of A and B"


def test_every_field_that_is_refused_is_tried_here():
    assert vanilla.REFUSED.keys() | {"of_tomorrow"} == REFUSED.keys()


def changed(folder, **options):
    file = folder / "adapter_config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), **options}))
    return file, before


DOORS = {
    "read": lambda root, adapter, out: formats.read(adapter),
    "open": lambda root, adapter, out: formats.open(adapter),
    "merge": lambda root, adapter, out: merge_files(root / "base", [adapter], out),
    "export": lambda root, adapter, out: export_stored(formats.open(adapter), out),
    "export with it as the base": lambda root, adapter, out: export_stored(
        dataclasses.replace(formats.open(root / "vector.safetensors"), path=out), out, adapter
    ),
    "start": lambda root, adapter, out: formats.read(root / "plain", point=adapter),
}


@pytest.mark.parametrize("kind", ["PEFT", "export", "L-LoRA"])
@pytest.mark.parametrize("name", [*REFUSED, *INIT], ids=str)
def test_no_door_takes_an_adapter_in_files_that_is_more(folders, kind, name, tmp_path):
    adapter = folders / kind
    if not (folders / "plain").exists():
        tiny_model("bert", trained=True, target_modules=["query"]).save_pretrained(folders / "plain")
        formats.read(folders / "plain").save(folders / "vector.safetensors")
    options = {name: REFUSED[name]} if name in REFUSED else {}
    options = {"init_lora_weights": name} if name in INIT and not options else options
    file, before = changed(adapter, **options)
    try:
        for door in DOORS.values():
            with pytest.raises(ValueError, match=next(iter(options))):
                door(folders, adapter, tmp_path / "out")
    finally:
        file.write_text(before)
    assert not (tmp_path / "out").exists()
    assert formats.read(adapter).scalings


ARROW = ArrowConfig()
ARROW.task_adapter_names, ARROW.gks_adapter_names = [], []  # which create_arrow_model sets
IN_MEMORY = {
    "dora": {"use_dora": True},
    "velora": {"velora_config": VeloraConfig()},
    "alora": {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "bdlora": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
    "arrow": {"arrow_config": ARROW},
    "kasa": {"kasa_config": KasaConfig()},
    "lora_bias": {"lora_bias": True},
}


@pytest.mark.parametrize("variant", [*IN_MEMORY, "of tomorrow"])
def test_no_door_takes_an_adapter_in_memory_that_is_more(variant):
    def adapted():
        kind = ConfigOfTomorrow if variant == "of tomorrow" else LoraConfig
        options = {"of_tomorrow": False} if variant == "of tomorrow" else IN_MEMORY[variant]
        return get_peft_model(tiny_base("llama"), kind(r=4, target_modules=["q_proj"], **options))

    model = adapted()
    before = {name: type(module) for name, module in model.named_modules()}
    for door in (linlora.linearize, linlora.accelerate, linlora.merge):
        with pytest.raises(UnsupportedLayerError):
            door(model)
    with pytest.raises(ValueError, match="has no task vector"):
        TaskVector.from_model(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("key", ["lora_diag", "lora_of_tomorrow.weight", "lora_B.bias", "lora_magnitude_vector"])
def test_tensors_that_are_no_factors_are_refused(folders, tmp_path, key):
    tensors = load_file(folders / "PEFT" / "adapter_model.safetensors")
    layer = next(iter(tensors)).rpartition(".lora_")[0]
    save_file({**tensors, f"{layer}.{key}": torch.ones(4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((folders / "PEFT" / "adapter_config.json").read_text())
    with pytest.raises(linlora.CorruptFileError, match=f"{key}' is of "):
        formats.read(tmp_path)


def test_fields_at_their_defaults_and_inert_ones_are_taken(folders):
    inert = {"layers_pattern": "layer", "revision": "main", "eva_config": {"rho": 2.0}, "lora_dropout": 0.5}
    file, before = changed(folders / "PEFT", of_tomorrow=None, of_next_week={}, **inert)
    assert formats.read(folders / "PEFT").scalings
    file.write_text(before)
    assert isinstance(PeftModel.from_pretrained(tiny_base("bert"), folders / "PEFT"), PeftModel)
