"""Batched log-likelihoods of answers and batched greedy generation, for a base model or a joint model.

Both are used through the common interface of transformers' decoders: `forward` with a cache and `logits_to_keep`, and
`generate`. A joint model's logits are log-probabilities already; log-softmax leaves them unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from downstream.tasks import Likelihood, Prompt
from utils.errors import InputError

SHORTEST_START = 32  # tokens that all sequences begin with, from which reading them once saves time


class Encoded(NamedTuple):
    """Token ids (time,) int32 of a prompt, or of prompt and continuation, and where the continuation begins."""

    ids: np.ndarray
    begin: int


class Evaluator:
    """Scores and continues prompts with one model.

    Args:
        model: a causal language model of transformers, or a joint `MLPMemory`, in evaluation mode.
        tokenizer: its tokenizer. Padding is masked or comes last, so results do not depend on the pad token.
        batch_size: sequences per forward pass. It changes the speed, not the results.
        num_beams: of generation; 1: greedy.
        add_bos: begin each text with the BOS token, even if the tokenizer does not (as windows of --window_bos do).

    Raises:
        InputError: `add_bos` without a BOS token.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, add_bos: bool = False, num_beams: int = 1) -> None:
        self.model, self.tokenizer, self.batch_size, self.num_beams = model, tokenizer, batch_size, num_beams
        self.bos = tokenizer.bos_token_id if add_bos else None
        if add_bos and self.bos is None:
            raise InputError("--add_bos: the tokenizer has no BOS token")
        self.device = model.get_input_embeddings().weight.device
        self.context = context_length(model.config)
        self.end_tokens = end_tokens(model, tokenizer)
        self.pad_token = next(each for each in (tokenizer.pad_token_id, *self.end_tokens, 0) if each is not None)

    def encode(self, text: str) -> np.ndarray:
        """Token ids (time,) int32 of `text`; special tokens that the tokenizer adds are kept in front, not at the end."""
        encoded = self.tokenizer(text, return_special_tokens_mask=True)
        ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
        while added and added.pop():
            ids = ids[:-1]
        if self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        return np.asarray(ids, dtype=np.int32)

    def sequences(self, prompt: Prompt, new_tokens: int) -> list[Encoded]:
        """The encoded prompt; or, if it has continuations, prompt and continuation for each of them.

        Prompt and continuation are tokenized together. The continuation begins after as many tokens as the prompt has
        alone, as in TruthfulQA's public code and in the evaluation harness.

        Raises:
            ValueError: nothing to score or to continue, or the model's context is too short.
        """
        alone = self.encode(prompt.text)
        begin = len(alone)
        whole = [self.encode(prompt.text + text) for text in prompt.continuations] or [alone]
        if begin == 0 or any(len(ids) <= begin for ids in whole if prompt.continuations):
            raise ValueError("the prompt or an answer has no token")
        longest = max(map(len, whole)) + (0 if prompt.continuations else new_tokens)
        if self.context is not None and longest > self.context:
            raise ValueError(f"needs {longest} tokens, but the model's context is {self.context}")
        return [Encoded(ids, begin) for ids in whole]

    def _batched(self, items: Sequence[Any], key: Callable, run: Callable[[list], list]) -> list[Any]:
        """The results of `run` for `items`, in order; items with similar `key` share a batch."""
        order = sorted(range(len(items)), key=lambda i: key(items[i]))
        found: list[Any] = [None] * len(items)
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            for i, result in zip(chosen, run([items[i] for i in chosen]), strict=True):
                found[i] = result
        return found

    def _read_start(self, sequences: Sequence[Encoded]) -> tuple[int, Any]:
        """Tokens that all sequences begin with, such as demonstrations or a retrieved document, read once: their number, 0
        where they are few, and their cache."""
        start, cache = common_start(sequences), None
        if len(start) >= SHORTEST_START and len(sequences) > 1:
            ids = torch.from_numpy(start).long()[None].to(self.device)
            cache = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        return (len(start), cache) if hasattr(cache, "batch_repeat_interleave") else (0, None)

    @torch.inference_mode()
    def likelihoods(self, pairs: Sequence[Encoded]) -> list[Likelihood]:
        """Log-probabilities of continuations, in order: float64 sums of float32 log-probabilities."""
        start, cache = self._read_start(pairs)
        # Continuations that begin at the same position share a batch, so that few unused logits are computed.
        key = lambda pair: (pair.begin, len(pair.ids))  # noqa: E731
        return self._batched(pairs, key, lambda batch: self._likelihood_batch(batch, start, cache))

    def _likelihood_batch(self, pairs: list[Encoded], start: int, cache: Any) -> list[Likelihood]:
        """Likelihoods of sequences whose first `start` tokens are in `cache`."""
        pairs = [Encoded(ids[start:], begin - start) for ids, begin in pairs]
        width = max(1, *(len(ids) - 1 for ids, _ in pairs))  # the last token is predicted, never read
        inputs = torch.full((len(pairs), width), self.pad_token)  # (batch, time)
        for row, (ids, _) in enumerate(pairs):
            inputs[row, : len(ids[:-1])] = torch.from_numpy(ids[:-1])
        skipped = min(begin for _, begin in pairs) - 1  # positions without a logit that is needed
        options: dict[str, Any] = {"use_cache": False}
        if start:
            options = {"past_key_values": repeated(cache, len(pairs))}
        # Padding on the right comes after everything that counts: no mask is needed.
        logits = self.model(input_ids=inputs.to(self.device), logits_to_keep=width - skipped, **options).logits
        found = []
        for row, (ids, begin) in enumerate(pairs):
            answer = torch.from_numpy(ids[begin:]).long().to(logits.device)  # (answer,)
            scores = logits[row, begin - 1 - skipped :][: len(answer)].float()  # (answer, V)
            log_probs = scores.gather(-1, answer[:, None])[:, 0] - scores.logsumexp(-1)
            right = (scores.argmax(-1) == answer).tolist()
            # A tokenizer may give an answer no token: then it does not count as right.
            greedy = bool(right) and all(right)
            found.append(Likelihood(log_probs.double().sum().item(), len(answer), greedy, any(right[:1])))
        return found

    @torch.inference_mode()
    def continuations(self, prompts: Sequence[np.ndarray], max_new_tokens: int, stop: str) -> list[str]:
        """Greedy continuations of prompts (token ids), each cut before the first of the characters in `stop`.

        At most `max_new_tokens` tokens are generated; an end-of-sequence token ends a text too. The checkpoint's own
        generation settings (sampling, penalties) are ignored.
        """
        start, cache = 0, None
        if self.num_beams == 1:  # `generate` does not repeat a given cache for beams
            start, cache = self._read_start([Encoded(ids, len(ids)) for ids in prompts])

        def run(batch: list[np.ndarray]) -> list[str]:
            return self._continuation_batch(batch, start, cache, max_new_tokens, stop)

        return self._batched(prompts, len, run)

    def _continuation_batch(
        self, prompts: list[np.ndarray], start: int, cache: Any, max_new_tokens: int, stop: str
    ) -> list[str]:
        """Continuations of prompts whose first `start` tokens are in `cache`."""
        width = max(len(ids) for ids in prompts)
        inputs = torch.full((len(prompts), width), self.pad_token)  # (batch, time), padded on the left, after the start
        mask = torch.zeros_like(inputs)
        for row, ids in enumerate(prompts):
            inputs[row, width - len(ids) :], mask[row, width - len(ids) :] = torch.from_numpy(ids), 1
            inputs[row, :start], mask[row, :start] = torch.from_numpy(ids[:start]), 1
            mask[row, start : start + width - len(ids)] = 0
        options = {"past_key_values": repeated(cache, len(prompts))} if start else {}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=self.num_beams,
            pad_token_id=self.pad_token,
            eos_token_id=self.end_tokens or None,
        )
        own, self.model.generation_config = self.model.generation_config, config
        try:
            sequences = self.model.generate(
                inputs.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([StopCharacters(self, width, stop)]),
                **options,
            )
        finally:
            self.model.generation_config = own
        return [cut(self.decode(row), stop) for row in sequences[:, width:].tolist()]

    def decode(self, ids: list[int]) -> str:
        """The text of generated token ids up to the first end-of-sequence token, without special tokens."""
        end = next((place for place, token in enumerate(ids) if token in self.end_tokens), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True)


