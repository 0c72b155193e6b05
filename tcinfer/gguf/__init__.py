"""Model files: a bounded reader, and which key and tensor says what."""
