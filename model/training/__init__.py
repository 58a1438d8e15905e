"""Trains the small demo model from nothing: generator, network, export, evaluation."""
