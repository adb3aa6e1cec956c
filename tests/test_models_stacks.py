"""The memory stacks and their files: published layouts load, saved ones load again, what does not fit is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, VOCABULARY, some_ids, tiny_base, tiny_memory
from transformers import AutoConfig, AutoModelForCausalLM

from models import GPT2MLPModel, LlamaMLPModel, MistralMLPModel, load_memory, memory_class, memory_config
from models.stack import load_base

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ["gpt2", "llama", "mistral"]
pytestmark = pytest.mark.unit
CLASSES = {"gpt2": GPT2MLPModel, "llama": LlamaMLPModel, "mistral": MistralMLPModel}


def same_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def golden_copy(family, folder):
    shutil.copytree(GOLDEN / family / "memory", folder)
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def llama(tmp_path):
    return golden_copy("llama", tmp_path / "memory")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_memory_has_the_published_layout_and_its_own_head(family, tmp_path):
    base = tiny_base(family, tie_word_embeddings=True)
    memory = tiny_memory(base, layers=3)
    assert type(memory) is CLASSES[family]
    assert memory.state_dict().keys() == weights(GOLDEN / family / "memory").keys()
    base.save_pretrained(tmp_path / "base")
    memory.save_pretrained(tmp_path / "memory")
    loaded = load_memory(tmp_path / "memory")
    assert same_weights(memory, loaded) and not loaded.training
    assert not torch.equal(loaded.lm_head.weight, base.get_output_embeddings().weight)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "memory"))
    count = "n_layer" if family == "gpt2" else "num_hidden_layers"
    assert {name for name in before | after if before.get(name) != after.get(name)} == {count, "architectures"}
    assert (after[count], after["architectures"]) == (3, [CLASSES[family].__name__])


def test_a_memory_for_wider_hidden_states_has_a_transform(tmp_path):
    memory = LlamaMLPModel(memory_config(tiny_base("llama").config, 2), input_dim=48, output_dim=HIDDEN)
    assert memory.embedding_transform.weight.shape == (HIDDEN, 48)
    assert memory(torch.randn(2, 5, 48)).logits.shape == (2, 5, VOCABULARY)
    memory.save_pretrained(tmp_path)
    loaded = load_memory(tmp_path)
    assert loaded.input_dim == 48 and same_weights(memory, loaded)


def test_dtype_is_the_one_asked_for_or_the_stored_one(llama):
    assert load_memory(llama).dtype == torch.float32
    tiny_memory(tiny_base("llama")).half().save_pretrained(llama)
    assert load_memory(llama).dtype == torch.float32
    assert load_memory(llama, dtype=None).dtype == LlamaMLPModel.from_pretrained(llama).dtype == torch.float16


def test_a_class_loads_with_a_config_as_in_the_originals_demo(llama):
    config = AutoConfig.from_pretrained(llama)
    sizes = {"input_dim": config.hidden_size, "output_dim": config.hidden_size}  # as in the original's demo
    memory = LlamaMLPModel.from_pretrained(str(llama), config=config, **sizes)
    assert same_weights(memory, load_memory(llama))
    with pytest.raises(ValueError, match="GPT2MLPModel"):
        GPT2MLPModel.from_pretrained(llama)


def test_sharded_safetensors_and_bins_load(llama, tmp_path):
    memory, state = load_memory(llama), weights(llama)
    memory.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    assert same_weights(memory, load_memory(tmp_path / "sharded"))
    (llama / "model.safetensors").unlink()
    torch.save(state, llama / "pytorch_model.bin")
    assert same_weights(memory, load_memory(llama))
    (llama / "pytorch_model.bin").unlink()
    names = sorted(state)
    halves = {"one.bin": names[:5], "two.bin": names[5:]}
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, llama / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same_weights(memory, load_memory(llama))


class Touch:
    """Unpickling it creates a file, as a hostile checkpoint would."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_bin_with_code_is_refused_and_runs_nothing(llama, tmp_path):
    trace = tmp_path / "trace"
    torch.save(weights(llama) | {"extra": Touch(trace)}, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=str(llama)):
        load_memory(llama)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_weight_file_is_refused(llama, name):
    if name.endswith(".bin"):
        torch.save(weights(llama), llama / name)
        (llama / "model.safetensors").unlink()
    content = (llama / name).read_bytes()
    (llama / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=str(llama)):
        load_memory(llama)


