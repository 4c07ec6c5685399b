"""The room precompute."""
