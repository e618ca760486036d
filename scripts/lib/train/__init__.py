"""The training loop that SFT, DPO and CLaRa share."""
