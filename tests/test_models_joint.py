"""The joint model: the mixture, its gradients, its settings, the folder it saves and every way to open that again."""

import copy
import json
import shutil

import pytest
import torch
from harness import run
from tiny_models import HIDDEN, VOCABULARY, letter_tokenizer, some_ids, tiny_base, tiny_joint, tiny_memory
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from models import MLPMemory, load_memory
from models.capture import hidden_states
from models.stack import shifted_nll


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


@pytest.mark.parametrize("lmbda", [0.0, 1e-3, 0.25, 1.0])
@pytest.mark.parametrize("knn_temp", [0.5, 1.0, 7.0])
def test_logits_are_the_log_of_the_mixed_probabilities(lmbda, knn_temp):
    joint = tiny_joint(lmbda=lmbda, knn_temp=knn_temp)
    ids = some_ids()
    with torch.no_grad():
        base = joint.base_lm(ids).logits.double().softmax(-1)
        memory = (joint.knn_generator(hidden_states(joint.base_lm, ids)).logits.double() / knn_temp).softmax(-1)
    expected = ((1 - lmbda) * base + lmbda * memory).log()
    torch.testing.assert_close(log_probs(joint).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_reaches_base_and_memory_and_the_numbers_are_those_without_it():
    joint = tiny_joint(lmbda=0.4)
    ids = some_ids(1, 6)
    before = joint.base_lm(ids).logits
    output = joint(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.logits, log_probs(joint, ids))
    assert torch.equal(joint.base_lm(ids).logits, before)
    assert all(parameter.grad.abs().sum() > 0 for parameter in joint.parameters())


def test_rows_that_hold_no_label_weigh_nothing():
    """Such as a text's last window of one token, alone in its batch."""
    joint = tiny_joint(lmbda=0.4)
    loss = joint(some_ids(), labels=torch.full((2, 12), -100)).loss
    loss.backward()
    assert loss == 0 and all((parameter.grad == 0).all() for parameter in joint.parameters())
    impossible = torch.tensor([[[-torch.inf, 0.0]] * 3])
    assert shifted_nll(impossible, torch.tensor([[-100, 1, -100]])) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_gradients_are_the_same_under_gradient_checkpointing_or_it_is_refused(family):
    joint = tiny_joint(family, lmbda=0.4).train()
    ids = some_ids()

    def gradients():
        joint.zero_grad()
        joint(ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in joint.parameters()]

    expected = gradients()
    joint.base_lm.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), expected)
    joint.base_lm.gradient_checkpointing_enable({"use_reentrant": True})
    joint.base_lm.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="reentrant gradient checkpointing"):
        gradients()
    with torch.no_grad():
        assert joint(ids, labels=ids).loss > 0
    joint.eval()  # where nothing is checkpointed
    torch.testing.assert_close(gradients(), expected)


def test_training_leaves_the_frozen_base_without_gradient_or_dropout():
    base = tiny_base("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    joint = MLPMemory(base, tiny_memory(base), is_train=True).train()
    ids = some_ids()
    first, second = joint.base_lm(ids).logits, joint.base_lm(ids).logits
    assert torch.equal(first, second)
    joint(ids, labels=ids).logits.sum().backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert joint.knn_generator.training


def test_a_call_that_cannot_be_meant_is_refused():
    joint = tiny_joint()
    with pytest.raises(ValueError, match="leave logits_to_keep at 0"):
        joint(some_ids(), labels=some_ids(), logits_to_keep=1)
    with pytest.raises(ValueError, match="pass labels"):
        MLPMemory(joint.base_lm, joint.knn_generator, is_train=True)(some_ids())


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 11])])
def test_logits_to_keep_are_the_full_logits_there(keep):
    joint = tiny_joint()
    with torch.no_grad():
        kept = joint(some_ids(), logits_to_keep=keep).logits
    full = log_probs(joint)
    torch.testing.assert_close(kept, full[:, keep if isinstance(keep, torch.Tensor) else slice(-keep, None)])


