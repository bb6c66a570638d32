"""`python -m training presets`: what there is to train, as a list, as files to edit, and as a schema for editors."""
