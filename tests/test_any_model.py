"""The joint model in place of any transformers model: what its users call beside `forward` and plain generation."""

import re

import pytest
import torch
from harness import ROOT
from tiny_models import CONTEXT, VOCABULARY, letter_tokenizer, some_ids, tiny_base, tiny_joint, tiny_memory
from transformers import ContinuousBatchingConfig, Trainer, TrainingArguments

from models import MLPMemory

pytestmark = pytest.mark.unit
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=["gpt2", "llama", "gemma", "gemma2"])
def joint(request):
    return tiny_joint(request.param, lmbda=0.6)


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


# Generation


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_embeddings_as_a_prompt_give_what_their_tokens_give(joint, way):
    ids = some_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 5, **GREEDY, **way}
    expected, embeds = joint.generate(ids, **settings), joint.get_input_embeddings()(ids)
    assert torch.equal(joint.generate(inputs_embeds=embeds, **settings), expected[:, 8:])
    assert torch.equal(joint.generate(ids, inputs_embeds=embeds, **settings), expected)


def test_embeddings_as_a_prompt_end_where_the_context_does():
    joint = tiny_joint("llama")
    embeds = joint.get_input_embeddings()(some_ids(1, CONTEXT + 1))
    assert joint.generate(inputs_embeds=embeds[:, :60], max_new_tokens=50, **GREEDY).shape == (1, CONTEXT - 60 + 1)
    with pytest.raises(ValueError, match="a prompt of 65 tokens is longer than the base's context of 64"):
        joint.generate(inputs_embeds=embeds)


def test_a_draft_that_exits_early_changes_nothing_now_or_in_the_next_call(joint):
    prompt = torch.tensor([[5, 9, 13, 5, 9, 13, 5, 9]])
    expected = joint.generate(prompt, max_new_tokens=6, **GREEDY)
    for _ in range(2):
        assert torch.equal(joint.generate(prompt, max_new_tokens=6, assistant_early_exit=1, **GREEDY), expected)
        assert torch.equal(joint.generate(prompt, max_new_tokens=6, **GREEDY), expected)


def test_prompts_of_other_lengths_come_and_go_in_one_continuous_batch(joint):
    prompts = [some_ids(1, length, seed=length)[0].tolist() for length in (3, 9, 5)]
    expected = [joint.generate(torch.tensor([each]), max_new_tokens=4, **GREEDY)[0, len(each) :] for each in prompts]
    settings = joint.generation_config
    settings.update(max_new_tokens=4, **GREEDY)
    small = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)  # not all of the memory there is
    outputs = joint.generate_batch(prompts, generation_config=settings, continuous_batching_config=small)
    assert [output.generated_tokens for output in outputs.values()] == [each.tolist() for each in expected]


def test_attention_settings_reach_base_and_config(joint):
    assert joint.config.text_config._attn_implementation == joint.base_lm.config._attn_implementation
    with torch.no_grad():
        before = joint(some_ids()).logits
        joint.set_attn_implementation("eager")
        torch.testing.assert_close(joint(some_ids()).logits, before)
    assert joint.config.text_config._attn_implementation == joint.base_lm.config._attn_implementation == "eager"


# Embeddings


@pytest.mark.parametrize("size", [VOCABULARY + 5, VOCABULARY - 7])
def test_a_vocabulary_of_another_size_is_that_of_base_memory_and_config(joint, size, tmp_path):
    ids = some_ids().clamp(max=80)
    with torch.no_grad():
        before = joint.memory_logits(torch.ones(1, 32))
        assert joint.resize_token_embeddings(size, mean_resizing=False) is joint.get_input_embeddings()
        after = joint.memory_logits(torch.ones(1, 32))
    known = min(size, VOCABULARY)
    torch.testing.assert_close(after[:, :known], before[:, :known])
    torch.testing.assert_close(after[:, known:], before.mean(-1, keepdim=True).expand(1, size - known))
    assert joint.config.vocab_size == joint.base_lm.config.vocab_size == joint.knn_generator.config.vocab_size == size
    joint.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(MLPMemory.from_pretrained(tmp_path)(ids).logits, joint(ids).logits)
    assert joint.generate(ids, max_new_tokens=2, **GREEDY).shape == (2, 14)


def test_embeddings_and_head_are_the_bases_and_can_be_replaced():
    joint = tiny_joint("llama")
    embeddings, head = torch.nn.Embedding(VOCABULARY, 32), torch.nn.Linear(32, VOCABULARY, bias=False)
    joint.set_input_embeddings(embeddings)
    joint.set_output_embeddings(head)
    assert joint.get_input_embeddings() is joint.base_lm.get_input_embeddings() is embeddings
    assert joint.get_output_embeddings() is joint.base_lm.get_output_embeddings() is head


