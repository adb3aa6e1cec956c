"""The joint model in place of any transformers model: generation modes, resizing, the Trainer."""

import pytest
import torch
from tiny_models import VOCABULARY, letter_tokenizer, some_ids, tiny_base, tiny_joint, tiny_memory
from transformers import ContinuousBatchingConfig, Trainer, TrainingArguments

from models import MLPMemory

pytestmark = pytest.mark.unit
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=["gpt2", "llama", "gemma2"])
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


def test_a_draft_that_exits_early_changes_nothing(joint):
    prompt = torch.tensor([[5, 9, 13, 5, 9, 13, 5, 9]])
    expected = joint.generate(prompt, max_new_tokens=6, **GREEDY)
    for _ in range(2):
        assert torch.equal(joint.generate(prompt, max_new_tokens=6, assistant_early_exit=1, **GREEDY), expected)
        assert torch.equal(joint.generate(prompt, max_new_tokens=6, **GREEDY), expected)


def test_continuous_batching_gives_the_same_tokens(joint):
    prompts = [some_ids(1, length, seed=length)[0].tolist() for length in (3, 9, 5)]
    expected = [joint.generate(torch.tensor([each]), max_new_tokens=4, **GREEDY)[0, len(each) :] for each in prompts]
    settings = joint.generation_config
    settings.update(max_new_tokens=4, **GREEDY)
    small = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)  # not all of the memory there is
    outputs = joint.generate_batch(prompts, generation_config=settings, continuous_batching_config=small)
    assert [output.generated_tokens for output in outputs.values()] == [each.tolist() for each in expected]


# Embeddings


@pytest.mark.parametrize("size", [VOCABULARY + 5, VOCABULARY - 7])
def test_a_vocabulary_of_another_size_is_that_of_base_memory_and_config(joint, size, tmp_path):
    ids = some_ids().clamp(max=80)
    with torch.no_grad():
        before = joint.memory_logits(torch.ones(1, 32))[0]
        assert joint.resize_token_embeddings(size, mean_resizing=False) is joint.get_input_embeddings()
        after = joint.memory_logits(torch.ones(1, 32))[0]
    known = min(size, VOCABULARY)
    torch.testing.assert_close(after[:, :known], before[:, :known])
    torch.testing.assert_close(after[:, known:], before.mean(-1, keepdim=True).expand(1, size - known))
    assert joint.config.vocab_size == joint.base_lm.config.vocab_size == joint.knn_generator.config.vocab_size == size
    joint.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(MLPMemory.from_pretrained(tmp_path)(ids).logits, joint(ids).logits)
    assert joint.generate(ids, max_new_tokens=2, **GREEDY).shape == (2, 14)


# Training


def test_gradient_checkpointing_changes_no_gradient(joint):
    ids = some_ids()
    expected = gradients(joint.train(), ids)
    joint.gradient_checkpointing_enable({"use_reentrant": False})
    assert joint.is_gradient_checkpointing and joint.base_lm.is_gradient_checkpointing
    assert all(block.gradient_checkpointing for block in joint.knn_generator.blocks)
    torch.testing.assert_close(gradients(joint, ids), expected)
    joint.gradient_checkpointing_disable()
    assert not joint.is_gradient_checkpointing
    torch.testing.assert_close(gradients(joint, ids), expected)


def trained(folder, rows_at_once, steps_together, **settings):
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
        **settings | {"max_steps": 1, "save_steps": 1, "optim": "sgd", "use_cpu": True, "disable_tqdm": True},
    )
    trainer = Trainer(joint, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return joint, trainer


def test_the_trainer_trains_it_and_its_checkpoint_opens(tmp_path):
    joint, trainer = trained(tmp_path, 4, 1, gradient_checkpointing=True, gradient_checkpointing_kwargs={})
    opened = MLPMemory.from_pretrained(tmp_path / "checkpoint-1")
    assert all(torch.equal(value, opened.state_dict()[name]) for name, value in joint.state_dict().items())
    assert (tmp_path / "checkpoint-1" / "tokenizer.json").is_file()
    assert trainer.evaluate()["eval_loss"] > 0


def test_accumulated_batches_weigh_every_label_alike(tmp_path):
    whole, parts = (trained(tmp_path / str(rows), rows, 4 // rows)[0].state_dict() for rows in (4, 1))
    before = tiny_joint("llama").state_dict()
    moved = {name: value - before[name] for name, value in whole.items()}
    torch.testing.assert_close({name: value - before[name] for name, value in parts.items()}, moved)
    assert all(change.abs().sum() > 0 for change in moved.values())


def test_label_smoothing_smooths_the_shifted_labels(tmp_path):
    losses = []
    for factor in (0.0, 1e-9):
        _, trainer = trained(tmp_path / str(factor), 2, 2, label_smoothing_factor=factor)
        losses.append([trainer.state.log_history[-1]["train_loss"], trainer.evaluate()["eval_loss"]])
    rows = [torch.stack([row[name] for row in trainer.train_dataset]) for name in ("input_ids", "labels")]
    loss = tiny_joint("llama", lmbda=0.5)(rows[0], labels=rows[1]).loss.item()
    assert losses[0][0] == pytest.approx(loss, rel=1e-4) and losses[0] == pytest.approx(losses[1], rel=1e-5)
