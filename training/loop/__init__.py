"""A run: its steps, what it leaves behind, and how it goes on after any end."""