def test_the_memory_is_taken_from_the_originals_joint_state(tmp_path):
    folder = golden_copy("llama", tmp_path / "epoch_3" / "knn_generator")
    expected, alone = load_memory(folder), weights(folder)
    joint = {f"base_lm.{name}": value for name, value in weights(GOLDEN / "llama" / "base").items()}
    joint |= {f"knn_generator.{name}": value for name, value in alone.items()}
    save_file(joint, folder / "model.safetensors")
    assert same_weights(expected, load_memory(folder))
    torch.save(alone, folder / "pytorch_model.bin")  # which lies beside it
    assert same_weights(expected, load_memory(tmp_path / "epoch_3"))


@pytest.mark.parametrize("inner", ["", "knn_generator"])
def test_a_single_checkpoint_below_is_taken_and_several_are_named(tmp_path, inner):
    golden_copy("llama", tmp_path / "epoch_0" / inner)
    (tmp_path / "logs").mkdir()
    assert same_weights(load_memory(GOLDEN / "llama" / "memory"), load_memory(tmp_path))
    for epoch in (2, 10):
        golden_copy("llama", tmp_path / f"epoch_{epoch}" / inner)
    with pytest.raises(ValueError, match=r"epoch_0.*epoch_2.*epoch_10"):
        load_memory(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 2},
        {"vocab_size": 98},
        {"model_type": "none"},
        {"model_type": "opt"},
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(llama, changes):
    edit_config(llama, **changes)
    with pytest.raises(ValueError):
        load_memory(llama)


def test_missing_and_unexpected_weights_are_refused(llama):
    state = weights(llama)
    more = state | {"layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}
    less = {name: value for name, value in state.items() if name != "norm.weight"}
    for wrong, name in ((less, "norm.weight"), (more, "self_attn"), (weights(GOLDEN / "llama" / "base"), "layers")):
        save_file(wrong, llama / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=name):
            load_memory(llama)


EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_memory_for_a_loaded_base_of_experts_has_its_dense_mlp(family, tmp_path):
    changes = EXPERTS | GROUPS | (LATENT if family == "deepseek_v3" else {})
    tiny_base(family, **changes).save_pretrained(tmp_path)
    config = memory_config(AutoModelForCausalLM.from_pretrained(tmp_path).config, 3)
    memory = memory_class(config)(config)
    assert type(memory.blocks[2].mlp).__name__.endswith("MLP")
    assert memory(torch.randn(2, HIDDEN)).logits.shape == (2, VOCABULARY)


def test_a_loaded_base_of_experts_alone_is_refused(tmp_path):
    tiny_base("qwen3_moe", **EXPERTS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="qwen3_moe"):
        memory_class(memory_config(AutoModelForCausalLM.from_pretrained(tmp_path).config, 3))


@pytest.mark.unit
def test_the_gelu_of_gpt2_is_one_kernel_in_memory_and_base(tmp_path):
    base = tiny_base("gpt2")
    base.save_pretrained(tmp_path)
    opened, memory = load_base(tmp_path).eval(), tiny_memory(base)
    for model in (opened, memory):
        names = {type(module).__name__ for module in model.modules()}
        assert "GELU" in names and "NewGELUActivation" not in names
    with torch.no_grad():
        torch.testing.assert_close(opened(some_ids()).logits, base(some_ids()).logits, rtol=1e-5, atol=1e-5)
    assert memory.config.activation_function == "gelu_new"  # as in published memories
