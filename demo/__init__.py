"""Demos: both continuations side by side on the command line, and a page to look inside."""
