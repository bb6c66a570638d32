"""Stochastic differential equations, their samplers, and what a network's output means in them."""
