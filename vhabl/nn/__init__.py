"""Layers, losses and codebooks."""
