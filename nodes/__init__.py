"""ComfyUI adapters: schemas and thin `execute` functions over `restoration`."""
