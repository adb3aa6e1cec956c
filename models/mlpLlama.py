"""The MLP memory of Llama bases, under its name in the original."""

from transformers import LlamaConfig

from .stack import family_class

LlamaMLPModel = family_class(LlamaConfig)
