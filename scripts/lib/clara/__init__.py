"""CLaRa (arXiv 2511.18659): documents compressed into vectors that a model reads."""