def test_the_config_names_the_special_tokens_and_the_parameters_are_counted_once(joint):
    base = joint.base_lm.config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(joint.config, name) == getattr(base, name)
    assert joint.num_parameters() == joint.base_lm.num_parameters() + joint.knn_generator.num_parameters()
    assert joint.half().dtype == joint.knn_generator.dtype == torch.float16
    assert joint.to(torch.bfloat16).generate(some_ids(), max_new_tokens=2, **GREEDY).shape == (2, 14)


# Training


def test_gradient_checkpointing_is_switched_on_and_off_for_base_and_memory(joint):
    ids = some_ids()
    expected = gradients(joint.train(), ids)
    joint.gradient_checkpointing_enable({"use_reentrant": False})
    assert joint.is_gradient_checkpointing and joint.base_lm.is_gradient_checkpointing
    assert all(block.gradient_checkpointing for block in joint.knn_generator.blocks)
    torch.testing.assert_close(gradients(joint, ids), expected)
    joint.gradient_checkpointing_disable()
    assert not joint.is_gradient_checkpointing
    torch.testing.assert_close(gradients(joint, ids), expected)


def test_weights_given_are_saved_in_place_of_the_models_own(joint, tmp_path):
    before = joint.state_dict()
    given = {name: value + 1 for name, value in before.items()}
    joint.save_pretrained(tmp_path / "both", state_dict=given, include_base=True)
    opened = MLPMemory.from_pretrained(tmp_path / "both").state_dict()
    assert all(torch.equal(value, given[name]) for name, value in opened.items())
    memory = {name: value for name, value in given.items() if name.startswith("knn_generator.")}
    joint.save_pretrained(tmp_path / "one", state_dict=memory, include_base=True)
    opened = MLPMemory.from_pretrained(tmp_path / "one").state_dict()
    assert all(torch.equal(value, (before | memory)[name]) for name, value in opened.items())


def trained(folder, rows_at_once, steps_together, trainer_class=Trainer, resumed=None, **settings):
    """A joint model after the Trainer's step over rows of 3, 4, 5 and 6 labels, and the Trainer."""
    base = tiny_base("llama")
    joint = MLPMemory(base, tiny_memory(base), lmbda=0.5)
    rows = [
        {"input_ids": row, "labels": row.where(torch.arange(8) < 4 + number, -100)}
        for number, row in enumerate(some_ids(4, 8))
    ]
    tokenizer = letter_tokenizer()
    tokenizer.pad_token = "<eos>"
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=steps_together,
        **{"max_steps": 1, "save_steps": 1, "optim": "sgd"} | settings,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = trainer_class(joint, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resumed)
    return joint, trainer


def test_the_trainer_trains_it_and_its_checkpoint_opens(tmp_path):
    joint, trainer = trained(tmp_path, 4, 1, gradient_checkpointing=True, gradient_checkpointing_kwargs={})
    opened = MLPMemory.from_pretrained(tmp_path / "checkpoint-1")
    assert all(torch.equal(value, opened.state_dict()[name]) for name, value in joint.state_dict().items())
    assert (tmp_path / "checkpoint-1" / "tokenizer.json").is_file()
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_trainer_of_the_readme_goes_on_from_a_checkpoint_and_finds_the_best(tmp_path):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(class JointTrainer.*?)```", readme, re.DOTALL)
    exec(code, names := {"Trainer": Trainer, "MLPMemory": MLPMemory, "torch": torch})
    more = {"trainer_class": names["JointTrainer"], "max_steps": 3, "optim": "adamw_torch", "learning_rate": 0.01}
    whole = trained(tmp_path / "whole", 2, 1, **more)[0].state_dict()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = trained(tmp_path / "resumed", 2, 1, resumed=str(checkpoint), **more)[0].state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    more |= {"greater_is_better": True, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    joint, trainer = trained(tmp_path / "best", 2, 1, **more)
    best = MLPMemory.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(value, best[name]) for name, value in joint.state_dict().items())
    assert trainer.state.best_model_checkpoint.endswith("-1")  # where the loss is greatest


def test_batches_that_make_one_step_together_weigh_every_label_alike(tmp_path):
    whole, parts = (trained(tmp_path / str(rows), rows, 4 // rows)[0].state_dict() for rows in (4, 1))
    before = tiny_joint("llama").state_dict()
    moved = {name: value - before[name] for name, value in whole.items()}
    torch.testing.assert_close({name: value - before[name] for name, value in parts.items()}, moved)
    assert all(change.abs().sum() > 0 for change in moved.values())
