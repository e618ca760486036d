"""Calibrated quantisation, and what it costs: divergence from the source model."""
