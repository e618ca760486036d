"""Rows and what is measured on them: formats, the Factbook, evaluation sets, metrics, retrieval."""
