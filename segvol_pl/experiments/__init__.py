"""Grids of runs, and scaling laws fitted to them."""
