"""The GGUF file format: which families it can hold, writing, reading, packing, the vocabulary inside."""
