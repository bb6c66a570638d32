"""The core: JPEG, networks, diffusion and the weights file, in plain PyTorch. It knows nothing of ComfyUI or the trainer."""
