"""Training of the demo model from scratch: dialog generator, network, export, evaluation."""
