"""Evaluation on question answering and general tasks."""
