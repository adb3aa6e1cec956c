"""The joint model: base and memory as one causal language model.

p(y|x) = (1 - lambda) · p_base(y|x) + lambda · p_memory(y|x), paper section 3.4. The memory reads the base's captured
hidden states position by position, so the only cache is the base's. Several memories of a base may be mixed in, each with
its own weight; those that are tied to its head share one product with it.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .capture import HiddenCapture, SharedHead, captured_module
from .gate import LambdaGate, mix
from .joint_config import ADAPTIVE, MLPMemoryConfig, read_joint_config
from .joint_files import (
    absolute,
    check_fit,
    id_of,
    joint_parts,
    made_for,
    open_base,
    open_gate,
    resize_to_memory,
    save_joint,
)
from .mixture import fixed_log_weights, log_mixture, memory_weights
from .stack import context_size, find_memory, load_memory, shifted_nll

logger = logging.get_logger(__name__)

DEFAULT_NEW_TOKENS = 20  # of `generate`, without max_new_tokens and max_length


class MLPMemory(PreTrainedModel, GenerationMixin):
    """Base model and MLP memories as one causal language model whose `.logits` are joint log-probabilities."""

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
        knn_generator: nn.Module | Sequence[nn.Module],
        lmbda: float | Sequence[float] | str = 0.25,
        knn_temp: float = 1.0,
        layer_position: int = -1,
        gates: Sequence[LambdaGate] = (),
    ) -> None:
        """Join a base and its memory, or several; none is copied, moved or cast.

        Args:
            lmbda: weight of the memory, 0 to 1 (of several: of all together, in equal shares, or a list with one for each),
                or "adaptive": by token, from the memories' gates.
            knn_temp: softmax temperature of the memories' logits, above 0. A gate has its own.
            layer_position: the decoder block whose `.mlp` input is captured.
            gates: one for each memory, for "adaptive"; default: those in the memories' folders.

        Raises ValueError when a memory does not fit the base, a setting is out of range, or a gate is missing.
        """
        captured = captured_module(base_lm, layer_position)
        memories = [knn_generator] if isinstance(knn_generator, nn.Module) else list(knn_generator)
        for memory in memories:
            check_fit(base_lm.config, memory)
        # Of a copy: setting the joint config's attention implementation sets its text_config's too.
        config = MLPMemoryConfig(
            text_config=copy.deepcopy(base_lm.config),
            layer_position=layer_position,
            base_model_name_or_path=absolute(base_lm.name_or_path),
        )
        super().__init__(config)
        self.config._attn_implementation = base_lm.config._attn_implementation  # its copy has lost it
        self.loss_type = "ForCausalLM"  # the Trainer counts labels without the first of each row
        self.base_lm = base_lm
        self.knn_generator = memories[0]  # the original's name
        self.more_memories = nn.ModuleList(memories[1:])
        self.gates = nn.ModuleList(gates)
        self.knn_temp = knn_temp
        self.lmbda = lmbda
        self.supports_gradient_checkpointing = base_lm.supports_gradient_checkpointing
        self._captured = (captured,)  # in a tuple, so that it is not registered as a submodule
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        self.generation_config = copy.deepcopy(base_lm.generation_config)
        self.eval()

    @property
    def memories(self) -> list[nn.Module]:
        """The memory, or all of several."""
        return [self.knn_generator, *self.more_memories]

    @property
    def lmbda(self) -> float | list[float] | str:
        """Weight of the memory or memories, as in the constructor; may be set at any time (else ValueError)."""
        return self.config.lmbda

    @lmbda.setter
    def lmbda(self, value: float | Sequence[float] | str) -> None:
        if value == ADAPTIVE:
            if not self.gates:
                self.gates = nn.ModuleList(open_gate(memory, self.base_lm) for memory in self.memories)
            self.knn_temp = self.gates[0].memory_temp
        elif isinstance(value, str):
            raise ValueError(f"lambda {value}: expected a number from 0 to 1, or {ADAPTIVE}")
        else:
            memory_weights(value, len(self.memories))
        self.config.lmbda = value

    @property
    def knn_temp(self) -> float:
        """Temperature of the memories' softmax; may be set at any time (ValueError unless positive)."""
        return self.config.knn_temp

    @knn_temp.setter
    def knn_temp(self, value: float) -> None:
        if not 0.0 < value < math.inf:
            raise ValueError(f"memory temperature {value}: expected a number above 0")
        self.config.knn_temp = value

    @property
    def temperatures(self) -> list[float]:
        """The temperature of each memory's softmax: `knn_temp`, or its gate's."""
        return (
            [gate.memory_temp for gate in self.gates]
            if self.lmbda == ADAPTIVE
            else [self.knn_temp] * len(self.memories)
        )

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
        memory: str | os.PathLike | nn.Module | Sequence[str | os.PathLike | nn.Module] | None = None,
        lmbda: float | Sequence[float] | str | None = None,
        knn_temp: float | None = None,
        layer_position: int | None = None,
        *,
        config: MLPMemoryConfig | None = None,
        memory_dtype: torch.dtype | None = None,
        **base_arguments: Any,
    ) -> MLPMemory:
        """Join a base and a memory, or a list of them, each a folder, a hub name or a loaded model; in eval mode.

        Args:
            base: without `memory`: a folder of `save_pretrained`. A base that is loaded here is frozen (undo with
                `model.base_lm.requires_grad_()`) and resized to its tokenizer if the memory was made for that.
            lmbda, knn_temp, layer_position: default to those of such a folder, else to 0.25, 1 and the block that the
                (first) memory was trained on (-1 if its folder does not record it).
            memory_dtype: default: the base's. The memory goes to the device of the captured block.
            base_arguments: of the base's own `from_pretrained` (`dtype`, `device_map`, `quantization_config`, …).

        Raises ValueError when the base's checkpoint is incomplete, a memory does not fit the base or was trained for
        another one or another block, or a setting is out of range. A loaded base is taken as it is.
        """
        opened = None
        if memory is None:
            memories, base, config = joint_parts(base, config, base_arguments)
            opened, configs = memories[0].parent, [config] * len(memories)
        else:
            single = isinstance(memory, (str, os.PathLike, nn.Module))
            memories = [memory] if single else list(memory)
            configs = [None if isinstance(each, nn.Module) else read_joint_config(each) for each in memories]
            memories = [each if isinstance(each, nn.Module) else find_memory(each) for each in memories]
            config = configs[0] if len(memories) == 1 else None
        reference = absolute(base.name_or_path if isinstance(base, nn.Module) else base)
        pairs = zip(memories, configs, strict=True)
        records = [{} if isinstance(each, nn.Module) else made_for(each, its_config) for each, its_config in pairs]
        settings = {"lmbda": lmbda, "knn_temp": knn_temp, "layer_position": layer_position}
        for name, value in settings.items():
            default = records[0].get(name, getattr(config or MLPMemoryConfig(), name))
            settings[name] = default if value is None else value
        base_found = None
        if not isinstance(base, nn.Module):
            base = open_base(reference, base_arguments, opened)
            base_found = id_of(reference, base_arguments)
        weight = next(captured_module(base, settings["layer_position"]).parameters())
        place = base.device if weight.is_meta else weight.device  # meta: offloaded by accelerate
        for number, (each, made) in enumerate(zip(memories, records, strict=True)):
            if isinstance(each, nn.Module):
                continue
            memories[number] = load_memory(absolute(each), dtype=memory_dtype or base.dtype, device=place)
            base_recorded = made.get("base")
            if base_found and base_recorded and base_found != base_recorded:
                problem = f"{each}: was trained for another base than {reference}"
                if opened is None:
                    raise ValueError(f"{problem} (id {base_recorded[:12]}, given {base_found[:12]})")
                logger.warning(problem)
            if (
                layer_position is None
                and made.get("layer_position", settings["layer_position"]) != settings["layer_position"]
            ):
                raise ValueError(f"{each}: reads another block of the base than {memories[0].name_or_path}")
        resize_to_memory(base, memories[0], reference)
        joint = cls(base, memories, **settings)
        if opened is not None:
            joint.name_or_path = joint.config.name_or_path = absolute(opened)
            joint.config.base_model_name_or_path = config.base_model_name_or_path or reference
            joint.config.results = config.results
        return joint

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write a folder that `from_pretrained`, `AutoModelForCausalLM` and `pipeline` open again.

        `state_dict`: weights to save in place of the model's own, under its names. `options`: those of
        `joint_files.save_joint`; with `push_to_hub` also those of `push_to_hub` and `repo_id` (default: the folder's
        name). Other arguments of transformers' `save_pretrained` are ignored.
        """
        if is_main_process:
            save_joint(self, save_directory, state_dict, **options)
            if push_to_hub:
                repo_id = options.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
                self.push_to_hub(repo_id, state_dict=state_dict, **options)

    def push_to_hub(
        self, repo_id: str, commit_message: str = "Upload MLP Memory", private: bool | None = None, **options: Any
    ) -> Any:
        """Upload a folder of `save_pretrained`, with a base that is not on the hub inside. Returns the commit."""
        api = HfApi(token=options.get("token"))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        named = self.config.base_model_name_or_path
        if named and os.path.isabs(named):
            options["include_base"] = True
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)

    def get_output_embeddings(self) -> nn.Module:
        return self.base_lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base_lm.set_output_embeddings(new_embeddings)

    @torch.no_grad()
    def resize_token_embeddings(self, *arguments: Any, **settings: Any) -> nn.Module:
        """Resize the base's embeddings and the memories' own heads, whose new rows are the mean of the old ones."""
        embeddings = self.base_lm.resize_token_embeddings(*arguments, **settings)
        size = len(embeddings.weight)
        for memory in self.memories:
            if not memory.tied:
                head, rows = memory.lm_head, memory.lm_head.weight[:size]
                new = rows.float().mean(0).to(rows.dtype).expand(size - len(rows), -1)
                head.weight = nn.Parameter(torch.cat([rows, new]), head.weight.requires_grad)
                head.out_features = size
            memory.config.vocab_size = size
        self.config.vocab_size = self.config.text_config.get_text_config().vocab_size = size
        self.config.base_model_name_or_path = None  # the base is no longer what lies there
        return embeddings

    def head_of(self, memory: nn.Module) -> nn.Module:
        """The head of one of the memories: its own, or the base's if it is tied."""
        return self.get_output_embeddings() if memory.tied else memory.lm_head

    def memory_logits(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Each memory's logits (…, vocabulary) of captured hidden states (…, hidden), in its own dtype and place."""
        heads = [self.head_of(memory) for memory in self.memories]
        return [
            head(read(memory, hidden).to(head.weight.dtype)) for memory, head in zip(self.memories, heads, strict=True)
        ]

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

        `labels` (batch, time) are the token ids, or -100; `.loss` is the mean negative log-likelihood of the shifted
        labels, or their sum divided by `num_items_in_batch` (from the Trainer). `logits_to_keep`: the number of last
        positions whose logits are computed (0: all), or a tensor of positions; not together with `labels`.
        `unnormalized`, set in `generate`: plus the base's log-normalizer, so that what depends on where logits have
        their zero (a repetition penalty) acts as on the base's; at lambda 0 they are the base's own.
        """
        return_dict, items = kwargs.pop("return_dict", None), kwargs.pop("num_items_in_batch", None)
        unnormalized = kwargs.pop("unnormalized", False)
        # generate(assistant_early_exit=…) lowers the base's layer count for its drafts: they are the base's alone.
        configs = (self.base_lm.config.get_text_config(), self.config.text_config.get_text_config())
        alone = configs[0].num_hidden_layers < configs[1].num_hidden_layers
        alone = alone or (self.lmbda != ADAPTIVE and not any(memory_weights(self.lmbda, len(self.memories))))

        def kept(hidden: torch.Tensor) -> torch.Tensor:
            last = isinstance(logits_to_keep, int)  # so many last positions; 0: all
            return hidden[:, slice(-logits_to_keep, None) if last else logits_to_keep.to(hidden.device)]

        def read_by_tied() -> list[torch.Tensor]:
            tied = [] if alone else [memory for memory in self.memories if memory.tied]
            return [read(memory, kept(capture.hidden)) for memory in tied]

        captured, head = HiddenCapture(*self._captured), SharedHead(self.get_output_embeddings(), read_by_tied)
        with captured as capture, head:
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
        own = base.logits.float()  # (batch, kept, vocabulary)
        if alone:
            logits = own if unnormalized else own.log_softmax(-1)
        else:
            hidden, by_tied = kept(capture.take()), iter(head.logits)  # (batch, kept, hidden)
            memories = [next(by_tied) if each.tied else each.lm_head(read(each, hidden)) for each in self.memories]
            memories = [
                each.to(own.device).float() / temp for each, temp in zip(memories, self.temperatures, strict=True)
            ]
            if self.lmbda == ADAPTIVE:
                logits = mix(self.gates, own, memories, hidden)
            else:
                log_probs = [each.log_softmax(-1) for each in (own, *memories)]
                logits = log_mixture(log_probs, fixed_log_weights(self.lmbda, len(memories)))
            if unnormalized:
                logits = logits + own.logsumexp(-1, keepdim=True)
        loss = None if labels is None else shifted_nll(logits, labels, items)
        rest = {name: base.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **rest)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The base's: only it has position ids, masks and caches."""
        inputs = self.base_lm.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return {**inputs, "unnormalized": True}

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """`GenerationMixin.generate` on the joint distribution.

        A limit beyond the base's context (`context_size`) is lowered with a warning. Raises ValueError for empty prompts
        and ones longer than the context.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        prompt = prompt if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        prompt = torch.empty(1, 1) if prompt is None else prompt  # BOS alone
        settings = self.generation_config.to_diff_dict()
        settings |= generation_config.to_diff_dict() if generation_config is not None else {}
        settings |= kwargs
        asked, limit = settings.get("max_new_tokens"), settings.get("max_length")
        if asked is None:
            asked = limit - prompt.shape[1] if limit is not None else DEFAULT_NEW_TOKENS
        room = room_after(prompt, kwargs.get("attention_mask"), context_size(self.config))
        if asked > room:
            logger.warning_once(f"{asked} new tokens would go beyond the base's context: lowered to {room}")
            kwargs.pop("max_length", None)
            kwargs["max_new_tokens"] = room
        return super().generate(inputs, generation_config=generation_config, **kwargs)


MLPMemory.register_for_auto_class("AutoModelForCausalLM")
# The Trainer's label smoothing shifts the labels for classes in this table.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MLPMemoryConfig.model_type] = MLPMemory.__name__


def read(memory: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """A memory's input of its head (…, hidden), from captured hidden states in any dtype and place."""
    return memory.hidden(hidden.to(memory.device, memory.dtype))


def room_after(prompts: torch.Tensor, attention_mask: torch.Tensor | None, context: int | None) -> float:
    """How many tokens can follow `prompts`, ids (batch, time) or embeddings (batch, time, hidden), in a context (None:
    unlimited). Raises ValueError when a prompt is empty or longer than the context."""
    shortest = longest = prompts.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        lengths = attention_mask.sum(-1)  # (batch,)
        shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest == 0:
        raise refusal("a prompt is empty: expected at least one token, such as the tokenizer's BOS")
    if context is None:
        return math.inf
    if longest > context:
        raise refusal(f"a prompt of {longest} tokens is longer than the base's context of {context}: shorten it")
    return context - longest + 1  # the last token is never fed back


def refusal(reason: str) -> ValueError:
    """The error for a prompt that cannot be continued; `transformers serve` answers with status 400 and `reason`."""
    web = sys.modules.get("starlette.exceptions")
    if web is None:
        return ValueError(reason)
    return type("PromptError", (web.HTTPException, ValueError), {"__str__": lambda _: reason})(400, reason)
