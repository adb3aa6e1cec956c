"""The joint model: the mixture, its gradients, its settings, and the folder that it saves."""

import json
import shutil

import pytest
import torch
from tiny_models import letter_tokenizer, some_ids, tiny_base, tiny_joint, tiny_memory
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from models import MLPMemory, load_memory
from models.capture import hidden_states
from models.stack import base_id, shifted_nll
from utils.errors import InputError
from utils.loading import BaseArguments


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base with its tokenizer, and its memory, in folders."""
    folder = tmp_path_factory.mktemp("files")
    base = tiny_base("llama")
    base.save_pretrained(folder / "base")
    letter_tokenizer().save_pretrained(folder / "base")
    tiny_memory(base).save_pretrained(folder / "memory")
    return folder


@pytest.fixture
def joint(files):
    return MLPMemory.from_pretrained(files / "base", files / "memory", lmbda=0.6, knn_temp=2.0)


def log_probs(model, ids=None):
    with torch.no_grad():
        return model(some_ids() if ids is None else ids).logits


# The mixture


@pytest.mark.parametrize(("lmbda", "knn_temp"), [(0.0, 1.0), (1e-3, 0.5), (0.25, 1.0), (0.25, 7.0), (1.0, 2.0)])
def test_logits_are_the_log_of_the_mixed_probabilities(lmbda, knn_temp):
    joint = tiny_joint(lmbda=lmbda, knn_temp=knn_temp)
    ids = some_ids()
    with torch.no_grad():
        base = joint.base_lm(ids).logits.double().softmax(-1)
        memory = (joint.knn_generator(hidden_states(joint.base_lm, ids)).logits.double() / knn_temp).softmax(-1)
    expected = ((1 - lmbda) * base + lmbda * memory).log()
    torch.testing.assert_close(log_probs(joint).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_reaches_base_and_memory():
    joint = tiny_joint(lmbda=0.4)
    ids = some_ids(1, 6)
    before = joint.base_lm(ids).logits
    output = joint(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.logits, log_probs(joint, ids))
    assert torch.equal(joint.base_lm(ids).logits, before)
    assert all(parameter.grad.abs().sum() > 0 for parameter in joint.parameters())


def test_rows_without_a_label_weigh_nothing():
    joint = tiny_joint(lmbda=0.4)
    loss = joint(some_ids(), labels=torch.full((2, 12), -100)).loss
    loss.backward()
    assert loss == 0 and all((parameter.grad == 0).all() for parameter in joint.parameters())
    impossible = torch.tensor([[[-torch.inf, 0.0]] * 3])
    assert shifted_nll(impossible, torch.tensor([[-100, 1, -100]])) == 0


def test_logits_to_keep_are_the_full_logits_there():
    joint = tiny_joint()
    full = log_probs(joint)
    for keep, positions in ((3, slice(-3, None)), (torch.tensor([0, 4, 11]), [0, 4, 11])):
        with torch.no_grad():
            torch.testing.assert_close(joint(some_ids(), logits_to_keep=keep).logits, full[:, positions])


# Settings


def test_settings_can_be_changed_on_the_live_object():
    joint = tiny_joint(lmbda=0.25)
    before = log_probs(joint)
    joint.lmbda, joint.knn_temp = 0.7, 3.0
    torch.testing.assert_close(log_probs(joint), log_probs(tiny_joint(lmbda=0.7, knn_temp=3.0)))
    joint.lmbda, joint.knn_temp, joint.layer_position = 0.25, 1.0, 0
    assert not torch.allclose(log_probs(joint), before)
    torch.testing.assert_close(log_probs(joint), log_probs(tiny_joint(layer_position=0)))
    joint.layer_position = -1
    torch.testing.assert_close(log_probs(joint), before)


def test_a_setting_out_of_range_is_refused():
    joint = tiny_joint()
    bad = {"lmbda": [-0.1, 1.1, float("nan"), "some"], "knn_temp": [0.0, float("nan"), float("inf")]}
    for name, values in (bad | {"layer_position": [2, -3]}).items():
        before = getattr(joint, name)
        for value in values:
            with pytest.raises(ValueError, match=str(value)):
                tiny_joint(**{name: value})
            with pytest.raises(ValueError, match=str(value)):
                setattr(joint, name, value)
        assert getattr(joint, name) == before


def test_a_memory_for_another_base_is_refused():
    base = tiny_base("llama")
    others = {"48": {"hidden_size": 48}, "98": {"vocab_size": 98}}
    for expected, changes in others.items():
        with pytest.raises(ValueError, match=expected):
            MLPMemory(base, tiny_memory(tiny_base("llama", **changes)))
    with pytest.raises(ValueError, match="mistral"):
        MLPMemory(base, tiny_memory(tiny_base("mistral")))


# Folders


def test_base_and_memory_are_joined_by_name(files, joint):
    by_hand = MLPMemory(
        AutoModelForCausalLM.from_pretrained(files / "base"), load_memory(files / "memory"), lmbda=0.6, knn_temp=2.0
    )
    torch.testing.assert_close(log_probs(joint), log_probs(by_hand))
    assert not joint.training
    half = MLPMemory.from_pretrained(files / "base", files / "memory", dtype=torch.bfloat16)
    assert half.base_lm.dtype == half.knn_generator.dtype == torch.bfloat16
    mixed = MLPMemory.from_pretrained(files / "base", files / "memory", memory_dtype=torch.bfloat16)
    assert (mixed.base_lm.dtype, mixed.knn_generator.dtype) == (torch.float32, torch.bfloat16)
    assert (mixed.lmbda, mixed.knn_temp, mixed.layer_position) == (0.25, 1.0, -1)


def test_a_saved_folder_names_its_base_and_opens_again(files, joint, tmp_path):
    joint.layer_position = 0
    joint.save_pretrained(tmp_path / "joint")
    written = {path.name for path in (tmp_path / "joint").iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "memory", "tokenizer.json"} <= written
    assert "base" not in written
    config = json.loads((tmp_path / "joint" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(files / "base")
    assert config["base_id"] == base_id(files / "base")
    mode = (tmp_path / "joint" / "config.json").stat().st_mode
    assert (tmp_path / "joint" / "memory" / "model.safetensors").stat().st_mode == mode
    again = MLPMemory.from_pretrained(tmp_path / "joint")
    assert (again.lmbda, again.knn_temp, again.layer_position) == (0.6, 2.0, 0)
    assert torch.equal(log_probs(again), log_probs(joint))
    assert MLPMemory.from_pretrained(tmp_path / "joint", lmbda=0.1).lmbda == 0.1
    # Its memory loads alone, and with another base.
    assert torch.equal(load_memory(tmp_path / "joint").lm_head.weight, joint.knn_generator.lm_head.weight)
    other = MLPMemory.from_pretrained(files / "base", tmp_path / "joint")
    assert other.lmbda == 0.6 and torch.equal(log_probs(other), log_probs(joint))


def test_auto_classes_open_a_saved_folder(joint, tmp_path):
    joint.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).lmbda == 0.6
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, MLPMemory)
    assert torch.equal(log_probs(again), log_probs(joint))
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"


def test_a_failed_save_leaves_the_folder_as_it_was(joint, tmp_path, monkeypatch):
    joint.save_pretrained(tmp_path)
    before = log_probs(joint)
    joint.knn_generator.lm_head.weight.data.zero_()

    def fail(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(joint.generation_config, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        joint.save_pretrained(tmp_path)
    assert torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path)), before)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_base_without_a_name_is_included(tmp_path):
    joint = tiny_joint()
    with pytest.raises(ValueError, match="include_base"):
        joint.save_pretrained(tmp_path / "one", include_base=False)
    assert not (tmp_path / "one").exists()
    joint.save_pretrained(tmp_path / "two")
    assert torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path / "two")), log_probs(joint))


def test_a_base_inside_its_folder_is_not_lost_by_saving_again(files, joint, tmp_path):
    joint.save_pretrained(tmp_path / "joint", include_base=True)
    MLPMemory.from_pretrained(tmp_path / "joint").save_pretrained(tmp_path / "joint")
    opened = MLPMemory.from_pretrained(tmp_path / "joint")
    opened.save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="include_base"):
        opened.save_pretrained(tmp_path / "none", include_base=False)
    shutil.rmtree(tmp_path / "joint")
    assert torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path / "elsewhere")), log_probs(joint))
    assert AutoTokenizer.from_pretrained(tmp_path / "elsewhere" / "base").eos_token == "<eos>"


@pytest.mark.parametrize("where", ["source", "inside"])
def test_a_base_that_is_trained_is_saved_inside(where, tmp_path):
    base = tiny_base("llama")
    base.save_pretrained(tmp_path / "source")
    joint = MLPMemory.from_pretrained(tmp_path / "source", tiny_memory(base))
    if where == "inside":
        joint.save_pretrained(tmp_path / "inside", include_base=True)
        joint = MLPMemory.from_pretrained(tmp_path / "inside")
    assert not any(weight.requires_grad for weight in joint.base_lm.parameters())
    joint.base_lm.requires_grad_()
    optimizer = torch.optim.SGD(joint.base_lm.parameters(), lr=1e-3)
    joint(some_ids(), labels=some_ids()).loss.backward()
    optimizer.step()
    trained = log_probs(joint)
    with pytest.raises(ValueError, match="include_base"):
        joint.save_pretrained(tmp_path / "refused", include_base=False)
    joint.save_pretrained(tmp_path / "joint")
    assert torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path / "joint")), trained)


def test_saving_takes_the_arguments_of_transformers(joint, tmp_path):
    joint.save_pretrained(tmp_path, is_main_process=True, save_function=torch.save, safe_serialization=True, token="a")
    assert torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path)), log_probs(joint))


@pytest.mark.parametrize("name", ["base", "memory", "."])
def test_saving_over_another_model_is_refused(joint, files, tmp_path, name):
    shutil.copytree(files / "base", tmp_path / "work" / name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=str(tmp_path / "work")):
        joint.save_pretrained(tmp_path / "work")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_base_with_missing_weights_is_refused(files, tmp_path):
    shutil.copytree(files / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(ValueError, match="lacks"):
        MLPMemory.from_pretrained(tmp_path / "base", files / "memory")


def test_an_adapter_is_not_added_to_weights_that_may_hold_it(files, joint, tmp_path, monkeypatch):
    base = shutil.copytree(files / "base", tmp_path / "base")
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    for module in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: True)
    opened = MLPMemory.from_pretrained(base, files / "memory", lmbda=0.6, knn_temp=2.0)
    assert torch.equal(log_probs(opened), log_probs(joint))
    arguments = BaseArguments(str(base))
    assert torch.equal(arguments.open_base().lm_head.weight, joint.base_lm.lm_head.weight)
    (base / "config.json").unlink()
    with pytest.raises(ValueError, match="adapter"):
        MLPMemory.from_pretrained(base, files / "memory")
    with pytest.raises(InputError, match="adapter"):
        arguments.require_base()


def test_a_memory_trained_for_another_base_is_refused(files, tmp_path):
    shutil.copytree(files / "memory", tmp_path / "memory")
    for base, fits in ((base_id(files / "base"), True), ("another", False)):
        made = {"kind": "memory", "settings": {}, "made_from": {"base": base}}
        (tmp_path / "memory" / "made.json").write_text(json.dumps(made))
        if fits:
            MLPMemory.from_pretrained(files / "base", tmp_path / "memory").save_pretrained(tmp_path / "joint")
        else:
            with pytest.raises(ValueError, match="another base"):
                MLPMemory.from_pretrained(files / "base", tmp_path / "memory")
    tiny_base("llama", layers=3).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another base"):
        MLPMemory.from_pretrained(tmp_path / "other", tmp_path / "joint")


def test_a_padded_base_is_resized_to_its_tokenizer(joint, files, tmp_path):
    padded = tiny_base("llama", vocab_size=128)
    padded.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="128"):
        MLPMemory.from_pretrained(tmp_path / "base", files / "memory")
    letter_tokenizer().save_pretrained(tmp_path / "base")
    opened = MLPMemory.from_pretrained(tmp_path / "base", files / "memory")
    assert log_probs(opened).shape[-1] == 97
    opened.save_pretrained(tmp_path / "joint")
    assert torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path / "joint")), log_probs(opened))


def test_the_model_card_has_the_settings_and_the_results(joint, tmp_path):
    rows = [{"dataset": "wiki", "perplexity": 9.5812, "tokens": 8191, "grid": [1]}, {"model": "/a/path", "recall": 0.5}]
    joint.save_pretrained(tmp_path, results=rows)
    card = (tmp_path / "README.md").read_text()
    facts = ("LlamaForCausalLM", "| 0.6 |", "wiki", "9.581", "8191", "recall", "LlamaMLPModel, 3 layers")
    assert all(fact in card for fact in facts) and "/a/path" not in card
    MLPMemory.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card
