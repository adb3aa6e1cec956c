"""Tiny random decoders and memories for the tests, in memory or saved with a tokenizer. No network.

By themselves: 2 blocks, hidden size 32, vocabulary 97, context 64.
"""

from pathlib import Path

import numpy as np
import torch
from harness import TOKENIZER
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from models import MLPMemory, memory_class, memory_config
from models.gate import LambdaGate

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


def random_gate(base, memory_temp: float = 1.0) -> LambdaGate:
    """A gate for `base` whose lambdas are far from one another."""
    torch.manual_seed(5)
    gate = LambdaGate(base.config.hidden_size, 16, memory_temp)
    with torch.no_grad():
        gate.outer.weight.mul_(5)
        gate.feature_scale.fill_(4.0)
        gate.corpus_mean.normal_()
    return gate


def some_ids(batch: int = 2, time: int = 12, seed: int = 2) -> torch.Tensor:
    """Token ids (batch, time) without the special ones."""
    return torch.randint(2, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def kept_of_a_row(memory, mixed_precision):
    """Bytes that a forward pass keeps of each row for the backward pass."""
    rows, kept = 37, {}

    def keep(tensor):
        if tensor.dim() and len(tensor) == rows:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    half = torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
        memory.hidden(torch.randn(rows, memory.input_dim))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / rows


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """97 tokens: <bos>, <eos> and the 95 printable ASCII characters, one token each."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: number for number, token in enumerate(["<bos>", "<eos>", *characters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def make_base(
    family: str,
    folder: Path,
    *,
    hidden: int = 32,
    vocabulary: int = 276,
    layers: int = 2,
    positions: int = 128,
    seed: int = 0,
) -> Path:
    """A tiny random base model of `family` with its tokenizer."""
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": positions}
    if family == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 2, "n_positions": positions}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


QA_CONTEXT = 512
WORDS = [
    "Answer these questions:\nQuestion: who wrote it?\nAnswer: James the first, of course.",
    "Q: Where is the moon? No, it is not here.\nA: The moon is there. Yes.",
    "#Question#: Which is it?\n#Answer#: the right answer\n#Your Judgement#: No",
] * 4


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs with merges over blanks, a beginning and an end token, no padding token; nothing is put before."""
    trained = ByteLevelBPETokenizer()
    special = ["<bos>", "<eos>"]
    trained.train_from_iterator(WORDS, 330, min_frequency=0, show_progress=False, special_tokens=special)
    tokenizer = Tokenizer.from_str(trained.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def qa_base(family: str, tokenizer, context: int = QA_CONTEXT):
    """A random base of `family` with the tokenizer's vocabulary."""
    length = {"n_positions": context} if family == "gpt2" else {"max_position_embeddings": context}
    return tiny_base(family, vocab_size=len(tokenizer), **length)


def save_models(folder: Path, family: str = "llama", context: int = QA_CONTEXT) -> tuple[Path, Path]:
    """(base folder with tokenizer, memory folder)."""
    tokenizer = byte_tokenizer()
    base = qa_base(family, tokenizer, context)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tiny_memory(base).save_pretrained(folder / "memory")
    return folder / "base", folder / "memory"


@torch.no_grad()
def plain_log_probs(model, tokenizer, prompt: str, continuation: str) -> np.ndarray:
    """Log-probabilities of a continuation's tokens, one text at a time, the textbook way: (tokens,) float64."""
    whole = tokenizer(prompt + continuation, return_tensors="pt").input_ids
    begin = len(tokenizer(prompt).input_ids)
    log_probs = model(whole).logits[0].double().log_softmax(-1)  # (time, V)
    return log_probs[begin - 1 : -1].gather(-1, whole[0, begin:, None])[:, 0].numpy()


@torch.no_grad()
def plain_greedy(model, tokenizer, prompt: str, new_tokens: int) -> str:
    """A greedy continuation without a cache, one text at a time, ended by the end token."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    begin = ids.shape[1]
    for _ in range(new_tokens):
        token = model(ids).logits[0, -1].argmax()
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, begin:], skip_special_tokens=True)