def test_outputs_are_those_of_any_decoder():
    joint = tiny_joint()
    output = joint(some_ids(), use_cache=True, output_hidden_states=True)
    assert output.past_key_values.get_seq_length() == 12
    assert output.hidden_states[-1].shape == (2, 12, HIDDEN)
    assert joint(some_ids(), labels=some_ids(), return_dict=False)[1].shape == (2, 12, VOCABULARY)


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


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("lmbda", [-0.1, 1.1, float("nan")], "lambda .*: expected a number from 0 to 1"),
        ("knn_temp", [0.0, float("nan"), float("inf")], "memory temperature .*: expected a number above 0"),
        ("layer_position", [2, -3], "from -2 to 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(name, values, expected):
    joint = tiny_joint()
    before = getattr(joint, name)
    for value in values:
        with pytest.raises(ValueError, match=expected):
            tiny_joint(**{name: value})
        with pytest.raises(ValueError, match=expected):
            setattr(joint, name, value)
    assert getattr(joint, name) == before


def test_a_memory_for_another_base_is_refused():
    base = tiny_base("llama")
    others = {
        "hidden states of size 48, the base's hidden size is 32": tiny_memory(tiny_base("llama", hidden_size=48)),
        "vocabulary has 98 tokens, the base's 97": tiny_memory(tiny_base("llama", vocab_size=98)),
        "for the mistral family, the base is llama": tiny_memory(tiny_base("mistral")),
    }
    for expected, memory in others.items():
        with pytest.raises(ValueError, match=expected) as caught:
            MLPMemory(base, memory)
        assert "\n" not in str(caught.value)


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


def test_the_base_can_be_put_inside_and_the_folder_moved(joint, tmp_path):
    joint.save_pretrained(tmp_path / "here", include_base=True)
    shutil.move(tmp_path / "here", tmp_path / "there")
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    config["base_model_name_or_path"] = "/no/such/base"
    (tmp_path / "there" / "config.json").write_text(json.dumps(config))
    assert torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path / "there")), log_probs(joint))


def test_saving_over_a_folder_leaves_nothing_of_the_old_one(joint, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    joint.save_pretrained(tmp_path, include_base=True)
    joint.save_pretrained(tmp_path)
    assert not (tmp_path / "base").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path)), log_probs(joint))


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


def test_a_base_from_nowhere_is_named_or_included(tmp_path):
    joint = tiny_joint()
    with pytest.raises(ValueError, match=r"base_reference= or include_base=True"):
        joint.save_pretrained(tmp_path / "one", include_base=False)
    assert not (tmp_path / "one").exists()
    joint.save_pretrained(tmp_path / "two")
    assert torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path / "two")), log_probs(joint))
    joint.save_pretrained(tmp_path / "three", base_reference="someone/a-base")
    assert json.loads((tmp_path / "three" / "config.json").read_text())["base_model_name_or_path"] == "someone/a-base"


@pytest.mark.parametrize("include", [None, True])
def test_a_base_inside_its_folder_is_never_lost_by_saving_again(files, joint, tmp_path, include):
    joint.save_pretrained(tmp_path / "joint", include_base=True)
    MLPMemory.from_pretrained(tmp_path / "joint").save_pretrained(tmp_path / "joint", include_base=include)
    opened = MLPMemory.from_pretrained(tmp_path / "joint")
    assert torch.equal(log_probs(opened), log_probs(joint))
    opened.save_pretrained(tmp_path / "elsewhere", include_base=include)
    with pytest.raises(ValueError, match="the base is a part of"):
        opened.save_pretrained(tmp_path / "none", include_base=False)
    shutil.rmtree(tmp_path / "joint")
    assert torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path / "elsewhere")), log_probs(joint))
    assert AutoTokenizer.from_pretrained(tmp_path / "elsewhere" / "base").eos_token == "<eos>"


@pytest.mark.parametrize("by_name", [True, False])
def test_a_base_opened_by_a_relative_path_is_found_from_everywhere(files, tmp_path, monkeypatch, by_name):
    monkeypatch.chdir(files)
    base = "base" if by_name else AutoModelForCausalLM.from_pretrained("base")
    joint = MLPMemory.from_pretrained(base, "memory") if by_name else MLPMemory(base, load_memory("memory"))
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    joint.save_pretrained("joint")
    monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "far" / "joint" / "base").exists()
    assert torch.equal(log_probs(MLPMemory.from_pretrained("far/joint")), log_probs(joint))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("where", ["source", "inside"])
def test_a_base_trained_through_the_mixture_is_saved_along(family, where, tmp_path):
    base = tiny_base(family)
    base.save_pretrained(tmp_path / "source")
    joint = MLPMemory.from_pretrained(tmp_path / "source", tiny_memory(base))
    if where == "inside":
        joint.save_pretrained(tmp_path / "inside", include_base=True)
        joint = MLPMemory.from_pretrained(tmp_path / "inside")
    optimizer = torch.optim.SGD(joint.base_lm.parameters(), lr=1e-3)
    joint(some_ids(), labels=some_ids()).loss.backward()
    optimizer.step()
    trained = log_probs(joint)
    with pytest.raises(ValueError, match=r"include_base=True"):
        joint.save_pretrained(tmp_path / "refused", include_base=False)
    joint.save_pretrained(tmp_path / "joint")
    assert torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path / "joint")), trained)
    assert not torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path / "source", tiny_memory(base))), trained)


