"""Readers and plain writers of GGUF, safetensors and imatrix files, and the names that link them."""
