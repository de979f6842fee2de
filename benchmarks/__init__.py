"""Timings, as ratios within one run. ``python -m benchmarks`` prints and saves all of them."""
