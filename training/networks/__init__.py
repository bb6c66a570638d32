"""Networks that only trainings need: base models with adapters, and discriminators."""
