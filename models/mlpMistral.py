"""The MLP memory of Mistral bases, under its name in the original."""

from transformers import MistralConfig

from .stack import family_class

MistralMLPModel = family_class(MistralConfig)
