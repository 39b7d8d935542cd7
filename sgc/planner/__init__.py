"""Does it fit, and with which optimizer? A training step planned without its memory."""
