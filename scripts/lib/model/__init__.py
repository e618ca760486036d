"""A model directory: what it is, how it is loaded, how a chat becomes token ids."""
