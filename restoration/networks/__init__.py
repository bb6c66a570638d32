"""One file a network. Every layer with weights comes from the `operations` namespace that the caller passes."""
