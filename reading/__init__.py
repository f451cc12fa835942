"""How images, captions and tables of factors come into memory."""
