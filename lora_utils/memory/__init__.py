"""The room memory."""
