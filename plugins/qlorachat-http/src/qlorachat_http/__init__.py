"""An OpenAI-compatible HTTP server for qlorachat."""
