"""JPEG Restorer: nodes for ComfyUI."""

WEB_DIRECTORY = "./web"

# A test runner imports this file as a plain module, outside of any package; ComfyUI gives it one.
if __package__:
    from .nodes.extension import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
