"""The stacks and their files: the published layout, what is saved loads again, what does not fit is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, VOCABULARY, some_ids, tiny_base, tiny_memory

from models import GPT2MLPModel, LlamaMLPModel, MistralMLPModel, load_memory, memory_config

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
def test_a_saved_memory_has_the_published_names_and_loads_again_with_its_own_head(family, tmp_path):
    base = tiny_base(family, tie_word_embeddings=True)
    memory = tiny_memory(base)
    assert type(memory) is CLASSES[family]
    assert memory.state_dict().keys() == weights(GOLDEN / family / "memory").keys()
    memory.save_pretrained(tmp_path)
    loaded = load_memory(tmp_path)
    assert same_weights(memory, loaded) and not loaded.training
    assert not torch.equal(loaded.lm_head.weight, base.get_output_embeddings().weight)
    assert loaded.config.tie_word_embeddings is True


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_config_is_the_bases_with_the_layer_count_changed(family, tmp_path):
    base = tiny_base(family)
    base.save_pretrained(tmp_path / "base")
    tiny_memory(base, layers=3).save_pretrained(tmp_path / "memory")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "memory"))
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    count = "n_layer" if family == "gpt2" else "num_hidden_layers"
    assert changed == {count, "architectures"}
    assert after[count] == 3
    assert after["architectures"] == [CLASSES[family].__name__]


@pytest.mark.parametrize("family", ["qwen2", "smollm3", "gemma2"])
def test_per_layer_lists_of_a_config_follow_the_layer_count(family, tmp_path):
    base = tiny_base(family)
    for layers in (1, 5):
        memory = tiny_memory(base, layers=layers)
        memory.save_pretrained(tmp_path / str(layers))
        assert len(memory.config.layer_types) == layers
        # As in a config whose layer count alone was changed.
        edit_config(tmp_path / str(layers), layer_types=base.config.layer_types)
        assert same_weights(memory, load_memory(tmp_path / str(layers)))
    assert len(base.config.layer_types) == 2


def test_a_memory_for_wider_hidden_states_has_a_transform_and_loads_again(tmp_path):
    config = memory_config(tiny_base("llama").config, 2)
    memory = LlamaMLPModel(config, input_dim=48, output_dim=HIDDEN)
    assert memory.embedding_transform.weight.shape == (HIDDEN, 48)
    assert memory(torch.randn(2, 5, 48)).logits.shape == (2, 5, VOCABULARY)
    memory.save_pretrained(tmp_path)
    loaded = load_memory(tmp_path)
    assert loaded.input_dim == 48
    assert same_weights(memory, loaded)


def test_an_output_width_that_is_not_the_configs_is_refused_as_is_a_memory_without_layers():
    with pytest.raises(ValueError, match="memory layers 0"):
        memory_config(tiny_base("llama").config, 0)
    with pytest.raises(ValueError, match="output_dim 40: expected the config's hidden size, 32"):
        LlamaMLPModel(memory_config(tiny_base("llama").config, 1), 48, 40)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_have_the_leading_shape_of_the_input(family):
    memory = tiny_memory(tiny_base(family))
    states = torch.randn(2, 5, HIDDEN)
    logits = memory(states).logits
    assert logits.shape == (2, 5, VOCABULARY)
    torch.testing.assert_close(memory(states.flatten(0, 1), position_ids=torch.arange(10)).logits, logits.flatten(0, 1))
    torch.testing.assert_close(memory.hidden(states) @ memory.lm_head.weight.T, logits)


def test_the_loss_is_that_of_shifted_labels_without_minus_100():
    memory = tiny_memory(tiny_base("llama"))
    labels = some_ids(2, 5)
    labels[0, :3] = -100
    output = memory(torch.randn(2, 5, HIDDEN), labels=labels)
    rows = labels[:, 1:] != -100
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1][rows], labels[:, 1:][rows])
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    memory = tiny_memory(tiny_base("llama")).train()
    states = torch.randn(2, 5, HIDDEN)
    memory(states).logits.square().sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in memory.named_parameters()}
    memory.zero_grad()
    memory.gradient_checkpointing_enable()
    memory(states).logits.square().sum().backward()
    for name, parameter in memory.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


def test_the_dtype_asked_for_is_given_and_none_keeps_the_stored_one(llama):
    assert load_memory(llama).dtype == torch.float32
    assert load_memory(llama, dtype=torch.bfloat16).dtype == torch.bfloat16
    tiny_memory(tiny_base("llama")).half().save_pretrained(llama)
    assert load_memory(llama, dtype=None).dtype == torch.float16
    assert load_memory(llama).dtype == torch.float32
    assert LlamaMLPModel.from_pretrained(llama).dtype == torch.float16


def test_the_file_may_be_written_over_while_the_memory_lives(llama):
    memory = load_memory(llama)
    before = memory.lm_head.weight.sum().item()
    memory.save_pretrained(llama)
    assert memory.lm_head.weight.sum().item() == before
    assert same_weights(memory, load_memory(llama))


def test_sharded_safetensors_load(tmp_path):
    memory = load_memory(GOLDEN / "llama" / "memory")
    memory.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert same_weights(memory, load_memory(tmp_path))


def test_a_bin_of_tensors_loads_whole_and_sharded(llama):
    expected, state = load_memory(llama), weights(llama)
    (llama / "model.safetensors").unlink()
    torch.save(state, llama / "pytorch_model.bin")
    assert same_weights(expected, load_memory(llama))
    (llama / "pytorch_model.bin").unlink()
    names = sorted(state)
    halves = {"one.bin": names[:5], "two.bin": names[5:]}
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, llama / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same_weights(expected, load_memory(llama))


class Touch:
    """Unpickled, it makes a file: what a hostile checkpoint would do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_bin_that_holds_more_than_tensors_is_refused_and_runs_nothing(llama, tmp_path):
    trace = tmp_path / "trace"
    torch.save(weights(llama) | {"extra": Touch(trace)}, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: holds more than tensors"):
        load_memory(llama)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_weight_file_that_is_truncated_or_missing_is_refused(llama, name):
    if name.endswith(".bin"):
        torch.save(weights(llama), llama / name)
        (llama / "model.safetensors").unlink()
    content = (llama / name).read_bytes()
    (llama / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=name):
        load_memory(llama)
    (llama / f"{name}.index.json").write_text(json.dumps({"weight_map": {"norm.weight": "absent.bin"}}))
    (llama / name).unlink()
    with pytest.raises(ValueError, match=r"index\.json: names absent\.bin, which is not there"):
        load_memory(llama)


def prefixed(prefix, state):
    return {f"{prefix}.{name}": value for name, value in state.items()}


def test_of_a_joint_state_and_of_one_of_the_base_alone_only_the_memory_is_taken(tmp_path):
    folder = golden_copy("llama", tmp_path / "epoch_3" / "knn_generator")
    expected, alone = load_memory(folder), weights(folder)
    base = prefixed("base_lm", weights(GOLDEN / "llama" / "base"))
    save_file(base | prefixed("knn_generator", alone), folder / "model.safetensors")
    assert same_weights(expected, load_memory(folder))
    assert same_weights(expected, load_memory(tmp_path / "epoch_3"))
    save_file(base, folder / "model.safetensors")
    with pytest.raises(ValueError, match="no weights of a memory"):
        load_memory(folder)
    torch.save(alone, folder / "pytorch_model.bin")
    assert same_weights(expected, load_memory(folder))
    (folder / "model.safetensors").unlink()
    assert same_weights(expected, load_memory(folder))


@pytest.mark.parametrize("inner", ["", "knn_generator"])
def test_a_single_epoch_inside_is_taken_and_several_are_named(tmp_path, inner):
    golden_copy("llama", tmp_path / "epoch_0" / inner)
    (tmp_path / "logs").mkdir()
    assert same_weights(load_memory(GOLDEN / "llama" / "memory"), load_memory(tmp_path))
    for epoch in (2, 10):
        golden_copy("llama", tmp_path / f"epoch_{epoch}" / inner)
    with pytest.raises(ValueError, match="several memories") as caught:
        load_memory(tmp_path)
    names = [str(Path(f"epoch_{epoch}") / inner) for epoch in (0, 2, 10)]
    assert ", ".join(names) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 4}, r"Missing .*layers\.3"),
        ({"num_hidden_layers": 2}, r"Unexpected .*layers\.2"),
        ({"vocab_size": 98}, r"lm_head.weight.*\[97, 32\].*\[98, 32\]"),
        ({"model_type": "no-such-family"}, "model_type 'no-such-family'"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": "opt"}, r"\.mlp"),
        ({"hidden_size": "wide"}, "no usable llama config"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused_in_one_line(llama, changes, expected):
    edit_config(llama, **changes)
    with pytest.raises(ValueError, match=expected) as caught:
        load_memory(llama)
    assert "\n" not in str(caught.value)


def test_weights_are_read_strictly(llama):
    state = weights(llama)
    more = state | {"layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}
    less = {name: value for name, value in state.items() if name != "norm.weight"}
    base = weights(GOLDEN / "llama" / "base")
    for wrong, expected in ((less, "Missing .*norm.weight"), (more, "Unexpected .*self_attn"), (base, "not the base")):
        save_file(wrong, llama / "model.safetensors")
        with pytest.raises(ValueError, match=expected):
            load_memory(llama)


def test_what_is_no_memory_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_memory(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no MLP memory"):
        load_memory(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="holds a memory of the llama family, expected a GPT2MLPModel"):
        GPT2MLPModel.from_pretrained(GOLDEN / "llama" / "memory")
    with pytest.raises(ValueError, match="is a file"):
        load_memory(tmp_path / "file")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match="is not readable JSON"):
        load_memory(tmp_path)
