"""Datasets in and out: a replay table as npz episodes or a flat Zarr group, and back (docs/datasets.md)."""
