"""Tiny random decoders for the tests: 2 blocks, hidden size 32, vocabulary 97, context 64. No files, no network."""

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from models import MLPMemory, memory_class, memory_config

VOCABULARY, HIDDEN, CONTEXT = 97, 32, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GPT2_SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def tiny_base(family: str, seed: int = 0, **changes):
    """A random base of `family` whose norms, biases and logits are far from their initial values, in eval mode."""
    torch.manual_seed(seed)
    sizes = (GPT2_SIZES if family in ("gpt2", "gpt_bigcode") else SIZES) | changes
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(8)
    return base


def tiny_memory(base, layers: int = 3, seed: int = 1):
    """A random memory for `base`, in eval mode."""
    torch.manual_seed(seed)
    config = memory_config(base.config, layers)
    memory = memory_class(config)(config).eval()
    with torch.no_grad():
        for parameter in memory.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return memory


def tiny_joint(family: str = "llama", **settings) -> MLPMemory:
    base = tiny_base(family)
    return MLPMemory(base, tiny_memory(base), **settings).eval()


def some_ids(batch: int = 2, time: int = 12, seed: int = 2) -> torch.Tensor:
    """Token ids (batch, time) without the special ones."""
    return torch.randint(2, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """97 tokens: <bos>, <eos> and the 95 printable ASCII characters, one token each."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: number for number, token in enumerate(["<bos>", "<eos>", *characters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
