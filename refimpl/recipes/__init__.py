"""Which tensor gets which type: llama.cpp's mixes, versioned, and the protected ones."""
