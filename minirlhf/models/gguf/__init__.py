"""GGUF files, as llama.cpp writes them, as a source of model directories."""

from minirlhf.models.gguf.convert import convert_gguf

__all__ = ["convert_gguf"]
