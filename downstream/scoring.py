"""Batched log-likelihoods of answers and batched greedy generation, for a base model or a joint model alike.

Both models are used through what every transformers decoder offers: `forward`
with a cache and `logits_to_keep`, and `generate`. A joint model's `.logits` are log-probabilities already; taking
their log-softmax changes nothing, so both are treated alike.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from downstream.tasks import Likelihood, Prompt
from utils.errors import InputError

# A common start shorter than this many tokens costs less than copying its cache to every batch.
SHORTEST_SHARED_START = 32


class Encoded(NamedTuple):
    """Token ids (time,) int32 of a prompt, or of prompt and continuation, and where the continuation begins."""

    ids: np.ndarray
    begin: int


class Evaluator:
    """Scores and continues prompts with one model.

    Args:
        model: a causal language model of transformers, or a joint `MLPMemory`; evaluation mode.
        tokenizer: its tokenizer. Without a pad token the end-of-sequence token pads; padding is
            masked or comes after everything that counts, so no result depends on it.
        batch_size: sequences in one forward pass. It changes the speed, not the results.
        add_bos: begin each text with the BOS token, also where the tokenizer does not (as windows of --window_bos do).

    Raises:
        InputError: there is no BOS token to begin with.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, add_bos: bool = False) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.bos = tokenizer.bos_token_id if add_bos else None
        if add_bos and self.bos is None:
            raise InputError("--add_bos: the tokenizer has no BOS token; leave the flag out")
        self.device = model.get_input_embeddings().weight.device
        self.context = context_length(model.config)
        self.end_tokens = end_tokens(model, tokenizer)
        self.pad_token = tokenizer.pad_token_id
        if self.pad_token is None:
            self.pad_token = self.end_tokens[0] if self.end_tokens else 0
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.special_tokens = set(tokenizer.all_special_ids)
        self.start = np.empty(0, dtype=np.int32)
        self.start_cache: Any = None

    def encode(self, text: str) -> np.ndarray:
        """Token ids (time,) int32 of `text`, with the special tokens that the tokenizer puts before it, none after it."""
        ids = self.tokenizer(text, return_attention_mask=False)["input_ids"]
        while ids and ids[-1] in self.special_tokens and not text.endswith(self.tokenizer.decode(ids[-1:])):
            ids = ids[:-1]
        if self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        return np.asarray(ids, dtype=np.int32)

    def sequences(self, prompt: Prompt, new_tokens: int) -> list[Encoded]:
        """The encoded prompt, or, with continuations, prompt and continuation for each of them.

        Prompt and continuation are tokenized together, and the first n tokens count as the prompt, n being the token
        count of the prompt alone: as in the public code of TruthfulQA and in the evaluation harness.

        Raises:
            ValueError: nothing to score or to continue, or more tokens (with `new_tokens`) than the model's context.
        """
        alone = self.encode(prompt.text)
        begin = len(alone)
        if begin == 0:
            raise ValueError("the prompt is empty: it has no token")
        whole = [self.encode(prompt.text + text) for text in prompt.continuations] or [alone]
        for ids, text in zip(whole, prompt.continuations, strict=False):
            if len(ids) <= begin:
                raise ValueError(f"the answer {text!r} adds no token to its prompt")
        new_tokens = 0 if prompt.continuations else new_tokens
        longest = max(map(len, whole)) + new_tokens
        if self.context is not None and longest > self.context:
            what = "prompt and answer" if prompt.continuations else f"the prompt and {new_tokens} new tokens"
            raise ValueError(f"{what} need {longest} tokens, the model's context holds {self.context}")
        return [Encoded(ids, begin) for ids in whole]

    @torch.inference_mode()
    def share_start(self, prompts: Sequence[np.ndarray]) -> int:
        """Read what all `prompts` (token ids) begin with once, and keep its attention cache for all later batches.

        Every sequence scored or continued from then on has to begin with it.

        Demonstrations and instructions are most of a benchmark's tokens. The last token of each prompt is left out, for
        a prediction has to be made from it. Returns the number of shared tokens (0: too few to pay).
        """
        if not prompts:
            return 0
        shared = prompts[0]
        for ids in prompts:
            width = min(len(shared), len(ids) - 1)
            differs = np.flatnonzero(shared[:width] != ids[:width])
            shared = shared[: differs[0] if differs.size else width]
        self.start, self.start_cache = np.empty(0, dtype=np.int32), None
        if len(shared) < SHORTEST_SHARED_START:
            return 0
        keep = {"logits_to_keep": 1} if self.keeps_logits else {}
        output = self.model(input_ids=torch.from_numpy(shared).long()[None].to(self.device), use_cache=True, **keep)
        if not hasattr(output.get("past_key_values"), "batch_repeat_interleave"):
            return 0
        self.start, self.start_cache = shared, output.past_key_values
        return len(shared)

    def _cache_for(self, rows: int) -> Any:
        cache = copy.deepcopy(self.start_cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def _start_is_visible(self, length: int) -> bool:
        """Whether padding between the shared start and the rest of a prompt is harmless in `length` columns.

        Where attention reaches back only so many columns, padding would take the place of tokens.
        """
        windows = [layer.sliding_window for layer in getattr(self.start_cache, "layers", ()) if layer.is_sliding]
        return length <= min(windows, default=length)

    def _batched(self, items: Sequence[Any], key: Callable, run: Callable[[list], list]) -> list[Any]:
        """What `run` makes of `items`, in order; items that are alike by `key` share a batch."""
        order = sorted(range(len(items)), key=lambda i: key(items[i]))
        found: list[Any] = [None] * len(items)
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            for i, result in zip(chosen, run([items[i] for i in chosen]), strict=True):
                found[i] = result
        return found

    @torch.inference_mode()
    def likelihoods(self, pairs: Sequence[Encoded]) -> list[Likelihood]:
        """Log-probabilities of any number of continuations, in order: float64 sums of float32 log-probabilities."""
        # Sequences whose answers begin at the same place share a batch: few positions get logits that nobody reads.
        return self._batched(pairs, lambda pair: (pair.begin, len(pair.ids)), self._likelihood_batch)

    def _likelihood_batch(self, pairs: list[Encoded]) -> list[Likelihood]:
        skip = len(self.start)
        width = max(len(ids) for ids, _ in pairs) - skip - 1  # the last token of all is predicted, never read
        inputs = torch.full((len(pairs), width), self.pad_token)  # (batch, time), padded on the right
        for row, (ids, _) in enumerate(pairs):
            rest = torch.from_numpy(ids[skip:-1])
            inputs[row, : len(rest)] = rest
        keep = width - (min(begin for _, begin in pairs) - skip - 1)
        # Padding comes after all that counts, and attention looks back only: no mask is needed.
        options = {"past_key_values": self._cache_for(len(pairs))} if skip else {"use_cache": False}
        if self.keeps_logits:
            options["logits_to_keep"] = keep
        logits = self.model(input_ids=inputs.to(self.device), **options).logits[:, -keep:]  # (batch, keep, V)
        found = []
        for row, (ids, begin) in enumerate(pairs):
            first = begin - skip - 1 - (width - keep)
            answer = torch.from_numpy(ids[begin:]).long().to(logits.device)  # (answer,)
            scores = logits[row, first : first + len(answer)].float()  # (answer, V)
            chosen = scores.gather(-1, answer[:, None])[:, 0] - scores.logsumexp(-1)
            right = (scores.argmax(-1) == answer).tolist()
            # A tokenizer may give an answer no token: it is not right.
            greedy, first = any(right) and all(right), any(right[:1])
            found.append(Likelihood(chosen.double().sum().item(), len(answer), greedy, first))
        return found

    @torch.inference_mode()
    def continuations(self, prompts: Sequence[np.ndarray], max_new_tokens: int, stop: str) -> list[str]:
        """Greedy continuations of prompts (token ids), each cut before the first of the characters of `stop`.

        At most `max_new_tokens` tokens are generated; an end-of-sequence token ends a text too. A checkpoint's own
        generation settings (sampling, penalties) play no part.
        """
        return self._batched(prompts, len, lambda batch: self._continuation_batch(batch, max_new_tokens, stop))

    def _continuation_batch(self, prompts: list[np.ndarray], max_new_tokens: int, stop: str) -> list[str]:
        width = max(len(ids) for ids in prompts)
        skip = len(self.start) if self._start_is_visible(width + max_new_tokens) else 0
        inputs = torch.full((len(prompts), width), self.pad_token)  # (batch, time)
        mask = torch.zeros_like(inputs)
        for row, ids in enumerate(prompts):
            rest = torch.from_numpy(ids[skip:])
            # The shared start, then padding, then the rest of the prompt: its end is at the right edge.
            inputs[row, :skip], mask[row, :skip] = torch.from_numpy(self.start[:skip]), 1
            inputs[row, width - len(rest) :], mask[row, width - len(rest) :] = rest, 1
        options = {"past_key_values": self._cache_for(len(prompts))} if skip else {}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
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
    """A row is done as soon as its generated text holds one of the stop characters."""

    def __init__(self, evaluator: Evaluator, prompt_width: int, stop: str) -> None:
        self.evaluator, self.prompt_width, self.stop = evaluator, prompt_width, stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        texts = [self.evaluator.decode(row) for row in input_ids[:, self.prompt_width :].tolist()]
        done = [any(character in text for character in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)  # (batch,)


def cut(text: str, stop: str) -> str:
    """`text` before the first of the characters of `stop`."""
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def context_length(config: Any) -> int | None:
    """The longest sequence a model takes, from its config; None where it names no bound."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    return next((value for name in names if (value := getattr(config, name, None))), None)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The token ids that end a text: the checkpoint's, else the tokenizer's."""
    own = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if own is None else own
    return [] if found is None else found if isinstance(found, list) else [found]
