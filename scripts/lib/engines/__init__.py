"""Whatever turns prompts into text: transformers, llama.cpp, vLLM, an OpenAI-compatible server."""
