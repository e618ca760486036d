"""Estimates of a pipeline: how fast this machine is, how much work there is, and what each stage costs."""
