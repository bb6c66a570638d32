"""`python -m training restore`: pictures restored from the command line, without ComfyUI."""
