"""`python -m training check`: what can go wrong with a training, said before it begins."""
