"""What a run takes: predicted by part, measured, and what would fit."""
