"""`just eval`: hold a model's answers against expectations, over HTTP."""
