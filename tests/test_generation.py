"""`MLPMemory.generate`: every way of generating on the joint distribution, and what it refuses."""

import copy

import pytest
import torch
from tiny_models import CONTEXT, VOCABULARY, letter_tokenizer, some_ids, tiny_base, tiny_joint, tiny_memory
from transformers import GenerationConfig
from transformers.utils import logging

from models import MLPMemory

pytestmark = pytest.mark.unit
PROMPTS = [[5, 9, 13], [4, 8, 15, 16, 23, 42], [7]]
EOS = 1


@pytest.fixture(scope="module", params=["gpt2", "llama", "mistral"])
def joint(request):
    return tiny_joint(request.param, lmbda=0.6, knn_temp=2.0)


@pytest.fixture(scope="module")
def llama():
    return tiny_joint("llama", lmbda=0.6)


def left_padded(prompts):
    """Ids and mask (batch, time), prompts at the right end."""
    time = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), time, dtype=torch.long), torch.zeros(len(prompts), time, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, time - len(prompt) :] = torch.tensor(prompt)
        mask[row, time - len(prompt) :] = 1
    return ids, mask


def greedy(model, ids, count=8, **settings):
    """`count` greedy tokens after `ids` (batch, time), prompt included; no token ends the text unless one is named."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
    return model.generate(ids, max_new_tokens=count, **settings)


def until_eos(tokens):
    tokens = tokens.tolist()
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


WAYS = {
    "greedy": {},
    "greedy, dynamic cache": {"cache_implementation": "dynamic"},
    "greedy, static cache": {"cache_implementation": "static"},
    "greedy, no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams, static cache": {"num_beams": 3, "cache_implementation": "static"},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 3},
    "repetition penalty": {"repetition_penalty": 1.5},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_left_padded_batch_gives_what_single_prompts_give(joint, way):
    ids, mask = left_padded(PROMPTS)
    settings = {"eos_token_id": EOS, **WAYS[way]}
    together = greedy(joint, ids, attention_mask=mask, **settings)
    each = settings.get("num_return_sequences", 1)
    for row, prompt in enumerate(PROMPTS):
        alone = greedy(joint, torch.tensor([prompt]), **settings)
        for number in range(each):
            from_batch = until_eos(together[row * each + number, ids.shape[1] :])
            assert from_batch == until_eos(alone[number, len(prompt) :])


@pytest.mark.parametrize("lmbda", [0.0, 0.4, 1.0])
def test_sampling_follows_the_joint_distribution(llama, lmbda):
    llama.lmbda = lmbda
    prompt, draws = some_ids(1, 5), 20_000
    with torch.no_grad():
        expected = llama(prompt).logits[0, -1].exp()
    torch.manual_seed(0)
    tokens = llama.generate(
        prompt, num_return_sequences=draws, do_sample=True, top_k=0, max_new_tokens=1, pad_token_id=0
    )
    llama.lmbda = 0.6
    drawn = torch.bincount(tokens[:, -1], minlength=VOCABULARY) / draws
    assert ((drawn - expected).abs() <= 4 * (expected / draws).sqrt() + 1e-4).all()  # four standard deviations


@pytest.mark.parametrize(
    "way",
    [
        *({name: value} for name in ("repetition_penalty", "encoder_repetition_penalty") for value in (0.7, 1.3)),
        {"repetition_penalty": 1.3, "num_beams": 3},
        {"repetition_penalty": 1.3, "do_sample": True, "top_k": 5},
        {"repetition_penalty": 1.3, "prompt_lookup_num_tokens": 3},
        {"repetition_penalty": 1.3, "guidance_scale": 1.5},
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": EOS},
        {"logits_processor": [lambda ids, scores: scores.clamp(min=0)]},
        {"output_logits": True, "return_dict_in_generate": True},
    ],
    ids=str,
)
def test_lambda_0_gives_the_bases_text(joint, way):
    before, joint.lmbda = joint.lmbda, 0.0
    texts = []
    for model in (joint, joint.base_lm):
        torch.manual_seed(0)
        texts.append(greedy(model, torch.tensor([[5, 9, 13, 5, 9, 13, 5, 9]]), 20, **way))
    joint.lmbda = before
    if "output_logits" in way:
        texts = [torch.cat(text.logits) for text in texts]
    assert torch.equal(*texts)


def test_lambda_0_gives_the_bases_text_by_the_checkpoints_own_settings():
    base = tiny_base("llama")
    base.generation_config.update(repetition_penalty=1.3, eos_token_id=None, pad_token_id=0)
    joint = MLPMemory(base, tiny_memory(base), lmbda=0.0)
    ids = some_ids(1, 8)
    assert torch.equal(joint.generate(ids, max_new_tokens=20), base.generate(ids, max_new_tokens=20))


def test_generate_shifts_the_log_probabilities_only(joint):
    ids = some_ids(1, 8)
    shifted = greedy(joint, ids, 1, output_logits=True, return_dict_in_generate=True).logits[0]
    with torch.no_grad():
        base, expected = joint.base_lm(ids).logits[:, -1], joint(ids).logits[:, -1]
    torch.testing.assert_close(shifted.log_softmax(-1), expected)
    torch.testing.assert_close(shifted.logsumexp(-1), base.logsumexp(-1))


def test_tokens_guessed_ahead_change_nothing(llama):
    prompt = torch.tensor([[5, 9, 13, 5, 9, 13, 5, 9]])
    expected = greedy(llama, prompt)
    assert torch.equal(greedy(llama, prompt, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(greedy(llama, prompt, assistant_model=llama.base_lm), expected)


def test_a_text_ends_with_a_stop_string_or_end_of_sequence(llama):
    tokenizer, prompt = letter_tokenizer(), some_ids(1, 5)
    tokens = greedy(llama, prompt)[0, 5:]
    stop = tokenizer.decode(tokens[2:4])
    assert torch.equal(greedy(llama, prompt, stop_strings=[stop], tokenizer=tokenizer)[0, 5:], tokens[:4])
    end = tokens[3].item()
    ended = greedy(llama, prompt, eos_token_id=end)[0, 5:]
    assert torch.equal(ended, tokens[: tokens.tolist().index(end) + 1])


def test_reading_a_prompt_computes_logits_at_its_last_position_only(joint):
    shapes = []
    heads = [joint.base_lm.get_output_embeddings(), joint.knn_generator.lm_head]
    handles = [head.register_forward_hook(lambda module, args, output: shapes.append(output.shape)) for head in heads]
    greedy(joint, some_ids(2, 9), 2)
    for handle in handles:
        handle.remove()
    assert shapes == [(2, 1, VOCABULARY)] * 4


def test_empty_prompts_and_ones_longer_than_the_context_are_refused(llama):
    ids = some_ids(2, CONTEXT + 1)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with pytest.raises(ValueError, match="a prompt is empty"):
        llama.generate(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="a prompt is empty"):
        llama.generate(ids[:, :-1], attention_mask=mask[:, :-1])
    with pytest.raises(ValueError, match=r"65.*64"):
        llama.generate(ids)


def test_padding_does_not_count_against_the_context(llama):
    ids = some_ids(1, CONTEXT + 10)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    assert greedy(llama, ids, 3, attention_mask=mask).shape == (1, CONTEXT + 13)


@pytest.mark.parametrize("limit", [{"max_new_tokens": 50}, {"max_length": 200}, {}])
@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_generation_ends_where_the_context_does(joint, limit, from_checkpoint):
    logging.set_verbosity_error()
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    before = copy.deepcopy(joint.generation_config)
    if from_checkpoint:  # its own generation_config has the limit, and the call passes another config
        joint.generation_config.update(**limit)
        tokens = joint.generate(some_ids(1, 60), GenerationConfig(**settings))
    else:
        tokens = joint.generate(some_ids(1, 60), **settings, **limit)
    joint.generation_config = before
    # 60 tokens and the 4 that fit are read; the fifth is predicted from the last of them.
    assert tokens.shape == (1, CONTEXT + 1)


def test_a_text_from_nothing_ends_where_the_context_does(joint):
    settings = {"do_sample": False, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    assert joint.generate(max_new_tokens=200, **settings).shape == (1, CONTEXT + 1)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
        {
            **{"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_rotary_positions_go_on_as_the_base_does(scaling):
    for length in (60, 80):
        # Dynamic scaling remembers the longest text that it saw: two bases.
        base, same = (tiny_base("llama", rope_parameters={"rope_theta": 10000.0, **scaling}) for _ in range(2))
        joint = MLPMemory(base, tiny_memory(base), lmbda=0.0)
        assert torch.equal(greedy(joint, some_ids(1, length), 20), greedy(same, some_ids(1, length), 20))