def test_the_weights_that_are_given_are_compared_with_the_source(files, joint, tmp_path):
    trained = {
        name: weight + 0.5 if name.endswith("embed_tokens.weight") else weight
        for name, weight in joint.state_dict().items()
    }
    joint.save_pretrained(tmp_path / "same", state_dict=joint.state_dict())
    joint.save_pretrained(tmp_path / "trained", state_dict=trained)
    assert not (tmp_path / "same" / "base").exists()
    weight = MLPMemory.from_pretrained(tmp_path / "trained").get_input_embeddings().weight
    assert torch.equal(weight, joint.get_input_embeddings().weight + 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_held_in_another_dtype_is_not_taken_for_a_trained_one(files, tmp_path, dtype):
    joint = MLPMemory.from_pretrained(files / "base", files / "memory", dtype=dtype)
    joint.save_pretrained(tmp_path / "joint")
    assert not (tmp_path / "joint" / "base").exists()


@pytest.mark.parametrize("taken", ["base", "memory", "."])
def test_saving_over_another_model_is_refused(joint, files, tmp_path, taken):
    shutil.copytree(files / "base", tmp_path / "work" / taken)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="belongs to no joint model and would be overwritten"):
        joint.save_pretrained(tmp_path / "work")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lmbda": 3}, r"config\.json: is no usable config .*lambda 3: expected"),
        ({"text_config": {"model_type": "none"}}, r"config\.json: is no usable config"),
        ({"base_model_name_or_path": "/no/such/base"}, "belongs to the base /no/such/base, which is not there"),
        ({"model_type": "llama"}, "is no folder of a joint model"),
    ],
)
def test_a_folder_that_cannot_be_opened_says_why_in_one_line(joint, tmp_path, changes, expected):
    joint.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=expected) as caught:
        MLPMemory.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_tools_for_plain_decoders_find_sizes_and_context_in_the_config(joint):
    assert (joint.config.vocab_size, joint.config.hidden_size, joint.config.max_position_embeddings) == (97, 32, 64)
    joint.tie_weights()
    copied = copy.deepcopy(joint)
    copied.knn_generator.lm_head.weight.data.zero_()
    assert not torch.equal(log_probs(copied), log_probs(joint))


def test_a_padded_base_is_resized_to_its_tokenizer_for_a_memory_made_so(joint, files, tmp_path):
    padded = tiny_base("llama", vocab_size=128)
    padded.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="vocabulary has 97 tokens, the base's 128"):
        MLPMemory.from_pretrained(tmp_path / "base", files / "memory")
    letter_tokenizer().save_pretrained(tmp_path / "base")
    opened = MLPMemory.from_pretrained(tmp_path / "base", files / "memory")
    assert log_probs(opened).shape[-1] == 97
    opened.save_pretrained(tmp_path / "joint")
    assert torch.equal(log_probs(MLPMemory.from_pretrained(tmp_path / "joint")), log_probs(opened))


def test_the_model_card_tells_the_settings_and_what_was_measured(joint, files, tmp_path):
    rows = [{"dataset": "wiki", "perplexity": 9.5812, "tokens": 8191}, {"dataset": "a|b", "recall": 0.5}]
    joint.save_pretrained(tmp_path, results=rows)
    card = (tmp_path / "README.md").read_text()
    facts = ("LlamaForCausalLM", "| 0.6 |", "| wiki | 9.581 | 8191 |", "a\\|b", "recall", "LlamaMLPModel, 3 layers")
    assert all(fact in card for fact in facts)
    MLPMemory.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card
    joint.save_pretrained(tmp_path)
    assert "Nothing was measured" in (tmp_path / "README.md").read_text()


def test_a_pipeline_opens_a_saved_folder_in_a_fresh_process(joint, tmp_path):
    joint.save_pretrained(tmp_path / "joint")
    code = (
        "import json, sys, models\n"
        "from transformers import pipeline\n"
        "generator = pipeline('text-generation', model=sys.argv[1])\n"
        "texts = generator(['hello', 'a longer prompt'], max_new_tokens=6, do_sample=False, batch_size=2,\n"
        "                  return_full_text=False)\n"
        "print(json.dumps([type(generator.model).__name__, [row[0]['generated_text'] for row in texts]]))\n"
    )
    name, texts = json.loads(run("-c", code, tmp_path / "joint").stdout)
    assert name == "MLPMemory"
    here = pipeline("text-generation", model=joint, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "joint"))
    alone = [
        here(prompt, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
        for prompt in ("hello", "a longer prompt")
    ]
    assert texts == alone