class StopCharacters(StoppingCriteria):
    """A row is done when its generated text has one of the stop characters.

    transformers' own criterion needs tokens whose text does not depend on their place, which some tokenizers lack.
    """

    def __init__(self, evaluator: Evaluator, prompt_width: int, stop: str) -> None:
        self.evaluator, self.prompt_width, self.stop = evaluator, prompt_width, stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        texts = [self.evaluator.decode(row) for row in input_ids[:, self.prompt_width :].tolist()]
        done = [any(character in text for character in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)  # (batch,)


def repeated(cache: Any, count: int) -> Any:
    """A copy of a cache of one sequence, for `count` sequences."""
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(count)
    return copied


def common_start(pairs: Sequence[Encoded]) -> np.ndarray:
    """The token ids that all sequences begin with; each keeps a token before its continuation."""
    start = pairs[0].ids if pairs else np.empty(0, np.int32)
    for ids, begin in pairs:
        width = min(len(start), begin - 1)
        differs = np.flatnonzero(start[:width] != ids[:width])
        start = start[: differs[0] if len(differs) else width]
    return start


def cut(text: str, stop: str) -> str:
    """`text` before the first of the characters in `stop`."""
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def context_length(config: Any) -> int | None:
    """The longest sequence that a model takes, from its config; None where it names no bound."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The token ids that end a text: the checkpoint's, else the tokenizer's."""
    own = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if own is None else own
    return [] if found is None else found if isinstance(found, list) else [found]
