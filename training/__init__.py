"""The trainer: `python -m training` makes the weights that the nodes load."""
