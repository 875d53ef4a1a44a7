"""Pretraining of apt-mini, the built-in backbone, from procedurally generated images only."""
