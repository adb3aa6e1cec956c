"""The joint model: a frozen or trained base, a memory that reads its captured hidden states, and their mixture.

p(y|x) = (1 - lambda) · p_base(y|x) + lambda · p_memory(y|x), paper section 3.4. The memory is computed position by
position, so the cache is the base's alone and beams reorder nothing of ours.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .capture import HiddenCapture, captured_module, hidden_states
from .families import load_memory
from .gate import LambdaGate
from .joint_base import absolute, check_fit, open_base, resize_to_memory
from .joint_config import ADAPTIVE, MLPMemoryConfig, check_lambda, check_temperature, read_joint_config
from .joint_files import has_local_base, joint_parts, save_joint
from .mixture import fixed_log_weights, log_mixture
from .stack import shifted_nll

logger = logging.get_logger(__name__)

# What `generate` makes when neither max_new_tokens nor max_length is given.
DEFAULT_NEW_TOKENS = 20


def joint_log_probs(
    base_logits: torch.Tensor, memory_logits: torch.Tensor, lmbda: float, knn_temp: float
) -> torch.Tensor:
    """log((1-lambda)·softmax(base) + lambda·softmax(memory/knn_temp)), (…, vocabulary) float32.

    Both logits have the same shape; the memory's may be on another device and of another dtype. lambda is in [0, 1],
    knn_temp above 0.
    """
    if lmbda == 0.0:
        return _log_softmax(base_logits)
    memory = _log_softmax(memory_logits.to(base_logits.device), knn_temp)
    if lmbda == 1.0:
        return memory
    return log_mixture((_log_softmax(base_logits), memory), fixed_log_weights(lmbda))


def _log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log softmax(logits / temperature) in float32."""
    return torch.log_softmax(_tempered(logits, temperature), dim=-1, dtype=torch.float32)


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits / temperature, float32 unless the temperature is 1."""
    return logits if temperature == 1.0 else logits.float() / temperature


class MLPMemory(PreTrainedModel, GenerationMixin):
    """Base model and MLP memory as one causal language model whose `.logits` are joint log-probabilities."""

    config_class = MLPMemoryConfig
    base_model_prefix = "base_lm"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        base_lm: PreTrainedModel,
        knn_generator: nn.Module,
        lmbda: float | str = 0.25,
        knn_temp: float = 1.0,
        layer_position: int = -1,
        is_train: bool = False,
        gate: LambdaGate | None = None,
    ) -> None:
        """Join a base and a memory; neither is copied, moved or cast.

        `lmbda`: weight of the memory, 0 to 1, or "adaptive": another one for each token, by `gate`, which defaults to the
        one in the memory's folder. `knn_temp`: softmax temperature of the memory's logits, above 0 (with a gate, that
        which it was trained with).
        `layer_position`: the decoder block whose `.mlp` input is captured. `is_train` freezes the base and makes
        `forward` return the memory's logits alone. Raises ValueError when the memory does not fit the base, or "adaptive"
        has no gate of this pair.
        """
        captured = captured_module(base_lm, layer_position)
        check_fit(base_lm.config, knn_generator)
        # A copy: a composite config hands its attention settings down to the configs inside it.
        config = MLPMemoryConfig(
            text_config=copy.deepcopy(base_lm.config),
            knn_temp=knn_temp,
            layer_position=layer_position,
            base_model_name_or_path=absolute(base_lm.name_or_path),
        )
        super().__init__(config)
        self.config._attn_implementation = base_lm.config._attn_implementation  # its copy has lost it
        self.base_lm = base_lm
        self.knn_generator = knn_generator
        self.gate = gate
        self.lmbda = lmbda
        self.is_train = is_train
        self.supports_gradient_checkpointing = base_lm.supports_gradient_checkpointing
        self._captured = (captured,)  # in a tuple: it is the base's module, not one more of ours
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        if getattr(base_lm, "generation_config", None) is not None:
            self.generation_config = copy.deepcopy(base_lm.generation_config)
        if is_train:
            base_lm.requires_grad_(False)
        self.train(is_train)

    @property
    def lmbda(self) -> float | str:
        """Weight of the memory in the mixture; may be set at any time: 0 to 1, or "adaptive" where there is a gate.

        ValueError otherwise.
        """
        return self.config.lmbda

    @lmbda.setter
    def lmbda(self, value: float | str) -> None:
        value = check_lambda(value)
        if value == ADAPTIVE:
            self.gate = self.gate or self._gate_of_memory()
            self.knn_temp = self.gate.memory_temp
        self.config.lmbda = value

    def _gate_of_memory(self) -> LambdaGate:
        """The gate in the memory's folder. Raises ValueError where there is none, or it is another pair's."""
        folder = self.knn_generator.name_or_path
        gate = LambdaGate.load(folder) if folder else None
        if gate is None:
            told = f"lambda {ADAPTIVE}: {self.knn_generator.name_or_path or 'the memory'} has no gate"
            raise ValueError(f"{told}; train one (python -m training.gate), or give a number from 0 to 1")
        return gate

    @property
    def knn_temp(self) -> float:
        """Temperature of the memory's softmax; may be set at any time (ValueError unless positive)."""
        return self.config.knn_temp

    @knn_temp.setter
    def knn_temp(self, value: float) -> None:
        self.config.knn_temp = check_temperature(value)

    @property
    def layer_position(self) -> int:
        """The decoder block whose `.mlp` input the memory reads; may be set (ValueError outside the model)."""
        return self.config.layer_position

    @layer_position.setter
    def layer_position(self, value: int) -> None:
        self._captured = (captured_module(self.base_lm, value),)
        self.config.layer_position = value

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike | PreTrainedModel,
        memory: str | os.PathLike | nn.Module | None = None,
        lmbda: float | str | None = None,
        knn_temp: float | None = None,
        layer_position: int | None = None,
        *,
        config: MLPMemoryConfig | None = None,
        device: torch.device | str | None = None,
        memory_dtype: torch.dtype | None = None,
        memory_device: torch.device | str | None = None,
        **base_arguments: Any,
    ) -> MLPMemory:
        """Join a base and a memory, each a folder, a hub name or a loaded model; in eval mode.

        With `memory` left out, `base` is a folder that `save_pretrained` wrote. `lmbda`, `knn_temp` and
        `layer_position` default to what such a folder says, else 0.25, 1 and -1. `device` moves the base;
        the memory goes where the captured block is, in the base's dtype, unless `memory_device` or `memory_dtype` say
        otherwise. Further arguments (`dtype`, `device_map`, `quantization_config`, `trust_remote_code`, …) are the
        base's. A base with a padded vocabulary is resized to its tokenizer where the memory was made for that.

        Raises ValueError when the memory does not fit the base, or a setting is out of range.
        """
        opened = None
        if memory is None:
            memory, base, config = joint_parts(base, config, base_arguments)
            opened = memory.parent
        else:
            config = None if isinstance(memory, nn.Module) else read_joint_config(memory)
        reference = absolute(base.name_or_path if isinstance(base, nn.Module) else base)
        given = {"lmbda": lmbda, "knn_temp": knn_temp, "layer_position": layer_position}
        settings = {} if config is None else {name: getattr(config, name) for name in given}
        settings |= {name: value for name, value in given.items() if value is not None}
        if not isinstance(base, nn.Module):
            if device is not None and torch.device(device).type != "cpu":  # read straight onto it
                base_arguments = {"device_map": {"": torch.device(device)}, **base_arguments}
            if opened is None:
                base = AutoModelForCausalLM.from_pretrained(reference, **base_arguments)
            else:
                base = open_base(reference, opened, config, base_arguments)
        if not isinstance(memory, nn.Module):
            weight = next(captured_module(base, settings.get("layer_position", -1)).parameters())
            place = base.device if weight.is_meta else weight.device  # meta: accelerate keeps the block elsewhere
            memory = load_memory(absolute(memory), dtype=memory_dtype or base.dtype, device=memory_device or place)
        resize_to_memory(base, memory, reference)
        joint = cls(base, memory, **settings)
        if opened is not None:
            joint.name_or_path = joint.config.name_or_path = absolute(opened)
            joint.config.base_model_name_or_path = config.base_model_name_or_path or reference
            joint.config.results = config.results
        return joint.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *,
        include_base: bool | None = None,
        base_reference: str | None = None,
        tokenizer: Any = None,
        results: dict[str, Any] | list[dict[str, Any]] | None = None,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write a folder that `from_pretrained`, `AutoModelForCausalLM` and `pipeline` open again.

        It holds the memory, the settings and a model card, and says which base it belongs to: `base_reference`, else
        the name or folder the base was loaded from. `include_base` puts the base itself inside; left at None, that is
        done where the base could not be loaded again as it is (it was trained, it is a part of another joint folder,
        its source is gone). `state_dict`: weights to write in place of the model's own, under its names for them. The
        tokenizer given, else the base's, is written along. `results`: measured rows (`results.json` of an evaluation)
        for the card. Raises ValueError where the folder holds something else, or `include_base` is False and the base
        could not be loaded again.
        """
        if is_main_process:
            save_joint(
                self, save_directory, state_dict, include_base, base_reference, tokenizer, results, max_shard_size
            )

    def _upload_modified_files(self, working_dir: str | os.PathLike, *arguments: Any, **settings: Any) -> Any:
        """The last step of `push_to_hub`: up goes a folder that opens anywhere, and its own card unless there was one.

        So a base that is no hub name's goes inside, and transformers' template of a card makes way.
        """
        card = Path(working_dir, "README.md").read_text(encoding="utf-8")
        self.save_pretrained(working_dir, include_base=has_local_base(working_dir) or None)
        if "automatically generated" not in card:
            Path(working_dir, "README.md").write_text(card, encoding="utf-8")
        return super()._upload_modified_files(working_dir, *arguments, **settings)

    def train(self, mode: bool = True) -> MLPMemory:
        super().train(mode)
        if self.is_train:
            self.base_lm.eval()  # a frozen base has no dropout
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.base_lm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base_lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base_lm.set_output_embeddings(new_embeddings)

    @torch.no_grad()
    def resize_token_embeddings(self, *arguments: Any, **settings: Any) -> nn.Module:
        """The base's own, and its memory's head goes with it: new tokens get the mean of the head's rows."""
        embeddings = self.base_lm.resize_token_embeddings(*arguments, **settings)
        size, head = len(embeddings.weight), self.knn_generator.lm_head
        rows = head.weight[:size]
        new = rows.float().mean(0).to(rows.dtype).expand(size - len(rows), -1)
        head.weight = nn.Parameter(torch.cat([rows, new]), head.weight.requires_grad)
        head.out_features = self.knn_generator.config.vocab_size = size
        self.config.text_config.get_text_config().vocab_size = size
        return embeddings

    def memory_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The memory's logits (…, vocabulary) of captured hidden states (…, hidden), in its own dtype and place."""
        weight = self.knn_generator.lm_head.weight
        return self.knn_generator(hidden.to(device=weight.device, dtype=weight.dtype)).logits

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Joint log-probabilities `.logits` (batch, time, vocabulary) float32, and `.loss` with `labels`.

        `labels` (batch, time) are the token ids, -100 where none; `.loss` is the mean negative log-likelihood of the
        shifted labels. `logits_to_keep`: compute base and memory logits for the last so many positions only (0: all;
        a tensor: these positions), as in every transformers decoder; it does not go together with `labels`.
        `num_items_in_batch`, from the Trainer: what `.loss` is divided by in place of the number of labels.
        """
        if self.is_train:
            return self._memory_only(input_ids, attention_mask, labels)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of all positions: leave logits_to_keep at 0")
        return_dict, items = kwargs.pop("return_dict", None), kwargs.pop("num_items_in_batch", None)
        with HiddenCapture(*self._captured) as capture:
            base = self.base_lm(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **kwargs,
            )
            # A draft that exits early may not reach the captured block: it is the base's alone.
            hidden = None if self._exits_early() else capture.take()  # (batch, time, hidden)
        rest = {name: base.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
        lmbda = self.lmbda if hidden is not None else 0.0
        logits = base.logits.float() if lmbda == ADAPTIVE else _log_softmax(base.logits)  # (batch, kept, vocabulary)
        del base  # its logits go before the memory's come
        if lmbda != 0.0:
            hidden = _kept(hidden, logits_to_keep)
            memory = self.memory_logits(hidden).to(logits.device)  # (batch, kept, vocabulary)
            if lmbda == ADAPTIVE:
                logits = self.gate.mix(logits, _tempered(memory, self.knn_temp).float(), hidden)
            elif lmbda == 1.0:
                logits = _log_softmax(memory, self.knn_temp)
            else:
                memory = _log_softmax(memory, self.knn_temp)
                logits = log_mixture((logits, memory), fixed_log_weights(lmbda))
        loss = None if labels is None else shifted_nll(logits, labels, items)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **rest)
        return output.to_tuple() if return_dict is False else output

    def _exits_early(self) -> bool:
        """Whether `generate(assistant_early_exit=…)` is drafting: it lowers the base's layer count meanwhile."""
        now, layers = (
            each.get_text_config().num_hidden_layers for each in (self.base_lm.config, self.config.text_config)
        )
        return now < layers

    def _memory_only(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor | None
    ) -> CausalLMOutputWithPast:
        """Training: the memory's logits (n, vocabulary) at the n positions whose next label is not -100, in order."""
        if labels is None:
            raise ValueError("is_train=True returns logits at the labelled positions: pass labels")
        hidden = hidden_states(self.base_lm, input_ids, attention_mask, self.layer_position)
        labelled = (labels[:, 1:] != -100).to(hidden.device)
        return CausalLMOutputWithPast(logits=self.memory_logits(hidden[:, :-1][labelled]))

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The base's own: its position ids, masks and caches are all there is to prepare."""
        return self.base_lm.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """`GenerationMixin.generate`, all of it, on the joint distribution.

        Raises ValueError for an empty prompt and one longer than the base's context. Generation ends where the context
        does: a limit beyond it is lowered, and that is said once.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        prompt = prompt if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if prompt is not None:
            settings = (generation_config or self.generation_config).to_dict() | kwargs
            asked, limit = settings.get("max_new_tokens"), settings.get("max_length")
            if asked is None:
                asked = limit - prompt.shape[1] if limit is not None else DEFAULT_NEW_TOKENS
            room = room_after(prompt, kwargs.get("attention_mask"), self.config.max_position_embeddings)
            if asked > room:
                logger.warning_once(f"{asked} new tokens would go beyond the base's context: lowered to {room}")
                kwargs.pop("max_length", None)
                kwargs["max_new_tokens"] = room
        return super().generate(inputs, generation_config=generation_config, **kwargs)


MLPMemory.register_for_auto_class("AutoModelForCausalLM")


def room_after(prompts: torch.Tensor, attention_mask: torch.Tensor | None, context: int | None) -> float:
    """How many tokens can follow `prompts`, ids (batch, time) or embeddings (batch, time, hidden), in a context; without
    a limit (None) infinitely many.

    Raises ValueError when a prompt is empty or longer than the context.
    """
    shortest = longest = prompts.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        lengths = attention_mask.sum(-1)  # (batch,)
        shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest == 0:
        raise refusal("a prompt is empty: expected at least one token (the tokenizer's BOS will do)")
    if context is None:
        return math.inf
    if longest > context:
        raise refusal(f"a prompt of {longest} tokens is longer than the base's context of {context}: shorten it")
    return context - longest + 1  # the last token is never fed back


def refusal(reason: str) -> ValueError:
    """The error for a prompt that cannot be continued. A server of transformers answers it with status 400 and the reason."""
    web = sys.modules.get("starlette.exceptions")
    if web is None:
        return ValueError(reason)
    return type("PromptError", (web.HTTPException, ValueError), {"__str__": lambda _: reason})(400, reason)


def _kept(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of `hidden` (batch, time, hidden) whose logits are asked for."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    return hidden[:, logits_to_keep.to(hidden.device)]
