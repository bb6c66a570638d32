"""What each training can be told: plain dataclasses, and presets as rows of one table."""
