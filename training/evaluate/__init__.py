"""`python -m training evaluate`: what restorers do to pictures, in numbers and in a report."""
