"""Comparisons of algorithms over many seeds, and of the quality of gradient estimates."""
