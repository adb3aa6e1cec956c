"""A tiny base, memory and byte-level tokenizer that can read benchmark prompts. Used by the question-answering tests."""

from pathlib import Path

import numpy as np
import torch
from tiny_models import tiny_base, tiny_memory
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import PreTrainedTokenizerFast

CONTEXT = 512
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


def qa_base(family: str, tokenizer, context: int = CONTEXT):
    """A random base of `family` with the tokenizer's vocabulary."""
    length = {"n_positions": context} if family == "gpt2" else {"max_position_embeddings": context}
    return tiny_base(family, vocab_size=len(tokenizer), **length)


def save_models(folder: Path, family: str = "llama", context: int = CONTEXT) -> tuple[Path, Path]:
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
