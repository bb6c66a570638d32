"""What a training needs of its pictures, made once before it."""

from training.prepare.command import run

__all__ = ["run"]
