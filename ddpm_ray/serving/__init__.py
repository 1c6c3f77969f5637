"""Serve trained models: an engine that batches denoising steps."""
