"""Dataset tools: read, check, caption and bucket pictures. Works without torch."""
