"""The core: JPEG, networks, diffusion and the weights file, in plain PyTorch; it knows of neither ComfyUI nor trainer."""
