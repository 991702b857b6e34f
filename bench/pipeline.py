"""The pipeline's figures."""
