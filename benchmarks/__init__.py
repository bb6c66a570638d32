"""Side-by-side measurements, each run by name: `python -m benchmarks NAME`."""
