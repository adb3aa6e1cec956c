"""The MLP memory of GPT-2 bases, under its name in the original."""

from transformers import GPT2Config

from .stack import family_class

GPT2MLPModel = family_class(GPT2Config)
