"""One file a kind of training: what is trained, its loss, and how a finished network restores a picture."""
