"""Ground floor: the vocabulary, contracts and wires that make Dreamfleet one system.

Nothing here imports torch, ray, zarr, gymnasium or envpool. Start reading at `experience.py`.
"""
