"""The core: JPEG, networks, diffusion and the weights file, in plain PyTorch, without ComfyUI or the trainer."""
